"""The Typer application: a new verb is one new file and one line here."""

import typer

from alula.cli import align, evaluate, generate, learn, listing, report, run

app = typer.Typer(
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
app.command("list")(listing.listing)
app.command("run")(run.run)
app.command("align")(align.align)
