"""An in-memory Hub on localhost: the requests of huggingface_hub, transformers and datasets, with injected faults.

Use `with Hub() as hub:` and `pointed(hub, monkeypatch, folder)` in this process, `hub.environment(folder)` for another.
"""

import hashlib
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_answers import Answers

LFS = (".safetensors", ".arrow", ".bin", ".parquet", ".png", ".gguf", ".h5", ".msgpack", ".onnx", ".pt")


@dataclass
class Fault:
    """A fault that is injected into matching requests.

    match:  regular expression, searched in "METHOD /path"
    status: HTTP status of the error that is sent; 0: none
    cut:    the connection is closed before the request is handled
    lost:   the request is handled, and the connection is closed without a response
    slow:   seconds of delay before the request is handled
    times:  number of requests that fail
    """

    match: str
    status: int = 0
    cut: bool = False
    lost: bool = False
    slow: float = 0.0
    times: int = 1


@dataclass
class Repo:
    """Files of each commit; a large file is represented by its checksum, the key in `Hub.objects`."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes | str]) -> str:
        """Add a commit and return its id."""
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {id(self)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def at(self, revision: str) -> str | None:
        """Return the commit of a branch, or the commit with an id."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server and its content.

    repos:    (kind, name) -> repository
    objects:  checksum -> large file
    uploaded: checksums of the uploaded large files, in order
    requests: (method, path) of each request
    faults:   injected faults
    """

    token, reader, user = "hf_test", "hf_reader", "tester"

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Answers,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a killed client is no error of the server
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(
        self,
        kind: str,
        name: str,
        files: dict[str, bytes],
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Create a repository of "models" or "datasets", or add a commit with exactly these files; return its id."""
        repo = self.repos.setdefault((kind, name), Repo())
        repo.private, repo.gated = private, gated
        return repo.commit(branch, {path: self.to_stored(path, content) for path, content in files.items()})

    def to_stored(self, path: str, content: bytes) -> bytes | str:
        """Return a file as a commit stores it: a large file as its checksum."""
        if not path.endswith(LFS):
            return content
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        return oid

    def content(self, value: bytes | str) -> bytes:
        """Return the bytes of a file of a commit."""
        return self.objects[value] if isinstance(value, str) else value

    def fault(self, request: str) -> Fault | None:
        """Return the fault for a request, and count it."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, request):
                fault.times -= 1
                return fault
        return None

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment variables for a separate process whose caches are in `folder`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }


def pointed(hub: Hub, monkeypatch: Any, folder: Path) -> None:
    """Direct the libraries of this process to this Hub; they read its address when they are imported."""
    import datasets
    import huggingface_hub
    import transformers.utils.hub

    huggingface_hub.hf_hub_download  # noqa: B018  lazily imported, as are the constants below
    for name, value in hub.environment(folder).items():
        monkeypatch.setenv(name, value)
    names = {"ENDPOINT", "HF_ENDPOINT", "HUGGINGFACE_CO_RESOLVE_ENDPOINT"}
    for module in [m for n, m in sys.modules.items() if n.startswith(("huggingface_hub", "transformers", "datasets"))]:
        for name in names & vars(module).keys():
            monkeypatch.setattr(module, name, hub.endpoint)
    constants = huggingface_hub.constants
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    template = hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", template)
