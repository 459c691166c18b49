"""Kernels written by hand in PTX, for the tests of the emulator."""

import numpy as np
import torch

from .findings import Report
from .machine import Launch, Options, Program

KERNEL = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry k({parameters}) .reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<32>, %thread, %block, %shared;
    .reg .b64 %d<16>;
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %shared, memory;
{body}
    ret;
}}
"""


def run(body: str, threads: int = 32, blocks: int = 1, shared: int = 0, name: str = "k", **arguments) -> Report:
    """Launch a body, in which `%name` is the address of an argument; arrays and tensors are read and written in place.

    Keywords that are fields of `Options` are taken as such.
    """
    options = Options(**{key: arguments.pop(key) for key in list(arguments) if key in Options.__dataclass_fields__})
    tensors = [(key, torch.from_numpy(x) if isinstance(x, np.ndarray) else x) for key, x in arguments.items()]
    loads = "".join(f".reg .b64 %{key}; ld.param.b64 %{key}, [{key}];\n" for key in arguments)
    parameters = ", ".join(f".param .u64 {key}" for key in arguments)
    program = Program(KERNEL.format(parameters=parameters, threads=threads, body=loads + body))
    report = Report()
    Launch(program, name, (blocks, 1, 1), threads, shared, tensors, report, options).run()
    return report
