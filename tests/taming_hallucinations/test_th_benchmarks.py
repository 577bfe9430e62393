"""What the chapter's bench times: every path against its slow form, memory by formula, and what the command finds."""

import pytest
import torch

from papers10.core.bench import extra_memory, find_specs
from papers10.kernels.harness import check_parity, make_operands, parity_cases
from papers10.kernels.token_logp import token_logp
from papers10.taming_hallucinations.benchmarks import advantages, bench_specs, logit_memory, row_by_row

COMPARISONS = [(spec, comparison) for spec in bench_specs() for comparison in parity_cases(spec)]


@pytest.mark.parametrize("spec, comparison", COMPARISONS, ids=[comparison.label for _, comparison in COMPARISONS])
def test_paths_agree_with_their_slow_form(spec, comparison):
    check_parity(spec, comparison)


def test_the_command_finds_the_kernel_and_the_specs_of_the_chapter():
    assert {"token_logp", "th_advantages", "th_clips", "th_pixel_edit"} <= {
        spec.name for spec in find_specs(["taming-hallucinations"])
    }


def test_peers_say_the_same():
    advantages_spec, _, edits = bench_specs()
    operands = make_operands(advantages_spec, {"op": "neighbours", "rows": 96})
    # float32 sums in another order.
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(advantages_spec.peers["view(-1, G)"]()(**operands), advantages(**operands), **near)
    operands = make_operands(advantages_spec, {"op": "any order", "rows": 96})
    torch.testing.assert_close(row_by_row(operands["rewards"], operands["order"] // 16), advantages(**operands), **near)
    pytest.importorskip("cv2")
    operands = make_operands(edits, edits.cases[0])
    assert torch.equal(edits.peers["OpenCV, frame by frame"]()(**operands), edits.ops["edit"](**operands))


def test_memory_of_the_logits_by_formula():
    paper = logit_memory(16_384, 152_064, 3584)
    assert paper["log_softmax + gather"] == 4 * 16_384 * 152_064 * 2
    assert paper["token_logp"] == pytest.approx(9.966e9, rel=1e-3)
    assert paper["linear_token_logp"] == pytest.approx(2.784e9, rel=1e-3)
    logits, ids = torch.zeros(40, 30_000, requires_grad=True), torch.zeros(40, dtype=torch.int64)
    measured = 2 * logits.nbytes + extra_memory(lambda: torch.autograd.grad(token_logp(logits, ids).sum(), logits))
    # The processor also keeps a piece of a few rows in its cache.
    assert measured == pytest.approx(logit_memory(40, 30_000, 1, element=4)["token_logp"], rel=0.3)


@pytest.mark.parametrize("name", ["tokens", "vocabulary", "width", "element"])
def test_bad_sizes_are_named(name):
    with pytest.raises(ValueError, match=name):
        logit_memory(**{"tokens": 1, "vocabulary": 1, "width": 1, name: 0})
