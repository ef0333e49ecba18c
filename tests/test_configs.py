"""Every config builds, every CBN in it is linked, and every config is listed in its README."""

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from cbn_mmdet import CBN, link, links, set_window, step

CONFIGS = sorted((ROOT / "configs").glob("*/*.py"))


def test_there_are_configs():
    assert len(CONFIGS) >= 11


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_listed(path):
    assert f"({path.name})" in (path.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains_and_predicts(path, digits):
    """Two iterations with an open window, and one in evaluation, on real images."""
    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    loader = dict(cfg.train_dataloader, num_workers=0, persistent_workers=False)
    loader["dataset"]["data_root"] = f"{digits}/"
    batches = list(Runner.build_dataloader(loader, seed=0))[:2]
    model = MODELS.build(cfg.model)
    model.init_weights()
    layers = [name for name, module in model.named_modules() if isinstance(module, CBN)]
    assert link(model) == len(layers)
    assert bool(layers) == ("cbn" in path.stem)
    assert any(hook["type"] == "CBNHook" for hook in cfg.get("custom_hooks", [])) == bool(layers)
    if layers:
        set_window(model, 8)
    model.train()
    for batch in batches:
        losses = model(**model.data_preprocessor(batch, True), mode="loss")
        loss, _ = model.parse_losses(losses)
        assert loss.isfinite()
        loss.backward()
        step(model)
    assert set(links(model)) == set(layers)
    model.eval()
    with torch.no_grad():
        assert len(model.test_step(batches[0])) == loader["batch_size"]
