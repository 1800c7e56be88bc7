"""Check that a removal gives what masking gives, whatever the weights and inputs are.

The model's own weights and inputs may hide a wrong channel: a branch that starts at zero, inputs of
zeros, half precision. So removals are tried on a copy with random weights and random inputs, in
float64 where the layers allow it. What is compared is not only the model's output, where averages
and saturated gates may hide a difference, but also the output of each layer that consumes removed
neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward, call_model, full_precision
from nss_prune.errors import NSSPruneError, RemovalError
from nss_prune.graph.slices import Slice
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.buffers import OwnBuffers, Producers
from nss_prune.surgery.cut import Pruners, cut
from nss_prune.surgery.plan import Step, plan_removal
from nss_prune.surgery.recorded import RecordedOutputs, compare, recorded
from nss_prune.surgery.trial_copies import Copy, copies_to_try, working_copy
from nss_prune.surgery.usage import (
    has_own_buffers,
    layers_used,
    resting,
    train_once,
    trains_others,
)
from nss_prune.surgery.widths import width_changes


class StructureCheck:
    """Tries removals on a copy of a model with random weights; the model is left as found.

    Args:
        example_inputs: Inputs of one call.
        forward: Function of (model, inputs) that gives the outputs.

    Attributes:
        used: The layers with parameters that calls of the masked copy use.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, forward: Forward = call_model
    ) -> None:
        self._model = model
        self._forward = forward
        self._subjects = copies_to_try(model, example_inputs)
        self._subject: Copy | None = None
        self._buffers: OwnBuffers | None = None
        self._training_matters: bool | None = None
        self.used: set[nn.Module] = set()

    @property
    def buffers(self) -> OwnBuffers | None:
        """Buffers that hold something for each channel; None before a copy was looked at."""
        if self._buffers is None and self._subject is not None:
            self._buffers = OwnBuffers(self._subject.model, self._subject.inputs, self._forward)
        return self._buffers

    @property
    def inputs(self) -> Any:
        """Inputs that the model takes, small pictures if it can; None where nothing was tried."""
        return None if self._subject is None else self._subject.given

    @full_precision()
    def check(
        self,
        critical: Slice,
        customized_pruners: Pruners | None = None,
        adapters: Sequence[Adapter] = ADAPTERS,
    ) -> bool:
        """Raise RemovalError unless the smaller copy gives what the masked copy gives.

        Returns:
            Whether attributes that say how wide a module is follow: they do where that changes
            nothing that the model computes.

        Raises:
            RemovalError: It does not, or one of them does not run.
            ModelMismatchError: The slice is of another model.
        """
        steps = plan_removal(critical, self._model)  # refuses a slice before anything is tried
        going = critical.removed
        rescaled = {queries.name for queries, _ in critical.removed_queries()}
        consumers = (
            member.name
            for group in critical.groups
            if group.name in going
            for member in group.consumers
        )
        names = [name for name in dict.fromkeys(consumers) if name not in rescaled]
        if not names:
            return True
        masked = self._masked(critical, names, _kept_outputs(steps))

        def removed(widths: bool) -> RecordedOutputs:
            smaller = self._smaller(critical, steps, customized_pruners or {}, adapters, widths)
            return self._run_smaller(smaller, names)

        try:
            compare(masked, removed(widths=True))
        except RemovalError as error:
            if not self._widths_differ(critical):
                raise
            try:
                compare(masked, removed(widths=False))
            except RemovalError:
                raise error from error.__cause__
            return False
        return True

    def _widths_differ(self, critical: Slice) -> bool:
        return next(width_changes(self._model, critical, self._producers), None) is not None

    def _smaller(
        self,
        critical: Slice,
        steps: tuple[Step, ...],
        customized_pruners: Pruners,
        adapters: Sequence[Adapter],
        widths: bool,
    ) -> nn.Module:
        """A smaller copy."""
        assert self._subject is not None
        model = working_copy(self._subject.model)
        customized = _of_copy(customized_pruners, self._model, model)
        try:
            cut(model, critical, steps, adapters, self.buffers, customized, widths=widths)
        except NSSPruneError:
            raise
        except Exception as error:
            raise RemovalError(f"the removal failed: {type(error).__name__}: {error}") from error
        return model

    def _run_smaller(self, model: nn.Module, names: Sequence[str]) -> RecordedOutputs:
        assert self._subject is not None
        try:
            outputs = recorded(model, self._subject.inputs, names, {}, self._forward)
        except Exception as error:
            raise RemovalError(
                f"the smaller model does not run: {error}; name the layer in ignored_layers"
            ) from error
        if self._trains_others:
            train_once(model, self._subject.inputs, self._forward)
        return outputs

    @property
    def _producers(self) -> Producers:
        return {} if self.buffers is None else self.buffers.producers

    @property
    def _trains_others(self) -> bool:
        """Whether training uses layers, or buffers of a user's own, that evaluation may not."""
        if self._training_matters is None:
            layers = resting(self._model, self.used)
            may = bool(layers) or has_own_buffers(self._model)
            self._training_matters = may and self._trains(layers)
        return self._training_matters

    def _trains(self, layers: set[nn.Module]) -> bool:
        """Whether a copy trains, with some of these layers of the model or with own buffers."""
        assert self._subject is not None
        copy = working_copy(self._subject.model)
        pairs = zip(self._model.modules(), copy.modules(), strict=True)
        copied = {its for own, its in pairs if own in layers}
        return trains_others(copy, copied, self._subject.inputs, self._forward)

    def _masked(
        self, critical: Slice, names: Sequence[str], kept: Mapping[str, Tensor]
    ) -> RecordedOutputs:
        """The masked copy's outputs; the first time, a copy that runs is looked for."""
        if self._subject is not None:
            return self._run_masked(self._subject, critical, names, kept)
        failure: Exception | None = None
        runs = False
        for subject in self._subjects:
            try:
                outputs = self._run_masked(subject, critical, names, kept)
            except Exception as error:
                failure = error
                continue
            runs = True
            if outputs.are_finite:
                self._subject = subject
                return outputs
        raise RemovalError(
            "the neurons' consumers give nothing finite, or forward_fn calls another model than "
            "the one it is given"
            if runs
            else f"the masked model does not run: {failure}; name the layer in ignored_layers"
        ) from failure

    def _run_masked(
        self, subject: Copy, critical: Slice, names: Sequence[str], kept: Mapping[str, Tensor]
    ) -> RecordedOutputs:
        masked = working_copy(subject.model)
        with critical.masked(masked), layers_used(masked) as used:
            outputs = recorded(masked, subject.inputs, names, kept, self._forward)
        pairs = zip(self._model.modules(), masked.modules(), strict=True)
        self.used = {own for own, copied in pairs if copied in used}
        return outputs


def _of_copy(customized: Pruners, model: nn.Module, copy: nn.Module) -> Pruners:
    """The customized pruners of single modules for those of a copy."""
    modules = dict(zip(model.modules(), copy.modules(), strict=True))
    return {
        modules.get(key, key) if isinstance(key, nn.Module) else key: pruner
        for key, pruner in customized.items()
    }


def _kept_outputs(steps: Iterable[Step]) -> dict[str, Tensor]:
    """Layer -> the channels of its output that stay, where some go."""
    found = {}
    for member, channels in ((step.member, step.channels) for step in steps):
        if member.side != "in" and member.axis is None:
            stays = torch.ones(member.width, dtype=torch.bool)
            stays[channels] = False
            found[member.name] = stays.nonzero().flatten()
    return found
