"""Several small parameters that train in part as one parameter of the optimiser.

On a CPU an optimiser takes about as long for a tensor of ten entries as for one of some thousand,
and so does the work of giving frozen entries their bits back: in small models, both take longer
than what a part of the gradients saves. Packed, all small parameters take one update, and one mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.restore import FrozenEntries
from nss_prune.core.hooks import attached

BY_ENTRY = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, RMSprop)
"""Optimisers that treat each entry by itself: a part gets the values it would get in the whole."""

SMALL = 2**14
"""Entries below which a parameter is packed, and has no block: calls for that take longer."""


class Packed:
    """Some parameters as one vector, of which some entries train.

    Args:
        whole: Parameter of the model -> True for the entries that train, of its shape; all of one
            type on one device.
    """

    def __init__(self, whole: Mapping[nn.Parameter, Tensor]) -> None:
        self.whole = list(whole)
        masks = [mask.to(parameter.device).reshape(-1) for parameter, mask in whole.items()]
        self._frozen = ~torch.cat(masks)
        self.entries = nn.Parameter(_flat([parameter.detach() for parameter in self.whole]))
        # Parts of it that have the parameters' shapes.
        pieces = self.entries.detach().split([parameter.numel() for parameter in self.whole])
        self._pieces = [
            piece.view(parameter.shape) for piece, parameter in zip(pieces, self.whole, strict=True)
        ]

    @property
    def trained(self) -> int:
        """Number of entries that train."""
        return int((~self._frozen).sum())

    def read(self) -> None:
        """Take the entries as they are in the parameters."""
        torch._foreach_copy_(self._pieces, [parameter.detach() for parameter in self.whole])

    def write(self) -> None:
        """Give the parameters the entries, and what is frozen the bits that it had on entry."""
        self._kept.restore()
        torch._foreach_copy_([parameter.detach() for parameter in self.whole], self._pieces)

    @contextlib.contextmanager
    def attach(self, optimizer: Optimizer) -> Iterator[None]:
        """Within the context, steps of the optimiser see the entries and move the parameters.

        What is frozen keeps the bits that it has on entry.

        Args:
            optimizer: Of the entries, in place of the parameters.
        """
        self.read()
        self._kept = FrozenEntries(self.entries, self._frozen)
        before = [parameter.grad for parameter in self.whole]
        for parameter in self.whole:
            parameter.grad = None
        try:
            with attached(
                (optimizer.register_step_pre_hook, lambda *_: self._take_gradients()),
                (optimizer.register_step_post_hook, lambda *_: self._move()),
            ):
                yield
        finally:
            self.read()
            self.write()
            for parameter, gradient in zip(self.whole, before, strict=True):
                parameter.grad = gradient

    def _take_gradients(self) -> None:
        """The gradients of the parameters become that of the entries, or None if there are none."""
        gradients = [parameter.grad for parameter in self.whole]
        self._still = [number for number, found in enumerate(gradients) if found is None]
        self.entries.grad = None
        if len(self._still) == len(gradients):
            return
        self.entries.grad = _flat(
            [
                torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
                for gradient, parameter in zip(gradients, self.whole, strict=True)
            ]
        )
        for parameter in self.whole:
            parameter.grad = None

    def _move(self) -> None:
        """Write what the step has changed; a parameter without gradient stays as it was."""
        for number in self._still:
            self._pieces[number].copy_(self.whole[number].detach())
        self.write()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def treats_entries_apart(optimizer: Optimizer) -> bool:
    """Whether it is known to update each entry of a parameter by that entry's own gradients."""
    return type(optimizer) in BY_ENTRY


def pack_small(freezing: Freezing, optimizer: Optimizer) -> list[Packed]:
    """Replace small parameters in the optimiser by packs of them, where some of them are frozen.

    Args:
        freezing: What trains.
        optimizer: Fresh, of the model's parameters or of blocks of them. One that treats entries by
            what others are, as those do that scale whole layers, keeps them all.
    """
    if not treats_entries_apart(optimizer):
        return []
    trainable = {
        parameter: freezing.trainable[name]
        for name, parameter in freezing.model.named_parameters()
        if name in freezing.trainable and parameter.requires_grad
    }
    packs = []
    for group in optimizer.param_groups:
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for value in group["params"]:
            if value in trainable and value.numel() < SMALL and value.device.type == "cpu":
                by_type.setdefault(value.dtype, []).append(value)
        for values in by_type.values():
            if any(not trainable[value].all() for value in values):
                pack = Packed({value: trainable[value] for value in values})
                others = [value for value in group["params"] if value not in set(values)]
                group["params"] = [*others, pack.entries]
                packs.append(pack)
    return packs
