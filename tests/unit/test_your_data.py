"""The page "Your own data in ten minutes": each of its commands runs on data as it describes them."""

import csv
import io
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.spec import DataSpec
from tests.tars import tar_bytes
from tests.tiny import save_tiny

PAGE = (Path(__file__).parents[2] / "docs/your_data.md").read_text()
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (40 * number % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def turns(number):
    return [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Cat {number}."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data in each form that the page names."""
    home = tmp_path_factory.mktemp("data")
    (home / "photos/cats").mkdir(parents=True)
    for number in range(4):
        (home / f"photos/cats/{number}.jpg").write_bytes(jpeg(number))
    records = [{"image": f"cats/{number}.jpg", "conversations": turns(number)} for number in range(4)]
    (home / "train.json").write_text(json.dumps(records))
    (home / "flawed.json").write_text(json.dumps([*records, {"image": "cats/9.jpg", "conversations": turns(9)}]))
    content = [{"type": "image", "image": "cats/1.jpg"}, {"type": "text", "text": "What is it?"}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    (home / "messages.jsonl").write_text(json.dumps({"messages": said}))
    with (home / "captions.csv").open("w", newline="") as table:
        csv.writer(table).writerows([["image", "caption"], ["cats/1.jpg", "A cat."]])
    columns = {"image": [{"bytes": jpeg(1), "path": None}], "query": ["What?"], "label": ["A cat."]}
    pq.write_table(pa.table(columns).rename_columns(["image", "question", "answer"]), home / "data.parquet")
    (home / "saved/train").mkdir(parents=True)
    with pa.ipc.new_stream(home / "saved/train/data.arrow", pa.table(columns).schema) as stream:
        stream.write_table(pa.table(columns))
    for name, stem in (("downloaded", "{}"), ("public", "{}"), ("dotted", "img_v1.5_{}")):
        members = [
            (f"{stem.format(n)}.{kind}", {"jpg": jpeg(n), "txt": b"A cat."}[kind])
            for n in range(3)
            for kind in ("jpg", "txt")
        ]
        (home / name).mkdir()
        (home / name / "00000.tar").write_bytes(tar_bytes(members))
    save_tiny(home / "student")
    return home


def test_every_command_runs_in_the_order_of_the_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(COMMANDS) > 12
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "betakd"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{command}\n{done.output}"
        if "--model" in command:
            assert "learned: 'Cat " in done.stdout
        if arguments[0] == "inspect":
            assert "bad" not in done.stdout
            assert "text only" not in done.stdout


def test_the_example_of_a_record_and_of_a_spec_are_valid():
    (record,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)
    assert json.loads(record)["image"]
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    DataSpec.model_validate(yaml.safe_load(shown)["data"])


def test_every_field_that_the_page_names_is_one_of_the_spec():
    named = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGE.partition("## In the spec")[2], re.M)
    assert len(named) > 4
    assert {name for pair in named for name in pair if name} <= DataSpec.model_fields.keys()
