"""Every recipe that we ship parses, and the ones that claim the paper's sizes have them."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from karmma_pipeline import config
from karmma_pipeline.batch.sweep import load_sweep
from karmma_pipeline.config import Recipe
from karmma_pipeline.demo import END_TO_END, RECIPES, write_recipes
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation import paper
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.recipes import recipe_model
from karmma_pipeline.training.recipe import (
    BaselineRecipe,
    DistillRecipe,
    TeacherRecipe,
    TrainRecipe,
)

ROOT = Path(__file__).parents[1]
TRAIN: dict[str, type[Recipe]] = {
    "teacher": TeacherRecipe,
    "baseline": BaselineRecipe,
    "baseline_delta": BaselineRecipe,
    "student": DistillRecipe,
    "student_end_to_end": DistillRecipe,
    "student_last_stage": DistillRecipe,
    "late_fusion": BaselineRecipe,
    "zero_imputation": BaselineRecipe,
    "mean_imputation": BaselineRecipe,
}
STAGES: dict[str, type[Recipe]] = {"extract": ExtractRecipe, "evaluate": EvaluateRecipe}


def shipped() -> list[tuple[Path, type[Recipe]]]:
    return [
        (path, STAGES.get(path.parent.name) or TRAIN[path.stem])
        for stage in ("extract", "train", "evaluate")
        for path in sorted((ROOT / stage).glob("*.yaml"))
    ]


@pytest.mark.parametrize(("path", "model"), shipped(), ids=lambda x: getattr(x, "name", ""))
def test_a_shipped_recipe_parses_and_opens_with_its_command(
    path: Path, model: type[Recipe]
) -> None:
    config.load(model, path)
    assert path.read_text().startswith("# karmma ")
    assert str(path.relative_to(ROOT)) in path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"kind": "epic_kitchens_100", "root": "r", "anotations": "a"}, "did you mean 'annot"),
        ({"kind": "folder_tree", "root": "r", "split": {"train": 0.5}}, "sum to 1"),
        ({"kind": "epic_100"}, "dataset: Input tag 'epic_100'"),
        (None, "give either manifest"),
    ],
)
def test_a_wrong_data_set_is_told_where_it_stands(dataset: object, message: str) -> None:
    tree = {"dataset": dataset, "out": "o", "sets": {"a": {"rgb": {"name": "swin3d_t"}}}}
    with pytest.raises(ConfigError, match=message) as caught:
        config.build(ExtractRecipe, tree, "r.yaml")
    assert "epic_kitchens_100." not in str(caught.value)  # the file has dataset.root


@pytest.mark.parametrize("more", [(), (END_TO_END,)])
def test_the_demos_recipes_parse(more: tuple[str, ...], tmp_path: Path) -> None:
    paths = write_recipes(tmp_path, quick=True, end_to_end=bool(more))
    assert list(paths) == [*RECIPES, *more, "sweep"]
    sweep = load_sweep(paths.pop("sweep"))
    report = sweep.stage("report").recipe
    assert isinstance(report, EvaluateRecipe)
    for name, path in paths.items():
        recipe = config.load((TRAIN | {END_TO_END: DistillRecipe}).get(name, ExtractRecipe), path)
        if isinstance(recipe, TrainRecipe):  # what chooses an epoch is not what is reported
            assert (recipe.val_split, report.split) == ("val", "test")
            assert f"{name}/seed0" in {stage.name for stage in sweep.stages}


def test_teacher_and_student_have_the_papers_sizes() -> None:
    for kind, names in (("teacher", ["teacher"]), ("student", list(TRAIN)[1:])):
        for name in names:
            size = config.load(TRAIN[name], ROOT / "train" / f"{name}.yaml").size  # type: ignore[attr-defined]
            wanted = paper.SIZES[kind].model_copy(update={"absent": size.absent})
            assert size == wanted
    sets = config.load(ExtractRecipe, ROOT / "extract/epic_kitchens_100.yaml").sets
    for kind, choices in sets.items():
        for modality, choice in choices.items():
            ours = paper.BACKBONES[kind][modality].model_copy(update={"weights": choice.weights})
            assert choice.output_shape == ours.output_shape
            assert choice.input_shape == ours.input_shape


def written(stage: str) -> Any:
    """The recipe that `karmma init` writes."""
    model = recipe_model(stage)
    return config.build(model, config.parse_yaml(config.template(model), stage), stage)


def test_the_recipes_that_init_writes_fit_each_other() -> None:
    extract, teacher, baseline, student, report = map(
        written, ("extract", "train-teacher", "train-baseline", "distill", "evaluate")
    )
    stores = {name: extract.out / name for name in extract.sets}
    assert (teacher.store, baseline.store) == (stores["teacher"], stores["student"])
    assert (student.store, student.teacher_store) == (stores["student"], (stores["teacher"],))
    assert student.teacher == (teacher.out,)
    assert report.runs == [teacher.out, student.out]
    assert report.stores == list(stores.values())
    assert len({teacher.out, baseline.out, student.out}) == 3


def test_a_network_hears_what_it_states_else_what_the_recipe_says() -> None:
    net = {"name": "efficientnet_b0", "weights": "random:0", "image": [32, 64]}
    tree = {
        "manifest": "m.csv",
        "out": "o",
        "audio": {"front_end": "vggish"},
        "sets": {"a": {"audio": net}, "b": {"audio": {**net, "audio": {"mels": 40}}}},
    }
    recipe = config.build(ExtractRecipe, tree, "r.yaml")
    assert recipe.sets["a"]["audio"].own_audio is None  # as in recipes of earlier versions
    own = recipe.sets["b"]["audio"].own_audio
    assert own is not None
    assert (own.front_end, own.mels) == ("radevski", 40)
    again = config.build(ExtractRecipe, recipe.model_dump(mode="json"), "saved.yaml")
    assert again == recipe


def test_what_init_writes_has_the_papers_sizes() -> None:
    for kind, stage in (("teacher", "train-teacher"), ("student", "distill")):
        size = written(stage).size
        assert size == paper.SIZES[kind].model_copy(update={"absent": size.absent})
    shipped_sets = config.load(ExtractRecipe, ROOT / "extract/epic_kitchens_100.yaml").sets
    assert written("extract").sets == shipped_sets


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/slurm.sbatch")), ids=lambda p: p.parent.name)
def test_batch_scripts_are_valid_shell_and_requeue_what_was_stopped(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)  # noqa: S607
    text = path.read_text()
    assert "--signal=B:USR1@" in text
    assert "75) again=yes" in text
    assert "138 | 140 | 143 | 152) again=yes" in text
