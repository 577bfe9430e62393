"""Frames that look at the frame before."""

import pytest
import torch

from papers10.flow.blocks import DiTBlock
from papers10.flow.cache import StepKV
from papers10.morphany3d.memory import run_frames


@pytest.fixture
def block():
    made = DiTBlock(16, 2, qk_norm=True).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def inputs(count):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 6, 16, generator=generator, dtype=torch.float64), torch.ones(1, 16, dtype=torch.float64)) for _ in range(count)]


def test_in_one_block_only_the_frame_before_counts(block):
    given = inputs(4)
    changed = [given[0], inputs(5)[4], *given[2:]]
    one, two = (run_frames(block, each, 0.2) for each in (given, changed))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[2], two[2]) and torch.equal(one[3], two[3])


def test_without_weight_nothing_is_kept(block):
    cache = StepKV()
    given = inputs(2)
    made = run_frames(block, given, 0.0, cache=cache)
    assert len(cache) == 0 and all(torch.equal(out, block(*each)) for out, each in zip(made, given))


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_weights_are_checked(block, beta):
    with pytest.raises(ValueError, match="beta"):
        run_frames(block, inputs(1), beta)
