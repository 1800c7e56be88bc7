"""FGSM and PGD against captum called by hand, and the ball and range they must not leave."""

from __future__ import annotations

import warnings

import captum.robust
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from networks import assert_unchanged, cnn, fingerprint, mlp
from nss_prune.adaptation.attacks import FGSM, PGD, attacked, make_attack
from nss_prune.errors import ArgumentError, DataError

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)


def pictures() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.rand(8, 3, 12, 12, dtype=torch.float64)
    inputs[:, :, :2] = 0
    inputs[:, :, -2:] = 1
    return cnn().eval(), inputs, torch.arange(8) % 5


def normalised(inputs: Tensor) -> Tensor:
    return (inputs - columns(MEAN)) / columns(STD)


def pixels(inputs: Tensor) -> Tensor:
    return inputs * columns(STD) + columns(MEAN)


def columns(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


def each(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="none")


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_fgsm_agrees_with_captum_called_by_hand() -> None:
    model, inputs, labels = pictures()
    by_hand = captum.robust.FGSM(model, each, 0.0, 1.0)
    by_hand.zero_thresh = 0.0
    wanted = by_hand.perturb(inputs.clone(), 0.03, labels)
    assert torch.equal(FGSM(0.03)(model, inputs, labels), wanted)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
def test_pgd_agrees_with_captum_called_by_hand() -> None:
    model, inputs, labels = pictures()
    by_hand = captum.robust.PGD(model, each, 0.0, 1.0)
    by_hand.fgsm.zero_thresh = 0.0
    torch.manual_seed(3)
    wanted = by_hand.perturb(inputs.clone(), 0.04, 0.01, 6, labels, random_start=True)
    torch.manual_seed(3)
    found = PGD(0.04, step_size=0.01, steps=6)(model, inputs, labels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_fgsm_is_a_signed_step_clipped_to_the_range() -> None:
    model, inputs, labels = pictures()
    source = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(each(model(source), labels).sum(), source)
    wanted = (inputs + 0.03 * gradient.sign()).clamp(0, 1)
    assert torch.equal(FGSM(0.03)(model, inputs, labels), wanted)


@pytest.mark.parametrize("attack", [FGSM, PGD])
@pytest.mark.parametrize("epsilon", [0.05, (0.05, 0.01, 0.1)])
def test_normalised_inputs_stay_within_epsilon_and_range_of_their_pixels(attack, epsilon) -> None:
    model, inputs, labels = pictures()
    seen = normalised(inputs)
    moved = pixels(attack(epsilon, (MEAN, STD))(model, seen, labels))
    limit = torch.as_tensor(epsilon, dtype=torch.float64).reshape(1, -1, 1, 1)
    assert ((moved - inputs).abs() <= limit + 1e-12).all()
    assert moved.min() >= -1e-12
    assert moved.max() <= 1 + 1e-12
    assert (moved != inputs).any()


@pytest.mark.parametrize("attack", [FGSM(0.05), PGD(0.05), PGD(0.05, random_start=False)])
def test_attacks_raise_the_loss_also_in_batches_of_one(attack) -> None:
    model, inputs, labels = pictures()
    before = each(model(inputs), labels)
    assert (each(model(attack(model, inputs, labels)), labels) > before).all()
    for i in range(3):
        one = attack(model, inputs[i : i + 1], labels[i : i + 1])
        assert each(model(one), labels[i : i + 1])[0] > before[i]


def test_normalising_inside_or_outside_the_model_is_the_same_attack() -> None:
    model, inputs, labels = pictures()

    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, values: Tensor) -> Tensor:
            return self.inner(normalised(values))

    attack = {"epsilon": 0.04, "random_start": False}
    inside = PGD(**attack)(Normalising(), inputs, labels)
    outside = pixels(PGD(**attack, normalization=(MEAN, STD))(model, normalised(inputs), labels))
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-9)


def test_small_gradients_count_too() -> None:
    model, inputs, labels = pictures()
    with torch.no_grad():
        model[-1].weight.mul_(1e-12)
    moved = FGSM(0.05, bounds=None)(model, inputs, labels)
    assert ((moved - inputs).abs() > 0.04).all()


def test_without_bounds_values_go_beyond_the_pixels() -> None:
    model, inputs, labels = pictures()
    moved = FGSM(0.1, bounds=None)(model, inputs, labels)
    assert moved.min() < 0
    assert moved.max() > 1


@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1, steps=2)])
def test_model_and_inputs_are_left_as_found(attack) -> None:
    model, inputs, labels = pictures()
    model.train()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones_like(model[0].bias)
    copy, before = inputs.clone(), fingerprint(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = attack(model, inputs, labels)
    assert_unchanged(model, dict(before))
    assert torch.equal(inputs, copy)
    assert not inputs.requires_grad
    assert not moved.requires_grad
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["0.bias"]
    with pytest.raises(DataError):
        attack(model, inputs, labels + 9)
    assert_unchanged(model, before)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["0.bias"]
    assert torch.equal(model[0].bias.grad, torch.ones_like(model[0].bias))


def test_flat_inputs_and_half_precision() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.rand(5, 12), torch.arange(5) % 3
    model = mlp().float()
    moved = PGD(0.1)(model, inputs, labels)
    assert moved.dtype == torch.float32
    assert (moved - inputs).abs().max() <= 0.1 + 1e-6
    half = FGSM(0.1)(model.bfloat16(), inputs.bfloat16(), labels)
    assert half.dtype == torch.bfloat16
    assert (half != inputs.bfloat16()).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSM(0), "positive"),
        (lambda: FGSM(-0.1), "positive"),
        (lambda: PGD(float("nan")), "positive"),
        (lambda: FGSM("large"), "number"),
        (lambda: PGD(0.1, steps=0), "1 or more"),
        (lambda: PGD(0.1, step_size=0.0), "positive"),
        (lambda: FGSM(0.1, (0.5,)), "two"),
        (lambda: FGSM(0.1, (0.5, 0.0)), "positive"),
        (lambda: FGSM(0.1, bounds=(1, 0)), "first"),
        (lambda: make_attack("fgms"), "'fgsm', 'pgd'"),
    ],
)
def test_what_cannot_be_an_attack_is_refused(make, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused_and_say_why() -> None:
    model, inputs, labels = pictures()
    with pytest.raises(DataError, match="normalization"):
        FGSM(0.1)(model, normalised(inputs), labels)
    with pytest.raises(DataError, match="floats"):
        FGSM(0.1)(model, inputs.long(), labels)
    with pytest.raises(ArgumentError, match="3 channels"):
        FGSM((0.1, 0.2))(model, inputs, labels)


def test_any_function_is_an_attack() -> None:
    model, inputs, labels = pictures()
    model.train()

    def shift(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        assert not model.training
        return inputs + 0.1

    assert make_attack(shift) is shift
    assert torch.equal(attacked(shift, model, inputs, labels), inputs + 0.1)
    assert model.training
    with pytest.raises(DataError, match="shape"):
        attacked(lambda *_: inputs[:1], model, inputs, labels)
