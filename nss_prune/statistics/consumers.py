"""Mean and covariance of every consumer's input, from one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nss_prune.core.batches import counted_batches, shared_data
from nss_prune.core.models import Forward, call_model, device_of, evaluation, run, submodule
from nss_prune.core.processes import agreed, gathered, processes
from nss_prune.graph.axes import check_fits, input_axis, map_positions, sides_by_consumer
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.statistics.capture import by_sample, map_shape, watched
from nss_prune.statistics.memory import BYTES, MEMORY_LIMIT, check_passes, mapped, parts_within
from nss_prune.statistics.moments import (
    ConsumerStatistics,
    Moments,
    add_moments_over_processes,
)
from nss_prune.statistics.survey import survey

WIDEST_MAP = 2048  # channels of a flattened map with a full covariance, which takes 32 MiB then


@agreed()
def consumer_statistics(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    forward: Forward = call_model,
    progress: bool | None = None,
    memory_limit: float = MEMORY_LIMIT,
) -> dict[str, ConsumerStatistics]:
    """Mean and covariance of what every consumer of the groups reads, in one forward-only pass.

    Takes 12 C² bytes for a consumer of C channels. The model is left as found.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them; labels are not used.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.
        memory_limit: Bytes for the sums of a pass. Where all take more there are several passes,
            and what is returned is in files that are mapped into memory.

    Returns:
        Consumer -> its statistics; a consumer that is never called is missing.

    Raises:
        DataError: The data is empty, or the model refuses it.
        NumericalError: A consumer reads NaN or infinite values.
        ModelMismatchError: The model does not have the groups.
    """
    check_fits(groups, model)
    data = shared_data(data)
    sizes = ConsumerSums(model, groups).bytes
    parts = parts_within(sizes, sizes.__getitem__, memory_limit)
    check_passes(data, len(parts), memory_limit)
    found: dict[str, ConsumerStatistics] = {}
    for names in parts:
        sums = ConsumerSums(model, groups, names=names)
        found.update(_one_pass(model, data, sums, forward, progress, len(parts) > 1))
    return found


def _one_pass(
    model: nn.Module,
    data: Iterable[Any],
    sums: ConsumerSums,
    forward: Forward,
    progress: bool | None,
    in_files: bool,
) -> dict[str, ConsumerStatistics]:
    norms: dict[str, str] = {}
    with evaluation(model), torch.no_grad():
        for number, inputs, samples in counted_batches(model, data, progress, "folding"):
            with sums.watching(samples):
                if number == 0:
                    norms = survey(model, sums.consumers, inputs, forward).norms
                else:
                    run(model, inputs, number, forward)
    return sums.statistics(next((found for found in gathered(norms) if found), {}), in_files)


class ConsumerSums:
    """Adds up what the consumers of a model read, whoever runs it.

    Args:
        groups: All groups of the model.
        names: The consumers, where others are left out.
        views: Of each sample, see :class:`nss_prune.core.views.Views`.

    Attributes:
        consumers: Consumer -> its sides, one for each group that it reads.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[NeuronGroup],
        views: int = 1,
        names: Collection[str] | None = None,
    ) -> None:
        self.consumers = {
            name: sides
            for name, sides in sides_by_consumer(groups).items()
            if names is None or name in names
        }
        self._model = model
        self._views = views
        self._moments: dict[str, Moments] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._whole = False

    @contextlib.contextmanager
    def watching(self, samples: int) -> Iterator[None]:
        """Add what is read inside, where the model is run once on ``samples`` samples."""

        def add(name: str, read: Tensor) -> None:
            module = submodule(self._model, name)
            if name not in self._moments:
                self._moments[name] = self._nothing(name, read.device)
            shape = map_shape(read, input_axis(module), samples)
            self._moments[name].add(by_sample(name, read, module, samples), shape)
            self._shapes[name] = tuple(read.shape[1:])

        with watched(self._model, self.consumers, add):
            yield

    def _nothing(self, name: str, device: torch.device) -> Moments:
        sides = self.consumers[name]
        repeats = summed_positions(submodule(self._model, name), sides)
        return Moments(sides[0].width, repeats, self._views, device)

    def add_over_processes(self) -> None:
        """Replace what was added here by what was added in all processes; once, at the end."""
        if processes() == 1 or self._whole:
            return
        self._whole = True
        for shapes in gathered(dict(self._shapes)):
            self._shapes = {**shapes, **self._shapes}
        home = device_of(self._model)
        names = [name for name in self.consumers if name in self._shapes]
        known = self._moments
        self._moments = {
            name: known[name] if name in known else self._nothing(name, home) for name in names
        }
        add_moments_over_processes(list(self._moments.values()))

    @property
    def bytes(self) -> dict[str, int]:
        """Consumer -> what its sums take."""
        units = {
            name: sides[0].width // summed_positions(submodule(self._model, name), sides)
            for name, sides in self.consumers.items()
        }
        return {name: BYTES * count**2 for name, count in units.items()}

    def moments(self, consumer: str) -> Moments:
        """What was added up of one consumer."""
        return self._moments[consumer]

    def surveyed(
        self, example_inputs: Any, forward: Forward = call_model, in_files: bool = False
    ) -> dict[str, ConsumerStatistics]:
        """:meth:`statistics`, with the norms that one more call of the model shows."""
        if not any(isinstance(module, _BatchNorm) for module in self._model.modules()):
            return self.statistics({}, in_files)
        with evaluation(self._model), torch.no_grad():
            found = survey(self._model, self.consumers, example_inputs, forward)
            return self.statistics(found.norms, in_files)

    def statistics(
        self, norms: Mapping[str, str], in_files: bool = False
    ) -> dict[str, ConsumerStatistics]:
        """Consumer -> its statistics; one that was never called is missing. Once: the sums go.

        Args:
            norms: See :class:`Survey`.
            in_files: Whether covariances are in files that are mapped into memory.

        Raises:
            NumericalError: A consumer read NaN or infinite values.
        """
        self.add_over_processes()
        found: dict[str, ConsumerStatistics] = {}
        for name in list(self._moments):  # one by one, so that sums and what is found never add up
            one = self._moments.pop(name).statistics(name, self._shapes[name], norms.get(name))
            found[name] = _in_file(one) if in_files else one
        return found


def _in_file(found: ConsumerStatistics) -> ConsumerStatistics:
    return replace(found, covariance=mapped(found.covariance), mean=found.mean.cpu())


def summed_positions(module: nn.Module, members: Sequence[Member]) -> int:
    """Channels that each row of a covariance stands for while it is summed."""
    return 1 if members[0].width <= WIDEST_MAP else map_positions(module, members)
