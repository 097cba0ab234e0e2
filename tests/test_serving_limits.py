"""The endpoint under load: clients that leave, a full queue, a late turn, an answer that takes too long."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from PIL import Image, ImageFile

from alula.running.learn import open_pool
from alula.serving.limits import Limits
from alula.serving.requests import read_conversation, read_request
from served_pool import ask, said, seen, serving
from taught_pool import taught_pool


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return taught_pool(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def opened(taught):
    return open_pool(taught.pool)


class Slow:
    """A hook that makes each forward take time, and counts them."""

    def __init__(self, model, seconds):
        self.count, self._seconds = 0, seconds
        self._hook = model.register_forward_pre_hook(self._wait)

    def _wait(self, model, args):
        self.count += 1
        time.sleep(self._seconds)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._hook.remove()


def until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_images_wait_packed(monkeypatch):
    body = {"model": "pool", "messages": [seen(Image.new("L", (1200, 1200)))]}
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("unpacked"))
    (image,) = read_conversation(read_request(json.dumps(body).encode()), limits=Limits()).images
    assert isinstance(image, bytes) and len(image) < 5_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(opened, stream):
    with serving(opened, max_new_tokens=500) as (address, answerer), Slow(opened.model, 0.05) as slow:
        body = {"model": "pool/words", "messages": [said("hi")], "stream": stream}
        with (
            pytest.raises(httpx.TimeoutException),
            httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=0.6) as answer,
        ):
            started = time.monotonic()
            for _ in answer.iter_lines():
                if time.monotonic() - started > 0.3:
                    raise httpx.ReadTimeout("left")
        until(lambda: answerer.num_jobs == 0)
        assert 0 < slow.count < 60


def test_a_full_queue_is_429_a_late_turn_503_and_time_ends_an_answer(opened):
    with (
        serving(opened, max_waiting=1, max_new_tokens=500, timeout=4.0) as (address, answerer),
        Slow(opened.model, 0.05),
        ThreadPoolExecutor(2) as pool,
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
    ):
        first = pool.submit(ask, client, said("hi"), model="base", max_tokens=500)
        until(lambda: answerer.num_jobs == 1)
        second = pool.submit(ask, client, said("hi"), model="base", max_tokens=500)
        until(lambda: answerer.num_jobs == 2)
        with pytest.raises(openai.RateLimitError):
            ask(client, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "not looked into"}}]})
        assert first.result().choices[0].finish_reason == "length"
        assert 0 < first.result().usage.completion_tokens < 100
        ended = second.exception() or second.result()  # it begins at the very moment its time is over, or not at all
        assert getattr(ended, "status_code", 503) == 503
