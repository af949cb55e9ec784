"""Normalisation of short answers as the VQA evaluation does it, with its tables as they are, quirks included."""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# A period before anything but a digit: "3.5" keeps its own, "5." and "u.s" lose theirs.
_PERIOD = re.compile(r"\.(?!\d)")

# Contractions that are put back where all their apostrophes are missing. "i'd" and others are not in VQA's table,
# because without the apostrophe they are other words; words with 's never reach it (see `normalized`).
_WITHOUT_ANY = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Contractions with two apostrophes, which are put back where one of them is missing.
_WITHOUT_ONE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _WITHOUT_ANY.split()}
    for word in _WITHOUT_ONE.split():
        first, second, third = word.split("'")
        table |= {f"{first}{second}'{third}": word, f"{first}'{second}{third}": word}
    whole = "y'all'd've"
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), whole)
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return table | {"somebody'd": "somebodyd"}  # in VQA's table this one takes the apostrophe away


CONTRACTIONS = _contractions()


def normalized(text: str) -> str:
    """Return an answer in the form in which the VQA evaluation compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Delete each mark that stands next to a space anywhere in the text, and put a space in place of the others."""
    cleaned = text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if beside_space else " ")
    return _PERIOD.sub("", cleaned)
