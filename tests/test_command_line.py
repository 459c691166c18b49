"""`python -m dlu_triton`, the paths that calls take, and what an import must not do."""

import errno
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch

import dlu_triton
from dlu_triton import __main__, _verify


def run(*arguments, interpret=None):
    """A fresh Python, with TRITON_INTERPRET as told."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


FEW_CASES = (_verify.Case("small", channels=2, height=2, width=3, kernel_size=3),)
FEW_CAM_CASES = (_verify.CAMCase("small", "xgradcam", channels=2, height=2, width=3),)


def test_verify_passes_and_says_what_ran(monkeypatch, capsys):
    monkeypatch.setattr(_verify, "CASES", FEW_CASES)
    monkeypatch.setattr(_verify, "CAM_CASES", FEW_CAM_CASES)
    assert __main__.main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "Triton 3." in printed
    assert ("interpreter" in printed) != torch.cuda.is_available()
    for operator in (*_verify.OPERATORS, _verify.CAM):
        for dtype in ("float64", "float32", "float16", "bfloat16"):
            assert any(line.split()[:3] == [operator, dtype, "small"] for line in printed.splitlines())
    assert "64 results checked" in printed
    assert "all within bounds" in printed
    assert "FAIL" not in printed


WRONG = {
    "two per cent too large": lambda output: output * 1.02,
    "one pixel aside": lambda output: output.roll(1, dims=3),
    "NaN": lambda output: output * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_verify_fails_on_a_wrong_operator(wrong, monkeypatch, capsys):
    monkeypatch.setattr(_verify, "CASES", FEW_CASES)
    monkeypatch.setattr(_verify, "CAM_CASES", ())
    right = _verify.carafe
    monkeypatch.setattr(_verify, "carafe", lambda *arguments: WRONG[wrong](right(*arguments)))
    assert __main__.main(["verify"]) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.endswith("FAIL") or " FAIL " in line]
    assert failed
    assert all(line.startswith("carafe") for line in failed)
    assert "PAST THEIR BOUND" in printed


def test_verify_interprets_by_itself_without_a_gpu():
    """Started without the variable, as a user does."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the compiled kernels")
    script = (
        "import subprocess, sys; from dlu_triton import __main__\n"
        "subprocess.run = lambda command, env: (print(command[1:], env['TRITON_INTERPRET']),"
        " subprocess.CompletedProcess(command, 7))[1]\n"
        "sys.exit(__main__.main(['verify']))"
    )
    process = run("-c", script)
    assert process.stdout.strip() == "['-m', 'dlu_triton', 'verify'] 1"
    assert process.returncode == 7


def test_complexity_without_the_interpreter():
    """As a user starts it; the rest of the command is in test_complexity.py."""
    process = run("-m", "dlu_triton", "complexity")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("The claim holds.") == 1


# ---------------------------------------------------------------------------------------------------------------
# What a user gets wrong
# ---------------------------------------------------------------------------------------------------------------

# arguments, exit status, last line on stderr; {here} is a folder of broken things
MISTAKES = [
    ([], 2, "python -m dlu_triton: error: the following arguments are required: COMMAND"),
    (["nonsense"], 2, "python -m dlu_triton: error: argument COMMAND: invalid choice: 'nonsense' (choose from verify, demo, explain, complexity, info)"),
    (["verify", "extra"], 2, "python -m dlu_triton: error: unrecognized arguments: extra"),
    (["verify", "--channels", "3"], 2, "python -m dlu_triton: error: unrecognized arguments: --channels 3"),
    (["complexity", "--channels", "0"], 2, "python -m dlu_triton complexity: error: argument --channels: the number must be from 1 to 1000000, got 0"),
    (["complexity", "--channels", "-8"], 2, "python -m dlu_triton complexity: error: argument --channels: the number must be from 1 to 1000000, got -8"),
    (["complexity", "--channels", "9" * 20], 2, f"python -m dlu_triton complexity: error: argument --channels: the number must be from 1 to 1000000, got {'9' * 20}"),
    (["complexity", "--channels", "2.5"], 2, "python -m dlu_triton complexity: error: argument --channels: the number must be an integer, got '2.5' of type str"),
    (["complexity", "--channels"], 2, "python -m dlu_triton complexity: error: argument --channels: expected one argument"),
    (["demo", "one.png", "two.png"], 2, "python -m dlu_triton: error: unrecognized arguments: two.png"),
    (["demo", "--out"], 2, "python -m dlu_triton demo: error: argument --out: expected one argument"),
    (["demo", ""], 2, "python -m dlu_triton demo: error: argument IMAGE: a path must have characters, got ''"),
    (["explain", "--out", ""], 2, "python -m dlu_triton explain: error: argument --out: a path must have characters, got ''"),
    (["demo", "{here}/nothing.png"], 1, "dlu_triton demo: error: cannot read {here}/nothing.png: No such file or directory"),
    (["demo", "{here}"], 1, "dlu_triton demo: error: cannot read {here}: Is a directory"),
    (["demo", "{here}/text.png/below.png"], 1, "dlu_triton demo: error: cannot read {here}/text.png/below.png: Not a directory"),
    (["demo", "{here}/text.png"], 1, "dlu_triton demo: error: cannot read {here}/text.png: not a picture in a format that the demo reads"),
    (["demo", "{here}/empty.png"], 1, "dlu_triton demo: error: cannot read {here}/empty.png: not a picture in a format that the demo reads"),
    (["demo", "{here}/part.png"], 1, "dlu_triton demo: error: cannot read {here}/part.png: image file is truncated"),
    (["demo", "{here}/huge.png"], 1, "dlu_triton demo: error: cannot read {here}/huge.png: Image size (2500000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack."),
    (["demo", "{here}/pixel.png"], 1, "dlu_triton demo: error: {here}/pixel.png is too small: 1 x 1 pixels, needs 64 a side"),
    (["demo", "{here}/row.png"], 1, "dlu_triton demo: error: {here}/row.png is too small: 500 x 1 pixels, needs 64 a side"),
    (["demo", "{here}/two\nlines.png"], 1, "dlu_triton demo: error: cannot read {here}/two lines.png: No such file or directory"),
    (["demo", "--out", "{here}/text.png"], 1, "dlu_triton demo: error: cannot write to folder {here}/text.png: File exists"),
    (["demo", "--out", "{here}/text.png/out"], 1, "dlu_triton demo: error: cannot write to folder {here}/text.png/out: Not a directory"),
    (["demo", "--out", "{here}/" + "x" * 300], 1, "dlu_triton demo: error: cannot write to folder {here}/" + "x" * 300 + ": File name too long"),
    (["explain", "--out", "{here}/text.png"], 1, "dlu_triton explain: error: cannot write to folder {here}/text.png: File exists"),
    (["explain", "image.png"], 2, "python -m dlu_triton: error: unrecognized arguments: image.png"),
    (["info", "all"], 2, "python -m dlu_triton: error: unrecognized arguments: all"),
]  # fmt: skip


def picture_of(width, height):
    """A PNG of this size, without its pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    packed = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "text.png").write_text("not a picture\n")
    (folder / "empty.png").touch()
    (folder / "huge.png").write_bytes(picture_of(50000, 50000))
    image = pytest.importorskip("PIL.Image")
    for name, size in (("part", (100, 100)), ("pixel", (1, 1)), ("row", (500, 1))):
        image.effect_noise(size, 64).save(folder / f"{name}.png")
    (folder / "part.png").write_bytes((folder / "part.png").read_bytes()[:-4000])
    return folder


@pytest.mark.parametrize(("arguments", "status", "message"), MISTAKES)
def test_mistakes(arguments, status, message, here, monkeypatch, capsys):
    """One line, and no traceback; wrong arguments print the usage before it."""
    pytest.importorskip("tqdm")
    if arguments[:1] == ["explain"]:
        pytest.importorskip("matplotlib")
        pytest.importorskip("sklearn")
    monkeypatch.setattr("dlu_triton._launch.INTERPRETED", False)  # as in the process that the demos run in
    try:
        found = __main__.main([argument.replace("{here}", str(here)) for argument in arguments])
    except SystemExit as error:
        found = error.code
    printed = capsys.readouterr()
    *before, last = printed.err.splitlines()
    if sys.version_info < (3, 12):
        last = re.sub(r"'(\w+)'(?=[,)])", r"\1", last)  # of the choices
    assert (found, last) == (status, message.replace("{here}", str(here)))
    assert printed.out == ""
    assert [line for line in before if not line.startswith(("usage: python -m dlu_triton", " "))] == []
    assert bool(before) == (status == 2)


@pytest.mark.parametrize("command", ("demo", "explain"))
def test_a_picture_that_may_not_be_read_or_a_folder_that_may_not_be_made(command, monkeypatch, capsys, tmp_path):
    """As the system says it, of whatever kind; permissions do not bind the user that tests may run as."""
    pytest.importorskip("tqdm")
    pytest.importorskip("sklearn" if command == "explain" else "PIL")

    def deny(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("dlu_triton._launch.INTERPRETED", False)
    monkeypatch.setattr(Path, "mkdir", deny)
    assert __main__.main([command, "--out", str(tmp_path / "out")]) == 1
    expected = f"dlu_triton {command}: error: cannot write to folder {tmp_path / 'out'}: Permission denied\n"
    assert capsys.readouterr().err == expected
    if command == "demo":
        monkeypatch.setattr(Path, "open", deny)
        assert __main__.main([command, str(tmp_path / "a.png")]) == 1
        expected = f"dlu_triton demo: error: cannot read {tmp_path / 'a.png'}: Permission denied\n"
        assert capsys.readouterr().err == expected


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        __main__.main(["--version"])
    assert capsys.readouterr().out == f"dlu_triton {dlu_triton.__version__}\n"


def test_help_tells_the_exit_statuses(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        __main__.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0; 1 if a check fails" in printed
    assert "130 after Ctrl-C." in printed


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (130, 130), (-9, 137)])
def test_the_status_of_the_process_for_the_interpreter_is_passed_on(status, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("dlu_triton._launch.INTERPRETED", False)
    monkeypatch.setattr(subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, status))
    assert __main__.main(["verify"]) == expected
    said = capsys.readouterr().err
    assert said == ("dlu_triton verify: error: stopped by signal 9\n" if status < 0 else "")


posix = pytest.mark.skipif(os.name != "posix", reason="signals and devices of POSIX")


@posix
@pytest.mark.parametrize("where", ("a pipe that nobody reads", "a full disk", "closed"))
def test_output_that_cannot_be_written(where):
    command = [sys.executable, "-m", "dlu_triton", "complexity"]
    if where == "closed":  # as by `>&-`
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=partial(os.close, 1))
        assert process.stderr == "dlu_triton: error: cannot write the output: Bad file descriptor\n"
    elif where == "a full disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("no device is full")
        with open("/dev/full", "w") as output:
            process = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
        assert process.stderr == "dlu_triton: error: cannot write the output: No space left on device\n"
    else:
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert process.stderr == ""
    assert process.returncode == 1


@posix
def test_interrupted():
    """In the process that was started and in the one that it starts, as a terminal does it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dlu_triton", "verify"],
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells have what runs behind them ignore it
    )
    while not process.stdout.readline().startswith("operator"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


# ---------------------------------------------------------------------------------------------------------------
# Paths and imports
# ---------------------------------------------------------------------------------------------------------------

PROBE = """
import torch, dlu_triton
from dlu_triton.ops.carafe import carafe_op
launch, twin, taken = carafe_op.launch, carafe_op.twin, []
carafe_op.launch = lambda *arguments: (taken.append("kernels"), launch(*arguments))[1]
carafe_op.twin = lambda *arguments: (taken.append("eager"), twin(*arguments))[1]
dlu_triton.carafe(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 1, 1, 1)
print(*taken)
"""


@pytest.mark.parametrize(("interpret", "path"), [(None, "eager"), ("0", "eager"), ("1", "kernels")])
def test_cpu_tensors_take_the_eager_path_unless_interpreted(interpret, path):
    process = run("-c", PROBE, interpret=interpret)
    assert process.stdout.strip() == path, process.stderr


def test_import_needs_no_docstrings():
    process = run("-OO", "-c", "import dlu_triton; assert dlu_triton.XGradCAM")
    assert process.returncode == 0, process.stderr


def test_import_is_quiet_and_touches_no_device():
    script = (
        "import torch\n"
        "def forbidden(*arguments, **options): raise SystemExit('the import asked for a device')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_properties',"
        " 'get_device_capability', 'init', '_lazy_init'): setattr(torch.cuda, name, forbidden)\n"
        "state = torch.random.get_rng_state()\n"
        "import dlu_triton\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
    )
    process = run("-c", script)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
