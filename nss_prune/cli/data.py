"""Data from what the command line says: a folder of pictures, or a loader of the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nss_prune.cli.objects import imported, is_object
from nss_prune.core.batches import split_batch
from nss_prune.core.nested import map_tensors
from nss_prune.errors import DataError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
HELD_OUT = ("val", "validation", "test")


@dataclass(frozen=True)
class Batches:
    """Batches that are moved to a device each time they are read."""

    source: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            yield map_tensors(lambda tensor: tensor.to(self.device), batch)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DataSource:
    """Where the data comes from.

    Attributes:
        place: A folder with a folder of pictures for each class, or of pictures alone, or
            ``module:function``, which returns batches of (inputs, labels).
        held_out: Another such, to measure accuracy with. By default ``place/val`` or
            ``place/test`` beside ``place/train``, or else a part of the pictures.
        share: Of the pictures that are held out where there is no such folder.
        samples: Pictures to prune with at most; None for all.
        held_out_samples: Pictures to measure with at most; None for all.
        batch_size, workers: Of the loader.
        seed: For which pictures are taken.
    """

    place: str
    held_out: str | None = None
    share: float = 0.2
    samples: int | None = None
    held_out_samples: int | None = None
    batch_size: int = 32
    workers: int = 0
    seed: int = 0

    def load(
        self,
        model: nn.Module,
        input_size: Sequence[int] | None,
        *,
        training: bool = False,
        augment: bool = False,
    ) -> tuple[Any, Any]:
        """(batches to prune or train with, batches to measure accuracy with, or None).

        Args:
            input_size: Of a picture, (channels, height, width); None for the model's.
            training: Draw the order of the pictures anew in each pass, by torch's random numbers,
                and leave an incomplete batch out.
            augment: Crop and mirror the pictures to train with at random, as timm does.

        Raises:
            DataError: There is nothing to use.
        """
        device = next((value.device for value in model.parameters()), torch.device("cpu"))
        if is_object(self.place):
            held_out = None if self.held_out is None else imported(self.held_out)()
            batches = Batches(_repeatable(imported(self.place)()), device)
            return batches, None if held_out is None else Batches(_repeatable(held_out), device)
        first, second = self._pictures(transform_for(model, input_size), class_count(model))
        if augment:
            first = Pictures(first.entries, transform_for(model, input_size, training=True))
        batches = self._loader(first, device, training)
        return batches, self._loader(second, device) if second is not None and second else None

    def _loader(self, part: Pictures, device: torch.device, training: bool = False) -> Batches:
        loader = DataLoader(
            part,
            self.batch_size,
            shuffle=training,
            drop_last=training and len(part) > self.batch_size,  # a norm needs several samples
            num_workers=self.workers,
        )
        return Batches(loader, device)

    def _pictures(
        self, transform: Callable[[Any], Tensor], classes: int | None
    ) -> tuple[Pictures, Pictures | None]:
        root = Path(self.place)
        train = root / "train"
        folder = train if train.is_dir() else root
        whole = pictures(folder, transform, classes).shuffled(self.seed)
        others = (Path(self.held_out),) if self.held_out else (root / name for name in HELD_OUT)
        held_out = next((path for path in others if path.is_dir()), None)
        if held_out is not None and (self.held_out or folder != root):
            measured = pictures(held_out, transform, classes).shuffled(self.seed)
        else:
            count = round(len(whole) * self.share)
            whole, measured = whole.part(count, None), whole.part(0, count)
        if not len(whole):
            raise DataError(f"no picture is left to prune with; hold out less than {self.share}")
        measured = measured.part(0, self.held_out_samples)
        return whole.part(0, self.samples), measured if measured.labelled else None


class Pictures(Dataset[Any]):
    """Pictures of files.

    Args:
        entries: File and label of each; -1 for none.
        transform: A picture -> a tensor.
    """

    def __init__(
        self, entries: Sequence[tuple[Path, int]], transform: Callable[[Any], Tensor]
    ) -> None:
        self.entries = entries
        self.transform = transform

    @property
    def labelled(self) -> bool:
        """Whether every picture has a label."""
        return all(label >= 0 for _, label in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.entries[index]
        with Image.open(path) as picture:
            inputs = self.transform(picture.convert("RGB"))
        return (inputs, label) if self.labelled else (inputs,)

    def shuffled(self, seed: int) -> Pictures:
        """The same in another order."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return Pictures([self.entries[i] for i in order.tolist()], self.transform)

    def part(self, first: int, end: int | None) -> Pictures:
        """Some of them."""
        return Pictures(self.entries[first:end], self.transform)


def pictures(folder: Path, transform: Callable[[Any], Tensor], classes: int | None) -> Pictures:
    """The pictures of a folder, sorted by name.

    Labels are those of the folders in which they are, in the order of their names, where these are
    as many as the model's classes; folders named as ImageNet's synsets are known by these names.

    Raises:
        DataError: There are none.
    """
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {os.fspath(folder)!r}; give one with a folder of pictures for "
            "each class, or module:function that returns batches of (inputs, labels)"
        )
    groups = {
        inner.name: [path for path in sorted(inner.rglob("*")) if _is_picture(path)]
        for inner in sorted(folder.iterdir())
        if inner.is_dir()
    }
    groups = {name: files for name, files in groups.items() if files}
    if not groups:
        alone = [(path, -1) for path in sorted(folder.iterdir()) if _is_picture(path)]
        if not alone:
            raise DataError(
                f"{os.fspath(folder)!r} holds no pictures ({', '.join(PICTURES)}); give a folder "
                "with a folder of pictures for each class"
            )
        return Pictures(alone, transform)
    labels = _labels(list(groups), classes)
    return Pictures(
        [(path, labels[name]) for name, files in groups.items() for path in files], transform
    )


def _labels(names: Sequence[str], classes: int | None) -> dict[str, int]:
    """Folder -> label, -1 where it is not known."""
    if classes == 1000 and len(names) != 1000:
        from timm.data.imagenet_info import ImageNetInfo

        known = {synset: index for index, synset in enumerate(ImageNetInfo().label_names())}
        if all(name in known for name in names):
            return {name: known[name] for name in names}
    if classes is not None and len(names) != classes:
        return dict.fromkeys(names, -1)
    return {name: index for index, name in enumerate(names)}


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def class_count(model: nn.Module) -> int | None:
    """Classes of a model, where it or its last linear layer says so."""
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return layers[-1].out_features if layers else None


def settings_of(model: nn.Module, input_size: Sequence[int] | None = None) -> dict[str, Any]:
    """timm's settings of a model's pictures: input_size, mean, std, interpolation, crop_pct.

    Models of torchvision and others have those of ImageNet.
    """
    from timm.data.config import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(model)
    return {**found, "input_size": tuple(input_size)} if input_size else found


def transform_for(
    model: nn.Module, input_size: Sequence[int] | None, *, training: bool = False
) -> Callable[[Any], Tensor]:
    """What turns a picture into the model's input, as timm does when it evaluates, or trains."""
    from timm.data.transforms_factory import create_transform

    settings = settings_of(model, input_size)
    made: Callable[[Any], Tensor] = create_transform(**settings, is_training=training)
    return made


def example_for(model: nn.Module, input_size: Sequence[int] | None, batches: Any = None) -> Any:
    """Inputs of one call, where the model is: the first sample of a user's own data, or noise."""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    if batches is not None and not isinstance(batches.source, DataLoader):
        inputs, _ = split_batch(next(iter(batches)))
        return map_tensors(lambda tensor: tensor[:1], inputs)
    size = settings_of(model, input_size)["input_size"]
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(device)


def _repeatable(data: Iterable[Any]) -> Iterable[Any]:
    return list(data) if isinstance(data, Iterator) else data
