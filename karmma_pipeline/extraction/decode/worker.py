"""A decode process: clips of one video in, network inputs in shared memory out.

Every frame of a clip is decoded once, for RGB and flow, every network and every backbone set.
The memory is anonymous: it has no name that a killed run could leave behind, and no limit but
the job's own. A process reaches it through the owner's entry in /proc, so that nothing large is
pickled.
"""

import math
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.data.sources import BoxSource, SensorSource, Source
from karmma_pipeline.extraction.decode.boxes import read_boxes
from karmma_pipeline.extraction.decode.frame_selection import (
    DecodedFrames,
    FrameSelection,
    clamped,
    clip_span,
    picture_span,
    sample_times,
    select_frames,
)
from karmma_pipeline.extraction.decode.sensor_windows import read_windows
from karmma_pipeline.extraction.decode.spectrogram import ImageOf, longest_s, mel_image
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.media.media_file import OpenMedia
from karmma_pipeline.extraction.media.sensor_series import SensorSeries
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason

#: What a process is called while it decodes; at most 15 bytes.
AT_WORK = "karmma-decodes"

_NAME = Path("/proc/self/comm")
_NEVER_S = 1e9
_ALIGN = 64
_SLACK = 4096

Decode = Callable[[list[Clip], DecodeSettings], list[DecodedClip]]
#: Where an array lies in its clip's slot: offset in bytes, shape, dtype.
SlotRefs = dict[InputSpec, tuple[int, tuple[int, ...], str]]


def clip_bytes(settings: DecodeSettings) -> int:
    """Return how many bytes the arrays of one clip take."""
    return _SLACK + sum(spec.array_bytes + _ALIGN for spec in settings.inputs)


class SharedBuffer:
    """Slots for one decoded clip each, in anonymous shared memory.

    Slots are taken and given back by the thread that runs the pool alone, so that no lock is
    needed: a decode process only writes into slots that its task names.

    Args:
        slot_bytes: of one clip (see `clip_bytes`).
        slots: clips that fit.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # Not multiprocessing.shared_memory: its files lie in /dev/shm, which containers limit to
        # 64 MB, and stay there after SIGKILL. Pages of a memfd count for the job, take no memory
        # until they are written, and go with the last process that maps them.
        self._file = os.memfd_create("karmma-clips")
        os.ftruncate(self._file, self.slot_bytes * slots)
        self._memory = mmap.mmap(self._file, self.slot_bytes * slots)
        self._unused = list(range(slots))
        # Decode processes are spawned, so they inherit no descriptor; another process of the
        # same user may open this one by its path.
        self.address = f"/proc/{os.getpid()}/fd/{self._file}"

    def take(self) -> int | None:
        """Return a slot, None if all are in use: such a clip goes through the pipe."""
        return self._unused.pop() if self._unused else None

    def give_back(self, slots: Sequence[int | None]) -> None:
        """Let slots be used again.

        Arrays that are views of them show whatever is written there next: call it only after
        they were copied, or once the process that was to write them is dead or done.
        """
        self._unused += [slot for slot in slots if slot is not None]

    def restore(self, decoded: DecodedClip, refs: SlotRefs, slot: int | None) -> None:
        """Let a clip's arrays be views of its slot, as its process wrote them."""
        if slot is None:
            return
        start = slot * self.slot_bytes
        for spec, (offset, shape, dtype) in refs.items():
            flat = np.frombuffer(self._memory, dtype, prod(shape), start + offset)
            decoded.arrays[spec] = flat.reshape(shape)

    def close(self) -> None:
        """Let the memory go; it is freed when the last process that uses it ends.

        The mapping itself is left to the garbage collector: closing it under views that are
        still alive is an error.
        """
        os.close(self._file)


def lost(clip_id: str, settings: DecodeSettings, fault: MediaFaultError) -> DecodedClip:
    """Return a clip of which nothing could be decoded."""
    return DecodedClip(
        clip_id,
        reasons=dict.fromkeys(settings.inputs, fault.reason),
        details=dict.fromkeys(settings.inputs, fault.detail),
    )


def decode_clips(clips: list[Clip], settings: DecodeSettings) -> list[DecodedClip]:
    """Decode clips; each file is opened once, and kept for the next ones of the same video.

    A fault costs its modality of its clip.

    Args:
        clips: of one video, as far as possible.
        settings: what to decode.
    """
    kept_s = settings.sound_kept_s
    with OpenMedia(settings.video_decoder, settings.index_folder, kept_s, keep=True) as media:
        begun = [_begin(clip, settings, media) for clip in clips]
        several = len(begun) > 1
        frames = DecodedFrames([s for _, chosen in begun for s in chosen.values()], several)
        for decoded, chosen in begun:
            # What failed for all of them may be the fault of one: each is tried by itself.
            again = several and frames.lack(chosen.values())
            _finish(decoded, chosen, DecodedFrames(chosen.values()) if again else frames, settings)
        return [decoded for decoded, _ in begun]


class Media(Protocol):
    """Whatever gives the reader of a source: files, or what sensors have sent so far."""

    def of(self, source: Source) -> MediaReader:
        """Return it."""
        ...

    def series(self, source: SensorSource, sensor: Sensor) -> SensorSeries:
        """Return the samples of a sensor."""
        ...


def decode_clip(
    clip: Clip,
    settings: DecodeSettings,
    media: Media,
    frames_of: Callable[[Iterable[FrameSelection]], DecodedFrames],
    image_of: ImageOf = mel_image,
) -> DecodedClip:
    """Decode one clip of media that are open; a fault costs its modality.

    Args:
        clip: of the media.
        settings: what to decode.
        media: its sources.
        frames_of: decodes the chosen frames, as `DecodedFrames` does.
        image_of: makes the spectrograms, as `mel_image` does.
    """
    decoded, chosen = _begin(clip, settings, media, image_of)
    _finish(decoded, chosen, frames_of(chosen.values()), settings)
    return decoded


def _begin(
    clip: Clip, settings: DecodeSettings, media: Media, image_of: ImageOf = mel_image
) -> tuple[DecodedClip, dict[InputSpec, FrameSelection]]:
    """Read boxes, sensors and sound, and choose the frames of the rest."""
    decoded = DecodedClip(clip.clip_id)
    chosen: dict[InputSpec, FrameSelection] = {}
    for spec in settings.inputs:
        with _faults_of(decoded, spec):
            if spec.modality not in clip.media:
                raise MediaFaultError(Reason.NOT_IN_DATASET, spec.modality)
            source = clip.media[spec.modality]
            if isinstance(source, BoxSource):
                boxes, times = read_boxes(clip, source, settings.sampling, spec.frames)
                decoded.arrays[spec], decoded.times[spec] = boxes, times
            elif isinstance(source, SensorSource):
                sensor = settings.sensors[spec.modality]
                series, span = media.series(source, sensor), (clip.start_s, clip.stop_s)
                windows, times = read_windows(series, sensor, *span, clip.view)
                decoded.arrays[spec], decoded.times[spec] = windows, times
            elif spec.modality == "audio":
                _audio(decoded, clip, spec, settings, media, image_of)
            else:
                video = media.of(source)
                chosen[spec] = select_frames(clip, spec, video, settings.sampling, settings.flow)
    return decoded, chosen


def _finish(
    decoded: DecodedClip,
    chosen: dict[InputSpec, FrameSelection],
    frames: DecodedFrames,
    settings: DecodeSettings,
) -> None:
    for spec, selection in chosen.items():
        with _faults_of(decoded, spec):
            decoded.arrays[spec] = frames.array(selection, settings.flow)
            decoded.times[spec] = selection.times
            if spec.pairs and selection.flow_scale is not None:
                decoded.flow_scales[spec] = selection.flow_scale
            decoded.decoders[spec.modality] = selection.video.video_decoder


@contextmanager
def _faults_of(decoded: DecodedClip, spec: InputSpec) -> Iterator[None]:
    try:
        yield
    except MediaFaultError as fault:
        decoded.reasons[spec], decoded.details[spec] = fault.reason, fault.detail
    except MemoryError:
        decoded.reasons[spec] = Reason.OUT_OF_MEMORY
        decoded.details[spec] = "memory allocation failed"


def _sound_span(
    clip: Clip, rate: int, settings: DecodeSettings, media: Media
) -> tuple[float, float]:
    """Return the span that the clip's pictures have, or, without pictures, its sound's."""
    tolerance = settings.sampling.tolerance_s
    with suppress(MediaFaultError, KeyError):
        return clip_span(clip, "rgb", media.of(clip.media["rgb"]), tolerance)
    if clip.stop_s is not None:
        return clip.start_s, clip.stop_s
    sound = media.of(clip.media["audio"])
    return clamped(clip.start_s, None, sound.sound_span(rate)[1], tolerance)


def _audio(
    decoded: DecodedClip,
    clip: Clip,
    spec: InputSpec,
    settings: DecodeSettings,
    media: Media,
    image_of: ImageOf,
) -> None:
    audio, sound = spec.audio or settings.audio, media.of(clip.media["audio"])
    rate = audio.sample_rate
    track_start, track_stop = sound.sound_span(rate)
    start, stop = _sound_span(clip, rate, settings, media)
    if spec.per_frame:
        start, stop = picture_span(clip, start, stop, settings.sampling, spec.frames)
        centres = sample_times(settings.sampling, start, stop, spec.frames)
        length = audio.frame_s
    else:
        if clip.view is not None:
            start, stop = clip.view.span(start, stop, audio.window_s)
        centres = np.array([(start + stop) / 2])
        length = min(audio.window_s or stop - start, longest_s(audio))
    first, last = centres - length / 2, centres + length / 2
    # A window that reaches past the track is padded with silence and counted. Where every window
    # lies outside, there is nothing to hear, and silence would be made up.
    heard = (last > track_start) & (first < track_stop)
    if not heard.any():
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"{sound.path}: no audio at {start:.2f} s")
    images = [
        image_of(audio, sound.sound(a, b, rate), spec.image)
        for a, b in zip(first, last, strict=True)
    ]
    decoded.arrays[spec] = np.stack(images) if spec.per_frame else images[0]
    decoded.times[spec] = np.stack([centres, centres])
    decoded.padded += int(((first < track_start) | (last > track_stop)).sum())
    decoded.audio_rate = sound.audio_rate
    decoded.decoders["audio"] = sound.audio_decoder


def decode_into(
    address: str,
    slot_bytes: int,
    slots: Sequence[int | None],
    decode: Decode,
    clips: list[Clip],
    settings: DecodeSettings,
    limit_s: float,
) -> tuple[float, list[tuple[DecodedClip, SlotRefs]]]:
    """Decode in a worker process; arrays that fit into their clip's slot are left there.

    Args:
        address: of the buffer.
        slot_bytes: of one of its slots.
        slots: one per clip; None: its arrays go through the pipe.
        decode: `decode_clips`, or what stands in for it.
        clips: of one video.
        settings: what to decode.
        limit_s: CPU seconds after which the kernel ends the process.

    Returns:
        CPU seconds that it took, and each clip without the arrays that lie in its slot.
    """
    started = time.process_time()
    with _at_work(started + limit_s):
        decoded = decode(clips, settings)
    parts = [
        (clip, _write_to_slot(address, slot_bytes, slot, clip))
        for clip, slot in zip(decoded, slots, strict=True)
    ]
    return time.process_time() - started, parts


@contextmanager
def _at_work(cpu_s: float) -> Iterator[None]:
    """Say from outside the interpreter that a task is under way, and until when.

    The limit is the kernel's and the name is read by the parent: a decoder that hangs inside C
    holds the interpreter's lock, so that nothing in this process would run.
    """
    before, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(min(cpu_s, _NEVER_S))
    soft = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, most))
    _NAME.write_text(AT_WORK)
    try:
        yield
    finally:
        _NAME.write_text("karmma-waits")
        resource.setrlimit(resource.RLIMIT_CPU, (before, most))


def _write_to_slot(address: str, slot_bytes: int, slot: int | None, clip: DecodedClip) -> SlotRefs:
    """Move a clip's arrays into its slot; what does not fit stays with the clip."""
    refs: SlotRefs = {}
    if slot is None:
        return refs
    memory, offset = _attach(address), 0
    for spec, array in list(clip.arrays.items()):
        if offset + array.nbytes > slot_bytes:
            continue
        target = np.frombuffer(memory, array.dtype, array.size, slot * slot_bytes + offset)
        target[:] = array.ravel()
        refs[spec] = (offset, array.shape, array.dtype.str)
        # The next array starts on a cache line, which also suits every dtype.
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
        del clip.arrays[spec]
    return refs


@lru_cache(maxsize=1)  # a process belongs to one pool, and a pool has one buffer
def _attach(address: str) -> Any:
    descriptor = os.open(address, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)  # the mapping holds the memory by itself
