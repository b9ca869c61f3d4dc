"""What windows of a live stream have in common is computed once, and no answer shows it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.live import Signals, offline, tiny_recognizer
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from karmma_pipeline.extraction.decode import spectrogram
from karmma_pipeline.extraction.inference.recent import Recent, digest
from karmma_pipeline.models.backbones.front_end import Audio
from karmma_pipeline.recognition import spectrograms
from karmma_pipeline.recognition.backbones import SET
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.recognition.stream import Stream

FPS = 25
PER_FRAME = {"name": "support.live:frame_net", "weights": "random:1"}
WHOLE = {"name": "support.live:image_net", "weights": "random:2", "image": [16, 16]}


def recognizer(**changes: Any) -> Recognizer:
    sets = {SET: {"rgb": PER_FRAME, "flow": PER_FRAME, "audio": WHOLE}}
    return tiny_recognizer(**{"sets": sets, "audio": {}} | changes)


def signals(seconds: float) -> Signals:
    rng = np.random.default_rng(0)
    times = np.arange(round(seconds * FPS)) / FPS
    pictures = rng.integers(0, 256, (len(times), 20, 24, 3), np.uint8)
    return Signals(times, pictures, np.zeros(0, np.float32), 16_000, 0.0)


def feed(stream: Stream, whole: Signals, low_s: float, high_s: float) -> None:
    """Push pictures."""
    for n, time_s in enumerate(whole.frame_starts):
        if low_s <= time_s < high_s:
            stream.push("rgb", time_s, whole._pictures[n])


def near(live: Any, expected: Any, atol: float) -> None:
    assert live.mask == expected.mask == {"rgb": True, "flow": True, "audio": False}
    for head, logits in expected.logits.items():
        np.testing.assert_allclose(live.logits[head], logits, rtol=0, atol=atol)


def passes(model: Recognizer, modality: str, counts: list[int]) -> None:
    """Let a network count the pictures that go through it."""
    network = model.networks.all[model.networks.jobs(SET)[modality].network]
    body = network.backbone.net.get_submodule("body")
    body.register_forward_hook(lambda m, given, out: counts.append(len(out)))


@pytest.mark.parametrize("hop_s", [0.5, 0.25, 0.3])
def test_a_frame_goes_once_through_a_network_that_sees_frames_by_themselves(hop_s: float) -> None:
    model, whole, counts = recognizer(), signals(6), list[int]()
    passes(model, "rgb", counts)
    stream, fed_s, sampled = model.stream(2, hop_s), 0.0, set[int]()
    counts.clear()  # a pass that tells how large the network is
    for start_s in np.arange(8) * hop_s:
        now_s = start_s + 2.1
        feed(stream, whole, fed_s, now_s)
        fed_s = now_s
        live = stream.step(now_s)
        sampled |= {*whole.numbers(start_s + np.arange(0.25, 2, 0.5)).tolist()}
        assert sum(counts) == 2 * len(sampled)  # pictures and their motion
        so_far = [*counts]
        fresh = model.stream(2, hop_s)
        feed(fresh, whole, start_s - 0.1, now_s)
        near(live, fresh.step(now_s), atol=0)
        near(live, offline(model, whole, start_s, start_s + 2, ("rgb", "flow")), atol=1e-5)
        counts[:] = so_far


def test_what_is_kept_ends_with_the_windows_that_may_want_it() -> None:
    kept = Recent(rounds=2, most_bytes=40)
    calls = list[int]()

    def make(places: list[int]) -> list[Tensor]:
        calls.extend(places)
        return [torch.zeros(2) for _ in places]  # 8 bytes

    for keys in (["a", "a", "b"], ["b"], ["c"], ["a"]):
        kept.begin()
        assert len(kept.of(keys, make)) == len(keys)
    assert calls == [1, 2, 0, 0]  # "a" was two windows old
    assert (len(kept), kept.bytes) == (3, 24)
    kept.of([*"defgh"], make)
    assert (len(kept), kept.bytes) == (5, 40)
    assert digest(np.zeros(3)) != digest(np.zeros(4))


@pytest.fixture
def one_thread_of_blas() -> Iterator[None]:
    """Let whole spectrograms be those of live columns to the last bit."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.mark.parametrize("front_end", ["radevski", "auditory_slowfast", "ast"])
@pytest.mark.usefixtures("one_thread_of_blas")
def test_columns_of_the_window_before_are_not_computed_again(
    front_end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, computed = Audio(front_end=front_end), list[int]()
    size, rate = (32, 48), settings.sample_rate
    sound = np.random.default_rng(0).standard_normal(4 * rate).astype(np.float32)

    def counted(audio: Audio, part: Any) -> Any:
        computed.append(len(part))
        return spectrogram.front_end(audio, part)

    monkeypatch.setattr(spectrograms, "front_end", counted)
    made = spectrograms.Spectrograms(Recent(4))
    for n in range(4):
        part = sound[n * rate // 2 :][: 2 * rate]
        image = made.of(n / 2)(settings, part, size)
        whole = spectrogram.mel_image(settings, part, size)
        np.testing.assert_allclose(image, whole, atol=1e-5)
    every = 4 * 2 * rate
    assert sum(computed) == every if front_end == "ast" else sum(computed) < every * 0.45
    late = sound[3 * rate // 2 :][: 2 * rate] * 0.5  # other sound at the same moments
    image = made.of(1.5)(settings, late, size)
    np.testing.assert_array_equal(image, spectrogram.mel_image(settings, late, size))
    odd = sound[3 * rate // 2 + 7 :][: 2 * rate]  # not whole hops later
    for before in (made, spectrograms.Spectrograms(Recent(4))):  # which has other sound, and this
        before.of(1.5)(settings, part, size)
        image = before.of(1.5 + 7 / rate)(settings, odd, size)
        np.testing.assert_array_equal(image, spectrogram.mel_image(settings, odd, size))


def test_made_up_signals_never_repeat_lest_latencies_be_those_of_what_is_kept() -> None:
    sent = [
        (sensor, digest(values)) for sensor, _, values in recognizer().stream().noise().until(5)
    ]
    assert len({*sent}) == len(sent) == 125 + 50


@pytest.mark.slow
def test_raft_looks_once_at_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = {"source": "raft_small", "weights": "random:0", "updates": 1}
    model, whole, pairs = recognizer(flow=flow), signals(4), list[int]()
    raft = model.networks.raft
    assert raft is not None
    real = raft.flow

    def counted(first: Tensor, second: Tensor) -> Tensor:
        pairs.append(len(first))
        return real(first, second)

    stream = model.stream(2, 0.5)
    monkeypatch.setattr(raft, "flow", counted)
    for n in range(4):
        feed(stream, whole, 2.1 + (n - 1) * 0.5 if n else 0.0, 2.1 + n * 0.5)
        live = stream.step(2.1 + n * 0.5)
        assert sum(pairs) == 4 + n
        expected = offline(model, whole, n / 2, n / 2 + 2, ("rgb", "flow"))
        del pairs[4 + n :]
        near(live, expected, atol=1e-4)


def test_live_spectrograms_have_one_thread_and_leave_all_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen: list[set[int]] = []
    real = spectrogram.front_end

    def front_end(*arguments: Any) -> Any:
        seen.append(threads())
        return real(*arguments)

    monkeypatch.setattr(spectrograms, "front_end", front_end)
    settings, sound = Audio(), np.random.default_rng(0).random(16_000, np.float32)
    with threadpool_limits(2, user_api="blas"):
        spectrograms.Spectrograms(Recent(4)).of(0.0)(settings, sound, (16, 16))
        assert threads() == {2}
    assert seen == [{1}]
