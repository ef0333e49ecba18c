"""The report of a GPU, written on a machine without one: its parts, and what is kept of them."""

import json
import os
import sys
import time
from argparse import Namespace
from functools import reduce
from operator import getitem
from pathlib import Path

import benchmark
import gpu
import pytest
import torch
from common.config import read_config

TORCH_ONLY = ["--torch-only", "--device", "cpu", "--toy"]
NO_HALF = f"left out: {gpu.NO_HALF}"


def of_a_gpu(tmp_path, torch_only):
    return gpu.plan(
        Namespace(device="cuda", toy=False, torch_only=torch_only, work_dir=Path(tmp_path))
    )


def results(folder):
    """What the report's table says, by part."""
    lines = (folder / "report.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| part"))
    rows = lines[start + 2 : lines.index("", start)]
    return dict([cell.strip() for cell in row.split("|")[1:3]] for row in rows)


@pytest.mark.parametrize("torch_only", [False, True])
def test_what_a_gpu_is_asked(torch_only, tmp_path, monkeypatch):
    """All commands parse, and their expected times add up to ten minutes at most."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts = of_a_gpu(tmp_path, torch_only)
    assert sum(part.seconds for part in parts) <= 600
    assert len({part.name for part in parts}) == len(parts) == 17 - 3 * torch_only
    asked = set()
    for part in parts:
        assert part.lacks == ""
        if part.command[1] != "studies/benchmark.py":
            continue
        monkeypatch.setattr("sys.argv", part.command[1:])
        args = benchmark.parse_args()
        if args.command == "host":
            continue
        asked.add((args.command, args.dtype, part.name[-10]))
        assert args.device == "cuda" and set(args.norms) <= {"BN", *gpu.NORMS}
        if args.command != "layer":
            assert args.size == [800, 1333] and args.torchvision == torch_only
    assert len(asked) == 3 * 2 * 2


def test_the_options_of_a_training(root, tmp_path):
    """The config has each option, and there are 50 steps, most with an open window."""
    for config in gpu.CONFIGS:
        cfg = read_config(str(root / "configs" / config))
        options = dict(each.split("=", 1) for each in gpu.settings(tmp_path / "coco", False))
        for key in options:
            *holders, last = key.split(".")
            assert last in reduce(getitem, holders, cfg), key
        assert cfg.custom_hooks[0].burn_in < int(options["train_cfg.max_epochs"]) == 10


@pytest.mark.slow
def test_without_mmdetection(tool, tmp_path):
    """Torch and torchvision suffice; a rerun keeps finished parts and retries failed ones."""
    hidden = ["mmengine", "mmcv", "mmdet", "rich", "matplotlib"]
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n"
    )
    folder = tmp_path / "gpu"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*more, check=True):
        return tool("gpu.py", *TORCH_ONLY, "--work-dir", folder, *more, check=check, env=env)

    done = run("--minutes", "0", check=False)
    assert done.returncode == 1 and "the same command goes on" in done.stdout
    assert set(results(folder).values()) == {"no time was left", NO_HALF}

    run()
    assert results(folder) == {
        "tests": "done",
        **{
            f"{what}, {dtype}, 1 image(s)": "done" if dtype == "float32" else NO_HALF
            for what in ("step", "layer", "memory")
            for dtype in ("float32", "float16")
        },
        "host": "done",
    }
    text = (folder / "report.md").read_text()
    assert "#### Training step, torchvision's Faster R-CNN, 1 image(s) of 64×64, noise" in text
    assert "10 passed" in text and f"torch {torch.__version__}" in text
    assert "- form: torch only, toy size" in text

    kept = folder / "host.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "result": "failed"}))
    assert [line.split(":")[0] for line in run().stdout.splitlines() if ": done" in line] == [
        "[4/8] host"
    ]


@pytest.mark.slow
def test_toy_size(tool, tmp_path):
    """Parts that need no MMDetection are kept from before: the test above runs them."""
    told = gpu.about(Namespace(device="cpu", toy=True, torch_only=False))
    done = json.dumps(dict(about=told, result="done", seconds=1, text=""))
    for name in ("tests", "host", "layer, float32, 1 image(s)"):
        (tmp_path / f"{name}.json").write_text(done)
    tool("gpu.py", "--device", "cpu", "--toy", "--work-dir", tmp_path)
    found = results(tmp_path)
    assert len(found) == 11 and set(found.values()) == {"done", NO_HALF}
    assert [name for name, result in found.items() if "_coco" in name and result == "done"] == [
        "faster-rcnn_r50_fpn_cbn-all_4xb4-1x_coco"
    ]
    text = (tmp_path / "report.md").read_text()
    assert "10 steps of " in text and "cbn/window_size 4" in text
    assert str(Path.home()) not in text and not list(tmp_path.rglob("*.pth"))


class TestRun:
    def run(self, tmp_path, code, limit=60):
        return gpu.run(gpu.Part("x", 1, [sys.executable, "-c", code]), limit, tmp_path / "x.log")

    def test_a_failure_is_told_by_its_last_lines(self, tmp_path):
        found = self.run(tmp_path, "print(*range(50), sep='\\n'); 1 / 0")
        lines = found["text"].splitlines()
        assert found["result"] == "failed" and len(lines) == gpu.TAIL
        assert lines[-1].startswith("ZeroDivisionError")

    def test_what_an_interrupted_training_left_does_not_count(self, tmp_path):
        log = json.dumps(dict(loss=1.0, time=1.0))
        (tmp_path / "x/old/vis_data").mkdir(parents=True)
        (tmp_path / "x/old/vis_data/scalars.json").write_text(log)
        folder = str(tmp_path / "x/new/vis_data")
        code = f"import pathlib; folder = pathlib.Path({folder!r}); folder.mkdir(parents=True); "
        code += f"(folder / 'scalars.json').write_text({log!r})"
        assert self.run(tmp_path, code)["text"] == "1 steps of 1 s, loss 1 to 1"
        assert not (tmp_path / "x").exists()

    def test_a_part_ends_with_its_workers_when_its_time_is_up(self, tmp_path):
        flag = tmp_path / "late"
        worker = f"import time, pathlib; time.sleep(5); pathlib.Path({str(flag)!r}).touch()"
        code = "import subprocess, sys; print('on', flush=True); "
        code += f"subprocess.run([sys.executable, '-c', {worker!r}])"
        found = self.run(tmp_path, code, limit=2)
        assert found["result"] == "stopped after 2 s" and found["text"] == "on"
        time.sleep(4)
        assert not flag.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "sees no GPU: does nvidia-smi"), (("--device", "cpu"), "would take hours: add --toy")],
)
def test_what_it_cannot_do(arguments, message, tool):
    if torch.version.cuda is None and not arguments:
        message = "was built without CUDA"
    done = tool("gpu.py", *arguments, check=False)
    assert done.returncode == 2 and message in done.stdout.splitlines()[-1]
