"""What is damaged, missing, full or of another model ends in one line that says how to mend it."""

import os
import shutil

import pytest
import torch
from conftest import run_on_full_disk
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from torch import nn

from cbn_mmdet.datasets import digits as builder
from cbn_mmdet.launch import CarefulRunner, UsageError, check_checkpoint
from cbn_mmdet.runs import latest_checkpoint, read_run, read_scalars

CBN2 = "faster-rcnn_r18_fpn_cbn-all_1xb2_digits"
SHORT = "train_cfg = dict(max_epochs=1)\ncustom_hooks = [dict(type='CBNHook', burn_in=0)]"


def cut(path, target=None):
    """Writes the first half of a file to `target`, or leaves no more of the file itself."""
    content = path.read_bytes()
    (target or path).write_bytes(content[: len(content) // 2])
    return target or path


def damage(path, target):
    """Writes a file that is as long, but whose middle was lost."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    target.write_bytes(content)
    return target


# The data builder.


def test_full_disk_leaves_no_half_of_a_data_set(tmp_path):
    """A limit on the size of files stands for the disk: only the annotations exceed it."""
    done = run_on_full_disk(
        60_000, builder.__file__, tmp_path / "digits", "--train", "100", "--val", "1"
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"root {tmp_path}/digits cannot be built" in line
    assert "(File too large); make room on that disk or name a root on another" in line
    assert not any(tmp_path.iterdir())


# What a killed or broken run leaves.


def checkpoint(path, when):
    torch.save({"a": torch.ones(1000)}, path)
    os.utime(path, (when, when))
    return path


def test_last_checkpoint_that_is_whole(tmp_path, capsys):
    """A kill while a checkpoint or its note is written costs an epoch at most."""
    work_dir = str(tmp_path)
    assert latest_checkpoint(work_dir) is None
    first, tenth = checkpoint(tmp_path / "epoch_1.pth", 1), checkpoint(tmp_path / "epoch_10.pth", 2)
    assert latest_checkpoint(work_dir) == str(tenth)  # the run was killed before it made its note
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


@pytest.mark.parametrize("line", [b"\xff\xfe\x00", b"[1]", b'"loss"', b"3", b'{"loss": 1.0}'])
def test_damaged_scalars(line, tmp_path):
    folder = tmp_path / "1" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_bytes(line + b'\n{"loss": 1.0, "step": 2}\n')
    for read in (read_scalars, read_run):
        with pytest.raises(UsageError, match="scalars.json: line 1 is damaged; delete that line"):
            read(str(tmp_path))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]", b'{"coco'])
def test_damaged_result_of_a_test(content, tmp_path):
    folder = tmp_path / "1"
    (folder / "vis_data").mkdir(parents=True)
    (folder / "vis_data" / "config.py").write_text("load_from = 'epoch_1.pth'\n")
    (folder / "1.json").write_bytes(content)
    with pytest.raises(UsageError, match="1.json is damaged: test again, or delete it"):
        read_run(str(tmp_path))


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


@pytest.mark.parametrize(
    "error", [AttributeError("no attribute"), torch.cuda.OutOfMemoryError("out of memory")]
)
def test_a_good_checkpoint_is_not_blamed(error, tmp_path):
    """For a mistake in a hook that is called once it was read, or for a small GPU."""

    class Mistaken(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            raise error

    path, model = tmp_path / "good.pth", nn.Linear(2, 2)
    torch.save(dict(state_dict=model.state_dict()), path)
    runner = CarefulRunner(model, str(tmp_path), custom_hooks=[Mistaken()])
    with pytest.raises(type(error), match=str(error)):
        runner.load_checkpoint(str(path))


# The tools.


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_config, tool):
    """A training of one epoch: the folder of its config and its work dir."""
    folder = tmp_path_factory.mktemp("bad")
    tool("train.py", small_config(folder, CBN2, SHORT), "--work-dir", folder / "work")
    return folder


@pytest.fixture
def case(trained, digits, tmp_path):
    """A copy of the training and of its data, to be damaged: config.py, work and data."""
    shutil.copytree(digits, tmp_path / "data")
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{CBN2}_small.py").rename(tmp_path / "config.py")
    for path in (tmp_path / "config.py", *tmp_path.glob("work/*/vis_data/config.py")):
        path.write_text(path.read_text().replace(str(digits), str(tmp_path / "data")))
    return tmp_path


def other_model(root):
    """The weights of a detector whose layers but for the norms are the same."""
    from mmdet.registry import MODELS

    init_default_scope("mmdet")
    config = root / "configs/digits/faster-rcnn_r18_fpn_gn-all_1xb2_digits.py"
    return MODELS.build(Config.fromfile(config).model).state_dict()


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def last_line(tool, *args, **kwargs):
    """The last line of a tool that has to end with a line for its user."""
    done = tool(*args, check=False, **kwargs)
    assert done.returncode == 2, done.stdout[-3000:]
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_damaged_data(name, case, tool):
    split = {"train.py": "train", "test.py": "val"}[name]
    args = [name, case / "config.py", "--work-dir", case / "new"]
    if name == "test.py":
        args.insert(2, case / "work" / "epoch_1.pth")
    image = case / "data" / split / "000002.png"
    for harm in (cut, os.unlink) if name == "train.py" else (cut,):
        harm(image)
        line = last_line(tool, *args)
        assert f"{image} is missing, or is no image, or was cut short: get it anew" in line
    annotations = case / "data" / "annotations" / f"instances_{split}.json"
    cut(annotations)
    assert f"{annotations} is no JSON, or was cut short" in last_line(tool, *args)
    annotations.write_text("[1]")
    assert f"{annotations} has no images and no categories" in last_line(tool, *args)


@pytest.mark.slow
def test_unwritable_folders(case, tool):
    """A file in the place of a folder stops everyone, root too, whom no permission stops."""
    config, weights = case / "config.py", case / "work" / "epoch_1.pth"
    (case / "file").touch()
    line = last_line(tool, "train.py", config, "--work-dir", case / "file")
    assert f"--work-dir {case}/file: nothing can be written there (File exists); name" in line
    line = last_line(tool, "test.py", config, weights, "--work-dir", case / "file" / "work")
    assert f"--work-dir {case}/file/work: nothing can be written there (Not a directory)" in line
    out = case / "file" / "out.pkl"
    line = last_line(tool, "test.py", config, weights, "--work-dir", case / "new", "--out", out)
    assert f"--out {case}/file: nothing can be written there" in line


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_full_disk_in_training(case, tool):
    (case / "new").mkdir()
    (case / "new" / "epoch_1.pth").symlink_to("/dev/full")
    line = last_line(tool, "train.py", case / "config.py", "--work-dir", case / "new")
    assert "nothing more can be written (No space left on device): make room" in line


@pytest.mark.slow
def test_resume_from_what_is_no_training(case, root, tool):
    args = "train.py", case / "config.py", "--work-dir", case / "new", "--resume"
    whole, path = case / "work" / "epoch_1.pth", case / "bad.pth"
    assert f"{path} is not a checkpoint, or was cut short" in last_line(
        tool, *args, cut(whole, path)
    )
    assert f"{path} is not a checkpoint, or was cut short" in last_line(
        tool, *args, damage(whole, path)
    )
    content = torch.load(whole, weights_only=False)
    torch.save({"state_dict": content["state_dict"]}, path)
    assert f"{path} holds no meta, so that no training can go on" in last_line(tool, *args, path)
    torch.save({**content, "state_dict": other_model(root)}, path)
    assert f"{path} is of another model" in last_line(tool, *args, path)


@pytest.mark.slow
def test_test_of_what_is_not_the_model(case, root, tool):
    """mmengine would warn, and evaluate layers that were never trained."""
    config, path = case / "config.py", case / "bad.pth"
    args = "test.py", config, path, "--work-dir", case / "new"
    torch.save({"state_dict": other_model(root)}, path)
    line = last_line(tool, *args)
    assert f"{path} is of another model" in line
    assert "weights are missing (backbone.bn1.weight first)" in line
    assert "weights are unknown (backbone.gn1.weight first)" in line
    assert "give the config that it was trained with" in line
    content = torch.load(case / "work" / "epoch_1.pth", weights_only=False)
    torch.save(content, path)
    line = last_line(tool, *args, "--cfg-options", "model.roi_head.bbox_head.num_classes=9")
    assert "4 have another shape (roi_head.bbox_head.fc_cls.weight first)" in line


@pytest.mark.slow
def test_training_starts_from_weights_that_fit_in_part(case, root, tool):
    """That is what load_from is for: the rest is trained."""
    torch.save({"state_dict": other_model(root)}, case / "other.pth")
    done = tool(
        *("train.py", case / "config.py", "--work-dir", case / "new"),
        *("--cfg-options", f"load_from={case}/other.pth"),
    )
    assert "do not match exactly" in done.stdout
    assert (case / "new" / "epoch_1.pth").exists()


@pytest.mark.slow
def test_code_in_a_checkpoint_does_not_run(case, tool):
    from mmengine.runner import checkpoint

    if not hasattr(checkpoint, "get_torch_safe_globals"):
        pytest.skip("this mmengine unpickles whatever a checkpoint holds")
    content = torch.load(case / "work" / "epoch_1.pth", weights_only=False)
    path, trace = case / "bad.pth", case / "trace"
    torch.save({**content, "code": Code(f"touch {trace}")}, path)
    args = "test.py", case / "config.py", path, "--work-dir", case / "new"
    line = last_line(tool, *args)
    assert not trace.exists()
    assert f"{path} holds more than weights, posix.system first, and could run any code" in line
    tool(*args, env={**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"})
    assert trace.exists()  # so that the above means something


@pytest.mark.slow
def test_report_of_what_is_damaged(case, root, tool):
    image, weights = case / "data" / "val" / "000002.png", case / "work" / "epoch_1.pth"
    cut(image)
    work = case / "work"
    line = last_line(tool, "report.py", work)
    assert f"{image} is missing, or is no image, or was cut short" in line
    torch.save({"state_dict": other_model(root)}, weights)
    assert f"{weights} is of another model" in last_line(tool, "report.py", work)
    cut(weights)
    assert f"and {work} holds no other" in last_line(tool, "report.py", work)


@pytest.mark.slow
def test_tables_of_what_is_damaged(case, tool):
    scalars = next((case / "work").glob("*/vis_data/scalars.json"))
    content = scalars.read_bytes()
    scalars.write_bytes(b"\xff" + content)
    assert f"{scalars}: line 1 is damaged" in last_line(tool, "tables.py", case / "work")
    scalars.write_bytes(content[:-20])  # which is what a kill leaves
    tool("tables.py", case / "work")
    settings = cut(next((case / "work").glob("*/vis_data/config.py")))
    assert f"cannot read {settings}" in last_line(tool, "tables.py", case / "work")
