"""Maps of pytorch-grad-cam, torchcam and captum beside ours: what docs/migration.md says is equal, and what differs.

The extra [test] installs torchcam and captum; pytorch-grad-cam wants torchvision, and is skipped where it is missing.
"""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dlu_triton

PAGE = Path(__file__).parents[1].joinpath("docs", "migration.md").read_text()
(RECIPE,) = re.findall(r"```python\n(import dlu_triton\nimport pytorch_grad_cam\n.*?)```", PAGE, re.DOTALL)
(AUGMENTED,) = re.findall(r"```python\n(def mirrored.*?)```", PAGE, re.DOTALL)

CLASSES = 5
TARGET = [1, 4, 2]  # one per image
HEIGHT, WIDTH = 36, 28
PAIRS = {  # pytorch-grad-cam's name: ours, and the epsilon that makes them one formula
    "XGradCAM": (dlu_triton.XGradCAM, 1e-7),
    "GradCAM": (dlu_triton.GradCAM, 1e-6),
    "GradCAMPlusPlus": (dlu_triton.GradCAMPlusPlus, 1e-6),
    "HiResCAM": (dlu_triton.HiResCAM, 1e-6),
    "LayerCAM": (dlu_triton.LayerCAM, 1e-6),
}
# Both are float32; the others add 1e-7 or 1e-8 to the range of every map.
CLOSE = {"rtol": 0, "atol": 2e-5}

_schemas = []  # a library's definitions go with it


def neighbour(name):
    """Import a library, which may need torchvision, or skip."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:  # built for CUDA, beside a CPU build of torch: two operators that it looks up are missing
        schemas = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(schemas)
    return pytest.importorskip(name)


@pytest.fixture(scope="module")
def grad_cam():
    return neighbour("pytorch_grad_cam")


@pytest.fixture(scope="module")
def classifier_target(grad_cam):
    return importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget


@pytest.fixture
def recipe(grad_cam):
    written = {}
    exec(RECIPE, written)
    return written["XGradCAM"]


@pytest.fixture(autouse=True)
def same_float32():
    """cuDNN rounds float32 to TF32, and not alike for every batch size."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


class Net(nn.Sequential):
    """A head without pooling, so that a gradient differs from pixel to pixel and the methods differ too."""

    def __init__(self, seed):
        torch.manual_seed(seed)

        def block(channels, wider, stride):
            return nn.Sequential(nn.Conv2d(channels, wider, 3, stride, 1), nn.BatchNorm2d(wider), nn.ReLU())

        super().__init__()
        self.early = block(3, 12, 2)
        self.late = block(12, 24, 2)  # 9 x 7
        self.head = nn.Sequential(block(24, 16, 2), nn.Flatten(), nn.Linear(16 * 5 * 4, CLASSES))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        nn.init.normal_(self.head[-1].weight, 0, 2)  # raw maps far above what the others add to their range
        self.eval()


@pytest.fixture(params=(0, 1))
def model(request, device):
    return Net(request.param).to(device)


@pytest.fixture
def images(device):
    return torch.randn(len(TARGET), 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(7)).to(device)


def assert_same_map(found, expected):
    found, expected = (torch.as_tensor(value).cpu() for value in (found, expected))
    assert expected.amax() > 0.5, "a dead map shows nothing"
    torch.testing.assert_close(found, expected, **CLOSE)


class Scaled(nn.Module):
    """A network whose "layer" is as small as one likes, and whose scores are not."""

    def __init__(self, net, factor):
        super().__init__()
        self.early, self.layer, self.head = nn.Sequential(net.early, net.late), nn.Identity(), net.head
        self.factor = factor

    def forward(self, x):
        return self.head(self.layer(self.factor * self.early(x)) / self.factor)


class Tokens(nn.Module):
    """A class token before those of 9 x 7 patches, mixed once; the head reads the class token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 12))
        self.tokens = nn.ReLU()
        self.mix = nn.Linear(64, 64)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(12, CLASSES))
        nn.init.normal_(self.mix.weight)
        nn.init.normal_(self.head[1].weight, 0, 2)

    def forward(self, x):
        patches = self.patches(x).flatten(2).mT
        tokens = self.tokens(torch.cat((self.first.expand(len(x), -1, -1), patches), 1))
        return self.head(self.mix(tokens.mT).mT[:, 0])


def overwritten(in_place):
    """A convolution that is followed by a ReLU, in place or not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=in_place), nn.Flatten(), nn.Linear(8 * 17 * 13, CLASSES)
    )


def activations_and_gradients(model, layer, images):
    kept = []
    handle = layer.register_forward_hook(lambda module, arguments, output: kept.append(output))
    logits = model(images)
    handle.remove()
    score = logits[range(len(TARGET)), TARGET].sum()
    return kept[0].detach(), *torch.autograd.grad(score, kept)


# ---------------------------------------------------------------------------------------------------------------
# pytorch-grad-cam
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("layer", ("early", "late"))
def test_pytorch_grad_cam(grad_cam, classifier_target, model, images, name, layer):
    explainer, eps = PAIRS[name]
    targets = [classifier_target(index) for index in TARGET]
    with getattr(grad_cam, name)(model, [model.get_submodule(layer)]) as theirs:
        expected = theirs(images, targets)
    found = explainer(model, layer, eps=eps)(images, TARGET)
    assert_same_map(found.map, expected)
    assert_same_map(explainer(model, layer, eps=eps)(images, targets).map, expected)


def test_pytorch_grad_cam_elementwise(grad_cam, classifier_target, model, images):
    with grad_cam.GradCAMElementWise(model, [model.late]) as theirs:
        expected = theirs(images, [classifier_target(index) for index in TARGET])
    planes = activations_and_gradients(model, model.late, images)
    found = dlu_triton.class_activation_map(*planes, "elementwise", size=(HEIGHT, WIDTH), normalize=True)
    assert_same_map(found, expected)


def test_pytorch_grad_cam_ablation(grad_cam, classifier_target, model, images):
    """A layer with zeros in it; in one without, pytorch-grad-cam ablates with large negative values instead."""
    with grad_cam.AblationCAM(model, [model.late], batch_size=8) as theirs:
        expected = theirs(images, [classifier_target(index) for index in TARGET])
    assert_same_map(dlu_triton.AblationCAM(model, "late", batch_size=7)(images, TARGET).map, expected)


def grad_cam_maps(grad_cam, model, layers, images, targets):
    with grad_cam.XGradCAM(model, layers) as theirs:
        return theirs(images, targets)


@pytest.fixture
def targets(classifier_target):
    return [classifier_target(index) for index in TARGET]


def test_pytorch_grad_cam_ablation_of_signed_activations(grad_cam, targets, images, device):
    """Channels set to zero, as in the paper; pytorch-grad-cam sets them far below what the layer has."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(), nn.Linear(6 * 9 * 7, CLASSES)).to(device)
    rows = range(len(TARGET)), TARGET
    activations, _ = activations_and_gradients(model, model[0], images)
    assert activations.amin() < 0
    scores, weights = model(images)[rows], []
    for channel in range(6):
        ablated = activations.clone()
        ablated[:, channel] = 0
        weights.append(1 - model[1:](ablated)[rows] / scores)
    weights = torch.stack(weights, 1).detach()
    expected = dlu_triton.weighted_activation_map(activations, weights, size=(HEIGHT, WIDTH), normalize=True)
    assert_same_map(dlu_triton.AblationCAM(model, "0")(images, TARGET).map, expected)
    with grad_cam.AblationCAM(model, [model[0]]) as theirs:
        other = torch.from_numpy(theirs(images, targets))
    assert (other - expected.cpu()).abs().amax() > 0.1


def test_pytorch_grad_cam_eps(grad_cam, targets, model, images):
    scaled = Scaled(model, 1e-9)
    expected = grad_cam_maps(grad_cam, scaled, [scaled.layer], images, targets)
    assert_same_map(dlu_triton.XGradCAM(scaled, "layer", eps=1e-7)(images, TARGET).map, expected)
    other = dlu_triton.XGradCAM(scaled, "layer")(images, TARGET).map.cpu()
    assert (other - torch.from_numpy(expected)).abs().amax() > 0.05


def test_pytorch_grad_cam_range(grad_cam, model, images):
    targets = [lambda row, index=index: 1e-9 * row[index] for index in TARGET]
    theirs = grad_cam_maps(grad_cam, model, [model.late], images, targets)
    assert theirs.max() < 0.99999
    found = dlu_triton.XGradCAM(model, "late", eps=1e-7)(images, targets)
    assert (found.map.amax((1, 2)) == ~found.dead).all()
    assert not found.dead.all()
    assert np.abs(found.map.numpy(force=True) - theirs).max() < 1e-2


@pytest.mark.parametrize("kind", ("binary", "ReST", "Finer", "segmentation"))
def test_pytorch_grad_cam_targets(grad_cam, model, images, kind, device):
    model_targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    layer = model.late
    if kind == "binary":
        model.head[-1] = nn.Linear(16 * 5 * 4, 1).to(device)
        targets = [model_targets.BinaryClassifierOutputTarget(index) for index in (1, 0, 1)]
    elif kind == "ReST":
        targets = [model_targets.ClassifierOutputReST(index) for index in TARGET]
    elif kind == "Finer":
        targets = [model_targets.FinerWeightedTarget(index, [0], 0.6) for index in TARGET]
    else:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 3, padding=1)).to(device)
        layer = model[1]
        mask = np.zeros((HEIGHT, WIDTH), np.float32)
        mask[5:20, 3:9] = 1
        targets = [model_targets.SemanticSegmentationTarget(index, mask) for index in TARGET]
    expected = grad_cam_maps(grad_cam, model, [layer], images, targets)
    assert_same_map(dlu_triton.XGradCAM(model, layer, eps=1e-7)(images, targets).map, expected)


def test_pytorch_grad_cam_several_classes(grad_cam, classifier_target, model, images):
    classes = torch.tensor([[1, 0], [4, 3], [2, 1]])
    found = dlu_triton.XGradCAM(model, "late", eps=1e-7)(images, classes).map
    for k in (0, 1):
        targets = [classifier_target(index) for index in classes[:, k].tolist()]
        expected = grad_cam_maps(grad_cam, model, [model.late], images, targets)
        assert_same_map(found[:, k], expected)


@pytest.mark.parametrize("grid", (None, (9, 7)))
def test_pytorch_grad_cam_tokens(grad_cam, targets, images, grid, device):
    model = Tokens().to(device)

    def reshape_transform(tokens):
        return tokens[:, 1:].unflatten(1, (9, 7)).permute(0, 3, 1, 2)

    with grad_cam.XGradCAM(model, [model.tokens], reshape_transform=reshape_transform) as theirs:
        expected = theirs(images, targets)
    assert_same_map(dlu_triton.XGradCAM(model, "tokens", grid=grid, eps=1e-7)(images, TARGET).map, expected)


def test_pytorch_grad_cam_aug_smooth(grad_cam, targets, model, images):
    with grad_cam.XGradCAM(model, [model.late]) as theirs:
        expected = theirs(images, targets, aug_smooth=True)
    cam = dlu_triton.XGradCAM(model, "late", eps=1e-7)
    names = {"torch": torch, "cam": cam, "images": images, "classes": TARGET}
    exec(AUGMENTED, names)
    torch.testing.assert_close(names["smooth"].cpu(), torch.from_numpy(expected), **CLOSE)
    assert (names["smooth"] - cam(images, TARGET).map).abs().amax() > 0.01


def test_pytorch_grad_cam_types(grad_cam, targets, model, images):
    model.double()
    found = dlu_triton.XGradCAM(model, "late", eps=1e-7)(images.double(), TARGET).map
    expected = grad_cam_maps(grad_cam, model, [model.late], images.double(), targets)
    assert (found.dtype, expected.dtype) == (torch.float64, np.float32)
    assert_same_map(found.float(), expected)
    model.bfloat16()
    with pytest.raises(TypeError, match="BFloat16"):
        grad_cam_maps(grad_cam, model, [model.late], images.bfloat16(), targets)
    found = dlu_triton.XGradCAM(model, "late")(images.bfloat16(), TARGET).map
    assert found.dtype == torch.float32
    assert (found.cpu() - torch.from_numpy(expected)).abs().mean() < 0.02


def test_pytorch_grad_cam_in_place(grad_cam, targets, images, device):
    maps = []
    for in_place in (False, True):
        model = overwritten(in_place).to(device)
        theirs = torch.from_numpy(grad_cam_maps(grad_cam, model, [model[0]], images, targets))
        maps.append((theirs, dlu_triton.XGradCAM(model, "0", eps=1e-7)(images, TARGET).map.cpu()))
    assert_same_map(maps[0][1], maps[0][0])
    torch.testing.assert_close(maps[1][1], maps[0][1], **CLOSE)
    if device.type == "cpu":  # elsewhere its copy to the host comes before what overwrites
        assert (maps[1][0] - maps[0][0]).abs().amax() > 0.1


def test_pytorch_grad_cam_leaves(grad_cam, targets, model, images):
    def state():
        graded = any(parameter.grad is not None for parameter in model.parameters())
        return model.training, graded, len(model.late._forward_hooks)

    explain = dlu_triton.XGradCAM(model, "late")
    explain(images, TARGET)
    assert state() == (False, False, 0)
    model.train()
    explain(images, TARGET)
    assert state() == (True, False, 0)
    theirs = grad_cam.XGradCAM(model, [model.late])
    theirs(images, targets)
    assert state() == (False, True, 2)
    theirs.activations_and_grads.release()


def test_pytorch_grad_cam_unknown_class(grad_cam, classifier_target, model, images, capsys):
    with grad_cam.XGradCAM(model, [model.late]) as theirs:
        theirs(images, [classifier_target(99)] * len(TARGET))
    assert "IndexError" in capsys.readouterr().out
    with pytest.raises(ValueError, match="target"):
        dlu_triton.XGradCAM(model, "late")(images, 99)


def test_pytorch_grad_cam_pictures(grad_cam):
    show = importlib.import_module("pytorch_grad_cam.utils.image").show_cam_on_image
    pytest.importorskip("matplotlib")
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    maps = torch.linspace(0, 1, 2 * 16 * 32).view(2, 16, 32)
    for image_weight in (0.5, 0.0):
        found = dlu_triton.overlay(images, maps, alpha=1 - image_weight).astype(float)
        for image, cam, picture in zip(images, maps, found, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            expected = show(pixels, cam.numpy(), use_rgb=True, image_weight=image_weight).astype(float)
            assert expected.max() == 255
            difference = np.abs(picture * 255 / picture.max() - expected).max()
            assert difference <= 34 * (1 - image_weight) + 1
            assert difference > 34 * (1 - image_weight) - 5
            assert np.array_equal(show(pixels[..., ::-1], cam.numpy(), image_weight=image_weight)[..., ::-1], expected)


# ---------------------------------------------------------------------------------------------------------------
# torchcam and captum
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def methods():
    neighbour("torchcam")
    return importlib.import_module("torchcam.methods")


def torchcam_maps(methods, model, layer, images, name="XGradCAM", **arguments):
    """Of the classes, or of `targets`."""
    with getattr(methods, name)(model, layer) as theirs:
        scores = model(images)
        (expected,) = theirs(None if "targets" in arguments else TARGET, scores, **arguments)
    return expected.cpu()


@pytest.mark.parametrize("name", ("XGradCAM", "GradCAM", "LayerCAM"))
def test_torchcam(methods, model, images, name):
    explanation = getattr(dlu_triton, name)(model, "late", eps=1e-8)(images, TARGET, size=(9, 7))
    with getattr(methods, name)(model, "late") as theirs:
        (expected,) = theirs(TARGET, model(images), normalized=False)
        torch.testing.assert_close(explanation.raw.relu(), expected, rtol=1e-4, atol=1e-6)
        (expected,) = theirs(TARGET, model(images))
    assert_same_map(explanation.map, expected)


def test_torchcam_grad_cam_plus_plus(methods, model, images):
    """Its product of two relu'd gradients and a gradient takes no part in a division, whatever eps says."""
    expected = torchcam_maps(methods, model, "late", images, "GradCAMpp")
    activations, gradients = activations_and_gradients(model, model.late, images)
    cubes = (gradients.square() * gradients.relu()).sum((2, 3))
    found = dlu_triton.weighted_activation_map(activations, cubes, normalize=True)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)
    paper = dlu_triton.GradCAMPlusPlus(model, "late")(images, TARGET, size=(9, 7)).map.cpu()
    assert (paper - expected).abs().amax() > 0.01


def test_torchcam_size(methods, model, images):
    assert torchcam_maps(methods, model, "late", images).shape == (3, 9, 7)
    assert dlu_triton.XGradCAM(model, "late")(images, TARGET).map.shape == (3, HEIGHT, WIDTH)
    overlay_mask = importlib.import_module("torchcam.utils").overlay_mask
    image, colormaps = pytest.importorskip("PIL.Image"), pytest.importorskip("matplotlib").colormaps
    mask = image.fromarray(np.random.default_rng(0).random((9, 7), np.float32))
    picture = overlay_mask(image.new("RGB", (WIDTH, HEIGHT)), mask, alpha=0.0)
    resized = np.asarray(mask.resize((WIDTH, HEIGHT), image.Resampling.BICUBIC))
    assert np.array_equal(picture, colormaps["jet"](resized**2, bytes=True)[..., :3])


def test_torchcam_eps(methods, model, images):
    scaled = Scaled(model, 1e-10)
    expected = torchcam_maps(methods, scaled, "layer", images)
    assert_same_map(dlu_triton.XGradCAM(scaled, "layer", eps=1e-8)(images, TARGET, size=(9, 7)).map, expected)
    other = dlu_triton.XGradCAM(scaled, "layer")(images, TARGET, size=(9, 7)).map.cpu()
    assert (other - expected).abs().amax() > 0.05


def test_torchcam_dead_and_dim_maps(methods, model, images):
    dead = [lambda row: 0 * row.sum()] * len(TARGET)
    assert torchcam_maps(methods, model, "late", images, targets=dead).count_nonzero() == 0
    explanation = dlu_triton.XGradCAM(model, "late")(images, dead)
    assert explanation.map.count_nonzero() == 0
    assert explanation.dead.all()
    dim = [lambda row, index=index: 1e-9 * row[index] for index in TARGET]
    assert torchcam_maps(methods, model, "late", images, targets=dim).amax() < 0.99999
    explanation = dlu_triton.XGradCAM(model, "late")(images, dim)
    assert (explanation.map.amax((1, 2)) == ~explanation.dead).all()
    assert not explanation.dead.all()


def test_torchcam_nan(methods, images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * HEIGHT * WIDTH, CLASSES)).to(images.device)
    images = images.clone()
    images[1, :, 3, 5] = torch.nan
    assert torchcam_maps(methods, model, "0", images, "GradCAM").isfinite().all()
    found = dlu_triton.GradCAM(model, "0")(images, TARGET).map
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not found[::2].isnan().any()


def test_torchcam_target(methods, model, images):
    with methods.XGradCAM(model, "late") as theirs:
        scores = model(images)
        with pytest.raises(ValueError, match="class_idx"):
            theirs(None, scores)
        (expected,) = theirs(scores.argmax(1).tolist(), scores)
        with torch.no_grad():
            scores = model(images)
        with pytest.raises(RuntimeError):
            theirs(TARGET, scores)
    with torch.no_grad():
        found = dlu_triton.XGradCAM(model, "late", eps=1e-8)(images, size=(9, 7)).map
    assert_same_map(found, expected)


def test_torchcam_fused(methods, model, images):
    with methods.XGradCAM(model, ["early", "late"]) as theirs:
        expected = theirs.fuse_cams(theirs(TARGET, model(images)), (HEIGHT, WIDTH))
    maps = []
    for name, size in (("early", (18, 14)), ("late", (9, 7))):
        cam = dlu_triton.XGradCAM(model, name, eps=1e-8)(images, TARGET, size=size).map
        maps.append(nn.functional.interpolate(cam[:, None], (HEIGHT, WIDTH), mode="bilinear")[:, 0])
    assert_same_map(torch.maximum(*maps), expected)
    mean = dlu_triton.XGradCAM(model, ["early", "late"], fuse="mean")(images, TARGET).map
    assert (mean - expected).abs().amax() > 0.1


def test_torchcam_types(methods, model, images):
    exact = dlu_triton.XGradCAM(model, "late")(images, TARGET, size=(9, 7)).map
    model.bfloat16()
    assert torchcam_maps(methods, model, "late", images.bfloat16()).dtype == torch.bfloat16
    found = dlu_triton.XGradCAM(model, "late")(images.bfloat16(), TARGET, size=(9, 7)).map
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean() < 0.02


def test_torchcam_in_place(methods, images, device):
    """Of what the ReLU leaves, which another layer has where it is not in place."""
    kept, overwriting = overwritten(False).to(device), overwritten(True).to(device)
    theirs = torchcam_maps(methods, overwriting, "0", images)
    assert_same_map(theirs, torchcam_maps(methods, kept, "1", images))
    found, expected = (
        dlu_triton.XGradCAM(model, "0", eps=1e-8)(images, TARGET, size=(17, 13)).map for model in (overwriting, kept)
    )
    assert_same_map(found, expected)
    assert (theirs - found.cpu()).abs().amax() > 0.1


def test_torchcam_leaves(methods, model, images):
    extractor = methods.XGradCAM(model, "late")
    extractor(TARGET, model(images))
    assert len(model.late._forward_hooks) == 2
    assert extractor.hook_a[0].shape == (3, 24, 9, 7)
    extractor.remove_hooks()
    dlu_triton.XGradCAM(model, "late")(images, TARGET)
    assert not model.late._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_captum(model, images):
    attribution = pytest.importorskip("captum.attr")
    expected = attribution.LayerGradCam(model, model.late).attribute(images, torch.tensor(TARGET).to(images.device))
    found = dlu_triton.GradCAM(model, "late")(images, TARGET).raw
    torch.testing.assert_close(found, expected.squeeze(1).detach(), rtol=1e-4, atol=1e-6)


def test_captum_interpolation(model, images):
    attribution = pytest.importorskip("captum.attr")
    method = attribution.LayerGradCam(model, model.late)
    classes = torch.tensor(TARGET).to(images.device)
    nearest = attribution.LayerAttribution.interpolate(method.attribute(images, classes), (HEIGHT, WIDTH))
    explanation = dlu_triton.GradCAM(model, "late")(images, TARGET, normalize=False)
    repeated = nn.functional.interpolate(explanation.raw[:, None], (HEIGHT, WIDTH))
    torch.testing.assert_close(repeated, nearest.detach(), rtol=1e-4, atol=1e-6)
    relu = method.attribute(images, classes, relu_attributions=True)
    bilinear = attribution.LayerAttribution.interpolate(relu, (HEIGHT, WIDTH), "bilinear").squeeze(1).detach()
    torch.testing.assert_close(explanation.map, bilinear, rtol=1e-4, atol=1e-6)
    assert relu.requires_grad
    assert not explanation.map.requires_grad


# ---------------------------------------------------------------------------------------------------------------
# The recipe for users of pytorch-grad-cam
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ("None", "ClassifierOutputTarget", "ClassifierOutputSoftmaxTarget", "function"))
@pytest.mark.parametrize("augmented", (False, True))
def test_recipe(grad_cam, recipe, model, images, target, augmented):
    if target == "None":
        targets = None
    elif target == "function":
        targets = [lambda row, index=index: row[index] - row.logsumexp(0) for index in TARGET]
    else:
        model_targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
        targets = [getattr(model_targets, target)(index) for index in TARGET]
    with grad_cam.XGradCAM(model, [model.late]) as theirs:
        expected = theirs(input_tensor=images, targets=targets, aug_smooth=augmented)
        outputs = theirs.outputs
    with recipe(model, [model.late]) as ours:
        found = ours(input_tensor=images, targets=targets, aug_smooth=augmented)
    assert isinstance(found, np.ndarray)
    assert found.dtype == expected.dtype
    assert_same_map(found, expected)
    torch.testing.assert_close(ours.outputs, outputs.detach())


def test_recipe_of_a_dead_map(grad_cam, recipe, model, images):
    targets = [lambda row: 0 * row.sum()] * len(TARGET)
    for implementation in (grad_cam.XGradCAM, recipe):
        assert np.array_equal(implementation(model, [model.late])(images, targets), np.zeros((3, HEIGHT, WIDTH)))


def test_recipe_leaves_nothing_behind(recipe, model, images):
    """pytorch-grad-cam's own hooks would keep the activations of every call, on the CPU."""
    explain = recipe(model, [model.early, model.late])
    for _ in range(2):
        explain(images, None)
    assert explain.activations_and_grads.activations == explain.activations_and_grads.gradients == []
    assert not model.early._forward_hooks
    assert not model.late._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recipe_refuses_eigen_smooth(recipe, model, images):
    with pytest.raises(NotImplementedError, match="eigen_smooth"):
        recipe(model, [model.late])(images, None, eigen_smooth=True)
    with pytest.raises(NotImplementedError, match="reshape_transform"):
        recipe(model, [model.late], reshape_transform=lambda x: x.mT)(images, None)


def test_recipe_with_two_layers(grad_cam, recipe, model, images):
    layers = [model.early, model.late]
    with grad_cam.XGradCAM(model, layers) as theirs:
        expected = theirs(images, None)
    assert_same_map(recipe(model, layers)(images, None), expected)
