"""Published data sets: a recipe section and a reader for each."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.data.datasets import (
    ego4d,
    ego_exo4d,
    epic_kitchens,
    folder_tree,
    something_something,
    utd_mhad,
)
from karmma_pipeline.data.datasets.ego4d import Ego4dLta
from karmma_pipeline.data.datasets.ego_exo4d import EgoExo4dKeysteps
from karmma_pipeline.data.datasets.epic_kitchens import EpicKitchens
from karmma_pipeline.data.datasets.folder_tree import FolderTree
from karmma_pipeline.data.datasets.something_something import SomethingSomething
from karmma_pipeline.data.datasets.utd_mhad import UtdMhad
from karmma_pipeline.data.manifest import Manifest, PictureNames, read_manifest
from karmma_pipeline.errors import ManifestError

__all__ = ["CsvList", "Dataset", "published_sensors", "read_dataset"]


class CsvList(Recipe):
    """A list of clips in one CSV; the recipe's key ``manifest`` is short for its defaults."""

    kind: Literal["csv"] = Field(description="A custom CSV.")
    path: Path = Field(description="The CSV.")
    pictures: PictureNames = Field(
        PictureNames(), description="File names of images in frame and flow folders."
    )
    heads: tuple[str, ...] | None = Field(
        None,
        description="Label columns; all other columns are ignored. null: every column that is "
        "not reserved.",
    )


#: A recipe section that names a data set.
Dataset = Annotated[
    CsvList
    | FolderTree
    | EpicKitchens
    | SomethingSomething
    | Ego4dLta
    | EgoExo4dKeysteps
    | UtdMhad,
    Field(discriminator="kind"),
]


def read_dataset(dataset: Dataset, sensors: Collection[str] = ()) -> Manifest:
    """Read a data set's annotations and find its media.

    Args:
        dataset: which, and where.
        sensors: columns of a CSV that name files of sensors.

    Raises:
        ManifestError: an annotation file is missing or faulty; file, line and column are named. Or
            a folder of media is not there.
    """
    root = getattr(dataset, "root", None)
    if root is not None and not root.is_dir():
        raise ManifestError(f"dataset.root={root}: no such folder{files.looked_in(root)}.")
    match dataset:
        case CsvList():
            return read_manifest(dataset.path, dataset.pictures, dataset.heads, sensors)
        case FolderTree():
            return folder_tree.read(dataset)
        case EpicKitchens():
            return epic_kitchens.read(dataset)
        case SomethingSomething():
            return something_something.read(dataset)
        case Ego4dLta():
            return ego4d.read(dataset)
        case EgoExo4dKeysteps():
            return ego_exo4d.read(dataset)
        case UtdMhad():
            return utd_mhad.read(dataset)


def published_sensors(dataset: Dataset) -> Mapping[str, Mapping[str, Any]]:
    """Return what a data set says of its sensors, as a recipe's ``sensors`` would."""
    return utd_mhad.SENSORS if isinstance(dataset, UtdMhad) else {}
