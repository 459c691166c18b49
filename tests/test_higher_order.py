"""Derivatives of gradients: against float64, of wanted ones only, and at no cost to those who want none."""

from itertools import product

import pytest
import torch
from layouts import channel_slice, channels_last, cropped, scalar, sliced, transposed
from selection import long
from torch.utils._python_dispatch import TorchDispatchMode

from dlu_triton import _verify
from dlu_triton._verify import Case
from dlu_triton.ops import carafe as carafe_ops
from dlu_triton.ops import dlu as dlu_ops

SMALL = Case("small", channels=2, height=2, width=3, kernel_size=3, reach=0.6)
GROUPS = Case("2 groups", channels=2, height=3, width=2, scale_factor=1, kernel_size=3, groups=2)
CASES = (
    Case("groups", batch=2, channels=4, height=2, width=3, kernel_size=3, groups=2, reach=0.6),
    Case("scale 3", channels=3, height=3, width=2, scale_factor=3),
    Case("clamped", channels=2, height=3, width=3, kernel_size=3, reach=4.0),
    Case("channels_last", channels=3, height=2, width=3, kernel_size=3, channels_last=True),
    Case("float32 kernels", channels=2, height=2, width=3, kernel_size=3, kernel_dtype=torch.float32),
)
by_name = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}


def direction(tensor):
    """What a gradient of this tensor is multiplied by: as random as the tensor, and as exact in every type."""
    return tensor.detach().flip(0, 1, 2, 3)


def first_order(call, tensors, grad_output, wanted=None):
    """Gradients, of all tensors unless told, that can be differentiated."""
    return torch.autograd.grad(call(*tensors), tensors if wanted is None else wanted, grad_output, create_graph=True)


def second_order(call, arguments):
    """Gradients of the gradients times a direction, by name of the argument, the upstream gradient included."""
    tensors = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    inputs = [value for name, value in tensors.items() if name != "grad_output"]
    gradients = first_order(call, inputs, tensors["grad_output"])
    found = torch.autograd.grad(gradients, list(tensors.values()), [direction(tensor) for tensor in inputs])
    return dict(zip(tensors, found, strict=True))


def penalty(call, arguments):
    """The same of the squared norm of all gradients."""
    tensors = {name: value.detach().requires_grad_() for name, value in arguments.items() if name != "grad_output"}
    gradients = first_order(call, list(tensors.values()), arguments["grad_output"])
    sum(gradient.norm() ** 2 for gradient in gradients).backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


def third_order(call, arguments):
    """Gradients of the squared norm of the gradients of the squared norm of the gradients."""
    tensors = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    inputs = [value for name, value in tensors.items() if name != "grad_output"]
    gradients = first_order(call, inputs, tensors["grad_output"])
    for _ in range(2):
        total = sum((gradient**2).sum() for gradient in gradients)
        gradients = torch.autograd.grad(total, list(tensors.values()), create_graph=True)
    return {name: gradient.detach() for name, gradient in zip(tensors, gradients, strict=True)}


def away_from_kinks(arguments, case):
    """Offsets that sample between a quarter and three quarters of the way from one pixel to the next, anywhere inside.

    There the operators are smooth; at integers and borders finite differences have no meaning.
    """
    if "offsets" not in arguments:
        return arguments
    offsets, s = arguments["offsets"], case.scale_factor
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.groups, 2, s * s, case.height, case.width)
    sizes = torch.tensor([case.width, case.height]).view(2, 1, 1, 1)
    target = (torch.rand(shape, generator=generator) * (sizes - 1)).floor() + 0.25
    target = target + torch.rand(shape, generator=generator, dtype=offsets.dtype) / 2
    x, y = torch.arange(case.width), torch.arange(case.height)[:, None]
    here = torch.stack([x.expand(case.height, -1), y.expand(-1, case.width)])[:, None]
    # Channels of one group are those of dx, then of dy, each over the s * s outputs of a source pixel.
    return arguments | {"offsets": (target - here).flatten(1, 3).to(offsets)}


@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize("case", (SMALL, GROUPS), **by_name)
def test_gradgradcheck(operator, case, device):
    arguments = away_from_kinks(_verify.inputs(operator, case, torch.float64, device), case)
    del arguments["grad_output"]  # random ones are drawn
    tensors = [value.requires_grad_() for value in arguments.values()]
    call = _verify.function(operator, case, eager=False)
    torch.autograd.gradgradcheck(call, tensors, gen_non_contig_grad_outputs=True, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("results", (second_order, penalty, third_order), ids=lambda results: results.__name__)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), **by_name)
@pytest.mark.parametrize("case", CASES[:-1], **by_name)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_against_float64(operator, case, dtype, results, device):
    for name, found in _verify.compare(operator, case, dtype, device, results).items():
        assert found.passed, f"{name}: kernel {found.kernel:.2e}, eager {found.eager:.2e}, bound {found.bound:.2e}"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), **by_name)
@pytest.mark.parametrize("case", (CASES[0], CASES[-1]), **by_name)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_half_precision(operator, case, dtype, device):
    if not _verify.applies(case, operator, dtype):
        pytest.skip("not a mixture of types")
    for name, found in _verify.compare(operator, case, dtype, device, second_order).items():
        assert found.passed, f"{name}: kernel {found.kernel:.2e}, eager {found.eager:.2e}, bound {found.bound:.2e}"
    arguments = _verify.inputs(operator, case, dtype, device)
    found = second_order(_verify.function(operator, case, eager=False), arguments)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in arguments.items()
    }


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_only_wanted_gradients(operator, device):
    """Any tensors may ask for a gradient, any of these may be taken, and by any of them be differentiated again."""
    arguments = _verify.inputs(operator, SMALL, torch.float64, device)

    def differentiate(call, asking):
        tensors = [value.detach().requires_grad_(ask) for value, ask in zip(arguments.values(), asking, strict=True)]
        output = call(*tensors[:-1])
        inputs = [tensor for tensor in tensors[:-1] if tensor.requires_grad]
        for first in subsets(inputs):
            gradients = torch.autograd.grad(output, first, tensors[-1], create_graph=True)
            total = sum((gradient * direction(gradient)).sum() for gradient in gradients)
            for second in subsets([tensor for tensor in tensors if tensor.requires_grad]):
                if total.requires_grad:
                    found = torch.autograd.grad(
                        total, second, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    yield list(found)
                else:  # what eager knows of a gradient that depends on none of them
                    yield [torch.zeros_like(tensor) for tensor in second]

    for asking in product((True, False), repeat=len(arguments)):
        if any(asking[:-1]):
            expected, found = (
                list(differentiate(_verify.function(operator, SMALL, eager=eager), asking)) for eager in (True, False)
            )
            torch.testing.assert_close(found, expected)


def subsets(tensors):
    """All but the empty one."""
    for chosen in product((True, False), repeat=len(tensors)):
        if any(chosen):
            yield [tensor for tensor, choose in zip(tensors, chosen, strict=True) if choose]


@pytest.mark.parametrize("layout", (sliced, scalar, *long(channels_last, cropped, channel_slice, transposed)))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_layout_changes_no_value(operator, layout, device):
    """Of the arguments, of the upstream gradient, and of what the gradients are multiplied by."""
    arguments = _verify.inputs(operator, CASES[0], torch.float64, device)
    views = {name: layout(value) for name, value in arguments.items()}
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in views.items()}
    expected = second_order(_verify.function(operator, CASES[0], eager=True), plain)
    found = second_order(_verify.function(operator, CASES[0], eager=False), views)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("results", (second_order, penalty, third_order))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_empty_batch(operator, results, device):
    arguments = _verify.inputs(operator, Case("", batch=0, kernel_size=3), torch.float32, device)
    found = results(_verify.function(operator, Case("", batch=0, kernel_size=3), eager=False), arguments)
    assert all(found[name].shape == arguments[name].shape for name in found)


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_several_at_once(operator, device):
    """Batches of upstream gradients, for the gradients and for theirs, as `torch.vmap` and Hessians ask for them."""
    arguments = _verify.inputs(operator, SMALL, torch.float64, device)
    grad_output = arguments.pop("grad_output")
    tensors = [value.requires_grad_() for value in arguments.values()]
    output = _verify.function(operator, SMALL, eager=False)(*tensors)
    upstream = torch.stack([grad_output, direction(grad_output)])

    directions = [torch.stack([direction(tensor), tensor.detach()]) for tensor in tensors]

    def once(upstream):
        return torch.autograd.grad(output, tensors, upstream, create_graph=True)

    def twice(*directions):
        return torch.autograd.grad(once(grad_output), tensors, directions, retain_graph=True)

    gradients, again = torch.vmap(once)(upstream), torch.vmap(twice)(*directions)
    for n in range(2):
        torch.testing.assert_close([each[n] for each in gradients], list(once(upstream[n])))
        torch.testing.assert_close([each[n] for each in again], list(twice(*(each[n] for each in directions))))
    of_batched = torch.autograd.grad([each[0] for each in gradients], tensors, [each[1] for each in directions])
    torch.testing.assert_close(of_batched, twice(*(each[1] for each in directions)))


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_first_order_pays_nothing(operator, device):
    """A plain pass keeps the arguments themselves and nothing else, and its backward is one op that keeps nothing."""
    arguments = _verify.inputs(operator, SMALL, torch.float32, device)
    grad_output = arguments.pop("grad_output")
    tensors = [value.requires_grad_() for value in arguments.values()]
    call = _verify.function(operator, SMALL, eager=False)
    kept, run = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            run.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda kept: kept):
        output = call(*tensors)
        torch.autograd.grad(output, tensors, grad_output)
    assert len(kept) == len(tensors)
    assert all(found.is_set_to(tensor) for found, tensor in zip(kept, tensors, strict=True))
    output = call(*tensors)
    with Record():
        torch.autograd.grad(output, tensors, grad_output)
    assert run == [f"dlu_triton::{operator}_backward"]


def test_opcheck(device):
    """Schema, autograd registration, fake kernels and AOT dispatch of the backward ops, differentiated themselves."""
    case = Case("", channels=4, height=2, width=3, kernel_size=3, groups=2)

    def tensors(operator, layout):
        arguments = _verify.inputs(operator, case, torch.float32, device)
        grad_output = arguments.pop("grad_output")
        return [x.contiguous(memory_format=layout).requires_grad_() for x in (grad_output, *arguments.values())]

    last, first = torch.channels_last, torch.contiguous_format
    for op, operator, layout, flags in (
        (dlu_ops.dlu_upsample_op.gradients.op, "dlu_upsample", last, (True, True, True)),
        (dlu_ops.dlu_upsample_op.gradients.op, "dlu_upsample", first, (False, True, False)),
        (dlu_ops.expand_kernels_op.gradients.op, "expand_kernels", first, (True, False)),
        (carafe_ops.carafe_upsample_op.gradients.op, "carafe_upsample", first, (True, True)),
    ):
        torch.library.opcheck(op, (*tensors(operator, layout), 2, 3, 2, None, *flags))
    # With sizes that vary torch 2.13 fails to trace the derivative of the eager twin, whose input has two sizes in a
    # fixed proportion; without a derivative `test_operators.py` has it.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        carafe_ops.carafe_op.gradients.op, (*tensors("carafe", first), 3, 2, 2, None, True, True), test_utils=checks
    )
