"""Hooks are attached in order and always detached."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from networks import assert_unchanged, fingerprint
from nss_prune.core.hooks import attached


def test_hooks_run_in_order_within_the_context_alone() -> None:
    layer, called = nn.Linear(2, 2), []

    def see(name: str) -> Any:
        return lambda *_: called.append(name)

    before = fingerprint(layer)
    with attached(
        (layer.register_forward_hook, see("after")),
        (layer.register_forward_pre_hook, see("before")),
        (layer.register_forward_hook, see("last")),
    ):
        layer(torch.zeros(1, 2))
    assert called == ["before", "after", "last"]
    layer(torch.zeros(1, 2))
    assert len(called) == 3
    assert_unchanged(layer, before)


def test_hooks_are_detached_after_an_error_in_the_body() -> None:
    layer = nn.Linear(2, 2)
    before = fingerprint(layer)
    register = partial(layer.register_forward_hook, always_call=True)
    with pytest.raises(KeyError), attached((register, lambda *_: None)):
        raise KeyError
    assert_unchanged(layer, before)


def test_none_is_attached_where_one_cannot_be() -> None:
    layer = nn.Linear(2, 2)
    before = fingerprint(layer)

    def refuse(hook: Any) -> Any:
        raise RuntimeError("no hook here")

    with (
        pytest.raises(RuntimeError, match="no hook"),
        attached((layer.register_forward_hook, print), (refuse, print)),
    ):
        pytest.fail("the body does not run")
    assert_unchanged(layer, before)
