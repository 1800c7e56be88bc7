"""What came out of one model on one side, and what that sums up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.architectures.models import Model
from benchmarks.common.tables import Cell, Column

STAGES = ("create", "build", "prune", "forward", "equal", "backward", "export")
THEIRS, OURS = "torch-pruning", "nss_prune"
SIDES = (THEIRS, OURS)
MESSAGE = 80  # characters of a message that tell causes apart

Rows = list[dict[str, Cell]]

TOTALS = (
    Column("side", "side"),
    Column("models", "models", 0),
    Column("ok", "ok", 0),
    Column("refused", "refused", 0),
    Column("hang", "hang", 0),
    *(Column(stage, f"at {stage}", 0) for stage in STAGES[1:]),
    Column("changed", "not intact", 0),
    Column("missed", "over budget", 0),
    Column("slowest", "allocation, x the passes, at most", 1),
    Column("memory", "MB above the model, at most", 0),
)
CAUSES = (
    Column("cause", "cause"),
    Column("side", "side"),
    Column("status", "status"),
    Column("stage", "stage"),
    Column("models", "models", 0),
)
COSTS = (
    Column("model", "model"),
    Column("samples", "samples", 0),
    Column("size", "px", 0),
    Column("allocation", "allocation, s"),
    Column("passes", "bare passes, s"),
    Column("ratio", "ratio"),
    Column("memory", "MB above the model", 0),
)


@dataclass
class Outcome:
    """How far one side came with one model; what a process prints as JSON.

    Attributes:
        ok: Through all stages.
        stage: The last stage that was begun.
        cause: Type and message of the error, "" where there was none.
        refused: NSSPruner raised one of its own errors.
        hang: The process was ended at the time limit.
        intact: Whether the model was as before after NSSPruner raised; None where it did not.
        budget: "met", "explained" by a note, "missed", or "" where there is none.
        notes: Of the report, and on stages that failed before pruning, too.
        samples, size: Pictures that the allocation saw, and their height.
        allocation: Seconds of the allocation; None where there is none.
        passes: Seconds of bare forward and backward passes over the same pictures.
        memory: Peak resident memory of the allocation above that before it, MB.
    """

    model: str
    side: str
    ok: bool = False
    stage: str = STAGES[0]
    cause: str = ""
    seconds: float = 0.0
    parameters_before: int = 0
    parameters_after: int = 0
    refused: bool = False
    hang: bool = False
    intact: bool | None = None
    budget: str = ""
    notes: list[str] = field(default_factory=list)
    samples: int = 0
    size: int = 0
    allocation: float | None = None
    passes: float | None = None
    memory: float | None = None

    @property
    def ratio(self) -> float | None:
        """The allocation's time in bare passes."""
        return self.allocation / self.passes if self.allocation and self.passes else None

    @property
    def status(self) -> str:
        """ok, excluded, hang, refused or failed."""
        if self.ok:
            return "ok"
        if self.stage == "create":
            return "excluded"
        return "hang" if self.hang else "refused" if self.refused else "failed"

    def __str__(self) -> str:
        if self.ok:
            kept = self.parameters_after / self.parameters_before
            slow = "" if self.ratio is None else f", {self.ratio:.1f} x, {self.memory or 0:.0f} MB"
            return f"ok ({self.seconds:.1f} s, {kept:.1%}{slow})".replace("%", " %")
        if self.status == "hang":
            return f"hang ({self.seconds:g} s)"
        return f"{self.status} at {self.stage} ({self.seconds:.1f} s): {brief(self.cause)}"


def brief(cause: str) -> str:
    """The type of an error and the beginning of its message, on one line."""
    kind, colon, message = " ".join(cause.split()).partition(": ")
    return f"{kind}{colon}{message[:MESSAGE]}"


def excluded(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Models that do not run before pruning -> why; they count on neither side."""
    return {o.model: brief(o.cause) for o in outcomes if o.status == "excluded"}


def counted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    out = excluded(outcomes)
    return [outcome for outcome in outcomes if outcome.model not in out]


def totals(outcomes: Sequence[Outcome], side: str) -> dict[str, Cell]:
    """The row of one side: models by status, the failed ones by stage."""
    ours = [outcome for outcome in counted(outcomes) if outcome.side == side]
    status = Counter(outcome.status for outcome in ours)
    failed = Counter(outcome.stage for outcome in ours if outcome.status == "failed")
    return {
        "side": side,
        "models": len(ours),
        "ok": status["ok"],
        "refused": status["refused"],
        "hang": status["hang"],
        **{stage: failed[stage] for stage in STAGES[1:]},
        "changed": sum(outcome.intact is False for outcome in ours),
        "missed": sum(outcome.budget == "missed" for outcome in ours),
        "slowest": max((o.ratio for o in ours if o.ratio is not None), default=None),
        "memory": max((o.memory for o in ours if o.memory is not None), default=None),
    }


def costs(outcomes: Sequence[Outcome]) -> Rows:
    """What each allocation cost, the slowest in bare passes first."""
    known = [outcome for outcome in outcomes if outcome.ratio is not None]
    return [
        {
            "model": outcome.model,
            "samples": outcome.samples,
            "size": outcome.size,
            "allocation": outcome.allocation,
            "passes": outcome.passes,
            "ratio": outcome.ratio,
            "memory": outcome.memory,
        }
        for outcome in sorted(known, key=lambda outcome: -(outcome.ratio or 0))
    ]


def causes(outcomes: Sequence[Outcome]) -> Rows:
    """A row for each cause of a side, the most frequent first."""
    found = Counter(
        (outcome.side, outcome.status, outcome.stage, brief(outcome.cause))
        for outcome in counted(outcomes)
        if not outcome.ok
    )
    return [
        {"side": side, "status": status, "stage": stage, "models": models, "cause": cause}
        for (side, status, stage, cause), models in found.most_common()
    ]


def lost(outcomes: Sequence[Outcome]) -> list[str]:
    """Families that torch-pruning gets through and we do not."""
    ok = {(outcome.model, outcome.side): outcome.ok for outcome in counted(outcomes)}
    models = [Model(*name.split(":")) for name, side in ok if side == THEIRS and ok[name, side]]
    return [
        f"{model.source} {model.family} ({model.name})"
        for model in models
        if not ok.get((str(model), OURS), True)
    ]
