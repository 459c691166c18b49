"""What the operators share: how each is registered with PyTorch, differentiated, and which way a call of it takes."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .. import _checks, _launch

PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """An operator by all the ways that lead to it.

    Called with tensors first and everything positional, it takes the first that fits of

    - inside a level of forward-mode differentiation: the eager twin, as registered ops would drop the derivative;
    - while tracing (torch.compile, torch.export): the registered op, which stands in the graph; on a CPU, or for ONNX,
      the traced form;
    - on plain CPU tensors: the eager twin;
    - inside torch.func's transforms: an `autograd.Function` that they can take apart;
    - for tensor subclasses, under modes that want to see operators (DTensor, FakeTensor, FlopCounterMode), for views
      with a lazy negation and zeros without memory: the registered op, which on CPU tensors computes by the eager twin;
    - in eager PyTorch: the launches themselves, inside an `autograd.Function` if a gradient may be wanted. A registered
      op would cost the host about half as much again (`bench/NOTES.md`, "Host").

    Args:
        name: of the registered op, `torch.ops.dlu_triton.<name>`.
        launch: computes the result by kernels; its annotations are the schema.
        fake: what `launch` returns, uninitialised.
        twin: the same in plain PyTorch.
        traced: the same in operators that compilers and exporters do well with; the twin, if not given.
        check: raises for arguments of the registered op that do not fit. Public functions have checked theirs before
            they call the operator; the registered op can be called by anybody, and is in exported programs. Its fake
            checks devices alone, since sizes there may be symbols, which a check would tie to a number.
        tensors: how many arguments are tensors.
        gradients: computes the derivatives by kernels: takes the gradient of the one output, all arguments and a flag
            per tensor, and returns a list of the gradients of the flagged tensors. Its own derivatives, and those of
            operators without it, are the twin's, of any order.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        twin: Callable[..., Any],
        *,
        check: Callable[..., object],
        tensors: int,
        traced: Callable[..., Any] | None = None,
        gradients: Callable[..., list[Tensor]] | None = None,
    ) -> None:
        self.launch, self.twin, self.traced, self.tensors, self._fake = launch, twin, traced or twin, tensors, fake
        self._check = check
        self._parameters = list(inspect.signature(launch).parameters)
        self.gradients: Operator | None = None
        if gradients is not None:
            self.gradients = Operator(
                f"{name}_backward",
                gradients,
                self._fake_gradients,
                self._gradients_of_twin,
                check=self._check_gradients,
                tensors=1 + tensors,
            )
        self.name = name
        registered = torch.library.custom_op(f"dlu_triton::{name}", self._as_registered(launch), mutates_args=())
        registered.register_fake(self._fake_registered)
        registered.register_autograd(self._differentiate, setup_context=self._keep)
        registered.register_vmap(self._fold_registered)

        def on_a_cpu(*arguments: Any) -> Any:  # asked at each call, since tests emulate kernels on CPU tensors
            return (launch if _launch.runs_kernels(arguments[0]) else self._by_twin)(*arguments)

        registered.register_kernel("cpu", self._as_registered(on_a_cpu))
        self.op = getattr(torch.ops.dlu_triton, name).default
        self._lists = isinstance(self.op._schema.returns[0].type, torch.ListType)
        self._eager = _function(name, forward=self._forward_and_keep, backward=self._differentiate)
        self._transformed = _function(
            name, forward=self._forward, setup_context=self._keep, backward=self._differentiate, vmap=self._fold
        )

    def __call__(self, *arguments: Any) -> Any:
        kernels = _launch.runs_kernels(arguments[0])
        tensors = arguments[: self.tensors]
        if forward_ad._current_level >= 0:
            return self.twin(*arguments)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            registered = (kernels and not torch.onnx.is_in_onnx_export()) or _sharded(tensors)
            return (self._registered if registered else self.traced)(*arguments)
        plain = _plain(tensors)
        if plain and not kernels:
            return self.twin(*arguments)
        if torch._C._are_functorch_transforms_active() and not _functionalized():
            return self._transformed.apply(*arguments)
        if not plain or _functionalized():
            return self._registered(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self._eager.apply(*arguments)
        return self.launch(*arguments)

    def register_flops(self, formula: Callable[..., int]) -> None:
        """Have `torch.utils.flop_counter.FlopCounterMode` count by a formula that takes the arguments, with shapes for
        tensors."""
        flop_registry.pop(self.op.overloadpacket, None)  # PyTorch refuses a second one, and modules may be reloaded
        register_flop_formula(self.op.overloadpacket)(lambda *arguments, out_shape: formula(*arguments))

    def _registered(self, *arguments: Any) -> Any:
        if _sharded(arguments[: self.tensors]):
            from . import _sharding  # noqa: F401  # by which DTensors know what to do
        return self.op(*arguments)

    def _as_registered(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """What computes the registered op, of arguments that fit: PyTorch would take it for a constant in forward
        mode."""

        @functools.wraps(compute)
        def run(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0:
                raise NotImplementedError(
                    f"torch.ops.dlu_triton.{self.name} has no forward-mode derivative; dlu_triton's functions have one"
                )
            self._check(*arguments)
            _checks.kernel_device(self._parameters[0], arguments[0])
            return compute(*arguments)

        return run

    def _check_gradients(self, grad_output: Tensor, *arguments: Any) -> None:
        """Of an upsampler, whose first tensor is the one that it upsamples."""
        self._check(*arguments[: -self.tensors])
        scale_factor, size = (arguments[self._parameters.index(name)] for name in ("scale_factor", "output_size"))
        names = self.gradients._parameters[0], self._parameters[0]
        _checks.upstream(names[0], grad_output, names[1], arguments[0], scale_factor, size)

    def _forward(self, *arguments: Any) -> Any:
        """Inside a Function: nothing is differentiated or transformed any more."""
        result = (self.launch if _plain(arguments[: self.tensors]) else self._registered)(*arguments)
        return tuple(result) if isinstance(result, list) else result

    def _forward_and_keep(self, ctx: Any, *arguments: Any) -> Any:
        result = self.launch(*arguments)
        self._keep(ctx, arguments, result)
        return tuple(result) if self._lists else result

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: self.tensors])
        ctx.others = inputs[self.tensors :]

    def _differentiate(self, ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if isinstance(grad_outputs[0], list):  # of an op that returns one
            (grad_outputs,) = grad_outputs
        others = (None,) * len(ctx.others)
        if all(grad is None for grad in grad_outputs):
            return (None,) * self.tensors + others
        wanted = ctx.needs_input_grad[: self.tensors]
        if self.gradients is not None:
            gradients = self.gradients(grad_outputs[0], *ctx.saved_tensors, *ctx.others, *wanted)
        else:
            gradients = _pull_back(self.twin, ctx.saved_tensors, ctx.others, wanted, grad_outputs)
        gradients = iter(gradients)
        return *[next(gradients) if want else None for want in wanted], *others

    def _gradients_of_twin(self, grad_output: Tensor, *arguments: Any) -> Sequence[Tensor]:
        n = self.tensors
        return _pull_back(self.twin, arguments[:n], arguments[n:-n], arguments[-n:], (grad_output,))

    def _fake_registered(self, *arguments: Any) -> Any:
        """PyTorch takes it for real tensors too, if there is a meta tensor among them."""
        first, *others = zip(self._parameters, arguments[: self.tensors], strict=False)
        for other in others:
            _checks.same_device(*other, *first)
        return self._fake(*arguments)

    def _fake_gradients(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        pairs = zip(arguments[: self.tensors], arguments[-self.tensors :], strict=True)
        return [torch.empty_like(tensor) for tensor, want in pairs if want]

    def _fold(
        self, info: Any, in_dims: tuple[int | None, ...], *arguments: Any, run: Callable[..., Any] | None = None
    ) -> tuple[Any, Any]:
        """A batch dimension of vmap goes into that of the images, which all tensors and results have first."""
        size, count = info.batch_size, self.tensors
        batched = [
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments[:count], in_dims[:count], strict=True)
        ]
        images = batched[0].shape[1]

        def unfold(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (size, images))

        results = (run or self)(*(tensor.flatten(0, 1) for tensor in batched), *arguments[count:])
        if isinstance(results, Tensor):
            return unfold(results), 0
        return tuple(unfold(each) for each in results), (0,) * len(results)

    def _fold_registered(self, *arguments: Any) -> tuple[Any, Any]:
        """Calls the op, which returns a list if it did before."""
        results, dims = self._fold(*arguments, run=self.op)
        return (list(results), list(dims)) if self._lists else (results, dims)

    def _by_twin(self, *arguments: Any) -> Any:
        """By the twin, with the strides that the registered op promises."""
        twin = torch.no_grad()(self.twin)
        if self._lists:  # gradients: in a thread of its own, as inside an op the dispatcher knows no derivatives
            with ThreadPoolExecutor(1) as thread:
                results = thread.submit(twin, *arguments).result()
        else:
            results = twin(*arguments)
        promised = self._fake(*arguments)
        if isinstance(promised, Tensor):
            return promised.copy_(results)
        return type(promised)(new.copy_(result) for new, result in zip(promised, results, strict=True))


def _function(name: str, **methods: Callable[..., Any]) -> Any:
    """An `autograd.Function`; profilers show its name."""
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are tensors whose values are in memory, and nobody wants to see what is done with them.

    Those of a lazy negation, which such views as the imaginary part of a conjugate have, and zeros without memory,
    which PyTorch makes as gradients, are not; it resolves them on the way to a registered op.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        type(tensor) in PLAIN and not (tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor())
        for tensor in tensors
    )


def _sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these is a DTensor."""
    if all(type(tensor) in PLAIN for tensor in tensors):
        return False
    sharding = sys.modules.get("torch.distributed.tensor")  # takes long to import, and who has a DTensor has done so
    return sharding is not None and any(isinstance(tensor, sharding.DTensor) for tensor in tensors)


def _functionalized() -> bool:
    """Whether the innermost transform is `functionalize`, which takes no Function apart."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Functionalize


def _pull_back(
    twin: Callable[..., Any],
    tensors: Sequence[Tensor],
    others: Sequence[Any],
    wanted: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> Sequence[Tensor]:
    """Gradients of the wanted tensors by an eager twin, differentiable again, in any order and by any transform."""

    def outputs(*some: Tensor) -> tuple[Tensor, ...]:
        """Those with a gradient."""
        given = iter(some)
        results = twin(*(next(given) if want else t for t, want in zip(tensors, wanted, strict=True)), *others)
        results = (results,) if isinstance(results, Tensor) else results
        return tuple(result for result, grad in zip(results, grad_outputs, strict=True) if grad is not None)

    _, pull = torch.func.vjp(outputs, *(t for t, want in zip(tensors, wanted, strict=True) if want))
    return pull(tuple(grad for grad in grad_outputs if grad is not None))
