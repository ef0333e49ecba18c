"""What the tools tell a user who mistyped something in a config, or an option."""

import argparse
import os.path as osp
import re

import pytest
from common import config
from common.errors import UsageError
from common.launchers import add_launch_arguments
from mmengine.config import Config

from cbn_mmdet import CBNHook


def parse(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    add_launch_arguments(parser)
    return parser.parse_args(arguments)


def test_load_config(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "some.py"
    path.write_text("train_cfg = dict(b=1)\nwork_dir = None\n")
    options = ["--cfg-options", "train_cfg.b=2", "train_cfg.c=[1,2]"]
    cfg = config.load_config(parse(str(path), *options))
    assert cfg.train_cfg.b == 2 and cfg.train_cfg.c == [1, 2]
    assert cfg.work_dir == "work_dirs/some" and cfg.launcher == "none"
    assert config.load_config(parse(str(path), "--work-dir", "x")).work_dir == "x"


@pytest.mark.parametrize(
    "text, message",
    [("a = (", "cannot read the config"), ("_base_ = 'none.py'", "cannot read the config")],
)
def test_broken_config(tmp_path, text, message):
    path = tmp_path / "some.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        config.read_config(str(path))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("neck=dict(norm_cfg=dict(type='CNB'))", r"model\.neck\.norm_cfg\.type: .* CNB; .* CBN\?"),
        ("heads=[dict(), dict(norm_cfg=dict(type='Foo'))]", r"heads\[1\]\.norm_cfg.* called Foo$"),
        ("neck=dict(norm_cfg=dict(type='SyncCBN'), head=dict(norm_cfg=None))", None),
        ("norm_cfg=dict(type='GN', num_groups=2)", None),
        ("norm_cfg=dict(type='CBN', requires_grad=False, eps=1e-3)", None),
        (
            "norm_cfg=dict(type='GN', groups=2)",
            "model.norm_cfg: GroupNorm has no option 'groups'",
        ),
        ("norm_cfg=dict(type='SyncCBN', windowsize=2)", "'windowsize'; did you mean window_size"),
        ("norm_cfg=dict(type='SyncCBN', k=2)", "'k'; it takes num_features, sync, eps, momentum,"),
        ("norm_cfg=dict(_delete_=True, type='CBN')", "model.norm_cfg: the base .* take it out$"),
        ("norm_cfg=dict(type='CBN', window_size=0)", r"model\.norm_cfg: .* at least 1, got 0"),
    ],
)
def test_mistyped_norm(tmp_path, setting, message):
    path = tmp_path / "config.py"
    path.write_text(f"default_scope = 'mmdet'\nmodel = dict({setting})\n")
    args = argparse.Namespace(
        config=str(path), cfg_options={}, launcher="none", work_dir=None, local_rank=0
    )
    if message is None:
        config.load_config(args)
    else:
        with pytest.raises(UsageError, match=message):
            config.load_config(args)


@pytest.mark.parametrize(
    "hook, message",
    [
        ("type='CBNHok'", r"custom_hooks\[1\]\.type: no hook is called CBNHok; .* CBNHook\?"),
        ("type='CBNHook', burnin=1", "CBNHook has no option 'burnin'; did you mean burn_in"),
        ("type='CBNHook', k=1", "'k'; it takes burn_in, by_epoch, save_window$"),
        ("type='CBNHook', burn_in=-1", "burn_in must be a whole number of at least 0"),
        ("type='DiagnoseHook', interval=0", "interval must be a whole number of at least 1, got 0"),
        ("type='EMAHook', momentums=1, priority='LOW'", None),  # it hands its options on
        ("type='mmdet.NumClassCheckHook', priority=60", None),
    ],
)
def test_mistyped_hook(hook, message):
    text = f"default_scope = 'mmdet'\ncustom_hooks = [dict(type='EMAHook'), dict({hook})]\n"
    cfg = Config.fromstring(text, ".py")
    if message is None:
        config.check_hooks(cfg)
    else:
        with pytest.raises(UsageError, match=message):
            config.check_hooks(cfg)


@pytest.mark.parametrize("second", ["CBNHook", "mmengine.CBNHook", CBNHook])
def test_two_hooks(second):
    hooks = [dict(type="CBNHook"), dict(type="EMAHook"), dict(type=second, burn_in=1)]
    with pytest.raises(UsageError, match="custom_hooks has 2 CBNHooks.* keep one"):
        config.check_hooks(Config(dict(default_scope="mmdet", custom_hooks=hooks)))


@pytest.mark.parametrize(
    "hook, length, message",
    [
        (dict(burn_in=2), dict(max_epochs=3), None),
        (dict(burn_in=3), dict(max_epochs=3), "3 epochs .* For instance: .*burn_in=0\\)\\]$"),
        (dict(), dict(max_iters=9), "3 epochs is not shorter than the run of 1 epochs"),
        (dict(burn_in=9, by_epoch=False), dict(max_iters=9), "burn_in=2, by_epoch=False\\)\\]$"),
        (dict(burn_in=8, by_epoch=False), dict(max_iters=9), None),
        (dict(burn_in=9, by_epoch=False), dict(max_epochs=3), None),  # iterations unknown
    ],
)
def test_burn_in(hook, length, message):
    cfg = Config(dict(train_cfg=length))
    if message is None:
        config.check_burn_in(cfg, CBNHook(**hook))
    else:
        with pytest.raises(UsageError, match=message):
            config.check_burn_in(cfg, CBNHook(**hook))


def test_burn_in_of_epochs_in_iterations():
    cfg, hook = Config(dict(train_cfg=dict(max_epochs=3))), CBNHook(9, by_epoch=False)
    assert config.check_burn_in(cfg, hook, epoch_length=4) == 12
    with pytest.raises(UsageError, match="9 iterations is not shorter than the run of 9"):
        config.check_burn_in(cfg, hook, epoch_length=3)


def test_missing_config():
    with pytest.raises(UsageError, match="the config file none.py does not exist"):
        config.read_config("none.py")


def test_mistyped_option():
    cfg = Config(dict(optim_wrapper=dict(lr=1), custom_hooks=[1]))
    with pytest.raises(UsageError, match="optim_wraper.lr.*did you mean optim_wrapper"):
        config.merge_options(cfg, {"optim_wraper.lr": 2})
    with pytest.raises(UsageError, match="Index 3 exceeds the length"):
        config.merge_options(cfg, {"custom_hooks.3": 2})


def test_option_that_nothing_would_read(capsys):
    """The config only used these names to write other settings, which hold copies of them."""
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
            config.merge_options(cfg, {option: 1})
    with pytest.raises(UsageError, match="self: the config has no self"):
        config.merge_options(cfg, {"self": 1})
    config.merge_options(cfg, {"model.heads.0.norm_cfg.momentum": 0.1, "load_from": "x"})
    assert cfg.model.heads[0].norm_cfg.momentum == 0.1 and cfg.load_from == "x"
    assert capsys.readouterr().err == ""
    config.merge_options(cfg, {"note": "b"})  # a user's own hook may read it
    assert cfg.note == "b" and "note: no setting of the frameworks" in capsys.readouterr().err


def test_settings_that_differ():
    """Compares what defines a training, however it is written, and runs none of the text."""
    weights = "init_cfg=dict(type='Pretrained', checkpoint='{}/r50.pth')"
    before = (
        f"model = dict(neck=dict(type='FPN', a=1e-5), head=[dict(a=1)], {weights.format('a')})\n"
        "train_cfg = dict(max_epochs=12)\nwork_dir = open('ran', 'w')\n"
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
    assert config.settings_that_differ(before, before) == []
    assert config.settings_that_differ(before, now) == [
        "model.neck.type was 'FPN', is 'PAN'",
        "model.head.0.a was 1, is 2",
        "optim_wrapper.paramwise_cfg.custom.keys.lr was 1, is 2",
        "optim_wrapper.paramwise_cfg.f was 'len', is 'max'",
        "custom_hooks.1 was not set, is {'type': 'EMAHook'}",
        "train_dataloader.batch_size was 2, is 1",
    ]
    for other in ("model = <function>", "model = {}\nmodel['a'] = 1"):
        assert config.settings_that_differ(other, now) == []
    assert not osp.exists("ran")
    root = "x" * 80
    (long,) = config.settings_that_differ(f"model = '{root}/first'", f"model = '{root}/second'")
    assert re.search(r"was \.\.\.x+/first', is \.\.\.x+/second'$", long) and len(long) < 70


def test_option_without_a_value(capsys):
    with pytest.raises(SystemExit):
        parse("some.py", "--cfg-options", "lr")
    assert "takes KEY=VALUE pairs, got: lr" in capsys.readouterr().err


def test_the_hook_of_a_config_without_one():
    hooks = [
        config.default_cbn_hook(Config(dict(train_cfg=train_cfg)))
        for train_cfg in (dict(max_epochs=12), dict(max_iters=90000))
    ]
    assert [(hook.burn_in, hook.by_epoch) for hook in hooks] == [(3, True), (22500, False)]
