"""One run, one folder: its recipe, the software that ran it, its metrics, line by line."""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from karmma_pipeline import config, files
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import ConfigError

PACKAGES = ("karmma-pipeline", "torch", "torchvision", "numpy", "zarr", "h5py")


class RunFolder:
    """The folder of a run; opening one that holds another recipe is refused.

    Raises:
        ConfigError: the folder belongs to another run; the first differences are named.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        there = path / "recipe.yaml"
        if there.is_file():
            found = config.parse_yaml(there.read_text(), str(there))
            wanted = config.parse_yaml(config.dump(recipe), "recipe")
            if found != wanted:
                raise ConfigError(
                    f"{path}: holds a run of another recipe ({_difference(found, wanted)}); "
                    "choose another folder with --set out=FOLDER, or remove this one."
                )
            return
        files.write_json(path / "environment.json", environment())
        config.save(recipe, there)

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines of epochs that will be run again."""
        if self.metrics.is_file():
            lines = self.metrics.read_text().splitlines(keepends=True)[:epochs]
            files.write_text(self.metrics, "".join(lines))

    def log(self, values: dict[str, Any]) -> None:
        """Append one line of metrics."""
        with files.disk_errors(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(values, sort_keys=True) + "\n")


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
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", str(Path(__file__))):
            return ""  # installed into some other project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _difference(there: Any, here: Any, path: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(k for k in {**there, **here} if there.get(k) != here.get(k))
        return _difference(there.get(key), here.get(key), f"{path}.{key}" if path else str(key))
    return f"{path} is {there!r} there and {here!r} here"
