"""A small OpenAI-compatible server around a real model, for tests: real sockets, real JSON, and faults on demand.

It generates with transformers' own `generate`, so what it answers does not depend on the code under test.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Server:
    """Serves one model until its `with` block ends.

    Attributes:
        accepts_ids: whether a prompt may be a list of token ids.
        says_usage: whether answers count tokens.
        key: the bearer token that every request needs; None for none.
        context: most tokens of a prompt; longer ones lose their beginning. None: any.
        facts: further fields of the model's entry in /v1/models; None for no such list.
        chat_reply: what a chat answers, from what the model generated.
        faults: what the next requests meet in place of an answer, first one first.
        dies_after: requests for completions that are answered before the server is gone.
        requests: what was asked, in order: (path, headers, body).
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "tiny") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.accepts_ids = True
        self.says_usage = True
        self.key: str | None = None
        self.context: int | None = None
        self.facts: dict[str, Any] | None = {}
        self.chat_reply: Callable[[str], str] = str
        self.faults: deque[Callable[[_Handler], None]] = deque()
        self.dies_after: int | None = None
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def prompts(self) -> list[Any]:
        """The prompts of all requests after the first one, which only tries the server."""
        asked = [body for path, _, body in self.requests if path.endswith("completions")]
        return [body.get("prompt", body.get("messages")) for body in asked]

    def __enter__(self) -> Server:
        handler = type("Handler", (_Handler,), {"app": self})
        self.httpd = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.httpd.daemon_threads = True
        self.port = self.httpd.server_address[1]
        self.thread = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self.thread.join()

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def under(self, change: int) -> None:
        with self.lock:
            self.under_way += change
            self.most_under_way = max(self.most_under_way, self.under_way)

    def generate(self, ids: list[int], most_tokens: int) -> tuple[str, int]:
        tokens = torch.tensor([ids])
        with self.lock:
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=most_tokens,
                pad_token_id=0,
            )
        new = output[0, len(ids) :].tolist()
        return self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False), len(new)


class _Handler(BaseHTTPRequestHandler):
    app: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if not self._allowed(None):
            return
        if self.path != "/v1/models" or self.app.facts is None:
            self.answer(404, {"detail": "Not Found"})
            return
        self.answer(200, {"object": "list", "data": [{"id": self.app.name, "object": "model", **self.app.facts}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._allowed(body):
            self._complete(body)

    def _allowed(self, body: Any) -> bool:
        app = self.app
        app.requests.append((self.path, dict(self.headers), body))
        if app.key is not None and self.headers.get("Authorization") != f"Bearer {app.key}":
            given = self.headers.get("Authorization")
            self.answer(401, {"error": {"message": f"wrong key: {given}", "type": "authentication_error"}})
            return False
        return True

    def _complete(self, body: dict[str, Any]) -> None:
        app = self.app
        if app.faults:
            app.faults.popleft()(self)
            return
        if app.dies_after is not None:
            app.dies_after -= 1
            if app.dies_after < 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                threading.Thread(target=app.stop).start()
                time.sleep(0.1)
                return
        if body["model"] != app.name:
            self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
            return
        assert body["temperature"] == 0
        chat = self.path == "/v1/chat/completions"
        prompt = body["messages"] if chat else body["prompt"]
        if chat:
            text = app.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = app.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif isinstance(prompt, str):
            ids = app.tokenizer(prompt)["input_ids"]
        elif app.accepts_ids:
            ids = prompt
        else:
            self.answer(400, {"detail": "prompt must be a string."})
            return
        if app.context is not None:
            ids = ids[-app.context :]
        app.under(+1)
        try:
            text, generated = app.generate(ids, body["max_tokens"])
        finally:
            app.under(-1)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        if chat:
            choice["message"] = {"role": "assistant", "content": app.chat_reply(text)}
        else:
            choice["text"] = text
        content: dict[str, Any] = {"object": "text_completion", "model": app.name, "choices": [choice]}
        if app.says_usage:
            content["usage"] = {"prompt_tokens": len(ids), "completion_tokens": generated}
        self.answer(200, content)


def status(code: int, content: Any = None, **headers: str) -> Callable[[_Handler], None]:
    """A fault: this status, with a message and headers (`Retry_After` for Retry-After)."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(code, content or {"error": {"message": f"fault {code}"}}, shown)


def silence(seconds: float) -> Callable[[_Handler], None]:
    """A fault: nothing for so long."""

    def wait(handler: _Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return wait


def broken(handler: _Handler) -> None:
    """A fault: the connection closes in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.close_connection = True


def garbage(handler: _Handler) -> None:
    """A fault: an answer that is no JSON."""
    handler.answer(200, b"<html>Bad gateway</html>")


def nonsense(handler: _Handler) -> None:
    """A fault: JSON, but no completion."""
    handler.answer(200, {"choices": []})


@contextlib.contextmanager
def serving(model: Any, tokenizer: Any, name: str = "tiny", **options: Any) -> Iterator[Server]:
    """A server with these attributes, for a `with` block."""
    server = Server(model, tokenizer, name)
    for option, value in options.items():
        assert hasattr(server, option)
        setattr(server, option, value)
    with server:
        yield server
