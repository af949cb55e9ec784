"""Chat templates: a conversation → one text, in pieces of prompt and answer. `spec.data.TEMPLATES` names them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from betakd_ray.batch.sample import IMAGE

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
