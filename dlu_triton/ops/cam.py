"""Class activation maps: XGrad-CAM and its family, from the activations and gradients of a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, _complexity, _launch, reference
from ..reference import CAMParts
from . import _cam_kernels, _registration

# ---------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------


def _channels(
    activations: Tensor, gradients: Tensor, method: str, eps: float, results: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write the weights, contributions and cancellation of channels whose planes are too large for one program."""
    n, c, h, w = activations.shape
    classes = gradients.shape[1]
    tile = _launch.plane_tile(activations, gradients)
    slices = _launch.cdiv(c, tile.channels)
    _checks.launch(n * classes * slices, activations)
    with _launch.launching(activations):
        _cam_kernels.cam_channels[(n * classes * slices,)](
            *_launch.plane(activations),
            *_launch.plane(gradients),
            *results,
            c, h * w, classes, slices,
            METHOD=method, WEIGHS=method in _checks.WEIGHING_METHODS, EPS=eps, EXACT=c % tile.channels == 0,
            **tile.options(), **_launch.accumulator(activations.dtype),
        )  # fmt: skip


def _partial_maps(
    activations: Tensor,
    gradients: Tensor | None,
    weights: Tensor | None,
    method: str,
    eps: float,
    results: Sequence[Tensor | None],
    raw: Tensor,
) -> Tensor:
    """Weighted sums over slices of the channels: (N, K, slices, h, w), which is `raw` where one slice is enough."""
    if weights is not None:
        method, eps = "xgradcam", 0.0  # of no effect, and so one kernel for all
    n, c, h, w = activations.shape
    classes = (gradients if weights is None else weights).shape[1]
    tile = _launch.plane_tile(activations, gradients)
    tiles = _launch.cdiv(h * w, tile.pixels)
    slices, per_program = _launch.map_slices(n * classes * tiles, c, tile, h * w)
    partials = (
        raw.unsqueeze(2) if slices == 1 else torch.empty((n, classes, slices, h, w), dtype=raw.dtype, device=raw.device)
    )
    _checks.launch(n * classes * tiles * slices, activations)
    with _launch.launching(activations):
        _cam_kernels.cam_partial_maps[(n * classes * tiles * slices,)](
            *_launch.plane(activations),
            *_launch.plane(gradients),
            *_launch.pointer_and_strides(weights, 3),
            *results, partials,
            c, h * w, classes, tiles, slices, per_program // tile.channels,
            METHOD=method, WEIGHS=method in _checks.WEIGHING_METHODS, EPS=eps,
            LOAD_A=_launch.plane_load(activations, tile), LOAD_G=_launch.plane_load(gradients, tile),
            EXACT=c % tile.channels == 0, **tile.options(), **_launch.accumulator(activations.dtype),
        )  # fmt: skip
    return partials


def _finish(
    partials: Tensor, raw: Tensor, cam: Tensor | None, channels: int, relu: bool, resize: bool, normalize: bool
) -> None:
    """Write the raw map (N, K, h, w) and, if given, the map (N, K, H, W) from partial maps (N, K, slices, h, w)."""
    n, classes, slices, h, w = partials.shape
    height, width = (raw if cam is None else cam).shape[2:]
    if slices > 1 and (resize or normalize) and h * w > _launch.MOST_PIXELS_ADDED_AGAIN:
        _finish(partials, raw, None, channels, relu=False, resize=False, normalize=False)
        slices = 1
    tiles, per_program = _launch.finishing_tiles(n * classes, height * width, slices, channels)
    corners = 4 * (h + 1) * (w + 1) < height * width
    _checks.launch(n * classes * tiles, raw)
    with _launch.launching(partials):
        _cam_kernels.cam_finish[(n * classes * tiles,)](
            None if slices == 1 else partials, raw, cam,
            slices, h, w, height, width, tiles, per_program,
            RELU=relu, RESIZE=resize, NORMALIZE=normalize, CORNERS=normalize and resize and corners,
            **_launch.FINISHING_BLOCKS, **_launch.accumulator(raw.dtype),
        )  # fmt: skip


def _class_activation_map(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    eps: float,
    relu: bool,
    size: Sequence[int] | None,
    normalize: bool,
    wants_channels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Map, raw map, weights, contributions and cancellation, for gradients (N, K, C, h, w).

    The last three are empty unless wanted, and the weights are for methods that weigh every pixel.
    """
    cam, raw, *results = _new_results(activations, gradients, method, size, wants_channels)
    if activations.shape[0] == 0:
        return cam, raw, *results
    weights = None
    whole = _launch.plane_tile(activations, gradients).whole
    kept = tuple(results) if wants_channels else (None, None, None)
    if not whole and (wants_channels or method in _checks.WEIGHING_METHODS):
        if not wants_channels:
            kept = _new_results(activations, gradients, method, size, wants_channels=True)[2:]
        _channels(activations, gradients, method, eps, kept)
        weights = kept[0] if method in _checks.WEIGHING_METHODS else None
        kept = (None, None, None)
    partials = _partial_maps(activations, None if weights is not None else gradients, weights, method, eps, kept, raw)
    _finish(partials, raw, cam, activations.shape[1], relu, size is not None, normalize)
    return cam, raw, *results


def _new_results(
    activations: Tensor, gradients: Tensor, method: str, size: Sequence[int] | None, wants_channels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = activations.shape
    classes = gradients.shape[1]
    channels = c if wants_channels else 0
    weighing = channels if method in _checks.WEIGHING_METHODS else 0

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=_launch.sum_dtype(activations.dtype), device=activations.device)

    return (
        new(n, classes, *(size or (h, w))),
        new(n, classes, h, w),
        new(n, classes, weighing),
        new(n, classes, channels),
        new(n, channels),
    )


def _weighted_activation_map(
    activations: Tensor, weights: Tensor, relu: bool, size: Sequence[int] | None, normalize: bool
) -> Tensor:
    """The map, for weights (N, K, C)."""
    cam, raw, *_ = _new_results(activations, weights, "xgradcam", size, wants_channels=False)
    if activations.shape[0] > 0:
        partials = _partial_maps(activations, None, weights, "xgradcam", 0.0, (None, None, None), raw)
        _finish(partials, raw, cam, activations.shape[1], relu, size is not None, normalize)
    return cam


# ---------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------


def _eager_parts(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    eps: float,
    relu: bool,
    size: Sequence[int] | None,
    normalize: bool,
    wants_channels: bool,
) -> tuple[Tensor, ...]:
    parts = reference.class_activation_parts(activations, gradients, method, eps, relu, _pair(size), normalize)
    per_map, per_image = (parts.raw.new_empty((*parts.raw.shape[:n], 0)) for n in (2, 1))  # of what is not wanted
    if not wants_channels:
        return parts.map, parts.raw, per_map, per_map.clone(), per_image
    return tuple(parts._replace(weights=per_map) if parts.weights is None else parts)


def _eager_weighted(
    activations: Tensor, weights: Tensor, relu: bool, size: Sequence[int] | None, normalize: bool
) -> Tensor:
    return reference.weighted_activation_map(activations, weights, relu, _pair(size), normalize)


def _pair(size: Sequence[int] | None) -> tuple[int, int] | None:
    return None if size is None else (size[0], size[1])


class_activation_map_op = _registration.Operator(
    "class_activation_map",
    _class_activation_map,
    lambda activations, gradients, method, eps, relu, size, normalize, wants_channels: _new_results(
        activations, gradients, method, size, wants_channels
    ),
    _eager_parts,
    check=_checks.class_activation_map_op,
    tensors=2,
)
weighted_activation_map_op = _registration.Operator(
    "weighted_activation_map",
    _weighted_activation_map,
    lambda activations, weights, relu, size, normalize: _new_results(
        activations, weights, "xgradcam", size, wants_channels=False
    )[0],
    _eager_weighted,
    check=_checks.weighted_activation_map_op,
    tensors=2,
)

class_activation_map_op.register_flops(
    lambda activations, gradients, method, *_: _complexity.class_activation_flops(gradients, method),
)
weighted_activation_map_op.register_flops(
    lambda activations, weights, *_: _complexity.weighted_activation_flops(activations, weights),
)


# ---------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------


def class_activation_parts(
    activations: Tensor,
    gradients: Tensor,
    method: str = "xgradcam",
    eps: float = 1e-6,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
) -> CAMParts:
    """The map of `class_activation_map` and what the same launches know besides.

    Arguments and errors are those of `class_activation_map`. Returns a named tuple; K is there for (N, K, C, h, w)
    gradients, and all of it is float32 (float64 for float64):

    - `map`, (N, [K,] H, W), as `class_activation_map` returns it.
    - `raw`, (N, [K,] h, w), signed: before ReLU, resize and normalisation.
    - `weights`, (N, [K,] C), None for the methods that weigh every pixel.
    - `contributions`, (N, [K,] C), each channel's share of the sum of `raw`; conservation compares their sum with the
      score, sensitivity each of them with the drop of the score without its channel (paper, axioms).
    - `cancellation`, (N, C), `|sum of A| / sum of |A|` over the plane. Near zero, signed activations cancel, and the
      weights of XGrad-CAM, which divide by that sum, are large and mean little.
    """
    eps = _checks.class_activation_map(activations, gradients, method, eps, relu, size, normalize)
    return _parts(activations, gradients, method, eps, relu, size, normalize, wants_channels=True)


def class_activation_map(
    activations: Tensor,
    gradients: Tensor,
    method: str = "xgradcam",
    eps: float = 1e-6,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Class activation map of a layer, from its activations A and the gradients G = dS/dA of a score.

    XGrad-CAM is "Axiom-based Grad-CAM", arXiv 2008.02312. Sums are over the pixels (x, y) of a plane::

        xgradcam     w = sum(G * A) / (sum(A) + eps)                                 arXiv 2008.02312
        gradcam      w = mean(G)                                                     arXiv 1610.02391
        gradcam++    w = sum(relu(G) * G^2 / (2 G^2 + sum(A) * G^3 + eps))           arXiv 1710.11063
        hirescam     map = sum over channels of G * A                                arXiv 2011.08891
        layercam     map = sum over channels of relu(G) * A                          Jiang et al., TIP 2021
        elementwise  map = sum over channels of relu(G * A)

    The first three weigh channels: map = sum over channels of w * A. A quotient whose denominator is zero is zero, so
    dead channels weigh nothing and the map stays finite. The map then goes through ReLU, is resized bilinearly with
    half-pixel centres (`F.interpolate(align_corners=False)`), and normalised to (map - min) / (max - min), which is
    zero for a constant map. Sums are float32 (float64 for float64), their order is fixed, and NaN stays within its
    image. Differentiable; the gradient is computed by the eager twin.

    Args:
        activations: (N, C, h, w), float16, bfloat16, float32 or float64, any strides. View tokens (N, T, C) as
            `tokens[:, -h * w:].transpose(1, 2).unflatten(2, (h, w))`, and (N, h, w, C) as `x.permute(0, 3, 1, 2)`;
            nothing is copied.
        gradients: (N, C, h, w), or (N, K, C, h, w) for K classes an image, any strides. Float64 goes with float64.
        method: one of the names above.
        eps: added to the denominators of "xgradcam" and "gradcam++". The official code and this default have 1e-6,
            pytorch-grad-cam has 1e-7 for XGrad-CAM.
        relu: whether negative values of the map become zero.
        size: the map's (height, width), or an integer for a square; None keeps (h, w).
        normalize: whether to scale each map to [0, 1].
        return_weights: also return the weights of "xgradcam", "gradcam" or "gradcam++".

    Returns:
        (N, h, w), or `(N, *size)`; (N, K, ...) for K classes. Float32, float64 for float64. With `return_weights` this
        map and the weights (N, C) or (N, K, C).

    Raises:
        TypeError: an argument is not a floating-point tensor or not a number, or float64 is mixed with others.
        ValueError: an unknown method, a shape or the device does not fit.
    """
    eps = _checks.class_activation_map(activations, gradients, method, eps, relu, size, normalize, return_weights)
    parts = _parts(activations, gradients, method, eps, relu, size, normalize, wants_channels=return_weights)
    return (parts.map, parts.weights) if return_weights else parts.map


def xgrad_cam(
    activations: Tensor,
    gradients: Tensor,
    eps: float = 1e-6,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`class_activation_map` with method "xgradcam"."""
    return class_activation_map(activations, gradients, "xgradcam", eps, relu, size, normalize, return_weights)


def weighted_activation_map(
    activations: Tensor,
    weights: Tensor,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
) -> Tensor:
    """Class activation map with given weights: sum over the channels of weights * activations.

    With the rows of a final linear layer this is CAM (arXiv 1512.04150), with relative score drops Ablation-CAM.

    Args:
        activations: (N, C, h, w), as for `class_activation_map`.
        weights: (N, C), or (N, K, C) for K maps an image, any strides. Float64 goes with float64.
        relu, size, normalize: as for `class_activation_map`.

    Returns:
        (N, [K,] h, w), or `(N, [K,] *size)`; float32, float64 for float64.

    Raises:
        TypeError: an argument is not a floating-point tensor, or float64 is mixed with others.
        ValueError: a shape or the device does not fit.
    """
    _checks.weighted_activation_map(activations, weights, relu, size, normalize)
    _checks.kernel_device("activations", activations)
    several = weights.dim() == 3
    size = _checks.map_size(size)
    cam = weighted_activation_map_op(activations, weights if several else weights.unsqueeze(1), relu, size, normalize)
    return cam if several else cam.squeeze(1)


def _parts(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    eps: float,
    relu: bool,
    size: int | tuple[int, int] | None,
    normalize: bool,
    wants_channels: bool,
) -> CAMParts:
    _checks.kernel_device("activations", activations)
    several = gradients.dim() == 5
    cam, raw, weights, contributions, cancellation = class_activation_map_op(
        activations,
        gradients if several else gradients.unsqueeze(1),
        method,
        eps,
        relu,
        _checks.map_size(size),
        normalize,
        wants_channels,
    )
    parts = CAMParts(cam, raw, weights if method in _checks.WEIGHING_METHODS else None, contributions, cancellation)
    return parts if several else reference.one_map(parts)
