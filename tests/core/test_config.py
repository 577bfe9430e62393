"""core.config: strict types, unknown keys, nested errors, round trips."""

import json
import pickle
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from papers10.core.config import Config, ConfigError, from_mapping, replace, to_mapping


class Inner(Config):
    rate: float = Field(default=0.1, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Outer(Config):
    steps: int
    kind: Literal["add", "ddl"] = "ddl"
    inner: Inner = Inner()
    maybe: Inner | None = None
    sizes: tuple[int, ...] | None = None
    names: list[str] = Field(default_factory=list)

    @field_validator("steps")
    @classmethod
    def _even(cls, value):
        if value % 2:
            raise ValueError(f"expected an even number, got {value}")
        return value


@given(
    st.integers(-1000, 1000).map(lambda n: 2 * n),
    st.floats(1e-6, 1e6),
    st.none() | st.lists(st.integers(), max_size=4),
    st.lists(st.text()),
    st.booleans(),
)
def test_round_trip_through_json(steps, rate, sizes, names, nested):
    config = Outer(
        steps=steps, inner=Inner(rate=rate), sizes=sizes, names=names, maybe=Inner(rate=rate) if nested else None
    )
    assert from_mapping(Outer, json.loads(json.dumps(to_mapping(config)))) == config


def test_int_stands_for_float():
    assert from_mapping(Inner, {"rate": 1}).rate == 1.0


@pytest.mark.parametrize(
    ("data", "key", "nearest"),
    [
        ({"step": 2}, "step", "steps"),
        ({}, "steps", None),
        ({"steps": "2"}, "steps", None),
        ({"steps": True}, "steps", None),
        ({"steps": 2.0}, "steps", None),
        ({"steps": 2, "kind": "dll"}, "kind", "ddl"),
        ({"steps": 2, "inner": {"rat": 1.0}}, "inner.rat", "rate"),
        ({"steps": 2, "maybe": {"betas": [1.0]}}, "maybe.betas.1", None),
        ({"steps": 2, "inner": {"rate": 0}}, "inner.rate", None),
        ({"steps": 3}, "steps", None),
    ],
)
def test_errors_name_path_key_and_nearest(data, key, nearest):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, data, path="small.yaml")
    error = caught.value
    place = f"{error.path}.{error.key}"
    assert place.startswith("small.yaml.") and place.endswith(key) and error.nearest == nearest
    assert str(error).startswith(f"{place}: ")
    if nearest:
        assert f"did you mean {nearest!r}?" in str(error)


def test_constructor_raises_the_same():
    with pytest.raises(ConfigError, match="unknown key"):
        Outer(steps=2, kinds="add")
    with pytest.raises(ConfigError, match="expected greater than 0, got -1"):
        Inner(rate=-1)


def test_a_validator_speaks_for_itself():
    with pytest.raises(ConfigError, match="^steps: expected an even number, got 3$"):
        Outer(steps=3)


def test_unknown_key_without_a_near_name_lists_all():
    with pytest.raises(ConfigError, match="expected one of rate, betas"):
        Inner(zzzzz=1)


@pytest.mark.parametrize("data", [[1], "x", None])
def test_no_mapping(data):
    with pytest.raises(ConfigError, match="expected a mapping"):
        from_mapping(Outer, data)


def test_keys_are_names():
    with pytest.raises(ConfigError, match="expected names as keys, got 1"):
        from_mapping(Outer, {1: 2})


def test_frozen_hashable_and_pickled():
    inner = Inner()
    with pytest.raises(ValueError, match="frozen"):
        inner.rate = 1.0
    assert hash(inner) == hash(Inner()) and pickle.loads(pickle.dumps(inner)) == inner


def test_replace_checks_again():
    config = Outer(steps=2)
    assert replace(config, steps=4) == Outer(steps=4) and config.steps == 2
    with pytest.raises(ConfigError):
        replace(config, steps=5)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        replace(config, step=4)


def test_config_error_pickles():
    error = ConfigError("unknown key", path="a.yaml", key="b", value=1, nearest="c")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.yaml.b: unknown key (did you mean 'c'?)" and copy.nearest == "c"
