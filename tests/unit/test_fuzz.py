"""Bad input at random: whatever a shard, a manifest or a spec is made into, what comes of it is one of the outcomes of
docs/reliability.md. The seed of a mutation is its kind and number, so a failure names what to repeat.
"""

import copy
import gzip
import io
import json
import random
import re
import resource
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from betakd_ray.data.manifest import MANIFEST, read_manifest
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import BadSample
from betakd_ray.data.shards import Shard, ShardDamaged, read_shard, scan_shard
from betakd_ray.errors import DataError, SpecError
from betakd_ray.spec import DataSpec, EvaluationSpec, JobSpec, PackSpec, SweepSpec, load_spec
from tests.mutations import BYTES
from tests.tars import STORAGE, TURNS, record, tar_bytes
from tests.tiny import IDS, IMAGE, tiny_processor

JOBS = Path(__file__).parents[2] / "jobs"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
MEMORY_BYTES = 1 << 30
"""Limit in bytes of additional memory for all mutations of one kind together."""


@pytest.fixture(autouse=True)
def _bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken * 1024 < MEMORY_BYTES


# ---- bytes -------------------------------------------------------------------------------------------------------


def blocks_moved(content, rng):
    blocks = [content[at : at + 512] for at in range(0, len(content), 512)]
    at = rng.randrange(len(blocks))
    run = blocks[at : at + rng.randint(1, 4)]
    change = rng.choice(["delete", "double", "move", "zero"])
    if change != "double":
        del blocks[at : at + len(run)]
    if change in ("double", "move"):
        to = rng.randrange(len(blocks) + 1)
        blocks[to:to] = run
    if change == "zero":
        blocks[at:at] = [bytes(512)] * len(run)
    return b"".join(blocks)


# ---- shards ------------------------------------------------------------------------------------------------------

FIELDS = {"name": (0, 100), "size": (124, 12), "mtime": (136, 12), "type": (156, 1), "link": (157, 100),
          "magic": (257, 8), "prefix": (345, 155)}  # fmt: skip
VALUES = {
    "name": [b"", b"../up.json", b"/etc/a.json", b"000.json", b"a", b".json", b"\xff.json", b"b.pkl", b"d/"],
    "size": [b"", b"7" * 11, b"00000000001", b"00000000000", b"x", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12],
    "mtime": [b"", b"9" * 12, b"\xff" * 12],
    "type": [bytes([kind]) for kind in b"\x000123456789LKSDVMNXxgA\xff"],
    "link": [b"../up", b"000.json", b"\xff"],
    "magic": [b"", b"ustar  \0", b"ustar\x0000", b"\xff" * 8],
    "prefix": [b"..", b"/etc", b"x", b"\xff" * 155],
}
TOKENS = re.compile(rb'"[^"]*"|[\[\]{},:]|\\n|[a-z]+')
REPLACEMENTS = [b"", b"null", b"1", b"-1e999", b"NaN", b"[", b"{}", b"]", b'"', b'"gpt"', b'"human"', b'"<image>"',
                b'"\\ud800"', b'"\\u0000"', b"\xff", b"<image>", b"</s>", b"9" * 5000, b"[" * 2000]  # fmt: skip
PAX = [b"size=0", b"size=99999999999999999999", b"size=-1", b"path=../up.json", b"path=000.json", b"path=",
       b"GNU.sparse.size=1", b"GNU.sparse.map=0,x", b"GNU.sparse.major=1\n22 GNU.sparse.minor=0", b"hdrcharset=BINARY",
       b"mtime=x", b"uid=x"]  # fmt: skip


def encoded(kind, mode="RGB", size=(20, 12)):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def sample_members():
    """Return the members of six samples: images of several kinds, one sample with two, one with none."""
    images = [encoded("JPEG"), encoded("PNG"), encoded("WEBP"), encoded("PNG", "P"), encoded("GIF"), encoded("TIFF")]
    two = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No."}]
    text = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    return [
        ("000.json", record()), ("000.jpg", images[0]),
        ("001.json", record()), ("001.png", images[1]),
        ("002.json", record(conversations=[*TURNS, *text])), ("002.webp", images[2]),
        ("003.json", record(conversations=two)), ("003.0.png", images[3]), ("003.1.jpg", images[4]),
        ("004.json", record(conversations=text)),
        ("005.json", record(type="open")), ("005.jpg", images[5]),
    ]  # fmt: skip


MEMBERS = sample_members()
WHOLE = tar_bytes(MEMBERS)


def with_checksum(header):
    block = header[:148] + b" " * 8 + header[156:]
    return block[:148] + f"{sum(block):06o}\0 ".encode() + block[156:]


def header_at(rng):
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        return rng.choice(tar.getmembers()).offset


def header_field(_, rng):
    """Return a header with other values in one or two fields, and a checksum that fits them."""
    at = header_at(rng)
    header = bytearray(WHOLE[at : at + 512])
    for _ in range(rng.choice([1, 1, 2])):
        start, length = FIELDS[name := rng.choice(list(FIELDS))]
        value = rng.choice([*VALUES[name], rng.randbytes(length)])
        header[start : start + length] = value[:length].ljust(length, b"\0")
    return WHOLE[:at] + with_checksum(bytes(header)) + WHOLE[at + 512 :]


def extended_header(_, rng):
    """Return an additional header, which changes the name, the size or the holes of the next member."""
    at = header_at(rng)
    kind = rng.choice([b"x", b"x", b"g", b"X", b"L", b"K", b"S"])
    text = rng.choice(PAX)
    body = b"%d %s\n" % (len(text) + 4, text) if kind in b"xgX" else rng.choice(VALUES["name"])
    body = rng.choice([body, mutated_bytes(body, rng)])
    info = tarfile.TarInfo("more")
    info.size = rng.choice([len(body), len(body), len(body), 1 << 33])
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    return WHOLE[:at] + with_checksum(bytes(header)) + body.ljust(-(-len(body) // 512) * 512, b"\0") + WHOLE[at:]


def mutated_bytes(content, rng):
    return rng.choice(BYTES)(content, rng)


def member_content(_, rng):
    """Return a valid tar in which the bytes of one member are changed."""
    members = list(MEMBERS)
    at = rng.randrange(len(members))
    members[at] = (members[at][0], mutated_bytes(members[at][1], rng))
    return tar_bytes(members)


def json_tokens(_, rng):
    """Return a json member with other tokens in one or two places."""
    members = list(MEMBERS)
    at = rng.choice([number for number, (name, _) in enumerate(members) if name.endswith("json")])
    name, content = members[at]
    for _ in range(rng.choice([1, 1, 2])):
        if found := list(TOKENS.finditer(content)):
            token = rng.choice(found)
            content = content[: token.start()] + rng.choice(REPLACEMENTS) + content[token.end() :]
    members[at] = (name, content)
    return tar_bytes(members)


def members_moved(_, rng):
    """Return a tar with one to three changes: members doubled, dropped, moved or renamed."""
    members = list(MEMBERS)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, to = rng.randrange(len(members)), rng.randrange(len(members))
        change = rng.choice(["double", "drop", "move", "rename"])
        member = members[at] if change == "double" else members.pop(at)
        if change == "rename":
            members.insert(at, (rng.choice(["000.json", "000.jpg", "x.json", "000.5.jpg", "x", "x.pt"]), member[1]))
        elif change != "drop":
            members.insert(to, member)
    return tar_bytes(members)


ZIPPED = gzip.compress(WHOLE, mtime=0)


def zipped(_, rng):
    return rng.choice([mutated_bytes, blocks_moved])(ZIPPED, rng)


SHARD_MUTATIONS = {change.__name__: change for change in [
    *BYTES, blocks_moved, header_field, extended_header, member_content, json_tokens, members_moved, zipped,
]}  # fmt: skip
EACH, EACH_VOUCHED = 770, 300
each_mutation = pytest.mark.parametrize("kind", SHARD_MUTATIONS)


def mutations(kind, changes, content, count):
    """Yield (number, mutated content) for each mutation."""
    for number in range(count):
        yield number, changes[kind](content, random.Random(f"{kind} {number}"))


def read_until_error(shard):
    """Return the samples read, and the error that ended the reading, if any; any other exception fails the test."""
    samples, error = [], None
    try:
        for sample in read_shard(shard, STORAGE):
            samples.append(sample)
    except DataError as caught:
        error = caught
    return samples, error


@pytest.fixture(scope="module")
def renderer():
    return Renderer(tiny_processor(), DataSpec(train=("/x.tar",), max_length=64, max_image_pixels=1_000_000))


def require_trainable(renderer, sample):
    """Check that the sample is rendered, or refused with a reason."""
    rendering, reason = None, ""
    try:
        rendering = renderer.render(sample)
    except Unrenderable as error:
        reason = str(error)
    if rendering is None:
        assert reason
        return
    assert len(rendering.input_ids) == len(rendering.answer_mask) <= 64
    assert rendering.answer_mask.any()
    images = 0 if rendering.pixels is None else len(rendering.pixels)
    assert images == len(sample.images)
    assert (rendering.input_ids == IDS[IMAGE]).sum() == images * renderer.image_tokens[0]


def test_there_are_ten_thousand_mutations_of_a_shard():
    assert EACH * len(SHARD_MUTATIONS) >= 10_000


@each_mutation
def test_a_mutated_shard_gives_what_its_manifest_says_or_an_error(tmp_path, kind):
    path = tmp_path / "train-0.tar"
    path.write_bytes(WHOLE)
    entry = scan_shard(str(path), STORAGE)
    originals, error = read_until_error(entry)
    assert error is None
    assert len(originals) == entry.samples == 6
    for number, content in mutations(kind, SHARD_MUTATIONS, WHOLE, EACH):
        path.write_bytes(content)
        samples, error = read_until_error(entry)
        assert [sample.index for sample in samples] == list(range(len(samples))), number
        if content == WHOLE:
            assert samples == originals, number
        else:
            assert isinstance(error, ShardDamaged), number
            assert str(path) in str(error), number
            assert len(samples) <= 6, number


@each_mutation
def test_a_mutated_shard_that_its_manifest_vouches_for_gives_an_outcome_for_every_sample(tmp_path, renderer, kind):
    path = tmp_path / "train-0.tar"
    path.write_bytes(WHOLE)
    originals, _ = read_until_error(scan_shard(str(path), STORAGE))
    for number, content in mutations(kind, SHARD_MUTATIONS, WHOLE, EACH_VOUCHED):
        path.write_bytes(content)
        try:
            entry = scan_shard(str(path), STORAGE)
        except ShardDamaged:
            entry = Shard(str(path), 6, len(content), "no tar")
        samples, error = read_until_error(entry)
        assert [sample.index for sample in samples] == list(range(len(samples))), number
        assert isinstance(error, ShardDamaged) == (entry.checksum == "no tar"), number
        assert error or len(samples) == entry.samples, number
        if kind in ("member_content", "json_tokens"):
            assert len(samples) == 6, number
            assert sum(sample in originals for sample in samples) >= 5, number
        for sample in samples:
            if isinstance(sample, BadSample):
                assert sample.reason.encode(), number
            elif sample not in originals:
                require_trainable(renderer, sample)


# ---- manifests ---------------------------------------------------------------------------------------------------

ROWS = "".join(
    json.dumps({"shard": f"train-{n}.tar", "samples": 6, "bytes": 20480, "crc32": "0a1b2c3d"}) + "\n" for n in range(3)
).encode()


def row_tokens(content, rng):
    token = rng.choice(list(re.finditer(rb'"[^"]*"|\d+|[{},:\n]', content)))
    return content[: token.start()] + rng.choice([*REPLACEMENTS, b"1e999", b"0", b"-5"]) + content[token.end() :]


def test_a_mutated_manifest_is_read_or_refused_by_its_name(tmp_path):
    changes = {change.__name__: change for change in [*BYTES, row_tokens]}
    for kind in changes:
        for number, content in mutations(kind, changes, ROWS, 200):
            (tmp_path / MANIFEST).write_bytes(content)
            shards, said = {}, MANIFEST
            try:
                shards = read_manifest(str(tmp_path), STORAGE)
            except DataError as error:
                said = str(error)
            assert MANIFEST in said, (kind, number)
            assert all(1 <= shard.samples <= shard.bytes for shard in shards.values()), (kind, number)


@pytest.mark.parametrize(
    "change", [{"samples": 7}, {"samples": 0}, {"samples": 20481}, {"samples": 1e999}, {"bytes": -1}]
)
def test_a_count_that_cannot_be_or_contradicts_another_line_is_refused(tmp_path, change):
    row = json.loads(ROWS.splitlines()[0])
    (tmp_path / MANIFEST).write_bytes(ROWS + json.dumps(row).encode() + b"\n" + json.dumps(row | change).encode())
    with pytest.raises(DataError, match=r"manifest\.jsonl, line 5: .*Delete the manifest and run `betakd index`"):
        read_manifest(str(tmp_path), STORAGE)


# ---- specs -------------------------------------------------------------------------------------------------------

SCALARS = [None, True, False, 0, 1, -1, 2**70, 1e308, -0.5, "", " ", "x", "~nobody-here/x", "./" + "y" * 5000, "a\0b",
           "1e999", "nan", "é", "\U0001f600", "fkl", "auto", "2026-01-01", "s3://a:b@c/d"]  # fmt: skip
RAW = [".inf", "-.inf", ".nan", "9" * 5000, "1.0e+999", "2026-13-45", "!!int x", "!!float ''", "!!bool maybe",
       "!!binary '@@'", "!!binary aGk=", "!!timestamp x", "!!python/object/apply:os.getcwd []", "!!set {a, b}",
       "!!omap [a: 1]", "!!pairs [a: 1]", "!x y", "&a [*a]", "&a {b: *a}", "*nowhere", "[" * 3000, "{a: " * 3000,
       "'\\ud800'", '"\\ud800"', '"\\x00"', "? [a] : b", "{? {a: 1} : b}", "<<: 1", "{<<: [1]}", "0x_", "0b", "1:99:99",
       "=", "|\n  x", "{a: 1, a: 2}", "- -", "@", "`", "%", "\t"]  # fmt: skip
LAUGHS = "\n".join(
    [f"l0: &l0 {{a{n}: 1}}" if n == 0 else f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(12)]
)
MERGES = "\n".join(
    ["m0: &m0 {a: 1}", *(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}], b{n}: 1}}" for n in range(1, 12))]
)
YAML_CHARACTERS = "\0\t\n\r\x07\x85\ufeff\u2028 !\"#%&'()*+,-./0:;<=>?@[\\]^_`a{|}~é"


def spec_sources():
    """Return (kind of spec, YAML) of the shipped specs, and of one spec per kind that has every section."""
    for path in sorted(JOBS.rglob("*.yaml")):
        yield (SweepSpec if path.parent.name == "grids" else JobSpec), path.read_text()
    job = load_spec(JOBS / "easy_vqa/distill.yaml", ["teacher.cache=/c", "training.deepspeed={zero_optimization: {}}",
                    "objective.energies=[{kind: taid}, fd]", "objective.weighting=manual"])  # fmt: skip
    yield JobSpec, yaml.safe_dump(job.model_dump(mode="json"))
    yield EvaluationSpec, "name: e\ndata: {train: a.tar}\nmodels:\n  a: {path: org/a}\n  b: {path: org/b}\nlimit: 3\n"
    yield PackSpec, "conversations: a.json\nimages: images\noutput: out\nshuffle_seed: 1\nstorage: {region: eu}\n"


SOURCES = list(spec_sources())


def characters(text, rng):
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(["", rng.choice(YAML_CHARACTERS)]) + text[at + rng.randint(0, 1) :]
    return text


def lines(text, rng):
    rows = text.splitlines()
    at, to = rng.randrange(len(rows)), rng.randrange(len(rows))
    change = rng.choice(["delete", "double", "indent", "dedent", "move", "cut"])
    row = rows[at] if change == "double" else rows.pop(at)
    if change in ("double", "move"):
        rows.insert(to, row)
    elif change != "delete":
        rows.insert(at, {"indent": " " * rng.randint(1, 5) + row, "dedent": row[1:], "cut": row[: to % 40]}[change])
    return "\n".join(rows)


def raw_values(text, rng):
    """Return the text with a value, or an additional section, for which YAML has special syntax."""
    if rng.random() < 0.15:
        return f"{text}\n{rng.choice([LAUGHS, MERGES, *(f'more: {raw}' for raw in RAW)])}"
    value = rng.choice(list(re.finditer(r"(?<=: )[^,{}\[\]\n]+", text)))
    return text[: value.start()] + rng.choice(RAW) + text[value.end() :]


def nodes(tree):
    """Yield (container, key) of every value in the tree."""
    found = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in found:
        yield tree, key
        yield from nodes(value)


def values(text, rng):
    """Return the tree with one or two values of another type or size, or from another place."""
    tree = yaml.safe_load(text)
    for _ in range(rng.choice([1, 1, 2])):
        places = list(nodes(tree))
        node, key = rng.choice(places)
        other, at = rng.choice(places)
        elsewhere = copy.deepcopy(other[at])
        node[key] = rng.choice(
            [*SCALARS, [], {}, [[]], {"kind": "x"}, [node[key]], {"a": node[key]}, elsewhere, elsewhere, elsewhere,
             ["x"] * 500, {str(n): n for n in range(500)}]
        )  # fmt: skip
    return yaml.safe_dump(tree, allow_unicode=True, width=10**6)


def keys(text, rng):
    """Return the tree with a key dropped, added or renamed."""
    tree = yaml.safe_load(text)
    sections = [tree, *(node[key] for node, key in nodes(tree) if isinstance(node[key], dict) and node[key])]
    section = rng.choice(sections)
    key = rng.choice(list(section) or ["x"])
    change = rng.choice(["drop", "add", "rename"])
    value = section.get(key) if change == "add" else section.pop(key, None)
    if change != "drop":
        section[rng.choice([f"{key}s", "kind", "path", "x", 1, None, True, "a.b", "é", "k" * 3000])] = value
    return yaml.safe_dump(tree, allow_unicode=True)


SPEC_MUTATIONS = {change.__name__: change for change in [characters, lines, raw_values, values, keys]}
EACH_SPEC = 400


def require_spec_or_reason(path, kind, overrides=()):
    try:
        spec = load_spec(path, overrides, kind)
    except SpecError as error:
        message = str(error)
        # The file with a line, or the option that set the value; both have the same form in each line.
        begins = rf"({re.escape(str(path))}(:\d+)?: |override |--set )"
        assert all(re.match(begins, line) for line in message.splitlines()), message
        assert len(message.encode()) < 20_000
    else:
        assert kind.model_validate_json(spec.model_dump_json()) == spec


def test_there_are_two_thousand_mutations_of_a_spec():
    assert EACH_SPEC * len(SPEC_MUTATIONS) >= 2000


@pytest.mark.parametrize("kind", SPEC_MUTATIONS)
def test_a_mutated_spec_is_valid_or_refused_by_field_or_file(tmp_path, kind):
    path = tmp_path / "job.yaml"
    for number in range(EACH_SPEC):
        spec, text = SOURCES[number % len(SOURCES)]
        path.write_text(SPEC_MUTATIONS[kind](text, random.Random(f"{kind} {number}")))
        require_spec_or_reason(path, spec)


@pytest.mark.parametrize("change", BYTES)
def test_a_spec_of_mutated_bytes_is_valid_or_refused(tmp_path, change):
    path = tmp_path / "job.yaml"
    for number in range(50):
        spec, text = SOURCES[number % len(SOURCES)]
        path.write_bytes(change(text.encode(), random.Random(f"{number}")))
        require_spec_or_reason(path, spec)


def test_mutated_overrides_are_taken_or_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(SOURCES[0][1])
    fields = ["name", "training.workers", "data.train", "teacher.signal.k", "objective.energies", "output", "..", ""]
    for number in range(300):
        rng = random.Random(number)
        override = f"{rng.choice(fields)}={rng.choice([*RAW, *map(str, SCALARS)])}"
        require_spec_or_reason(path, JobSpec, [characters(override, rng) if rng.random() < 0.3 else override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {seed: 1}\ntraining: {seed: 2}", "'training' is given a second time at line 2, column 1"),
        ("optimizer: {lr: 1, lr: 2}", "'lr' is given a second time at line 1, column 20"),
        ("optimizer: {lr: .inf}", "'.inf' is not a valid float for a spec at line 1, column 17"),
        ('name: "\\ud800"', "is not a valid str for a spec at line 1"),
        ("1: x", "the key '1' is not a text: quote it at line 1, column 1"),
        ("a: &a [*a]", "aliases that expand to more than 10000 values at line 1, column 8"),
        (LAUGHS, "aliases that expand to more than 10000 values at line 5"),
        (MERGES, "aliases that expand to more than 10000 values at line 5"),
        ("[" * 100_000, "more than 50 nested levels at line 1, column 51"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("\xff".encode("latin-1"), "is not YAML: 'utf-8' codec"),
    ],
)
def test_yaml_that_is_ambiguous_or_no_json_is_refused_where_it_stands(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=re.escape(message)):
        load_spec(path)


def test_anchors_and_merges_are_read_and_an_override_changes_one_of_their_places(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: 2026-01-01\ndata: {train: a.tar}\nstudent: {init: {kind: checkpoint, <<: &it {path: org/a}}}\n"
        "teacher: *it\nobjective: {energies: fkl}\n"
    )
    spec = load_spec(path, ["teacher.path=org/b"])
    assert spec.name == "2026-01-01"
    assert (spec.student.init.path, spec.teacher.path) == ("org/a", "org/b")
