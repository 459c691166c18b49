"""Explainers: class activation maps of a model's layers, for the scores of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from . import _capture, _checks, reference
from ._capture import Inputs, Layers, Target
from .ops.cam import class_activation_parts, weighted_activation_map
from .reference import CAMParts

__all__ = [
    "AblationCAM",
    "Explanation",
    "FusedExplanation",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "XGradCAM",
    "overlay",
]


class _Shown:
    """A repr of shapes instead of values."""

    def __repr__(self) -> str:
        shown = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(_Shown):
    """What a layer says about the scores of N images, of K classes each where the target has them.

    No graph hangs on any of it. Maps and channel values are float32, float64 for a float64 model.

    Attributes:
        map: (N, [K,] H, W), on the size of the inputs, from 0 to 1 unless `normalize=False`.
        raw: (N, [K,] h, w), on the size of the layer, signed: before ReLU, resize and normalisation.
        weights: (N, [K,] C), None for methods that weigh every pixel by itself.
        contributions: (N, [K,] C), each channel's share of the sum of `raw`, for `metrics`.
        cancellation: (N, C), `|sum of A| / sum of |A|` of each channel; where signed activations cancel it is near
            zero, and XGrad-CAM's weights are large and mean little.
        logits: what the model returned, detached.
        scores: (N, [K]), the scores explained.
        target: (N, [K]), their classes; None where the target was a callable.
        dead: (N, [K]) bool: nothing in `raw` is positive, so there is no evidence, and the map is zero.
    """

    map: Tensor
    raw: Tensor
    weights: Tensor | None
    contributions: Tensor
    cancellation: Tensor
    logits: Any
    scores: Tensor
    target: Tensor | None
    dead: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class FusedExplanation(_Shown):
    """What several layers say together, of `fuse="mean"`.

    Attributes:
        map: (N, [K,] H, W), the mean of the layers' maps, each normalised and then resized as in pytorch-grad-cam;
            the mean is normalised again unless `normalize=False`.
        layers: an `Explanation` of each layer, for `metrics`.
        logits: as in `Explanation`.
        scores: as in `Explanation`.
        target: as in `Explanation`.
        dead: (N, [K]) bool: where all layers are.
    """

    map: Tensor
    layers: tuple[Explanation, ...]
    logits: Any
    scores: Tensor
    target: Tensor | None
    dead: Tensor


class _Explainer:
    """Explains scores of a model by maps of one or several of its layers.

    Args:
        model: a module that returns a tensor, or has `logits` in its output; others need a callable as target. Its
            training flags are left alone, so call `eval()` yourself: in training mode a forward pass teaches batch
            normalisation, as any other does.
        layers: a module of the model or its name, or a list of them. A layer that runs several times in a forward
            pass is explained at its last run. Its output is (N, C, h, w), (N, h, w, C) as in Swin, or tokens (N, T, C).
            Of a ViT whose head reads the class token alone, no score depends on the patches that leave the last block,
            and their map is dead: take a layer in it that precedes its attention, such as its first normalisation.
        fuse: None for an explanation of each layer in a list, "mean" for the mean of their maps, each normalised.
        grid: (h, w) of tokens, which follow class and register tokens; inferred from the size of the image otherwise.
        layout: "NCHW", "NHWC" or "NTC" of the layer's output, where the inference from its shape is wrong.
        eps: as for `class_activation_map`.

    Raises:
        TypeError, ValueError: an argument does not fit the rules above.
    """

    _method: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        fuse: str | None = None,
        grid: tuple[int, int] | None = None,
        layout: str | None = None,
        eps: float = 1e-6,
    ) -> None:
        self._layers = _capture.find_layers(model, layers)
        self._model = model
        self._single = isinstance(layers, nn.Module | str)
        _checks.fuse(fuse)
        _checks.layout(layout)
        self._fuse = fuse
        self._grid = _checks.map_size(grid, "grid")
        self._layout = layout
        self._eps = _checks.non_negative("eps", eps)

    def __call__(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        size: int | tuple[int, int] | None = None,
        relu: bool = True,
        normalize: bool = True,
        chunk_size: int | None = None,
    ) -> Explanation | list[Explanation] | FusedExplanation:
        """Explain the scores of a batch.

        Args:
            inputs: the model's argument, a sequence of its arguments, or a mapping of its keyword arguments.
            target: None for the class of the largest logit; a class for all images; a list of N classes; integers
                (N,), or (N, K) for K classes an image from one backward pass; a callable from the model's output to
                scores (N,) or (N, K); a list of N callables, each from an image's own logits to its score. Class
                scores are logits, before softmax.
            size: of the maps, (height, width) or an integer; None takes that of the first 4-dimensional input.
            relu: whether negative values of a map become zero.
            normalize: whether to scale each map to [0, 1]; a dead map is zero.
            chunk_size: how many classes a backward pass takes at a time, None for all; 1 for models whose backward
                `torch.vmap` does not know.

        Returns:
            An `Explanation`; a list of them for a list of layers; a `FusedExplanation` with `fuse`.

        Raises:
            TypeError, ValueError: a target of the wrong length, type or range, or a layer's output of unknown shape.
                Indices in a CUDA tensor are checked by the device as PyTorch's own are, so as not to wait for it.
            RuntimeError: in `torch.inference_mode()`; a layer that does not run, or on which no score depends; a model
                of `torch.compile` that has run, whose code does not look for hooks any more: pass the original.
        """
        _checks.flags(relu=relu, normalize=normalize)
        _checks.chunk_size(chunk_size)
        wanted = _capture.map_size(size, inputs)
        explanations = self._explain(inputs, target, wanted, relu, normalize, chunk_size)
        if self._fuse == "mean":
            return _fused(explanations, wanted, relu, normalize)
        return explanations[0] if self._single else explanations

    def _explain(
        self,
        inputs: Inputs,
        target: Target,
        size: tuple[int, int],
        relu: bool,
        normalize: bool,
        chunk_size: int | None,
    ) -> list[Explanation]:
        output, captured = _capture.run_with_graph(self._model, self._layers, inputs)
        layers = list(captured.values())
        batch = _capture.images_in(inputs, captured)
        with torch.enable_grad():
            rule = _capture.resolve(target, output, batch)
            scores = _capture.checked_scores(rule.of(output), batch)
        gradients = _capture.gradients(scores, layers, chunk_size)
        explanations = []
        with torch.no_grad():
            for activations, gradient in zip(layers, gradients, strict=True):
                view = self._view(activations.shape, _capture.image_size(inputs))
                parts = class_activation_parts(
                    view(activations.detach()), view(gradient), self._method, self._eps, relu, size, normalize
                )
                explanations.append(_explanation(parts, output, scores, rule))
        return explanations

    def _view(self, shape: Sequence[int], image: tuple[int, int] | None) -> _capture.Planes:
        return _capture.planes(shape, image, self._grid, self._layout)


_ARGUMENTS = inspect.cleandoc(_Explainer.__doc__ or "")  # which `python -OO` leaves out


class XGradCAM(_Explainer):
    __doc__ = f"XGrad-CAM (arXiv 2008.02312).\n\n{_ARGUMENTS}"
    _method = "xgradcam"


class GradCAM(_Explainer):
    __doc__ = f"Grad-CAM (arXiv 1610.02391).\n\n{_ARGUMENTS}"
    _method = "gradcam"


class GradCAMPlusPlus(_Explainer):
    __doc__ = f"Grad-CAM++ (arXiv 1710.11063).\n\n{_ARGUMENTS}"
    _method = "gradcam++"


class HiResCAM(_Explainer):
    __doc__ = f"HiResCAM (arXiv 2011.08891).\n\n{_ARGUMENTS}"
    _method = "hirescam"


class LayerCAM(_Explainer):
    __doc__ = f"LayerCAM (Jiang et al., TIP 2021).\n\n{_ARGUMENTS}"
    _method = "layercam"


class AblationCAM(_Explainer):
    """Ablation-CAM (Desai and Ramaswamy, WACV 2020): weights are relative drops of the score without a channel.

    Takes no gradient, and C forward passes of what follows the layer for every image. Arguments are those of the other
    explainers, and three more.

    Args:
        batch_size: channels that are ablated at a time.
        reuse_trunk: whether what precedes the layer runs once for `batch_size` ablations. False repeats the inputs
            instead: for models that fix the batch size before the layer, or pass the layer by. Images are taken one by
            one: of the inputs, every tensor whose first dimension is the batch counts as a batch.
        progress: whether to show a progress bar (needs tqdm).

    A score of zero has zero weights, and a negative one turns its map round, as the published formula does. A callable
    target is also called on outputs whose rows are ablations of one image, so it has to treat all rows alike; a list of
    callables does not. `eps` and `chunk_size` have no effect here, and batch normalisation and dropout must be in
    evaluation mode.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        fuse: str | None = None,
        grid: tuple[int, int] | None = None,
        layout: str | None = None,
        batch_size: int = 64,
        reuse_trunk: bool = True,
        progress: bool = False,
    ) -> None:
        super().__init__(model, layers, fuse=fuse, grid=grid, layout=layout)
        _checks.flags(reuse_trunk=reuse_trunk, progress=progress)
        self._batch_size = _checks.integer("batch_size", batch_size, 1)
        self._reuse_trunk = reuse_trunk
        self._progress = progress

    @torch.no_grad()
    def _explain(
        self,
        inputs: Inputs,
        target: Target,
        size: tuple[int, int],
        relu: bool,
        normalize: bool,
        chunk_size: int | None,
    ) -> list[Explanation]:
        explanations = []
        for name, layer in self._layers.items():
            drops, activations, output, rule, scores = _capture.channel_drops(
                self._model,
                {name: layer},
                inputs,
                target,
                lambda shape: self._view(shape, _capture.image_size(inputs)),
                batch_size=self._batch_size,
                reuse_trunk=self._reuse_trunk,
                progress=self._progress,
            )
            wide = torch.promote_types(activations.dtype, torch.float32)
            weights = drops.to(wide) / scores.to(wide).masked_fill(scores == 0, torch.inf).unsqueeze(-1)
            total = activations.sum((2, 3), dtype=wide)
            parts = CAMParts(
                weighted_activation_map(activations, weights, relu, size, normalize),
                weighted_activation_map(activations, weights, relu=False),
                weights,
                weights * (total if weights.dim() == 2 else total.unsqueeze(1)),
                reference.cancellation(activations),
            )
            explanations.append(_explanation(parts, output, scores, rule))
        return explanations


def _explanation(parts: CAMParts, output: Any, scores: Tensor, rule: _capture.Scores) -> Explanation:
    dead = parts.raw.amax((-2, -1)) <= 0
    return Explanation(*parts, _detached(output), scores.detach(), rule.indices, dead)


def _fused(explanations: Sequence[Explanation], size: tuple[int, int], relu: bool, normalize: bool) -> FusedExplanation:
    several = explanations[0].raw.dim() == 4
    maps = []
    for explanation in explanations:
        raw = explanation.raw if several else explanation.raw.unsqueeze(1)
        maps.append(reference.finish(reference.finish(raw, relu, None, True), False, size, False))
    cam = reference.finish(torch.stack(maps).mean(0), False, None, normalize)
    cam = cam if several else cam.squeeze(1)
    first = explanations[0]
    dead = torch.stack([explanation.dead for explanation in explanations]).all(0)
    return FusedExplanation(cam, tuple(explanations), first.logits, first.scores, first.target, dead)


def _detached(output: Any) -> Any:
    """The output without its graph; its logits where it is not a tensor but has them."""
    try:
        return _capture.logits_of(output).detach()
    except TypeError:
        if isinstance(output, tuple | list):
            return tuple(_detached(value) for value in output)
        if isinstance(output, dict):
            return {name: _detached(value) for name, value in output.items()}
        return None


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def overlay(images: Tensor, maps: Tensor, alpha: float = 0.5, colormap: str = "jet") -> np.ndarray:
    """Pictures of maps laid over their images: (1 - alpha) * image + alpha * colour of the map.

    Args:
        images: (N, 3, H, W) or (3, H, W), floats from 0 to 1 (undo the normalisation of the model) or uint8.
        maps: (N, H, W) or (N, K, H, W), for one image (H, W) or (K, H, W), from 0 to 1, as explainers return them.
        alpha: from 0 to 1.
        colormap: a name that matplotlib knows (needs matplotlib).

    Returns:
        uint8 array of the maps' shape and (3,), RGB.

    Raises:
        TypeError, ValueError: shapes do not fit, a value is out of range, or the colormap is unknown.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("overlay needs matplotlib, which the extra [explain] of dlu-triton installs") from error
    alpha = _checks.overlay(images, maps, alpha, colormap, matplotlib.colormaps)
    several = maps.dim() == images.dim()
    pixels = images.movedim(-3, -1).double().numpy(force=True) / (255 if images.dtype == torch.uint8 else 1)
    if several:
        pixels = pixels[..., None, :, :, :]
    values = maps.double().numpy(force=True)
    for name, array in (("images", pixels), ("maps", values)):
        if array.size:
            hint = " (undo the normalisation of the model)" if name == "images" else ""
            _checks.zero_to_one(name, array.min(), array.max(), hint)
    colours = matplotlib.colormaps[colormap](values)[..., :3]
    return np.round(255 * ((1 - alpha) * pixels + alpha * colours)).astype(np.uint8)
