"""python many_processes.py directory rank processes device: checks that take several processes, for test_many_gpus.py.

Reads what to check from cases.json in the directory, {name: [check, arguments]}, and writes rank.json, {name: error or
null}. Every process runs all of it.
"""

import copy
import datetime
import functools
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import dlu_triton
from dlu_triton import reference

SIZE = 3
PLACEMENTS = {"R": Replicate(), "P": Partial(), **{f"S{axis}": Shard(axis) for axis in range(4)}}


def placements(names):
    return tuple(PLACEMENTS[name] for name in names)


def device_mesh(device, shape):
    """Of this shape, or of a single process if there is no other."""
    return _device_mesh(device.type, tuple(size if dist.get_world_size() > 1 else 1 for size in shape))


# One for all checks: torch.compile fails on DTensors once a second mesh of the same shape was made (torch 2.13).
_device_mesh = functools.cache(torch.distributed.init_device_mesh)


def assert_placed(tensor, expected, what="result"):
    """Placements mean nothing in a single process."""
    assert dist.get_world_size() == 1 or tensor.placements == expected, f"{what}: {tensor.placements}"


# ---------------------------------------------------------------------------------------------------------------
# DTensors
# ---------------------------------------------------------------------------------------------------------------


def inputs(operator, n, c, groups, output_size=None):
    """Tensors and sizes to call an operator with."""
    h, w, k, s = 2, 3, 3, 2
    masks = torch.randn(n, groups * k * k, *(output_size or (s * h, s * w)))
    features = torch.randn(n, c, h, w)
    space = torch.randn(n, groups * k * k, h, w)
    offsets = torch.randn(n, 2 * groups * s * s, h, w)
    tensors, integers = {
        "carafe": ((features, masks), (k, groups, s)),
        "carafe_upsample": ((features, torch.randn(n, groups * k * k * s * s, h, w)), (s, k, groups)),
        "dlu_upsample": ((features, space, offsets), (s, k, groups)),
        "expand_kernels": ((space, offsets), (s, k, groups)),
    }[operator]
    return [tensor.double() for tensor in tensors], (*integers, output_size)


def check_operator(
    device,
    operator,
    mesh,
    given,
    expected,
    gradients,
    images=2,
    channels=4,
    groups=1,
    wanted=None,
    channels_last=False,
    output_size=None,
    moves=False,
):
    """An operator on tensors of `given` placements has a result of `expected` ones, and all is as for one process.

    given[i][j] is the placement of tensor i on dimension j of the mesh; `gradients` likewise are those of gradients,
    `wanted` tells whose are asked for. Unless it `moves`, nothing is sent.
    """
    torch.manual_seed(0)
    mesh = device_mesh(device, mesh)
    tensors, sizes = inputs(operator, images, channels, groups, output_size)
    wanted = wanted or [True] * len(tensors)
    whole = [tensor.clone().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    output = getattr(reference, operator)(*whole, *sizes)
    upstream = torch.randn_like(output)
    output.backward(upstream)

    shards = [
        distribute_tensor(tensor.to(device), mesh, placements(names))
        for tensor, names in zip(tensors, given, strict=True)
    ]
    if channels_last:
        locals_ = [shard.to_local().contiguous(memory_format=torch.channels_last) for shard in shards]
        shards = [
            DTensor.from_local(local, mesh, shard.placements) for local, shard in zip(locals_, shards, strict=True)
        ]
    shards = [shard.requires_grad_(want) for shard, want in zip(shards, wanted, strict=True)]
    grad_output = distribute_tensor(upstream.to(device), mesh, placements(expected or ["R"] * mesh.ndim))
    with CommDebugMode() as sent:
        found = getattr(dlu_triton, operator)(*shards, *sizes)
        found.backward(grad_output)
    assert moves or sent.get_total_counts() == 0, sent.get_comm_counts()
    if expected:
        assert_placed(found, placements(expected))
    assert not channels_last or found.to_local().is_contiguous(memory_format=torch.channels_last)
    assert found.shape == output.shape
    torch.testing.assert_close(found.full_tensor().cpu(), output.detach())
    for i, (shard, tensor, want) in enumerate(zip(shards, whole, wanted, strict=True)):
        assert (shard.grad is not None) == want, f"argument {i}"
        if want:
            if gradients:
                assert_placed(shard.grad, placements(gradients[i]), f"argument {i}")
            torch.testing.assert_close(
                shard.grad.full_tensor().cpu(), tensor.grad, msg=lambda text, i=i: f"argument {i}: {text}"
            )


def check_maps(device, mesh, given, expected, moves=False):
    """Class activation maps, likewise; with several settings, which DTensor must not take for one another."""
    torch.manual_seed(0)
    mesh = device_mesh(device, mesh)
    activations, gradients = torch.randn(3, 5, 4, 4).double(), torch.randn(3, 2, 5, 4, 4).double()
    weights = torch.randn(3, 2, 5).double()

    def calls(operators, a, g, w, method="xgradcam", **settings):
        parts = operators.class_activation_parts(a, g, method, **settings)
        cam = operators.class_activation_map(a, g[:, 1], method, **settings)
        return [part for part in parts if part is not None], cam, operators.weighted_activation_map(a, w, **settings)

    def shards(tensor):
        axes = {"S1": Shard(tensor.dim() - (1 if tensor is weights else 3))}  # of the channels
        return distribute_tensor(tensor.to(device), mesh, tuple(axes.get(name, PLACEMENTS[name]) for name in given))

    sharded = [shards(tensor) for tensor in (activations, gradients, weights)]
    for settings in ({}, {"size": (7, 5)}, {"size": 6, "normalize": True}, {"method": "hirescam", "relu": False}):
        with CommDebugMode() as sent:
            parts, cam, several = calls(dlu_triton, *sharded, **settings)
        assert moves or sent.get_total_counts() == 0, sent.get_comm_counts()
        for cams in (parts[0], cam, several):
            assert_placed(cams, placements(expected))
        expected_parts, *others = calls(reference, activations, gradients, weights, **settings)
        for found, right in zip([*parts, cam, several], [*expected_parts, *others], strict=True):
            assert found.shape == right.shape, settings
            torch.testing.assert_close(found.full_tensor().cpu(), right)


def check_compiled(device):
    """torch.compile takes DTensors through an operator and its backward pass."""
    torch.manual_seed(0)
    mesh = device_mesh(device, (dist.get_world_size(),))
    tensors, integers = inputs("dlu_upsample", 2, 4, 1)
    upstream = distribute_tensor(torch.randn(2, 4, 4, 6).double().to(device), mesh, [Shard(0)])

    def call(*arguments):
        return dlu_triton.dlu_upsample(*arguments, *integers).mul(2)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        shards = [distribute_tensor(tensor.to(device), mesh, [Shard(0)]).requires_grad_() for tensor in tensors]
        output = function(*shards)
        assert_placed(output, placements(["S0"]))
        output.backward(upstream)
        results.append([each.full_tensor() for each in (output, *(shard.grad for shard in shards))])
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


class Network(nn.Sequential):
    """Two convolutions around a pack, whose kernels and offsets are not those of its initialisation."""

    def __init__(self, pack):
        torch.manual_seed(0)
        packed = getattr(dlu_triton, pack)(4, 2, up_kernel=3, compressed_channels=4)
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), packed, nn.Conv2d(4, 2, 3, padding=1))
        with torch.no_grad():
            for name, parameter in packed.named_parameters():
                if not name.startswith("channel_compressor"):
                    parameter.add_(torch.randn(parameter.shape) * 0.3)


def losses(net, optimiser, images, targets, steps):
    """Of the steps of training."""
    found = []
    for _ in range(steps):
        loss = F.mse_loss(net(images).float(), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


def check_training(device, wrap, pack, optimiser, steps):
    """Parameters after some steps, each process with its part of the batch, are those of one process with all of it."""
    torch.manual_seed(1)
    processes, rank = dist.get_world_size(), dist.get_rank()
    images = torch.randn(processes, 3, SIZE, SIZE).to(device)
    targets = torch.randn(processes, 2, 2 * SIZE, 2 * SIZE).to(device)
    alone = Network(pack).to(device)
    net = copy.deepcopy(alone)
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    new_optimiser = {
        "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5),
        "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-4),
    }[optimiser]
    losses(alone, new_optimiser(alone), images, targets, steps)

    if wrap == "DDP":
        trained = DistributedDataParallel(net, device_ids=None if device.type == "cpu" else [device])
    else:
        mesh = device_mesh(device, (processes,))
        for layer in net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        trained = fully_shard(net, mesh=mesh)
        assert all(p.placements == (Shard(0),) for p in net.parameters())
    losses(trained, new_optimiser(net), images[rank : rank + 1], targets[rank : rank + 1], steps)
    for name, tensor in net.state_dict().items():
        found = tensor.full_tensor() if wrap == "FSDP2" else tensor
        expected = alone.state_dict()[name]
        assert not torch.equal(expected, before[name]), name
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def check_mixed_precision(device, pack):
    """FSDP2 with bfloat16 parameters and float32 gradients: losses near those of one process in float32."""
    torch.manual_seed(1)
    processes = dist.get_world_size()
    images, targets = torch.randn(2, 3, SIZE, SIZE).to(device), torch.randn(2, 2, 2 * SIZE, 2 * SIZE).to(device)
    alone = Network(pack).to(device)
    net = copy.deepcopy(alone)
    expected = torch.tensor(losses(alone, torch.optim.SGD(alone.parameters(), lr=0.1), images, targets, 3))
    mesh = device_mesh(device, (processes,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(net[2], mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    assert net(images).dtype == torch.bfloat16
    found = torch.tensor(losses(net, torch.optim.SGD(net.parameters(), lr=0.1), images, targets, 3))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def main():
    directory, rank, processes, device = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        torch.device(sys.argv[4]),
    )
    torch.set_num_threads(1)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=30),
    )
    errors = {}
    for name, (check, arguments) in json.loads((directory / "cases.json").read_text()).items():
        try:
            globals()[f"check_{check}"](device, **arguments)
        except Exception:
            errors[name] = traceback.format_exc()
        else:
            errors[name] = None
    (directory / f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
