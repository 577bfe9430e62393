"""`papers10 app taming-hallucinations`: films and data sets out, and refusals in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest

from papers10.core.config import ConfigError
from papers10.core.media import read_video, write_video
from papers10.taming_hallucinations import app
from papers10.taming_hallucinations.dataset import PAIRS, PairDataset, read_parquet
from papers10.taming_hallucinations.forge import drawn_clips


def run(line):
    return app.main(line.split())


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "clip.gif", drawn_clips(1, seed=4, frames=16, size=32)[0].video, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "pairs"
    run(f"forge --drawn 4 --pairs 6 --out {folder}")
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return list(PairDataset(folder))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_actions_are_those_of_the_program():
    assert [command.name for command in app.program.registered_commands] == list(app.ACTIONS)


def test_importing_the_program_loads_no_torch():
    code = "import sys, papers10.taming_hallucinations.app; print('torch' in sys.modules, 'cv2' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert said.split() == ["False", "False"]


def test_an_edit_with_its_context(tmp_path, film, capsys):
    out, context = tmp_path / "a.gif", tmp_path / "c.json"
    assert run(f"edit {film} --operation brightness --set delta=90 --start 0.5 --stop 1 --out {out} --context {context}") == 0
    before, after = read_video(film).frames.numpy().astype(int), read_video(out).frames.numpy().astype(int)
    assert after.shape == before.shape and (after[4:8] - before[4:8]).mean() > 60
    np.testing.assert_allclose(after[:4], before[:4], atol=8)  # a GIF has 256 colours
    said = json.loads(context.read_text())
    assert (said["anomaly_type"], said["start_s"], said["end_s"]) == ("brightness", 0.5, 1.0) and ", 0 outside" in capsys.readouterr().out
    assert run(f"edit {film} --operation brightness --set delta=90 --both --out {tmp_path / 'b.gif'}") == 0
    assert read_video(tmp_path / "b.gif").frames.shape[1:3] == (96 + 12, 3 * 96 + 8)


def test_forge_goes_on(tmp_path, folder, capsys):
    for n in (2, 6):
        assert run(f"forge --drawn 4 --pairs {n} --out {tmp_path / 'd'}") == 0
    assert (tmp_path / "d" / PAIRS).read_bytes() == (folder / PAIRS).read_bytes()
    said = capsys.readouterr().out
    assert "6 pairs of 6 from 4 clips" in said and "question" in said


def test_forge_of_a_folder_of_films(tmp_path, film):
    run(f"forge --clips {film.parent} --licence CC0-1.0 --pairs 2 --scope frame --operation brightness --operation noise --size 32 --out {tmp_path / 'd'}")
    data = PairDataset(tmp_path / "d")
    assert len(data) == 2 and {record.source.licence for record in data} == {"CC0-1.0"} and {record.context.region_type for record in data} == {"frame"}


def test_inspect(folder, records, tmp_path, capsys):
    assert run(f"inspect {folder} --verify --rejected 3") == 0
    said = capsys.readouterr().out
    assert "6 pairs; licences: Apache-2.0" in said and "are what their records say" in said
    assert run(f"inspect {folder} --pair {records[2].pair_id} --out {tmp_path / 'p.gif'}") == 0
    said = capsys.readouterr().out
    assert records[2].question in said and f"real: {records[2].real.answer}" in said
    assert len(read_video(tmp_path / "p.gif").frames) == 8


def test_scores_are_those_of_the_library(folder, records, tmp_path, capsys):
    right = write(tmp_path / "right.jsonl", [{"pair_id": r.pair_id, "real": r.real.answer, "cf": r.cf.answer} for r in reversed(records)])
    habit = write(tmp_path / "habit.jsonl", [{"pair_id": r.pair_id, "real": r.real.answer, "cf": r.real.answer if i else ""} for i, r in enumerate(records)])
    assert run(f"score {folder} {right} --against {habit} --out {tmp_path / 'n.json'}") == 0
    assert "only here 6, only there 0" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["pairs"] == 6 and numbers["mcnemar"]["p_value"] == pytest.approx(2 * 0.5**6)  # six of six, two-sided


@pytest.fixture
def endpoint():
    """A server in the protocol's form: it answers B, says yes to every edit, and counts the pictures that it got."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = [part for message in request["messages"] if isinstance(message["content"], list) for part in message["content"]]
            server.pictures.append(sum(part["type"] == "image_url" for part in parts))
            text = '{"passed": true, "reason": "it is there"}' if "passed" in json.dumps(parts) else "Look. <answer>B</answer>"
            choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}} for i in range(request.get("n") or 1)]
            body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pictures = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_behind_an_endpoint_answers_and_is_scored(folder, records, tmp_path, endpoint, capsys):
    pytest.importorskip("openai")
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    assert run(f"answer {folder} --url {url} --model m --frames 3 --out {tmp_path / 'a.jsonl'}") == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"pair_id": r.pair_id, "real": "B", "cf": "B"} for r in records] and endpoint.pictures == [3] * 12
    run(f"answer {folder} --url {url} --model m --frames 3 --out {tmp_path / 'a.jsonl'}")
    assert len(endpoint.pictures) == 12, "what is there is not asked again"
    assert run(f"score {folder} {tmp_path / 'a.jsonl'}") == 0
    run(f"answer {folder} --url {url} --model m --frames 1 --samples 3 --out {tmp_path / 's.jsonl'}")
    assert json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["cf"] == ["B"] * 3
    assert run(f"filter {folder} --answers {tmp_path / 's.jsonl'} --out {tmp_path / 'k.txt'}") == 0


def test_an_endpoint_that_is_not_there_is_one_line(folder, tmp_path, monkeypatch):
    openai = pytest.importorskip("openai")
    # The retries of a lost connection would cost seconds.
    monkeypatch.setattr(openai, "OpenAI", lambda *args, make=openai.OpenAI, **options: make(*args, **{**options, "max_retries": 0}))
    with pytest.raises(ConfigError, match="cannot be reached.*goes on"):
        run(f"answer {folder} --url http://127.0.0.1:9/v1 --model m --out {tmp_path / 'a.jsonl'}")


def test_judges_behind_an_endpoint(tmp_path, endpoint):
    pytest.importorskip("openai")
    run(f"forge --drawn 2 --pairs 2 --url http://127.0.0.1:{endpoint.server_port}/v1 --judge-model a --judge-model b --out {tmp_path / 'd'}")
    for record in PairDataset(tmp_path / "d"):
        assert [verdict.judge for verdict in record.context.verdicts][-2:] == ["chat:a", "chat:b"] and record.context.verdicts[-1].reason == "it is there"


def test_filter_by_sampled_answers(folder, records, tmp_path, capsys):
    rows = [{"pair_id": r.pair_id, "real": [r.real.answer] * 3, "cf": ["", r.real.answer, r.cf.answer if i % 2 else r.real.answer]} for i, r in enumerate(records)]
    sampled = write(tmp_path / "s.jsonl", rows)
    assert run(f"filter {folder} --answers {sampled} --out {tmp_path / 'kept.txt'}") == 0
    kept = (tmp_path / "kept.txt").read_text().split()
    assert kept == [r.pair_id for i, r in enumerate(records) if i % 2] and f"{len(kept)} of 6 pairs stay" in capsys.readouterr().out
    assert run(f"filter {folder} --answers {sampled} --out {tmp_path / 'all.json'} --keep wrong_otherwise".replace("wrong_otherwise", "informative")) == 0
    assert len(json.loads((tmp_path / "all.json").read_text())["pairs"]) == 6


def test_export_and_schema(folder, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    assert run(f"export {folder} --videos --out {tmp_path / 'p.parquet'}") == 0
    assert read_parquet(tmp_path / "p.parquet", tmp_path / "back").path.read_bytes() == (folder / PAIRS).read_bytes()
    capsys.readouterr()
    for kind in ("pair", "sft", "context"):
        run(f"schema {kind}")
        assert json.loads(capsys.readouterr().out)["type"] == "object"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("edit {film} --operation brigthness --out {out}.gif", "brightness"),
        ("edit {film} --operation brightness --set delta --out {out}.gif", "--set: expected NAME=VALUE"),
        ("edit {film} --operation brightness --set delta=70 --start 9 --out {out}.gif", "--start"),
        ("edit none.mp4 --operation freeze --out {out}.gif", "FILM"),
        ("edit {film} --operation freeze --out {out}.avi", "--out"),
        ("edit {film} --operation freeze --out {out}.gif --context {out}.txt", "--context"),
        ("forge --out {out}", "--clips, --real or --drawn"),
        ("forge --clips . --out {out}", "--licence"),
        ("forge --drawn 2 --out {folder}", "was begun with"),
        ("forge --drawn 2 --out {out} --scope face", "scopes"),
        ("forge --drawn 2 --out {out} --operation blurr", "operations"),
        ("forge --drawn 2 --out {out} --url http://127.0.0.1:9/v1", "--judge-model"),
        ("forge --drawn 2 --out {out} --format avi", "--format"),
        ("forge --drawn 2 --out {out}/x/y", "--out"),
        ("inspect nowhere", "pairs.jsonl"),
        ("inspect {folder} --pair 9", "no pair of that name"),
        ("inspect {folder} --out {out}.gif", "--pair"),
        ("score {folder} {answers}", "expected answers to all 6 pairs"),
        ("score {folder} none.jsonl", "ANSWERS"),
        ("filter {folder} --out {out}.txt", "--answers or --tiny"),
        ("filter {folder} --answers {answers} --out {out}.txt", "lists for real and cf"),
        ("filter {folder} --answers {answers} --out {out}.csv", "--out"),
        ("export {folder} --out {out}.csv", "--out"),
        ("schema pears", "KIND"),
    ],
)
def test_refused_in_one_line(line, message, folder, records, film, tmp_path):
    answers = write(tmp_path / "answers.jsonl", [{"pair_id": records[0].pair_id, "real": "A", "cf": "B"}])
    with pytest.raises(ConfigError) as error:
        run(line.format(folder=folder, film=film, out=tmp_path / "out", answers=answers))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
