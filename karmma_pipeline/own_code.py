"""Code of one's own that recipes name as ``package.module:function``: found, and known again.

Modules are looked for where Python looks, and last in the working folder, as torchtune and lm-eval
do; never in the folder of a run or of a model that names them.
"""

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from karmma_pipeline.errors import ConfigError, named_line

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_own(name: str) -> bool:
    """Tell whether a name is one of code of one's own: ``package.module:function``."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, known: tuple[str, ...]) -> str:
    """Return a name that is one of those that are known, or ``package.module:function``.

    Raises:
        ValueError: it is neither.
    """
    if name in known or is_own(name):
        return name
    raise ValueError(
        f"unknown; choose {', '.join(map(repr, known))}, or a custom one as package.module:function"
    )


def find(name: str, key: str) -> Callable[..., Any]:
    """Import what a name stands for.

    Args:
        name: ``package.module:function``; a class is as good as a function.
        key: of the recipe or the model card, for the message.

    Raises:
        ConfigError: it cannot be imported, or is nothing that can be called and has a source file.
    """
    try:
        made = load(name, key)
    except ConfigError:
        raise
    except Exception as error:  # whatever a module's own lines raise
        reason = named_line(error)
        raise ConfigError(
            f"{key}={name!r}: cannot be imported ({reason}); run the command in the folder of "
            "its file, or add that folder to PYTHONPATH."
        ) from error
    if not callable(made):
        raise ConfigError(f"{key}={name!r}: is a {type(made).__name__}, not a function or class.")
    if _source(made) is None:
        raise ConfigError(
            f"{key}={name!r}: has no source file; one is needed to identify the code of a run."
        )
    return made


def load(name: str, key: str) -> Any:
    """Import ``package.module:attribute``; whatever the module's own lines raise comes through.

    Raises:
        ConfigError: it is in Python's own library, such as `os:system`: names also come from the
            models of strangers.
    """
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(
            f"{key}={name!r}: belongs to Python's standard library; custom code is expected."
        )
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a file of the working folder must not hide a library
    return getattr(import_module(module), attribute)


def digest(name: str, key: str) -> str:
    """Return the digest of the file in which something of one's own is defined, SHA-256.

    Raises:
        ConfigError: it cannot be imported.
    """
    path = _source(find(name, key))
    assert path is not None  # noqa: S101  (find has looked)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _source(made: Any) -> Path | None:
    try:
        path = inspect.getsourcefile(inspect.unwrap(made))
    except TypeError:  # built into Python, or an object that is called
        path = inspect.getsourcefile(type(made)) if not inspect.isbuiltin(made) else None
    return Path(path) if path is not None and Path(path).is_file() else None
