"""The command line: one file per verb. The composition root: it alone reads environment variables and prints."""

import os
import sys


def main() -> None:
    """Runs one verb; a user's error is one line on stderr and exit code 2."""
    # spinning OpenMP threads make small models several times slower on a busy machine; users may say otherwise
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    from alula.cli.app import app
    from alula.errors import UserError

    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]Error[/] {_plain(error)}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. Run the same command again to go on from the last checkpoint.")
        sys.exit(130)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))
