"""`karmma export`: a trained model as a folder that one hands on.

Everything is written into a folder beside the wanted one and checked there; only then it gets its
name. A failed export leaves nothing, and an earlier one as it was.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError, ConfigError, KarmmaError
from karmma_pipeline.evaluation.costs import model_costs
from karmma_pipeline.evaluation.statistics import Estimate
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import evaluated_subsets, label
from karmma_pipeline.models.backbones import hub
from karmma_pipeline.models.cut import CutModel, model_of_tokens, suffixes_of
from karmma_pipeline.models.device import device_name
from karmma_pipeline.models.exported import (
    BACKBONES,
    FUSION,
    README,
    ExportCard,
    ExportedModel,
    open_model,
)
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import ModelCard, TrainedModel
from karmma_pipeline.recognition import export_checks as checks
from karmma_pipeline.recognition.clips import Spans, wanted_clips
from karmma_pipeline.recognition.export_card import readme
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.recognition.tracing import (
    OPSET,
    Traced,
    quantise,
    write_backbones,
    write_fusion,
)
from karmma_pipeline.runs import EXPORT
from karmma_pipeline.store import FeatureStore, TokenSource, find_joined

_logger = logging.getLogger(__name__)

#: Farthest that a logit may be from PyTorch's.
TOLERANCE = 1e-4

_OURS = {EXPORT, README, FUSION, BACKBONES}


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        folder: where it lies.
        card: what its ``export.json`` says.
        difference: largest difference of a logit to PyTorch, before any int8.
        verdict: on int8: ``recommended``, ``not recommended`` or ``not measured``; else empty.
    """

    folder: Path
    card: ExportCard
    difference: float
    verdict: str


def export_model(
    run: str | Path,
    out: Path,
    *,
    stores: Sequence[Path] = (),
    int8: bool = False,
    clips: Path | None = None,
    weights: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write a trained model as ONNX files, and hold it against PyTorch.

    Args:
        run: folder of a run, or of one of its checkpoints.
        out: folder that is made; one of an earlier export is replaced.
        stores: that the model was trained on, for its accuracy; none: those that its recipe names,
            if they are there.
        int8: put products with constant weights into int8.
        clips: CSV of labelled clips, as `karmma predict` takes it, on which int8 is compared.
        weights: modality to a file of backbone weights that has moved since.

    Raises:
        ConfigError: ``out`` holds something else, an option makes no sense, a package is missing,
            or ONNX cannot express a network.
        CheckpointError: there is no such model, or a logit strays from PyTorch's by more than
            `TOLERANCE`.
        StoreError: a store is not the one of the training.
    """
    if clips is not None and not int8:
        raise ConfigError(f"--clips {clips}: is only used with --int8.")
    hub.library("onnx")
    hub.library("onnxruntime")
    _check_output(out)
    model = open_model(run)
    _check_model(model)
    recognizer = Recognizer.of(model, "cpu", weights, "torch")
    store = _store_of(model.card, stores)
    with _whole(out) as folder:
        card, difference = _write(folder, recognizer, store)
        verdict = ""
        if int8:
            card, verdict = _write_int8(folder, recognizer, card, store, clips)
        files.write_text(folder / README, readme(card))
    return ExportReport(out, card, difference, verdict)


def _check_output(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier export."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; choose a folder.")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and (EXPORT not in names or names - _OURS):
        other = min(names - _OURS, default=min(names))
        raise ConfigError(
            f"--out {out}: contains files that are not part of an export, such as {other}; "
            "choose another folder."
        )


def _check_model(model: TrainedModel) -> None:
    if isinstance(model, ExportedModel):
        raise ConfigError(f"{model.path}: is an exported model already; give a run.")
    flow = model.card.provenance.get("flow", {}).get("flow", {})
    if flow.get("source", "dis") != "dis":
        raise ConfigError(
            f"{model.path}: its flow is computed by {flow['source']}, a network that cannot be "
            "exported; train on flow with source: dis."
        )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` if all goes well, and else is taken away."""
    folder = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    with files.disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
        with files.disk_errors(out):
            former = folder.with_suffix(".old")
            if out.exists():
                out.rename(former)
            folder.rename(out)
            files.sync_folder(out.absolute().parent)
            shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    folder: Path, recognizer: Recognizer, store: TokenSource | None
) -> tuple[ExportCard, float]:
    """Write a float32 model and what was measured of it.

    Raises:
        CheckpointError: it strays from PyTorch.
    """
    traced, fusion = write_backbones(folder, recognizer), model_of_tokens(recognizer.model)
    model = _of_whole_networks(recognizer.card, traced)
    write_fusion(folder, fusion, model)
    card = _with_digests(
        folder, ExportCard(model=model, opset=OPSET, backbones=traced.backbones, files={})
    )
    exported = Recognizer.of(open_model(folder))
    found = checks.differences(fusion, traced, exported)
    measured: dict[str, Any] = {"difference": _by_label(found)}
    farthest = max(found.values())
    if store is not None:
        measured["accuracy"], on_tokens = _accuracy(recognizer, exported, store)
        farthest = max(farthest, on_tokens)
    if not farthest <= TOLERANCE:
        worst = label(max(found.items(), key=itemgetter(1))[0])
        raise CheckpointError(
            f"{recognizer.card.name}: the exported model's logits differ from PyTorch's by "
            f"{farthest:.1e} (largest with {worst}), more than {TOLERANCE:g}; nothing was "
            "written."
        )
    measured["latency"] = _latency(traced, exported)
    measured["costs"] = _costs(recognizer.card)
    card = card.model_copy(update={"measured": measured})
    files.write_json(folder / EXPORT, card.model_dump(mode="json"))
    return card, farthest


def _of_whole_networks(card: ModelCard, traced: Traced) -> ModelCard:
    """Return the card of a model whose backbones are no longer cut."""
    provenance, dtypes = dict(card.provenance), dict(card.dtypes)
    for m, digest in traced.trained.items():
        facts = {key: of for key, of in provenance[m].items() if key != "cut"}
        here = {"weights_sha256": digest, "trained_from": card.provenance[m]["cut"]["before"]}
        provenance[m] = facts | here
        dtypes.pop(m, None)  # which was that of the activations
    changes = {"modalities": card.token_shapes, "provenance": provenance, "dtypes": dtypes}
    return card.model_copy(update=changes) if traced.trained else card


def _on_rows(exported: Recognizer, recognizer: Recognizer) -> TokenModel:
    """Return an exported fusion as it answers on a store: behind the suffixes, if there are some.

    Args:
        exported: whose fusion it is.
        recognizer: the run.
    """
    suffixes = suffixes_of(recognizer.model)
    if not suffixes:
        return exported.model
    return CutModel(exported.model, suffixes, recognizer.card.modalities)


def _write_int8(
    folder: Path,
    recognizer: Recognizer,
    card: ExportCard,
    store: TokenSource | None,
    clips: Path | None,
) -> tuple[ExportCard, str]:
    """Put a float32 model into int8 and compare the two."""
    before, subsets = Recognizer.of(open_model(folder)), evaluated_subsets(card.model.modalities)
    split = card.model.training.get("val_split", "")
    fused = _on_rows(before, recognizer)
    on_tokens = store and checks.answers_on(fused, store, split, subsets)
    on_clips = clips and _answers_of(before, clips)
    names = tuple(name for name in sorted(card.files) if quantise(folder / name))
    card = _with_digests(folder, card.model_copy(update={"int8": names}))
    after = Recognizer.of(open_model(folder))
    report: dict[str, Any] = {"files": list(names)}
    gaps = []
    if store is not None and on_tokens:
        answers = checks.answers_on(_on_rows(after, recognizer), store, split, subsets)
        assert answers is not None  # noqa: S101  (the same clips)
        of_fusion = answers.minus(on_tokens)
        report["fusion"] = _by_label(dict(zip(subsets, map(_plain, of_fusion), strict=True)))
        gaps += of_fusion
    if clips is not None and on_clips:
        (of_all,) = _answers_of(after, clips).minus(on_clips)
        report["clips"] = _plain(of_all) | {"count": on_clips.right.shape[1]}
        gaps.append(of_all)
    # The store holds float32 backbones' tokens: of theirs in int8 only raw clips say anything.
    whole = bool(gaps) and ("clips" in report or names == (FUSION,))
    verdict = "not measured" if not whole else "recommended"
    if gaps and not checks.within(gaps):
        verdict = "not recommended"
    measured = card.measured | {"int8": report | {"verdict": verdict}}
    card = card.model_copy(update={"measured": measured})
    files.write_json(folder / EXPORT, card.model_dump(mode="json"))
    return card, verdict


def _with_digests(folder: Path, card: ExportCard) -> ExportCard:
    """Write a card with the digests of its files as they are."""
    names = sorted({FUSION, *(one.file for one in card.backbones.values())})
    card = card.model_copy(update={"files": {n: files.sha256(folder / n) for n in names}})
    files.write_json(folder / EXPORT, card.model_dump(mode="json"))
    return card


def _store_of(card: ModelCard, stores: Sequence[Path]) -> TokenSource | None:
    """Return the features of the training; None if nobody named them and they are not there.

    Raises:
        StoreError: those that were named are others.
    """
    named = card.training.get("store") or ()
    paths = stores or [Path(path) for path in ([named] if isinstance(named, str) else named)]
    try:
        opened = [FeatureStore.open(path) for path in paths]
        found = find_joined(opened, card.store_digest, card.stores) if opened else None
    except KarmmaError:
        if stores:
            raise
        return None
    if found is None and stores:
        raise ConfigError(
            f"--store {stores[0]}: not the store that {card.name!r} was trained on; give that "
            "store, or all stores that were joined."
        )
    return found


def _accuracy(
    recognizer: Recognizer, exported: Recognizer, store: TokenSource
) -> tuple[dict[str, Any] | None, float]:
    """Return top-1 per subset on the validation split, and the largest difference to PyTorch."""
    subsets = evaluated_subsets(recognizer.modalities)
    split = recognizer.card.training.get("val_split", "")
    fused = _on_rows(exported, recognizer)
    answers = checks.answers_on(fused, store, split, subsets)
    wanted = checks.answers_on(recognizer.model, store, split, subsets)
    if answers is None or wanted is None:
        return None, 0.0
    farthest = max(float(abs(of - wanted.logits[h]).max()) for h, of in answers.logits.items())
    return {
        "split": split,
        "clips": answers.right.shape[1],
        "metric": answers.metric,
        "over": answers.units,
        "difference": farthest,
        "top1": _by_label(dict(zip(subsets, map(_plain, answers.top1()), strict=True))),
    }, farthest


def _answers_of(recognizer: Recognizer, path: Path) -> checks.Answers:
    wanted = wanted_clips([path], Spans())
    labelled = [
        clip
        for clip in wanted.clips
        if {*wanted.truth.get(clip.clip_id, {})} >= {*recognizer.card.heads}
    ]
    if not labelled:
        raise ConfigError(
            f"--clips {path}: no row has a label of {' and '.join(recognizer.card.heads)}."
        )
    return checks.answers_of(recognizer, labelled, wanted.truth)


def _latency(traced: Traced, exported: Recognizer) -> dict[str, Any]:
    took = checks.latencies(traced, exported)
    return {
        "machine": f"onnxruntime {version('onnxruntime')}, {device_name(torch.device('cpu'))}",
        "threads": torch.get_num_threads(),
        "rounds": checks.ROUNDS,
        "ms": _by_label({s: {"p50": p50, "p99": p99} for s, (p50, p99) in took.items()}),
    }


def _costs(card: ModelCard) -> dict[str, Any]:
    rows = model_costs(card, torch.device("cpu"), memory=False, stop=StopFlag())
    return _by_label({
        row.modalities: {"gflops": row.gflops, "parameters": row.parameters} for row in rows
    })  # fmt: skip


def _by_label(of: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    every = max(of, key=len, default=())
    return {label(subset, every): value for subset, value in of.items()}


def _plain(one: Estimate) -> dict[str, float]:
    return {"value": one.value, "low": one.low, "high": one.high}
