"""DeepArc: the layers of a model compared, and what to do with the redundant ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nss_prune.adaptation.freezing import Freezing, critical_channels, critical_entries
from nss_prune.core.batches import counted_batches, pick_samples, samples_in
from nss_prune.core.models import evaluation, run, submodule
from nss_prune.core.nested import tensors_in
from nss_prune.core.undo import undone_on_error
from nss_prune.deeparc.connectors import fit, make_connector, replace_modules
from nss_prune.deeparc.layer_similarity import complete_sums, normalized, unbiased_sums
from nss_prune.deeparc.layers import Layer, find_layers, is_inside
from nss_prune.errors import ArgumentError, DataError, RemovalError
from nss_prune.graph.slices import Slice
from nss_prune.profiling.run import MEMORY_LIMIT

Similarity = Literal["unbiased", "paper"]

SIMILARITIES = ("unbiased", "paper")
ROUNDING = 1e-9
"""Similarities this far below the threshold reach it: equal layers reach 1."""


class DeepArc:
    """Modules of similar layers, and what to do with the redundant ones.

    Args:
        model: Left as it is, unless :meth:`restructure` is asked to work in place.
        data: Batches of (inputs, labels) or of inputs. Labels do not count.
        threshold: Similarity in (0, 1] from which consecutive layers belong together.
        similarity: "unbiased": minibatch CKA of the HSIC_1 estimator (Nguyen et al. 2021, Eq. 2
            and 3), as in DeepArc's published code, which sums over batches without dividing by
            their size. Batches of fewer than 4 samples are left out. "paper":
            Eq. 2 of the NeuSemSlice paper to the letter, without centring, between all samples
            of all batches; it keeps the inputs, and runs the model again for every
            ``memory_limit`` bytes of activations.
        layers: Qualified names of the layers to compare; by default the building blocks (see
            :mod:`nss_prune.deeparc.layers`) but the last, which makes the model's output and is
            never redundant.
        memory_limit: Bytes of activations that "paper" may hold, above those of two batches.
        progress: Show a progress bar; None for only on a terminal.

    Attributes:
        matrix: Similarity of every two layers, float64 ``[layers, layers]``, at most 1.

    Raises:
        ArgumentError: An argument is outside what it may be.
        DataError: The data is empty or the model refuses it.
        NumericalError: A layer emits NaN or infinite values.
        NothingToPruneError: Fewer than two layers can be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        threshold: float = 0.99,
        similarity: Similarity = "unbiased",
        *,
        layers: Sequence[str] | None = None,
        memory_limit: int = MEMORY_LIMIT,
        progress: bool | None = None,
    ) -> None:
        self.threshold = threshold
        if similarity not in SIMILARITIES:
            raise ArgumentError(f"similarity is {similarity!r}; use one of {SIMILARITIES}")
        if memory_limit < 0:
            raise ArgumentError(f"memory_limit is {memory_limit}; give a number of bytes")
        self.model = model
        self.data = data
        batches = _inputs(model, data, progress)
        first = next(batches)
        self._example = _first_samples(model, first)
        self._layers = find_layers(model, self._example, layers)
        batches = itertools.chain([first], batches)
        if similarity == "unbiased":
            sums = unbiased_sums(model, self._layers, batches)
        else:
            sums = complete_sums(model, self._layers, list(batches), memory_limit)
        self.matrix = normalized(sums)

    @property
    def threshold(self) -> float:
        """Similarity in (0, 1] from which consecutive layers belong together.

        Set another one to see its modules, without another pass over the data.

        Raises:
            ArgumentError: It is set to something else.
        """
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise ArgumentError(f"threshold is {threshold!r}; give a number in (0, 1]")
        if not 0 < threshold <= 1:
            raise ArgumentError(
                f"threshold is {threshold}; it is a similarity in (0, 1], in the paper 0.99"
            )
        self._threshold = float(threshold)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers compared, in the order of the forward pass."""
        return tuple(layer.name for layer in self._layers)

    @property
    def similarity(self) -> dict[str, float]:
        """Layer -> similarity with the layer before it; the first has none."""
        consecutive = self.matrix.diagonal(1).tolist()
        return dict(zip(self.layers[1:], consecutive, strict=True))

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """Runs of consecutive layers, each at or above the threshold with the one before it."""
        found = [[self.layers[0]]]
        for name, similarity in self.similarity.items():
            if similarity >= self.threshold - ROUNDING:
                found[-1].append(name)
            else:
                found.append([name])
        return tuple(tuple(module) for module in found)

    @property
    def redundant(self) -> tuple[str, ...]:
        """Layers that could go: all of a module but the first."""
        return tuple(name for module in self.modules for name in module[1:])

    @property
    def share(self) -> float:
        """Training parameter ratio: share of the parameters outside redundant layers."""
        masks = self.trainable().values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def trainable(self, critical: Slice | None = None) -> dict[str, Tensor]:
        """Parameter -> bool of its shape, True where it trains.

        Everything outside redundant layers trains, the classifier and what else is no layer too. A
        parameter that a redundant layer shares with another one trains.

        Args:
            critical: Train only the entries that belong to critical neurons (NeuSemSlice +
                DeepArc, the paper's footnote 3).

        Raises:
            ModelMismatchError: The model does not have the layers (of the slice) any more.
        """
        redundant = self._redundant_modules()
        training = {
            id(parameter)
            for name, module in self.model.named_modules()
            if name not in redundant
            for parameter in module.parameters(recurse=False)
        }
        masks = {
            name: torch.full_like(parameter, id(parameter) in training, dtype=torch.bool)
            for name, parameter in self.model.named_parameters()
        }
        if critical is None:
            return masks
        entries = critical_entries(critical, self.model)
        return {name: mask & entries[name].to(mask.device) for name, mask in masks.items()}

    def freezing(self, critical: Slice | None = None) -> Freezing:
        """Selective training: :meth:`trainable`, and the statistics of all other norms frozen.

        Args:
            critical: As in :meth:`trainable`.

        Raises:
            ModelMismatchError: The model does not have the layers (of the slice) any more.
        """
        redundant = self._redundant_modules()
        training = {} if critical is None else critical_channels(critical, self.model)
        frozen = {}
        for name, module in self.model.named_modules():
            statistics = getattr(module, "running_mean", None)
            if not isinstance(statistics, Tensor):
                continue
            if name in redundant:
                frozen[name] = torch.ones_like(statistics, dtype=torch.bool)
            elif name in training:
                frozen[name] = ~training[name].to(statistics.device)
        return Freezing(self.model, self.trainable(critical), frozen)

    def restructure(self, data: Iterable[Any] | None = None, *, inplace: bool = False) -> nn.Module:
        """The model without its redundant layers; without any, the same model.

        A layer that keeps the shape of its input is replaced by an identity, any other by a
        connector: a 1 x 1 convolution with stride, or a linear map, fitted by least squares to
        the removed layer's output, from what the layers before it now emit. Optimisers must be
        built afterwards.

        Args:
            data: Batches to fit connectors to; by default those of the constructor again.
            inplace: Change the model itself instead of a copy.

        Returns:
            The copy, or the model itself.

        Raises:
            RemovalError: A layer has no connector, or the smaller model does not give an output of
                the same shape. The model is as it was.
            DataError: A connector is wanted and the data cannot be read again.
            ModelMismatchError: The model does not have the layers any more.
        """
        with undone_on_error(self.model):
            smaller = copy.deepcopy(self.model)
            replacements: dict[str, nn.Module] = {}
            for layer in self._redundant_layers:
                replacements |= self._replace(smaller, layer, data)
            self._check(smaller)
            if not inplace:
                return smaller
            replace_modules(self.model, replacements)
            return self.model

    @property
    def _redundant_layers(self) -> list[Layer]:
        redundant = self.redundant
        return [layer for layer in self._layers if layer.name in redundant]

    def _redundant_modules(self) -> set[str]:
        """Names of all modules that are (within) parts of redundant layers."""
        parts = [part for layer in self._redundant_layers for part in layer.parts]
        names = [name for name, _ in self.model.named_modules()]
        for part in parts:
            submodule(self.model, part)
        return {name for name in names if any(name == p or is_inside(name, p) for p in parts)}

    def _replace(
        self, smaller: nn.Module, layer: Layer, data: Iterable[Any] | None
    ) -> dict[str, nn.Module]:
        """Replace one layer of ``smaller``.

        Returns:
            Name -> the module that now has it.
        """
        removed = submodule(smaller, layer.name)
        weight = next(removed.parameters())
        connector = make_connector(layer, removed).to(weight.device, weight.dtype)
        replacements: dict[str, nn.Module] = {part: nn.Identity() for part in layer.parts}
        replacements[layer.name] = connector
        replace_modules(smaller, replacements)
        if not isinstance(connector, nn.Identity):
            fit(connector, layer, self.model, smaller, _inputs(self.model, self._data_again(data)))
        return replacements

    def _data_again(self, data: Iterable[Any] | None) -> Iterable[Any]:
        if data is not None:
            return data
        if isinstance(self.data, Iterator):
            raise DataError(
                "the data can be iterated only once, and a connector is fitted to it; pass "
                "restructure(data=...)"
            )
        return self.data

    def _check(self, smaller: nn.Module) -> None:
        """Raise RemovalError unless the smaller model gives finite outputs of the same shape."""
        with evaluation(self.model), evaluation(smaller), torch.no_grad():
            expected = tensors_in(run(self.model, self._example, 0))
            try:
                found = tensors_in(run(smaller, self._example, 0))
            except DataError as error:
                raise RemovalError(
                    f"without {', '.join(self.redundant)} the model does not run: {error}; name "
                    "the layers to compare in layers="
                ) from error
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
        if shapes[0] != shapes[1]:
            raise RemovalError(
                f"the outputs were {shapes[0]} and would become {shapes[1]}; name the layers to "
                "compare in layers="
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            raise RemovalError(
                "the smaller model gives NaN or infinite outputs; raise the threshold"
            )


def _inputs(model: nn.Module, data: Iterable[Any], progress: bool | None = False) -> Iterator[Any]:
    """The inputs of every batch on the model's device, with a progress bar."""
    for _, inputs, _ in counted_batches(model, data, progress, "layers"):
        yield inputs


def _first_samples(model: nn.Module, inputs: Any) -> Any:
    """Two samples of a batch, or the one that it has."""
    samples = samples_in(inputs, 0)
    return pick_samples(inputs, torch.arange(min(2, samples)))
