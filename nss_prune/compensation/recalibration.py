"""The running statistics of BatchNorms, estimated anew: a few forward passes, without labels.

After neurons are removed, a BatchNorm further on reads something else than its running mean and
variance say. They are replaced by the averages over the data of the means and unbiased variances
of the batches, which is what training at a learning rate of 0 would come to. Nothing but the
BatchNorms is in training mode, so each of them normalizes by the statistics of its batch while
it counts, and those after it read what it makes of that (Li et al., EagleEye, ECCV 2020, adaptive
batch normalization).

A few hundred samples are not the training data, though, and what they differ by costs accuracy of
its own. Where the same data was run through the model before anything was removed, only the change
is taken over: the running mean moves by as much as the mean over the data did, and the running
variance by the same factor. A model of which nothing was removed then stays as it is.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.afterwards import afterwards
from nss_prune.core.batches import counted_batches, shared_data
from nss_prune.core.models import Forward, call_model, evaluation, run
from nss_prune.core.processes import agreed, processes, summed
from nss_prune.errors import ArgumentError, ModelMismatchError, NumericalError
from nss_prune.graph.slices import Slice

Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class NormStatistics:
    """A BatchNorm's running statistics, and those of its input on some data; ``[channels]``."""

    running_mean: Tensor
    running_variance: Tensor
    mean: Tensor
    variance: Tensor

    def of(self, channels: Tensor) -> NormStatistics:
        """Those of some channels."""
        values = (self.running_mean, self.running_variance, self.mean, self.variance)
        return NormStatistics(*(value[channels.to(value.device)] for value in values))


@agreed()
def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    whole: Mapping[str, NormStatistics] | None = None,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> tuple[str, ...]:
    """Estimate the running statistics of all BatchNorms anew from the data, in place.

    Every value that a BatchNorm reads counts alike, in small batches and large ones. Weights,
    training modes and momenta stay as they are, and so does a BatchNorm that is not called.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them, of a hundred samples or more where
            that can be; labels are not used.
        whole: By :func:`norm_statistics` of the same data, before neurons were removed, and
            :func:`kept_statistics` of that. Only what changed since is taken over then.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        The names of the BatchNorms that have new statistics.

    Raises:
        ArgumentError: The model has no BatchNorm with running statistics.
        ModelMismatchError: ``whole`` lacks a BatchNorm, or has one of another width.
        DataError: The data is empty, or the model refuses it, as a BatchNorm does a batch with a
            single value for each channel.
        NumericalError: A BatchNorm reads NaN or infinite values. In every case the model is as
            before.
    """
    norms = running_norms(model)
    if not norms:
        raise ArgumentError(
            f"{type(model).__name__} has no BatchNorm with running statistics; there is nothing "
            "to recalibrate"
        )
    with _fresh_statistics(norms, keep=True), torch.no_grad():
        called = _measured(model, norms, data, progress, forward)
        if whole is not None:
            for name, norm in called.items():
                _move(name, norm, whole)
    return tuple(called)


@agreed()
def norm_statistics(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> dict[str, NormStatistics]:
    """BatchNorm -> its statistics, for ``whole`` of :func:`recalibrate`; the model stays.

    BatchNorms that are not called are missing.

    Raises:
        DataError, NumericalError: As :func:`recalibrate` does.
    """
    norms = running_norms(model)
    before = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
    with _fresh_statistics(norms, keep=False), torch.no_grad():
        return {
            name: NormStatistics(*before[name], norm.running_mean, norm.running_var)
            for name, norm in _measured(model, norms, data, progress, forward).items()
        }


def kept_statistics(
    statistics: Mapping[str, NormStatistics], critical: Slice
) -> dict[str, NormStatistics]:
    """The statistics of the channels that a slice keeps, as of the smaller model."""
    removed = {name: channels for (name, _), (_, channels) in critical.removed_channels().items()}
    kept = {}
    for name, found in statistics.items():
        stays = torch.ones(len(found.mean), dtype=torch.bool)
        stays[removed.get(name, torch.empty(0, dtype=torch.long))] = False
        kept[name] = found.of(stays)
    return kept


def _measured(
    model: nn.Module,
    norms: Mapping[str, Any],
    data: Iterable[Any],
    progress: bool | None,
    forward: Forward,
) -> dict[str, Any]:
    """The BatchNorms that were called; each has the statistics of the data."""
    with evaluation(model), _counting(norms) as seen:
        batches = counted_batches(model, shared_data(data), progress, "recalibration")
        for number, inputs, _ in batches:
            run(model, inputs, number, forward)
    _average_over_processes(norms, seen)
    called = {name: norm for name, norm in norms.items() if int(norm.num_batches_tracked)}
    for name, norm in called.items():
        _check_finite(name, norm)
    return called


def _move(name: str, norm: Any, whole: Mapping[str, NormStatistics]) -> None:
    """Take over what changed since the whole model read the data."""
    before = whole.get(name)
    if before is None or before.mean.shape != norm.running_mean.shape:
        has = "no statistics" if before is None else f"statistics of {len(before.mean)} channels"
        raise ModelMismatchError(
            f"there are {has} for {name}, which has {len(norm.running_mean)}; give those of the "
            "same model before neurons were removed, by norm_statistics and kept_statistics"
        )
    factor = (norm.running_var + norm.eps) / (before.variance + norm.eps)
    norm.running_mean = before.running_mean + (norm.running_mean - before.mean)
    norm.running_var = ((before.running_variance + norm.eps) * factor - norm.eps).clamp(min=0)


def running_norms(model: nn.Module) -> dict[str, Any]:
    """Name -> BatchNorm, for those with running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Norm) and isinstance(module.running_mean, Tensor)
    }


@contextlib.contextmanager
def _fresh_statistics(norms: Mapping[str, Any], *, keep: bool) -> Iterator[None]:
    """New statistics to write to.

    The old tensors come back on an error, where none came, and where they are not to ``keep``.
    """
    before = {
        name: (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        for name, norm in norms.items()
    }
    done = False

    def put_back() -> None:
        for name, norm in norms.items():
            if not (done and int(norm.num_batches_tracked)):
                norm.running_mean, norm.running_var, norm.num_batches_tracked = before[name]

    with afterwards(put_back):
        for norm in norms.values():
            norm.running_mean = torch.zeros_like(norm.running_mean)
            norm.running_var = torch.ones_like(norm.running_var)
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
        yield
        done = keep


@contextlib.contextmanager
def _counting(norms: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """The BatchNorms in training mode, and the momentum of each such that values count alike.

    Those of several processes count apart, also the kind that would wait for the others' batches.

    Yields:
        BatchNorm -> values of a channel that it has seen.
    """
    momenta = {name: norm.momentum for name, norm in norms.items()}
    seen = dict.fromkeys(norms, 0)

    def weigh(name: str) -> Any:
        def hook(norm: Any, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0].numel() // arguments[0].shape[1]
            seen[name] += values
            norm.momentum = values / seen[name]

        return hook

    def put_back() -> None:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            vars(norm).pop("forward", None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(afterwards(put_back))
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(weigh(name)).remove)
            norm.train()
            if isinstance(norm, nn.SyncBatchNorm):
                vars(norm)["forward"] = types.MethodType(Norm.forward, norm)
        yield seen


def _average_over_processes(norms: Mapping[str, Any], seen: Mapping[str, int]) -> None:
    """Give the BatchNorms the statistics of all processes, each by the values that it has seen."""
    if processes() == 1:
        return
    for name, norm in norms.items():
        values = [norm.running_mean, norm.running_var, norm.running_mean.new_ones(1)]
        sums = [value.double() * seen[name] for value in values]
        batches = norm.num_batches_tracked.clone()
        summed([*sums, batches])
        count = float(sums[2])
        if count:
            norm.running_mean.copy_(sums[0] / count)
            norm.running_var.copy_(sums[1] / count)
            norm.num_batches_tracked.copy_(batches)


def _check_finite(name: str, norm: Any) -> None:
    if not torch.isfinite(norm.running_mean.sum() + norm.running_var.sum()):
        raise NumericalError(
            f"{name} reads NaN or infinite values; check the data and the model's weights"
        )
