"""The program of docs/pytorch.md runs as it stands and prints what the page says."""

import re

import pytest
import torch
from conftest import ROOT


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3")
def test_pytorch_loop(capsys):
    page = (ROOT / "docs" / "pytorch.md").read_text()
    blocks = re.findall(r"```(python|text)\n(.*?)```", page, re.DOTALL)
    namespace = {}
    for kind, block in blocks:
        if kind == "python":
            exec(block, namespace)
        else:
            assert capsys.readouterr().out == block
    assert [kind for kind, _ in blocks].count("text") == 4
    assert capsys.readouterr().out == ""


def test_the_tests_that_trust_names_are_there():
    named = re.findall(
        r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs/trust.md").read_text()
    )
    assert len(named) > 30
    for path, name in named:
        text = (ROOT / "tests" / path).read_text()
        assert not name or re.search(rf"^\s*(class|def) {name}\b", text, re.MULTILINE), name
