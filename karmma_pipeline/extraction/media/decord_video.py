"""decord, for who asks for it: it seeks right only in files that have nothing unusual.

It takes every key frame for a clean entry and numbers for times, so that it gives other pictures,
seconds off, of open GOPs, edit lists, copies that were cut, fragments and intra refresh. It is
used for files alone of which the packets prove that they have none of these.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  (before decord, which crashes some CUDA builds otherwise)
from av.bitstream import BitStreamFilterContext

import decord  # isort: skip

from karmma_pipeline.extraction.media.container import StreamInfo, open_container
from karmma_pipeline.extraction.media.interface import MediaFaultError, first_line
from karmma_pipeline.extraction.media.packet_index import PacketIndex, read_index, until_end
from karmma_pipeline.extraction.types import Numbers, Times, end_of
from karmma_pipeline.modalities import Reason

# Full-size frames in memory at a time: a 4K frame takes 25 MB.
_MAX_BATCH = 16

# Share of frames that decord may replace silently by their neighbours: none.
_NO_REPEATS = 1e-9

# Codecs some of whose key frames build on earlier ones, and the filter that keeps the others.
_RESTARTS = {"h264": "filter_units=pass_types=5", "hevc": "filter_units=pass_types=19-20"}

_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError)

decord.logging.set_level(decord.logging.QUIET)  # faults are reported as reasons


class DecordVideo:
    """The default video stream of a file.

    Args:
        path: the file.
        info: of the stream.
        left_half: of each picture, give the left half.

    Attributes:
        starts: start of every frame, seconds on the file's clock [frames].
        stop_s: end of the last frame.

    Raises:
        MediaFaultError: decord cannot read it, or would not read it exactly.
    """

    decoder = "decord"

    def __init__(self, path: Path, info: StreamInfo, left_half: bool = False) -> None:
        self._parts = 2 if left_half else 1
        index = read_index(path, info.index)
        if fault := _unproved(path, info, index):
            raise MediaFaultError(
                Reason.DECODE_ERROR,
                f"{path}: decord may return wrong frames, as {fault}; use video_decoder: pyav",
            )
        # One thread: the pool has a process per CPU, and decord's threads would not stop on a
        # fault. `fault_tol` counts frames that it replaces by a neighbour, by default silently.
        try:
            self._reader = decord.VideoReader(
                str(path.absolute()), ctx=decord.cpu(), num_threads=1, fault_tol=_NO_REPEATS
            )
        except _ERRORS as error:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: {first_line(error)}") from None
        if len(self._reader) != len(index.times):
            raise MediaFaultError(
                Reason.DECODE_ERROR, f"{path}: decord reports a different number of frames"
            )
        self.starts: Times = index.times * info.tick_s - info.first_s + info.delay_s
        self.stop_s = end_of(self.starts, index.last * info.tick_s)

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield frames by ascending number, uint8 [H, W, 3] in RGB, turned as their file says.

        What a clip gets does not depend on what was read before it.

        Raises:
            MediaFaultError: they cannot be decoded; the reader is of no more use.
        """
        try:
            # From the start each time: a reader left in the middle of a video gives other pictures
            # after some seeks than a fresh one.
            self._reader.seek(0)
            for first in range(0, len(numbers), _MAX_BATCH):
                batch = numbers[first : first + _MAX_BATCH]
                pictures = self._reader.get_batch(batch).asnumpy()
                pictures = pictures[:, :, : pictures.shape[2] // self._parts]
                yield from zip(batch.tolist(), pictures, strict=True)
            # A reader that idles in the middle would go on to fill its queue of decoded frames.
            self._reader.seek(0)
        except _ERRORS as error:
            raise MediaFaultError(Reason.DECODE_ERROR, first_line(error)) from None

    def close(self) -> None:
        """Let go of the file."""
        del self._reader


def _unproved(path: Path, info: StreamInfo, index: PacketIndex) -> str | None:
    """Say what keeps a file from being proved clean by its packets; None: it is."""
    if not info.default:
        return "it reads the default stream only"
    if not index.is_clean:
        return "the packet timestamps do not prove that seeking to every key frame is exact"
    with open_container(path) as container:
        stream = container.streams[info.index]
        if len(container.streams.video) > 1:
            return "the file has several video streams"
        # What is in fragments is not in the index that a file has at its start.
        if "mp4" in container.format.name and len(stream.index_entries) != len(index.marks):
            return "the file has no index of all its frames"
        name = stream.codec_context.name
        if name not in _RESTARTS:
            return None
        keep = BitStreamFilterContext(_RESTARTS[name], stream)
        for packet in until_end(container.demux(stream)):
            if packet.size and packet.is_keyframe and not keep.filter(packet):
                return "a key frame may depend on earlier frames"
    return None
