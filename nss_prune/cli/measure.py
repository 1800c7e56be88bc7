"""Accuracy, seconds and size of models side by side, in torch or in ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nss_prune.cli.exporting import export_onnx, needed
from nss_prune.core.accuracy import Answer, share_right
from nss_prune.core.batches import split_batch
from nss_prune.core.models import call_model, device_of, evaluation
from nss_prune.core.outputs import predictions
from nss_prune.core.timing import Timing, alternating
from nss_prune.graph.costs import measure

Run = Callable[[Any], Any]
"""Inputs of a batch -> what a model gives for them."""


@dataclass(frozen=True)
class Runnable:
    """A model that can be measured, whatever runs it.

    Attributes:
        run: Gives the outputs for a batch.
        example: A call with the example inputs, which returns when its work is done.
        bytes: Of the parameters, or of an ONNX file.
        parameters: Their number; None where it is not known.
        macs: Multiply-accumulates of a call with the example inputs; None where not known.
    """

    run: Run
    example: Callable[[], Any]
    bytes: int
    parameters: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a model; None where it is not known.

    Attributes:
        parameters: Their number.
        macs: Multiply-accumulates of a call with the example inputs.
        bytes: Of the parameters, or of an ONNX file.
        seconds: Of such a call.
        accuracy: Share of the samples that are right.
    """

    parameters: int | None
    macs: int | None
    bytes: int
    seconds: Timing
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measured(
    models: Mapping[str, Runnable], data: Iterable[Any] | None, progress: bool | None = None
) -> dict[str, Measured]:
    """The models side by side: their calls take turns while they are timed.

    Args:
        data: To measure accuracy with; None for none.
        progress: Show a bar; None for only on a terminal.

    Raises:
        DataError: No labels, or outputs that are no class scores.
    """
    timings = alternating({name: one.example for name, one in models.items()})
    return {
        name: Measured(
            one.parameters,
            one.macs,
            one.bytes,
            timings[name],
            None if data is None else accuracy(one.run, data, progress),
        )
        for name, one in models.items()
    }


def accuracy(run: Run, data: Iterable[Any], progress: bool | None = None) -> float:
    """Share of the samples whose largest class score is that of their label.

    Raises:
        DataError: No labels, or outputs that are no class scores.
    """
    hidden = None if progress is None else not progress

    def answers() -> Iterator[Answer]:
        for batch in tqdm(data, desc="accuracy", leave=False, disable=hidden):
            inputs, labels = split_batch(batch)
            yield predictions(run(inputs)), labels

    return share_right(answers())


def model_accuracy(model: nn.Module, data: Iterable[Any], progress: bool | None = None) -> float:
    """See :func:`accuracy`."""
    with evaluation(model), torch.no_grad():
        return accuracy(lambda inputs: call_model(model, inputs), data, progress)


@contextlib.contextmanager
def in_torch(model: nn.Module, example_inputs: Any) -> Iterator[Runnable]:
    """A model in torch, where it is; within the context it evaluates, without gradients."""
    cost = measure(model, example_inputs)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    device = device_of(model)

    def example() -> None:
        call_model(model, example_inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with evaluation(model), torch.no_grad():
        run = functools.partial(call_model, model)
        yield Runnable(run, example, size, cost.parameters, cost.macs)


def seconds_in_turns(models: Sequence[nn.Module], example_inputs: Any) -> tuple[float, ...]:
    """Median seconds of a call of each model in torch, see :func:`alternating`."""
    with contextlib.ExitStack() as stack:
        ready = [stack.enter_context(in_torch(model, example_inputs)) for model in models]
        found = alternating({str(number): one.example for number, one in enumerate(ready)})
    return tuple(timing.median for timing in found.values())


@contextlib.contextmanager
def as_onnx(model: nn.Module, example_inputs: Any) -> Iterator[Runnable]:
    """A model exported to ONNX, in ONNX Runtime, on the CPU with its default threads."""
    cost = measure(model, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, example_inputs, path)
        found = onnx_file(path)
        yield Runnable(found.run, found.example, found.bytes, cost.parameters, cost.macs)


def onnx_file(path: str | Path) -> Runnable:
    """An ONNX file with one input, in ONNX Runtime, on the CPU with its default threads.

    Raises:
        ArgumentError: onnxruntime is not installed.
    """
    runtime = needed("onnxruntime", "onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in entry.shape]
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()

    def run(inputs: Tensor) -> Tensor:
        parts = inputs.cpu().split(shape[0])
        return torch.cat(
            [torch.from_numpy(session.run(None, {entry.name: part.numpy()})[0]) for part in parts]
        )

    size = Path(path).stat().st_size
    return Runnable(run, lambda: session.run(None, {entry.name: example}), size)
