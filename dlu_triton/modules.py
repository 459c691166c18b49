"""Modules: thin holders of parameters around the operators, state_dict-compatible with the official ones."""

from collections.abc import Sequence

from torch import Tensor, nn

from . import _checks
from .ops.carafe import carafe, carafe_upsample
from .ops.dlu import dlu_upsample

__all__ = ["CARAFE", "CARAFEPack", "DLUPack"]


class CARAFE(nn.Module):
    """`dlu_triton.carafe` as a module, with the constructor of mmcv's `CARAFE`."""

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        self.kernel_size = _checks.kernel_size(kernel_size)
        self.group_size = _checks.integer("group_size", group_size, 1)
        self.scale_factor = _checks.scale_factor(scale_factor)

    def forward(self, features: Tensor, masks: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(N, C, H, W), (N, group_size * kernel_size^2, s*H, s*W) -> (N, C, s*H, s*W); masks and output (height, width)
        are `output_size` instead, if given."""
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor, output_size)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, group_size={self.group_size}, scale_factor={self.scale_factor}"


class _Pack(nn.Module):
    """What the two upsampling packages share: constructor arguments and the channel compressor."""

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        sizes = _checks.pack(channels, scale_factor, up_kernel, up_group, encoder_kernel, compressed_channels)
        self.channels, self.scale_factor, self.up_kernel, self.up_group = sizes[:4]
        self.encoder_kernel, self.compressed_channels = sizes[4:]
        self.encoder_dilation = _checks.integer("encoder_dilation", encoder_dilation, 1)
        self.channel_compressor = nn.Conv2d(self.channels, self.compressed_channels, 1)

    def _encoder(self, out_channels: int) -> nn.Conv2d:
        """A convolution of the compressed features that keeps their size."""
        return nn.Conv2d(
            self.compressed_channels,
            out_channels,
            self.encoder_kernel,
            padding=(self.encoder_kernel - 1) * self.encoder_dilation // 2,
            dilation=self.encoder_dilation,
        )

    def init_weights(self) -> None:
        """Xavier-uniform weights and zero biases everywhere; subclasses go on from there."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, up_kernel={self.up_kernel}, up_group={self.up_group}"


class DLUPack(_Pack):
    """DLU upsampler (arXiv 2410.22139): channel compressor, kernel-space and offset encoders, `dlu_upsample`.

    Arguments, parameter names and initialisation are those of the official `DLUPack`, so its checkpoints load. At
    initialisation the offsets are zero. `up_group` above 1, which the official module cannot run, works.

    Args:
        channels: channels of the input.
        scale_factor: upsampling factor, from 1 to 16.
        up_kernel: reassembly kernel size, odd, from 1 to 9.
        up_group: groups of channels with kernels and offsets of their own, a divisor of `channels`.
        encoder_kernel: kernel size of the two encoders, odd.
        encoder_dilation: dilation of the two encoders.
        compressed_channels: channels after the compressor.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__(
            channels, scale_factor, up_kernel, up_group, encoder_kernel, encoder_dilation, compressed_channels
        )
        self.kernel_space_generator = self._encoder(self.up_group * self.up_kernel**2)
        self.conv_offset = self._encoder(2 * self.up_group * self.scale_factor**2)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.kernel_space_generator.weight, std=0.001)
        nn.init.zeros_(self.conv_offset.weight)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(N, channels, H, W) -> (N, channels, s*H, s*W), or `(N, channels, *output_size)` for pyramids of odd sizes:
        `upsampler(coarse, output_size=fine.shape[-2:])`, each from 1 to s times that of x."""
        _checks.pack_input(x, self.channels)
        compressed = self.channel_compressor(x)
        kernel_space = self.kernel_space_generator(compressed)
        offsets = self.conv_offset(compressed)
        return dlu_upsample(x, kernel_space, offsets, self.scale_factor, self.up_kernel, self.up_group, output_size)


class CARAFEPack(_Pack):
    """CARAFE upsampler (arXiv 1905.02188): channel compressor, content encoder, `carafe_upsample`.

    Arguments, parameter names and initialisation are those of mmcv's `CARAFEPack`, so its checkpoints load.

    Args:
        channels: channels of the input.
        scale_factor: upsampling factor, from 1 to 16.
        up_kernel: reassembly kernel size, odd, from 1 to 9.
        up_group: groups of channels with kernels of their own, a divisor of `channels`.
        encoder_kernel: kernel size of the content encoder, odd.
        encoder_dilation: dilation of the content encoder.
        compressed_channels: channels after the compressor.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__(
            channels, scale_factor, up_kernel, up_group, encoder_kernel, encoder_dilation, compressed_channels
        )
        self.content_encoder = self._encoder(self.scale_factor**2 * self.up_group * self.up_kernel**2)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.content_encoder.weight, std=0.001)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(N, channels, H, W) -> (N, channels, s*H, s*W), or `(N, channels, *output_size)` for pyramids of odd sizes:
        `upsampler(coarse, output_size=fine.shape[-2:])`, each from 1 to s times that of x."""
        _checks.pack_input(x, self.channels)
        logits = self.content_encoder(self.channel_compressor(x))
        return carafe_upsample(x, logits, self.scale_factor, self.up_kernel, self.up_group, output_size)
