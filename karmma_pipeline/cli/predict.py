"""`karmma predict`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from karmma_pipeline.cli.options import named_by_option
from karmma_pipeline.errors import ConfigError, KarmmaError, MediaError, counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from karmma_pipeline.data.sensors import Sensor
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.models.backbones.choice import Engine
    from karmma_pipeline.recognition.bag import Clock
    from karmma_pipeline.recognition.clips import Recording, Wanted
    from karmma_pipeline.recognition.output import Row
    from karmma_pipeline.recognition.prediction import Dropout
    from karmma_pipeline.recognition.recognizer import Recognizer


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--start", "start_s", type=float, default=0.0, help="Start within the video, seconds."
)
@click.option(
    "--stop", "stop_s", type=float, help="Stop within the video, seconds; default: its end."
)
@click.option("--window", "window_s", type=float, help="Length of the sliding window, seconds.")
@click.option("--hop", "hop_s", type=float, help="Hop between windows, seconds; default: --window.")
@click.option(
    "--without", multiple=True, metavar="MODALITY", help="Modality to leave out; repeatable."
)
@click.option(
    "--drop", "rate", type=float, default=0.0, help="Probability of dropping each modality."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of --drop.")
@click.option("--top", type=click.IntRange(1, 100), default=5, help="Number of classes to write.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("predictions"),
              show_default=True, help="Output folder.")  # fmt: skip
@click.option("--video", is_flag=True, help="Also write videos with predictions overlaid.")
@click.option("--topic", "topics", multiple=True, metavar="MODALITY=/TOPIC",
              help="ROS topic to read as a modality; repeatable.")  # fmt: skip
@click.option("--clock", type=click.Choice(["header", "log"]), default="header",
              help="Timestamps to use: message header or log time.")  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu, cuda, ...")
@click.option("--engine", type=click.Choice(["torch", "openvino"]),
              help="Inference engine of the backbones; default: as in training.")  # fmt: skip
@click.option("--weights", multiple=True, metavar="MODALITY=FILE",
              help="New path of a backbone's weights; repeatable.")  # fmt: skip
@named_by_option
def predict(
    run: Path,
    inputs: tuple[Path, ...],
    start_s: float,
    stop_s: float | None,
    window_s: float | None,
    hop_s: float | None,
    without: tuple[str, ...],
    rate: float,
    seed: int,
    top: int,
    out: Path,
    video: bool,
    topics: tuple[str, ...],
    clock: Clock,
    device: str,
    engine: Engine | None,
    weights: tuple[str, ...],
) -> None:
    """Recognise actions in videos with a trained model.

    INPUTS are videos, manifests (the CSV of `karmma extract`; labels are optional), or ROS 2 bags
    in MCAP (see --topic). Predictions match `karmma evaluate`: same decoding, backbones and fusion
    model. Writes predictions.csv, predictions.jsonl and timeline.html. Inputs that cannot be read
    are listed at the end, with exit code 1.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; choose a folder.")
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.recognition.backbones import parse_weights, sensors_of
    from karmma_pipeline.recognition.clips import Spans, unread, wanted_clips
    from karmma_pipeline.recognition.output import summary, unseen, write_timeline
    from karmma_pipeline.recognition.prediction import Dropout
    from karmma_pipeline.recognition.recognizer import Recognizer

    started = time.perf_counter()
    spans, dropout = Spans(start_s, stop_s, window_s, hop_s), Dropout(without, rate, seed)
    others = any(path.suffix.lower() in {".csv", ".mcap"} for path in inputs)
    sensors = sensors_of(run) if others else {}
    bags = _unpacked(inputs, topics, sensors, out, clock)
    wanted = wanted_clips(inputs, spans, sensors, bags)
    faults = dict(wanted.faults)
    recognizer = Recognizer.load(run, device, parse_weights(weights), engine)
    for note in (*recognizer.notes, *faults.values()):
        click.echo(f"note: {note}", err=True)
    with StopFlag(resumes=False) as stop:
        rows = _answers(recognizer, wanted, dropout, out, top, stop)
        write_timeline(out / "timeline.html", rows, recognizer.card.name)
        faults |= {path: fault for path, fault in unseen(rows).items() if path in inputs}
        if video:
            faults |= _overlays([row for row in rows if row.source not in faults], out, stop)
    seconds = time.perf_counter() - started
    made, missing = counted(len(rows), "prediction"), summary(rows) or "no modality was missing"
    click.echo(f"{made} in {seconds:.1f} s; {missing}")
    click.echo(f"predictions: {out / 'predictions.csv'}, timeline: {out / 'timeline.html'}")
    if faults:
        raise unread(faults)


def _unpacked(
    inputs: tuple[Path, ...],
    topics: tuple[str, ...],
    sensors: Mapping[str, Sensor],
    out: Path,
    clock: Clock,
) -> dict[Path, Recording | KarmmaError]:
    """Write the topics of bags as files into the folder of the answers."""
    bags = [path for path in inputs if path.suffix.lower() == ".mcap"]
    if topics and not bags:
        raise ConfigError(f"--topic {topics[0]}: none of the inputs is a bag (.mcap).")
    if not bags:
        return {}
    from karmma_pipeline.recognition.bag import parse_topics, unpack

    wanted, found = parse_topics(topics), dict[Path, "Recording | KarmmaError"]()
    for bag in bags:
        try:
            found[bag] = unpack(bag, wanted, sensors, out, clock)
        except (ConfigError, MediaError) as error:
            found[bag] = error
    return found


def _answers(
    recognizer: Recognizer, wanted: Wanted, dropout: Dropout, out: Path, top: int, stop: StopFlag
) -> list[Row]:
    """Recognise, print and write the clips one by one."""
    from karmma_pipeline.logs import bars_cleared, progress_bar
    from karmma_pipeline.recognition.output import PredictionWriter, row_of

    rows = []
    heads = recognizer.card.heads
    with PredictionWriter(out, list(heads), truth=any(wanted.truth.values())) as writer:
        predictions = recognizer.predict(wanted.clips, dropout, stop)
        for one in progress_bar(predictions, "predict", total=wanted.count, unit="clip"):
            truth = wanted.truth.get(one.clip.clip_id, {})
            row = row_of(one, top, truth, wanted.ends)
            writer.write(row)
            with bars_cleared():
                click.echo(row.sentence())
            rows.append(row.shortened())  # hours of windows have ten thousands of rows
    return rows


def _overlays(rows: list[Row], out: Path, stop: StopFlag) -> dict[Path, KarmmaError]:
    """Write the videos; return those whose frames cannot be read again."""
    from karmma_pipeline.recognition.overlay import has_pictures, write_overlay

    sources, faults = dict.fromkeys(row.source for row in rows), dict[Path, "KarmmaError"]()
    for number, source in enumerate(sources):
        if not has_pictures(source):
            click.echo(f"note: no overlay for {source}: it has no video stream", err=True)
            continue
        some = sorted((r for r in rows if r.source == source), key=lambda row: row.start_s)
        name = f"{number:03d}_{source.stem}" if len(sources) > 1 else source.stem
        path = out / f"{name}.mp4"
        if any(path.resolve() == other.resolve() for other in sources):  # out holds the videos
            path = out / f"{name}.predictions.mp4"
        try:
            write_overlay(source, some, path, stop)
        except MediaError as error:
            faults[source] = error
            continue
        click.echo(f"video: {path}")
    return faults
