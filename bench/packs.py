"""Whole upsampling modules and necks made of them, with random weights, and their definitions."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import accuracy
import rivals
import torch
from cases import MEMORY_FORMATS, NECK, Case
from libraries import library
from torch import Tensor, nn
from torch.func import functional_call

import dlu_triton
from dlu_triton import reference


class JointDLUPack(dlu_triton.DLUPack):
    """Both encoders as one convolution: whether that is worth it in the library is an open question."""

    def forward(self, x: Tensor) -> Tensor:
        space, offset = self.kernel_space_generator, self.conv_offset
        weight, bias = torch.cat((space.weight, offset.weight)), torch.cat((space.bias, offset.bias))
        encoded = nn.functional.conv2d(
            self.channel_compressor(x), weight, bias, padding=space.padding, dilation=space.dilation
        )
        kernel_space, offsets = encoded.split((space.out_channels, offset.out_channels), dim=1)
        return dlu_triton.dlu_upsample(x, kernel_space, offsets, self.scale_factor, self.up_kernel, self.up_group)


class _EagerDLUPack(dlu_triton.DLUPack):
    def forward(self, x: Tensor) -> Tensor:
        compressed = self.channel_compressor(x)
        kernel_space, offsets = self.kernel_space_generator(compressed), self.conv_offset(compressed)
        return reference.dlu_upsample(x, kernel_space, offsets, self.scale_factor, self.up_kernel, self.up_group)


class _EagerCARAFEPack(dlu_triton.CARAFEPack):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.content_encoder(self.channel_compressor(x))
        return reference.carafe_upsample(x, logits, self.scale_factor, self.up_kernel, self.up_group)


class _MMCVCARAFEPack(nn.Module):
    """mmcv's module with what its op needs of the layout."""

    def __init__(self, channels: int, scale_factor: int, kernel_size: int) -> None:
        super().__init__()
        self.pack = library("mmcv.ops").CARAFEPack(channels, scale_factor, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return rivals.contiguous_gradient(self.pack(x.contiguous()))


class _Nearest(nn.Upsample):
    def __init__(self, channels: int, scale_factor: int, kernel_size: int) -> None:
        super().__init__(scale_factor=scale_factor, mode="nearest")


class _Bilinear(nn.Upsample):
    def __init__(self, channels: int, scale_factor: int, kernel_size: int) -> None:
        super().__init__(scale_factor=scale_factor, mode="bilinear", align_corners=False)


# What is timed, and its definition: made of channels, scale factor and kernel size, with the same order of parameters.
PACKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "DLUPack": (dlu_triton.DLUPack, _EagerDLUPack),
    "DLUPack-joint": (JointDLUPack, _EagerDLUPack),
    "CARAFEPack": (dlu_triton.CARAFEPack, _EagerCARAFEPack),
    "mmcv-CARAFEPack": (_MMCVCARAFEPack, _EagerCARAFEPack),
    "nearest": (_Nearest, _Nearest),
    "bilinear": (_Bilinear, _Bilinear),
}
NECKS = ("nearest", "bilinear", "DLUPack", "CARAFEPack")  # by their upsampler


class Neck(nn.Module):
    """A feature pyramid over a ResNet's maps of strides 4, 8, 16 and 32, with four upsamplers.

    The top-down path begins a level above them, at a 3 x 3 convolution of stride 2 as RetinaNet's P6 is. Other levels
    have a 1 x 1 convolution from the ResNet, the sum, and a 3 x 3 convolution.
    """

    def __init__(self, channels: int, upsampler: Callable[[], nn.Module]) -> None:
        super().__init__()
        wide = [channels * 2**level for level in range(4)]  # 256, 512, 1024 and 2048 of ResNet-50
        self.coarsest = nn.Conv2d(wide[-1], channels, 3, stride=2, padding=1)
        self.laterals = nn.ModuleList(nn.Conv2d(each, channels, 1) for each in wide)
        self.upsamplers = nn.ModuleList(upsampler() for _ in wide)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in wide)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Maps of the ResNet, finest first -> maps of all levels, finest first"""
        top = self.coarsest(maps[-1])
        levels = [top]
        parts = zip(maps, self.laterals, self.upsamplers, self.outputs, strict=True)
        for bottom, lateral, upsampler, output in reversed(list(parts)):
            top = lateral(bottom) + upsampler(top)
            levels.append(output(top))
        return tuple(reversed(levels))


class Pack(NamedTuple):
    """A module, its parameters by name, and its definition as a function of the module's inputs and the parameters."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    definition: Callable[..., accuracy.Outputs]


def build(op: str, impl: str, case: Case, device: str) -> Pack:
    def whole(make: Callable[..., nn.Module]) -> nn.Module:
        upsampler = partial(make, case.c, case.scale, case.kernel)
        return Neck(case.c, upsampler) if op == NECK else upsampler()

    timed, eager = (whole(make) for make in PACKS[impl])
    for module in (timed, eager):
        _randomize(module)
        module.to(device, getattr(torch, case.dtype), memory_format=MEMORY_FORMATS[case.layout])

    def definition(*tensors: Tensor) -> accuracy.Outputs:
        names = [name for name, _ in eager.named_parameters()]
        inputs, parameters = tensors[: len(tensors) - len(names)], tensors[len(tensors) - len(names) :]
        return functional_call(eager, dict(zip(names, parameters, strict=True)), inputs)

    return Pack(timed, dict(timed.named_parameters()), definition)


def _randomize(module: nn.Module) -> None:
    """Weights that keep the variance of their input, so that kernels differ and offsets are about a source pixel."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for convolution in (each for each in module.modules() if isinstance(each, nn.Conv2d)):
            for parameter in convolution.parameters():
                parameter.normal_(std=convolution.weight[0].numel() ** -0.5, generator=generator)
