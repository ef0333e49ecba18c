"""What is read back from a work dir."""

import json

import pytest
import torch

from cbn_mmdet.launch import UsageError
from cbn_mmdet.runs import find_checkpoint, find_last_run, read_scalars


def write_run(work_dir, name, records):
    folder = work_dir / name / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("".join(json.dumps(record) + "\n" for record in records))


def steps(first, last, epoch):
    return [dict(loss=1.0, step=step, epoch=epoch) for step in range(first, last + 1)]


def evaluation(epoch, value):
    return {"coco/bbox_mAP": value, "step": epoch}


def test_a_resumed_run_goes_on_and_a_new_one_replaces(tmp_path):
    write_run(
        tmp_path, "1", [*steps(1, 3, 1), evaluation(1, 0.1), *steps(4, 6, 2), evaluation(2, 0.2)]
    )
    write_run(tmp_path, "2", [*steps(4, 6, 2), evaluation(2, 0.3)])
    training, evaluations = read_scalars(str(tmp_path))
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    assert [record["coco/bbox_mAP"] for record in evaluations] == [0.1, 0.3]
    write_run(tmp_path, "3", steps(1, 2, 1))
    training, evaluations = read_scalars(str(tmp_path))
    assert len(training) == 2 and evaluations == []


def test_iterations_instead_of_epochs(tmp_path):
    write_run(tmp_path, "1", [dict(loss=1.0, step=5), evaluation(5, 0.1), dict(loss=1.0, step=10)])
    write_run(tmp_path, "2", [dict(loss=1.0, step=6), evaluation(10, 0.2)])
    _, evaluations = read_scalars(str(tmp_path))
    assert [record["step"] for record in evaluations] == [5, 10]


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match="there is no work dir"):
        find_last_run(str(tmp_path / "none"))
    for read in (find_last_run, read_scalars, find_checkpoint):
        with pytest.raises(UsageError, match="holds no"):
            read(str(tmp_path))
    write_run(tmp_path, "1", [])
    assert find_last_run(str(tmp_path)) == str(tmp_path / "1")


def test_checkpoint_of_a_moved_work_dir(tmp_path):
    torch.save({}, tmp_path / "epoch_1.pth")
    (tmp_path / "last_checkpoint").write_text("elsewhere/epoch_1.pth")
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "epoch_1.pth")
