"""Files that would make us open others: nothing but the file itself is ever opened.

The kernel is asked (inotify) whether anybody opened the other file.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.media_files import Maker

from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.types import Decoder
from karmma_pipeline.modalities import Reason

_IN_OPEN = 0x20
_NONBLOCK = os.O_NONBLOCK

SECRET = "SECRET"  # noqa: S105  (a place holder)
PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile SECRET\n",
    "concat": "# comment\nffconcat version 1.0\nfile 'SECRET'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nSECRET\n#EXT-X-ENDLIST\n",
    "hls_bom": "\ufeff#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nSECRET\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD mediaPresentationDuration="PT2S" type="static"><Period>'
    "<AdaptationSet><Representation id='1' bandwidth='1'><BaseURL>SECRET</BaseURL>"
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "smil": "<smil><body><video src='SECRET'/></body></smil>",
    "pls": "[playlist]\nFile1=SECRET\nNumberOfEntries=1\n",
    "url": "file:SECRET",
}


@pytest.fixture
def opened(make_video: Maker) -> Iterator[tuple[Path, int]]:
    """A video, and a descriptor that becomes readable when anybody opens it."""
    secret = make_video("secret.mp4")
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(_NONBLOCK)
    assert libc.inotify_add_watch(watch, str(secret).encode(), _IN_OPEN) > 0
    yield secret, watch
    os.close(watch)


def was_opened(watch: int) -> bool:
    try:
        return bool(os.read(watch, 4096))
    except BlockingIOError:
        return False


def test_the_watch_sees_a_file_being_opened(opened: tuple[Path, int]) -> None:
    secret, watch = opened
    assert not was_opened(watch)
    MediaFile(secret).frames(np.array([0.5]))
    assert was_opened(watch)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.mkv"])
def test_a_playlist_does_not_open_other_files(
    opened: tuple[Path, int], tmp_path: Path, kind: str, name: str, decoder: Decoder
) -> None:
    secret, watch = opened
    (tmp_path / name).write_text(PLAYLISTS[kind].replace(SECRET, str(secret)), encoding="utf-8")
    file = MediaFile(tmp_path / name, decoder=decoder)
    for read in (lambda: file.frames(np.array([0.5])), lambda: file.sound(0, 1, 16_000)):
        with pytest.raises(MediaFaultError) as caught:
            read()
        assert caught.value.reason in {Reason.UNSAFE_FILE, Reason.DECODE_ERROR}
    assert not was_opened(watch)


def test_an_mp4_whose_samples_lie_in_another_file_does_not_open_it(
    opened: tuple[Path, int], tmp_path: Path, make_video: Maker
) -> None:
    secret, watch = opened
    data = bytearray(make_video("clip.mp4", sound=False).read_bytes())
    at = data.index(b"url ", data.index(b"dref"))
    data[at + 7] = 0  # no longer "in this same file"
    (tmp_path / "clip.mp4").write_bytes(bytes(data))
    was_opened(watch)
    file = MediaFile(tmp_path / "clip.mp4")
    with suppress(MediaFaultError):
        file.frames(np.array([0.5]))
    assert not was_opened(watch)
    assert secret.is_file()
