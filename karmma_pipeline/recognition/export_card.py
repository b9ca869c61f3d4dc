"""The card of an exported model, README.md: in the hub's format, from what ``export.json`` says."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from karmma_pipeline.modalities import canonical, legend
from karmma_pipeline.models.backbones import hub
from karmma_pipeline.models.exported import ExportCard
from karmma_pipeline.models.saved import ModelCard

_VERDICTS = {
    "recommended": "Recommended: all measured 95 % intervals of the difference to float32 are "
    "within +-2 points.",
    "not recommended": "**Not recommended**: a 95 % interval of the difference to float32 is "
    "not within +-2 points.",
    "not measured": "Not measured: the accuracy compared with float32 is unknown, since stores "
    "contain tokens of float32 backbones. `karmma export --int8 --clips CSV` compares both "
    "on raw clips.",
}


def readme(card: ExportCard) -> str:
    """Return the card's text: YAML for the hub, then sections for people."""
    front = yaml.safe_dump(_front(card), sort_keys=False, allow_unicode=True, width=100)
    sections = "\n\n".join(text for text in _sections(card) if text)
    return f"---\n{front}---\n\n{sections}\n"


def _front(card: ExportCard) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": "other",
        "license_name": "of-the-backbones-weights",
        "library_name": "karmma-pipeline",
        "pipeline_tag": "video-classification",
        "tags": ["action-recognition", "multimodal", "missing-modalities", "onnx",
                 *canonical(card.model.modalities)],
        "metrics": ["accuracy"],
    }  # fmt: skip
    if found := card.measured.get("accuracy"):
        best = next(iter(found["top1"]))
        metrics = [
            {"type": "accuracy", "name": f"top-1 {found['metric']}, {subset}",
             "value": round(one["value"], 2)}
            for subset, one in found["top1"].items()
        ]  # fmt: skip
        front["model-index"] = [{
            "name": card.model.name,
            "results": [{
                "task": {"type": "video-classification", "name": f"all modalities: {best}"},
                "dataset": {"type": "features", "name": card.model.store_digest[:12],
                            "split": found["split"]},
                "metrics": metrics,
            }],
        }]  # fmt: skip
    return front


def _sections(card: ExportCard) -> Iterator[str]:
    model = card.model
    yield f"# {model.name}"
    yield _what(card)
    yield "## Use\n\n" + _USE
    yield "## Backbones\n\n" + _table(
        ("modality", "network", "weights", "licence of the weights", "file"),
        list(_backbones(card)),
    )
    if any(hub.non_commercial(_licence(of)) for of in model.provenance.values()):
        yield "**A licence above forbids commercial use.**"
    yield "## Classes\n\n" + "\n".join(
        f"- {head} ({len(names)}): {', '.join(names)}" for head, names in model.heads.items()
    )
    yield "## Training\n\n" + _training(model)
    yield "## Results\n\n" + "\n\n".join(_measured(card))


def _what(card: ExportCard) -> str:
    modalities = ", ".join(canonical(card.model.modalities))
    return (
        f"A {card.model.kind} for action recognition from {modalities}, any of which may be "
        "missing. Exported by `karmma export` of karmma-pipeline (after KARMMA, arXiv "
        f"2504.08578) as ONNX, opset {card.opset}: a file per backbone, run only if its "
        "modality is present, and `fusion.onnx`, which takes the tokens of all modalities and a "
        "mask. `export.json` has classes, preprocessing, sampling and the SHA-256 of each file."
    )


_USE = """\
```sh
pip install 'karmma-pipeline[export]'
karmma predict FOLDER video.mp4 --window 2 --hop 0.5
karmma live FOLDER --camera 0
```

`FOLDER` is this folder, or `hf:USER/NAME` on the hub."""


def _backbones(card: ExportCard) -> Iterator[Sequence[str]]:
    for m in canonical(card.model.provenance):
        facts = card.model.provenance[m]
        one = card.backbones.get(m)
        name = str(facts.get("backbone", "imported features"))
        weights = str(facts.get("weights", ""))
        if stage := facts.get("trained_from"):
            weights += f", fine-tuned from {stage} on"
        yield m, name, weights, _licence(facts), one.file if one else "none"


def _licence(facts: Mapping[str, Any]) -> str:
    if str(facts.get("weights", "")).startswith("random:"):
        return "none (random weights)"
    return str(facts.get("licence", hub.NOT_STATED))


def _training(model: ModelCard) -> str:
    said = model.training
    lines = [
        f"- features: store {model.store_digest[:16]}"
        + "".join(f", joined from {one[:16]}" for one in model.stores),
        f"- splits: trained on {said.get('train_split', '?')!r}, epoch chosen on "
        f"{said.get('val_split', '?')!r}",
        f"- seed: {said.get('seed', '?')}; a single training run: the intervals below do not "
        "cover other seeds",
        f"- modality dropout: {said.get('modality_dropout', '?')}; absent tokens: "
        f"{model.size.absent}",
    ]
    if "teacher" in said:
        lines.append("- distilled from a teacher with the same missing modalities")
    return "\n".join(lines)


def _measured(card: ExportCard) -> Iterator[str]:
    found = card.measured
    accuracy, latency, costs = (found.get(key) or {} for key in ("accuracy", "latency", "costs"))
    rows = [
        (
            subset,
            _percent(accuracy.get("top1", {}).get(subset)),
            *_cost(costs.get(subset)),
            *_took(latency.get("ms", {}).get(subset)),
            f"{gap:.1e}",
        )
        for subset, gap in found.get("difference", {}).items()
    ]
    header = (
        "modalities",
        "top-1 (%)",
        "GFLOPs",
        "params (M)",
        "p50 (ms)",
        "p99 (ms)",
        "difference",
    )
    yield _table(header, rows)
    if accuracy:
        yield (
            f"Top-1 {accuracy['metric']} on {accuracy['clips']} clips of split "
            f"{accuracy['split']!r}, on which the epoch was also chosen (optimistic). In "
            f"brackets: 95 % interval over {accuracy['over']}."
        )
    else:
        yield "Accuracy was not measured, because the feature store was not available."
    if letters := legend(card.model.modalities):
        yield f"Modalities: {letters}."
    if latency:
        yield (
            f"Latency of one clip from decoded arrays to logits, {latency['rounds']} rounds, "
            f"{latency['threads']} threads, float32, {latency['machine']}. Difference: largest "
            "absolute difference of the logits from PyTorch's, on random inputs"
            + (f" (on the clips: {accuracy['difference']:.1e})." if accuracy else ".")
        )
    if card.int8:
        yield "\n\n".join(_int8(found["int8"]))


def _percent(one: Mapping[str, float] | None) -> str:
    if one is None:
        return ""
    return f"{one['value']:.1f} ({max(0, one['low']):.1f} to {min(100, one['high']):.1f})"


def _cost(one: Mapping[str, float] | None) -> tuple[str, str]:
    return (f"{one['gflops']:.2f}", f"{one['parameters'] / 1e6:.1f}") if one else ("", "")


def _took(ms: Mapping[str, float] | None) -> tuple[str, str]:
    return (f"{ms['p50']:.1f}", f"{ms['p99']:.1f}") if ms else ("", "")


def _int8(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"### int8\n\n{_VERDICTS[found['verdict']]} In int8: {', '.join(found['files'])}."
    rows = [
        (f"fusion alone, {subset}", *_gap(one)) for subset, one in found.get("fusion", {}).items()
    ]
    if one := found.get("clips"):
        rows.append((f"end to end, {one['count']} raw clips", *_gap(one)))
    if rows:
        yield _table(("int8 minus float32", "points of top-1", "95 % interval"), rows)
    yield "Latency and difference above are for float32."


def _gap(one: Mapping[str, float]) -> tuple[str, str]:
    return f"{one['value']:+.2f}", f"{one['low']:+.2f} to {one['high']:+.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
