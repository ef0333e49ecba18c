"""Damaged, missing or foreign files and full disks end in one line that says how to mend it."""

import os
import shutil

import pytest
import torch
from conftest import cut, damage, run_on_full_disk
from digits import build as builder
from mmengine.config import Config
from mmengine.registry import init_default_scope

CBN2 = "faster-rcnn_r18_fpn_cbn-all_1xb2_digits"
SHORT = "train_cfg = dict(max_epochs=1)\ncustom_hooks = [dict(type='CBNHook', burn_in=0)]"


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
    """The weights of a detector that differs in its norms alone."""
    from mmdet.registry import MODELS

    init_default_scope("mmdet")
    config = root / "studies/digits/configs/faster-rcnn_r18_fpn_gn-all_1xb2_digits.py"
    return MODELS.build(Config.fromfile(config).model).state_dict()


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def last_line(tool, *args, **kwargs):
    """Runs a tool that must fail with a line for its user, and returns that last line."""
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
    cut(image)
    done = tool(*args, check=False)
    assert done.returncode == 1 and str(image) in done.stdout.rstrip().splitlines()[-1]
    image.unlink()
    assert f"1 of {12 if split == 'train' else 4} images are not in " in last_line(tool, *args)
    annotations = case / "data" / "annotations" / f"instances_{split}.json"
    cut(annotations)
    assert f"{annotations} is no JSON, or was cut short" in last_line(tool, *args)
    annotations.write_text("[1]")
    assert f"{annotations} has no images and no categories" in last_line(tool, *args)


@pytest.mark.slow
def test_unwritable_folders(case, tool):
    """A file takes the folder's place: that stops root, too, whom no permission stops."""
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
    """mmengine alone would only warn, and evaluate layers that were never trained."""
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
    assert f"{path} holds more than weights, posix.system, and could run any code" in line
    tool(*args, env={**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"})
    assert trace.exists()  # where it is allowed, the code does run


@pytest.mark.slow
def test_report_of_what_is_damaged(case, root, tool):
    image, weights = case / "data" / "val" / "000002.png", case / "work" / "epoch_1.pth"
    image.unlink()
    work = case / "work"
    assert f"images are not in {image.parent}/: {image.name}" in last_line(tool, "report.py", work)
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
    scalars.write_bytes(content[:-20])  # as a kill leaves it
    tool("tables.py", case / "work")
    settings = cut(next((case / "work").glob("*/vis_data/config.py")))
    assert f"cannot read {settings}" in last_line(tool, "tables.py", case / "work")
