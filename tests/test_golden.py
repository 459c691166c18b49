"""Golden cases: float64 arrays computed from the published formulas, independently of this library."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dlu_triton
from dlu_triton import reference

FILES = sorted(Path(__file__).parent.joinpath("data").glob("*.npz"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden_case(file, library, dtype, device):
    golden = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    sizes = {name: golden[name].item() for name in ("scale_factor", "kernel_size", "group_size") if name in golden}
    carafe = "masks" in golden
    names = ("features", "masks") if carafe else ("features", "kernel_space", "offsets")
    tensors = [golden[name].to(device, dtype).requires_grad_() for name in names]
    output = (library.carafe if carafe else library.dlu_upsample)(*tensors, **sizes)
    gradients = torch.autograd.grad(output, tensors, golden["grad_output"].to(device, dtype))
    found = {"output": output.detach()} | {f"grad_{name}": grad for name, grad in zip(names, gradients, strict=True)}
    for name, value in found.items():
        # Compiled float32 products are three TF32 products: there the bound is relative to the largest value.
        largest = 1.0 if device.type == "cpu" else max(1.0, golden[name].abs().max().item())
        error = (value.double().cpu() - golden[name]).abs().max().item()
        assert error <= TOLERANCE[dtype] * largest, f"{name}: off by {error:.1e}"


def test_every_golden_file_is_here():
    assert len(FILES) == 7
