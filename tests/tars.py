"""Shards for tests, whole or damaged."""

import io
import json
import random
import tarfile

from betakd_ray.data.manifest import index_shards
from betakd_ray.spec import StorageSpec

STORAGE = StorageSpec()
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
JPG = b"\xff\xd8\xff not decoded here"


def record(**fields):
    return json.dumps({"id": "q1", "conversations": TURNS, **fields}).encode()


def good(key="a"):
    return [(f"{key}.json", record()), (f"{key}.jpg", JPG)]


def tar_bytes(members, mode="w", tar_format=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tar_format) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def written(folder, content, name="train-0.tar", manifest=True):
    """Write a shard into the folder; return its manifest entry, which describes the bytes before any damage."""
    (folder / name).write_bytes(content)
    return index_shards([str(folder / name)], STORAGE)[0] if manifest else None


def whole_shard(folder, samples=6):
    members = [member for number in range(samples) for member in good(f"{number:03d}")]
    return written(folder, tar_bytes(members)), folder / "train-0.tar"


def flip(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def headers(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar]


def zeroed(content, at):
    return content[:at] + bytes(512) + content[at + 512 :]


DAMAGE = {
    "cut within a member": lambda c: c[: headers(c)[4] + 600],
    "cut at a header": lambda c: c[: headers(c)[4]],
    "cut before the end mark": lambda c: c.rstrip(b"\0") + b"\0",
    "zeroed first header": lambda c: zeroed(c, 0),
    "zeroed header": lambda c: zeroed(c, headers(c)[4]),
    "zeroed last header": lambda c: zeroed(c, headers(c)[-1]),
    "garbage header": lambda c: c[: headers(c)[4]] + b"\xa5" * 512 + c[headers(c)[4] + 512 :],
    "garbage": lambda c: random.Random(0).randbytes(len(c)),
    "a web page": lambda c: b"<html>503</html>",
    "empty file": lambda c: b"",
    "nothing but zeros": lambda c: bytes(len(c)),
    "a second archive behind": lambda c: c + c,
    "compressed and cut": lambda c: b"\x1f\x8b" + c[2:],
}
