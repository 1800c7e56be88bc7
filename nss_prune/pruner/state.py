"""The state of a pruner: put back on an error, and pickled without torch-pruning's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nss_prune.core import undo
from nss_prune.core.processes import agreed

TRACED = "to be traced"


@contextlib.contextmanager
def restored_on_error(owner: Any) -> Iterator[None]:
    """If the body raises, a pruner, its model and what is around that are put back as they were.

    Of several processes, all raise what one of them does.
    """
    outermost = owner.model if owner.wrapper is None else owner.wrapper
    with undo.restored_on_error(outermost, owner=owner), agreed():
        yield


def without_graph(pruner: Any) -> dict[str, Any]:
    """All attributes but torch-pruning's graph, whose nodes hold on to autograd's."""
    state = dict(vars(pruner))
    state["_subject"] = replace(pruner._subject, graph=None)
    if pruner._plan is not None:
        subject = replace(pruner._plan.subject, graph=None)
        state["_plan"] = replace(pruner._plan, subject=subject)
    state["DG"] = None if pruner.DG is None else TRACED
    return state


def trace_graph(pruner: Any) -> None:
    """Give a pruner its graph again, where it had one."""
    if pruner.DG is None:
        return
    pruner.DG, _ = pruner._subject.tracer.graph(pruner.model)
    share_history(pruner)
    pruner._subject = replace(pruner._subject, graph=pruner.DG)
    if pruner._plan is not None:
        subject = replace(pruner._plan.subject, graph=pruner.DG)
        pruner._plan = replace(pruner._plan, subject=subject)


def share_history(pruner: Any) -> None:
    """Let the graph, which is another for every step, go on with the history of all steps."""
    if pruner.DG is not None:
        pruner.DG._pruning_history = pruner._history
