"""The full-scale training and its evaluations on miniatures in the true file formats: resume, processes, fast state, refusals."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import fineweb
import longtext
import training

from papers10.core import checkpoint, distributed
from papers10.core.config import ConfigError, from_mapping, replace
from papers10.core.data import DataMissing
from papers10.fast_weight_pkm import full_scale
from papers10.fast_weight_pkm.full_scale import FullScale
from papers10.fast_weight_pkm.model import iterative_read, memory_options
from papers10.kernels.common import BackendUnavailable
from papers10.lm import pretraining
from papers10.lm.pretraining import TextSource, documents
from papers10.lm.tokenizers import ByteTokenizer, load_tokenizer

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    lines = fineweb.sentences(48)
    tokens = load_tokenizer(fineweb.tokenizer(folder / "bpe")).encode(" ".join(lines))[:384]
    rows = [tokens[i : i + 64] for i in range(0, 320, 20)]
    for split in ("train", "heldout"):
        longtext.longcrawl64(folder / "crawl", rows, chunks=(4, 32), split=split)
    longtext.lambada(folder / "lambada", {"train": [" ".join(lines), " ".join(lines[::-1])]})
    longtext.pile(folder / "pile", [(("FreeLaw", "Ubuntu IRC")[i % 2], " ".join(lines[i::3])) for i in range(6)])
    zipped = longtext.longbench(
        folder / "longbench", "hotpotqa", [(" ".join(lines), "What does the cat see?", ["the moon"])]
    )
    return {
        "fineweb": str(fineweb.fineweb_rows(folder / "web")),
        "longcrawl64": str(folder / "crawl"),
        "gpt2": str(folder / "bpe"),
        "lambada": str(folder / "lambada"),
        "longbench": str(zipped),
        "pile": str(folder / "pile"),
    }


@pytest.fixture(scope="module")
def text(sets, tmp_path_factory):
    return training.text_settings(
        FullScale,
        tmp_path_factory.mktemp("text"),
        dataset=sets["longcrawl64"],
        dataset_config=sets["gpt2"],
        mix=[{"dataset": sets["fineweb"]}],
        size="mini",
        memory="pkm@1+fwpkm@2",
        chunk_size=8,
        global_batch=4,
        evaluations=[],
        streams=["fineweb", "longcrawl64", "lambada"],
        stream_tokens=600,
        niah_lengths=[12],
        niah_iters=[1, 3],
        niah_samples=1,
        niah_chunks=["whole", "keep"],
        longbench_tasks=["hotpotqa"],
        pile_domains=["FreeLaw", "Ubuntu IRC"],
        pile_tokens=160,
        paths=sets,
    )


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, full_scale.launch(text, folder)


@pytest.fixture
def model(text, trained):
    return full_scale.trained_model(text, trained[0])


def tables(model):
    return {key: getattr(memory, name).clone() for key, (memory, name) in full_scale.fast_tables(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- training


def test_it_learns_and_keeps_fast_weights_in_its_checkpoint(text, trained):
    folder, result = trained
    assert result["steps"] == 8 and result["curve"][-1][1] < result["curve"][0][1]
    assert {entry["kind"] for entry in result["memories"]} == {"fwpkm", "pkm"}
    newest = checkpoint.latest(folder / "checkpoints" / "train")
    saved = checkpoint.load_tensors(newest / "model.safetensors")
    fast = tables(full_scale.trained_model(text, folder)[0])
    first = tables(full_scale.build_text_model(text, 320))
    assert fast and all(torch.equal(fast[key], saved[key]) for key in fast)
    assert not any(torch.equal(fast[key], first[key]) for key in fast), "training writes them"


@pytest.mark.parametrize(
    "change",
    [{}, {"backbone": "fa", "p_swa": 0.5, "pkm_lr": 1e-2, "dtype": "bfloat16"}, {"memory": "fwmlp@1"}],
    ids=lambda change: "-".join(map(str, change.values())) or "plain",
)
def test_a_stopped_training_goes_on_to_the_same_numbers(text, trained, tmp_path, change):
    # three steps lie between two evaluations, whose reading must leave no trace
    settings = replace(text, **change, steps=5, save_every=3, eval_every=2) if change else text
    whole = full_scale.launch(settings, tmp_path / "whole") if change else trained[1]
    training.stop_at_first_checkpoint(full_scale.launch, settings, tmp_path / "stopped")
    again = full_scale.launch(settings, tmp_path / "stopped")
    for key in ("val_loss", "curve", "memories"):
        assert again[key] == whole[key], key


def test_an_evaluation_does_not_change_what_follows(text, trained, tmp_path):
    often = full_scale.launch(replace(text, eval_every=1, save_every=0), tmp_path)
    assert often["val_loss"] == trained[1]["val_loss"]


def train_twice(settings, folder):
    """In each of several processes: train, forget the last checkpoint, train on from the one before."""
    whole = full_scale.train_one(settings, folder)
    if distributed.rank() == 0:
        (folder / "whole.json").write_text(json.dumps(whole["curve"]))
        shutil.copy(checkpoint.latest(folder / "checkpoints" / "train") / "extras.pt", folder)
        shutil.rmtree(checkpoint.latest(folder / "checkpoints" / "train"))
    distributed.barrier()
    return full_scale.train_one(settings, folder)


def test_each_process_keeps_its_own_fast_weights(text, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    settings = replace(text, devices=2, strategy="ddp", sync_state="none", steps=4, save_every=2, eval_every=2)
    again = pretraining.launch(settings, tmp_path, train_twice)
    extras = torch.load(tmp_path / "extras.pt", weights_only=True)
    first, second = (rank["extras"]["fast"] for rank in extras)
    assert first.keys() == second.keys() != set() and not any(torch.equal(first[key], second[key]) for key in first)
    assert again["curve"] == json.loads((tmp_path / "whole.json").read_text()), "resumed from step 2, each with its own"


@pytest.mark.parametrize("sync", ["rank0", "average"])
def test_a_checkpoint_gives_all_processes_one_memory(text, monkeypatch, sync):
    model = full_scale.build_text_model(text, 320)
    start = tables(model)
    monkeypatch.setattr(full_scale.distributed, "world_size", lambda: 2)
    # what the two collectives do when the other process holds zeros, or is the first and holds ones
    monkeypatch.setattr(full_scale.dist, "all_reduce", lambda table: table.add_(0.0))
    monkeypatch.setattr(full_scale.dist, "broadcast", lambda table, source: table.fill_(1.0))
    assert full_scale.FastState(model, sync).state_dict() == {}
    for key, table in tables(model).items():
        assert torch.equal(table, start[key] / 2 if sync == "average" else torch.ones_like(table))
    assert full_scale.FastState(model, "none").state_dict().keys() == start.keys()


def test_checkpoints_that_change_fast_weights_decide(text):
    assert "save_every" not in text.deciding()
    pair = replace(text, devices=2, strategy="ddp")
    assert "save_every" in pair.deciding() and "save_every" not in replace(pair, sync_state="none").deciding()
    assert not set(FullScale.EVALUATED) & set(text.deciding())


def test_slow_tables_have_a_rate_of_their_own(text):
    model = full_scale.build_text_model(text, 320)
    groups = full_scale.build_optimizer(model, replace(text, pkm_lr=1e-2)).param_groups
    assert [(group["name"], group["lr"]) for group in groups][-1] == ("tables", 1e-2)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# -- models


def test_all_arms_of_the_paper_have_its_sizes():
    for arm in (*full_scale.PAPER_ARMS, *full_scale.ABLATION_ARMS):
        settings = full_scale.with_arm(FullScale(), arm, 1)
        config = full_scale.model_config(settings, 32_000)
        assert settings.arm == arm and (config.hidden_size, config.num_layers, config.fwpkm_n_subkeys) == (768, 12, 512)
        assert config.pswa_prob == (0.9 if settings.backbone in ("fa", "gdn+fa") else 0.0)
    paper = FullScale()
    assert paper.steps * paper.global_batch * paper.seq_len == 10_485_760_000
    assert full_scale.model_config(replace(paper, ablation="lahd0"), 9).fwpkm_target_value_lookahead == 0


def test_a_seed_gives_one_model(text):
    first, second = (full_scale.build_text_model(text, 320).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- evaluation


def test_everything_is_evaluated_once(text, trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    asked = replace(text, evaluations=list(full_scale.EVALUATIONS))
    answer = full_scale.answer_longbench
    monkeypatch.setattr(full_scale, "answer_longbench", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        full_scale.launch(asked, folder)
    # killed in the third kind: the first two are not done again
    monkeypatch.setattr(full_scale, "answer_longbench", answer)
    monkeypatch.setattr(full_scale, "read_stream", lambda *_, **__: pytest.fail("read again"))
    found = full_scale.launch(asked, folder)["evaluation"]
    assert set(found["streams"]) == {"fineweb", "longcrawl64", "lambada"}
    assert all(numbers["on"] > 1 and numbers["on"] != numbers["off"] for numbers in found["streams"].values())
    assert set(found["needles"]["12"]) == {"whole_1", "whole_3", "keep_1", "keep_3"}
    assert found["longbench"]["hotpotqa"]["questions"] == 1 and "gain" in found["continual"]["pile"]
    assert len(list((folder / "evaluation").glob("*.parquet"))) == 4
    with pytest.raises(pytest.fail.Exception, match="read again"):
        full_scale.launch(replace(asked, stream_tokens=500), folder)


def test_a_training_set_is_evaluated_on_its_head_only(text):
    tokenizer = load_tokenizer(text.tokenizer)
    tokens = full_scale.stream_tokens("fineweb", replace(text, stream_tokens=10_000), tokenizer)
    assert len(tokens) == text.val_tokens // 2


def test_streams_leave_the_memory_alone_and_carry_it(text, model):
    network, tokenizer = model
    before, tokens = tables(network), full_scale.stream_tokens("lambada", text, tokenizer)
    with torch.no_grad():
        part = full_scale.read_stream(network, tokens, segment=32)
        with memory_options(network, update=False):
            still = network(tokens[None, :32], labels=tokens[None, :32])
    assert same(tables(network), before)
    losses = {(row["updates"], row["segment"]): row["value"] for row in part.rows if row["what"] == "loss"}
    assert losses["on", 1] != losses["off", 1] and len(losses) == 2 * -(-(len(tokens) - 1) // 32)
    assert {row["segment"] for row in part.rows if row["what"] == "coverage"} == {0, 8, 16}
    assert still.loss > 0 and abs(sum(part.numbers["gates"]["2"]) - 1) < 1e-6


def test_needles_are_answered_after_each_pass(text, model):
    network, tokenizer = model
    heard = []
    tokenizer_like = type(
        "T",
        (),
        {"encode": staticmethod(tokenizer.encode), "decode": staticmethod(lambda ids: heard.append(ids) or "1")},
    )
    rows = full_scale.find_needles(network, tokenizer_like, replace(text, niah_chunks=["whole"]), 12, None).rows
    assert [row["reads"] for row in rows] == [1, 3]
    from papers10.core.random import generator
    from papers10.lm.tasks import needle_words

    sample = needle_words("secret", 12, generator=generator(text.seed, "needles", 12, 0))
    ids = torch.tensor([tokenizer.encode(sample.prompt)])
    with torch.no_grad():
        for reads, ids_heard in zip((1, 3), heard):
            out = iterative_read(network, ids, reads, "whole", segment=text.seq_len)
            assert out.logits[0, -1].argmax() == ids_heard[0] and len(ids_heard) == 6


def test_domains_are_adapted_to_in_turn(text, model):
    network, tokenizer = model
    before = tables(network)
    found = full_scale.adapt_in_turn(network, full_scale.pile_texts(text, tokenizer), segment=32)
    assert same(tables(network), before)
    assert [(row["step"], row["after"]) for row in found.rows[::2]] == [(0, "start"), (1, "FreeLaw"), (2, "Ubuntu IRC")]
    loss = {(row["step"], row["domain"]): row["loss"] for row in found.rows}
    assert len({loss[step, "FreeLaw"] for step in range(3)}) == 3, "every domain moves the memory"
    plain = full_scale.build_text_model(replace(text, memory="none"), 320).eval()
    assert full_scale.adapt_in_turn(plain, full_scale.pile_texts(text, tokenizer), segment=32).numbers == {}


def test_stretching_is_taken_back(text):
    settings = replace(text, backbone="fa", memory="fwpkm@1")
    network = full_scale.build_text_model(settings, 320).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = network(ids, cache=network.new_cache()).logits
        with full_scale.stretched(network, settings, full_scale.yarn_factor(64, 32)):
            assert network.config.rope_factor == 4 and not torch.equal(
                network(ids, cache=network.new_cache()).logits, before
            )
        assert torch.equal(network(ids, cache=network.new_cache()).logits, before)
    assert [full_scale.yarn_factor(k * 1024, 4096) for k in (8, 16, 32, 128)] == [4, 8, 16, 64]


def test_longcrawl64_is_a_source(sets):
    source = TextSource(dataset=sets["longcrawl64"], config=sets["gpt2"])
    every = list(documents(source))
    assert len(every) == 16 and list(documents(source, 14)) == every[14:] and "the cat" in " ".join(every)


# -- before it starts


@pytest.mark.parametrize("name", ["lambada", "longbench", "pile"])
def test_a_set_on_the_hub_is_missed_before_any_training(text, monkeypatch, tmp_path, name):
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    paths = {key: value for key, value in text.paths.items() if key != name}
    with pytest.raises(DataMissing, match=rf"{full_scale._HUB[name]}: .*paths=\{{'{name}'"):
        full_scale.launch(replace(text, evaluations=list(full_scale.EVALUATIONS), paths=paths), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_local_copies_are_preferred(text, sets, monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    bare = replace(text, paths={})
    assert [full_scale.place_of(bare, name) for name in ("lambada", "longbench", "pile")] == [
        full_scale._HUB[name] for name in ("lambada", "longbench", "pile")
    ]
    shutil.copytree(sets["lambada"], tmp_path / "lambada")
    shutil.copytree(Path(sets["longbench"]).parent, tmp_path / "longbench")
    assert full_scale.place_of(bare, "lambada") == str(tmp_path / "lambada")
    assert full_scale.place_of(bare, "longbench") == str(tmp_path / "longbench" / "data.zip")
    assert full_scale.place_of(text, "lambada") == sets["lambada"]
    full_scale.check(replace(text, evaluations=["needles", "longbench"], paths={"gpt2": sets["gpt2"]}))


def test_refusals_before_anything_starts(text, monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match="longcrawl64"):
        full_scale.check(replace(text, dataset="longcrawl64"))
    with pytest.raises(DataMissing, match="heldout.zarr"):
        shutil.copytree(
            text.dataset, tmp_path / "crawl", ignore=lambda _, names: [n for n in names if n == "heldout.zarr"]
        )
        full_scale.check(
            replace(text, evaluations=["streams"], paths={**text.paths, "longcrawl64": str(tmp_path / "crawl")})
        )
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="4 GPU"):
            full_scale.check(FullScale())
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        full_scale.evaluate_one(text, tmp_path / "nothing" / "evaluation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "gpt"}, "backbone"),
        ({"memory": "fwpkm@12"}, "blocks from 0 to 11"),
        ({"memory": "fwpkm"}, "kinds and blocks"),
        ({"memory": "pkm@2", "ablation": "nog"}, "without fast product-key memories"),
        ({"recompute": True}, "write twice"),
        ({"evaluations": ["needels"]}, "did you mean 'needles'"),
        ({"paths": {"lambda": "x"}}, "did you mean 'lambada'"),
        ({"options": {"fwpkm_target_lookahead": 0}}, "fwpkm_target_value_lookahead"),
        ({"niah_lengths": [3]}, "at least 10"),
        ({"stepz": 3}, "did you mean 'steps'"),
    ],
)
def test_wrong_settings_are_refused_by_name(change, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        from_mapping(FullScale, change)


def test_requirements_name_memory_hours_licences_and_gates():
    said = full_scale.requirements(FullScale())
    for part in (
        "GB per GPU",
        "3 x 512 MiB",
        " h at 30 %",
        "Common Crawl",
        "ODC-By",
        "gated",
        "CC-BY-4.0",
        "lm,dist",
        "THUDM/LongBench",
    ):
        assert part in said, part
    assert "holds 4 sets" in full_scale.requirements(FullScale(sync_state="none"))
    assert "fast weights" not in full_scale.requirements(FullScale(memory="none"))


def test_settings_survive_their_file_and_come_from_parameters(text):
    assert from_mapping(FullScale, json.loads(text.model_dump_json())) == text
    settings = full_scale.from_parameters(
        {"size": "mini", "memory": "fwpkm@1", "dataset": "pydoc", "preset": "smoke", "device": "auto"}, device="cpu"
    )
    assert (settings.mix, settings.device, settings.memory) == ([], "cpu", "fwpkm@1")
    assert full_scale.from_parameters({}, device="cuda") == FullScale()
    with pytest.raises(ValueError, match="BACKBONE/MEMORY"):
        full_scale.with_arm(text, "swa", 0)


def test_numbers_go_into_a_run(text, trained):
    class Run:
        def __init__(self):
            self.values, self.tables = {}, {}

        def metric(self, name, value, **_):
            self.values[name] = value

        def table(self, name, records):
            self.tables[name] = records

    found = {
        "streams": {"lambada": {"on": 9.0, "off": 10.0, "tokens": 5}},
        "needles": {"4096": {"whole_2": {"exact": 50.0, "digits": 60.0, "candidate": 70.0}}},
        "longbench": {"2wikimqa": {"perplexity": 3.0}},
        "continual": {"pile": {"gain": 0.1, "kept": None}},
    }
    run, name = Run(), "gdn_swa_pkm_1_fwpkm_2"
    full_scale.record(run, text, {**trained[1], "evaluation": found})
    assert run.values[f"lm.{name}.val_loss"] == trained[1]["val_loss"] and run.values[f"ppl.{name}.lambada_off"] == 10.0
    assert run.values[f"niah.{name}.words4096_whole_2_exact"] == 50.0 and run.values[f"continual.{name}.gain"] == 0.1
    assert run.values[f"longbench.{name}._2wikimqa"] == 3.0 and f"continual.{name}.kept" not in run.values
    assert "gates" not in run.tables[f"memories-{name}-0"][0]
    full_scale.record(Run(), text, None)


def test_bytes_need_no_tokenizer():
    settings = FullScale(
        size="mini",
        memory="fwpkm@1",
        tokenizer="bytes",
        dataset="pydoc",
        mix=[],
        streams=["pydoc"],
        stream_tokens=50,
        val_tokens=40,
    )
    assert len(full_scale.stream_tokens("pydoc", settings, ByteTokenizer())) == 40, "pydoc is trained on: its head only"
