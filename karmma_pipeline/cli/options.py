"""What the commands share: errors as one sentence, options, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karmma_pipeline.errors import KarmmaError

if TYPE_CHECKING:
    from karmma_pipeline.config import Recipe


class Problem(click.ClickException):
    """One of our errors, shown as one sentence and ended with its exit code."""

    def __init__(self, error: KarmmaError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class Commands(click.Group):
    """A group that keeps the order of definition and turns our errors into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their definition."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command with log lines and bars; our errors become one sentence and exit code."""
        from karmma_pipeline import logs

        logs.show()
        try:
            return super().invoke(ctx)
        except KarmmaError as error:
            raise Problem(error) from error


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


def load_recipe(
    model: type[Recipe], path: Path | None, overrides: tuple[str, ...], check: bool
) -> Any:
    """Read a recipe with its overrides; with ``check``, print it and stop there."""
    from karmma_pipeline import config

    if path is None:
        recipe = config.build(model, {}, "options", overrides)
    else:
        recipe = config.load(model, path, overrides)
    if check:
        click.echo(config.dump(recipe).rstrip())
        raise click.exceptions.Exit(0)
    return recipe
