"""A feature pyramid for torchvision's detection models with DLU or CARAFE in place of nearest upsampling.

    pip install -c constraints.txt ".[examples]" torchvision && python examples/torchvision_fpn.py

`UpsamplingFPN` and `replace_fpn` are to be imported or pasted; they need torch, torchvision and dlu_triton alone. Run
as a program, this file trains a small Faster R-CNN, from random weights, with each upsampler to find handwritten digits
on photographs of odd sizes, and measures it on photographs and digits that it has not seen. Nothing but the upsampler
differs: first weights, scenes, steps, optimiser, learning rate. One short run shows that the parts work together; it
ranks no upsampler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torchvision.models import resnet18
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import FeaturePyramidNetwork, box_iou
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

    import dlu_triton
except ImportError as error:
    advice = f"{error}; pip install dlu-triton torchvision"
    if __name__ == "__main__":
        sys.exit(f"torchvision_fpn: error: {advice}")
    raise ImportError(advice) from error

if TYPE_CHECKING:
    from scenes import Scene, Scenes

__all__ = ["UpsamplingFPN", "replace_fpn"]

Model = TypeVar("Model", bound=nn.Module)


# ---------------------------------------------------------------------------------------------------------------
# To import or paste
# ---------------------------------------------------------------------------------------------------------------


class Nearest(nn.Module):
    """What torchvision's pyramid does, with the interface of the other upsamplers."""

    def forward(self, x: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size=output_size, mode="nearest")


UPSAMPLERS = {
    "nearest": lambda channels: Nearest(),
    "carafe": partial(dlu_triton.CARAFEPack, scale_factor=2),
    "dlu": partial(dlu_triton.DLUPack, scale_factor=2),
}


class UpsamplingFPN(FeaturePyramidNetwork):
    """torchvision's `FeaturePyramidNetwork` with learned upsamplers on the way down.

    Layers, their names and the order of initialisation are torchvision's, so its state dicts load with
    `strict=False`; the weights that are new begin with "upsamplers.". Each level is half as large as the one before,
    rounded up, as strided convolutions make them; odd sizes are cropped within the upsampler.

    Args:
        in_channels_list, out_channels, extra_blocks, norm_layer: as for `FeaturePyramidNetwork`.
        upsampler: "dlu", "carafe" or "nearest".
        options: for `dlu_triton.DLUPack` or `dlu_triton.CARAFEPack`, such as `compressed_channels=32`.
    """

    def __init__(
        self,
        in_channels_list: list[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        upsampler: str = "dlu",
        **options: Any,
    ) -> None:
        super().__init__(in_channels_list, out_channels, extra_blocks, norm_layer)
        self.upsamplers = upsamplers(upsampler, len(in_channels_list) - 1, out_channels, options)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps by name, finest first -> maps of out_channels by name, of the same sizes, and those of extra_blocks."""
        names, maps = list(x), list(x.values())
        laterals = [block(each) for block, each in zip(self.inner_blocks, maps, strict=True)]
        merged = laterals[-1:]
        for lateral, upsampler in zip(laterals[-2::-1], reversed(self.upsamplers), strict=True):
            size = lateral.shape[-2:]
            if tuple(merged[0].shape[-2:]) != tuple((side + 1) // 2 for side in size):
                raise ValueError(
                    "x: each map must be half as large as the one before, rounded up, got sizes "
                    f"{[tuple(each.shape[-2:]) for each in maps]}"
                )
            merged.insert(0, lateral + upsampler(merged[0], output_size=size))
        results = [block(each) for block, each in zip(self.layer_blocks, merged, strict=True)]
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def upsamplers(name: str, count: int, channels: int, options: dict[str, Any]) -> nn.ModuleList:
    """The first goes to the finest level."""
    if name not in UPSAMPLERS:
        raise ValueError(f"upsampler must be one of {', '.join(UPSAMPLERS)}, got {name!r}")
    return nn.ModuleList(UPSAMPLERS[name](channels, **options) for _ in range(count))


def replace_fpn(model: Model, upsampler: str = "dlu", **options: Any) -> Model:
    """Put an `UpsamplingFPN` in place of `model.backbone.fpn`, and return the model.

    For what `fasterrcnn_resnet50_fpn`, `retinanet_resnet50_fpn`, `maskrcnn_resnet50_fpn` and the like return, with
    weights or without. The layers of the pyramid are kept as they are, weights, device, type and mode included. Make
    the optimiser afterwards. A trained model has to be trained further: new upsamplers begin as averages of 5 x 5
    pixels, which is not nearest.
    """
    old = getattr(getattr(model, "backbone", None), "fpn", None)
    if type(old) not in (FeaturePyramidNetwork, UpsamplingFPN):
        raise TypeError(f"model: model.backbone.fpn must be a FeaturePyramidNetwork of torchvision, got {type(old)}")
    last = old.inner_blocks[-1][0]
    new = UpsamplingFPN(
        [block[0].in_channels for block in old.inner_blocks], last.out_channels, upsampler=upsampler, **options
    ).to(last.weight)
    new.inner_blocks, new.layer_blocks, new.extra_blocks = old.inner_blocks, old.layer_blocks, old.extra_blocks
    model.backbone.fpn = new.train(old.training)
    return model


# ---------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------

HEIGHT, WIDTHS = 97, (97, 113, 135)  # pixels of a scene; batches are padded to the widest of their scenes
CHANNELS = 64  # of the pyramid
COMPRESSED = 32  # channels in the encoders of CARAFE and DLU: half, as their default of 64 is made for 256
BATCH = 8
STEPS = 150
LEARNING_RATE = 2e-3
WARMUP = 0.1  # share of the steps in which the rate rises, before it falls as a cosine
CLIP = 5.0  # of the norm of the gradient
IMAGES = 200  # held-out scenes
HELD_OUT_SEED = 12345
IOUS = (0.5, 0.75)  # at least, of a box that finds a digit


def detector(upsampler: str) -> FasterRCNN:
    """Small, with random weights: (3, H, W) images in a list -> dicts of boxes, labels and scores."""
    layers = {f"layer{level + 1}": str(level) for level in range(4)}
    backbone = BackboneWithFPN(resnet18(weights=None), layers, [64, 128, 256, 512], CHANNELS)
    sides = (12, 24, 32, 48, 64)  # pixels of the anchors, by level
    model = FasterRCNN(
        backbone,
        box_head=TwoMLPHead(CHANNELS * 7**2, 128),
        box_predictor=FastRCNNPredictor(128, 2),  # background, digit
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((1.0, 1.5, 2.0),) * len(sides)),
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
        min_size=HEIGHT,
        max_size=max(WIDTHS),
        size_divisible=1,  # 32 by default, which pads until every level is half as large as the one before
    )
    return replace_fpn(model, upsampler, **({} if upsampler == "nearest" else {"compressed_channels": COMPRESSED}))


def draw(scenes: Scenes, generator: torch.Generator) -> Scene:
    return scenes.draw(HEIGHT, WIDTHS[int(torch.randint(len(WIDTHS), (), generator=generator))], generator)


def train(model: FasterRCNN, scenes: Scenes, steps: int, seed: int, device: torch.device) -> None:
    """Prints the mean losses of every tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP)
    model.train()
    sums, count = dict[str, float](), 0
    for step in range(steps):
        batch = [draw(scenes, generator) for _ in range(BATCH)]
        targets = [{"boxes": each.boxes, "labels": torch.ones_like(each.labels)} for each in batch]
        targets = [{name: each.to(device) for name, each in target.items()} for target in targets]
        losses = model([each.pixels.to(device) for each in batch], targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.item()
        count += 1
        if count == max(1, steps // 10) or step + 1 == steps:
            means = ", ".join(f"{name.removeprefix('loss_')} {value / count:.3f}" for name, value in sums.items())
            print(f"  step {step + 1}: loss {sum(sums.values()) / count:.3f} ({means})", flush=True)
            sums, count = {}, 0


@torch.no_grad()
def evaluate(model: FasterRCNN, scenes: Scenes, images: int, device: torch.device) -> tuple[list[float], int]:
    """Average precisions, one for each of IOUS, and how many digits there were."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    model.eval()
    scores, hits, digits = [], {iou: [] for iou in IOUS}, 0
    for _ in range(images):
        scene = draw(scenes, generator)
        found = model([scene.pixels.to(device)])[0]  # best score first
        scores.append(found["scores"].cpu())
        for iou in IOUS:
            hits[iou].append(matched(found["boxes"].cpu(), scene.boxes, iou))
        digits += len(scene.boxes)
    return [average_precision(torch.cat(scores), torch.cat(hits[iou]), digits) for iou in IOUS], digits


def matched(found: Tensor, boxes: Tensor, iou: float) -> Tensor:
    """Which of the found boxes, best score first, cover a box that none before has found."""
    overlaps = box_iou(found, boxes)
    hits = torch.zeros(len(found), dtype=torch.bool)
    for index, overlap in enumerate(overlaps):
        best = int(overlap.argmax())
        if overlap[best] >= iou:
            hits[index] = True
            overlaps[:, best] = 0
    return hits


def average_precision(scores: Tensor, hits: Tensor, digits: int) -> float:
    """Area under precision by recall; the precision is the best at that recall or more."""
    if not hits.any():
        return 0.0
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(hits.numpy(), scores.numpy())  # from the most found to none
    recall *= hits.sum().item() / digits  # of all digits, as it was of those that were ever found
    return float(-np.diff(recall) @ np.maximum.accumulate(precision[:-1]))


def compare(options: argparse.Namespace, device: torch.device) -> None:
    from scenes import Scenes

    training, held_out = Scenes(held_out=False), Scenes(held_out=True)
    rows = []
    for name in dict.fromkeys(options.upsamplers):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            model = detector(name).to(device)
            print(f"{name}: {options.steps} steps of {BATCH} scenes", flush=True)
            torch.default_generator.manual_seed(options.seed)  # torchvision draws the boxes that train
            start = time.perf_counter()
            train(model, training, options.steps, options.seed, device)
            seconds = time.perf_counter() - start
        precisions, digits = evaluate(model, held_out, options.images, device)
        parameters = sum(each.numel() for each in model.backbone.fpn.upsamplers.parameters())
        rows.append(f"{name:10}{parameters:12,}{precisions[0]:10.3f}{precisions[1]:10.3f}{seconds:14.0f}")
    print(f"\n{'upsampler':10}{'parameters':>12}{'AP50':>10}{'AP75':>10}{'training, s':>14}", *rows, sep="\n")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (eager path)"
    print(
        f"\n{options.images} held-out scenes with {digits} digits. AP50 and AP75: average precision of boxes with an "
        f"IoU of at least {IOUS[0]} or\n{IOUS[1]}. Parameters: of the upsamplers. Time: {where}, threads: "
        f"{torch.get_num_threads()}.\nOne short run of one seed ranks nothing."
    )


def main(arguments: list[str] | None = None) -> int:
    # Here, as whoever imports the pyramid need not have what comes with the scenes.
    from scenes import comparison
    from train_upsampler import run_program

    parser = comparison("torchvision_fpn", __doc__.splitlines()[0], UPSAMPLERS, STEPS, IMAGES)
    return run_program(compare, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
