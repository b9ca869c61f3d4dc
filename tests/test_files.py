import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from karmma_pipeline import files
from karmma_pipeline.errors import KarmmaError


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fail_half_way() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KarmmaError, match="disk or your quota is full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Can't decrement id ref count (file write failed: errno = 122, error", "quota is full"),
        ("Can't write data (file write failed: errno = 5, error", "file system error"),
        ("Error while serializing: I/O error: No space left (os error 28)", "quota is full"),
        ("unable to truncate (errno = 30, error message = 'Read-only", "cannot be written"),
    ],
)
def test_libraries_that_hide_the_error_number_are_understood(
    tmp_path: Path, text: str, sentence: str
) -> None:
    for error in (RuntimeError(text), OSError(text)):
        with pytest.raises(KarmmaError, match=sentence), files.disk_errors(tmp_path / "a"):
            raise error
    with pytest.raises(RuntimeError, match="own"), files.disk_errors(tmp_path / "a"):
        raise RuntimeError("our own mistake")


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
def test_what_we_write_follows_the_umask(tmp_path: Path, umask: int) -> None:
    write = (
        "import os, pathlib, sys\n"
        "os.umask(int(sys.argv[2]))\n"
        "from support.any_store import fill_store\n"
        "from karmma_pipeline import files\n"
        "root = pathlib.Path(sys.argv[1]) / 'new'\n"
        "fill_store(root / 'store')\n"
        "files.write_text(root / 'folder/old', 'x')\n"
        "(root / 'folder/old').chmod(0o600)\n"
        "files.write_text(root / 'folder/old', 'y')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", write, tmp_path, str(umask)], check=True, env=environment)
    written = list((tmp_path / "new").rglob("*"))
    assert len(written) > 40
    for path in written:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_equal_values_are_equal_bytes(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"x": 1, "y": 2})
    files.write_json(tmp_path / "b", {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "c", float("nan"))


def test_what_a_killed_process_was_writing_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    die = (
        "import os, pathlib, signal, sys\n"
        "from karmma_pipeline import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", die, tmp_path / "a.json"], check=False)
    assert died.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert files.is_temporary(left)
    other = left.with_name(left.name.replace(socket.gethostname(), "elsewhere"))
    other.touch()
    with files.replacing(tmp_path / "b.json") as living:
        theirs = living.rename(living.with_name(living.name.replace(f"{os.getpid()}", "1")))
        files.sweep([tmp_path, tmp_path / "gone"])
        assert sorted(tmp_path.iterdir()) == sorted([theirs, other])
        theirs.rename(living)
