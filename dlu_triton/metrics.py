"""How well a map explains: the axioms of XGrad-CAM measured on the model, localisation, confidence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from . import _capture, _checks
from ._capture import Inputs, Target
from .explain import Explanation

__all__ = [
    "ConfidenceChange",
    "ScoreDecomposition",
    "channel_drops",
    "confidence_change",
    "conservation",
    "energy_in_box",
    "pointing_hit",
    "score_decomposition",
    "sensitivity",
]


# ---------------------------------------------------------------------------------------------------------------
# Axioms (arXiv 2008.02312, section 3)
# ---------------------------------------------------------------------------------------------------------------


def conservation(explanation: Explanation) -> Tensor:
    """Relative conservation error `|S - sum of the raw map| / |S|` of each score S: (N, [K]).

    Maps of Grad-CAM++, LayerCAM and Ablation-CAM are not meant to sum to the score, and err by construction.
    """
    _checks.explanation(explanation, Explanation)
    score = explanation.scores.to(explanation.contributions.dtype)
    return _relative((score - explanation.contributions.sum(-1)).abs(), score.abs())


def sensitivity(explanation: Explanation, drops: Tensor) -> Tensor:
    """Relative sensitivity error: sum over k of `|drop_k - contribution_k|` / sum over k of `|drop_k|`, (N, [K]).

    Args:
        explanation: of the same model, layer, inputs and target as the drops.
        drops: (N, [K,] C) of `channel_drops`.
    """
    _checks.explanation(explanation, Explanation)
    contributions = explanation.contributions
    _checks.drops(drops, contributions)
    drops = drops.to(contributions.dtype)
    return _relative((drops - contributions).abs().sum(-1), drops.abs().sum(-1))


def channel_drops(
    model: nn.Module,
    layer: nn.Module | str,
    inputs: Inputs,
    target: Target = None,
    *,
    batch_size: int = 64,
    reuse_trunk: bool = True,
    progress: bool = False,
    grid: tuple[int, int] | None = None,
    layout: str | None = None,
) -> Tensor:
    """Drops of the scores S(F) - S(F without F_k), each channel of the layer really zeroed: (N, [K,] C).

    Takes C forward passes of what follows the layer for every image, `batch_size` at a time. What precedes the layer
    runs once for each of these batches; `reuse_trunk=False` repeats the inputs instead, for models that fix the batch
    size before the layer, or pass the layer by. `progress` shows a bar (needs tqdm). Inputs, target, grid and layout
    are those of the explainers; of tokens only those of the grid are zeroed. Images are taken one by one: of the
    inputs, every tensor whose first dimension is the batch counts as a batch.

    Raises:
        ValueError: batch normalisation or dropout is in training mode, or an argument does not fit.
    """
    _checks.flags(reuse_trunk=reuse_trunk, progress=progress)
    _checks.layout(layout)
    places = _checks.map_size(grid, "grid")
    drops, *_ = _capture.channel_drops(
        model,
        _capture.one_layer(model, layer),
        inputs,
        target,
        lambda shape: _capture.planes(shape, _capture.image_size(inputs), places, layout),
        batch_size=_checks.integer("batch_size", batch_size, 1),
        reuse_trunk=reuse_trunk,
        progress=progress,
    )
    return drops


class ScoreDecomposition(NamedTuple):
    """Both sides of Eq. 5: score = activations + biases, each (N, [K])."""

    score: Tensor
    activations: Tensor  #: sum of gradients * activations of the layer
    biases: Tensor  #: sum of gradients * biases of what follows

    @property
    def residual(self) -> Tensor:
        return self.score - self.activations - self.biases


def score_decomposition(
    model: nn.Module, layer: nn.Module | str, inputs: Inputs, target: Target = None
) -> ScoreDecomposition:
    """Eq. 5 of the paper: S = sum of G * A + sum over later layers of sum over j of dS/db_j * b_j.

    It holds for networks in evaluation mode that are piecewise linear after the layer (convolutions, linear layers,
    batch normalisation, ReLU, max and average pooling, additions), all of whose paths lead through the layer; then
    `residual` is rounding. A large residual says that the model is not of that kind.

    Raises:
        ValueError: batch normalisation or dropout is in training mode.
    """
    found = _capture.one_layer(model, layer)
    _capture.require_evaluation(model)
    followers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and module not in found.values()
    }
    outputs: list[tuple[nn.Module, Tensor]] = []

    def keep(name: str, output: Tensor) -> Tensor | None:
        if not output.requires_grad:  # it precedes the layer, or passes it by without a graph
            return None
        outputs.append((followers[name], output))
        return output.clone()

    with _capture.hooked(followers, keep, all_run=False):
        output, captured = _capture.run_with_graph(model, found, inputs)
    (activations,) = captured.values()
    batch = _capture.images_in(inputs, captured)
    with torch.enable_grad():
        score = _capture.checked_scores(_capture.resolve(target, output, batch).of(output), batch)
    dependent = [(module, tensor) for module, tensor in outputs if _bias(module) is not None]
    tensors = [activations, *(tensor for _, tensor in dependent)]
    first, *others = _capture.gradients(score, tensors, None, unused_are_zero=True)
    leading = score.dim()
    through = first * (activations if leading == 1 else activations.unsqueeze(1))
    biases = torch.zeros_like(score)
    for (module, tensor), gradient in zip(dependent, others, strict=True):
        channel = -1 if isinstance(module, nn.Linear) else 1 - tensor.dim()
        biases = biases + (gradient.movedim(channel, -1) * _bias(module)).flatten(leading).sum(-1)
    through = through.flatten(leading).sum(-1)
    return ScoreDecomposition(score.detach(), through.detach(), biases.detach())


def _bias(module: nn.Module) -> Tensor | None:
    """What a layer adds to each channel whatever its input."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return module.bias
    shift = -module.running_mean * (module.running_var + module.eps).rsqrt()
    if module.weight is not None:
        shift = shift * module.weight
    return shift if module.bias is None else shift + module.bias


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """error / size, and zero where both are."""
    return torch.where((error == 0) & (size == 0), 0, error / size)


# ---------------------------------------------------------------------------------------------------------------
# Localisation
# ---------------------------------------------------------------------------------------------------------------


def pointing_hit(maps: Tensor, boxes: Tensor, tolerance: int = 0) -> Tensor:
    """Whether the largest value of each map is in one of its boxes (the pointing game): bool (N, [K]).

    Args:
        maps: (N, [K,] H, W), floating-point. A map without a positive value misses.
        boxes: (N, [K,] 4), or (N, [K,] B, 4) for B boxes a map; x0, y0, x1, y1 in pixels, x1 and y1 not included, of
            integers or floating-point. A box without area is none.
        tolerance: pixels by which the boxes are widened on every side; the published game has 15.
    """
    tolerance = _checks.tolerance(tolerance)
    _checks.maps_and_boxes(maps, boxes)
    inside = _inside(maps, boxes, tolerance)
    flat = maps.flatten(-2)
    peak = flat.argmax(-1, keepdim=True)
    return inside.flatten(-2).gather(-1, peak).squeeze(-1) & (flat.amax(-1) > 0)


def energy_in_box(maps: Tensor, boxes: Tensor) -> Tensor:
    """Share of each map's sum that lies in its boxes (Score-CAM's energy-based pointing game): (N, [K]).

    Maps and boxes are those of `pointing_hit`; negative values count as zero, and a map without a positive value has
    none of its energy anywhere. Sums and shares are float32, float64 for float64 maps.
    """
    _checks.maps_and_boxes(maps, boxes)
    energy = maps.to(torch.promote_types(maps.dtype, torch.float32)).clamp(min=0)
    total = energy.sum((-2, -1))
    return (energy * _inside(maps, boxes, 0)).sum((-2, -1)) / total.masked_fill(total == 0, torch.inf)


def _inside(maps: Tensor, boxes: Tensor, tolerance: int) -> Tensor:
    """Which pixels of the maps are in their boxes: bool, like the maps."""
    if boxes.dim() == maps.dim() - 1:
        boxes = boxes.unsqueeze(-2)
    boxes = boxes.to(maps.device, torch.float64)  # in their own type a tolerance may wrap, or round away
    x0, y0, x1, y1 = boxes.unbind(-1)  # (..., B)
    real = ((x1 > x0) & (y1 > y0))[..., None, None]
    x = torch.arange(maps.shape[-1], device=maps.device)
    y = torch.arange(maps.shape[-2], device=maps.device)[:, None]

    def edge(value: Tensor) -> Tensor:
        return value[..., None, None]

    across = (x >= edge(x0) - tolerance) & (x < edge(x1) + tolerance)
    down = (y >= edge(y0) - tolerance) & (y < edge(y1) + tolerance)
    return (across & down & real).any(-3)


# ---------------------------------------------------------------------------------------------------------------
# Confidence
# ---------------------------------------------------------------------------------------------------------------


class ConfidenceChange(NamedTuple):
    """Their means over a data set are the average drop and the increase in confidence of Grad-CAM++."""

    drop: Tensor  #: (N, [K]), max(0, Y - O) / Y for the probabilities Y of the image and O of the masked image
    increase: Tensor  #: (N, [K]) bool, Y < O


@torch.no_grad()
def confidence_change(model: nn.Module, inputs: Tensor, maps: Tensor, target: Tensor) -> ConfidenceChange:
    """How the probability of each class changes when its map masks the image (arXiv 1710.11063, section 4).

    A class whose probability is rounded to zero has nothing to lose: its drop is zero.

    Args:
        model: from images to logits (N, classes); probabilities are their softmax.
        inputs: (N, channels, H, W), as the model takes them. Masking multiplies them, so where a map is zero the image
            takes the value zero: the mean, for normalised inputs.
        maps: (N, H, W) or (N, K, H, W), from 0 to 1.
        target: class indices (N,) or (N, K).
    """
    _checks.model(model)
    _checks.confidence_change(inputs, maps)
    several = maps.dim() == 4
    n, k = maps.shape[0], maps.shape[1] if several else 1
    output = model(inputs)
    rule = _capture.resolve(target, output, n)
    _checks.class_of_each_map(target, rule.indices, tuple(maps.shape[: 1 + several]))
    indices = rule.indices.view(n, k)
    before = _capture.logits_of(output).softmax(1).gather(1, indices)
    masked = (inputs.unsqueeze(1) * maps.view(n, k, 1, *maps.shape[-2:])).flatten(0, 1).to(inputs.dtype)
    after = _capture.logits_of(model(masked)).softmax(1).gather(1, indices.view(n * k, 1)).view(n, k)
    drop, increase = _relative((before - after).clamp(min=0), before), after > before
    return ConfidenceChange(drop, increase) if several else ConfidenceChange(drop.squeeze(1), increase.squeeze(1))
