"""Log-mel spectrograms as pictures: one of a whole window, or one around each frame.

Front ends, each after its authors' code, because networks trained on one see noise in another.
S samples; images are [mels, hops], low frequencies first.
"""

from collections.abc import Callable
from functools import cache

import cv2
import librosa
import numpy as np
import numpy.typing as npt

from karmma_pipeline.extraction.recipe import Audio

Sound = npt.NDArray[np.float32]
Image = npt.NDArray[np.float32]
FrontEnd = Callable[[Audio, Sound], Image]
ImageOf = Callable[[Audio, Sound, tuple[int, int]], Image]

# radevski: power below which sound counts as silence, -100 dB.
_FLOOR = 1e-10

# tensorflow/models, research/audioset/vggish/vggish_params.py.
_VGGISH_OFFSET, _VGGISH_HZ = 0.01, (125.0, 7500.0)

# Kaldi's defaults, which AST (YuanGongND/ast) keeps, with a Hann window and without dither.
_PREEMPHASIS, _KALDI_LOW_HZ, _KALDI_FLOOR = 0.97, 20.0, float(np.finfo(np.float32).eps)

# openai/whisper, whisper/audio.py: power in dB / 10, at most so far below its peak.
_WHISPER_RANGE = 8.0

# Front ends whose windows are centred on the hops.
_CENTRED = {"radevski", "auditory_slowfast", "whisper", "clap"}

# Those of them whose columns do not depend on one another, with silence around the sound.
_BY_COLUMN = {"radevski", "auditory_slowfast"}

# ekazakos/auditory-slow-fast, slowfast/datasets/audio_loader_epic.py.
_SLOWFAST_OFFSET = 1e-6

# transformers, Wav2Vec2FeatureExtractor.
_WAVE_FLOOR = 1e-7


def front_end(settings: Audio, sound: Sound) -> Image:
    """Return the log-mel spectrogram of sound [S], [mels, hops] with hops as it is long."""
    return _FRONT_ENDS[settings.front_end](settings, sound)


def reach(settings: Audio) -> tuple[int, int] | None:
    """Return how many samples before and behind its hop a column of `front_end` hears.

    None if it depends on all of the sound: on its mean, its loudest moment, or how long it is.
    """
    if settings.front_end not in _BY_COLUMN:
        return None
    # librosa pads a window that is shorter than the transform on both sides.
    before = settings.n_fft // 2 - (settings.n_fft - settings.win_length) // 2
    return before, settings.win_length - before


def log_mel(settings: Audio, sound: Sound, made_by: FrontEnd = front_end) -> Image:
    """Return the log-mel spectrogram of sound [S], float32 [mels, hops], not yet standardised.

    Args:
        settings: of the front end.
        sound: at its sample rate.
        made_by: what makes the columns, as `front_end` does.
    """
    image = made_by(settings, sound)
    if settings.hops is not None:
        image = image[:, : settings.hops]
        missing = settings.hops - image.shape[1]
        mode = "edge" if settings.front_end == "auditory_slowfast" else "constant"
        image = np.pad(image, ((0, 0), (0, missing)), mode)  # type: ignore[call-overload]
    return image.astype(np.float32)


def mel_image(
    settings: Audio, sound: Sound, size: tuple[int, int], made_by: FrontEnd = front_end
) -> Image:
    """Return a standardised log-mel image, float32 [h, w], low frequencies at the top."""
    standard = (log_mel(settings, sound, made_by) - settings.mean) / settings.std
    height, width = size
    if standard.shape == size:  # cv2 has a limit on the longer side, which a waveform exceeds
        return np.asarray(standard, np.float32)
    return np.asarray(cv2.resize(standard, (width, height)), np.float32)  # bilinear


def longest_s(settings: Audio) -> float:
    """Return the seconds of sound that fill a spectrogram; infinity if any length does."""
    if settings.hops is None:
        return float("inf")
    samples = (settings.hops - 1) * settings.hop_length
    if settings.front_end not in _CENTRED:  # their windows lie within the sound
        samples += settings.win_length
    if settings.front_end == "whisper":  # which drops the last hop
        samples += settings.hop_length
    return samples / settings.sample_rate


def _radevski(settings: Audio, sound: Sound) -> Image:
    filters = _slaney_filters(settings.sample_rate, settings.n_fft, settings.mels)
    power = filters @ (np.abs(_stft(settings, sound)) ** 2)
    return 10 * np.log10(np.maximum(power, _FLOOR))


def _auditory_slowfast(settings: Audio, sound: Sound) -> Image:
    filters = _htk_filters(settings.sample_rate, settings.n_fft, settings.mels)
    return np.log(filters @ np.abs(_stft(settings, sound)) + _SLOWFAST_OFFSET)


def _vggish(settings: Audio, sound: Sound) -> Image:
    sound = _at_least(sound, (settings.hops or 1) * settings.hop_length + settings.win_length)
    n = np.arange(settings.win_length)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / settings.win_length)
    magnitude = np.abs(np.fft.rfft(_framed(settings, sound) * window, settings.n_fft))
    filters = _triangles(settings.sample_rate, settings.n_fft, settings.mels, *_VGGISH_HZ)
    return np.log(filters @ magnitude.T + _VGGISH_OFFSET)


def _ast(settings: Audio, sound: Sound) -> Image:
    frames = _framed(settings, _at_least(sound - sound.mean(), settings.win_length))
    frames = frames - frames.mean(axis=1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - _PREEMPHASIS * before) * np.hanning(settings.win_length)
    power = np.abs(np.fft.rfft(frames, settings.n_fft)) ** 2
    top = settings.sample_rate / 2
    filters = _triangles(settings.sample_rate, settings.n_fft, settings.mels, _KALDI_LOW_HZ, top)
    return np.log(np.maximum(filters @ power.T, _KALDI_FLOOR))


def _whisper(settings: Audio, sound: Sound) -> Image:
    power = _reflected(settings, _at_least(sound, (settings.hops or 1) * settings.hop_length))
    image = np.log10(np.maximum(power, _FLOOR))[:, :-1]
    return np.maximum(image, image.max() - _WHISPER_RANGE)


def _clap(settings: Audio, sound: Sound) -> Image:
    samples = ((settings.hops or 1) - 1) * settings.hop_length
    sound = _at_least(np.tile(sound, max(1, samples // max(1, len(sound)))), samples)
    return 10 * np.log10(np.maximum(_reflected(settings, sound), _FLOOR))


def _waveform(settings: Audio, sound: Sound) -> Image:
    return sound[None, :: settings.hop_length]


def _standardised_waveform(settings: Audio, sound: Sound) -> Image:
    return _waveform(settings, (sound - sound.mean()) / np.sqrt(sound.var() + _WAVE_FLOOR))


def _reflected(settings: Audio, sound: Sound) -> Image:
    """Return the power in Slaney's bands, with windows centred on the hops of mirrored sound."""
    low, high = settings.low_hz or 0.0, settings.high_hz or settings.sample_rate / 2
    filters = _slaney_filters(settings.sample_rate, settings.n_fft, settings.mels, low, high)
    spectrum = librosa.stft(
        _at_least(sound, settings.n_fft),
        n_fft=settings.n_fft,
        win_length=settings.win_length,
        hop_length=settings.hop_length,
        pad_mode="reflect",
    )
    return filters @ (np.abs(spectrum) ** 2)


_FRONT_ENDS: dict[str, FrontEnd] = {
    "radevski": _radevski,
    "vggish": _vggish,
    "ast": _ast,
    "auditory_slowfast": _auditory_slowfast,
    "whisper": _whisper,
    "clap": _clap,
    "waveform": _waveform,
    "standardised_waveform": _standardised_waveform,
}


def _stft(settings: Audio, sound: Sound) -> npt.NDArray[np.complex64]:
    """Return the transform with windows centred on the hops, silence around the sound."""
    return librosa.stft(
        np.pad(sound, settings.n_fft // 2),  # librosa's own padding warns of short sound
        n_fft=settings.n_fft,
        win_length=settings.win_length,
        hop_length=settings.hop_length,
        center=False,
    )


def _framed(settings: Audio, sound: Sound) -> npt.NDArray[np.float64]:
    windows = np.lib.stride_tricks.sliding_window_view(sound, settings.win_length)
    return windows[:: settings.hop_length].astype(np.float64)


def _at_least(sound: Sound, samples: int) -> Sound:
    return np.pad(sound, (0, max(0, samples - len(sound))))


@cache
def _slaney_filters(
    rate: int, n_fft: int, mels: int, low_hz: float = 0.0, high_hz: float | None = None
) -> npt.NDArray[np.float32]:
    return librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=mels, fmin=low_hz, fmax=high_hz)


@cache
def _htk_filters(rate: int, n_fft: int, mels: int) -> npt.NDArray[np.float32]:
    return librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=mels, htk=True, norm=None)


@cache
def _triangles(
    rate: int, n_fft: int, mels: int, low_hz: float, high_hz: float
) -> npt.NDArray[np.float64]:
    """Return filters [mels, n_fft / 2 + 1] that are triangles over mel, as VGGish and Kaldi have.

    librosa's are triangles over Hz. The constant and Nyquist's frequency count for nothing.
    """
    edges = np.linspace(_mel(low_hz), _mel(high_hz), mels + 2)[:, None]
    bins = _mel(np.arange(n_fft // 2 + 1) * rate / n_fft)
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters: npt.NDArray[np.float64] = np.maximum(0, np.minimum(rise, fall))
    filters[:, [0, -1]] = 0
    return filters


def _mel(hz: "float | npt.NDArray[np.float64]") -> npt.NDArray[np.float64]:
    return np.asarray(1127.0 * np.log1p(np.asarray(hz) / 700.0))
