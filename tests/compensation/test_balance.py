"""Balance: the mean probabilities that the whole model gave, and a model as before otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import assert_unchanged, batches, cnn, fingerprint, mlp
from nss_prune import NSSPruner, load_pruned, save_pruned
from nss_prune.compensation.balance import PENALTIES, balance, class_shares
from nss_prune.core.outputs import resolve_outputs
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError, NumericalError


def classifier(classes: int = 4, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes, bias=bias)).double()


def leaning(model: nn.Sequential, shift: list[float]) -> nn.Sequential:
    """The same model with its scores shifted."""
    other = classifier(len(shift))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[-1].bias += torch.tensor(shift).double()
    return other


def probabilities(model: nn.Module, data) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(inputs).softmax(1) for inputs, _ in data])


def refused(model: nn.Module, data, whole) -> str:
    """Why nothing is balanced; the model is as before."""
    before = fingerprint(model)
    found = balance(model, data, whole)
    assert found.head is None
    assert_unchanged(model, before)
    return found.note


def test_a_shift_is_found_and_taken_back():
    whole = classifier()
    shift = [1.5, -0.5, -1.0, 0.0]
    model, data = leaning(whole, shift), batches(400, (6,), 4)
    found = balance(model, data, class_shares(whole, data))
    assert found.head == "2"
    assert found.note == ""
    torch.testing.assert_close(found.shift, -torch.tensor(shift).double(), rtol=0, atol=2e-3)
    torch.testing.assert_close(model[-1].bias, whole[-1].bias, rtol=0, atol=2e-3)


def test_every_class_gets_the_mean_probability_that_it_had_but_for_the_penalty():
    """The gradient is zero: what is still missing of each class is λ b."""
    whole, data = classifier(), batches(200, (6,), 4)
    model = leaning(whole, [0.3, -0.6, 0.8, 0.2])
    with torch.no_grad():
        model[0].weight.mul_(0.7)  # no shift makes up for this
    found = balance(model, data, class_shares(whole, data))
    missing = probabilities(whole, data).mean(0) - probabilities(model, data).mean(0)
    residuals = [float((missing - penalty * found.shift).abs().max()) for penalty in PENALTIES]
    assert min(residuals) < 1e-6
    assert float(missing.abs().max()) < 5e-3
    assert float(found.shift.sum().abs()) < 1e-4


def test_a_class_that_lost_its_samples_gets_them_back():
    whole, data = classifier(3), batches(600, (6,), 3)
    answers = probabilities(whole, data).argmax(1)
    model = leaning(whole, [-4.0, 0.0, 0.0])
    of_first = answers == 0
    assert of_first.any()
    assert not (probabilities(model, data).argmax(1) == 0).any()
    balance(model, data, class_shares(whole, data))
    kept = (probabilities(model, data).argmax(1) == 0)[of_first]
    assert kept.double().mean() > 0.97


def test_the_whole_model_stays_as_it_is():
    model, data = classifier(), batches(64, (6,), 4)
    before = fingerprint(model)
    assert "no shift of their scores helps" in refused(model, data, class_shares(model, data))
    assert_unchanged(model, before)


def test_a_single_sample_says_nothing_of_others():
    whole, model = classifier(), leaning(classifier(), [1.0, 0.0, 0.0, 0.0])
    data = batches(1, (6,), 4)
    refused(model, data, class_shares(whole, data))


def test_a_head_without_a_bias_gets_one_that_trains_as_its_weight_does():
    whole = classifier(bias=False)
    model = classifier(bias=False)
    with torch.no_grad():
        model[-1].weight.mul_(3)
    model[-1].weight.requires_grad_(False)
    data = batches(200, (6,), 4)
    found = balance(model, data, class_shares(whole, data))
    assert found.head == "2"
    torch.testing.assert_close(model[-1].bias.detach(), found.shift)
    assert not model[-1].bias.requires_grad


class Segmenter(nn.Module):
    """Scores for every position, made larger; the layer after the head does not make them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 3, 1)
        self.auxiliary = nn.Conv2d(6, 3, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.body(inputs).relu())
        return nn.functional.interpolate(scores, scale_factor=2, mode="bilinear")


def test_scores_of_positions_and_the_layer_that_really_makes_them():
    torch.manual_seed(0)
    whole, model = Segmenter().double(), Segmenter().double()
    model.load_state_dict(whole.state_dict())
    shift = torch.tensor([1.0, -1.0, 0.0]).double()
    with torch.no_grad():
        model.head.bias += shift
    data = batches(40, (2, 5, 5), 3)
    with pytest.raises(ArgumentError, match="outputs='classes'"):
        class_shares(whole, data)  # a label for each picture, scores for each of its places
    described = resolve_outputs("classes", whole(data[0][0]))
    shares = class_shares(whole, data, outputs=described)
    found = balance(model, data, shares, outputs=described)
    assert found.head == "head"
    torch.testing.assert_close(found.shift, -shift, rtol=0, atol=2e-3)


def test_where_no_bias_moves_the_scores_alone_nothing_is_changed():
    whole = nn.Sequential(classifier(), nn.Softmax(1))
    model = nn.Sequential(leaning(classifier(), [2.0, 0.0, 0.0, 0.0]), nn.Softmax(1))
    data = batches(100, (6,), 4)
    assert "no layer's bias" in refused(model, data, class_shares(whole, data))


def test_noise_on_many_classes_is_not_followed():
    """Two samples a class: shares of 100 classes that differ at random from sample to sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 100)).double()
    data = batches(200, (20,), 100)
    whole = class_shares(model, data)
    whole.sums[:] = torch.rand(whole.sums.shape, dtype=torch.float64)
    whole.sums.mul_(whole.counts[:, None] / whole.sums.sum(1, keepdim=True))
    refused(model, data, whole)


def test_bad_input_leaves_the_model_as_it_was():
    model, data = leaning(classifier(), [1.0, 0.0, 0.0, 0.0]), batches(50, (6,), 4)
    shares, before = class_shares(classifier(), data), fingerprint(model)
    with pytest.raises(ModelMismatchError, match="5 classes, this one 4"):
        balance(model, data, class_shares(classifier(5), data))
    with pytest.raises(DataError, match="no batches"):
        balance(model, [], shares)
    with pytest.raises(NumericalError, match="NaN"):
        balance(model, [(data[0][0] * torch.nan, None)], shares)
    assert_unchanged(model, before)


class TestPruner:
    def test_it_balances_what_its_removal_left(self):
        data = batches(200, (3, 12, 12), 5)
        torch.manual_seed(0)
        whole, model = cnn().eval(), cnn().eval()
        model.load_state_dict(whole.state_dict())
        NSSPruner(whole, data[0][0][:2], data=data, params_budget=0.3).step()
        torch.manual_seed(0)
        shares = class_shares(model, data)
        pruner = NSSPruner(model, data[0][0][:2], data=data, params_budget=0.3, balance=True)
        pruner.step()
        balance(whole, data, shares)
        for name, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)

    def test_several_steps_keep_the_shares_of_the_first_model(self):
        data = batches(300, (12,), 3)
        torch.manual_seed(0)
        model = mlp()
        wanted = probabilities(model, data).mean(0)
        pruner = NSSPruner(
            model, data[0][0][:2], data=data, params_budget=0.2, iterative_steps=2, balance=True
        )
        for _ in range(2):
            pruner.step()
        torch.testing.assert_close(probabilities(model, data).mean(0), wanted, rtol=0, atol=0.01)

    def test_the_report_says_where_nothing_was_balanced(self):
        data = batches(64, (12,), 3)
        model = nn.Sequential(mlp(), nn.Softmax(1)).double()
        pruner = NSSPruner(model, data[0][0][:2], data=data, params_budget=0.5, balance=True)
        pruner.step()
        assert any("classes are not balanced" in note for note in pruner.report.notes)

    def test_the_data_must_be_there_again(self):
        data = batches(32, (12,), 3)
        for given in (None, iter(data)):
            with pytest.raises(ArgumentError, match="balance=True"):
                NSSPruner(mlp(), data[0][0][:2], data=given, balance=True)

    def test_a_new_bias_is_saved_and_loaded(self, tmp_path):
        data = batches(200, (12,), 3)
        torch.manual_seed(0)
        model = mlp()
        model[-1].bias = None
        original = mlp()
        original[-1].bias = None
        NSSPruner(model, data[0][0][:2], data=data, params_budget=0.3, balance=True).step()
        assert model[-1].bias is not None
        save_pruned(model, tmp_path / "small")
        loaded = load_pruned(tmp_path / "small", original)
        inputs = data[0][0]
        assert torch.equal(loaded(inputs), model(inputs))
