"""Registers, local memory and length of machine code for NVIDIA GPUs.

Read from the file itself, since disassembling takes a second for each kernel.
"""

import re
import struct
import subprocess
import tempfile
from pathlib import Path

import triton.backends.nvidia

NO_OPERATION = 0x918  # opcode of what fills the end


def assemble(ptx: str) -> bytes:
    """By the ptxas and options of Triton; how many registers there are, PTX says itself."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    new = int(re.search(r"\d+", target)[0]) >= 100
    ptxas = triton.knobs.nvidia.ptxas_blackwell if new else triton.knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        _run(ptxas.path, "-lineinfo", f"--gpu-name={target}", source, "-o", cubin)
        return cubin.read_bytes()


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of local memory, where spills go, and instructions."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _run(tool, "-res-usage", file)))
    local = int(used["STACK"]) + int(used["LOCAL"])
    return {"registers": int(used["REG"]), "local": local, "instructions": _instructions(cubin)}


def _instructions(cubin: bytes) -> int:
    """Of 16 bytes each, in the executable sections of this ELF file."""
    (headers,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    total = 0
    for header in range(headers, headers + size * count, size):
        flags, _, start, length = struct.unpack_from("<QQQQ", cubin, header + 8)
        if flags & 4:
            opcodes = struct.unpack_from(f"<{length // 8}Q", cubin, start)[::2]
            total += sum(opcode & 0xFFF != NO_OPERATION for opcode in opcodes)
    return total


def _run(*command: object) -> str:
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return process.stdout
