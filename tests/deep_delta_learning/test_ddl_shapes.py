"""The shapes in the annotations are the shapes that come and go."""

import pytest
import torch

pytest.importorskip("beartype", reason="development extra: pip install 'papers10[dev]'")

from beartype import beartype
from jaxtyping import jaxtyped

from papers10.deep_delta_learning import expanded, operator, residual, vision


def checked(function):
    return jaxtyped(typechecker=beartype)(function)


def test_operator():
    k, x = torch.randn(2, 3, 5), torch.randn(2, 3, 5, 4)
    checked(operator.unit_direction)(k)
    checked(operator.delta_operator)(k, 1.5)
    checked(operator.delta_spectrum)(k, torch.ones(2, 3))
    checked(operator.apply_operator)(x, k, 1.0)
    checked(operator.apply_inverse)(x, k, 0.5)
    checked(operator.rotation_from_reflections)(0.3)
    checked(residual.write_update)(x, k, torch.randn(2, 3, 4), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (residual.DeltaGate(5), (torch.randn(2, 3, 5),)),
        (residual.TargetHead(5, 2), (torch.randn(2, 3, 5),)),
        (residual.DirectionHead(5), (torch.randn(2, 3, 5),)),
        (residual.DeltaResidual(5, 4), (torch.randn(2, 3, 5, 4), *torch.randn(3, 2, 3, 5))),
        (expanded.EmbedExpand(5, 4), (torch.randn(2, 3, 5),)),
        (expanded.ChannelCompressor(5, 4), (torch.randn(2, 3, 5, 4),)),
        (expanded.TokenCompressor(5, 4), (torch.randn(2, 3, 5, 4),)),
        (vision.DeltaConvBlock(4, axis="map"), (torch.randn(2, 4, 3, 3),)),
        (vision.DeltaResNet(3, widths=(4,)), (torch.randn(2, 3, 8, 8),)),
        (vision.ResidualMLP(8, 3, num_layers=1), (torch.randn(2, 8),)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_forward(module, inputs):
    checked(type(module).forward)(module, *inputs)
