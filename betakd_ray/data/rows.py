"""Rows of the stream → one micro-batch, as numpy arrays.

Everything that can be known on the CPU is made here (which positions are answer rows, which sample each belongs to), so
that the device never has to be asked for a shape. Arrays travel to the teacher as they are, without a copy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from betakd_ray.batch.images import Images
from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.data.ledger import SampleIds


@dataclass(frozen=True)
class Batch:
    """A micro-batch: what the student sees, what the teacher sees (the same object if they see alike), and its ids."""

    student: ModelInputs
    teacher: ModelInputs
    ids: SampleIds
    keys: list[str]
    """What the samples are called in their shards."""
    signals: list[bytes] | None = None
    """What the teacher is known to say of each sample, serialised; None unless it is known of all."""


def collate(rows: pa.Table, pad_token_id: int, image_token_id: dict[str, int]) -> Batch:
    """One micro-batch from rows of the stream (see `to_arrow`).

    `image_token_id` has an entry for "student", and one for "teacher" where the teacher's view differs.
    """
    views = {view: stack(_renderings(rows, view), pad_token_id, token) for view, token in image_token_id.items()}
    ids = SampleIds(*(rows.column(name).to_numpy().astype(np.int32) for name in ("epoch", "shard", "index")))
    signals = rows.column("signal")
    known = signals.to_pylist() if signals.null_count == 0 else None
    keys = rows.column("key").to_pylist()
    return Batch(views["student"], views.get("teacher", views["student"]), ids, keys, known)


ARRAY = pa.struct(
    [("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("bytes", pa.large_binary())]
)


def to_arrow(renderings: dict[str, list[Rendering]]) -> dict[str, pa.Array]:
    """Columns of a block for each view; the arrays of a sample's images as they are."""
    columns: dict[str, pa.Array] = {}
    for view, samples in renderings.items():
        columns[f"{view}_input_ids"] = pa.array([sample.input_ids for sample in samples], pa.list_(pa.int32()))
        columns[f"{view}_answer_mask"] = pa.array(
            [sample.answer_mask.view(np.uint8) for sample in samples], pa.list_(pa.uint8())
        )
        columns[f"{view}_images"] = pa.array([_stored(sample.images) for sample in samples], pa.large_list(ARRAY))
    return columns


def _stored(images: Images) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": array.dtype.str, "shape": array.shape, "bytes": array.tobytes()}
        for name, array in images.items()
    ]


def _renderings(rows: pa.Table, view: str) -> list[Rendering]:
    columns = [rows.column(f"{view}_{name}").combine_chunks() for name in ("input_ids", "answer_mask", "images")]
    return [
        Rendering(
            input_ids=input_ids.values.to_numpy(),
            answer_mask=answer_mask.values.to_numpy().astype(bool),
            images=dict(map(_array, images)),
        )
        for input_ids, answer_mask, images in zip(*columns, strict=True)
    ]


def _array(stored: pa.StructScalar) -> tuple[str, np.ndarray]:
    name, dtype, shape = (stored[field].as_py() for field in ("name", "dtype", "shape"))
    return name, np.frombuffer(stored["bytes"].as_buffer(), dtype).reshape(shape)
