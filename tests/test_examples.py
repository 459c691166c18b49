"""The examples for torchvision, Ultralytics and SegFormer's head; `test_train_upsampler.py` has the one that trains."""

import copy
import importlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import dlu_triton
from dlu_triton import _launch

EXAMPLES = Path(__file__).parents[1] / "examples"
LEARNED = ("carafe", "dlu")
METHODS = ("nearest", "bilinear", *LEARNED)


def needs(package):
    """Skip without it, or beside another build of PyTorch than it is for, where torchvision cannot be imported."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package}: {error}")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """CPU tensors take the eager path here, as they do for a user; one thread, as others wait for each other."""
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scenes():
    return importlib.import_module("scenes")


@pytest.fixture
def fpn():
    needs("torchvision")
    return importlib.import_module("torchvision_fpn")


@pytest.fixture
def segformer():
    return importlib.import_module("segformer_head")


@pytest.fixture(scope="session")
def ultralytics_settings(tmp_path_factory):
    return tmp_path_factory.mktemp("ultralytics")


@pytest.fixture
def yolo(ultralytics_settings, monkeypatch):
    """The example, with Ultralytics offline and its layers registered."""
    if importlib.util.find_spec("ultralytics") is None:  # which must not be imported before it is told to be offline
        pytest.skip("ultralytics is not installed")
    needs("torchvision")
    module = importlib.import_module("ultralytics_dlu")
    for name in ("YOLO_OFFLINE", "YOLO_AUTOINSTALL", "YOLO_CONFIG_DIR"):
        monkeypatch.setenv(name, "")  # so that they are what they were afterwards
    module.offline(ultralytics_settings)
    module.register()
    return module


def reach(module, outputs):
    """Random upstream gradients reach every parameter."""
    torch.autograd.backward(list(outputs), [torch.randn_like(each) for each in outputs])
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def table(printed):
    """The rows that a program prints: name -> numbers."""
    rows = (line.replace(",", "").split() for line in printed.splitlines())
    return {
        row[0]: [float(cell) for cell in row[1:]]
        for row in rows
        if row[0:1] and row[0] in ("nearest", "bilinear", *LEARNED)
    }


# ---------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", (False, True))
def test_boxes_labels_and_masks_agree(scenes, held_out):
    source, generator = scenes.Scenes(held_out=held_out), torch.Generator().manual_seed(0)
    counts = set()
    for _ in range(20):
        scene = source.draw(75, 101, generator)
        assert scene.pixels.shape == (3, 75, 101)
        assert 0 <= scene.pixels.min() < scene.pixels.max() <= 1
        assert scene.boxes.shape == (len(scene.labels), 4)
        counts.add(len(scene.labels))
        rest = scene.mask.clone()
        for box, label in zip(scene.boxes.long().tolist(), scene.labels.tolist(), strict=True):
            x0, y0, x1, y1 = box
            inside = scene.mask[y0:y1, x0:x1]
            assert set(inside.unique().tolist()) <= {0, 1 + label}
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):  # the box is tight
                assert (edge == 1 + label).any()
            rest[y0:y1, x0:x1] = 0
        assert not rest.any()
    assert len(counts) > 2


def test_held_out_material_is_not_trained_on(scenes):
    ours, theirs = scenes.Scenes(held_out=False), scenes.Scenes(held_out=True)
    assert len(ours.digits) + len(theirs.digits) == 1797  # all of scikit-learn's
    alike = (ours.digits[:, None] == theirs.digits[None]).flatten(2).all(2)
    assert not alike.any()
    assert len(ours.photographs) == len(theirs.photographs) == 4
    assert not any(torch.equal(one, other) for one in ours.photographs for other in theirs.photographs)


# ---------------------------------------------------------------------------------------------------------------
# torchvision
# ---------------------------------------------------------------------------------------------------------------

WIDTHS = [8, 12, 16, 20]


def maps(*sizes):
    return OrderedDict(
        (str(level), torch.randn(2, width, *size, requires_grad=True))
        for level, (width, size) in enumerate(zip(WIDTHS, sizes, strict=True))
    )


ODD = ((25, 34), (13, 17), (7, 9), (4, 5))


@pytest.mark.parametrize("sizes", (ODD, ((1, 23), (1, 12), (1, 6), (1, 3)), ((32, 48), (16, 24), (8, 12), (4, 6))))
@pytest.mark.parametrize("extra", (None, "LastLevelMaxPool", "LastLevelP6P7"))
def test_nearest_is_torchvisions_pyramid(fpn, extra, sizes):
    from torchvision.ops import feature_pyramid_network as original

    arguments = {"LastLevelP6P7": (20, 16)}.get(extra, ())
    blocks = [getattr(original, extra)(*arguments) if extra else None for _ in range(2)]
    theirs = original.FeaturePyramidNetwork(WIDTHS, 16, blocks[0])
    ours = fpn.UpsamplingFPN(WIDTHS, 16, blocks[1], upsampler="nearest")
    ours.load_state_dict(theirs.state_dict())
    x = maps(*sizes)
    expected, found = theirs(x), ours(x)
    assert list(found) == list(expected)
    upstream = [torch.randn_like(each) for each in expected.values()]
    gradients = [
        torch.autograd.grad(list(outputs.values()), [*x.values(), *module.parameters()], upstream)
        for outputs, module in ((expected, theirs), (found, ours))
    ]
    for one, other in zip([*expected.values(), *gradients[0]], [*found.values(), *gradients[1]], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("upsampler", LEARNED)
def test_pyramid_adds_what_the_upsamplers_make(fpn, upsampler):
    pyramid = fpn.UpsamplingFPN(WIDTHS, 16, upsampler=upsampler, compressed_channels=8, up_kernel=3).double()
    for parameter in pyramid.upsamplers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # offsets and kernels that differ from place to place
    x = OrderedDict((name, each.detach().double()) for name, each in maps(*ODD).items())
    found = pyramid(x)
    assert [tuple(each.shape) for each in found.values()] == [(2, 16, *size) for size in ODD]
    merged = pyramid.inner_blocks[3](x["3"])
    for level in (2, 1, 0):
        height, width = ODD[level]
        merged = pyramid.inner_blocks[level](x[str(level)]) + pyramid.upsamplers[level](merged)[:, :, :height, :width]
        torch.testing.assert_close(found[str(level)], pyramid.layer_blocks[level](merged))


@pytest.mark.parametrize("upsampler", LEARNED)
def test_gradients_reach_every_weight_of_the_pyramid(fpn, upsampler):
    pyramid = fpn.UpsamplingFPN(WIDTHS, 16, upsampler=upsampler)
    x = maps(*ODD)
    reach(pyramid, pyramid(x).values())
    assert all(each.grad.abs().max() > 0 for each in x.values())


def test_pyramid_is_one_graph(fpn):
    pyramid = fpn.UpsamplingFPN([8, 12], 16, up_kernel=3)
    x = OrderedDict((("0", torch.randn(1, 8, 9, 11)), ("1", torch.randn(1, 12, 5, 6))))
    compiled = torch.compile(pyramid, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x).values(), pyramid(x).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_torchvisions_weights_load_into_the_pyramid(fpn):
    from torchvision.ops import FeaturePyramidNetwork

    theirs = FeaturePyramidNetwork(WIDTHS, 16, norm_layer=torch.nn.BatchNorm2d)
    ours = fpn.UpsamplingFPN(WIDTHS, 16, norm_layer=torch.nn.BatchNorm2d)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"upsamplers.{name}" for name in ours.upsamplers.state_dict()}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    old = {  # as torchvision named them once
        f"{part}.{level}.{name}": torch.randn_like(getattr(theirs, part)[level][0].weight)
        for part in ("inner_blocks", "layer_blocks")
        for level in range(4)
        for name in ("weight",)
    }
    ours.load_state_dict(dict(old), strict=False)
    assert torch.equal(ours.layer_blocks[2][0].weight, old["layer_blocks.2.weight"])


@pytest.mark.parametrize("name", ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn"))
def test_torchvisions_detectors_take_the_pyramid(fpn, name):
    from torchvision.models import detection

    build = getattr(detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=65, max_size=91, size_divisible=1)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = model.backbone.fpn
    assert fpn.replace_fpn(model, "dlu", compressed_channels=16, up_kernel=3) is model
    new = model.backbone.fpn
    assert isinstance(new, fpn.UpsamplingFPN)
    assert not any(module.training for module in model.modules())
    assert new.extra_blocks is old.extra_blocks
    assert all(module.compressed_channels == 16 for module in new.upsamplers)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name in after if name not in before} == {
        f"backbone.fpn.upsamplers.{name}" for name in new.upsamplers.state_dict()
    }
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.fpn.upsamplers.") for name in missing)
    with torch.no_grad():
        (found,) = model([torch.rand(3, 65, 91)])
    assert found["boxes"].shape == (len(found["scores"]), 4)
    fpn.replace_fpn(model.double(), "nearest")  # once more
    assert not list(model.backbone.fpn.upsamplers.parameters())
    fpn.replace_fpn(model.train(), "carafe")
    assert all(module.training for module in model.backbone.fpn.modules())
    assert {parameter.dtype for parameter in model.backbone.fpn.parameters()} == {torch.float64}


def test_mistakes_with_the_pyramid(fpn):
    from torchvision.ops import FeaturePyramidNetwork

    with pytest.raises(ValueError, match=r"upsampler must be one of nearest, carafe, dlu, got 'bilinear'"):
        fpn.UpsamplingFPN(WIDTHS, 16, upsampler="bilinear")
    pyramid = fpn.UpsamplingFPN(WIDTHS, 16)
    with pytest.raises(ValueError, match=r"half as large as the one before, rounded up, got .*\(7, 9\), \(7, 9\)"):
        pyramid(maps((25, 34), (13, 17), (7, 9), (7, 9)))
    with pytest.raises(TypeError, match=r"model.backbone.fpn must be a FeaturePyramidNetwork of torchvision, got"):
        fpn.replace_fpn(torch.nn.Sequential())

    class Other(FeaturePyramidNetwork):
        pass

    model = torch.nn.Module()
    model.backbone = torch.nn.Module()
    model.backbone.fpn = Other(WIDTHS, 16)
    with pytest.raises(TypeError, match="Other"):
        fpn.replace_fpn(model)


def test_average_precision_by_hand(fpn):
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    found = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [40, 40, 50, 50], [20, 20, 30, 26]])
    assert fpn.matched(found, boxes, 0.5).tolist() == [True, False, False, True]  # IoU 0.9, taken, 0, 0.6
    assert fpn.matched(found, boxes, 0.75).tolist() == [True, False, False, False]
    assert fpn.matched(found[:0], boxes, 0.5).tolist() == []
    # By score: right, wrong, right, wrong; 4 digits: a quarter at precision 1, one at 2/3.
    scores, hits = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([False, True, True, False])
    assert fpn.average_precision(scores, hits, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert fpn.average_precision(scores, ~hits, 2) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert fpn.average_precision(scores, torch.zeros(4, dtype=torch.bool), 4) == 0
    assert fpn.average_precision(scores[:0], hits[:0], 4) == 0
    # Wrong, then two right: either has the precision at full recall, which is the best there is.
    assert fpn.average_precision(scores[1:], torch.tensor([False, True, True]), 2) == pytest.approx(2 / 3)


def test_torchvision_program(fpn, capsys):
    assert fpn.main(["--steps", "2", "--images", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    rows = table(printed)
    assert list(rows) == ["nearest", "carafe", "dlu"]
    saved = dlu_triton.complexity(64, 2, compressed_channels=32)
    assert [row[0] for row in rows.values()] == [0, 3 * saved.carafe.parameters, 3 * saved.dlu.parameters]
    assert all(0 <= row[column] <= 1 for row in rows.values() for column in (1, 2))
    assert "2 held-out scenes" in printed
    losses = [float(each) for each in re.findall(r"step \d+: loss (\S+) ", printed)]
    assert len(losses) == 6
    assert all(0 < loss < 100 for loss in losses)


# ---------------------------------------------------------------------------------------------------------------
# SegFormer's head
# ---------------------------------------------------------------------------------------------------------------

LEVELS = ((25, 34), (13, 17), (7, 9), (4, 5))


def levels(dtype=torch.float32):
    return [torch.randn(2, width, *size, dtype=dtype) for width, size in zip(WIDTHS, LEVELS, strict=True)]


@pytest.mark.parametrize("upsampler", ("bilinear", *LEARNED))
def test_head_fuses_what_the_upsamplers_make(segformer, upsampler):
    head = segformer.SegFormerHead(WIDTHS, 8, 5, upsampler=upsampler).double().eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = levels(torch.float64)
    parts = []
    for level, features in enumerate(x):
        part = torch.einsum("nchw,dc->ndhw", features, head.projections[level].weight[:, :, 0, 0])
        part = part + head.projections[level].bias[:, None, None]
        if level and upsampler == "bilinear":
            part = F.interpolate(part, size=LEVELS[0], mode="bilinear")
        elif level:
            part = head.upsamplers[level - 1](part)[:, :, : LEVELS[0][0], : LEVELS[0][1]]
        parts.append(part)
    expected = head.classifier(head.fuse(torch.cat(parts, 1)))
    found = head(x)
    assert found.shape == (2, 5, *LEVELS[0])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("upsampler", ("bilinear", *LEARNED))
def test_gradients_reach_every_weight_of_the_head(segformer, upsampler):
    head = segformer.SegFormerHead(WIDTHS, 8, 5, upsampler=upsampler)
    reach(head, [head(levels())])
    assert [getattr(module, "scale_factor", None) for module in head.upsamplers] == (
        [None] * 3 if upsampler == "bilinear" else [2, 4, 8]
    )


def test_levels_at_other_scales(segformer):
    head = segformer.SegFormerHead([8, 12], 8, 5, scale_factors=[4])
    assert head([torch.randn(1, 8, 9, 13), torch.randn(1, 12, 3, 4)]).shape == (1, 5, 9, 13)


def test_mistakes_with_the_head(segformer):
    with pytest.raises(ValueError, match=r"upsampler must be one of bilinear, carafe, dlu, got 'nearest'"):
        segformer.SegFormerHead(WIDTHS, 8, 5, upsampler="nearest")
    with pytest.raises(ValueError, match=r"scale_factors must be one fewer than in_channels, 3, got \(2, 4\)"):
        segformer.SegFormerHead(WIDTHS, 8, 5, scale_factors=[2, 4])
    x = levels()
    x[2] = x[2][:, :, :-1]
    with pytest.raises(ValueError, match=r"4 times smaller than \(25, 34\), rounded up, got \(6, 9\)"):
        segformer.SegFormerHead(WIDTHS, 8, 5)(x)


def test_intersection_over_union_by_hand(segformer, scenes):
    """A network that takes every pixel for class 3: of the other classes that are there, nothing is found."""

    class Three(torch.nn.Module):
        def forward(self, pixels):
            return F.one_hot(torch.full(pixels[:, 0].shape, 3), 11).permute(0, 3, 1, 2)

    source, images = scenes.Scenes(held_out=True), 3
    generator = torch.Generator().manual_seed(segformer.HELD_OUT_SEED)
    pixels = torch.cat([segformer.draw(source, 1, generator)[1].flatten() for _ in range(images)]).bincount(
        minlength=11
    )
    share = pixels[3].item() / pixels.sum().item()
    assert share > 0
    present = pixels.count_nonzero().item()  # background among them
    assert present < 11  # what is nowhere does not count
    found = segformer.evaluate(Three(), source, images, torch.device("cpu"))
    assert found == pytest.approx((share / present, share / (present - 1)))


def test_segmentation_program(segformer, capsys):
    assert segformer.main(["--steps", "2", "--images", "2", "--device", "cpu"]) == 0
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["bilinear", "carafe", "dlu"]
    saved = [dlu_triton.complexity(32, scale, compressed_channels=16) for scale in (2, 4, 8)]
    upsamplers = [0, sum(each.carafe.parameters for each in saved), sum(each.dlu.parameters for each in saved)]
    assert [row[0] for row in rows.values()] == upsamplers
    assert [row[1] - row[0] for row in rows.values()] == [rows["bilinear"][1]] * 3
    assert all(0 <= row[column] <= 1 for row in rows.values() for column in (2, 3))


def test_same_first_weights(segformer):
    """What is not an upsampler starts the same."""
    networks = []
    for name in ("bilinear", "dlu"):
        torch.manual_seed(3)
        networks.append({key: value for key, value in segformer.Network(name).state_dict().items() if "ups" not in key})
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


# ---------------------------------------------------------------------------------------------------------------
# Ultralytics
# ---------------------------------------------------------------------------------------------------------------


def packs(model, kind=dlu_triton.DLUPack):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_yaml_builds_a_detector(yolo):
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(str(yolo.MODEL), verbose=False)
    assert [(module.channels, module.scale_factor) for module in packs(model)] == [(128, 2), (64, 2)]
    assert model.stride.tolist() == [4, 8, 16]
    assert model.yaml["head"][0][3] == ["c2", 2]  # as written, so that it can be built again
    for module in packs(model):
        assert not module.conv_offset.weight.any()  # Ultralytics has left the first weights alone
    model.train()
    outputs = model(torch.rand(2, 3, 96, 128))
    found = [each for each in outputs.values() if isinstance(each, torch.Tensor)]
    torch.autograd.backward(found, [torch.randn_like(each) for each in found])
    for module in packs(model):
        assert all(each.grad.abs().max() > 0 for each in module.parameters())


def test_copies_of_a_detector(yolo):
    """Ultralytics averages a deep copy, and its checkpoints are pickles of half precision."""
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.torch_utils import ModelEMA

    model = DetectionModel(str(yolo.MODEL), verbose=False)
    average = ModelEMA(model)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.01)
    average.update(model)
    assert not torch.equal(packs(average.ema)[0].conv_offset.weight, packs(model)[0].conv_offset.weight)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model).half())).float().eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(x)[0], model.half().float().eval()(x)[0])
        fused = copy.deepcopy(again).fuse(verbose=False)
        torch.testing.assert_close(fused(x)[0], again(x)[0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("layer", "kind"), (("DLU", dlu_triton.DLUPack), ("CARAFE", dlu_triton.CARAFEPack)))
def test_yamls_of_ultralytics(yolo, layer, kind, tmp_path):
    from ultralytics.nn.tasks import DetectionModel

    path = tmp_path / "yolo11n-dlu.yaml"
    assert yolo.write_yaml("yolo11n.yaml", path, layer) == 2
    ours, theirs = DetectionModel(str(path), verbose=False), DetectionModel("yolo11n.yaml", verbose=False)
    assert [module.channels for module in packs(ours, kind)] == [
        256,
        128,
    ]  # a quarter of what the YAML says, as it is n
    rest = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    for name in (f"model.{row}.{name}" for row in (11, 14) for name in kind(4, 2).state_dict()):
        del rest[name]
    assert rest == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert torch.equal(ours.stride, theirs.stride)


@pytest.mark.filterwarnings("ignore")  # tracing has much to say
@pytest.mark.parametrize("form", ("torchscript", "onnx"))
def test_exports_of_a_detector(yolo, form, tmp_path, monkeypatch):
    """By Ultralytics, which traces; for the size that it is traced with."""
    from ultralytics import YOLO

    if form == "onnx":
        pytest.importorskip("onnx")
        runtime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)  # where it writes
    model = YOLO(str(yolo.MODEL), task="detect")
    for module in packs(model.model):
        torch.nn.init.normal_(module.conv_offset.weight, std=0.3)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.model.eval()(x)[0]
    options = {"simplify": False} if form == "onnx" else {}  # which needs another package
    path = model.export(format=form, imgsz=(64, 96), device="cpu", **options)
    if form == "onnx":
        session = runtime.InferenceSession(path)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = torch.jit.load(path)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_mistakes_with_yamls(yolo, tmp_path):
    with pytest.raises(ValueError, match="layer must be one of DLU, CARAFE, got 'dlu'"):
        yolo.write_yaml("yolo11n.yaml", tmp_path / "a.yaml", "dlu")
    source = tmp_path / "b.yaml"
    text = yolo.MODEL.read_text().replace("[-1, 1, DLU, [c2, 2]]", '[4, 1, nn.Upsample, [None, 2, "nearest"]]')
    source.write_text(text)
    with pytest.raises(ValueError, match=r"rows of nn.Upsample must be .* got \[4, 1"):
        yolo.write_yaml(source, tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()


WHOLE = """
import socket, sys
attempts = []
def refuse(*arguments, **options):
    attempts.append(arguments)
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
import ultralytics_dlu
assert ultralytics_dlu.main(sys.argv[2:]) == 0
assert not attempts, attempts
"""


def test_ultralytics_program(yolo, tmp_path):
    out = tmp_path / "out"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    options = ["--epochs", "1", "--images", "17", "--held-out-images", "4", "--device", "cpu", "--out", out]
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, EXAMPLES, *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1 epochs of 17 scenes in \d+ s\. Of 4 held-out scenes: mAP50 [01]\.\d{3},", done.stdout)
    assert "2 layers of ours with 50,498 of " in done.stdout

    from ultralytics import YOLO
    from ultralytics.nn import tasks

    for name in yolo.LAYERS:  # a checkpoint needs no registration
        delattr(tasks, name)
    trained = YOLO(out / "training" / "weights" / "last.pt")
    assert all(module.conv_offset.weight.abs().max() > 0 for module in packs(trained.model))
    picture = out / "data" / "images" / "val" / "0000.png"
    (found,) = trained.predict(str(picture), imgsz=128, conf=0.001, device="cpu", verbose=False)
    assert found.orig_shape == yolo.SIZES[0]
    assert torch.isfinite(found.boxes.data).all()


# ---------------------------------------------------------------------------------------------------------------
# All programs
# ---------------------------------------------------------------------------------------------------------------

PROGRAMS = {"torchvision_fpn": "torchvision", "segformer_head": "torch", "ultralytics_dlu": "yaml"}


@pytest.fixture(params=PROGRAMS)
def program(request):
    needs(PROGRAMS[request.param])
    return importlib.import_module(request.param)


def test_help(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert program.__doc__.splitlines()[0] in " ".join(printed.split())


@pytest.mark.parametrize("option", ("--images=0", "--images=1.5", "--device"))
def test_wrong_options(program, option, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([option])
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_device_that_is_not_there(program, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.main(["--device", "nowhere"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{program.__name__}: error: cannot use --device nowhere: ")
    assert not list(tmp_path.iterdir())


def test_folder_that_is_not_empty(yolo, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert yolo.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "is not empty: choose another --out, or delete it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


NEEDED = [("torchvision_fpn", "torchvision.models"), ("segformer_head", "dlu_triton"), ("ultralytics_dlu", "yaml")]
ADVICE = {name: "pip install dlu-triton" for name, _ in NEEDED}
ADVICE["torchvision_fpn"] += " torchvision"
ADVICE["ultralytics_dlu"] += " ultralytics"


@pytest.mark.parametrize(("name", "missing"), NEEDED)
def test_imports_without_a_package(name, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location(f"_bare_{name}", EXAMPLES / f"{name}.py")
    with pytest.raises(ImportError, match=rf"{missing.split('.')[0]}\b.*; {ADVICE[name]}$") as raised:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert isinstance(raised.value.__cause__, ImportError)


RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.modules[sys.argv[3]] = None
sys.argv[:] = [f"{sys.argv[1]}/{sys.argv[2]}.py", "--device", "cpu"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "missing", "line"),
    [(name, missing, rf"{name}: error: .*{missing.split('.')[0]}\b.*; {ADVICE[name]}") for name, missing in NEEDED]
    + [
        ("ultralytics_dlu", "ultralytics", "ultralytics_dlu: error: there is no ultralytics; pip install ultralytics"),
        ("segformer_head", "skimage", r'train_upsampler: error: .*skimage.*; pip install "dlu-triton\[examples\]"'),
    ],
)
def test_programs_without_a_package(name, missing, line, tmp_path):
    if name == "ultralytics_dlu":
        needs("yaml")
    command = [sys.executable, "-c", RUN, EXAMPLES, name, missing]
    environment = {**os.environ, "PYTHONPATH": str(Path(dlu_triton.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    said = [each for each in done.stderr.splitlines() if not each.startswith("W")]  # warnings, of torch
    assert len(said) == 1, done.stderr
    assert re.fullmatch(line, said[0])
    assert not list(tmp_path.iterdir())


def test_programs_that_are_stopped(program, capsys, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run" if program.__name__ == "ultralytics_dlu" else "compare", stopped)
    assert program.main(["--device", "cpu"]) == 130
    assert capsys.readouterr().err == f"{program.__name__}: stopped\n"


@pytest.mark.parametrize(("name", "package"), PROGRAMS.items())
def test_what_is_pasted_needs_nothing_of_the_program(name, package, monkeypatch):
    """Importing the file takes neither photographs nor digits, nor Ultralytics before it is used."""
    needs(package)
    for missing in ("scenes", "train_upsampler", "sklearn", "skimage", "ultralytics"):
        monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location(f"_bare_{name}", EXAMPLES / f"{name}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
