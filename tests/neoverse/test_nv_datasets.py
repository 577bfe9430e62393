"""neoverse.datasets: miniatures in the data sets' own schemas, half pixels, crops, lenses, refusals."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from papers10.core.random import generator
from papers10.neoverse import datasets as ds
from papers10.splat.cameras import invert_poses, make_poses
from papers10.splat.rotations import convert_quat, matrix_to_quat, quat_to_matrix

FLOAT64 = {"dtype": torch.float64}


def poses(n=4):
    source = generator(0, "datasets")
    return make_poses(quat_to_matrix(torch.randn(n, 4, generator=source, **FLOAT64)), torch.randn(n, 3, generator=source, **FLOAT64))


def picture(place, width=16, height=12, value=100):
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(place)


def put(place, content):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(content if isinstance(content, str) else json.dumps(content))


def same(frames, wanted, K=((20.0, 0, 8), (0, 20, 6), (0, 0, 1))):
    torch.testing.assert_close(frames.camtoworlds, wanted, atol=1e-9, rtol=0)
    rgb, inner = frames.read()
    assert rgb.shape == (len(frames), 12, 16, 3) and rgb.dtype == torch.float32
    torch.testing.assert_close(inner, torch.tensor(K, **FLOAT64).expand(len(frames), 3, 3))


def dycheck(folder, **change):
    view = poses()
    names = ["0_00000", "0_00002", "1_00000", "1_00001"]
    for name, pose in zip(names, view):
        picture(folder / "rgb" / "2x" / f"{name}.png")
        camera = {
            "orientation": pose[:3, :3].T.tolist(),
            "position": pose[:3, 3].tolist(),
            "focal_length": 40,
            "principal_point": [16, 12],
            "skew": 0,
            "pixel_aspect_ratio": 1,
            "radial_distortion": [0, 0, 0],
            "tangential_distortion": [0, 0],
            "image_size": [32, 24],
            **change,
        }
        put(folder / "camera" / f"{name}.json", camera)
    meta = {n: {"camera_id": int(n[0]), "warp_id": int(n[2:]), "appearance_id": int(n[2:])} for n in reversed(names)}
    put(folder / "metadata.json", meta)
    return view


class TestDycheck:
    def test_order_scale_and_test_pictures(self, tmp_path):
        wanted = dycheck(tmp_path)
        frames = ds.load_dycheck(tmp_path, scale=2)
        same(frames, wanted)
        assert frames.times.tolist() == [0, 2, 0, 1] and frames.cameras.tolist() == [0, 0, 1, 1]
        assert frames.held_out.tolist() == [False, False, True, True] and frames.masks is None
        other = frames.index([3, 0])
        torch.testing.assert_close(other.camtoworlds, wanted[[3, 0]])
        assert len(frames.index(frames.held_out)) == 2 and len(frames.index(slice(0, 3))) == 3

    def test_covisible_masks(self, tmp_path):
        dycheck(tmp_path)
        for name in ("1_00000", "1_00001"):
            place = tmp_path / "covisible" / "2x" / "val" / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat([[0, 255]], 12, 0).astype(np.uint8).repeat(8, 1)).save(place)
        assert ds.load_dycheck(tmp_path, scale=2, masks=True).masks is None
        for name in ("0_00000", "0_00002"):
            picture(tmp_path / "covisible" / "2x" / "val" / f"{name}.png", value=255)
        masks = ds.load_dycheck(tmp_path, scale=2, masks=True).read_masks(16, 12)
        assert masks.dtype == torch.bool and masks.float().mean((1, 2)).tolist() == [1, 1, 0.5, 0.5]

    def test_refusals(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            ds.load_dycheck(tmp_path)
        dycheck(tmp_path)
        with pytest.raises(FileNotFoundError, match="and 3 more pictures, found none"):
            ds.load_dycheck(tmp_path, scale=1)
        dycheck(tmp_path, orientation=[[2, 0, 0], [0, 1, 0], [0, 0, 1]])
        with pytest.raises(ValueError, match="camtoworlds: expected a rotation"):
            ds.load_dycheck(tmp_path, scale=2)
        dycheck(tmp_path, focal_length=None)
        with pytest.raises(ValueError, match="data set's own schema in .*TypeError"):
            ds.load_dycheck(tmp_path, scale=2)
        (tmp_path / "metadata.json").write_text("{")
        with pytest.raises(ValueError, match="expected JSON"):
            ds.load_dycheck(tmp_path, scale=2)


def test_scannetpp(tmp_path):
    wanted = poses()
    names = [f"DSC{i:05d}.JPG" for i in range(4)]
    dslr = tmp_path / "0a5c013435" / "dslr"
    for name in names:
        picture(dslr / "undistorted_images" / name)
    put(dslr / "train_test_lists.json", {"train": [names[2], names[0]], "test": [names[1]], "has_masks": False})
    intrinsics = {"fl_x": 20, "fl_y": 20, "cx": 8, "cy": 6, "w": 16, "h": 12, "camera_model": "PINHOLE", "frames": []}
    put(dslr / "nerfstudio" / "transforms_undistorted.json", intrinsics)
    put(dslr / "colmap" / "cameras.txt", "1 OPENCV_FISHEYE 1752 1168 790 791 879 586 -0.02 -0.007 0 0\n")
    view = invert_poses(wanted)
    quats = matrix_to_quat(view[:, :3, :3])
    lines = [f"{i + 1} {' '.join(map(repr, quats[i].tolist() + view[i, :3, 3].tolist()))} 1 {names[i]}\n1 2 3\n" for i in range(4)]
    put(dslr / "colmap" / "images.txt", "".join(lines))
    frames = ds.load_scannetpp(dslr.parent)
    same(frames, wanted[[2, 0, 1]])
    assert frames.name == "0a5c013435" and frames.held_out.tolist() == [False, False, True]
    put(dslr / "train_test_lists.json", {"train": ["other.JPG"], "test": []})
    with pytest.raises(ValueError, match="KeyError"):
        ds.load_scannetpp(dslr.parent)


def tower(folder, **change):
    wanted = poses()
    entries = []
    for i, pose in enumerate(wanted):
        if i != 2:
            picture(folder / "images-jpeg-2k" / "17" / f"17_DSC{i}.jpg")
        own = {
            "cameraId": f"17/17_DSC{i}",
            "width": 160,
            "height": 120,
            "K": [[200, 0, 0], [0, 200, 0], [80, 60, 1]],
            "T": invert_poses(pose).T.tolist(),
            "distortionModel": "RadialAndTangential",
            "distortion": [0, 0, 0, 0, 0],
            "frameId": 5 * i,
            "sensorId": "13",
            **change,
        }
        entries.append(own)
    put(folder / "cameras.json", {"KRT": entries})
    put(folder / "splits.json", {"train": ["17/17_DSC0.jpg", "17/17_DSC1"], "test": ["17/17_DSC3"]})
    return wanted


def test_eyeful_tower(tmp_path):
    wanted = tower(tmp_path)
    frames = ds.load_eyeful_tower(tmp_path)
    same(frames, wanted[[0, 1, 3]])
    assert frames.times.tolist() == [0, 5, 15] and frames.held_out.tolist() == [False, False, True]
    with pytest.raises(FileNotFoundError, match="images: expected pictures"):
        ds.load_eyeful_tower(tmp_path, images="images-jpeg-4k")
    tower(tmp_path, distortionModel="Fisheye")
    with pytest.raises(ValueError, match="4 fisheye pictures .* six pinhole scenes"):
        ds.load_eyeful_tower(tmp_path)
    tower(tmp_path, T=[1, 2])
    with pytest.raises(ValueError, match="own schema"):
        ds.load_eyeful_tower(tmp_path)


def nerfstudio(folder, **change):
    wanted = poses(3)
    for i in range(3):
        picture(folder / "images_4" / f"frame_{i}.png")
    gl = wanted * torch.tensor([1.0, -1, -1, 1], **FLOAT64)
    frames = [{"file_path": f"images/frame_{i}.png", "transform_matrix": gl[i].tolist()} for i in (0, 1, 2)]
    frames.append({"file_path": "images/absent.png", "transform_matrix": gl[0].tolist()})
    about = {"w": 64, "h": 48, "fl_x": 80, "fl_y": 80, "cx": 32, "cy": 24, "k1": 0, "camera_model": "OPENCV"}
    put(folder / "transforms.json", {**about, "frames": frames, **change})
    return wanted


def test_nerfstudio(tmp_path):
    wanted = nerfstudio(tmp_path)
    same(ds.load_nerfstudio(tmp_path, images="images_4"), wanted)
    same(ds.load_dataset("dl3dv", tmp_path, images="images_4"), wanted)
    with pytest.raises(FileNotFoundError, match="expected pictures of"):
        ds.load_nerfstudio(tmp_path)
    nerfstudio(tmp_path, camera_model="OPENCV_FISHEYE", k1=0.1)
    with pytest.raises(ValueError, match="file: expected pinhole lenses"):
        ds.load_nerfstudio(tmp_path, images="images_4")
    put(tmp_path / "transforms.json", {"w": 1})
    with pytest.raises(ValueError, match="keys frames"):
        ds.load_nerfstudio(tmp_path)


def test_realestate10k(tmp_path):
    wanted = poses(3)
    view = invert_poses(wanted)
    lines = ["https://www.youtube.com/watch?v=x"]
    for i in range(3):
        picture(tmp_path / "frames" / f"{1000000 * i}.jpg")
        numbers = [20 / 16, 20 / 12, 0.5, 0.5, 0.0, 0.0, *view[i, :3].reshape(-1).tolist()]
        lines.append(" ".join([str(1000000 * i), *map(repr, numbers)]))
    lines.append(lines[-1].replace("2000000", "3000000"))
    put(tmp_path / "a.txt", "\n".join(lines) + "\n")
    frames = ds.load_realestate10k(tmp_path / "a.txt", tmp_path / "frames")
    same(frames, wanted)
    assert frames.times.tolist() == [0, 1, 2]
    put(tmp_path / "b.txt", "url\n1 2 3\n")
    with pytest.raises(ValueError, match="3 numbers in a line, not 19"):
        ds.load_realestate10k(tmp_path / "b.txt", tmp_path / "frames")


def test_llff(tmp_path):
    wanted = poses(3)
    rows = []
    for i, pose in enumerate(wanted):
        picture(tmp_path / "images_16x12" / f"{i:05d}.png")
        matrix = torch.stack([pose[:3, 1], pose[:3, 0], -pose[:3, 2], pose[:3, 3], torch.tensor([48.0, 64, 80])], -1)
        rows.append(np.concatenate([matrix.reshape(-1).numpy(), [0.1, 10]]))
    np.save(tmp_path / "poses_bounds_cvd.npy", rows)
    same(ds.load_llff(tmp_path, images="images_16x12"), wanted)
    with pytest.raises(ValueError, match=r"got \[3, 17\] and 0"):
        ds.load_llff(tmp_path)


def test_adt(tmp_path):
    keys = poses(3)
    quats = convert_quat(matrix_to_quat(keys[:, :3, :3]), "wxyz", "xyzw")
    with open(tmp_path / "aria_trajectory.csv", "w", newline="") as stream:
        names = [f"t{a}_world_device" for a in "xyz"] + [f"q{a}_world_device" for a in "xyzw"]
        writer = csv.writer(stream)
        writer.writerow(["graph_uid", "tracking_timestamp_us", "utc_timestamp_ns", *names, "quality_score"])
        for i in range(3):
            writer.writerow(["g", 1000 * i + 7, -1, *keys[i, :3, 3].tolist(), *quats[i].tolist(), 1.0])
    to_camera = poses(4)[3]
    calibration = {"K": [[20, 0, 8], [0, 20, 6], [0, 0, 1]], "width": 16, "height": 12}
    put(tmp_path / "rectified" / "calibration.json", {**calibration, "T_device_camera": to_camera.tolist()})
    for stamp in (7000, 507000, 2007000):
        picture(tmp_path / "rectified" / f"{stamp}.png")
    frames = ds.load_adt(tmp_path)
    torch.testing.assert_close(frames.camtoworlds[[0, 2]], keys[[0, 2]] @ to_camera, atol=1e-9, rtol=0)
    middle = (frames.camtoworlds[1] @ invert_poses(to_camera))[:3, 3]
    torch.testing.assert_close(middle, (keys[0] + keys[1])[:3, 3] / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(frames.times, torch.tensor([0, 5e-4, 2e-3], **FLOAT64), atol=1e-12, rtol=0)
    picture(tmp_path / "rectified" / "9000000.png")
    with pytest.raises(ValueError, match="times: expected times in"):
        ds.load_adt(tmp_path)


class TestTapvid:
    def arrays(self, pictures=None):
        data = io.BytesIO()
        Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(data, "jpeg")
        return {
            "images_jpeg_bytes": np.array([data.getvalue()] * 2) if pictures is None else pictures(data.getvalue()),
            "tracks_XYZ": np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32),
            "visibility": np.ones((2, 5), bool),
            "queries_xyt": np.zeros((5, 3)),
            "fx_fy_cx_cy": np.array([20.0, 20, 8, 6]),
        }

    def test_tracks_and_world(self, tmp_path):
        wanted = poses(2)
        np.savez(tmp_path / "a.npz", **self.arrays(), extrinsics_w2c=invert_poses(wanted).numpy())
        frames, found = ds.load_tapvid3d(tmp_path / "a.npz")
        same(frames, wanted)
        back = torch.einsum("tij,tnj->tni", invert_poses(wanted)[:, :3, :3], found["world"] - wanted[:, None, :3, 3])
        torch.testing.assert_close(back, found["tracks"])
        np.savez(tmp_path / "b.npz", **self.arrays())
        frames, found = ds.load_tapvid3d(tmp_path / "b.npz")
        assert frames.camtoworlds is None and "world" not in found and found["visible"].dtype == torch.bool

    def test_pickles_are_opened_only_on_request(self, tmp_path):
        np.savez(tmp_path / "a.npz", **self.arrays(lambda data: np.array([data, data + b"x"], dtype=object)))
        with pytest.raises(ValueError, match="trust=True reads pickled pictures"):
            ds.load_tapvid3d(tmp_path / "a.npz")
        assert len(ds.load_tapvid3d(tmp_path / "a.npz", trust=True)[0]) == 2
        with pytest.raises(FileNotFoundError):
            ds.load_tapvid3d(tmp_path / "none.npz")


class TestFrames:
    def test_crop_moves_the_centre(self):
        K = torch.tensor([[40.0, 0, 30], [0, 40, 20], [0, 0, 1]], **FLOAT64)
        one = ds.PosedFrames("a", [torch.rand(40, 80, 3)], torch.tensor([[80, 40]]), torch.zeros(1, **FLOAT64), Ks=K[None])
        rgb, inner = one.read(20, 20)
        assert rgb.shape == (1, 20, 20, 3)
        assert inner[0].tolist() == [[20, 0, 5], [0, 20, 10], [0, 0, 1]]

    def test_straightening_knows_the_half_pixel(self):
        pytest.importorskip("cv2")
        K = torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]], **FLOAT64)
        ramp = (torch.arange(16).float() / 20).expand(12, 16)[..., None].expand(12, 16, 3).contiguous()
        lens = torch.tensor([[1e-12, 0, 0, 0, 0]], **FLOAT64)
        one = ds.PosedFrames("a", [ramp], torch.tensor([[16, 12]]), torch.zeros(1, **FLOAT64), Ks=K[None], distortion=lens)
        # OpenCV samples at 1/32 of a pixel.
        torch.testing.assert_close(one.read()[0][0], ramp, atol=1 / 32 / 20, rtol=0)

    def test_refusals(self):
        good = ds.PosedFrames("a", [torch.rand(4, 8, 3)], torch.tensor([[8, 4]]), torch.zeros(1, **FLOAT64))
        assert good.check().read()[1] is None
        with pytest.raises(ValueError, match="pictures: expected at least one in a"):
            good.index([]).check()
        with pytest.raises(ValueError, match="times: expected shape"):
            ds.PosedFrames("a", good.pictures, good.sizes, torch.zeros(2)).check()
        turned = ds.PosedFrames("a", good.pictures, torch.tensor([[4, 8]]), good.times, Ks=torch.eye(3, **FLOAT64)[None])
        with pytest.raises(ValueError, match=r"a\[0\]: expected a picture with the sides' ratio .* is it turned"):
            turned.read()
        broken = ds.PosedFrames("a", [b"jpeg"], good.sizes, good.times)
        with pytest.raises(ValueError, match="pictures: expected the bytes of a picture, got 4 bytes"):
            broken.read()
        with pytest.raises(ValueError, match="kind: expected one of 'dycheck'"):
            ds.load_dataset("kitti", "x")
