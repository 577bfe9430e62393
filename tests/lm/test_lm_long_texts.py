"""Loaders of long-text data on miniatures in the true formats: what they give, and what they say when it is not there."""

import gzip
import json
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))

import fineweb
import longtext

from papers10.core.data import DataMissing
from papers10.lm.text import (
    PILE_DOMAINS,
    hub_text,
    lambada_text,
    longbench,
    longcrawl64_text,
    longcrawl64_tokens,
    pile_text,
    unescape_json,
)

ROWS = [[100 * i + t for t in range(10)] for i in range(5)]


def test_lambada_splits_are_told_apart(tmp_path):
    pytest.importorskip("datasets")
    novels, passages = [f"novel {i} ." for i in range(4)], ["he said yes"]
    folder = longtext.lambada(tmp_path, {"train": novels, "test": passages})
    assert list(lambada_text(id=folder)) == novels and list(lambada_text("test", id=str(folder))) == passages
    assert list(lambada_text(id=folder, skip=1, limit=2)) == novels[1:3]
    with pytest.raises(ValueError, match="split: expected one of test, train"):
        lambada_text("validation", id=folder)
    with pytest.raises(ValueError, match="split"):
        lambada_text("trian", id=folder)


def test_pile_gives_one_domain(tmp_path):
    pytest.importorskip("datasets")
    documents = [(PILE_DOMAINS[i % 3], f"text {i}") for i in range(9)]
    folder = longtext.pile(tmp_path, documents)
    wanted = ["text 1", "text 4", "text 7"]
    assert list(pile_text("DM Mathematics", id=folder)) == wanted
    assert list(pile_text("DM Mathematics", id=folder, skip=1, limit=1)) == wanted[1:2]
    assert list(pile_text("FreeLaw", id=folder)) == []
    (tmp_path / "rows.jsonl").write_text("\n".join(
        json.dumps({"text": text, "meta": json.dumps({"pile_set_name": domain})}) for domain, text in documents
    ))
    assert list(pile_text("DM Mathematics", id=tmp_path / "rows.jsonl")) == wanted
    with pytest.raises(ValueError, match="did you mean 'FreeLaw'"):
        pile_text("Freelaw", id=folder)
    with pytest.raises(ValueError, match="pile_set_name"):
        pile_text("FreeLaw", id=fineweb.fineweb_rows(tmp_path / "web"))


def test_rows_may_be_chosen(tmp_path):
    pytest.importorskip("datasets")
    folder = fineweb.fineweb_rows(tmp_path)
    everything = list(hub_text(folder, "sample-10BT"))
    even = list(hub_text(folder, where=lambda row: row["id"].rstrip(">")[-1] in "02468", skip=2, limit=3))
    assert even == everything[4:10:2]


@pytest.mark.parametrize("form", ["zip", "folder", "data"])
def test_longbench_questions(tmp_path, form):
    rows = [("one two three", "Who?", ["Anna", "A."]), ("examples", "Passage: p\nQuestion: q\nAnswer:", ["x"])]
    place = longtext.longbench(tmp_path, "hotpotqa", rows)
    if form != "zip":
        with zipfile.ZipFile(place) as archive:
            archive.extractall(tmp_path / "out")
        place = tmp_path / "out" if form == "data" else tmp_path / "out" / "data"
    first, second = longbench("hotpotqa", id=place)
    assert first == ("one two three\n\nQuestion: Who?\nAnswer:", ("Anna", "A."), 3)
    assert second.prompt == "examples\n\nPassage: p\nQuestion: q\nAnswer:" and len(longbench("hotpotqa", id=place, limit=1)) == 1
    with pytest.raises(DataMissing, match="id: expected data/musique.jsonl"):
        longbench("musique", id=place)
    with pytest.raises(ValueError, match="task"):
        longbench("hotpot", id=place)


def test_longbench_names_missing_columns(tmp_path):
    (tmp_path / "qasper.jsonl").write_text(json.dumps({"context": "c", "question": "q"}) + "\n")
    with pytest.raises(ValueError, match="input, answers and length"):
        longbench("qasper", id=tmp_path)


@pytest.mark.parametrize("kind", ["none", "zlib", "gzip", "blosc"])
@pytest.mark.parametrize("chunks", [(2, 4), (5, 10), (3, 5), (8, 16)])
def test_longcrawl64_rows(tmp_path, kind, chunks):
    compressor, encode = {
        "none": (None, bytes), "zlib": ({"id": "zlib", "level": 1}, zlib.compress), "gzip": ({"id": "gzip", "level": 1}, gzip.compress),
        "blosc": ({"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}, None),
    }[kind]
    if kind == "blosc":
        numcodecs = pytest.importorskip("numcodecs")
        encode = numcodecs.get_codec(compressor).encode
    folder = longtext.longcrawl64(tmp_path, ROWS, chunks=chunks, compressor=compressor, encode=encode)
    assert [row.tolist() for row in longcrawl64_tokens(folder)] == ROWS
    assert [row.tolist() for row in longcrawl64_tokens(folder / "train.zarr", skip=1, limit=3)] == ROWS[1:4]
    assert list(longcrawl64_tokens(folder, skip=5)) == []


def test_documents_with_a_missing_chunk_do_not_count(tmp_path):
    array = longtext.longcrawl64(tmp_path, ROWS) / "train.zarr"
    (array / "0.2").unlink()
    assert [row.tolist() for row in longcrawl64_tokens(tmp_path)] == ROWS[2:]
    assert [row.tolist() for row in longcrawl64_tokens(tmp_path, skip=2)] == ROWS[4:]
    for name in ("1.0", "2.1"):
        (array / name).unlink()
    with pytest.raises(DataMissing, match="path: .*no complete row"):
        longcrawl64_tokens(tmp_path)


def test_longcrawl64_becomes_text_again(tmp_path):
    pytest.importorskip("tokenizers")
    from papers10.lm.tokenizers import load_tokenizer

    folder = fineweb.tokenizer(tmp_path / "gpt2")
    tokenizer, pages = load_tokenizer(folder), ['first "line"\nthe moon 😀\t', "la lune d'été \\ sees"]
    written = [tokenizer.encode(json.dumps(page)[1:-1]) for page in pages]
    short = min(map(len, written))
    rolled = [tokens[:short][3:] + tokens[:3] for tokens in written]
    longtext.longcrawl64(tmp_path, rolled, split="heldout")
    texts = list(longcrawl64_text(tmp_path, "heldout", tokenizer=folder))
    for text, tokens, page in zip(texts, written, pages, strict=True):
        start, head = tokenizer.decode(tokens[:3]), tokenizer.decode(tokens[:short])
        assert text == unescape_json(head[len(start) :] + start)
        assert len(tokens) > short or text == page[len(start) :] + start
    with pytest.raises(DataMissing, match=r"path: expected train\.zarr"):
        longcrawl64_text(tmp_path, tokenizer=folder)


@pytest.mark.parametrize("text", ["", 'a "b" \\ / \b\f\n\r\t', "é € 😀 \u2028", "\\n is no line end", "\x00\x1f"])
def test_json_text_comes_back(text):
    assert unescape_json(json.dumps(text)[1:-1]) == text == unescape_json(json.dumps(text, ensure_ascii=False)[1:-1])


def test_cut_escapes_stay():
    assert unescape_json(r"\u00 \q x") == r"\u00 \q x" and unescape_json("\\") == "\\"
    assert unescape_json(r"a\ud83d b") == "a\ufffd b"


@pytest.mark.parametrize(
    "change", [{"zarr_format": 3}, {"order": "F"}, {"filters": [{"id": "delta"}]}, {"dtype": "<f4"}, {"shape": [5, 10, 1]}]
)
def test_another_layout_is_refused(tmp_path, change):
    place = longtext.longcrawl64(tmp_path, ROWS) / "train.zarr" / ".zarray"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(ValueError, match="path: expected a zarr 2 array"):
        longcrawl64_tokens(tmp_path)


def test_a_damaged_chunk_is_named(tmp_path):
    place = longtext.longcrawl64(tmp_path, ROWS) / "train.zarr" / "1.1"
    place.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"1\.1, got 3 bytes"):
        list(longcrawl64_tokens(tmp_path))


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda id: list(lambada_text(id=id)), "id"),
        (lambda id: list(pile_text("FreeLaw", id=id)), "id"),
        (lambda id: longbench("qasper", id=id), "id"),
    ],
)
def test_what_is_not_here_names_the_argument(call, name, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataMissing, match=f"{name}: expected an existing path"):
        call(tmp_path / "no")
    with pytest.raises(DataMissing, match=f"{name}: expected an existing path"):
        call("./no/such/folder")
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match=f"give the path of a local copy as {name}="):
        call("someone/something")


def test_longcrawl64_without_a_copy_says_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    monkeypatch.setenv("PAPERS10_HOME", str(tmp_path / "home"))
    with pytest.raises(DataMissing, match="longcrawl64 of PAPERS10_DATA"):
        longcrawl64_tokens()
    longtext.longcrawl64(tmp_path / "longcrawl64", ROWS)
    assert [row.tolist() for row in longcrawl64_tokens(limit=1)] == ROWS[:1]
