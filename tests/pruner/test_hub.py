"""Folders as timm and the hub have them; nothing here reaches for the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from nss_prune import NSSPruner, from_pretrained, push_to_hub, save_pretrained
from nss_prune.errors import ArgumentError, FileFormatError
from nss_prune.graph.costs import Cost
from nss_prune.pruner.figures import Figures
from nss_prune.pruner.report import Report, Row

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def smaller() -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    data = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)]
    pruner = NSSPruner(model, IMAGES, params_budget=0.5, data=data, fold=False)
    pruner.step()
    assert pruner.report is not None
    return model, pruner.report


def test_a_folder_and_back(smaller: tuple[nn.Module, Report], tmp_path: Path) -> None:
    model, report = smaller
    save_pretrained(model, tmp_path / "small", report.with_figures(accuracy=(0.9, 0.875)))
    names = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet10t", 4)
    loaded = from_pretrained(tmp_path / "small")
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    card = (tmp_path / "small" / "README.md").read_text()
    _, head, text = card.split("---", 2)
    assert yaml.safe_load(head)["library_name"] == "nss_prune"
    assert f"{report.after.parameters:,}" in text
    assert "| accuracy | 90.00% | 87.50% |" in text


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    save_pretrained(model, tmp_path)
    other = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert from_pretrained(tmp_path, other) is other
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(ArgumentError, match="pass model="):
        from_pretrained(tmp_path)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no folder"):
        from_pretrained("./nowhere")
    save_pretrained(nn.Linear(2, 2), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileFormatError, match="no JSON"):
        from_pretrained(tmp_path, nn.Linear(2, 2))


def test_pushing_asks_for_a_login_and_uploads_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    report = Report((Row("0", 2, 1),), Cost(2, 2), Cost(1, 1), figures=Figures(latency=(1, 2)))
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ArgumentError, match="not logged in"):
        push_to_hub(nn.Linear(2, 2), "me/small", report)
    calls: list[tuple[str, Any]] = []

    def upload(**given: Any) -> None:
        folder = Path(given["folder_path"])
        calls.append((given["repo_id"], {path.name for path in folder.iterdir()}))
        assert "not faster" in (folder / "README.md").read_text()

    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub, "create_repo", lambda name, **_: f"https://hub/{name}")
    monkeypatch.setattr(hub, "upload_folder", upload)
    assert push_to_hub(nn.Linear(2, 2), "me/small", report) == "https://hub/me/small"
    assert calls == [("me/small", {"config.json", "model.safetensors", "README.md"})]


def test_a_repository_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = nn.Linear(2, 2)
    save_pretrained(model, tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert torch.equal(from_pretrained("me/small", nn.Linear(2, 2)).weight, model.weight)
