"""HAT: several tasks in one network, each in the neurons that its attention opens.

Serra, Suris, Miron, Karatzoglou, "Overcoming Catastrophic Forgetting with Hard Attention to the
Task", ICML 2018. While a task trains, what is read of a neuron is multiplied by its gate σ(s e),
with a trained e of each neuron (eq. 1). Within each epoch s rises from 1/s_max to s_max (eq. 3),
where gates are open or closed. The gradient of e is what it would be at s = 1, times s_max (eq. 4),
so that e trains at every s. The loss grows by λ times the share of gates that are open, among
neurons which no earlier task took (eqs. 5 and 6). Neurons that are open in the end are the task's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune import Slice
from nss_prune.core.models import submodule
from nss_prune.graph.axes import input_axis
from nss_prune.graph.neurons import Member, NeuronGroup

STEEPEST = 400.0  # s_max, and ...
OPEN_COSTS = 0.75  # ... λ, as the paper has them
FURTHEST = 6.0  # |e| at which the paper stops, as no gradient is left there


class HardAttention:
    """The gates of all neurons for one task, while it trains.

    Args:
        groups: The neurons.
        taken: Layer -> True for those that earlier tasks opened, ``[neurons]``; they are free to
            open again.
        steps: In an epoch.
        seed: Of the first values of e, which are normal.

    Attributes:
        embeddings: Layer -> e, ``[neurons]``, to be trained with the model.
    """

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        taken: Mapping[str, Tensor],
        steps: int,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.groups = tuple(groups)
        self.taken = dict(taken)
        self.steps = steps
        self.embeddings = {
            group.name: nn.Parameter(torch.randn(group.size, generator=generator))
            for group in groups
        }
        self._step = 0
        for embedding in self.embeddings.values():
            embedding.register_hook(self._at_any_scale(embedding))

    @property
    def scale(self) -> float:
        """s in this step (eq. 3)."""
        part = (self._step % self.steps) / max(1, self.steps - 1)
        return 1 / STEEPEST + (STEEPEST - 1 / STEEPEST) * part

    def gates(self, layer: str) -> Tensor:
        """Between 0 and 1, ``[neurons]``."""
        return torch.sigmoid(self.scale * self.embeddings[layer])

    def penalty(self) -> Tensor:
        """λ times the share of gates that are open, of neurons that no earlier task took."""
        opened, free = torch.zeros(()), 0
        for group in self.groups:
            unused = ~self.taken.get(group.name, torch.zeros(group.size, dtype=torch.bool))
            opened = opened + self.gates(group.name)[unused].sum()
            free += int(unused.sum())
        return OPEN_COSTS * opened / max(1, free)

    def advance(self) -> None:
        """After each step of the optimiser."""
        self._step += 1
        for embedding in self.embeddings.values():
            embedding.data.clamp_(-FURTHEST, FURTHEST)

    def slice(self) -> Slice:
        """The neurons that are open, of each layer one at least."""
        kept = {
            layer: embedding.detach() >= embedding.detach().max().clamp(max=0)
            for layer, embedding in self.embeddings.items()
        }
        return Slice(kept, self.groups)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within the context, the consumers of the neurons read them through their gates."""
        with contextlib.ExitStack() as stack:
            for group in self.groups:
                for member in group.consumers:
                    consumer = submodule(model, member.name)
                    hook = self._gating(group.name, member, input_axis(consumer))
                    stack.callback(consumer.register_forward_pre_hook(hook).remove)
            yield

    def _gating(self, layer: str, member: Member, axis: int) -> Any:
        def gate(consumer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs = arguments[0]
            shape = [1] * inputs.dim()
            shape[axis] = member.width
            channels = torch.ones(member.width)
            gates = channels.index_put((member.channels,), self.gates(layer)[member.neurons])
            return (inputs * gates.to(inputs).view(shape), *arguments[1:])

        return gate

    def _at_any_scale(self, embedding: Tensor) -> Any:
        """eq. 4: σ'(s e) s becomes σ'(e) s_max."""

        def compensated(gradient: Tensor) -> Tensor:
            e, s = embedding.detach().double(), self.scale
            steep = (s * e).clamp(-50, 50).cosh() + 1
            return (gradient.double() * STEEPEST * steep / (s * (e.cosh() + 1))).to(gradient)

        return compensated
