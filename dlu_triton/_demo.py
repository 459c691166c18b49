"""The demo: a photograph is shrunk and restored by small networks that differ in their upsampler only.

The networks learn on the shrunken photograph itself to undo a further shrinking; the original is not seen in training.
The settings were chosen on the packaged photograph, so its PSNRs show the upsamplers at work and rank nothing.
A convolution follows the upsampler, as in the feature pyramids that CARAFE and DLU were made for.
"""

from __future__ import annotations

import importlib.resources
import math
import sys
import tempfile
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
    from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
    from tqdm import tqdm
except ImportError as error:
    _import_error: ImportError | None = error
else:
    _import_error = None

__all__ = ["run"]

PHOTOGRAPH = "coffee.jpg"
RESULT = "dlu_demo.png"
# Those whose decoders are within Pillow: for EPS, also within IPTC, it starts Ghostscript.
FORMATS = (
    "AVIF", "BMP", "DDS", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
MIN_SIDE, MAX_SIDE = 64, 512  # pixels of the picture
MAX_ASPECT = 2
SCALE = 2
FEATURES = 16
HEAD_KERNEL = 3  # of the convolution after the upsampler
STEPS = 300
LEARNING_RATE = 5e-3
TRAINING_CROP = 128  # pixels a side, of the target
SEED = 0

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
    """Restore `image` (None: the packaged photograph) with every upsampler; the picture goes to folder `out`.

    Returns the exit status: 0, or 1 after a user's mistake, which one line on stderr explains.
    """
    try:
        if _import_error is not None:
            raise _UserError(f'{_import_error}; pip install "dlu-triton[demo]"')
        original = _read(image)
        _prepare(out)
        _run(original, image.name if image else PHOTOGRAPH, out / RESULT, steps)
    except _UserError as mistake:
        print(f"dlu_triton demo: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 1
    print(f"The pictures side by side: {out / RESULT}")
    return 0


def _run(original: Image.Image, name: str, path: Path, steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (CARAFE and DLU: eager path)"
    small = _image(_shrink(_tensor(original)))
    pixels = _tensor(small).to(device)
    print(
        f"{name}, {original.width} x {original.height} pixels, is shrunk by {SCALE} and restored.\n"
        f"Four networks that differ in their upsampler only learn for {steps} steps on the small picture\n"
        "to undo a further shrinking; the original is not seen in training. One picture ranks nothing.\n"
    )
    results = []
    with tqdm(total=len(METHODS) * steps, leave=False, unit="step", mininterval=0.5) as progress:
        for method, upsampler in METHODS.items():
            progress.set_description(method)
            network = _network(upsampler).to(device)
            _train(network, pixels, steps, progress)
            results.append(_evaluate(method, network, pixels, original))

    print(f"{'':8}{'PSNR':>12}{'parameters':>14}{'time':>12}")
    for result in results:
        print(f"{result.name:8}{result.psnr:9.2f} dB{result.parameters:14,}{result.milliseconds:9.3g} ms")
    plain = _image(F.interpolate(_tensor(small), scale_factor=SCALE, mode="bilinear"))
    notes = [
        f"Parameters and time: of the upsampler, for {FEATURES} x {small.height} x {small.width} features on {where}.",
        f"Bilinear enlargement of the pixels, without a network: {_psnr(plain, original):.2f} dB.",
    ]
    print("", *notes, sep="\n")
    caption = [f"Networks that differ in their upsampler only, after {steps} steps on the small picture.", *notes]
    caption.append("The detail is where their pictures differ most.")
    try:
        _sheet(original, small, results, " ".join(caption)).save(path)
    except OSError as error:
        raise _UserError(f"cannot write {path}: {error.strerror or error}") from error


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


def _network(upsampler: Callable[[], nn.Module]) -> _Network:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return _Network(upsampler)


def _train(network: _Network, picture: Tensor, steps: int, progress: tqdm) -> None:
    """Learn to restore random crops of the (1, 3, H, W) picture after shrinking; the same crops for all networks."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        crop = _random_crop(picture, generator)
        loss = F.mse_loss(network(_shrink(crop)), crop)
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
# Contact sheet
# ---------------------------------------------------------------------------------------------------------------

MIN_CELL = 256  # pixels of a cell's width
MARGIN = 20
ERROR_GAIN = 4
INK, FAINT, PAPER, FRAME = "#1b1b1b", "#6a6a6a", "#ffffff", "#ffd400"


def _sheet(original: Image.Image, small: Image.Image, results: list[_Result], caption: str) -> Image.Image:
    """Four columns: small picture and original above; the methods' pictures, crops and errors below."""
    whole = math.ceil(MIN_CELL / original.width)
    zoom = max(8, 3 * whole)
    cell = (whole * original.width, whole * original.height)
    box = _telling_box(results, *(SCALE * math.ceil(side / zoom / SCALE) for side in cell))
    left, top, right, bottom = box
    half_box = (left // SCALE, top // SCALE, right // SCALE, bottom // SCALE)

    def detail(picture: Image.Image, box: tuple[int, int, int, int], zoom: int) -> Image.Image:
        crop = picture.crop(box)
        return crop.resize((zoom * crop.width, zoom * crop.height), Image.Resampling.NEAREST).crop((0, 0, *cell))

    def framed(picture: Image.Image) -> Image.Image:
        picture = picture.resize(cell, Image.Resampling.NEAREST)
        corners = (whole * left, whole * top, whole * right - 1, whole * bottom - 1)
        ImageDraw.Draw(picture).rectangle(corners, outline=FRAME, width=2)
        return picture

    rows = [
        [
            ("Small picture", f"{small.width} x {small.height} pixels, the input", framed(small)),
            ("", f"detail, {zoom * SCALE} times enlarged", detail(small, half_box, zoom * SCALE)),
            ("Original", f"{original.width} x {original.height} pixels", framed(original)),
            ("", f"detail, {zoom} times enlarged", detail(original, box, zoom)),
        ],
        [
            (
                f"{result.name}  {result.psnr:.2f} dB",
                f"{result.parameters:,} parameters, {result.milliseconds:.3g} ms",
                result.picture.resize(cell, Image.Resampling.NEAREST),
            )
            for result in results
        ],
        [("", f"detail, {zoom} times enlarged", detail(result.picture, box, zoom)) for result in results],
        [
            (
                "",
                f"error of the detail, times {ERROR_GAIN}",
                detail(ImageChops.difference(result.picture, original), box, zoom).point(
                    lambda value: min(255, ERROR_GAIN * value)
                ),
            )
            for result in results
        ],
    ]

    width = len(results) * (cell[0] + MARGIN) + MARGIN
    title = f"Upsampling features by {SCALE}"
    title_font, name_font, text_font = (ImageFont.load_default(size) for size in (36, 26, 18))
    lines = _wrap(caption, text_font, width - 2 * MARGIN)
    heads = [34 * any(name for name, _, _ in row) + 28 for row in rows]
    height = MARGIN + 50 + len(lines) * 26 + sum(heads) + len(rows) * (cell[1] + MARGIN) + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    y = MARGIN + 50
    for line in lines:
        draw.text((MARGIN, y), line, FAINT, text_font)
        y += 26
    y += MARGIN
    for row, head in zip(rows, heads, strict=True):
        for column, (name, text, picture) in enumerate(row):
            x = MARGIN + column * (cell[0] + MARGIN)
            draw.text((x, y), name, INK, name_font)
            draw.text((x, y + head - 26), text, FAINT, text_font)
            sheet.paste(picture, (x, y + head))
        y += head + cell[1] + MARGIN
    return sheet


def _telling_box(results: list[_Result], width: int, height: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in which the results differ most; whole pixels of the small picture."""
    pictures = torch.cat([_tensor(result.picture) for result in results])
    spread = pictures.var(0, correction=0).mean(0, keepdim=True)
    means = F.avg_pool2d(spread, (height, width), SCALE)[0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return SCALE * column, SCALE * row, SCALE * column + width, SCALE * row + height


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words that are no wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
