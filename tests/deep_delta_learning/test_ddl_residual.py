import math

import ddl_oracle
import pytest
import torch
import torch.nn.functional as F

from papers10.core.checks import NonFiniteError
from papers10.deep_delta_learning.residual import (
    DeltaGate,
    DeltaResidual,
    DeltaStats,
    TargetHead,
    gate_bias,
    gate_value,
    write_update,
)


def tensors(n, dtype=torch.float64, d=6, seed=0, shape=(2, 3)):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, d, *(() if n == 1 else (n,)), generator=draw, dtype=dtype)
    h, context, x_in = (torch.randn(*shape, d, generator=draw, dtype=dtype) for _ in range(3))
    return x, h, context, x_in


def built(n, dtype=torch.float64, d=6, **options):
    torch.manual_seed(0)
    return DeltaResidual(d, n, **options).to(dtype)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_module_agrees_with_the_equations(n, preset):
    layer = built(n, preset=preset, beta_init=0.7)
    torch.nn.init.normal_(layer.target.linear.bias)
    x, h, context, x_in = tensors(n)
    new = layer(x, h, context, x_in)
    for b in range(2):
        for t in range(3):
            state = x[b, t].reshape(6, -1)
            expected = ddl_oracle.residual(
                state,
                h[b, t],
                context[b, t],
                x[b, t] if n == 1 else x_in[b, t],
                gate_weight=layer.gate.output.weight[0].detach(),
                gate_bias=layer.gate.output.bias.item(),
                target_weight=layer.target.linear.weight.detach(),
                target_bias=layer.target.linear.bias.detach(),
                target_source="state" if preset == "official" else "context",
                scale=4.0 if preset == "official" else None,
                eps=1e-5,
            )
            torch.testing.assert_close(new[b, t].reshape(6, -1).detach(), expected, atol=1e-12, rtol=1e-12)


def test_gate_starts_where_asked():
    assert gate_bias(1.0) == 0.0
    assert abs(gate_bias(0.0) + 13.8155) < 1e-4
    assert 1e-6 < float(gate_value(torch.tensor(gate_bias(0.0), dtype=torch.float64))) < 3e-6
    assert abs(float(gate_value(torch.tensor(0.5))) - 1.244919) < 1e-6
    for kind in ("sigmoid", "hard"):
        for beta_max in (1.0, 2.0):
            for start in (0.1, 0.5, 0.9):
                gate = DeltaGate(5, kind=kind, beta_init=start, beta_max=beta_max)
                assert gate(torch.zeros(1, 5)).item() == pytest.approx(start, abs=1e-6)
    assert DeltaGate(5)(torch.zeros(1, 5)).item() == 1.0
    assert DeltaGate(5, beta_max=1.0)(torch.zeros(1, 5)).item() == 0.5


def test_hard_gate_reaches_both_ends_and_sigmoid_does_not():
    far = torch.tensor([-50.0, 50.0])
    assert gate_value(far, kind="hard").tolist() == [0.0, 2.0]
    assert 0 < float(gate_value(torch.tensor(-13.8155))) and float(gate_value(torch.tensor(10.0))) < 2


def test_two_layer_gate():
    gate = DeltaGate(5, hidden=7, beta_init=1.2)
    context = torch.randn(3, 5)
    expected = 2 * torch.sigmoid(torch.tanh(context @ gate.hidden.weight.T) @ gate.output.weight[0] + gate.output.bias)
    torch.testing.assert_close(gate(context), expected)
    assert gate.hidden.bias is None


def test_autocast_leaves_the_gate_logit_alone():
    layer = DeltaResidual(32, gate="sigmoid")
    torch.nn.init.normal_(layer.gate.output.weight)
    x, h, context, _ = tensors(1, torch.float32, d=32)
    expected = layer.gate(context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer.gate(context)
        new = layer(x, h.bfloat16(), context)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert new.dtype == torch.float32
    assert layer.fp32_modules == ("gate",)


def test_half_precision_does_not_overflow():
    layer = DeltaResidual(1024).half()
    x, context = torch.zeros(1, 1024, dtype=torch.float16), torch.zeros(1, 1024, dtype=torch.float16)
    new = layer(x, torch.full((1, 1024), 300.0, dtype=torch.float16), context)
    assert torch.isfinite(new).all()
    torch.testing.assert_close(new.float(), torch.full((1, 1024), 2.0 / 32), atol=1e-3, rtol=0)  # beta 1, v 2, k = 1/32


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(preset="paper"),
        dict(rule="write"),
        dict(mapping="v"),
        dict(gate="hard", beta_init=0.8),
        dict(beta_hidden=3),
        dict(v_activation="tanh", v_source="context"),
        dict(v_constant=2.0),
        dict(gate="fixed", beta_init=2.0),
        dict(save="output"),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_agree_with_finite_differences(options, n):
    layer = built(n, d=4, **options)
    x, h, context, x_in = (t.requires_grad_() for t in tensors(n, d=4, shape=(2,)))
    parameters = list(layer.parameters())

    def run(x, h, context, x_in, *values):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values)), (x, h, context, x_in))

    assert torch.autograd.gradcheck(run, (x, h, context, x_in, *parameters), eps=1e-6, atol=1e-6)


def test_write_is_delta_without_the_erase_term():
    x, h, context, x_in = tensors(3)
    write, delta = built(3, rule="write"), built(3)
    unit = h / (h.square().sum(-1, keepdim=True) + 1e-10).sqrt()
    beta = delta.gate(context)
    erase = beta[..., None, None] * unit[..., None] * torch.einsum("btd,btdn->btn", unit, x)[..., None, :]
    torch.testing.assert_close(write(x, h, context, x_in) - erase, delta(x, h, context, x_in), atol=1e-12, rtol=1e-12)
    assert [p.shape for p in write.parameters()] == [p.shape for p in delta.parameters()]


def test_add_has_no_parameters_and_broadcasts():
    x, h, context, _ = tensors(3)
    layer = DeltaResidual(6, 3, rule="add")
    assert not list(layer.parameters()) and layer.no_decay_parameters() == []
    assert torch.equal(layer(x, h, context), x + h[..., None])
    flat, h, context, _ = tensors(1)
    assert torch.equal(DeltaResidual(6, rule="add")(flat, h, context), flat + h)


def test_v_map_takes_the_value_from_the_branch():
    layer = built(1, mapping="v")
    x, h, context, _ = tensors(1)
    _, stats = layer(x, h, context, return_stats=True)
    torch.testing.assert_close(stats.target, layer.target.linear(h).squeeze(-1))
    k = layer.direction.up(F.silu(layer.direction.down(context)))
    torch.testing.assert_close(stats.k_norm, k.norm(dim=-1))
    assert layer.direction.down.weight.shape == (1, 6)


@pytest.mark.parametrize("n", [1, 4])
def test_statistics_are_measured(n):
    layer = built(n)
    x, h, context, x_in = tensors(n)
    new, stats = layer(x, h, context, x_in, return_stats=True)
    assert isinstance(stats, DeltaStats) and torch.equal(new, layer(x, h, context, x_in))
    beta = stats.beta if n == 1 else stats.beta[..., None]
    torch.testing.assert_close(stats.error_post, (1 - beta) * stats.error_pre, atol=1e-8, rtol=0)
    torch.testing.assert_close(stats.readout - stats.target, stats.error_pre)
    torch.testing.assert_close(stats.state_norm, new.detach().flatten(2).norm(dim=-1))
    assert not any(t.requires_grad for t in stats)
    layer.recorder = []
    layer(x, h, context, x_in)
    assert len(layer.recorder) == 1 and torch.equal(layer.recorder[0].beta, stats.beta)


def test_weight_decay_leaves_biases_alone():
    layer = DeltaResidual(6, 4)
    spared = {id(p) for p in layer.no_decay_parameters()}
    assert spared == {id(layer.gate.output.bias), id(layer.target.linear.bias)}


def test_silent_branch_changes_nothing_and_has_finite_gradients():
    layer = built(1)
    x, h, context, _ = tensors(1)
    h = torch.zeros_like(h).requires_grad_()
    new = layer(x, h, context)
    assert torch.equal(new, x)
    new.sum().backward()
    assert torch.isfinite(h.grad).all() and h.grad.abs().max() < 1e7


def test_one_dimensional_state_relaxes_towards_the_target():
    layer = DeltaResidual(1, v_constant=3.0, gate="fixed", beta_init=0.5, k_eps=0.0)
    x = torch.tensor([[1.0]])
    assert layer(x, torch.tensor([[-7.0]]), x).item() == pytest.approx(1 + 0.5 * (-1) * (3 - (-1)))
    assert layer(x, torch.tensor([[7.0]]), x).item() == pytest.approx(2.0)


def test_bad_values_stay_in_their_token():
    layer = built(1)
    x, h, context, _ = tensors(1)
    context[0, 1, 2] = math.nan
    bad = torch.isnan(layer(x, h, context)).any(-1)
    assert bad.tolist() == [[False, True, False], [False, False, False]]
    x, h, context, _ = tensors(1)
    h[1, 0, 0] = math.inf
    bad = torch.isnan(layer(x, h, context)).any(-1)
    assert bad.tolist() == [[False, False, False], [True, False, False]]
    with pytest.raises(
        NonFiniteError, match=r"h: expected finite values, got 1 non-finite, first at index \(1, 0, 0\)"
    ):
        built(1, check_finite=True)(x, h, context)
    assert issubclass(NonFiniteError, FloatingPointError)


@pytest.mark.parametrize("n", [1, 4])
def test_empty_sequence(n):
    x, h, context, x_in = tensors(n, shape=(2, 0))
    assert built(n)(x, h, context, x_in).shape == x.shape


def test_state_dict_round_trip_and_compile_free_of_hidden_state():
    first, second = built(4, beta_hidden=3), DeltaResidual(6, 4, beta_hidden=3).double()
    second.load_state_dict(first.state_dict())
    x, h, context, x_in = tensors(4)
    assert torch.equal(first(x, h, context, x_in), second(x, h, context, x_in))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n=0), "n: expected an int of at least 1, got 0"),
        (dict(k_eps=-1.0), "k_eps"),
        (dict(beta_init=2.5), "beta_init"),
        (dict(beta_init=-0.1), "beta_init"),
        (dict(beta_max=0.0), "beta_max"),
        (dict(beta_max=2.1), "beta_max"),
        (dict(beta_max=1.0, beta_init=1.5), "beta_init: expected at most beta_max"),
        (dict(rule="delte"), "rule.*delta"),
        (dict(preset="offical"), "preset.*official"),
        (dict(mapping="x"), "mapping"),
        (dict(gate="sigmiod"), "gate.*sigmoid"),
        (dict(v_activation="relu"), "v_activation"),
        (dict(v_source="input"), "v_source"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        DeltaResidual(6, **options)


def test_bad_tensors_are_named():
    layer = DeltaResidual(6, 4)
    x, h, context, x_in = tensors(4, torch.float32)
    with pytest.raises(TypeError, match="x: expected a floating tensor"):
        layer(x.long(), h, context, x_in)
    with pytest.raises(TypeError, match="x: expected a floating tensor"):
        layer(x.to(torch.complex64), h, context, x_in)
    with pytest.raises(ValueError, match=r"x: expected shape .*n=4.*\[2, 3, 6, 3\]"):
        layer(x[..., :3], h, context, x_in)
    with pytest.raises(ValueError, match=r"h: expected shape \[2, 3, 6\].*got \[2, 3, 5\]"):
        layer(x, h[..., :5], context, x_in)
    with pytest.raises(ValueError, match="context: expected shape"):
        layer(x, h, context[:, :2], x_in)
    with pytest.raises(ValueError, match="x_in: expected the compressed state"):
        layer(x, h, context)


@pytest.mark.parametrize("rule", ["delta", "write", "add"])
@pytest.mark.parametrize("name", ["h", "context"])
def test_integer_and_missing_tensors_are_refused_by_name(rule, name):
    x, h, context, _ = tensors(1, torch.float32)
    operands = {"h": h, "context": context}
    layer = DeltaResidual(6, rule=rule)
    with pytest.raises(TypeError, match=f"{name}: expected a floating tensor, got torch.int64"):
        layer(x, **{**operands, name: operands[name].long()})
    with pytest.raises(TypeError, match=f"{name}: expected a floating tensor, got NoneType"):
        layer(x, **{**operands, name: None})


def test_integer_compressed_state_is_refused_by_name():
    x, h, context, x_in = tensors(4, torch.float32)
    with pytest.raises(TypeError, match="x_in: expected a floating tensor, got torch.int64"):
        DeltaResidual(6, 4)(x, h, context, x_in.long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("n", "options", "name"),
    [
        (1, {}, "x"),
        (4, {}, "x_in"),
        (1, {"preset": "paper"}, "context"),
        (4, {"preset": "paper"}, "context"),
        (1, {"rule": "write"}, "x"),
        (1, {"mapping": "v"}, "context"),
    ],
)
def test_another_dtype_than_the_weights_is_refused_by_name(dtype, n, options, name):
    layer, operands = DeltaResidual(6, n, **options), tensors(n, dtype)
    with pytest.raises(TypeError, match=rf"^{name}: expected torch.float32, .* got {dtype}"):
        layer(*operands)
    assert layer.to(dtype)(*operands).dtype == dtype


def test_the_branch_of_the_v_map_must_have_the_dtype_of_the_weights():
    x, h, context, _ = tensors(1, torch.float32)
    with pytest.raises(TypeError, match="^h: expected torch.float32"):
        DeltaResidual(6, mapping="v")(x, h.double(), context)


def test_mixed_dtypes_that_need_no_conversion_still_work():
    x, h, context, _ = tensors(1, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert DeltaResidual(6)(x, h, context).dtype == torch.bfloat16
        assert DeltaResidual(6)(x.float(), h, context).dtype == torch.float32
        with pytest.raises(TypeError, match="x: expected torch.float32"):
            DeltaResidual(6)(x.double(), h, context)
    assert DeltaResidual(6)(x.float(), h, context).dtype == torch.float32
    assert DeltaResidual(6, v_constant=2.0)(x, h, context).dtype == torch.bfloat16
    assert DeltaResidual(6, rule="add")(x, h.float(), context).dtype == torch.bfloat16


@pytest.mark.parametrize("rule", ["delta", "write", "add"])
def test_backend_and_save_are_checked_when_the_layer_is_made(rule):
    with pytest.raises(ValueError, match="backend: .*'torhc'.*'torch'"):
        DeltaResidual(6, rule=rule, backend="torhc")
    with pytest.raises(ValueError, match="save: .*'inputs'.*'input'"):
        DeltaResidual(6, rule=rule, save="inputs")


def test_write_update_checks_its_operands():
    x, k = torch.ones(2, 6), torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"v: expected shape \[2\]"):
        write_update(x, k, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="beta: expected shape"):
        write_update(x, k, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="k: expected the shape of x"):
        write_update(x, k[:, :5], torch.ones(2), torch.ones(2))


def test_target_head_forms():
    source = torch.randn(3, 5)
    for activation, low, high in (("sigmoid", 0, 4), ("tanh", -4, 4)):
        v = TargetHead(5, 2, activation=activation)(1e3 * source)
        assert low <= v.min() and v.max() <= high
    head = TargetHead(5, 2, activation="none")
    torch.testing.assert_close(head(source), head.linear(source))


@pytest.mark.parametrize("n", [1, 4])
def test_module_compiles_as_one_graph(n):
    layer = built(n, torch.float32)
    x, h, context, x_in = tensors(n, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h, context, x_in), layer(x, h, context, x_in))
