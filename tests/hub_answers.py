"""Responses of the test Hub to single requests; ROUTES maps each URL to the method that answers it."""

import base64
import hashlib
import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_READING_POSTS = ("paths-info", "validate-yaml")  # requests by POST that only read


class Answers(BaseHTTPRequestHandler):
    """Handles one request."""

    protocol_version = "HTTP/1.1"
    hub: Any

    def log_message(self, *_) -> None:
        """Log nothing."""

    def answer(self) -> None:
        """Answer a request through its route, or fail as a matching `Fault` prescribes."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            fault = self.hub.fault(f"{self.command} {url.path}")
        if fault is not None:
            time.sleep(fault.slow)
            if fault.cut:
                return self.hang_up()
            if fault.status:
                return self.refuse(fault.status, "Fault", "injected fault")
            if fault.lost:
                self.send = lambda *_, **__: self.hang_up()  # type: ignore[method-assign]
        with self.hub.lock:
            return self.route(url.path, data)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def route(self, path: str, data: bytes) -> None:
        """Call the method that answers a request."""
        writes = self.command in ("POST", "PUT", "DELETE") and not any(word in path for word in _READING_POSTS)
        if writes and not path.startswith("/lfs/") and not self.may_write():
            is_reader = self.token() == self.hub.reader
            return self.refuse(403 if is_reader else 401, "Unauthorized", "Invalid username or password.")
        for method, pattern, name in ROUTES:
            if self.command in (method, "HEAD") and (url_match := re.fullmatch(pattern, path)):
                parts = {key: unquote(value) for key, value in url_match.groupdict().items() if value is not None}
                return getattr(self, name)(data, **parts)
        return self.refuse(404, "NotFound", f"no route {self.command} {path}")

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        return self.token() == self.hub.token

    def hang_up(self) -> None:
        """Close the connection without a response."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, code: int, body: object = b"", **headers: str) -> None:
        """Send a response, as JSON unless the body is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content_Type": kind, "Content_Length": str(len(raw)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, code: int, kind: str, why: str, **headers: str) -> None:
        """Send an error in the format of the Hub."""
        self.send(code, {"error": why}, X_Error_Code=kind, X_Error_Message=why, **headers)

    def whoami(self, _data: bytes) -> None:
        if self.token() not in (self.hub.token, self.hub.reader):
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if self.may_write() else "read"}
        return self.send(200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": token}})

    def validate_yaml(self, data: bytes) -> None:
        """Check the metadata of a card as the Hub does: they must be a mapping."""
        content = json.loads(data)["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        wrong = [] if isinstance(metadata, dict) else [{"message": "no mapping"}]
        self.send(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def list_repos(self, _data: bytes, kind: str) -> None:
        author, search = (self.query.get(name, [""])[0] for name in ("author", "search"))
        names = [n for k, n in self.hub.repos if k == kind and n.startswith(author) and search in n]
        self.send(200, [{"id": name, "modelId": name} for name in names])

    def create(self, data: bytes) -> None:
        request = json.loads(data)
        key = (f"{request.get('type', 'model')}s", f"{request.get('organization') or self.hub.user}/{request['name']}")
        url = f"{self.hub.endpoint}/{'' if key[0] == 'models' else key[0] + '/'}{key[1]}"
        if key in self.hub.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        private = bool(request.get("private") or request.get("visibility") == "private")
        self.hub.put(*key, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.send(200, {"url": url, "name": key[1], "id": key[1]})

    def branch(self, data: bytes, kind: str, name: str, rev: str) -> None:
        if (
            commit_files := self.find_commit(kind, name, json.loads(data or b"{}").get("startingPoint") or "main")
        ) is not None:
            self.hub.repos[kind, name].branches[rev] = commit_files[0]
            self.send(200, {})

    def refs(self, _data: bytes, kind: str, name: str) -> None:
        if self.find_repo(kind, name) is not None:
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
                for branch, oid in self.hub.repos[kind, name].branches.items()
            ]
            self.send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def preupload(self, data: bytes, kind: str, name: str, rev: str) -> None:
        if (commit_files := self.find_commit(kind, name, rev)) is None:
            return
        from hub_server import LFS

        answers = []
        for file in json.loads(data)["files"]:
            value, mode = commit_files[1].get(file["path"]), "lfs" if file["path"].endswith(LFS) else "regular"
            oid = {} if value is None else {"oid": oid_of(value)}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self.send(200, {"files": answers})

    def batch(self, data: bytes, **_parts: str) -> None:
        objects = json.loads(data)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, "BadRequest", "the checksum differs")
        self.hub.uploaded.append(oid)
        self.hub.objects[oid] = data
        return self.send(200)

    def commit(self, data: bytes, kind: str, name: str, rev: str) -> None:
        if (commit_files := self.find_commit(kind, name, rev)) is None:
            return None
        files = dict(commit_files[1])
        for line in filter(None, data.split(b"\n")):
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header" and value.get("parentCommit") not in (None, commit_files[0]):
                return self.refuse(412, "PreconditionFailed", "A commit has happened since.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        oid = self.hub.repos[kind, name].commit(rev, files)
        return self.send(200, {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def info(self, _data: bytes, kind: str, name: str, rev: str = "main") -> None:
        if (commit_files := self.find_commit(kind, name, rev, gated=True)) is not None:
            oid, files = commit_files
            repo = self.hub.repos[kind, name]
            siblings = [{"rfilename": path, **self.sibling(v)} for path, v in sorted(files.items())]
            about = {"id": name, "sha": oid, "private": repo.private, "gated": "auto" if repo.gated else False}
            card = self.hub.content(files.get("README.md", b"")).decode()
            metadata = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
            self.send(200, {**about, "siblings": siblings, "cardData": metadata, "tags": []})

    def sibling(self, value: bytes | str) -> dict:
        size = len(self.hub.content(value))
        lfs = {"lfs": {"sha256": value, "size": size, "pointerSize": 134}} if isinstance(value, str) else {}
        return {"size": size, "blobId": oid_of(value), **lfs}

    def tree(self, _data: bytes, kind: str, name: str, rev: str, path: str = "") -> None:
        if (commit_files := self.find_commit(kind, name, rev)) is None:
            return None
        inside = {p: v for p, v in sorted(commit_files[1].items()) if not path or p == path or p.startswith(f"{path}/")}
        if path and not inside:
            return self.refuse(404, "EntryNotFound", f"{path} is not there")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        return self.send(200, self.listing(inside, f"{path}/" if path else "", recursive))

    def listing(self, files: dict[str, bytes | str], inside: str, recursive: bool) -> list[dict]:
        """List folders and files, of one folder alone or of all its subfolders too."""
        entries: dict[str, dict] = {}
        for path, value in files.items():
            parts = path.removeprefix(inside).split("/")
            for i in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = inside + "/".join(parts[:i])
                entries[folder] = {"type": "directory", "path": folder, "oid": oid_of(folder.encode()), "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path, value)
        return list(entries.values())

    def paths(self, data: bytes, kind: str, name: str, rev: str) -> None:
        if (commit_files := self.find_commit(kind, name, rev)) is not None:
            is_json = "json" in (self.headers.get("Content-Type") or "")
            requested_paths = json.loads(data)["paths"] if is_json else parse_qs(data.decode())["paths"]
            self.send(200, [self.entry(p, v) for p, v in commit_files[1].items() if p in requested_paths])

    def entry(self, path: str, value: bytes | str) -> dict:
        size = len(self.hub.content(value))
        lfs = {"lfs": {"oid": value, "size": size, "pointerSize": 134}} if isinstance(value, str) else {}
        return {"type": "file", "path": path, "size": size, "oid": oid_of(value), **lfs}

    def resolve(self, _data: bytes, name: str, rev: str, path: str, kind: str = "models") -> None:
        if (commit_files := self.find_commit(kind, name, rev)) is None:
            return None
        oid, files = commit_files
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=oid)
        blob, value = self.hub.content(files[path]), files[path]
        headers = {"ETag": f'"{oid_of(value)}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if isinstance(value, str):
            headers |= {"X_Linked_Etag": f'"{value}"', "X_Linked_Size": str(len(blob))}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(blob) - 1), len(blob) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(blob)}"
            return self.send(206, blob[first : last + 1], **headers)
        return self.send(200, blob, **headers)

    def find_repo(self, kind: str, name: str) -> Any:
        """Return a repository; if there is no access to it, send the error and return None."""
        repo, has_access = self.hub.repos.get((kind, name)), self.token() == self.hub.token
        if repo is None or (repo.private and not has_access):
            return self.refuse(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        return repo

    def find_commit(
        self, kind: str, name: str, rev: str, gated: bool = False
    ) -> tuple[str, dict[str, bytes | str]] | None:
        """Return a commit and its files, or send the error and return None. `gated` allows gated repositories."""
        if (repo := self.find_repo(kind, name)) is None:
            return None
        if repo.gated and not gated:
            return self.refuse(403, "GatedRepo", "Access is restricted.")
        if (oid := repo.at(rev)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return oid, repo.commits[oid]


def oid_of(value: bytes | str) -> str:
    """Return the git object id of a file; of a large file the checksum."""
    return value if isinstance(value, str) else hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()


ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", r"/api/(?P<kind>models|datasets)", "list_repos"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", "batch"),
    ("POST", rf"/api/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"/api/{REPO}/branch/(?P<rev>[^/]+)", "branch"),
    ("POST", rf"/api/{REPO}/paths-info/(?P<rev>[^/]+)", "paths"),
    ("GET", rf"/api/{REPO}/refs", "refs"),
    ("GET", rf"/api/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<rev>[^/]+))?", "info"),
    ("GET", r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
