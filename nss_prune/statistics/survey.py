"""One forward pass that shows which consumers are called, and the norms behind them."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from nss_prune.core.arguments import heads_called, on_input
from nss_prune.core.models import Forward, call_model, run, submodule
from nss_prune.core.nested import tensors_in


@dataclass(frozen=True)
class Survey:
    """What one forward pass shows of the consumers.

    Attributes:
        calls: Consumer -> number of calls, in the order of the first ones.
        norms: Consumer -> the BatchNorm that reads what it puts out, where nothing else does and
            both are called once.
    """

    calls: dict[str, int]
    norms: dict[str, str]


def survey(
    model: nn.Module, consumers: Iterable[str], inputs: Any, forward: Forward = call_model
) -> Survey:
    """Run one batch and see who is called, and what reads what they put out."""
    followed = _Followed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(heads_called(model))
        for name in consumers:
            hook = submodule(model, name).register_forward_hook(followed.reader_hook(name))
            stack.callback(hook.remove)
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                stack.callback(on_input(module, followed.norm_hook(name)).remove)
        with followed:
            outputs = run(model, inputs, 0, forward)
    for tensor in tensors_in(outputs):
        followed.count(tensor)
    norms = {
        name: norm
        for name, norm in followed.norms.items()
        if followed.calls[name] == followed.norm_calls[norm] == followed.uses[name] == 1
        and submodule(model, norm).running_mean is not None
    }
    return Survey(dict(followed.calls), norms)


class _Followed(TorchFunctionMode):
    """Counts the functions that make tensors of what consumers put out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.norm_calls: Counter[str] = Counter()
        self.uses: Counter[str] = Counter()
        self.norms: dict[str, str] = {}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def reader_hook(self, name: str) -> Any:
        """To be called after a consumer."""

        def made(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.calls[name] += 1
            self._outputs[id(output)] = (weakref.ref(output), name)

        return made

    def norm_hook(self, norm: str) -> Any:
        """To be called before a norm."""

        def read(module: nn.Module, inputs: Tensor) -> None:
            self.norm_calls[norm] += 1
            name = self._reader_of(inputs)
            if name is not None:
                self.norms[name] = norm

        return read

    def count(self, tensor: Tensor) -> None:
        """Count a use of a tensor, if a consumer has put it out."""
        name = self._reader_of(tensor)
        if name is not None:
            self.uses[name] += 1

    def _reader_of(self, tensor: Tensor) -> str | None:
        reference, name = self._outputs.get(id(tensor), (None, ""))
        return name if reference is not None and reference() is tensor else None

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if tensors_in(result):  # asking for its shape is no use
            for tensor in tensors_in((arguments, keywords or {})):
                self.count(tensor)
        return result
