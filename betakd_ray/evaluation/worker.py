"""The process that holds one model and answers questions; an actor on the cluster."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from betakd_ray.batch.sample import Rendering
from betakd_ray.data.render import Unrenderable
from betakd_ray.evaluation.asking import renderers, rendering_of
from betakd_ray.evaluation.benchmark import Question
from betakd_ray.evaluation.generate import RENDERING_THREADS, Answerer, Prompt
from betakd_ray.evaluation.pictures import read_picture
from betakd_ray.evaluation.pieces import Reply
from betakd_ray.models.device import find_devices
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import freeze
from betakd_ray.spec import BenchmarksSpec


class AnsweringWorker:
    """One model on the devices of this process. `answer` may be called from several threads.

    While one call generates, the next one reads and prepares its pictures.
    """

    def __init__(self, spec: BenchmarksSpec, label: str) -> None:
        """Note which model to load. It is not loaded here: Ray would hide an error of a constructor."""
        self._spec, self._label = spec, label
        self._threads = ThreadPoolExecutor(RENDERING_THREADS, thread_name_prefix="render")
        self._generating = threading.Lock()

    def load(self) -> None:
        """Load the model. Raises ModelError."""
        spec, model = self._spec, self._spec.models[self._label]
        processor = load_processor(model)
        self._renderers = renderers(spec, model, processor)
        self._answerer = Answerer(
            freeze(load_model(model, devices=find_devices())),
            self._renderers["pad"],
            batch_size=spec.batch_size,
            batch_tokens=spec.batch_tokens,
        )

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Return a reply to each question, in their order. Raises DataError if a picture can no longer be read."""
        rendered = list(self._threads.map(self._rendered, questions))
        replies = [Reply(None, str(each) if isinstance(each, Unrenderable) else None) for each in rendered]
        prompts = [
            Prompt(at, each, question.max_new_tokens)
            for at, (each, question) in enumerate(zip(rendered, questions, strict=True))
            if isinstance(each, Rendering)
        ]
        with self._generating:
            for at, text in self._answerer.answers(prompts):
                replies[at] = Reply(text)
        return replies

    def _rendered(self, question: Question) -> Rendering | Unrenderable:
        return rendering_of(question, read_picture(question, self._spec.data.storage), self._renderers)
