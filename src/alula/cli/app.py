"""The Typer application: a new verb is one new file and one line here."""

import errno
from typing import Any

import typer
from typer.core import TyperGroup

from alula.cli import (
    ablate,
    adopt,
    align,
    compare,
    diagnose,
    doctor,
    evaluate,
    export,
    gate,
    generate,
    learn,
    listing,
    merge,
    pretrain,
    push,
    recommend,
    remap,
    report,
    run,
    serve,
)
from alula.cli.screen import notes
from alula.errors import UserError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class Verbs(TyperGroup):
    """The verbs; what a user did wrong is one message on stderr and exit code 2, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs one verb."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise self._told(str(error)) from error
        except OSError as error:  # wherever it was not expected: the disk can be full at any write
            if error.errno not in UNWRITABLE:
                raise
            what = f"Cannot write {error.filename or 'a file'}: {error.strerror}. What was saved is whole."
            raise self._told(f"{what} Free some space or choose another folder, then run the same command again.") from error
        except KeyboardInterrupt:
            notes.print("Stopped. What was saved is whole: the same command again goes on from the last checkpoint.", soft_wrap=True)
            raise typer.Exit(130) from None

    @staticmethod
    def _told(message: str) -> typer.Exit:
        notes.print("Error", style="bold red", end=" ")
        notes.print(message, markup=False, soft_wrap=True)
        return typer.Exit(2)


app = typer.Typer(
    cls=Verbs,
    name="alula",
    help="Teach a vision-language model new tasks, one after another, without forgetting, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("learn")(learn.learn)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("report")(report.report)
app.command("gate")(gate.gate)
app.command("diagnose")(diagnose.diagnose)
app.command("list")(listing.listing)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("ablate")(ablate.ablate)
app.command("align")(align.align)
app.command("pretrain")(pretrain.pretrain)
app.command("recommend")(recommend.recommend)
app.command("serve")(serve.serve)
app.command("adopt")(adopt.adopt)
app.command("export")(export.export)
app.command("merge")(merge.merge)
app.command("card")(push.card)
app.command("push")(push.push)
app.command("remap")(remap.remap)
app.command("doctor")(doctor.doctor)
