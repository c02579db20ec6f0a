"""JSON over HTTP, as patient as it was told to be.

What may pass (no answer in time, a broken connection, status 408, 429 or 5xx) is tried again, after a pause that
doubles and is drawn at random in its upper half, or after the one that the server asks for. What will not pass is one
error at once. No redirect is followed and no proxy asked: the key goes to the host that was named and to no other.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import random
import socket
import ssl
import threading
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import ropepatch
from ropepatch.errors import EndpointError, OptionError

FIRST_PAUSE = 1.0
"""Seconds before the second attempt, at most."""
LONGEST_PAUSE = 60.0
LONGEST_ASKED = 600.0
"""Seconds that a server may ask to wait; more is an error."""

_PASSING = frozenset({408, 425, 429})
_MESSAGE_LENGTH = 500


class _PassingError(Exception):
    """What may be gone at the next attempt. `pause`: seconds that the server asks to wait; None: it does not say."""

    def __init__(self, message: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.pause = pause


class Client:
    """One server. Threads may share it.

    Args:
        endpoint: base URL, http or https, with what comes before `/completions` ("http://127.0.0.1:8080/v1").
        key: sent as a bearer token; None for none. It is taken out of every message.
        timeout: seconds without a byte from the server after which an attempt has failed.
        retries: further attempts after a failure that may pass.

    Raises:
        OptionError: the endpoint is no such URL, the key cannot be sent, or a number is out of range.
    """

    def __init__(self, endpoint: str, *, key: str | None = None, timeout: float = 600.0, retries: int = 5) -> None:
        self.url, self._secure, self._host, self._port, self._path = _parse(endpoint)
        if not (0 < timeout < float("inf")):
            raise OptionError("timeout out of range", given=timeout, allowed="seconds, more than 0")
        if retries < 0:
            raise OptionError("retries out of range", given=retries, allowed="0 or more")
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise OptionError("the API key cannot be sent", allowed="printable ASCII without spaces")
        self.timeout = timeout
        self.retries = retries
        self._key = key
        self._answered = False
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def get(self, path: str) -> Any:
        """The JSON that the server has at `path`, a path below the endpoint; asked for once.

        Raises:
            EndpointError: no answer, or no such thing.
        """
        return self._request("GET", path, None, 0)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to `body`.

        Raises:
            EndpointError: no answer after all retries, or a refusal, with the server's own words.
        """
        return self._request("POST", path, json.dumps(body).encode(), self.retries)

    def stop(self) -> None:
        """End every request that is under way, and every pause: they raise."""
        self._stopping.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _request(self, method: str, path: str, data: bytes | None, retries: int) -> Any:
        for attempt in range(retries + 1):
            try:
                return self._attempt(method, path, data)
            except _PassingError as failure:
                last = failure
            if attempt == retries or self._stopping.is_set():
                break
            if last.pause is not None and last.pause > LONGEST_ASKED:
                raise self._error(f"asks to wait {last.pause:.0f} s: {last}", last.status)
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
            self._stopping.wait(last.pause if last.pause is not None else random.uniform(longest / 2, longest))
        times = f" (after {attempt + 1} attempts)" if attempt else ""
        hint = "finished trials are kept: the same command goes on once the server is well"
        raise self._error(f"fails{times}: {last}", last.status, hint=hint) from last

    def _attempt(self, method: str, path: str, data: bytes | None) -> Any:
        try:
            status, headers, content = self._exchange(method, path, data)
        except ssl.SSLCertVerificationError as error:
            raise self._error(f"has a certificate that cannot be trusted: {error.verify_message}") from error
        except (ConnectionRefusedError, socket.gaierror) as error:
            # Nobody was ever there: more likely a wrong URL than a server that takes a rest.
            if not self._answered:
                words = error.strerror or str(error)
                raise self._error(f"cannot be reached: {words}", hint="start the server, or mend the URL") from error
            raise _PassingError(str(error)) from error
        except TimeoutError as error:
            raise _PassingError(f"it says nothing for {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(f"the connection broke: {type(error).__name__} {error}".strip()) from error
        self._answered = True
        if 200 <= status < 300:
            try:
                return json.loads(content)
            except ValueError as error:
                raise _PassingError(f"its answer is no JSON: {self._shown(content)}", status) from error
        words = f"status {status}: {self._message(content)}"
        if status in _PASSING or status >= 500:
            raise _PassingError(words, status, _pause(headers.get("Retry-After")))
        hint = "give the right key in the environment" if status in (401, 403) else None
        raise self._error(f"refuses: {words}", status, hint=hint)

    def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {
            "Accept": "application/json",
            "Connection": "close",
            "User-Agent": f"ropepatch/{ropepatch.__version__}",
        }
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            if self._stopping.is_set():
                raise ConnectionAbortedError("stopped")
            connection.request(method, f"{self._path}{path}", data, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _error(self, words: str, status: int | None = None, *, hint: str | None = None) -> EndpointError:
        error = EndpointError(f"the server at {self.url} {words}", hint=hint)
        error.status = status
        return error

    def _message(self, content: bytes) -> str:
        """The server's own words, wherever it puts them."""
        try:
            found = json.loads(content)
        except ValueError:
            return self._shown(content)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and name in found:
                found = found[name]
        return self._shown(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))

    def _shown(self, text: str | bytes) -> str:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        if self._key is not None:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return f"{text[:_MESSAGE_LENGTH]}..." if len(text) > _MESSAGE_LENGTH else text or "(nothing)"


def _parse(endpoint: str) -> tuple[str, bool, str, int | None, str]:
    try:
        parts = urlsplit(endpoint.strip())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if "@" in parts.netloc or parts.query:
        # Not repeated in the message: it may be a key.
        raise OptionError("the endpoint holds credentials or a query", hint="give the key in the environment instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
        raise OptionError(
            "the endpoint is no base URL", given=endpoint, allowed="http(s)://HOST[:PORT]/PATH, usually with /v1"
        )
    path = parts.path.rstrip("/")
    url = f"{parts.scheme}://{parts.netloc}{path}"
    return url, parts.scheme == "https", parts.hostname, port, path


def _pause(header: str | None) -> float | None:
    """The seconds of a `Retry-After` header: a number, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header)) if header.strip().isdigit() else _until(parsedate_to_datetime(header))
    except ValueError:
        return None


def _until(moment: datetime.datetime) -> float:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
