"""A clip with its cues, and where its primitives begin."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from papers10.adagar.initialisation import (
    VideoScene,
    candidates,
    draw,
    initialise,
    mask_labels,
    merge_tracks,
    normalise_depth,
    query_frames,
    sampling_weights,
)
from papers10.splat.estimators import GroundTruth, Tracks, grid_queries

T, H, W = 6, 24, 36


def moving(step=1.5):
    """A bright square that moves right by `step` pixels a frame over a still ground, with everything known: (scene, true tracks of all)."""
    rows, columns = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    ground = 0.3 + 0.2 * torch.rand(H, W, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([((columns - 8 - step * f).abs() < 5) & ((rows - 12).abs() < 5) for f in range(T)])
    frames = torch.where(masks[..., None], torch.tensor([0.9, 0.8, 0.2]), ground)
    points = grid_queries(frames, stride=3)
    on = masks[0][points[:, 2].long(), points[:, 1].long()]
    tracks = points[:, None, 1:] + torch.arange(T)[:, None] * torch.tensor([step, 0.0]) * on[:, None, None]
    inside = masks[torch.arange(T), tracks[..., 1].long(), tracks[..., 0].long().clamp(max=W - 1)]
    scene = VideoScene.from_array(frames, depth=torch.where(masks, 1.0, 3.0), tracks=tracks, visibility=inside == on[:, None], masks=masks)
    return scene, on


def paths(model, scene):
    camera = model.cameras(*scene.size)
    with torch.no_grad():
        return model.positions(scene.times)[..., :2] * camera.Ks[0].diagonal()[:2] + camera.Ks[0, :2, 2]


def test_depth_labels_and_query_frames_by_hand():
    assert normalise_depth(torch.tensor([[[2.0, 4.0], [6.0, 8.0]]])).flatten().tolist() == [0.5, 1.0, 1.5, 2.0]
    assert normalise_depth(torch.full((2, 2, 2), 7.0)).unique().tolist() == [1.25]
    labels = mask_labels(torch.tensor([[[False, False, False, True, True, True]] * 3]))
    assert labels[0, 1].tolist() == [-1, -1, 0, 0, 1, 1]
    assert [query_frames(n) for n in (1, 2, 5, 11)] == [[0], [0, 1], [0, 1, 2, 3, 4], [0, 3, 6, 9, 10]]


@pytest.mark.parametrize("motion", ["hermite", "linear", "cubic", "poly_fourier"])
@pytest.mark.parametrize("aspect", ["isotropic", "stretch"])
def test_primitives_move_as_the_tracks_do(motion, aspect):
    scene, _ = moving()
    model = initialise(scene, n=200, motion=motion, aspect=aspect, margin=0)
    path, front = paths(model, scene), model.attributes[:, 0] > 0
    assert int(front.sum()) > 10 and int((~front).sum()) >= 40
    shift = path - path[:1]
    true = torch.arange(T)[:, None] * torch.tensor([1.5, 0.0])
    assert (shift[:, front] - true[:, None]).abs().max() < 0.1 and shift[:, ~front].abs().max() < 0.1
    depth = model.positions(0.0)[0, :, 2].detach()
    assert depth[~front].median() == pytest.approx(2.0, abs=1e-3) and depth[front].median() == pytest.approx(0.5, abs=1e-3)
    assert model.colors.isfinite().all() and float(model.opacities.detach().abs().max()) == 0
    spread = model.log_scales.detach().exp()[:, 1] * H / 2
    assert spread.min() >= 0.5 - 1e-4 and spread.max() <= H / 10 + 1e-4


def test_same_seed_same_start_and_rows_add_up():
    scene, _ = moving()
    first, second, third = (initialise(scene, n=61, seed=s) for s in (0, 0, 1))
    assert len(first) == 61 and all(torch.equal(a, b) for a, b in zip(first.params().values(), second.params().values()))
    assert not torch.equal(first.means, third.means)


def test_margin_lies_outside_and_moves_with_the_background():
    scene, _ = moving()
    path = paths(initialise(scene, n=100, margin=0.25), scene)[:, 90:]
    size = torch.tensor([W, H])
    assert (((path[0] < 0) | (path[0] > size)).any(-1)).all() and ((path[0] >= -size / 4 - 1e-3) & (path[0] <= 1.25 * size + 1e-3)).all()
    assert (path - path[:1]).abs().max() < 0.05


def test_density_follows_its_formula():
    scene, _ = moving()
    places = candidates(scene, 0)
    assert places.tracked.all()
    moved, still = places.side > 0, places.side < 0
    assert places.amplitude[moved].max() == pytest.approx(7.5, abs=1e-4) and places.amplitude[still].max() < 1e-6
    flat = places._replace(edge=torch.zeros_like(places.edge))
    weights = sampling_weights(flat)
    assert weights[still].unique().tolist() == [0.25] and weights[moved].max() == pytest.approx(2 * 4.25)
    with_depth = sampling_weights(places._replace(edge=torch.ones_like(places.edge)))
    torch.testing.assert_close(with_depth, 2 * weights)


def test_background_keeps_its_fifth_and_draws_do_not_repeat():
    background = torch.arange(100) < 40
    rows = draw(torch.where(background, 1e-9, 1.0), 50, background=background)
    assert len(rows.unique()) == 50 and int(background[rows].sum()) == 10
    with pytest.raises(ValueError, match="n: expected a number in"):
        draw(torch.tensor([1.0, 0.0]), 2)


def test_copies_merge_and_fill_gaps():
    line = torch.stack([torch.arange(5.0), torch.zeros(5)], -1)
    tracks = torch.stack([line, line + 0.4, line + 5, line])
    seen = torch.ones(4, 5, dtype=torch.bool)
    seen[0, 3:] = False
    merged, now, _, kept = merge_tracks(tracks, seen, seen.float(), torch.tensor([0, 2, 0, 0]))
    assert kept.tolist() == [0, 2] and now.all() and merged.shape == (2, 5, 2)


def test_a_hidden_stretch_follows_the_neighbours():
    scene, on = moving()
    seen = scene.visibility.clone()
    chosen = int(on.nonzero()[4, 0])
    seen[chosen, 1:] = False
    places = candidates(VideoScene.from_array(scene.frames, tracks=scene.tracks, visibility=seen, masks=scene.masks), 0)
    row = int((places.xy - scene.tracks[chosen, 0]).norm(dim=-1).argmin())
    assert (places.knots[row, -1, 0] - places.knots[row, 0, 0]) * H / 2 == pytest.approx(7.5, abs=0.3)
    alone = VideoScene.from_array(scene.frames, tracks=scene.tracks[:1], visibility=torch.arange(T)[None] == 2)
    assert candidates(alone, 0).knots.std(1).max() < 1e-6


def test_times_stay_those_of_the_whole_clip():
    scene, _ = moving()
    part = scene.subset([1, 3, 5])
    assert part.times.tolist() == [0.2, 0.6, 1.0] and part.n_frames == T and part.subset([1]).times.tolist() == [0.6]
    model = initialise(scene, n=150, margin=0, train_frames=[1, 3, 5])
    assert model.options["n_frames"] == T
    front = model.attributes[:, 0] > 0
    path = paths(model, scene)[:, front]
    assert (path - path[:1] - torch.arange(T)[:, None, None] * torch.tensor([1.5, 0.0])).abs().max() < 0.3


@pytest.mark.parametrize("cues", [{}, {"depth": 1}, {"masks": 1}, {"tracks": 1}, {"depth": 1, "masks": 1}, {"tracks": 1, "masks": 1}])
def test_every_cue_may_be_missing(cues):
    full, _ = moving()
    given = {name: getattr(full, name) for name in cues}
    if "tracks" in given:
        given["visibility"] = full.visibility
    scene = VideoScene.from_array(full.frames, **given)
    model = initialise(scene, n=80, margin=0)
    z = model.positions(0.5)[0, :, 2].detach()
    if "depth" not in cues:
        expected = {1.0, 1.5} if "masks" in cues else {1.25}
        assert {round(v, 3) for v in z.tolist()} == expected
    if "tracks" not in cues:
        assert float(model.position_knots.detach().abs().max()) < 1e-6
    assert all(value.isfinite().all() for value in model.params().values())


@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("sampling", ["adaptive", "uniform", "random"])
def test_one_frame_and_few_primitives(n, sampling):
    scene = VideoScene.from_array(moving()[0].frames[0])
    model = initialise(scene, n=n, sampling=sampling, n_waves=1)
    assert len(model) == n and model.position_knots.shape[1] == 1
    assert model.render(0.0, W, H).color.isfinite().all()
    assert float(model.opacities.detach()[0]) == pytest.approx(math.log(1 / 9) if sampling == "random" else 0.0)


def test_what_is_only_warned_of():
    frames = moving()[0].frames
    with pytest.warns(UserWarning, match="tracks: none of 3"):
        model = initialise(VideoScene.from_array(frames, tracks=torch.zeros(3, T, 2), visibility=torch.zeros(3, T, dtype=torch.bool)), n=20)
    assert len(model) == 20
    with pytest.warns(UserWarning, match="masks: no pixel is foreground"):
        initialise(VideoScene.from_array(frames, masks=torch.zeros(T, H, W)), n=20)


def test_waves_and_attributes():
    scene, _ = moving()
    assert initialise(scene, n=20, n_waves=0).waves.shape == (20, 0, 3)
    fixed = initialise(scene, n=20, n_waves=3, wave_start="fixed", attributes={"feature": 2, "mask": 1})
    assert fixed.waves.shape == (20, 3, 3) and float(fixed.wave_weights.detach()[0, 0]) == pytest.approx(0.1)
    assert not fixed.attributes[:, :2].any() and set(fixed.attributes[:, 2].tolist()) <= {-2.0, 2.0}


def test_cues_by_estimators_replace_those_given():
    scene, _ = moving()
    points = grid_queries(scene.frames, stride=6, times=query_frames(T))
    truth = GroundTruth(depth=torch.full((T, H, W), 3.0), tracks=points[:, None, 1:].repeat(1, T, 1), masks=~scene.masks)
    changed = scene.with_cues(depth_model=truth, tracker=truth, masks=truth, track_stride=6)
    assert changed.depth.unique().tolist() == [1.25] and torch.equal(changed.masks, ~scene.masks)
    assert changed.queries.unique().tolist() == query_frames(T) and scene.with_cues().tracks is scene.tracks


def test_a_folder_loads_as_it_is(tmp_path):
    scene, _ = moving()
    for kind in ("images", "masks", "depth", "tracks"):
        (tmp_path / kind).mkdir()
    for f in range(T):
        Image.fromarray((scene.frames[f] * 255).byte().numpy()).save(tmp_path / "images" / f"{f:05d}.png")
        Image.fromarray((scene.masks[f] * 255).byte().numpy()).save(tmp_path / "masks" / f"{f:05d}.png")
        np.save(tmp_path / "depth" / f"{f:05d}.npy", (1 / scene.depth[f]).numpy())
        logits = torch.where(scene.visibility[:, f], -6.0, 6.0)
        np.save(tmp_path / "tracks" / f"00000_{f:05d}.npy", torch.cat([scene.tracks[:, f] - 0.5, logits[:, None], torch.full((len(logits), 1), -6.0)], 1).numpy())
    loaded = VideoScene.from_folder(tmp_path, disparity=True)
    torch.testing.assert_close(loaded.tracks, scene.tracks)
    assert torch.equal(loaded.visibility, scene.visibility) and torch.equal(loaded.masks, scene.masks)
    torch.testing.assert_close(loaded.depth, scene.depth, atol=1e-5, rtol=0)
    assert len(initialise(loaded, n=30)) == 30 and len(VideoScene.from_video(tmp_path / "images", stride=2, max_frames=2, tracker="none", masks="none")) == 2
    (tmp_path / "depth" / "00000.npy").unlink()
    with pytest.raises(ValueError, match="depth: expected 6 files"):
        VideoScene.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="images/"):
        VideoScene.from_folder(tmp_path / "masks")


def test_a_row_of_tapvid():
    scene, _ = moving()
    entry = {"video": (scene.frames * 255).byte().numpy(), "points": (scene.tracks / torch.tensor([W, H])).numpy(), "occluded": ~scene.visibility.numpy()}
    loaded = VideoScene.from_tapvid(entry)
    torch.testing.assert_close(loaded.tracks, scene.tracks)
    torch.testing.assert_close(VideoScene.from_tapvid({**entry, "points": scene.tracks.numpy()}).tracks, scene.tracks)
    with pytest.raises(ValueError, match="entry: expected occluded"):
        VideoScene.from_tapvid({"video": entry["video"], "points": entry["points"]})


FRAMES = torch.full((3, 8, 10, 3), 0.5)
SEEN = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("make, message", [
    (lambda: VideoScene(torch.zeros(3, 8, 10)), "frames: expected shape"),
    (lambda: VideoScene.from_array(torch.zeros(0, 8, 10, 3)), "frames: expected at least one"),
    (lambda: VideoScene(FRAMES * 3), "frames: expected values in"),
    (lambda: VideoScene(FRAMES * math.nan), "frames"),
    (lambda: VideoScene.from_array(FRAMES, depth=torch.ones(2, 8, 10)), "depth: expected shape"),
    (lambda: VideoScene(FRAMES, depth=torch.zeros(3, 8, 10)), "depth: expected at least 0.01"),
    (lambda: VideoScene.from_array(FRAMES, depth=torch.ones(3, 8, 10), disparity=torch.ones(3, 8, 10)), "disparity: expected None"),
    (lambda: VideoScene.from_array(FRAMES, masks=torch.ones(3, 9, 10)), "masks: expected shape"),
    (lambda: VideoScene.from_array(FRAMES, visibility=SEEN), "visibility: expected None"),
    (lambda: VideoScene.from_array(FRAMES, tracks=torch.full((2, 3, 2), math.nan)), "tracks"),
    (lambda: VideoScene.from_array(FRAMES, tracks=torch.zeros(2, 3, 2), confidence=torch.full((2, 3), 2.0)), "confidence: expected values"),
    (lambda: VideoScene.from_array(FRAMES, tracks=torch.zeros(2, 3, 2), queries=torch.tensor([0, 3])), "queries: expected"),
    (lambda: VideoScene.from_array(FRAMES, tracks=Tracks(torch.zeros(2, 3, 2), SEEN, SEEN.float()), visibility=SEEN), "visibility: expected None"),
    (lambda: VideoScene.from_array(FRAMES, times=[0.0, 0.5, 0.5]), "times: expected rising"),
    (lambda: VideoScene.from_array(FRAMES, n_frames=2), "n_frames"),
    (lambda: VideoScene.from_array(FRAMES).subset([]), "frames: expected at least one"),
    (lambda: VideoScene.from_array(FRAMES).with_cues(tracker="lkk"), "name: expected one of"),
    (lambda: initialise(VideoScene.from_array(FRAMES), n=0), "n: expected"),
    (lambda: initialise(VideoScene.from_array(FRAMES), n=5, sampling="even"), "sampling: expected one of"),
    (lambda: initialise(VideoScene.from_array(FRAMES), n=5, wave_start="fft"), "wave_start: expected one of"),
    (lambda: initialise(VideoScene.from_array(FRAMES), n=5, margin=-1), "margin: expected"),
    (lambda: initialise(VideoScene.from_array(FRAMES), n=5, spread=0), "spread: expected"),
])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="frames: expected floats"):
        VideoScene(torch.zeros(3, 8, 10, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="masks: expected bool"):
        VideoScene(FRAMES, masks=torch.ones(3, 8, 10))
    with pytest.raises(TypeError, match="unexpected keyword"):
        initialise(VideoScene.from_array(FRAMES), n=5, gama=0.5)
