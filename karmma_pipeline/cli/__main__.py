"""``python -m karmma_pipeline.cli``."""

from karmma_pipeline.cli import main

main()
