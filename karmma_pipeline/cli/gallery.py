"""``karmma evaluate --gallery``: clips of the report as videos, with the answers drawn in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from karmma_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from karmma_pipeline.data.manifest import Clip
    from karmma_pipeline.evaluation.evaluate import EvaluateReport
    from karmma_pipeline.evaluation.gallery import Choice, Picture
    from karmma_pipeline.evaluation.recipe import EvaluateRecipe
    from karmma_pipeline.jobs import StopFlag


def write_gallery(
    recipe: EvaluateRecipe, report: EvaluateReport, count: int, stop: StopFlag
) -> str:
    """Write videos of clips into the report, and its page anew; return the rule of the choice.

    Args:
        recipe: of the evaluation, whose last run is shown.
        report: that is there.
        count: clips of each kind.
        stop: looked at between clips and pictures.

    Raises:
        ConfigError: the clips' media are not to be found.
        MediaError: one of them cannot be read again.
        StoppedError: a stop was asked for; the report without a gallery is there.
    """
    from karmma_pipeline import files, locks, runs
    from karmma_pipeline.evaluation.gallery import Gallery, choose
    from karmma_pipeline.evaluation.report.page import write_report

    choice = choose(report.logits(len(recipe.runs) - 1), count, recipe.seed)
    clips = _clips(recipe, choice)
    with locks.locked(report.folder / ".lock", "is writing a report to this folder", runs.ELSE):
        folder = report.folder / "gallery"
        pictures = _pictures(recipe, choice, clips, folder, stop)
        names = {picture.video for picture in pictures}
        for path in folder.glob("*.mp4"):  # of an earlier choice
            if path.name not in names:
                with files.disk_errors(path):
                    path.unlink()
        write_report(report.folder, report.results, Gallery(choice.rule, tuple(pictures)))
    return choice.rule


def _clips(recipe: EvaluateRecipe, choice: Choice) -> list[Clip]:
    """Return the chosen clips with their media, which are there."""
    from karmma_pipeline.data.sources import FileSource
    from karmma_pipeline.errors import MediaError
    from karmma_pipeline.evaluation.recipe import with_stores
    from karmma_pipeline.extraction.progress import recipe_of
    from karmma_pipeline.extraction.recipe import read_clips

    stores = with_stores(recipe).stores
    made_by = {store.parent: of for store in stores if (of := recipe_of(store)) is not None}
    if not made_by:
        raise ConfigError(
            f"--gallery: no extraction recipe next to {stores[0]}, so the clips' videos cannot "
            "be found; give the store at its original location with --store."
        )
    listed = {clip.clip_id: clip for of in made_by.values() for clip in read_clips(of).clips}
    if missing := [shown.clip_id for shown in choice.clips if shown.clip_id not in listed]:
        raise ConfigError(
            f"--gallery: the manifest that {next(iter(made_by))} was extracted from no longer "
            f"lists {missing[0]!r}."
        )
    clips = [listed[shown.clip_id] for shown in choice.clips]
    for clip in clips:
        source = clip.media.get("rgb")
        if not isinstance(source, FileSource):
            raise ConfigError(
                f"--gallery: {clip.clip_id!r} has no video file to draw predictions on."
            )
        if not source.path.is_file():
            raise MediaError(
                f"--gallery: {source.path}, the video of {clip.clip_id!r}, no longer exists."
            )
    return clips


def _pictures(
    recipe: EvaluateRecipe, choice: Choice, clips: list[Clip], folder: Path, stop: StopFlag
) -> list[Picture]:
    """Recognise the clips anew from their media, and write a video of each."""
    from karmma_pipeline.evaluation.gallery import Picture
    from karmma_pipeline.recognition.clips import file_end_s
    from karmma_pipeline.recognition.output import row_of
    from karmma_pipeline.recognition.overlay import write_overlay
    from karmma_pipeline.recognition.recognizer import Recognizer
    from karmma_pipeline.runs import saved_folder

    if not clips:
        return []
    recognizer = Recognizer.load(saved_folder(recipe.runs[-1], recipe.checkpoint), recipe.device)
    pictures = []
    answers = recognizer.predict(clips, stop=stop)
    for number, (shown, one) in enumerate(zip(choice.clips, answers, strict=True)):
        path = one.clip.media["rgb"].path
        ends = {path: file_end_s(path)} if one.clip.stop_s is None else {}
        truth = _names(one.heads, one.clip.labels)
        video = f"{number:02d}_{shown.kind}.mp4"
        write_overlay(path, [row_of(one, 3, truth, ends)], folder / video, stop)
        said = {"true": truth, "predicted": _names(one.heads, shown.best)}
        if shown.kind == "rescued":
            said[f"{choice.alone} alone"] = _names(one.heads, shown.alone)
        lines = [f"{who}: {', '.join(classes.values())}" for who, classes in said.items()]
        pictures.append(Picture(video, shown.kind, (shown.clip_id, *lines)))
    return pictures


def _names(heads: Mapping[str, Sequence[str]], classes: Mapping[str, int]) -> dict[str, str]:
    return {head: names[classes[head]] for head, names in heads.items() if head in classes}
