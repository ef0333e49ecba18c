"""What the tools tell a user who mistyped something, and how processes start without a GPU."""

import argparse
import re
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
    path.write_text("train_cfg = dict(b=1)\nwork_dir = None\n")
    options = ["--cfg-options", "train_cfg.b=2", "train_cfg.c=[1,2]"]
    cfg = launch.load_config(parse(str(path), *options))
    assert cfg.train_cfg.b == 2 and cfg.train_cfg.c == [1, 2]
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
    cfg = Config(dict(optim_wrapper=dict(lr=1), custom_hooks=[1]))
    with pytest.raises(UsageError, match="optim_wraper.lr.*did you mean optim_wrapper"):
        launch.merge_options(cfg, {"optim_wraper.lr": 2})
    with pytest.raises(UsageError, match="Index 3 exceeds the length"):
        launch.merge_options(cfg, {"custom_hooks.3": 2})


def test_option_that_nothing_would_read(capsys):
    """A name that a config only wrote its settings with: their values were copied."""
    norm = dict(type="CBN", momentum=0.02)
    parts = dict(neck=dict(norm_cfg=norm), heads=[dict(norm_cfg=norm), dict(num_stages=4)])
    own = dict(norm_cfg=norm, copy=norm, max_epochs=4, note="a", data_preprocessor=dict(mean=1))
    parts["data_preprocessor"] = own["data_preprocessor"]
    cfg = Config(dict(own, model=parts, train_cfg=dict(max_epochs=4)))
    for option, place in (
        ("norm_cfg.momentum", r"copied to: model\.heads\.0\.norm_cfg, model\.neck\.norm_cfg$"),
        ("max_epochs", r"copied to: train_cfg\.max_epochs$"),
        ("data_preprocessor.mean", r"copied to: model\.data_preprocessor$"),
    ):
        with pytest.raises(UsageError, match=f"{option}: .* only served while .*{place}"):
            launch.merge_options(cfg, {option: 1})
    with pytest.raises(UsageError, match="self: the config has no self"):
        launch.merge_options(cfg, {"self": 1})
    launch.merge_options(cfg, {"model.heads.0.norm_cfg.momentum": 0.1, "load_from": "x"})
    assert cfg.model.heads[0].norm_cfg.momentum == 0.1 and cfg.load_from == "x"
    assert capsys.readouterr().err == ""
    launch.merge_options(cfg, {"note": "b"})  # a hook of the user's may read it
    assert cfg.note == "b" and "note: no setting of the frameworks" in capsys.readouterr().err


def test_settings_that_differ():
    """In what defines a training, however they are written; nothing of the texts is run."""
    weights = "init_cfg=dict(type='Pretrained', checkpoint='{}/r50.pth')"
    before = (
        f"model = dict(neck=dict(type='FPN', a=1e-5), head=[dict(a=1)], {weights.format('a')})\n"
        "train_cfg = dict(max_epochs=12)\nwork_dir = 'a'\nraise SystemExit\n"
        "train_dataloader = dict(batch_size=2, num_workers=2)\n"
        "optim_wrapper = dict(paramwise_cfg=dict({'custom.keys': dict(lr=1)}, bias=1, f=len))\n"
        "custom_hooks = [dict(type='CBNHook', burn_in=3)]\n"
    )
    now = (
        "work_dir = 'b'\nsync_bn = None\ntrain_cfg = {'max_epochs': 12}\n"
        f"model = dict(head=[dict(a=2)], neck=dict(a=1e-05, type='PAN'), {weights.format('b')})\n"
        "train_dataloader = dict(batch_size=1, num_workers=1)\n"
        "optim_wrapper = dict(paramwise_cfg=dict({'custom.keys': dict(lr=2)}, bias=1, f=max))\n"
        "custom_hooks = [dict(type='CBNHook', burn_in=3, save_window=False), dict(type='EMAHook'), "
        "dict(type='DiagnoseHook', interval=10)]\n"
    )
    assert launch.settings_that_differ(before, before) == []
    assert launch.settings_that_differ(before, now) == [
        "model.neck.type was 'FPN', is 'PAN'",
        "model.head.0.a was 1, is 2",
        "optim_wrapper.paramwise_cfg.custom.keys.lr was 1, is 2",
        "optim_wrapper.paramwise_cfg.f was 'len', is 'max'",
        "custom_hooks.1 was not set, is {'type': 'EMAHook'}",
        "train_dataloader.batch_size was 2, is 1",
    ]
    assert launch.settings_that_differ("model = <function>", now) == []
    root = "x" * 80
    (long,) = launch.settings_that_differ(f"model = '{root}/first'", f"model = '{root}/second'")
    assert re.search(r"was \.\.\.x+/first', is \.\.\.x+/second'$", long) and len(long) < 70


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
    with pytest.raises(UsageError, match="a.json"):
        several = dataset(type="ConcatDataset", datasets=[dict(ann_file="."), digits])
        launch.check_data(several, "train")
    (tmp_path / "a.json").touch()
    (tmp_path / "train").mkdir()
    launch.check_data(dataset(**digits), "train")
    launch.check_data(dataset(ann_file="elsewhere", backend_args=dict(backend="petrel")), "train")


def test_how_often_an_epoch_repeats_a_data_set():
    a, b, c = (dict(ann_file=name) for name in "abc")
    several = dict(datasets=[dict(times=3, dataset=a), b, dict(oversample_thr=0.1, dataset=c)])
    cfg = dataset(type="RepeatDataset", times=2, dataset=several)
    found = [(each["ann_file"], times) for each, times in launch.innermost_datasets(cfg, "train")]
    assert found == [("a", 6), ("b", 2), ("c", None)]
    assert list(launch.innermost_datasets(cfg, "val")) == []


def test_the_hook_of_a_config_without_one():
    hooks = [
        launch.default_cbn_hook(Config(dict(train_cfg=train_cfg)))
        for train_cfg in (dict(max_epochs=12), dict(max_iters=90000))
    ]
    assert [(hook.burn_in, hook.by_epoch) for hook in hooks] == [(3, True), (22500, False)]


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
