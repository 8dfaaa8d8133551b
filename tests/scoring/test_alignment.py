from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from mole_diffusion.bases import get_base
from mole_diffusion.errors import InvalidFile, InvalidRequest
from mole_diffusion.scoring.alignment import AlignmentScorer, load_alignment
from mole_diffusion.scoring.preprocess import Preprocess

TEXTS = ["a red robot", "a blue bunny on the beach"]


@pytest.fixture(scope="module")
def scorer(assets_folder: Path) -> AlignmentScorer:
    return AlignmentScorer(f"local-dir:{assets_folder}/demo/clip", "demo CLIP")


def test_scores_equal_open_clip_on_the_same_pictures(scorer: AlignmentScorer) -> None:
    images = (torch.rand(3, 3, 64, 64) * 255).round() / 255
    transform = open_clip.image_transform(64, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    pictures = torch.stack([transform(to_pil_image(image)) for image in images])
    model = scorer.model
    seen = model.encode_image(pictures, normalize=True)
    said = model.encode_text(open_clip.tokenize(TEXTS, 32), normalize=True)
    torch.testing.assert_close(scorer.score(images, TEXTS), seen @ said.T, atol=1e-4, rtol=0)


def test_a_batch_scores_as_its_rows_and_of_any_size(scorer: AlignmentScorer) -> None:
    images = torch.rand(4, 3, 96, 48)
    together = scorer.score(images, TEXTS)
    assert together.shape == (4, 2) and not together.requires_grad
    alone = torch.cat([scorer.score(image[None], TEXTS[:1]) for image in images])
    torch.testing.assert_close(together[:, :1], alone, atol=1e-5, rtol=0)


def test_pictures_have_gradients_texts_have_none(scorer: AlignmentScorer) -> None:
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    (scorer.embed_images(images) @ scorer.embed_texts(TEXTS).T).sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0


def test_remembered_texts_stay_bounded_and_right(scorer: AlignmentScorer) -> None:
    many = [f"thing number {index}" for index in range(300)]
    vectors = scorer.embed_texts([*many, many[0]])
    assert vectors.shape[0] == 301 and torch.equal(vectors[0], vectors[-1])
    torch.testing.assert_close(scorer.embed_texts(many[:1]), vectors[:1], atol=1e-5, rtol=0)
    assert len(scorer._texts) <= 257


def test_the_label_travels_with_the_scorer(demo_assets: Path) -> None:
    assert load_alignment(get_base("demo")).label == "demo CLIP"


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (300, 200), (32, 32)])
def test_preprocessing_equals_open_clips(mode: str, size: tuple[int, int]) -> None:
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), size, mode="bicubic").clamp(0, 1)
    image = (image * 255).round() / 255
    mean, std = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
    config = {"size": 32, "mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": mode, "fill_color": 0}
    theirs = open_clip.image_transform(32, is_train=False, mean=mean, std=std, resize_mode=mode)(to_pil_image(image[0]))
    ours = Preprocess.from_config(config)(image)[0]
    assert ours.shape == (3, 32, 32)
    assert float((ours - theirs).abs().mean()) < 0.02, "only PIL's rounding may differ"


def test_an_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(InvalidFile, match="'stretch'"):
        Preprocess.from_config({"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "stretch"})


def test_a_missing_or_pickled_or_damaged_model_is_refused(assets_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="missing"):
        AlignmentScorer(f"local-dir:{tmp_path}", "demo CLIP")
    folder = shutil.copytree(assets_folder / "demo" / "clip", tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 24
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidFile, match="damaged"):
        AlignmentScorer(f"local-dir:{folder}", "demo CLIP")
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InvalidFile, match="Expected safetensors"):
        AlignmentScorer(f"local-dir:{folder}", "demo CLIP")


@pytest.mark.parametrize("source", ["ViT-B-32", "ViT-B-32:/tmp/weights.pt", "no-such-model:openai"])
def test_a_model_without_known_weights_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match="is no image-text model with weights"):
        AlignmentScorer(source, "CLIP")


def test_an_unreachable_hub_ends_in_one_sentence() -> None:
    with pytest.raises(InvalidRequest, match="go on without scores"):
        AlignmentScorer("ViT-B-32:laion2b_s34b_b79k", "OpenCLIP ViT-B/32")


@pytest.mark.skipif(not (Path(__file__).parents[2] / "assets/demo/clip").is_dir(), reason="the demo model is not here")
def test_the_shipped_model_knows_red_from_blue() -> None:
    scorer = load_alignment(get_base("demo"))
    red, blue = (torch.tensor(colour).view(3, 1, 1).expand(3, 64, 64) for colour in ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9)))
    scores = scorer.score(torch.stack([red, blue]), ["a red background", "a blue background"])
    assert float(scores[0, 0]) > float(scores[0, 1]) and float(scores[1, 1]) > float(scores[1, 0])
