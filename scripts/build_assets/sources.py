"""Finds files in the unpacked packages and writes the tables. It knows no table by name."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

LANGUAGES = ("en", "ja", "sw", "ur")
ASSETS = Path(__file__).parents[2] / "src" / "alula" / "data" / "tasks" / "assets"


class Sources:
    """The folder that fetch.sh fills: ``npm/x/<package-version>/``, ``dl/*.whl`` and ``deb/x/<package>/``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def npm(self, package: str) -> Path:
        """The unpacked npm package ``name-version``."""
        return self._known(self.root / "npm" / "x" / package)

    def deb(self, package: str) -> Path:
        """The unpacked Debian package."""
        return self._known(self.root / "deb" / "x" / package)

    def wheel(self, name: str) -> zipfile.ZipFile:
        """The wheel whose file name starts with `name`."""
        found = sorted((self.root / "dl").glob(f"{name}-*.whl"))
        return zipfile.ZipFile(self._known(found[0] if found else self.root / "dl" / f"{name}-*.whl"))

    def json(self, package: str, path: str) -> Any:
        """The JSON file `path` of an npm package."""
        return json.loads((self.npm(package) / path).read_text(encoding="utf-8"))

    @staticmethod
    def _known(path: Path) -> Path:
        if not path.exists():
            raise SystemExit(f"No {path}. Fetch the packages first: sh scripts/build_assets/fetch.sh FOLDER")
        return path


def write_table(name: str, rows: list[dict[str, Any]]) -> None:
    """Writes ``assets/<name>.parquet``; the same rows give the same bytes."""
    ASSETS.mkdir(exist_ok=True)
    path = ASSETS / f"{name}.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="zstd", compression_level=19)
    print(f"{name:14s} {len(rows):6d} rows {path.stat().st_size / 1e3:8.0f} kB", flush=True)
