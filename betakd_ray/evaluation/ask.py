"""Questions to one model, one at a time, asked exactly as an evaluation asks them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from transformers.generation.streamers import BaseStreamer
from transformers.utils.hub import cached_file

from betakd_ray.batch.images import joined_images
from betakd_ray.batch.inputs import to_device
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.sample import IMAGE, Rendering
from betakd_ray.data.files import store_errors
from betakd_ray.data.processors import chosen_template
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample, Unrenderable
from betakd_ray.errors import DataError, ModelError, shortened
from betakd_ray.models.device import find_device
from betakd_ray.models.generation import default_length, greedy
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.source import local_folder, model_errors
from betakd_ray.models.vlm import freeze, with_image_tokens
from betakd_ray.run.files import SPEC_FILE, stored
from betakd_ray.run.folder import MODEL, MODEL_RECORD
from betakd_ray.spec import DataSpec, ModelSpec, StorageSpec
from betakd_ray.storage import join, open_store

HALF_CHARACTER = "\ufffd"
"""What a tokenizer shows for a token that is the beginning of a character."""


@dataclass(frozen=True)
class Subject:
    """A model to ask, and how its prompts are made."""

    model: ModelSpec
    data: DataSpec


class Conversation:
    """A model, and what was said to it so far."""

    def __init__(self, model: Any, renderer: Renderer, max_new_tokens: int | None = None) -> None:
        self._model, self._renderer = model, renderer
        own = model.generation_config
        length = max_new_tokens or own.max_new_tokens or default_length(model.config)
        self._settings = greedy(own, renderer.tokenizer, length)
        self._normalize = Normalization.of(renderer.image_processor)
        self.restart()

    def restart(self) -> None:
        """Forget what was said and shown."""
        self._turns: list[dict[str, str]] = []
        self._images: list[bytes] = []
        self._new: list[bytes] = []

    def show(self, image: bytes) -> None:
        """Show an encoded image with the next question. Raises DataError if it cannot be shown."""
        self._rendered([{"from": "human", "value": f"{IMAGE}\n?"}], [image])
        self._new.append(image)

    def ask(self, question: str, write: Callable[[str], object] = lambda text: None) -> str:
        """Return the answer to a question; `write` gets its pieces as they are generated.

        Raises DataError for a question that cannot be asked; then it counts as not asked.
        """
        asked = {"from": "human", "value": f"{IMAGE}\n" * len(self._new) + question}
        prompt = self._prompt([*self._turns, asked], [*self._images, *self._new])
        answer = self._answer(prompt, _Pieces(self._renderer.tokenizer, write))
        self._turns += [asked, {"from": "gpt", "value": answer}]
        self._images, self._new = [*self._images, *self._new], []
        return answer

    def _rendered(self, turns: list[dict[str, str]], images: list[bytes]) -> Rendering:
        # A prompt ends before the last answer, whatever that is.
        sample = RawSample("question", 0, "question", [*turns, {"from": "gpt", "value": "."}], images)
        try:
            return self._renderer.prompt(sample)
        except Unrenderable as reason:
            raise DataError(f"cannot be asked: {reason}") from reason

    def _prompt(self, turns: list[dict[str, str]], images: list[bytes]) -> Rendering:
        prompt = self._rendered(turns, images)
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions and len(prompt.input_ids) + self._settings.max_new_tokens > positions:
            raise DataError(
                f"the conversation has {len(prompt.input_ids)} tokens and the answer may have "
                f"{self._settings.max_new_tokens}, but the model has room for {positions}. Begin a new conversation, "
                "or allow a shorter answer (--max-new-tokens)."
            )
        return prompt

    @torch.inference_mode()
    def _answer(self, prompt: Rendering, pieces: "_Pieces") -> str:
        device = self._model.device
        input_ids = to_device(prompt.input_ids.astype(np.int64)[None], device)
        images = joined_images([prompt.images] if prompt.images else [])
        shown = {name: to_device(array, device) for name, array in images.items()}
        if shown:
            shown = with_image_tokens(self._model, input_ids, self._normalize.of_images(shown, self._model.dtype))
        self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=self._settings,
            streamer=pieces,
            **shown,
        )
        return pieces.text


class _Pieces(BaseStreamer):
    """Receiver of generated tokens, which passes on the text that later tokens will not change."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._write = write
        self._tokens: list[int] | None = None
        self._written = ""

    @property
    def text(self) -> str:
        """Return the whole answer, as an evaluation stores it."""
        return self._decode(self._tokens or []).strip()

    def put(self, value: torch.Tensor) -> None:
        if self._tokens is None:  # the first call brings the prompt
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        # The whole text each time: the text of a token alone may differ from its text after others.
        text = self.text
        if not text.endswith(HALF_CHARACTER):
            self._pass_on(text)

    def end(self) -> None:
        self._pass_on(self.text)

    def _pass_on(self, text: str) -> None:
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text


def open_conversation(
    place: str,
    *,
    storage: StorageSpec,
    max_new_tokens: int | None = None,
    system_prompt: str | None = None,
    template: str | None = None,
) -> Conversation:
    """Load the model of a run, a folder, a URL or a hub id, on this process's device. Raises ModelError.

    A run's model is asked as the run was trained, any other by its own chat template; `system_prompt` and `template`
    replace these.
    """
    found = _of_run(place, storage) or _of_model(place, storage, template)
    changes = {"system_prompt": system_prompt, "template": template}
    data = found.data.model_copy(update={name: value for name, value in changes.items() if value is not None})
    renderer = Renderer(load_processor(found.model), data)
    model = freeze(load_model(found.model, devices=[find_device()]))
    return Conversation(model, renderer, max_new_tokens)


def _of_run(place: str, storage: StorageSpec) -> Subject | None:
    """Return the model of a run's folder; None if it is no such folder. Raises ModelError if it has no model yet."""
    if "://" not in place and not Path(place).is_dir():
        return None
    spec = stored(place, storage, SPEC_FILE)
    if spec is None:
        return None
    folder = join(place, MODEL)
    with store_errors(folder, storage):
        filesystem, path = open_store(folder, storage)
        if not filesystem.exists(join(path, "config.json")):
            raise ModelError(f"{folder}: no model there yet. Run the job until it ends, which writes its model.")
    return Subject(_model(folder, storage), spec.data)


def _model(place: str, storage: StorageSpec) -> ModelSpec:
    try:
        return ModelSpec(path=place, storage=storage)
    except ValidationError as error:
        raise ModelError(f"{shortened(place)}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _of_model(place: str, storage: StorageSpec, template: str | None) -> Subject:
    model = _model(place, storage)
    processor = load_processor(model)
    record = _record(model)
    if template is None and not chosen_template(processor, None):
        raise ModelError(
            f"{place}: has no chat template, so it is not known how it is asked. Give the folder of its run, or "
            "--template vicuna_v1 or plain."
        )
    # Not padded by default: transformers does not pad either, unless the model's own image processor does.
    pads = bool(record.get("pad_to_square"))
    return Subject(
        model, DataSpec.model_validate({"train": "/", "template": template or "chat", "pad_to_square": pads})
    )


def _record(model: ModelSpec) -> dict[str, Any]:
    """Return what a result's record says, also one that was published; empty for a model of others."""
    with model_errors(model, f"its {MODEL_RECORD} cannot be read"):
        folder = local_folder(model.path, model.storage)
        file = cached_file(folder, MODEL_RECORD, _raise_exceptions_for_missing_entries=False)
        found = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        return found if isinstance(found, dict) else {}
