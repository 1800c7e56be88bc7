"""Any amount of data in bounded memory: the sums of a category are freed as soon as it is whole.

The sums of one category take 12 Σ C² bytes, so only some categories can be open at a time. (Of
"flat" features with several positions the activations take the other half of the memory.) As long
as they all fit, one pass over the data does. Where they do not, a DataLoader over a map-style
data set of known labels is read in the order of its categories, once; anything else that can be
iterated again is read several times, and only samples of open categories go through the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from nss_prune.core.batches import entered, pick_samples
from nss_prune.core.processes import gathered, processes, total_by_key
from nss_prune.core.progress import shown
from nss_prune.errors import DataError
from nss_prune.profiling.accumulation import Collector
from nss_prune.profiling.categories import IGNORED, joined, members
from nss_prune.profiling.sums import CategorySums, total_sums

Part = tuple[int, ...]


Sums = dict[int, CategorySums]


def stream_parts(
    model: nn.Module,
    data: Iterable[Any],
    collector: Collector,
    room: int,
    *,
    separate: bool = False,
    progress: bool | None = None,
) -> Iterator[tuple[Part, Sums]]:
    """The categories that count as one, each with its sums over all of the data.

    Args:
        data: Batches of (inputs, labels).
        room: Categories that may be open at a time, at least 1.
        separate: Yield the sums of each category of a part, and not of all together. Where
            many small categories count as one this takes more room.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        DataError, NumericalError: The data cannot be used.
    """
    if collector.categories == "labels" and isinstance(data, DataLoader):
        drawn = labelled_draw(data, room)
        if processes() > 1:
            drawn = _drawn_by_all(data, drawn, room)
        if drawn is not None:
            used = [pair for pair in drawn if pair[0] != IGNORED]
            collector.unused += len(drawn) - len(used)
            return _in_order(model, data, used, collector, room, separate, progress)
    return _in_passes(model, data, collector, room, separate, progress)


def labelled_draw(loader: DataLoader[Any], room: int) -> list[tuple[int, int]] | None:
    """(label, index) of every sample that one pass of a loader draws, without loading them.

    None where the labels are not known beforehand or no more than ``room`` of them occur.
    """
    labels = dataset_labels(loader.dataset)
    if labels is None or len(set(labels)) <= room or loader.batch_sampler is None:
        return None
    return [(labels[index], index) for batch in loader.batch_sampler for index in batch]


def _drawn_by_all(
    loader: DataLoader[Any], drawn: list[tuple[int, int]] | None, room: int
) -> list[tuple[int, int]] | None:
    """What :func:`labelled_draw` gives where the labels of all processes are more than ``room``."""
    labels = dataset_labels(loader.dataset)
    everywhere = gathered(None if labels is None else set(labels))
    known = [found for found in everywhere if found is not None]
    if len(known) < processes() or len(set().union(*known)) <= room:
        return None
    return labelled_draw(loader, 0) or [] if drawn is None else drawn


def dataset_labels(dataset: Dataset[Any]) -> list[int] | None:
    """The integer labels of a map-style data set, or None where it does not tell."""
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset)
        return None if labels is None else [labels[index] for index in dataset.indices]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    found: Any = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[-1]
    if found is None:
        return None
    tensor = torch.as_tensor(found)
    if tensor.dim() != 1 or tensor.is_floating_point():
        return None
    return [int(label) for label in tensor]


def bar(data: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    """``data`` with a progress bar, by default only where stderr is a terminal."""
    return shown(data, progress, "profile")


def _in_order(
    model: nn.Module,
    loader: DataLoader[Any],
    drawn: Sequence[tuple[int, int]],
    collector: Collector,
    room: int,
    separate: bool,
    progress: bool | None,
) -> Iterator[tuple[Part, Sums]]:
    """One pass in the order of the categories; each part is yielded as soon as it is whole."""
    parts = sorted(joined(total_by_key(Counter(label for label, _ in drawn))).values())
    part_of = {category: number for number, part in enumerate(parts) for category in part}
    if not separate:
        for part in parts:
            collector.join(part)
    in_order = sorted(drawn, key=lambda pair: part_of[pair[0]])
    batches = _batches(in_order, part_of, loader.batch_size or len(drawn), room)
    ordered = DataLoader(
        loader.dataset,
        batch_sampler=[[index for _, index in batch] for batch in batches],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
    finished = 0
    for number, (batch, expected) in enumerate(zip(bar(ordered, progress), batches, strict=True)):
        inputs, found, _ = entered(model, batch, number)
        wanted = [label for label, _ in expected]
        if found is None or torch.as_tensor(found).tolist() != wanted:
            raise DataError(
                f"batch {number} has other labels than the data set's own list of them; give "
                "batches without a DataLoader, or categories= a function"
            )
        collector.add(model, inputs, found, number)
        while finished < part_of[wanted[-1]]:
            yield parts[finished], _whole(collector, parts[finished])
            finished += 1
    for part in parts[finished:]:
        yield part, _whole(collector, part)


def _batches(
    drawn: Sequence[tuple[int, int]], part_of: dict[int, int], size: int, room: int
) -> list[list[tuple[int, int]]]:
    """(label, index) pairs in batches of at most ``size`` samples and ``room`` parts."""
    batches: list[list[tuple[int, int]]] = [[]]
    parts: set[int] = set()
    for label, index in drawn:
        parts.add(part_of[label])
        if len(batches[-1]) == size or len(parts) > room:
            batches.append([])
            parts = {part_of[label]}
        batches[-1].append((label, index))
    return [batch for batch in batches if batch]


def _whole(collector: Collector, part: Part) -> Sums:
    """The sums of a part over all processes; the collector forgets them."""
    summed = dict.fromkeys(collector.counts_as.get(category, category) for category in part)
    # Not pop's default: it would make the large sums of a category that is there a second time.
    local = {
        category: collector.sums.pop(category) if category in collector.sums else collector.empty()
        for category in summed
    }
    return {category: total_sums(sums) for category, sums in local.items()}


def _in_passes(
    model: nn.Module,
    data: Iterable[Any],
    collector: Collector,
    room: int,
    separate: bool,
    progress: bool | None,
) -> Iterator[tuple[Part, Sums]]:
    """As many passes as it takes; in the usual case, one."""
    counts, postponed = _pass(bar(data, progress), model, collector, room)
    parts = list(joined(total_by_key(counts)).values())
    if postponed and processes() > 1:
        raise DataError(_too_many(room, "with several processes"))
    if not separate:
        for part in parts:
            collector.join(part)
    done = set(counts) - postponed
    while True:
        for part in [part for part in parts if processes() > 1 or done.issuperset(part)]:
            parts.remove(part)
            yield part, _whole(collector, part)
        if not parts:
            return
        if iter(data) is data:
            raise DataError(_too_many(room, "from data that can be iterated only once"))
        _, postponed = _pass(bar(data, progress), model, collector, room, done)
        done = set(counts) - postponed


def _too_many(room: int, where: str) -> str:
    return (
        f"there are more categories than the {room} whose sums fit into memory_limit, {where}; "
        "give a DataLoader over a data set with .targets, raise memory_limit, or pass "
        "categories=None"
    )


def _pass(
    data: Iterable[Any],
    model: nn.Module,
    collector: Collector,
    room: int,
    done: Collection[int] = (),
) -> tuple[Counter[int], set[int]]:
    """Add the samples of up to ``room`` categories that are not done.

    Returns:
        Samples seen of every category, and the categories left for another pass.
    """
    counts: Counter[int] = Counter()
    opened: set[int] = set()
    postponed: set[int] = set()
    summed = set(collector.sums)
    for number, batch in enumerate(data):
        inputs, labels, samples = entered(model, batch, number)
        if collector.categories != "labels" or labels is None:
            collector.add(model, inputs, labels, number)
            if len(collector.sums) > room:
                raise DataError(_too_many(room, "and they are not known before the model runs"))
            continue
        membership = members(torch.as_tensor(labels).detach().cpu(), samples)
        if not done:  # the first pass
            collector.count(membership, samples)
        for category, indices in membership.items():
            counts[category] += len(indices)
            under = collector.counts_as.get(category, category)
            if category in done or category in opened or category in postponed:
                continue
            if under in summed or len(summed) < room or not opened:
                summed.add(under)
                opened.add(category)
            else:
                postponed.add(category)
        admitted = opened.intersection(membership)
        if admitted:
            collector.add(model, *_only(inputs, labels, membership, admitted), number, admitted)
    if not counts:
        counts.update({c: sums.samples for c, sums in collector.sums.items()})
    return counts, postponed


def _only(
    inputs: Any, labels: Any, membership: dict[int, Tensor], admitted: set[int]
) -> tuple[Any, Any]:
    """Inputs and labels of the samples that count for an admitted category."""
    if len(admitted) == len(membership):
        return inputs, labels
    indices = torch.cat([membership[category] for category in admitted]).unique()
    return pick_samples(inputs, indices), pick_samples(torch.as_tensor(labels), indices)
