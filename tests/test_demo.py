"""The demo: the packaged photograph, the whole command on a small picture, what its pictures show, and a user's
mistakes."""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dlu_triton

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from dlu_triton import _demo, _learned  # noqa: E402

WHOLE_DEMO = """
import sys
from pathlib import Path
import torch
from dlu_triton import _demo
state = torch.get_rng_state()
status = _demo.run(Path(sys.argv[1]), Path(sys.argv[2]), steps=3)
assert torch.equal(state, torch.get_rng_state())
sys.exit(status)
"""


@pytest.fixture
def error(capsys):
    """Run the demo, which must fail: the one line on stderr."""

    def run(image, out):
        assert _demo.run(image, out, steps=1) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def gradient(mode="L", size=(101, 75)):
    return Image.linear_gradient("L").resize(size).convert(mode)


def test_packaged_photograph():
    photograph = _demo._read(None)
    assert photograph.mode == "RGB"
    assert max(photograph.size) == _demo.MAX_SIDE


def test_whole_demo(tmp_path):
    gradient().save(tmp_path / "grey.png")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other are slow beside other tests
    command = [sys.executable, "-c", WHOLE_DEMO, tmp_path / "grey.png", tmp_path / "new" / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("Nearest", "Bilinear", "CARAFE", "DLU"):
        assert f"\n{name} " in done.stdout
    assert "Means over the whole image, on edges" in done.stdout
    for name in ("dlu_demo.png", "kernels.png"):
        path = tmp_path / "new" / "out" / name
        assert str(path) in done.stdout
        with Image.open(path) as sheet:
            sheet.load()
            assert sheet.width == _demo.WIDTH * _demo.DPI
            assert sheet.height > sheet.width / 2


def result(picture, name="DLU"):
    return _demo._Result(name, picture, 30.0, 1000, 1.5)


def test_details_are_where_results_differ_most():
    """The largest difference in the first box, the next in the second, which does not overlap it."""
    pixels = np.full((120, 160, 3), 128, dtype=np.uint8)
    other = pixels.copy()
    other[20:30, 100:110] += 90
    other[90:100, 20:30] += 60
    other[60, 80] += 60
    boxes = _demo._telling_boxes([result(Image.fromarray(each)) for each in (pixels, pixels, other)])
    (first, second), side = boxes, _demo.DETAIL
    for (left, top, right, bottom), (x, y) in zip(boxes, ((100, 20), (20, 90)), strict=True):
        assert (right - left, bottom - top) == (side, side)
        assert left <= x < x + 10 <= right
        assert top <= y < y + 10 <= bottom
    assert max(first[0], second[0]) >= min(first[2], second[2]) or max(first[1], second[1]) >= min(first[3], second[3])
    small = [each.resize((64, 64)) for each in (Image.fromarray(pixels), Image.fromarray(other))]
    for left, top, right, bottom in _demo._telling_boxes([result(each) for each in small]):
        assert 0 <= left < right <= 64
        assert 0 <= top < bottom <= 64


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (100, 72)])
def test_sheet_says_what_was_measured(size):
    """Errors are those of the crops that are shown, for pictures of any aspect."""
    original = gradient("RGB", size)
    noise = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    results = [result(Image.fromarray(np.asarray(original) // 2 + gain * noise), str(gain)) for gain in (0, 1, 2)]
    figure = _demo._sheet(original, original.resize((size[0] // 2, size[1] // 2)), original, results, "Caption.")
    figure.draw_without_rendering()
    head, *parts = figure.subfigs
    left, top, right, bottom = _demo._telling_boxes(results)[0]
    expected = []
    for each in results:
        error = np.abs(np.asarray(each.picture, dtype=float) - np.asarray(original, dtype=float))
        expected.append(f"mean {error[top:bottom, left:right].mean():.1f}")
    columns = len(results) + 2
    assert [axis.get_title() for axis in parts[0].axes[:columns]] == ["no network", "0", "1", "2", "original"]
    assert [axis.get_xlabel() for axis in parts[0].axes[columns : 2 * columns - 1]] == ["mean 0.0", *expected]
    texts = [text.get_text() for text in head.axes[2].texts]
    assert texts[:4] == ["upsampler", "PSNR, dB", "parameters", "ms"]
    assert texts[-4:] == ["2", "30.00", "1,000", "1.5"]


# ---------------------------------------------------------------------------------------------------------------
# What a module has learned
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def learned():
    """Of a module with random weights, its features and its output."""
    torch.manual_seed(0)
    module = dlu_triton.DLUPack(6, 2, compressed_channels=8)
    with torch.no_grad():
        module.kernel_space_generator.weight.normal_(std=0.3)
        module.conv_offset.weight.normal_(std=0.2)
        features = torch.randn(1, 6, 12, 14)
        output = module(features)
    pixels = torch.rand(1, 3, 12, 14)
    return _learned.look(module, features, pixels, pixels.flip(3)), features, output


def test_kernels_shown_are_those_that_the_module_reassembles_with(learned):
    found, features, output = learned
    masks = F.pixel_shuffle(found.sampled.transpose(0, 1).flatten(0, 1)[None], 2)
    torch.testing.assert_close(dlu_triton.carafe(features, masks, 5, 1, 2), output)
    assert found.pixels.shape == found.scene.shape == (3, 12, 14)


def test_arrows_end_where_kernels_are_sampled(learned):
    """By hand: the kernel of an output is a bilinear sample of the kernel space at its offset."""
    found, *_ = learned
    y, x = 5, 7
    for output in range(4):
        dx, dy = found.offsets[output, :, y, x].tolist()
        column, row = min(max(x + dx, 0), 13), min(max(y + dy, 0), 11)
        left, top = min(int(column), 12), min(int(row), 10)
        fx, fy = column - left, row - top
        above = (1 - fx) * found.kernels[:, top, left] + fx * found.kernels[:, top, left + 1]
        below = (1 - fx) * found.kernels[:, top + 1, left] + fx * found.kernels[:, top + 1, left + 1]
        torch.testing.assert_close(found.sampled[output, :, y, x], (1 - fy) * above + fy * below)


def made(scene=None, height=40, width=60):
    """Kernels of one tap, and no offsets."""
    kernels = F.one_hot(torch.tensor(12), 25).float()[:, None, None].repeat(1, height, width)
    scene = torch.zeros(3, height, width) if scene is None else scene
    return _learned.Learned(scene, scene, kernels, torch.zeros(4, 2, height, width), kernels.repeat(4, 1, 1, 1))


def test_measures_by_hand():
    found = made()
    found.kernels[:, 0, 1] = 1 / 25
    found.offsets[:, :, 0, 2] = torch.tensor([[3.0, 4.0], [0, 0], [0, -1], [0, 2]])
    found.sampled[1, :, 0, 3] = F.one_hot(torch.tensor(3), 25).float()
    entropy, lengths, change = found.entropy(), found.lengths(), found.change()
    assert entropy[0, 1].item() == pytest.approx(math.log2(25))
    assert entropy.sum().item() == pytest.approx(math.log2(25))
    assert (lengths[0, 2].item(), lengths.sum().item()) == (2, 2)
    assert change[0, 3].item() == pytest.approx(0.25)
    assert change.sum().item() == pytest.approx(0.25 + 24 / 25)


def step(edge=30):
    """A step beside noise whose gradients are stronger, and a square that is flat."""
    scene = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)) * 0.1
    scene[:, :, edge:] += 0.9
    scene[:, 8:20, 5:17] += 0.45 * torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    scene[:, 20:32, 40:52] = 0.95
    return scene


@pytest.mark.parametrize("transposed", (False, True))
def test_pixels_shown_are_found_by_rule(transposed):
    """That of the edge lies at the step, that of the flat region in what is flat as far as it is shown."""
    scene = step().transpose(1, 2).contiguous() if transposed else step()
    found = made(scene, *scene.shape[1:])
    row, column = divmod(int(found.gradient().norm(dim=0).argmax()), scene.shape[2])
    assert (row if transposed else column) < 20, "no noise to be misled by"
    (edge_y, edge_x), (flat_y, flat_x) = found.edge_pixel(), found.flat_pixel()
    if transposed:
        edge_x, flat_y, flat_x = edge_y, flat_x, flat_y
    assert edge_x in (29, 30)
    assert 20 <= flat_y - _learned.REACH < flat_y + _learned.REACH < 32
    assert 40 <= flat_x - _learned.REACH < flat_x + _learned.REACH < 52
    height, width = scene.shape[1:]
    for row, column in (found.edge_pixel(), found.flat_pixel()):
        assert _learned.REACH <= row < height - _learned.REACH
        assert _learned.REACH <= column < width - _learned.REACH


def test_gradient_is_that_of_a_ramp():
    ramp = (0.02 * torch.arange(60) + 0.01 * torch.arange(40)[:, None]).expand(3, 40, 60)
    gradient = made(ramp).gradient()[:, 1:-1, 1:-1]
    torch.testing.assert_close(gradient, torch.tensor([0.02, 0.01])[:, None, None].expand_as(gradient))


def test_figures_are_means_over_edges_and_flat_pixels():
    scene = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    found = made(scene)
    edges, flat = found.edges(), found.flat()
    assert edges.sum().item() == flat.sum().item() == 240
    strength = found.gradient().norm(dim=0)
    assert strength[edges].min() > strength[~edges].max()
    assert strength[flat].max() < strength[~flat].min()
    found.offsets[:, 0, edges], found.offsets[:, 1, flat] = 5, 0.5
    found.kernels[:, flat] = 1 / 25
    assert found.figures()["offset"] == pytest.approx({"edges": 5, "flat": 0.5, "all": 0.55})
    expected = {"edges": 0, "flat": math.log2(25), "all": math.log2(25) / 10}
    assert found.figures()["entropy"] == pytest.approx(expected)
    said = _learned.caption(found)
    assert "offsets 5.00 and 0.50 source pixels long; entropy of the kernels 0.00 and 4.64 bits, of 4.64" in said
    assert "moves to other taps 0.0% and 96.0%" in said
    assert "small" not in said
    assert "hardly" not in said


def test_caption_says_when_little_was_learned():
    found = made()
    said = "The offsets stayed small, below 0.1 in each mean. Sampling hardly changes the kernels."
    assert _learned.caption(found).endswith(said)
    found.offsets += 1
    assert _learned.caption(found).endswith("and 0.0%. Sampling hardly changes the kernels.")


def test_picture_shows_the_pixels_found():
    found = made(step().clamp(0, 1))
    found.offsets = 3 * torch.randn(4, 2, 40, 60, generator=torch.Generator().manual_seed(0))
    found.kernels = torch.rand(25, 40, 60, generator=torch.Generator().manual_seed(1)).softmax(0)
    found.sampled = torch.rand(4, 25, 40, 60, generator=torch.Generator().manual_seed(2)).softmax(1)
    figure = _learned.picture(found, "Title")
    figure.draw_without_rendering()
    whole, *parts = figure.subfigs
    np.testing.assert_array_equal(whole.axes[1].images[0].get_array(), found.lengths().numpy())
    np.testing.assert_array_equal(whole.axes[2].images[0].get_array(), found.entropy().numpy())
    limits = {part.axes[2].get_xlim() for part in parts}
    assert len(limits) == 1, "arrows of different scales"
    for part, (row, column) in zip(parts, (found.edge_pixel(), found.flat_pixel()), strict=True):
        np.testing.assert_array_equal(part.axes[1].images[0].get_array(), found.kernels[:, row, column].view(5, 5))
        ends = [text.xy for text in part.axes[2].texts if text.get_text()]
        np.testing.assert_allclose(ends, found.offsets[:, :, row, column])
        assert np.abs(ends).max() < max(limits)[1]
        insets = part.axes[3].child_axes
        assert [inset.get_position().x0 > 0.87 for inset in insets] == [False, True, False, True]
        for inset, taps in zip(insets, found.sampled[:, :, row, column], strict=True):
            np.testing.assert_array_equal(inset.images[0].get_array(), taps.view(5, 5))


# ---------------------------------------------------------------------------------------------------------------
# Pictures that a user gives, and mistakes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_modes(mode, tmp_path):
    picture = gradient("I").convert(mode) if mode == "I;16" else gradient(mode)
    picture.save(tmp_path / "picture.tiff")
    picture = _demo._read(tmp_path / "picture.tiff")
    assert picture.mode == "RGB"
    assert picture.size == (100, 72)
    assert picture.getpixel((50, 0))[0] < 64 < 192 < picture.getpixel((50, 71))[0]


def test_transparent_palette(tmp_path):
    picture = gradient("P", size=(100, 72))
    picture.save(tmp_path / "picture.png", transparency=picture.getpixel((0, 0)))
    assert _demo._read(tmp_path / "picture.png").getpixel((0, 0)) == (255, 255, 255)


def test_values_that_are_not_finite(tmp_path, recwarn):
    """As in maps of depths; they are taken for zero."""
    values = np.linspace(0, 1, 100, dtype=np.float32) * np.ones((72, 1), np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "picture.tiff")
    picture = _demo._read(tmp_path / "picture.tiff")
    assert [picture.getpixel((x, 0))[0] for x in (0, 1, 2, 99)] == [0, 0, 0, 255]
    assert not recwarn.list


def test_pictures_that_pillow_warns_of_are_refused(error, monkeypatch, tmp_path, recwarn):
    """Those beyond twice as many pixels it refuses itself."""
    gradient(size=(100, 100)).save(tmp_path / "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert _demo._read(tmp_path / "picture.png").size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    said = error(tmp_path / "picture.png", tmp_path / "out")
    assert "Image size (10000 pixels) exceeds limit of 9999 pixels, could be decompression bomb" in said
    assert not recwarn.list


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(picture):
    """A file in IPTC's newsphoto format, which holds another: layers, width, height, compression and it."""
    side = (100).to_bytes(4, "big")
    fields = ((3, 60, b"\1\0"), (3, 20, side), (3, 30, side), (3, 120, b"\5"), (8, 10, picture))
    return b"".join(b"\x1c" + bytes(tag) + len(value).to_bytes(2, "big") + value for *tag, value in fields)


@pytest.mark.parametrize("content", [EPS, iptc(EPS)], ids=("EPS", "EPS in IPTC"))
def test_no_other_program_is_started(content, error, monkeypatch, tmp_path):
    (tmp_path / "picture.png").write_bytes(content)
    plugin = pytest.importorskip("PIL.EpsImagePlugin")

    class Started(BaseException):
        pass

    def start(*arguments):
        raise Started

    monkeypatch.setattr(plugin, "Ghostscript", start)
    # As Pillow does it by itself; old ones fail in files of IPTC before.
    with pytest.raises((Started, TypeError)), Image.open(tmp_path / "picture.png") as picture:
        picture.load()
    assert "not a picture in a format that the demo reads" in error(tmp_path / "picture.png", tmp_path / "out")


def test_formats():
    """Every one but those that the oldest Pillow allowed does not have."""
    Image.init()
    assert set(_demo.FORMATS) - set(Image.OPEN) <= {"AVIF"}
    assert not {"EPS", "IPTC"} & set(_demo.FORMATS)


def test_rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    gradient().save(tmp_path / "picture.jpg", exif=exif)
    assert _demo._read(tmp_path / "picture.jpg").size == (72, 100)


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (64, 64)), ((2000, 1001), (512, 256)), ((3000, 66), (132, 64))]
)
def test_sizes(size, expected):
    assert _demo._fit(gradient(size=size)).size == expected


def test_missing_file(error, tmp_path):
    assert "nothing.png" in error(tmp_path / "nothing.png", tmp_path / "out")
    assert "cannot read" in error(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_a_picture(error, tmp_path):
    (tmp_path / "text.png").write_text("not a picture\n")
    assert "not a picture" in error(tmp_path / "text.png", tmp_path / "out")


def test_broken_picture(error, tmp_path):
    gradient().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "part.png").write_bytes(whole[: len(whole) // 2])
    assert "part.png" in error(tmp_path / "part.png", tmp_path / "out")


def test_too_small(error, tmp_path):
    gradient(size=(500, 63)).save(tmp_path / "small.png")
    assert "500 x 63" in error(tmp_path / "small.png", tmp_path / "out")


def test_out_is_a_file(error, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in error(None, tmp_path / "file")
    assert "cannot write" in error(None, tmp_path / "file" / "out")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device is full")
def test_the_disk_is_full(monkeypatch, capsys, tmp_path):
    gradient(size=(64, 64)).save(tmp_path / "picture.png")
    (tmp_path / _demo.RESULT).symlink_to("/dev/full")
    monkeypatch.setattr(_demo, "METHODS", {name: _demo.METHODS[name] for name in ("Nearest", "Bilinear")})
    assert _demo.run(tmp_path / "picture.png", tmp_path, steps=4) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"dlu_triton demo: error: cannot write {tmp_path / _demo.RESULT}: ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_out_is_read_only(error, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot write" in error(None, tmp_path)


@pytest.mark.parametrize("missing", ["PIL", "matplotlib.figure", "tqdm"])
def test_missing_extra(missing, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("dlu_triton._bare_demo", _demo.__file__)
    bare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, bare)
    spec.loader.exec_module(bare)
    assert bare.run(None, tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert 'pip install "dlu-triton[demo]"' in captured.err
