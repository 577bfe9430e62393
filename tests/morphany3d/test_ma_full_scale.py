"""The full-scale run on the small generator and on the miniature of TRELLIS: pairs, identity of folders, interruption and resume, shares, tables, what is said and checked before, refusals."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import trellis_miniature as miniature

from papers10.core.config import ConfigError, replace
from papers10.core.data import DataMissing, package_root, source
from papers10.core.results import checkout_root
from papers10.flow.cache import CacheMissError
from papers10.morphany3d import full_scale
from papers10.morphany3d.full_scale import (
    FullScale,
    Pair,
    check,
    collect,
    from_parameters,
    kept_bytes,
    load_pipeline,
    morph_pair,
    open_asset,
    own_shard,
    own_work,
    pair_folder,
    procedural_pairs,
    read_pairs,
    requirements,
    run_full_scale,
    run_pairs,
    stage_sizes,
)
from papers10.morphany3d.shapes import Shape

pytestmark = pytest.mark.filterwarnings("ignore:fid:UserWarning")  # a handful of pictures

TINY = dict(
    backbone="tiny", pairs_file="procedural:1", n_frames=4, ss_steps=2, slat_steps=2, cfg_strength=1.0, cache_device="cpu", extractors=("pooled",), fid_extractor="pooled",
    views="ortho4", render_size=16, formats=("mesh",), keys_every=1, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return FullScale(**TINY)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny)


@pytest.fixture(scope="module")
def whole(tiny, pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_pairs(tiny, folder, pipeline)


def bits(folder):
    """What a frame is, by file."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("latents.safetensors")}


def numbers(folder):
    """Rows without times and memory."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds") and name != "peak_gb"}
        for row in rows
    ]


# Pairs


def test_the_fifty_pairs_are_pictures_that_can_be_fetched():
    pairs = read_pairs("pairs50")
    assert len(pairs) == len({pair.name for pair in pairs}) == len({pair[1:3] for pair in pairs}) == 50
    known = source("trellis-examples")
    keys = {file.key for file in known.files}
    for pair in pairs:
        for text in (pair.source, pair.target):
            head, _, key = text.partition("/")
            assert head == known.name and key in keys
    assert all(
        file.sha256 and file.bytes and "6b0d64751ad54d9c32d7b05fec482eb29178f56f" in file.url for file in known.files
    )
    kinds = {
        row["name"]: row["kind"]
        for row in yaml.safe_load((package_root() / "morphany3d" / "pairs50.yaml").read_text())["pairs"]
    }
    for pair in pairs:
        group = [text.partition("/")[2].partition("_")[0] for text in (pair.source, pair.target)]
        assert kinds[pair.name] == ("same" if group[0] == group[1] else "cross")


def test_drawn_pairs_never_repeat():
    pairs = procedural_pairs(60)
    assert len({pair[1:3] for pair in pairs}) == 60 and pairs[:6] == procedural_pairs()
    assert isinstance(open_asset(pairs[0].source), Shape) and open_asset(pairs[0].source, words=True) == "chair"


def test_lists_of_ones_own(tmp_path):
    miniature.picture("red").save(tmp_path / "red one.png")
    rows = [
        {"name": "", "source": "red one.png", "target": "procedural:dog:3"},
        {"name": "a/b", "source": "procedural:car:0", "target": "procedural:mug:1"},
    ]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "source", "target"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(rows))
    (tmp_path / "mapping.yaml").write_text(yaml.safe_dump({"schema": 1, "pairs": rows}))
    for name in ("pairs.csv", "pairs.yaml", "mapping.yaml"):
        pairs = read_pairs(tmp_path / name)
        assert [pair.name for pair in pairs] == ["red-one--procedural-dog-3", "a-b"]
        assert open_asset(pairs[0].source, pairs[0].folder) == tmp_path / "red one.png"


@pytest.mark.parametrize(("text", "message"), [
    ("- {source: a.png}\n", "row 1"),
    ("- {name: x, source: a, target: b}\n- {name: x, source: a, target: c}\n", "once"),
    ("[]\n", "got none"),
    ("pairs: 7\n", "got none"),
])  # fmt: skip
def test_lists_that_are_none(tmp_path, text, message):
    (tmp_path / "pairs.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs.yaml")


@pytest.mark.parametrize(("text", "error", "message"), [
    ("procedural:chiar:0", ValueError, "did you mean 'chair'"),
    ("procedural:chair:x", ValueError, "CATEGORY:SEED"),
    ("trellis-examples/creature_elephant.png", DataMissing, "papers10 data get trellis-examples"),
    ("nothing.png", FileNotFoundError, "nothing.png"),
])  # fmt: skip
def test_ends_that_are_none(text, error, message, monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path))
    with pytest.raises(error, match=message):
        open_asset(text)


def test_names_of_lists_that_are_none():
    for name, error in (("pairs51", FileNotFoundError), ("procedural:x", ValueError)):
        with pytest.raises(error, match="pairs_file"):
            read_pairs(name)
    with pytest.raises(ValueError, match="count"):
        procedural_pairs(0)


# Settings


@pytest.mark.parametrize(("changes", "same"), [
    ({"beta": 0.3}, False), ({"seed": 1}, False), ({"ss_steps": 3}, False), ({"backbone": "other"}, False), ({"n_frames": 5}, False), ({"cache_dtype": "float16"}, False),
    ({"views": "official6"}, True), ({"cache_device": "pinned"}, True), ({"devices": 8}, True), ({"formats": ("gaussian",)}, True), ({"keys_every": 3}, True), ({"methods": ("mca", "paper")}, True),
])  # fmt: skip
def test_a_folder_is_named_by_what_decides_its_frames(tiny, changes, same):
    assert (replace(tiny, **changes).identity("paper") == tiny.identity("paper")) is same
    assert tiny.identity("paper") != tiny.identity("mca")


def test_a_release_has_one_identity_by_all_its_names():
    names = ("microsoft/TRELLIS-image-large", "trellis-image-large", "/somewhere/TRELLIS-image-large")
    assert len({FullScale(backbone=name).identity("paper") for name in names}) == 1


def test_methods_keep_what_makes_them():
    settings = FullScale(noise_mode="slerp", slat_noise="nearest")
    official, paper = settings.morph("official"), settings.morph("paper")
    assert (official.noise_mode, official.slat_noise, official.oc, official.endpoints) == (
        "shared",
        "sequence",
        False,
        "generate",
    )
    assert (paper.slat_noise, paper.n_frames, paper.steps, paper.cfg_strength, paper.cfg_interval) == (
        "nearest",
        50,
        25,
        5.0,
        (0.5, 1.0),
    )
    assert FullScale(slat_noise="preset").morph("paper").slat_noise == "field"


@pytest.mark.parametrize("changes", [
    {"methods": ("papre",)}, {"methods": ()}, {"methods": ("paper", "paper")}, {"formats": ("points",)}, {"n_frames": 1}, {"beta": 1.5}, {"views": "front"}, {"metrics": ("lpips",)}, {"stride": 2},
])  # fmt: skip
def test_settings_that_are_none(changes):
    with pytest.raises(ConfigError):
        from_parameters({**TINY, **changes}, device="cpu") if "stride" not in changes else replace(
            FullScale(**TINY), **changes
        )


def test_shares_are_whole_and_disjoint(tiny, monkeypatch):
    pairs = procedural_pairs(11)
    settings = replace(tiny, methods=("paper", "mca"))
    shares = [own_work(replace(settings, num_shards=4, shard=number), pairs) for number in range(4)]
    assert sorted((method, pair.name) for share in shares for method, pair in share) == sorted(
        (method, pair.name) for method in settings.methods for pair in pairs
    )
    with pytest.raises(ValueError, match="shard"):
        own_shard(replace(tiny, num_shards=4, shard=4))
    for name, value in (("SLURM_ARRAY_TASK_COUNT", "5"), ("SLURM_ARRAY_TASK_MIN", "10"), ("SLURM_ARRAY_TASK_ID", "12")):
        monkeypatch.setenv(name, value)
    assert own_shard(tiny) == (2, 5) and own_shard(replace(tiny, num_shards=3, shard=1)) == (1, 3)
    for name in ("SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "8")
    assert own_shard(tiny) == (3, 8)


# A run


def test_files_and_rows_of_a_run(tiny, whole):
    folder, result = whole
    assert result["pairs"] == 1 and result["missing"] == [] and result["failed"] == {}
    (pair,) = read_pairs(tiny.pairs_file)
    place = pair_folder(folder, tiny, "paper", pair)
    assert sorted(file.name for file in place.iterdir() if file.is_dir()) == ["frames", "objects", "pictures"]
    assert (
        (place / "strip.png").stat().st_size
        and len(list(place.glob("morph.*"))) == 1
        and len(list((place / "objects").glob("*.glb"))) == 4
    )
    assert not list(folder.rglob("keys.safetensors")) and not list(folder.rglob("part-*"))
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["frame"] for row in rows] == [0, 1, 2, 3] and [round(row["alpha"], 4) for row in rows] == [
        0,
        0.3333,
        0.6667,
        1,
    ]
    wanted = {
        "pair",
        "method",
        "backbone",
        "seed",
        "frame",
        "alpha",
        "n_voxels",
        "k_star",
        "cd_0",
        "cd_1",
        "cd_2",
        "cd_3",
        "peak_gb",
        "seconds.ss",
        "seconds.slat",
        "seconds.between",
        "seconds.render",
    }
    assert wanted <= set(rows[1]) and {f"d.pooled.v{view}" for view in range(4)} <= {
        name.replace(name.split(".")[1], "pooled") for name in rows[1] if name.startswith("d.")
    }
    assert "cd_0" not in rows[0] and not any(name.startswith("d.") for name in rows[3])
    lines = [json.loads(line) for line in (place / "timings.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2, 3] and all(line["ss"] > 0 for line in lines)
    stored = pytest.importorskip("pyarrow.parquet").read_table(folder / "results.parquet").to_pylist()
    assert [row["n_voxels"] for row in stored] == [row["n_voxels"] for row in rows]


def test_measures_are_those_of_the_rows(tiny, whole):
    folder, result = whole
    rows, items = json.loads((folder / "results.json").read_text())["rows"], result["methods"]["paper"]["items"]
    (name,) = {key.rsplit(".v", 1)[0].removeprefix("d.") for key in rows[0] if key.startswith("d.")}
    steps = torch.tensor([[row[f"d.{name}.v{view}"] for row in rows[:-1]] for view in range(4)], dtype=torch.float64)
    (pair,) = items[f"ppl_sum.{name}"]
    assert items[f"ppl_sum.{name}"][pair] == pytest.approx(float(steps.sum(1).mean()), rel=1e-6)
    assert items[f"pdv.{name}"][pair] == pytest.approx(float(steps.var(1, correction=0).mean()), rel=1e-6)
    assert items["turned"][pair] == sum(a["k_star"] != b["k_star"] for a, b in pairwise(rows))
    assert result["methods"]["paper"]["fid"] >= 0 and result["methods"]["paper"]["fid_pictures"] == [8, 8]


def test_a_finished_run_is_read_and_nothing_is_made(tiny, whole, tmp_path, monkeypatch):
    folder, result = shutil.copytree(whole[0], tmp_path / "copy"), whole[1]
    monkeypatch.setattr(full_scale, "load_pipeline", lambda settings: pytest.fail("the generator was loaded"))
    assert run_pairs(tiny, folder) == result
    seen = replace(tiny, metrics=("jumps",))
    assert seen.scoring() != tiny.scoring() and collect(seen, folder)["missing"] == [
        "paper/" + read_pairs(tiny.pairs_file)[0].name
    ]


class Cut(BaseException):
    pass


@contextlib.contextmanager
def cut_after(pipeline, frames):
    """The power goes after so many frames."""
    original, count = pipeline.morph, 0

    def morph(*arguments, **options):
        nonlocal count
        for frame in original(*arguments, **options):
            yield frame
            count += 1
            if count == frames:
                raise Cut

    pipeline.morph = morph
    with pytest.raises(Cut):
        yield
    del pipeline.morph


@pytest.mark.parametrize(("keys_every", "cut"), [(1, 2), (2, 2), (3, 3), (0, 2), (1, 4)])
def test_a_run_that_was_cut_ends_with_the_same_bits(tiny, pipeline, whole, tmp_path, keys_every, cut):
    settings = replace(tiny, keys_every=keys_every)
    with cut_after(pipeline, cut):
        run_pairs(settings, tmp_path, pipeline)
    again = run_pairs(settings, tmp_path, pipeline)
    assert again["missing"] == [] and numbers(tmp_path) == numbers(whole[0])
    if keys_every:
        assert bits(tmp_path) == bits(whole[0])
    assert not list(tmp_path.rglob("keys.safetensors"))


def test_a_process_that_is_killed(tiny, tmp_path):
    """SIGKILL somewhere in the middle, then again from the start; compared with a process that nobody disturbed."""
    (tmp_path / "settings.json").write_text(tiny.model_dump_json())
    line = [
        sys.executable,
        "-m",
        "papers10.lm.pretraining",
        "papers10.morphany3d.full_scale:run_pairs",
        str(tmp_path / "settings.json"),
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(checkout_root() or ""), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and len(list((tmp_path / "run").rglob("meta.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0), process.stderr.read().decode()
    assert list((tmp_path / "run").rglob("meta.json"))
    for folder in ("run", "whole"):
        subprocess.run([*line[:-1], str(tmp_path / folder)], env=environment, check=True, capture_output=True)
    assert bits(tmp_path / "run") == bits(tmp_path / "whole") and numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_time_that_is_over_stops_at_a_whole_frame(tiny, pipeline, whole, tmp_path):
    stopped = run_pairs(replace(tiny, max_seconds=1e-9), tmp_path, pipeline)
    assert stopped["pairs"] == 0 and len(stopped["missing"]) == 1 and not (tmp_path / "result.json").exists()
    assert len(list(tmp_path.rglob("meta.json"))) == 1
    assert run_pairs(tiny, tmp_path, pipeline)["pairs"] == 1 and bits(tmp_path) == bits(whole[0])


def test_keys_in_files_are_a_namespace_and_strange_files_stay(tiny, pipeline, whole, tmp_path):
    settings = replace(tiny, cache_device="disk")
    (pair,) = read_pairs(tiny.pairs_file)
    place = pair_folder(tmp_path, settings, "paper", pair)
    place.mkdir(parents=True)
    for name in ("notes.txt", "keys/mine.pt", "frames/notes.txt"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    run_pairs(settings, tmp_path, pipeline)
    assert bits(tmp_path) == bits(whole[0]) and all(
        (place / name).read_text() == "mine" for name in ("notes.txt", "keys/mine.pt", "frames/notes.txt")
    )
    assert len(list((place / "keys").glob("keys_and_values_*"))) == 1


def test_two_shards_make_one_run(tiny, pipeline, tmp_path):
    settings = replace(tiny, pairs_file="procedural:2", n_frames=2)
    first = run_pairs(replace(settings, num_shards=2, shard=0), tmp_path, pipeline)
    assert first["pairs"] == 1 and not (tmp_path / "result.json").exists()
    second = run_pairs(replace(settings, num_shards=2, shard=1), tmp_path, pipeline)
    assert second["pairs"] == 2 and (tmp_path / "result.json").exists()
    assert run_pairs(settings, tmp_path)["pairs"] == 2


def test_one_pair_that_fails_does_not_cost_the_others(tiny, pipeline, tmp_path):
    (tmp_path / "empty.png").parent.mkdir(exist_ok=True)
    miniature.picture("red").point(lambda value: 0).save(tmp_path / "empty.png")
    (tmp_path / "pairs.yaml").write_text(
        "- {name: bad, source: empty.png, target: 'procedural:car:0'}\n- {name: good, source: 'procedural:car:0', target: 'procedural:mug:0'}\n"
    )
    settings = replace(tiny, pairs_file=str(tmp_path / "pairs.yaml"), n_frames=2)
    result = run_pairs(settings, tmp_path / "run", pipeline)
    assert (
        list(result["failed"]) == ["paper/bad"] == result["missing"]
        and "transparent" in result["failed"]["paper/bad"]
        and list(result["methods"]["paper"]["items"]["turned"]) == ["good"]
    )


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("no memory"), CacheMissError("no keys"), FileNotFoundError("gone"), KeyError("name")])
def test_whatever_a_pair_fails_of_the_others_go_on(tiny, pipeline, tmp_path, monkeypatch, error):
    settings, original = replace(tiny, pairs_file="procedural:2", n_frames=2, metrics=("jumps",)), full_scale.morph_pair
    bad, good = (pair.name for pair in read_pairs("procedural:2"))

    def failing(pipeline, pair, *arguments, **options):
        if pair.name == bad:
            raise error
        return original(pipeline, pair, *arguments, **options)

    monkeypatch.setattr(full_scale, "morph_pair", failing)
    result = run_pairs(settings, tmp_path, pipeline)
    assert list(result["failed"]) == [f"paper/{bad}"] and type(error).__name__ in result["failed"][f"paper/{bad}"]
    assert list(result["methods"]["paper"]["items"]["turned"]) == [good]


@pytest.mark.parametrize("name", ["load_pipeline", "collect"])
def test_an_error_of_the_whole_run_comes_after_the_last_barrier(tiny, pipeline, tmp_path, monkeypatch, name):
    waits = []
    monkeypatch.setattr(full_scale.distributed, "barrier", lambda: waits.append(name))

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(full_scale, name, broken)
    with pytest.raises(RuntimeError, match="broken"):
        run_pairs(replace(tiny, n_frames=2, metrics=("jumps",)), tmp_path, None if name == "load_pipeline" else pipeline)
    assert len(waits) == 2


def test_a_row_that_was_edited_is_made_anew(tiny, pipeline, tmp_path):
    rows = "- {name: one, source: 'procedural:mug:1', target: 'procedural:tree:2'}\n"
    settings = replace(tiny, pairs_file=str(tmp_path / "pairs.yaml"), n_frames=2, metrics=("jumps",))
    places = []
    for text in (rows, rows.replace("tree:2", "dog:3")):
        (tmp_path / "pairs.yaml").write_text(text)
        assert collect(settings, tmp_path)["missing"] == ["paper/one"]
        places.append(pair_folder(tmp_path, settings, "paper", *read_pairs(settings.pairs_file)))
        assert not run_pairs(settings, tmp_path, pipeline)["missing"]
    first, second = ([file.read_bytes() for file in sorted((place / "pictures").iterdir())] for place in places)
    assert places[0] != places[1] and first != second


def test_a_picture_that_was_changed_under_its_name_is_refused(tiny, pipeline, tmp_path):
    miniature.picture("red").save(tmp_path / "end.png")
    (tmp_path / "pairs.yaml").write_text("- {name: one, source: end.png, target: 'procedural:tree:2'}\n")
    settings = replace(tiny, pairs_file=str(tmp_path / "pairs.yaml"), n_frames=2, metrics=("jumps",))
    run_pairs(settings, tmp_path, pipeline)
    (pair,) = read_pairs(settings.pairs_file)
    morph_pair(pipeline, pair, "paper", settings, tmp_path)
    miniature.picture("blue").save(tmp_path / "end.png")
    assert collect(settings, tmp_path)["missing"] == ["paper/one"]
    with pytest.raises(ValueError, match="source of one.*another file"):
        morph_pair(pipeline, pair, "paper", settings, tmp_path)
    (tmp_path / "end.png").unlink()  # on a machine without the data what is finished is still read
    assert collect(settings, tmp_path)["missing"] == []


def test_jumps_are_steps_that_jump(tiny, whole, tmp_path):
    folder, (pair,) = whole[0], read_pairs(tiny.pairs_file)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    grid = torch.zeros(8, 8, 8)
    grid[1:7, 2:4, 1:3] = grid[5:7, 2:6, 1:5] = 1  # an L: no quarter turn maps it to itself
    frames = [torch.rot90(grid, turns, (0, 1)).nonzero() for turns in (0, 0, 1, 1)]
    pictures = torch.zeros(4, 1, 8, 8, 3, dtype=torch.uint8)
    rows = [{**row, "k_star": turns} for row, turns in zip(rows, (0, 0, 3, 3))]
    found = full_scale._scored(replace(tiny, metrics=("jumps",)), pair, "paper", tmp_path, tmp_path / "scores.json", pictures, rows, frames, 8)
    assert found["scores"] == {"jumps": 1, "turned": 1}


@pytest.mark.parametrize(("device", "changes", "expected"), [("cuda:1", {}, "cuda:1"), ("cuda:1", {"devices": 2, "strategy": "ddp"}, "cuda"), ("cpu", {}, "cpu")])
def test_the_number_of_a_card_is_kept_for_one_process(device, changes, expected):
    assert from_parameters({**TINY, **changes}, device=device).device == expected


@pytest.mark.parametrize("kind", ["TrellisImageTo3DPipeline", "TrellisTextTo3DPipeline", "Trellis2ImageTo3DPipeline"])
def test_a_release_from_its_folder_to_the_tables(tiny, tmp_path, kind):
    folder = (
        miniature.write_trellis2(tmp_path / "checkpoint")
        if kind.startswith("Trellis2")
        else miniature.write_trellis(tmp_path / ("checkpoint" if "Text" in kind else "text-checkpoint"), kind=kind)
    )
    if "Text" in kind:
        (tmp_path / "pairs.yaml").write_text("- {name: words, source: a red ball, target: 'procedural:dog:0'}\n")
    else:
        for name in ("red", "blue"):
            miniature.picture(name).save(tmp_path / f"{name}.png")
        (tmp_path / "pairs.yaml").write_text(
            "- {name: pictures, source: red.png, target: blue.png}\n- {name: drawn, source: red.png, target: 'procedural:dog:0'}\n"
        )
    formats = ("mesh",) if kind.startswith("Trellis2") else ("mesh", "gaussian", "radiance")
    settings = replace(
        tiny,
        backbone=str(folder),
        pairs_file=str(tmp_path / "pairs.yaml"),
        n_frames=3,
        formats=formats,
        views="official6",
    )
    with miniature.as_package("trellis", "trellis2"):
        assert "keys and values" in requirements(settings)
        check(settings)
        result = run_pairs(settings, tmp_path / "run")
    assert not result["missing"] and not result["failed"]
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert {
        f"seconds.{stage}" for stage in (("shape", "texture") if kind.startswith("Trellis2") else ("slat",))
    } <= set(rows[0]) and all(row["n_voxels"] > 0 for row in rows)


# What is said and checked before


def test_requirements_say_hours_memory_and_licences():
    text = requirements(FullScale())
    for part in (
        "50 pairs x 50 frames",
        "20.8 hours",
        "16 GB",
        "22.4 GB of keys and values",
        "MIT",
        "non-commercial",
        "trellis-examples",
        "papers10[data,splat,metrics]",
        "github.com/microsoft/TRELLIS",
    ):
        assert part in text
    assert "dist" in requirements(FullScale(devices=8, strategy="ddp")) and "2.6 on 8" in requirements(
        FullScale(devices=8, strategy="ddp")
    )
    assert "not known before" in requirements(FullScale(backbone="microsoft/TRELLIS.2-4B"))
    assert "tiny" in requirements({**TINY, "n_frames": 3})


def test_bytes_of_keys_and_values(tmp_path):
    settings = FullScale()
    assert kept_bytes(settings)["ss"] == 2 * 2 * 25 * 24 * 4096 * 1024  # 10.07 GB
    assert kept_bytes(replace(settings, cache_dtype="float8_e4m3fn"))["slat"] * 2 == kept_bytes(settings)["slat"]
    folder = miniature.write_trellis2(tmp_path)
    assert stage_sizes(str(folder), voxels=7) == {"ss": (2, 36, 64), "shape": (2, 36, 7), "texture": (2, 36, 7)}
    with pytest.raises(ValueError, match="not known"):
        stage_sizes("microsoft/TRELLIS.2-4B")


def test_bytes_that_are_counted_are_those_that_are_kept(tiny, tmp_path):
    from papers10.flow.cache import StepKV
    from papers10.morphany3d.morphing import MorphState, install_morph

    with miniature.as_package("trellis"):
        adapter = load_pipeline(replace(tiny, backbone=str(miniature.write_trellis(tmp_path)))).backbone
    state = MorphState(cache=StepKV())
    (context,) = adapter.condition([miniature.picture("red")])
    state.blend(0.5, [context[None], context[None]])
    config = tiny.morph("paper")
    with install_morph(adapter, config, state):
        adapter.sample("ss", torch.zeros(1, *adapter.noise_shape("ss")), context[None], state, config)
    settings = replace(tiny, backbone=str(tmp_path))
    assert state.cache.nbytes == kept_bytes(settings, itemsize=4)["ss"]


@pytest.mark.parametrize(("changes", "error"), [
    ({"pairs_file": "pairs50"}, DataMissing),
    ({"backbone": "microsoft/TRELLIS-image-large"}, DataMissing),
    ({"backbone": "microsoft/TRELLIS-imgae-large"}, DataMissing),
    ({"num_shards": 2, "shard": 2}, ValueError),
    ({"extractors": ("vgg",)}, ValueError),
])  # fmt: skip
def test_what_would_fail_later_fails_at_once(tiny, changes, error, monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path))
    with pytest.raises(error):
        check(replace(tiny, **changes))


def test_the_chapters_run_records_metrics_items_and_rows(tiny, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(full_scale, "load_pipeline", lambda settings: pipeline)
    said = SimpleNamespace(metrics={}, tables={}, notes=[], failures=[], models=[])
    run = SimpleNamespace(
        folder=tmp_path, device="cpu",
        metric=lambda name, value, **options: said.metrics.__setitem__((name, options["seed"]), (value, options.get("items"))),
        table=lambda name, rows: said.tables.__setitem__(name, rows), note=said.notes.append, failed=lambda *what: said.failures.append(what), model=lambda *what, **about: said.models.append(what),
    )  # fmt: skip
    found = run_full_scale(
        run,
        {**TINY, "n_frames": 3, "methods": ("mca",), "seeds": [3], "experiments": ["full_scale"], "preset": "paper"},
    )
    assert list(found) == [3] and len(said.tables["full_3"]) == 3 and not said.failures
    names = {name for name, _ in said.metrics}
    assert {"full.mca.fid", "full.mca.seconds_per_frame", "full.mca.jumps", "full.mca.turned"} <= names and any(
        name.startswith("full.mca.ppl_sum_") for name in names
    )
    assert all(name.replace(".", "").replace("_", "").isalnum() for name in names)
    assert "generator: tiny" in capsys.readouterr().out


def test_a_pair_by_itself(tiny, pipeline, tmp_path):
    pair = Pair("mine", "procedural:mug:5", "procedural:tree:6")
    found = morph_pair(pipeline, pair, "mca", replace(tiny, n_frames=2), tmp_path)
    assert found["pair"] == "mine" and len(found["rows"]) == 2
    shutil.rmtree(pair_folder(tmp_path, replace(tiny, n_frames=2), "mca", pair) / "frames")
    assert morph_pair(pipeline, pair, "mca", replace(tiny, n_frames=2), tmp_path) == found
