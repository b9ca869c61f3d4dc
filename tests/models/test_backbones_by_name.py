"""Networks of timm and transformers by name, against the libraries themselves; all are tiny."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from support.cut_store import assert_same_bits
from torch import Tensor, nn

from karmma_pipeline.cli import main
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.extraction.decode.spectrogram import longest_s, mel_image
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodeSettings, input_spec
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.models.backbones.describe import describe

pytestmark = pytest.mark.extra

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
PICTURE = {"image_size": 32, "patch_size": 16}
SPEECH = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
VJEPA = {
    "crop_size": 32, "patch_size": 16, "frames_per_clip": 4, "hidden_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "pred_hidden_size": 48,
    "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip
DINO2 = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}

# Model class, its configuration, its processor, how it is called with what the processor gives,
# and the tokens before those of the grid.
PICTURES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
    "VideoMAE": ("VideoMAEModel", PICTURE | SIZES | {"num_frames": 4}, "VideoMAEImageProcessor",
                 {"size": {"shortest_edge": 32}, "crop_size": CROP["crop_size"]}, 0),
    "VJEPA2": ("VJEPA2Model", VJEPA, "VJEPA2VideoProcessor", CROP, 0),
    "Dinov2": ("Dinov2Model", PICTURE | DINO2, "BitImageProcessor", CROP | {"resample": 3}, 1),
    "DINOv3ViT": ("DINOv3ViTModel", PICTURE | SIZES | {"num_register_tokens": 4},
                  "DINOv3ViTImageProcessor", SQUARE, 5),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel",
                            PICTURE | DINO2 | {"num_register_tokens": 4}, "BitImageProcessor",
                            CROP | {"resample": 3}, 5),
    "ViT": ("ViTModel", PICTURE | SIZES, "ViTImageProcessor", SQUARE, 1),
    "SiglipVision": ("SiglipVisionModel", PICTURE | SIZES, "SiglipImageProcessor", SQUARE, 0),
    "CLIPVision": ("CLIPVisionModel", PICTURE | SIZES, "CLIPImageProcessor", CROP, 1),
    "Timesformer": ("TimesformerModel", PICTURE | SIZES | {"num_frames": 4},
                    "VideoMAEImageProcessor", CROP, 1),
    "Vivit": ("VivitModel", SIZES | {"image_size": 32, "num_frames": 4,
                                 "tubelet_size": [2, 16, 16]},
              "VivitImageProcessor", CROP, 1),
}  # fmt: skip
SOUNDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "AST": ("ASTModel", SIZES | {"max_length": 64, "num_mel_bins": 32}, "ASTFeatureExtractor",
            {"max_length": 64, "num_mel_bins": 32}),
    "ClapAudio": ("ClapAudioModel",
                  {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 16,
                   "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 32},
                  "ClapFeatureExtractor",
                  {"feature_size": 16, "max_length_s": 1, "frequency_min": 50,
                   "truncation": "rand_trunc"}),
    "Whisper": ("WhisperEncoder",
                {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
                 "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 2,
                 "decoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 50},
                "WhisperFeatureExtractor", {"feature_size": 16, "chunk_length": 1}),
    "Wav2Vec2": ("Wav2Vec2Model", SIZES | SPEECH, "Wav2Vec2FeatureExtractor", {}),
    "Hubert": ("HubertModel", SIZES | SPEECH, "Wav2Vec2FeatureExtractor", {"do_normalize": False}),
    "WavLM": ("WavLMModel", SIZES | SPEECH, "Wav2Vec2FeatureExtractor", {"do_normalize": False}),
}  # fmt: skip


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, which may not ask the hub for anything."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, which may not ask the hub for anything."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("timm")


def saved(
    transformers: Any, folder: Path, name: str, settings: dict[str, Any], made: Any
) -> nn.Module:
    """Save a network with random weights and its processor, as a repository has them."""
    config_name = name.removesuffix("Model").removesuffix("Encoder") + "Config"
    config = getattr(transformers, config_name)(**settings)
    torch.manual_seed(0)
    net: nn.Module
    if name == "WhisperEncoder":
        whole = transformers.WhisperModel(config)
        net = whole.encoder
    elif name == "ClapAudioModel":
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        both = transformers.ClapConfig(audio_config=settings, text_config=text, projection_dim=32)
        whole = transformers.ClapModel(both)
        net = whole.audio_model
    else:
        whole = net = getattr(transformers, name)(config)
    whole.save_pretrained(folder)
    made.save_pretrained(folder)
    return net.eval()


def frames(count: int = 4) -> Any:
    """Return smooth noise as decoded frames, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 9, 13)))
    fine = nn.functional.interpolate(coarse, (70, 96), mode="bicubic")
    noisy = fine + torch.from_numpy(rng.normal(0, 8, fine.shape))
    return noisy.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def same(ours: Tensor, theirs: Tensor) -> None:
    """Check that tokens [N, D] point the same way."""
    assert ours.shape == theirs.shape
    assert nn.functional.cosine_similarity(ours, theirs, dim=-1).min() >= 0.999


@pytest.mark.parametrize("family", PICTURES)
def test_pictures_and_tokens_are_those_of_transformers(
    family: str, tmp_path: Path, transformers: Any
) -> None:
    """The inputs equal its processor's, the tokens its own pass's, at the end and within."""
    name, settings, processor_name, of_processor, extra = PICTURES[family]
    processor = getattr(transformers, processor_name)(**of_processor)
    net = saved(transformers, tmp_path, name, settings, processor)
    choice = BackboneChoice(name=f"hf:{tmp_path}", frames=4)
    clip = frames()
    backbone = Backbone(choice)
    x = backbone.prepare(torch.from_numpy(choice.transform.apply(clip))[None])

    pictures = [torch.from_numpy(f).permute(2, 0, 1) for f in clip]
    if "Video" in processor_name and family == "VJEPA2":
        given = processor(torch.stack(pictures), return_tensors="pt")["pixel_values_videos"]
    else:
        given = processor(list(clip), return_tensors="pt")["pixel_values"]
    given = given.reshape(4, 3, 32, 32)
    span = 1 / min(choice.transform.std)
    off = (x[0].transpose(0, 1) - given).abs() / span
    assert off.mean() <= 1 / 255
    assert off.max() <= 8 / 255

    per_frame = choice.raw_grid[0] == 4 and family != "Timesformer"
    key = "pixel_values_videos" if family == "VJEPA2" else "pixel_values"
    with torch.inference_mode():
        theirs = net(
            **{key: x[0].transpose(0, 1) if per_frame else x.transpose(1, 2)},
            output_hidden_states=True,
        )
        ours = backbone(x)[0]
        t, h, w = choice.raw_grid

        def tokens(of: Tensor) -> Tensor:
            grid = of[:, extra:]
            if family == "Timesformer":  # which keeps the frames of a place together
                grid = torch.unflatten(grid, 1, (h, w, t)).permute(0, 3, 1, 2, 4).flatten(1, 3)
            return grid.flatten(0, 1)

        same(ours, tokens(theirs.last_hidden_state))
        first = choice.model_copy(update={"layer": 0})
        same(Backbone(first)(x)[0], tokens(theirs.hidden_states[1]))
        kept = Backbone(choice.model_copy(update={"class_tokens": "keep"}))(x)[0]
    before = theirs.last_hidden_state[:, :extra].flatten(0, 1)
    same(kept, torch.cat([before, tokens(theirs.last_hidden_state)]))
    last = describe(choice.model_copy(update={"layer": -1}))["gflops"]
    assert describe(first)["gflops"] < last <= describe(choice)["gflops"]
    assert backbone.provenance()["transformers"] == transformers.__version__


def test_the_tokens_of_videoprism_are_those_of_transformers(
    tmp_path: Path, transformers: Any
) -> None:
    """Its blocks of space and of time are no one list, so that its last layer alone is taken."""
    if not hasattr(transformers, "VideoPrismVisionModel"):
        pytest.skip("this transformers has no VideoPrism")
    settings = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"} | {
        "num_spatial_layers": 2, "num_temporal_layers": 1, "image_size": 32, "num_frames": 4,
        "tubelet_size": [1, 16, 16],
    }  # fmt: skip
    processor = transformers.LlavaOnevisionVideoProcessor(**SQUARE)
    net = saved(transformers, tmp_path, "VideoPrismVisionModel", settings, processor)
    choice = BackboneChoice(name=f"hf:{tmp_path}")
    backbone, clip = Backbone(choice), frames()
    assert (choice.frame_count, choice.raw_grid) == (4, (4, 2, 2))
    x = backbone.prepare(torch.from_numpy(choice.transform.apply(clip))[None])
    pictures = torch.from_numpy(clip).permute(0, 3, 1, 2)
    given = processor(pictures, return_tensors="pt")["pixel_values_videos"]
    off = (x.transpose(1, 2) - given).abs() * min(choice.transform.std)
    assert off.mean() <= 1 / 255
    assert off.max() <= 8 / 255
    with torch.inference_mode():
        same(backbone(x)[0], net(x.transpose(1, 2)).last_hidden_state[0])
    with pytest.raises(ConfigError, match="has no list of blocks"):
        _ = choice.model_copy(update={"layer": 0}).raw_grid


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_of_a_repository_with_two_towers_the_one_for_pictures_counts(
    family: str, tmp_path: Path, transformers: Any
) -> None:
    """As openai/clip-vit-base-patch16 and google/siglip2-base-patch16-224 have them."""
    text = SIZES | {"vocab_size": 50, "max_position_embeddings": 8}
    config = getattr(transformers, f"{family}Config")(
        vision_config=PICTURE | SIZES, text_config=text
    )
    torch.manual_seed(0)
    whole = getattr(transformers, f"{family}Model")(config).eval()
    whole.save_pretrained(tmp_path)
    getattr(transformers, f"{family}ImageProcessor")(
        **(CROP if family == "CLIP" else SQUARE)
    ).save_pretrained(tmp_path)
    choice = BackboneChoice(name=f"hf:{tmp_path}", frames=2)
    x = torch.randn(1, *choice.input_shape)
    with torch.inference_mode():
        theirs = whole.vision_model(x[0].transpose(0, 1)).last_hidden_state
        same(Backbone(choice)(x)[0], theirs[:, family == "CLIP" :].flatten(0, 1))


@pytest.mark.parametrize("family", SOUNDS)
def test_sound_and_tokens_are_those_of_transformers(
    family: str, tmp_path: Path, transformers: Any
) -> None:
    """The spectrogram equals its feature extractor's, the tokens its own forward pass's."""
    name, settings, processor_name, of_processor = SOUNDS[family]
    processor = getattr(transformers, processor_name)(**of_processor)
    net = saved(transformers, tmp_path, name, settings, processor)
    audio = {"hops": 8000} if family in {"Wav2Vec2", "Hubert", "WavLM"} else None
    choice = BackboneChoice.model_validate({"name": f"hf:{tmp_path}", "audio": audio})
    own = choice.own_audio
    assert own is not None
    assert own.sample_rate == processor.sampling_rate
    rng = np.random.default_rng(1)
    seconds = min(longest_s(own), 0.5 if audio else 0.4)
    sound = rng.normal(0, 0.1, round(seconds * own.sample_rate)).astype(np.float32)
    _, bands, hops = choice.input_shape
    image = mel_image(own, sound, (bands, hops))

    given = processor(sound, sampling_rate=own.sample_rate, return_tensors="pt")
    key = processor.model_input_names[0]
    theirs_in = given[key]
    flat = theirs_in.squeeze()
    flat = flat[None] if flat.dim() == 1 else flat.T if family in {"AST", "ClapAudio"} else flat
    off = (torch.from_numpy(image) - flat).abs() / (flat.max() - flat.min())
    assert off.mean() <= 1 / 255
    assert off.max() <= 8 / 255

    backbone = Backbone(choice)
    with torch.inference_mode():
        ours = backbone(backbone.prepare(torch.from_numpy(image)[None]))[0]
        theirs = net(theirs_in).last_hidden_state
    extra = 2 if family == "AST" else 0
    theirs = theirs.flatten(2).transpose(1, 2)[0] if theirs.dim() == 4 else theirs[0, extra:]
    same(ours, theirs)


def test_two_networks_for_sound_hear_one_clip_each_as_its_library_does(
    tmp_path: Path, transformers: Any
) -> None:
    """In one pass, at sample rates of 16 and 48 kHz, in spectrograms that share nothing."""
    rng = np.random.default_rng(0)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 48_000, 0, "NONE", ""))
        file.writeframes((rng.normal(0, 3000, 48_000)).astype("<i2").tobytes())
    wanted, processors = [], []
    for family in ("AST", "ClapAudio"):
        name, config, processor_name, of_processor = SOUNDS[family]
        processors.append(getattr(transformers, processor_name)(**of_processor))
        saved(transformers, tmp_path / family, name, config, processors[-1])
        wanted.append(input_spec("audio", BackboneChoice(name=f"hf:{tmp_path / family}")))
    source = FileSource(tmp_path / "sound.wav")
    clip = Clip("c", {"audio": source}, 0.25, 0.65, {}, "train")
    of_both = DecodeSettings(Sampling(), Flow(), Audio(), tuple(wanted))
    (decoded,) = decode_clips([clip], of_both)
    for spec, processor in zip(wanted, processors, strict=True):
        rate = processor.sampling_rate
        sound = MediaFile(source.path).sound(0.25, 0.65, rate)
        given = processor(sound, sampling_rate=rate, return_tensors="np")
        (theirs,) = (value.squeeze().T for value in given.values() if value.ndim > 2)
        off = np.abs(decoded.arrays[spec] - theirs) / np.ptp(theirs)
        assert off.mean() <= 1 / 255
        assert off.max() <= 8 / 255
    assert [spec.image for spec in wanted] == [(32, 64), (16, 101)]


def test_a_backbones_licence_and_digest_are_shown(tmp_path: Path, transformers: Any) -> None:
    name, settings, processor, of_processor, _ = PICTURES["ViT"]
    saved(transformers, tmp_path, name, settings, getattr(transformers, processor)(**of_processor))
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Tiny\n")
    network = f"hf:{tmp_path}"
    shown = CliRunner().invoke(main, ["backbones", "show", network])
    facts = yaml.safe_load(shown.output)
    assert (facts["licence"], facts["non_commercial"]) == ("cc-by-nc-4.0", True)
    recorded = Backbone(BackboneChoice(name=network)).provenance()
    assert facts["weights_sha256"] == recorded["weights_sha256"]
    assert facts["licence"] == recorded["licence"]


@pytest.mark.parametrize("dataset", ["epic_kitchens_100", "something_something_v2"])
def test_recipes_of_v_jepa_2_state_its_cost(
    tmp_path: Path, transformers: Any, dataset: str
) -> None:
    """FLOPs of a ViT-L: 12 D^2 a token and block, attention, and patches of 2 x 16 x 16."""
    config = transformers.VJEPA2Config(
        crop_size=256, frames_per_clip=64, hidden_size=1024, num_hidden_layers=24,
        num_attention_heads=16,
    )  # fmt: skip
    config.architectures = ["VJEPA2Model"]
    config.save_pretrained(tmp_path)
    transformers.VJEPA2VideoProcessor().save_pretrained(tmp_path)
    recipe = (Path(__file__).parents[2] / f"extract/{dataset}_vjepa2.yaml").read_text()
    stated = yaml.safe_load(recipe)["sets"]["frozen"]["rgb"]
    choice = BackboneChoice.model_validate(stated | {"name": f"hf:{tmp_path}"})
    found = describe(choice)
    n, d = 32 * 16 * 16, 1024
    blocks = 24 * (2 * n * 12 * d * d + 4 * n * n * d)
    gflops = (blocks + 2 * n * d * 3 * 2 * 16 * 16) / 1e9
    assert found["gflops"] == pytest.approx(gflops, rel=1e-6)
    assert f"{round(gflops):,} GFLOPs for RGB and for flow each" in recipe
    assert f"({found['tokens'] * found['width'] * 2:,} bytes each)" in recipe


def test_frames_and_tokens_are_those_of_timm(tmp_path: Path, timm: Any) -> None:
    """Its own transform of the picture and its own forward pass, of any number of frames."""
    from PIL import Image

    torch.manual_seed(0)
    name = "test_vit.r160_in1k"
    net = timm.create_model(name, pretrained=False, num_classes=0).eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    choice = BackboneChoice(name=f"timm:{name}", weights=str(tmp_path / "w.pt"), frames=3)
    clip = frames(3).repeat(3, axis=1).repeat(3, axis=2)
    x = Backbone(choice).prepare(torch.from_numpy(choice.transform.apply(clip))[None])

    settings = timm.data.resolve_data_config({}, model=net)
    transform = timm.data.create_transform(**settings, is_training=False)
    given = torch.stack([transform(Image.fromarray(frame)) for frame in clip])
    torch.testing.assert_close(x[0].transpose(0, 1), given, rtol=0, atol=1e-5)  # the same pixels

    with torch.inference_mode():
        theirs = net.forward_features(x[0].transpose(0, 1))
        (within,) = net.forward_intermediates(
            x[0].transpose(0, 1), [1], norm=False, output_fmt="NLC", intermediates_only=True
        )
        kept = Backbone(choice.model_copy(update={"class_tokens": "keep"}))(x)[0]
        same(Backbone(choice)(x)[0], theirs[:, 1:].flatten(0, 1))
        same(Backbone(choice.model_copy(update={"layer": 1}))(x)[0], within.flatten(0, 1))
        named = choice.model_copy(update={"layer": "blocks.1"})
        same(Backbone(named)(x)[0], within.flatten(0, 1))
    same(kept[:3], theirs[:, 0])
    assert choice.output_shape == (3 * 10 * 10, 64)


def test_the_tokens_of_the_perception_encoder_are_those_of_timm(tmp_path: Path, timm: Any) -> None:
    name = "vit_pe_core_tiny_patch16_384"
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=0).eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    choice = BackboneChoice(name=f"timm:{name}", weights=str(tmp_path / "w.pt"), frames=1)
    x = torch.randn(1, *choice.input_shape)
    with torch.inference_mode():
        same(Backbone(choice)(x)[0], net.forward_features(x[:, :, 0])[0, net.num_prefix_tokens :])
    assert choice.raw_grid == (1, 24, 24)


@pytest.mark.parametrize("family", [*PICTURES, *SOUNDS])
def test_blocks_of_transformers_behind_a_cut_give_the_bits_of_all(
    family: str, tmp_path: Path, transformers: Any
) -> None:
    name, settings, processor, of_processor = (PICTURES.get(family) or SOUNDS[family])[:4]
    saved(transformers, tmp_path, name, settings, getattr(transformers, processor)(**of_processor))
    tree = (
        {"name": f"hf:{tmp_path}", "frames": 8}
        if family in PICTURES
        else {
            "name": f"hf:{tmp_path}",
            **({"audio": {"hops": 4000}} if settings.get("conv_dim") else {}),
        }
    )
    whole = BackboneChoice.model_validate(tree | {"class_tokens": "keep"})
    if family in {"DINOv3ViT", "ClapAudio", "WavLM"}:  # whose blocks are given more than tokens
        assert whole.cuts == ("input",)
        with pytest.raises(ConfigError, match="no named stages; the only choice is input"):
            whole.cut_at("layer.0").stored_shape()
        return
    assert len([cut for cut in whole.cuts if cut.rpartition(".")[2].isdecimal()]) == 2
    net = Backbone(whole).net
    suffix = assert_same_bits(whole, net, whole.cuts[1:])
    count = sum(p.numel() for p in suffix.parameters())
    last = net.get_submodule(whole.cuts[-1])
    assert count == sum(p.numel() for p in last.parameters())


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("test_vit", [*(f"blocks.{n}" for n in range(6)), "norm"]),
        ("test_convnext", [f"stages.{n}" for n in range(4)]),
        ("test_resnet", [f"layer{n}" for n in range(1, 5)]),
        ("test_efficientnet", [*(f"blocks.{n}" for n in range(5)), "conv_head", "bn2"]),
    ],
)
def test_blocks_of_timm_behind_a_cut_give_the_bits_of_all(
    name: str, stages: list[str], timm: Any
) -> None:
    tree = {"name": f"timm:{name}", "weights": "random:1", "frames": 2, "size": 64}
    whole = BackboneChoice.model_validate(tree)
    assert list(whole.cuts) == ["input", *stages]
    assert_same_bits(whole, Backbone(whole).net, (stages[0], stages[-2]))


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "test_vit_relpos", "mvitv2_tiny"])
def test_tokens_without_a_stated_grid_lie_where_timm_has_them(name: str, timm: Any) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=0).eval()
    choice = BackboneChoice(name=f"timm:{name}", frames=1)
    x = torch.randn(1, *choice.input_shape)
    with torch.inference_mode():
        ours = choice.architecture.parts(net, x).map[:, :, 0]
        (theirs,) = net.forward_intermediates(x[:, :, 0], 1, norm=True, intermediates_only=True)
    same(ours.flatten(2)[0].T, theirs.flatten(2)[0].T)


def test_networks_without_one_map_are_refused(timm: Any) -> None:
    for name, gave in {
        "pit_ti_224": "tokens without a grid",
        "coat_tiny": "returned a list",
    }.items():
        with pytest.raises(ConfigError, match=gave):
            _ = BackboneChoice(name=f"timm:{name}", weights="random:0").raw_grid


def test_a_typo_in_a_timm_name_gets_the_nearest_names(timm: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean vit_small_patch16_224"):
        _ = BackboneChoice(name="timm:vit_smal_patch16_224").architecture
    with pytest.raises(CheckpointError, match=r"run `karmma backbones fetch timm:test_vit`"):
        Backbone(BackboneChoice(name="timm:test_vit", frames=1))


def test_longer_clips_go_through_in_parts(tmp_path: Path, transformers: Any) -> None:
    """A network of 4 frames sees 8 as two inputs, one after the other."""
    name, settings, processor, of_processor, _ = PICTURES["VideoMAE"]
    saved(transformers, tmp_path, name, settings, getattr(transformers, processor)(**of_processor))
    choice = BackboneChoice(name=f"hf:{tmp_path}", frames=8)
    x = torch.randn(1, *choice.input_shape)
    with torch.inference_mode():
        whole = Backbone(choice)(x)
        short = Backbone(choice.model_copy(update={"frames": 4}))
        parts = torch.cat([short(part) for part in torch.split(x, 4, dim=2)], dim=1)
    torch.testing.assert_close(whole, parts)
    with pytest.raises(ConfigError, match="takes 4 frames of 32 px only, or a multiple"):
        _ = BackboneChoice(name=f"hf:{tmp_path}", frames=6).input_shape
