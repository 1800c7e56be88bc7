"""The loop that scripts share: a setting's data, and a trained model for each seed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from torch import nn

from benchmarks.common.data import Data, load
from benchmarks.common.options import checked_seeds, usable_device
from benchmarks.common.settings import Setting
from benchmarks.common.training import suitable_threads, trained


def data_of(setting: Setting, asked: argparse.Namespace) -> Data:
    """The data of a setting, on the device and of the size that the command line asks for."""
    data = load(setting.data, asked.data, cache=asked.cache).to(usable_device(asked.device))
    return data.measured_with(asked.evaluated)


def models_of(
    setting: Setting, data: Data, asked: argparse.Namespace
) -> Iterator[tuple[int, nn.Module]]:
    """(seed, its model) for each seed; threads suit the model until the next one is asked for."""
    for seed in checked_seeds(asked.seeds):
        known = trained(
            setting.name, setting.build, data, setting.recipe, seed, asked.cache, asked.device
        )
        with suitable_threads(known.model):
            yield seed, known.model.eval()
