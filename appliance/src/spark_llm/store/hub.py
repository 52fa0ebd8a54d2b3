"""The process that fetches from the hub, with huggingface_hub (2.4).

``python -m spark_llm.store.hub`` reads one request from its standard input and writes events to its standard output,
one JSON object a line. It is a process of its own for three reasons: the library reads its settings when it is
imported, a native transfer that hangs (huggingface_hub#4520, xet-core#883) can only be stopped by killing its process,
and the service never has the token. It ends when its standard input closes, so it never outlives who started it.

Files come through the library's own ``http_get`` and ``xet_get``, which continue a partial file; its
``hf_hub_download`` would throw the part away (2.4.0, ``_download_to_tmp_and_move``).
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import huggingface_hub.constants as hub_constants
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import HfFileMetadata, http_get, xet_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._runtime import is_xet_available

from spark_llm import __version__
from spark_llm.store import durable
from spark_llm.store.credentials import check_endpoint, read_token
from spark_llm.store.hashing import hash_file
from spark_llm.store.layout import Incoming
from spark_llm.store.receipt import RemoteFile
from spark_llm.store.snapshots import note
from spark_llm.store.stamp import Stamp
from spark_llm.store.trouble import Trouble, describe

_CHUNK = 2**20
"""Bytes between two signs of life. The library's 10 MiB would look like a stall on a slow line."""
_REPORT_EVERY_S = 0.2
_TIMEOUT_S = 10.0


class Output:
    """Events to standard output, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def send(self, event: str, **values: Any) -> None:  # noqa: ANN401  any JSON value
        """Write one event."""
        line = json.dumps({"event": event, **values}, separators=(",", ":"))
        with self._lock:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


class Ticker:
    """Byte counts of one file, reported a few times a second."""

    def __init__(self, output: Output, event: str, path: str) -> None:
        self._output, self._event, self._path = output, event, path
        self._done, self._reported = 0, 0.0

    def advance(self, count: int) -> None:
        """``count`` more bytes are done; negative when the server made the library start over."""
        self._done += count
        now = time.monotonic()
        if now - self._reported >= _REPORT_EVERY_S:
            self._reported = now
            self._output.send(self._event, path=self._path, done=self._done)


def bar_class(advance: Callable[[int], None]) -> type:
    """A ``tqdm_class`` that counts instead of drawing."""

    class Bar:
        def __init__(
            self, *_: object, total: float | None = None, initial: float = 0, **__: object
        ) -> None:
            self.total, self.n = total, initial
            advance(int(initial))

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            return

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire; a sign of life while Xet rebuilds a file, and counted once only."""
            del n
            advance(0)

        def set_postfix_str(self, *_: object, **__: object) -> None:
            return

        set_transfer_postfix_str = set_description_str = set_description = refresh = close = (
            set_postfix_str
        )

    return Bar


class Hub:
    """One model at one hub.

    Args:
        model: ``ORG/NAME``.
        endpoint: base URL.
        token: None asks without one.
    """

    def __init__(self, model: str, endpoint: str, token: str | None, output: Output) -> None:
        self.model, self.endpoint, self._output = model, endpoint, output
        self._token: str | bool = token or False
        self._api = HfApi(
            endpoint=endpoint,
            token=self._token,
            library_name="spark-llm",
            library_version=__version__,
        )

    def plan(self, revision: str) -> None:
        """Send the commit that ``revision`` stands for, its files with the hub's hashes, and what its indexes name."""
        commit = self._api.model_info(self.model, revision=revision or None, timeout=_TIMEOUT_S).sha
        if commit is None:
            raise ValueError("the hub's answer names no commit")
        files = [
            _remote_file(entry)
            for entry in self._api.list_repo_tree(self.model, revision=commit, recursive=True)
            if isinstance(entry, RepoFile)
        ]
        indexes = {
            file.path: self._shards(commit, file)
            for file in files
            if file.path.endswith(".safetensors.index.json")
        }
        self._output.send(
            "tree", commit=commit, files=[file.to_json() for file in files], indexes=indexes
        )

    def _shards(self, commit: str, index: RemoteFile) -> list[str]:
        content = BytesIO()
        metadata, headers = self._locate(commit, index.path)
        http_get(metadata.location, content, headers=headers, tqdm_class=bar_class(lambda _: None))
        weight_map = json.loads(content.getvalue()).get("weight_map", {})
        return sorted({str(shard) for shard in weight_map.values()})

    def transfer(
        self, commit: str, incoming: Incoming, files: list[RemoteFile], workers: int
    ) -> None:
        """Bring ``files``: each is downloaded, flushed, hashed and put in its place; one that fails stops no other."""
        incoming.parts.mkdir(parents=True, exist_ok=True)
        journal = threading.Lock()

        def bring(file: RemoteFile) -> None:
            try:
                stamp = self._bring(commit, incoming, file)
            except Exception as error:  # noqa: BLE001  the library's errors have no common root
                self._output.send("failed", path=file.path, **asdict(self.describe(error)))
                return
            if stamp is not None:
                with journal:
                    note(incoming, {file.path: stamp})
                self._output.send("verified", path=file.path, size=file.size)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(bring, files))

    def _bring(self, commit: str, incoming: Incoming, file: RemoteFile) -> Stamp | None:
        part = incoming.part(file.path)
        self._download(commit, part, file)
        durable.sync_file(part)
        digests = hash_file(part, Ticker(self._output, "hashing", file.path).advance)
        if not file.accepts(digests):
            self._output.send(
                "corrupt", path=file.path, part=str(part), size=digests.size, sha256=digests.sha256
            )
            return None
        target = incoming.path / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
        durable.sync_folder(target.parent)
        return replace(Stamp.of(target), sha256=digests.sha256)

    def _download(self, commit: str, part: Path, file: RemoteFile) -> None:
        done = part.stat().st_size if part.exists() else 0
        if done > file.size:
            part.unlink()
            done = 0
        part.touch()
        if done == file.size:
            return
        ticker = Ticker(self._output, "bytes", file.path)
        metadata, headers = self._locate(commit, file.path)
        bar = bar_class(ticker.advance)
        if metadata.xet_file_data is not None and is_xet_available():
            self._output.send("xet", path=file.path)
            xet_get(
                incomplete_path=part,
                xet_file_data=metadata.xet_file_data,
                headers=build_hf_headers(
                    token=self._token, library_name="spark-llm", library_version=__version__
                ),
                expected_size=file.size,
                tqdm_class=bar,
            )
            return
        with part.open("r+b") as stream:
            stream.seek(done)
            http_get(
                metadata.location,
                stream,
                resume_size=done,
                headers=headers,
                expected_size=file.size,
                tqdm_class=bar,
            )

    def _locate(self, commit: str, path: str) -> tuple[HfFileMetadata, dict[str, str]]:
        """Where a file's content is, and the headers to ask for it with."""
        url = hf_hub_url(self.model, path, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(
            token=self._token, library_name="spark-llm", library_version=__version__
        )
        metadata = get_hf_file_metadata(
            url, token=self._token, endpoint=self.endpoint, retry_on_errors=True
        )
        if urlsplit(metadata.location)[:2] != urlsplit(url)[:2]:
            headers.pop(
                "authorization", None
            )  # a signed CDN address is authorization enough, and not the hub
        headers["accept-encoding"] = "identity"  # a compressed body has no length to continue from
        return metadata, headers

    def describe(self, error: BaseException) -> Trouble:
        """``error`` in the appliance's words, without the token and without signed addresses."""
        trouble = describe(error, self.model, self.endpoint, authenticated=bool(self._token))
        message = re.sub(r"\?\S+", "", trouble.message)
        if isinstance(self._token, str):
            message = message.replace(self._token, "***")
        return Trouble(trouble.reason, message, trouble.hint, trouble.retry, trouble.wait_s)


def _remote_file(entry: RepoFile) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, git_sha1=entry.blob_id)


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def serve(request: dict[str, Any], output: Output) -> int:
    """Answer one request; 0 if it was, 1 after a ``failed`` event without a path."""
    hub_constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    endpoint = request["endpoint"] or hub_constants.ENDPOINT
    hub = Hub(request["model"], endpoint, None, output)
    try:
        token = read_token(request["token_file"], os.environ)
        check_endpoint(endpoint, token)
        hub = Hub(request["model"], endpoint, token, output)
        if request["op"] == "plan":
            hub.plan(request["revision"])
        else:
            files = [RemoteFile.from_json(item) for item in request["files"]]
            hub.transfer(
                request["commit"], Incoming(Path(request["folder"])), files, request["workers"]
            )
    except Exception as error:  # noqa: BLE001  whatever it was, the parent must hear of it
        output.send("failed", path="", **asdict(hub.describe(error)))
        return 1
    output.send("end")
    return 0


def main() -> int:
    """Serve the request on standard input."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    return serve(request, Output())


if __name__ == "__main__":
    sys.exit(main())
