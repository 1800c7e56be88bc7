"""What the removed neurons said, said by those that stay: folded into their readers.

A reader that loses its input channels P keeps the channels S. The best linear guess at what it
misses is x_P ≈ μ_P + B (x_S − μ_S) with B = Σ_PS (Σ_SS + λI)⁻¹, so its weights become
W_S + W_P B and W_P (μ_P − B μ_S) goes into its bias: a closed form, without labels and without
training. Every position of a kernel mixes the channels by the same B, so this holds for
convolutions of any kernel, stride, dilation and padding, transposed ones too, and within the
channel groups of grouped ones. Depthwise convolutions and norms pass neurons on without mixing
them and stay as they are.

Two things are approximate. Where a reader pads with zeros, or is transposed with a stride, the
constant differs between positions: its average over the output goes into the bias, which is the
best that a bias can do, and the rest counts as error. And the statistics are those of the whole
model: how other folded layers, or a norm over neurons of which some go, change what a reader
reads is seen by :func:`refit` alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nss_prune.collector import device_of
from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.neurons import check_fits, evaluation, input_axis, submodule
from nss_prune.readers import (
    Moments,
    ReaderStatistics,
    Survey,
    by_sample,
    counted_batches,
    map_positions,
    readings,
    sides_by_reader,
    summed_positions,
    survey,
)
from nss_prune.ridge import ridge
from nss_prune.slicing import Slice

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class ReaderFold:
    """How one reader changes.

    Attributes:
        weight: The new weight of the still unpruned reader; None where it stays.
        mixing: What it reads additionally, of what it reads: B of every channel group, float64
            ``[channel groups, units, units]``, zero but in the rows that go and the columns that
            stay; None where the weight stays. Units as in :class:`Problem`.
        constant: What is added to its output, float64 ``[outputs]``; None where nothing is.
        norm: The BatchNorm that takes the constant where the reader has no bias, or None.
        errors: E‖Δy‖² / E‖y‖² of its output y on the statistics, without folding and with it.
            Between the positions of a kernel no covariance is known: their errors add up.
        note: Why it was not folded, or only in part; "" where it was.
    """

    weight: Tensor | None = None
    mixing: Tensor | None = None
    constant: Tensor | None = None
    norm: str | None = None
    errors: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Folded:
    """What was folded.

    Attributes:
        notes: Readers that were not folded, or only in part, and why.
        errors: Reader -> E‖Δy‖² / E‖y‖² of its output on the calibration statistics, without
            folding and with it, as in :class:`ReaderFold`.
    """

    notes: tuple[str, ...]
    errors: dict[str, tuple[float, float]]


def fold(model: nn.Module, critical: Slice, statistics: Mapping[str, ReaderStatistics]) -> Folded:
    """Fold the neurons outside the slice into their readers, in place, before they are removed.

    Shapes stay; a reader that has neither a bias nor a BatchNorm behind it gets a bias. Weights
    and buffers are replaced by new ones and never written to, so that within
    :func:`nss_prune.removal.undone_on_error` an error puts the old ones back.

    Args:
        statistics: Of the same model, by :func:`nss_prune.readers.reader_statistics`.

    Raises:
        ModelMismatchError: The slice or the statistics are of another model.
    """
    return apply(model, folding(model, critical, statistics))


def folding(
    model: nn.Module, critical: Slice, statistics: Mapping[str, ReaderStatistics]
) -> dict[str, ReaderFold]:
    """Reader -> how it changes, for every reader that loses channels; nothing is changed.

    λ minimises the error that generalised cross-validation predicts for the reader's output; see
    :func:`nss_prune.ridge.ridge`. Where no λ is predicted to do better than the means alone, the
    weights stay. A flattened map is folded channel by channel where there are two observations
    for each kept channel, and otherwise neuron by neuron with the same B at all its positions.

    Raises:
        ModelMismatchError: The slice or the statistics are of another model.
    """
    check_fits(critical.groups, model)
    readers = sides_by_reader(critical.groups)
    shared = _shared_weights(model)
    folds = {}
    for (name, side), (member, channels) in critical.removed_channels().items():
        if side != "in":
            continue
        removed = torch.zeros(member.width, dtype=torch.bool)
        removed[channels] = True
        module = submodule(model, name)
        found = statistics[name].to(device_of(model)) if name in statistics else None
        reason = _reason_to_leave(module, found, shared)
        if found is None or reason:
            folds[name] = ReaderFold(note=f"{name} is left unfolded: {reason}")
            continue
        if len(found.mean) != member.width:
            raise ModelMismatchError(
                f"the statistics of {name} are of {len(found.mean)} channels, it reads "
                f"{member.width}; take them of this model before anything is removed"
            )
        found = _resolved(found, map_positions(module, readers[name]), int((~removed).sum()))
        folds[name] = _solved(name, module, _missing_channels(found, removed))
    return folds


def apply(model: nn.Module, folds: Mapping[str, ReaderFold]) -> Folded:
    """Change the readers as :func:`folding` found."""
    for name, change in folds.items():
        module: Any = submodule(model, name)
        if change.weight is not None:
            module.weight = nn.Parameter(change.weight, module.weight.requires_grad)
        if change.constant is None:
            continue
        if module.bias is None and change.norm is not None:
            norm: Any = submodule(model, change.norm)
            norm.running_mean = norm.running_mean - change.constant.to(norm.running_mean)
            continue
        old = module.weight.new_zeros(()) if module.bias is None else module.bias.detach()
        trained = (module.weight if module.bias is None else module.bias).requires_grad
        bias = (old.to(change.constant) + change.constant).to(module.weight)
        module.bias = nn.Parameter(bias, trained)
    return Folded(
        tuple(change.note for change in folds.values() if change.note),
        {name: change.errors for name, change in folds.items() if change.errors is not None},
    )


def refit(
    model: nn.Module,
    critical: Slice,
    data: Iterable[Any],
    *,
    progress: bool | None = None,
) -> Folded:
    """Fold in network order, each reader against what it read in the whole model; in place.

    All channels x of a reader's input in the whole model are approximated from the kept ones x̃
    as they are in the sliced model whose earlier readers are fitted already:
    x ≈ μ + B (x̃ − μ̃), where λ shrinks B towards leaving the weights as they are; first those that
    are removed, then what is still missed of all, with a λ of its own: there is less to be found.
    So a reader makes up for the errors of those before it too, and for norms that see fewer
    neurons. It pays after deep cuts, where samples abound: few of them say less of x̃ than
    :func:`fold` knows of x.

    It costs a pass over the data for every reader, in which both models run up to that reader
    (about readers × passes forward), and a copy of the model.

    Args:
        data: Batches that can be iterated again: a list or a DataLoader.
        progress: Show a progress bar over the readers; None for only on a terminal.

    Raises:
        ArgumentError: The data can be iterated only once.
        DataError, NumericalError: The data cannot be used.
        ModelMismatchError: The slice is of another model. In every case the model is as before.
    """
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"data is a {type(data).__name__}, which can be iterated only once, and refit takes a "
            "pass for every reader; give a list of batches or a DataLoader"
        )
    check_fits(critical.groups, model)
    readers = sides_by_reader(critical.groups)
    shared = _shared_weights(model)
    sliced = copy.deepcopy(model)
    folds: dict[str, ReaderFold] = {}
    with evaluation(model), evaluation(sliced), torch.no_grad():
        _, inputs, _ = next(counted_batches(model, data, False, ""))
        shown = survey(model, readers, inputs)
        hidden = None if progress is None else not progress
        for name in tqdm(shown.calls, desc="refit", unit="reader", leave=False, disable=hidden):
            module = submodule(model, name)
            summed = summed_positions(module, readers[name])
            both = _both_readings(model, sliced, critical, name, data, shown, summed)
            reason = _reason_to_leave(module, both, shared)
            if reason:
                folds[name] = ReaderFold(note=f"{name} is left unfolded: {reason}")
                continue
            removed = _removed_channels(critical, name, len(both.mean) // 2)
            both = _resolved(both, map_positions(module, readers[name]), int((~removed).sum()))
            folds[name] = _solved(name, module, _changed_channels(both, removed))
            apply(sliced, {name: folds[name]})
    return apply(model, folds)


def _removed_channels(critical: Slice, name: str, width: int) -> Tensor:
    """True for the channels that a reader loses, ``[channels]``."""
    removed = torch.zeros(width, dtype=torch.bool)
    found = critical.removed_channels().get((name, "in"))
    if found is not None:
        removed[found[1]] = True
    return removed


def _both_readings(
    model: nn.Module,
    sliced: nn.Module,
    critical: Slice,
    name: str,
    data: Iterable[Any],
    shown: Survey,
    repeats: int,
) -> ReaderStatistics:
    """Of ``[2 channels]``: what a reader reads in the whole model, then in the sliced one."""
    moments = Moments(repeats)
    shape: tuple[int, ...] = ()
    module = submodule(model, name)
    for number, inputs, samples in counted_batches(model, data, False, ""):
        wholes = readings(model, name, inputs, number, shown.calls[name])
        with critical.masked(sliced):
            slices = readings(sliced, name, inputs, number, shown.calls[name])
        for whole, part in zip(wholes, slices, strict=True):
            values = [by_sample(name, read, module, samples) for read in (whole, part)]
            moments.add(torch.cat(values, dim=1))
            shape = tuple(whole.shape[1:])
    return moments.statistics(name, shape, shown.norms.get(name))


@dataclass(frozen=True)
class Problem:
    """What a reader misses, and what is left to say it with.

    Units are channels, or the neurons of a flattened map with ``repeats`` channels each.

    Attributes:
        missing: Covariance of what is missed, ``[units, units]``.
        cross: Covariance of what is missed (rows) with what is left (columns).
        known: Covariance of what is left.
        whole: Covariance of what the reader of the whole model reads.
        missing_mean: ``[units, repeats]``, and so are ``known_mean`` and ``whole_mean``.
        targets: True where something may be missed, ``[units]``, for each of the ridges that say
            it one after the other; what one leaves is for the next. The last are all of them.
        kept: True where something is left, ``[units]``.
        source: The statistics that all this is from.
    """

    missing: Tensor
    cross: Tensor
    known: Tensor
    whole: Tensor
    missing_mean: Tensor
    known_mean: Tensor
    whole_mean: Tensor
    targets: tuple[Tensor, ...]
    kept: Tensor
    source: ReaderStatistics

    def split(self, groups: int) -> list[Problem]:
        """The problems of the channel groups, which do not read each other's channels."""
        size = len(self.kept) // groups
        parts = []
        for start in range(0, len(self.kept), size):
            units = slice(start, start + size)
            pairs = (units, units)
            parts.append(
                Problem(
                    self.missing[pairs],
                    self.cross[pairs],
                    self.known[pairs],
                    self.whole[pairs],
                    self.missing_mean[units],
                    self.known_mean[units],
                    self.whole_mean[units],
                    tuple(target[units] for target in self.targets),
                    self.kept[units],
                    self.source,
                )
            )
        return parts


def _resolved(statistics: ReaderStatistics, repeats: int, kept: int) -> ReaderStatistics:
    """Neuron by neuron, where the channels of a flattened map are too many for the samples."""
    return statistics if statistics.observations >= 2 * kept else statistics.by_neuron(repeats)


def _missing_channels(statistics: ReaderStatistics, removed: Tensor) -> Problem:
    """The removed channels are missed, the others are as they were."""
    covariance = statistics.covariance
    mean = statistics.mean.view(len(covariance), -1)
    gone = removed.view(mean.shape)[:, 0].to(mean.device)
    return Problem(
        missing=covariance,
        cross=covariance,
        known=covariance,
        whole=covariance,
        missing_mean=mean * gone[:, None],
        known_mean=mean,
        whole_mean=mean,
        targets=(gone,),
        kept=~gone,
        source=statistics,
    )


def _changed_channels(both: ReaderStatistics, removed: Tensor) -> Problem:
    """Whatever the sliced model gives otherwise than the whole one is missed.

    Args:
        both: Of ``[2 channels]``, see :func:`_both_readings`.
    """
    units = len(both.covariance) // 2
    whole, part = both.mean.view(2, units, -1)
    by_model = both.covariance.view(2, units, 2, units)
    first, second, mixed = by_model[0, :, 0], by_model[1, :, 1], by_model[0, :, 1]
    gone = removed.view(whole.shape)[:, 0].to(whole.device)
    return Problem(
        missing=first - mixed - mixed.T + second,
        cross=mixed - second,
        known=second,
        whole=first,
        missing_mean=whole - part,
        known_mean=part,
        whole_mean=whole,
        targets=(gone, torch.ones_like(gone)),
        kept=~gone,
        source=both,
    )


def _solved(name: str, module: nn.Module, problem: Problem) -> ReaderFold:
    """How a reader changes so that it misses as little as can be."""
    shape = problem.source.shape
    weight = _by_group(module, problem.whole_mean.shape[1])
    parts = problem.split(len(weight))
    grams = torch.einsum("gouk,govk->guv", weight, weight)
    pairs = list(zip(parts, grams, strict=True))
    power = sum(_weighted(part.whole, gram) for part, gram in pairs)
    power += _constant(module, shape, problem.whole_mean).power
    missed = sum(_weighted(part.missing, gram, part.targets[-1]) for part, gram in pairs)
    alone = _constant(module, shape, problem.missing_mean)
    noise = EPSILON * power * len(problem.kept)
    if missed + alone.power <= noise:
        return ReaderFold(errors=(0.0, 0.0))

    before = (missed + alone.power) / power
    mixings = [_mixing(part, gram, noise) for part, gram in pairs]
    mixed_missed = sum(mixing.missed for mixing in mixings)
    guesses = [m.matrix @ part.known_mean for m, part in zip(mixings, parts, strict=True)]
    with_mixing = _constant(module, shape, problem.missing_mean - torch.cat(guesses))
    note = "; ".join(dict.fromkeys(mixing.note for mixing in mixings if mixing.note))
    note = f"{name}: {note}" if note else ""
    # Only where it pads: elsewhere the ridge never does worse than the means alone.
    worse = mixed_missed + with_mixing.uneven > missed + alone.uneven
    constant = alone if worse else with_mixing
    after = (missed if worse else mixed_missed) + constant.uneven
    new = matrices = None
    if not worse and any(mixing.matrix.any() for mixing in mixings):
        matrices = torch.stack([mixing.matrix for mixing in mixings])
        mixed = weight + torch.einsum("gouk,guv->govk", weight, matrices)
        new = _as_weight(mixed, module).to(module.weight)  # type: ignore[arg-type]
    return ReaderFold(
        weight=new,
        mixing=matrices,
        constant=constant.average if constant.average.square().sum() > noise else None,
        norm=problem.source.norm,
        errors=(before, after / power),
        note=note,
    )


@dataclass(frozen=True)
class Mixing:
    """B of one channel group.

    Attributes:
        matrix: ``[units, units]``, zero but in the rows missed and the columns kept.
        missed: E‖W (z − B x̃)‖² of what is missed z, centred.
        note: Why it is zero, or "".
    """

    matrix: Tensor
    missed: float
    note: str = ""


def _mixing(problem: Problem, gram: Tensor, noise: float) -> Mixing:
    matrix = torch.zeros_like(gram)
    kept = problem.kept.nonzero().flatten()
    known = problem.known[kept][:, kept]
    squares = known.diagonal() + problem.known_mean[kept].square().mean(1)
    floor = EPSILON * len(kept) * float(squares.max()) if len(kept) else 0.0
    left = 0.0
    for targets in problem.targets:
        missing, cross = _still_missed(problem, matrix)
        left = _weighted(missing, gram, targets)
        if left <= noise:
            continue
        target = targets.nonzero().flatten()
        found = ridge(
            missing=missing[target][:, target],
            cross=cross[target][:, kept],
            known=known,
            gram=gram[target][:, target],
            floor=floor,
            observations=problem.source.observations,
        )
        if found is not None:
            solution, left = found
            matrix[target[:, None], kept] += solution
    if left > noise and not matrix.any():
        return Mixing(matrix, left, _why_only_means(problem.source, len(kept)))
    return Mixing(matrix, left)


def _still_missed(problem: Problem, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of z − B x̃ for a B, and its covariance with x̃."""
    if not matrix.any():
        return problem.missing, problem.cross
    said = matrix @ problem.cross.T
    known = matrix @ problem.known
    return problem.missing - said - said.T + known @ matrix.T, problem.cross - known


def _why_only_means(source: ReaderStatistics, kept: int) -> str:
    worth = f"{source.samples} samples (worth {source.observations:.0f} independent observations)"
    if source.observations < 2 * (kept + 1):
        return f"{worth} are too few for its {kept} kept channels: only means are folded"
    return f"its {kept} kept channels say nothing of the others in {worth}: only means are folded"


def _weighted(covariance: Tensor, gram: Tensor, units: Tensor | None = None) -> float:
    """tr(gram · covariance) over some units: the variance that a reader makes of it."""
    product = gram * covariance
    if units is not None:
        product = product * units[:, None] * units
    return max(0.0, float(product.sum()))


@dataclass(frozen=True)
class Constant:
    """What a reader makes of a constant map, over its positions.

    Attributes:
        average: ``[outputs]``.
        power: Mean square, summed over the outputs.
        uneven: Variance over the positions, summed over the outputs: 0 but where it pads with
            zeros or is transposed with a stride.
    """

    average: Tensor
    power: float
    uneven: float


def _constant(module: nn.Module, shape: Sequence[int], means: Tensor) -> Constant:
    """What a reader without its bias makes of ``means``, ``[units, repeats]``."""
    weight: Any = module.weight
    constant_map = _constant_map(module, shape, means.flatten())
    outputs = _response(module, weight.detach().double(), constant_map)
    average = outputs.mean(1)
    uneven = float((outputs - average[:, None]).square().mean(1).sum())
    return Constant(average, float(outputs.square().mean(1).sum()), uneven)


def _constant_map(module: nn.Module, shape: Sequence[int], values: Tensor) -> Tensor:
    """``[1, channels]``, or ``[1, channels, ...]`` of the size of ``shape``."""
    if input_axis(module) != 1:
        return values[None]
    sizes = shape[1:]
    return values.view(1, -1, *[1] * len(sizes)).expand(1, -1, *sizes)


def _response(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """What a module with another weight and no bias makes of a sample, ``[outputs, positions]``."""
    twin = copy.copy(module)
    others = {
        name: None if value is None else value.detach().double()
        for name, value in module._parameters.items()
    }
    parameters: dict[str, Any] = {**others, "weight": weight, "bias": None}
    twin._parameters = parameters
    twin.training = False
    with torch.no_grad():
        outputs: Tensor = twin.forward(inputs)
    return outputs[0].reshape(outputs.shape[1], -1)


def _by_group(module: nn.Module, repeats: int) -> Tensor:
    """The weight as float64 ``[channel groups, outputs, units, kernel positions]``.

    A linear layer over a flattened map is a convolution whose kernel is as large as the map.
    """
    weight: Tensor = module.weight.detach().double()  # type: ignore[operator, union-attr]
    if not isinstance(module, nn.modules.conv._ConvNd):
        return weight.reshape(1, len(weight), -1, repeats)
    by_group = weight.reshape(module.groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.transpose(1, 2) if module.transposed else by_group


def _as_weight(by_group: Tensor, module: nn.Module) -> Tensor:
    """What :func:`_by_group` made, in the shape that the module has."""
    weight: Any = module.weight
    is_transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
    ordered = by_group.transpose(1, 2) if is_transposed else by_group
    return ordered.reshape(weight.shape)


def _reason_to_leave(
    module: nn.Module, statistics: ReaderStatistics | None, shared: Collection[int]
) -> str:
    """Why a reader cannot be folded into, or ""."""
    if statistics is None:
        return "there are no statistics of it"
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return f"it is a {type(module).__name__}"
    if id(module.weight) in shared:
        return "another layer has the same weight"
    if not _mixes_channels(module, statistics.shape):
        return f"its type {type(module).__name__} does more with its weight than mix channels"
    return ""


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules hold, or one under several names."""
    counts = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {parameter for parameter, count in counts.items() if count > 1}


def _mixes_channels(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether scaling the weight's input channels is the same as scaling the inputs.

    It is not where a subclass standardizes its weight, for example.
    """
    weight = _by_group(module, 1)
    generator = torch.Generator().manual_seed(0)
    groups, _, channels, _ = weight.shape
    factors = 0.5 + torch.rand(groups, channels, generator=generator, dtype=torch.float64)
    factors = factors.to(weight.device)
    scaled = _as_weight(weight * factors[:, None, :, None], module)
    original = _as_weight(weight, module)
    inputs = factors.flatten()
    small = _cropped(module, shape)
    try:
        inside = _response(module, scaled, _constant_map(module, small, torch.ones_like(inputs)))
        outside = _response(module, original, _constant_map(module, small, inputs))
    except Exception:  # a forward of its own that needs more than this
        return False
    return torch.allclose(inside, outside, rtol=1e-9, atol=1e-9 * float(outside.abs().max()))


def _cropped(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a map that is large enough for the kernel, and no larger than must be."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return tuple(shape)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = (min(size, 2 * least + 8) for size, least in zip(shape[1:], reach, strict=True))
    return (shape[0], *sizes)
