"""NSSImportance as importance= of torch-pruning's own pruners."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from networks import batches, cnn, mlp
from nss_prune import NSSImportance, Profile, profile
from nss_prune.errors import ModelMismatchError
from reference import algorithm_1, taylor

INPUTS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return cnn().eval()


@pytest.fixture
def known(model: nn.Sequential) -> Profile:
    return profile(model, batches(48, (3, 12, 12), 3))


def test_what_lies_above_one_minus_theta_is_what_algorithm_1_keeps() -> None:
    """At every θ between two scores, with contributions and activations by hand."""
    torch.manual_seed(0)
    model, data = mlp().eval(), batches(48, (12,), 3)
    inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    importance = NSSImportance(profile(model, data))
    graph = tp.DependencyGraph().build_dependency(model, (inputs[:2],))
    for layer, consumer in ((1, 3), (3, 5)):
        width = model[layer].out_features
        members = (model[layer], tp.prune_linear_out_channels, list(range(width)))
        scores = importance(graph.get_pruning_group(*members)).double()
        of_category = [
            (
                model[:consumer](inputs[mine]).detach(),
                taylor(model, consumer, inputs[mine], labels[mine]),
            )
            for mine in (labels == category for category in range(3))
        ]
        between = scores.sort().values.unfold(0, 2, 1)
        bounds = [float(pair.mean()) for pair in between if pair[1] - pair[0] > 1e-5]
        assert len(bounds) > width // 2
        for bound in bounds:
            kept = set.union(*(algorithm_1(*values, 1 - bound) for values in of_category))
            assert set((scores > bound).nonzero().flatten().tolist()) == kept


def test_scores_are_distinct_and_stay_so_in_double(model, known) -> None:
    graph = tp.DependencyGraph().build_dependency(model, (INPUTS,))
    importance = NSSImportance(known)
    for group in graph.get_all_groups(ignored_layers=[model[9]]):
        scores = importance(group)
        assert scores.dtype == torch.float32
        assert scores.is_contiguous()
        assert len(scores.unique()) == len(scores)
        assert torch.equal(scores.argsort(), scores.double().argsort())


def test_a_group_with_some_indices_gets_their_scores(model, known) -> None:
    graph = tp.DependencyGraph().build_dependency(model, (INPUTS,))
    importance = NSSImportance(known)
    whole = importance(graph.get_pruning_group(model[4], tp.prune_conv_out_channels, range(10)))
    some = importance(graph.get_pruning_group(model[4], tp.prune_conv_out_channels, [7, 2]))
    assert torch.equal(some, whole[[7, 2]])


@pytest.mark.parametrize("pruner", [tp.pruner.BasePruner, tp.pruner.MagnitudePruner])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_torch_prunings_pruners_take_it(model, known, pruner, global_pruning: bool) -> None:
    pruner(
        model,
        (INPUTS,),
        importance=NSSImportance(known),
        pruning_ratio=0.5,
        global_pruning=global_pruning,
        ignored_layers=[model[9]],
    ).step()
    widths = [model[0].out_channels, model[4].out_channels, model[7].out_features]
    assert sum(widths) == 16 if global_pruning else widths == [4, 5, 7]
    assert model(INPUTS).shape == (2, 5)


def test_dead_neurons_tie_and_are_still_ranked(known, model) -> None:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight[2:7] = 0
        model[0].bias[2:7] = 0
        model[1].bias[2:7] = 0
    importance = NSSImportance(profile(model, batches(48, (3, 12, 12), 3)))
    graph = tp.DependencyGraph().build_dependency(model, (INPUTS,))
    scores = importance(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, range(8)))
    assert len(scores.unique()) == 8
    assert set(scores.argsort()[:4].tolist()) <= {2, 3, 4, 5, 6}


def test_other_models_are_refused_or_left_alone(known) -> None:
    torch.manual_seed(0)
    other = mlp(hidden=(30, 11))
    graph = tp.DependencyGraph().build_dependency(other, (torch.randn(2, 12).double(),))
    importance = NSSImportance(known)
    stranger = graph.get_pruning_group(other[1], tp.prune_linear_out_channels, range(30))
    assert importance(stranger) is None
    wide = NSSImportance(profile(mlp(), batches(48, (12,), 3)))
    with pytest.raises(ModelMismatchError, match="16 were profiled"):
        wide(stranger)


@pytest.mark.parametrize("steps", [2, 5])
def test_over_several_steps_of_torch_prunings_pruner_the_best_neurons_stay(steps: int) -> None:
    torch.manual_seed(3)
    model = mlp(hidden=(16, 11))
    importance = NSSImportance(profile(model, batches(48, (12,), 3)))
    rows = model[1].weight.detach().clone()
    pruner = tp.pruner.BasePruner(
        model,
        (torch.randn(2, 12).double(),),
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=[model[5]],
    )
    for _ in range(steps):
        pruner.step()
    kept = [int((rows == row).all(1).nonzero()) for row in model[1].weight.detach()]
    best = importance.scores["1"].argsort(descending=True)[:8]
    assert sorted(kept) == sorted(best.tolist())


def test_a_model_that_was_pruned_otherwise_is_refused(model, known) -> None:
    tp.prune_conv_out_channels(model[0], [1, 2])
    smaller = copy.deepcopy(model)
    tp.prune_batchnorm_out_channels(smaller[1], [1, 2])
    tp.prune_conv_in_channels(smaller[4], [1, 2])
    graph = tp.DependencyGraph().build_dependency(smaller, (INPUTS,))
    group = graph.get_pruning_group(smaller[0], tp.prune_conv_out_channels, range(6))
    with pytest.raises(ModelMismatchError, match="8 were profiled"):
        NSSImportance(known)(group)
