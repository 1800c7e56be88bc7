"""Speed and memory, both sides in one run: ratios with their spread.

    python benchmarks/speed.py                         all parts
    python benchmarks/speed.py --parts selection       one part
    python benchmarks/speed.py --parts profile --models vgg16 --repeats 5

selection   the slices of every theta from given activations, against Algorithm 1 with an interval
            of 1 written plainly (it adds one neuron after the other and compares the landscapes);
            both give the same sets, which is checked
profile     a whole profile (avg + var + ens + taylor, ten categories) against the bare forward and
            backward passes over the same batches
allocation  NSSPruner's constructor and slice for a budget with data, folding and all, against a
            profile by the default metric of the same batches
deeplift    the DeepLIFT contributions of all layers against captum's LayerDeepLift, layer by layer,
            and against the bare passes
memory      peak memory of a profile of ResNet-50 at 32 px beyond the model, by samples and by
            categories; each in a process of its own
unstructured one global LAMP step against LAMP's definition written plainly and against
            torch.nn.utils.prune.global_unstructured: time and peak memory
planning    NSSPruner's constructor and step by magnitudes, without data, against torch-pruning's
            pruner, in seconds of the processor
latency     a forward pass of the model against that of the model at half of its MACs, and at half
            of its seconds as predicted
freezing    training steps where half of the neurons are frozen, against those of the whole model
readaptation where it is named, with `--data DIR`: steps of RQ3 where the critical neurons train,
            against those of the whole model, in seconds of the processor

Times are of single runs in turn (A B A B ...); a ratio is given as median (minimum .. maximum).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
import torchvision
from captum.attr import LayerDeepLift
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import models, results, tables
from benchmarks.common.options import run
from benchmarks.common.tables import Column
from benchmarks.common.timing import (
    COLUMNS,
    Rows,
    in_turn,
    printed_by,
    ratio_row,
    resident_peak,
    show,
)
from benchmarks.timings.freezing import freezing
from benchmarks.timings.pruner import LATENCY_COLUMNS, latency, planning
from benchmarks.timings.readaptation import readaptation
from benchmarks.timings.unstructured import COLUMNS_WITH_MEMORY, lamp_steps
from nss_prune import NSSPruner, Slice, profile
from nss_prune.core.models import evaluation
from nss_prune.errors import ArgumentError, NSSPruneError
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.tracing import trace
from nss_prune.profiling.contributions.deeplift import (
    DeepLift,
    difference,
    target_scores,
    with_reference,
)
from nss_prune.profiling.contributions.rescale import RescaleRule
from nss_prune.profiling.run import profile_neurons
from nss_prune.profiling.similarity import (
    Landscape,
    LandscapeSums,
    entry_thresholds,
    ranked,
    similarity_curve,
)
from nss_prune.statistics.capture import Reading, Watcher

MEMORY_COLUMNS = (
    Column("what", "what"),
    Column("megabytes", "MB beyond the model", 0),
    Column("seconds", "s", 1),
)
OTHER_COLUMNS = {"memory": MEMORY_COLUMNS, "unstructured": COLUMNS_WITH_MEMORY,
                 "latency": LATENCY_COLUMNS}  # fmt: skip
PARTS = ("selection", "profile", "allocation", "deeplift", "memory", "unstructured", "planning",
         "latency", "freezing")  # fmt: skip
SELECTION = ((1000, 256), (1000, 512), (5000, 512))
SELECTION_TARGETS = {(1000, 512): ">= 100", (5000, 512): ">= 500"}
THETAS = tuple(round(0.90 + 0.01 * i, 2) for i in range(10))
MEMORY_SAMPLES = (80, 320, 1280)
MEMORY_CATEGORIES = (1, 10, 100, 1000)


def plain_similarities(activations: Tensor, order: Tensor) -> Tensor:
    """Algorithm 1 with i = 1: the similarity after each neuron, ``[neurons]``.

    activations: ``[samples, neurons]``.   order: neurons from the best on, ``[neurons]``.
    """
    centred = activations - activations.mean(0)
    whole = centred @ centred.T
    whole_norm = whole.norm()
    subset = torch.zeros_like(whole)
    similarities = []
    for neuron in order:
        column = centred[:, neuron]
        subset += torch.outer(column, column)
        similarities.append((subset * whole).sum() / (subset.norm() * whole_norm))
    return torch.stack(similarities)


def ours_thresholds(activations: Tensor, order: Tensor) -> Tensor:
    """The entry threshold of every neuron: the sets of every theta."""
    landscape = Landscape()
    sums = LandscapeSums.zeros(activations.shape[1])
    sums.add(landscape, [landscape.observations(activations[:, :, None])])
    return entry_thresholds(similarity_curve(sums.kernel(landscape), order), order)


def selection(repeats: int) -> Rows:
    """Part (a)."""
    rows = []
    for samples, neurons in SELECTION:
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(samples, 64, generator=generator, dtype=torch.float64)
        weights = torch.randn(64, neurons, generator=generator, dtype=torch.float64)
        activations = (mixed @ weights).relu()
        order = ranked(torch.rand(neurons, generator=generator))
        ours_thresholds(activations, order)  # warm: the other side is too slow for that
        check_same_sets(
            plain_similarities(activations, order), ours_thresholds(activations, order), order
        )
        ours, other = in_turn(
            functools.partial(ours_thresholds, activations, order),
            functools.partial(plain_similarities, activations, order),
            repeats,
            warm=False,
        )
        target = SELECTION_TARGETS.get((samples, neurons), "")
        what = f"selection, {samples} samples x {neurons} neurons"
        rows.append(ratio_row(what, ours, other, target, faster=True))
        show(rows[-1])
    return rows


def check_same_sets(plain: Tensor, entry: Tensor, order: Tensor) -> None:
    """Raise unless Algorithm 1's sets are those of the entry thresholds, for every theta."""
    for theta in THETAS:
        reached = (plain >= theta).nonzero().flatten()
        count = int(reached[0]) + 1 if len(reached) else len(order)
        if set(order[:count].tolist()) != set((entry < theta).nonzero().flatten().tolist()):
            raise NSSPruneError(f"the sets differ at theta {theta}")


def vgg16() -> tuple[nn.Module, Tensor]:
    return models.vgg16_bn(), torch.randn(64, 3, 32, 32)


def resnet50() -> tuple[nn.Module, Tensor]:
    return torchvision.models.resnet50(), torch.randn(16, 3, 224, 224)


def efficientnet_lite0() -> tuple[nn.Module, Tensor]:
    return timm.create_model("efficientnet_lite0"), torch.randn(16, 3, 224, 224)


MODELS = {"vgg16": vgg16, "resnet50": resnet50, "efficientnet_lite0": efficientnet_lite0}


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor, NeuronMap]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    graph, output_nodes = trace(model, inputs[:1])
    labels = torch.arange(len(inputs)) % 10
    return model, inputs, labels, find_neurons(model, graph, output_nodes)


def bare_passes(model: nn.Module, inputs: Tensor, labels: Tensor, batches: int) -> None:
    """Forward and backward over the same batches, as in training without the optimiser."""
    for _ in range(batches):
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()


def whole_profile(names: Iterable[str], repeats: int, batches: int = 8) -> Rows:
    """Part (b)."""
    rows = []
    for name in names:
        model, inputs, labels, neurons = prepared(name)
        ours, bare = in_turn(
            functools.partial(
                profile_neurons,
                model,
                [(inputs, labels)] * batches,
                neurons,
                metrics=("avg", "var", "ens", "taylor"),
                progress=False,
            ),
            functools.partial(bare_passes, model, inputs, labels, batches),
            repeats,
        )
        rows.append(ratio_row(f"profile, {name}", ours, bare, "<= 1.25", faster=False))
        show(rows[-1])
    return rows


def allocation(names: Iterable[str], repeats: int, batches: int = 16) -> Rows:
    """Part (h)."""
    rows = []
    for name in names:
        model, inputs, labels, neurons = prepared(name)
        data = [(inputs, labels)] * batches
        times = in_turn(
            functools.partial(allocated, model, inputs[:1], data),
            functools.partial(profile_neurons, model, data, neurons, progress=False),
            repeats,
        )
        rows.append(ratio_row(f"allocation, {name}", *times, "<= 5", faster=False))
        show(rows[-1])
    return rows


def allocated(model: nn.Module, example: Tensor, data: list[tuple[Tensor, Tensor]]) -> Slice:
    return NSSPruner(model, example, macs_budget=0.5, round_to=1, data=data, progress=False).slice


def deeplift(names: Iterable[str], repeats: int) -> Rows:
    """Part (c)."""
    rows = []
    for name in names:
        model, inputs, labels, neurons = prepared(name)
        consumers = [
            model.get_submodule(member.name)
            for group in neurons.groups
            for member in group.consumers[:1]
        ]
        ours = functools.partial(all_layers, model, neurons, inputs, labels)
        bare = functools.partial(bare_passes, model, inputs, labels, 1)
        times = in_turn(ours, bare, repeats)
        rows.append(ratio_row(f"deeplift, {name}, against bare", *times, "<= 3", faster=False))
        show(rows[-1])
        captum = functools.partial(captum_layers, model, consumers, inputs, labels)
        times = in_turn(ours, captum, 1)
        what = f"deeplift, {name}, {len(consumers)} layers, against captum"
        target = f">= {0.7 * len(consumers):.1f}"
        rows.append(ratio_row(what, *times, target, faster=True))
        show(rows[-1])
    return rows


def all_layers(
    model: nn.Module, neurons: NeuronMap, inputs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """DeepLIFT of the neurons of every layer, ``[samples, neurons]``, in one pass."""
    samples = len(inputs)
    metric = DeepLift()
    found: dict[str, Tensor] = {}

    def gather(reading: Reading, gradient: Tensor) -> None:
        value = metric.gather(difference(reading.activation, samples), gradient[:samples])[0]
        found[reading.group] = found.get(reading.group, 0) + value

    watcher = Watcher(neurons.groups, samples + 1, gather)
    with evaluation(model), watcher.attached(model), RescaleRule(samples, 1):
        outputs = model(with_reference(inputs, "zeros", 1))
        target_scores(outputs, labels, samples).backward()
    return found


def captum_layers(
    model: nn.Module, consumers: Sequence[nn.Module], inputs: Tensor, labels: Tensor
) -> None:
    """LayerDeepLift of what every consumer reads, one call a layer."""
    for consumer in consumers:
        LayerDeepLift(model, consumer).attribute(
            inputs, target=labels, attribute_to_layer_input=True
        )


class Pictures(Dataset[tuple[Tensor, int]]):
    """Random pictures made when asked for, so that the data itself takes no memory."""

    def __init__(self, samples: int, categories: int) -> None:
        self.targets = [index % categories for index in range(samples)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 32, generator=generator), self.targets[index]


def peak_of(samples: int, categories: int) -> None:
    """Print the peak memory beyond the model, MB, and the seconds of one profile."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    before = resident_peak()
    start = time.perf_counter()
    loader = DataLoader(Pictures(samples, categories), batch_size=32)
    profile(model, loader, torch.randn(1, 3, 32, 32), progress=False)
    print(resident_peak() - before, time.perf_counter() - start)


def memory() -> Rows:
    """Part (d)."""
    rows: Rows = []
    sizes = [(samples, 10) for samples in MEMORY_SAMPLES]
    sizes += [(8 * categories, categories) for categories in MEMORY_CATEGORIES]
    for samples, categories in sizes:
        megabytes, seconds = printed_by("benchmarks.speed", "--peak-of", f"{samples},{categories}")
        what = f"memory, ResNet-50, {samples} samples in {categories} categories"
        rows.append({"what": what, "megabytes": megabytes, "seconds": seconds})
        show(rows[-1])
    return rows


def report(part: str, rows: Rows, output: Path) -> None:
    columns = OTHER_COLUMNS.get(part, COLUMNS)
    path = output / f"speed-{part}.json"
    results.write(path, f"Speed: {part}", columns, rows, seeds=[0])
    print(f"\n{tables.text_table(columns, rows)}\n\n{path} written\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default=",".join(PARTS),
        help="comma list (default: %(default)s)")  # fmt: skip
    add("--models", default=",".join(MODELS), help="comma list (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="pairs of runs (default: 5)")
    add("--output", type=Path, default=results.OUTPUT, metavar="DIR",
        help="folder of the result files (default: %(default)s)")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="folder of the data sets, for readaptation")
    add("--peak-of", help=argparse.SUPPRESS)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    if asked.peak_of:
        samples, categories = map(int, asked.peak_of.split(","))
        peak_of(samples, categories)
        return
    names = asked.models.split(",")
    parts: dict[str, Callable[[], Rows]] = {
        "selection": lambda: selection(asked.repeats),
        "profile": lambda: whole_profile(names, asked.repeats),
        "allocation": lambda: allocation(names, asked.repeats),
        "deeplift": lambda: deeplift(names, asked.repeats),
        "memory": memory,
        "unstructured": lambda: lamp_steps(asked.repeats),
        "planning": lambda: planning(asked.repeats),
        "latency": lambda: latency(asked.repeats),
        "freezing": lambda: freezing(asked.repeats),
        "readaptation": lambda: readaptation(asked.repeats, asked.data),
    }
    for part in asked.parts.split(","):
        if part not in parts:
            raise ArgumentError(f"There is no part {part!r}; there are: {', '.join(parts)}.")
    for part in asked.parts.split(","):
        report(part, parts[part](), asked.output)


if __name__ == "__main__":
    run(main)
