"""Parquet, with images as paths, as bytes, or as the ``{"bytes", "path"}`` of Hugging Face data sets."""

import json
from collections.abc import Iterator
from pathlib import Path

from alula.data.formats.class_labels import with_names
from alula.data.formats.table import FORMATS, Format, Line
from alula.errors import UserError

BATCH_SIZE = 1024
"""Rows that are held at once."""


@FORMATS.register("parquet")
class Parquet(Format):
    """Rows by their number from 1."""

    endings = (".parquet",)

    def rows(self, path: Path) -> Iterator[Line]:
        """A batch of them at a time."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(path) as table:
                noted = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
                described = noted.get("info", {}).get("features")
                batches = table.iter_batches(batch_size=BATCH_SIZE)
                for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                    yield Line(origin=f"{path.name}:{number}", row=with_names(row, described))
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole parquet file ({error}). Download or write it again.") from error
