"""`alula export`: experts of a pool as plain PEFT adapters, for PEFT or for vLLM."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    pool: Annotated[Path, typer.Argument(help="The pool's folder, or its name on the hub.")],
    expert: Annotated[str | None, typer.Option(help="The expert to write.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for that expert.")] = None,
    vllm: Annotated[Path | None, typer.Option(help="A new folder for all experts, as vLLM serves them.")] = None,
) -> None:
    """Write one expert as a plain PEFT adapter, or all of them for vLLM. Routing stays behind: whoever asks names the expert."""
    import shlex

    from alula.cli.screen import notes, results
    from alula.errors import UserError
    from alula.models.loading import EMBEDDED
    from alula.pool import Pool

    if (vllm is None) == (expert is None) or (expert is None) != (out is None):
        raise UserError("Say what goes where: --expert NAME --out FOLDER for one expert, or --vllm FOLDER for all of them.")
    opened = Pool.open(pool)
    if expert is not None and out is not None:
        results.print(f"PEFT adapter: {opened.export(expert, out)}", markup=False, soft_wrap=True)
        notes.print(f"Load it: PeftModel.from_pretrained(base, {str(out)!r})", markup=False, soft_wrap=True)
    elif vllm is not None:
        results.print(shlex.join(opened.export_for_vllm(vllm)), markup=False, soft_wrap=True)
        notes.print("A request names its expert in 'model'; vLLM does not route.", markup=False, soft_wrap=True)
        if opened.base == EMBEDDED:
            notes.print("vLLM has no class for the embedded default: serve a pool of another base model.", style="yellow", soft_wrap=True)
