"""The count of right answers, and all that count by it, against a loop by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nss_prune import accuracy_on, finetune
from nss_prune.cli.measure import model_accuracy
from nss_prune.core.accuracy import count_right, share_right
from nss_prune.errors import DataError
from nss_prune.training.evaluation import accuracy, count_correct


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 5, generator=random), torch.randint(0, 3, (size,), generator=random))
        for size in sizes
    ]


def by_hand(model: nn.Module, data: list[tuple[Tensor, Tensor]], classes: list[int]) -> int:
    right = 0
    for inputs, labels in data:
        for sample, label in zip(inputs, labels.tolist(), strict=True):
            scores = model(sample[None])[0].tolist()
            right += max(classes, key=lambda k: scores[k]) == label
    return right


def test_all_that_measure_accuracy_count_alike() -> None:
    torch.manual_seed(1)
    model, data = nn.Linear(5, 3), batches(7, 4, 1)
    right = by_hand(model, data, [0, 1, 2])
    assert 0 < right < 12
    assert count_correct(model, data) == (right, 12)
    assert count_correct(model, data, [0, 2]) == (by_hand(model, data, [0, 2]), 12)
    assert accuracy(model, data) == model_accuracy(model, data, False) == right / 12
    assert accuracy_on(data)(model) == pytest.approx(100 * right / 12)
    still = finetune(
        model, data, validation=data, epochs=1, learning_rate=0.0, optimizer="sgd", progress=False
    )
    assert still.metrics["accuracy"] == right / 12


def test_every_position_of_a_map_counts() -> None:
    found = torch.tensor([[[0, 1], [2, 2]]])
    labels = torch.tensor([[[0, 1], [2, 0]]])
    assert count_right([(found, labels), (found, found)]) == (7, 8)


@pytest.mark.parametrize("labels", [None, torch.zeros(3), torch.zeros(2, 1), [0, 1]])
def test_labels_of_another_form_are_refused(labels: object) -> None:
    with pytest.raises(DataError, match="one class for each prediction"):
        count_right([(torch.tensor([0, 1]), labels)])


def test_nothing_has_no_accuracy() -> None:
    assert count_right([]) == (0, 0)
    with pytest.raises(DataError, match="no samples"):
        share_right([])
