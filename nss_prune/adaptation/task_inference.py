"""Which task a sample belongs to: scores, each least for the task that the sample is of.

"entropy" and "energy" look at a task's own outputs under its mask: the entropy of its classes, and
minus the logarithm of the sum of their exponentials (Liu et al., Energy-based out-of-distribution
detection, NeurIPS 2020). A network that has never seen a sample is often sure of it all the same.

"features" looks at the activations of the task's critical neurons, which are bit-identical for
good: how far they are from the nearest mean of the task's classes, in the metric of what varies
within a class (the Mahalanobis distance of Lee et al., A simple unified framework for detecting
out-of-distribution samples, NeurIPS 2018). A few directions of largest variance are kept and one
variance for all others, as in probabilistic principal component analysis (Tipping and Bishop, 1999,
Eq. 7), so that a task takes (classes + directions + 1) x neurons numbers a layer.

So that tasks compare, "features" and "energy" are in standard deviations of the task's own samples
above their mean; "both" is their sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nss_prune.core.batches import labelled_batches
from nss_prune.core.models import evaluation, run
from nss_prune.core.outputs import class_scores
from nss_prune.core.processes import agreed, decided, gathered
from nss_prune.core.schema import LARGEST, check_finite, check_tensor, number, refuse, row, table
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.statistics.capture import Watcher

Score = Literal["entropy", "energy", "features", "both"]
"""What decides which task a sample belongs to."""

DIRECTIONS = 64
"""Of largest variance within a class, kept for each layer."""

PARTS = ("neurons", "means", "directions", "variances")
"""The tensors of :class:`LayerFeatures`."""


FEATURES = {
    "features": table(number(0)),
    "distance": row(number(-LARGEST), number(0)),
    "energy": row(number(-LARGEST), number(0)),
}
"""Of the notes of a file."""


@dataclass(frozen=True)
class LayerFeatures:
    """Where the activations of a layer's critical neurons lie for the samples of a task.

    Attributes:
        neurons: Indices of the critical neurons that vary, ``[neurons]``.
        means: ``[classes, neurons]``, of activations averaged over positions.
        directions: Orthonormal, of largest variance within a class, ``[directions, neurons]``.
        variances: Along the directions, ``[directions]``.
        residual: Variance along each other direction.
    """

    neurons: Tensor
    means: Tensor
    directions: Tensor
    variances: Tensor
    residual: float

    @staticmethod
    def of(activations: Tensor, labels: Tensor, critical: Tensor) -> LayerFeatures:
        """Those of activations ``[samples, neurons]`` with class labels ``[samples]``."""
        values = activations.double()
        live = critical[values[:, critical].var(0) > 0]
        values = values[:, live]
        classes, positions = labels.unique(return_inverse=True)
        counts = torch.bincount(positions, minlength=len(classes))
        means = values.new_zeros(len(classes), len(live)).index_add_(0, positions, values)
        means /= counts[:, None]
        within = values - means[positions]
        degrees = max(1, len(values) - len(classes))
        variances, vectors = torch.linalg.eigh(within.T @ within / degrees)
        kept = min(DIRECTIONS, max(0, len(live) - 1))
        split = len(live) - kept
        residual = float(variances[:split].clamp(min=0).mean()) if len(live) else 0.0
        floor = max(residual, torch.finfo(torch.float32).tiny)
        return LayerFeatures(
            live,
            means.float(),
            vectors[:, split:].T.float(),
            variances[split:].clamp(min=floor).float(),
            floor,
        )

    def distance(self, activations: Tensor) -> Tensor:
        """Squared Mahalanobis distance to the nearest mean over the neurons' number, ``[samples]``.

        Args:
            activations: ``[samples, neurons]`` of the whole layer.
        """
        if not len(self.neurons):
            return activations.new_zeros(len(activations), dtype=torch.float64)
        values = activations[:, self.neurons.to(activations.device)].double()
        away = values[:, None] - self.means.to(values)
        along = away @ self.directions.to(values).T
        rest = (away.square().sum(2) - along.square().sum(2)).clamp(min=0)
        squared = (along.square() / self.variances.to(values)).sum(2) + rest / self.residual
        return squared.min(1).values / len(self.neurons)


@dataclass(frozen=True)
class TaskFeatures:
    """Where the activations of a task's critical neurons lie, under its mask.

    Attributes:
        layers: Layer -> of its critical neurons.
        usual: Mean and standard deviation of the task's own samples' distances.
        usual_energy: Mean and standard deviation of their energies.
    """

    layers: Mapping[str, LayerFeatures]
    usual: tuple[float, float]
    usual_energy: tuple[float, float]

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
        found: dict[str, list[Tensor]] = {group.name: [] for group in critical.groups}
        labels, energies = [], []
        with evaluation(model), torch.no_grad():
            for number, inputs, own, samples in labelled_batches(model, data, False, ""):
                outputs, activations = pooled(model, critical.groups, inputs, samples, number)
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
        classes = torch.cat(labels)
        seen = {name: torch.cat(parts) for name, parts in activations.items() if parts}
        layers = {
            name: LayerFeatures.of(values, classes, critical.kept[name].nonzero()[:, 0])
            for name, values in seen.items()
        }
        usual = _moments(_distance(layers, seen))
        return TaskFeatures(layers, usual, _moments(torch.cat(energies)))

    def score(self, activations: Mapping[str, Tensor]) -> Tensor:
        """Distance of each sample, in deviations above the usual one, ``[samples]``.

        Args:
            activations: Layer -> ``[samples, neurons]`` by :func:`pooled`, under the task's mask.
        """
        return _standardized(_distance(self.layers, activations), self.usual)

    def energy_score(self, scores: Tensor) -> Tensor:
        """Energy of the outputs ``[samples, outputs]``, in deviations above the usual one."""
        return _standardized(energy(scores), self.usual_energy)

    def encoded(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes, to keep in a file."""
        tensors = {
            f"features/{part}/{name}": getattr(found, part)
            for name, found in self.layers.items()
            for part in PARTS
        }
        notes = {name: found.residual for name, found in self.layers.items()}
        usual = {"distance": list(self.usual), "energy": list(self.usual_energy)}
        return tensors, {"features": notes, **usual}

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
        layers = {}
        for name, residual in notes["features"].items():
            if name not in critical.kept:
                raise refuse("a layer with features", name, "one of the slice")
            parts = [tensors[f"features/{part}/{name}"] for part in PARTS]
            _check_parts(name, parts, len(critical.kept[name]))
            neurons, means, directions, variances = parts
            layers[name] = LayerFeatures(neurons, means, directions, variances, residual)
        usual, energies = (tuple(notes.get(name, (0.0, 1.0))) for name in ("distance", "energy"))
        return TaskFeatures(layers, usual, energies)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(
            tensor.nbytes
            for found in self.layers.values()
            for tensor in (getattr(found, part) for part in PARTS)
        )


def _of_all(parts: list[Tensor]) -> list[Tensor]:
    """The parts of all processes."""
    return list(itertools.chain.from_iterable(gathered(parts)))


def _distance(layers: Mapping[str, LayerFeatures], activations: Mapping[str, Tensor]) -> Tensor:
    """Mean over the layers of the distances, ``[samples]``."""
    found = [features.distance(activations[name]) for name, features in layers.items()]
    return torch.stack(found).mean(0)


def tensors_of_features(notes: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that the notes refer to."""
    return [f"features/{part}/{name}" for name in notes.get("features", ()) for part in PARTS]


def _check_parts(layer: str, parts: Sequence[Tensor], width: int) -> None:
    """The tensors of a layer of ``width`` neurons belong together."""
    neurons, means, directions, variances = parts
    name = f"features of {layer}"
    check_tensor(name, neurons, (None,), (torch.int64,))
    if len(neurons) and not 0 <= int(neurons.min()) <= int(neurons.max()) < width:
        raise refuse(name, int(neurons.max()), f"neurons of {width}")
    check_tensor(name, means, (None, len(neurons)), (torch.float32,))
    check_tensor(name, directions, (len(variances), len(neurons)), (torch.float32,))
    check_tensor(name, variances, (None,), (torch.float32,))
    for part in (means, directions, variances):
        check_finite(name, part)


def pooled(
    model: nn.Module, groups: Sequence[NeuronGroup], inputs: Any, samples: int, number: int = 0
) -> tuple[Any, dict[str, Tensor]]:
    """The outputs, and layer -> activations averaged over positions, ``[samples, neurons]``.

    Layers that did not run are missing; of several consumers' inputs the first counts.

    Args:
        number: Of the batch, for messages.
    """
    watcher = Watcher(groups, samples)
    with watcher.attached(model):
        outputs = run(model, inputs, number)
    return outputs, {
        reading.group: reading.activation.float().mean(2) for reading in reversed(watcher.readings)
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
