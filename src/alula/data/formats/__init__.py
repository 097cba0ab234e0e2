"""Files to rows, one format a file: a new one is a file that registers itself, and a line here. It knows no row's meaning."""

from alula.data.formats import json_text, parquet, saved_dataset, webdataset  # noqa: F401 - imported for what they register
from alula.data.formats.table import FORMATS, Format, Line, find_format, read_lines

__all__ = ["FORMATS", "Format", "Line", "find_format", "read_lines"]
