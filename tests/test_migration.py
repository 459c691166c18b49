"""What docs/migration.md says of other libraries' upsamplers: what is equal, and what differs.

Kernels of mmcv need a GPU and a build, so loops stand for them, written from what its kernels compute; the official
DLU module is `F.grid_sample` and these. Class activation maps are in test_neighbours.py.
"""

import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dlu_triton
from dlu_triton import CARAFE, CARAFEPack, DLUPack

TESTS = Path(__file__).parent
PAGE = TESTS.parent.joinpath("docs", "migration.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def block(text):
    """The page's block of Python with this text."""
    (found,) = (each for each in BLOCKS if text in each)
    return found


def randn(*shape, dtype=torch.float64, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def gradients(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream)


def test_page_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    text = "".join(TESTS.joinpath(name).read_text() for name in ("test_migration.py", "test_neighbours.py"))
    assert len(named) > 40
    assert named <= set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------------
# mmcv
# ---------------------------------------------------------------------------------------------------------------


def mmcv_taps(shape, k, groups, s):
    """Of every output element of (N, C, s*H, s*W): its index, those of its features, and those of its masks."""
    n, c, rows, columns = shape
    for image, channel, row, column in np.ndindex(n, c, rows, columns):
        group = channel // (c // groups)
        for u in range(k):
            for v in range(k):
                y, x = row // s + u - (k - 1) // 2, column // s + v - (k - 1) // 2
                if 0 <= y < rows // s and 0 <= x < columns // s:
                    tap = (group * k + u) * k + v
                    yield (image, channel, row, column), (image, channel, y, x), (image, tap, row, column)


def mmcv_forward(features, masks, k, groups, s):
    """As arrays of float64."""
    n, c, h, w = features.shape
    output = np.zeros((n, c, s * h, s * w))
    for out, feature, mask in mmcv_taps(output.shape, k, groups, s):
        output[out] += features[feature] * masks[mask]
    return output


def mmcv_backward(grad_output, features, masks, k, groups, s):
    grad_features, grad_masks = np.zeros(features.shape), np.zeros(masks.shape)
    for out, feature, mask in mmcv_taps(grad_output.shape, k, groups, s):
        grad_features[feature] += masks[mask] * grad_output[out]
        grad_masks[mask] += features[feature] * grad_output[out]
    return grad_features, grad_masks


@pytest.mark.parametrize(("k", "groups", "s"), ((5, 1, 2), (3, 2, 3), (1, 4, 1)))
@pytest.mark.parametrize("module", (False, True))
def test_mmcv_formula(k, groups, s, module, device):
    """Masks are no softmax, and weigh channels of their group, zeros outside the image."""
    features = randn(2, 4, 3, 4, device=device).requires_grad_()
    masks = randn(2, groups * k * k, 3 * s, 4 * s, device=device, seed=1).requires_grad_()
    upstream = randn(2, 4, 3 * s, 4 * s, device=device, seed=2)
    output = CARAFE(k, groups, s)(features, masks) if module else dlu_triton.carafe(features, masks, k, groups, s)
    arrays = [tensor.numpy(force=True) for tensor in (upstream, features, masks)]
    expected = mmcv_forward(*arrays[1:], k, groups, s), *mmcv_backward(*arrays, k, groups, s)
    for found, array in zip((output, *gradients(output, (features, masks), upstream)), expected, strict=True):
        torch.testing.assert_close(found.cpu(), torch.from_numpy(array))


@pytest.mark.skipif("MMCV" not in os.environ, reason="MMCV is not the path of a checkout of mmcv")
def test_mmcv_recorded_arrays(path):
    def recorded(name, *shape):
        array = np.fromfile(Path(os.environ["MMCV"], f"tests/data/for_carafe/carafe_{name}.bin"), dtype=np.float32)
        return torch.from_numpy(array.reshape(shape)).to(path)

    features = recorded("feat", 2, 64, 3, 3).requires_grad_()
    masks = recorded("mask", 2, 100, 6, 6).requires_grad_()
    output = CARAFE(5, 4, 2)(features, masks)
    found = output, *gradients(output, (features, masks), torch.ones_like(output))
    expected = (
        recorded("output", 2, 64, 6, 6),
        recorded("feat_grad", 2, 64, 3, 3),
        recorded("mask_grad", 2, 100, 6, 6),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-5)


@pytest.fixture
def mmcv_carafe(monkeypatch):
    """mmcv's own `ops/carafe.py` with the loops above for its kernels, and without a place in OpenMMLab's registry."""
    package = pytest.importorskip("mmcv")
    path = Path(package.__file__).parent / "ops" / "carafe.py"
    registry = pytest.importorskip("mmengine.registry")

    def forward(features, masks, kept, rest, rest_of_masks, output, kernel_size, group_size, scale_factor):
        kept.copy_(features)
        sizes = kernel_size, group_size, scale_factor
        output.copy_(torch.from_numpy(mmcv_forward(features.numpy(force=True), masks.numpy(force=True), *sizes)))

    def backward(
        grad_output, kept, masks, a, b, c, d, grad_features, grad_masks, kernel_size, group_size, scale_factor
    ):
        arrays = [tensor.numpy(force=True) for tensor in (grad_output, kept, masks)]
        found = mmcv_backward(*arrays, kernel_size, group_size, scale_factor)
        for gradient, array in zip((grad_features, grad_masks), found, strict=True):
            gradient.copy_(torch.from_numpy(array))

    extension = types.ModuleType("mmcv._ext")
    extension.carafe_forward, extension.carafe_backward = forward, backward
    extension.carafe_naive_forward = extension.carafe_naive_backward = None
    monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    monkeypatch.setattr(registry.MODELS, "register_module", lambda *_, **__: lambda cls: cls)
    spec = importlib.util.spec_from_file_location("mmcv.ops.carafe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments",
    (
        {"channels": 4, "scale_factor": 2, "compressed_channels": 6},
        {"channels": 4, "scale_factor": 3, "up_kernel": 3, "up_group": 2, "encoder_kernel": 5, "encoder_dilation": 2},
    ),
)
def test_mmcv_pack(mmcv_carafe, arguments, device):
    packs = []
    for module in (mmcv_carafe.CARAFEPack, CARAFEPack):
        torch.manual_seed(3)
        packs.append(module(**arguments))
    theirs, ours = packs
    for name, value in theirs.state_dict().items():  # drawn from the same seed
        assert torch.equal(value, ours.state_dict()[name])
    for seed, parameter in enumerate(theirs.parameters()):  # masks that are far from uniform
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.double(), ours.double().to(device)
    x = randn(2, 4, 3, 4)
    results = []
    for pack in packs:
        inputs = x.to(next(pack.parameters()).device).requires_grad_()
        output = pack(inputs)
        upstream = randn(*output.shape, seed=1).to(output.device)
        results.append([output, *gradients(output, (inputs, *pack.parameters()), upstream)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected.cpu())


def test_mmcv_argument_names(device):
    features, masks = randn(1, 4, 2, 3, device=device), randn(1, 18, 4, 6, device=device)
    expected = dlu_triton.carafe(features, masks, 3, 2, 2)
    names = {"features": features, "masks": masks, "kernel_size": 3, "group_size": 2, "scale_factor": 2}
    assert torch.equal(dlu_triton.carafe(**names), expected)
    assert torch.equal(CARAFE(kernel_size=3, group_size=2, scale_factor=2)(features, masks), expected)


def test_mmcv_calls(mmcv_carafe):
    features, masks = randn(1, 4, 2, 3), randn(1, 18, 4, 6)
    expected = dlu_triton.reference.carafe(features, masks, 3, 2, 2)
    torch.testing.assert_close(mmcv_carafe.carafe(features, masks, 3, 2, 2), expected)
    by_name = mmcv_carafe.carafe(features, masks, kernel_size=3, group_size=2, scale_factor=2)
    torch.testing.assert_close(by_name, expected)
    with pytest.raises(AssertionError):
        mmcv_carafe.carafe(features, masks, 5, 2, 2)


def test_mmcv_half_precision_sums(device):
    """A one and 24 terms of 2^-12: in float16 each of these is lost in the sum, all of them are 0.6%."""
    masks = torch.full((1, 25, 5, 5), 2.0**-12, dtype=torch.float16)
    masks[:, 0] = 1
    features = torch.ones(1, 1, 5, 5, dtype=torch.float16)
    in_float16 = np.float16(0)
    for term in masks[0, :, 2, 2].numpy():
        in_float16 += np.float16(1) * term
    assert in_float16 == 1
    found = dlu_triton.carafe(features.to(device), masks.to(device), 5, 1, 1)
    assert found[0, 0, 2, 2].item() == torch.tensor(1 + 24 * 2.0**-12).half().item() > 1


def test_mmcv_types_and_layouts(device):
    features, masks = randn(2, 4, 3, 4, device=device), randn(2, 18, 6, 8, device=device, seed=1)
    expected = dlu_triton.carafe(features, masks, 3, 2, 2)
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (features, masks)]
    torch.testing.assert_close(dlu_triton.carafe(*last, 3, 2, 2), expected)
    wider = torch.stack([features, -features], dim=-1)[..., 0]
    assert not wider.is_contiguous()
    torch.testing.assert_close(dlu_triton.carafe(wider, masks, 3, 2, 2), expected)
    for dtype in (torch.bfloat16, torch.float16):
        for of_masks in (dtype, torch.float32):
            found = dlu_triton.carafe(features.to(dtype), masks.to(of_masks), 3, 2, 2)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 0.02)
    assert dlu_triton.carafe(features[:0], masks[:0], 3, 2, 2).shape == (0, 4, 6, 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    (
        ((5, 2, 2), "masks"),  # 18 channels are no 5 x 5 kernels
        ((3, 2, 3), "masks"),
        ((3, 3, 2), "group_size"),
        ((11, 2, 2), "kernel_size"),
        ((3, 2, 17), "scale_factor"),
    ),
)
def test_mmcv_bad_arguments(sizes, message):
    with pytest.raises(ValueError, match=message):
        dlu_triton.carafe(randn(2, 4, 3, 4), randn(2, 18, 6, 8), *sizes)


def test_mmcv_output_size(device):
    """Instead of an output that is cut where the finer level of a pyramid has an odd size."""
    x = randn(1, 4, 3, 4, dtype=torch.float32, device=device)
    for module in (CARAFEPack, DLUPack):
        pack = module(4, 2, up_kernel=3, compressed_channels=6).to(device)
        for parameter in pack.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        torch.testing.assert_close(pack(x, output_size=(5, 7)), pack(x)[..., :5, :7])


# ---------------------------------------------------------------------------------------------------------------
# The official DLU
# ---------------------------------------------------------------------------------------------------------------


def official_grid(offsets, s, dtype=torch.float32):
    """Sampling points (N, s*H, s*W, 2) from -1 to 1: pixels' centres at their ends, and offsets in pixels."""
    h, w = offsets.shape[2:]
    shifts = F.pixel_shuffle(offsets, s).permute(0, 2, 3, 1) * 2 / torch.tensor([w - 1, h - 1])
    x, y = (torch.linspace(-1, 1, size, dtype=dtype).repeat_interleave(s) for size in (w, h))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) + shifts


def official_masks(kernel_space, offsets, s, k, dtype=torch.float32):
    normalised = kernel_space.unflatten(1, (-1, k * k)).softmax(2).flatten(1, 2)
    grid = official_grid(offsets, s, dtype)
    return F.grid_sample(normalised, grid, mode="bilinear", padding_mode="border", align_corners=True)


def reassembled(features, masks, k, s):
    """CARAFE of one group by an unfold."""
    windows = F.unfold(features, k, padding=k // 2).unflatten(1, (features.shape[1], k * k))
    windows = windows.unflatten(3, features.shape[2:]).repeat_interleave(s, 3).repeat_interleave(s, 4)
    return (windows * masks.unsqueeze(1)).sum(2)


def dlu_inputs(k, s, h=3, w=5, reach=1.5):
    features, kernel_space = randn(2, 3, h, w), randn(2, k * k, h, w, seed=1)
    return features, kernel_space, reach * randn(2, 2 * s * s, h, w, seed=2)


def assert_equal_to_official(inputs, s, k, device):
    tensors = [tensor.requires_grad_() for tensor in inputs]
    features, kernel_space, offsets = tensors
    expected = reassembled(features, official_masks(kernel_space, offsets, s, k, torch.float64), k, s)
    upstream = randn(*expected.shape, seed=3)
    ours = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
    found = dlu_triton.dlu_upsample(*ours, s, k)
    torch.testing.assert_close(found.cpu(), expected)
    pairs = zip(gradients(found, ours, upstream.to(device)), gradients(expected, tensors, upstream), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize(("k", "s"), ((5, 2), (3, 3), (1, 1)))
def test_official_dlu(k, s, device):
    assert_equal_to_official(dlu_inputs(k, s), s, k, device)
    features, kernel_space, offsets = (tensor.float() for tensor in dlu_inputs(k, s))
    expected = reassembled(features, official_masks(kernel_space, offsets, s, k), k, s)
    found = dlu_triton.dlu_upsample(features.to(device), kernel_space.to(device), offsets.to(device), s, k)
    torch.testing.assert_close(found.cpu(), expected)


def test_official_dlu_checkpoint(device):
    """The module from its checkpoint alone, by the official names."""
    names = ("channel_compressor", "kernel_space_generator", "conv_offset")
    sizes = ((6, 4, 1, 1), (9, 6, 3, 3), (8, 6, 3, 3))
    checkpoint = {}
    for seed, (name, size) in enumerate(zip(names, sizes, strict=True)):
        checkpoint[f"{name}.weight"] = 0.5 * randn(*size, seed=seed)
        checkpoint[f"{name}.bias"] = 0.1 * randn(size[0], seed=10 + seed)
    pack = DLUPack(4, 2, up_kernel=3, compressed_channels=6).double().to(device)
    pack.load_state_dict(checkpoint, strict=True)
    values = [value.requires_grad_() for value in checkpoint.values()]
    x = randn(2, 4, 3, 5, seed=20)
    compressed = F.conv2d(x, *values[:2])
    kernel_space, offsets = (F.conv2d(compressed, *values[i : i + 2], padding=1) for i in (2, 4))
    expected = reassembled(x, official_masks(kernel_space, offsets, 2, 3, torch.float64), 3, 2)
    found = pack(x.to(device))
    torch.testing.assert_close(found.cpu(), expected)
    upstream = randn(*expected.shape, seed=21)
    ours = dict(zip(pack.state_dict(), gradients(found, tuple(pack.parameters()), upstream.to(device)), strict=True))
    for name, gradient in zip(checkpoint, gradients(expected, values, upstream), strict=True):
        torch.testing.assert_close(ours[name].cpu(), gradient)


def test_official_dlu_border(device):
    """Whole numbers, in sizes whose grid has no rounding: beyond the border, on it, and in the image."""
    features, kernel_space, offsets = dlu_inputs(3, 2, h=3, w=5, reach=4)
    offsets = offsets.round()
    assert (offsets == 0).any()
    assert offsets.abs().max() > 5
    assert_equal_to_official((features, kernel_space, offsets), 2, 3, device)


def one_sided_gradients(kernel_space, upstream, s):
    """Of offsets that are zero, (2, s*H, s*W): those of the pixel after, and of the pixel before."""
    normalised = kernel_space.softmax(1)
    found = []
    for step in (1, -1):
        differences = [step * (normalised.roll(-step, axis) - normalised) for axis in (3, 2)]  # of dx, dy
        differences = torch.stack(differences, 1)[0].repeat_interleave(s, 2).repeat_interleave(s, 3)
        gradient = (upstream * differences).sum(1)
        gradient[0, :, :s] = gradient[0, :, -s:] = gradient[1, :s] = gradient[1, -s:] = 0  # the border
        found.append(gradient)
    return found


def gradients_at_initialisation(expand, h, w, device):
    """In float32, of masks with zero offsets, beside what `one_sided_gradients` has."""
    k, s = 3, 2
    kernel_space, upstream = randn(1, k * k, h, w), randn(1, k * k, s * h, s * w, seed=1)
    offsets = torch.zeros(1, 2 * s * s, h, w, device=device).requires_grad_()
    masks = expand(kernel_space.float().to(device), offsets, s, k)
    (found,) = gradients(masks, offsets, upstream.float().to(device))
    return F.pixel_shuffle(found, s)[0].cpu().double(), *one_sided_gradients(kernel_space, upstream, s)


def test_official_dlu_at_initialisation(device):
    found, after, before = gradients_at_initialisation(dlu_triton.expand_kernels, 5, 14, device)
    torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
    official, after, before = gradients_at_initialisation(official_masks, 25, 42, "cpu")
    share = ((official - after).abs() > 1e-3).double().mean()
    assert 0.15 < share < 0.25
    assert torch.minimum((official - after).abs(), (official - before).abs()).max() < 1e-3


def test_official_dlu_initialisation():
    """Drawn from the same seed: three convolutions, Xavier's weights for each, then the kernel space's."""
    torch.manual_seed(5)
    compressor, space, offset = convolutions = (
        torch.nn.Conv2d(4, 64, 1),
        torch.nn.Conv2d(64, 25, 3),
        torch.nn.Conv2d(64, 8, 3),
    )
    for convolution in convolutions:
        torch.nn.init.xavier_uniform_(convolution.weight)
    torch.nn.init.normal_(space.weight, std=0.001)
    torch.manual_seed(5)
    pack = DLUPack(4, 2)
    assert torch.equal(pack.channel_compressor.weight, compressor.weight)
    assert torch.equal(pack.kernel_space_generator.weight, space.weight)
    assert offset.weight.shape == pack.conv_offset.weight.shape
    assert not any(each.count_nonzero() for each in (*pack.conv_offset.parameters(), pack.channel_compressor.bias))


def test_official_dlu_raises(device):
    """What it cannot run, and here runs: groups, half precision, and maps of one row or column."""
    with pytest.raises(RuntimeError, match="must match the size"):
        official_grid(randn(1, 16, 3, 4, dtype=torch.float32), 2)
    parts = randn(1, 4, 3, 4), randn(1, 18, 3, 4, seed=1), randn(1, 16, 3, 4, seed=2)
    groups = dlu_triton.dlu_upsample(*(part.to(device) for part in parts), 2, 3, 2)
    for g in (0, 1):
        of_group = (part.chunk(2, 1)[g].to(device) for part in parts)
        torch.testing.assert_close(groups.chunk(2, 1)[g], dlu_triton.dlu_upsample(*of_group, 2, 3))

    for dtype in (torch.float16, torch.bfloat16):
        half = [tensor.to(dtype) for tensor in dlu_inputs(3, 2)]
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            official_masks(*half[1:], 2, 3)
        assert dlu_triton.dlu_upsample(*(tensor.to(device) for tensor in half), 2, 3).dtype == dtype

    features, kernel_space, offsets = dlu_inputs(3, 2, h=3, w=1)
    assert not official_grid(offsets, 2, torch.float64)[..., 0].isfinite().any()
    found = dlu_triton.dlu_upsample(features.to(device), kernel_space.to(device), offsets.to(device), 2, 3)
    (wide_space, wide_features) = (F.pad(tensor, (0, 1)) for tensor in (kernel_space, features))
    wide_space[..., 1] = wide_space[..., 0]  # so that it does not matter where between the two a point is
    masks = official_masks(wide_space, F.pad(offsets, (0, 1)), 2, 3, torch.float64)
    torch.testing.assert_close(found.cpu(), reassembled(wide_features, masks, 3, 2)[..., :2])


# ---------------------------------------------------------------------------------------------------------------
# Copies in plain PyTorch
# ---------------------------------------------------------------------------------------------------------------


def unfold_then_repeat(x, masks, k, s):
    windows = F.unfold(x, k, padding=k // 2).unflatten(2, x.shape[2:])
    windows = F.interpolate(windows, scale_factor=s, mode="nearest")
    return (windows.unflatten(1, (x.shape[1], k * k)) * masks.unsqueeze(1)).sum(2)


def repeat_then_unfold(x, masks, k, s):
    nearest = F.interpolate(x, scale_factor=s, mode="nearest")
    windows = F.unfold(nearest, k, dilation=s, padding=k // 2 * s).unflatten(2, nearest.shape[2:])
    return torch.einsum("nkhw,nckhw->nchw", masks, windows.unflatten(1, (x.shape[1], k * k)))


def windows_then_shuffle(x, masks, k, s):
    """A matrix product for each source pixel; the outputs of a pixel are channels until the end."""
    windows = F.pad(x, [k // 2] * 4).unfold(2, k, 1).unfold(3, k, 1).flatten(4)  # (N, C, H, W, k*k)
    kernels = masks.unfold(2, s, s).unfold(3, s, s).flatten(4)  # (N, k*k, H, W, s*s)
    product = windows.permute(0, 2, 3, 1, 4) @ kernels.permute(0, 2, 3, 1, 4)  # (N, H, W, C, s*s)
    return F.pixel_shuffle(product.flatten(3).permute(0, 3, 1, 2), s)


COPIES = pytest.mark.parametrize("copy", (unfold_then_repeat, repeat_then_unfold, windows_then_shuffle))


@COPIES
@pytest.mark.parametrize(("k", "s"), ((5, 2), (3, 3)))
def test_copies_equal(copy, k, s, device):
    x, logits = randn(2, 3, 3, 4).requires_grad_(), randn(2, k * k * s * s, 3, 4, seed=1).requires_grad_()
    expected = copy(x, F.pixel_shuffle(logits, s).softmax(1), k, s)
    upstream = randn(*expected.shape, seed=2)
    ours = [tensor.detach().to(device).requires_grad_() for tensor in (x, logits)]
    found = dlu_triton.carafe_upsample(*ours, s, k)
    torch.testing.assert_close(found.cpu(), expected)
    pairs = zip(gradients(found, ours, upstream.to(device)), gradients(expected, (x, logits), upstream), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found.cpu(), expected)


@pytest.fixture
def page_functions():
    """`shuffled_order` and `padded_carafe`, as the page has them."""
    names = {"features": randn(2, 8, 5, 6), "masks": randn(2, 25, 10, 12), "F": F, "torch": torch}
    exec(block("def padded_carafe"), {**names, "dlu_triton": dlu_triton}, names)
    return types.SimpleNamespace(**names)


def test_copies_with_another_order(page_functions, device):
    """Outputs of a source pixel first in the channels: as kernels of each output, put side by side."""
    k, s = 3, 2
    x, encode = randn(1, 4, 3, 5), torch.nn.Conv2d(4, (k * s) ** 2, 3, padding=1).double()
    logits = encode(x).detach()
    masks = logits.new_empty(1, k * k, 6, 10)
    for i, j in np.ndindex(s, s):
        masks[:, :, i::s, j::s] = logits.unflatten(1, (s * s, k * k))[:, i * s + j].softmax(1)
    expected = unfold_then_repeat(x, masks, k, s)
    x, logits = x.to(device), logits.to(device)
    found = dlu_triton.carafe_upsample(x, page_functions.shuffled_order(logits, s, k), s, k)
    torch.testing.assert_close(found.cpu(), expected)
    assert not torch.allclose(dlu_triton.carafe_upsample(x, logits, s, k).cpu(), expected)
    with torch.no_grad():  # the encoder's weights instead, once and for all
        for parameter in encode.parameters():
            parameter.copy_(parameter.unflatten(0, (s * s, k * k)).transpose(0, 1).flatten(0, 1))
        found = dlu_triton.carafe_upsample(x, encode.to(device)(x), s, k)
    torch.testing.assert_close(found.cpu(), expected)


@COPIES
@pytest.mark.parametrize(
    "normalise",
    (
        lambda logits: F.pixel_shuffle(logits.softmax(1), 2),  # over all that belongs to a source pixel
        lambda logits: F.pixel_shuffle(logits, 2).sigmoid(),
        lambda logits: F.pixel_shuffle(logits, 2).relu(),
        lambda logits: F.pixel_shuffle(logits, 2),
    ),
    ids=("softmax of all", "sigmoid", "relu", "none"),
)
def test_copies_with_another_normalisation(copy, normalise, device):
    x, logits = randn(1, 4, 3, 5), randn(1, 36, 3, 5, seed=1)
    masks = normalise(logits)
    expected = copy(x, masks, 3, 2)
    torch.testing.assert_close(dlu_triton.carafe(x.to(device), masks.to(device), 3, 1, 2).cpu(), expected)
    assert not torch.allclose(dlu_triton.carafe_upsample(x.to(device), logits.to(device), 2, 3).cpu(), expected)


def test_copies_with_one_softmax_for_all_groups(device):
    x, logits = randn(1, 4, 3, 5), randn(1, 72, 3, 5, seed=1)
    masks = F.pixel_shuffle(logits, 2).softmax(1)  # 18 channels, of two groups
    parts = zip(x.chunk(2, 1), masks.chunk(2, 1), strict=True)
    expected = torch.cat([unfold_then_repeat(*part, 3, 2) for part in parts], 1)
    torch.testing.assert_close(dlu_triton.carafe(x.to(device), masks.to(device), 3, 2, 2).cpu(), expected)
    assert not torch.allclose(dlu_triton.carafe_upsample(x.to(device), logits.to(device), 2, 3, 2).cpu(), expected)


@pytest.mark.parametrize("mode", ("reflect", "replicate"))
def test_copies_with_another_border(page_functions, mode, device):
    k, s, r = 5, 2, 2
    x, masks = randn(2, 4, 6, 7), randn(2, 2 * k * k, 12, 14, seed=1)
    windows = F.unfold(F.pad(x, [r] * 4, mode), k).unflatten(2, x.shape[2:])
    windows = F.interpolate(windows, scale_factor=s).unflatten(1, (2, 2, k * k))  # groups, channels of each
    expected = (windows * masks.unflatten(1, (2, 1, k * k))).sum(3).flatten(1, 2)
    arguments = x.to(device), masks.to(device), k, 2, s
    torch.testing.assert_close(page_functions.padded_carafe(*arguments, mode).cpu(), expected)
    zeros = dlu_triton.carafe(*arguments).cpu()
    within = (..., slice(s * r, -s * r), slice(s * r, -s * r))
    torch.testing.assert_close(zeros[within], expected[within])
    assert ((zeros - expected).abs() > 1e-3).any((0, 1)).sum() == 12 * 14 - 4 * 6  # everywhere else


# ---------------------------------------------------------------------------------------------------------------
# pytorch-grad-cam, as far as it takes nothing but the page
# ---------------------------------------------------------------------------------------------------------------


def test_two_lines(device):
    """With targets as pytorch-grad-cam has them: functions of one image's output."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    names = {
        "dlu_triton": dlu_triton,
        "model": model.to(device),
        "images": torch.rand(2, 3, 8, 8, device=device),
        "classes": [lambda output: output[3], lambda output: output[0]],
    }
    exec(block("cam = dlu_triton.XGradCAM("), names)
    assert names["grayscale_cam"].shape == (2, 8, 8)
    expected = dlu_triton.XGradCAM(model, "1", eps=1e-7)(names["images"], [3, 0]).map
    torch.testing.assert_close(torch.from_numpy(names["grayscale_cam"]), expected.cpu())
