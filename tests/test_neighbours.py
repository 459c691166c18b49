"""Maps of pytorch-grad-cam, torchcam and captum beside ours, where they are installed (CI has none of them).

Not compared: torchcam's Grad-CAM++, whose denominator is another formula than the paper's.
"""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dlu_triton

PAGE = Path(__file__).parents[1].joinpath("docs", "explain.md").read_text()
RECIPE = re.findall(r"```python\n(import dlu_triton\nimport pytorch_grad_cam\n.*?)```", PAGE, re.DOTALL)[0]

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


# ---------------------------------------------------------------------------------------------------------------
# torchcam and captum
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("XGradCAM", "GradCAM", "LayerCAM"))
def test_torchcam(model, images, name):
    neighbour("torchcam")
    methods = importlib.import_module("torchcam.methods")
    explanation = getattr(dlu_triton, name)(model, "late", eps=1e-8)(images, TARGET, size=(9, 7))
    with getattr(methods, name)(model, "late") as theirs:
        (expected,) = theirs(TARGET, model(images), normalized=False)
        torch.testing.assert_close(explanation.raw.relu(), expected, rtol=1e-4, atol=1e-6)
        (expected,) = theirs(TARGET, model(images))
    assert_same_map(explanation.map, expected)


def test_captum(model, images):
    attribution = pytest.importorskip("captum.attr")
    expected = attribution.LayerGradCam(model, model.late).attribute(images, torch.tensor(TARGET).to(images.device))
    found = dlu_triton.GradCAM(model, "late")(images, TARGET).raw
    torch.testing.assert_close(found, expected.squeeze(1).detach(), rtol=1e-4, atol=1e-6)


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
