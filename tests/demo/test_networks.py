"""The demo's networks: what they have learned from, and that they know it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.cut_store import assert_same_bits

from karmma_pipeline.data.sample import scene
from karmma_pipeline.data.sample.dataset import SampleVideo, plan
from karmma_pipeline.demo import commands, networks, train_networks
from karmma_pipeline.demo.networks import SEEDS, WEIGHTS
from karmma_pipeline.extraction.decode.spectrogram import mel_image
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.recipes import project


def choices() -> dict[str, BackboneChoice]:
    recipe = project("demo", Path("manifest.csv"))["extract"]
    assert isinstance(recipe, ExtractRecipe)
    return {name: choice for name, (_, choice) in train_networks.choices(recipe).items()}


def clips_of_the_demo(seed: int) -> list[SampleVideo]:
    """What `karmma sample` writes for the demo, or for its quick form."""
    videos = []
    for quick in (False, True):
        words = commands(Path("out"), quick=quick, seed=seed)[0]
        clips, test = (int(words[words.index(key) + 1]) for key in ("--clips", "--test"))
        validation = round(clips / 4)
        splits = {"train": clips - validation, "val": validation, "test": test}
        videos += list(plan(splits, seed, apart=True))
    return videos


@pytest.mark.parametrize("seed", [0, 1, 2, train_networks.SEED])
def test_no_clip_of_the_demo_shows_what_its_networks_have_learned_from(seed: int) -> None:
    splits = {"networks": train_networks.CLIPS, "networks_val": train_networks.VALIDATION}
    learned = list(plan(splits, train_networks.SEED, apart=True))
    shown = clips_of_the_demo(seed)
    known = {action.handwriting for video in learned for action in video.actions}
    assert len(known) > 500
    assert not known & {action.handwriting for video in shown for action in video.actions}
    if seed != train_networks.SEED:
        drawn = {action.seed for video in learned for action in video.actions}
        both = drawn & {action.seed for video in shown for action in video.actions}
        assert len(both) <= 1  # two draws of 2^31 may be equal; the digit is another even so


def test_the_splits_of_the_demo_share_no_handwriting() -> None:
    by_split: dict[str, set[int]] = {}
    for video in clips_of_the_demo(0):
        by_split.setdefault(video.split, set()).update(a.handwriting for a in video.actions)
    assert set(by_split) == {"train", "val", "test"}
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values()))


def test_the_weights_are_small_and_are_those_of_the_networks() -> None:
    assert WEIGHTS.stat().st_size < 2e6
    with safe_open(WEIGHTS, "pt") as file:
        names = list(file.keys())
    assert {name.partition(".")[0] for name in names} == set(SEEDS) == set(choices())
    for name, choice in choices().items():
        assert choice.name == f"{networks.__name__}:{name}"
        backbone = Backbone(choice)
        assert choice.source == "library"
        facts = backbone.provenance()
        assert (facts["weights"], facts["licence"]) == ("DEFAULT", "MIT")
        tokens = backbone(torch.zeros(2, *choice.input_shape))
        assert tokens.shape == (2, *choice.output_shape)


def test_teachers_have_more_weights_and_more_tokens() -> None:
    sizes = {
        name: (sum(p.numel() for p in Backbone(choice).parameters()), choice.output_shape[0])
        for name, choice in choices().items()
    }
    for modality in ("rgb", "audio"):
        pairs = zip(sizes[f"student_{modality}"], sizes[f"teacher_{modality}"], strict=True)
        assert all(most > least for least, most in pairs)


def test_the_networks_for_sound_know_the_digits_by_their_tones() -> None:
    """Nearest mean of ten tones each, of clips that no network has heard."""
    rng = np.random.default_rng(5)
    nouns = np.tile(np.arange(10), 16)
    for name in ("teacher_audio", "student_audio"):
        choice = choices()[name]
        audio, image = choice.own_audio, choice.image
        assert audio is not None
        assert image is not None
        images = []
        for noun in nouns:
            action = scene.Action(0, int(noun), 0, 0.0, 1.2, int(rng.integers(2**31)))
            images.append(mel_image(audio, scene.sing(1.2, [action], rng), image))
        backbone = Backbone(choice)
        with torch.inference_mode():
            tokens = backbone(backbone.prepare(torch.from_numpy(np.stack(images)))).mean(dim=1)
        seen, asked = tokens[:100].view(10, 10, -1).mean(dim=0), tokens[100:]
        answers = torch.cdist(asked, seen).argmin(dim=1).numpy()
        assert (answers == nouns[100:]).mean() > 0.6


@pytest.mark.parametrize("name", ["student_rgb", "student_audio"])
def test_the_students_networks_can_be_cut(name: str) -> None:
    whole = choices()[name]
    assert whole.cuts == ("input", "down", "space")
    suffix = assert_same_bits(whole, Backbone(whole).net, whole.cuts[1:])
    assert {name.partition(".")[0] for name in suffix.net.state_dict()} == {"space", "time"}
