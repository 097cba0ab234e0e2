"""The command line: one file per verb. The composition root: it alone reads environment variables and prints."""

import os
import sys


def main() -> None:
    """Runs one verb and exits: 0; 1 if a cell crashed or the gate found a loss; 2 for what a user can correct; 130 after Ctrl-C."""
    # spinning OpenMP threads make small models several times slower on a busy machine; users may say otherwise
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from alula.cli.launched import check_verb

    check_verb(sys.argv[1:])
    from alula.cli.app import app

    app()
