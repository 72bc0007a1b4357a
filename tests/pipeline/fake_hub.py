"""A hub on localhost: repositories, large files and commits, as far as llmopt uses them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the hub holds, and what it was asked.

    Attributes:
        objects: contents of large files by SHA-256.
        commits: for each repository its commits, each the files by name.
        private: whether a repository is.
        uploads: SHA-256 of every large file that was sent.
        fail_after: uploads that are taken before the connection breaks; None for all.
        tokens: the Authorization headers that came.
    """

    def __init__(self) -> None:
        self.address = ""
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.uploads: list[str] = []
        self.fail_after: int | None = None
        self.lock = threading.Lock()
        self.tokens: set[str | None] = set()
        self.messages: list[str] = []

    def files(self, repository: str) -> dict[str, bytes]:
        return self.commits[repository][-1]

    def sha(self, repository: str) -> str:
        return f"{len(self.commits[repository]):040x}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self._body()
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            if name in self.hub.commits:
                self._answer(409, {"error": "it is there", "url": f"{self.hub.address}/{name}"})
                return
            self.hub.commits[name] = [{}]
            self.hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":  # the header of a model card
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            asked = json.loads(data)["files"]
            modes = [
                {"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False, "oid": None}
                for one in asked
            ]
            self._answer(200, {"files": modes, "commitOid": self.hub.sha(self._repository(path))})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._object(one) for one in json.loads(data)["objects"]]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(self._repository(path), [json.loads(line) for line in data.splitlines() if line])
        else:
            self._answer(404, {"error": f"no {path}"})

    def do_PUT(self) -> None:
        data = self._body()
        digest = hashlib.sha256(data).hexdigest()
        assert self.path == f"/upload/{digest}"
        with self.hub.lock:  # files come side by side
            if self.hub.fail_after is not None and len(self.hub.uploads) >= self.hub.fail_after:
                self.close_connection = True  # without an answer, as a line that breaks
                return
            self.hub.objects[digest] = data
            self.hub.uploads.append(digest)
        self._answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.hub.commits:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return
            files = [{"rfilename": file} for file in self.hub.files(name)]
            self._answer(200, {"id": name, "sha": self.hub.sha(name), "siblings": files})
            return
        name, _, rest = path[1:].partition("/resolve/")
        data = self.hub.files(name).get(rest.partition("/")[2]) if name in self.hub.commits else None
        if data is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": self.hub.sha(name), "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self._send(200, data, headers)

    def _object(self, one: Any) -> Any:
        href = f"{self.hub.address}/upload/{one['oid']}"
        actions = {} if one["oid"] in self.hub.objects else {"actions": {"upload": {"href": href}}}
        return {"oid": one["oid"], "size": one["size"], **actions}

    def _commit(self, name: str, lines: list[Any]) -> None:
        files = dict(self.hub.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits[name].append(files)
        sha = self.hub.sha(name)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _repository(self, path: str) -> str:
        return "/".join(path.split("/")[3:5])

    def _body(self) -> bytes:
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        made = b""
        while size := int(self.rfile.readline(), 16):
            made += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return made

    def _answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".onnx", "tokenizer.json")) else "regular"


@contextmanager
def serving() -> Iterator[Hub]:
    """Have a hub that answers at its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
