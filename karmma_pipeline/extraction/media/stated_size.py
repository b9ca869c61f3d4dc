"""The size that a file states: tells a truncated file without demuxing all of it."""

import os
import re
from pathlib import Path

_BOXED = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"moof", b"sidx", b"styp"}
_NAME = re.compile(rb"[ -~\xa9]{4}")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"

# Sizes from here on are placeholders: whoever writes into a pipe does not know the real one.
_OPEN_RIFF = 0x7FFF_0000


def stated_size(path: Path, size: int) -> int:
    """Return how many bytes a file's own structure asks for; 0 if it does not say."""
    with path.open("rb") as file:
        head = file.read(4096)
        if head[:4] == _EBML:
            return _segment_end(head)
        if head[:4] == b"RIFF" or head[4:8] in _BOXED:
            return _last_end(file.fileno(), size, riff=head[:4] == b"RIFF")
    # Packets of transport streams begin with G, one in every 188 bytes, or 192, or 204. How many
    # they should be is not said.
    for packet, mark in ((188, 0), (192, 4), (204, 0)):
        if head[mark::packet][:3] == b"GGG":
            return size + packet - size % packet if size % packet else 0
    return -(-size // 512) * 512 if head[257:262] == b"ustar" else 0


def _last_end(descriptor: int, size: int, *, riff: bool) -> int:
    """Return where the last top-level part of an MP4, MOV, AVI or WAV file ends."""
    # A part of RIFF has its name, its length (small end first) without these eight bytes, its
    # content. A box has its length (big end first), its name, its content; length 1: the real one
    # follows in 8 bytes; length 0: to the end of the file. Parts are jumped over, and their number
    # is bounded: a hostile file may hold a million of nothing.
    end = 0
    for _ in range(10_000):
        head = os.pread(descriptor, 16, end)
        length = (
            int.from_bytes(head[4:8], "little") + 8 if riff else int.from_bytes(head[:4], "big")
        )
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        if len(head) < 8:
            return end + 8
        if not (riff or _NAME.match(head, 4)):
            return 0  # something else that was appended
        if length < 8 or (riff and (head[:4] != b"RIFF" or not 8 < length < _OPEN_RIFF)):
            return end if riff else 0
        end += length
        if end >= size:
            return end - riff  # a last byte may be padding
    return 0


def _segment_end(head: bytes) -> int:
    """Return where the segment of a Matroska or WebM file ends, 0 where that is left open."""
    # The one segment holds all media. Its name is followed by its length: the zero bits before the
    # first one bit tell how many bytes that has, and nothing but ones means that it is unknown, as
    # live recordings leave it.
    rest = head.partition(_SEGMENT)[2]
    if not rest or not rest[0]:
        return 0
    width = 9 - rest[0].bit_length()
    mask = (1 << 7 * width) - 1
    length = int.from_bytes(rest[:width], "big") & mask
    return 0 if length == mask else len(head) - len(rest) + width + length
