"""The benchmarks' files: prompts, lines of answers, layouts on disk and in a store, and damage that is refused."""

import base64
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import cast

import pytest
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.data.manifest import find_shards
from betakd_ray.data.samples import RawSample
from betakd_ray.data.shards import read_shard
from betakd_ray.errors import DataError, SpecError
from betakd_ray.evaluation.benchmark import OPTION_LETTER, SHORT_ANSWER, Benchmark, Options, answer_line, first_of
from betakd_ray.evaluation.benchmarks.scienceqa import scienceqa_records
from betakd_ray.evaluation.pictures import read_picture, require_pictures
from betakd_ray.evaluation.question_files import DataFolder
from betakd_ray.evaluation.registry import find_benchmark, names
from betakd_ray.evaluation.scoring import read_questions
from betakd_ray.spec import StorageSpec, load_spec
from tests.questions import SETS, Set, picture, tsv, write


def test_every_module_is_a_benchmark_of_its_name():
    assert names() == sorted(SETS)
    for name in names():
        benchmark = find_benchmark(name)
        assert isinstance(benchmark, Benchmark)
        assert benchmark.name == name


def test_an_unknown_benchmark_is_refused_with_the_nearest_name():
    with pytest.raises(SpecError, match=r"no 'scienceq'; did you mean 'scienceqa'"):
        find_benchmark("scienceq")


def test_a_benchmark_of_ones_own_is_an_object_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "own_benchmark.py").write_text(
        "from betakd_ray.evaluation.benchmark import Benchmark, Question, Verdict\n"
        "def questions(folder, options):\n"
        "    return [Question(key='1', text='Say it', image=None, question_id=1, prompt='Say it', truth='x',"
        " max_new_tokens=4)]\n"
        "def judge(question, text, rule):\n"
        "    return Verdict(float(text == question.truth))\n"
        "OWN = Benchmark('own', questions, judge)\n"
        "OTHER = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = find_benchmark("own_benchmark:OWN")
    assert [question.prompt for question in read_questions(own, DataFolder(str(tmp_path)), Options())] == ["Say it"]
    with pytest.raises(SpecError, match=r"is a int; expected a .*Benchmark object"):
        find_benchmark("own_benchmark:OTHER")


@pytest.mark.parametrize("name", sorted(SETS))
def test_keys_are_unique_and_lines_lead_back_to_their_questions(tmp_path, name):
    kept = Set(name, tmp_path)
    questions = kept.questions()
    assert len({question.key for question in questions}) == len(questions) > 1
    for question in questions:
        assert kept.benchmark.key(answer_line(question, "x", "m")) == question.key


@pytest.mark.parametrize("name", sorted(SETS))
def test_a_line_has_the_keys_of_the_public_tools_in_their_order(tmp_path, name):
    question = Set(name, tmp_path).questions()[0]
    line = answer_line(question, "x", "m")
    first = ["question_id", "round_id", "prompt", "text", "options", "option_char"]
    assert list(line) == [
        *(first if name == "mmbench" else ["question_id", "prompt", "text"]), "answer_id", "model_id", "metadata"
    ]  # fmt: skip
    assert line["metadata"] == {}
    assert "<image>" not in question.text


@pytest.mark.parametrize("name", sorted(SETS))
def test_answer_ids_are_unique_and_stay_the_same(tmp_path, name):
    questions = Set(name, tmp_path).questions()
    ids = [answer_line(question, "x", "m")["answer_id"] for question in questions]
    assert len(set(ids)) == len(ids)
    assert ids == [answer_line(question, "y", "m")["answer_id"] for question in questions]
    assert ids[0] != answer_line(questions[0], "x", "other")["answer_id"]


@pytest.mark.parametrize("name", sorted(SETS))
def test_files_are_found_in_the_folder_of_several_benchmarks(tmp_path, name):
    benchmark = find_benchmark(name)
    SETS[name](tmp_path / benchmark.folders[0])
    questions = read_questions(benchmark, DataFolder(str(tmp_path)), Options())
    require_pictures(questions, StorageSpec())
    assert questions == read_questions(benchmark, DataFolder(str(tmp_path)), Options())


@pytest.mark.parametrize(
    ("name", "type_"), [("pope", int), ("mmbench", int), ("gqa", str), ("scienceqa", str), ("mme", str)]
)
def test_ids_have_the_type_of_the_public_files(tmp_path, name, type_):
    assert all(type(question.question_id) is type_ for question in Set(name, tmp_path).questions())


def test_gqa_keeps_leading_zeros(tmp_path):
    assert [question.question_id for question in Set("gqa", tmp_path).questions()] == ["007", "08", "9"]


def test_scienceqa_asks_with_the_suffix_and_marks_the_image_in_the_prompt_only(tmp_path):
    questions = Set("scienceqa", tmp_path).questions()
    assert questions[0].text == questions[0].prompt == f"Which is 1?\nA. one\nB. two{OPTION_LETTER}"
    assert questions[0].image is None
    assert questions[3].prompt == f"<image>\n{questions[3].text}"
    assert (questions[3].processing, questions[3].max_new_tokens) == ("crop", 1024)


def test_textvqa_is_asked_with_or_without_ocr_tokens(tmp_path):
    kept = Set("textvqa", tmp_path)
    assert kept.questions()[0].text == f"What colour, is it?\nReference OCR token: A, B{SHORT_ANSWER}"
    assert kept.questions(ocr=True) == kept.questions()
    without = kept.questions(ocr=False)
    assert without[0].text == without[0].prompt == f"What colour, is it?{SHORT_ANSWER}"
    assert [question.key for question in without] == [question.key for question in kept.questions()]


def test_mmbench_builds_the_prompt_of_llava(tmp_path):
    questions = Set("mmbench", tmp_path).questions()
    assert questions[0].prompt == 'Read.\tThen look.\nWhat "is"\nit?\nA. cat\nB. a dog'
    assert questions[0].text == questions[0].prompt + OPTION_LETTER
    assert questions[0].record == {"round_id": 0, "options": ["cat", "a dog"], "option_char": ["A", "B"]}
    assert (questions[1].unit, questions[1].parts) == ("7", ("accuracy", "l2[logic]"))
    assert questions[0].image == picture()


def test_mmbench_takes_the_index_of_another_row_for_its_image(tmp_path):
    kept = Set("mmbench", tmp_path)
    file = tmp_path / "mmbench_dev_en_20231003.tsv"
    image = base64.b64encode(picture()).decode()
    file.write_text(file.read_text().replace(image, "7"))
    assert kept.questions()[0].image == b""
    file.write_text(file.read_text().replace('"A"\t"x"\t"7"', f'"A"\t"x"\t"{image}"'))
    assert [question.image for question in kept.questions()] == [picture()] * 3


@pytest.mark.parametrize("cell", ["NA", "N/A", "null", "None", "none", "NaN", ""])
def test_a_cell_without_text_ends_the_options(tmp_path, cell):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"]
    write(tmp_path, "mmbench_dev_20230712.tsv", tsv([columns, ["1", "Q", cell, "a", "b", cell, "d", "A", "x"]]))
    question = find_benchmark("mmbench").questions(DataFolder(str(tmp_path)), Options())[0]
    assert question.record["options"] == ["a", "b"]
    assert question.prompt == "Q\nA. a\nB. b"


def test_a_limit_keeps_groups_whole(tmp_path):
    questions = Set("mmbench", tmp_path).questions()
    assert [question.question_id for question in first_of(questions, 1)] == [7, 1000007]
    assert len(first_of(questions, 3)) == len(first_of(questions, None)) == 3
    assert len(first_of(Set("mme", tmp_path / "mme").questions(), 3)) == 4


def test_pope_finds_labels_by_category_image_and_text_in_any_order(tmp_path):
    assert [question.truth for question in Set("pope", tmp_path).questions()] == ["yes", "no"] * 3


def test_mme_finds_answers_beside_images_or_in_a_folder_of_their_own(tmp_path):
    kept = Set("mme", tmp_path)
    assert [question.truth for question in kept.questions()] == ["yes", "no"] * 3
    (tmp_path / "MME_Benchmark_release_version").rename(tmp_path / "images")  # MobileVLM's name
    assert [question.truth for question in kept.questions()] == ["yes", "no"] * 3


def test_two_questions_with_one_key_are_both_asked(tmp_path):
    kept = Set("gqa", tmp_path)
    file = tmp_path / "llava_gqa_testdev_balanced.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    assert len({question.key for question in kept.questions()}) == 4
    scored = kept.score(kept.lines("cat", "yes", "red"))
    assert (scored.metrics["accuracy"], scored.counts["missing"], scored.counts["repeated"]) == (100, 0, 0)


# ------------------------------------------------------------------------------------------------ damage


FILES = {
    "scienceqa": ["llava_test_CQM-A.json", "problems.json", "pid_splits.json"],
    "textvqa": ["llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"],
    "gqa": ["llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"],
    "pope": ["llava_pope_test.jsonl", "coco/coco_pope_random.json"],
    "mme": ["llava_mme.jsonl"],
    "mmbench": ["mmbench_dev_en_20231003.tsv"],
    "chartqa": ["test_human.json", "test_augmented.json"],
    "seed": ["llava-seed-bench.jsonl", "SEED-Bench.json"],
}
EACH = [(name, file) for name, files in FILES.items() for file in files]


@pytest.mark.parametrize(("name", "file"), EACH)
def test_a_missing_file_is_named_with_the_place_to_get_it(tmp_path, name, file):
    kept = Set(name, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=rf"has no .*{file}.* It comes from"):
        kept.questions()


@pytest.mark.parametrize("content", [b"", b"[1", b'\xff\xfe{"a": 1}', b"null", b'{"data": 3, "questions": 3}', b"[[]]"])
@pytest.mark.parametrize(("name", "file"), EACH)
def test_a_damaged_file_is_named(tmp_path, name, file, content):
    kept = Set(name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"{Path(file).name}|has no questions"):
        kept.questions()


LACKING = [
    ("scienceqa", "llava_test_CQM-A.json", '"conversations"'), ("scienceqa", "problems.json", '"answer"'),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", '"text"'), ("textvqa", "TextVQA_0.5.1_val.json", '"answers"'),
    ("gqa", "testdev_balanced_questions.json", '"structural"'), ("gqa", "llava_gqa_testdev_balanced.jsonl", '"image"'),
    ("pope", "llava_pope_test.jsonl", '"category"'), ("pope", "coco/coco_pope_popular.json", '"label"'),
    ("mme", "llava_mme.jsonl", '"question_id"'), ("seed", "SEED-Bench.json", '"data_type"'),
    ("chartqa", "test_human.json", '"query"'), ("mmbench", "mmbench_dev_en_20231003.tsv", '"answer"'),
    ("mmbench", "mmbench_dev_en_20231003.tsv", '"hint"'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "key"), LACKING)
def test_a_missing_key_or_column_is_named(tmp_path, name, file, key):
    kept = Set(name, tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text().replace(key, '"other"'))
    with pytest.raises(DataError, match=rf"{Path(file).name}.*{key.strip(chr(34))}"):
        kept.questions()


def test_questions_without_truth_are_counted(tmp_path):
    kept = Set("gqa", tmp_path / "gqa")
    truth = tmp_path / "gqa/testdev_balanced_questions.json"
    truth.write_text(json.dumps({"9": json.loads(truth.read_text())["9"]}))
    with pytest.raises(DataError, match=r"2 of 3 questions have no ground truth, the first '007'"):
        kept.questions()


def test_labels_of_another_release_of_pope_are_refused_with_file_and_count(tmp_path):
    kept = Set("pope", tmp_path)
    for category in ("random", "popular"):
        path = tmp_path / f"coco/coco_pope_{category}.json"
        path.write_text(path.read_text().replace("a cup", "a mug"))
    with pytest.raises(DataError, match=r"coco_pope_popular.json for 1 of 2, .*coco_pope_random.json for 1 of 2"):
        kept.questions()


def test_two_labels_of_one_question_are_refused(tmp_path):
    kept = Set("pope", tmp_path)
    path = tmp_path / "coco/coco_pope_random.json"
    path.write_text(path.read_text() + path.read_text().replace('"yes"', '"no"'))
    with pytest.raises(DataError, match=r"coco_pope_random.json, line 4: another label"):
        kept.questions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it a cup? Please answer yes or no.\tYes\n", "3 of 6|1 of 6 questions have no ground truth"),
        ("Is it a cup? Yes\nIs it a dog?\tNo", r"0001.txt, line 1: .*expected a question, a tab"),
        ("Is it a cup?\tMaybe", r"0001.txt, line 1"),
    ],
)
def test_mme_answers_that_lack_or_are_damaged_are_named(tmp_path, text, message):
    kept = Set("mme", tmp_path)
    (tmp_path / "MME_Benchmark_release_version/code_reasoning/0001.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        kept.questions()


def test_mme_names_a_category_that_it_does_not_know(tmp_path):
    kept = Set("mme", tmp_path)
    path = tmp_path / "llava_mme.jsonl"
    path.write_text(path.read_text().replace('"category": "artwork"', '"category": "art"'))
    with pytest.raises(DataError, match="category 'art' is none of"):
        kept.questions()


@pytest.mark.parametrize("change", [{"test": ["1", "2"]}, {"test": ["1", "2", "3", "4", "5", "6"]}, {"train": []}])
def test_scienceqa_refuses_a_split_of_other_questions(tmp_path, change):
    kept = Set("scienceqa", tmp_path)
    (tmp_path / "pid_splits.json").write_text(json.dumps(change))
    with pytest.raises(DataError, match=r"test split|of it are not asked"):
        kept.questions()


def test_the_test_split_of_mmbench_has_no_truth(tmp_path):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"]
    write(tmp_path, "mmbench_dev_20230712.tsv", tsv([columns, ["1", "Q", "", "a", "b", "", "", "", "x"]]))
    with pytest.raises(DataError, match=r"1 of 1 questions have no ground truth"):
        find_benchmark("mmbench").questions(DataFolder(str(tmp_path)), Options())


# ------------------------------------------------------------------------------------------------ images


def test_missing_and_unreadable_images_are_counted(tmp_path):
    kept = Set("gqa", tmp_path)
    (tmp_path / "images/n007.jpg").unlink()
    (tmp_path / "images/n08.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"2 of 3 pictures are missing or cannot be read. The first: .*n007.jpg"):
        require_pictures(kept.questions(), StorageSpec())


def test_an_image_in_a_table_that_is_none_is_counted(tmp_path):
    kept = Set("mmbench", tmp_path)
    file = tmp_path / "mmbench_dev_en_20231003.tsv"
    file.write_text(file.read_text().replace('"dev"', '"dev"').replace("/9j/", "AAAA"))
    with pytest.raises(DataError, match=r"1 of 1 pictures .* the picture of question 7: cannot be decoded"):
        require_pictures(kept.questions(), StorageSpec())


@pytest.mark.parametrize("name", sorted(SETS))
def test_images_are_read(tmp_path, name):
    kept = Set(name, tmp_path)
    questions = kept.questions()
    require_pictures(questions, StorageSpec())
    contents = [read_picture(question, StorageSpec()) for question in questions]
    assert all(content == picture() for question, content in zip(questions, contents, strict=True) if question.image)


# ------------------------------------------------------------------------------------------------ training split


def test_scienceqa_gives_records_for_distillation(tmp_path):
    kept = Set("scienceqa", tmp_path)
    folder = DataFolder(str(tmp_path))
    first, *_, last = scienceqa_records(folder, folder, "test")
    assert first == {
        "id": "1",
        "conversations": [
            {"from": "human", "value": f"Context: Look.\nWhich is 1?\nA. one\nB. two\nC. three{OPTION_LETTER}"},
            {"from": "gpt", "value": "B"},
        ],
    }
    assert last["image"] == f"{tmp_path}/images/test/5/image.png"
    assert last["conversations"][0]["value"].startswith("<image>\nContext: Look.\nWhich is 5?")
    with pytest.raises(DataError, match=r"no split 'val'; it has test, train"):
        list(scienceqa_records(DataFolder(str(kept.folder)), folder, "val"))


def _training(folder: Path, images: str) -> None:
    """Write ScienceQA's own files with a training split, of which two of three problems have an image."""
    Set("scienceqa", folder)
    for name in ("llava_test_CQM-A.json", "images"):
        (shutil.rmtree if name == "images" else os.remove)(folder / name)
    write(folder, "pid_splits.json", {"train": ["2", "3", "5"], "val": ["1"], "test": ["4"]})
    for pid in ("3", "5"):
        write(folder, f"{images}/train/{pid}/image.png", picture())


def _packed(shards: Path) -> list[RawSample]:
    found = [
        sample
        for shard in find_shards([str(shards / "train-*.tar")], StorageSpec())
        for sample in read_shard(shard, StorageSpec())
    ]
    assert all(isinstance(sample, RawSample) for sample in found)
    return sorted(cast("list[RawSample]", found), key=lambda sample: sample.id)


def _commands_of_the_job() -> list[list[str]]:
    """Return the `betakd pack` commands of jobs/mobilevlm/scienceqa.yaml."""
    lines = (Path(__file__).parents[2] / "jobs/mobilevlm/scienceqa.yaml").read_text().splitlines()
    return [shlex.split(line.lstrip("# "))[1:] for line in lines if line.lstrip("# ").startswith("betakd pack ")]


def test_the_commands_of_the_scienceqa_job_make_the_shards_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = _commands_of_the_job()
    _training(tmp_path / "ScienceQA/data/scienceqa", "images")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    job = load_spec(Path(__file__).parents[2] / "jobs/mobilevlm/scienceqa.yaml")
    shards = find_shards(job.data.paths, job.data.storage)
    assert sum(shard.samples for shard in shards) == 2
    third, fifth = _packed(tmp_path / "shards/scienceqa")
    assert (third.id, fifth.id) == ("3", "5")
    assert third.images == [picture()]
    asked, answer = third.conversation
    assert asked["value"] == f"<image>\nWhich is 3?\nA. one\nB. two\nC. three{OPTION_LETTER}"
    assert answer["value"] == "B"


@pytest.mark.parametrize("images", ["images", ".", "sqa/images"])
def test_scienceqa_is_packed_from_each_layout_of_its_images(tmp_path, images):
    _training(tmp_path / "data", images)
    done = CliRunner().invoke(
        app, ["pack", str(tmp_path / "data"), "--from", "scienceqa", "--out", str(tmp_path / "s")]
    )
    assert done.exit_code == 0, done.stderr
    assert [sample.id for sample in _packed(tmp_path / "s")] == ["2", "3", "5"]


def test_scienceqa_s_images_may_lie_elsewhere_and_missing_ones_are_counted(tmp_path):
    _training(tmp_path / "data", "../elsewhere")
    pack = ["pack", str(tmp_path / "data"), "--from", "scienceqa", "--out", str(tmp_path / "s")]
    done = CliRunner().invoke(app, pack)
    assert done.exit_code == 2
    assert "2 of 3 samples cannot be used" in done.stderr
    done = CliRunner().invoke(app, [*pack, "--images", str(tmp_path / "elsewhere")])
    assert done.exit_code == 0, done.stderr
    assert len(_packed(tmp_path / "s")) == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"problems.json": None}, "problems.json"),
        ({"pid_splits.json": {"minitrain": []}}, "has no split 'train'; it has minitrain"),
        ({"pid_splits.json": {"train": ["9"]}}, "1 of 1 questions have no ground truth"),
        (
            {"problems.json": {"2": {"question": "?", "choices": ["one"], "answer": 1}}},
            "questions have no ground truth",
        ),
        ({"problems.json": "[]"}, "problems.json"),
    ],
)
def test_scienceqa_files_that_lack_something_are_one_line(tmp_path, damage, said):
    _training(tmp_path / "data", "images")
    for name, content in damage.items():
        (tmp_path / "data" / name).unlink()
        if content is not None:
            write(tmp_path / "data", name, content)
    done = CliRunner().invoke(
        app, ["pack", str(tmp_path / "data"), "--from", "scienceqa", "--out", str(tmp_path / "s")]
    )
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_of_the_documents_works(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    (tmp_path / "my_captions.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path, "colours.jsonl", [{"image": "1.jpg", "thing": "cup", "colour": "red"}])
    questions = read_questions(find_benchmark("my_captions:COLOURS"), DataFolder(str(tmp_path)), Options())
    assert questions[0].parts == ("accuracy", "accuracy[cup]")
    assert find_benchmark("my_captions:COLOURS").judge(questions[0], " Red", "").value == 1
