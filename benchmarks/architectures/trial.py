"""One model on one side, stage by stage, in a process of its own."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.architectures import small
from benchmarks.architectures.models import Model, parameters
from benchmarks.architectures.outcomes import Outcome
from nss_prune.core.nested import tensors_in

BATCH = 2
SAMPLES = 128
SAMPLE_BATCH = 32
LARGEST_PICTURE = 224  # where the model takes it
SMALL_PICTURES = (64, 128)  # tried first for the samples, of which there are many
ANNOUNCED = "stage: "  # on stderr, so that a process that is killed has said how far it came


Prune = Callable[["Trial", nn.Module, Tensor], None]


class Trial:
    """One model on one side, stage by stage.

    Args:
        limit: Seconds that it may take.
        samples, pixels: Pictures that an allocation sees, and their height; None for as small as
            the model takes them.
        theta: Slice at this similarity, instead of an allocation.
    """

    def __init__(
        self,
        side: str,
        model: Model,
        limit: float,
        samples: int = SAMPLES,
        pixels: int | None = None,
        theta: float | None = None,
    ) -> None:
        self.model = model
        self.theta = theta
        self.limit = limit
        self.samples = samples
        self.pixels = pixels
        self.start = time.perf_counter()
        self.outcome = Outcome(str(model), side)

    def run(self, prune: Prune) -> Outcome:
        """The outcome, whatever is raised on the way.

        Args:
            prune: Prunes the model in place.
        """
        try:
            self.stages(prune)
            self.outcome.ok = True
        except Exception as error:
            self.outcome.cause = f"{type(error).__name__}: {error}"
        self.outcome.seconds = self.elapsed()
        return self.outcome

    def stages(self, prune: Prune) -> None:
        """Run through all stages."""
        self.begin("create")
        network, inputs = prepared(self.model)
        self.outcome.parameters_before = parameters(network)
        shapes = output_shapes(network, inputs)
        prune(self, network, inputs)
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
        """Say on stderr which stage begins."""
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
        """Seconds so far."""
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds to the limit."""
        return max(1.0, self.limit - self.elapsed())


def passes(works: Callable[[nn.Module, Any], None], network: nn.Module, inputs: Any) -> bool:
    """Whether nothing is raised."""
    try:
        works(network, inputs)
    except Exception:
        return False
    return True


def prepared(model: Model) -> tuple[nn.Module, Tensor]:
    """The model and a batch of random pictures, of its own size unless smaller ones will do."""
    torch.manual_seed(0)
    network = model.create()
    if model.source in small.PACKAGES:
        return network, small.inputs(model.source, model.name, BATCH)
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


def sampled(
    network: nn.Module, inputs: Tensor, samples: int, pixels: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Batches of random pictures and labels, or of the words of the inputs in another order.

    Args:
        inputs: Of one call.
        pixels: Height and width; None for as small as the model takes them, at most as ``inputs``.
    """
    if not inputs.is_floating_point():
        words = torch.randint(3, small.WORDS, (samples, *inputs.shape[1:]))
        return [(batch, torch.arange(len(batch))) for batch in words.split(SAMPLE_BATCH)]
    channels, *size = inputs.shape[1:]
    for side in SMALL_PICTURES if pixels is None else (pixels,):
        smaller = torch.randn(BATCH, channels, side, side)
        if side < max(size) and passes(run_in_both_modes, network, smaller):
            size = [side, side]
            break
    batches = torch.randn(samples, channels, *size).split(SAMPLE_BATCH)
    return [(batch, torch.arange(len(batch))) for batch in batches]
