"""What the readers of a model read: its mean and covariance, and what follows the readers."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from nss_prune.categories import class_scores
from nss_prune.collector import as_computed, check_inputs, run, split_batch
from nss_prune.errors import DataError, NumericalError
from nss_prune.neurons import (
    Member,
    NeuronGroup,
    check_fits,
    evaluation,
    input_axis,
    submodule,
    tensors_in,
)
from nss_prune.similarity import evenly_spaced

POSITIONS = 64  # of a map that are looked at, as in nss_prune.similarity.Landscape
WIDEST_MAP = 2048  # channels of a flattened map with a full covariance, which takes 32 MiB then


@dataclass(frozen=True)
class ReaderStatistics:
    """What one reader reads, over all samples and positions.

    Attributes:
        mean: ``[channels]``, float64.
        covariance: ``[channels, channels]``, float64. Of a flattened map of more than
            ``WIDEST_MAP`` channels ``[neurons, neurons]``: the average over the positions of the
            map, each with its own mean.
        rows: Number of (sample, position) pairs.
        samples: Number of samples, each of their views counted.
        observations: The number of independent observations that the rows are worth, because
            the positions of a sample resemble each other: rows over the design effect of cluster
            sampling (Kish, Survey Sampling, 1965), which is samples · tr Σ / tr Σ̄ where Σ̄ is
            the covariance of the samples' averages over their positions.
        shape: Of the input, without the samples.
        norm: The BatchNorm that reads what the reader puts out, and alone does so, or None.
    """

    mean: Tensor
    covariance: Tensor
    rows: int
    samples: int
    observations: float
    shape: tuple[int, ...]
    norm: str | None = None

    def to(self, device: torch.device | str) -> ReaderStatistics:
        """The same on another device."""
        return replace(self, mean=self.mean.to(device), covariance=self.covariance.to(device))

    @property
    def repeats(self) -> int:
        """Channels that each row of the covariance stands for."""
        return len(self.mean) // len(self.covariance)

    def by_neuron(self, repeats: int) -> ReaderStatistics:
        """The covariance of the neurons of a flattened map that has ``repeats`` positions."""
        if self.repeats == repeats:
            return self
        neurons = len(self.mean) // repeats
        blocks = self.covariance.view(neurons, repeats, neurons, repeats)
        covariance = blocks.diagonal(dim1=1, dim2=3).mean(-1)
        rows = self.rows * repeats
        between = float(blocks.mean((1, 3)).trace())
        worth = _independent(self.samples, rows, float(covariance.trace()), between)
        return replace(self, covariance=covariance, rows=rows, observations=worth)


def reader_statistics(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    progress: bool | None = None,
) -> dict[str, ReaderStatistics]:
    """Mean and covariance of what every reader of the groups reads, in one forward-only pass.

    Takes 8 C² bytes for a reader of C channels. The model is left as found.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them; labels are not used.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        Reader -> its statistics; a reader that is never called is missing.

    Raises:
        DataError: The data is empty, or the model refuses it.
        NumericalError: A reader reads NaN or infinite values.
        ModelMismatchError: The model does not have the groups.
    """
    check_fits(groups, model)
    sums = ReaderSums(model, groups)
    norms: dict[str, str] = {}
    with evaluation(model), torch.no_grad():
        for number, inputs, samples in counted_batches(model, data, progress, "folding"):
            with sums.watching(samples):
                if number == 0:
                    norms = survey(model, sums.readers, inputs).norms
                else:
                    run(model, inputs, number)
    return sums.statistics(norms)


class ReaderSums:
    """Adds up what the readers of a model read, whoever runs it.

    Args:
        views: Of each sample, see :class:`nss_prune.views.Views`.

    Attributes:
        readers: Reader -> its sides, one for each group that it reads.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup], views: int = 1) -> None:
        self.readers = sides_by_reader(groups)
        self._model = model
        self._views = views
        self._moments: dict[str, Moments] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    @contextlib.contextmanager
    def watching(self, samples: int) -> Iterator[None]:
        """Add what is read inside, where the model is run once on ``samples`` samples."""

        def add(name: str, read: Tensor) -> None:
            module = submodule(self._model, name)
            if name not in self._moments:
                repeats = summed_positions(module, self.readers[name])
                self._moments[name] = Moments(repeats, self._views)
            self._moments[name].add(by_sample(name, read, module, samples))
            self._shapes[name] = tuple(read.shape[1:])

        with watched(self._model, self.readers, add):
            yield

    def moments(self, reader: str) -> Moments:
        """What was added up of one reader."""
        return self._moments[reader]

    def surveyed(self, example_inputs: Any) -> dict[str, ReaderStatistics]:
        """:meth:`statistics`, with the norms that one more call of the model shows."""
        if not any(isinstance(module, _BatchNorm) for module in self._model.modules()):
            return self.statistics({})
        with evaluation(self._model), torch.no_grad():
            return self.statistics(survey(self._model, self.readers, example_inputs).norms)

    def statistics(self, norms: Mapping[str, str]) -> dict[str, ReaderStatistics]:
        """Reader -> its statistics; one that was never called is missing.

        Args:
            norms: See :class:`Survey`.

        Raises:
            NumericalError: A reader read NaN or infinite values.
        """
        return {
            name: moments.statistics(name, self._shapes[name], norms.get(name))
            for name, moments in self._moments.items()
        }


class Moments:
    """Mean and covariance of a stream, in float64 around the mean of its first batch.

    Args:
        repeats: Channels that each row of the covariance stands for.
        views: Of each sample, one after the other.
    """

    def __init__(self, repeats: int = 1, views: int = 1) -> None:
        self.repeats = repeats
        self.views = views
        self.samples = 0
        self.rows = 0
        self._shift: Tensor | None = None
        self._found: ReaderStatistics | None = None

    def add(self, values: Tensor) -> None:
        """Add ``[samples, channels, positions]``."""
        seen = spaced(values, 2).double()
        samples, channels, positions = seen.shape
        seen = seen.reshape(samples, channels // self.repeats, self.repeats, positions)
        if self._shift is None:
            self._shift = seen.mean((0, 3))
            units = len(self._shift)
            self._total = torch.zeros_like(self._shift)
            self._matrix = seen.new_zeros(units, units)
            self._by_view, self._by_sample = seen.new_zeros(2, 2, units)
        centred = seen - self._shift[:, :, None]
        self._total += centred.sum((0, 3))
        picked = spaced(centred, 2)
        by_unit = picked.transpose(0, 1).flatten(1)
        self._matrix += by_unit @ by_unit.T
        by_view = picked.mean((2, 3))
        by_sample = by_view.unflatten(0, (-1, self.views)).mean(1)
        self._by_view += torch.stack([by_view.sum(0), by_view.square().sum(0)])
        self._by_sample += torch.stack([by_sample.sum(0), by_sample.square().sum(0)])
        self.samples += samples
        self.rows += samples * positions
        self._found = None

    def statistics(self, name: str, shape: tuple[int, ...], norm: str | None) -> ReaderStatistics:
        """Of everything added.

        Raises:
            NumericalError: Something added was NaN or infinite.
        """
        if self._found is None:
            self._found = self._statistics(name)
        return replace(self._found, shape=shape, norm=norm)

    def distinct(self, name: str) -> float:
        """Observations for what adds up over a sample: its views resemble each other as well.

        As ``observations`` of :class:`ReaderStatistics`, with averages over positions and views.
        """
        found = self.statistics(name, (), None)
        samples = self.samples / self.views
        between = _variance(self._by_sample / samples)
        return _independent(samples, found.rows, float(found.covariance.trace()), between)

    def _statistics(self, name: str) -> ReaderStatistics:
        assert self._shift is not None
        offset = self._total / self.rows
        if not torch.isfinite(self._matrix.sum() + offset.sum()):
            raise NumericalError(
                f"{name} reads NaN or infinite values; check the data and the model's weights"
            )
        picked = spaced(offset, 1)
        rows = self.rows * picked.shape[1]
        covariance = self._matrix / rows
        covariance.addmm_(picked, picked.T, alpha=-1 / picked.shape[1])
        covariance = covariance.add_(covariance.T.clone()).div_(2)
        between = _variance(self._by_view / self.samples)
        return ReaderStatistics(
            mean=(self._shift + offset).flatten(),
            covariance=covariance,
            rows=rows,
            samples=self.samples,
            observations=_independent(self.samples, rows, float(covariance.trace()), between),
            shape=(),
        )


def spaced(values: Tensor, axis: int) -> Tensor:
    """At most ``POSITIONS`` evenly spaced entries along an axis."""
    available = values.shape[axis]
    if available <= POSITIONS:
        return values
    return values.index_select(axis, evenly_spaced(available, POSITIONS).to(values.device))


def _variance(averages: Tensor) -> float:
    """Σ of the variances, from averages of values and of their squares, ``[2, units]``."""
    mean, square = averages
    return float((square - mean.square()).sum())


def _independent(samples: float, rows: int, variance: float, between: float) -> float:
    """Independent observations in rows that come in clusters, see :class:`ReaderStatistics`."""
    if between * rows <= variance * samples:
        return float(rows)
    return samples * max(1.0, variance / between)


def sides_by_reader(groups: Sequence[NeuronGroup]) -> dict[str, list[Member]]:
    """Reader -> its sides, one for each group that it reads."""
    found: dict[str, list[Member]] = {}
    for group in groups:
        for member in group.readers:
            # The channels of a head have nothing in common, as the positions of a map have.
            side = member if group.has_channels else replace(member, neurons=member.channels)
            found.setdefault(member.name, []).append(side)
    return found


def map_positions(module: nn.Module, members: Sequence[Member]) -> int:
    """Positions of the flattened map that a linear reader reads neuron by neuron, or 1."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    repeats = len(members[0].neurons) // len(members[0].neurons.unique())
    return repeats if all(_is_flattened(member, repeats) for member in members) else 1


def _is_flattened(member: Member, repeats: int) -> bool:
    """Whether the channels of each neuron are a block of ``repeats`` in a regular layout."""
    if member.width % repeats or len(member.channels) % repeats:
        return False
    blocks, neurons = member.channels.view(-1, repeats), member.neurons.view(-1, repeats)
    return bool(
        (blocks[:, 0] % repeats == 0).all()
        and (blocks - blocks[:, :1] == torch.arange(repeats)).all()
        and (neurons == neurons[:, :1]).all()
    )


def summed_positions(module: nn.Module, members: Sequence[Member]) -> int:
    """Channels that each row of a covariance stands for while it is summed."""
    return 1 if members[0].width <= WIDEST_MAP else map_positions(module, members)


def counted_batches(
    model: nn.Module, data: Iterable[Any], progress: bool | None, label: str
) -> Iterator[tuple[int, Any, int]]:
    """(number, inputs, samples) of every batch.

    Raises:
        DataError: There is none, or it cannot be used.
    """
    number = -1
    hidden = None if progress is None else not progress
    for number, batch in enumerate(
        tqdm(data, desc=label, unit="batch", leave=False, disable=hidden)
    ):
        inputs, _ = split_batch(batch)
        yield number, inputs, check_inputs(model, inputs, number)
    if number < 0:
        raise DataError("the data has no batches; give at least one batch of (inputs, labels)")


def scores_by_place(
    model: nn.Module, data: Iterable[Any], progress: bool | None, label: str
) -> Iterator[tuple[Tensor, int]]:
    """The class scores of every batch, ``[places, classes]`` sample by sample, and its samples.

    Raises:
        DataError: There is no batch, it cannot be used, or the model gives no class scores.
    """
    for number, inputs, samples in counted_batches(model, data, progress, label):
        scores = as_computed(class_scores(run(model, inputs, number)))
        yield scores.movedim(1, -1).flatten(0, -2), samples


@contextlib.contextmanager
def watched(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see`` with the name and the input of every reader that is called inside."""

    def hook(name: str) -> Any:
        return lambda module, arguments: see(name, arguments[0].detach())

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(submodule(model, name).register_forward_pre_hook(hook(name)).remove)
        yield


def by_sample(name: str, read: Tensor, module: nn.Module, samples: int) -> Tensor:
    """What a reader reads as ``[samples, channels, positions]``.

    Raises:
        DataError: Its first axis does not hold the samples.
    """
    if read.shape[0] % samples:
        raise DataError(
            f"{name} reads {tuple(read.shape)} for {samples} samples; the first axis of its input "
            "must hold the samples"
        )
    by_channel = read.movedim(input_axis(module), 1)
    channels = by_channel.shape[1]
    split = by_channel.reshape(samples, -1, channels, *by_channel.shape[2:])
    return split.movedim(1, 2).flatten(2)


class _Reached(BaseException):
    """Leaves a forward pass when it has come far enough; no Exception, so nothing handles it."""


def readings(model: nn.Module, name: str, inputs: Any, number: int, calls: int) -> list[Tensor]:
    """What a reader reads in its first ``calls`` calls; the model runs no further."""
    found: list[Tensor] = []

    def see(_: str, read: Tensor) -> None:
        found.append(read.clone())
        if len(found) == calls:
            raise _Reached

    with watched(model, [name], see), contextlib.suppress(_Reached):
        run(model, inputs, number)
    return found


@dataclass(frozen=True)
class Survey:
    """What one forward pass shows of the readers.

    Attributes:
        calls: Reader -> number of calls, in the order of the first ones.
        norms: Reader -> the BatchNorm that reads what it puts out, where nothing else does and
            both are called once.
    """

    calls: dict[str, int]
    norms: dict[str, str]


def survey(model: nn.Module, readers: Iterable[str], inputs: Any) -> Survey:
    """Run one batch and see who is called, and what reads what they put out."""
    followed = _Followed()
    with contextlib.ExitStack() as stack:
        for name in readers:
            hook = submodule(model, name).register_forward_hook(followed.reader_hook(name))
            stack.callback(hook.remove)
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                norm_hook = module.register_forward_pre_hook(followed.norm_hook(name))
                stack.callback(norm_hook.remove)
        with followed:
            outputs = run(model, inputs, 0)
    for tensor in tensors_in(outputs):
        followed.count(tensor)
    norms = {
        name: norm
        for name, norm in followed.norms.items()
        if followed.calls[name] == followed.norm_calls[norm] == followed.uses[name] == 1
        and submodule(model, norm).running_mean is not None
    }
    return Survey(dict(followed.calls), norms)


class _Followed(TorchFunctionMode):
    """Counts the functions that make tensors of what readers put out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.norm_calls: Counter[str] = Counter()
        self.uses: Counter[str] = Counter()
        self.norms: dict[str, str] = {}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def reader_hook(self, name: str) -> Any:
        """To be called after a reader."""

        def made(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.calls[name] += 1
            self._outputs[id(output)] = (weakref.ref(output), name)

        return made

    def norm_hook(self, norm: str) -> Any:
        """To be called before a norm."""

        def read(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.norm_calls[norm] += 1
            name = self._reader_of(arguments[0])
            if name is not None:
                self.norms[name] = norm

        return read

    def count(self, tensor: Tensor) -> None:
        """Count a use of a tensor, if a reader has put it out."""
        name = self._reader_of(tensor)
        if name is not None:
            self.uses[name] += 1

    def _reader_of(self, tensor: Tensor) -> str | None:
        reference, name = self._outputs.get(id(tensor), (None, ""))
        return name if reference is not None and reference() is tensor else None

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if tensors_in(result):  # asking for its shape is no use
            for tensor in tensors_in((arguments, keywords or {})):
                self.count(tensor)
        return result
