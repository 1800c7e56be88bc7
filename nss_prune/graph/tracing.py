"""Trace a model with torch-pruning; the model is left as found."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.core.afterwards import afterwards
from nss_prune.core.models import Forward, call_model, flags_kept
from nss_prune.core.nested import tensors_in
from nss_prune.core.undo import left_as_found
from nss_prune.core.value_reads import ValueReads
from nss_prune.errors import ArgumentError, GraphError


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """What tracing through autograd needs: evaluation mode, gradients on, no stray hooks after.

    Models of transformers make no cache of keys and values meanwhile: torch-pruning goes round in
    circles where they are joined to an empty one.
    """
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]

    def detach() -> None:
        for module, before in hooks:
            for key in set(module._forward_hooks) - set(before):
                del module._forward_hooks[key]

    with (
        left_as_found(model),
        flags_kept(model) as parameters,
        _without_caches(model),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        model.eval()
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        with afterwards(detach), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            yield


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """``use_cache`` off in the configurations of all modules, and as it was afterwards."""
    configurations = {id(own): own for own in (_config(module) for module in model.modules())}
    caching = [own for own in configurations.values() if getattr(own, "use_cache", None) is True]

    def put_back() -> None:
        for own in caching:
            own.use_cache = True

    with afterwards(put_back):
        for own in caching:
            own.use_cache = False
        yield


def _config(module: nn.Module) -> Any:
    return vars(module).get("config")


def resolve_layers(
    model: nn.Module, layers: Iterable[nn.Module | nn.Parameter | type | str] | None
) -> list[nn.Module | nn.Parameter]:
    """Modules and parameters meant by modules, types or qualified names.

    Raises:
        ArgumentError: A name or module that ``model`` does not have.
    """
    named = dict(model.named_modules())
    present: set[Any] = {*named.values(), *model.parameters()}
    found: list[nn.Module | nn.Parameter] = []
    for layer in layers or ():
        if isinstance(layer, str):
            if layer not in named:
                raise ArgumentError(
                    f"ignored_layers names {layer!r}, which the model does not have; "
                    "use a name from dict(model.named_modules())"
                )
            found.append(named[layer])
        elif isinstance(layer, type):
            found.extend(named[name] for name in named if isinstance(named[name], layer))
        elif layer in present:
            found.append(layer)
        else:
            raise ArgumentError(
                f"ignored_layers has a {type(layer).__name__} that is not in the model; "
                "pass its own modules, types or names (of the model given, not of a copy)"
            )
    return found


def trace(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
    output_transform: Callable[..., Any] | None = None,
    **graph_arguments: Any,
) -> tuple[tp.DependencyGraph, set[Any]]:
    """Build torch-pruning's dependency graph; the model is left as found.

    Returns:
        The graph, and the autograd nodes that made the model's outputs.

    Raises:
        GraphError: torch-pruning could not follow the model.
    """
    refuse_reparametrised(model)
    recorder = OutputRecorder(output_transform)
    with traceable(model):
        try:
            graph = tp.DependencyGraph().build_dependency(
                model,
                as_arguments(example_inputs),
                forward_fn=forward_fn or call_as_torch_pruning,
                output_transform=recorder,
                verbose=False,
                **graph_arguments,
            )
        except Exception as error:
            raise GraphError(
                f"torch-pruning could not trace {type(model).__name__}: {error}; its "
                "layers must be called and connected by autograd"
            ) from error
    return graph, recorder.nodes


def as_traced(forward: Forward, example_inputs: Any) -> tuple[Forward, Any]:
    """How the model is called, and with what, when it is traced.

    A list may be several arguments or a single one; torch-pruning decides, unless a function of
    the user's own calls the model.
    """
    if forward is not call_model:
        return forward, example_inputs
    return call_as_torch_pruning, as_arguments(example_inputs)


def call_as_torch_pruning(model: nn.Module, example_inputs: Any) -> Any:
    """Call a model as torch-pruning does by itself, where it would catch a KeyboardInterrupt."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    try:
        return model(*example_inputs)
    except Exception as error:
        try:
            return model(example_inputs)
        except Exception:
            raise error from None


def as_arguments(example_inputs: Any) -> Any:
    """Positional arguments of one call; torch-pruning unpacks a bare tensor along its batch."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs


class OutputRecorder:
    """An ``output_transform`` that remembers which autograd nodes made the outputs.

    Attributes:
        nodes: Those.
        reads_values: Whether the call that was :meth:`watched` depends on values of tensors.
    """

    def __init__(self, output_transform: Callable[..., Any] | None = None) -> None:
        self.output_transform = output_transform
        self.nodes: set[Any] = set()
        self.reads_values = True

    def watched(self, forward: Forward) -> Forward:
        """The same function, of whose call it is remembered whether it reads values."""

        def call(model: nn.Module, inputs: Any) -> Any:
            with ValueReads() as reads:
                outputs = forward(model, inputs)
            self.reads_values = reads.found
            return outputs

        return call

    def __call__(self, outputs: Any) -> list[Tensor]:
        if self.output_transform is not None:
            outputs = self.output_transform(outputs)
        tensors = [tensor for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
        self.nodes.update(tensor.grad_fn for tensor in tensors)
        return tensors


def refuse_reparametrised(model: nn.Module) -> None:
    """Raise on weights that are not plain: recomputed from others, scripted, or transposed."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            kind = type(hook).__name__
            if kind in REMEDIES:
                raise ArgumentError(
                    f"{name} computes its weight from others ({kind}); make it permanent first: "
                    f"torch.nn.utils.{REMEDIES[kind]}(module)"
                )
        masked = hasattr(module, "weight_orig") or hasattr(module, "weight_mask")
        if masked or hasattr(module, "parametrizations"):
            raise ArgumentError(
                f"{name} computes its weight from others (a mask or a parametrization); make it "
                "permanent first: torch.nn.utils.prune.remove(module, 'weight') or "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"{name or 'the model'} is a ScriptModule, whose layers cannot be changed; prune "
                "the module that it was scripted from, then script it"
            )
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            raise ArgumentError(
                f"{name} is a Conv1D of transformers, a linear layer with its weight transposed, "
                "which torch-pruning does not know; put an nn.Linear in the place of each, with "
                "weight=nn.Parameter(layer.weight.T.contiguous()) and bias=layer.bias"
            )


REMEDIES = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
