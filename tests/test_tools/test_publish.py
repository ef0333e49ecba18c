"""tools/publish.py: a checkpoint that needs nothing of this package."""

import os
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
from common.errors import UsageError
from conftest import ROOT, run_on_full_disk
from mmengine.config import Config

CBN2 = "faster-rcnn_r18_fpn_cbn-all_1xb2_digits"
# A short training with averaged weights; the model detects something however little it learnt.
SHORT = """
train_cfg = dict(max_epochs=1)
custom_hooks = [
    dict(type="CBNHook", burn_in=2, by_epoch=False),
    dict(type="EMAHook", momentum=0.5),
    dict(type="PreciseStatsHook", num_images=2),
]
model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))
"""


def save(path, cfg=None, **more):
    """A checkpoint like a training's, of a model of one weight."""
    meta = {} if cfg is None else dict(cfg=cfg if isinstance(cfg, str) else Config(cfg).pretty_text)
    torch.save(dict(meta=meta, state_dict=dict(weight=torch.ones(2)), **more), path)
    return path


def published_config(path):
    return Config.fromstring(torch.load(path, weights_only=True)["meta"]["cfg"], ".py")


@pytest.fixture
def publish(monkeypatch, capsys):
    """Runs the tool in this process, which saves starting one; returns what it printed."""
    main = runpy.run_path(str(ROOT / "tools" / "publish.py"))["main"]

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, args)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_config, tool):
    """A trained checkpoint, its config, the published file, and what the tool printed."""
    folder = tmp_path_factory.mktemp("publish")
    config = small_config(folder, CBN2, SHORT)
    tool("train.py", config, "--work-dir", folder)
    done = tool("publish.py", folder / "epoch_1.pth")
    return folder / "epoch_1.pth", config, folder / "epoch_1_bn.pth", done.stdout


@pytest.mark.slow
class TestTrainedDetector:
    def test_same_detections_without_this_package(self, trained, tool, tmp_path):
        checkpoint, config, published, _ = trained
        expected, found = tmp_path / "cbn.pkl", tmp_path / "bn.pkl"
        tool("test.py", config, checkpoint, "--out", expected, "--work-dir", tmp_path / "cbn")
        code = f"""
import sys
sys.modules["cbn_mmdet"] = None
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

checkpoint = torch.load({str(published)!r}, weights_only=True)
cfg = Config.fromstring(checkpoint["meta"]["cfg"], ".py")
init_default_scope("mmdet")
MODELS.build(cfg.model).load_state_dict(checkpoint["state_dict"], strict=True)
cfg.load_from, cfg.work_dir = {str(published)!r}, {str(tmp_path / "bn")!r}
cfg.test_evaluator = [
    cfg.test_evaluator, dict(type="DumpDetResults", out_file_path={str(found)!r})
]
Runner.from_cfg(cfg).test()
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results = [pickle.loads(path.read_bytes()) for path in (expected, found)]
        assert sum(len(each["pred_instances"]["scores"]) for each in results[0]) > 0
        for first, second in zip(*results, strict=True):
            assert first["img_id"] == second["img_id"]
            for name in ("bboxes", "scores", "labels"):
                first_values, second_values = (
                    each["pred_instances"][name] for each in (first, second)
                )
                assert torch.equal(first_values, second_values), name

    def test_loads_into_a_model_with_batch_norm(self, trained, root):
        from mmdet.registry import MODELS
        from mmengine.registry import init_default_scope

        init_default_scope("mmdet")
        cfg = Config.fromfile(
            root / "studies/digits/configs/faster-rcnn_r18_fpn_bn-all_1xb2_digits.py"
        )
        state = torch.load(trained[2], weights_only=True)["state_dict"]
        MODELS.build(cfg.model).load_state_dict(state, strict=True)

    def test_holds_weights_alone_and_the_averaged_ones(self, trained):
        checkpoint, _, published, output = trained
        full = torch.load(checkpoint, weights_only=False)
        small = torch.load(published, weights_only=True)
        assert {"cbn_windows", "optimizer"} < set(full) and set(small) == {"meta", "state_dict"}
        assert list(small["state_dict"]) == list(full["state_dict"])
        for name, tensor in full["state_dict"].items():
            assert torch.equal(small["state_dict"][name], tensor), name
        name = "backbone.conv1.weight"
        assert not torch.equal(small["state_dict"][name], full["ema_state_dict"][f"module.{name}"])
        assert "averaged ones of EMAHook" in output
        assert small["meta"]["dataset_meta"]["classes"] == tuple("0123456789")
        assert published.stat().st_size < 0.6 * checkpoint.stat().st_size


class TestConfig:
    @pytest.fixture
    def converted(self, publish, tmp_path):
        def convert(cfg):
            publish(save(tmp_path / "epoch_1.pth", cfg))
            return published_config(tmp_path / "epoch_1_bn.pth")

        return convert

    def test_every_layer_becomes_batch_norm(self, converted):
        cfg = dict(
            norm_cfg=dict(type="SyncCBN", requires_grad=True, window_size=4, backward="current"),
            model=dict(
                backbone=dict(norm_cfg=dict(type="cbn_mmdet.CBN", eps=1e-3, compensate=False)),
                neck=[dict(norm_cfg=dict(type="BRN", momentum=0.02, r_max=2.0, warmup=10))],
                heads=(dict(norm_cfg=dict(type="GN", num_groups=4)), {"a-b": dict(type="CBN")}),
                name="CBN",
            ),
        )
        new = converted(cfg)
        assert new.norm_cfg == dict(type="BN", requires_grad=True)
        assert new.model.backbone.norm_cfg == dict(type="BN", eps=1e-3)
        assert new.model.neck[0].norm_cfg == dict(type="BN", momentum=0.02)
        assert new.model.heads[0].norm_cfg == dict(type="GN", num_groups=4)
        assert new.model.heads[1]["a-b"] == dict(type="BN")
        assert new.model.name == "CBN"

    def test_hooks_and_import_go_and_others_stay(self, converted):
        cfg = dict(
            custom_hooks=[
                dict(type="CBNHook", burn_in=1),
                dict(type="DiagnoseHook", interval=10),
                dict(type="EMAHook"),
                dict(type="PreciseStatsHook"),
            ],
            custom_imports=dict(imports=["cbn_mmdet", "json"], allow_failed_imports=True),
        )
        new = converted(cfg)
        assert new.custom_hooks == [dict(type="EMAHook")]
        assert new.custom_imports == dict(imports=["json"], allow_failed_imports=True)

    def test_tells_of_modules_that_its_config_imports(self, publish, tmp_path):
        cfg = dict(custom_imports=dict(imports=["cbn_mmdet", "common.efficientnet_lite"]))
        output = publish(save(tmp_path / "epoch_1.pth", cfg))
        assert "note: it needs common.efficientnet_lite, which its config imports" in output
        assert "note" not in publish(save(tmp_path / "epoch_2.pth", dict(max_epochs=3)))

    @pytest.mark.parametrize("imports", ["cbn_mmdet", ["cbn_mmdet.hooks"]])
    def test_no_import_is_left(self, converted, imports):
        cfg = dict(custom_imports=dict(imports=imports), max_epochs=3)
        assert dict(converted(cfg)) == dict(max_epochs=3)

    def test_is_not_run_as_code(self, publish, tmp_path):
        code = f"a = 1\nb = dict(c=open({str(tmp_path / 'ran')!r}, 'w'))\n"
        output = publish(save(tmp_path / "epoch_1.pth", code))
        assert "its config is left out, as it is not plain data" in output
        assert not (tmp_path / "ran").exists()
        assert "cfg" not in torch.load(tmp_path / "epoch_1_bn.pth", weights_only=True)["meta"]


class TestErrors:
    def test_is_one_line(self, tool, tmp_path):
        path = tmp_path / "none.pth"
        done = tool("publish.py", path, check=False)
        assert done.returncode == 2
        assert done.stdout == f"publish.py: error: the checkpoint {path} does not exist\n"

    def test_cut_short(self, publish, tmp_path):
        path = save(tmp_path / "epoch_1.pth")
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UsageError, match=f"{path} is not a checkpoint, or was cut short"):
            publish(path)

    @pytest.mark.parametrize("content", [dict(weight=torch.ones(1)), [1], dict(state_dict=3)])
    def test_no_weights(self, publish, tmp_path, content):
        torch.save(content, tmp_path / "epoch_1.pth")
        with pytest.raises(UsageError, match="holds no state_dict"):
            publish(tmp_path / "epoch_1.pth")
        assert os.listdir(tmp_path) == ["epoch_1.pth"]

    def test_does_not_overwrite(self, publish, tmp_path):
        path, out = save(tmp_path / "epoch_1.pth"), tmp_path / "out.pth"
        out.write_text("mine")
        with pytest.raises(UsageError, match=f"{out} exists already"):
            publish(path, out)
        assert out.read_text() == "mine"

    def test_nowhere_to_write(self, publish, tmp_path):
        out = tmp_path / "none" / "out.pth"
        with pytest.raises(UsageError, match=f"{out} cannot be written"):
            publish(save(tmp_path / "epoch_1.pth"), out)

    def test_a_full_disk_leaves_nothing_half_written(self, tmp_path):
        path = tmp_path / "epoch_1.pth"
        torch.save(dict(meta={}, state_dict=dict(weight=torch.ones(2**16))), path)
        small = path.stat().st_size // 2  # the largest file that the tool may write
        done = run_on_full_disk(small, ROOT / "tools" / "publish.py", path)
        assert done.returncode == 2
        assert f"error: {tmp_path / 'epoch_1_bn.pth'} cannot be written" in done.stderr
        assert os.listdir(tmp_path) == ["epoch_1.pth"]
