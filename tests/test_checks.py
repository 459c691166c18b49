"""Bad input: the kind of error, the argument, the rule and the received value."""

import re

import pytest
import torch

import dlu_triton
from dlu_triton import reference


def maps(device, dtype=torch.float32):
    """features, kernel_space, offsets, masks, logits for C = 4, 3 x 5 pixels, kernel 3, scale 2, one group."""
    shapes = ((1, 4, 3, 5), (1, 9, 3, 5), (1, 8, 3, 5), (1, 9, 6, 10), (1, 36, 3, 5))
    return [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]


CALLS = {
    "dlu_upsample": lambda library, x, s, o, m, logits, **sizes: library.dlu_upsample(
        x, s, o, **{"scale_factor": 2, "kernel_size": 3, **sizes}
    ),
    "expand_kernels": lambda library, x, s, o, m, logits, **sizes: library.expand_kernels(
        s, o, **{"scale_factor": 2, "kernel_size": 3, **sizes}
    ),
    "carafe": lambda library, x, s, o, m, logits, **sizes: library.carafe(
        x, m, **{"kernel_size": 3, "group_size": 1, "scale_factor": 2, **sizes}
    ),
    "carafe_upsample": lambda library, x, s, o, m, logits, **sizes: library.carafe_upsample(
        x, logits, **{"scale_factor": 2, "kernel_size": 3, **sizes}
    ),
}

SIZES = [
    ("kernel_size", 4, ValueError, "kernel_size must be odd, got 4"),
    ("kernel_size", 0, ValueError, "kernel_size must be from 1 to 9, got 0"),
    ("kernel_size", 11, ValueError, "kernel_size must be from 1 to 9, got 11"),
    ("kernel_size", 3.0, TypeError, "kernel_size must be an integer, got 3.0 of type float"),
    ("scale_factor", 0, ValueError, "scale_factor must be from 1 to 16, got 0"),
    ("scale_factor", 17, ValueError, "scale_factor must be from 1 to 16, got 17"),
    ("scale_factor", "2", TypeError, "scale_factor must be an integer, got '2' of type str"),
    ("scale_factor", True, TypeError, "scale_factor must be an integer, got True of type bool"),
]

# operator, index of the map, what replaces it, error, message
MAPS = [
    ("dlu_upsample", 0, lambda x: x[0], ValueError, "features must have 4 dimensions (N, C, H, W), got shape (4, 3, 5)"),
    ("dlu_upsample", 0, lambda x: x.int(), TypeError, "features must be float16, bfloat16, float32 or float64, got torch.int32"),
    ("dlu_upsample", 0, lambda x: x[:, :, :0], ValueError, "features must have no empty dimension but the batch, got shape (1, 4, 0, 5)"),
    ("dlu_upsample", 1, lambda x: x[:, :8], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (1, 8, 3, 5)"),
    ("dlu_upsample", 1, lambda x: x[:, :, :2], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (1, 9, 2, 5)"),
    ("dlu_upsample", 1, lambda x: x.double(), TypeError, "kernel_space must be float64 exactly when features is: features torch.float32, got torch.float64"),
    ("dlu_upsample", 2, lambda x: x[:, :4], ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 8, 3, 5), got (1, 4, 3, 5)"),
    ("dlu_upsample", 2, lambda x: x.repeat(2, 1, 1, 1), ValueError, "= (1, 8, 3, 5), got (2, 8, 3, 5)"),
    ("dlu_upsample", 2, lambda x: x.long(), TypeError, "offsets must be float16, bfloat16, float32 or float64, got torch.int64"),
    ("dlu_upsample", 2, lambda x: x.numpy(force=True), TypeError, "offsets must be a tensor, got ndarray"),
    ("expand_kernels", 1, lambda x: None, TypeError, "kernel_space must be a tensor, got NoneType"),
    ("expand_kernels", 1, lambda x: x[:, :6], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (1, 6, 3, 5)"),
    ("expand_kernels", 2, lambda x: x[..., :4], ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 8, 3, 5), got (1, 8, 3, 4)"),
    ("carafe", 0, lambda x: x.bool(), TypeError, "features must be float16, bfloat16, float32 or float64, got torch.bool"),
    ("carafe", 3, lambda x: x[:, :, :5], ValueError, "masks must have shape (N, group_size*kernel_size^2, scale_factor*H, scale_factor*W) = (1, 9, 6, 10), got (1, 9, 5, 10)"),
    ("carafe", 3, lambda x: x[0], ValueError, "masks must have 4 dimensions (N, C, H, W), got shape (9, 6, 10)"),
    ("carafe", 3, lambda x: x.to("meta"), ValueError, "masks must be on the device of features, "),
    ("carafe_upsample", 0, lambda x: x[None], ValueError, "features must have 4 dimensions (N, C, H, W), got shape (1, 1, 4, 3, 5)"),
    ("carafe_upsample", 4, lambda x: x[:, :9], ValueError, "logits must have shape (N, groups*kernel_size^2*scale_factor^2, H, W) = (1, 36, 3, 5), got (1, 9, 3, 5)"),
    ("carafe_upsample", 4, lambda x: x.int(), TypeError, "logits must be float16, bfloat16, float32 or float64, got torch.int32"),
    ("carafe_upsample", 4, lambda x: x.double(), TypeError, "logits must be float64 exactly when features is: features torch.float32, got torch.float64"),
    ("carafe_upsample", 4, lambda x: x.to("meta"), ValueError, "logits must be on the device of features, "),
    ("expand_kernels", 2, lambda x: x.to("meta"), ValueError, "offsets must be on the device of kernel_space, "),
    ("dlu_upsample", 1, lambda x: x.to("meta"), ValueError, "kernel_space must be on the device of features, "),
]  # fmt: skip


def assert_raises(library, operator, tensors, error, message, **sizes):
    with pytest.raises(error, match=re.escape(message)):
        CALLS[operator](library, *tensors, **sizes)


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), SIZES, ids=str)
def test_sizes(operator, name, value, error, message, library, device):
    assert_raises(library, operator, maps(device), error, message, **{name: value})


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize(("operator", "index", "change", "error", "message"), MAPS)
def test_maps(operator, index, change, error, message, library, device):
    tensors = maps(device)
    tensors[index] = change(tensors[index])
    assert_raises(library, operator, tensors, error, message)


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize(
    ("operator", "name"), [("dlu_upsample", "groups"), ("carafe", "group_size"), ("carafe_upsample", "groups")]
)
def test_groups(operator, name, library, device):
    tensors = maps(device)
    for value in (3, 8):
        message = f"{name} must divide the channels: 4 channels, got {name} {value}"
        assert_raises(library, operator, tensors, ValueError, message, **{name: value})
    assert_raises(library, operator, tensors, ValueError, f"{name} must be at least 1, got 0", **{name: 0})


def test_a_device_without_kernels_is_refused(monkeypatch):
    """No silent fallback: only cuda runs kernels and only cpu the eager path."""

    class Elsewhere(torch.Tensor):
        device = torch.device("xpu")

    with pytest.raises(ValueError, match="features must be on a cuda or cpu device, got xpu"):
        dlu_triton.carafe(*(torch.zeros(1, 1, 1, 1).as_subclass(Elsewhere) for _ in range(2)), 1, 1, 1)


def test_numpy_integers_are_integers(device):
    import numpy as np

    features, space, offsets, *_ = maps(device)
    assert dlu_triton.dlu_upsample(features, space, offsets, np.int64(2), np.int32(3)).shape == (1, 4, 6, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"scale_factor": 32}, "scale_factor must be from 1 to 16, got 32"),
        ({"up_kernel": 4}, "up_kernel must be odd, got 4"),
        ({"up_group": 3}, "up_group must divide the channels: 8 channels, got up_group 3"),
        ({"encoder_kernel": 2}, "encoder_kernel must be odd, got 2"),
        ({"encoder_dilation": 0}, "encoder_dilation must be at least 1, got 0"),
        ({"compressed_channels": -1}, "compressed_channels must be at least 1, got -1"),
    ],
)
@pytest.mark.parametrize("module", (dlu_triton.DLUPack, dlu_triton.CARAFEPack))
def test_modules(module, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        module(**{"channels": 8, "scale_factor": 2, **arguments})


@pytest.mark.parametrize("arguments", [(2, 1, 2), (3, 0, 2), (3, 1, 0)])
def test_carafe_module(arguments):
    with pytest.raises(ValueError, match="must be"):
        dlu_triton.CARAFE(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# Class activation maps
# ---------------------------------------------------------------------------------------------------------------

# what replaces an argument of class_activation_map(activations (2, 3, 4, 5), gradients (2, 3, 4, 5)), error, message
CAMS = [
    ({"method": "gradcampp"}, ValueError, "method must be one of xgradcam, gradcam, gradcam++, hirescam, layercam, elementwise, got 'gradcampp'"),
    ({"method": None}, ValueError, "method must be one of"),
    ({"eps": -1e-6}, ValueError, "eps must be finite and at least 0, got -1e-06"),
    ({"eps": float("nan")}, ValueError, "eps must be finite and at least 0, got nan"),
    ({"eps": "1"}, TypeError, "eps must be a number, got '1' of type str"),
    ({"size": 0}, ValueError, "size must be at least 1, got 0"),
    ({"size": (4, -1)}, ValueError, "size must be at least 1, got -1"),
    ({"size": (4, 5, 6)}, ValueError, "size must be an integer or a pair (height, width), got (4, 5, 6)"),
    ({"size": 2.5}, TypeError, "size must be an integer, got 2.5 of type float"),
    ({"size": (4, None)}, TypeError, "size must be an integer, got None of type NoneType"),
    ({"size": (65536, 32768)}, ValueError, "size must have at most 2147479552 pixels, got 65536 x 32768"),
    ({"relu": "no"}, TypeError, "relu must be True or False, got 'no' of type str"),
    ({"normalize": 1}, TypeError, "normalize must be True or False, got 1 of type int"),
    ({"return_weights": None}, TypeError, "return_weights must be True or False, got None of type NoneType"),
    ({"activations": lambda a: a[:1, :1, :1, :1].expand(1, 1, 65536, 32768)}, ValueError, "activations must have at most 2147479552 pixels in a plane, got 65536 x 32768"),
    ({"method": "hirescam", "return_weights": True}, ValueError, "return_weights must be False for hirescam, which has no channel weights, got True"),
    ({"activations": lambda a: a.flatten(2).transpose(1, 2)}, ValueError, "activations must have 4 dimensions (N, C, H, W); view tokens (N, T, C) as tokens[:, -H * W:].transpose(1, 2).unflatten(2, (H, W)), got shape (2, 20, 3)"),
    ({"activations": lambda a: a[0, 0]}, ValueError, "activations must have 4 dimensions (N, C, H, W), got shape (4, 5)"),
    ({"activations": lambda a: a[:, :0]}, ValueError, "activations must have no empty dimension but the batch, got shape (2, 0, 4, 5)"),
    ({"activations": lambda a: a.int()}, TypeError, "activations must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"activations": lambda a: None}, TypeError, "activations must be a tensor, got NoneType"),
    ({"gradients": lambda g: g[:1]}, ValueError, "gradients must have shape (N, C, H, W), or (N, K, C, H, W) for K maps, = (2, 3, 4, 5), got (1, 3, 4, 5)"),
    ({"gradients": lambda g: g.unsqueeze(1)[:, :, :2]}, ValueError, "gradients must have shape (N, K, C, H, W) = (2, 1, 3, 4, 5), got (2, 1, 2, 4, 5)"),
    ({"gradients": lambda g: g.unsqueeze(1)[:, :0]}, ValueError, "for K maps, = (2, 3, 4, 5), got (2, 0, 3, 4, 5)"),
    ({"gradients": lambda g: g.double()}, TypeError, "gradients must be float64 exactly when activations is: activations torch.float32, got torch.float64"),
    ({"gradients": lambda g: g.bool()}, TypeError, "gradients must be float16, bfloat16, float32 or float64, got torch.bool"),
    ({"gradients": lambda g: g.to("meta")}, ValueError, "gradients must be on the device of activations, "),
]  # fmt: skip


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize(("changes", "error", "message"), CAMS)
def test_class_activation_map(changes, error, message, library, device):
    arguments = {
        "activations": torch.zeros(2, 3, 4, 5, device=device),
        "gradients": torch.ones(2, 3, 4, 5, device=device),
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=re.escape(message)):
        library.class_activation_map(**arguments)
    if "return_weights" not in changes:
        with pytest.raises(error, match=re.escape(message)):
            library.class_activation_parts(**arguments)


WEIGHTS = [
    (lambda w: w[:, :2], ValueError, "weights must have shape (N, C), or (N, K, C) for K maps, = (2, 3), got (2, 2)"),
    (lambda w: w.unsqueeze(1)[..., :2], ValueError, "weights must have shape (N, K, C) = (2, 1, 3), got (2, 1, 2)"),
    (lambda w: w[0], ValueError, "weights must have shape (N, C), or (N, K, C) for K maps, = (2, 3), got (3,)"),
    (lambda w: w.long(), TypeError, "weights must be float16, bfloat16, float32 or float64, got torch.int64"),
    (lambda w: [1, 2, 3], TypeError, "weights must be a tensor, got list"),
    (lambda w: w.double(), TypeError, "weights must be float64 exactly when activations is"),
]


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize(("change", "error", "message"), WEIGHTS)
def test_weighted_activation_map(change, error, message, library, device):
    with pytest.raises(error, match=re.escape(message)):
        library.weighted_activation_map(torch.zeros(2, 3, 4, 5, device=device), change(torch.ones(2, 3, device=device)))


def test_a_device_without_kernels_is_refused_for_maps():
    class Elsewhere(torch.Tensor):
        device = torch.device("xpu")

    a, w = (torch.zeros(shape).as_subclass(Elsewhere) for shape in ((1, 1, 1, 1), (1, 1)))
    for call in (lambda: dlu_triton.xgrad_cam(a, a), lambda: dlu_triton.weighted_activation_map(a, w)):
        with pytest.raises(ValueError, match="activations must be on a cuda or cpu device, got xpu"):
            call()
