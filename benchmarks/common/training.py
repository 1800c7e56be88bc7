"""One plain recipe that trains every model of the benchmarks, and a cache of what it trained."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from benchmarks.common.data import Data, Split
from benchmarks.common.storage import load_tensors, save_tensors


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: one cycle of the learning rate over `epochs` epochs.

    augment: random crops (after padding by 4 pixels) and mirror images, for photographs.
    """

    epochs: int
    learning_rate: float
    batch: int = 128
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = False


def train(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    seed: int,
    title: str = "",
    checkpoint: Path | None = None,
) -> None:
    """Train `model` in place on `split`, which lies on the model's device.

    checkpoint: a file that every epoch is saved to; a training that broke off goes on from there,
        and gives what an unbroken one gives. It is removed at the end.
    """
    steps_of_epoch = -(-len(split) // recipe.batch)
    steps = recipe.epochs * steps_of_epoch
    if steps == 0:
        return
    optimiser = make_optimiser(model.parameters(), recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, steps)
    # Random numbers come from the CPU, so that a seed means the same data order on any device.
    random = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.train()
    with (
        torch.random.fork_rng(),
        suitable_threads(model),
        suitable_layout(model),
        suitable_attention(model),
        tqdm(total=steps, desc=title, leave=False, disable=None) as bar,
    ):
        torch.manual_seed(seed)  # for dropout
        progress = Progress(checkpoint, model, optimiser, schedule, random)
        done = progress.restored()
        bar.update(done * steps_of_epoch)
        for epoch in range(done, recipe.epochs):
            for indices in torch.randperm(len(split), generator=random).split(recipe.batch):
                inputs, labels = take(split, indices, recipe.augment, random)
                with fast(model):
                    outputs = model(inputs)
                loss = cross_entropy(
                    outputs.float(), labels, label_smoothing=recipe.label_smoothing
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
            progress.save(epoch + 1)
        progress.discard()
    model.train(was_training)


@dataclass(frozen=True)
class Progress:
    """All that a training goes on from, and the file that it is kept in; None keeps nothing."""

    path: Path | None
    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    random: torch.Generator

    def save(self, epochs: int) -> None:
        """Keep what there is after so many epochs."""
        if self.path is None:
            return
        content = {
            "epochs": epochs,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self.random.get_state(),
            "dropout": torch.get_rng_state(),
        }
        save_tensors(content, self.path)

    def restored(self) -> int:
        """The epochs that are done, with everything as it was after them; 0 without a file."""
        content = None if self.path is None else load_tensors(self.path)
        if content is None:
            return 0
        self.model.load_state_dict(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.schedule.load_state_dict(content["schedule"])
        self.random.set_state(content["random"])
        torch.set_rng_state(content["dropout"])
        return int(content["epochs"])

    def discard(self) -> None:
        """Remove the file: the training is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fast(model: nn.Module) -> torch.autocast:
    """bfloat16 where it is faster."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=faster_in_bfloat16(model))


def faster_in_bfloat16(model: nn.Module) -> bool:
    """On a GPU, and for convolutions on a CPU that computes in it.

    A small transformer, whose one convolution makes patches, takes longer in it: 0.37 s a step of
    vit-small-cifar10 on one core, and 0.22 s without.
    """
    if next(model.parameters()).device.type == "cuda":
        return True
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return bool(capabilities.get("avx512_bf16")) and convolutions > 1


@contextmanager
def suitable_attention(model: nn.Module) -> Iterator[None]:
    """Attention in plain products while a model trains in bfloat16 on a CPU.

    torch's fused one takes half of a step there, in its backward pass: 0.79 s a step of
    vit-stem-cifar10 on one core, and 0.65 s in plain products.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if on_cpu and faster_in_bfloat16(model) else nullcontext():
        yield


@contextmanager
def suitable_threads(model: nn.Module, small: int = 1_000_000) -> Iterator[None]:
    """One thread for a small model: more gain nothing, and wait for each other on a busy machine.

    Measured on two busy cores, mlp-digits: 0.8 s with one thread, 14 to 75 s with two.
    """
    threads = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def suitable_layout(model: nn.Module) -> Iterator[None]:
    """Channels last while a model trains, which convolutions in bfloat16 on a CPU are faster in.

    Measured on two cores, resnet20_cifar: 125 ms a step, and 189 ms as models are made.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def make_optimiser(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Of those of the parameters that ask for gradients."""
    parameters = [p for p in parameters if p.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    return torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=decay)


def take(
    split: Split, indices: Tensor, augment: bool, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The inputs and labels at `indices`, augmented if asked to."""
    indices = indices.to(split.labels.device)
    pixels = split.pixels[indices]
    if augment:
        pixels = crop_and_mirror(pixels, random)
    return split.normalised(pixels), split.labels[indices]


def crop_and_mirror(pixels: Tensor, random: torch.Generator, margin: int = 4) -> Tensor:
    """Each picture shifted by up to `margin` pixels, filled with black, and half of them mirrored.

    pixels: [samples, channels, height, width]; so is what is returned.
    """
    samples, _, height, width = pixels.shape
    top, left = torch.randint(2 * margin + 1, (2, samples, 1), generator=random)
    mirrored = torch.rand(samples, 1, generator=random) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    sample = torch.arange(samples)[:, None, None]
    padded = pad(pixels, [margin] * 4).permute(0, 2, 3, 1)
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def accuracy(model: nn.Module, split: Split, batch: int = 500) -> float:
    """The share of `split`, 0 to 1, that `model` names rightly."""
    return share_equal(predictions(model, split, batch), split.labels)


def share_equal(found: Tensor, wanted: Tensor) -> float:
    """The share of samples, 0 to 1, of which both name the same class."""
    return int((found == wanted).sum()) / len(wanted)


@torch.no_grad()
def predictions(model: nn.Module, split: Split, batch: int = 500) -> Tensor:
    """The class that `model` gives each sample, int64 `[samples]`."""
    was_training = model.training
    model.eval()
    with fast(model):
        found = [model(inputs).argmax(1) for inputs, _ in split.batches(batch)]
    model.train(was_training)
    return torch.cat(found)


@dataclass(frozen=True)
class Trained:
    """A trained model, what its training took, and whether it came from the cache."""

    model: nn.Module
    seconds: float
    cached: bool


def trained(
    name: str,
    build: Callable[[], nn.Module],
    data: Data,
    recipe: Recipe,
    seed: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> Trained:
    """The model that `build` makes, trained by `recipe` from `seed`: from `cache` if it is there.

    The key covers the name, the seed, the recipe, the training data and the architecture. What
    breaks off goes on after its last epoch, in the next call.
    """
    model = initialised(build, seed)
    path = cache / "models" / f"{name}-seed{seed}-{digest(model, data, recipe)}.pt"
    content = load_tensors(path)
    if content is not None and fits(model, content):
        model.load_state_dict(content["state"])
        return Trained(model.to(device).eval(), content["seconds"], cached=True)
    model.to(device)
    start = time.perf_counter()
    title = f"train {name}, seed {seed}"
    train(model, data.train.to(device), recipe, seed, title, path.with_suffix(".part"))
    seconds = time.perf_counter() - start
    save_tensors({"state": model.state_dict(), "seconds": seconds}, path)
    return Trained(model.eval(), seconds, cached=False)


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def digest(model: nn.Module, data: Data, recipe: Recipe) -> str:
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    key = repr((shapes, data.fingerprint, recipe))
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def fits(model: nn.Module, content: dict[str, object]) -> bool:
    """Whether a cached file holds what it should: a readable one may still be someone else's."""
    state, wanted = content.get("state"), model.state_dict()
    return (
        isinstance(content.get("seconds"), float)
        and isinstance(state, dict)
        and state.keys() == wanted.keys()
        and all(state[name].shape == value.shape for name, value in wanted.items())
    )
