"""Log-mel spectrograms as pictures: one of a whole window, or one around each frame."""

from functools import cache

import cv2
import librosa
import numpy as np
import numpy.typing as npt

from karmma_pipeline.extract.recipe import Audio

Sound = npt.NDArray[np.float32]
Image = npt.NDArray[np.float32]

_FLOOR = 1e-10
"""Power below which sound counts as silence: -100 dB."""


@cache
def _mel_filters(settings: Audio) -> npt.NDArray[np.float32]:
    return librosa.filters.mel(sr=settings.sample_rate, n_fft=settings.n_fft, n_mels=settings.mels)


def log_mel(settings: Audio, sound: Sound) -> Image:
    """Return the log-mel spectrogram of sound [S] in dB, float32 [mels, hops]."""
    spectrum = librosa.stft(
        sound,
        n_fft=settings.n_fft,
        win_length=settings.win_length,
        hop_length=settings.hop_length,
        pad_mode="constant",
    )
    power = _mel_filters(settings) @ (np.abs(spectrum) ** 2)
    return (10 * np.log10(np.maximum(power, _FLOOR))).astype(np.float32)


def mel_image(settings: Audio, sound: Sound, size: tuple[int, int]) -> Image:
    """Return a standardised log-mel image, float32 [h, w], low frequencies at the top."""
    standard = (log_mel(settings, sound) - settings.mean_db) / settings.std_db
    height, width = size
    return np.asarray(cv2.resize(standard, (width, height)), np.float32)  # bilinear
