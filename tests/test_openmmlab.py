"""OpenMMLab: layers and necks built from configs, official checkpoints, and results beside eager float64."""

import copy
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlu_triton

ROOT = Path(__file__).parents[1]
NAME = "dlu_triton.integrations.openmmlab"

# The necks of the official repositories' configs: custom/config/FPN/coco_custom_dlu.py, coco_custom_carafe.py and
# coco_baseline_bilinear.py of DLU's, configs/carafe/ of mmdetection.
PYRAMID = {
    "in_channels": [256, 512, 1024, 2048],
    "out_channels": 256,
    "num_outs": 5,
    "start_level": 0,
    "end_level": -1,
    "norm_cfg": None,
    "act_cfg": None,
    "order": ("conv", "norm", "act"),
}
UPSAMPLER = {"up_kernel": 5, "up_group": 1, "encoder_kernel": 3, "encoder_dilation": 1, "compressed_channels": 64}
OFFICIAL = {
    "dlu": {"type": "UNIFIED_FPN", **PYRAMID, "upsample_cfg": {"type": "dlu", **UPSAMPLER}},
    "carafe": {"type": "UNIFIED_FPN", **PYRAMID, "upsample_cfg": {"type": "carafe", **UPSAMPLER}},
    "bilinear": {"type": "UNIFIED_FPN", **PYRAMID, "upsample_cfg": {"type": "bilinear"}},
    "mmdetection": {"type": "FPN_CARAFE", **PYRAMID, "upsample_cfg": {"type": "carafe", **UPSAMPLER}},
}
TENSORS = {  # of an upsampler, with C channels, for scale 2 and the arguments above
    "dlu": {
        "channel_compressor": (64, None, 1, 1),
        "kernel_space_generator": (25, 64, 3, 3),
        "conv_offset": (8, 64, 3, 3),
    },
    "carafe": {"channel_compressor": (64, None, 1, 1), "content_encoder": (100, 64, 3, 3)},
    "bilinear": {},
}


def run(code, **environment):
    environment = {"TRITON_INTERPRET": "0", **os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("missing", ("mmengine", "mmcv"))
def test_says_what_to_install(missing):
    if missing == "mmcv":
        pytest.importorskip("mmengine")
    done = run(f"import sys; sys.modules['{missing}'] = None; import {NAME}")
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: {NAME} needs mmengine and mmcv 2, and there is no ")
    assert "pip install mmengine mmcv-lite" in message


def test_the_library_alone_imports_none_of_it():
    code = "import sys, dlu_triton, dlu_triton.integrations; assert not {'mmengine', 'mmcv', 'cv2'} & set(sys.modules)"
    done = run(code)
    assert done.returncode == 0, done.stderr


for package in ("mmengine", "mmcv"):
    pytest.importorskip(package, exc_type=ImportError)  # as of opencv-python where there is no libGL

from mmcv.cnn import build_upsample_layer  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.model import BaseModel, xavier_init  # noqa: E402
from mmengine.registry import MODELS, DefaultScope, Registry  # noqa: E402
from mmengine.runner import Runner, load_checkpoint  # noqa: E402

from dlu_triton.integrations import openmmlab  # noqa: E402

LAYERS = {"dlu": dlu_triton.DLUPack, "carafe": dlu_triton.CARAFEPack}


def randomised(module):
    """Parameters that tell apart what initialisation leaves zero or tiny."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("up_group", (1, 2))
def test_layers_are_built_from_configs(layer, up_group, device):
    """From a dict and from a config's text; they are the library's modules, and give the same bits."""
    torch.manual_seed(0)
    text = f"upsample = dict(type='{layer}', channels=4, scale_factor=2, up_kernel=3, up_group={up_group})"
    cfg = Config.fromstring(text, ".py").upsample
    ours = randomised(LAYERS[layer](4, 2, 3, up_group)).to(device)
    x = torch.randn(2, 4, 3, 2, device=device)
    for built in (build_upsample_layer(cfg), build_upsample_layer(cfg.to_dict()), MODELS.build(cfg)):
        assert type(built) is {"dlu": openmmlab.DLUPack, "carafe": openmmlab.CARAFEPack}[layer]
        assert isinstance(built, LAYERS[layer])
        built.load_state_dict(ours.state_dict(), strict=True)
        built.to(device)
        assert torch.equal(built(x), ours(x))
        assert torch.equal(built(x, output_size=(5, 3)), ours(x, output_size=(5, 3)))


def test_layer_from_all_official_arguments():
    layer = build_upsample_layer({"type": "dlu", "channels": 256, "scale_factor": 2, **UPSAMPLER})
    assert (layer.channels, layer.scale_factor, layer.up_kernel, layer.compressed_channels) == (256, 2, 5, 64)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 35_489


@pytest.mark.parametrize("layer", LAYERS)
def test_wrong_arguments(layer):
    good = {"type": layer, "channels": 4, "scale_factor": 2}
    with pytest.raises(ValueError, match=r"up_kernel must be odd, got 4"):
        build_upsample_layer({**good, "up_kernel": 4})
    with pytest.raises(ValueError, match=r"up_group must divide the channels: 4 channels, got up_group 3"):
        build_upsample_layer({**good, "up_group": 3})
    with pytest.raises(TypeError, match=r"scale_factor must be an integer, got 2.0"):
        build_upsample_layer({**good, "scale_factor": 2.0})
    with pytest.raises(TypeError, match=r"channels"):
        build_upsample_layer({"type": layer, "scale_factor": 2})
    with pytest.raises(TypeError, match=r"up_kernels"):
        build_upsample_layer({**good, "up_kernels": 5})


def test_names_that_are_always_this_library():
    """A path to the class, and the class itself as in mmengine's Python-style configs; no registration needed."""
    for kind in ("dlu_triton.DLUPack", dlu_triton.DLUPack, "dlu_triton.CARAFEPack"):
        layer = build_upsample_layer({"type": kind, "channels": 4, "scale_factor": 2})
        neck = openmmlab.UNIFIED_FPN([3, 4], 4, 2, upsample_cfg={"type": kind})
        expected = dlu_triton.CARAFEPack if kind == "dlu_triton.CARAFEPack" else dlu_triton.DLUPack
        assert type(layer) is type(neck.upsample_modules[0]) is expected


@pytest.mark.parametrize("layer", LAYERS)
def test_initialisation_outlives_that_of_a_neck(layer):
    """Necks have each `nn.Conv2d` Xavier-uniform and then initialise again the upsamplers they know by class."""
    torch.manual_seed(0)
    built = build_upsample_layer({"type": layer, "channels": 64, "scale_factor": 2})
    for module in built.modules():
        if isinstance(module, nn.Conv2d):
            xavier_init(module, distribution="uniform")
    state = built.state_dict()
    assert all(value.count_nonzero() == 0 for name, value in state.items() if name.endswith("bias"))
    encoder = "kernel_space_generator.weight" if layer == "dlu" else "content_encoder.weight"
    assert state[encoder].std().item() == pytest.approx(0.001, rel=0.05)
    assert state["channel_compressor.weight"].std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    if layer == "dlu":
        assert state["conv_offset.weight"].count_nonzero() == 0


def official_tensors(upsampler):
    """Names and shapes in the checkpoint of an official neck, by hand."""
    shapes = {}
    for level, channels in enumerate((256, 512, 1024, 2048, 2048)):
        size = 1 if level < 4 else 3  # the last is a strided convolution of the last input
        shapes[f"lateral_convs.{level}.conv.weight"] = (256, channels, size, size)
        shapes[f"lateral_convs.{level}.conv.bias"] = (256,)
        shapes[f"fpn_convs.{level}.conv.weight"] = (256, 256, 3, 3)
        shapes[f"fpn_convs.{level}.conv.bias"] = (256,)
        if level < 4:
            for name, (out_channels, in_channels, *kernel) in TENSORS[upsampler].items():
                shapes[f"upsample_modules.{level}.{name}.weight"] = (out_channels, in_channels or 256, *kernel)
                shapes[f"upsample_modules.{level}.{name}.bias"] = (out_channels,)
    return shapes


@pytest.mark.parametrize("config", OFFICIAL)
def test_official_necks_and_checkpoints(config, tmp_path):
    """Built from the configs' own dicts, with the official names of parameters; checkpoints load strictly, and run."""
    torch.manual_seed(0)
    shapes = official_tensors("carafe" if config == "mmdetection" else config)
    checkpoint = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": checkpoint}, tmp_path / "neck.pth")
    neck = MODELS.build(copy.deepcopy(OFFICIAL[config]))
    assert type(neck) is getattr(openmmlab, OFFICIAL[config]["type"])
    assert {name: tuple(value.shape) for name, value in neck.state_dict().items()} == shapes
    load_checkpoint(neck, str(tmp_path / "neck.pth"), map_location="cpu", strict=True)
    other = MODELS.build(copy.deepcopy(OFFICIAL[config]))
    other.load_state_dict(torch.load(tmp_path / "neck.pth", weights_only=True)["state_dict"], strict=True)
    for found in (neck, other):
        for name, value in found.state_dict().items():
            assert torch.equal(value, checkpoint[name]), name
    inputs = [
        torch.randn(1, channels, *size)
        for channels, size in zip(PYRAMID["in_channels"], ((5, 4), (3, 2), (2, 1), (1, 1)), strict=True)
    ]
    outputs = neck.double()([x.double() for x in inputs])
    assert [tuple(output.shape) for output in outputs] == [(1, 256, *x.shape[-2:]) for x in inputs] + [(1, 256, 1, 1)]
    assert all(output.isfinite().all() for output in outputs)


def test_checkpoint_of_a_whole_detector(tmp_path):
    """As configs take the neck of one: by prefix, last of all initialisation."""
    torch.manual_seed(0)
    small = {"in_channels": [3, 4], "out_channels": 4, "num_outs": 3, "upsample_cfg": {"type": "dlu"}}
    trained = randomised(openmmlab.UNIFIED_FPN(**small)).state_dict()
    detector = {f"neck.{name}": value for name, value in trained.items()} | {"backbone.conv1.weight": torch.ones(2)}
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "detector.pth"), "prefix": "neck."}
    neck = MODELS.build({"type": "UNIFIED_FPN", **small, "init_cfg": init_cfg})
    neck.init_weights()
    assert all(torch.equal(value, trained[name]) for name, value in neck.state_dict().items())


def test_initialisation_of_necks():
    """Xavier-uniform convolutions without bias, and upsamplers as they are by themselves."""
    torch.manual_seed(0)
    neck = randomised(openmmlab.UNIFIED_FPN([32, 64], 64, 3, upsample_cfg={"type": "dlu"}))
    neck.init_weights()
    state = neck.state_dict()
    assert all(value.count_nonzero() == 0 for name, value in state.items() if name.endswith("bias"))
    for name, fans in (("lateral_convs.0", 32 + 64), ("lateral_convs.2", 9 * 128), ("fpn_convs.1", 9 * 128)):
        weight = state[f"{name}.conv.weight"]
        assert weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.05)
        assert weight.abs().max() <= (6 / fans) ** 0.5
    for level in range(2):
        assert state[f"upsample_modules.{level}.conv_offset.weight"].count_nonzero() == 0
        std = state[f"upsample_modules.{level}.kernel_space_generator.weight"].std().item()
        assert std == pytest.approx(0.001, rel=0.05)


def reassembled(x, masks, k, g):
    """CARAFE at scale 2, by unfolding."""
    n, c, h, w = x.shape
    windows = F.unfold(x, k, padding=k // 2).view(n, g, c // g, k * k, h, w)
    windows = windows.repeat_interleave(2, dim=4).repeat_interleave(2, dim=5)
    return (windows * masks.view(n, g, 1, k * k, 2 * h, 2 * w)).sum(3).view(n, c, 2 * h, 2 * w)


def upsampled(x, state, prefix, k, g):
    """An upsampler of scale 2 from its parameters: whole, as the papers have it."""

    def convolution(name, x):
        weight = state[f"{prefix}.{name}.weight"]
        return F.conv2d(x, weight, state[f"{prefix}.{name}.bias"], padding=weight.shape[-1] // 2)

    n, _, h, w = x.shape
    compressed = convolution("channel_compressor", x)
    if f"{prefix}.content_encoder.weight" in state:
        logits = F.pixel_shuffle(convolution("content_encoder", compressed), 2)
        return reassembled(x, logits.view(n, g, k * k, 2 * h, 2 * w).softmax(2), k, g)
    kernels = convolution("kernel_space_generator", compressed).view(n * g, k * k, h, w).softmax(1)
    dx, dy = F.pixel_shuffle(convolution("conv_offset", compressed), 2).view(n * g, 2, 2 * h, 2 * w).unbind(1)
    columns = (torch.arange(2 * w, device=x.device) // 2 + dx).clamp(0, w - 1)
    rows = (torch.arange(2 * h, device=x.device)[:, None] // 2 + dy).clamp(0, h - 1)
    grid = torch.stack([2 * columns / (w - 1) - 1, 2 * rows / (h - 1) - 1], dim=-1)
    return reassembled(x, F.grid_sample(kernels, grid, align_corners=True), k, g)


def eager(inputs, state, k, g):
    """The whole pyramid from its parameters in the official code's way: upsample all, then cut what is too much."""

    def convolution(name, x, **arguments):
        return F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], **arguments)

    maps = [convolution(f"lateral_convs.{level}", x) for level, x in enumerate(inputs)]
    maps.append(convolution(f"lateral_convs.{len(inputs)}", inputs[-1], stride=2, padding=1))
    maps.append(convolution(f"lateral_convs.{len(inputs) + 1}", maps[-1], stride=2, padding=1))
    for level in range(len(maps) - 1, 0, -1):
        _, _, h, w = maps[level - 1].shape
        whole = upsampled(maps[level], state, f"upsample_modules.{level - 1}", k, g)
        maps[level - 1] = maps[level - 1] + whole[:, :, :h, :w]
    return [convolution(f"fpn_convs.{level}", x, padding=1) for level, x in enumerate(maps)]


@pytest.mark.parametrize(("kind", "groups"), [("dlu", 1), ("dlu", 2), ("carafe", 1), ("carafe", 2)])
def test_pyramids_agree_with_eager_float64(kind, groups, path):
    """Odd sizes and two extra levels; outputs, and by random upstream gradients all gradients, of one training step."""
    torch.manual_seed(0)
    channels, sizes = (3, 5), ((9, 11), (5, 6))
    cfg = {"type": kind, "up_kernel": 3, "up_group": groups, "compressed_channels": 6}
    neck = MODELS.build(
        {"type": "UNIFIED_FPN", "in_channels": list(channels), "out_channels": 4, "num_outs": 4, "upsample_cfg": cfg}
    )
    randomised(neck).to(path)
    inputs = [
        torch.randn(2, c, *size, device=path, requires_grad=True) for c, size in zip(channels, sizes, strict=True)
    ]
    state = {name: value.detach().double().requires_grad_() for name, value in neck.named_parameters()}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = neck(inputs), eager(exact, state, 3, groups)
    assert [tuple(output.shape[-2:]) for output in outputs] == [*sizes, (3, 3), (2, 2)]
    upstream = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, [*inputs, *neck.parameters()], upstream)
    wanted = torch.autograd.grad(expected, [*exact, *state.values()], [each.double() for each in upstream])
    for value, target in zip((*outputs, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(value.double(), target, rtol=1e-4, atol=1e-4 * target.abs().max().item())


@pytest.mark.parametrize("kind", ("nearest", "bilinear", "deconv", "pixel_shuffle"))
def test_other_upsamplers_of_the_official_necks(kind):
    torch.manual_seed(0)
    kernel = {"upsample_kernel": 3} if kind in ("deconv", "pixel_shuffle") else {}
    cfg = Config({"neck": {"type": "FPN_CARAFE", "in_channels": [3, 4], "out_channels": 4, "num_outs": 2}})
    neck = MODELS.build(cfg.neck | {"upsample_cfg": {"type": kind, **kernel}})
    inputs = [torch.randn(1, 3, 5, 3), torch.randn(1, 4, 3, 2)]
    fine, coarse = (convolution(x) for convolution, x in zip(neck.lateral_convs, inputs, strict=True))
    (upsampler,) = neck.upsample_modules
    whole = {
        "nearest": lambda: F.interpolate(coarse, scale_factor=2),
        "bilinear": lambda: F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False),
        "deconv": lambda: F.conv_transpose2d(coarse, upsampler.weight, upsampler.bias, 2, 1, 1),
        "pixel_shuffle": lambda: F.pixel_shuffle(
            F.conv2d(coarse, upsampler.upsample_conv.weight, upsampler.upsample_conv.bias, padding=1), 2
        ),
    }[kind]()
    expected = (neck.fpn_convs[0](fine + whole[:, :, :5, :3]), neck.fpn_convs[1](coarse))
    torch.testing.assert_close(neck(inputs), expected)


def test_levels_of_the_two_necks():
    """`end_level` is beyond the last level for the one and the last for the other, as in the official codes."""
    inputs = [torch.randn(1, 3, *size) for size in ((9, 14), (5, 7), (3, 4), (2, 2))]
    for neck, end_level in ((openmmlab.UNIFIED_FPN, 3), (openmmlab.FPN_CARAFE, 2)):
        built = neck([3] * 4, 4, 2, 1, end_level, upsample_cfg={"type": "nearest"}, norm_cfg={"type": "BN"})
        assert [tuple(output.shape) for output in built(inputs)] == [(1, 4, 5, 7), (1, 4, 3, 4)]
        assert "lateral_convs.0.conv.bias" not in built.state_dict()
        assert "fpn_convs.1.bn.running_var" in built.state_dict()
    three = openmmlab.FPN_CARAFE([3] * 4, 4, 3, 2, 3, upsample_cfg={"type": "nearest"})  # the last: more may follow
    assert [tuple(output.shape[-2:]) for output in three(inputs)] == [(3, 4), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 3}, TypeError, r"in_channels must be a sequence of integers, at least one, got 3"),
        ({"in_channels": []}, TypeError, r"in_channels must be a sequence of integers, at least one, got \[\]"),
        ({"num_outs": 1}, ValueError, r"num_outs must be at least 2, got 1"),
        ({"num_outs": 2.0}, TypeError, r"num_outs must be an integer, got 2.0"),
        ({"num_outs": 2, "end_level": 1}, ValueError, r"num_outs must be from 1 to 1, got 2"),
        ({"start_level": 2}, ValueError, r"start_level must be from 0 to 1, got 2"),
        ({"end_level": 3}, ValueError, r"end_level must be from -1 to 2, got 3"),
        ({"start_level": 1, "end_level": 1}, ValueError, r"end_level must be -1 or leave levels .* 1, got 1"),
        ({"upsample_cfg": {"type": "dlu", "up_kernel": 2}}, ValueError, r"up_kernel must be odd, got 2"),
        ({"upsample_cfg": {"type": "dul"}}, KeyError, r"Cannot find"),
        ({"upsample_cfg": {"type": "deconv"}}, TypeError, r"upsample_kernel must be an integer, got None"),
    ],
)
def test_wrong_arguments_of_necks(arguments, error, message):
    with pytest.raises(error, match=message):
        openmmlab.UNIFIED_FPN(**{"in_channels": [3, 4], "out_channels": 4, "num_outs": 2, **arguments})


@pytest.mark.parametrize("kind", ("dlu", "nearest"))
def test_wrong_inputs_of_necks(kind):
    neck = openmmlab.UNIFIED_FPN([3, 3], 4, 2, upsample_cfg={"type": kind})
    fine, coarse = torch.randn(1, 3, 5, 5), torch.randn(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"inputs must be 2 maps, one for each of in_channels, got 1"):
        neck([fine])
    with pytest.raises(ValueError if kind == "dlu" else RuntimeError, match="output_size" if kind == "dlu" else "size"):
        neck([fine, coarse])  # more than twice as large


def test_found_from_other_scopes():
    """As under mmdet's and mmseg's default scope: registries of their own, below mmengine's."""
    scope = Registry("model", parent=MODELS, scope="dlu_triton_test")
    try:
        with DefaultScope.overwrite_default_scope("dlu_triton_test"):
            assert type(build_upsample_layer({"type": "dlu", "channels": 4, "scale_factor": 2})) is openmmlab.DLUPack
            neck = MODELS.build({"type": "UNIFIED_FPN", "in_channels": [3, 4], "out_channels": 4, "num_outs": 2})
            assert type(neck) is openmmlab.UNIFIED_FPN
        taken = type("FPN_CARAFE", (nn.Module,), {})  # like mmdet's own
        scope.register_module(module=taken)
        assert scope.get("FPN_CARAFE") is taken
        assert scope.get("mmengine.FPN_CARAFE") is openmmlab.FPN_CARAFE
    finally:
        del MODELS.children["dlu_triton_test"]


# mmcv's operators as where they are compiled, except that none can be called: its Python code comes with mmcv-lite too.
STAND_IN = """
import sys, types
extension = types.ModuleType("mmcv._ext")
extension.__file__ = "_ext.so"
extension.__getattr__ = lambda name: lambda *arguments, **more: 1 / 0
sys.modules["mmcv._ext"] = extension
"""
WHOSE = f"""
from mmcv.cnn import build_upsample_layer
from mmengine.registry import MODELS
from {NAME} import CARAFEPack
assert MODELS.get("carafe") is CARAFEPack
assert type(build_upsample_layer(dict(type="carafe", channels=4, scale_factor=2))) is CARAFEPack
assert mmcv.ops.CARAFEPack is not CARAFEPack
assert type(build_upsample_layer(dict(type="mmcv.ops.CARAFEPack", channels=4, scale_factor=2))) is mmcv.ops.CARAFEPack
"""


@pytest.mark.parametrize("order", ((NAME, "mmcv.ops"), ("mmcv.ops", NAME)), ids=("ours first", "mmcv's first"))
def test_carafe_is_this_one_in_any_order_of_imports(order):
    done = run(STAND_IN + "".join(f"import {name}\n" for name in order) + WHOSE)
    assert done.returncode == 0, done.stderr


def test_operators_that_do_not_load_are_not_needed():
    """Such as those compiled for another version of PyTorch."""
    code = f"""
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "mmcv._ext":
            raise ImportError("undefined symbol: _ZN3c10")
sys.meta_path.insert(0, Broken())
import {NAME} as ours
from mmengine.registry import MODELS
assert MODELS.get("carafe") is ours.CARAFEPack
try:
    import mmcv.ops
except ImportError as error:
    assert "undefined symbol" in str(error)
else:
    raise AssertionError
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_necks_of_others_keep_their_names_and_layers_do_not():
    code = f"""
from mmengine.registry import MODELS
@MODELS.register_module(name="dlu")
class OfficialLayer:
    pass
@MODELS.register_module()
class UNIFIED_FPN:
    pass
import {NAME} as ours
assert MODELS.get("dlu") is ours.DLUPack
assert MODELS.get("UNIFIED_FPN") is UNIFIED_FPN
assert MODELS.get("FPN_CARAFE") is ours.FPN_CARAFE
import importlib
importlib.reload(ours)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


class Model(BaseModel):
    """The neck of a config on random inputs, trained towards zero."""

    def __init__(self, neck):
        super().__init__()
        self.neck = MODELS.build(neck)

    def forward(self, inputs, mode):
        assert mode == "loss"
        inputs = torch.stack(inputs)
        outputs = self.neck([inputs, F.avg_pool2d(inputs, 2, ceil_mode=True)])
        return {"loss": sum(output.square().mean() for output in outputs)}


CONFIG = f"""
custom_imports = dict(imports=["{NAME}"], allow_failed_imports=False)
model = dict(type="Model", neck=dict(
    type="UNIFIED_FPN", in_channels=[3, 3], out_channels=4, num_outs=3,
    upsample_cfg=dict(type="dlu", up_kernel=3, compressed_channels=8)))
"""


def test_config_files_plug_it_in(tmp_path):
    """`custom_imports` alone, in a process that has imported none of it."""
    (tmp_path / "config.py").write_text(CONFIG)
    code = f"""
import sys
from mmengine.config import Config
from mmengine.registry import MODELS
assert MODELS.get("UNIFIED_FPN") is None and "dlu_triton" not in sys.modules
cfg = Config.fromfile({str(tmp_path / "config.py")!r})
neck = MODELS.build(cfg.model.neck)
print(type(neck), type(neck.upsample_modules[0]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"<class '{NAME}.UNIFIED_FPN'> <class '{NAME}.DLUPack'>\n"


def test_config_of_the_page(tmp_path):
    """That of a detector without such a neck, but for its base, which comes with mmdetection."""
    blocks = re.findall(r"^(?: {4}.*\n)+", ROOT.joinpath("docs", "openmmlab.md").read_text(), re.MULTILINE)
    (block,) = (textwrap.dedent(each) for each in blocks if "_base_" in each)
    base, text = block.split("\n", 1)
    assert base.startswith("_base_ = ")
    (tmp_path / "config.py").write_text(text)
    cfg = Config.fromfile(tmp_path / "config.py")
    assert cfg.custom_imports.imports == [NAME]
    neck = cfg.model.neck
    assert neck.pop("_delete_")  # for the base's own neck, which mmengine replaces
    neck = MODELS.build(neck)
    assert type(neck) is openmmlab.UNIFIED_FPN
    assert [type(each) for each in neck.upsample_modules] == [openmmlab.DLUPack] * 4
    sizes = {256: (9, 11), 512: (5, 6), 1024: (3, 3), 2048: (2, 2)}
    outputs = neck([torch.randn(1, channels, *size) for channels, size in sizes.items()])
    assert [tuple(output.shape) for output in outputs] == [(1, 256, *size) for size in (*sizes.values(), (1, 1))]


def test_runner_trains_and_saves(tmp_path, monkeypatch):
    """mmengine's own loop, on a CPU the eager way: the loss falls, and every parameter moves."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except RuntimeError as error:  # one for another build of PyTorch, which the runner imports where it is installed
        pytest.skip(f"torchvision does not load: {error}")
    monkeypatch.setattr("dlu_triton._launch.INTERPRETED", False)
    torch.manual_seed(0)
    cfg = Config.fromstring(CONFIG, ".py")
    runner = Runner(
        model=Model(cfg.model.neck),
        work_dir=str(tmp_path),
        train_dataloader={
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": [{"inputs": x} for x in torch.randn(8, 3, 9, 12)],
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 2}},
        log_level="ERROR",
        experiment_name="test",
    )
    before = copy.deepcopy(runner.model.state_dict())
    runner.train()
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert losses[-4:].mean() < 0.8 * losses[:4].mean()
    # mmengine 0.10 saves its own classes beside the parameters
    after = torch.load(tmp_path / "epoch_2.pth", weights_only=False)["state_dict"]
    assert after.keys() == before.keys()
    for name in after:
        assert not torch.equal(after[name], before[name].cpu()), f"{name} did not move"


needs_mmdet = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="needs mmdet 3 and mmcv-lite 2.1")

MMDETECTION = f"""
import os, torch, mmdet
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmdet.registry import MODELS
import {NAME} as ours
init_default_scope("mmdet")
torch.manual_seed(0)
folder = os.path.join(os.path.dirname(mmdet.__file__), ".mim", "configs", "carafe")
cfg = Config.fromfile(os.path.join(folder, "mask-rcnn_r50_fpn-carafe_1x_coco.py"))
cfg.model.backbone.init_cfg = None
model = MODELS.build(cfg.model)
model.init_weights()
assert type(model.neck).__module__ == "mmdet.models.necks.fpn_carafe"
upsamplers = [*model.neck.upsample_modules, model.roi_head.mask_head.upsample]
assert len(upsamplers) == 5
for upsampler in upsamplers:
    assert type(upsampler) is ours.CARAFEPack
    assert 0.0009 < upsampler.content_encoder.weight.std() < 0.0011
sizes = ((256, 13, 10), (512, 7, 5), (1024, 4, 3), (2048, 2, 2))
inputs = [torch.randn(1, *size) for size in sizes]
for kind in ("mmengine.FPN_CARAFE", "UNIFIED_FPN"):
    neck = MODELS.build({{**cfg.model.neck, "type": kind}})
    neck.load_state_dict(model.neck.state_dict(), strict=True)
    for found, expected in zip(neck(inputs), model.neck(inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""


@needs_mmdet
@pytest.mark.parametrize("order", ((NAME, "mmdet.models"), ("mmdet.models", NAME)), ids=("ours first", "mmdet first"))
def test_inside_of_mmdetection(order):
    """Its own config: its neck and mask head hold this `carafe`, initialised; our necks give what its neck gives."""
    done = run(STAND_IN + "".join(f"import {name}\n" for name in order) + MMDETECTION)
    assert done.returncode == 0, done.stderr


DETECTOR = f"""
import os, torch, mmdet
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
folder = os.path.join(os.path.dirname(mmdet.__file__), ".mim", "configs", "retinanet")
cfg = Config.fromfile(os.path.join(folder, "retinanet_r18_fpn_1x_coco.py"))
cfg.merge_from_dict(Config.fromstring('''
custom_imports = dict(imports=["{NAME}"], allow_failed_imports=False)
model = dict(neck=dict(
    _delete_=True, type="UNIFIED_FPN", in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5, start_level=1,
    upsample_cfg=dict(type="dlu", up_kernel=5, up_group=1, encoder_kernel=3, compressed_channels=64)))
''', ".py").to_dict())
init_default_scope("mmdet")
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
import {NAME} as ours
cfg.model.backbone.init_cfg = None
torch.manual_seed(0)
model = MODELS.build(cfg.model)
model.init_weights()
assert type(model.neck) is ours.UNIFIED_FPN
sample = DetDataSample(
    metainfo=dict(img_shape=(140, 170), batch_input_shape=(140, 170), pad_shape=(140, 170)),
    gt_instances=InstanceData(bboxes=torch.tensor([[8.0, 8.0, 60.0, 50.0]]), labels=torch.tensor([3])),
)
losses = model.loss(torch.randn(1, 3, 140, 170), [sample])
sum(sum(each) for each in losses.values()).backward()
*upsamplers, coarsest = model.neck.upsample_modules
assert [type(upsampler) for upsampler in (*upsamplers, coarsest)] == [ours.DLUPack] * 4
for upsampler in upsamplers:  # of the coarsest, all of 2 x 2 points are at the border, where offsets have no gradient
    for parameter in upsampler.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero()
assert coarsest.kernel_space_generator.weight.grad.count_nonzero()
"""


@needs_mmdet
def test_detector_of_mmdetection():
    """Its own config but for the neck, on an image with odd maps: losses and the gradients of all upsamplers."""
    done = run(STAND_IN + DETECTOR)
    assert done.returncode == 0, done.stderr


SEGMENTOR = f"""
import os, torch, mmseg
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
folder = os.path.join(os.path.dirname(mmseg.__file__), ".mim", "configs", "sem_fpn")
cfg = Config.fromfile(os.path.join(folder, "fpn_r50_4xb2-80k_cityscapes-512x1024.py"))
cfg.merge_from_dict(Config.fromstring('''
custom_imports = dict(imports=["{NAME}"], allow_failed_imports=False)
model = dict(
    pretrained=None, data_preprocessor=None, backbone=dict(norm_cfg=dict(type="BN")),
    decode_head=dict(norm_cfg=dict(type="BN")),
    neck=dict(
        _delete_=True, type="UNIFIED_FPN", in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=4,
        upsample_cfg=dict(type="dlu")))
''', ".py").to_dict())
init_default_scope("mmseg")
import mmseg.models
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
import {NAME} as ours
torch.manual_seed(0)
model = MODELS.build(cfg.model)
model.init_weights()
assert type(model.neck) is ours.UNIFIED_FPN
size = (96, 160)
labels = PixelData(data=torch.randint(0, 19, (1, *size)))
sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size), gt_sem_seg=labels)
model.loss(torch.randn(1, 3, *size), [sample])["decode.loss_ce"].backward()
for upsampler in model.neck.upsample_modules:
    assert type(upsampler) is ours.DLUPack
    for parameter in upsampler.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero()
"""


@pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="needs mmsegmentation 1.2 and mmcv-lite 2.1")
def test_segmentor_of_mmsegmentation():
    """Its own config but for the neck, found from its registry."""
    done = run(STAND_IN + SEGMENTOR)
    assert done.returncode == 0, done.stderr
