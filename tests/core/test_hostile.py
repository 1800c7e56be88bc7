"""Files that are cut, flipped, or crafted with right digests: refused in words, nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hostile import KINDS, attempt, contents, crafted
from networks import batches, mlp
from nss_prune import Slice, load_pruned, profile, save_pruned
from nss_prune.core import files
from nss_prune.core.files import read_file, write_file
from nss_prune.errors import FileFormatError, ModelMismatchError, NumericalError
from nss_prune.unstructured import load_masks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    for name, kind in KINDS.items():
        kind.write(folder / name)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_hostile_contents_are_refused_and_others_loaded_as_they_say(
    name: str, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    for seed in range(60):
        shutil.copy(written / name, path)
        made = crafted(path, seed)
        outcome = attempt(KINDS[name], path)
        allowed = ("refused",) if made.hostile else ("refused", "survived")
        assert outcome.kind in allowed, f"{seed}, {made}: {outcome}"


def test_a_file_cut_at_any_length_is_refused(written: Path, tmp_path: Path) -> None:
    whole, path = (written / "slice").read_bytes(), tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="file"):
            Slice.load(path)


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits_are_refused(name: str, written: Path, tmp_path: Path) -> None:
    whole, path = (written / name).read_bytes(), tmp_path / "file"
    draw = random.Random(name)
    for _ in range(60):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        outcome = attempt(KINDS[name], path)
        assert isinstance(outcome.refusal, FileFormatError)
        assert not outcome.damaged


def test_a_file_pays_for_what_it_takes(written: Path, tmp_path: Path) -> None:
    """Of a few hundred bytes none is allowed to take hundreds of megabytes."""
    path = tmp_path / "file"
    shutil.copy(written / "masks", path)
    kind, tensors, notes = contents(path)
    notes["shapes"]["1"] = [2**20, 2**10]
    write_file(path, kind, tensors, notes)
    with pytest.raises(FileFormatError, match="allowed is"):
        load_masks(path, mlp())
    shutil.copy(written / "slice", path)
    kind, tensors, notes = contents(path)
    for member in notes["groups"][0][2]:
        member[2], member[4] = 2**34, [0, 2**28]
    write_file(path, kind, tensors, notes)
    with pytest.raises(FileFormatError, match="more than this file can have"):
        Slice.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, '{"groups": 1', "nul", "[1, 2"])
def test_notes_that_are_no_json_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    header = {"kind": "any", "version": str(files.VERSION), "notes": text}
    save_file({}, path, {**header, "digest": files._digest({}, header)})
    with pytest.raises(FileFormatError):
        read_file(path, "any")


def test_kind_and_version_are_covered_by_the_digest(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = (written / "slice").read_bytes()
    for old, new in (
        (b'"version":"2"', b'"version":"1"'),
        (b"nss_prune slice", b"nss_prune masks"),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(FileFormatError, match="damaged"):
            read_file(path, "nss_prune masks" if b"masks" in new else "nss_prune slice")


def test_files_of_version_1_still_load(written: Path, tmp_path: Path) -> None:
    """Their digest was of the notes, then of each tensor's name, dtype, shape and bytes."""
    path = tmp_path / "file"
    kind, tensors, notes = contents(written / "slice")
    text = json.dumps(notes)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.numpy().tobytes())
    header = {"kind": kind, "version": "1", "notes": text, "digest": digest.hexdigest()}
    save_file(tensors, path, header)
    expected = Slice.load(written / "slice")
    assert all(
        torch.equal(Slice.load(path).kept[name], kept) for name, kept in expected.kept.items()
    )


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "make",
    [pipe, lambda path: Path("/dev/zero"), lambda path: path.mkdir() or path],
    ids=["pipe", "device", "folder"],
)
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "place")
    begin = time.monotonic()
    with pytest.raises(FileFormatError, match="pipe or device"):
        Slice.load(path)
    critical = profile(mlp(), batches(48, (12,), 3)).slice(0.9)
    with pytest.raises(OSError, match="place|zero"):
        critical.save(path)
    assert time.monotonic() - begin < 10
    assert path.exists()
    assert not path.is_file()


def test_a_foreign_error_of_the_decoding_is_an_error_of_the_file(tmp_path: Path) -> None:
    def refuses(value: Any, where: str) -> None:
        raise KeyError("no such thing")

    write_file(tmp_path / "file", "any", {}, {})
    with pytest.raises(FileFormatError, match="KeyError"):
        read_file(tmp_path / "file", "any", refuses)


def minus_one(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, -1)


def nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


def epoch(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda notes: notes["notes"]["history"][0].__setitem__(key, value)


def last(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda notes: notes["start"]["last"].__setitem__(key, value)


def of_module(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda notes: notes["modules"][name]["numbers"].__setitem__(key, value)


IMPOSSIBLE_NOTES = [
    ("training", epoch("seconds", -1.0)),
    ("training", epoch("epoch", 7)),
    ("training", epoch("learning_rate", -0.1)),
    ("training", epoch("loss", float("nan"))),
    ("training", lambda notes: notes["notes"]["history"][0].pop("seconds")),
    ("training", lambda notes: notes["notes"]["history"].clear()),
    ("training", lambda notes: notes["notes"]["scaler"].update(further=1.0)),
    ("training", lambda notes: notes["options"][0].update(eps=2.0**31)),
    ("training", lambda notes: notes["options"][0].update(weight_decay=0.1)),
    ("iterations", last("number", 2)),
    ("iterations", last("number", 2**40)),
    ("slice", lambda notes: notes["groups"][0][2].append(notes["groups"][0][2][1])),
    ("slice", lambda notes: notes["groups"][0][2].pop(0)),
    ("profile", lambda notes: notes["left_alone_sizes"].clear()),
    ("pruned", lambda notes: notes.update(timm={"num_classes": 3})),
    ("iterations", last("seconds", float("inf"))),
    ("iterations", last("compression_rate", 0.1)),
    ("iterations", lambda notes: notes["start"].update(remaining=10**6)),
    ("pruned", of_module("0", "start_dim", 1007)),
    ("pruned", of_module("0", "end_dim", -2)),
    ("pruned", lambda notes: notes["modules"]["3"]["numbers"].pop("in_features")),
]


@pytest.mark.parametrize(("name", "change"), IMPOSSIBLE_NOTES)
def test_notes_that_nothing_writes_are_refused(
    name: str, change: Callable[[dict[str, Any]], Any], written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    kind, tensors, notes = contents(written / name)
    change(notes)
    write_file(path, kind, tensors, notes)
    outcome = attempt(KINDS[name], path)
    assert isinstance(outcome.refusal, FileFormatError)
    assert not outcome.damaged


def test_a_task_of_more_outputs_than_the_model_has_is_refused(
    written: Path, tmp_path: Path
) -> None:
    kind, tensors, notes = contents(written / "task")
    write_file(tmp_path / "file", kind, tensors, {**notes, "outputs": 4})
    outcome = attempt(KINDS["task"], tmp_path / "file")
    assert isinstance(outcome.refusal, ModelMismatchError)


IMPOSSIBLE_TENSORS = [
    ("training", "optimizer/0/step", minus_one),
    ("training", "optimizer/0/step", lambda tensor: tensor.new_zeros(0)),
    ("training", "optimizer/0/exp_avg_sq", minus_one),
    ("training", "optimizer/0/exp_avg", None),
    ("training", "random/cpu", lambda tensor: tensor[None]),
    ("iterations", "value 1.weight", nan),
    ("pruned", "3.weight", nan),
]


@pytest.mark.parametrize(("name", "tensor", "change"), IMPOSSIBLE_TENSORS)
def test_tensors_that_nothing_writes_are_refused(
    name: str, tensor: str, change: Callable[[Tensor], Tensor] | None, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    kind, tensors, notes = contents(written / name)
    old = tensors.pop(tensor)
    if change is not None:
        tensors[tensor] = change(old)
    write_file(path, kind, tensors, notes)
    outcome = attempt(KINDS[name], path)
    assert isinstance(outcome.refusal, FileFormatError)
    assert not outcome.damaged


def test_negative_variances_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    path, model = tmp_path / "file", nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    save_pruned(model, path)
    kind, tensors, notes = contents(path)
    tensors["1.running_var"][1] = -0.5
    write_file(path, kind, tensors, notes)
    with pytest.raises(FileFormatError, match=r"1\.running_var"):
        load_pruned(path, model)
    model[1].running_var[1] = -0.5
    with pytest.raises(NumericalError, match=r"1\.running_var"):
        save_pruned(model, path)
