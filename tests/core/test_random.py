"""core.random: streams depend on their name only."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papers10.core.random import generator, numpy_generator, stream_seed

parts = st.lists(st.text(max_size=5) | st.integers(-5, 5), max_size=3).map(tuple)


@given(st.integers(0, 10), parts, st.integers(0, 10), parts)
def test_streams_are_told_apart(seed, stream, other_seed, other):
    same = (seed, stream) == (other_seed, other) and [type(p) for p in stream] == [type(p) for p in other]
    assert (stream_seed(seed, *stream) == stream_seed(other_seed, *other)) == same


def test_the_hash_never_changes():
    # Results of record depend on these numbers.
    assert stream_seed(0, "data", 3) == 3688927981959344775
    assert torch.randint(1 << 30, (1,), generator=generator(0, "data", 3)).item() == 791201373


def test_same_in_another_process():
    code = "from papers10.core.random import stream_seed; print(stream_seed(7, 'a', 1))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == stream_seed(7, "a", 1)


def test_streams_do_not_disturb_each_other_or_the_global_state():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(5, generator=generator(0, "x"))
    assert torch.equal(torch.rand(3), expected)
    assert numpy_generator(1, "x").random() == numpy_generator(1, "x").random() != numpy_generator(1, "y").random()


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("0", TypeError)])
def test_bad_seed(seed, error):
    with pytest.raises(error, match="^seed: expected an int >= 0, got"):
        generator(seed)


@pytest.mark.parametrize("part", [1.5, None, True, ("a",)])
def test_bad_stream(part):
    with pytest.raises(TypeError, match=r"^stream\[1\]: expected str or int"):
        stream_seed(0, "a", part)
