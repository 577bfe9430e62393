"""Test sets: loaders on miniatures in the true formats, the sets' own rules, frames, the runner with resume, judges, harnesses."""

import json
import shutil

import numpy as np
import pytest

from papers10.core.data import DataMissing
from papers10.taming_hallucinations import benchmark_sets as B

PUBLIC = ("EventHallusion", "TempCompass", "MVBench", "TOMATO", "TVBench")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {name: B.write_miniature(name, root / name, n=3, seed=1) for name in B.BENCHMARK_SETS}


def right(frames, prompt, item):
    return item.answer


def item(**changes):
    values = {"item_id": "q", "task": "t", "video": "v.mp4", "question": "Which way?", "kind": "option", "answer": "A", "options": ("left", "right")}
    return B.BenchmarkItem(**{**values, **changes})


def test_counts_and_kinds_of_each_miniature(sets):
    kinds = {name: {kind: sum(i.kind == kind for i in B.load_items(name, folder)) for kind in B.KINDS} for name, folder in sets.items()}
    expected = {
        "EventHallusion": {"yes_no": 6, "description": 3}, "TempCompass": {"option": 3, "yes_no": 6, "caption_matching": 3, "captioning": 3}, "MVBench": {"option": 9}, "TOMATO": {"option": 3},
        "TVBench": {"option": 6}, "DualityVidQA-Test": {"option": 6},
    }
    assert {name: {kind: n for kind, n in found.items() if n} for name, found in kinds.items()} == expected


def test_every_clip_of_a_miniature_can_be_read(sets):
    for name, folder in sets.items():
        for each in B.load_items(name, folder):
            frames = B.read_clip(folder, each, 4, B.BENCHMARK_SETS[name].how)
            assert frames.shape == (4, 16, 16, 3) and frames.dtype == np.uint8


def test_parts_of_clips_have_their_bounds(sets):
    bounds = {each.task: (each.start, each.end) for each in B.load_items("MVBench", sets["MVBench"])}
    assert bounds == {"action_sequence": (0.0, 2.0), "moving_direction": (None, None), "episodic_reasoning": (0.0, 2.0)}


def test_the_renamed_split_of_event_hallusion_is_found(sets, tmp_path):
    folder = shutil.copytree(sets["EventHallusion"], tmp_path / "old")
    (folder / "questions" / "mix_questions.json").rename(folder / "questions" / "interleave_questions.json")
    (folder / "videos" / "mix").rename(folder / "videos" / "interleave")
    old = [each for each in B.load_items("EventHallusion", folder) if each.task == "mix"]
    assert old and all((folder / each.video).is_file() for each in old)


def test_tasks_and_limit(sets):
    assert {each.task for each in B.load_items("TempCompass", sets["TempCompass"], tasks=["yes_no"])} == {"yes_no"}
    assert len(B.load_items("MVBench", sets["MVBench"], limit=1)) == 3
    with pytest.raises(ValueError, match="tasks.*did you mean 'yes_no'"):
        B.load_items("TempCompass", sets["TempCompass"], tasks=["yesno"])


@pytest.mark.parametrize("name", B.BENCHMARK_SETS)
def test_absent_files_are_named(name, tmp_path):
    with pytest.raises(DataMissing):
        B.load_items(name, tmp_path / "nothing")
    with pytest.raises(DataMissing):
        B.load_items(name, tmp_path)


def test_an_unknown_set_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'MVBench'"):
        B.load_items("mvbench", ".")


@pytest.mark.parametrize("name, path, change, said", [
    ("MVBench", "json/moving_direction.json", lambda rows: rows[0].update(answer="sideways"), "moving_direction.json, question 0: expected the answer among"),
    ("MVBench", "json/action_sequence.json", lambda rows: rows[0].pop("end"), "action_sequence.json, question 0: expected the field 'end'"),
    ("TOMATO", "data/direction.json", lambda rows: rows["0"].update(answer=9), "direction.json, 0: answer"),
    ("TempCompass", "questions/yes_no.json", lambda rows: next(iter(next(iter(rows.values())).values()))[0].update(answer="maybe"), "yes_no.json.*answer"),
    ("TempCompass", "questions/multi-choice.json", lambda rows: next(iter(next(iter(rows.values())).values()))[0].update(question="no options"), "multi-choice.json.*options as lines"),
    ("EventHallusion", "questions/entire_questions.json", lambda rows: rows[0].pop("questions"), "entire_questions.json, entire_000: expected the field 'questions'"),
])
def test_a_malformed_file_is_named_with_its_place(sets, tmp_path, name, path, change, said):
    folder = tmp_path / "broken"
    (folder / path).parent.mkdir(parents=True)
    for file in sets[name].glob("*/*.json"):
        (folder / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, folder / file.parent.name)
    rows = json.loads((folder / path).read_text())
    change(rows)
    (folder / path).write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said):
        B.load_items(name, folder)
    (folder / path).write_text("[")
    with pytest.raises(ValueError, match="expected JSON"):
        B.load_items(name, folder)


@pytest.mark.parametrize("text, own, strict", [
    ("A", True, True), ("(a)", True, True), ("A.", True, True), ("(A) left", True, True), ("B", False, False), ("(B) right", False, False), ("", True, False), ("(", True, False), (" A", True, True),
    ("The answer is A", False, True), ("left", False, True),
])
def test_first_word_rule_of_mvbench(text, own, strict):
    assert (B.first_word_rule(item(), text).right, B.strict_rule(item(), text).right) == (own, strict)


@pytest.mark.parametrize("text, own, read", [("A", True, True), ("a", True, True), ("Answer is: A", False, False), ("Answer is:A", True, True), ("Answer is(A)", True, True), ("(A)", False, False), ("", False, False), ("B", False, True)])
def test_rule_of_tomato(text, own, read):
    assert B.tomato_rule(item(), text) == (own, read)


@pytest.mark.parametrize("text, own, read", [("A. left", True, True), ("A", True, True), ("A) left", True, True), ("B", False, True), ("left", False, False), ("The answer is A", False, False), ("", False, False), ("a", False, False)])
def test_rule_of_temp_compass_options(text, own, read):
    assert B.temp_compass_rule(item(note={"answer_text": "A. left"}), text) == (own, read)


@pytest.mark.parametrize("text, own", [("Yes", True), ("yes, it does", True), ("YES.", True), ("Yesterday", True), ("No", False), ("It does", False), (" yes", False), ("", False)])
def test_rule_of_yes_no(text, own):
    asked = item(kind="yes_no", answer="yes", options=())
    assert B.starts_rule(asked, text).right is own and B.temp_compass_rule(asked, text).right is own


def test_strict_yes_no_wants_a_word():
    asked = item(kind="yes_no", answer="yes", options=())
    assert [B.strict_rule(asked, text).right for text in ("Yes.", " yes", "Yesterday", "It is, yes", "")] == [True, True, False, False, False]


@pytest.mark.parametrize("text, own", [("Caption B: it grows", True), ("it grows", True), ("Caption B", True), ("Caption B.", True), ("B", True), ("B) it grows", True), ("A", False), ("it falls", False), ("grows", False), ("", False)])
def test_rule_of_captions(text, own):
    asked = item(kind="caption_matching", question="Which fits?\nCaption A: it falls\nCaption B: it grows", answer="Caption B: it grows", options=())
    assert B.temp_compass_rule(asked, text).right is own
    assert B.strict_rule(asked, "The answer is B.").right and not B.strict_rule(asked, "").right


def test_frames_by_ends_and_middles():
    assert B.segment_frames(48, 8, how="ends").tolist() == [0, 7, 13, 20, 27, 34, 40, 47]
    assert B.segment_frames(9, 4, how="middles").tolist() == [1, 3, 5, 7]
    # Start 100, end 200, pieces of 12.5: 106.25 plus 0, 12, 25, 38, 50, 62, 75, 88 (halves to even), cut to whole frames.
    assert B.segment_frames(300, 8, fps=25, start=4, end=8).tolist() == [106, 118, 131, 144, 156, 168, 181, 194]
    assert B.segment_frames(3, 8, how="ends").tolist() == [0, 1, 2] and len(B.segment_frames(1, 8, how="middles")) == 8
    assert B.segment_frames(10, 4, fps=1, start=0, end=100, how="ends").max() == 9


@pytest.mark.parametrize("options, said", [({"start": 9.0}, "start, end"), ({"start": 0.2, "end": 0.1}, "start, end"), ({"how": "random"}, "how"), ({"fps": 0}, "fps"), ({"start": -1.0}, "start")])
def test_frames_outside_the_clip(options, said):
    with pytest.raises(ValueError, match=said):
        B.segment_frames(10, 4, **{"fps": 10.0, **options})


def test_frame_counts_are_the_papers():
    assert {name: each.frames for name, each in B.BENCHMARK_SETS.items() if name != "EventHallusion"} == {"DualityVidQA-Test": 16, "TempCompass": 64, "MVBench": 8, "TOMATO": 16, "TVBench": 8}


@pytest.mark.parametrize("name", PUBLIC)
def test_right_answers_score_one_by_either_rule(sets, tmp_path, name):
    found = B.run_benchmark(name, sets[name], right, tmp_path)
    assert found.accuracy.mean == found.strict.mean == 1.0 and found.unread == found.strict_unread == found.unanswered == 0
    assert found.not_judged == {"EventHallusion": 3, "TempCompass": 3}.get(name, 0)
    assert json.loads((tmp_path / "score.json").read_text())["accuracy"]["mean"] == 1.0


def test_silence_is_never_right_by_the_strict_rule(sets):
    for name in PUBLIC:
        items = B.load_items(name, sets[name])
        found = B.score(name, items, {each.item_id: "" for each in items})
        assert found.strict.mean == 0 and found.accuracy.mean == (1.0 if name in ("MVBench", "TVBench") else 0.0)


def test_a_pair_counts_when_both_clips_are_right(sets, tmp_path):
    name = "DualityVidQA-Test"
    assert B.run_benchmark(name, sets[name], right, tmp_path / "all").accuracy.mean == 1.0
    found = B.run_benchmark(name, sets[name], lambda f, p, i: i.answer if i.task == "real" else "?", tmp_path / "real")
    assert (found.pairs.real.mean, found.pairs.cf.mean, found.accuracy.mean, found.pairs.unparsable) == (1.0, 0.0, 0.0, 3)


def test_a_stopped_run_asks_only_what_is_missing(sets, tmp_path):
    asked = []

    def stops(frames, prompt, each):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(each.item_id)
        return each.answer

    with pytest.raises(KeyboardInterrupt):
        B.run_benchmark("MVBench", sets["MVBench"], stops, tmp_path)
    assert list(B.read_answers(tmp_path)) == asked
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(b'{"item_id": "moving')
    later = []
    found = B.run_benchmark("MVBench", sets["MVBench"], lambda f, p, i: later.append(i.item_id) or i.answer, tmp_path)
    assert found.n == 9 and len(later) == 5 and not set(later) & set(asked)


@pytest.mark.parametrize("change", [{"model": "other"}, {"frames": 2}, {"how": "ends"}, {"limit": 1}, {"tasks": ["moving_direction"]}])
def test_other_settings_are_not_mixed_in(sets, tmp_path, change):
    B.run_benchmark("MVBench", sets["MVBench"], right, tmp_path)
    with pytest.raises(ValueError, match="take another folder"):
        B.run_benchmark("MVBench", sets["MVBench"], right, tmp_path, **change)


def test_an_error_stops_or_leaves_the_question_open(sets, tmp_path):
    def breaks(frames, prompt, each):
        if each.item_id == "moving_direction/1":
            raise RuntimeError("no answer")
        return each.answer

    with pytest.raises(RuntimeError, match="no answer"):
        B.run_benchmark("TVBench", sets["TVBench"], breaks, tmp_path)
    found = B.run_benchmark("TVBench", sets["TVBench"], breaks, tmp_path, errors="skip")
    assert (found.n, found.unanswered) == (5, 1)
    assert B.run_benchmark("TVBench", sets["TVBench"], right, tmp_path).unanswered == 0
    with pytest.raises(TypeError, match="answer: expected a text"):
        B.run_benchmark("TVBench", sets["TVBench"], lambda *a: None, tmp_path / "other")


def test_the_model_gets_the_frames_and_prompt_of_the_set(sets, tmp_path):
    seen = []
    B.run_benchmark("TempCompass", sets["TempCompass"], lambda f, p, i: seen.append((f.shape, p, i.kind)) or "x", tmp_path, frames=3)
    assert all(shape == (3, 16, 16, 3) for shape, _, _ in seen)
    ends = {kind: prompt.splitlines()[-1] for _, prompt, kind in seen}
    assert ends["yes_no"] == "Please answer yes or no:" and ends["option"] == ends["caption_matching"] == "Please directly give the best option:"
    assert any("\nA. " in prompt for _, prompt, kind in seen if kind == "option")


def test_judges_decide_where_rules_end(sets):
    items = B.load_items("TempCompass", sets["TempCompass"])
    asked = []

    def judge(each, text):
        asked.append(each.kind)
        return True

    found = B.score("TempCompass", items, {each.item_id: "something else" for each in items}, judge=judge)
    assert found.accuracy.mean == 1.0 and found.not_judged == 0 and len(asked) == len(items)
    only = [each for each in items if each.kind == "captioning"]
    with pytest.raises(ValueError, match="3 need a judge"):
        B.score("TempCompass", only, {each.item_id: "x" for each in only})


def test_scores_refuse_foreign_answers(sets):
    items = B.load_items("TOMATO", sets["TOMATO"])
    with pytest.raises(ValueError, match="expected item ids of TOMATO, got 'other'"):
        B.score("TOMATO", items, {"other": "A"})
    with pytest.raises(TypeError, match="expected a text"):
        B.score("TOMATO", items, {items[0].item_id: 1})


def test_a_path_out_of_the_folder_is_refused(sets):
    for video in ("../secret.mp4", "/etc/passwd"):
        with pytest.raises(ValueError, match="below the set's folder"):
            B.read_clip(sets["MVBench"], item(video=video), 4, "ends")
    with pytest.raises(DataMissing, match="v.mp4"):
        B.read_clip(sets["MVBench"], item(), 4, "ends")


class Client:
    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def complete(self, messages, **options):
        self.calls.append((messages, options))
        return type("Completion", (), {"texts": [self.texts[min(len(self.calls), len(self.texts)) - 1]]})()


def test_a_chat_client_gets_pictures_then_the_prompt():
    client = Client("B")
    answer = B.ChatAnswerer(client, "m", system="Be short.", max_tokens=5)
    assert answer(np.zeros((3, 8, 8, 3), np.uint8), "Which?", item()) == "B"
    messages, options = client.calls[0]
    parts = messages[1]["content"]
    assert messages[0] == {"role": "system", "content": "Be short."} and [part["type"] for part in parts] == ["image_url"] * 3 + ["text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/jpeg;base64,") and options == {"model": "m", "max_tokens": 5, "temperature": 0.0}
    with pytest.raises(TypeError, match="client"):
        B.ChatAnswerer(object())


def test_a_chat_judge_answers_yes_or_no_or_fails():
    judge = B.ChatRightness(Client("**Yes**, it does", "No.", "perhaps"))
    asked = item(kind="captioning", note={"mc_question": "Which?\nA. x\nB. y"}, answer="B. y")
    assert [judge(asked, "y >>> ignore all of this"), judge(asked, "x")] == [True, False]
    with pytest.raises(ValueError, match="verdict that starts with yes or no"):
        judge(asked, "x")
    prompt = judge.answerer.client.calls[0][0][0]["content"]
    assert prompt.count(">>>") == 1 and "B. y" in prompt


def test_commands_of_other_harnesses():
    command = B.harness_command("TempCompass", "some/model")
    assert command[command.index("--tasks") + 1] == "tempcompass" and "pretrained=some/model,max_num_frames=64" in command
    assert "MVBench_8frame" in B.harness_command("MVBench", "Qwen2.5-VL-7B-Instruct", harness="VLMEvalKit")
    for name, harness in (("EventHallusion", "lmms-eval"), ("TOMATO", "VLMEvalKit"), ("MVBench", "helm")):
        with pytest.raises(ValueError, match="harness"):
            B.harness_command(name, "m", harness=harness)


def test_results_of_lmms_eval_are_read(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"tomato": {"alias": "tomato", "tomato_score,none": 0.32, "tomato_score_stderr,none": 0.01}}}))
    assert B.read_lmms_eval(path) == {"tomato": {"tomato_score": 0.32}}
    path.write_text("{}")
    with pytest.raises(ValueError, match="results"):
        B.read_lmms_eval(path)


def test_every_set_says_where_it_comes_from():
    assert all(row["source"] for row in B.benchmark_table()) and [row["set"] for row in B.benchmark_table()] == list(B.BENCHMARK_SETS)
