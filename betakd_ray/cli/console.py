"""Tables on the terminal."""

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from betakd_ray.spec import StorageSpec

if TYPE_CHECKING:
    from betakd_ray.evaluation.result import Result
    from betakd_ray.evaluation.scoring import Scored


def print_result(result: "Result", *, markdown: bool = False) -> None:
    """Print the scores of a packed question set with their intervals, and how the models compare."""
    from betakd_ray.evaluation.packed import tables_of
    from betakd_ray.evaluation.score_table import markdown as as_markdown

    for rows in tables_of(result):
        print(as_markdown(rows) + "\n") if markdown else print_table(rows)


def print_scored(
    scored: "Sequence[Scored]", output: str | None, storage: StorageSpec, *, markdown: bool = False
) -> None:
    """Print the scores on benchmarks with their intervals and comparisons; write them as JSON if a file is named."""
    from betakd_ray.evaluation.score_table import as_json, comparison_rows, remark_lines, report, score_rows
    from betakd_ray.evaluation.scoring import comparisons

    pairs = comparisons(scored)
    if output:
        write_json(output, storage, as_json(scored, pairs))
    if markdown:
        print(report(scored, pairs), end="")
        return
    for rows in (score_rows(scored), comparison_rows(pairs)):
        if len(rows) > 1:
            print_table(rows)
    print("\n".join(remark_lines(scored)))


def write_json(output: str, storage: StorageSpec, text: str) -> None:
    """Write scores as JSON to a path or URL. Raises OutputError."""
    from betakd_ray.output import output_errors
    from betakd_ray.storage import open_store, replace_file

    with output_errors(output):
        filesystem, path = open_store(output, storage)
        replace_file(filesystem, path, f"{text}\n".encode())


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
