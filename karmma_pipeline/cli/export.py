"""`karmma export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True,
              help="Output folder; an existing export in it is replaced.")  # fmt: skip
@click.option("--store", "stores", multiple=True, type=click.Path(path_type=Path),
              help="Feature store for the accuracies on the model card; repeatable. "
              "Default: the run's stores, if present.")  # fmt: skip
@click.option("--int8", is_flag=True, help="Quantise to int8: smaller, faster, less accurate.")
@click.option("--clips", type=click.Path(path_type=Path),
              help="Labelled manifest on which to evaluate --int8, end to end.")  # fmt: skip
@click.option("--weights", multiple=True, metavar="MODALITY=FILE",
              help="Path of a backbone's weights, if they moved; repeatable.")  # fmt: skip
def export(
    run: Path,
    out: Path,
    stores: tuple[Path, ...],
    int8: bool,
    clips: Path | None,
    weights: tuple[str, ...],
) -> None:
    """Export a trained model to ONNX.

    Writes a file per backbone, one for the fusion model, export.json and a model card (README.md).
    `karmma predict` and `karmma live` load the folder on any machine, without the run, its store or
    PyTorch weights. Nothing is written if logits differ from PyTorch's by more than 1e-4 on any
    subset of modalities.
    """
    from karmma_pipeline.cli.options import finish
    from karmma_pipeline.modalities import legend
    from karmma_pipeline.recognition.backbones import parse_weights
    from karmma_pipeline.recognition.export import export_model

    made = export_model(
        run, out, stores=stores, int8=int8, clips=clips, weights=parse_weights(weights)
    )
    megabytes = sum((made.folder / name).stat().st_size for name in made.card.files) / 1e6
    found = made.card.measured
    letters = legend(made.card.model.modalities)
    click.echo("per subset of modalities" + (f" ({letters}):" if letters else ":"))
    for subset, ms in found["latency"]["ms"].items():
        gap = found["difference"][subset]
        click.echo(
            f"{subset}: p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms, "
            f"largest logit difference from PyTorch {gap:.1e}"
        )
    if made.verdict:
        click.echo(f"int8: {made.verdict}")
    finish(
        f"exported: {made.folder}, {len(made.card.files)} files, {megabytes:.0f} MB",
        then=f"karmma predict {made.folder} VIDEO",
    )
