"""Axioms measured on networks, and localisation and confidence by hand."""

import pytest
import torch
from torch import nn

import dlu_triton
from dlu_triton import _checks, metrics


def seeded(*modules):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(*(module() for module in modules))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                if module.affine:
                    nn.init.normal_(module.bias)
                    nn.init.uniform_(module.weight, 0.5, 2)
    return net.double().eval()


def convolutional():
    return seeded(
        lambda: nn.Conv2d(3, 4, 3, padding=1),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.ReLU(inplace=True),
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.BatchNorm2d(6, affine=False),
        lambda: nn.ReLU(inplace=True),
        lambda: nn.MaxPool2d(2),
        nn.Flatten,
        lambda: nn.Linear(6 * 16, 7),
        nn.ReLU,
        lambda: nn.Linear(7, 5),
    )


def images(device, n=3):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


TARGETS = (torch.tensor([1, 4, 0]), torch.tensor([[1, 0], [4, 2], [0, 3]]))


# ---------------------------------------------------------------------------------------------------------------
# Axioms
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=("N", "NK"))
@pytest.mark.parametrize("layer", ("0", "1", "2", "3", "4", "6"))
def test_score_is_activations_plus_biases(layer, target, device):
    """Eq. 5, whatever the layer; and XGrad-CAM's residual is exactly the bias term, equal to HiResCAM's."""
    net, x = convolutional().to(device), images(device)
    found = metrics.score_decomposition(net, layer, x, target)
    assert found.score.shape == target.shape
    assert found.residual.abs().max() <= 1e-12
    assert found.biases.abs().min() > 1e-3
    for explainer in (dlu_triton.XGradCAM, dlu_triton.HiResCAM):
        explanation = explainer(net, layer, eps=0)(x, target)
        torch.testing.assert_close(explanation.contributions.sum(-1), found.activations)
        torch.testing.assert_close(metrics.conservation(explanation), (found.biases / found.score).abs())


def test_a_network_that_is_not_piecewise_linear_has_a_residual(device):
    net = seeded(lambda: nn.Conv2d(3, 4, 3), nn.ReLU, nn.Flatten, lambda: nn.Linear(144, 7), nn.GELU,
                 lambda: nn.Linear(7, 5)).to(device)  # fmt: skip
    assert metrics.score_decomposition(net, "1", images(device), 0).residual.abs().min() > 1e-3


def test_a_branch_that_no_score_depends_on(device):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head, self.spare = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.trunk(x).relu()
            self.spare(x)
            return self.head(x.flatten(1))

    net = Branch().double().eval().to(device)
    for target in (0, torch.tensor([[0, 1, 1]] * 3)):
        assert metrics.score_decomposition(net, "trunk", images(device), target).residual.abs().max() <= 1e-12


@pytest.mark.parametrize("module", (lambda: nn.BatchNorm2d(4), lambda: nn.Dropout(0.5)))
def test_training_mode_is_refused(module, device):
    net = seeded(lambda: nn.Conv2d(3, 4, 3), module, nn.Flatten, lambda: nn.Linear(144, 5)).to(device)
    net[1].train()
    for call in (metrics.score_decomposition, metrics.channel_drops, lambda *a: dlu_triton.AblationCAM(*a[:2])(*a[2:])):
        with pytest.raises(ValueError, match="model must be in evaluation mode, got '1' in training mode"):
            call(net, "0", images(device), 0)


def test_one_layer_of_one_explanation(device):
    net, x = convolutional().to(device), images(device)
    for call in (metrics.score_decomposition, metrics.channel_drops):
        with pytest.raises(ValueError, match="layer must be one layer, got 2"):
            call(net, ["0", "3"], x, 0)
    fused = dlu_triton.XGradCAM(net, ["0", "3"], fuse="mean")(x, 0)
    for call in (metrics.conservation, lambda explanation: metrics.sensitivity(explanation, x)):
        with pytest.raises(TypeError, match="explanation must be an Explanation, of one layer, got FusedExplanation"):
            call(fused)


@pytest.mark.parametrize("target", TARGETS, ids=("N", "NK"))
def test_channel_drops(target, device):
    net, x = convolutional().to(device), images(device)
    two_dimensional = target.view(3, -1).to(device)
    activations = net[:4](x).detach()
    expected = torch.zeros(3, two_dimensional.shape[1], 6, dtype=torch.float64, device=device)
    for channel in range(6):
        without = activations.clone()
        without[:, channel] = 0
        change = net(x) - net[4:](without)
        expected[..., channel] = change.detach().gather(1, two_dimensional)
    expected = expected if target.dim() == 2 else expected.squeeze(1)
    for options in ({}, {"batch_size": 4}, {"batch_size": 1}, {"reuse_trunk": False, "batch_size": 4}):
        found = metrics.channel_drops(net, net[3], x, target, **options)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad


def test_one_pass_of_the_trunk_for_many_ablations(device):
    net, x = convolutional().to(device), images(device, n=2)
    sizes = []
    net[0].register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    metrics.channel_drops(net, "3", x, 0, batch_size=4)
    assert sizes == [2, 1, 1, 1, 1]
    sizes.clear()
    metrics.channel_drops(net, "3", x, 0, batch_size=4, reuse_trunk=False)
    assert sizes == [2, 4, 2, 4, 2]


class FixesTheBatchSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x):
        n = len(x)
        return self.head(self.conv(x).relu().reshape(n, 144))


def test_a_model_that_fixes_the_batch_size(device):
    net, x = FixesTheBatchSize().double().to(device), images(device)
    with pytest.raises(RuntimeError) as caught:
        metrics.channel_drops(net, "conv", x, 0)
    assert any("reuse_trunk=False" in note for note in caught.value.__notes__)
    assert metrics.channel_drops(net, "conv", x, 0, reuse_trunk=False).shape == (3, 4)


def test_sensitivity_and_conservation_by_hand():
    explanation = dlu_triton.Explanation(
        map=None, raw=None, weights=None, cancellation=None, logits=None, target=None, dead=None,
        contributions=torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]),
        scores=torch.tensor([4.0, 0.0]),
    )  # fmt: skip
    drops = torch.tensor([[1.0, 1.0, -3.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(metrics.sensitivity(explanation, drops), torch.tensor([3 / 5, 0.0]))
    torch.testing.assert_close(metrics.conservation(explanation), torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"drops must have the shape of the contributions, \(2, 3\), got \(2, 2\)"):
        metrics.sensitivity(explanation, drops[:, :2])


def test_a_linear_head_satisfies_both_axioms(device):
    """Without biases after the layer, and linear from there, XGrad-CAM's errors are rounding."""
    net = seeded(lambda: nn.Conv2d(3, 4, 3), nn.ReLU, nn.Flatten, lambda: nn.Linear(144, 5, bias=False)).to(device)
    x = images(device)
    explanation = dlu_triton.XGradCAM(net, "1", eps=0)(x)
    assert metrics.conservation(explanation).max() <= 1e-12
    assert metrics.sensitivity(explanation, metrics.channel_drops(net, "1", x)).max() <= 1e-12
    assert metrics.sensitivity(dlu_triton.GradCAM(net, "1")(x), metrics.channel_drops(net, "1", x)).min() > 0.05


# ---------------------------------------------------------------------------------------------------------------
# Localisation
# ---------------------------------------------------------------------------------------------------------------

MAP = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 5.0]])  # the peak is at x = 2, y = 1


def test_pointing_hit(device):
    maps = torch.stack([MAP] * 5 + [torch.zeros(2, 3)]).to(device)
    boxes = torch.tensor([[2, 1, 3, 2], [0, 0, 2, 2], [2, 0, 3, 1], [0, 0, 3, 2], [2, 1, 2, 2], [0, 0, 3, 2]])
    assert metrics.pointing_hit(maps, boxes.to(device)).tolist() == [True, False, False, True, False, False]
    assert metrics.pointing_hit(maps, boxes, tolerance=1).tolist() == [True, True, True, True, False, False]
    several = torch.stack([boxes[[1, 2]], boxes[[1, 0]], boxes[[4, 4]]])
    assert metrics.pointing_hit(maps[:3], several).tolist() == [False, True, False]
    classes = metrics.pointing_hit(maps[:2].unsqueeze(0), boxes[:2].unsqueeze(0))
    assert classes.tolist() == [[True, False]]


def test_energy_in_box(device):
    maps = torch.stack([MAP, MAP, -MAP, MAP - 1]).to(device)
    boxes = torch.tensor([[1, 1, 3, 2], [0, 0, 2, 1], [0, 0, 3, 2], [0, 0, 2, 2]])
    torch.testing.assert_close(metrics.energy_in_box(maps, boxes).cpu(), torch.tensor([7 / 8, 1 / 8, 0.0, 1 / 5]))
    both = torch.stack([boxes[[0, 1]]] * 4)
    torch.testing.assert_close(metrics.energy_in_box(maps, both)[0].cpu(), torch.tensor(1.0))


BOX_TYPES = (*_checks.INTEGERS, *_checks.DTYPES)


@pytest.mark.parametrize("dtype", BOX_TYPES, ids=str)
def test_boxes_of_every_type(dtype, device):
    """Widened beyond zero and beyond what the type holds, or holds exactly."""
    maps = torch.zeros(3, 5, 512, device=device)
    maps[0, 0, 0] = maps[1, 4, 149] = maps[2, 4, 150] = 1
    boxes = torch.tensor([[1, 1, 3, 3], [100, 3, 120, 5], [100, 3, 120, 5]]).to(dtype)
    assert metrics.pointing_hit(maps, boxes, tolerance=0).tolist() == [False, False, False]
    assert metrics.pointing_hit(maps, boxes, tolerance=2).tolist() == [True, False, False]
    assert metrics.pointing_hit(maps, boxes, tolerance=30).tolist() == [True, True, False]
    assert metrics.pointing_hit(maps, boxes, tolerance=_checks.MAX_SIZE).all()
    maps[:, 2, 2] = 1
    assert metrics.energy_in_box(maps, boxes).tolist() == [0.5, 0, 0]


def test_boxes_of_bfloat16_are_widened_exactly(device):
    """To 269, which it rounds."""
    maps = torch.zeros(2, 1, 512, device=device)
    maps[0, 0, 268] = maps[1, 0, 269] = 1
    boxes = torch.tensor([[200, 0, 256, 1]], dtype=torch.bfloat16).expand(2, 4)
    assert metrics.pointing_hit(maps, boxes, tolerance=13).tolist() == [True, False]


@pytest.mark.parametrize("dtype", _checks.DTYPES, ids=str)
def test_energy_of_large_maps(dtype, device):
    """Which sums of float16 have no number for, and bfloat16 stops counting at 256."""
    maps = torch.ones(1, 300, 300, dtype=dtype, device=device)
    found = metrics.energy_in_box(maps, torch.tensor([[0, 0, 300, 150]]))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.tolist() == [0.5]


@pytest.mark.parametrize("shape", [(4,), (2, 3), (3, 4), (2, 1, 1, 4)], ids=str)
def test_bad_boxes(shape):
    with pytest.raises(ValueError, match=r"boxes must be \(2, 4\) or \(2, 'B', 4\), got"):
        metrics.pointing_hit(torch.zeros(2, 5, 5), torch.zeros(shape))
    with pytest.raises(ValueError, match="tolerance must be from 0 to 2147479552, got -1"):
        metrics.pointing_hit(torch.zeros(2, 5, 5), torch.zeros(2, 4), tolerance=-1)


# ---------------------------------------------------------------------------------------------------------------
# Confidence
# ---------------------------------------------------------------------------------------------------------------


def test_confidence_change(device):
    """Logits are the sums of the left and the right half."""

    class Halves(nn.Module):
        def forward(self, x):
            return torch.stack([x[..., :2].sum((1, 2, 3)), x[..., 2:].sum((1, 2, 3))], 1)

    x = torch.ones(2, 1, 1, 4, device=device)
    left = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=device)
    maps = torch.stack([left, 1 - left])
    target = torch.tensor([0, 0], device=device)
    kept, lost = torch.tensor([2.0, 0.0]).softmax(0).tolist()
    found = metrics.confidence_change(Halves(), x, maps, target)
    torch.testing.assert_close(found.drop.cpu(), torch.tensor([0.0, (0.5 - lost) / 0.5]))
    assert found.increase.tolist() == [kept > 0.5, False]
    several = metrics.confidence_change(Halves(), x, maps.expand(2, 2, 1, 4), torch.tensor([[0, 1], [0, 0]]))
    torch.testing.assert_close(several.drop.cpu(), torch.tensor([[0.0, 0.0], [0.0, (0.5 - lost) / 0.5]]))
    unchanged = metrics.confidence_change(Halves(), x, torch.ones_like(maps), target)
    assert unchanged.drop.tolist() == [0, 0]
    assert unchanged.increase.tolist() == [False, False]
    with pytest.raises(ValueError, match="maps must be"):
        metrics.confidence_change(Halves(), x, maps[:1], target)
    with pytest.raises(ValueError, match=r"target must hold a class for each map, \(2,\)"):
        metrics.confidence_change(Halves(), x, maps, torch.tensor([[0, 1], [0, 0]]))


def test_a_probability_of_zero_has_nothing_to_lose(device):
    """It is rounded to zero: a mean over a data set is to stay a number."""
    logits = nn.Flatten()
    x = torch.tensor([200.0, 0.0], device=device).view(1, 1, 1, 2).expand(2, 1, 1, 2)
    maps = torch.tensor([[[0.5, 1.0]], [[0.0, 1.0]]], device=device)
    found = metrics.confidence_change(logits, x, maps, torch.tensor([1, 1]))
    assert found.drop.tolist() == [0, 0]
    assert found.increase.tolist() == [True, True]
    not_a_number = metrics.confidence_change(logits, x * float("nan"), maps, torch.tensor([1, 1]))
    assert not_a_number.drop.isnan().all()
