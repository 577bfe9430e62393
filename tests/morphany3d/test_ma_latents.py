"""The structure's autoencoder, sparse latents, and what features decode to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.morphany3d.latents import (
    RadianceField,
    SparseLatent,
    TinySSVAE,
    active_voxels,
    decode_gaussians,
    decode_mesh,
    decode_radiance,
    decode_slat,
    encode_slat,
    refined_logits,
)
from papers10.morphany3d.shapes import CATEGORIES, ProceduralShapes, Shape
from papers10.splat.cameras import turntable
from papers10.splat.render import render
from papers10.splat.rotations import quat_to_matrix

CAMERA = turntable([0.6], pitch=0.3, radius=2.2, width=24, height=24, up="z", dtype=torch.float32)


@pytest.fixture(scope="module")
def shapes():
    return ProceduralShapes(8, seed=1, p_rotated=0.0)


@pytest.fixture(scope="module")
def latent(shapes):
    coords = active_voxels(shapes.tsdf)
    return SparseLatent(coords, encode_slat(shapes.tsdf, shapes.color, coords)).check(16)


def test_active_voxels_are_the_inside_ones_with_an_outside_neighbour(shapes):
    inside = torch.nn.functional.pad(shapes.tsdf > 0, [1] * 6)
    outside_near = torch.zeros_like(shapes.tsdf, dtype=torch.bool)
    for x in range(3):
        for y in range(3):
            for z in range(3):
                outside_near |= ~inside[:, x : x + 16, y : y + 16, z : z + 16]
    expected = (inside[:, 1:-1, 1:-1, 1:-1] & outside_near).nonzero().int()
    assert torch.equal(active_voxels(shapes.tsdf), expected)
    assert torch.equal(active_voxels(shapes.tsdf[0])[:, 1:], expected[expected[:, 0] == 0][:, 1:])
    assert active_voxels(-torch.ones(2, 4, 4, 4)).shape == (0, 4)
    assert len(active_voxels(torch.ones(1, 4, 4, 4))) == 64 - 8


def test_features_are_read_back_exactly(shapes, latent):
    rows, read = latent.coords.long().unbind(1), decode_slat(latent.feats)
    # One rounding on the way there and one back.
    torch.testing.assert_close(read.color, shapes.color[rows], atol=1e-6, rtol=0)
    torch.testing.assert_close(read.tsdf, shapes.tsdf[rows], atol=1e-6, rtol=0)
    lengths = read.normal.norm(dim=-1)
    assert (((lengths - 1).abs() < 1e-5) | (lengths == 0)).all() and (lengths > 0).float().mean() > 0.8
    torch.testing.assert_close(decode_slat(encode_again(read)).normal, read.normal, atol=1e-6, rtol=0)


def encode_again(read):
    return torch.cat([1.5 * (2 * read.color - 1), 2 * read.tsdf[:, None] - 1, read.normal], -1)


def test_normals_of_a_ball_point_outwards():
    axis = (torch.arange(16) + 0.5) / 16 - 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    tsdf = ((0.35 - grid.norm(dim=-1)) * 16 / 1.5).clamp(-1, 1)[None]
    coords = active_voxels(tsdf)
    normal = encode_slat(tsdf, torch.zeros(1, 16, 16, 16, 3), coords)[:, 4:]
    outward = torch.nn.functional.normalize(grid[coords[:, 1:].long().unbind(1)], dim=-1)
    # The distance is cut at 1.5 voxels, which bends the difference quotient a little.
    assert (normal * outward).sum(-1).min() > 0.95


def test_turned_shapes_have_turned_features(shapes, latent):
    turned = torch.rot90(shapes.tsdf, 1, (1, 2)).contiguous()
    coords = active_voxels(turned)
    feats = encode_slat(turned, torch.rot90(shapes.color, 1, (1, 2)).contiguous(), coords)
    moved = torch.stack([latent.coords[:, 0], 15 - latent.coords[:, 2], latent.coords[:, 1], latent.coords[:, 3]], 1)
    order = torch.tensor(sorted(range(len(moved)), key=lambda row: moved[row].tolist()))
    assert torch.equal(moved[order], coords)
    torch.testing.assert_close(feats[:, :4], latent.feats[order, :4])
    torch.testing.assert_close(feats[:, 6], latent.feats[order, 6])
    torch.testing.assert_close(feats[:, 4], -latent.feats[order, 5])
    torch.testing.assert_close(feats[:, 5], latent.feats[order, 4])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_layout(lengths, seed):
    parts = []
    for number, length in enumerate(lengths):
        places = torch.randperm(64, generator=generator(seed, number))[:length].sort().values
        coords = torch.stack([torch.full_like(places, number), places // 16, places // 4 % 4, places % 4], 1).int()
        parts.append(coords)
    latent = SparseLatent(torch.cat(parts), torch.randn(sum(lengths), 3, generator=generator(seed)), len(lengths)).check(4)
    assert latent.lengths == lengths and latent.batch_size == len(lengths) and len(latent) == sum(lengths)
    assert latent.cu_seqlens.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)] and latent.cu_seqlens.dtype == torch.int32
    assert [slice_.stop - slice_.start for slice_ in latent.layout] == lengths
    again = SparseLatent.cat([latent.sample(n) for n in range(len(lengths))])
    assert torch.equal(again.coords, latent.coords) and torch.equal(again.feats, latent.feats) and again.batch_size == latent.batch_size
    new = latent.replace(latent.feats.double())
    assert new.dtype == torch.float64 and new.lengths == lengths and new.coords is latent.coords
    assert latent.to(torch.float64).dtype == torch.float64


def test_patches_are_undone_and_hold_neighbours():
    vae = TinySSVAE(4, 8)
    grid = torch.rand(2, 16, 16, 16, generator=generator(0))
    patches = vae._patches(grid)
    assert patches.shape == (2, 64, 4, 4, 4) and torch.equal(vae._grid(patches), grid)
    assert torch.equal(patches[1, :, 1, 2, 3].reshape(4, 4, 4), grid[1, 4:8, 8:12, 12:16])


def test_autoencoder_statistics_and_loss(shapes):
    vae = TinySSVAE(4, 8)
    vae.normalise(shapes.tsdf)
    latent = vae.encode(shapes.tsdf)
    assert latent.shape == (8, *vae.latent_shape)
    torch.testing.assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.std((0, 2, 3, 4)), torch.ones(4), atol=1e-3, rtol=0)
    terms = [vae.loss(shapes.tsdf, generator=generator(5)) for _ in range(2)]
    assert terms[0]["loss"] == terms[1]["loss"] and terms[0]["loss"].requires_grad
    assert float(terms[0]["loss"].detach()) == pytest.approx(float(terms[0]["error"] + 0.3 * terms[0]["signs"] + 3e-5 * terms[0]["kl"]), rel=1e-5)
    double = vae.double()
    assert double.decode(double.encode(shapes.tsdf.double())).dtype == torch.float64


@pytest.mark.parametrize("index", range(8))
def test_mesh_is_near_the_analytic_surface_and_has_its_colours(shapes, latent, index):
    mesh = decode_mesh(shapes.tsdf[index], latent.sample(index)).check()
    distance, color = shapes.shapes[index].sdf(mesh.vertices)
    # A sixteenth is one voxel.
    assert distance.abs().mean() < 0.35 / 16 and distance.abs().max() < 1.5 / 16
    assert (mesh.colors - color).abs().median() < 0.05
    volume = mesh.to_trimesh().volume if hasattr(mesh, "to_trimesh") else 1.0
    assert volume > 0


def test_refinement_takes_the_word_of_the_features(shapes, latent):
    one = latent.sample(2)
    rough = torch.where(shapes.tsdf[2] > 0, 0.5, -0.5)
    refined = refined_logits(rough, one)
    rows = one.coords[:, 1:].long().unbind(1)
    torch.testing.assert_close(refined[rows], shapes.tsdf[2][rows].clamp(min=0.02), atol=1e-6, rtol=0)
    assert torch.equal(refined > 0, rough > 0)
    with_word, without = (shapes.shapes[2].sdf(decode_mesh(rough, one, refine=refine).vertices)[0].abs().mean() for refine in (True, False))
    assert with_word < without


def test_surfels_lie_on_the_surface_with_their_thin_side_along_the_normal(shapes, latent):
    for index in range(8):
        gaussians, read = decode_gaussians(latent.sample(index)).check(), decode_slat(latent.sample(index).feats)
        assert len(gaussians) == latent.lengths[index]
        known = read.normal.norm(dim=-1) > 0
        torch.testing.assert_close(quat_to_matrix(gaussians.quats)[known][..., 2], read.normal[known], atol=1e-5, rtol=0)
        torch.testing.assert_close(gaussians.base_colors(), read.color, atol=1e-6, rtol=0)
        assert shapes.shapes[index].sdf(gaussians.means[known])[0].abs().mean() < 0.35 / 16
    down = SparseLatent(torch.tensor([[0, 3, 3, 3]], dtype=torch.int32), torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]]))
    torch.testing.assert_close(quat_to_matrix(decode_gaussians(down).quats)[0, :, 2], torch.tensor([0.0, 0.0, -1.0]))


def test_light_along_a_ray_through_a_uniform_field():
    field = RadianceField(torch.full((4, 4, 4, 3), 0.5), torch.full((4, 4, 4), 2.0))
    front = turntable([0.0], radius=3.0, fov=0.01, width=3, height=3, up="z", dtype=torch.float32)
    drawn = field.render(front, steps=400, backgrounds=torch.ones(3))
    opacity = drawn.alpha[0, 1, 1, 0]
    # The rays of a narrow camera are parallel to the box's edges up to 0.005.
    assert float(opacity) == pytest.approx(1 - math.exp(-2.0), abs=1e-4)
    torch.testing.assert_close(drawn.color[0, 1, 1], 0.5 * opacity + (1 - opacity) * torch.ones(3))
    assert 2.5 < drawn.depth[0, 1, 1] < 3.5
    away = turntable([0.0], radius=3.0, fov=0.01, width=3, height=3, up="z", target=[5.0, 0.0, 0.0], dtype=torch.float32)
    assert field.render(away).alpha.abs().max() == 0


@pytest.mark.parametrize("index", [0, 2, 6])
def test_three_formats_draw_the_same_object(shapes, latent, index):
    from papers10.splat.geometry import render_mesh

    one = latent.sample(index)
    mesh = render_mesh(decode_mesh(shapes.tsdf[index], one), CAMERA)
    splats = render(decode_gaussians(one), CAMERA)
    field = decode_radiance(shapes.tsdf[index], one).render(CAMERA)
    # A splat is widened by its own footprint and by that of a pixel, more than half a voxel each.
    for other, least in ((splats, 0.5), (field, 0.75)):
        silhouettes = (mesh.alpha > 0.5), (other.alpha > 0.5)
        assert (silhouettes[0] & silhouettes[1]).sum() / (silhouettes[0] | silhouettes[1]).sum() > least
        assert not (silhouettes[0] & ~silhouettes[1]).any() or least > 0.6
        both = silhouettes[0] & silhouettes[1]
        assert (mesh.color - other.color).abs().mean(-1, keepdim=True)[both].median() < 0.08


def test_light_has_gradients(shapes, latent):
    one = latent.sample(6)
    feats = one.feats.clone().requires_grad_()
    decode_radiance(shapes.tsdf[6], one.replace(feats), upsample=1).render(CAMERA, steps=16).color.sum().backward()
    assert feats.grad.abs().sum() > 0 and feats.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: TinySSVAE(resolution=10), ValueError, "resolution"),
        (lambda: TinySSVAE(4, 8).encode(torch.zeros(2, 8, 8, 8)), ValueError, "tsdf"),
        (lambda: TinySSVAE(4, 8).decode(torch.zeros(2, 5, 4, 4, 4)), ValueError, "latent"),
        (lambda: active_voxels([1]), TypeError, "logits"),
        (lambda: active_voxels(torch.zeros(2, 4, 4)), ValueError, "logits"),
        (lambda: active_voxels(torch.full((1, 4, 4, 4), float("nan"))), (ValueError, FloatingPointError), "logits"),
        (lambda: SparseLatent(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 1)), ValueError, "coords"),
        (lambda: SparseLatent(torch.zeros(2, 4), torch.zeros(2, 1)), TypeError, "coords"),
        (lambda: SparseLatent(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, 1)), ValueError, "feats"),
        (lambda: SparseLatent(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 1)).check(), ValueError, "once"),
        (lambda: SparseLatent(torch.tensor([[0, 9, 0, 0]]), torch.zeros(1, 1)).check(8), ValueError, r"\[0, 8\)"),
        (lambda: SparseLatent(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]), torch.zeros(2, 1)).check(8), ValueError, "sorted"),
        (lambda: SparseLatent(torch.tensor([[0, 0, 0, 0]]), torch.zeros(1, 1)).sample(1), ValueError, "index"),
        (lambda: SparseLatent.cat([]), ValueError, "items"),
        (lambda: decode_slat(torch.zeros(3, 8)), ValueError, "feats"),
        (lambda: encode_slat(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4, 3), torch.tensor([[0, 4, 0, 0]])), ValueError, "coords"),
        (lambda: decode_gaussians(SparseLatent(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]), torch.zeros(2, 7))), ValueError, "latent"),
        (lambda: decode_gaussians(SparseLatent(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 7), 1)), ValueError, "at least one"),
        (lambda: decode_gaussians(SparseLatent(torch.tensor([[0, 20, 0, 0]]), torch.zeros(1, 7))), ValueError, "coords"),
        (lambda: decode_mesh(-torch.ones(8, 8, 8), SparseLatent(torch.tensor([[0, 1, 0, 0]]), torch.zeros(1, 7))), ValueError, "logits"),
        (lambda: RadianceField(torch.zeros(4, 4, 4, 3), torch.zeros(5, 5, 5)), ValueError, "rgb"),
    ],
)
def test_refused(call, error, name):
    with pytest.raises(error, match=name):
        call()


def test_every_category_decodes(shapes):
    for name in CATEGORIES:
        volume = Shape.random(name, 2).volume(16)
        coords = active_voxels(volume.tsdf)
        one = SparseLatent(coords, encode_slat(volume.tsdf[None], volume.color[None], coords))
        assert len(decode_mesh(volume.tsdf, one).faces) > 50
