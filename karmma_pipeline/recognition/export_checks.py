"""An exported model held against PyTorch, against the clock and against labels.

B clips in a batch, N clips of a split, M modalities, S subsets of them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.clips import clips_of_split, predict_masked, subset_masks
from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.evaluation.statistics import (
    LEAST_GROUPS,
    Estimate,
    by_group,
    estimate,
    groups_of,
)
from karmma_pipeline.metrics import ACTION, metric_correct
from karmma_pipeline.modalities import evaluated_subsets
from karmma_pipeline.models.backbones.onnx_networks import OnnxNet
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.recognition.backbones import SET
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.recognition.tracing import Traced, typical
from karmma_pipeline.store import TokenSource

Subset = tuple[str, ...]
Bools = npt.NDArray[np.bool_]

#: An int8 model is recommended if it cannot be worse or better than float32 by so many points.
POINTS = 2.0

ROUNDS, _WARM = 30, 3


def differences(model: TokenModel, traced: Traced, exported: Recognizer) -> dict[Subset, float]:
    """Return how far the logits of an exported model are from PyTorch's, the largest per subset.

    Clips are noise as a decoder might give it. Their tokens are computed clip by clip, as
    recognition does, and as a batch; the fusion answers them as a batch and all subsets at once.
    """
    noise = typical(model)
    wanted = {m: traced.tokens.get(m, noise[m]) for m in model.modalities}
    here = [
        {m: of.get(m, noise[m]) for m in model.modalities}
        for of in (_clip_by_clip(traced, exported), _as_a_batch(traced, exported))
    ]
    subsets = evaluated_subsets(model.modalities)
    masks = torch.tensor([[m in subset for m in model.modalities] for subset in subsets])
    found = {}
    with torch.inference_mode():
        at_once = {m: of[:1].expand(len(subsets), -1, -1) for m, of in here[0].items()}
        mixed = exported.model(at_once, masks)
        for row, subset in enumerate(subsets):
            mask = masks[row].expand(len(next(iter(wanted.values()))), -1)
            right = model(wanted, mask)
            pairs = [(exported.model(tokens, mask), right) for tokens in here]
            pairs.append((
                {head: of[row] for head, of in mixed.items()},
                {head: of[0] for head, of in right.items()},
            ))  # fmt: skip
            found[subset] = max(_farthest(*pair) for pair in pairs)
    return found


def _clip_by_clip(traced: Traced, exported: Recognizer) -> dict[str, Tensor]:
    jobs = exported.networks.jobs(SET)
    return {m: exported.networks.all[jobs[m].network].tokens(x) for m, x in traced.inputs.items()}


def _as_a_batch(traced: Traced, exported: Recognizer) -> dict[str, Tensor]:
    """Return the tokens of all clips from one pass of each file."""
    jobs, tokens = exported.networks.jobs(SET), {}
    for m, clips in traced.inputs.items():
        backbone = exported.networks.all[jobs[m].network].backbone
        net = backbone.net
        assert isinstance(net, OnnxNet)  # noqa: S101  (it has a file)
        rows, net.rows = net.rows, net.rows * len(clips)
        with torch.inference_mode():
            tokens[m] = backbone(backbone.prepare(clips))
        net.rows = rows
    return tokens


def _farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    gaps = [(one[head] - other[head]).abs().max().item() for head in one]
    return max(float("inf") if np.isnan(gap) else gap for gap in gaps)


def latencies(traced: Traced, exported: Recognizer) -> dict[Subset, tuple[float, float]]:
    """Return the milliseconds from decoded arrays to logits of one clip, p50 and p99 per subset.

    In each round every backbone is run once and the fusion once per subset: a subset takes what its
    backbones and its fusion took in that round. All on as many threads as torch has here.
    """
    networks, jobs = exported.networks, exported.networks.jobs(SET)
    threads = torch.get_num_threads()
    networks.serve(1, threads)
    exported.model.session.serve(threads)  # type: ignore[operator, union-attr]
    subsets = evaluated_subsets(exported.modalities)
    tokens = {m: of[:1] for m, of in typical(exported.model).items()}
    took: dict[Subset, list[float]] = {subset: [] for subset in subsets}
    for number in range(_WARM + ROUNDS):
        of = {}
        for m, clips in traced.inputs.items():
            started = time.perf_counter()
            networks.all[jobs[m].network].tokens(clips[:1])
            of[m] = time.perf_counter() - started
        for subset in subsets:
            mask = torch.tensor([[m in subset for m in exported.modalities]])
            started = time.perf_counter()
            with torch.inference_mode():
                exported.model(tokens, mask)
            fused = time.perf_counter() - started
            if number >= _WARM:
                took[subset].append(1000 * (fused + sum(of.get(m, 0.0) for m in subset)))
    return {s: (float(np.median(of)), float(np.quantile(of, 0.99))) for s, of in took.items()}


@dataclass(frozen=True)
class Answers:
    """What a model answers rightly of clips whose labels are known.

    Attributes:
        metric: what counts: the composite of all heads, or the only head.
        right: bool [S, N].
        groups: of the clips, [N].
        logits: head to float32 [S, N, C].
    """

    metric: str
    right: Bools
    groups: npt.NDArray[np.str_]
    logits: dict[str, npt.NDArray[np.float32]]

    def top1(self) -> list[Estimate]:
        """Return top-1 accuracy per subset in percent; the 95 % interval is over clips."""
        return [self._estimate(row.astype(np.float64)) for row in self.right]

    def minus(self, other: "Answers") -> list[Estimate]:
        """Return the difference in top-1 to another model per subset, in points, paired by clip."""
        gaps = self.right.astype(np.float64) - other.right
        return [self._estimate(row) for row in gaps]

    def _estimate(self, row: npt.NDArray[np.float64]) -> Estimate:
        block = 100 * row[None]
        if self.units == "groups":
            block = by_group(block, groups_of(self.groups)[1])
        return estimate([block])

    @property
    def units(self) -> str:
        """What the intervals are over."""
        return "groups" if len(groups_of(self.groups)[0]) >= LEAST_GROUPS else "clips"


def answers_on(
    model: TokenModel, store: TokenSource, split: str, subsets: Sequence[Subset]
) -> Answers | None:
    """Return what a model answers on the clips of a split; None if no label is known.

    A clip of which a subset leaves nothing counts as wrong, as in an evaluation.

    Raises:
        ManifestError: the split is empty.
    """
    clips = clips_of_split(store, split)
    loader = FeatureLoader(store, clips, 64)
    rows: dict[str, list[npt.NDArray[np.float32]]] = {head: [] for head in model.heads}
    seen: list[Bools] = []
    masks = subset_masks(store, subsets)
    for _, some in predict_masked(model, loader, masks, torch.device("cpu")):
        seen.append(np.stack([mask.any(dim=1).numpy() for mask, _ in some]))
        for head, parts in rows.items():
            parts.append(np.stack([logits[head].numpy() for _, logits in some]))
    logits = {head: np.concatenate(parts, axis=1) for head, parts in rows.items()}
    labels = {head: np.asarray(store.labels[head][clips], np.int64) for head in model.heads}
    known = np.stack([of >= 0 for of in labels.values()]).all(axis=0)
    if not known.any():
        return None
    metric = ACTION if len(labels) > 1 else next(iter(labels))
    right = np.stack([
        metric_correct(metric, {h: of[s] for h, of in logits.items()}, labels, 1)
        for s in range(len(subsets))
    ])  # fmt: skip
    right &= np.concatenate(seen, axis=1)
    groups = np.asarray(store.group[clips]).astype(np.str_)
    return Answers(
        metric, right[:, known], groups[known], {h: of[:, known] for h, of in logits.items()}
    )


def answers_of(
    recognizer: Recognizer, clips: Sequence[Clip], truth: Mapping[str, Mapping[str, str]]
) -> Answers:
    """Return what a recogniser answers of raw clips with all they have: S is 1.

    Args:
        recognizer: backbones and fusion.
        clips: those that are labelled in every head of the model.
        truth: clip id to head to class.
    """
    right = []
    for one in recognizer.predict(clips):
        names = truth[one.clip.clip_id]
        best = {head: [name for name, _ in one.top(head)] for head in one.heads}
        right.append(all(best[head] == [names[head]] for head in one.heads))
    heads = list(recognizer.card.heads)
    metric = ACTION if len(heads) > 1 else heads[0]
    groups = np.array([clip.group for clip in clips])
    return Answers(metric, np.array([right]), groups, {})


def within(gaps: Sequence[Estimate]) -> bool:
    """Tell whether every interval lies within +-`POINTS`."""
    return all(gap.low >= -POINTS and gap.high <= POINTS for gap in gaps)
