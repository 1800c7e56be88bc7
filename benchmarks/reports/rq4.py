"""Tables and plot of RQ4, incremental development."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.record import Tables
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.learners.methods import METHODS
from benchmarks.published import adaptation as targets

SUMMARY_COLUMNS = (
    Column("claim", "what was wanted"),
    Column("found", "found"),
    Column("wanted", "wanted"),
    Column("ahead", "ahead by"),
    Column("held", "held"),
)


@dataclass(frozen=True)
class Outcome:
    """What a method made of a model. Accuracies are shares, 0 to 1.

    learned: accuracy on each task when it had just been learned.   final: in the end.
    unknown: the mean in the end where the task of a sample is not given.
    storage: bytes for task A.   seconds: of learning all tasks after A.
    """

    method: str
    seed: int
    learned: tuple[float, ...]
    final: tuple[float, ...]
    unknown: float
    storage: int
    seconds: float

    @property
    def average(self) -> float:
        return statistics.fmean(self.final)

    @property
    def forgetting(self) -> float:
        pairs = zip(self.learned[:-1], self.final[:-1], strict=True)
        return statistics.fmean(before - after for before, after in pairs)


def columns(count: int) -> list[Column]:
    letters = [chr(ord("A") + i) for i in range(count)]
    return [
        Column("method", "Method"),
        *[Column(f"task_{letter}", f"task {letter} %") for letter in letters],
        Column("average", "average %"),
        Column("forgetting", "forgetting, points"),
        Column("unknown", "task not given %"),
        Column("storage", "bytes for A", 0),
        Column("seconds", "s", 1),
        Column("paper_A", "paper A %"),
        Column("paper_B", "paper B %"),
        Column("paper_average", "paper average %"),
    ]


def table_rows(setting: str, outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """A row for each method, over seeds."""
    rows = []
    for method, (title, _) in METHODS.items():
        same = [outcome for outcome in outcomes if outcome.method == method]
        if not same:
            continue
        count = len(same[0].final)
        row: dict[str, Cell] = {"method": title}
        for position in range(count):
            values = [100 * outcome.final[position] for outcome in same]
            row[f"task_{chr(ord('A') + position)}"] = spread(values)
        row |= {
            "average": spread([100 * outcome.average for outcome in same]),
            "forgetting": spread([100 * outcome.forgetting for outcome in same]),
            "unknown": spread([100 * outcome.unknown for outcome in same]),
            "storage": spread([outcome.storage for outcome in same]),
            "seconds": spread([outcome.seconds for outcome in same]),
        }
        paper = targets.TABLE_6.get((setting, method)) if count == 2 else None
        if paper is not None:
            row |= {
                "paper_A": paper.task_a,
                "paper_B": paper.task_b,
                "paper_average": paper.average,
            }
        rows.append(row)
    return rows


# Points that task A may lose.
FORGETTING = {"neusemslice": 0.5, "neusemslice-replay-10": 0.1, "neusemslice-lamp": 0.5}
# Of which rivals a method is to be ahead, and in what of theirs: see ahead().
RIVALS = (
    ("neusemslice-lamp", "packnet", "average"),
    ("neusemslice-lamp-long", "packnet-long", "average"),
    ("neusemslice-lamp-long", "replay-100", "average"),
    ("neusemslice-lamp", "replay-100", "unknown"),
)


def summary(setting: str, outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """What is to be shown of NeuSemSlice with two tasks, as far as its methods were run."""
    claims = [at_most(outcomes, method, points) for method, points in FORGETTING.items()]
    if paper := targets.TABLE_6.get((setting, "neusemslice")):
        claims.append(at_least(outcomes, "neusemslice", paper.average))
    claims += [ahead(outcomes, method, rival, of) for method, rival, of in RIVALS]
    return [found for found in claims if found]


def at_most(outcomes: Sequence[Outcome], method: str, points: float) -> dict[str, Cell]:
    """Whether task A loses at most so many points; empty where the method was not run."""
    found = [*by_seed(outcomes, method, "forgetting").values()]
    return claim(f"{METHODS[method][0]}: points that task A loses, at most", found, points, -1)


def at_least(outcomes: Sequence[Outcome], method: str, average: float) -> dict[str, Cell]:
    """Whether the average reaches the paper's; empty where the method was not run."""
    found = [*by_seed(outcomes, method, "average").values()]
    return claim(f"{METHODS[method][0]}: average %, at least the paper's", found, average)


def ahead(outcomes: Sequence[Outcome], method: str, rival: str, of: str) -> dict[str, Cell]:
    """Whether the average is at least a rival's, on the models that both have.

    of: "average", or "unknown" where the rival is not given the task, as in the paper.
    """
    title, other = METHODS[method][0], METHODS[rival][0]
    mine, theirs = by_seed(outcomes, method, "average"), by_seed(outcomes, rival, of)
    seeds = sorted(mine.keys() & theirs.keys())
    note = ", which is not given the task" if of == "unknown" else ""
    text = f"{title}: average %, at least that of {other}{note}"
    return claim(text, [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def by_seed(outcomes: Sequence[Outcome], method: str, field: str) -> dict[int, float]:
    """Seed -> what a method's outcome has for a field, in percent."""
    return {o.seed: 100 * getattr(o, field) for o in outcomes if o.method == method}


def claim(
    text: str, found: Sequence[float], wanted: float | Sequence[float], sign: int = 1
) -> dict[str, Cell]:
    """A row of the summary; empty without anything found.

    sign: -1 where less is better.
    """
    if not found:
        return {}
    limits = [wanted] * len(found) if isinstance(wanted, float) else list(wanted)
    lead = spread([sign * (mine - limit) for mine, limit in zip(found, limits, strict=True)])
    shown = wanted if isinstance(wanted, float) else spread(limits)
    held = "yes" if lead["mean"] >= 0 else "no"
    return {"claim": text, "found": spread(found), "wanted": shown, "ahead": lead, "held": held}


def plot(title: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """A group of bars for each method: the accuracy on each task, with the deviation of seeds."""
    methods = [method for method in METHODS if any(o.method == method for o in outcomes)]
    count = len(outcomes[0].final)
    figure, axes = pyplot.subplots(figsize=(1 + 1.1 * len(methods), 4), layout="constrained")
    width = 0.8 / count
    for position in range(count):
        cells = [
            spread([100 * o.final[position] for o in outcomes if o.method == method])
            for method in methods
        ]
        axes.bar(
            [i + (position - (count - 1) / 2) * width for i in range(len(methods))],
            [cell["mean"] for cell in cells], width, yerr=[cell["std"] for cell in cells],
            label=f"task {chr(ord('A') + position)}",
        )  # fmt: skip
    names = [METHODS[method][0].replace(" + ", " +\n") for method in methods]
    axes.set_xticks(range(len(methods)), names, rotation=30, ha="right")
    axes.set(ylabel="test accuracy, %", title=title)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


def identity(outcome: Outcome) -> tuple[int, str]:
    """What tells an outcome from the others of its setting."""
    return outcome.seed, outcome.method


def tables(setting: str, count: int, outcomes: Sequence[Outcome]) -> Tables:
    """All that a result file shows of a setting with ``count`` tasks."""
    claims = summary(setting, outcomes) if count == 2 else []
    return Tables(columns(count), table_rows(setting, outcomes), {"summary": claims})
