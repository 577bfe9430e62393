"""The full-scale training on miniatures in the true file formats: models, optimizers, processes, resume, evaluation sets, refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "miniatures"))
import nested
import training

from papers10.core import checkpoint
from papers10.core.config import ConfigError, from_mapping, replace
from papers10.core.data import DataMissing
from papers10.core.optional import MissingExtra
from papers10.kernels.common import BackendUnavailable
from papers10.lm import pretraining
from papers10.lm.tokenizers import ByteTokenizer
from papers10.nested_learning import full_scale
from papers10.nested_learning.full_scale import FullScale, Question

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    mix = [{"dataset": str(nested.pg19_rows(folder / "books")), "share": 0.2}]
    memory = dict(arch="hope", size="mini", global_batch=4, chunk_size=(16, 4), cms_chunk_sizes=(8, 32))
    return training.text_settings(FullScale, folder, **memory, mix=mix, val_tokens=640)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    return full_scale.launch(text, tmp_path_factory.mktemp("whole"))


def test_it_learns_and_logs_its_memories(whole):
    assert whole["steps"] == 8 and whole["val_loss"] < whole["curve"][0][1] < 5.9
    assert len(whole["memories"]) == 2
    assert {"eta", "alpha", "factor_low", "moved", "level1_writes", "level2_moved"} <= set(whole["memories"][0])
    assert whole["memories"][0]["level1_writes"] == 4 and whole["memories"][0]["level2_writes"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"carry_windows": 3, "tbptt_chunks": 1, "optimizer": "m3", "slow_every": 2},
        {"arch": "titans", "carry_windows": 0},
        {"optimizer": "muon", "cms_error": "schedule"},
    ],
    ids=lambda change: "-".join(map(str, change.values())) or "plain",
)
def test_a_stopped_training_goes_on_to_the_same_numbers(text, whole, tmp_path, change):
    # three steps are no multiple of any period, so that every memory is stopped in the middle of one
    settings = replace(text, **change, steps=6, save_every=3, eval_every=3) if change else text
    uninterrupted = full_scale.launch(settings, tmp_path / "whole") if change else whole
    training.stop_at_first_checkpoint(full_scale.launch, settings, tmp_path / "stopped")
    again = full_scale.launch(settings, tmp_path / "stopped")
    for key in ("val_loss", "curve", "memories"):
        assert again[key] == uninterrupted[key], key


def test_two_processes_train_as_one(text, whole, tmp_path):
    pytest.importorskip("accelerate")
    pair = full_scale.launch(replace(text, devices=2, strategy="ddp"), tmp_path)
    # float32 sums in another order: gradients agree to 1e-6, eight updates of AdamW keep that below 1e-3
    assert abs(pair["val_loss"] - whole["val_loss"]) < 1e-3
    assert len((tmp_path / "logs" / "train.jsonl").read_text().splitlines()) == 2, "only rank 0 writes"


@pytest.mark.parametrize("arch", ["hope_attention", "titans", "deltanet", "transformer", "table6_no_cms"])
def test_baselines_have_as_many_parameters_and_train(text, whole, tmp_path, arch):
    result = full_scale.launch(replace(text, arch=arch, steps=2, warmup=1, save_every=0), tmp_path)
    assert abs(result["parameters"] / whole["parameters"] - 1) < 0.03 and result["steps"] == 2


def test_full_sizes_are_those_of_the_paper():
    for size, millions in (("760M", 729), ("1.3B", 1274)):
        config = full_scale.model_config(full_scale.paper_settings(size), 32_000)
        count = config.num_layers * full_scale._block_parameters(config) + 31_999 * config.hidden_size
        assert abs(count / 1e6 - millions) < 2
        tokens = full_scale.paper_settings(size)
        tokens = tokens.steps * tokens.global_batch * tokens.seq_len
        assert abs(tokens / full_scale.PAPER_TOKENS[size] - 1) < 1e-4


def test_recomputed_sublayers_give_the_same_numbers(text, whole, tmp_path):
    assert text.recompute
    kept = full_scale.launch(replace(text, recompute=False), tmp_path)
    assert kept["val_loss"] == whole["val_loss"] and kept["curve"] == whole["curve"]


def test_levels_that_an_optimizer_steps_have_their_periods(text):
    settings = replace(text, cms_error="schedule")
    model = full_scale.build_text_model(settings, 320)
    optimizer = full_scale.build_optimizer(model, settings)
    assert {name: period for name, (_, period) in optimizer.levels.items()} == {"level1": 1, "level2": 4}
    slow = optimizer.levels["level2"][0][0]
    before = slow.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        model(torch.arange(32)[None], labels=torch.arange(32)[None]).loss.backward()
        optimizer.step()
        assert torch.equal(slow, before) == (step < 3)


@pytest.mark.parametrize("name", full_scale.OPTIMIZERS)
def test_every_parameter_has_one_group_and_norms_do_not_decay(text, name):
    model = full_scale.build_text_model(text, 320)
    optimizer = full_scale.build_optimizer(model, replace(text, optimizer=name))
    groups = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for _, p in groups}) == len(groups) == len(list(model.parameters()))
    norms = {id(model.final_norm.weight), id(model.blocks[0].mixer.eta_bias)}
    assert all(group["weight_decay"] == 0 for group, p in groups if id(p) in norms)
    apart = {
        id(p) for key, p in model.named_parameters() if "memories" in key or "embed" in key or key.endswith("conv")
    }
    hidden = {
        id(p)
        for group, p in groups
        if group.get("name") == "hidden" or "ns_steps" in group and group.get("rule") != "adamw"
    }
    assert not apart & hidden and (name == "adamw" or hidden)


def test_benchmarks_run_on_a_local_task(text, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    settings = replace(text, save_every=0, **training.local_benchmark(tmp_path, monkeypatch))
    result = full_scale.launch(settings, tmp_path / "run")
    assert set(result["tasks"]) == {"0shot"} and 0 <= result["tasks"]["0shot"]["tiny_choice"] <= 100


@pytest.mark.parametrize("optimizer", ["m3", "muon"])
def test_images_with_the_optimizers_of_the_paper(tmp_path, optimizer):
    pytest.importorskip("transformers")
    rates = dict(size="mini", steps=20, fallback_lr=1e-2)
    settings = training.image_settings(
        FullScale, tmp_path / "rows", task="images", mix=[], optimizer=optimizer, **rates
    )
    result = full_scale.launch(settings, tmp_path / "run")
    assert result["accuracy"] > 0.5 and result["steps"] == 20
    assert "imagenet21k" in full_scale.requirements(full_scale.paper_settings("86M", optimizer=optimizer))


@pytest.mark.parametrize("split", ["layers", "neurons"])
def test_levels_of_a_pretrained_model(text, tmp_path, split):
    pytest.importorskip("transformers")
    model = nested.llama(tmp_path / "llama")
    settings = replace(
        text,
        task="levels",
        base_model=str(model),
        tokenizer=str(model),
        split=split,
        steps=2,
        warmup=0,
        save_every=0,
        questions=["longhealth"],
        paths={"longhealth": str(nested.longhealth(tmp_path / "sets"))},
    )
    result = full_scale.launch(settings, tmp_path / "run")
    assert result["steps"] == 2 and 0 <= result["questions"]["longhealth"]["average"] <= 100
    assert "memories" not in result


# -- evaluation sets


@pytest.fixture(scope="module")
def sets(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    paths = {name: nested.recall(folder, name) for name in full_scale.RECALL_SETS}
    for name in ("babilong", "longhealth", "qasper", "ctnl"):
        paths[name] = getattr(nested, name)(folder / name)
    return replace(text, paths={name: str(path) for name, path in paths.items()}, lengths=[100], question_limit=2)


def test_each_set_is_read_into_one_form(sets):
    counts = {}
    for name in sets.paths:
        found = full_scale.load_questions(name, sets)
        counts[name] = len(found)
        assert all(isinstance(q, Question) and q.answers and (q.context or q.question) for q in found)
    assert counts["babilong"] == 10 and counts["longhealth"] == 2 and counts["ctnl"] == 2
    health = full_scale.load_questions("longhealth", sets)
    assert [q.answers for q in health] == [(" C",), (" A",)] and "drug c." in health[0].context
    drop = full_scale.load_questions("drop", sets)[0]
    assert drop.context == "The cat sees the moon." and drop.answers == ("the cat", "a cat")
    paper = full_scale.load_questions("qasper", replace(sets, question_limit=10))
    assert [q.answers[0] for q in paper] == ["seven stones, a letter", "the moon", "No", "Yes", "Unanswerable"]
    tongues = full_scale.load_questions("ctnl", sets)
    assert {q.group for q in tongues} == {"kalamang", "manchu"} and "ka: cat" in tongues[0].context


def test_needles_have_the_length_that_was_asked_for(text):
    found = full_scale.load_questions("needle", replace(text, tokenizer="bytes", lengths=[2000]), limit=1)
    assert {q.group for q in found} == {f"{kind}_2000" for kind in full_scale.NEEDLES}
    assert all(1500 < len(ByteTokenizer().encode(q.context)) < 2600 for q in found)
    assert all(answer in q.context for q in found for answer in q.answers)


def test_intents_are_asked_over_all_classes(text):
    found = full_scale.load_questions("clinc150", text, limit=3)
    assert len(found) == 3 and all(len(q.choices) == 150 and q.answers[0] in q.choices for q in found)
    assert found[0].context.count(" => ") == 150 and found[0].group.startswith("task")


class Echo(torch.nn.Module):
    """A model that predicts, after each token, the token that followed its last occurrence."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, **_):
        logits = torch.zeros(*ids.shape, 256)
        for row in range(ids.shape[0]):
            seen = {}
            for t, token in enumerate(ids[row].tolist()):
                if t:
                    seen[ids[row, t - 1].item()] = token
                logits[row, t, seen.get(token, 0)] = 10.0
        return type("Output", (), {"logits": logits})()


def test_choices_are_compared_by_their_likelihood():
    question = Question("qA qA", "q", ("A",), ("B", "A"), "g")
    scores = full_scale.ask(Echo(), ByteTokenizer(), [question], "choice")
    assert scores == {"g": 100.0, "average": 100.0}


def test_questions_become_documents_to_train_on(sets, whole, text, tmp_path):
    questions = full_scale.load_questions("babilong", sets)
    file = full_scale.write_documents(questions * 3, tmp_path / "documents" / "train.jsonl")
    first = json.loads(file.read_text().splitlines()[0])["text"]
    assert first.startswith("Mary went") and first.endswith("Answer: garden")
    before = full_scale.launch(replace(text, steps=2, warmup=0, save_every=2), tmp_path / "before")
    tuned = replace(text, dataset=str(file.parent), mix=[], val_tokens=64, steps=1, warmup=0, save_every=0, lr=1e-9)
    tuned = replace(tuned, weights_from=str(tmp_path / "before" / "checkpoints" / "train"))
    model = full_scale.build_text_model(tuned, 320)
    pretraining.load_weights(model, tuned)
    kept = checkpoint.load_tensors(checkpoint.latest(tuned.weights_from) / "model.safetensors")
    assert torch.equal(model.blocks[1].mixer.in_proj.weight, kept["blocks.1.mixer.in_proj.weight"])
    assert full_scale.launch(tuned, tmp_path / "tuned")["parameters"] == before["parameters"]
    with pytest.raises(FileNotFoundError, match="weights_from: expected a checkpoint"):
        pretraining.load_weights(model, replace(tuned, weights_from=str(tmp_path / "nothing")))


@pytest.mark.parametrize("name", ["babilong", "qasper", *full_scale.RECALL_SETS])
def test_a_set_on_the_hub_is_missed_before_any_training(text, monkeypatch, tmp_path, name):
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    id = full_scale.EVALUATIONS[name].place
    with pytest.raises(DataMissing, match=rf"{id}: PAPERS10_OFFLINE is set; .*paths=\{{'{name}'"):
        full_scale.launch(replace(text, questions=[name]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["longhealth", "ctnl"])
def test_a_set_of_the_user_is_asked_for(text, monkeypatch, tmp_path, name):
    monkeypatch.setenv("PAPERS10_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match=rf"{name}: not on this machine .*PAPERS10_DATA/{name}"):
        full_scale.load_questions(name, text)
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"paths\['{name}'\]"):
        full_scale.load_questions(name, text)


def test_other_columns_are_refused(text, tmp_path):
    (tmp_path / "validation.jsonl").write_text(json.dumps({"passage": "x"}) + "\n")
    with pytest.raises(ValueError, match="expected rows with the columns context, question, answers, got passage"):
        full_scale.load_questions("drop", replace(text, paths={"drop": str(tmp_path)}))
    with pytest.raises(FileNotFoundError, match=r"paths\['drop'\]: expected an existing"):
        full_scale.load_questions("drop", replace(text, paths={"drop": str(tmp_path / "absent")}))


# -- settings


def test_refusals_before_anything_starts(text, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="global_batch: expected a multiple"):
        full_scale.check(replace(text, global_batch=7))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="8 GPU"):
            full_scale.check(full_scale.paper_settings(eval_tasks=[]))
    monkeypatch.setenv("PAPERS10_OFFLINE", "1")
    with pytest.raises(DataMissing, match="dataset: emozilla/pg19 is on the hub"):
        full_scale.check(replace(text, mix=[{"dataset": "emozilla/pg19", "share": 0.2}]))
    with pytest.raises(DataMissing, match="meta-llama/Llama-3.2-3B: PAPERS10_OFFLINE"):
        full_scale.check(replace(text, task="levels"))
    real = pretraining.need
    monkeypatch.setattr(pretraining, "need", lambda module, extra, *_: real("no_such_package_here", extra))
    with pytest.raises(MissingExtra, match="papers10"):
        full_scale.check(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "hop"}, "did you mean 'hope'"),
        ({"size": "24M"}, "expected one of 'mini', 'tiny'"),
        ({"carry_windows": 0}, "at least 1 for hope"),
        ({"carry_windows": 4, "arch": "transformer"}, "1 for transformer"),
        ({"questions": ["babylon"]}, "did you mean 'babilong'"),
        ({"paths": {"needles": "x"}}, "names of evaluation sets"),
        ({"stepz": 3}, "did you mean 'steps'"),
    ],
)
def test_wrong_settings_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(FullScale, change)


def test_unknown_options_of_the_model_are_refused(text):
    with pytest.raises(ConfigError, match="cms_hidden_mlt"):
        full_scale.check(replace(text, options={"cms_hidden_mlt": 2.0}))


def test_settings_survive_their_file(text):
    again = from_mapping(FullScale, json.loads(text.model_dump_json()))
    assert again == text


def test_parameters_of_a_run_become_settings():
    given = {
        "arch": "titans",
        "seq_len": 128,
        "archs": ["hope"],
        "preset": "paper",
        "device": "auto",
        "chunk_size": [32, 8],
    }
    settings = full_scale.from_parameters(given, device="cpu")
    assert (settings.arch, settings.seq_len, settings.device, settings.chunk_size) == ("titans", 128, "cpu", (32, 8))
    assert full_scale.with_arch(settings, "hope", 3).seed == 3 and len(settings.mix) == 1
    assert full_scale.from_parameters({**given, "dataset": "pydoc"}, device="cpu").mix == []


def test_presets_of_the_chapter_are_settings(tmp_path):
    from papers10.core import presets

    chapter = presets.load("nested-learning")
    for preset in ("smoke", "small", "paper"):
        full_scale.from_parameters(chapter.values(preset), device="cpu")
    paper = full_scale.from_parameters(chapter.values("paper"), device="cuda")
    assert paper == full_scale.paper_settings(), "the preset is the training that the page announces, needles included"
    smoke = full_scale.from_parameters(
        {**chapter.values("smoke"), "steps": 2, "warmup": 1, "val_tokens": 128}, device="cpu"
    )
    assert full_scale.launch(smoke, tmp_path)["steps"] == 2


def test_requirements_name_memory_hours_licences_and_gates():
    said = full_scale.requirements(full_scale.paper_settings("1.3B", questions=["babilong"]))
    assert (
        "GB per GPU" in said
        and " h at 30 %" in said
        and "ODC-By" in said
        and "gated" in said
        and "lm,dist,eval" in said
    )
    assert "RMT-team/babilong" in said
    assert full_scale.memory_gb(full_scale.paper_settings("1.3B")) < 80
    assert "questions: needle" in full_scale.requirements(full_scale.paper_settings())
    images = replace(full_scale.paper_settings("86M"), questions=["needle"])
    assert "questions" not in full_scale.requirements(images), "an image model is asked nothing"
    levels = full_scale.requirements(full_scale.paper_settings(task="levels"))
    assert "Llama 3.2 licence, gated" in levels and "Qwen/Qwen2.5-0.5B" in levels


def test_numbers_go_into_a_run(text, whole):
    class Run:
        def __init__(self):
            self.values, self.tables = {}, []

        def metric(self, name, value, **_):
            self.values[name] = value

        def table(self, name, records):
            self.tables.append(name)

    run = Run()
    result = {
        **whole,
        "tasks": {"0shot": {"piqa": 50.0, "wikitext.perplexity": 20.0}},
        "questions": {"needle": {"average": 1.0}},
    }
    full_scale.record(run, text, result)
    assert run.values["lm.hope.val_loss"] == whole["val_loss"] and run.values["lm.hope.perplexity"] > 1
    assert run.values["eval.hope.piqa_0shot"] == 50.0 and run.values["needle.hope.average"] == 1.0
    assert run.tables == ["memories-hope-0"]
    full_scale.record(run, text, None)
