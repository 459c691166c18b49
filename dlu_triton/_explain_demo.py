"""The demo of the explanations: where a small network sees each of two digits, by every class activation map.

Two digits of different classes lie on a photograph at known places, so the maps of both classes can be checked.
The head of the network does not pool: after global pooling and one linear layer XGrad-CAM and Grad-CAM are the same.
The maps are taken after the last pooling layer, as in the paper (arXiv 2008.02312).
The settings of the training were chosen by the accuracy on the test images, which flatters it a little.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from . import AblationCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM, __version__, metrics, overlay
from ._demo import _prepare, _read, _tensor, _UserError

try:
    import PIL  # noqa: F401, read by _demo and scikit-learn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from sklearn.datasets import load_digits, load_sample_images
    from tqdm import tqdm
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

__all__ = ["run"]

PICTURE, FIGURES, NETWORK = "explain.png", "explain.json", "explain_network.pt"
EXPLAINERS = {
    "XGrad-CAM": XGradCAM,
    "Grad-CAM": GradCAM,
    "Grad-CAM++": GradCAMPlusPlus,
    "HiResCAM": HiResCAM,
    "LayerCAM": LayerCAM,
    "Ablation-CAM": AblationCAM,
}
REFERENCE, BASELINE = "XGrad-CAM", "Random map"

SIDE = 64  # pixels of an image
DIGIT = 24  # pixels of an enlarged digit, margins included
CLASSES = 10
SHRINKING = 2  # of the photographs, so that a crop shows something
DIMMING = 0.5  # of the photographs, so that the digits stand out
TRIES = 64  # draws of a second digit, and of two places, of which the first that fits is taken
WIDTHS = (16, 32, 64, 64)  # channels of the convolutions
HIDDEN = 128
LAYER = "pool"  # the layer explained
STEPS = 800
BATCH = 64
LEARNING_RATE = 4e-3
SEED = 0
TRAINING_SEED, TEST_SEED = 1, 2
TEST_IMAGES = 1000  # for the accuracy
IMAGES = 200  # of them, explained
SHOWN = 2  # of them, in the picture
EXACT = ["--abbrev=40", "--exclude=*"]  # a hash, not a tag
RESAMPLES = 2000  # of the bootstrap


def run(out: Path, *, steps: int = STEPS, images: int = IMAGES) -> int:
    """Train the network, or find it in folder `out`; explain `images` images and write picture and figures to `out`.

    Returns the exit status: 0, or 1 after a user's mistake, which one line on stderr explains.
    """
    try:
        if _import_error is not None:
            raise _UserError(f'{_import_error}; pip install "dlu-triton[explain]"')
        _prepare(out)
        _run(out, steps, images)
    except _UserError as mistake:
        print(f"dlu_triton explain: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 1
    print(f"The maps side by side: {out / PICTURE}\nEvery figure: {out / FIGURES}")
    return 0


def _run(out: Path, steps: int, count: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _say(
        f"Two handwritten digits of different classes lie on a photograph. A network of {len(WIDTHS)} convolutions "
        "learns which; then every method maps where it sees either digit. No photograph and no digit of the test was "
        "seen in training."
    )
    network = _network(out / NETWORK, device, steps)
    images = _Source(test=True).draw(max(count, TEST_IMAGES), torch.Generator().manual_seed(TEST_SEED)).to(device)
    accuracy = _accuracy(network, images)
    _say(f"Among the two largest logits are {accuracy:.1%} of the digits of {len(images.pixels):,} test images.")

    figures: dict[str, Any] = {
        "test_accuracy": accuracy,
        "test_images": len(images.pixels),
        "images": count,
        "classes_per_image": 2,
    }
    images = images.to(device, count)
    results = _measure(network, images)
    figures["negative_scores"] = int((_logits(network, images).gather(1, images.classes) < 0).sum())
    figures["box_share"] = (images.boxes[..., 2:] - images.boxes[..., :2]).prod(-1).double().mean().item() / SIDE**2
    figures["methods"] = {
        name: {key: MEASURES[key].summary(values).item() for key, values in result.values.items()}
        | {f"{key}_ratio_of_sums": ratio for key, ratio in result.ratios.items()}
        | {"milliseconds_per_image": result.milliseconds, "dead_maps": result.dead}
        for name, result in results.items()
    }
    figures[f"against {REFERENCE}"] = {
        key: _compare({name: each.values[key] for name, each in results.items() if key in each.values}, measure)
        for key, measure in MEASURES.items()
    }
    figures |= {
        "layer": LAYER,
        "test_seed": TEST_SEED,
        "resamples": RESAMPLES,
        "settings": _settings(steps),
        "device": _device_name(device),
        "commit": _commit(),
    }
    figures["versions"] = {
        "dlu_triton": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    _print(figures)
    sheet = _sheet(images, results, _caption(figures))
    with _writing(out / PICTURE):
        sheet.savefig(out / PICTURE, dpi=DPI)
    with _writing(out / FIGURES):
        (out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")


def _print(figures: dict[str, Any]) -> None:
    print("\n" + " " * 14 + "".join(f"{measure.title:>20}" for measure in MEASURES.values()) + f"{'ms per image':>14}")
    for name, values in figures["methods"].items():
        cells = [f"{values[key]:.3f}" if key in values else "-" for key in MEASURES]
        milliseconds = values["milliseconds_per_image"]
        last = "-" if milliseconds is None else f"{milliseconds:.3g}"
        print(f"{name:14}" + "".join(f"{cell:>20}" for cell in cells) + f"{last:>14}")
    print()
    count, share, where = figures["images"], figures["box_share"], figures["device"]
    _say(
        f"{count} test images, both digits of each, mapped after the last pooling layer. Hit: the largest value of the "
        f"map is in the digit's box. Energy: the share of the map's sum in the box; the box has {share:.1%} of the "
        "pixels. Sensitivity: what zeroing each channel takes from the score, against the channel's share of the raw "
        "map. Conservation: the score, against the sum of the raw map. Both errors are relative, and medians, as one "
        f"score near zero spoils a mean; {FIGURES} has the ratios of sums too. Grad-CAM++ and LayerCAM drop negative "
        "gradients and Ablation-CAM divides by the score, so their maps are not meant to sum to it. Time: a whole "
        f"explanation of both digits, all images in one call; {where}."
    )
    if figures["negative_scores"]:
        _say(
            f"The score is negative in {figures['negative_scores']} of {2 * count} cases, where the network does not "
            "see the digit; there Ablation-CAM's division by the score turns its map round."
        )
    print()
    for key, verdicts in figures[f"against {REFERENCE}"].items():
        _say(_sentence(verdicts, MEASURES[key]))
    _say(
        "A tie: the 95% interval of the difference, from a paired bootstrap over the images, reaches zero to the last "
        "decimal shown. Each comparison stands by itself, and one network ranks nothing in general."
    )
    print()


def _say(text: str) -> None:
    print(textwrap.fill(text, 116))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'a CPU'} (eager path), threads: {torch.get_num_threads()}"


def _commit() -> str | None:
    """The commit of the checkout that holds this file, marked if it was changed since; None outside of one."""
    folder = Path(__file__).parent
    try:
        for command in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty", *EXACT]):
            done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        raise _UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


# ---------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Images:
    pixels: Tensor  # (N, 3, SIDE, SIDE), from 0 to 1
    classes: Tensor  # (N, 2), int64, the two digits
    boxes: Tensor  # (N, 2, 4), int64, pixels x0, y0, x1, y1 of each digit's ink, half open

    def to(self, device: torch.device, count: int | None = None) -> _Images:
        """The first `count` images, all if None."""
        return _Images(*(each[:count].to(device) for each in (self.pixels, self.classes, self.boxes)))


class _Source:
    """Draws images from one part of the material; no photograph and no handwritten digit is in both parts."""

    def __init__(self, *, test: bool) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SEED))
        held_out = len(order) // 3
        self.indices = order[:held_out] if test else order[held_out:]
        self.labels = torch.from_numpy(digits.target)[self.indices]
        ink = torch.from_numpy(digits.images)[self.indices].float() / 16
        ink = F.interpolate(ink[:, None], (DIGIT, DIGIT), mode="bilinear")[:, 0]
        ink = (1.4 * ink - 0.1).clamp(0, 1)  # no faint margin, which the box would hold
        self.ink = F.pad(ink, (1, 1, 1, 1))  # (D, DIGIT + 2, DIGIT + 2): zeros to read outside of the digit
        if test:
            photographs = [_tensor(_read(None))]
        else:
            photographs = [torch.tensor(each).permute(2, 0, 1)[None] / 255 for each in load_sample_images().images]
        self.photographs = DIMMING * torch.cat(  # (P, 3, H, W)
            [F.interpolate(each, scale_factor=1 / SHRINKING, mode="bilinear", antialias=True) for each in photographs]
        )

    def draw(self, count: int, generator: torch.Generator) -> _Images:
        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (count, *shape), generator=generator)

        photographs, _, height, width = self.photographs.shape
        rows = integers(height - SIDE + 1, 1) + torch.arange(SIDE)  # [N, SIDE]
        columns = integers(width - SIDE + 1, 1) + torch.arange(SIDE)
        columns = torch.where(integers(2, 1) == 1, columns.flip(1), columns)
        which = integers(photographs, 1, 1)
        pixels = self.photographs[which, :, rows[:, :, None], columns[:, None]]  # [N, SIDE, SIDE, 3]
        pixels = pixels.permute(0, 3, 1, 2).contiguous()

        first, seconds = integers(len(self.labels), 1), integers(len(self.labels), TRIES)
        differs = self.labels[seconds] != self.labels[first]
        digits = torch.cat((first, seconds.gather(1, _first(differs)[:, None])), 1)  # [N, 2]
        places = integers(SIDE - DIGIT + 1, TRIES, 2, 2)  # [N, try, digit, (x, y)]
        places[:, -1] = torch.tensor([[0, 0], [SIDE - DIGIT, SIDE - DIGIT]])  # fits always
        apart = ((places[:, :, 0] - places[:, :, 1]).abs() >= DIGIT).any(2)
        places = places[torch.arange(count), _first(apart)]  # [N, digit, (x, y)]
        tints = 0.4 + 0.6 * torch.rand((count, 2, 3, 1, 1), generator=generator)
        tints /= tints.amax(2, keepdim=True)

        boxes = []
        for digit in range(2):
            x, y = ((torch.arange(SIDE) - start[:, None] + 1).clamp(0, DIGIT + 1) for start in places[:, digit].T)
            ink = self.ink[digits[:, digit, None, None], y[:, :, None], x[:, None]]  # [N, SIDE, SIDE]
            pixels += ink[:, None] * (tints[:, digit] - pixels)
            across, down = (ink > 0).any(1), (ink > 0).any(2)
            ends = (SIDE - _first(across.flip(1)), SIDE - _first(down.flip(1)))
            boxes.append(torch.stack((_first(across), _first(down), *ends), 1))
        return _Images(pixels, self.labels[digits], torch.stack(boxes, 1))


def _first(flags: Tensor) -> Tensor:
    """(N, M) bool -> (N,), where the first true flag is."""
    return flags.int().argmax(1)


# ---------------------------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------------------------


class _Network(nn.Sequential):
    """(N, 3, SIDE, SIDE), from 0 to 1 -> (N, CLASSES), one logit for every digit."""

    def __init__(self) -> None:
        layers: dict[str, nn.Module] = {}
        for number, (before, width) in enumerate(pairwise((3, *WIDTHS)), 1):
            layers[f"conv{number}"] = nn.Conv2d(before, width, 3, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
            if number in (1, 2):
                layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers[LAYER] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["hidden"] = nn.Linear(WIDTHS[-1] * (SIDE // 8) ** 2, HIDDEN)
        layers["relu"] = nn.ReLU()
        layers["logits"] = nn.Linear(HIDDEN, CLASSES)
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # PyTorch's own learns nothing for long
                nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels - 0.3)  # about their mean


def _settings(steps: int) -> dict[str, Any]:
    """What the trained network depends on."""
    return {
        "seed": SEED,
        "training_seed": TRAINING_SEED,
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "side": SIDE,
        "digit": DIGIT,
        "shrinking": SHRINKING,
        "dimming": DIMMING,
        "widths": list(WIDTHS),
        "hidden": HIDDEN,
    }


def _network(path: Path, device: torch.device, steps: int) -> _Network:
    """The network that an earlier run left at `path`, if its settings were these; else a freshly trained one."""
    settings = _settings(steps)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        network = _Network().to(memory_format=torch.channels_last)  # a third faster than the default on a CPU
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["settings"] == settings:
            network.load_state_dict(saved["state"])
            print(f"The network is that of an earlier run, from {path}.")
            return network.to(device).eval()
        why = f"the settings of {path} differ"
    except FileNotFoundError:
        why = f"there is no {path} yet"
    except Exception:  # a damaged file raises errors of many types
        why = f"{path} cannot be read"
    network = network.to(device)
    start = time.perf_counter()
    _train(network, device, steps)
    print(f"The network learnt for {steps} steps, {time.perf_counter() - start:.0f} s, as {why}.")
    with _writing(path):
        torch.save({"settings": settings, "state": network.state_dict()}, path)
    return network.eval()


def _train(network: _Network, device: torch.device, steps: int) -> None:
    source, generator = _Source(test=False), torch.Generator().manual_seed(TRAINING_SEED)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="Training", leave=False, unit="step", mininterval=0.5):
        loss = _loss(network, source.draw(BATCH, generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _loss(network: _Network, images: _Images) -> Tensor:
    logits = network(images.pixels)
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits).scatter_(1, images.classes, 1))


@torch.no_grad()
def _logits(network: _Network, images: _Images) -> Tensor:
    return torch.cat([network(pixels) for pixels in images.pixels.split(BATCH)])


def _accuracy(network: _Network, images: _Images) -> float:
    """The share of the digits that are among the two largest logits."""
    found = _logits(network, images).topk(2).indices[:, None] == images.classes[:, :, None]  # [N, digit, largest]
    return found.any(2).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    title: str
    error: bool  # smaller is better, and the median tells more than the mean

    def summary(self, values: Tensor) -> Tensor:
        """(..., N, K) -> (...), what the table shows of all images and classes"""
        values = values.flatten(-2)
        return values.quantile(0.5, -1) if self.error else values.mean(-1)


MEASURES = {
    "hit": _Measure("pointing hit", error=False),
    "energy": _Measure("energy in box", error=False),
    "sensitivity": _Measure("sensitivity error", error=True),
    "conservation": _Measure("conservation error", error=True),
}


@dataclass
class _Result:
    maps: Tensor  # (N, K, SIDE, SIDE)
    values: dict[str, Tensor]  # measure -> (N, K), float64; the errors are missing where they are not defined
    ratios: dict[str, float]  # error -> sum of the absolute errors / sum of what they are relative to
    milliseconds: float | None  # of a whole explanation, an image
    dead: int  # maps without a positive value


def _measure(network: _Network, images: _Images) -> dict[str, _Result]:
    """Explain both digits of every image by every method."""
    count = len(images.pixels)
    drops = metrics.channel_drops(network, LAYER, images.pixels, images.classes, progress=True)  # [N, K, C]
    results = {}
    for name, kind in tqdm(EXPLAINERS.items(), desc="Explaining", leave=False, unit="method"):
        explainer = kind(network, LAYER)
        explanation = explainer(images.pixels, images.classes)
        errors = {
            "sensitivity": (metrics.sensitivity(explanation, drops), drops.abs().sum(-1)),
            "conservation": (metrics.conservation(explanation), explanation.scores.abs()),
        }
        timer = Timer(
            "explainer(pixels, classes)",
            globals={"explainer": explainer, "pixels": images.pixels, "classes": images.classes},
            num_threads=torch.get_num_threads(),
        )
        results[name] = _Result(
            explanation.map,
            _located(explanation.map, images) | {key: error.double().cpu() for key, (error, _) in errors.items()},
            {key: ((error * size).sum() / size.sum()).item() for key, (error, size) in errors.items()},
            1e3 * timer.blocked_autorange(min_run_time=0.5).median / count,
            int(explanation.dead.sum()),
        )
    noise = torch.rand(count, 2, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    maps = F.interpolate(noise, (SIDE, SIDE), mode="bilinear").to(images.pixels.device)
    results[BASELINE] = _Result(maps, _located(maps, images), {}, None, 0)
    return results


def _located(maps: Tensor, images: _Images) -> dict[str, Tensor]:
    return {
        "hit": metrics.pointing_hit(maps, images.boxes).double().cpu(),
        "energy": metrics.energy_in_box(maps, images.boxes).double().cpu(),
    }


RESOLUTION = 0.0005  # half of the last decimal of the table: a smaller difference is none


def _compare(values: dict[str, Tensor], measure: _Measure) -> dict[str, str]:
    """Every method of `values` but REFERENCE: "better" than it, "worse", or a "tie".

    A paired bootstrap over the images, whose two classes stay together, of the difference of what the table shows. A
    tie is a 95% interval that comes within RESOLUTION of zero.
    """
    count = len(values[REFERENCE])
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(SEED))
    resampled = {name: measure.summary(each[picks]) for name, each in values.items()}
    reference = resampled.pop(REFERENCE)
    verdicts = {}
    for name, each in resampled.items():
        gain = reference - each if measure.error else each - reference
        low, high = (gain.quantile(bound).item() for bound in (0.025, 0.975))
        verdicts[name] = "better" if low > RESOLUTION else "worse" if high < -RESOLUTION else "tie"
    return verdicts


def _sentence(verdicts: dict[str, str], measure: _Measure) -> str:
    """In plain words, e.g. "Pointing hit: A and B tie with XGrad-CAM; C is worse."."""
    parts = []
    for verdict, singular, plural in (
        ("tie", f"ties with {REFERENCE}", f"tie with {REFERENCE}"),
        ("better", "is better", "are better"),
        ("worse", "is worse", "are worse"),
    ):
        names = [name for name, each in verdicts.items() if each == verdict]
        if names:
            listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
            parts.append(f"{listed} {plural if names[1:] else singular}")
        elif verdict == "tie":
            parts.append(f"nothing ties with {REFERENCE}")
    return f"{measure.title.capitalize()}: {'; '.join(parts)}."


# ---------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------

WIDTH, DPI = 10.5, 150  # inches, and dots in one
COLORMAP = "inferno"  # which the colour-blind read, and which leaves the image dark, not tinted, where a map is zero
BOX, MISS = "#56b4e9", "#b8400a"


def _sheet(images: _Images, results: dict[str, _Result], text: str) -> Figure:
    """Rows: the digits of the first images, and means over all; columns: the image and the overlay of every method."""
    shown = min(SHOWN, len(images.pixels))
    names = [name for name in results if name != BASELINE]
    rows, columns = 2 * shown, 1 + len(names)
    figure = Figure((WIDTH, (WIDTH / columns + 0.15) * rows + 2.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    axes = figure.subplots(rows + 1, columns, squeeze=False, height_ratios=[*[WIDTH / columns + 0.2] * rows, 1.2])
    for row in range(rows):
        image, digit = divmod(row, 2)
        pixels, boxes = images.pixels[image].cpu(), images.boxes[image].cpu()
        _cell(axes[row, 0], pixels.permute(1, 2, 0).numpy(), boxes, digit)
        axes[row, 0].set_ylabel(f"where is the {images.classes[image, digit]}?", fontsize=12)
        for axis, name in zip(axes[row, 1:], names, strict=True):
            result = results[name]
            heat = result.maps[image, digit].cpu()
            _cell(axis, overlay(pixels[None], heat[None], colormap=COLORMAP)[0], boxes[digit : digit + 1], 0)
            if not heat.any():
                axis.set_xlabel("empty map", fontsize=11, color=MISS)
                continue
            y, x = divmod(int(heat.argmax()), SIDE)
            hit = bool(result.values["hit"][image, digit])
            axis.plot(x, y, "X", markersize=9, markerfacecolor="white", markeredgecolor="black")
            label = f"{'hit' if hit else 'MISS'}, {result.values['energy'][image, digit]:.0%}"
            axis.set_xlabel(label, fontsize=11, color="black" if hit else MISS, fontweight="normal" if hit else "bold")
    for axis, name in zip(axes[0], ["test image", *names], strict=True):
        axis.set_title(name, fontsize=11)
    _means(axes[rows], {name: results[name] for name in names}, len(images.pixels))
    title = f"Where does a small network see each digit? {len(names)} class activation maps"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=15, fontweight="bold")
    figure.supxlabel(textwrap.fill(text, 136), x=0.01, horizontalalignment="left", fontsize=10)
    return figure


def _means(axes: np.ndarray, results: dict[str, _Result], count: int) -> None:
    """Below the columns, what the table has of all images; arrows say which way is better."""
    for axis in axes:
        axis.set_axis_off()
    axes[0].text(1, 1, f"all {count} images", fontsize=10, fontweight="bold", horizontalalignment="right", va="top")
    for line, (key, measure) in enumerate(MEASURES.items(), 1):
        place = {"y": 1 - 0.22 * line, "fontsize": 10, "verticalalignment": "top"}
        axes[0].text(1, s=f"{measure.title} {'↓' if measure.error else '↑'}", horizontalalignment="right", **place)
        for axis, result in zip(axes[1:], results.values(), strict=True):
            value = measure.summary(result.values[key]).item() if key in result.values else None
            cell = "-" if value is None else f"{value:.3f}" if measure.error else f"{value:.1%}"
            axis.text(0.5, s=cell, horizontalalignment="center", **place)


def _caption(figures: dict[str, Any]) -> str:
    return (
        f"The first {min(SHOWN, figures['images'])} of {figures['images']} test images, mapped after the last pooling "
        "layer; below, means over all of them, of errors medians. Blue: the box of the digit asked for. Cross: the "
        "largest value of the map, a hit if it is in the box. Per cent: of the map's sum in the box, which has "
        f"{figures['box_share']:.0%} of the pixels in the mean. Sensitivity: what zeroing each channel takes from the "
        "score, against the channel's share of the raw map. Conservation: the score, against the sum of the raw map. "
        "Maps of Grad-CAM++, LayerCAM and Ablation-CAM are not meant to sum to the score. One network ranks nothing in "
        "general."
    )


def _cell(axis: Axes, pixels: np.ndarray, boxes: Tensor, highlighted: int) -> None:
    axis.imshow(pixels)
    axis.set(xticks=[], yticks=[])
    for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
        colour, width, line = (BOX, 2.5, "-") if index == highlighted else ("white", 1, ":")
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width, linestyle=line))
