"""Buffers of a forward function's own, of quantizers and of training alone follow the channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune import NSSPruner

MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


class Centred(nn.Module):
    """Buffers of the model itself: a vector, a row, and one that is used for its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.randn(12))
        self.register_buffer("scale", torch.rand(1, 12) + 0.5)
        self.register_buffer("order", torch.arange(12))
        self.register_buffer("keys", torch.randn(12, 12))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last((self.first(inputs) - self.mean).relu() * self.scale)


class RunningMean(nn.Module):
    """A mean that training alone updates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return self.last(hidden)


class AuxiliaryHead(nn.Module):
    """A head that only training has, behind one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 10)
        self.last, self.auxiliary = nn.Linear(10, 3), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs).relu()
        scores = self.last(self.second(hidden).relu())
        return (scores, self.auxiliary(hidden)) if self.training else scores


def quantized() -> nn.Module:
    """Prepared for quantization-aware training, with ranges from one batch."""
    layers = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    )
    model: Any = quantization.QuantWrapper(layers)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model.train(), inplace=True)
    model(torch.randn(32, 6))
    model.apply(quantization.disable_observer)
    return model


def halved(model: nn.Module) -> tuple[nn.Module, NSSPruner]:
    """The model as it was, and the pruner that halved it."""
    whole = copy.deepcopy(model.eval())
    pruner = NSSPruner(
        model, torch.randn(2, 6), MAGNITUDE, pruning_ratio=0.5, fold=False, progress=False
    )
    pruner.step()
    return whole, pruner


@pytest.mark.parametrize("make", [Centred, RunningMean, quantized])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_smaller_equals_masked(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    whole, pruner = halved(model)
    assert pruner.report is not None
    assert all(row.after == row.before // 2 for row in pruner.report.rows if not row.reason)
    inputs = torch.randn(5, 6)
    with torch.no_grad(), pruner.slice.masked(whole):
        wanted = whole(inputs)
    assert torch.allclose(model(inputs), wanted, atol=1e-5)


def test_elements_stay_with_their_channels() -> None:
    torch.manual_seed(0)
    model = Centred()
    whole, pruner = halved(model)
    kept = pruner.slice.kept["first"]
    assert torch.equal(model.mean, whole.mean[kept])
    assert torch.equal(model.scale, whole.scale[:, kept])
    for name in ("order", "keys"):  # as wide, and used by nothing
        assert torch.equal(getattr(model, name), getattr(whole, name))


def test_a_mean_of_training_is_updated_as_before() -> None:
    torch.manual_seed(0)
    model = RunningMean()
    whole, pruner = halved(model)
    inputs = torch.randn(5, 6)
    model.train()(inputs)
    whole.train()(inputs)
    assert torch.allclose(model.mean, whole.mean[pruner.slice.kept["first"]], atol=1e-6)


def test_what_only_training_consumes_is_left_alone_by_name() -> None:
    torch.manual_seed(0)
    model = AuxiliaryHead()
    _, pruner = halved(model)
    assert pruner.report is not None
    rows = {row.layer: row for row in pruner.report.rows}
    assert (rows["first"].after, rows["second"].after) == (12, 5)
    assert "training mode" in rows["first"].reason
    assert len(model.train()(torch.randn(4, 6))) == 2


@pytest.mark.parametrize("make", [Centred, RunningMean])
def test_interactive_steps_take_buffers_along(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    whole, inputs = copy.deepcopy(model), torch.randn(5, 6)
    pruner = NSSPruner(model, inputs, MAGNITUDE, pruning_ratio=0.5, fold=False, progress=False)
    for group in pruner.step(interactive=True) or ():
        group.prune()
    with torch.no_grad(), pruner.slice.masked(whole):
        wanted = whole(inputs)
    assert torch.allclose(model(inputs), wanted, atol=1e-5)
    assert len(model.train()(inputs)) == 5
