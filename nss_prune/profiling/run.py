"""One pass over the data -> Profile.

The data are batches of (inputs, labels) on the model's device. Inputs are a tensor, a tuple of
arguments or a dict of keywords; labels are class indices (samples labelled -100 are not used), or
rows of zeros and ones where a sample has several labels or none. With torch.distributed
initialised, each process gives its shard of the data, and all get the same profile of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nss_prune.core.models import Forward, call_model, uncompiled
from nss_prune.core.outputs import OutputsSpec
from nss_prune.graph.neurons import NeuronMap
from nss_prune.profiling.categories import Categories
from nss_prune.profiling.described import Loss
from nss_prune.profiling.discovered import readable_neurons, with_example
from nss_prune.profiling.onepass import one_pass
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.settings import Comparison, Metrics, Objective, Upkeep
from nss_prune.profiling.similarity import Features, Landscape, Ranking
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter

PAPER: dict[str, Any] = {
    "features": "flat",
    "centered": False,
    "positions": None,
    "ranking": "signed",
}
"""The paper's Eq. 1 and 2 and Algorithm 1 to the letter: ``profile(model, data, **PAPER)``."""

MEMORY_LIMIT = 2**30
"""Bytes that the sums of all open categories may take, unless ``memory_limit`` says otherwise."""


def profile(
    model: nn.Module,
    data: Iterable[Any],
    example_inputs: Any = None,
    *,
    metrics: Metrics = ("taylor",),
    categories: Categories = "labels",
    features: Features = "pixel",
    centered: bool = True,
    positions: int | None = 64,
    interval: int = 1,
    ranking: Ranking = "magnitude",
    loss: Loss | None = None,
    outputs: OutputsSpec = None,
    forward: Forward = call_model,
    baseline: Any = "zeros",
    ignored_layers: Iterable[nn.Module | nn.Parameter | type | str] = (),
    memory_limit: int = MEMORY_LIMIT,
    keep_statistics: bool = False,
    keep_readers: bool = False,
    adapters: Sequence[Adapter] = ADAPTERS,
    progress: bool | None = None,
) -> Profile:
    """Profile a model in one pass over labelled data, all processes of torch.distributed together.

    Args:
        model: Any model that torch-pruning can trace; it is left exactly as found.
        data: Batches of (inputs, labels), as :mod:`nss_prune.profiling.run` describes them.
        example_inputs: Inputs to trace the model with; the first batch's by default.
        metrics: Contribution metrics, by name or as objects, see :class:`.Comparison`.
        categories: "labels", "predicted", None for one, or a function of (inputs, labels, outputs).
        features: What an observation is: "pixel", "pooled" or "flat", see :class:`.Landscape`.
        centered: Centre the activations before they are compared.
        positions: With "pixel", look at this many evenly spaced positions of a map at most.
        interval: Neurons that Algorithm 1 adds at a time.
        ranking: Neurons are ranked by the "magnitude" of their contributions, or "signed".
        loss: Function of (outputs, labels); by default by ``outputs``, see :class:`.Objective`.
        outputs: What the outputs mean; None for what the first batch decides.
        forward: Function of (model, inputs) that gives the outputs, for the data and the example.
        baseline: The reference of "deeplift": "zeros", "mean", or a tensor like one sample.
        ignored_layers: Modules, types or names whose neurons are not profiled.
        memory_limit: Bytes for the sums of the categories open at a time, see :class:`.Upkeep`.
        keep_statistics: Keep the sums for ``Profile.merge``, 8 Σ neurons² bytes a category.
        keep_readers: Keep the moments of what each consumer of C channels reads, 8 C² bytes.
        adapters: The structures in which neurons are more than channels, such as heads.
        progress: Show a progress bar; by default when stderr is a terminal.

    Raises:
        ArgumentError: An argument is outside what it may be.
        DataError: Data that the model or the method cannot use, or fewer than 2 samples.
        NumericalError: NaN or infinite activations, gradients or losses.
        GraphError, NothingToPruneError: From tracing the model.
    """
    example, data = with_example(model := uncompiled(model), data, example_inputs)
    neurons = readable_neurons(model, example, ignored_layers, forward, adapters)
    landscape = Landscape(features, centered, positions)
    comparison = Comparison(metrics, categories, landscape, interval, ranking)
    objective = Objective(loss, outputs, forward, baseline)
    upkeep = Upkeep(memory_limit, keep_statistics, keep_readers, progress)
    return one_pass(model, data, neurons, example, comparison, objective, upkeep)


def profile_neurons(
    model: nn.Module,
    data: Iterable[Any],
    neurons: NeuronMap,
    example_inputs: Any = None,
    *,
    metrics: Metrics = ("taylor",),
    categories: Categories = "labels",
    landscape: Landscape | None = None,
    interval: int = 1,
    ranking: Ranking = "magnitude",
    loss: Loss | None = None,
    outputs: OutputsSpec = None,
    forward: Forward = call_model,
    baseline: Any = "zeros",
    memory_limit: int = MEMORY_LIMIT,
    keep_statistics: bool = False,
    keep_readers: bool = False,
    progress: bool | None = None,
    minimum_samples: int = 2,
) -> Profile:
    """:func:`profile` for neurons that are already known.

    Args:
        model, data, metrics, categories, interval, ranking, loss, outputs, forward, baseline,
            memory_limit, keep_statistics, keep_readers, progress: Those of :func:`profile`.
        neurons: The neurons, of groups that fit the model.
        example_inputs: Of one call; only needed with ``keep_readers``.
        landscape: How observations are made of activations; by default that of :func:`profile`.
        minimum_samples: Samples that the data must have at least.

    Raises:
        ArgumentError, DataError, NumericalError: As for :func:`profile`.
    """
    comparison = Comparison(metrics, categories, landscape or Landscape(), interval, ranking)
    objective = Objective(loss, outputs, forward, baseline)
    upkeep = Upkeep(memory_limit, keep_statistics, keep_readers, progress)
    return one_pass(
        model, data, neurons, example_inputs, comparison, objective, upkeep, minimum_samples
    )
