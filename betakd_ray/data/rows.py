"""Blocks of the stream: samples → Arrow columns, and back.

The size of a block does not depend on what the teacher's cache holds. Ray Data divides blocks by bytes, and may run a
read task again: then it must get the same blocks.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from betakd_ray.batch.images import Images
from betakd_ray.batch.sample import Rendering, Sample, Stored
from betakd_ray.errors import DataError

IDS = ("epoch", "shard", "index", "member")
STUDENT, TEACHER = "student", "teacher"
FILE_BYTES = 192
"""Limit in bytes of the name of a cache file. All names are padded to this length."""
NOT_STORED = -1
# Large binaries and lists: with offsets of 32 bits, the pixels of a block could have at most 2 GiB.
ARRAY = pa.struct(
    [("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("bytes", pa.large_binary())]
)


def block_of(samples: Sequence[Sample]) -> pa.Table:
    """Make a block of samples. The teacher's view is stored only if it is another object than the student's."""
    columns: dict[str, pa.Array] = {
        name: pa.array(np.array([getattr(sample, name) for sample in samples], np.int32)) for name in IDS
    }
    columns["key"] = pa.array([sample.key for sample in samples], pa.string())
    columns |= _places([sample.stored for sample in samples])
    columns |= _rendered(STUDENT, [sample.student for sample in samples])
    if any(sample.teacher is not sample.student for sample in samples):
        columns |= _rendered(TEACHER, [sample.teacher for sample in samples])
    return pa.table(columns)


def samples_of(block: pa.Table) -> list[Sample]:
    """Read the samples of a block.

    All arrays are copies. A view would keep the block in Ray's object store as long as its sample exists.
    """
    columns = {name: block.column(name).to_pylist() for name in (*IDS, "key")}
    student = _renderings(block, STUDENT)
    teacher = _renderings(block, TEACHER) if f"{TEACHER}_input_ids" in block.column_names else student
    stored = _stored(block)
    return [
        Sample(*ids, student=student[at], teacher=teacher[at], stored=stored[at])
        for at, ids in enumerate(zip(*columns.values(), strict=True))
    ]


# ------------------------------------------------------------------------------------- where the answer is kept


def _places(stored: Sequence[Stored | None]) -> dict[str, pa.Array]:
    """Return the columns of the places: fixed width, no nulls, so that their size is the same without a cache."""
    names = [one.file.encode() if one else b"" for one in stored]
    if too_long := [name for name in names if len(name) > FILE_BYTES]:
        raise DataError(
            f"teacher.cache: {too_long[0].decode()} has a name of {len(too_long[0])} bytes, but at most {FILE_BYTES} "
            "are allowed. Remove the file, or name another teacher.cache."
        )
    spans = np.array([one[1:] if one else (0, NOT_STORED) for one in stored], np.int64).reshape(-1, 2)
    return {
        "stored_file": pa.array([name.ljust(FILE_BYTES, b"\0") for name in names], pa.binary(FILE_BYTES)),
        "stored_offset": pa.array(spans[:, 0].copy()),
        "stored_length": pa.array(spans[:, 1].copy()),
    }


def _stored(block: pa.Table) -> list[Stored | None]:
    files, offsets, lengths = (block.column(f"stored_{name}").to_pylist() for name in ("file", "offset", "length"))
    return [
        None if length == NOT_STORED else Stored(file.rstrip(b"\0").decode(), offset, length)
        for file, offset, length in zip(files, offsets, lengths, strict=True)
    ]


# ------------------------------------------------------------------------------------------------- renderings


def _rendered(view: str, samples: Sequence[Rendering]) -> dict[str, pa.Array]:
    return {
        f"{view}_input_ids": _lists([sample.input_ids for sample in samples], np.int32),
        # As uint8: Arrow would pack booleans into bits, which numpy cannot use as an array.
        f"{view}_answer_mask": _lists([sample.answer_mask.view(np.uint8) for sample in samples], np.uint8),
        f"{view}_images": pa.array([_arrays(sample.images) for sample in samples], pa.large_list(ARRAY)),
    }


def _lists(rows: Sequence[np.ndarray], dtype: type) -> pa.ListArray:
    """Return the same as `pa.array(rows)`, but faster: that function converts each number separately."""
    ends = np.cumsum([len(row) for row in rows])
    values = np.concatenate(rows) if rows else np.zeros(0)
    return pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), values.astype(dtype, copy=False))


def _arrays(images: Images) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": array.dtype.str, "shape": array.shape, "bytes": array.tobytes()}
        for name, array in images.items()
    ]


def _renderings(block: pa.Table, view: str) -> list[Rendering]:
    columns = (block.column(f"{view}_{name}").combine_chunks() for name in ("input_ids", "answer_mask", "images"))
    return [
        Rendering(
            input_ids=input_ids.values.to_numpy().copy(),
            answer_mask=answer_mask.values.to_numpy().astype(bool),
            images=_images(images),
        )
        for input_ids, answer_mask, images in zip(*columns, strict=True)
    ]


def _images(stored: Iterable[pa.StructScalar]) -> Images:
    return dict(map(_array, stored))


def _array(stored: pa.StructScalar) -> tuple[str, np.ndarray]:
    name, dtype, shape = (stored[field].as_py() for field in ("name", "dtype", "shape"))
    return name, np.frombuffer(stored["bytes"].as_buffer(), dtype).reshape(shape).copy()
