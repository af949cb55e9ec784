"""Evaluation of several models on one question set: one Ray task per model, and one table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, tee
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.manifest import find_shards
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.data.shards import Shard, read_shard_with_retry
from betakd_ray.errors import ClusterError, DataError, OutputError, TrainingError
from betakd_ray.evaluation.exact_match import ModelAnswer, agreement
from betakd_ray.evaluation.generate import answers
from betakd_ray.evaluation.packed import comparisons_of, intervals_of, tables_of
from betakd_ray.evaluation.result import RESULT, TABLE, Result, Scores, Subject, read_result
from betakd_ray.evaluation.score_table import markdown
from betakd_ray.models.device import find_device
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import freeze
from betakd_ray.on_ray.cluster import gpus_each, placement
from betakd_ray.plugins import load
from betakd_ray.progress import progress_line
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import EvaluationSpec, QuestionsSpec
from betakd_ray.spec.tasks import BENCHMARKS
from betakd_ray.storage import join, make_folder, open_store, replace_file

Benchmark = Callable[[Sequence[ModelAnswer]], Mapping[str, float]]
"""Function of a model's answers, in the order of the questions, that returns metric → number."""


@dataclass(frozen=True)
class Answered:
    """A question of the set, and a model's answer to it."""

    question_id: str
    prompt: str
    record: ModelAnswer
    reason: str | None = None
    """Reason why the sample could not be read; None if it was read."""

    def line(self, label: str, position: int) -> dict[str, Any]:
        """Return a line of answers-{label}.jsonl, in LLaVA's format."""
        known = {"reference": self.record.reference, "type": self.record.type, "reason": self.reason}
        return {
            "question_id": self.question_id,
            "prompt": self.prompt,
            "text": self.record.text or "",
            "answer_id": f"{label}-{position}",
            "model_id": label,
            "metadata": {name: value for name, value in known.items() if value is not None}
            | {"answered": self.record.text is not None},
        }


class Evaluation:
    """Runner of an evaluation on the Ray cluster to which this process is connected.

    Raises SpecError if the spec names a benchmark that is not found.
    """

    def __init__(self, spec: EvaluationSpec) -> None:
        self.spec = spec
        self.folder = join(spec.output.path, spec.name)
        self.benchmark = benchmark_of(spec)
        self._stop = StopRequest(f"{spec.name}: was asked to stop. Run it again to ask all its questions.")

    def stop(self) -> None:
        """Ask a running `run()` to end; it then raises Interrupted. Call it as `BetaKDJob.stop`."""
        self._stop.make()

    def run(self) -> dict[str, Scores]:
        """Run the evaluation; return label of a model → metrics. Raises what `result` raises."""
        return self.result().scores

    def result(self) -> Result:
        """Run the evaluation; return its scores, how sure they are, and comparisons of the models.

        Answers, result and table are also written to the output. Raises ClusterError, DataError, ModelError or
        OutputError for errors that the user can repair, and Interrupted after `stop()`.
        """
        shards = find_shards(self.spec.data.paths, self.spec.data.storage, self.spec.data.manifest)
        if not sum(shard.samples for shard in shards):
            raise DataError(f"data.train: {list(self.spec.data.paths)} has no samples. Name shards with questions.")
        self._store({})  # fails here, before the models run, if the output cannot be written
        # Also before: if a model is replaced meanwhile, the result is not taken for that of the new one.
        subject = Subject.of(self.spec, shards)
        answered = self._answer(shards)
        result = self._result({label: self._score(label, answered) for label in self.spec.models}, subject, answered)
        lines = {
            f"answers-{label}.jsonl": "".join(
                json.dumps(each.line(label, position), ensure_ascii=False) + "\n"
                for position, each in enumerate(answered[label])
            )
            for label in self.spec.models
        }
        lines[TABLE] = "\n\n".join(map(markdown, tables_of(result))) + "\n"
        self._store(lines | {RESULT: result.to_json()})  # last: with this file it counts as done
        return result

    def _result(self, scores: dict[str, Scores], subject: Subject, answered: dict[str, list[Answered]]) -> Result:
        """Return the result, with intervals and comparisons if it is known how the benchmark counts."""
        if self.spec.benchmark not in BENCHMARKS:
            return Result(scores, subject)
        records = {label: [each.record for each in answered[label]] for label in self.spec.models}
        return Result(scores, subject, intervals_of(records, self.spec.agreement_with), comparisons_of(records))

    def stored(self) -> dict[str, Scores] | None:
        """Return the result of an earlier run; None if there is no whole one of the same models and questions.

        Raises DataError if there are no such questions, or if a store fails.
        """
        shards = find_shards(self.spec.data.paths, self.spec.data.storage, self.spec.data.manifest)
        return read_result(self.folder, self.spec.output.storage, Subject.of(self.spec, shards))

    def _answer(self, shards: list[Shard]) -> dict[str, list[Answered]]:
        """Run one task per model, as many at the same time as the cluster has room for."""
        pool = self.spec.cluster.student
        task = ray.remote(answer).options(**placement(pool, _gpus(pool.gpus)))
        pending = {task.remote(self.spec, label, shards): label for label in self.spec.models}
        answered: dict[str, list[Answered]] = {}
        try:
            with progress_line(self.spec.name, len(pending), "models") as update:
                while pending:
                    self._stop.check()
                    for done in ray.wait(list(pending), timeout=1.0)[0]:
                        label = pending.pop(done)
                        answered[label] = _result(done, label)
                        update(advance=1)
        finally:
            for unfinished in pending:
                ray.cancel(unfinished, force=True)
        return answered

    def _score(self, label: str, answered: dict[str, list[Answered]]) -> Scores:
        records = [each.record for each in answered[label]]
        metrics = dict(self.benchmark(records))
        reference = self.spec.agreement_with
        if reference is not None and reference != label:
            others = [each.record.text for each in answered[reference]]
            metrics["agreement"] = agreement([record.text for record in records], others)
        return metrics

    def _store(self, files: dict[str, str]) -> None:
        try:
            filesystem, root = open_store(self.folder, self.spec.output.storage)
            make_folder(filesystem, root)
            for name, content in files.items():
                replace_file(filesystem, join(root, name), content.encode())
        except (OSError, ValueError) as error:
            raise OutputError(f"output.path: {self.folder} cannot be written ({error})") from error


def benchmark_of(spec: QuestionsSpec) -> Benchmark:
    """Return the function that scores answers. Raises SpecError if the spec names one that is not found."""
    return load(BENCHMARKS.get(spec.benchmark, spec.benchmark), "benchmark")


def answer(spec: EvaluationSpec, label: str, shards: list[Shard]) -> list[Answered]:
    """Load a model on this process's device and ask it every question. Raises ModelError or DataError."""
    renderer = Renderer(load_processor(spec.models[label]), spec.data)
    model = freeze(load_model(spec.models[label], devices=[find_device()]))
    # The two are at most a few batches apart (`WINDOW_BATCHES`), so tee never holds more samples than these.
    asked, kept = tee(_samples(spec, shards))
    texts = answers(model, renderer, asked, batch_size=spec.batch_size, max_new_tokens=spec.max_new_tokens)
    return [_answered(sample, text) for text, sample in zip(texts, kept, strict=True)]


def _samples(spec: EvaluationSpec, shards: list[Shard]) -> Iterator[RawSample | BadSample]:
    every = chain.from_iterable(read_shard_with_retry(shard, spec.data.storage) for shard in shards)
    return islice(every, spec.limit)


def _answered(sample: RawSample | BadSample, text: str | None) -> Answered:
    if isinstance(sample, BadSample):
        return Answered(sample.key, "", ModelAnswer(None, None), sample.reason)
    turns = sample.conversation
    last = max(i for i, turn in enumerate(turns) if turn["from"] == "gpt")
    question = next((turn["value"] for turn in reversed(turns[:last]) if turn["from"] == "human"), "")
    kind = sample.extra.get("type")
    record = ModelAnswer(text, turns[last]["value"], None if kind is None else str(kind))
    return Answered(sample.id, question.replace(IMAGE, "").strip(), record)


def _gpus(asked: float | str) -> float:
    """Return the number of GPUs per model. Raises ClusterError if the cluster has fewer: a task would wait forever."""
    available = ray.cluster_resources().get("GPU", 0.0)
    gpus = gpus_each(asked)
    if gpus > available:
        raise ClusterError(
            f"cluster.student.gpus: a model asks for {gpus:g} GPUs; the cluster has {available:g}. Lower it "
            "or add nodes."
        )
    return gpus


def _result(done: Any, label: str) -> list[Answered]:
    """Return the result of a task. Raises the task's own error, without Ray's wrapper."""
    try:
        return ray.get(done)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise TrainingError(f"models.{label}: its process died ({error})") from error
