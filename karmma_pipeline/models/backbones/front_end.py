"""Settings of front ends: spectrogram implementations; the layout of object boxes.

Torch is not imported.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from karmma_pipeline.config import Recipe, without_defaults

#: Boxes of a frame.
BOX_SLOTS = 14

#: Numbers of a slot.
BOX_NUMBERS = 7

_SAMPLES: dict[str, Any] = {
    "sample_rate": 16_000, "n_fft": 1, "win_length": 1, "hop_length": 1, "mels": 1,
    "hops": 80_000, "frame_s": 5.0, "mean": 0.0, "std": 1.0,
}  # fmt: skip

#: What a front end sets beside its formulas; a recipe may override each. The defaults of `Audio`
#: are radevski's.
FRONT_ENDS: dict[str, dict[str, Any]] = {
    "radevski": {},
    "vggish": {
        "sample_rate": 16_000, "n_fft": 512, "win_length": 400, "hop_length": 160, "mels": 64,
        "hops": 96, "window_s": 0.975, "frame_s": 0.975, "mean": 0.0, "std": 1.0,
    },
    "ast": {
        "sample_rate": 16_000, "n_fft": 512, "win_length": 400, "hop_length": 160, "mels": 128,
        "hops": 1024, "frame_s": 10.255, "mean": -4.2677393, "std": 2 * 4.5689974,
    },
    "auditory_slowfast": {
        "sample_rate": 24_000, "n_fft": 2048, "win_length": 240, "hop_length": 120, "mels": 128,
        "hops": 400, "frame_s": 1.995, "mean": 0.0, "std": 1.0,
    },
    "whisper": {
        "sample_rate": 16_000, "n_fft": 400, "win_length": 400, "hop_length": 160, "mels": 80,
        "hops": 3000, "frame_s": 30.0, "mean": -4.0, "std": 4.0,
    },
    "clap": {
        "sample_rate": 48_000, "n_fft": 1024, "win_length": 1024, "hop_length": 480, "mels": 64,
        "hops": 1001, "frame_s": 10.0, "mean": 0.0, "std": 1.0, "low_hz": 50.0, "high_hz": 14_000.0,
    },
    "waveform": _SAMPLES,
    "standardised_waveform": _SAMPLES,
}  # fmt: skip


FrontEnd = Literal[
    "radevski",
    "vggish",
    "ast",
    "auditory_slowfast",
    "whisper",
    "clap",
    "waveform",
    "standardised_waveform",
]


class Audio(Recipe):
    """Log-mel spectrograms: one image per clip, or one per sampled video frame."""

    front_end: FrontEnd = Field(
        "radevski",
        description="Spectrogram implementation; it also sets the defaults of the keys below. "
        "radevski (ICCV 2023, the paper's predecessor): dB of power. vggish: log(magnitude + "
        "0.01), 125 to 7500 Hz. ast: Kaldi's log filter banks. auditory_slowfast: "
        "log(magnitude + 1e-6). whisper: log10 of power, at most 8 below its peak. clap: dB "
        "of power, short audio is repeated. waveform: the samples; standardised_waveform: "
        "with mean 0 and variance 1.",
    )
    sample_rate: int = Field(
        24_000, gt=0, le=1_000_000, description="Sample rate in Hz; the audio is resampled to it."
    )
    n_fft: int = Field(1024, gt=0, le=1_000_000, description="FFT length in samples.")
    win_length: int = Field(160, gt=0, le=1_000_000, description="Window length in samples.")
    hop_length: int = Field(80, gt=0, le=1_000_000, description="Hop in samples.")
    mels: int = Field(128, gt=0, le=4_096, description="Mel bands.")
    low_hz: float | None = Field(
        None, ge=0, description="Lowest frequency of the mel bands, Hz; clap and whisper only."
    )
    high_hz: float | None = Field(
        None,
        gt=0,
        description="Highest frequency, Hz; null: half of the sample rate; clap and whisper only.",
    )
    hops: int | None = Field(
        None,
        gt=0,
        description="Length of the spectrogram in hops. Shorter audio is padded as in the "
        "original (ast: zeros, auditory_slowfast: last hop, vggish and whisper: silence), "
        "longer audio is cropped to its centre; null: the length of the audio.",
    )
    window_s: float | None = Field(
        None,
        gt=0,
        description="Seconds around the centre of the clip, for image networks; "
        "null: the whole clip.",
    )
    frame_s: float = Field(
        1.116, gt=0, description="Seconds around each frame, for video networks."
    )
    mean: float = Field(-28.1125, description="Mean that is subtracted from the log-mel values.")
    std: float = Field(
        16.5627, gt=0, description="Standard deviation by which the log-mel values are divided."
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """Fill in what the front end sets and the recipe leaves out."""
        if not isinstance(given, dict):
            return given
        return {**FRONT_ENDS.get(str(given.get("front_end", "radevski")), {}), **given}

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.win_length > self.n_fft:
            raise ValueError(f"win_length={self.win_length} must not exceed n_fft={self.n_fft}")
        return self

    @property
    def image(self) -> tuple[int, int] | None:
        """Mel bands and hops of a spectrogram; None if sound of any length is one."""
        return None if self.hops is None else (self.mels, self.hops)

    _as_stored = without_defaults("low_hz", "high_hz")
