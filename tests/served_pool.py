"""A pool behind the endpoint on a free port, and the words to ask it with."""

import base64
import contextlib
import io
import socket
import threading

import uvicorn

from alula.running.learn import generate
from alula.serving.answering import Answerer
from alula.serving.limits import Limits
from alula.serving.server import build_app


@contextlib.contextmanager
def serving(opened, *, api_key=None, **limits):
    """The address of a server with these limits, and its answerer."""
    answerer = Answerer(opened, name="pool", limits=Limits(**limits))
    app = build_app(answerer, api_key=api_key, hosts=("127.0.0.1",))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    bound = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield address, answerer
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def as_url(image, kind="PNG"):
    held = io.BytesIO()
    image.save(held, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


def seen(image, text="what colour?"):
    """A user message of an image and a question."""
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": as_url(image)}}, {"type": "text", "text": text}]}


def said(text):
    return {"role": "user", "content": text}


def ask(client, *messages, model="pool", max_tokens=8, **options):
    return client.chat.completions.create(model=model, messages=list(messages), max_tokens=max_tokens, **options)


def text_of(completion):
    return completion.choices[0].message.content


def offline(opened, question, *images, tokens=8):
    return generate(opened, question, images=images, max_new_tokens=tokens).text
