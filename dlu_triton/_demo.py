"""The demo: a photograph is shrunk, made noisy and restored by small networks that differ in their upsampler only.

The networks learn on the shrunken photograph, without its noise, to undo a further shrinking and other noise; the
original is not seen in training. The settings were chosen on the packaged photograph, so its PSNRs show the upsamplers
at work and rank nothing. There is noise because without it kernels of one tap do: the convolution that follows the
upsampler, as in the feature pyramids that CARAFE and DLU were made for, then puts all detail where it belongs.
"""

from __future__ import annotations

import importlib.resources
import math
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from . import CARAFEPack, DLUPack

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image, ImageOps
    from tqdm import tqdm

    from . import _learned
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

__all__ = ["run"]

PHOTOGRAPH = "coffee.jpg"
RESULT, KERNELS = "dlu_demo.png", "kernels.png"
# Those whose decoders are within Pillow: for EPS, also within IPTC, it starts Ghostscript.
FORMATS = (
    "AVIF", "BMP", "DDS", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
TITLE = "What DLU does at an edge and in a flat region, after {steps} steps"
MIN_SIDE, MAX_SIDE = 64, 512  # pixels of the picture
MAX_ASPECT = 2
SCALE = 2
NOISE = 0.1  # standard deviation, of pixels from 0 to 1
FEATURES = 16
HEAD_KERNEL = 3  # of the convolution after the upsampler
STEPS = 300
LEARNING_RATE = 5e-3
TRAINING_CROP = 128  # pixels a side, of the target
SEED, NOISE_SEED = 0, 1  # of the training, and of what is restored afterwards

METHODS: dict[str, Callable[[], nn.Module]] = {
    "Nearest": lambda: nn.Upsample(scale_factor=SCALE),
    "Bilinear": lambda: nn.Upsample(scale_factor=SCALE, mode="bilinear"),
    "CARAFE": lambda: CARAFEPack(FEATURES, SCALE),
    "DLU": lambda: DLUPack(FEATURES, SCALE),
}


class _UserError(Exception):
    """A mistake that one line explains."""


@dataclass
class _Result:
    name: str
    picture: Image.Image
    psnr: float  # dB
    parameters: int  # of the upsampler
    milliseconds: float  # of one call of the upsampler


def run(image: Path | None, out: Path, *, steps: int = STEPS) -> int:
    """Restore `image` (None: the packaged photograph) with every upsampler; the pictures go to folder `out`.

    Returns the exit status: 0, or 1 after a user's mistake, which one line on stderr explains.
    """
    try:
        if _import_error is not None:
            raise _UserError(f'{_import_error}; pip install "dlu-triton[demo]"')
        original = _read(image)
        _prepare(out)
        written = _run(original, image.name if image else PHOTOGRAPH, out, steps)
    except _UserError as mistake:
        print(f"dlu_triton demo: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 1
    for what, path in written.items():
        print(f"{what}: {path}")
    return 0


def _run(original: Image.Image, name: str, out: Path, steps: int) -> dict[str, Path]:
    """The pictures written, and what is on them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (CARAFE and DLU: eager path)"
    clean, small = _given(original)
    clean, pixels = clean.to(device), _tensor(small).to(device)
    print(
        f"{name}, {original.width} x {original.height} pixels, is shrunk by {SCALE}, made noisy and restored.\n"
        f"Networks that differ in their upsampler only learn for {steps} steps to undo a further shrinking, and\n"
        "other noise, of the small picture; the original is not seen in training. One picture ranks nothing.\n"
    )
    results, learned = [], None
    with tqdm(total=len(METHODS) * steps, leave=False, unit="step", mininterval=0.5) as progress:
        for method, upsampler in METHODS.items():
            progress.set_description(method)
            network = _network(upsampler).to(device)
            _train(network, clean, steps, progress)
            results.append(_evaluate(method, network, pixels, original))
            if isinstance(network.upsampler, DLUPack):
                learned = _learn(network, pixels, clean)

    print(f"{'':8}{'PSNR':>12}{'parameters':>14}{'time':>12}")
    for result in results:
        print(f"{result.name:8}{result.psnr:9.2f} dB{result.parameters:14,}{result.milliseconds:9.3g} ms")
    plain = _image(F.interpolate(_tensor(small), scale_factor=SCALE, mode="bilinear"))
    notes = [
        f"Parameters and time: of the upsampler, for {FEATURES} x {small.height} x {small.width} features on {where}.",
        f"Bilinear enlargement of the noisy pixels, without a network: {_psnr(plain, original):.2f} dB.",
    ]
    print("", *notes, sep="\n")
    caption = (
        f"The original is shrunk to {small.width} x {small.height} pixels and gets noise of standard deviation "
        f"{255 * NOISE:.0f} of 255. The networks learnt for {steps} steps to undo a further shrinking, and other "
        "noise, of the small picture, and never saw the original. One picture ranks nothing. PSNR: to the original. "
        f"{notes[0]} The details are where the results differ most."
    )
    figures = {"The pictures side by side": (RESULT, _sheet(original, small, plain, results, caption))}
    if learned is not None:
        print(textwrap.fill(_learned.caption(learned), 100))
        figures["Kernels and offsets"] = (KERNELS, _learned.picture(learned, TITLE.format(steps=steps)))
    for file, figure in figures.values():
        try:
            figure.savefig(out / file, dpi=DPI)
        except OSError as error:
            raise _UserError(f"cannot write {out / file}: {error.strerror or error}") from error
    return {what: out / file for what, (file, _) in figures.items()}


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def _read(path: Path | None) -> Image.Image:
    """The picture as RGB, upright, with sides that are multiples of 4 up to MAX_SIDE."""
    source = path or importlib.resources.files(__package__) / "data" / PHOTOGRAPH
    try:
        with warnings.catch_warnings(), source.open("rb") as file:
            warnings.simplefilter("ignore")  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # the others are of a newer Pillow
            with Image.open(file, formats=known) as encoded:
                picture = _rgb(ImageOps.exif_transpose(encoded))
    except Image.UnidentifiedImageError as error:
        raise _UserError(f"cannot read {source}: not a picture in a format that the demo reads") from error
    except OSError as error:
        raise _UserError(f"cannot read {source}: {error.strerror or error}") from error
    except Exception as error:  # the decoders raise errors of many types on broken files
        raise _UserError(f"cannot read {source}: {error or type(error).__name__}") from error
    if min(picture.size) < MIN_SIDE:
        width, height = picture.size
        raise _UserError(f"{source} is too small: {width} x {height} pixels, needs {MIN_SIDE} a side")
    return _fit(picture)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 bits, 32 bits or float, of whatever range
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0)
        values = values - values.min()
        picture = Image.fromarray((values * (255 / (values.max() or 1))).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _fit(picture: Image.Image) -> Image.Image:
    """The middle of the picture, of an aspect up to MAX_ASPECT, shrunk to sides up to MAX_SIDE."""
    width, height = picture.size
    width, height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    shrinking = max(1.0, max(width, height) / MAX_SIDE)
    width, height = (int(side / shrinking) // 4 * 4 for side in (width, height))
    if shrinking > 1:
        return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _prepare(out: Path) -> None:
    """Make the folder, and find out before the training whether it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise _UserError(f"cannot write to folder {out}: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """(N, 3, H, W) -> (N, 3, s*H, s*W), in RGB from 0 to 1."""

    def __init__(self, upsampler: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 2 * FEATURES, 3, padding=1), nn.GELU(), nn.Conv2d(2 * FEATURES, FEATURES - 3, 3, padding=1)
        )
        self.head = nn.Conv2d(FEATURES, 3, HEAD_KERNEL, padding=HEAD_KERNEL // 2, bias=False)
        with torch.no_grad():  # starts close to the upsampled RGB values
            self.head.weight.mul_(0.1)
            self.head.weight[:, :3, HEAD_KERNEL // 2, HEAD_KERNEL // 2] += torch.eye(3)
        self.upsampler = upsampler()  # last, so that all networks start with the same encoder and head

    def features(self, pictures: Tensor) -> Tensor:
        """(N, FEATURES, H, W), RGB included"""
        return torch.cat((pictures, self.encoder(pictures)), 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.upsampler(self.features(pictures)))


def _given(original: Image.Image) -> tuple[Tensor, Image.Image]:
    """The shrunken picture, (1, 3, H, W), and what is to be restored: the same with noise."""
    clean = _tensor(_image(_shrink(_tensor(original))))
    return clean, _image(_noisy(clean, torch.Generator().manual_seed(NOISE_SEED)))


def _learn(network: _Network, pixels: Tensor, scene: Tensor) -> _learned.Learned:
    """What the network's DLU does to (1, 3, H, W) pixels, of a scene without noise."""
    with torch.no_grad():
        return _learned.look(network.upsampler, network.features(pixels), pixels, scene)


def _network(upsampler: Callable[[], nn.Module]) -> _Network:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return _Network(upsampler)


def _train(network: _Network, picture: Tensor, steps: int, progress: tqdm) -> None:
    """Learn to restore random crops of the (1, 3, H, W) picture, shrunk and noisy; all networks see the same ones."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        crop = _random_crop(picture, generator)
        loss = F.mse_loss(network(_noisy(_shrink(crop), generator)), crop)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        progress.update()


def _random_crop(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of the (1, 3, H, W) picture at any pixel, mirrored and transposed at random, of even sides."""
    slices = []
    for side in picture.shape[2:]:
        size = min(side // SCALE * SCALE, TRAINING_CROP)
        start = int(torch.randint(side - size + 1, (), generator=generator))
        slices.append(slice(start, start + size))
    crop = picture[:, :, slices[0], slices[1]]
    mirror_x, mirror_y, transpose = torch.randint(2, (3,), generator=generator).tolist()
    crop = crop.flip([dim for dim, mirror in ((3, mirror_x), (2, mirror_y)) if mirror])
    return crop.transpose(2, 3) if transpose else crop


@torch.no_grad()
def _evaluate(name: str, network: _Network, small: Tensor, original: Image.Image) -> _Result:
    picture = _image(network(small))
    timer = Timer(
        "upsampler(features)",
        globals={"upsampler": network.upsampler, "features": network.features(small)},
        num_threads=torch.get_num_threads(),
    )
    milliseconds = 1e3 * timer.blocked_autorange(min_run_time=0.3).median
    parameters = sum(parameter.numel() for parameter in network.upsampler.parameters())
    return _Result(name, picture, _psnr(picture, original), parameters, milliseconds)


def _shrink(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 3, H/s, W/s), free of aliases"""
    small = F.interpolate(pictures, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return small.clamp(0, 1)


def _noisy(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """As a file would hold them, from 0 to 1."""
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + NOISE * noise.to(pictures.device)).clamp(0, 1)


def _psnr(picture: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of 8 bits, in dB"""
    error = F.mse_loss(_tensor(picture), _tensor(original)).item()
    return -10 * math.log10(error) if error else math.inf


def _tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (1, 3, H, W), from 0 to 1"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).contiguous() / 255


def _image(pixels: Tensor) -> Image.Image:
    """(1, 3, H, W), from 0 to 1 -> RGB picture"""
    values = (pixels[0].clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


# ---------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------

WIDTH, DPI = 10, 150  # inches, and dots in one
DETAIL = 48  # pixels a side, at most a half of the picture's
FRAMES = {"A": "#e69f00", "B": "#56b4e9"}  # of the details: of Okabe and Ito's colours, which the colour-blind know


def _sheet(
    original: Image.Image, small: Image.Image, plain: Image.Image, results: list[_Result], caption: str
) -> Figure:
    """The whole picture and a table above; below, the details in which the results differ most, and their errors."""
    boxes = dict(zip(FRAMES, _telling_boxes(results), strict=False))
    heights = (0.5 + 3.4 * min(original.height / original.width, 1.2), *[3.6] * len(boxes))
    figure = Figure((WIDTH, sum(heights) + 1.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.05)
    title = f"A noisy photograph, enlarged {SCALE} times by networks that differ in their upsampler"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=15, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, 130), x=0.01, horizontalalignment="left", fontsize=10)
    head, *parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    given, whole, table = head.subplots(1, 3, width_ratios=(1, 1, 1))
    _picture(given, small, f"given: {small.width} x {small.height} pixels, noisy")
    _picture(whole, original, f"original: {original.width} x {original.height} pixels")
    for name, (left, top, right, bottom) in boxes.items():
        for colour, width in (("black", 3.5), (FRAMES[name], 1.5)):
            size = (right - left, bottom - top)
            whole.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, edgecolor=colour, linewidth=width))
        label = {"facecolor": FRAMES[name], "edgecolor": "black", "pad": 1.5}
        whole.text(left + 4, top + 4, name, fontsize=10, verticalalignment="top", bbox=label)
    _table(table, results, _psnr(plain, original))

    columns = {"no network": plain, **{result.name: result.picture for result in results}, "original": original}
    for part, (name, box) in zip(parts, boxes.items(), strict=True):
        pictures, errors = part.subplots(2, len(columns))
        differences = [_difference(picture, original, box) for picture in columns.values()][:-1]
        most = max(difference.max() for difference in differences)
        for axis, (column, picture) in zip(pictures, columns.items(), strict=True):
            _picture(axis, picture.crop(box), column)
        for axis, difference in zip(errors, differences, strict=False):
            shown = axis.imshow(difference, interpolation="nearest", cmap="viridis", vmin=0, vmax=most)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"mean {difference.mean():.1f}", fontsize=10)
        errors[-1].set_axis_off()
        bar = part.colorbar(shown, cax=errors[-1].inset_axes((0, 0.02, 0.12, 0.96)))
        bar.set_label("of 255, mean of\nred, green, blue", fontsize=9)
        label = {"facecolor": FRAMES[name], "edgecolor": "black", "pad": 2}
        pictures[0].set_ylabel(f"detail {name}", fontsize=11, bbox=label, labelpad=8)
        errors[0].set_ylabel("error", fontsize=11, labelpad=8)
    return figure


def _picture(axis: Axes, picture: Image.Image, title: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=11)


def _table(axis: Axes, results: list[_Result], plain: float) -> None:
    """`plain` is the PSNR without a network."""
    axis.set_axis_off()
    rows = [("upsampler", "PSNR, dB", "parameters", "ms"), ("no network", f"{plain:.2f}", "", "")]
    rows += [
        (result.name, f"{result.psnr:.2f}", f"{result.parameters:,}", f"{result.milliseconds:.3g}")
        for result in results
    ]
    for row, cells in enumerate(rows):
        for place, cell in zip((0, 0.54, 0.84, 1), cells, strict=True):
            axis.text(
                place, 0.98 - 0.16 * row, cell, fontsize=10, verticalalignment="top", transform=axis.transAxes,
                horizontalalignment="right" if place else "left", fontweight="normal" if row else "bold",
            )  # fmt: skip


def _difference(picture: Image.Image, original: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """Magnitude of the error inside the box, of 255, in the mean of the three colours: (height, width)."""
    values = [np.asarray(each.crop(box), dtype=np.float64) for each in (picture, original)]
    return np.abs(values[0] - values[1]).mean(2)


def _telling_boxes(results: list[_Result]) -> list[tuple[int, int, int, int]]:
    """The box (left, top, right, bottom) in which the results differ most, and if there is one the next beside it."""
    pictures = torch.cat([_tensor(result.picture) for result in results])
    spread = pictures.var(0, correction=0).mean(0, keepdim=True)
    side = min(DETAIL, *(size // 2 for size in spread.shape[1:]))
    means = F.avg_pool2d(spread, side, 1)[0]
    boxes = []
    for _ in FRAMES:
        row, column = divmod(int(means.argmax()), means.shape[1])
        if means[row, column] < 0:
            break
        boxes.append((column, row, column + side, row + side))
        means[max(row - side + 1, 0) : row + side, max(column - side + 1, 0) : column + side] = -1  # they overlap
    return boxes
