"""Recipes: YAML read into strict typed models, overridden by ``--set a.b=value``, written back.

A recipe is a pydantic model derived from `Recipe`. Every field has a description, which
is also the comment that ``karmma init`` writes beside it.
"""

import copy
import difflib
import logging
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from karmma_pipeline import files
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.yaml_text import Dumper
from karmma_pipeline.yaml_text import parse_yaml as parse_yaml


class Recipe(BaseModel):
    """Base of every recipe and of every part of one: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    OLD_KEYS: typing.ClassVar[dict[str, str]] = {}
    """Removed keys of older versions, and what to do instead."""

    FREE: typing.ClassVar[frozenset[str]] = frozenset()
    """Keys that change no number of the result (paths, names, saving): they may differ when work
    goes on that began with others."""

    SETTLED: typing.ClassVar[frozenset[str]] = frozenset()
    """Keys whose value ``auto`` is settled when work begins, and saved."""

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        version = (info.context or {}).get("version", VERSION)
        paths = {key: _as_path(key, of) for key, of in given.items() if _may_be_path(cls, key)}
        given = given | paths
        return newer_keys(cls, version) | {k: v for k, v in given.items() if k not in cls.OLD_KEYS}


def without_defaults(*keys: str) -> Any:
    """Return a serializer that leaves keys out where they have their default.

    What earlier versions wrote lacks them and means that, and stays equal to what is written now.
    """

    def as_saved(self: Recipe, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if k not in keys or v != fields[k].default}

    return model_serializer(mode="wrap")(as_saved)


def _as_path(key: str, value: Any) -> Any:
    """Return the value of a key that is a path, or a list of some, as pathlib should read it."""
    if isinstance(value, list):
        return [_as_path(key, one) for one in value]
    if type(value) is int:  # a folder may be called 2024, which YAML takes for a number
        return str(value)
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError(f"{key}={value!r} is not a path; write '.' for the working folder")
        if value.startswith("~/"):  # else a folder called ~ is made, which nobody dares delete
            return str(Path(value).expanduser())
    return value


def _may_be_path(model: type[BaseModel], key: Any) -> bool:
    field = model.model_fields.get(key)
    return field is not None and Path in (field.annotation, *typing.get_args(field.annotation))


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable text")
    return text


Line = typing.Annotated[str, AfterValidator(_line)]
"""Text that a table, a legend or a script can hold."""

VERSION = 2
"""Version of the recipes that are saved; 1 is any without a version."""

NEWER_KEYS: dict[str, tuple[int, Any]] = {
    "TrainRecipe.select_by": (2, "action_top1"),
    "TrainRecipe.init_from": (2, None),
}
"""``Recipe.key`` to the first version of saved recipes that has it, and what was done before.

A recipe that an older program saved lacks the key and means that. A user's own recipe that lacks
it means today's default.
"""


def newer_keys(model: type[Recipe], version: int) -> dict[str, Any]:
    """Return the keys that recipes saved by a version lack, and what they mean by that."""
    names = {base.__name__ for base in model.__mro__}
    found = {}
    for name, (since, before) in NEWER_KEYS.items():
        recipe, _, key = name.partition(".")
        if recipe in names and since > version:
            found[key] = before
    return found


R = typing.TypeVar("R", bound=Recipe)
_logger = logging.getLogger(__name__)


def load(model: type[R], path: Path, overrides: Sequence[str] = ()) -> R:
    """Read a recipe file and apply ``a.b=value`` overrides (values are YAML).

    Raises:
        ConfigError: the file, a key or a value is wrong; the message names all faults.
    """
    return build(model, read(path), str(path), overrides)


def read(path: Path) -> dict[str, Any]:
    """Read a recipe file as plain data.

    Raises:
        ConfigError: the file cannot be read or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: the recipe cannot be read ({error.strerror}{files.looked_in(path)}); "
            "`karmma init` writes one."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the recipe is not UTF-8 text.") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, not {tree!r}.")
    return tree


def build(model: type[R], tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> R:
    """Make a recipe from plain data; ``where`` opens every error message."""
    version = _take_version(model, tree, where, VERSION)
    for override in overrides:
        _apply(model, tree, override)
    for key in model.OLD_KEYS.keys() & tree.keys():
        _logger.warning("%s: %s: %s", where, key, model.OLD_KEYS[key])
    try:
        return model.model_validate(tree, context={"version": version})
    except ValidationError as error:
        faults: dict[str, list[str]] = {}
        for fault in error.errors():
            at, reason = _sentence(model, fault)
            faults.setdefault(at, []).append(reason)
        # Of a union each member has a reason of its own.
        told = "; ".join(f"{at}: {', or '.join(reasons)}" for at, reasons in faults.items())
        raise ConfigError(f"{where}: {told}{'' if told.endswith('?') else '.'}") from None


def _take_version(model: type[Recipe], tree: dict[str, Any], where: str, without: int) -> int:
    """Take the version out of a saved recipe and return it; ``without``: what none means."""
    if "version" in model.model_fields:  # a key of its own, such as a model card's
        return VERSION
    version = tree.pop("version", without)
    if not isinstance(version, int) or version > VERSION:
        raise ConfigError(
            f"{where}: version={version!r}: this version reads recipes up to version {VERSION}; "
            "update karmma-pipeline."
        )
    return version


def _apply(model: type[Recipe], tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: write --set a.b=value.")
    where = f"--set {override!r}"
    # Nothing after the sign is null in YAML; of a key that is text it is the empty text.
    empty = not value.strip() and _annotation(model, keys) is str
    _put(tree, keys, "" if empty else parse_yaml(value, where), where)


def _annotation(model: type[BaseModel], keys: Sequence[str]) -> Any:
    """Return the type of a key as it is annotated; None if there is no such key."""
    here: Any = model
    for key in keys:
        here = _unwrap(here)
        field = here.model_fields.get(key) if hasattr(here, "model_fields") else None
        here = field.annotation if field else None
    return here


def _put(tree: dict[str, Any], keys: Sequence[str], value: Any, where: str) -> None:
    """Set a key of plain data; the sections above it are made if they are not there."""
    for key in keys[:-1]:
        child = tree.get(key)
        if child is None:
            child = tree[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {key}={child!r} has no sub-keys.")
        tree = child
    tree[keys[-1]] = value


def resolve(
    model: type[R], source: R | str | Path | Mapping[str, Any], changes: Mapping[str, Any]
) -> R:
    """Return the recipe that a function of the public API is given.

    Args:
        model: what it is a recipe of.
        source: its file, its keys and values, or the recipe itself.
        changes: keys that are set to other values; ``a__b`` is the key b of section a.

    Raises:
        ConfigError: the file, a key or a value is wrong; the message names all faults.
    """
    if isinstance(source, str | Path):
        where, tree = str(source), read(Path(source))
    elif isinstance(source, Mapping):
        where, tree = "recipe", copy.deepcopy(dict(source))
    elif isinstance(source, model):
        where, tree = "recipe", source.model_dump()
    else:
        raise ConfigError(
            f"recipe={source!r}: give a path, a dict or a {model.__name__}, "
            f"not a {type(source).__name__}."
        )
    for name, value in changes.items():
        _put(tree, name.split("__"), value, f"{name}={value!r}")
    return build(model, tree, where)


def _sentence(model: type[Recipe], fault: Any) -> tuple[str, str]:
    """Return what is at fault, a key with its value if it has one, and why."""
    location = ".".join(str(part) for part in _keys(model, fault["loc"])) or "recipe"
    if fault["type"] == "extra_forbidden":
        keys = _keys_at(model, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}"
        return location, f"unknown key, {known}"
    if fault["type"] == "missing":
        return location, "required key is missing"
    # Pydantic's own sentence, made to follow "key=value: ".
    message = fault["msg"].removeprefix("Value error, ").rstrip(".")
    message = message.replace(" for <class 'pathlib.Path'>", "")
    if isinstance(fault["input"], dict):
        return location, message
    return f"{location}={fault['input']!r}", f"{message[0].lower()}{message[1:]}"


def _keys_at(model: type[Recipe], location: Sequence[int | str]) -> list[str]:
    """Return the keys that are allowed at a place of a recipe, to suggest one that is near."""
    here: Any = model
    for part in location:
        if (tagged := _tagged(here, part)) is not None:
            here = tagged
            continue
        here = _below(_unwrap(here), part)
    here = _unwrap(here)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return list(here.model_fields)
    return []


def _below(here: Any, part: int | str) -> Any:
    """Return the type of what lies at a key, or an index, of a type; None if that is not known."""
    if isinstance(here, type) and issubclass(here, BaseModel):
        field = here.model_fields.get(str(part))
        return field.annotation if field else None
    arguments = [of for of in typing.get_args(here) if of is not Ellipsis]
    return arguments[-1] if arguments else None


def _keys(model: type[Recipe], location: Sequence[int | str]) -> Iterator[int | str]:
    """Yield the parts of a location that stand in the file: not which member of a union it is."""
    here: Any = model
    for part in location:
        if (tagged := _tagged(here, part)) is not None:
            here = tagged
            continue
        here = _unwrap(here)
        if part == "[key]" or (here in (int, float, str, bool, Path)):
            continue
        yield part
        here = _below(here, part)


def _tagged(annotation: Any, tag: int | str) -> type[BaseModel] | None:
    """Return the member of a union of models that has the tag as its ``kind``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        members = (_tagged(option, tag) for option in typing.get_args(annotation))
        return next((model for model in members if model is not None), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        if kind is not None and tag in typing.get_args(kind.annotation):
            return annotation
    return None


def _unwrap(annotation: Any) -> Any:
    """Strip Optional and Annotated down to the one type that carries keys."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(annotation) if a is not type(None)]
        models = [a for a in options if isinstance(a, type) and issubclass(a, BaseModel)]
        return models[0] if models else _unwrap(options[0])
    if origin is typing.Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    return annotation


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; loading it gives the same recipe."""
    tree = recipe.model_dump(mode="json")
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def saved(model: type[R], path: Path) -> R | None:
    """Return a recipe that `save` left; None if this version cannot read it as one of the model."""
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if isinstance(tree, dict):
        version = _take_version(model, tree, str(path), without=1)
        with suppress(ValidationError):
            return model.model_validate(tree, context={"version": version})
    return None


def resumed(began: R, recipe: R) -> R:
    """Return the recipe with which work goes on that began with another one.

    It is the one that is given now, but for what that leaves open: ``auto`` that was settled, and
    keys that it lacks and that came later than the first version. Work that goes on keeps to both.
    """
    newer, changes = newer_keys(type(recipe), 1), {}
    for key in type(recipe).model_fields:
        here, there = getattr(recipe, key), getattr(began, key)
        settled = key in recipe.SETTLED and here == "auto"
        if settled or (key in newer and key not in recipe.model_fields_set):
            changes[key] = there
        elif isinstance(here, Recipe) and type(here) is type(there):
            changes[key] = resumed(there, here)
    return recipe.model_copy(update=changes)


def changed_defaults(recipe: Recipe) -> Iterator[str]:
    """Yield the defaults that a recipe leaves open and that were others in earlier versions."""
    for key, before in newer_keys(type(recipe), 0).items():
        now = getattr(recipe, key)
        if key not in recipe.model_fields_set and now != before:
            yield f"{key}: the default is now {now!r}; it was {before!r} in earlier versions"


def identity(value: Any) -> Any:
    """Return what a recipe asks for as plain data, without keys that change no number."""
    if isinstance(value, Recipe):
        keys = [key for key in type(value).model_fields if key not in value.FREE]
        return {key: identity(getattr(value, key)) for key in keys}
    if isinstance(value, dict):
        return {key: identity(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [identity(one) for one in value]
    return str(value) if isinstance(value, Path) else value


class Difference(NamedTuple):
    """A place at which two trees differ, by its dotted path, and what each has there."""

    path: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.path} was {self.there!r}, now {self.here!r}"

    def said(self, there: str, here: str) -> str:
        """Return it in words, with names for the two places, such as ``in the store``."""
        return f"{self.path} is {self.there!r} {there} and {self.here!r} {here}"


def differences(there: Any, wanted: Any, path: str = "") -> Iterator[Difference]:
    """Yield where two trees of plain data differ."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in {**there, **wanted}:
            name = f"{path}.{key}" if path else str(key)
            yield from differences(there.get(key), wanted.get(key), name)
    elif there != wanted:
        yield Difference(path, there, wanted)


def changed_keys(path: Path, recipe: Recipe) -> list[str]:
    """Return the keys at which the recipe that `save` left in a file differs from this one."""
    found = _saved_differences(path, recipe)
    return [str(path)] if found is None else [one.path for one in found]


def saved_differences(path: Path, recipe: Recipe) -> list[str]:
    """Return where the recipe that `save` left in a file differs from this one, if it matters."""
    found = _saved_differences(path, recipe)
    return [f"{path} is not a recipe"] if found is None else [*map(str, found)]


def _saved_differences(path: Path, recipe: Recipe) -> list[Difference] | None:
    """Return where they differ; None: the file is no recipe, though nothing else tells."""
    began = saved(type(recipe), path)
    if began is not None:
        return [*differences(identity(began), identity(resumed(began, recipe)))]
    there = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return [*differences(there, identity(recipe))] or None


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, whole and with its version."""
    files.write_text(path, f"version: {VERSION}\n{dump(recipe)}")


def template(model: type[Recipe], values: Recipe | None = None) -> str:
    """Return a commented recipe with every key, made from the model itself.

    Args:
        model: the kind of recipe.
        values: a recipe whose values are written; without it each field has its default, and a
            required one its first example.
    """
    return "\n".join(_template_lines(model, values, 0)) + "\n"


def _template_lines(model: type[BaseModel], default: BaseModel | None, depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, field in model.model_fields.items():
        yield from textwrap.wrap(
            " ".join((field.description or "").split()),
            80,
            initial_indent=f"{pad}# ",
            subsequent_indent=f"{pad}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        nested = _unwrap(field.annotation)
        value = _template_value(field) if default is None else getattr(default, name)
        plain = value is None or isinstance(value, float)  # of a key that may be either
        if isinstance(nested, type) and issubclass(nested, BaseModel) and not plain:
            yield f"{pad}{name}:"
            part = value if isinstance(value, nested) else None
            yield from _template_lines(nested if part is None else type(part), part, depth + 1)
        else:
            text = yaml.safe_dump({name: _plain(value)}, sort_keys=False).rstrip()
            yield from (pad + line for line in text.splitlines())


def _template_value(field: FieldInfo) -> Any:
    if field.default is not PydanticUndefined and not (field.default is None and field.examples):
        return field.default
    if field.examples:
        return field.examples[0]
    return field.default_factory() if field.default_factory else "???"  # type: ignore[call-arg]


def _plain(value: Any) -> Any:
    """Return a value as plain data; a recipe inside a mapping is what it states."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return to_jsonable_python(value)
