"""The recipe of an extraction: clips, sampling, backbones, store; and reading its clips."""

import difflib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.data.datasets import Dataset, published_sensors, read_dataset
from karmma_pipeline.data.manifest import RESERVED, SIDECAR, Manifest, read_manifest
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.errors import ConfigError, ManifestError, counted
from karmma_pipeline.modalities import KNOWN
from karmma_pipeline.models.backbones.choice import BackboneChoice
from karmma_pipeline.models.backbones.front_end import Audio as Audio
from karmma_pipeline.store.spec import Dtype
from karmma_pipeline.views import Views

_logger = logging.getLogger(__name__)

#: With fewer clips than these a share of them says nothing: one bad file of five is no failure.
FEW_CLIPS = 20

# Faulty entries that are named; the JSON of `karmma plan` has them all.
_SHOWN = 20


class Sampling(Recipe):
    """Which moments of a clip are looked at; always by time, never by frame number."""

    mode: Literal["uniform", "fps"] = Field(
        "uniform",
        description="uniform: the centres of T equal segments of the clip (short clips repeat "
        "frames). fps: T frames at a fixed rate around the centre of the clip.",
    )
    fps: float = Field(15.0, gt=0, description="Frame rate of mode fps.")
    short: Literal["repeat_last", "repeat_ends"] = Field(
        "repeat_last",
        description="How mode fps pads clips shorter than T frames. repeat_last: begin at the "
        "first frame and repeat the last; repeat_ends: stay centred and repeat both ends.",
    )
    tolerance_s: float = Field(
        0.5,
        ge=0,
        description="Tolerance in seconds between a frame and its requested time, and between "
        "a clip and the ends of its file. Beyond it, the modality is absent "
        "(timestamp_mismatch, out_of_range). Videos with longer frames, such as slide shows, "
        "are exempt from the former.",
    )


class Flow(Recipe):
    """Optical flow between the frames at t and t + gap_s, in px of the network's input.

    A data set's own u and v pictures are taken as they are and brought to this scale.
    """

    source: Literal["dis", "raft_small", "raft_large"] = Field(
        "dis",
        description="How flow is computed if the data set has none. dis: OpenCV's DIS on the "
        "CPU; raft_*: torchvision's RAFT on the device of the backbones.",
    )
    preset: Literal["ultrafast", "fast", "medium"] = Field("fast", description="DIS preset.")
    weights: str = Field(
        "DEFAULT",
        description="RAFT: a torchvision weight (DEFAULT, C_T_V2, ...), the path of a state dict, "
        "or random:SEED.",
    )
    updates: int = Field(
        12, gt=0, description="RAFT: number of flow updates; the last one is used."
    )
    pairs_at_once: int = Field(16, gt=0, description="RAFT: frame pairs per forward pass.")
    gap_s: float = Field(
        1 / 15,
        gt=0,
        description="Seconds between the two frames of a pair. If no frame is exactly there, "
        "the nearest one is used and the flow is scaled to gap_s.",
    )
    bound_px: float = Field(
        20.0,
        gt=0,
        description="Flow is clipped to +-bound_px and scaled to bytes, with 128 = 0. The "
        "channels (u, v, 128) are normalised like RGB, by the backbone's transform. 20 is the "
        "two-stream convention.",
    )


class StoreSettings(Recipe):
    """How tokens lie on disk."""

    dtype: Dtype = Field("float16", description="Data type of the tokens on disk.")
    clips_per_shard: int = Field(
        256, gt=0, description="Clips per shard file; a shard is written by one job."
    )


class Decode(Recipe):
    """The processes that read media."""

    workers: int | None = Field(
        None,
        gt=0,
        description="Number of decode processes; null: half of the CPUs, or all "
        "but one if a GPU is used.",
    )
    timeout_s: float = Field(
        120.0,
        gt=0,
        description="Maximum CPU seconds to decode a clip. Above, the process is killed and "
        "the clip is retried alone; if that fails too, its reason is timeout.",
    )
    stall_s: float = Field(
        300.0,
        gt=0,
        description="Seconds without CPU use or reads after which a decode process counts as "
        "stalled. Waiting for a CPU does not count.",
    )
    memory_gb: float = Field(
        8.0,
        gt=0,
        description="Memory limit of a decode process in GB. Above, it is killed, and the "
        "reason of its clip is out_of_memory.",
    )
    queue_gb: float = Field(
        1.0,
        gt=0,
        description="Total memory for prefetched clips.",
    )


def _video(name: str) -> dict[str, Any]:
    """Return a network as the paper uses it: 32 frames, 300 tokens."""
    return {"name": name, "weights": "KINETICS400_V1", "frames": 32, "tokens": [12, 5, 5]}


class ExtractRecipe(Recipe):
    """Everything that an extraction depends on."""

    manifest: Path | None = Field(
        None,
        description="CSV with the clips; or omit it and set dataset below.",
        examples=["manifest.csv"],
    )
    dataset: Dataset | None = Field(
        None,
        description="A published data set instead of a manifest. kind: epic_kitchens_100, "
        "something_something_v2, ego4d_fho_lta, ego_exo4d_keysteps, utd_mhad, folder_tree or "
        "csv; then root and annotations. See docs/datasets.md.",
    )
    out: Path = Field(
        description="Output folder, with one feature store per backbone set.",
        examples=["features"],
    )
    sampling: Sampling = Field(Sampling(), description="Temporal sampling of frames.")
    views: Views = Field(
        Views(),
        description="Views per clip, each stored as a row: evaluation averages their logits, "
        "training samples one per epoch. {clips: 4, crops: 3} is the test protocol of Video "
        "Swin.",
    )
    flow: Flow = Field(Flow(), description="Optical flow.")
    audio: Audio = Field(
        Audio(),
        description="Default spectrogram of audio networks; used where neither `audio` in the "
        "set nor the network itself (as of timm: and hf:) defines one.",
    )
    sensors: dict[str, Sensor] = Field(
        {},
        validate_default=True,
        description="Sensors by name. Each is a modality whose files are listed in the "
        "manifest column of that name. For published data sets, these keys override the "
        "built-in ones. See docs/sensors.md. Example, imu: {channels: [ax, ay, az], time: t, "
        "unit: ms, rate_hz: 50, window: 25}",
    )
    sets: dict[str, dict[str, BackboneChoice]] = Field(
        min_length=1,
        description="Backbone sets: name -> modality (rgb, flow, audio, boxes, a sensor) -> "
        "backbone. Clips are decoded once for all sets; each set is written to its own store. "
        "`karmma backbones list` lists backbones.",
        examples=[
            {
                "teacher": dict.fromkeys(("rgb", "flow", "audio"), _video("swin3d_b")),
                "student": {
                    **dict.fromkeys(("rgb", "flow"), _video("swin3d_t")),
                    "audio": {
                        "name": "efficientnet_b0",
                        "weights": "IMAGENET1K_V1",
                        "image": [342, 715],
                    },
                },
            }
        ],
    )
    store: StoreSettings = Field(StoreSettings(), description="Feature stores.")
    video_decoder: Literal["pyav", "decord"] = Field(
        "pyav",
        description="Video decoder. pyav: exact for every file. decord: not faster, and "
        "rejects files for which exact seeking cannot be proved.",
    )
    decode: Decode = Field(Decode(), description="Decoding of media.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Clips per forward pass. auto: the largest power of two that fits into "
        "memory. This and the next three settings are recorded in the store and reused by "
        "later runs.",
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="Precision of convolutions and matrix products. auto: float32. tf32 (GPU) "
        "and bfloat16 change tokens slightly; they are faster on devices that support them, "
        "much slower on others.",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto",
        description="Memory format. auto: channels_last for convolutional networks, "
        "contiguous for transformers.",
    )
    compile: bool = Field(
        False,
        description="Use torch.compile: faster forward passes after minutes of compilation.",
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="Memory in GB for forward passes. On a GPU: limit for batch_size auto; "
        "null: 8. On a CPU: limit for all concurrent passes; null: half of the free memory.",
    )
    max_failures: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Maximum share of clips that lose a modality to an error, and of invalid "
        "annotations, which are skipped. With fewer than 20 clips, the command fails only if "
        "all of them do.",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, given: Any) -> Any:
        """Read ``memory_format`` by its earlier name, too."""
        if isinstance(given, dict) and "layout" in given and "memory_format" not in given:
            _logger.warning("layout was renamed to memory_format; rename the key in the recipe")
            return {("memory_format" if k == "layout" else k): v for k, v in given.items()}
        return given

    @property
    def several_views(self) -> Views | None:
        """The views of each clip; None if there is one alone."""
        return None if self.views == Views() else self.views

    def allows(self, failed: int, clips: int) -> bool:
        """Tell whether so many clips may lose a modality to an error; of a few any number may."""
        few = clips < FEW_CLIPS and failed < clips
        return few or failed <= self.max_failures * clips

    @field_validator("sensors", mode="before")
    @classmethod
    def _published(cls, given: Any, info: ValidationInfo) -> Any:
        """Fill in what the data set says of its sensors and the recipe leaves out."""
        dataset = info.data.get("dataset")
        usable = isinstance(given, dict) and all(isinstance(of, dict) for of in given.values())
        if dataset is None or not usable:
            return given
        published = published_sensors(dataset)
        return {name: {**published.get(name, {}), **given.get(name, {})}
                for name in {**published, **given}}  # fmt: skip

    @field_validator("sensors")
    @classmethod
    def _sensor_names(cls, sensors: dict[str, Sensor]) -> dict[str, Sensor]:
        for name in sensors:
            if name in {*KNOWN, *RESERVED}:
                raise ValueError(f"{name!r}: this name is reserved; rename the sensor")
            try:
                files.check_name(name)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        return sensors

    @field_validator("sets")
    @classmethod
    def _series(
        cls, sets: dict[str, dict[str, BackboneChoice]], info: ValidationInfo
    ) -> dict[str, dict[str, BackboneChoice]]:
        """Tell the networks of sensors what they are fed."""
        sensors = info.data.get("sensors", {})
        for name, choices in sets.items():
            for modality, choice in choices.items():
                if choice.name == "windows" and modality not in sensors:
                    near = difflib.get_close_matches(modality, sensors, n=1)
                    hint = (
                        f"did you mean {near[0]!r}" if near else f"add it under sensors.{modality}"
                    )
                    raise ValueError(f"{name}.{modality}: not a sensor of the recipe; {hint}")
        return {
            name: {m: c.fed(sensors[m].shape) if m in sensors else c for m, c in choices.items()}
            for name, choices in sets.items()
        }

    @field_validator("sets")
    @classmethod
    def _names(
        cls, sets: dict[str, dict[str, BackboneChoice]]
    ) -> dict[str, dict[str, BackboneChoice]]:
        for name, choices in sets.items():
            if not choices:
                raise ValueError(f"set {name!r} has no modality")
            for part in (name, *choices):
                try:
                    files.check_name(part)
                except ValueError as error:
                    raise ValueError(f"{part!r}: {error}") from None
        return sets

    @model_validator(mode="after")
    def _engines_can(self) -> Self:
        engines = {choice.engine for choices in self.sets.values() for choice in choices.values()}
        if "openvino" not in engines:
            return self
        if self.precision in {"tf32", "bfloat16"}:
            raise ValueError(
                f"precision={self.precision!r}: engine openvino computes in float32; remove "
                "precision, or set engine: torch"
            )
        if self.compile:
            raise ValueError("compile=true: only for engine torch; remove it")
        return self

    @model_validator(mode="after")
    def _one_list_of_clips(self) -> Self:
        if (self.manifest is None) == (self.dataset is None):
            raise ValueError("give either manifest (a CSV) or dataset")
        return self


def read_clips(recipe: ExtractRecipe) -> Manifest:
    """Read the clips of a recipe's ``manifest`` or ``dataset``, view by view if it has views.

    Raises:
        ManifestError: an annotation file is missing or faulty.
        ConfigError: a set asks for a modality of its own naming that no clip has.
    """
    if recipe.manifest is not None:
        manifest = read_manifest(recipe.manifest, sensors=recipe.sensors)
    else:
        assert recipe.dataset is not None  # noqa: S101  (the recipe has one of the two)
        manifest = read_dataset(recipe.dataset, recipe.sensors)
    manifest = _without_odd_entries(manifest, recipe.max_failures)
    there = {modality for clip in manifest.clips for modality in clip.media}
    for name, choices in recipe.sets.items():
        for modality in choices:
            if modality not in there and modality not in KNOWN:
                near = difflib.get_close_matches(modality, [*there, *KNOWN], n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"the clips have: {', '.join(there)}"
                )
                raise ConfigError(f"sets.{name}.{modality}: no clip has this modality; {hint}")
    return with_views(manifest, recipe.views) if recipe.several_views else manifest


def with_views(manifest: Manifest, views: Views) -> Manifest:
    """Return each clip as often as it has views, in their order."""
    if views.count == 1:
        return manifest
    clips = [
        replace(clip, clip_id=row, view=view)
        for clip in manifest.clips
        for row, view in zip(views.names(clip.clip_id), views.every(), strict=True)
    ]
    line = f"{views.count} views of {counted(len(manifest.clips), 'clip')}: {len(clips):,} rows"
    return replace(manifest, clips=tuple(clips), notes=(*manifest.notes, line))


def _without_odd_entries(manifest: Manifest, allowed: float) -> Manifest:
    """Say which entries are left out; too many of them are an error."""
    faults = manifest.left_out
    count = f"invalid entries: {len(faults):,} of {len(manifest.clips) + len(faults):,}"
    if len(faults) > allowed * (len(manifest.clips) + len(faults)):
        shown = "; ".join(faults[:_SHOWN])
        raise ManifestError(f"{count}, more than max_failures={allowed:g} allows: {shown}.")
    more = [f"and {len(faults) - _SHOWN:,} more"] if len(faults) > _SHOWN else []
    lines = [f"{count}; skipped:", *faults[:_SHOWN], *more] if faults else []
    return replace(manifest, notes=(*manifest.notes, *lines))


def check_files(recipe: ExtractRecipe, manifest: Manifest) -> None:
    """Tell at once that nothing of what a recipe wants is there, before anything is written.

    Where stores are there already, files may be gone: what was extracted of them is kept.

    Raises:
        ManifestError: not one of the files is.
    """
    if any((recipe.out / name).exists() for name in recipe.sets):
        return
    wanted = {modality for choices in recipe.sets.values() for modality in choices}
    media = (clip.media[m] for clip in manifest.clips for m in wanted if m in clip.media)
    paths = dict.fromkeys(source.path for source in media)
    if paths and not any(files.exists(path) for path in paths):
        first = next(iter(paths))
        raise ManifestError(
            f"none of the {len(paths):,} files of {len(manifest.clips):,} clips exists, such as "
            f"{first.absolute()}; check the paths (relative to the manifest's folder), "
            "dataset.root, and that the disk is mounted."
        )


def write_groups(folder: Path, manifest: Manifest) -> None:
    """Write the sidecar that `karmma evaluate` reads, if the data set publishes groups."""
    groups = manifest.groups
    if groups.unseen or groups.tail:
        tail = {head: list(ids) for head, ids in groups.tail.items()}
        files.write_json(folder / SIDECAR, {"unseen": list(groups.unseen), "tail": tail})
