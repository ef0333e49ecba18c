"""Checkpoints that are whole, cut short, damaged, or not there."""

import os
import zipfile

import pytest
import torch
from common.checkpoint import check_checkpoint, check_fit, find_checkpoint, latest_checkpoint
from common.errors import UsageError
from conftest import cut, damage


def test_checkpoints(tmp_path):
    good, cut, legacy = (str(tmp_path / name) for name in ("good.pth", "cut.pth", "legacy.pth"))
    torch.save(dict(state_dict=dict(a=torch.ones(1000))), good)
    torch.save(dict(a=torch.ones(3)), legacy, _use_new_zipfile_serialization=False)
    with open(good, "rb") as file, open(cut, "wb") as half:
        half.write(file.read()[:2000])
    assert not zipfile.is_zipfile(cut)
    check_checkpoint(good)
    check_checkpoint(legacy)
    check_checkpoint("https://example.org/model.pth")
    with pytest.raises(UsageError, match="is not a checkpoint, or was cut short"):
        check_checkpoint(cut)
    with pytest.raises(UsageError, match="does not exist"):
        check_checkpoint("none.pth")


def test_batch_norms_of_old_files_have_counted_nothing():
    model = torch.nn.BatchNorm2d(2)
    weights = model.state_dict()
    del weights["num_batches_tracked"]
    check_fit(model, weights, "old.pth")
    del weights["running_var"]
    with pytest.raises(UsageError, match="1 of its weights are missing .running_var first"):
        check_fit(model, weights, "other.pth")


def checkpoint(path, when):
    torch.save({"a": torch.ones(1000)}, path)
    os.utime(path, (when, when))
    return path


def test_last_checkpoint_that_is_whole(tmp_path, capsys):
    """A kill while a checkpoint or `last_checkpoint` is written costs an epoch at most."""
    work_dir = str(tmp_path)
    assert latest_checkpoint(work_dir) is None
    first, tenth = checkpoint(tmp_path / "epoch_1.pth", 1), checkpoint(tmp_path / "epoch_10.pth", 2)
    assert latest_checkpoint(work_dir) == str(tenth)  # killed before last_checkpoint was written
    (tmp_path / "epoch_10_bn.pth").write_bytes(first.read_bytes())  # published, no training's
    assert latest_checkpoint(work_dir) == str(tenth)
    (tmp_path / "last_checkpoint").write_text(str(first))
    assert latest_checkpoint(work_dir) == str(first)
    (tmp_path / "last_checkpoint").write_text("")
    assert latest_checkpoint(work_dir) == str(tenth)
    assert capsys.readouterr().err == ""
    cut(tenth)
    (tmp_path / "last_checkpoint").write_text(str(tenth))
    assert latest_checkpoint(work_dir) == str(first)
    warning = capsys.readouterr().err
    assert f"{tenth} is not a checkpoint, or was cut short (" in warning
    assert f"; taking {first} instead" in warning
    tenth.unlink()
    assert latest_checkpoint(work_dir) == str(first)
    first.write_bytes(b"")
    with pytest.raises(UsageError, match="epoch_10.pth does not exist, and .* holds no other"):
        latest_checkpoint(work_dir)
    (tmp_path / "last_checkpoint").unlink()
    assert latest_checkpoint(work_dir) is None  # nothing was ever finished


def test_checkpoints_that_are_none(tmp_path):
    whole = checkpoint(tmp_path / "whole.pth", 1)
    for content in (b"", b"no checkpoint", whole.read_bytes()[:100], b"PK"):
        path = tmp_path / "none.pth"
        path.write_bytes(content)
        with pytest.raises(UsageError, match="none.pth is not a checkpoint, or was cut short"):
            check_checkpoint(str(path))
    cut(whole, path)
    with pytest.raises(UsageError, match="none.pth is not a checkpoint, or was cut short"):
        check_checkpoint(str(path))
    damage(whole, path)
    with pytest.raises(UsageError, match=r"or was cut short \(BadZipFile: its .+ is damaged\)"):
        check_checkpoint(str(path))


def test_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="holds no checkpoint: train for an epoch first"):
        find_checkpoint(str(tmp_path))


def test_checkpoint_of_a_moved_work_dir(tmp_path):
    torch.save({}, tmp_path / "epoch_1.pth")
    (tmp_path / "last_checkpoint").write_text("elsewhere/epoch_1.pth")
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "epoch_1.pth")


def test_checkpoint_that_was_written_elsewhere(tmp_path):
    """CheckpointHook(out_dir=...) wrote it; one in the work dir itself takes precedence."""
    work_dir, other = tmp_path / "run", tmp_path / "out/run"
    for folder in (work_dir, other):
        folder.mkdir(parents=True)
    torch.save({}, other / "epoch_1.pth")
    (work_dir / "last_checkpoint").write_text(str(other / "epoch_1.pth"))
    assert find_checkpoint(str(work_dir)) == str(other / "epoch_1.pth")
    torch.save({}, work_dir / "epoch_1.pth")
    assert find_checkpoint(str(work_dir)) == str(work_dir / "epoch_1.pth")
