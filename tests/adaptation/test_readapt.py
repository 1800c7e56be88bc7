"""Re-adaptation: what it trains, what it measures, how it stops, resumes and fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.optim
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from networks import assert_unchanged, fingerprint
from nss_prune.adaptation.attacks import FGSM, PGD
from nss_prune.adaptation.freezing import (
    Freezing,
    critical_channels,
    critical_entries,
    train_critical,
)
from nss_prune.adaptation.readapt import ReadaptTrainer, evaluate_attack
from nss_prune.discovery.whole import discover
from nss_prune.errors import (
    ArgumentError,
    DataError,
    FileFormatError,
    ModelMismatchError,
    NumericalError,
)
from nss_prune.graph.slices import Slice
from processes import in_processes

Batches = list[tuple[Tensor, Tensor]]
SGD = {"optimizer": "sgd", "learning_rate": 0.01}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(160, 3),
    )


def stripes(samples: int = 48, seed: int = 0) -> Batches:
    """Pictures in [0, 1] whose brightest third is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    inputs = 0.6 * torch.rand(samples, 1, 6, 6, generator=generator)
    for i, label in enumerate(labels.tolist()):
        inputs[i, :, 2 * label : 2 * label + 2] += 0.4
    return list(zip(inputs.split(16), labels.split(16), strict=True))


def half_of(model: nn.Module, inputs: Tensor) -> Slice:
    groups = discover(model, inputs).groups
    kept = {
        group.name: torch.arange(group.size) % 2 == 0 for group in groups if "qkv" not in group.name
    }
    return Slice(kept, groups)


def learned() -> tuple[nn.Sequential, Slice]:
    model = network()
    ReadaptTrainer(model, None, attack=None, train="all").fit(stripes(), epochs=4, **SGD)
    return model, half_of(model, stripes()[0][0])


@pytest.mark.parametrize("attack", ["fgsm", "pgd", None])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_critical_neurons_learn_and_all_others_keep_their_bits(attack, optimizer: str) -> None:
    model, critical = learned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = ReadaptTrainer(model, critical, attack, 0.15)
    result = trainer.fit(
        stripes(),
        optimizer=optimizer,
        learning_rate=0.01,
        weight_decay=0.05,
        epochs=3,
        clip_norm=1.0,
        scheduler="cosine",
    )
    for name, mask in critical_entries(critical, model).items():
        after = model.state_dict()[name]
        assert torch.equal(after[~mask], before[name][~mask]), name
        assert (after[mask] != before[name][mask]).any()
    for name, mask in critical_channels(critical, model).items():
        for statistic in ("running_mean", "running_var"):
            old, new = (
                before[f"{name}.{statistic}"],
                model.get_submodule(name).get_buffer(statistic),
            )
            assert torch.equal(old[~mask], new[~mask])
            assert (old[mask] != new[mask]).all()
    assert result is trainer.result
    assert result.tpr == pytest.approx(1 - critical.compression_rate(model))
    assert result.losses[-1] < result.losses[0]
    assert result.seconds > 0


def test_robustness_rises_and_the_rates_are_what_they_say() -> None:
    model, critical = learned()
    attack, fresh = PGD(0.15, random_start=False), stripes(seed=1)
    adversaries = [(attack(model, inputs, labels), labels) for inputs, labels in stripes()]
    before = evaluate_attack(model, stripes(), attack)
    assert before == evaluate_attack(model, adversaries, None) < 0.9
    for kind in ("fresh", "fixed"):
        model, critical = learned()
        trainer = ReadaptTrainer(model, critical, attack, adversaries=kind)
        result = trainer.fit(stripes(), fresh, epochs=12, **SGD)
        assert result.ra == evaluate_attack(model, adversaries, None)
        assert result.raa == evaluate_attack(model, fresh, attack)
        assert result.ra > before
        assert len(result.scores) == 12
    clean = evaluate_attack(model, fresh, None)
    assert result.scores[-1] == pytest.approx((clean + result.raa) / 2)


def test_the_loss_is_that_of_the_samples_plus_that_of_their_adversaries() -> None:
    model, critical = learned()
    model.eval()
    inputs, labels = stripes(16)[0]
    moved = FGSM(0.1)(model, inputs, labels)
    statistics = {
        name: torch.ones_like(k) for name, k in critical_channels(critical, model).items()
    }
    head = {"7.bias": torch.ones(3, dtype=torch.bool)}
    freezing = Freezing(model, head, statistics)
    wanted = cross_entropy(model(inputs), labels) + cross_entropy(model(moved), labels)
    trainer = ReadaptTrainer(model, None, "fgsm", 0.1, train=freezing)
    result = trainer.fit([(inputs, labels)], epochs=1, **SGD)
    assert result.losses[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_a_vision_transformer_in_mixed_precision() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    inputs, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    seen = (inputs - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    critical = half_of(model, seen)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = ReadaptTrainer(model, critical, normalization=(mean, std))
    trainer.fit(
        [(seen, labels)], amp=torch.bfloat16, optimizer="lamb", learning_rate=0.01, epochs=5
    )
    for name, mask in critical_entries(critical, model).items():
        after = dict(model.named_parameters())[name]
        assert torch.equal(after[~mask], before[name][~mask]), name
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_modes_flags_and_hooks_are_as_before() -> None:
    model, critical = learned()
    model.eval()
    model[0].weight.requires_grad_(False)
    before = fingerprint(model)
    ReadaptTrainer(model, critical).fit(stripes(), epochs=1)
    after = fingerprint(model)
    for key in ("objects", "gradients", "modes", "hooks"):
        assert before[key] == after[key]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_stops_early_and_the_best_values_come_back() -> None:
    model, critical = learned()
    seen: list[dict[str, Tensor]] = []
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])

    def validate(model: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    trainer = ReadaptTrainer(model, critical)
    result = trainer.fit(stripes(), validate, epochs=9, patience=2)
    assert result.scores == (0.1, 0.5, 0.4, 0.3)
    assert all(torch.equal(value, seen[1][name]) for name, value in model.state_dict().items())


class Interrupted(Exception):
    pass


class Interrupting:
    """Batches that end in an exception in one of the passes."""

    def __init__(self, data: Batches, passes: int) -> None:
        self.data = data
        self.passes = passes

    def __iter__(self):
        self.passes -= 1
        for batch in self.data:
            yield batch
            if self.passes == 0:
                raise Interrupted


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, optimizer: str
) -> None:
    path = tmp_path / "training.safetensors"
    attack = PGD(0.1, steps=2)
    arguments = {
        "optimizer": optimizer,
        "learning_rate": 0.01,
        "scheduler": "cosine",
        "epochs": 4,
        "patience": 4,
    }
    model, critical = learned()
    torch.manual_seed(5)
    whole = ReadaptTrainer(model, critical, attack).fit(stripes(), stripes(seed=2), **arguments)
    other, critical = learned()
    torch.manual_seed(5)
    broken = ReadaptTrainer(other, critical, attack)
    before = fingerprint(other)
    with pytest.raises(Interrupted):
        broken.fit(Interrupting(stripes(), 3), stripes(seed=2), checkpoint=path, **arguments)
    assert_unchanged(other, before)
    assert not broken.optimizer.state
    with pytest.raises(ArgumentError, match="fit"):
        _ = broken.result
    torch.manual_seed(99)
    resumed = ReadaptTrainer(other, critical, attack)
    result = resumed.fit(stripes(), stripes(seed=2), checkpoint=path, resume=True, **arguments)
    assert result.losses == whole.losses
    assert result.scores == whole.scores
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    model, critical = learned()
    ReadaptTrainer(model, critical).fit(stripes(), epochs=1, checkpoint=path)
    for change in (lambda m: m[7].weight.data.add_(1), lambda m: m[0].weight.data.add_(1)):
        other, _ = learned()
        change(other)
        before = fingerprint(other)
        with pytest.raises(ModelMismatchError, match="frozen"):
            ReadaptTrainer(other, critical).fit(stripes(), epochs=2, checkpoint=path, resume=True)
        assert_unchanged(other, before)
    path.write_bytes(b"something else")
    with pytest.raises(FileFormatError):
        ReadaptTrainer(model, critical).fit(stripes(), epochs=2, checkpoint=path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": -1}, "positive"),
        ({"attack": "cw"}, "attack"),
        ({"adversaries": "old"}, "adversaries"),
        ({"train": "some"}, "train"),
        ({"no_such": 1}, "takes epochs, optimizer"),
    ],
)
def test_arguments_outside_what_they_may_be_are_refused(arguments, message: str) -> None:
    model = network()
    critical = half_of(model, stripes()[0][0])
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=message):
        ReadaptTrainer(model, critical, **arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"no_such": 1}, "takes epochs, optimizer"),
        ({"optimizer": "no such optimiser"}, "timm"),
        ({"scheduler": "no such scheduler"}, "scheduler"),
        ({"learning_rate": -1.0}, "timm"),
        ({"epochs": 0}, "epochs"),
        ({"patience": 0}, "patience"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"amp": torch.float64}, "amp"),
        ({"resume": True}, "checkpoint"),
        ({"restore_best": True}, "validation"),
        ({"warmup_epochs": 2}, "scheduler"),
        ({"on_epoch": 3}, "on_epoch"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, "parameters"),
    ],
)
def test_trainings_outside_what_they_may_be_are_refused(arguments, message: str) -> None:
    model = network()
    trainer = ReadaptTrainer(model, half_of(model, stripes()[0][0]))
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=message):
        trainer.fit(stripes(), **arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("offered", [True, False])
def test_adamw_by_name_is_fused_where_that_is_offered(
    monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    def make(model: nn.Module, **arguments) -> torch.optim.Optimizer:
        if arguments.get("fused") and not offered:
            raise RuntimeError("no fused kernel")
        return create_optimizer_v2(model, **arguments)

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", make)
    trainer = ReadaptTrainer(network(), None, None, train="all")
    trainer.fit(stripes(), epochs=1, optimizer="adamw")
    made = trainer.optimizer
    assert isinstance(made, torch.optim.AdamW)
    assert bool(made.defaults["fused"]) == offered


def test_a_function_makes_an_optimiser_of_what_trains() -> None:
    model = network()
    head = Freezing(model, {"7.bias": torch.ones(3, dtype=torch.bool)})
    trainer = ReadaptTrainer(model, None, None, train=head)
    trainer.fit(stripes(), epochs=1, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    assert [group["params"] for group in trainer.optimizer.param_groups] == [[model[7].bias]]


def test_what_is_of_another_model_is_refused() -> None:
    model, critical = learned()
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ModelMismatchError):
        ReadaptTrainer(other, critical)
    with pytest.raises(ArgumentError, match="another model"):
        ReadaptTrainer(other, None, train=train_critical(critical, model))
    with pytest.raises(ArgumentError, match="slice"):
        ReadaptTrainer(model, None)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([], DataError),
        (iter(stripes()), DataError),
        ([stripes()[0], stripes()[0][0]], DataError),
        ([stripes()[0], (stripes()[0][0], torch.full((16,), 7))], DataError),
        ([stripes()[0], (5 * stripes()[0][0], torch.zeros(16).long())], DataError),
        ([stripes()[0], (stripes()[0][0][:, :, :3], torch.zeros(16).long())], DataError),
    ],
)
def test_data_that_cannot_be_used_leaves_the_model_as_it_was(data, error) -> None:
    model, critical = learned()
    before = fingerprint(model)
    with pytest.raises(error):
        ReadaptTrainer(model, critical).fit(data, epochs=2)
    assert_unchanged(model, before)


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model, critical = learned()
    before = fingerprint(model)
    with pytest.raises(NumericalError, match="epoch 1"):
        ReadaptTrainer(model, critical).fit(
            stripes(), loss=lambda outputs, labels: outputs.sum(1) * float("nan")
        )
    assert_unchanged(model, before)
    with pytest.raises(ArgumentError, match="validation"):
        ReadaptTrainer(model, critical).fit(stripes(), patience=1)


def adapt_part(rank: int, folder: str) -> None:
    model, layer = network(), linear()
    critical = half_of(model, stripes()[0][0])
    torch.manual_seed(rank)
    trainer = ReadaptTrainer(model, critical, "pgd", 0.1)
    result = trainer.fit(
        stripes(seed=rank),
        stripes(seed=9)[rank : rank + 1],
        epochs=2,
        checkpoint=f"{folder}/training",
        **SGD,
    )
    inputs, labels = samples()
    part = [(inputs[4 * rank :][:4], labels[4 * rank :][:4])]
    ReadaptTrainer(layer, None, None, train="all").fit(part, epochs=1, **SGD)
    found = {"ra": result.ra, "scores": result.scores, "linear": layer.weight.detach()}
    torch.save({**found, "state": model.state_dict()}, f"{folder}/{rank}")


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.arange(8) % 3


def test_processes_stay_equal_and_learn_from_all_samples(tmp_path: Path) -> None:
    in_processes(adapt_part, tmp_path)
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    assert first["scores"] == second["scores"]
    assert first["ra"] == second["ra"]
    untouched = network().state_dict()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
        assert not torch.equal(value, untouched[name])
    assert (tmp_path / "training").exists()
    layer = linear()
    ReadaptTrainer(layer, None, None, train="all").fit([samples()], epochs=1, **SGD)
    torch.testing.assert_close(layer.weight.detach(), first["linear"], rtol=1e-6, atol=1e-7)


def test_trainings_are_told_of_and_have_a_history() -> None:
    model, critical = learned()
    told: list[dict[str, float]] = []
    result = ReadaptTrainer(model, critical, "fgsm", 0.1).fit(
        stripes(), stripes(seed=2), epochs=3, on_epoch=told.append
    )
    assert tuple(told) == result.history
    assert [metrics["score"] for metrics in told] == list(result.scores)
    for metrics in told:
        assert metrics["score"] == pytest.approx((metrics["accuracy"] + metrics["attacked"]) / 2)
    assert result.accuracy == evaluate_attack(model, stripes(seed=2), None)
    assert result.seconds == sum(metrics["seconds"] for metrics in told)
    assert result.notes == ()


def test_a_slice_that_leaves_nothing_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    groups = discover(model, stripes()[0][0]).groups
    everything = Slice({g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}, groups)
    trainer = ReadaptTrainer(model, everything, None)
    assert "100.0% of the parameters train" in caplog.text
    result = trainer.fit(stripes(), epochs=1)
    assert "leaves next to nothing out" in result.notes[0]
    assert result.accuracy == result.ra


def test_arguments_of_a_training_still_go_to_the_constructor_with_a_warning() -> None:
    model, critical = learned()
    other, _ = learned()
    with pytest.warns(DeprecationWarning, match="give epochs=, optimizer= to fit"):
        trainer = ReadaptTrainer(model, critical, None, epochs=2, optimizer="sgd")
    trainer.fit(stripes())
    ReadaptTrainer(other, critical, None).fit(stripes(), epochs=2, optimizer="sgd")
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.1}, {"momentum": 0.5}, {"clip_norm": 1.0}, {"attack": "pgd"}]
)
def test_a_checkpoint_of_other_hyper_parameters_is_refused(change, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    model, critical = learned()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ReadaptTrainer(model, critical).fit(stripes(), epochs=1, checkpoint=path, **SGD)
    model.load_state_dict(start)
    attack = change.pop("attack", "fgsm")
    settings = {**SGD, **change, "epochs": 2, "checkpoint": path, "resume": True}
    with pytest.raises(ModelMismatchError, match="another training: it has .*, this one"):
        ReadaptTrainer(model, critical, attack).fit(stripes(), **settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
