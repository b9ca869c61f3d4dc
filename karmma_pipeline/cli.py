"""The ``karmma`` command: load a recipe, call one function, say where the result lies.

Stages are imported inside the commands, so that ``karmma --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karmma_pipeline import __version__
from karmma_pipeline.errors import ConfigError, KarmmaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from karmma_pipeline.config import Recipe

STAGES = ("extract", "train-teacher", "train-baseline", "distill", "evaluate")


class _Problem(click.ClickException):
    """One of our errors, shown as one sentence and ended with its exit code."""

    def __init__(self, error: KarmmaError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class _Commands(click.Group):
    """A group that keeps the order of definition and turns our errors into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KarmmaError as error:
            raise _Problem(error) from error


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=VALUE",
    help="Override one key of the recipe; may be given several times.",
)
check_option = click.option(
    "--check", is_flag=True, help="Print the resolved recipe and stop before any work."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="karmma")
def main() -> None:
    r"""Action recognition that survives missing sensors: extract, train, evaluate.

    Clips become tokens once (extract), tokens become models many times (train-teacher,
    distill), models become tables and pictures (evaluate). Start with `karmma demo`.

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 done but too many
    clips failed, 75 stopped by a signal (run the same command again to go on).
    """


@main.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path("karmma-demo"))
@click.option("--quick", is_flag=True, help="A few clips and epochs: shows the road, not accuracy.")
@click.option("--seed", default=0, show_default=True, help="Seed of the data and of all training.")
def demo(out: Path, quick: bool, seed: int) -> None:
    """Run every stage on generated clips and write a report, in a few minutes on a CPU."""
    from karmma_pipeline.demo import run_demo

    run_demo(out, quick=quick, seed=seed)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--clips", default=1000, show_default=True, help="Number of labelled clips.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal files.")
def sample(out: Path, clips: int, seed: int) -> None:
    """Write "digits in motion": labelled videos with sound, to try everything on."""
    from karmma_pipeline.data.sample import write_sample
    from karmma_pipeline.jobs import StopFlag

    with StopFlag() as stop:
        click.echo(f"manifest: {write_sample(out, clips=clips, seed=seed, stop=stop)}")


@main.command()
@recipe_argument
@set_option
@check_option
@click.option("--part", metavar="I/N", help="Do part I of N only; Slurm arrays set it themselves.")
def extract(recipe: Path, overrides: tuple[str, ...], check: bool, part: str | None) -> None:
    """Turn the clips of a manifest into feature stores."""
    from karmma_pipeline.extract.recipe import ExtractRecipe

    resolved = _load(ExtractRecipe, recipe, overrides, check)
    from karmma_pipeline.extract.pipeline import extract as run
    from karmma_pipeline.jobs import Part, StopFlag

    with StopFlag() as stop:
        share = Part.parse(part) if part else Part.from_environment()
        click.echo(run(resolved, share, stop).summary())


@main.group(cls=_Commands)
def store() -> None:
    """Look at feature stores."""


@store.command("info")
@click.argument("path", type=click.Path(path_type=Path))
def store_info(path: Path) -> None:
    """Print what a store holds and where it came from."""
    import yaml

    from karmma_pipeline.data.store import info

    click.echo(yaml.safe_dump(info(path), sort_keys=False).rstrip())


@store.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
def store_verify(path: Path) -> None:
    """Check every byte of a store against its checksums."""
    from karmma_pipeline.data.store import verify
    from karmma_pipeline.errors import StoreError

    damages = verify(path)
    for damage in damages:
        click.echo(str(damage))
    if damages:
        raise StoreError(f"{path}: {len(damages)} damaged places; they are listed above.")
    click.echo(f"{path}: whole")


@store.command("finalize")
@click.argument("path", type=click.Path(path_type=Path))
def store_finalize(path: Path) -> None:
    """Join the shards of all parts; extraction's last part does this itself."""
    from karmma_pipeline.data.store import finalize

    finalize(path)
    click.echo(f"{path}: complete")


@main.command("train-teacher")
@recipe_argument
@set_option
@check_option
def train_teacher(recipe: Path, overrides: tuple[str, ...], check: bool) -> None:
    """Train the multimodal teacher on cached tokens."""
    from karmma_pipeline.train.recipe import TeacherRecipe

    resolved = _load(TeacherRecipe, recipe, overrides, check)
    from karmma_pipeline.train import stages

    _train(stages.train_teacher, resolved)


@main.command("train-baseline")
@recipe_argument
@set_option
@check_option
def train_baseline(recipe: Path, overrides: tuple[str, ...], check: bool) -> None:
    """Train the student's architecture without a teacher: Baseline and Baseline w/ delta."""
    from karmma_pipeline.train.recipe import BaselineRecipe

    resolved = _load(BaselineRecipe, recipe, overrides, check)
    from karmma_pipeline.train import stages

    _train(stages.train_baseline, resolved)


@main.command()
@recipe_argument
@set_option
@check_option
def distill(recipe: Path, overrides: tuple[str, ...], check: bool) -> None:
    """Train the student to follow the teacher under the same missing modalities."""
    from karmma_pipeline.train.recipe import DistillRecipe

    resolved = _load(DistillRecipe, recipe, overrides, check)
    from karmma_pipeline.train import stages

    _train(stages.distill, resolved)


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Feature store; with several, each run takes the one it was trained on.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("--recipe", type=click.Path(path_type=Path), help="Recipe for all other settings.")
@set_option
@check_option
def evaluate(
    runs: tuple[Path, ...],
    stores: tuple[Path, ...],
    out: Path | None,
    recipe: Path | None,
    overrides: tuple[str, ...],
    check: bool,
) -> None:
    """Report accuracy and cost on every subset of modalities and under missing sensors."""
    from karmma_pipeline.evaluate.recipe import EvaluateRecipe

    given = {"runs": [str(r) for r in runs], "stores": [str(s) for s in stores]}
    switches = [f"{key}={value}" for key, value in given.items() if value]
    if out is not None:
        switches.append(f"out={str(out)!r}")
    resolved = _load(EvaluateRecipe, recipe, (*switches, *overrides), check)
    from karmma_pipeline.evaluate.stage import evaluate as run
    from karmma_pipeline.jobs import StopFlag

    with StopFlag() as stop:
        click.echo(run(resolved, stop).summary())


@main.command()
def costs() -> None:
    """Compute the paper's fourteen GFLOPs bars and compare them with the published ones."""
    from karmma_pipeline.evaluate.costs import paper_costs, paper_table

    click.echo(paper_table(paper_costs()))


@main.command()
@click.argument("stage", type=click.Choice(STAGES))
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default: print.")
def init(stage: str, out: Path | None) -> None:
    """Write a commented recipe of a stage, with every key and its default."""
    from karmma_pipeline import config, files

    text = f"# Recipe for: karmma {stage} RECIPE\n\n{config.template(_recipe_model(stage))}"
    if out is None:
        click.echo(text.rstrip())
        return
    if out.exists():
        raise ConfigError(f"--out {out}: the file exists; choose another name or remove it.")
    files.write_text(out, text)
    click.echo(f"recipe: {out}")


@main.group(cls=_Commands)
def backbones() -> None:
    """List, describe and download the frozen networks."""


@backbones.command("list")
def backbones_list() -> None:
    """Print the shipped networks and their published weights."""
    from karmma_pipeline.models.backbones import list_backbones

    for row in list_backbones():
        size = f"{row['parameters'] / 1e6:6.1f} M" if row["parameters"] else ""
        click.echo(f"{row['name']:20}{row['input']:7}{size}  {', '.join(row['weights'])}")


@backbones.command("show")
@click.argument("name")
@set_option
def backbones_show(name: str, overrides: tuple[str, ...]) -> None:
    """Print input, tokens and cost of a network, such as --set frames=32 --set size=224."""
    import yaml

    from karmma_pipeline import config
    from karmma_pipeline.models.backbones import BackboneChoice, describe

    choice = config.build(BackboneChoice, {"name": name, "weights": "random:0"}, name, overrides)
    click.echo(yaml.safe_dump(describe(choice), sort_keys=False).rstrip())


@backbones.command("fetch")
@click.argument("name")
@click.argument("weights", default="DEFAULT")
@click.option("--to", type=click.Path(path_type=Path), help="Folder; default: torch's cache.")
def backbones_fetch(name: str, weights: str, to: Path | None) -> None:
    """Download published weights where there is network, for nodes where there is none."""
    from karmma_pipeline.models.backbones import fetch

    click.echo(f"weights: {fetch(name, weights, to)}")


def _recipe_model(stage: str) -> type[Recipe]:
    if stage == "extract":
        from karmma_pipeline.extract.recipe import ExtractRecipe

        return ExtractRecipe
    if stage == "evaluate":
        from karmma_pipeline.evaluate.recipe import EvaluateRecipe

        return EvaluateRecipe
    from karmma_pipeline.train.recipe import BaselineRecipe, DistillRecipe, TeacherRecipe

    models: dict[str, type[Recipe]] = {
        "train-teacher": TeacherRecipe,
        "train-baseline": BaselineRecipe,
        "distill": DistillRecipe,
    }
    return models[stage]


def _load(model: type[Recipe], path: Path | None, overrides: tuple[str, ...], check: bool) -> Any:
    from karmma_pipeline import config

    if path is None:
        recipe = config.build(model, {}, "options", overrides)
    else:
        recipe = config.load(model, path, overrides)
    if check:
        click.echo(config.dump(recipe).rstrip())
        raise click.exceptions.Exit(0)
    return recipe


def _train(run: Callable[..., Any], recipe: Recipe) -> None:
    from karmma_pipeline.jobs import StopFlag

    with StopFlag() as stop:
        click.echo(run(recipe, stop=stop).summary())


if __name__ == "__main__":
    main()
