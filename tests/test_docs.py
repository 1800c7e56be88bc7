"""The documentation runs, block by block, and has every public name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import nss_prune
from nss_prune.cli.main import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "results" not in page.parts)
BLOCK = re.compile(r"^```(\w*)(?: title=\"(.+?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PUBLIC = ("nss_prune", "nss_prune.unstructured", "nss_prune.adaptation", "nss_prune.adapters")
CLASSES = 10
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, file name and text of the blocks of a page."""
    return BLOCK.findall(page.read_text("utf-8"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read: pictures of ten colours, and weights."""
    folder = tmp_path_factory.mktemp("material")
    for label in range(CLASSES):
        (folder / "pictures" / f"class{label}").mkdir(parents=True)
        for number in range(2):
            colour = (25 * label, 255 - 25 * label, 120 * number)
            picture = Image.new("RGB", (40, 40), colour)
            picture.save(folder / "pictures" / f"class{label}" / f"{number}.png")
    torch.manual_seed(0)
    torch.save(
        timm.create_model("resnet10t", num_classes=CLASSES).state_dict(), folder / "weights.pth"
    )
    return folder


@pytest.fixture
def folder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a page's commands."""
    for path in material.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_missing(text: str) -> bool:
    """Whether a block needs what is not installed, as its first line says."""
    needed = re.match(r"# needs: (.+)\n", text)
    names = needed[1].split(", ") if needed else []
    return any(importlib.util.find_spec(name) is None for name in names)


def run_python(text: str, folder: Path, names: dict[str, object]) -> None:
    """Run a block after those before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(text.replace("/tmp/", f"{folder}/"), names)


def run_shell(text: str) -> None:
    """Run the commands of a block; those that install must name extras that there are."""
    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "nss-prune":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert main(arguments) == 0, line
        elif program == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", *arguments]
            environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
            subprocess.run(torchrun, check=True, env=environment, capture_output=True)
        elif program:
            assert line.startswith("pip install "), line
            for extra in re.findall(r"nss_prune\[(\w+)\]", line):
                assert extra in EXTRAS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_block_runs(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    torch.manual_seed(0)
    start = page.parent / "index.md"
    before = blocks(start) if page.parent.name == "howto" and page != start else []
    for language, title, text in [*before, *blocks(page)]:
        if title:
            (folder / title).write_text(text)
        elif is_missing(text):
            continue
        elif language == "python":
            run_python(text, folder, names)
        elif language == "sh":
            run_shell(text)
        else:
            assert language in ("text", "yaml"), language


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def public() -> Iterator[str]:
    """Names of what the package shows."""
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            yield f"{module}.{name}"
    errors = importlib.import_module("nss_prune.errors")
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.NSSPruneError):
            yield f"nss_prune.errors.{name}"


def found(name: str) -> object:
    """What a dotted name stands for."""
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


def test_the_reference_has_every_public_name() -> None:
    """Under one of the names that it has."""
    pages = (DOCS / "reference").glob("*.md")
    listed = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in pages), re.MULTILINE)
    assert len(set(listed)) == len(listed)
    shown = {id(found(name)) for name in listed}
    assert [name for name in public() if id(found(name)) not in shown] == []


def test_every_public_name_is_documented() -> None:
    """Classes and functions with their public methods have a docstring."""
    bare = []
    for name in public():
        value = found(name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        members = vars(value).items() if inspect.isclass(value) else ()
        methods = [
            (f"{name}.{own}", member)
            for own, member in members
            if not own.startswith("_") and inspect.isfunction(member)
        ]
        bare += [own for own, each in [(name, value), *methods] if not inspect.getdoc(each)]
    assert bare == []


def test_extras_named_in_errors_exist() -> None:
    package = Path(nss_prune.__file__).parent
    sources = "\n".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    named = set(re.findall(r"nss_prune\[(\w+)\]", sources))
    assert named >= {"pandas", "plot", "hub", "finetune", "lightning", "transformers", "avalanche"}
    assert named - set(EXTRAS) == set()


def test_the_version_has_its_section_in_the_changelog() -> None:
    assert f"\n## {nss_prune.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
