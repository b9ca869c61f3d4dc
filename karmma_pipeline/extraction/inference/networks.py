"""The frozen backbones of all sets on one device: compute settings, and batches to tokens."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from karmma_pipeline import config
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.extraction.decode import boxes
from karmma_pipeline.extraction.decode.frame_selection import PAIRS
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.inference.raft import Raft
from karmma_pipeline.extraction.inference.recent import Recent
from karmma_pipeline.extraction.inference.runner import ComputeConfig, MemoryFormat, Network
from karmma_pipeline.extraction.media.audio_track import RESAMPLING
from karmma_pipeline.extraction.media.sensor_series import RESAMPLING as RESAMPLED
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import ROUNDING_S, Batch, InputSpec, input_spec, stored_as
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.models.backbones.choice import INPUT
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.store import Catalog, ModalitySpec, StoreSpec

_KEYS = ("precision", "memory_format", "batch_size")
_MAX_BATCH = {"cpu": 16, "cuda": 128}

#: What a store records of who chose, by the kind of the device.
BY_RULE = "default for {}"

# Memory of a pass that a batch may fill. On a CPU larger ones leave its caches and gain nothing; on
# a GPU it fits beside the weights into cards of 16 GB.
_BATCH_BYTES = {"cpu": 120e6, "cuda": 8e9}

# Shipped networks that openvino computes faster than torch, and how much: swin3d_t and s3d a whole
# extraction, the others a pass (docs/extraction.md). Of r2plus1d_18 the extraction gains nothing.
_FASTER = {
    "swin3d_t": "2.5 times",
    **dict.fromkeys(("swin3d_s", "swin3d_b"), "2.5 times for swin3d_t, which has the same blocks"),
    "s3d": "1.2 times",
    "r3d_18": "1.2 times",
    "resnet18": "1.5 times",
    "efficientnet_b0": "1.4 times",
    "mobilenet_v3_large": "2.2 times",
}


class Job(NamedTuple):
    """A network on an input: what several sets may share."""

    network: str
    spec: InputSpec


@dataclass
class Computed:
    """A batch whose tokens are there, or on a GPU soon will be.

    tokens: of each job and place in the batch, float32 [N, D]; pictures are uint8.
    """

    batch: Batch
    tokens: dict[Job, dict[int, Tensor]] = field(default_factory=dict)
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the tokens are there."""
        return self.events is None or self.events[1].query()  # type: ignore[no-untyped-call]

    def wait(self) -> float:
        """Wait until the tokens are there; return the seconds that a GPU worked on them."""
        if self.events is None:
            return 0.0
        start, stop = self.events
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def of(self, job: Job, place: int) -> npt.NDArray[Any] | None:
        """Return the tokens [N, D] of a clip; None if it lacks the input."""
        if job.spec in self.batch.clips[place].reasons:
            return None
        return self.tokens[job][place].numpy()


class Networks:
    """All backbones of a recipe; two sets that choose the same network share it.

    Attributes:
        all: by a name that their choice alone decides; in plain float32 until told otherwise.
        inputs: what each is fed.
    """

    def __init__(self, recipe: ExtractRecipe) -> None:
        self.recipe = recipe
        self.device = pick_device(recipe.device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        has_flow = any("flow" in choices for choices in recipe.sets.values())
        computed = has_flow and recipe.flow.source != "dis"
        self.raft = Raft(recipe.flow, self.device) if computed else None
        self.all: dict[str, Network] = {}
        self.inputs: dict[str, InputSpec] = {}
        for choices in recipe.sets.values():
            for modality, choice in choices.items():
                key = network_key(choice)
                if key not in self.all:
                    self.all[key] = Network(Backbone(choice), self.device, ComputeConfig())
                    self.inputs[key] = input_spec(modality, choice, recipe.flow)

    @property
    def batch_size(self) -> int:
        """Clips of a batch: a multiple of what each network computes at once."""
        return lcm(*(network.config.batch_size for network in self.all.values()))

    @property
    def halved(self) -> int:
        """How often a batch did not fit into memory."""
        return sum(network.halved for network in self.all.values())

    def serve(self, passes: int, threads: int = 1) -> None:
        """Get ready for so many batches at once, and so many threads of each.

        Raises:
            ConfigError: an engine cannot compute its network; the message says what it lacks.
        """
        for network in self.all.values():
            network.serve(passes, threads)

    def jobs(self, name: str) -> dict[str, Job]:
        """Return what each modality of a set takes."""
        choices = self.recipe.sets[name].items()
        return {
            m: Job(network_key(choice), input_spec(m, choice, self.recipe.flow))
            for m, choice in choices
        }

    def store_spec(self, name: str, manifest: Manifest) -> StoreSpec:
        """Return what the store of a set looks like, provenance included."""
        specs = {}
        for modality, choice in self.recipe.sets[name].items():
            config = self.all[network_key(choice)].config
            specs[modality] = ModalitySpec(
                **stored_as(modality, choice, self.recipe.store.dtype),
                frames=input_spec(modality, choice).times,
                provenance=self._provenance(modality, choice),
                computed=config.model_dump(mode="json", by_alias=True),
            )
        return StoreSpec(
            modalities=specs,
            heads=dict(manifest.heads),
            clips_per_shard=self.recipe.store.clips_per_shard,
            views=self.recipe.several_views,
        )

    def _provenance(self, modality: str, choice: BackboneChoice) -> dict[str, Any]:
        recipe = self.recipe
        facts = self.all[network_key(choice)].backbone.provenance()
        if choice.engine == "openvino":
            facts["engine"] = openvino_engine.name_and_version()
        facts["sampling"] = recipe.sampling.model_dump(mode="json")
        if modality in recipe.sensors:
            facts["sensor"] = recipe.sensors[modality].model_dump(mode="json")
            facts["sensor"]["resampling"] = RESAMPLED
            return facts
        facts["decoder"] = f"decord {_decord()}, else PyAV {version('av')}"
        facts["rounding_s"] = ROUNDING_S
        if modality == "flow":
            facts["flow"] = recipe.flow.model_dump(mode="json")
            facts["flow"]["pairs"] = PAIRS
            facts["flow"]["opencv"] = version("opencv-python-headless")
            facts["flow"]["raft_sha256"] = self.raft.digest if self.raft else None
        if choice.architecture.kind == "boxes":
            facts["boxes"] = boxes.FACTS
        if modality == "audio":
            facts["audio"] = (choice.own_audio or recipe.audio).model_dump(mode="json")
            facts["audio"]["librosa"] = version("librosa")
            facts["audio"]["resampling"] = RESAMPLING
        return facts

    def compute(self, batch: Batch, recent: Recent | None = None) -> Computed:
        """Run the networks of the sets that lack the batch, each once on each input.

        On a GPU this returns before the tokens are there (see `Computed.wait`), so that the
        next batch is copied while this one is computed. What ``recent`` holds of frames and of
        pairs is not computed again.
        """
        jobs = dict.fromkeys(job for name in batch.plan.stores for job in self.jobs(name).values())
        inputs = {
            spec: self.raft.inputs(batch, spec, recent) if spec.pairs and self.raft else clips
            for spec, clips in batch.inputs.items()
        }
        if self._copies is None:
            return Computed(batch, self._tokens(jobs, batch, inputs, recent))
        # The copy has a stream of its own, so that it runs beside the passes of the batch before.
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            inputs = {
                spec: clips.to(self.device, non_blocking=True) for spec, clips in inputs.items()
            }
        stream.wait_stream(self._copies)
        for clips in inputs.values():
            # Allocated on the stream of the copies: without this the allocator would hand the
            # memory to the next copy as soon as Python drops the tensor, still being read.
            clips.record_stream(stream)
        # The events tell the writer when the tokens are there, and how long the GPU worked.
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        tokens = self._tokens(jobs, batch, inputs, recent)
        stop.record(stream)
        return Computed(batch, tokens, (start, stop))

    def _tokens(
        self,
        jobs: Iterable[Job],
        batch: Batch,
        inputs: Mapping[InputSpec, Tensor],
        recent: Recent | None,
    ) -> dict[Job, dict[int, Tensor]]:
        return {
            job: self._run(job, batch, inputs[job.spec], recent)
            for job in jobs
            if job.spec in inputs
        }

    def _run(
        self, job: Job, batch: Batch, clips: Tensor, recent: Recent | None
    ) -> dict[int, Tensor]:
        network = self.all[job.network]
        if job.spec.modality == "flow" and network.backbone.choice.cut == INPUT:
            clips = clips[:, :, :2]  # the third channel is constant
        size = network.config.batch_size
        tokens: dict[int, Tensor] = {}
        for first in range(0, len(clips), size):
            rows = batch.rows(job.spec, first, size)
            if rows:
                whole = len(rows) == len(clips[first : first + size])  # then no copy is made
                some = clips[first : first + size] if whole else clips[rows]
                made = (
                    network.tokens(some)
                    if recent is None or not network.by_frame
                    else network.tokens_by_frame(some, recent)
                )
                tokens.update(zip(rows, _to_host(made), strict=True))
        return tokens


def _decord() -> str:
    """Return the version of a decoder that only a recipe which names it needs."""
    try:
        return version("decord")
    except PackageNotFoundError:
        return "none"


def _to_host(tokens: Tensor) -> Tensor:
    if tokens.device.type == "cpu":
        return tokens
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    return host.copy_(tokens, non_blocking=True)


def network_key(choice: BackboneChoice) -> str:
    """Return what tells networks apart: equal choices are one network."""
    return hashlib.sha256(choice.model_dump_json().encode()).hexdigest()


def configure(networks: Networks, stores: Mapping[str, Path], note: Callable[[str], None]) -> None:
    """Settle how each network computes: the recipe counts first, then the store, then the rule.

    Args:
        networks: of all sets.
        stores: by the name of the set; there or not.
        note: told in a line what matched in a weights file, and how a network computes.
    """
    recipe = networks.recipe
    recorded = dict(_recorded(recipe, stores))
    for key, network in networks.all.items():
        backbone = network.backbone
        if backbone.choice.source == "file":
            note(f"{backbone.choice.weights}: {backbone.loaded.report()}")
        # Stores begun by earlier versions hold what was found fastest on one machine: they are
        # finished in that way, whatever the rule says.
        chosen = recorded.get(key) or by_rule(network, networks.inputs[key], recipe)
        if network.openvino is None:
            chosen = chosen.model_copy(update=_stated(recipe))
        elif key not in recorded:  # what cannot be converted is told before a store is made
            network.openvino.convert()
        network.use(chosen)
        if backbone.choice.source != "none":
            unmeasured = network.config.chosen == BY_RULE.format("cuda")
            says = "; the defaults for GPUs were not measured" if unmeasured else ""
            # A store that was begun keeps its engine.
            begins = bool(stores) and key not in recorded
            if begins and network.openvino is None and network.device.type == "cpu":
                says = _advice(backbone.choice.name)
            note(f"{_users(recipe, key)}: {backbone.choice.name}, {network.config}{says}")


def _advice(name: str) -> str:
    """Return what to add to a line on a network that torch computes on a CPU; may be empty."""
    if name not in _FASTER or find_spec("openvino") is None:
        return ""
    return f"; openvino was faster in benchmarks ({_FASTER[name]}): set engine: openvino"


def _users(recipe: ExtractRecipe, key: str) -> str:
    """Return the modalities whose tokens a network computes, such as ``teacher.rgb``."""
    return ", ".join(
        f"{name}.{modality}"
        for name, choices in recipe.sets.items()
        for modality, choice in choices.items()
        if network_key(choice) == key
    )


def by_rule(network: Network, spec: InputSpec, recipe: ExtractRecipe) -> ComputeConfig:
    """Return how a network computes if no store records it; `docs/extraction.md` has the rule.

    The rule looks at the network, the recipe and the kind of the device; at no clock and at no free
    memory. So parts of an extraction that start at the same time on different machines come to the
    same answer without asking one another, which they must: which clips are computed together, and
    in which order, decides the last bits of their tokens.
    """
    if network.openvino is not None:  # whatever a recipe states for the others
        return ComputeConfig(chosen="by the engine")
    stated = _stated(recipe)
    if network.backbone.choice.source == "none" or all(key in stated for key in _KEYS):
        return ComputeConfig(**stated)
    chosen: dict[str, Any] = {"memory_format": memory_format(network.backbone), **stated}
    if "batch_size" not in chosen:
        chosen["batch_size"] = _batch_size(network, spec, recipe)
    return ComputeConfig(**chosen, chosen=BY_RULE.format(network.device.type))


def memory_format(net: nn.Module) -> MemoryFormat:
    """Return channels_last for a network of convolutions, contiguous for a transformer.

    Convolutions are faster with the channels together, everything else does not care or loses.
    A transformer has convolutions, too: its patch embedding and perhaps some that pool. So they
    are counted against the linear layers.
    """
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Conv3d) for m in net.modules())
    linear = sum(isinstance(m, nn.Linear) for m in net.modules())
    return "channels_last" if convolutions > linear else "contiguous"


def example(spec: InputSpec, count: int) -> Tensor:
    """Return decoded clips [count, ...] of noise, as a network's input looks."""
    generator = torch.Generator().manual_seed(0)
    frames = (spec.frames,) if spec.per_frame else (1,)
    if spec.transform is None:  # log-mel, already standardised
        shape = (count, *(frames if spec.per_frame else ()), *spec.image)
        return torch.randn(shape, generator=generator)
    shape = (count, *frames, 3, *spec.image)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _stated(recipe: ExtractRecipe) -> dict[str, Any]:
    """Return the keys that a recipe states itself."""
    stated = {key: getattr(recipe, key) for key in _KEYS}
    return {"compile": recipe.compile, **{k: v for k, v in stated.items() if v != "auto"}}


def _batch_size(network: Network, spec: InputSpec, recipe: ExtractRecipe) -> int:
    """Return the largest power of two that fits; sizes of several networks then share factors."""
    kind = network.device.type
    room = _BATCH_BYTES[kind]
    if recipe.memory_gb:  # on a CPU it says how many passes run at once, seldom how large they are
        stated = recipe.memory_gb * 1e9
        room = min(room, stated) if kind == "cpu" else stated
    clip, size = network.clip_bytes(example(spec, 1)), 1
    while 2 * size <= _MAX_BATCH[kind] and 2 * size * clip <= room:
        size *= 2
    return size


def _recorded(
    recipe: ExtractRecipe, stores: Mapping[str, Path]
) -> Iterator[tuple[str, ComputeConfig]]:
    for name, root in stores.items():
        if not (root / "spec.json").is_file():
            continue
        there = Catalog(root).spec.modalities
        for modality, choice in recipe.sets[name].items():
            computed = there[modality].computed if modality in there else {}
            if computed:
                yield network_key(choice), config.build(ComputeConfig, computed, str(root))
