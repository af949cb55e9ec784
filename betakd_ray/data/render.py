"""A conversation with its images → token ids, an answer mask, and uint8 pixels.

A `Renderer` is one model's view of a sample: its tokenizer, its image size, its number of tokens an image. Teacher and
student may see a sample differently; their *answer tokens* are the same, and that is where they are compared.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from PIL import Image

from betakd_ray.data.shards import RawSample
from betakd_ray.errors import ModelError
from betakd_ray.spec import DataSpec

IMAGE = "<image>"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Read, whatever the member's name says. Pillow knows more; for EPS it would start Ghostscript."""

Span = tuple[str, bool]
"""A piece of the prompt, and whether the model is to learn it."""


class Unrenderable(Exception):
    """This sample cannot become a training example; the message is the reason kept in quarantine."""


@dataclass(frozen=True)
class Rendering:
    """One sample as one model sees it."""

    input_ids: NDArray[np.int32]
    """[tokens], image tokens expanded."""
    answer_mask: NDArray[np.bool_]
    """[tokens], true on answer tokens and the end-of-sequence that closes each answer."""
    pixels: NDArray[np.uint8] | None
    """[images, 3, height, width], resized but not normalised; None for a text-only sample."""


def vicuna_v1(turns: Sequence[dict[str, str]], system: str | None, eos: str) -> Iterator[Span]:
    """LLaVA's and MobileVLM's conversation format: separators " " and the end-of-sequence token."""
    system = VICUNA_SYSTEM if system is None else system
    yield (system + " " if system else ""), False
    for turn in turns:
        if turn["from"] == "human":
            yield f"USER: {_image_first(turn['value'])} ASSISTANT: ", False
        else:
            yield turn["value"] + eos, True


def plain(turns: Sequence[dict[str, str]], system: str | None, eos: str) -> Iterator[Span]:
    """Projector warm-up: the image and its caption, no prompt."""
    for turn in turns:
        if turn["from"] == "human":
            yield IMAGE * turn["value"].count(IMAGE), False
        else:
            yield turn["value"] + "\n", True


TEMPLATES = {"vicuna_v1": vicuna_v1, "plain": plain}


def _image_first(text: str) -> str:
    """Images at the head of the turn, one line each, as LLaVA's preprocessing has them."""
    count = text.count(IMAGE)
    return f"{IMAGE}\n" * count + text.replace(IMAGE, "").strip()


class Renderer:
    """Turns raw samples into one model's inputs. Cheap to build, safe to share between threads.

    Raises ModelError when the processor lacks what rendering needs (a fast tokenizer, an image token, an eos token).
    """

    def __init__(self, processor: Any, data: DataSpec) -> None:
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.processor = processor
        self.template = data.template
        self.system_prompt = data.system_prompt
        self.max_length = data.max_length
        self.pad_to_square = data.pad_to_square
        self.max_image_pixels = data.max_image_pixels
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer; answer tokens are found by character offsets, "
                "which needs a fast one. Save the tokenizer with its tokenizer.json."
            )
        if self.tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no eos token, so an answer could not be closed. Set eos_token.")
        if data.template == "chat" and not self._chat_template:
            raise ModelError("data.template is `chat` and the processor has no chat template. Use vicuna_v1 or plain.")

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding, or its end of sequence: padding is masked either way."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def image_tokens(self) -> int:
        """Tokens that the model makes of a (square) image."""
        return int((self._uncut(_probe(1)).input_ids == self.image_token_id).sum())

    @property
    def fingerprint(self) -> str:
        """Equal only for renderers that render every sample alike: what a rendering depends on is in it."""
        data = (self.template, self.system_prompt, self.max_length, self.pad_to_square, self.max_image_pixels)
        # Pillow's and torchvision's processors call themselves alike, and round differently.
        images = (type(self.image_processor).__qualname__, self.image_processor.to_dict())
        chat = (self._chat_template, self.tokenizer.special_tokens_map) if self.template == "chat" else None
        # How many tokens an image has is the processor's secret.
        probe = self._uncut(_probe(2)).input_ids.tolist()
        everything = repr((data, images, chat, probe, self._tokenization()))
        return hashlib.sha256(everything.encode()).hexdigest()[:16]

    def render(self, sample: RawSample) -> Rendering:
        """Tokens, answer mask and pixels of a sample. Raises Unrenderable with the reason."""
        whole = self._uncut(sample)
        return Rendering(*self._fit(whole.input_ids, whole.answer_mask), whole.pixels)

    def prompt(self, sample: RawSample) -> Rendering:
        """The sample up to its last answer: what a model is given to continue. Nothing is cut.

        With the `plain` template that is an image's tokens alone. Raises Unrenderable with the reason.
        """
        spans = self._checked_spans(sample)
        pixels = self._pixels(sample.images) if sample.images else None
        last = max(i for i, (_, is_answer) in enumerate(spans) if is_answer)
        # A trailing space would be a token of its own that training never saw before an answer.
        spans = [*spans[: last - 1], (spans[last - 1][0].rstrip(" "), False)]
        input_ids, answer_mask = self._tokenize(self._expand(spans, pixels))
        if not len(input_ids):
            raise Unrenderable(f"the prompt is empty: template {self.template} shows only images, and there is none")
        return Rendering(input_ids, answer_mask, pixels)

    def _uncut(self, sample: RawSample) -> Rendering:
        spans = self._checked_spans(sample)
        pixels = self._pixels(sample.images) if sample.images else None
        return Rendering(*self._tokenize(self._expand(spans, pixels)), pixels)

    # ------------------------------------------------------------------------------------------ text

    def _checked_spans(self, sample: RawSample) -> list[Span]:
        if sample.conversation[0]["from"] != "human":
            raise Unrenderable("the first turn is from gpt, an answer without a question")
        spans = list(self._spans(sample.conversation))
        placeholders = sum(text.count(IMAGE) for text, _ in spans)
        if placeholders != len(sample.images):
            raise Unrenderable(f"{placeholders} {IMAGE} placeholders and {len(sample.images)} images")
        if any(IMAGE in text for text, is_answer in spans if is_answer):
            raise Unrenderable(f"an {IMAGE} placeholder stands in an answer, which a model cannot be asked to write")
        return spans

    def _spans(self, conversation: Sequence[dict[str, str]]) -> Iterator[Span]:
        if self.template == "chat":
            return self._chat(conversation)
        return TEMPLATES[self.template](conversation, self.system_prompt, self.tokenizer.eos_token)

    def _chat(self, conversation: Sequence[dict[str, str]]) -> Iterator[Span]:
        """The processor's own template: an answer is what a reply adds to the text that asks for it."""
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        seen = ""
        for turn in conversation:
            if turn["from"] == "human":
                messages.append({"role": "user", "content": _image_first(turn["value"])})
                continue
            asked = self._apply(messages, generation=True)
            messages.append({"role": "assistant", "content": turn["value"]})
            replied = self._apply(messages, generation=False)
            if not (asked.startswith(seen) and replied.startswith(asked)):
                raise Unrenderable("the chat template rewrites earlier turns, so answers cannot be told from prompts")
            yield asked[len(seen) :], False
            reply = replied[len(asked) :]
            yield reply.rstrip(), True
            # Templates end a turn with a newline after its end token: not something to learn.
            yield reply[len(reply.rstrip()) :], False
            seen = replied

    def _apply(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._chat_template, tokenize=False, add_generation_prompt=generation
            )
        except TemplateError as error:  # many demand that roles alternate, or take no system prompt
            raise Unrenderable(f"the chat template refuses the conversation: {error}") from error

    @property
    def _chat_template(self) -> str | None:
        return self.processor.chat_template or self.tokenizer.chat_template

    def _expand(self, spans: Sequence[Span], pixels: NDArray[np.uint8] | None) -> list[Span]:
        """Each placeholder becomes as many image tokens as the model makes of that image."""
        images = {"pixel_values": pixels}
        count = 0
        expanded: list[Span] = []
        for text, is_answer in spans:
            head, *rest = text.split(IMAGE)
            for piece in rest:
                head += self.processor.replace_image_token(images, count) + piece
                count += 1
            expanded.append((head, is_answer))
        return expanded

    def _tokenize(self, spans: Sequence[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokenize the whole text at once, as inference will; a token that reaches into an answer is answer."""
        text = "".join(piece for piece, _ in spans)
        has_bos = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not has_bos)
        is_answer = np.zeros(len(text) + 1, dtype=bool)
        start = 0
        for piece, answer in spans:
            is_answer[start : start + len(piece)] = answer
            start += len(piece)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        reaches = np.concatenate([[0], np.cumsum(is_answer)])
        answer_mask = reaches[offsets[:, 1]] > reaches[offsets[:, 0]]
        return np.asarray(encoded["input_ids"], dtype=np.int32), answer_mask

    def _tokenization(self) -> tuple[Any, ...]:
        """All that `_tokenize` and the templates take from the tokenizer."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Whoever used the tokenizer last may have left these; `_tokenize` neither pads nor truncates.
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

    def _pixels(self, images: Sequence[bytes]) -> NDArray[np.uint8]:
        # One by one, as a hundred large images decoded at the same time would not fit.
        return np.ascontiguousarray(np.concatenate([self._processed(self._decode(image)) for image in images]))

    def _processed(self, image: Image.Image) -> NDArray[np.uint8]:
        # Normalising later, on the device, moves a quarter of the bytes.
        batch = self.image_processor([image], do_rescale=False, do_normalize=False, return_tensors="np")
        return np.asarray(batch["pixel_values"], dtype=np.uint8)

    def _decode(self, data: bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                self._require_small(image.width, image.height)
                decoded = rgb(image)
        except (Unrenderable, MemoryError):
            raise
        except Exception as error:  # of damaged bytes Pillow's decoders raise nearly anything
            raise Unrenderable(f"image cannot be decoded: {error or type(error).__name__}") from error
        return self._squared(decoded) if self.pad_to_square else decoded

    def _require_small(self, width: int, height: int) -> None:
        """What counts is the memory an image will take: a thin strip is small until it is padded, or scaled up."""
        area, becomes = width * height, ""
        shortest = self.image_processor.size.get("shortest_edge")
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
        mean = tuple(int(255 * channel) for channel in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def rgb(image: Image.Image) -> Image.Image:
    """The first frame as it is stored, whatever its EXIF orientation says, as LLaVA reads it; alpha is dropped.

    Raises ValueError for numbers without a known scale.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known scale; store it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):  # Pillow would make every value above 255 white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _probe(images: int) -> RawSample:
    """A sample that shows a renderer's image size, image tokens and template."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 30, 90)).save(buffer, "PNG")
    conversation = [
        {"from": "human", "value": f"{IMAGE}\n" * images + "What is it?"},
        {"from": "gpt", "value": "A probe."},
    ]
    return RawSample(key="probe", index=0, id="probe", conversation=conversation, images=[buffer.getvalue()] * images)
