"""Spectrograms of live windows: columns that the window before has are not computed again.

That takes a front end whose columns do not depend on one another, and a window that starts whole
hops after the one before. That the sound is the same is seen by comparing the samples, for chunks
may have come late.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from karmma_pipeline.extraction.decode.spectrogram import (
    Image,
    ImageOf,
    Sound,
    front_end,
    mel_image,
    reach,
)
from karmma_pipeline.extraction.inference.recent import Recent, digest
from karmma_pipeline.models.backbones.front_end import Audio

# How many threads BLAS has is a setting of the process: two streams must not restore one another's.
_setting = threading.Lock()


class _Last(NamedTuple):
    start_s: float
    sound: Sound
    columns: Image


class Spectrograms:
    """Makes them; an image of the very same sound is made once.

    Args:
        recent: what the last windows have made.
    """

    def __init__(self, recent: Recent) -> None:
        self._recent = recent
        self._last: dict[Audio, _Last] = {}

    def of(self, start_s: float) -> ImageOf:
        """Return what makes those of a window, see `mel_image`."""
        made_by = partial(self._columns, start_s)

        def image_of(settings: Audio, sound: Sound, size: tuple[int, int]) -> Image:
            key = settings, size, digest(sound)
            return self._recent.of([key], lambda _: [mel_image(settings, sound, size, made_by)])[0]

        return image_of

    def _columns(self, start_s: float, settings: Audio, sound: Sound) -> Image:
        """Return the columns of a window, [mels, hops], see `front_end`."""
        last = self._last.get(settings)
        columns = None
        with _one_thread():
            if last is not None:
                later = round((start_s - last.start_s) * settings.sample_rate)
                columns = _continued(settings, last, later, sound)
            if columns is None:
                columns = front_end(settings, sound)
        self._last[settings] = _Last(start_s, sound, columns)
        return columns


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let BLAS compute by itself: its threads wait for one that has no CPU, and gain nothing here.

    The last bits of a matrix product depend on it; those of an extraction are not touched.
    """
    with _setting, _pools().limit(limits=1, user_api="blas"):
        yield


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all libraries, which takes milliseconds


def _continued(settings: Audio, last: _Last, later: int, sound: Sound) -> Image | None:
    """Return the columns of sound that starts so many samples later; None if none are the same."""
    hop, heard = settings.hop_length, reach(settings)
    same = len(last.sound) - later
    if heard is None or later <= 0 or later % hop or not 0 < same <= len(sound):
        return None
    edge = max(1, math.ceil(heard[0] / hop))  # columns that hear the silence before the sound
    stop = (same - heard[1]) // hop + 1  # the first that hears what is behind the same sound
    if stop <= edge or not np.array_equal(last.sound[later:], sound[:same]):
        return None
    first = front_end(settings, sound[: (edge - 1) * hop + heard[1]])[:, :edge]
    there = last.columns[:, later // hop + edge : later // hop + stop]
    rest = front_end(settings, sound[(stop - edge) * hop :])[:, edge:]
    return np.concatenate([first, there, rest], axis=1)
