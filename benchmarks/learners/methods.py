"""The methods of RQ4 by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.learners.course import Course, Subtask
from benchmarks.learners.plain import Learner, Original, RedundantLayers
from benchmarks.learners.rivals import AttendedNeurons, PackedWeights
from benchmarks.learners.semantic import NonCriticalNeurons, SettledNeurons

METHODS: dict[str, tuple[str, Callable[[nn.Module, Subtask, Course, int], Learner]]] = {
    "original": ("Original", lambda m, a, c, n: Original(m, a, c)),
    "retrain": ("Retrain", lambda m, a, c, n: Learner(m, a, c)),
    "replay-5": ("Replay 5 %", lambda m, a, c, n: Learner(m, a, c, 0.05)),
    "replay-10": ("Replay 10 %", lambda m, a, c, n: Learner(m, a, c, 0.1)),
    "replay-100": ("Replay 100 %", lambda m, a, c, n: Learner(m, a, c, 1.0)),
    "deeparc": ("DeepArc", lambda m, a, c, n: RedundantLayers(m, a, c)),
    "packnet": ("PackNet", lambda m, a, c, n: PackedWeights(m, a, c, n)),
    "packnet-long": ("PackNet, long", lambda m, a, c, n: PackedWeights(m, a, c, n, again=1.0)),
    "hat": ("HAT", lambda m, a, c, n: AttendedNeurons(m, a, c)),
    "neusemslice": ("NeuSemSlice", lambda m, a, c, n: NonCriticalNeurons(m, a, c)),
    "neusemslice-replay-10": (
        "NeuSemSlice + Replay 10 %",
        lambda m, a, c, n: NonCriticalNeurons(m, a, c, 0.1),
    ),
    "neusemslice-settled": (
        "NeuSemSlice, settled",
        lambda m, a, c, n: SettledNeurons(m, a, c, n),
    ),
    "neusemslice-settled-long": (
        "NeuSemSlice, settled long",
        lambda m, a, c, n: SettledNeurons(m, a, c, n, again=1.0),
    ),
    "neusemslice-lamp": (
        "NeuSemSlice + LAMP",
        lambda m, a, c, n: SettledNeurons(m, a, c, n, thin=True),
    ),
    "neusemslice-lamp-long": (
        "NeuSemSlice + LAMP, long",
        lambda m, a, c, n: SettledNeurons(m, a, c, n, again=1.0, thin=True),
    ),
}
