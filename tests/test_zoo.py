"""Every folder of MMDetection's configs trains with CBN, or docs/zoo.md says why not.

``python tests/zoo.py`` prints the page's table.
"""

import pytest
from conftest import ROOT
from zoo import CONFIGS, ZOO, run

TABLE = (ROOT / "docs/zoo.md").read_text()


def test_every_folder_is_there():
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"_base_"}
    assert folders == set(ZOO)
    for folder in ZOO:
        assert f"| {folder} |" in TABLE or folder in TABLE.split("| not tried |")[1]


@pytest.mark.sweep
@pytest.mark.parametrize("folder", ZOO)
def test_it_trains(folder):
    found = run(folder)
    if found["reason"]:
        assert found["reason"] in TABLE
    else:
        assert f"| {folder} |" in TABLE
