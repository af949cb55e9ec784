"""Records as people write them: which forms are read, and what is refused because it would be lost without a word."""

import base64
import re

import pytest

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.conversations import read_conversation
from betakd_ray.data.records import Reading, samples_of
from tests.tars import TURNS

PNG = b"\x89PNG\r\n\x1a\n not decoded here"
ASKED = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dot."}]


def read(record, **options):
    return list(samples_of(record, 7, Reading(options.pop("images", None), **options)))


FORMS = {
    "conversations": {"conversations": ASKED},
    "messages": {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dot."}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]},
        ]
    },
    "prompt and completion": {
        "prompt": [{"role": "user", "content": "What is it?"}],
        "completion": [{"role": "assistant", "content": "A dot."}],
    },
    "pairs": {"texts": [{"user": "What is it?", "assistant": "A dot.", "source": "x"}]},
    "question and answer": {"question": "What is it?", "answer": "A dot."},
    "the same answer by several": {"question": "What is it?", "answer": ["A dot.", "A dot."]},
    "an instruction with its input": {"instruction": "What is", "input": "it?", "output": "A dot."},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_conversation_is_read(form):
    (sample,) = read(FORMS[form])
    texts = [turn["value"].replace("\n", " ") for turn in sample["conversations"]]
    assert texts == ["What is it?", "A dot."]
    assert [turn["from"] for turn in sample["conversations"]] == ["human", "gpt"]
    assert sample["id"] == "7"


def test_a_system_turn_is_kept_and_stands_first():
    turns = [{"role": "system", "content": "Be short."}, *FORMS["messages"]["messages"]]
    assert read_conversation({"messages": turns}).system == "Be short."
    (sample,) = read({"messages": turns, "id": None})
    assert sample["conversations"][0] == {"from": "system", "value": "Be short."}
    assert read_conversation({"system": "Be long.", **FORMS["conversations"]}).system == "Be long."
    with pytest.raises(ValueError, match="a later turn is from the system"):
        read({"messages": turns[::-1]})


def test_images_in_parts_stay_in_their_places():
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    content = [
        {"type": "text", "text": "Is "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " like "},
        {"type": "image", "image": PNG + b"2"},
        {"type": "text", "text": "?"},
    ]
    (sample,) = read({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]})
    assert sample["images"] == [PNG, PNG + b"2"]
    assert sample["conversations"][0]["value"] == f"Is {IMAGE} like {IMAGE}?"


@pytest.mark.parametrize("key", ["images", "image", "image_path", "img", "image_1", "picture"])
@pytest.mark.parametrize("value", [PNG, {"bytes": PNG, "path": "x.png"}, [PNG]])
def test_each_key_of_an_image_is_read(key, value):
    (sample,) = read({key: value, "conversations": ASKED})
    assert sample["images"] == [PNG]
    assert sample["conversations"][0]["value"] == f"{IMAGE}\nWhat is it?"


REFUSED = {
    "a video": ({"video": "a.mp4"}, "the key 'video' names 'a.mp4'"),
    "videos": ({"videos": ["a.mp4"], "images": [PNG]}, "the key 'videos' names"),
    "a sound": ({"audio_path": "a.wav"}, "the key 'audio_path' names 'a.wav'"),
    "another key of an image": ({"left_image": "a.png"}, "the key 'left_image' names 'a.png'"),
    "a file under any key": ({"source": "x/a.PNG"}, "the key 'source' names 'x/a.PNG'"),
    "an image that is a URL": ({"image": "https://h/a.png"}, "is a URL; fetch it first"),
    "an image without a folder": ({"image": "a.png"}, "--images FOLDER"),
    "an image that is a number": ({"images": [3]}, "an image is 3"),
}
MARKS = {
    "a video": ("<video>\nWhat?", 0, "'<video>', but only images are read"),
    "another project's": ("<ImageHere> What?", 0, "write <image> where each image belongs"),
    "in brackets": ("[IMG] What?", 2, "1 placeholders, 2 images"),
    "a family's token": ("<|image_pad|> What?", 0, "<|image_pad|>"),
    "beside ours": (f"{IMAGE} <image_2> What?", 2, "'<image_2>'"),
    "out of order": ("<image_2> or <image_1>?", 2, "in order"),
    "a name": ("<img>a.png</img> What?", 1, "name each in one place"),
}
READ_MARKS = {
    "<image_1> or <image_2>?": 2,
    "<image 1> What?": 1,
    "<|image_1|>\nWhat?": 1,
    "<ImageHere> What?": 1,
    "<Img><ImageHere></Img> What?": 1,
    "[IMG] What?": 1,
    "<|vision_start|><|image_pad|><|vision_end|>What?": 1,
    "<IMG_CONTEXT>What?": 1,
}


@pytest.mark.parametrize("case", REFUSED)
def test_media_that_would_not_be_read_are_named(case):
    fields, said = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        read({**fields, "conversations": ASKED})


@pytest.mark.parametrize("case", MARKS)
def test_a_foreign_placeholder_without_its_image_is_refused(case):
    text, images, said = MARKS[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        read({"images": [PNG] * images, "question": text, "answer": "A dot."})


@pytest.mark.parametrize("text", READ_MARKS)
def test_a_foreign_placeholder_for_each_image_is_ours(text):
    (sample,) = read({"images": [PNG] * READ_MARKS[text], "question": text, "answer": "A dot."})
    assert sample["conversations"][0]["value"].count(IMAGE) == READ_MARKS[text]


@pytest.mark.parametrize("text", ["Close <video></video> please", "What is <img src='a'>?", "a[0]", "<b>x</b>"])
def test_ordinary_text_is_no_placeholder(text):
    (sample,) = read({"question": text, "answer": "A dot."})
    assert sample["conversations"][0]["value"] == text


def test_an_image_that_the_text_names_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (sample,) = read({"question": "Picture 1: <img>a.png</img>\nWhat?", "answer": "A."}, images=str(tmp_path))
    assert (sample["images"], sample["conversations"][0]["value"]) == ([PNG], f"{IMAGE}\nWhat?")


def test_keys_of_the_user_s_are_mapped_and_a_missing_one_is_named():
    keys = {"question": "q", "answer": "a", "image": "photo_bytes", "id": "no"}
    (sample,) = read({"q": "What?", "a": 3, "photo_bytes": PNG, "no": 12}, keys=keys)
    assert (sample["id"], sample["images"], sample["conversations"][1]["value"]) == ("12", [PNG], "3")
    with pytest.raises(ValueError, match="has no key 'q', which is mapped to question"):
        read({"question": "What?"}, keys=keys)


def test_each_answer_may_be_a_sample_with_the_images_that_it_has_seen():
    turns = [*TURNS, {"from": "human", "value": f"And {IMAGE}?"}, {"from": "gpt", "value": "A square."}]
    first, second = read({"id": "a", "images": [PNG, PNG], "conversations": turns}, split_turns=True)
    assert [first["id"], second["id"]] == ["a-1", "a-2"]
    assert [len(each["images"]) for each in (first, second)] == [1, 2]
    assert [len(each["conversations"]) for each in (first, second)] == [2, 4]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"id": 1}, 'expected "conversations" or "messages"'),
        ({"question": "What?"}, "no answer under any of the keys"),
        ({"question": "What?", "answer": ["a", "b"]}, "2 different answers"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 is from 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of the type 'video'"),
        ("row 3 has 2 cells", "row 3 has 2 cells"),
        ([1], "expected an object"),
    ],
)
def test_a_record_of_no_known_form_says_what_is_expected(record, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(record)
