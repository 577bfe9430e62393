"""Advantages inside TRL (the real trainer), verl, ms-swift and EasyR1 (their interfaces, and the real package where it is installed)."""

import importlib
import importlib.util
import os
import runpy
import subprocess
import sys
import textwrap
import tomllib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.optional import MissingExtra
from papers10.rl.advantages import bn_advantages, dna_advantages, group_advantages
from papers10.rl.integrations import common, easyr1, swift, verl

PAIRS = {"pair_id": ["a"] * 8 + ["b"] * 8, "branch": (["real"] * 4 + ["cf"] * 4) * 2}
REWARDS = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0])
IDS = torch.arange(16) // 4


# ---- common


def test_names_are_the_library_functions():
    assert torch.equal(common.ADVANTAGES["grpo"](REWARDS, IDS, {}), group_advantages(REWARDS, IDS))
    assert torch.equal(common.ADVANTAGES["bn_grpo"](REWARDS, IDS, {}), bn_advantages(REWARDS, IDS))
    balanced, metrics = common.ADVANTAGES["dna_grpo"](REWARDS, IDS, PAIRS)
    assert torch.equal(balanced, dna_advantages(REWARDS, IDS, pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    assert all(name.startswith("dna/") for name in metrics) and metrics


@pytest.mark.parametrize("name", sorted(common.PAIRED))
@pytest.mark.parametrize("absent", common.PAIR_COLUMNS)
def test_dna_without_pairs_never_becomes_grpo(name, absent):
    with pytest.raises(ValueError, match=f"{absent} did not arrive"):
        common.ADVANTAGES[name](REWARDS, IDS, {key: value for key, value in PAIRS.items() if key != absent})


@pytest.mark.parametrize("name", sorted(common.ADVANTAGES))
def test_rows_that_nothing_scored_get_zero(name):
    rewards = REWARDS.clone()
    rewards[[1, 9]] = torch.nan
    advantages, _ = common.apply_advantage(common.ADVANTAGES[name], rewards, IDS, PAIRS)
    assert advantages[[1, 9]].abs().max() == 0 and advantages.abs().max() > 0


def test_dna_stays_balanced_under_the_batch_scale():
    advantages, _ = common.apply_advantage(common.ADVANTAGES["dna_bn_grpo"], REWARDS, IDS, PAIRS)
    signal = advantages.abs().view(2, 2, 4).mean(2)
    # the batch scale is one number, so only rounding of float32 remains
    assert torch.allclose(signal[:, 0], signal[:, 1], atol=1e-6) and abs(float(advantages.square().mean()) - 1) < 1e-5


@pytest.mark.parametrize(
    "result, error, words",
    [
        ([0.0] * 16, TypeError, "expected a tensor"),
        (torch.zeros(15), ValueError, r"expected advantages of shape \(16,\), got \(15,\)"),
        (torch.full((16,), torch.inf), ValueError, "row 0"),
    ],
)
def test_what_an_advantage_function_returns_is_checked(result, error, words):
    with pytest.raises(error, match=words):
        common.apply_advantage(lambda *_: result, REWARDS, IDS, {})


def test_unknown_advantage_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dna_grpo'"):
        common.advantage_function("dna_gpro")


@pytest.mark.parametrize(
    "found, ok", [("1.16.0", True), ("1.16.0.dev0", True), ("1.16.9", True), ("1.15.9", False), ("1.17.0", False), ("1.17.0rc1", False), ("2.0", False)]
)
def test_version_range(monkeypatch, found, ok):
    monkeypatch.setattr(common, "version", lambda _: found)
    if ok:
        assert common.require_version("trl", "1.16", "1.17") == found
    else:
        with pytest.raises(common.UnsupportedVersion, match=f"1.16 up to, not including, 1.17.*{found}"):
            common.require_version("trl", "1.16", "1.17")


def test_absent_framework():
    with pytest.raises(MissingExtra, match=r"papers10\[rl\]"):
        common.require_version("no-such-framework", "1", "2", extra="rl")
    with pytest.raises(ModuleNotFoundError, match="is not installed"):
        common.require_version("no-such-framework", "1", "2")


# ---- TRL, the real trainer on a model of three thousand parameters


WORDS = ["the", "square", "starts", "and", "goes", "right", "left", "up", "down", ";", "where", "A", "B", "C", "D"]


@pytest.fixture(scope="module")
def trl_run(tmp_path_factory):
    pytest.importorskip("trl")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    from papers10.rl.integrations import trl

    moves = {"right": "A", "left": "B", "up": "C", "down": "D"}
    names = list(moves)
    data = [
        {"prompt": f"the square starts {a} and goes {b} ; where", "pair_id": i, "branch": branch, "answer": moves[b]}
        for i, (a, other) in enumerate(zip(names, names[1:] + names[:1]))
        for branch, b in (("real", a), ("cf", other))
    ]

    def names_option(completions, answer, **_):
        return [float(right in text.split()) for text, right in zip(completions, answer)]

    def build(cls, make=trl.dna_config, options=None, rows=data, rewards=names_option, **changes):
        folder = tmp_path_factory.mktemp("trl")
        model, tokenizer = trl.rehearsal_model(WORDS, seed=1, folder=folder / "model")
        args = dict(
            per_device_train_batch_size=16, gradient_accumulation_steps=2, num_generations=8, max_completion_length=3, max_steps=2, learning_rate=1e-2, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
        )
        trainer = cls(
            model=model, reward_funcs=rewards, args=make(folder, **{**args, **changes}), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **(options or {})
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return SimpleNamespace(build=build, module=trl, data=data)


def trl_default(rewards, group_ids, columns, num_generations=8):
    groups = rewards.view(-1, num_generations)
    mean = torch.nanmean(groups, dim=1)
    count = (~torch.isnan(groups)).sum(dim=1)
    variance = torch.nanmean((groups - mean.unsqueeze(1)).square(), dim=1) * (count / (count - 1))

    def spread(values):
        return values.repeat_interleave(num_generations)

    return torch.nan_to_num((rewards - spread(mean)) / (spread(variance.sqrt()) + 1e-4), nan=0.0)


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_trl_default_advantage_gives_the_same_bits(trl_run):
    from trl import GRPOTrainer

    def some_unscored(completions, answer, **_):
        return [None if i % 5 == 0 else float(right in text.split()) for i, (text, right) in enumerate(zip(completions, answer))]

    # TRL seeds when a trainer is built, so each is trained before the next is made.
    theirs = trl_run.build(GRPOTrainer, rewards=some_unscored)
    start = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    theirs.train()
    ours = trl_run.build(trl_run.module.GroupRelativeTrainer, options={"advantage_fn": trl_default}, rewards=some_unscored)
    ours.train()
    assert list(theirs._logs["advantages"]) == list(ours._logs["advantages"]) and any(ours._logs["advantages"])
    assert all(torch.equal(value, ours.model.state_dict()[name]) for name, value in theirs.model.state_dict().items())
    assert any(not torch.equal(value, start[name]) for name, value in theirs.model.state_dict().items())


def test_trl_group_scale_is_group_advantages():
    # the same formula with sums in another order: float32 rounding of numbers below 4
    assert torch.allclose(trl_default(REWARDS, None, None, 4), group_advantages(REWARDS, IDS, ddof=1, eps=1e-4), atol=1e-6)


def test_trl_dna_trainer(trl_run):
    trainer = trl_run.build(trl_run.module.DNATrainer)
    order = list(trainer._get_train_sampler())
    block, repeats = 32, trainer.num_iterations * trainer.args.steps_per_generation
    assert order[:block] * repeats == order[: block * repeats]
    for at in range(0, block, 16):
        real, cf = (trl_run.data[order[at + offset]] for offset in (0, 8))
        assert real["pair_id"] == cf["pair_id"] and (real["branch"], cf["branch"]) == ("real", "cf")
        assert len(set(order[at : at + 8])) == len(set(order[at + 8 : at + 16])) == 1
    trainer.train()
    rewards = torch.tensor(trainer._logs["rewards"]["names_option"])
    pairs = [0] * 16 + [1] * 16
    expected = dna_advantages(rewards, pair_ids=pairs, branch=(["real"] * 8 + ["cf"] * 8) * 2)
    assert torch.allclose(torch.tensor(list(trainer._logs["advantages"])), expected, atol=1e-6) and expected.any()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2 and all({"dna/signal_real", "dna/signal_cf", "dna/frac_degenerate"} <= set(entry) for entry in logged)


def test_trl_bn_gspo_trainer(trl_run):
    trainer = trl_run.build(trl_run.module.BNGSPOTrainer, trl_run.module.bn_gspo_config, max_steps=1)
    trainer.train()
    advantages = torch.tensor(list(trainer._logs["advantages"]))
    # rounding of 32 float32 numbers
    assert abs(float(advantages.square().mean()) - 1) < 1e-5 and abs(float(advantages.mean())) < 1e-6
    assert (trainer.importance_sampling_level, trainer.loss_type, trainer.beta) == ("sequence", "grpo", 1e-4)


def test_trl_settings_that_do_not_fit_are_refused(trl_run):
    build, module = trl_run.build, trl_run.module
    with pytest.raises(ValueError, match="generation_batch_size: expected a multiple of 2 branches"):
        build(module.DNATrainer, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        build(module.DNATrainer, remove_unused_columns=True)
    with pytest.raises(ValueError, match="branch is missing"):
        build(module.DNATrainer, rows=[{key: value for key, value in row.items() if key != "branch"} for row in trl_run.data])
    with pytest.raises(ValueError, match="has no row of branch 'cf'"):
        build(module.DNATrainer, rows=trl_run.data[:-1])._get_train_sampler()
    with pytest.raises(ValueError, match="importance_sampling_level"):
        build(module.BNGSPOTrainer)
    with pytest.raises(ValueError, match="multi_objective_aggregation"):
        build(module.DNATrainer, multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(TypeError, match="advantage_fn"):
        build(module.GroupRelativeTrainer)
    with pytest.raises(ValueError, match="advantage_options"):
        build(module.GroupRelativeTrainer, options={"advantage_fn": trl_default, "advantage_options": {"eps": 1.0}})


def test_trl_with_other_methods_is_refused():
    from papers10.rl.integrations import trl

    class Moved:
        def _calculate_rewards(self, inputs):
            return inputs

    with pytest.raises(common.UnsupportedVersion, match="_calculate_rewards"):
        trl._check_methods(Moved)


TWO_PROCESSES = """
import sys
import datasets, torch, transformers
from accelerate.utils import gather_object
from papers10.rl.advantages import dna_advantages
from papers10.rl.integrations import trl

words, folder = "the square goes right left up down ; where A B C D".split(), sys.argv[1]
moves = dict(zip(words[3:7], "ABCD"))
data = [{"prompt": f"the square goes {move} ; where", "pair_id": i // 2, "branch": ("real", "cf")[i % 2], "answer": moves[move]} for i, move in enumerate([*moves] * 2)]
seen = []


class Watched(trl.DNATrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        seen.append((output["advantages"].clone(), [(row["pair_id"], row["branch"]) for row in inputs], self._kept_rewards.clone()))
        return output


model, tokenizer = trl.rehearsal_model(words, seed=1)
arguments = trl.dna_config(folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=8, max_completion_length=3, max_steps=2, learning_rate=1e-2, report_to=[],
                           save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0)
trainer = Watched(model=model, reward_funcs=lambda completions, answer, **_: [float(a in c.split()) for a, c in zip(answer, completions)], args=arguments,
                  train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer)
trainer.train()
for advantages, rows, rewards in seen:
    everybody, ids = torch.tensor(gather_object(advantages.tolist())), gather_object(rows)
    expected = dna_advantages(rewards[:, 0], pair_ids=[pair for pair, _ in ids], branch=[branch for _, branch in ids])
    assert len(everybody) == 32 and torch.equal(everybody, expected) and expected.any()
open(f"{folder}/{trainer.accelerator.process_index} of {trainer.accelerator.num_processes} agrees", "w").close()
"""


@pytest.mark.slow
def test_trl_two_processes(tmp_path):
    """Two processes hold half of a batch each; together they have the advantages of the whole."""
    pytest.importorskip("trl")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "train.py"), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert sorted(path.name for path in tmp_path.glob("*agrees")) == ["0 of 2 agrees", "1 of 2 agrees"], done.stderr[-2000:]


def test_trl_slices_belong_to_the_process():
    """The second of two processes gets the second half, from rewards and columns gathered in one order."""
    from papers10.rl.integrations import trl

    class Upstream:
        num_generations, reward_weights = 4, torch.ones(1)

        def __init__(self):
            self.train_dataset = SimpleNamespace(column_names=["prompt", *PAIRS])
            self.args = SimpleNamespace(remove_unused_columns=False, generation_batch_size=16)
            self.model, self.accelerator = SimpleNamespace(training=True), SimpleNamespace(process_index=1)
            self._logs, self._metrics = {"advantages": []}, {"train": defaultdict(list)}

        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return REWARDS.unsqueeze(1)

        def _generate_and_score_completions(self, inputs):
            self._calculate_rewards(inputs, None, None, None)
            return {"advantages": torch.zeros(8)}

    class Second(trl.GroupRelativeMixin, Upstream):
        @staticmethod
        def _gather(values):
            return {"b": PAIRS["pair_id"], "cf": PAIRS["branch"]}[values[-1]]

    Upstream.train_dataset = None
    trainer = Second(advantage_fn="dna_grpo", columns=common.PAIR_COLUMNS)
    rows = [{"pair_id": p, "branch": b} for p, b in zip(PAIRS["pair_id"][8:], PAIRS["branch"][8:])]
    found = trainer._generate_and_score_completions(rows)["advantages"]
    assert torch.equal(found, dna_advantages(REWARDS, IDS, pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"])[8:])
    trainer.model.training = False
    assert not trainer._generate_and_score_completions(rows)["advantages"].any()


# ---- verl


def tokens(rewards, time=3):
    table = torch.zeros(len(rewards), time)
    table[:, -1] = rewards
    return table


@pytest.mark.parametrize("name", sorted(verl.ESTIMATORS))
def test_verl_estimator(name):
    mask = torch.ones(16, 3)
    mask[::2, 2] = 0
    with verl.batch_rows(PAIRS) as rows:
        advantages, returns = verl.ESTIMATORS[name](tokens(REWARDS), mask, config={"norm_adv_by_std_in_grpo": True}, index=IDS.numpy())
    expected, _ = common.apply_advantage(common.ADVANTAGES[name], REWARDS, IDS, PAIRS)
    assert torch.equal(advantages, expected.unsqueeze(1) * mask) and advantages is returns
    assert bool(rows["metrics"]) == (name in common.PAIRED)


def test_verl_options_come_from_the_configuration():
    with verl.batch_rows(PAIRS):
        found, _ = verl.ESTIMATORS["dna_grpo"](tokens(REWARDS), torch.ones(16, 3), config={"papers10": {"scope": "batch"}}, index=IDS.numpy())
        with pytest.raises(ValueError, match="norm_adv_by_std_in_grpo"):
            verl.ESTIMATORS["dna_grpo"](tokens(REWARDS), torch.ones(16, 3), config={"norm_adv_by_std_in_grpo": False}, index=IDS.numpy())
    assert torch.equal(found[:, 0], dna_advantages(REWARDS, IDS, scope="batch", pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    found, _ = verl.ESTIMATORS["bn_grpo"](tokens(REWARDS), torch.ones(16, 3), config={"norm_adv_by_std_in_grpo": False}, index=IDS.numpy())
    assert torch.equal(found[:, 0], bn_advantages(REWARDS, IDS, scale="none"))


def test_verl_rows_end_with_their_block():
    with verl.batch_rows(PAIRS):
        pass
    with pytest.raises(ValueError, match="did not arrive"):
        verl.ESTIMATORS["dna_grpo"](tokens(REWARDS), torch.ones(16, 3), index=IDS.numpy())
    with pytest.raises(ValueError, match="index"):
        verl.ESTIMATORS["bn_grpo"](tokens(REWARDS), torch.ones(16, 3))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_verl_sessions_count_once(rows_of_session, random):
    keys = [f"u_{session}_{i}" for session, n in enumerate(rows_of_session) for i in range(n)]
    random.shuffle(keys)
    final = {f"u_{session}_{n - 1}": session for session, n in enumerate(rows_of_session)}
    rewards = torch.tensor([float(final[key] % 2) if key in final else 7.0 for key in keys])
    with verl.batch_rows({}, keys):
        found, _ = verl.ESTIMATORS["bn_grpo"](tokens(rewards), torch.ones(len(keys), 3), index=["u"] * len(keys))
    expected = bn_advantages(torch.tensor([0.0, 1, 0, 1]), torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(found[:, 0], expected[[int(key.split("_")[1]) for key in keys]])


def test_verl_losses_share_a_global_batch():
    """Two parts of a batch with verl's shared denominators add up to the whole batch's loss."""
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(8, 5, generator=rng)
    new, mask = old + 0.5 * torch.randn(8, 5, generator=rng), (torch.arange(5) < torch.randint(1, 6, (8, 1), generator=rng)).float()
    advantages = torch.randn(8, 1, generator=rng).expand(8, 5)
    actor = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28}
    for name in verl.POLICY_LOSSES:
        loss = verl.POLICY_LOSSES[name]
        for agg in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
            whole, metrics = loss(old, new, advantages, mask, agg, SimpleNamespace(**actor, global_batch_info={}))
            shared = {"dp_size": 2, "batch_num_tokens": float(mask.sum()), "global_batch_size": 8, "loss_scale_factor": 5}
            parts = [loss(old[p], new[p], advantages[p], mask[p], agg, SimpleNamespace(**actor, global_batch_info=shared))[0] for p in (slice(0, 4), slice(4, 8))]
            # verl averages gradients over the two processes
            assert torch.allclose(sum(parts) / 2, whole, atol=1e-6)
            assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
        weights = torch.rand(8, 5, generator=rng)
        weighted, _ = loss(old, new, advantages, mask, "token-mean", SimpleNamespace(**actor, global_batch_info={}), weights)
        by_hand, _ = loss(old, new, advantages * weights, mask, "token-mean", SimpleNamespace(**actor, global_batch_info={}))
        assert torch.equal(weighted, by_hand)
        with pytest.raises(ValueError, match="config"):
            loss(old, new, advantages, mask)


# A package with verl's layout: a registry, a legacy compute_advantage that another module imports by name, a newer trainer over a queue.
VERL_SHAPED = {
    "verl/__init__.py": "import importlib, os\nfor name in filter(None, os.environ.get('VERL_USE_EXTERNAL_MODULES', '').split(',')):\n    importlib.import_module(name)\n",
    "verl/trainer/__init__.py": "",
    "verl/trainer/ppo/__init__.py": "",
    "verl/trainer/ppo/core_algos.py": """
        ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY = {}, {}

        def register_adv_est(name):
            def put(function):
                if ADV_ESTIMATOR_REGISTRY.get(name, function) != function:
                    raise ValueError(name)
                return ADV_ESTIMATOR_REGISTRY.setdefault(name, function)
            return put

        def register_policy_loss(name):
            return lambda function: POLICY_LOSS_REGISTRY.setdefault(name, function)
    """,
    "verl/trainer/ppo/ray_trainer.py": """
        from verl.trainer.ppo import core_algos

        def compute_advantage(data, adv_estimator, config=None):
            found = core_algos.ADV_ESTIMATOR_REGISTRY[adv_estimator](token_level_rewards=data.batch["token_level_rewards"], response_mask=data.batch["response_mask"],
                                                                     config=config, index=data.non_tensor_batch["uid"])
            data.batch["advantages"], data.batch["returns"] = found
            return data
    """,
    "verl/trainer/ppo/v1/__init__.py": "from .trainer_base import PPOTrainer\n",
    "verl/trainer/ppo/v1/trainer_base.py": """
        from types import SimpleNamespace
        from verl.trainer.ppo.ray_trainer import compute_advantage
        tq = None

        class PPOTrainer:
            def _compute_advantage(self, batch, metrics):
                got = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", "response_mask", "rm_scores"])
                data = SimpleNamespace(batch={"token_level_rewards": got["rm_scores"], "response_mask": got["response_mask"]}, non_tensor_batch={"uid": got["uid"]})
                return compute_advantage(data, self.config.algorithm.adv_estimator, config=self.config.algorithm)
    """,
    "verl-0.9.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\n",
}


def layout(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def clean_modules(monkeypatch):
    """Nothing named verl or swift stays imported, and no import hook stays behind."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ("verl", "swift"):
            del sys.modules[name]


@pytest.fixture
def verl_shaped(tmp_path, monkeypatch, clean_modules):
    if importlib.util.find_spec("verl") is not None:
        pytest.skip("the real verl is installed")
    monkeypatch.syspath_prepend(str(layout(tmp_path, VERL_SHAPED)))
    importlib.invalidate_caches()
    assert set(verl.register()) == {*verl.ESTIMATORS, *verl.POLICY_LOSSES}
    return importlib.import_module("verl.trainer.ppo.v1.trainer_base")


def test_verl_registers_once(verl_shaped):
    core = sys.modules["verl.trainer.ppo.core_algos"]
    assert core.ADV_ESTIMATOR_REGISTRY == verl.ESTIMATORS and core.POLICY_LOSS_REGISTRY == verl.POLICY_LOSSES
    hooks = len(sys.meta_path)
    verl.register()
    assert len(sys.meta_path) == hooks


def test_verl_legacy_trainer_passes_pairs(verl_shaped):
    ray_trainer = sys.modules["verl.trainer.ppo.ray_trainer"]
    assert verl_shaped.compute_advantage is ray_trainer.compute_advantage
    batch = {"token_level_rewards": tokens(REWARDS), "response_mask": torch.ones(16, 3)}
    data = SimpleNamespace(batch=dict(batch), non_tensor_batch={"uid": IDS.numpy(), **{name: np.array(values, dtype=object) for name, values in PAIRS.items()}})
    found = ray_trainer.compute_advantage(data, "dna_grpo").batch["advantages"][:, 0]
    assert torch.equal(found, dna_advantages(REWARDS, IDS, pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    with pytest.raises(ValueError, match="pair_id and branch did not arrive"):
        ray_trainer.compute_advantage(SimpleNamespace(batch=dict(batch), non_tensor_batch={"uid": IDS.numpy()}), "dna_grpo")


class Queue:
    def __init__(self, **fields):
        self.fields = fields

    def kv_batch_get(self, keys, partition_id, select_fields):
        missing = [name for name in select_fields if name not in self.fields]
        if missing:
            raise KeyError(missing)
        return {name: self.fields[name] for name in select_fields}


def test_verl_newer_trainer_fetches_pairs(verl_shaped):
    fields = {"uid": IDS.numpy(), "response_mask": torch.ones(16, 3), "rm_scores": tokens(REWARDS)}
    trainer = verl_shaped.PPOTrainer()
    trainer.config = SimpleNamespace(algorithm=SimpleNamespace(adv_estimator="dna_grpo"))
    batch, metrics = SimpleNamespace(keys=[f"u{i // 4}_{i % 4}_0" for i in range(16)], partition_id="train"), {}
    verl_shaped.tq = Queue(**fields, **{name: np.array(values) for name, values in PAIRS.items()})
    found = trainer._compute_advantage(batch, metrics).batch["advantages"][:, 0]
    assert torch.equal(found, dna_advantages(REWARDS, IDS, pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    assert "dna/signal_real" in metrics
    verl_shaped.tq = Queue(**fields)
    with pytest.raises(ValueError, match="needs the columns pair_id and branch"):
        trainer._compute_advantage(batch, {})


def test_verl_loads_us_while_it_is_being_imported_and_we_load_no_framework(tmp_path):
    if importlib.util.find_spec("verl") is not None:
        pytest.skip("the real verl is installed")
    layout(tmp_path, VERL_SHAPED)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import verl.trainer.ppo.v1 as v1, verl.trainer.ppo.core_algos as core; print(sorted(core.ADV_ESTIMATOR_REGISTRY), v1.PPOTrainer._compute_advantage._papers10); "
    code += "import papers10.rl.integrations.trl, papers10.rl.integrations.swift; print({'trl', 'swift', 'transformers', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "papers10.rl.integrations.verl"})
    assert done.stdout.strip() == "['bn_grpo', 'dna_bn_grpo', 'dna_grpo'] True\nset()", done.stderr


def test_verl_plug_in_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["verl.plugins"] == {"papers10": verl.__name__}


def test_real_verl():
    """Only where verl is installed: our losses and estimators beside its own."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    verl.register()
    uid = np.array([f"u{i}" for i in IDS.tolist()], dtype=object)
    theirs, _ = core.compute_grpo_outcome_advantage(tokens(REWARDS), torch.ones(16, 3), uid)
    assert torch.allclose(group_advantages(REWARDS, list(uid)), theirs[:, 0], atol=1e-6)
    assert core.get_adv_estimator_fn("dna_grpo") is verl.ESTIMATORS["dna_grpo"]
    actor = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1e9, use_dynamic_bsz=True
    )
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(16, 3, generator=rng)
    new = old + 0.5 * torch.randn(16, 3, generator=rng)
    for ours, name in (("bn_gspo", "gspo"), ("dna_dapo", "vanilla")):
        a, b = (core.get_policy_loss_fn(n)(old, new, theirs, torch.ones(16, 3), "token-mean", actor) for n in (ours, name))
        assert torch.allclose(a[0], b[0], atol=1e-6) and a[1] == pytest.approx(b[1], abs=1e-6)


# ---- ms-swift


class SwiftShaped:
    kl_in_reward, beta, dynamic_num_samples, num_generations, num_iterations, shuffle_dataset = False, 0.0, False, 4, 1, False

    def __init__(self, **changes):
        self.model, self.reward_weights, self._metrics = SimpleNamespace(training=True), torch.ones(1), {"train": defaultdict(list)}
        self.args = SimpleNamespace(generation_batch_size=16, steps_per_generation=2, seed=0)
        self.template = SimpleNamespace(sequence_parallel_size=1)
        vars(self).update(changes)

    def _compute_advantages(self, samples, rewards_per_func, batch_encoded_inputs):
        return torch.full((len(rewards_per_func),), -1.0)

    def compute_std(self, samples, rewards_per_func):
        return rewards_per_func[:, 0].view(-1, 4).std(1).repeat_interleave(4)

    def _get_train_sampler(self, train_dataset=None):
        return "theirs"


def swift_samples(**columns):
    return [SimpleNamespace(extra=dict(zip(columns, values))) for values in zip(*columns.values())]


def test_swift_advantages():
    rewards = torch.stack([REWARDS, torch.full((16,), torch.nan)], dim=1)
    trainer = swift.trainer_class("dna_grpo", base=SwiftShaped)(reward_weights=torch.tensor([1.0, 0.5]))
    found = trainer._compute_advantages(swift_samples(**PAIRS), rewards, [])
    assert torch.equal(found, dna_advantages(REWARDS, IDS, pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    assert "dna/signal_cf" in trainer._metrics["train"]
    trainer.model.training = False
    assert (trainer._compute_advantages(swift_samples(**PAIRS), rewards, []) == -1).all()


def test_swift_requests_count_once():
    samples = [SimpleNamespace(extra={}, prompt_id="p", request_id=request) for request in "aabc"]
    trainer = swift.trainer_class("bn_grpo", base=SwiftShaped)(dynamic_num_samples=True)
    found = trainer._compute_advantages(samples, torch.tensor([[1.0], [1], [0], [1]]), [])
    expected = bn_advantages(torch.tensor([1.0, 0, 1]), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found, expected[[0, 0, 1, 2]])


def test_swift_refuses_what_it_cannot_keep():
    trainer = swift.trainer_class("dna_grpo", base=SwiftShaped)
    with pytest.raises(ValueError, match="branch did not arrive"):
        trainer()._compute_advantages(swift_samples(pair_id=PAIRS["pair_id"]), REWARDS.unsqueeze(1), [])
    with pytest.raises(ValueError, match="kl_in_reward"):
        trainer(kl_in_reward=True, beta=0.1)._compute_advantages(swift_samples(**PAIRS), REWARDS.unsqueeze(1), [])
    with pytest.raises(ValueError, match="generation_batch_size"):
        trainer(args=SimpleNamespace(generation_batch_size=12))._get_train_sampler({"pair_id": ["a", "a"], "branch": ["real", "cf"]})
    with pytest.raises(common.UnsupportedVersion, match="_compute_advantages"):
        swift.trainer_class("dna_grpo", base=object)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1, width=32)), min_size=1, max_size=12))
def test_pair_spread(rows):
    pair_ids, spread = zip(*rows)
    for rule, best in (("either", max), ("both", min)):
        found = swift.pair_spread(torch.tensor(spread), pair_ids, rule)
        assert found.tolist() == [best(s for p, s in rows if p == pair) for pair in pair_ids]


def test_swift_sampler_keeps_pairs():
    rows = {"pair_id": [0, 0, 1, 1], "branch": ["real", "cf"] * 2}
    order = list(swift.trainer_class("dna_grpo", base=SwiftShaped)()._get_train_sampler(rows))
    assert order == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert swift.trainer_class("bn_grpo", base=SwiftShaped)()._get_train_sampler(rows) == "theirs"


def test_swift_plug_in_file(tmp_path, monkeypatch, clean_modules):
    if importlib.util.find_spec("swift") is not None:
        pytest.skip("the real ms-swift is installed")
    trainer = "class GRPOTrainer:\n    def _compute_advantages(self, samples, rewards_per_func, batch_encoded_inputs): ...\n    def compute_std(self, samples, rewards_per_func): ...\n    def _get_train_sampler(self, train_dataset=None): ...\n"
    files = {"swift/__init__.py": "", "swift/trainers/__init__.py": "", "swift/rlhf_trainers/__init__.py": trainer, "ms_swift-4.6.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: ms-swift\nVersion: 4.6.0\n"}
    files["swift/trainers/trainer_factory.py"] = "class TrainerFactory:\n    TRAINER_MAPPING = {'grpo': 'swift.rlhf_trainers.GRPOTrainer'}\n"
    monkeypatch.syspath_prepend(str(layout(tmp_path, files)))
    importlib.invalidate_caches()
    path = swift.write_plugin(tmp_path / "papers10_swift.py", "dna_grpo", rule="both", scope="batch")
    runpy.run_path(str(path))
    place = importlib.import_module("swift.trainers.trainer_factory").TrainerFactory.TRAINER_MAPPING["grpo"]
    module, _, name = place.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    assert issubclass(made, swift.SwiftMixin) and made.rule == "both" and made.paired
    with pytest.raises(ValueError, match="ends in .py"):
        swift.write_plugin(tmp_path / "plugin", "dna_grpo")


# ---- EasyR1 and OpenRLHF


def test_easyr1_registers(tmp_path, monkeypatch, clean_modules):
    if importlib.util.find_spec("verl") is not None:
        pytest.skip("another verl is installed")
    files = {
        "verl/__init__.py": "",
        "verl/trainer/__init__.py": "",
        "verl/trainer/core_algos.py": """
            import torch
            ADV_ESTIMATOR_MAP = {}

            def register_adv_estimator(name):
                def put(function):
                    ADV_ESTIMATOR_MAP[getattr(name, "value", name)] = torch.no_grad()(function)
                    return function
                return put
        """,
        "verl/trainer/ray_trainer.py": """
            from .core_algos import ADV_ESTIMATOR_MAP

            def compute_advantage(data, adv_estimator, gamma=1.0, lam=1.0):
                data.batch["advantages"], _ = ADV_ESTIMATOR_MAP[adv_estimator](token_level_rewards=data.batch["token_level_rewards"], response_mask=data.batch["response_mask"],
                                                                               index=data.non_tensor_batch["uid"], gamma=gamma, lam=lam)
                return data
        """,
        "verl-0.3.3.dev0.dist-info/METADATA": "Metadata-Version: 2.1\nName: verl\nVersion: 0.3.3.dev0\n",
    }
    monkeypatch.syspath_prepend(str(layout(tmp_path, files)))
    importlib.invalidate_caches()
    assert set(easyr1.register({"dna_grpo": {"scope": "batch"}})) == set(verl.ESTIMATORS)
    data = SimpleNamespace(batch={"token_level_rewards": tokens(REWARDS), "response_mask": torch.ones(16, 3)}, non_tensor_batch={"uid": IDS.numpy(), **PAIRS})
    found = importlib.import_module("verl.trainer.ray_trainer").compute_advantage(data, "dna_grpo").batch["advantages"][:, 0]
    assert torch.equal(found, dna_advantages(REWARDS, IDS, scope="batch", pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    with pytest.raises(common.UnsupportedVersion):
        verl.register()
    with pytest.raises(ValueError, match="options"):
        easyr1.register({"dna": {}})


def test_openrlhf_shape():
    found = easyr1.openrlhf_rewards(REWARDS.view(4, 4), pair_ids=["a", "a", "b", "b"], branch=["real", "cf"] * 2)
    assert torch.equal(found.view(-1), dna_advantages(REWARDS, IDS, pair_ids=PAIRS["pair_id"], branch=PAIRS["branch"]))
    assert torch.equal(easyr1.openrlhf_rewards(REWARDS.view(4, 4), "bn_grpo").view(-1), bn_advantages(REWARDS, IDS))
    with pytest.raises(ValueError, match=r"\[prompts, generations\]"):
        easyr1.openrlhf_rewards(REWARDS, "grpo")
    with pytest.raises(ValueError, match="one for each of 4 prompts"):
        easyr1.openrlhf_rewards(REWARDS.view(4, 4), pair_ids=["a"], branch=["real"])
