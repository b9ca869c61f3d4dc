"""Pages that are made when the site is built: every recipe key, and files of the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPIED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for page, path in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text("utf-8")))
    files.append(File.generated(config, "recipe_reference.md", content=recipe_reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to files of the repository lead to their pages."""
    for page, path in COPIED.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(path)}(?=[)#])", f"]({page}", markdown)
    return re.sub(r"\]\((\.\./)?docs/", "](", markdown)


def recipe_reference() -> str:
    """Return every key of every recipe, as `karmma init` prints them, generated from the models."""
    from karmma_pipeline import config
    from karmma_pipeline.cli.init import STAGES
    from karmma_pipeline.recipes import recipe_model

    text = "# Recipe reference\n\nEvery key and its default, as `karmma init STAGE` prints them.\n"
    for stage, (use, what) in STAGES.items():
        text += f"\n## {stage}\n\nFor `{use}`: {what}.\n\n"
        text += f"```yaml\n{config.template(recipe_model(stage))}```\n"
    return text
