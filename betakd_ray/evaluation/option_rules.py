"""Rules that find an option's letter in a free text; each is that of one public scorer, without a judge model.

Each takes the text and letter → option, and returns a letter or None.
"""

import re
from collections.abc import Callable, Iterator, Mapping

Rule = Callable[[str, Mapping[str, str]], str | None]

_LETTERS = "ABCDE"
_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_NOUNS = (
    *("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice"),
    *("my answer", "my choice"),
)
_PHRASES = (
    *(f"{article}{noun} is" for noun in _NOUNS for article in ("", "the ")),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def opencompass(text: str, options: Mapping[str, str]) -> str | None:
    """Return a letter that stands alone or in one of a few forms, or that of the only option in the text."""
    tokens = text.split()
    alone = [letter for letter in _LETTERS if letter in tokens]
    # "A" in a sentence may be the article.
    if len(alone) == 1 and not ("A" in tokens and len(tokens) > 3):
        return alone[0]
    for form in _FORMS:
        found = [letter for letter in _LETTERS if form.format(letter) in tokens]
        if len(found) == 1:
            return found[0]
    return _only_option(text, options)


def vlmevalkit(text: str, options: Mapping[str, str]) -> str | None:
    """Return the only letter, if it is near the end of the text; or that after "answer is"; or the only option's."""
    if any(refusal in text for refusal in _REFUSALS):
        return None
    tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    found = [letter for letter in options if letter in tokens]
    if len(found) == 1 and tokens.index(found[0]) > len(tokens) - 5:
        return found[0]
    if not found and "Z" in tokens:
        return None  # that letter means "none of the options" there
    said = _ANSWER_IS.search(text)
    if said and said[1].upper() in options:
        return said[1].upper()
    too_long = len(text) > 2 * sum(map(len, options.values()))
    return None if too_long else _only_option(text, options)


def lmms_eval(text: str, options: Mapping[str, str]) -> str | None:
    """Return what `opencompass` finds; if nothing, the letter in the form that lmms-eval trusts most."""
    if found := opencompass(text, options):
        return found
    padded = text.strip()
    for mark in ",.!?;:'\"":
        padded = padded.strip(mark)
    padded = f" {padded} "
    candidates = list(_candidates(padded, options)) or [
        (0, padded.rfind(letter), letter) for letter in options if letter in padded
    ]
    # Of equals, the public code keeps the one that it found first.
    return max(candidates, key=lambda each: each[:2])[2] if candidates else None


def _candidates(padded: str, options: Mapping[str, str]) -> Iterator[tuple[int, int, str]]:
    """Yield trust, position and letter for each form in which a letter occurs; the last place of a form counts."""
    for trust, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        for letter in options:
            if form.format(letter) in padded:
                yield trust, padded.rfind(form.format(letter)), letter
    lower, bare = padded.lower(), padded.strip()
    for phrase in _PHRASES:
        begin = lower.find(phrase)
        for letter in options if begin >= 0 else ():
            if (place := padded.find(letter, begin + len(phrase))) >= 0:
                yield 7, place, letter
    for letter in options:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            yield 10, 0, letter
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            yield 9, len(padded) - 1, letter


def _only_option(text: str, options: Mapping[str, str]) -> str | None:
    lower = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lower]
    return found[0] if len(found) == 1 else None
