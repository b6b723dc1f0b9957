"""One address in front of several engines, each serving one exported scale of the same model.

    python examples/length_router.py --tokenizer longer-8k \\
        --engine 8192=http://127.0.0.1:8001 --engine 32768=http://127.0.0.1:8002 --port 8000

A request of the OpenAI interface goes to the engine with the smallest window that holds its prompt
and its `max_tokens`, so that short texts are read at a small t. The answer is passed on as it
comes, streams included. A text that no window holds is refused with the numbers (HTTP 400), an
engine that does not answer gives HTTP 502.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What is reserved for the answer where a request does not say it.
DEFAULT_NEW_TOKENS = 512


def tokens_needed(request: dict[str, Any], count: Callable[[Any], int]) -> int:
    """Prompt tokens and answer tokens of one request.

    Args:
        request: body of ``/v1/completions`` or ``/v1/chat/completions``.
        count: tokens of a text, of a list of token numbers, or of a list of chat messages.
    """
    prompt = request.get("messages", request.get("prompt", ""))
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    longest = max(map(count, prompt)) if several else count(prompt)
    new = request.get("max_completion_tokens") or request.get("max_tokens") or DEFAULT_NEW_TOKENS
    return longest + int(new)


def choose_engine(engines: dict[int, str], needed: int) -> str:
    """The address with the smallest window of at least `needed` tokens.

    Raises:
        ValueError: none is that long.
    """
    fitting = [window for window in engines if window >= needed]
    if not fitting:
        raise ValueError(f"{needed} tokens are needed and the longest window is {max(engines)}")
    return engines[min(fitting)]


def make_server(
    engines: dict[int, str], count: Callable[[Any], int], port: int
) -> ThreadingHTTPServer:
    """The router, listening on this machine only; `serve_forever` starts it."""

    class Router(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                engine = choose_engine(engines, tokens_needed(json.loads(body), count))
            except (ValueError, TypeError, AttributeError) as error:
                self._refuse(400, str(error))
                return
            self._pass_on(engine, body)

        def do_GET(self) -> None:
            self._pass_on(engines[max(engines)], None)

        def _pass_on(self, engine: str, body: bytes | None) -> None:
            headers = {"Content-Type": "application/json"}
            if "Authorization" in self.headers:
                headers["Authorization"] = self.headers["Authorization"]
            forward = urllib.request.Request(engine + self.path, data=body, headers=headers)
            try:
                answer = urllib.request.urlopen(forward)
            except urllib.error.HTTPError as error:
                answer = error  # an answer too, and the client's to read
            except OSError as error:
                self._refuse(502, f"{engine}: {error}")
                return
            with answer:
                self.send_response(answer.status)
                for name in ("Content-Type", "Content-Length"):
                    if name in answer.headers:
                        self.send_header(name, answer.headers[name])
                self.send_header("X-Engine", engine)
                self.end_headers()
                while part := answer.read1(65536):
                    self.wfile.write(part)
                    self.wfile.flush()

        def _refuse(self, status: int, reason: str) -> None:
            text = json.dumps({"error": {"message": reason, "type": "router"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Engines keep their own logs."""

    return ThreadingHTTPServer(("127.0.0.1", port), Router)


def main() -> None:
    """Read the arguments and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of one of the exports")
    parser.add_argument("--engine", action="append", required=True, help="WINDOW=ADDRESS")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    engines = {int(w): url.rstrip("/") for w, url in (e.split("=", 1) for e in args.engine)}

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)

    def count(prompt: Any) -> int:
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"])
        if prompt and isinstance(prompt[0], dict):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return len(prompt)

    with make_server(engines, count, args.port) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
