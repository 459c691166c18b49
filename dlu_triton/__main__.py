"""`python -m dlu_triton`: see the kernels agree with float64, what they do to a photograph, what maps explain, what
upsamplers cost, and what a report of a bug needs to say."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, _checks, _launch

MOST = 1_000_000  # of whatever a command counts
FAILED, INTERRUPTED = 1, 130


def positive_integer(text: str) -> int:
    try:
        value: int | str = int(text)
    except ValueError:
        value = text
    try:
        return _checks.integer("the number", value, 1, MOST)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    if not text:  # which pathlib takes for the current folder
        raise argparse.ArgumentTypeError("a path must have characters, got ''")
    return Path(text)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if sys.stdout is None:  # it was closed; the files that are opened next would take its place
        return _cannot_write(errno.EBADF)
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written at the exit
        return _cannot_write(error.errno) if error.errno == errno.ENOSPC else FAILED  # silently where a reader has left


def _cannot_write(number: int) -> int:
    print(f"dlu_triton: error: cannot write the output: {os.strerror(number)}", file=sys.stderr)
    return FAILED


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dlu_triton",
        description=__doc__,
        epilog="Exit status: 0; 1 if a check fails or something cannot be read, written or imported; 2 after wrong "
        "arguments; 130 after Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"dlu_triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "verify", help="compare the kernels with float64 on the GPU, or in Triton's interpreter where there is none"
    )
    demo = commands.add_parser(
        "demo",
        help="train DLU and CARAFE on a photograph, without a GPU for minutes, and show them beside interpolation",
    )
    demo.add_argument("image", nargs="?", type=path, metavar="IMAGE", help="default: a photograph from the package")
    demo.add_argument(
        "--out", type=path, default=Path("dlu_demo"), metavar="DIR", help="folder of the pictures (%(default)s)"
    )
    explain = commands.add_parser(
        "explain", help="train a small network to find digits on photographs, and measure every class activation map"
    )
    explain.add_argument(
        "--out", type=path, default=Path("dlu_explain"), metavar="DIR", help="folder of the results (%(default)s)"
    )
    complexity = commands.add_parser(
        "complexity", help="count parameters and FLOPs of DLU and CARAFE, and check them against the papers' formulas"
    )
    complexity.add_argument(
        "--channels", type=positive_integer, default=256, metavar="C", help="of the features (%(default)s)"
    )
    commands.add_parser("info", help="print versions, the machine and settings, for a report of a bug")
    options = parser.parse_args(arguments)

    if options.command == "complexity":  # no kernel runs
        from . import _count

        return _count.run(options.channels)
    if options.command == "info":  # nor here
        from . import _info

        return _info.run()

    # Without a GPU `verify` is about the interpreted kernels, the demos about the CPU path. Triton decides at import.
    interpret = options.command == "verify"
    if not torch.cuda.is_available() and interpret != _launch.INTERPRETED:
        environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
        status = subprocess.run([sys.executable, "-m", "dlu_triton", *arguments], env=environment).returncode
        if status < 0:
            print(f"dlu_triton {options.command}: error: stopped by signal {-status}", file=sys.stderr)
        return status if status >= 0 else 128 - status  # as shells have it
    if options.command == "verify":
        from . import _verify

        return _verify.run()
    if options.command == "explain":
        from . import _explain_demo

        return _explain_demo.run(options.out)
    from . import _demo

    return _demo.run(options.image, options.out)


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that no encoding has
    sys.exit(main(sys.argv[1:]))
