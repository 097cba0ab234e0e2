"""Rebuilds every data table of alula's built-in tasks from the packages they come from.

    sh scripts/build_assets/fetch.sh FOLDER
    python scripts/build_assets --sources FOLDER [--only emoji words]

Needs resvg_py (drawings), numpy and a Pillow with Raqm (Urdu letters are joined by it). Takes about a minute.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import atlas
import bitmaps
import countries
import icons
import language_tables
import words
from sources import Sources

TABLES: dict[str, Callable[[Sources], None]] = {
    "easy_vqa": bitmaps.build_easy_vqa,
    "digits": bitmaps.build_digits,
    "animals": bitmaps.build_animals,
    "charts": lambda sources: bitmaps.build_charts(sources, codes=countries.alpha3(sources)),
    "emoji": icons.build,
    "flags": countries.build_flags,
    "capital": countries.build_capital,
    "maps": atlas.build,
    "words": words.build,
    "language": language_tables.build,
}


def main() -> None:
    """Builds the tables that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="the folder that fetch.sh filled")
    parser.add_argument("--only", nargs="*", choices=sorted(TABLES), default=sorted(TABLES), help="tables to build")
    chosen = parser.parse_args()
    for name in chosen.only:
        TABLES[name](Sources(chosen.sources))


if __name__ == "__main__":
    main()
