"""Which of its weights a task keeps, where it does not keep all that its neurons have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from nss_prune.adaptation.restore import FrozenEntries
from nss_prune.core.afterwards import afterwards
from nss_prune.core.models import submodule
from nss_prune.errors import ModelMismatchError
from nss_prune.unstructured.allocation import Allocation
from nss_prune.unstructured.sparsify import best_weights
from nss_prune.unstructured.weights import readable_layers


def prune_task_weights(
    model: nn.Module,
    entries: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    keep: float,
    *,
    method: str | Allocation = "lamp",
    classifier: str,
) -> dict[str, Tensor]:
    """The weights that a task keeps: those of earlier tasks that it uses, and its own best.

    Args:
        model: It has just learned the task.
        entries: Parameter -> True for the entries that are critical to the task, of its shape.
        held: Parameter -> True for the entries that earlier tasks hold.
        keep: What the task keeps of its own at most, of all weights of Linear layers and
            convolutions but the classifier's, in (0, 1].
        method: How many each layer keeps, as :func:`nss_prune.sparsify` takes it.
        classifier: Name of the layer that makes the outputs, which keeps all.

    Returns:
        Parameter -> True for the weights kept, of its shape.

    Raises:
        ArgumentError, NothingToPruneError: What the method raises, or its budgets break the rule.
        NumericalError: A weight is NaN or infinite.
    """
    makes_outputs = submodule(model, classifier)
    layers = [
        layer
        for layer in readable_layers(model)
        if all(module is not makes_outputs for module, _ in layer.holders)
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(layer.weight)] for layer in layers]
    own = [
        replace(
            layer, mask=entries[name] & ~held[name] & (True if layer.mask is None else layer.mask)
        )
        for name, layer in zip(found, layers, strict=True)
    ]
    remaining = sum(layer.remaining for layer in own)
    count = min(round(keep * sum(layer.size for layer in own)), remaining)
    best = best_weights(own, count, method)
    return {
        name: best[layer] | (held[name] & entries[name])
        for name, layer in zip(found, own, strict=True)
    }


@contextlib.contextmanager
def zeroed(model: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, what is not kept of some parameters is zero; then it is as it was.

    Args:
        kept: Parameter -> True for the entries that stay, of its shape.

    Raises:
        ModelMismatchError: The model does not have such a parameter.
    """
    check_weights(model, kept)
    hidden: list[FrozenEntries] = []

    def put_back() -> None:
        for values in hidden:
            values.restore()

    with afterwards(put_back):
        for name, mask in kept.items():
            parameter = model.get_parameter(name)
            others = ~mask.to(parameter.device)
            hidden.append(FrozenEntries(parameter, others))
            parameter.data.masked_fill_(others, 0)
        yield


def check_weights(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Refuse masks of weights that a model does not have.

    Raises:
        ModelMismatchError: Names the first.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, mask in kept.items():
        if shapes.get(name) != tuple(mask.shape):
            raise ModelMismatchError(
                f"a task keeps weights of {name} {tuple(mask.shape)}, the model has "
                f"{shapes.get(name, 'no such parameter')}; load the model that learned the task"
            )
