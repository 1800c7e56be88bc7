"""Accuracy, seconds and size of a model, in torch or in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nss_prune.cli.exporting import export_onnx, needed
from nss_prune.core.batches import split_batch
from nss_prune.core.models import call_model, device_of, evaluation
from nss_prune.core.timing import call_seconds, least_seconds
from nss_prune.errors import DataError
from nss_prune.graph.costs import measure

Run = Callable[[Any], Tensor]
"""Inputs of a batch -> class scores, ``[samples, classes]``."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a model; None where it is not known.

    Attributes:
        parameters: Their number.
        macs: Multiply-accumulates of a call with the example inputs.
        bytes: Of the parameters, or of an ONNX file.
        seconds: Of such a call, the least of some.
        accuracy: Share of the samples that are right.
    """

    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def accuracy(run: Run, data: Iterable[Any], progress: bool | None = None) -> float:
    """Share of the samples whose largest class score is that of their label.

    Raises:
        DataError: No labels, or outputs that are no class scores.
    """
    right = seen = 0
    for batch in tqdm(
        data, desc="accuracy", leave=False, disable=None if progress is None else not progress
    ):
        inputs, labels = split_batch(batch)
        scores = run(inputs)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or not isinstance(scores, Tensor):
            raise DataError(
                "accuracy needs batches of (inputs, class indices), and a model that returns class "
                "scores; leave the data to measure with out"
            )
        right += int((scores.argmax(1).cpu() == labels.cpu()).sum())
        seen += len(labels)
    return right / max(seen, 1)


def model_accuracy(model: nn.Module, data: Iterable[Any], progress: bool | None = None) -> float:
    """See :func:`accuracy`."""
    with evaluation(model), torch.no_grad():
        return accuracy(lambda inputs: call_model(model, inputs), data, progress)


def measured(
    model: nn.Module, example_inputs: Any, data: Iterable[Any] | None, progress: bool | None = None
) -> Measured:
    """A model in torch, where it is."""
    cost = measure(model, example_inputs)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    found = None if data is None else model_accuracy(model, data, progress)
    return Measured(cost.parameters, cost.macs, size, call_seconds(model, example_inputs), found)


def measured_as_onnx(
    model: nn.Module, example_inputs: Any, data: Iterable[Any] | None, progress: bool | None = None
) -> Measured:
    """A model in ONNX Runtime, on the CPU with its default threads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, example_inputs, path)
        found = measured_onnx(path, data, progress)
    cost = measure(model, example_inputs)
    return Measured(cost.parameters, cost.macs, found.bytes, found.seconds, found.accuracy)


def measured_onnx(
    path: str | Path, data: Iterable[Any] | None, progress: bool | None = None
) -> Measured:
    """An ONNX file with one input, in ONNX Runtime, on the CPU with its default threads."""
    runtime = needed("onnxruntime", "onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in entry.shape]
    example = torch.randn(shape).numpy()
    seconds = least_seconds(lambda: session.run(None, {entry.name: example}))

    def run(inputs: Tensor) -> Tensor:
        parts = inputs.cpu().split(shape[0])
        return torch.cat(
            [torch.from_numpy(session.run(None, {entry.name: part.numpy()})[0]) for part in parts]
        )

    found = None if data is None else accuracy(run, data, progress)
    return Measured(bytes=Path(path).stat().st_size, seconds=seconds, accuracy=found)


def device_name(model: nn.Module) -> str:
    """Where a model is measured."""
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
