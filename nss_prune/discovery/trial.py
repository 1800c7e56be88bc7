"""Claims of adapters, each tried on its module before it is taken.

A structure may look like attention and mix its heads, order its channels otherwise, or tie the
number of heads to something else. So each claim is tried on a copy of its module, with the inputs
that the module gets in one call of the model: the neurons must be independent, and the smaller
module must run and give what the masked one gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.arguments import heads_called, on_input
from nss_prune.core.models import Forward, clone, evaluation
from nss_prune.core.text import first_line
from nss_prune.discovery.calls import Call, look, recorded_calls
from nss_prune.discovery.claims import Claim, claims, joined
from nss_prune.errors import RemovalError
from nss_prune.graph.axes import input_axis, parameter_axes
from nss_prune.graph.neurons import Member, NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.graph.ties import merged_by_ties
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.structure import StructureCheck

OTHERWISE = "with fewer heads it computes something else"


def adapted_on_trial(
    model: nn.Module,
    neurons: NeuronMap,
    claimed: Sequence[Claim],
    calls: Mapping[nn.Module, Call],
) -> NeuronMap:
    """The map with the neurons that adapters claim and a trial confirms; the model stays.

    Args:
        claimed: By :func:`nss_prune.discovery.claims.claims`.
        calls: Module -> what it is called with in one call of the model.
    """
    return with_verdicts(model, neurons, tried(claimed, calls))


@dataclass(frozen=True)
class Verdicts:
    """What became of the claims of adapters.

    Attributes:
        taken: The groups of the claims that stand.
        refused: Root of a claim that does not -> the reason, and its channels.
    """

    taken: tuple[NeuronGroup, ...] = ()
    refused: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def makers(self) -> set[str]:
        """Names of the layers that make the neurons of the claims that stand."""
        return {member.name for group in self.taken for member in group.makers}

    @property
    def uneven(self) -> set[str]:
        """Those of groups that torch-pruning cannot follow, as heads that share keys and values."""
        uneven = (group for group in self.taken if group.is_uneven)
        return {member.name for group in uneven for member in group.makers}


def verdicts_of(
    model: nn.Module,
    adapters: Sequence[Adapter],
    ignored: Sequence[nn.Module | nn.Parameter],
    forward: Forward,
    example_inputs: Any,
) -> Verdicts:
    """What becomes of the claims of adapters; the model is called once if anything is claimed.

    Args:
        adapters: The structures in which neurons are more than channels.
        ignored: Modules whose output channels must stay, and parameters.
        forward: Function of (model, example_inputs) that gives the outputs.
        example_inputs: Inputs of one call.

    Raises:
        GraphError: The model does not run.
    """
    claimed = list(claims(model, adapters, ignored))
    if not claimed:
        return Verdicts()
    modules = {module for module, _, _ in claimed}
    return tried(claimed, recorded_calls(model, modules, example_inputs, forward))


def tried(claimed: Sequence[Claim], calls: Mapping[nn.Module, Call]) -> Verdicts:
    """Try the claims of adapters, each on a copy of its module.

    Of several claims on a module the first that stands is taken. Where none does, its channels are
    left alone. Modules that look the same, such as those of repeated blocks, are tried once.

    Args:
        claimed: By :func:`nss_prune.discovery.claims.claims`.
        calls: Module -> what it is called with in one call of the model.
    """
    verdicts: dict[Any, str | None] = {}
    taken: dict[nn.Module, tuple[NeuronGroup, ...]] = {}
    reasons: dict[nn.Module, dict[str, tuple[str, int]]] = {}
    for module, adapter, groups in claimed:
        call = calls.get(module)
        seen = (adapter, *look(module, call))
        if module in taken:
            continue
        if seen not in verdicts:
            verdicts[seen] = refusal(module, adapter, call)
        if (reason := verdicts[seen]) is None:
            taken[module] = groups
        else:
            roots = {group.name: (reason, group.members[0].width) for group in groups}
            reasons.setdefault(module, roots)  # of several reasons the first
    refused: dict[str, tuple[str, int]] = {}
    for module, roots in reasons.items():
        refused.update({} if module in taken else roots)
    return Verdicts(tuple(group for groups in taken.values() for group in groups), refused)


def with_verdicts(model: nn.Module, neurons: NeuronMap, verdicts: Verdicts) -> NeuronMap:
    """The map with the claims that stand, and those that do not left alone, with the reason."""
    result, refused = joined(model, neurons, verdicts.taken), verdicts.refused
    # What fails by whole heads fails by their channels too, which would cost many trials to see.
    result = result.without({name: reason for name, (reason, _) in refused.items()})
    known = {group.name for group in result.groups}
    left = {name: why for name, why in refused.items() if name not in known}
    result = replace(
        result,
        left_alone={**result.left_alone, **{name: why for name, (why, _) in left.items()}},
        left_alone_sizes={
            **{name: size for name, (_, size) in left.items()},
            **result.left_alone_sizes,
        },
    )
    return merged_by_ties(model, result)


def refusal(module: nn.Module, adapter: Adapter, call: Call | None) -> str | None:
    """Why the neurons that an adapter claims in a module cannot go one by one, or None.

    Args:
        call: What the module is called with; None where it is not.
    """
    if call is None:
        return "the heads cannot be tried, because the module is not called"
    groups = adapter.groups("", module)
    try:
        halves = {group.name: torch.arange(group.size) % 2 == 0 for group in groups}
        reason = _removal_failure(module, Slice(halves, groups), adapter, call)
        if reason in (None, OTHERWISE) and not all(
            _independent(module, group, call) for group in groups
        ):
            reason = "the heads depend on each other, or are not told apart"
    except Exception as error:
        reason = f"the heads cannot be tried alone: {first_line(error)}"
    return reason


def _removal_failure(
    module: nn.Module, critical: Slice, adapter: Adapter, call: Call
) -> str | None:
    """What is wrong with a module from which a slice has been cut, or None."""
    structure = StructureCheck(
        module,
        (call.arguments, call.keywords),
        lambda part, inputs: _first(Call(*inputs).on(part)),
    )
    try:
        structure.check(critical, adapters=(adapter,))
    except RemovalError as error:
        if "does not run" in str(error):
            return f"with fewer heads it does not run: {first_line(error.__cause__ or error)}"
        return OTHERWISE
    return None


def _independent(module: nn.Module, group: NeuronGroup, call: Call) -> bool:
    """Whether no neuron reaches the channels of another one.

    Some neurons are made NaN, and what reads the others must not see any. Any two neurons differ
    in a binary digit of their number, so it takes two calls for each digit to try them all.
    """
    numbers = torch.arange(group.size)
    for digit in range((group.size - 1).bit_length()):
        for value in (0, 1):
            poisoned = (numbers >> digit) % 2 == value
            part = clone(module, _values)
            _poison(part, group, poisoned)
            with _watched(part, group, ~poisoned) as clean:
                _run(part, call)
            if not (clean and all(clean)):
                return False
    return True


def _values(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _poison(module: nn.Module, group: NeuronGroup, neurons: Tensor) -> None:
    """Make all that some neurons come from NaN, in place."""
    parameters = dict(module.named_parameters())
    for member in group.members:
        if member.side != "out":
            continue
        channels = member.channels[neurons[member.neurons]]
        if member.axis is not None:
            axes = {member.name: member.axis}
        else:
            layer = module.get_submodule(member.name)
            axes = {f"{member.name}.{key}": out for key, (out, _) in parameter_axes(layer).items()}
        for name, axis in axes.items():
            value = parameters[name].data
            value.index_fill_(axis, channels.to(value.device), torch.nan)


@contextlib.contextmanager
def _watched(module: nn.Module, group: NeuronGroup, neurons: Tensor) -> Iterator[list[bool]]:
    """Collect whether some neurons arrive without NaN, and take all NaN away there.

    They are looked at before the norms over all neurons, which mix them on purpose.
    """
    clean: list[bool] = []

    def hook(member: Member) -> Any:
        channels = member.channels[neurons[member.neurons]]

        def look(layer: nn.Module, inputs: Tensor) -> Tensor:
            seen = inputs.index_select(input_axis(layer), channels.to(inputs.device))
            clean.append(not seen.isnan().any())
            return inputs.nan_to_num()

        return look

    with contextlib.ExitStack() as stack:
        stack.enter_context(heads_called(module))
        for member in group.members:
            layer = None if member.axis is not None else module.get_submodule(member.name)
            if layer is not None and (member.side == "in" or isinstance(layer, nn.LayerNorm)):
                stack.callback(on_input(layer, hook(member)).remove)
        yield clean


def _first(outputs: Any) -> Any:
    """What a module makes, without the weights of its heads that it may tell about as well."""
    return outputs[0] if isinstance(outputs, tuple) and outputs else outputs


def _run(module: nn.Module, call: Call) -> Any:
    with evaluation(module), torch.no_grad():
        return call.on(module)
