"""The notebooks as pages of the documentation, for MkDocs: text, code, and what it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = "notebooks"


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook as Markdown, with a link to itself under its title."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    title, _, rest = parts[0].partition("\n")
    download = f'<a href="../{name}" download>The notebook</a>'
    return "\n\n".join([title, download, rest.strip(), *parts[1:]]) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook."""
    for path in sorted(Path(config.docs_dir, FOLDER).glob("*.ipynb")):
        text = as_markdown(json.loads(path.read_text(encoding="utf-8")), path.name)
        files.append(File.generated(config, f"{FOLDER}/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages."""
    return markdown.replace(".ipynb)", ".md)")
