"""Messages: made, checked, fenced; JSON read back."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papers10.agents import messages as m

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def test_a_picture_goes_in_and_comes_out():
    import base64
    import io

    from PIL import Image

    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    url = m.user("look", [picture])["content"][1]["image_url"]["url"]
    back = np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))))
    assert (back == picture).all()
    assert m.image_part("https://example.org/a.png")["image_url"]["url"] == "https://example.org/a.png"


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        (np.zeros((2, 2, 3)), TypeError),
        ([[0]], TypeError),
        (np.zeros((2, 2), np.uint8), ValueError),
        (np.zeros((0, 2, 3), np.uint8), ValueError),
    ],
)
def test_what_is_no_picture_is_refused(picture, error):
    with pytest.raises(error, match="picture: expected"):
        m.picture_url(picture)


def test_a_whole_talk_passes():
    talk = [m.system("s"), m.user("u"), m.assistant(None, [CALL]), m.tool_result("c1", "seen"), m.assistant("done")]
    assert m.check_messages(talk) == talk


@pytest.mark.parametrize(
    ("talk", "error", "message"),
    [
        ("hello", TypeError, "messages: expected a list"),
        ({"role": "user"}, TypeError, "messages: expected a list"),
        ([], ValueError, "at least one message"),
        ([{"role": "robot", "content": "x"}], ValueError, r"messages\[0\]: expected a role"),
        (["x"], ValueError, r"messages\[0\]: expected a role"),
        ([{"role": "user", "content": None}], ValueError, r"messages\[0\]: expected a content or tool calls"),
        (
            [{"role": "user", "content": [{"text": "x"}]}],
            ValueError,
            r"messages\[0\]: expected a text or a list of parts",
        ),
        ([m.user("u"), m.tool_result("c1", "x")], ValueError, r"messages\[1\]: expected the result of an open call"),
        (
            [m.user("u"), m.assistant(None, [CALL]), m.user("v")],
            ValueError,
            r"messages\[2\]: expected the result of the call 'c1'",
        ),
        ([m.user("u"), m.assistant(None, [CALL])], ValueError, "expected a result for the call 'c1'"),
    ],
)
def test_mistakes_are_named_with_their_place(talk, error, message):
    with pytest.raises(error, match=message):
        m.check_messages(talk)


@given(st.text(alphabet="<>ab \n"))
def test_a_fence_cannot_be_closed_from_inside(text):
    inside = m.fenced(text).removeprefix("<<<\n").removesuffix("\n>>>")
    assert "<<<" not in inside and ">>>" not in inside


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
def test_valid_json_is_read_as_it_is_between_prose(data):
    assert m.read_json(f"Here: ```json\n{json.dumps(data)}\n``` done }}") == data


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1, 2,],}', {"a": [1, 2]}),
        ('{"a": ", ]"}', {"a": ", ]"}),
        ('{"a": {"b": "cut', {"a": {"b": "cut"}}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": "line\nbreak"}', {"a": "line\nbreak"}),
        ('{"a": "quote \\" inside"} {"b": 1}', {"a": 'quote " inside'}),
    ],
)
def test_what_can_be_mended_is_mended(text, found):
    assert m.read_json(text) == found


@pytest.mark.parametrize("text", ["", "no object", "{broken: 1}", "[1, 2]"])
def test_the_rest_is_refused_with_its_beginning(text):
    with pytest.raises(ValueError, match="expected a JSON object"):
        m.read_json(text)
