"""A model as ONNX or as torch.export's program, in a file that is whole or not there."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import evaluation
from nss_prune.core.replacing import replacing
from nss_prune.errors import ArgumentError


def export_onnx(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, dynamic: bool = False
) -> None:
    """Write an ONNX file; the weights are in it.

    Args:
        dynamic: Leave the number of samples open.

    Raises:
        ArgumentError: onnx or onnxscript is not installed.
        OSError: The file cannot be written.
    """
    needed("onnx", "onnx")
    needed("onnxscript", "onnx")
    arguments = _arguments(example_inputs)
    axes = [{0: torch.export.Dim("samples")} for _ in arguments] if dynamic else None
    with replacing(path) as aside, evaluation(model), _silent():
        torch.onnx.export(
            model, arguments, str(aside), dynamo=True, external_data=False, dynamic_shapes=axes
        )


def export_torch(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, dynamic: bool = False
) -> None:
    """Write torch.export's program, as ``torch.export.load`` reads it.

    Args:
        dynamic: Leave the number of samples open.

    Raises:
        OSError: The file cannot be written.
    """
    arguments = _arguments(example_inputs)
    axes = [{0: torch.export.Dim("samples")} for _ in arguments] if dynamic else None
    with evaluation(model):
        program = torch.export.export(model, arguments, dynamic_shapes=axes)
    content = io.BytesIO()
    torch.export.save(program, content)
    with replacing(path) as aside:
        aside.write_bytes(content.getvalue())


def needed(module: str, extra: str) -> Any:
    """A module of an extra.

    Raises:
        ArgumentError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(
            f"this needs {module}; run: pip install 'nss_prune[{extra}]'"
        ) from error


def onnx_matches(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> float:
    """Largest difference between ONNX Runtime's outputs and torch's, over torch's largest value."""
    runtime = needed("onnxruntime", "onnx")
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    arguments = _arguments(example_inputs)
    names = [entry.name for entry in session.get_inputs()]
    given = {name: value.cpu().numpy() for name, value in zip(names, arguments, strict=True)}
    found = torch.from_numpy(session.run(None, given)[0])
    with evaluation(model), torch.no_grad():
        wanted = model(*arguments)
    wanted = (wanted if isinstance(wanted, torch.Tensor) else wanted[0]).to("cpu", found.dtype)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _arguments(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    if isinstance(example_inputs, dict):
        raise ArgumentError("inputs by keyword cannot be exported here; wrap the model")
    return (example_inputs,)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's reports on its own progress."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
