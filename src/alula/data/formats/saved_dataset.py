"""A folder that ``datasets.Dataset.save_to_disk`` wrote; its rows stay on disk until they are needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alula.data.formats.class_labels import with_names
from alula.data.formats.table import FORMATS, Format, Line
from alula.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

MARKER, SPLITS = "state.json", "dataset_dict.json"


@FORMATS.register("saved_dataset")
class SavedDataset(Format):
    """Rows by their number from 1; images as they are stored, not decoded."""

    marker = MARKER

    def rows(self, path: Path) -> Iterator[Line]:
        """One after another from the disk."""
        stored = self.open(path).with_format("arrow")
        described = stored.features.to_dict()
        for number in range(len(stored)):
            yield Line(origin=f"{path.name}:{number + 1}", row=with_names(stored[number].to_pylist()[0], described))

    def open(self, path: Path) -> "Dataset":
        """The data set, mapped from the disk.

        Raises:
            UserError: a file of it is missing or damaged.
        """
        from datasets import load_from_disk
        from pyarrow import ArrowException

        try:
            return load_from_disk(str(path))
        except (ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not a whole saved data set ({error}). Save it again with save_to_disk.") from error
