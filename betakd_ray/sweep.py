"""A grid of jobs on one cluster, and the table of its results.

Teachers stay loaded between cells as long as the next cell needs the same from them. With `teacher.cache` in the
template they are loaded once, for the needs of all cells, and answer once for the whole grid. Several cells may run at
the same time. A cell that is done is not run again, so a sweep that was stopped continues where it was.
"""

import hashlib
import logging
import math
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from betakd_ray.data.manifest import find_shards
from betakd_ray.errors import Interrupted, TrainingError
from betakd_ray.evaluation.run import Evaluation, benchmark_of
from betakd_ray.job import BetaKDJob, JobResult
from betakd_ray.on_ray.cluster import connected
from betakd_ray.output import output_errors
from betakd_ray.progress import Update, progress_line
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.sigterm import on_sigterm
from betakd_ray.spec import EvaluationSpec, JobSpec, SweepSpec, TeacherSpec, parse_spec
from betakd_ray.spec.grid import Cell, cells_of
from betakd_ray.storage import join, make_folder, open_store, replace_file
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.sharing import Teachers

ROWS, TABLE = "rows.jsonl", "table.md"
CellResult = dict[str, Any]
_ROW = TypeAdapter(dict[str, str | int | float])
_LOG = logging.getLogger(__name__)


@runtime_checkable
class Stoppable(Protocol):
    """Work that can be asked to stop: a job or an evaluation."""

    def stop(self) -> None: ...


class Sweep:
    """Runner of a grid. It checks the specs of all cells before it runs the first; a SpecError names the cell."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self.folder = join(spec.output.path, spec.name)
        self.cells = list(cells_of(spec, self.folder))
        self._running: set[Stoppable] = set()
        self._is_stopping = False
        if spec.evaluation:
            benchmark_of(spec.evaluation)

    def run(self) -> list[CellResult]:
        """Run the grid; return one row per cell and seed: axes, seed, final metrics and those of the evaluation.

        The rows and the table are also saved. A cell whose training fails has no row. The other cells still run; after
        them TrainingError names the failed ones. A UserError ends the sweep. `stop()`, which a SIGTERM calls, also ends
        it: the running cells save first, and Interrupted is raised.
        """
        largest = max((cell.job for cell in self.cells), key=lambda job: job.training.workers.max)
        try:
            with (
                on_sigterm(self.stop),
                connected(largest, self.spec.parallel),
                Teachers() as teachers,
                progress_line(self.spec.name, len(self.cells), "cells") as update,
                ThreadPoolExecutor(self.spec.parallel) as executor,
            ):
                return self._collected(self._submit(executor, teachers), update)
        finally:
            self._is_stopping = False

    def _collected(self, pending: dict["Future[CellResult]", int], update: Update) -> list[CellResult]:
        rows: dict[int, CellResult] = {}
        failed = {}
        try:
            earlier = self._stored()
            for done in as_completed(pending):
                at = pending[done]
                try:
                    rows[at] = done.result()
                except TrainingError as error:
                    failed[self.cells[at].job.name] = error
                earlier.pop(at, None)
                update(completed=len(rows))
                self._save(earlier, rows)
        except Interrupted as interrupted:
            self.stop()
            # The running cells save first. Then it is known whether one of them failed by itself.
            wait(pending)
            raise _cause(pending) or interrupted from None
        except BaseException:
            # Ctrl-C, or a failed write of the table. Without this, the executor would first run all other cells.
            self.stop()
            raise
        if failed:
            causes = "; ".join(f"cell {name}: {error}" for name, error in failed.items())
            raise TrainingError(f"{causes}. The other {len(rows)} cells are in {join(self.folder, TABLE)}.")
        return [rows[each] for each in sorted(rows)]

    def stop(self) -> None:
        """Start no more cells, and ask the running ones to save and end."""
        self._is_stopping = True
        for each in list(self._running):
            each.stop()

    def _submit(self, executor: ThreadPoolExecutor, teachers: Teachers) -> dict["Future[CellResult]", int]:
        """Submit all cells; return the future of each cell's row → the cell's index.

        Of the cells with the same question, the first runs alone. The others start after it, and find its answers in
        the cache.
        """
        questions = [_question(cell.job) for cell in self.cells]
        for question in questions:
            if question:
                teachers.expect(question.teacher, question.needs)
        leaders: dict[str | None, Future[CellResult]] = {}
        pending = {}
        for at, (cell, question) in enumerate(zip(self.cells, questions, strict=True)):
            future = executor.submit(self._row, cell, teachers, leaders.get(question and question.key))
            pending[future] = at
            if question:
                leaders.setdefault(question.key, future)
        return pending

    def _row(self, cell: Cell, teachers: Teachers, leader: "Future[CellResult] | None") -> CellResult:
        # No deadlock: the leader was submitted earlier, so it has a thread or has ended. It may have failed: then this
        # cell asks the teacher.
        if leader:
            wait([leader])
        job = BetaKDJob(cell.job)
        try:
            with self._stoppable(job):
                result = job.fit(teachers)
            return {**cell.values, "seed": cell.seed, **self._scores(cell, result)}
        except TrainingError:
            raise  # the other cells may do better
        except BaseException:
            self.stop()  # here, because this thread would start another cell before the main thread sees the error
            raise

    @contextmanager
    def _stoppable(self, work: Stoppable) -> Iterator[None]:
        """Let `stop()` stop `work` in the block. Raises Interrupted if it was called before."""
        # Added before the flag is read, and stop() sets the flag before it reads the set. So nothing is missed.
        self._running.add(work)
        try:
            if self._is_stopping:
                raise Interrupted(f"{self.spec.name}: was asked to stop. Run it again to go on with the other cells.")
            yield
        finally:
            self._running.discard(work)

    def table(self, rows: list[CellResult]) -> list[list[str]]:
        """Return a header, and one line per cell: its axes, then the mean ± standard deviation of each metric.

        Mean and deviation are over the seeds. If there are several seeds, a column says how many of them have a row.
        """
        axes, seeds = list(self.spec.axes), len(self.spec.seeds)
        metrics = [name for row in rows[:1] for name in row if name not in (*axes, "seed")]
        lines = [[*axes, *(["seeds"] if seeds > 1 else []), *metrics]]
        for values in dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows):
            cell = [row for row in rows if tuple(row[axis] for axis in axes) == values]
            count = [f"{len(cell)} of {seeds}"] if seeds > 1 else []
            lines.append([*values, *count, *(_spread([row[name] for row in cell]) for name in metrics)])
        return lines

    def _scores(self, cell: Cell, result: JobResult) -> dict[str, float]:
        scores = {"loss": result.metrics["loss"]}
        questions = self.spec.evaluation
        if questions is None:
            return scores
        tree = {
            **questions.model_dump(),
            "name": self._evaluation,
            "models": {"student": {"path": result.model, "storage": cell.job.output.storage}},
            "cluster": cell.job.cluster,
            "output": {"path": result.path, "storage": cell.job.output.storage},
        }
        evaluation = Evaluation(parse_spec(tree, EvaluationSpec))
        with self._stoppable(evaluation):
            return (evaluation.stored() or evaluation.run())["student"] | scores

    @cached_property
    def _evaluation(self) -> str:
        """Return the evaluation's name in a cell's run. It changes if the evaluation's spec or its shards change."""
        questions = self.spec.evaluation
        assert questions
        checksums = [
            shard.checksum
            for shard in find_shards(questions.data.paths, questions.data.storage, questions.data.manifest)
        ]
        return f"evaluation-{hashlib.sha256(f'{questions.model_dump_json()}{checksums}'.encode()).hexdigest()[:8]}"

    def _stored(self) -> dict[int, CellResult]:
        """Return the rows of an earlier run, by the index of their cell. Each is valid until its cell has run again.

        A line that is cut or damaged is named in a warning, and has no row.
        """
        url = join(self.folder, ROWS)
        with output_errors(url):
            filesystem, path = open_store(url, self.spec.output.storage)
            if not filesystem.exists(path):
                return {}
            lines = cast(bytes, filesystem.cat_file(path)).splitlines()
        places = {cell.key: place for place, cell in enumerate(self.cells)}
        rows: dict[int, CellResult] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = _ROW.validate_json(line)
            except ValidationError as error:
                _LOG.warning(
                    "%s, line %d: is no row (%s). Its cell is looked at again.", url, number, error.errors()[0]["msg"]
                )
                continue
            place = places.get(tuple(row.get(name) for name in (*self.spec.axes, "seed")))
            if place is not None:
                rows[place] = row
        return rows

    def _save(self, earlier: dict[int, CellResult], rows: dict[int, CellResult]) -> None:
        """Save rows and table. Rows of an earlier run stay, unless they have other columns."""
        columns = next((row.keys() for row in rows.values()), None)
        known = {place: row for place, row in earlier.items() if columns in (None, row.keys())} | rows
        ordered = [known[place] for place in sorted(known)]
        self._store(ROWS, to_jsonl(ordered))
        self._store(TABLE, _markdown(self.table(ordered)))

    def _store(self, name: str, content: str) -> None:
        with output_errors(join(self.folder, name)):
            filesystem, root = open_store(self.folder, self.spec.output.storage)
            make_folder(filesystem, root)
            replace_file(filesystem, join(root, name), content.encode())


def _cause(pending: Iterable["Future[CellResult]"]) -> BaseException | None:
    """Return the error that stopped the sweep, if one of its own cells raised it; otherwise None.

    It need not be the first that was seen: another cell, which the sweep then stopped, may have ended earlier.
    """
    errors = (future.exception() for future in pending)
    return next((error for error in errors if error and not isinstance(error, Interrupted | TrainingError)), None)


class Question(NamedTuple):
    """Request of a cell to its teacher."""

    teacher: TeacherSpec
    needs: Needs
    key: str
    """Text that is equal for two cells if they can use the same answers."""


def _question(job: JobSpec) -> Question | None:
    """Return the question of a job; None if it has no teacher, or no cache for the answers."""
    if job.teacher is None or job.teacher.cache is None:
        return None
    needs = BetaKDJob(job).needs(job.teacher)
    return Question(job.teacher, needs, f"{job.teacher.model_dump_json()}{needs.choices}{job.data.model_dump_json()}")


def _spread(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.4g}"
    has_spread = len(values) > 1 and all(map(math.isfinite, values))  # a loss may be infinite or NaN
    return f"{mean} ± {statistics.stdev(values):.2g}" if has_spread else mean


def _markdown(lines: list[list[str]]) -> str:
    header, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body]) + "\n"
