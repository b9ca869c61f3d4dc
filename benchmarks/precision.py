"""What the type on disk and fewer tokens cost in accuracy: one command that prints a table.

    karmma demo demo                      # once
    python benchmarks/precision.py demo [--seeds 5] [--quick] [--stores student]

The demo's features are converted with the function of `karmma store convert`; for each result the
demo's own training runs with several seeds. The interval is that of the features as extracted:
Wilson's 95 % of the validation clips for the mean accuracy over the seeds. Paired with the same
seed, the mean difference and its standard error are much finer than that interval.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import torch

from karmma_pipeline import config
from karmma_pipeline.metrics import wilson_interval
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.store.spec import Dtype
from karmma_pipeline.store.tools.rewrite import convert
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import train_baseline


@dataclass(frozen=True)
class Variant:
    """How features are kept; ``pooled``: one token per modality, the mean of all."""

    name: str
    dtype: Dtype
    pooled: bool = False


VARIANTS = (
    Variant("float16, as extracted", "float16"),
    Variant("int8 + scale per token", "int8"),
    Variant("bfloat16", "bfloat16"),
    Variant("float16, one token per modality", "float16", pooled=True),
)


def make(store: Path, variant: Variant, out: Path) -> Path:
    """Write the store of a variant."""
    opened = FeatureStore.open(store)
    grid = {m: [1] * len(one.grid) for m, one in opened.specs.items()}
    convert(store, out, variant.dtype, grid if variant.pooled else None)
    return out


def token_bytes(store: Path) -> int:
    """Return the size of all tokens of a store, scales included."""
    opened = FeatureStore.open(store)
    clips = dict(zip(opened.modalities, opened.present.sum(axis=0).tolist(), strict=True))
    return sum(clips[m] * one.clip_bytes for m, one in opened.specs.items())


def accuracy(demo: Path, recipe: str, store: Path, out: Path, seed: int) -> float:
    """Train as the demo does and return the best validation accuracy of the action, percent."""
    switches = [f"store={json.dumps(str(store))}", f"out={json.dumps(str(out))}", f"seed={seed}"]
    found = config.load(BaselineRecipe, demo / "recipes" / f"{recipe}.yaml", switches)
    return train_baseline(found).best["val_action_top1"]


def table(demo: Path, name: str, recipe: str, seeds: int, last: int, folder: Path) -> None:
    """Print a row for each of the first variants of one store."""
    store = demo / "features" / name
    opened = FeatureStore.open(store)
    clips = int(((opened.split == "val") & opened.present.any(axis=1)).sum())
    results: dict[str, list[float]] = {}
    for variant in VARIANTS[:last]:
        place = make(store, variant, folder / f"{name}_{len(results)}")
        results[variant.name] = [
            accuracy(demo, recipe, place, folder / f"run_{name}_{len(results)}_{seed}", seed)
            for seed in range(seeds)
        ]
        first = results[VARIANTS[0].name]
        mean, at_first = fmean(results[variant.name]), fmean(first)
        low, high = wilson_interval(round(at_first / 100 * clips), clips)
        inside = "yes" if 100 * low <= mean <= 100 * high else "NO"
        pairs = [a - b for a, b in zip(results[variant.name], first, strict=True)]
        error = stdev(pairs) / sqrt(seeds) if seeds > 1 else float("nan")
        share = token_bytes(place) / token_bytes(store)
        print(
            f"| {name} | {variant.name} | {share:.3f} | {mean:.1f} | "
            f"{100 * low:.1f} - {100 * high:.1f} ({clips} clips) | {inside} | "
            f"{fmean(pairs):+.1f} ± {error:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="a folder that `karmma demo` made")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", default="baseline_delta", help="of the demo: which training")
    parser.add_argument("--stores", nargs="+", default=["student"])
    parser.add_argument("--quick", action="store_true", help="float16 and int8 only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.recipe}, {options.seeds} seeds; accuracy: verb and noun right, %\n")
    head = ["store", "kept as", "bytes", "accuracy", "interval", "inside", "difference"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.stores:
            last = 2 if options.quick else len(VARIANTS)
            table(options.demo, name, options.recipe, options.seeds, last, Path(folder))


if __name__ == "__main__":
    main()
