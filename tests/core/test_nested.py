"""Nested tensors of every kind that models and data use."""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from nss_prune.core.nested import (
    add_nested,
    at_path,
    map_tensors,
    moved,
    tensors_by_path,
    tensors_in,
)


class Pair(NamedTuple):
    first: Any
    second: Any


class DerivedPair(Pair):
    """As nn.utils.rnn.PackedSequence is of its namedtuple."""


class DerivedList(list):  # type: ignore[type-arg]
    pass


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    name: str = "output"
    late: Tensor = field(init=False)


@dataclass(frozen=True)
class Frozen:
    logits: Tensor


class Registered:
    """As transformers registers its model outputs."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


_pytree.register_pytree_node(
    Registered, lambda value: ([value.tensor], None), lambda parts, _: Registered(parts[0])
)

A, B, C = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])


class WithLogits:
    """An output of no structure but its scores."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


NESTS: dict[str, tuple[Any, list[Tensor]]] = {
    "tensor": (A, [A]),
    "nothing": (None, []),
    "text": ("abc", []),
    "tuple": ((A, "x", [B, None], C), [A, B, C]),
    "empty": (((), [], {}), []),
    "dict in its order": ({"z": A, "a": B}, [A, B]),
    "OrderedDict": (collections.OrderedDict(z=A, a=(B, C)), [A, B, C]),
    "defaultdict": (collections.defaultdict(list, z=A, a=B), [A, B]),
    "UserDict": (collections.UserDict(z=A, a=B), [A, B]),
    "read-only mapping": (types.MappingProxyType({"z": A, "a": B}), [A, B]),
    "namedtuple": (Pair(A, {"x": B}), [A, B]),
    "class of a namedtuple": (DerivedPair(A, 3), [A]),
    "class of a list": (DerivedList([A, B]), [A, B]),
    "sort's result": (torch.tensor([3.0]).sort(), [torch.tensor([3.0]), torch.tensor([0])]),
    "dataclass": (Output(A, (B, C)), [A, B, C]),
    "frozen dataclass": ([Frozen(A)], [A]),
    "registered": ((Registered(A), B), [A, B]),
    "object with logits": (WithLogits(A), [A]),
    "dataclass itself": (Output, []),
}


@pytest.mark.parametrize("name", NESTS)
def test_tensors_come_in_order_and_are_mapped_in_their_places(name: str) -> None:
    nest, expected = NESTS[name]
    found = tensors_in(nest)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    mapped = map_tensors(lambda tensor: tensor + 10, nest)
    if name == "read-only mapping":
        assert type(mapped) is dict
    else:
        assert type(mapped) is type(nest)
    assert all(
        torch.equal(one, other + 10)
        for one, other in zip(tensors_in(mapped), expected, strict=True)
    )
    again = tensors_in(nest)  # what was given stays as it was
    assert all(one is other for one, other in zip(again, found, strict=True))


@pytest.mark.parametrize("name", NESTS)
def test_a_path_leads_to_each_tensor(name: str) -> None:
    nest, expected = NESTS[name]
    paths = [path for path, _ in tensors_by_path(nest)]
    assert [at_path(nest, path) for path in paths] == expected
    assert len(set(paths)) == len(paths)


def test_other_leaves_and_names_stay() -> None:
    mapped = map_tensors(torch.neg, {"x": (A, "x", 3), "y": Pair(None, [B])})
    assert list(mapped) == ["x", "y"]
    assert mapped["x"][1:] == ("x", 3)
    assert mapped["y"].first is None
    assert mapped["y"].second == [-B]
    output = map_tensors(torch.neg, Output(A, (B,), name="mine"))
    assert output.name == "mine"
    assert output.logits == -A
    assert not hasattr(output, "late")


def test_a_packed_sequence() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    mapped = map_tensors(lambda tensor: tensor * 2, packed)
    assert isinstance(mapped, torch.nn.utils.rnn.PackedSequence)
    assert torch.equal(mapped.data, packed.data * 2)


def test_sums_and_moves() -> None:
    first, second = {"a": A, "b": (B, "x")}, {"a": B, "b": (C, "x")}
    assert add_nested(first, second) == {"a": A + B, "b": (B + C, "x")}
    assert moved(first, "meta")["b"][0].is_meta
    assert moved(first, "cpu")["a"] is A


def test_outputs_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    found = outputs.SequenceClassifierOutput(logits=A, hidden_states=(B, C))
    assert all(x is y for x, y in zip(tensors_in(found), [A, B, C], strict=True))
    mapped = map_tensors(torch.neg, found)
    assert type(mapped) is type(found)
    assert mapped.logits == -A
    assert mapped.hidden_states == (-B, -C)
