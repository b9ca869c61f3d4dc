import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.cli.init import STAGES
from karmma_pipeline.recipes import recipe_model
from karmma_pipeline.store import FeatureStore


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def every_command(
    command: click.Command = main, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    yield words
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from every_command(below, (*words, name))


@pytest.mark.parametrize("words", list(every_command()), ids=" ".join)
def test_help_fits_80_columns_and_cuts_no_summary(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*words, "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "\\b" not in result.output
    summaries = result.output.partition("Commands:\n")[2]
    assert "..." not in summaries


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "sample", "extract", "train-teacher", "distill", "evaluate", "store"):
        assert f"\n  {command}" in result.output


@pytest.mark.parametrize("stage", STAGES)
def test_init_writes_a_recipe_that_parses(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    written = run("init", stage, "--out", path)
    assert written.exit_code == 0
    assert re.search(rf"^next: karmma [a-z-]+ .*{re.escape(str(path))}$", written.output, re.M)
    config.load(recipe_model(stage), path)
    assert path.read_text() in run("init", stage).output + "\n"
    again = run("init", stage, "--out", path)
    assert again.exit_code == 2
    assert "the file exists" in again.output


def test_a_wrong_recipe_is_exit_code_2_and_one_sentence(tmp_path: Path) -> None:
    result = run("extract", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "karmma init" in result.output
    (tmp_path / "r.yaml").write_text("stroe: x\nout: y\n")
    result = run("train-teacher", tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert "stroe: unknown key, did you mean 'store'?" in result.output
    assert "Traceback" not in result.output


def test_check_prints_the_resolved_recipe_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"store: {tmp_path}/s\nout: {tmp_path}/run\n")
    switches = ["--set", "optimiser.lr=3e-4", "--stage", tmp_path / "it's: #1"]
    result = run("train-teacher", tmp_path / "r.yaml", "--check", *switches)
    assert result.exit_code == 0
    assert "lr: 0.0003" in result.output
    resolved = config.parse_yaml(result.output, "")
    assert resolved["loader"]["stage"] == str(tmp_path / "it's: #1")
    assert not (tmp_path / "run").exists()


def test_a_missing_store_is_exit_code_1(tmp_path: Path) -> None:
    result = run("store", "info", tmp_path)
    assert result.exit_code == 1
    assert "no feature store found" in result.output


def test_of_a_relative_path_it_is_said_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "project/teacher.yaml"
    recipe.parent.mkdir()
    recipe.write_text("store: features\nout: run\n")
    monkeypatch.chdir(tmp_path)  # beside the recipe's folder, not in it
    for words, message in (
        (["train-teacher", recipe], f"features: no feature store found in {tmp_path};"),
        (["train-teacher", "nope.yaml"], f"(No such file or directory in {tmp_path});"),
        (["evaluate", "runs/x"], f"runs/x: no trained model found in {tmp_path}."),
    ):
        assert message in run(*words).output


def test_store_commands_tell_whole_from_damaged(tmp_path: Path) -> None:
    root = write_store(tmp_path / "s", clips=8)
    assert "clips: 8" in run("store", "info", root).output
    assert "whole" in run("store", "verify", root).output
    assert run("store", "finalize", root).exit_code == 0
    shard = root / "rgb/tokens/c/0/0"
    data = bytearray(shard.read_bytes())
    data[16_384] ^= 1
    shard.write_bytes(data)
    result = run("store", "verify", root)
    assert result.exit_code == 1
    assert "shard 0 rgb: checksum mismatch: c000" in result.output


def test_backbones_are_listed_and_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torchvision's files are named by the first digits of their sha256, the hub's by all of it."""
    fetched = tmp_path / "hub/models--facebook--dinov2-base"
    (fetched / "blobs").mkdir(parents=True)
    (fetched / "blobs" / ("ab12" * 16)).touch()
    (fetched / "snapshots/1").mkdir(parents=True)
    (fetched / "snapshots/1/model.safetensors").symlink_to(f"../../blobs/{'ab12' * 16}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    listed = [" ".join(line.split()) for line in run("backbones", "list").output.splitlines()]
    assert "swin3d_t video 27.9 M KINETICS400_V1 (sha256 7615ae03)" in listed
    assert "hf:facebook/dinov2-base video Apache-2.0, sha256 ab12ab12" in listed
    assert "hf:MCG-NJU/videomae-base video CC BY-NC 4.0 (non-commercial), not fetched" in listed
    shown = run("backbones", "show", "swin3d_t", "--set", "frames=32", "--set", "tokens=[12,5,5]")
    assert "tokens: 300" in shown.output
    assert "gflops: 175.527" in shown.output
    assert "width: 18" in run("backbones", "show", "windows", "--set", "series=[16,6,3]").output


def completed(monkeypatch: pytest.MonkeyPatch, *words: str, of: str = "bash") -> list[str]:
    """Return what a shell is given for the last of these words."""
    monkeypatch.setenv("COMP_WORDS", "\n".join(["karmma", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    done = CliRunner().invoke(main, prog_name="karmma", env={"_KARMMA_COMPLETE": f"{of}_complete"})
    return done.output.split()


def test_names_of_networks_complete_in_the_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bash hands over `timm:NAME` and `key=NAME` in pieces, and replaces the last of them."""
    for owner, name in (("timm", "vit_mine.tag"), ("facebook", "fetched")):
        (tmp_path / f"hub/models--{owner}--{name}").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    show = ("backbones", "show")
    assert completed(monkeypatch, *show, "s3") == ["plain,s3d"]
    assert completed(monkeypatch, *show, "timm", ":", "vit_m") == ["plain,vit_mine.tag"]
    assert "plain,facebook/fetched" in completed(monkeypatch, *show, "hf", ":")
    assert completed(monkeypatch, "backbones", "fetch", "r2p") == ["plain,r2plus1d_18"]
    key = ("extract", "r.yaml", "--set", "sets.a.rgb.name", "=")
    assert completed(monkeypatch, *key, "r2p") == ["plain,r2plus1d_18"]
    assert completed(monkeypatch, *key, "hf", ":", "facebook/f") == ["plain,facebook/fetched"]
    assert completed(monkeypatch, "extract", "r.yaml", "--set", "out", "=", "r2p") == []
    assert completed(monkeypatch, *show, "timm:vit_m", of="zsh")[1] == "timm:vit_mine.tag"


def test_a_completion_imports_neither_torch_nor_numpy() -> None:
    words = {"COMP_WORDS": "karmma backbones show s", "COMP_CWORD": "3"}
    program = "from karmma_pipeline.cli import main; main(prog_name='karmma')"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env={**os.environ, **words, "_KARMMA_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "plain,s3d" in done.stdout
    for heavy in ("torch", "timm", "numpy", "pydantic"):
        assert f" {heavy}" not in done.stderr


def test_the_program_answers_help_without_loading_networks() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "karmma_pipeline.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " torch" not in done.stderr
    assert " numpy" not in done.stderr


LIGHT = """
import os, sys
from karmma_pipeline.cli import main
{before}
try:
    main({arguments!r})
except SystemExit as end:
    print(end.code, sorted({{"torch", "torchvision", "av", "zarr"}} & {{*sys.modules}}))
"""


def light(*arguments: Any, cwd: Path, before: str = "") -> tuple[str, str]:
    """Run a command; return its code with the heavy libraries that it loaded, and what it said."""
    code = LIGHT.format(arguments=[str(a) for a in arguments], before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd
    )
    return done.stdout.splitlines()[-1], done.stderr.strip() or done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of recipes; nothing has been made with them but the student's store."""
    root = tmp_path_factory.mktemp("project")
    (root / "videos.csv").write_text("clip_id,video\n")
    arguments = ["init", "project", root, "--manifest", root / "videos.csv"]
    assert run(*arguments).exit_code == 0
    assert "videos.csv: no such file" not in run(*arguments).output
    assert "the file exists" in run(*arguments).output
    write_store(root / "features/student", clips=8)
    (root / "videos.csv").unlink()
    return root


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("extract none.yaml", 2, "none.yaml: the recipe cannot be read"),
        ("extract extract.yaml", 1, "videos.csv: no such file"),
        ("train-teacher teacher.yaml", 1, "features/teacher: no feature store found"),
        ("train-teacher student.yaml", 2, "student.yaml is a recipe for karmma distill."),
        ("extract teacher.yaml", 2, "teacher.yaml is a recipe for karmma train-teacher or"),
        ("distill evaluation.yaml", 2, "evaluation.yaml is a recipe for karmma evaluate."),
        (
            "train-baseline baseline.yaml --set store=features",
            1,
            "features: not a feature store, but it contains the stores student.",
        ),
        ("distill student.yaml", 1, "features/teacher: no feature store found"),
        (
            "distill student.yaml --set teacher_store=features/student",
            1,
            "runs/teacher: no trained model found",
        ),
        ("evaluate runs/nope", 1, "runs/nope: no trained model found"),
        ("train-baseline baseline.yaml --set out=videos/run", 1, "videos is a file"),
        ("extract extract.yaml --check", 0, "sets:"),
        ("distill student.yaml --check --set val_split=", 0, "val_split: ''"),
        ("init train-teacher", 0, "modality_dropout"),
        ("store info features/student", 0, "clips: 8"),
    ],
)
def test_checks_come_before_torch(folder: Path, arguments: str, code: int, message: str) -> None:
    (folder / "videos").touch()
    ended, said = light(*arguments.split(), cwd=folder)
    if "videos is a file" in message:
        code = 2
    assert message in " ".join(said.split())
    assert ended == f"{code} []"


def test_a_folder_without_rights_is_told_before_torch(folder: Path) -> None:
    ended, said = light(
        *("train-baseline", "baseline.yaml"),
        cwd=folder,
        before="os.access = lambda path, mode: mode == os.R_OK",
    )
    assert "cannot be written (Permission denied)" in " ".join(said.split())
    assert ended == "1 []"


@pytest.mark.parametrize(
    ("wrong", "right"), [("trian", "train-"), ("extarct", "extract"), ("store verfy", "verify")]
)
def test_an_unknown_command_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    result = run(*wrong.split())
    assert result.exit_code == 2
    assert f"Did you mean '{right}" in result.output


def test_help_uses_a_wide_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "karmma_pipeline.cli", "extract", "--help"],
        env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 80 < max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("words", ["init train-teacher", "--help", "store info --help"])
def test_output_that_cannot_be_written_is_one_line(words: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "karmma_pipeline.cli", *words.split()],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "Error: the output could not be written (No space left on device).\n"


def test_a_file_that_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"store: {store}\nout: {tmp_path / ('x' * 300)}\n")
    result = run("train-teacher", recipe)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("xxx: File name too long.")


def test_an_interrupt_during_imports_is_one_line_and_code_75(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("")
    interrupt = (
        "import karmma_pipeline.config as config, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background\n"
        "config.read = lambda path: signal.raise_signal(signal.SIGINT)"
    )
    ended, said = light("extract", "r.yaml", cwd=tmp_path, before=interrupt)
    assert ended == "75 []"
    assert said == "Error: stopped by SIGINT; run the same command again."


def test_a_missing_weights_file_is_an_error() -> None:
    result = run("backbones", "show", "s3d", "--set", "weights=missing.pt")
    assert result.exit_code == 1
    assert "missing.pt: no such weights file" in result.output


def test_features_of_another_program_are_imported_as_they_were_exported(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", clips=12, dtype="float32")
    assert run("store", "export", store, tmp_path / "files").exit_code == 0
    arguments = ["store", "import", tmp_path / "files", tmp_path / "t", "--dtype", "float32"]
    assert "Missing option '--source'" in run(*arguments).output
    result = run(*arguments, "--source", "synthetic, seed 0")
    assert result.exit_code == 0, result.output
    assert "audio: 9 clips" in result.output
    one, other = (FeatureStore.open(tmp_path / name) for name in ("s", "t"))
    assert other.clip_ids.tolist() == one.clip_ids.tolist()
    assert other.split.tolist() == one.split.tolist()
    assert other.provenance["rgb"] == {"source": "synthetic, seed 0"}
    for head in one.heads:
        names = [[s.heads[head][k] for k in s.labels[head]] for s in (one, other)]
        assert names[0] == names[1]
    assert np.array_equal(one.present, other.present)
    for modality in one.modalities:
        here = one.present[:, one.modalities.index(modality)]
        clip = one.clip_ids[here][-1]
        assert np.array_equal(one.tokens(modality, clip), other.tokens(modality, clip))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 5)), "the first file of imu has [2, 4]"),
        (np.full((2, 4), np.nan), "not finite"),
        (np.array([{"a": 1}]), "does not contain a numeric array"),
        (np.zeros((1, 2, 4)), "expected [N, D] or [D]"),
    ],
)
def test_a_wrong_feature_file_is_named(tmp_path: Path, array: Any, message: str) -> None:
    (tmp_path / "f/imu").mkdir(parents=True)
    np.save(tmp_path / "f/imu/a.npy", np.zeros((2, 4)))
    np.save(tmp_path / "f/imu/b.npy", array)
    (tmp_path / "f/clips.csv").write_text("clip_id,action\na,run\nb,\n")
    result = run("store", "import", tmp_path / "f", tmp_path / "s", "--source", "x")
    assert result.exit_code == 1
    assert "imu/b.npy" in result.output
    assert message in " ".join(result.output.split())


def test_imported_labels_are_not_called_as_their_composite(tmp_path: Path) -> None:
    (tmp_path / "f/imu").mkdir(parents=True)
    np.save(tmp_path / "f/imu/a.npy", np.zeros((2, 4)))
    (tmp_path / "f/clips.csv").write_text("clip_id,verb,action\na,run,run home\n")
    result = run("store", "import", tmp_path / "f", tmp_path / "s", "--source", "x")
    assert result.exit_code == 1
    assert "clips.csv: head 'action': with several heads" in result.output


def test_a_store_without_labels_is_exported_for_actionformer(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", clips=8, heads={"action": ()})
    result = run("store", "export", store, tmp_path / "out", "--layout", "actionformer")
    assert result.exit_code == 0, result.output
    assert '"annotations": []' in (tmp_path / "out/action.json").read_text()
