"""A stand-in for a Hugging Face hub on loopback: what huggingface_hub calls in order to make and fill a repository."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the hub was told."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository → path → content."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256."""
    messages: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub that accepts every token but `refused`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        path, content = self.path.partition("?")[0], self._body()
        token = self.headers.get("Authorization")
        self.hub.tokens.add(token)
        if token == "Bearer refused":
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked.get('organization')}/{asked['name']}"
            is_new = repo not in self.hub.repositories
            self.hub.repositories.setdefault(repo, asked)
            self._answer({"url": f"{self.hub.url}/{repo}", "name": repo}, 200 if is_new else 409)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self._answer({"files": [self._mode(each) for each in json.loads(content)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._large(each) for each in json.loads(content)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], content)
        else:
            self._answer({"error": f"unknown {path}"}, 404)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _large(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.url}/objects/{asked['oid']}"}
        return {**asked, "authenticated": True, "actions": {"upload": upload}}

    def _commit(self, repo: str, content: bytes) -> None:
        files = self.hub.files.setdefault(repo, {})
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
