"""Classifiers of MMPretrain and segmentors of MMSegmentation: every config, and the tools."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from test_distributed import on_two_ranks
from torch import nn

from cbn_mmdet import BRN, CBN, MABN, CenConv2d, links

pytestmark = pytest.mark.slow
outside = pytest.mark.skipif(
    not (find_spec("mmpretrain") and find_spec("mmseg")),
    reason="needs mmpretrain and mmseg: pip install 'cbn_mmdet[outside]'",
)

IMAGENET = ROOT / "configs/imagenet"
CITYSCAPES = ROOT / "configs/cityscapes/fcn_r50-d8_cbn_8xb1-40k_cityscapes-512x1024.py"
PAPER = dict(window="sliding", window_size=4, backward="current", derivative_stride=1)
# By the norm in the name: the layer, some of its settings, and the epochs of its burn-in.
NORMS = {
    "bn": (nn.BatchNorm2d, {}, None),
    "gn": (nn.GroupNorm, dict(num_groups=32), None),
    "brn": (BRN, {}, None),
    "mabn": (MABN, {}, None),
    "naive-cbn": (CBN, dict(PAPER, compensate=False), 25),
    "cbn-paper": (CBN, dict(PAPER, compensate=True), 25),
    "cbn": (CBN, dict(window="moving", window_size="auto", backward="mixed"), 1),
}
LEAVES = [f"resnet18_{norm}" for norm in NORMS]
LEAVES += [f"resnet50_{norm}" for norm in ("bn", "gn", "cbn-paper", "cbn")]

# Settings that a CPU can afford.
FEW = """
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=r"{data}", {train}),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=r"{data}", {val}),
)
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1))
{extra}
"""
IMAGENET_TRAIN = """indices=8, pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=64),
    dict(type="PackInputs"),
]"""
IMAGENET_VAL = """indices=4, pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=64, edge="short"),
    dict(type="CenterCrop", crop_size=64),
    dict(type="PackInputs"),
]"""
CITYSCAPES_TRAIN = """pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=(64, 64), cat_max_ratio=0.75),
    dict(type="PackSegInputs"),
]"""
CITYSCAPES_VAL = """pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]"""
# The same depth, with few channels.
THIN = "model = dict(backbone=dict(stem_channels=8, base_channels=8), head=dict(in_channels=64))"
THIN_FCN = """model = dict(
    data_preprocessor=dict(size=(64, 64)),
    pretrained=None,
    backbone=dict(stem_channels=8, base_channels=8),
    decode_head=dict(in_channels=256, channels=32),
    auxiliary_head=dict(in_channels=128, channels=16),
)"""


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's 1,000 folders, with one small image each."""
    root = tmp_path_factory.mktemp("data") / "imagenet"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 70, 80, 3), dtype=np.uint8)
    images = [cv2.imencode(".jpg", each)[1].tobytes() for each in pixels]
    for number in range(2000):
        folder = root / ("val" if number % 2 else "train") / f"n{number // 2:08}"
        folder.mkdir(parents=True)
        (folder / f"{number}.JPEG").write_bytes(images[number % 8])
    return root


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """Images of one generated city, in the folders and with the file names of Cityscapes."""
    root, rng = tmp_path_factory.mktemp("data") / "cityscapes", np.random.default_rng(0)
    for split, count in ("train", 3), ("val", 2):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / "town").mkdir(parents=True)
        for number in range(count):
            name = f"{split}/town/town_{number:06}_000019"
            truth = np.repeat(rng.integers(0, 19, (2, 4), dtype=np.uint8), 32, 0).repeat(32, 1)
            image = rng.normal(truth[..., None] * 10 + 30, 8, (*truth.shape, 3)).clip(0, 255)
            truth[:4] = 255  # the label that training ignores
            for path, pixels in (
                (f"leftImg8bit/{name}_leftImg8bit.png", image.astype(np.uint8)),
                (f"gtFine/{name}_gtFine_labelTrainIds.png", truth),
            ):
                assert cv2.imwrite(str(root / path), pixels)
    return root


@pytest.fixture(scope="module")
def classifier(imagenet):
    """Writes a config of ``configs/imagenet`` for the small images."""

    def write(folder, name, extra=THIN):
        base = IMAGENET / f"{name if 'xb' in name else f'{name}_8xb32_in1k'}.py"
        return small(folder, base, imagenet, IMAGENET_TRAIN, IMAGENET_VAL, extra)

    return write


@pytest.fixture(scope="module")
def segmentor(cityscapes):
    """Writes the config of ``configs/cityscapes`` for the small images."""

    def write(folder, extra=""):
        extra = (
            f"{THIN_FCN}\ntrain_cfg = dict(max_iters=4, val_interval=4)\n"
            "custom_hooks = [dict(type='CBNHook', burn_in=2, by_epoch=False)]\n"
            f"default_hooks['checkpoint'] = dict(interval=4)\n{extra}"
        )
        path = small(folder, CITYSCAPES, cityscapes, CITYSCAPES_TRAIN, CITYSCAPES_VAL, extra)
        path.write_text(path.read_text().replace("batch_size=2", "batch_size=1"))
        return path

    return write


def small(folder, base, data, train, val, extra):
    folder.mkdir(exist_ok=True)
    path = folder / base.name
    text = FEW.format(data=data, train=train, val=val, extra=extra)
    path.write_text(f"_base_ = {str(base)!r}\n{text}")
    return path


def logged(work_dir, key):
    """What the runs in a work dir logged under a key, in order."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def lines_of(done, status):
    """The lines of ``tools/preflight.py`` with a status, by the name of their check."""
    return dict(re.findall(rf"^{status:4}  ([^:]+?): (.*)$", done.stdout, re.MULTILINE))


# The configs.


def test_the_burn_in_of_the_segmentor():
    """Its burn-in is in iterations, as its loop counts."""
    hooks = re.findall(r"^custom_hooks = (.*)$", CITYSCAPES.read_text(), re.MULTILINE)
    assert hooks == ['[dict(type="CBNHook", burn_in=1000, by_epoch=False)]']


def test_which_there_are():
    found = {path.stem for path in IMAGENET.glob("*.py")}
    assert found == {f"{name}_8xb32_in1k" for name in LEAVES} | {"resnet18_cbn_8xb1_in1k"}
    page = (ROOT / "docs/beyond-detection.md").read_text()
    for path in (*IMAGENET.glob("*.py"), CITYSCAPES):
        assert f"](../{path.relative_to(ROOT)})" in page


@outside
@pytest.mark.parametrize("name", LEAVES)
def test_config_trains_and_evaluates(name, classifier, tmp_path):
    """Three steps and an evaluation, at full width; only the norm is not MMPretrain's."""
    depth, norm = re.fullmatch(r"resnet(\d+)_(.+)", name).groups()
    kind, settings, burn_in = NORMS[norm]
    cfg = Config.fromfile(IMAGENET / f"{name}_8xb32_in1k.py")
    hooks = [each for each in cfg.get("custom_hooks", []) if each.type == "CBNHook"]
    assert [each.burn_in for each in hooks] == ([] if burn_in is None else [burn_in])
    stock = Config.fromstring(f"_base_ = 'mmpretrain::resnet/resnet{depth}_8xb32_in1k.py'", ".py")
    assert cfg.auto_scale_lr.pop("enable")
    assert cfg.model.backbone.pop("norm_cfg")
    assert cfg.model.backbone.pop("conv_cfg", None) == (
        dict(type="CenConv2d") if norm == "mabn" else None
    )
    for key, value in stock.items():
        assert cfg[key] == value, key

    loop = "train_cfg = dict(by_epoch=False, _delete_=True, max_iters=3, val_interval=3)"
    hook = "custom_hooks = [dict(type='CBNHook', burn_in=0)]" if hooks else ""
    cfg = Config.fromfile(classifier(tmp_path, name, f"{loop}\n{hook}"))
    cfg.default_hooks.checkpoint = None
    runner = Runner.from_cfg(Config(dict(cfg, work_dir=str(tmp_path / "work"))))
    model = runner.model
    layers = [each for each in model.modules() if isinstance(each, kind)]
    count = {"18": 20, "50": 53}[depth]
    assert len(layers) == count
    for key, value in settings.items():
        assert {getattr(layer, key) for layer in layers} == {value}
    assert sum(isinstance(each, CenConv2d) for each in model.modules()) == (
        count if norm == "mabn" else 0
    )
    runner.train()
    assert len(links(model)) == (count if kind is CBN else 0)
    assert all(each.window_bytes > 0 for each in layers if isinstance(each, CBN))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    losses = logged(tmp_path / "work", "loss")
    assert len(losses) == 3 and all(np.isfinite(losses))
    (top1,) = logged(tmp_path / "work", "accuracy/top1")
    assert 0 <= top1 <= 100


@outside
def test_the_config_of_one_image():
    """The config of one image differs from that of 32 in momentum and batch size alone."""
    one, of_32 = (
        Config.fromfile(IMAGENET / f"resnet18_cbn_8xb{images}_in1k.py") for images in (1, 32)
    )
    of_32.merge_from_dict(
        {"model.backbone.norm_cfg.momentum": 0.02, "train_dataloader.batch_size": 1}
    )
    assert one.to_dict() == of_32.to_dict()


@outside
@pytest.mark.parametrize("images", [32, 4, 1])
def test_images_per_gpu(images, tool, classifier, tmp_path):
    """One option sets the images per GPU; the learning rate follows from the first step on."""
    extra = f"{THIN}\ntrain_cfg = dict(max_epochs=2, val_begin=2)"
    config = classifier(tmp_path, f"resnet18_cbn_8xb{1 if images == 1 else 32}_in1k", extra)
    option = f"train_dataloader.batch_size={images}"
    done = tool("preflight.py", config, "--no-run", "--gpus", 8, "--cfg-options", option)
    ok = lines_of(done, "OK")
    assert ok["batch"].startswith(f"8 GPU(s) (--gpus) x {images} image(s) = {8 * images} images")
    assert ok["learning rate"].startswith(f"{0.1 * images / 32:g} in force")
    if images == 32:
        return
    tool(
        *("train.py", config, "--work-dir", tmp_path / "work"),
        *("--cfg-options", option, "default_hooks.checkpoint.interval=-1"),
    )
    assert logged(tmp_path / "work", "lr") == pytest.approx(
        [0.1 * images / 256] * (8 // images) * 2
    )
    assert len(logged(tmp_path / "work", "accuracy/top1")) == 1


@outside
def test_other_depths(classifier, tmp_path):
    """The page's options turn a ResNet-18 config into that of a ResNet-50."""
    options = "model.backbone.depth=50 model.head.in_channels=2048"
    assert f"`{options}`" in (ROOT / "docs/beyond-detection.md").read_text()
    made = Config.fromfile(IMAGENET / "resnet18_cbn_8xb32_in1k.py")
    made.merge_from_dict(
        {key: int(value) for key, value in (each.split("=") for each in options.split())}
    )
    assert made.to_dict() == Config.fromfile(IMAGENET / "resnet50_cbn_8xb32_in1k.py").to_dict()


# The tools.


@pytest.fixture(scope="module")
def trained(tool, classifier, tmp_path_factory):
    """A classifier trained for two epochs, with a resume between them."""
    folder = tmp_path_factory.mktemp("classifier")
    schedule = "train_cfg = dict(max_epochs=2)\ncustom_hooks = [dict(type='CBNHook', burn_in=1)]"
    config, work_dir = classifier(folder, "resnet18_cbn", f"{THIN}\n{schedule}"), folder / "work"
    arguments = "train.py", config, "--work-dir", work_dir
    first = ("train_cfg.max_epochs=1", "custom_hooks.0.burn_in=0")
    tool(*arguments, "--cfg-options", *first)
    done = tool(*arguments, "--resume")
    return config, work_dir, done.stdout


@outside
def test_train_and_resume(trained):
    _, work_dir, output = trained
    assert re.search(r"resumed epoch: 1, iter: 4\b", output)
    assert "CBNHook: 20 CBN layers" in output and "start empty" not in output
    assert len(logged(work_dir, "loss")) == 8
    assert len(logged(work_dir, "accuracy/top1")) == 2
    assert (work_dir / "epoch_2.pth").exists()


@outside
def test_preflight(tool, classifier, tmp_path):
    config = classifier(tmp_path, "resnet18_cbn-paper")
    done = tool("preflight.py", config)
    ok = lines_of(done, "OK")
    assert ok["train images"] == "8 images, 1000 classes; 8 tried, which can be read"
    assert ok["val images"] == "4 images, 1000 classes; 4 tried, which can be read"
    assert ok["batch"].endswith("16 images per step, at most 1 steps per epoch")
    assert ok["learning rate"] == "0.00625 in force (0.1 is for 256 images per step)"
    assert ok["model"].startswith("ImageClassifier, ")
    assert ok["CBNHook"] == "the window opens after 25 epochs of 100"
    assert ok["links"].startswith("all 20 CBN layers have what they need")
    assert "computed: accuracy/top1, accuracy/top5" in ok["evaluation"]
    assert done.stdout.endswith("no check failed\n")


@outside
def test_preflight_finds_what_is_wrong(tool, classifier, imagenet, tmp_path):
    config = classifier(tmp_path, "resnet18_cbn")
    roots = [f"{split}_dataloader.dataset.data_root=" for split in ("train", "val")]
    few = tmp_path / "few"
    (few / "train/n0").mkdir(parents=True)
    (few / "train/n0/a.JPEG").write_bytes(b"none")
    options = [f"{roots[0]}{few}", f"{roots[1]}{tmp_path / 'nowhere'}"]
    done = tool("preflight.py", config, "--no-run", "--cfg-options", *options, check=False)
    failed = lines_of(done, "FAIL")
    assert done.returncode == 1
    assert "number of subfolders (1) doesn't match the number of" in failed["train images"]
    assert "the val data has no " in failed["val data"] and "nowhere/val" in failed["val data"]
    (few / "meta").mkdir()
    (few / "meta/train.txt").write_text("n0/a.JPEG 0\n")
    options[1:] = ["train_dataloader.dataset.indices=1"]
    done = tool("preflight.py", config, "--no-run", "--cfg-options", *options, check=False)
    assert "1 of 1 images tried cannot be read: " in lines_of(done, "FAIL")["train images"]
    done = tool("train.py", config, "--cfg-options", f"{roots[0]}nowhere", check=False, apart=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: error: the train data has no nowhere/train. Set data_root")


@outside
def test_test(trained, tool, tmp_path):
    config, work_dir, _ = trained
    out, show = tmp_path / "results.pkl", tmp_path / "show"
    done = tool(
        *("test.py", config, work_dir / "epoch_2.pth", "--work-dir", tmp_path / "work"),
        *("--out", out, "--show-dir", show, "--precise-stats", 4),
    )
    assert "PreciseStatsHook: statistics of 20 layers from 4 images" in done.stdout
    assert re.search(r"accuracy/top1: \d+\.\d+", done.stdout)
    assert [each["pred_score"].shape for each in pickle.loads(out.read_bytes())] == [(1000,)] * 4
    assert len(list(show.rglob("*.png"))) == 4


@outside
def test_publish(trained, tool, tmp_path):
    """The published checkpoint is for BN and gives the same outputs."""
    config, work_dir, _ = trained
    out = tmp_path / "published.pth"
    done = tool("publish.py", work_dir / "epoch_2.pth", out)
    assert "for type='BN'" in done.stdout
    found = torch.load(out, weights_only=True)
    dumped = Config.fromstring(found["meta"]["cfg"], ".py")
    assert dumped.model.backbone.norm_cfg == dict(type="BN", requires_grad=True)
    assert "custom_imports" not in dumped and not dumped.custom_hooks
    outputs = evaluate_both(out, config, work_dir / "epoch_2.pth")
    assert torch.equal(*outputs)


def evaluate_both(published, config, checkpoint):
    """The outputs of the model of a published checkpoint, and of the model that was published."""
    init_default_scope("mmpretrain")
    dumped = Config.fromstring(torch.load(published)["meta"]["cfg"], ".py")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for cfg, path in (dumped, published), (Config.fromfile(config), checkpoint):
        model = MODELS.build(cfg.model).eval()
        state = torch.load(path, weights_only=False)["state_dict"]
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            outputs.append(model(x, mode="tensor")[0])
    return outputs


@outside
def test_publish_of_moving_averages(tool, classifier, tmp_path):
    """MABN has buffers that BN lacks, and its published model keeps this package's convolution."""
    config, work_dir = classifier(tmp_path, "resnet18_mabn"), tmp_path / "work"
    tool("train.py", config, "--work-dir", work_dir, "--cfg-options", "train_cfg.max_epochs=1")
    tool("publish.py", work_dir / "epoch_1.pth", tmp_path / "published.pth")
    outputs = evaluate_both(tmp_path / "published.pth", config, work_dir / "epoch_1.pth")
    torch.testing.assert_close(*outputs)


@outside
def test_two_processes(tool, classifier, tmp_path):
    """Two processes share an epoch and scale the learning rate; they resume, test and publish."""
    schedule = "train_cfg = dict(max_epochs=2)\ncustom_hooks = [dict(type='CBNHook', burn_in=1)]"
    config, work_dir = (
        classifier(tmp_path, "resnet18_cbn", f"{THIN}\n{schedule}"),
        tmp_path / "work",
    )
    option = "--cfg-options", "model.backbone.norm_cfg.window_size=4"
    arguments = config, "--work-dir", work_dir, *option
    on_two_ranks(tool, ROOT, *arguments, cwd=tmp_path)
    assert logged(work_dir, "lr") == pytest.approx([0.1 * 4 / 256] * 4)
    assert logged(work_dir, "cbn/window_size") == [1, 1, 4, 4]
    assert len(logged(work_dir, "accuracy/top1")) == 2
    on_two_ranks(tool, ROOT, *arguments, "train_cfg.max_epochs=3", "--resume", cwd=tmp_path)
    assert logged(work_dir, "cbn/window_size")[4:] == [4, 4]
    arguments = config, work_dir / "epoch_3.pth", "--work-dir", tmp_path / "test"
    said = on_two_ranks(tool, ROOT, *arguments, cwd=tmp_path, name="test.py")
    assert re.search(r"accuracy/top1: \d+\.\d+", said)
    tool("publish.py", work_dir / "epoch_3.pth", tmp_path / "published.pth")
    outputs = evaluate_both(tmp_path / "published.pth", config, work_dir / "epoch_3.pth")
    assert torch.equal(*outputs)


@outside
def test_tables_and_plot(trained, tool, tmp_path):
    _, work_dir, _ = trained
    done = tool("tables.py", work_dir, "--plot", tmp_path / "top1.png")
    header, _, row = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:5]]
    row = {name.strip(): text.strip() for name, text in zip(header, row, strict=True)}
    assert row["config"] == "resnet18_cbn_8xb32_in1k"
    assert float(row["top-1"]) == pytest.approx(logged(work_dir, "accuracy/top1")[-1], abs=0.006)
    assert row["images per GPU"] == "2" and row["trained for"] == "2 epochs"
    assert "train_dataloader.batch_size" in row["other than the config's"]
    assert (tmp_path / "top1.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_several(tool_module, tmp_path):
    """Each config has a line: the means of its finished runs, over the batch sizes."""
    from common.errors import UsageError
    from common.runs import Run
    from matplotlib.figure import Figure

    def run(config, images, value, step=2, key="accuracy/top1", depth=18, momentum=0.02):
        norm_cfg = [dict(type="BN", momentum=momentum * images)]
        settings = dict(train_cfg=dict(max_epochs=2), train_dataloader=dict(batch_size=images))
        settings.update(model=dict(depth=depth, norm_cfg=norm_cfg))
        return Run(f"{config}_{images}", None, config, settings, [], [{key: value, "step": step}])

    tables = tool_module("tables")
    bn, cbn = "resnet18_bn_8xb32_in1k", "resnet18_cbn_8xb32_in1k"
    runs = [run(cbn, 1, 60.0), run(cbn, 1, 62.0), run(cbn, 4, 70.0), run(bn, 4, 50.0)]
    axes = Figure().subplots()
    tables.plot_top1(axes, [*runs, run(bn, 1, 20.0, step=1)])
    lines = {each.get_label(): each.get_xydata().tolist() for each in axes.get_lines()}
    assert lines["resnet18_cbn_in1k"] == [[1, 61], [4, 70]]
    assert lines["resnet18_bn_in1k"] == [[4, 50]]
    axes = Figure().subplots()  # another depth, by --cfg-options
    others = run(cbn, 4, 80.0, depth=50), replace(run(cbn, 4, 30.0, momentum=0.1), work_dir="a")
    tables.plot_top1(axes, [*runs, *others])
    lines = {each.get_label(): each.get_xydata().tolist() for each in axes.get_lines()}
    assert lines[f"resnet18_cbn_in1k ({cbn}_1)"] == [[1, 61], [4, 70]]
    assert lines[f"resnet18_cbn_in1k ({cbn}_4)"] == [[4, 80]]
    assert lines["resnet18_cbn_in1k (a)"] == [[4, 30]]
    with pytest.raises(UsageError, match="is a classifier's and faster_1 a detector's"):
        tables.plot([*runs, run("faster", 1, 0.3, key="coco/bbox_mAP")], tmp_path / "a.png")
    with pytest.raises(UsageError, match="none of the classifiers' runs has finished"):
        tables.plot([run(bn, 1, 20.0, step=1)], tmp_path / "a.png")


@outside
def test_segmentation(tool, segmentor, tmp_path):
    """A segmentor is checked, trained by iterations, resumed, tested, published and tabled."""
    config, work_dir = segmentor(tmp_path), tmp_path / "work"
    cfg = Config.fromfile(CITYSCAPES)
    assert cfg.train_dataloader.batch_size == 1 and "SyncBN" not in cfg.pretty_text
    done = tool("preflight.py", config, "--gpus", 8)
    ok = lines_of(done, "OK")
    assert ok["train images"] == "3 images, 19 classes; 6 tried, which can be read"
    assert ok["learning rate"].startswith("0.01 in force")
    assert ok["CBNHook"] == "the window opens after 2 iterations of 4"
    assert ok["links"].startswith("all 59 CBN layers have what they need")
    assert "mIoU" in ok["evaluation"]

    arguments = "train.py", config, "--work-dir", work_dir
    tool(*arguments)
    assert (
        "resumed" in tool(*arguments, "--resume", "--cfg-options", "train_cfg.max_iters=8").stdout
    )
    assert len(logged(work_dir, "loss")) == 8
    assert logged(work_dir, "cbn/window_size")[:2] == [1, 1]
    assert (work_dir / "iter_8.pth").exists()
    assert logged(work_dir, "lr")[0] == pytest.approx(0.01 / 8)

    show = tmp_path / "show"
    done = tool(
        *("test.py", config, work_dir / "iter_8.pth", "--work-dir", tmp_path / "test"),
        *("--show-dir", show),
    )
    assert "mIoU" in done.stdout and len(list(show.rglob("*.png"))) == 2
    tool("publish.py", work_dir / "iter_8.pth", tmp_path / "published.pth")
    text = torch.load(tmp_path / "published.pth", weights_only=True)["meta"]["cfg"]
    assert "CBN" not in text
    done = tool("tables.py", work_dir)
    assert re.search(r"\| mIoU +\|", done.stdout) and "box AP" not in done.stdout


# Without MMPretrain and MMSegmentation.


def test_who_does_not_use_them_does_not_need_them(small_config, tmp_path):
    """A detector is checked, trained, tested, published and tabled without either package."""
    config = small_config(tmp_path, "faster-rcnn_r18_fpn_cbn-all_1xb2_digits")
    work_dir = tmp_path / "work"
    short = ["--cfg-options", "train_cfg.max_epochs=1", "custom_hooks.0.burn_in=0"]
    commands = [
        ["preflight.py", config, "--images", 1],
        ["train.py", config, "--work-dir", work_dir, *short],
        ["test.py", config, work_dir / "epoch_1.pth", "--work-dir", tmp_path / "test"],
        ["publish.py", work_dir / "epoch_1.pth", tmp_path / "published.pth"],
        ["tables.py", work_dir],
    ]
    code = """
import json, os, runpy, sys
for name in ("mmpretrain", "mmseg"):
    sys.modules[name] = None
import mmdet.apis, mmdet.models
sys.path.insert(0, "tools")
for command in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = command
        runpy.run_path(f"tools/{command[0]}", run_name="__main__")
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{command} failed")
"""
    text = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", code, text], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list((tmp_path / "test").glob("*/*.json"))
    code = "import sys, cbn_mmdet; assert not {'mmdet', 'mmpretrain', 'mmseg'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
