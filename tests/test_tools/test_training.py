"""The tools as a user runs them: train, stop, resume, test, report."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import BENT_CONV

pytestmark = pytest.mark.slow

CBN2 = "faster-rcnn_r18_fpn_cbn-all_1xb2_digits"
SHORT = (
    "train_cfg = dict(max_epochs=3)\n"
    "custom_hooks = [dict(type='CBNHook', burn_in=1), dict(type='DiagnoseHook', interval=2)]"
)


def scalars(work_dir):
    """All that the runs in a work dir logged, in order."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, small_config, root):
    """A training killed after its first checkpoint: its work dir and its config."""
    folder = tmp_path_factory.mktemp("stopped")
    config, work_dir = small_config(folder, CBN2, SHORT), folder / "work"
    process = subprocess.Popen(
        [sys.executable, "tools/train.py", str(config), "--work-dir", str(work_dir)],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not (work_dir / "last_checkpoint").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return work_dir, config


@pytest.fixture(scope="module")
def trained(stopped, tool):
    """The same training, resumed and finished."""
    work_dir, config = stopped
    # The window opens after the burn-in of one epoch, which lies before the resume.
    done = tool("train.py", config, "--work-dir", work_dir, "--resume")
    return work_dir, config, done.stdout


def test_resume_goes_on_from_the_last_checkpoint(trained):
    work_dir, _, output = trained
    assert re.search(r"resumed epoch: [12], iter: (6|12)\b", output)
    assert (work_dir / "epoch_3.pth").exists()
    rows = [row for row in scalars(work_dir) if "cbn/window_size" in row]
    sizes = {row["step"]: row["cbn/window_size"] for row in rows}
    assert list(sizes) == list(range(1, 19))
    assert {sizes[step] for step in range(1, 7)} == {1}
    # The windows set their own sizes, starting from the surprise of a first iteration.
    assert len({sizes[step] for step in range(9, 19)}) > 1
    assert "other settings" not in output and "start empty" not in output
    assert re.search(r"coco/bbox_mAP: \d\.\d{4}|results of the whole dataset is empty", output)


def test_resume_with_other_settings_is_told(trained, tool, tmp_path):
    """The weights' names fit any window size, so the tool must tell; the windows start empty."""
    work_dir, config, _ = trained
    changes = "train_cfg.max_epochs=4", "model.neck.norm_cfg.window_size=4"
    done = tool(
        *("train.py", config, "--work-dir", tmp_path, "--resume", work_dir / "epoch_3.pth"),
        *("--cfg-options", *changes),
    )
    told = re.search(
        r"--resume: the checkpoint is of a training with other settings: (.+)\.", done.stdout
    )
    assert told[1].startswith(
        "model.neck.norm_cfg.window_size was not set, is 4; train_cfg.max_epochs was 3, is 4. "
    )
    assert re.search(
        r"CBNHook: the windows start empty, and fill anew: .* CBN layer 'neck\.\S+' has a "
        "MovingWindow of 4 in force, the state a MovingWindow of its own size up to 8",
        done.stdout,
    )


def test_checkpoint_is_a_batch_norm_checkpoint(trained, root):
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    work_dir, *_ = trained
    init_default_scope("mmdet")
    name = "faster-rcnn_r18_fpn_bn-all_1xb2_digits.py"
    cfg = Config.fromfile(root / "studies/digits/configs" / name)
    state = torch.load(work_dir / "epoch_3.pth", weights_only=False)["state_dict"]
    MODELS.build(cfg.model).load_state_dict(state, strict=True)


def test_test(trained, tool, tmp_path):
    work_dir, config, _ = trained
    out, show = tmp_path / "results.pkl", tmp_path / "show"
    tool(
        *("test.py", config, work_dir / "epoch_3.pth", "--work-dir", tmp_path / "work"),
        *("--out", out, "--show-dir", show),
    )
    results = pickle.loads(out.read_bytes())
    assert len(results) == 4 and {"img_id", "pred_instances"} <= set(results[0])
    assert len(list(show.rglob("*.png"))) == 4


def test_precise_statistics_of_averaged_weights(trained, small_config, tool, tmp_path):
    """EMAHook puts its weights into the model only when the test begins."""
    work_dir, *_ = trained
    config = small_config(tmp_path, CBN2, "custom_hooks = [dict(type='EMAHook', momentum=0.5)]")
    done = tool(
        *("test.py", config, work_dir / "epoch_3.pth", "--work-dir", tmp_path / "work"),
        *("--precise-stats", 4),
    )
    estimated = done.stdout.index("PreciseStatsHook: statistics of 32 layers from 4 images")
    assert estimated < done.stdout.index("Epoch(test)")


def test_report(trained, tool):
    work_dir, *_ = trained
    output = tool("report.py", work_dir).stdout
    assert "COCO evaluation of epoch 3" in output
    assert re.search(r"coco/bbox_mAP: +\d\.\d{3}", output)
    for name in ("log", "checkpoint", "loss and AP", "window", "detections"):
        (path,) = re.findall(rf"^{name}: +(.+)$", output, re.MULTILINE)
        assert os.path.getsize(path) > 1000
    for name in ("curves.png", "window.png", "detections.png"):
        assert (work_dir / name).read_bytes().startswith(b"\x89PNG")


def test_resume_with_nothing_there(small_config, tmp_path, tool):
    config = small_config(tmp_path, "faster-rcnn_r18_fpn_bn-all_1xb2_digits")
    done = tool(
        *("train.py", config, "--work-dir", tmp_path / "work", "--resume"),
        *("--cfg-options", "train_cfg.max_epochs=1"),
    )
    assert "nothing to resume from" in done.stdout
    assert "CBNHook" not in done.stdout.split("Hooks will be executed")[1]


def test_mask_rcnn_and_the_default_hook(small_config, tmp_path, tool):
    """A config that forgets the hook gets the default one, and is told so."""
    config = small_config(
        tmp_path,
        "mask-rcnn_r18_fpn_cbn-all_1xb2_digits",
        "custom_hooks = []\ntrain_cfg = dict(max_epochs=4)",
    )
    work_dir = tmp_path / "work"
    done = tool("train.py", config, "--work-dir", work_dir)
    assert "has no CBNHook: registered the default one" in done.stdout
    assert "custom_hooks = [dict(type='CBNHook', burn_in=3)]" in done.stdout
    rows = [row for row in scalars(work_dir) if "loss" in row]
    assert [row["step"] for row in rows if row["cbn/window_size"] == 1][:18] == list(range(1, 19))
    assert rows[-1]["step"] == 24 and rows[-1]["cbn/window_size"] != 1


def test_the_default_hook_of_a_run_in_iterations(small_config, tmp_path, tool):
    loop = "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8, val_interval=8)"
    config = small_config(tmp_path, CBN2, f"custom_hooks = []\n{loop}")
    parts = "backbone", "neck", "roi_head.bbox_head"
    sizes = [f"model.{part}.norm_cfg.window_size=5" for part in parts]
    done = tool("train.py", config, "--work-dir", tmp_path / "work", "--cfg-options", *sizes)
    assert "custom_hooks = [dict(type='CBNHook', burn_in=2, by_epoch=False)]" in done.stdout
    rows = [row["cbn/window_size"] for row in scalars(tmp_path / "work") if "loss" in row]
    assert rows == [1] * 2 + [5] * 6


@pytest.mark.parametrize(
    "args, message",
    [
        (("train.py", "configs/none.py"), "the config file configs/none.py does not exist"),
        (("test.py", "CONFIG", "none.pth"), "the checkpoint none.pth does not exist"),
        (("test.py", "CONFIG", "none.pth", "--precise-stats", "0"), "of at least 1, got 0"),
        (("test.py", "CONFIG", "TINY", "--out", "a.json"), "must end with .pkl or .pickle"),
        (("train.py", "CONFIG", "--amp"), "--amp needs a GPU"),
        (
            ("train.py", "CONFIG", "--cfg-options", "model.neck.norm_cfg.compensate=no"),
            "compensate must be True or False or 'where_possible', got 'no'",
        ),
        (
            ("train.py", "CONFIG", "--cfg-options", "model.backbone.norm_cfg.windowsize=4"),
            "'windowsize'; did you mean window_size?",
        ),
        (
            ("train.py", "CONFIG", "--cfg-options", "custom_hooks.0.type=CBNHok"),
            "custom_hooks[0].type: no hook is called CBNHok; did you mean CBNHook?",
        ),
        (
            ("train.py", "CONFIG", "--cfg-options", "custom_hooks=[dict(type='CBNHook')]"),
            "dict(...) can only be written in a config",
        ),
        (
            ("train.py", "CONFIG", "--cfg-options", "custom_hooks=[]", "train_cfg.max_epochs=2"),
            "burn_in=3 epochs is not shorter than the run of 2 epochs, so the window would never",
        ),
        (("report.py", "none"), "there is no work dir none: train first"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line(args, message, small_config, tmp_path, tool):
    config = small_config(tmp_path, CBN2)
    torch.save(dict(state_dict={}), tmp_path / "tiny.pth")
    named = {"CONFIG": config, "TINY": tmp_path / "tiny.pth"}
    args = [named.get(arg, arg) for arg in args]
    if args[0] == "train.py":
        args[2:2] = ["--work-dir", tmp_path / "work"]
    done = tool(*args, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert message in done.stdout.splitlines()[-1]


def test_a_refusal_ends_with_its_line(small_config, tmp_path, tool):
    """The layer refuses in the first iteration, because it cannot follow what feeds it."""
    bent = f'{BENT_CONV}\nmodel = dict(backbone=dict(conv_cfg=dict(type="Bent")))\n'
    config = small_config(tmp_path, CBN2, bent)
    done = tool("train.py", config, "--work-dir", tmp_path / "work", check=False)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    for part in ("'backbone.bn1' (CBN)", "no module with a weight", "compensate=False"):
        assert part in last
