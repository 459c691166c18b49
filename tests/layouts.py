"""Tensors of the same values in other memory layouts."""

import torch


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x):
    """Every second element of a larger tensor, in all dimensions, NaN in between."""
    large = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
    large[1::2, 1::2, 1::2, 1::2] = x
    return large[1::2, 1::2, 1::2, 1::2]


def cropped(x):
    """Columns two to the right of the edge of a wider tensor: even strides and odd, and a base that is not aligned."""
    wide = x.new_full((*x.shape[:3], x.shape[3] + 3), float("nan"))
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def framed(x):
    """Inside a larger map, with strides and a base that pairs of columns can be read from."""
    n, c, h, w = x.shape
    large = x.new_full((n, c, h + 2, (w + 7) // 4 * 4 + 4), float("nan"))
    large[:, :, 1 : h + 1, 4 : w + 4] = x
    return large[:, :, 1 : h + 1, 4 : w + 4]


def apart(x):
    """Images in channels_last, one after the other with a single element between."""
    n, c, h, w = x.shape
    images = x.new_full((n, c * h * w + 1), float("nan"))
    images[:, :-1] = x.permute(0, 2, 3, 1).flatten(1)
    return images[:, :-1].unflatten(1, (h, w, c)).permute(0, 3, 1, 2)


def channel_slice(x):
    """Channels of a larger channels_last tensor, from the fourth on."""
    n, c, h, w = x.shape
    wide = x.new_full((n, h, w, c + 8), float("nan")).permute(0, 3, 1, 2)
    wide[:, 4:-4] = x
    return wide[:, 4:-4]


def aligned_channels(x):
    """Channels of a larger channels_last tensor whose pixels begin at multiples of 16 bytes, whatever their number."""
    n, c, h, w = x.shape
    wide = x.new_full((n, h, w, (c + 23) // 8 * 8), float("nan")).permute(0, 3, 1, 2)
    wide[:, 8 : c + 8] = x
    return wide[:, 8 : c + 8]


def transposed(x):
    """Height innermost."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(x):
    """One image and one column for all, by stride 0."""
    return x[:1, :, :, :1].expand_as(x)


def scalar(x):
    """One value for all: the gradient that `.sum()` sends back."""
    return x[:1, :1, :1, :1].expand_as(x)


def tokens(x):
    """A grid of tokens (N, T, C) after a class token of NaN."""
    n, c, h, w = x.shape
    sequence = torch.cat([x.new_full((n, 1, c), float("nan")), x.flatten(2).transpose(1, 2)], 1)
    return sequence[:, 1:].transpose(1, 2).unflatten(2, (h, w))
