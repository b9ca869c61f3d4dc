"""The recipe of an extraction: which clips, which moments of them, which networks, which store."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from karmma_pipeline.config import Recipe
from karmma_pipeline.data.store.spec import Dtype
from karmma_pipeline.models.backbones import BackboneChoice


class Sampling(Recipe):
    """Which moments of a clip are looked at; always by time, never by frame number."""

    mode: Literal["uniform", "fps"] = Field(
        "uniform",
        description="uniform: the centres of T equal segments of the clip (short clips repeat\n"
        "frames). fps: T frames at a fixed rate around the clip's centre.",
    )
    fps: float = Field(15.0, gt=0, description="Frames per second of mode fps.")
    short: Literal["repeat_last", "repeat_ends"] = Field(
        "repeat_last",
        description="What mode fps does with a clip shorter than T frames. repeat_last: start at\n"
        "its start and repeat its last frame; repeat_ends: stay centred and repeat both ends.",
    )


class Flow(Recipe):
    """Optical flow between the frames at t and t + gap_s, at the network's input size."""

    source: Literal["dis"] = Field("dis", description="dis: OpenCV's DIS, on the CPU.")
    preset: Literal["ultrafast", "fast", "medium"] = Field("fast", description="DIS preset.")
    gap_s: float = Field(
        1 / 15,
        gt=0,
        description="Seconds between the two frames. A file has none at exactly that distance:\n"
        "the nearest other frame is taken and the motion scaled to gap_s.",
    )
    bound_px: float = Field(
        20.0,
        gt=0,
        description="Motion is clipped to +-bound px per gap and scaled to bytes with 128 = 0;\n"
        "channels are (u, v, 128), then normalised like RGB. 20 is the two-stream convention.",
    )


class Audio(Recipe):
    """Log-mel spectrograms: one image per clip, or one per sampled video frame.

    Defaults are those of the paper's predecessor (Radevski et al., ICCV 2023).
    """

    sample_rate: int = Field(24_000, gt=0, description="Hz; the track is resampled to it.")
    n_fft: int = Field(1024, gt=0, description="FFT length in samples.")
    win_length: int = Field(160, gt=0, description="Window length in samples.")
    hop_length: int = Field(80, gt=0, description="Hop in samples.")
    mels: int = Field(128, gt=0, description="Mel bands.")
    window_s: float | None = Field(
        None, gt=0, description="Seconds around the clip's centre for an image; null: the clip."
    )
    frame_s: float = Field(1.116, gt=0, description="Seconds around each frame, for video nets.")
    mean_db: float = Field(-28.1125, description="Subtracted from the dB values ...")
    std_db: float = Field(16.5627, gt=0, description="... which are then divided by this.")


class StoreSettings(Recipe):
    """How tokens lie on disk."""

    dtype: Dtype = Field("float16", description="Type of the tokens on disk.")
    clips_per_shard: int = Field(
        256, gt=0, description="Clips of one shard file, which one job writes alone."
    )


class Decode(Recipe):
    """The processes that read media."""

    workers: int | None = Field(
        None, gt=0, description="Processes; null: half of the CPUs, beside a GPU all but one."
    )
    timeout_s: float = Field(120.0, gt=0, description="Seconds for the clips of one task.")
    memory_gb: float = Field(
        8.0, gt=0, description="A process that takes more is killed; its clips are out_of_memory."
    )
    queue_gb: float = Field(
        1.0,
        gt=0,
        description="Memory for clips that are decoded ahead of the networks, all together.",
    )


class ExtractRecipe(Recipe):
    """Everything that an extraction depends on."""

    manifest: Path = Field(description="CSV with the clips.", examples=["manifest.csv"])
    out: Path = Field(
        description="Folder; each backbone set gets a store in it.", examples=["features"]
    )
    sampling: Sampling = Field(Sampling(), description="Moments of a clip.")
    flow: Flow = Field(Flow(), description="Optical flow.")
    audio: Audio = Field(Audio(), description="Spectrograms.")
    sets: dict[str, dict[str, BackboneChoice]] = Field(
        min_length=1,
        description="Backbone sets: name to modality (rgb, flow, audio) to network. Several sets\n"
        "come out of one decode, each into its own store.",
        examples=[
            {
                "teacher": {
                    "rgb": {"name": "swin3d_b", "tokens": [12, 5, 5]},
                    "flow": {"name": "swin3d_b", "tokens": [12, 5, 5]},
                    "audio": {"name": "swin3d_b", "tokens": [12, 5, 5]},
                }
            }
        ],
    )
    store: StoreSettings = Field(StoreSettings(), description="Feature stores.")
    decode: Decode = Field(Decode(), description="Reading of media.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Clips that go through a network at once. auto, here and in the next two:\n"
        "what a short calibration on this device finds fastest. The first run of a store\n"
        "calibrates, the store records it, every later run of it computes in the same way.",
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="Of convolutions and products. auto tries what the device is fast at and\n"
        "keeps it only if every token stays within cosine 0.999 of float32.",
    )
    layout: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto", description="Order of the numbers of a picture or video in memory."
    )
    compile: bool = Field(
        False, description="torch.compile: minutes at the start, faster forward passes after."
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="Device memory that batch_size auto may use for a forward pass; null: 80 % of\n"
        "what is free, on a CPU half.",
    )
    max_failures: float = Field(
        0.05, ge=0, le=1, description="Share of clips that may lose a modality to an error."
    )

    @field_validator("sets")
    @classmethod
    def _known_modalities(
        cls, sets: dict[str, dict[str, BackboneChoice]]
    ) -> dict[str, dict[str, BackboneChoice]]:
        for name, choices in sets.items():
            unknown = sorted(set(choices) - {"rgb", "flow", "audio"})
            if unknown or not choices:
                raise ValueError(
                    f"set {name!r} has the modalities {sorted(choices)}; "
                    "known are rgb, flow, audio, and one is needed"
                )
        return sets
