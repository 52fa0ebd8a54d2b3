"""A hub on loopback: as much of the Hugging Face Hub's HTTP protocol as huggingface_hub needs, with faults on demand.

Two servers on two ports, as at the real one: the hub itself, and the CDN that large files are redirected to with signed
addresses. ``LocalHub`` runs both in threads; ``python tests/hub/server.py FOLDER`` serves a folder as one model in a
process of its own, for benchmarks.

Over 400 lines because the protocol and its faults are one program, which benchmarks start by its file name.
"""

import fnmatch
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 1024
"""Files of at least this size, in bytes, are LFS files here."""
PAGE = 20
"""Tree entries per page; the rest follows by ``Link: rel="next"``."""
SIGNATURE = "X-Amz-Signature=never-log-this"


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: ``stall``, ``reset``, ``truncate``, ``corrupt``, ``trickle``, ``xet_stall``, ``html`` or ``status``.
        path: glob over file names; ``api:*`` is the model's own pages.
        times: how often, then it is over.
        after: bytes that still come, of ``stall``, ``reset`` and ``truncate``.
        status: of ``status``.
        headers: sent along with ``status``.
        method: ``GET``, ``HEAD`` or ``*``.
    """

    kind: str
    path: str = "*.safetensors"
    times: int = 1
    after: int = 0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "GET"


@dataclass
class Model:
    """One repository: commits, and what the branches stand for."""

    commits: dict[str, dict[str, bytes | Path]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass(frozen=True)
class Seen:
    """One request, as it came."""

    server: str
    method: str
    path: str
    file: str
    range: str
    authorization: str
    sent: int = 0


class LocalHub:
    """The server with its models, faults and log."""

    token = "hf_local_token_for_tests"  # noqa: S105  nobody's

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._servers = [self._serve(_HubHandler), self._serve(_CdnHandler)]
        self.endpoint, self.cdn = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def _serve(self, handler: type["_Handler"]) -> ThreadingHTTPServer:
        bound = type(handler.__name__, (handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        server.daemon_threads = True
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return server

    def close(self) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, model: str, files: dict[str, bytes | Path], *, branch: str = "main") -> str:
        """A new commit of ``model`` that ``branch`` moves to; its 40-hex id."""
        repository = self.models.setdefault(model, Model())
        content = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(files.items()):
            content.update(f"{name}\0{digests(data)}".encode())
        commit = content.hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def fault(self, kind: str, path: str = "*.safetensors", **values: Any) -> Fault:  # noqa: ANN401  Fault's fields
        fault = Fault(kind, path, **values)
        self.faults.append(fault)
        return fault

    def take(self, method: str, path: str) -> Fault | None:
        """The fault for this request, counted down."""
        with self._lock:
            for fault in self.faults:
                if (
                    fault.times > 0
                    and fault.method in ("*", method)
                    and fnmatch.fnmatchcase(path, fault.path)
                ):
                    fault.times -= 1
                    return fault
        return None

    def peek(self, kind: str, path: str) -> bool:
        return any(
            f.kind == kind and f.times > 0 and fnmatch.fnmatchcase(path, f.path)
            for f in self.faults
        )

    def log(self, seen: Seen) -> None:
        with self._changed:
            self.seen.append(seen)
            self._changed.notify_all()

    def wait_for(self, file: str, timeout_s: float = 20.0) -> None:
        """Until content of ``file`` is being sent."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.downloads(file), timeout_s), (
                f"nobody asked for {file}"
            )

    def downloads(self, file: str) -> list[Seen]:
        """GET requests that sent content of ``file``."""
        return [
            seen for seen in self.seen if seen.method == "GET" and seen.file == file and seen.sent
        ]


def digests(data: bytes | Path) -> tuple[int, str, str]:
    """Size, git blob id and sha256."""
    if isinstance(data, Path):
        sha256 = hashlib.sha256()
        with data.open("rb") as stream:
            while block := stream.read(2**22):
                sha256.update(block)
        return data.stat().st_size, "0" * 40, sha256.hexdigest()
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    return len(data), git, hashlib.sha256(data).hexdigest()


_known: dict[Path, tuple[int, str, str]] = {}


def cached_digests(data: bytes | Path) -> tuple[int, str, str]:
    if isinstance(data, bytes):
        return digests(data)
    if data not in _known:
        _known[data] = digests(data)
    return _known[data]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    server_name = ""
    wbufsize = 2**16

    def log_message(self, *_: object) -> None:
        return

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def note(self, file: str, sent: int = 0) -> None:
        self.hub.log(
            Seen(
                self.server_name, self.command, self.path, file,
                self.headers.get("Range", ""), self.headers.get("Authorization", ""), sent,
            )
        )  # fmt: skip

    def reply(self, status: int, body: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.wfile.flush()

    def reply_json(self, value: object, **headers: str) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(
            status,
            json.dumps({"error": message}).encode(),
            X_Error_Code=code,
            X_Error_Message=message,
        )

    def reset(self) -> None:
        """Close so that the client sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def common_fault(self, fault: Fault | None) -> bool:
        if fault is None:
            return False
        if fault.kind == "status":
            self.reply(fault.status, b'{"error": "fault"}', **fault.headers)
        elif fault.kind == "html":
            self.reply(200, b"<html>please log in</html>", Content_Type="text/html")
        else:
            return False
        return True

    def send_content(
        self, file: str, data: bytes | Path, fault: Fault | None, **headers: str
    ) -> None:
        """The content, from where Range says, with whatever goes wrong on the way."""
        if self.common_fault(fault):
            return
        size = cached_digests(data)[0]
        start, end = 0, size
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(size, int(last) + 1) if last else size
            if start >= size:
                self.reply(416, Content_Range=f"bytes */{size}")
                return
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        self.send_response(206 if start or end < size else 200)
        for name, value in {
            **headers,
            "Content_Length": str(end - start),
            "Accept_Ranges": "bytes",
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.note(file, end - start)
        self.wfile.flush()
        if isinstance(data, Path):
            with data.open("rb") as stream:
                self.connection.sendfile(stream, start, end - start)
            return
        self.send_bytes(data[start:end], fault)

    def send_bytes(self, body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        after = fault.after if fault else 0
        match kind:
            case "corrupt":
                self.wfile.write(bytes(byte ^ 0xFF for byte in body[:16]) + body[16:])
            case "trickle":
                step = max(1, len(body) // 20)
                for at in range(0, len(body), step):
                    self.wfile.write(body[at : at + step])
                    self.wfile.flush()
                    self.hub.released.wait(0.1)
            case "stall":
                self.wfile.write(body[:after])
                self.wfile.flush()
                self.hub.released.wait(60)
                self.close_connection = True
            case "reset":
                self.wfile.write(body[:after])
                self.wfile.flush()
                time.sleep(0.05)  # a reset overtakes bytes that are still under way
                self.reset()
            case "truncate":
                self.wfile.write(body[:after])
                self.close_connection = True
            case _:
                self.wfile.write(body)
        if not self.close_connection:
            self.wfile.flush()


class _CdnHandler(_Handler):
    server_name = "cdn"

    def answer(self) -> None:
        sha256 = urlsplit(self.path).path.strip("/")
        for model in self.hub.models.values():
            for files in model.commits.values():
                for name, data in files.items():
                    if cached_digests(data)[2] == sha256:
                        self.send_content(name, data, self.hub.take(self.command, name))
                        return
        self.reply(404)


class _HubHandler(_Handler):
    server_name = "hub"

    def answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.note("")
        if parts[:2] == ["api", "models"]:
            self._api(parts[2:], url.query)
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        elif parts[0] == "cas":
            self.hub.released.wait(60)
            self.close_connection = True
        elif parts == ["api", "whoami-v2"]:
            self._whoami()
        else:
            self.refuse(404, "NotFound", "no such page")

    def _whoami(self) -> None:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            self.reply_json({"name": "tester", "type": "user", "auth": {}})
        else:
            self.refuse(401, "", "Invalid credentials in Authorization header")

    def _model(self, name: str) -> Model | None:
        """The model if this request may see it; otherwise the refusal is sent."""
        model = self.hub.models.get(name)
        given = self.headers.get("Authorization", "")
        if given and given != f"Bearer {self.hub.token}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif model is None or (model.private and not given):
            self.refuse(404 if given else 401, "RepoNotFound", "Repository not found")
        else:
            return model
        return None

    def _api(self, parts: list[str], query: str) -> None:
        words = {"revision", "tree", "xet-read-token"}
        at = next((n for n, part in enumerate(parts) if part in words), len(parts))
        name, rest = "/".join(parts[:at]), parts[at:]
        if self.common_fault(self.hub.take(self.command, f"api:{name}")):
            return
        model = self._model(name)
        if model is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = model.branches.get(revision, revision)
        if commit not in model.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif rest[:1] == ["tree"]:
            self._tree(model.commits[commit], name, commit, query)
        elif rest[:1] == ["xet-read-token"]:
            self.reply_json(
                {
                    "casUrl": f"{self.hub.endpoint}/cas",
                    "exp": int(time.time()) + 3600,
                    "accessToken": "x",
                },
                X_Xet_Cas_Url=f"{self.hub.endpoint}/cas",
                X_Xet_Access_Token="x",  # noqa: S106  nobody's
                X_Xet_Token_Expiration=str(int(time.time()) + 3600),
            )
        else:
            siblings = [{"rfilename": path} for path in model.commits[commit]]
            gated = "manual" if model.gated else False
            self.reply_json(
                {"id": name, "modelId": name, "sha": commit, "gated": gated, "siblings": siblings}
            )

    def _tree(self, files: dict[str, bytes | Path], name: str, commit: str, query: str) -> None:
        values = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
        start = int(values.get("cursor", "0"))
        entries = []
        for path in sorted(files)[start : start + PAGE]:
            size, git, sha256 = cached_digests(files[path])
            entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": git}
            if size >= LFS_FROM:
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        headers = {}
        if start + PAGE < len(files):
            url = f"{self.hub.endpoint}/api/models/{name}/tree/{commit}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.reply_json(entries, **headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        model = self._model(name)
        if model is None:
            return
        if model.gated and not self.headers.get("Authorization"):
            self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
            return
        if model.gated and name not in getattr(self.hub, "accepted", ()):
            self.refuse(
                403,
                "GatedRepo",
                f"Access to model {name} is restricted and you are not in the list.",
            )
            return
        commit = model.branches.get(revision, revision)
        data = model.commits.get(commit, {}).get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        size, git, sha256 = cached_digests(data)
        if size < LFS_FROM:
            fault = self.hub.take(self.command, path)
            self.send_content(path, data, fault, ETag=f'"{git}"', X_Repo_Commit=commit)
            return
        if self.command == "HEAD" and self.common_fault(self.hub.take("HEAD", path)):
            return
        headers = {
            "Location": f"{self.hub.cdn}/{sha256}?{SIGNATURE}",
            "ETag": f'"{sha256}"',
            "X_Linked_Etag": f'"{sha256}"',
            "X_Linked_Size": str(size),
            "X_Repo_Commit": commit,
        }
        if self.hub.peek("xet_stall", path):
            headers["X_Xet_Hash"] = sha256
            headers["X_Xet_Refresh_Route"] = (
                f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
            )
        self.reply(302, b"", **headers)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub for the length of a ``with``."""
    hub = LocalHub()
    try:
        yield hub
    finally:
        hub.close()


def main(folder: Path) -> None:
    """Serve ``folder`` as ``bench/model`` until standard input closes; prints the endpoint."""
    with local_hub() as hub:
        files: dict[str, bytes | Path] = {
            path.name: path if path.stat().st_size >= LFS_FROM else path.read_bytes()
            for path in folder.iterdir()
        }
        hub.add("bench/model", files)
        sys.stdout.write(f"{hub.endpoint}\n")
        sys.stdout.flush()
        os.read(0, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
