"""Sources of `betakd pack`: each format becomes the same samples, all that is bad is named, and nothing is lost."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.data.formats import FORMATS
from betakd_ray.data.manifest import find_shards
from betakd_ray.data.pack import pack_from_spec
from betakd_ray.data.shards import read_shard
from betakd_ray.errors import DataError
from betakd_ray.spec import PackSpec, StorageSpec
from betakd_ray.spec.tasks import SOURCE_FORMATS
from tests.tars import tar_bytes

STORAGE = StorageSpec()


def png(number=0, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (40 * number % 256, 9, 9)).save(buffer, kind, **options)
    return buffer.getvalue()


def turns(number):
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Dot {number}."}]


def packed(source, folder, **options):
    spec = PackSpec.model_validate({"conversations": str(source), "output": str(folder / "out"), **options})
    shards = pack_from_spec(spec)
    assert shards == find_shards([f"{folder}/out"], STORAGE)
    return {sample.id: sample for shard in shards for sample in read_shard(shard, STORAGE)}


def answers(samples):
    return sorted(sample.conversation[-1]["value"] for sample in samples.values())


DOTS = [f"Dot {number}." for number in range(3)]


def as_json(folder):
    return json.dumps([{"image": f"{n}.png", "conversations": turns(n)} for n in range(3)]).encode(), "a.json"


def as_lines(folder):
    rows = [{"id": None, "image": f"{n}.png", "conversations": turns(n)} for n in range(3)]
    return b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\r\n", "a.jsonl"


def as_object(folder):
    rows = [{"image": f"{n}.png", "question": "What?", "answer": f"Dot {n}."} for n in range(3)]
    return json.dumps({"info": {}, "data": rows}, indent=1).encode(), "a.json"


def as_csv(folder):
    out = io.StringIO()
    rows = [["path", "question", "answer"], *([f"{n}.png", "What,\nplease?", f"Dot {n}."] for n in range(3))]
    csv.writer(out).writerows(rows)
    return out.getvalue().encode(), "a.csv"


def as_bare_tsv(folder):
    return "".join(f"{n}.png\tWhat?\tDot {n}.\n" for n in range(3)).encode(), "a.tsv"


def as_parquet(folder):
    images = [[{"bytes": png(n), "path": None}] for n in range(3)]
    messages = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"Dot {n}."}] for n in range(3)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"images": images, "messages": messages}), buffer)
    return buffer.getvalue(), "a.parquet"


def as_shard(folder):
    members = []
    for n in range(3):
        meta = json.dumps({"caption": f"Dot {n}.", "url": "http://h/x.jpg", "key": f"{n:09d}", "status": "success"})
        members += [(f"{n:09d}.jpg", png(n, "JPEG")), (f"{n:09d}.json", meta.encode()), (f"{n:09d}.txt", b"other")]
    return tar_bytes(members), "00000.tar"


def as_dotted_shard(folder):
    """All json first, with dots in the names: neither readers nor webdataset would find one sample."""
    records = [(f"img_v1.5_{n}.json", json.dumps({"conversations": turns(n)}).encode()) for n in range(3)]
    return tar_bytes([*records, *((f"img_v1.5_{n}.png", png(n)) for n in range(3))]), "a.tar"


def as_energon(folder):
    members = [
        m for n in range(3) for m in ((f"{n}.jpg", png(n, "JPEG")), (f"{n}.json", json.dumps(turns(n)).encode()))
    ]
    return tar_bytes(members), "a.tar"


@pytest.mark.parametrize(
    "written",
    [as_json, as_lines, as_object, as_csv, as_bare_tsv, as_parquet, as_shard, as_dotted_shard, as_energon],
)
def test_each_format_becomes_the_same_samples(tmp_path, written):
    content, name = written(tmp_path)
    (tmp_path / name).write_bytes(content)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    samples = packed(tmp_path / name, tmp_path, images=str(tmp_path))
    assert answers(samples) == DOTS
    assert all(len(sample.images) == 1 for sample in samples.values())
    assert len(samples) == 3  # each has an id of its own


def test_a_data_set_that_the_library_of_hugging_face_saved_is_read(tmp_path):
    table = pa.table(
        {"image": [{"bytes": png(n), "path": "x"} for n in range(3)], "query": ["What?"] * 3, "label": DOTS}
    )
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        with pa.ipc.new_stream(tmp_path / "set" / split / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        (tmp_path / "set" / split / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"has the splits train, test. Name one: .*set/train"):
        packed(tmp_path / "set", tmp_path)
    samples = packed(tmp_path / "set/train", tmp_path, map={"question": "query", "answer": "label"})
    assert answers(samples) == DOTS


def test_a_folder_of_parquet_files_is_read_and_one_of_several_splits_refused(tmp_path):
    content, _ = as_parquet(tmp_path)
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/data/train-00000-of-00001.parquet").write_bytes(content)
    assert answers(packed(tmp_path / "set", tmp_path)) == DOTS
    (tmp_path / "set/data/test-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        packed(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar", "a.csv"])
def test_a_damaged_source_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe nonsense")
    with pytest.raises(DataError, match=name):
        packed(tmp_path / name, tmp_path)


def test_a_source_of_no_known_format_says_which_are(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("a.xlsx", "empty"):
        with pytest.raises(DataError, match=r"format is not known.*\.parquet.*--format json"):
            packed(tmp_path / name, tmp_path)


def test_the_spec_and_the_table_have_the_same_formats():
    assert set(SOURCE_FORMATS) == FORMATS.keys()


# ---------------------------------------------------------------------------------- what is bad


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def six(folder, missing=(0, 2, 4)):
    (folder / "img").mkdir()
    for number in range(6):
        if number not in missing:
            (folder / f"img/{number}.png").write_bytes(png(number))
    rows = [{"id": f"s{n}", "image": f"{n}.png", "conversations": turns(n)} for n in range(6)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json", folder / "img"


def test_all_that_is_bad_is_named_at_once_and_the_former_shards_stay(tmp_path):
    source, images = six(tmp_path, missing=())
    assert run("pack", source, "--images", images, "--out", tmp_path / "out").exit_code == 0
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    for number in (0, 2):
        (images / f"{number}.png").unlink()
    (images / "4.png").write_bytes(b"<html>404</html>")
    done = run("pack", source, "--images", images, "--out", tmp_path / "out")
    assert done.exit_code == 2
    for said in ("3 of 6 samples", "entry 1", "img/0.png", "img/2.png", "entry 5", "cannot be read as an image"):
        assert said in done.stderr
    assert "--keep-going" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_the_good_ones_are_packed_if_the_user_says_so(tmp_path):
    source, images = six(tmp_path)
    done = run("pack", source, "--images", images, "--out", tmp_path / "out", "--keep-going")
    assert done.exit_code == 0
    assert "3 samples in 1 shards" in done.stdout
    assert "3 good, 3 bad" in done.stderr
    assert "img/4.png" in done.stderr


def test_nothing_good_is_an_error_also_then(tmp_path):
    source, images = six(tmp_path, missing=range(6))
    assert run("pack", source, "--images", images, "--out", tmp_path / "out", "--keep-going").exit_code == 2
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_animation_is_refused(tmp_path):
    (tmp_path / "a.gif").write_bytes(png(0, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")]))
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.gif", "conversations": turns(0)}]))
    with pytest.raises(DataError, match="2 frames, and only still images"):
        packed(tmp_path / "a.json", tmp_path, images=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.json"], "give --out FOLDER"),
        ([], "name the data to pack"),
        (["a.json", "--out", "o", "--map", "question"], "--map: 'question' is not FIELD=KEY"),
        (["a.json", "--out", "o", "--map", "questoin=q"], "map"),
        (["a.json", "--out", "o", "--format", "xml"], "format"),
        (["a.json", "--out", "o", "--strict", "--keep-going"], "opposites"),
        (["DIR", "--out", "o", "--from", "nothing"], "no data set 'nothing'"),
        (["nowhere.json", "--out", "o"], "nowhere.json"),
    ],
)
def test_wrong_flags_of_pack_are_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = run("pack", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "pydantic" not in done.stderr
