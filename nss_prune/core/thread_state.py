"""What torch keeps for each thread: the same in another one, or without inference mode."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Made = TypeVar("Made")
Given = ParamSpec("Given")


def with_state_of_this_thread(function: Callable[[], Made]) -> Callable[[], Made]:
    """The same function with what torch and Python keep for each thread as it is here and now.

    That is whether gradients are recorded, inference mode, autocast, the default device, the GPU
    with its stream, and context variables.
    """
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    casts = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in devices
    ]
    home = torch.get_default_device()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    variables = contextvars.copy_context()

    def call() -> Made:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(gradients))
            if home != torch.get_default_device():
                stack.enter_context(home)
            for device, dtype, enabled in casts:
                if enabled:
                    stack.enter_context(torch.autocast(device, dtype))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            return variables.run(function)

    return call


def outside_inference_mode(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A decorator: the caller's inference mode is off meanwhile.

    Gradients are needed within, and tensors made in that mode would have none for ever.
    """

    @wraps(function)
    def call(*arguments: Given.args, **keywords: Given.kwargs) -> Made:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **keywords)
        with torch.inference_mode(False):
            return function(*arguments, **keywords)

    return call
