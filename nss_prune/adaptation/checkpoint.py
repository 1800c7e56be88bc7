"""A checkpoint of a training: model, optimiser and random numbers in one safetensors file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nss_prune.adaptation.freezing import Freezing
from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.models import device_of
from nss_prune.core.processes import is_first, wait
from nss_prune.core.schema import (
    Check,
    anything,
    array,
    check_finite,
    check_tensor,
    check_tensors,
    either,
    number,
    one_of,
    record,
    refuse,
    row,
    table,
    text,
    truth,
    whole,
)
from nss_prune.core.undo import put_back, restored_on_error, tensors_of
from nss_prune.errors import FileFormatError, ModelMismatchError

KIND = "nss_prune training"

_NUMBER = either(truth, number())
NOTES = {
    "purpose": table(anything),
    "state": array(row(whole(), text, either(one_of(None), _NUMBER))),
    "options": array(table(_NUMBER)),
}
"""Of the notes of a file, beside those that the training adds."""

BY_ENTRY = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg"})
"""What optimisers of torch keep for every entry of a parameter."""

NEVER_NEGATIVE = frozenset({"step", "exp_avg_sq", "max_exp_avg_sq", "square_avg"})

HOW = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options of an optimiser that say how it computes, not what: machines differ in them."""

SCHEDULED = frozenset({"lr", "initial_lr", "momentum", "betas", "lr_scale"})
"""Options that schedulers change in a training."""

PREFIXES = ("model/", "best/", "random/", "optimizer/")

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training; nothing is written or read without a path.

    Attributes:
        path: Of the file, or None.
        freezing: What trains, of which model.
        optimizer: In use.
        purpose: Distinguishes this training from others of the model; anything JSON can hold.
    """

    path: str | os.PathLike[str] | None
    freezing: Freezing
    optimizer: Optimizer
    purpose: Mapping[str, Any] = field(default_factory=dict)

    def save(self, notes: Mapping[str, Any], best: Mapping[str, Tensor] | None = None) -> None:
        """Write all that the training needs to go on, whole or not at all.

        Of several processes the first writes, the others wait.

        Args:
            notes: Anything that JSON can hold.
            best: Values of the model to keep besides the present ones.

        Raises:
            OSError: The file cannot be written.
        """
        if self.path is None:
            return
        if is_first():
            self._write(self.path, notes, best or {})
        wait()

    def load(self, check: Check) -> tuple[dict[str, Any], Values | None] | None:
        """Give model, optimiser and random numbers what :meth:`save` wrote.

        Args:
            check: Of the notes that :meth:`save` was given.

        Returns:
            The notes and the best values, if any; None where there is no file.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            ModelMismatchError: It is of another model or training, or other entries were frozen;
                nothing is loaded.
            OSError: The file cannot be read.
        """
        if self.path is None or not Path(self.path).exists():
            return None
        tensors, written = read_file(self.path, KIND, record({**NOTES, "notes": check}))
        values, best = _part(tensors, "model/"), _part(tensors, "best/")
        self._check(written["purpose"], values)
        with checked_contents(self.path):
            _check_best(best, values)
            for name, _ in self.freezing.model.named_parameters():
                check_finite(f"model/{name}", values[name])
            check_tensor("random/cpu", tensors["random/cpu"], (None,), (torch.uint8,))
            if unknown := [name for name in tensors if not name.startswith(PREFIXES)]:
                raise FileFormatError(f"it has tensors {unknown[:4]} that no training writes")
            state = self._optimizer_state(tensors, written)
        model = self.freezing.model
        with restored_on_error(model, values=True, optimizer=self.optimizer):
            with checked_contents(self.path):
                self.optimizer.load_state_dict(state)
                self._set_random(tensors)
            put_back(model, values)
        return written["notes"], best or None

    def _write(
        self,
        path: str | os.PathLike[str],
        notes: Mapping[str, Any],
        best: Mapping[str, Tensor],
    ) -> None:
        model = self.freezing.model
        tensors = {f"model/{name}": value for name, value in tensors_of(model).items()}
        tensors |= {f"best/{name}": value for name, value in best.items()}
        tensors |= self._random()
        state, numbers = self.optimizer.state_dict(), []
        for position, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{position}/{key}"] = value
                else:
                    numbers.append([position, key, value])
        options = [
            {key: value for key, value in group.items() if isinstance(value, (int, float))}
            for group in state["param_groups"]
        ]
        written = {
            "purpose": dict(self.purpose),
            "notes": dict(notes),
            "state": numbers,
            "options": options,
        }
        write_file(path, KIND, tensors, written)

    def _optimizer_state(
        self, tensors: Mapping[str, Tensor], written: Mapping[str, Any]
    ) -> dict[str, Any]:
        groups = self.optimizer.state_dict()["param_groups"]
        if len(groups) != len(written["options"]):
            raise ModelMismatchError(
                f"{self.path!s} has {len(written['options'])} parameter groups, the optimiser "
                f"{len(groups)}; resume with the optimiser that was used"
            )
        state: dict[int, dict[str, Any]] = {}
        for name, value in _part(tensors, "optimizer/").items():
            position, _, key = name.partition("/")
            state.setdefault(int(position), {})[key] = value
        for position, key, entry in written["state"]:
            state.setdefault(position, {})[key] = entry
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter, entries in state.items():
            if parameter >= len(trained):
                raise FileFormatError(f"the optimiser has state of parameter {parameter}")
            _check_state(parameter, entries, trained[parameter])
        if len({frozenset(entries) for entries in state.values()}) > 1:
            raise FileFormatError("the optimiser has more state of some parameters than of others")
        for group, new in zip(groups, written["options"], strict=True):
            _check_options(group, new)
        options = [{**group, **new} for group, new in zip(groups, written["options"], strict=True)]
        return {"state": state, "param_groups": options}

    def _random(self) -> Values:
        states = {"random/cpu": torch.get_rng_state()}
        device = device_of(self.freezing.model)
        if device.type == "cuda":
            states["random/cuda"] = torch.cuda.get_rng_state(device)
        return states

    def _set_random(self, tensors: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(tensors["random/cpu"])
        device = device_of(self.freezing.model)
        if device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], device)

    def _check(self, purpose: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        """The purpose and all shapes must agree, and what is frozen must have the same bits."""
        model = self.freezing.model
        if purpose != dict(self.purpose):
            raise ModelMismatchError(
                f"{self.path!s} is the checkpoint of another training: "
                f"{_differences(purpose, self.purpose)}; give another path, or resume=False to "
                "replace it"
            )
        if _shapes(values) != _shapes(tensors_of(model)):
            raise ModelMismatchError(
                f"{self.path!s} is the checkpoint of another model; give another path, or "
                "resume=False to replace it"
            )
        for name, parameter in model.named_parameters():
            trains = self.freezing.trainable.get(
                name, torch.zeros(parameter.shape, dtype=torch.bool)
            )
            differs = parameter.detach().cpu() != values[name]
            if bool((differs & ~trains.cpu()).any()):
                raise ModelMismatchError(
                    f"{self.path!s} differs from the model in frozen entries of {name}; resume "
                    "with the model and slice that the training began with"
                )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words, where two purposes differ."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    there, here = (
        ", ".join(f"{name} {purpose.get(name)!r}" for name in names) for purpose in (found, wanted)
    )
    return f"it has {there}, this one {here}"


def _shapes(values: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in values.items()}


def _check_best(best: Values, values: Values) -> None:
    if best:
        check_tensors(best, values)
    for name, value in best.items():
        check_tensor(name, value, tuple(values[name].shape), (values[name].dtype,))


def _check_state(position: int, entries: Mapping[str, Any], parameter: Tensor) -> None:
    """What optimisers keep for every entry of a parameter has the parameter's shape."""
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.is_complex() and not parameter.is_complex():
            raise refuse(f"{key} of parameter {position}", value.dtype, "real numbers")
        if key == "step" and isinstance(value, Tensor):
            check_tensor(f"optimizer/{position}/{key}", value, ())
            check_finite(f"optimizer/{position}/{key}", value)
        if key in NEVER_NEGATIVE and bool((torch.as_tensor(value) < 0).any()):
            raise refuse(f"{key} of parameter {position}", "negative", "0 or more")
        if key in BY_ENTRY:
            if not isinstance(value, Tensor):
                raise refuse(f"{key} of parameter {position}", value, "a tensor")
            check_tensor(f"optimizer/{position}/{key}", value, tuple(parameter.shape))
            check_finite(f"optimizer/{position}/{key}", value)


def _check_options(group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """The numbers among the options of a parameter group are the same ones.

    Those that no scheduler changes have the same values, the others are finite and of one sign.
    """
    present = {key for key, value in group.items() if isinstance(value, (int, float))}
    if options.keys() != present:
        raise FileFormatError(f"the optimiser has options {sorted(present)}, not {sorted(options)}")
    for key, value in options.items():
        alike = isinstance(value, bool) == isinstance(group[key], bool)
        changed = key not in SCHEDULED | HOW and value != group[key]
        if not alike or changed or not math.isfinite(value) or (value < 0 <= group[key]):
            raise refuse(f"option {key!r}", value, f"a value such as {group[key]!r}")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> Values:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
