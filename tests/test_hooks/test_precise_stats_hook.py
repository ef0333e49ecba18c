"""The hook in real runs: when it estimates, what the checkpoints have, and what goes on."""

import json
import random
import time

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from test_hooks.test_cbn_hook import LENGTH, Net, Noise, runner
from torch import nn
from torch.utils.data import IterableDataset

from cbn_mmdet import PreciseStatsHook


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {"count": len(results)}


def train(folder, *hooks, norm=None, dataset=None, loop=None, val_interval=2, **kwargs):
    """A run of 4 epochs, evaluated every other, with a checkpoint of each."""
    loop = loop or dict(by_epoch=True, max_epochs=4, val_interval=val_interval)
    torch.manual_seed(0)
    made, _ = runner(
        folder,
        dict(type="CBNHook", burn_in=1, by_epoch=loop["by_epoch"]),
        norm=norm,
        loop=loop,
        val_cfg=dict(),
        val_dataloader=dict(
            dataset=Noise(), batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False)
        ),
        val_evaluator=Evaluator([Nothing()]),
        **kwargs,
    )
    if dataset:
        made._train_dataloader["dataset"] = dataset
    for hook in hooks:
        made.register_hook(hook)
    made.train()
    return made


def precise(checkpoint):
    """Whether its statistics are those of all images at its weights."""
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    model = Net(nn.BatchNorm2d(4))
    model.load_state_dict(state)
    data = Noise()
    with torch.no_grad():
        y = model.body[0](torch.stack([data[i]["inputs"] for i in range(LENGTH)]))
    return torch.allclose(state["body.1.running_var"], y.var((0, 2, 3), unbiased=False), rtol=1e-4)


@pytest.mark.parametrize(
    "every_evaluation, expected",
    [(True, [False, True, False, True]), (False, [False] * 3 + [True])],
)
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(4)], ids=["CBN", "BN"])
def test_checkpoints_have_what_evaluations_use(tmp_path, norm, every_evaluation, expected):
    hook = PreciseStatsHook(num_images=100, every_evaluation=every_evaluation)
    train(tmp_path, hook, norm=norm)
    assert [precise(tmp_path / f"epoch_{n}.pth") for n in (1, 2, 3, 4)] == expected


def test_data_without_names(tmp_path):
    """A batch may be a sequence, which a model takes in its order."""

    class Unnamed(Noise):
        def __getitem__(self, index):
            return (super().__getitem__(index)["inputs"],)

    train(tmp_path, PreciseStatsHook(num_images=100), dataset=Unnamed())
    assert precise(tmp_path / "epoch_4.pth")


def test_iteration_based_loop(tmp_path):
    loop = dict(by_epoch=False, max_iters=7, val_interval=3)
    train(tmp_path, PreciseStatsHook(), loop=loop)
    found = [precise(tmp_path / f"iter_{n}.pth") for n in range(1, 8)]
    assert found == [False, False, True, False, False, True, True]


def test_intervals_that_change(tmp_path):
    loop = dict(by_epoch=True, max_epochs=4, val_interval=4, dynamic_intervals=[(3, 1)])
    train(tmp_path, PreciseStatsHook(), loop=loop)
    found = [precise(tmp_path / f"epoch_{n}.pth") for n in (1, 2, 3, 4)]
    evaluated = [
        record["step"]
        for path in tmp_path.rglob("scalars.json")
        for record in map(json.loads, path.read_text().splitlines())
        if "count" in record
    ]
    assert [n for n, it in enumerate(found, 1) if it] == evaluated == [2, 3, 4]


def test_evaluations_that_begin_late(tmp_path):
    loop = dict(by_epoch=True, max_epochs=4, val_interval=1, val_begin=3)
    train(tmp_path, PreciseStatsHook(), loop=loop)
    found = [precise(tmp_path / f"epoch_{n}.pth") for n in (1, 2, 3, 4)]
    assert found == [False, False, True, True]


def test_training_goes_on_as_without_it(tmp_path):
    """Weights and all random number generators go on as without the hook."""

    class Draw(Hook):
        priority = "LOWEST"

        def after_train_epoch(self, runner):
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    class Random(Noise):
        def __getitem__(self, index):
            draws = random.random() + np.random.rand() + torch.rand(()).item()
            return dict(inputs=super().__getitem__(index)["inputs"] + draws)

    ends = []
    for name in ("with", "without"):
        random.seed(0)
        np.random.seed(0)
        drawn = []
        hooks = [PreciseStatsHook()] if name == "with" else []
        run = train(tmp_path / name, *hooks, Draw(), dataset=Random())
        ends.append((run.model.state_dict(), drawn))
    for key, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][key]) != ("running_" in key), key
    assert ends[0][1] == ends[1][1] and len(ends[0][1]) == 4


def test_how_many_images(tmp_path):
    seen = []

    class Watched(Noise):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    run = train(tmp_path, dataset=Watched())
    run.model.train()
    seen.clear()
    PreciseStatsHook(num_images=2).estimate(run)
    assert seen == [0, 2]
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "PreciseStatsHook: statistics of 1 layers from 2 images in " in log


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (dict(num_images=0), "num_images must be a whole number of at least 1, got 0"),
        (dict(num_images=True), "num_images must be a whole number of at least 1, got True"),
        (dict(num_images="many"), "num_images must be .* got 'many'"),
        (dict(every_evaluation=1), "every_evaluation must be True or False, got 1"),
    ],
)
def test_bad_arguments(arguments, complaint):
    with pytest.raises(ValueError, match=f"^PreciseStatsHook: {complaint}"):
        PreciseStatsHook(**arguments)


def test_a_data_set_without_length(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield Noise()[0]

    run = train(tmp_path)
    run.train_loop.dataloader = torch.utils.data.DataLoader(Endless())
    with pytest.raises(ValueError, match="Endless has no length"):
        PreciseStatsHook().before_train(run)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_nothing_to_estimate_is_said_before_training(tmp_path, norm):
    with pytest.raises(ValueError, match="^PreciseStatsHook: no batch normalisation of the model"):
        train(tmp_path, PreciseStatsHook(), norm=norm)
    assert not list(tmp_path.glob("*.pth"))


def test_averaged_weights_are_warned_of(tmp_path):
    run = train(tmp_path)
    run.register_hook(dict(type="EMAHook"))
    PreciseStatsHook().before_train(run)
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "PreciseStatsHook: EMAHook evaluates averaged weights" in log


def test_a_test_estimates_for_averaged_weights(tmp_path, tool_module):
    """The hook of tools/test.py runs after EMAHook; its time counts as no image's."""

    class Slow(tool_module("test").EstimateStats):
        def before_test_epoch(self, runner):
            time.sleep(0.5)
            super().before_test_epoch(runner)

    average = dict(type="EMAHook", momentum=0.02)
    train(tmp_path, HOOKS.build(average))
    path = tmp_path / "epoch_4.pth"
    assert not precise(path)
    images = dict(dataset=Noise(), batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False))
    run, _ = runner(
        tmp_path,
        average,
        load_from=str(path),
        test_cfg=dict(),
        test_dataloader=images,
        test_evaluator=Evaluator([Nothing()]),
    )
    run.register_hook(Slow(LENGTH))
    times = run.test()
    saved = torch.load(path, weights_only=False)
    averaged, last = (saved[key] for key in ("state_dict", "ema_state_dict"))
    assert not averaged["body.0.weight"].allclose(last["module.body.0.weight"], rtol=1e-2)
    averaged["body.1.running_var"] = run.model.body[1].running_var
    torch.save(dict(state_dict=averaged), tmp_path / "tested.pth")
    assert precise(tmp_path / "tested.pth")
    (path,) = tmp_path.glob("*/*.json")
    assert times["count"] == LENGTH and json.loads(path.read_text())["data_time"] < 0.1


@pytest.mark.parametrize("images, shares", [(3, [[0], [1], [2], [3]]), (9, None)])
def test_each_process_sees_as_many_images(images, shares, tmp_path, monkeypatch):
    """Otherwise heads whose loss waits for the other processes would hang."""
    seen = []

    class Watched(Noise):
        def __getitem__(self, index):
            seen[-1].append(index)
            return super().__getitem__(index)

    seen.append([])
    run = train(tmp_path, dataset=Watched())
    run.model.train()
    seen.clear()
    monkeypatch.setattr("cbn_mmdet.hooks.precise_stats_hook.get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr("cbn_mmdet.hooks.precise_stats_hook.get_rank", lambda rank=rank: rank)
        seen.append([])
        PreciseStatsHook(num_images=images).estimate(run)
    assert len({len(each) for each in seen}) == 1
    assert shares is None or seen == shares
