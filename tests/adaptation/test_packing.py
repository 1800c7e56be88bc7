"""Small parameters trained as one: what masks give, and nothing that is frozen moves."""

from __future__ import annotations

import pytest
import torch
from test_freezing import sliced
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from frozen import bits
from nss_prune.adaptation.freezing import Freezing, critical_entries, train_all, train_critical
from nss_prune.adaptation.packing import pack_small
from nss_prune.adaptation.partial_gradients import BlockTraining

OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, 0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: AdamW(parameters, 1e-3, weight_decay=0.1),
}


def train(freezing: Freezing, optimizer: Optimizer, packs, inputs: Tensor, labels: Tensor) -> None:
    training = BlockTraining(freezing, optimizer, {}, zero_gradients=False, packs=packs)
    model = freezing.model.train()
    with training.attach():
        for step in range(6):
            optimizer.zero_grad()
            cross_entropy(model(inputs + 0.1 * step), labels).backward()
            optimizer.step()


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit", "tied", "norm with activation"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_packs_end_at_the_values_that_masks_give(name: str, optimizer: str) -> None:
    ends = []
    for pack in (pack_small, lambda *_: []):
        model, critical, inputs, labels = sliced(name)
        before = bits(model.double())
        freezing = train_critical(critical, model)
        update = OPTIMIZERS[optimizer](model.parameters())
        packs = pack(freezing, update)
        train(freezing, update, packs, inputs.double(), labels)
        for key, trains in critical_entries(critical, model).items():
            assert torch.equal(bits(model)[key][~trains], before[key][~trains])
        ends.append(bits(model))
    assert not packs
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-9, atol=1e-12, msg=key)


def halves(model: nn.Module) -> Freezing:
    masks = {name: torch.zeros_like(v, dtype=torch.bool) for name, v in model.named_parameters()}
    for mask in masks.values():
        mask[::2] = True
    return Freezing(model, masks)


def test_a_pack_is_of_one_group_and_type_and_of_small_parameters() -> None:
    model = nn.Sequential(nn.Linear(200, 90), nn.Linear(90, 4), nn.Linear(4, 2).double())
    first, second, third = model
    groups = [{"params": [first.weight, first.bias, *second.parameters()]},
              {"params": list(third.parameters()), "lr": 0.5}]  # fmt: skip
    optimizer = SGD(groups, 0.1)
    packs = pack_small(halves(model), optimizer)
    assert [pack.whole for pack in packs] == [
        [first.bias, second.weight, second.bias], [third.weight, third.bias]
    ]  # fmt: skip
    (large, packed), (other,) = (group["params"] for group in optimizer.param_groups)
    assert large is first.weight  # of 18,000 entries
    assert packed.shape == (90 + 360 + 4,)
    assert other.dtype == torch.float64
    whole = SGD(model.parameters(), 0.1)
    assert not pack_small(train_all(model), whole)


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(5, 3))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    freezing = halves(model)
    packs = pack_small(freezing, optimizer)
    before = bits(model)
    kept = model[0].bias.grad = torch.ones(4)
    with BlockTraining(freezing, optimizer, {}, packs=packs).attach():
        optimizer.step()
        model[1](model[0](torch.randn(6, 5))).square().mean().backward()
        optimizer.step()
    assert model[0].bias.grad is kept
    after = bits(model)
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith("2"), name


def test_what_is_frozen_gets_its_bits_back_whatever_writes_there() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    freezing = halves(model)
    before = bits(model)
    with BlockTraining(freezing, optimizer, {}, packs=pack_small(freezing, optimizer)).attach():
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1)
    after = bits(model)
    for name, trains in freezing.trainable.items():
        assert torch.equal(after[name][~trains], before[name][~trains])
        assert (after[name][trains] != before[name][trains]).all()
