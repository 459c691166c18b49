"""Autocast regions, and modules in half precision: what comes out, in which type, and how exact."""

import copy

import pytest
import torch
from selection import long
from torch import nn

import dlu_triton
from dlu_triton import CARAFEPack, DLUPack, _verify
from dlu_triton._verify import Case

CASE = Case("", batch=2, channels=4, height=3, width=4, kernel_size=3, groups=2)
HALF = (torch.float16, torch.bfloat16)
by_name = {"ids": lambda value: getattr(value, "__name__", None) or str(value).removeprefix("torch.")}


def arguments(operator, dtype, device, case=CASE):
    given = _verify.inputs(operator, case, dtype, device)
    grad_output = given.pop("grad_output")
    return [x.requires_grad_() for x in given.values()], grad_output


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), **by_name)
@pytest.mark.parametrize("region", (torch.bfloat16, *long(torch.float16)), **by_name)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_operators_compute_in_the_type_of_the_region(operator, region, dtype, path):
    """As if the first argument had been cast, and the others not, which keeps offsets and kernels as exact as they
    are. Gradients have the types of the arguments."""
    tensors, grad_output = arguments(operator, dtype, path)
    call = _verify.function(operator, CASE, eager=False)
    with torch.autocast(path.type, region):
        output = call(*tensors)
    assert output.dtype == region
    expected = call(tensors[0].to(region), *tensors[1:])
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    gradients, wanted = (torch.autograd.grad(each, tensors, grad_output.to(region)) for each in (output, expected))
    for gradient, other, tensor in zip(gradients, wanted, tensors, strict=True):
        assert gradient.dtype == tensor.dtype
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_float64_and_what_is_outside_stay_as_they_are(operator, path):
    call = _verify.function(operator, CASE, eager=False)
    with torch.autocast(path.type, torch.bfloat16):
        assert call(*arguments(operator, torch.float64, path)[0]).dtype == torch.float64
        with torch.autocast(path.type, enabled=False):
            assert call(*arguments(operator, torch.float32, path)[0]).dtype == torch.float32
    assert call(*arguments(operator, torch.float32, path)[0]).dtype == torch.float32


@pytest.mark.parametrize("channels_last", (False, True))
def test_memory_format_is_kept(channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features, logits = (x.to(memory_format=layout) for x in arguments("carafe_upsample", torch.float32, device)[0])
    with torch.autocast(device.type, torch.bfloat16):
        output = dlu_triton.carafe_upsample(features, logits, 2, 3, 2)
    assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("region", HALF, **by_name)
def test_coordinates_are_float32(region, path):
    """Near column 337 bfloat16 knows every second column; kernels that differ between neighbours tell them apart."""
    width, taps = 340, 9
    tap = torch.arange(width) % taps  # of column x, all weight on tap x % 9
    space = 40.0 * torch.eye(taps)[tap].T.reshape(1, taps, 1, width).to(path)
    half = torch.full((1, 8, 1, width), 0.5, device=path)
    with torch.autocast(path.type, region):
        on_pixels = dlu_triton.expand_kernels(space, torch.zeros_like(half), 2, 3)
        between = dlu_triton.expand_kernels(space, half, 2, 3)
    repeated = torch.eye(taps)[tap].T.repeat_interleave(2, dim=1).to(path)  # (9, 680)
    torch.testing.assert_close(on_pixels[0, :, 0].float(), repeated)
    shifted = torch.cat([repeated[:, 2:], repeated[:, -2:]], dim=1)  # of the next column; the last stays
    torch.testing.assert_close(between[0, :, 0].float(), (repeated + shifted) / 2)


def test_sums_are_float32(path):
    """2048 ones and 1 to 24 more of 25 taps: float16 sums would stop at 2048."""
    features = torch.ones(1, 1, 5, 5, device=path)
    masks = torch.ones(1, 25, 5, 5, device=path)
    masks[:, 0] = 2040.0
    with torch.autocast(path.type, torch.float16):
        output = dlu_triton.carafe(features, masks, 5, 1, 1)
    assert output[0, 0, 2, 2] == 2064  # 2040 + 24: in float16 2048 + 1 is 2048, but 2064 is a float16


def trained(pack, x, grad_output, region, device):
    """Output and gradients of a pass in a region, or in the types that are there."""
    pack.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(device.type, region, enabled=region is not None):
        output = pack(x)
    output.backward(grad_output.to(output.dtype))
    return {"output": output, "x": x.grad, **{name: each.grad for name, each in pack.named_parameters()}}


def pack_and_inputs(module, device, up_group=1):
    torch.manual_seed(0)
    pack = module(8, 2, up_kernel=3, up_group=up_group, compressed_channels=8)
    for name, parameter in pack.named_parameters():
        if name == "conv_offset.bias":
            nn.init.constant_(parameter, 0.4)  # between pixels: at one the derivative of the offsets jumps
        elif not name.startswith("channel_compressor"):
            nn.init.normal_(parameter, std=0.02 if name == "conv_offset.weight" else 0.15)
    return pack.to(device), torch.randn(2, 8, 4, 3, device=device), torch.randn(2, 8, 8, 6, device=device)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), **by_name)
@pytest.mark.parametrize("region", (torch.float16, *long(torch.bfloat16)), **by_name)
@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_packs_in_a_region(module, region, dtype, path):
    """With float32 parameters: output in the type of the region, near that of float64; gradients in their own types."""
    pack, x, grad_output = pack_and_inputs(module, path, up_group=2)
    x = x.to(dtype)
    found = trained(pack, x, grad_output, region, path)
    exact = trained(copy.deepcopy(pack).double(), x.double(), grad_output.double(), None, path)
    assert found["output"].dtype == region
    assert found["x"].dtype == dtype
    for name, value in found.items():
        assert name in ("output", "x") or value.dtype == torch.float32
        scale = exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= 8 * torch.finfo(region).eps * scale, name


@pytest.mark.parametrize("dtype", HALF, **by_name)
@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_packs_in_half_precision(module, dtype, path):
    """All in one type, without a region."""
    pack, x, grad_output = pack_and_inputs(module, path)
    pack, x = pack.to(dtype), x.to(dtype)
    found = trained(pack, x, grad_output, None, path)
    exact = trained(copy.deepcopy(pack).double(), x.double(), grad_output.double(), None, path)
    for name, value in found.items():
        assert value.dtype == dtype
        scale = exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= 8 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_between_layers_of_a_region(module, path):
    """What precedes and follows gives and takes the type of the region; a skip connection adds up in it."""
    pack, x, _ = pack_and_inputs(module, path)
    before, after = nn.Conv2d(8, 8, 3, padding=1).to(path), nn.Conv2d(8, 2, 1).to(path)
    with torch.autocast(path.type, torch.bfloat16):
        hidden = before(x)
        upsampled = pack(hidden)
        output = after(upsampled + nn.functional.interpolate(hidden, scale_factor=2))
    assert (hidden.dtype, upsampled.dtype, output.dtype) == (torch.bfloat16,) * 3
    output.backward(torch.randn_like(output))
    assert before.weight.grad.isfinite().all()
    assert before.weight.grad.any()
