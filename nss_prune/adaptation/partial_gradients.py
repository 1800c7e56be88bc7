"""Train some rows × columns of a weight as a parameter of its own.

The entries of a weight that belong to critical neurons lie at some rows × some columns. Cut out as
a parameter of their own, they are all that the optimiser sees, and after each of its steps they are
written back into the whole. In linear layers, and in convolutions where it pays, no gradient of a
frozen entry is computed either.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.packing import SMALL, Packed, treats_entries_apart
from nss_prune.core.afterwards import afterwards
from nss_prune.core.hooks import attached

LARGE = 2**20  # entries of a matrix


class Block:
    """Some rows × some columns of a parameter, as a parameter of their own.

    Args:
        whole: The parameter of the model, ``[rows, columns, ...]``, or ``[rows]``.
        rows: Those in the block, ``[rows in the block]``, or None for all.
        columns: Likewise.
    """

    def __init__(self, whole: nn.Parameter, rows: Tensor | None, columns: Tensor | None) -> None:
        self.whole = whole
        self.rows = rows
        self.columns = columns
        self.entries = nn.Parameter(self._of(whole.detach()))

    def load(self) -> None:
        """Take the entries, and what is frozen, as they are in the whole."""
        whole = self.whole.detach()
        every = torch.arange(len(whole), device=whole.device)
        if self.rows is None:
            self._order = every
        else:
            self.rows = self.rows.to(whole.device)
            others = every[~torch.isin(every, self.rows)]
            self._order = torch.cat([self.rows, others]).argsort()
        # The rows of the block come first here, so that they can be a parameter.
        self._sorted = whole.index_select(0, self._order.argsort())
        self._trained = self._sorted[: len(self.entries)]
        if self.columns is None:
            self.entries.data = self._trained
        else:
            self.columns = self.columns.to(whole.device)
            self.entries.data = self._trained.index_select(1, self.columns)
            broad = self.columns.view(-1, *[1] * (whole.dim() - 2))
            self._places = broad.expand(self.entries.shape)

    def read(self) -> None:
        """Take the entries as they are in the whole; what is frozen stays as it was loaded."""
        self.entries.data.copy_(self._of(self.whole.detach()))

    def write(self) -> None:
        """Give the whole the entries, and what is frozen the bits that it had."""
        # On a CPU, index_copy_ would take twice as long in both places.
        if self.columns is not None:
            self._trained.scatter_(1, self._places, self.entries.detach())
        torch.index_select(self._sorted, 0, self._order, out=self.whole.detach())

    def _of(self, whole: Tensor) -> Tensor:
        block = whole if self.rows is None else whole.index_select(0, self.rows)
        return block if self.columns is None else block.index_select(1, self.columns)

    @contextlib.contextmanager
    def attach(self) -> Iterator[None]:
        """Within the context, a gradient that the whole gets becomes that of the block.

        What is frozen keeps the bits that it has on entry.
        """
        self.load()
        before, self.whole.grad = self.whole.grad, None
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.whole, "grad", before)
            if self.whole.requires_grad:
                after = self.whole.register_post_accumulate_grad_hook
                stack.enter_context(attached((after, self._take_gradient)))
            yield

    def _take_gradient(self, whole: Tensor) -> None:
        gradient, whole.grad = whole.grad, None
        assert gradient is not None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        gradient = self._of(gradient)
        if self.entries.grad is not None:
            gradient = gradient + self.entries.grad
        self.entries.grad = gradient

    @property
    def suffices(self) -> bool:
        """Whether its gradient is all that is asked for: no hook but its own waits for more."""
        hooks = self.whole._post_accumulate_grad_hooks or ()
        return self.whole.requires_grad and not self.whole._backward_hooks and len(hooks) < 2


def extract_blocks(freezing: Freezing, optimizer: Optimizer) -> dict[str, Block]:
    """Replace parameters in the optimiser by the blocks of them that train.

    Args:
        freezing: What trains. A parameter of which all trains, or entries that are no block, stays,
            and so does a small one.
        optimizer: Fresh, of the model's parameters. One that treats entries by what others are, as
            those do that scale whole layers, keeps them all.

    Returns:
        Parameter -> its block.
    """
    if not treats_entries_apart(optimizer):
        return {}
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    blocks = {}
    for name, parameter in freezing.model.named_parameters():
        if name in freezing.trainable and parameter in updated and parameter.numel() >= SMALL:
            block = _block(parameter, freezing.trainable[name])
            if block is not None:
                blocks[name] = block
    replaced = {block.whole: block.entries for block in blocks.values()}
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(value, value) for value in group["params"]]
    return blocks


def _block(parameter: nn.Parameter, entries: Tensor) -> Block | None:
    """The block that the entries form, where one pays.

    None if they form none, or are the whole parameter.
    """
    # On a GPU a block takes more launches than masks do, which only large matrices make up for.
    if parameter.device.type != "cpu" and (parameter.dim() != 2 or parameter.numel() < LARGE):
        return None
    sides = [
        entries.movedim(axis, 0).reshape(size, -1).any(1) for axis, size in enumerate(entries.shape)
    ]
    is_product = math.prod(int(side.sum()) for side in sides) == int(entries.sum())
    if not is_product or not all(bool(side.all()) for side in sides[2:]):
        return None
    rows, columns = (
        None if len(sides) <= axis or bool(sides[axis].all()) else sides[axis].nonzero().flatten()
        for axis in (0, 1)
    )
    return None if rows is None and columns is None else Block(parameter, rows, columns)


class BlockTraining:
    """A freezing of which some parameters train as blocks or packed, the others under its masks.

    ::

        training = BlockTraining(freezing, optimizer, extract_blocks(freezing, optimizer))
        with training.attach():
            for inputs, labels in data:
                optimizer.zero_grad()
                with training.block_gradients():
                    cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    Args:
        freezing: What trains.
        optimizer: Of the blocks and of the parameters that have none.
        blocks: Parameter -> its block.
        zero_gradients: As :meth:`Freezing.attach` takes it, for an optimiser that treats each entry
            by itself; for another one, gradients of frozen entries are always zero.
        packs: What :func:`nss_prune.adaptation.packing.pack_small` gave, where nothing but the
            optimiser reads gradients.
    """

    def __init__(
        self,
        freezing: Freezing,
        optimizer: Optimizer,
        blocks: Mapping[str, Block],
        zero_gradients: bool = True,
        packs: Sequence[Packed] = (),
    ) -> None:
        self.freezing = freezing
        self.optimizer = optimizer
        self.blocks = dict(blocks)
        self.packs = tuple(packs)
        self.zero_gradients = zero_gradients or not treats_entries_apart(optimizer)
        self._layers = list(_layers(freezing.model, self.blocks.values()))

    @property
    def size(self) -> int:
        """Number of entries that train in blocks and packs."""
        in_blocks = sum(block.entries.numel() for block in self.blocks.values())
        return in_blocks + sum(pack.trained for pack in self.packs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, or their blocks: all whose gradients count."""
        for name, parameter in self.freezing.model.named_parameters():
            yield self.blocks[name].entries if name in self.blocks else parameter

    @contextlib.contextmanager
    def attach(self) -> Iterator[None]:
        """As :meth:`Freezing.attach`, for the optimiser and all its blocks."""
        with contextlib.ExitStack() as stack:
            freezing = self.freezing.attach(
                self.optimizer, apart=self._apart(), zero_gradients=self.zero_gradients
            )
            stack.enter_context(freezing)
            for block in self.blocks.values():
                stack.enter_context(block.attach())
            after = self.optimizer.register_step_post_hook
            stack.enter_context(attached((after, lambda *_: self._write())))
            stack.callback(self._restore)
            for pack in self.packs:
                stack.enter_context(pack.attach(self.optimizer))
            yield

    def _apart(self) -> set[str]:
        """The parameters that do not train under masks."""
        packed = {parameter for pack in self.packs for parameter in pack.whole}
        named = self.freezing.model.named_parameters()
        return {name for name, value in named if name in self.blocks or value in packed}

    def read(self) -> None:
        """Take the blocks from the model, when something else than the optimiser wrote to it."""
        for block in self.blocks.values():
            block.read()
        for pack in self.packs:
            pack.read()

    def _write(self) -> None:
        for block in self.blocks.values():
            block.write()

    def _restore(self) -> None:
        for block in self.blocks.values():
            block.read()
        self._write()

    @contextlib.contextmanager
    def block_gradients(self) -> Iterator[None]:
        """Within the context, layers compute the gradients of their blocks only, where that pays.

        The backward pass belongs inside, as it may call layers again to save memory.
        """
        forwards = [forward for forward in self._layers if forward.block.suffices]

        def put_back() -> None:
            for forward in forwards:
                vars(forward.layer).pop("forward", None)

        with afterwards(put_back):
            for forward in forwards:
                vars(forward.layer)["forward"] = forward
            yield


@dataclass(frozen=True)
class _Linear:
    """The forward pass of a linear layer with a block of its weight that trains."""

    layer: nn.Linear
    block: Block

    def __call__(self, inputs: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if weight is not self.block.whole or not weight.requires_grad:
            return functional.linear(inputs, weight, bias)
        flat = inputs if inputs.dim() == 2 else inputs.reshape(-1, inputs.shape[-1])
        outputs: Tensor = _BlockLinear.apply(
            self.block.entries,
            *_in_autocast(flat, weight.detach(), bias),
            self.block.rows,
            self.block.columns,
        )
        return outputs if inputs.dim() == 2 else outputs.view(*inputs.shape[:-1], len(weight))


@dataclass(frozen=True)
class _Convolution:
    """The forward pass of a convolution with a block of its weight that trains."""

    layer: _ConvNd
    block: Block

    def __call__(self, inputs: Tensor) -> Tensor:
        layer, weight, bias = self.layer, self.layer.weight, self.layer.bias
        is_batch = inputs.dim() == weight.dim()
        if weight is not self.block.whole or not weight.requires_grad or not is_batch:
            plain: Tensor = type(layer).forward(layer, inputs)
            return plain
        outputs: Tensor = _BlockConvolution.apply(
            self.block.entries,
            *_in_autocast(inputs, weight.detach(), bias),
            self.block.rows,
            self.block.columns,
            _Geometry.of(layer),
        )
        return outputs


def _layers(model: nn.Module, blocks: Iterable[Block]) -> Iterator[_Linear | _Convolution]:
    """The layers that compute the gradient of their block in place of their weight's."""
    of_weight: dict[Tensor, Block] = {block.whole: block for block in blocks}
    for module in model.modules():
        # Others do more than the product, or do it otherwise.
        if "forward" in vars(module):
            continue
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            if module.weight in of_weight:
                yield _Linear(module, of_weight[module.weight])
        elif isinstance(module, _ConvNd) and type(module) in _CONVOLUTIONS:
            block = of_weight.get(module.weight)
            if block is not None and _pays(module, block):
                yield _Convolution(module, block)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _pays(layer: _ConvNd, block: Block, lanes: int = 16, fewest: int = 256) -> bool:
    """Whether the gradient of the block takes less time than that of the whole weight.

    Measured on two cores, forward and backward of the gradient alone: channels count by the 16
    that a vector holds, and with fewer than some 256 inputs of an output the copies of
    inputs and gradients cost more than what they save. On a GPU they always do.
    """
    weight = block.whole
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str) or weight.device.type != "cpu":
        return False
    whole, part = (
        math.prod(-(-size // lanes) for size in shape[:2])
        for shape in (weight.shape, block.entries.shape)
    )
    return part < whole and weight[0].numel() >= fewest


def _in_autocast(
    inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the type that autocast, if it is on, gives the factors of a product."""
    device = inputs.device.type
    if not torch.is_autocast_enabled(device) or inputs.dtype == torch.float64:
        return inputs, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _BlockLinear(torch.autograd.Function):
    """A linear layer that takes the gradient of a block of its weight in place of the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        entries: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, rows, columns)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, rows, columns = ctx.saved_tensors
        of_rows = gradient if rows is None else gradient.index_select(1, rows)
        of_columns = inputs if columns is None else inputs.index_select(1, columns)
        of_entries = of_rows.t() @ of_columns
        of_inputs = gradient @ weight if ctx.needs_input_grad[1] else None
        of_bias = gradient.sum(0) if ctx.needs_input_grad[3] else None
        return of_entries, of_inputs, None, of_bias, None, None


@dataclass(frozen=True)
class _Geometry:
    """Of a convolution, a number for each of its axes."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, layer: _ConvNd) -> _Geometry:
        assert not isinstance(layer.padding, str)
        return cls(layer.stride, layer.padding, layer.dilation)

    def arguments(self) -> tuple[Any, ...]:
        """The arguments after the bias: not transposed, and in one group."""
        return (self.stride, self.padding, self.dilation, False, [0] * len(self.stride), 1)


class _BlockConvolution(torch.autograd.Function):
    """A convolution that takes the gradient of a block of its weight in place of the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        entries: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        geometry: _Geometry,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, rows, columns)
        ctx.geometry = geometry
        return torch.convolution(inputs, weight, bias, *geometry.arguments())

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, rows, columns = ctx.saved_tensors
        backward = torch.ops.aten.convolution_backward
        geometry = ctx.geometry.arguments()
        of_rows = gradient if rows is None else gradient.index_select(1, rows)
        of_columns = inputs if columns is None else inputs.index_select(1, columns)
        # The gradient of a weight depends on its shape alone, as in torch.nn.grad.
        part = weight.new_empty(1).expand(of_rows.shape[1], of_columns.shape[1], *weight.shape[2:])
        of_entries = backward(of_rows, of_columns, part, None, *geometry, [False, True, False])[1]
        of_inputs = of_bias = None
        if ctx.needs_input_grad[1]:
            of_inputs = backward(gradient, inputs, weight, None, *geometry, [True, False, False])[0]
        if ctx.needs_input_grad[3]:
            of_bias = gradient.sum([0, *range(2, gradient.dim())])
        return of_entries, of_inputs, None, of_bias, None, None, None
