"""One run, one folder: its recipe, the software that ran it, its metrics and its log."""

import json
import logging
import platform
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from karmma_pipeline import config, files, locks
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, ConfigError

PACKAGES = ("karmma-pipeline", "torch", "torchvision", "numpy", "zarr", "h5py")
RECIPE, ENVIRONMENT, LOG, METRICS = "recipe.yaml", "environment.json", "log.txt", "metrics.jsonl"
CLIPS = "clips.json"  # that a run learns from
CARD = "model.json"  # of a saved model, in a folder of the run
EXPORT = "export.json"  # of an exported model
MODELS = ("best", "last")
_STARTED, _MADE = {ENVIRONMENT, LOG, METRICS}, {CLIPS, "state", "tensorboard", "teacher_table"}
_LOCK = ".lock"
ELSE = "choose another folder with --set out=FOLDER"
_logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run; while it is open no other process may train into it.

    Nothing is written into a new one before `claim`, so that a start that fails leaves nothing.

    Args:
        path: the folder.
        recipe: of the run.
        writes: of several ranks only the one that writes changes anything; to the others all
            methods that write do nothing.

    Attributes:
        recipe: the one given, with what it leaves open as the run that is there began with it.

    Raises:
        ConfigError: the folder belongs to another run (the first difference is named) or
            holds something else.
        KarmmaError: another process trains into it.
    """

    def __init__(self, path: Path, recipe: Recipe, writes: bool = True) -> None:
        self.path, self.recipe, self.writes = path, recipe, writes
        self.metrics = path / METRICS
        self._held = ExitStack()
        self._claimed = False
        if writes:
            with self._held:
                self._open(recipe)
                self._held = self._held.pop_all()
        began = config.saved(type(recipe), path / RECIPE) if (path / RECIPE).is_file() else None
        if began is not None and not config.saved_differences(path / RECIPE, recipe):
            self.recipe = config.resumed(began, recipe)

    def _open(self, recipe: Recipe) -> None:
        self._check(recipe)  # before anything is changed in a folder that is not ours
        self._held.enter_context(
            locks.locked(self.path / _LOCK, "is training in this folder", ELSE)
        )
        self._check(recipe)
        # The lock comes before the sweep: only whoever holds it may take temporary files for
        # those of a dead process.
        with files.disk_errors(self.path / RECIPE):
            files.sweep((self.path, *self.path.glob("*/")), alone=True)  # of a killed process

    def _check(self, recipe: Recipe) -> None:
        there = self.path / RECIPE
        if there.is_file():
            self._claimed = not (differing := config.saved_differences(there, recipe))
            if differing and _is_trained(self.path):
                raise ConfigError(
                    f"{self.path}: contains a run of a different recipe ({differing[0]}); "
                    f"{ELSE}, or remove this one."
                )
            if differing:  # of a start that failed
                check_output(self.path, {RECIPE, *_STARTED, *_MADE}, "besides a recipe")
        else:
            check_output(self.path, _STARTED, "but no run")

    def claim(self, recipe: Recipe) -> None:
        """Make the folder that of this run; called after every check that may fail.

        Args:
            recipe: with everything settled; it is what the folder keeps, unless this run is there.
        """
        if not self.writes or self._claimed:
            return
        with files.disk_errors(self.path / RECIPE):
            for left in (self.metrics, *self.path.glob("tensorboard/*")):  # of a start that failed
                left.unlink(missing_ok=True)
        # The recipe is written last, for it is what makes a folder a run: one that was killed
        # before has only files that `_check` knows, and the next start takes it over.
        files.write_json(self.path / ENVIRONMENT, environment())
        config.save(recipe, self.path / RECIPE)
        self._claimed = True
        for line in config.changed_defaults(recipe):
            self.note(line)

    def check(self) -> None:
        """Check that no other process has taken the folder over; see `locks.check`."""
        if self.writes:
            locks.check(self.path / _LOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        self._held.close()

    def note(self, text: str) -> None:
        """Log a line, and append it to ``log.txt`` with the time."""
        if self.writes:
            _logger.info(text)
            self.log(text)

    def log(self, text: str) -> None:
        """Append a line to ``log.txt`` with the time; a folder that is not claimed has no log."""
        if self.writes and self._claimed:
            path = self.path / LOG
            with files.disk_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make ``metrics.jsonl`` these rows, one JSON line each, whatever it held before."""
        if self.writes:
            lines = [json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows]
            files.write_text(self.metrics, "".join(lines))


def _is_trained(run: Path) -> bool:
    """Tell whether anything was trained: else a folder is that of a start that failed."""
    return any(run.glob("state/*.pt")) or any((run / name).exists() for name in MODELS)


def check_output(path: Path, ours: Collection[str], but: str) -> None:
    """Refuse to write into a folder that holds other files than those of one's own kind.

    Args:
        path: the folder; it may be missing.
        ours: names of files and folders that may lie in it; hidden ones may, too.
        but: what it holds besides them, or does not, to end the sentence.

    Raises:
        ConfigError: it holds others, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; choose a folder with --set out=FOLDER.")
    names = [p.name for p in path.iterdir()] if path.is_dir() else []
    others = [name for name in names if name not in ours and not name.startswith(".")]
    if others:
        raise ConfigError(f"{path}: contains other files, such as {min(others)}, {but}; {ELSE}.")


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
    if (path / EXPORT).is_file():
        raise CheckpointError(
            f"{path}: is an exported model, for predict, live and load_model; give the run that "
            "it was exported from."
        )
    if (path / "spec.json").is_file():
        raise CheckpointError(
            f"{path}: is a feature store; give a run folder, as written by karmma "
            "train-teacher, train-baseline or distill."
        )
    if (path / RECIPE).is_file():
        raise CheckpointError(
            f"{path}: this run has no model {checkpoint!r}; finish its training, or copy "
            "the folder again."
        )
    beside, within = (
        sorted(p.parent.parent.name for p in folder.glob(f"*/{checkpoint}/{CARD}"))
        for folder in (path.parent, path)
    )
    if within:  # seeds, as a sweep has them
        raise CheckpointError(
            f"{path}: contains the runs {', '.join(within)}; give one of them, such as "
            f"{path / within[0]}."
        )
    there = "" if beside else files.looked_in(path)
    others = f", or choose a run in {path.parent}: {', '.join(beside)}" if beside else ""
    raise CheckpointError(f"{path}: no trained model found{there}. Train it first{others}.")
