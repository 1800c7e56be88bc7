"""One global LAMP step: against LAMP's definition written plainly, and against torch's own pruning.

The weights lie in Linear layers of 1,000 x 1,000 whose sizes spread over four orders of
magnitude. torch.nn.utils.prune.global_unstructured ranks |w| over all layers: an easier task,
without LAMP's sums. Memory is the peak beyond the model, each in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.common.tables import Cell, Column
from benchmarks.common.timing import (
    COLUMNS,
    Rows,
    printed_by,
    ratio_row,
    resident_peak,
    seconds,
    show,
)
from nss_prune.errors import NSSPruneError
from nss_prune.unstructured import sparsify

MEMORY = (Column("ours_memory", "ours, MB", 0), Column("other_memory", "other, MB", 0))
COLUMNS_WITH_MEMORY = (*COLUMNS, *MEMORY)
WIDTH = 1000
WEIGHTS = (10_000_000, 100_000_000)
AMOUNT = 0.3


def perceptron(weights: int, width: int = WIDTH) -> nn.ModuleList:
    """Linear layers of `width` squared weights, of standard deviations from 0.0001 to 1."""
    layers = weights // width**2
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
    for number, layer in enumerate(linear_layers(model)):
        scale = 10.0 ** (-4 * number / max(1, layers - 1))
        nn.init.normal_(layer.weight, std=scale, generator=generator)
    return model


def linear_layers(model: nn.ModuleList) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def ours(model: nn.ModuleList) -> None:
    sparsify(model, AMOUNT, "lamp")


def plain_scores(weight: Tensor) -> Tensor:
    """LAMP's definition: w² over the sum of the w² of the layer that are not smaller."""
    squares = weight.double().square().flatten()
    order = squares.argsort(descending=True)
    in_order = squares[order]
    return torch.empty_like(squares).scatter_(0, order, in_order / in_order.cumsum(0))


@torch.no_grad()
def plain(model: nn.ModuleList) -> None:
    layers = linear_layers(model)
    weights = [layer.weight for layer in layers]
    scores = torch.cat([plain_scores(weight) for weight in weights])
    gone = scores.topk(round(AMOUNT * len(scores)), largest=False).indices
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[gone] = False
    masks = kept.split([weight.numel() for weight in weights])
    for layer, weight, mask in zip(layers, weights, masks, strict=True):
        prune.custom_from_mask(layer, "weight", mask.view_as(weight))


def torch_own(model: nn.ModuleList) -> None:
    parameters = [(layer, "weight") for layer in linear_layers(model)]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=AMOUNT)


FUNCTIONS: dict[str, Callable[[nn.ModuleList], None]] = {
    "ours": ours,
    "LAMP written plainly": plain,
    "torch's global_unstructured": torch_own,
}


def lamp_steps(repeats: int) -> Rows:
    """Part (e)."""
    rows: Rows = []
    check_same_masks()
    for weights in WEIGHTS:
        times: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
        for _ in range(repeats):
            for name, function in FUNCTIONS.items():
                model = perceptron(weights)
                times[name].append(seconds(lambda f=function, m=model: f(m)))  # type: ignore[misc]
        memory = {name: peak_in_process(name, weights) for name in FUNCTIONS}
        for name in list(FUNCTIONS)[1:]:
            what = f"LAMP step, {weights // 10**6} M weights, against {name}"
            faster = name == "LAMP written plainly"
            target = "" if faster else "<= 1.5, less memory"
            row = ratio_row(what, times["ours"], times[name], target, faster=faster)
            rows.append({**row, "ours_memory": memory["ours"], "other_memory": memory[name]})
            show(rows[-1])
    return rows


def check_same_masks() -> None:
    """Raise unless our masks are those of LAMP's definition."""
    first, second = perceptron(80_000, 200), perceptron(80_000, 200)
    ours(first)
    plain(second)
    for mine, other in zip(first.buffers(), second.buffers(), strict=True):
        if not torch.equal(mine.bool(), other.bool()):
            raise NSSPruneError("the masks differ from those of LAMP's definition")


def peak_in_process(name: str, weights: int) -> Cell:
    return printed_by("benchmarks.timings.unstructured", name, str(weights))[0]


def print_peak(name: str, weights: int) -> None:
    """Print the peak memory of one step beyond the model, MB."""
    FUNCTIONS[name](perceptron(40_000, 100))
    model = perceptron(weights)
    before = resident_peak()
    FUNCTIONS[name](model)
    print(resident_peak() - before)


if __name__ == "__main__":
    print_peak(sys.argv[1], int(sys.argv[2]))
