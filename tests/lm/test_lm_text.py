"""Text, windows, tokenizers, optimiser groups and schedule, tasks, cost."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from papers10.core.random import generator
from papers10.lm.flops import flops_per_token, memory_bytes
from papers10.lm.optim import parameter_groups, schedule
from papers10.lm.tasks import depth_parity
from papers10.lm.text import (
    StreamWindows,
    TokenWindows,
    hub_text,
    pack,
    pydoc_text,
    read_text,
    stdlib_source,
    text_hash,
)
from papers10.lm.tokenizers import ByteTokenizer, load_tokenizer, padded_vocab_size
from papers10.lm.trunk import CausalLM, TrunkConfig

ROWS = [
    {
        "text": f"Document number {i}.",
        "id": f"<urn:uuid:{i}>",
        "dump": "CC-MAIN-2024-10",
        "url": "https://example.org/a",
        "file_path": "s3://a",
        "language": "en",
        "language_score": 0.97,
        "token_count": 4,
        "score": 3.2,
        "int_score": 3,
    }
    for i in range(7)
]


def test_documentation_text():
    from pydoc_data.topics import topics

    text = pydoc_text()
    assert text == "\n\n".join(topics[k] for k in sorted(topics)).encode().decode("ascii", "ignore")
    if sys.version_info[:2] == (3, 11):
        assert abs(len(text) - 464_551) < 2_000
    assert len(text_hash(text)) == 64 and text_hash(text) != text_hash(text + "x")


def test_library_source_is_cut_and_repeatable():
    source = stdlib_source(50_000)
    assert 40_000 < len(source.encode()) <= 50_000 and source == stdlib_source(50_000) and "import" in source


def test_read_text_reports_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_text(tmp_path / "no.txt")
    with pytest.raises(FileNotFoundError, match="got none"):
        read_text(tmp_path)
    (tmp_path / "a.txt").write_bytes("ein schönes".encode("latin-1"))
    with pytest.raises(ValueError, match=r"0xf6 at 7 in .*a\.txt"):
        read_text(tmp_path / "a.txt")
    assert read_text(tmp_path, encoding="latin-1") == "ein schönes"
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(ValueError, match="empty"):
        read_text(tmp_path)


def test_hub_rows_from_parquet_and_json_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    wanted = [row["text"] for row in ROWS]
    (tmp_path / "j").mkdir(), (tmp_path / "p").mkdir()
    (tmp_path / "j" / "0.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "p" / "0.parquet"))
    for folder in ("j", "p"):
        assert list(hub_text(tmp_path / folder)) == wanted
        assert list(hub_text(tmp_path / folder, skip=5)) == wanted[5:]
        assert list(hub_text(tmp_path / folder, limit=2)) == wanted[:2]
        with pytest.raises(ValueError, match="column"):
            list(hub_text(tmp_path / folder, column="txt"))
    with pytest.raises(ValueError, match="one kind"):
        hub_text(tmp_path)


def test_hub_id_offline_says_what_to_do(monkeypatch):
    pytest.importorskip("datasets")
    from papers10.core.data import DataMissing

    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match="PAPERS10_OFFLINE"):
        hub_text("HuggingFaceFW/fineweb-edu", "sample-10BT")
    with pytest.raises(DataMissing, match="PAPERS10_OFFLINE"):
        load_tokenizer("gpt2")


def test_windows_resume_and_share():
    tokens = torch.arange(100, dtype=torch.int32)
    full = TokenWindows(tokens, 7, 6, seed=4)
    batches = [next(full) for _ in range(5)]
    again = TokenWindows(tokens, 7, 6, seed=4)
    again.load_state_dict({"step": 3, "seed": 4})
    assert torch.equal(next(again), batches[3]) and batches[0].dtype == torch.int64 and batches[0].shape == (6, 8)
    parts = [TokenWindows(tokens.numpy(), 7, 6, seed=4, rank=r, world_size=3) for r in range(3)]
    for batch in batches:
        assert torch.equal(torch.stack([next(p) for p in parts], 1).flatten(0, 1), batch)
    assert torch.equal(next(TokenWindows(np.arange(8), 7, 1)), torch.arange(8)[None])
    assert not torch.equal(batches[0], next(TokenWindows(tokens, 7, 6, seed=5)))
    with pytest.raises(ValueError, match="seed"):
        again.load_state_dict({"step": 0, "seed": 5})
    with pytest.raises(ValueError, match="tokens"):
        TokenWindows(tokens[:7], 7, 1)
    with pytest.raises(ValueError, match="batch_size"):
        TokenWindows(tokens, 7, 5, world_size=2)


def test_stream_windows_resume_and_share():
    documents = [chr(97 + i) * (i + 3) for i in range(12)]

    def build(**options):
        return StreamWindows(lambda skip: iter(documents[skip:]), ByteTokenizer().encode, 4, 4, separator=0, **options)

    whole = list(build())
    stream = "\0".join(documents) + "\0"
    assert bytes(torch.cat([b[:, :-1].flatten() for b in whole]).tolist()).decode() == stream[: 16 * len(whole)]
    for cut in range(len(whole)):
        first = build()
        for _ in range(cut):
            next(first)
        second = build()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(torch.equal(a, b) for a, b in zip(second, whole[cut:], strict=True))
    halves = [list(build(rank=r, world_size=2)) for r in range(2)]
    assert all(torch.equal(torch.stack(pair, 1).flatten(0, 1), batch) for *pair, batch in zip(*halves, whole))


def test_pack():
    assert pack([[1], [2, 3], []], 2, separator=9).tolist() == [[1, 9], [2, 3], [9, 9]]
    assert pack([], 3).shape == (0, 3)


def test_byte_tokenizer():
    tokenizer = ByteTokenizer(["<eos>", "<pad>"])
    assert tokenizer.vocab_size == 258 and tokenizer.decode(tokenizer.encode("héé <eos>")) == "héé <eos>"
    assert tokenizer.decode([0xFF, 257], skip_specials=False) == "\ufffd<pad>"
    with pytest.raises(IndexError, match="258"):
        tokenizer.decode([258])
    with pytest.raises(ValueError, match="specials"):
        ByteTokenizer(["a", "a"])


def test_tokenizer_from_both_folder_layouts(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train_from_iterator(
        [pydoc_text()[:20_000]], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    (tmp_path / "new").mkdir(), (tmp_path / "old").mkdir(), (tmp_path / "none").mkdir()
    learned.save(str(tmp_path / "new" / "tokenizer.json"))
    learned.save_model(str(tmp_path / "old"))
    text = "for x in range(3): return"
    new, old = load_tokenizer(tmp_path / "new"), load_tokenizer(tmp_path / "old")
    assert new.encode(text) == old.encode(text) and new.decode(new.encode(text)) == text
    assert new.eos_id == 0 and padded_vocab_size(new, 128) == 384
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "none")


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.kept = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))

    def no_decay_parameters(self):
        return ["kept"]


def test_groups_cover_every_parameter_once():
    model = nn.ModuleDict(
        {"lm": CausalLM(TrunkConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=1)), "gate": Gate()}
    )
    model["again"] = model["gate"]
    decay, rest = parameter_groups(model, 0.1)
    ids = [id(p) for g in (decay, rest) for p in g["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters()})
    assert id(model["gate"].kept) in map(id, rest["params"]) and id(model["gate"].matrix) in map(id, decay["params"])
    assert all(p.ndim == 2 for p in decay["params"]) and rest["weight_decay"] == 0
    model["gate"].matrix.requires_grad_(False)
    assert id(model["gate"].matrix) not in map(id, parameter_groups(model, 0.1)[0]["params"])


def test_schedule_ends_at_the_floor_and_resumes():
    parameter = nn.Parameter(torch.zeros(1))

    def build():
        optimizer = torch.optim.SGD([parameter], lr=2.0)
        return optimizer, schedule(optimizer, "cosine", 2, 10, 0.1)

    optimizer, scheduler = build()
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
        if len(rates) == 5:
            saved = scheduler.state_dict()
    assert rates[:3] == [1.0, 2.0, 2.0] and math.isclose(rates[10], 0.2) and math.isclose(rates[13], 0.2)
    _, other = build()
    other.load_state_dict(saved)
    assert math.isclose(other.get_last_lr()[0], rates[5])
    for options, name in (
        ({"kind": "cosin"}, "kind"),
        ({"warmup": 10, "steps": 10}, "steps"),
        ({"floor": 2.0}, "floor"),
    ):
        with pytest.raises(ValueError, match=name):
            schedule(optimizer, **{"steps": 20, **options})


def test_depth_parity_counts():
    bits, labels = depth_parity(50, 11, modulus=4, generator=generator(0, "t"))
    assert bits.shape == (50, 11) and torch.equal(labels, bits.sum(1) % 4)
    assert depth_parity(0, 0, generator=generator(0, "t"))[0].shape == (0, 0)
    with pytest.raises(ValueError, match="modulus"):
        depth_parity(1, 1, modulus=1, generator=generator(0, "t"))


@pytest.mark.parametrize(
    "options", [{}, {"mlp": "gelu"}, {"num_kv_heads": 1, "attention_gate": True}, {"tie_embeddings": False}]
)
def test_cost_counts_the_matrices(options):
    config = TrunkConfig(vocab_size=11, hidden_size=12, num_layers=3, num_heads=2, **options)
    model = CausalLM(config)
    matrices = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim == 2 and not (n == "embed.weight" and model.head is not None)
    )
    assert flops_per_token(config, length=1, training=False) == 2 * matrices + 4 * 3 * 12
    assert flops_per_token(config, length=64) == 3 * flops_per_token(config, length=64, training=False)
    assert memory_bytes(config)["optimizer"] == 8 * model.num_parameters()


def test_plays_come_from_the_users_folder(tmp_path, monkeypatch):
    from papers10.core.data import DataMissing
    from papers10.lm.text import shakespeare_text

    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    try:
        shakespeare_text()
    except DataMissing as error:
        assert "shakespeare" in str(error)
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "play.txt").write_text("To be, or not to be")
    assert "To be" in shakespeare_text()
