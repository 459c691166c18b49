"""Executes on a CPU the PTX that Triton compiles for NVIDIA GPUs, and checks it.

    python -m pytest --emulate sm_90 [--shuffle SEED]           # the tests, on kernels as compiled

    with emulator.running("sm_90") as report:                   # in a script, with `tests/` on the path
        dlu_triton.carafe(...)                                  # on CPU tensors
    report.findings                                             # empty when all is well

Everything up to PTX is Triton's own compiler; `ptxas` is left out. Triton's cache keeps these kernels and those
for a GPU apart. `Options` are keywords of `running`: a seed that shuffles blocks and additions (`shuffle`), some of the
blocks alone (`choose`), counters of performance (`counters`).

Raised where they happen, with kernel, PTX line, source line, block and thread: OutOfBounds, Misaligned,
UninitialisedShared, SharedRace, AsyncHazard, BarrierError. Reported: GlobalRace and ReplicaConflict, unless their names
are added to `report.raises`. `findings` says what each means, `memory.Shadow` what a race is. Unknown instructions,
modifiers and forms are a PTXError that names the line: nothing is skipped.

What it cannot show:

- Time, occupancy and registers; and what `ptxas` does, which may contract `mul` and `add` without `.rn` to `fma`.
- The memory model beyond barriers: memory is sequentially consistent. Races are found by who touched what, not by their
  outcome. Within a warp lanes are in step, so that a missing `bar.warp.sync` is not seen.
- The last bits of approximate instructions, which are rounded correctly here, except that division is by a reciprocal;
  and those of tensor cores, which add with fewer bits: here products are added in float64 and rounded once an
  instruction. `fma.rn.f64` may be rounded twice, in rare ties.
- Bits of NaN, which are those of the CPU.
- `cp.async`, TMA, mbarriers, tcgen05, clusters, local memory, generic addresses, device functions, 8-bit and integer
  products, named barriers: an error. So kernels need `num_stages=1` before sm_90, and there is no sm_100.

How it works:

| module | |
| --- | --- |
| `parse` | PTX to instructions and basic blocks |
| `codegen`, `instructions` | a basic block to a Python function, an instruction to a numpy call or a few |
| `semantics`, `tensorcore` | values; layouts and products of matrices |
| `inflight` | registers of asynchronous wgmma, by data flow |
| `memory` | global and shared memory with their checks |
| `machine` | lanes, masks, barriers, scheduling, launches |
| `driver` | a Triton driver that launches there |
| `findings` | exceptions and the report |
| `counters` | performance counters |
| `handwritten` | PTX written by hand, for tests |

A register is an array over all lanes of a chunk of blocks, or a scalar where all agree. Functions of blocks of code run
under a mask of active lanes, those at the lowest program counter first; values of inactive lanes are computed and
dropped, memory is touched by active lanes only. C and D of chained products stay matrices until somebody reads a
register.
"""

from . import findings
from .driver import TARGETS, running, state
from .findings import EmulationError, Report
from .machine import Launch, Options, Program

__all__ = ["TARGETS", "EmulationError", "Launch", "Options", "Program", "Report", "findings", "running", "state"]
