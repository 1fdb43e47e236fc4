"""A server on loopback with the part of the Hugging Face Hub's HTTP interface that publishing and loading need.

Branches are sets of files in memory, and every commit has an id by which its files stay available. Weights are
transferred as large files: uploaded by their SHA-256, downloaded through a redirection, from any byte on. `trouble`
makes the next requests fail; a client in another process sets it by POST /trouble and reads the log by GET /seen.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRITER, READER = "secret", "reader"  # tokens


class HubServer(ThreadingHTTPServer):
    """Holds one repository's branches and commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: dict[str, dict] = {}
        self.commits: dict[str, dict[str, bytes]] = {}  # files by commit id
        self.branches: dict[str, str] = {}  # commit id by branch
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.seen: list[list] = []  # method, path, first byte asked for
        self.trouble: list[dict] = []  # {"call": "GET /cdn/.*", "kind": "close" | "half" | "damage" | 501 | 503}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def elsewhere(self) -> str:
        """The address of large files: for huggingface_hub it is another host, which does not get the token."""
        return f"http://localhost:{self.server_port}"

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        files = self.files(branch) | changes
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})

    def private(self, name: str) -> bool:
        wanted = self.created[name]  # the word for it differs between versions of huggingface_hub
        return wanted.get("visibility", wanted.get("private")) in ("private", True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/trouble":
            self.server.trouble.append(json.loads(body))
            return self._answer({})
        if self._in_trouble():
            return None
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self._token() != WRITER:
            return self._answer({"error": "Forbidden"}, 403) if self._token() == READER else self._unknown_token()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
            if name in self.server.created:
                return self._answer({"url": f"{self.server.address}/{name}"}, 409)
            self.server.created[name] = wanted
            self.server.commit("main", {})
            return self._answer({"url": f"{self.server.address}/{name}", "id": name})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._answer({"transfer": "basic", "objects": [*map(self._upload, json.loads(body)["objects"])]})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/?]+)(\?.*)?", self.path)
        if match is None or match[1] not in self.server.created:
            return self._no_repository()
        name, call, revision = match.group(1, 2, 3)
        if call == "branch":
            self.server.branches[revision] = self.server.branches["main"]
            return self._answer({})
        if revision not in self.server.branches:
            return self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if call == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            return self._answer(
                {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            )
        changes = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changes[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                changes[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
        commit = self.server.commit(revision, changes)
        url = f"{self.server.address}/{name}/commit/{commit}"
        return self._answer({"success": True, "commitOid": commit, "commitUrl": url})

    def _upload(self, wanted: dict) -> dict:
        if wanted["oid"] in self.server.large:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"}}}

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._in_trouble():
            return None
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer({"error": "other content than announced"}, 400)
        self.server.large[oid] = body
        return self._answer({})

    def do_GET(self) -> None:
        if self.path == "/seen":
            return self._answer({"seen": self.server.seen})
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        self.server.seen.append([self.command, self.path, first])
        if self.path.startswith("/cdn/"):
            return self._content(self.server.large[self.path.rpartition("/")[2]], first, {})
        if self._in_trouble():
            return None
        if about := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/[^/?]+\?expand=xetEnabled", self.path):
            return self._answer({"id": about[1], "xetEnabled": False})  # huggingface_hub 0.30 asks before it uploads
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(\?.*)?", self.path)
        if self._token() not in (WRITER, READER, ""):
            return self._unknown_token()
        if match is None or match[1] not in self.server.created:
            return self._no_repository()
        repository, revision, name = match.group(1, 2, 3)
        if self.server.private(repository) and not self._token():
            return self._no_repository(401)
        files = self.server.files(revision)
        if name not in files:
            missing = "EntryNotFound" if files else "RevisionNotFound"
            return self._answer({"error": missing}, 404, {"X-Error-Code": missing})
        content, headers = files[name], {"X-Repo-Commit": self.server.branches.get(revision, revision)}
        if name.endswith(".safetensors"):
            oid = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"'}
            headers["Location"] = f"{self.server.elsewhere}/cdn/{oid}"
            return self._answer(b"", 302, headers)
        return self._content(content, first, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET  # noqa: N815

    def _content(self, content: bytes, first: int, headers: dict[str, str]) -> None:
        kind = self._trouble("damage", "half")
        if kind == "damage":
            content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
        if kind == "half":  # the length is promised, and the line goes dead in the middle
            self._answer(content, 200, {**headers, "Accept-Ranges": "bytes"}, sent=len(content) // 2)
            self.close_connection = True
            return
        headers |= {"Accept-Ranges": "bytes"}
        if first:
            headers |= {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        self._answer(content[first:], 206 if first else 200, headers)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _unknown_token(self) -> None:
        message = "Invalid credentials in Authorization header"
        self._answer({"error": message}, 401, {"X-Error-Message": message})

    def _no_repository(self, status: int = 404) -> None:
        self._answer({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})

    def _trouble(self, *kinds: str | int) -> str | int | None:
        """The kind of trouble that waits for this request, if it is among these, which it takes away."""
        for trouble in self.server.trouble:
            if trouble["kind"] in kinds and re.fullmatch(trouble["call"], f"{self.command} {self.path}"):
                self.server.trouble.remove(trouble)
                return trouble["kind"]
        return None

    def _in_trouble(self) -> bool:
        kind = self._trouble("close", 501, 503)
        if kind == "close":
            self.close_connection = True
        elif kind:
            self._answer({"error": "trouble"}, int(kind))
        return kind is not None

    def _answer(
        self, content: dict | bytes, status: int = 200, headers: dict[str, str] | None = None, sent: int | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

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
