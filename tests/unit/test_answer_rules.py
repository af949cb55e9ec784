"""How each benchmark reads an answer, on hostile texts: the rules of the public scorers, exactly."""

from pathlib import Path

import pytest

from betakd_ray.evaluation.benchmarks.chartqa import agrees
from betakd_ray.evaluation.benchmarks.mme import said as said_in_mme
from betakd_ray.evaluation.benchmarks.pope import said as said_in_pope
from betakd_ray.evaluation.benchmarks.scienceqa import letter
from betakd_ray.evaluation.benchmarks.textvqa import agreement, question_of
from betakd_ray.evaluation.option_rules import lmms_eval, opencompass, vlmevalkit
from betakd_ray.evaluation.vqa_text import CONTRACTIONS, normalized
from tests.questions import Set

OPTIONS = {"A": "cat", "B": "a dog", "C": "sun", "D": "Dog House"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"), ("E", "E"), ("F", None), ("a", None), (" A", None), ("A ", None), ("A.", None), ("", None),
        ("A. cat", "A"), ("A. ", "A"), ("A.cat", None), ("F. cat", None), ("B) dog", None), ("B . dog", None),
        ("The answer is B.", "B"), ("The answer is B", None), ("The answer is Bob", "B"), ("The answer is B\n", None),
        ("the answer is B.", None), ("Well. The answer is C.", "C"), ("The answer is Z.", "Z"),
        ("The answer is B. The answer is C.", None), ("The answer is B. The answer is C", "B"),
        ("A. The answer is B.", "A"),
    ],
)  # fmt: skip
def test_scienceqa_reads_a_letter(text, expected):
    assert letter(text) == expected


def test_scienceqa_counts_a_letter_that_the_question_has_no_choice_for_as_wrong(tmp_path):
    questions = Set("scienceqa", tmp_path)
    assert [questions.judged(text, 1) for text in ("A", "C", "E")] == [1, 0, 0]
    assert questions.judged("The answer is A.", 1) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red.", "red"), ("a red", "red"), ("THE", ""), ("", ""), ("two dogs", "2 dogs"), ("none", "0"), ("ten", "10"),
        ("eleven", "eleven"), ("3.5", "3.5"), ("3.", "3"), ("u.s.a", "usa"), (".5", ".5"), ("1,000", "1000"),
        ("dont", "don't"), ("Dont", "don't"), ("isn't", "isn't"), ("youre", "you're"), ("couldnt've", "couldn't've"),
        ("it's", "it 's"), ("men's room", "men 's room"), ("its", "its"), ("somebody'd", "somebodyd"),
        ("yes/no", "yes no"), ("yes /no", "yes no"), ("yes / no", "yes no"), ("a-b c", "b c"), ("x-y", "x y"),
        ("x-y -z", "xy z"), ("(a)", ""), ("stop!", "stop"), ("stop! now", "stop now"), ("a\nb\tc", "b c"),
        ("what?", "what"), ("`x`", "x"), ('"stop"', "stop"), ("a" + "." * 40 + "b", "ab"), ("i'm", "i'm"), ("im", "im"),
        ("oclock", "o'clock"), ("twas", "'twas"), ("yall'd've", "y'all'd've"), ("  red  ", "red"), ("x_y", "x y"),
    ],
)  # fmt: skip
def test_textvqa_normalises_as_the_vqa_evaluation(text, expected):
    assert normalized(text) == expected


def test_contractions_come_back_at_the_place_of_each_apostrophe():
    assert all(word.replace("'", "") == whole.replace("'", "") for word, whole in CONTRACTIONS.items())
    assert not {"ill", "id", "wed", "well", "shed", "hell", "its"} & CONTRACTIONS.keys()  # these are other words


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_textvqa_scores_by_how_many_of_ten_agree(same, expected):
    assert agreement("x", ["x"] * same + ["y"] * (10 - same)) == pytest.approx(expected)


def test_textvqa_takes_nothing_and_an_article_for_the_same(tmp_path):
    assert agreement(normalized(""), [normalized("the")] * 3 + ["x"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("What is it?\nAnswer briefly.", "what is it?"),
        ("What is it?\nReference OCR token: A\nAnswer.", "what is it?"),
        ("Reference OCR token: A, B\nWhat is it?\nAnswer.", "what is it?"),
        ("OCR tokens: A, B. Question: What is it? Short answer:", "what is it?"),
        ("<image>\nWhat is it?\nAnswer.", "what is it?"),
        ("What is it?", "what is it?"),
    ],
)
def test_textvqa_finds_the_question_in_a_prompt(prompt, expected):
    assert question_of(prompt) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cat", 1), ("Cat", 1), ("CAT...", 1), ("cat ", 0), (" cat", 0), ("cat. ", 0), ("a cat", 0), ("cat!", 0), ("", 0)],
)
def test_gqa_strips_final_periods_only(tmp_path, text, expected):
    assert Set("gqa", tmp_path).judged(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"), ("no", "no"), ("No, it is not", "no"), ("It is not there", "no"), ("NO", "yes"), ("no!", "yes"),
        ("No\nNo", "yes"), ("nope", "yes"), ("", "yes"), ("Yes. No", "yes"), ("No. Yes", "no"), ("No,", "no"),
        ("Not", "yes"), ("\tno", "yes"), ("there is no cup", "no"), ("none", "yes"), (".no", "yes"), ("n,o", "no"),
    ],
)  # fmt: skip
def test_pope_reads_no_from_single_words(text, expected):
    assert said_in_pope(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"), ("NO", "no"), (" yes", "yes"), ("i no", "no"), ("know", "no"), ("  yes", None), ("y", None),
        ("The answer is yes", None), ("", None), ("n\no", "no"), ("\n\t\n\tyes", "yes"), ("no yes", "no"),
        ("eyes", "yes"), ("yno", "no"), ("Unknown", None), ("N.o", None),
    ],
)  # fmt: skip
def test_mme_reads_the_first_four_characters(text, expected):
    assert said_in_mme(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"), (" B ", "B"), ("b", None), ("B.", "B"), ("B,", "B"), ("B:", "B"), ("B)", "B"), ("B).", "B"),
        ("(B)", "B"), ("(B).", "B"), (":B", "B"), (":B,", "B"), (":B.", "B"), (":B)", "B"), (":B).", "B"),
        ("[B]", None), ("**B**", None), ("B!", None), ("B;", None), ("A and B", None), ("E", "E"), ("F", None),
        ("A is right", "A"), ("A is right today", None), ("I think B is right because", "B"),
        ("A picture shows the sun", "C"), ("A picture shows B.", "B"), ("the sun and a cat", None), ("a doghouse", "B"),
        ("SUN!", "C"), ("scattered", "A"), ("A. A, then B.", "A"), ("A, B. then", "B"), ("", None),
        ("It is a dog house", None), ("D. Dog House", "D"), ("E.", "E"), ("A B C", None),
    ],
)  # fmt: skip
def test_mmbench_reads_letters_as_opencompass(text, expected):
    assert opencompass(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[B]", "B"), ("B!", "B"), ("B!!", "B"), ("**B**", "B"), ("b", None), ("E", None), ("A and B", None),
        ("I think B is right because of it", None), ("the answer is b", "B"), ("Cannot determine the answer B", None),
        ("B one two three", "B"), ("B one two three four", None), ("Z", None), ("sun", "C"),
        ("the sun " + "x" * 60, None), ("The correct answer is **C**, not D", "C"),
    ],
)  # fmt: skip
def test_mmbench_reads_letters_as_vlmevalkit(text, expected):
    assert vlmevalkit(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[B]", "B"),
        ("A/A", "A"),
        ("“B”", "B"),
        ("not D but the answer is B", "B"),
        ("a", None),
        ("A or (B) maybe", "B"),
    ],
)
def test_mmbench_reads_letters_as_lmms_eval(text, expected):
    assert lmms_eval(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("B", 1), ("b", 0), ("B.", 0), (" B", 0), ("B. b", 0), ("", 0), ("C", 0)]
)
def test_seed_wants_the_letter_alone(tmp_path, text, expected):
    assert Set("seed", tmp_path).judged(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("b", 1), (" B", 1), ("B. b", 1), ("bad", 1), ("", 0), ("(B)", 0)])
def test_seed_takes_the_first_character_by_the_other_rule(tmp_path, text, expected):
    assert Set("seed", tmp_path).judged(text, rule="lmms-eval") == expected


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("12.6", "12", True), ("12.61", "12", False), ("11.4", "12", True), ("-12", "12", False), ("12%", "0.12", True),
        ("12", "12%", False), ("0", "0", True), ("0.0", "0", False), ("1,000", "1000", False), ("blue.", "Blue", False),
        ("BLUE", "blue", True), ("nan", "12", False), ("inf", "12", False), (" 12 ", "12", True), ("", "", True),
        ("12 %", "0.12", True), ("%", "12", False), ("twelve", "12", False), ("1e1", "10", True),
    ],
)  # fmt: skip
def test_chartqa_gives_numbers_five_per_cent(text, label, expected):
    assert agrees(text, label) == expected


def test_the_default_rule_of_each_benchmark_is_the_first(tmp_path: Path):
    questions = Set("mmbench", tmp_path)
    assert questions.judged("[A]") == 0
    assert questions.judged("[A]", rule="vlmevalkit") == 1
