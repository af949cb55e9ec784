"""Scores beside those of lmms-eval, on thousands of made answers, malformed ones among them.

Where a score differs, it must be for a reason that docs/evaluation.md gives.
"""

import random
import string
from collections.abc import Callable, Sequence

import pytest

from betakd_ray.evaluation.benchmark import Question, Verdict
from betakd_ray.evaluation.benchmarks import mme, pope
from betakd_ray.evaluation.benchmarks.chartqa import agrees
from betakd_ray.evaluation.benchmarks.scienceqa import LETTERS, letter
from betakd_ray.evaluation.benchmarks.textvqa import agreement
from betakd_ray.evaluation.option_rules import lmms_eval, opencompass
from betakd_ray.evaluation.scoring import tally_of
from betakd_ray.evaluation.vqa_text import CONTRACTIONS, normalized
from tests import lmms_eval as lmms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lmms.root() is None, reason="lmms-eval is not installed: tests/lmms_eval.py says how"),
]

COUNT = 6000
"""Number of made answers for each benchmark."""
PIECES = [
    *"ABCDEabcdeZ", "yes", "no", "Yes", "No", "NO", "YES", "not", "cat", "a dog", "the", "two", "ten", "none", "3.5",
    "12", "1,000", "12%", "0", "-4", "dont", "it's", "youre", "couldnt've", "answer is", "The answer is", "I choose",
    "red",
    "答案是", "know", "y", "n", "x_y", "T-shirt", "nan", "inf", "1e3",
]  # fmt: skip
JOINTS = [
    "",
    " ",
    " ",
    " ",
    ".",
    ". ",
    ", ",
    "\n",
    "\t",
    "!",
    "?",
    ":",
    ")",
    "(",
    "/",
    "'",
    '"',
    "-",
    "  ",
    "。",
    "**",
    "....",
]


def made(seed: int, extra: Sequence[str] = ()) -> list[str]:
    """Return made answers: nothing, single words, and words with marks before, between and after them."""
    draw = random.Random(seed)
    pieces = [*PIECES, *extra, *extra]
    texts = ["", " ", ".", "\n", *pieces, *CONTRACTIONS]
    while len(texts) < COUNT:
        count = draw.choice([1, 1, 1, 2, 2, 3, 6])
        text = draw.choice(["", "", "", *JOINTS])
        for _ in range(count):
            text += draw.choice(pieces) + draw.choice(["", "", *JOINTS])
        texts.append(text)
    return texts


def differences(
    texts: Sequence[str],
    ours: Callable[[str], object],
    theirs: Callable[[str], object],
    explained: Callable[[str], bool],
) -> int:
    """Return how many texts differ in their score. Each of them must be explained."""
    differing = [text for text in texts if ours(text) != theirs(text)]
    unexplained = [(text, ours(text), theirs(text)) for text in differing if not explained(text)]
    assert not unexplained, f"{len(unexplained)} of {len(texts)}, such as {unexplained[:5]}"
    return len(differing)


def never(text: str) -> bool:
    return False


def test_textvqa_normalises_and_scores_alike() -> None:
    processor = lmms.module("tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()
    process = lmms.module("tasks/textvqa/utils.py").textvqa_process_results
    texts = made(1)
    assert {word: whole for word, whole in processor.CONTRACTIONS.items() if word == word.lower()}.items() >= {
        word: whole for word, whole in CONTRACTIONS.items()
    }.items()
    assert differences(texts, normalized, processor, lambda text: text.count(".") > 32) == 0
    draw = random.Random(2)
    for start in range(0, COUNT, 10):
        people = [draw.choice(texts[start : start + 4]) for _ in range(10)]
        normal = [normalized(answer) for answer in people]
        for text in texts[start : start + 10]:
            theirs = process({"question_id": 1, "answers": list(people)}, [text])["exact_match"]
            assert agreement(normalized(text), normal) == pytest.approx(theirs)


def test_gqa_differs_only_by_punctuation() -> None:
    exact = lmms.exact_match()
    texts = made(3, ["Red", "red", "t-shirt", "T-Shirt"])
    for answer in ("red", "t-shirt", "yes"):

        def ours(text: str, answer: str = answer) -> bool:
            return text.rstrip(".").lower() == answer

        def theirs(text: str, answer: str = answer) -> bool:
            return bool(exact([text], [answer], ignore_case=True, ignore_punctuation=True)["exact_match"])

        found = differences(texts, ours, theirs, lambda text: bool(set(text.rstrip(".")) & set(string.punctuation)))
        assert found > 0


def test_scienceqa_differs_only_where_llava_reads_more_or_less_strictly() -> None:
    process = lmms.module("tasks/scienceqa/utils.py").sqa_process_results

    def plain(text: str) -> bool:
        return text in tuple(LETTERS) or (text[:1] in tuple(LETTERS) and text[1:3] == ". ")

    for answer in range(4):
        found = differences(
            made(4 + answer),
            lambda text: letter(text) == LETTERS[answer],  # noqa: B023
            lambda text: process({"choices": [*"wxyz"], "answer": answer}, [text])["exact_match"] == 1,  # noqa: B023
            lambda text: not plain(text),
        )
        assert found > 0


def question(**fields: object) -> Question:
    known = {"key": "k", "text": "", "image": None, "truth": None, "question_id": 1, "prompt": "", "max_new_tokens": 1}
    return Question(**{**known, **fields})  # type: ignore[arg-type]


def test_pope_differs_only_on_other_texts_than_yes_and_no() -> None:
    utils = lmms.module("tasks/pope/utils.py")

    def theirs(text: str, label: str) -> bool:
        return utils.pope_process_results({"answer": label, "question_id": 1}, [text])["pope_accuracy"]["score"] == 1

    for label in ("yes", "no"):
        differences(
            made(8),
            lambda text: pope.said(text) == label,  # noqa: B023
            lambda text: theirs(text, label),  # noqa: B023
            lambda text: text.strip(" ") not in ("yes", "no", "Yes", "No"),
        )


def test_pope_has_the_same_ratios_for_clear_answers() -> None:
    utils = lmms.module("tasks/pope/utils.py")
    draw = random.Random(9)
    labels = [draw.choice(["yes", "no"]) for _ in range(COUNT)]
    said = [draw.choice(["Yes", "No", "yes"]) for _ in range(COUNT)]
    questions = [question(key=str(at), truth=label, stratum="random") for at, label in enumerate(labels)]
    verdicts = [pope.judge(each, text, "") for each, text in zip(questions, said, strict=True)]
    ours = tally_of(pope.BENCHMARK, questions, verdicts).metrics(pope.metrics)
    results = [
        utils.pope_process_results({"answer": label, "question_id": at}, [text])["pope_accuracy"]
        for at, (label, text) in enumerate(zip(labels, said, strict=True))
    ]
    for name in ("accuracy", "precision", "recall", "f1"):
        theirs = getattr(utils, f"pope_aggregate_{name}" + ("_score" if name == "f1" else ""))(results)
        assert ours[f"{name}[random]"] == pytest.approx(100 * theirs)


def test_mme_differs_only_by_spaces_periods_and_single_letters() -> None:
    utils = lmms.module("tasks/mme/utils.py")

    def explained(text: str) -> bool:
        return text != text.strip() or bool({".", "\n", "\t"} & set(text)) or text.lower() in ("y", "n")

    found = differences(made(10), lambda text: mme.said(text) or "other", utils.parse_pred_ans, explained)
    assert found > 0


def test_mme_sums_points_alike() -> None:
    utils = lmms.module("tasks/mme/utils.py")
    draw = random.Random(11)
    questions, verdicts, results = [], [], []
    for image in range(COUNT // 2):
        category = mme.PERCEPTION[image % 10]
        for turn in range(2):
            right = float(draw.random() < 0.7)
            questions.append(question(key=f"{image} {turn}", unit=str(image), stratum=category))
            verdicts.append(Verdict(right))
            results.append({"question_id": image, "category": category, "score": right})
    ours = tally_of(mme.BENCHMARK, questions, verdicts).metrics(mme.metrics)
    assert ours["perception"] == pytest.approx(utils.mme_aggregate_results(results))


OPTIONS = {"A": "cat", "B": "a dog", "C": "two", "D": "Red"}


def test_mmbench_finds_the_same_letters() -> None:
    evaluator = lmms.evaluator()
    texts = made(12, ["(B)", "C)", "B).", "[D]", "“A”", "D:", "option"])
    assert differences(texts, lambda text: opencompass(text, OPTIONS) or False,
                       lambda text: evaluator.can_infer(text, dict(OPTIONS)), never) == 0  # fmt: skip
    extract = lmms.module("tasks/_task_utils/mcq_extract.py").extract_mcq_answer

    def static(text: str) -> str:
        return evaluator.can_infer(text, dict(OPTIONS)) or extract(text, choices=sorted(OPTIONS))

    assert differences(texts, lambda text: lmms_eval(text, OPTIONS) or "", static, never) == 0


def test_mmbench_scores_groups_alike() -> None:
    evaluator = lmms.evaluator()
    draw = random.Random(13)
    texts = made(14, ["A", "B", "C", "D", "A.", "(B)"])
    rows, right = [], {}
    for at in range(COUNT // 2):
        group, answer = at % (COUNT // 6), draw.choice("ABCD")
        index = group + 10**6 * (at // (COUNT // 6))
        text = draw.choice([answer, answer, f"{answer}.", draw.choice(texts)])
        rows.append(
            {"index": index, "prediction": text, "answer": answer, "category": "x", "L2-category": "y", **OPTIONS}
        )
        right[group] = right.get(group, True) and lmms_eval(text, OPTIONS) == answer
    with lmms.without_judge():
        theirs = evaluator.eval_result(rows, eval_method="static")[0]
    assert 0.05 < theirs < 0.95
    assert sum(right.values()) / len(right) == pytest.approx(theirs)


def test_chartqa_agrees() -> None:
    correct = lmms.module("tasks/chartqa/utils.py").relaxed_correctness
    numbers = [
        f"{value}{end}" for value in ("11.4", "12.6", "12.61", "0.12", "-12", "1_2", " 12 ") for end in ("", "%", "%%")
    ]
    for label in ("12", "12%", "0", "red", "Yes", "nan", ""):
        found = differences(
            made(15, numbers),
            lambda text: agrees(text, label),  # noqa: B023
            lambda text: correct(text, label),  # noqa: B023
            never,
        )
        assert found == 0


def test_seed_agrees_by_the_rule_of_lmms_eval() -> None:
    from betakd_ray.evaluation.benchmarks import seed

    utils = lmms.module("tasks/seedbench/utils.py")
    for answer in "ABCD":
        doc = {"answer": answer, "data_type": "image", "question_id": 1}
        found = differences(
            made(16),
            lambda text: seed.judge(question(truth=answer), text, "lmms-eval").value,  # noqa: B023
            lambda text: utils.seed_aggregation_result([utils.seed_process_result(doc, [text])["seed_all"]]),  # noqa: B023
            never,
        )
        assert found == 0
