"""`papers10 app morphany3d`: films and files out of words and numbers, and refusals in one line with the nearest valid name."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from papers10.core.config import ConfigError
from papers10.core.media import read_image, read_video, write_image
from papers10.morphany3d import app
from papers10.morphany3d.sequence import load_frames, load_sequence_state
from papers10.morphany3d.shapes import Shape
from papers10.splat.export import load_animated_glb, save_mesh
from papers10.splat.geometry import marching_cubes

SMALL = ["--frames", "3", "--steps", "2", "--size", "16"]


def run(line, *more):
    return app.main([*line.split(), *SMALL, *more])


def test_actions_are_those_of_the_program():
    assert [command.name for command in app.program.registered_commands] == list(app.ACTIONS)


@pytest.mark.parametrize(("name", "check"), [
    ("film.gif", lambda path: len(read_video(path).frames) == 3),
    ("morph.glb", lambda path: len(load_animated_glb(path).meshes) == 3),
    ("morph.html", lambda path: "const scene" in path.read_text()),
    ("strip.png", lambda path: read_image(path).shape == (16, 52, 3)),
    ("state.safetensors", lambda path: len(load_sequence_state(path)[0]) == 3),
])
def test_one_file(tmp_path, capsys, name, check):
    assert run(f"morph chair:1 dog:2 --out {tmp_path / name}") == 0
    assert check(tmp_path / name) and str(tmp_path / name) in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {name, *(["state.json"] if name.startswith("state") else [])}, "nothing is left beside it"


def test_a_folder_of_formats(tmp_path, capsys):
    assert run(f"detail car:1 mug:2 --out {tmp_path / 'new' / 'files'} --formats glb,state,gaussian.ply --seed 5") == 0
    frames, about = load_sequence_state(tmp_path / "new" / "files" / "state.safetensors")
    assert about["source"] == "car 1" and about["target"] == "mug 2" and about["seed"] == 5 and about["config"]["steps"] == 2
    assert torch.equal(frames[0].logits, frames[2].logits), "details change, the shape stays"
    assert len(load_frames(tmp_path / "new" / "files" / "glb")[0]) == 3 and "detail, car 1 to mug 2, 3 frames" in capsys.readouterr().out


def test_options_reach_the_morph(tmp_path):
    for extra, key, expected in (("--preset kv_ca", "ss_ca", "kv"), ("--beta 0.5", "beta", 0.5), ("--no-oc", "oc", False), ("--cfg 1", "cfg_strength", 1.0), ("--schedule smoothstep", "schedule", "smoothstep")):
        run(f"morph chair lamp --out {tmp_path / 's.safetensors'} {extra}")
        assert load_sequence_state(tmp_path / "s.safetensors")[1]["config"][key] == expected, extra


def test_a_morph_that_was_stopped_goes_on(tmp_path, capsys):
    line = f"morph chair:1 car:2 --out {tmp_path / 'a.safetensors'} --resume {tmp_path / 'frames'}"
    run(line)
    whole = load_sequence_state(tmp_path / "a.safetensors")[0]
    for path in (tmp_path / "frames" / "frame_002").iterdir():
        path.unlink()
    (tmp_path / "frames" / "frame_002").rmdir()
    run(line)
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(whole, load_sequence_state(tmp_path / "a.safetensors")[0], strict=True))
    with pytest.raises(ConfigError, match="resume_dir"):
        run(line, "--seed", "3")


def test_dual_needs_three(tmp_path):
    run(f"dual chair:1 car:2 dog:3 --out {tmp_path / 'd.safetensors'}")
    assert load_sequence_state(tmp_path / "d.safetensors")[1]["config"]["slat_ca"] == "mca"


def test_compare(tmp_path, capsys):
    assert run(f"compare chair:1 dog:2 --out {tmp_path / 'c.png'} --presets kv_ca,slat_interp,lift2d --json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["preset"] for row in told["rows"]] == ["kv_ca", "slat_interp", "lift2d"] and all(row["ppl_sum"] > 0 for row in told["rows"]) and read_image(tmp_path / "c.png").shape[0] == 48


def test_pictures_and_meshes(tmp_path):
    write_image(tmp_path / "photo.png", Shape.random("chair", 1, p_rotated=0.0).image(48))
    save_mesh(tmp_path / "thing.ply", marching_cubes(Shape.random("mug", 1, p_rotated=0.0).volume(16).tsdf))
    run(f"morph {tmp_path / 'photo.png'} {tmp_path / 'thing.ply'} --out {tmp_path / 's.safetensors'} --inversion none")
    about = load_sequence_state(tmp_path / "s.safetensors")[1]
    assert (about["source"], about["target"]) == ("photo", "thing")


def test_a_mesh_is_inverted_as_it_is_sampled(tmp_path, capsys, monkeypatch):
    from papers10.morphany3d import meshes
    from papers10.morphany3d.pipeline import MorphPipeline

    save_mesh(tmp_path / "thing.ply", marching_cubes(Shape.random("mug", 1, p_rotated=0.0).volume(16).tsdf))
    seen, error = [], 0.5

    def encode(backbone, mesh, **options):
        seen.append(options)
        return replace(MorphPipeline(backbone).encode("mug"), error=error)

    monkeypatch.setattr(meshes, "encode_mesh", encode)
    run(f"morph {tmp_path / 'thing.ply'} chair --out {tmp_path / 's.safetensors'} --cfg 1.5 --seed 7")
    assert seen == [{"inversion": "euler", "steps": 2, "cfg_strength": 1.5, "seed": 7}]
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("SOURCE: the inversion")]) == 1
    error = 0.01
    run(f"compare chair {tmp_path / 'thing.ply'} --out {tmp_path / 'c.png'} --presets mca,slat_interp --cfg 2")
    assert seen[1:] == [{"inversion": "euler", "steps": 2, "cfg_strength": 2.0, "seed": 0}] and "inversion" not in capsys.readouterr().err


def test_train(tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    assert app.main(["train", "--out", str(weights), "--stage", "vae", "--steps", "2", "--shapes", "32"]) == 0
    assert "vae, 2 steps" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--backbone"):
        run(f"morph chair dog --out {tmp_path / 'a.gif'} --backbone {tmp_path / 'other.safetensors'}")


@pytest.mark.parametrize(("line", "word"), [
    ("morph chair dogg --out {o}/a.gif", "did you mean 'dog'"),
    ("morph chair:x dog --out {o}/a.gif", "SOURCE"),
    ("morph none.png dog --out {o}/a.gif", "none.png"),
    ("morph none.glb dog --out {o}/a.gif", "none.glb"),
    ("morph strip:none dog --out {o}/a.gif", "strip"),
    ("morph {o} dog --out {o}/a.gif", "turntable"),
    ("morph chair dog --out {o}/a.avi", "--out"),
    ("morph chair dog --out {o}/no/a.gif", "folder"),
    ("morph chair dog --out {o}/a.gif --formats glb", "--formats"),
    ("morph chair dog --out {o}/f --formats glb,htm", "did you mean 'html'"),
    ("morph chair dog --out {o}/a.gif --preset papr", "did you mean 'paper'"),
    ("morph chair dog --out {o}/a.gif --schedule linea", "schedule"),
    ("morph chair dog --out {o}/a.gif --views bak", "--views"),
    ("morph chair dog --out {o}/a.gif --what meshes", "did you mean 'mesh'"),
    ("morph chair dog --out {o}/a.gif --fps 60", "--fps"),
    ("morph chair dog --out {o}/a.gif --device tpu", "--device"),
    ("morph chair dog --out {o}/a.gif --backbone trellise", "--backbone"),
    ("compare chair dog --out {o}/a.png --presets kv_ca,slat_interpp", "did you mean 'slat_interp'"),
    ("compare chair dog --out {o}/a.png --presets lift2d", "lift2d"),
    ("compare chair dog --out {o}/a.png --presets mca,mca", "--presets"),
    ("compare chair dog --out {o}/a.gif", "--out"),
    ("train --out {o}/w.bin", "--out"),
    ("train --out {o}/w.safetensors --stage flow", "did you mean 'flows'"),
])
def test_refuses(tmp_path, line, word):
    with pytest.raises(ConfigError) as caught:
        app.main(line.format(o=tmp_path).split())
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_exit_code_two_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papers10.cli", "app", "morphany3d", "morph", "chair", "dogg", "--out", str(tmp_path / "a.gif")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "dog" in done.stderr
