"""Train the critical neurons of a model, or all others; the rest keeps its bits.

An entry of a parameter is critical if the physical removal of all neurons outside the slice would
leave it: its row belongs to a critical neuron (or to a layer that is not sliced), and its column
to the input from a critical neuron (or from something that is not sliced). The share of entries
that train, the paper's TPR, is therefore 1 − ``Slice.compression_rate``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from nss_prune.adaptation.batch_norm import running_statistics
from nss_prune.adaptation.restore import FrozenEntries, Restorable, fused
from nss_prune.core.hooks import attached
from nss_prune.core.models import flags_kept, submodule
from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.graph.axes import axes_of, check_fits, held_channels, parameter_axes
from nss_prune.graph.slices import Slice


def critical_entries(critical: Slice, model: nn.Module) -> dict[str, Tensor]:
    """Parameter -> True for the entries that are left after the removal, of its shape.

    Raises:
        ModelMismatchError: The slice is of another model.
    """
    check_fits(critical.groups, model)
    parameters = dict(model.named_parameters())
    entries = {
        name: torch.ones(value.shape, dtype=torch.bool, device=value.device)
        for name, value in parameters.items()
    }
    for member, channels in critical.removed_channels().values():
        for parameter, axis in axes_of(member, model):
            # A second name of a tied parameter stands for no entries of its own.
            if parameter in entries:
                _clear(entries[parameter], axis, channels)
    return entries


def _clear(entries: Tensor, axis: int, channels: Tensor) -> None:
    width = entries.shape[axis]
    if width > 1:
        entries.index_fill_(axis, held_channels(channels, width).to(entries.device), False)


def critical_channels(critical: Slice, model: nn.Module) -> dict[str, Tensor]:
    """Norm layer with running statistics -> True for channels of critical neurons, ``[channels]``.

    The channels of a layer outside all groups count as critical.

    Raises:
        ModelMismatchError: The slice is of another model.
    """
    check_fits(critical.groups, model)
    removed = critical.removed_channels()
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase) or module.running_mean is None:
            continue
        kept = torch.ones_like(module.running_mean, dtype=torch.bool)
        for side in ("out", "in", "both"):
            if (name, side) in removed:
                kept[removed[name, side][1].to(kept.device)] = False
        found[name] = kept
    return found


def train_critical(critical: Slice, model: nn.Module) -> Freezing:
    """Re-adaptation: the critical neurons train, all others keep their bits.

    Raises:
        ModelMismatchError: The slice is of another model.
    """
    channels = critical_channels(critical, model)
    frozen = {name: ~kept for name, kept in channels.items()}
    return Freezing(model, critical_entries(critical, model), frozen)


def train_all(model: nn.Module) -> Freezing:
    """Every entry trains."""
    everything = {
        name: torch.ones_like(parameter, dtype=torch.bool)
        for name, parameter in model.named_parameters()
    }
    return Freezing(model, everything)


def train_others(
    critical: Slice, model: nn.Module, keep: Mapping[str, Tensor] | None = None
) -> Freezing:
    """Incremental development: what the masked model computes keeps its bits, all else trains.

    Entries whose row and column are both critical are frozen. The rows of critical neurons may
    train on columns of the others: under the mask the inputs of these are zero. That holds for
    layers that the mask isolates, which is not checked here; where other paths lead past it, take
    what :func:`nss_prune.adaptation.isolation.isolated_part` gives in place of the slice.

    Args:
        keep: Layer that makes the output -> True for the outputs that keep their bits,
            ``[outputs]``. The rows of its other outputs train on all columns. Layers that are
            neither in ``keep`` nor sliced are frozen wholly.

    Raises:
        ArgumentError: Nothing would be left to train.
        ModelMismatchError: The slice is of another model, or ``keep`` does not fit its layer.
    """
    frozen = critical_entries(critical, model)
    for name, kept in (keep or {}).items():
        module = submodule(model, name)
        for key, (made, _) in parameter_axes(module).items():
            _keep_rows(frozen, f"{name}.{key}" if name else key, made, kept)
    trainable = {name: ~entries for name, entries in frozen.items()}
    return Freezing(model, trainable, critical_channels(critical, model))


def _keep_rows(frozen: Mapping[str, Tensor], parameter: str, axis: int, kept: Tensor) -> None:
    if parameter not in frozen:
        raise ModelMismatchError(
            f"{parameter} is tied to another parameter; name the layer that holds it first in "
            "model.named_parameters()"
        )
    entries = frozen[parameter]
    if kept.dtype != torch.bool or kept.shape != (entries.shape[axis],):
        raise ModelMismatchError(
            f"keep has {kept.dtype} {tuple(kept.shape)} for {parameter}; give bool "
            f"({entries.shape[axis]},), True for outputs that must keep their bits"
        )
    released = (~kept).nonzero().flatten().to(entries.device)
    entries.index_fill_(axis, released, False)


class Freezing:
    """Some entries of a model train; all others keep their bits, through any optimiser.

    ::

        with train_critical(critical, model).attach(optimizer):
            for inputs, labels in data:
                optimizer.zero_grad()
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    Args:
        model: The model, not wrapped.
        trainable: Parameter -> True for the entries that train, of the parameter's shape.
            Parameters that are not named are wholly frozen.
        frozen_statistics: Norm layer -> True where its running statistics are frozen,
            ``[channels]``. In training mode these channels are normalised by them, the others by
            the batch's.

    Raises:
        ArgumentError: No entry would train.
        ModelMismatchError: A name or a shape that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, Tensor],
        frozen_statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameters = dict(model.named_parameters())
        for name, mask in trainable.items():
            _check_mask(name, mask, parameters.get(name))
        for name, mask in (frozen_statistics or {}).items():
            _check_mask(name, mask, getattr(submodule(model, name), "running_mean", None))
        self.model = model
        self.trainable = {name: mask for name, mask in trainable.items() if mask.any()}
        self.frozen_statistics = {
            name: mask for name, mask in (frozen_statistics or {}).items() if mask.any()
        }
        self._kept: list[Restorable] | None = None
        if not self.trainable:
            raise ArgumentError(
                "no entry of any parameter would train; take another slice: train the critical "
                "neurons of one that keeps some, or the others of one that leaves some out"
            )

    @property
    def share(self) -> float:
        """Share of the model's parameters that train: TPR in the paper."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return sum(int(mask.sum()) for mask in self.trainable.values()) / total

    @contextlib.contextmanager
    def attach(
        self,
        optimizer: Optimizer | None = None,
        *,
        apart: Collection[str] = (),
        zero_gradients: bool = True,
    ) -> Iterator[Freezing]:
        """Within the context, what is frozen keeps the bits that it has on entry.

        Gradients of frozen entries are zero, so that clipping sees only those that train.
        Parameters that are frozen wholly require no gradient. On exit, hooks and flags are as
        they were before, also after an exception.

        Args:
            optimizer: Frozen entries get their bits back after each of its steps (weight decay
                and momentum move what has no gradient too). Without it, call :meth:`restore`.
            apart: Parameters whose entries are frozen by other means; they are left alone.
            zero_gradients: False leaves the gradients of frozen entries as they are, which is
                faster and changes nothing where an optimiser treats each entry by itself and
                nothing else, such as clipping or a loss scaler, reads them.

        Raises:
            ArgumentError: The optimiser has no hooks, or this freezing is attached already.
        """
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise ArgumentError(
                f"{type(optimizer).__name__} has no register_step_post_hook; attach() without it "
                "and call restore() after each of its steps"
            )
        if self._kept is not None:
            raise ArgumentError("this freezing is attached already; leave that context first")
        with contextlib.ExitStack() as stack, flags_kept(self.model):
            self._kept = fused(self._freeze(stack, apart, zero_gradients))
            stack.callback(self._release)
            if optimizer is not None:
                after = optimizer.register_step_post_hook
                stack.enter_context(attached((after, lambda *_: self.restore())))
            yield self

    def restore(self) -> None:
        """Give frozen entries the bits they had on entry. Inside :meth:`attach` only.

        Raises:
            ArgumentError: It is not attached.
        """
        if self._kept is None:
            raise ArgumentError("restore() needs what attach() keeps; call it inside the context")
        for kept in self._kept:
            kept.restore()

    def _release(self) -> None:
        self.restore()
        self._kept = None

    def _freeze(
        self, stack: contextlib.ExitStack, apart: Collection[str], zero_gradients: bool
    ) -> list[FrozenEntries]:
        kept = []
        for name, parameter in self.model.named_parameters():
            if name in apart:
                continue
            if name not in self.trainable:
                stack.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
                parameter.requires_grad_(False)
                continue
            frozen = ~self.trainable[name].to(parameter.device)
            if not frozen.any():
                continue
            kept.append(FrozenEntries(parameter, frozen))
            if parameter.requires_grad and zero_gradients:
                after = parameter.register_post_accumulate_grad_hook
                stack.enter_context(attached((after, kept[-1].zero_gradient)))
        for name, frozen in self.frozen_statistics.items():
            norm = submodule(self.model, name)
            assert isinstance(norm, _NormBase)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            frozen = frozen.to(norm.running_mean.device)
            kept += [
                FrozenEntries(norm.running_mean, frozen),
                FrozenEntries(norm.running_var, frozen),
            ]
            stack.enter_context(running_statistics(norm, frozen))
        return kept


def _check_mask(name: str, mask: Tensor, found: Tensor | None) -> None:
    if found is None:
        raise ModelMismatchError(
            f"the model has no parameter or running statistics for {name!r}; use names from "
            "model.named_parameters() and of norm layers that track statistics"
        )
    if mask.dtype != torch.bool or mask.shape != found.shape:
        raise ModelMismatchError(
            f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; give torch.bool "
            f"{tuple(found.shape)}"
        )
