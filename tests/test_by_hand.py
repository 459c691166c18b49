"""Examples small enough to do by hand, for kernels and reference alike."""

import math

import pytest
import torch
from torch import tensor

import dlu_triton
from dlu_triton import reference

pytestmark = pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))

IMAGE = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


def one_hot_masks(tap, kernel_size, scale_factor=1, groups=1, size=3):
    masks = torch.zeros(1, groups, kernel_size**2, size * scale_factor, size * scale_factor)
    masks[:, :, tap] = 1
    return masks.flatten(1, 2)


@pytest.mark.parametrize(
    ("tap", "shifted"),
    [
        (0, [[0, 0, 0], [0, 1, 2], [0, 4, 5]]),  # u, v = -1, -1: the neighbour above and to the left
        (2, [[0, 0, 0], [2, 3, 0], [5, 6, 0]]),  # above and to the right
        (4, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),  # the centre
        (5, [[2, 3, 0], [5, 6, 0], [8, 9, 0]]),  # to the right
        (7, [[4, 5, 6], [7, 8, 9], [0, 0, 0]]),  # below
    ],
)
def test_carafe_one_hot_mask_is_a_shift(library, device, tap, shifted):
    masks = one_hot_masks(tap, 3).to(device)
    output = library.carafe(IMAGE.to(device)[None, None], masks, 3, 1, 1)
    assert output[0, 0].tolist() == shifted


def test_carafe_doubles_by_nearest_centre(library, device):
    output = library.carafe(IMAGE.to(device)[None, None], one_hot_masks(4, 3, scale_factor=2).to(device), 3, 1, 2)
    assert output[0, 0].tolist() == IMAGE.repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()


def test_carafe_groups_take_their_own_masks(library, device):
    features = torch.stack([IMAGE, 10 * IMAGE, 100 * IMAGE, 1000 * IMAGE])[None].to(device)
    masks = torch.cat([one_hot_masks(5, 3), one_hot_masks(7, 3)], dim=1).to(device)  # two channels each
    output = library.carafe(features, masks, 3, 2, 1)[0]
    right, below = tensor([[2.0, 3, 0], [5, 6, 0], [8, 9, 0]]), tensor([[4.0, 5, 6], [7, 8, 9], [0, 0, 0]])
    assert output.tolist() == torch.stack([right, 10 * right, 100 * below, 1000 * below]).tolist()


def test_carafe_gradients(library, device):
    """One output pixel: its features gradient is its mask, its mask gradient the features around it."""
    features = IMAGE.to(device)[None, None].requires_grad_()
    masks = (torch.arange(9.0)[None, :, None, None] + torch.zeros(1, 9, 3, 3)).to(device).requires_grad_()
    grad_output = torch.zeros(1, 1, 3, 3, device=device)
    grad_output[0, 0, 0, 1] = 2
    grad_features, grad_masks = torch.autograd.grad(
        library.carafe(features, masks, 3, 1, 1), (features, masks), grad_output
    )
    assert grad_features[0, 0].tolist() == [[6, 8, 10], [12, 14, 16], [0, 0, 0]]
    expected = torch.zeros(9, 3, 3)
    expected[:, 0, 1] = tensor([0.0, 0, 0, 2, 4, 6, 8, 10, 12])
    assert grad_masks[0].tolist() == expected.tolist()


def test_carafe_upsample_shuffles_then_normalises(library, device):
    """Of each 2 x 2 outputs one takes the centre, one its right, one its lower neighbour, and one the mean of both."""
    logits = torch.full((1, 9, 2, 2, 3, 3), -math.inf)  # tap, row and column among the four, pixel
    logits[0, 4, 0, 0] = logits[0, 5, 0, 1] = logits[0, 7, 1, 0] = 0
    logits[0, [5, 7], 1, 1] = 3
    output = library.carafe_upsample(IMAGE.to(device)[None, None], logits.flatten(1, 3).to(device), 2, 3)
    assert output[0, 0].tolist() == [
        [1, 2, 2, 3, 3, 0],
        [4, 3, 5, 4, 6, 3],
        [4, 5, 5, 6, 6, 0],
        [7, 6, 8, 7, 9, 4.5],
        [7, 8, 8, 9, 9, 0],
        [0, 4, 0, 4.5, 0, 0],
    ]


def kernel_space_of(probability):
    """Logits of a 3-tap-wide kernel space whose tap 0 has this probability per pixel and tap 8 the rest."""
    space = torch.full((1, 9, 3, 3), -math.inf, dtype=torch.float64)
    space[0, 0] = probability.double().log()
    space[0, 8] = (1 - probability.double()).log()
    return space


def test_sampling_between_pixels(library, device):
    """S[0] is 0, 0.1, ... 0.8; at (x, y) = (1.25, 0.5) it is 0.1 + 0.25 * 0.1 + 0.5 * 0.3."""
    probability = torch.arange(9.0).reshape(3, 3) / 10
    offsets = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    offsets[0, :, 0, 1] = tensor([0.25, 0.5])
    masks = library.expand_kernels(kernel_space_of(probability).to(device), offsets.to(device), 1, 3)[0].cpu()
    expected = probability.double().clone()
    expected[0, 1] = 0.275
    torch.testing.assert_close(masks[0], expected)
    torch.testing.assert_close(masks[8], 1 - expected)
    assert masks[1:8].abs().max() == 0


def test_offset_channels_are_x_then_y_within_each_group(library, device):
    """scale 2: channels 0..3 are dx of the four sub-pixels, 4..7 dy; group 1 follows with 8..15."""
    probability = torch.arange(9.0).reshape(3, 3) / 10
    space = kernel_space_of(probability).repeat(1, 2, 1, 1)
    offsets = torch.zeros(1, 16, 3, 3, dtype=torch.float64)
    offsets[0, 1] = 1  # group 0, sub-pixel (0, 1): one to the right
    offsets[0, 8 + 4 + 2] = 1  # group 1, sub-pixel (1, 0): one down
    masks = library.expand_kernels(space.to(device), offsets.to(device), 2, 3, groups=2)[0].cpu()
    nearest = probability.double().repeat_interleave(2, 0).repeat_interleave(2, 1)
    group_0, group_1 = nearest.clone(), nearest.clone()
    group_0[0::2, 1::2] = tensor([[0.1, 0.2, 0.2], [0.4, 0.5, 0.5], [0.7, 0.8, 0.8]])
    group_1[1::2, 0::2] = tensor([[0.3, 0.4, 0.5], [0.6, 0.7, 0.8], [0.6, 0.7, 0.8]])
    torch.testing.assert_close(masks[0], group_0)
    torch.testing.assert_close(masks[9], group_1)


@pytest.mark.parametrize(
    ("dx", "sample", "slope"),
    [
        (-1.0, 0.0, 0.0),  # on the border: held, no gradient
        (-1.5, 0.0, 0.0),  # beyond it
        (1.0, 0.9, 0.0),  # on the far border
        (7.0, 0.9, 0.0),
        (0.0, 0.1, 0.8),  # on a pixel inside: the right-hand derivative
        (-0.5, 0.05, 0.1),
        (0.5, 0.5, 0.8),
    ],
)
def test_clamp_and_its_gradient(library, device, dx, sample, slope):
    """S[0] is 0, 0.1, 0.9 along x; the sample starts from the middle."""
    space = kernel_space_of(tensor([0.0, 0.1, 0.9]).expand(3, 3)).to(device)
    offsets = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    offsets[0, 0, 1, 1] = dx
    offsets = offsets.to(device).requires_grad_()
    masks = library.expand_kernels(space, offsets, 1, 3)
    assert masks[0, 0, 1, 1].item() == pytest.approx(sample)
    grad_masks = torch.zeros_like(masks)
    grad_masks[0, 0, 1, 1] = 1
    (grad_offsets,) = torch.autograd.grad(masks, offsets, grad_masks)
    assert grad_offsets[0, 0, 1, 1].item() == pytest.approx(slope)
    assert grad_offsets[0, 1, 1, 1].item() == pytest.approx(0)  # constant along y
    assert (grad_offsets.abs() > 1e-12).sum() <= 1


def test_dlu_with_zero_offsets_averages_under_flat_logits(library, device):
    """Equal logits give kernels of 1/9: the corner sees four pixels, the centre nine."""
    zeros = torch.zeros(1, 9, 3, 3, device=device)
    output = library.dlu_upsample(9 * IMAGE.to(device)[None, None], zeros, zeros[:, :2], 1, 3)[0, 0]
    expected = tensor([[12.0, 21, 16], [27, 45, 33], [24, 39, 28]])
    torch.testing.assert_close(output.cpu(), expected)
