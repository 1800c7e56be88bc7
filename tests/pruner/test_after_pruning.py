"""What users do with a model after it was pruned."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nss_prune import (
    IncrementalTrainer,
    NSSPruner,
    ReadaptTrainer,
    load_pruned,
    profile,
    remove,
    save_pruned,
    sparsify,
)

SIDE = 32
MODELS = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"img_size": SIDE, "patch_size": 8, "depth": 2},
    "convnext_atto": {},
}


@pytest.fixture(scope="module", params=MODELS)
def pruned(request) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=10, **MODELS[request.param]).eval()
    inputs = torch.randn(2, 3, SIDE, SIDE)
    data = [(torch.randn(20, 3, SIDE, SIDE), torch.arange(20) % 10)]
    NSSPruner(model, inputs, params_budget=0.6, data=data, progress=False).step()
    return model, inputs


def test_onnxruntime_gives_the_same(pruned) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = pruned
    program = torch.onnx.export(model, (inputs,), dynamo=True)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(inputs), rtol=1e-4, atol=1e-4)


def test_compiled_it_gives_the_same(pruned) -> None:
    model, inputs = pruned
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), model(inputs))


def test_exported_it_gives_the_same(pruned) -> None:
    model, inputs = pruned
    exported = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs))


def test_copies_are_the_same(pruned) -> None:
    model, inputs = pruned
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(inputs), model(inputs))


def test_in_bfloat16_it_runs(pruned) -> None:
    model, inputs = pruned
    assert copy.deepcopy(model).bfloat16()(inputs.bfloat16()).isfinite().all()


def test_a_new_optimiser_trains_it(pruned) -> None:
    model, inputs = copy.deepcopy(pruned[0]).train(), pruned[1]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [parameter.clone() for parameter in model.parameters()]
    model(inputs).square().sum().backward()
    optimiser.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert any(moved)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_distributed_model_is_unwrapped_and_wrapped_again(process_group) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    inputs = torch.randn(40, 6)
    data = [(inputs, torch.arange(40) % 3)]
    pruner = NSSPruner(wrapped, inputs[:2], theta=0.7, data=data)
    pruner.step()
    assert model[0].out_features < 16
    assert wrapped.module is model
    assert wrapped.find_unused_parameters
    torch.testing.assert_close(wrapped(inputs), model(inputs))
    wrapped(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_data_parallel_model_stays_wrapped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    wrapped, inputs = nn.DataParallel(model), torch.randn(40, 6)
    data = [(inputs, torch.arange(40) % 3)]
    NSSPruner(wrapped, inputs[:2], theta=0.7, data=data).step()
    assert model[0].out_features < 16
    torch.testing.assert_close(wrapped(inputs), model(inputs))


def compiled_mlp() -> tuple[nn.Module, nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    """A model, the same compiled and called, inputs and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    inputs = torch.randn(40, 6)
    compiled = torch.compile(model, backend="eager")
    compiled(inputs)
    return model, compiled, inputs, [(inputs, torch.arange(40) % 3)]


def test_a_compiled_model_is_pruned_inside() -> None:
    model, compiled, inputs, data = compiled_mlp()
    whole = copy.deepcopy(model)
    NSSPruner(compiled, inputs[:2], theta=0.7, data=data).step()
    NSSPruner(whole, inputs[:2], theta=0.7, data=data).step()
    assert whole[0].out_features < 16
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    torch.testing.assert_close(compiled(inputs), whole(inputs))


def test_compiled_models_enter_everywhere(tmp_path: Path) -> None:
    model, compiled, inputs, data = compiled_mlp()
    found, wanted = profile(compiled, data), profile(model, data)
    assert torch.equal(found.overall["taylor"]["0"], wanted.overall["taylor"]["0"])
    assert sparsify(compiled, 0.1).keys() == sparsify(copy.deepcopy(compiled), 0.1).keys()
    model, compiled, inputs, data = compiled_mlp()
    critical = found.slice(ratio=0.5)
    ReadaptTrainer(compiled, critical, None).fit(data, epochs=1)
    IncrementalTrainer(compiled, critical).fit([(inputs, 3 + data[0][1] % 2)], epochs=1)
    assert remove(compiled, critical, inputs[:2]) is compiled
    assert model[0].out_features == 8
    save_pruned(compiled, tmp_path / "small.safetensors")
    fresh = torch.compile(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)), backend="eager"
    )
    assert load_pruned(tmp_path / "small.safetensors", fresh) is fresh
    assert torch.equal(fresh(inputs), model(inputs))


class Sequence(nn.Module):
    """Recurrent units or attention over tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.recurrent = getattr(nn, kind)(16, 16, 2, batch_first=True) if kind != "MHA" else None
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True) if kind == "MHA" else None

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.stem(tokens)
        if self.attention is not None:
            return self.head((stream + self.attention(stream, stream, stream)[0]).mean(1))
        return self.head(self.recurrent(stream)[0][:, -1])


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned:UserWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "MHA"])
def test_recurrent_layers_and_attention_export(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = Sequence(kind).eval(), torch.randn(2, 5, 6)
    data = [(torch.randn(40, 5, 6), torch.arange(40) % 3)]
    pruner = NSSPruner(model, inputs, params_budget=0.6, data=data, progress=False)
    pruner.step()
    assert pruner.report.after.parameters < 0.65 * pruner.report.before.parameters
    exported = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs))
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (inputs,), dynamo=True)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(inputs).detach())
