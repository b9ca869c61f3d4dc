"""Sensors that die and come back at random, on a simulated clock.

By hand: ``PYTHONPATH=.:tests python -m support.chaos --events 100000``.
"""

import argparse
import heapq
import itertools
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.live import Signals, offline, tiny_recognizer

from karmma_pipeline.recognition.prediction import Prediction
from karmma_pipeline.recognition.recognizer import Recognizer

FPS, HZ, CHUNK, IMU_HZ = 10, 16_000, 1_600, 50
IMU = {"channels": 3, "source_hz": IMU_HZ, "rate_hz": 20, "windows": 4, "window": 8}
WINDOW_S, HOP_S, LATE_S = 2.0, 0.5, 0.1
REASONS = {"no_data", "stale", "gap", "dropped"}
HISTORY_S = 12.0


@dataclass
class Outcome:
    """What came of it; ``farthest`` is the largest difference to the answers to whole signals."""

    steps: int = 0
    events: int = 0
    compared: int = 0
    farthest: float = 0.0
    masks: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    megabytes: list[float] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)


class World:
    """A camera, a microphone and an IMU that fail, and all that has come of them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.order = rng, itertools.count()
        self.states = {"rgb": "well", "audio": "well", "imu": "well"}
        self.on_the_way: list[Any] = []
        self.frames: dict[float, Any] = {}
        self.chunks: dict[int, Any] = {}
        self.samples: dict[float, Any] = {}
        self.sent = {"rgb": 0, "audio": 0, "imu": 0}

    def fail_and_return(self) -> int:
        """Let sensors change how they are; return how many did."""
        changed = 0
        for sensor, state in self.states.items():
            if self.rng.random() < 0.25:
                others = ["well", "well", "dead", "weak", "mad"]
                self.states[sensor] = str(self.rng.choice(others))
                changed += self.states[sensor] != state
        return changed

    def send(self, until_s: float) -> None:
        """Let the sensors send what is taken up to a moment; it arrives a little later."""
        for sensor, rate in (("rgb", FPS), ("audio", HZ / CHUNK), ("imu", IMU_HZ)):
            while self.sent[sensor] / rate < until_s:
                number, taken_s = self.sent[sensor], self.sent[sensor] / rate
                self.sent[sensor] += 1
                state = self.states[sensor]
                if state == "dead" or (state == "weak" and self.rng.random() < 0.4):
                    continue
                self._send(sensor, number, taken_s, state)

    def _send(self, sensor: str, number: int, taken_s: float, state: str) -> None:
        values: Any
        if sensor == "rgb":
            values = self.rng.integers(0, 256, (20, 24, 3), np.uint8)
        elif sensor == "imu":
            values = self.rng.standard_normal(3)
        else:
            values = (self.rng.random(CHUNK, np.float32) - 0.5).astype(np.float32)
        arrives_s = taken_s + self.rng.random() * LATE_S * 0.9
        good = not (state == "mad" and self.rng.random() < 0.3)
        stamp = taken_s
        if not good and sensor != "rgb" and self.rng.random() < 0.5:
            values[2] = np.nan
        elif not good:
            stamp = float(self.rng.choice([taken_s - 1e3, taken_s + 1e5, taken_s + 5, np.nan]))
        key = number if good else None
        item = (arrives_s, next(self.order), sensor, stamp, values, key)
        heapq.heappush(self.on_the_way, item)

    def deliver(self, stream: Any, until_s: float) -> None:
        """Push what arrives up to a moment, and remember what is good of it."""
        while self.on_the_way and self.on_the_way[0][0] <= until_s:
            _, _, sensor, stamp, values, key = heapq.heappop(self.on_the_way)
            stream.push(sensor, stamp, values)
            if key is None:
                continue
            if sensor in {"rgb", "imu"}:
                kept = self.frames if sensor == "rgb" else self.samples
                kept[stamp] = values
                while (oldest := next(iter(kept))) < stamp - HISTORY_S:  # about in order of time
                    del kept[oldest]
            else:
                self.chunks[key] = values
                while (first := next(iter(self.chunks))) * CHUNK / HZ < stamp - HISTORY_S:
                    del self.chunks[first]

    def signals(self) -> Signals:
        """Return what has been delivered as if it were a file."""
        times = sorted(self.frames)
        first = min(self.chunks, default=0)
        sound = np.zeros((max(self.chunks, default=0) + 1 - first) * CHUNK, np.float32)
        for number, values in self.chunks.items():
            sound[(number - first) * CHUNK :][:CHUNK] = values
        pictures = [self.frames[t] for t in times]
        moments = np.array(sorted(self.samples))
        imu = moments, np.array([self.samples[at_s] for at_s in moments])
        return Signals(times, pictures, sound, HZ, first * CHUNK / HZ, {"imu": imu})


def run(
    events: int,
    compare: int,
    seed: int,
    recognizer: Recognizer | None = None,
    say: Callable[[Outcome], None] = lambda so_far: None,
) -> Outcome:
    """Let so many failures and returns happen, a step per hop, and check every answer."""
    recognizer = recognizer or tiny_recognizer(sensors={"imu": IMU})
    rng, outcome = np.random.default_rng(seed), Outcome()
    stream = recognizer.stream(WINDOW_S, HOP_S, 0.5, tolerance_s=LATE_S, audio_hz=HZ, share=0.75)
    world, off = World(rng), set[str]()
    share = compare / events
    while outcome.events < events:
        now_s = WINDOW_S + LATE_S + outcome.steps * HOP_S
        outcome.events += world.fail_and_return()
        if rng.random() < 0.1:
            modality = str(rng.choice(recognizer.modalities))
            off ^= {modality}
            stream.switch(modality, modality not in off)
            outcome.events += 1
        world.send(now_s)
        world.deliver(stream, now_s)
        prediction = stream.step(now_s)
        assert prediction is not None, f"no answer at {now_s}"
        check(recognizer, prediction, outcome.steps * HOP_S, off)
        seen = tuple(m for m, there in prediction.mask.items() if there)
        outcome.masks["+".join(seen)] += 1
        outcome.reasons.update(prediction.reasons.values())
        # Events and steps are about as many.
        if seen and outcome.compared < compare and rng.random() < 1.5 * share:
            outcome.compared += 1
            outcome.farthest = max(outcome.farthest, difference(recognizer, world, prediction))
        if outcome.steps % 5_000 == 0:
            outcome.megabytes.append(resource_mb())
            say(outcome)
        outcome.steps += 1
    assert stream.skipped == 0
    outcome.ignored = stream.ignored
    return outcome


def check(recognizer: Recognizer, prediction: Prediction, start_s: float, off: set[str]) -> None:
    """See that an answer is whole."""
    assert prediction.clip.start_s == start_s
    assert tuple(prediction.mask) == recognizer.modalities
    assert {m for m, there in prediction.mask.items() if not there} == set(prediction.reasons)
    assert set(prediction.reasons.values()) <= REASONS, prediction.reasons
    assert off == {m for m, why in prediction.reasons.items() if why == "dropped"}
    if any(prediction.mask.values()):
        for head, names in recognizer.card.heads.items():
            logits = prediction.logits[head]
            assert logits.shape == (len(names),)
            assert np.isfinite(logits).all()
    else:
        assert not prediction.logits


def difference(recognizer: Recognizer, world: World, prediction: Prediction) -> float:
    """Return how far an answer is from that to the whole signals, with the same modalities."""
    clip = prediction.clip
    seen = [m for m, there in prediction.mask.items() if there]
    whole = offline(recognizer, world.signals(), clip.start_s, clip.stop_s or 0.0, seen)
    assert whole.mask == prediction.mask
    return max(float(np.abs(whole.logits[h] - prediction.logits[h]).max()) for h in whole.logits)


def resource_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--compare", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    print(run(arguments.events, arguments.compare, arguments.seed, say=progress))
    print(f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU")


def progress(so_far: Outcome) -> None:
    """Say what there is, for a run that is stopped before its end."""
    print(
        f"{so_far.events} events, {so_far.steps} steps, {so_far.compared} compared, farthest "
        f"{so_far.farthest:.3g}, {so_far.megabytes[-1]:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
