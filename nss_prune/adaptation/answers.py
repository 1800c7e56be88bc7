"""What a model answers to held-out samples of a task, in all processes together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nss_prune.adaptation.datasets import Data
from nss_prune.adaptation.tasks import Task
from nss_prune.core.models import device_of, evaluation, run
from nss_prune.core.outputs import class_scores
from nss_prune.core.processes import total
from nss_prune.errors import DataError


class Answers(NamedTuple):
    """To the samples of this process.

    Attributes:
        probabilities: Logarithms of those of the task's classes, ``[samples, classes]``.
        right: How many answers are right.
    """

    probabilities: Tensor
    right: int


class Loss(NamedTuple):
    """What a mask costs, over all processes.

    Attributes:
        accuracy: Share of the samples, in [-1, 1].
        divergence: Of the outputs, in nats a sample.
        entropy: Of the whole model's outputs, in nats a sample.
    """

    accuracy: float
    divergence: float
    entropy: float


@torch.no_grad()
def answers(model: nn.Module, classifier: str, task: Task, data: Data, *, masked: bool) -> Answers:
    """Those of the task.

    Args:
        classifier: Name of the layer that makes the outputs.
        data: Batches of (inputs, labels) on the model's device.
        masked: With the task's neurons and weights only.
    """
    probabilities, right = [torch.zeros(0, len(task.classes), device=device_of(model))], 0
    with task.inference(model, classifier, masked=masked), evaluation(model):
        for number, (inputs, labels) in enumerate(data):
            scores = class_scores(run(model, inputs, number)).float()
            probabilities.append(scores[:, list(task.classes)].log_softmax(1))
            right += int((scores.argmax(1) == labels).sum())
    return Answers(torch.cat(probabilities), right)


def loss_between(whole: Answers, masked: Answers) -> Loss:
    """What the mask costs.

    Raises:
        DataError: There are no samples.
    """
    found, wanted = masked.probabilities, whole.probabilities
    drift = nn.functional.kl_div(found, wanted, log_target=True, reduction="sum")
    entropy = -(wanted.exp() * wanted).sum()
    own = [whole.right - masked.right, float(drift), float(entropy), len(wanted)]
    *sums, samples = total(own, wanted.device)
    if not samples:
        raise DataError(
            "no samples are held out to choose theta='auto'; give more data, or theta as a number"
        )
    return Loss(*(each / samples for each in sums))
