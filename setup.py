"""What depends on where the repository is: the addresses of the package, and the links of its page.

``NSS_PRUNE_REPOSITORY``, an address such as https://github.com/owner/name, makes the README's links
absolute, so that they work on the page of a package index, and gives the package its addresses.
Everything else is in pyproject.toml.
"""

import os
import re
from pathlib import Path

from setuptools import setup


def absolute(text: str, repository: str, revision: str = "main") -> str:
    """Markdown with the links to files of the repository made absolute, pictures to their bytes."""

    def address(found: re.Match[str]) -> str:
        kind = "raw" if found[1] == "!" else "blob"
        return f"{found[1]}[{found[2]}]({repository}/{kind}/{revision}/{found[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", address, text)


def main() -> None:
    """Hand setuptools what is dynamic."""
    readme = Path(__file__).with_name("README.md").read_text("utf-8")
    repository = os.environ.get("NSS_PRUNE_REPOSITORY", "").rstrip("/")
    addresses = {}
    if repository:
        readme = absolute(readme, repository)
        addresses = {
            "Repository": repository,
            "Documentation": f"{repository}/blob/main/docs/index.md",
            "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        }
    setup(
        long_description=readme,
        long_description_content_type="text/markdown",
        project_urls=addresses,
    )


if __name__ == "__main__":
    main()
