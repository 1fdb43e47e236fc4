"""The few calls of the Hugging Face Hub's HTTP interface that publishing and loading a model need, on loopback.

Branches are folders of files in memory; every commit gets an id by which its files can be asked for ever after.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """Holds one repository's branches and commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: dict[str, dict] = {}
        self.commits: dict[str, dict[str, bytes]] = {}  # files by commit id
        self.branches: dict[str, str] = {}  # commit id by branch

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        files = self.files(branch) | changes
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
            if name in self.server.created:
                return self._answer({"url": f"{self.server.address}/{name}"}, 409)
            self.server.created[name] = wanted
            self.server.commit("main", {})
            return self._answer({"url": f"{self.server.address}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/?]+)(\?.*)?", self.path)
        if match is None or match[1] not in self.server.created:
            return self._answer({"error": "Repository not found"}, 404)
        name, call, revision = match.group(1, 2, 3)
        if call == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer({"files": modes})
        if call == "branch":
            self.server.branches[revision] = self.server.branches["main"]
            return self._answer({})
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        commit = self.server.commit(revision, {f["path"]: base64.b64decode(f["content"]) for f in files})
        url = f"{self.server.address}/{name}/commit/{commit}"
        return self._answer({"success": True, "commitOid": commit, "commitUrl": url})

    def do_GET(self) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(\?.*)?", self.path)
        if match is None or match[1] not in self.server.created:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        _, revision, name = match.group(1, 2, 3)
        files = self.server.files(revision)
        if name not in files:
            missing = "EntryNotFound" if files else "RevisionNotFound"
            return self._answer({"error": missing}, 404, {"X-Error-Code": missing})
        headers = {
            "X-Repo-Commit": self.server.branches.get(revision, revision),
            "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"',
        }
        return self._answer(files[name], 200, headers)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: dict | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: pytest's output is for tests."""


@contextmanager
def hub_server():
    """A running server."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
