"""YAML of recipes: safe, without the implicit conversions of YAML 1.1, for reading and writing."""

import re
from typing import Any

import yaml

from karmma_pipeline.errors import ConfigError, one_line

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number and ``no``, ``1:30`` and dates are text.

    A key that stands twice in a mapping is an error: plain YAML forgets the first value silently.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key.value!r}", key.start_mark
                    )
                seen.add(key.value)
        return node


# YAML 1.1 guesses too much: `no` would be False, 1:30 a number of seconds, 2024-01-01 a date, and
# 1e-4, for want of a dot, text. Only null and merge keep its rules; the others follow below.
_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in pairs if tag.endswith((":null", ":merge"))]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\d[\d_]*\.\d*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


class Dumper(yaml.SafeDumper):
    """Quotes every text that YAML or `_Loader` would take for something else, such as 0E0."""


# A text is quoted if either reading of YAML, its own or ours, would take it for something else.
Dumper.yaml_implicit_resolvers = {
    key: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(key, []),
        *_Loader.yaml_implicit_resolvers.get(key, []),
    ]
    for key in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML safely.

    Raises:
        ConfigError: the text is no YAML, or asks for a Python object by a tag.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        reason = one_line(error).replace(' in "<unicode string>",', " at")
        raise ConfigError(f"{where}: not valid YAML: {reason}.") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply.") from None
