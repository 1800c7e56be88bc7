"""The data sets of the benchmarks, held in memory.

Pictures stay uint8 and are normalised batch by batch, so that CIFAR-10 takes 180 MB and
augmentation works on bytes. Every set has three parts: `train`, `check` (held out of the
training set, for decisions such as when to stop) and `test` (for the reported numbers only).

| name       | where it is looked for below DIR                              |
|------------|---------------------------------------------------------------|
| digits     | nowhere: scikit-learn brings it, 1,797 pictures of 8 x 8      |
| mnist      | MNIST/raw, as torchvision lays it out; else downloaded        |
| fmnist     | FashionMNIST/raw, likewise                                    |
| cifar10    | cifar10/{train,test}/CLASS/*, else torchvision's own layout   |
| imagenet10 | imagenet10_32/{train,val}/CLASS/*, pictures of 32 x 32        |
| imagenet   | imagenet_samples/CLASS/*, all 1,000 classes, 256 x 256        |
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.common.storage import DEFAULT_CACHE, load_tensors, save_tensors
from nss_prune.errors import DataError

Pictures = tuple[Tensor, Tensor]  # uint8 [samples, channels, height, width], labels [samples]


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set and how to normalise it.

    pixels: uint8 [samples, channels, height, width].   labels: int64 [samples].
    mean, std: float32 [channels, 1, 1], in units of a pixel's value.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """The float32 inputs that uint8 `pixels` stand for."""
        return (pixels.float() - self.mean) / self.std

    def inputs(self) -> Tensor:
        """All inputs at once: float32 [samples, channels, height, width]."""
        return self.normalised(self.pixels)

    def batches(self, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels) in order, `size` samples at a time."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield self.normalised(pixels), labels

    def subset(self, indices: Tensor) -> Split:
        """The samples at `indices`, in that order."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def per_category(self, count: int) -> Split:
        """The first `count` samples of every category (all of those that have fewer)."""
        chosen = [torch.nonzero(self.labels == c)[:count, 0] for c in self.labels.unique()]
        return self.subset(torch.cat(chosen).sort().values)

    def to(self, device: torch.device | str) -> Split:
        parts = (self.pixels, self.labels, self.mean, self.std)
        return Split(*(part.to(device) for part in parts))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in its three parts. `origin` says which copy of it this is."""

    name: str
    origin: str
    train: Split
    check: Split
    test: Split

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of the training data: two copies of a set train different models."""
        pixels, labels = (
            part.cpu().numpy().tobytes() for part in (self.train.pixels, self.train.labels)
        )
        return f"{zlib.crc32(labels, zlib.crc32(pixels)):08x}"

    def measured_with(self, count: int | None) -> Data:
        """At most `count` check and test samples of every category (None: all)."""
        if count is None:
            return self
        return replace(
            self, check=self.check.per_category(count), test=self.test.per_category(count)
        )

    def to(self, device: torch.device | str) -> Data:
        parts = {part: getattr(self, part).to(device) for part in ("train", "check", "test")}
        return replace(self, **parts)


@dataclass(frozen=True)
class Source:
    """How one data set is read: its statistics (pixels scaled to 0..1) and its consumer."""

    read: Callable[[Path, Path], tuple[str, Pictures, Pictures]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    check_share: float = 0.1


def load(name: str, root: Path | None = None, *, cache: Path = DEFAULT_CACHE) -> Data:
    """The data set `name` from the folder `root` (default: `cache`/data).

    Raises DataError for a name that is not known, and for data that is neither there nor to
    be had: the message then says what to do.
    """
    if name not in SOURCES:
        raise DataError(f"There is no data set {name!r}; there are: {', '.join(SOURCES)}.")
    source = SOURCES[name]
    origin, (pixels, labels), test = source.read(root or cache / "data", cache)
    # The held-out part is the same in every run: a seed of a benchmark varies the training.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    checked = round(len(labels) * source.check_share)
    parts = [(pixels[i], labels[i]) for i in (order[checked:], order[:checked])] + [test]
    mean, std = (torch.tensor(x)[:, None, None] * source.scale for x in (source.mean, source.std))
    return Data(name, origin, *(Split(*part, mean=mean, std=std) for part in parts))


def read_digits(root: Path, cache: Path) -> tuple[str, Pictures, Pictures]:
    """scikit-learn's digits in a fixed split of 1,397 and 400; `root` and `cache` go unused."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images.astype(numpy.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(numpy.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    train, test = ((pixels[i], labels[i]) for i in (order[400:], order[:400]))
    return "scikit-learn", train, test


def read_torchvision(kind: str) -> Callable[[Path, Path], tuple[str, Pictures, Pictures]]:
    """A consumer of torchvision.datasets.`kind`, which downloads it where `root` has none."""

    def read(root: Path, cache: Path) -> tuple[str, Pictures, Pictures]:
        train, test = (fetch(kind, root, train) for train in (True, False))
        return f"torchvision {kind}", as_pictures(train), as_pictures(test)

    return read


def fetch(kind: str, root: Path, train: bool) -> Any:
    dataset = getattr(torchvision.datasets, kind)
    try:
        return dataset(root, train=train, download=False)
    except RuntimeError:
        pass  # torchvision's word for: not there, or not whole
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(
            f"{kind} in {root} cannot be read ({error}). Remove it and run this again with a "
            "network, or unpack a good copy there."
        ) from error
    try:
        return dataset(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{kind} is not in {root} and could not be downloaded ({first_line(error)}). On a "
            f'machine with a network run:  python -c "import torchvision; '
            f"torchvision.datasets.{kind}('DIR', download=True)\"  and pass --data DIR, or copy "
            "DIR here."
        ) from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(": ") if str(error) else type(error).__name__


def as_pictures(dataset: Any) -> Pictures:
    """torchvision's own arrays, [samples, height, width(, channels)], as tensors of pictures."""
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(dataset.targets, dtype=torch.int64)


def read_cifar10(root: Path, cache: Path) -> tuple[str, Pictures, Pictures]:
    """DIR/cifar10/{train,test} where there is such a folder, else torchvision's CIFAR10."""
    if (root / "cifar10").is_dir():
        return read_folders(root / "cifar10", "train", "test", cache)
    return read_torchvision("CIFAR10")(root, cache)


def read_imagenet10(root: Path, cache: Path) -> tuple[str, Pictures, Pictures]:
    """DIR/imagenet10_32/{train,val}: ten categories of ImageNet at 32 x 32."""
    if not (root / "imagenet10_32").is_dir():
        raise DataError(
            f"There is no {root / 'imagenet10_32'}, and ImageNet may not be downloaded without "
            "its licence. Lay out ten of its categories, or of Tiny-ImageNet "
            "(http://cs231n.stanford.edu/tiny-imagenet-200.zip), resized to 32 x 32, as "
            "DIR/imagenet10_32/train/CLASS/*.png and DIR/imagenet10_32/val/CLASS/*.png, and "
            "pass --data DIR."
        )
    return read_folders(root / "imagenet10_32", "train", "val", cache)


def read_imagenet(root: Path, cache: Path) -> tuple[str, Pictures, Pictures]:
    """DIR/imagenet_samples: the middle 224 x 224 of each picture; half of the classes to train.

    The sorted folders are the classes of ImageNet in their usual order.
    """
    folder = root / "imagenet_samples"
    if not folder.is_dir():
        raise DataError(
            f"There is no {folder}, and ImageNet may not be downloaded without its licence. Lay "
            "out at least one picture of each of its 1,000 classes, 256 x 256, as "
            "DIR/imagenet_samples/CLASS/*, and pass --data DIR."
        )
    origin, (pixels, labels) = read_folder(folder, cache)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000))
    middle = pixels[:, :, 16:240, 16:240]
    halves = order.chunk(2)
    train, test = ((middle[half], labels[half]) for half in halves)
    return origin, train, test


def read_folder(folder: Path, cache: Path) -> tuple[str, Pictures]:
    """One ImageFolder, decoded once and kept as tensors in `cache`."""
    part = torchvision.datasets.ImageFolder(str(folder))
    kept = cache / "decoded" / f"{folder.name}-{state_of([part])}.pt"
    content = load_tensors(kept)
    if content is None:
        content = {"pictures": decode(part)}
        save_tensors(content, kept)
    return f"ImageFolder {folder.name}", content["pictures"]


def read_folders(
    folder: Path, train: str, test: str, cache: Path
) -> tuple[str, Pictures, Pictures]:
    """Both parts of an ImageFolder, decoded once and kept as tensors in `cache`."""
    try:
        parts = [torchvision.datasets.ImageFolder(str(folder / part)) for part in (train, test)]
    except OSError as error:
        raise DataError(f"{folder} needs {train}/CLASS/* and {test}/CLASS/*: {error}") from error
    if parts[0].classes != parts[1].classes:
        raise DataError(f"{folder / train} and {folder / test} hold different classes.")
    kept = cache / "decoded" / f"{folder.name}-{state_of(parts)}.pt"
    content = load_tensors(kept)
    if content is None:
        content = {name: decode(part) for name, part in zip(("train", "test"), parts, strict=True)}
        save_tensors(content, kept)
    suffixes = {Path(path).suffix.lstrip(".").upper() for path, _ in parts[0].samples}
    return f"ImageFolder {folder.name} ({', '.join(suffixes)})", content["train"], content["test"]


def state_of(parts: list[Any]) -> str:
    """A digest of where the pictures lie and when their folders last changed."""
    folders = [Path(part.root) / name for part in parts for name in part.classes]
    state = [(str(folder.resolve()), folder.stat().st_mtime_ns) for folder in folders]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:12]


def decode(folder: Any) -> Pictures:
    pictures = [torch.from_numpy(numpy.array(picture)) for picture, _ in folder]
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) != 1:
        raise DataError(f"The pictures in {folder.root} must be of one size, not {shapes}.")
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor(folder.targets)


CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SOURCES = {
    "digits": Source(read_digits, (0.3053,), (0.3761,), scale=16.0, check_share=0.215),
    "mnist": Source(read_torchvision("MNIST"), (0.1307,), (0.3081,)),
    "fmnist": Source(read_torchvision("FashionMNIST"), (0.2860,), (0.3530,)),
    "cifar10": Source(read_cifar10, CIFAR10_MEAN, CIFAR10_STD),
    "imagenet10": Source(read_imagenet10, IMAGENET_MEAN, IMAGENET_STD),
    # The mean and deviation that the pretrained EfficientNet-Lite takes.
    "imagenet": Source(read_imagenet, (0.5,) * 3, (0.5,) * 3, check_share=0.2),
}
