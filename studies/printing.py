# Licensed under the Apache License, Version 2.0.
"""Show the results and the progress of a study. Needs nothing but Python."""

from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """A silent stand-in for rich's ``Progress``, with the methods that the studies call."""

    def update(self, task: int, **_: object) -> None:
        """Takes what is being done, or how much there is to do."""

    def advance(self, task: int) -> None:
        """Counts one more as done."""


@contextmanager
def progress(task: str) -> Iterator[Bar]:
    """Shows a progress bar on a terminal if rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield Bar()
        return
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        bar.add_task(task, total=None)
        yield bar


def print_table(title: str, rows: list[dict]) -> None:
    """Print a Markdown table, of rows ``{column: cell}``, under its title."""
    print(f"\n## {title}\n\n{markdown(rows)}")


def markdown(rows: list[dict]) -> str:
    """Format rows ``{column: cell}`` as a Markdown table."""
    cells = [[*rows[0]], *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in cells
    ]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])
