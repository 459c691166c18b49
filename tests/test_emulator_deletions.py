"""Barriers and fences deleted from compiled kernels, one at a time: the emulator finds each that was needed."""

import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import emulator
import pytest
import torch
from conftest import INTERPRETED
from emulator.findings import AsyncHazard, EmulationError, SharedRace

import dlu_triton
from dlu_triton import _launch, _verify

if INTERPRETED:
    pytest.skip("checks compiled kernels: --emulate sm_90, or on a GPU", allow_module_level=True)

CASE = replace(next(case for case in _verify.CASES if case.name == "groups"), channels=400, height=3, width=3)


@dataclass
class Recorded:
    """A launch, and what of its kernel was executed."""

    arguments: tuple
    barriers: list[int]  # blocks of code that they end
    lines: set[int]

    @property
    def program(self) -> emulator.Program:
        return self.arguments[0]

    def run(self, program: emulator.Program, **options) -> list[torch.Tensor]:
        """The arguments after another launch of this program; they are put back."""
        tensors = [value.detach() for _, value in self.arguments[5] if isinstance(value, torch.Tensor)]
        before = [x.clone() for x in tensors]
        report = emulator.Report(raises=set(emulator.findings.KINDS))
        try:
            emulator.Launch(program, *self.arguments[1:6], report, emulator.Options(**options)).run()
            return [x.clone() for x in tensors]
        finally:
            for x, old in zip(tensors, before, strict=True):
                x.copy_(old)


@functools.cache
def recorded(target: str) -> list[Recorded]:
    """Of dlu_upsample, bfloat16, forward and backward.

    Programs do not share channels, so loops over them run more than once: at the start of a loop that runs once a
    barrier has nothing to separate.
    """
    launches = []

    class Recording(emulator.Launch):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            launches.append(arguments)

    inputs = _verify.inputs("dlu_upsample", CASE, torch.bfloat16, "cpu")
    grad_output = inputs.pop("grad_output")
    for x in inputs.values():
        x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch, emulator.running(target, counters=True) as report:
        patch.setattr(emulator.driver, "Launch", Recording)
        patch.setattr(_launch, "ENOUGH_PROGRAMS", 1)
        dlu_triton.dlu_upsample(**inputs, scale_factor=2, kernel_size=3, groups=4).backward(grad_output)
    assert not report.findings
    found = []
    for arguments, counters in zip(launches, report.counters, strict=True):
        reached, program = counters.reached, arguments[0]
        lines = {line for block, warps in zip(program.counted, reached, strict=True) if warps for line, *_ in block}
        found.append(Recorded(arguments, [block for block in program.barriers if reached[block]], lines))
    return found


HARMLESS = {
    "sm_80": [],
    "sm_90": ["softmax_backward"],  # each warp stores over the rows that it has loaded itself
}


@pytest.mark.parametrize("target", HARMLESS)
def test_each_barrier_is_needed(target: str):
    """Without it there is a race, except of HARMLESS: there warps may run in any order, and results are the same."""
    deletions = [(launch, barrier) for launch in recorded(target) for barrier in launch.barriers]
    harmless = []
    for launch, barrier in deletions:
        program = copy.copy(launch.program)
        program.barriers = {block: text for block, text in program.barriers.items() if block != barrier}
        try:
            launch.run(program)
        except SharedRace:
            continue
        harmless.append(launch.arguments[1])
        assert not program.uses_wgmma  # which takes four warps at once
        for apart in (1, -1):
            expected = launch.run(launch.program, apart=apart)
            for found, wanted in zip(launch.run(program, apart=apart), expected, strict=True):
                assert torch.equal(found, wanted), launch.program.barriers[barrier]
    assert harmless == HARMLESS[target]


SHUFFLE = re.compile(r"^\s*shfl\.sync\.bfly\.b32.*, (\d+), 31, -1;", re.M)


@pytest.mark.parametrize("target", HARMLESS)
def test_values_of_a_wrong_lane_are_noticed(target: str):
    """The first shuffle of each kernel takes another lane's value: results differ, or lanes disagree."""
    tried = []
    for launch in recorded(target):
        text = launch.program.text
        found = SHUFFLE.search(text)
        if found is None:
            continue
        distance = "2" if found[1] == "1" else "1"
        program = emulator.Program(text[: found.start(1)] + distance + text[found.end(1) :])
        try:
            same = all(map(torch.equal, launch.run(program), launch.run(launch.program)))
        except EmulationError:
            same = False
        assert not same, (launch.arguments[1], found[0])
        tried.append(launch.arguments[1])
    assert tried == ["reassemble_backward_kernels", "softmax_backward"]


def orders(launch: Recorded) -> Iterator[tuple[str, int, emulator.Program]]:
    """What orders wgmma, with its line, and the kernel without it."""
    text = launch.program.text
    for found in re.finditer(r"^\s*(wgmma\.(?:fence|commit|wait)|fence\.proxy).*\n", text, re.M):
        line = text.count("\n", 0, found.start(1)) + 1
        if line in launch.lines:
            yield found[1], line, emulator.Program(text[: found.start()] + "\n" + text[found.end() :])


@pytest.mark.parametrize("kernels", [1, pytest.param(9, marks=pytest.mark.long)])
def test_what_orders_wgmma_is_needed(kernels: int):
    """Each fence and wait is needed, unless a neighbour of the same kind does its work (products in a row)."""
    launches = [launch for launch in recorded("sm_90") if launch.program.uses_wgmma]
    assert launches
    for launch in launches[:kernels]:
        lines = launch.program.text.split("\n")
        needed = set()
        for form, line, program in orders(launch):
            try:
                launch.run(program)
            except AsyncHazard:
                needed.add(form)
                continue
            before = [n for n, each in enumerate(lines, 1) if form in each and n < line]
            after = [n for n, each in enumerate(lines, 1) if form in each and n > line]
            if form == "wgmma.fence":  # only `mov` has touched the accumulators since an earlier one
                assert before, lines[line - 1]
                continue
            start, end = (before[-1], line) if form == "fence.proxy" else (line, after[0])
            stores = re.findall(r"st\.shared|stmatrix", "\n".join(lines[start:end]))
            assert not stores, lines[line - 1]  # so the one before, or after, does for both
        assert needed == {"wgmma.fence", "wgmma.commit", "wgmma.wait", "fence.proxy"}
