"""torch.func's transforms and forward-mode derivatives of the operators: beside those of the eager twins in float64."""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import dlu_triton
from dlu_triton import CARAFEPack, DLUPack, _launch, _verify, reference
from dlu_triton._verify import Case

CASE = Case("", batch=2, channels=4, height=2, width=3, kernel_size=3, groups=2, reach=0.6)
TINY = Case("", channels=1, height=2, width=2, kernel_size=3, reach=0.6)
CAM = _verify.CAMCase("", "xgradcam", batch=2, channels=3, height=3, width=2, classes=2, size=(5, 4), relu=False)


def squared(call, grad_output):
    return lambda *tensors: (call(*tensors) * grad_output).sum() ** 2


def several(tensors):
    return [torch.stack([x, x.flip(0), 0.5 * x]) for x in tensors]


def all_of(tensors):
    return tuple(range(len(tensors)))


def of_vjp(call, tensors, grad_output):
    output, pull = vjp(call, *tensors)
    return output, pull(grad_output)


def of_nested_grad(call, tensors, grad_output):
    def slope(*tensors):
        return sum(each.square().sum() for each in grad(squared(call, grad_output), all_of(tensors))(*tensors))

    return grad(slope, all_of(tensors))(*tensors)


def of_dual_numbers(call, tensors, grad_output):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in tensors]
        return forward_ad.unpack_dual(call(*duals)).tangent


# Of a function of tensors: what is compared.
TRANSFORMS = {
    "vmap": lambda call, tensors, _: vmap(call)(*several(tensors)),
    "vmap of the first": lambda call, tensors, _: vmap(call, (0, *[None] * (len(tensors) - 1)))(
        several(tensors)[0], *tensors[1:]
    ),
    "vmap of the last": lambda call, tensors, _: vmap(call, (*[None] * (len(tensors) - 1), 2), out_dims=-1)(
        *tensors[:-1], several(tensors)[-1].movedim(0, 2)
    ),
    "vmap of vmap": lambda call, tensors, _: vmap(vmap(call))(*several(several(tensors))),
    "grad": lambda call, tensors, upstream: grad(squared(call, upstream), all_of(tensors))(*tensors),
    "grad of one": lambda call, tensors, upstream: grad(squared(call, upstream), len(tensors) - 1)(*tensors),
    "grad of grad": of_nested_grad,
    "vjp": of_vjp,
    "vmap of grad": lambda call, tensors, upstream: vmap(grad(squared(call, upstream), all_of(tensors)))(
        *several(tensors)
    ),
    "grad of vmap": lambda call, tensors, upstream: grad(squared(vmap(call), upstream), all_of(tensors))(
        *several(tensors)
    ),
    "jvp": lambda call, tensors, _: jvp(call, tuple(tensors), tuple(x.cos() for x in tensors)),
    "vmap of jvp": lambda call, tensors, _: vmap(lambda *xs: jvp(call, xs, xs))(*several(tensors)),
    "dual numbers": of_dual_numbers,
}


def arguments(operator, case, device):
    """Tensors, and the gradient of the output."""
    *tensors, grad_output = _verify.inputs(operator, case, torch.float64, device).values()
    return tensors, grad_output


def assert_same(found, expected):
    for each, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", (*_verify.OPERATORS, _verify.CAM))
def test_transform(operator, transform, path):
    """Without a warning that something is done in a loop."""
    case = CAM if operator == _verify.CAM else CASE
    tensors, grad_output = arguments(operator, case, path)
    if operator == "carafe" and transform == "vmap of the first":
        tensors = [x.requires_grad_() for x in tensors]  # a transform of what autograd follows as well
    expected = TRANSFORMS[transform](_verify.function(operator, case, eager=True), tensors, grad_output)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        found = TRANSFORMS[transform](_verify.function(operator, case, eager=False), tensors, grad_output)
    assert_same(found, expected)


@pytest.mark.parametrize("transform", (jacrev, jacfwd, hessian, lambda call: jacrev(jacrev(call))))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_jacobians(operator, transform, device):
    """Of the tensor that the output does not depend on linearly, if there is one."""
    tensors, grad_output = arguments(operator, TINY, device)

    def of_one(eager):
        call = _verify.function(operator, TINY, eager=eager)
        rest = tensors[2:]
        if operator == "expand_kernels":
            return transform(lambda space: (call(space, tensors[1]) * grad_output).sum())(tensors[0])
        return transform(lambda kernels: (call(tensors[0], kernels, *rest) * grad_output).sum())(tensors[1])

    assert_same(of_one(eager=False), of_one(eager=True))


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_forward_mode_is_the_adjoint_of_the_kernels(operator, device):
    """<J v, u> = <v, J^T u>: forward mode runs the twins, the backward pass the kernels."""
    tensors, grad_output = arguments(operator, CASE, device)
    directions = [torch.randn_like(x) for x in tensors]
    call = _verify.function(operator, CASE, eager=False)
    _, tangent = jvp(call, tuple(tensors), tuple(directions))
    _, gradients = of_vjp(call, tensors, grad_output)
    pulled = sum((v * gradient).sum() for v, gradient in zip(directions, gradients, strict=True))
    torch.testing.assert_close((tangent * grad_output).sum(), pulled)


@pytest.mark.parametrize("operator", (*_verify.OPERATORS, _verify.CAM))
def test_vmap_launches_once(operator, device, monkeypatch):
    """As many kernels for a batch of calls as for one, forward and backward."""
    case = CAM if operator == _verify.CAM else CASE
    tensors, grad_output = arguments(operator, case, device)
    call, launched, launch = _verify.function(operator, case, eager=False), [], _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda *arguments: (launched.append(arguments), launch(*arguments)))
    transformed = call if operator == _verify.CAM else grad(squared(call, grad_output), all_of(tensors))
    transformed(*tensors)
    once = len(launched)
    launched.clear()
    vmap(transformed)(*several(tensors))
    assert len(launched) == once
    assert once > 0 or operator == _verify.CAM  # which launches in its own way


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_vmap_of_empty_batches(operator, device):
    case = Case("", batch=0, channels=2, height=2, width=3, kernel_size=3)
    tensors, grad_output = arguments(operator, case, device)
    assert vmap(_verify.function(operator, case, eager=False))(*several(tensors)).shape == (3, *grad_output.shape)


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_registered_operators_have_a_batching_rule(operator, device):
    """The ops of `torch.ops`, which graphs hold, and their backward ops."""
    tensors, grad_output = arguments(operator, CASE, device)
    sizes = (3, 2, 2, None) if operator == "carafe" else (2, 3, 2, None)
    op, backward = (getattr(torch.ops.dlu_triton, name).default for name in (operator, f"{operator}_backward"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        found = vmap(lambda *xs: op(*xs, *sizes))(*several(tensors))
        flags = [True] * len(tensors)
        gradients = vmap(lambda *xs: backward(*xs, *sizes, *flags))(*several([grad_output, *tensors]))
    expected = [op(*each, *sizes) for each in zip(*several(tensors), strict=True)]
    assert_same(found, torch.stack(expected))
    one_by_one = [backward(*each, *sizes, *flags) for each in zip(*several([grad_output, *tensors]), strict=True)]
    assert_same(gradients, [torch.stack(each) for each in zip(*one_by_one, strict=True)])


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_functionalize(operator, device):
    """Also traced by `make_fx`, which holds the registered op then."""
    tensors, _ = arguments(operator, CASE, device)
    call = _verify.function(operator, CASE, eager=False)
    assert_same(functionalize(call)(*tensors), call(*tensors))
    traced = make_fx(functionalize(call))(*tensors)
    assert f"dlu_triton.{operator}.default" in traced.code
    assert_same(traced(*tensors), call(*tensors))


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_registered_operators_refuse_forward_mode(operator, device):
    """PyTorch would lose the tangent."""
    tensors, _ = arguments(operator, CASE, device)
    sizes = (3, 2, 2, None) if operator == "carafe" else (2, 3, 2, None)
    op = getattr(torch.ops.dlu_triton, operator)
    with pytest.raises(NotImplementedError, match=f"{operator} has no forward-mode derivative"):
        jvp(lambda *xs: op(*xs, *sizes), tuple(tensors), tuple(tensors))


def test_what_has_no_derivative_gives_zeros(device):
    """The weights of a method that has none, asked of the registered op."""
    activations = torch.rand(1, 2, 3, 3, device=device, requires_grad=True)
    settings = ("hirescam", 1e-6, True, None, False, True)
    weights = torch.ops.dlu_triton.class_activation_map(
        activations, torch.rand(1, 1, 2, 3, 3, device=device), *settings
    )[2]
    weights.sum().backward()
    assert activations.grad.count_nonzero() == 0


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_vmap_of_nothing(operator, device):
    tensors, grad_output = arguments(operator, CASE, device)
    found = vmap(_verify.function(operator, CASE, eager=False))(*(x.new_empty(0, *x.shape) for x in tensors))
    assert found.shape == (0, *grad_output.shape)


def test_weighted_maps(path):
    activations, weights = torch.randn(2, 3, 4, 3).double().to(path), torch.randn(2, 3).double().to(path)

    def both(library):
        def call(*tensors):
            return library.weighted_activation_map(*tensors, relu=False, size=(3, 5))

        batched = vmap(call)(*several([activations, weights]))
        return batched, grad(lambda *xs: call(*xs).square().sum(), (0, 1))(activations, weights)

    assert_same(both(dlu_triton), both(reference))


# ---------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------


def packs(module, count, device):
    torch.manual_seed(0)
    made = [module(4, 2, up_kernel=3, compressed_channels=4).to(device, torch.float64) for _ in range(count)]
    for pack in made:
        for parameter in pack.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_gradients_per_sample(module, path):
    """Of a loss of each image, for parameters that all share."""
    (pack,) = packs(module, 1, path)
    x, target = torch.randn(3, 4, 2, 3).double().to(path), torch.randn(3, 4, 4, 6).double().to(path)
    parameters = {name: value.detach() for name, value in pack.named_parameters()}

    def loss(parameters, image, target):
        return (functional_call(pack, parameters, (image[None],)) - target).square().mean()

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, target)
    for n in range(3):
        pack.zero_grad()
        (pack(x[n : n + 1]) - target[n]).square().mean().backward()
        assert_same({name: value[n] for name, value in found.items()}, {k: v.grad for k, v in pack.named_parameters()})


@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_ensemble(module, path):
    """Modules with parameters of their own, in one call."""
    made = packs(module, 3, path)
    parameters, buffers = stack_module_state(made)
    x = torch.randn(2, 4, 3, 2).double().to(path)
    found = vmap(lambda p, b, x: functional_call(made[0], (p, b), (x,)), (0, 0, None))(parameters, buffers, x)
    assert_same(found, torch.stack([pack(x) for pack in made]))


@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_functional_call_does_not_touch_the_module(module, device):
    pack, other = packs(module, 2, device)
    x = torch.randn(1, 4, 3, 2).double().to(device)
    before = {name: value.clone() for name, value in pack.state_dict().items()}
    assert_same(functional_call(pack, dict(other.named_parameters()), (x,)), other(x))
    assert_same(pack.state_dict(), before)
