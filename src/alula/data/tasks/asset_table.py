"""Reads the tables in ``assets/``. It knows no task."""

from importlib.resources import as_file, files
from typing import Any

import pyarrow.parquet as parquet

from alula.errors import UserError

FOLDER = "alula.data.tasks.assets"


def read_table(name: str) -> list[dict[str, Any]]:
    """The rows of ``assets/<name>.parquet``, in file order.

    Raises:
        UserError: the installed package lacks its data.
    """
    with as_file(files(FOLDER) / f"{name}.parquet") as path:
        if not path.is_file():
            raise UserError(
                f"The data table '{name}.parquet' is not in the installed package. All tables of alula.data.tasks.assets "
                "are wanted. Install alula again, or rebuild them with scripts/build_assets."
            )
        with parquet.ParquetFile(path) as table:  # `read_table` imports pandas, a second of work for nothing
            return table.read().to_pylist()
