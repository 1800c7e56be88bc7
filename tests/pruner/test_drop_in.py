"""Scripts written for torch-pruning: arguments in its order, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune import NSSPruner
from nss_prune.errors import ArgumentError, GraphError
from nss_prune.pruner.arguments import as_called

IMPORTANCE = tp.importance.MagnitudeImportance(p=2)
INPUTS = torch.randn(8, 20)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).eval()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, num_heads=6, depth=1
    ).eval()


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    return {block.attn.qkv: block.attn.num_heads for block in model.blocks}


def test_arguments_by_position_are_those_of_torch_pruning() -> None:
    """global_pruning, pruning_ratio, pruning_ratio_dict, max_pruning_ratio, iterative_steps."""
    ours, theirs = mlp(), mlp()
    positional = (False, 0.75, None, 1.0, 2)
    pruner = NSSPruner(ours, INPUTS, IMPORTANCE, *positional, ignored_layers=[ours[2]], fold=False)
    other = tp.pruner.BasePruner(
        theirs, (INPUTS,), IMPORTANCE, *positional, ignored_layers=[theirs[2]]
    )
    assert (pruner.pruning_ratio, pruner.iterative_steps) == (0.75, 2)
    for _ in range(2):
        pruner.step()
        other.step()
    assert ours[0].out_features == theirs[0].out_features == 16
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_an_argument_by_position_and_by_name() -> None:
    with pytest.raises(ArgumentError, match="global_pruning"):
        NSSPruner(mlp(), INPUTS, IMPORTANCE, True, global_pruning=True)
    with pytest.raises(ArgumentError, match="by position"):
        NSSPruner(mlp(), INPUTS, IMPORTANCE, *range(40))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pruning_ratio": 1}, "latency_budget="),
        ({"prune_head_dims": True}, "within a budget"),
        ({"head_pruning_ratio": 0.5}, "prune_num_heads=True"),
        ({"num_heads": {nn.Linear(3, 3): 2}}, "not in the model"),
        ({"iterative_steps": 0}, "whole number from 1"),
        ({"max_pruning_ratio": 1.5}, "max_pruning_ratio is 1.5"),
        ({"importance": 5}, "tp.importance"),
        ({"metric": "var"}, "no effect with importance="),
        ({"features": "channel"}, "no effect with importance="),
        ({"ch_sparsity": 0.5}, "pruning_ratio="),
        ({"channel_groups": {nn.Linear(3, 3): 2}}, "out_channel_groups="),
    ],
)
def test_what_has_no_effect_is_refused(arguments, words: str) -> None:
    model = transformer()
    with pytest.raises(ArgumentError, match=words):
        NSSPruner(
            model,
            torch.randn(1, 3, 32, 32),
            **{
                "importance": IMPORTANCE,
                "pruning_ratio": 0.5,
                "num_heads": heads_of(model),
                **arguments,
            },
        )


def test_a_number_of_heads_that_does_not_divide_the_channels_is_refused() -> None:
    model = mlp()
    with pytest.raises(ArgumentError, match="num_heads of 0 is 3"):
        NSSPruner(model, INPUTS, IMPORTANCE, pruning_ratio=0.5, num_heads={model[0]: 3})


def test_a_metric_has_no_effect_on_the_divergence() -> None:
    with pytest.raises(ArgumentError, match="strategy='semantic'"):
        NSSPruner(mlp(), INPUTS, params_budget=0.5, metric="var")
    NSSPruner(mlp(), INPUTS, params_budget=0.5, metric="var", strategy="semantic")


@pytest.mark.parametrize("answer", [torch.nan, torch.zeros(3), "high", None])
def test_what_an_importance_may_give(answer: Any) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def importance(group: Any) -> Any:
        is_nan = isinstance(answer, float)
        return torch.full((len(group[0].idxs),), answer) if is_nan else answer

    pruner = NSSPruner(model, INPUTS, importance, pruning_ratio=0.5, fold=False)
    if answer is None:
        pruner.step()
    else:
        with pytest.raises(ArgumentError, match="importance="):
            pruner.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_regularizers_are_refused() -> None:
    pruner = NSSPruner(mlp(), INPUTS, IMPORTANCE, pruning_ratio=0.5)
    for call in (lambda: pruner.update_regularizer(), lambda: pruner.regularize(pruner.model)):
        with pytest.raises(ArgumentError, match="does not regularize"):
            call()


class Scaled(nn.Module):
    """A norm over channels of a user's own, as torch-pruning's example has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / inputs.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-5) * self.scale


class ScaledPruner(tp.function.BasePruningFunc):
    def prune_out_channels(self, layer: Scaled, idxs) -> Scaled:
        kept = sorted(set(range(layer.width)) - set(idxs))
        layer.width, layer.scale = len(kept), nn.Parameter(layer.scale.detach()[kept])
        return layer

    def get_out_channels(self, layer: Scaled) -> int:
        return layer.width

    prune_in_channels, get_in_channels = prune_out_channels, get_out_channels


def test_customized_pruners_prune_what_they_prune_there() -> None:
    kept = []
    for make in (tp.pruner.BasePruner, NSSPruner):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), Scaled(64), nn.ReLU(), nn.Linear(64, 5)).eval()
        own = {} if make is tp.pruner.BasePruner else {"fold": False}
        make(
            model, (INPUTS,), IMPORTANCE, pruning_ratio=0.5, ignored_layers=[model[3]],
            customized_pruners={Scaled: ScaledPruner()}, root_module_types=[nn.Linear, Scaled],
            **own,
        ).step()  # fmt: skip
        assert (model[0].out_features, model[1].width, model[3].in_features) == (32, 32, 32)
        kept.append(model)
    assert torch.equal(kept[0](INPUTS), kept[1](INPUTS))


def test_a_list_of_pictures_is_one_argument() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

        def forward(self, pictures: list[Tensor]) -> Tensor:
            return self.net(torch.stack(list(pictures))).mean((2, 3))

    pictures = [torch.randn(3, 8, 8), torch.randn(3, 8, 8)]
    for inputs in (pictures, (pictures,)):
        model = Detector().eval()
        pruner = NSSPruner(model, inputs, IMPORTANCE, pruning_ratio=0.5)
        pruner.step()
        assert model.net[0].out_channels == 4
    both = [torch.ones(1, 2)] * 2
    assert as_called(nn.Bilinear(2, 2, 2), both) is both


def test_a_model_that_does_not_run_shows_its_own_error() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            raise RuntimeError("my own mistake")

    with pytest.raises(GraphError, match="does not run on the example inputs: my own mistake"):
        NSSPruner(Broken(), INPUTS)
