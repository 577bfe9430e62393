"""Video in and out: rate, detectors, tracking, the clip's square, the filter, the writer."""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing import video
from papers10.avatar_forcing.video import FaceCropper, OneEuroFilter, clip_square, crop_square, track_faces
from papers10.core.media import Video, read_video, write_video

NAN = float("nan")


def rows(*boxes):
    return np.array([(*box, NAN)[:5] for box in boxes], dtype=float).reshape(-1, 5)


def pictures(frames=6, high=40, wide=60):
    return torch.randint(0, 256, (frames, high, wide, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def fixed(*boxes, scores=None):
    """A detector that always sees the same, in pixels of the copy that it is given."""
    found = rows(*boxes)
    if scores is not None:
        found[:, 4] = scores
    return lambda picture: found


# Rate


@pytest.mark.parametrize("source,frames,expected", [(25, 50, 50), (30, 30, 25), (30000 / 1001, 120, 100), (50, 100, 50), (12.5, 10, 20), (60, 1, 1)])
def test_duration_is_kept(source, frames, expected):
    assert len(video.resample_fps(torch.zeros(frames, 2), source)) == expected


def test_a_nod_keeps_its_frequency():
    slow = torch.sin(2 * math.pi * 2.0 * torch.arange(120) / 30)[:, None]
    at_25 = torch.sin(2 * math.pi * 2.0 * torch.arange(100) / 25)[:, None]
    assert (video.resample_fps(slow, 30, mode="linear") - at_25)[:-1].abs().max() < 0.05
    assert (slow[:100] - at_25).abs().max() > 1, "reinterpreted frames are another gesture"


def test_held_frames_are_those_on_the_screen():
    taken = video.resample_fps(torch.arange(60), 50)
    assert taken.tolist() == list(range(0, 60, 2))
    assert video.resample_fps(torch.arange(3), 12.5).tolist() == [0, 0, 1, 1, 2, 2]


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 40), source=st.floats(5, 120), target=st.floats(5, 120))
def test_resampled_indices_rise_and_stay_inside(frames, source, target):
    taken = video.resample_fps(torch.arange(frames), source, target)
    assert 0 <= taken[0] <= taken[-1] < frames and bool((taken.diff() >= 0).all())


def test_shorter_stream_holds_its_last_row_and_counts():
    stream = torch.arange(6.0).reshape(1, 3, 2)
    longer, held = video.hold_last(stream, 5)
    assert held == 2 and longer[0, 3:].tolist() == [[4, 5], [4, 5]]
    shorter, held = video.hold_last(stream, 2)
    assert held == 0 and shorter.equal(stream[:, :2])
    assert video.hold_last(None, 7) == (None, 0)


# Detectors


def test_cascade_finds_the_astronaut():
    data = pytest.importorskip("skimage.data")
    found = video.face_detector("lbp")(data.astronaut())
    assert len(found) == 1 and math.isnan(found[0, 4])
    assert video.overlap(found[0, :4], np.array([174, 66, 270, 162.0])) > 0.7


def test_auto_names_a_cascade_that_is_here(monkeypatch, tmp_path):
    called = []
    for name in ("haar", "lbp"):
        monkeypatch.setitem(video._DETECTORS, name, lambda *given, name=name: called.append(name))
    fake = ModuleType("cv2")
    fake.__spec__, fake.data = ModuleSpec("cv2", None), SimpleNamespace(haarcascades=str(tmp_path))
    monkeypatch.setitem(sys.modules, "cv2", fake)
    video.face_detector()
    fake.CascadeClassifier = object
    video.face_detector()
    (tmp_path / "haarcascade_frontalface_default.xml").touch()
    video.face_detector()
    assert called == ["lbp", "lbp", "haar"]


def test_haar_without_its_files_says_what_to_do(monkeypatch, tmp_path):
    fake = ModuleType("cv2")
    fake.data, fake.__version__ = SimpleNamespace(haarcascades=str(tmp_path)), "5.0.0"
    monkeypatch.setitem(sys.modules, "cv2", fake)
    with pytest.raises(ValueError, match="OpenCV 5.0.0 without them; use 'lbp'"):
        video.face_detector("haar")


# These two follow the packages' published interfaces; the packages themselves are not installed here.


def test_face_alignment_rows(monkeypatch):
    fake = ModuleType("face_alignment")
    fake.LandmarksType = SimpleNamespace(TWO_D=1)
    network = SimpleNamespace(detect_from_image=lambda picture: [np.array([1, 2, 11, 12, 0.99])])
    fake.FaceAlignment = lambda kind, device: SimpleNamespace(face_detector=network)
    monkeypatch.setitem(sys.modules, "face_alignment", fake)
    assert video.face_detector("face_alignment")(np.zeros((20, 20, 3), np.uint8)).tolist() == [[1, 2, 11, 12, 0.99]]


def test_yunet_rows(monkeypatch, tmp_path):
    sizes = []
    network = SimpleNamespace(setInputSize=sizes.append, detect=lambda picture: (1, np.array([[1, 2, 10, 20, *[0] * 10, 0.97]])))
    fake = ModuleType("cv2")
    fake.COLOR_RGB2BGR, fake.cvtColor = 4, lambda picture, code: picture[..., ::-1]
    fake.FaceDetectorYN = SimpleNamespace(create=lambda *given: network)
    monkeypatch.setitem(sys.modules, "cv2", fake)
    (tmp_path / "yunet.onnx").touch()
    found = video.face_detector("yunet", model=tmp_path / "yunet.onnx")(np.zeros((30, 20, 3), np.uint8))
    assert found.tolist() == [[1, 2, 11, 22, 0.97]] and sizes == [(20, 30)]


# Tracking


def test_the_one_who_stays_is_taken_wherever_the_list_has_him():
    user, other = (10, 10, 30, 30), (50, 5, 90, 45)
    frames = [rows(user) if k < 3 else rows(other, user) for k in range(6)]
    track = track_faces(frames)
    assert track.people == 2 and track.boxes.tolist() == [list(map(float, user))] * 6


def test_missing_frames_lie_on_the_line_and_ends_rest():
    frames = [rows(), rows((0, 0, 20, 20)), rows(), None, rows((6, 0, 26, 20)), rows()]
    track = track_faces(frames)
    assert track.boxes[:, 0].tolist() == [0, 0, 2, 4, 6, 6]
    assert track.found.tolist() == [False, True, False, False, True, False]
    assert track.looked.tolist() == [True, True, True, False, True, True] and track.share == pytest.approx(0.4)


def test_a_gap_longer_than_allowed_ends_a_track():
    frames = [rows((0, 0, 20, 20))] * 2 + [rows()] * 3 + [rows((0, 0, 20, 20))] * 4
    assert track_faces(frames, max_gap=3).people == 1
    parted = track_faces(frames, max_gap=2)
    assert parted.people == 2 and parted.found.tolist() == [False] * 5 + [True] * 4


def test_equally_long_tracks_give_the_larger_face():
    frames = [rows((0, 0, 10, 10), (40, 0, 70, 30))] * 3
    assert track_faces(frames).boxes[0].tolist() == [40, 0, 70, 30]


def test_two_boxes_on_one_face_are_one_person():
    assert track_faces([rows((0, 0, 20, 20), (1, 1, 21, 21))] * 3).people == 1


# The square


@settings(max_examples=40, deadline=None)
@given(x=st.floats(0, 100), y=st.floats(0, 80), half_w=st.floats(1, 60), half_h=st.floats(1, 60), pad=st.floats(0, 2))
def test_the_square_lies_in_the_picture(x, y, half_w, half_h, pad):
    left, top, side = clip_square(torch.tensor([[x - half_w, y - half_h, x + half_w, y + half_h]], dtype=torch.float64), 80, 100, pad_ratio=pad)
    assert left >= 0 and top >= 0 and side >= 1 and left + side <= 100 and top + side <= 80
    assert side <= 2 * max(half_w, half_h) * (1 + pad) + 1e-6


def test_half_size_is_the_larger_half_and_its_margin():
    assert clip_square(torch.tensor([[90.0, 80, 110, 120]]), 400, 400) == (60, 60, 80)
    assert clip_square(torch.tensor([[90.0, 80, 110, 120]]), 400, 400, pad_ratio=0) == (80, 80, 40)


def test_every_frame_has_the_same_square():
    moving = [rows((10 + k, 10, 20 + k, 20)) for k in range(6)]
    turn = iter(moving)
    cropper = FaceCropper(lambda picture: next(turn), size=None, detect_height=40)
    frames = pictures()
    result = cropper(frames)
    left, top, side = cropper.square
    assert result.equal(frames[:, top : top + side, left : left + side]) and side == 20


def test_boxes_come_back_from_the_scaled_copy():
    seen = []

    def detector(picture):
        seen.append(picture.shape)
        return rows((30, 60, 90, 120))

    cropper = FaceCropper(detector, size=16, detect_height=360)
    assert cropper(pictures(2)).shape == (2, 16, 16, 3)
    assert seen == [(360, 540, 3)] * 2
    assert torch.allclose(cropper.track.boxes[0], torch.tensor([30, 60, 90, 120]).double() / 9)


def test_scores_count_only_where_they_exist():
    low = FaceCropper(fixed((2, 2, 12, 12), (20, 20, 38, 38), scores=[0.99, 0.9]), size=8, detect_height=40)
    low(pictures())
    assert low.track.boxes[0].tolist() == [2, 2, 12, 12]
    none = FaceCropper(fixed((20, 20, 38, 38)), size=8, detect_height=40)
    none(pictures())
    assert none.track.boxes[0].tolist() == [20, 20, 38, 38]
    with pytest.raises(ValueError, match="expected a face, got none in 6 frames"):
        FaceCropper(fixed((20, 20, 38, 38), scores=[0.95]), detect_height=40)(pictures())


def test_looking_at_every_third_frame():
    calls = []
    cropper = FaceCropper(lambda picture: calls.append(1) or rows((2, 2, 12, 12)), size=8, detect_height=40, every=3, max_gap=0)
    cropper(pictures(7))
    assert len(calls) == 3 and cropper.track.people == 1 and cropper.track.share == 1


# Reading


def test_a_file_is_resampled_by_its_time_stamps(tmp_path):
    place = write_video(tmp_path / "clip.gif", pictures(20), 20)
    frames = video.read_user_video(place)
    assert len(frames) == 25 and len(video.read_user_video(place, max_frames=7)) == 7


def test_bare_frames_a_folder_and_a_video(tmp_path):
    from papers10.core.media import write_image

    frames = pictures(10)
    assert video.read_user_video(frames, source_fps=50).equal(frames[::2])
    assert video.read_user_video(frames.float() / 255, source_fps=25).equal(frames)
    assert video.read_user_video(frames.numpy(), source_fps=25).equal(frames)
    assert video.read_user_video(Video(frames, 50.0)).equal(frames[::2])
    for number, frame in enumerate(frames):
        write_image(tmp_path / f"{number}.png", frame)
    assert video.read_user_video(tmp_path, source_fps=50).equal(frames[::2])


def test_network_input_has_exact_ends():
    frames = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 1, 3)
    assert video.to_network(frames)[:, 0, 0, 0].tolist() == [-1, 1]


# Motion


def test_filter_is_causal_and_blockwise():
    rows_in = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = OneEuroFilter()(rows_in)
    parts = OneEuroFilter()
    assert torch.equal(torch.cat([parts(part) for part in rows_in.split(7, 1)], 1), whole)
    changed = rows_in.clone()
    changed[:, 20:] += 5
    assert torch.equal(OneEuroFilter()(changed)[:, :20], whole[:, :20])


def test_filter_known_values():
    # r = 2 pi, cut-off 1 Hz: alpha = 1/2 at rest, and with beta 0 for ever.
    plain = OneEuroFilter(2 * math.pi, min_cutoff=1.0, beta=0.0)
    assert torch.allclose(plain(torch.tensor([[0.0], [1.0], [1.0]])), torch.tensor([[0.0], [0.5], [0.75]]))
    # speed: lerp(0, 2 pi, 1/2) = pi, cut-off 1 + 1 * pi, alpha = 1 / (1 + 1 / (1 + pi))
    fast = OneEuroFilter(2 * math.pi, min_cutoff=1.0, beta=1.0)
    assert fast(torch.tensor([[0.0], [1.0]]))[1].item() == pytest.approx((1 + math.pi) / (2 + math.pi), abs=1e-6)


def test_filter_quiets_noise_and_leaves_a_constant():
    noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(2))
    quiet = OneEuroFilter(beta=0.0)(0.1 * noise)
    assert quiet.diff(dim=0).diff(dim=0).abs().mean() < 0.4 * (0.1 * noise).diff(dim=0).diff(dim=0).abs().mean()
    assert torch.equal(OneEuroFilter()(torch.full((9, 2), 3.0)), torch.full((9, 2), 3.0))


def test_filter_state_goes_on_and_resets():
    signal = torch.randn(20, 2, generator=torch.Generator().manual_seed(3))
    first = OneEuroFilter()
    whole = first(signal)
    before, after = OneEuroFilter(), OneEuroFilter()
    assert before.state_dict() == {}
    before(signal[:8])
    after.load_state_dict(before.state_dict())
    assert torch.equal(after(signal[8:]), whole[8:])
    first.reset()
    assert torch.equal(first(signal), whole)


class Encoder(torch.nn.Module):
    size = 8

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))

    def encode_motion(self, images):
        assert images.shape[1:] == (3, 8, 8) and images.dtype == torch.float64
        return images.mean((2, 3)) @ self.weight


def test_user_motion_is_the_encoders_whatever_the_batch():
    frames, encoder = pictures(7, 20, 20), Encoder()
    motion = video.user_motion_from_video(frames, encoder)
    assert motion.shape == (7, 3) and not motion.requires_grad
    assert torch.equal(motion, video.user_motion_from_video(frames, encoder, batch_size=2))
    smooth = video.user_motion_from_video(frames, encoder, smoother=OneEuroFilter())
    assert torch.equal(smooth, OneEuroFilter()(motion))
    assert video.user_motion_from_video(None, encoder) is None


# Writing


def test_the_map_is_the_same_for_every_clip():
    frames = torch.zeros(2, 3, 4, 4)
    bright = frames.clone()
    bright[0, :, 0, 0] = 1.7
    assert video.fixed_map(frames).unique().tolist() == [128]
    written = video.fixed_map(bright)
    assert written[1].unique().tolist() == [128] and written[0, 0, 0].tolist() == [255] * 3
    assert bright[0, 0, 0, 0] == pytest.approx(1.7), "the input is left alone"
    assert video.fixed_map(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1))[:, 0, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize("sound", ["float", "int16", None])
def test_mp4_with_and_without_sound(tmp_path, sound):
    pytest.importorskip("av")
    frames = torch.linspace(-1, 1, 25)[:, None, None, None].expand(25, 3, 32, 32)
    tone = 0.5 * torch.sin(2 * math.pi * 400 * torch.arange(16_000 - 100) / 16_000)
    audio = {"float": tone, "int16": (tone * 32767).to(torch.int16).numpy(), None: None}[sound]
    place = video.write_avatar_video(tmp_path / "a.mp4", frames, audio=audio, watermark=False)
    back = read_video(place)
    assert back.fps == 25 and (back.frames[..., 0].float().mean((1, 2)) - torch.linspace(0, 255, 25)).abs().max() < 6
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"], "nothing half-written stays"
    if audio is None:
        with pytest.raises(ValueError, match="which has none"):
            video.read_sound(place)
        return
    heard = video.read_sound(place)
    assert abs(heard.shape[1] - 16_000) < 2100, "AAC fills its last frames"
    spectrum = torch.fft.rfft(heard[0, 2000:14_000]).abs()
    assert spectrum.argmax().item() * 16_000 / 12_000 == pytest.approx(400, abs=3)


def test_the_mark_is_drawn_and_the_file_says_so(tmp_path):
    av = pytest.importorskip("av")
    frames = torch.zeros(3, 3, 64, 64)
    place = video.write_avatar_video(tmp_path / "a.mp4", frames)
    with av.open(str(place)) as container:
        assert "synthetic" in container.metadata["comment"]
    marked = read_video(place).frames.float()
    assert (marked - 128).abs().max() > 20 and frames.abs().max() == 0
    assert read_video(video.write_avatar_video(tmp_path / "a.gif", frames, watermark=False)).frames.unique().tolist() == [128]


def test_sound_of_a_wave_file_needs_no_package(tmp_path):
    import wave

    with wave.open(str(tmp_path / "two.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes(np.array([[0, 16384], [-32768, 32767]], dtype="<i2").tobytes())
    assert torch.allclose(video.read_sound(tmp_path / "two.wav"), torch.tensor([[0, -1], [0.5, 1]]), atol=1e-4)


# Bad input

TONE = np.zeros(16_000, np.float32)
FRAMES = torch.zeros(25, 3, 8, 8)
BAD = {
    "no frames": (lambda p: video.resample_fps(torch.zeros(0, 2), 30), ValueError, "values"),
    "rate zero": (lambda p: video.resample_fps(torch.zeros(3, 2), 0), ValueError, "source_fps"),
    "unknown mode": (lambda p: video.resample_fps(torch.zeros(3, 2), 30, mode="cubic"), ValueError, "mode"),
    "linear integers": (lambda p: video.resample_fps(torch.zeros(3, 2, dtype=torch.uint8), 30, mode="linear"), TypeError, "values"),
    "NaN rows": (lambda p: video.resample_fps(torch.tensor([[NAN]]), 30), ValueError, "values"),
    "empty stream": (lambda p: video.hold_last(torch.zeros(1, 0, 2), 5), ValueError, "stream"),
    "unknown detector": (lambda p: video.face_detector("harr"), ValueError, "did you mean 'haar'"),
    "yunet without a file": (lambda p: video.face_detector("yunet"), ValueError, "model"),
    "iou": (lambda p: track_faces([rows()], iou=2), ValueError, "iou"),
    "nobody": (lambda p: track_faces([rows(), rows()]), ValueError, "got none in 2 frames"),
    "no boxes": (lambda p: clip_square(torch.zeros(0, 4), 9, 9), ValueError, "boxes"),
    "no area": (lambda p: clip_square(torch.ones(2, 4), 9, 9), ValueError, "boxes"),
    "negative margin": (lambda p: clip_square(torch.tensor([[1.0, 1, 5, 5]]), 9, 9, pad_ratio=-1), ValueError, "pad_ratio"),
    "square outside": (lambda p: crop_square(pictures(), video.Square(50, 0, 20)), ValueError, "square"),
    "float frames": (lambda p: FaceCropper(fixed((1, 1, 9, 9)))(torch.zeros(2, 8, 8, 3)), TypeError, "frames"),
    "channels first": (lambda p: FaceCropper(fixed((1, 1, 9, 9)))(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), ValueError, "frames"),
    "detector's shape": (lambda p: FaceCropper(lambda picture: np.zeros((2, 4)))(pictures()), ValueError, "detector"),
    "no detector": (lambda p: FaceCropper(3), TypeError, "detector"),
    "frames without a rate": (lambda p: video.read_user_video(pictures()), ValueError, "source_fps"),
    "folder without a rate": (lambda p: video.read_user_video(p), ValueError, "source_fps"),
    "rate of a file": (lambda p: video.read_user_video(p / "a.mp4", source_fps=30), ValueError, "source_fps"),
    "another rate": (lambda p: video.read_user_video(Video(pictures(), 30.0), source_fps=25), ValueError, "source_fps"),
    "no such file": (lambda p: video.read_user_video(p / "a.mp4"), FileNotFoundError, "a.mp4"),
    "filter integers": (lambda p: OneEuroFilter()(torch.zeros(3, 2, dtype=torch.long)), TypeError, "rows"),
    "filter NaN": (lambda p: OneEuroFilter()(torch.tensor([[NAN]])), ValueError, "rows"),
    "filter cut-off": (lambda p: OneEuroFilter(min_cutoff=0), ValueError, "min_cutoff"),
    "encoder's shape": (lambda p: video.user_motion_from_video(pictures(), lambda images: images), ValueError, "encoder"),
    "no encoder": (lambda p: video.user_motion_from_video(pictures(), 3), TypeError, "encoder"),
    "uint8 out": (lambda p: video.fixed_map(pictures()), TypeError, "frames"),
    "NaN out": (lambda p: video.fixed_map(FRAMES * NAN), ValueError, "frames"),
    "channels last out": (lambda p: video.write_avatar_video(p / "a.gif", torch.zeros(3, 8, 8, 3)), ValueError, "frames"),
    "suffix": (lambda p: video.write_avatar_video(p / "a.avi", FRAMES), ValueError, "path"),
    "sound too short": (lambda p: video.write_avatar_video(p / "a.mp4", FRAMES, audio=TONE[:14_000]), ValueError, "audio"),
    "sound too long": (lambda p: video.write_avatar_video(p / "a.mp4", FRAMES, audio=np.zeros(17_000)), ValueError, "audio"),
    "sound of int32": (lambda p: video.write_avatar_video(p / "a.mp4", FRAMES, audio=TONE.astype(np.int32)), TypeError, "audio"),
    "no sound": (lambda p: video.write_avatar_video(p / "a.mp4", FRAMES, audio=TONE[:0]), ValueError, "audio"),
    "sound of a gif": (lambda p: video.write_avatar_video(p / "a.gif", FRAMES, audio=TONE), ValueError, "audio"),
    "no wave file": (lambda p: video.read_sound(p / "a.wav"), FileNotFoundError, "a.wav"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(tmp_path, case):
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call(tmp_path)


def test_another_width_asks_for_a_reset():
    smoother = OneEuroFilter()
    smoother(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="reset"):
        smoother(torch.zeros(2, 4))
