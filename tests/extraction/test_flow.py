"""A known motion reaches the backbone with one scale, whatever measured it.

A texture moves by 45 px/s at 48x96; in a network's input of half that size it moves by 22.5 px/s,
which is 1.5 px per 1/15 s.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.media_files import Maker, panned, write_flow
from torch import Tensor, nn

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource, FrameSource, Source
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.inference.batching import collate
from karmma_pipeline.extraction.inference.raft import Raft
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import (
    Batch,
    BatchPlan,
    DecodedClip,
    DecodeSettings,
    InputSpec,
)
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import FrameTransform

HALF = FrameTransform(resize=(24, 48), crop=(24, 48), mean=(0, 0, 0), std=(1, 1, 1))
FLOW = InputSpec("flow", 4, HALF, (24, 48), per_frame=True)
PAIRS = replace(FLOW, pairs=True)
UV = ("u/frame_{:010d}.jpg", "v/frame_{:010d}.jpg")
BOUND = 4.0


def decode(source: Source, flow: Flow) -> DecodedClip:
    clips = [Clip("c", {"flow": source}, 0.0, 1.0, {})]
    spec = FLOW if flow.source == "dis" else PAIRS
    settings = DecodeSettings(Sampling(), flow, Audio(), (spec,))
    (found,) = decode_clips(clips, settings)
    assert not found.reasons
    return found


def px(pictures: np.ndarray) -> list[float]:
    field = (pictures[:, :2, 4:-4, 8:-8].astype(float) - 128) * BOUND / 127
    return [float(np.median(field[:, plane])) for plane in (0, 1)]


@pytest.mark.parametrize("fps", [15, 30, 60])
def test_dis(make_video: Maker, fps: int) -> None:
    path = make_video(fps=fps, pan_px_s=45.0, sound=False)
    found = decode(FileSource(path), Flow(bound_px=BOUND, preset="medium"))
    assert px(found.arrays[FLOW]) == pytest.approx([1.5, 0], abs=0.2)


@pytest.mark.parametrize(("stride", "dilation", "fps"), [(2, 3, 60), (1, 1, 50), (1, 1, 60)])
def test_the_data_sets_own(tmp_path: Path, stride: int, dilation: int, fps: int) -> None:
    motion = 45 * dilation / fps  # px of the pictures between the two frames of a pair
    folder = write_flow(tmp_path, range(1, 70), (motion, -motion / 2), bound_px=8)
    source = FrameSource(folder, UV, fps, stride=stride, dilation=dilation, bound_px=8)
    found = decode(source, Flow(bound_px=BOUND))
    assert px(found.arrays[FLOW]) == pytest.approx([1.5, -0.75], abs=0.12)
    assert found.decoders == {"flow": "cv2"}


class Shifted(nn.Module):
    """RAFT's interface around an exhaustive search: the shift that fits best, everywhere."""

    def forward(self, first: Tensor, second: Tensor, num_flow_updates: int) -> list[Tensor]:
        assert first.shape == second.shape
        assert first.shape[-2] % 8 == first.shape[-1] % 8 == 0
        assert min(first.shape[-2:]) >= 128
        assert -1 <= float(first.min()) < 0 < float(first.max()) <= 1
        shifts = range(-6, 7)
        costs = [
            (first - torch.roll(second, -s, dims=-1)).abs().mean(dim=(1, 2, 3)) for s in shifts
        ]
        best = torch.stack(costs).argmin(dim=0) - 6
        flow = torch.zeros(len(first), 2, *first.shape[-2:])
        flow[:, 0] = best[:, None, None].float()
        return [torch.full_like(flow, torch.nan)] * (num_flow_updates - 1) + [flow]


def test_raft(make_video: Maker) -> None:
    """The weights are not here; all around the network is: scale, range, padding, handing over."""
    settings = Flow(
        source="raft_small", weights="random:0", bound_px=BOUND, gap_s=2 / 15, pairs_at_once=3
    )
    path = make_video(fps=15, pan_px_s=30.0, sound=False)  # 2 px, halved, twice the gap: 2 px
    found = decode(FileSource(path), settings)
    raft = Raft(settings, torch.device("cpu"))
    raft.net = Shifted()
    pictures = raft.inputs(batch_of(found), PAIRS)[0].numpy()
    assert pictures.shape == (4, 3, 24, 48)
    assert px(pictures) == pytest.approx([2, 0], abs=0.3)


def batch_of(*clips: DecodedClip) -> Batch:
    return collate(BatchPlan(0, [], [], last=True), clips, pin=False)


def test_flow_that_a_data_set_brings_needs_no_network(make_video: Maker, tmp_path: Path) -> None:
    """Beside clips whose flow is to be computed, and beside one that was lost."""
    folder = write_flow(tmp_path, range(1, 70), (6, -3), bound_px=8)
    stored = FrameSource(folder, UV, 60, stride=2, dilation=3, bound_px=8)
    settings = Flow(source="raft_small", weights="random:0", bound_px=BOUND, updates=1)
    lost = DecodedClip("lost", reasons={PAIRS: Reason.TIMEOUT})
    path = make_video(fps=15, pan_px_s=30.0, sound=False)
    clips = decode(stored, settings), lost, decode(FileSource(path), settings)
    raft = Raft(settings, torch.device("cpu"))
    pictures = raft.inputs(batch_of(*clips), PAIRS).numpy()
    np.testing.assert_array_equal(pictures[0], decode(stored, Flow(bound_px=BOUND)).arrays[FLOW])
    assert not pictures[1].any()
    frames, scale = torch.from_numpy(clips[2].arrays[PAIRS]), clips[2].flow_scales[PAIRS]
    np.testing.assert_array_equal(pictures[2], raft.pictures(frames, scale))


def test_the_real_network_takes_any_size_and_is_the_same_each_time() -> None:
    settings = Flow(source="raft_small", weights="random:3", updates=2)
    first, second = (torch.from_numpy(panned(x).transpose(2, 0, 1)[None].copy()) for x in (0, 2))
    raft, again = Raft(settings, torch.device("cpu")), Raft(settings, torch.device("cpu"))
    flow = raft.flow(first, second)
    assert flow.shape == (1, 2, 48, 96)
    assert torch.isfinite(flow).all()
    assert torch.equal(flow, again.flow(first, second))
    assert raft.digest == again.digest


def test_raft_weights_come_from_a_file_and_never_run_code(tmp_path: Path) -> None:
    wanted = Raft(Flow(source="raft_small", weights="random:3"), torch.device("cpu"))
    path = tmp_path / "raft.pt"
    torch.save({"model": wanted.net.state_dict()}, path)
    found = Raft(Flow(source="raft_small", weights=str(path)), torch.device("cpu"))
    assert found.digest == wanted.digest
    with pytest.raises(CheckpointError, match=r"only .* tensors match"):
        Raft(Flow(source="raft_large", weights=str(path)), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"flow\.weights='NONE'.*C_T_V2"):
        Raft(Flow(source="raft_small", weights="NONE"), torch.device("cpu"))
    torch.save({"model": print}, path)
    with pytest.raises(CheckpointError, match="rejected"):
        Raft(Flow(source="raft_small", weights=str(path)), torch.device("cpu"))
