"""Applications of NeoVerse on rooms with known truth, and their command line."""

import pytest
import torch

from papers10.core.config import ConfigError
from papers10.core.media import read_video, to_float, write_video
from papers10.core.random import generator
from papers10.neoverse import app, apps
from papers10.neoverse.pipeline import (
    Clip,
    DepthReconstructor,
    NeoVersePipeline,
    OracleReconstructor,
    PopUpDepth,
)
from papers10.neoverse.trajectories import CameraTrajectory
from papers10.neoverse.world import SceneSpec, camera_path, scene_clip, scene_flow
from papers10.splat.cameras import se3_exp
from papers10.splat.metrics import psnr

ROOM = SceneSpec.random(3, motion="mixed")


def clip(frames=5, width=32, height=24, **options):
    seen = scene_clip(ROOM, torch.linspace(0, 1, frames), width, height, **options)
    return Clip(seen.rgb, seen.times, 8.0), seen


def oracle(**options):
    return NeoVersePipeline(OracleReconstructor(ROOM, **options))


def test_time_stops_and_slows():
    source, _ = clip()
    frozen = apps.bullet_time(oracle(), source, 0.25, num_frames=4, values={"angle": 10, "orbit_radius": 2})
    assert len(frozen.frames) == 4 and bool((frozen.times == 0.25).all())
    slow = apps.slow_motion(oracle(), source, 3)
    assert torch.allclose(slow.times, torch.linspace(0, 1, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match="resampled\\(13\\)"):
        apps.slow_motion(oracle(), source, 3, trajectory=CameraTrajectory.from_predefined("static", 5))


def test_stabilised_clip_is_calmer():
    wander = 0.02 * torch.randn(9, 6, generator=generator(0, "hand"), dtype=torch.float64)
    shaky = lambda times: camera_path(ROOM, times) @ se3_exp(wander[: len(times)])
    source, _ = clip(9, camtoworlds=shaky(torch.linspace(0, 1, 9, dtype=torch.float64)))
    made = apps.stabilize_video(oracle(camtoworlds=shaky), source, sigma=2.0, method="gaussian")
    assert made.after.rotation < 0.5 * made.before.rotation and made.output.frames.shape == (9, 24, 32, 3)


def test_edit_keeps_the_rest_and_cuts_at_half():
    source, seen = clip()
    mask = (seen.ids == 0).to(torch.uint8) * 255
    noisy = mask.clamp(20)
    conditions = apps.edit_conditions(source.frames, noisy[..., None]).check()
    assert torch.equal(conditions.mask[0, ..., 0], (mask == 0).float()) and float((conditions.rgb[0] * (1 - conditions.mask[0])).abs().max()) == 0
    with_depth = apps.edit_conditions(source.frames, mask, reconstruction=oracle().reconstruct(source))
    assert float(with_depth.depth[0][with_depth.mask[0] == 1].min()) > 0
    painted = apps.edit_video(oracle(), source, mask)
    kept = conditions.mask[0].expand_as(painted) == 1
    assert torch.allclose(painted[kept], source.frames[kept], atol=1e-5)

    class White:
        def __call__(self, conditions, prompts="", **options):
            return torch.ones_like(conditions.rgb)

    whitened = apps.edit_video(NeoVersePipeline(OracleReconstructor(ROOM), White()), source, mask, "white")
    assert torch.equal(whitened[kept], source.frames[kept]) and float(whitened[~kept].min()) == 1
    with pytest.raises(ValueError, match="edit_mask"):
        apps.edit_conditions(source.frames, mask[:2])


def test_background_is_the_empty_room():
    seen = scene_clip(ROOM, torch.linspace(0, 1, 9), 48, 36)
    found = oracle().reconstruct(Clip(seen.rgb, seen.times, 8.0))
    empty, alpha = apps.background_video(found)
    truth = scene_clip(ROOM, seen.times, 48, 36, background_only=True).rgb
    hidden = (seen.ids >= 0) & (alpha[..., 0] > 0.5)
    assert float(psnr(empty, truth, mask=hidden).mean()) > float(psnr(seen.rgb, truth, mask=hidden).mean()) + 2
    with pytest.raises(ValueError, match="separated"):
        apps.background_video(OracleReconstructor(ROOM)(seen.rgb, seen.times))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_tracks_follow_what_moves(start):
    seen = scene_clip(ROOM, torch.linspace(0.4, 0.6, 5), 48, 36)
    scene = OracleReconstructor(ROOM)(seen.rgb, seen.times).scene
    chosen = (seen.ids[start].reshape(-1) >= 0).nonzero()[:, 0][::9]
    queries, ids = seen.world[start].reshape(-1, 3)[chosen], seen.ids[start].reshape(-1)[chosen]
    found = apps.track_points(scene, queries, start)
    assert torch.allclose(found.points[:, start], queries.float())
    for frame in {max(start - 1, 0), min(start + 1, 4)} - {start}:
        truth = scene_flow(ROOM, queries, ids, float(seen.times[start]), float(seen.times[frame])).float()
        plain = apps.track_points(scene, queries, start, snap=False).points[:, frame]
        # The displacement of a point's own Gaussian is exact; a snap goes to the nearest pixel that sees the surface.
        assert torch.allclose(plain, truth, atol=1e-4)
        assert float((found.points[:, frame] - truth).norm(dim=-1).median()) < 0.1
    mixed = apps.track_points(scene, queries, torch.full((len(queries),), start))
    assert torch.equal(mixed.points, found.points)


def test_tracks_refuse():
    source, _ = clip(3)
    scene = OracleReconstructor(ROOM)(source.frames, source.times).scene
    assert apps.track_points(scene, torch.zeros(0, 3)).points.shape == (0, 3, 3)
    with pytest.raises(ValueError, match="start"):
        apps.track_points(scene, torch.zeros(1, 3), 3)
    with pytest.raises(ValueError, match="key frame 1"):
        apps.track_points(scene.index(scene.key != 1), torch.zeros(1, 3))


def test_larger_pictures_and_more_views():
    source, _ = clip(3)
    large = apps.super_resolve(oracle(), source, 2)
    assert large.frames.shape == (3, 48, 64, 3)
    by_eye = NeoVersePipeline(DepthReconstructor(PopUpDepth(masks="none"), cameras="still", flow="none"))
    views = apps.multi_view(by_eye, source, (-10.0, 20.0), step=10.0)
    assert list(views) == [-10.0, 20.0] and all(view.frames.shape == (3, 24, 32, 3) for view in views.values())
    there, back = apps.pan_there_and_back(by_eye, source, -10.0)
    assert len(there.frames) == len(back.frames) == 3


def test_a_world_grows():
    by_eye = NeoVersePipeline(DepthReconstructor(PopUpDepth(1.0, 4.0, 0.0, masks="none"), cameras="still"))
    right = CameraTrajectory.from_predefined("move_right", 5, distance=0.8, use_first_frame=False)
    world = apps.image_to_world(by_eye, clip()[0].frames[0], [right, right, "pan_left"], num_frames=5)
    assert world.seen[1] > world.seen[0] and len(world.films) == 3 and len(world.reconstruction) == 10
    world.reconstruction.check().scene.check()


@pytest.mark.parametrize(("line", "word"), [
    ("infer {v} --trajectory orbit_lefft --out {o}", "did you mean 'orbit_left'"),
    ("infer {v} --trajectory push_in --angle 3 --out {o}", "'distance'"),
    ("infer {v} --out film.avi", "--out"),
    ("infer {v} --out no/such/folder/film.gif", "folder"),
    ("infer none.mp4 --out {o}", "none.mp4"),
    ("infer {v} --reconstructor big --out {o}", "--reconstructor"),
    ("infer {v} --generator big --out {o}", "--generator"),
    ("infer {v} --device tpu --out {o}", "--device"),
    ("trajectory none.json", "none.json"),
])
def test_command_line_refuses(tmp_path, line, word):
    video = tmp_path / "clip.gif"
    write_video(video, clip(3)[0].frames, 8)
    with pytest.raises(ConfigError) as caught:
        app.main(line.format(v=video, o=tmp_path / "film.gif").split())
    assert word in str(caught.value)


def test_command_line_makes_films(tmp_path, capsys):
    source, seen = clip(5)
    video, mask, tour = tmp_path / "clip.gif", tmp_path / "mask.gif", tmp_path / "tour.json"
    write_video(video, source.frames, 8)
    write_video(mask, (seen.ids >= 0).float()[..., None].expand(-1, -1, -1, 3), 8)
    CameraTrajectory.from_predefined("orbit_left", 5, angle=5).to_json(tour)
    small = "--frames 5 --size 24"
    for name, line, frames in (("tour", f"infer {video} --trajectory {tour} --keyframes 3 {small}", 5), ("slow", f"slow-motion {video} --factor 2 {small}", 9),
                               ("calm", f"stabilize {video} {small}", 5), ("empty", f"background {video} {small}", 5), ("edited", f"edit {video} {mask} {small}", 5)):
        out = tmp_path / f"{name}.gif"
        assert app.main([*line.split(), "--out", str(out)]) == 0
        assert len(read_video(out).frames) == frames, name
        assert str(out) in capsys.readouterr().out
    assert app.main(["trajectory", str(tour), "--out", str(tmp_path / "tour.npz")]) == 0
    assert "5 frames" in capsys.readouterr().out
    assert len(CameraTrajectory.from_npz(tmp_path / "tour.npz")) == 5
    assert to_float(read_video(tmp_path / "tour.gif").frames).shape[-1] == 3
