"""DLU and CARAFE for OpenMMLab's configs. Importing this module, as `custom_imports` does, registers them.

In mmengine's `MODELS`, where mmcv, mmdet and mmseg find them too:

- `dlu` and `carafe`, upsample layers that `mmcv.cnn.build_upsample_layer` builds. They take these names from whoever
  had them: mmcv's own `carafe`, if its operators are compiled, is `mmcv.ops.CARAFEPack` from then on.
- `UNIFIED_FPN` and `FPN_CARAFE`, the necks of the official DLU code and of mmdetection, unless somebody has the name.
  mmdetection has a registry of its own, so under its scope `FPN_CARAFE` stays its own, and builds this `carafe`.

Needs mmengine and mmcv 2, with or without compiled operators.
"""

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, modules

try:
    from mmcv.cnn import ConvModule, build_upsample_layer
    from mmengine.model import BaseModule, ModuleList
    from mmengine.registry import MODELS
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("mmcv", "mmengine"):
        raise
    raise ImportError(
        f"dlu_triton.integrations.openmmlab needs mmengine and mmcv 2, and there is no {missing}: "
        "pip install mmengine mmcv-lite (or mmcv; its compiled operators are not needed)"
    ) from error

__all__ = ["FPN_CARAFE", "UNIFIED_FPN", "CARAFEPack", "DLUPack"]

XAVIER = {"type": "Xavier", "layer": ["Conv2d", "ConvTranspose2d"], "distribution": "uniform"}


class _Encoder(nn.Module):
    """A convolution, but no `nn.Conv2d`: necks initialise all of those anew, but for those of mmcv's own upsampler."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding, self.dilation = convolution.padding, convolution.dilation

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding, dilation=self.dilation)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, padding={self.padding}, dilation={self.dilation}"


class _Registered(modules._Pack):
    """A package whose encoders keep their initialisation in any neck."""

    def _encoder(self, out_channels: int) -> nn.Module:
        return _Encoder(super()._encoder(out_channels))

    def init_weights(self) -> None:
        super().init_weights()
        for child in self.children():
            nn.init.zeros_(child.bias)


@MODELS.register_module(name="dlu", force=True)
class DLUPack(_Registered, modules.DLUPack):
    """`dlu_triton.DLUPack`, registered as `dlu`: arguments, parameter names and results are the same."""


# Compiled operators come with a `carafe`, whose registration would fail after this one. mmcv-lite has none.
with contextlib.suppress(ImportError):
    importlib.import_module("mmcv.ops")


@MODELS.register_module(name="carafe", force=True)
class CARAFEPack(_Registered, modules.CARAFEPack):
    """`dlu_triton.CARAFEPack`, registered as `carafe`: arguments, parameter names and results are the same."""


class _FPN(BaseModule):
    """A feature pyramid with an upsampler of choice on its way down.

    Parameter names are those of the official necks, so their checkpoints load. Upsampled maps are cut to the size of
    the map they are added to: by `dlu` and `carafe` in the kernels, before they are computed.
    """

    end_is_included: bool

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = None,
        order: Sequence[str] = ("conv", "norm", "act"),
        upsample_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            in_channels: channels of each input, from fine to coarse.
            out_channels: channels of every output.
            num_outs: how many outputs; those beyond the inputs come from strided convolutions, and are upsampled too.
            start_level: the first input that is used.
            end_level: where inputs that are used end, as the class says; -1 uses the last.
            norm_cfg: for `mmcv.cnn.ConvModule`; with one, convolutions have no bias.
            act_cfg: for `mmcv.cnn.ConvModule`.
            order: for `mmcv.cnn.ConvModule`.
            upsample_cfg: for `mmcv.cnn.build_upsample_layer`, but for channels and the scale factor, which is 2. Its
                type is "dlu", "carafe" (the default), "nearest", "bilinear", "deconv" or "pixel_shuffle", these two
                with an `upsample_kernel`, or any other layer with arguments `channels` and `scale_factor`.
            init_cfg: for `BaseModule`; by default convolutions are Xavier-uniform. Upsamplers initialise themselves.

        Raises:
            TypeError, ValueError: the argument, the rule and the value.
        """
        super().__init__(init_cfg or XAVIER)
        self.in_channels, self.out_channels, self.num_outs = in_channels, out_channels, num_outs
        self.start, self.stop = _checks.pyramid(in_channels, num_outs, start_level, end_level, self.end_is_included)
        cfg = upsample_cfg or {"type": "carafe"}

        def convolution(channels: int, kernel_size: int, stride: int = 1) -> ConvModule:
            return ConvModule(
                channels,
                out_channels,
                kernel_size,
                stride,
                padding=kernel_size // 2,
                bias=norm_cfg is None,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
                inplace=False,
                order=tuple(order),
            )

        laterals = [convolution(channels, 1) for channels in in_channels[self.start : self.stop]]
        for level in range(num_outs - len(laterals)):
            laterals.append(convolution(out_channels if level else in_channels[-1], 3, stride=2))
        # In mmengine's list modules initialise themselves, as upsamplers should; in PyTorch's, init_cfg does.
        self.lateral_convs = nn.ModuleList(laterals)
        self.fpn_convs = nn.ModuleList(convolution(out_channels, 3) for _ in range(num_outs))
        self.upsample_modules = ModuleList(self._upsampler(cfg) for _ in range(num_outs - 1))

    def _upsampler(self, cfg: dict[str, Any]) -> nn.Module:
        cfg = dict(cfg)
        channels = {"in_channels": self.out_channels, "out_channels": self.out_channels}
        match cfg.get("type"):
            case "nearest":
                cfg |= {"scale_factor": 2}
            case "bilinear":
                cfg |= {"scale_factor": 2, "align_corners": False}
            case "deconv":
                size = _checks.integer("upsample_kernel", cfg.pop("upsample_kernel", None), 1)
                padding = (size - 1) // 2
                cfg |= channels | {"kernel_size": size, "stride": 2, "padding": padding, "output_padding": padding}
            case "pixel_shuffle":
                cfg |= channels | {"scale_factor": 2}
            case _:
                cfg |= {"channels": self.out_channels, "scale_factor": 2}
        return build_upsample_layer(cfg)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One (N, in_channels[i], H_i, W_i) for each of `in_channels`, H_i and W_i at most twice those of the next
        -> `num_outs` maps (N, out_channels, H_i, W_i), from `start_level` on."""
        _checks.pyramid_inputs(inputs, len(self.in_channels))
        used = inputs[self.start : self.stop]
        maps = []
        for level, lateral in enumerate(self.lateral_convs):
            maps.append(lateral(used[level] if level < len(used) else maps[-1] if level > len(used) else used[-1]))
        for level in range(len(maps) - 1, 0, -1):
            height, width = maps[level - 1].shape[-2:]
            upsampler = self.upsample_modules[level - 1]
            if isinstance(upsampler, modules._Pack):
                upsampled = upsampler(maps[level], output_size=(height, width))
            else:
                upsampled = upsampler(maps[level])[..., :height, :width]
            maps[level - 1] = maps[level - 1] + upsampled
        return tuple(convolution(x) for convolution, x in zip(self.fpn_convs, maps, strict=True))


class UNIFIED_FPN(_FPN):
    """The neck of the official DLU code: `end_level` is the first input that is not used any more."""

    end_is_included = False


class FPN_CARAFE(_FPN):
    """The neck of mmdetection 3: `end_level` is the last input that is used."""

    end_is_included = True


for neck in (UNIFIED_FPN, FPN_CARAFE):
    if neck.__name__ not in MODELS.module_dict:
        MODELS.register_module(module=neck)
