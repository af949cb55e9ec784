"""What `betakd index` sees in shards that others have written, and where their manifests may lie."""

import functools
import http.server
import json
import os
import threading
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.data.manifest import find_shards, index_shards
from betakd_ray.data.samples import BadSample, RawSample
from betakd_ray.data.shards import read_shard
from betakd_ray.errors import DataError
from tests.tars import JPG, STORAGE, TURNS, good, record, tar_bytes


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shard(folder, members, name="a.tar"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar_bytes(members))
    return folder / name


def read(path):
    return list(read_shard(index_shards([str(path)], STORAGE)[0], STORAGE))


# ------------------------------------------------------------------------------- members and records

UNREAD = {
    "a video": [("a.mp4", b"x")],
    "one of two views": [("a.left.png", JPG), ("a.right.png", JPG)],
    "a mask beside its image": [("a.jpg", JPG), ("a.mask.png", JPG)],
    "a format that is not decoded": [("a.heic", b"x")],
    "a sound": [("a.wav", b"x")],
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_member_that_would_not_be_read_makes_the_sample_bad(tmp_path, case):
    (sample,) = read(shard(tmp_path, [("a.json", record()), *UNREAD[case]]))
    assert isinstance(sample, BadSample)
    assert f"'{UNREAD[case][-1][0]}'"[1:-1] in sample.reason


@pytest.mark.parametrize("name", ["gif", "bmp", "tif", "TIFF", "jfif", "0.jpg", "image.jpg", "img_0.png"])
def test_a_member_with_a_plain_meaning_is_read(tmp_path, name):
    (sample,) = read(shard(tmp_path, [("a.json", record()), (f"a.{name}", JPG)]))
    assert isinstance(sample, RawSample)
    assert sample.images == [JPG]


@pytest.mark.parametrize(
    "fields", [{"image": "a.jpg"}, {"images": ["a.jpg"]}, {"image_path": "x/a"}, {"file": "a.png"}]
)
def test_a_record_that_names_an_image_that_is_no_member_is_bad(tmp_path, fields):
    turns = [{"from": "human", "value": "What?"}, TURNS[1]]
    (sample,) = read(shard(tmp_path, [("a.json", record(conversations=turns, **fields))]))
    assert isinstance(sample, BadSample)
    assert f"the key {next(iter(fields))!r} names" in sample.reason


def test_a_record_that_names_the_image_beside_it_is_good(tmp_path):
    (sample,) = read(shard(tmp_path, [("a.json", record(image="coco/a.jpg")), ("a.jpg", JPG)]))
    assert isinstance(sample, RawSample)


@pytest.mark.parametrize("name", [None, ""])
def test_the_key_stands_for_an_id_that_is_null(tmp_path, name):
    (sample,) = read(shard(tmp_path, [("x/a.json", record(id=name)), ("x/a.jpg", JPG)]))
    assert sample.id == "x/a"


@pytest.mark.parametrize(
    "members",
    [
        [("a.json", json.dumps({"caption": "A dot."}).encode()), ("a.jpg", JPG)],
        [("a.txt", b"A dot.\n"), ("a.jpg", JPG)],
        [("a.json", b'{"url": "x", "status": "success"}'), ("a.txt", b"A dot."), ("a.jpg", JPG)],
        [("a.json", json.dumps([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dot."}]).encode()),
         ("a.jpg", JPG)],
    ],
    ids=["caption", "txt", "img2dataset", "energon"],
)  # fmt: skip
def test_captions_and_bare_turns_are_read_in_place(tmp_path, members):
    (sample,) = read(shard(tmp_path, members))
    assert sample.conversation == [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dot."}]


# ------------------------------------------------------------------------------------------ index


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([*((f"img_v1.5_{n}.json", record()) for n in range(3)), ("img_v1.5_0.png", JPG)], "dots before"),
        ([*((f"{n}.json", record()) for n in range(9)), *((f"{n}.jpg", JPG) for n in range(9))], "tar --sort=name"),
        ([("a.json", record()), ("a.jpg", b"<html>404</html>")], "is no image"),
        ([("a.json", record(video="a.mp4")), ("a.jpg", JPG)], "'video'"),
    ],
    ids=["dots", "apart", "a web page", "a video"],
)
def test_a_shard_of_bad_samples_is_not_indexed_and_says_why(tmp_path, members, said):
    path = shard(tmp_path, members)
    done = run("index", path)
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "manifest.jsonl").exists()
    assert run("index", path, "--keep-going").exit_code == 0
    assert (tmp_path / "manifest.jsonl").exists()


def test_a_few_bad_samples_are_named_and_stop_only_a_strict_index(tmp_path):
    members = [member for number in range(199) for member in good(f"{number:03d}")]
    path = shard(tmp_path, [*members, ("199.json", record()), ("199.cls", b"1")])
    strict = run("index", path, "--strict")
    assert (strict.exit_code, (tmp_path / "manifest.jsonl").exists()) == (2, False)
    done = run("index", path)
    assert (done.exit_code, done.stdout) == (0, "1 shards, 200 samples\n")
    assert "sample 199 (199): 1 <image> placeholders, but 0 images" in done.stderr


def test_members_that_are_not_read_are_counted(tmp_path):
    path = shard(tmp_path, [*good("a"), ("a.cls", b"1"), *good("b"), ("b.cls", b"1")])
    assert "2 × .cls" in run("index", path).stderr
    assert run("index", path, "--strict").exit_code == 2


# ------------------------------------------------------------------------------------------ finding


def test_links_folders_and_brackets_are_found(tmp_path):
    shard(tmp_path / "blobs", good(), "0a1b")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a[1].tar").symlink_to("../blobs/0a1b")
    found = [
        index_shards([str(tmp_path / name)], STORAGE) for name in ("links", "links/", "links/a[1].tar", "links/*.tar")
    ]
    assert [len(shards) for shards in found] == [1] * 4
    assert find_shards([f"{tmp_path}/links"], STORAGE) == found[0]
    (tmp_path / "links/b.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match="is a link to nowhere, which is not there"):
        find_shards([f"{tmp_path}/links/*.tar"], STORAGE)


def test_a_folder_with_a_test_set_is_not_trained_on_whole(tmp_path):
    for name in ("train-0.tar", "test-0.tar"):
        shard(tmp_path, good(), name)
    assert len(index_shards([str(tmp_path)], STORAGE)) == 2
    with pytest.raises(DataError, match=r"several sets \(test, train\). Name one of them: .*/train-\*\.tar"):
        find_shards([str(tmp_path)], STORAGE)
    (tmp_path / "outer/inner").mkdir(parents=True)
    with pytest.raises(DataError, match=r"without shards.*has the folders inner: name one"):
        find_shards([f"{tmp_path}/outer"], STORAGE)


def test_a_manifest_elsewhere_describes_a_folder_that_is_not_written(tmp_path):
    path, manifest = shard(tmp_path / "data", good()), tmp_path / "own/manifest.jsonl"
    done = run("index", path.parent, "--manifest", manifest)
    assert done.exit_code == 0
    assert "data.manifest" in done.stdout
    assert os.listdir(path.parent) == ["a.tar"]
    (found,) = find_shards([str(path)], STORAGE, str(manifest))
    assert len(list(read_shard(found, STORAGE))) == 1
    shard(tmp_path / "data", good("b"), "b.tar")
    assert run("index", tmp_path / "data/b.tar", "--manifest", manifest).exit_code == 0
    assert len(find_shards([f"{tmp_path}/data"], STORAGE, str(manifest))) == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="was cut or written again"):
        find_shards([str(path)], STORAGE, str(manifest))
    with pytest.raises(DataError, match="--manifest FILE"):
        find_shards([str(path)], STORAGE)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said):
        pass


class Unlisted(Quiet):
    def list_directory(self, path):
        self.send_error(403)


class Unsized(Unlisted):
    """Says no size, as servers do that compress or make what they send."""

    def send_header(self, name, value):
        if name.lower() != "content-length":
            super().send_header(name, value)


@contextmanager
def serving(handler, folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@pytest.mark.parametrize("handler", [Quiet, Unlisted, Unsized])
def test_shards_of_a_web_server_are_read_whole(tmp_path, handler):
    path = shard(tmp_path / "site", good())
    index_shards([str(path)], STORAGE)
    with serving(handler, tmp_path / "site") as url:
        (found,) = find_shards([f"{url}/{{a..a}}.tar"], STORAGE)
        assert len(list(read_shard(found, STORAGE))) == 1
        with pytest.raises(DataError, match=r"b\.tar: no such shard"):
            find_shards([f"{url}/b.tar"], STORAGE)
        (path.parent / "manifest.jsonl").unlink()
        assert run("index", f"{url}/a.tar").exit_code == 2
        assert run("index", f"{url}/a.tar", "--manifest", tmp_path / "own.jsonl").exit_code == 0
        (found,) = find_shards([f"{url}/a.tar"], STORAGE, str(tmp_path / "own.jsonl"))
        path.write_bytes(path.read_bytes()[:-600])
        with pytest.raises(DataError):
            list(read_shard(found, STORAGE))


def test_wrong_options_are_one_line(tmp_path):
    path = shard(tmp_path, good())
    secret = "http://u:p@h:1"
    for done in (run("index", path, "--endpoint-url", secret), run("inspect", path, "--endpoint-url", secret)):
        assert done.exit_code == 2
        assert "Traceback" not in done.stderr
        assert "u:p" not in done.stderr
