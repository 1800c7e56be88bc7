"""``nn.MultiheadAttention`` that calls the layer which consumes its heads.

torch's own gives the weights of ``out_proj`` to one function, or one kernel, which asserts that all
heads together are as wide as the input. So hooks on ``out_proj`` see nothing, and no head can go.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nss_prune.core.afterwards import afterwards

INPUTS = ("query", "key", "value")
"""The first arguments of a call of torch's attention."""


class HeadwiseAttention(nn.MultiheadAttention):
    """The same function, for any number of heads of any width.

    It has the parameters, names and arguments of torch's, so that state dicts, ``isinstance``,
    ``nn.TransformerEncoderLayer`` and exports work. A module becomes one by its ``__class__``, for
    as long as its heads are looked at, and for good where some of them are removed. Then
    ``embed_dim`` is still the width of queries and outputs, and ``num_heads * head_dim`` that of
    the heads.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's. ``is_causal`` is a hint there, and the mask that it needs is used here."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (part.unsqueeze(0) for part in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self._projected(query, key, value)
        )
        mask = self._mask(query, attn_mask, key_padding_mask)
        mixed, weights = self._attend(query, key, value, mask, need_weights)
        outputs = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return outputs.squeeze(0), None if weights is None else weights.squeeze(0)
        return outputs if self.batch_first else outputs.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values of all heads, ``[samples, tokens, heads * width]`` each."""
        fused = self.in_proj_weight
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if fused is None
            else fused.chunk(3)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return [functional.linear(*parts) for parts in zip(inputs, weights, biases, strict=True)]

    def _mask(
        self, query: Tensor, attention: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Both masks as what is added, broadcast to ``[samples, heads, queries, keys]``."""
        if attention is not None and attention.dim() == 3:
            attention = attention.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = padding[:, None, None]
        added = [_added(mask, query) for mask in (attention, padding) if mask is not None]
        return sum(added[1:], added[0]) if added else None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            attend = functional.scaled_dot_product_attention
            return attend(query, key, value, mask, dropout), None
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = functional.dropout(weights, dropout)
        return weights @ value, weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def named_inputs(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Query, key, value and what else a call of torch's attention names, by their names."""
    return dict(zip(INPUTS, arguments, strict=False)) | dict(keywords)


def has_plain_heads(module: nn.Module) -> bool:
    """Whether a module is torch's attention, without keys and values that come from no token."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    if type(module) not in (nn.MultiheadAttention, HeadwiseAttention):
        return False
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


@contextlib.contextmanager
def heads_called(model: nn.Module) -> Iterator[None]:
    """Within the context, torch's attention calls ``out_proj``, so that hooks on it are called."""
    changed = [
        module
        for module in model.modules()
        if type(module) is nn.MultiheadAttention and has_plain_heads(module)
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()

    def put_back() -> None:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in changed:
            if _is_whole(module):
                module.__class__ = nn.MultiheadAttention

    with afterwards(put_back):
        for module in changed:
            module.__class__ = HeadwiseAttention
        if changed:  # a whole encoder layer may be one kernel, too
            torch.backends.mha.set_fastpath_enabled(False)
        yield


def _is_whole(module: nn.MultiheadAttention) -> bool:
    """Whether torch's own forward function takes a module: nothing has been removed from it."""
    width = module.num_heads * module.head_dim
    consumer = module.out_proj
    return bool(width == module.embed_dim == consumer.in_features == consumer.out_features)
