"""A small imitation of the Hugging Face hub: lists and serves files of made-up repositories over HTTP on this machine.

It speaks the part of the protocol that huggingface_hub uses to list a repository and to download plain files, ranges too, and
counts what it was asked, so that tests can tell a download from a cache hit.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `repos`: name -> {file name -> bytes}. Requests are kept in `asked` as (method, path, range header)."""

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None  # bytes after which a download breaks off, once
        self.gated: set[str] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """Return the names of the files whose bytes were asked for."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body_wanted=False)

    def do_GET(self) -> None:
        self._answer(body_wanted=True)

    def _answer(self, *, body_wanted: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path):
            self._api(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3], body_wanted)
        else:
            self._error(404, "EntryNotFound")

    def _refused(self, repo: str, revision: str | None) -> bool:
        if repo not in self.server.repos:
            self._error(404, "RepoNotFound")
        elif repo in self.server.gated:
            self._error(403, "GatedRepo")
        elif revision not in (None, "main", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            return False
        return True

    def _api(self, repo: str, kind: str | None, revision: str | None) -> None:
        if self._refused(repo, revision):
            return
        files = self.server.repos[repo]
        if kind == "tree":
            found: Any = [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files.items()]
        else:
            found = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body_wanted=True)

    def _file(self, repo: str, revision: str, name: str, body_wanted: bool) -> None:
        if self._refused(repo, revision):
            return
        data = self.server.repos[repo].get(name)
        if data is None:
            self._error(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers, body_wanted)
        else:
            self._send(200, data, headers, body_wanted)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body_wanted: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body_wanted:
            return
        cut = self.server.cut_after
        if cut is not None and len(data) > cut:
            self.server.cut_after = None
            self.wfile.write(data[:cut])
            self.close_connection = True
            return
        self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, body_wanted=False)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
