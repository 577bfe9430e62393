"""Measures of an avatar: known values of the specification, invariants, wrong inputs, the networks' arithmetic and the form for people."""

import copy
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.avatar_forcing import metrics as M
from papers10.avatar_forcing.data import DyadicConversation
from papers10.core.media import write_video
from papers10.core.preference import COLUMNS
from papers10.core.random import generator


def draw(*shape, name="x"):
    return torch.randn(shape, generator=generator(0, "test", name), dtype=torch.float64)


@pytest.fixture(scope="module")
def talk():
    data = DyadicConversation(12, 200, seed=5)
    return data, data.tensors()


LINE = torch.arange(4.0).reshape(1, 4, 1)
TRAP = torch.tensor([[0.0, 10], [1, 11], [0, 10], [1, 11]])[None]
WORST = torch.tensor([[1.0, 11], [0, 10], [1, 11], [0, 10]])[None]


@pytest.mark.parametrize("reduction", M.REDUCTIONS)
def test_rpcc_of_a_reversed_line_is_two(reduction):
    found = M.rpcc(LINE, 2 * LINE, LINE.flip(1), reduction)
    assert found == pytest.approx(2, abs=1e-12)
    assert found.details == {"reduction": reduction, "series": 1, "skipped": 0}
    assert M.rpcc(LINE, 2 * LINE, 2 * LINE, reduction) == pytest.approx(0, abs=1e-12)


def test_flatten_trap():
    assert M.rpcc(TRAP, TRAP, WORST, "flatten") == pytest.approx(0.019802, abs=1e-6)
    assert M.rpcc(TRAP, TRAP, WORST, "per_feature") == pytest.approx(2, abs=1e-12)
    assert M.rpcc(TRAP, TRAP, WORST, "per_clip") == pytest.approx(2, abs=1e-12)


def test_flattening_shrinks_by_the_derived_factor():
    walk = draw(1, 50, 3)
    walk = (walk - walk.mean(1, keepdim=True)) / walk.std(1, keepdim=True, unbiased=False)
    means = torch.tensor([-2.0, 0, 2], dtype=torch.float64)
    spread = float(means.var(unbiased=False))
    assert M.rpcc(walk + means, walk + means, means - walk, "flatten") == pytest.approx(2 / (spread + 1), abs=1e-9)


@pytest.mark.parametrize("value", [0.1, 0.0, 1234.567])
def test_constant_series_are_skipped_and_counted(value):
    user, truth, made = draw(2, 30, 3), draw(2, 30, 3, name="y"), draw(2, 30, 3, name="z")
    made[..., 1] = value
    alone = [M.rpcc(*(x[..., k : k + 1] for x in (user, truth, made))) for k in (0, 2)]
    found = M.rpcc(user, truth, made)
    assert found == pytest.approx(sum(alone) / 2, abs=1e-12) and found.details["skipped"] == 1 and found.details["series"] == 2
    assert M.rpcc(user, truth, made, "per_clip").details["skipped"] == 2
    frozen = M.rpcc(user, truth, torch.full_like(made, value), "per_feature")
    assert math.isnan(frozen) and frozen.details["skipped"] == 3


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 3), frames=st.integers(3, 12), count=st.integers(1, 4), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_correlation_ignores_scale_and_shift_and_stays_in_bounds(n, frames, count, scale, shift):
    x, y, z = draw(n, frames, count), draw(n, frames, count, name="y"), draw(n, frames, count, name="z")
    for reduction in ("per_feature", "per_clip"):
        assert 0 <= M.rpcc(x, y, z, reduction) <= 2 + 1e-9
        assert M.rpcc(x, y, scale * z + shift, reduction) == pytest.approx(M.rpcc(x, y, z, reduction), abs=1e-9)
    assert torch.allclose(M.correlation(x, 3 * x + 1, 1), torch.ones(n, count, dtype=torch.float64))


@pytest.mark.parametrize("clusters, bits", [(15, 3.9069), (9, 3.1699), (40, 5.3219), (20, 4.3219)])
def test_sid_of_equal_use_is_the_logarithm(clusters, bits):
    corners = 10.0 * torch.arange(clusters).double()[None, :, None]
    found = M.sid(corners, corners, clusters=clusters)
    assert found == pytest.approx(bits, abs=1e-4) and found.details["maximum"] == pytest.approx(found, abs=1e-9) and found.details["occupied"] == clusters
    assert M.sid(corners, corners, clusters=clusters, eps=1e-6) == pytest.approx(bits, abs=1e-3)
    assert M.sid(corners, corners, clusters=clusters, base=math.e) == pytest.approx(math.log(clusters), abs=1e-9)
    assert M.sid(corners, corners * 0, clusters=clusters) == 0


def test_sid_pooling():
    corners = torch.tensor([[0.0, 0, 0, 0], [9, 9, 9, 9]])[..., None]
    pooled, each = (M.sid(corners, corners, clusters=2, pooling=name) for name in M.POOLINGS)
    assert pooled == pytest.approx(1) and each == 0
    many = torch.arange(30.0).reshape(3, 10, 1)
    assert M.sid(many, many, clusters=15, pooling="per_clip").details["maximum"] == pytest.approx(math.log2(10))


def test_sid_with_few_distinct_frames_warns_and_uses_fewer_clusters():
    few = torch.tensor([0.0, 1, 2]).repeat(5)[None, :, None]
    with pytest.warns(UserWarning, match="3 distinct recorded frames for 15 clusters"):
        found = M.sid(few, few)
    assert found.details["clusters"] == 3 and found == pytest.approx(math.log2(3))


def test_sid_is_the_same_each_time_and_leaves_no_trace():
    x, state = draw(2, 60, 3), torch.get_rng_state()
    assert M.sid(x, x * 0.5, seed=3) == M.sid(x, x * 0.5, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_variance_and_distance():
    assert M.temporal_variance(torch.tensor([[[0.0], [2.0]]])) == 1
    apart = torch.tensor([[[0.0, 10.0], [0.0, 10.0]]])
    assert M.temporal_variance(apart) == 0 and M.temporal_variance(apart, "flatten") == 25
    assert M.frechet_distance([0, 0], np.eye(2), [3, 4], 4 * np.eye(2)) == pytest.approx(27)
    x = draw(2, 50, 3)
    moved = x + torch.tensor([3.0, 4.0, 0.0])
    assert M.frechet(moved, x) == pytest.approx(25, abs=1e-6) and M.frechet(moved, x, squared_mean=False) == pytest.approx(5, abs=1e-6)
    assert M.frechet(x, x.flip(1)) == pytest.approx(0, abs=1e-6)


def test_gain_and_lag_of_a_known_reaction():
    user = draw(4, 300, 8)
    made = draw(4, 300, 8, name="z")
    made[..., 1] = 0
    made[:, 6:, 1] = 0.7 * user[:, :-6, 1] + 2
    assert M.reaction_gain(user, made, 6) == pytest.approx(0.7, abs=1e-9)
    assert torch.allclose(M.reaction_gain(user, made, 6, reduction="per_clip"), torch.full((4,), 0.7, dtype=torch.float64))
    lag = M.reaction_lag(user, made)
    assert lag.frames == 6 and lag.correlation == pytest.approx(1, abs=0.05) and lag.curve.shape == (26,)
    assert M.reaction_gain(user, made, 6, parameter=1) == M.reaction_gain(user, made, 6)
    assert abs(M.reaction_gain(user, made, 6, parameter="yaw")) < 0.2


def test_gain_interval():
    user, noise = draw(8, 100, 8), draw(8, 100, 8, name="noise")
    made, other = 0.5 * user + 0.1 * noise, 0.2 * user
    found = M.gain_interval(user, made, lag=0, resamples=300)
    assert found.low < 0.5 < found.high and found.mean == pytest.approx(M.reaction_gain(user, made, 0))
    gap = M.gain_interval(user, made, other, lag=0, resamples=300)
    assert gap.mean == pytest.approx(found.mean - 0.2) and gap.low > 0.2


def test_a_user_who_never_moves():
    still, made = torch.zeros(2, 40, 8), draw(2, 40, 8)
    assert math.isnan(M.reaction_gain(still, made)) and M.reaction_gain(still, made, reduction="per_clip").isnan().all()
    assert M.reaction_lag(still, made).frames == 0


def test_smiles_in_silence():
    user, made = draw(1, 200, 8), draw(1, 200, 8, name="z") * 0
    voice = torch.zeros(1, 200, 4, dtype=torch.float64)
    voice[:, :100, 0] = 1
    made[:, 8:100, 1] = user[:, : 100 - 8, 1]  # reacts only while the user talks
    silent = M.silent_frames(voice)
    assert not silent[0, :112].any() and silent[0, 112:].all()
    assert M.silent_smile_gain(user, made, voice) == pytest.approx(0, abs=1e-9)
    made[:, 8:, 1] = user[:, :-8, 1]
    found = M.silent_smile_gain(user, made, voice)
    assert found == pytest.approx(1) and found.details["share"] == pytest.approx(88 / 200)
    events = M.event_frames([[(150, 20, 0.5)]], 200, margin=5)
    assert events[0].nonzero()[:, 0].tolist() == list(range(145, 175))
    assert M.silent_smile_gain(user, made, voice, events=[[(150, 20, 0.5)]]).details["share"] == pytest.approx(40 / 200)
    assert math.isnan(M.silent_smile_gain(user, made, voice + 1))


def test_lips():
    audio, made = draw(3, 100, 4), draw(3, 100, 8, name="z")
    made[:, 2:, 0] = 3 * audio[:, :-2, 0]
    found = M.lip_corr(made, audio)
    assert found == pytest.approx(1, abs=0.03) and found.details["lag"] == 2
    assert M.lip_corr(made, audio, max_lag=1) < 0.5
    assert math.isnan(M.lip_corr(torch.zeros(3, 100, 8), audio))


def test_jitter_and_seams():
    ramp = torch.arange(40.0).reshape(1, 40, 1)
    assert M.jitter(ramp) == 0 and M.jitter(ramp**2) == 2
    assert M.seam_ratio(ramp, 10) == pytest.approx(1)
    jumps = ramp + 4 * (torch.arange(40) // 10).reshape(1, 40, 1)
    assert M.seam_ratio(jumps, 10) == pytest.approx(5)
    profile = M.seam_profile(jumps, 10)
    assert profile[0] == 5 and torch.equal(profile[1:], torch.ones(9).double())
    assert M.seam_ratio(jumps[:, 3:], 10, start=3) == pytest.approx(5)
    assert math.isnan(M.seam_ratio(torch.zeros(1, 40, 2), 10))


def test_drift():
    motion = torch.ones(2, 100, 3) * torch.arange(100).reshape(1, 100, 1) // 50
    found = M.drift(motion, torch.zeros(2, 3), window=50)
    assert found.shape == (2, 2) and torch.allclose(found[0], torch.tensor([0, math.sqrt(3)]).double())


def test_ground_truth_of_the_conversations(talk):
    data, t = talk
    events = [data.meta(i)["smiles"] for i in range(len(data))]
    found = M.report(t["avatar_motion"], t["avatar_motion"], t["user_motion"], t["avatar_audio"], user_audio=t["user_audio"], events=events)
    assert found["rpcc_exp"] == 0 == found["rpcc_pose_flatten"] and found["fd_exp"] == pytest.approx(0, abs=1e-6)
    assert found["lip_corr"] > 0.99 and 7 <= found["reaction_lag"] <= 9 and 0.2 < found["reaction_gain"] < 1.1
    assert found["seam_ratio"] == pytest.approx(1, abs=0.15) and 0 < found["sid_exp"] <= found["sid_exp_max"] == pytest.approx(math.log2(15))
    assert all(isinstance(value, (int, float)) for value in found.values()) and json.dumps(found)
    swapped = M.report(t["avatar_motion"].roll(1, 0), t["avatar_motion"], t["user_motion"], t["avatar_audio"])
    assert abs(swapped["reaction_gain"]) < found["reaction_gain"] / 2 and swapped["fd_pose"] == pytest.approx(0, abs=1e-6)
    assert "silent_smile_gain" not in swapped


def test_inputs_are_not_changed_and_float32_is_enough(talk):
    _, t = talk
    kept = {name: value.clone() for name, value in t.items()}
    M.report(t["avatar_motion"].flip(0), t["avatar_motion"], t["user_motion"], t["avatar_audio"], user_audio=t["user_audio"])
    assert all(torch.equal(kept[name], t[name]) for name in kept)


def test_score_travels():
    score = M.rpcc(LINE, LINE, LINE.flip(1))
    for other in (pickle.loads(pickle.dumps(score)), copy.deepcopy(score)):
        assert other == score and other.details == score.details
    assert "per_feature" in repr(score) and f"{score:.1f}" == "2.0" and type(score + 1) is float


GOOD = torch.zeros(2, 30, 8)
BAD = GOOD.clone()
BAD[0, 3, 2] = math.nan


@pytest.mark.parametrize(
    "call, kind, word",
    [
        (lambda: M.rpcc(GOOD, GOOD, GOOD[:, :9]), ValueError, "generated"),
        (lambda: M.rpcc(GOOD, GOOD, BAD), ValueError, "generated"),
        (lambda: M.rpcc(GOOD, GOOD.long(), GOOD), TypeError, "truth"),
        (lambda: M.rpcc([1.0], GOOD, GOOD), TypeError, "user"),
        (lambda: M.rpcc(GOOD[0], GOOD, GOOD), ValueError, "user"),
        (lambda: M.rpcc(GOOD[:0], GOOD[:0], GOOD[:0]), ValueError, "user"),
        (lambda: M.rpcc(GOOD, GOOD, GOOD, "flat"), ValueError, "reduction"),
        (lambda: M.sid(GOOD, GOOD[..., :3]), ValueError, "generated"),
        (lambda: M.sid(GOOD, GOOD, clusters=0), ValueError, "clusters"),
        (lambda: M.sid(GOOD, GOOD, base=1), ValueError, "base"),
        (lambda: M.sid(GOOD, GOOD, base=0), ValueError, "base"),
        (lambda: M.sid(GOOD, GOOD, pooling="clip"), ValueError, "pooling"),
        (lambda: M.sid(GOOD, GOOD, eps=-1), ValueError, "eps"),
        (lambda: M.temporal_variance(GOOD, "time"), ValueError, "kind"),
        (lambda: M.frechet(GOOD[:1, :1], GOOD), ValueError, "generated"),
        (lambda: M.reaction_gain(GOOD, GOOD, -1), ValueError, "lag"),
        (lambda: M.reaction_gain(GOOD, GOOD, 29), ValueError, "lag"),
        (lambda: M.reaction_gain(GOOD, GOOD, parameter="grin"), ValueError, "parameter"),
        (lambda: M.reaction_gain(GOOD[..., :4], GOOD[..., :4]), ValueError, "column number"),
        (lambda: M.reaction_gain(GOOD, GOOD, parameter=8), ValueError, "parameter"),
        (lambda: M.reaction_gain(GOOD, GOOD, reduction="mean"), ValueError, "reduction"),
        (lambda: M.reaction_gain(GOOD, GOOD, mask=torch.ones(2, 3, dtype=torch.bool)), ValueError, "mask"),
        (lambda: M.gain_interval(GOOD, GOOD), ValueError, "items"),
        (lambda: M.reaction_lag(GOOD, GOOD, 40), ValueError, "lag"),
        (lambda: M.lip_corr(GOOD, GOOD[:, :5]), ValueError, "avatar_audio"),
        (lambda: M.lip_corr(GOOD, GOOD, channel=9), ValueError, "channel"),
        (lambda: M.jitter(GOOD[:, :2]), ValueError, "motion"),
        (lambda: M.seam_ratio(GOOD, 1), ValueError, "block_size"),
        (lambda: M.seam_ratio(GOOD, 30), ValueError, "block_size"),
        (lambda: M.drift(GOOD, GOOD[:, 0], window=31), ValueError, "window"),
        (lambda: M.drift(GOOD, GOOD[:1, 0]), ValueError, "reference"),
        (lambda: M.silent_smile_gain(GOOD, GOOD, GOOD, events=[[]]), ValueError, "events"),
        (lambda: M.report(GOOD[..., :4], GOOD, GOOD, GOOD), ValueError, "generated"),
        (lambda: M.report(GOOD, GOOD[:1], GOOD, GOOD), ValueError, "truth"),
        (lambda: M.fid(GOOD, GOOD), ValueError, "generated"),
        (lambda: M.fid(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8), 3), TypeError, "network"),
        (lambda: M.fid(torch.zeros(1, 2, 3, 8, 8) + 2, torch.zeros(1, 2, 3, 8, 8)), ValueError, "generated"),
        (lambda: M.fid(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8), lambda images: images), ValueError, "network"),
        (lambda: M.fvd(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8)), TypeError, "I3D"),
        (lambda: M.fvd(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 2, 3, 8, 8), len), ValueError, "window"),
        (lambda: M.csim(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 3, 8, 8)), TypeError, "ArcFace"),
        (lambda: M.csim(torch.zeros(1, 2, 3, 8, 8), torch.zeros(2, 3, 8, 8), len), ValueError, "portrait"),
        (lambda: M.lse(torch.zeros(2, 3, 8, 8), torch.zeros(1280)), TypeError, "SyncNet"),
        (lambda: M.preference_form("x", {}, questions={}), ValueError, "questions"),
        (lambda: M.preference_form("x", {}, questions={"a/b": "?"}), ValueError, "questions"),
    ],
)
def test_bad_input(call, kind, word):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(kind, match=word):
            call()


def means(images):
    return images.flatten(2).mean(-1) if images.ndim == 4 else images.mean((1, 3, 4))


def test_networks_of_ones_own():
    real = (draw(3, 20, 3, 8, 8) * 0.2).clamp(-1, 1).float()
    moved = (real * 0.5 + torch.tensor([0.3, 0.4, 0.0])[:, None, None]).clamp(-1, 1)
    assert M.fid(real, real, means) == pytest.approx(0, abs=1e-6) and 0.15 < M.fid(moved, real, means) < 0.35
    assert M.fid(moved, real, means).extractor == "means" and M.fid(moved, real, means).samples == (60, 60)
    found = M.fvd(moved, real, means, window=5)
    assert found.samples == (12, 12) and found > 0.1
    assert M.fvd(real, real, means, window=5, stride=1).samples == (48, 48)
    bright = torch.full((1, 4, 3, 8, 8), 0.5)
    assert M.csim(bright, bright[:, 0] * 0.3, means) == pytest.approx(1) and M.csim(bright, -bright[:, 0], means) == pytest.approx(-1)


def test_lip_sync_distance_finds_the_shift():
    lips = draw(60, 8)
    later = lips.roll(4, 0)
    found = M.lse(torch.zeros(64, 3, 4, 4), torch.zeros(64 * 640), lambda frames, wave: (lips, later))
    assert found.offset == 4 and found.distance == pytest.approx(0, abs=1e-9) and found.confidence > 2
    same = M.lse(torch.zeros(64, 3, 4, 4), torch.zeros(64 * 640), lambda frames, wave: (lips, lips + 1))
    assert same.offset == 0


def test_form_and_its_answers(tmp_path):
    for name, grey in (("ours", 0.2), ("base", 0.7)):
        (tmp_path / name).mkdir()
        for item in range(3):
            write_video(tmp_path / name / f"clip{item}.gif", torch.full((3, 8, 8, 3), grey + item / 20), 25)
    pages = M.preference_form(tmp_path / "form", [tmp_path / "ours", tmp_path / "base"], seed=1)
    assert list(pages) == list(M.QUESTIONS) and all(path.is_file() for path in pages.values())
    text = pages["lip_sync"].read_text()
    assert M.QUESTIONS["lip_sync"] in text and text.count("thing.muted = false") == 1
    silent = M.preference_form(tmp_path / "silent", [tmp_path / "ours", tmp_path / "base"], sound=False, questions={"overall": "Which?"})
    assert "thing.muted = false" not in silent["overall"].read_text()
    ids = json.loads((tmp_path / "form" / "questions.json").read_text())
    assert sorted(ids.values()) == sorted(M.QUESTIONS) and len(ids) == 5
    rows = [",".join(COLUMNS)]
    for page, key in ids.items():
        for number, winner in enumerate(["ours", "ours", ""] if key == "overall" else ["ours", "base", "base"]):
            choice = {"ours": "left", "base": "right", "": "tie"}[winner]
            rows.append(f"{page},r1,{number},clip{number},ours,base,{choice},{winner},1.5,2026-01-01T00:00:0{number}Z")
    (tmp_path / "answers.csv").write_text("\n".join(rows) + "\n")
    tallies = M.preference_answers(tmp_path / "form", tmp_path / "answers.csv")
    assert list(tallies) == list(M.QUESTIONS)
    overall = next(row for row in M.preference_records(tallies, "ours") if row["question"] == "overall")
    assert overall["ours"] == pytest.approx(2 / 3) and overall["tie"] == pytest.approx(1 / 3) and overall["other"] == 0 and overall["answers"] == 3 and overall["against"] == "base"
    with pytest.raises(ValueError, match="ours: expected"):
        M.preference_records(tallies, "third")
    with pytest.raises(ValueError, match="answers: expected"):
        M.preference_answers(tmp_path / "silent", tmp_path / "answers.csv")
    with pytest.raises(FileNotFoundError):
        M.preference_answers(tmp_path, tmp_path / "answers.csv")
