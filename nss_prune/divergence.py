"""How far the outputs drift for every number of neurons that go, foreseen from two matrices.

When neurons P of a group go and are folded into those that stay, S, what their readers miss is
x_P − B x_S, with covariance Σ_P|S = Σ_PP − Σ_PS Σ_SS⁻¹ Σ_SP. To second order the outputs then
diverge from those of the whole model, in nats of Kullback-Leibler divergence, by

    D(P) ≈ ½ tr(Γ_PP Σ_P|S),    Γ = E[Σ_positions g gᵀ],

where g is the gradient of −log p(y | x), with y drawn from the model's own p, by what the readers
read (or of what has the same covariance and varies less): the Fisher information of Optimal Brain
Surgeon (Hassibi, Stork, 1993), for whole neurons and after folding, with what the readers read in
the place of weights. Γ and Σ come from one pass over the data, forward and backward, and labels
are not used.

Neurons are eliminated one by one, each time the one that adds least. With W any root of Γ = WᵀW,
eliminating p adds ½ ‖w_p‖² / [Σ⁻¹]_pp exactly, after which W and Σ⁻¹ are those of the neurons that
are left; so one elimination gives the order of a group and D for every number of neurons.

On new samples the k neurons that stay say less of the others than on the n independent
observations that they were fitted to. As generalised cross-validation has it (Golub, Heath, Wahba,
1979), D is therefore divided by (1 − (k + 1) / n)². What they miss adds up over a sample, so that
several views of one are not as many observations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.activations import Reading, Watcher
from nss_prune.budget import Limits, ShareOf, solve
from nss_prune.categories import class_scores
from nss_prune.collector import alone, as_computed, run
from nss_prune.errors import NumericalError
from nss_prune.neurons import NeuronGroup, evaluation
from nss_prune.readers import Moments, ReaderStatistics, ReaderSums, counted_batches, spaced
from nss_prune.slicing import Slice
from nss_prune.views import views_of

ALLOCATIONS = 4
TOO_WIDE = 4  # neurons for each independent observation: their covariances are noise
LEAST_SHRINKAGE = 1e-8  # a neuron that is dead, or said by others, has no precision otherwise
ROUNDS = 16  # a round eliminates as many neurons as are left, divided by this


@dataclass(frozen=True)
class Elimination:
    """The neurons of a group in the order in which they can best be spared.

    Attributes:
        order: Neurons, the first to go first, ``[neurons]``.
        divergence: D after each of them, in nats a sample, ``[neurons]``, float64.
        growth: How much larger errors are on new samples than on those that the neurons that stay
            were fitted to, ``[neurons]``; None for as large.
    """

    order: Tensor
    divergence: Tensor
    growth: Tensor | None = None


@dataclass
class Sensitivity:
    """What one pass adds up for a group.

    Attributes:
        read: Mean and covariance of what its readers read.
        information: Σ over samples and positions of g gᵀ, ``[neurons, neurons]``, float64.
        effects: Σ over samples of e², e f and f², where e = Σ g x and f = Σ g over positions and
            readers, float64 ``[3, neurons]``.
    """

    read: Moments
    information: Tensor
    effects: Tensor


def eliminations(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    seed: int = 0,
    reads: ReaderSums | None = None,
    progress: bool | None = None,
) -> dict[str, Elimination]:
    """Layer -> its elimination, from one pass over the data; the model is left as found.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them; labels are not used. The outputs
            must be class scores.
        seed: For what is drawn at random.
        reads: To add what the readers read to, in the same pass.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        DataError: The data is empty, or the model refuses it or gives no class scores.
        NumericalError: A reader reads NaN or infinite values, or gets such gradients.
    """
    found = sensitivities(model, data, groups, seed=seed, reads=reads, progress=progress)
    return {name: eliminated(name, sums) for name, sums in found.items()}


def sensitivities(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    seed: int = 0,
    reads: ReaderSums | None = None,
    progress: bool | None = None,
) -> dict[str, Sensitivity]:
    """Layer -> its sums, see :func:`eliminations`."""
    found: dict[str, Sensitivity] = {}
    sizes = {group.name: group.size for group in groups}
    effects: dict[str, Tensor] = {}
    added = {} if reads is None else {g.name: name for g in groups if (name := _sole_reader(g))}

    def add(reading: Reading, gradient: Tensor) -> None:
        name = reading.group
        if name not in found:
            zeros = torch.zeros(
                sizes[name] + 3, sizes[name], dtype=torch.float64, device=gradient.device
            )
            found[name] = Sensitivity(Moments(views=views), zeros[3:], zeros[:3])
        activation, gradient = as_computed(reading.activation), as_computed(gradient)
        if name not in added:
            found[name].read.add(activation)
        _add_information(found[name].information, gradient)
        # Of all readers before they are squared: what a neuron does, it does in all of them.
        effects[name] = effects.get(name, 0) + _effects(activation, gradient)

    beside, views = alone if reads is None else reads.watching, views_of(data)
    generator = torch.Generator().manual_seed(seed)
    with evaluation(model), torch.enable_grad():
        for number, inputs, samples in counted_batches(model, data, progress, "divergence"):
            with Watcher(groups, samples, add).attached(model), beside(samples):
                scores = class_scores(run(model, inputs, number)).float()
                drawn_loss(scores, generator).backward()
            for name, (effect, total) in effects.items():
                squares = torch.stack([effect**2, effect * total, total**2])
                found[name].effects += squares.sum(1)
            effects.clear()
    if reads is not None:
        for name, reader in added.items():
            found[name].read = reads.moments(reader)
    return found


def _sole_reader(group: NeuronGroup) -> str | None:
    """The one layer that reads the neurons, where it reads nothing else and each as a channel."""
    if len(group.readers) != 1:
        return None
    (reader,) = group.readers
    neurons = torch.arange(group.size)
    alike = reader.width == group.size and reader.channels.equal(neurons)
    return reader.name if alike and reader.neurons.equal(neurons) else None


def _add_information(total: Tensor, gradient: Tensor) -> None:
    """Add Σ g gᵀ over the samples and positions of ``[samples, neurons, positions]``."""
    seen = spaced(gradient, 2)
    by_neuron = seen.transpose(0, 1).flatten(1)
    total.add_(by_neuron @ by_neuron.T, alpha=gradient.shape[2] / seen.shape[2])


def _effects(activation: Tensor, gradient: Tensor) -> Tensor:
    """Σ_positions g x and Σ_positions g, ``[2, samples, neurons]``; the arguments are
    ``[samples, neurons, positions]``."""
    effect = (activation * gradient).sum(2).double()
    return torch.stack([effect, gradient.sum(2).double()])


def drawn_loss(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A sum over samples whose gradient by the scores has the Fisher information for covariance.

    With random signs s, v = Σ_c s_c √p_c (1_c − p) has E[v vᵀ] = diag(p) − p pᵀ, as the gradient
    of −log p(y) with y drawn from p has. But a confident sample, where that is large for labels
    that are hardly ever drawn, shows as much in each draw. Scores are ``[samples, classes, ...]``.
    """
    by_place = scores.movedim(1, -1).flatten(0, -2)
    chances = by_place.detach().softmax(1)
    signs = torch.randint(2, chances.shape, generator=generator).to(chances) * 2 - 1
    roots = signs * chances.sqrt()
    return (by_place * (roots - chances * roots.sum(1, keepdim=True))).sum()


def eliminated(name: str, sums: Sensitivity) -> Elimination:
    """The elimination of one group.

    Raises:
        NumericalError: Its sums are NaN or infinite.
    """
    statistics = sums.read.statistics(name, (), None)
    if not torch.isfinite(sums.information.sum() + sums.effects.sum()):
        raise NumericalError(
            f"the gradients of what reads {name} are NaN or infinite; check the data and the "
            "model's weights"
        )
    apart = statistics.covariance.diagonal() * sums.information.diagonal() / statistics.samples
    effects = _effects_alone(sums, statistics)
    if len(apart) > TOO_WIDE * statistics.observations:
        return _independent(torch.where(apart > 0, effects, torch.zeros_like(effects)))
    # Γ and Σ are averages of their own; but a neuron that speaks for few samples matters for those.
    # Scaled by this, D is exact for each neuron that goes alone and leaves its mean.
    weights = torch.where(apart > 0, (effects / apart).sqrt(), torch.zeros_like(apart))
    information = weights[:, None] * (sums.information / statistics.samples) * weights
    found = eliminate(shrunk(statistics.covariance, statistics.observations), information)
    growth = _on_new_samples(found.divergence, sums.read.distinct(name))
    return replace(found, divergence=found.divergence * growth**2, growth=growth)


def _on_new_samples(divergence: Tensor, observations: float) -> Tensor:
    """What errors grow by where the neurons that stay were fitted to so many observations.

    They have at most half as many effective parameters, see :func:`nss_prune.ridge.ridge`.
    """
    left = torch.arange(len(divergence) - 1, -1, -1).to(divergence)
    parameters = (left + 1).clamp(max=observations / 2)
    return 1 / (1 - parameters / observations)


def _independent(costs: Tensor) -> Elimination:
    """Of neurons of which too little is known to fold one into others."""
    order = costs.argsort(stable=True)
    return Elimination(order, costs[order].cumsum(0) / 2)


def _effects_alone(sums: Sensitivity, statistics: ReaderStatistics) -> Tensor:
    """2 D of each neuron that goes alone and leaves its mean, ``[neurons]``."""
    mean = statistics.mean
    first, mixed, second = sums.effects / statistics.samples
    effects: Tensor = first - 2 * mean * mixed + mean**2 * second
    return effects.clamp(min=0)


def shrunk(covariance: Tensor, observations: float) -> Tensor:
    """A covariance that can be inverted: oracle approximating shrinkage.

    Chen, Wiesel, Eldar, Hero (2010), IEEE Transactions on Signal Processing 58(10), eq. 23.
    """
    size = len(covariance)
    trace, square = float(covariance.trace()), float(covariance.square().sum())
    numerator = (1 - 2 / size) * square + trace**2
    denominator = (observations + 1 - 2 / size) * (square - trace**2 / size)
    share = 1.0 if denominator <= 0 else min(1.0, max(LEAST_SHRINKAGE, numerator / denominator))
    smoothed = (1 - share) * covariance
    smoothed.diagonal().add_(share * trace / size + torch.finfo(torch.float64).tiny)
    return smoothed


def eliminate(covariance: Tensor, information: Tensor) -> Elimination:
    """Backward elimination, see the module's text.

    Args:
        covariance: Σ, positive definite float64 ``[neurons, neurons]``.
        information: Γ of one sample, ``[neurons, neurons]``.
    """
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    root = _root(information)
    alive = torch.arange(len(covariance), device=covariance.device)
    order, added = [], []
    while len(alive):
        costs = root.square().sum(0) / precision.diagonal()
        count = max(1, len(alive) // ROUNDS)
        out = costs.argsort(stable=True)[:count]
        # Within a round one by one as well: the Cholesky factor eliminates in the order given.
        factor = torch.linalg.cholesky(precision[out][:, out])
        scaled = torch.linalg.solve_triangular(factor, root[:, out].T, upper=False)
        added.append(scaled.square().sum(1) / 2)
        order.append(alive[out])
        stay = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stay[out] = False
        reach = torch.linalg.solve_triangular(factor, precision[out][:, stay], upper=False)
        root = root[:, stay] - scaled.T @ reach
        precision = precision[stay][:, stay] - reach.T @ reach
        alive = alive[stay]
    return Elimination(torch.cat(order), torch.cat(added).cumsum(0))


def _root(information: Tensor) -> Tensor:
    """W with WᵀW = Γ, to the rounding error with which Γ was summed."""
    unit = torch.eye(len(information)).to(information) * information.trace()
    for noise in (torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps):
        factor, failed = torch.linalg.cholesky_ex(information + noise * unit)
        if not failed:
            upper: Tensor = factor.T
            return upper
    variances, directions = torch.linalg.eigh(information)
    root: Tensor = variances.clamp(min=0).sqrt()[:, None] * directions.T
    return root


def slopes(divergence: Tensor) -> Tensor:
    """What each neuron of an elimination adds on the lower convex hull of D, ``[neurons]``.

    A budget can only be met at the corners of the hull; between them all neurons count alike.
    """
    values = [0.0, *divergence.tolist()]
    corners: list[int] = []
    for here in range(len(values)):
        while len(corners) > 1 and _is_above(values, corners[-2], corners[-1], here):
            corners.pop()
        corners.append(here)
    steps = torch.empty_like(divergence)
    for left, right in itertools.pairwise(corners):
        steps[left:right] = (values[right] - values[left]) / (right - left)
    return steps


def _is_above(values: Sequence[float], left: int, middle: int, right: int) -> bool:
    """Whether the middle one of three points is on or above the line through the others."""
    rise = (values[right] - values[left]) * (middle - left)
    return (values[middle] - values[left]) * (right - left) >= rise


def allocate(
    groups: tuple[NeuronGroup, ...],
    found: Mapping[str, Elimination],
    budget: float,
    share: ShareOf,
    limits: Limits,
) -> tuple[Slice, float]:
    """The slice of least divergence within a budget, layers added up.

    Removing what adds least for each unit of cost, of all layers together, minimises the sum under
    the budget, whose Lagrange multiplier is the threshold. What a neuron costs depends on how many
    are left around it, so the costs are those at the last solution, and the best of some rounds is
    taken.

    Args:
        found: Layer -> its elimination; layers without one are left alone.
        budget: Share of the cost to keep, in (0, 1].
        share: The share that a slice keeps.

    Returns:
        As :func:`nss_prune.budget.solve`.
    """
    current = Slice({group.name: torch.ones(group.size).bool() for group in groups}, groups)
    found = {group.name: found[group.name] for group in groups if group.name in found}
    solutions = []
    for _ in range(ALLOCATIONS):
        values = scores(groups, found, _costs(current, found, share))
        current, reached = solve(groups, values.__getitem__, budget, share, limits)
        solutions.append((reached > budget, foreseen(current, found), current, reached))
    _, _, best, reached = min(solutions, key=lambda solution: solution[:2])
    return best, reached


def foreseen(critical: Slice, found: Mapping[str, Elimination]) -> float:
    """Σ D of a slice that follows the eliminations, in nats a sample."""
    removed = {name: len(neurons) for name, neurons in critical.removed.items()}
    return sum(float(found[name].divergence[n - 1]) for name, n in removed.items())


def _costs(current: Slice, found: Mapping[str, Elimination], share: ShareOf) -> dict[str, float]:
    """Layer -> what one of its neurons costs, by sparing the next tenth of those left."""
    whole = share(current)
    costs = {}
    for name, elimination in found.items():
        kept = current.kept[name].clone()
        left = elimination.order.cpu()[kept[elimination.order.cpu()]]
        spared = left[: max(1, len(left) // 10)]
        kept[spared] = False
        without = Slice({**current.kept, name: kept}, current.groups) if kept.any() else current
        costs[name] = (whole - share(without)) / len(spared)
    return costs


def scores(
    groups: Sequence[NeuronGroup], found: Mapping[str, Elimination], costs: Mapping[str, float]
) -> dict[str, Tensor]:
    """Layer -> divergence for each unit of cost that a neuron saves, all different, ``[neurons]``.

    Args:
        costs: Layer -> what one of its neurons costs.
    """
    least = torch.finfo(torch.float64).tiny
    result = {group.name: torch.full((group.size,), torch.inf).double() for group in groups}
    for name, elimination in found.items():
        by_rank = slopes(elimination.divergence).cpu() / max(costs[name], least)
        ranks = torch.arange(len(by_rank))
        distinct = by_rank * (1 + 1e-9 * ranks) + least * ranks
        result[name][elimination.order.cpu()] = distinct
    return result
