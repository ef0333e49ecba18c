"""The launch scripts, and what two processes that train together must hold to."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
import torch

CBN1 = "faster-rcnn_r18_fpn_cbn-all_1xb1_digits"
MASK = "mask-rcnn_r18_fpn_cbn-all_1xb2_digits"

# 12 images on 2 ranks: 18 iterations, the first 6 of them the burn-in. Nothing is averaged in the
# log, and no epoch is evaluated.
SHORT = """
custom_imports = dict(imports=["cbn_mmdet", "distributed_hooks"], allow_failed_imports=False)
custom_hooks = [
    dict(type="CBNHook", burn_in=1),
    dict(type="SaveStates"),
    dict(type="SeedIterations"),
    dict(type="KillRank1"),
]
log_processor = dict(window_size=1)
train_cfg = dict(max_epochs=3, val_begin=4)
"""

# FCOS samples no regions and normalises its losses by the objects of all ranks. So the gradient of
# a step is that of the union of the ranks' batches, if the norm's statistics are the union's. With
# so large a rate the weights after the step are the gradient, with no digit lost to rounding.
ONE_STEP = """
norm = dict(type="SyncCBN", window_size=1)
model = dict(
    _delete_=True,
    type="FCOS",
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(_base_.model.backbone, norm_cfg=norm),
    neck=dict(_base_.model.neck, start_level=1, num_outs=3, norm_cfg=norm),
    bbox_head=dict(
        type="FCOSHead",
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        strides=[8, 16, 32],
        regress_ranges=((-1, 32), (32, 64), (64, 1e8)),
        norm_cfg=norm,
    ),
)
train_dataloader["sampler"] = dict(shuffle=False)
train_dataloader["dataset"]["indices"] = 4
custom_hooks = [dict(type="CBNHook", burn_in=0)]
train_cfg = dict(max_epochs=1, val_begin=2)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=1e6))
param_scheduler = None
auto_scale_lr = dict(enable=False)
"""


# What the scripts read from the environment.
SETTINGS = {"NNODES", "NODE_RANK", "MASTER_ADDR", "PORT", "GPUS", "GPUS_PER_NODE", "CPUS_PER_TASK"}


def start(root, script, *args, cwd, **environment):
    """Starts one of the scripts as a user without a GPU does, from the user's own folder."""
    inherited = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    ours = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root / "tests")}
    return subprocess.Popen(
        [str(arg) for arg in (root / "tools" / script, *args)],
        cwd=cwd,
        env={**inherited, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, status=0, limit=300):
    """Waits for a script, within limits, and returns what it printed."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        output, _ = process.communicate()
        pytest.fail(f"still running after {limit} s:\n{output[-5000:]}")
    assert process.returncode == status, output[-5000:]
    return output


def launch(root, script, *args, status=0, limit=300, **kwargs):
    """Runs one of the scripts to its end."""
    return finish(start(root, script, *args, **kwargs), status, limit)


def on_two_ranks(tool, root, *args, cwd, limit=300, name="train.py"):
    """Runs a tool in two processes as torchrun would start them, without waiting for imports."""
    torchrun = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    torchrun.update(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(root / "tests"))

    def start(rank):
        env = {**os.environ, **torchrun, "RANK": rank, "LOCAL_RANK": rank}
        return tool(name, *args, "--launcher", "pytorch", cwd=cwd, env=env, limit=limit)

    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(start, rank) for rank in "01"]
        for rank in as_completed(ranks):
            rank.result()  # raises for the rank that failed first, not for one that waited for it
        return "".join(rank.result().stdout for rank in ranks)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def norm(kind, *parts):
    """The options that give parts of a config's model another norm."""
    return [f"model.{part}.norm_cfg.type={kind}" for part in parts]


def steps(work_dir):
    """What was logged of each iteration, by its number; of repeated iterations, the last time."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {row["step"]: row for row in rows if "loss" in row}


def losses(row):
    return {key: value for key, value in row.items() if "loss" in key}


def load(path):
    state = torch.load(path, weights_only=False)
    return state.get("state_dict", state)


def assert_same_on_both_ranks(work_dir):
    """Weights and running statistics of the ranks are equal to the last bit after all steps."""
    first, second = (load(work_dir / f"state_rank{rank}.pth") for rank in (0, 1))
    batches = {name for name in first if name.endswith("num_batches_tracked")}
    assert {int(first[name]) for name in batches} == {max(steps(work_dir))}
    # A head without regions counts no batch, so the counts may differ between ranks.
    differing = [n for n in first if n not in batches and not torch.equal(first[n], second[n])]
    assert not differing
    assert all(value.isfinite().all() for value in first.values())


# Tests that need no training.


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("dist_train.sh", (), "usage: {} CONFIG GPUS ["),
        ("dist_train.sh", ("a.py",), "usage: {} CONFIG GPUS ["),
        ("dist_train.sh", ("a.py", "two"), "GPUS must be a whole number of at least 1, got 'two'"),
        ("dist_train.sh", ("a.py", "0"), "GPUS must be a whole number of at least 1, got '0'"),
        ("dist_test.sh", ("a.py", "2"), "usage: {} CONFIG CHECKPOINT GPUS ["),
        ("dist_test.sh", ("a.py", "2", "a.pth"), "GPUS must be a whole number"),
        ("slurm_train.sh", ("part", "job", "a.py"), "usage: {} PARTITION JOB_NAME CONFIG WORK_DIR"),
    ],
)
def test_usage(script, args, message, root, tmp_path):
    (line,) = launch(root, script, *args, status=2, cwd=tmp_path).splitlines()
    assert message.format(root / "tools" / script) in line


@pytest.mark.parametrize(
    "script, environment, message",
    [
        ("dist_train.sh", {"NNODES": "2"}, "with NNODES=2, set NODE_RANK (from 0) and MASTER_ADDR"),
        ("dist_train.sh", {"NNODES": "all"}, "NNODES must be a whole number of at least 1"),
        ("slurm_train.sh", {"GPUS": "x"}, "GPUS must be a whole number of at least 1, got 'x'"),
    ],
)
def test_environment(script, environment, message, root, tmp_path):
    args = ("a.py", "2", "c", "d")
    (line,) = launch(root, script, *args, status=2, cwd=tmp_path, **environment).splitlines()
    assert line.startswith(f"{script}: error: ") and message in line


def path_with(folder, name, body):
    """A PATH on which our own shell script comes first."""
    folder.mkdir()
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_python_without_torch(root, tmp_path):
    path = path_with(tmp_path / "bin", "python", "exit 1")
    output = launch(root, "dist_train.sh", "a.py", 2, status=2, cwd=tmp_path, PATH=path)
    assert "error: no python with torch on the PATH: activate its environment first" in output


@pytest.mark.slow
def test_slurm(root, small_config, tmp_path):
    """The arguments that srun gets; the fake srun then runs the command here, once."""
    srun = path_with(
        tmp_path / "bin",
        "srun",
        'printf "<%s> " "$MASTER_PORT" "$@"; echo\n'
        'while [[ $1 != python ]]; do shift; done; exec "$@"',
    )
    config = small_config(tmp_path, CBN1).name
    output = launch(
        *(root, "slurm_train.sh", "part", "a job", config, "work dir", "--resume"),
        **dict(status=2, cwd=tmp_path, PATH=srun, GPUS="4", PORT="29511"),
        SRUN_ARGS="--time 10 --exclusive",
    )
    command, *_, last = output.splitlines()
    assert command.strip() == " ".join(
        f"<{part}>"
        for part in (
            *("29511", "--partition", "part", "--job-name", "a job", "--gres", "gpu:4"),
            *("--ntasks", "4", "--ntasks-per-node", "4", "--cpus-per-task", "5"),
            *("--kill-on-bad-exit=1", "--time", "10", "--exclusive", "python", "-u"),
            *(root / "tools" / "train.py", config, "--work-dir", "work dir"),
            *("--launcher", "slurm", "--resume"),
        )
    )
    # The tool found config and data, and stopped where it needs GPUs.
    assert last == "train.py: error: --launcher slurm needs GPUs; on CPUs use torchrun and pytorch"


# Trainings of two processes, over gloo.


@pytest.fixture(scope="module")
def uninterrupted(root, small_config, tmp_path_factory):
    """A training of two ranks with CBN: its folder, which holds config.py and work/."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    small_config(folder, CBN1, SHORT).rename(folder / "config.py")
    launch(root, "dist_train.sh", "config.py", 2, "--work-dir", "work", cwd=folder)
    return folder


@pytest.mark.slow
def test_ranks_stay_equal(uninterrupted):
    work_dir = uninterrupted / "work"
    assert_same_on_both_ranks(work_dir)
    windows = [row["cbn/window_size"] for row in steps(work_dir).values()]
    assert windows[:6] == [1] * 6 and len(set(windows[8:])) > 1
    checkpoint, state = load(work_dir / "epoch_3.pth"), load(work_dir / "state_rank1.pth")
    assert all(torch.equal(checkpoint[name], state[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, find_unused", [("CBN", True), ("SyncCBN", False), ("SyncCBN", True)]
)
def test_ranks_stay_equal_in_other_settings(kind, find_unused, root, tool, uninterrupted, tmp_path):
    on_two_ranks(
        *(tool, root, uninterrupted / "config.py", "--work-dir", "work"),
        *("--cfg-options", f"find_unused_parameters={find_unused}", "train_cfg.max_epochs=2"),
        *norm(kind, "backbone", "neck", "roi_head.bbox_head"),
        cwd=tmp_path,
    )
    assert_same_on_both_ranks(tmp_path / "work")


@pytest.mark.slow
def test_sync_gradients_are_those_of_the_union(root, tool, small_config, tmp_path):
    config = small_config(tmp_path, CBN1, ONE_STEP)

    def args(ranks):
        size = f"train_dataloader.batch_size={4 // ranks}"
        return config, "--work-dir", f"work{ranks}", "--cfg-options", size

    on_two_ranks(tool, root, *args(2), cwd=tmp_path)
    tool("train.py", *args(1), cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    two, one = (load(tmp_path / f"work{processes}" / "epoch_1.pth") for processes in (2, 1))
    for name, expected in one.items():
        limit = 1e-4 * expected.abs().max()
        torch.testing.assert_close(two[name], expected, rtol=0, atol=limit, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind, heads", [("CBN", 1), ("SyncCBN", 1), ("SyncCBN", 2)])
def test_rank_without_regions(kind, heads, root, tool, digits, small_config, tmp_path):
    """Rank 1 sees only images without objects: its mask head, or both heads, get no region."""
    annotations = json.loads((digits / "annotations" / "instances_train.json").read_text())
    with_objects = {image["id"] for image in annotations["images"][::2]}
    annotations["annotations"] = [
        each for each in annotations["annotations"] if each["image_id"] in with_objects
    ]
    (tmp_path / "half.json").write_text(json.dumps(annotations))
    config = small_config(tmp_path, MASK, SHORT).name
    options = [
        *("train_dataloader.batch_size=1", "train_dataloader.sampler.shuffle=False"),
        f"train_dataloader.dataset.ann_file={tmp_path}/half.json",
        *("train_dataloader.dataset.filter_cfg.filter_empty_gt=False", "train_cfg.max_epochs=2"),
        *norm(kind, "backbone", "neck", "roi_head.bbox_head", "roi_head.mask_head"),
    ]
    if heads == 2:
        # Nor any background: mmdet then computes no classification loss, and that layer is unused.
        options += ["model.train_cfg.rcnn.sampler.neg_pos_ub=0", "find_unused_parameters=True"]
    on_two_ranks(
        *(tool, root, config, "--work-dir", "work", "--cfg-options", *options),
        cwd=tmp_path,
        limit=180,
    )
    assert_same_on_both_ranks(tmp_path / "work")


@pytest.fixture(scope="module")
def killed(root, uninterrupted, tmp_path_factory):
    """The same training, but rank 1 dies in the last epoch: folder, output, seconds to the end."""
    folder = tmp_path_factory.mktemp("killed")
    config = uninterrupted / "config.py"
    args = config, 2, "--work-dir", "work", "--cfg-options", "custom_hooks.3.after=15"
    output = launch(root, "dist_train.sh", *args, status=1, cwd=folder)
    took = time.time() - (folder / "work" / "killed").stat().st_mtime
    return folder, output, took


@pytest.mark.slow
def test_a_dead_rank_ends_the_job(killed):
    folder, output, took = killed
    assert took < 60
    report = output[output.index("train.py FAILED") :]
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 ", report)
    assert "Signal 9 (SIGKILL) received" in report
    assert not (folder / "work" / "epoch_3.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("save_window", [True, False])
def test_resume(save_window, killed, root, tool, uninterrupted, tmp_path):
    """Both ranks resume with rank 0's windows; or, as the log then says, with empty ones."""
    work_dir = tmp_path / "work"
    shutil.copytree(killed[0] / "work", work_dir)
    if not save_window:
        checkpoint = torch.load(work_dir / "epoch_2.pth", weights_only=False)
        del checkpoint["cbn_windows"]
        torch.save(checkpoint, work_dir / "epoch_2.pth")
    output = on_two_ranks(
        *(tool, root, uninterrupted / "config.py", "--work-dir", "work", "--resume"), cwd=tmp_path
    )
    assert "resumed epoch: 2, iter: 12" in output
    assert ("CBNHook: the windows start empty" in output) != save_window
    assert_same_on_both_ranks(work_dir)
    resumed, expected = steps(work_dir), steps(uninterrupted / "work")
    assert len(resumed) == len(expected) == 18
    for step in range(1, 13):  # up to the checkpoint, from which both go on
        assert losses(resumed[step]) == losses(expected[step])
    # Rank 0, which logs, has its own windows back. Rank 1 has rank 0's instead of its own, which
    # shows in the losses after the next update of the weights.
    assert (losses(resumed[13]) == losses(expected[13])) == save_window
    assert losses(resumed[14]) != losses(expected[14])


@pytest.mark.slow
def test_test_on_two_ranks_and_on_two_nodes(root, tool, uninterrupted, tmp_path):
    """Three images on two ranks: the sampler repeats one as padding, but it counts once."""
    config, checkpoint = uninterrupted / "config.py", uninterrupted / "work" / "epoch_3.pth"

    def args(name):
        return (
            *("--work-dir", tmp_path / name, "--out", tmp_path / f"{name}.pkl", "--cfg-options"),
            *("test_dataloader.dataset.indices=3", "test_dataloader.batch_size=1"),
            # After so little training it only finds something if low scores and overlaps count.
            *("model.test_cfg.rcnn.score_thr=0.0", "model.test_cfg.rcnn.max_per_img=1000"),
            "model.test_cfg.rcnn.nms.iou_threshold=0.9",
        )

    tool(
        *("test.py", config, checkpoint, *args("one")),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root / "tests")},
    )
    launch(root, "dist_test.sh", config, checkpoint, 2, *args("ranks"), cwd=tmp_path)
    port = str(free_port())
    nodes = [
        start(
            *(root, "dist_test.sh", config, checkpoint, 1, *args("nodes")),
            **dict(cwd=tmp_path, NNODES="2", NODE_RANK=rank, MASTER_ADDR="127.0.0.1", PORT=port),
        )
        for rank in "01"
    ]
    for node in nodes:
        finish(node)

    aps, detections = {}, {}
    for name in ("one", "ranks", "nodes"):
        (result,) = (tmp_path / name).glob("*/*.json")
        aps[name] = {
            key: value for key, value in json.loads(result.read_text()).items() if "coco/" in key
        }
        detections[name] = pickle.loads((tmp_path / f"{name}.pkl").read_bytes())
    assert aps["one"]["coco/bbox_mAP_50"] > 0
    assert aps["ranks"] == aps["nodes"] == aps["one"]
    for name in ("ranks", "nodes"):
        assert len(detections[name]) == 3
        for found, expected in zip(detections[name], detections["one"], strict=True):
            assert found["img_id"] == expected["img_id"]
            for key, value in expected["pred_instances"].items():
                torch.testing.assert_close(found["pred_instances"][key], value)
