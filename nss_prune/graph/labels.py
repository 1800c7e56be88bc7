"""Follow channels through a call of a model, whatever their order becomes.

Every element of a tensor carries the label of the channel that it is of. What moves elements
(views, slices, concatenations, shuffles) moves their labels alike; where two channels meet element
by element, their labels are joined: neither can go without the other. Labels of what is not
followed are pinned, with the reason, and so are those of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nss_prune.core import shapes
from nss_prune.core.nested import tensors_in

MOST_ELEMENTS = 2**20  # of a parameter of a user's own that is followed

aten = torch.ops.aten
_MOVING = {
    aten.t, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze, aten.expand, aten.slice,
    aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.flip, aten.roll, aten.repeat,
    aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle,
    aten.index_select, aten.unfold, aten.narrow, aten.chunk, aten.diagonal, aten.movedim,
}  # fmt: skip
_RESHAPING = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}
_SAME = {aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh}
_ELEMENTWISE = {  # besides those that torch itself says so of
    aten.hardswish, aten.hardswish_, aten._prelu_kernel, aten.log_sigmoid_forward, aten.rsub,
    aten.celu, aten.celu_,
}  # fmt: skip
_CUTTING = {aten.split: 2, aten.split_with_sizes: 2, aten.slice: 1, aten.chunk: 2}
"""Operation -> place of the axis among its arguments."""
_REDUCING = {
    aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.prod, aten.logsumexp,
    aten.argmax, aten.argmin, aten.max, aten.min, aten.any, aten.all, aten.linalg_vector_norm,
    aten.var_mean, aten.norm,
}  # fmt: skip
_ALONG = {aten._softmax, aten._log_softmax, aten.cumsum, aten.cumprod}
_SPATIAL = {
    aten.max_pool2d_with_indices: 2, aten.avg_pool2d: 2, aten._adaptive_avg_pool2d: 2,
    aten.adaptive_max_pool2d: 2, aten.avg_pool1d: 1, aten.adaptive_avg_pool1d: 1,
    aten._adaptive_avg_pool3d: 3, aten.avg_pool3d: 3, aten.max_pool3d_with_indices: 3,
    aten.upsample_nearest2d: 2, aten.upsample_bilinear2d: 2, aten.upsample_bicubic2d: 2,
    aten.upsample_nearest1d: 1, aten.upsample_linear1d: 1, aten.reflection_pad2d: 2,
    aten.reflection_pad1d: 1, aten.replication_pad2d: 2, aten.replication_pad1d: 1,
    aten._upsample_bilinear2d_aa: 2, aten._upsample_nearest_exact2d: 2,
    aten.grid_sampler_2d: 2, aten.upsample_nearest3d: 3, aten.upsample_trilinear3d: 3,
}  # fmt: skip


class Labels(TorchDispatchMode):
    """Within the context, the tensors of a call carry labels.

    Attributes:
        count: Labels given out so far; 0 means "of no channel".
        edges: Pairs of labels of channels that go together, ``[2, pairs]`` each.
        pinned: Labels that must stay, and why, in the order found.
        grids: Labels of an axis that was divided, ``[parts, channels of a part]``.
        parameters: Bare parameters that were met, with the labels of their elements.
        scales: Ids of the weights of norms over channels that are followed inside.
        buffers: Those of the buffers to follow that were met, likewise.

    Args:
        follow: Buffers whose elements get labels.
    """

    def __init__(self, follow: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.count = 1
        self.edges: list[Tensor] = []
        self.pinned: list[tuple[Tensor, str]] = []
        self.grids: list[Tensor] = []
        self.parameters: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self.scales: set[int] = set()
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._follow_buffers = {id(buffer) for buffer in follow}
        self.resting = 0  # inside of a layer, whose operations are not looked at
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def new(self, count: int) -> Tensor:
        """Labels that no channel has yet, ``[count]``."""
        made = torch.arange(self.count, self.count + count)
        self.count += count
        return made

    def of(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor's elements, in its shape; None where it has none."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        if not 1 < tensor.numel() <= MOST_ELEMENTS:
            return None
        if isinstance(tensor, nn.Parameter):
            labels = self.new(tensor.numel()).view(tensor.shape)
            self.parameters[id(tensor)] = (tensor, labels)
        elif id(tensor) in self._follow_buffers:
            labels = self.new(tensor.numel()).view(tensor.shape)
            self.buffers[id(tensor)] = (tensor, labels)
        else:
            return None
        self.put(tensor, labels)
        return labels

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Give a tensor labels, or take them from it."""
        if labels is None:
            self._known.pop(id(tensor), None)
        else:
            self._known[id(tensor)] = (tensor, compact(labels))  # held, so that no other has its id

    def join(self, one: Tensor, other: Tensor) -> None:
        """Channels that go together, element by element."""
        one, other = shared_strides(one, other)
        both = torch.stack([one.reshape(-1), other.reshape(-1)])
        both = both[:, (both[0] != both[1]) & (both > 0).all(0)]
        if both.shape[1]:
            numbers = (both[0] * self.count + both[1]).unique()  # faster than of columns
            self.edges.append(torch.stack([numbers // self.count, numbers % self.count]))

    def pin(self, labels: Tensor | None, reason: str) -> None:
        """Channels that must stay."""
        if labels is not None:
            found = _once(labels).unique()
            self.pinned.append((found[found > 0], reason))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if self.resting or _keeps_places(function, arguments):
            return shapes.called(function, arguments, keywords)
        inputs = tensors_in((arguments, keywords))
        labelled = [(tensor, self.of(tensor)) for tensor in inputs]
        result = shapes.called(function, arguments, keywords)
        outputs = tensors_in(result)
        if not any(labels is not None for _, labels in labelled):
            for tensor in outputs:
                self.put(tensor, None)
            return result
        try:
            self._follow(function, arguments, keywords, outputs, dict_of(labelled))
        except _NotFollowed:
            for _, labels in labelled:
                self.pin(labels, _not_followed(function.overloadpacket))
            for tensor in outputs:
                self.put(tensor, None)
        return result

    def _follow(
        self,
        function: Any,
        arguments: Sequence[Any],
        keywords: dict[str, Any],
        outputs: Sequence[Tensor],
        labels: dict[int, Tensor | None],
    ) -> None:
        packet = function.overloadpacket
        first = labels.get(id(arguments[0])) if arguments else None
        if packet in _SAME:
            self.put(outputs[0], first)
        elif packet in _RESHAPING or packet in _MOVING:
            self._move(packet, arguments, keywords, outputs, first)
        elif packet in (aten.cat, aten.stack):
            parts = [
                _zeros(part) if labels[id(part)] is None else labels[id(part)]
                for part in arguments[0]
            ]
            self.put(outputs[0], function(parts, *arguments[1:], **keywords))
        elif packet is aten.constant_pad_nd and first is not None:
            self.put(outputs[0], aten.constant_pad_nd(first, arguments[1], 0))
        elif packet in _REDUCING and first is not None:
            self._reduce(arguments, keywords, outputs, first)
        elif packet in _ALONG and first is not None:
            self._constant(first, (arguments[1],))
            self.put(outputs[0], first)
        elif packet in _SPATIAL and first is not None:
            self._spread(_SPATIAL[packet], outputs, first)
        elif packet is aten.glu and first is not None:
            axis = (arguments[1] if len(arguments) > 1 else -1) % first.dim()
            halves = first.chunk(2, axis)
            self._note_parts(first, halves, axis)
            self.join(*halves)
            self.put(outputs[0], halves[0])
        elif packet is aten.copy_:
            source = labels.get(id(arguments[1]))
            if source is not None and first is not None and id(arguments[0]) in self.buffers:
                self.join(first, source.expand(first.shape))
            self.put(arguments[0], None if source is None else source.expand(arguments[0].shape))
        elif packet is aten.native_layer_norm and id(arguments[2]) in self.scales:
            scale = self.of(arguments[2])
            assert scale is not None
            if first is not None:
                self.join(first, scale.expand_as(first))
            self.put(outputs[0], scale.expand(outputs[0].shape))
        elif is_elementwise(function):
            self._meet(tensors_in((arguments, keywords)), outputs, labels)
        else:
            raise _NotFollowed

    def _move(
        self,
        packet: Any,
        arguments: Sequence[Any],
        keywords: dict[str, Any],
        outputs: Sequence[Tensor],
        labels: Tensor | None,
    ) -> None:
        if labels is None:
            raise _NotFollowed  # an index with labels
        if packet in _RESHAPING:
            moved: Any = [labels.reshape(outputs[0].shape)]
            self._note_grid(labels, moved[0])
        else:
            result = packet(labels, *arguments[1:], **keywords)
            moved = [result] if isinstance(result, Tensor) else list(result)
            if packet in (aten.channel_shuffle, aten.native_channel_shuffle):
                self.grids.append(along(labels, 1).view(arguments[1], -1))
            if packet in _CUTTING:
                place = _CUTTING[packet]
                given = arguments[place] if len(arguments) > place else keywords.get("dim", 0)
                self._note_parts(labels, moved, given)
        for tensor, its in zip(outputs, moved, strict=True):
            self.put(tensor, its)

    def _note_grid(self, before: Tensor, after: Tensor) -> None:
        """Remember that an axis of channels became several."""
        varying = [axis for axis in range(after.dim()) if varies(after, axis)]
        if len(varying) > 1 and sum(varies(before, axis) for axis in range(before.dim())) == 1:
            index = tuple(slice(None) if axis in varying else 0 for axis in range(after.dim()))
            self.grids.append(after[index].clone())

    def _note_parts(self, whole: Tensor, parts: Sequence[Tensor], axis: int) -> None:
        """Remember that an axis of channels was cut into parts of one length, or pin it."""
        if not varies(whole, axis) or (len(parts) == 1 and parts[0].shape == whole.shape):
            return
        line = along(whole, axis)
        length = parts[0].shape[axis]
        if not length:  # what is left of an axis that was taken whole
            return
        if len(line) % length == 0:
            first = along(parts[0], axis)
            step = int(len(first) > 1) and int((line == first[1]).nonzero()[0]) - int(
                (line == first[0]).nonzero()[0]
            )
            strided = step > 1 and step * length == len(line)
            self.grids.append(line.view(length, -1).T if strided else line.view(-1, length))
        else:
            self.pin(line, "its channels are cut into parts of several lengths")

    def _reduce(
        self,
        arguments: Sequence[Any],
        keywords: dict[str, Any],
        outputs: Sequence[Tensor],
        labels: Tensor,
    ) -> None:
        given = keywords.get("dim", arguments[1] if len(arguments) > 1 else None)
        if isinstance(given, (float, str)):  # the order of a norm
            given = arguments[2] if len(arguments) > 2 else None
        if isinstance(given, Tensor):
            raise _NotFollowed
        axes = [given] if type(given) is int else list(given or range(labels.dim()))
        axes = [axis % labels.dim() for axis in axes]
        self._constant(labels, axes)
        kept = outputs[0].dim() == labels.dim()
        for axis in sorted(axes, reverse=True):
            labels = labels.narrow(axis, 0, 1) if kept else labels.select(axis, 0)
        for tensor in outputs:
            self.put(tensor, labels)

    def _spread(self, dimensions: int, outputs: Sequence[Tensor], labels: Tensor) -> None:
        """Operations over positions alone: each channel stays where it is."""
        axes = range(labels.dim() - dimensions, labels.dim())
        self._constant(labels, axes)
        for axis in axes:
            labels = labels.narrow(axis, 0, 1)
        for tensor in outputs:
            self.put(tensor, labels.expand(tensor.shape))

    def _constant(self, labels: Tensor, axes: Iterable[int]) -> None:
        if any(varies(labels, axis) for axis in axes):
            raise _NotFollowed

    def _meet(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        labels: dict[int, Tensor | None],
    ) -> None:
        """Element by element: what meets goes together, what is spread over channels stays."""
        shape = outputs[0].shape
        merged: Tensor | None = None
        for tensor in inputs:
            its = labels[id(tensor)]
            if its is None or tensor.dim() > len(shape):
                continue
            its = its.reshape((1,) * (len(shape) - its.dim()) + tuple(its.shape))
            if merged is None:
                merged = its
                continue
            merged, its = self._unless_spread(merged, its), self._unless_spread(its, merged)
            merged, its = torch.broadcast_tensors(merged, its)
            self.join(merged, its)
            merged, its = sorted((merged, its), key=lambda one: _once(one).numel())
            merged = merged if bool((_once(merged) > 0).all()) else merged.where(merged > 0, its)
        if merged is None:
            raise _NotFollowed
        for tensor in outputs:
            if tensor.shape == shape:
                self.put(tensor, merged.expand(shape))

    def _unless_spread(self, labels: Tensor, other: Tensor) -> Tensor:
        """The labels, or zeros and pinned where they are one for several channels of the other."""
        for axis in range(labels.dim()):
            if labels.shape[axis] == 1 < other.shape[axis] and varies(other, axis):
                self.pin(labels, "it is spread over the channels of other layers")
                return torch.zeros_like(labels)
        return labels


class _NotFollowed(Exception):
    """An operation that mixes channels, or that is not known."""


def _not_followed(packet: Any) -> str:
    reason = f"its channels meet in {packet.__name__}, which is not followed"
    if packet in (aten.bmm, aten.baddbmm) or "attention" in packet.__name__:
        reason += ": it multiplies activations, as attention does whose heads are not recognised"
    return reason


def dict_of(labelled: Iterable[tuple[Tensor, Tensor | None]]) -> dict[int, Tensor | None]:
    return {id(tensor): labels for tensor, labels in labelled}


def _keeps_places(function: Any, arguments: Sequence[Any]) -> bool:
    """Whether an operation changes the strides of axes of a single place, as after pooling."""
    if function is not aten.as_strided_.default:
        return False
    tensor, shape, strides = arguments[:3]
    places = zip(shape, strides, tensor.stride(), strict=False)
    return tuple(shape) == tensor.shape and all(
        length == 1 or stride == before for length, stride, before in places
    )


def is_elementwise(function: Any) -> bool:
    """Whether an operation works element by element."""
    return torch.Tag.pointwise in function.tags or function.overloadpacket in _ELEMENTWISE


def compact(labels: Tensor) -> Tensor:
    """The same labels, without memory for axes along which they do not change."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and labels.stride(axis) and not varies(labels, axis):
            labels = labels.narrow(axis, 0, 1).expand(labels.shape)
    return labels


def varies(labels: Tensor, axis: int) -> bool:
    """Whether labels change along an axis."""
    if labels.shape[axis] < 2 or labels.stride(axis) == 0:
        return False
    once = _once(labels, but=axis)
    return not torch.equal(once, once.narrow(axis, 0, 1).expand_as(once))


def along(labels: Tensor, axis: int) -> Tensor:
    """The labels along an axis, at the first place of the others."""
    axis %= labels.dim()
    return labels[tuple(slice(None) if a == axis else 0 for a in range(labels.dim()))]


def shared_strides(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape without the axes along which both are expanded."""
    for axis in range(one.dim()):
        if one.shape[axis] > 1 and one.stride(axis) == 0 == other.stride(axis):
            one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
    return one, other


def _once(labels: Tensor, but: int | None = None) -> Tensor:
    """Without the axes along which labels are expanded."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and labels.stride(axis) == 0 and axis != but:
            labels = labels.narrow(axis, 0, 1)
    return labels


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros((1,) * tensor.dim(), dtype=torch.long).expand(tensor.shape)
