"""Trains one small network with five upsamplers, on photographs that come with scikit-image and scikit-learn.

    pip install -c constraints.txt ".[examples]" && python examples/train_upsampler.py

An encoder brings a noisy crop to 1/2, 1/4 or 1/8 of its size, the upsampler brings the features back in one step, and
a convolution makes the clean crop of them. There is no way around the upsampler, so it has to put detail where it
belongs. Within a scale everything else is the same: network, first weights of encoder and head, crops, noise, their
order, steps, optimiser, learning rate. The folder `--out` gets train.json, train.md, train.png, and a file for every
finished run; the same command goes on where it was stopped, on a CPU to the same bits.

The photographs that measure are of other scenes than those that train, and nothing was chosen by them: sizes, steps
and learning rate were set beforehand, the latter by the loss on training crops (see LEARNING_RATE).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import skimage
    import sklearn
    import torch
    import torch.nn.functional as F
    import triton
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator
    from PIL import Image
    from skimage.metrics import structural_similarity
    from torch import Tensor, nn
    from torch.utils.benchmark import Timer
    from tqdm import tqdm

    import dlu_triton
except ImportError as error:
    raise SystemExit(f'train_upsampler: error: {error}; pip install "dlu-triton[examples]"') from None

# Pictures of one scene are together, and on one side: the motorcycle's are a stereo pair.
TRAINING = (("astronaut.png",), ("china.jpg",), ("motorcycle_left.png", "motorcycle_right.png"))
HELD_OUT = ("chelsea.png", "coffee.png", "flower.jpg", "rocket.jpg")
NOISE = 0.1  # standard deviation, of pixels from 0 to 1
CROP, BATCH = 64, 2  # pixels a side of a training crop, and crops of a step
TILE = 128  # pixels a side of a held-out crop
CHANNELS = 32  # of the encoder, and of the features that are upsampled
COMPRESSED = 16  # channels in the encoders of CARAFE and DLU: half, as their default of 64 is made for 256
KERNEL = 5  # default of both
GROUPS = 4  # of DySample, its default
STEPS = 1500
# Set by the loss on training crops, in 800 steps of seed 99: of 4e-3 and 8e-3 the former was lower for DLU and CARAFE
# at 8x. Without the clipping, DLU at 8x and 8e-3 diverged; bilinear at 4x gained 0.1 dB from 8e-3, DLU at 2x 0.4 dB.
LEARNING_RATE = 4e-3
CLIP = 0.1  # of the norm of the gradient
WARMUP = 0.1  # share of the steps in which the rate rises, before it falls as a cosine
CHECKPOINT_STEPS = 100
HELD_OUT_SEED = 12345  # of the noise
RESAMPLES = 10_000  # of the bootstrap
RESOLUTION = 0.005  # dB, half of the last decimal of the table: a smaller difference is none

SCALES = (2, 4, 8, 16)
TITLES = {"nearest": "nearest", "bilinear": "bilinear", "carafe": "CARAFE", "dysample": "DySample", "dlu": "DLU"}
OURS = "dlu"
FIGURES, TABLE, PICTURE = "train.json", "train.md", "train.png"


class UserError(Exception):
    """A mistake that one line explains."""


# ---------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------


class DySample(nn.Module):
    """DySample (arXiv 2308.15085) with static scope, "linear and pixel shuffle": features sampled at learned places."""

    def __init__(self, channels: int, scale_factor: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.scale_factor, self.groups = scale_factor, groups
        self.offset = nn.Conv2d(channels, 2 * groups * scale_factor**2, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels, s*H, s*W)"""
        n, c, h, w = x.shape
        s, g = self.scale_factor, self.groups
        offsets = F.pixel_shuffle(0.25 * self.offset(x), s).view(n * g, 2, s * h, s * w)  # source pixels
        column = (torch.arange(s * w, dtype=x.dtype, device=x.device) + 0.5) / s  # where bilinear would sample
        row = (torch.arange(s * h, dtype=x.dtype, device=x.device)[:, None] + 0.5) / s
        places = torch.stack((2 * (column + offsets[:, 0]) / w - 1, 2 * (row + offsets[:, 1]) / h - 1), dim=-1)
        groups = x.reshape(n * g, c // g, h, w)
        return F.grid_sample(groups, places, padding_mode="border", align_corners=False).view(n, c, s * h, s * w)


def upsampler(method: str, scale: int) -> nn.Module:
    if method == "carafe":
        return dlu_triton.CARAFEPack(CHANNELS, scale, KERNEL, compressed_channels=COMPRESSED)
    if method == "dlu":
        return dlu_triton.DLUPack(CHANNELS, scale, KERNEL, compressed_channels=COMPRESSED)
    if method == "dysample":
        return DySample(CHANNELS, scale)
    return nn.Upsample(scale_factor=scale, mode=method)


def cost(method: str, scale: int) -> tuple[int, int]:
    """Parameters, and FLOPs per source pixel, of an upsampler; softmax and the places of samples are not counted."""
    if method in ("carafe", "dlu"):
        module = getattr(dlu_triton.complexity(CHANNELS, scale, KERNEL, compressed_channels=COMPRESSED), method)
        return module.parameters, module.flops + module.interpolation_flops
    outputs = scale**2
    if method == "dysample":
        offset = (CHANNELS + 1) * 2 * GROUPS * outputs
        return offset, 2 * offset + 7 * outputs * CHANNELS
    return 0, 7 * outputs * CHANNELS if method == "bilinear" else 0


class Network(nn.Module):
    """(N, 3, H, W) -> (N, 3, H, W), in RGB from 0 to 1; sides are multiples of the scale."""

    def __init__(self, method: str, scale: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 3, padding=1), nn.GELU()]
        for _ in range(scale.bit_length() - 1):
            layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1), nn.GELU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        self.head = nn.Conv2d(CHANNELS, 3, 3, padding=1)
        for layer in self.encoder:
            if isinstance(layer, nn.Conv2d):  # PyTorch's own weights make features too faint to steer an upsampler
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.upsampler = upsampler(method, scale)  # last, so that all methods start with the same encoder and head

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.upsampler(self.encoder(pictures)))


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def read(name: str) -> Tensor:
    """A photograph of the installed scikit-image or scikit-learn -> (3, H, W), from 0 to 1; nothing is downloaded."""
    for folder in (files(skimage) / "data", files(sklearn) / "datasets" / "images"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file, Image.open(file) as picture:
                return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous() / 255
    raise UserError(f"neither scikit-image {skimage.__version__} nor scikit-learn {sklearn.__version__} has {name}")


@dataclass(frozen=True)
class Pictures:
    training: list[list[Tensor]]  # scenes of (3, H, W)
    held_out: dict[str, Tensor]  # name -> (M, 3, TILE, TILE), by rows of a grid in the middle of the picture

    @classmethod
    def load(cls) -> Pictures:
        return cls(
            [[read(name) for name in scene] for scene in TRAINING], {name: tiles(read(name)) for name in HELD_OUT}
        )

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of random crops, noisy and clean, (BATCH, 3, CROP, CROP) each"""

        def below(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        crops = []
        for _ in range(BATCH):
            scene = self.training[below(len(self.training))]
            picture = scene[below(len(scene))]
            top, left = (below(side - CROP + 1) for side in picture.shape[1:])
            crop = picture[:, top : top + CROP, left : left + CROP]
            crop = crop.flip(2) if below(2) else crop
            crops.append(crop.transpose(1, 2) if below(2) else crop)
        clean = torch.stack(crops)
        return noisy(clean, generator), clean


def tiles(picture: Tensor) -> Tensor:
    """(3, H, W) -> (M, 3, TILE, TILE), all that fit beside each other"""
    (rows, top), (columns, left) = ((side // TILE, side % TILE // 2) for side in picture.shape[1:])
    middle = picture[:, top : top + rows * TILE, left : left + columns * TILE]
    return middle.view(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)


def noisy(pictures: Tensor, generator: torch.Generator) -> Tensor:
    return pictures + NOISE * torch.randn(pictures.shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------
# A run: one method, scale and seed
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    method: str
    scale: int
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.scale}x-seed{self.seed}"


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    out: Path
    device: torch.device
    pictures: Pictures
    key: dict[str, Any]  # what the results depend on, and where they were made

    @property
    def steps(self) -> int:
        return self.key["settings"]["steps"]

    def result(self, job: Job) -> Path:
        return self.out / "runs" / f"{job}.json"

    def checkpoint(self, job: Job) -> Path:
        return self.out / "runs" / f"{job}.pt"

    def check(self, path: Path, found: dict[str, Any]) -> None:
        """UserError unless what the file holds was made with these settings, on this machine, by this commit."""
        for kind, ours in self.key.items():
            for name, value in ours.items():
                other = found["key"][kind].get(name)
                if other != value:
                    raise UserError(
                        f"{path} was made with another {name}, {other!r} and not {value!r}: choose another --out, or "
                        "delete it"
                    )


def run(job: Job, setup: Setup, progress: tqdm) -> dict[str, Any]:
    """Figures of a run: those of an earlier one, else from its checkpoint if there is one, else from the start."""
    path = setup.result(job)
    if path.exists():
        with reading(path):
            found = json.loads(path.read_text())
            setup.check(path, found)
            figures = found["figures"]
        progress.update(setup.steps)
        return figures
    network, losses, seconds = train(job, setup, progress)
    figures = {"method": job.method, "scale": job.scale, "seed": job.seed, "training_seconds": seconds}
    figures["training_loss"] = statistics.fmean(losses[-max(1, len(losses) // 10) :])  # of the last tenth
    figures |= evaluate(network, setup)
    write(path, json.dumps({"key": setup.key, "figures": figures}, indent=2) + "\n")
    setup.checkpoint(job).unlink(missing_ok=True)
    return figures


def train(job: Job, setup: Setup, progress: tqdm) -> tuple[Network, list[float], float]:
    """The trained network, the loss of every step, and the seconds that the steps took."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(job.seed)
        network = Network(job.method, job.scale).to(setup.device)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(job.seed)
    losses: list[float] = []
    seconds = 0.0
    path = setup.checkpoint(job)
    if path.exists():
        with reading(path):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            setup.check(path, saved)
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
            losses, seconds = saved["losses"], saved["seconds"]
        progress.update(len(losses))
    for step in range(len(losses), setup.steps):
        start = time.perf_counter()
        noise, clean = (each.to(setup.device) for each in setup.pictures.draw(generator))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, setup.steps)
        loss = F.mse_loss(network(noise), clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss of {job} is {losses[-1]} in step {step + 1}")
        progress.update()
        if len(losses) % CHECKPOINT_STEPS == 0:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.get_state(), "losses": losses, "seconds": seconds, "key": setup.key}
            with writing(path) as temporary:
                torch.save(state, temporary)
    return network.eval(), losses, seconds


def rate(step: int, steps: int) -> float:
    """The learning rate of a step."""
    done = (step + 1) / steps
    if done < WARMUP:
        return LEARNING_RATE * done / WARMUP
    return LEARNING_RATE * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2


@torch.no_grad()
def evaluate(network: Network, setup: Setup) -> dict[str, Any]:
    """Mean PSNR and SSIM of each held-out picture's tiles, costs, and times of one tile."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    psnr, ssim = {}, {}
    for name, clean in setup.pictures.held_out.items():
        noise = noisy(clean, generator)
        restored = torch.cat([network(each.to(setup.device)).cpu() for each in noise.split(BATCH)]).clamp(0, 1)
        errors = (restored - clean).double().square().mean((1, 2, 3))
        psnr[name] = (-10 * errors.log10()).mean().item()
        pairs = zip(restored.numpy(), clean.numpy(), strict=True)
        ssim[name] = statistics.fmean(similarity(*pair) for pair in pairs)
    tile = noise[:1].to(setup.device)
    parameters = sum(parameter.numel() for parameter in network.upsampler.parameters())
    return {
        "psnr": psnr,
        "ssim": ssim,
        "parameters": parameters,
        "network_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "upsampler_milliseconds": milliseconds(network.upsampler, network.encoder(tile)),
        "network_milliseconds": milliseconds(network, tile),
        "weights": digest(network),
    }


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """SSIM of two pictures (3, H, W), as its authors define it"""
    looks = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(one, other, channel_axis=0, data_range=1.0, **looks))


def milliseconds(module: nn.Module, pixels: Tensor) -> float:
    timer = Timer("module(x)", globals={"module": module, "x": pixels}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=0.2).median


def digest(network: Network) -> str:
    """Of all weights, to tell whether two runs gave the same."""
    state = hashlib.sha256()
    for tensor in network.state_dict().values():
        state.update(tensor.cpu().numpy().tobytes())
    return state.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------------------------


def compare(figures: list[dict[str, Any]], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """By other method: PSNR of DLU over it at one scale, in dB.

    The 95% interval is of a paired bootstrap that draws seeds and pictures. "better" and "worse" speak of DLU; a tie is
    an interval that comes within RESOLUTION of zero.
    """
    found = {(run["method"], run["seed"]): [run["psnr"][name] for name in sorted(run["psnr"])] for run in figures}
    generator = np.random.default_rng(0)
    comparisons = {}
    for method in dict.fromkeys(method for method, _ in found if method != OURS):
        gains = np.array([found[OURS, seed] for seed in seeds]) - np.array([found[method, seed] for seed in seeds])
        rows, columns = (generator.integers(size, size=(RESAMPLES, size)) for size in gains.shape)
        means = gains[rows[:, :, None], columns[:, None]].mean((1, 2))
        low, high = (float(np.quantile(means, share)) for share in (0.025, 0.975))
        verdict = "better" if low > RESOLUTION else "worse" if high < -RESOLUTION else "tie"
        comparisons[method] = {"mean": float(gains.mean()), "low": low, "high": high, "verdict": verdict}
    return comparisons


def summarise(runs: list[dict[str, Any]], key: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """What train.json holds."""
    rows, comparisons = [], {}
    for scale in dict.fromkeys(run["scale"] for run in runs):
        here = [run for run in runs if run["scale"] == scale]
        methods = list(dict.fromkeys(run["method"] for run in here))
        for method in methods:
            mine = [run for run in here if run["method"] == method]
            row = {"scale": scale, "method": method, "parameters": mine[0]["parameters"]}
            row["flops_per_output_pixel"] = cost(method, scale)[1] / scale**2
            for measure in ("psnr", "ssim"):
                values = [statistics.fmean(run[measure].values()) for run in mine]
                row[measure] = statistics.fmean(values)
                row[f"{measure}_deviation"] = statistics.stdev(values) if values[1:] else None
            for name in ("training_seconds", "upsampler_milliseconds", "network_milliseconds"):
                row[name] = min(run[name] for run in mine)  # what else the machine does only adds
            rows.append(row)
        if OURS in methods:
            comparisons[str(scale)] = compare(here, seeds)
    return {**key, "seeds": seeds, "methods": rows, "dlu_over": comparisons, "resamples": RESAMPLES, "runs": runs}


def settings(steps: int) -> dict[str, Any]:
    """What the results of a run depend on."""
    return {
        "steps": steps,
        "batch": BATCH,
        "crop": CROP,
        "tile": TILE,
        "noise": NOISE,
        "channels": CHANNELS,
        "compressed_channels": COMPRESSED,
        "kernel": KERNEL,
        "dysample_groups": GROUPS,
        "learning_rate": LEARNING_RATE,
        "clip": CLIP,
        "warmup": WARMUP,
        "training": [name for scene in TRAINING for name in scene],
        "held_out": list(HELD_OUT),
        "held_out_seed": HELD_OUT_SEED,
    }


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} (eager path)",
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "dlu_triton": dlu_triton.__version__,
        "torch": str(torch.__version__),  # a plain string, which checkpoints may hold
        "triton": triton.__version__,
        "scikit-image": skimage.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def commit() -> str | None:
    """The commit of the checkout that holds this file, marked if it was changed since; None outside of one."""
    here = Path(__file__).resolve()
    try:
        for command in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(["git", "-C", here.parent, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------
# Table and plot
# ---------------------------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc5b9e", "#1f2328")  # of the methods in TITLES' order
MARKERS = "sDv^o"
LEGEND = (
    "PSNR and SSIM: means over held-out photographs, ± the standard deviation over seeds. Times: the least over seeds, "
    f"of a whole training, and of the upsampler alone for one crop of {TILE} pixels a side."
)
BOOTSTRAP = "By a paired bootstrap over seeds and photographs (95%, each comparison by itself):"
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


def table(figures: dict[str, Any]) -> str:
    """Markdown, a row for each scale and method."""
    titles = ("scale", "upsampler", "parameters", "FLOPs per output pixel", "PSNR, dB", "SSIM", "DLU over it, dB (95%)")
    titles += ("training, s", "upsampler, ms")
    lines = [titles, ("---:", "---", *["---:"] * (len(titles) - 2))]
    for row in figures["methods"]:
        gain = figures["dlu_over"].get(str(row["scale"]), {}).get(row["method"])
        over = "" if gain is None else f"{signed(gain['mean'])} ({signed(gain['low'])} to {signed(gain['high'])})"
        lines.append(
            (
                f"{row['scale']}{TIMES}",
                TITLES[row["method"]],
                f"{row['parameters']:,}",
                f"{row['flops_per_output_pixel']:,.0f}",
                spread(row["psnr"], row["psnr_deviation"], 2),
                spread(row["ssim"], row["ssim_deviation"], 3),
                over,
                f"{row['training_seconds']:.0f}",
                f"{row['upsampler_milliseconds']:.3g}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def spread(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if deviation is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def verdicts(figures: dict[str, Any]) -> list[str]:
    """In plain words, a line for each scale, e.g. "DLU is better than nearest and bilinear; ties with CARAFE."."""
    words = {"better": "is better than", "tie": "ties with", "worse": "is worse than"}
    lines = []
    for scale, found in figures["dlu_over"].items():
        parts = []
        for verdict, phrase in words.items():
            names = [TITLES[method] for method, each in found.items() if each["verdict"] == verdict]
            if names:
                parts.append(f"{phrase} {' and '.join([*([', '.join(names[:-1])] if names[1:] else []), names[-1]])}")
        if parts:
            lines.append(f"{scale}{TIMES}: DLU {'; '.join(parts)}.")
    return lines


def place(figures: dict[str, Any]) -> str:
    """Where and how the figures were measured."""
    commit = figures["machine"]["commit"]
    versions = figures["machine"]
    return (
        f"Seeds: {len(figures['seeds'])}, of {figures['settings']['steps']} steps; {versions['device']}, threads: "
        f"{versions['threads']}, torch {versions['torch']}, Triton {versions['triton']}, Python {versions['python']}, "
        f"{'no commit' if commit is None else f'commit {commit[:12]}' + commit[40:]}"
    )


def document(figures: dict[str, Any]) -> str:
    """What train.md holds."""
    pictures = figures["settings"]["held_out"]
    lines = [("scale", "upsampler", *pictures), ("---:", "---", *["---:"] * len(pictures))]
    for row in figures["methods"]:
        mine = [run for run in figures["runs"] if (run["scale"], run["method"]) == (row["scale"], row["method"])]
        means = (statistics.fmean(run["psnr"][name] for run in mine) for name in pictures)
        lines.append((f"{row['scale']}{TIMES}", TITLES[row["method"]], *(f"{mean:.2f}" for mean in means)))
    by_picture = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [
        "# Five upsamplers in one small network",
        f"{place(figures)}.",
        table(figures),
        LEGEND,
        BOOTSTRAP,
        "\n".join(f"- {line}" for line in verdicts(figures)),
        "PSNR by photograph, dB:",
        by_picture,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(figures: dict[str, Any], colours: tuple[str, ...] = COLOURS) -> Figure:
    """Quality against parameters of the upsampler, a panel for each scale."""
    scales = list(dict.fromkeys(row["scale"] for row in figures["methods"]))
    figure = Figure((1 + 3 * len(scales), 3.6), layout="constrained")
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        for row in figures["methods"]:
            if row["scale"] == scale:
                index = list(TITLES).index(row["method"])
                axes.errorbar(
                    row["parameters"],
                    row["psnr"],
                    row["psnr_deviation"],
                    fmt=MARKERS[index],
                    color=colours[index],
                    markersize=6,
                    capsize=3,
                    linewidth=1,
                    label=TITLES[row["method"]],
                )
        axes.set(title=f"{scale}{TIMES}", xlabel="parameters of the upsampler", ylabel="PSNR, dB")
        axes.set_xscale("symlog", linthresh=1000, linscale=0.5)
        axes.set_xlim(-300, 1e6)
        axes.set_xticks([0, 10**3, 10**4, 10**5])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value else "0"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(linewidth=0.6)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is damaged'}; delete it"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` if all goes well, so that what is there is always whole."""
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def write(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text)


def prepare(out: Path) -> None:
    """Make the folder, and find out before the training whether it can be written to."""
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "runs"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to folder {out}: {error.strerror or error}") from error


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts; "meta" has no values
        raise UserError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    return device


def train_all(options: argparse.Namespace, device: torch.device) -> None:
    prepare(options.out)
    key = {"settings": settings(options.steps), "machine": machine(device)}
    setup = Setup(options.out, device, Pictures.load(), key)
    methods = [method for method in TITLES if method in options.methods]
    seeds = list(dict.fromkeys(options.seeds))
    # Seeds outside, so that what was stopped compares all methods and scales already.
    jobs = [Job(method, scale, seed) for seed in seeds for scale in sorted(set(options.scales)) for method in methods]
    runs = []
    with tqdm(total=len(jobs) * options.steps, unit="step", mininterval=0.5) as progress:
        for number, job in enumerate(jobs, start=1):
            progress.set_description(f"run {number}/{len(jobs)}: {job}")
            runs.append(run(job, setup, progress))
    runs.sort(key=lambda each: (each["scale"], list(TITLES).index(each["method"]), each["seed"]))
    figures = summarise(runs, key, seeds)
    write(options.out / FIGURES, json.dumps(figures, indent=2) + "\n")
    write(options.out / TABLE, document(figures))
    with writing(options.out / PICTURE) as temporary:
        draw(figures).savefig(temporary, dpi=150, format="png")
    print(f"{place(figures)}.", "", table(figures), "", *verdicts(figures), sep="\n")
    print(f"\nEvery figure: {options.out / FIGURES}\nTables: {options.out / TABLE}\nPlot: {options.out / PICTURE}")


def integer(text: str, low: int) -> int:
    if not text.isdecimal() or int(text) < low or len(text) > 15:
        raise argparse.ArgumentTypeError(f"must be an integer of at most 15 digits and at least {low}, got {text!r}")
    return int(text)


def run_program(
    program: Callable[[argparse.Namespace, torch.device], None],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    stopped: str = "stopped",
) -> int:
    """Run a program on its options and device: 0, or a line on stderr and the exit status of what went wrong."""
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    options = parser.parse_args(arguments)
    try:
        program(options, choose_device(options.device))
        sys.stdout.flush()
    except UserError as mistake:
        print(f"{parser.prog}: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: {stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read has left, as `head` does; files are written before
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written at the exit
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_upsampler", description=__doc__.splitlines()[0])
    parser.add_argument("--scales", type=int, nargs="+", choices=SCALES, default=[2, 4, 8], help="of the upsampling")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument(
        "--seeds", type=partial(integer, low=0), nargs="+", default=[0, 1, 2, 3, 4], help="a run of each"
    )
    parser.add_argument("--steps", type=partial(integer, low=1), default=STEPS, help=f"of a run; {STEPS} by default")
    parser.add_argument(
        "--out", type=Path, default=Path("dlu_train"), help="folder of the results, dlu_train by default"
    )
    return run_program(train_all, parser, arguments, "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
