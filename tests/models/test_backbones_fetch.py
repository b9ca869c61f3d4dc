"""`karmma backbones fetch hf:...` against a server of our own that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.extra

SHA = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository; the first answer with weights is cut off in the middle."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.cut, self.ranges = True, list[str]()
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    """What the hub answers, as far as a download asks."""

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
        name = path.rpartition("/")[2]
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    save_file({"weight": torch.randn(6_000_000)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Tiny\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(hub: Hub, home: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        **changes,
    }
    command = [sys.executable, "-m", "karmma_pipeline.cli", "backbones", "fetch", "hf:o/tiny"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_download_that_was_cut_off_goes_on_and_no_pickle_is_taken(
    hub: Hub, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    made = fetch(hub, tmp_path / "home")
    assert made.returncode == 0, made.stderr
    where = Path(made.stdout.removeprefix("weights: ").strip())
    assert (where / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert sorted(path.name for path in where.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert hub.ranges  # the second half alone was asked for


def test_offline_nothing_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    made = fetch(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert made.returncode == 1
    assert "o/tiny: the download failed" in made.stderr
    assert not hub.ranges
