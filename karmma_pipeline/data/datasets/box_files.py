"""Index of Something-Else annotation files: where in the file each video's entry lies.

The files hold gigabytes of JSON, one object of video id to a list of frames. They are scanned
once, by the process that lists the clips; whoever reads a clip then reads only its entry.
"""

import mmap
import re
from collections.abc import Sequence
from pathlib import Path

from karmma_pipeline.data.sources import BoxSource
from karmma_pipeline.errors import ManifestError

_ENTRY = re.compile(rb'"([0-9]{1,9})"\s*:\s*(?=\[)')
"""How a video's entry begins: inside of one no key is a number. Quotes in texts are escaped."""


def index_boxes(paths: Sequence[Path]) -> dict[str, BoxSource]:
    """Return the box source of every video in the files; of two for one video the later counts.

    Raises:
        ManifestError: a file cannot be read or has no such entries.
    """
    found: dict[str, BoxSource] = {}
    for path in paths:
        found |= _scan(path)
    return found


def _scan(path: Path) -> dict[str, BoxSource]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begins = [(m.group(1).decode(), m.start(), m.end()) for m in _ENTRY.finditer(data)]
            size = len(data)
    except OSError as error:
        raise ManifestError(f"{path}: the boxes cannot be read ({error.strerror}).") from None
    except ValueError:
        raise ManifestError(f"{path}: the file of boxes is empty.") from None
    if not begins:
        raise ManifestError(
            f'{path}: no Something-Else annotation file: no entry of the form "VIDEO ID": [frames].'
        )
    ends = [start for _, start, _ in begins[1:]] + [size]
    return {
        video: BoxSource(path, video, (start, end))
        for (video, _, start), end in zip(begins, ends, strict=True)
    }
