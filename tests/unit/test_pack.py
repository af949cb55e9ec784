import errno
import io
import itertools
import json
import os

import fsspec
import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from PIL import Image

from betakd_ray.data import manifest
from betakd_ray.data import pack as module
from betakd_ray.data.files import ChecksumStream, new_file
from betakd_ray.data.manifest import find_shards, index_shards
from betakd_ray.data.pack import llava_samples, pack, pack_from_spec
from betakd_ray.data.shards import read_shard
from betakd_ray.errors import DataError, OutputError
from betakd_ray.spec import PackSpec, StorageSpec
from tests.s3 import served

STORAGE = StorageSpec()
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Ein Würfel."}]


def encoded(kind, mode="RGB", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new(mode, size, 0).save(buffer, kind)
    return buffer.getvalue()


PNG = encoded("PNG")


def samples(count, **fields):
    return [{"id": f"q{number}", "conversations": TURNS, "images": [PNG], **fields} for number in range(count)]


def contents(shards, storage=STORAGE):
    return [sample for shard in shards for sample in read_shard(shard, storage)]


def test_what_is_packed_is_found_and_read_back(tmp_path):
    shards = pack(samples(7, type="open"), str(tmp_path / "new"), samples_per_shard=3)
    assert [(os.path.basename(s.url), s.samples) for s in shards] == [
        ("train-000000.tar", 3),
        ("train-000001.tar", 3),
        ("train-000002.tar", 1),
    ]
    assert find_shards([f"{tmp_path}/new/train-{{000000..000002}}.tar"], STORAGE) == shards
    read = contents(shards)
    assert [sample.id for sample in read] == [f"q{number}" for number in range(7)]
    assert [sample.key for sample in read] == [f"{number:09d}" for number in range(7)]
    assert all((s.conversation, s.images, s.extra) == (TURNS, [PNG], {"type": "open"}) for s in read)


def test_shards_are_written_to_any_url():
    shards = pack(samples(2), "memory://packed")
    assert find_shards(["memory://packed/*.tar"], STORAGE) == shards
    assert len(contents(shards)) == 2


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    (shard,) = pack(samples(2), str(tmp_path))
    read = list(webdataset.WebDataset(shard.url, shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in read] == ["q0", "q1"]
    assert [sample["png"] for sample in read] == [PNG, PNG]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first, second = (pack(samples(5), str(tmp_path / name), samples_per_shard=2) for name in ("a", "b"))
    assert [shard.checksum for shard in first] == [shard.checksum for shard in second]
    assert (tmp_path / "a/manifest.jsonl").read_text() == (tmp_path / "b/manifest.jsonl").read_text()


def test_prefixes_share_a_folder_and_its_manifest(tmp_path):
    train, test = pack(samples(2), str(tmp_path)), pack(samples(1), str(tmp_path), prefix="test")
    assert find_shards([f"{tmp_path}/*.tar"], STORAGE) == test + train


def test_packing_a_prefix_again_leaves_nothing_of_what_it_held(tmp_path):
    pack(samples(5), str(tmp_path), samples_per_shard=1)
    other = pack(samples(1), str(tmp_path), prefix="train-b")
    again = pack(samples(2), str(tmp_path), samples_per_shard=1)
    assert find_shards([f"{tmp_path}/*.tar"], STORAGE) == again + other


# ----------------------------------------------------------------------------------- what a packing replaces


def names(folder):
    return sorted(os.listdir(folder))


def ids(pattern, storage=STORAGE):
    return [sample.id for sample in contents(find_shards([str(pattern)], storage), storage)]


OLD, NEW = [f"q{number}" for number in range(5)], [f"q{number}" for number in range(4)]


def broken(error, count=3):
    yield from samples(count)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("entry 4"), OSError(errno.EIO, "of the source")])
def test_a_packing_that_fails_leaves_the_folder_as_it_was(tmp_path, error):
    new, packed = tmp_path / "new", tmp_path / "packed"
    new.mkdir()
    pack(samples(5), str(packed), samples_per_shard=2)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    for folder in (new, packed):
        with pytest.raises(type(error)):
            pack(broken(error), str(folder), samples_per_shard=2)
    assert names(new) == []
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


def die_at(change):
    """Let this process end at its change of the disk with that number, in the middle of it if it is a write."""
    left = itertools.count(change, -1)

    def dying(real, half):
        def call(*arguments, **options):
            if next(left) == 0:
                half(real, *arguments)
                os._exit(9)
            return real(*arguments, **options)

        return call

    for name in ("replace", "remove", "unlink", "fsync"):
        setattr(os, name, dying(getattr(os, name), lambda *_: None))
    ChecksumStream.write = dying(ChecksumStream.write, lambda real, stream, data: real(stream, data[: len(data) // 2]))
    LocalFileSystem.pipe_file = dying(
        LocalFileSystem.pipe_file, lambda real, *arguments: real(*arguments[:2], arguments[2][: len(arguments[2]) // 2])
    )


def killed(at, *arguments, **options):
    """Return whether a call of `pack` in another process was killed at that change."""
    child = os.fork()
    if child == 0:
        try:
            die_at(at)
            pack(*arguments, **options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_packing_that_is_killed_at_any_point_leaves_the_old_data_or_the_new(tmp_path):
    seen = []
    for at in itertools.count():
        folder = tmp_path / str(at)
        pack(samples(1), str(folder), prefix="test")
        pack(samples(5), str(folder), samples_per_shard=2)
        (folder / "train-000099.tar").write_bytes(b"somebody's own, not indexed")
        died = killed(at, samples(4), str(folder), samples_per_shard=1)
        seen.append(ids(folder / "train-00000[0-9]*.tar"))
        assert seen[-1] in (OLD, NEW)
        assert ids(folder / "te*") == ["q0"]
        pack(samples(3), str(folder), samples_per_shard=2)
        left = find_shards([f"{folder}/train-00000[0-9]*.tar"], STORAGE)
        assert [sample.id for sample in contents(left)] == NEW[:3]
        known = {os.path.basename(shard.url) for shard in left} | {"train-000099.tar", "test-000000.tar"}
        assert {name for name in names(folder) if not name.startswith("manifest.jsonl")} == known
        if not died:
            break
    assert seen == sorted(seen, reverse=True)
    assert seen.count(OLD) > 20
    assert seen.count(NEW) > 4  # while the old shards are removed


def test_a_first_packing_that_is_killed_leaves_nothing_that_passes_for_data_or_that_is_indexed(tmp_path):
    for at in itertools.count():
        folder = tmp_path / str(at)
        died = killed(at, samples(4), str(folder), samples_per_shard=1)
        if not died:
            break
        for find in (find_shards, index_shards):
            try:
                found = find([f"{folder}/*.tar"], STORAGE)
            except DataError:
                continue
            assert [sample.id for sample in contents(found)] == NEW
    assert at > 20


def test_a_reader_sees_the_old_data_whole_until_a_packing_ends(tmp_path):
    pack(samples(5), str(tmp_path), samples_per_shard=2)
    seen = []

    def watched():
        for sample in samples(4):
            seen.append((ids(tmp_path / "*.tar"), ids(tmp_path / "*")))
            yield sample

    pack(watched(), str(tmp_path), samples_per_shard=1)
    assert seen == [(OLD, OLD)] * 4
    assert ids(tmp_path / "*") == NEW


@pytest.mark.parametrize("count", [0, 5])
def test_a_reader_that_lists_before_a_packing_ends_and_reads_the_manifest_after_it_sees_the_new_data(
    tmp_path, monkeypatch, count
):
    if count:
        pack(samples(count), str(tmp_path), samples_per_shard=2)
    listed, real = [], manifest._glob

    def watched():
        yield from samples(3)
        listed.append(real(f"{tmp_path}/*.tar", STORAGE))
        yield samples(4)[3]

    pack(watched(), str(tmp_path), samples_per_shard=1)
    monkeypatch.setattr(manifest, "_glob", lambda *arguments: listed.pop() if listed else real(*arguments))
    assert ids(tmp_path / "*.tar") == NEW


def test_a_shard_that_the_manifest_lists_but_that_is_gone_is_an_error(tmp_path):
    shards = pack(samples(5), str(tmp_path), samples_per_shard=2)
    os.remove(shards[1].url)
    with pytest.raises(DataError, match=r"train-000001\.tar: manifest\.jsonl lists it, but it is not there \(1 such"):
        find_shards([f"{tmp_path}/train-*.tar"], STORAGE)
    assert find_shards([f"{tmp_path}/train-*2.tar", shards[0].url], STORAGE) == [shards[0], shards[2]]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_data_and_is_named(tmp_path, monkeypatch, call):
    pack(samples(5), str(tmp_path), samples_per_shard=2)
    before = names(tmp_path)
    calls = itertools.count()
    holder, name = {"write": (LocalFileOpener, "write"), "fsync": (os, "fsync")}[call]
    real = getattr(holder, name)

    def fill(file, *arguments):
        path = file.path if call == "write" else os.readlink(f"/proc/self/fd/{file}")
        if "train-" in path and next(calls) in range(1, 4):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, *arguments)

    monkeypatch.setattr(holder, name, fill)
    with pytest.raises(OutputError, match=rf"disk is full: free some space in {tmp_path}"):
        pack(samples(9), str(tmp_path), samples_per_shard=2)
    assert next(calls) > 1
    assert names(tmp_path) == before
    assert ids(tmp_path / "*.tar") == OLD


def test_an_object_store_gets_no_cut_shard():
    with served() as s3:
        storage = StorageSpec(endpoint_url=s3.endpoint_url, region="us-east-1")
        folder = f"s3://{s3.bucket}/packed"
        pack(samples(5), folder, samples_per_shard=2, storage=storage)
        before = s3.filesystem().find(f"{s3.bucket}/packed")
        with pytest.raises(DataError, match="entry 4"):
            pack(broken(DataError("entry 4")), folder, samples_per_shard=2, storage=storage)
        with pytest.raises(TypeError), new_file(f"{folder}/cut", storage) as stream:
            list(map(stream.write, [bytes(20 << 20), None]))  # more than one part, and an error
        assert s3.filesystem().find(f"{s3.bucket}/packed") == before
        assert ids(f"{folder}/*.tar", storage) == OLD
        pack(samples(4), folder, samples_per_shard=1, storage=storage)
        assert ids(f"{folder}/*.tar", storage) == NEW


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_common_images_are_stored_as_they_are(tmp_path, kind):
    content = encoded(kind)
    path = tmp_path / "misnamed.bin"
    path.write_bytes(content)
    shards = pack([{"id": "a", "conversations": TURNS, "images": [path]}], str(tmp_path))
    assert contents(shards)[0].images == [content]


@pytest.mark.parametrize(("kind", "mode"), [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "CMYK")])
def test_other_images_become_png(tmp_path, kind, mode):
    shards = pack([{"id": "a", "conversations": TURNS, "images": [encoded(kind, mode)]}], str(tmp_path))
    (image,) = contents(shards)[0].images
    assert (Image.open(io.BytesIO(image)).format, Image.open(io.BytesIO(image)).size) == ("PNG", (8, 6))


def test_several_images_keep_their_order(tmp_path):
    images = [encoded("PNG", size=(number + 1, 1)) for number in range(11)]
    turns = [{"from": "human", "value": "<image>" * 11}, TURNS[1]]
    shards = pack([{"id": "a", "conversations": turns, "images": images}], str(tmp_path))
    assert contents(shards)[0].images == images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": ""}, ["sample 0", "no id"]),
        ({"conversations": TURNS[:1]}, ["'q0'", "no answer"]),
        ({"images": []}, ["'q0'", "1 <image> placeholders, but 0 images"]),
        ({"images": [b"no image"]}, ["'q0'", "8 bytes", "cannot be read as an image"]),
        ({"images": ["/nowhere/x.jpg"]}, ["/nowhere/x.jpg"]),
        ({"score": object()}, ["'q0'", "serializable"]),
    ],
)
def test_a_sample_nobody_could_train_on_stops_the_packing(tmp_path, changes, words):
    with pytest.raises(DataError) as caught:
        pack([samples(1)[0] | changes], str(tmp_path))
    for word in words:
        assert word in str(caught.value)


def test_no_samples_and_an_unsafe_prefix_are_errors(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        pack([], str(tmp_path))
    for prefix in ("../x", "a.b", ""):
        with pytest.raises(DataError, match="prefix"):
            pack(samples(1), str(tmp_path), prefix=prefix)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file/"):
        pack(samples(1), str(tmp_path / "file"))


# --------------------------------------------------------------------------------------------------- LLaVA


def llava(folder, entries, lines=False):
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.png").write_bytes(PNG)
    text = "\n".join(map(json.dumps, entries)) + "\n" if lines else json.dumps(entries)
    (folder / "data.json").write_text(text)
    return str(folder / "data.json"), str(folder / "images")


def entry(number=0, **changes):
    return {"id": number, "image": "a.png", "conversations": TURNS, "model": "x", **changes}


@pytest.mark.parametrize("lines", [False, True])
def test_a_llava_file_is_a_list_or_lines(tmp_path, lines):
    location, images = llava(tmp_path, [entry(), entry(1, image=["a.png"])], lines)
    read = list(llava_samples(location, images, STORAGE))
    assert read == [{"id": str(n), "conversations": TURNS, "model": "x", "images": [PNG]} for n in range(2)]


def test_llava_entries_may_have_no_image(tmp_path):
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    location, _ = llava(tmp_path, [{"id": "a", "conversations": turns}])
    assert next(llava_samples(location, None, STORAGE))["images"] == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], ["expected an object with a conversation, found []"]),
        (entry(conversations=TURNS[:1]), ["no answer"]),
        (entry(conversations=None), ["conversations"]),
        (entry(image=3), ["an image is 3"]),
        (entry(image="b.png"), ["b.png", "FileNotFoundError"]),
        (entry(image="../a.png"), ["is outside the folder"]),
        (entry(image="/etc/passwd"), ["is outside the folder"]),
    ],
)
def test_a_bad_llava_entry_is_named_by_file_and_number(tmp_path, bad, words):
    location, images = llava(tmp_path, [entry(), bad])
    with pytest.raises(DataError) as caught:
        list(llava_samples(location, images, STORAGE))
    for word in ["data.json, entry 2", *words]:
        assert word in str(caught.value)


def test_images_without_their_folder_are_an_error(tmp_path):
    location, _ = llava(tmp_path, [entry()])
    with pytest.raises(DataError, match="give `images`"):
        list(llava_samples(location, None, STORAGE))


@pytest.mark.parametrize("text", ["[1,", '{"id": 1}\nnonsense', "\xff"])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "data.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"data\.json: is neither a JSON list nor JSON lines"):
        list(llava_samples(str(tmp_path / "data.json"), None, STORAGE))


def test_a_missing_llava_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json"):
        list(llava_samples(str(tmp_path / "nothing.json"), None, STORAGE))


def test_a_spec_shuffles_by_its_seed_and_names_entries_as_the_file_counts_them(tmp_path):
    location, images = llava(tmp_path, [entry(number) for number in range(20)])
    spec = PackSpec(conversations=location, images=images, output=str(tmp_path / "out"), samples_per_shard=8)

    def order(**changes):
        return [sample.id for sample in contents(pack_from_spec(spec.model_copy(update=changes)))]

    assert order() == order() != order(shuffle_seed=1)
    assert sorted(order(), key=int) == order(shuffle_seed=None) == [str(number) for number in range(20)]
    llava(tmp_path, [entry(number) for number in range(19)] + [entry(19, image="b.png")])
    with pytest.raises(DataError, match="entry 20"):
        pack_from_spec(spec)


def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    pack(samples(2), str(tmp_path), total=2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    pack(samples(2), str(tmp_path), total=2)
    assert "packing train" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _empty_memory_store():
    fsspec.filesystem("memory").store.clear()
