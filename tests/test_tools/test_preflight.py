"""What the check before a long run says of good configs, and of each thing that can be wrong."""

import json
import re
import shutil

import pytest
import torch
import torchvision
from conftest import BENT_CONV
from rich.filesize import decimal

pytestmark = pytest.mark.slow

MASK_RCNN = "configs/mask_rcnn/mask-rcnn_r50_fpn_cbn_16xb1-1x_coco.py"
GN_ALL = "configs/faster_rcnn/faster-rcnn_r50_fpn_gn-all_4xb4-1x_coco.py"
DIGITS = "faster-rcnn_r18_fpn_cbn-all_1xb1_digits"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like that of the pretrained backbone."""
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    return path


def data_options(folder):
    options = [
        f"{split}_dataloader.dataset.data_root={folder}" for split in ("train", "val", "test")
    ]
    annotations = f"{folder}/annotations/instances_val2017.json"
    return options + [f"{split}_evaluator.ann_file={annotations}" for split in ("val", "test")]


def lines_of(done, status):
    """The lines with a status, by the name of their check."""
    found = re.findall(rf"^{status:4}  ([^:]+?): (.*)$", done.stdout, re.MULTILINE)
    return dict(found)


def test_digits(tool, small_config, tmp_path):
    hook = "custom_hooks = [dict(type='mmengine.CBNHook', burn_in=40, by_epoch=False)]"
    done = tool("preflight.py", small_config(tmp_path, DIGITS, hook), "--images", "2")
    ok = lines_of(done, "OK")
    assert ok["batch"].startswith("1 GPU(s) (the config's name) x 1 image(s) = 1 images per step")
    assert "at most 12 steps per epoch" in ok["batch"]
    assert ok["learning rate"].startswith("0.01 in force (0.02 is for 2 images per step)")
    assert ok["CBNHook"] == "the window opens after 40 iterations of 48"
    assert re.match(r"loss [\d.]+, [\d.]+; [\d.]+ s for the last step", ok["training"])
    assert ok["links"].startswith("all 32 CBN layers have what they need")
    # The past of 32 channels, fed by 3 x 7 x 7 weights each, in float32, and six vectors.
    size = re.escape(decimal(4 * (32 * 147 + 147 + 6 * 32)))
    row = rf"│ backbone.bn1 +│ backbone.conv1 +│ +32 │ +auto │ +{size} │"
    assert re.search(row, done.stdout)
    assert re.match(r"2 images in [\d.]+ s; computed: coco/bbox_mAP", ok["evaluation"])
    assert done.stdout.endswith("no check failed\n")
    assert list(tmp_path.iterdir()) == [tmp_path / f"{DIGITS}_small.py"]


def test_layers_in_evaluation_mode_need_no_convolution(tool, small_config, tmp_path):
    config = small_config(tmp_path, DIGITS, "model = dict(backbone=dict(norm_eval=True))")
    done = tool("preflight.py", config, "--images", "1")
    assert lines_of(done, "OK")["links"].startswith("all 32 CBN layers have what they need")
    note = lines_of(done, "NOTE")["links"]
    assert note.startswith("20 of 32 CBN layers only repeat their running statistics, backbone.bn1")
    assert re.search(r"│ backbone.bn1 +│ not needed +│ +32 │ +auto │ +– │", done.stdout)


def test_iterations_of_a_repeated_data_set(tool, small_config, tmp_path):
    """12 images, three times each; and the default hook for a training of this length."""
    config = small_config(
        tmp_path,
        DIGITS,
        "custom_hooks = []\n"
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=40)\n"
        "train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=3,\n"
        "    dataset={**_base_.train_dataloader.dataset, 'data_root': data_root}))",
    )
    done = tool("preflight.py", config, "--no-run")
    ok = lines_of(done, "OK")
    assert "at most 36 steps per epoch" in ok["batch"]
    assert ok["CBNHook"] == "the window opens after 10 iterations of 40"
    hook = "set custom_hooks = [dict(type='CBNHook', burn_in=10, by_epoch=False)]"
    assert hook in lines_of(done, "NOTE")["CBNHook"]


def test_coco(tool, coco, weights):
    """With tiny images, on fewer GPUs than the config's name says."""
    small = [
        "train_dataloader.dataset.pipeline.2.scale=(160,96)",
        "val_dataloader.dataset.pipeline.1.scale=(160,96)",
        "model.train_cfg.rpn_proposal.max_per_img=50",
        "model.test_cfg.rpn.max_per_img=20",
        f"model.backbone.init_cfg.checkpoint={weights}",
    ]
    options = ["--cfg-options", *data_options(coco), *small]
    done = tool("preflight.py", MASK_RCNN, "--gpus", "4", *options)
    ok = lines_of(done, "OK")
    train = f"train annotations, {coco}/annotations/instances_train2017.json"
    assert ok[train].startswith("10 images (1 without objects), 23 annotations (4 crowds), 80 cat")
    assert ok["train images"] == f"all 10 are in {coco}/train2017/"
    assert ok["model.backbone.init_cfg.checkpoint"] == (
        f"265 of the 265 weights of ResNet are in {weights}; 2 of the file are not used: "
        "fc.weight, fc.bias"
    )
    assert ok["batch"].startswith("4 GPU(s) (--gpus) x 1 image(s) = 4 images per step")
    assert ok["learning rate"].startswith("0.005 in force (0.02 is for 16 images per step)")
    assert ok["CBNHook"] == "the window opens after 3 epochs of 12"
    assert ok["links"].startswith("all 16 CBN layers have what they need")
    assert ok["evaluation"].startswith("4 images in ")
    assert ok["evaluation"].endswith("computed: coco/bbox_mAP, coco/segm_mAP")


def test_each_failure_is_a_line(tool, coco, tmp_path):
    """No failure hides the others."""
    folder = shutil.copytree(coco, tmp_path / "coco")
    first = min((folder / "train2017").iterdir())
    first.unlink()
    annotations = folder / "annotations/instances_val2017.json"
    annotations.write_text(annotations.read_text()[:-1])
    options = [
        *data_options(folder),
        "model.backbone.init_cfg.checkpoint=none.pth",
        "load_from=http://127.0.0.1:9/model.pth",  # where nobody answers
        "train_cfg.max_epochs=3",
        "auto_scale_lr.enable=False",
    ]
    done = tool(
        *("preflight.py", MASK_RCNN, "--no-run", "--gpus", "2", "--cfg-options", *options),
        check=False,
    )
    assert done.returncode == 1
    failed = lines_of(done, "FAIL")
    assert f"1 of 10 images are not in {folder}/train2017/: {first.name}; put" in (
        failed.pop("train images")
    )
    assert "is no JSON, or was cut short" in failed.pop(f"val annotations, {annotations}")
    setting = "model.backbone.init_cfg.checkpoint"
    assert failed.pop(setting) == (
        f"the checkpoint none.pth does not exist; give a file with --cfg-options {setting}=PATH"
    )
    assert re.match(
        r"cannot load http://127.0.0.1:9/model.pth: \w+: .*; give a file .* load_from=PATH",
        failed.pop("load_from"),
    )
    assert failed.pop("CBNHook").startswith(
        "CBNHook: burn_in=3 epochs is not shorter than the run of 3 epochs"
    )
    assert not failed and done.stdout.endswith("5 check(s) failed\n")
    assert lines_of(done, "OK")["train image sizes"].startswith("9 tried")
    assert lines_of(done, "NOTE")["learning rate"] == (
        "0.02 in force, but 0.02 is for 16 images per step and these are 2: "
        "auto_scale_lr.enable=True, or tools/train.py --auto-scale-lr, makes it 0.0025"
    )


def test_wrong_data_and_other_norm(tool, coco, weights, tmp_path):
    """Wrong data, and a norm other than that of the pretrained backbone."""
    annotations = tmp_path / "renamed.json"
    content = json.loads((coco / "annotations/instances_val2017.json").read_text())
    content["categories"][0]["name"] = "human"
    annotations.write_text(json.dumps(content))
    other = tmp_path / "other.pth"
    torch.save(dict(state_dict={"fc.weight": torch.ones(1)}), other)
    options = [
        *data_options(coco),
        f"load_from={other}",
        "train_dataloader.dataset.data_prefix.img=val2017",
        f"val_dataloader.dataset.ann_file={annotations}",
        f"model.backbone.init_cfg.checkpoint={weights}",
        "test_dataloader.dataset.data_root=nowhere",
    ]
    done = tool("preflight.py", GN_ALL, "--no-run", "--cfg-options", *options, check=False)
    assert done.returncode == 1
    failed = lines_of(done, "FAIL")
    assert failed.pop("train images").startswith(f"10 of 10 images are not in {coco}/val2017: ")
    assert "1 of 80 classes are no categories of the annotation file: person; its 80" in (
        failed.pop(f"val annotations, {annotations}")
    )
    assert failed.pop("test data").startswith(
        "the test data has no nowhere/annotations/instances_val2017.json. Set data_root"
    )
    assert failed.pop("load_from").startswith(
        f"{other} is the checkpoint of another model: it holds fc.weight, and none of the "
    )
    assert not failed
    ok = lines_of(done, "OK")
    assert ok["batch"].startswith("4 GPU(s) (the config's name) x 4 image(s) = 16 images per step")
    assert ok["CBN"] == "there is none in the model"
    text = lines_of(done, "NOTE")["model.backbone.init_cfg.checkpoint"]
    # The 53 convolutions, and scale and shift of the 4 shortcuts' norms, whose names name no norm.
    assert text.startswith("61 of the 159 weights of ResNet are in")
    assert (
        "98 are not, and keep their initial values: gn1.weight, gn1.bias, layer1.0.gn1.weight"
        in text
    )
    assert re.search(r"\d+ of the file are not used: bn1.weight, bn1.bias, bn1.running_mean", text)


def test_what_fails_in_training(tool, small_config, tmp_path):
    """A CBN after a convolution that it cannot follow; the evaluation is tried all the same."""
    extra = f"""
{BENT_CONV}
custom_hooks = []
sync_bn = "torch"
init_cfg = dict(_delete_=True, type="Pretrained", checkpoint="none.pth")
backbone = dict(init_cfg=init_cfg, frozen_stages=1)
model = dict(backbone=backbone, neck=dict(conv_cfg=dict(type="Bent")))
"""
    config = small_config(tmp_path, DIGITS, extra).rename(tmp_path / "mine.py")
    done = tool("preflight.py", config, check=False)
    assert done.returncode == 1
    failed = lines_of(done, "FAIL")
    assert set(failed) == {"CBNHook", "model.backbone.init_cfg.checkpoint", "training", "links"}
    assert failed["CBNHook"].startswith("sync_bn turns all 32 CBN layers into SyncBN: take it out")
    assert re.match(
        r"RuntimeError: CBN layer 'neck.lateral_convs.\d.bn' \(CBN\): was handed a tensor .* use "
        "another norm here, .*compensate=False",
        failed["training"],
    )
    assert "CBN layers met no convolution, neck." in failed["links"]
    assert re.search(r"│ backbone.layer2.0.bn1 +│ backbone.layer2.0.conv1 +│", done.stdout)
    assert re.search(r"│ roi_head.bbox_head.shared_convs.0.bn +│ none +│", done.stdout)
    assert lines_of(done, "OK")["batch"].startswith("1 GPU(s) (WORLD_SIZE, or 1) x 1 image(s) = 1")
    notes = lines_of(done, "NOTE")
    assert "tools/train.py adds the default one" in notes["CBNHook"]
    assert notes["links"].startswith("5 of 32 CBN layers only repeat their running statistics, ")
    assert ", without model.backbone.init_cfg.checkpoint" in done.stdout
    assert lines_of(done, "OK")["evaluation"].startswith("4 images in ")


def test_norms_that_are_no_cbn(tool, small_config, tmp_path):
    norm = 'dict(_delete_=True, type="BN", requires_grad=True)'
    extra = f"model = dict(backbone=dict(norm_cfg={norm}))"
    done = tool("preflight.py", small_config(tmp_path, DIGITS, extra), "--images", "1")
    note = lines_of(done, "NOTE")["other norms"]
    assert note.startswith("20 batch norms that are no CBN train, too, 'backbone.bn1' (Batch")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.py"], "the config file none.py does not exist"),
        ([MASK_RCNN, "--images", "0"], "takes a whole number of at least 1, got 0"),
        ([MASK_RCNN, "--cfg-options", "modle.type=FCOS"], "did you mean model?"),
    ],
)
def test_usage(tool, arguments, message):
    done = tool("preflight.py", *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stdout
