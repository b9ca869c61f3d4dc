"""The parts between the stages: threads, shared memory, what the report says."""

import gc
import threading
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pebble import ProcessPool
from support.media_files import write_video
from support.patience import PATIENCE_S
from threadpoolctl import threadpool_limits

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.extraction.decode.pool import DecodePool, _by_video
from karmma_pipeline.extraction.decode.worker import (
    SharedBuffer,
    clip_bytes,
    decode_clips,
    decode_into,
)
from karmma_pipeline.extraction.inference.batching import (
    BackgroundWriter,
    Prefetcher,
    collate,
    plan_batches,
)
from karmma_pipeline.extraction.inference.raft import Raft
from karmma_pipeline.extraction.progress import BACKBONES, DECODING, ExtractReport
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec, input_spec
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice


def settings(flow: Flow = Flow()) -> DecodeSettings:  # noqa: B008  (frozen)
    rgb = BackboneChoice(name="s3d", weights="random:0", frames=8, size=32)
    audio = BackboneChoice(name="resnet18", weights="random:0", image=(32, 48))
    specs = (input_spec("rgb", rgb), input_spec("flow", rgb, flow), input_spec("audio", audio))
    return DecodeSettings(Sampling(), flow, Audio(front_end="vggish", mels=32), specs)


def clips_of(path: Path, count: int) -> list[Clip]:
    source = FileSource(path)
    media = {"rgb": source, "flow": source, "audio": source}
    return [Clip(f"{path.stem}{i}", dict(media), i / 4, i / 4 + 1, {}) for i in range(count)]


def test_a_source_is_at_most_so_far_ahead_and_its_error_arrives() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number
        raise OSError("the source broke")

    items = []
    with Prefetcher(source(), depth=2) as ahead:
        numbers = iter(ahead)
        for _ in range(9):
            items.append(next(numbers))
            assert len(taken) <= len(items) + 4
        with pytest.raises(OSError, match="the source broke"):
            next(numbers)
    assert items == list(range(9))


def test_leaving_early_ends_the_thread() -> None:
    with Prefetcher(iter(range(100))) as ahead:
        assert next(iter(ahead)) == 0
    assert not ahead._thread.is_alive()


def test_what_comes_behind_is_done_in_order_and_all_of_it() -> None:
    done: list[int] = []
    may_work = threading.Event()

    def slow(number: int) -> None:
        may_work.wait()
        done.append(number)

    with BackgroundWriter(slow, depth=1) as behind:
        behind.put(0)
        behind.put(1)
        assert not done  # nobody waited for it
        may_work.set()
        for number in range(2, 5):
            behind.put(number)
    assert done == [0, 1, 2, 3, 4]


def test_an_error_behind_ends_the_work_even_at_the_very_end() -> None:
    def full(_: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWriter(full) as behind:
        behind.put(1)


@pytest.mark.slow
def test_clips_that_come_through_shared_memory_are_those_of_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever batches they are in; those that find no slot come through the pipe.

    Also whatever the number of CPUs, on which the last bits of a matrix product depend.
    """
    clips = clips_of(write_video(tmp_path / "a.mp4"), 5)
    clips += clips_of(write_video(tmp_path / "b.mp4", sound=False), 2)
    noise = (np.random.default_rng(0).standard_normal(48_000) * 3_000).astype(np.int16)
    with wave.open(str(tmp_path / "noise.wav"), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    clips.append(Clip("noise", {"audio": FileSource(tmp_path / "noise.wav")}, 0, 1, {}))
    wanted_inputs = replace(settings(), audio=Audio())
    with threadpool_limits(1, user_api="blas"):
        wanted = decode_clips(clips, wanted_inputs)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    buffer = SharedBuffer(clip_bytes(wanted_inputs), slots=4)
    found: list[DecodedClip] = []
    with DecodePool(wanted_inputs, 1, PATIENCE_S, StopFlag(), ahead=6, buffer=buffer) as pool:
        plans = list(plan_batches(0, clips, ["teacher"], size=3, wanted=range(len(clips))))
        for plan, batch in pool.batches(plans):
            assert plan is plans.pop(0)
            for clip in batch:
                own = {spec: array.copy() for spec, array in clip.arrays.items()}
                found.append(DecodedClip(clip.clip_id, own, clip.times, clip.reasons))
    buffer.close()
    assert [clip.clip_id for clip in found] == [clip.clip_id for clip in clips]
    for one, other in zip(found, wanted, strict=True):
        assert one.reasons == other.reasons
        assert set(one.arrays) == set(other.arrays)
        for spec, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[spec])
    assert pool.busy_s > 0


def test_arrays_are_left_in_their_slot_and_nothing_is_pickled() -> None:
    specs = settings().inputs
    full = {
        spec: np.full((8, 3, 32, 32), i, np.uint8)
        if spec.transform
        else np.full(spec.image, 0.5, np.float32)
        for i, spec in enumerate(specs)
    }
    buffer = SharedBuffer(clip_bytes(settings()), slots=3)
    slots = [buffer.take(), buffer.take()]

    def decode(clips: list[Clip], *_: object) -> list[DecodedClip]:
        return [DecodedClip(clip.clip_id, dict(full)) for clip in clips]

    clips = clips_of(Path("x.mp4"), 2)
    _, parts = decode_into(
        buffer.address, buffer.slot_bytes, slots, decode, clips, settings(), PATIENCE_S
    )
    for (decoded, refs), slot in zip(parts, slots, strict=True):
        assert not decoded.arrays
        buffer.restore(decoded, refs, slot)
        for spec, array in full.items():
            np.testing.assert_array_equal(decoded.arrays[spec], array)
    assert buffer.take() is not None
    assert buffer.take() is None
    buffer.give_back(slots)
    assert {buffer.take(), buffer.take()} == set(slots)
    buffer.close()


def test_shared_memory_is_freed() -> None:
    def shared() -> int:
        return Path("/proc/self/maps").read_text().count("karmma-clips")

    before = shared()
    buffer = SharedBuffer(4096, 2)
    assert shared() == before + 1
    buffer.close()
    del buffer
    gc.collect()
    assert shared() == before


def test_clips_of_one_file_go_to_one_decoder_across_batches() -> None:
    a, b = clips_of(Path("a.mp4"), 7), clips_of(Path("b.mp4"), 1)
    groups = [[clip.clip_id for clip in group] for group in _by_video([*a, *b], 4)]
    assert groups == [["a0", "a1", "a2", "a3"], ["a4", "a5", "a6"], ["b0"]]


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [
        ({BACKBONES: 9.0, DECODING: 1.0}, "backbone-bound"),
        ({BACKBONES: 4.0, DECODING: 6.0}, "decode-bound"),
    ],
)
def test_the_report_names_the_stage_that_the_others_wait_for(
    seconds: dict[str, float], bound: str
) -> None:
    report = ExtractReport({"a": Path("a")}, clips=20, complete=True)
    report.seconds.update(seconds)
    text = report.summary()
    assert f"20 clips in 10 s, 2.0 clips/s: {bound} (" in text
    facts: dict[str, Any] = report.facts()
    assert (facts["bound"], facts["clips_per_s"]) == (bound, 2.0)


def test_a_modality_that_is_larger_than_foreseen_comes_through_the_pipe() -> None:
    spec: InputSpec = settings().inputs[0]
    buffer = SharedBuffer(4096, slots=1)
    slots = [buffer.take()]

    def decode(clips: list[Clip], *_: object) -> list[DecodedClip]:
        return [DecodedClip(clip.clip_id, {spec: np.ones(5000, np.uint8)}) for clip in clips]

    clips = clips_of(Path("x.mp4"), 1)
    _, [(decoded, refs)] = decode_into(
        buffer.address, 4096, slots, decode, clips, settings(), PATIENCE_S
    )
    assert not refs
    assert decoded.arrays[spec].sum() == 5000
    buffer.close()


def test_clips_without_any_file_get_no_decode_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessPool, "schedule", lambda *_, **__: pytest.fail("a process"))
    clips = [clip for n in range(40) for clip in clips_of(tmp_path / f"{n}.mp4", 2)]
    with DecodePool(settings(), 1, PATIENCE_S, StopFlag(), ahead=6) as pool:
        pool.look_first = True
        plans = list(plan_batches(0, clips, ["teacher"], size=3, wanted=range(len(clips))))
        found = [decoded for _, batch in pool.batches(plans) for decoded in batch]
    assert [decoded.clip_id for decoded in found] == [clip.clip_id for clip in clips]
    for decoded, clip in zip(found, clips, strict=True):
        assert set(decoded.reasons.values()) == {Reason.FILE_MISSING}
        assert set(decoded.details.values()) == {str(clip.media["rgb"].path)}


@pytest.mark.slow
def test_pairs_of_frames_come_through_shared_memory_and_become_flow(tmp_path: Path) -> None:
    flow = Flow(source="raft_small", weights="random:0", updates=1)
    wanted = settings(flow)
    clips = clips_of(write_video(tmp_path / "a.mp4", pan_px_s=30.0), 2)
    (spec,) = (spec for spec in wanted.inputs if spec.pairs)
    raft = Raft(flow, torch.device("cpu"))
    alone = []
    for clip in decode_clips(clips, wanted):
        pairs = torch.from_numpy(clip.arrays[spec])
        alone.append(raft.pictures(pairs, clip.flow_scales[spec]))
    buffer = SharedBuffer(clip_bytes(wanted), slots=3)
    with DecodePool(wanted, 1, PATIENCE_S, StopFlag(), ahead=3, buffer=buffer) as pool:
        ((plan, decoded),) = pool.batches(
            plan_batches(0, clips, ["teacher"], size=2, wanted=range(len(clips)))
        )
        batch = collate(plan, decoded, pin=False)
    buffer.close()  # the batch needs it no longer
    pictures = raft.inputs(batch, spec).numpy()
    np.testing.assert_array_equal(pictures, alone)
    assert pictures.std() > 0
