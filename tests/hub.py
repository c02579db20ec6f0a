"""A stand-in for the Hugging Face hub on this machine: the few routes that its own client needs for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories in memory.

    Attributes:
        url: for `HF_ENDPOINT`.
        commits: of every repository, oldest first: the commit's hash, and all its files.
        unknown: requests that it had no answer for.
    """

    url: str = ""
    commits: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        history = self.commits.get(repo, [])
        if revision == "main":
            return history[-1] if history else None
        return next((commit for commit in history if commit[0] == revision), None)

    def add(self, repo: str, files: Files) -> str:
        """A commit on top of the others."""
        before = self.commits[repo][-1][1] if self.commits[repo] else {}
        number = f"{repo}{len(self.commits[repo])}"
        self.commits[repo].append((hashlib.sha1(number.encode()).hexdigest(), {**before, **files}))
        return self.commits[repo][-1][0]


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve an empty hub until the block ends."""
    state = Hub()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            self._file(body=True)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if commit := self._commit(found[1], found[2] or "main"):
                names = [{"rfilename": name} for name in commit[1]]
                self._json({"id": found[1], "sha": commit[0], "siblings": names, "tags": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            if commit := self._commit(found[1], found[2]):
                folder = f"{found[3]}/" if found[3] else ""
                held = [(name, data) for name, data in commit[1].items() if name.startswith(folder)]
                if folder and not held:
                    self._missing("EntryNotFound", commit[0])
                else:
                    self._json([{"type": "file", "path": n, "size": len(x), "oid": _digest(x)} for n, x in held])
        else:
            self._unknown()

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            wish = json.loads(body)
            repo = "/".join(part for part in (wish.get("organization"), wish["name"]) if part)
            if repo not in self.hub.commits:
                self.hub.commits[repo] = []
                self.hub.add(repo, {".gitattributes": b""})
            self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.hub.add(found[1], {v["path"]: base64.b64decode(v["content"]) for v in values})
            url = f"{self.hub.url}/{found[1]}/commit/{sha}"
            self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        else:
            self._unknown()

    def _file(self, *, body: bool) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(urlsplit(self.path).path))
        if found is None:
            self._unknown()
        elif commit := self._commit(found[1], found[2]):
            sha, files = commit
            data = files.get(found[3])
            if data is None:
                self._missing("EntryNotFound", sha)
            else:
                self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{_digest(data)}"'}, body=body)

    def _commit(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """A commit; where there is none, that has been answered."""
        commit = self.hub.at(repo, revision)
        if commit is None:
            self._missing("RevisionNotFound" if repo in self.hub.commits else "RepoNotFound")
        return commit

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, sha: str | None = None) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, **({"X-Repo-Commit": sha} if sha else {})})

    def _unknown(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self._send(404, b"{}", {})

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
