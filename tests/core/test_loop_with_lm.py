"""The loop with the parts it is meant for: a language model with shared weights, token windows and a schedule."""

import pytest
import torch

from papers10.core import checkpoint
from papers10.core.loop import LoopConfig, TrainState, train

trunk = pytest.importorskip("papers10.lm.trunk")
text = pytest.importorskip("papers10.lm.text")
optim = pytest.importorskip("papers10.lm.optim")


def build():
    torch.manual_seed(0)
    model = trunk.CausalLM(trunk.TrunkConfig(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2))
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, 0.1), lr=3e-3)
    tokens = torch.randint(0, 32, (400,), generator=torch.Generator().manual_seed(1))
    windows = text.TokenWindows(tokens, 12, 4, 0)
    return TrainState(model, optimizer, optim.schedule(optimizer, "cosine", 2, 12, 0.1), windows)


def step(state, windows):
    return {"loss": state.model(windows, labels=windows).loss}


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_language_model_resumes_exactly(tmp_path, amp):
    config = LoopConfig(steps=12, accumulate=2, save_every=4, log_every=2, amp=amp, ema=0.9)

    def cut(state):
        if state.step == 10:
            raise InterruptedError

    whole, resumed = build(), build()
    expected = train(whole, step, config, folder=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(build(), step, config, folder=tmp_path / "cut", after_step=[cut])
    history = train(resumed, step, config, folder=tmp_path / "cut")
    assert history.resumed_from == 8 and history.records == expected.records
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert history.last("loss") < history.records[0]["loss"]


def test_a_trained_model_is_read_without_the_training_settings(tmp_path):
    state = build()
    train(state, step, LoopConfig(steps=3, save_every=3), folder=tmp_path)
    fresh = build()
    checkpoint.load(tmp_path, fresh)
    ids = torch.arange(10)[None]
    assert torch.equal(fresh.model(ids).logits, state.model(ids).logits)
