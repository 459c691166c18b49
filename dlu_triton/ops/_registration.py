"""What the registered operators share: joining an op with its derivatives."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def know_shardings(tensor: Tensor) -> None:
    """To be called before an operator is, with an argument of it: DTensors have to know how it runs on shards."""
    if type(tensor) is not Tensor and "torch.distributed.tensor" in sys.modules:
        from . import _sharding  # noqa: F401


def empty_like_wanted(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """What a backward op returns: one tensor like each wanted input."""
    return [torch.empty_like(tensor) for tensor, want in zip(tensors, wanted, strict=True) if want]


def register_autograd(op: Any, backward_op: Any, twin: Callable[..., Tensor], *, tensors: int) -> None:
    """Join an op on `tensors` tensors and some integers with its backward op, and with its eager twin.

    The backward op takes the gradient, the op's own arguments and one flag per tensor, and returns the gradients
    of the flagged tensors. Its own derivatives, of any order, are those of the twin's gradients.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.sizes = inputs[tensors:]

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:tensors]
        gradients = iter(backward_op(grad_output, *ctx.saved_tensors, *ctx.sizes, *wanted))
        return *(next(gradients) if want else None for want in wanted), *(None for _ in ctx.sizes)

    def gradients_of_twin(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        output = twin(*arguments[:-tensors])
        wanted = [tensor for tensor, want in zip(arguments[:tensors], arguments[-tensors:], strict=True) if want]
        return torch.autograd.grad(output, wanted, grad_output, create_graph=True)

    op.register_autograd(backward, setup_context=setup_context)
    register_eager_autograd(backward_op, gradients_of_twin, tensors=1 + tensors)
    backward_op.register_vmap(functools.partial(_one_by_one, backward_op))


def _one_by_one(op: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Several backward passes at once, as `torch.vmap` asks for: a loop."""
    results = [
        op(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    gradients = [torch.stack(each) for each in zip(*results, strict=True)]
    return gradients, [0] * len(gradients)


def register_eager_autograd(op: Any, twin: Callable[..., Sequence[Tensor | None]], *, tensors: int) -> None:
    """Give an op on `tensors` tensors the derivatives, of any order, of an eager twin with the same arguments.

    For ops whose derivative is asked for rarely: the backward runs the twin again. Outputs that the twin returns as
    None have no derivative.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.others = inputs[tensors:]

    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if isinstance(grad_outputs[0], list):  # of an op that returns one
            (grad_outputs,) = grad_outputs
        again = torch.is_grad_enabled()  # a derivative of this one is wanted
        wanted = ctx.needs_input_grad[:tensors]
        with torch.enable_grad():
            inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]  # no graph is followed beyond them
            outputs = zip(twin(*inputs, *ctx.others), grad_outputs, strict=True)
            pairs = [
                (output, grad)
                for output, grad in outputs
                if output is not None and output.requires_grad and grad is not None
            ]
        if not pairs:
            return (None,) * (tensors + len(ctx.others))
        gradients = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                [tensor for tensor, want in zip(inputs, wanted, strict=True) if want],
                [grad for _, grad in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
        return *(next(gradients) if want else None for want in wanted), *(None for _ in ctx.others)

    op.register_autograd(backward, setup_context=setup_context)
