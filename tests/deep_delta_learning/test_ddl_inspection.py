import math

import pytest
import torch

from papers10.deep_delta_learning.inspection import (
    discrepancy_audit,
    gate_report,
    recording,
    regime_shares,
    shortcut_product,
    sublayer_name,
)
from papers10.deep_delta_learning.model import VARIANTS, DDLCausalLM, variant
from papers10.deep_delta_learning.vision import DeltaResNet, ResidualMLP

SIZE = dict(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2)


def ids():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_report_has_one_record_a_sublayer(name):
    report = gate_report(DDLCausalLM(variant(name, **SIZE), seed=0), ids())
    assert [record["name"] for record in report] == [
        "block 0, attention",
        "block 0, mlp",
        "block 1, attention",
        "block 1, mlp",
    ]
    for record in report:
        assert record["state_norm"] > 0
        if VARIANTS[name]["rule"] in ("add", "hc"):
            assert record["beta_mean"] is None and record["error_pre"] is None
        else:
            assert 0 <= record["beta_low"] <= record["beta_median"] <= record["beta_high"] <= 2
            assert record["skip"] + record["overwrite"] + record["reflect"] == pytest.approx(1)
        if VARIANTS[name]["rule"] == "delta":
            assert record["law_error"] < 1e-4


def test_model_is_left_as_it_was():
    model = DDLCausalLM(variant("ddl", **SIZE), seed=0).train()
    gate_report(model, ids())
    assert model.training and all(m.recorder is None for m in model.modules() if hasattr(m, "recorder"))
    with pytest.raises(RuntimeError), recording(model):
        raise RuntimeError("stop")
    assert all(m.recorder is None for m in model.modules() if hasattr(m, "recorder"))


def test_product_of_shortcuts_has_the_determinant_of_the_gates():
    model = DDLCausalLM(variant("ddl-cc", **SIZE), seed=0)
    product = shortcut_product(model, ids(), (1, 4))
    gates = torch.stack([entry["beta"][1, 4] for entry in discrepancy_audit(model, ids())]).double()
    torch.testing.assert_close(torch.linalg.det(product), (1 - gates).prod(), atol=1e-6, rtol=0)
    values = torch.linalg.svdvals(product)
    assert values.max() <= 1 + 1e-12 and (values > 1 - 1e-9).sum() >= 16 - 4


def test_other_networks_report_too():
    assert len(gate_report(ResidualMLP(8, 3, width=8, hidden=8, num_layers=3), torch.randn(5, 8))) == 3
    for axis in ("channel", "map"):
        report = gate_report(DeltaResNet(1, widths=(4, 6), blocks=1, axis=axis), torch.randn(2, 1, 8, 8))
        assert len(report) == 2 and all(record["law_error"] < 1e-3 for record in report)


def test_shares_and_names():
    assert regime_shares(torch.tensor([[0.0, 0.49], [1.6, 2.0]])) == {"skip": 0.5, "overwrite": 0.0, "reflect": 0.5}
    assert all(math.isnan(value) for value in regime_shares(torch.empty(0)).values())
    assert sublayer_name("model.residual.delta.0") == "block 0, attention" and sublayer_name("layers.3") == "layers.3"


def test_models_without_delta_are_refused():
    with pytest.raises(ValueError, match="model: expected a model with delta residuals, got Linear"):
        gate_report(torch.nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="rule='delta'"):
        shortcut_product(ResidualMLP(8, 3, width=8, hidden=8, num_layers=1, rule="add"), torch.ones(2, 8), (0,))
