"""Check that the teacher knows the answers, at the rows where it is asked for them."""

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from betakd_ray.check.answers import Answers, answers_of
from betakd_ray.check.finding import Finding
from betakd_ray.check.measures import is_negative, is_positive, losses
from betakd_ray.check.subject import Subject, targets

KNOWS_NOTHING = 0.85
"""Share of the uniform loss ln V from which a teacher knows nothing of the answers.

Honest: 0.01 (easy-VQA), 0.29 with half of the labels wrong; embedding rows in another order: 1.45.
"""
BETTER = 0.5
"""Share of its own loss under which the loss at shifted rows shows that the rows are shifted."""
SHIFTS = (1, -1, 2, -2)
"""Places by which rows may be shifted."""


def check_alignment(subject: Subject) -> list[Finding]:
    """Return findings on the loss of the true answers: its level, beside shifted rows and beside others' answers."""
    shifted = losses(subject, (0, *SHIFTS))
    own = float(shifted[0].mean())
    uniform = math.log(len(subject.head))
    expected = (
        f"less than chance: {KNOWS_NOTHING * uniform:.1f} of {uniform:.1f} nats; less than at other rows or answers"
    )
    unigram = _unigram(subject)
    seen = f"{own:.2f} nats per answer token (uniform {uniform:.1f}, word frequencies {unigram:.1f})"

    def finding(verdict: str, cause: str = "", remedy: str = "", more: str = "") -> Finding:
        return Finding("alignment", seen + more, expected, verdict, cause, remedy, subject.part)  # pyright: ignore

    if not math.isfinite(own):
        return [finding("fail", "the teacher's output is not finite", "Load it in another dtype.")]
    trained = subject.is_trained
    worst = "fail" if trained and subject.knows_answers else "doubt"
    remedy = (
        "Check teacher.path, its config.json and data.template; teacher.check.knows_answers: false if this is meant."
    )
    if trained and (shift := _shift(shifted)):
        cause = f"the rows are off by {shift:+d}: the teacher predicts the token {abs(shift)} place(s) away"
        return [finding("fail", cause, "Correct the engine's answer rows.")]
    if own >= KNOWS_NOTHING * uniform:
        return [finding(worst, f"knows nothing of these answers: {own:.1f} of {uniform:.1f} nats", remedy)]
    lead = _lead(subject)
    if lead is None:
        return [finding("ok", more="; all answers are alike, so their pairing cannot be judged")]
    more = f"; own answers {float(lead.mean()):+.2f} more probable than other samples'"
    if is_negative(lead):
        return [finding(worst, "other samples' answers fit better: samples are mixed up", remedy, more)]
    if not is_positive(lead):
        return [finding("doubt", "own answers fit hardly better than other samples'", remedy, more)]
    return [finding("ok" if own < unigram or not trained else "doubt",
                    "" if own < unigram else "a higher loss than that of word frequencies: answers of another style, "
                    "wrong labels, or a damaged teacher", more=more)]  # fmt: skip


def _shift(shifted: Mapping[int, Tensor]) -> int:
    """Return by how many places the answers fit better than where they are; 0 if none fits clearly better."""
    here = shifted[0]
    for shift in SHIFTS:
        there = shifted[shift]
        if float(there.nanmean()) < BETTER * float(here.mean()) and is_positive(here - there):
            return shift
    return 0


def _lead(subject: Subject) -> Tensor | None:
    """Return by how much each sample's tokens are more probable than another's; None if all are alike."""
    answers = answers_of(subject, subject.renderings, subject.hidden)
    leads = [each for at, own in enumerate(answers) if (each := _lead_of(answers, at, own)) is not None]
    return torch.stack(leads) if len(leads) > 1 else None


def _lead_of(answers: list[Answers], at: int, own: Answers) -> Tensor | None:
    for step in range(1, len(answers)):
        other = answers[(at + step) % len(answers)].tokens
        count = min(len(own.tokens), len(other))
        differs = own.tokens[:count] != other[:count]
        if differs.any():
            p = own.probabilities[:count]
            gain = p.gather(1, own.tokens[:count, None]) - p.gather(1, other[:count, None])
            return gain[differs].mean()
    return None


def _unigram(subject: Subject) -> float:
    """Return the loss of predicting each answer token by its frequency in the other samples, in nats."""
    tokens = [targets(each).tolist() for each in subject.renderings]
    counts = Counter(token for each in tokens for token in each)
    total, vocab, losses = sum(counts.values()), len(subject.head), []
    for own in map(Counter, tokens):
        rest = total - sum(own.values())
        losses += [-math.log((counts[each] - own[each] + 1 / vocab) / (rest + 1)) for each in own.elements()]
    return sum(losses) / len(losses)
