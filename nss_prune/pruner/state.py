"""The state of a pruner: put back on an error, and pickled without torch-pruning's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nss_prune.core.processes import agreed

TRACED = "to be traced"


@contextlib.contextmanager
def restored_on_error(owner: Any) -> Iterator[None]:
    """If the body raises, an object gets back the attributes that it had, and their contents.

    Of several processes, all raise what one of them does.
    """
    before = dict(vars(owner))
    contents = [
        (value, value.copy()) for value in before.values() if isinstance(value, (dict, list, set))
    ]
    try:
        with agreed():
            yield
    except BaseException:
        vars(owner).clear()
        vars(owner).update(before)
        for container, content in contents:
            container.clear()
            put = container.extend if isinstance(container, list) else container.update
            put(content)
        raise


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
