"""Stands in for decoders that hang, die, raise or take all memory on some clips.

Those whose ids begin with ``picture_`` do so only if pictures are asked for; every attempt leaves
a file in the folder that the clip's video would be in, and so does a process that hangs.
"""

import ctypes
import os
import signal
import time

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings


def misbehave(clips: list[Clip], settings: DecodeSettings) -> list[DecodedClip]:
    """Run in a worker process; what happens depends on the clip's id."""
    for clip in clips:
        trouble, folder = clip.clip_id, clip.media["rgb"].path.parent
        if trouble.startswith("picture_"):
            asked = "+".join(spec.modality for spec in settings.inputs)
            trouble = trouble.removeprefix("picture_") if "rgb" in asked else ""
            (folder / f"{clip.clip_id}.{os.getpid()}.{asked}").touch()
        if trouble == "hang":  # inside C, with the interpreter's lock, as decord does
            (folder / f"hangs.{os.getpid()}").touch()
            ctypes.PyDLL(None).pause()
        if trouble == "loop":
            while True:
                pass
        if trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "memory":
            raise MemoryError
        if trouble == "raise":
            raise KeyError("from deep inside a decoder")
        if trouble == "grow":
            hoard = bytearray(800 << 20)
            hoard[:: 1 << 12] = b"x" * len(hoard[:: 1 << 12])
            time.sleep(3600)
    return [DecodedClip(clip.clip_id) for clip in clips]
