"""Measures of morphs: pictures of volumes, the shipped network, scores, loose parts, the judge's protocol."""

import base64
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from papers10.core.data import DataMissing
from papers10.flow.perceptual import EXTRACTORS, Extractor, extractor, path_scores
from papers10.morphany3d import metrics as ms
from papers10.morphany3d.shapes import CATEGORIES, ProceduralShapes, Volume


@pytest.fixture(scope="module")
def shapes():
    return ProceduralShapes(16, seed=11, p_rotated=1.0)


def boxes(count, resolution=8, seed=0):
    draws = torch.Generator().manual_seed(seed)
    tsdf = torch.full((count, resolution, resolution, resolution), -1.0)
    for volume in tsdf:
        low = torch.randint(0, 3, (3,), generator=draws)
        high = torch.randint(4, resolution + 1, (3,), generator=draws)
        volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1.0
    return tsdf


# Pictures


def test_first_view_is_the_volumes_own_picture(shapes):
    drawn = ms.render_volumes(shapes.tsdf[:4], shapes.color[:4]).color[:, 0]
    for number in range(4):
        picture = shapes.volume(number).image(32)
        inside = picture[..., 3] > 0
        ours = (drawn[number] < 0.999).any(-1)
        # Samples in depth differ (32 against 64), so a thin edge may be seen by one only.
        assert (ours == inside).float().mean() > 0.98
        both = ours & inside
        assert (drawn[number] - picture[..., :3])[both].abs().median() < 0.02


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), turns=st.integers(0, 3))
def test_views_are_quarter_turns_of_the_object(seed, turns):
    tsdf = boxes(2, seed=seed)
    color = torch.rand(2, 8, 8, 8, 3, generator=torch.Generator().manual_seed(seed))
    plain = ms.render_volumes(tsdf, color, size=16)
    turned = ms.render_volumes(torch.rot90(tsdf, turns, (1, 2)), torch.rot90(color, turns, (1, 2)), size=16)
    for view in range(4):
        for ours, theirs in zip(turned, plain):
            assert torch.allclose(ours[:, view], theirs[:, (view + turns) % 4], atol=1e-5)


def test_depth_and_colour_of_a_slab():
    tsdf = torch.full((1, 8, 8, 8), -1.0)
    tsdf[:, :, 4:6] = 1.0  # y from 0 to 0.25; the surface lies between the centres of voxels 3 and 4
    color = torch.zeros(1, 8, 8, 8, 3)
    color[..., 0] = 1.0
    drawn = ms.render_volumes(tsdf, color, size=16)
    assert bool((drawn.alpha[:, 0] == 1).all())
    assert torch.allclose(drawn.depth[:, 0], torch.full((1, 16, 16), 0.5), atol=1 / 32)
    assert torch.allclose(drawn.color[:, 0, ..., 0], 1 - 0.5 * drawn.depth[:, 0], atol=1e-6)
    assert float(drawn.color[:, 0, ..., 1:].max()) == 0


def test_rays_and_axes_see_the_same(shapes):
    along = ms.render_volumes(shapes.tsdf[:3], shapes.color[:3])
    rays = ms.render_volumes(shapes.tsdf[:3], shapes.color[:3], views=ms.side_cameras(32))
    assert (along.alpha == rays.alpha).float().mean() > 0.97
    both = (along.alpha * rays.alpha) > 0
    assert (along.color - rays.color)[both].abs().median() < 0.02


def test_official_views_stand_where_the_script_puts_them():
    cameras = ms.view_cameras("official6", 64)
    centres = cameras.camtoworlds[:, :3, 3]
    assert torch.allclose(centres.norm(dim=-1), torch.full((6,), 2.0, dtype=torch.float64))
    assert torch.allclose(centres[:, 2], torch.full((6,), 2 * math.sin(0.1736), dtype=torch.float64))
    yaw = torch.atan2(centres[:, 0], centres[:, 1])
    steps = torch.rad2deg(yaw.diff()).remainder(360)
    assert torch.allclose(steps, torch.full((5,), 360 * 20 / 119, dtype=torch.float64))
    assert float(yaw[0].abs()) == pytest.approx(math.pi)
    assert 2 * math.atan(64 / 2 / float(cameras.Ks[0, 0, 0])) == pytest.approx(math.radians(40))


def test_an_empty_volume_is_background():
    drawn = ms.render_volumes(torch.full((1, 4, 4, 4), -1.0), size=8)
    assert bool((drawn.color == 1).all()) and float(drawn.alpha.sum() + drawn.depth.sum()) == 0
    rays = ms.render_volumes(torch.full((1, 4, 4, 4), -1.0), views="official6", size=8)
    assert rays.color.shape == (1, 6, 8, 8, 3) and bool((rays.color == 1).all())


def test_colours_spread_from_tokens():
    coords = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [1, 3, 3, 3]])
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    grid = ms.spread_colors(coords, colors, 8)
    assert grid.shape == (2, 8, 8, 8, 3)
    assert torch.equal(grid[1, 3, 3, 3], colors[2]) and torch.allclose(grid[0], colors[0].expand(8, 8, 8, 3), atol=1e-6)
    assert torch.allclose(grid[1, 7, 7, 7], torch.tensor([0, 0.5, 0.5]))
    alone = ms.spread_colors(coords, colors, 8, rounds=0)
    assert torch.allclose(alone[1, 1, 1, 1], torch.tensor([0, 0.5, 0.5]))


def test_pictures_of_frames_from_volumes_meshes_and_gaussians(shapes):
    latents = pytest.importorskip("papers10.morphany3d.latents")
    volume = shapes.volume(2)
    coords = latents.active_voxels(volume.tsdf)
    features = latents.encode_slat(volume.tsdf[None], volume.color[None], coords)
    latent = latents.SparseLatent(coords, features)
    frame = SimpleNamespace(logits=volume.tsdf, coords=coords, features=features)
    frame.mesh, frame.gaussians = latents.decode_mesh(volume.tsdf, latent), latents.decode_gaussians(latent)
    seen = {kind: ms.frame_images([frame], kind=kind, size=24) for kind in ("volume", "mesh", "gaussian")}
    # A surfel's edge is soft; what is darker than this is its body.
    inside = {kind: (picture < 0.75).any(-1) for kind, picture in seen.items()}
    for kind in ("mesh", "gaussian"):
        assert seen[kind].shape == (1, 4, 24, 24, 3)
        overlap = (inside["volume"] & inside[kind]).sum() / (inside["volume"] | inside[kind]).sum()
        # Surfels bulge over the silhouette by about a pixel of 24.
        assert overlap > 0.6
    assert ms.frame_images([frame.mesh], views="official6", size=16).shape == (1, 6, 16, 16, 3)
    assert torch.equal(ms.frame_images([frame]), seen_auto(frame))


def seen_auto(frame):
    return ms.frame_images([frame], kind="volume")


# The network


def test_shipped_network_knows_unseen_shapes():
    shapes = ProceduralShapes(64, seed=500, p_rotated=1.0)
    drawn = ms.render_volumes(shapes.tsdf, shapes.color).color
    tiny = extractor("tiny-cnn")
    guess = tiny.probabilities(drawn.flatten(0, 1)).argmax(-1).unflatten(0, (64, 4))
    assert (guess == shapes.labels[:, None]).float().mean() > 0.95
    assert isinstance(tiny, Extractor) and tiny.name == "tiny-cnn" and EXTRACTORS["tiny-cnn"] is ms.TinyCNNExtractor
    assert float(ms.classifier_entropy(drawn).mean()) < 0.1


def test_shipped_file_is_small():
    path = ms.package_root() / "morphany3d" / "extractor.safetensors"
    assert path.stat().st_size <= 300_000


def test_features_and_distance_of_the_network(shapes):
    images = ms.render_volumes(shapes.tsdf[:6], shapes.color[:6]).color[:, 0]
    tiny = extractor("tiny-cnn")
    maps = tiny.features(images)
    assert [list(layer.shape[1:]) for layer in maps] == [[16, 32, 32], [32, 16, 16], [64, 8, 8]]
    assert tiny.pooled(images).shape == (6, 32)
    assert float(tiny.distance(images, images).abs().max()) == 0
    assert bool((tiny.distance(images[:3], images[3:]) > 0.1).all())
    assert tiny.features(images[:1].repeat(1, 2, 2, 1))[2].shape == (1, 64, 16, 16)


def test_training_is_reproducible_and_learns(tmp_path):
    a, b = (ms.train_extractor(101, 4, shapes=16, batch=8) for _ in range(2))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
    a = ms.train_extractor(101, 60, shapes=32, batch=16)
    shapes = ProceduralShapes(32, seed=101, p_rotated=1.0)
    pictures, labels, _ = ms.classifier_views(shapes, 101)
    with torch.no_grad():
        logits = a(pictures.permute(0, 3, 1, 2))
    assert (logits.logsumexp(-1).argmax(-1) == labels).float().mean() > 0.2
    features = ms.TinyCNNExtractor(a).pooled(pictures)
    assert float(features.square().mean()) == pytest.approx(1, rel=1e-3)
    copy = ms.load_extractor(ms.save_extractor(tmp_path / "small.safetensors", a))
    for name, value in a.state_dict().items():
        # Half precision has 11 bits.
        assert torch.allclose(value, copy.state_dict()[name], rtol=2**-11, atol=1e-6)


def test_labels_of_turns_are_those_of_the_views(shapes):
    pictures, labels, turns = ms.classifier_views(shapes, 3)
    pictures, turns = pictures.unflatten(0, (16, 6)), turns.unflatten(0, (16, 6))
    for number in range(16):
        for view in range(4):
            back = int(-shapes.turns[number]) % 4
            own = Volume(shapes.tsdf[number], shapes.color[number]).turned(back + int(turns[number, view]))
            expected = ms.render_volumes(own.tsdf[None], own.color[None]).color[0, 0]
            assert torch.allclose(pictures[number, view], expected, atol=1e-4)
    assert torch.equal(labels, shapes.labels.repeat_interleave(6))


def test_network_files_of_another_kind_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="save_extractor"):
        ms.load_extractor(tmp_path / "other.safetensors")
    with pytest.raises(DataMissing, match="train_extractor"):
        ms.load_extractor(tmp_path / "none.safetensors")


# Scores


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["tiny-cnn", "pooled"])
def test_many_morphs_at_once_equal_one_by_one(name):
    images = pictures(3, 5, 2, 16, 16, 3)
    source, target = pictures(3, 2, 16, 16, 3, seed=1), pictures(3, 2, 16, 16, 3, seed=2)
    scores = ms.morph_scores(images, name, source=source, target=target)
    for pair in range(3):
        single = path_scores(images[pair].movedim(1, 0), name, source=source[pair], target=target[pair])
        for measure, value in single.items():
            if measure != "ppl_relative":  # a mean of ratios in one, of views in the other, both a view
                assert float(scores.values[measure][pair]) == pytest.approx(float(value), rel=1e-5)
    assert scores.steps.shape == (3, 2, 4) and scores.progress.shape == (3, 5)
    assert scores.records()[0]["extractor"] == name and scores.mean()["pdv"].extractor == name


def test_lag_is_zero_for_a_path_on_time_and_positive_for_a_late_one():
    a, b = pictures(1, 1, 8, 8, 3), pictures(1, 1, 8, 8, 3, seed=1)
    alphas = torch.linspace(0, 1, 9)
    on_time = torch.stack([torch.lerp(a, b, t) for t in alphas], 1)
    late = torch.stack([torch.lerp(a, b, t) for t in alphas**2], 1)
    values = [float(ms.morph_scores(x, "pooled", source=a, target=b).values["lag"]) for x in (on_time, late)]
    # Differences of pixels are linear along the mix.
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] == pytest.approx(float((alphas - alphas**2).mean()), abs=1e-6)


def test_reversed_morph_has_the_same_length():
    images = pictures(1, 6, 1, 16, 16, 3)
    ends = dict(source=images[:, 0], target=images[:, -1])
    back = dict(source=images[:, -1], target=images[:, 0])
    ours = ms.morph_scores(images, **ends).values
    theirs = ms.morph_scores(images.flip(1), **back).values
    for name in ("ppl_sum", "pdv", "endpoint_distance"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5)
    assert float(ours["lag"]) == pytest.approx(-float(theirs["lag"]), abs=1e-6)


def test_uneven_alphas_are_reported():
    with pytest.warns(UserWarning, match="alphas"):
        ms.morph_scores(pictures(1, 3, 1, 8, 8, 3), "pooled", alphas=[0, 0.2, 1])


def test_set_scores_use_frames_in_between_only():
    images = pictures(2, 6, 2, 8, 8, 3)
    changed = images.clone()
    changed[:, 0] = 0
    changed[:, -1] = 1
    reference = pictures(40, 8, 8, 3, seed=4)
    ours, theirs = (ms.set_scores(x, "pooled", training=reference, components=4) for x in (images, changed))
    assert ours["fid_training"] == theirs["fid_training"] and ours["fid_training"].samples == (16, 40)
    features = extractor("pooled").pooled(reference)
    assert ms.set_scores(images, "pooled", training=features, components=4)["fid_training"] == ours["fid_training"]


def test_silhouettes_stack_outline_and_depth():
    tsdf = boxes(3, 16)
    stacked = ms.silhouettes(tsdf)
    assert stacked.shape == (3, 1, 16, 16, 8)
    assert set(stacked[..., :4].unique().tolist()) <= {0.0, 1.0}
    assert bool((stacked[..., 4:][stacked[..., :4] == 0] == 0).all())


def test_floaters_by_hand():
    grid = torch.zeros(3, 5, 5, 5, dtype=torch.bool)
    grid[0, 0, 0, :3] = True
    grid[0, 4, 4, 4] = True
    grid[1, 0, 0, 0] = grid[1, 0, 1, 1] = True
    parts, loose = ms.floaters(grid)
    assert parts.tolist() == [2, 2, 0] and loose.tolist() == [0.25, 0.5, 0.0]
    assert ms.floaters(grid, connectivity=2)[0].tolist() == [2, 1, 0]


def test_plausibility_of_a_shape_and_of_its_rubble(shapes):
    whole = ms.plausibility(shapes.volume(2))
    assert whole["components"] == 1 and whole["floater_fraction"] == 0 and whole["classifier_entropy"] < 0.2
    rubble = (torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.05)
    found = ms.plausibility(rubble)
    assert found["components"] > 50 and found["floater_fraction"] > 0.9
    assert 0 <= found["classifier_entropy"] <= math.log(len(CATEGORIES)) + 1e-9


class Sequence:
    def __init__(self, frames):
        self.frames = frames


def test_metrics_of_a_sequence(shapes):
    frames = [Volume(torch.lerp(shapes.tsdf[0], shapes.tsdf[2], a), shapes.color[0]) for a in torch.linspace(0, 1, 5)]
    one = ms.sequence_metrics(Sequence(frames))
    assert one["extractor"] == "tiny-cnn" and one["views"] == "ortho4" and one["n_frames"] == 5
    assert one["ppl_sum"] == pytest.approx(4 * one["ppl_mean"]) and "end_error" not in one
    several = ms.sequence_metrics([Sequence(frames), Sequence(frames[::-1])])
    assert several["ppl_sum"] == pytest.approx([one["ppl_sum"]] * 2)
    ends = ms.frame_images([frames[0], frames[-1]])
    given = ms.sequence_metrics(frames, source=ends[0], target=ends[1])
    assert given["start_error"] == 0 == given["end_error"]
    assert ms.sequence_metrics(frames, "pooled", size=16)["extractor"] == "pooled"


def test_metrics_of_the_pipelines_own_sequences():
    from papers10.morphany3d.morphing import MorphConfig
    from papers10.morphany3d.pipeline import MorphPipeline

    pipeline = MorphPipeline.from_tiny(steps=3)
    sequence = pipeline.sequence("mug", "tree", MorphConfig(n_frames=3), formats=())
    found = sequence.metrics()
    assert found["extractor"] == "tiny-cnn" and found["n_frames"] == 3 and 0 <= found["turns"] <= 2
    assert {"ppl_sum", "pdv", "lag", "floater_fraction", "classifier_entropy"} <= set(found)
    tsdf, color = ms.frame_volume(sequence.frames[1])
    assert tsdf.shape == (16, 16, 16) and color.shape == (16, 16, 16, 3)
    assert torch.equal(tsdf > 0, sequence.frames[1].logits > 0)
    whole = ms.plausibility(sequence.frames[1])
    assert whole["components"] >= 1 and 0 <= whole["floater_fraction"] < 1


class Turned:
    """A volume with what the pipeline says of a frame."""

    def __init__(self, volume, alpha, slat_alpha, turns):
        self.tsdf, self.color, self.alpha, self.slat_alpha, self.turns = volume.tsdf, volume.color, alpha, slat_alpha, turns


def test_details_that_move_alone_are_measured_by_their_own_progress(shapes):
    volumes = [Volume(shapes.tsdf[0], torch.lerp(shapes.color[0], shapes.color[2], a)) for a in torch.linspace(0, 1, 4)]
    progress = [number / 3 for number in range(4)]
    details = ms.sequence_metrics([Turned(volume, 0.0, place, 0) for volume, place in zip(volumes, progress)])
    assert details["lag"] == pytest.approx(ms.sequence_metrics(volumes)["lag"], abs=1e-12)  # thirds are rounded in two ways
    assert ms.moving_alphas([0, 0.5, 1], [0, 0, 0]) == [0, 0.5, 1] and ms.moving_alphas([0.0] * 3, progress[:3]) == progress[:3]


@pytest.mark.parametrize(("turns", "changes"), [([0, 0, 0], 0), ([0, 1, 1, 1], 1), ([0, 2, 0], 2), ([0, 4], 0), ([3], 0), ([0, 1, 3, 3], 2)])
def test_a_turn_that_stays_is_one_change(shapes, turns, changes):
    assert ms.turn_changes(turns) == changes
    if len(turns) == 4:
        frames = [Turned(Volume(shapes.tsdf[0], shapes.color[0]), place / 3, place / 3, turn) for place, turn in enumerate(turns)]
        assert ms.sequence_metrics(frames)["turns"] == changes


# The judge


class Reader:
    """A judge of the tests: picks the strip whose pictures are darkest."""

    def __init__(self, words="{{\"best\": {}}}"):
        self.words, self.seen = words, []

    def __call__(self, messages, **options):
        images = [part["image_url"]["url"] for part in messages[0]["content"] if part["type"] == "image_url"]
        levels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))).mean() for url in images]
        self.seen.append(levels)
        return self.words.format(1 + int(np.argmin(levels)))


MORPHS = {"light": torch.full((4, 8, 8, 8, 3), 0.9), "dark": torch.full((4, 8, 8, 8, 3), 0.2), "mid": torch.full((4, 8, 8, 8, 3), 0.5)}


def test_judge_sees_options_in_drawn_orders_and_picks_are_counted():
    judge = Reader()
    result = ms.aesthetic_preference(judge, MORPHS, votes=3, judge="darkest")
    assert result.picks == {"light": 0, "dark": 12, "mid": 0} and result.asked == result.answered == 12
    assert {tuple(record["order"]) for record in result.records} != {tuple(MORPHS)}
    assert len({record["order"].index("dark") for record in result.records}) == 3
    assert result.shares()["dark"].mean == 1 and result.shares()["dark"].low > 0.7 and result.judge == "darkest"
    again = ms.aesthetic_preference(Reader(), MORPHS, votes=3)
    assert [record["order"] for record in again.records] == [record["order"] for record in result.records]


def test_judge_behind_a_client():
    asked = []

    def create(**call):
        asked.append(call)
        answer = Reader()(call["messages"])
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=answer))])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    result = ms.aesthetic_preference(client, MORPHS, model="some-judge", temperature=0)
    assert result.judge == "some-judge" and result.picks["dark"] == 4
    assert asked[0]["model"] == "some-judge" and asked[0]["temperature"] == 0
    with pytest.raises(ValueError, match="model"):
        ms.aesthetic_preference(client, MORPHS)


def test_answers_without_an_option_end_the_vote():
    with pytest.raises(RuntimeError, match="got 0.*no idea"):
        ms.aesthetic_preference(lambda messages: "no idea", MORPHS)
    answers = iter(["no idea"] + ['{"best": 1}'] * 3)
    result = ms.aesthetic_preference(lambda messages: next(answers), MORPHS, min_success=0.7)
    assert result.answered == 3 and result.asked == 4


@pytest.mark.parametrize(
    ("answer", "pick"),
    [('{"best": 2}', 2), ('```json\n{"best": "3"}\n```', 3), ("Option 1.", 1), ("The best strip is number 2", 2), ("2", 2), ("1 or 2", None), ("", None), ('{"best": 9}', None), ('{"best": 0}', None)],
)
def test_picks_are_read(answer, pick):
    assert ms.parse_pick(answer, 3) == pick


def test_strip_holds_both_ends():
    frames = torch.linspace(0, 1, 11)[:, None, None, None].expand(11, 4, 4, 3)
    strip = ms.morph_strip(frames, 3)
    assert strip.shape == (4, 12, 3) and strip.dtype == np.uint8
    assert [int(strip[0, 4 * i, 0]) for i in range(3)] == [0, 128, 255]


def test_study_writes_films_and_a_page(tmp_path):
    from papers10.core.media import read_video

    page = ms.preference_study(tmp_path, MORPHS, names=["a", "b", "c", "d"], size=16, against="dark")
    films = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("films/*/*.gif"))
    assert page == tmp_path / "study.html" and films[:4] == [f"films/dark/{name}.gif" for name in "abcd"]
    film = read_video(tmp_path / films[0]).frames
    # Equal frames may be stored as one that is shown longer.
    assert film.shape[1:] == (16, 16, 3) and len(film) <= 14
    assert "Which morph do you like better?" in page.read_text()
    with pytest.raises(ValueError, match="names"):
        ms.preference_study(tmp_path, MORPHS, names=["a", "a", "b", "c"])
    with pytest.raises(ValueError, match="morphs"):
        ms.preference_study(tmp_path, {"dark": MORPHS["dark"]})


GOOD = torch.rand(2, 4, 1, 8, 8, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ms.render_volumes(torch.zeros(1, 4, 4)), ValueError, "tsdf"),
        (lambda: ms.render_volumes(torch.zeros(1, 4, 4, 5)), ValueError, "tsdf"),
        (lambda: ms.render_volumes(torch.zeros(1, 4, 4, 4, dtype=torch.bool)), TypeError, "tsdf"),
        (lambda: ms.render_volumes(torch.full((1, 4, 4, 4), math.nan)), ValueError, "tsdf.*finite"),
        (lambda: ms.render_volumes(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4, 4)), ValueError, "color"),
        (lambda: ms.render_volumes(torch.zeros(1, 4, 4, 4), views="ortho5"), ValueError, "did you mean 'ortho4'"),
        (lambda: ms.render_volumes(torch.zeros(1, 4, 4, 4), size=1), ValueError, "size"),
        (lambda: ms.view_cameras("ortho4"), ValueError, "views"),
        (lambda: ms.spread_colors(torch.tensor([[0, 9, 0, 0]]), torch.zeros(1, 3), 8), ValueError, "coords"),
        (lambda: ms.frame_images([]), ValueError, "frames"),
        (lambda: ms.frame_images([3]), TypeError, "frame"),
        (lambda: ms.frame_images([torch.zeros(4, 4, 4)], kind="cloud"), ValueError, "kind"),
        (lambda: ms.morph_scores(GOOD[:, :1]), ValueError, "images.*two"),
        (lambda: ms.morph_scores(GOOD[0]), ValueError, "images"),
        (lambda: ms.morph_scores(GOOD, source=GOOD[:1, 0]), ValueError, "source"),
        (lambda: ms.set_scores(GOOD), ValueError, "endpoints"),
        (lambda: ms.set_scores(GOOD[:, :2], training=GOOD), ValueError, "three frames"),
        (lambda: ms.floaters(torch.zeros(1, 4, 4, 4)), TypeError, "occupancy"),
        (lambda: ms.floaters(torch.zeros(1, 4, 4, 4, dtype=torch.bool), connectivity=4), ValueError, "connectivity"),
        (lambda: ms.sequence_metrics([]), ValueError, "sequences"),
        (lambda: ms.aesthetic_preference(None, MORPHS), TypeError, "client"),
        (lambda: ms.aesthetic_preference(Reader(), {"one": MORPHS["dark"]}), ValueError, "two arms"),
        (lambda: ms.aesthetic_preference(Reader(), {"a": MORPHS["dark"], "b": MORPHS["mid"][:1]}), ValueError, "one shape"),
        (lambda: ms.aesthetic_preference(Reader(), MORPHS, votes=0), ValueError, "votes"),
        (lambda: ms.aesthetic_question([np.zeros((2, 2, 3), np.uint8)]), ValueError, "strips"),
        (lambda: ms.morph_strip(GOOD[0, :, 0], 9), ValueError, "columns"),
        (lambda: ms.train_extractor(0, 0), ValueError, "steps"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
