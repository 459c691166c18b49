"""Random cases in random memory layouts, emulated, against float64.

    python tests/fuzz.py sm_90 --minutes 30 --seed 0

Each tensor has its own base and strides, often less aligned than a vector load needs. There are few sizes, so that most
kernels are compiled already. A failure is printed with its seed, which repeats the case; then the exit code is 1.
"""

import argparse
import random
import sys
import time

import emulator
import torch

from dlu_triton import _checks, _verify

ORDERS = ((0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (1, 0, 2, 3))  # of the axes, the outermost first
SIZES = ((4, 6), (5, 7), (1, 9), (8, 8), (3, 16), (9, 3))


def shifted(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same values in a larger storage of NaN: base and strides of few factors of two, in some order of the axes."""
    order = draw.choices(ORDERS, (3, 3, 1, 1))[0] if x.dim() == 4 else range(x.dim())
    strides, step = [0] * x.dim(), draw.choice((1, 1, 1, 1, 2))
    for axis in reversed(order):
        strides[axis] = step
        step = step * x.shape[axis] + draw.choice((0, 0, 0, 1, 2, 3, 4, 8, 16))
        if draw.random() < 0.2:
            step = (step + 15) // 16 * 16
    base = draw.choice((0, 0, 0, 1, 2, 3, 4, 8, 12, 16))
    extent = base + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    storage = x.new_full((extent + draw.choice((0, 0, 1, 5)),), float("nan"))
    return storage.as_strided(x.shape, strides, base).copy_(x)


def upsampling(draw: random.Random) -> tuple[str, _verify.Case]:
    groups, scale, (height, width) = draw.choice((1, 1, 1, 2, 3)), draw.choice((2, 2, 2, 1, 3, 4)), draw.choice(SIZES)
    cut = max(1, scale * height - draw.choice((0, 1))), max(1, scale * width - draw.choice((1, 3)))
    case = _verify.Case(
        "", batch=draw.choice((1, 2)), channels=groups * draw.choice((1, 3, 8, 16, 21, 32)), height=height, width=width,
        scale_factor=scale, kernel_size=draw.choice((5, 5, 3, 1, 7)), groups=groups,
        reach=draw.choice((0.0, 0.5, 1.0, 3.0, 100.0)), output_size=draw.choice((None, cut)), seed=draw.randrange(1000),
    )  # fmt: skip
    return draw.choice(_verify.OPERATORS), case


def maps(draw: random.Random) -> tuple[str, _verify.CAMCase]:
    case = _verify.CAMCase(
        "", draw.choice(_checks.CAM_METHODS), batch=draw.choice((1, 2)), channels=draw.choice((1, 3, 16, 33, 64)),
        height=draw.choice((1, 4, 5, 33)), width=draw.choice((1, 7, 8, 70)), classes=draw.choice((None, None, 2)),
        size=draw.choice((None, (13, 12), (8, 8), (3, 40))), relu=draw.choice((True, False)), seed=draw.randrange(1000),
    )  # fmt: skip
    return _verify.CAM, case


def wrong(seed: int, report: emulator.Report) -> str:
    """What is wrong with the case of this seed, or nothing. A new report repeats the case, in the same orders."""
    draw = random.Random(seed)
    operator, case = (upsampling if draw.random() < 0.75 else maps)(draw)
    dtype = draw.choice((torch.float16, torch.bfloat16, torch.float32, torch.float32, torch.float64))
    arguments = {name: shifted(x, draw) for name, x in _verify.inputs(operator, case, dtype, "cpu").items()}
    emulator.state.options.shuffle = seed
    torch.use_deterministic_algorithms(draw.random() < 0.25)
    before, problems = report.counts(), []
    try:
        exact = {name: x.double() for name, x in arguments.items()}
        truth, eager, kernel = (
            _verify.results(_verify.function(operator, case, eager=twin), values)
            for twin, values in ((True, exact), (True, arguments), (False, arguments))
        )
        compared = _verify.comparisons(truth, eager, kernel)
        problems += [f"{name}: {each}" for name, each in compared.items() if not each.passed]
    except Exception as error:  # a failure of the compiler or the emulator is printed with its seed, too
        problems.append(f"{type(error).__name__}: {error}")
    finally:
        torch.use_deterministic_algorithms(False)
    problems += report.since(before)
    layouts = {name: (tuple(x.shape), x.stride(), x.storage_offset()) for name, x in arguments.items()}
    return f"seed {seed}: {operator} {dtype} {case} {layouts}\n  {problems}" if problems else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed, failed, launches, end = options.seed, 0, 0, time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        with emulator.running(options.target) as report:
            problem = wrong(seed, report)
        if problem:
            failed += 1
            print(problem, flush=True)
        seed, launches = seed + 1, launches + report.launches.total()
    print(f"{options.target}: {seed - options.seed} cases, {failed} failed; {launches} launches")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
