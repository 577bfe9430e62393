import math
from fractions import Fraction
from itertools import product

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papers10.lm.trunk import CausalLM, TrunkConfig
from papers10.nested_learning.systems import (
    Frequency,
    Level,
    LinearAttention,
    Link,
    NestedSystem,
    Problem,
    Transfer,
    decompose,
    transfer_example,
)

CONFIG = TrunkConfig(vocab_size=16, hidden_size=8, num_layers=2, num_heads=2)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def rates(system):
    return [level.problems[0].frequency.text(system.seq_len) for level in system.levels]


@st.composite
def heaps(draw):
    size = draw(st.integers(1, 7))
    rate = st.sampled_from([0, Fraction(1, 4), 1, 1, 8, math.inf])
    unit = st.sampled_from(["step", "token"])
    problems = []
    for index in range(size):
        needs = [f"p{other}" for other in range(index) if draw(st.booleans())]
        problems.append(Problem(f"p{index}", Frequency(draw(rate), draw(unit)), needs=needs))
    return draw(st.permutations(problems)), draw(st.sampled_from([None, 1, 4, 64]))


@settings(max_examples=60, deadline=None)
@given(heaps())
def test_order_is_a_strict_partial_order_that_levels_respect(heap):
    problems, seq_len = heap
    system = NestedSystem.from_problems(problems, seq_len=seq_len)
    names = [problem.name for problem in problems]
    faster = {pair for pair in product(names, names) if system.order(*pair) == ">"}
    for a, b in product(names, names):
        assert system.order(a, b) == {">": "<", "<": ">", "==": "=="}[system.order(b, a)]
    assert not any((a, a) in faster for a in names)
    assert all((a, d) in faster for (a, b), (c, d) in product(faster, faster) if b == c)
    assert all(system.level_of(a) < system.level_of(b) for a, b in faster)
    assert sorted(name for level in system.levels for name in (p.name for p in level.problems)) == sorted(names)
    for upper, lower in zip(system.levels, system.levels[1:]):
        assert any(system.order(a, b) == ">" for a, b in product(upper.problems, lower.problems))  # no level too many
    NestedSystem(system.levels, seq_len=seq_len)


def test_momentum_is_faster_than_its_weight_and_adams_moments_share_a_level():
    system = NestedSystem.from_problems([Problem("W", 1, needs=("m", "v")), Problem("m", 1), Problem("v", 1)])
    assert (system.order("m", "W"), system.order("W", "v"), system.order("m", "v")) == (">", "<", "==")
    assert system.level_of("m") == system.level_of("v") == 1 and system.level_of("W") == 2


def test_needs_reach_through_a_chain():
    chain = [Problem("c", 1, needs=("b",)), Problem("b", 1, needs=("a",)), Problem("a", 1)]
    assert NestedSystem.from_problems(chain).order("a", "c") == ">"
    long = [Problem(f"p{i}", 1, needs=(f"p{i - 1}",) if i else ()) for i in range(500)]
    assert len(NestedSystem.from_problems(long).levels) == 500


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NestedSystem.from_problems([Problem("a", 1, needs=("a",))]), "circle"),
        (lambda: NestedSystem.from_problems([Problem("a", 1), Problem("a", 1)]), "twice"),
        (lambda: NestedSystem.from_problems([Problem("aa", 1, needs=("ab",)), Problem("abc", 1)]), "did you mean 'a"),
        (lambda: NestedSystem([Level(1, (Problem("a", 1),)), Level(2, (Problem("b", 2),))]), "faster"),
        (lambda: NestedSystem([Level(1, (Problem("a", 1), Problem("b", 2)))]), "different frequencies"),
        (lambda: NestedSystem([Level(2, (Problem("a", 1),))]), "expected numbers 1, 2"),
        (lambda: NestedSystem([Level(1, (Problem("a", 1, needs=("b",)), Problem("b", 1)))]), "needs 'b'"),
        (lambda: NestedSystem([Level(1, (Problem("a", 1),))], [Link("a", "z", Transfer.BACKPROP)]), "'z'"),
        (lambda: NestedSystem([Level(1, (Problem("a", 1),))], [Link("a", "a", "backprop")]), "Transfer"),
        (lambda: Problem("", 1), "name"),
        (lambda: Problem("a", -1), "rate"),
        (lambda: Frequency(1, "hour"), "unit"),
        (lambda: Frequency.once_every(0), "count"),
        (lambda: NestedSystem.from_problems([Problem("a", 1)]).order("a", "b"), "'b'"),
        (lambda: transfer_example("osmosis"), "kind"),
    ],
)
def test_bad_systems_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_frequencies_compare_exactly_once_the_length_is_known():
    token, chunk, step = Frequency(1, "token"), Frequency.once_every(48, "token"), Frequency(1)
    assert token.key() > chunk.key() > step.key() > Frequency(0).key()
    assert chunk.key(48) == step.key(48) and chunk.key(47) < step.key(47)
    assert math.isnan(chunk.per_step()) and chunk.per_step(96) == 2 and chunk.count(95) == 1
    assert [f.text() for f in (Frequency(math.inf), Frequency(Fraction(3, 4), "token"), Frequency(0.25))] == [
        "∞",
        "3T/4",
        "1/4",
    ]


@pytest.mark.parametrize("kind", list(Transfer))
def test_each_channel_of_knowledge_runs_and_both_sides_agree(kind):
    for seed in range(3):
        example = transfer_example(kind.value, seed)
        assert float(example["measured"].abs().max()) > 0
        torch.testing.assert_close(example["measured"], example["predicted"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "optimizer", "expected"),
    [
        (mlp, sgd, ["1"]),
        (mlp, lambda m: sgd(m, momentum=0.9), ["1", "1"]),
        (mlp, None, ["0"]),
        (lambda: LinearAttention(4), sgd, ["T", "1"]),
        (lambda: LinearAttention(4), lambda m: sgd(m, momentum=0.9), ["T", "1", "1"]),
        (lambda: CausalLM(CONFIG), None, ["∞", "0"]),
        (lambda: CausalLM(CONFIG), sgd, ["∞", "1"]),
        (lambda: CausalLM(CONFIG), lambda m: torch.optim.AdamW(m.parameters()), ["∞", "1", "1"]),
        (
            lambda: CausalLM(CONFIG, channel=lambda c, b: LinearAttention(c.hidden_size, learned_start=True)),
            sgd,
            ["∞", "T", "1"],
        ),
        (lambda: nn.MultiheadAttention(4, 2), sgd, ["∞", "1"]),
        (lambda: nn.LSTM(3, 4), sgd, ["T", "1"]),
    ],
)
def test_levels_of_known_models(model, optimizer, expected):
    model = model()
    system = decompose(model, None if optimizer is None else optimizer(model))
    assert rates(system) == expected
    counted = [name for problem in system.problems for name in problem.parameters]
    assert sorted(counted) == sorted(name for name, _ in model.named_parameters())  # each parameter once


def test_weights_generate_gradients_and_get_their_step():
    model = mlp()
    system = decompose(model, torch.optim.AdamW(model.parameters()))
    links = {(link.source, link.target): link.kind for link in system.links}
    assert links["0", "0[first moment]"] is Transfer.GENERATION
    assert links["0[second moment]", "0"] is Transfer.DIRECT_PARAMETRIC
    assert system.order("2[first moment]", "2") == ">" and system.order("0[first moment]", "2[second moment]") == "=="


def test_attention_is_generated_by_its_projections_and_read_by_what_follows():
    system = decompose(CausalLM(CONFIG))
    links = {(link.source, link.target): link.kind for link in system.links}
    assert links["blocks.0.mixer.k_proj", "blocks.0.mixer.attention"] is Transfer.GENERATION
    assert links["blocks.0.mixer.attention", "blocks.0.mixer.o_proj"] is Transfer.DIRECT_NONPARAMETRIC
    assert links["blocks.0.mixer.attention", "blocks.0.channel.gate_proj"] is Transfer.DIRECT_NONPARAMETRIC


def test_frozen_and_unlisted_parameters_have_frequency_zero():
    model = mlp()
    model[0].weight.requires_grad_(False)
    system = decompose(model, torch.optim.SGD([model[0].weight, model[2].weight, model[2].bias], lr=0.1))
    assert system["0"].frequency.rate == 0 and system["2"].frequency.rate == 1
    model = mlp()
    system = decompose(model, torch.optim.SGD([model[0].weight, model[2].weight, model[2].bias], lr=0.1))
    assert system["0.weight"].frequency.rate == 1 and system["0.bias"].frequency.rate == 0


def test_periods_of_groups_and_of_levels_of_an_optimizer():
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "period": 4}]
    system = decompose(model, torch.optim.SGD(groups, lr=0.1))
    assert rates(system) == ["1", "1/4"]
    assert [(link.source, link.target) for link in system.links if link.kind is Transfer.BACKPROP] == [("2", "0")]


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), {"second moment", "mean gradient", "momentum"}),
        (lambda p: torch.optim.Adagrad(p), {"second moment"}),
        (lambda p: torch.optim.Adadelta(p), {"second moment", "second moment of updates"}),
        (lambda p: torch.optim.NAdam(p), {"first moment", "second moment"}),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
    ],
)
def test_memories_of_the_optimizers_of_torch(build, names):
    model = nn.Linear(3, 2)
    found = {p.kind for p in decompose(model, build(model.parameters())).problems}
    assert found - {"Linear weights"} == names


def test_a_strange_optimizer_shows_its_state_or_describes_itself():
    class Strange(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["trace"] = torch.zeros_like(parameter)

    class Speaking(Strange):
        nested_objective = "½‖W x − u‖²"

        def nested_memories(self, group):
            return [{"name": "fast"}, {"name": "slow", "every": 5, "objective": "…"}]

    model = nn.Linear(3, 2)
    optimizer = Strange(model.parameters())
    assert len(decompose(model, optimizer).problems) == 1
    optimizer.step()
    assert {p.kind for p in decompose(model, optimizer).problems} == {"trace", "Linear weights"}
    system = decompose(model, Speaking(model.parameters()))
    assert rates(system) == ["1", "1", "1/5"] and system["model"].objective == "½‖W x − u‖²"


class Declared(nn.Module):
    def __init__(self, entries):
        super().__init__()
        self.start = nn.ParameterDict({"a": torch.eye(2), "b": torch.eye(2)})
        self.q_proj, self.out_proj, self.entries = nn.Linear(2, 2), nn.Linear(2, 2), entries

    def nested_levels(self):
        return self.entries


def test_a_module_describes_itself():
    entries = [
        {"name": "a", "every": 2, "initial": ["start.a"], "size": 4},
        {"name": "b", "every": 8, "initial": ["start.b"], "transfers": {"a": "generation"}, "needs": ["a"]},
        {"name": "never", "every": math.inf},
    ]
    model = nn.Sequential(nn.Linear(2, 2), Declared(entries))
    system = decompose(model, sgd(model), seq_len=16)
    assert rates(system) == ["8", "2", "1", "0"]
    links = {(link.source, link.target): link.kind for link in system.links}
    assert links["1.a", "1.b"] is Transfer.GENERATION and links["1.start.b", "1.b"] is Transfer.INITIALIZATION
    assert links["1.b", "1.out_proj"] is Transfer.DIRECT_PARAMETRIC and ("1.a", "1.out_proj") not in links
    assert system["1.start.a"].kind == "learned starts" and "1.a" in system["1.start.a"].needs


def test_a_start_waits_for_its_memory_when_both_move_equally_often():
    model = Declared([{"name": "a", "every": 16, "initial": ["start.a"]}])
    system = decompose(model, sgd(model), seq_len=16)
    assert system.order("a", "start.a") == ">"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a"}, "'every'"),
        ({"name": "a", "every": 0.5}, "every"),
        ({"name": "a", "every": 1, "unit": "tokens"}, "did you mean 'token'"),
        ({"name": "a", "every": 1, "initials": []}, "did you mean 'initial'"),
        ({"name": "a", "every": 1, "initial": ["start.c"]}, "start.c"),
        ({"name": "a", "every": 1, "needs": ["c"]}, "entry"),
        ({"name": "a", "every": 1, "transfers": {"a": "telepathy"}}, "transfers"),
    ],
)
def test_a_wrong_description_is_refused(entry, message):
    with pytest.raises((ValueError, TypeError), match=message):
        decompose(Declared([entry]))


def test_bad_input_of_decompose():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        decompose("model")
    with pytest.raises(TypeError, match="optimizer"):
        decompose(mlp(), "adam")
    with pytest.raises(ValueError, match="optimizer"):
        decompose(mlp(), sgd(mlp()))
    with pytest.raises(TypeError, match="seq_len"):
        decompose(mlp(), seq_len=1.5)
    with pytest.raises(ValueError, match="seq_len"):
        decompose(mlp(), seq_len=0)
    assert decompose(nn.ReLU()).levels == ()


def test_hope_declares_its_memories():
    titans = pytest.importorskip("papers10.nested_learning.titans")
    continuum = pytest.importorskip("papers10.nested_learning.continuum")
    model = CausalLM(
        CONFIG,
        mixer=lambda c, b: titans.SelfModifyingTitans(c.hidden_size, num_heads=2, chunk_size=(16, 4), layer=b),
        channel=lambda c, b: continuum.ContinuumMemory(c.hidden_size, (32, 128), variant="nested", layer=b),
    )
    system = decompose(model, torch.optim.AdamW(model.parameters()), seq_len=256)
    assert rates(system) == ["64", "16", "8", "2", "1", "1"]
    assert {link.kind for link in system.links} == {
        Transfer.GENERATION,
        Transfer.INITIALIZATION,
        Transfer.DIRECT_PARAMETRIC,
    }
    counted = [name for problem in system.problems for name in problem.parameters]
    assert sorted(counted) == sorted(name for name, _ in model.named_parameters())


def test_the_whole_hope_model():
    hope = pytest.importorskip("papers10.nested_learning.hope")
    model = hope.HopeCausalLM(hope.HopeConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2))
    system = decompose(model, torch.optim.AdamW(model.parameters()))
    assert len(system.levels) >= 5 and any(link.kind is Transfer.INITIALIZATION for link in system.links)
    counted = [name for problem in system.problems for name in problem.parameters]
    assert sorted(counted) == sorted(name for name, _ in model.named_parameters())


def test_recurrent_layers_of_the_trunk_are_no_softmax_attention():
    layers = pytest.importorskip("papers10.lm.layers")
    for name, expected in (("GatedDeltaNet", ["T", "0"]), ("LinearMemory", ["T/16", "T/16", "0"])):
        model = CausalLM(CONFIG, mixer=getattr(layers, name))
        assert rates(decompose(model)) == expected


def test_chapter_optimizers():
    optimizers = pytest.importorskip("papers10.nested_learning.optimizers")
    m3 = pytest.importorskip("papers10.nested_learning.m3")
    model = mlp()
    assert rates(decompose(model, optimizers.DeltaMomentum(model.parameters()))) == ["1", "1"]
    assert rates(decompose(model, m3.M3(model, slow_every=10))) == ["1", "1", "1/10"]
    base = sgd(model)
    paced = optimizers.MultiFrequencyOptimizer(base, {"a": (model[0].parameters(), 1), "b": (model[2].parameters(), 8)})
    assert rates(decompose(model, paced)) == ["1", "1/8"]


def test_raster():
    problems = [
        Problem("m", Frequency.once_every(4, "token")),
        Problem("W", 1),
        Problem("slow", 0.5),
        Problem("a", math.inf),
        Problem("f", 0),
    ]
    rows = NestedSystem.from_problems(problems, seq_len=10).raster(20)
    assert [row["ticks"] for row in rows] == [list(range(1, 21)), [4, 8, 14, 18], [10, 20], [20], []]
    assert [row["always"] for row in rows] == [True, False, False, False, False]
    with pytest.raises(ValueError, match="tokens"):
        NestedSystem.from_problems(problems).raster(0)


def test_table_graph_and_picture():
    model = CausalLM(CONFIG)
    system = decompose(model, torch.optim.AdamW(model.parameters()))
    text = str(system.to_table())
    assert "softmax attention ×2" in text and "first moment" in text and "generation" in text
    assert len(system.to_table(merge=False).rows) == len(system.problems)
    for merge in (True, False):
        dot = system.to_graphviz(merge)
        assert dot.startswith("digraph") and dot.count("{") == dot.count("}") and dot.count("subgraph") == 3
    assert r"\"" in NestedSystem.from_problems([Problem('a "b"', 1)]).to_graphviz()
    figure, ax = plt.subplots()
    system.draw(ax, title="x")
    figure.canvas.draw()
    assert len(ax.texts) > 6 and ax.get_legend() is not None
    plt.close(figure)
    assert "level 1" in repr(system) and "<table" in system._repr_html_()


def test_linear_attention_is_its_recurrence_and_refuses_what_it_cannot_do():
    layer = LinearAttention(4, learned_start=True).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    memory, outputs = layer.start.expand(2, 4, 4), []
    for t in range(5):
        q, k, v = layer.q_proj(x[:, t]) / 2, layer.k_proj(x[:, t]) / 2, layer.v_proj(x[:, t])
        memory = memory + v[:, :, None] * k[:, None]
        outputs.append(layer.o_proj((memory @ q[..., None])[..., 0]))
    torch.testing.assert_close(layer(x), torch.stack(outputs, 1), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="cache"):
        layer(x, cache=object())
    with pytest.raises(TypeError, match="width"):
        LinearAttention("4")
