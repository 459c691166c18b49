"""The all-MLP head of SegFormer with DLU or CARAFE in place of bilinear upsampling.

    pip install -c constraints.txt ".[examples]" && python examples/segformer_head.py

`SegFormerHead` is to be imported or pasted; it needs torch and dlu_triton alone. Run as a program, this file trains it
with each upsampler on a small encoder of four levels, from random weights, to tell the pixels of handwritten digits
on photographs of odd sizes apart, and measures it on photographs and digits that it has not seen. Nothing but the
upsampler differs: first weights, scenes, steps, optimiser, learning rate. One short run shows that the parts work
together; it ranks no upsampler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    import dlu_triton
except ImportError as error:
    advice = f"{error}; pip install dlu-triton"
    if __name__ == "__main__":
        sys.exit(f"segformer_head: error: {advice}")
    raise ImportError(advice) from error

if TYPE_CHECKING:
    from scenes import Scenes

__all__ = ["SegFormerHead"]


# ---------------------------------------------------------------------------------------------------------------
# To import or paste
# ---------------------------------------------------------------------------------------------------------------


class Bilinear(nn.Module):
    """What SegFormer's head does, with the interface of the other upsamplers."""

    def __init__(self, channels: int, scale_factor: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size=output_size, mode="bilinear", align_corners=False)


UPSAMPLERS = {"bilinear": Bilinear, "carafe": dlu_triton.CARAFEPack, "dlu": dlu_triton.DLUPack}


class SegFormerHead(nn.Module):
    """The decoder of SegFormer (arXiv 2105.15203) with learned upsamplers.

    Every level is brought to the same number of channels by a linear layer, to the size of the finest by an upsampler,
    and all are fused by 1 x 1 convolutions. A level is 2, 4 or 8 times smaller than the finest, rounded up, as strided
    convolutions make it; odd sizes are cropped within the upsampler.

    Args:
        in_channels: of each level, finest first.
        channels: of the levels when they are fused.
        classes: how many maps of logits come out.
        scale_factors: how many times smaller than the finest each further level is; 2, 4, 8 and so on by default.
        upsampler: "dlu", "carafe" or "bilinear".
        dropout: of whole channels, before the classifier.
        options: for `dlu_triton.DLUPack` or `dlu_triton.CARAFEPack`, such as `compressed_channels=32`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        classes: int,
        *,
        scale_factors: Sequence[int] | None = None,
        upsampler: str = "dlu",
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        if upsampler not in UPSAMPLERS:
            raise ValueError(f"upsampler must be one of {', '.join(UPSAMPLERS)}, got {upsampler!r}")
        self.scale_factors = tuple(scale_factors or (2**level for level in range(1, len(in_channels))))
        if len(self.scale_factors) != len(in_channels) - 1:
            raise ValueError(
                f"scale_factors must be one fewer than in_channels, {len(in_channels) - 1}, got {self.scale_factors}"
            )
        self.projections = nn.ModuleList(nn.Conv2d(each, channels, 1) for each in in_channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, classes, 1)
        self.upsamplers = nn.ModuleList(  # last, so that the first weights of the others do not depend on them
            UPSAMPLERS[upsampler](channels, scale, **options) for scale in self.scale_factors
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """(N, in_channels[i], h_i, w_i), finest first -> logits (N, classes, h_0, w_0)"""
        finest, *coarse = (project(level) for project, level in zip(self.projections, levels, strict=True))
        size = finest.shape[-2:]
        for level, scale in zip(coarse, self.scale_factors, strict=True):
            if tuple(level.shape[-2:]) != tuple(-(-side // scale) for side in size):
                raise ValueError(
                    f"levels: a level must be {scale} times smaller than {tuple(size)}, rounded up, got "
                    f"{tuple(level.shape[-2:])}"
                )
        coarse = [up(level, output_size=size) for up, level in zip(self.upsamplers, coarse, strict=True)]
        return self.classifier(self.dropout(self.fuse(torch.cat((finest, *coarse), 1))))


# ---------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------

SIZES = ((97, 119), (101, 113), (109, 101))  # height and width of the scenes of a batch, in pixels
CLASSES = 11  # background and ten digits
WIDTHS = (16, 32, 64, 96)  # channels of the levels at 1/4, 1/8, 1/16 and 1/32
CHANNELS = 32  # of the head
COMPRESSED = 16  # channels in the encoders of CARAFE and DLU: half, as their default of 64 is made for 256
BATCH = 8
STEPS = 800
# Of 2e-3 and 8e-3 without clipping and 4e-3 with it, the latter had the lower loss on training scenes at the end for
# CARAFE and bilinear, and than 2e-3 for DLU.
LEARNING_RATE = 4e-3
CLIP = 1.0  # of the norm of the gradient
WARMUP = 0.1  # share of the steps in which the rate rises, before it falls as a cosine
IMAGES = 200  # held-out scenes
HELD_OUT_SEED = 12345


class Network(nn.Module):
    """(N, 3, H, W), from 0 to 1 -> (N, CLASSES, H, W) logits."""

    def __init__(self, upsampler: str) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        before = 3
        for level, width in enumerate(WIDTHS):
            strides = (2, 2) if level == 0 else (2, 1)
            layers: list[nn.Module] = []
            for stride in (*strides, 1):
                layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            self.levels.append(nn.Sequential(*layers))
        options = {} if upsampler == "bilinear" else {"compressed_channels": COMPRESSED}
        self.head = SegFormerHead(WIDTHS, CHANNELS, CLASSES, upsampler=upsampler, **options)

    def forward(self, pixels: Tensor) -> Tensor:
        features, x = [], pixels
        for level in self.levels:
            x = level(x)
            features.append(x)
        return F.interpolate(self.head(features), size=pixels.shape[-2:], mode="bilinear", align_corners=False)


def draw(scenes: Scenes, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels (count, 3, H, W) and masks (count, H, W) of one of SIZES."""
    height, width = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
    drawn = [scenes.draw(height, width, generator) for _ in range(count)]
    return torch.stack([each.pixels for each in drawn]), torch.stack([each.mask for each in drawn])


def train(network: Network, scenes: Scenes, steps: int, seed: int, device: torch.device) -> None:
    """Prints the mean loss of every tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP)
    network.train()
    losses = []
    for step in range(steps):
        pixels, masks = (each.to(device) for each in draw(scenes, BATCH, generator))
        loss = F.cross_entropy(network(pixels), masks)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) == max(1, steps // 10) or step + 1 == steps:
            print(f"  step {step + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)
            losses = []


@torch.no_grad()
def evaluate(network: Network, scenes: Scenes, images: int, device: torch.device) -> tuple[float, float]:
    """Mean intersection over union, of the pixels of all images together: of the classes that are there, of digits."""
    from sklearn.metrics import jaccard_score

    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    network.eval()
    truth, found = [], []
    for _ in range(images):
        pixels, masks = draw(scenes, 1, generator)
        truth.append(masks.flatten().numpy())
        found.append(network(pixels.to(device)).argmax(1).flatten().numpy(force=True))
    truth, found = np.concatenate(truth), np.concatenate(found)
    classes = np.union1d(truth, found)
    scores = jaccard_score(truth, found, labels=classes, average=None)
    return scores.mean().item(), scores[classes > 0].mean().item()


def compare(options: argparse.Namespace, device: torch.device) -> None:
    from scenes import Scenes

    training, held_out = Scenes(held_out=False), Scenes(held_out=True)
    rows = []
    for name in dict.fromkeys(options.upsamplers):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            network = Network(name).to(device)
            torch.default_generator.manual_seed(options.seed)  # of the dropout
            print(f"{name}: {options.steps} steps of {BATCH} scenes", flush=True)
            start = time.perf_counter()
            train(network, training, options.steps, options.seed, device)
            seconds = time.perf_counter() - start
        iou, iou_of_digits = evaluate(network, held_out, options.images, device)
        parameters, all_parameters = (
            sum(each.numel() for each in module.parameters()) for module in (network.head.upsamplers, network)
        )
        rows.append(f"{name:10}{parameters:12,}{all_parameters:12,}{iou:10.3f}{iou_of_digits:10.3f}{seconds:14.0f}")
    titles = f"{'parameters':>12}{'of all':>12}{'mIoU':>10}{'of digits':>10}{'training, s':>14}"
    print(f"\n{'upsampler':10}{titles}", *rows, sep="\n")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (eager path)"
    print(
        f"\n{options.images} held-out scenes. mIoU: mean over background and digits of the intersection over union, of "
        "all pixels together.\nParameters: of the upsamplers, and of the network with them. "
        f"Time: {where}, threads: {torch.get_num_threads()}.\nOne short run of one seed ranks nothing."
    )


def main(arguments: list[str] | None = None) -> int:
    # Here, as whoever imports the head need not have what comes with the scenes.
    from scenes import comparison
    from train_upsampler import run_program

    parser = comparison("segformer_head", __doc__.splitlines()[0], UPSAMPLERS, STEPS, IMAGES)
    return run_program(compare, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
