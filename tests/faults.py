"""Faults of what is around a pruning: kills, signals, little memory, full disks, dead workers.

Each trial is a function of its number, by which it is the same again, and of an empty folder. It
returns what it came to, one of "survived", "refused" (an error, and nothing was changed), "wrong"
and "foreign", and a description.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import pickle
import random
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hostile import KINDS
from networks import batches, cnn, fingerprint, mlp, settled
from nss_prune import NSSPruner, ReadaptTrainer, load_pruned, profile, save_pruned
from nss_prune.errors import NSSPruneError

Outcome = tuple[str, str]
Trial = Callable[[int, Path], Outcome]

LIMIT = 60.0  # seconds until a child counts as hanging
OPTIONS: tuple[dict[str, Any], ...] = (
    {"theta": 0.8},
    {"params_budget": 0.6},
    {"theta": 0.8, "fold": "refit", "balance": True},
    {"pruning_ratio": 0.4, "strategy": "global"},
)


class Child:
    """A forked process that calls a function.

    Args:
        function: What it returns, or raises, comes back.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._read, write = os.pipe()
        self._begun, begin = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self._read)
            os.close(self._begun)
            _answer(write, begin, function)
        os.close(write)
        os.close(begin)

    def send(self, number: int, after: float) -> None:
        """A signal, some seconds after the function began.

        What comes before is Python's: of a signal that comes while it makes its locks anew for
        the forked process, what the handler raises is dropped.
        """
        select.select([self._begun], [], [], LIMIT)
        time.sleep(after)
        os.kill(self.process, number)

    def result(self) -> Any:
        """What the function returned; None of a child that was killed.

        Raises:
            TimeoutError: It hangs.
            RuntimeError: With what the function raised.
        """
        found, end = b"", time.monotonic() + LIMIT
        with open(self._read, "rb", buffering=0) as pipe:
            while True:
                if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                    os.kill(self.process, signal.SIGKILL)
                    os.waitpid(self.process, 0)
                    raise TimeoutError("it hangs")
                part = pipe.read(2**16)
                if not part:
                    break
                found += part
        os.waitpid(self.process, 0)
        os.close(self._begun)
        if not found:
            return None
        returned, value = pickle.loads(found)
        if not returned:
            raise RuntimeError(value)
        return value


def _answer(write: int, begin: int, function: Callable[[], Any]) -> None:
    """Of the child, which ends here."""
    try:
        os.close(begin)  # which tells the parent
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            answer = (True, function())
    except BaseException as error:
        answer = (False, f"{type(error).__name__}: {error}")
    try:
        with open(write, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
    finally:
        os._exit(0)


def network() -> nn.Module:
    """The same in every trial."""
    torch.manual_seed(0)
    return mlp()


def pruned(model: nn.Module, data: Any = None, **options: Any) -> nn.Module:
    """The model after a step."""
    data = batches(48, (12,), 3) if data is None else data
    example = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"theta": 0.8} | options
        if "theta" not in options and len(options.keys() & {"params_budget", "pruning_ratio"}):
            del given["theta"]
        NSSPruner(model, example, data=data, progress=False, **given).step()
    return model


@functools.cache
def _unbroken(number: int) -> tuple[nn.Module, float]:
    """What a step with some options gives, and the seconds that it takes."""
    pruned(network(), **OPTIONS[number])
    began = time.monotonic()
    model = pruned(network(), **OPTIONS[number])
    return model, time.monotonic() - began


def same(first: Any, second: Any) -> bool:
    """Whether two models, or fingerprints, have the same bits."""
    if isinstance(first, nn.Module):
        return same(first.state_dict(), second.state_dict())
    if isinstance(first, Tensor):
        return bool(torch.equal(first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return bool(first == second)


def _is(holds: bool, what: str) -> Outcome:
    return ("survived", "") if holds else ("wrong", what)


def killed_while_saving(number: int, folder: Path) -> Outcome:
    """The file is one of those that were written, whole; the next write clears up."""
    path, written = folder / "model", [_unbroken(0)[0], _unbroken(3)[0]]
    save_pruned(written[0], path)

    def loop() -> None:
        while True:
            for model in reversed(written):
                save_pruned(model, path)

    child = Child(loop)
    child.send(signal.SIGKILL, random.Random(number).uniform(0, 0.1))
    child.result()
    loaded = load_pruned(path, network())
    whole = any(same(loaded, model) for model in written)
    save_pruned(written[0], path)
    left = [each.name for each in folder.iterdir() if each != path]
    return _is(whole and not left, f"whole: {whole}, left behind: {left}")


def killed_while_pruning(number: int, folder: Path) -> Outcome:
    """The next run goes on from the sums, and gives what an unbroken one gives."""
    options = {**OPTIONS[number % 3], "checkpoint": folder / "sums"}
    expected, seconds = _unbroken(number % 3)
    child = Child(lambda: pruned(network(), **options) and None)
    child.send(signal.SIGKILL, random.Random(number).uniform(0, 1.5 * seconds))
    child.result()
    model = pruned(network(), **options)
    return _is(same(model, expected), f"{options}: another model after a resumption")


def _trained(path: Path) -> nn.Module:
    model = network()
    trainer = ReadaptTrainer(model, None, None, train="all", progress=False)
    trainer.fit(batches(24, (12,), 3), epochs=8, checkpoint=path, resume=True)
    return model


@functools.cache
def _training() -> tuple[nn.Module, float]:
    return _seconds(lambda folder: _trained(folder / "training"))


def _seconds(function: Callable[[Path], nn.Module]) -> tuple[nn.Module, float]:
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        model = function(Path(name))
        return model, time.monotonic() - began


def killed_while_training(number: int, folder: Path) -> Outcome:
    """The next run resumes, and gives what an unbroken one gives."""
    expected, seconds = _training()
    child = Child(lambda: _trained(folder / "training") and None)
    child.send(signal.SIGKILL, random.Random(number).uniform(0, 1.2 * seconds))
    child.result()
    return _is(same(_trained(folder / "training"), expected), "another model after a resumption")


def interrupted(number: int, folder: Path) -> Outcome:
    """KeyboardInterrupt passes, and the model is as before, or wholly pruned."""
    draw, position = random.Random(number), number % len(OPTIONS)
    options, (expected, seconds) = OPTIONS[position], _unbroken(position)
    profiles, dropped = draw.random() < 0.3, list[str]()

    def work() -> Outcome:
        sys.unraisablehook = lambda lost: dropped.append(repr(lost.object))
        model = network()
        before = fingerprint(model)
        try:
            if profiles:
                profile(model, batches(48, (12,), 3))
            else:
                pruned(model, **options)
            time.sleep(LIMIT / 2)
        except KeyboardInterrupt:
            done = not profiles and same(model, expected)
            return _is(done or same(before, fingerprint(model)), "a model half way")
        if dropped:  # by Python, which keeps none that comes in a finaliser
            return _is(profiles or same(model, expected), f"another model, {dropped}")
        return "wrong", "the interrupt was lost"

    # A process in the background ignores the signal until it is told not to.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = Child(work)
    child.send(signal.SIGINT, draw.uniform(0, 1.2 * seconds))
    try:
        return tuple(child.result())
    except RuntimeError as error:  # before the function, or after it
        return ("survived", "") if "KeyboardInterrupt" in str(error) else ("foreign", str(error))


def with_little_memory(number: int, folder: Path) -> Outcome:
    """It is enough, or an error of memory leaves the model as it was."""
    draw = random.Random(number)
    options, more = OPTIONS[number % len(OPTIONS)], draw.randrange(2**20, 2**27)

    def work() -> Outcome:
        torch.manual_seed(0)
        model = mlp(12, (1024, 700))
        before = fingerprint(model)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
        error: BaseException | None = None
        try:
            pruned(model, **options)
        except BaseException as caught:
            error = caught
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        if error is None:
            return "survived", ""
        if not same(before, fingerprint(model)):
            return "wrong", f"{options}: changed by {error!r}"
        words = str(error).lower()
        told = isinstance(error, (MemoryError, NSSPruneError)) or any(
            each in words for each in ("memory", "alloc", "start new thread")
        )
        return ("refused", "") if told else ("foreign", f"{options}, {more} bytes: {error!r}")

    return tuple(Child(work).result())


def on_a_full_disk(number: int, folder: Path) -> Outcome:
    """OSError, the old file is as it was, and nothing is left behind."""
    names = sorted(KINDS.keys() - {"iterations"})  # which go on from a file, and write none
    name = names[number % len(names)]
    path, draw = folder / name, random.Random(number)
    KINDS[name].write(path)
    old = path.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place = draw.choice(("size", "size", "os.fsync", "os.replace", "os.chmod"))

    def work() -> str:
        if place == "size":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(len(old)),) * 2)
        patched = contextlib.nullcontext() if place == "size" else mock.patch(place, _fail(full))
        try:
            with patched:
                KINDS[name].write(path)
        except OSError:
            return "refused"
        return "survived"

    outcome = Child(work).result()
    left = [each.name for each in folder.iterdir() if each != path]
    if outcome != "refused" or path.read_bytes() != old or left:
        return "wrong", f"{name}, {place}: {outcome}, left behind: {left}"
    return outcome, ""


def _fail(error: Exception) -> Callable[..., None]:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    return failing


class Samples(Dataset):
    """48 samples, of which one may end the process that reads it, or raise."""

    def __init__(self, fault: int, exits: bool) -> None:
        pairs = batches(48, (12,), 3)
        self.inputs, self.labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        self.fault, self.exits = fault, exits

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        if place == self.fault and self.exits:
            os._exit(1)
        if place == self.fault:
            raise OSError("the disk is gone")
        return self.inputs[place], self.labels[place]


def with_loader_workers(number: int, folder: Path) -> Outcome:
    """Workers, forked or spawned, give what no worker gives; dead ones leave the model alone."""
    draw, position = random.Random(number), number % 2
    how = "spawn" if number % 8 == 7 else "fork"
    fault = draw.choice((-1, draw.randrange(48), draw.randrange(48)))
    loader = DataLoader(
        Samples(fault, draw.random() < 0.5),
        16,
        num_workers=1,
        multiprocessing_context=how,
        persistent_workers=how == "spawn",  # it takes seconds to start one
    )

    def work() -> Outcome:
        model = network()
        before = fingerprint(model)
        try:
            pruned(model, loader, **OPTIONS[position])
        except (RuntimeError, OSError) as error:
            intact = fault >= 0 and same(before, fingerprint(model))
            return ("refused", "") if intact else ("wrong", f"{how}, {fault}: {error!r}")
        return _is(fault < 0 and same(model, _unbroken(position)[0]), f"{how}, {fault}: other")

    _unbroken(position)
    return tuple(Child(work).result())


class Growth:
    """Cycles of loading, pruning and saving, after which a process is as large as before."""

    def __init__(self) -> None:
        self._before: dict[str, int] | None = None
        self._cycles = 0

    def cycle(self, number: int, folder: Path) -> Outcome:
        """One of them; what grew since the first 50 is looked at every 50."""
        path = folder / "model"
        save_pruned(network(), path)
        model = load_pruned(path, network())
        save_pruned(pruned(model, **OPTIONS[number % 4]), path)
        load_pruned(path, network())
        self._cycles += 1
        if self._cycles % 50:
            return _is(not any(m._forward_hooks for m in model.modules()), "a hook is left")
        gc.collect()
        now = {
            "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
            "open files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "hooks": len(nn.modules.module._global_forward_hooks),
            "tensors": sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
        }
        before, self._before = self._before or now, self._before or now
        free = {"bytes": 64 * 2**20}  # that an allocator may keep
        grown = {key: now[key] - before[key] for key in now if now[key] > before[key]}
        return _is(all(by <= free.get(key, 0) for key, by in grown.items()), f"grown by {grown}")


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def under_modes_of_the_caller(number: int, folder: Path) -> Outcome:
    """The mode changes nothing: the same model, which trains afterwards, and the same mode."""
    names, position = list(MODES), number // len(MODES) % len(OPTIONS)
    name = names[number % len(MODES)]
    torch.manual_seed(0)
    model = network() if number % 3 else settled(cnn(), torch.randn(16, 3, 12, 12).double())
    shape, classes = ((12,), 3) if number % 3 else ((3, 12, 12), 5)
    data = batches(48, shape, classes)
    example, other = torch.zeros(2, *shape).double(), _copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {**OPTIONS[position], "progress": False}
        NSSPruner(other, example, data=data, **options).step()
        before = fingerprint(model)
        with MODES[name]():
            flags = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            try:
                NSSPruner(model, example, data=data, **options).step()
            except NSSPruneError as error:
                intact = same(before, fingerprint(model))
                return ("refused" if intact else "wrong"), f"{name}, {options}: {error}"
            kept = flags == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if not kept or not same(model, other):
        return "wrong", f"{name}, {options}: the mode is {'kept' if kept else 'lost'}"
    model.train()(data[0][0]).square().sum().backward()
    trains = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return _is(trains, f"{name}, {options}: it does not train")


def _copy(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


class _Failing:
    """Batches of which one cannot be read in the pass of that number."""

    def __init__(self, data: list[Any], fault: int) -> None:
        self.data, self.fault, self.given = data, fault, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.given += 1
            if self.given == self.fault:
                raise OSError("the disk is gone")
            yield batch

    def __len__(self) -> int:
        return len(self.data)


def where_one_of_two_processes_fails(number: int, folder: Path) -> Outcome:
    """Both raise, soon, and both models are as they were."""
    draw = random.Random(number)
    fault, bad, options = draw.randrange(1, 6), draw.randrange(2), OPTIONS[number % len(OPTIONS)]

    def work(rank: int) -> Outcome:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=LIMIT / 2),
        )
        model, shard = network(), batches(96, (12,), 3)[rank::2]
        before, began = fingerprint(model), time.monotonic()
        try:
            pruned(model, _Failing(shard, fault if rank == bad else 0), **options)
        except Exception as error:
            waited = time.monotonic() - began > LIMIT / 3
            if waited or not same(before, fingerprint(model)):
                return "wrong", f"rank {rank} of {options}: waited: {waited}; {error!r}"
            return "refused", ""
        return "wrong", f"rank {rank} of {options}: no error, fault {fault}"

    children = [Child(functools.partial(work, rank)) for rank in range(2)]
    outcomes = [tuple(child.result()) for child in children]
    return max(outcomes, key=lambda found: found[0] != "refused")


def faults() -> dict[str, tuple[Trial, ...]]:
    """Kind -> trials of it, tried in turn."""
    return {
        "kills": (killed_while_saving, killed_while_pruning, killed_while_training),
        "interrupts": (interrupted,),
        "memory limits": (with_little_memory,),
        "full disks": (on_a_full_disk,),
        "loader workers": (with_loader_workers,),
        "modes of the caller": (under_modes_of_the_caller,),
        "failing processes": (where_one_of_two_processes_fails,),
        "cycles": (Growth().cycle,),
    }
