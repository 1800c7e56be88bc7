"""What a contribution metric is, and the metrics known by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from nss_prune.errors import ArgumentError


@runtime_checkable
class Contribution(Protocol):
    """A metric in three steps, so that any number of samples streams through it.

    ``gather`` is added over all inputs that read a neuron, ``per_sample`` then sees the whole
    sample, its values are averaged over the samples of a category, and ``score`` makes the
    contribution out of these averages.

    A metric with an attribute ``needs_reference = True`` is gathered from a pass of its own under
    DeepLIFT's rescale rule: its activation is the difference from the reference, its gradient
    the multiplier.
    """

    name: str
    needs_gradient: bool

    def gather(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """``[samples, neurons, positions]`` -> ``[statistics, samples, neurons]``."""
        ...

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """``[statistics, samples, neurons]`` -> the same shape, of whole samples.

        ``positions`` is the number of positions that were gathered for each neuron.
        """
        ...

    def score(self, means: Tensor) -> Tensor:
        """``[statistics, categories, neurons]`` -> ``[categories, neurons]``.

        Neurons are ranked by the magnitude of these.
        """
        ...


_METRICS: dict[str, Contribution] = {}

NEEDED = ("name", "needs_gradient", "gather", "per_sample", "score")


def register_metric(metric: Contribution) -> None:
    """Make a metric known under its name, for ``metric="name"``."""
    _METRICS[metric.name] = metric


def needs_reference(metric: Contribution) -> bool:
    """Whether the metric compares with a reference input."""
    return bool(getattr(metric, "needs_reference", False))


def metrics_known() -> tuple[str, ...]:
    """Names of the registered metrics, in the order of their registration."""
    return tuple(_METRICS)


def metric_named(metric: str | Contribution) -> Contribution:
    """The metric of that name, or the metric itself.

    Raises:
        ArgumentError: No metric has that name, or it lacks a method.
    """
    if not isinstance(metric, str):
        missing = [name for name in NEEDED if not hasattr(metric, name)]
        if missing:
            raise ArgumentError(
                f"metric is a {type(metric).__name__} without {', '.join(missing)}; give a name of "
                f"{sorted(_METRICS)}, or an object with the methods of "
                "nss_prune.profiling.contributions.Contribution"
            )
        return metric
    if metric not in _METRICS:
        raise ArgumentError(
            f"metric is {metric!r}; use one of {sorted(_METRICS)}, or an object with the methods "
            "of nss_prune.profiling.contributions.Contribution"
        )
    return _METRICS[metric]
