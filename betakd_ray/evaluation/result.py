"""evaluation.json: the scores of models, and of which models and questions they are."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from betakd_ray.data.files import store_errors
from betakd_ray.data.shards import Shard
from betakd_ray.evaluation.intervals import Compared, Intervals
from betakd_ray.models.identity import model_version
from betakd_ray.models.source import model_errors
from betakd_ray.plugins import source_of
from betakd_ray.spec import EvaluationSpec, ModelSpec, QuestionsSpec, StorageSpec
from betakd_ray.spec.base import is_plugin
from betakd_ray.storage import join, open_store

RESULT = "evaluation.json"
TABLE = "evaluation.md"
"""File of the scores as tables."""
_LOG = logging.getLogger(__name__)

Scores = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """What an evaluation is of: a result for other models or questions is not a result of it."""

    models: dict[str, str]
    """Label → digest of the model's files."""
    questions: str
    """Digest of the questions, and of how they are asked and scored."""

    @classmethod
    def of(cls, spec: EvaluationSpec, shards: Sequence[Shard]) -> "Subject":
        """Return the subject as it is now. Raises ModelError for a model that is not there."""
        return cls({label: digest_of_model(model) for label, model in spec.models.items()}, _of_questions(spec, shards))


@dataclass(frozen=True)
class Result:
    """Content of evaluation.json."""

    scores: dict[str, Scores]
    """Label of a model → metric → number."""
    subject: Subject
    intervals: dict[str, Intervals] = field(default_factory=dict)
    """Label of a model → metric → ends of its 95% interval, where it is known."""
    comparisons: list[Compared] = field(default_factory=list)
    """Each model with each one before it."""
    lmms_eval: dict[str, str] = field(default_factory=dict)
    """Metric → task and metric in lmms-eval."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


_RESULT = TypeAdapter(Result)


def read_result(folder: str, storage: StorageSpec, subject: Subject) -> dict[str, Scores] | None:
    """Return the scores of an evaluation that was done before, by label; None if it is to be done.

    A file that is unreadable, or of another subject, is named in a warning and counts as none. Raises DataError if the
    store fails.
    """
    url = join(folder, RESULT)
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        try:
            content = cast(bytes, filesystem.cat_file(path))
        except FileNotFoundError:
            return None
    try:
        result = _RESULT.validate_json(content)
    except ValidationError as error:
        _LOG.warning(
            "%s: is not a whole result of this version (%s). It is evaluated again.", url, error.errors()[0]["msg"]
        )
        return None
    if result.subject != subject or result.scores.keys() != subject.models.keys():
        _LOG.warning(
            "%s: is the result of other models or questions than now, or of a version that told them apart in another "
            "way. It is evaluated again.", url,
        )  # fmt: skip
        return None
    return result.scores


def digest_of_model(spec: ModelSpec) -> str:
    """Return a digest of a model's files, and of how they are loaded."""
    with model_errors(spec, "its files cannot be told from others"):
        return digest([spec.model_dump_json(), model_version(spec)])


def _of_questions(spec: EvaluationSpec, shards: Sequence[Shard]) -> str:
    asked = spec.model_dump(mode="json", include={*QuestionsSpec.model_fields, "agreement_with"})
    benchmark = source_of(spec.benchmark) if is_plugin(spec.benchmark) else ""
    return digest([asked, benchmark, [asdict(shard) for shard in shards]])


def digest(content: list[Any]) -> str:
    """Return a digest of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
