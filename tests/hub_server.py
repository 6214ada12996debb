"""A Hub in memory, on loopback: what huggingface_hub asks of one to make, fill and download repositories.

`with Hub() as hub:` set HF_ENDPOINT to hub.endpoint, HF_TOKEN to hub.token and HF_HUB_DISABLE_XET to 1, before
huggingface_hub is imported.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".arrow", ".bin")
REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"


class Repo:
    """Files of each commit; large ones by the checksum under which `Hub.objects` holds them."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes | str]] = {}
        self.branches: dict[str, str] = {}

    def commit(self, branch: str, files: dict[str, bytes | str]) -> str:
        """Add a commit; its id."""
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def at(self, revision: str) -> str | None:
        """The commit of a branch or an id."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server, and what it holds.

    repos:    (kind, name) -> repository
    objects:  checksum -> large file
    requests: (method, path) of each
    """

    token, user = "hf_test", "tester"

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def content(self, value: bytes | str) -> bytes:
        """Of a file of a commit."""
        return self.objects[value] if isinstance(value, str) else value


class Answers(BaseHTTPRequestHandler):
    """One request: ROUTES says who answers it."""

    protocol_version, hub = "HTTP/1.1", Hub.__new__(Hub)

    def log_message(self, *_) -> None:
        """Be silent."""

    def answer(self) -> None:
        """Find the route."""
        path = urlsplit(self.path).path
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            writes = self.command in ("POST", "PUT") and "paths-info" not in path and "validate-yaml" not in path
            if writes and self.headers.get("Authorization") != f"Bearer {Hub.token}" and not path.startswith("/lfs/"):
                return self.refuse(401, "Unauthorized", "Invalid username or password.")
            for method, pattern, name in ROUTES:
                if self.command in (method, "HEAD") and (found := re.fullmatch(pattern, path)):
                    parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    return getattr(self, name)(data, **parts)
        return self.refuse(404, "NotFound", f"no route {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def send(self, code: int, body: object = b"", **headers: str) -> None:
        """A response, JSON unless it is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content_Type": kind, "Content_Length": str(len(raw)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, code: int, kind: str, why: str) -> None:
        """An error as the Hub words it."""
        self.send(code, {"error": why}, X_Error_Code=kind, X_Error_Message=why)

    def whoami(self, _data: bytes) -> None:
        token = {"displayName": "test", "role": "write"}
        self.send(200, {"type": "user", "name": Hub.user, "orgs": [], "auth": {"accessToken": token}})

    def checked(self, _data: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        key = (f"{asked.get('type', 'model')}s", f"{asked.get('organization') or Hub.user}/{asked['name']}")
        url = f"{self.hub.endpoint}/{'' if key[0] == 'models' else key[0] + '/'}{key[1]}"
        if key in self.hub.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.hub.repos[key] = Repo()
        self.hub.repos[key].commit("main", {})
        return self.send(200, {"url": url, "name": key[1], "id": key[1]})

    def preupload(self, data: bytes, kind: str, name: str, rev: str) -> None:
        files = json.loads(data)["files"]
        modes = {f["path"]: "lfs" if f["path"].endswith(LFS) else "regular" for f in files}
        self.send(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, data: bytes, **_parts: str) -> None:
        objects = json.loads(data)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, "BadRequest", "the checksum differs")
        self.hub.objects[oid] = data
        return self.send(200)

    def commit(self, data: bytes, kind: str, name: str, rev: str) -> None:
        repo = self.hub.repos[kind, name]
        files = dict(repo.commits[repo.branches[rev]])
        for line in filter(None, data.split(b"\n")):
            value = json.loads(line)["value"]
            if "content" in value:
                files[value["path"]] = base64.b64decode(value["content"])
            elif "oid" in value:
                files[value["path"]] = value["oid"]
        oid = repo.commit(rev, files)
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def info(self, _data: bytes, kind: str, name: str, rev: str = "main") -> None:
        if (found := self.found(kind, name, rev)) is not None:
            oid, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.send(200, {"id": name, "sha": oid, "siblings": siblings, "private": False, "tags": []})

    def tree(self, _data: bytes, kind: str, name: str, rev: str) -> None:
        if (found := self.found(kind, name, rev)) is not None:
            self.send(200, [self.entry(path, value) for path, value in sorted(found[1].items())])

    def entry(self, path: str, value: bytes | str) -> dict:
        size = len(self.hub.content(value))
        lfs = {"lfs": {"oid": value, "size": size, "pointerSize": 134}} if isinstance(value, str) else {}
        return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest(), **lfs}

    def resolve(self, _data: bytes, name: str, rev: str, path: str, kind: str = "models") -> None:
        if (found := self.found(kind, name, rev)) is None:
            return None
        oid, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        blob = self.hub.content(files[path])
        return self.send(200, blob, ETag=f'"{hashlib.sha256(blob).hexdigest()}"', X_Repo_Commit=oid)

    def found(self, kind: str, name: str, rev: str) -> tuple[str, dict[str, bytes | str]] | None:
        """A commit and its files; else the refusal is sent."""
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if (oid := repo.at(rev)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return oid, repo.commits[oid]


ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "checked"),
    ("POST", r"/api/repos/create", "create"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", "batch"),
    ("POST", rf"/api/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("GET", rf"/api/{REPO}/tree/(?P<rev>[^/]+)", "tree"),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<rev>[^/]+))?", "info"),
    ("GET", r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
