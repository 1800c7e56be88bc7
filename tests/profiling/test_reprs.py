"""What is printed fits on a screen, however large the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import batches, mlp
from nss_prune import Profile, Slice, profile
from nss_prune.adaptation.tasks import Task
from nss_prune.core.text import elided, listing, shortened
from nss_prune.graph.neurons import NeuronMap


def deep(layers: int) -> nn.Sequential:
    block = "a_block_with_a_rather_long_name_as_they_occur_in_models"
    model = nn.Sequential()
    for number in range(layers):
        model.add_module(f"{block}_{number}", nn.Linear(12 if number == 0 else 6, 6))
    return model.append(nn.Linear(6, 3)).double()


@pytest.fixture(scope="module", params=[1, 200])
def known(request) -> Profile:
    torch.manual_seed(0)
    data = batches(48, (12,), 3)
    return profile(deep(request.param), data, metrics=("taylor", "avg"), keep_statistics=True)


def test_all_are_short(known) -> None:
    critical = known.slice(0.9)
    task = Task("letters", critical, tuple(range(40)), 40, {"0.weight": torch.ones(3, 4).bool()})
    group = known.groups[0]
    limits = [
        (known, 1000), (critical, 700), (task, 900), (group, 200), (group.members[0], 200),
        (known.neurons, 1200), (known.statistics, 300),
    ]  # fmt: skip
    for value, limit in limits:
        text = repr(value)
        assert len(text) < limit, text
        assert len(text.splitlines()) <= 20
        assert "tensor" not in text


def test_they_say_what_one_wants_to_know() -> None:
    torch.manual_seed(0)
    known = profile(mlp(), batches(48, (12,), 3), ranking="signed")
    text = repr(known)
    assert all(word in text for word in ("27 neurons", "2 layers", "taylor", "signed", "48 used"))
    critical = known.slice(0.9)
    kept = {name: int(mask.sum()) for name, mask in critical.kept.items()}
    text = repr(critical)
    assert f"{sum(kept.values())} of 27" in text
    assert "theta 0.9" in text
    assert f"{kept['1']} of 16" in text
    assert f"{kept['3']} of 11" in text
    assert "ratio 0.5 (global" in repr(known.slice(ratio=0.5, strategy="global"))
    assert "16 neurons" in repr(known.groups[0])
    assert "16 of 16" in repr(known.groups[0].members[0])


def test_the_rule_of_a_slice_is_saved(known, tmp_path) -> None:
    critical = known.slice(0.9)
    for rule in (critical.rule, ""):
        Slice(critical.kept, critical.groups, rule).save(tmp_path / "slice.safetensors")
        assert Slice.load(tmp_path / "slice.safetensors").rule == rule


def test_a_table_in_a_notebook(known) -> None:
    critical = known.slice(0.9)
    table = critical._repr_html_()
    assert table.count("<tr>") <= 32
    assert table.startswith("<table>")
    name = known.groups[0].name
    assert f"<td>{name}</td><td>{int(critical.kept[name].sum())}</td><td>6</td>" in table
    strange = Slice(critical.kept, critical.groups, "a < b")
    assert "a &lt; b" in strange._repr_html_()


def test_what_is_left_alone_is_said() -> None:
    neurons = NeuronMap((), {f"layer{number}": "makes the output" for number in range(50)})
    text = repr(neurons)
    assert "50 left alone" in text
    assert "makes the output" in text
    assert len(text) < 600


def test_texts_are_cut_where_they_are_long() -> None:
    assert elided(["a", "b", "c"], 2, "more") == ["a", "b", "c"]
    assert elided(["a", "b", "c", "d"], 2, "more") == ["a", "b", "... 2 more"]
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abc...hijk"
    assert listing([("a", "1"), ("bcd", "2")], 5, "more") == ["  a    1", "  bcd  2"]
