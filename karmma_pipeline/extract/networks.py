"""The frozen backbones of all sets on one device: batches of decoded clips in, tokens out."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.data.store import ModalitySpec, StoreSpec
from karmma_pipeline.extract import boxes
from karmma_pipeline.extract.decode import Decoded, input_spec
from karmma_pipeline.extract.raft import Raft
from karmma_pipeline.extract.recipe import ExtractRecipe
from karmma_pipeline.extract.sampling import PAIRS, ROUNDING_S
from karmma_pipeline.extract.track import RESAMPLING
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.models.device import pick_device

Tokens = npt.NDArray[np.float32]
Done = dict[tuple[str, str], dict[str, Tokens]]
"""Modality and network to clip id to tokens."""


class Networks:
    """All backbones of a recipe; two sets that choose the same network share it."""

    def __init__(self, recipe: ExtractRecipe) -> None:
        self.recipe = recipe
        self.device = pick_device(recipe.device)
        bfloat16 = recipe.precision == "bfloat16" or (
            recipe.precision == "auto" and self.device.type == "cuda"
        )
        self.precision = "bfloat16" if bfloat16 else "float32"
        has_flow = any("flow" in choices for choices in recipe.sets.values())
        computed = has_flow and recipe.flow.source != "dis"
        self.raft = Raft(recipe.flow, self.device) if computed else None
        self._backbones: dict[str, Backbone] = {}
        for choices in recipe.sets.values():
            for choice in choices.values():
                if _key(choice) not in self._backbones:
                    self._backbones[_key(choice)] = Backbone(choice).to(self.device)

    def store_spec(self, name: str, manifest: Manifest) -> StoreSpec:
        """Return what the store of a set looks like, provenance included."""
        specs = {}
        for modality, choice in self.recipe.sets[name].items():
            tokens, width = choice.output_shape
            specs[modality] = ModalitySpec(
                tokens=tokens,
                width=width,
                dtype=self.recipe.store.dtype,
                frames=input_spec(modality, choice).times,
                provenance=self._provenance(modality, choice),
            )
        return StoreSpec(
            modalities=specs,
            heads=dict(manifest.heads),
            clips_per_shard=self.recipe.store.clips_per_shard,
        )

    def _provenance(self, modality: str, choice: BackboneChoice) -> dict[str, Any]:
        recipe = self.recipe
        facts = self._backbones[_key(choice)].provenance()
        facts["sampling"] = recipe.sampling.model_dump(mode="json")
        facts["precision"] = self.precision
        facts["decoder"] = f"decord {version('decord')}, else PyAV {version('av')}"
        facts["rounding_s"] = ROUNDING_S
        if modality == "flow":
            facts["flow"] = recipe.flow.model_dump(mode="json")
            facts["flow"]["pairs"] = PAIRS
            facts["flow"]["opencv"] = version("opencv-python-headless")
            facts["flow"]["raft_sha256"] = self.raft.digest if self.raft else None
        if choice.architecture.kind == "boxes":
            facts["boxes"] = boxes.FACTS
        if modality == "audio":
            facts["audio"] = recipe.audio.model_dump(mode="json")
            facts["audio"]["librosa"] = version("librosa")
            facts["audio"]["resampling"] = RESAMPLING
        return facts

    def tokens(
        self, modality: str, choice: BackboneChoice, batch: Sequence[Decoded], done: Done
    ) -> dict[str, Tokens]:
        """Run one network over the clips of a batch that have its input: id to [N, D].

        ``done`` is what the batch's networks gave so far: sets that choose the same one share it.
        """
        key = (modality, _key(choice))
        if key not in done:
            done[key] = self._run(modality, choice, batch)
        return done[key]

    def _run(
        self, modality: str, choice: BackboneChoice, batch: Sequence[Decoded]
    ) -> dict[str, Tokens]:
        spec = input_spec(modality, choice)
        if self.raft:
            self.raft.complete(batch)
        present = [clip for clip in batch if spec in clip.arrays]
        if not present:
            return {}
        arrays = np.stack([clip.arrays[spec] for clip in present])
        backbone = self._backbones[_key(choice)]
        with torch.inference_mode(), self._autocast():
            clips = torch.from_numpy(arrays).to(self.device)
            tokens = backbone(backbone.prepare(clips)).float().cpu().numpy()
        return {clip.clip_id: t for clip, t in zip(present, tokens, strict=True)}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _key(choice: BackboneChoice) -> str:
    return hashlib.sha256(choice.model_dump_json().encode()).hexdigest()
