"""Weights that torch's FSDP spreads over processes, and takes away between uses."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers import assert_all_equal, assert_same, linked
from mmengine.utils import digit_version
from torch import nn

from cbn_mmdet import CBN, diagnose, link, step

WORLD = 2


def shard(rank, folder, norm):
    """Trains with weights that are spread over the processes, on the data of :func:`steps_of`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    model = blocks(**norm)
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    outputs, diagnosis = steps_of(model)
    torch.save((outputs, diagnosis), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def blocks(**norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), CBN(8, window_size=4, **norm), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), CBN(8, window_size=4, **norm), nn.ReLU()),
    )


def steps_of(model):
    """Takes steps on the same data in each process; returns outputs and number of diagnoses."""
    link(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for _ in range(6):
        y = model(torch.randn(2, 3, 9, 9, generator=generator))
        (y * torch.randn(y.shape, generator=generator)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step(model)
        outputs.append(y.detach())
    return outputs, len(diagnose(model))


def test_a_scale_that_is_away_in_the_backward():
    """As FSDP takes a parameter away once the forward of its block is over."""
    torch.manual_seed(0)
    model = linked(bias=True)
    other = copy.deepcopy(model)
    link(other)
    for _ in range(3):
        x, results = torch.randn(2, 3, 9, 9), []
        for each in (model, other):
            y = each(x)
            scale = each[1].weight.detach().clone()
            if each is other:
                each[1].weight.data.fill_(math.nan)
            each.zero_grad()
            (y * torch.linspace(-1, 1, 9)).sum().backward()
            each[1].weight.data.copy_(scale)
            results.append([parameter.grad for parameter in each.parameters()])
            step(each)
        assert_all_equal(*results)
    assert_same(model, other)


@pytest.mark.slow
@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version("2.11"),
    reason="before torch 2.11 fully_shard may add gradients up over gloo where it should average",
)
@pytest.mark.parametrize("norm", [dict(), dict(window="sliding", backward="window")], ids=str)
def test_weights_that_are_spread_over_processes(norm, tmp_path):
    """Training is as with whole weights; diagnose finds only parts, and leaves their layers out."""
    mp.spawn(shard, (str(tmp_path), norm), nprocs=WORLD)
    expected, diagnosed = steps_of(blocks(**norm))
    assert diagnosed == 2
    for rank in range(WORLD):
        outputs, diagnosed = torch.load(tmp_path / f"{rank}.pth")
        torch.testing.assert_close(outputs, expected)
        assert diagnosed == 0
