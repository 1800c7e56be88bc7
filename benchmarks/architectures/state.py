"""All models on both sides: a process for each, and the record of what came out."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.architectures.models import Model, choose
from benchmarks.architectures.outcomes import (
    SIDES,
    STAGES,
    TOTALS,
    Outcome,
    causes,
    costs,
    excluded,
    lost,
    totals,
)
from benchmarks.architectures.trial import ANNOUNCED
from benchmarks.common import provenance, results
from benchmarks.common.record import Record, Tables

SCRIPT = Path(__file__).parents[1] / "coverage.py"


def outcome_of(words: Sequence[str], model: Model, side: str, limit: float) -> Outcome:
    """What a process printed; that it hung, or how it ended without a word."""
    outcome = Outcome(str(model), side, seconds=limit)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        stage = last_stage((late.stderr or b"").decode(errors="replace"))
        return replace(outcome, hang=True, stage=stage, cause=f"no result in {limit:g} s")
    printed = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and printed.startswith("{"):
        return Outcome(**json.loads(printed))
    said = done.stderr.strip().rpartition("\n")[2]
    cause = f"exit code {done.returncode}: {said}"
    return replace(outcome, stage=last_stage(done.stderr), cause=cause)


def last_stage(stderr: str) -> str:
    """The stage that a process announced last."""
    found = re.findall(rf"^{ANNOUNCED}(\w+)$", stderr, re.MULTILINE)
    return str(found[-1]) if found else STAGES[0]


def identity(outcome: Outcome) -> tuple[str, str]:
    """What tells an outcome from others."""
    return outcome.model, outcome.side


@dataclass
class State:
    """The models chosen, and the record of the outcomes so far.

    path: the result file.   choice: by source, the version and family -> its smallest model.
    options: how every allocation is measured.
    """

    path: Path
    options: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, options: dict[str, Any]) -> State:
        """The state in a file; without outcomes where they are of other versions.

        Raises:
            ArgumentError: They were measured in another way.
        """
        state = cls(path, options)
        if not path.exists():
            return state
        content = results.read(path)
        state.choice = content["choice"]
        if content["made_by"]["versions"] != provenance.provenance([], "cpu")["versions"]:
            print(f"{path} is of other versions: everything is measured again", flush=True)
            return state
        state.record.resume()
        return state

    @cached_property
    def record(self) -> Record[Outcome]:
        """The outcomes, and their file."""
        return Record(
            self.path, "Coverage: architectures pruned", Outcome, identity, self._tables,
            self.options,
        )  # fmt: skip

    @property
    def outcomes(self) -> dict[tuple[str, str], Outcome]:
        """Model and side -> outcome."""
        return {identity(outcome): outcome for outcome in self.record.entries}

    def has(self, model: Model, sides: Iterable[str]) -> bool:
        """Whether there is an outcome of a model on each of these sides."""
        return all((str(model), side) in self.record for side in sides)

    def forget(self, models: Iterable[Model], sides: Sequence[str]) -> None:
        """Drop the outcomes of some models on some sides."""
        unwanted = {(str(model), side) for model in models for side in sides}
        self.record.forget(lambda outcome: identity(outcome) in unwanted)

    def models(self, sources: Sequence[str]) -> list[Model]:
        """The smallest model of every family; chosen and saved where that is not yet done."""
        for source in sources:
            self.choice[source] = choose(source, self.choice.get(source, {}))
            self.record.save()
        return [
            Model(source, name)
            for source in sources
            for name in self.choice[source]["models"].values()
            if name is not None
        ]

    def not_created(self) -> list[str]:
        """Families of which no model can be created."""
        return [
            f"{source} {family}"
            for source, chosen in self.choice.items()
            for family, name in chosen["models"].items()
            if name is None
        ]

    def _tables(self, outcomes: Sequence[Outcome]) -> Tables:
        more = {
            "choice": self.choice,
            "costs": costs(outcomes),
            "causes": causes(outcomes),
            "lost": lost(outcomes),
            "excluded": excluded(outcomes),
            "not_created": self.not_created(),
        }
        return Tables(TOTALS, [totals(outcomes, side) for side in SIDES], more)


def measure(
    state: State,
    models: Sequence[Model],
    sides: Sequence[str],
    run: Callable[[Model, str], Outcome],
    jobs: int = 1,
) -> None:
    """Try what has no outcome yet, `jobs` at a time; the state is saved after each."""
    missing = [(model, side) for model in models for side in sides if not state.has(model, [side])]
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(run, model, side): model for model, side in missing}
        try:
            for future in as_completed(started):
                state.record.add([future.result()])
                state.record.save()
                whole = [model for model in models if state.has(model, sides)]
                if started[future] in whole:
                    count = f"[{len(whole)}/{len(models)}]"
                    print(count, line(state, started[future]), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def line(state: State, model: Model) -> str:
    """What is known of a model, on one line."""
    found = [(side, state.outcomes.get((str(model), side))) for side in SIDES]
    shown = [f"{side}: {outcome}" for side, outcome in found if outcome]
    return f"{model.family} {model.name}  {'   '.join(shown)}"
