"""Batches are divided, moved to the model and checked where they enter."""

import pytest
import torch
from torch import nn

from nss_prune.core.batches import entered, labelled_batches, split_batch
from nss_prune.errors import DataError

INPUTS, LABELS = torch.randn(3, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        (INPUTS, None),
        ({"x": INPUTS}, None),
        ((INPUTS,), None),
        ((INPUTS, LABELS), LABELS),
        ([{"x": INPUTS}, LABELS], LABELS),
    ],
)
def test_what_a_batch_may_be(batch, labels):
    inputs, found = split_batch(batch)
    assert found is labels
    assert (inputs["x"] if isinstance(inputs, dict) else inputs) is INPUTS


@pytest.mark.parametrize("batch", [None, 3, (INPUTS, LABELS, LABELS), ()])
def test_what_it_may_not_be(batch):
    with pytest.raises(DataError, match="give \\(inputs, labels\\)"):
        split_batch(batch)


def test_tensors_are_moved_to_the_model():
    model = nn.Linear(4, 2, device="meta")
    batch = ({"x": INPUTS, "mask": [INPUTS]}, LABELS)
    inputs, labels, samples = entered(model, batch, 0)
    assert samples == 3
    assert {part.device.type for part in (inputs["x"], inputs["mask"][0], labels)} == {"meta"}


def test_tensors_that_are_there_are_not_copied():
    batch = ((INPUTS, INPUTS), LABELS)
    ((number, inputs, labels, samples),) = labelled_batches(nn.Linear(4, 2), [batch], False, "")
    assert (number, samples) == (0, 3)
    assert inputs[0] is INPUTS
    assert labels is LABELS


@pytest.mark.parametrize("inputs", [torch.empty(0, 4), torch.tensor(1.0), [], {"x": None}])
def test_a_batch_without_samples_is_refused(inputs):
    with pytest.raises(DataError, match="batch 5"):
        entered(nn.Linear(4, 2), (inputs, LABELS), 5)


def test_no_batch_is_refused():
    with pytest.raises(DataError, match="no batches"):
        list(labelled_batches(nn.Linear(4, 2), [], False, ""))
