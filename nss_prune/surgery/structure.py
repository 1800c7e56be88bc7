"""Check that a removal gives what masking gives, whatever the weights and inputs are.

The model's own weights and inputs may hide a wrong channel: a branch that starts at zero, inputs of
zeros, half precision. So removals are tried on a copy with random weights and random inputs, in
float64 where the layers allow it. What is compared is not only the model's output, where averages
and saturated gates may hide a difference, but also the output of each layer that consumes removed
neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nss_prune.core.arguments import fresh
from nss_prune.core.models import (
    Forward,
    call_model,
    clone,
    device_of,
    evaluation,
    full_precision,
)
from nss_prune.core.nested import tensors_in
from nss_prune.errors import NSSPruneError, RemovalError
from nss_prune.graph.axes import input_axis
from nss_prune.graph.slices import Slice
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.buffers import Producers, producers_of_buffers
from nss_prune.surgery.execute import Pruners, execute
from nss_prune.surgery.metadata import apply_changes, planned_changes
from nss_prune.surgery.pictures import smaller
from nss_prune.surgery.plan import plan_removal
from nss_prune.surgery.random_copy import as_dtype, random_copy, random_inputs
from nss_prune.surgery.widths import width_changes

MOST_IN_DOUBLE = 2**28  # parameters, which take 2 GiB in float64

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4}
"""Largest difference allowed, as a share of the largest value, by the coarsest dtype inside."""


@dataclass(frozen=True)
class _Outputs:
    """What a model gives for some inputs.

    Attributes:
        layers: (layer, call) -> its output, those channels that stay.
        final: The tensors that the model returns.
        dtype: The coarsest floating-point dtype of all tensors made.
    """

    layers: dict[tuple[str, int], Tensor]
    final: list[Tensor]
    dtype: torch.dtype

    @property
    def are_finite(self) -> bool:
        """Whether there is something to compare, and all of it is finite."""
        seen = [*self.layers.values()]
        return bool(seen) and all(bool(tensor.isfinite().all()) for tensor in seen)


class StructureCheck:
    """Tries removals on a copy of a model with random weights; the model is left as found.

    Args:
        example_inputs: Inputs of one call.
        forward: Function of (model, inputs) that gives the outputs.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, forward: Forward = call_model
    ) -> None:
        self._model = model
        self._forward = forward
        self._subjects = _subjects(model, example_inputs)
        self._subject: tuple[nn.Module, Any] | None = None
        self._producers: Producers | None = None

    @property
    def producers(self) -> Producers:
        """The layers that made what modules with buffers are given."""
        if self._producers is None:
            if self._subject is None:
                return {}
            subject, inputs = self._subject
            model = _working_copy(subject)
            self._producers = producers_of_buffers(model, inputs, self._forward)
        return self._producers

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
        plan_removal(critical, self._model)  # refuses a slice before anything is tried
        names = [
            name
            for (name, side), (member, _) in critical.removed_channels().items()
            if side == "in" and member.axis is None
        ]
        if not names:
            return True
        masked = self._masked(critical, names, _kept_outputs(critical))
        try:
            _compare(masked, self._removed(critical, names, customized_pruners, adapters, True))
        except RemovalError as error:
            if not self._widths_differ(critical):
                raise
            try:
                others = self._removed(critical, names, customized_pruners, adapters, False)
                _compare(masked, others)
            except RemovalError:
                raise error from error.__cause__
            return False
        return True

    def _widths_differ(self, critical: Slice) -> bool:
        return next(width_changes(self._model, critical, self.producers), None) is not None

    def _removed(
        self,
        critical: Slice,
        names: Sequence[str],
        customized_pruners: Pruners | None,
        adapters: Sequence[Adapter],
        widths: bool,
    ) -> _Outputs:
        """What a smaller copy gives."""
        assert self._subject is not None
        subject, inputs = self._subject
        model = _working_copy(subject)
        customized = _of_copy(customized_pruners or {}, self._model, model)
        try:
            steps = plan_removal(critical, model)
            changes = planned_changes(
                model, critical, adapters, widths=widths, producers=self.producers
            )
            execute(model, steps, customized)
            apply_changes(changes)
        except NSSPruneError:
            raise
        except Exception as error:
            raise RemovalError(f"the removal failed: {type(error).__name__}: {error}") from error
        try:
            return self._run(model, inputs, names, {})
        except Exception as error:
            raise RemovalError(
                f"the smaller model does not run: {error}; name the layer in ignored_layers"
            ) from error

    def _masked(
        self, critical: Slice, names: Sequence[str], kept: Mapping[str, Tensor]
    ) -> _Outputs:
        """The masked copy's outputs; the first time, a copy that runs is looked for."""
        if self._subject is not None:
            return self._run_masked(*self._subject, critical, names, kept)
        failure: Exception | None = None
        runs = False
        for subject in self._subjects:
            try:
                outputs = self._run_masked(*subject, critical, names, kept)
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
        self,
        subject: nn.Module,
        inputs: Any,
        critical: Slice,
        names: Sequence[str],
        kept: Mapping[str, Tensor],
    ) -> _Outputs:
        masked_model = _working_copy(subject)
        with critical.masked(masked_model):
            return self._run(masked_model, inputs, names, kept)

    def _run(
        self, model: nn.Module, inputs: Any, names: Sequence[str], kept: Mapping[str, Tensor]
    ) -> _Outputs:
        """Outputs of the model and of some of its layers, where the channels of ``kept``."""
        layers: dict[tuple[str, int], Tensor] = {}
        calls = dict.fromkeys(names, 0)

        def record(name: str) -> Any:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                for tensor in tensors_in(output)[:1]:
                    if name in kept:
                        where = kept[name].to(tensor.device)
                        tensor = tensor.index_select(input_axis(module), where)
                    layers[name, calls[name]] = tensor.detach().clone()
                calls[name] += 1

            return hook

        with contextlib.ExitStack() as stack:
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(record(name))
                stack.callback(handle.remove)
            stack.enter_context(_same_random_numbers(device_of(model)))
            stack.enter_context(evaluation(model))
            stack.enter_context(torch.no_grad())
            precision = stack.enter_context(_Precision())
            final = tensors_in(self._forward(model, fresh(inputs)))
        return _Outputs(layers, final, precision.coarsest)


def _subjects(model: nn.Module, example_inputs: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Copies and inputs, the strictest first; the last is the model as it is."""
    small = smaller(example_inputs)
    size = sum(parameter.numel() for parameter in model.parameters())
    dtypes = [torch.float64, torch.float32] if size <= MOST_IN_DOUBLE else [torch.float32]
    for dtype in (*dtypes, None):
        try:
            copy = random_copy(model, dtype)
        except Exception:  # a device without float64
            continue
        if small is not None:
            yield copy, random_inputs(small, dtype)
        yield copy, random_inputs(example_inputs, dtype)
        yield copy, as_dtype(example_inputs, dtype)
    own = clone(model, lambda tensor: tensor.detach())
    yield own, random_inputs(example_inputs)
    yield own, example_inputs


def _working_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, which a removal replaces, and has its own buffers."""
    return clone(
        model,
        lambda tensor: tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone(),
    )


def _of_copy(customized: Pruners, model: nn.Module, copy: nn.Module) -> Pruners:
    """The customized pruners of single modules for those of a copy."""
    modules = dict(zip(model.modules(), copy.modules(), strict=True))
    return {
        modules.get(key, key) if isinstance(key, nn.Module) else key: pruner
        for key, pruner in customized.items()
    }


def _kept_outputs(critical: Slice) -> dict[str, Tensor]:
    """Layer -> the channels of its output that stay, where some go."""
    found = {}
    for (name, side), (member, channels) in critical.removed_channels().items():
        if side != "in" and member.axis is None:
            stays = torch.ones(member.width, dtype=torch.bool)
            stays[channels] = False
            found[name] = stays.nonzero().flatten()
    return found


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


class _Precision(TorchFunctionMode):
    """Finds the coarsest floating-point dtype of the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = torch.float64

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            eps = torch.finfo(result.dtype).eps
            if eps > torch.finfo(self.coarsest).eps:
                self.coarsest = result.dtype
        return result


def _compare(masked: _Outputs, removed: _Outputs) -> None:
    """Raise RemovalError where two outputs differ."""
    allowed = TOLERANCES.get(masked.dtype, 16 * torch.finfo(masked.dtype).eps)
    wanted, found = ([tuple(t.shape) for t in outputs.final] for outputs in (masked, removed))
    if wanted != found:
        raise RemovalError(f"the outputs were {wanted} and would become {found}")
    if masked.layers.keys() != removed.layers.keys():
        raise RemovalError("the smaller model calls its layers otherwise than the masked one")
    pairs = [
        (f"{name}'s", masked.layers[name, call], removed.layers[name, call])
        for name, call in masked.layers
    ]
    pairs += [("the model's", *both) for both in zip(masked.final, removed.final, strict=True)]
    for owner, expected, actual in pairs:
        difference, scale = _difference(expected, actual)
        if not difference <= allowed * scale:
            raise RemovalError(
                f"{owner} outputs differ by {difference:.3g} from those of the masked model, which "
                f"reach {scale:.3g}, with random weights and inputs. Name the layers that "
                "torch-pruning describes wrongly in ignored_layers"
            )


def _difference(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest finite value of the first."""
    if expected.shape != actual.shape:
        return float("inf"), 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        return float(not torch.equal(expected, actual)), 0.0
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    differs = ~same
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return (float((expected - actual)[differs].abs().max()) if bool(differs.any()) else 0.0), scale
