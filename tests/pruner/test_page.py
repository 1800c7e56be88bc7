"""The report as a page, as a frame, as JSON, and over several steps."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from nss_prune import NSSPruner, Report
from nss_prune.core.memory import peak_memory
from nss_prune.errors import ArgumentError, FileFormatError
from nss_prune.graph.costs import Cost
from nss_prune.pruner.figures import Figures, category_shares
from nss_prune.pruner.journal import Journal
from nss_prune.pruner.page.curve import curve
from nss_prune.pruner.page.heat import category_map, sensitivity_map
from nss_prune.pruner.report import Row
from nss_prune.pruner.spent import STAGE_COLUMNS

INPUTS = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)
    return nn.Sequential(*layers)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(120, 12, generator=generator), torch.arange(120) % 4)]


def pruned(**arguments: object) -> NSSPruner:
    pruner = NSSPruner(network(), INPUTS, data=batches(), **arguments)
    for _ in range(pruner.iterative_steps):
        pruner.step()
    return pruner


class Tags(html.parser.HTMLParser):
    """Refuses tags that are not closed, and anything that would be fetched."""

    VOID = ("meta", "br", "rect", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "script", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def parsed(path: Path) -> Tags:
    text = path.read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    return tags


def test_a_page_with_everything_that_a_budget_by_divergence_knows(tmp_path: Path) -> None:
    report = pruned(params_budget=0.5).report
    assert report is not None
    report = report.with_figures(accuracy=(0.5, 0.4), command="nss-prune <b>", latency=(0.1, 0.2))
    report.to_html(tmp_path / "report.html", "a & b")
    text = (tmp_path / "report.html").read_text()
    assert parsed(tmp_path / "report.html").headings == [
        "Not faster",
        "Notes",
        "Neurons of each layer",
        "Predicted divergence over size",
        "Sensitivity of each layer",
        "Left alone, and why",
        "Seconds and memory of each stage",
        "How it was made",
    ]
    assert "nss-prune &lt;b&gt;" in text
    assert "a &amp; b" in text
    assert "prefers-color-scheme: dark" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_a_page_of_the_semantic_rule_shows_categories(tmp_path: Path) -> None:
    report = pruned(theta=0.9).report
    assert report is not None
    report.to_html(tmp_path / "report.html")
    headings = parsed(tmp_path / "report.html").headings
    assert "Categories by layer" in headings
    assert "Predicted divergence over size" not in headings


def test_the_curve_falls_and_the_chosen_point_is_on_the_budget() -> None:
    figures = pruned(params_budget=0.5).report.figures
    shares, nats = zip(*figures.curve, strict=True)
    assert list(shares) == sorted(shares)
    assert nats[-1] == 0
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(nats))
    assert figures.kept == pytest.approx(0.5, abs=0.01)
    below = max(value for share, value in figures.curve if share >= figures.kept - 0.1)
    above = min(value for share, value in figures.curve if share <= figures.kept + 0.1)
    assert above <= figures.divergence <= below


def test_sensitivities_are_read_off_the_eliminations() -> None:
    pruner = NSSPruner(network(), INPUTS, data=batches(), params_budget=0.5)
    found = pruner.evidence.eliminations
    table = pruner.sensitivity.by_layer
    assert table.keys() == found.keys()
    assert table["0"][0.5] == pytest.approx(float(found["0"].divergence[19]))
    assert table["2"][0.1] == pytest.approx(float(found["2"].divergence[2]))
    for by_share in table.values():
        values = list(by_share.values())
        assert values == sorted(values)


def test_the_share_of_a_category_is_by_its_own_contributions() -> None:
    pruner = NSSPruner(network(), INPUTS, data=batches(), theta=0.5)
    chosen, contributions = pruner.slice, pruner.profile.contributions["taylor"]
    table = category_shares(chosen, contributions, pruner.profile.categories)
    for layer, kept in chosen.kept.items():
        for row, name in enumerate(["0", "1", "2", "3"]):
            sizes = [abs(float(value)) for value in contributions[layer][row]]
            wanted = sum(size for size, stays in zip(sizes, kept, strict=True) if stays)
            assert table[layer][name] == pytest.approx(wanted / sum(sizes), rel=1e-6)


def test_a_report_of_all_steps_adds_up() -> None:
    pruner = pruned(params_budget=0.5, iterative_steps=3)
    total = pruner.cumulative_report
    assert total is not None
    assert len(total.steps) == 3
    assert total.steps[-1] is pruner.report
    assert total.before == total.steps[0].before
    assert total.after == total.steps[-1].after
    rows = {row.layer: (row.before, row.after) for row in total.rows}
    assert rows["0"] == (40, pruner.model[0].out_features)
    nats = [step.figures.divergence for step in total.steps]
    assert total.figures.divergence == pytest.approx(sum(nats))
    for name, spent in total.figures.seconds.items():
        assert spent == pytest.approx(sum(s.figures.seconds.get(name, 0) for s in total.steps))
    assert {"measuring", "selecting", "removing"} <= total.figures.seconds.keys()
    assert total.figures.memory.keys() == total.figures.seconds.keys()
    for name, size in total.figures.memory.items():
        assert size == sum(step.figures.memory.get(name, 0) for step in total.steps) >= 0
    lines = str(total).splitlines()
    for number, step in enumerate(total.steps, 1):
        (line,) = [line for line in lines if line.startswith(f"step {number}: ") and "left" in line]
        assert f"predicted divergence {step.figures.divergence:.4g} nats" in line
        assert f"{sum(step.figures.seconds.values()):.1f} s; peak memory +" in line
    (common,) = [note for note in total.notes if not note.startswith("step ")]
    assert all(common in step.notes for step in total.steps)


def test_interactive_steps_are_reported_as_they_were_taken() -> None:
    pruner = NSSPruner(network(), INPUTS, data=batches(), params_budget=0.5)
    assert pruner.cumulative_report is None
    for group in pruner.step(interactive=True):
        if group[0].dep.target.module is pruner.model[0]:
            group.prune()
    rows = {row.layer: (row.before, row.after) for row in pruner.report.rows}
    assert rows["0"] == (40, pruner.model[0].out_features)
    assert rows["0"][1] < 40
    assert rows["2"] == (30, 30)
    assert pruner.report.after.parameters == sum(p.numel() for p in pruner.model.parameters())
    assert pruner.cumulative_report == pruner.report


def test_interactive_steps_add_up_too() -> None:
    pruner = NSSPruner(network(), INPUTS, data=batches(), params_budget=0.5, iterative_steps=2)
    for _ in range(2):
        for group in pruner.step(interactive=True):
            group.prune()
    total = pruner.cumulative_report
    assert len(total.steps) == 2
    assert total.before == total.steps[0].before
    assert total.after.parameters == sum(p.numel() for p in pruner.model.parameters())
    nats = [step.figures.divergence for step in total.steps]
    assert total.figures.divergence == pytest.approx(sum(nats))
    for step in total.steps:
        assert {"measuring", "selecting", "removing"} <= step.figures.seconds.keys()
        assert step.figures.memory.keys() == step.figures.seconds.keys()


def test_memory_is_what_a_stage_raised_the_peak_by() -> None:
    journal = Journal(torch.device("cpu"))
    with journal.stage("small"):
        pass
    status = Path("/proc/self/statm")
    used = int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0
    size = peak_memory(torch.device("cpu")) - used + 2**27  # more than was ever in use
    with journal.stage("large"):
        torch.ones(size, dtype=torch.uint8)
    with journal.stage("again"):
        torch.ones(2**20, dtype=torch.uint8)
    assert journal.memory["small"] < 2**20
    assert 2**26 < journal.memory["large"] <= peak_memory(torch.device("cpu"))
    assert journal.memory["again"] < 2**20


def test_json_and_back(tmp_path: Path) -> None:
    total = pruned(params_budget=0.5, iterative_steps=2).cumulative_report
    again = Report.from_dict(json.loads(json.dumps(total.to_dict())))
    assert again == total
    assert again.figures == total.figures
    assert again.steps == total.steps
    again.to_html(tmp_path / "again.html")
    assert "Steps" in parsed(tmp_path / "again.html").headings
    with pytest.raises(FileFormatError, match="no report"):
        Report.from_dict({"rows": 3})


def test_what_is_not_faster_is_said() -> None:
    report = Report((Row("a", 4, 2),), Cost(4, 4), Cost(2, 2))
    assert not report.slower
    assert "latency" not in str(report)
    slower = report.with_figures(latency=(0.02, 0.0225))
    assert slower.slower
    assert "20 ms -> 22.5 ms, not faster with these inputs" in str(slower)
    faster = report.with_figures(latency=(0.02, 0.01))
    assert not faster.slower
    assert "(2.00 x as fast)" in str(faster)
    assert slower == faster


def test_maps_of_plain_tables() -> None:
    table = {"a": {0.5: 0.0, 0.9: 1e-9}, "b<": {0.5: 2.0}}
    drawn = sensitivity_map(table)
    assert drawn.count("<tr>") == 3
    assert "b&lt;" in drawn
    assert "<td></td>" in drawn
    assert sensitivity_map({"a": {0.5: 0.0}}).count("<td ") == 1
    many = category_map({"a": {str(i): i / 100 for i in range(100)}})
    assert "76 more categories" in many
    assert curve([(1.0, 0.0), (0.5, 1.0)], None, "MACs") == ""
    assert "nan" not in curve([(0.1, 1.0), (0.5, 1.0), (1.0, 0.0)], (0.5, 1.0), "MACs")


def test_a_frame_and_a_plot() -> None:
    report = pruned(params_budget=0.5).report
    matplotlib = pytest.importorskip("matplotlib")
    assert isinstance(report.plot(), matplotlib.figure.Figure)
    assert len(report.plot().axes) == 2
    assert len(report.with_figures(curve=()).plot().axes) == 1
    try:
        import pandas
    except ImportError:
        with pytest.raises(ArgumentError, match=r"nss_prune\[pandas\]"):
            report.to_dataframe()
    else:
        frame = report.to_dataframe()
        assert isinstance(frame, pandas.DataFrame)
        assert list(frame["before"]) == [row.before for row in report.rows]


def test_a_frame_of_the_stages() -> None:
    pandas = pytest.importorskip("pandas")
    total = pruned(params_budget=0.5, iterative_steps=2).cumulative_report
    frame = total.to_dataframe("stages")
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == STAGE_COLUMNS
    assert set(frame["step"]) == {1, 2}
    assert frame["seconds"].sum() == pytest.approx(sum(total.figures.seconds.values()))
    assert frame["memory"].sum() == sum(total.figures.memory.values())
    assert len(pruned(params_budget=0.5).report.to_dataframe("stages")) >= 3
    with pytest.raises(ArgumentError, match="layers"):
        total.to_dataframe("steps")


def test_totals_of_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no report"):
        Report.total([])
    assert math.isclose(
        Figures.from_dict({"sensitivity": {"a": {"0.5": 1}}}).sensitivity["a"][0.5], 1
    )
