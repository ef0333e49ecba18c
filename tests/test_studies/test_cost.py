"""The parts of the cost models: counts against other counts, formulas at round numbers."""

import cost
import pytest
import torch
from benchmarks.vision import build_backbone
from fake_cuda import Counted, fake_cuda
from torch import nn

from cbn_mmdet import CBN


def counted(launches, moved, flops):
    each = Counted()
    each.launches["op", "line"] = launches
    each.bytes, each.flops = moved, flops
    return each


def test_terms(monkeypatch):
    monkeypatch.setattr(cost, "HOST_US", 10)
    monkeypatch.setattr(cost, "GPUS", {"X": (1000, 10, 100)})
    parts = {"forward": counted(100, 2e9, 1e12), "backward": counted(300, 4e9, 1e12)}
    assert cost.terms(parts, "X", False) == {"host": 4, "memory": 6, "arithmetic": 200}
    assert cost.terms(parts, "X", True) == {"host": 4, "memory": 6, "arithmetic": 20}


def test_counted_operations_are_those_of_the_shapes(monkeypatch):
    """A convolution takes three products, the first one two; BN has one operation a layer more."""
    monkeypatch.setattr(cost, "SIZE", (96, 128))
    bn = cost.count_step("BN", 1, False)
    products = []
    with fake_cuda(), torch.device("cuda"):
        model = build_backbone("BN")
        convs = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
        for conv in convs:
            conv.register_forward_hook(
                lambda conv, _, y: products.append(2 * y.numel() * conv.weight[0].numel())
            )
        model(torch.empty(1, 3, 96, 128))
    found = sum(part.flops for part in bn.values())
    assert len(products) == 61 and found == 3 * sum(products) - products[0]
    names = [name for name, _ in bn["forward"].launches.elements()]
    assert sum("convolution" in name for name in names) == 61
    assert bn["step"].total == 0


@pytest.mark.slow
def test_model(monkeypatch, capsys):
    monkeypatch.setattr(cost, "SIZE", (64, 64))
    monkeypatch.setattr(cost, "NORMS", {"BN": "BN", "CBN": "CBN"})
    monkeypatch.setattr("sys.argv", ["cost.py", "model"])
    cost.main()
    output = capsys.readouterr().out
    assert output.startswith("Counted on a fake CUDA device") and "Nothing was measured." in output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    first = [row for row in rows if row[:1] in (["1"], ["2"])]
    assert [row[:3] for row in first] == [
        [images, precision, norm]
        for images in "12"
        for precision in ("float32", "AMP")
        for norm in ("BN", "CBN")
    ]
    modelled = [row for row in rows if row and row[0] in cost.GPUS]
    assert len(modelled) == 4 * 2 * 2
    # With maps this small, all the time goes to the host.
    assert all("(1.00×, host" in row[3] and ", host" in row[4] for row in modelled)


def test_pay(monkeypatch):
    """A gigabyte over a link of a gigabyte a second, and an empty message through a tree."""
    monkeypatch.setattr(cost, "FABRICS", {"wire": (1, 10)})
    small, large = 0, 10**9
    assert cost.pay([("allreduce_", small)], 8, "wire") == pytest.approx(2 * 3 * 0.010)
    assert cost.pay([("broadcast_", small)] * 2, 64, "wire") == pytest.approx(2 * 6 * 0.010)
    assert cost.pay([("allreduce_", large)], 8, "wire") == pytest.approx(1750, abs=0.1)
    for name in ("allgather_", "_allgather_base_"):
        assert cost.pay([(name, large)], 8, "wire") == pytest.approx(7000, abs=0.1)


@pytest.mark.slow
def test_collectives(monkeypatch, capsys):
    """Two processes: SyncCBN sends what SyncBN sends, CBN nothing before an evaluation."""
    heard = {}
    listen = cost.listen
    monkeypatch.setattr(cost, "listen", lambda count: heard.setdefault(count, listen(count)))
    monkeypatch.setattr("sys.argv", ["cost.py", "collectives", "--processes", "2"])
    cost.main()
    assert "of an iteration" in capsys.readouterr().out
    channels = [each.num_features for each in build_backbone("CBN").modules() if type(each) is CBN]
    said = {row: list(parts.values()) for row, parts in heard[2].items()}
    gathered, reduced = (
        [[name, 4 * (2 * each + more)] for each in channels]
        for name, more in (("allgather_", 1), ("allreduce_", 0))
    )
    assert len(channels) == 61
    for row in ("SyncBN", "SyncCBN"):
        forward, backward, *_ = said[row]
        assert sorted(own for _, own in forward) == sorted(own for _, own in gathered)
        assert sorted(backward) == sorted(reduced)
    _, _, ended, evaluated = said["SyncCBN"]
    assert len(ended) == 1 and evaluated == said["CBN"][3]
    both = 2 * 4 * sum(channels)
    assert said["CBN"] == [[], [], [], [["allreduce_", both]]]
    floats, counts = said["BN"][3]
    assert said["BN"][:3] == [[], [], []]
    assert floats == ["allreduce_", both] and counts == ["allreduce_", 8 * len(channels)]
    assert sum(own for _, own in said[cost.BROADCAST][0]) == both + 8 * len(channels)
