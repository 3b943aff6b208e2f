"""A small model hub on loopback for the real huggingface_hub client. It can fail on request.

    with serve() as hub, client(hub, tmp_path / "cache"):
        commit = hub.add("org/name", {"config.json": b"{}", "model.safetensors": weights})
        hub.cut("model.safetensors", after=1000)
        streamllm.load("org/name")
        assert hub.asked == [...]

It answers the requests that the client sends to huggingface.co: metadata of files and files
(`/NAME/resolve/REVISION/FILE`, HEAD and GET, with the headers for etag, commit and size), ranges, and the API's
model info and lists of files. Large files are redirected to another origin, as the real hub does it to its
CDN. There are branches, tags, commits, pull requests, renamed, private and gated models, and the X-Error-Code
of each refusal.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

# The hub stores these files outside git and serves them through the redirect.
LARGE_FILES = (".safetensors", ".bin", ".model")


@dataclass
class Request:
    """A request, and the status and file name of the answer."""

    method: str
    path: str
    range: str | None = None
    token: str | None = None
    status: int = 0
    file: str = ""

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (f" {self.range}" if self.range else "")


@dataclass
class Fault:
    """How the next `times` requests whose path contains `part` fail."""

    part: str
    times: int
    methods: tuple[str, ...]
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    reset: bool = False


class Hub:
    """The models, the requests so far, and the faults to come.

    A model has revisions: names of branches, tags, pull requests and commits, each with its commit.
    """

    def __init__(self) -> None:
        self.url = self.cdn_url = ""
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.private: dict[str, str] = {}  # name -> the token that may see it
        self.gated: dict[str, str] = {}  # name -> the token whose account accepted the licence
        self.moved: dict[str, str] = {}  # old name -> new name
        self._refs: dict[str, dict[str, str]] = {}
        self._files: dict[tuple[str, str], dict[str, bytes]] = {}
        self._blobs: dict[str, bytes] = {}

    def add(self, name: str, files: Path | Mapping[str, bytes], *, revision: str = "main") -> str:
        """Adds a commit with these files to the model `name`, and lets `revision` point to it."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        digest = hashlib.sha1(name.encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + b"\0" + data)
        commit = digest.hexdigest()
        self._files[name, commit] = dict(files)
        refs = self._refs.setdefault(name, {})
        refs[revision] = refs[commit] = refs[commit[:7]] = commit
        self._blobs.update((hashlib.sha256(data).hexdigest(), data) for data in files.values())
        return commit

    @property
    def asked(self) -> list[str]:
        """The requests since the last `forget`, such as "GET cdn:model.safetensors"."""
        return [str(request) for request in self.requests]

    @property
    def fetched(self) -> list[str]:
        """The names of the files that were sent, each once."""
        return sorted(
            {r.file for r in self.requests if r.method == "GET" and r.file and r.status in (200, 206)}
        )

    def forget(self) -> None:
        self.requests.clear()

    def fail(
        self,
        part: str,
        status: int,
        *,
        times: int = 1_000_000,
        methods: tuple[str, ...] = ("HEAD", "GET"),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next requests whose path contains `part` with `status`."""
        self.faults.append(Fault(part, times, methods, status, headers or {}))

    def cut(self, part: str, after: int, *, times: int = 1, reset: bool = False) -> None:
        """Break the next downloads after `after` bytes: close the connection, or reset it."""
        self.faults.append(Fault(part, times, ("GET",), cut_after=after, reset=reset))

    # For the handler

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and method in fault.methods and fault.part in path:
                fault.times -= 1
                return fault
        return None

    def commit(self, name: str, revision: str) -> str | None:
        return self._refs[name].get(revision)

    def known(self, name: str) -> bool:
        return name in self._refs

    def files(self, name: str, commit: str) -> dict[str, bytes]:
        return self._files[name, commit]

    def blob(self, sha256: str) -> bytes | None:
        return self._blobs.get(sha256)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_cdn = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        raw = urlsplit(self.path).path
        path = ("cdn:" + raw.rpartition("/")[2]) if self.is_cdn else unquote(raw)
        authorization = self.headers.get("Authorization", "")
        self._request = Request(
            self.command, path, self.headers.get("Range"), authorization.removeprefix("Bearer ") or None
        )
        if raw != "/api/agent-harnesses":  # the client asks for it once a day
            self.hub.requests.append(self._request)
        self._fault = self.hub.fault(self.command, path)
        if self._fault is not None and self._fault.status:
            self._answer(self._fault.status, headers=self._fault.headers)
        elif self.is_cdn:
            data = self.hub.blob(raw.split("/")[1])
            self._request.file = raw.rpartition("/")[2]
            self._answer(403) if data is None else self._body(
                data,
                {
                    "ETag": f'"{raw.split("/")[1]}"',
                    "Content-Disposition": f'attachment; filename="{self._request.file}";',
                },
            )
        elif raw.startswith("/api/models/"):
            self._api(raw.removeprefix("/api/models/"))
        elif "/resolve/" in raw:
            name, _, rest = raw[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._resolve(unquote(name), unquote(revision), unquote(file), raw)
        else:
            self._answer(404)

    def _refused(self, name: str, *, files: bool) -> bool:
        token = self._request.token
        if not self.hub.known(name) or (name in self.hub.private and token != self.hub.private[name]):
            # Without permission, the real hub does not reveal that a private model exists.
            self._answer(404 if token else 401, "RepoNotFound", "Repository not found")
        elif files and name in self.hub.gated and token != self.hub.gated[name]:
            self._answer(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return False
        return True

    def _resolve(self, name: str, revision: str, file: str, raw: str) -> None:
        if name in self.hub.moved:
            there = raw.replace(f"/{name}/", f"/{self.hub.moved[name]}/", 1)
            self._answer(307, headers={"Location": there})
            return
        if self._refused(name, files=True):
            return
        commit = self.hub.commit(name, revision)
        if commit is None:
            self._answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        data = self.hub.files(name, commit).get(file)
        if data is None:
            self._answer(404, "EntryNotFound", "Entry not found", headers={"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LARGE_FILES):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
                "ETag": f'"{digest[:32]}"',
            }
            self._answer(
                302,
                headers=headers
                | {"Location": f"{self.hub.cdn_url}/{digest}/{file.rpartition('/')[2]}?signed=1"},
            )
        else:
            self._request.file = file
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._body(data, headers | {"ETag": f'"{blob}"'})

    def _api(self, rest: str) -> None:
        parts = [unquote(part) for part in rest.split("/")]
        cut = next((i for i, part in enumerate(parts) if part in ("revision", "tree")), len(parts))
        name = "/".join(parts[:cut])
        if self._refused(name, files=False):
            return
        revision = parts[cut + 1] if cut + 1 < len(parts) else "main"
        commit = self.hub.commit(name, revision)
        if commit is None:
            self._answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = self.hub.files(name, commit)
        answer: Any = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": [{"rfilename": file} for file in files],
        }
        if parts[cut : cut + 1] == ["tree"]:
            folder = "".join(f"{part}/" for part in parts[cut + 2 :])
            files = {file: data for file, data in files.items() if file.startswith(folder)}
            if folder and not files:
                self._answer(404, "EntryNotFound", f"{folder} does not exist")
                return
            answer = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                | (
                    {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                    if file.endswith(LARGE_FILES)
                    else {}
                )
                for file, data in files.items()
            ]
        self._body(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self._request.status = status
        body = message.encode()
        self.send_response(status)
        for key, value in {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self, data: bytes, headers: Mapping[str, str]) -> None:
        status, start = 200, 0
        if self._request.range:
            first, _, last = self._request.range.removeprefix("bytes=").partition("-")
            status, start, total = 206, int(first), len(data)
            data = data[start : int(last) + 1 if last else None]
            headers = {**headers, "Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}"}
        self._request.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault is None or self._fault.cut_after is None:
            self.wfile.write(data)
            return
        self.wfile.write(data[: self._fault.cut_after])
        self.wfile.flush()
        self.close_connection = True
        if self._fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client closed the connection, or we did


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub, and its CDN at another port, for the duration of the with statement."""
    hub = Hub()
    servers = []
    for is_cdn in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextmanager
def client(hub: Hub | str, cache: Path, *, offline: bool = False) -> Iterator[None]:
    """huggingface_hub in this process uses `hub` and `cache`, has no token, and does not sleep.

    It reads its environment when it is imported, so its constants are changed here. `environment` is for new
    processes.
    """
    import pytest
    from huggingface_hub import close_session, constants

    url = hub if isinstance(hub, str) else hub.url
    with pytest.MonkeyPatch.context() as patch:
        for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(key, raising=False)
        patch.setenv("NO_PROXY", "*")
        patch.setenv("no_proxy", "*")
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr("time.sleep", lambda seconds: None)
        close_session()  # a session that was opened before NO_PROXY was set may use a proxy
        yield


def environment(hub: Hub | None, home: Path, **more: str) -> dict[str, str]:
    """The environment variables of a process that uses `hub`, or is offline without one."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
    }
    kept |= {"HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept |= {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
    return kept | more
