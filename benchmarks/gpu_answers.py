"""The parts of `gpu.py` about a trained model in use, as those of `gpu_parts.py`."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from gpu_parts import (
    SMALL,
    Bench,
    Row,
    make_recipe,
    peak,
    row,
    skipped,
    student_sets,
    timed,
    write_clips,
)
from torch import Tensor

import karmma_pipeline as km
from karmma_pipeline import config
from karmma_pipeline.data.manifest import Manifest, read_manifest
from karmma_pipeline.evaluation.paper import HEADS, SIZES
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.inference.batching import collate
from karmma_pipeline.extraction.inference.networks import Networks, configure
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import BatchPlan, DecodeSettings
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason, label, subsets
from karmma_pipeline.models.backbones.onnx_networks import INPUT, TOKENS
from karmma_pipeline.models.exported import FUSION, LOGITS_OF, MASK, TOKENS_OF
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.models.saved import ModelCard
from karmma_pipeline.recognition.backbones import SET
from karmma_pipeline.recognition.latency import latencies
from karmma_pipeline.recognition.recognizer import Dropout, Recognizer
from karmma_pipeline.recognition.tracing import Traced, typical, write_backbones, write_fusion
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import train_baseline

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


def agreement(bench: Bench) -> Iterator[Row]:
    """Extract, train, and compare answers to the raw clips with those to the stored tokens."""
    recipe = _recipe(bench, write_clips(bench, videos=1, clips=7), str(bench.device))
    extract(recipe)
    run = bench.folder / "run"
    tree = {
        "store": str(recipe.out / SET),
        "out": str(run),
        "size": bench.pick(SIZES["student"].model_dump(), SMALL),
        "epochs": 1,
        "device": str(bench.device),
        "val_split": "train",
    }
    train_baseline(config.build(BaselineRecipe, tree, "benchmark"))
    clips = read_manifest(recipe.manifest).clips
    store, trained = FeatureStore.open(recipe.out / SET), km.load_model(run)
    for device in dict.fromkeys((str(bench.device), "cpu")):
        recognizer = Recognizer.load(run, device)
        answers = list(recognizer.predict(clips, workers=0))
        cached = km.predict(trained, store, split="train", device=device)
        off = max(
            float(np.abs(answer.logits[head] - cached.logits[head][place]).max())
            for place, answer in enumerate(answers)
            for head in cached.logits
        )
        what = f"clips extracted on the {bench.device.type}, answered on the {device}: largest "
        goal = "1e-4" if device == str(bench.device) else ""
        yield row(what + "difference of a logit to the cached evaluation", off, "", goal)


def predict(bench: Bench) -> Iterator[Row]:
    """Time the paper's student from a decoded window to its logits, for every subset."""
    recipe = _recipe(
        bench,
        write_clips(bench, videos=1, clips=7),
        str(bench.device),
        precision=bench.precisions[-1],
        batch_size=1,
    )
    recognizer = _student(recipe)
    networks = recognizer.networks
    (clip,) = read_manifest(recipe.manifest).clips[:1]
    (decoded,) = decode_clips([clip], DecodeSettings.of(recipe))
    every = tuple(networks.jobs(SET))
    for subset in subsets(every):
        lacking = {networks.jobs(SET)[m].spec for m in every if m not in subset}
        some = replace(
            decoded,
            arrays={spec: a for spec, a in decoded.arrays.items() if spec not in lacking},
            reasons={**decoded.reasons, **dict.fromkeys(lacking, Reason.NO_STREAM)},
        )
        batch = collate(
            BatchPlan(0, [clip], (SET,), last=True), [some], bench.device.type == "cuda"
        )

        def answer(batch: Any = batch) -> None:
            list(recognizer._answers(networks.compute(batch), Dropout()))

        answer()
        times = [1e3 * timed(bench, answer) for _ in range(bench.pick(100, 3))]
        p99 = quantiles(times, n=100)[-1]
        name = f"student, {label(subset)}: from a decoded window to logits, median"
        yield row(name, median(times), "ms", "under 20", p99=p99)
    yield peak(bench)


def live(bench: Bench) -> Iterator[Row]:
    """Time the paper's student from sensors' signals to an answer, for every subset."""
    recipe = _recipe(
        bench, Path("-"), str(bench.device), precision=bench.precisions[-1], batch_size=1
    )
    most = bench.pick(40, 2)
    for one in latencies(_student(recipe), 2.0, 0.5, StopFlag(), most):
        name = f"student, {label(one.seen)}: live answer to 2 s, median"
        yield row(name, 1e3 * one.p50_s, "ms", p99=1e3 * one.p99_s, answers=one.answers)
    yield peak(bench)


def onnx(bench: Bench) -> Iterator[Row]:
    """Write the student as ONNX files; compute them on the device and compare with PyTorch."""
    if lacking := [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]:
        yield skipped(f"{' and '.join(lacking)} not installed")
        return
    import onnxruntime

    provider = _PROVIDERS[bench.device.type]
    recognizer = _student(_recipe(bench, Path("-"), "cpu"))
    traced = write_backbones(bench.folder, recognizer)
    write_fusion(bench.folder, recognizer.model, recognizer.card)
    if provider not in (there := onnxruntime.get_available_providers()):
        yield skipped(f"this onnxruntime has no {provider}, but {', '.join(there)}")
        return
    for name, given, wanted in _graphs(recognizer, traced):
        session = onnxruntime.InferenceSession(
            str(bench.folder / name), providers=[(provider, _options(bench))]
        )
        used = {one.name: given[one.name] for one in session.get_inputs()}
        run = partial(session.run, [*wanted], used)
        found = dict(zip(wanted, run(), strict=True))
        error = max(
            float(np.abs(found[key] - of.numpy()).max() / np.abs(of.numpy()).max())
            for key, of in wanted.items()
        )
        seconds = [timed(bench, run) for _ in range(bench.pick(30, 2))]
        name = f"ONNX, {provider}, {name}: {len(next(iter(used.values())))} clips, median"
        yield row(name, 1e3 * median(seconds), "ms", error=error)


def _options(bench: Bench) -> dict[str, Any]:
    """Return what a provider is told: which card, and to compute float32 as float32."""
    if bench.device.type != "cuda":
        return {}
    return {"device_id": bench.device.index or 0, "use_tf32": 0}


def _graphs(
    recognizer: Recognizer, traced: Traced
) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Tensor]]]:
    """Yield each file with inputs, and what PyTorch on the CPU makes of them."""
    jobs, model = recognizer.networks.jobs(SET), recognizer.model
    files = {one.file: modality for modality, one in traced.backbones.items()}
    for file, modality in files.items():  # modalities may share one
        backbone = recognizer.networks.all[jobs[modality].network].backbone
        with torch.inference_mode():
            x = backbone.prepare(traced.inputs[modality])
        yield file, {INPUT: x.numpy()}, {TOKENS: traced.tokens[modality]}
    tokens = typical(model)
    mask = torch.ones(len(next(iter(tokens.values()))), len(tokens), dtype=torch.bool)
    with torch.inference_mode():
        logits = model(tokens, mask)
    given = {TOKENS_OF + m: of.numpy() for m, of in tokens.items()} | {MASK: mask.numpy()}
    yield FUSION, given, {LOGITS_OF + head: of for head, of in logits.items()}


def _recipe(bench: Bench, manifest: Path, device: str, **more: Any) -> ExtractRecipe:
    return make_recipe(bench, manifest, {SET: student_sets(bench)}, device, **more)


def _student(recipe: ExtractRecipe) -> Recognizer:
    """Return a student of the paper's size with weights of chance."""
    networks = Networks(recipe)
    configure(networks, {}, lambda _: None)
    specs = networks.store_spec(SET, Manifest((), {})).modalities
    card = ModelCard(
        kind="student",
        name="student",
        size=SIZES["student"],
        modalities={m: (spec.tokens, spec.width) for m, spec in specs.items()},
        heads={h: tuple(f"{h}{n}" for n in range(count)) for h, count in HEADS.items()},
        provenance={m: spec.model_dump(mode="json")["provenance"] for m, spec in specs.items()},
        dtypes=dict.fromkeys(specs, "float16"),
        store_digest="",
    )
    model: FusionModel = card.build().eval()
    return Recognizer(model, card, networks)
