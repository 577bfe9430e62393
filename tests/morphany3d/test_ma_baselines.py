"""Morphs without attention: matched voxels, transported points, morphs of pictures; what they are at the ends, backwards, and for bad input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.morphany3d import baselines
from papers10.morphany3d.latents import SparseLatent, active_voxels, decode_slat, encode_slat
from papers10.morphany3d.pipeline import MorphFrame
from papers10.morphany3d.shapes import Shape
from papers10.splat.meshes import Mesh

CORNERS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]) * 0.4 - 0.2
TETRAHEDRON = Mesh(CORNERS, torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]), CORNERS + 0.3)


def latent(rows, width=3, seed=0):
    coords = torch.tensor(sorted(rows), dtype=torch.int32)
    return SparseLatent(torch.nn.functional.pad(coords, (1, 0)), torch.randn(len(coords), width, generator=generator(seed, "latent")))


def exact(category, seed):
    volume = Shape.random(category, seed, p_rotated=0.0).volume(16)
    coords = active_voxels(volume.tsdf)
    return volume.tsdf, SparseLatent(coords, encode_slat(volume.tsdf[None], volume.color[None], coords))


voxel_sets = st.sets(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(voxel_sets, voxel_sets, st.floats(0, 1))
def test_matched_voxels_morph_into_sets(first, second, alpha):
    one, other = latent(first), latent(second, seed=1)
    pairs = baselines.match_voxels(one.coords, other.coords, 6)
    assert set(pairs[:, 0].tolist()) == set(range(len(one))) and set(pairs[:, 1].tolist()) == set(range(len(other)))
    assert max(len(one), len(other)) <= len(pairs) <= len(one) + len(other)
    found = baselines.slat_interp(one, other, alpha, 6)
    found.check(6)
    keys = (found.coords[:, 1:].long() * torch.tensor([36, 6, 1])).sum(-1)
    assert bool((keys.diff() > 0).all()), "lexicographic"
    low, high = torch.cat([one.feats, other.feats]).aminmax()
    assert float(found.feats.min()) >= float(low) - 1e-5 and float(found.feats.max()) <= float(high) + 1e-5


def test_ends_are_exact_and_the_way_back_is_the_way_there():
    one, other = exact("car", 3)[1], exact("mug", 4)[1]
    for alpha, own in ((0, one), (1, other)):
        found = baselines.slat_interp(one, other, alpha, 16)
        assert torch.equal(found.coords, own.coords) and torch.equal(found.feats, own.feats)
    there, back = baselines.slat_interp(one, other, 0.25, 16), baselines.slat_interp(other, one, 0.75, 16)
    # Sums of at most a few latents in another order.
    assert torch.equal(there.coords, back.coords) and torch.allclose(there.feats, back.feats, atol=1e-6)


def test_known_pair_moves_on_a_line():
    one, other = latent([(0, 0, 0)]), latent([(4, 2, 0)], seed=1)
    found = baselines.slat_interp(one, other, 0.5, 6)
    assert found.coords.tolist() == [[0, 2, 1, 0]] and torch.allclose(found.feats, (one.feats + other.feats) / 2)


def test_latents_decide_where_places_do_not():
    one, other = latent([(2, 2, 2)], 1), latent([(1, 2, 2), (3, 2, 2)], 1)
    other = other.replace(torch.tensor([[5.0], [0.1]]))
    one = one.replace(torch.zeros(1, 1))
    pairs = baselines.match_voxels(one.coords, other.coords, 6, source_feats=one.feats, target_feats=other.feats, feature_weight=1.0)
    assert [0, 1] in pairs.tolist()
    forth = baselines.match_voxels(one.coords, other.coords, 6)
    assert forth.tolist() == [[0, 0], [0, 1]]


def test_a_closed_shell_is_filled_and_a_torn_one_is_not():
    volume, own = exact("mug", 1)
    filled = baselines.shell_volume(own.coords, decode_slat(own.feats).tsdf, 16)
    assert torch.equal(filled > 0, volume > 0)
    box = torch.tensor([[0, *place] for place in itertools.product(range(1, 6), repeat=3) if 1 in place or 5 in place], dtype=torch.int32)
    assert int((baselines.shell_volume(box, torch.ones(len(box)), 8) > 0).sum()) == 125
    assert int((baselines.shell_volume(box[1:], torch.ones(len(box) - 1), 8) > 0).sum()) == 124, "a missing corner has no face to the inside"
    torn = box[~((box[:, 1:] == torch.tensor([1, 3, 3])).all(-1))]
    assert int((baselines.shell_volume(torn, torch.ones(len(torn)), 8) > 0).sum()) == len(torn)


def test_transport_is_the_cheapest_permutation():
    a, b = (torch.rand(6, 3, generator=generator(seed, "points"), dtype=torch.float64) for seed in (0, 1))
    grey = torch.full((6, 3), 0.5, dtype=torch.float64)
    morph = baselines.linear_match((a, grey), (b, grey))
    found = float((morph.target - morph.source).square().sum())
    best = min(float((b[list(order)] - a).square().sum()) for order in itertools.permutations(range(6)))
    assert abs(found - best) < 1e-12 and sorted(morph.target[:, 0].tolist()) == sorted(b[:, 0].tolist())


def test_color_weight_keeps_colours_together():
    a = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    red_blue = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    near = baselines.linear_match((a, red_blue), (a, red_blue.flip(0)))
    loyal = baselines.linear_match((a, red_blue), (a, red_blue.flip(0)), color_weight=2.0)
    assert torch.equal(near.target, a) and torch.equal(loyal.target, a.flip(0)) and torch.equal(loyal.target_colors, red_blue)


def test_points_of_meshes():
    morph = baselines.linear_match(TETRAHEDRON, TETRAHEDRON._replace(vertices=TETRAHEDRON.vertices + 0.1), count=50, seed=3)
    again = baselines.linear_match(TETRAHEDRON, TETRAHEDRON._replace(vertices=TETRAHEDRON.vertices + 0.1), count=50, seed=3)
    assert torch.equal(morph.source, again.source) and torch.equal(morph.target, again.target)
    own = morph.gaussians(0.5).check()
    assert len(own) == 50 and torch.allclose(own.means, (morph.source + morph.target) / 2)
    voxels = morph.voxels(0.0, 8)
    assert voxels.dtype == torch.int32 and len(voxels.unique(dim=0)) == len(voxels) and int(voxels[:, 1:].max()) < 8


def test_pictures():
    red, blue = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)
    red[..., 0], red[:2, :, 3] = 1, 1
    blue[..., 2], blue[2:, :, 3] = 1, 1
    mixed = baselines.cross_dissolve(red, blue, 0.25)
    # Where only one picture shows something its colour stays, at its share of opacity.
    assert torch.allclose(mixed[0, 0], torch.tensor([1.0, 0, 0, 0.75])) and torch.allclose(mixed[3, 0], torch.tensor([0, 0, 1.0, 0.25]))
    moved = baselines.silhouette_morph(red, blue, 0.5)
    assert torch.allclose(moved[..., :3], torch.tensor([0.5, 0, 0.5]).expand(4, 4, 3))
    for morphed in baselines.PICTURE_MORPHS.values():
        assert torch.equal(morphed(red, blue, 0.0), red) and torch.equal(morphed(red, blue, 1.0), blue)
        assert torch.allclose(morphed(red, blue, 0.3), morphed(blue, red, 0.7), atol=1e-6)


class Decoder:
    """Decoders of the small model, without its networks."""

    name = "tiny"

    def decode(self, logits, coords, features, formats):
        from papers10.morphany3d import latents

        one = SparseLatent(coords, features["slat"])
        return {name: latents.decode_mesh(logits, one) if name == "mesh" else latents.decode_gaussians(one, len(logits)) for name in formats}


def ends():
    found = []
    for index, (category, seed) in enumerate((("chair", 1), ("plane", 2))):
        volume, own = exact(category, seed)
        found.append(MorphFrame(index, float(index), float(index), volume, own.coords, {"slat": own.feats}, backbone=Decoder()))
    return found


@pytest.mark.parametrize("make", [baselines.slat_interp_frames, baselines.linear_match_frames])
def test_baselines_as_frames(make):
    options = {"count": 128} if make is baselines.linear_match_frames else {}
    frames = make(*ends(), [0.0, 0.5, 1.0], **options)
    assert [frame.index for frame in frames] == [0, 1, 2] and [frame.alpha for frame in frames] == [0.0, 0.5, 1.0]
    for frame in frames:
        assert frame.features.shape == (len(frame.coords), 7) and frame.logits.shape == (16, 16, 16) and bool((frame.logits[frame.coords[:, 1:].long().unbind(-1)] > 0).all())
        frame.gaussians.check()
    if make is baselines.slat_interp_frames:
        assert torch.equal(frames[0].logits, ends()[0].logits) and torch.equal(frames[2].features, ends()[1].features) and len(frames[1].mesh.faces)


@pytest.mark.parametrize(("call", "word"), [
    (lambda a, b: baselines.slat_interp(a, b, 1.5, 6), "alpha"),
    (lambda a, b: baselines.slat_interp(a, b, float("nan"), 6), "alpha"),
    (lambda a, b: baselines.slat_interp(a, b, 0.5, 3), "0..2"),
    (lambda a, b: baselines.slat_interp(a, latent([(0, 0, 0)], 5), 0.5, 6), "target.feats"),
    (lambda a, b: baselines.match_voxels(a.coords[:0], b.coords, 6), "at least one"),
    (lambda a, b: baselines.match_voxels(a.coords + torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]), b.coords, 6), "one sample"),
    (lambda a, b: baselines.match_voxels(a.coords, b.coords, 6, feature_weight=1.0), "source_feats"),
    (lambda a, b: baselines.linear_match((a.feats, a.feats), (a.feats[:1], a.feats[:1])), "target points"),
    (lambda a, b: baselines.linear_match((a.feats * float("nan"), a.feats), (a.feats, a.feats)), "source points"),
    (lambda a, b: baselines.cross_dissolve(torch.ones(2, 2, 4), torch.ones(2, 3, 4), 0.5), "target"),
    (lambda a, b: baselines.cross_dissolve(torch.ones(2, 2, 4), torch.zeros(2, 2, 4), 0.5), "transparent"),
    (lambda a, b: baselines.baseline_sequence(None, a, b, "slat_interpp"), "slat_interp"),
])
def test_refuses(call, word):
    with pytest.raises((ValueError, TypeError), match=word):
        call(latent([(0, 0, 0), (5, 1, 2)]), latent([(1, 1, 1), (2, 2, 3)], seed=1))


def test_refuses_types():
    with pytest.raises(TypeError, match="source"):
        baselines.match_voxels(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32), 4)
    with pytest.raises(TypeError, match="source"):
        baselines.cross_dissolve(torch.ones(2, 2, 4, dtype=torch.uint8), torch.ones(2, 2, 4, dtype=torch.uint8), 0.5)
