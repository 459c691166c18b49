"""`python -m dlu_triton`: see the kernels agree with float64, what they do to a photograph, what maps explain, and
what upsamplers cost."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import _checks, _launch


def positive_integer(text: str) -> int:
    return _checks.integer("the number", int(text), 1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dlu_triton", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "verify", help="compare the kernels with float64 on the GPU, or in Triton's interpreter where there is none"
    )
    demo = commands.add_parser(
        "demo", help="train DLU and CARAFE on a photograph for some seconds and show them beside nearest and bilinear"
    )
    demo.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="default: a photograph from the package")
    demo.add_argument(
        "--out", type=Path, default=Path("dlu_demo"), metavar="DIR", help="folder of the picture (%(default)s)"
    )
    explain = commands.add_parser(
        "explain", help="train a small network to find digits on photographs, and measure every class activation map"
    )
    explain.add_argument(
        "--out", type=Path, default=Path("dlu_explain"), metavar="DIR", help="folder of the results (%(default)s)"
    )
    complexity = commands.add_parser(
        "complexity", help="count parameters and FLOPs of DLU and CARAFE, and check them against the papers' formulas"
    )
    complexity.add_argument(
        "--channels", type=positive_integer, default=256, metavar="C", help="of the features (%(default)s)"
    )
    options = parser.parse_args(arguments)

    if options.command == "complexity":  # no kernel runs
        from . import _count

        return _count.run(options.channels)

    # Without a GPU `verify` is about the interpreted kernels, the demos about the CPU path. Triton decides at import.
    interpret = options.command == "verify"
    if not torch.cuda.is_available() and interpret != _launch.INTERPRETED:
        environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
        return subprocess.run([sys.executable, "-m", "dlu_triton", *arguments], env=environment).returncode
    if options.command == "verify":
        from . import _verify

        return _verify.run()
    if options.command == "explain":
        from . import _explain_demo

        return _explain_demo.run(options.out)
    from . import _demo

    return _demo.run(options.image, options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
