"""The evaluate stage: saved models in, ``results.json`` and everything made from it out."""

import html
from dataclasses import dataclass
from pathlib import Path

from karmma_pipeline import config, files, locks, runs
from karmma_pipeline.evaluation.predict import NOTHING_KEPT, Predictions, align, predict
from karmma_pipeline.evaluation.predictions import html_table
from karmma_pipeline.evaluation.recipe import EvaluateRecipe, with_stores
from karmma_pipeline.evaluation.report import tables
from karmma_pipeline.evaluation.report.page import FOLDERS, write_report
from karmma_pipeline.evaluation.results import Results
from karmma_pipeline.evaluation.score import clip_facts, run_result
from karmma_pipeline.evaluation.submission import write_submission
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.device import pick_device

_OURS = {runs.RECIPE, "results.json", "index.html", *FOLDERS}


@dataclass(frozen=True)
class EvaluateReport:
    """Where the report lies."""

    folder: Path
    results: Results

    def summary(self) -> str:
        """Return the closing lines of the command."""
        table = tables.to_markdown(tables.drop_table(self.results, "all"))
        note = "frozen backbones of random weights\n" if self.results.weights else ""
        note += "".join(f"{line}\n" for line in self.results.data.notes)
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
    stop, recipe = stop or StopFlag(), with_stores(recipe)
    device = pick_device(recipe.device)
    runs.check_output(recipe.out, _OURS, "and is no folder of reports")
    with locks.locked(recipe.out / ".lock", "writes a report into this folder", runs.ELSE):
        predictions = align([predict(run, recipe, device, stop) for run in recipe.runs])
        run_results = [run_result(run, recipe, device, stop) for run in predictions]
        stop.check(NOTHING_KEPT)
        results = Results(
            software={k: v for k, v in runs.environment()["packages"].items() if v},
            commit=runs.commit(),
            modalities=predictions[0].store.modalities,
            rates=tuple(recipe.drop_rates),
            draws=len(predictions[0].drawn) or recipe.draws,
            seed=recipe.seed,
            data=clip_facts(predictions[0], recipe),
            runs=tuple(run_results),
        )
        _write_predictions(predictions, recipe)
        # The recipe comes before the report: `karmma status` takes a page for a finished
        # evaluation, if it is that of the recipe beside it.
        config.save(recipe, recipe.out / runs.RECIPE)
        write_report(recipe.out, results)
    return EvaluateReport(recipe.out, results)


def _write_predictions(predictions: list[Predictions], recipe: EvaluateRecipe) -> None:
    """Write what every number of the report can be computed from again, and what people read."""
    for number, run in enumerate(predictions):
        file_name = f"{number}_{_file_name(run.name)}"
        run.save(recipe.out / "logits" / f"{file_name}.safetensors")
        files.write_text(recipe.out / "predictions" / f"{file_name}.csv", run.to_csv())
        if recipe.submission is not None:
            write_submission(recipe.out / "submission", file_name, run, recipe.submission)


def _file_name(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)[:60]
