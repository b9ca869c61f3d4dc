"""One table of where a chain stands: what lies on disk, what is in the queue, what went wrong."""

from collections import Counter
from collections.abc import Sequence

from karmma_pipeline.batch.chain import Work, job_name
from karmma_pipeline.batch.local import last_line
from karmma_pipeline.batch.progress import Progress
from karmma_pipeline.batch.recipe import Chain
from karmma_pipeline.batch.slurm import FINISH, Queued


def table(
    chain: Chain, works: Sequence[Work], progresses: Sequence[Progress], queued: Sequence[Queued]
) -> str:
    """Return one line per stage, and for a stage that is not at work the end of its log."""
    rows = [
        (work.name, _state(chain, work, found, queued), found.text)
        for work, found in zip(works, progresses, strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = []
    for (name, state, text), found in zip(rows, progresses, strict=True):
        lines.append(f"{name:{widths[0]}}  {state:{widths[1]}}  {text}".rstrip())
        said = found.fault or (_said(chain, name) if state == "not at work" else "")
        if said:
            lines.append(f"{'':{widths[0]}}  {said}")
    return "\n".join(lines)


def _state(chain: Chain, work: Work, found: Progress, queued: Sequence[Queued]) -> str:
    if found.done:
        return "too many clips failed" if found.fault else "done"
    names = {job_name(chain, work.name), job_name(chain, work.name, FINISH)}
    states = Counter(q.state.lower() for q in queued if q.name in names)
    if states:
        return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return "not at work"


def _said(chain: Chain, stage: str) -> str:
    logs = (chain.folder / "logs").glob(f"{stage}.*log")
    newest = max(logs, key=lambda log: log.stat().st_mtime_ns, default=None)
    return f"{newest} ends with: {last_line(newest)}" if newest else ""
