"""How the registered operators run on `DTensor`s: on shards of the batch, and of the channels where groups allow it.

A module of its own, imported at the first call with a `DTensor` (`Operator._registered`), since
`torch.distributed.tensor` takes long to import. Between processes DTensor moves what no strategy takes as it is.

Each operator here runs as another, `<its name>_on_shards`, for which strategies can be registered: they want a fixed
number of outputs, arguments that are right for a shard, and an integer before all else that outputs depend on, as
DTensor keeps what it finds out by shapes, placements and the arguments from the first integer on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# Importing them registers the operators.
from . import cam, carafe, dlu  # noqa: F401

WHOLE, BATCH, CHANNELS = Replicate(), Shard(0), Shard(1)

# Placements, on one dimension of a mesh, of outputs and of tensor arguments.
_Strategy = tuple[Sequence[Placement], Sequence[Placement]]


def _run_on_shards(
    name: str,
    schema: str,
    on_shards: Callable[..., Any],
    strategies: Callable[..., Sequence[_Strategy]],
    call: Callable[..., Any],
) -> None:
    """Have the operator `name` on DTensors do `call(operator on shards, *arguments)`.

    The operator on shards has this schema, computes `on_shards` and gets shards by `strategies(*arguments)`.
    """
    qualified = f"dlu_triton::{name}"
    operator = torch.library.custom_op(f"{qualified}_on_shards", on_shards, mutates_args=(), schema=schema)
    operator.register_fake(on_shards)

    def placements(*arguments: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        return [
            ([*outputs], [*inputs, *[None] * (len(arguments) - len(inputs))])
            for outputs, inputs in strategies(*arguments)
        ]

    def dispatch(cls: type, op: Any, types: Sequence[type], arguments: Sequence[Any], _: Any) -> Any:
        return call(operator, *arguments)

    register_sharding(getattr(torch.ops.dlu_triton, f"{name}_on_shards").default)(placements)
    torch.library.register_torch_dispatch(qualified, DTensor, dispatch)


def _schema(name: str) -> str:
    """Arguments and results of a registered operator: "(Tensor features, ...) -> Tensor"."""
    return str(getattr(torch.ops.dlu_triton, name).default._schema).partition(f"dlu_triton::{name}")[2]


def _no_shard_is_empty(channels: int, shards: int) -> bool:
    """PyTorch makes shards as large as the first one needs to be; the last ones may get nothing."""
    largest = -(-channels // shards)
    return -(-channels // largest) == shards


def _register_upsampler(
    name: str, *, tensors: int, kernels: int, groups: int, channels_per_group: Callable[[int, int, int], int]
) -> None:
    """Strategies of an operator on `tensors` tensors, three integers, of which that at `groups` is the number of
    groups, and the size of the output, and of its backward operator.

    The tensor at `kernels`, beside which those before it are features, has `channels_per_group(*sizes)` channels a
    group. Groups are beside each other in the channels of every tensor, so where they are sharded evenly, a shard of
    each holds the same groups, and `kernels` tells how many.
    """
    op, backward_op = getattr(torch.ops.dlu_triton, name), getattr(torch.ops.dlu_triton, f"{name}_backward")

    def of_shard(inputs: Sequence[Tensor], sizes: Sequence[Any]) -> list[Any]:
        groups_here = inputs[kernels].shape[1] // channels_per_group(*sizes[:3])
        return [*sizes[:groups], groups_here, *sizes[groups + 1 :]]

    def on_shards(*arguments: Any) -> Tensor:
        inputs, sizes = arguments[:tensors], arguments[tensors:]
        return op(*inputs, *of_shard(inputs, sizes))

    def backward_on_shards(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """All gradients, those that are not wanted empty."""
        inputs, sizes, wanted = arguments[:tensors], arguments[tensors:-tensors], arguments[-tensors:]
        gradients = iter(backward_op(grad_output, *inputs, *of_shard(inputs, sizes), *wanted))
        return tuple(next(gradients) if want else grad_output.new_empty(0) for want in wanted)

    def strategies(*arguments: Any) -> list[_Strategy]:
        found = [([placement], [placement] * tensors) for placement in (WHOLE, BATCH)]
        count = arguments[tensors + groups]
        if count % arguments[0].mesh.size() == 0:  # all of the mesh, as a strategy is for each of its dimensions
            found.append(([CHANNELS], [CHANNELS] * tensors))
        elif count == 1 and _no_shard_is_empty(arguments[0].shape[1], arguments[0].mesh.size()):
            found.append(([CHANNELS], [CHANNELS] * kernels + [WHOLE] * (tensors - kernels)))
        return found if kernels or count > 1 else found[:2]

    def backward_strategies(grad_output: Any, *arguments: Any) -> list[_Strategy]:
        """What is whole beside shards gets a share of its gradient from each."""
        wanted = arguments[-tensors:]
        found = []
        for outputs, inputs in strategies(*arguments):
            share = Partial() if outputs != [WHOLE] else WHOLE
            gradients = [share if placement == WHOLE else placement for placement in inputs]
            gradients = [each if want else WHOLE for each, want in zip(gradients, wanted, strict=True)]
            found.append((gradients, [*outputs, *inputs]))
        return found

    def call_backward(operator: Callable[..., Any], *arguments: Any) -> list[Tensor]:
        return [each for each, want in zip(operator(*arguments), arguments[-tensors:], strict=True) if want]

    _run_on_shards(name, _schema(name), on_shards, strategies, lambda operator, *arguments: operator(*arguments))
    backward_schema = _schema(f"{name}_backward").replace("Tensor[]", f"({', '.join(['Tensor'] * tensors)})")
    _run_on_shards(f"{name}_backward", backward_schema, backward_on_shards, backward_strategies, call_backward)


def _register_map(name: str, *, outputs: int) -> None:
    """Strategies of an operator on two tensors that makes class activation maps, which are sums over all channels."""
    op = getattr(torch.ops.dlu_triton, name)
    first, second, others = _schema(name).split(", ", 2)

    def on_shards(activations: Tensor, beside: Tensor, _: int, *settings: Any) -> Any:
        return op(activations, beside, *settings)

    def strategies(*arguments: Any) -> list[_Strategy]:
        return [([placement] * outputs, [placement] * 2) for placement in (WHOLE, BATCH)]

    def call(operator: Callable[..., Any], activations: Tensor, beside: Tensor, *settings: Any) -> Any:
        return operator(activations, beside, 0, *settings)

    _run_on_shards(name, f"{first}, {second}, SymInt first_integer, {others}", on_shards, strategies, call)


_register_upsampler("carafe", tensors=2, kernels=1, groups=1, channels_per_group=lambda k, g, s: k * k)
_register_upsampler("carafe_upsample", tensors=2, kernels=1, groups=2, channels_per_group=lambda s, k, g: k * k * s * s)
_register_upsampler("dlu_upsample", tensors=3, kernels=1, groups=2, channels_per_group=lambda s, k, g: k * k)
_register_upsampler("expand_kernels", tensors=2, kernels=0, groups=2, channels_per_group=lambda s, k, g: k * k)
_register_map("class_activation_map", outputs=5)
_register_map("weighted_activation_map", outputs=1)
