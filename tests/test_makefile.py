"""What set-up says when the machine lacks something: one line, before anything is downloaded."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A copy of the files that set-up reads."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def make(project, *arguments):
    # Variables of an outer `make test` must not reach this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", *arguments], cwd=project, env=environment, text=True, capture_output=True
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr
    assert not (project / ".venv/.ready").exists()
    return errors[0]


@pytest.mark.parametrize("target", [".venv", "train", "test"])
def test_python_too_old(project, target):
    old = script(
        project / "python-old", 'case "$1" in --version) echo Python 3.9.1;; *) echo False;; esac'
    )
    assert make(project, target, f"PYTHON={old}") == (
        f"error: Python 3.10 or newer is needed, {old} is: Python 3.9.1"
    )
    assert not (project / ".venv").exists()


def test_no_python(project):
    assert "no nopython found; Python 3.10 or newer is needed" in make(
        project, ".venv", "PYTHON=nopython"
    )


def test_no_compiler(project):
    error = make(project, ".venv", f"PYTHON={sys.executable}", "CXX=nocompiler")
    assert (
        error
        == "error: no C++ compiler (nocompiler) found; mmcv needs one (on Debian: apt install g++)"
    )


def test_operators_do_not_import(project):
    """After a build of mmcv that did not see torch, pip succeeds but the import fails."""
    (project / ".venv/bin").mkdir(parents=True)
    script(
        project / ".venv/bin/python",
        f'case "$*" in *mmcv.ops*) echo "No module named mmcv._ext" >&2; exit 1;;\n'
        f'*sysconfig*) exec {sys.executable} "$@";;\n'
        "*) exit 0;; esac",
    )
    error = make(project, ".venv")
    assert error.startswith("error: mmcv.ops does not import (No module named mmcv._ext)")


def test_what_pip_builds_finds_the_environments_ninja(project):
    """Without ninja on the PATH torch compiles on one core."""
    (project / ".venv/bin").mkdir(parents=True)
    script(
        project / ".venv/bin/python",
        f'case "$*" in *"pip install"*) echo "$PATH" >> {project}/paths; exit 0;;\n'
        f'*mmcv.ops*) exit 1;; *sysconfig*) exec {sys.executable} "$@";; *) exit 0;; esac',
    )
    make(project, ".venv")
    paths = (project / "paths").read_text().splitlines()
    assert {path.split(":")[0] for path in paths} == {str(project / ".venv/bin")}
