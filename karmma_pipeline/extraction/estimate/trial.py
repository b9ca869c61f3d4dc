"""Decodes the clips of which no header tells whether they can be had, as extraction will."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.decode.pool import default_workers, open_pool
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import BatchPlan, DecodeSettings
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import Reason
from karmma_pipeline.views import Views

#: Clips that are decoded at most.
TRIED = 500

_BATCH = 16

# What a clip has of a modality: a reason and the decoder's own words.
Outcomes = Mapping[tuple[str, str], tuple[Reason, str]]


def try_clips(recipe: ExtractRecipe, clips: Sequence[Clip]) -> Outcomes:
    """Decode clips, with the limits of the recipe; return what becomes of each and its modalities.

    Args:
        recipe: the extraction; nothing is written where it will write.
        clips: with the media that are in doubt.
    """
    if not clips:
        return {}
    plain = recipe.model_copy(update={"views": Views()})
    settings = replace(DecodeSettings.of(plain), index_folder=None)
    workers = min(recipe.decode.workers or default_workers(beside_gpu=False), len(clips))
    batches = (clips[at : at + _BATCH] for at in range(0, len(clips), _BATCH))
    plans = [BatchPlan(0, some, [], last=False) for some in batches]
    outcomes: dict[tuple[str, str], tuple[Reason, str]] = {}
    with (
        open_pool(settings, recipe.decode, workers, _BATCH, StopFlag()) as pool,
        progress_bar(total=len(clips), desc="decode", unit="clip") as bar,
    ):
        for plan, decoded in pool.batches(plans):
            for clip, found in zip(plan.clips, decoded, strict=True):
                for spec in (s for s in settings.inputs if s.modality in clip.media):
                    reason = found.reasons.get(spec, Reason.PRESENT)
                    known = outcomes.get((clip.clip_id, spec.modality), (Reason.PRESENT, ""))
                    if known[0] == Reason.PRESENT:  # one network may lack what another has
                        detail = found.details.get(spec, "")
                        outcomes[clip.clip_id, spec.modality] = reason, detail
                bar.update()
    return outcomes
