"""What torch-pruning follows rightly by itself, and what has to be followed through a call."""

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from networks import cnn, mlp
from nss_prune.graph.regular import keeps_channels_whole


class Last(nn.Module):
    """A convolution, what a function makes of its channels, and one behind it."""

    def __init__(self, function, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(width, 4, 1)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.function(self.first(inputs))).mean((2, 3))


def halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return one * other


DIVIDED = {
    "chunk": (halves, 8),
    "slices": (lambda x: x[:, :8] * x[:, 8:], 8),
    "pixel shuffle": (nn.PixelShuffle(2), 4),
    "channel shuffle": (nn.ChannelShuffle(4), 16),
    "reshape": (lambda x: x.reshape(len(x), 4, 4, -1).transpose(1, 2).reshape(x.shape), 16),
    "concat": (lambda x: torch.cat([x, x], 1), 32),
    "positions become channels": (lambda x: x.flatten(2).transpose(1, 2).unsqueeze(3), 36),
}
WHOLE = {
    "activation": (nn.Hardswish(), 16),
    "pool and norm": (nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(16), nn.GELU()), 16),
    "residual": (lambda x: x + torch.relu(x) * 0.5, 16),
    "gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 16),
}


def graph_of(model: nn.Module, inputs: Tensor) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model.eval(), inputs)


@pytest.mark.parametrize("case", DIVIDED)
def test_what_may_divide_channels(case: str) -> None:
    assert not keeps_channels_whole(graph_of(Last(*DIVIDED[case]), torch.randn(1, 3, 8, 8)))


@pytest.mark.parametrize("case", WHOLE)
def test_what_keeps_them_whole(case: str) -> None:
    assert keeps_channels_whole(graph_of(Last(*WHOLE[case]), torch.randn(1, 3, 8, 8)))


def test_a_map_may_be_flattened_before_a_linear_layer() -> None:
    assert keeps_channels_whole(graph_of(cnn().float(), torch.randn(2, 3, 12, 12)))
    assert keeps_channels_whole(graph_of(mlp().float(), torch.randn(2, 12)))
