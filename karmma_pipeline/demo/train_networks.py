"""Train the demo's networks again: ``python -m karmma_pipeline.demo.train_networks FOLDER``.

Clips are generated, with a seed and handwriting of their own, and decoded as an extraction
decodes them; each network learns by itself to name what its modality shows, on two heads that are
left out of the weights. Of the epochs the one with the highest accuracy on clips that it has not
learned from is kept.

B clips in a batch, T frames, h and w a network's input.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from karmma_pipeline import files, jobs, logs
from karmma_pipeline.data.manifest import Clip, Manifest, read_manifest
from karmma_pipeline.data.sample.dataset import write_network_clips
from karmma_pipeline.data.sample.scene import NOUNS, VERBS
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.demo import networks
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, input_spec
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.recipes import project

#: Of the clips; `karmma_pipeline.data.sample.scene` keeps their handwriting apart.
SEED = 18_000_001
CLIPS, VALIDATION = 2000, 320

_EPOCHS, _BATCH, _LR, _WEIGHT_DECAY = 20, 32, 3e-3, 0.05
_SHIFT = 4  # px that pictures are shifted by at most in training
_NAMES = {"verb": VERBS, "noun": NOUNS}
_HEADS = {head: len(names) for head, names in _NAMES.items()}
# Sound does not tell where a digit moves.
_TOLD = {"rgb": ("verb", "noun"), "flow": ("verb", "noun"), "audio": ("noun",)}

_logger = logging.getLogger(__name__)


class _Classifier(nn.Module):
    """A network with a linear layer for each head on the mean of its last map."""

    def __init__(self, choice: BackboneChoice, heads: tuple[str, ...]) -> None:
        super().__init__()
        self.architecture = choice.architecture
        self.net = self.architecture.build(weights=None)
        self.heads = nn.ModuleDict({h: nn.Linear(choice.output_shape[1], _HEADS[h]) for h in heads})
        self.prepare = Backbone(choice.model_copy(update={"weights": "random:0"})).prepare

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.architecture.features(self.net, self.prepare(inputs)).mean(dim=(2, 3, 4))
        features = F.dropout(features, 0.2, self.training)
        return {name: head(features) for name, head in self.heads.items()}


class Inputs:
    """What a network is fed of all clips that have the modality, in memory.

    Attributes:
        arrays: uint8 [clips, T, 3, h, w], or float32 [clips, h, w] of sound.
        labels: of verbs and nouns, int64 [clips, 2].
        validation: bool [clips].
    """

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as content:
            self.arrays = torch.from_numpy(content["arrays"])
            self.labels = torch.from_numpy(content["labels"])
            self.validation = torch.from_numpy(content["validation"])


def choices(recipe: ExtractRecipe) -> dict[str, tuple[str, BackboneChoice]]:
    """Return the modality of each network and how the recipe uses it, by the network's name."""
    pairs = [pair for of in recipe.sets.values() for pair in of.items()]
    return {choice.name.rpartition(":")[2]: (modality, choice) for modality, choice in pairs}


def decode(folder: Path, recipe: ExtractRecipe) -> None:
    """Decode all clips as the recipe's extraction does, once, and keep each network's inputs."""
    specs = {name: input_spec(m, c, recipe.flow) for name, (m, c) in choices(recipe).items()}
    if all((folder / f"{name}.npz").is_file() for name in specs):
        return
    assert recipe.manifest is not None  # noqa: S101  (the demo's recipe has one)
    manifest = read_manifest(recipe.manifest)
    videos = [list(clips) for _, clips in groupby(manifest.clips, _video)]
    tasks = [(clips, DecodeSettings.of(recipe)) for clips in videos]
    with get_context("spawn").Pool(jobs.cpu_count()) as pool:
        bar = logs.progress_bar(pool.imap(_decode, tasks), "videos", total=len(tasks))
        decoded = [clip for clips in bar for clip in clips]
    for name, spec in specs.items():
        pairs = zip(manifest.clips, decoded, strict=True)
        there = [(clip, answer.arrays[spec]) for clip, answer in pairs if spec in answer.arrays]
        _save(folder / f"{name}.npz", there, manifest)


def _save(path: Path, there: list[tuple[Clip, Any]], manifest: Manifest) -> None:
    names = {head: manifest.heads[head] for head in _HEADS}
    labels = [
        [known.index(names[head][clip.labels[head]]) for head, known in _NAMES.items()]
        for clip, _ in there
    ]
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            arrays=np.stack([array for _, array in there]),
            labels=np.array(labels),
            validation=np.array([clip.split == "networks_val" for clip, _ in there]),
        )


def _video(clip: Clip) -> Path:
    source = clip.media["rgb"]
    assert isinstance(source, FileSource)  # noqa: S101  (the sample has files alone)
    return source.path


def _decode(task: tuple[list[Clip], DecodeSettings]) -> list[DecodedClip]:
    return decode_clips(*task)


def train(name: str, modality: str, choice: BackboneChoice, inputs: Inputs) -> dict[str, Tensor]:
    """Train a network and return the weights of its best epoch."""
    torch.manual_seed(networks.SEEDS[name])
    model = _Classifier(choice, _TOLD[modality])
    rows, held_out = (torch.nonzero(of)[:, 0] for of in (~inputs.validation, inputs.validation))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    steps = _EPOCHS * (len(rows) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LR, steps, pct_start=0.2)
    best, kept, started = -1.0, model.net.state_dict(), time.process_time()
    for epoch in range(_EPOCHS):
        model.train()
        for chosen in _batches(rows):
            loss = _loss(model(_varied(inputs.arrays[chosen])), inputs.labels[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        top1 = evaluate(model, inputs, held_out)
        said = ", ".join(f"{head} {value:.1f} %" for head, value in top1.items())
        _logger.info("%s, epoch %d: %s, %.0f s", name, epoch, said, time.process_time() - started)
        if (mean := sum(top1.values()) / len(top1)) > best:
            best, kept = mean, {k: v.clone() for k, v in model.net.state_dict().items()}
    return kept


def _loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    of = [F.cross_entropy(logits[h], labels[:, column]) for h, column in _columns(logits)]
    return torch.stack(of).mean()


def _columns(logits: dict[str, Tensor]) -> Iterator[tuple[str, int]]:
    return ((head, list(_HEADS).index(head)) for head in logits)


def _batches(rows: Tensor) -> Iterator[Tensor]:
    order = rows[torch.randperm(len(rows))]
    return iter(torch.split(order[: len(order) // _BATCH * _BATCH], _BATCH))


def _varied(arrays: Tensor) -> Tensor:
    """Shift pictures [B, T, 3, h, w] in space, and sound [B, h, w] in time, each by its own."""
    shifts = torch.randint(-_SHIFT, _SHIFT + 1, (len(arrays), 2)).tolist()
    if arrays.dim() == 3:
        return torch.stack([a.roll(4 * x, 1) for a, (_, x) in zip(arrays, shifts, strict=True)])
    return torch.stack([_shifted(a, y, x) for a, (y, x) in zip(arrays, shifts, strict=True)])


def _shifted(pictures: Tensor, down: int, right: int) -> Tensor:
    """Shift pictures [T, 3, h, w], whose border is repeated."""
    h, w = pictures.shape[-2:]
    rows = (torch.arange(h) - down).clamp(0, h - 1)
    columns = (torch.arange(w) - right).clamp(0, w - 1)
    return pictures[..., rows, :][..., columns]


@torch.inference_mode()
def evaluate(model: nn.Module, inputs: Inputs, rows: Tensor) -> dict[str, float]:
    """Return the accuracy of each head in percent."""
    model.eval()
    answers = [model(inputs.arrays[chosen]) for chosen in torch.split(rows, 64)]
    right = {
        head: torch.cat([a[head].argmax(1) for a in answers]) == inputs.labels[rows, column]
        for head, column in _columns(answers[0])
    }
    return {head: 100 * hits.float().mean().item() for head, hits in right.items()}


def main() -> None:
    """Write the clips, train the networks, and write their weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for clips and inputs, 2 GB")
    parser.add_argument("--out", type=Path, default=networks.WEIGHTS, help="file of the weights")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)  # sums depend on it
    manifest = write_network_clips(options.folder, CLIPS, VALIDATION, SEED)
    recipe = project("demo", manifest, options.folder)["extract"]
    assert isinstance(recipe, ExtractRecipe)  # noqa: S101
    decode(options.folder, recipe)
    weights: dict[str, Tensor] = {}
    for name, (modality, choice) in choices(recipe).items():
        state = train(name, modality, choice, Inputs(options.folder / f"{name}.npz"))
        weights |= {f"{name}.{key}": _short(tensor) for key, tensor in state.items()}
    with files.replacing(options.out) as temporary:
        save_file(weights, temporary)


def _short(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dim() > 1 else tensor


if __name__ == "__main__":
    main()
