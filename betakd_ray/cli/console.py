"""Tables on the terminal."""

import sys
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """Print one row per model and one column per metric; `unanswerable` only if there is such a sample."""
    names = list(dict.fromkeys(name for metrics in scores.values() for name in metrics))
    if not any(metrics.get("unanswerable") for metrics in scores.values()):
        names.remove("unanswerable")
    rows = [[f"{metrics[name]:.4g}" if name in metrics else "" for name in names] for metrics in scores.values()]
    print_table([["model", *names], *([label, *row] for label, row in zip(scores, rows, strict=True))])


def print_table(lines: list[list[str]]) -> None:
    """Print a table; the first of `lines` is its header."""
    table = Table(*(Column(escape(name), overflow="fold") for name in lines[0]))
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    # Without a terminal rich would assume 80 columns, and fold the cells in a log file.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def print_sections(rows: Iterable[tuple[str, str, str]]) -> None:
    """Print rows of (section, quantity, value), with the name of each section above its rows."""
    for section, lines in groupby(rows, key=itemgetter(0)):
        print(section)
        for _, quantity, value in lines:
            print(f"  {quantity:<46} {value}")
