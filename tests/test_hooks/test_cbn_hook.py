"""The hook in real runs: burn-in, resume, what it logs, and what it refuses."""

import itertools
import json
import re
import shutil

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from cbn_mmdet import CBN, CBNHook, diagnose, links, window_state

LENGTH = 4  # iterations of an epoch
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
        norm = model.body[1]
        held = len(norm._windows[0]) if isinstance(norm, CBN) and norm._windows else 0
        self.seen.append((getattr(norm, "window", 1), held))


def runner(work_dir, hook, norm=None, epochs=4, loop=None, **kwargs):
    watch = Watch()
    made = Runner(
        model=Net(CBN(4, window_size=3) if norm is None else norm),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Noise(),
            batch_size=1,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=dict(
                type="CheckpointHook", interval=1, by_epoch=not loop or loop["by_epoch"]
            ),
        ),
        custom_hooks=[*([hook] if hook else []), watch],
        # A name that no other runner of this process has, a resumed one included.
        experiment_name=f"{work_dir.name}_{next(_runs)}",
        **kwargs,
    )
    return made, watch.seen


def windows(seen):
    return [window for window, _ in seen]


def test_registered():
    assert HOOKS.get("CBNHook") is CBNHook
    assert MODELS.get("CBN") is CBN
    assert isinstance(MODELS.build(dict(type="CBN", num_features=3, window_size=2)), CBN)


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_burn_in_by_epoch(tmp_path, burn_in):
    run, seen = runner(tmp_path, dict(type="CBNHook", burn_in=burn_in))
    run.train()
    assert windows(seen) == [1] * LENGTH * burn_in + [3] * LENGTH * (4 - burn_in)
    opened = [held for window, held in seen if window > 1]
    assert opened == [0, 1] + [2] * (len(opened) - 2)
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


@pytest.mark.parametrize("stop, burn_in", [(1, 2), (2, 2), (3, 2)])
def test_resume(tmp_path, stop, burn_in):
    """In the middle of the burn-in, at its end, and past it."""
    hook = dict(type="CBNHook", burn_in=burn_in)
    runner(tmp_path, hook, epochs=max(stop, burn_in + 1))[0].train()
    checkpoint = tmp_path / f"epoch_{stop}.pth"
    run, seen = runner(tmp_path, hook, resume=True, load_from=str(checkpoint))
    run.train()
    assert windows(seen) == ([1] * burn_in * LENGTH + [3] * 99)[stop * LENGTH : 4 * LENGTH]
    assert seen[0][1] == 0


def test_resume_within_an_iteration_based_burn_in(tmp_path):
    hook = dict(type="CBNHook", burn_in=6, by_epoch=False)
    runner(tmp_path, hook, epochs=2)[0].train()
    run, seen = runner(tmp_path, hook, resume=True, load_from=str(tmp_path / "epoch_1.pth"))
    run.train()
    assert windows(seen) == [1] * 2 + [3] * 10


def trained_state(run):
    """Everything that a run learnt, its windows included."""
    run.train()
    return run.model.state_dict(), window_state(run.model)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_saved_windows_make_a_resume_exact(tmp_path, by_epoch):
    """The resumed run ends where the uninterrupted one does; with empty windows it does not."""
    ends = {}
    for save_window in (True, False):
        hook = dict(type="CBNHook", burn_in=1, by_epoch=by_epoch, save_window=save_window)
        whole, folder = tmp_path / f"whole{save_window}", tmp_path / f"parts{save_window}"
        torch.manual_seed(0)
        model = Net(CBN(4, window_size=3))
        runs = [(whole, 4, {}), (folder, 2, {}), (folder, 4, dict(resume=True))]
        for work_dir, epochs, how in runs:
            if how:
                how["load_from"] = str(folder / "epoch_2.pth")
            run, _ = runner(work_dir, hook, epochs=epochs, **how)
            run.model.load_state_dict(model.state_dict())
            ends[work_dir, epochs, save_window] = trained_state(run)
        assert any(folder.glob("cbn_window*")) == save_window
        one, other = ends[whole, 4, save_window], ends[folder, 4, save_window]
        same = [torch.equal(one[0][name], other[0][name]) for name in one[0]]
        assert all(same) if save_window else not all(same)
        for a, b in zip(one[1]["body.1"], other[1]["body.1"], strict=True):
            assert a["feeder"] == b["feeder"] == "body.0" and a["count"] == b["count"] == 2
            assert torch.equal(a["vectors"], b["vectors"]) == save_window


SAVING = dict(type="CBNHook", burn_in=1, save_window=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work dir after 3 epochs: the windows of the last two checkpoints are there."""
    folder = tmp_path_factory.mktemp("trained")
    runner(folder, SAVING, epochs=3)[0].train()
    names = sorted(path.name for path in folder.glob("cbn_window*"))
    assert names == ["cbn_window_iter_12_rank0.pth", "cbn_window_iter_8_rank0.pth"]
    return folder


class TestResumesWithoutMatchingWindows:
    """Each starts with empty windows and says why."""

    def resume(self, trained, folder, checkpoint=3, **kwargs):
        """Resumes in a copy; returns how many past iterations there were, and the log."""
        if not folder.exists():
            shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.log"))
        load_from = str(trained / f"epoch_{checkpoint}.pth")
        run, seen = runner(folder, SAVING, resume=True, load_from=load_from, **kwargs)
        run.train()
        return seen[0][1], "".join(path.read_text() for path in folder.rglob("*.log"))

    def test_with_either_checkpoint(self, trained, tmp_path):
        for checkpoint in (2, 3):
            held, log = self.resume(trained, tmp_path / str(checkpoint), checkpoint)
            assert held == 2 and "start empty" not in log

    def test_missing(self, trained, tmp_path):
        held, log = self.resume(trained, tmp_path / "run", checkpoint=1)
        assert held == 0
        assert "the windows start empty, as there is no " in log
        assert "cbn_window_iter_4_rank0.pth. They fill within 2 iterations" in log

    def test_of_another_setting(self, trained, tmp_path):
        norm = CBN(4, window_size=2)
        held, log = self.resume(trained, tmp_path / "run", norm=norm)
        assert held == 0 and "'body.1' has a window of 2 in force, the state one of 3" in log

    def test_without_compensation(self, trained, tmp_path):
        norm = CBN(4, window_size=3, compensate=False)
        held, log = self.resume(trained, tmp_path / "run", norm=norm)
        assert held == 0 and "'body.1' is of another number of channels, another conv" in log

    def test_damaged(self, trained, tmp_path):
        shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("*.log"))
        path = tmp_path / "run" / "cbn_window_iter_12_rank0.pth"
        path.write_bytes(path.read_bytes()[:100])
        held, log = self.resume(trained, tmp_path / "run")
        assert held == 0 and "rank0.pth cannot be read (" in log

    def test_of_another_run(self, trained, tmp_path):
        """Two runs have windows of one iteration, and checkpoints of one name."""
        runner(tmp_path / "run", SAVING, epochs=3)[0].train()
        held, log = self.resume(trained, tmp_path / "run")
        assert held == 0 and f"is of checkpoint {tmp_path}/run/epoch_3.pth, the run of" in log


def test_windows_that_cannot_be_written_do_not_end_the_run(tmp_path):
    (tmp_path / "cbn_window_iter_4_rank0.pth").mkdir()
    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0, save_window=True), epochs=2)
    run.train()
    (log,) = tmp_path.rglob("*.log")
    assert "WARNING - CBNHook: the windows were not saved, as " in log.read_text()
    assert (tmp_path / "cbn_window_iter_8_rank0.pth").is_file()
    assert not list(tmp_path.glob("*.part"))


def test_validation_alone_writes_no_windows(tmp_path):
    hook = dict(type="CBNHook", burn_in=0, save_window=True)
    runner(tmp_path, hook, epochs=1)[0].train()
    (path,) = tmp_path.glob("cbn_window*")
    before = path.read_bytes()
    run, _ = runner(tmp_path, hook, resume=True, load_from=str(tmp_path / "epoch_1.pth"))
    run.load_or_resume()
    run.call_hook("before_val_epoch")
    assert path.read_bytes() == before


def test_what_is_logged(tmp_path):
    run, _ = runner(
        tmp_path,
        dict(type="CBNHook", burn_in=1, diagnose_every=2),
        epochs=2,
        visualizer=dict(
            type="Visualizer",
            vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
        ),
    )
    run.train()
    run.visualizer.close()
    (scalars,) = tmp_path.rglob("scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [row["cbn/window_size"] for row in rows] == [1] * LENGTH + [3] * LENGTH
    assert all(0 <= row["cbn/clamped"] <= 1 for row in rows)
    diagnosed = ("cbn/correction", "cbn/worst_correction", "cbn/noise")
    assert [[name in row for name in diagnosed] for row in rows] == (
        [[False] * 3] * (LENGTH + 1) + [[True] * 3] * (LENGTH - 1)
    )
    found = diagnose(run.model)["body.1"]  # the last iteration's
    assert [rows[-1][name] for name in diagnosed] == pytest.approx(
        [found.correction, found.correction, found.noise], rel=1e-3
    )
    (log,) = tmp_path.rglob("*.log")
    log = log.read_text()
    assert "CBNHook: 1 CBN layers, whose window of 3 opens after 1 epochs." in log
    assert "cbn/window_size: 3  cbn/clamped: 0.0000" in log
    assert (
        len(re.findall(r"CBNHook: correction 0\.\d+, worst 0\.\d+ in 'body.1'; noise ", log)) == 2
    )
    assert "move too fast" not in log

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents*")
    tensorboard = EventAccumulator(str(events.parent))
    tensorboard.Reload()
    logged = {"cbn/window_size", "cbn/clamped", *diagnosed}
    assert logged <= set(tensorboard.Tags()["scalars"])


@pytest.mark.parametrize("window_size, what", [(1, "nothing"), (2, "no noise")])
def test_a_window_too_narrow_for_a_diagnosis(tmp_path, window_size, what):
    hook = dict(type="CBNHook", burn_in=0, diagnose_every=1)
    run, _ = runner(tmp_path, hook, norm=CBN(4, window_size=window_size), epochs=1)
    run.train()
    (log,) = tmp_path.rglob("*.log")
    log = log.read_text()
    assert f"diagnose_every=1 can tell {what} of a window_size of {window_size}: it takes 3" in log
    told = re.findall(r"CBNHook: correction 0\.\d+, worst 0\.\d+ in 'body.1'(.*)", log)
    assert told == ["; 1 layers, in standard deviations."] * (LENGTH if window_size == 2 else 0)


def test_what_is_clamped_is_logged(tmp_path):
    """Weights that change sign between two iterations leave no valid past variance."""

    class Flip(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            with torch.no_grad():
                runner.model.body[0].weight.mul_(-3)

    run, _ = runner(tmp_path, dict(type="CBNHook", burn_in=0), epochs=1)
    run.register_hook(Flip())
    run.train()
    (scalars,) = tmp_path.rglob("scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert rows[0]["cbn/clamped"] == 0 and rows[1]["cbn/clamped"] == 1
    (log,) = tmp_path.rglob("*.log")
    (warning,) = [line for line in log.read_text().splitlines() if "move too fast" in line]
    assert "WARNING - CBNHook: the weights move too fast for the window: 'body.1' is" in warning
    assert re.search(r"more than 5% are cut to zero \(its: \d+%\)\. Lengthen burn_in", warning)


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


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True])
def test_bad_interval(value):
    with pytest.raises(
        ValueError, match="diagnose_every must be a whole number of at least 0, .*: iterations"
    ):
        CBNHook(diagnose_every=value)


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


def test_no_cbn_in_the_model(tmp_path):
    run, _ = runner(tmp_path, dict(type="CBNHook"), norm=nn.BatchNorm2d(4))
    run.train()
    (log,) = tmp_path.rglob("*.log")
    assert "WARNING - CBNHook: the model contains no CBN layer" in log.read_text()


def test_without_the_hook_the_layer_refuses(tmp_path):
    run, _ = runner(tmp_path, None)
    with pytest.raises(
        RuntimeError, match=r"never linked.*custom_hooks=\[dict\(type='CBNHook'\)\]"
    ):
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
    assert [held for _, held in seen] == [0, 1, 2, 2, 2, 2, 2, 2]


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
