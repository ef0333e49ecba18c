"""The table of several runs."""

import json

import pytest

pytestmark = pytest.mark.slow


def write_run(folder, *records):
    (folder / "20260101_000000" / "vis_data").mkdir(parents=True)
    path = folder / "20260101_000000" / "vis_data" / "scalars.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


STEP = dict(loss=1.0, step=1, epoch=1)


def test_seeds_are_one_row(tmp_path, tool):
    for name, values in {"a_seed0": [0.1, 0.3], "a_seed1": [0.2, 0.5], "b": [0.25]}.items():
        evaluations = [
            {"coco/bbox_mAP": value, "coco/bbox_mAP_50": 2 * value, "step": epoch}
            for epoch, value in enumerate(values, 1)
        ]
        write_run(tmp_path / name, STEP, *evaluations)
    table = tool("tables.py", *sorted(tmp_path.iterdir())).stdout.splitlines()
    assert table[-4:] == [
        "| run | coco/bbox_mAP | coco/bbox_mAP_50 | trained for |",
        "|---|---|---|---|",
        "| a | **0.400** (0.300, 0.500) | **0.800** (0.600, 1.000) | 2 epochs |",
        "| b | 0.250 | 0.500 | 1 epochs |",
    ]


def test_a_seed_that_failed_counts(tmp_path, tool):
    """A detector that detects nothing has an AP of 0; a run without an evaluation has none."""
    write_run(tmp_path / "a_seed0", STEP, {"coco/bbox_mAP": 0.4, "step": 1})
    write_run(tmp_path / "a_seed1", STEP, {"coco/bbox_mAP": 0.4, "step": 1}, {"time": 1, "step": 2})
    write_run(tmp_path / "b_seed0", STEP, {"coco/bbox_mAP": 0.4, "step": 1})
    write_run(tmp_path / "b_seed1", STEP)
    table = tool("tables.py", *sorted(tmp_path.iterdir())).stdout
    assert "| a | **0.200** (0.400, 0.000) | 1 epochs, 2 epochs |" in table
    assert "| b | 0.400, – | 1 epochs |" in table


def test_the_same_run_twice(tmp_path, tool):
    for parent in "xy":
        write_run(tmp_path / parent / "a", STEP, {"coco/bbox_mAP": 0.4, "step": 1})
    done = tool("tables.py", tmp_path / "x/a", tmp_path / "y/a", check=False)
    assert done.returncode == 2
    assert "another work dir is run a, seed 0, as well" in done.stdout
