"""The ``karmma`` command: load a recipe, call a function, print where the result is.

Stages are imported inside the commands, so that ``karmma --help`` answers at once.
"""

import sys

try:
    import click

    from karmma_pipeline import __version__
    from karmma_pipeline.cli.batch import status, submit, sweep
    from karmma_pipeline.cli.demo import demo, sample
    from karmma_pipeline.cli.evaluate import costs, evaluate
    from karmma_pipeline.cli.export import export
    from karmma_pipeline.cli.extract import backbones, extract, plan
    from karmma_pipeline.cli.init import init
    from karmma_pipeline.cli.live import live
    from karmma_pipeline.cli.options import Commands
    from karmma_pipeline.cli.predict import predict
    from karmma_pipeline.cli.store import store
    from karmma_pipeline.cli.train import distill, train_baseline, train_teacher
except KeyboardInterrupt:  # Ctrl-C at once: before `main`, which says the same, is there
    sys.stderr.write("Error: stopped by SIGINT; run the same command again.\n")
    sys.exit(75)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    # Click keeps the line breaks of a paragraph that a backspace opens.
    epilog="""\b
Exit codes: 0 success, 1 error, 2 usage or recipe error, 3 finished but too
many clips failed, 75 stopped by a signal (run the same command again).""",
)
@click.version_option(__version__, prog_name="karmma")
def main() -> None:
    """Action recognition under missing modalities: extract, train, evaluate.

    Extract tokens from clips once (extract), train on them many times (train-teacher, distill),
    report accuracy with missing modalities (evaluate). Start with `karmma demo`.
    """
    if sys.platform != "linux":
        raise click.ClickException(f"karmma runs on Linux only, not on {sys.platform}.")


for _command in (
    demo,
    sample,
    plan,
    extract,
    store,
    train_teacher,
    train_baseline,
    distill,
    evaluate,
    predict,
    live,
    export,
    sweep,
    submit,
    status,
    costs,
    init,
    backbones,
):
    main.add_command(_command)
