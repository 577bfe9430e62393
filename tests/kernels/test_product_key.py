"""Product keys and slots: hand values, ties, invariants, gradients through writes, bad input, torch.compile, memory."""

import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from papers10.kernels.common import BackendUnavailable, installed, interpreting, last_backend
from papers10.kernels.product_key import (
    product_key_bytes,
    product_key_topk,
    product_key_topk_reference,
    slot_counts,
    slot_read,
    slot_read_reference,
    slot_scan,
    slot_scan_reference,
    slot_write,
    slot_write_reference,
)

BOTH = ["reference", "torch"]
HAND_KEYS = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 1, 2, 1).repeat(1, 2, 1, 1)


def near(got, expected, atol=1e-6):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(rows, entries, slots, seed=0, lead=()):
    return torch.randint(slots, (*lead, rows, entries), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BOTH)
def test_hand_example_by_distance(backend):
    scores, slots, side = product_key_topk(
        torch.tensor([[0.8, 0.1]], dtype=torch.float64), HAND_KEYS, 2, backend=backend
    )
    assert slots.tolist() == [[2, 0]]
    near(side[0], [[0.444726, 3.194183], [4.509860, 0.209487]])
    near(scores.softmax(-1)[0], [0.939883, 0.060117])
    assert scores.softmax(-1).square().sum().item() == pytest.approx(0.886994, abs=1e-6)


@pytest.mark.parametrize("backend", BOTH)
def test_hand_example_by_dot_product(backend):
    scores, slots, _ = product_key_topk(
        torch.tensor([[0.8, 0.1]], dtype=torch.float64), HAND_KEYS, 2, score="dot", backend=backend
    )
    assert slots.tolist() == [[3, 2]]
    near(scores.softmax(-1)[0], [0.524979, 0.475021])


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize(
    "step, expected, again",
    [
        ("paper", [0.147327, 1.265464, 0.939883, 0.0], 0.892236),
        ("released", [0.294653, 3.796392, 1.409824, 0.0], 1.342783),
    ],
)
def test_hand_chunk(backend, step, expected, again):
    q = torch.tensor([[0.8, 0.1], [0.2, 0.7], [0.8, 0.1]], dtype=torch.float64)[:, None]
    v, g = (
        torch.tensor([[5.0], [1.0], [3.0]], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64),
    )
    scores, slots, _ = product_key_topk(q, HAND_KEYS, 2, backend=backend)
    weights, slots, values = scores[:, 0].softmax(-1), slots[:, 0], torch.zeros(4, 1, dtype=torch.float64)
    error = g[:2, None] * (slot_read(values, slots[:2], weights[:2], backend=backend) - v[1:])
    options = {"scale": 1.0} if step == "paper" else {"scale": 3 / 2 * 1 * 2, "counts": slot_counts(slots[:2], slots)}
    values = slot_write(values, slots[:2], weights[:2], error, backend=backend, **options)
    near(values[:, 0], expected)
    assert slot_read(values, slots[:1], weights[:1], backend=backend).item() == pytest.approx(again, abs=1e-6)


def test_repeated_writes_close_the_gap_geometrically():
    scores, slots, _ = product_key_topk(torch.tensor([[0.8, 0.1]], dtype=torch.float64), HAND_KEYS, 2)
    weights, values, reads = scores.softmax(-1), torch.zeros(4, 1, dtype=torch.float64), []
    for _ in range(4):
        values = slot_write(values, slots, weights, slot_read(values, slots, weights) - 1, scale=1.0)
        reads.append(slot_read(values, slots, weights).item())
    assert reads == pytest.approx([0.886994, 0.987230, 0.998557, 0.999837], abs=1e-6)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    lead=st.lists(st.integers(0, 3), max_size=2),
    heads=st.integers(1, 2),
    n=st.integers(1, 12),
    c=st.integers(1, 5),
    share=st.floats(0, 1),
    score=st.sampled_from(["idw", "dot"]),
)
def test_product_search_is_the_search_over_all_pairs(seed, lead, heads, n, c, share, score):
    k = 1 + round(share * (n - 1))
    q, keys = draw(*lead, heads, 2 * c, seed=seed), draw(heads, 2, n, c, seed=seed + 1)
    got = product_key_topk(q, keys, k, score=score, backend="torch")
    scores, slots, side = product_key_topk_reference(q, keys, k, score=score)
    torch.testing.assert_close(got[0], scores, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got[2], side, atol=1e-9, rtol=1e-9)
    assert torch.equal(got[1], slots)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 10**6), n=st.integers(1, 9), share=st.floats(0, 1))
def test_ties_take_the_lower_slot(seed, n, share):
    k = 1 + round(share * (n - 1))
    q, keys = draw(7, 2, 4, seed=seed).round(), draw(2, 2, n, 2, seed=seed + 1).round()
    got = product_key_topk(q, keys, k, score="dot", backend="torch")
    for a, b in zip(got, product_key_topk_reference(q, keys, k, score="dot")):
        assert torch.equal(a, b)


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("backend", BOTH)
def test_identical_keys_give_the_first_slots(score, backend):
    _, slots, _ = product_key_topk(
        draw(5, 1, 6, dtype=torch.float32), torch.ones(1, 2, 9, 3), 4, score=score, backend=backend
    )
    assert slots.tolist() == [[[0, 1, 2, 3]]] * 5


def test_keys_of_each_sample():
    q, keys = draw(3, 5, 2, 6), draw(3, 2, 2, 7, 3, seed=1)
    together = product_key_topk(q, keys, 4)
    for sample in range(3):
        for whole, part in zip(together, product_key_topk(q[sample], keys[sample], 4)):
            torch.testing.assert_close(whole[sample], part, atol=1e-12, rtol=1e-12)


def test_a_query_on_a_key_has_a_finite_gradient():
    keys = draw(1, 2, 4, 3, dtype=torch.float32)
    q = keys[0, :, 2].reshape(1, 6).clone().requires_grad_()
    scores, slots, _ = product_key_topk(q, keys, 2)
    assert slots[0, 0] == 2 * 4 + 2
    (gradient,) = torch.autograd.grad(scores.sum(), q)
    assert torch.isfinite(gradient).all()


def test_a_query_with_nan_stays_alone():
    q, keys = draw(4, 1, 6, dtype=torch.float32), draw(1, 2, 5, 3, seed=1, dtype=torch.float32)
    clean = product_key_topk(q, keys, 3)
    q[1, 0, 0] = float("nan")
    scores, slots, _ = product_key_topk(q, keys, 3)
    assert torch.isnan(scores[1]).all() and ((slots >= 0) & (slots < 25)).all()
    assert torch.equal(scores[[0, 2, 3]], clean[0][[0, 2, 3]]) and torch.equal(slots[[0, 2, 3]], clean[1][[0, 2, 3]])


def test_half_precision_is_scored_in_float32():
    q, keys = draw(6, 1, 64, dtype=torch.bfloat16), draw(1, 2, 40, 32, seed=1, dtype=torch.bfloat16)
    scores, slots, side = product_key_topk(q, keys, 5)
    expected = product_key_topk_reference(q.double(), keys.double(), 5)
    assert scores.dtype == side.dtype == torch.float32 and torch.equal(slots, expected[1])
    torch.testing.assert_close(side.double(), expected[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_gradients_of_the_scores(score):
    q, keys = draw(3, 2, 4).requires_grad_(), draw(2, 2, 5, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, keys: product_key_topk(q, keys, 3, score=score)[::2], (q, keys))


@pytest.mark.parametrize("keep", ["table", "rows"])
@pytest.mark.parametrize("batch", [0, 2])
def test_gradients_of_a_read(keep, batch):
    own = (batch,) if batch else ()
    values, weights = draw(*own, 6, 3).requires_grad_(), draw(*own, 4, 5, seed=1).requires_grad_()
    slots = chosen(4, 5, 6, lead=own)
    upstream = draw(*own, 4, 3, seed=2)
    got, expected = (
        slot_read(values, slots, weights, keep=keep),
        slot_read(values, slots, weights, backend="reference"),
    )
    torch.testing.assert_close(got, expected)
    dense, own_weights = torch.autograd.grad(got, (values, weights), upstream)
    assert dense.is_sparse == (keep == "rows")
    for a, b in zip((dense.to_dense(), own_weights), torch.autograd.grad(expected, (values, weights), upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_gradients_of_a_write(inplace, counted):
    values, weights, error = (
        tensor.requires_grad_() for tensor in (draw(6, 3), draw(4, 5, seed=1), draw(4, 3, seed=2))
    )
    slots = chosen(4, 5, 6)
    counts = slot_counts(slots) + 1 if counted else None

    def write(values, weights, error):
        return slot_write(values.clone(), slots, weights, error, scale=0.7, counts=counts, inplace=inplace)

    torch.testing.assert_close(
        write(values, weights, error), slot_write_reference(values, slots, weights, error, scale=0.7, counts=counts)
    )
    assert torch.autograd.gradcheck(write, (values, weights, error))


def chain(values, q, keys, target, gate, chunks, sparse, backend="auto"):
    """Reads and writes chunk by chunk; the sparse form or the dense functional one."""
    own, reads = values.dim() == 3, []
    for q_part, target_part, gate_part in zip(*(tensor.chunk(chunks, int(own)) for tensor in (q, target, gate))):
        find, read, write = (
            (product_key_topk, slot_read, slot_write)
            if sparse
            else (product_key_topk_reference, slot_read_reference, slot_write_reference)
        )
        options = {"backend": backend} if sparse else {}
        scores, slots, _ = find(q_part, keys, 3, **options)
        weights, slots = scores.flatten(-2).softmax(-1), slots.flatten(-2)
        out = read(values, slots, weights, **options, **({"keep": "rows"} if sparse else {}))
        values = write(
            values,
            slots,
            weights,
            gate_part[..., None] * (out - target_part),
            scale=1.0,
            **options,
            **({"inplace": True} if sparse else {}),
        )
        reads.append(out)
    return torch.cat(reads, int(own)), values


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("final", [0.0, 1.0])
@pytest.mark.parametrize("n", [5, 20])
def test_gradient_through_three_writes_is_that_of_the_dense_form(own, final, n):
    # With 5 sub-keys the chain of rows outgrows half the table and becomes dense; with 20 it stays sparse.
    lead = (2,) if own else ()
    operands = [
        tensor.requires_grad_()
        for tensor in (
            draw(*lead, 12, 2, 6),
            draw(*lead, 2, 2, n, 3, seed=1),
            draw(*lead, 12, 4, seed=2),
            draw(*lead, 12, seed=3),
        )
    ]
    start = draw(*lead, n * n, 4, seed=4).requires_grad_()
    found = []
    for sparse in (False, True):
        reads, values = chain(start.clone(), *operands, 3, sparse)
        loss = reads.sin().sum() + final * values.square().sum()
        first = torch.autograd.grad(loss, (start, *operands), retain_graph=True)
        again = torch.autograd.grad(loss, (start, *operands))
        assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(first, again))
        found.append([reads, values, *(gradient.to_dense() for gradient in first)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_gradient_through_writes_against_finite_differences():
    start, operands = (
        draw(25, 2, seed=4),
        [draw(6, 1, 4), draw(1, 2, 5, 2, seed=1), draw(6, 2, seed=2), draw(6, seed=3)],
    )
    operands = [tensor.requires_grad_() for tensor in operands]
    assert torch.autograd.gradcheck(lambda *o: chain(start.clone(), *o, 3, True), operands)


def sequence(own, tokens=11, entries=3, rows=40, width=4, dtype=torch.float64):
    lead = (2,) if own is not None else ()
    values = draw(*(lead if own else ()), rows, width, dtype=dtype)
    floats = [
        draw(*lead, *shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate(((tokens, entries), (tokens, width), (tokens,)), 1)
    ]
    return values, chosen(tokens, entries, rows, lead=lead), [tensor.requires_grad_() for tensor in floats]


@pytest.mark.parametrize("own", [None, False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("final", [0.0, 1.0])
def test_a_scan_is_its_chunks_one_after_the_other(own, inplace, counted, final):
    values, slots, floats = sequence(own)
    values.requires_grad_()
    counts = slot_counts(slots) if counted else None
    found = []
    for function, options in ((slot_scan, {"inplace": inplace}), (slot_scan_reference, {})):
        reads, state = function(values.clone(), slots, *floats, chunk_size=4, scale=0.7, counts=counts, **options)
        loss = reads.sin().sum() + final * state.square().sum()
        found.append([reads, state, *torch.autograd.grad(loss, (values, *floats), retain_graph=True)])
        for a, b in zip(found[-1][2:], torch.autograd.grad(loss, (values, *floats))):
            assert torch.equal(a, b)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_gradient_of_a_scan_against_finite_differences():
    values, slots, floats = sequence(None, tokens=5, entries=2, rows=4, width=2)
    assert torch.autograd.gradcheck(
        lambda values, *o: slot_scan(values, slots, *o, chunk_size=2, scale=0.7), (values.requires_grad_(), *floats)
    )


def test_a_scan_does_not_see_its_own_chunk_nor_later_ones():
    values, slots, floats = sequence(None, rows=6)
    weights, target, gate = (tensor.detach() for tensor in floats)
    reads, _ = slot_scan(values, slots, weights, target, gate, chunk_size=4, scale=1.0)
    changed, other = target.clone(), gate.clone()
    changed[4:], other[4:] = 9.0, 3.0
    again, _ = slot_scan(values, slots, weights, changed, other, chunk_size=4, scale=1.0)
    assert torch.equal(again[:8], reads[:8]) and not torch.equal(again[8:], reads[8:])
    assert torch.equal(slot_read(values, slots[:4], weights[:4]), reads[:4])


def test_a_scan_without_gate_changes_nothing_and_may_be_empty():
    values, slots, (weights, target, gate) = sequence(None)
    before = values.clone()
    reads, state = slot_scan(values, slots, weights, target, 0 * gate, chunk_size=4, scale=1.0, inplace=True)
    assert state is values and torch.equal(values, before)
    reads, state = slot_scan(values, slots[:0], weights[:0], target[:0], gate[:0], chunk_size=4, scale=1.0)
    assert reads.shape == (0, 4) and torch.equal(state, before)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"gate": torch.zeros(4, 1)}, ValueError, "gate: expected shape [4], got [4, 1]"),
        ({"target": torch.zeros(4, 3)}, ValueError, "target: expected shape [4, 2]"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected a whole number >= 1, got 0"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
        ({"slots": torch.full((4, 3), 25)}, IndexError, "got 25"),
        (
            {"slots": torch.zeros(3, dtype=torch.long), "weights": torch.zeros(3), "target": torch.zeros(2)},
            ValueError,
            "slots: expected shape [..., T, R]",
        ),
        ({"inplace": True, "backend": "reference"}, ValueError, "inplace: expected False"),
    ],
)
def test_bad_input_of_a_scan_is_named(options, error, message):
    good = {
        "values": torch.zeros(25, 2),
        "slots": torch.zeros(4, 3, dtype=torch.long),
        "weights": torch.zeros(4, 3),
        "target": torch.zeros(4, 2),
        "gate": torch.zeros(4),
        "chunk_size": 2,
        "scale": 1.0,
    }
    with pytest.raises(error) as caught:
        slot_scan(**{**good, **options})
    assert message in str(caught.value)


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_walks_back_through_writes():
    program = """
import sys, torch
sys.path.insert(0, "tests/kernels")
from test_product_key import chain, draw
operands = [tensor.requires_grad_() for tensor in (draw(8, 2, 6, dtype=torch.float32), draw(2, 2, 5, 3, seed=1, dtype=torch.float32),
            draw(8, 4, seed=2, dtype=torch.float32), draw(8, seed=3, dtype=torch.float32))]
found = []
for sparse in (False, True):
    start = draw(25, 4, seed=4, dtype=torch.float32).requires_grad_()
    reads, values = chain(start.clone(), *operands, 2, sparse, "triton")
    found.append([reads, values, *(g.to_dense() for g in torch.autograd.grad(reads.sin().sum(), (start, *operands)))])
for a, b in zip(*found):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
print("same")
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert "same" in done.stdout, done.stderr


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_nobody_reads_keep_their_bits(inplace):
    values, slots = draw(50, 4, dtype=torch.float32), chosen(6, 3, 50)
    before = values.clone()
    after = slot_write(values, slots, torch.ones(6, 3), draw(6, 4, dtype=torch.float32), scale=0.5, inplace=inplace)
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[slots.reshape(-1)] = False
    assert torch.equal(after[untouched], before[untouched]) and not torch.equal(after, before)
    assert (after is values) == inplace and torch.equal(values, before) != inplace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_two_forms_of_read_and_write_have_the_same_bits(dtype):
    values, slots = draw(30, 16, dtype=dtype), chosen(9, 4, 30)
    weights = draw(9, 4, seed=1, dtype=torch.float32).requires_grad_()
    error = draw(9, 16, seed=2, dtype=dtype).requires_grad_()
    copy = values.clone()
    reads = [slot_read(values, slots, weights), slot_read(copy, slots, weights, keep="rows")]
    tables = [
        slot_write(values, slots, weights, error, scale=0.3),
        slot_write(copy, slots, weights, error, scale=0.3, inplace=True),
    ]
    assert torch.equal(*reads) and torch.equal(*tables) and tables[0].dtype == reads[0].dtype == dtype
    upstream = draw(30, 16, seed=3, dtype=dtype)
    for a, b in zip(
        *(
            torch.autograd.grad((read, table), (weights, error), (reads[0].detach(), upstream))
            for read, table in zip(reads, tables)
        )
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights, error, scale", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)])
def test_nothing_to_write_changes_nothing(weights, error, scale):
    values, slots = draw(9, 4, dtype=torch.float32), chosen(6, 3, 9)
    after = slot_write(values, slots, torch.full((6, 3), weights), torch.full((6, 4), error), scale=scale)
    assert torch.equal(after, values)


def test_samples_have_rows_of_their_own():
    values, slots, weights, error = (
        draw(3, 7, 4),
        chosen(5, 2, 7, lead=(3,)),
        draw(3, 5, 2, seed=1),
        draw(3, 5, 4, seed=2),
    )
    order = torch.tensor([2, 0, 1])
    read, written = slot_read(values, slots, weights), slot_write(values, slots, weights, error, scale=1.0)
    assert torch.equal(slot_read(values[order], slots[order], weights[order]), read[order])
    assert torch.equal(slot_write(values[order], slots[order], weights[order], error[order], scale=1.0), written[order])
    for sample in range(3):
        torch.testing.assert_close(
            slot_write(values[sample], slots[sample], weights[sample], error[sample], scale=1.0), written[sample]
        )


def test_results_do_not_depend_on_the_number_of_threads():
    values, slots = draw(300, 70, dtype=torch.float32), chosen(500, 8, 300)
    weights, error = draw(500, 8, seed=1, dtype=torch.float32), draw(500, 70, seed=2, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((slot_read(values, slots, weights), slot_write(values, slots, weights, error, scale=1.0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_counts_of_entries():
    slots = torch.tensor([[2, 0], [1, 0], [2, 0]])
    assert slot_counts(slots).tolist() == [[2, 3], [1, 3], [2, 3]]
    assert slot_counts(slots[:1], slots, mask=torch.tensor([True, True, False])).tolist() == [[1, 2]]
    assert slot_counts(slots, slots, mask=torch.zeros(3, dtype=torch.bool)).tolist() == [[1, 1]] * 3
    assert slot_counts(torch.stack((slots, slots)), per_sample=True).tolist() == [[[2, 3], [1, 3], [2, 3]]] * 2
    assert slot_counts(torch.stack((slots, slots)))[0].tolist() == [[4, 6], [2, 6], [4, 6]]


def test_the_last_dimension_may_be_empty_or_repeated():
    values = draw(4, 3)
    assert torch.equal(
        slot_read(values, torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.float64)),
        torch.zeros(2, 3, dtype=torch.float64),
    )
    twice = slot_read(values, torch.tensor([1, 1]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(twice, values[1])


def test_a_table_written_after_a_read_that_needs_it_is_an_error():
    values, slots = draw(9, 4).requires_grad_() * 1, chosen(6, 3, 9)
    read = slot_read(values, slots, draw(6, 3).requires_grad_())
    slot_write(values, slots, draw(6, 3), draw(6, 4), scale=1.0, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


def test_second_derivative_names_the_remedy():
    q, keys = draw(3, 1, 4).requires_grad_(), draw(1, 2, 5, 2, seed=1)
    (gradient,) = torch.autograd.grad(product_key_topk(q, keys, 2)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        gradient.sum().backward()


def test_one_node_each_for_torch_compile():
    def both(q, keys, values, target):
        scores, slots, _ = product_key_topk(q, keys, 2)
        weights, slots = scores.flatten(1).softmax(-1), slots.flatten(1)
        values = slot_write(values, slots, weights, slot_read(values, slots, weights) - target, scale=1.0)
        return slot_read(values, slots, weights).square()

    torch._dynamo.reset()
    inputs = [
        tensor.requires_grad_()
        for tensor in (draw(4, 2, 6), draw(2, 2, 5, 3, seed=1), draw(25, 3, seed=2), draw(4, 3, seed=3))
    ]
    got, expected = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs), both(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_operator_registration_is_sound():
    from papers10.kernels import product_key as module

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, keys = draw(2, 3, 2, 2, 4), draw(2, 2, 2, 5, 4, seed=1)
    torch.library.opcheck(module._topk_op, (q, keys, 3, "idw", 1e-3, "torch"), test_utils=checks)
    slots, weights = chosen(4, 3, 6), draw(4, 3)
    torch.library.opcheck(module._read_op, (draw(6, 5), slots, weights, "torch"), test_utils=checks)
    torch.library.opcheck(module._write_op, (draw(6, 5), slots, weights, draw(4, 5), 0.5, "torch"), test_utils=checks)


def test_a_chunk_needs_nothing_of_the_size_of_the_table():
    from papers10.core.bench import extra_memory

    values, slots = torch.zeros(200_000, 32), chosen(64, 8, 200_000)
    weights, target = torch.full((64, 8), 0.125, requires_grad=True), torch.ones(64, 32)

    def both_ways():
        read = slot_read(values.detach(), slots, weights, keep="rows")
        table = slot_write(values.detach(), slots, weights, read - target, scale=1.0, inplace=True)
        return torch.autograd.grad(slot_read(table, slots, weights, keep="rows").sum(), weights)

    both_ways()
    assert extra_memory(both_ways) < values.nbytes / 20


def test_bytes_that_must_move():
    case = {"op": "slot_read", "B": 0, "T": 1, "N": 512**2, "dv": 512, "R": 8, "direction": "forward"}
    assert product_key_bytes(case) == 9 * 512 * 4 + 8 * 12
    assert product_key_bytes({**case, "op": "slot_write"}) == 2 * 512**2 * 512 * 4 + 17 * 512 * 4 + 8 * 12


def test_what_ran_is_remembered():
    product_key_topk(draw(1, 1, 4), draw(1, 2, 3, 2), 1, backend="torch")
    assert last_backend("product_key") == "torch"


Q, KEYS = torch.zeros(4, 1, 6), torch.zeros(1, 2, 5, 3)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((Q[..., :5], KEYS, 2), {}, ValueError, "q: expected shape [..., H, dk] with an even dk, got [4, 1, 5]"),
        ((Q[0, 0], KEYS, 2), {}, ValueError, "q: expected shape [..., H, dk]"),
        ((Q, KEYS[..., :2], 2), {}, ValueError, "keys: expected shape [1, 2, n, 3]"),
        ((Q, KEYS[:, :1], 2), {}, ValueError, "got [1, 1, 5, 3]"),
        ((Q, KEYS[:, :, :0], 1), {}, ValueError, "keys: expected shape"),
        ((Q, KEYS[None].repeat(3, 1, 1, 1, 1), 2), {}, ValueError, "for each sample of q"),
        ((Q, KEYS, 6), {}, ValueError, "topk: expected a whole number from 1 to n = 5, got 6"),
        ((Q, KEYS, 0), {}, ValueError, "topk"),
        ((Q, KEYS, 2.0), {}, ValueError, "topk"),
        ((Q.long(), KEYS, 2), {}, TypeError, "q: expected a floating dtype, got torch.int64"),
        ((Q, None, 2), {}, TypeError, "keys: expected a tensor, got NoneType"),
        ((Q, KEYS.to("meta"), 2), {}, ValueError, "keys: expected the device of the first argument, cpu, got meta"),
        ((Q, KEYS, 2), {"score": "cosine"}, ValueError, "score: expected 'idw' or 'dot', got 'cosine'"),
        ((Q, KEYS, 2), {"eps": 0.0}, ValueError, "eps: expected a finite number > 0, got 0.0"),
        ((Q, KEYS, 2), {"backend": "trition"}, ValueError, "nearest: 'triton'"),
    ],
)
def test_bad_input_of_the_search_is_named(arguments, options, error, message):
    with pytest.raises(error) as caught:
        product_key_topk(*arguments, **options)
    assert message in str(caught.value)


V, S, W, E = torch.zeros(25, 2), torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3), torch.zeros(4, 2)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((V[0], S, W, E), {}, ValueError, "values: expected shape [N, dv] or [B, N, dv]"),
        ((V[:0], S, W, E), {}, ValueError, "N, dv >= 1"),
        ((V, S.float(), W, E), {}, TypeError, "slots: expected an integer dtype, got torch.float32"),
        ((V, S.bool(), W, E), {}, TypeError, "slots: expected an integer dtype"),
        ((V, S + 25, W, E), {}, IndexError, "slots: expected numbers from 0 to 24, got 25"),
        ((V, S - 1, W, E), {}, IndexError, "got -1"),
        ((V[None].repeat(3, 1, 1), S, W, E), {}, ValueError, "slots: expected shape [3, ..., R]"),
        ((V, S, W[:, :2], E), {}, ValueError, "weights: expected the shape of slots, [4, 3], got [4, 2]"),
        ((V, S, W, E[:, :1]), {}, ValueError, "error: expected shape [4, 2]"),
        ((V, S, W, E), {"counts": S}, ValueError, "counts: expected numbers >= 1, got 0"),
        ((V, S, W, E), {"counts": S[0]}, ValueError, "counts: expected the shape of slots"),
        ((V, S, W, E), {"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ((V, S, W, E), {"inplace": True, "backend": "reference"}, ValueError, "inplace: expected False"),
        ((V.clone().requires_grad_(), S, W, E), {"inplace": True}, ValueError, "inplace: expected a contiguous table"),
        ((torch.zeros(2, 25).T, S, W, E), {"inplace": True}, ValueError, "inplace: expected a contiguous table"),
    ],
)
def test_bad_input_of_a_write_is_named(arguments, options, error, message):
    with pytest.raises(error) as caught:
        slot_write(*arguments, **{"scale": 1.0, **options})
    assert message in str(caught.value)


def test_bad_input_of_a_read_and_of_counts_is_named():
    with pytest.raises(ValueError, match="keep: expected 'table' or 'rows', got 'all'"):
        slot_read(V, S, W, keep="all")
    with pytest.raises(IndexError, match="slots"):
        slot_read(V, S + 30, W)
    with pytest.raises(ValueError, match="mask"):
        slot_counts(S, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="slots"):
        slot_counts(W)


@pytest.mark.skipif(
    interpreting() or not installed("triton"), reason="Triton's interpreter is on, or Triton is not installed"
)
def test_triton_on_a_processor_says_what_to_do():
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        product_key_topk(Q, KEYS, 2, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_on_the_card():
    q, keys = draw(700, 2, 128, dtype=torch.float32).cuda(), draw(2, 2, 300, 64, seed=1, dtype=torch.float32).cuda()
    scores, slots, _ = product_key_topk(q, keys, 8)
    assert last_backend("product_key") == "triton"
    expected = product_key_topk(q.cpu().double(), keys.cpu().double(), 8)
    torch.testing.assert_close(scores.cpu().double(), expected[0], atol=1e-4, rtol=1e-4)
    values, error = (
        draw(300**2, 200, seed=2, dtype=torch.float32).cuda(),
        draw(700, 200, seed=3, dtype=torch.float32).cuda(),
    )
    slots, weights = slots.flatten(1), scores.flatten(1).softmax(-1)
    once, again = (slot_write(values, slots, weights, error, scale=1.0) for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(
        once, slot_write_reference(values, slots, weights, error, scale=1.0), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        slot_read(values, slots, weights), slot_read_reference(values, slots, weights), atol=1e-5, rtol=1e-5
    )
