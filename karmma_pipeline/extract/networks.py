"""The frozen backbones of all sets on one device: batches of decoded clips in, tokens out."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline import config, files
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.data.store import Catalog, ModalitySpec, StoreSpec
from karmma_pipeline.extract.calibrate import calibrate, device_name, wishes
from karmma_pipeline.extract.decode import InputSpec, input_spec
from karmma_pipeline.extract.forward import Mode, Network
from karmma_pipeline.extract.media import ROUNDING_S
from karmma_pipeline.extract.recipe import ExtractRecipe
from karmma_pipeline.extract.sampling import PAIRS
from karmma_pipeline.extract.staging import Staged
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.models.device import pick_device

MODES = "forward.json"
"""File in the stores' folder: how each network computes, as the first of several jobs found."""


class Job(NamedTuple):
    """A network on an input: what several sets may share."""

    network: str
    spec: InputSpec


@dataclass
class Computed:
    """A batch whose tokens are there, or on a GPU soon will be.

    tokens: of each job and place in the batch, float32 [N, D].
    """

    staged: Staged
    tokens: dict[Job, dict[int, Tensor]] = field(default_factory=dict)
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> float:
        """Wait until the tokens are there; return the seconds that a GPU worked on them."""
        if self.events is None:
            return 0.0
        start, stop = self.events
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def of(self, job: Job, place: int) -> npt.NDArray[np.float32] | None:
        """Return the tokens [N, D] of a clip; None if it lacks the input."""
        if job.spec in self.staged.clips[place].reasons:
            return None
        return self.tokens[job][place].numpy()


class Networks:
    """All backbones of a recipe; two sets that choose the same network share it."""

    def __init__(self, recipe: ExtractRecipe) -> None:
        self.recipe = recipe
        self.device = pick_device(recipe.device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._networks: dict[str, Network] = {}
        self._specs: dict[str, InputSpec] = {}
        for choices in recipe.sets.values():
            for modality, choice in choices.items():
                key = _key(choice)
                if key not in self._networks:
                    self._networks[key] = Network(Backbone(choice), self.device, Mode())
                    self._specs[key] = input_spec(modality, choice)

    @property
    def batch_size(self) -> int:
        """Clips of a batch: what the networks compute at once goes into it without rest."""
        return lcm(*(network.mode.batch_size for network in self._networks.values()))

    @property
    def halved(self) -> int:
        """How often a batch did not fit into memory."""
        return sum(network.halved for network in self._networks.values())

    def jobs(self, name: str) -> dict[str, Job]:
        """Return what each modality of a set takes."""
        choices = self.recipe.sets[name].items()
        return {m: Job(_key(choice), input_spec(m, choice)) for m, choice in choices}

    def decide(self, stores: Mapping[str, Path], note: Callable[[str], None]) -> None:
        """Settle how each network computes: as recorded, else as a calibration finds.

        What a store records counts first, then what another job of this extraction found on a
        device of the same name. Keys that the recipe fixes are taken from the recipe.

        Args:
            stores: by the name of the set; there or not.
            note: told in a line what matched in a weights file, and what a calibration found.
        """
        path = self.recipe.out / MODES
        recorded = self._recorded(stores)
        if not recorded:
            recorded = self._claimed(path)
        fixed: dict[str, Any] = {k: v for k, v in wishes(self.recipe).items() if v != "auto"}
        fixed["compile"] = self.recipe.compile
        modes = {}
        for key, network in self._networks.items():
            if network.backbone.choice.source == "file":
                note(f"{network.backbone.choice.weights}: {network.backbone.loaded.report()}")
            modes[key] = (
                recorded[key].model_copy(update=fixed)
                if key in recorded
                else calibrate(network, self._specs[key], self.recipe, note)
            )
        plain = {key: mode.model_dump(mode="json") for key, mode in modes.items()}
        agreed = plain | files.claim_json(path, plain) if not recorded else plain
        for key, network in self._networks.items():
            network.halved = 0
            network.use(config.build(Mode, agreed[key], str(path)))

    def _recorded(self, stores: Mapping[str, Path]) -> dict[str, Mode]:
        found = {}
        for name, root in stores.items():
            if (root / "spec.json").is_file():
                there = Catalog(root).spec.modalities
                for modality, choice in self.recipe.sets[name].items():
                    facts = there[modality].provenance if modality in there else {}
                    if "forward" in facts:
                        found[_key(choice)] = config.build(Mode, facts["forward"], str(root))
        return found

    def _claimed(self, path: Path) -> dict[str, Mode]:
        """Return what another job found; what was found on another device is thrown away."""
        if not path.is_file():
            return {}
        content = json.loads(path.read_text())
        modes = {key: config.build(Mode, tree, str(path)) for key, tree in content.items()}
        here = device_name(self.device)
        if any(m.chosen != Mode().chosen and not m.chosen.endswith(here) for m in modes.values()):
            path.unlink(missing_ok=True)
            return {}
        return modes

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
        network = self._networks[_key(choice)]
        facts = network.backbone.provenance()
        facts["sampling"] = recipe.sampling.model_dump(mode="json")
        facts["forward"] = network.mode.model_dump(mode="json")
        facts["decoder"] = f"decord {version('decord')}"
        facts["rounding_s"] = ROUNDING_S
        if modality == "flow":
            facts["flow"] = recipe.flow.model_dump(mode="json")
            facts["flow"]["pairs"] = PAIRS
            facts["flow"]["opencv"] = version("opencv-python-headless")
        if modality == "audio":
            facts["audio"] = recipe.audio.model_dump(mode="json")
            facts["audio"]["librosa"] = version("librosa")
        return facts

    def compute(self, staged: Staged) -> Computed:
        """Run the networks of the sets that lack the batch, each once on each input.

        On a GPU this returns before the tokens are there (see `Computed.wait`), so that the
        next batch is copied while this one is computed.
        """
        jobs = dict.fromkeys(
            job for name in staged.work.writers for job in self.jobs(name).values()
        )
        if self._copies is None:
            return Computed(staged, self._tokens(jobs, staged, staged.inputs))
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            inputs = {
                spec: clips.to(self.device, non_blocking=True)
                for spec, clips in staged.inputs.items()
            }
        stream.wait_stream(self._copies)
        for clips in inputs.values():
            clips.record_stream(stream)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        tokens = self._tokens(jobs, staged, inputs)
        stop.record(stream)
        return Computed(staged, tokens, (start, stop))

    def _tokens(
        self, jobs: Iterable[Job], staged: Staged, inputs: Mapping[InputSpec, Tensor]
    ) -> dict[Job, dict[int, Tensor]]:
        return {job: self._run(job, staged, inputs) for job in jobs if job.spec in inputs}

    def _run(
        self, job: Job, staged: Staged, inputs: Mapping[InputSpec, Tensor]
    ) -> dict[int, Tensor]:
        network, clips = self._networks[job.network], inputs[job.spec]
        size = network.mode.batch_size
        found: dict[int, Tensor] = {}
        for first in range(0, len(clips), size):
            rows = staged.rows(job.spec, first, size)
            if rows:
                whole = len(rows) == len(clips[first : first + size])
                some = clips[first : first + size] if whole else clips[rows]
                found.update(zip(rows, _to_host(network.tokens(some)), strict=True))
        return found


def _to_host(tokens: Tensor) -> Tensor:
    if tokens.device.type == "cpu":
        return tokens
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    return host.copy_(tokens, non_blocking=True)


def _key(choice: BackboneChoice) -> str:
    return hashlib.sha256(choice.model_dump_json().encode()).hexdigest()
