"""A model, data and pictures that the commands are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

OWN = """
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 4))


def data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(60, 12, generator=generator), torch.arange(60) % 4) for _ in range(2)]


class Smallest:
    def __call__(self, group):
        return group[0].dep.target.module.weight.abs().sum(1)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05)
"""

Own = Callable[[str], str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model and data of one's own."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def own(folder: Path) -> Own:
    """What is in the file of one's own -> module:name."""
    return lambda what: f"own_{folder.name.replace('-', '_')}:{what}"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of eight pictures, of one colour each."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for label, colour in enumerate(["red", "lime", "blue", "white"]):
        (root / f"class{label}").mkdir()
        for number in range(8):
            picture = Image.new("RGB", (40, 36), colour)
            dots = torch.randint(0, 36, (30, 2), generator=generator).tolist()
            for x, y in dots:
                picture.putpixel((x, y), (0, 0, 0))
            picture.save(root / f"class{label}" / f"{number}.png")
    return root
