"""The data set of pairs: records, the writer that survives a kill, the reader, Parquet and `datasets`."""

import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.config import ConfigError, from_mapping, to_mapping
from papers10.core.data import ChecksumMismatch, DataMissing
from papers10.core.random import numpy_generator
from papers10.taming_hallucinations.context import CounterfactualContext
from papers10.taming_hallucinations.dataset import (
    LETTERS,
    MANIFEST,
    PAIRS,
    ClipSource,
    ClipStore,
    Journal,
    PairDataset,
    PairRecord,
    PairWriter,
    SftRecord,
    content_hash,
    import_rows,
    json_schemas,
    prompt_text,
    read_lines,
    read_parquet,
    uniform_frames,
)

CONTEXT = CounterfactualContext(anomaly_type="brightness", level="visual", region_type="frame", region_name="whole frame", start_s=0.0, end_s=0.5, params={"delta": 60.0})
SOURCE = ClipSource(name="drawn", licence="Apache-2.0")


def clips(i, frames=4, height=5, width=7):
    draw = numpy_generator(i, "test clips")
    real = draw.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    cf = real.copy()
    cf[2:, 1:3] = 255 - cf[2:, 1:3]
    return real, cf, (real != cf).any(-1)


def add(writer, i, **changes):
    real, cf, mask = clips(i)
    given_ = {"options": ["same", "brighter", "darker", "blurred"], "answers": ("A", "B"), "real": real, "cf": cf, "fps": 4.0, "category": "attribute change", "context": CONTEXT, "source": SOURCE, "mask": mask}
    return writer.add(f"p{i}", "What happens?", **{**given_, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "data"
    with PairWriter(folder) as writer:
        for i in range(6):
            add(writer, i, category="attribute change" if i % 2 else "causal reversal")
    return folder


def mapping(**changes):
    row = {"pair_id": "p", "question": "q?", "options": ["a", "b", "c", "d"], "real": {"video": "v", "answer": "A"}, "cf": {"video": "w", "answer": "C"},
           "category": "x", "context": to_mapping(CONTEXT), "source": {"name": "n", "licence": "l", "url": ""}}
    return {**row, **changes}


def test_the_record_of_the_spec_is_read_and_written_unchanged():
    record = from_mapping(PairRecord, json.loads(json.dumps(mapping())))
    assert from_mapping(PairRecord, json.loads(json.dumps(to_mapping(record)))) == record
    assert record.answer_index("real") == 0 and record.answer_index("cf") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cf": {"video": "w", "answer": "A"}}, "cf.answer: expected another letter"),
        ({"cf": {"video": "w", "answer": "E"}}, "cf.answer: expected one of the letters ABCD"),
        ({"cf": {"video": "w", "answer": "b"}}, "cf.answer: expected one of the letters ABCD"),
        ({"options": ["a"], "cf": {"video": "w", "answer": "A"}}, "options"),
        ({"options": ["a", "A ", "c", "d"]}, "options: expected texts that differ"),
        ({"options": [str(i) for i in range(9)]}, "options"),
        ({"catgory": "x"}, "did you mean 'category'"),
        ({"source": {"name": "n"}}, "source.licence"),
        ({"pair_id": ""}, "pair_id"),
        ({"real": {"video": "v", "answer": "A", "sha256": "zz"}}, "real.sha256"),
    ],
)
def test_a_wrong_record_is_refused_by_name(change, message):
    with pytest.raises(ConfigError) as error:
        from_mapping(PairRecord, mapping(**change), path="pairs.jsonl")
    assert message in str(error.value)


def test_sft_records_become_messages():
    record = SftRecord(id="1", video="v", branch="cf", kind="count", question="How many?", options=("one", "two"), answer="B")
    user, assistant = record.messages()
    assert user["content"][1]["text"] == "How many?\nA. one\nB. two" and assistant["content"][0]["text"] == "B"
    with pytest.raises(ConfigError, match="letters AB"):
        SftRecord(id="1", video="v", branch="cf", kind="count", question="How many?", options=("one", "two"), answer="C")
    assert SftRecord(id="1", video="v", branch="real", kind="plot", question="Why?", answer="Because.").messages()[0]["content"][1]["text"] == "Why?"


def test_schemas_name_the_fields_and_refuse_others():
    schemas = json_schemas()
    assert set(schemas["pair"]["required"]) == set(mapping()) and schemas["pair"]["additionalProperties"] is False is schemas["sft"]["additionalProperties"]


def test_what_was_written_is_read(folder):
    data = PairDataset(folder)
    real, cf, mask = clips(3)
    assert len(data) == 6 and data[3].pair_id == "p3" == data[-3].pair_id and data["p3"] == data[3]
    np.testing.assert_array_equal(data.clip(3, "real").video, real)
    np.testing.assert_array_equal(data.clip("p3", "cf").video, cf)
    np.testing.assert_array_equal(data.mask(3), mask)
    assert data.clip(3, "cf").fps == 4.0 and [record.pair_id for record in data] == [f"p{i}" for i in range(6)]
    assert [record.pair_id for record in data[1:5:2]] == ["p1", "p3"] and data.verify() == 12
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["pairs"] == 6 and manifest["categories"] == {"attribute change": 3, "causal reversal": 3} and manifest["licences"] == {"drawn": "Apache-2.0"}


def test_a_clip_of_several_pairs_is_stored_once(tmp_path):
    with PairWriter(tmp_path / "d") as writer:
        real, _, _ = clips(0)
        add(writer, 1, real=real)
        add(writer, 2, real=real)
    assert len(list((tmp_path / "d" / "videos").iterdir())) == 3


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_cut_at_any_byte_and_a_second_run_give_the_same_lines(folder, tmp_path_factory, data):
    whole = (folder / PAIRS).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    other = tmp_path_factory.mktemp("cut")
    (other / PAIRS).write_bytes(whole[:cut])
    with Journal(other / PAIRS, "pair_id") as journal:
        assert len(journal) == whole[:cut].count(b"\n")
        for line in whole.splitlines():
            journal.append(json.loads(line))
    assert (other / PAIRS).read_bytes() == whole


def test_a_run_that_goes_on_writes_no_clip_again(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    times = {path: path.stat().st_mtime_ns for path in (copy / "videos").iterdir()}
    with PairWriter(copy) as writer:
        assert "p2" in writer and len(writer) == 6
        for i in range(7):
            add(writer, i, category="attribute change" if i % 2 else "causal reversal")
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(PairDataset(copy)) == 7
    assert not [path for path in copy.rglob(".*")], "nothing half-written is left"


def test_another_pair_of_the_same_name_is_refused(tmp_path):
    with PairWriter(tmp_path) as writer:
        add(writer, 0)
        assert add(writer, 0).pair_id == "p0" and len(writer) == 1
        with pytest.raises(ValueError, match="'p0' is in pairs.jsonl with other content"):
            add(writer, 0, category="other")


def test_two_writers_in_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    with PairWriter(tmp_path), pytest.raises(BlockingIOError, match="another process writes"):
        PairWriter(tmp_path)
    PairWriter(tmp_path).close()


def test_a_broken_line_in_the_middle_is_not_repaired(tmp_path):
    (tmp_path / PAIRS).write_bytes(b'{"pair_id": "a"}\nnonsense\n{"pair_id": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        Journal(tmp_path / PAIRS, "pair_id")
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        list(read_lines(tmp_path / PAIRS))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cf": np.zeros((3, 5, 7, 3), np.uint8)}, ValueError, "cf: expected the shape of real"),
        ({"real": np.zeros((4, 5, 7), np.uint8)}, ValueError, "grey channel"),
        ({"real": np.zeros((4, 5, 7, 3), np.float32)}, TypeError, "real: expected uint8"),
        ({"real": [1]}, TypeError, "got list"),
        ({"mask": np.zeros((4, 5, 6), bool)}, ValueError, "mask: expected shape"),
        ({"mask": np.zeros((4, 5, 7), np.uint8)}, TypeError, "mask: expected a bool array"),
        ({"fps": 0.0}, ValueError, "fps"),
        ({"answers": ("A", "A")}, ConfigError, "cf.answer"),
    ],
)
def test_a_refused_pair_leaves_no_line(tmp_path, change, error, message):
    with PairWriter(tmp_path) as writer:
        with pytest.raises(error, match=message):
            add(writer, 0, **change)
        assert len(writer) == 0


@pytest.mark.parametrize("format", ["npz", "mkv"])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (15, 17)])
def test_exact_formats_keep_every_byte(tmp_path, format, height, width):
    if format == "mkv":
        pytest.importorskip("av")
    real, _, _ = clips(0, 5, height, width)
    store = ClipStore(tmp_path, format)
    place, _ = store.put(real, 25.0)
    found = store.get(place)
    np.testing.assert_array_equal(found.video, real)
    assert found.fps == pytest.approx(25.0)


def test_mp4_keeps_the_shape(tmp_path):
    pytest.importorskip("av")
    place, _ = ClipStore(tmp_path, "mp4").put(np.full((3, 16, 16, 3), 90, np.uint8), 25.0)
    video = ClipStore(tmp_path).get(place).video
    assert video.shape == (3, 16, 16, 3) and abs(int(video.mean()) - 90) <= 4  # the colour space of H.264 rounds


def test_the_name_follows_from_pixels_shape_and_rate():
    real, cf, _ = clips(0)
    names = {content_hash(real, 4.0), content_hash(real.copy(order="F"), 4.0), content_hash(real, 5.0), content_hash(cf, 4.0), content_hash(real.reshape(4, 7, 5, 3), 4.0)}
    assert len(names) == 4


def test_changed_files_are_found(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = PairDataset(copy)
    path = data.store.path(data[1].cf.video)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ChecksumMismatch, match="pair p1"):
        data.verify()
    path.unlink()
    with pytest.raises(DataMissing):
        data.verify()
    (copy / PAIRS).write_bytes((copy / PAIRS).read_bytes().replace(b"What", b"When"))
    with pytest.raises(ChecksumMismatch, match="pairs.jsonl"):
        PairDataset(copy).verify()


@pytest.mark.parametrize("place", ["../x.npz", "/etc/passwd", "videos/../../x.npz"])
def test_paths_do_not_leave_the_folder(folder, place):
    with pytest.raises(ValueError, match="below the data set's folder"):
        PairDataset(folder).store.path(place)


@given(st.integers(1, 400), st.integers(1, 70))
def test_uniform_frames(frames, n):
    chosen = uniform_frames(frames, n)
    assert len(chosen) == min(frames, n) and (np.diff(chosen) > 0).all() and 0 <= chosen[0] and chosen[-1] < frames
    if 1 < n <= frames:
        assert chosen[0] == 0 and chosen[-1] == frames - 1
        assert np.abs(chosen - np.linspace(0, frames - 1, n)).max() <= 0.5 + 1e-9  # rounding to whole frames


def test_frames_are_cached_and_cannot_be_changed(folder, tmp_path):
    data = PairDataset(folder, cache_folder=tmp_path / "cache")
    first = data.frames(0, "cf", 2)
    np.testing.assert_array_equal(first, clips(0)[1][[0, 3]])
    assert data.frames("p0", "cf", 2) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{content_hash(clips(0)[1], 4.0)}-2.npy"]
    again = PairDataset(folder, cache_folder=tmp_path / "cache", cache_bytes=0)
    np.testing.assert_array_equal(again.frames(0, "cf", 2), first)
    assert again.frames(0, "cf", 2) is not again.frames(0, "cf", 2), "nothing is kept without room"


def test_the_cache_keeps_to_its_limit(folder):
    data = PairDataset(folder, cache_bytes=2 * 4 * 5 * 7 * 3)
    for i in range(6):
        data.frames(i, "real")
    assert data._cache.size == 2 * 4 * 5 * 7 * 3 and len(data._cache._kept) == 2


def test_a_data_set_can_be_sent_to_a_worker(folder):
    data = pickle.loads(pickle.dumps(PairDataset(folder)[2:]))
    assert len(data) == 4 and data[0].pair_id == "p2" and data.frames(0, "real").shape == (4, 5, 7, 3)


def test_splits_keep_clips_together_and_do_not_move(tmp_path):
    with PairWriter(tmp_path) as writer:
        for i in range(40):
            add(writer, i, real=clips(i // 2)[0], source=ClipSource(name=f"s{i % 3}", licence="x"))
        early = PairDataset(tmp_path)[:30].splits({"a": 0.5, "b": 0.5}, seed=3)
    parts = PairDataset(tmp_path).splits({"a": 0.5, "b": 0.5}, seed=3)
    ids = {name: {record.pair_id for record in part} for name, part in parts.items()}
    assert len(ids["a"]) + len(ids["b"]) == 40 and min(map(len, ids.values())) >= 8  # binomial of 20 clips: fewer than 4 has p < 0.002
    assert not {record.real.video for record in parts["a"]} & {record.real.video for record in parts["b"]}
    assert all({record.pair_id for record in early[name]} <= ids[name] for name in ids)
    by_source = PairDataset(tmp_path).splits({"a": 0.5, "b": 0.5}, by="source")
    assert not {record.source.name for record in by_source["a"]} & {record.source.name for record in by_source["b"]}
    with pytest.raises(ValueError, match="sum 1"):
        parts["a"].splits({"a": 0.5})


def test_rows_of_members_hold_what_a_pair_sampler_needs(folder):
    from papers10.rl.sampling import PairRepeatSampler

    rows = list(PairDataset(folder).rows("members"))
    assert rows[1]["branch"] == "cf" and rows[1]["answer"] == "B" and rows[1]["prompt"] == prompt_text("What happens?", ["same", "brighter", "darker", "blurred"])
    drawn = list(PairRepeatSampler([row["pair_id"] for row in rows], [row["branch"] for row in rows], num_generations=2, pairs_per_batch=3, seed=0))
    assert [rows[i]["branch"] for i in drawn[:4]] == ["real", "real", "cf", "cf"] and len({rows[i]["pair_id"] for i in drawn[:4]}) == 1


def test_parquet_round_trip_is_exact(folder, tmp_path):
    pytest.importorskip("pyarrow")
    data = PairDataset(folder)
    path = data.to_parquet(tmp_path / "pairs.parquet", videos=True, rows_a_group=4)
    back = read_parquet(path, tmp_path / "back")
    assert back.path.read_bytes() == data.path.read_bytes() and back.verify() == 12
    np.testing.assert_array_equal(back.mask(2), data.mask(2))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_parquet_without_clips_needs_them(folder, tmp_path):
    pytest.importorskip("pyarrow")
    path = PairDataset(folder).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(DataMissing, match="videos/"):
        read_parquet(path, tmp_path / "back")
    shutil.copytree(folder / "videos", tmp_path / "back2" / "videos")
    assert read_parquet(path, tmp_path / "back2")[0] == PairDataset(folder)[0]


def test_bytes_that_are_not_those_of_the_row(folder, tmp_path):
    row = next(PairDataset(folder)._exported(True))
    with pytest.raises(ChecksumMismatch):
        import_rows([{**row, "cf_bytes": b"x"}], tmp_path / "d")


def test_hugging_face_datasets(folder, tmp_path):
    pytest.importorskip("datasets")
    data = PairDataset(folder)
    table = data.to_datasets()
    assert table.num_rows == 6 and data.to_datasets(form="members").num_rows == 12
    shutil.copytree(folder / "videos", tmp_path / "d" / "videos")
    back = import_rows(data.to_datasets(streaming=True), tmp_path / "d")
    assert [record.pair_id for record in back] == [record.pair_id for record in data] and back[0] == data[0]
    assert table[0]["pair_id"] == "p0" and LETTERS[: len(table[0]["options"])] == "ABCD"


def test_no_data_set_there(tmp_path):
    with pytest.raises(DataMissing, match="pairs.jsonl"):
        PairDataset(tmp_path)
    PairWriter(tmp_path).close()
    assert len(PairDataset(tmp_path)) == 0 and PairDataset(tmp_path).verify() == 0
