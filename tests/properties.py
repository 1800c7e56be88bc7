"""What must hold of every network that is pruned, whatever it is made of."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from architectures import Architecture
from nss_prune import NSSPruner, Slice, load_pruned, save_pruned
from nss_prune.errors import NSSPruneError
from nss_prune.graph.costs import Cost
from parts import macs_by_hand


class Violation(AssertionError):
    """A property that does not hold."""


def check(found: Architecture) -> str:
    """Try all properties of a network.

    Returns:
        "survived", or "refused: <why>" where nothing of it can be pruned.

    Raises:
        Violation: One does not hold.
        Exception: Anything that is not an error of the library is a fault of it too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original, before = copy.deepcopy(found.model), cost_by_hand(found, found.model)
        state = copy.deepcopy(found.model.state_dict())
        try:
            pruner = NSSPruner(found.model, found.example(), data=found.data(), **found.options)
            chosen = pruner.slice
            _expect(_same_state(found.model, state), "to choose changed the model")
            pruner.step()
        except NSSPruneError as error:
            _expect(_same_state(found.model, state), "a refusal changed the model")
            _expect(not _hooks(found.model), "a refusal left hooks")
            return f"refused: {type(error).__name__}: {error}"
        _expect(not _hooks(found.model), "a step left hooks")
        _removed_is_masked(found, original, pruner.slice)
        _order_is_no_matter(found, original, chosen)
        _costs_are_kept(found, before, pruner)
        _backward_works(found)
        _saved_is_loaded(found, original, pruner.slice)
        _intact_after_an_error(found, original)
        _prunes_again(found)
    return "survived"


def attempted(found: Architecture) -> tuple[str, str]:
    """ "survived", "refused", "wrong" or "foreign", and of which network and why."""
    try:
        outcome = check(found)
    except Violation as error:
        return "wrong", f"{found}: {error}"
    except Exception as error:
        return "foreign", f"{found}: {type(error).__name__}: {error}"
    kind, _, why = outcome.partition(": ")
    return kind, f"{found}: {why}" if why else ""


def cost_by_hand(found: Architecture, model: nn.Module) -> Cost:
    """Parameters and multiply-accumulates of a call with the example inputs."""
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    return Cost(parameters, macs_by_hand(model, found.example()))


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All outputs of a call."""
    made = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if isinstance(made, dict):
        return list(made.values())
    return list(made) if isinstance(made, tuple) else [made]


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def _same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], v) for n, v in state.items())


def _hooks(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _double(inputs: Any) -> Any:
    return tuple(map(_double, inputs)) if isinstance(inputs, tuple) else inputs.double()


@torch.no_grad()
def _removed_is_masked(found: Architecture, original: nn.Module, critical: Slice) -> None:
    """In float64, whatever the model's own precision: a removal changes no weight that stays.

    Except for the dimensions inside heads: they are removed in other coordinates, to which the
    weights are turned, and rounded, before.
    """
    whole, smaller = copy.deepcopy(original).double(), copy.deepcopy(found.model).double()
    inputs = _double(found.random(3, seed=7))
    with critical.masked(whole):
        masked = outputs(whole, inputs)
    made = outputs(smaller, inputs)
    far = max(
        float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(made, masked, strict=True)
    )
    limit = max(1e-9, 16 * torch.finfo(found.dtype).eps) if critical.bases else 1e-9
    _expect(far <= limit, f"removed is not masked, by {far:.3g}")


def _order_is_no_matter(found: Architecture, original: nn.Module, critical: Slice) -> None:
    """In float64: with less, sums in another order decide between neurons that are alike."""
    if "theta" not in found.options or found.dtype != torch.float64:
        return
    shuffled = list(reversed(found.data(size=13)))
    pruner = NSSPruner(original, found.example(), data=shuffled, **found.options)
    same = all(torch.equal(pruner.slice.kept[name], kept) for name, kept in critical.kept.items())
    _expect(same, "the order of samples and the size of batches change the slice")


def _costs_are_kept(found: Architecture, before: Cost, pruner: NSSPruner) -> None:
    """The report has the costs that are counted by hand, and a budget is kept or said to be not."""
    report, after = pruner.report, cost_by_hand(found, found.model)
    assert report is not None
    _expect(report.before == before, f"by hand {before} before, reported {report.before}")
    _expect(report.after == after, f"by hand {after} after, reported {report.after}")
    for key, kept in (
        ("macs_budget", after.macs / before.macs),
        ("params_budget", after.parameters / before.parameters),
    ):
        missed = key in found.options and abs(kept - found.options[key]) > 0.01 + 1e-9
        said = any("the budget is" in note for note in report.notes)
        _expect(not missed or said, f"{kept:.3f} is kept, {key} is {found.options.get(key)}")


def _backward_works(found: Architecture) -> None:
    model = copy.deepcopy(found.model).train()
    total = sum(made.square().sum() for made in outputs(model, found.random(4)))
    assert isinstance(total, Tensor)
    total.backward()
    wrong = [
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.shape != p.shape
    ]
    _expect(not wrong, f"gradients of {wrong}")


@torch.no_grad()
def _saved_is_loaded(found: Architecture, original: nn.Module, critical: Slice) -> None:
    fresh, inputs = copy.deepcopy(original), found.random(3, seed=8)
    for parameter in fresh.parameters():
        parameter.normal_()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pruned(found.model, folder / "model")
        load_pruned(folder / "model", fresh)
        critical.save(folder / "slice")
        loaded = Slice.load(folder / "slice")
    _expect(_same_state(fresh, found.model.state_dict()), "what is loaded is not what was saved")
    pairs = zip(outputs(found.model, inputs), outputs(fresh, inputs), strict=True)
    _expect(all(torch.equal(a, b) for a, b in pairs), "a loaded model computes something else")
    same = all(torch.equal(loaded.kept[name], kept) for name, kept in critical.kept.items())
    _expect(same and _members(loaded) == _members(critical), "a slice is loaded otherwise")


def _members(critical: Slice) -> list[Any]:
    return [
        (group.name, member.name, member.side, member.channels.tolist(), member.neurons.tolist())
        for group in critical.groups
        for member in group.members
    ]


class _Broken:
    """Data of which the second batch cannot be read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield self.batches[0]
        raise OSError("the disk is gone")


def _intact_after_an_error(found: Architecture, original: nn.Module) -> None:
    state = copy.deepcopy(original.state_dict())
    broken = _Broken(found.data())
    try:
        NSSPruner(original, found.example(), data=broken, **found.options).step()
    except OSError:
        pass
    else:
        raise Violation("an error of the data is lost")
    _expect(_same_state(original, state), "an error of the data changed the model")
    _expect(not _hooks(original), "an error of the data left hooks")


def _prunes_again(found: Architecture) -> None:
    """With folding."""
    options = {**found.options, "fold": True}
    try:
        NSSPruner(found.model, found.example(), data=found.data()[:2], **options).step()
    except NSSPruneError:
        return
    outputs(found.model, found.example())
