"""How long a model takes to answer on this machine, and how often it can be asked live."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import ceil

import numpy as np

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import evaluated_subsets
from karmma_pipeline.recognition.live import Event, Failures, at_its_rate
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.recognition.stream import Stream

# Answers of a subset that are timed: at least and at most so many, else what fits into the time.
_LEAST, MOST, _SECONDS = 12, 200, 10.0

# A hop is rounded up to whole hundredths of a second. It is played for so many windows, or fewer,
# and where it is not held it is raised, so often.
_GRID, _LEAST_PLAYED, _MOST_PLAYED, _PLAYED_S, _RAISE, _TRIES = 100, 10, 40, 20.0, 1.25, 5

# How often noise arrives while it plays, seconds.
_TICK_S = 0.04

_ASKED = "all measurements so far have been printed"


@dataclass(frozen=True)
class Latency:
    """How long answers take that see some modalities: medians and 99th percentiles, seconds."""

    seen: tuple[str, ...]
    answers: int
    p50_s: float
    p99_s: float

    def sentence(self) -> str:
        """Return it as a line."""
        return (
            f"{'+'.join(self.seen)}: p50 {1e3 * self.p50_s:.0f} ms, p99 {1e3 * self.p99_s:.0f} ms "
            f"({self.answers} predictions)"
        )


@dataclass(frozen=True)
class Played:
    """What came of sensors that were answered in real time; ``late_s`` is the largest."""

    hop_s: float
    answered: int
    skipped: int
    late_s: float

    def sentence(self) -> str:
        """Return it as a line."""
        return (
            f"hop {self.hop_s:.3g} s in real time: {self.answered} predictions, {self.skipped} "
            f"windows skipped, largest delay {self.late_s:.2f} s after the window"
        )


def latencies(
    recognizer: Recognizer, window_s: float, hop_s: float, stop: StopFlag, most: int = MOST
) -> Iterator[Latency]:
    """Yield how long an answer takes with every subset of the modalities, on made-up signals.

    Args:
        recognizer: whose answers are timed.
        window_s: length of a window.
        hop_s: from one window to the next.
        stop: looked at between answers.
        most: answers of a subset; fewer, but no less than twelve, where they take longer than 10 s.

    Raises:
        ConfigError: a modality does not fit into the window.
        StoppedError: a stop was asked for.
    """
    for subset in evaluated_subsets(recognizer.modalities):
        stream = recognizer.stream(window_s, hop_s)
        for modality in recognizer.modalities:
            stream.switch(modality, modality in subset)
        seconds = _timed(stream, subset, stop, most)
        p50, p99 = np.quantile(seconds, (0.5, 0.99)).tolist()
        yield Latency(subset, len(seconds), p50, p99)


def _timed(stream: Stream, subset: tuple[str, ...], stop: StopFlag, most: int) -> list[float]:
    """Return the seconds that answers took, without the first."""
    noise, settings, seconds = stream.noise(), stream.settings, list[float]()
    for number in range(most + 1):
        stop.check(_ASKED)
        now_s = settings.window_s + settings.tolerance_s + number * settings.hop_s
        for sensor, at_s, values in noise.until(now_s):
            stop.check(_ASKED)
            stream.push(sensor, at_s, values)
        started = time.perf_counter()
        prediction = stream.step(now_s)
        seconds.append(time.perf_counter() - started)
        if prediction is None or any(not prediction.mask[m] for m in subset):
            why = prediction.reasons if prediction else {}
            said = ", ".join(f"{m} ({why.get(m, 'late')})" for m in subset if m in why)
            raise ConfigError(f"--window {settings.window_s:g}: a modality is absent: {said}.")
        if number >= _LEAST and sum(seconds[1:]) > _SECONDS:
            break
    return seconds[1:]


def play_hops(
    recognizer: Recognizer, window_s: float, latency_s: float, stop: StopFlag
) -> Iterator[Played]:
    """Play made-up signals in real time, at longer hops until one is held, then at half of it.

    Halves follow as long as they are held, so that the last but one is the smallest that was.

    Args:
        recognizer: all modalities of which are there.
        window_s: length of a window.
        latency_s: of one answer: no shorter hop can be held.
        stop: looked at between windows.

    Raises:
        StoppedError: a stop was asked for.
    """
    hop_s, held = _rounded_up(latency_s), False
    for _ in range(_TRIES):
        played = _play(recognizer.stream(window_s, hop_s), stop)
        yield played
        if held and played.skipped:
            return
        held = not played.skipped
        hop_s = hop_s / 2 if held else _rounded_up(_RAISE * hop_s)


def _rounded_up(hop_s: float) -> float:
    return ceil(hop_s * _GRID) / _GRID


def _play(stream: Stream, stop: StopFlag) -> Played:
    settings, noise = stream.settings, stream.noise()
    windows = min(max(_LEAST_PLAYED, round(_PLAYED_S / settings.hop_s)), _MOST_PLAYED)
    end_s = settings.window_s + settings.tolerance_s + (windows - 0.5) * settings.hop_s

    def events() -> Iterator[Event]:
        for there_s in (n * _TICK_S for n in count(1)):
            for sensor, at_s, values in noise.until(there_s):
                yield there_s, sensor, at_s, values
            if there_s > end_s:
                return

    stream.warm_up()
    answers = at_its_rate(stream, events(), Failures(0, 0), lambda picture: None, stop)
    late = [answer.late_s for answer in answers]
    return Played(settings.hop_s, len(late), stream.skipped, max(late, default=0.0))
