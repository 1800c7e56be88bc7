"""How many architectures can be pruned: torch-pruning's standard recipe and NSSPruner.

    python benchmarks/coverage.py                        all, hours on two cores; goes on if stopped
    python benchmarks/coverage.py --models convnext_atto,torchvision:resnet18
    python benchmarks/coverage.py --fresh --sides nss_prune

The models are the smallest, by parameters, of every timm module and of every classifier
architecture of torchvision, with random weights. Each is pruned by each side in a process of its
own with a time limit. A side is through with a model when the model has fewer parameters
and the same output shape, computes what the masked model does (NSSPruner checks that before it
commits; the recipe of torch-pruning has no masked model), takes a training step's backward pass,
and can be exported. A backward pass or an export that fails before pruning, too, is noted and
held against neither side; a model that does not run before pruning is excluded on both.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from benchmarks.common import provenance, results, tables
from benchmarks.common.tables import Column
from benchmarks.rivals.recipe import attention_heads
from nss_prune import NSSPruner, Report
from nss_prune.core.nested import tensors_in
from nss_prune.errors import ArgumentError, NSSPruneError, RemovalError

SCRIPT = Path(__file__).parents[1] / "coverage.py"
STAGES = ("create", "build", "prune", "forward", "equal", "backward", "export")
THEIRS, OURS = "torch-pruning", "nss_prune"
SIDES = (THEIRS, OURS)
SOURCES = ("timm", "torchvision")
LIMIT = 120.0
BATCH = 2
LARGEST_PICTURE = 224  # where the model takes it
PRUNING_RATIO = 0.5  # of torch-pruning's recipe
BUDGET = 0.7  # share of the parameters that we keep
TOLERANCE = 0.01
MESSAGE = 80  # characters of a message that tell causes apart
ANNOUNCED = "stage: "  # on stderr, so that a process that is killed has said how far it came

# torchvision's names without their sizes: resnet, resnext, wide_resnet, swin, swin_v2, regnet_x ...
ARCHITECTURE = re.compile(r"(wide_)?[a-z]+(_v\d|_[xy](?=_))?")

TOTALS = (
    Column("side", "side"),
    Column("models", "models", 0),
    Column("ok", "ok", 0),
    Column("refused", "refused", 0),
    Column("hang", "hang", 0),
    *(Column(stage, f"at {stage}", 0) for stage in STAGES[1:]),
    Column("changed", "not intact", 0),
    Column("missed", "over budget", 0),
)
CAUSES = (
    Column("cause", "cause"),
    Column("side", "side"),
    Column("status", "status"),
    Column("stage", "stage"),
    Column("models", "models", 0),
)
Rows = list[dict[str, tables.Cell]]


class Model(NamedTuple):
    """A model by name, in one of the SOURCES."""

    source: str
    name: str

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"

    @property
    def family(self) -> str:
        """timm's module, or torchvision's architecture."""
        if self.source == "timm":
            return str(timm.model_entrypoint(self.name).__module__.rpartition(".")[2])
        return architecture(self.name)

    def create(self) -> nn.Module:
        """The model with random weights, in evaluation mode."""
        make = timm.create_model if self.source == "timm" else torchvision.models.get_model
        network: nn.Module = make(self.name)
        return network.eval()


def architecture(name: str) -> str:
    found = ARCHITECTURE.match(name)
    return found.group() if found else name


def model_named(word: str) -> Model:
    """The model meant by "timm:resnet18", "torchvision:resnet18" or "resnet18" (timm's first).

    Raises:
        ArgumentError: There is none.
    """
    source, colon, name = word.rpartition(":")
    known = {"timm": timm.list_models(), "torchvision": torchvision_names()}
    for candidate in (source,) if colon else SOURCES:
        if name in known.get(candidate, ()):
            return Model(candidate, name)
    raise ArgumentError(f"There is no model {word!r}; use a name of timm or torchvision.")


def torchvision_names() -> list[str]:
    """torchvision's plain classifiers: no quantized, detection, segmentation or video models."""
    return list(torchvision.models.list_models(module=torchvision.models))


# Which models


def families(source: str) -> dict[str, list[str]]:
    """Family -> the names of its models."""
    if source == "timm":
        # The test_* models are toys for timm's own tests.
        return {
            module: timm.list_models(module=module, exclude_filters="test_*")
            for module in timm.list_modules()
        }
    found: dict[str, list[str]] = {}
    for name in torchvision_names():
        found.setdefault(architecture(name), []).append(name)
    return found


def smallest(models: Iterable[Model]) -> str | None:
    """The name of the one with the fewest parameters; None where none can be created."""
    sizes = {model.name: size_of(model) for model in models}
    created = {name: size for name, size in sizes.items() if size is not None}
    return min(created, key=lambda name: (created[name], name)) if created else None


def size_of(model: Model) -> int | None:
    """Parameters of a model, without its memory where that works; None where nothing does."""
    for device in ("meta", "cpu"):
        with suppress(Exception), torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parameters(model.create())
    return None


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def choose(source: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Family -> its smallest model, beside the version of the package that this holds for."""
    version = provenance.version(source)
    known = earlier["models"] if earlier.get("version") == version else {}
    every = families(source)
    missing = {family: names for family, names in every.items() if known.get(family) is None}
    if missing:
        print(f"choosing the smallest models of {source} {version}: some minutes", flush=True)
    models = dict(known)
    for family, names in missing.items():
        models[family] = smallest(Model(source, name) for name in names)
    return {"version": version, "models": {family: models[family] for family in every}}


# One model on one side, in a process of its own


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
            return f"ok ({self.seconds:.1f} s, {kept:.1%})".replace("%", " %")
        if self.status == "hang":
            return f"hang ({self.seconds:g} s)"
        return f"{self.status} at {self.stage} ({self.seconds:.1f} s): {brief(self.cause)}"


class Trial:
    """One model on one side, stage by stage."""

    def __init__(self, side: str, model: Model, limit: float, theta: float | None = None) -> None:
        self.model = model
        self.theta = theta
        self.limit = limit
        self.start = time.perf_counter()
        self.prune = {THEIRS: prune_theirs, OURS: prune_ours}[side]
        self.outcome = Outcome(str(model), side)

    def run(self) -> Outcome:
        """The outcome, whatever is raised on the way."""
        try:
            self.stages()
            self.outcome.ok = True
        except Exception as error:
            self.outcome.cause = f"{type(error).__name__}: {error}"
        self.outcome.seconds = self.elapsed()
        return self.outcome

    def stages(self) -> None:
        self.begin("create")
        network, inputs = prepared(self.model)
        self.outcome.parameters_before = parameters(network)
        shapes = output_shapes(network, inputs)
        self.prune(self, network, inputs)
        self.outcome.parameters_after = parameters(network)
        if self.outcome.parameters_after >= self.outcome.parameters_before:
            raise RuntimeError("nothing was pruned")
        self.begin("forward")
        found = output_shapes(network, inputs)
        if found != shapes:
            raise RuntimeError(f"the outputs were {shapes} and are {found}")
        for stage, works in (("backward", training_step), ("export", export)):
            self.begin(stage)
            self.check(works, network, inputs)

    def begin(self, stage: str) -> None:
        self.outcome.stage = stage
        print(f"{ANNOUNCED}{stage}", file=sys.stderr, flush=True)

    def check(
        self, works: Callable[[nn.Module, Tensor], None], network: nn.Module, inputs: Tensor
    ) -> None:
        """Raise what `works` raises, unless the model failed it before pruning, too."""
        try:
            works(network, inputs)
        except Exception:
            if passes(works, self.model.create(), inputs):
                raise
            self.outcome.notes.append(f"{self.outcome.stage}: not even before")

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds to the limit."""
        return max(1.0, self.limit - self.elapsed())


def passes(works: Callable[[nn.Module, Tensor], None], network: nn.Module, inputs: Tensor) -> bool:
    try:
        works(network, inputs)
    except Exception:
        return False
    return True


def prepared(model: Model) -> tuple[nn.Module, Tensor]:
    """The model and a batch of random pictures, of its own size unless smaller ones will do."""
    torch.manual_seed(0)
    network = model.create()
    channels, height, width = picture_size(model, network)
    inputs = torch.randn(BATCH, channels, height, width)
    if max(height, width) > LARGEST_PICTURE:
        smaller = torch.randn(BATCH, channels, LARGEST_PICTURE, LARGEST_PICTURE)
        if passes(run_in_both_modes, network, smaller):
            inputs = smaller
    return network, inputs


def picture_size(model: Model, network: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that the model is meant for."""
    if model.source == "timm":
        settings: Any = network.pretrained_cfg
        channels, height, width = settings.get("input_size", (3, LARGEST_PICTURE, LARGEST_PICTURE))
        return channels, height, width
    weights = torchvision.models.get_model_weights(model.name).DEFAULT
    (side,) = weights.transforms().crop_size
    return 3, side, side


def run_in_both_modes(network: nn.Module, inputs: Tensor) -> None:
    """A call in either mode, of a copy: inception_v3's auxiliary classifier runs in one only."""
    scratch = copy.deepcopy(network)
    with torch.no_grad():
        for training in (False, True):
            scratch.train(training)(inputs)


def output_shapes(network: nn.Module, inputs: Tensor) -> list[tuple[int, ...]]:
    network.eval()
    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in tensors_in(network(inputs))]


def training_step(network: nn.Module, inputs: Tensor) -> None:
    """Raise unless the gradients of a call in training mode are finite."""
    network.train()
    network.zero_grad()
    outputs = tensors_in(network(inputs))
    torch.stack([output.float().sum() for output in outputs]).sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    if not gradients:
        raise RuntimeError("no parameter took part")
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise RuntimeError(f"the gradient of {name} is not finite")


def export(network: nn.Module, inputs: Tensor) -> None:
    torch.export.export(network.eval(), (inputs,))


def prune_theirs(trial: Trial, network: nn.Module, inputs: Tensor) -> None:
    """torch-pruning's recipe: the classifier is ignored, the heads of attention shrink alike."""
    trial.begin("build")
    pruner = tp.pruner.BasePruner(
        network,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=PRUNING_RATIO,
        global_pruning=False,
        ignored_layers=classifiers(network),
        num_heads=attention_heads(network),
        prune_head_dims=True,
    )
    trial.begin("prune")
    pruner.step()


def classifiers(network: nn.Module) -> list[nn.Module]:
    """What makes the classes: as timm says, else the last layer with as many outputs."""
    if hasattr(network, "get_classifier"):
        classified: Any = network
        found = classified.get_classifier()
        layers = found if isinstance(found, (tuple, list)) else (found,)
        return [layer for layer in layers if isinstance(layer, nn.Module)]
    classes = 1000
    wide = [
        layer
        for layer in network.modules()
        if classes in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None))
    ]
    return wide[-1:]


def prune_ours(trial: Trial, network: nn.Module, inputs: Tensor) -> None:
    labels = torch.arange(BATCH)
    data = [(inputs, labels), (torch.randn_like(inputs), labels)]
    before = bits(network)
    try:
        trial.begin("build")
        pruner = NSSPruner(network, inputs, data=data, progress=False, **amount(trial))
        trial.begin("prune")
        pruner.step()
    except Exception as error:
        if isinstance(error, RemovalError):
            trial.begin("equal")
        trial.outcome.refused = isinstance(error, NSSPruneError)
        trial.outcome.intact = bits(network) == before
        raise
    assert pruner.report is not None
    trial.outcome.notes.extend(notes(pruner.report))
    if trial.theta is None:
        trial.outcome.budget = budget(pruner.report)


def amount(trial: Trial) -> dict[str, Any]:
    """How much is to go; a third of the time is for torch-pruning's tracing."""
    if trial.theta is not None:
        return {"theta": trial.theta}
    return {"params_budget": BUDGET, "timeout": trial.left / 3}


def bits(network: nn.Module) -> dict[str, Any]:
    """The training flags, and a hash of every tensor of the state: NaN equals NaN here."""
    flags: dict[str, Any] = {name: module.training for name, module in network.named_modules()}
    tensors = {
        f"{name}: tensor": (tensor.shape, tensor.dtype, hashed(tensor))
        for name, tensor in network.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    return flags | tensors


def hashed(tensor: Tensor) -> bytes:
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw).digest()


def notes(report: Report) -> list[str]:
    left = sum(row.reason != "" for row in report.rows)
    return [f"{left} of {len(report.rows)} layers left alone", *report.notes]


def budget(report: Report) -> str:
    """Whether the budget was met, within the tolerance, or a note says why not."""
    if report.after.parameters <= (BUDGET + TOLERANCE) * report.before.parameters:
        return "met"
    return "explained" if any("budget" in note for note in report.notes) else "missed"


# All models on both sides


def run_one(model: Model, side: str, limit: float, theta: float | None = None) -> Outcome:
    """The outcome of a process that tries one model on one side."""
    words = [sys.executable, str(SCRIPT), "--one", side, str(model), "--limit", str(limit)]
    words += [] if theta is None else ["--theta", str(theta)]
    return outcome_of(words, model, side, limit)


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
    found = re.findall(rf"^{ANNOUNCED}(\w+)$", stderr, re.MULTILINE)
    return str(found[-1]) if found else STAGES[0]


@dataclass
class State:
    """What a result file holds: the models chosen, and the outcomes so far by model and side."""

    path: Path
    choice: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> State:
        """The state in a file; without outcomes where they are of other versions."""
        if not path.exists():
            return cls(path)
        content = results.read(path)
        state = cls(path, content["choice"])
        if content["made_by"]["versions"] != provenance.provenance([], "cpu")["versions"]:
            print(f"{path} is of other versions: everything is measured again", flush=True)
            return state
        for values in content["outcomes"]:
            state.add(Outcome(**values))
        return state

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.model, outcome.side] = outcome

    def has(self, model: Model, sides: Iterable[str]) -> bool:
        """Whether there is an outcome of a model on each of these sides."""
        return all((str(model), side) in self.outcomes for side in sides)

    def forget(self, models: Iterable[Model], sides: Sequence[str]) -> None:
        for model in models:
            for side in sides:
                self.outcomes.pop((str(model), side), None)

    def models(self, sources: Sequence[str]) -> list[Model]:
        """The smallest model of every family; chosen and saved where that is not yet done."""
        for source in sources:
            self.choice[source] = choose(source, self.choice.get(source, {}))
            self.save()
        return [
            Model(source, name)
            for source in sources
            for name in self.choice[source]["models"].values()
            if name is not None
        ]

    def save(self) -> None:
        outcomes = list(self.outcomes.values())
        results.write(
            self.path,
            "Coverage: architectures pruned",
            TOTALS,
            [totals(outcomes, side) for side in SIDES],
            seeds=[0],
            choice=self.choice,
            causes=causes(outcomes),
            lost=lost(outcomes),
            excluded=excluded(outcomes),
            not_created=self.not_created(),
            outcomes=[asdict(outcome) for outcome in outcomes],
        )

    def not_created(self) -> list[str]:
        """Families of which no model can be created."""
        return [
            f"{source} {family}"
            for source, chosen in self.choice.items()
            for family, name in chosen["models"].items()
            if name is None
        ]


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
                state.add(future.result())
                state.save()
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


# What came out


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


def totals(outcomes: Sequence[Outcome], side: str) -> dict[str, tables.Cell]:
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
    }


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


def report(state: State) -> None:
    """Print what the result file says."""
    outcomes = list(state.outcomes.values())
    print(f"\n{tables.text_table(TOTALS, [totals(outcomes, side) for side in SIDES])}")
    if rows := causes(outcomes):
        print(f"\n{tables.text_table(CAUSES, rows)}")
    for model, cause in sorted(excluded(outcomes).items()):
        print(f"\nexcluded, does not run before pruning: {model}: {cause}")
    for family in state.not_created():
        print(f"\nno model can be created: {family}")
    names = ", ".join(lost(outcomes)) or "none"
    print(f"\nfamilies that {THEIRS} prunes and {OURS} does not: {names}")
    print(f"\n{state.path} written")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", metavar="NAMES", help="comma list (default: the smallest of every family)")
    add("--families", default=",".join(SOURCES), help="comma list (default: %(default)s)")
    add("--sides", default=",".join(SIDES), help="comma list (default: %(default)s)")
    add("--limit", type=float, default=LIMIT, metavar="SECONDS",
        help="for one model on one side (default: %(default)g)")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    add("--output", type=Path, default=results.OUTPUT, metavar="DIR",
        help="folder of the result file (default: %(default)s)")  # fmt: skip
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", dest="fresh", action="store_false", default=False,
        help="keep the outcomes in the result file (the default)")  # fmt: skip
    again.add_argument("--fresh", action="store_true",
        help="forget those of the models and sides that are asked for")  # fmt: skip
    add("--one", nargs=2, metavar=("SIDE", "NAME"), help="try one model and print its outcome")
    add("--theta", type=float, help=argparse.SUPPRESS)
    return parser


def listed(words: str, option: str, known: Sequence[str]) -> list[str]:
    """A comma list of known words."""
    found = words.split(",")
    for word in found:
        if word not in known:
            raise ArgumentError(f"{option} has {word!r}; there are: {', '.join(known)}.")
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    if asked.one:
        side, name = asked.one
        (side,) = listed(side, "--one", SIDES)
        trial = Trial(side, model_named(name), asked.limit, asked.theta)
        print(json.dumps(asdict(trial.run())))
        return
    sides = listed(asked.sides, "--sides", SIDES)
    sources = listed(asked.families, "--families", SOURCES)
    named = [model_named(word) for word in asked.models.split(",")] if asked.models else None
    state = State.load(asked.output / "coverage.json")
    models = state.models(sources) if named is None else named
    if asked.fresh:
        state.forget(models, sides)
    measure(
        state,
        models,
        sides,
        lambda model, side: run_one(model, side, asked.limit, asked.theta),
        asked.jobs,
    )
    report(state)
