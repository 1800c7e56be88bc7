"""Profiles and slices in files: the same after a round trip, refused when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from test_streaming import same

from networks import Residual, batches, cnn, mlp
from nss_prune import Profile, Slice, profile
from nss_prune.core import files
from nss_prune.errors import ArgumentError, FileFormatError
from nss_prune.profiling.schema import KIND


@pytest.fixture
def known() -> Profile:
    torch.manual_seed(0)
    return profile(mlp(), batches(48, (12,), 3), metrics=("taylor", "var"), keep_statistics=True)


def test_profile_round_trip(known, tmp_path: Path) -> None:
    known.save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors")
    same(known, loaded)
    assert loaded.neurons.left_alone == known.neurons.left_alone
    assert loaded.statistics is None
    with pytest.raises(ArgumentError, match="keep_statistics"):
        loaded.save(tmp_path / "again.safetensors", statistics=True)


def test_statistics_round_trip_and_merge(known, tmp_path: Path) -> None:
    known.save(tmp_path / "profile.safetensors", statistics=True)
    loaded = Profile.load(tmp_path / "profile.safetensors")
    same(Profile.merge([known, known]), Profile.merge([loaded, known]))


def as_before(path: Path, landscape: dict[str, object], metrics: tuple[str, ...]) -> None:
    """Rewrite a profile's file as versions did that kept Σ x xᵀ and Σ x."""
    tensors, notes = files.read_file(path, KIND)
    for key in [key.removesuffix("/mean") for key in tensors if key.endswith("/mean")]:
        _, category, name = key.split("/")
        samples = next(
            rows[name] for c, _, rows in notes["statistics"]["sums"] if str(c) == category
        )
        mean = tensors.pop(f"{key}/mean")
        tensors[f"{key}/total"] = mean * samples
        tensors[f"{key}/matrix"] = tensors.pop(f"{key}/scatter") + samples * torch.outer(mean, mean)
    for later in ("ranked_by", "used", "unused"):
        del notes[later]
    for later in ("format", "drawn"):
        del notes["statistics"][later]
    notes["statistics"]["landscape"].update(landscape)
    notes["statistics"]["metrics"] = metrics
    files.write_file(path, KIND, tensors, notes)


def test_sums_of_earlier_files_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    torch.manual_seed(0)
    only = profile(mlp(), batches(48, (12,), 3), keep_statistics=True)
    only.save(path, statistics=True)
    as_before(path, {}, ("taylor",))
    loaded = Profile.load(path)
    same(only, loaded)
    assert (loaded.used, loaded.unused, loaded.ranked_by, loaded.notes) == (48, 0, "magnitude", ())
    same(Profile.merge([only, only]), Profile.merge([loaded, only]))


@pytest.mark.parametrize(
    ("landscape", "metrics"), [({"features": "flat"}, ("taylor",)), ({}, ("taylor", "var"))]
)
def test_sums_that_meant_something_else_are_left_out(known, tmp_path, landscape, metrics) -> None:
    path = tmp_path / "profile.safetensors"
    known.save(path, statistics=True)
    as_before(path, landscape, metrics)
    loaded = Profile.load(path)
    same(known, loaded)
    assert loaded.statistics is None
    assert "anew" in loaded.notes[-1]


@pytest.mark.parametrize(("make", "shape"), [(cnn, (3, 12, 12)), (Residual, (6,))])
def test_slice_round_trip(make, shape, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = make().double().eval(), batches(48, shape, 3)
    critical = profile(model, data).slice(0.8)
    critical.save(tmp_path / "slice.safetensors")
    loaded = Slice.load(tmp_path / "slice.safetensors")
    assert all(torch.equal(loaded.kept[name], mask) for name, mask in critical.kept.items())
    inputs = data[0][0]
    with critical.masked(model):
        expected = model(inputs)
    with loaded.masked(model):
        assert torch.equal(model(inputs), expected)
    assert loaded.compression_rate(model) == critical.compression_rate(model)


def test_vgg16_with_ten_categories_is_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16_bn(num_classes=10)
    vgg.avgpool, vgg.classifier = torch.nn.Flatten(), torch.nn.Linear(512, 10)
    data = [(torch.randn(80, 3, 32, 32), torch.arange(80) % 10)]
    result = profile(vgg, data)
    result.save(tmp_path / "profile.safetensors")
    result.slice(0.9).save(tmp_path / "slice.safetensors")
    assert (tmp_path / "profile.safetensors").stat().st_size < 1e6
    assert (tmp_path / "slice.safetensors").stat().st_size < 10e3
    same_slice = Profile.load(tmp_path / "profile.safetensors").slice(0.9)
    assert all(
        torch.equal(same_slice.kept[name], mask) for name, mask in result.slice(0.9).kept.items()
    )


def test_damaged_foreign_and_newer_files_are_refused(known, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "profile.safetensors"
    known.save(path)
    whole = path.read_bytes()
    for damage in (whole[:-7], whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damage)
        with pytest.raises(FileFormatError, match="damaged"):
            Profile.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="something else"):
        Profile.load(path)
    known.slice(0.9).save(path)
    with pytest.raises(FileFormatError, match="nss_prune slice"):
        Profile.load(path)
    with monkeypatch.context() as newer:
        newer.setattr(files, "VERSION", files.VERSION + 1)
        known.save(path)
    with pytest.raises(FileFormatError, match="upgrade"):
        Profile.load(path)


def test_a_save_that_dies_leaves_the_old_file(known, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "profile.safetensors"
    known.save(path)
    whole = path.read_bytes()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        known.save(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
