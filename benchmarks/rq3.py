"""RQ3, re-adaptation: learn adversarial samples by training a part of the model (Table 5).

    python benchmarks/rq3.py                                           a minute, no download
    python benchmarks/rq3.py --settings mlp-mnist,mlp-fmnist --data DIR --seeds 5

For every setting and seed a model is trained (or taken from the cache). From it each method learns
1,000 new samples x and their adversaries x', L = CE(x) + CE(x'), by the same recipe: the optimiser,
batch size and learning rate that the model was trained with, the latter on a cosine, and
`--readapt-epochs` epochs. The methods differ in what they train:

    full                  everything
    deeparc               the layers that DeepArc does not find redundant, and what is no layer
    neusemslice           the critical neurons
    neusemslice-deeparc   the critical neurons of the layers that are not redundant
    sensitive             the neurons whose entries reduce the loss most a parameter, by their
                          gradients on what is to be learned (`ReadaptTrainer(params_budget=)`), as
                          many as `--tpr` percent of the parameters hold

The new samples are pictures of the check data, which no model was trained with (where it has fewer
than 1,000, all of them). x' is made once, for the model as it was, as the paper's high RA beside a
low RAA suggests. With `--adversaries fresh` it is made at each step, for the model as it is then
(Madry et al. 2018). The columns are the paper's and two more:

    TPR    training parameter ratio: share of the parameters that train
    RA     retrained accuracy: on x', made for the model as it was
    RAA    re-attack accuracy: on 1,000 test pictures that are attacked anew, after the training
    clean  accuracy on the test data as it is
    time   of training, relative to full training (with `--repeats N`, where all methods train N
           times in turn, the median of the N ratios); "paired" has median and quartiles of all
           models' ratios; `prepared` are the seconds spent before it on the slice, on DeepArc's
           layers, or on both (of "sensitive" it is one pass over the samples, which is not timed)

Attacks have the strengths that are usual for the data: epsilon 0.3 for MNIST, Fashion-MNIST and
digits, PGD with 40 steps of 0.01; 8/255 otherwise, PGD with 10 steps of 2/255.

The paper does not say at which theta it sliced. Here theta is the largest of a fixed grid at which
the critical neurons hold at most `--tpr` percent of the parameters: this is read off the profile of
the training data, before anything is trained. TPR is 1 - the compression rate of that slice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.common import results
from benchmarks.common.data import Data, load
from benchmarks.common.options import (
    add_batch,
    add_resume,
    checked_seeds,
    common,
    in_order,
    run,
    usable_device,
)
from benchmarks.common.record import Record
from benchmarks.common.settings import SIMILAR, Setting, chosen
from benchmarks.common.tables import text_table
from benchmarks.common.training import (
    Recipe,
    accuracy,
    fast,
    make_optimiser,
    suitable_threads,
    trained,
)
from benchmarks.learners.readapted import (
    THETAS,
    TPR,
    Adversaries,
    Course,
    Subject,
    Trained,
    attack_of,
    gathered,
    new_samples,
    strength_for,
)
from benchmarks.published import adaptation as targets
from benchmarks.reports.rq3 import (
    ATTACKS,
    BEFORE,
    COLUMNS,
    METHODS,
    SUMMARY_COLUMNS,
    Outcome,
    identity,
    plot,
    summary,
    table_rows,
    tables,
)
from nss_prune.adaptation import (
    ReadaptResult,
    ReadaptTrainer,
    evaluate_attack,
)
from nss_prune.adaptation.attacks import Attack
from nss_prune.errors import ArgumentError

EPOCHS = 30


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """The model gets its values back afterwards."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(kept)


def precision(model: nn.Module) -> torch.dtype | None:
    """That of all training here: see training.fast."""
    with fast(model):
        device = next(model.parameters()).device.type
        return torch.bfloat16 if torch.is_autocast_enabled(device) else None


def readapt(
    model: nn.Module,
    attack: Attack,
    train: Trained,
    course: Course,
    batches: Sequence[tuple[Tensor, Tensor]],
) -> ReadaptResult:
    """Train a part of the model as the course says."""
    what = {"params_budget": train} if isinstance(train, float) else {"train": train}
    trainer = ReadaptTrainer(model, attack=attack, adversaries=course.adversaries, **what)
    return trainer.fit(
        batches, optimizer=partial(make_optimiser, recipe=course.recipe), scheduler="cosine",
        epochs=course.recipe.epochs, amp=precision(model),
    )  # fmt: skip


def run_method(subject: Subject, name: str, method: str) -> Outcome:
    """What a method makes of a model under the attack `name`; the model is left as it was."""
    model, data = subject.model, subject.data
    attack, new = attack_of(name, data), new_samples(data, subject.course.recipe)
    again = list(gathered(data.test).batches(250))
    tpr = seconds = 0.0
    with restored(model), torch.random.fork_rng():
        torch.manual_seed(subject.seed)  # the same adversaries and order for all methods
        if method == BEFORE:
            ra = evaluate_attack(model, new, attack)
        else:
            train = subject.trained_by(method)
            found = readapt(model, attack, train, subject.course, new)
            tpr, ra, seconds = found.tpr, found.ra, found.seconds
        torch.manual_seed(subject.seed)
        raa = evaluate_attack(model, again, attack)
        clean = accuracy(model, data.test)
    return subject.described(
        Outcome(subject.setting, subject.seed, name, method, tpr, ra, raa, clean, seconds)
    )


def warm_up(subject: Subject, name: str) -> None:
    """A short training, so that the first one timed does not pay for what happens once."""
    course = replace(subject.course, recipe=replace(subject.course.recipe, epochs=1))
    batches = new_samples(subject.data, course.recipe)[:1]
    with restored(subject.model), torch.random.fork_rng():
        attack = attack_of(name, subject.data)
        readapt(subject.model, attack, "all", course, batches)


def run_model(
    subject: Subject, attacks: Sequence[str], methods: Sequence[str], repeats: int
) -> list[Outcome]:
    """All attacks and methods on one model; the methods in turn, as often as asked."""
    outcomes = []
    for name in attacks:
        warm_up(subject, name)
        before = run_method(subject, name, BEFORE)
        rounds = [
            timed([run_method(subject, name, method) for method in methods]) for _ in range(repeats)
        ]
        outcomes += [before, *map(median_time, zip(*rounds, strict=True))]
    return outcomes


def timed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes on one model and attack, with their times relative to that of full training."""
    full = [outcome.seconds for outcome in outcomes if outcome.method == "full"]
    if not full:
        return list(outcomes)
    return [replace(outcome, time=outcome.seconds / full[0]) for outcome in outcomes]


def median_time(repeated: Sequence[Outcome]) -> Outcome:
    """One outcome for the repetitions of a training, which differ in the time that they took."""
    times = [outcome.time for outcome in repeated if outcome.time is not None]
    seconds = statistics.median(outcome.seconds for outcome in repeated)
    time = statistics.median(times) if times else None
    return replace(repeated[0], seconds=seconds, time=time, ratios=tuple(times))


def run_setting(
    setting: Setting,
    data: Data,
    course: Course,
    attacks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    cache: Path,
    repeats: int = 1,
    known: Collection[tuple[int, str, str]] = (),
) -> Iterator[list[Outcome]]:
    """What is not known of a setting, seed by seed; prints a line on each seed.

    A seed's methods are timed one after the other, so they are measured together.

    known: (seed, attack, method) of the outcomes that there are.
    """
    wanted = [(attack, method) for attack in attacks for method in (BEFORE, *methods)]
    for seed in seeds:
        if all((seed, attack, method) in known for attack, method in wanted):
            continue
        device = data.train.labels.device
        found = trained(setting.name, setting.build, data, setting.recipe, seed, cache, device)
        subject = Subject(setting.name, seed, found.model, data, course, setting.profiled)
        with suitable_threads(found.model):
            outcomes = run_model(subject, attacks, methods, repeats)
        origin = "from the cache" if found.cached else f"in {found.seconds:.1f} s"
        print(f"{setting.name}, seed {seed}: trained {origin}{subject.told(methods)}", flush=True)
        yield outcomes


def prefix(adversaries: Adversaries) -> str:
    """How the names of result files begin."""
    return "rq3" if adversaries == "fixed" else f"rq3-{adversaries}"


def record_of(
    setting: Setting, data: Data, course: Course, asked: argparse.Namespace, device: str
) -> Record[Outcome]:
    """The record of a setting, with what its file has where that is asked for."""
    options = {
        "recipe": asdict(setting.recipe), "readapt": asdict(course), "scheduler": "cosine",
        "new_samples": len(gathered(data.check)), "attacked_samples": len(gathered(data.test)),
        "profiled": setting.profiled, "strength": asdict(strength_for(data)),
        "thetas": THETAS, "evaluated": asked.evaluated, "data": data.origin,
    }  # fmt: skip
    record = Record(
        asked.output / f"{prefix(asked.adversaries)}-{setting.name}.json",
        f"RQ3, {setting.name}, {asked.adversaries} adversaries", Outcome, identity, tables,
        options, device,
    )  # fmt: skip
    if asked.resume:
        record.resume()
    return record


def report(record: Record[Outcome], data: Data) -> None:
    """Print the tables."""
    seeds, options = {outcome.seed for outcome in record.entries}, record.options
    print(
        f"\n{record.title}; data: {data.origin}; {options['new_samples']} new samples, "
        f"{options['attacked_samples']} attacked afterwards; "
        f"mean ± deviation of {len(seeds)} seed(s)\n"
    )
    print(text_table(COLUMNS, table_rows(record.entries)))
    print(f"\n{text_table(SUMMARY_COLUMNS, summary(record.entries))}")
    print(f"\n{record.path} and {record.path.with_suffix('.png').name} written\n")


def report_all(adversaries: Adversaries, *, device: str, output: Path) -> None:
    """Print and write the means over the paper's settings that have a result file in `output`.

    So settings can be run one by one. Nothing is done where there are fewer than two.
    """
    start = prefix(adversaries)
    paths = {name: output / f"{start}-{name}.json" for name in targets.SETTINGS}
    contents = {name: results.read(path) for name, path in paths.items() if path.exists()}
    if len(contents) < 2:
        return
    outcomes = [
        Outcome(**fields) for content in contents.values() for fields in content["outcomes"]
    ]
    seeds = sorted({outcome.seed for outcome in outcomes})
    rows, claims = table_rows(outcomes), summary(outcomes)
    title = f"RQ3 over {', '.join(contents)}, {adversaries} adversaries"
    path = output / f"{start}.json"
    results.write(path, title, COLUMNS, rows, seeds=seeds, device=device, summary=claims)
    print(f"{title}\n\n{text_table(COLUMNS, rows)}\n")
    print(f"{text_table(SUMMARY_COLUMNS, claims)}\n\n{path} written")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    add_batch(parser)
    add = parser.add_argument
    add("--methods", default="all",
        help=f"comma list of {', '.join(METHODS)}, or all (default)")  # fmt: skip
    add("--attacks", default="all",
        help=f"comma list of {', '.join(ATTACKS)}, or all (default)")  # fmt: skip
    add("--adversaries", choices=("fixed", "fresh"), default="fixed",
        help="adversaries to learn: made once, or at each step (default: %(default)s)")  # fmt: skip
    add("--readapt-epochs", type=int, default=EPOCHS, metavar="N",
        help="epochs of learning the new samples (default: %(default)s)")  # fmt: skip
    add("--readapt-learning-rate", type=float, metavar="RATE",
        help="learning rate of that (default: the setting's)")  # fmt: skip
    add("--tpr", type=float, default=TPR, metavar="PERCENT",
        help="most that a slice may hold of the parameters (default: %(default)s)")  # fmt: skip
    add("--threshold", type=float, default=SIMILAR,
        help="similarity from which DeepArc finds a layer redundant (%(default)s)")  # fmt: skip
    add("--repeats", type=int, default=1, metavar="N",
        help="trainings of each method in turn, for the median of times (%(default)s)")  # fmt: skip
    add_resume(parser)
    return parser


def readapt_recipe(setting: Setting, epochs: int, rate: float | None) -> Recipe:
    """How new samples are learned: as the setting's model was trained, for `epochs` epochs."""
    recipe = replace(setting.recipe, epochs=epochs)
    return recipe if rate is None else replace(recipe, learning_rate=rate)


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, device = checked_seeds(asked.seeds), usable_device(asked.device)
    methods = in_order(asked.methods, METHODS, "method")
    attacks = in_order(asked.attacks, ATTACKS, "attack")
    if not 0 < asked.tpr <= 100:
        raise ArgumentError(f"--tpr is {asked.tpr}; it is a share in percent, in (0, 100].")
    if asked.repeats < 1:
        raise ArgumentError(f"--repeats is {asked.repeats}; it is 1 or more.")
    for setting in chosen(asked.settings):
        # The new samples are few: they are learned in the setting's own batches.
        recipe = readapt_recipe(setting, asked.readapt_epochs, asked.readapt_learning_rate)
        setting = setting.with_epochs(asked.epochs).with_batch(asked.batch)
        course = Course(recipe, asked.adversaries, asked.tpr / 100, asked.threshold)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        record = record_of(setting, data, course, asked, device)
        known = [identity(outcome) for outcome in record.entries]
        for outcomes in run_setting(
            setting, data, course, attacks, methods, seeds, cache=asked.cache,
            repeats=asked.repeats, known=known,
        ):  # fmt: skip
            record.add(outcomes)
            record.save()
            plot(setting.name, record.entries, record.path.with_suffix(".png"))
        report(record, data)
    report_all(asked.adversaries, device=device, output=asked.output)


if __name__ == "__main__":
    run(main)
