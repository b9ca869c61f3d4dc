"""Shared by the commands: one-line errors, options, recipes and checks before the work starts."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from karmma_pipeline.cli.completion import settings
from karmma_pipeline.errors import (
    ConfigError,
    ExitCode,
    KarmmaError,
    ManifestError,
)

_STARTED = "karmma_pipeline.started"


class Problem(click.ClickException):
    """One of our errors, shown as one sentence and ended with its exit code."""

    def __init__(self, error: KarmmaError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class Stopped(click.ClickException):
    """Ctrl-C, shown as one line."""

    exit_code = int(ExitCode.STOPPED)


class Commands(click.Group):
    """A group that keeps the order of definition and turns our errors into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their definition."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command with log lines and bars; our errors become one sentence and exit code."""
        from karmma_pipeline import logs

        logs.show()
        ctx.meta.setdefault(_STARTED, time.monotonic())
        try:
            return super().invoke(ctx)
        except KarmmaError as error:
            raise Problem(error) from error
        except KeyboardInterrupt:  # while nobody looked at a `StopFlag`, such as during imports
            raise Stopped("stopped by SIGINT; run the same command again.") from None
        except OSError as error:
            if error.filename is not None and error.strerror:
                raise click.ClickException(f"{error.filename}: {error.strerror}.") from error
            _raise_if_full(error)
            raise

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse the command line; ``--help`` and ``--version`` print here already."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except OSError as error:
            _raise_if_full(error)
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name is answered with the nearest one."""
        names = {part: name for name in self.commands for part in (name.split("-")[0], name)}
        near = difflib.get_close_matches(args[0], names, 1)
        if args[0] not in self.commands and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {names[near[0]]!r}?")
        return super().resolve_command(ctx, args)


def named_by_option(command: Callable[..., None]) -> Callable[..., None]:
    """Let an error of a command that names an argument of the API (``window_s=0``) name its option.

    Recipes have no part in such a command: their keys are named as they are.
    """

    @functools.wraps(command)
    def named(**arguments: Any) -> None:
        try:
            command(**arguments)
        except ConfigError as error:
            name, _, rest = str(error).partition("=")
            for option in click.get_current_context().command.params:
                if option.name == name and rest:
                    raise ConfigError(f"{option.opts[-1]} {rest}") from error
            raise

    return named


def _raise_if_full(error: OSError) -> None:
    """What commands write to files names its file; an error without one is standard output's."""
    if error.errno == errno.ENOSPC:
        text = f"the output could not be written ({os.strerror(error.errno)})."
        raise click.ClickException(text) from None


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=VALUE",
    shell_complete=settings,
    help="Override a key of the recipe; repeatable.",
)
check_option = click.option("--check", is_flag=True, help="Print the resolved recipe and exit.")


def load_recipe(
    command: str,
    path: Path | None,
    overrides: tuple[str, ...],
    check: bool = False,
    writes: bool = True,
) -> Any:
    """Read the recipe of a command and see that its inputs are there, before torch is imported.

    Args:
        command: a key of `recipe_model`.
        path: its file; None: all keys come from the overrides.
        overrides: as ``--set``.
        check: print it and stop there.
        writes: whether the command writes into the recipe's folder.

    Raises:
        ConfigError: the file, a key or a value is wrong, or it is the recipe of another command.
        KarmmaError: what it reads is not there, or its folder cannot be written.
    """
    from karmma_pipeline import config
    from karmma_pipeline.recipes import recipe_model, use_of

    tree = {} if path is None else config.read(path)
    if (use := use_of(tree)) is not None and command not in use:
        raise ConfigError(f"{path} is a recipe for {' or '.join(f'karmma {one}' for one in use)}.")
    where = "options" if path is None else str(path)
    recipe: Any = config.build(recipe_model(command), tree, where, overrides)
    if check:
        click.echo(config.dump(recipe).rstrip())
        raise click.exceptions.Exit(0)
    if writes:
        _check_writable(recipe.out)
    _check_inputs(recipe)
    return recipe


def _check_inputs(recipe: Any) -> None:
    """See that a recipe's inputs are there.

    A run that has begun is not asked for its inputs: a finished one needs none of them.
    """
    from karmma_pipeline import files
    from karmma_pipeline.runs import RECIPE, saved_folder
    from karmma_pipeline.store.catalog import Catalog

    manifest = getattr(recipe, "manifest", None)
    if manifest is not None and not manifest.is_file():
        where = files.looked_in(manifest)
        raise ManifestError(
            f"{manifest}: no such file{where}; set manifest to the CSV with the clips."
        )
    for run in getattr(recipe, "runs", ()):
        saved_folder(run, recipe.checkpoint)
    if (recipe.out / RECIPE).is_file() or manifest is not None:
        return
    for key in ("store", "stores", "teacher_store"):
        for store in _paths(getattr(recipe, key, ())):
            Catalog(store)
    for teacher in _paths(getattr(recipe, "teacher", ())):
        saved_folder(teacher)


def _paths(value: Any) -> Iterator[Path]:
    """Yield the paths of a key that has one or several."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, list | tuple):  # an extraction's `store` is a section
        for one in value:
            yield from _paths(one)


def _check_writable(out: Path) -> None:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"out={str(out)!r}: {there} is a file; choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise KarmmaError(
            f"out={str(out)!r}: {there} cannot be written (Permission denied); choose another "
            "folder or change its permissions."
        )


def finish(*lines: str, then: str | None = None) -> None:
    """Print the closing lines of a command, how long all of it took, and the next command."""
    for line in lines:
        click.echo(line)
    seconds = time.monotonic() - click.get_current_context().meta[_STARTED]
    text = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    click.echo(f"{text} in total")
    if then is not None:
        click.echo(f"next: {then}")


def next_command(recipe: Path, name: str, command: str) -> str:
    """Return a command whose recipe, ``NAME.yaml``, lies beside another, or is to be written."""
    path = recipe.with_name(f"{name}.yaml")
    words = ["karmma", *command.split(), str(path)]
    if path.is_file():
        return shlex.join(words)
    return f"karmma init {command.split()[0]} --out {shlex.quote(str(path))}"
