"""What every pre-training shares: mixed streams, training with and without a carried cache, recomputation, benchmarks, launching, refusals."""

import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import fineweb
import nested
import training

from papers10.core import checkpoint
from papers10.core.config import ConfigError, from_mapping, replace
from papers10.core.data import DataMissing, LicenceNotAccepted
from papers10.lm import pretraining
from papers10.lm.layers import GatedDeltaNet
from papers10.lm.pretraining import MixedWindows, Pretraining, TextSource
from papers10.lm.text import StreamWindows
from papers10.lm.tokenizers import ByteTokenizer, load_tokenizer
from papers10.lm.trunk import CausalLM, TrunkConfig

pytest.importorskip("datasets")

BUILDER = """
import torch
from papers10.core.config import from_mapping
from papers10.lm.layers import GatedDeltaNet
from papers10.lm.pretraining import Pretraining, train_text
from papers10.lm.trunk import CausalLM, TrunkConfig


def build(settings, vocabulary):
    torch.manual_seed(settings.seed)
    return CausalLM(TrunkConfig(vocab_size=vocabulary, hidden_size=16, num_layers=1, num_heads=2), mixer=GatedDeltaNet)


def train(settings, folder):
    settings = settings if isinstance(settings, Pretraining) else from_mapping(Pretraining, settings)
    return train_text(settings, folder, build)
"""


# -- windows


def letters(text, size):
    return lambda skip: (text[i % len(text)] * size for i in range(skip, 200))


def take(windows, count):
    return list(itertools.islice(windows, count))


def test_one_source_gives_the_windows_of_the_plain_stream():
    documents = letters("abcdefg", 5)
    encode = ByteTokenizer().encode
    plain = StreamWindows(documents, encode, 7, 3, separator=0)
    mixed = MixedWindows([documents], encode, 7, 3, separator=0)
    assert all(torch.equal(a, b) for a, b in zip(take(plain, 20), take(mixed, 20), strict=True))


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    lanes=st.booleans(),
    length=st.integers(1, 9),
    batch=st.integers(1, 4),
    before=st.integers(0, 5),
)
def test_a_saved_stream_goes_on_with_the_same_windows(sizes, lanes, length, batch, before):
    def build():
        sources = [letters(text, size) for text, size in zip(("ABC", "xyz", "123"), sizes, strict=False)]
        shares = [1.0 + i for i in range(len(sizes))]
        return MixedWindows(sources, ByteTokenizer().encode, length, batch, shares=shares, lanes=lanes)

    stream = build()
    take(stream, before)
    saved = json.loads(
        json.dumps({**stream.state_dict(), "waiting": [w.tolist() for w in stream.state_dict()["waiting"]]})
    )
    saved["waiting"] = [torch.tensor(w, dtype=torch.int64) for w in saved["waiting"]]
    again = build()
    again.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(take(stream, 3), take(again, 3), strict=True))


@pytest.mark.parametrize("lanes", [False, True])
def test_processes_share_one_stream(lanes):
    def build(**place):
        return MixedWindows([letters("abc", 11), letters("XY", 4)], ByteTokenizer().encode, 6, 4, lanes=lanes, **place)

    whole = take(build(), 5)
    parts = [take(build(rank=rank, world_size=2), 5) for rank in (0, 1)]
    for i, rows in enumerate(whole):
        assert torch.equal(rows[0::2], parts[0][i]) and torch.equal(rows[1::2], parts[1][i])


def test_every_token_is_predicted_once_and_lanes_continue():
    text = "".join(chr(33 + i % 90) for i in range(2000))
    documents = lambda skip: (text[i * 50 : (i + 1) * 50] for i in range(skip, 40))
    batches = take(MixedWindows([documents], ByteTokenizer().encode, 5, 3), 10)
    said = [token for rows in batches for row in rows for token in row[1:].tolist()]
    assert bytes(said).decode() == text[1 : 1 + len(said)]
    lanes = take(MixedWindows([documents], ByteTokenizer().encode, 5, 3, lanes=True), 10)
    assert all(torch.equal(a[:, -1], b[:, 0]) for a, b in itertools.pairwise(lanes))


def test_shares_hold_by_tokens():
    stream = MixedWindows([letters("ab", 3), letters("XY", 100)], ByteTokenizer().encode, 10, 2, shares=[3, 1])
    take(stream, 60)
    assert abs(stream.tokens[0] / sum(stream.tokens) - 0.75) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, "batch_size: expected a multiple"),
        ({"sources": []}, "shares: expected one for each"),
        ({"shares": [1, 2]}, "shares: expected one for each"),
        ({"shares": [0.0]}, "shares: expected a number > 0"),
        ({"length": 0}, "length: expected a number >= 1"),
    ],
)
def test_streams_refuse(change, message):
    options = {"sources": [letters("a", 3)], "encode": list, "length": 4, "batch_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        MixedWindows(**options)
    with pytest.raises(ValueError, match="state: expected 1 source"):
        MixedWindows([letters("a", 3)], list, 4, 2).load_state_dict(
            {"consumed": [1, 2], "tokens": [1, 2], "waiting": [torch.zeros(1)]}
        )


# -- settings and needs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    mix = [{"dataset": str(nested.pg19_rows(folder / "books")), "share": 0.2}]
    sizes = dict(seq_len=16, steps=6, warmup=1, lr=1e-2, val_tokens=640, save_every=2, eval_every=3)
    return training.text_settings(Pretraining, folder, tokenizer="bytes", dataset_share=0.8, mix=mix, **sizes)


def test_validation_is_the_heads_in_their_shares_and_training_comes_after(text):
    windows, rows = pretraining.text_windows(text, ByteTokenizer())
    assert rows.shape == (40, 17)
    from papers10.lm.text import hub_text

    pages, books = list(hub_text(text.dataset)), next(iter(hub_text(text.mix[0].dataset)))
    assert bytes(rows[0].tolist()).decode() == pages[0][:17] and bytes(rows[32].tolist()).decode() == books[:17]
    lengths = itertools.accumulate(len(page) for page in pages)
    used = 1 + next(i for i, total in enumerate(lengths) if total > 512)
    assert bytes(next(windows)[0].tolist()).decode() == pages[used][:17]


def test_a_small_data_set_is_read_again_and_one_too_small_is_refused(text, tmp_path):
    short = replace(text, dataset=str(fineweb.fineweb_rows(tmp_path / "rows", rows=4)), mix=[], val_tokens=64)
    windows, _ = pretraining.text_windows(short, ByteTokenizer())
    take(windows, 200)
    assert windows.consumed[0] > 8
    again, _ = pretraining.text_windows(short, ByteTokenizer())
    again.load_state_dict(windows.state_dict())
    assert torch.equal(next(windows), next(again))
    with pytest.raises(DataMissing, match="no document after the 4"):
        take(pretraining.text_windows(replace(short, val_tokens=1700), ByteTokenizer())[0], 1)


def test_settings_are_checked_and_survive_their_file(text):
    assert from_mapping(Pretraining, json.loads(text.model_dump_json())) == text
    assert [type(source) for source in text.sources()] == [TextSource, TextSource]
    assert "devices" not in text.deciding() and "lr" in text.deciding()
    with pytest.raises(ConfigError, match="did you mean 'dataset'"):
        from_mapping(Pretraining, {"datasets": "x"})
    with pytest.raises(ConfigError):
        from_mapping(Pretraining, {"mix": [{"dataset": "x", "share": -1.0}]})


def test_refusals_before_anything_starts(text, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="global_batch: expected a multiple"):
        pretraining.check(replace(text, global_batch=7))
    with pytest.raises(ValueError, match="warmup: expected fewer"):
        pretraining.check(replace(text, warmup=6))
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    for change, name in (
        ({"dataset": "owner/rows"}, "dataset"),
        ({"mix": [{"dataset": "owner/rows"}]}, "dataset"),
        ({"tokenizer": "gpt2"}, "tokenizer"),
    ):
        with pytest.raises(DataMissing, match=f"{name}: .* PAPERS10_OFFLINE"):
            pretraining.check(replace(text, **change))


def test_unknown_benchmarks_are_refused_before_training(text):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="eval_tasks: expected tasks of lm-eval, got no_such_task"):
        pretraining.check(replace(text, eval_tasks=["no_such_task"]))


def test_the_hub_speaks_in_one_sentence(text, monkeypatch):
    import datasets

    def fail(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/rows' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(LicenceNotAccepted, match=r"owner/rows: gated; .*huggingface.co/datasets/owner/rows"):
        pretraining.text_windows(replace(text, dataset="owner/rows"), ByteTokenizer())


# -- training


def build(settings, vocabulary):
    torch.manual_seed(settings.seed)
    return CausalLM(TrunkConfig(vocab_size=vocabulary, hidden_size=16, num_layers=1, num_heads=2), mixer=GatedDeltaNet)


@pytest.mark.parametrize("carry", [1, 2, 0])
def test_a_stopped_training_goes_on_to_the_same_numbers(text, tmp_path, carry):
    def train(settings, folder):
        return pretraining.train_text(
            settings, folder, build, carry=carry, inspect={"norm": lambda model, ids: [{"rows": len(ids)}]}
        )

    whole = pretraining.launch(text, tmp_path / "whole", train)
    training.stop_at_first_checkpoint(partial(pretraining.launch, train=train), text, tmp_path / "stopped")
    again = pretraining.launch(text, tmp_path / "stopped", train)
    assert (
        again["val_loss"] == whole["val_loss"] and again["curve"] == whole["curve"] and whole["norm"] == [{"rows": 2}]
    )
    assert whole["val_loss"] < 5.6


def test_a_carried_cache_reads_a_text_longer_than_a_window(text):
    model = build(text, 256).eval()
    ids = torch.randint(256, (2, 24))
    whole = model(ids).logits
    carried = pretraining.CarriedCache(model)
    parts = torch.cat([carried(model, ids[:, low : low + 8]) for low in (0, 8, 16)], 1)
    assert torch.allclose(parts, whole, atol=1e-5)
    anew = pretraining.CarriedCache(model, windows=2)
    parts = [anew(model, ids[:, low : low + 8]) for low in (0, 8, 16)]
    assert torch.allclose(parts[1], whole[:, 8:16], atol=1e-5)
    assert torch.allclose(parts[2], model(ids[:, 16:]).logits, atol=1e-5)
    copy = pretraining.CarriedCache(model, windows=2)
    copy.load_state_dict(anew.state_dict())
    assert torch.equal(copy(model, ids[:, :8]), anew(model, ids[:, :8]))


def test_recomputed_sublayers_have_the_same_gradients(text):
    ids, gradients = torch.randint(256, (2, 12)), []
    for change in (lambda model: model, pretraining.recompute_sublayers):
        model = change(build(text, 256))
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_extra_state_is_in_the_checkpoint(text, tmp_path):
    class Counter:
        count = 0

        def __call__(self, state):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    counter = Counter()
    train = lambda settings, folder: pretraining.train_text(
        settings, folder, build, extras={"counter": counter}, after_step=[counter]
    )
    pretraining.launch(replace(text, steps=2), tmp_path, train)
    saved = torch.load(checkpoint.latest(tmp_path / "checkpoints" / "train") / "extras.pt", weights_only=True)
    assert saved[0]["extras"]["counter"] == {"count": 2}


def test_other_settings_are_refused_and_weights_alone_are_not(text, tmp_path):
    train = lambda settings, folder: pretraining.train_text(settings, folder, build)
    pretraining.launch(replace(text, steps=2), tmp_path / "a", train)
    (tmp_path / "a" / "result.json").unlink()
    with pytest.raises(checkpoint.CheckpointMismatch, match="lr"):
        pretraining.launch(replace(text, steps=2, lr=1e-3), tmp_path / "a", train)
    tuned = replace(text, steps=1, warmup=0, lr=0.0, weights_from=str(tmp_path / "a" / "checkpoints" / "train"))
    pretraining.launch(tuned, tmp_path / "b", train)
    first, second = (
        checkpoint.load_tensors(checkpoint.latest(tmp_path / f / "checkpoints" / "train") / "model.safetensors")
        for f in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- processes


def test_workers_find_the_builder_by_its_import_path(text, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    (tmp_path / "my_chapter.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(pretraining.__file__).parents[2]}")
    import my_chapter

    assert pretraining.entry_of(my_chapter.train) == "my_chapter:train"
    one = pretraining.launch(text, tmp_path / "one", my_chapter.train)
    pair = pretraining.launch(replace(text, devices=2, strategy="ddp"), tmp_path / "two", my_chapter.train)
    assert abs(one["val_loss"] - pair["val_loss"]) < 1e-3, "float32 sums in another order"
    line = pretraining.command(text, "settings.json", "folder", "my_chapter:train")
    assert line[1:4] == ["-m", "papers10.lm.pretraining", "my_chapter:train"]


def test_what_a_worker_cannot_import_is_refused():
    with pytest.raises(ValueError, match="top of an importable module"):
        pretraining.entry_of(lambda settings, folder: {})
    for bad, message in (("json", "MODULE:FUNCTION"), ("json:nothing", "no|got none"), (":x", "MODULE:FUNCTION")):
        with pytest.raises(ValueError, match=message):
            pretraining.resolve(bad)
    ran = subprocess.run(
        [sys.executable, "-m", "papers10.lm.pretraining", "x"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1 and "MODULE:FUNCTION SETTINGS.json FOLDER" in ran.stderr


def test_slurm_gets_one_launcher(text):
    options = pretraining.slurm_options(replace(text, devices=8, device="cuda", strategy="slurm"))
    assert options["gpus_per_node"] == 8 and options["name"] == "pretraining-0"
    assert "--nproc-per-node" in pretraining.command(replace(text, devices=8), "s", "f", "m:f")


# -- benchmarks, record, tokenizer


def test_accuracies_and_perplexities_stand_apart(text, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    scores = {
        "arc": {"acc,none": 0.3, "acc_norm,none": 0.4},
        "boolq": {"acc,none": 0.6},
        "wikitext": {"word_perplexity,none": 21.0, "byte_perplexity,none": 2.0},
        "lambada": {"perplexity,none": 12.0, "acc,none": 0.5},
        "swde": {"contains,none": 0.1},
    }
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: {"results": scores})
    monkeypatch.setattr(pretraining, "task_manager", lambda _: None)
    found = pretraining.benchmark(build(text, 256), ByteTokenizer(), text, shots=(0,))["0shot"]
    assert found["arc"] == 40.0 and found["wikitext.perplexity"] == 21.0 and found["lambada.perplexity"] == 12.0
    assert found["average"] == (40 + 60 + 50 + 10) / 4


def test_a_tokenizer_of_ones_own_is_trained_on_the_mixture(text, tmp_path):
    pytest.importorskip("tokenizers")
    folder = pretraining.train_tokenizer(text, tmp_path / "bpe", vocab_size=300, characters=5000)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id is not None and 258 <= tokenizer.vocab_size <= 300
    assert tokenizer.decode(tokenizer.encode("the cat sees the moon.")) == "the cat sees the moon."
    with pytest.raises(ValueError, match="vocab_size"):
        pretraining.train_tokenizer(text, tmp_path / "none", vocab_size=100)
