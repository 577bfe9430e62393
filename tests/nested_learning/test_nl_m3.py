"""M3: traces by hand, Muon without its second memory, grouping, clock, scale, state, refusals, cost."""

import pytest
import torch
from torch import nn

from papers10.nested_learning import m3 as module
from papers10.nested_learning.m3 import M3, m3_param_groups, newton_schulz, step_times, transformer_shapes


def trace(gradients, **options):
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer, values = M3([weight], **options), []
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        values.append(weight.item())
    return values


LITERAL = dict(lr=0.1, betas=(0.5, 0.25, 0.9), eps=0.0, accumulate="sum", ns="cubic", ns_steps=30)


@pytest.mark.parametrize("alpha, second", [(0.0, -0.1 - 0.1 / 2**0.5), (1.0, -0.1 - 0.2 / 2**0.5)])
def test_the_literal_algorithm_by_hand(alpha, second):
    assert trace([2, 2], alpha=alpha, slow_every=1, **LITERAL) == pytest.approx([-0.1, second], abs=1e-12)


def literal_reference(gradients, f, lr, betas, alpha, eps, steps):
    """Algorithm 1, line by line."""
    shape = gradients[0].shape
    fast, slow, square, slow_output, theta = (torch.zeros(shape, dtype=torch.float64) for _ in range(5))
    history, path = [], []
    for t, g in enumerate(gradients):
        if t % f == 0:
            slow = slow + betas[2] * sum(history[-f:], torch.zeros(shape, dtype=torch.float64)) if t else slow
            slow_output = newton_schulz(slow, steps, "cubic")
        history.append(g)
        fast, square = fast + betas[0] * g, square + betas[1] * g * g
        theta = theta - lr * (newton_schulz(fast, steps, "cubic") + alpha * slow_output) / (square.sqrt() + eps)
        path.append(theta)
    return path


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_the_literal_algorithm_line_by_line(shape):
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(11)]
    options = dict(lr=0.1, betas=(0.9, 0.99, 0.8), alpha=0.7, eps=1e-3)
    expected = literal_reference(gradients, 4, steps=5, **options)
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = M3([weight], slow_every=4, accumulate="sum", ns="cubic", ns_steps=5, **options)
    for gradient, wanted in zip(gradients, expected):
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.allclose(weight, wanted, atol=1e-12)


def test_the_moving_average_form():
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(7)]
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = M3(
        [weight], lr=0.1, betas=(0.8, 0.9, 0.7), alpha=0.5, slow_every=3, second_moment=True, weight_decay=0.2
    )
    fast, slow, square, theta, output = (torch.zeros(3, 4, dtype=torch.float64) for _ in range(5))
    for t, g in enumerate(gradients):
        if t and t % 3 == 0:
            slow = 0.7 * slow + 0.3 * sum(gradients[t - 3 : t]) / 3
            output = newton_schulz(slow)
        fast, square = 0.8 * fast + 0.2 * g, 0.9 * square + 0.1 * g * g
        update = (newton_schulz(fast) + 0.5 * output) / ((square / (1 - 0.9 ** (t + 1))).sqrt() + 1e-8)
        theta = theta * (1 - 0.1 * 0.2) - 0.1 * 0.2 * update / update.square().mean().sqrt()
        weight.grad = g.clone()
        optimizer.step()
        assert torch.allclose(weight, theta, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_without_the_slow_memory_it_is_muon(shape):
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    ratio = max(1, shape[0] / shape[1]) ** 0.5
    m3 = M3(
        [ours],
        lr=0.02 * ratio,
        alpha=0.0,
        rms_scale=None,
        second_moment=False,
        ns_dtype=torch.bfloat16,
        betas=(0.95, 0.999, 0.9),
    )
    muon = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, nesterov=False, weight_decay=0.0)
    for _ in range(10):
        ours.grad = torch.randn(shape, generator=draw)
        theirs.grad = ours.grad.clone()
        m3.step()
        muon.step()
    # bfloat16 in both: ten steps of 0.02, each good to a few units of 1/128
    assert torch.allclose(ours, theirs, atol=10 * 0.02 * ratio * 4 / 128)
    assert set(m3.state[ours]) == {"step", "slow_step", "fast"}, "nothing is kept for a memory that is not used"


def test_the_step_has_one_size_whatever_the_gradient():
    for scale in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.zeros(8, 5))
        optimizer = M3([weight], lr=0.5, slow_every=2)
        for step in range(5):
            before = weight.detach().clone()
            weight.grad = scale * torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            assert (weight - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)


def test_nothing_moves_without_a_gradient_and_zero_stays_zero():
    assert trace([0, 0, 0, 0], alpha=1.0, slow_every=1) == [0, 0, 0, 0]
    assert trace([0, 2], alpha=1.0, slow_every=1)[-1] < 0


def test_adamw_parameters_are_torchs_adamw():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(7)) for _ in range(2))
    mine = M3([ours], fallback_lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(7, generator=draw)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    assert torch.equal(ours, theirs)


def test_the_clock_of_the_slow_memory():
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = M3([weight], slow_every=3)
    seen = []
    for step in range(8):
        weight.grad = torch.full((3, 3), float(step))
        optimizer.step()
        state = optimizer.state[weight]
        seen.append((state["slow_step"], state["gathered"][0, 0].item()))
    assert seen == [(0, 0), (0, 1), (0, 3), (1, 3), (1, 7), (1, 12), (2, 6), (2, 13)]
    # means of the blocks are 1 and 4; the second update weighs 0.1
    assert state["slow"][0, 0].item() == pytest.approx(0.9 * 0.1 * 1 + 0.1 * 4)


class GPTLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(10, 8), nn.Embedding(4, 8)
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 16), "conv": nn.Conv1d(8, 8, 3)})
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.thin = nn.Linear(8, 1)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.wte.weight


def test_groups_by_type_name_and_shape():
    model = GPTLike()
    hidden, other = m3_param_groups(model)
    assert {id(p) for p in hidden["params"]} == {id(model.block["up"].weight), id(model.block["conv"].weight)}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(hidden["params"]) + len(other["params"]) == len(trained)
    assert [g["rule"] for g in (hidden, other)] == ["m3", "adamw"]
    named = m3_param_groups(model, adamw=("conv",))[0]["params"]
    assert [p.shape for p in named] == [(16, 8)]
    assert len(m3_param_groups(nn.LayerNorm(3))) == 1


def test_groups_of_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    hidden, other = m3_param_groups(transformers.LlamaForCausalLM(config))
    assert len(hidden["params"]) == 2 * 7 and {tuple(p.shape) for p in other["params"]} == {(50, 16), (16,)}


def test_rates_of_groups_follow_the_scheduler():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = M3(model, lr=0.02, fallback_lr=0.004)
    assert [(g["rule"], g["lr"]) for g in optimizer.param_groups] == [("m3", 0.02), ("adamw", 0.004)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.002]
    named = M3(model.named_parameters(), lr=0.02)
    assert [g["param_names"] for g in named.param_groups] == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]
    explicit = M3([{"params": [model[0].weight], "rule": "adamw", "lr": 0.3}])
    assert explicit.param_groups[0]["lr"] == 0.3


def test_alpha_can_be_raised_later_and_state_of_another_size_is_kept():
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = M3([weight], alpha=0.0, slow_every=2)
    for alpha in (0.0, 0.0, 0.5, 0.5, 0.5):
        optimizer.param_groups[0]["alpha"] = alpha
        weight.grad = torch.ones(3, 3)
        optimizer.step()
    assert torch.isfinite(weight).all() and "slow" in optimizer.state[weight]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(betas=(0.9, 1.0, 0.9)), r"betas\[1\]: expected a number in \[0, 1\), got 1.0"),
        (dict(betas=(0.9, 0.9)), "betas: expected three numbers"),
        (dict(alpha=-1.0), "alpha"),
        (dict(eps=-1.0), "eps"),
        (dict(slow_every=0), "slow_every: expected a whole number >= 1, got 0"),
        (dict(ns="quintik"), "did you mean 'quintic'"),
        (dict(ns_steps=-1), "ns_steps"),
        (dict(accumulate="mean"), "accumulate: expected one of 'ema', 'sum'"),
        (dict(rms_scale=0.0), "rms_scale"),
        (dict(fallback_lr=-1.0), "fallback_lr"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        M3([nn.Parameter(torch.zeros(2, 2))], **options)


def test_flat_shards_are_refused():
    with pytest.raises(ValueError, match="a flat shard"):
        M3([{"params": [nn.Parameter(torch.zeros(6))], "rule": "m3"}])
    partition = nn.Parameter(torch.zeros(6))
    partition.ds_tensor = torch.zeros(3)
    with pytest.raises(ValueError, match="FSDP2"):
        M3([partition])
    optimizer = M3([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="rule"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "rule": "muon"})
    assert len(optimizer.param_groups) == 1, "a refused group is not kept"


def test_step_times_and_shapes():
    shapes = transformer_shapes(16, 1)
    assert shapes == [(16, 16)] * 4 + [(64, 16), (16, 64)]
    assert sum(a * b for a, b in transformer_shapes(768, 12)) == 12 * 12 * 768**2
    times = step_times(shapes, repeats=2)
    assert set(times) == {"adamw", "muon", "m3", "m3_fast", "m3_slow", "ratio"} and min(times.values()) > 0


def test_newton_schulz_is_offered_here_too():
    assert module.newton_schulz is newton_schulz and "newton_schulz" in module.__all__
