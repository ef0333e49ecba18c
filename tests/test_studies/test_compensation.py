"""What studies/compensation.py reports of a training, against what must hold."""

import json
import re

import pytest

pytestmark = pytest.mark.slow

DIGITS = "faster-rcnn_r18_fpn_cbn-all_1xb1_digits"  # windows set their own size
SLIDING = "faster-rcnn_r18_fpn_cbn-current-all_1xb2_digits"  # window size 8
SHORT = (
    "train_cfg = dict(type='IterBasedTrainLoop', max_iters=20, val_interval=1000)\n"
    "custom_hooks = [dict(type='CBNHook', burn_in=2, by_epoch=False)]\n"
    "param_scheduler = []\n"
)


def measure(tool, small_config, folder, rate, *args, base=DIGITS):
    """Runs the study; returns what it printed, and its rows by truth and estimate."""
    # mmengine merges dictionaries: the other keys of the epoch-based loop must be deleted.
    extra = SHORT.replace("dict(type='Iter", "dict(_delete_=True, type='Iter")
    done = tool(
        "compensation.py",
        small_config(folder, base, extra),
        *args,
        "--cfg-options",
        f"work_dir={folder}/run",
        f"optim_wrapper.optimizer.lr={rate}",
        "auto_scale_lr.enable=False",
    )
    assert not (folder / "run").exists()  # where a training of the config would be
    found = json.loads((folder / "run_compensation/compensation.json").read_text())
    for plot in ("compensation", "window_sizes"):
        assert (folder / f"run_compensation/{plot}.png").stat().st_size > 10_000
    sizes = found["window_sizes"]
    assert [each["iteration"] for each in sizes] == list(range(20))
    assert all(len(each["sizes"]) == 32 for each in sizes)
    burn_in, opened = (
        [size for each in part for size in each["sizes"].values()]
        for part in (sizes[:2], sizes[3:])
    )
    assert set(burn_in) == {1.0}
    assert 1 <= min(opened) and 4 < max(opened) <= 8
    return done.stdout, found["rows"]


def test_weights_that_rest_leave_no_error(tool, small_config, tmp_path):
    """So the errors come from moving weights alone, the layer's or the whole network's."""
    _, rows = measure(tool, small_config, tmp_path, 0.0, "--strides", 1, 4, "--bfloat16")
    variants = {"naive", *(f"stride {n}{half}" for n in (1, 4) for half in ("", ", bfloat16"))}
    assert {row["estimate"] for row in rows} == variants
    assert {row["truth"] for row in rows} == {"layer", "network"}
    assert len({row["layer"] for row in rows}) == 8
    assert {row["back"] for row in rows} == set(range(1, 8))
    assert max(row["mean_error"] for row in rows) < 1e-4
    assert max(row["var_error"] for row in rows) < 1e-4


@pytest.mark.parametrize("base", [DIGITS, SLIDING])
def test_a_training(base, tool, small_config, tmp_path):
    layers = ["backbone.layer1.0.bn1", "neck.fpn_convs.0.bn"]
    args = ["--every", 9, "--layers", *layers, "--no-network"]
    printed, rows = measure(tool, small_config, tmp_path, 0.01, *args, base=base)
    assert {row["layer"] for row in rows} == set(layers)
    assert {row["iteration"] for row in rows} == {9, 18}
    assert {row["truth"] for row in rows} == {"layer"}
    mean, var = (
        {
            estimate: sum(row[key] for row in rows if row["estimate"] == estimate)
            for estimate in ("naive", "compensated")
        }
        for key in ("mean_error", "var_error")
    )
    assert mean["compensated"] < 1e-3 * mean["naive"]  # exact, but for rounding
    assert var["compensated"] < var["naive"]
    table = re.findall(r"^\| (\d) +((?:\| [\d.]+% +){4})\|$", printed, re.MULTILINE)
    assert [int(back) for back, _ in table] == list(range(1, 8))
    assert "all weights" not in printed
    assert (
        "There is no COCO evaluation yet" in tool("report.py", tmp_path / "run_compensation").stdout
    )


@pytest.mark.parametrize(
    "config, args, complaint",
    [
        ("bn-all_1xb1", [], "the model has no CBN layer"),
        ("cbn-all_1xb1", ["--layers", "bn"], "has no CBN layer bn; the first of its 32 is back"),
        ("cbn-all_1xb1", ["--every", 1000], "of 12 iterations ended before the first look"),
    ],
)
def test_mistakes(config, args, complaint, tool, small_config, tmp_path):
    if "--every" in args and 1000 in args:
        extra = "custom_hooks = [dict(type='CBNHook', burn_in=2, by_epoch=False)]\n"
        extra += "train_cfg = dict(max_epochs=1, val_begin=2)\n"
    else:
        extra = ""
    path = small_config(tmp_path, f"faster-rcnn_r18_fpn_{config}_digits", extra)
    done = tool("compensation.py", path, "--work-dir", tmp_path / "run", *args, check=False)
    assert done.returncode == 2
    assert re.search(rf"^compensation.py: error: .*{re.escape(complaint)}", done.stdout, re.M)
