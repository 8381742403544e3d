"""Parquet files, as the Hugging Face hub keeps its corpora (`wikimedia/wikipedia`: columns id, url, title, text)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError
from xdscale.shards.sources.decoding import BadBytes

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"PAR1"
BATCH_ROWS = 256


def read_parquet(path: Path, text_field: str, bad: BadBytes) -> Iterator[tuple[str, int]]:
    """Yields (text, bytes of the file up to its row group) for each row: one row group, one column at a time.

    Raises:
        XdscaleError: not a whole parquet file, no such column or two of them, a column that is not text, a row without
            text or with bytes that are not UTF-8.
    """
    import pyarrow
    from pyarrow import parquet, types

    size = path.stat().st_size
    with path.open("rb") as raw:
        if raw.read(len(MAGIC)) != MAGIC:
            raise XdscaleError(
                f"{path}: not a whole parquet file: it does not begin with {MAGIC.decode()}; decompress it first if it "
                "is compressed as a whole, or copy or download it again"
            )
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, text_field)
            row = 0
            for group in range(file.num_row_groups):
                read = size * (group + 1) // file.num_row_groups
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_field], use_threads=False)
                for batch in batches:
                    column = batch.column(0)
                    if types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    for text in column.cast(pyarrow.large_binary()).to_pylist():
                        if text is None:
                            raise XdscaleError(
                                f"{path}: row {row}: {text_field!r} is null, expected a string (row 0 is the first); "
                                "leave such rows out first, for example with pandas' dropna"
                            )
                        yield bad.decoded(text, f"{path}: row {row}: {text_field!r}"), read
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise XdscaleError(f"{path}: not a whole parquet file: {error}; copy or download it again") from None


def _check_column(path: Path, schema: "pyarrow.Schema", text_field: str) -> None:
    from pyarrow import types

    count = schema.names.count(text_field)
    if not count:
        raise XdscaleError(
            f"{path}: no column {text_field!r} (found: {', '.join(schema.names)}); name the right one with --text-field"
        )
    if count > 1:
        raise XdscaleError(f"{path}: {count} columns are named {text_field!r}; write the file with one of them")
    kind = schema.field(text_field).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    # Binary columns: what writers leave that do not mark text as such. Bytes that are no text are refused as read.
    if str(values).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
        raise XdscaleError(
            f"{path}: column {text_field!r} is {kind}, expected strings; name the right one with --text-field, or "
            "write the file with a column of strings, for example with pandas"
        )
