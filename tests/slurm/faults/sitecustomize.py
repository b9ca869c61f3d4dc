"""Put on the path of `run.py`'s jobs: makes the decoder crash or hang on clips of that name.

Python imports a module of this name at its start, in decode processes too.
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DECODER = "karmma_pipeline.extract.decode"


class Finder(importlib.abc.MetaPathFinder):
    """Finds the decoder's module and breaks it."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != DECODER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            module.decode_clips = broken(module.decode_clips)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def broken(decode_clips: Any) -> Any:
    @functools.wraps(decode_clips)  # its name too, so that it travels to decode processes
    def decode(clips: Any, *arguments: Any) -> Any:
        time.sleep(float(os.environ.get("KARMMA_TEST_DECODE_S", "0")))
        for clip in clips:
            if clip.clip_id == "poison_crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if clip.clip_id == "poison_hang":
                time.sleep(3600)
        return decode_clips(clips, *arguments)

    return decode


if "KARMMA_TEST_DECODE_S" in os.environ:
    sys.meta_path.insert(0, Finder())
