"""Stands in for a decoder that hangs, dies, raises or takes all memory on some clips."""

import os
import signal
import time

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extract.decode import Decoded, Settings


def misbehave(clips: list[Clip], settings: Settings, decoder: str = "decord") -> list[Decoded]:
    """Run in a worker process; what happens depends on the clip's id."""
    for clip in clips:
        if clip.clip_id == "hang":
            time.sleep(3600)
        if clip.clip_id == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if clip.clip_id == "memory":
            raise MemoryError
        if clip.clip_id == "raise":
            raise KeyError("from deep inside a decoder")
        if clip.clip_id == "grow":
            hoard = bytearray(2 << 30)
            hoard[:: 1 << 12] = b"x" * len(hoard[:: 1 << 12])
            time.sleep(3600)
    return [Decoded(clip.clip_id) for clip in clips]
