"""An exported model says what its run says, by itself; what is not sound is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from support.hub import serving
from support.live import tiny_recognizer, tiny_run
from support.media_files import write_video
from torch import Tensor, nn

import karmma_pipeline as km
from karmma_pipeline.cli import main
from karmma_pipeline.data.sample import write_sample
from karmma_pipeline.errors import CheckpointError
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.files import sha256
from karmma_pipeline.modalities import subsets
from karmma_pipeline.models.architectures import build_model
from karmma_pipeline.models.backbones import registry
from karmma_pipeline.models.backbones.onnx_networks import OnnxFile, OnnxSession
from karmma_pipeline.models.exported import ExportedModel, OnnxFusion, open_model
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.recipes import project
from karmma_pipeline.recognition import export_checks, tracing
from karmma_pipeline.recognition.export import export_model
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.training.stages import train_baseline

pytestmark = pytest.mark.extra
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SMALL = FusionSize(dim=8, layers=1, attention_heads=2, ffn_width=8, head_width=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a video, a run, and its model exported."""
    root = tmp_path_factory.mktemp("export")
    write_video(root / "video.mp4", seconds=4, click_s=1.5, pan_px_s=20)
    tiny_run(root / "run")
    export_model(root / "run", root / "exported")
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """Return the exported model in another place."""
    return Path(shutil.copytree(root / "exported", tmp_path / "elsewhere"))


def said(recognizer: Recognizer, video: Path, *without: str) -> list[dict[str, Any]]:
    windows = recognizer.video(video, window_s=2, hop_s=1, without=without, workers=0)
    return [{"mask": one.mask, **one.logits} for one in windows]


def test_it_says_what_the_run_says_without_it(root: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    made = export_model(run, tmp_path / "made")
    assert made.difference <= 1e-4
    assert made.verdict == ""
    wanted = Recognizer.load(run, "cpu")
    folder = shutil.move(tmp_path / "made", tmp_path / "moved")
    answers = {s: said(wanted, root / "video.mp4", *s) for s in ((), ("audio",), ("rgb", "flow"))}
    shutil.rmtree(run)
    recognizer = Recognizer.load(folder)
    assert recognizer.notes == []
    for left_out, windows in answers.items():
        for here, there in zip(
            said(recognizer, root / "video.mp4", *left_out), windows, strict=True
        ):
            assert here["mask"] == there["mask"]
            for head in ("verb", "noun"):
                np.testing.assert_allclose(here[head], there[head], atol=1e-4)


def test_a_backbone_is_not_run_where_its_modality_is_absent(
    root: Path, tmp_path: Path, copy: Path
) -> None:
    silent = write_video(tmp_path / "silent.mp4", seconds=2, sound=False)
    recognizer = Recognizer.load(copy)
    ran = []
    for network in recognizer.networks.all.values():
        net: Any = network.backbone.net
        net.register_forward_hook(lambda net, *_: ran.append(net.session.file.path.stem))
    (answer,) = recognizer.video(silent, workers=0)
    assert answer.reasons == {"audio": "no_stream"}
    assert set(ran) == {"rgb"}


def test_live_and_predict_take_the_folder(root: Path, copy: Path, tmp_path: Path) -> None:
    def lines(model: Path, *words: object) -> list[str]:
        result = CliRunner().invoke(main, [str(w) for w in (words[0], model, *words[1:])])
        assert result.exit_code == 0, result.output
        return [line for line in result.stdout.splitlines() if " s: " in line]

    video = root / "video.mp4"
    live = ("live", "--source", video, "--fast", "--window", 2, "--hop", 1, "--without", "flow")
    assert lines(copy, *live) == lines(root / "run", *live) != []
    predict = ("predict", video, "--stop", 2, "--out", tmp_path / "answers")
    assert lines(copy, *predict) == lines(root / "run", *predict) != []


def test_it_is_loaded_as_a_model(root: Path, copy: Path) -> None:
    model = km.load_model(copy)
    assert isinstance(model, ExportedModel)
    run = km.load_model(root / "run")
    tokens = {m: torch.randn(7, *shape) for m, shape in model.card.modalities.items()}
    mask = torch.tensor([[m in subset for m in model.network.modalities]
                         for subset in subsets(model.network.modalities)])  # fmt: skip
    with torch.inference_mode():
        here, there = model.network(tokens, mask), run.network(tokens, mask)
        tokens["rgb"][~mask[:, model.network.modalities.index("rgb")]] = torch.nan
        blind = model.network(tokens, mask)
    for head, logits in there.items():
        torch.testing.assert_close(here[head], logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(blind[head], here[head], atol=0, rtol=0)


def test_files_and_card_say_what_they_are(copy: Path) -> None:
    export = json.loads((copy / "export.json").read_text())
    assert export["opset"] == tracing.OPSET
    assert sorted(export["files"]) == ["backbones/audio.onnx", "backbones/rgb.onnx", "fusion.onnx"]
    assert export["backbones"]["flow"]["file"] == "backbones/rgb.onnx"
    fusion = onnx.load(copy / "fusion.onnx")
    about = json.loads({p.key: p.value for p in fusion.metadata_props}["karmma"])
    assert about == {
        "modalities": ["rgb", "flow", "audio"],
        "heads": {"noun": ["cup", "pan"], "verb": ["take", "put", "wash"]},
    }
    video = onnx.load(copy / "backbones/rgb.onnx")
    about = json.loads({p.key: p.value for p in video.metadata_props}["karmma"])
    assert about["transform"]["crop"] == [16, 16]
    assert about["sampling"]["mode"] == "uniform"
    text = (copy / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "karmma-pipeline"
    assert "| V+F+A |" in text
    assert "Accuracy was not measured" in text


RULES: tuple[dict[str, Any], ...] = ({}, *({"absent": name} for name in ("zeros", "mean", "drop")))
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{of.get('absent', 'learned')}": ("", {}, of) for of in RULES},
    "attentive": ("", {}, {"pool": "attentive"}),
    "attentive, drop": ("", {}, {"pool": "attentive", "absent": "drop"}),
    "late": ("late_fusion", {}, {}),
    "late, probabilities": ("late_fusion", {"average": "probabilities"}, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_every_model_answers_every_subset_of_a_mixed_batch(case: str, tmp_path: Path) -> None:
    name, arguments, changes = MODELS[case]
    shapes, heads = {"rgb": (3, 6), "imu": (2, 4), "audio": (5, 2)}, {"verb": 4, "mask": 3}
    size = SMALL.model_copy(update=changes)
    model = build_model(name, arguments, size, shapes, heads).eval()
    for m, (_, width) in shapes.items():
        model.standardise(m, torch.randn(width), torch.rand(width) + 0.5)
    card = ModelCard(
        kind="student", name="x", size=size, modalities=shapes, provenance={}, store_digest="0",
        heads={head: tuple("abcd"[:C]) for head, C in heads.items()},
    )  # fmt: skip
    tracing.write_fusion(tmp_path, model, card)
    path = tmp_path / "fusion.onnx"
    exported = OnnxFusion(card, OnnxFile(path, sha256(path)))
    mask = torch.tensor([[m in subset for m in model.modalities]
                         for subset in subsets(model.modalities)])  # fmt: skip
    tokens = {m: torch.randn(len(mask), *shape) for m, shape in shapes.items()}
    with torch.inference_mode():
        here = exported(tokens, mask)
        for row in range(len(mask)):
            alone = model({m: of[row : row + 1] for m, of in tokens.items()}, mask[row : row + 1])
            for head, logits in alone.items():
                torch.testing.assert_close(here[head][row], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "wanted"), [(16, 12), (7, 5), (4, 4), (3, 1)])
def test_pooling_is_the_mean_of_the_places_that_a_token_covers(size: int, wanted: int) -> None:
    matrix = tracing._averages(size, wanted)
    for token in range(wanted):
        first, last = token * size // wanted, -(-(token + 1) * size // wanted)
        column = torch.zeros(size)
        column[first:last] = 1 / (last - first)
        torch.testing.assert_close(matrix[:, token], column)


class ChannelsLast(nn.Module):
    """Says an axis from the end, as networks do that keep their channels there."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1).contiguous().flatten(2)


def test_axes_that_are_counted_from_the_end(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 3, 4, 5)
    tracing._trace(path, ChannelsLast(), {"input": x}, ["tokens"], {})
    session = OnnxSession(OnnxFile(path, sha256(path)))
    (found,) = session({"input": x[:1].numpy()}).values()
    np.testing.assert_array_equal(found, x[:1].permute(0, 3, 1, 2).flatten(2).numpy())


class Moody(nn.Module):
    """Looks at values: a graph that is traced with one clip is wrong for another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        sums = tokens["rgb"].sum(dim=(1, 2)) * self.weight
        sums = sums + 1 if bool(mask.all()) else sums - 1
        return {"verb": sums[:, None].expand(-1, 3), "noun": sums[:, None].expand(-1, 2)}


def moody(modalities: Any, heads: Any) -> nn.Module:
    return Moody()


def test_a_model_that_strays_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = tiny_recognizer()
    card = made.card.model_copy(update={"model": "test_export:moody"})
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", card.build(), card)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"differ from PyTorch's by 2\.0e\+00.*1e-04|0\.0001"):
        export_model(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    assert not any((tmp_path / "out").iterdir())


def test_what_was_changed_is_refused(copy: Path) -> None:
    path = copy / "backbones/audio.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"audio\.onnx: changed or damaged"):
        Recognizer.load(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"audio\.onnx: cannot be read"):
        Recognizer.load(copy)
    (copy / "fusion.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"fusion\.onnx: changed or damaged"):
        km.load_model(copy)
    (copy / "export.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"export\.json: is damaged \(expected a mapping"):
        km.load_model(copy)


@pytest.fixture
def of_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run whose backbones are a VideoMAE and an AST of transformers and a ViT of timm."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16, "patch_size": 16}  # fmt: skip
    side = {"height": 32, "width": 32}
    mae = library.VideoMAEConfig(**sizes, image_size=32, num_frames=4)
    library.VideoMAEModel(mae).save_pretrained(tmp_path / "mae")
    crop = library.VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    crop.save_pretrained(tmp_path / "mae")
    bands = {"max_length": 64, "num_mel_bins": 32}
    library.ASTModel(library.ASTConfig(**sizes, **bands)).save_pretrained(tmp_path / "ast")
    library.ASTFeatureExtractor(**bands).save_pretrained(tmp_path / "ast")
    choices = {
        "rgb": {"name": f"hf:{tmp_path / 'mae'}", "frames": 8, "tokens": [3, 2, 2]},
        "flow": {"name": "timm:test_vit.r160_in1k", "weights": "random:1", "frames": 2},
        "audio": {"name": f"hf:{tmp_path / 'ast'}", "class_tokens": "keep"},
    }
    recognizer = tiny_recognizer(sets={"model": choices})
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", recognizer.model, recognizer.card)
    return tmp_path / "run"


def test_networks_of_transformers_and_timm_need_neither(
    root: Path, of_libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recognizer.load(of_libraries, "cpu")
    wanted = [said(run, root / "video.mp4", *left_out) for left_out in ((), ("rgb",))]
    folder = of_libraries.with_name("exported")
    assert export_model(of_libraries, folder).difference <= 1e-4
    for name in ("run", "mae", "ast"):
        shutil.rmtree(of_libraries.with_name(name))
    monkeypatch.setattr(registry, "find", lambda name: pytest.fail(f"{name} was looked for"))
    here = Recognizer.load(folder)
    made = ["fusion.onnx", *(f"backbones/{m}.onnx" for m in ("rgb", "flow", "audio"))]
    assert [tracing.quantise(folder / name) for name in made] == [True] * 4
    for left_out, windows in zip(((), ("rgb",)), wanted, strict=True):
        for one, other in zip(said(here, root / "video.mp4", *left_out), windows, strict=True):
            for head in ("verb", "noun"):
                np.testing.assert_allclose(one[head], other[head], atol=1e-4)


@pytest.mark.slow
def test_the_demos_model_is_handed_on(tmp_path: Path) -> None:
    """Its own recipes, over fewer clips and epochs; then all that it was made of is removed."""
    manifest = write_sample(tmp_path / "clips", clips=16, seed=5)
    recipes: dict[str, Any] = project("tiny", manifest, tmp_path, epochs=1, batch_size=8)
    extraction = recipes["extract"]
    extract(extraction.model_copy(update={"sets": {"student": extraction.sets["student"]}}))
    train_baseline(recipes["baseline"])
    run, out = recipes["baseline"].out, tmp_path / "out"
    found = export_model(run, out).card.measured
    assert found["accuracy"]["clips"] > 0
    assert max(found["accuracy"]["difference"], *found["difference"].values()) <= 1e-4
    assert set(found["latency"]["ms"]) == set(found["costs"]) == set(found["difference"])
    video = manifest.parent / "videos/v0000.mp4"
    wanted = said(Recognizer.load(run, "cpu"), video)
    for path in (run, tmp_path / "features"):
        shutil.rmtree(path)
    here = said(Recognizer.load(shutil.move(out, tmp_path / "elsewhere")), video)
    for one, other in zip(here, wanted, strict=True):
        for head in ("verb", "noun"):
            np.testing.assert_allclose(one[head], other[head], atol=1e-4)


def edited(copy: Path, change: Any) -> None:
    tree = json.loads((copy / "export.json").read_text())
    change(tree)
    (copy / "export.json").write_text(json.dumps(tree))


def test_a_strangers_folder_leads_to_no_other_file_and_runs_no_code(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def code(tree: dict[str, Any]) -> None:
        del tree["backbones"]["audio"]
        tree["model"]["provenance"]["audio"]["backbone"] = "evil:net"
        tree["model"] |= {"model": "evil:net", "code": {"evil:net": "0"}}

    edited(copy, code)
    with pytest.raises(CheckpointError, match="no file for the backbone of audio"):
        Recognizer.load(copy)
    edited(copy, lambda tree: tree["files"].update({"backbones/../../x.onnx": "0"}))
    with pytest.raises(CheckpointError, match="is damaged"):
        km.load_model(copy)


def test_the_hub_is_a_place_to_load_from(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys, karmma_pipeline as km\n"
        "rec = km.Recognizer.load('hf:o/tiny')\n"
        "(one,) = rec.video(sys.argv[1], stop_s=2, workers=0)\n"
        "print(*one.logits['verb'])"
    )
    command = [sys.executable, "-c", code, str(root / "video.mp4")]
    (one,) = Recognizer.load(root / "run", "cpu").video(root / "video.mp4", stop_s=2, workers=0)
    with serving(root / "exported") as hub:
        for changes in ({}, {"HF_HUB_OFFLINE": "1"}):  # the second time from the cache
            made = subprocess.run(
                command, env=hub.environment(tmp_path, **changes), capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert made.returncode == 0, made.stderr
            here = np.array(made.stdout.split(), float)
            np.testing.assert_allclose(here, one.logits["verb"], atol=1e-4)


def command(*words: object) -> str:
    """Return what a command that fails says in its one sentence."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code in {1, 2}, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_bad_input_is_one_sentence(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, exported, video = tmp_path / "out", root / "exported", root / "video.mp4"
    assert "no trained model found" in command("export", tmp_path, "--out", out)
    assert "is an exported model already" in command("export", exported, "--out", out)
    (tmp_path / "notes.txt").touch()
    assert "such as notes.txt" in command("export", root / "run", "--out", tmp_path)
    assert "is only used with --int8" in command(
        "export", root / "run", "--out", out, "--clips", "x.csv"
    )
    assert "which contains its weights" in command("predict", exported, video, "--weights", "rgb=x")
    assert "on the CPU" in command("predict", exported, video, "--device", "cuda")
    assert "which runs in onnxruntime" in command("predict", exported, video, "--engine", "torch")
    assert "is an exported model, for predict" in command("evaluate", exported, "--out", out)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "karmma-pipeline[export]" in command("export", root / "run", "--out", out)
    assert "karmma-pipeline[export]" in command("predict", exported, video)
    assert not out.exists()


def test_flow_by_a_network_is_refused_before_any_network_is_built(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    card = json.loads((run / "model.json").read_text())
    card["provenance"]["flow"]["flow"] |= {"source": "raft_small", "raft_sha256": "0"}
    (run / "model.json").write_text(json.dumps(card))
    monkeypatch.setattr(Recognizer, "of", lambda *_: pytest.fail("networks were built"))
    said = command("export", run, "--out", tmp_path / "out")
    assert "its flow is computed by raft_small, a network that cannot be exported" in said


def test_an_earlier_export_is_replaced(root: Path, copy: Path) -> None:
    before = (copy / "export.json").read_bytes()
    (copy / "fusion.onnx").write_bytes(b"")
    export_model(root / "run", copy)
    assert json.loads((copy / "export.json").read_text())["files"] == json.loads(before)["files"]
    km.load_model(copy)
    assert not [p for p in copy.parent.iterdir() if p.name.startswith(".")]


def test_int8_is_smaller_and_says_that_it_was_not_measured(root: Path, tmp_path: Path) -> None:
    made = export_model(root / "run", tmp_path / "out", int8=True)
    assert made.verdict == "not measured"
    assert made.card.int8 == ("fusion.onnx",)  # the backbones here are convolutions
    names = {node.op_type for node in onnx.load(tmp_path / "out/fusion.onnx").graph.node}
    assert "MatMulInteger" in names
    assert "Not measured" in (tmp_path / "out/README.md").read_text()
    tokens = {m: torch.randn(2, *shape) for m, shape in made.card.model.modalities.items()}
    mask = torch.ones(2, 3, dtype=torch.bool)
    here = open_model(tmp_path / "out").network(tokens, mask)
    there = open_model(root / "exported").network(tokens, mask)
    for head, logits in here.items():
        assert 0 < (logits - there[head]).abs().max() < 0.5 * there[head].abs().max()


def test_int8_is_compared_on_raw_clips(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "clips.csv"
    rows = [f"{i},{root / 'video.mp4'},{i},{i + 1},take,cup" for i in range(3)]
    table.write_text("\n".join(["clip_id,video,start,stop,verb,noun", *rows]) + "\n")
    made = export_model(root / "run", tmp_path / "out", int8=True, clips=table)
    found = made.card.measured["int8"]
    assert found["clips"]["count"] == 3
    assert made.verdict in {"recommended", "not recommended"}


def test_a_difference_is_paired_and_held_against_two_points() -> None:
    rng = np.random.default_rng(0)
    first = rng.random((1, 1000)) < 0.6
    second = first.copy()
    second[0, :4] = ~second[0, :4]
    one, other = (
        export_checks.Answers("verb", of, np.array([""] * 1000), {}) for of in (first, second)
    )
    (gap,) = other.minus(one)
    gaps = 100 * (second[0].astype(float) - first[0])
    assert gap.value == pytest.approx(gaps.mean())
    assert gap.high - gap.low == pytest.approx(2 * 1.962 * gaps.std(ddof=1) / 1000**0.5, rel=1e-3)
    assert export_checks.within([gap])
    assert not export_checks.within([gap, replace(gap, low=-2.1)])
    assert not export_checks.within([replace(gap, high=2.1)])
