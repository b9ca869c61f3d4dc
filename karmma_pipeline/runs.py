"""One run, one folder: its recipe, the software that ran it, its metrics and its log."""

import fcntl
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Self

from karmma_pipeline import config, files
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, ConfigError, KarmmaError

PACKAGES = ("karmma-pipeline", "torch", "torchvision", "numpy", "zarr", "h5py")
RECIPE, ENVIRONMENT, LOG, METRICS = "recipe.yaml", "environment.json", "log.txt", "metrics.jsonl"
CARD = "model.json"  # of a saved model, in a folder of the run
_LOCK = ".lock"
_logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run; while it is open no other process may train into it.

    Args:
        path: the folder.
        recipe: of the run.
        writes: of several ranks only the one that writes changes anything; to the others all
            methods that write do nothing.
        free: dotted keys of the recipe that may change when a run goes on, since what comes out
            does not depend on them.

    Raises:
        ConfigError: the folder belongs to another run (the first difference is named) or
            holds something else.
        KarmmaError: another process trains into it.
    """

    def __init__(
        self, path: Path, recipe: Recipe, writes: bool = True, free: Collection[str] = ()
    ) -> None:
        self.path, self.writes, self._free = path, writes, free
        self.metrics = path / METRICS
        self._lock: IO[str] | None = None
        if writes:
            self._open(recipe)

    def _open(self, recipe: Recipe) -> None:
        there = self.path / RECIPE
        if there.is_file():
            _check_same(self.path, there, recipe, self._free)
        elif self.path.is_dir():
            _check_ours(self.path)
        elif self.path.exists():
            raise ConfigError(f"{self.path}: is a file; choose a folder with --set out=FOLDER.")
        with files.disk_errors(there):
            self.path.mkdir(parents=True, exist_ok=True)
            # The lock comes before the sweep: only whoever holds it may take temporary files for
            # those of a dead process.
            self._lock = _locked(self.path / _LOCK)
            files.sweep((self.path, *self.path.glob("*/")), alone=True)  # of a killed process
        # The recipe is written last, for it is what makes a folder a run: one that was killed
        # before has only files that `_check_ours` knows, and the next start takes it over.
        if not there.is_file():
            files.write_json(self.path / ENVIRONMENT, environment())
            config.save(recipe, there)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def note(self, text: str) -> None:
        """Log a line, and append it to ``log.txt`` with the time."""
        if self.writes:
            _logger.info(text)
            self.log(text)

    def log(self, text: str) -> None:
        """Append a line to ``log.txt`` with the time."""
        if self.writes:
            path = self.path / LOG
            with files.disk_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make ``metrics.jsonl`` these rows, one JSON line each, whatever it held before."""
        if self.writes:
            lines = [json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows]
            files.write_text(self.metrics, "".join(lines))


def _check_same(path: Path, there: Path, recipe: Recipe, free: Collection[str]) -> None:
    if differing := config.saved_differences(there, recipe, free):
        raise ConfigError(
            f"{path}: holds a run of another recipe ({differing[0]}); "
            "choose another folder with --set out=FOLDER, or remove this one."
        )


def _check_ours(path: Path) -> None:
    """Refuse a folder with other files; those of a run that was killed at its start are ours."""
    ours = {ENVIRONMENT, LOG, _LOCK}
    others = [p.name for p in path.iterdir() if p.name not in ours and p.suffix != ".tmp"]
    if others:
        raise ConfigError(
            f"{path}: holds other files, such as {min(others)}, and no run; "
            "choose another folder with --set out=FOLDER."
        )


def _locked(path: Path) -> IO[str]:
    """Return the open file whose lock this process holds; closing it lets others in.

    The kernel drops the lock with the process, however that ends: none is ever left behind. The
    file itself stays, for whoever removed it could let two processes lock two files of one name.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise KarmmaError(
            f"{path.parent}: another process trains into this folder; wait for it, stop it, or "
            "choose another folder with --set out=FOLDER."
        ) from None
    except OSError:
        pass  # a file system without locks: better no protection than no run
    return file


def environment() -> dict[str, Any]:
    """Return what a reader needs to know of the software and machine of a run."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": sys.argv,
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of this code, with ``+`` if it was changed; empty if unknown."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        # Without the lock that a run, killed just now, would leave in the user's checkout.
        command = ["git", "--no-optional-locks", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        if git("ls-files", str(Path(__file__))):  # else installed into some other checkout
            return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def saved_folder(path: Path, checkpoint: str = "best") -> Path:
    """Return the folder of a saved model, given that folder or the run that it is of.

    Raises:
        CheckpointError: no model is there.
    """
    for folder in (path / checkpoint, path):
        if (folder / CARD).is_file():
            return folder
    if (path / RECIPE).is_file():
        raise CheckpointError(
            f"{path}: this run has saved no model {checkpoint!r} yet; run its training to the end."
        )
    beside = sorted(p.parent.parent.name for p in path.parent.glob(f"*/{checkpoint}/{CARD}"))
    there = f"; {path.parent} has the runs {', '.join(beside)}" if beside else ""
    raise CheckpointError(f"{path}: no trained model is there{there}. Train it first.")
