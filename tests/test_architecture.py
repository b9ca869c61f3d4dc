"""The folders show the way the data flows, and files stay readable; these tests keep it so."""

import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import karmma_pipeline

PACKAGE = Path(karmma_pipeline.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

FOUNDATION = {
    "config",
    "errors",
    "files",
    "jobs",
    "locks",
    "logs",
    "metrics",
    "modalities",
    "own_code",
    "runs",
    "views",
    "yaml_text",
}
MIDDLE = FOUNDATION | {"data", "models", "store"}
STAGES = {"extraction", "training", "evaluation", "recognition"}

# Inside of extraction: media -> decode -> inference -> pipeline.
TYPES = MIDDLE | {"extraction.recipe", "extraction.types"}
DECODE = TYPES | {"extraction.media", "extraction.decode"}
INFERENCE = DECODE | {"extraction.inference"}
PIPELINE = ("again", "pipeline", "preview", "progress", "tables")

MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "models": FOUNDATION,
    "store": FOUNDATION,
    "data": FOUNDATION | {"store"},
    "extraction": set(),
    "extraction.recipe": MIDDLE,
    "extraction.types": TYPES,
    "extraction.media": MIDDLE | {"extraction.types"},
    "extraction.decode": DECODE,
    "extraction.inference": INFERENCE,
    **{
        f"extraction.{name}": INFERENCE | {f"extraction.{n}" for n in PIPELINE} for name in PIPELINE
    },
    "extraction.estimate": MIDDLE | {"extraction"},
    "training": MIDDLE,
    "evaluation": MIDDLE,
    "recognition": INFERENCE | {f"evaluation.{name}" for name in ("costs", "score", "statistics")},
    "recipes": FOUNDATION | {f"{part}.recipe" for part in (*STAGES, "batch")},
    "batch": MIDDLE | STAGES | {"recipes"},
    "demo": MIDDLE | STAGES | {"recipes"},
    "cli": MIDDLE | STAGES | {"recipes", "batch", "demo", "__version__"},
    "": MIDDLE | STAGES,
}
"""Part of the package to what it may import beside itself: ``a`` is all of a, ``a.b`` a piece.

The part without a name is the package's own ``__init__.py``, the public API.
"""

MOST_LINES, LEAST_MEDIAN, SMALL, MOST_SMALL = 500, 150, 60, 1 / 8
NAMELESS = {"utils", "helpers", "misc", "common"}
LONG_FUNCTION, MOST_LONG = 20, 1 / 10


def refuse(faults: dict[str, str]) -> None:
    """Fail with all faults: what is wrong, and how."""
    assert not faults, "\n".join(f"{fault}: {detail}" for fault, detail in faults.items())


def module_of(path: Path) -> str:
    """Return a module's name below the package; that of a folder is its ``__init__.py``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Return what each module imports of the package, wherever in the file the import stands."""
    modules = {module_of(path): path for path in FILES}
    return {
        name: {
            wanted if wanted in modules or wanted == "__version__" else wanted.rpartition(".")[0]
            for wanted in imported_names(ast.parse(path.read_text()))
        }
        for name, path in modules.items()
    }


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a file imports, and the names that it imports from them."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "karmma_pipeline":
                yield rest


def part_of(module: str) -> str:
    """Return the key of `MAY_IMPORT` for a module."""
    return ".".join(module.split(".")[: 2 if module.startswith("extraction.") else 1])


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def test_dependencies_run_one_way() -> None:
    faults = {}
    for module, wanted in imports().items():
        part = part_of(module)
        if part not in MAY_IMPORT:
            faults[module] = f"unknown part; add {part!r} to MAY_IMPORT, where design puts it"
            continue
        for other in wanted:
            if not any(within(other, allowed) for allowed in (part, *MAY_IMPORT[part])):
                faults[f"{module} -> {other}"] = "not the way of the data"
    refuse(faults)


def test_no_imports_go_in_circles() -> None:
    """Imports inside functions and those for the type checker only count too."""
    circles = set()
    for module in imports():
        circle = {other for other in reached(module) if module in reached(other)}
        if circle:
            circles.add(frozenset(circle))
    refuse({" <-> ".join(sorted(circle)): "imports go in a circle" for circle in circles})


@cache
def reached(module: str) -> frozenset[str]:
    """Return all modules that a module imports, directly or not; itself only in a circle."""
    found: set[str] = set()
    ahead = [module]
    while ahead:
        wanted = imports().get(ahead.pop(), set()) - found - {"", "__version__"}
        found |= wanted
        ahead += wanted
    return frozenset(found)


def test_files_are_neither_fragments_nor_heaps() -> None:
    sizes = {
        module_of(path): len(path.read_text().splitlines())
        for path in FILES
        if path.name != "__init__.py"
    }
    faults = {m: f"{lines} lines" for m, lines in sizes.items() if lines > MOST_LINES}
    for path in FILES:
        if NAMELESS & {*module_of(path).split(".")}:
            faults[module_of(path)] = "name it after what it does"
    median = statistics.median(sizes.values())
    if median < LEAST_MEDIAN:
        faults["median file"] = f"{median} lines; should be {LEAST_MEDIAN}"
    small = [module for module, lines in sizes.items() if lines < SMALL]
    if len(small) > MOST_SMALL * len(sizes):
        faults["small files"] = f"{len(small)} of {len(sizes)}: {', '.join(small)}"
    refuse(faults)


def test_functions_are_short() -> None:
    lengths = {}
    for path in FILES:
        lines = code_lines(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                lengths[f"{module_of(path)}.{node.name}:{node.lineno}"] = len(lines & {*span})
    long = [f"{name} {length}" for name, length in lengths.items() if length > LONG_FUNCTION]
    if len(long) > MOST_LONG * len(lengths):
        refuse({"long functions": f"{len(long)} of {len(lengths)}: {', '.join(long)}"})


@cache
def code_lines(path: Path) -> set[int]:
    """Return the numbers of a file's lines of code: no blank line, comment or docstring."""
    text = path.read_text()
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE} and token.line:
            found |= {*range(token.start[0], token.end[0] + 1)}
    found -= {n for n, line in enumerate(text.splitlines(), 1) if not line.strip()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node, clean=False) is not None:
                found -= {*range(first.lineno, (first.end_lineno or first.lineno) + 1)}
    return found


def test_heavy_libraries_are_loaded_where_they_are_needed() -> None:
    show_help = "from karmma_pipeline.cli import main\nmain(['--help'], standalone_mode=False)"
    name_a_type = "import karmma_pipeline.extraction.types"
    start_a_decoder = "import karmma_pipeline.extraction.decode.pool"
    faults = {
        "help": loads(show_help, {"torch", "numpy", "pydantic", "yaml", "zarr", "h5py"}),
        "types": loads(name_a_type, {"av", "decord", "librosa", "torch"}),
        "decode": loads(start_a_decoder, {"decord", "torch", "torchvision", "zarr"}),
    }
    refuse({what: error for what, error in faults.items() if error})


def loads(code: str, heavy: set[str]) -> str:
    """Run a program; return its error, or which heavy libraries it has loaded."""
    code += f"\nimport sys\nsys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    return ended.stderr.strip() if ended.returncode else ""


def test_top_level_recipe_folders_hold_no_python() -> None:
    code = {"extract": "extraction", "train": "training", "evaluate": "evaluation"}
    for stage in ("extract", "train", "evaluate", "data", "batch"):
        folder = PACKAGE.parent / stage
        if folder.is_dir():
            assert not list(folder.rglob("*.py"))
            place = f"the code is in karmma_pipeline/{code.get(stage, stage)}/"
            assert place in (folder / "README.md").read_text()
