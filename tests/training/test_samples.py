"""Sample pictures: same seed, true weight, alignment and identity with their models' names, nothing changed by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mole_diffusion import compose
from mole_diffusion.generation import SubjectPrompt
from mole_diffusion.png import read_parameters
from mole_diffusion.scoring import AlignmentScorer, ClipIdentity, EfficientNetIdentity, Gallery, place_scores, windows
from tests.tiny import cut_out, tiny_clip
from tests.training.helpers import COLOURS, load
from tests.training.test_gate import experts
from tests.training.test_resume import frozen, gate_task, subject_task, with_dropout
from training.data.paste import to_tensor
from training.rng import rng_state
from training.samples import evaluating, identity_of, identity_scorer, make_sample, make_samples

VIEWS = {name: [cut_out(colour), cut_out(colour, turn=20)] for name, colour in COLOURS.items()}


@pytest.fixture(scope="module")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> AlignmentScorer:
    return AlignmentScorer(f"local-dir:{tiny_clip(tmp_path_factory.mktemp('clip'))}", "tiny CLIP")


def scene(*names: str) -> Image.Image:
    """Subjects side by side on grey."""
    picture = Image.new("RGB", (192, 96), (128, 128, 128))
    for number, name in enumerate(names):
        picture.paste(VIEWS[name][0], (96 * number, 0), VIEWS[name][0])
    return picture


def test_identity_finds_each_subject_in_a_place_of_its_own() -> None:
    judge = EfficientNetIdentity()
    both = identity_of(scene("robot", "alien"), VIEWS, judge)
    twice = identity_of(scene("robot", "robot"), VIEWS, judge)
    assert list(both) == ["robot", "alien"] and min(both.values()) > 0.8
    assert twice["robot"] > 0.8 and twice["alien"] < both["alien"] - 0.1


def test_identity_is_what_a_gallery_of_all_grounds_says(alignment: AlignmentScorer) -> None:
    judge, picture = ClipIdentity(alignment), scene("alien")
    image = to_tensor(picture)[None]
    views = [torch.cat([to_tensor(v.convert("RGB")), to_tensor(v.getchannel("A").convert("RGB"))[:1]]) for v in
             VIEWS["alien"]]  # fmt: skip
    scores = place_scores(image, Gallery.build({"alien": views}, judge), judge, windows(96, 192))
    assert identity_of(picture, {"alien": VIEWS["alien"]}, judge)["alien"] == pytest.approx(
        float(scores.max()), abs=1e-6
    )


def test_photos_without_a_mask_have_an_identity(alignment: AlignmentScorer) -> None:
    photo = scene("robot")
    assert identity_of(photo, {"robot": [photo.crop((0, 0, 96, 96))]}, EfficientNetIdentity())["robot"] > 0.8


def test_the_identity_scorer_is_one_that_trains_nothing(
    alignment: AlignmentScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = identity_scorer(alignment, "cpu")
    assert found is not None and found.label == "EfficientNet-Lite0" and identity_scorer(None, "cpu") is found
    monkeypatch.setattr("training.samples._efficientnet", lambda device: None)
    found = identity_scorer(alignment, "cpu")
    assert found is not None and found.label == "tiny CLIP image tower" and identity_scorer(None, "cpu") is None


def test_samples_repeat_and_say_who_scored(
    base_folders: dict[str, Path], alignment: AlignmentScorer, tmp_path: Path
) -> None:
    base, pipe = load(base_folders["sd-v"])
    options: dict[str, Any] = {
        "seed": 3, "size": 64, "scorer": alignment, "views": VIEWS, "identity": ClipIdentity(alignment),
        "subjects": (SubjectPrompt("robot", "a robot"), SubjectPrompt("alien", "an alien")),
    }  # fmt: skip
    one, two = make_samples(pipe, base, ["a robot", "an alien"], tmp_path / "a", 10, **options)
    assert [Path(sample.path).name for sample in (one, two)] == ["000010-1.png", "000010-2.png"]
    assert one.scores.keys() == {"prompt", "robot", "alien"} and one.identity.keys() == {"robot", "alien"}
    assert one.scorers == ("tiny CLIP", "tiny CLIP image tower") and two.prompt == "an alien"
    again = make_sample(pipe, base, "a robot", tmp_path / "b.png", 10, **options)
    assert (again.scores, again.identity) == (one.scores, one.identity)
    assert Image.open(one.path).tobytes() == Image.open(again.path).tobytes()
    plain = make_sample(pipe, base, "a robot", tmp_path / "c.png", 10, seed=3, size=64)
    assert plain.scorers == () and plain.identity == plain.scores == {}
    assert Image.open(plain.path).tobytes() == Image.open(one.path).tobytes()
    assert read_parameters(Path(plain.path))["seed"] == 3


def test_modes_are_put_back_module_by_module(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sd-v"])
    composition = compose(pipe, experts(tmp_path, pipe), base=base)
    composition.train()
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    parts = [*pipe.unet.modules(), *composition.gate.modules()]
    modes = [module.training for module in parts]
    with pytest.raises(KeyError), evaluating(pipe, composition):
        assert not any(module.training for module in parts)
        raise KeyError
    assert [module.training for module in parts] == modes and len(set(modes)) == 2


@pytest.mark.parametrize("maker", [pytest.param(subject_task, marks=pytest.mark.long), gate_task])
def test_training_is_the_same_with_and_without_samples(
    maker: Any, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Dropout on: one number drawn, one mode changed, and the next step would be another."""
    with_samples, without = (with_dropout(maker(base_folders["sd-v"], tmp_path)) for _ in range(2))
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
    for index in range(2):
        states = []
        for task in (with_samples, without):
            torch.manual_seed(index)
            task.step(index)
            states.append(rng_state()["torch"])
            if task is with_samples:
                samples = list(task.sample(index, tmp_path / "first"))
                assert torch.equal(rng_state()["torch"], states[0])
        assert torch.equal(*states)
    (values, tensors), (others, plain) = frozen(with_samples), frozen(without)
    assert values == others and all(torch.equal(value, plain[key]) for key, value in tensors.items())
    for module in with_samples.pipe.unet.modules():
        if type(module) is torch.nn.Dropout:
            module.p = 0.0
    again = list(with_samples.sample(1, tmp_path / "again"))  # the weight that will be saved: dropout never showed
    assert [Path(sample.path).name for sample in again] == [Path(sample.path).name for sample in samples]
    for one, two in zip(samples, again, strict=True):
        assert Image.open(one.path).tobytes() == Image.open(two.path).tobytes()
        assert (one.scores, one.identity, one.scorers) == (two.scores, two.identity, two.scorers)
