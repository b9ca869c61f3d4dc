import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt

from karmma_pipeline import config
from karmma_pipeline.errors import ConfigError


class Optimiser(config.Recipe):
    lr: float = Field(1e-4, description="Peak learning rate.", gt=0)
    kind: Literal["adamw", "sgd"] = Field("adamw", description="Which one.")


class Example(config.Recipe):
    store: Path = Field(description="Feature store.", examples=["features/student"])
    optimiser: Optimiser = Field(Optimiser(), description="How weights move.")
    sets: dict[str, Optimiser] = Field({}, description="By name.")
    part: Optimiser | None = Field(None, description="May be absent.")
    size: PositiveInt | Literal["auto"] = Field("auto", description="How many.")


def load(tmp_path: Path, text: str, *overrides: str) -> Example:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return config.load(Example, path, overrides)


def test_numbers_that_plain_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    assert load(tmp_path, "store: a\noptimiser: {lr: 1e-3}").optimiser.lr == 1e-3


@pytest.mark.parametrize("text", ["no", "off", "1:30", "2020-01-01", "012", "1_0.e", "P01"])
def test_words_that_plain_yaml_twists_stay_text(text: str) -> None:
    assert config.parse_yaml(f"k: {text}", "w") == {"k": text}


def test_overrides_reach_nested_keys_and_make_missing_ones(tmp_path: Path) -> None:
    recipe = load(tmp_path, "store: a", "optimiser.lr=3e-4", "sets.x.kind=sgd")
    assert recipe.optimiser.lr == 3e-4
    assert recipe.sets["x"].kind == "sgd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stor: a",
            r"r\.yaml: store: required key is missing; stor: unknown key, did you mean 'store'",
        ),
        ("store: a\noptimiser: {ler: 1}", "optimiser.ler: unknown key, did you mean 'lr'"),
        ("store: a\nsets: {x: {lrr: 1}}", r"sets\.x\.lrr: unknown key, did you mean 'lr'"),
        ("store: a\npart: {kin: sgd}", r"part\.kin: unknown key, did you mean 'kind'"),
        ("store: a\noptimiser: {lr: -1}", r"optimiser\.lr=-1: input should be greater than 0"),
        ("store: a\noptimiser: {kind: adam}", r"optimiser\.kind='adam': input should be 'adamw'"),
        ("- a", "a recipe is a mapping"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("store: a\nstore: b", "duplicate key 'store' at line 2, column 1"),
        ("store: a\npart: {lr: 1, lr: 2}", "duplicate key 'lr' at line 2"),
        ("store: a\npart:\n\tlr: 1", r"cannot start any token at line 3, column 1"),
        ("a: " + "[" * 5000, "not valid YAML: nested too deeply"),
        ("store: a\nsize: 0", r"yaml: size=0: input should be greater than 0, or input should be"),
        ("store: ''", r"store='' is not a path; write '\.' for the working folder"),
        ('store: "a\\0b"', r"store='a\\x00b' is not a path"),
    ],
)
def test_a_wrong_recipe_names_file_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "r.yaml") in str(caught.value)


def test_keys_that_are_merged_may_be_set_again(tmp_path: Path) -> None:
    text = "store: a\noptimiser: &one {lr: 1, kind: sgd}\npart: {<<: *one, lr: 2}\n"
    assert load(tmp_path, text).part == Optimiser(lr=2, kind="sgd")


def test_a_path_may_begin_at_the_users_folder(tmp_path: Path) -> None:
    assert load(tmp_path, "store: ~/a").store == Path.home() / "a"


@pytest.mark.parametrize("override", ["lr", "=1", "a..b=1", "store.x=1"])
def test_a_malformed_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, "store: a", override)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="karmma init"):
        config.load(Example, tmp_path / "none.yaml")


@given(
    lr=st.floats(1e-30, 1e30, allow_subnormal=False),
    store=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1),
)
def test_a_dumped_recipe_loads_as_the_same_recipe(lr: float, store: str) -> None:
    recipe = Example(store=Path(store), optimiser=Optimiser(lr=lr), part=Optimiser())
    again = config.build(Example, config.parse_yaml(config.dump(recipe), "w"), "w")
    assert again == recipe


def test_the_template_is_a_valid_recipe_that_explains_every_key() -> None:
    text = config.template(Example)
    recipe = config.build(Example, config.parse_yaml(text, "w"), "w")
    assert recipe == Example(store=Path("features/student"))
    assert "# Peak learning rate." in text


def test_the_template_shows_a_parts_default_where_it_stands() -> None:
    class Fast(config.Recipe):
        optimiser: Optimiser = Field(Optimiser(lr=1.0), description="How weights move.")

    assert config.build(Fast, config.parse_yaml(config.template(Fast), "w"), "w") == Fast()


def test_recipes_are_utf8_in_every_locale(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from karmma_pipeline import config\n"
        "class Named(config.Recipe):\n"
        "    name: str = ''\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "recipe = config.load(Named, path)\n"
        "assert recipe.name == 'Sch\\u00fcler \\u03b4', ascii(recipe)\n"
        "config.save(recipe, path)\n"
        "assert config.saved(Named, path) == recipe\n"
    )
    (tmp_path / "r.yaml").write_text("name: Schüler δ\n", encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "r.yaml"], env={**os.environ, **plain}, check=True
    )


def test_every_text_file_is_opened_as_utf8() -> None:
    """A file whose encoding is left to the locale is another one on another machine."""
    package = Path(config.__file__).parent
    faults = []
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                named = {keyword.arg for keyword in call.keywords}
                if call.func.attr == "read_text" and not call.args and "encoding" not in named:
                    faults.append(f"{path}:{call.lineno}")
    assert not faults


def test_a_folder_may_be_called_by_a_number(tmp_path: Path) -> None:
    assert load(tmp_path, "store: 2024").store == Path("2024")
    assert load(tmp_path, "store: a", "store=12345").store == Path("12345")


class Old(config.Recipe):
    lr: float = Field(1e-4, description="Peak learning rate.")
    rule: str = Field("new", description="Came later.")
    mode: str = Field("auto", description="Settled at the start.")
    place: Path = Field(Path("a"), description="Where.")
    FREE = frozenset({"place"})
    SETTLED = frozenset({"mode"})


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.NEWER_KEYS, "Old.rule", (2, "old"))


@pytest.mark.usefixtures("newer")
def test_a_saved_recipe_means_by_a_key_that_it_lacks_what_was_done_before(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 0.1\nmode: fast\nplace: there\n")
    mine = config.build(Old, {"lr": 0.1}, "mine")
    began = config.saved(Old, path)
    assert began is not None
    assert (began.rule, mine.rule) == ("old", "new")
    assert config.saved_differences(path, mine) == []
    goes_on = config.resumed(began, mine)
    assert (goes_on.rule, goes_on.mode, goes_on.place) == ("old", "fast", Path("a"))
    assert list(config.changed_defaults(mine)) == [
        "rule: the default is now 'new'; it was 'old' in earlier versions"
    ]
    wanted = config.build(Old, {"lr": 0.1, "rule": "new"}, "mine")
    assert config.saved_differences(path, wanted) == ["rule was 'old', now 'new'"]
    assert list(config.changed_defaults(wanted)) == []


@pytest.mark.usefixtures("newer")
def test_a_recipe_is_saved_whole_with_its_version_and_read_again_as_it_is(tmp_path: Path) -> None:
    path, recipe = tmp_path / "recipe.yaml", config.build(Old, {}, "mine")
    config.save(recipe, path)
    assert path.read_text().startswith(f"version: {config.VERSION}\n")
    assert config.load(Old, path) == recipe == config.saved(Old, path)
    path.write_text(path.read_text().replace("version: 2", "version: 99"))
    with pytest.raises(ConfigError, match="version=99: this version reads recipes up to version 2"):
        config.load(Old, path)
