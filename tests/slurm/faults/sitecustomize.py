"""Put on the path of the jobs of `pipeline.py`: poisons clips, and holds jobs until they are hurt.

Python imports a module of this name at its start, in decode processes too.
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from multiprocessing import parent_process
from pathlib import Path
from types import ModuleType
from typing import Any

Function = Callable[..., Any]

HOLDS = "KARMMA_TEST_HOLDS"
"""Environment variable: a folder where a file holds a job of Slurm while it is there, and
``FILE.here`` tells that it does. ``extract-3``: task 3 gets no further clips from its decoders;
``decode-3``: its decoders are slow; ``teacher``: that training's steps are slow."""

FREE = {"extract": 1, "decode": 0, "step": 4}
"""So many decodings, or steps, come through before."""

SLOW_S = {"decode": 10.0, "step": 1.0}


class Finder(importlib.abc.MetaPathFinder):
    """Finds a module and puts something around one of its functions."""

    def __init__(self, module: str, function: str, around: Callable[[Function], Function]) -> None:
        self.module, self.function, self.around = module, function, around

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            path, _, name = self.function.rpartition(".")
            owner = getattr(module, path) if path else module
            whole = getattr(owner, name)
            # its name too, so that it travels to decode processes
            setattr(owner, name, functools.wraps(whole)(self.around(whole)))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class Hold:
    """What holds this process, once it has come through so often."""

    def __init__(self, kind: str) -> None:
        self.kind, self.passed = kind, 0

    @property
    def here(self) -> bool:
        if self.passed < FREE[self.kind] or "SLURM_JOB_ID" not in os.environ:
            return False
        recipe = next((Path(word).stem for word in sys.argv if word.endswith(".yaml")), "")
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        name = recipe if self.kind == "step" else f"{self.kind}-{task}"
        place = Path(os.environ[HOLDS]) / name
        if not place.is_file():
            return False
        place.with_name(f"{name}.here").touch()
        return True

    def slow_down(self) -> None:
        ends = time.monotonic() + SLOW_S[self.kind]
        while self.here and time.monotonic() < ends:
            time.sleep(0.05)
        self.passed += 1


def poisoned(decode: Function) -> Function:
    hold = Hold("decode")
    if parent_process() is not None:  # loading takes seconds, which would count as decoding
        import librosa

        librosa.stft(
            librosa.resample(librosa.tone(440, sr=9000, length=9000), orig_sr=9000, target_sr=8000)
        )
        librosa.filters.mel(sr=8000, n_fft=512)

    def decode_clips(clips: Any, *arguments: Any) -> Any:
        hold.slow_down()
        for clip in clips:
            if clip.clip_id == "poison_crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if clip.clip_id == "poison_hang":
                time.sleep(3600)
        return decode(clips, *arguments)

    return decode_clips


def waiting(is_done: Function) -> Function:
    """Keep from the extraction that its decoders are done."""
    hold = Hold("extract")

    def _is_done(pool: Any, future: Any) -> Any:
        while hold.here:
            pool.stop.check("finished batches are saved")
            time.sleep(0.1)
        hold.passed += 1
        return is_done(pool, future)

    return _is_done


def slow(step: Function) -> Function:
    hold = Hold("step")

    def learning_rate(*arguments: Any) -> Any:
        hold.slow_down()
        return step(*arguments)

    return learning_rate


if HOLDS in os.environ:
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and os.environ.get("RANK") == "0":
        time.sleep(5)  # the others then look for it first, and must not find the one that died
    sys.meta_path[:0] = [
        Finder("karmma_pipeline.extraction.decode.worker", "decode_clips", poisoned),
        Finder("karmma_pipeline.extraction.decode.pool", "DecodePool._is_done", waiting),
        Finder("karmma_pipeline.training.loop", "learning_rate", slow),
    ]
