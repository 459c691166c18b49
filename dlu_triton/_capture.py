"""Running a user's model and reaching into it: activations, scores, gradients, ablations. No maps here.

Hooks are removed whatever happens, `.grad`, training flags and the grad mode are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from . import _checks

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
Target = int | Sequence[Any] | Tensor | np.ndarray | Callable[[Any], Tensor] | None
Layers = nn.Module | str | Sequence[nn.Module | str]
Planes = Callable[[Tensor], Tensor]

MOST_PREFIX_TOKENS = 16  # class and register tokens that are looked for


# ---------------------------------------------------------------------------------------------------------------
# Layers and inputs
# ---------------------------------------------------------------------------------------------------------------


def find_layers(model: nn.Module, layers: Layers, argument: str = "layers") -> dict[str, nn.Module]:
    """The layers by name, from modules of the model or their names."""
    _checks.model(model)
    modules, their_names = ("a module", "its name") if argument == "layer" else ("modules", "their names")
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    if not isinstance(layers, nn.Module | str | Sequence):
        raise TypeError(f"{argument} must be {modules} or {their_names}, got {type(layers).__name__}")
    for layer in [layers] if isinstance(layers, nn.Module | str) else layers:
        if isinstance(layer, str):
            try:
                model.get_submodule(layer)
            except AttributeError as error:
                raise ValueError(f"{argument} must name {modules} of the model, got {layer!r}: {error}") from None
        elif isinstance(layer, nn.Module):
            if id(layer) not in names:
                raise ValueError(f"{argument} must be {modules} of the model, got a {type(layer).__name__} outside it")
            layer = names[id(layer)]
        else:
            raise TypeError(f"{argument} must be {modules} or {their_names}, got {type(layer).__name__}")
        if layer in found:
            raise ValueError(f"{argument} must differ, got {layer!r} twice")
        found[layer] = model.get_submodule(layer)
    if not found:
        raise ValueError(f"{argument} must have at least one layer, got none")
    return found


def one_layer(model: nn.Module, layer: nn.Module | str) -> dict[str, nn.Module]:
    if isinstance(layer, Sequence) and not isinstance(layer, str) and len(layer) != 1:
        raise ValueError(f"layer must be one layer, got {len(layer)}")
    return find_layers(model, layer, "layer")


def require_evaluation(model: nn.Module) -> None:
    """For what runs a model on changed activations, of which batch normalisation must not learn."""
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm | _DropoutNd):
            raise ValueError(f"model must be in evaluation mode, got {name!r} in training mode")


def run(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*_values(inputs))


def image_of(inputs: Inputs, index: int, batch: int) -> Inputs:
    """The inputs of one image: of every tensor whose first dimension is the batch its own."""

    def pick(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        return value[index : index + 1] if batched else value

    return _map_inputs(pick, inputs)


def repeated(inputs: Inputs, times: int) -> Inputs:
    """The inputs of one image, as often as told."""

    def repeat(value: Any) -> Any:
        one = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1
        return value.expand(times, *value.shape[1:]) if one else value

    return _map_inputs(repeat, inputs)


def image_size(inputs: Inputs) -> tuple[int, int] | None:
    """Height and width of the first batch of images among the inputs."""
    for value in _values(inputs):
        if isinstance(value, Tensor) and value.dim() == 4:
            return value.shape[2], value.shape[3]
    return None


def map_size(size: int | tuple[int, int] | None, inputs: Inputs) -> tuple[int, int]:
    """Height and width of maps, by default those of the images."""
    wanted = _checks.map_size(size) or image_size(inputs)
    if wanted is None:
        raise ValueError(
            f"size must be given unless one of the inputs is a batch of images (N, C, H, W), got {_described(inputs)}"
        )
    return wanted


def _described(inputs: Inputs) -> str:
    """Kinds and shapes, for an error message."""
    values = [
        f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__ for value in _values(inputs)
    ]
    return ", ".join(values) or "no inputs"


def images_in(inputs: Inputs, layers: Mapping[str, Tensor]) -> int:
    """Images among the inputs, which come first in the outputs of the layers too."""
    tensors = [value for value in _values(inputs) if isinstance(value, Tensor) and value.dim() > 0]
    images = [value for value in tensors if value.dim() == 4] or tensors
    batch = len((images or list(layers.values()))[0])
    for name, output in layers.items():
        if output.dim() == 0 or len(output) != batch:
            raise ValueError(
                f"layer {name!r} must have the {batch} images first in its output, got shape {tuple(output.shape)}"
            )
    return batch


def _values(inputs: Inputs) -> Sequence[Any]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise TypeError(f"inputs must be a tensor, a sequence or a mapping of arguments, got {type(inputs).__name__}")
    return inputs


def _map_inputs(function: Callable[[Any], Any], inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    return [function(value) for value in inputs]


# ---------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str, Tensor], Tensor | None], *, all_run: bool = True
) -> Iterator[None]:
    """Call `hook(name, output)` after each module; what it returns goes on in place of the output.

    Raises RuntimeError where one of them did not run, unless `all_run` is False.
    """
    ran = set()

    def after(name: str) -> Callable[..., Any]:
        def call(module: nn.Module, arguments: Any, output: Any) -> Any:
            ran.add(name)
            several = isinstance(output, tuple | list) and len(output) > 0
            tensor = output[0] if several else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(
                    f"layer {name!r} must return a floating-point tensor, or a tuple that starts with one, "
                    f"got {type(tensor).__name__}"
                )
            changed = hook(name, tensor)
            if changed is None or not several:
                return changed
            rest = (changed, *output[1:])
            return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

        return call

    handles = [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        if all_run and name not in ran:  # compiled code does not know of hooks that came later
            raise RuntimeError(
                f"layer {name!r} did not run, or not in sight of hooks; of a compiled model, pass the original"
            )


def run_with_graph(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs) -> tuple[Any, dict[str, Tensor]]:
    """The model's output, with a graph that starts at the first of the layers, and the true output of each layer.

    What precedes the first layer runs without a graph. A layer's output is copied twice: one copy is kept, as the
    model may change the output itself in place, and one goes on, as the model may change that too.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "explaining needs gradients, which torch.inference_mode() rules out: leave it, or use torch.no_grad()"
        )
    captured: dict[str, Tensor] = {}

    def capture(name: str, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # from here on, until `no_grad` below ends
        captured[name] = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
        return captured[name].clone()

    with hooked(layers, capture), torch.no_grad():
        output = run(model, inputs)
    return output, {name: captured[name] for name in layers}


# ---------------------------------------------------------------------------------------------------------------
# Scores and gradients
# ---------------------------------------------------------------------------------------------------------------


def logits_of(output: Any) -> Tensor:
    """The output itself, or its `logits`."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return a tensor or have `logits` in its output, unless target is a callable, "
            f"got {type(output).__name__}"
        )
    return logits


@dataclass(frozen=True)
class Scores:
    """Which scores of an output are explained: classes by index, or functions of the output."""

    indices: Tensor | None  # (N,) or (N, K), on the device of the output
    functions: Callable[[Any], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None

    def of(self, output: Any, image: int | None = None) -> Tensor:
        """(N,) or (N, K); with `image`, of an output all of whose rows belong to that image."""
        if self.indices is not None:
            logits = logits_of(output)
            indices = self.indices
            if image is not None:
                indices = indices[image : image + 1].expand(len(logits), *indices.shape[1:])
            if indices.dim() == 1:
                return logits.gather(1, indices.unsqueeze(1)).squeeze(1)
            return logits.gather(1, indices)
        if callable(self.functions):
            return self.functions(output)
        logits = logits_of(output)
        functions = self.functions if image is None else [self.functions[image]] * len(logits)
        scores = [function(row) for function, row in zip(functions, logits, strict=True)]
        return torch.stack([score.squeeze() for score in scores])


def resolve(target: Target, output: Any, batch: int) -> Scores:
    """Check the target against the output of a batch; indices in CUDA tensors are checked by the device, later."""
    if callable(target):
        return Scores(None, target)
    if isinstance(target, Sequence) and not isinstance(target, str):
        if len(target) != batch:
            raise ValueError(f"target must have one entry for each of the {batch} images, got {len(target)}")
        if target and all(callable(entry) for entry in target):
            return Scores(None, list(target))
    logits = logits_of(output)
    if logits.dim() != 2 or logits.shape[0] != batch:
        raise ValueError(
            f"target must be a callable unless the model returns one row of class scores for each of the {batch} "
            f"images, got output shape {tuple(logits.shape)}"
        )
    if target is None:
        return Scores(logits.detach().argmax(1), None)
    if isinstance(target, Sequence) and not isinstance(target, str):
        try:
            target = torch.tensor(target) if target else torch.zeros(0, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"target must be class indices or callables, got {target!r}: {error}") from None
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    if not isinstance(target, Tensor):
        number = _checks.integer("target", target, 0, logits.shape[1] - 1)
        return Scores(torch.full((batch,), number, device=logits.device), None)
    _checks.class_indices(target, batch, logits)
    return Scores(target.to(logits.device, torch.long, non_blocking=True), None)


def checked_scores(scores: Tensor, batch: int) -> Tensor:
    """(N,) or (N, K); a scalar is the score of a single image."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"target must return a tensor of scores, got {type(scores).__name__}")
    if scores.dim() == 0 and batch == 1:
        scores = scores.unsqueeze(0)
    if scores.dim() not in (1, 2) or scores.shape[0] != batch or 0 in scores.shape[1:]:
        raise ValueError(
            f"target must return scores of shape (N,) or (N, K) with N = {batch}, got {tuple(scores.shape)}"
        )
    return scores


def gradients(
    scores: Tensor, tensors: Sequence[Tensor], chunk_size: int | None, *, unused_are_zero: bool = False
) -> list[Tensor]:
    """Gradients of (N,) scores like the tensors, or of (N, K) scores as (N, K, ...), `chunk_size` classes at a time."""
    if not scores.requires_grad:
        raise RuntimeError(
            "the scores have no graph back to the layer: something after it detaches or runs under no_grad, or the "
            "layer itself runs in a block that sets the grad mode, at whose end it is off again"
        )

    def backward(upstream: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(scores, tensors, upstream, retain_graph=scores.dim() == 2, allow_unused=True)
        if not unused_are_zero and any(gradient is None for gradient in found):
            raise RuntimeError("the scores do not depend on the layer")
        return [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(tensors, found, strict=True)
        ]

    if scores.dim() == 1:
        return backward(torch.ones_like(scores))
    n, k = scores.shape
    step = k if chunk_size is None else _checks.integer("chunk_size", chunk_size, 1)
    classes = torch.eye(k, dtype=scores.dtype, device=scores.device).unsqueeze(1).expand(k, n, k)
    if min(step, k) == 1:
        each = [torch.stack(one) for one in zip(*map(backward, classes), strict=True)]
    else:
        try:
            each = torch.vmap(backward, chunk_size=step)(classes)
        except RuntimeError as error:
            error.add_note("dlu_triton: several classes take one batched backward; chunk_size=1 takes them one by one")
            raise
    return [gradient.transpose(0, 1) for gradient in each]


# ---------------------------------------------------------------------------------------------------------------
# Planes
# ---------------------------------------------------------------------------------------------------------------


def planes(
    shape: Sequence[int], image: tuple[int, int] | None, grid: tuple[int, int] | None, layout: str | None
) -> Planes:
    """How a layer's output is viewed as (..., C, h, w): convolutional maps, Swin's (N, h, w, C), or tokens (N, T, C).

    Without `layout` a 4-dimensional output is taken as (N, h, w, C) where only that has the proportions of the image.
    Tokens without `grid` are arranged in the proportions of the image, after the fewest leading tokens that allow it.
    """
    if layout is None:
        layout = "NTC" if len(shape) == 3 else "NCHW"
        if len(shape) == 4 and image is not None:
            fits_last = _proportional(shape[1], shape[2], *image)
            layout = "NHWC" if fits_last and not _proportional(shape[2], shape[3], *image) else "NCHW"
    if len(shape) != len(layout):
        raise ValueError(
            f"the layer's output must be (N, C, h, w), (N, h, w, C) or (N, T, C), here {layout}, got shape "
            f"{tuple(shape)}: take a layer before pooling and flattening"
        )
    if layout == "NCHW":
        return lambda x: x
    if layout == "NHWC":
        return lambda x: x.movedim(-1, -3)
    h, w = grid or _token_grid(shape[1], image)
    if h * w > shape[1]:
        raise ValueError(f"grid must have at most as many places as there are tokens, {shape[1]}, got {(h, w)}")
    return lambda x: x[..., shape[1] - h * w :, :].transpose(-1, -2).unflatten(-1, (h, w))


def _proportional(h: int, w: int, height: int, width: int) -> bool:
    """Whether an h x w map can be what strides left of the image, each side rounded up or down."""
    return (h - 1) * width < (w + 1) * height and (w - 1) * height < (h + 1) * width


def _token_grid(tokens: int, image: tuple[int, int] | None) -> tuple[int, int]:
    height, width = image or (1, 1)
    for places in range(tokens, max(tokens - MOST_PREFIX_TOKENS, 1) - 1, -1):
        h = round((places * height / width) ** 0.5)
        for rows in (h, h + 1, h - 1):
            if rows > 0 and places % rows == 0:
                columns = places // rows
                # Square patches: as many pixels to a row as to a column.
                if rows * width == columns * height:
                    return rows, columns
    raise ValueError(
        f"grid must be given: {tokens} tokens do not fill a grid of the image's proportions {height} x {width} "
        f"after up to {MOST_PREFIX_TOKENS} leading tokens"
    )


# ---------------------------------------------------------------------------------------------------------------
# Ablation
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def channel_drops(
    model: nn.Module,
    layer: Mapping[str, nn.Module],
    inputs: Inputs,
    target: Target,
    view: Callable[[Sequence[int]], Planes],
    *,
    batch_size: int,
    reuse_trunk: bool,
    progress: bool,
) -> tuple[Tensor, Tensor, Any, Scores, Tensor]:
    """Drops (N, [K,] C), planes (N, C, h, w), output, scores' rule and scores, each channel really zeroed."""
    require_evaluation(model)
    kept: list[Tensor] = []

    def keep(name: str, output: Tensor) -> Tensor:
        kept.append(output.clone())  # the model may change the output itself in place
        return output.clone()

    with hooked(layer, keep):
        output = run(model, inputs)
    if len(kept) != 1:
        raise ValueError(f"the layer must run exactly once in a forward pass for ablation, ran {len(kept)} times")
    batch = images_in(inputs, dict.fromkeys(layer, kept[0]))
    rule = resolve(target, output, batch)
    scores = checked_scores(rule.of(output), batch)
    as_planes = view(kept[0].shape)
    activations = as_planes(kept[0])
    channels = activations.shape[1]
    after = scores.new_empty((*scores.shape, channels))
    with _progress_bar(progress, batch * channels) as advance:
        for image in range(batch):
            one = image_of(inputs, image, batch)
            for first in range(0, channels, batch_size):
                zeroed = torch.arange(first, min(first + batch_size, channels), device=activations.device)
                rows = len(zeroed)

                def ablate(name: str, output: Tensor, zeroed: Tensor = zeroed) -> Tensor:
                    output = output.expand(len(zeroed), *output.shape[1:]).clone()
                    as_planes(output)[torch.arange(len(zeroed), device=zeroed.device), zeroed] = 0
                    return output

                try:
                    with hooked(layer, ablate):
                        ablated = rule.of(run(model, one if reuse_trunk else repeated(one, rows)), image)
                        ablated = checked_scores(ablated, rows)
                except (RuntimeError, ValueError) as error:
                    if reuse_trunk:
                        error.add_note(
                            "dlu_triton: the layer's output was given to the rest of the model in batches, after one "
                            "pass of its trunk; reuse_trunk=False repeats the inputs instead, for models that "
                            "fix the batch size before the layer"
                        )
                    raise
                after[image, ..., first : first + rows] = ablated.movedim(0, -1)
                advance(rows)
    return scores.unsqueeze(-1) - after, activations, output, rule, scores


@contextmanager
def _progress_bar(wanted: bool, total: int) -> Iterator[Callable[[int], Any]]:
    if not wanted:
        yield lambda steps: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm, which the extra [explain] of dlu-triton installs") from error
    with tqdm(desc="Zeroing", total=total, unit="channel", leave=False) as bar:
        yield bar.update
