"""All checks of one loaded model on a few samples of the data, in the process that holds the model."""

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from betakd_ray.batch.sample import Rendering
from betakd_ray.check.alignment import check_alignment
from betakd_ray.check.batching import check_batching
from betakd_ray.check.finding import Finding
from betakd_ray.check.keeping import KeepingRenderer
from betakd_ray.check.parity import check_parity
from betakd_ray.check.settings import check_settings
from betakd_ray.check.sight import check_sight
from betakd_ray.check.subject import CPU, HIDDEN, Score, Subject, local_score
from betakd_ray.check.template import check_template
from betakd_ray.check.vocabulary import check_vocabulary
from betakd_ray.check.weights import check_weights
from betakd_ray.data.samples import RawSample, Unrenderable
from betakd_ray.models.vlm import lm_head
from betakd_ray.spec import CheckSpec, DataSpec
from betakd_ray.teacher.answers import to_tensor, to_wire
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.scorer import TeacherScorer


def check_teacher(
    model: Any,
    processor: Any,
    samples: Sequence[RawSample],
    data: DataSpec,
    *,
    needs: Needs = HIDDEN,
    score: Score | None = None,
    head: NDArray[Any] | None = None,
    student_processor: Any = None,
    settings: CheckSpec | None = None,
    batch_tokens: int = 8192,
    part: str = "teacher",
) -> list[Finding]:
    """Return the findings of every check; `finding.require_fit` turns failures into one error.

    `samples` are raw samples of the data, rendered here with `data.template`; those that cannot be rendered are left
    out. `score` and `head` are what students get (`TeacherScorer.score`, `.head()`); without them the model is asked
    directly. The model is left as it was. Raises ModelError and SpecError as `Renderer` does.
    """
    settings = settings or CheckSpec()
    renderer = KeepingRenderer(processor, data)
    drawn = list(_renderable(renderer, samples, max(settings.samples, settings.answers)))
    subject = Subject(
        model=model,
        renderer=renderer,
        data=data,
        samples=tuple(sample for sample, _ in drawn),
        renderings=tuple(rendering for _, rendering in drawn),
        needs=needs,
        score=score or local_score(model, needs, renderer.image_processor),
        head=to_tensor(to_wire(lm_head(model).weight) if head is None else head, CPU),
        batch_tokens=batch_tokens,
        part=part,
        knows_answers=settings.knows_answers,
        close=settings.samples,
    )
    findings = [*check_weights(model, part=part), *check_vocabulary(subject, student_processor)]
    if not subject.samples:
        return [*findings, Finding("alignment", "no sample can be rendered", "samples to ask", "skipped", part=part)]
    for check in (check_parity, check_batching, check_sight, check_alignment, check_template, check_settings):
        findings += check(subject)
    return findings


def check_scorer(
    scorer: TeacherScorer,
    samples: Sequence[RawSample],
    data: DataSpec,
    settings: CheckSpec,
    student_processor: Any = None,
) -> list[Finding]:
    """Return the findings on a teacher in its actor (`TeacherScorer.apply`), asked as students ask it."""
    return check_teacher(
        scorer.model,
        scorer.processor,
        samples,
        data,
        needs=scorer.needs,
        score=scorer.score,
        head=scorer.head(),
        student_processor=student_processor,
        settings=settings,
    )


def _renderable(
    renderer: KeepingRenderer, samples: Sequence[RawSample], count: int
) -> Iterator[tuple[RawSample, Rendering]]:
    """Yield the first `count` samples that can be rendered, with their renderings."""
    left = count
    for sample in samples:
        if not left:
            return
        try:
            rendering = renderer.render(sample)
        except Unrenderable:  # the reader puts it into quarantine; that is no fault of the teacher
            continue
        left -= 1
        yield sample, rendering
