"""Chat templates: a conversation → one text, in pieces of prompt and answer. `spec.data.TEMPLATES` names them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.samples import Unrenderable
from betakd_ray.data.template_process import TemplateExceeded, TemplateFailed, render_template
from betakd_ray.errors import ModelError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Span = tuple[str, bool]
"""A piece of the text, and whether it is an answer, which the model learns."""
Template = Callable[[Sequence[dict[str, str]], str | None, str], Iterable[Span]]
"""Function of (turns, system prompt, end-of-sequence token) → the text, as pieces of prompt and answer."""


def vicuna_v1(turns: Sequence[dict[str, str]], system: str | None, eos: str) -> Iterator[Span]:
    """Yield a conversation in LLaVA's and MobileVLM's format, with the separators " " and the end-of-sequence token."""
    system = VICUNA_SYSTEM if system is None else system
    yield (system + " " if system else ""), False
    for turn in turns:
        if turn["from"] == "human":
            yield f"USER: {image_first(turn['value'])} ASSISTANT: ", False
        else:
            yield turn["value"] + eos, True


def plain(turns: Sequence[dict[str, str]], system: str | None, eos: str) -> Iterator[Span]:
    """Yield the image and its caption without a prompt, for the warm-up of the projector."""
    for turn in turns:
        if turn["from"] == "human":
            yield IMAGE * turn["value"].count(IMAGE), False
        else:
            yield turn["value"] + "\n", True


def image_first(text: str) -> str:
    """Move images to the start of the turn, one per line, as LLaVA's preprocessing does."""
    count = text.count(IMAGE)
    return f"{IMAGE}\n" * count + text.replace(IMAGE, "").strip()


def parts_of(text: str) -> list[dict[str, str]]:
    """Return a question as parts: its images, then its text; in place if there is text between two images."""
    pieces = text.split(IMAGE)
    if not any(piece.strip() for piece in pieces[1:-1]):
        return [{"type": "image"}] * (len(pieces) - 1) + [{"type": "text", "text": text.replace(IMAGE, "").strip()}]
    parts: list[dict[str, str]] = []
    for at, piece in enumerate(pieces):
        parts += [{"type": "image"}] if at else []
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts


REMEDY = (
    "Correct `chat_template` in the files of the model's tokenizer, or set data.template to vicuna_v1, plain or a "
    "function of your own (docs/extending.md)."
)
EXCEEDED_IN_A_ROW = 10
"""Number of conversations in a row that exceed a limit, after which the template is at fault and not the data."""


class ChatTemplate:
    """A processor's own chat template, as a function like the others.

    It is a program of the model's, so it is rendered in another process with limits. `variables` are the special tokens
    that it may name and the spec's arguments, `date` is what it gets as today's. `image_token` is the text of an image;
    None for a model without images. `ends` are the control tokens that may close an answer.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any],
        image_token: str | None,
        date: date,
        ends: Collection[str] = (),
    ) -> None:
        self.source, self.variables, self.image_token, self.date = source, dict(variables), image_token, date
        self._ends = tuple(ends)
        self._exceeded = 0

    def __call__(self, turns: Sequence[dict[str, str]], system: str | None, eos: str) -> Iterator[Span]:
        """Yield the conversation. The answer is the text that a reply adds to its prompt. Raises Unrenderable.

        Some templates rewrite earlier answers, e.g. remove their thoughts, once another question follows. No text then
        has each answer as the model would write it, so only the answers after the last change are learned. An answer
        that the template does not close is closed with `eos`, or the model would never learn to stop.
        """
        messages = [self._message("system", system)] if system else []
        spans, seen, is_end_added = list[Span](), "", False
        for turn in turns:
            if turn["from"] == "human":
                messages.append(self._message("user", turn["value"]))
                continue
            asked = self._rendered(messages, generation=True)
            messages.append(self._message("assistant", turn["value"]))
            replied = self._rendered(messages, generation=False)
            if not replied.startswith(asked):
                raise Unrenderable(
                    "the chat template changes the prompt when an answer is added, so it is not known which tokens are "
                    "answers (a thinking model may need data.template_arguments, e.g. {enable_thinking: false})"
                )
            if spans and not asked.startswith(seen) and asked.startswith(seen.rstrip()):
                spans.pop()  # the space behind the answer, which the template writes only at the end
                seen = seen.rstrip()
            if not asked.startswith(seen):
                spans, seen, is_end_added = [], "", False
            new = asked[len(seen) :]
            # Some templates close an answer only when another question follows: then its end is there already.
            spans.append((new.removeprefix(eos) if is_end_added else new, False))
            answer, is_end_added = self._answer(replied[len(asked) :], turn["value"].strip(), eos)
            spans += answer
            seen = replied
        self._exceeded = 0
        yield from spans

    def _answer(self, reply: str, written: str, eos: str) -> tuple[list[Span], bool]:
        """Return what a reply adds to its prompt, of which the answer is learned, and whether `eos` was added to it."""
        header = ""
        if written and self._ignores_generation and (at := reply.find(written)) > 0:
            # The name of the speaker, which the template writes only with an answer, belongs to the prompt.
            header, reply = reply[:at], reply[at:]
        learned = reply.rstrip()
        is_closed = learned.endswith((eos, *self._ends))
        # Templates add a newline after the end token of a turn; the model need not learn it.
        spans = [(learned if is_closed else learned + eos, True), (reply[len(learned) :], False)]
        return [(header, False), *spans] if header else spans, not is_closed

    @cached_property
    def _ignores_generation(self) -> bool:
        """Return whether the template does not begin the assistant's turn when it is asked to."""
        messages = [self._message("user", "Pomegranate?")]
        try:
            with_it, without = (self._rendered(messages, generation=generation) for generation in (True, False))
        except Unrenderable:
            return False
        return with_it == without

    def _message(self, role: str, text: str) -> dict[str, Any]:
        if not self.takes_parts:
            return {"role": role, "content": image_first(text) if role == "user" else text}
        if role == "user":
            return {"role": role, "content": parts_of(text)}
        return {"role": role, "content": [{"type": "text", "text": text}]}

    @cached_property
    def takes_parts(self) -> bool:
        """Return whether the template takes a message as parts, e.g. an image; older templates take a string."""
        if self.image_token is None:
            return False
        word = "Pomegranate"
        content = [{"type": "image"}, {"type": "text", "text": word}]
        try:
            messages = [{"role": "user", "content": content}]
            shown = render_template(self.source, messages, self.variables, self.date, generation=False)
        except TemplateFailed:
            return False
        # A template that takes only a string may print the list of parts as Python text, with 'type' in it.
        return shown.count(self.image_token) == shown.count(word) == 1 and "'type'" not in shown

    def _rendered(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        """Return the text of a conversation. Raises Unrenderable, or ModelError for a template that always exceeds."""
        try:
            return render_template(self.source, messages, self.variables, self.date, generation=generation)
        except TemplateExceeded as error:
            self._exceeded += 1
            # Each of them took seconds, so the limit of `max_bad_fraction` could be days away.
            if self._exceeded >= EXCEEDED_IN_A_ROW:
                raise ModelError(
                    f"the chat template {error}, on {self._exceeded} conversations in a row. {REMEDY}"
                ) from error
            raise Unrenderable(f"the chat template {error}") from error
        except TemplateFailed as error:
            raise Unrenderable(f"the chat template {error}") from error
