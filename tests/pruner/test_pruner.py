"""The drop-in pruner as a torch-pruning user meets it."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import textwrap

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn.utils import prune

from networks import assert_unchanged, batches, cnn, fingerprint, mlp
from nss_prune import NSSImportance, NSSPruner, profile
from nss_prune.errors import (
    ArgumentError,
    DataError,
    GraphError,
    ModelMismatchError,
    NothingToPruneError,
    NSSPruneError,
    NumericalError,
    RemovalError,
)
from nss_prune.graph.slices import Slice
from nss_prune.pruner.cost import Cost
from nss_prune.pruner.repair import Repair, Repaired
from nss_prune.pruner.strategy import Evidence, Strategy

INPUTS = torch.randn(4, 12, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return batches(48, (12,), 3)


def widths(model: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in model if isinstance(layer, nn.Linear)]


def test_step_removes_what_the_slice_leaves_out(model, data) -> None:
    pruner = NSSPruner(model, INPUTS, theta=0.8, data=data, ignored_layers=[model[5]])
    assert isinstance(pruner, tp.pruner.BasePruner)
    kept = {name: int(mask.sum()) for name, mask in pruner.slice.kept.items()}
    pruner.step()
    assert widths(model) == [kept["1"], kept["3"], 3]
    assert widths(model)[0] < 16


def test_report_has_a_row_per_layer(model, data) -> None:
    pruner = NSSPruner(model, INPUTS, theta=0.8, data=data, ignored_layers=["3"])
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner.step()
    report = pruner.report
    rows = {row.layer: row for row in report.rows}
    assert list(rows) == ["1", "3", "5"]
    assert (rows["1"].before, rows["1"].after) == (16, model[1].out_features)
    assert (rows["3"].before, rows["3"].after, rows["3"].reason) == (11, 11, "ignored")
    assert "output" in rows["5"].reason
    assert report.before.parameters == before
    assert report.after.parameters == sum(parameter.numel() for parameter in model.parameters())
    a, b, c = widths(model)
    assert report.after.macs == len(INPUTS) * (12 * a + a * b + b * c)
    assert "parameters: " in str(report)
    assert "ignored" in str(report)


def test_interactive_groups_prune_to_the_same_model(model, data) -> None:
    other = copy.deepcopy(model)
    NSSPruner(model, INPUTS, theta=0.8, data=data, fold=False).step()
    for group in NSSPruner(other, INPUTS, theta=0.8, data=data).step(interactive=True):
        assert isinstance(group, tp.dependency.Group)
        group.prune()
    assert torch.equal(model(INPUTS), other(INPUTS))


def test_interactive_caller_may_skip_groups(model, data) -> None:
    pruner = NSSPruner(model, INPUTS, theta=0.8, data=data)
    for group in pruner.step(interactive=True):
        if group[0].dep.target.module is model[1]:
            group.prune()
    assert widths(model)[0] < 16
    assert widths(model)[1] == 11
    model(INPUTS)


def test_without_data_the_example_inputs_are_profiled() -> None:
    torch.manual_seed(0)
    model = cnn().eval()
    inputs = torch.randn(2, 3, 12, 12).double()
    pruner = NSSPruner(model, inputs, theta=0.95)
    with pytest.warns(UserWarning, match=r"2 sample\(s\)"):
        pruner.step()
    assert model(inputs).shape == (2, 5)
    assert model[0].out_channels < 8 or model[4].out_channels < 10


def test_torch_pruning_script_with_one_line_changed() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    example_inputs = torch.randn(1, 3, 64, 64)
    imp = tp.importance.GroupMagnitudeImportance(p=2)
    ignored_layers = [
        m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000
    ]
    pruner = NSSPruner(
        model, example_inputs, importance=imp, pruning_ratio=0.5, ignored_layers=ignored_layers
    )
    pruner.step()
    assert model.conv1.out_channels == 32
    assert model.layer4[1].conv2.out_channels == 256
    assert model(example_inputs).shape == (1, 1000)


def test_importance_ranks_as_torch_pruning_does(data) -> None:
    torch.manual_seed(0)
    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    arguments = {"importance": tp.importance.MagnitudeImportance(), "pruning_ratio": 0.5}
    NSSPruner(ours, INPUTS, **arguments).step()
    tp.pruner.BasePruner(theirs, (INPUTS,), ignored_layers=[theirs[5]], **arguments).step()
    assert torch.equal(ours(INPUTS), theirs(INPUTS))


@pytest.mark.filterwarnings("ignore:no data was given")
def test_global_pruning_may_spare_a_layer() -> None:
    """torch-pruning then yields the layer's group without a neuron."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4
    ).eval()
    inputs = torch.rand(8, 3, 16, 16)
    pruner = NSSPruner(model, inputs, pruning_ratio=0.1, global_pruning=True)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(10)
        model.blocks[0].mlp.fc2.weight.mul_(10)
    pruner.step()
    assert any(row.before == row.after for row in pruner.report.rows if not row.reason)
    assert any(row.after < row.before for row in pruner.report.rows)
    assert model(inputs).shape == (8, 4)


@pytest.mark.parametrize("global_pruning", [False, True])
def test_pruning_ratio_uses_the_semantic_importance(model, data, global_pruning: bool) -> None:
    pruner = NSSPruner(model, INPUTS, data=data, pruning_ratio=0.5, global_pruning=global_pruning)
    thresholds = {
        name: values.min(0).values for name, values in pruner.profile.thresholds["taylor"].items()
    }
    kept = pruner.slice.kept
    total = sum(int(mask.sum()) for mask in kept.values())
    if global_pruning:
        assert total == math.floor(27 * 0.5)
        worst = max(float(thresholds[name][kept[name]].max()) for name in kept)
        best = min(float(thresholds[name][~kept[name]].min()) for name in kept)
        assert worst <= best
    else:
        assert [int(mask.sum()) for mask in kept.values()] == [8, 5]
        for name, mask in kept.items():
            assert thresholds[name][mask].max() <= thresholds[name][~mask].min()
    pruner.step()
    assert model(INPUTS).shape == (4, 3)


@pytest.mark.parametrize("strategy", ["category", "global"])
def test_other_strategies_take_their_share(model, data, strategy: str) -> None:
    expected = profile(model, data).slice(ratio=0.4, strategy=strategy)
    NSSPruner(model, INPUTS, data=data, pruning_ratio=0.6, strategy=strategy).step()
    assert widths(model) == [*(int(mask.sum()) for mask in expected.kept.values()), 3]


def test_other_strategies_count_the_share_from_the_first_size(model, data) -> None:
    pruner = NSSPruner(
        model, INPUTS, data=data, pruning_ratio=0.5, strategy="global", iterative_steps=2
    )
    pruner.step()
    assert widths(model) == [12, 8, 3]
    pruner.step()
    assert widths(model) == [8, 5, 3]


def test_iterative_steps_reach_theta_and_then_stop(model, data) -> None:
    pruner = NSSPruner(model, INPUTS, theta=0.8, data=data, iterative_steps=3)
    sizes = [sum(widths(model))]
    for _ in range(3):
        pruner.step()
        sizes.append(sum(widths(model)))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    with pytest.warns(UserWarning, match="steps"):
        pruner.step()
    assert sum(widths(model)) == sizes[-1]


def test_iterative_ratio_counts_from_the_first_size(data) -> None:
    torch.manual_seed(0)
    model = mlp(hidden=(20, 10))
    pruner = NSSPruner(
        model,
        INPUTS,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
    )
    pruner.step()
    assert widths(model) == [15, 7, 3]
    pruner.step()
    assert widths(model) == [10, 5, 3]


def test_profile_can_be_reused_and_must_fit(model, data) -> None:
    known = profile(model, data)
    pruner = NSSPruner(model, INPUTS, theta=0.8, profile=known)
    expected = {name: int(mask.sum()) for name, mask in known.slice(0.8).kept.items()}
    pruner.step()
    assert widths(model) == [expected["1"], expected["3"], 3]
    with pytest.raises(ModelMismatchError, match="profile this model"):
        NSSPruner(model, INPUTS, profile=known)


def test_callers_dicts_and_lists_stay_as_they_are(model, data) -> None:
    groups: dict[nn.Module, int] = {}
    ignored = [model[5]]
    NSSPruner(model, INPUTS, data=data, num_heads=groups, ignored_layers=ignored).step()
    assert groups == {}
    assert ignored == [model[5]]


def test_fixed_weights_stay_fixed_and_training_mode_stays(model, data) -> None:
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    NSSPruner(model, INPUTS, theta=0.8, data=data).step()
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def bad(x=None, y=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(20, 12).double() if x is None else x
    return [(inputs, torch.arange(len(inputs)) % 3 if y is None else y)]


BAD_DATA = {
    "empty": (DataError, "no batch|0 sample", []),
    "empty batch": (DataError, "no samples", bad(torch.zeros(0, 12).double())),
    "one sample": (DataError, "1 sample", bad(torch.zeros(1, 12).double())),
    "label too large": (DataError, "0 to 2", bad(y=torch.full((20,), 3))),
    "label negative": (DataError, "-1", bad(y=torch.full((20,), -1))),
    "float labels": (DataError, "integer", bad(y=torch.full((20,), 0.5))),
    "float classes": (NSSPruneError, "outputs=", bad(y=torch.zeros(20))),
    "too few labels": (DataError, "20 samples", bad(y=torch.zeros(3, dtype=torch.long))),
    "no labels": (DataError, "labels", [torch.randn(20, 12).double()]),
    "three items": (DataError, "inputs, labels", [(torch.zeros(2, 12), 0, 0)]),
    "another shape": (DataError, "refuses batch 0", bad(torch.randn(20, 13).double())),
    "another type": (DataError, "refuses batch 0", bad(torch.randn(20, 12).float())),
    "another device": (DataError, "moved to cpu", bad(torch.zeros(20, 12, device="meta"))),
    "NaN": (NumericalError, "NaN", bad(torch.full((20, 12), math.nan).double())),
    "infinite": (NumericalError, "NaN|infinite", bad(torch.full((20, 12), math.inf).double())),
    "second batch": (DataError, "batch 1", bad() + bad(torch.randn(20, 13).double())),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_and_the_model_left_alone(model, case: str) -> None:
    kind, message, data = BAD_DATA[case]
    model.train()
    before, outputs = fingerprint(model), model(INPUTS)
    pruner = NSSPruner(model, INPUTS, data=data)
    with pytest.raises(kind, match=message) as caught:
        pruner.step()
    assert isinstance(caught.value, NSSPruneError)
    assert_unchanged(model, before)
    assert torch.equal(model(INPUTS), outputs)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("case", BAD_DATA)
def test_profile_refuses_the_same_data(model, case: str) -> None:
    kind, message, data = BAD_DATA[case]
    before = fingerprint(model)
    with pytest.raises(kind, match=message):
        profile(model, data, INPUTS)
    assert_unchanged(model, before)


def test_nan_weights_are_refused(model, data) -> None:
    with torch.no_grad():
        model[1].weight[2, 3] = math.nan
    with pytest.raises(NumericalError, match="1 reads NaN"):
        NSSPruner(model, INPUTS, data=data).step()
    assert not any(module._forward_pre_hooks for module in model.modules())


class Half:
    """Has the first method of a strategy, and of a repair."""

    def observe(self, *_):
        return None


BAD_ARGUMENTS = {
    "theta 0": (ArgumentError, "theta is 0", {"theta": 0}),
    "theta above 1": (ArgumentError, "theta is 1.01", {"theta": 1.01}),
    "theta NaN": (ArgumentError, "theta", {"theta": math.nan}),
    "theta text": (ArgumentError, "theta", {"theta": "0.9"}),
    "ratio 1": (ArgumentError, "pruning_ratio", {"pruning_ratio": 1.0}),
    "ratio negative": (ArgumentError, "pruning_ratio", {"pruning_ratio": -0.1}),
    "metric": (ArgumentError, "taylor", {"metric": "magnitude"}),
    "strategy": (ArgumentError, "semantic", {"strategy": "best"}),
    "strategy alone": (ArgumentError, "pruning_ratio", {"strategy": "global"}),
    "categories": (ArgumentError, "categories", {"categories": "label"}),
    "theta and ratio": (ArgumentError, "no effect", {"theta": 0.9, "pruning_ratio": 0.5}),
    "theta and budget": (ArgumentError, "no effect", {"theta": 0.9, "macs_budget": 0.5}),
    "old name": (ArgumentError, "pruning_ratio= instead", {"ch_sparsity": 0.5}),
    "together by theta": (ArgumentError, "one threshold", {"global_pruning": True}),
    "isomorphic by theta": (ArgumentError, "no effect", {"isomorphic": True}),
    "ratios of layers": (ArgumentError, "pruning_ratio= as well", {"pruning_ratio_dict": {1: 0.5}}),
    "heads without ratio": (ArgumentError, "no effect", {"head_pruning_ratio": 0.5}),
    "budget without cost": (ArgumentError, "give both", {"budget": 0.5}),
    "half a strategy": (ArgumentError, "without select", {"strategy": Half()}),
    "half a repair": (ArgumentError, "without before and after", {"repairs": [Half()]}),
    "half a metric": (ArgumentError, "without name, needs_gradient", {"metric": Half()}),
    "unknown": (ArgumentError, "BasePruner", {"prune_ratio": 0.5}),
    "old profile": (
        ArgumentError,
        "further steps",
        {"data": None, "profile": profile(mlp(), batches(48, (12,), 3)), "iterative_steps": 2},
    ),
    "ignored name": (ArgumentError, "named_modules", {"ignored_layers": ["head"]}),
    "ignored stranger": (ArgumentError, "not in the model", {"ignored_layers": [nn.ReLU()]}),
    "all ignored": (NothingToPruneError, "ignored", {"ignored_layers": [nn.Linear]}),
    "inputs": (
        GraphError,
        "does not run on the example",
        {"example_inputs": torch.zeros(2, 5).double()},
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_and_the_model_left_alone(model, data, case: str) -> None:
    kind, message, arguments = BAD_ARGUMENTS[case]
    model.train()
    before, outputs = fingerprint(model), model(INPUTS)
    with pytest.raises(kind, match=message):
        NSSPruner(model, **{"example_inputs": INPUTS, "data": data, **arguments})
    assert_unchanged(model, before)
    assert torch.equal(model(INPUTS), outputs)


def test_masked_weights_must_be_made_permanent_first(model, data) -> None:
    prune.l1_unstructured(model[1], "weight", 0.5)
    with pytest.raises(ArgumentError, match="permanent"):
        NSSPruner(model, INPUTS, data=data)
    prune.remove(model[1], "weight")
    NSSPruner(model, INPUTS, theta=0.8, data=data).step()


def test_a_pruner_can_be_pickled_and_goes_on(model, data) -> None:
    pruner = NSSPruner(model, INPUTS, theta=0.8, data=data)
    expected = pruner.slice.kept
    again = pickle.loads(pickle.dumps(pruner))
    assert all(torch.equal(again.slice.kept[name], mask) for name, mask in expected.items())
    again.step()
    pruner.step()
    assert widths(again.model) == widths(model)
    torch.testing.assert_close(again.model(INPUTS), model(INPUTS), rtol=0, atol=0)


def test_a_pruned_model_can_be_copied_and_pickled(model, data) -> None:
    NSSPruner(model, INPUTS, theta=0.8, data=data).step()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(INPUTS), model(INPUTS), rtol=0, atol=0)


def example_in(protocol: type) -> dict[str, object]:
    """What the example in a docstring defines."""
    _, _, code = inspect.getdoc(protocol).partition("::\n\n")
    lines = itertools.takewhile(lambda line: not line or line[0] == " ", code.splitlines())
    defined = {"torch": torch, "nn": nn, "Slice": Slice, "Evidence": Evidence, "Repaired": Repaired}
    before = set(defined)
    exec(textwrap.dedent("\n".join(lines)), defined)
    return {name: found for name, found in defined.items() if name not in before}


def test_a_strategy_of_ones_own(model, data) -> None:
    norms = {name: model.get_submodule(name).weight.norm(dim=1) for name in ("1", "3")}
    strategy = example_in(Strategy)["LargestWeights"]()
    pruner = NSSPruner(model, INPUTS, pruning_ratio=0.5, strategy=strategy, fold=False)
    pruner.step()
    assert widths(model) == [8, 6, 3]
    for name, kept in pruner.slice.kept.items():
        assert norms[name][kept].min() >= norms[name][~kept].max()


def test_a_cost_of_ones_own(model, data) -> None:
    cost = example_in(Cost)["Activations"]()
    pruner = NSSPruner(model, INPUTS, data=data, budget=0.5, cost=cost)
    pruner.step()
    assert sum(widths(model)[:2]) == 13  # the most of 16 + 11 that is at most a half
    assert any("of the activations are kept" in note for note in pruner.report.notes)


def test_a_repair_of_ones_own_comes_last_and_is_undone(model, data) -> None:
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    repair = example_in(Repair)["LargerScores"]()
    NSSPruner(other, INPUTS, theta=0.8, data=data).step()
    pruner = NSSPruner(model, INPUTS, theta=0.8, data=data, repairs=[repair])
    pruner.step()
    assert "the scores are doubled" in pruner.report.notes
    assert torch.equal(model[5].weight, 2 * other[5].weight)

    class Fails(type(repair)):
        def after(self, subject, chosen, seen):
            super().after(subject, chosen, seen)
            raise ValueError("no")

    before = fingerprint(third)
    with pytest.raises(ValueError, match="no"):
        NSSPruner(third, INPUTS, theta=0.8, data=data, repairs=[Fails()]).step()
    assert_unchanged(third, before)


class Breaking:
    """Batches of which the n-th one raises, once."""

    def __init__(self, batches, at: int) -> None:
        self.batches, self.left = batches, at

    def __iter__(self):
        for batch in self.batches:
            self.left -= 1
            if self.left == 0:
                raise OSError("the disk is gone")
            yield batch


@pytest.mark.parametrize(
    "arguments",
    [
        {"macs_budget": 0.5},
        {"theta": 0.8, "iterative_steps": 2},
        {"params_budget": 0.6, "recalibrate": True, "balance": True},
        {"importance": tp.importance.MagnitudeImportance(), "pruning_ratio": 0.5},
    ],
    ids=lambda given: ", ".join(given),
)
def test_a_failed_step_leaves_the_pruner_as_it_was(arguments) -> None:
    torch.manual_seed(0)
    first = cnn().eval()
    data = batches(120, (3, 12, 12), 2, size=60)
    inputs = data[0][0][:2]

    def pruned(given) -> tuple[nn.Module, int]:
        model = copy.deepcopy(first)
        pruner = NSSPruner(model, inputs, data=given, progress=False, **arguments)
        failures = 0
        for _ in range(pruner.iterative_steps):
            try:
                pruner.step()
            except (OSError, RemovalError):
                failures += 1
                pruner.step()
        return model, failures

    wanted = pruned(data)[0].state_dict()
    for at in itertools.count(1, 2):
        model, failures = pruned(Breaking(data, at))
        found = model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), at
        if not failures:
            break
    assert at > 2


def test_reading_a_property_changes_nothing(model, data) -> None:
    pruner = NSSPruner(model, INPUTS, data=data, params_budget=0.6)
    neurons, before = pruner.neurons, fingerprint(model)
    assert pruner.slice is pruner.slice
    assert pruner.profile is pruner.profile
    assert pruner.evidence is pruner.evidence
    assert pruner.neurons is neurons
    assert_unchanged(model, before)


@pytest.mark.parametrize("together", [False, True])
def test_an_importance_with_a_budget(model, data, together: bool) -> None:
    norms = {name: model.get_submodule(name).weight.norm(dim=1) for name in ("1", "3")}
    before = sum(p.numel() for p in model.parameters())
    importance = tp.importance.MagnitudeImportance(p=2, group_reduction="first", normalizer=None)
    pruner = NSSPruner(
        model, INPUTS, importance, data=data, params_budget=0.5, global_pruning=together
    )
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) / before == pytest.approx(0.5, abs=0.04)
    kept = pruner.slice.kept
    for name, mask in kept.items():
        assert norms[name][mask].min() >= norms[name][~mask].max()
    if together:
        assert min(norms[n][m].min() for n, m in kept.items()) >= max(
            norms[n][~m].max() for n, m in kept.items()
        )
    else:
        shares = [float(mask.double().mean()) for mask in kept.values()]
        assert abs(shares[0] - shares[1]) <= 1 / 11
    assert not any("nothing was folded" in note for note in pruner.report.notes)


def test_layers_of_which_an_importance_says_nothing_stay(model, data) -> None:
    magnitude = tp.importance.MagnitudeImportance()

    def importance(group):
        return None if group[0].dep.target.module is model[1] else magnitude(group)

    pruner = NSSPruner(model, INPUTS, importance, params_budget=0.6)
    pruner.step()
    assert widths(model)[0] == 16
    assert pruner.neurons.left_alone["1"] == "the importance says nothing of it"
    with pytest.raises(NothingToPruneError):
        NSSPruner(mlp(), INPUTS, lambda group: None, params_budget=0.6).step()


@pytest.mark.parametrize("amount", [{"pruning_ratio": 0.9}, {"params_budget": 0.3}])
def test_an_importance_is_asked_once_a_step(amount) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model, asked = mlp(), []

        def importance(group, asked=asked):
            asked.append(group[0].dep.target.module)
            return torch.rand(len(group[0].idxs))

        NSSPruner(model, INPUTS, importance, **amount).step()
        assert len(asked) == len(set(asked))
        assert min(widths(model)) >= 1


@pytest.mark.parametrize("amount", [{"pruning_ratio": 0.5}, {"params_budget": 0.5}])
def test_criteria_that_take_gradients(model, data, amount) -> None:
    model.eval()
    for inputs, labels in data:
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    products = {
        name: (layer.weight * layer.weight.grad).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "weight")
    }
    importance = tp.importance.TaylorImportance(
        group_reduction="first", normalizer=None, bias=False, multivariable=True
    )
    pruner = NSSPruner(model, INPUTS, importance, **amount)
    pruner.step()
    for name, kept in pruner.slice.kept.items():
        scores = products[name].sum(1).abs()
        assert scores[kept].min() >= scores[~kept].max()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=6, num_classes=4
    ).eval()


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("interactive", [False, True])
def test_heads_go_and_the_history_rebuilds_the_model(interactive: bool) -> None:
    model, inputs = vit(), torch.rand(8, 3, 16, 16)
    pruner = NSSPruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        num_heads={block.attn.qkv: 6 for block in model.blocks},
        prune_num_heads=True,
        head_pruning_ratio=0.5,
    )
    if interactive:
        for group in pruner.step(interactive=True):
            group.prune()
    else:
        pruner.step()
    assert [block.attn.num_heads for block in model.blocks] == [3, 3]
    assert [pruner.num_heads[block.attn.qkv] for block in model.blocks] == [3, 3]
    assert model(inputs).shape == (8, 4)
    again = vit()
    graph = tp.DependencyGraph().build_dependency(again, (inputs,))
    graph.load_pruning_history(pruner.pruning_history())
    again.load_state_dict(model.state_dict())


def test_heads_of_groups_that_are_skipped_are_not_counted() -> None:
    model, inputs = vit(), torch.rand(8, 3, 16, 16)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = NSSPruner(
        model,
        inputs,
        importance,
        pruning_ratio=0.0,
        num_heads={block.attn.qkv: 6 for block in model.blocks},
        prune_num_heads=True,
        head_pruning_ratio=0.5,
    )
    for group in pruner.step(interactive=True):
        if any(dep.target.module is model.blocks[0].attn.qkv for dep, _ in group):
            group.prune()
    assert [block.attn.num_heads for block in model.blocks] == [3, 6]
    assert [pruner.num_heads[block.attn.qkv] for block in model.blocks] == [3, 6]
    assert model(inputs).shape == (8, 4)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_global_ratios_of_a_transformer(ratio: float) -> None:
    model = vit()
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = NSSPruner(
        model, torch.rand(8, 3, 16, 16), importance, pruning_ratio=ratio, global_pruning=True
    )
    pruner.step()
    kept = {n: m for n, m in pruner.slice.kept.items() if not n.endswith("qkv")}
    total = sum(map(len, kept.values()))
    stays = sum(int(mask.sum()) for mask in kept.values())
    # A layer that would go whole keeps the share that the ratio leaves: here the trunk of 48.
    assert 1 - ratio - 0.01 <= stays / total <= 1 - ratio + 48 * (1 - ratio) / total + 0.01
    assert all(mask.double().mean() >= 0.5 * (1 - ratio) for mask in kept.values())
    (note,) = (note for note in pruner.report.notes if "pruning_ratio asks" in note)
    assert "heads go whole" in note


def test_what_is_left_alone_stays_so_for_the_same_reason(model, data) -> None:
    pruner = NSSPruner(
        model, INPUTS, data=data, pruning_ratio=0.5, iterative_steps=2, ignored_layers=["3"]
    )
    pruner.step()
    first = {row.layer: row.reason for row in pruner.report.rows}
    pruner.step()
    assert {row.layer: row.reason for row in pruner.report.rows} == first
    assert first["5"] == "makes the model's output"


def test_the_semantic_importance_follows_over_several_steps(model, data) -> None:
    best = NSSImportance(profile(model, data)).scores["1"].argsort(descending=True)[:8]
    rows = model[1].weight.detach().clone()
    importance = NSSImportance(profile(model, data))
    pruner = NSSPruner(model, INPUTS, importance, pruning_ratio=0.5, iterative_steps=4, fold=False)
    for _ in range(4):
        pruner.step()
    kept = [int((rows == row).all(1).nonzero()) for row in model[1].weight.detach()]
    assert sorted(kept) == sorted(best.tolist())
