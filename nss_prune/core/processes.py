"""Processes of torch.distributed that share the data: sums over them, and equal models.

Without torch.distributed, or before its init_process_group, there is one process.

Where one process fails, the others wait for it in vain. So all that is exchanged starts with a
meeting, where each process says whether it has failed: :func:`agreed` sends there whoever raised.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nss_prune.core.models import uncompiled
from nss_prune.errors import ArgumentError, NSSPruneError

Value = TypeVar("Value")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)
Number = TypeVar("Number", int, float)

_MET = "_nss_prune_known_to_all"


def processes() -> int:
    """How many processes share the data."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return processes() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Wait for all processes."""
    gathered(None)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All processes get through the body, or all raise what the first that failed raised.

    Every process must enter, and exchange inside by the functions of this module alone, in the
    same order. It may be nested, and used as a decorator.
    """
    try:
        yield
    except Exception as error:
        if processes() > 1 and not hasattr(error, _MET):
            _meet(error=error)
        raise
    gathered(None)


def gathered(value: Value) -> list[Value]:
    """What each process gives, in their order.

    Raises:
        Exception: What another process raised within :func:`agreed`.
    """
    return [value] if processes() == 1 else _meet(value)


def summed(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place; contiguous ones."""
    if processes() == 1:
        return
    gathered(None)
    for tensor in tensors:
        dist.all_reduce(tensor)


def decided(function: Callable[[], Value]) -> Value:
    """What a function returns in the first process, the only one that calls it."""
    if processes() == 1:
        return function()
    found: Any = None
    with agreed():
        found = function() if is_first() else None
    shared: Value = given_by(0, found)
    return shared


def led(decide: Callable[[Callable[[Any], Result]], Value], work: Callable[[Any], Result]) -> Value:
    """What a function returns in the first process, for which all processes work.

    Args:
        decide: Called in the first process alone, with a function that calls ``work`` in all.
        work: Called in every process with the same value, as often as the first decides.
    """
    if processes() == 1:
        return decide(work)

    def ask(value: Any) -> Result:
        given_by(0, ("work", value))
        return work(value)

    with agreed():
        if is_first():
            found = decide(ask)
            given_by(0, ("done", found))
            return found
        while True:
            what, value = _from_first()
            if what == "done":
                given: Value = value
                return given
            work(value)


def _from_first() -> tuple[str, Any]:
    """What the first process gives next."""
    return given_by(0, ("", None))


def given_by(process: int, value: Value) -> Value:
    """What one of the processes gives, for all."""
    if processes() == 1:
        return value
    sent = [pickle.dumps(value) if dist.get_rank() == process else b""]
    gathered(None)
    dist.broadcast_object_list(sent, src=process)
    received: Value = pickle.loads(sent[0])
    return received


def _meet(value: Any = None, error: Exception | None = None) -> list[Any]:
    """Exchange values, or raise in all processes what one of them has raised."""
    everywhere: list[Any] = [None] * processes()
    try:
        dist.all_gather_object(everywhere, (value, None if error is None else _portable(error)))
    except Exception as lost:  # another process is gone: there is nobody to tell
        setattr(lost, _MET, True)
        raise
    for process, (_, raised) in enumerate(everywhere):
        if raised is None:
            continue
        found = error if error is not None and process == dist.get_rank() else raised
        setattr(found, _MET, True)
        raise found
    return [found for found, _ in everywhere]


def _portable(error: Exception) -> Exception:
    """The error as it can be sent to another process: its cause and traceback stay behind."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign class does when it is pickled
        return NSSPruneError(f"process {dist.get_rank()}: {type(error).__name__}: {error}")
    return error


def refuse_sharded(model: nn.Module) -> None:
    """Raise where a device holds a part of a weight only.

    Raises:
        ArgumentError: A parameter is a DTensor, as of FSDP2, or the model is wrapped by FSDP.
    """
    kinds = {type(tensor).__name__ for tensor in model.parameters()}
    wrappers = {type(module).__name__ for module in model.modules()}
    found = {"DTensor"} & kinds | {"FullyShardedDataParallel"} & wrappers
    if found:
        raise ArgumentError(
            f"the model's weights are sharded over devices ({found.pop()}), and removing neurons "
            "needs whole ones; prune before fully_shard, or load the state dict of "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)) into an unsharded model, prune that in all "
            "processes, and shard it again"
        )


def unsharded(model: nn.Module) -> nn.Module:
    """The model, without the wrapper of torch.compile.

    Raises:
        ArgumentError: As :func:`refuse_sharded`.
    """
    refuse_sharded(model)
    return uncompiled(model)


def total_by_key(numbers: Mapping[Key, Number]) -> dict[Key, Number]:
    """Key -> its sum over all processes, which need not have the same keys."""
    found: dict[Key, Number] = {}
    for local in gathered(dict(numbers)):
        for key, number in local.items():
            found[key] = found[key] + number if key in found else number
    return found


def total(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sums of some numbers over all processes."""
    if processes() == 1:
        return list(numbers)
    # Not float64 everywhere: some devices have none.
    values: Tensor = torch.tensor(numbers, dtype=torch.float32, device=device)
    summed([values])
    return [float(number) for number in values]


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if processes() == 1:
        return
    gathered(None)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[nn.Parameter], sharing: int) -> None:
    """Average the gradients of what trains over the processes.

    Every process must have the same parameters. A parameter without a gradient counts as one
    whose gradient is zero.

    Args:
        sharing: Processes that had a batch; the others' gradients are zero.
    """
    if processes() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in sorted({parameter.dtype for parameter in trained}, key=str):
        gradients = [p.grad for p in trained if p.dtype == dtype and p.grad is not None]
        packed = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(packed)
        packed /= sharing
        pieces = packed.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
