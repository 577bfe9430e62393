"""Initial noise of frames: ends, places, ranks, nearest voxels; flicker of colours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.flow.noise import lerp, slerp
from papers10.kernels.knn import knn
from papers10.morphany3d.noise import (
    NOISE_MODES,
    SLAT_NOISES,
    EndpointNoise,
    color_change,
    nearest_tokens,
    noise_trial,
    structure_noise,
    token_noise,
)

SIZE = 6


def voxels(seed, share=0.3):
    return (torch.rand((SIZE,) * 3, generator=torch.Generator().manual_seed(seed)) < share).nonzero()


def endpoint(seed, places=None):
    drawn = EndpointNoise.draw(seed, (3, 2, 2, 2), SIZE, 4)
    return drawn if places is None else drawn.placed(places, torch.randn(len(places), 4, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def ends():
    return endpoint(0, voxels(0)), endpoint(1, voxels(1))


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
@pytest.mark.parametrize("per_token", [False, True])
def test_ends_of_a_morph_have_the_bits_of_the_endpoints(ends, mode, per_token):
    for alpha in (0, 1):
        assert torch.equal(structure_noise(*ends, alpha, mode=mode, per_token=per_token), ends[alpha].structure)
        for kind in SLAT_NOISES:
            assert torch.equal(token_noise(voxels(2), *ends, alpha, mode=mode, kind=kind, per_token=per_token), ends[alpha].at(voxels(2), kind))


def test_shared_noise_is_the_source_s(ends):
    assert torch.equal(structure_noise(*ends, 0.7, mode="shared"), ends[0].structure)
    assert torch.equal(token_noise(voxels(2), *ends, 0.7, mode="shared", kind="field"), ends[0].at(voxels(2), "field"))


def test_between_the_ends_by_the_family_s_interpolation(ends):
    a, b = (end.structure for end in ends)
    assert torch.equal(structure_noise(*ends, 0.3), slerp(a, b, 0.3)) and torch.equal(structure_noise(*ends, 0.3, mode="lerp"), lerp(a, b, 0.3))
    # one angle a place: the channels of a place form a vector
    torch.testing.assert_close(structure_noise(*ends, 0.3, per_token=True)[:, 1, 0, 1], slerp(a[:, 1, 0, 1], b[:, 1, 0, 1], 0.3))
    places = voxels(2)
    own = [end.at(places, "field") for end in ends]
    assert torch.equal(token_noise(places, *ends, 0.3), slerp(*own, 0.3)) and torch.equal(token_noise(places, *ends, 0.3, per_token=True), slerp(*own, 0.3, dims=-1))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_field_keeps_the_noise_of_a_voxel_that_stays(seed):
    noise, few, many = endpoint(3), voxels(seed, 0.1), voxels(seed, 0.5)
    rows = [(many == place).all(1).nonzero()[0, 0] for place in few]
    assert len(rows) == 0 or torch.equal(noise.at(many, "field")[torch.stack(rows)], noise.at(few, "field"))


def test_one_voxel_that_is_inserted_shifts_the_sequence():
    noise, places = endpoint(0), voxels(7)[1:]
    more = torch.cat([torch.tensor([[0, 0, 0]]), places[(places != 0).any(1)]])
    places = more[1:]
    before, after = noise.at(places, "sequence"), noise.at(more, "sequence")
    # PyTorch draws blocks of 16 numbers and the last block anew: all ranks but those of the last 16 numbers keep theirs
    assert torch.equal(after[: len(places) - 4], before[:-4])
    assert not torch.isclose(after[1:], before)[:-5].any(), "so every voxel has those of another"
    assert torch.equal(noise.at(more, "field")[1:], noise.at(places, "field"))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_nearest_voxel_by_distance_transform_and_by_search(seed):
    own, asked = torch.cat([voxels(seed, 0.05), torch.tensor([[2, 2, 2]])]).unique(dim=0), voxels(seed + 1000)
    noise = endpoint(seed, own)
    found = noise.at(asked, "nearest")
    distance = knn(asked.double(), own.double(), 1)[0][:, 0] if len(asked) else torch.zeros(0)
    number = (noise.tokens == found[:, None]).all(2).double().argmax(1)
    torch.testing.assert_close((own[number] - asked).double().norm(dim=1), distance.double())
    first = nearest_tokens(asked, own) if len(asked) else number
    torch.testing.assert_close((own[first] - asked).double().norm(dim=1), distance.double())


def test_own_voxels_have_their_own_tokens():
    places = voxels(0)
    noise = endpoint(0, places)
    assert torch.equal(noise.at(places, "nearest"), noise.tokens) and torch.equal(noise.at(places, "field"), noise.tokens)
    others = endpoint(0).field.clone()
    others[places.unbind(1)] = noise.tokens
    assert torch.equal(noise.field, others), "the field elsewhere is as it was"


def test_batch_column_and_dtype_of_coords_do_not_matter(ends):
    places = voxels(2)
    packed = torch.cat([torch.ones(len(places), 1), places], 1).int()
    for kind in SLAT_NOISES:
        assert torch.equal(ends[0].at(packed, kind), ends[0].at(places, kind))


@pytest.mark.parametrize("mode", NOISE_MODES)
@pytest.mark.parametrize("kind", SLAT_NOISES)
def test_no_voxels_no_noise(ends, mode, kind):
    assert token_noise(voxels(2)[:0], *ends, 0.5, mode=mode, kind=kind).shape == (0, 4)


def test_draws_repeat_and_differ_between_seeds():
    first, again, other = endpoint(0), endpoint(0), endpoint(1)
    assert torch.equal(first.structure, again.structure) and torch.equal(first.field, again.field) and first.seed == again.seed
    assert not torch.equal(first.structure, other.structure) and not torch.equal(first.field, other.field) and first.seed != other.seed


def test_moved_to_another_dtype(ends):
    wide = ends[0].to(torch.float64)
    assert wide.structure.dtype == wide.field.dtype == wide.tokens.dtype == torch.float64 and wide.coords.dtype == torch.int64
    for kind in SLAT_NOISES:
        assert torch.equal(wide.at(voxels(2), kind), ends[0].at(voxels(2), kind).double())


def test_the_arc_keeps_the_length_and_the_straight_mix_does_not():
    both = [EndpointNoise.draw(seed, (8, 8, 8, 8), 2, 1) for seed in (0, 1)]
    count = 8**4
    arc, straight = (structure_noise(*both, 0.5, mode=mode).norm().item() / math.sqrt(count) for mode in ("slerp", "lerp"))
    # standard deviation of the length over √d is 1/√(2d); the two ends have it too
    assert abs(arc - 1) < 5 / math.sqrt(2 * count) and abs(straight - math.sqrt(0.5)) < 5 / math.sqrt(2 * count)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: endpoint(0).at(torch.tensor([[0, 0, SIZE]]), "field"), ValueError, r"\[0, 6\)"),
        (lambda: endpoint(0).at(torch.tensor([[0, 0, -1]]), "nearest"), ValueError, "row 0"),
        (lambda: endpoint(0).at(torch.tensor([[0.0, 0, 1]]), "field"), TypeError, "integer"),
        (lambda: endpoint(0).at(voxels(0), "nearest"), ValueError, "own tokens"),
        (lambda: endpoint(0).at(voxels(0), "near"), ValueError, "nearest"),
        (lambda: structure_noise(endpoint(0), endpoint(1), 0.5, mode="slurp"), ValueError, "slerp"),
        (lambda: structure_noise(endpoint(0), endpoint(1), 1.5), ValueError, "alpha"),
        (lambda: structure_noise(endpoint(0), endpoint(0), float("nan")), ValueError, "alpha"),
        (lambda: EndpointNoise(torch.zeros(3, 2, 2, 1), torch.zeros(4, 4, 4, 2)), ValueError, "structure"),
        (lambda: EndpointNoise(torch.zeros(3, 2, 2, 2), torch.zeros(4, 4, 4)), ValueError, "field"),
        (lambda: EndpointNoise(torch.zeros(3, 2, 2, 2), torch.zeros(4, 4, 4, 2), coords=voxels(0)), ValueError, "together"),
        (lambda: endpoint(0).placed(torch.tensor([[0, 0, 0], [0, 0, 0]]), torch.zeros(2, 4)), ValueError, "each voxel once"),
        (lambda: endpoint(0).placed(torch.tensor([[0, 0, 0]]), torch.zeros(1, 3)), (ValueError, RuntimeError), "3"),
        (lambda: noise_trial("fields", 0), ValueError, "did you mean 'field'"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_color_change_on_voxels_of_all_frames():
    coords = [torch.tensor([[0, 0, 1], [0, 1, 2]]), torch.tensor([[0, 1, 2], [3, 3, 3]]), torch.tensor([[0, 1, 2]]), torch.tensor([[1, 1, 1]])]
    colors = [torch.tensor([[0.9, 0.9, 0.9], [0.2, 0.2, 0.2]]), torch.tensor([[0.5, 0.2, 0.2], [1.0, 1.0, 1.0]]), torch.tensor([[0.8, 0.2, 0.5]]), torch.zeros(1, 3)]
    steps = color_change(coords, colors, 4)
    assert steps == [(pytest.approx(0.1, abs=1e-6), 1), (pytest.approx(0.2, abs=1e-6), 1), (0.0, 0)]
    # red grows evenly, blue stays and then grows by 0.3: half a step of it is not steady
    assert color_change(coords, colors, 4, order=2) == [(pytest.approx(0.05, abs=1e-6), 1), (0.0, 0)]
    with pytest.raises(ValueError, match="one row"):
        color_change(coords, colors[:2], 4)
    with pytest.raises(ValueError, match="each voxel once"):
        color_change([coords[0][[0, 0]]] * 2, [colors[0]] * 2, 4)
    with pytest.raises(ValueError, match="order"):
        color_change(coords, colors, 4, order=3)


def test_trial_has_the_same_voxels_in_every_arm():
    from papers10.morphany3d.pipeline import MorphPipeline

    pipeline = MorphPipeline.from_tiny()
    arms = {arm: noise_trial(arm, 100, pairs=1, n_frames=3, steps=5, pipeline=pipeline) for arm in ("sequence", "field", "field_tfsa")}
    assert len({(result["voxels"], result["common"]) for result in arms.values()}) == 1
    assert arms["field"] == noise_trial("field", 100, pairs=1, n_frames=3, steps=5, pipeline=pipeline)
    assert set(arms["field"]) == {"color_change", "flicker", "common", "voxels"} and arms["field"]["color_change"] != arms["sequence"]["color_change"]
