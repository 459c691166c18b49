"""Modules: names and sizes of parameters, initialisation, and what they compute."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import dlu_triton
from dlu_triton import CARAFE, CARAFEPack, DLUPack, reference

# As the official DLUPack and mmcv's CARAFEPack hold them, for 8 channels, scale 2, k = 5.
OFFICIAL = {
    DLUPack: {
        "channel_compressor.weight": (64, 8, 1, 1),
        "channel_compressor.bias": (64,),
        "kernel_space_generator.weight": (25, 64, 3, 3),
        "kernel_space_generator.bias": (25,),
        "conv_offset.weight": (8, 64, 3, 3),
        "conv_offset.bias": (8,),
    },
    CARAFEPack: {
        "channel_compressor.weight": (64, 8, 1, 1),
        "channel_compressor.bias": (64,),
        "content_encoder.weight": (100, 64, 3, 3),
        "content_encoder.bias": (100,),
    },
}


@pytest.mark.parametrize("module", OFFICIAL)
def test_official_checkpoints_load(module):
    checkpoint = {name: torch.randn(shape) for name, shape in OFFICIAL[module].items()}
    pack = module(channels=8, scale_factor=2)
    assert {name: tuple(value.shape) for name, value in pack.state_dict().items()} == OFFICIAL[module]
    pack.load_state_dict(checkpoint, strict=True)
    for name, value in pack.state_dict().items():
        assert torch.equal(value, checkpoint[name])


def test_constructor_arguments_in_the_official_order():
    for module in (DLUPack, CARAFEPack):
        pack = module(12, 3, 7, 2, 5, 2, 16)
        assert (pack.channels, pack.scale_factor, pack.up_kernel, pack.up_group) == (12, 3, 7, 2)
        encoder = pack.kernel_space_generator if module is DLUPack else pack.content_encoder
        assert encoder.weight.shape[1:] == (16, 5, 5)
        assert encoder.padding == (4, 4)
        assert encoder.dilation == (2, 2)
    carafe = CARAFE(5, 2, 3)
    assert (carafe.kernel_size, carafe.group_size, carafe.scale_factor) == (5, 2, 3)


@pytest.mark.parametrize(
    ("module", "scale_factor", "parameters"),
    [
        (CARAFEPack, 2, 74_148),
        (CARAFEPack, 4, 247_248),
        (CARAFEPack, 8, 939_648),
        (CARAFEPack, 16, 3_709_248),
        (DLUPack, 2, 35_489),
        (DLUPack, 4, 49_337),
        (DLUPack, 8, 104_729),
        (DLUPack, 16, 326_297),
    ],
)
def test_parameter_counts_of_the_papers(module, scale_factor, parameters):
    """74k at 2x is CARAFE's paper; 91% fewer at 16x is DLU's."""
    assert sum(parameter.numel() for parameter in module(256, scale_factor).parameters()) == parameters


def test_initialisation():
    torch.manual_seed(0)
    dlu, carafe = DLUPack(64, 2, up_group=2), CARAFEPack(64, 2)
    for pack in (dlu, carafe):
        assert all(value.count_nonzero() == 0 for name, value in pack.state_dict().items() if name.endswith("bias"))
        limit = (6 / (64 + 64)) ** 0.5  # Xavier uniform
        weight = pack.channel_compressor.weight
        assert 0.95 * limit < weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    for encoder in (dlu.kernel_space_generator, carafe.content_encoder):
        assert encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert dlu.conv_offset.weight.count_nonzero() == 0


def test_dlu_starts_as_nearest_repeated_kernels(device):
    """Zero offsets at initialisation: the four outputs of a source pixel share its softmaxed kernel."""
    torch.manual_seed(0)
    pack = DLUPack(4, 2, up_kernel=3).to(device)
    x = torch.randn(1, 4, 3, 4, device=device)
    space = pack.kernel_space_generator(pack.channel_compressor(x)).softmax(dim=1)
    masks = F.interpolate(space, scale_factor=2)
    torch.testing.assert_close(pack(x), reference.carafe(x, masks, 3, 1, 2))


@pytest.mark.parametrize("up_group", (1, 2))
def test_dlu_is_its_parts(device, up_group):
    torch.manual_seed(0)
    pack = DLUPack(4, 3, up_kernel=3, up_group=up_group, encoder_kernel=1, compressed_channels=8).to(device)
    torch.nn.init.normal_(pack.conv_offset.weight)
    x = torch.randn(2, 4, 3, 2, device=device)
    compressed = pack.channel_compressor(x)
    space, offsets = pack.kernel_space_generator(compressed), pack.conv_offset(compressed)
    expected = reference.dlu_upsample(x, space, offsets, 3, 3, up_group)
    torch.testing.assert_close(pack(x), expected)


@pytest.mark.parametrize("up_group", (1, 2))
def test_carafe_is_its_parts(device, up_group):
    """Pixel shuffle first, then softmax over the taps of each group."""
    torch.manual_seed(0)
    pack = CARAFEPack(4, 2, up_kernel=3, up_group=up_group, compressed_channels=8).to(device)
    torch.nn.init.normal_(pack.content_encoder.weight)
    x = torch.randn(2, 4, 3, 2, device=device)
    logits = pack.content_encoder(pack.channel_compressor(x))  # (2, G * 9 * 4, 3, 2)
    masks = torch.zeros(2, up_group * 9, 6, 4, device=device)
    for i in range(6):
        for j in range(4):
            taps = logits[:, i % 2 * 2 + j % 2 :: 4, i // 2, j // 2]  # (2, G * 9)
            masks[:, :, i, j] = taps.view(2, up_group, 9).softmax(dim=2).flatten(1)
    expected = reference.carafe(x, masks, 3, up_group, 2)
    torch.testing.assert_close(pack(x), expected)
    torch.testing.assert_close(CARAFE(3, up_group, 2)(x, masks), expected)


@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_training_reaches_every_parameter(module, device):
    """A few steps reduce the loss, and every parameter moves."""
    torch.manual_seed(0)
    pack = module(4, 2, up_kernel=3, up_group=2, compressed_channels=8).to(device)
    target = F.interpolate(torch.randn(1, 4, 4, 3), scale_factor=2, mode="bicubic").to(device)
    x = F.avg_pool2d(target, 2)
    before = {name: value.clone() for name, value in pack.state_dict().items()}
    optimiser = torch.optim.Adam(pack.parameters(), lr=0.03)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(pack(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, value in pack.state_dict().items():
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), f"{name} did not move"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_modules_in_other_dtypes(module, dtype, device):
    pack = module(4, 2, up_kernel=3, compressed_channels=8).to(device, dtype)
    output = pack(torch.randn(1, 4, 3, 3, device=device, dtype=dtype))
    assert output.shape == (1, 4, 6, 6)
    assert output.dtype == dtype


@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_empty_batch(module, device):
    assert module(4, 2).to(device)(torch.zeros(0, 4, 3, 3, device=device)).shape == (0, 4, 6, 6)


EAGER_TRAINING = """
import torch, torch.nn.functional as F
from dlu_triton import _launch, {module}
assert not _launch.INTERPRETED
torch.manual_seed(0)
pack = {module}(4, 2, up_group=2, compressed_channels=8)
target = F.interpolate(torch.randn(2, 4, 8, 6), scale_factor=2, mode="bicubic")
x = F.avg_pool2d(target, 2)
before = [parameter.clone() for parameter in pack.parameters()]
optimiser = torch.optim.Adam(pack.parameters(), lr=0.03)
losses = []
for _ in range(40):
    loss = F.mse_loss(pack(x), target)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
assert not any(torch.equal(old, new) for old, new in zip(before, pack.parameters()))
"""


@pytest.mark.parametrize("module", ("DLUPack", "CARAFEPack"))
def test_training_on_the_eager_path(module):
    """On CPU tensors, as without a GPU and without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = EAGER_TRAINING.format(module=module)
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_public_names():
    operators = {
        "carafe", "carafe_upsample", "class_activation_map", "class_activation_parts", "dlu_upsample", "expand_kernels",
        "weighted_activation_map", "xgrad_cam",
    }  # fmt: skip
    assert set(dlu_triton.__all__) == operators | {
        "CARAFE", "CARAFEPack", "DLUPack",
        "AblationCAM", "GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM",
        "CAMParts", "Complexity", "Explanation", "FusedExplanation", "complexity", "metrics", "overlay", "reference",
    }  # fmt: skip
    assert set(reference.__all__) == operators | {"CAMParts"}
