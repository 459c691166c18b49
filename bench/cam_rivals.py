"""Class activation maps of others: the formula for `torch.compile`, torchcam and pytorch-grad-cam.

Of the libraries only their own code runs, on the tensors or the network that ours get. What is private of them is used
as in torchcam 0.5.0 and grad-cam 1.5.7.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from cam_cases import IMAGE
from libraries import library
from torch import Tensor, nn

import dlu_triton

EPS = 1e-6
TORCHCAM = {"xgradcam": "XGradCAM", "gradcam": "GradCAM"}  # its GradCAMpp is another formula, HiResCAM is missing
GRAD_CAM = {"xgradcam": "XGradCAM", "gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM"}


# ---------------------------------------------------------------------------------------------------------------
# From activations and gradients to normalised maps of size IMAGE
# ---------------------------------------------------------------------------------------------------------------


def formula(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    """As `torch.compile` likes it: products and sums, no matrix product that wants float32 copies in memory."""
    a, g = activations.float(), gradients.float()
    if method == "hirescam":
        cam = (g * a).sum(1)
    else:
        if method == "xgradcam":
            weights = (g * a).sum((2, 3)) / (a.sum((2, 3)) + EPS)
        elif method == "gradcam":
            weights = g.mean((2, 3))
        else:
            square = g * g
            alpha = square / (2 * square + a.sum((2, 3), keepdim=True) * square * g + EPS)
            weights = (g.relu() * torch.where(square == 0, 0, alpha)).sum((2, 3))
        cam = (weights[..., None, None] * a).sum(1)
    cam = F.interpolate(cam.relu().unsqueeze(1), IMAGE, mode="bilinear", align_corners=False).squeeze(1)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return (cam - low) / torch.where(high == low, torch.inf, high - low)


def torchcam(method: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Weights, map, ReLU, normalisation; then the resize, which torchcam has where it fuses maps of several layers."""
    if method not in TORCHCAM:
        raise NotImplementedError(f"torchcam has no {method}")
    extractor = getattr(library("torchcam.methods"), TORCHCAM[method])(nn.Sequential(nn.Identity()), "0")
    extractor._backprop = lambda *_, **__: None  # the gradients are there

    def call(activations: Tensor, gradients: Tensor) -> Tensor:
        extractor.hook_a, extractor.hook_g = [activations], [gradients]
        try:
            return extractor._fuse_cams(extractor.compute_cams(0, None), IMAGE)
        finally:
            extractor.reset_hooks()

    return call


def grad_cam(method: str, device: str) -> Callable[[Tensor, Tensor], Any]:
    """Copies to the host, and all the rest there in NumPy and OpenCV; returns an array."""
    layer = nn.Conv2d(1, 1, 1, device=device)  # it looks for the device of a parameter
    explainer = getattr(library("pytorch_grad_cam"), GRAD_CAM[method])(layer, [layer])
    kept = explainer.activations_and_grads

    def call(activations: Tensor, gradients: Tensor) -> Any:
        kept.activations, kept.gradients = [activations], [gradients]
        images = torch.empty(len(activations), 3, *IMAGE, device="meta")  # only their size counts
        try:
            return explainer.aggregate_multi_layers(explainer.compute_cam_per_layer(images, [], False))
        finally:
            kept.activations, kept.gradients = [], []

    return call


# ---------------------------------------------------------------------------------------------------------------
# From a network and images to normalised XGrad-CAM maps of the images' size, as a user calls it
# ---------------------------------------------------------------------------------------------------------------

Explain = Callable[[Tensor, Sequence[Any]], Any]


@contextmanager
def explain_dlu_triton(model: nn.Module, layer: str) -> Iterator[Explain]:
    explainer = dlu_triton.XGradCAM(model, layer)
    yield lambda images, target: explainer(images, target).map


@contextmanager
def explain_torchcam(model: nn.Module, layer: str) -> Iterator[Explain]:
    with library("torchcam.methods").XGradCAM(model, layer) as extractor:

        def call(images: Tensor, target: Sequence[int]) -> Tensor:
            (cam,) = extractor(target, model(images))
            return F.interpolate(cam.unsqueeze(1), images.shape[2:], mode="bilinear", align_corners=False).squeeze(1)

        yield call


@contextmanager
def explain_grad_cam(model: nn.Module, layer: str) -> Iterator[Explain]:
    with library("pytorch_grad_cam").XGradCAM(model, [model.get_submodule(layer)]) as explainer:
        wanted = library("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
        yield lambda images, target: explainer(images, [wanted(index) for index in target])
