"""What a decode process does: clips of one video in, network inputs of each out.

Every frame of a clip is decoded once, for RGB and flow, every network and every backbone set.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import BoxSource
from karmma_pipeline.extraction.decode.boxes import read_boxes
from karmma_pipeline.extraction.decode.frame_selection import (
    DecodedFrames,
    FrameSelection,
    clamped,
    clip_span,
    sample_times,
    select_frames,
)
from karmma_pipeline.extraction.decode.spectrogram import longest_s, mel_image
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import Decoder
from karmma_pipeline.extraction.media.open import OpenMedia
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason


def lost(clip_id: str, settings: DecodeSettings, fault: MediaFaultError) -> DecodedClip:
    """Return a clip of which nothing could be decoded."""
    return DecodedClip(
        clip_id,
        reasons=dict.fromkeys(settings.inputs, fault.reason),
        details=dict.fromkeys(settings.inputs, fault.detail),
    )


def decode_clips(
    clips: list[Clip], settings: DecodeSettings, decoder: Decoder = "decord"
) -> list[DecodedClip]:
    """Decode clips; each file is opened once. A fault costs its modality of its clip.

    Args:
        clips: of one video, as far as possible.
        settings: what to decode.
        decoder: the one that is tried first.
    """
    with OpenMedia(decoder, settings.index_folder) as media:
        begun = [_begin(clip, settings, media) for clip in clips]
        several = len(begun) > 1
        frames = DecodedFrames([s for _, chosen in begun for s in chosen.values()], several)
        for decoded, chosen in begun:
            # What failed for all of them may be the fault of one: each is tried by itself.
            again = several and frames.lack(chosen.values())
            _finish(decoded, chosen, DecodedFrames(chosen.values()) if again else frames, settings)
        return [decoded for decoded, _ in begun]


def _begin(
    clip: Clip, settings: DecodeSettings, media: OpenMedia
) -> tuple[DecodedClip, dict[InputSpec, FrameSelection]]:
    """Read boxes and sound, and choose the frames of the rest."""
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
            elif spec.modality == "audio":
                _audio(decoded, clip, spec, settings, media)
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
        decoded.details[spec] = "could not get the memory it asked for"


def _sound_span(clip: Clip, settings: DecodeSettings, media: OpenMedia) -> tuple[float, float]:
    """Return the span that the clip's pictures have, or, without pictures, its sound's."""
    tolerance = settings.sampling.tolerance_s
    with suppress(MediaFaultError, KeyError):
        return clip_span(clip, "rgb", media.of(clip.media["rgb"]), tolerance)
    if clip.stop_s is not None:
        return clip.start_s, clip.stop_s
    sound = media.of(clip.media["audio"])
    return clamped(clip.start_s, None, sound.sound_span(settings.audio.sample_rate)[1], tolerance)


def _audio(
    decoded: DecodedClip, clip: Clip, spec: InputSpec, settings: DecodeSettings, media: OpenMedia
) -> None:
    audio, sound = settings.audio, media.of(clip.media["audio"])
    rate = audio.sample_rate
    track_start, track_stop = sound.sound_span(rate)
    start, stop = _sound_span(clip, settings, media)
    if spec.per_frame:
        centres = sample_times(settings.sampling, start, stop, spec.frames)
        length = audio.frame_s
    else:
        centres = np.array([(start + stop) / 2])
        length = min(audio.window_s or stop - start, longest_s(audio))
    first, last = centres - length / 2, centres + length / 2
    # A window that reaches past the track is padded with silence and counted. Where every window
    # lies outside, there is nothing to hear, and silence would be made up.
    heard = (last > track_start) & (first < track_stop)
    if not heard.any():
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"{sound.path}: no sound at {start:.2f} s")
    images = [
        mel_image(audio, sound.sound(a, b, rate), spec.image)
        for a, b in zip(first, last, strict=True)
    ]
    decoded.arrays[spec] = np.stack(images) if spec.per_frame else images[0]
    decoded.times[spec] = np.stack([centres, centres])
    decoded.padded += int(((first < track_start) | (last > track_stop)).sum())
    decoded.audio_rate = sound.audio_rate
    decoded.decoders["audio"] = sound.audio_decoder
