"""Golden cases: float64 arrays computed from the published formulas, independently of this library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INTERPRETED

import dlu_triton
from dlu_triton import reference

FILES = sorted(Path(__file__).parent.joinpath("data").glob("*.npz"))
UPSAMPLING = [file for file in FILES if not file.stem.startswith("cam")]
CAMS = [file for file in FILES if file.stem.startswith("cam")]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize("file", UPSAMPLING, ids=lambda file: file.stem)
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
        largest = 1.0 if INTERPRETED else max(1.0, golden[name].abs().max().item())
        error = (value.double().cpu() - golden[name]).abs().max().item()
        assert error <= TOLERANCE[dtype] * largest, f"{name}: off by {error:.1e}"


# method, eps, and its name in the files
METHODS = [
    ("xgradcam", 1e-6, "xgradcam_eps1e-6"),
    ("xgradcam", 1e-7, "xgradcam_eps1e-7"),
    ("gradcam", 1e-6, "gradcam"),
    ("gradcam++", 1e-6, "gradcampp"),
    ("hirescam", 1e-6, "hirescam"),
    ("layercam", 1e-6, "layercam"),
    ("elementwise", 1e-6, "elementwise"),
]


@pytest.mark.parametrize(("method", "eps", "name"), METHODS, ids=[name for *_, name in METHODS])
@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize("file", CAMS, ids=lambda file: file.stem)
def test_golden_class_activation_map(file, library, method, eps, name, device):
    golden = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    activations, gradients = golden["activations"].to(device), golden["gradients"].to(device)
    parts = library.class_activation_parts(activations, gradients, method, eps, relu=False)
    assert (parts.map.cpu() - golden[f"cam_{name}"]).abs().max() <= 1e-9
    if parts.weights is not None:
        assert (parts.weights.cpu() - golden[f"weights_{name}"]).abs().max() <= 1e-9
    cam = library.class_activation_map(activations, gradients, method, eps)
    assert (cam.cpu() - golden[f"cam_{name}"].relu()).abs().max() <= 1e-9


def test_every_golden_file_is_here():
    assert (len(UPSAMPLING), len(CAMS)) == (7, 3)
