"""Memory of a process that reads many files, each opened, read by both decoders and closed.

    python benchmarks/readers.py --files 1000

Each file is a path of its own (a hard link to one video of 1280x720 with sound). The table shows
the memory of the process in the run's tenths; flat means that readers give back what they take.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.media_files import write_video

from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.types import Decoder

DECODERS: tuple[Decoder, ...] = ("decord", "pyav")


def read(path: Path, decoder: Decoder) -> None:
    """Read four frames and a second of sound."""
    file = MediaFile(path, decoder=decoder)
    file.frames(np.array([0.2, 0.7, 1.2, 1.7]))
    file.sound(0.5, 1.5, 24_000)
    file.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    options = parser.parse_args()
    me, sizes = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        video = write_video(Path(folder) / "video.mp4", size=(1280, 720))
        for number in range(options.files):
            path = Path(folder) / f"{number}.mp4"
            os.link(video, path)
            for decoder in DECODERS:
                read(path, decoder)
            sizes.append(me.memory_info().rss / 1e6)
    tenths = np.array_split(np.array(sizes), 10)
    print("| files read | memory, MB (largest) | to the second tenth |\n|---|---|---|")
    done = 0
    for tenth in tenths:
        done += len(tenth)
        print(f"| {done} | {tenth.max():.0f} | {tenth.max() / tenths[1].max():.2f} |")


if __name__ == "__main__":
    main()
