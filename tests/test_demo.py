"""The demo: the packaged photograph, the whole command on a small picture, and a user's mistakes."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")

from dlu_triton import _demo  # noqa: E402

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
    path = tmp_path / "new" / "out" / "dlu_demo.png"
    assert str(path) in done.stdout
    with Image.open(path) as sheet:
        sheet.load()
        assert sheet.width > 4 * _demo.MIN_CELL
        assert sheet.height > 4 * 72


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


@pytest.mark.parametrize("missing", ["PIL", "tqdm"])
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
