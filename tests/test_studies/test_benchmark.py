"""What the benchmark prints, at toy sizes, and that it compares like with like."""

import json
import math
import random

import benchmark as command_line
import pytest
import torch
from benchmarks import layer, timing
from benchmarks.timing import average, compare

from cbn_mmdet import links

SHAPES = ["--shapes", "2,8,16,3,6", "1,4,8,1,5"]
QUICK = ["--max-seconds", "0", "--threads", "1"]
NAIVE = "CBN(compensate=False)"
PAPERS, SLIDING = (
    f"CBN(window='sliding', window_size={size}, backward='{backward}')"
    for size, backward in ((4, "current"), (8, "window"))
)


@pytest.fixture
def measure(tool):
    """Runs a subcommand; returns the rows of its tables, and its notes."""

    def run(*args):
        output = "\n" + tool("benchmark.py", *args, "--json").stdout
        # The fixture mixes in what the frameworks write to stderr.
        document, _ = json.JSONDecoder().raw_decode(output, output.index("\n{\n") + 1)
        assert document["torch"] == torch.__version__ and document["threads"] >= 1
        for rows in document["tables"].values():
            check_figures(rows)
        return list(document["tables"].values()), document["notes"]

    return run


def check_figures(rows):
    """All figures are finite, and the ratio of BN to BN is 1."""
    for row in rows:
        for figure in [cell for cell in row.values() if isinstance(cell, dict)]:
            assert all(math.isfinite(value) for value in figure.values())
            assert figure["ratio"] > 0 and figure["error"] >= 0
            if row.get("norm") == "BN":
                assert (figure["ratio"], figure["error"]) == (pytest.approx(1), 0)


def by_norm(rows):
    return {row["norm"]: row for row in rows}


def test_ratios_are_of_the_same_round():
    """A machine that is ten times as slow in some rounds does not change a ratio."""
    rng = random.Random(0)
    bn = [rng.choice([1.0, 10.0]) for _ in range(50)]
    other = [1.2 * seconds * rng.uniform(0.99, 1.01) for seconds in bn]
    figure = compare(other, bn)
    assert figure["ratio"] == pytest.approx(1.2, rel=0.005)
    assert 0 < figure["error"] < 0.01
    mean = average([figure, compare(bn, bn)])
    assert mean["ratio"] == pytest.approx(figure["ratio"] ** 0.5)
    assert mean["error"] < figure["error"]


def test_error_is_half_of_the_95_percent_interval():
    """About 95 % of repeated measurements are within it of the truth."""
    rng = random.Random(0)
    hits = 0
    for _ in range(500):
        ratios = [rng.gauss(1.2, 0.05) for _ in range(30)]
        figure = compare(ratios, [1.0] * 30)
        hits += abs(figure["ratio"] - 1.2) < figure["error"]
    assert 0.9 < hits / 500 < 0.99


def test_clock_asks_the_time_of_what_it_is_given():
    clock = timing.Clock("cpu", iter([1.0, 1.5, 10.0, 12.0]).__next__)
    for _ in range(2):
        with clock:
            pass
    assert clock.seconds() == 2.5


def test_layers_in_a_row():
    """Each norm is linked to its convolution; the convolutions are the same for all norms."""
    build, shape, count = layer.build_layers, layer.TINY, layer.DEPTH
    model, of_bn = build("CBN", shape, count), build("BN", shape, count)
    assert [type(layer).__name__ for layer in model] == ["Conv2d", "CBN"] * 20
    assert [type(layer).__name__ for layer in of_bn] == ["Conv2d", "BatchNorm2d"] * 20
    assert {each.extra_repr() for each in model[::2]} == {
        "8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False"
    }
    weights = [layer.weight for layer in model[::2]]
    torch.testing.assert_close([each.weight for each in of_bn[::2]], weights, rtol=0, atol=0)
    model(torch.randn(1, 8, 4, 4))
    assert links(model) == {str(i): str(i - 1) for i in range(1, 40, 2)}


@pytest.mark.parametrize(
    "name, iterations", [("BN", 2), ("CBN", 9), ("CBN(window='sliding', window_size=3)", 4)]
)
def test_warm_up_fills_the_windows(name, iterations):
    model, seeds = layer.build_layers(name, layer.TINY, 2), []
    timing.warm_up(model, lambda seed, clock: seeds.append(seed), "cpu")
    assert seeds == [*range(iterations)]


def test_host_is_one_thread_of_the_cpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "host"])
    args = command_line.parse_args()
    assert (args.device, args.threads, args.dtype) == ("cpu", 1, "float32")
    assert args.norms == ["BN", *command_line.ROWS["host"]]


def test_operations_of_a_run_are_run_again():
    """With the same arguments, and nothing else: neither Python nor autograd."""
    weight, calls = torch.ones(3, requires_grad=True), []

    def run(seed, clock):
        calls.append(seed)
        with clock:
            (weight * 2).sum().backward()

    again = layer.operations_run(run)
    before, clock = weight.grad.clone(), timing.Clock("cpu")
    again(5, clock)
    assert calls == [0] and clock.seconds() > 0
    torch.testing.assert_close(weight.grad, before)
    with layer.Counter() as counter:
        again(6, timing.Clock("cpu"))
    assert counter.operations >= 3


@pytest.mark.slow
def test_host(measure):
    (rows,), notes = measure("host", "--max-seconds", "0", "--norms", "GN", "CBN")
    bn, gn, cbn, *alone = rows
    assert [each["norm"] for each in alone] == [f"{row['norm']}{layer.ALONE}" for row in rows[:3]]
    assert list(bn) == ["norm", "time / BN's", "µs per layer"]
    assert 0 < min(bn["µs per layer"], gn["µs per layer"])
    assert max(bn["µs per layer"], gn["µs per layer"]) < cbn["µs per layer"] < 60_000
    assert 0 < alone[1]["µs per layer"] < alone[2]["µs per layer"] < cbn["µs per layer"]
    for row in rows:
        ratio = row["µs per layer"] / bn["µs per layer"]  # ratio of medians, not median of ratios
        assert row["time / BN's"]["ratio"] == pytest.approx(ratio, rel=0.5)
    assert "after 3 rounds stable to" in notes[0]


@pytest.mark.slow
def test_layer(measure):
    (rows,), notes = measure("layer", *SHAPES, *QUICK)
    names = [name for name in command_line.ROWS["layer"] if name != "SyncBN"]
    assert list(by_norm(rows)) == ["BN", *names]
    assert list(rows[0]) == ["norm", "2×8→16, 3×3, 6²", "1×4→8, 1×1, 5²", "geometric mean"]
    for row in rows:
        _, *each, mean = row.values()
        assert mean["ratio"] == pytest.approx(math.sqrt(each[0]["ratio"] * each[1]["ratio"]))
    assert notes[0] == "SyncBN runs on a GPU only."
    assert "after 3 rounds stable to" in notes[1]


@pytest.mark.slow
def test_rounds_go_on_until_stable(measure):
    """They then stop: with a lax target time is left over, and no note says that it ran out."""
    arguments = ["layer", SHAPES[0], SHAPES[1], "--norms", "GN", "--stable-to", "1000"]
    assert measure(*arguments)[1] == []


@pytest.mark.slow
def test_growth(measure, tmp_path):
    (windows, images), _ = measure("growth", *SHAPES, *QUICK, "--plot", tmp_path / "k.png")
    assert [row["k"] for row in windows] == [1, 2, 4, 8, 16, 32]
    assert [row["images"] for row in images] == [1, 2, 4, 8]
    held = [row["windows, MiB"] for row in windows]
    each = (held[2] - held[1]) / 2  # per past iteration; a window also has a float per channel
    assert held[0] == 0 and held[-1] - held[1] == pytest.approx(30 * each, rel=1e-3)
    assert each <= held[1] < 1.05 * each
    assert windows[2]["time / that of k = 4"]["ratio"] == pytest.approx(1)
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


def test_count(measure):
    """Counts have no noise, so these limits hold the layer to its present cost."""
    arguments = ["count", "--shapes", "1,64,64,3,8"]
    (rows,), _ = measure(*arguments)
    assert measure(*arguments)[0] == [rows]
    rows = by_norm(rows)
    assert rows["BN"]["step"] == rows["GN"]["step"] == 0
    work = {name: row["forward"] + row["backward"] + row["step"] for name, row in rows.items()}
    assert work["BN"] < work[NAIVE] < work["CBN"] <= 47 and work[SLIDING] <= 61
    # Forward and backward each read a sliding window at least once: 2 x 7 past weights.
    assert 14 < rows[SLIDING]["of the weight"] < 63
    assert 2 < rows["CBN"]["of the weight"] < 32


@pytest.mark.slow
def test_step(measure, small_config, tmp_path):
    few = "model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))"  # noise has labels, too
    config = small_config(tmp_path, "faster-rcnn_r18_fpn_bn-all_1xb1_digits", few)
    arguments = ["--config", config, "--size", "64", "96", "--batch", "1", *QUICK]
    (rows,), _ = measure("step", *arguments, "--norms", "CBN(window_size=3)", "GN")
    assert list(by_norm(rows)) == ["BN", "CBN(window_size=3)", "GN"]
    assert 1 < rows[0]["time / BN's"]["ms"] < 60_000


@pytest.mark.slow
def test_inference(measure, small_config, tmp_path):
    config = small_config(tmp_path, "faster-rcnn_r18_fpn_bn-all_1xb1_digits")
    (rows,), _ = measure("inference", "--config", config, "--size", "64", "64", *QUICK)
    same = {name: row["calls BN's operations"] for name, row in by_norm(rows).items()}
    assert same == {"BN": True, "GN": False, "CBN": True}


@pytest.mark.slow
def test_memory(measure, small_config, tmp_path):
    config = small_config(tmp_path, "faster-rcnn_r18_fpn_bn-all_1xb1_digits")
    arguments = ["--config", config, "--size", "64", "64", "--batch", "1", "--repeats", "1"]
    (rows,), notes = measure("memory", *arguments, "--norms", "CBN")
    rows = by_norm(rows)
    assert rows["BN"]["peak / BN's"]["MiB"] > 100
    assert rows["BN"]["windows, MiB"] == rows["BN"]["of the weights"] == 0
    # One weight for all past iterations, and a little more for each channel.
    assert 1 < rows["CBN"]["of the weights"] < 1.1
    assert notes == ["The peak is the process's."]


@pytest.mark.slow
def test_markdown(tool):
    output = tool("benchmark.py", "layer", *SHAPES, *QUICK, "--norms", "GN").stdout
    header, _, heading, _, columns, _, bn, gn, *_ = output.splitlines()
    assert f"torch {torch.__version__}, threads 1, dtype float32" in header
    assert heading == "## Convolution + norm, forward + backward, time / BN's"
    assert [cell.strip() for cell in columns.split("|")[1:3]] == ["norm", "2×8→16, 3×3, 6²"]
    assert bn.split("|")[2].strip().startswith("1 (") and "ms)" in bn
    assert " ± " in gn.split("|")[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["layer", "--norms", "FOO"], "takes BN, GN, SyncBN, BRN, MABN, CmBN, CBN, none, or"),
        (["layer", "--norms", "CBN(window_size=0)"], "window_size must be"),
        (["layer", "--norms", "CBN(stride=2)"], "cannot build CBN(stride=2): CBN.__init__() got"),
        (["layer", "--norms", "CBN(8)"], "cannot build CBN(8): its arguments need their names"),
        (["layer", "--norms", "CBN("], "or CBN(derivative_stride=2), say, got CBN("),
        (
            ["host", "--norms", "BN + weight gradient"],
            "--norms 'BN + weight gradient': this row is layer's and count's alone",
        ),
        (["host", "--threads", "2"], "unrecognized arguments: --threads 2"),
        (["layer", "--shapes", "1,2,3"], "takes N,C_in,C_out,kernel,size, got 1,2,3"),
        (["layer", "--threads", "0"], "takes a whole number of at least 1, got 0"),
        (["growth", "--plot", "nowhere/k.png"], "takes a .png file in a folder that exists"),
        (["step", "--config", "nowhere.py"], "the config file nowhere.py does not exist"),
        (
            ["step", "--config", "configs/faster_rcnn/faster-rcnn_r50_fpn_4xb4-1x_coco.py"],
            "4xb4-1x_coco.py: none of its norms trains: set a norm_cfg without requires_grad",
        ),
    ],
)
def test_mistakes_are_one_line(tool, arguments, message):
    done = tool("benchmark.py", *arguments, check=False)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 2 and "error: " in last and message in last
    assert "Traceback" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda"], "--device cuda: no GPU is available"),
        (["--dtype", "float16"], "--dtype float16 is measured on a GPU only"),
        (["--norms", "SyncBN"], "--norms SyncBN: it runs on a GPU only"),
    ],
)
def test_what_needs_a_gpu(tool, arguments, message):
    test_mistakes_are_one_line(tool, ["layer", *arguments], message)
