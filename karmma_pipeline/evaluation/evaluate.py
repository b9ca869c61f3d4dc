"""The evaluate stage: saved models in, ``results.json`` and everything made from it out."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from karmma_pipeline import config, files, runs
from karmma_pipeline.evaluation import results
from karmma_pipeline.evaluation.costs import peak_memory_mib, subset_costs
from karmma_pipeline.evaluation.paper import SIZES
from karmma_pipeline.evaluation.predict import Predictions, align, predict
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.report import figures, page, tables
from karmma_pipeline.evaluation.results import ACTION, Cost, Data, Results, RunResult
from karmma_pipeline.evaluation.score import Correct, drop_curves, find_groups, subset_scores
from karmma_pipeline.evaluation.submission import write_submission
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import ARCHITECTURES, BackboneChoice
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.models.saved import WEIGHTS, ModelCard

_FOLDERS = ("logits", "submission", "tables", "figures")

_MEMORY_NOTE = "Peak memory: one clip, float32, in a process of its own. "

_NO_LABELS = "No clip of this split has a label: there is no accuracy, only logits and submissions."


@dataclass(frozen=True)
class EvaluateReport:
    """Where the report lies."""

    folder: Path
    results: Results

    def summary(self) -> str:
        """Return the closing lines of the command."""
        table = tables.to_markdown(tables.drop_table(self.results, "all"))
        note = "frozen backbones of random weights\n" if self.results.weights else ""
        return f"{self.results.main} top-1 (%)\n{table}{note}report: {self.folder / 'index.html'}"


def evaluate(recipe: EvaluateRecipe, stop: StopFlag | None = None) -> EvaluateReport:
    """Evaluate runs on every subset and under drop-out, and write the report.

    Raises:
        StoppedError: a stop was asked for; run again, nothing is lost but time.
        KarmmaError: see the message.
    """
    stop = stop or StopFlag()
    device = pick_device(recipe.device)
    predictions = align([predict(run, recipe, device, stop) for run in recipe.runs])
    found = Results(
        software={k: v for k, v in runs.environment()["packages"].items() if v},
        commit=runs.commit(),
        modalities=predictions[0].store.modalities,
        rates=tuple(recipe.drop_rates),
        draws=recipe.draws,
        seed=recipe.seed,
        data=_data(predictions[0], recipe),
        runs=tuple(
            _run_result(run, folder, recipe, device, stop)
            for run, folder in zip(predictions, recipe.runs, strict=True)
        ),
    )
    for number, run in enumerate(predictions):
        file_name = f"{number}_{_file_name(run.name)}"
        run.save(recipe.out / "logits" / f"{file_name}.safetensors")
        if recipe.submission is not None:
            write_submission(recipe.out / "submission", file_name, run, recipe.submission)
    config.save(recipe, recipe.out / "recipe.yaml")
    write_report(recipe.out, found)
    return EvaluateReport(recipe.out, found)


def write_report(folder: Path, found: Results) -> None:
    """Write results.json, tables, figures and the page; they depend on nothing else."""
    results.write(found, folder / "results.json")
    contents = {
        "subsets": tables.subset_table(found, "all"),
        "subsets_complete": tables.subset_table(found, "complete"),
        "drop_curve": tables.drop_table(found, "all"),
        "costs": tables.cost_table(found),
    }
    for name, table in contents.items():
        if table[1]:
            files.write_text(folder / "tables" / f"{name}.md", tables.to_markdown(table))
            files.write_text(folder / "tables" / f"{name}.csv", tables.to_csv(table))
    pictures = figures.draw(found)
    for name, figure in pictures.items():
        for kind in ("png", "svg"):
            files.write_bytes(folder / "figures" / f"{name}.{kind}", figures.to_bytes(figure, kind))
    files.write_text(folder / "index.html", page.render(found, pictures))
    files.sweep([folder, *(folder / name for name in _FOLDERS)])


def _data(run: Predictions, recipe: EvaluateRecipe) -> Data:
    reasons = np.asarray(run.store.reasons)[run.clips]
    heads = {head: tuple(names) for head, names in run.card.heads.items()}
    counts = {
        head: np.bincount(run.labels[head][run.labels[head] >= 0], minlength=len(names))
        for head, names in heads.items()
    }
    constant = {head: 100 * float(c.max() / max(1, c.sum())) for head, c in counts.items()}
    if len(heads) > 1:
        rows = np.stack([run.labels[h] for h in heads], axis=1)
        rows = rows[(rows >= 0).all(axis=1)]
        pairs = Counter(map(tuple, rows.tolist()))
        constant[ACTION] = 100 * max(pairs.values(), default=0) / max(1, len(rows))
    return Data(
        name=recipe.title or run.store.path.resolve().parent.name,
        split=recipe.split,
        clips=len(run.clips),
        official_clips=recipe.official_clips,
        complete=int(run.present.all(axis=1).sum()),
        empty=int((~run.present.any(axis=1)).sum()),
        present={m: int(run.present[:, i].sum()) for i, m in enumerate(run.store.modalities)},
        reasons={
            m: {
                Reason(code).name.lower(): n
                for code, n in sorted(Counter(reasons[:, i].tolist()).items())
                if code != Reason.PRESENT
            }
            for i, m in enumerate(run.store.modalities)
        },
        heads=heads,
        class_clips={head: tuple(c.tolist()) for head, c in counts.items()},
        constant=constant,
        notes=() if any(c.any() for c in counts.values()) else (_NO_LABELS,),
    )


def _run_result(
    run: Predictions, folder: Path, recipe: EvaluateRecipe, device: torch.device, stop: StopFlag
) -> RunResult:
    stop.check("nothing of this evaluation is kept")
    correct = Correct(run)
    saved = folder / recipe.checkpoint
    card = run.card
    size = card.size.model_dump()
    kind = "teacher" if card.kind == "teacher" else "student"
    return RunResult(
        name=run.name,
        kind=card.kind,
        seed=card.training.get("seed"),
        weights={m: str(p.get("weights", "?")) for m, p in card.provenance.items()},
        size=size,
        paper_size=card.size == SIZES[kind].model_copy(update={"absent": card.size.absent}),
        model_digest=files.sha256(saved / WEIGHTS),
        store_digest=run.store.digest,
        subsets=tuple(subset_scores(correct, find_groups(run, recipe.groups))),
        drop=tuple(drop_curves(correct, recipe)),
        costs=tuple(_costs(card, recipe, device)) if recipe.costs else (),
        cost_note=_MEMORY_NOTE if recipe.costs and recipe.memory else "",
        class_correct={
            head: tuple(
                np.bincount(
                    labels[labels >= 0],
                    correct.table[head, 1][0][labels >= 0],
                    len(card.heads[head]),
                )
                .astype(int)
                .tolist()
            )
            for head, labels in run.labels.items()
        },
    )


def _costs(card: ModelCard, recipe: EvaluateRecipe, device: torch.device) -> list[Cost]:
    """Return costs per subset; a store whose backbones are not ours has none."""
    choices = {}
    for modality, facts in card.provenance.items():
        if facts.get("backbone") not in ARCHITECTURES:
            return []
        choices[modality] = _choice(facts)
    heads = {head: len(names) for head, names in card.heads.items()}
    left_out = card.size.model_copy(update={"absent": "drop"})
    memory = peak_memory_mib(choices, left_out, heads, str(device)) if recipe.memory else {}
    return [
        Cost(
            modalities=cost.modalities,
            gflops=cost.gflops,
            gflops_as_run=cost.gflops_as_run,
            parameters=cost.parameters,
            memory_mib=memory.get(cost.modalities),
        )
        for cost in subset_costs(choices, card.size, heads)
    ]


def _choice(facts: dict[str, object]) -> BackboneChoice:
    """Return the backbone that a store's provenance names, with weights that cost nothing."""
    shape = facts["input"]
    assert isinstance(shape, list)  # noqa: S101  (written by the extract stage)
    values: dict[str, object] = {
        "name": facts["backbone"],
        "weights": "random:0",
        "tokens": facts["token_grid"],
    }
    if facts["backbone"] == "boxes":
        values |= {"weights": "DEFAULT", "frames": shape[1]}
    elif len(shape) == 4:
        values |= {"frames": shape[1], "size": shape[2]}
    else:
        values |= {"image": shape[1:]}
    return BackboneChoice.model_validate(values)


def _file_name(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)[:60]
