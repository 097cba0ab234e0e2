"""`alula serve`: a pool, or a model, behind an OpenAI-compatible endpoint on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from alula.serving.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost")
READERS = 32
"""Connections beside the queue: requests that are still being read, each up to `max_body_bytes`."""


def serve(
    pool: Annotated[Path | None, typer.Argument(help="The pool's folder. Without one, --model is served as it is.")] = None,
    model: Annotated[str | None, typer.Option(help="A model to serve without a pool; with one: where its base model is.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on. Others than this machine's need an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="ALULA_API_KEY", help="What clients must send as their API key.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    limit: Annotated[list[str] | None, typer.Option(help="A bound: max_new_tokens=256. May be repeated (docs/serving.md).")] = None,
) -> None:
    """Serve /v1/chat/completions. `model` in a request is the pool's name, pool/expert, or base."""
    from alula.cli.screen import notes, quiet_libraries
    from alula.errors import UserError, install_extra

    if pool is None and model is None:
        raise UserError("Nothing to serve: give a pool's folder, or a model with --model.")
    if host not in LOOPBACK and not api_key:
        raise UserError(f"--host {host} lets other machines in. Give --api-key (or ALULA_API_KEY), or keep to 127.0.0.1.")
    limits = _limits(limit or [])
    try:
        import uvicorn

        from alula.serving.server import build_app
    except ImportError as error:
        raise UserError(f"The server's packages are missing ({error}). {install_extra('serve')}") from error
    import contextlib
    import socket

    from alula.running.learn import open_model, open_pool
    from alula.serving.answering import Answerer

    quiet_libraries()
    try:
        bound = socket.create_server((host, port))  # before the model is loaded: a taken port is told at once
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port; 0 takes a free one.") from error
    with notes.status("Loading the model ..."):
        opened = open_pool(pool, model_name=model, dtype=dtype) if pool else open_model(str(model), dtype=dtype)
    answerer = Answerer(opened, name=(pool.resolve() if pool else Path(str(model))).name, limits=limits)
    app = build_app(answerer, api_key=api_key, hosts=LOOPBACK if host in LOOPBACK else ["*"])
    address = f"http://{host}:{bound.getsockname()[1]}/v1"
    notes.print(f"Serving {', '.join(answerer.models)} at {address} (Ctrl-C stops it)", markup=False, soft_wrap=True)
    most = limits.max_waiting + READERS  # connections; beyond them uvicorn says 503 without reading
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=most))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has closed everything, then tells of the signal
        server.run(sockets=[bound])
    notes.print("Stopped.")


def _limits(changes: list[str]) -> "Limits":
    """Bounds from ``name=value``.

    Raises:
        UserError: an unknown name or a bad value.
    """
    from pydantic import ValidationError

    from alula.config import parse_settings
    from alula.errors import UserError, nearest
    from alula.serving.limits import Limits

    try:
        return Limits.model_validate(parse_settings(changes))
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        hint = nearest(name, Limits.model_fields) if problem["type"] == "extra_forbidden" else f"{problem['msg']}."
        raise UserError(f"--limit {name}={problem['input']}: {hint} Correct it.") from error
