"""A tiny network in stages, and stores of the same clips before, between and behind its stages."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import Architecture, Backbone, BackboneChoice, FrameTransform
from karmma_pipeline.models.backbones.backbone import pooled
from karmma_pipeline.models.backbones.layers import Stages
from karmma_pipeline.models.backbones.suffix import Suffix
from karmma_pipeline.store import (
    ClipRow,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
)
from karmma_pipeline.store.spec import Dtype, activation_dtype

VERBS, FRAMES, SIDE, IMAGE = 3, 4, 8, (8, 12)


class Net(nn.Module):
    """Two convolutions with batch norms, and dropout before the second."""

    def __init__(self, video: bool) -> None:
        super().__init__()
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if video else (nn.Conv2d, nn.BatchNorm2d)
        self.stem = nn.Sequential(conv(3, 4, 3, stride=2, padding=1), norm(4), nn.ReLU())
        self.body = nn.Sequential(
            nn.Dropout(0.3), conv(4, 6, 3, stride=2, padding=1), norm(6), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(x))


_STAGES = Stages({"stem": ("stem",), "body": ("body",)})
_HALF = FrameTransform(resize=(SIDE,), crop=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3)


def video() -> Architecture:
    return Architecture(
        "video", lambda weights: Net(video=True), None, _STAGES, (), FRAMES, transform=_HALF
    )


def image() -> Architecture:
    return Architecture("image", lambda weights: Net(video=False), None, _STAGES, ())


def choices(cut: str | None, frames: int | None = None) -> dict[str, BackboneChoice]:
    """Networks before that cut; of ``frames`` pictures where all of them are stored."""
    more = {} if frames is None else {"frames": frames, "stored_frames": FRAMES}
    of_video = BackboneChoice(name="support.cut_store:video", weights="random:1", cut=cut, **more)
    sound = BackboneChoice(name="support.cut_store:image", weights="random:2", image=IMAGE, cut=cut)
    return {"rgb": of_video, "flow": of_video, "audio": sound}


def assert_same_bits(whole: BackboneChoice, net: nn.Module, cuts: Sequence[str]) -> Suffix:
    """Check that prefix and suffix give the bits of a network at each cut; return the last one."""
    x = torch.randn(2, *whole.input_shape)
    architecture, weights = whole.architecture, net.state_dict()
    with torch.inference_mode():
        wanted = pooled(whole, architecture.parts(net, x))
        for cut in cuts:
            choice, prefix = whole.cut_at(cut), copy.deepcopy(net)
            stages = choice.stages
            stages.end_before(prefix, cut)
            stored = stages.as_tokens(stages.before(prefix, cut, x))
            assert tuple(stored.shape[1:]) == choice.stored_shape()
            suffix = Suffix(choice)
            suffix.net.load_state_dict({k: weights[k] for k in suffix.net.state_dict()})
            assert torch.equal(suffix(stored), wanted), cut
    return suffix


def decoded(clips: int = 24) -> dict[str, torch.Tensor]:
    """What a decoder would give: a verb shows in the brightness of pictures and of sound."""
    generator = torch.Generator().manual_seed(3)
    verb = (torch.arange(clips) % VERBS).view(-1, 1, 1, 1, 1)
    shape = (clips, FRAMES, 3, SIDE, SIDE)
    noise = torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8)
    rgb, flow = noise + (60 * verb).to(torch.uint8), noise.flip(1) + (40 * verb).to(torch.uint8)
    flow[:, :, 2] = 128
    sound = torch.randn(clips, *IMAGE, generator=generator) + verb[..., 0, 0]
    return {"rgb": rgb, "flow": flow, "audio": sound.half().float()}


def write_cut_store(
    root: Path, cut: str | None, dtype: Dtype = "float32", frames: int | None = None
) -> Path:
    """Every fifth clip has no sound; clips are in the order of `decoded`."""
    clips, specs, rows = decoded(), {}, {}
    for m, choice in choices(cut, frames).items():
        backbone = Backbone(choice)
        with torch.inference_mode():
            if cut == "input":
                x = clips[m][:, :, :2] if m == "flow" else clips[m]
                rows[m] = (x if m == "audio" else x.flatten(2)).numpy()
            else:
                rows[m] = backbone(backbone.prepare(clips[m])).numpy()
        pictures = cut == "input" and m != "audio"
        specs[m] = ModalitySpec(
            tokens=rows[m].shape[1],
            width=rows[m].shape[2],
            dtype="uint8" if pictures else activation_dtype(dtype) if cut else dtype,
            provenance=backbone.provenance(),
        )
    count = len(clips["rgb"])
    heads = {"verb": tuple(f"v{i}" for i in range(VERBS))}
    spec = StoreSpec(modalities=specs, heads=heads, clips_per_shard=count)
    splits = ["val" if i % 4 == 3 else "train" for i in range(count)]
    create_store(
        root,
        spec,
        [ClipRow(f"c{i:03d}", {"verb": i % VERBS}, s, f"P{i % 2}") for i, s in enumerate(splits)],
    )
    with ShardWriter(root, 0) as writer:
        for i in range(count):
            there = {m: of[i] for m, of in rows.items() if m != "audio" or i % 5}
            writer.append(
                f"c{i:03d}", there, {} if "audio" in there else {"audio": Reason.NO_STREAM}, {}
            )
        writer.commit()
    finalize(root)
    return root
