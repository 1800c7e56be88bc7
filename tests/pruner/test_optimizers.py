"""After a removal an optimiser knows of every weight that stays what it knew before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from networks import Residual, assert_unchanged, batches, cnn, fingerprint, mlp
from nss_prune import NSSPruner, Slice, rebind_optimizer, remove
from nss_prune.errors import (
    ArgumentError,
    ModelMismatchError,
    NothingToPruneError,
    RemovalError,
)

Batches = list[tuple[Tensor, Tensor]]

OPTIMISERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD without momentum": lambda parameters: SGD(parameters, lr=0.05),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.01),
    "Adam, amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "RMSprop": lambda parameters: RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (12,), 3),
    "cnn": (cnn, (3, 12, 12), 5),
}


def train(model: nn.Module, optimizer: Optimizer, data: Batches) -> None:
    for inputs, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def random_slice(model: nn.Module, inputs: Tensor, seed: int = 1) -> Slice:
    groups = NSSPruner(model, inputs[:2]).neurons.groups
    generator = torch.Generator().manual_seed(seed)
    kept = {group.name: torch.rand(group.size, generator=generator) < 0.5 for group in groups}
    for mask in kept.values():
        mask[-1] = True
    return Slice(kept, groups)


def entries(critical: Slice, name: str) -> tuple[Tensor | None, ...]:
    """By hand: which positions stay of a parameter of ``mlp`` or ``cnn``, a mask for each axis."""
    masks = critical.kept
    layer, key = name.split(".")
    if "1" in masks:  # mlp
        made, read = {
            "1": (masks["1"], None),
            "3": (masks["3"], masks["1"]),
            "5": (None, masks["3"]),
        }[layer]
    else:
        made, read = {
            "0": (masks["0"], None),
            "1": (masks["0"], None),
            "4": (masks["4"], masks["0"]),
            "7": (masks["7"], masks["4"].repeat_interleave(16)),
            "9": (None, masks["7"]),
        }[layer]
    return (made, read) if key == "weight" else (made,)


def part(tensor: Tensor, masks: tuple[Tensor | None, ...]) -> Tensor:
    for axis, mask in enumerate(masks):
        if mask is not None:
            tensor = tensor[(slice(None),) * axis + (mask,)]
    return tensor


def prepared(
    name: str, optimiser: str
) -> tuple[nn.Module, Optimizer, Batches, Slice, Callable[[Any], Optimizer]]:
    make, shape, classes = MODELS[name]
    torch.manual_seed(0)
    model, data = make().train(), batches(48, shape, classes)
    optimizer = OPTIMISERS[optimiser](model.parameters())
    train(model, optimizer, data)
    return model, optimizer, data, random_slice(model, data[0][0]), OPTIMISERS[optimiser]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_state_is_that_of_the_weights_that_stay(name: str, optimiser: str) -> None:
    model, optimizer, data, critical, _ = prepared(name, optimiser)
    before = {
        key: (parameter.detach().clone(), copy.deepcopy(dict(optimizer.state.get(parameter, {}))))
        for key, parameter in model.named_parameters()
    }
    with rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0])

    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert len(optimizer.state) == sum(bool(state) for _, state in before.values())
    for key, parameter in model.named_parameters():
        index = entries(critical, key)
        values, state = before[key]
        assert torch.equal(parameter, part(values, index))
        assert optimizer.state.get(parameter, {}).keys() == state.keys()
        for kind, value in state.items():
            found = optimizer.state[parameter][kind]
            if isinstance(value, Tensor) and value.dim():
                assert found.shape == parameter.shape
                value = part(value, index)
            assert found == value if not isinstance(value, Tensor) else torch.equal(found, value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_training_goes_on_as_that_of_the_masked_model(name: str, optimiser: str) -> None:
    """Masked neurons get no gradients, so what stays is trained in the same way."""
    model, optimizer, data, critical, make = prepared(name, optimiser)
    masked = copy.deepcopy(model)
    masked_optimizer = make(masked.parameters())
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    with rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0])
    train(model, optimizer, data)
    with critical.masked(masked):
        train(masked, masked_optimizer, data)

    expected = dict(masked.named_parameters())
    for key, parameter in model.named_parameters():
        wanted = part(expected[key].detach(), entries(critical, key))
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", [{"theta": 0.8}, {"pruning_ratio": 0.5}])
def test_pruner_with_several_steps(settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    optimizer = AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    pruner = NSSPruner(model, data[0][0][:2], data=data, iterative_steps=2, **settings)
    sizes = [sum(parameter.numel() for parameter in model.parameters())]
    for _ in range(2):
        train(model, optimizer, data)
        scheduler.step()
        with rebind_optimizer(optimizer, model, pruner):
            pruner.step()
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        assert optimizer.param_groups[0]["params"] == list(model.parameters())
        for parameter in model.parameters():
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert sizes[0] > sizes[1] > sizes[2]
    assert optimizer.param_groups[0]["lr"] == 0.01 / 4
    train(model, optimizer, data)


def test_interactive_step() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, data)
    pruner = NSSPruner(model, data[0][0][:2], data=data, theta=0.8)
    with rebind_optimizer(optimizer, model, pruner):
        for group in pruner.step(interactive=True):
            group.prune()
    assert model[1].out_features < 16
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    train(model, optimizer, data)


def test_groups_keep_their_options_and_their_order() -> None:
    torch.manual_seed(0)
    model, data = cnn(), batches(48, (3, 12, 12), 5)
    norm = list(model[1].parameters())
    others = list(model[4:].parameters())
    optimizer = SGD([{"params": norm, "weight_decay": 0.0}, {"params": others, "lr": 0.3}], lr=0.1)
    lists = [group["params"] for group in optimizer.param_groups]
    critical = random_slice(model, data[0][0])
    with rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0])
    assert [group["params"] for group in optimizer.param_groups] == [
        list(model[1].parameters()),
        list(model[4:].parameters()),
    ]
    assert all(
        group["params"] is kept for group, kept in zip(optimizer.param_groups, lists, strict=True)
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def test_layer_norm_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    model, data = Residual().double(), batches(48, (6,), 4)
    model.stem.weight.requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, data)
    old = optimizer.state[model.norm.weight]["exp_avg"]
    critical = random_slice(model, data[0][0])
    with rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0])
    stream = critical.kept.get("stem", critical.kept.get("down"))
    assert torch.equal(optimizer.state[model.norm.weight]["exp_avg"], old[stream])
    assert not model.stem.weight.requires_grad
    assert model.stem.weight not in optimizer.state
    train(model, optimizer, data)


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="torch 2.5 brings it")
def test_moments_by_row_and_column() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    train(model, optimizer, data)
    rows, columns = (optimizer.state[model[3].weight][key] for key in ("row_var", "col_var"))
    critical = random_slice(model, data[0][0])
    with rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0])
    state = optimizer.state[model[3].weight]
    assert torch.equal(state["row_var"], rows[critical.kept["3"]])
    assert torch.equal(state["col_var"], columns[:, critical.kept["1"]])
    train(model, optimizer, data)


class Tied(nn.Module):
    """One matrix in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(torch.relu(self.stem(inputs))))
        return self.head(torch.relu(self.second(hidden)))


def test_ties_keep_one_state() -> None:
    torch.manual_seed(0)
    model, data = Tied().double(), batches(16, (6,), 2)
    optimizer = AdamW(model.parameters(), lr=0.01)
    # As torch 2.6 does when it is given named parameters.
    optimizer.param_groups[0]["param_names"] = [name for name, _ in model.named_parameters()]
    train(model, optimizer, data)
    old = optimizer.state[model.first.weight]["exp_avg"]
    kept = torch.tensor([True, False, True, True, False, True])
    (group,) = NSSPruner(model, data[0][0]).neurons.groups
    critical = Slice({group.name: kept}, (group,))
    with rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0])
    assert model.first.weight is model.second.weight
    assert torch.equal(optimizer.state[model.first.weight]["exp_avg"], old[kept][:, kept])
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    names = optimizer.param_groups[0]["param_names"]
    assert names == [name for name, _ in model.named_parameters()]
    train(model, optimizer, data)
    assert optimizer.state[model.first.weight]["step"] == 2


def test_ties_that_would_part_are_refused() -> None:
    model = Tied().double()
    model.stem = nn.Identity()  # what the second layer gives is all that could go
    with pytest.raises(NothingToPruneError, match="one tensor"):
        NSSPruner(model, torch.randn(2, 6).double())


@pytest.fixture
def trained() -> tuple[nn.Module, Optimizer, Batches]:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, data)
    return model, optimizer, data


def marks(optimizer: Optimizer) -> tuple[list[int], dict[int, dict[str, Any]]]:
    """Which parameters and which state tensors an optimiser has."""
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    state = {
        id(parameter): {
            key: (id(value), value.clone().tolist()) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for parameter, values in optimizer.state.items()
    }
    return parameters, state


def test_a_removal_that_fails_leaves_both_as_they_were(trained) -> None:
    model, optimizer, data = trained
    critical = random_slice(model, data[0][0])
    before, model_before = marks(optimizer), fingerprint(model)

    def fails(model: nn.Module, inputs: Tensor) -> Tensor:
        if model[1].out_features < 16:
            raise RuntimeError("no memory")
        return model(inputs)

    with pytest.raises(RemovalError), rebind_optimizer(optimizer, model, critical):
        remove(model, critical, data[0][0], forward=fails)
    assert marks(optimizer) == before
    assert_unchanged(model, model_before)
    train(model, optimizer, data)


def test_nothing_removed_changes_nothing(trained) -> None:
    model, optimizer, data = trained
    pruner = NSSPruner(model, data[0][0], data=data)
    before = marks(optimizer)
    with rebind_optimizer(optimizer, model, pruner):
        pass
    assert marks(optimizer) == before


def test_what_does_not_belong_is_refused_before_the_body(trained) -> None:
    model, optimizer, data = trained
    other = copy.deepcopy(model)
    critical = random_slice(model, data[0][0])
    foreign = random_slice(cnn(), batches(4, (3, 12, 12), 2)[0][0])
    cases: list[tuple[Optimizer, NSSPruner | Slice, type[Exception], str]] = [
        (SGD(other.parameters(), lr=0.1), critical, ArgumentError, "does not have"),
        (optimizer, NSSPruner(other, data[0][0]), ArgumentError, "pruner.model"),
        (optimizer, foreign, ModelMismatchError, "no layer|channels"),
    ]
    for given, removal, error, message in cases:
        before = marks(given)
        with (
            pytest.raises(error, match=message),
            rebind_optimizer(given, model, removal),
        ):
            pytest.fail("the body ran")
        assert marks(given) == before


@pytest.mark.parametrize("state", [{"factor": torch.ones(7)}, {"history": [torch.ones(16, 12)]}])
def test_state_of_another_shape_is_refused_before_the_body(trained, state) -> None:
    model, optimizer, data = trained
    optimizer.state[model[1].weight].update(state)
    critical = random_slice(model, data[0][0])
    with (
        pytest.raises(ArgumentError, match="make a new optimiser"),
        rebind_optimizer(optimizer, model, critical),
    ):
        pytest.fail("the body ran")


def test_another_removal_than_the_slice_is_refused(trained) -> None:
    model, optimizer, data = trained
    critical = random_slice(model, data[0][0])
    # As many neurons, but others: the shapes alone would not tell.
    rolled = Slice({name: mask.roll(1) for name, mask in critical.kept.items()}, critical.groups)
    before = marks(optimizer)
    with (
        pytest.raises(ArgumentError, match="not what the slice leaves"),
        rebind_optimizer(optimizer, model, rolled),
    ):
        remove(model, critical, data[0][0])
    assert marks(optimizer) == before


def test_two_steps_inside_are_refused() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    optimizer = AdamW(model.parameters(), lr=0.01)
    pruner = NSSPruner(model, data[0][0], data=data, pruning_ratio=0.5, iterative_steps=2)
    before = marks(optimizer)

    def prune_twice() -> None:
        with rebind_optimizer(optimizer, model, pruner):
            pruner.step()
            pruner.step()

    with pytest.raises(ArgumentError, match="one step"):
        prune_twice()
    assert marks(optimizer) == before


def test_the_optimiser_follows_a_folded_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    inputs = torch.randn(64, 6)
    pruner = NSSPruner(model, inputs[:2], theta=0.6, data=[(inputs, torch.arange(64) % 3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(inputs).square().sum().backward()
    optimizer.step()
    old = optimizer.state[model[2].weight]["momentum_buffer"].clone()
    with rebind_optimizer(optimizer, model, pruner):
        pruner.step()
    kept = pruner.slice.kept["0"]
    assert not kept.all()
    assert pruner.folded == ("2",)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert model[2].bias is not None
    assert torch.equal(optimizer.state[model[2].weight]["momentum_buffer"], old[:, kept])


@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
@pytest.mark.parametrize("fold", [True, False])
def test_rows_of_the_head_go_with_their_state(optimiser: str, fold: bool) -> None:
    torch.manual_seed(0)
    model = mlp(12, (16, 11), 7).train()
    inputs, labels = torch.randn(140, 12).double(), torch.arange(140) % 7
    data = [(inputs, labels)]
    optimizer = OPTIMISERS[optimiser](model.parameters())
    train(model, optimizer, data)
    classes, head = [4, 1, 5], model[5]
    states = {key: dict(optimizer.state[getattr(head, key)]) for key in ("weight", "bias")}
    pruner = NSSPruner(model, inputs[:2], data=data, classes=classes, theta=0.7, fold=fold)
    with rebind_optimizer(optimizer, model, pruner):
        pruner.step()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    kept = pruner.slice.kept["3"].nonzero().flatten()
    assert 0 < len(kept) < 11
    assert head.weight.shape == (3, len(kept))
    for key, state in states.items():
        for kind, value in state.items():
            if value.dim():
                wanted = torch.stack([value[row] for row in classes])
                wanted = wanted[:, kept] if key == "weight" else wanted
                assert torch.equal(optimizer.state[getattr(head, key)][kind], wanted)
    train(model, optimizer, [(inputs[labels < 3], labels[labels < 3])])


def test_state_of_heads_in_other_coordinates_begins_anew() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3,
        num_classes=5,
    )  # fmt: skip
    data = [(torch.randn(120, 3, 32, 32), torch.arange(120) % 5)]
    optimizer = OPTIMISERS["AdamW"](model.parameters())
    train(model, optimizer, data)
    moments = optimizer.state[model.pos_embed]["exp_avg"]
    pruner = NSSPruner(model, data[0][0][:2], data=data, macs_budget=0.6, progress=False)
    with rebind_optimizer(optimizer, model, pruner):
        pruner.step()
    assert pruner.slice.bases
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert model.blocks[0].attn.qkv.weight not in optimizer.state
    assert torch.equal(optimizer.state[model.pos_embed]["exp_avg"], moments)
    train(model, optimizer, data)
