"""What the wheel contains, and what works without a clone.

With torch alone the layer trains; with OpenMMLab's packages the configs and tools run.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

MIM = "cbn_mmdet/.mim"
CONFIG = "configs/faster_rcnn/faster-rcnn_r50_fpn_cbn_16xb1-1x_coco.py"
# Settings that a CPU can afford; a barely trained detector detects nothing with confidence.
SMALL = [
    "train_dataloader.dataset.indices=4",
    "train_dataloader.dataset.pipeline.2.scale=(96,64)",
    "val_dataloader.dataset.pipeline.1.scale=(96,64)",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "model.backbone.init_cfg=None",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.test_cfg.rpn.max_per_img=10",
    "model.test_cfg.rcnn.score_thr=0",
    "train_cfg.max_epochs=1",
    "custom_hooks.0.burn_in=0",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.interval=-1",
]
TORCH_ALONE = """
import sys
from importlib.metadata import version
from importlib.util import find_spec

import torch

import cbn_mmdet

assert not any(map(find_spec, ["mmengine", "mmcv", "mmdet", "numpy"]))
assert cbn_mmdet.__version__ == version("cbn_mmdet")
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), cbn_mmdet.CBN(4), torch.nn.ReLU())
cbn_mmdet.link(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    loss = model(torch.randn(1, 3, 8, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    cbn_mmdet.step(model)
assert loss.isfinite() and model[1].weight.grad.abs().sum() > 0
assert model[1].window_bytes > 0
print(cbn_mmdet.__file__)
"""


def environment():
    """The environment without the variables that lead another Python to this one's packages."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, **{"env": environment(), **options}
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def build(source, folder):
    """Builds the wheel of a folder or of an sdist, with the build tools installed here."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", source, *options)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A clone without ignored files, except compiled ones, which must stay out of the wheel."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("cbn_mmdet", "configs", "docs", "studies", "tests", "tools"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("cbn_mmdet", "tools"):
        (folder / name / "__pycache__").mkdir()
        (folder / name / "__pycache__" / "train.cpython-311.pyc").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, tmp_path_factory.mktemp("wheel"))


def install(wheel, folder, others):
    """A Python with the wheel and the packages in ``others``, whose .pth files it ignores.

    The .pth file of an editable install would lead to the clone.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    run(*pip, "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n")
    return python, site


def files_of(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("source", ["clone", "sdist"])
def test_files(source, wheel, tree, tmp_path):
    """The wheel holds the method, its hooks, and a .mim folder as OpenMMLab's packages do."""
    if source == "sdist":
        code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
        run(sys.executable, "-c", code, cwd=tree)
        (archive,) = tmp_path.glob("*.tar.gz")
        wheel = build(archive, tmp_path)
    expected = {"cbn_mmdet/__init__.py", f"{MIM}/model-index.yml"}
    for room in ("norm", "hooks"):
        expected |= {f"cbn_mmdet/{room}/{name}" for name in files_of(tree / "cbn_mmdet" / room)}
    for name in ("configs", "tools"):
        files = {each for each in files_of(tree / name) if not each.startswith("photos/")}
        expected |= {f"{MIM}/{name}/{each}" for each in files}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_index(wheel):
    """All that index and metafiles name is there; config names are unique, as mim requires."""
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    configs = [name for name in names if re.fullmatch(rf"{MIM}/configs/\w+_rcnn/.*\.py", name)]
    for config in configs:
        assert [os.path.basename(name) for name in names].count(os.path.basename(config)) == 1
    published = 0
    for path in yaml.safe_load(archive.read(f"{MIM}/model-index.yml"))["Import"]:
        metafile = yaml.safe_load(archive.read(f"{MIM}/{path}"))
        assert {f"{MIM}/{each['README']}" for each in metafile["Collections"]} <= set(names)
        found = {f"{MIM}/{model['Config']}" for model in metafile["Models"]}
        assert found <= set(configs)
        published += len(found)
    assert published == 9


def test_beside_torch_alone(wheel, tmp_path):
    """With only the wheel, torch and torch's requirements installed, the layer trains."""
    others = tmp_path / "others"
    others.mkdir()
    wanted = ["torch"]
    for name in wanted:
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and requirement.name not in wanted:
                wanted.append(requirement.name)
    for each in map(distribution, wanted):
        for top in {path.parts[0] for path in each.files} - {"..", "__pycache__"}:
            if not (others / top).exists():
                (others / top).symlink_to(each.locate_file(top))
    python, site = install(wheel, tmp_path / "python", others)
    said = run(python, "-W", "ignore", "-c", TORCH_ALONE, cwd=tmp_path)
    assert said.splitlines()[-1] == str(site / "cbn_mmdet" / "__init__.py")


@pytest.fixture(scope="module")
def installed(wheel, coco, tmp_path_factory):
    """A Python with the wheel and this one's packages, and a folder with COCO in data/coco."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "data").mkdir()
    (folder / "data" / "coco").symlink_to(coco)
    others = Path(sysconfig.get_path("purelib"))
    python, site = install(wheel, folder / "python", others)
    code = "from importlib.util import find_spec; print(find_spec('cbn_mmdet').origin)"
    assert run(python, "-c", code, cwd=folder).strip() == str(site / "cbn_mmdet" / "__init__.py")
    return folder, python, site


# Reads the first and the last config of each folder whose package is installed.
READ = """
import sys
from importlib.util import find_spec
from pathlib import Path
from mmengine.config import Config

needed = {"imagenet": "mmpretrain", "cityscapes": "mmseg"}
count = 0
for folder in Path(sys.argv[1]).glob("[!_]*"):
    paths = sorted(folder.glob("*.py"))
    for path in {*paths[:1], *paths[-1:]}:
        if not find_spec(needed.get(folder.name, "mmdet")):
            continue
        assert "cbn_mmdet" in Config.fromfile(path).custom_imports.imports, path
        count += 1
print(count)
"""


def test_configs_are_read(installed):
    """Configs can be read by their path in the package, from any folder."""
    folder, python, site = installed
    configs = site / MIM / "configs"
    said = run(python, "-W", "ignore", "-c", READ, configs, cwd=folder)
    assert int(said.splitlines()[-1]) >= 4


@pytest.mark.parametrize("tool", ["mmdet's train.py", "dist_train.sh"])
def test_a_config_trains(tool, installed):
    """A packaged config trains with MMDetection's own tool, as openmim runs it, and with ours."""
    folder, python, site = installed
    mim = site / "cbn_mmdet" / ".mim"
    if tool == "dist_train.sh":  # which runs tools/train.py
        command = [mim / "tools" / tool, mim / CONFIG, "1"]
    else:
        mmdet = Path(find_spec("mmdet").origin).parent
        command = [python, mmdet / ".mim/tools/train.py", mim / CONFIG, "--launcher", "none"]
    path = f"{python.parent}:{os.environ['PATH']}"
    env = {**environment(), "PATH": path, "OMP_NUM_THREADS": "1"}
    said = run(*command, "--cfg-options", *SMALL, cwd=folder, env=env)
    steps = re.findall(r"Epoch\(train\).* loss: [\d.]+.* cbn/window_size: ([\d.]+)", said)
    assert len(steps) == 4 and float(steps[-1]) > 1
    assert "coco/bbox_mAP" in said
