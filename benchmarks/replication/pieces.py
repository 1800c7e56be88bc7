"""The pieces that the paper's questions and settings are measured in, and which are missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import results
from benchmarks.published import adaptation, slicing

QUESTIONS = ("rq1", "rq2", "rq3", "rq4")
LEARNERS = tuple(dict.fromkeys(method for _, method in adaptation.TABLE_6))


@dataclass(frozen=True)
class Piece:
    """What is measured, and written, at once: a question of a setting, of RQ4 one method.

    numbers: groups of numbers that the paper prints of it.
    """

    question: str
    setting: str
    method: str | None = None
    numbers: int = field(default=1, compare=False)

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.question, self.setting, self.method)))

    @property
    def model(self) -> str:
        """The model that it needs: RQ4's first task has one of its own."""
        return f"{self.setting}-1of2" if self.question == "rq4" else self.setting

    def path(self, folder: Path) -> Path:
        return folder / f"{self.question}-{self.setting}.json"


def pieces(setting: str) -> Iterator[Piece]:
    """All of a setting; one that the paper does not have counts a number each."""
    yield Piece("rq1", setting, numbers=max(1, len(slicing.FIGURE_5.get(setting, ()))))
    yield Piece("rq2", setting, numbers=2 * len(slicing.METHODS))
    yield Piece("rq3", setting, numbers=2 * len(adaptation.TABLE_5_TPR))
    for method in LEARNERS:
        yield Piece("rq4", setting, method)


def missing(
    settings: Sequence[str], output: Path, committed: Path = results.FOLDER, *, resume: bool = True
) -> list[Piece]:
    """The pieces that no result file has.

    A question and setting with a file among the ``committed`` ones is done, whatever it covers.

    resume: whether those in ``output`` count.
    """
    found = []
    for piece in (piece for setting in settings for piece in pieces(setting)):
        done = piece.path(committed).exists() or (resume and piece_exists(piece, output))
        if not done:
            found.append(piece)
    return found


def piece_exists(piece: Piece, folder: Path) -> bool:
    """Whether a result file has the piece."""
    path = piece.path(folder)
    if not path.exists():
        return False
    if piece.method is None:
        return True
    return any(one["method"] == piece.method for one in results.read(path)["outcomes"])
