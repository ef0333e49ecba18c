"""Every folder of MMDetection's configs trains with CBN, or docs/zoo.md says why not.

``python tests/zoo.py`` prints the page's table.
"""

import mmdet
import pytest
from conftest import ROOT
from mmengine.utils import digit_version
from zoo import CONFIGS, ZOO, row, run

TRAINED, REST = (ROOT / "docs/zoo.md").read_text().split("| not tried |")


def reason_of(folder):
    """Why the page says that a folder was not tried, or None."""
    lines = [line.split(" | ") for line in REST.splitlines() if line.startswith("| ")]
    return next((why[:-2] for names, why in lines if folder in names[2:].split(", ")), None)


@pytest.mark.skipif(
    digit_version(mmdet.__version__) < digit_version("3.5.0"), reason="has fewer folders"
)
def test_every_folder_is_there():
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"_base_"}
    assert folders - {"__pycache__"} == set(ZOO)
    for folder in ZOO:
        assert (f"| {folder} |" in TRAINED) != (reason_of(folder) is not None), folder


@pytest.mark.sweep
@pytest.mark.parametrize("folder", ZOO)
def test_it_trains(folder):
    """A folder trains with the page's row; or it fails for the page's reason, and so does BN."""
    found, why = run(folder), reason_of(folder)
    if why is None:
        assert found["reason"] == ""
        assert row(folder, found) in TRAINED.splitlines()
    else:
        assert found["reason"] == why == run(folder, "BN")["reason"]
