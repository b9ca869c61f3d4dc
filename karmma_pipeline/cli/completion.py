"""Names of networks, completed in the shell; nothing heavy is imported."""

from __future__ import annotations

import re
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

_SIGNS = ":="
_NAME_KEY = re.compile(r"(sets\.[^=]+\.name=)(.*)", re.DOTALL)


def backbone_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[Any]]:
    """Return the names of networks that begin so."""
    from karmma_pipeline.models.backbones.names import known

    return [CompletionItem(name) for name in known() if name.startswith(incomplete)]


def settings(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem[Any]]:
    """Return values for ``--set sets.S.M.name=``."""
    found = _NAME_KEY.fullmatch(incomplete)
    if found is None:
        return []
    key, begun = found.groups()
    return [CompletionItem(key + item.value) for item in backbone_names(ctx, param, begun)]


class _Bash(BashComplete):
    """Bash, which takes the signs of ``timm:NAME`` and ``KEY=NAME`` for ends of words.

    It hands over ``timm``, ``:`` and ``NAME``, and puts what it gets in the place of the last one.
    """

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the one at it, put together again."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        after_sign = False
        for word in (*args, incomplete):
            sign = bool(word) and set(word) <= set(_SIGNS)
            if words and (sign or after_sign):
                words[-1] += word
            else:
                words.append(word)
            after_sign = sign
        *before, here = words
        value = here.partition("=")[2] if here.startswith("--") else here
        self._typed = max(map(value.rfind, _SIGNS)) + 1
        return before, here

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Leave out of a value what stands before the last sign."""
        return f"{item.type},{item.value[self._typed :]}"


add_completion_class(_Bash)
