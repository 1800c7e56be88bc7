"""Which layers of a slice the outputs under its mask do not depend on outside the slice."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.adaptation.freezing import critical_channels, critical_entries
from nss_prune.core.afterwards import afterwards
from nss_prune.core.batches import pick_samples
from nss_prune.core.models import evaluation, run, submodule
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.core.undo import values_restored
from nss_prune.errors import ModelMismatchError
from nss_prune.graph.slices import Slice

TRIED = 8  # samples in a trial


def isolated_part(critical: Slice, model: nn.Module, inputs: Any) -> Slice:
    """The layers of a slice whose other neurons do not matter under its mask.

    A mask zeroes the inputs of the layers that consume a group. Where something else depends on a
    neuron too (a gate that is no layer, a sum over channels), the layer is left out, so that all of
    its neurons count as critical. This is tried with random weights, with which no dependence is
    too small to be seen; then the model gets its own back.

    Args:
        critical: Whose mask is tried.
        inputs: Of one call of the model, on its device.

    Raises:
        ModelMismatchError: The slice is of another model, or its mask does not cut a path from
            several layers together.
    """
    with values_restored(model):
        randomize(model)
        return _only(critical, _isolated_layers(critical, model, _few(inputs)))


def _few(inputs: Any) -> Any:
    samples = len(tensors_in(inputs)[0])
    few = pick_samples(inputs, torch.arange(min(TRIED, samples)))
    return map_tensors(torch.nan_to_num, few)


def _isolated_layers(critical: Slice, model: nn.Module, inputs: Any) -> set[str]:
    layers = set(critical.removed)
    if _is_isolated(layers, critical, model, inputs):
        return layers
    layers = {name for name in layers if _is_isolated({name}, critical, model, inputs)}
    if not _is_isolated(layers, critical, model, inputs):
        raise ModelMismatchError(
            "the outputs under the mask depend on neurons outside the slice; profile with "
            "ignored_layers= those whose outputs go to other than Linear and convolution layers"
        )
    return layers


@torch.no_grad()
def _is_isolated(layers: Collection[str], critical: Slice, model: nn.Module, inputs: Any) -> bool:
    """Whether other values in what is free in some layers leave the masked outputs as they are."""
    with evaluation(model), critical.masked(model):
        before = tensors_in(run(model, inputs, 0))
        with _other_values(_free(_only(critical, layers), model)):
            after = tensors_in(run(model, inputs, 0))
    return all(map(torch.equal, before, after))


def _only(critical: Slice, layers: Collection[str]) -> Slice:
    """The same slice of some layers; in all others every neuron is critical."""
    kept = {name: mask for name, mask in critical.kept.items() if name in layers}
    return Slice(kept, critical.groups)


def _free(critical: Slice, model: nn.Module) -> dict[Tensor, Tensor]:
    """Parameter or running statistic -> True for the entries that are not critical."""
    parameters = dict(model.named_parameters())
    entries = critical_entries(critical, model)
    free: dict[Tensor, Tensor] = {parameters[name]: ~kept for name, kept in entries.items()}
    for name, kept in critical_channels(critical, model).items():
        norm = submodule(model, name)
        for statistic in ("running_mean", "running_var"):
            free[norm.get_buffer(statistic)] = ~kept
    return free


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give parameters and running statistics random values of ordinary size."""
    generator = torch.Generator().manual_seed(0)
    statistics = [
        buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]
    for values in [*model.parameters(), *statistics]:
        if values.dim() > 1:
            scale = (values.shape[0] / values.numel()) ** 0.5
            drawn = scale * torch.randn(values.shape, generator=generator)
        else:
            drawn = 0.5 + torch.rand(values.shape, generator=generator)
        values.copy_(drawn)


@contextlib.contextmanager
def _other_values(where: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the context, tensors have other values in some entries."""
    changed = {tensor: tensor.clone() for tensor, mask in where.items() if mask.any()}

    def put_back() -> None:
        for tensor, values in changed.items():
            tensor.copy_(values)

    with afterwards(put_back):
        for tensor in changed:
            tensor.copy_(torch.where(where[tensor], 1 + 2 * tensor.abs(), tensor))
        yield
