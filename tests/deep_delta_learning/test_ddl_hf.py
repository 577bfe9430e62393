import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra lm: pip install 'papers10[lm]'")

from papers10.core.config import ConfigError, to_mapping
from papers10.deep_delta_learning import DDLForCausalLM, DDLHFConfig
from papers10.deep_delta_learning.model import VARIANTS, variant

SIZE = dict(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2)


def ids(batch=2, time=4):
    return torch.randint(0, 40, (batch, time), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_saves_loads_and_generates(name, tmp_path):
    model = DDLForCausalLM(DDLHFConfig(**to_mapping(variant(name, **SIZE)))).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = DDLForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
        expected = ids()
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        got = again.generate(ids(), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)


def test_auto_classes_and_released_names(tmp_path):
    from transformers import AutoModelForCausalLM

    config = DDLHFConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ddl_value_channels=2,
        ddl_beta_init=0.5,
        ddl_v_sigmoid=False,
    )
    assert config.core() == variant("ddl", **SIZE, d_v=2, beta_init=0.5, v_activation="none")
    DDLForCausalLM(config).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DDLForCausalLM
    with pytest.raises(ConfigError, match="ddl_beta_inti"):
        DDLHFConfig(**SIZE, ddl_beta_inti=1.0)


def test_labels_are_shifted_inside():
    model = DDLForCausalLM(DDLHFConfig(**to_mapping(variant("ddl", **SIZE)))).eval()
    out = model(ids(), labels=ids())
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 40), ids()[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
