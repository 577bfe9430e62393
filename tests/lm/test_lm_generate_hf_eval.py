"""Generation, the transformers classes, perplexity and the harness adapter."""

import math
import subprocess
import sys

import pytest
import torch

from papers10.core.random import generator
from papers10.lm.eval import LMEvalAdapter, answer_perplexity, stream_perplexity
from papers10.lm.generate import generate, sample_token
from papers10.lm.tokenizers import ByteTokenizer
from papers10.lm.trunk import CausalLM, TrunkConfig, set_rope_scaling


def build(**options):
    config = TrunkConfig(
        **{"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.4, **options}
    )
    model = CausalLM(config)
    model.initialise(generator(0, "init"))
    return model


def test_sampling_frequencies_follow_the_model():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    share = sample_token(logits, temperature=2.0, generator=generator(0, "s")).bincount(minlength=3) / 20_000
    # Three standard deviations of a share near one half over 20,000 draws.
    assert (share - (logits[0] / 2).softmax(-1)).abs().max() < 0.011


def test_logprobs_are_the_models():
    model, prompt = build(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    out, scores = generate(
        model, prompt, max_new_tokens=5, temperature=0.7, top_k=5, generator=generator(1, "g"), return_logprobs=True
    )
    table = (model(out).logits / 0.7).log_softmax(-1)
    wanted = table[:, 2:-1].gather(-1, out[:, 3:, None])[..., 0]
    assert torch.allclose(scores, wanted, atol=1e-5)


def test_rows_end_by_themselves():
    model, prompt = build(), torch.tensor([[1, 2], [3, 4]])
    free = generate(model, prompt, max_new_tokens=8, temperature=0)
    stop = int(free[0, 3])
    out = generate(model, prompt, max_new_tokens=8, temperature=0, stop=(stop,))
    first = (out[0, 2:] == stop).nonzero()[0, 0] + 2
    assert (out[0, first:] == stop).all() and torch.equal(out[0, : first + 1], free[0, : first + 1])
    assert torch.equal(generate(model, prompt, max_new_tokens=0), prompt)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({}, "generator"),
    ],
)
def test_generation_refuses(options, name):
    with pytest.raises(ValueError, match=name):
        generate(build(), torch.tensor([[1]]), **{"max_new_tokens": 2, **options})


@pytest.fixture(scope="module")
def classes():
    pytest.importorskip("transformers")
    from papers10.lm.hf import as_pretrained

    return as_pretrained(CausalLM, TrunkConfig, "papers10_test_trunk")


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_round_trip(classes, tied, tmp_path):
    config_class, model_class = classes
    config = config_class(
        vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, init_std=0.4, tie_embeddings=tied, window=4,
        attention_gate="sigmoid", rope_factor=4.0, rope_original_length=3,
    )
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path).eval()
    assert (tmp_path / "model.safetensors").is_file() and loaded.config.core() == config.core()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    out = loaded(input_ids=tokens, labels=tokens)
    assert torch.allclose(out.loss, model.model(tokens, labels=tokens).loss)
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(tokens, **settings), generate(model.model, tokens, max_new_tokens=7, temperature=0)
    )
    padded, mask = torch.tensor([[0, 0, 1, 2], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours = generate(model.model, padded, max_new_tokens=7, temperature=0, attention_mask=mask)
    assert torch.equal(loaded.generate(padded, attention_mask=mask, **settings), ours)
    assert set_rope_scaling(loaded, 2.0).config.core() == loaded.model.config and loaded.config.rope_factor == 2.0


def test_beams_with_and_without_the_cache_agree(classes):
    model = classes[1](classes[0](vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, init_std=0.4)).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(tokens, **settings), model.generate(tokens, use_cache=False, **settings))


def test_transformers_config_refuses_unknown_keys(classes):
    with pytest.raises(ValueError, match="did you mean 'num_heads'"):
        classes[0](vocab_size=40, hidden_size=16, num_layers=2, num_head=2)
    model = classes[1](classes[0](vocab_size=40, hidden_size=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="inputs_embed"):
        model(input_ids=torch.tensor([[1]]), inputs_embed=torch.zeros(1))


def test_plain_models_do_not_load_transformers():
    code = "import sys, papers10.lm.trunk, papers10.lm.text, papers10.lm.hf, papers10.lm.eval; print('transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize("segment", [1, 3, 100])
def test_stream_perplexity_does_not_depend_on_segments(segment):
    model, tokens = build(), torch.randint(40, (2, 20), generator=generator(0, "t"))
    found = stream_perplexity(model, tokens, segment=segment)
    assert math.isclose(found["loss"], model(tokens, labels=tokens).loss.item(), rel_tol=1e-5)
    assert math.isclose(found["perplexity"], math.exp(found["loss"])) and found["tokens"] == 38
    with pytest.raises(ValueError, match="tokens"):
        stream_perplexity(model, tokens[:, :1])


class Tally(torch.nn.Module):
    """Adds to the stream how many tokens it has seen, and keeps that."""

    placement = "after_mixer"

    def forward(self, x, *, cache=None):
        before = 0 if cache is None else cache.layers[0].get("tally", 0)
        counts = before + torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        if cache is not None:
            cache.layers[0]["tally"] = counts[:, -1:]
        return x * counts, {"last": counts[0, -1, 0].item()}


def test_stream_perplexity_keeps_what_is_named_and_restarts_positions():
    config = TrunkConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, init_std=0.4)
    model = CausalLM(config, extra={0: Tally()})
    model.initialise(generator(0, "init"))
    tokens, seen = torch.randint(40, (2, 13), generator=generator(0, "t")), []
    found = stream_perplexity(model, tokens, segment=5, keep=["tally"], observe=lambda out: seen.append(out.aux["blocks.0.last"]))
    assert seen == [5, 10, 12] and found["losses"].shape == (2, 12)
    parts = []
    for low in (0, 5, 10):
        cache = model.new_cache()
        cache.layers[0]["tally"] = torch.full((1, 1, 1), float(low))
        table = model(tokens[:, low : min(low + 5, 12)], cache=cache).logits.log_softmax(-1)
        parts.append(-table.gather(-1, tokens[:, low + 1 : low + 6, None])[..., 0])
    assert torch.allclose(found["losses"], torch.cat(parts, 1), atol=1e-5)
    fresh = stream_perplexity(model, tokens, segment=5, keep=[])
    assert torch.equal(fresh["losses"], stream_perplexity(model, tokens, segment=5, carry_state=False)["losses"])
    for options in (dict(keep="tally"), dict(keep=["tally"], carry_state=False)):
        with pytest.raises(ValueError, match="keep"):
            stream_perplexity(model, tokens, **options)


@pytest.mark.parametrize("segment", [1, 4, 100])
def test_answers_are_scored_after_their_contexts(segment):
    model, draw = build(), generator(0, "answers")
    contexts = [torch.randint(40, (n,), generator=draw) for n in (1, 9, 17)]
    answers = [torch.randint(40, (n,), generator=draw).tolist() for n in (3, 1, 6)]
    found = answer_perplexity(model, contexts, answers, segment=segment)
    for nats, context, answer in zip(found["sums"], contexts, answers, strict=True):
        ids = torch.cat([context, torch.tensor(answer)])[None]
        table = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
        assert math.isclose(nats, -table[torch.arange(len(answer)), torch.tensor(answer)].sum().item(), rel_tol=1e-5)
    assert found["counts"].tolist() == [3, 1, 6] and found["tokens"] == 10
    assert math.isclose(found["loss"], found["sums"].sum().item() / 10) and math.isclose(found["perplexity"], math.exp(found["loss"]))
    cut = answer_perplexity(model, contexts[2:], answers[2:], segment=segment, max_length=11)
    kept = torch.cat([contexts[2][:2], contexts[2][-3:]])
    assert math.isclose(cut["loss"], answer_perplexity(model, [kept], answers[2:])["loss"], rel_tol=1e-5)


@pytest.mark.parametrize(
    "name, arguments, options",
    [
        ("answers", ([[1]], []), {}),
        ("answers", ([], []), {}),
        (r"answers\[0\]", ([[1]], [[]]), {}),
        (r"contexts\[1\]", ([[1], []], [[1], [2]]), {}),
        ("max_length", ([[1]], [[1, 2]]), {"max_length": 2}),
        ("segment", ([[1]], [[1]]), {"segment": 0}),
    ],
)
def test_answer_perplexity_refuses(name, arguments, options):
    with pytest.raises(ValueError, match=name):
        answer_perplexity(build(), *arguments, **options)


def test_adapter_scores_are_exact():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model = build(vocab_size=257)
    adapter = LMEvalAdapter(model, ByteTokenizer(["<eos>"]), batch_size=2, max_length=32)
    texts = [("abc", " def"), ("x", "y"), ("a longer context than the model can hold, truly", " end"), ("", "zz")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in texts]
    answers = adapter.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(texts, answers):
        ids = (list(context.encode()) or [256]) + list(continuation.encode())
        ids, count = torch.tensor([ids[-32:]]), len(continuation)
        table = model(ids).logits[0].log_softmax(-1)
        wanted = sum(table[i - 1, ids[0, i]].item() for i in range(ids.shape[1] - count, ids.shape[1]))
        assert math.isclose(score, wanted, rel_tol=1e-4) and not greedy
    (rolling,) = adapter.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("abcdef",), 0)], disable_tqdm=True
    )
    ids = torch.tensor([[256, *b"abcdef"]])
    assert math.isclose(rolling, -6 * model(ids, labels=ids).loss.item(), rel_tol=1e-4)
    (text,) = adapter.generate_until([Instance("generate_until", {}, ("abc", {"until": ["\n"], "max_gen_toks": 6}), 0)])
    assert isinstance(text, str) and "\n" not in text


def test_adapter_runs_a_task_of_the_harness(tmp_path):
    """A task file of our own with four questions, through the harness's own evaluation."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"{a} plus {b} is", "choices": ["one", "two", "many"], "answer": (a + b) % 3}
        for a, b in ((0, 1), (1, 1), (2, 2), (0, 2))
    ]
    import json

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"""task: papers10_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/rows.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    adapter = LMEvalAdapter(build(vocab_size=257), ByteTokenizer(["<eos>"]), max_length=64)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        adapter, tasks=["papers10_tiny"], task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert 0 <= found["results"]["papers10_tiny"]["acc,none"] <= 1
