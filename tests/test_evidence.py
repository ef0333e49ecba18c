"""tools/evidence.py: short studies, resumed and reported."""

import json
import re

import pytest
from conftest import ROOT

from cbn_mmdet.launch import UsageError

pytestmark = pytest.mark.slow

SHORT = ["--shorten", "0.02", "--jobs", "1"]


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["runs"]


@pytest.fixture(scope="module")
def evidence(tool_module):
    """The tool as a module."""
    return tool_module("evidence")


def test_classifier(tool, tmp_path):
    """Ends with all figures, adds to them, and does not run again what it has."""
    args = ["classifier", *SHORT, "--folder", tmp_path, "--batches", 8, 32]
    norms = ["--norms", "BN", "CBN", "BRN"]
    tool("evidence.py", *args, "--seeds", 1, *norms)
    first = rows(tmp_path, "classifier")
    assert {(row["norm"], row["batch"], row["seed"]) for row in first} == {
        (norm, batch, 0) for norm in norms[1:] for batch in (8, 32)
    }
    for row in first:
        row["accuracy"] = 50.0  # what was run again would change it
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
        *(f"{norm}{kind}" for norm in ("BN", "BRN", "CBN, window") for kind in KINDS),
        "GN",
    ]
    assert all(re.fullmatch(r"[\d.]+ ± [\d.]+ \(2\)", cell) for _, *each in table for cell in each)
    assert (tmp_path / "classifier.png").stat().st_size > 10_000


KINDS = ("", ", precise statistics")


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
    assert re.search(r"^\| CBN, window, precise statistics +\| 0\.\d{3} \(1\)", printed, re.M)
    log = next(folder.glob("runs/detector/0.006/CBN_2_None_0/precise/*/*.log")).read_text()
    assert "PreciseStatsHook: statistics of 32 layers from 6 images in " in log


def test_momentum(tool, tmp_path):
    args = ["--folder", tmp_path, "--batches", 16, "--seeds", 1]
    tool("evidence.py", "momentum", *SHORT, *args)
    found = rows(tmp_path, "momentum")
    assert len(found) == 4
    # The momentum changes what is evaluated with, and not the training.
    assert len({row["precise"] for row in found}) == 1


def test_ablation(evidence, tool, tmp_path):
    """Of results that are there but for one."""
    settings = dict(evidence.ABLATION, shorten=0.02)
    row = dict(batch=2, seed=0)
    norms = [f"CBN(window_size={k})" for k in (1, 2, 4, 8, 16)]
    runs = [dict(row, norm=norm, burn_in=1, ap=0.1) for norm in norms]
    runs += [dict(row, norm=norms[3], burn_in=burn_in, ap=0.2) for burn_in in (3, 5)]
    (tmp_path / "ablation.json").write_text(json.dumps(dict(settings=settings, runs=runs)))
    args = ["--folder", tmp_path, "--batches", 2, "--seeds", 1]
    args += ["--data", tmp_path]
    printed = tool("evidence.py", "ablation", *SHORT, *args).stdout
    (trained,) = [row for row in rows(tmp_path, "ablation") if row["burn_in"] == 0]
    assert trained["norm"] == norms[3] and "precise" not in trained
    log = next(tmp_path.glob("runs/ablation/0.02/*_2_0_0/run/*/*.log")).read_text()
    assert "32 CBN layers, whose window of 8 is open from the start" in log
    table = re.findall(r"^\| CBN\(window_size=(\d+)\), burn-in (\d) +\| 0\.(\d)00", printed, re.M)
    assert [row for row in table if row[1] != "0"] == [
        *((k, "1", "1") for k in "1248"),
        *(("8", burn_in, "2") for burn_in in "35"),
        ("16", "1", "1"),
    ]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_settings_reach_the_detector(evidence, monkeypatch, digits):
    built = {}
    monkeypatch.setattr(
        evidence, "build_digits", lambda folder, **sizes: built.update(sizes) or digits
    )
    job = evidence.Job("CBN(window_size=4)", 4, 7, 3)
    cfg = evidence.detector_config(job, dict(evidence.DETECTOR, shorten=0.5, data="data"))
    norm = cfg.model.backbone.norm_cfg
    assert norm == dict(type="CBN", window_size=4, momentum=0.08, requires_grad=True)
    assert cfg.model.neck.norm_cfg == cfg.model.roi_head.bbox_head.norm_cfg == norm
    assert cfg.custom_hooks == [dict(type="CBNHook", burn_in=3)]
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.train_dataloader.dataset.data_root == f"{digits}/"
    assert (built["num_train"], built["num_val"]) == (500, 100)
    assert cfg.randomness.seed == 7
    options = dict(evidence.DETECTOR, shorten=1.0, data="data")
    cfg = evidence.detector_config(evidence.Job("BRN", 1, 0), options)
    assert cfg.model.neck.norm_cfg.momentum == 0.02 and cfg.model.neck.norm_cfg.warmup == 222
    assert cfg.custom_hooks == []


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--norms", "CBN(size=4)"], "cannot build CBN(size=4): CBN.__init__() got an unexpected"),
        (["--norms", "XN"], "cannot build XN"),
        (["--norms", "CBN(8)"], "cannot build CBN(8): its arguments need their names"),
        (["--seeds", "0"], "--seeds: takes a whole number of at least 1, got 0"),
    ],
)
def test_mistakes(args, complaint, evidence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evidence.py", "classifier", *args])
    with pytest.raises(SystemExit) as end:
        evidence.parse_args()
    assert end.value.code == 2 and complaint in capsys.readouterr().err


def test_a_share_out_of_range(evidence, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence.py", "classifier", "--shorten", "2"])
    with pytest.raises(UsageError, match="--shorten 2: takes a share above 0, up to 1"):
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


KEPT = ROOT / "docs" / "evidence"


@pytest.mark.parametrize("name", [path.stem for path in KEPT.glob("*.json")])
def test_the_page_has_the_results_kept_beside_it(name, evidence):
    """Each row that the command prints of what is kept, in all its cells."""
    page = KEPT.with_suffix(".md").read_text().replace("**", "")
    saved = json.loads((KEPT / f"{name}.json").read_text())
    study = evidence.STUDIES[name]
    assert saved["settings"] == dict(study.settings, shorten=1.0)
    batches = sorted({row["batch"] for row in saved["runs"]})
    printed = 0
    for group, values in evidence.grouped(saved["runs"], study.figure).items():
        cells = [evidence.summary(values[batch], study.figure) for batch in batches]
        row = " | ".join(
            [evidence.title(*group), *(re.sub(r" \(\d+\)$", "", cell) for cell in cells)]
        )
        assert f"| {row} |" in page
        printed += 1
    assert printed > 5
