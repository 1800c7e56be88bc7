"""The accuracy board: what each criterion keeps, the same for all, and a record that goes on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.board import all as accuracy
from benchmarks.board.all import BOARDS, UNTUNED, Board, Level, Measured, Variant
from benchmarks.common import data, models, settings, training
from benchmarks.common.data import Split
from benchmarks.common.training import Recipe
from networks import assert_unchanged, cnn, fingerprint, mlp, settled
from nss_prune import Slice
from nss_prune.allocation.budget import Limits, solve
from nss_prune.core.nested import tensors_in
from nss_prune.core.views import views_of
from nss_prune.errors import ArgumentError

DIGITS = BOARDS["mlp-digits"]
OURS = Variant("divergence", "ours")


def subject_of(model, shape, board=DIGITS):
    torch.manual_seed(0)
    example = torch.randn(2, *shape, dtype=next(model.parameters()).dtype)
    return accuracy.subject_of(board, model.eval(), example)


def random_batches(model, shape, classes, *, samples=96, size=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *shape, generator=generator)
    inputs = inputs.to(next(model.parameters()).dtype)
    labels = torch.randint(classes, (samples,), generator=generator)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def calibration_of(model, shape, classes):
    subject = subject_of(model, shape)
    batches = random_batches(model, shape, classes)
    pixels = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    split = Split(pixels, labels, torch.zeros(()), torch.ones(()))
    tuning = accuracy.Tuning(split, Recipe(epochs=5, learning_rate=0.01, batch=16))
    return accuracy.Calibration(subject, accuracy.Ranker(subject), batches, 0, tuning)


@pytest.fixture(scope="module")
def of_mlp():
    torch.manual_seed(0)
    return calibration_of(mlp(), (12,), 3)


@pytest.fixture(scope="module")
def of_cnn():
    torch.manual_seed(0)
    model = settled(cnn(), torch.randn(64, 3, 12, 12).double())
    return calibration_of(model, (3, 12, 12), 5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return data.load("digits", cache=tmp_path_factory.mktemp("cache"))


def counts(critical: Slice) -> dict[str, int]:
    return {name: int(kept.sum()) for name, kept in critical.kept.items()}


class TestModels:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet20-cifar10", 272_474),
            ("vgg16-quarter-cifar10", 924_186),
            ("vit-cifar10", 2_693_578),
            ("vit-small-cifar10", 208_074),
        ],
    )
    def test_those_beyond_the_paper(self, name, expected):
        setting = {setting.name: setting for setting in settings.BEYOND}[name]
        with torch.device("meta"):
            model = setting.build()
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


class Bottleneck(nn.Module):
    """A stem, and a block whose hidden channels alone are to go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv_pw = nn.Conv2d(6, 24, 1)
        self.conv_dw = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.conv_pwl = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs):
        hidden = self.conv_dw(self.conv_pw(self.stem(inputs).relu()).relu()).relu()
        return self.head(self.conv_pwl(hidden).relu().mean((2, 3)))


class TestSubject:
    def test_hidden_channels_alone_and_the_share_of_their_own_cost(self):
        board = BOARDS["efficientnet-imagenet"]
        subject = subject_of(Bottleneck(), (3, 8, 8), board)
        (group,) = subject.groups
        assert group.size == 24
        half = Slice({group.name: torch.arange(24) < 12}, subject.groups)
        assert subject.shares["MACs"](half) == pytest.approx(0.5)
        whole = subject_of(Bottleneck(), (3, 8, 8))
        assert len(whole.groups) == 3

    def test_costs_of_a_neuron_by_hand(self):
        subject = subject_of(mlp(4, (6,), 3), (4,))
        ((name, cost),) = accuracy.neuron_costs(subject.groups, subject.shares["MACs"]).items()
        assert cost == pytest.approx((4 + 3) / (4 * 6 + 6 * 3))
        parameters = accuracy.neuron_costs(subject.groups, subject.shares["parameters"])
        assert parameters[name] == pytest.approx((4 + 1 + 3) / (4 * 6 + 6 + 6 * 3 + 3))


class TestRanker:
    def test_magnitude_is_the_normalized_mean_of_rows_and_columns(self, of_mlp):
        model = of_mlp.subject.model
        scores = of_mlp._scores_of("magnitude-l2")
        for made, read in ((1, 3), (3, 5)):
            rows = model[made].weight.detach().square().sum(1)
            columns = model[read].weight.detach().square().sum(0)
            expected = (rows + columns) / 2
            expected = expected / expected.mean()
            torch.testing.assert_close(scores[str(made)], expected, rtol=1e-6, atol=0.0)

    def test_taylor_sees_the_gradient_of_the_mean_loss_and_hessian_all_samples(self, of_mlp):
        model, batches = of_mlp.subject.model, of_mlp.batches
        mean = accuracy.mean_gradients(model, batches)
        squared = accuracy.squared_gradients(model, batches)
        inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        by_sample = []
        for x, y in zip(inputs, labels, strict=True):
            copied = copy.deepcopy(model)
            nn.functional.cross_entropy(copied(x[None]), y[None]).backward()
            by_sample.append({name: p.grad for name, p in copied.named_parameters()})
        for name in mean:
            stacked = torch.stack([gradients[name] for gradients in by_sample])
            torch.testing.assert_close(mean[name], stacked.mean(0))
            torch.testing.assert_close(squared[name], stacked.square().mean(0))
        row = (model[3].weight.detach().square() * squared["3.weight"]).sum(1)
        column = (model[5].weight.detach().square() * squared["5.weight"]).sum(0)
        expected = (row + column) / (row + column).mean()
        found = of_mlp._scores_of("hessian")["3"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)

    def test_heads_are_ranked_as_the_mean_of_their_channels(self):
        torch.manual_seed(0)
        subject = subject_of(models.vit_cifar(), (3, 32, 32))
        heads = next(group for group in subject.groups if not group.has_channels)
        qkv = subject.model.get_submodule(heads.name)
        attention = subject.model.get_submodule(heads.name.rpartition(".")[0])
        with torch.no_grad():
            # The second head is the one that matters.
            qkv.weight.view(3, 3, 64, -1)[:, 1] *= 10
            attention.proj.weight.view(192, 3, 64)[:, 1] *= 10
        scores = accuracy.Ranker(subject).scores(accuracy.RIVALS["magnitude-l1"](), None)
        assert scores[heads.name].shape == (3,)
        assert int(scores[heads.name].argmax()) == 1
        assert all(len(scores[group.name]) == group.size for group in subject.groups)

    def test_layers_that_a_criterion_leaves_alone_stay(self, of_cnn):
        scores = of_cnn._scores_of("bn-scale")
        assert [bool(values.isinf().all()) for values in scores.values()] == [False, True, True]
        critical, _ = of_cnn.slice(Variant("bn-scale", "global"), Level("parameters", 0.9))
        sizes = {group.name: group.size for group in of_cnn.subject.groups}
        kept = counts(critical)
        assert [name for name in sizes if kept[name] < sizes[name]] == ["0"]
        for allocation in ("local", "global", "cost"):
            critical, reached = of_cnn.slice(
                Variant("bn-scale", allocation), Level("parameters", 0.1)
            )
            assert counts(critical) == {"0": 1, "4": 10, "7": 14}
            assert reached > 0.1

    def test_a_criterion_without_a_say(self, of_mlp, of_cnn):
        assert of_mlp.slice(Variant("bn-scale", "local"), Level("MACs", 0.5)) is None
        assert of_cnn.slice(Variant("bn-scale", "ours"), Level("MACs", 0.9)) is None

    def test_random_is_the_seeds(self, of_mlp):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        again = accuracy.Calibration(of_mlp.subject, of_mlp._ranker, of_mlp.batches, 0)
        other = accuracy.Calibration(of_mlp.subject, of_mlp._ranker, of_mlp.batches, 1)
        first, second, third = (c._scores_of("random")["1"] for c in (of_mlp, again, other))
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
        assert torch.equal(torch.rand(1), expected)


class TestAllocation:
    @pytest.mark.parametrize("criterion", [*accuracy.RIVALS, "semantic"])
    @pytest.mark.parametrize("allocation", accuracy.ALLOCATIONS)
    def test_budgets_are_met_and_the_best_of_each_layer_stay(self, criterion, allocation, of_cnn):
        level = Level("MACs", 0.6)
        found = of_cnn.slice(Variant(criterion, allocation), level)
        if (criterion, allocation) == ("bn-scale", "ours"):
            assert found is None  # two of three layers have no norm
            return
        critical, reached = found
        assert reached == pytest.approx(of_cnn.subject.shares["MACs"](critical))
        assert 0.5 < reached <= level.kept
        for name, scores in of_cnn._scores_of(criterion).items():
            kept = critical.kept[name]
            if not kept.all():
                assert scores[kept].min() >= scores[~kept].max()

    def test_local_takes_the_same_share_of_each_layer(self, of_cnn):
        critical, _ = of_cnn.slice(Variant("lamp", "local"), Level("MACs", 0.5))
        shares = [float(kept.float().mean()) for kept in critical.kept.values()]
        smallest = min(len(kept) for kept in critical.kept.values())
        assert max(shares) - min(shares) <= 1 / smallest

    def test_global_is_one_threshold(self, of_cnn):
        critical, _ = of_cnn.slice(Variant("taylor", "global"), Level("MACs", 0.5))
        scores = of_cnn._scores_of("taylor")
        kept = [scores[name][mask] for name, mask in critical.kept.items() if mask.sum() > 1]
        gone = [scores[name][~mask] for name, mask in critical.kept.items()]
        assert torch.cat(kept).min() >= torch.cat(gone).max()

    def test_cost_is_the_threshold_on_scores_per_cost(self, of_cnn):
        subject, level = of_cnn.subject, Level("MACs", 0.5)
        costs = accuracy.neuron_costs(subject.groups, subject.shares["MACs"])
        scores = {n: v / costs[n] for n, v in of_cnn._scores_of("fpgm").items()}
        expected, _ = solve(
            subject.groups, scores.__getitem__, 0.5, subject.shares["MACs"], Limits()
        )
        found, _ = of_cnn.slice(Variant("fpgm", "cost"), level)
        assert counts(found) == counts(expected)
        assert counts(found) != counts(of_cnn.slice(Variant("fpgm", "global"), level)[0])

    def test_ours_are_the_numbers_of_divergence(self, of_cnn):
        for level in (Level("MACs", 0.7), Level("parameters", 0.4)):
            ours, reached = of_cnn.slice(OURS, level)
            other, same = of_cnn.slice(Variant("random", "ours"), level)
            assert counts(ours) == counts(other)
            assert reached == pytest.approx(same)
            assert any(not torch.equal(kept, other.kept[name]) for name, kept in ours.kept.items())


class TestPruned:
    def test_every_kind_has_the_same_shapes_and_leaves_the_whole_model_alone(self, of_cnn):
        model = of_cnn.subject.model
        before = fingerprint(model)
        critical, _ = of_cnn.slice(OURS, Level("MACs", 0.5))
        smaller = {kind: accuracy.pruned(of_cnn, critical, kind) for kind in UNTUNED}
        shapes = [{n: v.shape for n, v in m.state_dict().items()} for m in smaller.values()]
        assert all(shape == shapes[0] for shape in shapes)
        assert_unchanged(model, before)
        inputs = of_cnn.batches[0][0]
        with torch.no_grad():
            outputs = {kind: m(inputs) for kind, m in smaller.items()}
            with critical.masked(model):
                torch.testing.assert_close(outputs["plain"], model(inputs))
        # Nothing is removed before its only norm.
        torch.testing.assert_close(outputs["recalibrated"], outputs["plain"])
        torch.testing.assert_close(outputs["folded-recalibrated"], outputs["folded"])
        for kind in ("folded", "folded-recalibrated", "refit"):
            shifts = outputs[f"{kind}-balanced"] - outputs[kind]
            torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts))
        different = [outputs[kind] for kind in ("plain", "folded", "refit")]
        for i in range(len(different)):
            for other in different[:i]:
                assert not torch.allclose(different[i], other)

    @pytest.mark.parametrize("kind", ["plain", "folded"])
    def test_tuned_models_are_trained_on(self, kind):
        torch.manual_seed(0)
        found = calibration_of(mlp().float(), (12,), 3)
        critical, _ = found.slice(OURS, Level("MACs", 0.5))
        before, after = (accuracy.pruned(found, critical, k) for k in (kind, f"{kind}-tuned"))
        state = before.state_dict()
        assert all(value.shape == state[n].shape for n, value in after.state_dict().items())
        assert not after.training
        inputs, labels = (torch.cat(part) for part in zip(*found.batches, strict=True))
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(m(inputs), labels) for m in (before, after)]
        assert losses[1] < losses[0] - 0.01

    def test_folding_comes_closer_to_the_whole_model(self, of_cnn):
        critical, _ = of_cnn.slice(OURS, Level("MACs", 0.7))
        inputs = torch.cat([x for x, _ in of_cnn.batches])
        with torch.no_grad():
            wanted = of_cnn.subject.model(inputs)
            errors = {
                kind: float((accuracy.pruned(of_cnn, critical, kind)(inputs) - wanted).norm())
                for kind in ("plain", "folded", "refit")
            }
        assert errors["refit"] < errors["plain"]
        assert errors["folded"] < errors["plain"]

    def test_a_vision_transformer_is_pruned_by_heads_too(self):
        torch.manual_seed(0)
        model = models.vit_cifar().eval()
        calibration = calibration_of(model, (3, 32, 32), 10)
        critical, reached = calibration.slice(Variant("magnitude-l2", "local"), Level("MACs", 0.6))
        assert reached <= 0.6
        smaller = accuracy.pruned(calibration, critical, "plain")
        (outputs,) = tensors_in(smaller(torch.randn(2, 3, 32, 32)))
        assert outputs.shape == (2, 10)


def rows_of(split):
    return {tuple(row.tolist()) for row in split.pixels.flatten(1)}


class TestDrawn:
    def test_a_seed_draws_what_calibrates_and_the_test_data_stays(self, digits):
        draws = [accuracy.drawn(DIGITS, digits, seed, False) for seed in (0, 0, 1)]
        (first, check), (again, _), (other, same) = draws
        assert len(first) == DIGITS.calibrated
        assert torch.equal(first.pixels, again.pixels)
        assert not torch.equal(first.pixels, other.pixels)
        assert check is same is digits.test
        assert not rows_of(first) & rows_of(check)

    def test_mirror_images_calibrate_too(self, digits):
        split, _ = accuracy.drawn(DIGITS, digits, 0, False)
        batches = accuracy.seen(replace(DIGITS, mirrored=True), split)
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert views_of(batches) == 2
        assert torch.equal(inputs[::2], split.inputs())
        assert torch.equal(inputs[1::2].flip(3), split.inputs())
        assert torch.equal(labels, split.labels.repeat_interleave(2))
        assert views_of(accuracy.seen(DIGITS, split)) == 1

    def test_redrawn_check_data_is_as_large_and_apart(self, digits):
        (first, check), (_, other) = (accuracy.drawn(DIGITS, digits, s, True) for s in (0, 1))
        assert len(check) == len(digits.test)
        assert not torch.equal(check.pixels, other.pixels)
        assert not rows_of(first) & rows_of(check)

    def test_more_than_there_are(self, digits):
        board = Board("b", DIGITS.setting, 5000)
        with pytest.raises(ArgumentError, match="5000 pictures are to calibrate, and 1397"):
            accuracy.drawn(board, digits, 0, False)


def cell(seed, criterion, allocation, kind, value, level="MACs 0.5"):
    return Measured(seed, criterion, allocation, level, kind, 0.5, value, 0.9)


class TestTables:
    CELLS = (
        cell(0, "divergence", "ours", "plain", 0.5), cell(1, "divergence", "ours", "plain", 0.7),
        cell(1, "divergence", "ours", "folded", 0.85), cell(0, "divergence", "ours", "folded", 0.8),
        cell(0, "lamp", "global", "plain", 0.6), cell(1, "lamp", "global", "plain", 0.7),
        cell(0, "lamp", "global", "folded", 0.7), cell(1, "lamp", "global", "folded", 0.7),
        cell(0, "lamp", "ours", "folded", 0.95), cell(1, "lamp", "ours", "folded", 0.95),
        cell(0, "bn-scale", "local", "plain", None), cell(1, "bn-scale", "local", "plain", 0.1),
    )  # fmt: skip

    def test_rows_are_in_the_order_of_the_board(self):
        rows = accuracy.table_rows(self.CELLS)
        assert [(row["criterion"], row.get("kind")) for row in rows] == [
            ("whole model", None), ("bn-scale, local", "plain"), ("lamp, global", "plain"),
            ("lamp, global", "folded"), ("lamp, ours", "folded"),
            ("divergence", "plain"), ("divergence", "folded"),
        ]  # fmt: skip
        assert rows[0]["MACs 0.5"]["values"] == pytest.approx([90, 90])
        assert rows[1]["MACs 0.5"] is None
        assert rows[-1]["MACs 0.5"]["values"] == pytest.approx([80, 85])

    def test_levels_are_ordered(self):
        mixed = ("parameters 0.07", "MACs 0.5", "parameters 0.3", "MACs 0.9")
        cells = [cell(0, "lamp", "global", "plain", 0.5, level) for level in mixed]
        expected = ["MACs 0.9", "MACs 0.5", "parameters 0.3", "parameters 0.07"]
        assert accuracy.level_names(cells) == expected

    def test_a_budget_that_is_not_met_is_an_empty_cell(self, tmp_path):
        calibration = calibration_of(cnn().float(), (3, 12, 12), 5)
        board = Board("b", DIGITS.setting, 96, batch=32)
        record = accuracy.Record(board, {}, tmp_path / "accuracy-b.json", "cpu")
        inputs, labels = (torch.cat(part) for part in zip(*calibration.batches, strict=True))
        check = data.Split(inputs, labels, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
        todo = [
            (Variant("bn-scale", "global"), Level("parameters", share), ["plain"])
            for share in (0.9, 0.1)
        ]
        accuracy.measure(record, calibration, check, 0, todo)
        met, unmet = record.cells
        assert met.accuracy is not None
        assert unmet.accuracy is None
        assert unmet.class_drop is unmet.agreement is None
        assert unmet.reached > 0.1
        smaller = accuracy.pruned(calibration, calibration.slice(*todo[0][:2])[0], "plain")
        lost = []
        for label in labels.unique():
            mine = inputs[labels == label]
            before, after = (
                sum(int(model(x[None]).argmax()) == label for x in mine) / len(mine)
                for model in (calibration.subject.model, smaller)
            )
            lost.append(before - after)
        assert met.class_drop == pytest.approx(max(lost))
        whole = calibration.subject.model
        equal = [int(smaller(x[None]).argmax()) == int(whole(x[None]).argmax()) for x in inputs]
        assert met.agreement == sum(equal) / len(equal)

    def test_the_class_that_loses_most_with_and_without_balance(self):
        cells = [
            replace(cell(seed, "divergence", "ours", kind, value), class_drop=drop)
            for seed, kind, value, drop in (
                (0, "folded", 0.5, 0.4), (1, "folded", 0.7, 0.6), (0, "plain", 0.3, 0.9),
                (0, "folded-balanced", 0.6, 0.2), (1, "folded-balanced", 0.8, 0.1),
            )
        ]  # fmt: skip
        (row,) = accuracy.class_drops([*cells, *self.CELLS])
        assert (row["level"], row["kind"]) == ("MACs 0.5", "folded")
        expected = {
            "accuracy": [50, 70], "balanced": [60, 80], "drop": [40, 60], "balanced_drop": [20, 10],
        }  # fmt: skip
        for key, values in expected.items():
            assert row[key]["values"] == pytest.approx(values)

    def test_lead_over_the_best_that_owes_nothing_to_ours(self):
        rows = accuracy.summary(self.CELLS)
        assert [row["kind"] for row in rows] == ["plain", "folded", "untuned"]
        assert [row["rival"] for row in rows] == [
            "lamp, global", "lamp, global", "lamp, global, folded",
        ]  # fmt: skip
        leads = [row["lead"]["values"] for row in rows]
        assert leads == [pytest.approx([-10, 0]), pytest.approx([10, 15]), pytest.approx([10, 15])]

    def test_a_lead_and_the_whole_model_are_of_the_same_seeds(self):
        ours, theirs = (
            [
                replace(cell(seed, name, allocation, "folded", value), dense=dense)
                for seed, value, dense in by
            ]
            for name, allocation, by in (
                ("divergence", "ours", [(1, 0.6, 0.9), (2, 0.5, 0.8)]),
                ("lamp", "global", [(0, 0.7, 1), (2, 0.2, 0.8)]),
            )
        )
        for row in accuracy.summary([*theirs, *ours]):
            assert row["whole"]["values"] == pytest.approx([90, 80])
            assert row["lead"]["values"] == pytest.approx([30])
        for row in accuracy.summary([theirs[0], *ours]):
            assert row["lead"] is None

    def test_agreement_has_leads_of_its_own_where_it_is_known(self):
        known = [
            replace(one, agreement=None if one.accuracy is None else 1 - one.accuracy / 2)
            for one in self.CELLS
            if one.kind == "plain"
        ]
        rows = accuracy.agreements([*known, *self.CELLS])
        assert [(row["kind"], row["rival"]) for row in rows] == [
            ("plain", "lamp, global"), ("untuned", "lamp, global, plain"),
        ]  # fmt: skip
        assert rows[0]["lead"]["values"] == pytest.approx([5, 0])
        assert accuracy.agreements(self.CELLS[:10]) == []


WORDS = ("--epochs", "3", "--seeds", "1", "--kept", "0.8,0.5", "--calibrated", "200")


class TestScript:
    def run(self, tmp_path, *words):
        places = ["--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
        accuracy.main([*WORDS, *places, *words])
        return json.loads((tmp_path / "accuracy-mlp-digits.json").read_text("utf-8"))

    def test_a_board_and_going_on_from_it(self, tmp_path, capsys, monkeypatch):
        content = self.run(tmp_path, "--criteria", "magnitude-l2,bn-scale,divergence",
                           "--allocations", "global", "--kinds", "all")  # fmt: skip
        assert "divergence" in capsys.readouterr().out
        assert (tmp_path / "accuracy-mlp-digits.png").stat().st_size > 10_000
        places = [(c["criterion"], c["level"], c["kind"]) for c in content["cells"]]
        # No norms to recalibrate, or to rank by.
        kinds = (
            "plain", "folded", "refit", "folded-balanced", "refit-balanced",
            "plain-tuned", "folded-tuned",
        )  # fmt: skip
        assert places == [
            (criterion, level, kind)
            for criterion in ("magnitude-l2", "divergence")
            for level in ("MACs 0.8", "MACs 0.5")
            for kind in kinds
        ]
        assert all(0.1 < c["accuracy"] <= 1 for c in content["cells"])
        assert str(tmp_path) not in json.dumps(content)

        real, calls = accuracy.pruned, []

        def counted(calibration, critical, kind):
            calls.append(kind)
            return real(calibration, critical, kind)

        monkeypatch.setattr(accuracy, "pruned", counted)
        more = self.run(tmp_path, "--criteria", "magnitude-l2,lamp,divergence",
                        "--allocations", "global", "--kinds", "plain,folded")  # fmt: skip
        assert calls == ["plain", "folded"] * 2
        assert more["cells"][: len(content["cells"])] == content["cells"]
        assert len(more["cells"]) == len(content["cells"]) + 4

    def test_a_stopped_run_goes_on_and_comes_to_the_same(self, tmp_path, monkeypatch):
        words = ("--criteria", "taylor,random", "--allocations", "local", "--kinds", "plain,folded")
        whole = self.run(tmp_path / "whole", *words)
        real, calls = accuracy.pruned, []

        def stopping(calibration, critical, kind):
            calls.append(kind)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(calibration, critical, kind)

        with monkeypatch.context() as patched:
            patched.setattr(accuracy, "pruned", stopping)
            with pytest.raises(KeyboardInterrupt):
                self.run(tmp_path / "parts", *words)
        assert self.run(tmp_path / "parts", *words)["cells"] == whole["cells"]

    def test_a_model_for_each_seed(self, tmp_path, digits):
        words = ("--criteria", "lamp", "--allocations", "local", "--kinds", "plain")
        (one, *_) = self.run(tmp_path, *words)["cells"]
        self.run(tmp_path, *words, "--models", "--seeds", "2", "--kept", "0.8")
        written = (tmp_path / "accuracy-mlp-digits-models.json").read_text("utf-8")
        first, second = json.loads(written)["cells"]
        assert first == one
        setting = DIGITS.setting.with_epochs(3)
        own = training.trained(
            setting.name, setting.build, digits, setting.recipe, 1, tmp_path / "cache", "cpu"
        )
        assert own.cached
        assert second["seed"] == 1
        assert second["dense"] == training.accuracy(own.model, digits.test)

    def test_a_file_that_was_measured_otherwise_is_not_mixed_with(self, tmp_path):
        words = ("--criteria", "random", "--allocations", "local", "--kinds", "plain")
        self.run(tmp_path, *words)
        with pytest.raises(ArgumentError, match="--fresh"):
            self.run(tmp_path, *words, "--evaluated", "10")
        fresh = self.run(tmp_path, *words, "--evaluated", "10", "--fresh")
        assert fresh["options"]["evaluated"] == 10
        assert len(fresh["cells"]) == 2

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--criteria", "snip"], "no criterion 'snip'"),
            (["--allocations", "fair"], "no allocation 'fair'"),
            (["--tuned-epochs", "0"], "--tuned-epochs is 0"),
            (["--kinds", "trained"], "no kind 'trained'"),
            (["--settings", "mlp"], "no setting 'mlp'"),
            (["--kept", "0.9,1.5"], "the share kept is 1.5"),
            (["--kept-parameters", "half"], "no comma list of numbers"),
            (["--calibrated", "1"], "at least 2 pictures"),
            (["--redraw"], "trained with"),
            (["--models", "--settings", "efficientnet-imagenet"], "a pretrained one"),
            (["--seeds", "0"], "at least 1"),
            (["--device", "abacus"], "cannot be used here"),
        ],
    )
    def test_options_are_checked_before_the_work(self, words, message, tmp_path):
        with pytest.raises(ArgumentError, match=message):
            accuracy.main([*words, "--output", str(tmp_path), "--cache", str(tmp_path)])
        assert not list(tmp_path.iterdir())

    def test_the_boards_that_are_asked_for(self):
        of = {name: [str(level) for level in board.levels] for name, board in BOARDS.items()}
        assert of["alexnet-cifar10"] == [f"MACs {kept}" for kept in (0.9, 0.8, 0.7, 0.6, 0.5)]
        assert of["mlp-mnist"][5:] == [f"parameters {k}" for k in (0.3, 0.2, 0.1, 0.07, 0.05)]
        assert of["efficientnet-imagenet-whole"] == ["MACs 0.8", "MACs 0.6"]
        assert BOARDS["efficientnet-imagenet"].hidden
