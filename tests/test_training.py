"""Networks trained through the kernels in float32, under autocast, and with scaled losses, beside eager float32."""

import pytest
import torch
import torch.nn.functional as F
from selection import long
from torch import nn

from dlu_triton import CARAFEPack, DLUPack, modules, reference

STEPS = 24
PACKS = {DLUPack: "dlu_upsample", CARAFEPack: "carafe_upsample"}

# The loss of every step may be off by this much of eager float32's. Float32 differs by the order of its sums. Half
# precision rounds features, kernels and gradients by up to 2^-11 and 2^-8 of them, which moves the curves of eager
# training by 0.04% and 0.4%; a network that runs into a kink of ReLU or sampling one step later takes several times
# that. A gradient of any argument that is half or twice as large moves them by WRONG at least.
TOLERANCE = {torch.float32: 0.001, torch.float16: 0.005, torch.bfloat16: 0.02}
WRONG = 0.04


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Float32 is float32, whatever the GPU's convolutions would rather take."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before


def network(pack, seed, device):
    """Two convolutions around a pack; the seed is that of the pack's kernels and offsets."""
    torch.manual_seed(0)
    packed = pack(6, 2, up_kernel=3, compressed_channels=6)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), packed, nn.Conv2d(6, 2, 3, padding=1))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if not name.startswith("channel_compressor"):
                deviation = 0.2 if name.startswith("conv_offset") else 0.3
                parameter.add_(torch.randn(parameter.shape) * deviation)
    return net.to(device)


def losses(pack, dtype, device):
    """Of each step of training a network to be one with other kernels and offsets."""
    teacher, student = network(pack, 1, device), network(pack, 6, device)
    torch.manual_seed(3)
    x = torch.randn(1, 3, 4, 4).to(device)
    with torch.no_grad():
        target = teacher(x)
        target = (target - target.mean((2, 3), keepdim=True)) / target.std()
    # Its steps are as long as the gradients, unlike Adam's, to which a factor means nothing.
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.5)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    found = []
    while len(found) < STEPS:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = student(x)
        assert output.dtype == dtype
        loss = F.mse_loss(output.float(), target)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimiser)
        scaler.update()
        if scaler.get_scale() < scale:
            assert not found, f"step {len(found)} was skipped"
            assert scale > 2**12, "the gradients overflow at any scale"
            continue
        found.append(loss.item())
        for name, parameter in student.named_parameters():
            assert parameter.grad.isfinite().all(), f"{name}, step {len(found)}"
            assert parameter.grad.any(), f"{name}, step {len(found)}"
    return torch.tensor(found)


def eager_losses(pack, device, monkeypatch, operator=None):
    with monkeypatch.context() as patch:
        patch.setattr(modules, PACKS[pack], operator or getattr(reference, PACKS[pack]))
        return losses(pack, torch.float32, device)


@pytest.mark.parametrize("dtype", (torch.float16, *long(torch.float32, torch.bfloat16)), ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_losses_follow_those_of_eager_float32(pack, dtype, device, monkeypatch):
    expected = eager_losses(pack, device, monkeypatch)
    found = losses(pack, dtype, device)
    assert ((found - expected).abs() / expected).max() <= TOLERANCE[dtype]
    assert found[-1] < found[0] / 4


@pytest.mark.parametrize("factor", (0.5, 2.0))
@pytest.mark.parametrize(
    ("pack", "argument"), [(DLUPack, 0), (DLUPack, 1), (DLUPack, 2), (CARAFEPack, 0), (CARAFEPack, 1)]
)
def test_wrong_gradients_would_show(pack, argument, factor, device, monkeypatch):
    """Those of one argument half or twice as large move the losses by more than any tolerance."""

    def wrong(*arguments):
        x = arguments[argument]
        scaled = x.detach() + factor * (x - x.detach())  # adds zero
        return getattr(reference, PACKS[pack])(*arguments[:argument], scaled, *arguments[argument + 1 :])

    expected = eager_losses(pack, device, monkeypatch)
    found = eager_losses(pack, device, monkeypatch, wrong)
    assert ((found - expected).abs() / expected).max() > WRONG > max(TOLERANCE.values())
