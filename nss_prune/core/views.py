"""Augmented copies of each sample, such as a picture and its mirror image.

To a fold they are samples like others: the residuals of the kept neurons in single positions hardly
repeat in another copy. Averaged over a whole sample they do, so that predictions for new samples,
and trials on samples left out, have to know which are copies of the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nss_prune.core.batches import split_batch
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.core.shards import without_padding
from nss_prune.errors import ArgumentError, DataError


class Views:
    """Data with augmented copies (views) of each sample; an argument wherever ``data`` is one.

    Args:
        data: Batches that can be iterated again: a list or a DataLoader.
        *transforms: Each makes another view of the inputs of a batch, of the same shapes, for
            example ``torchvision.transforms.functional.hflip``. Labels stay.

    Attributes:
        views: Of each sample, one after the other in its batch: 1 + the number of transforms.

    Raises:
        ArgumentError: No transform, or data that can be iterated only once.
        DataError: When iterated: a batch cannot be used, or a view has other shapes.
    """

    def __init__(self, data: Iterable[Any], *transforms: Callable[[Any], Any]) -> None:
        if not transforms:
            raise ArgumentError(
                "Views got no transform; give one at least, for example "
                "torchvision.transforms.functional.hflip"
            )
        if isinstance(data, Iterator):
            raise ArgumentError(
                f"data is a {type(data).__name__}, which can be iterated only once; give a list "
                "of batches or a DataLoader"
            )
        self.data = data
        self.transforms = transforms
        self.views = 1 + len(transforms)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in without_padding(self.data):
            inputs, labels = split_batch(batch)
            views = [inputs, *(transform(inputs) for transform in self.transforms)]
            repeated = map_tensors(lambda part: part.repeat_interleave(self.views, 0), labels)
            yield _interleaved(views), repeated

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]


def views_of(data: Iterable[Any]) -> int:
    """How many samples that follow each other are views of the same one."""
    return data.views if isinstance(data, Views) else 1


def _interleaved(views: list[Any]) -> Any:
    """The views of the first sample, then those of the second, and so on."""
    tensors = [tensors_in(view) for view in views]
    shapes = [[tensor.shape for tensor in view] for view in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise DataError(
            f"views of a batch have the shapes {shapes}; a transform has to keep the shapes of "
            "the inputs"
        )
    parts: Iterator[tuple[Tensor, ...]] = iter(zip(*tensors, strict=True))
    return map_tensors(lambda _: torch.stack(next(parts), 1).flatten(0, 1), views[0])
