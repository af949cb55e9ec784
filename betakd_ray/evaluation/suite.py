"""Evaluation of models on public benchmarks: no question is asked twice, and the answers files are what is scored."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from betakd_ray.errors import OutputError
from betakd_ray.evaluation.answer_file import AnswerFile
from betakd_ray.evaluation.asking import renderers
from betakd_ray.evaluation.benchmark import Benchmark, Options, Question, answer_line, first_of
from betakd_ray.evaluation.crew import Chunk, Crew
from betakd_ray.evaluation.intervals import Compared, Intervals
from betakd_ray.evaluation.pictures import require_pictures
from betakd_ray.evaluation.pieces import Pieces, Reply
from betakd_ray.evaluation.question_files import DataFolder
from betakd_ray.evaluation.registry import find_benchmark
from betakd_ray.evaluation.result import RESULT, TABLE, Result, Scores, Subject, digest, digest_of_model
from betakd_ray.evaluation.score_table import by_model, report
from betakd_ray.evaluation.scoring import Scored, Scoring, average, comparisons, read_questions, rules_of, score
from betakd_ray.evaluation.worker import AnsweringWorker
from betakd_ray.models.load import load_config, load_processor, require_images
from betakd_ray.on_ray.cluster import Demand, alive_nodes, check_room, connected, gpus_each, placement, without_room
from betakd_ray.output import output_errors
from betakd_ray.progress import pieces_line
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import BenchmarksSpec, ModelSpec, parse_spec
from betakd_ray.spec.tasks import label_of
from betakd_ray.storage import join, make_folder, open_store, replace_file

ANSWERS = "answers"
"""Folder of the answers files: answers/MODEL/BENCHMARK.jsonl."""
OWN_BYTES = float(1 << 30)
"""Bytes that a process needs besides its model."""
Every = Mapping[str, Sequence[Question]]
"""Name of a benchmark → all its questions, in the order of the question file."""
Asked = Mapping[str, Mapping[str, Question]]
"""Name of a benchmark → digest of a question → the question, for those that are asked, in that order."""


class Suite:
    """Runner of one evaluation. What it has done before is not done again."""

    def __init__(self, spec: BenchmarksSpec) -> None:
        """Find the benchmarks. Raises SpecError if one is not known, or has no such rule."""
        self.spec = spec
        self.folder = join(spec.output.path, spec.name)
        self.benchmarks: dict[str, Benchmark] = {}
        for name in spec.benchmarks:
            found = find_benchmark(name)
            self.benchmarks[found.name] = found
        self.options = Options(ocr=spec.ocr)
        rules = rules_of(list(self.benchmarks.values()), spec.rule)
        self.scorings = {name: Scoring(rule, self.options, spec.limit) for name, rule in rules.items()}
        self._stop = StopRequest(f"{spec.name}: was asked to stop. Answers up to now are kept: run it again to go on.")

    def stop(self) -> None:
        """Ask a running `run()` to end; it then raises Interrupted. It may be called from a signal handler."""
        self._stop.make()

    def run(self) -> list[Scored]:
        """Ask all questions that have no reply yet, write the answers and the scores, and return the scores.

        Before a model is loaded, raises UserError for what a user can mend: benchmarks' files, pictures, models, the
        output. Raises Interrupted after `stop()`; replies up to then are kept.
        """
        every = self.questions()
        asked = {name: self._as_asked(questions) for name, questions in every.items()}
        # Before they are loaded: if a model is replaced meanwhile, its replies are not taken for those of the new one.
        models = {label: digest_of_model(model) for label, model in self.spec.models.items()}
        seen = {label: digest([models[label], self._view(label)]) for label in models}
        self._write({})  # fails here if nothing can be written
        pieces = {label: Pieces(self.folder, self.spec.output.storage, each) for label, each in seen.items()}
        replies = {label: each.read() for label, each in pieces.items()}
        self._ask(asked, pieces, replies)
        for label, each in pieces.items():
            each.join(replies[label])
        scored = self._scored(every, asked, replies)
        subject = Subject(models, digest([[name, self.scorings[name].rule, *asked[name]] for name in asked]))
        self._write_scores(scored, subject)
        return scored

    def questions(self) -> dict[str, list[Question]]:
        """Return all questions of each benchmark. Raises DataError for files that are missing or damaged."""
        folder = DataFolder(self.spec.data.path, self.spec.data.storage)
        return {name: read_questions(benchmark, folder, self.options) for name, benchmark in self.benchmarks.items()}

    def _as_asked(self, questions: Sequence[Question]) -> dict[str, Question]:
        """Return digest → question for those within the limit, with what the spec changes of them."""
        changed = {"processing": self.spec.processing, "max_new_tokens": self.spec.max_new_tokens}
        changed = {name: value for name, value in changed.items() if value is not None}
        asked = [replace(each, **changed) for each in first_of(questions, self.spec.limit)]
        return {self._digest(each): each for each in asked}

    # ---------------------------------------------------------------------------------------------- asking

    def _view(self, label: str) -> str:
        """Return a digest of how a model sees a question. Raises ModelError or SpecError."""
        model = self.spec.models[label]
        processor = load_processor(model)
        require_images(model.path, load_config(model), processor)
        return renderers(self.spec, model, processor)["pad"].fingerprint

    def _ask(self, asked: Asked, pieces: Mapping[str, Pieces], replies: Mapping[str, dict[str, Reply]]) -> None:
        """Ask each model what it has not been asked, and add its replies to `replies` and `pieces`."""
        questions = {key: each for of_one in asked.values() for key, each in of_one.items()}
        left = {
            label: {key: each for key, each in questions.items() if key not in replies[label]}
            for label in self.spec.models
        }
        if not any(left.values()):
            return
        self._require_pictures([each for of_one in left.values() for each in of_one.values()])
        total = len(left) * len(questions)
        done = total - sum(map(len, left.values()))
        chunks = {label: chunked(label, each, self.spec.batch_size) for label, each in left.items()}
        with connected(self.spec), pieces_line(self.spec.name, total, "questions", completed=done) as update:

            def keep(chunk: Chunk, said: list[Reply]) -> None:
                new = dict(zip(chunk.keys, said, strict=True))
                pieces[chunk.label].add(new)
                replies[chunk.label].update(new)
                update(advance=len(said))

            Crew(self._worker(), self._places(sum(map(len, chunks.values()))), chunks).run(keep, self._stop.check)

    def _digest(self, question: Question) -> str:
        """Return what a question is known by in the pieces: all that the model's answer depends on."""
        image = question.image
        if isinstance(image, bytes):
            image = hashlib.sha256(image).hexdigest()
        elif image is not None:
            image = image.removeprefix(self.spec.data.path)
        return digest([question.key, question.text, image, question.processing, question.max_new_tokens])

    def _require_pictures(self, questions: Sequence[Question]) -> None:
        shown = len({each.image for each in questions if each.image is not None})
        with pieces_line(self.spec.name, shown, "pictures checked") as update:

            def on_read() -> None:
                self._stop.check()
                update(advance=1)

            require_pictures(questions, self.spec.data.storage, on_read)

    def _places(self, chunks: int) -> int:
        """Return how many workers fit on the cluster at a time. Raises ClusterError if not even one does."""
        pool, count, nodes = self.spec.cluster.student, min(chunks, self.spec.workers or chunks), alive_nodes()
        gpus = gpus_each(pool.gpus)
        remedy = "Lower what cluster.student asks for"
        check_room([Demand.of("student", 1, pool, gpus, remedy)], nodes)
        lacking = without_room([Demand.of("student", count, pool, gpus, remedy)], nodes)
        places = max(1, lacking[0][1]) if lacking else count
        if gpus or self.spec.workers:
            return places
        # A CPU has room for many processes, whose copies of a model may need more memory than there is.
        memory = sum(node.resources.get("memory", 0.0) for node in nodes)
        needs = [memory_of(model) for model in self.spec.models.values()]
        return min(places, len(needs) if None in needs else max(1, int(memory / max(filter(None, needs)))))

    def _worker(self) -> Callable[[str], object]:
        pool, spec = self.spec.cluster.student, ray.put(self.spec)
        kind = ray.remote(AnsweringWorker).options(**placement(pool, gpus_each(pool.gpus)), max_concurrency=2)
        return lambda label: kind.remote(spec, label)

    # ---------------------------------------------------------------------------------------------- results

    def _scored(self, every: Every, asked: Asked, replies: Mapping[str, dict[str, Reply]]) -> list[Scored]:
        """Write the answers files, and return their scores."""
        files, scored = dict[str, str](), list[Scored]()
        for label, said in replies.items():
            for name, questions in asked.items():
                rows = [
                    answer_line(each, said[key].text, label, reason=said[key].reason) for key, each in questions.items()
                ]
                path = join(ANSWERS, label, f"{name}.jsonl")
                files[path] = "".join(json.dumps(row) + "\n" for row in rows)
                file = AnswerFile(join(self.folder, path), list(enumerate(rows, start=1)))
                scored.append(score(self.benchmarks[name], every[name], file, self.scorings[name]))
        self._write(files)
        return scored

    def _write_scores(self, scored: Sequence[Scored], subject: Subject) -> None:
        pairs = comparisons(scored)
        # The result last: with this file it counts as done.
        self._write({TABLE: report(scored, pairs), RESULT: result_of(scored, pairs, subject).to_json()})

    def _write(self, files: dict[str, str]) -> None:
        try:
            with output_errors(self.folder):
                filesystem, root = open_store(self.folder, self.spec.output.storage)
                make_folder(filesystem, root)
                for name, content in files.items():
                    replace_file(filesystem, join(root, name), content.encode())
        except ValueError as error:
            raise OutputError(f"output.path: {self.folder} cannot be written ({error})") from error


def result_of(scored: Sequence[Scored], pairs: Sequence[Compared], subject: Subject) -> Result:
    """Return the scores of all models, by benchmark/metric; counts are among the scores."""
    scores, ends, names = dict[str, Scores](), dict[str, Intervals](), dict[str, str]()
    for label, own in by_model(scored).items():
        scores[label], ends[label] = {}, {}
        for each in own:
            name = each.benchmark.name
            scores[label] |= {f"{name}/{metric}": value for metric, value in (each.metrics | each.counts).items()}
            ends[label] |= {f"{name}/{metric}": both for metric, both in each.intervals.items()}
            names |= {f"{name}/{metric}": theirs for metric, theirs in each.benchmark.lmms.items()}
        if mean := average(own):
            scores[label]["average"], ends[label]["average"] = mean
    return Result(scores, subject, ends, list(pairs), names)


def memory_of(model: ModelSpec) -> float | None:
    """Return about how many bytes a process with this model needs; None if its files are not on this machine."""
    files = list(Path(model.path).glob(model.gguf_file or "*.safetensors"))
    return 1.25 * sum(file.stat().st_size for file in files) + OWN_BYTES if files else None


def chunked(label: str, questions: Mapping[str, Question], size: int) -> list[Chunk]:
    """Return the questions in chunks of similar length, the longest first."""

    # Images count most, and all of a kind: so questions with and without one are apart.
    def order(key: str) -> tuple[bool, int, int]:
        return questions[key].image is None, -questions[key].max_new_tokens, -len(questions[key].text)

    keys = sorted(questions, key=order)
    parts = [keys[start : start + size] for start in range(0, len(keys), size)]
    return [Chunk(label, part, [questions[key] for key in part]) for part in parts]


def evaluate(
    model: str | Mapping[str, str], benchmarks: str | Sequence[str], data: str, *, output: str = "runs", **options: Any
) -> Scores:
    """Return benchmark/metric → number of a model on public benchmarks, whose files are in `data`.

    `model` is a folder, a hub id or a URL; or several by label, and then the label is part of each name. `options` are
    further fields of `BenchmarksSpec`. Raises UserError.
    """
    models = {label_of(model): model} if isinstance(model, str) else model
    tree = {"models": {label: {"path": path} for label, path in models.items()}, "benchmarks": benchmarks}
    scored = Suite(parse_spec(tree | {"data": data, "output": output} | options, BenchmarksSpec)).run()
    return {
        "/".join(filter(None, (each.model if len(models) > 1 else "", each.benchmark.name, name))): value
        for each in scored
        for name, value in each.flat().items()
    }
