"""A conversation with its images → token ids, an answer mask, and the inputs of the vision tower.

A `Renderer` makes one model's view of a sample: with its tokenizer, its chat template, its image processing and its
image tokens. Teacher and student may see a sample differently. But their *answer tokens* are the same, and the two
models are compared on these tokens.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import LlavaProcessor

from betakd_ray.batch.images import Images
from betakd_ray.batch.processing import ImageProcessing
from betakd_ray.batch.sample import IMAGE, Rendering
from betakd_ray.data.control_tokens import contained, control_tokens, counted, neutral, neutral_system
from betakd_ray.data.pictures import FORMATS, require_still, rgb
from betakd_ray.data.processors import chosen_template, template_variables, with_pixel_limits
from betakd_ray.data.samples import RawSample, Unrenderable
from betakd_ray.data.templates import REMEDY, ChatTemplate, Span, Template
from betakd_ray.errors import ModelError, SpecError
from betakd_ray.plugins import load, source_of
from betakd_ray.spec import DataSpec
from betakd_ray.spec.base import is_plugin
from betakd_ray.spec.data import TEMPLATES

PROBES = ((48, 32), (32, 48), (300, 40), (700, 500))
"""Sizes (width, height) in pixels of test images that show how a processor treats an image's shape."""
PROBE = RawSample("probe", 0, "probe", [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A probe."}], [])
NO_TOKEN = -1
KEPT_COUNTS = 1000
"""Number of forms of a conversation whose control tokens are remembered."""


def _template_function(data: DataSpec, eos: str) -> Template:
    """Return the function of a template that is not the processor's own.

    A user's function is tried on a conversation of two turns. Raises SpecError if it does not give prompt and answer.
    """
    function = load(TEMPLATES.get(data.template) or data.template, "data.template")
    if not is_plugin(data.template):
        return function
    try:
        spans, again = (
            [(str(text), bool(is_answer)) for text, is_answer in function(PROBE.conversation, None, eos)]
            for _ in range(2)
        )
    except Exception as error:  # the function is the user's
        raise SpecError(f"data.template: {data.template} raises {type(error).__name__}: {error}") from error
    written, answers = PROBE.conversation[-1]["value"], [text for text, is_answer in spans if is_answer]
    if not any(written in text for text in answers) or spans[0][1]:
        raise SpecError(
            f"data.template: {data.template} returns {spans} for {PROBE.conversation}; it must return the prompt as "
            "(text, False) and then the answer as (text, True)"
        )
    if again != spans:
        raise SpecError(
            f"data.template: {data.template} returns {spans} for {PROBE.conversation}, and then {again} for the same. "
            "It must always return the same: leave out random numbers and the time"
        )
    return function


class Renderer:
    """Converter of raw samples into one model's inputs. Cheap to create, and safe to share between threads.

    Raises ModelError if the processor lacks what rendering needs (a fast tokenizer, an image token, an eos token), or
    if its chat template cannot render two turns. Raises SpecError for a function or a system prompt of no use.
    """

    def __init__(self, processor: Any, data: DataSpec) -> None:
        processor = with_pixel_limits(processor, data)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        self.processor = processor
        self.template = data.template
        self.template_date = data.template_date
        self.template_arguments = data.template_arguments
        self._template_name = data.chat_template
        self.system_prompt = data.system_prompt
        self.max_length = data.max_length
        self.max_image_pixels = data.max_image_pixels
        self.pad_to_square = isinstance(processor, LlavaProcessor) if data.pad_to_square is None else data.pad_to_square
        self.image_token: str = getattr(processor, "image_token", IMAGE)
        self.image_token_id: int = getattr(processor, "image_token_id", NO_TOKEN)
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer, but only a fast one gives the character offsets "
                "that locate answer tokens. Save the tokenizer with its tokenizer.json."
            )
        if self.tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no eos token, which must end each answer. Set eos_token.")
        self._template_function = self._template(data)
        self._process_images = ImageProcessing(processor) if self.image_processor else None
        self.special_tokens = data.special_tokens
        self._control: dict[int, str] = {}
        if data.special_tokens != "allow":
            kept = () if data.special_tokens == "refuse" else data.special_tokens
            written = self.chat_template if data.template == "chat" else None
            self._control = control_tokens(self.tokenizer, written, kept)
        self._of_template: dict[tuple[Any, ...], Counter[str]] = {}
        self._check()

    def _template(self, data: DataSpec) -> Template:
        if data.template != "chat":
            return _template_function(data, self._eos)
        if not self.chat_template:
            raise ModelError("data.template is `chat`, but the processor has no chat template. Use vicuna_v1 or plain.")
        source = self.chat_template
        image_token = self.image_token if self.image_processor else None
        variables = template_variables(source, self.tokenizer.special_tokens_map, data.template_arguments)
        not_ends = {self.tokenizer.bos_token, self.tokenizer.unk_token, image_token} - {self._eos}
        ends = set(control_tokens(self.tokenizer, source, ()).values()) - not_ends
        return ChatTemplate(source, variables, image_token, self.template_date, sorted(ends))

    def _check(self) -> None:
        """Try the template on a conversation of two turns. Raises SpecError or ModelError."""
        in_system = counted(self.tokenizer, self._control, self.system_prompt or "")
        if in_system:
            raise SpecError(f"data.system_prompt: {contained(in_system)}")
        try:
            spans = self._checked_spans(PROBE)
            if not any(PROBE.conversation[-1]["value"] in text for text, is_answer in spans if is_answer):
                raise Unrenderable(f"the {self.template} template leaves out the answer")
        except Unrenderable as reason:
            turns = ", ".join(f"{turn['from']}: {turn['value']!r}" for turn in PROBE.conversation)
            seen = f"{reason}; seen on the conversation ({turns}) with data.system_prompt {self.system_prompt!r}"
            if self.template != "chat":
                raise SpecError(f"data.template: {self.template}: {seen}") from reason
            raise ModelError(f"{self.tokenizer.name_or_path or 'the model'}: {seen}. {REMEDY}") from reason

    @property
    def _eos(self) -> str:
        return self.tokenizer.eos_token

    @property
    def pad_token_id(self) -> int:
        """Return the tokenizer's padding token, or its end-of-sequence token: padding is masked in both cases."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Return the number of tokens that the model makes of an image, for each size in PROBES."""
        return tuple(texts[0].count(self.image_token) for _, texts in map(self._probed, PROBES))

    def count_image_tokens(self, rendering: Rendering) -> int:
        """Return the number of image tokens of all images of a sample."""
        return int((rendering.input_ids == self.image_token_id).sum())

    @property
    def fingerprint(self) -> str:
        """Return a hash of all that a rendering depends on; equal only for renderers that render all samples alike."""
        template = (self.template, source_of(self.template)) if is_plugin(self.template) else self.template
        data = (template, self.system_prompt, self.max_length, self.pad_to_square, self.max_image_pixels)
        # Not with `refuse`, so that caches from before this setting stay valid: what it does not refuse is rendered
        # as before.
        data += () if self.special_tokens == "refuse" else (self.special_tokens,)
        data += tuple(self.tokenizer.chat_control_tokens or ())
        # A processor does not say how it changes an image or how many tokens it makes: test images show it.
        # The last test has two images at once: some processors treat an image differently then.
        probed = [self._probed(*sizes) for sizes in (*((size,) for size in PROBES), PROBES[:2])]
        images = [(texts, [(name, a.shape, a.dtype) for name, a in arrays.items()]) for arrays, texts in probed]
        text = self._uncut(PROBE).input_ids.tolist()
        chat: tuple[Any, ...] | None = None
        if self.template == "chat" and self.chat_template:
            # Without the date where it is not used, so that caches from before this setting stay valid.
            date = (self.template_date.isoformat(),) if "strftime_now" in self.chat_template else ()
            chat = (self.chat_template, self.tokenizer.special_tokens_map, *date)
            chat += (self.template_arguments,) if self.template_arguments else ()
            # Before, they all came first: a signal from then would be of another text.
            chat += ("images in place",) if cast(ChatTemplate, self._template_function).takes_parts else ()
        everything = repr((data, self._image_settings(), images, chat, text, self._tokenization()))
        return hashlib.sha256(everything.encode()).hexdigest()[:16]

    def _probed(self, *sizes: tuple[int, int]) -> tuple[Images, list[str]]:
        """Return test images of these sizes as the model would see them; nothing if it takes no images."""
        if self._process_images is None:
            return {}, [""]
        return self._process_images(self.framed(Image.new("RGB", size, (200, 30, 90))) for size in sizes)

    def _image_settings(self) -> tuple[Any, ...] | None:
        if self.image_processor is None:
            return None
        own = {name: value for name, value in vars(self.processor).items() if isinstance(value, int | float | str)}
        own.pop("chat_template", None)
        # Processors of Pillow and of torchvision have the same settings but round differently: include the class.
        kind = (type(self.processor).__qualname__, type(self.image_processor).__qualname__)
        return kind, sorted(own.items()), self.image_processor.to_dict()

    def render(self, sample: RawSample) -> Rendering:
        """Return tokens, answer mask and pixels of a sample. Raises Unrenderable with the reason."""
        whole = self._uncut(sample)
        return Rendering(*self._fit(whole.input_ids, whole.answer_mask), whole.images)

    def prompt(self, sample: RawSample) -> Rendering:
        """Return the sample up to its last answer, for a model to continue. It is not cut at `max_length`.

        With the `plain` template it has the image tokens only. Raises Unrenderable with the reason.
        """
        spans, images = self._shown(sample)
        last = max(i for i, (_, is_answer) in enumerate(spans) if is_answer)
        # A trailing space would become a separate token, which never comes before an answer in training.
        spans = [*spans[: last - 1], (spans[last - 1][0].rstrip(" "), False)]
        input_ids, answer_mask = self._tokenize(spans)
        if not len(input_ids):
            raise Unrenderable(f"the prompt is empty: template {self.template} shows only images, but there are none")
        return Rendering(input_ids, answer_mask, images)

    def by_processor(self, sample: RawSample) -> NDArray[np.int64] | None:
        """Return the token ids that the processor itself makes of a sample's text and images, for a comparison.

        None if it does not take both at once.
        """
        text = "".join(piece for piece, _ in self._checked_spans(sample))
        if not sample.images or self._process_images is None:
            return None
        options = {"add_special_tokens": False} if self._has_bos(text) else {}
        try:
            made = self.processor(text=[text], images=[[*map(self._decode, sample.images)]], **options)
        except (TypeError, ValueError, AttributeError, ImportError):  # processors that need packages for videos
            return None
        return np.asarray(made["input_ids"][0], dtype=np.int64)

    def _uncut(self, sample: RawSample) -> Rendering:
        spans, images = self._shown(sample)
        return Rendering(*self._tokenize(spans), images)

    def _shown(self, sample: RawSample) -> tuple[list[Span], Images]:
        """Return the whole text, with image tokens expanded, and the images."""
        spans = self._checked_spans(sample)
        if not sample.images:
            return spans, {}
        images, texts = self._images_of(sample)
        return self._expand(spans, iter(texts)), images

    def _images_of(self, sample: RawSample) -> tuple[Images, list[str]]:
        """Return the arrays of a sample's images, and the text that stands for each."""
        if self._process_images is None:
            raise Unrenderable("the sample has images, but the model accepts none")
        try:
            return self._process_images(map(self._decode, sample.images))
        except ValueError as error:  # some processors refuse a very thin image
            raise Unrenderable(f"the image processor refuses an image: {error}") from error

    # ------------------------------------------------------------------------------------------ text

    def _checked_spans(self, sample: RawSample) -> list[Span]:
        turns = sample.conversation
        if turns[0]["from"] != "human":
            raise Unrenderable("the first turn is from gpt: an answer without a question")
        # The spec's system prompt replaces that of a sample, as it replaces the template's.
        system = sample.system if self.system_prompt is None else self.system_prompt
        spans = self._spans(turns, system)
        placeholders = sum(text.count(self.image_token) for text, _ in spans)
        if placeholders != len(sample.images):
            shown = IMAGE if self.image_token == IMAGE else f"{IMAGE} or {self.image_token}"
            raise Unrenderable(f"{placeholders} {shown} placeholders, but {len(sample.images)} images")
        if any(self.image_token in text for text, is_answer in spans if is_answer):
            raise Unrenderable(f"an {IMAGE} placeholder is in an answer, but a model cannot write an image")
        if self._control:
            self._refuse_control_tokens(turns, system, spans)
        return spans

    def _spans(self, turns: Sequence[dict[str, str]], system: str | None) -> list[Span]:
        """Return the pieces of a conversation, with the model's own image token. Raises Unrenderable."""
        try:
            spans = [
                (str(text), bool(is_answer)) for text, is_answer in self._template_function(turns, system, self._eos)
            ]
        except Exception as error:
            if not is_plugin(self.template) or isinstance(error, MemoryError):
                raise
            raise Unrenderable(f"data.template {self.template} raised {type(error).__name__}: {error}") from error
        return [(text.replace(IMAGE, self.image_token), is_answer) for text, is_answer in spans]

    def _refuse_control_tokens(
        self, turns: Sequence[dict[str, str]], system: str | None, spans: Sequence[Span]
    ) -> None:
        """Raise Unrenderable if there are control tokens that the template does not write for ordinary text."""
        ordinary = neutral(turns)
        key = (neutral_system(system), *((turn["from"], turn["value"]) for turn in ordinary))
        if key not in self._of_template:
            if len(self._of_template) >= KEPT_COUNTS:
                self._of_template.clear()
            self._of_template[key] = self._counted(self._spans(ordinary, neutral_system(system)))
        if extra := self._counted(spans) - self._of_template[key]:
            raise Unrenderable(contained(extra))

    def _counted(self, spans: Sequence[Span]) -> Counter[str]:
        return counted(self.tokenizer, self._control, "".join(text for text, _ in spans))

    @cached_property
    def chat_template(self) -> str | None:
        """Return the source of the model's own chat template; None if it has none."""
        return chosen_template(self.processor, self._template_name)

    def _expand(self, spans: Sequence[Span], texts: Iterator[str]) -> list[Span]:
        """Replace each placeholder by the text for its image.

        That text has as many image tokens as the model makes of the image, and for some models tokens around them.
        """
        expanded: list[Span] = []
        for text, is_answer in spans:
            head, *rest = text.split(self.image_token)
            for piece in rest:
                head += next(texts) + piece
            expanded.append((head, is_answer))
        return expanded

    def _tokenize(self, spans: Sequence[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokenize the whole text at once, as in inference. A token that overlaps an answer counts as answer."""
        text = "".join(piece for piece, _ in spans)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self._has_bos(text))
        is_answer = np.zeros(len(text) + 1, dtype=bool)
        start = 0
        for piece, answer in spans:
            is_answer[start : start + len(piece)] = answer
            start += len(piece)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        # reaches[n] counts the answer characters before n, so a difference shows whether a token has any.
        reaches = np.concatenate([[0], np.cumsum(is_answer)])
        answer_mask = reaches[offsets[:, 1]] > reaches[offsets[:, 0]]
        return np.asarray(encoded["input_ids"], dtype=np.int32), answer_mask

    def _has_bos(self, text: str) -> bool:
        """Return whether a chat template has written the bos token itself. The tokenizer would add a second one."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def _tokenization(self) -> tuple[Any, ...]:
        """Return everything of the tokenizer that `_tokenize` and the templates depend on."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # An earlier use of the tokenizer may have set these, and `_tokenize` neither pads nor truncates.
        del backend["padding"], backend["truncation"]
        tokens = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.image_token)
        return backend, self.tokenizer.split_special_tokens, tokens

    def _fit(
        self, input_ids: NDArray[np.int32], answer_mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Cut at `max_length` if an answer token survives and no image token is lost."""
        cut = input_ids[self.max_length :]
        input_ids, answer_mask = input_ids[: self.max_length], answer_mask[: self.max_length]
        if (cut == self.image_token_id).any():
            raise Unrenderable(f"image tokens beyond max_length {self.max_length}")
        if not answer_mask[1:].any():
            raise Unrenderable(f"no answer token within max_length {self.max_length}")
        return input_ids, answer_mask

    # ---------------------------------------------------------------------------------------- images

    def _decode(self, data: bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # Before rgb(): opening an image reads only its header, and rgb() allocates all its pixels.
                self._require_small(image.width, image.height)
                require_still(image)
                decoded = rgb(image)
        except (Unrenderable, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise almost any class of error for damaged bytes
            raise Unrenderable(f"image cannot be decoded: {error or type(error).__name__}") from error
        return self.framed(decoded)

    def framed(self, image: Image.Image) -> Image.Image:
        """Return an image as the model's image processor gets it: padded to a square, if the data say so."""
        return self._squared(image) if self.pad_to_square else image

    def _require_small(self, width: int, height: int) -> None:
        """Raise Unrenderable if an image takes too much memory, also after a thin image is padded or scaled up."""
        area, becomes = width * height, ""
        size = self.image_processor.size
        shortest = None if size.get("longest_edge") else size.get("shortest_edge")
        if self.pad_to_square:
            area, becomes = max(width, height) ** 2, " (padded to a square)"
        elif shortest and area:
            scaled = shortest**2 * max(width, height) // min(width, height)
            if scaled > area:
                area, becomes = scaled, f" (scaled to a shortest edge of {shortest})"
        if area > self.max_image_pixels:
            raise Unrenderable(f"image of {width}×{height}{becomes} exceeds data.max_image_pixels")

    def _squared(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        if image.size == (side, side):
            return image
        # Cut to whole numbers and not rounded, as in LLaVA's preprocessing.
        mean = tuple(int(255 * channel) for channel in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
