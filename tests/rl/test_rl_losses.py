"""The policy loss: known values, gradients, equivalences, the losses of TRL and verl on the same tensors, wrong inputs."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.rl import losses as L
from papers10.rl.advantages import dna_advantages, group_advantages

# Two float64 computations of the same sum.
CLOSE = dict(atol=1e-12, rtol=1e-10)


def draw(*shape, name="x", seed=0):
    return torch.randn(shape, generator=generator(seed, "losses", name), dtype=torch.float64)


def batch(B=6, T=7, *, seed=0, empty=True):
    """(logp, old, ref, mask, advantages [B]) with ratios from 0.3 to 3 and a row without tokens."""
    logp = -draw(B, T, name="p", seed=seed).abs()
    old = logp + 0.4 * draw(B, T, name="old", seed=seed)
    ref = logp + 0.3 * draw(B, T, name="ref", seed=seed)
    mask = torch.rand(B, T, generator=generator(seed, "mask")) > 0.3
    mask[:, 0] = True
    if empty:
        mask[B // 2] = False
    return logp.requires_grad_(), old, ref, mask, draw(B, name="a", seed=seed)


def gradient(loss, logp):
    return torch.autograd.grad(loss, logp)[0]


def one(ratio, advantage, **options):
    """(loss, derivative with respect to log π, metrics) of one token."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, metrics = L.policy_loss(logp, torch.zeros_like(logp), torch.tensor([advantage]), torch.ones(1, 1), **options)
    return loss.item(), gradient(loss, logp).item(), metrics


# ---------------------------------------------------------------- known values


@pytest.mark.parametrize(
    "ratio, advantage, dual, loss, slope",
    [
        (1.5, 1.0, 10.0, -1.28, 0),
        (0.5, 1.0, 10.0, -0.5, -0.5),
        (1.5, -1.0, 10.0, 1.5, 1.5),
        (0.5, -1.0, 10.0, 0.8, 0),
        (20.0, -1.0, 10.0, 10, 0),
        (20.0, -1.0, None, 20, 20),
    ],
)
def test_one_token(ratio, advantage, dual, loss, slope):
    found, derivative, metrics = one(ratio, advantage, dual_clip=dual)
    assert found == pytest.approx(loss, abs=1e-12) and derivative == pytest.approx(slope, abs=1e-12)
    cut = dual is not None and ratio == 20
    assert metrics["clip_frac"] == (slope == 0 and not cut)
    assert metrics.get("clip_frac_dual", 0) == cut


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gradient_on_the_edge_is_that_of_the_free_side(advantage):
    # exp(0) is 1 to the last bit, and so are both edges.
    loss, slope, metrics = one(1.0, advantage, clip_low=0, clip_high=0)
    assert (loss, slope, metrics["clip_frac"]) == (-advantage, -advantage, 0)


def test_dapo_loss_of_the_chapter():
    new = torch.tensor([[0.5, 0.5, 1], [0.2, 0.7, 0.5]])
    old = torch.tensor([[0.4, 0.5, 1], [0.4, 0.7, 0.5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss, metrics = L.dapo_loss(new.log(), old.log(), torch.tensor([1.0, -2.0]), mask)
    assert loss.item() == pytest.approx(0.67, abs=1e-6)
    assert metrics["clip_frac_low"] == pytest.approx(0.2) and metrics["tokens"] == 5


@pytest.mark.parametrize(
    "valid, advantage, loss, slope",
    [([0.3, 0.5], 1, -1.28, 0), ([0.3, 0.5], -1, 1.491825, 0.7459125), ([-0.4, -0.2], -1, 0.8, 0), ([-0.4, -0.2], 1, -0.740818, -0.370409)],
)
@pytest.mark.parametrize("form", ["sequence", "sequence_token"])
def test_one_sequence(form, valid, advantage, loss, slope):
    # The masked token's log-ratio of 50 must not be seen.
    logp = torch.tensor([[*valid, 50.0]], dtype=torch.float64, requires_grad=True)
    found, metrics = L.gspo_loss(
        logp, torch.zeros_like(logp), torch.tensor([float(advantage)]), torch.tensor([[1, 1, 0]]), ratio=form
    )
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert gradient(found, logp).tolist()[0] == pytest.approx([slope, slope, 0], abs=1e-6)
    assert metrics["clip_frac"] == (slope == 0)


def test_sequence_log_ratio():
    logp, old = torch.tensor([[0.1, 0.3, 50.0], [1, 2, 3]]), torch.zeros(2, 3)
    found = L.sequence_log_ratio(logp, old, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert found.exp().tolist() == pytest.approx([1.221403, 1], abs=1e-6)


def test_token_log_ratio_is_held():
    logp = torch.tensor([[30.0, -30, 5, -math.inf]], requires_grad=True)
    found = L.token_log_ratio(logp, torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]))
    assert found.tolist() == [[20, -20, 5, 0]]
    assert torch.autograd.grad(found.sum(), logp)[0].tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(
    "kl, value, slope",
    [("k1", -0.5, 1), ("k2", 0.125, -0.5), ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5))],
)
def test_divergence_of_one_token(kl, value, slope):
    # Δ = log π_ref − log π = 0.5; without advantage only the KL term is left.
    ref = torch.tensor([[0.5]], dtype=torch.float64)
    loss, derivative, metrics = one(1.0, 0.0, ref_logp=ref, kl=kl, kl_coef=2.0)
    assert loss == pytest.approx(2 * value) and derivative == pytest.approx(2 * slope)
    assert metrics["kl"] == pytest.approx(value)
    assert one(1.0, 0.0, ref_logp=ref, kl=kl)[0] == 0


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize("agg", L.AGGREGATIONS)
@pytest.mark.parametrize("kl", L.KL_FORMS)
def test_gradcheck(form, agg, kl):
    logp, old, ref, mask, advantages = batch(4, 3)
    table = advantages[:, None] + 0.1 * draw(4, 3, name="table")
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0])

    def loss(x):
        options = dict(ratio=form, agg=agg, kl=kl, kl_coef=0.1, ref_logp=ref, dual_clip=1.6)
        rows = L.policy_loss(x, old, advantages, mask, loss_weights=weights, **options)[0]
        return rows + L.policy_loss(x, old, table, mask, kl_weights=weights, **options)[0]

    assert torch.autograd.gradcheck(loss, logp)


def test_second_derivatives_are_refused():
    logp, old, _, mask, advantages = batch()
    (first,) = torch.autograd.grad(L.policy_loss(logp, old, advantages, mask)[0], logp, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def test_on_policy_gradient_is_that_of_reinforce():
    logp, _, _, mask, advantages = batch()
    expected = -(advantages[:, None] * mask) / mask.sum()
    for old in (None, logp.detach()):
        loss, metrics = L.dapo_loss(logp, old, advantages, mask)
        torch.testing.assert_close(gradient(loss, logp), expected, **CLOSE)
        assert metrics["clip_frac"] == 0 and metrics["ratio_mean"] == 1


@pytest.mark.parametrize("agg", L.AGGREGATIONS)
def test_two_forms_of_the_sequence_ratio(agg):
    logp, old, _, mask, advantages = batch()
    pair = [L.policy_loss(logp, old, advantages, mask, ratio=form, agg=agg)[0] for form in ("sequence", "sequence_token")]
    torch.testing.assert_close(*pair, **CLOSE)
    torch.testing.assert_close(*(gradient(loss, logp) for loss in pair), **CLOSE)


def test_bn_gspo_has_the_direction_of_gspo():
    logp, old, _, mask, _ = batch(8, empty=False)
    rewards, groups = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0]), torch.arange(8) // 4
    scaled, metrics = L.bn_gspo_loss(logp, old, rewards, groups, mask)
    plain, _ = L.gspo_loss(logp, old, group_advantages(rewards, groups), mask)
    a, b = gradient(scaled, logp).view(-1), gradient(plain, logp).view(-1)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0).item() == pytest.approx(1, abs=1e-12)
    # f = 1/2, G = 4.
    assert metrics["bn/scale"].item() == pytest.approx(math.sqrt(4 / (0.5 * 3)), rel=1e-5)
    assert (a.norm() / b.norm()).item() == pytest.approx(metrics["bn/scale"].item(), rel=1e-5)


# ---------------------------------------------------------------- equivalences


@pytest.mark.parametrize("agg", L.AGGREGATIONS)
@pytest.mark.parametrize("form", L.RATIOS)
def test_pieces_of_a_batch_add_up(agg, form):
    logp, old, ref, mask, advantages = batch()
    options = dict(agg=agg, ratio=form, ref_logp=ref, kl_coef=0.3)
    whole, metrics = L.policy_loss(logp, old, advantages, mask, **options)
    sizes = dict(global_tokens=metrics["tokens"], global_seqs=metrics["seqs"])
    parts = [
        L.policy_loss(logp[s], old[s], advantages[s], mask[s], **{**options, "ref_logp": ref[s]}, **sizes)[0]
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)
    torch.testing.assert_close(gradient(sum(parts), logp), gradient(whole, logp), **CLOSE)


def test_dna_is_a_weight_of_rows():
    logp, old, ref, mask, _ = batch(16, empty=False)
    rewards = torch.tensor([1] * 7 + [0] + [1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    advantages, info = dna_advantages(rewards, pair_ids=[0] * 16, branch=[0] * 8 + [1] * 8, return_info=True)
    weights = info.branch_scale[0].repeat_interleave(8)
    for form in L.RATIOS:
        options = dict(ratio=form, ref_logp=ref, kl_coef=0.1)
        scaled, _ = L.policy_loss(logp, old, advantages, mask, **options)
        base = group_advantages(rewards, num_generations=8)
        weighted, _ = L.policy_loss(logp, old, base, mask, loss_weights=weights, **options)
        torch.testing.assert_close(scaled, weighted, **CLOSE)
        torch.testing.assert_close(gradient(scaled, logp), gradient(weighted, logp), **CLOSE)


def test_kl_can_leave_groups_without_signal_alone():
    # huggingface/trl#7068: groups of equal rewards get a pull to the reference and nothing else.
    logp, old, ref, mask, _ = batch(8, empty=False)
    rewards = [1.0] * 4 + [1.0, 0, 0, 0]
    advantages, info = dna_advantages(rewards, pair_ids=[0] * 8, branch=[0] * 4 + [1] * 4, return_info=True)
    pulled = gradient(L.policy_loss(logp, old, advantages, mask, ref_logp=ref, kl_coef=1.0)[0], logp)
    options = dict(ref_logp=ref, kl_coef=1.0, kl_weights=info.keep)
    kept = gradient(L.policy_loss(logp, old, advantages, mask, **options)[0], logp)
    assert pulled[:4].abs().sum() > 0 and kept[:4].abs().sum() == 0
    torch.testing.assert_close(pulled[4:], kept[4:])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999), st.sampled_from(L.RATIOS), st.sampled_from(L.AGGREGATIONS))
def test_padding_and_order_change_nothing(B, T, seed, form, agg):
    logp, old, _, mask, advantages = batch(B, T, seed=seed)
    options = dict(ratio=form, agg=agg, max_length=9)
    loss, metrics = L.policy_loss(logp, old, advantages, mask, **options)
    order = torch.randperm(B, generator=generator(seed, "order"))
    junk = torch.full((B, 2), -math.inf)
    wider = [torch.cat([x[order], junk], 1) for x in (logp, old)]
    padded = torch.cat([mask[order], torch.zeros(B, 2, dtype=torch.bool)], 1)
    other, measured = L.policy_loss(*wider, advantages[order], padded, **options)
    torch.testing.assert_close(loss, other, **CLOSE)
    for name, value in metrics.items():
        torch.testing.assert_close(value, measured[name], **CLOSE)
    torch.testing.assert_close(gradient(loss, logp), gradient(other, logp), **CLOSE)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999), st.sampled_from(L.RATIOS), st.sampled_from(L.AGGREGATIONS))
def test_one_advantage_a_row_is_one_for_each_token(B, T, seed, form, agg):
    logp, old, _, mask, advantages = batch(B, T, seed=seed)
    pair = [
        L.policy_loss(logp, old, a, mask, ratio=form, agg=agg)[0] for a in (advantages, advantages[:, None].expand(B, T))
    ]
    torch.testing.assert_close(*pair, **CLOSE)
    torch.testing.assert_close(*(gradient(loss, logp) for loss in pair), **CLOSE)


def test_one_token_answers_make_grpo_gspo():
    logp, old, _, _, advantages = batch(9, 1, empty=False)
    ones = torch.ones(9, 1)
    torch.testing.assert_close(*(f(logp, old, advantages, ones)[0] for f in (L.grpo_loss, L.gspo_loss)), **CLOSE)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_loss_is_homogeneous_in_the_advantages(factor):
    logp, old, _, mask, advantages = batch()
    for form in L.RATIOS:
        loss, scaled = (L.policy_loss(logp, old, f * advantages, mask, ratio=form)[0] for f in (1, factor))
        torch.testing.assert_close(scaled, factor * loss, **CLOSE)


def test_no_tokens_no_loss():
    logp = torch.zeros(2, 3, requires_grad=True)
    for agg in L.AGGREGATIONS:
        for form in L.RATIOS:
            loss, metrics = L.policy_loss(logp, logp.detach(), torch.ones(2), torch.zeros(2, 3), agg=agg, ratio=form)
            assert loss.item() == 0 and gradient(loss, logp).abs().max() == 0 and metrics["empty_rows"] == 2
            assert all(torch.isfinite(value) for value in metrics.values())
    assert L.policy_loss(torch.zeros(0, 3), None, torch.zeros(0), torch.zeros(0, 3))[0].item() == 0


def test_empty_rows_leave_the_mean_unless_asked():
    logp, old, _, mask, advantages = batch()
    loss, metrics = L.grpo_loss(logp, old, advantages, mask)
    counted, _ = L.grpo_loss(logp, old, advantages, mask, count_empty=True)
    assert metrics["empty_rows"] == 1 and metrics["seqs"] == 5
    torch.testing.assert_close(counted, loss * 5 / 6, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(dtype):
    logp = torch.tensor([[12.0, 0.0]], dtype=dtype, requires_grad=True)
    loss, metrics = L.policy_loss(logp, torch.zeros_like(logp), torch.tensor([-1.0]), torch.ones(1, 2))
    # e^12 is beyond float16.
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((math.exp(12) + 1) / 2, rel=1e-6)
    assert metrics["n_clamped"] == 0
    if dtype != torch.float16:
        assert gradient(loss, logp).dtype == dtype


def test_log_ratios_beyond_the_clamp_are_counted():
    logp = torch.tensor([[30.0, 0.0]], requires_grad=True)
    loss, metrics = L.policy_loss(logp, torch.zeros_like(logp), torch.tensor([-1.0]), torch.ones(1, 2))
    assert metrics["n_clamped"] == 1 and metrics["log_ratio_max"] == 30
    assert loss.item() == pytest.approx((math.exp(20) + 1) / 2, rel=1e-6) and gradient(loss, logp)[0, 0] == 0


def test_long_answers_are_summed_without_loss():
    T = 32768
    logp = (0.01 * draw(2, T)).float()
    loss = L.dapo_loss(logp, torch.zeros_like(logp), torch.tensor([1.0, -1.0]), torch.ones(2, T))[0]
    wide = L.dapo_loss(logp.double(), torch.zeros(2, T).double(), torch.tensor([1.0, -1.0]), torch.ones(2, T))[0]
    # The two rows cancel but for 2e-4: float32 sums in tree order keep a relative 1e-7 of each.
    assert loss.item() == pytest.approx(wide.item(), abs=2e-7)


def test_advantages_and_references_get_no_gradient():
    logp, old, ref, mask, advantages = batch()
    others = [t.clone().requires_grad_() for t in (old, advantages, ref)]
    loss, metrics = L.policy_loss(logp, others[0], others[1], mask, ref_logp=others[2], kl_coef=0.1)
    loss.backward()
    assert all(t.grad is None for t in others) and logp.grad is not None
    assert not any(value.requires_grad for value in metrics.values())


def test_shapes_in_the_annotations_are_kept():
    beartype = pytest.importorskip("beartype", reason="development extra: pip install 'papers10[dev]'").beartype
    from jaxtyping import jaxtyped

    logp, old, ref, mask, advantages = batch()
    loss = jaxtyped(typechecker=beartype)(L.policy_loss)
    for values in (advantages, advantages[:, None].expand_as(mask)):
        loss(logp, old, values, mask, ref_logp=ref, kl_coef=0.1, loss_weights=advantages.abs(), kl_weights=mask[:, 0])
    jaxtyped(typechecker=beartype)(L.token_log_ratio)(logp, old, mask)
    jaxtyped(typechecker=beartype)(L.sequence_log_ratio)(logp, old, mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", L.RATIOS)
def test_the_card_gives_the_same(form):
    logp, old, ref, mask, advantages = batch()
    options = dict(ratio=form, kl_coef=0.1, dual_clip=2.0)
    loss, metrics = L.policy_loss(logp, old, advantages, mask, ref_logp=ref, **options)
    there = logp.detach().cuda().requires_grad_()
    moved, measured = L.policy_loss(there, old.cuda(), advantages.cuda(), mask.cuda(), ref_logp=ref.cuda(), **options)
    torch.testing.assert_close(moved.cpu(), loss, **CLOSE)
    torch.testing.assert_close(gradient(moved, there).cpu(), gradient(loss, logp), **CLOSE)
    assert all(measured[name].cpu() == pytest.approx(value, abs=1e-9) for name, value in metrics.items())


# ---------------------------------------------------------------- other trainers


def verl_loss(logp, old, advantages, mask, agg, clip_low, clip_high, clip_c, form):
    """verl's vanilla and gspo losses, written from their description."""
    m, A = mask.double(), advantages[:, None]
    if form == "token":
        ratio = (logp - old).clamp(-20, 20).exp()
    else:
        mean = ((logp - old) * m).sum(1) / m.sum(1).clamp(min=1)
        ratio = (logp - logp.detach() + mean.detach()[:, None]).clamp(max=10).exp()
    loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high))
    if form == "token":
        loss = torch.where(A < 0, torch.min(-A * clip_c, loss), loss)
    full = (m.sum(1) > 0).double()
    sums = (loss * m).sum(1)
    return {
        "token-mean": sums.sum() / m.sum(),
        "seq-mean-token-mean": (sums / (m.sum(1) + 1e-8) * full).sum() / full.sum(),
        "seq-mean-token-sum": sums.sum() / full.sum(),
        "seq-mean-token-sum-norm": sums.sum() / full.sum() / mask.shape[1],
    }[agg]


@pytest.mark.parametrize("agg", L.AGGREGATIONS)
@pytest.mark.parametrize("form, clip_c", [("token", 3.0), ("token", 1.5), ("sequence_token", math.inf)])
def test_parity_with_verl(agg, form, clip_c):
    logp, old, _, mask, advantages = batch(seed=3)
    expected = verl_loss(logp, old, advantages, mask, agg, 0.2, 0.28, clip_c, form)
    dual = None if math.isinf(clip_c) else clip_c
    found, _ = L.policy_loss(logp, old, advantages, mask, agg=agg, ratio=form, dual_clip=dual)
    # verl adds 1e-8 to the lengths.
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(gradient(found, logp), gradient(expected, logp), atol=1e-7, rtol=1e-7)


@pytest.fixture(scope="module")
def trl_loss():
    """The installed trainer's own `_compute_loss`, with everything around it that it reads and nothing that runs a model."""
    GRPOTrainer = pytest.importorskip("trl", reason="TRL is not installed: its losses were NOT compared").GRPOTrainer
    from collections import defaultdict

    def compute(loss_type, level, logp, old, ref, mask, advantages, *, beta=0.0, delta=None, max_length=None):
        accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
        )
        self = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=accelerator, loss_type=loss_type,
            importance_sampling_level=level, beta=beta, epsilon_low=0.2, epsilon_high=0.28, top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
            current_gradient_accumulation_steps=1, max_completion_length=max_length or mask.shape[1],
            _entropy_bonus_enabled=False, aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
            args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
            _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        )  # fmt: skip
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        inputs = dict(
            prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=mask.to(logp.dtype),
            advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum(),
        )  # fmt: skip
        return GRPOTrainer._compute_loss(self, None, inputs), self._metrics["train"]

    return compute


@pytest.mark.parametrize(
    "loss_type, options",
    [
        ("dapo", {"agg": "token-mean"}),
        ("bnpo", {"agg": "token-mean"}),
        ("grpo", {"agg": "seq-mean-token-mean", "count_empty": True}),
        ("dr_grpo", {"agg": "seq-mean-token-sum-norm", "count_empty": True, "max_length": 11}),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, delta", [(0.0, None), (0.04, 2.0)])
def test_parity_with_trl(trl_loss, loss_type, options, level, beta, delta):
    logp, old, ref, mask, advantages = batch(seed=4)
    if level == "sequence" and loss_type != "grpo":
        advantages = advantages[:, None].expand_as(mask)
    expected, logged = trl_loss(loss_type, level, logp, old, ref, mask, advantages, beta=beta, delta=delta, max_length=11)
    options = dict(ratio=level, ref_logp=ref if beta else None, kl_coef=beta, dual_clip=delta, **options)
    found, metrics = L.policy_loss(logp, old, advantages, mask, **options)
    # In `sequence`, TRL sums a table [B, 1] times the mask, which is the same number.
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradient(found, logp), gradient(expected, logp), **CLOSE)
    if level == "token":
        assert logged["clip_ratio/region_mean"] == [pytest.approx(metrics["clip_frac"].item(), abs=1e-6)]
        if beta:
            assert logged["kl"] == [pytest.approx(metrics["kl"].item(), abs=1e-6)]


@pytest.mark.parametrize(
    "preset, fixed",
    [
        (L.grpo_loss, dict(ratio="token", agg="seq-mean-token-mean")),
        (L.dr_grpo_loss, dict(ratio="token", agg="seq-mean-token-sum-norm", count_empty=True)),
        (L.dapo_loss, dict(ratio="token", agg="token-mean")),
        (L.gspo_loss, dict(ratio="sequence", agg="seq-mean-token-mean")),
    ],
)
def test_presets(preset, fixed):
    logp, old, ref, mask, advantages = batch()
    options = dict(clip_high=0.2, ref_logp=ref, kl_coef=0.1)
    found = preset(logp, old, advantages, mask, **options)[0]
    assert torch.equal(found, L.policy_loss(logp, old, advantages, mask, **fixed, **options)[0])


def test_bn_gspo_takes_the_weight_of_the_paper_when_there_is_a_reference():
    logp, old, ref, mask, _ = batch(8, empty=False)
    arguments = (logp, old, torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1]), torch.arange(8) // 4, mask)
    loss, _ = L.bn_gspo_loss(*arguments)
    pulled, metrics = L.bn_gspo_loss(*arguments, ref_logp=ref, agg="token-mean")
    assert pulled.item() == pytest.approx(
        L.bn_gspo_loss(*arguments, agg="token-mean")[0].item() + 1e-4 * metrics["kl"].item(), abs=1e-10
    )
    assert loss.isfinite()


# ---------------------------------------------------------------- wrong inputs

X, ONES, ROWS = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2)
WRONG = {
    "shape of old": (lambda: L.policy_loss(X, X[:, :2], ROWS, ONES), ValueError, "old_logp.*T"),
    "one row of numbers": (lambda: L.policy_loss(X[0], X[0], ROWS, ONES), ValueError, "logp"),
    "integers": (lambda: L.policy_loss(X.long(), X, ROWS, ONES), TypeError, "logp.*int64"),
    "no tensor": (lambda: L.policy_loss([[0.0]], X, ROWS, ONES), TypeError, "logp"),
    "mask of another shape": (lambda: L.policy_loss(X, X, ROWS, ONES[:1]), ValueError, "mask"),
    "advantages that would spread": (lambda: L.policy_loss(X, X, ROWS[:1], ONES), ValueError, "advantages"),
    "advantages a column": (lambda: L.policy_loss(X, X, ROWS[:, None], ONES), ValueError, "advantages"),
    "advantages a list": (lambda: L.policy_loss(X, X, [1, 1], ONES), ValueError, "advantages.*list"),
    "weights": (lambda: L.policy_loss(X, X, ROWS, ONES, loss_weights=torch.ones(3)), ValueError, "loss_weights"),
    "misspelt ratio": (lambda: L.policy_loss(X, X, ROWS, ONES, ratio="sequense"), ValueError, "mean 'sequence'"),
    "misspelt agg": (lambda: L.policy_loss(X, X, ROWS, ONES, agg="token_mean"), ValueError, "mean 'token-mean'"),
    "unknown kl": (lambda: L.policy_loss(X, X, ROWS, ONES, kl="k4"), ValueError, "kl"),
    "clip below nothing": (lambda: L.policy_loss(X, X, ROWS, ONES, clip_low=1.5), ValueError, "clip_low"),
    "dual clip": (lambda: L.policy_loss(X, X, ROWS, ONES, dual_clip=1.0), ValueError, "dual_clip"),
    "kl without reference": (lambda: L.policy_loss(X, X, ROWS, ONES, kl_coef=0.1), ValueError, "ref_logp.*0.1"),
    "no length": (lambda: L.policy_loss(X, X, ROWS, ONES, max_length=0), ValueError, "max_length"),
    "no tokens in all": (lambda: L.policy_loss(X, X, ROWS, ONES, global_tokens=0), ValueError, "global_tokens"),
    "misspelt argument": (lambda: L.gspo_loss(X, X, ROWS, ONES, clip_hi=0.3), TypeError, "clip_hi"),
    "clamp": (lambda: L.sequence_log_ratio(X, X, ONES, clamp=0), ValueError, "clamp"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
