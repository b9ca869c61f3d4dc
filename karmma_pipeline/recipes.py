"""Which recipe belongs to which command; nothing heavy is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from karmma_pipeline.config import Recipe


def recipe_model(command: str) -> type[Recipe]:
    """Return the recipe of a command, or of a ``chain`` or a ``site``."""
    if command == "extract":
        from karmma_pipeline.extraction.recipe import ExtractRecipe

        return ExtractRecipe
    if command == "evaluate":
        from karmma_pipeline.evaluation.recipe import EvaluateRecipe

        return EvaluateRecipe
    if command in {"chain", "site"}:
        from karmma_pipeline.batch.recipe import Chain, Site

        return Chain if command == "chain" else Site
    from karmma_pipeline.training.recipe import BaselineRecipe, DistillRecipe, TeacherRecipe

    models: dict[str, type[Recipe]] = {
        "train-teacher": TeacherRecipe,
        "train-baseline": BaselineRecipe,
        "distill": DistillRecipe,
    }
    return models[command]
