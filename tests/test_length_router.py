"""The router example, in front of engines that only say their name."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent.parent / "examples" / "length_router.py"
spec = importlib.util.spec_from_file_location("length_router", FILE)
assert spec is not None and spec.loader is not None
router = importlib.util.module_from_spec(spec)
spec.loader.exec_module(router)


def count(prompt: Any) -> int:
    """A word is a token; a chat costs two more for each message."""
    if isinstance(prompt, str):
        return len(prompt.split())
    if prompt and isinstance(prompt[0], dict):
        return sum(count(message["content"]) + 2 for message in prompt)
    return len(prompt)


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_engine(name: str) -> ThreadingHTTPServer:
    class Engine(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = 422 if json.loads(body).get("bad") else 200
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            said = {"engine": name, "path": self.path, "key": self.headers.get("Authorization")}
            self.wfile.write(json.dumps({**said, "body": json.loads(body)}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Engine)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(make_engine("short")) as short, serving(make_engine("long")) as long:
        engines = {20: short, 80: long, 160: "http://127.0.0.1:9"}  # nobody listens there
        with serving(router.make_server(engines, count, 0)) as url:
            yield url


def ask(url: str, **request: Any) -> tuple[int, Any]:
    forward = urllib.request.Request(
        url + "/v1/completions", json.dumps(request).encode(), {"Authorization": "Bearer k"}
    )
    try:
        with urllib.request.urlopen(forward) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("request_", "engine"),
    [
        ({"prompt": "a " * 10, "max_tokens": 10}, "short"),
        ({"prompt": "a " * 10, "max_tokens": 11}, "long"),
        ({"prompt": [1] * 15, "max_tokens": 5}, "short"),
        ({"prompt": ["a", "a " * 30], "max_tokens": 5}, "long"),
        ({"messages": [{"role": "user", "content": "a " * 15}], "max_tokens": 3}, "short"),
        ({"messages": [{"role": "user", "content": "a " * 15}], "max_tokens": 4}, "long"),
    ],
)
def test_smallest_window_that_fits(address: str, request_: dict[str, Any], engine: str) -> None:
    status, said = ask(address, **request_)
    assert (status, said["engine"]) == (200, engine)
    assert said["body"] == request_ and said["path"] == "/v1/completions"
    assert said["key"] == "Bearer k"


def test_too_long_is_refused_with_the_numbers(address: str) -> None:
    status, said = ask(address, prompt="a", max_tokens=200)
    assert status == 400
    assert said["error"]["message"] == "201 tokens are needed and the longest window is 160"


def test_answer_of_unknown_length_reserves_the_default(address: str) -> None:
    status, said = ask(address, prompt="a")
    assert status == 400 and str(router.DEFAULT_NEW_TOKENS + 1) in said["error"]["message"]


def test_errors_of_an_engine_are_passed_on_and_a_dead_one_is_named(address: str) -> None:
    assert ask(address, prompt="a", max_tokens=1, bad=True)[0] == 422
    status, said = ask(address, prompt="a", max_tokens=100)
    assert status == 502 and "http://127.0.0.1:9" in said["error"]["message"]


def test_what_is_not_a_request_is_refused(address: str) -> None:
    forward = urllib.request.Request(address + "/v1/completions", b"[]")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(forward)
    assert caught.value.code == 400
    caught.value.close()
