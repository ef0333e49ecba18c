# Licensed under the Apache License, Version 2.0.
"""How results are shown."""

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(title: str, rows: list[dict]) -> None:
    """Print a Markdown table, of rows ``{column: cell}``, under its title."""
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row.values()))
    # Whole rows: in a log or a file a table must not be cut to the width of a terminal.
    console = Console(width=1000, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    print(f"\n## {title}\n\n{captured.get().strip()}")
