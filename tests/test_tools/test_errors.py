"""How a tool ends when it cannot do what it was asked to."""

import errno

import pytest
from common import errors
from common.errors import UsageError


def test_run_tool(capfd, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # else run_tool sets it for good

    def fail():
        raise UsageError("this is wrong")

    with pytest.raises(SystemExit) as error:
        errors.run_tool(fail)
    assert error.value.code == 2
    assert capfd.readouterr().err.endswith("error: this is wrong\n")


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 2), (errno.EFBIG, 2), (errno.EIO, None)])
def test_full_disk(number, code, capfd, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")

    def fail():
        raise OSError(number, "it is full")

    with pytest.raises(OSError if code is None else SystemExit) as error:
        errors.run_tool(fail)
    if code:
        assert error.value.code == code
        assert "nothing more can be written (it is full): make room" in capfd.readouterr().err
