"""What is put back after a context is put back as a whole."""

from __future__ import annotations

import contextlib

import pytest

from nss_prune.core.afterwards import afterwards, completed


class Value:
    """Put back in two steps, of which the first may break off."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.steps = error, list[int]()

    def put_back(self) -> None:
        self.steps.append(1)
        error, self.error = self.error, None
        if error is not None:
            raise error
        self.steps.append(2)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, None])
def test_it_is_put_back_once_whatever_the_body_does(error: type[BaseException] | None) -> None:
    value = Value()
    with pytest.raises(error) if error else contextlib.nullcontext(), afterwards(value.put_back):
        assert not value.steps
        if error is not None:
            raise error
    assert value.steps == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError()])
def test_what_is_raised_meanwhile_goes_on_when_all_is_put_back(error: BaseException) -> None:
    value = Value(error)
    with pytest.raises(type(error)):
        completed(value.put_back)
    assert value.steps == [1, 1, 2]
