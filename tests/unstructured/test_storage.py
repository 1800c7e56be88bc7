"""Masks in files: round trip, one bit a weight, and files that are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nss_prune.core import files
from nss_prune.core.bits import pack, unpack
from nss_prune.core.files import read_file, write_file
from nss_prune.errors import FileFormatError, ModelMismatchError, NothingToPruneError
from nss_prune.unstructured import load_masks, n_m, save_masks, sparsify
from nss_prune.unstructured.storage import shapes
from reference_unstructured import (
    Reader,
    Tied,
    assert_as_it_was,
    convolutional,
    fresh,
    perceptron,
    registered_masks,
    snapshot,
)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (4, 3, 2, 3)])
def test_bits_round_trip(shape):
    masks = {"a": torch.rand(shape) < 0.5, "b": torch.ones(shape, dtype=torch.bool)}
    packed = pack(masks)
    assert all(bits.shape == (-(-masks["a"].numel() // 8),) for bits in packed.values())
    unpacked = unpack(packed, shapes(masks))
    assert all(torch.equal(unpacked[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("make", [perceptron, convolutional, Tied, Reader])
def test_masks_round_trip(tmp_path, make):
    path = tmp_path / "masks.safetensors"
    model, other = fresh(make), fresh(make)
    masks = sparsify(model, 0.5, "erk")
    save_masks(path, model)
    loaded = load_masks(path, other)
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_only_the_layers_of_the_file_change(tmp_path):
    path = tmp_path / "masks"
    model = fresh()
    saved = sparsify(model, 0.5, ignored_layers=["2"])
    save_masks(path, model)
    other = fresh()
    own = sparsify(other, 0.9)["2"]
    load_masks(path, other)
    assert torch.equal(registered_masks(other)["2"], own)
    assert torch.equal(registered_masks(other)["0"], saved["0"])
    load_masks(path, third := fresh())
    assert registered_masks(third).keys() == {"0", "3"}


def test_size_is_about_a_bit_a_weight(tmp_path):
    model = nn.Sequential(nn.Linear(1000, 1000))
    sparsify(model, 0.5)
    save_masks(tmp_path / "masks", model)
    assert (tmp_path / "masks").stat().st_size < 1000 * 1000 / 8 + 1000


def test_a_model_that_is_one_layer(tmp_path):
    model = nn.Linear(5, 5)
    sparsify(model, 0.5)
    save_masks(tmp_path / "masks", model)
    assert list(load_masks(tmp_path / "masks", nn.Linear(5, 5))) == [""]


def test_no_masks_to_save(tmp_path):
    with pytest.raises(NothingToPruneError, match="sparsify"):
        save_masks(tmp_path / "masks", fresh())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "masks.safetensors"
    model = fresh()
    sparsify(model, 0.5)
    save_masks(path, model)
    return path


def assert_refused(path, error, match):
    model = fresh()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load_masks(path, model)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("place", [0, 9, 60, -1])
def test_a_changed_byte_is_refused(saved, place):
    content = bytearray(saved.read_bytes())
    content[place] ^= 1
    saved.write_bytes(content)
    assert_refused(saved, FileFormatError, "masks.safetensors")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_cut_file_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    assert_refused(saved, FileFormatError, "damaged")


def test_a_foreign_file_is_refused(saved):
    save_file({"weight": torch.ones(3)}, saved)
    assert_refused(saved, FileFormatError, "something else")
    write_file(saved, "another kind", {"weight": torch.ones(3)}, {})
    assert_refused(saved, FileFormatError, "another kind")


def test_a_newer_version_is_refused(saved, monkeypatch):
    monkeypatch.setattr(files, "VERSION", files.VERSION + 1)
    sparsify(model := fresh(), 0.5)
    save_masks(saved, model)
    monkeypatch.undo()
    assert_refused(saved, FileFormatError, "version 3.*upgrade")


def test_a_missing_file(tmp_path):
    assert_refused(tmp_path / "none", FileNotFoundError, "none")


@pytest.mark.parametrize(
    "other",
    [nn.Sequential(nn.Linear(20, 30)), nn.Sequential(nn.Linear(20, 31), nn.ReLU())],
)
def test_another_model_is_refused(saved, other):
    before = snapshot(other)
    with pytest.raises(ModelMismatchError, match="architecture"):
        load_masks(saved, other)
    assert_as_it_was(other, before)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(saved, "kind", {}, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_tensors_of_every_kind_and_shared_storage(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "view": base[:6],
        "rest": base[3:],
        "strided": base.view(3, 4).t(),
        "scalar": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
    }
    write_file(tmp_path / "file", "kind", tensors, {"note": [1, None]})
    read, notes = read_file(tmp_path / "file", "kind")
    assert notes == {"note": [1, None]}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_n_m_masks_are_saved_too(tmp_path):
    model = fresh(lambda: nn.Linear(8, 4))
    masks = n_m(model)
    save_masks(tmp_path / "masks", model)
    assert torch.equal(load_masks(tmp_path / "masks", nn.Linear(8, 4))[""], masks[""])
    assert load_file(tmp_path / "masks")[""].dtype == torch.uint8
