"""neoverse.evaluation: fits of poses, first poses, splits, tables, VBench's interface, refusals."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from papers10.core.random import generator
from papers10.neoverse import evaluation as ev
from papers10.neoverse.datasets import PosedFrames, from_clip
from papers10.neoverse.gaussians4d import oracle_gaussians
from papers10.neoverse.pipeline import OracleReconstructor, Reconstruction
from papers10.neoverse.world import SceneSpec, scene_clip
from papers10.splat.cameras import Sim3, invert_poses, se3_exp, se3_log
from papers10.splat.rotations import quat_to_matrix, so3_exp

FLOAT64 = {"dtype": torch.float64}
SPEC = SceneSpec.random(101)


@pytest.fixture(scope="module")
def room():
    clip = scene_clip(SPEC, [0.0, 0.5, 1.0], 24, 18)
    return clip, oracle_gaussians(SPEC, clip)


class TestAlignment:
    def test_the_pose_is_found_from_one_degree_off(self, room):
        clip, scene = room
        poses = clip.camtoworlds[1:2].double()
        exact = ev.align_test_views(scene, clip.rgb[1:2], poses, clip.Ks[1:2], [0.5], steps=0)
        start = invert_poses(se3_exp(torch.tensor([[0.02, -0.03, 0.03, 0.01, -0.012, 0.008]], **FLOAT64)) @ invert_poses(poses))
        found = ev.align_test_views(scene, exact.color, start, clip.Ks[1:2], [0.5], steps=60, rotation_lr=2e-3, translation_lr=2e-3, perceptual=0.0)
        left = se3_log(invert_poses(found.camtoworlds) @ poses)[0]
        assert math.degrees(float(left[3:].norm())) < 0.2 and float(found.psnr[0]) > float(found.start_psnr[0]) + 8
        assert found.losses.shape == (1, 61) and found.twists.shape == (1, 61, 6) and not found.twists[0, 0].any()
        assert float(found.losses.min()) == pytest.approx(10 ** (-float(found.psnr[0]) / 10), rel=1e-3)

    def test_no_step_is_the_start_and_the_scene_stays(self, room):
        clip, scene = room
        before = {name: value.clone() for name, value in scene.gaussians.tensors().items()}
        found = ev.align_test_views(scene, clip.rgb[:2], clip.camtoworlds[:2], clip.Ks[:2], [0.0, 0.5], steps=0)
        torch.testing.assert_close(found.camtoworlds, clip.camtoworlds[:2].double())
        torch.testing.assert_close(found.psnr, found.start_psnr)
        ev.align_test_views(scene.at(0.0), clip.rgb[:1], clip.camtoworlds[:1], clip.Ks[:1], steps=2)
        assert all(torch.equal(value, before[name]) for name, value in scene.gaussians.tensors().items())

    def test_what_cannot_be_seen_stays_where_it_is(self, room):
        clip, scene = room
        away = clip.camtoworlds[:1].double()
        away[:, :3, 3] += 50 * away[:, :3, 2]
        found = ev.align_test_views(scene, clip.rgb[:1], away, clip.Ks[:1], [0.0], steps=3)
        torch.testing.assert_close(found.camtoworlds, away)
        empty = ev.align_test_views(scene, clip.rgb[:0], clip.camtoworlds[:0], clip.Ks[:0], [])
        assert empty.psnr.shape == (0,) and empty.camtoworlds.shape == (0, 4, 4)

    def test_refusals(self, room):
        clip, scene = room
        good = {"images": clip.rgb[:1], "camtoworlds": clip.camtoworlds[:1], "Ks": clip.Ks[:1], "times": [0.0]}
        for change, words in (
            ({"times": None}, "times: expected one a view"),
            ({"times": [0.0, 1.0]}, "times: expected shape"),
            ({"images": (255 * clip.rgb[:1]).to(torch.uint8)}, r"images: expected numbers in \[0, 1\]"),
            ({"images": clip.rgb[:1] * math.nan}, "images: expected finite"),
            ({"camtoworlds": 2 * clip.camtoworlds[:1]}, "camtoworlds: expected a rotation"),
            ({"Ks": clip.Ks}, "Ks: expected shape"),
            ({"steps": -1}, "steps"),
        ):
            with pytest.raises(ValueError, match=words):
                ev.align_test_views(scene, **{**good, **change})


class TestStart:
    def reconstruction(self, clip, scene, world=None):
        poses = clip.camtoworlds.double() if world is None else world.poses(clip.camtoworlds.double())
        return Reconstruction(scene, poses, clip.Ks, clip.depth, clip.rgb, clip.times)

    def test_the_data_sets_world_is_brought_over(self, room):
        clip, scene = room
        turn = quat_to_matrix(so3_exp(torch.tensor([0.3, 1.0, -0.2], **FLOAT64)))
        world = Sim3(torch.tensor(0.4, **FLOAT64), turn, torch.tensor([1.0, 2, 3], **FLOAT64))
        truth, target = clip.camtoworlds.double(), clip.camtoworlds[[2, 0]].double()
        found = ev.start_poses("sim3", self.reconstruction(clip, scene, world), torch.zeros(2), context=truth, target=target)
        torch.testing.assert_close(found, world.poses(target), atol=1e-5, rtol=0)

    def test_between_and_again(self, room):
        clip, scene = room
        own = self.reconstruction(clip, scene)
        middle = ev.start_poses("interpolate", own, torch.tensor([0.25], **FLOAT64))[0, :3, 3]
        torch.testing.assert_close(middle, (own.camtoworlds[0] + own.camtoworlds[1])[:3, 3] / 2)
        larger = own.camtoworlds.clone()
        larger[:, :3, 3] *= 2.5
        found = ev.start_poses("repredict", own, torch.zeros(2), again=(larger, larger[1:]))
        torch.testing.assert_close(found, own.camtoworlds[1:], atol=1e-6, rtol=0)
        for kind, words in (("sim3", "context: expected"), ("repredict", "again: expected"), ("guess", "kind: expected one of")):
            with pytest.raises(ValueError, match=words):
                ev.start_poses(kind, own, torch.zeros(1))


def frames(count=200, cameras=2):
    return PosedFrames(
        "many",
        [torch.zeros(4, 4, 3)] * count,
        torch.tensor([[4, 4]]).expand(count, 2),
        torch.arange(count, **FLOAT64) % (count // cameras),
        cameras=torch.arange(cameras).repeat_interleave(count // cameras),
    )


class TestProtocols:
    @pytest.mark.parametrize("name", ev.PROTOCOLS)
    def test_numbers_of_supplement_d(self, name):
        protocol = ev.PROTOCOLS[name]
        split = protocol.split(frames())
        assert (len(set(split.context)), len(set(split.target))) == (protocol.context, protocol.target)
        assert not set(split.context) & set(split.target)

    def test_which_pictures(self):
        many = frames()
        adt = ev.PROTOCOLS["adt"].split(frames(64, 1))
        assert adt.context == list(range(0, 64, 2)) and adt.target == list(range(1, 64, 2))
        dycheck = ev.PROTOCOLS["dycheck"].split(many)
        assert {int(many.cameras[i]) for i in dycheck.context} == {0} and {int(many.cameras[i]) for i in dycheck.target} == {1}
        times = [float(many.times[i]) for i in dycheck.target]
        assert times == sorted(times) and [float(many.times[i]) for i in dycheck.context] == times[::2]

    def test_refusals(self):
        with pytest.raises(ValueError, match="frames: expected at least 24 pictures, got 10"):
            ev.PROTOCOLS["vrnerf"].split(frames(10, 1))
        with pytest.raises(ValueError, match=r"cameras 0 and 1 in many, got \[0\]"):
            ev.PROTOCOLS["dycheck"].split(frames(100, 1))


class TestEvaluate:
    def test_one_scene(self):
        times = torch.linspace(0, 1, 5, **FLOAT64)
        clip = scene_clip(SPEC, times, 24, 18)
        own, split = from_clip(clip), ev.Split([4, 0, 2], [1, 3])
        found = ev.evaluate_sequence(OracleReconstructor(SPEC), own, split, width=24, height=18, steps=3)
        assert [view["picture"] for view in found.views] == [1, 3] and found.summary["psnr"] > 15
        assert found.summary["psnr"] >= found.summary["psnr_start"] and found.summary["pose_ate"] < 1e-5
        assert found.summary["psnr"] == pytest.approx(sum(view["psnr"] for view in found.views) / 2)
        assert ("lpips" in found.views[0]) == (not found.lpips_note)
        again = ev.evaluate_sequence(OracleReconstructor(SPEC), own, split, width=24, height=18, steps=3)
        assert again.summary["psnr"] == found.summary["psnr"]
        with pytest.raises(ValueError, match="split: expected pictures"):
            ev.evaluate_sequence(OracleReconstructor(SPEC), own, ev.Split([], [1]), width=24, height=18)

    def test_a_second_pass(self):
        clip = scene_clip(SPEC, torch.linspace(0, 1, 5, **FLOAT64), 24, 18)

        def run(pictures, times, *, static=False, motion=True):
            where = [int((clip.rgb - picture).abs().mean((1, 2, 3)).argmin()) for picture in pictures]
            part = clip.index(where)
            return Reconstruction(oracle_gaussians(SPEC, part._replace(times=times)), part.camtoworlds, part.Ks, part.depth, pictures, times)

        options = {"width": 24, "height": 18, "steps": 0}
        found = ev.evaluate_sequence(run, from_clip(clip), ev.Split([0, 2, 4], [1, 3]), start="repredict", **options)
        torch.testing.assert_close(found.alignment.camtoworlds, clip.camtoworlds[[1, 3]].double(), atol=1e-5, rtol=0)

    def test_trials_give_floats_and_repeat(self):
        options = {"steps": 2, "width": 24, "height": 18}
        first = ev.alignment_trial("frame", 100, **options)
        assert first == ev.alignment_trial("frame", 100, **options)
        assert json.dumps(first) and first["angle_start"] == pytest.approx(1)
        for protocol in ev.PROTOCOL_ROOMS:
            found = ev.protocol_trial("oracle", 100, protocol=protocol, **{**options, "steps": 0})
            assert all(math.isfinite(value) for value in found.values()) and found["pose_auc_30"] == 1
        with pytest.raises(ValueError, match="arm: expected one of"):
            ev.protocol_trial("vggt", 0)

    def test_tracks(self):
        points = torch.randn(4, 6, 3, generator=generator(0, "tracks"), **FLOAT64)
        seen = torch.ones(4, 6, dtype=torch.bool)
        found = ev.evaluate_tracks(5 * points, points, seen)
        assert found["apd"] == 1 and found["epe"] < 1e-12 and found["scale"] == pytest.approx(0.2)
        off = ev.evaluate_tracks(points + 0.2, points, seen, rescale="none")
        assert off["apd"] == 0 and off["epe"] == pytest.approx(0.2 * math.sqrt(3))


class TestTables:
    def test_rows_are_complete(self):
        for name, about in ev.TABLES.items():
            assert all(len(row) == 2 + len(about["columns"]) for row in about["rows"]), name
        assert ev.paper_table("2")[2]["psnr"] == 32.56

    def test_ours_below(self):
        rows = ev.paper_table("1", [{"data": "room", "method": "oracle", "psnr": 20.0, "other": 3}])
        assert rows[-1] == {"source": "measured here", "data": "room", "method": "oracle", "psnr": 20.0, "ssim": None, "lpips": None}
        for bad, words in (({"data": "room"}, "keys method"), ({"data": "a", "method": "b", "ps": 1}, "one of psnr, ssim, lpips")):
            with pytest.raises(ValueError, match=words):
                ev.paper_table("1", [bad])
        with pytest.raises(ValueError, match="name: expected one of"):
            ev.paper_table("5")


class TestVBench:
    def test_flicker(self):
        film = torch.zeros(3, 2, 2, 3)
        film[1] = 0.5
        assert ev.temporal_flickering(film) == pytest.approx(50) and math.isnan(ev.temporal_flickering(film[:1]))
        with pytest.raises(TypeError, match="frames: expected numbers"):
            ev.temporal_flickering(film.to(torch.uint8))

    def test_absent_or_not_allowed(self, monkeypatch):
        film = torch.zeros(2, 16, 16, 3)
        monkeypatch.setattr(ev, "have", lambda name: False)
        assert str(ev.vbench_scores([film])) == "n/a" and "not installed" in ev.vbench_scores([film]).reason
        monkeypatch.setattr(ev, "have", lambda name: True)
        assert "download=True" in ev.vbench_scores([film]).reason
        with pytest.raises(ValueError, match="dimensions: expected one of"):
            ev.vbench_scores([film], dimensions=["beauty"])
        with pytest.raises(ValueError, match="at least one film"):
            ev.vbench_scores([])

    def test_its_published_interface(self, monkeypatch, tmp_path):
        pytest.importorskip("av")
        asked = {}

        class VBench:
            def __init__(self, device, full_info_dir, output_path):
                asked.update(device=device, info=full_info_dir, out=output_path)

            def evaluate(self, videos_path, name, prompt_list=(), dimension_list=None, mode="vbench_standard"):
                asked.update(films=sorted(item.name for item in Path(videos_path).iterdir()), mode=mode)
                scores = {dimension: [0.5, [{"video_path": "a", "video_results": 0.5}]] for dimension in dimension_list}
                (Path(asked["out"]) / f"{name}_eval_results.json").write_text(json.dumps(scores))

        module = types.SimpleNamespace(VBench=VBench, __file__="/x/vbench/__init__.py", __spec__=None)
        monkeypatch.setitem(sys.modules, "vbench", module)
        monkeypatch.setattr(ev, "have", lambda name: True)
        found = ev.vbench_scores([torch.zeros(4, 16, 16, 3)] * 2, device="cpu", download=True)
        assert found.values == dict.fromkeys(ev.VBENCH_DIMENSIONS, 50.0) and found.reason == ""
        assert asked["films"] == ["00000.mp4", "00001.mp4"] and asked["mode"] == "custom_input"
        assert asked["info"].endswith("vbench/VBench_full_info.json") and str(asked["device"]) == "cpu"
