"""The command line: one file per verb. The composition root: it alone reads environment variables and prints."""

import os
import sys


def main() -> None:
    """Runs one verb and exits: 0; 1 if a cell crashed or the gate found a loss; 2 for what a user can correct; 130 after Ctrl-C."""
    # spinning OpenMP threads make small models several times slower on a busy machine; users may say otherwise
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(
            "alula was started in several processes, which would write the same folder. Start one process; to train on several "
            "devices use alula.Trainer in a script of your own under torchrun (docs/own_model_and_data.md)."
        )
    from alula.cli.app import app

    app()
