"""Gradual pruning within a training: the model becomes smaller by and by, the optimiser follows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from nss_prune.core.processes import processes
from nss_prune.errors import ArgumentError
from nss_prune.graph.costs import measure
from nss_prune.integrations.schedule import checked_schedule
from nss_prune.pruner.optimizers import rebind_optimizer
from nss_prune.pruner.pruner import NSSPruner
from nss_prune.pruner.report import Report

LOGGER = logging.getLogger("nss_prune")


class GradualPruning:
    """Prunes a model in a loop of your own, whenever a step of a schedule is reached.

    ::

        gradual = GradualPruning(example_inputs, {100: 0.8, 200: 0.6}, data=loader)
        for step, (inputs, labels) in enumerate(loader, 1):
            ...
            optimizer.step()
            gradual.after_step(step, model, optimizer)

    Args:
        example_inputs: Inputs of one call, on the model's device.
        budgets: Step -> share of the whole model's cost to keep, in (0, 1), falling: see
            :func:`nss_prune.integrations.schedule.cubic_schedule`.
        of: "macs" or "params".
        **pruner_arguments: As :class:`nss_prune.NSSPruner` takes them: ``data``, ``round_to``,
            ``ignored_layers`` ...

    Attributes:
        reports: Step -> what was done there.

    Raises:
        ArgumentError: An argument is outside what it may be.
    """

    def __init__(
        self,
        example_inputs: Any,
        budgets: Mapping[int, float],
        *,
        of: Literal["macs", "params"] = "macs",
        **pruner_arguments: Any,
    ) -> None:
        if of not in ("macs", "params"):
            raise ArgumentError(f"of is {of!r}; use 'macs' or 'params'")
        self.example_inputs = example_inputs
        self.budgets = checked_schedule(budgets)
        self.of = of
        self.pruner_arguments = pruner_arguments
        self.reports: dict[int, Report] = {}
        self._whole: int | None = None

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer | None = None) -> bool:
        """Prune where the schedule says so.

        Args:
            step: Number of steps of the optimiser so far.
            model: Not wrapped; its mode and flags stay as they are.
            optimizer: Of its parameters: it goes on with its state for the weights that stay.

        Returns:
            Whether the model was pruned; its parameters are others then.

        Raises:
            ArgumentError: There are several processes, which hold other parameters.
            NSSPruneError: As :meth:`nss_prune.NSSPruner.step`. The model is then as it was.
        """
        due = [at for at in self.budgets if at <= step and at not in self.reports]
        if not due:
            return False
        if processes() > 1:
            raise ArgumentError(
                f"gradual pruning works in one process, there are {processes()}: what wraps the "
                "model there holds its old parameters; prune before the training instead"
            )
        self._prune(due[-1], model, optimizer)
        return True

    def _prune(self, step: int, model: nn.Module, optimizer: Optimizer | None) -> None:
        present = self._cost(model)
        if self._whole is None:
            self._whole = present
        share = min(1.0, self.budgets[step] * self._whole / present)
        arguments = {"progress": False, **self.pruner_arguments, f"{self.of}_budget": share}
        pruner = NSSPruner(model, self.example_inputs, **arguments)
        if optimizer is None:
            pruner.step()
        else:
            with rebind_optimizer(optimizer, model, pruner):
                pruner.step()
        assert pruner.report is not None
        for earlier in self.budgets:
            if earlier <= step:
                self.reports.setdefault(earlier, pruner.report)
        LOGGER.info(
            "step %d: %.1f %% of the %s kept", step, 100 * self._cost(model) / self._whole, self.of
        )

    def _cost(self, model: nn.Module) -> int:
        cost = measure(model, self.example_inputs)
        return cost.macs if self.of == "macs" else cost.parameters
