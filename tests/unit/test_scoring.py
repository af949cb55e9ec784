"""Scores of answers files: metrics, counts of what is wrong, intervals, comparisons, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from betakd_ray.cli.score import Request, run_score
from betakd_ray.errors import DataError, SpecError
from betakd_ray.evaluation.answer_file import read_answers
from betakd_ray.evaluation.benchmark import Options, per_cent_right
from betakd_ray.evaluation.intervals import Tally, compare, interval, resampled
from betakd_ray.evaluation.pictures import read_picture, require_pictures
from betakd_ray.evaluation.question_files import DataFolder
from betakd_ray.evaluation.registry import find_benchmark
from betakd_ray.evaluation.score_table import as_json, comparison_rows, markdown, remark_lines, score_rows
from betakd_ray.evaluation.scoring import AVERAGE, average, comparisons, read_questions, rules_of
from betakd_ray.spec import StorageSpec
from tests.questions import SETS, Set, picture
from tests.s3 import served

RIGHT = {
    "scienceqa": ["B", "A", "B", "A", "B"], "textvqa": ["red"] * 3, "gqa": ["cat", "yes.", "Red"],
    "pope": ["Yes", "No"] * 3, "mme": ["Yes", "No"] * 3, "mmbench": ["A", "B", "D"],
    "chartqa": ["12", "0", "0.1", "blue"] * 2, "seed": ["B"] * 3,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SETS))
def test_right_answers_have_the_full_score_and_wrong_ones_none(tmp_path, name):
    kept = Set(name, tmp_path)
    full = 400 if name == "mme" else 100
    metrics = kept.score(kept.lines(*RIGHT[name])).metrics
    if name == "mme":
        assert metrics == {"perception": 200, "cognition": 200, "score[artwork]": 200, "score[code_reasoning]": 200}
    else:
        assert all(value == full for metric, value in metrics.items() if "yes_ratio" not in metric)
    wrong = kept.score(kept.lines(*["Hm, no, a doubt"] * 9)).metrics
    assert wrong[kept.benchmark.primary] <= full / 2


@pytest.mark.parametrize("name", sorted(SETS))
def test_missing_answers_are_wrong_and_order_does_not_matter(tmp_path, name):
    kept = Set(name, tmp_path)
    lines = kept.lines(*RIGHT[name])
    whole, none = kept.score(lines), kept.score([])
    assert kept.score(lines[::-1]).metrics == whole.metrics
    assert none.counts["missing"] == len(kept.questions())
    assert none.metrics[kept.benchmark.primary] == 0
    assert none.metrics.keys() == whole.metrics.keys()


@pytest.mark.parametrize("name", sorted(SETS))
def test_the_last_of_several_answers_counts(tmp_path, name):
    kept = Set(name, tmp_path)
    lines = kept.lines(*RIGHT[name])
    bad = [line | {"text": "?"} for line in lines[:2]]
    scored = kept.score([*bad, *lines])
    assert scored.metrics == kept.score(lines).metrics
    assert (scored.counts["repeated"], scored.counts["missing"]) == (2, 0)
    assert kept.score([*lines, *bad]).metrics != scored.metrics


def test_a_question_that_could_not_be_asked_is_wrong_and_never_a_yes(tmp_path):
    kept = Set("pope", tmp_path)
    lines = [line | {"text": "", "metadata": {"answered": False}} for line in kept.lines(*["x"] * 6)]
    scored = kept.score(lines)
    assert (scored.counts["unanswered"], scored.counts["missing"]) == (6, 0)
    assert scored.metrics["accuracy"] == scored.metrics["f1"] == scored.metrics["yes_ratio[random]"] == 0
    empty = kept.score([line | {"text": ""} for line in lines[:0]] + kept.lines(*[""] * 6))
    assert empty.metrics["yes_ratio[random]"] == 100  # an empty text is a yes by the rule


def test_pope_counts_a_missing_answer_against_the_model(tmp_path):
    kept = Set("pope", tmp_path)
    without_no = kept.score(kept.lines("Yes", None, "Yes", "No", "Yes", "No")).metrics
    assert (without_no["precision[adversarial]"], without_no["recall[adversarial]"]) == (50, 100)
    without_yes = kept.score(kept.lines(None, "No", "Yes", "No", "Yes", "No")).metrics
    assert (without_yes["precision[adversarial]"], without_yes["recall[adversarial]"]) == (0, 0)
    assert without_yes["f1"] == pytest.approx(200 / 3)


def test_mme_gives_points_for_answers_and_for_both_of_an_image(tmp_path):
    kept = Set("mme", tmp_path)
    metrics = kept.score(kept.lines("Yes", "No", "Yes", "yes", "other", "No")).metrics
    assert metrics["score[artwork]"] == 75 + 50
    assert metrics["score[code_reasoning]"] == metrics["cognition"] == 50
    assert any("without the categories existence" in note for note in kept.score([]).notes)


def test_mmbench_wants_every_rotation(tmp_path):
    kept = Set("mmbench", tmp_path)
    metrics = kept.score(kept.lines("A", "A", "D")).metrics
    assert metrics == {"accuracy": 50, "l2[logic]": 0, "l2[coarse]": 100}


def test_further_rounds_of_mmbench_are_left_out(tmp_path):
    kept = Set("mmbench", tmp_path)
    lines = kept.lines("A", "B", "D")
    scored = kept.score([*lines, lines[0] | {"round_id": 1, "text": "C"}])
    assert (scored.metrics["accuracy"], scored.counts["repeated"]) == (100, 0)


def test_scienceqa_has_all_images_in_the_denominator(tmp_path):
    kept = Set("scienceqa", tmp_path)
    metrics = kept.score(kept.lines("B", "A", "B")).metrics
    assert metrics == {"accuracy": 60, "image_accuracy": pytest.approx(100 / 3)}


def test_prompts_of_other_tools_find_their_question(tmp_path):
    kept = Set("mme", tmp_path / "mme")
    lines = kept.lines(*RIGHT["mme"])
    for line in lines:
        line["prompt"] = "<image>\n" + line["prompt"].split("\n")[0] + "  Please answer yes or no."
    assert kept.score(lines).counts["missing"] == 0
    kept = Set("textvqa", tmp_path / "textvqa")
    lines = kept.lines(*RIGHT["textvqa"])
    for line in lines:
        line["prompt"] = f"OCR tokens: A. Question: {line['prompt'].split(chr(10))[0]} Short answer:"
    assert kept.score(lines).counts["missing"] == 0


def test_whether_ocr_tokens_were_shown_is_told_and_can_be_demanded(tmp_path):
    kept = Set("textvqa", tmp_path)
    lines = kept.lines(*RIGHT["textvqa"])
    assert "asked with OCR tokens in the prompt" in kept.score(lines).notes
    lines[0]["prompt"] = lines[0]["prompt"].replace("\nReference OCR token: A, B", "")
    assert any("in 2 of 3 prompts" in note for note in kept.score(lines).notes)
    with pytest.raises(DataError, match=r"2 of 3 prompts .* expected all"):
        kept.score(lines, options=Options(ocr=True))


def test_unparsable_answers_are_counted(tmp_path):
    kept = Set("mmbench", tmp_path)
    assert kept.score(kept.lines("A", "none of them", "[D]")).counts["unparsable"] == 2
    assert kept.score(kept.lines("A", "none of them", "[D]"), rule="vlmevalkit").counts["unparsable"] == 1


def test_a_limit_leaves_out_the_answers_to_other_questions(tmp_path):
    kept = Set("mmbench", tmp_path)
    scored = kept.score(kept.lines("A", "B", "X"), limit=2)
    assert (scored.metrics["accuracy"], scored.counts["questions"], scored.counts["missing"]) == (100, 2, 0)


@pytest.mark.parametrize(("name", "rule"), [("mmbench", "gpt"), ("gqa", "opencompass"), ("seed", "lava")])
def test_an_unknown_rule_is_refused(tmp_path, name, rule):
    with pytest.raises(SpecError, match=f"{name} has no rule '{rule}'"):
        Set(name, tmp_path).score([], rule=rule)


# ------------------------------------------------------------------------------------------------ damaged answers


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question_id": "9", "text": "x"}', "{"], "line 2: is not JSON"),
        (["[1]"], "line 1: is .*expected a JSON object"),
        (['{"text": "x"}'], "line 1: lacks question_id"),
        (['{"question_id": "9"}'], "line 1: lacks text"),
        (['{"question_id": "9", "text": null}'], "line 1: text is None; expected a text"),
        (['{"question_id": "9", "text": 3}'], "line 1: text is 3"),
        (['{"question_id": true, "text": "x"}'], "line 1: question_id is True"),
        (['{"question_id": 1.5, "text": "x"}'], "line 1: question_id is 1.5"),
        (['{"question_id": ["9"], "text": "x"}'], r"line 1: question_id is \['9'\]"),
        (['{"question_id": "9", "text": "x"}', "", '{"question_id": "9", "text": "x"}'], "line 2: is empty"),
        (["[" * 100_000], "line 1: is not JSON"),
    ],
)
def test_a_damaged_line_is_refused_with_its_number(tmp_path, lines, message):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"answers.jsonl, {message}"):
        read_answers(str(file), StorageSpec())


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\n \n"])
def test_an_empty_line_at_the_end_is_none(tmp_path, end):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"question_id": "9", "text": "a\xe2\x80\xa8b"}\r\n{"question_id": 8, "text": ""}' + end.encode()
    )
    assert [row["text"] for _, row in read_answers(str(file), StorageSpec()).rows] == ["a\u2028b", ""]


def test_an_empty_file_and_a_missing_one_differ(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert read_answers(str(tmp_path / "empty.jsonl"), StorageSpec()).rows == []
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_answers(str(tmp_path / "none.jsonl"), StorageSpec())


@pytest.mark.parametrize("name", sorted(SETS))
def test_an_answer_to_no_question_is_refused(tmp_path, name):
    kept = Set(name, tmp_path)
    lines = kept.lines(*RIGHT[name])
    stranger = lines[1] | {"question_id": "999999", "prompt": "Another?\nAnswer."}
    with pytest.raises(DataError, match=rf"line 2: no question of {name} has the id '999999'.*1 of {len(lines)} lines"):
        kept.score([lines[0], stranger, *lines[2:]])


@pytest.mark.parametrize("name", ["mme", "textvqa"])
def test_a_prompt_is_needed_where_an_id_has_several_questions(tmp_path, name):
    kept = Set(name, tmp_path)
    line = kept.lines("x")[0]
    with pytest.raises(DataError, match="has the id, but not this question in its prompt"):
        kept.score([line | {"prompt": "Another?\nAnswer."}])
    del line["prompt"]
    with pytest.raises(DataError, match="line 1: lacks prompt"):
        kept.score([line])


# ------------------------------------------------------------------------------------------------ intervals


def tally(values):
    return Tally.of(
        [str(number) for number in range(len(values))],
        [{"accuracy": 1.0, "accuracy right": float(value)} for value in values],
        [""] * len(values),
    )


def test_an_interval_is_as_wide_as_the_binomial_one():
    values = np.random.default_rng(1).random(2000) < 0.7
    low, high = interval(resampled(tally(values), per_cent_right, seed=0)["accuracy"])
    error = 196 * np.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert (high - low) / 2 == pytest.approx(error, rel=0.08)
    assert low < 100 * values.mean() < high


def test_a_seed_gives_the_same_interval():
    one, again, other = (resampled(tally([1, 0, 1]), per_cent_right, seed=seed)["accuracy"] for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()


def test_groups_are_drawn_whole(tmp_path):
    kept = Set("mmbench", tmp_path)
    scored = kept.score(kept.lines("A", "B", "X"))
    assert scored.intervals["accuracy"] == (0, 100)
    assert len(scored.tally.units) == 2


def test_categories_keep_their_size_in_a_resample(tmp_path):
    kept = Set("pope", tmp_path)
    scored = kept.score(kept.lines("Yes", "No", "Yes", "No", "Yes", "Yes"))
    assert scored.intervals["f1[random]"][0] in (0, 100)
    assert np.isfinite(scored.primary).all()


def test_two_models_are_compared_on_the_same_questions():
    random = np.random.default_rng(2)
    weak = random.random(1000) < 0.6
    strong = weak | (random.random(1000) < 0.1)
    found = compare(tally(weak), tally(strong), per_cent_right, "accuracy", seed=0, permutations=2000)
    assert found.difference == pytest.approx(100 * (strong.mean() - weak.mean()))
    assert 0 < found.low < found.difference < found.high
    assert found.p == pytest.approx(1 / 2001)


def test_the_p_value_is_that_of_the_exact_sign_test():
    # 8 questions differ, 6 of them in favour of the second: two-sided 2 * P(X >= 6 of 8) = 0.2890625.
    first, second = [0] * 6 + [1] * 2 + [1] * 50, [1] * 6 + [0] * 2 + [1] * 50
    found = compare(tally(first), tally(second), per_cent_right, "accuracy", seed=0)
    assert found.p == pytest.approx(0.289, abs=0.015)


def test_equal_models_do_not_differ(tmp_path):
    kept = Set("pope", tmp_path)
    scored = kept.score(kept.lines(*RIGHT["pope"]))
    found = comparisons([scored, scored])[0]
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


# ------------------------------------------------------------------------------------------------ output


@pytest.fixture
def six(tmp_path):
    """Return scores of one model on the six benchmarks of the paper, all right."""
    return [(kept := Set(name, tmp_path / name)).score(kept.lines(*RIGHT[name])) for name in AVERAGE]


def test_the_average_is_the_papers(six):
    assert average(six)[0] == pytest.approx((200 / 20 + 5 * 100) / 6)
    assert average(six[1:]) is None
    assert score_rows(six)[-1][:4] == ["m", "average", "of six", "85.00"]
    assert json.loads(as_json(six, []))["average"]["average"] == pytest.approx(85)


def test_the_json_has_numbers_only(six):
    content = json.loads(as_json(six, []))
    assert content["gqa"]["accuracy"] == content["gqa"]["accuracy.low"] == 100
    assert {"questions", "missing", "unanswered", "repeated", "unparsable"} <= content["gqa"].keys()
    assert all(isinstance(value, int | float) for metrics in content.values() for value in metrics.values())


def test_the_table_has_the_names_of_lmms_eval(six):
    assert ["m", "gqa", "accuracy", "100.00", "100.00 to 100.00", "gqa exact_match"] in score_rows(six)
    assert any(line.startswith("m, gqa: 3 questions; 0 missing") for line in remark_lines(six))


def test_a_table_in_markdown_keeps_its_cells():
    assert markdown([["a", "b"], ["x|y", "1\n2"]]) == "| a | b |\n|---|---|\n| x\\|y | 1 2 |"


def command(folder, **how):
    return Request(("gqa",), (str(folder / "a.jsonl"),), str(folder), output=str(folder / "out.json"), **how)


def save(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_command_prints_tables_and_writes_the_scores(tmp_path, capsys):
    kept = Set("gqa", tmp_path)
    save(tmp_path / "a.jsonl", kept.lines("cat", "no"))
    run_score(command(tmp_path, markdown=True))
    assert json.loads((tmp_path / "out.json").read_text())["gqa"]["accuracy"] == pytest.approx(100 / 3)
    printed = capsys.readouterr().out
    assert "| m | gqa | accuracy | 33.33 |" in printed
    assert "m, gqa: 3 questions; 1 missing" in printed


def test_the_command_compares_models(tmp_path, capsys):
    kept = Set("gqa", tmp_path)
    save(tmp_path / "a.jsonl", kept.lines("cat", "no"))
    save(tmp_path / "b.jsonl", [line | {"model_id": "n"} for line in kept.lines("cat", "yes", "red")])
    files = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    run_score(Request(("gqa",), files, str(tmp_path), output=str(tmp_path / "out.json")))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["models"]["n"]["gqa"]["accuracy"] == 100
    assert content["comparisons"][0]["difference"] == pytest.approx(200 / 3)
    assert "+66.67" in capsys.readouterr().out


def test_the_command_scores_several_benchmarks_of_two_files_of_one_model(tmp_path, capsys):
    for name in ("gqa", "pope"):
        kept = Set(name, tmp_path / name)
        save(tmp_path / f"{name}.jsonl", kept.lines(*RIGHT[name]))
    (tmp_path / "again").mkdir()
    for name in ("gqa", "pope"):
        (tmp_path / "again" / f"{name}.jsonl").write_text((tmp_path / f"{name}.jsonl").read_text())
    answers = (str(tmp_path), str(tmp_path / "again" / "{benchmark}.jsonl"))
    run_score(Request(("gqa", "pope"), answers, str(tmp_path), output=str(tmp_path / "out.json"), markdown=True))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["models"].keys() == set(answers)  # both say that they are of model m
    assert {each["benchmark"] for each in content["comparisons"]} == {"gqa", "pope"}
    assert "pope_f1_score" in capsys.readouterr().out


def test_each_model_is_compared_with_each_one_before_it(six):
    found = comparisons([replace(six[1], model=name) for name in ("a", "b", "c")])
    assert [(each.model, each.compared_with) for each in found] == [("b", "a"), ("c", "a"), ("c", "b")]


@pytest.mark.parametrize("names", [("gqa",), ("gqa", "pope"), ("mmbench", "seed")])
def test_a_rule_that_no_benchmark_has_is_refused_also_for_several(names):
    benchmarks = [find_benchmark(name) for name in names]
    with pytest.raises(SpecError, match="no rule 'gpt'"):
        rules_of(benchmarks, "gpt")


def test_a_rule_is_for_the_benchmarks_that_have_it():
    benchmarks = [find_benchmark(name) for name in ("gqa", "mmbench", "seed")]
    assert rules_of(benchmarks, "vlmevalkit") == {"gqa": "", "mmbench": "vlmevalkit", "seed": "llava"}
    assert rules_of(benchmarks, "lmms-eval") == {"gqa": "", "mmbench": "lmms-eval", "seed": "lmms-eval"}
    assert rules_of(benchmarks, None) == {"gqa": "", "mmbench": "opencompass", "seed": "llava"}


def test_comparisons_are_a_table(six):
    assert comparison_rows(comparisons([six[1], six[1]]))[1] == [
        "gqa", "accuracy", "m", "m", "+0.00", "+0.00 to +0.00", "1.0000"
    ]  # fmt: skip


def test_data_answers_and_scores_may_be_in_a_store(tmp_path, capsys):
    with served() as s3:
        for name in ("mme", "mmbench"):
            kept = Set(name, tmp_path / name)
            save(tmp_path / "answers" / f"{name}.jsonl", kept.lines(*RIGHT[name]))
        root = f"s3://{s3.bucket}"
        s3.filesystem().put(str(tmp_path), f"{s3.bucket}/eval", recursive=True)
        storage = StorageSpec(endpoint_url=s3.endpoint_url, region="us-east-1")
        request = Request(
            ("mme", "mmbench"), (f"{root}/eval/answers",), f"{root}/eval", storage, output=f"{root}/out.json"
        )
        run_score(request)
        content = json.loads(s3.filesystem().cat(f"{s3.bucket}/out.json"))
        assert (content["mme"]["perception"], content["mmbench"]["accuracy"]) == (200, 100)
        questions = read_questions(kept.benchmark, DataFolder(f"{root}/eval", storage), Options())
        require_pictures(questions, storage)
        mme = find_benchmark("mme")
        questions = read_questions(mme, DataFolder(f"{root}/eval", storage), Options())
        require_pictures(questions, storage)
        assert read_picture(questions[0], storage) == picture()
        s3.filesystem().rm(f"{s3.bucket}/eval/mme/MME_Benchmark_release_version/code_reasoning/0001.png")
        with pytest.raises(DataError, match=r"1 of \d+ pictures are missing .*s3://.*code_reasoning/0001.png"):
            require_pictures(questions, storage)


def test_a_folder_whose_name_looks_like_a_pattern_is_read(tmp_path):
    kept = Set("mme", tmp_path / "a[b]*")
    assert kept.score(kept.lines(*RIGHT["mme"])).metrics["perception"] == 200
