"""The running statistics of BatchNorms, estimated anew: a few forward passes, without labels.

After neurons are removed, a BatchNorm further on reads something else than its running mean and
variance say. They are replaced by the averages over the data of the means and unbiased variances
of the batches, which is what training at a learning rate of 0 would come to. Nothing but the
BatchNorms is in training mode, so each of them normalizes by the statistics of its batch while
it counts, and those after it read what it makes of that (Li et al., EagleEye, ECCV 2020, adaptive
batch normalization).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.collector import run
from nss_prune.errors import ArgumentError, NumericalError
from nss_prune.neurons import evaluation
from nss_prune.readers import counted_batches

Norm = nn.modules.batchnorm._BatchNorm


def recalibrate(
    model: nn.Module, data: Iterable[Any], *, progress: bool | None = None
) -> tuple[str, ...]:
    """Estimate the running statistics of all BatchNorms anew from the data, in place.

    Every value that a BatchNorm reads counts alike, in small batches and large ones. Weights,
    training modes and momenta stay as they are, and so does a BatchNorm that is not called.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them, of a hundred samples or more where
            that can be; labels are not used.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        The names of the BatchNorms that have new statistics.

    Raises:
        ArgumentError: The model has no BatchNorm with running statistics.
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
    with _fresh_statistics(norms), torch.no_grad():
        with evaluation(model), _counting(norms):
            for number, inputs, _ in counted_batches(model, data, progress, "recalibration"):
                run(model, inputs, number)
        called = {name: norm for name, norm in norms.items() if int(norm.num_batches_tracked)}
        for name, norm in called.items():
            _check_finite(name, norm)
    return tuple(called)


def running_norms(model: nn.Module) -> dict[str, Any]:
    """Name -> BatchNorm, for those with running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Norm) and isinstance(module.running_mean, Tensor)
    }


@contextlib.contextmanager
def _fresh_statistics(norms: dict[str, Any]) -> Iterator[None]:
    """New statistics to write to; the old tensors come back on an error, or where none came."""
    before = {
        name: (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        for name, norm in norms.items()
    }

    def put_back(name: str) -> None:
        norm = norms[name]
        norm.running_mean, norm.running_var, norm.num_batches_tracked = before[name]

    for norm in norms.values():
        norm.running_mean = torch.zeros_like(norm.running_mean)
        norm.running_var = torch.ones_like(norm.running_var)
        norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    except BaseException:
        for name in norms:
            put_back(name)
        raise
    for name, norm in norms.items():
        if not int(norm.num_batches_tracked):
            put_back(name)


@contextlib.contextmanager
def _counting(norms: dict[str, Any]) -> Iterator[None]:
    """The BatchNorms in training mode, and the momentum of each such that values count alike."""
    momenta = {name: norm.momentum for name, norm in norms.items()}
    seen = dict.fromkeys(norms, 0)

    def weigh(name: str) -> Any:
        def hook(norm: Any, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0].numel() // arguments[0].shape[1]
            seen[name] += values
            norm.momentum = values / seen[name]

        return hook

    with contextlib.ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(weigh(name)).remove)
            norm.train()
        try:
            yield
        finally:
            for name, norm in norms.items():
                norm.momentum = momenta[name]


def _check_finite(name: str, norm: Any) -> None:
    if not torch.isfinite(norm.running_mean.sum() + norm.running_var.sum()):
        raise NumericalError(
            f"{name} reads NaN or infinite values; check the data and the model's weights"
        )
