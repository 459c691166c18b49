"""Networks of the shape of ResNet-50 and VGG-16, with random weights: what is timed, not what is seen, is theirs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CLASSES = 1000


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(channels, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, 4 * width, 1),
        )
        # As trained ones do, branches add little to what they are added to; random ones would double it at each block.
        nn.init.constant_(self.branch[-1].weight, 0.2)
        changes = stride > 1 or channels != 4 * width
        self.shortcut = nn.Sequential(*_convolution(channels, 4 * width, 1, stride)) if changes else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


def _convolution(channels: int, wider: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, wider, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(wider)


def _resnet50(width: int) -> nn.Module:
    stem = [*_convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    stages, channels = [], width
    for stage, depth in enumerate((3, 4, 6, 3)):
        wide = width * 2**stage
        strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
        blocks = []
        for stride in strides:
            blocks.append(_Bottleneck(channels, wide, stride))
            channels = 4 * wide
        stages.append(nn.Sequential(*blocks))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return nn.Sequential(nn.Sequential(*stem), *stages, *head)


def _vgg16(width: int) -> nn.Module:
    layers, channels = [], 3
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        wider = width * min(2**stage, 8)
        for _ in range(depth):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU(inplace=True)]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    hidden = 64 * width
    head = [nn.Linear(49 * channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
    pool = [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    return nn.Sequential(nn.Sequential(*layers), *pool, *head, nn.Linear(hidden, CLASSES))


class Net(NamedTuple):
    model: nn.Module
    layer: str  # the last one with an extent in space


def build(name: str, width: int, dtype: torch.dtype, device: str) -> Net:
    """A network in eval mode, `width` channels wide at its first stage: 64 as published."""
    torch.manual_seed(0)
    make, layer = {"resnet50": (_resnet50, "4"), "vgg16": (_vgg16, "0.29")}[name]
    with torch.device(device):
        model = make(width)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return Net(model.to(dtype).eval(), layer)
