# Licensed under the Apache License, Version 2.0.
"""Mistakes of the user, each reported in one line that says how to fix it."""

import argparse
import difflib
import errno
import os
import os.path as osp
import sys
from collections.abc import Callable, Iterable

import torch
from torch.distributed.elastic.multiprocessing.errors import record

# Errors of the system when a disk or quota is full, or a file has the largest allowed size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(Exception):
    """A mistake in what the user asked for; the user needs to read nothing but its message."""


def run_tool(main: Callable[[], None]) -> None:
    """Call ``main``; a :class:`UsageError` becomes one line on stderr and exit status 2."""
    load_weights_only()

    @record  # torchrun ends its report with the error that was recorded
    def run() -> None:
        try:
            main()
        except UsageError as error:
            raise UsageError(str(error)) from None  # without its causes
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UsageError(
                f"nothing more can be written ({error.strerror}): make room. A training then goes "
                "on with --resume"
            ) from None

    try:
        run()
    except UsageError as error:
        sys.stdout.flush()  # so that the error comes last if both go to one file
        print(f"{osp.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def load_weights_only() -> None:
    """Make torch refuse a checkpoint that would run code, if mmengine can do without such code.

    From torch 2.6 on, the maintained mmengine lists its classes that a checkpoint may hold, but if
    it meets another, it unpickles everything. The original mmengine always does, and has to.
    """
    from mmengine.runner import checkpoint  # takes seconds, and some importers run no tool

    names_classes = hasattr(checkpoint, "get_torch_safe_globals")
    if names_classes and hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, got {text}")
    return int(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a message that suggests the closest known name; empty if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def some(names: Iterable) -> str:
    """The first three of several names, for a message; … stands for the rest."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:3]) + (", …" if len(texts) > 3 else "")


def explain(error: Exception) -> str:
    """An error's type and the first line of its message."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {str(message).strip().partition(chr(10))[0]}".rstrip(": ")
