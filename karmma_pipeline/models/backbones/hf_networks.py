"""Networks of transformers for pictures, video and sound: ``hf:ID`` or ``hf:FOLDER``; an extra.

Size, frames, normalisation, sample rate and spectrogram are those of the library's configuration
and processor. Only its own classes are used, never code of a repository, and only safetensors.
Nothing is downloaded: files lie in the folder or in the hub's cache, where `karmma backbones fetch`
puts them.

B clips in a batch, T frames, D width; [t, h, w] a grid of tokens, of sound h along frequency and w
along time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karmma_pipeline.errors import CheckpointError, ConfigError, one_line
from karmma_pipeline.models.backbones import hub
from karmma_pipeline.models.backbones.frame_transform import Interpolation
from karmma_pipeline.models.backbones.layers import Parts, with_grid
from karmma_pipeline.models.backbones.registry import Architecture, Blocks, FrameTransform
from karmma_pipeline.models.backbones.state_dicts import ENOUGH
from karmma_pipeline.models.backbones.timm_networks import FRAMES

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """How one model type is called.

    Attributes:
        network: its class in transformers.
        inputs: turns [B, 3, T, h, w], or [B, 3, h, w] of sound, into what it is called with.
        grid: (configuration, input) to the grid of its tokens.
        processor: the auto class that reads how inputs are prepared.
        frames: (configuration) to the frames of an input; None: each frame goes by itself.
        part: of a configuration with several, the one that counts.
        whole: class that reads the weights, and which part of it is the network.
        front_end: (processor) to the keys of `front_end.Audio`.
        time_last: tokens lie [h, w, t] instead of [t, h, w].
    """

    network: str
    inputs: Callable[[Tensor], dict[str, Any]]
    grid: Callable[[Any, Tensor], Grid]
    processor: str = "AutoImageProcessor"
    frames: Callable[[Any], int] | None = None
    part: str = "vision_config"
    whole: tuple[str, str] = ("", "")
    front_end: Callable[[Any], dict[str, Any]] | None = None
    time_last: bool = False


def _sides(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[-2], value[-1])


def _patches(config: Any, x: Tensor) -> Grid:
    """Return the grid of square patches in tubes of ``tubelet_size`` frames."""
    tube = getattr(config, "tubelet_size", 1)
    if isinstance(tube, list | tuple):
        tube, patch = tube[0], (tube[1], tube[2])
    else:
        patch = _sides(config.patch_size)
    return x.shape[2] // tube, x.shape[3] // patch[0], x.shape[4] // patch[1]


def _ast_patches(config: Any, x: Tensor) -> Grid:
    strides = (config.frequency_stride, config.time_stride)
    sides = zip(x.shape[2:], strides, strict=True)
    f, t = ((side - config.patch_size) // stride + 1 for side, stride in sides)
    return 1, f, t


def _frames(x: Tensor) -> dict[str, Any]:
    return {"pixel_values": x.transpose(1, 2).flatten(0, 1)}


def _video(x: Tensor) -> dict[str, Any]:
    return {"pixel_values": x.transpose(1, 2)}


def _ast(processor: Any) -> dict[str, Any]:
    mean, std = (processor.mean, 2 * processor.std) if processor.do_normalize else (0.0, 1.0)
    rate, bands, hops = processor.sampling_rate, processor.num_mel_bins, processor.max_length
    return {"front_end": "ast", "sample_rate": rate, "mels": bands, "hops": hops} | {
        "mean": mean, "std": std
    }  # fmt: skip


def _clap(processor: Any) -> dict[str, Any]:
    if (processor.truncation, processor.padding) != ("rand_trunc", "repeatpad"):
        raise ConfigError(
            f"CLAP with truncation={processor.truncation!r} (several crops of long audio) is "
            "not supported; use an unfused model, such as laion/clap-htsat-unfused."
        )
    samples = processor.max_length_s * processor.sampling_rate
    return {
        "front_end": "clap",
        "sample_rate": processor.sampling_rate,
        "n_fft": processor.fft_window_size,
        "win_length": processor.fft_window_size,
        "hop_length": processor.hop_length,
        "mels": processor.feature_size,
        "hops": samples // processor.hop_length + 1,
        "low_hz": processor.frequency_min,
        "high_hz": processor.frequency_max,
    }


def _whisper(processor: Any) -> dict[str, Any]:
    return {
        "front_end": "whisper",
        "sample_rate": processor.sampling_rate,
        "n_fft": processor.n_fft,
        "win_length": processor.n_fft,
        "hop_length": processor.hop_length,
        "mels": processor.feature_size,
        "hops": processor.n_samples // processor.hop_length,
        "high_hz": min(8000.0, processor.sampling_rate / 2),
    }


def _speech(processor: Any) -> dict[str, Any]:
    name = "standardised_waveform" if processor.do_normalize else "waveform"
    return {"front_end": name, "sample_rate": processor.sampling_rate}


def _along_time(config: Any, x: Tensor) -> Grid:
    """Return the grid of a network that says nothing but how many tokens it made."""
    return 1, 1, -1


_image = partial(Family, inputs=_frames, grid=_patches)
_clip = partial(Family, inputs=_video, grid=_patches, frames=lambda config: config.num_frames)
_sound = partial(Family, processor="AutoFeatureExtractor", part="audio_config")
_spoken = partial(
    _sound, inputs=lambda x: {"input_values": x[:, 0, 0]}, grid=_along_time, front_end=_speech
)

FAMILIES = {
    "videomae": _clip("VideoMAEModel"),
    "vjepa2": Family(
        "VJEPA2Model",
        lambda x: {"pixel_values_videos": x.transpose(1, 2), "skip_predictor": True},
        _patches,
        "AutoVideoProcessor",
        lambda config: config.frames_per_clip,
    ),
    "videoprism_vision_model": _clip(
        "VideoPrismVisionModel",
        inputs=lambda x: {"pixel_values_videos": x.transpose(1, 2)},
        processor="AutoVideoProcessor",
    ),
    "timesformer": _clip("TimesformerModel", time_last=True),
    "vivit": _clip("VivitModel"),
    "vit": _image("ViTModel"),
    "dinov2": _image("Dinov2Model"),
    "dinov2_with_registers": _image("Dinov2WithRegistersModel"),
    "dinov3_vit": _image("DINOv3ViTModel"),
    "clip": _image("CLIPVisionModel"),
    "clip_vision_model": _image("CLIPVisionModel"),
    "siglip": _image("SiglipVisionModel"),
    "siglip_vision_model": _image("SiglipVisionModel"),
    "audio-spectrogram-transformer": _sound(
        "ASTModel",
        lambda x: {"input_values": x[:, 0].transpose(1, 2)},
        _ast_patches,
        front_end=_ast,
    ),
    "clap": _sound(
        "ClapAudioModel",
        lambda x: {"input_features": x[:, :1].transpose(2, 3)},
        _along_time,
        whole=("ClapModel", "audio_model"),
        front_end=_clap,
    ),
    "whisper": _sound(
        "models.whisper.modeling_whisper.WhisperEncoder",
        lambda x: {"input_features": x[:, 0]},
        _along_time,
        whole=("WhisperModel", "encoder"),
        front_end=_whisper,
    ),
    "wav2vec2": _spoken("Wav2Vec2Model"),
    "hubert": _spoken("HubertModel"),
    "wavlm": _spoken("WavLMModel"),
}
"""Model types by their name in ``config.json``."""


def architecture(where: str) -> Architecture:
    """Return the network of a repository in the cache, or of a folder.

    Raises:
        ConfigError: transformers is not installed, or the model type is not among `FAMILIES`.
        CheckpointError: there is no such folder, or it was never fetched.
    """
    transformers = _library()
    folder = _folder(where)
    config = _read(transformers.AutoConfig, folder, where)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"name='hf:{where}': model_type={config.model_type!r} is not supported; supported "
            f"types: {', '.join(FAMILIES)}; for others, define a custom Architecture "
            "(docs/extending.md)."
        )
    processor = _read(getattr(transformers, family.processor), folder, where)
    config = getattr(config, family.part, config)
    audio = None if family.front_end is None else family.front_end(processor)
    arrange = partial(_arrange, family, config)
    return Architecture(
        kind="video" if audio is None else "image",
        build=partial(_build, family, config),
        weights=None,
        feature_map=Blocks(lambda net, x: net(**family.inputs(x)), arrange),
        heads=(),
        frames=family.frames(config) if family.frames else FRAMES if audio is None else 1,
        fixed=family.frames is not None,
        transform=_view(processor, where) if audio is None else None,
        audio=audio,
        arrange=arrange,
        pretrained=partial(_pretrained, family, folder, where),
        facts={"transformers": transformers.__version__, "licence": hub.licence(folder)},
        per_frame=audio is None and family.frames is None,
    )


def _library() -> Any:
    transformers = hub.library("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _folder(where: str) -> Path:
    if Path(where).is_dir():
        return Path(where)
    if where.startswith(("/", "./", "../", "~")) or where.count("/") != 1:
        raise CheckpointError(
            f"hf:{where}: no such folder; for a model of the hub, write hf:OWNER/NAME."
        )
    return hub.cached(where, "config.json", f"hf:{where}").parent


def _read(auto: Any, folder: Path, where: str) -> Any:
    """Read a configuration or a processor of a folder."""
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = one_line(error, 200)
        raise ConfigError(
            f"name='hf:{where}': {auto.__name__} cannot read {folder} ({reason})."
        ) from None


def _class(name: str) -> Any:
    made: Any = _library()
    for part in name.split("."):
        made = getattr(made, part)
    return made


def _build(family: Family, config: Any, weights: None) -> nn.Module:
    net: nn.Module = _class(family.network)(config)
    return net


def _pretrained(family: Family, folder: Path, where: str) -> nn.Module:
    whole, attribute = family.whole
    try:
        net, found = _class(whole or family.network).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 300)
        raise CheckpointError(
            f"hf:{where}: its weights cannot be read ({reason}); `karmma backbones fetch` "
            "downloads them as safetensors."
        ) from None
    part = net.get_submodule(attribute) if attribute else net
    names = {f"{attribute}.{name}" if attribute else name for name, _ in part.named_parameters()}
    missing = names & set(found["missing_keys"])
    if len(missing) > (1 - ENOUGH) * len(names):
        raise CheckpointError(
            f"hf:{where}: {len(missing)} of {len(names)} tensors of {type(part).__name__} are "
            f"missing in its files, such as {min(missing)}; are these the weights of another "
            "network?"
        )
    return part


def _arrange(family: Family, config: Any, net: Any, output: Any, x: Tensor) -> Parts:
    """Turn what a network or a layer gives into a map: tokens [.., p + t h w, D], maps of sound."""
    y = getattr(output, "last_hidden_state", output)
    y = y[0] if isinstance(y, tuple) else y
    if y.dim() == 4:
        return Parts(y.unsqueeze(2))
    t, h, w = family.grid(config, x)
    if family.frames is None and x.dim() == 5:
        return with_grid(y, (x.shape[0], t), (h, w))
    w = w if w > 0 else y.shape[1]
    # As if the t parts of a clip lay above one another in one picture.
    flat, extra = with_grid(y, (y.shape[0], 1), (t * h, w))
    if family.time_last:
        whole = torch.unflatten(flat.flatten(2), 2, (h, w, t)).permute(0, 1, 4, 2, 3)
    else:
        whole = torch.unflatten(flat[:, :, 0], 2, (t, h))
    return Parts(whole, extra)


_PIL: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def _view(processor: Any, where: str) -> FrameTransform:
    """Read resize, crop and normalisation of an image or video processor."""
    size, crop = _of(processor.size), _of(getattr(processor, "crop_size", None) or {})
    short, whole = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    cropped = getattr(processor, "do_center_crop", False)
    final = (crop["height"], crop["width"]) if cropped else whole
    if not processor.do_resize or not processor.do_rescale or not all(final):
        raise ConfigError(
            f"name='hf:{where}': its processor has no fixed image size ({size}); set a size "
            "with height and width, or a centre crop, in preprocessor_config.json."
        )
    mode: Any = processor.resample
    # u in [0, 1] becomes (gain u - shift - mean) / std.
    gain = 255 * processor.rescale_factor
    shift = 1.0 if getattr(processor, "offset", False) else 0.0
    normal = processor.do_normalize
    mean = tuple(processor.image_mean) if normal else (0.0,) * 3
    std = tuple(processor.image_std) if normal else (1.0,) * 3
    return FrameTransform(
        resize=(short,) if short else whole,
        crop=final,
        mean=tuple((m + shift) / gain for m in mean),
        std=tuple(s / gain for s in std),
        interpolation=_PIL[mode],
        floor=True,
        antialias=True,
    )


def _of(size: Any) -> dict[str, int]:
    """Return the sides that a size states, a dict or an object of the library."""
    stated = size if isinstance(size, dict) else vars(size)
    return {key: int(value) for key, value in stated.items() if value and key != "longest_edge"}
