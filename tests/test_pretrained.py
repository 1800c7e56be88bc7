"""The rows of pretrained models, on tiny ones with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model

from benchmarks import pretrained
from benchmarks.common.data import Data, Split
from nss_prune.errors import DataError

TINY: dict[str, dict[str, Any]] = {
    pretrained.DEIT: {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    pretrained.SWIN: {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1),
                      "num_heads": (2, 4), "window_size": 4},
    pretrained.CONVNEXT: {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 16)},
    "resnet50": {"layers": (1, 1, 1, 1)},
}  # fmt: skip


def split(samples: int) -> Split:
    generator = torch.Generator().manual_seed(samples)
    pixels = torch.randint(256, (samples, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(samples) % 5
    return Split(pixels, labels, torch.full((3, 1, 1), 127.5), torch.full((3, 1, 1), 127.5))


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = create_model(name, num_classes=5, **TINY[name])
    return model


@pytest.mark.parametrize("name", TINY)
def test_a_row_of_each_kind_of_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tiny(name).state_dict(), tmp_path / "weights.safetensors")
    data = Data("imagenet", "random pictures", split(240), split(40), split(60))
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: data)
    monkeypatch.setattr(pretrained.timm, "create_model", tiny)
    rows = {(row.what, row.kept): row for row in pretrained.ROWS if row.model == name}
    monkeypatch.setattr(pretrained, "ROWS", tuple(rows.values())[:2])
    pretrained.main(["--model", name, "--weights", str(tmp_path / "weights.safetensors"),
                     "--seeds", "1", "--calibrated", "220", "--output", str(tmp_path)])  # fmt: skip
    text = (tmp_path / f"pretrained-{name}.json").read_text()
    assert "random pictures" in text


@pytest.mark.parametrize(("what", "hidden", "inside"), [
    ("mlp", 0.5, 1.0), ("heads", 1.0, 0.5), ("both", 0.5, 0.5),
])  # fmt: skip
def test_what_is_pruned_and_nothing_else(what: str, hidden: float, inside: float) -> None:
    model = tiny(pretrained.DEIT).eval()
    row = pretrained.Row(pretrained.DEIT, what, 0.5)
    smaller: Any = pretrained.pruned(model, row, list(split(220).batches(50)))
    assert sum(block.mlp.fc1.out_features for block in smaller.blocks) == hidden * 192
    assert sum(block.attn.head_dim for block in smaller.blocks) == inside * 16
    assert smaller.embed_dim == 24
    assert all(block.attn.num_heads == 3 for block in smaller.blocks)


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"model": tiny("resnet50").state_dict()}, tmp_path / "weights.pth")
    pretrained.load_weights(tiny("resnet50"), tmp_path / "weights.pth")
    with pytest.raises(DataError, match="another model"):
        pretrained.load_weights(tiny(pretrained.DEIT), tmp_path / "weights.pth")
    with pytest.raises(DataError, match="there is no"):
        pretrained.load_weights(tiny(pretrained.DEIT), tmp_path / "nothing.pth")


def test_published_figures() -> None:
    found = {(row.model, row.what, row.source[:4]): row.published for row in pretrained.ROWS}
    assert found[pretrained.DEIT, "heads", "CORP"] == 0.94
    assert found[pretrained.DEIT, "mlp", "CORP"] == pytest.approx(9.74)
    assert found[pretrained.DEIT, "mlp", "VBP,"] == pytest.approx(15.34)
