"""Continual learning: loaders that fail early, arms that differ only in what they claim, known equalities."""

import itertools
import json

import pytest
import torch

from papers10.core.data import DataMissing, available
from papers10.nested_learning import continual


@pytest.fixture
def clinc_folder(tmp_path):
    folder = tmp_path / "clinc150"
    folder.mkdir()
    rows = [["move money", "transfer"], ["see my balance", "balance"], ["set an alarm", "alarm"]]
    data = {"train": rows * 2, "test": rows, "oos_train": [["what", "oos"]]}
    (folder / "data_small.json").write_text(json.dumps(data))
    (folder / "domains.json").write_text(json.dumps({"banking": ["transfer", "balance"], "home": ["alarm"]}))
    return folder


def test_clinc_loader(clinc_folder, monkeypatch):
    data = continual.clinc150(clinc_folder)
    assert data.names == ["transfer", "balance", "alarm"] and data.groups == [[0, 1], [2]]
    assert data.train_labels == [0, 1, 2, 0, 1, 2] and data.test_texts[2] == "set an alarm"
    monkeypatch.setenv("PAPERS10_DATA", str(clinc_folder.parent))
    assert continual.clinc150() == data


def test_banking_loader(tmp_path):
    (tmp_path / "categories.json").write_text(json.dumps([f"c{i}" for i in range(77)]))
    (tmp_path / "train.csv").write_text('text,category\n"one, two",c3\nthree,c76\n')
    (tmp_path / "test.csv").write_text("text,category\nfour,c0\n")
    data = continual.banking77(tmp_path)
    assert data.train_texts == ["one, two", "three"] and data.train_labels == [3, 76] and data.test_labels == [0]
    assert len(data.groups) == 7 and sorted(itertools.chain.from_iterable(data.groups)) == list(range(77))
    (tmp_path / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.csv"):
        continual.banking77(tmp_path)


def test_dbpedia_loader(tmp_path, monkeypatch):
    lines = "text,l1,l2,l3\n" + "".join(f"t{i},L{i % 2},C{i % 4},x\n" for i in range(20))
    for name in ("DBPEDIA_train.csv", "test.csv"):
        (tmp_path / name).write_text(lines)
    data = continual.dbpedia70(tmp_path, train_size=12, test_size=5)
    assert len(data.train_texts) == 12 and len(data.test_texts) == 5 and data.names == ["C0", "C1", "C2", "C3"]
    assert data.groups == [[0, 2], [1, 3]] and data == continual.dbpedia70(tmp_path, train_size=12, test_size=5)
    (tmp_path / "test.csv").write_text("text,label\na,b\n")
    with pytest.raises(ValueError, match="test: expected rows with the columns text, l1, l2"):
        continual.dbpedia70(tmp_path)
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match=r"DeveloperOats/DBPedia_Classes: PAPERS10_OFFLINE.*path="):
        continual.dbpedia70()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        continual.dbpedia70(tmp_path / "absent")


@pytest.mark.parametrize("name, sizes", [("clinc150", (7500, 4500, 150, 10)), ("banking77", (10003, 3080, 77, 7))])
def test_real_data(name, sizes):
    if not available(name):
        pytest.skip(f"{name} is not on this machine")
    data = getattr(continual, name)()
    assert (len(data.train_texts), len(data.test_texts), len(data.names), len(data.groups)) == sizes
    assert sorted(itertools.chain.from_iterable(data.groups)) == list(range(sizes[2]))


def test_text_features_are_fitted_on_the_training_texts():
    texts = [f"word{i} word{i + 1} common" for i in range(40)]
    train, test = continual.text_features(texts, texts[:3], dims=8)
    assert train.shape == (40, 8) and torch.allclose(train[:3], test, atol=1e-4)
    assert torch.allclose(train.norm(dim=1), torch.full((40,), 8**0.5), atol=1e-4)


OPTIONS = dict(data="digits", epochs=1, base_epochs=1, lr=0.3)


@pytest.mark.parametrize("arm", continual.INCREMENTAL_ARMS)
def test_incremental_is_reproducible(arm):
    before = torch.get_rng_state()
    first = continual.run_class_incremental(arm, 3, **OPTIONS)
    again = continual.run_class_incremental(arm, 3, **OPTIONS)
    assert first == again and len(first["curve"]) == 4
    assert first["forgetting"] == pytest.approx(first["base_before"] - first["base_after"])
    assert all(0 <= first[name] <= 1 for name in ("base_before", "base_after", "new", "all"))
    torch.set_rng_state(before)


def test_arms_differ_only_in_their_periods():
    blocks = continual.run_class_incremental("blocks", 0, **OPTIONS)
    same = continual.run_class_incremental("cms-sum", 0, periods=(1, 1, 1), **OPTIONS)
    other = continual.run_class_incremental("cms-sum", 0, **OPTIONS)
    assert blocks == same and other["parameters"] == blocks["parameters"] and other["curve"] != blocks["curve"]
    # 512 against 3 × 171 = 513 inner units, and two norms more
    single = continual.run_class_incremental("single", 0, **OPTIONS)
    assert abs(single["parameters"] / blocks["parameters"] - 1) < 0.02
    plain = continual.run_class_incremental("ewc", 0, penalty=0.0, **OPTIONS)
    assert plain["curve"] == single["curve"]


def test_class_means_do_not_depend_on_the_order_of_classes():
    result = continual.run_class_incremental("class-means", 0, data="digits")
    assert result["all"] > 0.85 and result["new"] > 0.85


def test_without_a_moving_start_nested_is_reset():
    few = dict(contexts=4, last=4)
    reset = continual.run_context_stream("reset", 1, **few)
    assert reset == continual.run_context_stream("nested-rho0", 1, **few)
    assert reset != continual.run_context_stream("nested", 1, **few)
    assert reset["distance"][19] == 0 and reset["distance"][18] > 0


def test_a_start_that_follows_helps():
    single, nested = (continual.run_context_stream(arm, 0, contexts=40, last=10) for arm in ("single", "nested"))
    assert nested["prequential"] > single["prequential"] + 0.2 and nested["few_shot"] > single["few_shot"]
    assert single["parameters"] == nested["parameters"] == 64 * 64 * 2 + 64 * 10 + 138
    assert len(nested["by_step"]) == 20 and len(nested["by_context"]) == 40


def test_first_context_is_ordinary_training():
    """Until the first context ends, single and reset with one rate are the same network."""
    single = continual.run_context_stream("single", 2, contexts=1, last=1, lr=0.3)
    reset = continual.run_context_stream("reset", 2, contexts=1, last=1, lr=0.3)
    assert single["by_step"] == reset["by_step"] and single["distance"][:19] == reset["distance"][:19]
    assert single["distance"][19] > 0 == reset["distance"][19]


def test_knowledge_runs_and_frozen_learns_nothing():
    few = dict(passes=2, steps=3, skill_size=2)
    frozen, written = (continual.run_knowledge(arm, 0, **few) for arm in ("frozen", "cms"))
    assert frozen["distance"] == [0.0] and len(written["distance"]) == 3 and written["distance"][0] > 0
    assert written == continual.run_knowledge("cms", 0, **few)
    assert len(written["losses"]) == 4 and all(
        0 <= written[name] <= 1 for name in ("recall", "kept", "second", "skill")
    )
    # the model that the arms share is not changed by them
    assert not hasattr(continual.recall_model(0, 3), "continuum")
    assert frozen["loss_first"] == pytest.approx(written["loss_first"], abs=0.3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: continual.run_class_incremental("cms", 0), "arm"),
        (lambda: continual.run_class_incremental("single", 0, data="mnist"), "data"),
        (lambda: continual.run_context_stream("nest", 0), "did you mean 'nested'"),
        (lambda: continual.run_context_stream("nested", 0, contexts=0), "contexts"),
        (lambda: continual.run_knowledge("rag", 0), "arm"),
        (lambda: continual.run_knowledge("cms", 0, passes=0), "passes"),
        (lambda: continual.dbpedia70(train_size=0), "train_size"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
