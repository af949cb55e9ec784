"""How a model sees the questions of a benchmark: its template, its images, and the limit of its answer."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import LlavaProcessor

from betakd_ray.batch.sample import IMAGE, Rendering
from betakd_ray.data.files import store_errors
from betakd_ray.data.processors import chosen_template
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import RawSample
from betakd_ray.errors import ModelError
from betakd_ray.evaluation.benchmark import Processing, Question
from betakd_ray.run.folder import MODEL, SPEC
from betakd_ray.spec import BenchmarksSpec, DataSpec, ModelSpec
from betakd_ray.storage import join, open_store

OF_CHAT = ("chat_template", "template_arguments", "template_date")
TRAINED_WITH = ("template", "system_prompt", "pad_to_square", "min_pixels", "max_pixels", *OF_CHAT)
"""Fields of a job's data section that say how its model sees a question."""
VICUNA = "USER: "
"""Text in the chat template that transformers gives a LLaVA 1.5, in place of LLaVA's own template."""


def renderers(spec: BenchmarksSpec, model: ModelSpec, processor: Any) -> dict[Processing, Renderer]:
    """Return the renderer for each way in which a benchmark may have its images prepared.

    Only LLaVA and MobileVLM are evaluated in both ways; other models always see an image in their own.
    """
    data = data_spec(spec, model, processor)
    found: dict[Processing, Renderer] = {"pad": Renderer(processor, data), "crop": Renderer(processor, data)}
    found["crop"].pad_to_square = found["crop"].pad_to_square and not isinstance(processor, LlavaProcessor)
    return found


def data_spec(spec: BenchmarksSpec, model: ModelSpec, processor: Any) -> DataSpec:
    """Return the settings with which a model sees text and images. Raises SpecError."""
    chosen = trained_with(model) or {"template": _usual_template(processor)}
    own = {"template": spec.template, "system_prompt": spec.system_prompt}
    chosen |= {name: value for name, value in own.items() if value is not None}
    if chosen["template"] != "chat":
        chosen = {name: value for name, value in chosen.items() if name not in OF_CHAT}
    # The public tools take a control token in a question as it stands, so it is one here too.
    return DataSpec.model_validate({"train": "questions.tar", "special_tokens": "allow"} | chosen)


def trained_with(model: ModelSpec) -> dict[str, Any] | None:
    """Return the settings of the job that made a model; None if no job of this package did, or it lies elsewhere."""
    parent, _, name = model.path.rstrip("/").rpartition("/")
    if name != MODEL or not parent:
        return None
    url = join(parent, SPEC)
    with store_errors(url, model.storage):
        filesystem, path = open_store(url, model.storage)
        try:
            content = filesystem.cat_file(path)
        except FileNotFoundError:
            return None
    try:
        data = json.loads(content)["data"]
        return {name: data[name] for name in TRAINED_WITH if name in data}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{url}: does not say how {model.path} was trained ({type(error).__name__}: {error}). Copy the folder "
            f"{MODEL} to another place, and name its template."
        ) from error


def _usual_template(processor: Any) -> str:
    written = chosen_template(processor, None)
    if not written:
        return "vicuna_v1"
    return "vicuna_v1" if isinstance(processor, LlavaProcessor) and VICUNA in written else "chat"


def sample_of(question: Question, image: bytes | None) -> RawSample:
    """Return a question as a sample, whose answer is not part of the prompt."""
    asked = question.text if image is None else f"{IMAGE}\n{question.text}"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "?"}]
    return RawSample(question.key, 0, question.key, turns, [] if image is None else [image])


def rendering_of(
    question: Question, image: bytes | None, renderers: Mapping[Processing, Renderer]
) -> Rendering | Unrenderable:
    """Return a question as a model sees it, or the reason why it cannot see it."""
    try:
        return renderers[question.processing].prompt(sample_of(question, image))
    except Unrenderable as reason:
        return reason
