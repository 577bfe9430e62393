"""Pretrained models: a folder, the packaged SmolLM2, and every reason for which a hub id may fail."""

import pytest
import torch

from papers10.core.data import DataMissing, LicenceNotAccepted, available
from papers10.lm import pretrained

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=3, **sizes)).save_pretrained(tmp_path)
    return tmp_path


def test_folder(folder):
    model, tokenizer, name = pretrained.load_causal(folder, dtype=torch.float64)
    assert name == str(folder) and model.dtype == torch.float64 and not model.training
    assert tokenizer("a").input_ids == [1]
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 3)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.load_causal(folder)
    with pytest.raises(FileNotFoundError, match="existing folder or a hub id"):
        pretrained.load_causal(folder / "absent")


def test_hub_reasons(monkeypatch):
    from huggingface_hub import errors
    from requests import Response

    response = Response()
    response.status_code = 404
    monkeypatch.delenv("PAPERS10_OFFLINE", raising=False)
    for error, kind, words in (
        (errors.GatedRepoError("x", response=response), LicenceNotAccepted, "o/m: gated; accept its terms"),
        (errors.RevisionNotFoundError("x", response=response), DataMissing, "o/m: no revision 'main'"),
        (errors.RepositoryNotFoundError("x", response=response), DataMissing, "o/m: missing"),
        (errors.LocalEntryNotFoundError("x"), DataMissing, "o/m: no network"),
        (ConnectionError("no route"), DataMissing, "o/m: could not be read from the hub .*no route"),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", fails)
        with pytest.raises(kind, match=words) as caught:
            pretrained.load_causal("o/m")
        assert "folder of a local copy" in str(caught.value)


def test_offline_needs_the_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataMissing, match="PAPERS10_OFFLINE is set"):
        pretrained.load_causal("no-such-owner/no-such-model")


def test_bad_dtype():
    with pytest.raises(TypeError, match="dtype"):
        pretrained.smollm2(torch.int64)
    with pytest.raises(TypeError, match="dtype"):
        pretrained.load_causal("smollm2", dtype="float32")


def test_smollm2_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(
        pretrained, "locate", lambda name: (_ for _ in ()).throw(DataMissing(f"{name}: papers10 data get"))
    )
    with pytest.raises(DataMissing, match="data get"):
        pretrained.load_causal("smollm2")


def test_smollm2_answers():
    if not available("smollm2"):
        pytest.skip("SmolLM2 is not on this machine: papers10 data get smollm2")
    from papers10.core.settings import settings

    if not list((settings().home / "models").glob("smollm2-*")):
        pytest.importorskip("gguf")
    model, tokenizer, name = pretrained.smollm2(torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and name == "SmolLM2-135M-Instruct"
    assert tokenizer.chat_template and all(p.requires_grad for p in model.parameters())
