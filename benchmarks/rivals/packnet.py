"""PackNet: several tasks in one network, each in the weights that it keeps when it is pruned.

Mallya and Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning",
CVPR 2018. After a task is trained, a share of the free weights of every layer is set to zero, the
smallest first; the others belong to the task and are trained a little more, then never again. The
next task reads them and trains what is free. Under the mask of a task, the weights of later tasks
are zero. Biases and norm layers belong to the first task. Each task has its own rows of the last
layer, which are not pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nss_prune.adaptation import Freezing
from nss_prune.adaptation.task_weights import zeroed


class PackNet:
    """Which task each weight belongs to.

    Args:
        model: Its last Linear layer has a row for each class of each task.

    Attributes:
        owners: Weight -> number of its task, counted from 1, or 0 where it is free; uint8 of its
            shape.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tasks = 0
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        self.head: str = linear[-1]
        self.owners = {
            name: torch.zeros_like(weight, dtype=torch.uint8)
            for name, weight in model.named_parameters()
            if weight.dim() > 1 and not self._is_head(name)
        }

    def free(self, classes: Sequence[int]) -> Freezing:
        """What trains while the next task is learned: free weights, and the rows of its classes."""
        weights = {name: owner == 0 for name, owner in self.owners.items()}
        return self._freezing(weights, classes, first=self.tasks == 0)

    def keep(self, share: float, classes: Sequence[int]) -> Freezing:
        """Keep the largest ``share`` of the free weights of every layer for the task just learned.

        Returns:
            What trains afterwards: the weights kept, and the rows of its classes.
        """
        self.tasks += 1
        kept = {}
        for name, owner in self.owners.items():
            weight = self.model.get_parameter(name).data
            magnitudes = weight.abs().masked_fill(owner != 0, -1.0).flatten()
            count = round(share * int((owner == 0).sum()))
            largest = torch.zeros_like(magnitudes, dtype=torch.bool)
            largest[magnitudes.topk(count).indices] = True
            kept[name] = largest.view_as(weight)
            owner[kept[name]] = self.tasks
            weight[owner == 0] = 0.0
        return self._freezing(kept, classes, first=self.tasks == 1)

    @contextmanager
    def masked(self, task: int) -> Iterator[nn.Module]:
        """Within the context, weights outside tasks 1 to ``task`` are zero."""
        kept = {name: (owner != 0) & (owner <= task) for name, owner in self.owners.items()}
        with zeroed(self.model, kept):
            yield self.model

    @property
    def mask_bytes(self) -> int:
        """Of the mask of one task: one bit for each weight."""
        return sum(-(-owner.numel() // 8) for owner in self.owners.values())

    def _freezing(
        self, weights: dict[str, Tensor], classes: Sequence[int], *, first: bool
    ) -> Freezing:
        trainable = {}
        for name, parameter in self.model.named_parameters():
            if name in weights:
                trainable[name] = weights[name]
            elif self._is_head(name):
                trainable[name] = torch.zeros_like(parameter, dtype=torch.bool)
                trainable[name][list(classes)] = True
            else:
                trainable[name] = torch.full_like(parameter, first, dtype=torch.bool)
        statistics = {
            name: torch.ones_like(module.running_mean, dtype=torch.bool)
            for name, module in self.model.named_modules()
            if not first and isinstance(getattr(module, "running_mean", None), Tensor)
        }
        return Freezing(self.model, trainable, statistics)

    def _is_head(self, name: str) -> bool:
        module, _, _ = name.rpartition(".")
        return module == self.head
