"""PolicyTrainer: rounds, dynamic sampling, exact resume, refusals."""

import warnings

import pytest
import torch
from torch import nn

from papers10.core.loop import LoopConfig
from papers10.core.random import seeded
from papers10.rl.advantages import group_advantages
from papers10.rl.losses import dapo_loss
from papers10.rl.sampling import dynamic_filter
from papers10.rl.trainer import PolicyTrainer, Rollouts


def rollouts(n=4, length=2, **changes):
    columns = dict(
        inputs={"room": torch.arange(n)},
        actions=torch.zeros(n, length, dtype=torch.int64),
        mask=torch.ones(n, length),
        logprobs=torch.zeros(n, length),
        group_ids=torch.arange(n) // 2,
        meta={"pair": torch.zeros(n)},
    )
    return Rollouts(**columns | changes)


def roll_out(policy, rooms, generator):
    rows = rooms.repeat_interleave(8)
    table = policy(rows).log_softmax(-1)
    doors = torch.multinomial(table.exp(), 1, generator=generator)
    return Rollouts({"room": rows}, doors, torch.ones(doors.shape), table.gather(-1, doors), rows)


def trainer(**changes):
    policy = seeded(0, "rooms", lambda: nn.Embedding(4, 3))
    options = dict(
        logp_fn=lambda policy, r: policy(r.inputs["room"]).log_softmax(-1).gather(-1, r.actions),
        batches=[torch.arange(4)],
        optimizer=torch.optim.Adam(policy.parameters(), lr=0.1),
        seed=0,
        reward_fn=lambda r: (r.actions[:, 0] == 1).float(),
    )
    options |= changes
    reward = options.pop("reward_fn")
    return PolicyTrainer(
        policy, roll_out, reward, lambda rewards, groups, meta: group_advantages(rewards, groups), dapo_loss, **options
    )


def test_the_policy_learns_what_is_rewarded():
    made = trainer()
    history = made.train(LoopConfig(steps=60, log_every=1))
    assert history.tail("reward") > 0.9 > history.column("reward")[1][0]
    assert (made.state.model.weight.argmax(-1) == 1).all()


def test_samples_are_drawn_once_a_round():
    seen = []
    made = trainer(updates=3, on_round=lambda r, a: seen.append(len(r)) or {"rows": len(r)})
    made.train(LoopConfig(steps=7, log_every=1))
    assert seen == [32, 32, 32]


def test_groups_without_signal_are_left_out_and_reported():
    made = trainer(
        reward_fn=lambda r: ((r.actions[:, 0] == 1) & (r.inputs["room"] < 2)).float(),
        max_resample=1,
        keep_fn=lambda rewards, groups, meta: dynamic_filter(rewards, groups),
    )
    kept = []
    made.on_round = lambda r, a: kept.append(set(r.group_ids.tolist())) or {}
    with pytest.warns(UserWarning, match="dynamic sampling: 2 of 4 groups after 1 further batches"):
        history = made.train(LoopConfig(steps=1))
    assert kept == [{0, 1}] and history.last("groups") == 2


def test_when_nothing_has_a_signal_the_first_round_is_used_and_nothing_moves():
    made = trainer(reward_fn=lambda r: torch.ones(len(r)), max_resample=0, keep_fn=lambda r, g, m: dynamic_filter(r, g))
    before = made.state.model.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train(LoopConfig(steps=2))
    assert (made.state.model.weight == before).all()


def test_rows_and_joined_rollouts_keep_their_columns():
    a, b = rollouts(), rollouts(n=2, length=3)
    joined = Rollouts.join([a, b])
    assert len(joined) == 6 and joined.actions.shape == (6, 3) and joined.mask[:4, 2].eq(0).all()
    some = joined.rows(joined.group_ids == 0)
    assert len(some) == 4 and some.inputs["room"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rollouts(mask=torch.ones(4, 3)), r"mask: expected shape \[4, 2\]"),
        (lambda: rollouts(group_ids=torch.zeros(3)), "group_ids: expected 4 rows"),
        (lambda: rollouts(inputs={"room": torch.zeros(5)}), "inputs.room: expected 4 rows"),
        (lambda: Rollouts.join([]), "parts: expected at least one"),
        (lambda: Rollouts.join([rollouts(), rollouts(meta={})]), "parts: expected the same columns"),
        (lambda: trainer(updates=0), "updates: expected an int >= 1, got 0"),
        (lambda: trainer(max_resample=-1), "max_resample: expected an int >= 0"),
        (
            lambda: trainer(reward_fn=lambda r: torch.zeros(3)).train(LoopConfig(steps=1)),
            r"reward_fn: expected one reward a row, \[32\]",
        ),
        (lambda: trainer(reward_fn=lambda r: torch.full((32,), torch.nan)).train(LoopConfig(steps=1)), "rewards"),
    ],
)
def test_refusals_name_argument_and_value(call, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        call()
