"""The endpoint: OpenAI's paths and objects around an `Answerer`, with routing beside each answer."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from alula.data.sample import Sample
from alula.serving.answering import Answerer, Ended, Job, Question
from alula.serving.limits import Limits, RequestError
from alula.serving.requests import ChatRequest, read_conversation, read_request

BODY_SECONDS = 30.0
"""How long a client may take to send its request."""


def build_app(answerer: Answerer, *, api_key: str | None = None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application: ``/v1/models``, ``/v1/chat/completions`` and ``/health``.

    Args:
        api_key: what clients must send as bearer token; None asks for nothing.
        hosts: names by which it may be called. A server on this machine alone should refuse others: a web page could
            otherwise reach it under a name of its own that leads here.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        answerer.close()

    async def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise RequestError(401, "The API key is missing or wrong. Send it as bearer token.", code="invalid_api_key")

    app = FastAPI(title="alula", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_such_path)
    app.add_exception_handler(Exception, _failed)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    async def models() -> dict[str, Any]:
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "alula"} for name in answerer.models]
        return {"object": "list", "data": rows}

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)], response_model=None)
    async def completions(request: Request) -> JSONResponse | StreamingResponse:
        body = await _body(request, answerer.limits)
        answerer.check_room()  # before anything is made of it
        asked = read_request(body)
        sample = await asyncio.to_thread(read_conversation, asked, limits=answerer.limits)
        job = answerer.ask(_question(asked, sample))
        watch = asyncio.create_task(_give_up_with_client(request, job))
        job.future.add_done_callback(lambda _: watch.get_loop().call_soon_threadsafe(watch.cancel))  # type: ignore[union-attr]
        pieces = answerer.follow(job)
        first = await anext(pieces)  # what is refused is refused before the headers are sent
        if asked.stream:
            return StreamingResponse(_events(asked, first, pieces), media_type="text/event-stream")
        return JSONResponse(_completion(asked, [first, *[item async for item in pieces]]))

    return app


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, read up to the limit.

    Raises:
        RequestError: 415, not JSON by its header (a form of a web page could be sent without asking); 413; 408.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RequestError(415, "The content type must be application/json.", code="unsupported_media_type")
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.max_body_bytes:
                    content += chunk
                elif size > 10 * limits.max_body_bytes:  # up to here it is read: who still sends would not see the refusal
                    break
    except TimeoutError:
        raise RequestError(408, f"The body did not arrive within {BODY_SECONDS:g} s.", code="timeout") from None
    if size > limits.max_body_bytes:
        message = f"The request is larger than {limits.max_body_bytes:,} bytes. Send fewer or smaller images."
        raise RequestError(413, message, code="request_too_large")
    return bytes(content)


def _question(asked: ChatRequest, sample: Sample) -> Question:
    return Question(
        sample=sample,
        model=asked.model,
        new_tokens=asked.new_tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stops=asked.stops,
    )


async def _give_up_with_client(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.give_up()


def _completion(asked: ChatRequest, items: Iterable[str | Ended]) -> dict[str, Any]:
    *pieces, end = items
    assert isinstance(end, Ended)
    message = {"role": "assistant", "content": "".join(map(str, pieces)), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
    return {**_head("chat.completion", asked.model), "choices": [choice], "usage": _usage(end), "alula": {"experts": end.experts}}


async def _events(asked: ChatRequest, first: str | Ended, rest: AsyncGenerator[str | Ended, None]) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each piece, the last with the routing, then the number of tokens if asked for."""
    head = _head("chat.completion.chunk", asked.model)

    def chunk(delta: dict[str, str], reason: str | None = None, **more: Any) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}], **more})

    yield chunk({"role": "assistant", "content": ""})
    item = first
    try:
        while isinstance(item, str):
            yield chunk({"content": item})
            item = await anext(rest)
        yield chunk({}, item.reason, alula={"experts": item.experts})
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(item)})
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body())
    finally:
        await rest.aclose()


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(end: Ended) -> dict[str, int]:
    total = end.prompt_tokens + end.answer_tokens
    return {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.answer_tokens, "total_tokens": total}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), status_code=error.status)


async def _no_such_path(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = "/v1/models and /v1/chat/completions"
    told = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}. Here are {known}.", code="unknown_url")
    return await _refused(request, told)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """What no request should be able to cause: the log has the traceback, the client has not."""
    return await _refused(request, RequestError(500, "The server failed on this request; its log says more.", code="internal_error"))
