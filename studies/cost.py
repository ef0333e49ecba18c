# Licensed under the Apache License, Version 2.0.
"""Predict the cost of a norm where it was not measured, by counting and a model of the counts.

model: a training step of R-50-FPN with the norm after each convolution, counted on a fake CUDA
device that has only shapes: launches x host time + bytes / bandwidth + operations / peak.
collectives: what processes on this machine's CPU send each other, and the time that this would take
on many GPUs. Nothing here measures a time.
"""

import argparse
import json
import logging
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import paths  # noqa: F401
import torch
import torch.distributed as dist
from benchmarks.vision import build_backbone
from common.errors import positive
from norms import PAPERS, link_cbn
from printing import print_table
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cbn_mmdet import step

GIGA, TERA, MS, KIB = 1e9, 1e12, 1e3, 1024
NORMS = {"BN": "BN", "GN": "GN", "CBN": "CBN", "the paper's CBN": PAPERS}
SIZE = (800, 1344)  # 800 x 1333, padded as detectors do
HALF = {"float32": False, "AMP": True}
# Bandwidth in GB/s, and 10^12 operations per second of a convolution in float32 (TF32 from Ampere
# on, where torch uses it) and in float16, both without sparsity.
GPUS = {
    "H100": (3350, 494.7, 989.4),  # SXM5; NVIDIA's data sheet, halved where it says "with sparsity"
    "A100": (2039, 156, 312),  # SXM4, 80 GB; NVIDIA's data sheet
    "V100": (900, 15.7, 125),  # SXM2; NVIDIA's data sheet
    "2080 Ti": (616, 13.4, 53.8),  # sums in float32; NVIDIA's Turing whitepaper, reference card
}
HOST_US = 9.4  # per launch, by BN's host time in docs/benchmarks.md: 7 take 65 µs

# Rows and their norms; fabrics: GB/s in one direction, and µs to the next GPU (assumed).
BROADCAST = "BN, broadcast_buffers=True"
SPEAKERS = {"BN": "BN", BROADCAST: "BN", "SyncBN": "SyncBN", "CBN": "CBN"}
SPEAKERS["SyncCBN"] = "CBN(sync=True)"
FABRICS = {"NVLink": (450, 5), "10 Gb/s": (1.25, 30)}  # an H100's: 900 GB/s, both ways together
RANKS = 8, 64
# NCCL at its best: trips through a tree, and how often a ring's link carries a process's bytes.
COSTS = {
    "allreduce_": (2, lambda ranks: 2 * (ranks - 1) / ranks),
    "allgather_": (1, lambda ranks: ranks - 1),
    "_allgather_base_": (1, lambda ranks: ranks - 1),
    "broadcast_": (1, lambda ranks: 1),
}


def count_step(name: str, images: int, half: bool) -> dict[str, object]:
    """Count, by part, a training step with full windows, but without the optimiser."""
    from fake_cuda import backward, fake_cuda

    with fake_cuda() as watch:
        with torch.device("cuda"):
            model = build_backbone(name)
        windows = link_cbn(model)
        for _ in range(4 if windows else 1):
            x = torch.empty(images, 3, *SIZE, device="cuda")
            watch.take()
            with torch.autocast("cuda", torch.float16, enabled=half):
                maps = model(x)
            parts = {"forward": watch.take()}
            loss = torch.stack([each.float().sum() for each in maps.values()]).sum()
            watch.take()
            backward(loss)
            parts["backward"] = watch.take()
            if windows:
                step(model)
            parts["step"] = watch.take()
            with torch.no_grad():
                torch._foreach_add_([*model.parameters()], 1)
    return parts


def terms(parts: dict, gpu: str, half: bool) -> dict[str, float]:
    """Model the milliseconds of host, memory and arithmetic."""
    bandwidth, *peaks = GPUS[gpu]
    launches, moved, flops = (
        sum(getattr(part, each) for part in parts.values()) for each in ("total", "bytes", "flops")
    )
    memory, arithmetic = moved / (bandwidth * GIGA), flops / (peaks[half] * TERA)
    return {"host": launches * HOST_US / MS, "memory": memory * MS, "arithmetic": arithmetic * MS}


def model() -> None:
    """Print the counts, and the time that they would take."""
    counted, modelled = [], []
    for images, (precision, half) in ((n, each) for n in (1, 2) for each in HALF.items()):
        case = {"images": images, "precision": precision}
        steps = {row: count_step(name, images, half) for row, name in NORMS.items()}
        for row, parts in steps.items():
            moved, flops = (sum(getattr(p, k) for p in parts.values()) for k in ("bytes", "flops"))
            sums = {"GB": f"{moved / GIGA:.1f}", "TFLOP": f"{flops / TERA:.2f}"}
            launches = {part: each.total for part, each in parts.items()}
            counted.append({**case, "norm": row, **launches, **sums})
        for gpu in GPUS:
            cells, bn = {}, sum(terms(steps["BN"], gpu, half).values())
            for row, parts in steps.items():
                found = terms(parts, gpu, half)
                total, most = sum(found.values()), max(found, key=found.get)
                cells[row] = f"{total:.1f} ({total / bn:.2f}×, {most} {found[most]:.1f})"
            modelled.append({"GPU": gpu, **case, **cells})
    print("Counted on a fake CUDA device, or computed from that by a model. Nothing was measured.")
    size = f"{SIZE[0]}×{SIZE[1]}"
    print_table(f"Counted: launches, bytes and operations of R-50-FPN at {size}", counted)
    print_table(f"Model: {HOST_US} µs × launches + bytes / bandwidth + operations / peak", modelled)


class Collectives(TorchDispatchMode):
    """Records each collective, and the bytes that this process contributes."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and record it if it is a collective."""
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            own, _ = tree_flatten(args[1] if "gather" in name else args[0])
            self.said.append((name, sum(each.nbytes for each in own if isinstance(each, Tensor))))
        return func(*args, **(kwargs or {}))


class SyncBNOnCPU(nn.SyncBatchNorm):
    """torch's SyncBN, with stand-ins for the kernels that only a GPU has."""

    def forward(self, x: Tensor) -> Tensor:
        """Sends what torch's SyncBN sends, and returns meaningless values."""
        own = self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum
        return SyncFunction.apply(x, *own, dist.group.WORLD, dist.get_world_size())


STAND_INS = {  # any values of the right shape
    "batch_norm_stats": lambda x, eps: 2 * (x.new_ones(x.shape[1]),),
    "batch_norm_gather_stats_with_counts": lambda x, means, *_: 2 * (means[0],),
    "batch_norm_elemt": lambda x, *_: x.clone(),
    "batch_norm_backward_reduce": lambda gradient, x, mean, *_: 4 * (mean,),
    "batch_norm_backward_elemt": lambda gradient, *_: gradient,
}


def speak(row: str) -> dict[str, list[tuple[str, int]]]:
    """Record a process's collectives in each part of an iteration, and before an evaluation."""
    from mmengine.hooks import SyncBuffersHook

    from cbn_mmdet import CBNHook

    with mock.patch.dict("norms.NORMS", SyncBN=SyncBNOnCPU):
        net = build_backbone(SPEAKERS[row])
    outer = DistributedDataParallel(net) if row == BROADCAST else net
    hooks = [CBNHook(burn_in=0)] if "CBN" in row else [SyncBuffersHook()] if row == "BN" else []
    runner = SimpleNamespace(model=net, hooks=[], logger=logging.getLogger(), iter=0, epoch=0)
    runner.max_epochs, runner.max_iters = 1, None
    runner.optim_wrapper = SimpleNamespace(should_update=lambda: True)
    for hook in hooks:
        hook.before_train(runner)
    for _ in range(3):
        parts = {part: Collectives() for part in ("forward", "backward", "step", "evaluation")}
        with parts["forward"]:
            loss = sum(each.sum() for each in outer(torch.randn(2, 3, 64, 64)).values())
        if outer is net:  # leaves out gradients, which are the same in all rows
            with parts["backward"]:
                loss.backward()
        for hook in hooks:
            with parts["step"]:
                hook.after_train_iter(runner, 0)
            with parts["evaluation"]:
                hook.after_train_epoch(runner)
    return {part: each.said for part, each in parts.items()}


def process(rank: int, count: int, folder: str) -> None:
    """Run all rows in one of the processes; the first one writes what it sent."""
    torch.set_num_threads(1)
    vars(torch).update(STAND_INS)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    said = {row: speak(row) for row in SPEAKERS}
    if rank == 0:
        Path(folder, "said.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def listen(count: int) -> dict[str, dict[str, list[tuple[str, int]]]]:
    """Start several processes; returns the collectives of one, by row and part."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (count, folder), count)
        return json.loads(Path(folder, "said.json").read_text())


def pay(said: list[tuple[str, int]], ranks: int, fabric: str) -> float:
    """Model the milliseconds that collectives take, one after the other."""
    bandwidth, hop = FABRICS[fabric]
    ways = [(*COSTS[name], own) for name, own in said]
    hops = sum(trips for trips, _, _ in ways) * math.ceil(math.log2(ranks))
    return MS * (hops * hop / 1e6 + sum(f(ranks) * own for _, f, own in ways) / (bandwidth * GIGA))


def collectives(counts: list[int]) -> None:
    """Print the collectives, and the time that they would take on many GPUs."""
    rows = []
    for count in counts:
        heard = listen(count)
        for row, parts in heard.items():
            sums = {part: sum(own for _, own in said) / KIB for part, said in parts.items()}
            cells = {part: f"{len(parts[part])}, {own:.1f} KiB" for part, own in sums.items()}
            rows.append({"processes": count, "norm": row, **cells})
    print_table("Counted: collectives of R-50-FPN, and what each process hands in", rows)
    paid = {row: [*p["forward"], *p["backward"], *p["step"]] for row, p in heard.items()}
    paid.update({f"{row}, before an evaluation": heard[row]["evaluation"] for row in ("BN", "CBN")})
    weights = sum(each.nbytes for each in build_backbone("BN").parameters())
    paid["all gradients (beside the backward)"] = [("allreduce_", weights)]
    places = [(f"{ranks} GPUs, {fabric}", ranks, fabric) for fabric in FABRICS for ranks in RANKS]
    rows = [
        {"of an iteration": row, **{name: f"{pay(said, *where):.2f}" for name, *where in places}}
        for row, said in paid.items()
    ]
    print_table("Model: ms that they take, none beside another", rows)


def main() -> None:
    """Count, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("model", help="of a training step's time")
    spoken = commands.add_parser("collectives", help="of several processes")
    spoken.add_argument("--processes", nargs="+", type=positive, default=[2, 4], metavar="N")
    args = parser.parse_args()
    model() if args.command == "model" else collectives(args.processes)


if __name__ == "__main__":
    main()
