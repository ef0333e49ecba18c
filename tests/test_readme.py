"""The README's example, and what it and the pages beside it say of options, commands and torch."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def example(part):
    (block,) = [block for block in PYTHON if part in block]
    return block


@pytest.mark.slow
def test_config():
    """The complete config builds, every CBN is linked, and the hook it names is there."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config
    from mmengine.registry import HOOKS, init_default_scope

    from cbn_mmdet import CBN, CBNHook, link, links, step

    cfg = Config.fromstring(example("_base_ = "), ".py")
    init_default_scope("mmdet")
    assert isinstance(HOOKS.build(cfg.custom_hooks[0]), CBNHook)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).train()
    assert link(model) == sum(isinstance(module, CBN) for module in model.modules()) == 12
    for _ in range(2):
        data = demo_mm_inputs(1, [[3, 128, 128]], num_items=[2], num_classes=80)
        losses = model(**model.data_preprocessor(data, True), mode="loss")
        step(model)
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    assert len(links(model)) == 12
    assert links(model)["neck.fpn_convs.0.bn"] == "neck.fpn_convs.0.conv"


def test_options_are_the_layers():
    """The page's tables list each option of the layer and the hooks, with its default."""
    import inspect

    from cbn_mmdet import CBN, CBNHook, DiagnoseHook, PreciseStatsHook

    page = (ROOT / "docs" / "config.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| `?([^`|]+?)`? \|", page, re.MULTILINE))
    for owner, names in (
        (CBN, "window window_size backward momentum compensate derivative_stride"),
        (CBN, "sync window_dtype"),
        (CBNHook, "burn_in by_epoch save_window"),
        (DiagnoseHook, "interval"),
        (PreciseStatsHook, "num_images every_evaluation"),
    ):
        parameters = inspect.signature(owner).parameters
        for name in names.split():
            assert rows[name] == repr(parameters[name].default)


def test_commands_exist():
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", targets, re.MULTILINE)
    for tool in re.findall(r"tools/\w+\.(?:py|sh)", README):
        assert (ROOT / tool).exists()
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_layer_needs_torch_alone():
    """Without the OpenMMLab packages the layer imports, and trains in docs/pytorch.md's loop."""
    page = (ROOT / "docs" / "pytorch.md").read_text()
    build, loop, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = (
        "import sys\n"
        "for name in ('mmengine', 'mmcv', 'mmdet'): sys.modules[name] = None\n"
        "import cbn_mmdet\n"
        f"assert not hasattr(cbn_mmdet, 'CBNHook')\n{build}{loop}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
