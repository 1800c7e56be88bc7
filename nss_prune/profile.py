"""One pass over the data -> Profile: contributions and similarity curves for every θ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nss_prune.activations import Reading, Watcher
from nss_prune.categories import (
    MINIMUM_SAMPLES,
    Categories,
    assign,
    check_categories,
    class_scores,
    cross_entropy,
    joined,
)
from nss_prune.contributions import Contribution, metric_named
from nss_prune.errors import ArgumentError, DataError, NSSPruneError, NumericalError
from nss_prune.neurons import (
    NeuronGroup,
    NeuronMap,
    call_model,
    evaluation,
    find_neurons,
    resolve_layers,
    tensors_in,
    trace,
)
from nss_prune.similarity import entry_thresholds, pixel_kernel, similarity_curve

if TYPE_CHECKING:
    from nss_prune.slicing import Slice, Strategy

Loss = Callable[[Any, Any], Tensor]
Features = Literal["pixel"]


@dataclass(frozen=True)
class Profile:
    """What the data says about every neuron.

    Attributes:
        neurons: The groups the names below refer to.
        categories: The categories compared, each the labels that count as one.
        samples: Samples in each category.
        contributions: metric -> layer -> ``[categories, neurons]``.
        curves: metric -> layer -> ``[categories, neurons]``, the similarity after each rank.
        interval: Neurons that Algorithm 1 adds at a time.
        notes: What a reader of the report should know.
    """

    neurons: NeuronMap
    categories: tuple[tuple[int, ...], ...]
    samples: tuple[int, ...]
    contributions: dict[str, dict[str, Tensor]]
    curves: dict[str, dict[str, Tensor]]
    interval: int = 1
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        """The neuron groups, in the order of the model's modules."""
        return self.neurons.groups

    @property
    def layers(self) -> dict[str, int]:
        """Layer -> number of neurons."""
        return {group.name: group.size for group in self.groups}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics profiled; the first is the default of everything below."""
        return tuple(self.contributions)

    @property
    def thresholds(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> entry thresholds ``[categories, neurons]``, in [0, 1].

        Category c needs neuron n for θ iff ``thresholds[metric][layer][c, n] < θ``.
        """
        return {
            metric: {
                name: entry_thresholds(curve, self.ranking(metric, name), self.interval)
                for name, curve in curves.items()
            }
            for metric, curves in self.curves.items()
        }

    def ranking(self, metric: str, layer: str) -> Tensor:
        """Neurons from the highest to the lowest contribution, ``[categories, neurons]``."""
        return ranked(self.contributions[metric][layer])

    def metric_or_default(self, metric: str | None) -> str:
        """``metric``, or the first one profiled.

        Raises:
            ArgumentError: It was not profiled.
        """
        if metric is None:
            return self.metrics[0]
        if metric not in self.contributions:
            raise ArgumentError(
                f"metric {metric!r} was not profiled; use one of {list(self.metrics)}, or "
                f"profile(..., metrics=({metric!r},))"
            )
        return metric

    def slice(
        self,
        theta: float | None = None,
        *,
        metric: str | None = None,
        strategy: Strategy = "semantic",
    ) -> Slice:
        """The critical neurons. See :func:`nss_prune.slicing.slice_profile`."""
        from nss_prune.slicing import slice_profile

        return slice_profile(self, theta, metric=metric, strategy=strategy)


def ranked(contributions: Tensor) -> Tensor:
    """Neurons from the highest to the lowest contribution; ties by position."""
    return contributions.argsort(dim=-1, descending=True, stable=True)


def profile(
    model: nn.Module,
    data: Iterable[Any],
    example_inputs: Any = None,
    *,
    metrics: Sequence[str | Contribution] = ("taylor",),
    categories: Categories = "labels",
    features: Features = "pixel",
    centered: bool = True,
    interval: int = 1,
    loss: Loss | None = None,
    ignored_layers: Iterable[nn.Module | nn.Parameter | type | str] = (),
    progress: bool | None = None,
) -> Profile:
    """Profile a model in one pass over labelled data.

    Args:
        model: Any model that torch-pruning can trace; it is left exactly as found.
        data: Batches of (inputs, labels) on the model's device. Inputs are a tensor, a tuple of
            arguments or a dict of keywords; labels are class indices.
        example_inputs: Inputs to trace the model with; the first batch's by default.
        metrics: Contribution metrics, by name or as objects.
        categories: "labels", "predicted", None for a single category, or a function of
            (inputs, labels, outputs) that gives an integer for each sample. Categories with
            fewer than 8 samples join others, see ``Profile.notes``.
        features: "pixel": every position of every sample is an observation of its own.
        centered: Centre the activations before they are compared (CKA as Kornblith et al.,
            2019); False is the paper's Eq. 2 to the letter.
        interval: Neurons that Algorithm 1 adds at a time.
        loss: Function of (outputs, labels), summed over the samples or one value for each;
            cross entropy by default.
        ignored_layers: Modules, types or names whose neurons are not profiled.
        progress: Show a progress bar; by default when stderr is a terminal.

    Raises:
        ArgumentError: An argument is outside what it may be.
        DataError: Data that the model or the method cannot use, or fewer than 2 samples.
        NumericalError: NaN or infinite activations, gradients or losses.
        GraphError, NothingToPruneError: From tracing the model.
    """
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
    if example_inputs is None:
        example_inputs = split_batch(first)[0]
    graph, output_nodes = trace(model, example_inputs)
    neurons = find_neurons(model, graph, output_nodes, resolve_layers(model, ignored_layers))
    total = len(data) if isinstance(data, Sized) else None
    return profile_neurons(
        model,
        itertools.chain([first], batches),
        neurons,
        metrics=metrics,
        categories=categories,
        features=features,
        centered=centered,
        interval=interval,
        loss=loss,
        progress=progress,
        batches=total,
    )


def profile_neurons(
    model: nn.Module,
    data: Iterable[Any],
    neurons: NeuronMap,
    *,
    metrics: Sequence[str | Contribution] = ("taylor",),
    categories: Categories = "labels",
    features: Features = "pixel",
    centered: bool = True,
    interval: int = 1,
    loss: Loss | None = None,
    progress: bool | None = None,
    batches: int | None = None,
    minimum_samples: int = 2,
) -> Profile:
    """:func:`profile` for neurons that are already known."""
    check_categories(categories)
    if features != "pixel":
        raise ArgumentError(f"features is {features!r}; 'pixel' is what there is")
    if interval < 1:
        raise ArgumentError(f"interval is {interval}; give a whole number of at least 1")
    collector = Collector(
        neurons.groups, [metric_named(metric) for metric in metrics], categories, loss
    )
    bar = tqdm(
        data,
        desc="profile",
        unit="batch",
        total=batches,
        leave=False,
        disable=None if progress is None else not progress,
    )
    with evaluation(model):
        for number, batch in enumerate(bar):
            collector.add(model, batch, number)
    if collector.samples < minimum_samples:
        raise DataError(
            f"the data has {collector.samples} sample(s); at least {minimum_samples} are needed "
            f"to compare, better {MINIMUM_SAMPLES} or more for each category"
        )
    return collector.profile(neurons, centered, interval)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch; labels are None for a bare tensor or dict."""
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    raise DataError(
        f"a batch is a {type(batch).__name__}"
        + (f" of {len(batch)} items" if isinstance(batch, Sized) else "")
        + "; give (inputs, labels), with several inputs as a tuple or dict in the first place"
    )


@dataclass
class Moments:
    """Sums over the rows of one category of one group, in float64."""

    second: Tensor
    total: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, neurons: int, device: torch.device) -> Moments:
        """No rows yet."""
        return cls(
            torch.zeros(neurons, neurons, dtype=torch.float64, device=device),
            torch.zeros(neurons, dtype=torch.float64, device=device),
        )

    def add(self, activation: Tensor) -> None:
        """Add ``[samples, neurons, positions]``, every position a row."""
        rows = activation.transpose(0, 1).flatten(1)
        self.second += rows @ rows.T
        self.total += rows.sum(1, dtype=torch.float64)
        self.rows += rows.shape[1]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.second + other.second, self.total + other.total, self.rows + other.rows)


@dataclass
class GroupSums:
    """Everything summed for one group: category -> moments, metric -> category -> statistics."""

    moments: dict[int, Moments] = field(default_factory=dict)
    statistics: dict[str, dict[int, Tensor]] = field(default_factory=dict)


class Collector:
    """Streams batches into sums; holds no batch longer than it is worked on."""

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        metrics: Sequence[Contribution],
        categories: Categories,
        loss: Loss | None,
    ) -> None:
        self.groups = groups
        self.metrics = metrics
        self.categories = categories
        self.loss = loss
        self.counts: dict[int, int] = {}
        self.sums = {
            group.name: GroupSums(statistics={metric.name: {} for metric in metrics})
            for group in groups
        }

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return sum(self.counts.values())

    def add(self, model: nn.Module, batch: Any, number: int) -> None:
        """Run one batch and add what it shows.

        Raises:
            DataError, NumericalError: The batch cannot be used.
        """
        inputs, labels = split_batch(batch)
        samples = check_inputs(model, inputs, number)
        needs_gradient = any(metric.needs_gradient for metric in self.metrics)
        gathered = BatchStatistics(self.metrics)
        watcher = Watcher(self.groups, samples, gathered.add if needs_gradient else None)
        with watcher.attached(model), torch.set_grad_enabled(needs_gradient):
            outputs = run(model, inputs, number)
            assigned = assign(self.categories, inputs, labels, outputs, samples)
            self._add_moments(watcher.readings, assigned)
            if needs_gradient:
                self._loss(outputs, labels).backward()
            else:
                for reading in watcher.readings:
                    gathered.add(reading, None)
        self._add_statistics(gathered, assigned)
        for category, count in zip(*assigned.unique(return_counts=True), strict=True):
            self.counts[int(category)] = self.counts.get(int(category), 0) + int(count)

    def _loss(self, outputs: Any, labels: Any) -> Tensor:
        if labels is None and self.loss is None:
            labels = class_scores(outputs).argmax(1)
        value = (self.loss or cross_entropy)(outputs, labels).sum()
        if not torch.isfinite(value):
            raise NumericalError(
                f"the loss is {value.item()}; check the data and the model's weights for NaN"
            )
        return value

    def _add_moments(self, readings: Sequence[Reading], assigned: Tensor) -> None:
        present = assigned.unique().tolist()
        for reading in readings:
            values = as_computed(reading.activation)
            moments = self.sums[reading.group].moments
            for category in present:
                if category not in moments:
                    moments[category] = Moments.zeros(values.shape[1], values.device)
                where = (assigned == category).nonzero().flatten().to(values.device)
                moments[category].add(values[where] if len(present) > 1 else values)
                if not torch.isfinite(moments[category].total).all():
                    raise NumericalError(
                        f"what reads {reading.group} reads NaN or infinite values; check the "
                        "data and the model's weights"
                    )

    def _add_statistics(self, gathered: BatchStatistics, assigned: Tensor) -> None:
        for group in self.groups:
            for metric in self.metrics:
                values = gathered.per_sample(metric, group.name)
                if values is None:
                    values = torch.zeros(1, len(assigned), group.size, dtype=torch.float64)
                if not torch.isfinite(values).all():
                    raise NumericalError(
                        f"{metric.name} of {group.name} is NaN or infinite; check the data, the "
                        "loss and the model's weights"
                    )
                sums = self.sums[group.name].statistics[metric.name]
                for category in assigned.unique().tolist():
                    where = (assigned == category).to(values.device)
                    added = values[:, where].sum(1)
                    sums[category] = sums[category] + added if category in sums else added

    def profile(self, neurons: NeuronMap, centered: bool, interval: int) -> Profile:
        """Contributions and curves of everything added so far."""
        parts = joined(self.counts)
        contributions: dict[str, dict[str, Tensor]] = {m.name: {} for m in self.metrics}
        curves: dict[str, dict[str, Tensor]] = {m.name: {} for m in self.metrics}
        for group in self.groups:
            sums = self.sums[group.name]
            kernels = [
                kernel_of([sums.moments[c] for c in part], centered) for part in parts.values()
            ]
            for metric in self.metrics:
                means = torch.stack(
                    [
                        torch.stack([sums.statistics[metric.name][c] for c in part]).sum(0)
                        / sum(self.counts[c] for c in part)
                        for part in parts.values()
                    ],
                    dim=1,
                )
                score = metric.score(means).cpu()
                contributions[metric.name][group.name] = score
                curves[metric.name][group.name] = torch.stack(
                    [
                        similarity_curve(kernel, order)
                        for kernel, order in zip(kernels, ranked(score), strict=True)
                    ]
                )
        return Profile(
            neurons=neurons,
            categories=tuple(parts.values()),
            samples=tuple(sum(self.counts[c] for c in part) for part in parts.values()),
            contributions=contributions,
            curves=curves,
            interval=interval,
            notes=self._notes(parts),
        )

    def _notes(self, parts: Mapping[int, tuple[int, ...]]) -> tuple[str, ...]:
        few = [c for c in sorted(self.counts) if self.counts[c] < MINIMUM_SAMPLES]
        if not few:
            return ()
        if len(parts) == 1 and len(self.counts) == len(few):
            return (
                f"every category has fewer than {MINIMUM_SAMPLES} samples: all "
                f"{self.samples} samples count as one category",
            )
        names = ", ".join(map(str, few[:8])) + (", ..." if len(few) > 8 else "")
        return (
            f"{len(few)} categories with fewer than {MINIMUM_SAMPLES} samples ({names}) "
            "count together with others",
        )


class BatchStatistics:
    """What a batch contributes, gathered over all readers before it counts by sample."""

    def __init__(self, metrics: Sequence[Contribution]) -> None:
        self.metrics = metrics
        self.gathered: dict[tuple[str, str], Tensor] = {}
        self.positions: dict[tuple[str, str], int] = {}

    def add(self, reading: Reading, gradient: Tensor | None) -> None:
        """Gather one reading with its gradient."""
        activation = as_computed(reading.activation)
        gradient = None if gradient is None else as_computed(gradient)
        for metric in self.metrics:
            key = (metric.name, reading.group)
            values = metric.gather(activation, gradient)
            self.gathered[key] = self.gathered[key] + values if key in self.gathered else values
            self.positions[key] = self.positions.get(key, 0) + activation.shape[2]

    def per_sample(self, metric: Contribution, group: str) -> Tensor | None:
        """``[statistics, samples, neurons]``, or None where no gradient reached the group."""
        key = (metric.name, group)
        if key not in self.gathered:
            return None
        return metric.per_sample(self.gathered[key], self.positions[key])


def kernel_of(moments: Sequence[Moments], centered: bool) -> Tensor:
    """K of the joined categories, ``[neurons, neurons]``, on the CPU."""
    joint = moments[0]
    for other in moments[1:]:
        joint = joint + other
    return pixel_kernel(joint.second, joint.total, joint.rows, centered).cpu()


def as_computed(values: Tensor) -> Tensor:
    """At least float32: half precision would lose the sums."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def check_inputs(model: nn.Module, inputs: Any, number: int) -> int:
    """Number of samples of a batch.

    Raises:
        DataError: No samples, or on another device than the model.
    """
    tensors = tensors_in(inputs)
    if not tensors or any(tensor.dim() == 0 for tensor in tensors):
        raise DataError(
            f"batch {number} holds no input tensors; give (inputs, labels) with the samples "
            "along the first axis"
        )
    if tensors[0].shape[0] == 0:
        raise DataError(f"batch {number} has no samples; leave empty batches out")
    home = next(itertools.chain(model.parameters(), model.buffers())).device
    for tensor in tensors:
        if tensor.device != home:
            raise DataError(
                f"batch {number} is on {tensor.device}, the model on {home}; move the data: "
                "((inputs.to(device), labels.to(device)) for inputs, labels in loader)"
            )
    return int(tensors[0].shape[0])


def run(model: nn.Module, inputs: Any, number: int) -> Any:
    """The model's outputs.

    Raises:
        DataError: The model refuses the inputs.
    """
    try:
        return call_model(model, inputs)
    except NSSPruneError:
        raise
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        raise DataError(
            f"the model refuses batch {number} with inputs of shape {shapes}: {error}; give data "
            "of the shape that the model takes"
        ) from error
