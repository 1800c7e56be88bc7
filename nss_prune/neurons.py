"""Dependency groups -> neurons: who makes them and who reads them.

A neuron is one channel of a torch-pruning dependency group: the set of channels that can only
be removed together. Where grouped convolutions or GroupNorm tie channels in groups of equal size,
a neuron is one channel of each of their groups. What is kept here is plain data under qualified
module names, so it outlives the graph, fits any model of the same structure, and can be saved.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.errors import ArgumentError, GraphError, ModelMismatchError, NothingToPruneError

Side = Literal["out", "in", "both"]

GRAPH_OPERATIONS = frozenset(
    {
        tp.ops.OPTYPE.CONCAT,
        tp.ops.OPTYPE.SPLIT,
        tp.ops.OPTYPE.ELEMENTWISE,
        tp.ops.OPTYPE.RESHAPE,
        tp.ops.OPTYPE.UNBIND,
        tp.ops.OPTYPE.EXPAND,
        tp.ops.OPTYPE.SLICE,
        tp.ops.OPTYPE.OUTPUT,
    }
)
MAKES_THE_OUTPUT = "makes the model's output"
UNSUPPORTED = {
    tp.ops.OPTYPE.MHA: "nn.MultiheadAttention ties its heads",
    tp.ops.OPTYPE.LSTM: "nn.LSTM ties its gates",
    tp.ops.OPTYPE.CUSTOMIZED: "a customized layer has no known parameter axes",
}


@dataclass(frozen=True)
class Member:
    """One side of a module (or a bare parameter) on which the neurons of a group lie.

    Attributes:
        name: Qualified name of the module, or of the parameter.
        side: ``out`` makes the neurons, ``in`` reads them, ``both`` passes them on
            (norms, depthwise convolutions, activations with weights).
        channels: Positions on that side, ``[positions]``.
        neurons: The neuron at each of these positions, ``[positions]``. A flattened feature
            map repeats a neuron, a split leaves some out.
        width: Number of positions on that side, those of other groups included.
        axis: For a bare parameter, the axis that carries the neurons; None for a module.
    """

    name: str
    side: Side
    channels: Tensor
    neurons: Tensor
    width: int
    axis: int | None = None


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that torch-pruning couples: removed together or not at all.

    Attributes:
        name: Qualified name of the root layer.
        size: Number of neurons.
        members: All that must shrink when neurons go.
        ties: Channels of the root layer in each neuron: neuron n is its channels n, n + size,
            n + 2 size ...
    """

    name: str
    size: int
    members: tuple[Member, ...]
    ties: int = 1

    @property
    def has_channels(self) -> bool:
        """Whether a neuron is ``ties`` channels of the root layer; more make up a head."""
        root = next((member for member in self.members if member.name == self.name), None)
        return root is None or len(root.channels) == self.size * self.ties

    @property
    def readers(self) -> tuple[Member, ...]:
        """Members that read the neurons; their inputs are the neurons' activations."""
        return tuple(member for member in self.members if member.side == "in")


@dataclass(frozen=True)
class NeuronMap:
    """All neurons of a model.

    Attributes:
        groups: In the order of ``model.named_modules()``.
        left_alone: Root layer -> why its group must not be pruned.
        left_alone_sizes: Root layer -> number of its channels.
        notes: What a reader of the report should know about how they were found.
    """

    groups: tuple[NeuronGroup, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    left_alone_sizes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def without(self, reasons: Mapping[str, str]) -> NeuronMap:
        """The map with some groups left alone, for ``reasons`` by their names."""
        gone = {group.name: group.size for group in self.groups if group.name in reasons}
        return NeuronMap(
            groups=tuple(group for group in self.groups if group.name not in gone),
            left_alone={**self.left_alone, **{name: reasons[name] for name in gone}},
            left_alone_sizes={**self.left_alone_sizes, **gone},
            notes=self.notes,
        )


Forward = Callable[[nn.Module, Any], Any]
"""Function of (model, inputs) that gives the outputs."""


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` as a batch asks for: a tensor, a sequence of arguments, or keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested output or batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with ``function`` of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def twin(module: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with children of its own, without hooks, and with ``copied`` of every tensor.

    What is shared inside stays shared. Not a deep copy: that fails on attributes that hold a part
    of an autograd graph.
    """
    made: nn.Module = _twin(module, copied, {})
    return made


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without values: it takes no memory, and calling it computes nothing."""
    return twin(model, without_values)


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type on torch's "meta" device."""
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _twin(module: nn.Module, copied: Callable[[Tensor], Tensor], known: dict[int, Any]) -> Any:
    if id(module) in known:
        return known[id(module)]
    made = known[id(module)] = copy.copy(module)
    own = vars(made)
    own.update({name: value.copy() for name, value in own.items() if isinstance(value, dict)})
    for name in [name for name in own if name.endswith("_hooks")]:
        own[name] = type(own[name])()
    for held in (made._parameters, made._buffers):
        tensors: dict[str, Any] = {name: value for name, value in held.items() if value is not None}
        for value in tensors.values():
            if id(value) not in known:
                known[id(value)] = _like(value, copied(value))
        held.update((name, known[id(value)]) for name, value in tensors.items())
    children = made._modules.items()
    own["_modules"] = {
        name: None if child is None else _twin(child, copied, known) for name, child in children
    }
    return made


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Put training modes and requires_grad flags back as they were, whatever the body does.

    The parameters are what it gives: to walk through a deep model takes as long as a layer.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    gradients = [
        (parameter, parameter.requires_grad)
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    try:
        yield [parameter for parameter, _ in gradients]
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with frozen parameters inside, everything as it was outside."""
    with flags_kept(model) as parameters:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, a GPU does not round the factors of float32 products to TF32.

    Where torch's newer interface (``fp32_precision``) was used, what it says holds.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("highest")
            convolutions = torch.backends.cudnn.allow_tf32
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", convolutions)
            torch.backends.cudnn.allow_tf32 = False
        yield


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """What tracing through autograd needs: evaluation mode, gradients on, no stray hooks after."""
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]
    with flags_kept(model) as parameters, torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        model.eval()
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            for module, before in hooks:
                for key in set(module._forward_hooks) - set(before):
                    del module._forward_hooks[key]


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
                forward_fn=forward_fn,
                output_transform=recorder,
                verbose=False,
                **graph_arguments,
            )
        except Exception as error:
            raise GraphError(
                f"torch-pruning could not trace {type(model).__name__}: {error}; check that "
                "model(*example_inputs) runs and that its layers are connected by autograd"
            ) from error
    return graph, recorder.nodes


def as_arguments(example_inputs: Any) -> Any:
    """Positional arguments of one call; torch-pruning unpacks a bare tensor along its batch."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs


class OutputRecorder:
    """An ``output_transform`` that remembers which autograd nodes made the outputs."""

    def __init__(self, output_transform: Callable[..., Any] | None = None) -> None:
        self.output_transform = output_transform
        self.nodes: set[Any] = set()

    def __call__(self, outputs: Any) -> list[Tensor]:
        if self.output_transform is not None:
            outputs = self.output_transform(outputs)
        tensors = [tensor for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
        self.nodes.update(tensor.grad_fn for tensor in tensors)
        return tensors


def refuse_reparametrised(model: nn.Module) -> None:
    """Raise on weights that hooks or parametrizations recompute from others."""
    for name, module in model.named_modules():
        masked = hasattr(module, "weight_orig") or hasattr(module, "weight_mask")
        if masked or hasattr(module, "parametrizations"):
            raise ArgumentError(
                f"{name} computes its weight from others (a mask or a parametrization); make it "
                "permanent first: torch.nn.utils.prune.remove(module, 'weight') or "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )


def find_neurons(
    model: nn.Module,
    graph: tp.DependencyGraph,
    output_nodes: set[Any],
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    root_module_types: Sequence[type] = (nn.modules.conv._ConvNd, nn.Linear),
) -> NeuronMap:
    """Read the groups of a traced model.

    Args:
        ignored: Modules whose output channels must stay; their submodules count too.

    Raises:
        GraphError: torch-pruning fails on a group.
        NothingToPruneError: No group is left.
    """
    ignored_modules = {
        child for module in ignored if isinstance(module, nn.Module) for child in module.modules()
    }
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    groups: list[NeuronGroup] = []
    left_alone: dict[str, tuple[str, int]] = {}
    for group in _all_groups(model, graph, root_module_types):
        name = graph._module2name[group[0].dep.target.module]
        reason = _reason_to_leave(graph, group, output_nodes, ignored_modules)
        members: tuple[Member, ...] = ()
        size, ties = len(group[0].idxs), _ties(group)
        if reason is None:
            members, reason = _members(graph, group, size // ties)
        if reason is None:
            groups.append(NeuronGroup(name, size // ties, members, ties))
        else:
            left_alone[name] = (reason, size)
    if not groups:
        raise NothingToPruneError(
            "no layer is left to prune: "
            + ("; ".join(f"{name}: {why}" for name, (why, _) in left_alone.items()) or "no groups")
            + ". Ignore fewer layers, or give a model with at least one hidden layer"
        )
    left_alone = dict(sorted(left_alone.items(), key=lambda item: order[item[0]]))
    return NeuronMap(
        groups=tuple(sorted(groups, key=lambda group: order[group.name])),
        left_alone={name: reason for name, (reason, _) in left_alone.items()},
        left_alone_sizes={name: size for name, (_, size) in left_alone.items()},
    )


def _all_groups(
    model: nn.Module, graph: tp.DependencyGraph, root_module_types: Sequence[type]
) -> list[Any]:
    try:
        return list(graph.get_all_groups(ignored_layers=[], root_module_types=root_module_types))
    except Exception as error:
        raise GraphError(
            f"torch-pruning could not find the groups of {type(model).__name__}: "
            f"{type(error).__name__}: {error}; name the layer in ignored_layers"
        ) from error


def _reason_to_leave(
    graph: tp.DependencyGraph, group: Any, output_nodes: set[Any], ignored: set[nn.Module]
) -> str | None:
    """Why a whole group must stay, or None."""
    makers = readers = 0
    size, ties = len(group[0].idxs), _ties(group)
    for dependency, channels in group:
        node, handler = dependency.target, dependency.handler
        makes = graph.is_out_channel_pruning_fn(handler)
        reads = graph.is_in_channel_pruning_fn(handler)
        makers += makes and not reads
        readers += reads and not makes
        if node.module in ignored and makes:
            return "ignored"
        if makes and (node.grad_fn in output_nodes or node.type == tp.ops.OPTYPE.OUTPUT):
            return MAKES_THE_OUTPUT
        if node.type in UNSUPPORTED:
            return UNSUPPORTED[node.type]
        groups = _channel_groups(node.module, node.type)
        if groups > 1 and (size % ties or not _can_be_tied(node.module, channels, size)):
            return f"{graph._module2name.get(node.module)} ties channels in {groups} groups"
    if not makers:
        return "made outside of what is traced"
    return None if readers else "nothing reads it"


def _channel_groups(module: Any, kind: Any) -> int:
    """Channel groups whose sizes must stay equal; 1 where channels are independent."""
    if kind == tp.ops.OPTYPE.CONV:
        return int(module.groups)
    if kind == tp.ops.OPTYPE.DEPTHWISE_CONV:
        return 1 if module.groups == module.in_channels else int(module.groups)
    if kind == tp.ops.OPTYPE.GN:
        return int(module.num_groups)
    return 1


def _ties(group: Any) -> int:
    """Channels that must go together so that all channel groups stay of equal size."""
    return math.lcm(*(_channel_groups(dep.target.module, dep.target.type) for dep, _ in group))


def _can_be_tied(module: Any, channels: Sequence[int], size: int) -> bool:
    """Whether a layer with channel groups sees all channels of the root, in their order."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels:
        return False  # several channels from each that is read
    return list(channels) == list(range(size))


def _members(
    graph: tp.DependencyGraph, group: Any, neurons_in_group: int
) -> tuple[tuple[Member, ...], str | None]:
    """Members of a group, or the inconsistency that forbids to use it."""
    size = len(group[0].idxs)
    if list(group[0].idxs) != list(range(size)):
        return (), "its root does not hold all of its channels"
    members = []
    for item in group:
        node = item.dep.target
        if node.type in GRAPH_OPERATIONS:
            continue
        name = _name(graph, node)
        width = side_width(node.module, _side(graph, item.dep), node.pruning_dim)
        if width is None:  # a PReLU with a single weight serves any number of channels
            continue
        if len(item.idxs) != len(item.root_idxs) or None in item.root_idxs:
            return (), f"{name} cannot be mapped back to the root"
        channels = torch.tensor(item.idxs, dtype=torch.long)
        neurons = torch.tensor(item.root_idxs, dtype=torch.long)
        tied_here = _channel_groups(node.module, node.type) > 1
        if tied_here and not torch.equal(neurons, channels):
            return (), f"{name} ties channels that come in another order"
        if len(channels.unique()) != len(channels) or _outside(channels, width):
            return (), f"{name} has {width} channels but is asked for others"
        if _outside(neurons, size):
            return (), f"{name} maps to neurons that the root does not have"
        members.append(_member(graph, item.dep, name, channels, neurons % neurons_in_group, width))
    return tuple(members), None


def _outside(positions: Tensor, size: int) -> bool:
    """Whether some positions are not among 0 .. size - 1."""
    return bool(len(positions)) and not 0 <= int(positions.min()) <= int(positions.max()) < size


def _name(graph: tp.DependencyGraph, node: Any) -> str:
    if node.type == tp.ops.OPTYPE.PARAMETER:
        return str(graph._param_to_name[node.module])
    return str(graph._module2name[node.module])


def _side(graph: tp.DependencyGraph, dependency: Any) -> Side:
    makes = graph.is_out_channel_pruning_fn(dependency.handler)
    reads = graph.is_in_channel_pruning_fn(dependency.handler)
    return "both" if makes and reads else "out" if makes else "in"


def _member(
    graph: tp.DependencyGraph,
    dependency: Any,
    name: str,
    channels: Tensor,
    neurons: Tensor,
    width: int,
) -> Member:
    is_parameter = dependency.target.type == tp.ops.OPTYPE.PARAMETER
    order = (neurons * width + channels).argsort()
    return Member(
        name=name,
        side=_side(graph, dependency),
        channels=channels[order],
        neurons=neurons[order],
        width=width,
        axis=dependency.target.pruning_dim if is_parameter else None,
    )


def side_width(target: nn.Module | nn.Parameter, side: Side, axis: int | None) -> int | None:
    """Channels on one side of a module or along an axis of a parameter.

    None where the module takes any number of channels.
    """
    if isinstance(target, nn.Parameter):
        assert axis is not None
        return int(target.shape[axis])
    functions = tp.pruner.function.PrunerBox.get(tp.ops.module2type(target))
    if functions is None:
        return None
    functions.pruning_dim = -1
    count = functions.get_in_channels if side == "in" else functions.get_out_channels
    width = count(target)
    return None if width is None else int(width)


def check_fits(groups: Iterable[NeuronGroup], model: nn.Module) -> None:
    """Raise ModelMismatchError unless ``model`` has the layers of the groups, at their widths."""
    parameters = dict(model.named_parameters())
    for group in groups:
        for member in group.members:
            if member.axis is None:
                width = side_width(submodule(model, member.name), member.side, None)
            else:
                found = parameters.get(member.name)
                width = None if found is None else int(found.shape[member.axis])
            if width != member.width:
                raise ModelMismatchError(
                    f"{member.name} has {width} channels ({member.side} side), {member.width} "
                    "were profiled; use the model that was profiled, or a copy of the same "
                    "structure, before anything was removed"
                )


def submodule(model: nn.Module, name: str) -> nn.Module:
    """``model.get_submodule(name)``.

    Raises:
        ModelMismatchError: The model does not have it.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelMismatchError(
            f"the model has no layer {name!r}; use the model (or a copy of the same structure) "
            "that was profiled"
        ) from error


def input_axis(module: nn.Module) -> int:
    """The axis of a reader's input that carries its channels."""
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def held_channels(channels: Tensor, width: int) -> Tensor:
    """Those of a reader's channels that its weight holds, of ``width`` along that axis.

    A grouped convolution loses the same channels in each group, and holds one's.
    """
    return channels[channels < width]


def _is_depthwise(convolution: nn.modules.conv._ConvNd) -> bool:
    return 1 < convolution.groups == convolution.in_channels == convolution.out_channels


def parameter_axes(module: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Parameter -> (axis of the channels it makes, axis of the channels it reads or None)."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, nn.Linear):
        return {name: (0, 1 if name == "weight" else None) for name in names}
    if isinstance(module, nn.modules.conv._ConvNd) and not _is_depthwise(module):
        weight = (1, 0) if module.transposed else (0, 1)
        return {name: weight if name == "weight" else (0, None) for name in names}
    if isinstance(module, (nn.LayerNorm, nn.Embedding)):
        return dict.fromkeys(names, (-1, None))
    return dict.fromkeys(names, (0, None))
