"""Explainers on small networks: values by hand, targets, layers, layouts, and what they must leave alone."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlu_triton
from dlu_triton import _capture

EXPLAINERS = (
    dlu_triton.XGradCAM,
    dlu_triton.GradCAM,
    dlu_triton.GradCAMPlusPlus,
    dlu_triton.HiResCAM,
    dlu_triton.LayerCAM,
    dlu_triton.AblationCAM,
)
BY_GRADIENT = EXPLAINERS[:-1]
explainers = pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda explainer: explainer.__name__)


class Net(nn.Module):
    """Two convolutions, the second followed by operations in place; 5 classes of 8 x 8 images."""

    def __init__(self, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.conv2(self.relu1(self.conv1(x)))
        return self.head(self.relu2(self.norm(x)).flatten(1))


@pytest.fixture
def net(device):
    return seeded(Net).to(device)


def seeded(make, *arguments, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make(*arguments, **options)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.running_mean, module.bias):
                    nn.init.normal_(value)
                for value in (module.running_var, module.weight):
                    nn.init.uniform_(value, 0.5, 2)
    return net.double().eval()


def images(device, n=3, side=8, seed=1):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def plain(net, layer, x, target, method="xgradcam", **options):
    """The map by hooks that keep the whole graph."""
    kept = []
    handle = layer.register_forward_hook(lambda module, arguments, output: kept.append(output) or output.clone())
    with torch.enable_grad():
        score = net(x)[torch.arange(len(x)), target].sum()
    handle.remove()
    gradient = torch.autograd.grad(score, kept[0])[0]
    return dlu_triton.reference.class_activation_parts(kept[0].detach(), gradient, method, **options)


# ---------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------


def convolution_by_hand(inplace=False):
    """A published test network: ones everywhere, biases -50 and -75, a head of +1 and -1."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(inplace))
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.copy_(torch.tensor([-50.0, -75.0]))
        net[3].weight.copy_(torch.cat([torch.ones(4, 5), -torch.ones(4, 3)], 1))
        net[3].bias.zero_()
    return net.double()


@pytest.mark.parametrize("inplace", (False, True))
def test_by_hand(inplace, device):
    net = convolution_by_hand(inplace).to(device)
    x = torch.arange(16, dtype=torch.float64, device=device).view(1, 1, 4, 4)
    explanation = dlu_triton.XGradCAM(net, net[1], eps=0)(x, 0, normalize=False, size=2)
    torch.testing.assert_close(explanation.weights, x.new_tensor([[1.0, -1.0]]))
    torch.testing.assert_close(explanation.raw, x.new_tensor([[[0.0, 4.0], [25.0, 25.0]]]))
    torch.testing.assert_close(explanation.map, explanation.raw)
    assert explanation.raw.sum() == 54
    assert explanation.scores.item() == 54
    assert dlu_triton.metrics.conservation(explanation).item() == 0
    assert dlu_triton.GradCAM(net, net[1])(x, 0, normalize=False).raw.sum() == 64.5


@pytest.mark.parametrize("layer", ("relu1", "conv2", "norm", "relu2"))
@pytest.mark.parametrize("explainer", BY_GRADIENT, ids=lambda explainer: explainer.__name__)
def test_maps_are_those_of_the_whole_graph(explainer, layer, net, device):
    x, target = images(device), torch.tensor([1, 4, 0], device=device)
    found = explainer(net, layer)(x, target)
    expected = plain(net, net.get_submodule(layer), x, target, explainer._method, size=8, normalize=True)
    for name in expected._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.logits, net(x).detach())
    torch.testing.assert_close(found.scores, net(x).detach()[torch.arange(3), target])
    assert found.map.shape == (3, 8, 8)


@explainers
def test_in_place_operations_change_nothing(explainer, device):
    """The layer's own output is explained, not what an operation in place makes of it."""
    x = images(device)
    for layer in ("conv2", "norm", "relu2"):
        one, other = (explainer(seeded(Net, inplace).to(device), layer)(x, 2) for inplace in (False, True))
        torch.testing.assert_close(one.raw, other.raw)
    outputs = []
    net = seeded(Net, True).to(device)
    net.norm.register_forward_hook(lambda module, arguments, output: outputs.append(output.clone()))
    found = explainer(net, "norm")(x, 2)
    expected = outputs[0].sum((2, 3)).abs() / outputs[0].abs().sum((2, 3))
    torch.testing.assert_close(found.cancellation, expected)
    assert (outputs[0] < 0).any()


@explainers
def test_in_place_operations_on_what_the_layer_returned_unchanged(explainer, device):
    """A layer may return its input, which the model still holds and changes."""

    class Aliased(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.conv, self.drop, self.head = nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Linear(144, 5)
            self.inplace = inplace

        def forward(self, x):
            x = self.conv(x)
            y = self.drop(x)
            if self.inplace:
                x.mul_(3)
            return self.head(y.relu().flatten(1))

    one, other = (
        explainer(seeded(Aliased, inplace).to(device), "drop")(images(device), 2) for inplace in (False, True)
    )
    torch.testing.assert_close(one.raw, other.raw)


def test_ablation(net, device):
    """Weights are relative drops of the score when a channel is multiplied by zero."""
    x, target = images(device), torch.tensor([1, 4, 0], device=device)
    scores = net(x)[torch.arange(3), target]
    weights = torch.zeros(3, 8, dtype=torch.float64, device=device)
    for channel in range(8):

        def zero(module, arguments, output, channel=channel):
            keep = torch.ones(8, dtype=torch.float64, device=device)
            keep[channel] = 0
            return output * keep.view(-1, 1, 1)

        handle = net.conv2.register_forward_hook(zero)
        weights[:, channel] = (scores - net(x)[torch.arange(3), target]) / scores
        handle.remove()
    for options in ({}, {"batch_size": 3}, {"batch_size": 3, "reuse_trunk": False}, {"progress": True}):
        found = dlu_triton.AblationCAM(net, "conv2", **options)(x, target)
        torch.testing.assert_close(found.weights, weights.detach())
        torch.testing.assert_close(found.contributions.sum(-1), found.raw.sum((1, 2)))
        torch.testing.assert_close(
            found.map, dlu_triton.weighted_activation_map(_output(net, net.conv2, x), weights, size=8, normalize=True)
        )


def _output(net, layer, x):
    kept = []
    handle = layer.register_forward_hook(lambda module, arguments, output: kept.append(output.detach().clone()))
    net(x)
    handle.remove()
    return kept[0]


# ---------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------


@explainers
def test_targets(explainer, net, device):
    x = images(device)
    explain = explainer(net, "conv2")
    best = net(x).argmax(1)
    expected = explain(x, best)
    for target in (
        None,
        best.tolist(),
        best.cpu(),
        best.int(),
        best.cpu().numpy(),
        [lambda row, c=c: row[c] for c in best.tolist()],
    ):
        torch.testing.assert_close(explain(x, target).map, expected.map)
    assert torch.equal(explain(x).target, best)
    function = explain(x, lambda logits: logits[:, 1] - logits[:, 2])
    assert function.target is None
    torch.testing.assert_close(function.scores, expected.logits[:, 1] - expected.logits[:, 2])
    if explainer is dlu_triton.GradCAM:  # linear in the score
        torch.testing.assert_close(function.raw, explain(x, 1).raw - explain(x, 2).raw)
    torch.testing.assert_close(explain(x, 3).map, explain(x, [3, 3, 3]).map)
    functions = [lambda row, c=c: row[c] for c in (1, 4, 0)]  # of each image its own
    torch.testing.assert_close(explain(x, functions).raw, explain(x, [1, 4, 0]).raw)


@explainers
def test_several_classes_are_a_loop(explainer, net, device):
    x = images(device)
    target = torch.tensor([[0, 3, 1], [4, 2, 0], [1, 1, 2]])
    explain = explainer(net, "relu2")
    found = explain(x, target)
    assert found.map.shape == (3, 3, 8, 8)
    for k in range(3):
        one = explain(x, target[:, k])
        for name in ("map", "raw", "weights", "contributions", "scores", "dead"):
            if getattr(one, name) is not None:
                torch.testing.assert_close(getattr(found, name)[:, k], getattr(one, name))
    for size in (1, 2):
        torch.testing.assert_close(explain(x, target, chunk_size=size).map, found.map)
    torch.testing.assert_close(explain(x, lambda logits: logits[:, :3]).scores, net(x)[:, :3].detach())


def test_several_classes_take_one_backward(net, device, monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    dlu_triton.XGradCAM(net, "relu2")(images(device), torch.zeros(3, 5, dtype=torch.long))
    assert len(calls) == 1


BAD_TARGETS = [
    ([0, 1], ValueError, "target must have one entry for each of the 3 images, got 2"),
    ([0, 1, 2, 3], ValueError, "target must have one entry for each of the 3 images, got 4"),
    ([0, 1, 5], ValueError, "target must be from 0 to 4, got 5"),
    (5, ValueError, "target must be from 0 to 4, got 5"),
    (-1, ValueError, "target must be from 0 to 4, got -1"),
    (1.0, TypeError, "target must be an integer, got 1.0"),
    ("1", TypeError, "target must be an integer, got '1'"),
    (["a", "b", "c"], TypeError, "target must be class indices or callables"),
    ([None, 1, 2], TypeError, "target must be class indices or callables"),
    (torch.tensor([0, 1]), ValueError, "target must have shape (N,) or (N, K) with N = 3, got (2,)"),
    (torch.tensor([0, -2, 1]), ValueError, "target must be from 0 to 4, got -2"),
    (torch.tensor([[0, 5]] * 3), ValueError, "target must be from 0 to 4, got 5"),
    (torch.zeros(3), TypeError, "target must hold integers, got torch.float32"),
    (torch.zeros(3, 0, dtype=torch.long), ValueError, "target must have shape (N,) or (N, K) with N = 3, got (3, 0)"),
    (lambda logits: logits.sum(), ValueError, "target must return scores of shape (N,) or (N, K) with N = 3, got ()"),
    (lambda logits: 1.0, TypeError, "target must return a tensor of scores, got float"),
]


@pytest.mark.parametrize(("target", "error", "message"), BAD_TARGETS, ids=range(len(BAD_TARGETS)))
@pytest.mark.parametrize("explainer", (dlu_triton.XGradCAM, dlu_triton.AblationCAM))
def test_bad_targets(explainer, target, error, message, net, device):
    with pytest.raises(error, match=re.escape(message)):
        explainer(net, "conv2")(images(device), target)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return {"out": self.head(self.conv(x).relu())}


def test_other_outputs(device):
    """A dictionary without logits takes a callable; outputs with logits need none."""
    net = seeded(Segmenter).to(device)
    x = images(device, n=2)
    found = dlu_triton.XGradCAM(net, "conv")(x, lambda output: output["out"][:, 1].mean((1, 2)))
    assert found.map.shape == (2, 8, 8)
    assert not found.logits["out"].requires_grad
    with pytest.raises(TypeError, match="must return a tensor or have `logits`"):
        dlu_triton.XGradCAM(net, "conv")(x)
    with pytest.raises(ValueError, match="callable unless the model returns one row of class scores"):
        dlu_triton.XGradCAM(nn.Sequential(net.conv, net.head), "0")(x)
    inner = seeded(Net).to(device)

    class WithLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, pixels, scale=1.0):
            return {"logits": scale * self.inner(pixels)}

    expected = dlu_triton.XGradCAM(inner, "conv2")(x)
    for inputs in ({"pixels": x, "scale": 2.0}, (x, 2.0)):
        found = dlu_triton.XGradCAM(WithLogits().eval(), "inner.conv2")(inputs)
        torch.testing.assert_close(found.map, expected.map)
        torch.testing.assert_close(found.logits, 2 * expected.logits)
    found = dlu_triton.AblationCAM(WithLogits().eval(), "inner.conv2", reuse_trunk=False)({"pixels": x, "scale": 2.0})
    torch.testing.assert_close(found.map, dlu_triton.AblationCAM(inner, "conv2")(x).map)


# ---------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------


@explainers
def test_several_layers(explainer, net, device):
    """In the order in which they are given, whatever that in which they run."""
    x = images(device)
    for layers in (["relu1", net.relu2], [net.relu2, "relu1"]):
        several = explainer(net, layers)(x, 1)
        for found, layer in zip(several, layers, strict=True):
            expected = explainer(net, layer)(x, 1)
            torch.testing.assert_close(found.map, expected.map)
            torch.testing.assert_close(found.raw, expected.raw)
    several.reverse()
    fused = explainer(net, ["relu1", "relu2"], fuse="mean")(x, 1)
    maps = []
    for explanation in several:
        low_resolution = explanation.raw.relu().unsqueeze(1)
        low, high = low_resolution.amin((2, 3), keepdim=True), low_resolution.amax((2, 3), keepdim=True)
        maps.append(F.interpolate((low_resolution - low) / (high - low), size=8, mode="bilinear").squeeze(1))
    mean = (maps[0] + maps[1]) / 2
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    torch.testing.assert_close(fused.map, (mean - low) / (high - low))
    torch.testing.assert_close(fused.layers[1].raw, several[1].raw)
    torch.testing.assert_close(explainer(net, ["relu1", "relu2"], fuse="mean")(x, 1, normalize=False).map, mean)
    classes = explainer(net, ["relu1", "relu2"], fuse="mean")(x, torch.tensor([[1, 0]] * 3))
    torch.testing.assert_close(classes.map[:, 0], fused.map)


def test_bad_layers(net, device):
    with pytest.raises(ValueError, match="layers must name modules of the model, got 'conv9'"):
        dlu_triton.XGradCAM(net, "conv9")
    with pytest.raises(ValueError, match="layers must be modules of the model, got a ReLU outside it"):
        dlu_triton.XGradCAM(net, nn.ReLU())
    for layers in (3, [3]):
        with pytest.raises(TypeError, match="layers must be modules or their names, got int"):
            dlu_triton.XGradCAM(net, layers)
    with pytest.raises(TypeError, match="inputs must be a tensor, a sequence or a mapping of arguments, got ndarray"):
        dlu_triton.XGradCAM(net, "conv2")(images(device).numpy(force=True))
    with pytest.raises(ValueError, match="at least one layer"):
        dlu_triton.XGradCAM(net, [])
    with pytest.raises(ValueError, match="layers must differ, got 'conv1' twice"):
        dlu_triton.XGradCAM(net, ["conv1", net.conv1])
    with pytest.raises(TypeError, match="model must be a torch"):
        dlu_triton.XGradCAM(lambda x: x, "conv1")
    with pytest.raises(ValueError, match="fuse must be None or 'mean', got 'max'"):
        dlu_triton.XGradCAM(net, "conv1", fuse="max")
    with pytest.raises(ValueError, match="layout must be one of NCHW, NHWC, NTC or None, got 'nchw'"):
        dlu_triton.XGradCAM(net, "conv1", layout="nchw")
    with pytest.raises(ValueError, match="eps must be at least 0 and finite in float32, got -1"):
        dlu_triton.XGradCAM(net, "conv1", eps=-1)
    net.spare = nn.Conv2d(3, 3, 1).to(device)
    with pytest.raises(RuntimeError, match="layer 'spare' did not run"):
        dlu_triton.XGradCAM(net, "spare")(images(device))
    with pytest.raises(ValueError, match=r"the layer's output must be .* here NCHW, got shape \(3, 5\)"):
        dlu_triton.XGradCAM(net, "head", layout="NCHW")(images(device))


@explainers
def test_a_compiled_model_is_explained_or_refused(explainer, net, device):
    """Code that was compiled before the hooks were there does not run them; no map may come of that."""
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    for seed in (1, 2):  # the second time with new hooks, and whatever the first left compiled
        x = images(device, seed=seed)
        torch.testing.assert_close(explainer(compiled, "conv2")(x, 1).raw, explainer(net, "conv2")(x, 1).raw)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(x)
    with pytest.raises(RuntimeError, match=r"layer 'conv2' did not run.* of a compiled model, pass the original"):
        explainer(compiled, "conv2")(x, 1)


class Tokens(nn.Module):
    """A transformer's shape: class and register tokens lead, patches follow row by row, the head reads the first."""

    def __init__(self, extra, patch=4, channels=6):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, extra, channels)) if extra else None
        self.block = nn.Linear(channels, channels)
        self.mix = nn.LazyLinear(5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.extra is not None:
            x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        return self.mix(self.block(x).relu().flatten(1))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (8, 24)], ids=str)
@pytest.mark.parametrize("extra", (0, 1, 5))
@explainers
def test_tokens(explainer, extra, size, device):
    """The map is that of the patches alone, laid out as the convolution lays them."""
    net = Tokens(extra)
    net(torch.zeros(1, 3, *size))
    net = net.double().eval().to(device)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    found = explainer(net, "block")(x, 1)
    h, w = size[0] // 4, size[1] // 4
    assert found.raw.shape == (2, h, w)
    if explainer is not dlu_triton.AblationCAM:
        sequence = _output(net, net.block, x)
        head = net.mix.weight[1].detach().view(extra + h * w, 6) * (sequence > 0)
        grid, gradient = (t[:, extra:].transpose(1, 2).reshape(2, 6, h, w) for t in (sequence, head))
        expected = dlu_triton.reference.class_activation_parts(grid, gradient, explainer._method)
        torch.testing.assert_close(found.raw, expected.raw)
    given = explainer(net, "block", grid=(h, w))(x, 1)
    torch.testing.assert_close(given.map, found.map)


def test_tokens_without_a_grid(device):
    net = Tokens(0)
    net(torch.zeros(1, 3, 16, 16))
    net = net.double().eval().to(device)
    x = torch.zeros(1, 3, 16, 16, dtype=torch.float64, device=device)
    with pytest.raises(
        ValueError, match=r"grid must have at most as many places as there are tokens, 16, got \(5, 4\)"
    ):
        dlu_triton.XGradCAM(net, "block", grid=(5, 4))(x)
    assert dlu_triton.XGradCAM(net, "block", grid=(2, 8))(x).raw.shape == (1, 2, 8)
    with pytest.raises(ValueError, match="grid must be given: 47 tokens do not fill a grid of the image's proportions"):
        _capture.planes((1, 47, 8), (4, 1000), None, None)


def test_layout_is_inferred_from_the_proportions():
    def inferred(shape, image):
        view = _capture.planes(shape, image, None, None)
        return tuple(view(torch.zeros(shape)).shape)

    assert inferred((2, 96, 7, 7), (224, 224)) == (2, 96, 7, 7)
    assert inferred((2, 7, 7, 96), (224, 224)) == (2, 96, 7, 7)  # Swin
    assert inferred((2, 7, 7, 7), (224, 224)) == (2, 7, 7, 7)
    assert inferred((2, 25, 42, 64), (800, 1333)) == (2, 64, 25, 42)
    assert inferred((2, 64, 25, 42), (800, 1333)) == (2, 64, 25, 42)
    assert inferred((2, 64, 5, 40), (224, 224)) == (2, 64, 5, 40)  # no proportions to go by
    assert inferred((2, 197, 64), (224, 224)) == (2, 64, 14, 14)
    assert inferred((2, 201, 64), (224, 224)) == (2, 64, 14, 14)
    assert inferred((2, 1 + 14 * 21, 64), (224, 336)) == (2, 64, 14, 21)


class Swin(nn.Module):
    """Maps (N, h, w, C)."""

    def __init__(self):
        super().__init__()
        self.patches, self.stage, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6 * 16, 5)

    def forward(self, x):
        return self.head(self.stage(self.patches(x).permute(0, 2, 3, 1)).relu().flatten(1))


@explainers
def test_channels_innermost(explainer, device):
    net, x = seeded(Swin).to(device), images(device)
    found = explainer(net, "stage")(x, 1)
    stage = nn.Conv2d(6, 6, 1).double().to(device)
    stage.weight.data, stage.bias.data = net.stage.weight.data[..., None, None], net.stage.bias.data
    head = nn.Linear(6 * 16, 5).double().to(device)
    head.weight.data = net.head.weight.data.view(5, 4, 4, 6).permute(0, 3, 1, 2).flatten(1)
    head.bias.data = net.head.bias.data
    twin = nn.Sequential(net.patches, stage, nn.ReLU(), nn.Flatten(), head)
    torch.testing.assert_close(found.raw, explainer(twin, "1")(x, 1).raw)
    torch.testing.assert_close(explainer(net, "stage", layout="NHWC")(x, 1).raw, found.raw)


def test_tuples_and_repeated_layers(device):
    """The first tensor of a tuple is the layer's output, the rest passes; a layer that runs twice has its last run."""

    class Block(nn.Module):
        def forward(self, x):
            return x.relu() * 2, "rest"

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.block, self.head = Block(), nn.Linear(4 * 64, 5)

        def forward(self, x):
            x, _ = self.block(self.conv1(x))
            x, rest = self.block(self.conv2(x))
            assert rest == "rest"
            return self.head(x.flatten(1))

    net, x = seeded(Twice).to(device), images(device)
    found = dlu_triton.XGradCAM(net, "block")(x, 1)
    a = 2 * _output(net, net.conv2, x).relu()
    gradient = net.head.weight[1].detach().view(1, 4, 8, 8).expand_as(a)
    torch.testing.assert_close(found.raw, dlu_triton.reference.class_activation_parts(a, gradient).raw)
    with pytest.raises(ValueError, match="the layer must run exactly once in a forward pass for ablation, ran 2 times"):
        dlu_triton.AblationCAM(net, "block")(x, 1)


# ---------------------------------------------------------------------------------------------------------------
# What is left alone
# ---------------------------------------------------------------------------------------------------------------


@explainers
def test_nothing_of_the_users_is_touched(explainer, net, device):
    x = images(device).requires_grad_()
    net.train()
    net.norm.eval()
    net(x).sum().backward()
    net.conv1.weight.requires_grad_(False)
    before = {name: (p.grad.clone(), p.requires_grad, p.detach().clone()) for name, p in net.named_parameters()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    flags = {name: module.training for name, module in net.named_modules()}
    seen = []
    net.conv2.register_forward_hook(lambda module, arguments, output: seen.append(output.requires_grad))
    hooks = [len(module._forward_hooks) for module in net.modules()]
    input_gradient = x.grad.clone()
    explainer(net, ["conv1", "conv2"])(x, 1)
    for name, p in net.named_parameters():
        gradient, requires_grad, value = before[name]
        assert torch.equal(p.grad, gradient)
        assert p.requires_grad == requires_grad
        assert torch.equal(p, value)
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert torch.equal(x.grad, input_gradient)
    assert flags == {name: module.training for name, module in net.named_modules()}
    assert hooks == [len(module._forward_hooks) for module in net.modules()]
    assert seen
    assert torch.is_grad_enabled()


@explainers
def test_frozen_models_and_no_grad(explainer, net, device):
    x = images(device)
    expected = explainer(net, "conv2")(x, 1)
    net.requires_grad_(False)
    torch.testing.assert_close(explainer(net, "conv2")(x, 1).map, expected.map)
    with torch.no_grad():
        torch.testing.assert_close(explainer(net, "conv2")(x, 1).map, expected.map)
        assert not torch.is_grad_enabled()


def test_inference_mode_is_refused(net, device):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="rules out"):
        dlu_triton.XGradCAM(net, "conv2")(images(device))


def test_a_head_without_graph_is_refused(net, device):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).detach()

    with pytest.raises(RuntimeError, match="the scores have no graph back to the layer"):
        dlu_triton.XGradCAM(Cut(), "net.conv2")(images(device))


@explainers
def test_hooks_are_removed_after_a_failure(explainer, net, device):
    hooks = [len(module._forward_hooks) for module in net.modules()]
    for bad in (images(device)[:, :2], images(device)[..., :5]):
        with pytest.raises(RuntimeError):
            explainer(net, ["conv1", "conv2"])(bad)
        assert hooks == [len(module._forward_hooks) for module in net.modules()]
        assert torch.is_grad_enabled()


def test_the_trunk_runs_without_a_graph(net, device):
    graphs = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, a, output, name=name: graphs.update({name: output.requires_grad}))
    dlu_triton.XGradCAM(net, "conv2")(images(device).requires_grad_())
    assert graphs == {"conv1": False, "relu1": False, "conv2": False, "norm": True, "relu2": True, "head": True}


def test_the_backward_stops_at_the_layer(net, device):
    reached = []
    net.conv1.weight.register_hook(lambda gradient: reached.append("conv1"))
    net.relu1.register_full_backward_hook(lambda *arguments: reached.append("relu1"))
    dlu_triton.XGradCAM(net, "conv2")(images(device))
    assert reached == []


@explainers
def test_no_graph_stays_alive(explainer, net, device):
    """Tensors of the forward pass die with the call, and repeated calls do not add up."""
    alive = []

    def watch(module, arguments, output):
        alive.append(weakref.ref(output))

    net.norm.register_forward_hook(watch)
    found = explainer(net, "conv2")(images(device), torch.zeros(3, 2, dtype=torch.long))
    gc.collect()
    assert all(reference() is None for reference in alive)
    for value in vars(found).values():
        assert not isinstance(value, torch.Tensor) or (value.grad_fn is None and not value.requires_grad)

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    explain = explainer(net, "conv2")
    explain(images(device))
    before = tensors()
    for _ in range(3):
        explain(images(device))
    assert tensors() <= before


def test_dead_maps(device):
    """The score falls with every activation: no positive evidence, a map of zeros, and a flag that says so."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 2)).double().to(device)
    with torch.no_grad():
        net[0].bias.fill_(1)
        net[3].weight[0], net[3].weight[1] = -1, 1
    found = dlu_triton.XGradCAM(net, "1")(images(device), torch.tensor([[0, 1]] * 3))
    assert found.dead.tolist() == [[True, False]] * 3
    assert found.map[:, 0].eq(0).all()
    assert found.raw[:, 0].min() < 0
    signed = dlu_triton.XGradCAM(net, "1")(images(device), 0, relu=False)
    assert signed.map.amax() == 1
    with torch.no_grad():  # constant activations: a constant map is zero when normalised, but not dead
        net[0].weight.zero_()
    constant = dlu_triton.XGradCAM(net, "1")(images(device), 1)
    assert constant.map.eq(0).all()
    assert not constant.dead.any()


def test_maps_of_zeros_are_dead(device):
    """Also without ReLU: nothing in them is positive."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 2)).double().to(device)
    with torch.no_grad():
        net[0].bias.fill_(-1)
        net[0].weight.zero_()
    found = dlu_triton.HiResCAM(net, "1")(images(device), 0)
    assert found.raw.eq(0).all()
    assert found.dead.all()


def test_fused_maps_are_dead_where_all_layers_are(device):
    """One layer speaks against the score with every activation, the other does not."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1))
    net = net.double().to(device)
    with torch.no_grad():
        for convolution, weight, bias in ((net[0], 1.0, 100.0), (net[2], -1.0, 1000.0)):
            convolution.weight.fill_(weight)
            convolution.bias.fill_(bias)
        net[5].weight.fill_(1)
    found = dlu_triton.HiResCAM(net, ["1", "3"], fuse="mean")(images(device), 0)
    assert [layer.dead.tolist() for layer in found.layers] == [[True] * 3, [False] * 3]
    assert not found.dead.any()
    assert dlu_triton.HiResCAM(net, ["1", "0"], fuse="mean")(images(device), 0).dead.all()


def test_ablation_of_a_score_of_zero(device):
    """Its weights are zero, whatever the channels do."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(128, 1, bias=False))
    net = net.double().to(device)
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[2].weight[:, :64], net[2].weight[:, 64:] = 1, -1
    found = dlu_triton.AblationCAM(net, "0")((8 * images(device)).round(), 0)  # sums are exact
    assert found.scores.eq(0).all()
    assert found.weights.eq(0).all()
    assert found.map.eq(0).all()


def test_an_empty_batch(net, device):
    for target in (None, [], 2, torch.zeros(0, 3, dtype=torch.long)):
        found = dlu_triton.XGradCAM(net, "conv2")(images(device)[:0], target)
        assert found.map.shape == ((0, 3, 8, 8) if isinstance(target, torch.Tensor) else (0, 8, 8))


def test_layers_whose_output_is_not_a_batch_of_images(device):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.Linear(3, 3), nn.Linear(3 * 64, 5)

        def forward(self, x):
            n = len(x)
            windows = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(4 * n, 16, 3)
            return self.head(self.attention(windows).reshape(n, -1))

    for explainer in (dlu_triton.XGradCAM, dlu_triton.AblationCAM):
        with pytest.raises(ValueError, match="layer 'attention' must have the 3 images first in its output"):
            explainer(seeded(Windows).to(device), "attention")(images(device))


@pytest.mark.parametrize("pack", (dlu_triton.CARAFEPack, dlu_triton.DLUPack))
def test_several_classes_of_a_model_with_our_upsamplers(pack, device):
    """Their backward takes the classes of a batched backward one by one."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), pack(4, 2, up_kernel=3, compressed_channels=4),
                                       nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))).to(device)  # fmt: skip
    target = torch.tensor([[0, 3], [4, 2]])
    explain, x = dlu_triton.XGradCAM(net, "0"), images(device, n=2)
    found = explain(x, target)
    for k in range(2):
        torch.testing.assert_close(found.raw[:, k], explain(x, target[:, k]).raw)


def test_no_host_synchronisation(net, device):
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    explain, x = dlu_triton.XGradCAM(net, ["relu1", "conv2"], fuse="mean"), images(device)
    for target in (None, 2, [0, 1, 2]):
        explain(x, target)
        torch.cuda.set_sync_debug_mode("error")
        try:
            explain(x, target)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@explainers
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_dtypes(explainer, dtype, net, device):
    expected = explainer(net, "relu2")(images(device), 1)
    found = explainer(net.to(dtype), "relu2")(images(device).to(dtype), 1)
    assert found.map.dtype == found.contributions.dtype == torch.float32
    tolerance = 30 * torch.finfo(dtype).eps * expected.raw.abs().max()
    assert (found.raw - expected.raw).abs().max() <= tolerance


@explainers
def test_autocast(explainer, net, device):
    """The model runs in the region's type, the maps are float32."""
    expected = explainer(net.float(), "relu2")(images(device).float(), 1)
    with torch.autocast(device.type, torch.bfloat16):
        found = explainer(net, "relu2")(images(device).float(), 1)
    assert found.logits.dtype == torch.bfloat16
    for part in (found.map, found.raw, found.contributions, found.cancellation):
        assert part.dtype == torch.float32
    assert (found.raw - expected.raw).abs().max() <= 0.1 * expected.raw.abs().max()


def test_repr_is_short(net, device):
    found = dlu_triton.XGradCAM(net, ["conv1", "conv2"], fuse="mean")(images(device), 1)
    assert repr(found.layers[0]).startswith("Explanation(map=(3, 8, 8), raw=(3, 8, 8), weights=(3, 6), ")
    assert len(repr(found)) < 600
    assert found.layers[0] != found.layers[1]  # by identity: tensors do not compare to a truth value


def test_size(net, device):
    x = images(device)
    assert dlu_triton.XGradCAM(net, "conv2")(x, size=(5, 6)).map.shape == (3, 5, 6)
    assert dlu_triton.XGradCAM(net, "conv2")(x, size=5).map.shape == (3, 5, 5)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        dlu_triton.XGradCAM(net, "conv2")(x, size=0)
    flat = nn.Sequential(nn.Unflatten(1, (3, 8, 8)), net)
    with pytest.raises(ValueError, match=r"size must be given unless .* got \(3, 192\)"):
        dlu_triton.XGradCAM(flat, "1.conv2")(x.flatten(1))
    assert dlu_triton.XGradCAM(flat, "1.conv2")(x.flatten(1), size=8).map.shape == (3, 8, 8)


# ---------------------------------------------------------------------------------------------------------------
# Overlay
# ---------------------------------------------------------------------------------------------------------------


def test_overlay():
    matplotlib = pytest.importorskip("matplotlib")
    image, cam = torch.rand(2, 3, 5, 6), torch.rand(2, 5, 6)
    picture = dlu_triton.overlay(image, cam, alpha=0.25, colormap="viridis")
    assert (picture.dtype, picture.shape) == (np.uint8, (2, 5, 6, 3))
    colour = np.array(matplotlib.colormaps["viridis"](float(cam[1, 2, 3]))[:3])
    expected = 255 * (0.75 * image[1, :, 2, 3].numpy() + 0.25 * colour)
    assert np.abs(picture[1, 2, 3] - expected).max() <= 1
    one = dlu_triton.overlay((255 * image[1]).to(torch.uint8), cam[1], alpha=0)
    assert np.array_equal(one, (255 * image[1]).to(torch.uint8).permute(1, 2, 0).numpy())
    assert dlu_triton.overlay(image[0], torch.ones(5, 6), alpha=1)[0, 0].tolist() == [128, 0, 0]
    several = dlu_triton.overlay(image, torch.stack([cam, cam.flip(1), cam], 1))
    assert several.shape == (2, 3, 5, 6, 3)
    assert np.array_equal(several[:, 1], dlu_triton.overlay(image, cam.flip(1)))
    one_image = dlu_triton.overlay(image[0].bfloat16(), cam)
    assert one_image.shape == (2, 5, 6, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.full((3, 4, 4), 1.5)},
            "images must be from 0 to 1 (undo the normalisation of the model), got 1.5 to 1.5",
        ),
        ({"maps": torch.full((4, 4), float("nan"))}, "maps must be from 0 to 1, got nan to nan"),
        ({"maps": torch.zeros(2, 4, 5)}, "images must be (N, 3, H, W) and maps (N, H, W) or (N, K, H, W)"),
        ({"maps": torch.full((4, 4), -1.0)}, "maps must be from 0 to 1, got -1 to -1"),
        ({"maps": torch.zeros(4, 5)}, "images must be (N, 3, H, W) and maps (N, H, W)"),
        ({"images": torch.zeros(1, 4, 4)}, "images must be (N, 3, H, W) and maps (N, H, W)"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"colormap": "none such"}, "colormap must be one that matplotlib knows, got 'none such'"),
    ],
)
def test_bad_overlays(changes, message):
    pytest.importorskip("matplotlib")
    arguments = {"images": torch.zeros(3, 4, 4), "maps": torch.zeros(4, 4)} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        dlu_triton.overlay(**arguments)
