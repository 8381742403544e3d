"""Parquet files, as the Hugging Face hub keeps its corpora (`wikimedia/wikipedia`: columns id, url, title, text)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"PAR1"
BATCH_ROWS = 256


def read_parquet(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """Yields (text, bytes of the file up to its row group) for each row: one row group, one column at a time.

    Raises:
        XdscaleError: not a whole parquet file, no such column, a column that is not text, a row without text.
    """
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, text_field)
            row = 0
            for group in range(file.num_row_groups):
                read = size * (group + 1) // file.num_row_groups
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_field], use_threads=False)
                for batch in batches:
                    for text in batch.column(0).to_pylist():
                        if text is None:
                            raise XdscaleError(f"{path}: row {row}: {text_field!r} is null, expected a string")
                        yield text, read
                        row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise XdscaleError(f"{path}: not a whole parquet file: {error}; copy or download it again") from None


def _check_column(path: Path, schema: "pyarrow.Schema", text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise XdscaleError(
            f"{path}: no column {text_field!r} (found: {', '.join(schema.names)}); name the right one with --text-field"
        )
    kind = schema.field(text_field).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise XdscaleError(f"{path}: column {text_field!r} is {kind}, expected strings")
