"""What the tools tell a user who mistyped something, and how processes start without a GPU."""

import argparse
import zipfile

import pytest
import torch
from mmengine.config import Config

from cbn_mmdet import launch
from cbn_mmdet.launch import UsageError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    launch.add_launch_arguments(parser)
    return parser.parse_args(arguments)


def test_load_config(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "some.py"
    path.write_text("a = dict(b=1)\nwork_dir = None\n")
    cfg = launch.load_config(parse(str(path), "--cfg-options", "a.b=2", "a.c=[1,2]"))
    assert cfg.a.b == 2 and cfg.a.c == [1, 2]
    assert cfg.work_dir == "work_dirs/some" and cfg.launcher == "none"
    assert launch.load_config(parse(str(path), "--work-dir", "x")).work_dir == "x"


@pytest.mark.parametrize(
    "text, message",
    [("a = (", "cannot read the config"), ("_base_ = 'none.py'", "cannot read the config")],
)
def test_broken_config(tmp_path, text, message):
    path = tmp_path / "some.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        launch.read_config(str(path))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("neck=dict(norm_cfg=dict(type='CNB'))", r"model\.neck\.norm_cfg\.type: .* CNB; .* CBN\?"),
        ("heads=[dict(), dict(norm_cfg=dict(type='Foo'))]", r"heads\[1\]\.norm_cfg.* called Foo$"),
        ("neck=dict(norm_cfg=dict(type='SyncCBN'), head=dict(norm_cfg=None))", None),
        ("norm_cfg=dict(type='GN', num_groups=2)", None),
    ],
)
def test_mistyped_norm(tmp_path, setting, message):
    path = tmp_path / "config.py"
    path.write_text(f"default_scope = 'mmdet'\nmodel = dict({setting})\n")
    args = argparse.Namespace(
        config=str(path), cfg_options={}, launcher="none", work_dir=None, local_rank=0
    )
    if message is None:
        launch.load_config(args)
    else:
        with pytest.raises(UsageError, match=message):
            launch.load_config(args)


def test_missing_config():
    with pytest.raises(UsageError, match="the config file none.py does not exist"):
        launch.read_config("none.py")


def test_mistyped_option():
    cfg = Config(dict(optim_wrapper=dict(lr=1), hooks=[1]))
    with pytest.raises(UsageError, match="optim_wraper.lr.*did you mean optim_wrapper"):
        launch.merge_options(cfg, {"optim_wraper.lr": 2})
    with pytest.raises(UsageError, match="Index 3 exceeds the length"):
        launch.merge_options(cfg, {"hooks.3": 2})


def test_option_without_a_value(capsys):
    with pytest.raises(SystemExit):
        parse("some.py", "--cfg-options", "lr")
    assert "takes KEY=VALUE pairs, got: lr" in capsys.readouterr().err


def dataset(**kwargs):
    return Config(dict(train_dataloader=dict(dataset=kwargs), train_evaluator=None))


def test_missing_data(tmp_path):
    digits = dict(data_root=f"{tmp_path}/", ann_file="a.json", data_prefix=dict(img="train/"))
    with pytest.raises(UsageError, match=r"no .*a.json. Set data_root"):
        launch.check_data(dataset(**digits), "train")
    with pytest.raises(UsageError, match=f"python -m cbn_mmdet.datasets.digits {tmp_path}"):
        launch.check_data(dataset(**digits, metainfo=dict(classes=tuple("0123456789"))), "train")
    with pytest.raises(UsageError, match="a.json"):
        launch.check_data(dataset(type="RepeatDataset", dataset=digits), "train")
    (tmp_path / "a.json").touch()
    (tmp_path / "train").mkdir()
    launch.check_data(dataset(**digits), "train")
    launch.check_data(dataset(ann_file="elsewhere", backend_args=dict(backend="petrel")), "train")


def test_checkpoints(tmp_path):
    good, cut, legacy = (str(tmp_path / name) for name in ("good.pth", "cut.pth", "legacy.pth"))
    torch.save(dict(state_dict=dict(a=torch.ones(1000))), good)
    torch.save(dict(a=torch.ones(3)), legacy, _use_new_zipfile_serialization=False)
    with open(good, "rb") as file, open(cut, "wb") as half:
        half.write(file.read()[:2000])
    assert not zipfile.is_zipfile(cut)
    launch.check_checkpoint(good)
    launch.check_checkpoint(legacy)
    launch.check_checkpoint("https://example.org/model.pth")
    with pytest.raises(UsageError, match="is not a checkpoint, or was cut short"):
        launch.check_checkpoint(cut)
    with pytest.raises(UsageError, match="does not exist"):
        launch.check_checkpoint("none.pth")


def test_run_tool(capfd, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # which it sets for its process

    def fail():
        raise UsageError("this is wrong")

    with pytest.raises(SystemExit) as error:
        launch.run_tool(fail)
    assert error.value.code == 2
    assert capfd.readouterr().err.endswith("error: this is wrong\n")


def test_processes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    launch.start_processes(Config(dict(launcher="none")))
    with pytest.raises(UsageError, match="start the tool with torchrun"):
        launch.start_processes(Config(dict(launcher="pytorch")))
    with pytest.raises(UsageError, match="--launcher slurm needs GPUs"):
        launch.start_processes(Config(dict(launcher="slurm")))


def test_processes_with_gpus(monkeypatch):
    """A GPU for each process, and processes of the launcher's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(UsageError, match="--launcher slurm: start the tool with srun"):
        launch.start_processes(Config(dict(launcher="slurm")))
    monkeypatch.setenv("RANK", "0")
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        launch.start_processes(Config(dict(launcher="pytorch")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"3 processes were started on a machine with 2 GPU"):
        launch.start_processes(Config(dict(launcher="pytorch")))
