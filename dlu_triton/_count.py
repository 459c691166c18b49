"""Parameters and FLOPs counted from modules and held against the formulas, for `python -m dlu_triton complexity`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ._complexity import Complexity, UpsamplerCost, compare, complexity
from .modules import CARAFEPack, DLUPack
from .ops.dlu import expand_kernels

SCALES = (2, 4, 8, 16)
# What DLU's abstract says. It names no number of channels; with those of an FPN both papers' figures come out.
CLAIMED_PARAMETERS, CLAIMED_FLOPS = 0.91, 0.63
CLAIMED_CHANNELS, CLAIMED_SCALE = 256, 16


def counted(
    channels: int,
    scale_factor: int,
    up_kernel: int = 5,
    up_group: int = 1,
    encoder_kernel: int = 3,
    *,
    compressed_channels: int = 64,
) -> Complexity:
    """What `complexity` gives, from the modules themselves: meta tensors, one source pixel, nothing is computed."""
    sizes = dict(up_kernel=up_kernel, up_group=up_group, encoder_kernel=encoder_kernel)
    with torch.device("meta"):
        dlu = DLUPack(channels, scale_factor, **sizes, compressed_channels=compressed_channels)
        carafe = CARAFEPack(channels, scale_factor, **sizes, compressed_channels=compressed_channels)
        features = torch.empty(1, channels, 1, 1)
        kernel_space = torch.empty(1, dlu.kernel_space_generator.out_channels, 1, 1)
        offsets = torch.empty(1, dlu.conv_offset.out_channels, 1, 1)
    interpolation = _flops(expand_kernels, kernel_space, offsets, scale_factor, up_kernel, up_group)

    def cost(pack: nn.Module, interpolation_flops: int) -> UpsamplerCost:
        parameters = sum(parameter.numel() for parameter in pack.parameters())
        biases = sum(module.bias.numel() for module in pack.modules() if isinstance(module, nn.Conv2d))
        # PyTorch counts no biases; the papers count them like weights.
        return UpsamplerCost(parameters, _flops(pack, features) + 2 * biases - interpolation_flops, interpolation_flops)

    return compare(cost(dlu, interpolation), cost(carafe, 0))


def _flops(call: Callable[..., Tensor], *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


def differences(channels: int, scale_factor: int, found: Complexity) -> list[str]:
    """A line for each number that is not what the formulas give."""
    formulas = complexity(channels, scale_factor)
    return [
        f"{title} at {scale_factor}x for {channels} channels: counted {number:,} {name.replace('_', ' ')}, "
        f"the formula gives {expected:,}"
        for title, cost, by_formula in (("CARAFE", found.carafe, formulas.carafe), ("DLU", found.dlu, formulas.dlu))
        for name, number, expected in zip(cost._fields, cost, by_formula, strict=True)
        if number != expected
    ]


def run(channels: int) -> int:
    """Print the table; 1 if a number is not what the formulas give."""
    print(f"CARAFE and DLU for {channels} channels, counted from the modules, 5 x 5 kernels.")
    print("FLOPs are per source pixel, a multiply-add is two; the last columns add DLU's interpolation.\n")
    print(f"{'':5}{'parameters':>36}{'FLOPs':>36}{'with interpolation':>26}")
    print(f"{'scale':5}" + 2 * f"{'CARAFE':>14}{'DLU':>14}{'saved':>8}" + f"{'DLU':>18}{'saved':>8}")
    wrong = []
    for scale in SCALES:
        found = counted(channels, scale)
        wrong += differences(channels, scale, found)
        dlu, carafe = found.dlu, found.carafe
        print(
            f"{f'{scale}x':>5}"
            f"{carafe.parameters:14,}{dlu.parameters:14,}{found.parameters_saved:8.1%}"
            f"{carafe.flops:14,}{dlu.flops:14,}{found.flops_saved:8.1%}"
            f"{dlu.flops + dlu.interpolation_flops:18,}{found.flops_saved_with_interpolation:8.1%}"
        )
    found = counted(CLAIMED_CHANNELS, CLAIMED_SCALE)
    if channels != CLAIMED_CHANNELS:
        wrong += differences(CLAIMED_CHANNELS, CLAIMED_SCALE, found)
    print("\n" + ("\n".join(wrong) or "All of it is what the formulas of `dlu_triton.complexity` give."))

    print(
        f"\nDLU's abstract (arXiv 2410.22139) claims {CLAIMED_PARAMETERS:.0%} fewer parameters, "
        f"at least {CLAIMED_FLOPS:.0%} fewer FLOPs at {CLAIMED_SCALE}x."
    )
    parameters, *flops = found[2:]
    for counting, saved in zip((f"for {CLAIMED_CHANNELS} channels", "with the interpolation"), flops, strict=True):
        verdict = "holds" if parameters >= CLAIMED_PARAMETERS and saved >= CLAIMED_FLOPS else "does not hold"
        print(f"Counted {counting}: {parameters:.1%} fewer parameters, {saved:.1%} fewer FLOPs. The claim {verdict}.")
    return 1 if wrong else 0
