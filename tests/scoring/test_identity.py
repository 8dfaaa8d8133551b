from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mole_diffusion.errors import InvalidFile, InvalidRequest
from mole_diffusion.scoring import identity
from mole_diffusion.scoring.alignment import AlignmentScorer
from mole_diffusion.scoring.identity import CentredIdentity, ClipIdentity, EfficientNetIdentity, IdentityScorer
from mole_diffusion.scoring.views import PALETTE, Gallery, border_colours, frame, load_views, on_background
from tests.tiny import cut_out, tiny_subject


@pytest.fixture(scope="module", params=["clip", "efficientnet"])
def scorer(request: pytest.FixtureRequest, assets_folder: Path) -> IdentityScorer:
    if request.param == "clip":
        return ClipIdentity(AlignmentScorer(f"local-dir:{assets_folder}/demo/clip", "demo CLIP"))
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetIdentity(size=64)


def test_features_are_unit_vectors_that_repeat(scorer: IdentityScorer) -> None:
    images = torch.rand(3, 3, 50, 40)
    vectors = scorer.embed(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scorer.embed(images[1:2]), vectors[1:2], atol=1e-5, rtol=0)
    assert not vectors.requires_grad and scorer.label


def test_labels_say_which_model_it_was(scorer: IdentityScorer) -> None:
    assert scorer.label in {"demo CLIP image tower", "EfficientNet-Lite0"}
    assert CentredIdentity.fit(scorer, torch.rand(4, 3, 32, 32)).label == f"{scorer.label}, centred"


def test_centring_takes_away_what_all_pictures_share(scorer: IdentityScorer) -> None:
    images = torch.rand(6, 3, 48, 48)
    centred = CentredIdentity.fit(scorer, images)
    vectors, plain = centred.embed(images), scorer.embed(images)
    assert centred.size == scorer.size
    assert float((vectors @ vectors.T).mean()) < float((plain @ plain.T).mean())


def test_efficientnet_refuses_sizes_it_cannot_take() -> None:
    with pytest.raises(InvalidRequest, match="multiples of 32"):
        EfficientNetIdentity(size=50)


def test_views_are_framed_alike_wherever_they_stand() -> None:
    view = torch.zeros(4, 60, 80)
    view[:, 10:30, 50:60] = 1
    moved = torch.roll(view, (20, -30), dims=(1, 2))
    framed = frame(view, 32)
    torch.testing.assert_close(framed, frame(moved, 32))
    rows = torch.nonzero(framed[3].amax(dim=1) > 0.5).flatten()
    assert int(rows[0]) + int(rows[-1]) == 31, "centred"


def test_backgrounds_show_only_where_the_view_is_clear() -> None:
    framed = torch.zeros(1, 4, 4, 4)
    framed[0, :, 1:3, 1:3] = torch.tensor([1.0, 0, 0, 1]).view(4, 1, 1)
    pictures = on_background(framed, torch.tensor([[0.0, 0, 1], [0, 1, 0]]))
    assert pictures.shape == (2, 1, 3, 4, 4)
    assert pictures[0, 0, :, 0, 0].tolist() == [0, 0, 1] and pictures[1, 0, :, 1, 1].tolist() == [1, 0, 0]


def test_border_colour_ignores_what_stands_in_the_middle() -> None:
    image = torch.full((1, 3, 32, 32), 0.25)
    image[:, :, 8:24, 8:32] = 1
    assert border_colours(image).tolist() == [[0.25, 0.25, 0.25]]


def test_views_are_read_from_a_folder(tmp_path: Path) -> None:
    tiny_subject(tmp_path, "robot", "red")
    views = load_views(tmp_path / "robot" / "train")
    assert len(views) == 3 and views[0].shape == (4, 96, 96) and 0 < float(views[0][3].mean()) < 1
    with pytest.raises(InvalidRequest, match="found none"):
        load_views(tmp_path)
    (tmp_path / "robot" / "train" / "00.png").write_text("not a picture")
    with pytest.raises(InvalidFile, match=r"00\.png"):
        load_views(tmp_path / "robot" / "train")


def test_an_empty_view_is_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32)).save(tmp_path / "0.png")
    with pytest.raises(InvalidFile, match="empty"):
        frame(load_views(tmp_path)[0], 32)


def test_a_gallery_prefers_the_background_of_the_picture(scorer: IdentityScorer, tmp_path: Path) -> None:
    cut_out("red").save(tmp_path / "0.png")
    views = load_views(tmp_path)
    gallery = Gallery.build({"robot": views}, scorer, reduce="max")
    colours = torch.tensor(PALETTE)
    pictures = on_background(torch.stack([frame(view, scorer.size) for view in views]), colours)[:, 0]
    same = gallery.similarity(scorer.embed(pictures)[:, None], colours)
    torch.testing.assert_close(same.flatten(), torch.ones(len(PALETTE)), atol=1e-4, rtol=0)
    shown = Gallery.build({"robot": views}, scorer, show=lambda framed: 1 - framed)
    negatives = shown.similarity(scorer.embed(1 - pictures)[:, None], colours)
    torch.testing.assert_close(negatives.flatten(), torch.ones(len(PALETTE)), atol=1e-4, rtol=0)
    with pytest.raises(InvalidRequest, match="one subject at least"):
        Gallery.build({}, scorer)


def test_folded_norms_and_small_parts_change_no_number() -> None:
    images = torch.rand(17, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pytest.importorskip("efficientnet_lite_pytorch")
    plain = identity._efficientnet().eval()
    with torch.no_grad():
        expected = F.normalize(plain.extract_features((images * 255 - 127) / 128).mean((2, 3)), dim=-1)
    torch.testing.assert_close(EfficientNetIdentity(size=64).embed(images), expected, atol=1e-5, rtol=0)
