"""The demo of the explanations: its images, the saved network, the whole command, its verdicts, a user's mistakes."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from dlu_triton import _explain_demo  # noqa: E402

MEASURES = ("hit", "energy", "sensitivity", "conservation")
METHODS = ("XGrad-CAM", "Grad-CAM", "Grad-CAM++", "HiResCAM", "LayerCAM", "Ablation-CAM", "Random map")
WHOLE_DEMO = """
import sys
from pathlib import Path
import torch
from dlu_triton import _explain_demo
state = torch.get_rng_state()
status = _explain_demo.run(Path(sys.argv[1]), steps=2, images=5)
assert torch.equal(state, torch.get_rng_state())
sys.exit(status)
"""


@pytest.fixture(scope="module")
def training():
    return _explain_demo._Source(test=False)


@pytest.fixture(scope="module")
def test():
    return _explain_demo._Source(test=True)


@pytest.fixture
def error(capsys):
    """Run the demo, which must fail: the one line on stderr."""

    def run(out):
        assert _explain_demo.run(out, steps=1, images=2) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("dlu_triton explain: error: ")
        return message

    return run


def draw(source, count=100, seed=5):
    return source.draw(count, torch.Generator().manual_seed(seed))


def bare(source, ink=None):
    """The source without photographs, and with the given ink."""
    other = object.__new__(type(source))
    other.__dict__ = source.__dict__ | {"photographs": torch.zeros_like(source.photographs)}
    if ink is not None:
        other.ink = ink
    return other


def inside(boxes):
    """(N, 2, 4) -> (N, 2, SIDE, SIDE) bool"""
    steps = torch.arange(_explain_demo.SIDE)
    left, top, right, bottom = boxes[..., None].unbind(2)
    across, down = (steps >= left) & (steps < right), (steps >= top) & (steps < bottom)
    return down[..., :, None] & across[..., None, :]


def test_boxes_are_exact(training):
    images = draw(bare(training))
    ink = images.pixels.amax(1) > 0
    within = inside(images.boxes)
    assert not within.all(1).any(), "boxes overlap"
    assert torch.equal(ink & within.any(1), ink), "ink outside of the boxes"
    for image, boxes in zip(ink, images.boxes.tolist(), strict=True):
        for left, top, right, bottom in boxes:
            box = image[top:bottom, left:right]
            assert box[0].any()
            assert box[-1].any()
            assert box[:, 0].any()
            assert box[:, -1].any()


def test_boxes_are_those_of_the_classes(training):
    """Ink as strong as its class tells which digit lies in which box."""
    ink = torch.where(training.ink > 0, (training.labels + 1)[:, None, None] / 10, 0)
    images = draw(bare(training, ink))
    seen = (images.pixels[:, None] * inside(images.boxes)[:, :, None]).amax((2, 3, 4))
    torch.testing.assert_close(seen, (images.classes + 1) / 10)
    assert (images.classes[:, 0] != images.classes[:, 1]).all()
    assert images.classes.unique().tolist() == list(range(10))


def test_images_are_pictures(test):
    pixels = draw(test).pixels
    assert pixels.shape == (100, 3, 64, 64)
    assert 0 <= pixels.min() < 0.1 < 0.9 < pixels.max() <= 1


def test_nothing_of_the_test_is_in_the_training(training, test):
    assert len(training.indices) + len(test.indices) == 1797
    assert not set(training.indices.tolist()) & set(test.indices.tolist())
    assert len(training.photographs) == 2
    assert len(test.photographs) == 1
    size = [min(one, other) for one, other in zip(training.photographs.shape, test.photographs.shape, strict=True)][2:]
    for photograph in training.photographs:
        difference = photograph[:, : size[0], : size[1]] - test.photographs[0, :, : size[0], : size[1]]
        assert difference.abs().mean() > 0.05


def test_images_are_seeded(test):
    state = torch.get_rng_state()
    one, same, other = draw(test), draw(_explain_demo._Source(test=True)), draw(test, seed=6)
    assert torch.equal(state, torch.get_rng_state())
    for name in ("pixels", "classes", "boxes"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_training_learns():
    """One batch over and over: the loss falls, so the gradients reach the layers and the labels their logits."""
    network = _explain_demo._Network()
    images = draw(_explain_demo._Source(test=False), 8)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        _explain_demo._loss(network, images).backward()
        optimizer.step()
    assert _explain_demo._accuracy(network, images) > 0.9


def test_saved_network_is_used(tmp_path, capsys):
    path, cpu = tmp_path / "network.pt", torch.device("cpu")

    def get(steps):
        network = _explain_demo._network(path, cpu, steps)
        return network.state_dict()["logits.bias"].clone(), capsys.readouterr().out

    first, said = get(2)
    assert "there is no" in said
    second, said = get(2)
    assert "earlier run" in said
    assert torch.equal(first, second)
    saved = torch.load(path, weights_only=True)
    saved["state"]["logits.bias"] += 1
    torch.save(saved, path)
    assert torch.equal(get(2)[0], first + 1), "the file was not read"

    third, said = get(3)
    assert "settings" in said
    assert not torch.equal(third, first + 1)
    path.write_bytes(path.read_bytes()[:1000])
    fourth, said = get(3)
    assert "cannot be read" in said
    torch.testing.assert_close(third, fourth)
    assert "earlier run" in get(3)[1]


def test_whole_demo(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other are slow beside other tests
    out = tmp_path / "new" / "out"
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_DEMO, out], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "explain.json").read_text())
    assert list(figures["methods"]) == list(METHODS)
    for method, values in figures["methods"].items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{method}   ")]
        cells = [f"{values[key]:.3f}" if key in values else "-" for key in MEASURES]
        milliseconds = values["milliseconds_per_image"]
        assert line.removeprefix(method).split() == [*cells, "-" if milliseconds is None else f"{milliseconds:.3g}"]
        random = method == "Random map"
        assert ("sensitivity" in values) != random
        assert (milliseconds is not None and milliseconds > 0) != random
    xgradcam, hirescam, gradcam = (figures["methods"][name] for name in ("XGrad-CAM", "HiResCAM", "Grad-CAM"))
    for key in MEASURES[2:]:  # the same channels' shares: the same errors
        assert xgradcam[key] == pytest.approx(hirescam[key], rel=1e-3)
        assert gradcam[key] != pytest.approx(xgradcam[key], rel=1e-3)
    assert xgradcam["conservation"] < xgradcam["sensitivity"]  # two steps leave the biases small
    assert ("The score is negative" in done.stdout) == (figures["negative_scores"] > 0)
    assert figures["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", figures["commit"])
    assert figures["images"] == 5
    assert figures["settings"]["steps"] == 2
    assert f"{figures['test_accuracy']:.1%}" in done.stdout
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["device"] in " ".join(done.stdout.split())
    for key in MEASURES:
        assert _explain_demo._sentence(figures["against XGrad-CAM"][key], _explain_demo.MEASURES[key]) in " ".join(
            done.stdout.split()
        )
    assert str(out / "explain.png") in done.stdout
    with Image.open(out / "explain.png") as sheet:
        sheet.load()
        assert min(sheet.size) > 1000


def test_ties():
    """Verdicts on made-up results whose verdict is known."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200, 2, generator=generator, dtype=torch.float64)
    reference = 1 + noise[0].abs()  # varies much from image to image
    values = {
        "XGrad-CAM": reference,
        "same": reference.clone(),
        "too close to print": reference + 1e-5,
        "as good": reference + 0.1 * noise[1],
        "a little more": reference + 0.05,  # far below the variation of either, but always
        "less": reference - 0.2 + 0.1 * noise[1],
    }
    higher, lower = _explain_demo.MEASURES["energy"], _explain_demo.MEASURES["sensitivity"]
    verdicts = _explain_demo._compare(values, higher)
    assert verdicts == {
        "same": "tie",
        "too close to print": "tie",
        "as good": "tie",
        "a little more": "better",
        "less": "worse",
    }
    assert _explain_demo._compare(values, lower) == verdicts | {"a little more": "worse", "less": "better"}
    assert _explain_demo._sentence(verdicts, higher) == (
        "Energy in box: same, too close to print and as good tie with XGrad-CAM; a little more is better; "
        "less is worse."
    )
    assert _explain_demo._sentence({"A": "worse", "B": "worse"}, lower) == (
        "Sensitivity error: nothing ties with XGrad-CAM; A and B are worse."
    )


@pytest.mark.parametrize(("hits", "verdict"), [(0, "tie"), (3, "tie"), (30, "worse")])
def test_ties_of_hits(hits, verdict):
    """100 images: the other method misses `hits` digits more; three of 200 may be chance."""
    reference = torch.ones(100, 2, dtype=torch.float64)
    other = reference.clone()
    other[:hits, 0] = 0
    verdicts = _explain_demo._compare({"XGrad-CAM": reference, "other": other}, _explain_demo.MEASURES["hit"])
    assert verdicts == {"other": verdict}


def test_images_are_resampled_whole():
    """Two maps of an image that gain together are one observation: 3 of 100 images may be chance, 6 of 200 not."""
    reference = torch.zeros(100, 2, dtype=torch.float64)
    together = reference.clone()
    together[:3] = 1
    verdicts = _explain_demo._compare({"XGrad-CAM": reference, "other": together}, _explain_demo.MEASURES["energy"])
    assert verdicts == {"other": "tie"}


def test_sheet_marks_hits_and_misses(test):
    images = draw(test, 2)
    right, wrong = inside(images.boxes).float(), inside(images.boxes.flip(1)).float()
    results = {
        name: _explain_demo._Result(maps, _explain_demo._located(maps, images), {}, None, 0)
        for name, maps in (("right", right), ("wrong", wrong), ("empty", torch.zeros_like(right)))
    }
    results["right"].values["sensitivity"] = torch.tensor([[0.1, 0.2], [0.3, 9]], dtype=torch.float64)
    figure = _explain_demo._sheet(images, results, "What it shows.")
    figure.draw_without_rendering()
    axes = figure.axes
    assert len(axes) == 5 * 4
    assert [axis.get_title() for axis in axes[:4]] == ["test image", "right", "wrong", "empty"]
    classes = images.classes.flatten().tolist()
    for row in range(4):
        image, hit, miss, empty = axes[4 * row : 4 * row + 4]
        assert str(classes[row]) in image.get_ylabel()
        assert hit.get_xlabel() == "hit, 100%"
        assert miss.get_xlabel() == "MISS, 0%"
        assert empty.get_xlabel() == "empty map"
        left, top, right_end, bottom = images.boxes.flatten(0, 1)[row].tolist()
        (cross,) = hit.lines
        (x,), (y,) = cross.get_data()
        assert left <= x < right_end
        assert top <= y < bottom
        highlighted = max(image.patches, key=lambda patch: patch.get_linewidth())
        assert highlighted.get_bbox().bounds == (left - 0.5, top - 0.5, right_end - left, bottom - top)
    columns = [[text.get_text() for text in axis.texts] for axis in axes[16:]]
    assert columns[0][:2] == ["all 2 images", "pointing hit ↑"]
    assert columns[1] == ["100.0%", "100.0%", "0.250", "-"]
    assert columns[2] == ["0.0%", "0.0%", "-", "-"]
    texts = [text.get_text() for text in figure.texts]
    assert "What it shows." in texts
    assert any("3 class activation maps" in text for text in texts)


def test_out_is_a_file(error, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in error(tmp_path / "file")
    assert "cannot write" in error(tmp_path / "file" / "out")


def test_network_cannot_be_written(error, tmp_path):
    (tmp_path / _explain_demo.NETWORK).mkdir()
    assert "cannot write" in error(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device is full")
def test_the_disk_is_full(error, tmp_path):
    (tmp_path / _explain_demo.NETWORK).symlink_to("/dev/full")
    assert f"cannot write {tmp_path / _explain_demo.NETWORK}: " in error(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_out_is_read_only(error, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot write" in error(tmp_path)


@pytest.mark.parametrize("missing", ["PIL", "matplotlib.figure", "sklearn.datasets", "tqdm"])
def test_missing_extra(missing, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("dlu_triton._bare_explain_demo", _explain_demo.__file__)
    bare_demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, bare_demo)
    spec.loader.exec_module(bare_demo)
    assert bare_demo.run(tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert 'pip install "dlu-triton[explain]"' in captured.err
    assert not (tmp_path / "out").exists()
