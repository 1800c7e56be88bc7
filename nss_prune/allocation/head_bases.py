"""Coordinates of heads in which the first dimensions matter most, from one pass over the data.

Queries and keys of a head meet in the products qᵀk. With S_q = E[q qᵀ] and S_k the covariance of
its keys (a shift of all keys alike does nothing behind a softmax), the SVD S_q^½ S_k^½ = U Σ Vᵀ
gives the coordinates q' = Σ^½ Uᵀ S_q^-½ q and k' = Σ^½ Vᵀ S_k^-½ k. Their products are the same,
and with the first r dimensions alone they are the best of rank r in the mean square: E(qᵀk)² of
independent q and k loses Σ_{j>r} σ_j². Queries and keys count in S by the squared gradient of the
log-likelihood by them, which stands for the Fisher information of their scores.

Values that a head gives as x = Σ a v, with covariance S_v and Fisher information Γ = E[g gᵀ] at the
input of the layer that reads them, become x' = Vᵀ S_v^-½ x with the eigenvectors V of the matrix
S_v^½ Γ S_v^½: ½ Σ_{j>r} of its eigenvalues is what the log-likelihood loses in second order.

S + ε tr(S)/d I stands for S, so that both hold for heads that do not use all of their dimensions.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.allocation.elimination import Elimination
from nss_prune.core.arguments import on_input
from nss_prune.core.batches import counted_batches
from nss_prune.core.draws import Draws
from nss_prune.core.models import Forward, call_model, evaluation, run, submodule
from nss_prune.core.outputs import Outputs
from nss_prune.core.processes import decided, gathered, processes
from nss_prune.errors import NumericalError
from nss_prune.graph.bases import BasisChange
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.structures.dimensions import Dimensions, Part, find_dimensions
from nss_prune.structures.head_coordinates import basis_changes

MOST_SAMPLES = 2000  # more of them cost time and change little


@dataclass
class Sums:
    """Of each head Σ w ``[heads]``, Σ w x ``[heads, d]``, Σ w x xᵀ ``[heads, d, d]``, float64."""

    weight: Any = 0
    first: Any = 0
    second: Any = 0

    def __add__(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(
            self.weight + other.weight, self.first + other.first, self.second + other.second
        )

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Add rows ``[rows, heads, d]`` with weights ``[rows, heads]``."""
        weighted = rows * weights[:, :, None]
        self.weight = self.weight + weights.sum(0).cpu()
        self.first = self.first + weighted.sum(0).cpu()
        self.second = self.second + torch.einsum("nhi,nhj->hij", weighted, rows).cpu()

    def moments(self, *, centred: bool) -> Tensor:
        """E[x xᵀ] or the covariance of each head, ``[heads, d, d]``."""
        total = self.weight.clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
        mean = self.first[:, :, None] / total
        moments: Tensor = self.second / total
        return moments - mean @ mean.transpose(1, 2) if centred else moments


@dataclass
class HeadSums:
    """What one pass adds up of an attention module."""

    queries: Sums = field(default_factory=Sums)
    keys: Sums = field(default_factory=Sums)
    values: Sums = field(default_factory=Sums)
    information: Sums = field(default_factory=Sums)

    def __add__(self, other: HeadSums) -> HeadSums:
        """The sums of both."""
        return HeadSums(
            self.queries + other.queries,
            self.keys + other.keys,
            self.values + other.values,
            self.information + other.information,
        )


def head_bases(
    model: nn.Module,
    data: Iterable[Any],
    names: Iterable[str],
    outputs: Outputs,
    *,
    seed: int = 0,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> dict[str, tuple[BasisChange, ...]]:
    """Layer that reads the heads -> their change of basis; the model is left as found.

    Args:
        data: Batches; at most :data:`MOST_SAMPLES` samples of all processes are used.
        names: Of the attention modules.
        outputs: What the outputs mean.
        seed: For what is drawn at random.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        NumericalError: Queries, keys or values are NaN or infinite, or their gradients.
    """
    found = {name: find_dimensions(submodule(model, name)) for name in names}
    dimensions = {name: one for name, one in found.items() if not isinstance(one, str)}
    sums = {name: HeadSums() for name in dimensions}
    seen = 0
    with evaluation(model), torch.enable_grad():
        for number, inputs, samples in counted_batches(model, data, progress, "heads"):
            with _watched(model, dimensions, sums):
                given = run(model, inputs, number, forward)
                outputs.drawn_loss(given, Draws(inputs, seed)).backward()
            seen += samples
            if seen >= MOST_SAMPLES / processes():
                break
    sums = {name: functools.reduce(operator.add, gathered(own)) for name, own in sums.items()}
    return decided(lambda: _changes(model, dimensions, sums))


def _changes(
    model: nn.Module, dimensions: Mapping[str, Dimensions], sums: Mapping[str, HeadSums]
) -> dict[str, tuple[BasisChange, ...]]:
    """Layer that reads the heads -> their change of basis."""
    return {
        f"{name}.{one.consumer.name}": basis_changes(
            f"{name}.", one, *_coordinates(model, name, sums[name])
        )
        for name, one in dimensions.items()
    }


def last_first(group: NeuronGroup) -> Elimination:
    """Dimensions in their order, the last to go first; what that causes is yet to be measured."""
    zeros = torch.zeros(group.size, dtype=torch.float64)
    return Elimination(torch.arange(group.size - 1, -1, -1), zeros)


def _coordinates(model: nn.Module, name: str, sums: HeadSums) -> tuple[Tensor, Tensor]:
    """A and R of each head of a module."""
    precision = max(torch.finfo(value.dtype).eps for value in submodule(model, name).parameters())
    moments = (
        sums.queries.moments(centred=False),
        sums.keys.moments(centred=True),
        sums.values.moments(centred=True),
        sums.information.moments(centred=False),
    )
    if not all(bool(matrix.isfinite().all()) for matrix in moments):
        raise NumericalError(
            f"the queries, keys or values of {name} are NaN or infinite, or their gradients; "
            "check the data and the model's weights"
        )
    queries, keys, values, information = moments
    products = canonical(queries, keys, precision)
    return products, principal(values, information, precision)


def canonical(queries: Tensor, keys: Tensor, precision: float) -> Tensor:
    """A of each head, ``[heads, d, d]``, see the module's text.

    Args:
        queries: S_q of each head, ``[heads, d, d]``.
        keys: S_k of each head.
        precision: Of the model's weights, relative.
    """
    first, first_inverse = _roots(queries, precision)
    second, _ = _roots(keys, precision)
    left, sizes, _ = torch.linalg.svd(first @ second)
    scales = sizes.maximum(precision * sizes[:, :1]).sqrt()
    products: Tensor = scales[:, :, None] * (left.transpose(1, 2) @ first_inverse)
    return products


def principal(values: Tensor, information: Tensor, precision: float) -> Tensor:
    """R of each head, ``[heads, d, d]``, see the module's text.

    Args:
        values: S_v of each head, ``[heads, d, d]``.
        information: Γ of each head.
        precision: Of the model's weights, relative.
    """
    root, inverse = _roots(values, precision)
    _, directions = torch.linalg.eigh(root @ information @ root)
    coordinates: Tensor = directions.flip(2).transpose(1, 2) @ inverse
    return coordinates


def _roots(moments: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """S^½ and S^-½ of each head, with what is too small for the weights' precision raised.

    A head of which nothing is seen keeps its coordinates.
    """
    unit = torch.eye(moments.shape[1]).to(moments)
    seen = moments.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] > 0
    sizes, directions = torch.linalg.eigh(moments.where(seen, unit))
    mean = sizes.mean(1, keepdim=True)
    sizes = (sizes.clamp(min=0) + precision**0.8 * mean).sqrt()[:, None]
    turned = directions.transpose(1, 2)
    return (directions * sizes) @ turned, (directions / sizes) @ turned


@contextlib.contextmanager
def _watched(
    model: nn.Module, found: Mapping[str, Dimensions], sums: Mapping[str, HeadSums]
) -> Iterator[None]:
    """Add what is seen inside, where the model runs forward and backward once."""
    with contextlib.ExitStack() as stack:
        for name, one in found.items():
            own = sums[name]
            made = ((one.queries, own.queries), (one.keys, own.keys))
            for path in {part.name for part, _ in made}:
                layer = submodule(model, f"{name}.{path}")
                parts = [(part, total) for part, total in made if part.name == path]
                stack.callback(layer.register_forward_hook(_output_hook(parts)).remove)
            consumer = submodule(model, f"{name}.{one.consumer.name}")
            stack.callback(on_input(consumer, _input_hook(one.consumer, own)).remove)
        yield


def _output_hook(parts: list[tuple[Part, Sums]]) -> Any:
    def made(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        tap = output if output.requires_grad else output.detach().requires_grad_().clone()
        values = output.detach()

        def add(gradient: Tensor) -> None:
            for part, total in parts:
                slope = _by_head(gradient, part).square().sum(2)
                total.add(_by_head(values, part), slope)

        tap.register_hook(add)
        return tap

    return made


def _input_hook(part: Part, own: HeadSums) -> Any:
    def read(module: nn.Module, given: Tensor) -> Tensor:
        tap = given.clone()
        if not tap.requires_grad:
            tap.requires_grad_()
        rows = _by_head(given.detach(), part)
        alike = torch.ones_like(rows[:, :, 0])
        own.values.add(rows, alike)
        tap.register_hook(lambda gradient: own.information.add(_by_head(gradient, part), alike))
        return tap

    return read


def _by_head(values: Tensor, part: Part) -> Tensor:
    """``[rows, heads, d]``, float64."""
    return values.detach().flatten(0, -2)[:, part.channels.to(values.device)].double()
