"""Handwritten digits on photographs, for the examples that detect and segment; nothing is downloaded.

The photographs come with scikit-image and scikit-learn, the digits with scikit-learn. No photograph and no digit of the
held-out scenes is in the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from train_upsampler import HELD_OUT, TRAINING, integer, read  # says what to install, if that is missing

from sklearn.datasets import load_digits  # isort: skip

__all__ = ["Scene", "Scenes", "comparison"]

SHRINKING = 2  # of the photographs, so that a crop shows something
DIMMING = 0.5  # of the photographs, so that the digits stand out
DIGITS = (1, 4)  # digits of a scene, at least and at most
SIDES = (16, 36)  # pixels of an enlarged digit, margins included
TRIES = 32  # places drawn for a digit, of which the first that is free is taken; it is left out if none is
SPLIT_SEED = 0
INK = 0.4  # a pixel with less of it is background


@dataclass(frozen=True)
class Scene:
    pixels: Tensor  # (3, H, W), RGB from 0 to 1
    boxes: Tensor  # (D, 4), float32, pixels x0, y0, x1, y1 of each digit's ink, half open
    labels: Tensor  # (D,), int64, the digits, 0 to 9
    mask: Tensor  # (H, W), int64, 0 for background, 1 + digit for ink


class Scenes:
    """Draws scenes from one part of the material."""

    def __init__(self, *, held_out: bool) -> None:
        names = HELD_OUT if held_out else [name for scene in TRAINING for name in scene]
        self.photographs = [
            DIMMING * F.interpolate(read(name)[None], scale_factor=1 / SHRINKING, mode="bilinear", antialias=True)[0]
            for name in names
        ]
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SPLIT_SEED))
        mine = order[: len(order) // 3] if held_out else order[len(order) // 3 :]
        self.labels = torch.from_numpy(digits.target)[mine].long()
        self.digits = torch.from_numpy(digits.images)[mine].float() / 16  # (D, 8, 8)

    def draw(self, height: int, width: int, generator: torch.Generator) -> Scene:
        """A scene of height x width pixels, each from SIDES[1] to the 150 of the smallest photograph."""

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        photograph = self.photographs[between(0, len(self.photographs) - 1)]
        top, left = (between(0, have - need) for have, need in zip(photograph.shape[1:], (height, width), strict=True))
        pixels = photograph[:, top : top + height, left : left + width].clone()
        pixels = pixels.flip(2) if between(0, 1) else pixels
        mask = torch.zeros(height, width, dtype=torch.int64)
        taken = torch.zeros(height, width, dtype=torch.bool)
        boxes, labels = [], []
        for _ in range(between(*DIGITS)):
            index, side = between(0, len(self.labels) - 1), between(*SIDES)
            ink = F.interpolate(self.digits[None, None, index], (side, side), mode="bicubic", antialias=False)[0, 0]
            ink = (1.4 * ink - 0.1).clamp(0, 1)  # no faint margin, which the box would hold
            tint = 0.4 + 0.6 * torch.rand(3, 1, 1, generator=generator)
            tint /= tint.max()
            for _ in range(TRIES):
                y, x = between(0, height - side), between(0, width - side)
                here = (slice(y, y + side), slice(x, x + side))
                if not taken[here].any():
                    break
            else:
                continue
            taken[here] = True
            pixels[:, *here] += ink * (tint - pixels[:, *here])
            mask[here][ink > INK] = 1 + self.labels[index]
            rows, columns = ((ink > INK).any(dim).nonzero() for dim in (1, 0))
            boxes.append([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1])
            labels.append(self.labels[index])
        return Scene(pixels, torch.tensor(boxes).float(), torch.stack(labels), mask)


def comparison(
    name: str, description: str, upsamplers: Iterable[str], steps: int, images: int
) -> argparse.ArgumentParser:
    """The options of a program that trains with each upsampler and measures on held-out scenes, with their defaults."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--upsamplers", nargs="+", choices=upsamplers, default=list(upsamplers))
    parser.add_argument("--steps", type=partial(integer, low=1), default=steps, help=f"of each; {steps} by default")
    parser.add_argument(
        "--images", type=partial(integer, low=1), default=images, help=f"held-out scenes, {images} by default"
    )
    parser.add_argument("--seed", type=partial(integer, low=0), default=0, help="of weights and scenes, 0 by default")
    return parser
