from collections.abc import Iterator

import pytest

from karmma_pipeline.evaluation.report import figures


@pytest.fixture(scope="module")
def one_kind_of_figures() -> Iterator[None]:
    """Render what the page shows alone: most of a small evaluation's time goes into the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "KINDS", ("svg",))
        yield
