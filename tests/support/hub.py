"""A server of our own that speaks the hub's protocol, as far as a download asks."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository, ``o/tiny``; the first answer with weights is cut off in the middle."""

    def __init__(self, folder: Path) -> None:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.cut, self.ranges = True, list[str]()
        super().__init__(("127.0.0.1", 0), _Answers)

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Return the variables of a process that takes this for the hub."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
            **changes,
        }


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a folder as the repository."""
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        """Answer with the repository's facts or one of its files."""
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/o/tiny"):
            listed = [self.facts(name) for name in self.server.files]
            facts = [{"type": "file", "path": f["rfilename"], **f} for f in listed]
            whole = {"id": "o/tiny", "sha": SHA, "siblings": listed}
            self.send(json.dumps(facts if "/tree/" in path else whole).encode(), {}, body=body)
            return
        if path.startswith("/api/models/"):
            self.send(b"", {"X-Error-Code": "RepoNotFound"}, body=body, code=404)
            return
        name = path.partition(f"/resolve/{SHA}/")[2] or path.rpartition("/")[2]
        content = self.server.files.get(name)
        if content is None:
            self.send(b"", {"X-Error-Code": "EntryNotFound"}, body=body, code=404)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if body and asked and not asked.startswith("bytes=0-0"):
            self.server.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.send(content[first:], headers, body=True, code=206)
            return
        cut = body and self.server.cut and name.endswith(".safetensors")
        self.server.cut = self.server.cut and not cut
        self.send(content, headers, body=body, cut=cut)

    def facts(self, name: str) -> dict[str, object]:
        """Return what the hub lists of a file."""
        content = self.server.files[name]
        facts: dict[str, object] = {"rfilename": name, "size": len(content), "oid": "b" * 40}
        if name.endswith(".safetensors"):
            sha = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 130}
        return facts

    def send(
        self, content: bytes, headers: dict[str, str], *, body: bool, code: int = 200,
        cut: bool = False,
    ) -> None:  # fmt: skip
        """Send an answer, or half of one."""
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
