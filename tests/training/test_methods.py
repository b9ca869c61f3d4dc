"""A method of one's own: the page's example, resumed after SIGKILL; losses, rules, refusals."""

import json
import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import ended, in_fork
from support.nth_call import kill_at_call
from support.tiny_store import write_store
from support.training import (
    SIZE,
    StopAt,
    baseline_recipe,
    fork_ranks,
    results,
    says,
    stopped_and_resumed,
    student_recipe,
    teacher_recipe,
)

import karmma_pipeline as km
from karmma_pipeline import config
from karmma_pipeline.errors import CheckpointError, ConfigError, StoppedError
from karmma_pipeline.evaluation.costs import subset_costs
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import distill, train_baseline, train_teacher

PAGE = Path(__file__).parents[2] / "docs/methods.md"

METHOD = '''
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, modalities, heads, size, dropout=0.0):
        super().__init__()
        inputs = sum(N * D for N, D in modalities.values())
        self.body = nn.Sequential(nn.Linear(inputs, size.dim), nn.GELU(), nn.Dropout(dropout))
        self.heads = nn.ModuleDict({head: nn.Linear(size.dim, C) for head, C in heads.items()})

    def forward(self, tokens, mask):
        x = self.body(torch.cat([of.flatten(1) for of in tokens.values()], dim=1))
        return {head: layer(x) for head, layer in self.heads.items()}


class Normed(Net):
    def __init__(self, modalities, heads, size):
        super().__init__(modalities, heads, size)
        self.norm = nn.BatchNorm1d(3)


class Wrong(Net):
    def forward(self, tokens, mask):
        return {"verb": torch.zeros(len(mask), 2)}


def entropy(batch, logits, teacher):
    """The built-in cross-entropy, where every label is known."""
    assert teacher is None
    return sum(F.cross_entropy(of, batch.labels[h]) for h, of in logits.items()) / len(logits)


def margin(batch, logits, teacher, weight=1.0):
    """Follows the teacher's logits, and notes how far it is."""
    distance = torch.stack([(of - teacher[h]).square().mean(1) for h, of in logits.items()]).mean(0)
    assert teacher.valid.all()
    labels = sum(F.cross_entropy(of, batch.labels[h]) for h, of in logits.items())
    return {"loss": labels + weight * distance.mean(), "distance": distance.mean()}


def constant(batch, logits, teacher):
    return torch.zeros(())


def vector(batch, logits, teacher):
    return logits["verb"].mean(1)


def half_mean(tokens, present, means):
    return {m: (of * 0 + means[m]) / 2 for m, of in tokens.items()}
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of one's own, whose name no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"method_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(METHOD)
    return tmp_path / f"{name}.py"


def kill_while_it_trains(recipe: BaselineRecipe) -> None:
    """Kill with SIGKILL as the second epoch's state is put into its place."""

    def work() -> None:
        kill_at_call(recipe.out, 2, "rename */state/*.pt*")
        train_baseline(recipe)

    assert in_fork(work) == -9
    assert (recipe.out / "last/model.json").is_file()


@pytest.mark.slow
def test_the_pages_method_works_word_for_word_and_goes_on_after_sigkill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from karmma_pipeline.cli import main

    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text("utf-8").partition("## A model and a loss in one file")[2]
    for kind, number, name in (("python", 0, "my_method.py"), ("yaml", 0, "my_method.yaml")):
        block = re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[number]
        assert block.startswith(f"# {name}")
        Path(name).write_text(block)
    write_store(Path("features/student"))
    recipe = config.load(BaselineRecipe, Path("my_method.yaml"), ["out=runs/whole"])
    train_baseline(recipe)
    kill_while_it_trains(recipe.model_copy(update={"out": Path("runs/mean_mlp")}))
    for line in re.findall(r"^karmma .*$", text, re.MULTILINE):
        result = CliRunner().invoke(main, line.split()[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert results(Path("runs/mean_mlp")) == results(Path("runs/whole"))
    report = json.loads(Path("report/results.json").read_text())
    assert report["runs"][0]["paper_size"] is False
    card = json.loads(Path("runs/mean_mlp/best/model.json").read_text())
    assert (card["model"], card["model_args"]) == ("my_method:MeanMLP", {"width": 64})
    assert set(card["code"]) == {"my_method:MeanMLP", "my_method:focal"}
    assert km.load_model("runs/mean_mlp").network.modalities == ("rgb", "flow", "audio")


def test_a_student_of_ones_own_learns_from_a_teacher_of_ones_own_by_a_loss_of_ones_own(
    store: Path, tmp_path: Path, project: Path
) -> None:
    own: dict[str, Any] = {"model": f"{project.stem}:Net"}
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=4, **own))
    mine = {
        **own,
        "model_args": {"dropout": 0.2},
        "objective": f"{project.stem}:margin",
        "objective_args": {"weight": 0.5},
        "ema": 0.8,
        "accumulate": 3,
        "modality_dropout": {"rate": {"rgb": 0.5}, "ramp_epochs": 2, "burst": 3},
    }
    whole, parts = (
        student_recipe(store, tmp_path / "teacher", tmp_path / n, epochs=3, **mine)
        for n in ("whole", "parts")
    )
    distill(whole)
    stopped_and_resumed(distill, parts, (6, 8), "run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    rows = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["train_distance"] < rows[0]["train_distance"]
    assert "train_kl" not in rows[0]
    assert distill(whole).already_done


def test_a_loss_of_ones_own_that_is_ours_trains_our_weights(
    store: Path, tmp_path: Path, project: Path
) -> None:
    """Whole and in parts of unequal size: what is returned is the mean over the clips."""
    train_teacher(teacher_recipe(store, tmp_path / "ours", epochs=2))
    objective = f"{project.stem}:entropy"
    for name, accumulate in (("own", 1), ("parts", 3)):
        train_teacher(
            teacher_recipe(
                store, tmp_path / name, epochs=2, objective=objective, accumulate=accumulate
            )
        )
        torch.testing.assert_close(
            says(tmp_path / name, store), says(tmp_path / "ours", store), rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
def test_two_ranks_train_a_method_of_ones_own_as_one_does(
    store: Path, tmp_path: Path, project: Path
) -> None:
    mine = {"model": f"{project.stem}:Net", "objective": f"{project.stem}:entropy"}
    one, two = (
        baseline_recipe(store, tmp_path / n, epochs=2, batch_size=17, **mine) for n in ("1", "2")
    )
    train_baseline(one)
    ranks = fork_ranks(partial(train_baseline, two), tmp_path / "log")
    assert [ended(rank) for rank in ranks] == [0, 0]
    torch.testing.assert_close(
        says(tmp_path / "2", store), says(tmp_path / "1", store), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "subprocess:Popen"},
            r"model='subprocess:Popen': belongs to Python's standard library",
        ),
        ({"model": "nowhere:Net"}, r"model='nowhere:Net': cannot be imported .*No module named"),
        ({"model": "{}:Nett"}, r"cannot be imported \(AttributeError"),
        ({"model": "{}:Net", "model_args": {"depth": 2}}, r"could not be built .*'depth'"),
        (
            {"model": "{}:Wrong"},
            r"returned \{'verb': \(4, 2\)\}; expected \{'noun': \(4, 3\), 'verb': \(4, 4\)",
        ),
        ({"model": "{}:entropy"}, "could not be built"),
        ({"model": "torch:from_numpy"}, "has no source file"),
        ({"model": "{}:Normed", "accumulate": 2}, "norm is a BatchNorm"),
        ({"objective": "{}:constant"}, "does not depend on the logits"),
        ({"objective": "{}:vector"}, "return a scalar tensor"),
        ({"objective": "{}:margin"}, r"failed on the first batch \(TypeError"),
        ({"size": {**SIZE, "absent": "{}:constant"}}, "failed on the first batch|size.absent"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_written(
    store: Path, tmp_path: Path, project: Path, changes: dict[str, Any], message: str
) -> None:
    text = json.dumps(changes).replace("{}:", f"{project.stem}:")
    with pytest.raises(ConfigError, match=message):
        train_baseline(baseline_recipe(store, tmp_path / "r", epochs=1, **json.loads(text)))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "late"}, "model='late': unknown; choose '', 'late_fusion'"),
        ({"objective": "focal"}, "objective='focal': unknown"),
        ({"model_args": {"a": 1}}, "without model"),
        ({"size": {"absent": "zero"}}, "absent='zero': unknown; choose 'learned', 'zeros'"),
    ],
)
def test_an_unknown_name_is_told_with_those_that_are_known(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        baseline_recipe(Path("s"), Path("r"), **changes)


def test_a_source_that_has_changed_is_told_and_not_trained_on(
    store: Path, tmp_path: Path, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = baseline_recipe(store, tmp_path / "r", epochs=3, model=f"{project.stem}:Net")
    with pytest.raises(StoppedError):
        train_baseline(recipe, StopAt(12))
    project.write_text(f"{METHOD}\n# another thought\n")
    with pytest.raises(
        CheckpointError, match=rf"started with model of .* but now uses {project.stem}:Net"
    ):
        train_baseline(recipe)
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path / "r/last")
    assert f"the source of {project.stem}:Net has changed since it was trained" in caplog.text
    project.write_text(METHOD)
    caplog.clear()
    train_baseline(recipe)
    load_model(tmp_path / "r/last")
    assert "has changed" not in caplog.text


def test_a_model_whose_architecture_is_not_there_is_refused(
    store: Path, tmp_path: Path, project: Path
) -> None:
    train_baseline(baseline_recipe(store, tmp_path / "r", epochs=1, model=f"{project.stem}:Net"))
    path = tmp_path / "r/best/model.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"model": "elsewhere:Net"}))
    with pytest.raises(CheckpointError, match=r"r/best: model='elsewhere:Net': cannot be imported"):
        km.load_model(tmp_path / "r")
    path.write_text(json.dumps({**card, "model": ""}))
    with pytest.raises(CheckpointError, match=r"does not match model\.json"):  # and not as ours
        km.load_model(tmp_path / "r")


def test_patterns_of_a_list_are_the_runs_and_their_content_decides(
    store: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "missing.csv"
    listed.write_text("clip_id,missing\nc001,rgb\nc002,rgb+flow\n")
    recipe = teacher_recipe(
        store, tmp_path / "r", epochs=2, modality_dropout={"patterns": str(listed)}
    )
    with pytest.raises(StoppedError):
        train_teacher(recipe, StopAt(6))
    moved = tmp_path / "moved.csv"
    moved.write_text("clip_id,missing\nc002,flow+rgb\nc001,rgb\n")  # the same, in other words
    train_teacher(
        teacher_recipe(store, tmp_path / "r", epochs=2, modality_dropout={"patterns": str(moved)})
    )
    moved.write_text("clip_id,missing\nc001,audio\n")
    with pytest.raises(CheckpointError, match=r"started with patterns of .* now .*moved\.csv"):
        train_teacher(
            teacher_recipe(
                store, tmp_path / "r", epochs=2, modality_dropout={"patterns": str(moved)}
            )
        )


@pytest.mark.parametrize("rule", ["mean", "half_mean"])
def test_what_stands_for_an_absent_modality_is_what_the_rule_says(
    store: Path, tmp_path: Path, project: Path, rule: str
) -> None:
    """Against numpy: the mean training token at each place, put in by hand, as if present."""
    name = rule if rule == "mean" else f"{project.stem}:half_mean"
    train_baseline(baseline_recipe(store, tmp_path / "r", epochs=1, size={**SIZE, "absent": name}))
    model, _ = load_model(tmp_path / "r/best")
    opened = FeatureStore.open(store)
    train = (opened.split == "train") & opened.present[:, 0]
    every = torch.arange(len(opened))
    rgb = opened.gather("rgb", every[torch.from_numpy(train)]).double()
    index = torch.arange(5, 15)
    tokens = {m: opened.gather(m, index) for m in opened.modalities}
    mask = torch.from_numpy(opened.present[5:15].copy())
    with torch.inference_mode():
        absent = mask.clone()
        absent[:, 0] = False
        said = model(tokens, absent)
        mean = rgb.mean(dim=0).float()
        if rule == "half_mean":  # of the standardised tokens
            mean = (mean + rgb.flatten(0, 1).mean(dim=0).float()) / 2
        filled = {**tokens, "rgb": mean.expand(10, -1, -1)}
        wanted = model(filled, mask)
    for head in said:
        torch.testing.assert_close(said[head], wanted[head], rtol=1e-4, atol=1e-4)
    assert read_card(tmp_path / "r/best").size.absent == name


def test_late_fusion_is_the_average_of_models_that_see_one_modality_each(
    store: Path, tmp_path: Path
) -> None:
    for average in ("logits", "probabilities"):
        run = tmp_path / average
        recipe = baseline_recipe(
            store, run, epochs=1, model="late_fusion", model_args={"average": average}
        )
        train_baseline(recipe)
        model, _ = load_model(run / "best")
        opened = FeatureStore.open(store)
        index = torch.arange(8)
        tokens = {m: opened.gather(m, index) for m in opened.modalities}
        mask = torch.from_numpy(opened.present[:8].copy())
        mask[3:6, 0] = False
        mask[7] = False
        with torch.inference_mode():
            both = model(tokens, mask)
            alone = []
            for column in range(3):
                one = torch.zeros_like(mask)
                one[:, column] = mask[:, column]
                alone.append(model(tokens, one))
        for head, of in both.items():
            parts = torch.stack([answer[head] for answer in alone])
            if average == "probabilities":
                parts = parts.softmax(dim=2)
            share = mask.T[..., None]
            mean = (parts * share).sum(0) / share.sum(0).clamp(min=1)
            given = of.softmax(dim=1) if average == "probabilities" else of
            torch.testing.assert_close(given[:7], mean[:7])
            assert (of[7] == 0).all()


def test_costs_are_those_of_the_model_that_is_named(project: Path) -> None:
    choice = BackboneChoice(name="resnet18", weights="random:0", image=(64, 64))
    size = FusionSize(dim=16, layers=1, attention_heads=2, ffn_width=16, head_width=16)
    heads = {"verb": 4, "noun": 3}
    networks = {"rgb": choice, "audio": choice}
    own = subset_costs(networks, size, heads, f"{project.stem}:Net")
    N, D = choice.output_shape
    flops = 2 * (2 * N * D * 16 + 16 * 7)
    parameters = 2 * N * D * 16 + 16 + 16 * 7 + 7
    ours = subset_costs(networks, size, heads)
    fusion = {cost.modalities: cost for cost in ours}
    backbone = (own[0].gflops * 1e9 - flops) / 2
    assert own[1].gflops * 1e9 == pytest.approx(backbone + flops)
    assert own[0].gflops == own[0].gflops_as_run
    late = {cost.modalities: cost for cost in subset_costs(networks, size, heads, "late_fusion")}
    assert late["rgb",].gflops == fusion["rgb",].gflops
    alone = fusion["rgb",].gflops * 1e9 - backbone
    assert late["rgb", "audio"].gflops * 1e9 == pytest.approx(2 * (backbone + alone))
    assert own[0].parameters - own[1].parameters == own[1].parameters - parameters
