"""The store of keys and values of the frame before."""

import pytest
import torch
from safetensors.torch import save_file

from papers10.flow.cache import CacheMissError, StepKV, turned_places


def tensors(seed: int = 0, tokens: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, 4, generator=generator), torch.randn(2, 3, tokens, 4, generator=generator)


@pytest.fixture(params=["same", "cpu", "disk", "pinned"])
def store(request, tmp_path):
    return StepKV(request.param, folder=tmp_path if request.param == "disk" else None)


def test_reading_gives_the_frame_before(store):
    for frame in range(3):
        keys, values = tensors(frame)
        before = store.get("ss", 0, 0, like=keys)
        if frame:
            assert torch.equal(before.keys, tensors(frame - 1)[0]) and torch.equal(before.values, tensors(frame - 1)[1]) and before.frame == frame - 1
        else:
            assert before is None
        store.put("ss", 0, 0, keys, values)
        store.advance()
    assert len(store) == 1 and (store.reads, store.writes) == (2, 3)


def test_what_was_read_is_not_overwritten_before_the_next_put(store):
    store.put("ss", 0, 0, *tensors(0))
    store.advance()
    before = store.get("ss", 0, 0)
    assert torch.equal(before.keys, tensors(0)[0])


def test_sets_of_another_size_replace(store):
    for frame, tokens in enumerate((5, 9, 2)):
        store.get("slat", 0, "a")
        store.put("slat", 0, "a", *tensors(frame, tokens))
        store.advance()
    assert store.get("slat", 0, "a").keys.shape == (2, 3, 2, 4)


def test_a_missing_place_is_named():
    store = StepKV()
    store.put("ss", 0, 0, *tensors())
    store.advance()
    with pytest.raises(CacheMissError, match="step 7"):
        store.get("ss", 7, 0)


def test_a_frame_that_was_left_out_is_not_there():
    store = StepKV()
    store.put("ss", 0, 0, *tensors())
    store.advance()
    store.advance()
    with pytest.raises(CacheMissError):
        store.get("ss", 0, 0)


def test_reading_after_writing_in_the_same_frame_is_refused():
    store = StepKV()
    store.advance()
    store.put("ss", 0, 0, *tensors())
    with pytest.raises(CacheMissError):
        store.get("ss", 0, 0)


def test_lenient_warns_once():
    store = StepKV(strict=False)
    store.advance()
    with pytest.warns(UserWarning, match="goes on without"):
        assert store.get("ss", 0, 0) is None
    assert store.get("ss", 1, 0) is None


@pytest.mark.parametrize(("dtype", "bytes_per_number", "tolerance"), [(torch.float16, 2, 2e-3), (torch.bfloat16, 2, 2e-2), (torch.float8_e4m3fn, 1, 0.25)])
def test_narrow_entries(dtype, bytes_per_number, tolerance):
    # Tolerances: half a unit in the last place of the narrow dtype at magnitude 4.
    store = StepKV(dtype=dtype)
    keys, values = tensors()
    store.put("ss", 0, 0, keys, values)
    store.advance()
    entry = store.get("ss", 0, 0, like=keys)
    assert entry.keys.dtype == torch.float32
    torch.testing.assert_close(entry.keys, keys, rtol=0, atol=tolerance)
    assert keys.numel() * 2 * bytes_per_number <= store.nbytes < keys.numel() * 2 * bytes_per_number + 64


def test_float8_keeps_large_heads():
    store = StepKV(dtype=torch.float8_e4m3fn)
    keys = torch.tensor([1e-4, 1.0, 3e4]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4).contiguous()
    store.put("ss", 0, 0, keys, keys)
    store.advance()
    torch.testing.assert_close(store.get("ss", 0, 0, like=keys).keys, keys, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", ["same", "disk"])
def test_rotation_turns_places_of_the_present_frame(tmp_path, device):
    store = StepKV(device, folder=tmp_path if device == "disk" else None)
    places = torch.tensor([[0, 0, 1], [1, 2, 3], [3, 3, 0], [2, 0, 0], [0, 1, 2]])
    store.put("ss", 0, 0, *tensors(), positions=places)
    store.put("slat", 0, 0, *tensors(), positions=places)
    store.rotate("ss", 1, 4)
    store.advance()
    assert torch.equal(store.get("ss", 0, 0).positions, torch.stack((3 - places[:, 1], places[:, 0], places[:, 2]), 1))
    assert torch.equal(store.get("slat", 0, 0).positions, places)
    assert torch.equal(turned_places(places, 4, 4), places)


def test_saved_and_loaded(tmp_path):
    store = StepKV(dtype=torch.float16)
    store.put("ss", 3, "blocks.0.attn", *tensors(), positions=torch.zeros(5, 3, dtype=torch.int64))
    store.put("slat", 0, "b", *(tensor[0].transpose(0, 1) for tensor in tensors()), cu_seqlens=torch.tensor([0, 2, 5]))
    store.advance()
    again = StepKV().load(store.save(tmp_path / "keys.safetensors"))
    for place in (("ss", 3, "blocks.0.attn"), ("slat", 0, "b")):
        first, second = store.get(*place), again.get(*place)
        assert torch.equal(first.keys, second.keys) and first.keys.dtype == second.keys.dtype == torch.float32
    assert torch.equal(again.get("slat", 0, "b").cu_seqlens, torch.tensor([0, 2, 5]))


def test_files_of_others_stay(tmp_path):
    store = StepKV("disk", folder=tmp_path, namespace={"beta": 0.2})
    other = StepKV("disk", folder=tmp_path, namespace={"beta": 0.4})
    assert store.folder != other.folder
    (store.folder / "mine.txt").write_text("mine")
    store.put("ss", 0, 0, *tensors())
    store.clear()
    assert [path.name for path in store.folder.iterdir()] == ["mine.txt"]


def test_a_file_that_is_gone_is_named(tmp_path):
    store = StepKV("disk", folder=tmp_path)
    store.put("ss", 0, 0, *tensors())
    store.advance()
    for path in store.folder.iterdir():
        path.unlink()
    with pytest.raises(CacheMissError, match="is gone"):
        store.get("ss", 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"device": "dsk"}, "device"), ({"device": "disk"}, "folder"), ({"device": "cpu", "folder": "x"}, "folder"), ({"dtype": torch.int8}, "dtype")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepKV(**arguments)


def test_bad_entries(tmp_path):
    keys, values = tensors()
    with pytest.raises(ValueError, match="values"):
        StepKV().put("ss", 0, 0, keys, values[:, :, :3])
    with pytest.raises(ValueError, match="positions"):
        StepKV().put("ss", 0, 0, keys, values, positions=torch.zeros(4, 3))
    save_file({"a": keys}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="written by"):
        StepKV().load(tmp_path / "x.safetensors")
