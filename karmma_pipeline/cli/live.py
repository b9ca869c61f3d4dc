"""`karmma live`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karmma_pipeline.cli.options import named_by_option
from karmma_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from karmma_pipeline.models.backbones.choice import Engine
    from karmma_pipeline.recognition.live import Answered
    from karmma_pipeline.recognition.output import Row
    from karmma_pipeline.recognition.recognizer import Recognizer
    from karmma_pipeline.recognition.stream import Stream

_TOO_LATE = (
    "predictions are up to {:.3g} s late, more than the window of {:g} s: a single prediction "
    "takes that long, so skipping windows does not help; use a smaller model, a faster device or "
    "a longer --window"
)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="Video to play in real time.")
@click.option("--camera", type=click.IntRange(0, 99), help="Camera index (without audio).")
@click.option("--window", "window_s", type=float, default=2.0, show_default=True,
              help="Window length, seconds.")  # fmt: skip
@click.option("--hop", "hop_s", type=float, default=0.5, show_default=True,
              help="Seconds between windows.")  # fmt: skip
@click.option("--deadline", "deadline_s", type=float, default=0.5, show_default=True,
              help="Seconds without data after which a sensor counts as absent.")  # fmt: skip
@click.option(
    "--without", multiple=True, metavar="MODALITY", help="Modality to switch off; repeatable."
)
@click.option("--chaos", "rate", type=float, default=0.0,
              help="Probability per second that a sensor fails or recovers.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of --chaos.")
@click.option("--fast", is_flag=True, help="Process --source as fast as inference allows.")
@click.option("--measure", is_flag=True,
              help="Measure latency on synthetic input, per subset of modalities.")  # fmt: skip
@click.option("--browser", is_flag=True, help="Show the stream in a browser, on localhost only.")
@click.option("--port", type=click.IntRange(0, 65535), default=0,
              help="Port for --browser; default: a free one.")  # fmt: skip
@click.option("--top", type=click.IntRange(1, 100), default=3, help="Number of classes to show.")
@click.option("--device", default="auto", help="auto, cpu, cuda, ...")
@click.option("--engine", type=click.Choice(["torch", "openvino"]),
              help="Inference engine of the backbones; default: as in training.")  # fmt: skip
@click.option("--weights", multiple=True, metavar="MODALITY=FILE",
              help="New path of a backbone's weights; repeatable.")  # fmt: skip
@named_by_option
def live(
    run: Path,
    source: Path | None,
    camera: int | None,
    window_s: float,
    hop_s: float,
    deadline_s: float,
    without: tuple[str, ...],
    rate: float,
    seed: int,
    fast: bool,
    measure: bool,
    browser: bool,
    port: int,
    top: int,
    device: str,
    engine: Engine | None,
    weights: tuple[str, ...],
) -> None:
    """Recognise actions in a live stream while sensors fail.

    Plays a video or reads a camera; each window is classified from the modalities that are present.
    --browser shows the video, the predictions and a switch per modality.
    """
    if measure and (source is not None or camera is not None):
        raise ConfigError("--measure: uses synthetic input; omit --source and --camera.")
    if not measure and (source is None) == (camera is None):
        raise ConfigError("give either --source VIDEO or --camera NUMBER.")
    if fast and source is None:
        raise ConfigError("--fast: only for --source; a camera has its own frame rate.")
    from karmma_pipeline.extraction.media.media_file import OpenMedia
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.recognition import live as playing
    from karmma_pipeline.recognition.backbones import parse_weights
    from karmma_pipeline.recognition.output import row_of
    from karmma_pipeline.recognition.page import LivePage
    from karmma_pipeline.recognition.prediction import Dropout
    from karmma_pipeline.recognition.recognizer import Recognizer

    failures = playing.Failures(rate, seed)
    recognizer = Recognizer.load(run, device, parse_weights(weights), engine)
    if measure:
        _measure(recognizer, window_s, hop_s)
        return
    stream = recognizer.stream(window_s, hop_s, deadline_s)
    Dropout(without).check(recognizer.modalities)
    for modality in without:
        stream.switch(modality, on=False)
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag(resumes=False))
        if source is None:
            assert camera is not None  # noqa: S101  (one of the two is there)
            events = playing.camera_events(camera)
        else:
            rate = recognizer.decode_settings.audio.sample_rate
            events = playing.video_events(stack.enter_context(OpenMedia()), source, rate)
        page = stack.enter_context(LivePage(stream.switch, port)) if browser else None
        if page is not None:
            click.echo(f"open {page.address}")
        show = (lambda picture: None) if page is None else page.show_picture
        play = playing.simulated
        if not fast:
            play = playing.at_its_rate
            stream.warm_up()
        late_s = 0.0
        for answered in play(stream, events, failures, show, stop):
            row = row_of(answered.prediction, top, {})
            row = row if source is None else replace(row, source=source)
            click.echo(row.sentence())
            late_s = max(late_s, answered.late_s)
            if page is not None:
                page.show(_plain(row, stream, answered))
    said = f"windows skipped: {stream.skipped}"
    click.echo(
        said if fast else f"{said}; largest delay of a prediction after its window: {late_s:.2f} s"
    )
    if late_s > window_s and not fast:
        click.echo(_TOO_LATE.format(late_s, window_s))


def _measure(recognizer: Recognizer, window_s: float, hop_s: float) -> None:
    """Print how long answers take, and how short a hop this machine holds."""
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.recognition.latency import latencies, play_hops

    with StopFlag(resumes=False) as stop:
        slowest_s = 0.0
        for latency in latencies(recognizer, window_s, hop_s, stop):
            click.echo(latency.sentence())
            slowest_s = max(slowest_s, latency.p99_s)
        held = list[float]()
        for played in play_hops(recognizer, window_s, slowest_s, stop):
            click.echo(played.sentence())
            held += [] if played.skipped else [played.hop_s]
    said = (
        f"smallest hop sustained in real time: {min(held):.3g} s"
        if held
        else "no hop was sustained in real time"
    )
    click.echo(f"{said}, with windows of {window_s:g} s")
    if slowest_s > window_s:
        click.echo(_TOO_LATE.format(slowest_s, window_s))


def _plain(row: Row, stream: Stream, answered: Answered) -> dict[str, Any]:
    """Return what the page shows of a window, JSON-plain."""
    from karmma_pipeline.recognition.output import plain_top

    return {
        "start_s": row.start_s,
        "stop_s": row.stop_s,
        "mask": dict(answered.prediction.mask),
        "reasons": dict(row.reasons),
        "top": plain_top(row),
        "said": row.best(next(iter(row.top), "")),
        "lag_s": answered.late_s,
        "skipped": stream.skipped,
    }
