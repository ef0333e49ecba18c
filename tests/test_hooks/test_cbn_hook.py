"""The hook in real runs: burn-in, resume, what it logs, what it averages, and what it refuses."""

import copy
import itertools
import json
import os
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers import assert_all_equal, assert_same, assert_same_window, held
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

import cbn_mmdet.norm.iteration
from cbn_mmdet import CBN, CBNHook, CmBN, DiagnoseHook, links, window_state
from cbn_mmdet.hooks.precise_stats_hook import images_per_step
from cbn_mmdet.norm.reference import Reference

LENGTH = 4  # iterations of an epoch
OWN = "MovingWindow of its own size up to 8"
_runs = itertools.count()


class Noise(Dataset):
    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index)))


class Net(BaseModel):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, inputs, mode="tensor"):
        output = self.body(torch.stack(list(inputs)))
        return dict(loss=output.square().mean()) if mode == "loss" else output


class Watch(Hook):
    """Notes the window in force, and the number of past iterations, in each iteration."""

    priority = "LOW"

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = getattr(runner.model, "module", runner.model)
        held = sum(window["seen"] for window in window_state(model).get("body.1", []))
        self.seen.append((getattr(model.body[1], "window_in_force", 1), held))


class Nothing(BaseMetric):
    """An evaluation that takes no labels."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {"count": len(results)}


def runner(
    work_dir, hook, norm=None, epochs=4, loop=None, more_hooks=(), checkpoint=None, **kwargs
):
    by_epoch = not loop or loop["by_epoch"]
    watch = Watch()
    made = Runner(
        model=Net(CBN(4, window_size=3) if norm is None else norm),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Noise(),
            batch_size=1,
            # In a loop by iterations a DefaultSampler ends, and mmengine then waits two seconds.
            sampler=dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=checkpoint or dict(type="CheckpointHook", interval=1, by_epoch=by_epoch),
        ),
        custom_hooks=[*([hook] if hook else []), *more_hooks, watch],
        # No two runners of a process may share a name, not even a run and its resume.
        experiment_name=f"{work_dir.name}_{next(_runs)}",
        **kwargs,
    )
    return made, watch.seen


def windows(seen):
    return [window for window, _ in seen]


def log_of(work_dir):
    """The text logs of all runs in a work dir."""
    return "".join(path.read_text() for path in sorted(work_dir.rglob("*.log")))


def rows_of(work_dir):
    """What the one run in a work dir logged of its iterations."""
    (scalars,) = work_dir.rglob("scalars.json")
    return [json.loads(line) for line in scalars.read_text().splitlines()]


def test_registered():
    assert HOOKS.get("CBNHook") is CBNHook
    assert HOOKS.get("DiagnoseHook") is DiagnoseHook
    assert MODELS.get("CBN") is CBN
    assert isinstance(MODELS.build(dict(type="CBN", num_features=3, window_size=2)), CBN)
    assert MODELS.get("CmBN") is CmBN


class TestAccumulation:
    """``accumulative_counts``: one image per forward, several forwards in a step."""

    def run(self, folder, norm, counts, epochs=3):
        """Trains; returns the run, and each forward's conv input, state dict and norm output."""
        hook, seen = dict(type="CBNHook", burn_in=0), []
        run, _ = runner(folder, hook, norm, epochs, checkpoint=dict(type="CheckpointHook"))
        run.optim_wrapper.update(accumulative_counts=counts, optimizer=dict(type="SGD", lr=0.3))
        conv, norm = run.model.body[:2]
        inputs = []
        conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))

        def note(_, args, z):
            seen.append((inputs[-1], copy.deepcopy(run.model.body[:2].state_dict()), z.double()))

        norm.register_forward_hook(note)
        run.train()
        assert len(seen) == epochs * LENGTH
        return run, seen

    @pytest.mark.parametrize("counts", [4, 5])
    def test_cmbn_is_the_union_of_a_step(self, tmp_path, counts):
        """The last step of a run may have fewer."""
        run, seen = self.run(tmp_path, CmBN(4), counts)
        group = []
        for number, (x, state, z) in enumerate(seen):
            if number % counts == 0:
                group.clear()
            elif number > 1:  # the weights stand still within a step
                assert torch.equal(state["0.weight"], seen[number - 1][1]["0.weight"])
            state = {name: value.double() for name, value in state.items()}
            group.append(nn.functional.conv2d(x, state["0.weight"], state["0.bias"]))
            affine = state["1.weight"], state["1.bias"]
            union = nn.functional.batch_norm(torch.cat(group), None, None, *affine, training=True)
            torch.testing.assert_close(z, union[-1:], rtol=1e-4, atol=1e-4)
        assert window_state(run.model)["body.1"][0]["seen"] == 0
        # The union covers no more than a step: steps do move the weights.
        assert not torch.equal(seen[0][1]["0.weight"], seen[-1][1]["0.weight"])

    @pytest.mark.parametrize(
        "window, size", [("moving", 4), ("moving", "auto"), ("sliding", 4), ("step", "auto")]
    )
    def test_cbn_is_the_reference(self, tmp_path, window, size):
        """Its window carries over from step to step; only window='step' ends with the step."""
        norm = CBN(4, window=window, window_size=size)
        run, seen = self.run(tmp_path, norm, 4)
        slow = Reference(nn.Conv2d(3, 4, 3).double(), window, size, norm.eps)
        for number, (x, state, z) in enumerate(seen):
            slow.conv.load_state_dict({key: state[f"0.{key}"] for key in ("weight", "bias")})
            expected = slow.forward(x, state["1.weight"].double(), state["1.bias"].double())
            torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
            slow.step(x)
            if window == "step" and (number + 1) % 4 == 0:
                slow.forget()
        held = 0 if window == "step" else 3 * LENGTH
        assert window_state(run.model)["body.1"][0]["seen"] == held

    def test_of_several_optimisers_all_must_step(self, tmp_path):
        """The second accumulates, as the discriminator of a GAN may."""

        class Two(Net):
            def __init__(self):
                super().__init__(CmBN(4))
                self.other = nn.Linear(2, 1)

            def train_step(self, data, optim_wrapper):
                loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
                optim_wrapper["one"].update_params(loss)
                optim_wrapper["other"].update_params(self.other.weight.square().sum())
                return dict(loss=loss.detach())

        run, seen = runner(tmp_path, dict(type="CBNHook", burn_in=0), epochs=1)
        model = Two()
        parts = dict(one=(model.body, 1), other=(model.other, 2))
        run.model = model
        run.optim_wrapper = OptimWrapperDict(
            **{
                name: OptimWrapper(torch.optim.SGD(part.parameters(), 0.01), counts)
                for name, (part, counts) in parts.items()
            }
        )
        run.train()
        assert [held for _, held in seen] == [0, 1, 0, 1]

    def test_a_burn_in_by_iterations_counts_forwards(self, tmp_path):
        hook = dict(type="CBNHook", burn_in=4, by_epoch=False)
        run, seen = runner(tmp_path, hook, epochs=2)
        run.optim_wrapper.update(accumulative_counts=2)
        run.train()
        assert windows(seen) == [1] * 4 + [3] * 4


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_burn_in_by_epoch(tmp_path, burn_in):
    run, seen = runner(tmp_path, dict(type="CBNHook", burn_in=burn_in))
    run.train()
    assert windows(seen) == [1] * LENGTH * burn_in + [3] * LENGTH * (4 - burn_in)
    opened = [held for window, held in seen if window > 1]
    assert opened == list(range(LENGTH * (4 - burn_in)))
    assert links(run.model) == {"body.1": "body.0"}


def test_burn_in_by_iteration(tmp_path):
    run, seen = runner(tmp_path, dict(type="CBNHook", burn_in=5, by_epoch=False), epochs=2)
    run.train()
    assert windows(seen) == [1] * 5 + [3] * 3


def test_iteration_based_loop(tmp_path):
    loop = dict(by_epoch=False, max_iters=6)
    run, seen = runner(tmp_path, dict(type="CBNHook", burn_in=2, by_epoch=False), loop=loop)
    run.train()
    assert windows(seen) == [1] * 2 + [3] * 4


@pytest.mark.parametrize("save_window", [True, False])
@pytest.mark.parametrize("stop, burn_in", [(1, 2), (2, 2), (3, 2)])
def test_resume(tmp_path, stop, burn_in, save_window):
    """Within the burn-in, at its end, and past it; only then are there windows to lose."""
    hook = dict(type="CBNHook", burn_in=burn_in, save_window=save_window)
    runner(tmp_path, hook, epochs=max(stop, burn_in + 1))[0].train()
    checkpoint = tmp_path / f"epoch_{stop}.pth"
    run, seen = runner(tmp_path, hook, resume=True, load_from=str(checkpoint))
    run.train()
    assert windows(seen) == ([1] * burn_in * LENGTH + [3] * 99)[stop * LENGTH : 4 * LENGTH]
    assert seen[0][1] == (LENGTH if save_window and stop > burn_in else 0)
    assert ("start empty" in log_of(tmp_path)) == (stop > burn_in and not save_window)


def test_resume_within_an_iteration_based_burn_in(tmp_path):
    hook = dict(type="CBNHook", burn_in=6, by_epoch=False)
    runner(tmp_path, hook, epochs=2)[0].train()
    run, seen = runner(tmp_path, hook, resume=True, load_from=str(tmp_path / "epoch_1.pth"))
    run.train()
    assert windows(seen) == [1] * 2 + [3] * 10


def assert_equal(one, other):
    """Everything that two runs learnt is equal to the last bit."""
    (weights, windows), (more_weights, more_windows) = one, other
    assert weights.keys() == more_weights.keys() and windows.keys() == more_windows.keys()
    assert all(torch.equal(weights[name], more_weights[name]) for name in weights)
    for name, calls in windows.items():
        for a, b in zip(calls, more_windows[name], strict=True):
            assert_same_window(a, b, name)


def train_in_parts(folder, norm, hook, loop=None, **kwargs):
    """Weights and windows of a run as a whole, and of one stopped in the middle and resumed."""
    torch.manual_seed(0)
    weights = Net(copy.deepcopy(norm)).state_dict()
    middle = folder / "parts" / ("epoch_2.pth" if loop is None else "iter_8.pth")
    resumed = dict(resume=True, load_from=str(middle))
    ends = []
    for name, length, how in (("whole", 4, {}), ("parts", 2, {}), ("parts", 4, resumed)):
        if loop is not None:
            loop = dict(by_epoch=False, max_iters=LENGTH * length)
        run, _ = runner(
            folder / name, hook, copy.deepcopy(norm), length, loop, **how, **copy.deepcopy(kwargs)
        )
        run.model.load_state_dict(weights)
        run.train()
        ends.append((run.model.state_dict(), window_state(run.model)))
    return ends[0], ends[2]


NORMS = {
    "auto": CBN(4),
    "window": CBN(4, window_size=3, backward="window"),
    "bfloat16": CBN(4, window_size=3, window_dtype="bfloat16"),
    "naive": CBN(4, compensate=False),
    "sliding": CBN(4, window="sliding", window_size=3),
    "paper": CBN(4, window="sliding", window_size=4, backward="current"),
    "twice": nn.Sequential(CBN(4), nn.Conv2d(4, 4, 1, bias=False), CBN(4, window_size=5)),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_a_resume_is_exact(tmp_path, norm):
    hook = dict(type="CBNHook", burn_in=1)
    whole, parts = train_in_parts(tmp_path, norm, hook)
    assert_equal(whole, parts)
    assert {window["seen"] for calls in whole[1].values() for window in calls} == {3 * LENGTH}


@pytest.mark.parametrize("ema", [False, True])
def test_a_resume_of_a_loop_in_iterations_is_exact(tmp_path, ema):
    """Also with averaged weights: the windows belong to the weights that train."""
    hook = dict(type="CBNHook", burn_in=3, by_epoch=False)
    more = dict(more_hooks=[dict(type="EMAHook")]) if ema else {}
    assert_equal(*train_in_parts(tmp_path, CBN(4), hook, loop=True, **more))


def test_a_resume_without_windows_is_not_exact(tmp_path):
    """So the tests above would notice windows that a resume loses."""
    hook = dict(type="CBNHook", burn_in=1, save_window=False)
    whole, parts = train_in_parts(tmp_path, CBN(4), hook)
    assert not torch.equal(whole[0]["body.0.weight"], parts[0]["body.0.weight"])


@pytest.mark.parametrize("save_window", [True, False])
def test_what_a_checkpoint_holds(tmp_path, save_window):
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0, save_window=save_window), epochs=1)
    run.train()
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert ("cbn_windows" in checkpoint) == save_window
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["epoch_1.pth"]
    assert not any("window" in name for name in checkpoint["state_dict"])
    if save_window:
        saved = checkpoint["cbn_windows"]
        assert_equal(({}, saved), ({}, window_state(run.model)))
        torch.save(saved, tmp_path / "windows.pth")
        torch.load(tmp_path / "windows.pth", weights_only=True)  # plain data
        tensors = [each for each in saved["body.1"][0].values() if isinstance(each, torch.Tensor)]
        assert tensors and all(each.device.type == "cpu" for each in tensors)


@pytest.mark.parametrize(
    "before, after", [("CBN", "CBN"), ("BN", "CBN"), ("CBN", "BN"), ("CBN", "naive")]
)
def test_a_training_that_starts_from_a_checkpoint_has_no_past(before, after, tmp_path):
    """A checkpoint of any norm loads strictly, and no log says that windows start empty."""
    norms = dict(BN=nn.BatchNorm2d(4), CBN=CBN(4, window_size=3), naive=CBN(4, compensate=False))
    hook, first = dict(type="CBNHook", burn_in=0), tmp_path / "first"
    run, _ = runner(first, hook, norm=norms[before], epochs=1)
    run.train()
    load_from = str(first / "epoch_1.pth")
    second = tmp_path / "second"
    run, seen = runner(second, hook, norm=copy.deepcopy(norms[after]), load_from=load_from)
    run.load_or_resume()
    saved = torch.load(load_from, weights_only=False)["state_dict"]
    assert saved.keys() == run.model.state_dict().keys()
    assert_all_equal(run.model.state_dict().values(), saved.values())
    run.model.load_state_dict(saved, strict=True)
    run.train()
    assert seen[0][1] == 0 and (run.epoch, run.iter) == (4, 4 * LENGTH)
    assert "start empty" not in log_of(second)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a checkpoint of three epochs of a norm."""
    made = {}

    def train(norm, **settings):
        key = repr((norm, settings))
        if key not in made:
            folder = tmp_path_factory.mktemp("trained")
            hook = dict(type="CBNHook", burn_in=1, **settings)
            runner(folder, hook, norm, epochs=3)[0].train()
            made[key] = folder / "epoch_3.pth"
        return made[key]

    return train


class TestResumesWithoutMatchingWindows:
    """Each starts with empty windows and says why."""

    def resume(self, checkpoint, folder, norm, hook=None):
        """Resumes; returns how many past iterations there were, and why there were no more."""
        hook = hook or dict(type="CBNHook", burn_in=1)
        run, seen = runner(folder, hook, norm, resume=True, load_from=str(checkpoint))
        run.train()
        assert seen[-1][1] == seen[0][1] + LENGTH - 1
        told = "WARNING - CBNHook: the windows start empty, and fill anew: (.*)"
        return seen[0][1], re.findall(told, log_of(folder))

    def test_with_matching_ones(self, trained, tmp_path):
        assert self.resume(trained(CBN(4)), tmp_path, CBN(4)) == (2 * LENGTH, [])

    @pytest.mark.parametrize(
        "norm, save_window", [(CBN(4), False), (nn.BatchNorm2d(4), True)], ids=["not saved", "BN"]
    )
    def test_there_are_none(self, trained, tmp_path, norm, save_window):
        held, (why,) = self.resume(trained(norm, save_window=save_window), tmp_path, CBN(4))
        assert held == 0
        assert why in (
            "the checkpoint has none (save_window=False, or another norm).",
            # Without a CBN layer the hook saves an empty state: windows of no layer.
            "load_window_state: only one of the model and the state has a CBN layer 'body.1'. "
            "Windows can only be loaded into the model that they were saved from.",
        )

    @pytest.mark.parametrize(
        "before, now, what",
        [
            (
                dict(window="sliding", window_size=4, backward="current"),
                {},
                f"'body.1' has a {OWN} in force, the state a SlidingWindow of 4.",
            ),
            (
                {},
                dict(window="sliding", window_size=4, backward="current"),
                f"'body.1' has a SlidingWindow of 4 in force, the state a {OWN}.",
            ),
            (
                dict(window_size=3),
                dict(window_size=2),
                "'body.1' has a MovingWindow of 2 in force, the state a MovingWindow of 3.",
            ),
            ({}, dict(compensate=False), "'body.1' is of another number of channels, another conv"),
            (dict(compensate=False), {}, "'body.1' is of another number of channels, another conv"),
            ({}, dict(window_dtype="bfloat16"), "another setting of compensate or window_dtype"),
        ],
    )
    def test_of_another_setting(self, trained, tmp_path, before, now, what):
        held, (why,) = self.resume(trained(CBN(4, **before)), tmp_path, CBN(4, **now))
        assert held == 0 and what in why

    def test_of_a_shorter_burn_in(self, trained, tmp_path):
        """The resumed run's longer burn-in still holds the windows at 1; they open later, empty."""
        hook = dict(type="CBNHook", burn_in=14, by_epoch=False)
        run, seen = runner(tmp_path, hook, CBN(4), resume=True, load_from=str(trained(CBN(4))))
        run.train()
        assert seen == [(1, 0), (1, 0), (8, 0), (8, 1)]
        assert "'body.1' has a MovingWindow of its own size up to 1 in force" in log_of(tmp_path)

    def test_of_another_backward(self, trained, tmp_path):
        """``backward`` is no setting of the window, so the windows load."""
        assert self.resume(trained(CBN(4)), tmp_path, CBN(4, backward="window")) == (2 * LENGTH, [])


class Scaler:
    """A loss scaler that changes its scale in each iteration, by powers of two."""

    def __init__(self):
        self.value = 2.0**10

    def scale(self, loss):
        return loss * self.value


class ScaledOptimWrapper(OptimWrapper):
    """Stands in for AmpOptimWrapper, which needs a GPU: the scale changes before the hooks run."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_scaler = Scaler()

    def backward(self, loss, **kwargs):
        super().backward(self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(self.loss_scaler.value)
        super().step(**kwargs)
        self.loss_scaler.value *= 4 if self.loss_scaler.value < 2**11 else 1 / 4


@pytest.mark.parametrize("norm", [CBN(4), CBN(4, window="sliding", window_size=4)])
def test_a_loss_scaler_changes_nothing(tmp_path, norm):
    """Not in the first iteration either, nor in that of a resume."""
    torch.manual_seed(0)
    model = Net(norm)
    ends = {}
    for scales, folder, epochs in (
        (False, "plain", 3),
        (True, "scaled", 3),
        (True, "parts", 2),
        (True, "parts", 3),
    ):
        path = tmp_path / folder / "epoch_2.pth"
        resume = dict(resume=True, load_from=str(path)) if path.exists() and epochs == 3 else {}
        hook = dict(type="CBNHook", burn_in=0)
        run, _ = runner(tmp_path / folder, hook, copy.deepcopy(norm), epochs=epochs, **resume)
        run.model.load_state_dict(model.state_dict())
        if scales:
            optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
            run.optim_wrapper = ScaledOptimWrapper(optimizer=optimizer)
        run.train()
        ends[folder] = run.model.state_dict(), window_state(run.model)
    assert ends["plain"][1]["body.1"][0]["sums"].abs().max() > 0
    assert_equal(ends["plain"], ends["scaled"])
    assert_equal(ends["plain"], ends["parts"])


def test_a_loss_scaler_of_several_optimisers(tmp_path):
    class One(Net):
        def train_step(self, data, optim_wrapper):
            loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
            optim_wrapper["all"].update_params(loss)
            return dict(loss=loss.detach())

    torch.manual_seed(0)
    model, ends = One(CBN(4)), []
    for kind in (OptimWrapper, ScaledOptimWrapper):
        run, _ = runner(tmp_path / kind.__name__, dict(type="CBNHook", burn_in=0))
        run.model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
        other = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.01))
        run.optim_wrapper = OptimWrapperDict(other=other, all=kind(optimizer=optimizer))
        run.train()
        ends.append((run.model.state_dict(), window_state(run.model)))
    assert ends[0][1]["body.1"][0]["sums"].abs().max() > 0
    assert_equal(*ends)


def test_what_is_logged(tmp_path):
    run, _ = runner(
        tmp_path,
        dict(type="CBNHook", burn_in=1),
        epochs=2,
        visualizer=dict(
            type="Visualizer",
            vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
        ),
    )
    run.train()
    run.visualizer.close()
    rows = rows_of(tmp_path)
    assert [row["cbn/window_size"] for row in rows] == [1] * LENGTH + [3] * LENGTH
    assert all(0 <= row["cbn/clamped"] <= 1 for row in rows)
    log = log_of(tmp_path)
    assert "CBNHook: 1 CBN layers, whose window (window_size=3) opens after 1 epochs." in log
    assert re.search(r"cbn/window_size: 3(\.0+)?  cbn/clamped: 0.0000", log)
    assert "move too fast" not in log

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents*")
    tensorboard = EventAccumulator(str(events.parent))
    tensorboard.Reload()
    assert {"cbn/window_size", "cbn/clamped"} <= set(tensorboard.Tags()["scalars"])


@pytest.mark.parametrize(
    ("options", "images", "told"),
    [
        (dict(), 1, "momentum=0.1: .* 10 images. Set momentum=0.02 "),
        (dict(), 2, "momentum=0.1: .* 20 images. Set momentum=0.04 "),
        (dict(window="sliding", window_size=3, momentum=0.5), 1, "momentum=0.5: .* 2 images. "),
        (dict(momentum=0.3), 6, "momentum=0.3: .* 20 images. Set momentum=0.1 "),
        (dict(), 3, None),  # of 0.06
        (dict(momentum=0.19), 8, None),
        (dict(momentum=0.02), 1, None),
        (dict(momentum=None), 1, None),
        (dict(window="step"), 1, None),
        (dict(window_size=1), 1, None),
        (dict(track_running_stats=False), 1, None),
        (dict(window="sliding", window_size=4, backward="current"), 1, None),  # the paper's
    ],
)
def test_a_momentum_for_many_images_is_told_of(tmp_path, options, images, told):
    made, _ = runner(tmp_path, CBNHook(burn_in=0), CBN(4, **options), epochs=1)
    made._train_dataloader["batch_size"] = images
    made.train()
    found = told_momenta(tmp_path)
    assert len(found) == (told is not None)
    assert told is None or re.match(told, found[0])


def told_momenta(work_dir):
    return re.findall(r"WARNING - CBNHook: 'body.1' has (momentum.*)", log_of(work_dir))


def test_a_momentum_that_is_told_of_in_a_loop_by_iterations(tmp_path):
    hook = CBNHook(burn_in=0, by_epoch=False)
    runner(tmp_path, hook, CBN(4), loop=dict(by_epoch=False, max_iters=2))[0].train()
    assert len(told_momenta(tmp_path)) == 1


def test_no_word_of_a_momentum_that_evaluation_does_not_meet(tmp_path):
    """It meets statistics estimated anew, or those that a frozen layer came with."""
    (tmp_path / "precise").mkdir()
    (tmp_path / "frozen").mkdir()
    hooks = [dict(type="PreciseStatsHook", num_images=2)]
    runner(tmp_path / "precise", CBNHook(burn_in=0), CBN(4), 1, more_hooks=hooks)[0].train()
    made, _ = runner(tmp_path / "frozen", CBNHook(burn_in=0), CBN(4), epochs=1)
    made.model.train = lambda mode=True: BaseModel.train(made.model, mode).body[1].eval()
    made.train()
    assert "in evaluation mode" in log_of(tmp_path / "frozen")
    assert not told_momenta(tmp_path)


@pytest.mark.parametrize("sizes", [[1, 1], None])
def test_loaders_that_tell_no_batch_size(sizes):
    """As samplers of several data sets at once; or an iterable that is no ``DataLoader``."""
    sampler = BatchSampler(range(4), 2, drop_last=False)
    sampler.batch_size = sizes
    for loader in (DataLoader(range(4), batch_sampler=sampler), [1, 2]):
        assert images_per_step(loader) is None
    assert images_per_step(DataLoader(range(4), batch_size=3)) == 3
    assert images_per_step(DataLoader(range(4), batch_sampler=[[0], [1]])) is None


def test_windows_that_stay_narrow_are_told_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cbn_mmdet.norm.iteration, "_NARROW", 9)  # wider than any
    monkeypatch.setattr(cbn_mmdet.norm.iteration, "_LONG", 3)
    made, _ = runner(tmp_path, CBNHook(burn_in=0), CBN(4))
    made.train()
    (line,) = [line for line in log_of(tmp_path).splitlines() if "windows have averaged" in line]
    assert "WARNING - CBNHook: CBN: windows have averaged" in line


def test_window_sizes_as_they_are(tmp_path):
    """Windows that set their own size log the size they found, in the mean over the layers."""
    sizes = []

    class Look(Hook):
        def after_train_iter(self, runner, **kwargs):
            norms = [each for each in runner.model.modules() if isinstance(each, CBN)]
            sizes.append([each.mean_window_size for each in norms])

    hook = dict(type="CBNHook", burn_in=LENGTH, by_epoch=False)
    run, _ = runner(tmp_path, hook, NORMS["twice"], log_processor=dict(window_size=1))
    run.register_hook(Look())
    run.train()
    assert sizes[:LENGTH] == [[1, 1]] * LENGTH and {fixed for _, fixed in sizes[LENGTH:]} == {5}
    assert len({own for own, _ in sizes}) > LENGTH  # which would be 1 if it were not found
    logged = [row["cbn/window_size"] for row in rows_of(tmp_path)]
    assert logged == pytest.approx([sum(each) / 2 for each in sizes], rel=1e-3)
    assert "2 CBN layers, whose window (window_size=5, auto) opens after 4 iter" in log_of(tmp_path)


def test_what_is_clamped_is_logged(tmp_path):
    """Weights that change sign between two iterations leave no valid past variance."""

    class Flip(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            with torch.no_grad():
                runner.model.body[0].weight.mul_(-3)

    norm = CBN(4, window="sliding", window_size=3)
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0), norm, epochs=1)
    run.register_hook(Flip())
    run.train()
    rows = rows_of(tmp_path)
    assert rows[0]["cbn/clamped"] == 0 and rows[1]["cbn/clamped"] == 1
    (warning,) = [line for line in log_of(tmp_path).splitlines() if "move too fast" in line]
    assert "WARNING - CBNHook: the weights move too fast for the window: of past var" in warning
    assert "100% are cut to zero. Lengthen burn_in" in warning


@pytest.mark.parametrize("burn_in", [0, 3])
def test_a_spoilt_batch_is_logged_and_dropped(tmp_path, burn_in):
    class Spoil(Hook):
        def before_train(self, runner):
            runner.optim_wrapper.optimizer.register_step_pre_hook(zero_bad_gradients)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 5:
                data_batch["inputs"][0].fill_(float("nan"))

        def after_train_iter(self, runner, **kwargs):
            assert all(buffer.isfinite().all() for buffer in runner.model.buffers())

    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=burn_in), epochs=4)
    run.register_hook(Spoil(), priority="LOW")
    run.train()
    (log,) = tmp_path.rglob("*.log")
    (warning,) = [line for line in log.read_text().splitlines() if "NaN or infinite" in line]
    assert "WARNING - CBNHook: CBN layer 'body.1' is the first of 1 that met" in warning


def zero_bad_gradients(optimizer, args, kwargs):
    """What a loss scaler's skipped step does for the weights."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.nan_to_num_(0, 0, 0)


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True])
def test_bad_burn_in(value):
    with pytest.raises(
        ValueError, match="burn_in must be a whole number of at least 0, .*: epochs"
    ):
        CBNHook(burn_in=value)


@pytest.mark.parametrize("name", ["by_epoch", "save_window"])
def test_bad_switch(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'epoch'"):
        CBNHook(**{name: "epoch"})


@pytest.mark.parametrize(
    "hook, message",
    [
        (dict(burn_in=4), "burn_in=4 epochs is not shorter than the run of 4 epochs"),
        (
            dict(burn_in=20, by_epoch=False),
            "burn_in=20 iterations is not shorter than the run of 16 iterations",
        ),
    ],
)
def test_burn_in_not_shorter_than_the_run(tmp_path, hook, message):
    run, seen = runner(tmp_path, dict(type="CBNHook", **hook))
    with pytest.raises(ValueError, match=message):
        run.train()
    assert seen == []


def test_a_second_hook(tmp_path):
    run, seen = runner(tmp_path, dict(type="CBNHook"))
    run.register_hook(CBNHook(burn_in=1))
    with pytest.raises(ValueError, match="custom_hooks has more than one.*keep one"):
        run.train()
    assert seen == []


def test_no_cbn_in_the_model(tmp_path):
    run, _ = runner(tmp_path, dict(type="CBNHook"), norm=nn.BatchNorm2d(4))
    run.train()
    (log,) = tmp_path.rglob("*.log")
    assert "WARNING - CBNHook: the model contains no CBN layer" in log.read_text()


def test_without_the_hook_the_layer_refuses(tmp_path):
    run, _ = runner(tmp_path, None)
    refusal = r"never linked.*add dict\(type='CBNHook'\) to custom_hooks"
    with pytest.raises(RuntimeError, match=refusal):
        run.train()


def test_evaluation_leaves_the_window_alone(tmp_path):
    class Evaluate(Hook):
        def after_train_epoch(self, runner):
            runner.model.eval()
            runner.model(torch.randn(2, 3, 8, 8))
            runner.model.train()

    run, seen = runner(tmp_path, dict(type="CBNHook", burn_in=0), epochs=2)
    run.register_hook(Evaluate())
    run.train()
    assert [held for _, held in seen] == list(range(2 * LENGTH))


class KeepOutputs(BaseMetric):
    """Keeps what each evaluation returned."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def process(self, data_batch, data_samples):
        self.seen.append(torch.stack(list(data_samples)))

    def compute_metrics(self, results):
        return {}


def run_and_evaluate(folder, *hooks):
    """Two epochs with an evaluation after each: the model, and the outputs of the last."""
    torch.manual_seed(0)
    data = dict(dataset=Noise(), batch_size=1, collate_fn=dict(type="pseudo_collate"))
    keep = KeepOutputs()
    run, _ = runner(
        folder,
        dict(type="CBNHook", burn_in=0),
        epochs=2,
        val_dataloader=dict(**data, sampler=dict(type="DefaultSampler", shuffle=False)),
        val_cfg=dict(),
        val_evaluator=Evaluator([keep]),
    )
    for hook in hooks:
        run.register_hook(hook)
    run.train()
    return run.model, torch.cat(keep.seen[-LENGTH:])


@pytest.mark.parametrize("update_buffers", [True, False])
@pytest.mark.filterwarnings("ignore:The prefix is not set")
def test_ema_hook(tmp_path, update_buffers):
    """Evaluation is BN's with the averaged weights; the training is the same as without it."""
    plain, _ = run_and_evaluate(tmp_path / "plain")
    hook = EMAHook(momentum=0.3, update_buffers=update_buffers)
    model, outputs = run_and_evaluate(tmp_path / "ema", hook)
    assert_same(model, plain)
    assert held(model) == {"body.1": [2 * LENGTH]}
    saved = torch.load(tmp_path / "ema" / "epoch_2.pth", weights_only=False)["state_dict"]
    assert not torch.equal(saved["body.0.weight"], model.body[0].weight)
    norm = nn.BatchNorm2d(4)
    twin = Net(norm).eval()
    twin.load_state_dict(saved, strict=True)
    images = torch.stack([Noise()[index]["inputs"] for index in range(LENGTH)])
    torch.testing.assert_close(outputs, twin(images))


def test_a_run_without_cbn_may_be_shorter_than_the_burn_in(tmp_path):
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=3), norm=nn.GroupNorm(1, 4), epochs=1)
    run.train()


@pytest.mark.parametrize("frozen", [True, False])
def test_layers_kept_in_evaluation_mode_are_named(tmp_path, frozen):
    """As a backbone with norm_eval=True keeps them."""
    norm = CBN(4, window_size=3)
    if frozen:
        norm.train = lambda mode=True: nn.Module.train(norm, False)
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0), norm=norm, epochs=1)
    run.train()
    (log,) = tmp_path.rglob("*.log")
    warning = "1 of 1 CBN layers are in evaluation mode while the model trains, 'body.1' first"
    assert (warning in log.read_text()) == frozen


def test_what_is_equal_is_not_averaged_again(tmp_path, monkeypatch):
    """Of three equal numbers the average may differ from them in its last bit."""
    averaged = []
    monkeypatch.setattr("cbn_mmdet.hooks.cbn_hook.get_world_size", lambda: 3)
    monkeypatch.setattr(
        "cbn_mmdet.hooks.cbn_hook.all_reduce_params",
        lambda buffers, op: averaged.append((buffers, op)),
    )
    frozen = CBN(4)
    frozen.train = lambda mode=True: nn.Module.train(frozen, False)
    norm = nn.Sequential(CBN(4), nn.Conv2d(4, 4, 1), frozen)
    loop = dict(by_epoch=True, max_epochs=2, val_interval=1)
    hook = dict(type="CBNHook", burn_in=1)
    run, _ = runner(tmp_path, hook, norm, loop=loop, **evaluation())
    run.call_hook("before_val_epoch")  # as of a model that was only loaded
    assert averaged == []
    run.train()
    assert len(averaged) == 2
    for buffers, op in averaged:
        assert op == "mean" and len(buffers) == 2
        assert buffers[0] is norm[0].running_mean and buffers[1] is norm[0].running_var


# Two processes, each with half of the images.

WORLD = 2
BY_EPOCH = dict(by_epoch=True, max_epochs=3, val_interval=2)  # of two iterations
BY_ITERATION = dict(by_epoch=False, max_iters=8, val_interval=4)
RUNS = {
    "epochs": dict(loop=BY_EPOCH),
    # Checkpoints after 2, 5 and 8 iterations.
    "iterations": dict(
        loop=BY_ITERATION,
        checkpoint=dict(type="CheckpointHook", interval=3, save_begin=2, by_epoch=False),
    ),
    "EMA": dict(loop=BY_EPOCH, more_hooks=[dict(type="EMAHook")]),
    # Nothing reads running statistics before the end.
    "apart": dict(
        loop=dict(BY_ITERATION, val_begin=9), checkpoint=dict(type="CheckpointHook", interval=1)
    ),
    "first": dict(loop=dict(BY_EPOCH, max_epochs=2)),
    "resumed": dict(loop=BY_EPOCH, resume=True),
}


class Look(Hook):
    """Notes running means after each iteration and in each evaluation, and the first windows."""

    priority = "LOWEST"

    def __init__(self):
        self.trained, self.evaluated, self.windows = [], [], []

    def before_train_iter(self, runner, **kwargs):
        if not self.windows:
            self.windows.append(window_state(runner.model.module))

    def after_train_iter(self, runner, **kwargs):
        self.trained.append(runner.model.module.body[1].running_mean.clone())

    def before_val_iter(self, runner, **kwargs):
        self.evaluated.append(runner.model.module.body[1].running_mean.clone())

    def after_train(self, runner):
        self.windows.append(window_state(runner.model.module))
        self.state = runner.model.module.state_dict()


def evaluation():
    """What a run needs to evaluate."""
    return dict(
        val_cfg=dict(),
        val_dataloader=dict(
            dataset=Noise(), batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False)
        ),
        val_evaluator=Evaluator([Nothing()]),
    )


def process(rank, folder):
    """All runs of one of the processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    os.environ["LOCAL_RANK"] = str(rank)  # by default the wrapper takes it for a GPU
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    found = {}
    for name, settings in RUNS.items():
        torch.manual_seed(0)
        if name == "resumed":
            settings = dict(settings, load_from=str(folder / "first" / "epoch_2.pth"))
        look = Look()
        run, _ = runner(
            folder / name,
            dict(type="CBNHook", burn_in=2, by_epoch=False),
            norm=CBN(4),
            launcher="pytorch",
            cfg=dict(model_wrapper_cfg=wrapper),
            **evaluation(),
            **settings,
        )
        run.register_hook(look)
        run.train()
        found[name] = vars(look)
    torch.save(found, folder / f"found{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of the runs, and what each process saw."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(process, (folder,), nprocs=WORLD)
    return folder, [torch.load(folder / f"found{rank}.pth") for rank in range(WORLD)]


def averaged(ranks, name):
    """The iterations after which both processes had the same running statistics."""
    first, second = (found[name]["trained"] for found in ranks[1])
    return [n for n, pair in enumerate(zip(first, second, strict=True), 1) if torch.equal(*pair)]


def running_mean(path):
    return torch.load(path, weights_only=False)["state_dict"]["body.1.running_mean"]


@pytest.mark.slow
class TestTwoProcesses:
    def test_averages_after_epochs(self, ranks):
        """The hook averages for the checkpoint of each epoch, not in the epoch's iterations."""
        folder, (first, second) = ranks
        assert averaged(ranks, "epochs") == []
        for epoch in (1, 2, 3):
            own = [found["epochs"]["trained"][2 * epoch - 1] for found in (first, second)]
            saved = running_mean(folder / "epochs" / f"epoch_{epoch}.pth")
            torch.testing.assert_close(saved, torch.stack(own).mean(0))

    def test_averages_for_checkpoints_in_iterations(self, ranks):
        folder, (first, second) = ranks
        assert averaged(ranks, "iterations") == [2, 5, 8] and averaged(ranks, "apart") == []
        for iteration in (2, 5, 8):
            # Running statistics are linear in what they average: it does not matter how often.
            own = [found["apart"]["trained"][iteration - 1] for found in (first, second)]
            saved = running_mean(folder / "iterations" / f"iter_{iteration}.pth")
            torch.testing.assert_close(saved, torch.stack(own).mean(0))

    def test_averages_in_each_iteration_for_averaged_weights(self, ranks):
        assert averaged(ranks, "EMA") == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize(
        "name, path", [("epochs", "epoch_2"), ("iterations", None), ("EMA", "epoch_2")]
    )
    def test_both_evaluate_with_the_same(self, ranks, name, path):
        """The first evaluation, in mid-run, uses the statistics of a checkpoint of that time."""
        folder, (first, second) = ranks
        evaluated = [found[name]["evaluated"] for found in (first, second)]
        assert len(evaluated[0]) == len(evaluated[1]) == 4  # two images, twice
        for one, other in zip(*evaluated, strict=True):
            assert torch.equal(one, other)
        if path is None:
            own = [found["apart"]["trained"][3] for found in (first, second)]
            torch.testing.assert_close(evaluated[0][0], torch.stack(own).mean(0))
        else:
            assert torch.equal(evaluated[0][0], running_mean(folder / name / f"{path}.pth"))

    @pytest.mark.parametrize("name", ["epochs", "iterations", "EMA", "apart", "resumed"])
    def test_ends_alike(self, ranks, name):
        one, other = (found[name]["state"] for found in ranks[1])
        assert all(torch.equal(one[key], other[key]) for key in one)

    def test_resumes_with_the_windows_of_rank_0(self, ranks):
        folder, (first, second) = ranks
        saved = torch.load(folder / "first" / "epoch_2.pth", weights_only=False)["cbn_windows"]
        left = [found["first"]["windows"][1] for found in (first, second)]
        assert not torch.equal(*(windows["body.1"][0]["values"] for windows in left))
        assert_equal(({}, left[0]), ({}, saved))
        for found in (first, second):
            begun = found["resumed"]["windows"][0]
            assert begun["body.1"][0]["seen"] == 2
            assert_equal(({}, begun), ({}, saved))
        assert "start empty" not in log_of(folder / "resumed")
