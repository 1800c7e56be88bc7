"""Pruned models in files: bit for bit the same after a round trip, refused when they do not fit."""

from __future__ import annotations

import copy
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from networks import Residual, assert_unchanged, batches, cnn, fingerprint, mlp, settled
from nss_prune import NSSPruner, Slice, load_pruned, profile, remove, save_pruned, sparsify
from nss_prune.core import files
from nss_prune.errors import ArgumentError, FileFormatError, ModelMismatchError
from nss_prune.pruner import loading
from nss_prune.unstructured import make_permanent


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, in_chans=4, img_size=32, embed_dim=24, num_heads=3
    )


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=5, in_chans=4)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "cnn with flatten and BatchNorm": (cnn, (3, 12, 12)),
    "residual, norm, concat": (Residual, (6,)),
    "torchvision resnet18": (torchvision.models.resnet18, (3, 64, 64)),
    "timm vit": (vit, (4, 32, 32)),
    "timm convnext": (convnext, (4, 64, 64)),
}


def half_removed(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Without a random half of the neurons of every layer that has some to spare."""
    attention = [name for name, _ in model.named_modules() if name.endswith("qkv")]
    groups = NSSPruner(model, inputs, ignored_layers=attention).neurons.groups
    generator = torch.Generator().manual_seed(1)
    kept = {group.name: torch.rand(group.size, generator=generator) < 0.5 for group in groups}
    for mask in kept.values():
        mask[0] = True
    return remove(model, Slice(kept, groups), inputs)


def pruned(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(4, *shape, dtype=torch.float64)
    model = settled(make().double(), inputs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return half_removed(model, inputs), inputs


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


def assert_same_model(model: nn.Module, expected: nn.Module, inputs: Tensor) -> None:
    states = model.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype
        assert torch.equal(states[0][name], value)
    assert [repr(module) for module in model.modules()] == [
        repr(module) for module in expected.modules()
    ]
    assert torch.equal(outputs(model, inputs), outputs(expected, inputs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_into_a_fresh_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    model, inputs = pruned(make, shape)
    model, inputs = model.to(dtype), inputs.to(dtype)
    before = fingerprint(model)
    save_pruned(model, tmp_path / "model.safetensors")
    assert_unchanged(model, before)

    fresh = make()
    size = sum(parameter.numel() for parameter in fresh.parameters())
    loaded = load_pruned(tmp_path / "model.safetensors", fresh)

    assert loaded is fresh
    assert sum(parameter.numel() for parameter in loaded.parameters()) < size
    assert_same_model(loaded, model, inputs)


@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("convnext_atto", 64, {}),
        ("resnet18", 64, {}),
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", 256, {"img_size": 256}),
    ],
)
def test_timm_architecture_is_built_when_none_is_given(
    architecture: str, size: int, options: dict[str, object], tmp_path: Path
) -> None:
    model, inputs = pruned(
        lambda: timm.create_model(architecture, num_classes=5, in_chans=4, **options),
        (4, size, size),
    )
    save_pruned(model.train(), tmp_path / "model.safetensors")
    loaded = load_pruned(tmp_path / "model.safetensors")
    assert not any(module.training for module in loaded.modules())
    assert_same_model(loaded, model, inputs)


def test_what_timm_cannot_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_pruned(mlp(), path)
    with pytest.raises(ArgumentError, match="pass model="):
        load_pruned(path)
    save_pruned(vit(), path)  # of another embedding width than the architecture's
    load_pruned(path, vit())
    pooled = timm.create_model("resnet18", global_pool="max")  # a fact that timm does not keep
    save_pruned(pooled, path)
    with pytest.raises(ModelMismatchError, match="AdaptiveMaxPool2d; pass model="):
        load_pruned(path)
    odd = convnext()
    odd.pretrained_cfg = {"architecture": "no_such_architecture"}
    save_pruned(odd, path)
    with pytest.raises(ModelMismatchError, match="pass model="):
        load_pruned(path)


def test_loaded_model_trains_on_and_prunes_on(tmp_path: Path) -> None:
    model, inputs = pruned(*MODELS["cnn with flatten and BatchNorm"])
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(tmp_path / "model.safetensors", cnn())
    for each in (model, loaded):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(inputs).square().mean().backward()
        optimizer.step()
        half_removed(each.eval(), inputs)
    assert_same_model(loaded, model, inputs)


def test_modes_and_flags_are_those_of_the_given_model(tmp_path: Path) -> None:
    model, _ = pruned(cnn, (3, 12, 12))
    save_pruned(model.eval().requires_grad_(False), tmp_path / "model.safetensors")
    fresh = cnn().train()
    fresh[1].eval()
    fresh[0].weight.requires_grad_(False)
    fresh[9].bias.requires_grad_(False)
    before = fingerprint(fresh)
    load_pruned(tmp_path / "model.safetensors", fresh)
    after = fingerprint(fresh)
    assert after["gradients"] == before["gradients"]
    assert after["modes"] == before["modes"]


def test_tensors_that_keep_their_shape_keep_their_identity(tmp_path: Path) -> None:
    model = mlp()
    half_removed(model, torch.randn(2, 12).double())
    save_pruned(model, tmp_path / "model.safetensors")
    fresh = mlp()
    bias, weight = fresh[5].bias, fresh[5].weight
    load_pruned(tmp_path / "model.safetensors", fresh)
    assert fresh[5].bias is bias
    assert fresh[5].weight is not weight


class Tied(nn.Module):
    """Reads and writes with one matrix, as language models do."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("saved_tied", [True, False])
@pytest.mark.parametrize("fresh_tied", [True, False])
def test_ties_are_those_of_the_file(saved_tied: bool, fresh_tied: bool, tmp_path: Path) -> None:
    path, tokens = tmp_path / "model.safetensors", torch.arange(9)
    model = Tied(saved_tied)
    save_pruned(model, path)
    with safe_open(path, framework="pt") as file:
        assert len(list(file.keys())) == (1 if saved_tied else 2)
    loaded = load_pruned(path, Tied(fresh_tied))
    assert (loaded.head.weight is loaded.embedding.weight) == saved_tied
    assert torch.equal(outputs(loaded, tokens), outputs(model, tokens))


class Rotated(nn.Module):
    """Has a buffer that it makes itself and does not save, and numbers that a forward reads."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale, self.label, self._hidden = scale, "rotated", 1
        self.linear = nn.Linear(3, 3)
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.register_buffer("expanded", torch.ones(1).expand(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) * self.angles * self.scale + self.expanded


def test_numbers_and_unsaved_buffers_follow_the_file(tmp_path: Path) -> None:
    model = Rotated(0.25).bfloat16()
    model.label, model._hidden = "other", 2
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(tmp_path / "model.safetensors", Rotated())
    assert (loaded.scale, loaded.label, loaded._hidden) == (0.25, "rotated", 1)
    inputs = torch.randn(2, 3).bfloat16()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_a_loaded_model_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, inputs = pruned(mlp, (12,))
    save_pruned(model, path)
    loaded = load_pruned(path, mlp())
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def renamed() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Identity())


def activated() -> nn.Module:
    model = mlp()
    model[2] = nn.GELU()
    return model


def with_buffer() -> nn.Module:
    model = mlp()
    model[1].register_buffer("seen", torch.zeros(()))
    return model


def flat_bias() -> nn.Module:
    model = mlp()
    model[1].bias = nn.Parameter(torch.zeros(1, 16))
    return model


def whole_numbers() -> nn.Module:
    model = mlp()
    model[1].bias = nn.Parameter(torch.zeros(16, dtype=torch.int64), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cnn, "lacks|has a|is a"),
        (lambda: nn.Sequential(*list(mlp())[:-1]), "lacks '5'"),
        (renamed, "has '6'"),
        (activated, "'2' is a GELU, in the file a ReLU"),
        (with_buffer, "has '1.seen'"),
        (flat_bias, "1.bias has shape"),
        (whole_numbers, "torch.int64"),
        (lambda: mlp(hidden=(2, 11)), "only makes tensors smaller"),
        (lambda: mlp(classes=2), r"\(3, \d+\) in the file, \(2, 11\)"),
    ],
)
def test_another_structure_is_refused(make, message: str, tmp_path: Path) -> None:
    model, _ = pruned(mlp, (12,))
    save_pruned(model, tmp_path / "model.safetensors")
    other = make()
    before = fingerprint(other)
    with pytest.raises(ModelMismatchError, match=message) as raised:
        load_pruned(tmp_path / "model.safetensors", other)
    assert "pass model=" in str(raised.value)
    assert_unchanged(other, before)


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    save_pruned(mlp(), tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="meta"):
        load_pruned(tmp_path / "model.safetensors", mlp().to("meta"))


def test_damaged_foreign_and_newer_files_are_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    model, fresh = mlp(), mlp()
    before = fingerprint(fresh)
    save_pruned(model, path)
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(FileFormatError, match=message):
            load_pruned(path, fresh)
        assert_unchanged(fresh, dict(before))

    for damage in (whole[:-7], whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damage)
        refused("damaged")
    save_file({"weight": torch.zeros(2)}, path)
    refused("something else")
    torch.save(model.state_dict(), path)
    refused("no safetensors file")
    profile(mlp(), batches(48, (12,), 3)).slice(0.9).save(path)
    refused("nss_prune slice")
    with monkeypatch.context() as newer:
        newer.setattr(files, "VERSION", files.VERSION + 1)
        save_pruned(model, path)
    refused("upgrade")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_pruned(path, fresh)


def test_a_save_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    save_pruned(mlp(), path)
    whole = path.read_bytes()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(mlp(), path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def masked_bias(model: nn.Module) -> None:
    prune.l1_unstructured(model[1], "bias", 0.5)


def parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: sparsify(model, 0.5), "make_permanent"),
        (masked_bias, "make_permanent"),
        (parametrized, "permanent"),
    ],
)
def test_masked_weights_are_refused(change, message: str, tmp_path: Path) -> None:
    model = mlp()
    change(model)
    with pytest.raises(ArgumentError, match=message):
        save_pruned(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_permanent_zeros_are_saved(tmp_path: Path) -> None:
    model = mlp()
    sparsify(model, 0.5)
    make_permanent(model)
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(tmp_path / "model.safetensors", mlp())
    assert_same_model(loaded, model, torch.randn(2, 12).double())


class Counting(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        del state


def test_state_that_is_no_plain_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    sparse = mlp()
    sparse[1].weight = nn.Parameter(sparse[1].weight.detach().to_sparse())
    for model, message in (
        (Counting(2, 2), "_extra_state"),
        (nn.LazyLinear(3), "plain values"),
        (nn.Linear(2, 2, device="meta"), "meta"),
        (sparse, "sparse"),
    ):
        with pytest.raises(ArgumentError, match=message):
            save_pruned(model, path)
    assert not path.exists()


def test_biases_that_folding_made_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    fresh, inputs = copy.deepcopy(model), torch.randn(64, 6)
    data = [(inputs, torch.arange(64) % 3)]
    NSSPruner(model, inputs[:2], theta=0.6, data=data).step()
    assert model[2].bias is not None
    save_pruned(model, tmp_path / "pruned.safetensors")
    load_pruned(tmp_path / "pruned.safetensors", fresh)
    assert torch.equal(fresh(inputs), model(inputs))


HOSTILE = {
    "pretrained_cfg": {"url": "https://example.org/weights.pth"},
    "pretrained": True,
    "checkpoint_path": "/etc/hostname",
    "scriptable": True,
    "num_classes": 10**12,
    "img_size": [10**6, 10**6],
    "global_pool": ["avg"],
    "in_chans": "3",
}


def with_recipe(path: Path, recipe: dict[str, object]) -> None:
    tensors, notes = files.read_file(path, "nss_prune model")
    notes["timm"] = recipe
    files.write_file(path, "nss_prune model", tensors, notes)


@pytest.mark.parametrize("key", HOSTILE)
def test_other_arguments_for_timm_need_trust(key: str, tmp_path: Path, monkeypatch) -> None:
    path, known = tmp_path / "model.safetensors", "resnet18"
    save_pruned(timm.create_model(known, num_classes=4), path)
    with_recipe(path, {"model_name": known, "num_classes": 4, key: HOSTILE[key]})
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(timm, "create_model", lambda **given: asked.append(given) or convnext())
    with pytest.raises(FileFormatError, match="trust=True"):
        load_pruned(path)
    assert not asked
    with pytest.raises(ModelMismatchError):
        load_pruned(path, trust=True)
    assert asked[0][key] == HOSTILE[key]


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "local-dir:/etc", "/etc/hostname"])
def test_an_architecture_is_one_that_timm_has(name: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    save_pruned(mlp(), path)
    with_recipe(path, {"model_name": name})
    monkeypatch.setattr(timm, "create_model", lambda **given: pytest.fail(f"asked for {given}"))
    with pytest.raises(ModelMismatchError, match="timm does not have"):
        load_pruned(path)


def test_a_small_file_that_names_a_giant_takes_no_memory_for_it(tmp_path: Path) -> None:
    """1.8 billion parameters, 7.4 GB, of which the file has a few thousand."""
    path = tmp_path / "model.safetensors"
    save_pruned(timm.create_model("vit_tiny_patch16_224", num_classes=5), path)
    with_recipe(path, {"model_name": "vit_gigantic_patch14_224", "num_classes": 5})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelMismatchError, match="pass model="):
        load_pruned(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_a_model_is_built_without_values_even_if_its_shapes_fit(tmp_path: Path) -> None:
    """The parameters of the model are those of the file: timm's own were never made."""
    path, (model, inputs) = tmp_path / "model.safetensors", pruned(convnext, (4, 64, 64))
    save_pruned(model, path)
    loaded = load_pruned(path)
    assert_same_model(loaded, model, inputs)
    assert all(not parameter.is_meta for parameter in loaded.parameters())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_an_interrupt_while_a_model_is_filled_leaves_it_as_it_was(tmp_path, monkeypatch) -> None:
    model, _ = pruned(cnn, (3, 12, 12))
    save_pruned(model, tmp_path / "model.safetensors")
    fresh = cnn()
    before = fingerprint(fresh)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_set_numbers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pruned(tmp_path / "model.safetensors", fresh)
    assert_unchanged(fresh, before)
