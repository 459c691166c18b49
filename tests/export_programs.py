"""Networks that are exported, and what runs in a process of its own: without the interpreter, or without the library.

    python tests/export_programs.py export|load|package FOLDER

`export` writes each network's program, made on CPU tensors, with inputs of other sizes and what they give in float64;
`load` runs those programs in a process that must not import dlu_triton; `package` compiles one by AOTInductor.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

DYNAMIC = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)  # batch, height and width
NETWORKS = ("DLUPack", "CARAFEPack", "pyramid")
EXAMPLE = (2, 4, 5, 6)
OTHERS = {  # without a side of one pixel anywhere in the pyramid: torch.export takes all but inputs for larger
    "DLUPack": ((1, 4, 1, 7), (3, 4, 4, 3)),
    "CARAFEPack": ((1, 4, 1, 7), (3, 4, 4, 3)),
    "pyramid": ((1, 4, 5, 9), (3, 4, 8, 5)),
}
LIBRARY_OPS = {  # of the programs that are exported on a GPU
    "DLUPack": {"dlu_triton.dlu_upsample.default"},
    "CARAFEPack": {"dlu_triton.carafe_upsample.default"},
    "pyramid": {"dlu_triton.dlu_upsample.default", "dlu_triton.carafe_upsample.default"},
}


class Pyramid(nn.Module):
    """Three levels: strided convolutions, 1 x 1 laterals, and the level above upsampled to their size and added."""

    def __init__(self, *packs: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, stride=stride, padding=1) for stride in (1, 2, 2))
        self.laterals = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in self.stages)
        self.packs = nn.ModuleList(packs)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        laterals = []
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            image = stage(image).relu()
            laterals.append(lateral(image))
        levels = [laterals.pop()]
        for pack, lateral in zip(self.packs, reversed(laterals), strict=True):
            levels.append(lateral + pack(levels[-1], output_size=lateral.shape[2:]))
        return tuple(levels)


def network(name: str, groups: int = 1) -> nn.Module:
    """With weights that keep the variance, so that offsets are about a source pixel, not zero as at initialisation."""
    from dlu_triton import CARAFEPack, DLUPack

    arguments = dict(channels=4, scale_factor=2, up_kernel=3, up_group=groups, compressed_channels=8)
    if name == "pyramid":
        net = Pyramid(DLUPack(**arguments), CARAFEPack(**arguments))
    else:
        net = {"DLUPack": DLUPack, "CARAFEPack": CARAFEPack}[name](**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for convolution in (each for each in net.modules() if isinstance(each, nn.Conv2d)):
            for parameter in convolution.parameters():
                parameter.normal_(std=convolution.weight[0].numel() ** -0.5, generator=generator)
    return net


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def exact(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a network gives in float64."""
    return levels(copy.deepcopy(net).double()(x.double()))


def levels(output: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def assert_close(output: torch.Tensor | tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for found, level in zip(levels(output), expected, strict=True):
        torch.testing.assert_close(found.double(), level, rtol=0, atol=1e-5)


def library_ops(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if "dlu_triton" in str(node.target)}


def export(folder: Path) -> None:
    from dlu_triton import _launch

    assert not _launch.INTERPRETED
    cases = {}
    for name in NETWORKS:
        net = network(name)
        for strict in (False, True):
            program = torch.export.export(net, (image(*EXAMPLE),), dynamic_shapes=DYNAMIC, strict=strict)
            assert not library_ops(program)
            torch.export.save(program, folder / f"{name}-{strict}.pt2")
        cases[name] = [(x, exact(net, x)) for x in (image(*shape) for shape in OTHERS[name])]
    torch.save(cases, folder / "cases.pt")


def load(folder: Path) -> None:
    for name, cases in torch.load(folder / "cases.pt").items():
        for strict in (False, True):
            run = torch.export.load(folder / f"{name}-{strict}.pt2").module()
            for x, expected in cases:
                assert_close(run(x), expected)
    assert "dlu_triton" not in sys.modules


def package(folder: Path) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    net = network("DLUPack").requires_grad_(False)
    program = torch.export.export(net, (image(*EXAMPLE),), dynamic_shapes=DYNAMIC)
    run = aoti_load_package(aoti_compile_and_package(program, package_path=str(folder / "DLUPack.pt2")))
    for shape in (EXAMPLE, *OTHERS["DLUPack"]):
        assert_close(run(image(*shape)), exact(net, image(*shape)))


if __name__ == "__main__":
    {"export": export, "load": load, "package": package}[sys.argv[1]](Path(sys.argv[2]))
