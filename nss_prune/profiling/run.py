"""One pass over the data -> Profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nss_prune.core.batches import first_batch, split_batch
from nss_prune.core.models import device_of, evaluation
from nss_prune.core.nested import add_nested, map_tensors, tensors_in
from nss_prune.core.processes import processes
from nss_prune.discovery.samples import readable
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.tracing import resolve_layers
from nss_prune.profiling.accumulation import Collector, Loss, alone
from nss_prune.profiling.categories import Categories, check_categories
from nss_prune.profiling.contributions.protocol import Contribution, metric_named, needs_reference
from nss_prune.profiling.profile import Profile, ProfileBuilder, notes_on_rule
from nss_prune.profiling.similarity import Features, Landscape, check_interval
from nss_prune.profiling.streaming import stream_parts
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter

PAPER: dict[str, Any] = {"features": "flat", "centered": False, "positions": None}
"""The paper's Eq. 1 and 2 to the letter: ``profile(model, data, **PAPER)``."""

BYTES = 12  # for each pair of neurons: a sum in float64, and observations that wait in float32
MEMORY_LIMIT = 2**30
"""Bytes that the sums of all open categories may take, unless ``memory_limit`` says otherwise."""


def profile(
    model: nn.Module,
    data: Iterable[Any],
    example_inputs: Any = None,
    *,
    metrics: Sequence[str | Contribution] = ("taylor",),
    categories: Categories = "labels",
    features: Features = "pixel",
    centered: bool = True,
    positions: int | None = 64,
    interval: int = 1,
    loss: Loss | None = None,
    baseline: Any = "zeros",
    ignored_layers: Iterable[nn.Module | nn.Parameter | type | str] = (),
    memory_limit: int = MEMORY_LIMIT,
    keep_statistics: bool = False,
    keep_readers: bool = False,
    adapters: Sequence[Adapter] = ADAPTERS,
    progress: bool | None = None,
) -> Profile:
    """Profile a model in one pass over labelled data.

    With torch.distributed initialised, each process gives its shard of the data, and all get the
    same profile of the whole.

    Args:
        model: Any model that torch-pruning can trace; it is left exactly as found.
        data: Batches of (inputs, labels) on the model's device. Inputs are a tensor, a tuple of
            arguments or a dict of keywords; labels are class indices, or rows of zeros and ones
            where a sample has several.
        example_inputs: Inputs to trace the model with; the first batch's by default.
        metrics: Contribution metrics, by name or as objects, all from the same pass.
        categories: "labels", "predicted", None for a single category, or a function of
            (inputs, labels, outputs) that gives an integer for each sample. Categories with
            fewer than 8 samples join others, see ``Profile.notes``.
        features: "pixel", every position of every sample is an observation of its own;
            "pooled", positions are averaged first; "flat", positions are features, compared
            within each batch.
        centered: Centre the activations before they are compared.
        positions: With "pixel", look at this many evenly spaced positions of a map at most.
        interval: Neurons that Algorithm 1 adds at a time.
        loss: Function of (outputs, labels), summed over the samples or one value for each;
            cross entropy by default.
        baseline: The reference of "deeplift": "zeros", "mean" (of the data, in a pass before),
            or a tensor that broadcasts to one sample, nested like the inputs where these are.
        ignored_layers: Modules, types or names whose neurons are not profiled.
        memory_limit: Bytes for the sums of the categories that are open at a time. Data with
            more categories is read in their order, or several times.
        keep_statistics: Keep the sums for ``Profile.merge``, 8 Σ neurons² bytes a category.
        keep_readers: Keep the mean and covariance of what each reader reads, to fold with: 8 C²
            bytes for a reader of C channels.
        adapters: The structures in which neurons are more than channels, such as heads.
        progress: Show a progress bar; by default when stderr is a terminal.

    Raises:
        ArgumentError: An argument is outside what it may be.
        DataError: Data that the model or the method cannot use, or fewer than 2 samples.
        NumericalError: NaN or infinite activations, gradients or losses.
        GraphError, NothingToPruneError: From tracing the model.
    """
    if example_inputs is None:
        first, data = first_batch(data)
        example_inputs = split_batch(first)[0]
    ignored = resolve_layers(model, ignored_layers)
    neurons = discover(model, example_inputs, ignored, adapters=adapters)
    return profile_neurons(
        model,
        data,
        readable(model, neurons, example_inputs),
        example_inputs,
        metrics=metrics,
        categories=categories,
        landscape=Landscape(features, centered, positions),
        interval=interval,
        loss=loss,
        baseline=baseline,
        memory_limit=memory_limit,
        keep_statistics=keep_statistics,
        keep_readers=keep_readers,
        progress=progress,
    )


def profile_neurons(
    model: nn.Module,
    data: Iterable[Any],
    neurons: NeuronMap,
    example_inputs: Any = None,
    *,
    metrics: Sequence[str | Contribution] = ("taylor",),
    categories: Categories = "labels",
    landscape: Landscape | None = None,
    interval: int = 1,
    loss: Loss | None = None,
    baseline: Any = "zeros",
    memory_limit: int = MEMORY_LIMIT,
    keep_statistics: bool = False,
    keep_readers: bool = False,
    progress: bool | None = None,
    minimum_samples: int = 2,
) -> Profile:
    """:func:`profile` for neurons that are already known.

    Args:
        example_inputs: Of one call; only needed with ``keep_readers``.
    """
    check_categories(categories)
    landscape = landscape or Landscape()
    chosen = [
        metric_named(metric) for metric in ([metrics] if isinstance(metrics, str) else metrics)
    ]
    if not chosen:
        raise ArgumentError("metrics is empty; give at least one, for example ('taylor',)")
    builder = ProfileBuilder(neurons, chosen, landscape, check_interval(interval), keep_statistics)
    if any(needs_reference(metric) for metric in chosen) and isinstance(baseline, str):
        baseline = mean_inputs(data) if baseline == "mean" else baseline
    sums_read = ConsumerSums(model, neurons.groups)
    if keep_readers and processes() > 1:
        raise ArgumentError(
            "keep_readers=True is for one process: what the readers read is not summed over "
            "several; profile in one of them"
        )
    collector = Collector(
        neurons.groups,
        chosen,
        landscape,
        categories,
        loss,
        device_of(model),
        baseline,
        sums_read.watching if keep_readers else alone,
    )
    room = max(1, memory_limit // sum(BYTES * group.size**2 for group in neurons.groups))
    with evaluation(model):
        for part, sums in stream_parts(
            model, data, collector, room, separate=keep_statistics, progress=progress
        ):
            builder.add(part, sums)
            if not keep_statistics:
                for used in sums.values():
                    collector.reuse(used)
    found = builder.build(minimum_samples, notes_on_rule(collector.uncovered))
    if not keep_readers:
        return found
    return replace(found, readers=sums_read.surveyed(example_inputs))


def mean_inputs(data: Iterable[Any]) -> Any:
    """The mean sample of the inputs, nested as they are.

    Raises:
        DataError: The data can be iterated only once, or its inputs have no mean.
    """
    if iter(data) is data:
        raise DataError(
            "baseline='mean' needs a pass of its own, but the data can be iterated only once; "
            "give a list or a DataLoader, or the mean as a tensor"
        )
    total: Any = None
    samples = 0
    for batch in data:
        inputs = split_batch(batch)[0]
        if not all(tensor.is_floating_point() for tensor in tensors_in(inputs)):
            raise DataError("baseline='mean' needs inputs of real numbers; give a tensor instead")
        summed = map_tensors(lambda tensor: tensor.sum(0, keepdim=True), inputs)
        total = summed if total is None else add_nested(total, summed)
        samples += len(tensors_in(inputs)[0])
    if total is None:
        raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
    return map_tensors(lambda tensor: tensor / samples, total)
