"""Rows of Arrow's record batches as records that JSON can hold."""

from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa


def plain_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch without their empty columns; dates and decimals become texts."""
    for number in range(batch.num_rows):
        (row,) = batch.slice(number, 1).to_pylist()
        yield {name: _plain(value) for name, value in row.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, date | time | timedelta | Decimal):  # a datetime is a date
        return str(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        # Structs of Arrow have every field, also those that a row does not use.
        return {name: _plain(each) for name, each in value.items() if each is not None}
    return value
