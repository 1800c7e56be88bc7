"""What a layer is: the building blocks of a model, from the flow of its data.

The NeuSemSlice paper's definition 1 says that the inputs of each layer are the outputs of the
previous one, so a layer is a module with weights whose output is all that the rest of the model
reads, and the innermost such module: a residual block and not its convolutions, which the shortcut
passes by; a convolution of a VGG; a block of a ViT. Modules of a block's class are blocks even
where they have no shortcut. The norm and the activation that directly follow a single convolution
or fully connected layer are part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nss_prune.core.hooks import attached
from nss_prune.core.models import run
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.errors import ArgumentError, NothingToPruneError
from nss_prune.graph.tracing import traceable

POOLS = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A building block in the order of the forward pass.

    Attributes:
        name: Qualified name of its module.
        parts: ``name``, and the norms and activations that belong to it.
        input_shape: Without the samples.
        output_shape: Without the samples.
    """

    name: str
    parts: tuple[str, ...]
    input_shape: Shape
    output_shape: Shape


@dataclass(frozen=True)
class Call:
    """One call of a module: the autograd nodes and shapes of its input and output."""

    name: str
    module: nn.Module
    input_node: Any
    output_node: Any
    input_shape: Shape
    output_shape: Shape


def find_layers(
    model: nn.Module, inputs: Any, names: Sequence[str] | None = None
) -> tuple[Layer, ...]:
    """The building blocks of a model but the last, or the layers named, in forward order.

    Args:
        inputs: Of one call of the model; a few samples are enough.

    Raises:
        ArgumentError: A name that is not a module which runs once and gives a tensor.
        NothingToPruneError: Fewer than two layers are found.
    """
    calls, bottlenecks = _trace(model, inputs)
    if names is None:
        samples = len(tensors_in(inputs)[0])
        candidates = [
            call
            for call in calls
            if call.output_node in bottlenecks
            and call.output_shape[:1] == (samples,)
            and _has_weights(call.module)
        ]
        chosen = _building_blocks(candidates)[:-1]
    else:
        chosen = _named(model, calls, names)
    if len(chosen) < 2:
        raise NothingToPruneError(
            f"{type(model).__name__} has {len(chosen)} layers to compare "
            f"({', '.join(call.name for call in chosen) or 'none'}), where two are needed; name "
            "them in layers="
        )
    return tuple(_with_parts(call, calls, chosen, bottlenecks) for call in chosen)


def is_inside(name: str, outer: str) -> bool:
    """Whether a module lies within another one, by their names."""
    return name != outer and (not outer or name.startswith(outer + "."))


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _building_blocks(candidates: Sequence[Call]) -> list[Call]:
    """The innermost candidates, and all of the class of one that has parts of its own."""
    innermost = [
        call
        for call in candidates
        if not any(is_inside(other.name, call.name) for other in candidates)
    ]
    kinds = {
        type(call.module)
        for call in innermost
        if _has_parts(call.module) and not isinstance(call.module, nn.Sequential)
    }
    units = [call for call in candidates if call in innermost or type(call.module) in kinds]
    return [call for call in units if not any(is_inside(call.name, other.name) for other in units)]


def _named(model: nn.Module, calls: Sequence[Call], names: Sequence[str]) -> list[Call]:
    present = dict(model.named_modules())
    run_once = {call.name: call for call in calls}
    if isinstance(names, str):
        raise ArgumentError(f"layers is {names!r}; give a list of names")
    for name in names:
        if name not in present:
            raise ArgumentError(
                f"layers names {name!r}, which the model does not have; use names from "
                "dict(model.named_modules())"
            )
        if name not in run_once or next(present[name].parameters(), None) is None:
            raise ArgumentError(
                f"layers names {name!r}; a layer has parameters, runs once, reads a tensor and "
                "gives one"
            )
        outer = [other for other in names if is_inside(name, other)]
        if outer:
            raise ArgumentError(f"layers names {name!r} and {outer[0]!r}, which contains it")
    return [call for call in calls if call.name in set(names)]


def _with_parts(
    call: Call, calls: Sequence[Call], layers: Sequence[Call], bottlenecks: set[Any]
) -> Layer:
    """A layer with the norms and activations that directly follow it.

    These keep the shape and have no weights of two axes. Blocks have their own inside.
    """
    parts, last = [call.name], call
    if not _has_parts(call.module):
        for later in calls[calls.index(call) + 1 :]:
            if later.input_node is not last.output_node:
                continue
            if (
                later.output_node not in bottlenecks
                or later.output_shape != later.input_shape
                or isinstance(later.module, POOLS)
                or _has_weights(later.module)
                or any(is_inside(later.name, layer.name) for layer in layers)
            ):
                break
            parts.append(later.name)
            last = later
    return Layer(call.name, tuple(parts), call.input_shape[1:], last.output_shape[1:])


def _trace(model: nn.Module, inputs: Any) -> tuple[list[Call], set[Any]]:
    """Calls of modules that ran once, as they end, and the autograd nodes that all data passes."""
    calls: list[Call] = []
    starts: dict[nn.Module, tuple[Any, Shape]] = {}
    counts: Counter[nn.Module] = Counter()

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        counts[module] += 1
        if given and isinstance(given[0], Tensor):
            # Before the call, since one that works in place moves its input to another node.
            starts[module] = given[0].grad_fn, tuple(given[0].shape)

    def after(name: str) -> Any:
        def end(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and module in starts:
                node, shape = starts[module]
                ends = node, output.grad_fn, shape, tuple(output.shape)
                calls.append(Call(name, module, *ends))

        return end

    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks += [(module.register_forward_pre_hook, before)]
        hooks += [(module.register_forward_hook, after(name))]
    with traceable(model), attached(*hooks):
        given = map_tensors(_with_history, inputs)
        outputs = run(model, given, 0)
    sources = {tensor.grad_fn for tensor in tensors_in(given)} - {None}
    ends = [tensor.grad_fn for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
    if not sources:  # integers; what looks them up makes the data
        sources = {call.output_node for call in calls if call.input_node is None} - {None}
    once = [call for call in calls if counts[call.module] == 1]
    return once, _bottlenecks(sources, ends)


def _with_history(tensor: Tensor) -> Tensor:
    """A copy that autograd can follow, and that may be changed in place."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().clone().requires_grad_().clone()


def _bottlenecks(sources: set[Any], ends: Sequence[Any]) -> set[Any]:
    """The autograd nodes that lie on every path from the sources to the ends.

    In a topological order, those that no edge jumps over.
    """
    carrying: dict[Any, int] = {}
    for node in _topological(ends):
        if node in sources or any(before in carrying for before, _ in node.next_functions):
            carrying[node] = len(carrying)
    furthest = dict.fromkeys(carrying, 0)
    for node, place in carrying.items():
        for before, _ in node.next_functions:
            if before in furthest:
                furthest[before] = max(furthest[before], place)
    for node in ends:
        furthest[node] = len(carrying)
    found, reached = set(), 0
    for node, place in carrying.items():
        if reached <= place:
            found.add(node)
        reached = max(reached, furthest[node])
    return found


def _topological(ends: Sequence[Any]) -> list[Any]:
    """All nodes that lead to the ends, each after those of its inputs."""
    order, seen = [], set()
    stack = [(node, False) for node in ends]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions if before is not None]
    return order
