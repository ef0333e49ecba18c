"""The tables of several runs, beside what was published."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from statistics import mean

import pytest

pytestmark = pytest.mark.slow

MASK = "mask-rcnn_r18_fpn_cbn-all_1xb2_digits"
BOX = "faster-rcnn_r18_fpn_bn-all_1xb2_digits"
COCO = "mask-rcnn_r50_fpn_4xb4-1x_coco"
# Without a threshold even a barely trained detector detects something, and has an AP.
SCORE = "model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))"
SMALL_COCO = """
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(160, 96), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
model = dict(
    backbone=dict(init_cfg=None),
    train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0, max_per_img=20)),
)
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=-1))
"""
STEP = dict(loss=1.0, step=1, epoch=1)


def logged(work_dir):
    """All that the runs in a work dir logged, in order."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def write_run(folder, *records):
    (folder / "20260101_000000" / "vis_data").mkdir(parents=True)
    path = folder / "20260101_000000" / "vis_data" / "scalars.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_tables(markdown):
    """The cells of each table, by title, row and column."""
    tables = {}
    for block in markdown.split("## ")[1:]:
        lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line[:1] == "|"]
        names, _, *rows = [[text.strip() for text in line] for line in lines]
        cells = [dict(zip(names, row, strict=True)) for row in rows]
        tables[block.splitlines()[0]] = {row.pop("config"): row for row in cells}
    return tables


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_config, tool):
    """A Mask R-CNN that trained for its two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_config(folder, MASK, f"{SCORE}\ntrain_cfg = dict(max_epochs=2)")
    tool("train.py", config, "--work-dir", folder / "any_name")
    return folder / "any_name", config


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, small_config, root):
    """A Faster R-CNN whose training was killed in its third epoch of 100, or soon after."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = small_config(folder, BOX, f"{SCORE}\ntrain_cfg = dict(max_epochs=100)")
    process = subprocess.Popen(
        [sys.executable, "tools/train.py", str(config), "--work-dir", str(folder / "work")],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not any(each.get("epoch") == 3 for each in logged(folder / "work")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return folder / "work"


def test_runs_of_no_metafile(finished, interrupted, tool, tmp_path):
    work_dir, _ = finished
    done = tool("tables.py", work_dir, interrupted, "--plot", tmp_path / "ap.png")
    table = read_tables(done.stdout)["Measured"]
    assert list(table) == [f"{MASK}_small", f"{BOX}_small"]

    (last,) = [each for each in logged(work_dir) if "loss" not in each and each["step"] == 2]
    row = table[f"{MASK}_small"]
    assert row["box AP"] == f"{last['coco/bbox_mAP']:.3f}"
    assert row["mask AP75"] == f"{last['coco/segm_mAP_75']:.3f}"
    assert row["trained for"] == "2 epochs"

    records = logged(interrupted)
    step = [each for each in records if "loss" in each][-1]
    last = [each for each in records if "loss" not in each][-1]
    row = table[f"{BOX}_small"]
    assert row["box AP"] == f"*{last['coco/bbox_mAP']:.3f}*" and row["mask AP"] == "–"
    assert row["trained for"] == (
        f"epoch {step['epoch']} of 100, last logged iteration {step['step']}, "
        f"AP of epoch {last['step']}"
    )
    times = sorted(each["time"] for each in records if "loss" in each)
    assert float(row["s/iteration"]) == pytest.approx(times[len(times) // 2], rel=0.5)
    assert "In italics: runs that did not finish" in done.stdout
    assert (tmp_path / "ap.png").read_bytes().startswith(b"\x89PNG")


def test_beside_published(finished, interrupted, tool, tmp_path):
    """Runs stand beside the metafile's figures, in points; rows without a run stay empty."""
    (tmp_path / "configs" / "any").mkdir(parents=True)
    (tmp_path / "configs" / "any" / "metafile.yml").write_text(
        "Models:\n"
        "  - {Config: any/mask-rcnn_r18_fpn_gn_1xb2_digits.py, Published: {box AP: 38.5}}\n"
        f"  - Config: any/{MASK}_small.py\n"
        "    Published: {box AP: 38.4, mask AP: 34.7, Source: the paper}\n"
        "  - {Config: any/mask-rcnn_r18_fpn_bn_4xb4-1x_coco.py}\n"
        "  - {Config: any/mask-rcnn_r18_fpn_bn_8xb2-1x_coco.py}\n"
        "  - {Config: any/mask-rcnn_r50_fpn_gn_1xb2_digits.py, Published: {box AP: 40}}\n"
    )
    work_dir, _ = finished
    arguments = (work_dir, interrupted, "--configs", tmp_path / "configs")
    markdown = tool("tables.py", *arguments).stdout
    tables = read_tables(markdown)
    assert list(tables) == ["Measured", "Mask R-CNN R-18-FPN"]
    assert list(tables["Measured"]) == [f"{BOX}_small"]
    table = tables["Mask R-CNN R-18-FPN"]
    ap = [100 * each["coco/bbox_mAP"] for each in logged(work_dir) if "loss" not in each][-1]
    assert [row["box AP"] for row in table.values()] == [
        "– / 38.5",
        f"{ap:.1f} / 38.4 ({ap - 38.4:+.1f})",
        "–",  # a row of the paper's table; the one at another batch is left out
    ]
    assert table[f"{MASK}_small"]["box AP50"].endswith(" / –")
    assert "Published: the paper" in markdown

    document = json.loads(tool("tables.py", *arguments, "--json", "--all").stdout)
    assert [each["title"] for each in document["tables"]] == [
        *tables,
        "Mask R-CNN R-50-FPN",
    ]
    rows = document["tables"][1]["rows"]
    assert [len(row["runs"]) for row in rows] == [0, 1, 0, 0]
    assert {tuple(row) for each in document["tables"] for row in each["rows"]} == {tuple(rows[0])}
    assert rows[1]["measured"]["box AP"] == pytest.approx(ap)
    assert rows[1]["difference"]["box AP"] == pytest.approx(ap - 38.4)
    assert rows[1]["difference"]["box AP50"] is None
    (run,) = rows[1]["runs"]
    assert run["finished"] and (run["evaluated"], run["total"], run["iteration"]) == (2, 2, 12)


@pytest.fixture(scope="module")
def small_coco(tmp_path_factory, coco, root, tool):
    """An epoch of a COCO config on a handful of small images."""
    folder = tmp_path_factory.mktemp("coco")
    config = folder / f"{COCO}.py"
    config.write_text(
        f'_base_ = "{root}/configs/mask_rcnn/{COCO}.py"\ndata_root = "{coco}/"\n{SMALL_COCO}'
    )
    tool("train.py", config, "--work-dir", folder / "work")
    return folder / "work"


def test_coco(small_coco, root, tool):
    """Every config is in its table, and every published figure in its row."""
    tables = read_tables(tool("tables.py", small_coco, "--all").stdout)
    assert {name for table in tables.values() for name in table} == {
        path.stem for path in root.glob("configs/*_rcnn/*.py")
    }
    (last,) = [each for each in logged(small_coco) if "loss" not in each]
    row = tables["Mask R-CNN R-50-FPN"][COCO]
    for metric, key, published in (
        ("box AP", "coco/bbox_mAP", 37.6),
        ("mask AP75", "coco/segm_mAP_75", 36.2),
    ):
        ap = 100 * last[key]
        assert row[metric] == f"{ap:.1f} / {published}"  # not compared: other settings
    changed = row["other than the config's"].split(", ")
    assert {"train_cfg", "train_dataloader.dataset.pipeline"} <= set(changed)
    assert "optim_wrapper" not in changed
    assert row["trained for"] == "1 epoch"
    row = tables["Mask R-CNN R-50-FPN"]["mask-rcnn_r50_fpn_cbn_4xb4-1x_coco"]
    assert (row["box AP"], row["mask AP"]) == ("– / 38.4", "– / 34.7")
    row = tables["Faster R-CNN R-50-FPN"]["faster-rcnn_r50_fpn_bn_4xb4-1x_coco"]
    assert set(row.values()) == {"–"}


def test_a_test_fills_in_for_a_missing_evaluation(finished, tool, tmp_path):
    """A run that was killed in its last evaluation can be tested instead of trained again."""
    work_dir, config = finished
    killed = tmp_path / "killed"
    shutil.copytree(work_dir, killed)
    (path,) = killed.glob("*/vis_data/scalars.json")
    *lines, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + last[:20])
    row = read_tables(tool("tables.py", killed).stdout)["Measured"][f"{MASK}_small"]
    assert row["trained for"] == "epoch 2 of 2, last logged iteration 12, AP of epoch 1"
    tool("test.py", config, killed / "epoch_2.pth", "--work-dir", killed)
    row = read_tables(tool("tables.py", killed).stdout)["Measured"][f"{MASK}_small"]
    assert row["trained for"] == "2 epochs"
    assert row["box AP"] == f"{json.loads(last)['coco/bbox_mAP']:.3f}"


def test_one_row_per_config_and_settings(finished, tool, tmp_path):
    work_dir, config = finished
    for number in (2, 1):
        shutil.copytree(work_dir, tmp_path / f"mine_seed{number}")
    (path,) = tmp_path.glob("mine_seed2/*/vis_data/scalars.json")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], '{"coco/bbox_mAP": 0.9, "step": 2}']) + "\n")
    # A run that stopped at the first logged step, with another learning rate.
    shutil.copytree(work_dir, tmp_path / "other")
    for dumped in (tmp_path / "other").rglob("*.py"):
        dumped.write_text(re.sub(r"\blr=0[.]\d+", "lr=0.5", dumped.read_text()))
    (path,) = tmp_path.glob("other/*/vis_data/scalars.json")
    path.write_text(lines[0] + "\n")
    table = read_tables(tool("tables.py", *sorted(tmp_path.iterdir())).stdout)["Measured"]
    first = json.loads(lines[-1])["coco/bbox_mAP"]
    row = table[f"{MASK}_small (mine_seed1, mine_seed2)"]
    assert row["box AP"] == f"**{mean([100 * first, 90]) / 100:.3f}** ({first:.3f}, 0.900)"
    assert row["trained for"] == "2 epochs"
    row = table[f"{MASK}_small (other)"]
    assert row["box AP"] == "–"
    assert row["trained for"] == "epoch 1 of 2, last logged iteration 1, never evaluated"


def test_memory_and_what_is_not_there(tool, tmp_path):
    """Memory, which only a GPU logs; runs that logged nothing; a -1 for no such objects."""
    steps = [
        {**STEP, "time": 0.5, "memory": 3000},
        {**STEP, "step": 2, "time": 0.25, "memory": 5000},
        {**STEP, "step": 3, "time": 0.25, "memory": 4000},
    ]
    write_run(tmp_path / "gpu", *steps, {"coco/bbox_mAP": 0.5, "coco/segm_mAP": -1, "step": 1})
    write_run(tmp_path / "crashed")
    (tmp_path / "empty").mkdir()
    done = tool("tables.py", *sorted(tmp_path.iterdir()))
    assert read_tables(done.stdout)["Measured"] == {
        "crashed": {
            "box AP": "–",
            "trained for": "nothing logged",
            "s/iteration": "–",
            "memory (MiB)": "–",
        },
        "empty": {
            "box AP": "–",
            "trained for": "no training run",
            "s/iteration": "–",
            "memory (MiB)": "–",
        },
        "gpu": {
            "box AP": "0.500",
            "trained for": "1 epoch",
            "s/iteration": "0.250",
            "memory (MiB)": "5000",
        },
    }


def test_a_seed_that_failed_counts(tmp_path, tool):
    """A detector that detects nothing has an AP of 0; a run without an evaluation has none."""
    write_run(tmp_path / "a_seed0", STEP, {"coco/bbox_mAP": 0.4, "step": 1})
    write_run(tmp_path / "a_seed1", STEP, {"coco/bbox_mAP": 0.4, "step": 1}, {"time": 1, "step": 2})
    write_run(tmp_path / "b_seed0", STEP, {"coco/bbox_mAP": 0.4, "step": 1})
    write_run(tmp_path / "b_seed1", STEP)
    table = read_tables(tool("tables.py", *sorted(tmp_path.iterdir())).stdout)["Measured"]
    assert table["a"]["box AP"] == "**0.200** (0.400, 0.000)"
    assert table["a"]["trained for"] == "1 epoch; 2 epochs"
    assert table["b"]["box AP"] == "0.400, –"
    assert table["b"]["trained for"] == (
        "1 epoch; epoch 1, last logged iteration 1, never evaluated"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("a", "./a"), "a is given twice: name each work dir once"),
        (("c",), "there is no work dir"),
        (("b", "--plot", "ap.png"), "none of the runs has a COCO evaluation yet"),
        (("a", "--plot", "nowhere/ap.png"), "--plot nowhere/ap.png: "),
        (("a", "iterations", "--plot", "ap.png"), "a counts epochs and iterations iterations"),
        (("a", "--configs", "configs"), "needs Models, each with Config"),
        (("a", "--configs", "typo"), "Published: box ap; known are box AP, "),
        (["a", "--configs", "b"], "--configs b: there is no */metafile.yml in it"),
    ],
)
def test_errors_teach(arguments, message, tmp_path, tool):
    write_run(tmp_path / "a", STEP, {"coco/bbox_mAP": 0.4, "step": 1})
    write_run(tmp_path / "b", STEP)
    write_run(tmp_path / "iterations", dict(loss=1.0, step=1), {"coco/bbox_mAP": 0.4, "step": 1})
    for name, text in {
        "configs": "[]",
        "typo": "Models: [{Config: x, Published: {box ap: 1}}]",
    }.items():
        (tmp_path / name / "any").mkdir(parents=True)
        (tmp_path / name / "any" / "metafile.yml").write_text(text)
    done = tool("tables.py", *arguments, check=False, cwd=tmp_path, apart=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tables.py: error: ") and message in line
