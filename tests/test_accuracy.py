"""The accuracy board: what each criterion keeps, the same for all, and a record that goes on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.board import cli, run
from benchmarks.board import tables as board_tables
from benchmarks.board.boards import BOARDS, Board, Level
from benchmarks.board.cells import COMPENSATED, CRITERIA, UNTUNED, Measured, Variant
from benchmarks.board.pruning import Calibration, Tuning
from benchmarks.common import data, models, settings, training
from benchmarks.common.data import Split
from benchmarks.common.record import Record
from benchmarks.common.training import Recipe
from benchmarks.rivals import ranking
from networks import assert_unchanged, cnn, fingerprint, mlp, settled
from nss_prune import NSSPruner
from nss_prune.core.nested import tensors_in
from nss_prune.core.views import views_of
from nss_prune.errors import ArgumentError

DIGITS = BOARDS["mlp-digits"]
OURS = Variant("divergence", "ours")
HALF = Level("MACs", 0.5)


def random_batches(model, shape, classes, *, samples=96, size=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *shape, generator=generator)
    inputs = inputs.to(next(model.parameters()).dtype)
    labels = torch.randint(classes, (samples,), generator=generator)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def calibration_of(model, shape, classes, board=DIGITS):
    batches = random_batches(model, shape, classes)
    pixels = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    split = Split(pixels, labels, torch.zeros(()), torch.ones(()))
    tuning = Tuning(split, Recipe(epochs=5, learning_rate=0.01, batch=16))
    return Calibration(board, model.eval(), batches[0][0][:2], batches, 0, tuning)


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


def widths(model: nn.Module) -> list[int]:
    """Of the layers with a bias, from the first on."""
    return [len(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def kept_rows(whole: nn.Linear, smaller: nn.Linear) -> torch.Tensor:
    """True for the neurons of a whole layer that are left, found by their biases."""
    return torch.isin(whole.bias, smaller.bias)


class TestModels:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet20-cifar10", 272_474),
            ("vgg16-quarter-cifar10", 924_186),
            ("vit-cifar10", 2_693_578),
            ("vit-small-cifar10", 208_074),
            ("vit-stem-cifar10", 2_276_042),
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


class TestPrune:
    def test_hidden_channels_alone_to_a_share_of_their_own_cost(self):
        torch.manual_seed(0)
        calibration = calibration_of(Bottleneck(), (3, 8, 8), 4, BOARDS["efficientnet-imagenet"])
        for variant in (OURS, Variant("magnitude-l1", "global"), Variant("vbp", "local")):
            found = calibration.prune(variant, HALF, "plain")
            assert widths(found.model) == [6, 12, 12, 8, 4]
            assert found.reached == pytest.approx(0.5)

    def test_divergence_is_what_a_user_gets(self, of_cnn):
        for kind, arguments in {
            "plain": {"fold": False},
            "folded": {},
            "folded-recalibrated": {"recalibrate": True},
            "refit-balanced": {"fold": "refit", "balance": True},
        }.items():
            model = copy.deepcopy(of_cnn.model)
            NSSPruner(
                model, of_cnn.example, macs_budget=0.5, data=of_cnn.batches, **arguments
            ).step()
            found = of_cnn.prune(OURS, HALF, kind).model.state_dict()
            for name, value in model.state_dict().items():
                assert torch.equal(found[name], value), (kind, name)

    def test_semantic_is_one_theta_for_all_layers(self, of_mlp):
        model = copy.deepcopy(of_mlp.model)
        pruner = NSSPruner(
            model, of_mlp.example, macs_budget=0.5, data=of_mlp.batches, strategy="semantic",
            fold=False,
        )  # fmt: skip
        pruner.step()
        found = of_mlp.prune(Variant("semantic", "global"), HALF, "plain").model
        assert all(torch.equal(found.state_dict()[n], v) for n, v in model.state_dict().items())

    def test_magnitude_is_the_normalized_mean_of_rows_and_columns(self, of_mlp):
        model = of_mlp.model
        scores = {}
        for made, read in ((1, 3), (3, 5)):
            rows = model[made].weight.detach().square().sum(1)
            columns = model[read].weight.detach().square().sum(0)
            scores[made] = (rows + columns) / (rows + columns).mean()
        local = of_mlp.prune(Variant("magnitude-l2", "local"), HALF, "plain").model
        together = of_mlp.prune(Variant("magnitude-l2", "global"), HALF, "plain").model
        kept = {made: kept_rows(model[made], together[made]) for made in scores}
        for made, values in scores.items():
            mine = kept_rows(model[made], local[made])
            assert values[mine].min() > values[~mine].max()
        gone = torch.cat([values[~kept[made]] for made, values in scores.items()])
        assert torch.cat([values[kept[made]] for made, values in scores.items()]).min() > gone.max()

    def test_local_takes_the_same_share_of_each_layer(self, of_cnn):
        whole = widths(of_cnn.model)[:-1]
        left = widths(of_cnn.prune(Variant("lamp", "local"), HALF, "plain").model)[:-1]
        shares = [new / old for new, old in zip(left, whole, strict=True)]
        assert max(shares) - min(shares) <= 1 / min(whole)

    def test_taylor_sees_the_gradient_of_the_mean_loss_and_hessian_all_samples(self, of_mlp):
        model, batches = of_mlp.model, of_mlp.batches
        mean = ranking.mean_gradients(model, batches)
        squared = ranking.squared_gradients(model, batches)
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
        found = of_mlp.prune(Variant("hessian", "local"), HALF, "plain").model
        kept = kept_rows(model[3], found[3])
        assert (row + column)[kept].min() > (row + column)[~kept].max()

    def test_layers_that_a_criterion_leaves_alone_stay(self, of_cnn):
        met = of_cnn.prune(Variant("bn-scale", "global"), Level("parameters", 0.9), "plain")
        assert met.reached <= 0.9
        before, after = widths(of_cnn.model), widths(met.model)
        assert [new < old for new, old in zip(after, before, strict=True)] == [
            True, False, False, False,
        ]  # fmt: skip
        for allocation in ("local", "global"):
            unmet = of_cnn.prune(Variant("bn-scale", allocation), Level("parameters", 0.1), "plain")
            assert widths(unmet.model) == [1, *before[1:]]
            assert unmet.reached > 0.1

    def test_a_criterion_without_a_say(self, of_mlp):
        assert of_mlp.prune(Variant("bn-scale", "local"), HALF, "plain") is None

    def test_random_is_the_seeds(self, of_mlp):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        variant = Variant("random", "local")
        first, again, other = (
            replace(of_mlp, seed=seed).prune(variant, HALF, "plain").model[1].bias
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "divergence"])
    @pytest.mark.parametrize("allocation", ["local", "global"])
    def test_budgets_are_met(self, criterion, allocation, of_cnn):
        level = Level("MACs", 0.6)
        found = of_cnn.prune(Variant(criterion, allocation), level, "plain")
        assert 0.5 < found.reached <= 0.6

    def test_every_kind_has_the_same_widths_and_leaves_the_whole_model_alone(self, of_cnn):
        model, variant = of_cnn.model, Variant("vbp", "global")
        before = fingerprint(model)
        smaller = {kind: of_cnn.prune(variant, HALF, kind).model for kind in UNTUNED}
        assert_unchanged(model, before)
        assert len({tuple(widths(m)) for m in smaller.values()}) == 1
        with torch.no_grad():
            outputs = {kind: m(of_cnn.batches[0][0]) for kind, m in smaller.items()}
        # Nothing is removed before its only norm.
        torch.testing.assert_close(outputs["recalibrated"], outputs["plain"])
        torch.testing.assert_close(outputs["folded-recalibrated"], outputs["folded"])
        for kind in ("folded", "folded-recalibrated", "refit"):
            shifts = outputs[f"{kind}-balanced"] - outputs[kind]
            torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts))
        different = [outputs[kind] for kind in ("plain", "folded", "refit", "own")]
        for i in range(len(different)):
            for other in different[:i]:
                assert not torch.allclose(different[i], other)

    @pytest.mark.parametrize(
        ("variant", "kind"),
        [(OURS, "plain"), (OURS, "folded"), (Variant("vbp", "global"), "own")],
    )
    def test_tuned_models_are_trained_on(self, variant, kind):
        torch.manual_seed(0)
        found = calibration_of(mlp().float(), (12,), 3)
        before, after = (found.prune(variant, HALF, k).model for k in (kind, f"{kind}-tuned"))
        state = before.state_dict()
        assert all(value.shape == state[n].shape for n, value in after.state_dict().items())
        assert not after.training
        inputs, labels = (torch.cat(part) for part in zip(*found.batches, strict=True))
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(m(inputs), labels) for m in (before, after)]
        assert losses[1] < losses[0] - 0.01

    def test_what_is_made_up_for_comes_closer_to_the_whole_model(self, of_cnn):
        inputs = torch.cat([x for x, _ in of_cnn.batches])
        with torch.no_grad():
            wanted = of_cnn.model(inputs)
            for criterion in ("divergence", *COMPENSATED):
                variant = OURS if criterion == "divergence" else Variant(criterion, "global")
                errors = {
                    kind: float((of_cnn.prune(variant, HALF, kind).model(inputs) - wanted).norm())
                    for kind in ("plain", "folded", "refit", "own")
                    if variant.has(kind)
                }
                assert errors.pop("plain") > max(errors.values())

    def test_a_vision_transformer_is_pruned_by_heads_too(self):
        torch.manual_seed(0)
        calibration = calibration_of(models.vit_cifar(depth=2).eval(), (3, 32, 32), 10)
        found = calibration.prune(Variant("magnitude-l2", "local"), Level("MACs", 0.4), "plain")
        assert found.reached <= 0.4
        assert found.model.blocks[0].attn.num_heads < 3
        (outputs,) = tensors_in(found.model(torch.randn(2, 3, 32, 32)))
        assert outputs.shape == (2, 10)
        hidden = calibration.prune(Variant("corp", "global"), Level("MACs", 0.8), "own").model
        assert hidden.blocks[0].attn.num_heads == 3
        assert hidden.embed_dim == 192
        assert hidden.blocks[0].mlp.fc1.out_features < 768

    @pytest.mark.parametrize("criterion", ["divergence", "divergence-whole-heads"])
    def test_heads_stay_whole_where_that_is_asked_for(self, criterion):
        torch.manual_seed(0)
        small = models.vit_cifar(width=64, depth=2, heads=4).eval()
        batches = random_batches(small, (3, 32, 32), 10, samples=128)
        calibration = replace(calibration_of(small, (3, 32, 32), 10), batches=batches)
        found = calibration.prune(Variant(criterion, "ours"), Level("MACs", 0.3), "folded").model
        inside = any(block.attn.head_dim < 16 for block in found.blocks)
        assert inside == (criterion == "divergence")


def rows_of(split):
    return {tuple(row.tolist()) for row in split.pixels.flatten(1)}


class TestDrawn:
    def test_a_seed_draws_what_calibrates_and_the_test_data_stays(self, digits):
        draws = [run.drawn(DIGITS, digits, seed, False) for seed in (0, 0, 1)]
        (first, check), (again, _), (other, same) = draws
        assert len(first) == DIGITS.calibrated
        assert torch.equal(first.pixels, again.pixels)
        assert not torch.equal(first.pixels, other.pixels)
        assert check is same is digits.test
        assert not rows_of(first) & rows_of(check)

    def test_mirror_images_calibrate_too(self, digits):
        split, _ = run.drawn(DIGITS, digits, 0, False)
        batches = run.seen(replace(DIGITS, mirrored=True), split)
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert views_of(batches) == 2
        assert torch.equal(inputs[::2], split.inputs())
        assert torch.equal(inputs[1::2].flip(3), split.inputs())
        assert torch.equal(labels, split.labels.repeat_interleave(2))
        assert views_of(run.seen(DIGITS, split)) == 1

    def test_redrawn_check_data_is_as_large_and_apart(self, digits):
        (first, check), (_, other) = (run.drawn(DIGITS, digits, s, True) for s in (0, 1))
        assert len(check) == len(digits.test)
        assert not torch.equal(check.pixels, other.pixels)
        assert not rows_of(first) & rows_of(check)

    def test_more_than_there_are(self, digits):
        board = Board("b", DIGITS.setting, 5000)
        with pytest.raises(ArgumentError, match="5000 pictures are to calibrate, and 1397"):
            run.drawn(board, digits, 0, False)


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
        rows = board_tables.table_rows(self.CELLS)
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
        assert board_tables.level_names(cells) == expected

    def test_a_budget_that_is_not_met_is_an_empty_cell(self, tmp_path):
        torch.manual_seed(0)
        board = Board("b", DIGITS.setting, 96, batch=32)
        calibration = calibration_of(cnn().float(), (3, 12, 12), 5, board)
        record = Record(
            tmp_path / "accuracy-b.json", "b", Measured, run.place, board_tables.board_tables,
            key="cells",
        )  # fmt: skip
        inputs, labels = (torch.cat(part) for part in zip(*calibration.batches, strict=True))
        check = data.Split(inputs, labels, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
        variant = Variant("bn-scale", "global")
        todo = [(variant, Level("parameters", share), "plain") for share in (0.9, 0.1)]
        run.measure(record, calibration, check, todo)
        met, unmet = record.entries
        assert met.accuracy is not None
        assert unmet.accuracy is None
        assert unmet.class_drop is unmet.agreement is None
        assert unmet.reached > 0.1
        whole, smaller = calibration.model, calibration.prune(*todo[0]).model
        lost = []
        for label in labels.unique():
            mine = inputs[labels == label]
            before, after = (
                sum(int(model(x[None]).argmax()) == label for x in mine) / len(mine)
                for model in (whole, smaller)
            )
            lost.append(before - after)
        assert met.class_drop == pytest.approx(max(lost))
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
        (row,) = board_tables.class_drops([*cells, *self.CELLS])
        assert (row["level"], row["kind"]) == ("MACs 0.5", "folded")
        expected = {
            "accuracy": [50, 70], "balanced": [60, 80], "drop": [40, 60], "balanced_drop": [20, 10],
        }  # fmt: skip
        for key, values in expected.items():
            assert row[key]["values"] == pytest.approx(values)

    def test_lead_over_the_best_that_owes_nothing_to_ours(self):
        rows = board_tables.summary(self.CELLS)
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
        for row in board_tables.summary([*theirs, *ours]):
            assert row["whole"]["values"] == pytest.approx([90, 80])
            assert row["lead"]["values"] == pytest.approx([30])
        for row in board_tables.summary([theirs[0], *ours]):
            assert row["lead"] is None

    def test_agreement_has_leads_of_its_own_where_it_is_known(self):
        known = [
            replace(one, agreement=None if one.accuracy is None else 1 - one.accuracy / 2)
            for one in self.CELLS
            if one.kind == "plain"
        ]
        rows = board_tables.agreements([*known, *self.CELLS])
        assert [(row["kind"], row["rival"]) for row in rows] == [
            ("plain", "lamp, global"), ("untuned", "lamp, global, plain"),
        ]  # fmt: skip
        assert rows[0]["lead"]["values"] == pytest.approx([5, 0])
        assert board_tables.agreements(self.CELLS[:10]) == []


WORDS = ("--epochs", "3", "--seeds", "1", "--kept", "0.8,0.5", "--calibrated", "200")


class TestScript:
    def run(self, tmp_path, *words):
        places = ["--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
        cli.main([*WORDS, *places, *words])
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

        real, calls = Calibration.prune, []

        def counted(calibration, variant, level, kind):
            calls.append(kind)
            return real(calibration, variant, level, kind)

        monkeypatch.setattr(Calibration, "prune", counted)
        more = self.run(tmp_path, "--criteria", "magnitude-l2,lamp,divergence",
                        "--allocations", "global", "--kinds", "plain,folded")  # fmt: skip
        assert calls == ["plain", "folded"] * 2
        assert more["cells"][: len(content["cells"])] == content["cells"]
        assert len(more["cells"]) == len(content["cells"]) + 4

    def test_a_stopped_run_goes_on_and_comes_to_the_same(self, tmp_path, monkeypatch):
        words = ("--criteria", "taylor,random", "--allocations", "local", "--kinds", "plain,folded")
        whole = self.run(tmp_path / "whole", *words)
        real, calls = Calibration.prune, []

        def stopping(calibration, variant, level, kind):
            calls.append(kind)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(calibration, variant, level, kind)

        with monkeypatch.context() as patched:
            patched.setattr(Calibration, "prune", stopping)
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
            cli.main([*words, "--output", str(tmp_path), "--cache", str(tmp_path)])
        assert not list(tmp_path.iterdir())

    def test_the_boards_that_are_asked_for(self):
        of = {name: [str(level) for level in board.levels] for name, board in BOARDS.items()}
        assert of["alexnet-cifar10"] == [f"MACs {kept}" for kept in (0.9, 0.8, 0.7, 0.6, 0.5)]
        assert of["mlp-mnist"][5:] == [f"parameters {k}" for k in (0.3, 0.2, 0.1, 0.07, 0.05)]
        assert of["efficientnet-imagenet-whole"] == ["MACs 0.8", "MACs 0.6"]
        assert BOARDS["efficientnet-imagenet"].hidden
