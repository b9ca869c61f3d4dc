"""What is to be recognised: whole videos, spans or sliding windows of them, rows of a CSV."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from karmma_pipeline.data.manifest import UNKNOWN, Clip, read_manifest
from karmma_pipeline.data.sources import FileSource, Source
from karmma_pipeline.errors import ConfigError, KarmmaError, MediaError, counted
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import OpenMedia

# A window may reach this far past the end of its file: times are rounded in many containers.
_SLACK_S = 0.05

# So many files that could not be read are named in one error.
_NAMED = 5

#: Of a window and of a hop: no sensor brings anything new sooner.
SHORTEST_S = 0.01


@dataclass(frozen=True)
class Spans:
    """Which parts of a video are looked at, in seconds.

    Attributes:
        start_s, stop_s: part of the file; None: to its end.
        window_s, hop_s: of sliding windows in it; None: it is one clip.
    """

    start_s: float = 0.0
    stop_s: float | None = None
    window_s: float | None = None
    hop_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("window", self.window_s), ("hop", self.hop_s)):
            if value is not None and not SHORTEST_S <= value < math.inf:
                raise ConfigError(f"--{name} {value}: must be at least {SHORTEST_S} s.")
        if self.hop_s is not None and self.window_s is None:
            raise ConfigError("--hop: needs --window.")
        late = self.stop_s is None or self.start_s < self.stop_s < math.inf  # no NaN either
        if not (late and 0 <= self.start_s < math.inf):
            raise ConfigError(
                f"--start {self.start_s} --stop {self.stop_s}: start must be non-negative and "
                "stop after it."
            )


@dataclass(frozen=True)
class Wanted:
    """Clips, as many as are asked for, one after another.

    Attributes:
        clips: may be an iterator that is used up once.
        count: of them.
        truth: clip id to head to the class that a CSV names.
        ends: file to its end in seconds, where it was looked up.
        faults: inputs that give no clip, and why; the clips are those of the others.
    """

    clips: Iterable[Clip]
    count: int
    truth: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ends: Mapping[Path, float] = field(default_factory=dict)
    faults: Mapping[Path, KarmmaError] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """What lies in other files than the one that is named, such as a robot's bag.

    Attributes:
        media: modality to where it lies.
        end_s: of all of it, seconds.
    """

    media: Mapping[str, Source]
    end_s: float


def wanted_clips(
    inputs: Sequence[Path],
    spans: Spans,
    sensors: Collection[str] = (),
    recordings: Mapping[Path, Recording | KarmmaError] | None = None,
) -> Wanted:
    """Return the clips of videos and manifests; what cannot be read is left out of several.

    Args:
        inputs: videos and sound files, or CSVs as `karmma extract` reads them, with or without
            labels.
        spans: of the videos.
        sensors: modalities of the model that are columns of a CSV with the files of a sensor.
        recordings: those inputs whose media lie elsewhere, or why they cannot be had.

    Raises:
        ConfigError: an input is a folder, or spans are asked of a CSV, whose rows have their own,
            or the only input ends before they start.
        MediaError: a file is missing, or none holds pictures or sound.
        ManifestError: a CSV is faulty.
    """
    _check(inputs)
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    if tables and spans != Spans():
        raise ConfigError(
            f"{tables[0]}: rows of a manifest have their own start and stop; --start, --stop "
            "and --window are for videos."
        )
    clips: list[Clip] = []
    truth: dict[str, Mapping[str, str]] = {}
    for path in tables:
        manifest = read_manifest(path, sensors=sensors)
        clips += manifest.clips
        truth |= {clip.clip_id: _named(clip, manifest.heads) for clip in manifest.clips}
    found: dict[Path, tuple[Recording, Sequence[float]]] = {}
    faults: dict[Path, KarmmaError] = {}
    for path in inputs:
        if path not in tables:
            try:
                recording = _recording(path, recordings or {})
                found[path] = recording, _starts(path, recording.end_s, spans)
            except (MediaError, ConfigError) as error:
                faults[path] = error
    if faults and not (found or tables):
        raise next(iter(faults.values())) if len(faults) == 1 else unread(faults)
    streamed = (clip for path, of in found.items() for clip in _clips(path, *of, spans))
    count = len(clips) + sum(len(starts) for _, starts in found.values())
    ends = {source.path: one.end_s for one, _ in found.values() for source in one.media.values()}
    return Wanted(chain(clips, streamed), count, truth, ends, faults)


def unread(faults: Mapping[Path, KarmmaError]) -> MediaError:
    """Return the error that names files which could not be read, after the others are done."""
    said = " ".join(str(fault) for fault in islice(faults.values(), _NAMED))
    more = f" And {len(faults) - _NAMED} more." if len(faults) > _NAMED else ""
    return MediaError(f"{counted(len(faults), 'file')} could not be read: {said}{more}")


def _recording(path: Path, elsewhere: Mapping[Path, Recording | KarmmaError]) -> Recording:
    known = elsewhere.get(path)
    if isinstance(known, KarmmaError):
        raise known
    if known is not None:
        return known
    return Recording(dict.fromkeys(("rgb", "flow", "audio"), FileSource(path)), file_end_s(path))


def _check(inputs: Sequence[Path]) -> None:
    """Refuse what is no file, before anything is read: a typo should cost nothing."""
    for path in inputs:
        if (path / "spec.json").is_file():
            raise ConfigError(
                f"{path}: is a feature store; use `karmma evaluate`, or give videos or a CSV."
            )
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; give videos, or a CSV that lists them.")
    if absent := [str(path) for path in inputs if not path.is_file()]:
        raise MediaError(f"{', '.join(absent)}: no such file.")


def _named(clip: Clip, heads: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {head: heads[head][i] for head, i in clip.labels.items() if i != UNKNOWN}


def file_end_s(path: Path) -> float:
    """Return when a file's pictures end, seconds, or its sound if it has no pictures.

    Raises:
        MediaError: it cannot be read, or holds neither.
    """
    try:
        with OpenMedia() as media:
            reader = media.of(FileSource(path))
            try:
                return reader.stop_s
            except MediaFaultError:
                return reader.sound_span(16_000)[1]
    except MediaFaultError as fault:
        raise MediaError(f"{path}: {fault.reason.label}: {fault.hint}") from None


def _starts(path: Path, end_s: float, spans: Spans) -> Sequence[float]:
    """Return the start of each window: every hop, and one more that ends where the part ends."""
    stop_s = end_s if spans.stop_s is None else min(spans.stop_s, end_s)
    if spans.start_s >= end_s:
        raise ConfigError(f"--start {spans.start_s}: {path} ends at {end_s:.2f} s.")
    if spans.window_s is None:
        return (spans.start_s,)
    hop_s = spans.hop_s or spans.window_s
    room = stop_s - spans.start_s - spans.window_s
    count = max(0, math.floor((room + _SLACK_S) / hop_s) + 1)
    starts = [spans.start_s + i * hop_s for i in range(count)]
    if not starts:  # shorter than a window: one clip
        return (spans.start_s,)
    last = stop_s - spans.window_s
    return [*starts, last] if last - starts[-1] > _SLACK_S else starts


def _clips(
    path: Path, recording: Recording, starts: Sequence[float], spans: Spans
) -> Iterator[Clip]:
    last_s = recording.end_s if spans.stop_s is None else min(spans.stop_s, recording.end_s)
    for start_s in starts:
        end_s = math.inf if spans.window_s is None else start_s + spans.window_s
        # What is shorter than a window is one clip, of what is there.
        stop_s = spans.stop_s if end_s > last_s + _SLACK_S else end_s
        yield Clip(f"{path.name}@{start_s:.3f}", dict(recording.media), start_s, stop_s, {})
