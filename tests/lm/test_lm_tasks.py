"""Generated tasks: the answers solve the task by another road, streams repeat, sizes hold, bad input is refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.lm import tasks

GENERATORS = {
    "sequence_parity": lambda g: tasks.sequence_parity(5, 17, generator=g),
    "associative_recall": lambda g: tasks.associative_recall(5, 3, 20, keys=6, values=7, generator=g),
    "rebinding": lambda g: tasks.rebinding(5, 3, rebound=1, keys=6, values=7, generator=g),
    "two_dictionaries": lambda g: tasks.two_dictionaries(5, 3, queries=5, keys=6, values=7, generator=g),
    "needle": lambda g: tasks.needle(5, 64, generator=g),
    "needle with a query mark": lambda g: tasks.needle(5, 64, query_mark=True, generator=g),
    **{
        f"formal {name}": lambda g, name=name: tasks.formal_language(name, 5, (4, 24), generator=g)
        for name in tasks.FORMAL_LANGUAGES
    },
    **{f"mad {name}": lambda g, name=name: tasks.mad(name, 5, 24, vocab=8, generator=g) for name in tasks.MAD_TASKS},
}


@pytest.mark.parametrize("name", GENERATORS)
def test_shape_stream_and_loss(name):
    first, again, other = (GENERATORS[name](generator(seed, name)) for seed in (0, 0, 1))
    assert first.ids.dtype == first.targets.dtype == torch.int64 and first.mask.dtype == torch.bool
    assert first.ids.shape == first.targets.shape == first.mask.shape and len(first.ids) == 5
    assert torch.equal(first.ids, again.ids) and torch.equal(first.targets, again.targets)
    assert int(first.ids.min()) >= 0 and not first.targets[~first.mask].any()
    if name not in ("formal aa", "formal abab"):
        assert not torch.equal(first.ids, other.ids)
    if first.mask.any():
        logits = torch.nn.functional.one_hot(first.targets, int(first.targets.max()) + 2).float()
        assert first.accuracy(logits) == first.row_accuracy(logits) == 1
        assert first.loss(60 * logits) < 1e-4 < first.loss(logits)


@pytest.mark.parametrize("name", ["rebinding", "two_dictionaries", "needle"])
def test_answers_stand_after_the_question(name):
    task = GENERATORS[name](generator(3, name))
    assert torch.equal(task.targets[:, :-1][task.mask[:, :-1]], task.ids[:, 1:][task.mask[:, :-1]])
    assert not task.mask[:, -1].any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 9))
def test_balanced_words_are_balanced(seed, pairs):
    task = tasks.formal_language("shuffle2", 20, 2 * pairs, generator=generator(seed))
    for word in task.ids.tolist():
        for kind in range(2):
            height = 0
            for symbol in word:
                height += (symbol == 2 * kind) - (symbol == 2 * kind + 1)
                assert height >= 0
            assert height == 0


def test_balanced_words_are_uniform():
    pairs = torch.full((14_000,), 4)
    words = tasks._balanced(pairs, 8, generator(0, "balanced"))
    _, counts = words.unique(dim=0, return_counts=True)
    # 14 words, 1000 each expected; a chi-square with 13 degrees of freedom exceeds 40 once in 7000 draws.
    assert len(counts) == 14 and ((counts - 1000.0) ** 2 / 1000).sum() < 40


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 8), data=st.data())
def test_rebinding_asks_the_latest(seed, pairs, data):
    rebound = data.draw(st.integers(0, pairs))
    task = tasks.rebinding(6, pairs, rebound=rebound, keys=8, values=3, generator=generator(seed))
    assert int(task.info["rebound"].sum()) == 6 * rebound and int(task.mask.sum()) == 6 * pairs
    for ids, targets, mask in zip(task.ids.tolist(), task.targets.tolist(), task.mask.tolist(), strict=True):
        latest = dict(zip(ids[2 * pairs : 4 * pairs : 2], ids[2 * pairs + 1 : 4 * pairs : 2], strict=True))
        assert all(targets[t] == latest[ids[t]] for t in range(len(ids)) if mask[t])


def test_recall_distances_follow_the_power():
    near, far = (
        tasks.associative_recall(300, 2, 200, keys=4, values=4, power=power, generator=generator(0)).info["distance"]
        for power in (0.01, 1.0)
    )
    assert near[near > 0].double().mean() < 0.6 * far[far > 0].double().mean()


def test_needles_stand_where_they_are_said_to():
    task = tasks.needle(50, 96, needles=3, query_mark=True, generator=generator(0))
    mark = tasks.needle_vocab() - 2
    assert (task.ids.gather(1, task.info["place"]) == mark).all() and (task.ids[:, -4] == mark + 1).all()
    assert torch.equal(task.info["values"].gather(1, task.info["asked"][:, None])[:, 0], task.ids[:, -1])
    assert (task.info["place"] % 4 == 0).all() and int(task.info["place"].max()) <= 96 - 28


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), needles=st.integers(1, 6), depth=st.floats(0, 1))
def test_a_given_depth_moves_the_asked_needle_only_there(seed, needles, depth):
    free, task = (tasks.needle(8, 48, needles=needles, depth=d, generator=generator(seed)) for d in (None, depth))
    place = task.info["place"]
    assert (place.gather(1, task.info["asked"][:, None])[:, 0] == 4 * round(5 * depth)).all()
    assert torch.allclose(task.info["depth"], torch.full((8,), round(5 * depth) / 5))
    assert all(len(set(row)) == needles for row in place.tolist()) and torch.equal(task.ids[:, -4:], free.ids[:, -4:])
    mark = tasks.needle_vocab() - 2
    assert ((task.ids == mark).sum(1) == needles + 1).all() and (task.ids.gather(1, place) == mark).all()
    asked = free.info["place"].gather(1, free.info["asked"][:, None])[:, 0]
    assert torch.allclose(free.info["depth"], asked / 20)


@pytest.mark.parametrize("kind", tasks.NEEDLE_KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_words_before_the_asked_needle(kind, depth):
    sample = tasks.needle_words(kind, 100, haystack="x", needles=6, depth=depth, generator=generator(0, kind))
    per_key = tasks.NEEDLE_KINDS[kind][1]
    assert len(sample.candidates) == 6 * per_key and sample.depth == depth
    text = sample.prompt.rsplit("\n", 1)[0]
    answered = [sample.candidates.index(answer) for answer in sample.answers]
    assert all(sample.depths[i] == depth for i in answered)
    if kind != "single-1":
        for value, share in zip(sample.candidates, sample.depths, strict=True):
            assert text[: text.index(value)].split().count("x") == round(100 * share)


def test_the_secret_form_is_the_papers():
    draws = [tasks.needle_words("secret", 200, haystack="x", generator=generator(seed)) for seed in range(300)]
    for sample in draws:
        facts = dict(re.findall(r"The secret number for (ID-\d{4}) is (\d{6})\.", sample.prompt))
        asked = re.fullmatch(r"The secret number for (ID-\d{4}) is ", sample.prompt.rsplit("\n", 1)[1])
        assert len(facts) == 5 and sample.answers == (facts[asked[1]],) and set(facts.values()) == set(sample.candidates)
    # 1500 places, uniform on [0, 1]: four standard errors of the mean, and of the mean of the asked ones.
    assert abs(sum(sum(s.depths) for s in draws) / 1500 - 0.5) < 0.03 and abs(sum(s.depth for s in draws) / 300 - 0.5) < 0.067


def test_a_list_of_words_is_the_text():
    story = " ".join(f"word{i}" for i in range(50))
    texts = [tasks.needle_words("secret", 300, haystack=given, generator=generator(0)) for given in (story, story.split())]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", tasks.NEEDLE_KINDS)
def test_needle_words(kind):
    story = " ".join(f"word{i}" for i in range(50))
    first, again = (tasks.needle_words(kind, 300, haystack=story, generator=generator(0, kind)) for _ in range(2))
    keys, per_key, asked, _ = tasks.NEEDLE_KINDS[kind]
    assert first == again and len(first.candidates) == keys * per_key and len(first.answers) == asked * per_key
    assert all(0 <= depth <= 1 for depth in first.depths) and ("word7" in first.prompt) == (kind != "single-1")
    perfect = tasks.needle_score(f" {first.answers[0]} " + " ".join(first.answers), first)
    assert perfect == {"exact": 1.0, "recall": 1.0, "digits": 1.0, "candidate": 1.0}


def test_needle_score_counts():
    sample = tasks.NeedleText("", ("123456",), ("123456", "654321"), (0.5, 0.1))
    assert tasks.needle_score("123465.", sample) == {"exact": 0, "recall": 0, "digits": 4 / 6, "candidate": 0}
    assert tasks.needle_score(" 654321", sample) == {"exact": 0, "recall": 0, "digits": 0, "candidate": 1}


def test_long_needles_are_cheap():
    task = tasks.needle(2, 131_072, generator=generator(0))
    assert task.ids.shape == (2, 131_072)
    assert len(tasks.needle_words("secret", 128_000, haystack="a b c", generator=generator(0)).prompt.split()) > 128_000


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("name", lambda g: tasks.formal_language("dyck", 2, 4, generator=g)),
        ("length", lambda g: tasks.formal_language("abab", 2, (5, 7), generator=g)),
        ("batch", lambda g: tasks.sequence_parity(-1, 4, generator=g)),
        ("pairs", lambda g: tasks.associative_recall(2, 9, 64, keys=8, generator=g)),
        ("length", lambda g: tasks.associative_recall(2, 4, 15, generator=g)),
        ("values", lambda g: tasks.rebinding(2, values=1, generator=g)),
        ("rebound", lambda g: tasks.rebinding(2, 4, rebound=5, generator=g)),
        ("queries", lambda g: tasks.two_dictionaries(2, 3, queries=7, generator=g)),
        ("length", lambda g: tasks.needle(2, 40, generator=g)),
        ("needles", lambda g: tasks.needle(2, 400, needles=33, generator=g)),
        ("depth", lambda g: tasks.needle(2, 400, depth=1.5, generator=g)),
        ("depth", lambda g: tasks.needle_words("secret", 100, depth=-0.1, generator=g)),
        ("needles", lambda g: tasks.needle_words("multi-query", 100, needles=3, generator=g)),
        ("haystack", lambda g: tasks.needle_words("secret", 100, haystack=[], generator=g)),
        ("kind", lambda g: tasks.needle_words("multi_key", 100, generator=g)),
        ("words", lambda g: tasks.needle_words("multi-key", 9, generator=g)),
        ("haystack", lambda g: tasks.needle_words("multi-key", 99, haystack="  ", generator=g)),
        ("vocab", lambda g: tasks.mad("recall", 2, 8, vocab=5, generator=g)),
        ("name", lambda g: tasks.mad("memorise", 2, 8, generator=g)),
        ("content", lambda g: tasks.mad("selective_copy", 2, 8, content=5, generator=g)),
    ],
)
def test_bad_input_names_the_argument(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        call(generator(0))


def test_empty_batches():
    assert tasks.sequence_parity(0, 4, generator=generator(0)).ids.shape == (0, 4)
    assert tasks.rebinding(0, generator=generator(0)).ids.shape == (0, 24)
    assert tasks.associative_recall(0, 2, 8, generator=generator(0)).ids.shape == (0, 8)
    assert tasks.formal_language("anbn", 0, 8, generator=generator(0)).ids.shape == (0, 8)
