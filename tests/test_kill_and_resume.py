"""A killed training resumes, and ends as if it had never been killed."""

import random

import pytest
from kill_and_resume import AIMS, kill_and_resume


@pytest.mark.slow
def test_kill_and_resume(tmp_path, capsys):
    """One kill of each kind; the script itself kills more often, and longer trainings."""
    kill_and_resume(tmp_path, len(AIMS), random.Random(1), epochs=2)
    assert f"{len(AIMS)} kills" in capsys.readouterr().out.splitlines()[-1]
