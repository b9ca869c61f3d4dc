"""The evaluate stage: saved models in, ``results.json`` and everything made from it out."""

import html
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from karmma_pipeline import config, files, locks, runs
from karmma_pipeline.evaluation.comparison import (
    Answers,
    compare,
    group_by_name,
    summarise,
    warn_of_runs,
)
from karmma_pipeline.evaluation.complete_view import best_answers
from karmma_pipeline.evaluation.drop_curve import Correct
from karmma_pipeline.evaluation.features import features_for
from karmma_pipeline.evaluation.preconditions import check_runs
from karmma_pipeline.evaluation.predict import NOTHING_KEPT, SubsetLogits, align, predict
from karmma_pipeline.evaluation.predictions import html_table
from karmma_pipeline.evaluation.probe import probe_all
from karmma_pipeline.evaluation.recipe import EvaluateRecipe, with_stores
from karmma_pipeline.evaluation.report import tables
from karmma_pipeline.evaluation.report.differences import sentences
from karmma_pipeline.evaluation.report.page import FOLDERS, write_report
from karmma_pipeline.evaluation.results import Difference, Results
from karmma_pipeline.evaluation.robustness import robustness
from karmma_pipeline.evaluation.score import clip_facts, find_groups, run_result, split_warnings
from karmma_pipeline.evaluation.submission import write_submission
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.models.saved import read_card
from karmma_pipeline.runs import saved_folder
from karmma_pipeline.store.format import layout

_SAID = 6  # comparisons that the command prints
_ANSWERS = "predictions.csv"
_OURS = {runs.RECIPE, "results.json", "index.html", _ANSWERS, *FOLDERS}


@dataclass(frozen=True, repr=False)
class EvaluateReport:
    """Where the report lies."""

    folder: Path
    results: Results

    def logits(self, number: int) -> Path:
        """Return where the raw logits of a run lie, given its place among the runs."""
        name = _file_name(number, self.results.runs[number].name)
        return self.folder / "logits" / f"{name}.safetensors"

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return the closing lines of the command."""
        table = tables.to_markdown(tables.drop_table(self.results, "all"))
        note = "backbones without pretraining (random weights)\n" if self.results.weights else ""
        note += "".join(f"{line}\n" for line in (*self.results.data.notes, *self.results.warnings))
        note += "".join(f"{line}\n" for line in islice(sentences(self.results), _SAID))
        return f"{self.results.main} top-1 (%)\n{table}{note}report: {self.folder / 'index.html'}"

    def _repr_html_(self) -> str:
        """Show the drop curve in a notebook, and where the whole report lies."""
        table = html_table(*tables.drop_table(self.results, "all"))
        place = html.escape(str(self.folder / "index.html"))
        return f"<p>{html.escape(self.results.main)} top-1 (%)</p>{table}<p>{place}</p>"


def evaluate(recipe: EvaluateRecipe, stop: StopFlag | None = None) -> EvaluateReport:
    """Evaluate runs on every subset and under drop-out, and write the report.

    Raises:
        StoppedError: a stop was asked for; run again, nothing is lost but time.
        KarmmaError: see the message.
    """
    stop, recipe = stop or StopFlag(resumes=False), with_stores(recipe)
    device = pick_device(recipe.device)
    layout.check_outside(recipe.out)
    runs.check_output(recipe.out, _OURS, "but no report")
    with locks.locked(recipe.out / ".lock", "is writing a report to this folder", runs.ELSE):
        folders = [saved_folder(run, recipe.checkpoint) for run in recipe.runs]
        cards = [(run, read_card(f)) for run, f in zip(recipe.runs, folders, strict=True)]
        named = [(run, recipe.names.get(str(run), card.name), card) for run, card in cards]
        by_name = group_by_name(named)
        stores = {run: features_for(card, run, recipe.stores) for run, card in cards}
        check_runs(recipe, stores)
        # All that can be refused has been: from here on there is work to lose.
        predictions = align(
            [predict(run, store, recipe, device, stop) for run, store in stores.items()]
        )
        results = _score(predictions, by_name, recipe, device, stop)
        warnings = (*split_warnings(predictions, recipe.split), *warn_of_runs(named))
        results = results.model_copy(update={"warnings": warnings})
        if recipe.probe:
            probes, left_out = probe_all(predictions, recipe, lambda: stop.check(NOTHING_KEPT))
            found = {"probes": tuple(probes), "probe_notes": tuple(left_out)}
            results = results.model_copy(update=found)
        _write_predictions(predictions, recipe)
        # The recipe comes before the report: `karmma status` takes a page for a finished
        # evaluation, if it is that of the recipe beside it.
        config.save(recipe, recipe.out / runs.RECIPE)
        write_report(recipe.out, results)
    return EvaluateReport(recipe.out, results)


def _score(
    predictions: list[SubsetLogits],
    by_name: dict[str, list[int]],
    recipe: EvaluateRecipe,
    device: torch.device,
    stop: StopFlag,
) -> Results:
    """Return what is said of each run, of each method, and of what is between methods."""
    run_results, answers = [], []
    for folder, run in zip(recipe.runs, predictions, strict=True):
        correct = Correct(run, lambda: stop.check(NOTHING_KEPT))
        result = run_result(correct, recipe, device, stop)
        tests = robustness(correct, folder, recipe, device, lambda: stop.check(NOTHING_KEPT))
        run_results.append(result.model_copy(update={"robustness": tuple(tests)}))
        if len(predictions) > 1:
            answers.append(Answers.of(correct, recipe.drop_rates))
    first = predictions[0]
    methods = [summarise(name, of, run_results, answers) for name, of in by_name.items()]
    differences: list[Difference] = []
    if len(methods) > 1:
        groups = first.store.group[first.clips]
        differences += compare(
            methods, answers, first.subsets, groups, recipe, lambda: stop.check(NOTHING_KEPT)
        )
    stop.check(NOTHING_KEPT)
    return Results(
        software={k: v for k, v in runs.environment()["packages"].items() if v},
        commit=runs.commit(),
        modalities=first.store.modalities,
        rates=tuple(recipe.drop_rates),
        draws=len(first.drawn) or recipe.draws,
        seed=recipe.seed,
        data=clip_facts(first, recipe),
        runs=tuple(run_results),
        methods=tuple(methods),
        differences=tuple(differences),
    )


def _write_predictions(predictions: list[SubsetLogits], recipe: EvaluateRecipe) -> None:
    """Write what every number of the report can be computed from again, and what people read."""
    files.write_text(recipe.out / _ANSWERS, best_answers(predictions))
    for number, run in enumerate(predictions):
        file_name = _file_name(number, run.name)
        run.save(recipe.out / "logits" / f"{file_name}.safetensors")
        files.write_text(recipe.out / "predictions" / f"{file_name}.csv", run.to_csv())
        if recipe.submission is not None:
            groups = find_groups(run.store, run.clips, recipe.groups)
            folder = recipe.out / "submission"
            write_submission(folder, file_name, run, recipe.submission, groups)


def _file_name(number: int, name: str) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)[:60]
    return f"{number}_{plain}"
