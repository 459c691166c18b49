"""What a trained `DLUPack` does to an image: its offsets and kernels, measured, and their picture.

Everything shown is an output of the module for that image. The two pixels shown are found by a rule, and the figures
beside them are means over many pixels, so the picture cannot be better than the module.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from . import DLUPack, expand_kernels

SHARE = 0.1  # of the pixels of an image: those with the strongest gradient are its edges, those with the weakest flat
REACH = 4  # source pixels shown to each side of a pixel
SMALL_OFFSET = 0.1  # source pixels
SMALL_CHANGE = 0.05  # of the weight of a kernel


@dataclass
class Learned:
    """What a module makes of one image; of all its groups the first."""

    pixels: Tensor  # (3, H, W), from 0 to 1, of which the features are made
    scene: Tensor  # (3, H, W), the same without noise, which tells what is an edge
    kernels: Tensor  # (k*k, H, W), the kernel space after its softmax
    offsets: Tensor  # (s*s, 2, H, W), x and y of each output of a source pixel, in source pixels
    sampled: Tensor  # (s*s, k*k, H, W), the kernel of each output of a source pixel

    @property
    def kernel_size(self) -> int:
        return math.isqrt(len(self.kernels))

    @property
    def scale_factor(self) -> int:
        return math.isqrt(len(self.offsets))

    def lengths(self) -> Tensor:
        """(H, W): the mean length of the offsets of a source pixel's outputs, in source pixels."""
        return self.offsets.norm(dim=1).mean(0)

    def entropy(self) -> Tensor:
        """(H, W), bits: 0 where a kernel is a single tap, log2(k*k) where all taps weigh the same."""
        return torch.special.entr(self.kernels).sum(0) / math.log(2)

    def change(self) -> Tensor:
        """(H, W), from 0 to 1: the weight that sampling moves to other taps, in the mean of a pixel's outputs."""
        return (self.sampled - self.kernels).abs().sum(1).mean(0) / 2

    def gradient(self) -> Tensor:
        """(2, H, W): of the scene's brightness, by Sobel's filters, a source pixel."""
        brightness = self.scene.mean(0)[None, None]
        across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
        filters = torch.stack((across, across.T)).unsqueeze(1)
        return F.conv2d(F.pad(brightness, (1, 1, 1, 1), mode="replicate"), filters)[0]

    def edges(self) -> Tensor:
        """(H, W) bool: the pixels with the strongest gradient."""
        strength = self.gradient().norm(dim=0)
        return strength >= strength.quantile(1 - SHARE)

    def flat(self) -> Tensor:
        """(H, W) bool: the pixels with the weakest gradient."""
        strength = self.gradient().norm(dim=0)
        return strength <= strength.quantile(SHARE)

    def edge_pixel(self) -> tuple[int, int]:
        """(row, column) whose gradient is strongest along the mean gradient in the reach of a kernel."""
        gradient = self.gradient()
        return _best((gradient * _mean(gradient, self.kernel_size)).sum(0))

    def flat_pixel(self) -> tuple[int, int]:
        """(row, column) around which, in what is shown of it, the gradient is weakest."""
        return _best(-_mean(self.gradient().norm(dim=0, keepdim=True), 2 * REACH + 1)[0])

    def figures(self) -> dict[str, dict[str, float]]:
        """Means over edges, flat pixels, and all, of every measure."""
        masks = {"edges": self.edges(), "flat": self.flat()}
        masks["all"] = torch.ones_like(masks["flat"])
        measures = {"offset": self.lengths(), "entropy": self.entropy(), "change": self.change()}
        return {
            name: {where: values[mask].double().mean().item() for where, mask in masks.items()}
            for name, values in measures.items()
        }


@torch.no_grad()
def look(module: DLUPack, features: Tensor, pixels: Tensor, scene: Tensor) -> Learned:
    """Run the parts of the module on (1, C, H, W) features of the image `pixels` (1, 3, H, W), see `Learned`."""
    k, s, groups = module.up_kernel, module.scale_factor, module.up_group
    compressed = module.channel_compressor(features)
    kernel_space, offsets = module.kernel_space_generator(compressed), module.conv_offset(compressed)
    masks = expand_kernels(kernel_space, offsets, s, k, groups)
    return Learned(
        pixels[0].float().cpu(),
        scene[0].float().cpu(),
        kernel_space[0, : k * k].float().softmax(0).cpu(),
        offsets[0, : 2 * s * s].float().unflatten(0, (2, s * s)).transpose(0, 1).cpu(),
        F.pixel_unshuffle(masks[:, : k * k].float(), s)[0].unflatten(0, (k * k, s * s)).transpose(0, 1).cpu(),
    )


def _mean(maps: Tensor, size: int) -> Tensor:
    """(C, H, W) -> (C, H, W), over squares around each pixel."""
    return F.avg_pool2d(maps[None], size, 1, size // 2)[0]


def _best(values: Tensor) -> tuple[int, int]:
    """The pixel of the largest value, of those around which REACH pixels are inside."""
    inside = values[REACH:-REACH, REACH:-REACH]
    row, column = divmod(int(inside.argmax()), inside.shape[1])
    return row + REACH, column + REACH


# ---------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------

WIDTH, DPI = 10, 150  # inches, and dots in one
READING = (
    "Each output takes its kernel where its arrow ends, by a bilinear sample, and weighs the source pixels around its "
    "own source pixel by it; frames have the colours of the arrows."
)
# Okabe and Ito's colours, which the colour-blind tell apart, and a number beside each.
OUTPUTS = ("#0072b2", "#d55e00", "#009e73", "#aa4499")
EDGE, FLAT = "#e69f00", "#56b4e9"


def picture(learned: Learned, title: str) -> Figure:
    """The whole image above; below a pixel on an edge and one in a flat region, with their kernels and offsets.

    Of scale 2: each of the four outputs of a source pixel has a colour.
    """
    aspect = learned.pixels.shape[1] / learned.pixels.shape[2]
    heights = (0.95 + min(2.9 * aspect, 4), 3.0, 3.0)
    figure = Figure((WIDTH, sum(heights) + 1.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=15, fontweight="bold")
    figure.supxlabel(
        textwrap.fill(f"{READING} {caption(learned)}", 130), x=0.01, horizontalalignment="left", fontsize=10
    )
    whole, *parts = figure.subfigures(3, 1, height_ratios=heights)
    places = {"edge": (learned.edge_pixel(), EDGE), "flat region": (learned.flat_pixel(), FLAT)}
    _whole(whole.subplots(1, 3), learned, places)
    reach = 0.6 + max(
        2.0, *(learned.offsets[:, :, row, column].abs().max().ceil().item() for (row, column), _ in places.values())
    )
    for part, (name, ((row, column), colour)) in zip(parts, places.items(), strict=True):
        axes = part.subplots(1, 4)
        _patch(axes[0], learned, row, column, REACH + 0.5, 1.0, colour)
        axes[0].set_ylabel(f"on an {name}" if name == "edge" else f"in a {name}", fontsize=13, fontweight="bold")
        axes[0].set_title(f"a source pixel, in row {row},\ncolumn {column}; reach of its kernel", fontsize=10)
        _kernel(axes[1], learned.kernels[:, row, column], learned.kernel_size, 9)
        axes[1].set_title(f"its kernel, per cent,\nentropy {learned.entropy()[row, column]:.2f} bits", fontsize=10)
        _offsets(axes[2], learned, row, column, reach, colour)
        axes[2].set_title(
            f"where its outputs sample,\nmean offset {learned.lengths()[row, column]:.2f} source pixels", fontsize=10
        )
        _sampled(axes[3], learned, row, column)
    return figure


def caption(learned: Learned) -> str:
    """What the picture shows of the whole image, in words that follow from the figures."""
    means, most = learned.figures(), math.log2(len(learned.kernels))
    offset, entropy, change = (means[name] for name in ("offset", "entropy", "change"))
    verdicts = []
    if max(offset.values()) < SMALL_OFFSET:
        verdicts.append(f"The offsets stayed small, below {SMALL_OFFSET} in each mean.")
    if max(change.values()) < SMALL_CHANGE:
        verdicts.append("Sampling hardly changes the kernels.")
    return " ".join(
        [
            f"Means over the whole image, on edges (the {SHARE:.0%} of pixels with the strongest gradient) and in "
            f"flat regions (the {SHARE:.0%} with the weakest): offsets {offset['edges']:.2f} and {offset['flat']:.2f} "
            f"source pixels long; entropy of the kernels {entropy['edges']:.2f} and {entropy['flat']:.2f} bits, of "
            f"{most:.2f} if all taps weighed the same; weight that sampling moves to other taps {change['edges']:.1%} "
            f"and {change['flat']:.1%}.",
            *verdicts,
        ]
    )


def _whole(axes: list[Axes], learned: Learned, places: dict[str, tuple[tuple[int, int], str]]) -> None:
    axes[0].imshow(learned.pixels.permute(1, 2, 0).numpy())
    axes[0].set_title("given, and the two pixels below", fontsize=10)
    for name, ((row, column), colour) in places.items():
        corner, side = (column - REACH - 0.5, row - REACH - 0.5), 2 * REACH + 1
        axes[0].add_patch(Rectangle(corner, side, side, fill=False, edgecolor="black", linewidth=3))
        axes[0].add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.5))
        above = row > 2 * REACH + 8
        axes[0].annotate(
            name, (column, row + (-REACH - 2 if above else REACH + 2)), fontsize=10, color="black",
            horizontalalignment="center", verticalalignment="bottom" if above else "top",
            bbox={"facecolor": colour, "edgecolor": "black", "pad": 1.5},
        )  # fmt: skip
    lengths, entropy = learned.lengths(), learned.entropy()
    most = max(lengths.quantile(0.99).item(), SMALL_OFFSET)
    shown = axes[1].imshow(lengths.numpy(), cmap="viridis", vmin=0, vmax=most)
    axes[1].set_title("mean length of offsets, source pixels", fontsize=10)
    _bar(shown, axes[1], extend="max" if lengths.max() > most else "neither")
    shown = axes[2].imshow(entropy.numpy(), cmap="viridis", vmin=0, vmax=math.log2(len(learned.kernels)))
    axes[2].set_title("entropy of the kernels, bits", fontsize=10)
    _bar(shown, axes[2])
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.set_anchor("N")


def _bar(shown: object, axis: Axes, extend: str = "neither") -> None:
    axis.figure.colorbar(shown, cax=axis.inset_axes((0, -0.12, 1, 0.07)), orientation="horizontal", extend=extend)


def _patch(axis: Axes, learned: Learned, row: int, column: int, reach: float, alpha: float, colour: str) -> None:
    """The image around a source pixel, in source pixels from it, and how far its kernel reaches."""
    height, width = learned.pixels.shape[1:]
    extent = (-0.5 - column, width - 0.5 - column, height - 0.5 - row, -0.5 - row)
    axis.imshow(learned.pixels.permute(1, 2, 0).numpy(), extent=extent, alpha=alpha, interpolation="nearest")
    axis.set(xlim=(-reach, reach), ylim=(reach, -reach))
    for side, line in ((1, "-"), (learned.kernel_size, "--")):
        corner = (-side / 2, -side / 2)
        axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="black", linewidth=3))
        axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.5, linestyle=line))
    ticks = range(-int(reach), int(reach) + 1, max(1, int(reach) // 2))
    axis.set(xticks=list(ticks), yticks=list(ticks))
    axis.tick_params(labelsize=9)


def _kernel(axis: Axes, taps: Tensor, size: int, font: float) -> None:
    """(k*k,) as a square, white where a tap weighs nothing and black where it is the only one; per cents in it."""
    square = taps.view(size, size)
    axis.imshow(square.numpy(), cmap="Greys", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    for (row, column), tap in ((divmod(index, size), tap) for index, tap in enumerate(taps.tolist())):
        if tap >= 0.005:
            colour = "white" if tap > 0.5 else "black"
            axis.text(column, row, f"{100 * tap:.0f}", fontsize=font, color=colour, ha="center", va="center")


def _offsets(axis: Axes, learned: Learned, row: int, column: int, reach: float, colour: str) -> None:
    _patch(axis, learned, row, column, reach, 0.45, colour)
    for number, ((x, y), output) in enumerate(zip(learned.offsets[:, :, row, column].tolist(), OUTPUTS, strict=True)):
        axis.annotate(
            "", (x, y), (0, 0),
            arrowprops={"arrowstyle": "-|>", "color": output, "linewidth": 2, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        axis.annotate(
            str(number + 1), (x, y), fontsize=10, color="white", ha="center", va="center",
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": output, "edgecolor": "white"},
        )  # fmt: skip


def _sampled(axis: Axes, learned: Learned, row: int, column: int) -> None:
    """The kernels of a source pixel's outputs, where these are."""
    s, change = learned.scale_factor, learned.change()[row, column]
    axis.set_axis_off()
    axis.set_title(f"kernels of its {s} x {s} outputs,\nweight moved {change:.1%}", fontsize=10)
    for number, (taps, output) in enumerate(zip(learned.sampled[:, :, row, column], OUTPUTS, strict=True)):
        place = (number % s / s + 0.01, 1 - (number // s + 1) / s + 0.01)
        inset = axis.inset_axes((*place, 1 / s - 0.02, 1 / s - 0.02))
        _kernel(inset, taps, learned.kernel_size, 6.5)
        inset.spines[:].set(color=output, linewidth=2.5)
