"""Gradual pruning in loops of one's own, of Lightning and of Hugging Face's Trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from networks import assert_unchanged, fingerprint
from nss_prune.errors import ArgumentError
from nss_prune.graph.costs import measure
from nss_prune.integrations.gradual import GradualPruning
from nss_prune.integrations.schedule import checked_schedule, cubic_schedule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)
    )


def samples(count: int = 96) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, :3].argmax(1)


def batches() -> list[tuple[Tensor, Tensor]]:
    inputs, labels = samples()
    return list(zip(inputs.split(32), labels.split(32), strict=True))


def test_the_cubic_schedule_is_its_formula() -> None:
    found = cubic_schedule(0.4, begin=10, end=50, times=4)
    assert list(found) == [20, 30, 40, 50]
    for step, share in found.items():
        assert share == pytest.approx(0.4 + 0.6 * (1 - (step - 10) / 40) ** 3)
    assert checked_schedule(dict(reversed(found.items()))) == found


@pytest.mark.parametrize(
    "arguments",
    [{"final": 0.0}, {"final": 1.0}, {"times": 0}, {"begin": -1}, {"end": 12}],
)
def test_schedules_outside_what_they_may_be(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        cubic_schedule(**{"final": 0.5, "begin": 10, "end": 50, "times": 4, **arguments})
    for budgets in ({}, {1: 0.5, 2: 0.6}, {1: 1.5}):
        with pytest.raises(ArgumentError, match="budgets"):
            GradualPruning(samples()[0][:2], budgets)
    with pytest.raises(ArgumentError, match="of is"):
        GradualPruning(samples()[0][:2], {1: 0.5}, of="seconds")


@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_loop_of_ones_own_reaches_every_budget_and_the_optimiser_goes_on(of: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    gradual = GradualPruning(samples()[0][:2], {3: 0.7, 6: 0.4}, of=of, data=batches())
    whole = measure(model, samples()[0][:2])
    losses, kept = [], {}
    for step in range(1, 13):
        inputs, labels = batches()[step % 3]
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        pruned = gradual.after_step(step, model, optimizer)
        assert pruned == (step in (3, 6))
        now = measure(model, samples()[0][:2])
        shares = {"macs": now.macs / whole.macs, "params": now.parameters / whole.parameters}
        kept[step] = shares[of]
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held == set(model.parameters())
        for parameter in model.parameters():
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
            assert optimizer.state[parameter]["step"] == step
    assert kept[2] == 1
    assert kept[5] == pytest.approx(0.7, abs=0.03)
    assert kept[12] == pytest.approx(0.4, abs=0.03)
    assert losses[-1] < losses[0]
    assert list(gradual.reports) == [3, 6]


def test_a_refused_step_leaves_the_model_as_it_was() -> None:
    model = network()
    strange = torch.optim.SGD(network().parameters(), 0.1)
    gradual = GradualPruning(samples()[0][:2], {1: 0.5}, data=batches())
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match="optimiser"):
        gradual.after_step(1, model, strange)
    assert_unchanged(model, before)
    assert not gradual.reports


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_trains_on_with_the_smaller_model(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from nss_prune.integrations.lightning import PruningCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            inputs, labels = batch
            return cross_entropy(self.model(inputs), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 0.01)

    module = Module()
    gradual = GradualPruning(samples()[0][:2], {2: 0.7, 5: 0.4}, data=batches())
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[PruningCallback(gradual)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*samples()), batch_size=32))
    assert list(gradual.reports) == [2, 5]
    share = measure(module.model, samples()[0][:2]).macs / measure(network(), samples()[0][:2]).macs
    assert share == pytest.approx(0.4, abs=0.03)
    optimizer = trainer.optimizers[0]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(module.parameters())
    assert all(float(optimizer.state[p]["step"]) == 12 for p in module.parameters())


def test_transformers_trains_on_with_the_smaller_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from nss_prune.integrations.transformers import PruningCallback

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    whole = copy.deepcopy(model)
    tokens = torch.randint(30, (48, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row[0] % 3} for row in tokens]
    example = {"input_ids": tokens[:2]}
    known = [({"input_ids": part}, part[:, 0] % 3) for part in tokens.split(16)]
    gradual = GradualPruning(example, {2: 0.8, 4: 0.6}, data=known)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=16,
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[PruningCallback(gradual)]
    )
    trainer.train()
    assert list(gradual.reports) == [2, 4]
    assert measure(model, example).macs / measure(whole, example).macs == pytest.approx(
        0.6, abs=0.05
    )
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
