"""What is read back from a work dir."""

import json

import pytest
from common.errors import UsageError
from common.runs import read_run


def write_run(work_dir, name, records):
    folder = work_dir / name / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("".join(json.dumps(record) + "\n" for record in records))


def steps(first, last, epoch):
    return [dict(loss=1.0, step=step, epoch=epoch) for step in range(first, last + 1)]


def logged(work_dir):
    run = read_run(str(work_dir))
    return run.training, run.evaluations


def evaluation(epoch, value):
    return {"coco/bbox_mAP": value, "step": epoch}


def test_a_resumed_run_goes_on_and_a_new_one_replaces(tmp_path):
    write_run(
        tmp_path, "1", [*steps(1, 3, 1), evaluation(1, 0.1), *steps(4, 6, 2), evaluation(2, 0.2)]
    )
    write_run(tmp_path, "2", [*steps(4, 6, 2), evaluation(2, 0.3)])
    training, evaluations = logged(tmp_path)
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    assert [record["coco/bbox_mAP"] for record in evaluations] == [0.1, 0.3]
    write_run(tmp_path, "3", steps(1, 2, 1))
    training, evaluations = logged(tmp_path)
    assert len(training) == 2 and evaluations == []


def test_iterations_instead_of_epochs(tmp_path):
    write_run(tmp_path, "1", [dict(loss=1.0, step=5), evaluation(5, 0.1), dict(loss=1.0, step=10)])
    write_run(tmp_path, "2", [dict(loss=1.0, step=6), evaluation(10, 0.2)])
    _, evaluations = logged(tmp_path)
    assert [record["step"] for record in evaluations] == [5, 10]


def write_config(path, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))


def test_run_of_an_empty_folder(tmp_path):
    run = read_run(str(tmp_path))
    assert (run.folder, run.config, run.total, run.finished) == (None, None, None, False)
    with pytest.raises(UsageError, match="there is no work dir"):
        read_run(str(tmp_path / "none"))


def test_run_has_the_name_and_length_of_its_config(tmp_path):
    """If two configs were trained in one work dir, the last one counts."""
    short, long = dict(type="EpochBasedTrainLoop", max_epochs=2), dict(max_epochs=12)
    write_run(tmp_path, "1", [*steps(1, 3, 1), evaluation(2, 0.1)])
    write_config(tmp_path / "1/vis_data/config.py", train_cfg=short, randomness=dict(seed=1))
    write_config(tmp_path / "short.py", train_cfg=short, randomness=dict(seed=2))
    run = read_run(str(tmp_path))
    assert (run.config, run.unit, run.total, run.finished) == ("short", "epoch", 2, True)

    write_run(tmp_path, "2", steps(1, 3, 1))
    write_config(tmp_path / "2/vis_data/config.py", train_cfg=long)
    write_config(tmp_path / "long.py", train_cfg=long)
    write_run(tmp_path, "3", [])  # stopped before anything was logged
    write_config(tmp_path / "3/vis_data/config.py", train_cfg=short)
    run = read_run(str(tmp_path))
    assert (run.config, run.total, run.finished, run.evaluations) == ("long", 12, False, [])


def test_a_config_is_known_whatever_statistics_were_tested(tmp_path):
    """``tools/test.py --precise-stats`` dumps the config again, with that option set."""
    write_run(tmp_path, "1", steps(1, 3, 1))
    write_config(tmp_path / "1/vis_data/config.py", lr=0.1)
    write_config(tmp_path / "mine.py", lr=0.1, precise_stats=300)
    write_config(tmp_path / "other.py", lr=0.2)
    assert read_run(str(tmp_path)).config == "mine"


def test_run_in_iterations(tmp_path):
    write_run(tmp_path, "1", [dict(loss=1.0, step=50), evaluation(50, 0.1)])
    write_config(tmp_path / "mine.py", train_cfg=dict(type="IterBasedTrainLoop", max_iters=100))
    run = read_run(str(tmp_path))
    assert (run.config, run.unit, run.total, run.finished) == ("mine", "iteration", 100, False)


def test_half_a_line_is_no_line(tmp_path):
    """A kill may cut the last line of the log; damage elsewhere is an error."""
    write_run(tmp_path, "1", [*steps(1, 3, 1), evaluation(1, 0.1)])
    path = tmp_path / "1" / "vis_data" / "scalars.json"
    text = path.read_text()
    path.write_text(text[:-10])
    training, evaluations = logged(tmp_path)
    assert len(training) == 3 and evaluations == []
    path.write_text(text[10:])
    with pytest.raises(UsageError, match="scalars.json: line 1 is damaged; delete that line"):
        read_run(str(tmp_path))


def test_tests_count_where_there_is_no_evaluation(tmp_path):
    write_run(tmp_path, "1", [*steps(1, 6, 1), evaluation(1, 0.1), *steps(7, 9, 2)])
    own, as_it_was = f"moved/from/{tmp_path.name}", dict(work_dir="runs/renamed/")
    for number, (loaded, value, more) in enumerate(
        [
            ("renamed/epoch_2.pth", 0.2, as_it_was),
            (f"{own}/best_coco_bbox_mAP_epoch_1.pth", 0.3, {}),
            ("released.pth", 0.4, {}),
            ("work_dirs/another_seed/epoch_3.pth", 0.5, as_it_was),
            (f"{own}/epoch_3.pth", 0.6, dict(precise_stats=300)),
            (f"{own}/epoch_4.pth", 0.7, {}),
            ("epoch_5.pth", 0.8, {}),
        ],
        2,
    ):
        for root in (tmp_path, tmp_path / "tests_alone"):
            write_config(root / f"{number}/vis_data/config.py", load_from=loaded, **more)
            (root / f"{number}/{number}.json").write_text(json.dumps({"coco/bbox_mAP": value}))
    others = [evaluation(4, 0.7), evaluation(5, 0.8)]
    run = read_run(str(tmp_path))
    assert run.evaluations == [evaluation(1, 0.1), evaluation(2, 0.2), *others]
    alone = read_run(str(tmp_path / "tests_alone")).evaluations
    assert alone == [evaluation(1, 0.3), evaluation(2, 0.2), evaluation(3, 0.6), *others]
    write_run(
        tmp_path, "9", steps(1, 3, 1)
    )  # a new start, for which the old checkpoints do not count
    assert read_run(str(tmp_path)).evaluations == []


def test_nothing_detected_is_an_ap_of_zero(tmp_path):
    """This holds for COCO's evaluation alone."""
    write_run(tmp_path, "1", [*steps(1, 3, 1), dict(time=1.0, step=1), {"voc/mAP": 0.5, "step": 2}])
    _, (first, second) = logged(tmp_path)
    assert first["coco/bbox_mAP"] == first["coco/bbox_mAP_75"] == 0
    assert second == {"voc/mAP": 0.5, "step": 2}


@pytest.mark.parametrize("line", [b"\xff\xfe\x00", b"[1]", b'"loss"', b"3", b'{"loss": 1.0}'])
def test_damaged_scalars(line, tmp_path):
    folder = tmp_path / "1" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_bytes(line + b'\n{"loss": 1.0, "step": 2}\n')
    with pytest.raises(UsageError, match="scalars.json: line 1 is damaged; delete that line"):
        read_run(str(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]", b'{"coco'])
def test_damaged_result_of_a_test(content, tmp_path):
    folder = tmp_path / "1"
    (folder / "vis_data").mkdir(parents=True)
    (folder / "vis_data" / "config.py").write_text("load_from = 'epoch_1.pth'\n")
    (folder / "1.json").write_bytes(content)
    with pytest.raises(UsageError, match="1.json is damaged: test again, or delete it"):
        read_run(str(tmp_path))
