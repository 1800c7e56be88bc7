"""The neurons whose entries reduce the loss most a parameter, by measured gradients.

A step of gradient descent at rate η changes an entry by −ηg and so, to first order, the loss by
−ηg²: g² is the sensitivity of the entry (He et al., Sensitivity-aware visual parameter-efficient
fine-tuning, ICCV 2023). That of a neuron is the mean of g² over all entries that its removal would
take, in the layers that make it and in those that read it. The neurons of the largest are taken
over all layers, so that what trains differs from a profile's slice in the criterion alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import device_of, flags_kept
from nss_prune.core.processes import summed, total
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError
from nss_prune.graph.axes import axes_of
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice

BatchLoss = Callable[[Any, int], tuple[Tensor, int]]
"""Of a batch and its number: the mean loss over its samples, and how many they are."""


def check_budget(params_budget: float) -> None:
    """Raise ArgumentError unless it is a share in (0, 1]."""
    if not 0 < params_budget <= 1:
        raise ArgumentError(
            f"params_budget is {params_budget}; give the largest share of the parameters that may "
            "train, in (0, 1]"
        )


def sensitive_slice(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    loss: BatchLoss,
    params_budget: float,
) -> Slice:
    """The neurons of the largest sensitivity, as many as the budget allows.

    The most sensitive one of each layer is among them; of equal ones the earlier in the model comes
    first. A larger budget has the neurons of a smaller one, and more.

    Args:
        model: The model, not wrapped, which stays as it is.
        example_inputs: Of one call, on its device.
        batches: What ``loss`` takes, likewise.
        loss: Of the model as it is.
        params_budget: The largest share of the parameters that the removal of all other neurons
            may leave, in (0, 1].

    Raises:
        ArgumentError: The budget is no share, or less than what one neuron of each layer leaves.
        DataError: There is no batch.
        GraphError, NothingToPruneError: As :func:`nss_prune.discovery.whole.discover`.
    """
    check_budget(params_budget)
    groups = discover(model, example_inputs).groups
    found = sensitivities(model, batches, loss)
    gains = [_of_neurons(group, model, found) for group in groups]
    for gain in gains:
        gain[gain.argmax()] = torch.inf
    order = torch.cat(gains).argsort(descending=True, stable=True)
    sizes = [group.size for group in groups]

    def first(count: int) -> Slice:
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:count]] = True
        parts = zip(groups, kept.split(sizes), strict=True)
        rule = f"sensitivity, params_budget {params_budget:g}"
        return Slice({group.name: part for group, part in parts}, groups, rule)

    def share(count: int) -> float:
        return 1 - first(count).compression_rate(model)

    fewest = len(groups)
    allowed = bisect_right(range(fewest, len(order) + 1), params_budget, key=share)
    if not allowed:
        raise ArgumentError(
            f"params_budget is {params_budget}, and one neuron of each layer leaves "
            f"{share(fewest):.3g} of the parameters; give more"
        )
    return first(fewest + allowed - 1)


def sensitivities(model: nn.Module, batches: Iterable[Any], loss: BatchLoss) -> dict[str, Tensor]:
    """Parameter -> squared gradient of the mean loss over all samples, of its shape, in float32.

    Measured in evaluation mode, over all processes of torch.distributed, and with random numbers
    of its own, the same each time. Parameters that require no gradient are missing.

    Raises:
        DataError: There is no batch.
    """
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in named.items()}
    samples, device = 0, device_of(model)
    own = [device] if device.type == "cuda" else []
    with flags_kept(model), torch.random.fork_rng(own), torch.enable_grad():
        torch.manual_seed(0)
        model.eval()
        for number, batch in enumerate(batches):
            mean, count = loss(batch, number)
            samples += count
            gradients = torch.autograd.grad(mean, list(named.values()), allow_unused=True)
            for so_far, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    so_far.add_(gradient.to_dense(), alpha=count)
    samples = round(total([samples], device)[0])
    if not samples:
        raise DataError("the data has no batch; give batches that can be iterated repeatedly")
    summed(list(sums.values()))
    return {name: (all_samples / samples).square() for name, all_samples in sums.items()}


def _of_neurons(group: NeuronGroup, model: nn.Module, found: Mapping[str, Tensor]) -> Tensor:
    """Mean sensitivity of the entries of each neuron, ``[neurons]``, in float64 on the CPU."""
    gain, entries = torch.zeros(2, group.size, dtype=torch.float64)
    for member in group.members:
        for name, axis in axes_of(member, model):
            if name not in found or found[name].shape[axis] < 2:
                continue
            squares = found[name].movedim(axis, 0).reshape(found[name].shape[axis], -1)
            # A grouped convolution holds the channels of one group.
            held = member.channels < len(squares)
            channels, neurons = member.channels[held], member.neurons[held]
            gain.index_add_(0, neurons, squares.sum(1, dtype=torch.float64).cpu()[channels])
            entries += squares.shape[1] * neurons.bincount(minlength=group.size)
    mean: Tensor = gain / entries.clamp(min=1)
    return mean
