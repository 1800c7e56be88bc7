"""Tables and plot of RQ3, re-adaptation."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.record import Tables
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.published import adaptation as targets

ATTACKS = {"fgsm": "FGSM", "pgd": "PGD"}
METHODS = {
    "full": "full training",
    "deeparc": "DeepArc",
    "neusemslice": "NeuSemSlice",
    "neusemslice-deeparc": "NeuSemSlice + DeepArc",
    "sensitive": "neurons by gradient",
}
BEFORE = "before"  # the model as it was

COLUMNS = (
    Column("method", "Method"),
    Column("TPR", "TPR %"),
    Column("RA", "RA %"),
    Column("RAA", "RAA %"),
    Column("clean", "clean %"),
    Column("time", "time %", 1),
    Column("paired", "paired, %"),
    Column("seconds", "s"),
    Column("prepared", "prepared s"),
    Column("paper_TPR", "paper TPR %"),
    Column("paper_RA", "paper RA %"),
    Column("paper_RAA", "paper RAA %"),
)
SUMMARY_COLUMNS = (
    Column("claim", "NeuSemSlice, mean"),
    Column("found", "found"),
    Column("wanted", "wanted"),
    Column("held", "held"),
)


@dataclass(frozen=True)
class Outcome:
    """A method on one model. Shares are from 0 to 1; `seconds` is of training.

    time: seconds relative to those of full training; None without it.
    ratios: that of each repetition, beside the full training of the same turn.
    theta: of the slice.
    redundant: DeepArc's layers that do not train.   prepared: seconds for slice and layers.
    """

    setting: str
    seed: int
    attack: str
    method: str
    tpr: float
    ra: float
    raa: float
    clean: float
    seconds: float = 0.0
    time: float | None = None
    ratios: tuple[float, ...] = ()
    prepared: float = 0.0
    theta: float | None = None
    redundant: tuple[str, ...] = ()


def only(
    outcomes: Iterable[Outcome], method: str | None = None, attack: str | None = None
) -> list[Outcome]:
    """The outcomes of a method and an attack; None is any."""
    return [o for o in outcomes if method in (None, o.method) and attack in (None, o.attack)]


def values(outcomes: Sequence[Outcome], field: str) -> dict[str, list[float]]:
    """Setting -> what its outcomes have for a field, those without it left out."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        value = getattr(outcome, field)
        if value is not None:
            found.setdefault(outcome.setting, []).append(value)
    return found


def average(outcomes: Sequence[Outcome], field: str) -> float:
    """The mean over settings of the mean over their outcomes, in percent."""
    return 100 * statistics.fmean(map(statistics.fmean, values(outcomes, field).values()))


def table_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """A row for each attack and method, beside the paper's.

    A cell is the spread over the seeds of one setting, or the mean over several settings.
    """
    return [
        row(attack, method, same)
        for attack in ATTACKS
        for method in (BEFORE, *METHODS)
        if (same := only(outcomes, method, attack))
    ]


def row(attack: str, method: str, outcomes: Sequence[Outcome]) -> dict[str, Cell]:
    """The row of one attack and method."""

    def cell(field: str, scale: float = 100) -> Cell:
        known = values(outcomes, field)
        if len(known) > 1:
            return scale * statistics.fmean(map(statistics.fmean, known.values()))
        return next((spread([scale * value for value in same]) for same in known.values()), None)

    found: dict[str, Cell] = {
        "method": f"{ATTACKS[attack]}: {METHODS.get(method, method)}",
        "RA": cell("ra"), "RAA": cell("raa"), "clean": cell("clean"),
    }  # fmt: skip
    if method != BEFORE:
        found |= {"TPR": cell("tpr"), "time": cell("time")}
        found["paired"] = paired(outcomes)
        found |= {"seconds": cell("seconds", 1), "prepared": cell("prepared", 1)}
    return found | paper_cells(attack, method, {outcome.setting for outcome in outcomes})


def paired(outcomes: Iterable[Outcome]) -> str | None:
    """Median and quartiles of all repetitions' times relative to full training, in percent.

    None with fewer than four.
    """
    ratios = [100 * ratio for outcome in outcomes for ratio in outcome.ratios]
    if len(ratios) < 4:
        return None
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def paper_cells(attack: str, method: str, settings: Collection[str]) -> dict[str, Cell]:
    """The paper's cells of a row: means, over several settings."""
    if method == BEFORE:
        return {"paper_RA": targets.BEFORE[attack]} if len(settings) > 1 else {}
    cells = [targets.TABLE_5.get((setting, attack, method)) for setting in settings]
    known = [cell for cell in cells if cell is not None]
    if len(known) < len(cells):
        return {}
    return {
        f"paper_{key}": statistics.fmean(getattr(cell, key.lower()) for cell in known)
        for key in ("TPR", "RA", "RAA")
    }


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """What is to be shown of NeuSemSlice; nothing without it, only TPR without full training."""
    sliced, full = only(outcomes, "neusemslice"), only(outcomes, "full")
    if not sliced:
        return []
    limit = targets.MEAN_TPR["neusemslice"]
    claims = [claim("TPR %, at most the paper's", average(sliced, "tpr"), limit, at_least=False)]
    sliced = [outcome for outcome in sliced if outcome.time is not None]  # beside full training
    if not sliced:
        return claims
    beside = {(outcome.setting, outcome.seed, outcome.attack) for outcome in sliced}
    full = [o for o in full if (o.setting, o.seed, o.attack) in beside]
    for attack in (*ATTACKS, None):
        mine, theirs = only(sliced, attack=attack), only(full, attack=attack)
        if mine:
            claims += compared(mine, theirs, "mean" if attack is None else ATTACKS[attack])
    time_share = average(sliced, "time")
    return [*claims, claim("time %, at most full training's", time_share, 100.0, at_least=False)]


def compared(
    sliced: Sequence[Outcome], full: Sequence[Outcome], name: str
) -> list[dict[str, Cell]]:
    """The rows of the summary on accuracy, under an attack or in the mean."""
    ra, raa = (average(sliced, field) for field in ("ra", "raa"))
    full_ra, full_raa = (average(full, field) for field in ("ra", "raa"))
    return [
        claim(f"RA %, {name}: at least full training's + 0.5, or 99.5", ra,
              min(full_ra + 0.5, 99.5)),
        claim(f"RAA %, {name}: at least full training's", raa, full_raa),
    ]  # fmt: skip


def claim(text: str, found: float, wanted: float, *, at_least: bool = True) -> dict[str, Cell]:
    """A row of the summary; `wanted` is the least that holds it, or the most."""
    held = found >= wanted if at_least else found <= wanted
    return {"claim": text, "found": found, "wanted": wanted, "held": "yes" if held else "no"}


def plot(setting: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """A panel for each attack: bars of RA, RAA and clean accuracy, with the deviation of seeds."""
    attacks = [attack for attack in ATTACKS if only(outcomes, attack=attack)]
    figure, panels = pyplot.subplots(
        1, len(attacks), figsize=(5.5 * len(attacks), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, attack in zip(panels[0], attacks, strict=True):
        here = only(outcomes, attack=attack)
        methods = [method for method in (BEFORE, *METHODS) if only(here, method)]
        for number, field in enumerate(("ra", "raa", "clean")):
            cells = [
                spread([100 * getattr(outcome, field) for outcome in only(here, method)])
                for method in methods
            ]
            panel.bar(
                [place + 0.27 * (number - 1) for place in range(len(methods))],
                [cell["mean"] for cell in cells], 0.27, yerr=[cell["std"] for cell in cells],
                label=field.upper() if field != "clean" else field,
            )  # fmt: skip
        names = [
            f"{METHODS.get(method, method)}\nTPR {average(only(here, method), 'tpr'):.0f} %"
            for method in methods
        ]
        panel.set_xticks(range(len(methods)), names, rotation=30, ha="right")
        panel.set(title=ATTACKS[attack])
        panel.grid(alpha=0.3, axis="y")
    panels[0][0].set(ylabel="accuracy, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"RQ3, {setting}")
    save_figure(figure, path)


def identity(outcome: Outcome) -> tuple[int, str, str]:
    """What tells an outcome from the others of its setting."""
    return outcome.seed, outcome.attack, outcome.method


def tables(outcomes: Sequence[Outcome]) -> Tables:
    """All that a result file shows."""
    return Tables(COLUMNS, table_rows(outcomes), {"summary": summary(outcomes)})
