"""Files that the EPIC-KITCHENS-100 server and its official evaluator take."""

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.evaluation.evaluate import evaluate
from karmma_pipeline.evaluation.predict import predict
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.submission import official_accuracy
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.store import FeatureStore

pytestmark = pytest.mark.usefixtures("one_kind_of_figures")

OFFICIAL = {
    "verb": tuple(f"verb {i}" for i in range(97)),
    "noun": tuple(f"noun {i}" for i in range(300)),
}


def recipe_of(tmp_path: Path, heads: dict[str, tuple[str, ...]], label: int) -> EvaluateRecipe:
    """A random model and a store of a split in which every clip has one label, or none (-1)."""
    store = FeatureStore.open(write_store(tmp_path / "s", clips=12, heads=heads, label=label))
    card = ModelCard.model_validate(
        {
            "kind": "student",
            "name": "S",
            "size": FusionSize(dim=8, attention_heads=2, ffn_width=8, head_width=8),
            "modalities": {m: store.shape(m) for m in store.modalities},
            "heads": store.heads,
            "provenance": store.provenance,
            "store_digest": store.digest,
        }
    )
    save_model(tmp_path / "run/best", card.build(), card)
    tree = {
        "runs": [str(tmp_path / "run")],
        "stores": [str(tmp_path / "s")],
        "out": str(tmp_path / "report"),
        "split": "",
        "costs": False,
        "submission": {},
    }
    return config.build(EvaluateRecipe, tree, "test")


def test_a_test_split_without_labels_gives_the_files_of_the_challenge(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, OFFICIAL, label=-1)
    found = evaluate(recipe).results
    assert "no accuracies" in found.data.notes[0]
    assert found.data.constant["action"] is None
    store = FeatureStore.open(recipe.stores[0])
    logits = predict(recipe.runs[0], store, recipe, torch.device("cpu"), StopFlag()).logits
    with ZipFile(tmp_path / "report/submission/0_S.zip") as archive:
        assert archive.namelist() == ["test.json"]
        sent = json.loads(archive.read("test.json"))
    assert (sent["version"], sent["challenge"]) == ("0.2", "action_recognition")
    assert (sent["sls_pt"], sent["sls_tl"], sent["sls_td"]) == (2, 3, 3)
    assert len(sent["results"]) == 12
    for row, scores in enumerate(sent["results"].values()):
        assert list(scores["verb"]) == [str(i) for i in range(97)]
        of_clip = log_softmax(logits["noun"][0, row].astype(np.float64))
        np.testing.assert_allclose(list(scores["noun"].values()), of_clip, rtol=1e-6)
    assert not (tmp_path / "report/submission/0_S.json").exists()


def test_the_official_evaluators_reader_takes_the_results(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, OFFICIAL, label=3)
    evaluate(recipe)
    path = tmp_path / "report/submission/0_S.pt"
    rows = torch.load(path, map_location="cpu", weights_only=True)
    # what utils/results.py of C1-Action-Recognition does with them
    collated = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    assert collated["verb_output"].shape == (12, 97)
    assert collated["noun_output"].shape == (12, 300)
    assert collated["narration_id"].tolist()[:2] == ["c000", "c001"]


def test_the_official_accuracy_is_that_of_the_official_computation_ties_included() -> None:
    """As utils/scoring.py and utils/metrics.py of C1-Action-Recognition compute it."""
    rng = np.random.default_rng(0)
    verbs = rng.integers(-3, 3, (40, 97)).astype(np.float32)  # many equal scores, as of bfloat16
    nouns = rng.normal(size=(40, 300)).astype(np.float32)
    verbs, nouns = log_softmax(verbs, axis=1), log_softmax(nouns, axis=1)
    labels = {"verb": rng.integers(97, size=40), "noun": rng.integers(300, size=40)}
    ranked = np.argsort(verbs, axis=1)[:, ::-1]
    labels["verb"][:20] = ranked[:20, 0]
    labels["noun"][:20] = nouns[:20].argmax(axis=1)
    tail = labels["verb"] % 2 == 0
    found = official_accuracy(verbs, nouns, labels, {"tail_verb": tail, "unseen_noun": ~tail})
    top_verbs, top_nouns = (np.argsort(of)[:, ::-1][:, :100] for of in (verbs, nouns))
    p_verbs, p_nouns = (
        softmax(np.take_along_axis(of, top, axis=1))  # over the whole array, as there
        for of, top in ((verbs, top_verbs), (nouns, top_nouns))
    )
    hits = []
    for clip in range(40):
        order = (p_verbs[clip][:, None] * p_nouns[clip][None]).ravel().argsort()[::-1][:5]
        at = np.unravel_index(order, (97, 100))
        pairs = zip(top_verbs[clip][at[0]], top_nouns[clip][at[1]], strict=True)
        truth = (labels["verb"][clip], labels["noun"][clip])
        hits.append([pair == truth for pair in pairs])
    assert found["all_action_accuracy_at_1"] == pytest.approx(100 * np.mean([h[0] for h in hits]))
    assert found["all_action_accuracy_at_5"] == pytest.approx(100 * np.mean([any(h) for h in hits]))
    first = ranked[:, 0] == labels["verb"]
    assert found["all_verb_accuracy_at_1"] == pytest.approx(100 * first.mean())
    assert found["tail_verb_accuracy_at_1"] == pytest.approx(100 * first[tail].mean())
    assert "unseen_noun_accuracy_at_1" in found
    assert np.mean(verbs.argmax(axis=1) == labels["verb"]) < first.mean()  # ties do matter
