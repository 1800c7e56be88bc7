"""Which task a sample belongs to: scores, each least for the task that the sample is of.

"entropy" and "energy" look at a task's own outputs under its mask: the entropy of its classes, and
minus the logarithm of the sum of their exponentials (Liu et al., Energy-based out-of-distribution
detection, NeurIPS 2020). A network that has never seen a sample is often sure of it all the same.

"features" looks at the activations of the task's critical neurons, which are bit-identical for
good: how far they are from the nearest mean of the task's classes, in the metric of what varies
within a class (the Mahalanobis distance of Lee et al., A simple unified framework for detecting
out-of-distribution samples, NeurIPS 2018). Those of all layers, each over the layer's root mean
square, are projected to 128 dimensions by random signs (Achlioptas, Database-friendly random
projections, 2003), and the metric is kept in 8 bits, so that a task takes 9 kilobytes and 512 bytes
a class, however wide the layers.

So that tasks compare, "features" and "energy" are in standard deviations of the task's own samples
above their mean. "both" weighs them by how far apart they keep the samples of the tasks, as far as
that was seen: those of each task under the masks of the tasks before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn

from nss_prune.core.batches import labelled_batches
from nss_prune.core.models import evaluation, run
from nss_prune.core.outputs import class_scores
from nss_prune.core.processes import agreed, decided, gathered
from nss_prune.core.schema import LARGEST, check_finite, check_tensor, number, refuse, row, table
from nss_prune.graph.slices import Slice
from nss_prune.statistics.capture import Watcher

Score = Literal["entropy", "energy", "features", "both"]
"""What decides which task a sample belongs to."""

DIMENSIONS = 128
"""That the activations are projected to, where there are more neurons."""

LEAST_SHRINKAGE = 1e-3
"""Of a covariance towards the mean variance, however many samples it is of."""

ENERGY_SHARE = 0.25
"""Of the energy beside features that keep tasks as far apart: what it is for the samples of tasks
that were learned before is not seen."""

FARTHEST = 1e6
"""Deviations that count for how far apart tasks are."""

FEATURES = {
    "features": table(number(0)),
    "scale": number(0),
    "distance": row(number(-LARGEST), number(0)),
    "energy": row(number(-LARGEST), number(0)),
    "separation": row(number(0), number(0)),
}
"""Of the notes of a file."""

MEANS, WHITENING, STEPS = "features/means", "features/whitening", "features/steps"
"""The tensors of a file."""


@dataclass(frozen=True)
class ClassMeans:
    """Where the activations of some neurons lie for the samples of each class.

    Attributes:
        means: ``[classes, dimensions]``, whitened: their covariance within a class is 1.
        whitening: ``[dimensions, dimensions]``, lower triangular, in int8.
        steps: Of each row of the whitening, what 1 in int8 stands for, ``[dimensions]``.
        scale: Standard deviation within a class, mean over the dimensions before.
    """

    means: Tensor
    whitening: Tensor
    steps: Tensor
    scale: float

    @staticmethod
    def of(activations: Tensor, labels: Tensor) -> ClassMeans:
        """Those of activations ``[samples, neurons]`` with class labels ``[samples]``."""
        values = activations.double()
        values = values @ projection(values.shape[1]).to(values)
        classes, positions = labels.unique(return_inverse=True)
        counts = torch.bincount(positions, minlength=len(classes))
        means = values.new_zeros(len(classes), values.shape[1]).index_add_(0, positions, values)
        means /= counts[:, None]
        within = values - means[positions]
        covariance = within.T @ within / max(1, len(values) - len(classes))
        variance = float(covariance.diagonal().mean())
        if not variance > 0:  # nothing varies, so that nothing is known
            nothing = torch.zeros_like(covariance, dtype=torch.int8)
            steps = torch.zeros(len(covariance), device=means.device)
            return ClassMeans(torch.zeros_like(means, dtype=torch.float32), nothing, steps, 1.0)
        share = max(shrinkage(within), LEAST_SHRINKAGE)
        regular = (1 - share) * covariance / variance
        regular.diagonal().add_(share)
        exact = torch.linalg.inv(torch.linalg.cholesky(regular))
        steps = (exact.abs().amax(1) / torch.iinfo(torch.int8).max).float()
        whitening = (exact / steps[:, None]).round().to(torch.int8)
        found = ClassMeans(means, whitening, steps, math.sqrt(variance))
        return replace(found, means=found.whitened(means).float())

    def distance(self, activations: Tensor) -> Tensor:
        """Squared Mahalanobis distance to the nearest mean, mean over dimensions, ``[samples]``.

        Args:
            activations: ``[samples, neurons]``.
        """
        values = activations.double()
        whitened = self.whitened(values @ projection(values.shape[1]).to(values))
        return (whitened[:, None] - self.means.to(values)).square().mean(2).min(1).values

    def whitened(self, projected: Tensor) -> Tensor:
        """Projected activations ``[samples, dimensions]`` in deviations within a class."""
        metric = self.whitening.to(projected) * self.steps.to(projected)[:, None]
        return projected / self.scale @ metric.T


def shrinkage(values: Tensor) -> float:
    """How far the covariance of few samples is best moved towards the mean variance, 0 to 1.

    By which its expected squared error is least (Ledoit and Wolf, A well-conditioned estimator for
    large-dimensional covariance matrices, 2004, Eq. 14 and Lemmas 3.2 to 3.4).

    Args:
        values: ``[samples, dimensions]``, of mean 0.
    """
    samples, dimensions = values.shape
    covariance = values.T @ values / samples
    size = covariance.square().sum()
    away = float(size - dimensions * covariance.diagonal().mean().square())
    error = float(values.square().sum(1).square().sum() / samples - size) / samples
    return min(1.0, max(0.0, error / away)) if away > 0 else 1.0


def projection(neurons: int) -> Tensor:
    """Random signs over the root of the neurons, ``[neurons, dimensions]``; of few, the identity.

    The same ones everywhere: numpy keeps the numbers that this generator of its gives.
    """
    if neurons <= DIMENSIONS:
        return torch.eye(neurons, dtype=torch.float64)
    signs = numpy.random.RandomState(0).randint(0, 2, (neurons, DIMENSIONS))
    return torch.from_numpy(2.0 * signs - 1) / math.sqrt(neurons)


@dataclass(frozen=True)
class TaskFeatures:
    """Where the activations of a task's critical neurons lie, under its mask.

    Attributes:
        layers: Layer -> root mean square of its critical neurons' activations.
        found: Of these neurons, those of all layers side by side.
        usual: Mean and standard deviation of the task's own samples' distances.
        usual_energy: Mean and standard deviation of their energies.
        separation: How far apart features and energy keep its samples and those of the tasks
            before it, the sum of d'² of :func:`separation` over these.
    """

    layers: Mapping[str, float]
    found: ClassMeans
    usual: tuple[float, float]
    usual_energy: tuple[float, float]
    separation: tuple[float, float] = (0.0, 0.0)

    @staticmethod
    @agreed()
    def of(model: nn.Module, critical: Slice, data: Iterable[Any]) -> TaskFeatures:
        """Those of a task's data; ``model`` answers under the task's mask when this is called.

        Of the data of all processes, which get the same.

        Args:
            data: Batches of (inputs, labels), which are classes.

        Raises:
            DataError: The data is empty, or the model refuses it.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in critical.kept}
        labels, energies = [], []
        with evaluation(model), torch.no_grad():
            for number, inputs, own, samples in labelled_batches(model, data, False, ""):
                outputs, activations = pooled(model, critical, inputs, samples, number)
                labels.append(torch.as_tensor(own).cpu())
                energies.append(energy(class_scores(outputs)).cpu())
                for name, values in activations.items():
                    found[name].append(values.cpu())
        classes, usual = _of_all(labels), _of_all(energies)
        seen = {name: _of_all(parts) for name, parts in found.items()}
        return decided(lambda: TaskFeatures._from(critical, seen, classes, usual))

    @staticmethod
    def _from(
        critical: Slice,
        activations: Mapping[str, list[Tensor]],
        labels: list[Tensor],
        energies: list[Tensor],
    ) -> TaskFeatures:
        """Those of what each batch showed."""
        seen = {name: torch.cat(parts) for name, parts in activations.items() if parts}
        sizes = {
            name: float(values.double().square().mean().sqrt()) for name, values in seen.items()
        }
        layers = {name: sizes[name] or 1.0 for name in critical.kept if name in sizes}
        together = _side_by_side(layers, seen)
        means = ClassMeans.of(together, torch.cat(labels))
        usual = _moments(means.distance(together))
        return TaskFeatures(layers, means, usual, _moments(torch.cat(energies)))

    @agreed()
    def separates(
        self, model: nn.Module, critical: Slice, data: Iterable[Any]
    ) -> tuple[float, float]:
        """How far apart features and energy keep this task's samples and those of a later one, d'².

        Args:
            model: It answers under this task's mask when this is called.
            critical: The neurons of this task.
            data: Of the later one, as in :meth:`of`.
        """
        distances, energies = [], []
        with evaluation(model), torch.no_grad():
            for number, inputs, _, samples in labelled_batches(model, data, False, ""):
                outputs, activations = pooled(model, critical, inputs, samples, number)
                distances.append(self.score(activations).cpu())
                energies.append(self.energy_score(class_scores(outputs)).cpu())
        seen = [torch.cat(_of_all(parts)) for parts in (distances, energies)]
        return decided(lambda: (separation(seen[0]), separation(seen[1])))

    def score(self, activations: Mapping[str, Tensor]) -> Tensor:
        """Distance of each sample, in deviations above the usual one, ``[samples]``.

        Args:
            activations: Layer -> ``[samples, critical neurons]`` by :func:`pooled`, under the
                task's mask.
        """
        distances = self.found.distance(_side_by_side(self.layers, activations))
        return _standardized(distances, self.usual)

    def energy_score(self, scores: Tensor) -> Tensor:
        """Energy of the outputs ``[samples, outputs]``, in deviations above the usual one."""
        return _standardized(energy(scores), self.usual_energy)

    def encoded(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes, to keep in a file."""
        rows, columns = torch.tril_indices(*self.found.whitening.shape)
        entries = self.found.whitening[rows, columns]
        tensors = {MEANS: self.found.means, WHITENING: entries, STEPS: self.found.steps}
        notes = {"features": dict(self.layers), "scale": self.found.scale}
        notes |= {"distance": list(self.usual), "energy": list(self.usual_energy)}
        return tensors, {**notes, "separation": list(self.separation)}

    @staticmethod
    def decoded(
        tensors: Mapping[str, Tensor], notes: Mapping[str, Any], critical: Slice
    ) -> TaskFeatures | None:
        """What :meth:`encoded` gave, and :data:`FEATURES` allows; None where a file has none.

        Raises:
            FileFormatError: Of other layers, or tensors of other shapes.
        """
        if "features" not in notes:
            return None
        layers = notes["features"]
        if strange := layers.keys() - critical.kept.keys():
            raise refuse("layers with features", sorted(strange), "those of the slice")
        size = min(DIMENSIONS, sum(int(critical.kept[name].sum()) for name in layers))
        means, entries, steps = tensors[MEANS], tensors[WHITENING], tensors[STEPS]
        check_tensor(MEANS, means, (None, size), (torch.float32,))
        check_tensor(WHITENING, entries, (size * (size + 1) // 2,), (torch.int8,))
        check_tensor(STEPS, steps, (size,), (torch.float32,))
        for name in (MEANS, STEPS):
            check_finite(name, tensors[name])
        whitening = entries.new_zeros(size, size)
        whitening[tuple(torch.tril_indices(size, size))] = entries
        usual, energies = (tuple(notes.get(name, (0.0, 1.0))) for name in ("distance", "energy"))
        found = ClassMeans(means, whitening, steps, notes.get("scale", 1.0))
        return TaskFeatures(
            layers, found, usual, energies, tuple(notes.get("separation", (0.0, 0.0)))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in a file."""
        tensors, _ = self.encoded()
        return sum(tensor.nbytes for tensor in tensors.values())


def separation(scores: Tensor) -> float:
    """d'² of the scores of other samples from a task's own, whose mean is 0 and deviation 1.

    The difference of the means over the root of the mean variance, squared (Green and Swets, Signal
    detection theory and psychophysics, 1966); 0 where the others score less.

    Args:
        scores: ``[samples]``, in deviations above the task's own.
    """
    away = scores.clamp(-FARTHEST, FARTHEST)
    return 2 * max(0.0, float(away.mean())) ** 2 / (1 + float(away.var(correction=0)))


def share_of_energy(tasks: Iterable[TaskFeatures]) -> float:
    """Of the energy in "both", 0 to 1; the rest is that of the features."""
    known = [task.separation for task in tasks]
    by_features = sum(features for features, _ in known)
    by_energy = ENERGY_SHARE * sum(energy for _, energy in known)
    if not by_features + by_energy:
        by_features, by_energy = 1.0, ENERGY_SHARE
    return by_energy / (by_features + by_energy)


def _of_all(parts: list[Tensor]) -> list[Tensor]:
    """The parts of all processes."""
    return list(itertools.chain.from_iterable(gathered(parts)))


def tensors_of_features(notes: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that the notes refer to."""
    return [MEANS, WHITENING, STEPS] if "features" in notes else []


def _side_by_side(layers: Mapping[str, float], activations: Mapping[str, Tensor]) -> Tensor:
    """Those of all layers over their root mean squares, ``[samples, critical neurons]``."""
    return torch.cat([activations[name].double() / size for name, size in layers.items()], 1)


def pooled(
    model: nn.Module, critical: Slice, inputs: Any, samples: int, number: int = 0
) -> tuple[Any, dict[str, Tensor]]:
    """The outputs, and layer -> activations averaged over positions.

    They are ``[samples, critical neurons]``. Layers that did not run are missing; of several
    consumers' inputs the first counts.

    Args:
        number: Of the batch, for messages.
    """
    watcher = Watcher(critical.groups, samples)
    with watcher.attached(model):
        outputs = run(model, inputs, number)
    found = {reading.group: reading.activation for reading in reversed(watcher.readings)}
    return outputs, {
        name: found[name].float().mean(2)[:, kept.to(found[name].device)]
        for name, kept in critical.kept.items()
        if name in found
    }


def entropy(scores: Tensor, classes: int) -> Tensor:
    """Entropy of the softmax over that of ``classes`` at random, ``[samples]``.

    Relative, so that tasks compare. A task of one class has no entropy; it gets 2 and so
    comes last.

    Args:
        scores: ``[samples, outputs]``, −∞ for what the task does not own.
        classes: That it owns.
    """
    if classes < 2:
        return scores.new_full((len(scores),), 2.0, dtype=torch.float64)
    found: Tensor = torch.special.entr(scores.double().softmax(1)).sum(1)
    return found / math.log(classes)


def energy(scores: Tensor) -> Tensor:
    """−log Σ exp(scores), ``[samples]`` (Liu et al., 2020, Eq. 4, at temperature 1)."""
    total: Tensor = scores.double().logsumexp(1)
    return -total


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, the latter above 0."""
    spread = float(values.std()) if len(values) > 1 else 0.0
    return float(values.mean()), max(spread, torch.finfo(torch.float32).tiny)


def _standardized(values: Tensor, moments: tuple[float, float]) -> Tensor:
    mean, deviation = moments
    return (values - mean) / deviation
