from collections import Counter
from itertools import takewhile
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from karmma_pipeline.data.manifest import Clip, Manifest, read_manifest
from karmma_pipeline.data.sample import write_sample
from karmma_pipeline.data.sample.scene import NOUNS, VERBS, handwriting, tone_hz
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample")
    write_sample(path, clips=64)
    return path


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    return read_manifest(root / "manifest.csv")


def path_of(clip: Clip, modality: str) -> Path:
    source = clip.media[modality]
    assert isinstance(source, FileSource)
    return source.path


def decode(path: Path, stop_s: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    with av.open(str(path)) as container:
        shown = takewhile(lambda frame: frame.time < stop_s, container.decode(video=0))
        frames = [(f.time, f.to_ndarray(format="gray")) for f in shown]
    return np.array([t for t, _ in frames]), np.stack([f for _, f in frames])


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_equal_seeds_give_equal_files_and_other_seeds_others_and_what_is_missing_is_made_again(
    tmp_path: Path,
) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write_sample(tmp_path / name, clips=8, seed=seed)
    one, other = tree(tmp_path / "one"), tree(tmp_path / "other")
    assert tree(tmp_path / "again") == one
    video = "videos/v0000.mp4"
    assert one[video] != other[video]
    (tmp_path / "one" / video).unlink()
    write_sample(tmp_path / "one", clips=8)
    assert tree(tmp_path / "one") == one


def test_other_settings_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="contains a sample made with"):
        write_sample(root, clips=9)


def test_classes_are_balanced_and_both_splits_are_there(manifest: Manifest) -> None:
    assert len(manifest.clips) == 64
    verbs = Counter(c.labels["verb"] for c in manifest.clips if c.split == "train")
    assert len(verbs) == len(VERBS)
    assert max(verbs.values()) - min(verbs.values()) <= 1
    assert sum(c.split == "val" for c in manifest.clips) == 16


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "val", "test", "networks")])
def test_splits_share_no_handwriting(splits: tuple[str, ...]) -> None:
    for noun in range(len(NOUNS)):
        shown = [handwriting(split, noun, apart="test" in splits) for split in splits]
        assert all(map(len, shown))
        assert len(np.unique(np.concatenate(shown))) == sum(map(len, shown))


@pytest.mark.slow
def test_a_test_split_leaves_the_labels_of_the_others_as_they_are(tmp_path: Path) -> None:
    path = write_sample(tmp_path, clips=16, test=8)
    splits = Counter(clip.split for clip in read_manifest(path).clips)
    assert splits == {"train": 12, "val": 4, "test": 8}
    with pytest.raises(ConfigError, match="'test': 8"):
        write_sample(tmp_path, clips=16)


def test_media_differ_as_real_ones_do(root: Path) -> None:
    tracks, silent, sizes, rates = [], 0, set(), set()
    for path in sorted((root / "videos").iterdir()):
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            sizes.add((video.height, video.width))
            rates.add(round(float(video.average_rate or 0)))
            tracks.append(bool(container.streams.audio))
            if container.streams.audio:
                sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
                silent += float(np.abs(sound).max()) < 1e-4
    assert 0 < tracks.count(False) < len(tracks) / 2
    assert silent
    assert len(sizes) > 2
    assert len(rates) > 2


def test_one_file_has_a_variable_frame_rate(root: Path) -> None:
    steps = {n: np.diff(decode(root / f"videos/v{n:04d}.mp4")[0]) for n in (0, 1)}
    assert steps[0].std() < 1e-3
    assert steps[1].std() > 1e-2


def test_the_tone_is_the_digits(root: Path, manifest: Manifest) -> None:
    """The two telephone frequencies stand out of the spectrum; the loudest clip of each video."""
    right = []
    for clip in manifest.clips:
        with av.open(str(path_of(clip, "audio"))) as container:
            if not container.streams.audio:
                continue
            sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
        span = sound[int(clip.start_s * 16_000) : int((clip.stop_s or 0) * 16_000)]
        if np.abs(span).max() < 1e-3:
            continue
        spectrum = np.abs(np.fft.rfft(span))
        hz = np.fft.rfftfreq(len(span), 1 / 16_000)
        level = [
            min(spectrum[np.abs(hz - f) < 4].max() for f in tone_hz(n)) for n in range(len(NOUNS))
        ]
        right.append(NOUNS[int(np.argmax(level))] == manifest.heads["noun"][clip.labels["noun"]])
    assert np.mean(right) > 0.6


def test_the_digit_moves_where_the_verb_says(manifest: Manifest) -> None:
    errors = []
    for clip in manifest.clips[::4]:  # one of each video
        times, frames = decode(path_of(clip, "rgb"), clip.stop_s or 0)
        chosen = frames[times >= clip.start_s]
        first, last = (cv2.GaussianBlur(f.astype(np.float32), (0, 0), 2) for f in chosen[[0, -1]])
        places = []
        for one, other in ((first, last), (last, first)):
            weight = np.clip(one - other - 25, 0, None)
            y, x = np.indices(weight.shape)
            places.append([(x * weight).sum(), (y * weight).sum()] / (weight.sum() + 1e-6))
        dx, dy = places[1] - places[0]
        verb = VERBS.index(manifest.heads["verb"][clip.labels["verb"]])
        turn = np.arctan2(dy, dx) - verb * np.pi / 4
        errors.append(abs((turn + np.pi) % (2 * np.pi) - np.pi))
    assert np.median(errors) < np.pi / 8


def test_too_few_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clips=3"):
        write_sample(tmp_path, clips=3)
