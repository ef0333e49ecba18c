"""studies/evidence.py: short studies, resumed and reported."""

import itertools
import json
import re
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from common.errors import UsageError
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from cbn_mmdet import CBN, CenConv2d

pytestmark = pytest.mark.slow

SHORT = ["--shorten", "0.02", "--jobs", "1"]


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["runs"]


@pytest.fixture(scope="module")
def evidence():
    """The script as a module, whose imports take seconds."""
    import evidence

    return evidence


def test_classifier(tool, tmp_path):
    """The study prints all figures, adds new runs, and does not repeat those it has."""
    args = ["classifier", *SHORT, "--folder", tmp_path, "--batches", 8, 32]
    norms = ["--norms", "BN", "CBN", "BRN", "CmBN", "MABN"]
    tool("evidence.py", *args, "--seeds", 1, *norms)
    first = rows(tmp_path, "classifier")
    assert {(row["norm"], row["batch"], row["seed"]) for row in first} == {
        (norm, batch, 0) for norm in norms[1:] for batch in (8, 32)
    }
    for row in first:
        row["accuracy"] = 50.0  # a repeated run would change it
    path = tmp_path / "classifier.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), runs=first)))
    done = tool("evidence.py", *args, "--seeds", 2, *norms, "GN(num_groups=8)")
    second = rows(tmp_path, "classifier")
    assert len(second) == 2 * len(first) + 4
    kept = [row for row in second if row["seed"] == 0 and row["norm"] in norms]
    assert {row["accuracy"] for row in kept} == {50.0}
    assert all(0 <= row["accuracy"] <= 100 for row in second)
    assert {"precise" in row for row in second if row["norm"].startswith("GN")} == {False}
    assert all("precise" in row for row in second if row["norm"] == "CBN")
    table = re.findall(r"^\| ([\w, ]+?) +\| (\d+\..*?) +\| (\d.*?) +\|$", done.stdout, re.MULTILINE)
    assert [label for label, *_ in table] == [
        *(f"{norm}{kind}" for norm in ("BN", "BRN", "MABN", "CmBN", "CBN") for kind in KINDS),
        "GN",
    ]
    assert all(re.fullmatch(r"[\d.]+ ± [\d.]+ \(2\)", cell) for _, *each in table for cell in each)
    assert (tmp_path / "classifier.png").stat().st_size > 10_000


KINDS = ("", ", precise statistics")


def test_burn_in(tool, tmp_path):
    """Another burn-in's runs join the study's own; norms without a window do not train again."""
    args = ["classifier", *SHORT, "--folder", tmp_path, "--batches", 32, "--seeds", 1]
    args += ["--norms", "BRN", "CBN"]
    tool("evidence.py", *args)
    printed = tool("evidence.py", *args, "--burn-in", 0).stdout
    assert [(row["norm"], row["burn_in"]) for row in rows(tmp_path, "classifier")] == [
        ("BRN", None),
        ("CBN", 0),
        ("CBN", None),
    ]
    table = re.findall(r"^\| ([\w, -]+?) +\| \d+\.\d \(1\)", printed, re.MULTILINE)
    norms = "BRN", "CBN", "CBN, burn-in 0"
    assert table == [f"{norm}{kind}" for norm in norms for kind in KINDS]


@pytest.mark.parametrize(
    "norm, burn_in, changes, forwards",
    [
        ("CBN", None, {0: 1, 2: None}, 18),
        ("CBN", 0, {0: None}, 18),
        ("CBN", 4, {0: 1, 9: None}, 18),
        ("CBN", 8, {0: 1}, 18),
        ("CmBN", None, {0: None}, 16),
    ],
)
def test_when_the_classifiers_windows_open(norm, burn_in, changes, forwards, evidence, monkeypatch):
    """Keys of `changes` are forwards; burn-ins are eighths of a run of 18, or of CmBN's 2 x 8."""
    from trainings import classifier

    sizes, steps = {}, []
    set_window, step = classifier.set_window, classifier.step

    def set_and_note(model, size):
        sizes[len(steps)] = size
        set_window(model, size)

    monkeypatch.setattr(classifier, "set_window", set_and_note)
    monkeypatch.setattr(classifier, "step", lambda *args, **kw: steps.append(step(*args, **kw)))
    job = evidence.Job(norm, 32, 0, burn_in)
    evidence.train_classifier(job, dict(evidence.CLASSIFIER, shorten=0.1))
    assert sizes == changes and len(steps) == forwards


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_step_of_cmbn_has_eight_forwards(batch, evidence, monkeypatch):
    """The optimiser takes an eighth of the others' steps, at eight times their rate."""
    from trainings import classifier

    asked, ends = [], []
    one_cycle, step = classifier.one_cycle, classifier.step

    def ask(model, rate, steps, **kwargs):
        asked.append((rate, steps))
        return one_cycle(model, rate, steps, **kwargs)

    def note(model, updated):
        ends.append(updated)
        return step(model, updated=updated)

    monkeypatch.setattr(classifier, "one_cycle", ask)
    monkeypatch.setattr(classifier, "step", note)
    options = dict(evidence.CLASSIFIER, shorten=0.02)  # 115 images
    evidence.train_classifier(evidence.Job("CmBN", batch, 0), options)
    images = batch * 8
    assert asked == [(pytest.approx(0.03 * images / 32), 115 // images)]
    assert ends == ([False] * 7 + [True]) * (115 // images)


def test_parts_of_a_step_are_the_whole():
    from trainings.shared import descend

    torch.manual_seed(0)
    images, labels = torch.randn(6, 4), torch.arange(6) % 3
    parts, whole = nn.Linear(4, 3), nn.Linear(4, 3)
    whole.load_state_dict(parts.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), 0.5, 0.9) for model in (parts, whole)]
    for _ in range(2):
        losses = [
            descend(parts, optimizers[0], images[i : i + 2], labels[i : i + 2], 3, i == 4)
            for i in (0, 2, 4)
        ]
        loss = descend(whole, optimizers[1], images, labels)
        assert sum(losses) / 3 == pytest.approx(loss)
        torch.testing.assert_close(parts.weight, whole.weight)


def test_each_step_has_its_images():
    from trainings.shared import shuffled

    steps = [each.tolist() for each in shuffled(5, 2, 6)]
    assert [len(each) for each in steps] == [2] * 6
    drawn = sum(steps, [])
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_frames_come_in_a_row(batch, evidence, monkeypatch):
    """Each image comes as often in a row as the study says; without frames, once."""
    from trainings import classifier

    def images_of(study):
        seen, descend = [], classifier.descend
        with monkeypatch.context() as patch:
            patch.setattr(
                classifier,
                "descend",
                lambda model, optimizer, x, *args: (
                    seen.extend(x) or descend(model, optimizer, x, *args)
                ),
            )
            options = dict(evidence.STUDIES[study].settings, shorten=0.02)
            evidence.train_classifier(evidence.Job("GN(num_groups=8)", batch, 0), options)
        return seen

    def runs(seen):
        new = [0] + [n for n in range(1, len(seen)) if not torch.equal(seen[n], seen[n - 1])]
        return {later - first for first, later in itertools.pairwise(new)}

    assert runs(images_of("classifier")) == {1}
    assert runs(images_of("frames")) == {8}


@pytest.mark.parametrize("batch, momentum", [(1, 0.02), (4, 0.08), (8, 0.1)])
def test_momentum_follows_the_batch_up_to_the_usual_one(batch, momentum):
    from trainings.shared import with_defaults

    assert with_defaults(dict(type="CBN"), batch, 100) == dict(type="CBN", momentum=momentum)


def test_which_convolutions_are_centred(evidence):
    from norms import norm_cfg
    from trainings.classifier import classifier

    def centred(model):
        found = {isinstance(each, CenConv2d) for each in model if isinstance(each, nn.Conv2d)}
        (answer,) = found
        return answer

    assert centred(classifier(norm_cfg("MABN"))) and not centred(classifier(norm_cfg("CBN")))
    assert centred(classifier(norm_cfg("CBN"), evidence.STUDIES["centred"].settings["centred"]))


@pytest.fixture(scope="module")
def detected(tool, tmp_path_factory):
    """The smallest study of the detector: 6 images, 4 epochs."""
    folder = tmp_path_factory.mktemp("evidence")
    args = ["--folder", folder, "--data", folder]
    args += ["--batches", 2, "--seeds", 1, "--norms", "CBN", "--jobs", 1, "--shorten", 0.006]
    return folder, tool("evidence.py", "detector", *args).stdout


def test_detector(detected):
    folder, printed = detected
    (row,) = rows(folder, "detector")
    assert 0 <= row["ap"] <= 1 and 0 <= row["precise"] <= 1
    assert re.search(r"^\| CBN, precise statistics +\| 0\.\d{3} \(1\)", printed, re.M)
    log = next(folder.glob("runs/detector/0.006/CBN_2_None_0/precise/*/*.log")).read_text()
    assert "PreciseStatsHook: statistics of 32 layers from 6 images in " in log


def test_exactly(evidence, tool, tmp_path):
    tool("evidence.py", "exactly", *SHORT, "--folder", tmp_path, "--seeds", 1)
    (row,) = rows(tmp_path, "exactly")
    assert row["norm"] == "BN" and row["batch"] == 1
    alone = evidence.train_classifier(
        evidence.Job("BN", 1, 0), dict(evidence.CLASSIFIER, shorten=0.02)
    )
    assert all(row[name] != alone[name] for name in alone)


def test_earlier_batches_are_in_the_statistics_and_not_in_the_loss():
    from trainings.shared import descend, with_latest

    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 4, 4), torch.arange(6)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    batches = with_latest(iter(labels.split(2)), labels, dict(together=2))
    for expected, (chosen, targets) in zip(
        ([0, 1], [0, 1, 2, 3], [2, 3, 4, 5]), batches, strict=True
    ):
        assert chosen.tolist() == expected
        loss = nn.functional.cross_entropy(model(images[expected])[-2:], labels[expected[-2:]])
        assert descend(model, optimizer, images[chosen], targets) == pytest.approx(loss.item())


def latest_detector(evidence, monkeypatch, digits):
    """The config of the detector in which earlier images take part in statistics alone."""
    from trainings import detector
    from trainings.shared import Job

    monkeypatch.setattr(detector, "build_digits", lambda folder, **sizes: digits)
    options = dict(evidence.STUDIES["detector-exactly"].settings, shorten=1.0, data="data")
    cfg = detector.detector_config(Job("BN", 1, 0), options)
    init_default_scope("mmdet")
    import_module(cfg.custom_imports.imports[-1])
    return cfg


def test_earlier_images_are_in_the_statistics_of_a_detector_alone(evidence, monkeypatch, digits):
    """Without statistics of the batch, losses and gradients are those of the last image alone."""
    cfg = latest_detector(evidence, monkeypatch, digits)
    batches = list(Runner.build_dataloader(cfg.train_dataloader, seed=0))
    assert [len(each["inputs"]) for each in batches] == [1, 2, 3, 4, 5, 6, 7, *[8] * 5]
    for before, now in itertools.pairwise(batches):
        earlier, later = before["inputs"][-7:], now["inputs"][:-1]
        assert all(map(torch.equal, earlier, later))
    # All regions take part, so that nothing is drawn.
    cfg.model.train_cfg.rpn.sampler.num = cfg.model.train_cfg.rcnn.sampler.num = 100_000
    model = MODELS.build(cfg.model)

    def losses_of(batch):
        model.zero_grad()
        losses = model(**model.data_preprocessor(batch, True), mode="loss")
        loss, _ = model.parse_losses(losses)
        loss.backward()
        return [loss, *(each.grad.clone() for each in model.parameters())]

    alone = {key: value[-1:] for key, value in batches[-1].items()}
    for of_batch in (False, True):
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train(of_batch)
        pairs = list(zip(losses_of(batches[-1]), losses_of(alone), strict=True))
        close = [torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in pairs]
        assert all(close) is not of_batch


def test_detector_exactly(tool, tmp_path):
    args = ["--folder", tmp_path, "--data", tmp_path, "--seeds", 1, "--jobs", 1]
    printed = tool("evidence.py", "detector-exactly", "--shorten", 0.006, *args).stdout
    (row,) = rows(tmp_path, "detector-exactly")
    assert 0 <= row["ap"] <= 1 and 0 <= row["precise"] <= 1
    assert re.search(r"^\| BN, the last 8 anew +\| 0\.\d{3} \(1\)", printed, re.M)


def test_momentum(tool, tmp_path):
    args = ["--folder", tmp_path, "--batches", 16, "--seeds", 1]
    tool("evidence.py", "momentum", *SHORT, *args)
    found = rows(tmp_path, "momentum")
    assert len(found) == 4
    # The momentum changes the statistics of the evaluation, not the training.
    assert len({row["precise"] for row in found}) == 1


def test_continued(evidence, tool, tmp_path):
    args = ["--folder", tmp_path, "--seeds", 1, "--norms"]
    fixed = "CBN(window_size=8)"
    printed = tool("evidence.py", "continued", *SHORT, *args, "BN", fixed).stdout
    found = rows(tmp_path, "continued")
    assert [row["norm"] for row in found] == ["BN", fixed]
    table = re.findall(r"^\| ([^|]+?) +\| (\d\.\d{3}) \(1\) +\|$", printed, re.MULTILINE)
    assert table == [
        (f"{row['norm']}{kind}", f"{row[key]:.3f}")
        for row in found
        for key, kind in (("loss", ""), ("worst", ", worst accuracy"))
    ]
    way = {at: round(share, 3) for at, share in found[0]["ways"].items()}
    assert list(way) == [f"after {number}" for number in (1, 2, 3, 4, 5, 6)]
    assert min(way.values()) == round(found[0]["worst"], 3)
    numbers = [f"{share:.3f} (1)" for share in way.values()]
    assert re.search(rf"^\| BN +\| {re.escape(' | '.join(numbers))} +\|$", printed, re.MULTILINE)
    # The first training's weights are kept, and continuing from them again gives the same.
    (weights,) = tmp_path.glob("runs/continued/0.02/*.pth")
    written = weights.stat().st_mtime_ns
    options = dict(evidence.CONTINUED, shorten=0.02, work_dir=str(weights.parent))
    again = evidence.train_continued(evidence.Job("BN", 1, 0), options)
    for key in ("loss", "worst"):
        assert again[key] == pytest.approx(found[0][key], rel=1e-3)
    # Weights that hardly move; other images in the statistics.
    for change in (dict(clip=1e-3), dict(lr_at_1=1e-5), dict(together=3)):
        change.update(evaluate_every=300)  # at the end alone
        other = evidence.train_continued(evidence.Job("BN", 1, 0), dict(options, **change))
        assert other["loss"] != again["loss"]
    assert weights.stat().st_mtime_ns == written


def test_ablation(evidence, tool, tmp_path):
    """All results but one are there already."""
    settings = dict(evidence.ABLATION, shorten=0.02)
    row = dict(batch=2, seed=0)
    norms = [evidence.sliding(k) for k in (1, 2, 4, 8, 16)]
    assert norms[3] == evidence.SLIDING
    runs = [dict(row, norm=norm, burn_in=1, ap=0.1) for norm in norms]
    runs += [dict(row, norm=norms[3], burn_in=burn_in, ap=0.2) for burn_in in (3, 5)]
    moving = [(norm, each) for norm in ("CBN", "CBN(window_size=8)") for each in (0, 1)]
    runs += [dict(row, norm=norm, burn_in=burn_in, ap=0.3) for norm, burn_in in moving]
    (tmp_path / "ablation.json").write_text(json.dumps(dict(settings=settings, runs=runs)))
    args = ["--folder", tmp_path, "--batches", 2, "--seeds", 1]
    args += ["--data", tmp_path]
    printed = tool("evidence.py", "ablation", *SHORT, *args).stdout
    (trained,) = [row for row in rows(tmp_path, "ablation") if row not in runs]
    assert (trained["norm"], trained["burn_in"]) == (norms[3], 0) and "precise" not in trained
    log = next(tmp_path.glob("runs/ablation/0.02/*_2_0_0/run/*/*.log")).read_text()
    assert "32 CBN layers, whose window (window_size=8) is open from the start" in log
    sliding = r"^\| CBN, sliding, window_size=(\d+), burn-in (\d) +\| 0\.(\d)"
    table = re.findall(sliding, printed, re.MULTILINE)
    assert [row for row in table if row[1] != "0"] == [
        *((k, "1", "1") for k in "1248"),
        *(("8", burn_in, "2") for burn_in in "35"),
        ("16", "1", "1"),
    ]
    table = re.findall(r"^\| (CBN(?:\(.*?\))?), burn-in (\d) +\| 0\.300", printed, re.MULTILINE)
    assert table == [(norm, str(burn_in)) for norm, burn_in in moving]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_points_of_the_ablations_plot(evidence, monkeypatch):
    from trainings import results

    panels, row = [], dict(batch=2, seed=0)
    monkeypatch.setattr(results, "finish", lambda canvas, axes, path: panels.extend(axes))
    runs = [
        dict(row, norm=evidence.sliding(4), burn_in=1, ap=0.1),
        dict(row, norm=evidence.SLIDING, burn_in=1, ap=0.2),
        dict(row, norm=evidence.SLIDING, burn_in=3, ap=0.4),
    ]
    results.plot_ablation(runs, evidence.STUDIES["ablation"], "none.png")
    found = [axes.containers[0].lines[0].get_xydata().tolist() for axes in panels]
    assert found == [[[4, 0.1], [8, 0.2]], [[1, 0.2], [3, 0.4]]]


def test_ablation_with_another_burn_in(evidence):
    args = Namespace(study="ablation", norms=None, batches=[1], seeds=1, burn_in=2)
    jobs = evidence.plan(args, evidence.STUDIES["ablation"])
    norms = [*map(evidence.sliding, evidence.WINDOWS), "CBN"]
    assert jobs == [evidence.Job(norm, 1, 0, 2) for norm in norms]
    args.norms = ["GN", "CBN"]
    jobs = evidence.plan(args, evidence.STUDIES["ablation"])
    assert [(job.norm, job.burn_in) for job in jobs] == [("GN", None), ("CBN", 2)]


def test_settings_reach_the_detector(monkeypatch, digits):
    from trainings import detector
    from trainings.shared import Job

    built = {}
    monkeypatch.setattr(
        detector, "build_digits", lambda folder, **sizes: built.update(sizes) or digits
    )
    job = Job("CBN(window_size=4)", 4, 7, 3)
    cfg = detector.detector_config(job, dict(detector.DETECTOR, shorten=0.5, data="data"))
    norm = cfg.model.backbone.norm_cfg
    assert norm == dict(type="CBN", window_size=4, momentum=0.08, requires_grad=True)
    assert cfg.model.neck.norm_cfg == cfg.model.roi_head.bbox_head.norm_cfg == norm
    assert cfg.custom_hooks == [dict(type="CBNHook", burn_in=3)]
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.train_dataloader.dataset.data_root == f"{digits}/"
    assert (built["num_train"], built["num_val"]) == (500, 100)
    assert cfg.randomness.seed == 7
    options = dict(detector.DETECTOR, shorten=1.0, data="data")
    cfg = detector.detector_config(Job("BRN", 1, 0), options)
    assert cfg.model.neck.norm_cfg.momentum == 0.02 and cfg.model.neck.norm_cfg.warmup == 222
    assert cfg.custom_hooks == [] and "accumulative_counts" not in cfg.optim_wrapper
    assert "conv_cfg" not in cfg.model.neck
    cfg = detector.detector_config(Job("MABN", 2, 0), options)
    for part in (cfg.model.backbone, cfg.model.neck, cfg.model.roi_head.bbox_head):
        assert part.norm_cfg == dict(type="MABN", momentum=0.04, requires_grad=True)
        assert part.conv_cfg == dict(type="CenConv2d")
    assert cfg.optim_wrapper.optimizer.lr == 0.02 and cfg.param_scheduler[0].end == 100


@pytest.mark.parametrize("name", ["levels", "levels-apart"])
def test_levels(name, tool, tmp_path):
    """One head on four levels, trained and evaluated."""
    args = ["--folder", tmp_path, "--data", tmp_path, "--seeds", 1, "--norms", "CBN"]
    printed = tool("evidence.py", name, "--shorten", 0.006, "--jobs", 1, *args).stdout
    (row,) = rows(tmp_path, name)
    assert 0 <= row["ap"] <= 1 and re.search(r"^\| CBN +\| 0\.\d{3} \(1\)", printed, re.M)


@pytest.mark.parametrize(("name", "norms"), [("levels", 1), ("levels-apart", 4)])
def test_the_norms_of_levels(name, norms, evidence, monkeypatch, digits):
    """The levels share the norm of each convolution, or each level has its own."""
    from trainings import detector
    from trainings.shared import Job

    monkeypatch.setattr(detector, "build_digits", lambda folder, **sizes: digits)
    options = dict(evidence.STUDIES[name].settings, shorten=1.0, data="data")
    cfg = detector.detector_config(Job("CBN", 1, 0), options)
    init_default_scope("mmdet")
    head = MODELS.build(cfg.model).bbox_head
    convs = {name: module for name, module in head.named_modules() if isinstance(module, CBN)}
    assert len(convs) == 2 * 4 * norms and len(set(convs.values())) == len(convs)
    assert cfg.optim_wrapper.optimizer.lr == 0.01


@pytest.mark.parametrize("batch", [1, 2])
def test_cmbn_accumulates_in_the_detector(batch, monkeypatch, digits):
    """A step of the optimiser has eight forwards; the rate's warm-up has as many steps as ever."""
    from trainings import detector
    from trainings.shared import Job

    monkeypatch.setattr(detector, "build_digits", lambda folder, **sizes: digits)
    options = dict(detector.DETECTOR, shorten=1.0, data="data")
    cfg = detector.detector_config(Job("CmBN", batch, 0), options)
    assert cfg.optim_wrapper.accumulative_counts == 8
    scaled = cfg.optim_wrapper.optimizer.lr * batch / cfg.auto_scale_lr.base_batch_size
    assert scaled == pytest.approx(0.02 / 2 * 8 * batch)
    assert cfg.param_scheduler[0].end == 100 * 8
    assert cfg.custom_hooks == [dict(type="CBNHook", burn_in=0)]


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--norms", "CBN(size=4)"], "cannot build CBN(size=4): CBN.__init__() got an unexpected"),
        (
            ["--norms", "XN"],
            "takes BN, GN, SyncBN, BRN, MABN, CmBN, CBN, none, or CBN(derivative_stride=2), say",
        ),
        (["--norms", "CBN(8)"], "cannot build CBN(8): its arguments need their names"),
        (["--seeds", "0"], "--seeds: takes a whole number of at least 1, got 0"),
    ],
)
def test_mistakes(args, complaint, evidence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evidence.py", "classifier", *args])
    with pytest.raises(SystemExit) as end:
        evidence.parse_args()
    assert end.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, complaint",
    [
        ("--shorten", "2", "--shorten 2: takes a share above 0, up to 1"),
        ("--burn-in", "-1", "--burn-in -1: takes a whole number of at least 0"),
        ("--device", "cuda", "--device cuda: classifier trains a small network, on the CPU alone"),
    ],
)
def test_out_of_range(option, value, complaint, evidence, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence.py", "classifier", option, value])
    with pytest.raises(UsageError, match=complaint):
        evidence.main()


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--burn-in", "1"], "--burn-in: continued has none"),
        (["--norms", "CBN", "GN"], "--norms GN: continued goes on with BN or CBN"),
    ],
)
def test_what_continued_has_no_use_for(args, complaint, evidence, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence.py", "continued", *args])
    with pytest.raises(UsageError, match=complaint):
        evidence.main()


def test_a_gpu_that_is_not_there(evidence, tmp_path, monkeypatch):
    """The error comes before anything trains, and not if nothing is left to train."""
    args = ["photos", "--device", "cuda", "--folder", str(tmp_path)]
    args += ["--norms", "BN", "--batches", "1", "--seeds", "1"]
    monkeypatch.setattr("sys.argv", ["evidence.py", *args])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no GPU to train on"):
        evidence.main()
    settings = dict(evidence.STUDIES["photos"].settings, shorten=1.0, device="cuda")
    row = dict(norm="BN", batch=1, seed=0, burn_in=None, ap=0.5)
    (tmp_path / "photos.json").write_text(json.dumps(dict(settings=settings, runs=[row])))
    evidence.main()


def test_figures_of_a_gpu_have_a_folder_of_their_own(evidence, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence.py", "photos", "--device", "cuda"])
    with pytest.raises(UsageError, match="--device cuda: needs a --folder of its own"):
        evidence.main()


@pytest.mark.parametrize("device, hidden", [("cpu", ""), ("cuda", None)])
def test_what_a_training_sees_of_the_gpus(device, hidden, monkeypatch):
    from trainings import detector

    asked = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        detector.subprocess,
        "run",
        lambda command, env, **kwargs: asked.append(env) or Namespace(returncode=0),
    )
    detector.call_tool(device, "train.py")
    assert asked[0].get("CUDA_VISIBLE_DEVICES") == hidden


def test_print_trains_nothing(evidence, tmp_path, monkeypatch, capsys):
    """It leaves figures and plots as they are, and tells where there are none."""
    monkeypatch.setattr(evidence, "run_missing", None)
    kept = dict(settings=dict(evidence.CLASSIFIER, shorten=1.0))
    kept["runs"] = [dict(norm="BN", batch=1, seed=0, burn_in=None, accuracy=50.0)]
    path = tmp_path / "classifier.json"
    path.write_text(json.dumps(kept))
    monkeypatch.setattr(
        "sys.argv", ["evidence.py", "classifier", "--print", "--folder", str(tmp_path)]
    )
    evidence.main()
    assert "| BN   | 50.0 (1)   |" in capsys.readouterr().out
    assert json.loads(path.read_text()) == kept and not list(tmp_path.glob("*.png"))
    path.unlink()
    with pytest.raises(UsageError, match="--print: there is no .*classifier.json yet"):
        evidence.main()


def test_results_of_other_settings_or_damaged(evidence, tmp_path):
    path = tmp_path / "classifier.json"
    path.write_text('{"settings": {"images_seen": 1}, "runs": []}')
    with pytest.raises(UsageError, match=f"{path} has results of other settings"):
        evidence.read_results(path, {"images_seen": 2})
    path.write_text("{")
    with pytest.raises(UsageError, match=f"{path} is damaged: delete it"):
        evidence.read_results(path, {})


def test_one_command_at_a_time(evidence, tmp_path):
    path = tmp_path / "classifier.json"
    with evidence.alone_with(path):
        with pytest.raises(UsageError, match=f"another command adds to {path}: wait"):
            with evidence.alone_with(path):
                pass
    with evidence.alone_with(path):  # the file of a command that has ended locks nothing
        pass


@pytest.mark.parametrize("batches, drawn", [((1, 2), ["BN"]), ((1,), ["BN", "GN"])])
def test_a_plot_has_lines(evidence, monkeypatch, tmp_path, batches, drawn):
    """What has one batch alone is no line, unless nothing has more."""
    from trainings import results

    labels, draw = [], results.draw
    monkeypatch.setattr(
        results,
        "draw",
        lambda axes, values, label: (labels.append(label), draw(axes, values, label)),
    )
    row = dict(seed=0, burn_in=None, ap=0.5)
    rows = [dict(row, norm="BN", batch=batch) for batch in batches]
    rows.append(dict(row, norm="GN(num_groups=8)", batch=1))
    results.plot_batches(rows, evidence.STUDIES["detector"], str(tmp_path / "plot.png"))
    assert labels == drawn and (tmp_path / "plot.png").stat().st_size > 1000


KEPT = Path(__file__).parents[2] / "docs" / "evidence"
ALL_KEPT = sorted([*KEPT.glob("*.json"), *KEPT.glob("h100/*.json")])


@pytest.mark.parametrize("kept", ALL_KEPT, ids=lambda path: str(path.relative_to(KEPT)))
def test_the_page_has_the_results_kept_beside_it(kept, evidence):
    """The page has each row that the command prints of the kept results, with all its cells."""
    from trainings.results import grouped, on_the_way, summary, title

    page = KEPT.with_suffix(".md").read_text().replace("**", "")
    saved, name = json.loads(kept.read_text()), kept.stem
    study = evidence.STUDIES[name]
    assert (saved["settings"].pop("device", "cpu") == "cpu") == (kept.parent == KEPT)
    assert saved["settings"] == dict(study.settings, shorten=1.0)
    batches = sorted({row["batch"] for row in saved["runs"]})
    printed = shown = 0
    for group, values in grouped(saved["runs"], study).items():
        cells = [summary(values[batch], study.figure) for batch in batches]
        row = " | ".join([title(*group), *(re.sub(r" \(\d+\)$", "", cell) for cell in cells)])
        assert f"| {row} |" in page
        printed += 1
        shown += sum(map(len, values.values())) if group[-1] == study.figure else 0
    for way in on_the_way(saved["runs"], study):
        assert f"| {re.sub(r' .[0-9]+.(?= [|]|$)', '', ' | '.join(way.values()))} |" in page
    assert shown == len(saved["runs"])
    fewest = {"continued-clipped.json": 4, "continued-slowly.json": 4}
    fewest.update({"continued-exactly.json": 2, "exactly.json": 2, "detector-exactly.json": 2})
    fewest.update({"levels.json": 3, "levels-apart.json": 3})
    assert printed >= fewest.get(str(kept.relative_to(KEPT)), 6)
