import pytest
import torch

from papers10.deep_delta_learning.vision import AXES, DeltaConvBlock, DeltaResNet, DownsampleBlock, ResidualMLP


def features(seed=0, shape=(2, 6, 5, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("rule", ["delta", "write", "add"])
def test_block_follows_its_equation(axis, rule):
    torch.manual_seed(0)
    block = DeltaConvBlock(6, axis=axis, rule=rule).double()
    x = features()
    context = block.norm(x)
    h = block.second(torch.nn.functional.gelu(block.middle(block.first(context))))
    if rule == "add":
        torch.testing.assert_close(block(x), x + h)
        return
    beta = 2 * torch.sigmoid(context.mean((2, 3)) @ block.gate.output.weight[0] + block.gate.output.bias)
    target = 4 * torch.sigmoid(torch.einsum("bchw,c->bhw", x, block.target.linear.weight[0]) + block.target.linear.bias)
    k = h if axis == "channel" else h.mean((2, 3), keepdim=True)
    unit = k / (k.square().sum(1, keepdim=True) + 1e-10).sqrt()
    reading = (unit * x).sum(1, keepdim=True) if rule == "delta" else 0.0
    expected = x + beta[:, None, None, None] * unit * (target[:, None] - reading)
    torch.testing.assert_close(block(x), expected, atol=1e-11, rtol=1e-11)


def test_map_reading_is_one_rank_one_edit_and_channel_reading_is_local():
    torch.manual_seed(0)
    x = features()
    change = (DeltaConvBlock(6, axis="map").double()(x) - x).flatten(2)
    assert (torch.linalg.matrix_rank(change.detach(), rtol=1e-9) == 1).all()
    change = (DeltaConvBlock(6, axis="channel").double()(x) - x).flatten(2)
    assert (torch.linalg.matrix_rank(change.detach(), rtol=1e-9) > 1).all()


@pytest.mark.parametrize("axis", AXES)
def test_network_trains_a_step_on_odd_sizes(axis):
    torch.manual_seed(0)
    model = DeltaResNet(3, 5, widths=(4, 8), blocks=1, axis=axis)
    images = torch.randn(2, 3, 9, 7)
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 4]))
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
    assert DownsampleBlock(4, 8)(torch.randn(2, 4, 9, 7)).shape == (2, 8, 5, 4)


@pytest.mark.parametrize(
    ("n", "rule"),
    [(1, "add"), (1, "delta"), (1, "write"), (4, "add"), (4, "delta"), (4, "write"), (4, "hc"), (1, "hc")],
)
def test_residual_mlp_variants(n, rule):
    torch.manual_seed(0)
    model = ResidualMLP(16, 3, width=8, hidden=8, num_layers=3, n=n, rule=rule)
    x = torch.randn(5, 16)
    assert model(x).shape == (5, 3)
    states = model.states(x)
    assert len(states) == 4 and states[0].shape[1] == 8
    model(x).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "residual" in name)


def test_parameter_counts_of_the_digits_experiment():
    def count(**options):
        return sum(p.numel() for p in ResidualMLP(**options).parameters())

    assert count(rule="add") == 103_114 and count(rule="delta") == 104_674 == count(rule="write")
    assert count(rule="delta", n=4) == count(rule="write", n=4)


def test_fixed_zero_gate_makes_the_network_shallow():
    torch.manual_seed(0)
    model = ResidualMLP(16, 3, width=8, hidden=8, num_layers=3, gate="fixed", beta_init=0.0)
    states = model.states(torch.randn(5, 16))
    assert torch.equal(states[0], states[-1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DeltaConvBlock(4, axis="maps"), "axis.*map"),
        (lambda: DeltaConvBlock(4, rule="deltas"), "rule.*delta"),
        (lambda: DeltaConvBlock(4)(torch.ones(2, 5, 3, 3)), "x: expected shape"),
        (lambda: DeltaResNet(widths=()), "widths"),
        (lambda: DeltaResNet(3)(torch.ones(2, 1, 8, 8)), "images: expected shape"),
        (lambda: ResidualMLP(rule="hc", gate="hard"), "hc.*gate"),
        (lambda: ResidualMLP(64)(torch.ones(2, 63)), "x: expected shape"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
