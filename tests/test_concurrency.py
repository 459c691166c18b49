"""Threads, forked and spawned processes, repeated imports, and processes that differ in TRITON_INTERPRET."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import layouts
import pytest
import torch
from conftest import INTERPRETED
from test_deterministic import deterministic

import dlu_triton
from dlu_triton import CARAFEPack, DLUPack, _launch, _verify

TESTS = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Not here: it would be put back while threads run."""


def run(*command, interpret):
    """What a process prints, with TRITON_INTERPRET as given, or as here for None."""
    environment = dict(os.environ) if interpret is None else {**os.environ, "TRITON_INTERPRET": interpret}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    process = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr.decode()[-4000:]
    return process.stdout


def run_code(code, *arguments, interpret=None):
    return run("-c", textwrap.dedent(code), *arguments, interpret=interpret).decode().split()


def in_threads(*works):
    """Run them at once; what they return, or what the first that fails raises."""
    barrier, found, failed = threading.Barrier(len(works)), [None] * len(works), []

    def work(index):
        try:
            barrier.wait()
            found[index] = works[index]()
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


@pytest.fixture
def many_switches():
    """Threads take turns after a few microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------

SMALL = _verify.Case("", channels=4, height=2, width=3, kernel_size=3)
WORK = {
    "dlu_upsample": (SMALL, torch.float32, layouts.channels_last),
    "expand_kernels": (_verify.Case("", height=3, width=2, kernel_size=3, groups=2), torch.float64, layouts.sliced),
    "carafe": (_verify.Case("", channels=6, height=3, width=3, kernel_size=3, groups=2), torch.bfloat16, None),
    "carafe_upsample": (_verify.Case("", batch=2, channels=3, height=2, width=2), torch.float16, layouts.transposed),
    _verify.CAM: (_verify.CAMCase("", "xgradcam", channels=5, height=3, width=4), torch.float32, None),
}


def work_on(operator, device):
    """A function without arguments that calls an operator forward and backward and returns all it finds."""
    case, dtype, layout = WORK[operator]
    arguments = _verify.inputs(operator, case, dtype, device)
    if layout is not None:
        arguments = {name: layout(value) for name, value in arguments.items()}
    call = _verify.function(operator, case, eager=False)
    return lambda: list(_verify.results(call, arguments).values())


def same_bits(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def rounds_for(device):
    on_cpu = device.type == "cpu"
    return 1 if on_cpu and _launch.runs_kernels(torch.empty(0)) else 30 if on_cpu else 100


def test_threads_get_what_each_gets_alone(path, many_switches):
    """All operators at once, each in two threads, in the interpreter in one; sizes, types and layouts of their own."""
    with deterministic():
        works = [work_on(operator, path) for operator in WORK]
        alone = [work() for work in works]

        def repeat(work, expected):
            return lambda: [same_bits(work(), expected) for _ in range(rounds_for(path))]

        repeats = [repeat(*pair) for pair in zip(works, alone, strict=True)]
        assert all(all(same) for same in in_threads(*repeats, *([] if _launch.INTERPRETED else repeats)))
        assert all(same_bits(work(), expected) for work, expected in zip(works, alone, strict=True))


def test_a_graph_is_differentiated_in_another_thread(path):
    """Also by two threads at once, of one graph."""
    case, dtype, _ = WORK["dlu_upsample"]
    with deterministic():
        arguments = _verify.inputs("dlu_upsample", case, dtype, path)
        grad_output = arguments.pop("grad_output")
        leaves = [value.requires_grad_() for value in arguments.values()]
        call = _verify.function("dlu_upsample", case, eager=False)
        expected = torch.autograd.grad(call(*leaves), leaves, grad_output)
        (output,) = in_threads(lambda: call(*leaves))

        def differentiate():
            return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

        for found in in_threads(differentiate, differentiate):
            assert same_bits(found, expected)


def test_settings_of_a_thread_stay_in_it(path):
    """Autocast and grad mode are of a thread; calls happen while other threads are inside of their own."""
    features, masks = torch.rand(1, 4, 2, 3, device=path, requires_grad=True), torch.rand(1, 9, 4, 6, device=path)
    inside = threading.Barrier(4)

    def call():
        inside.wait()
        found = [dlu_triton.carafe(features, masks, 3, 1, 2) for _ in range(3)]
        inside.wait()
        return {(each.dtype, each.requires_grad, each.is_inference()) for each in found}

    def under(*contexts):
        def work():
            if not contexts:
                return call()
            with contexts[0]():
                return call()

        return work

    found = in_threads(
        under(),
        under(lambda: torch.autocast(path.type, dtype=torch.bfloat16)),
        under(torch.no_grad),
        under(torch.inference_mode),
    )
    assert found == [
        {(torch.float32, True, False)},
        {(torch.bfloat16, True, False)},
        {(torch.float32, False, False)},
        {(torch.float32, False, True)},
    ]


def test_backward_of_an_autocast_region_in_another_thread(path):
    """Which is outside of the region: gradients have the types of their leaves, and the values of this thread."""
    features, masks = torch.rand(1, 4, 2, 3, device=path, requires_grad=True), torch.rand(1, 9, 4, 6, device=path)
    with torch.autocast(path.type, dtype=torch.bfloat16):
        output = dlu_triton.carafe(features, masks, 3, 1, 2)
    expected = torch.autograd.grad(output, features, output.detach(), retain_graph=True)
    (found,) = in_threads(lambda: torch.autograd.grad(output, features, output.detach()))
    assert same_bits(found, expected)
    assert found[0].dtype == torch.float32


@pytest.fixture(scope="module")
def launches():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("the same without the interpreter")
    return json.loads(run(TESTS / "launch_from_threads.py", interpret="0"))


@pytest.mark.parametrize("step", ("first", "again", "forgotten when full", "forgotten by a thread"))
def test_launches_of_threads_are_not_mixed_up(launches, step):
    """Compiled kernels, arguments and streams of each launch are those of the thread: while kernels are compiled, while
    launches are repeated, and while another thread forgets them."""
    found = launches[step]
    assert found["launches of a round"] == 20
    assert set(found["rounds"]) == ({1} if step == "first" else {25})
    assert found["wrong"] == []


FIRST = """
    import sys, threading
    import torch
    sys.setswitchinterval(1e-5)
    torch.manual_seed(0)
    features, masks = torch.rand(2, 4, 2, 3), torch.rand(2, 9, 4, 6)
    barrier, found = threading.Barrier(4), []
    def work():
        barrier.wait()
        found.append(first())
    def in_threads():
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(found) == 4, found
"""


def test_first_imports_and_calls_race(path):
    code = textwrap.dedent(FIRST) + textwrap.dedent("""
    def first():
        import dlu_triton
        x = features.clone().requires_grad_()
        output = dlu_triton.carafe(x, masks, 3, 1, 2)
        registered = torch.ops.dlu_triton.carafe(x, masks, 3, 1, 2, None)
        return output, registered, *torch.autograd.grad(output, x, output.detach())
    in_threads()
    alone = first()
    assert all(torch.equal(*pair) for each in found for pair in zip(each, alone)), found
    assert not torch.cuda.is_initialized()
    print("done")
    """)
    interpret = "1" if path.type == "cpu" and _launch.INTERPRETED else "0"
    assert run_code(code, interpret=interpret) == ["done"]


def test_first_calls_on_shards_race():
    """The first call with a `DTensor` registers the rules of shards."""
    code = textwrap.dedent(FIRST) + textwrap.dedent("""
    import tempfile
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    import dlu_triton
    file = tempfile.NamedTemporaryFile()
    dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    assert "dlu_triton.ops._sharding" not in sys.modules
    def first():
        x, y = (DTensor.from_local(each.clone().requires_grad_(), mesh, [Shard(0)]) for each in (features, masks))
        output = dlu_triton.carafe(x, y, 3, 1, 2)
        assert output.placements == (Shard(0),)
        return [each.to_local() for each in (output, *torch.autograd.grad(output, [x, y], output.detach()))]
    in_threads()
    alone = first()
    assert all(torch.equal(*pair) for each in found for pair in zip(each, alone)), found
    dist.destroy_process_group()
    print("done")
    """)
    assert run_code(code, interpret="0")[-1] == "done"  # after what gloo may have to say


@needs_cuda
def test_threads_on_streams_of_their_own(device):
    """Operators wait for what is on the stream of their thread, and for nothing else."""
    with deterministic():
        works = [work_on(operator, device) for operator in WORK]
        alone = [work() for work in works]
        torch.cuda.synchronize()

        def on_a_stream(work, expected):
            def repeat():
                with torch.cuda.stream(torch.cuda.Stream()):
                    torch.cuda._sleep(10_000_000)
                    found = [work() for _ in range(100)]
                    torch.cuda.current_stream().synchronize()
                    return all(same_bits(each, expected) for each in found)

            return repeat

        assert all(in_threads(*(on_a_stream(*pair) for pair in zip(works, alone, strict=True))))


# ---------------------------------------------------------------------------------------------------------------
# Worker processes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "interpret"),
    (
        ("fork", "0"),
        ("fork", "1"),
        *(
            pytest.param(method, "01"[on], marks=pytest.mark.long)
            for method in ("spawn", "forkserver")
            for on in (0, 1)
        ),
    ),
)
def test_operators_in_workers_of_a_data_loader(method, interpret):
    """The bits of the parent, no hang, and no device asked for: forked workers could not use CUDA any more."""
    used = ["cuda"] if torch.cuda.is_available() and interpret == "0" else []
    found = json.loads(run(TESTS / "load_in_workers.py", method, *used, interpret=interpret))
    assert found == {"different": [], "initialised": False}


# ---------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interpret", "compiled"),
    (("0", ""), *(pytest.param(interpret, "compiled", marks=pytest.mark.long) for interpret in "01")),
)
def test_importing_again(interpret, compiled):
    """Reloaded, and twice from the start: functions, those of before among them, registered ops and compilers."""
    code = """
    import importlib, sys
    import torch
    import dlu_triton
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    features, masks = torch.rand(1, 4, 2, 3, requires_grad=True), torch.rand(1, 9, 4, 6)
    def call(module):
        outputs = [f(features, masks, 3, 1, 2, None) for f in (module.carafe, torch.ops.dlu_triton.carafe)]
        gradients = [torch.autograd.grad(output, features, masks[:, :4])[0] for output in outputs]
        with FlopCounterMode(display=False) as counter:
            torch.ops.dlu_triton.carafe(features, masks, 3, 1, 2, None)
        return *outputs, *gradients, torch.tensor(counter.get_total_flops())
    def check(module):
        assert all(torch.equal(*pair) for pair in zip(call(module), expected))
    first, expected = dlu_triton, call(dlu_triton)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dlu_triton"]:
        importlib.reload(sys.modules[name])
        check(dlu_triton)
    for _ in range(2):
        for name in [name for name in sys.modules if name.partition(".")[0] == "dlu_triton"]:
            del sys.modules[name]
        import dlu_triton
        assert dlu_triton is not first
        check(dlu_triton)
        check(first)
    if sys.argv[1:] == ["compiled"]:
        compiled = torch.compile(dlu_triton.carafe, backend="aot_eager", fullgraph=True)(features, masks, 3, 1, 2)
        torch.testing.assert_close(compiled, expected[0])
    print("done")
    """
    assert run_code(code, compiled, interpret=interpret) == ["done"]


@pytest.mark.parametrize("before", (0, pytest.param(1, marks=pytest.mark.long)))
def test_the_interpreter_has_to_be_chosen_before_triton_is_imported(before):
    code = """
    import os, sys
    import triton
    os.environ["TRITON_INTERPRET"] = sys.argv[1]
    try:
        import dlu_triton
    except RuntimeError as error:
        print(error)
    """
    assert " ".join(run_code(code, str(1 - before), interpret=str(before))) == (
        f"TRITON_INTERPRET must be what it was when Triton was imported, {before}, got {1 - before}; "
        "set it before the first import of either"
    )


@pytest.mark.parametrize("before", (1, pytest.param(0, marks=pytest.mark.long)))
def test_changing_the_variable_after_the_import_changes_nothing(before):
    """Neither for the first call nor for later ones; kernels can be told from twins by how they round."""
    code = """
    import os
    import torch
    from dlu_triton import _launch, _verify
    case = _verify.Case("", channels=4, height=2, width=3, kernel_size=3)
    def call(eager=False):
        arguments = _verify.inputs("dlu_upsample", case, torch.float32, "cpu")
        return list(_verify.results(_verify.function("dlu_upsample", case, eager=eager), arguments).values())
    def same(found, expected):
        return all(map(torch.equal, found, expected))
    before = os.environ["TRITON_INTERPRET"]
    os.environ["TRITON_INTERPRET"] = str(1 - int(before))
    first, again = call(), call()
    os.environ["TRITON_INTERPRET"] = before
    print(same(again, first), same(call(), first), same(call(eager=True), first))
    """
    assert run_code(code, interpret=str(before)) == ["True", "True", str(before == 0)]


def test_processes_with_and_without_the_interpreter_exchange_modules_and_tensors(tmp_path):
    code = """
    import pickle, sys
    import torch
    from dlu_triton import _launch
    found = []
    for module, features, grad_output in pickle.load(open(sys.argv[1], "rb")):
        output = module(features)
        gradients = torch.autograd.grad(output, [features, *module.parameters()], grad_output)
        found.append((module, output.detach(), gradients))
    pickle.dump((_launch.INTERPRETED, found), open(sys.argv[1], "wb"))
    """
    torch.manual_seed(0)
    sent, expected = [], []
    for pack in (CARAFEPack, DLUPack):
        module = pack(4, 2, up_kernel=3, compressed_channels=3).double()
        features, grad_output = torch.rand(1, 4, 2, 3).double().requires_grad_(), torch.rand(1, 4, 4, 6).double()
        output = module(features)
        sent.append((module, features, grad_output))
        expected.append((output.detach(), torch.autograd.grad(output, [features, *module.parameters()], grad_output)))
    file = tmp_path / "pickle"
    file.write_bytes(pickle.dumps(sent))
    run_code(code, file, interpret="0" if _launch.INTERPRETED else "1")
    interpreted, found = pickle.loads(file.read_bytes())
    assert interpreted != _launch.INTERPRETED
    torch.testing.assert_close([each[1:] for each in found], expected)
    for (module, *_), (again, *_) in zip(sent, found, strict=True):
        torch.testing.assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)
