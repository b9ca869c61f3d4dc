"""Each front end against values worked out from its formula, or by its authors' own library."""

import librosa
import numpy as np
import pytest

from karmma_pipeline import config
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.spectrogram import log_mel, longest_s, mel_image
from karmma_pipeline.extraction.recipe import Audio

AUDIO = Audio(sample_rate=16_000, n_fft=512, win_length=400, hop_length=160, mels=40)


def test_a_pure_tone_has_the_level_that_theory_gives_and_lies_in_its_band() -> None:
    """Parseval by hand: the power of a sine of amplitude a under a Hann window of n samples
    peaks at (a n / 4)^2; the mel filter around it has the Slaney area normalisation."""
    hz, amplitude = 1000.0, 0.5
    t = np.arange(16_000) / 16_000
    mel = log_mel(AUDIO, (amplitude * np.sin(2 * np.pi * hz * t)).astype(np.float32))
    middle = mel[:, mel.shape[1] // 2]
    # Slaney's mel scale is linear below 1 kHz: 200/3 Hz each; then logarithmic.
    top = 15 + np.log(8000 / 1000) / (np.log(6.4) / 27)
    edges = np.linspace(0, top, 42)
    low = edges[:-2][np.argmax(middle)]
    high = edges[2:][np.argmax(middle)]
    assert low <= 15 <= high
    bins = np.arange(257) * 16_000 / 512
    window = np.hanning(401)[:400]
    spectrum = np.abs(np.fft.rfft(amplitude * np.sin(2 * np.pi * hz * t[:400]) * window, 512)) ** 2

    def to_hz(mels: float) -> float:
        return mels * 200 / 3 if mels < 15 else 1000 * np.exp((mels - 15) * np.log(6.4) / 27)

    left, centre, right = (to_hz(edges[np.argmax(middle) + i]) for i in range(3))
    rise, fall = (bins - left) / (centre - left), (right - bins) / (right - centre)
    weights = np.maximum(0, np.minimum(rise, fall)) * 2 / (right - left)
    assert middle.max() == pytest.approx(10 * np.log10(weights @ spectrum), abs=0.1)


def test_silence_is_the_floor_not_absence() -> None:
    image = mel_image(AUDIO, np.zeros(16_000, np.float32), (64, 96))
    assert image.shape == (64, 96)
    np.testing.assert_allclose(image, (-100 - AUDIO.mean) / AUDIO.std, rtol=1e-5)


def chirp(seconds: float = 1.0) -> np.ndarray:
    t = np.arange(round(16_000 * seconds)) / 16_000
    sweep = 0.25 * np.sin(2 * np.pi * (1000 + 2000 * t) * t)
    return (0.5 * np.sin(2 * np.pi * 440 * t) + sweep).astype(np.float32)


def mel(hz: float) -> float:
    return 1127 * float(np.log(1 + hz / 700))


def test_ast_gives_what_kaldi_gives() -> None:
    """Golden values: torchaudio 2.11 compliance.kaldi.fbank, with AST's arguments."""
    image = log_mel(Audio.model_validate({"front_end": "ast"}), chirp())
    wanted = [
        [-14.4054, -0.3591, -4.5993, -14.7302, -15.9424, -15.9424],
        [-14.4316, -0.3595, -14.3972, -9.0157, -15.9424, -15.9424],
        [-14.4693, -0.3596, -13.2671, -15.9424, -8.8872, -15.9424],
        [-13.6616, -0.3586, -13.3751, -15.9424, -15.9069, -15.9424],
    ]
    found = image[[5, 20, 40, 63, 90, 127]][:, [0, 10, 50, 97]].T
    np.testing.assert_allclose(found, wanted, atol=4e-3)
    assert image.shape == (128, 1024)
    assert not image[:, 98:].any()  # padded with zeros before it is standardised
    standard = mel_image(Audio.model_validate({"front_end": "ast"}), chirp(), (128, 1024))
    np.testing.assert_allclose(standard[:, 1000], 4.2677393 / (2 * 4.5689974), rtol=1e-5)


def test_vggish_is_the_log_of_magnitudes_in_triangles_over_mel() -> None:
    """By hand, one value: hop 30, band 22, from vggish_params.py and mel_features.py."""
    settings, sound = Audio.model_validate({"front_end": "vggish"}), chirp()
    image = log_mel(settings, sound)
    assert image.shape == (64, 96)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    magnitude = np.abs(np.fft.fft(sound[30 * 160 : 30 * 160 + 400] * window, 512))
    step = (mel(7500) - mel(125)) / 65
    for band in (0, 12, 22, 63):
        low = mel(125) + band * step
        total = 0.0
        for k in range(1, 257):
            m = mel(k * 16_000 / 512)
            total += max(0.0, min((m - low) / step, (low + 2 * step - m) / step)) * magnitude[k]
        assert image[band, 30] == pytest.approx(np.log(total + 0.01), abs=1e-4)
    assert log_mel(settings, sound[:3000])[:, -1] == pytest.approx(np.log(0.01))


def test_auditory_slowfast_is_what_its_loader_computes_with_librosa() -> None:
    settings = Audio.model_validate({"front_end": "auditory_slowfast"})
    sound = np.random.default_rng(0).normal(size=24_000).astype(np.float32) * 0.1
    spectrum = librosa.stft(
        sound, n_fft=2048, window="hann", hop_length=120, win_length=240, pad_mode="constant"
    )
    basis = librosa.filters.mel(sr=24_000, n_fft=2048, n_mels=128, htk=True, norm=None)
    wanted = np.log(basis @ np.abs(spectrum) + 1e-6)
    image = log_mel(settings, sound)
    np.testing.assert_allclose(image[:, :201], wanted, atol=1e-5)
    assert image.shape == (128, 400)
    np.testing.assert_array_equal(image[:, 399], image[:, 200])  # the last hop goes on


def test_radevski_is_decibels_of_librosas_power_mels() -> None:
    sound = np.random.default_rng(0).normal(size=26_784).astype(np.float32) * 0.1
    wanted = librosa.power_to_db(
        librosa.feature.melspectrogram(
            y=sound, sr=24_000, n_fft=1024, win_length=160, hop_length=80, n_mels=128,
            pad_mode="constant",
        ),
        ref=1.0, amin=1e-10, top_db=None,
    )  # fmt: skip
    np.testing.assert_allclose(log_mel(Audio(), sound), wanted, atol=1e-3)
    standard = mel_image(Audio(), sound, wanted.shape)
    np.testing.assert_allclose(standard, (wanted + 28.1125) / 16.5627, atol=1e-3)


@pytest.mark.parametrize("name", ["vggish", "ast", "auditory_slowfast"])
def test_the_longest_sound_fills_the_spectrogram_exactly(name: str) -> None:
    settings = Audio.model_validate({"front_end": name})
    sound = np.ones(round(longest_s(settings) * settings.sample_rate), np.float32)
    endless = settings.model_copy(update={"hops": None})
    assert log_mel(endless, sound).shape[1] in {settings.hops, (settings.hops or 0) + 1}
    assert log_mel(settings, sound[:100]).shape[1] == settings.hops


def test_a_recipe_may_override_what_the_front_end_sets() -> None:
    settings = config.build(Audio, {"front_end": "ast", "mels": 64}, "test")
    assert (settings.mels, settings.hops, settings.sample_rate) == (64, 1024, 16_000)
    assert config.build(Audio, settings.model_dump(), "test") == settings
    with pytest.raises(ConfigError, match="win_length=2000 must not exceed n_fft=1024"):
        config.build(Audio, {"win_length": 2000}, "test")
