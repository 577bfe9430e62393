"""splat.export: what is written comes back, other programs' files load, nothing non-finite is written, every refusal."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers10.core.random import generator
from papers10.splat import export as ex
from papers10.splat.gaussians import Gaussians

Y0 = 0.28209479177387814
ply = pytest.importorskip("plyfile", reason="needs plyfile (extra splat)")


def scene(n=7, *, coefficients=0, waves=0, phases=False, extra=(), dtype=torch.float32, seed=0):
    source = generator(seed, "export", n, coefficients, waves)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=dtype)

    color = {"sh": normal(n, coefficients, 3)} if coefficients else {"colors": normal(n, 3).sigmoid()}
    waved = {"waves": normal(n, waves, 3), "wave_weights": normal(n, waves).sigmoid()} if waves else {}
    if phases:
        waved["wave_phases"] = normal(n, waves)
    quats = torch.nn.functional.normalize(normal(n, 4), dim=-1)
    more = {name: normal(n, width) for name, width in extra}
    return Gaussians(normal(n, 3), quats, normal(n, 3).exp(), normal(n).sigmoid(), **color, **waved, extra=more)


def same(a, b, atol=2e-6):
    assert list(a.tensors()) == list(b.tensors())
    for name, value in a.tensors().items():
        torch.testing.assert_close(b.tensors()[name], value, atol=atol, rtol=2e-5)


def properties(path):
    return [item.name for item in ply.PlyData.read(str(path))["vertex"].properties]


class TestPly:
    @settings(max_examples=40, deadline=None)
    @given(
        n=st.integers(0, 9),
        coefficients=st.sampled_from([0, 1, 4, 9, 16]),
        waves=st.integers(0, 3),
        phases=st.booleans(),
        extra=st.dictionaries(st.from_regex(r"[A-Za-z0-9_]{1,6}", fullmatch=True), st.integers(1, 3), max_size=3),
        note=st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.none()), max_size=3),
    )
    def test_what_is_written_comes_back(self, tmp_path_factory, n, coefficients, waves, phases, extra, note):
        before = scene(n, coefficients=coefficients, waves=waves, phases=phases and waves > 0, extra=extra.items())
        path = ex.save_ply(tmp_path_factory.mktemp("ply") / "deep" / "a.ply", before, metadata=note)
        after, metadata = ex.load_ply(path)
        same(before, after)
        assert metadata == note and [item.name for item in path.parent.iterdir()] == ["a.ply"]

    def test_plain_fields_come_first_and_are_little_endian(self, tmp_path):
        before = scene(3, coefficients=4, waves=2, phases=True, extra=[("mask", 2)])
        path = ex.save_ply(tmp_path / "a.ply", before)
        plain = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(9))]
        plain += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
        own = [f"wave_{wave}_{axis}" for wave in range(2) for axis in "xyz"]
        own += ["wave_w_0", "wave_w_1", "wave_phi_0", "wave_phi_1", "extra_mask_0", "extra_mask_1"]
        assert properties(path) == plain + own
        assert path.read_bytes().startswith(b"ply\nformat binary_little_endian 1.0\ncomment papers10 {")

    def test_hand_values(self, tmp_path):
        sh = torch.arange(12.0).reshape(1, 4, 3)
        one = Gaussians(
            torch.ones(1, 3), torch.tensor([[0.0, 0, 3, 4]]), torch.full((1, 3), math.e), torch.full((1,), 0.75), sh=sh
        )
        data = ply.PlyData.read(str(ex.save_ply(tmp_path / "a.ply", one)))["vertex"]
        assert [float(data[f"f_dc_{i}"][0]) for i in range(3)] == [0, 1, 2]
        assert [float(data[f"f_rest_{i}"][0]) for i in range(9)] == [3, 6, 9, 4, 7, 10, 5, 8, 11]
        assert float(data["opacity"][0]) == pytest.approx(math.log(3))
        assert float(data["scale_1"][0]) == pytest.approx(1)
        assert [float(data[f"rot_{i}"][0]) for i in range(4)] == pytest.approx([0, 0, 0.6, 0.8])
        plain = one.replace(sh=None, colors=torch.tensor([[0.5, 1.0, 0.0]]))
        data = ply.PlyData.read(str(ex.save_ply(tmp_path / "b.ply", plain)))["vertex"]
        wanted = [0, 0.5 / Y0, -0.5 / Y0]
        assert [float(data[f"f_dc_{i}"][0]) for i in range(3)] == pytest.approx(wanted)

    def test_float64_and_gradients_are_taken(self, tmp_path):
        before = scene(4, waves=1, dtype=torch.float64)
        wanting = before.replace(means=before.means.clone().requires_grad_())
        after, _ = ex.load_ply(ex.save_ply(tmp_path / "a.ply", wanting))
        same(before.to(torch.float32), after)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_nothing_non_finite_is_written(self, tmp_path, dtype):
        before = scene(4, dtype=dtype)
        opacities = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype)
        scales = torch.tensor([[0.0, 1.0, 3.0]], dtype=dtype).expand(4, 3)
        if dtype == torch.float64:
            scales = torch.cat([torch.tensor([[1e-300, 1e300, 1.0]], dtype=dtype), scales[1:]])
        path = ex.save_ply(tmp_path / "a.ply", before.replace(opacities=opacities, scales=scales))
        data = ply.PlyData.read(str(path))["vertex"]
        assert all(np.isfinite(data[name]).all() for name in properties(path))
        after, _ = ex.load_ply(path)
        assert after.opacities.tolist() == pytest.approx([0, 1, 0, 1], abs=2e-7)
        assert (after.scales > 0).all() and torch.isfinite(after.scales).all()

    def test_a_file_of_gsplat(self, tmp_path):
        exporter = pytest.importorskip("gsplat.exporter", reason="needs gsplat (extra splat)")
        before = scene(20, coefficients=16)
        fields = (before.means, before.scales.log(), before.quats, before.opacities.logit())
        exporter.export_splats(*fields, before.sh[:, :1], before.sh[:, 1:], "ply", str(tmp_path / "a.ply"))
        after, metadata = ex.load_ply(tmp_path / "a.ply")
        same(before, after)
        assert metadata == {}
        exporter.export_splats(*fields, before.sh[:, :1], before.sh[:, :0], "ply", str(tmp_path / "b.ply"))
        assert ex.load_ply(tmp_path / "b.ply")[0].sh.shape == (20, 1, 3)

    @pytest.mark.parametrize(("text", "order"), [(True, "="), (False, ">"), (False, "<")])
    def test_other_forms_of_the_format(self, tmp_path, text, order):
        before = scene(5)
        ex.save_ply(tmp_path / "a.ply", before)
        content = ply.PlyData.read(str(tmp_path / "a.ply"))
        old = content["vertex"].data
        wide = np.zeros(5, [("red", "u1"), *((name, "f8") for name in old.dtype.names)])
        for name in old.dtype.names:
            wide[name] = old[name]
        wide = [ply.PlyElement.describe(wide, "vertex")]
        ply.PlyData(wide, text=text, byte_order=order, comments=["by hand"]).write(str(tmp_path / "b.ply"))
        after, metadata = ex.load_ply(tmp_path / "b.ply")
        assert metadata == {}
        same(before, after.replace(sh=None, colors=0.5 + Y0 * after.sh[:, 0]))

    def test_missing_properties_are_named(self, tmp_path):
        ex.save_ply(tmp_path / "a.ply", scene(2, coefficients=4, waves=1, phases=True, extra=[("m", 2)]))
        data = ply.PlyData.read(str(tmp_path / "a.ply"))["vertex"].data

        def without(*names):
            kept = [name for name in data.dtype.names if name not in names]
            element = ply.PlyElement.describe(np.array(data[kept].tolist(), [(name, "f4") for name in kept]), "vertex")
            ply.PlyData([element]).write(str(tmp_path / "b.ply"))
            return tmp_path / "b.ply"

        for names in (("opacity", "rot_3"), ("wave_w_0",), ("wave_0_y",), ("extra_m_0",)):
            with pytest.raises(ValueError, match=f"path: expected the properties {', '.join(names)} in"):
                ex.load_ply(without(*names))
        with pytest.raises(ValueError, match="expected 0, 9, 24 or 45 properties f_rest"):
            ex.load_ply(without("f_rest_8"))
        with pytest.raises(ValueError, match="properties f_rest_3 in"):
            ex.load_ply(without("f_rest_3"))
        assert ex.load_ply(without("nx", "ny", "nz", "wave_phi_0"))[0].wave_phases is None

    def test_damaged_files(self, tmp_path):
        path = ex.save_ply(tmp_path / "a.ply", scene(3))
        whole = path.read_bytes()
        for content in (b"", b"not a ply", whole[:-5], b"\x89PNG\r\n\xff\xfe"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="path: expected a PLY file"):
                ex.load_ply(path)
        path.write_bytes(whole.replace(b'{"format', b"{,format"))
        with pytest.raises(ValueError, match="expected JSON in the comment"):
            ex.load_ply(path)
        path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
        with pytest.raises((ValueError, ArithmeticError), match="quats"):
            ex.load_ply(path)
        faces = ply.PlyElement.describe(np.zeros(1, [("a", "f4")]), "face")
        ply.PlyData([faces]).write(str(path))
        with pytest.raises(ValueError, match="expected an element vertex in .* got face"):
            ex.load_ply(path)
        with pytest.raises(FileNotFoundError):
            ex.load_ply(tmp_path / "none.ply")

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"colors": torch.ones(7, 1)}, ValueError, "colors: expected three channels, got 1"),
            ({"opacities": torch.full((7,), 1.5)}, ValueError, "opacities"),
            ({"scales": -torch.ones(7, 3)}, ValueError, "scales"),
            ({"quats": torch.zeros(7, 4)}, ValueError, "quats"),
            ({"extra": {"a b": torch.ones(7, 1)}}, ValueError, "letters, digits and underscores, got 'a b'"),
            ({"means": torch.full((7, 3), math.nan)}, (ValueError, ArithmeticError), "means"),
        ],
    )
    def test_refused_sets(self, tmp_path, change, error, words):
        with pytest.raises(error, match=words):
            ex.save_ply(tmp_path / "a.ply", scene().replace(**change))
        assert not list(tmp_path.iterdir())

    def test_other_refusals(self, tmp_path):
        wide = scene(dtype=torch.float64)
        with pytest.raises(ValueError, match="gaussians: expected numbers that float32 holds in x"):
            ex.save_ply(tmp_path / "a.ply", wide.replace(means=wide.means * 1e200))
        batch = Gaussians(*(value[None] for value in scene().tensors().values()))
        with pytest.raises(ValueError, match="gaussians: expected one set"):
            ex.save_ply(tmp_path / "a.ply", batch)
        with pytest.raises(TypeError, match="gaussians: expected Gaussians, got dict"):
            ex.save_ply(tmp_path / "a.ply", {})
        for bad in ({"a": torch.ones(1)}, [1]):
            with pytest.raises(TypeError, match="metadata"):
                ex.save_ply(tmp_path / "a.ply", scene(), metadata=bad)
        with pytest.raises(ValueError, match="metadata"):
            ex.save_ply(tmp_path / "a.ply", scene(), metadata={"a": math.nan})

    def test_an_older_file_survives_a_failure(self, tmp_path, monkeypatch):
        path = ex.save_ply(tmp_path / "a.ply", scene(2))
        before = path.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            ex.save_ply(path, scene(5))
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class TestSplat:
    def test_one_record_by_hand(self, tmp_path):
        colors, opacity = torch.tensor([[1.0, 0.0, 0.2]]), torch.tensor([0.4])
        one = Gaussians(
            torch.tensor([[1.0, 2, 3]]), torch.tensor([[0.0, 2, 0, 0]]), torch.tensor([[4.0, 5, 6]]), opacity, colors
        )
        data = ex.save_splat(tmp_path / "a.splat", one).read_bytes()
        assert data == np.array([1, 2, 3, 4, 5, 6], "<f4").tobytes() + bytes([255, 0, 51, 102, 128, 255, 128, 128])

    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(0, 20), coefficients=st.sampled_from([0, 1]), seed=st.integers(0, 99))
    def test_what_is_written_comes_back(self, tmp_path_factory, n, coefficients, seed):
        before = scene(n, coefficients=coefficients, seed=seed)
        path = ex.save_splat(tmp_path_factory.mktemp("splat") / "a.splat", before)
        after = ex.load_splat(path)
        assert path.stat().st_size == 32 * n
        colors = before.colors if coefficients == 0 else (0.5 + Y0 * before.sh[:, 0]).clamp(0, 1)
        torch.testing.assert_close(after.means, before.means, atol=0, rtol=0)
        torch.testing.assert_close(after.scales, before.scales, atol=0, rtol=1e-6)
        torch.testing.assert_close(after.colors, colors, atol=0.5 / 255 + 1e-6, rtol=0)
        torch.testing.assert_close(after.opacities, before.opacities, atol=0.5 / 255 + 1e-6, rtol=0)
        # One byte is 1/128; the largest value, 1, is cut to 127/128.
        assert ((after.quats * before.quats).sum(-1).abs() > 0.9998).all()
        assert ex.save_splat(path.with_name("b.splat"), after).stat().st_size == 32 * n

    def test_a_file_of_gsplat(self, tmp_path):
        exporter = pytest.importorskip("gsplat.exporter", reason="needs gsplat (extra splat)")
        before = scene(9, coefficients=1)
        fields = (before.means, before.scales.log(), before.quats, before.opacities.logit())
        exporter.export_splats(*fields, before.sh, before.sh[:, :0], "splat", str(tmp_path / "a.splat"))
        after = ex.load_splat(tmp_path / "a.splat")
        order = (before.means[:, None] - after.means).norm(dim=-1).argmin(0)
        torch.testing.assert_close(after.means, before.means[order])
        torch.testing.assert_close(after.opacities, before.opacities[order], atol=1 / 255 + 1e-6, rtol=0)

    def test_what_has_no_place_is_refused_unless_dropped(self, tmp_path):
        full = scene(3, coefficients=4, waves=1, extra=[("m", 1)])
        with pytest.raises(ValueError, match=r"got waves, wave_weights, extra\.m, sh above degree 0; drop=True"):
            ex.save_splat(tmp_path / "a.splat", full)
        after = ex.load_splat(ex.save_splat(tmp_path / "a.splat", full, drop=True))
        assert list(after.tensors()) == ["means", "quats", "scales", "opacities", "colors"]

    def test_odd_files(self, tmp_path):
        path = tmp_path / "a.splat"
        path.write_bytes(np.array([0, 0, 0, 0, -2, 1], "<f4").tobytes() + bytes([1, 2, 3, 4, 128, 128, 128, 128]))
        after = ex.load_splat(path)
        assert after.quats.tolist() == [[1, 0, 0, 0]] and (after.scales > 0).all()
        path.write_bytes(bytes(33))
        with pytest.raises(ValueError, match="path: expected 32 bytes a primitive in .*, got 33 bytes"):
            ex.load_splat(path)
        path.write_bytes(np.full(8, np.nan, "<f4").tobytes())
        with pytest.raises((ValueError, ArithmeticError), match="means"):
            ex.load_splat(path)
        with pytest.raises(FileNotFoundError):
            ex.load_splat(tmp_path / "none.splat")


class TestScene:
    @pytest.mark.parametrize("name", ["", "run.1", "run.safetensors", "run.json", "new/run"])
    def test_what_is_written_comes_back(self, tmp_path, name):
        base = torch.arange(12).reshape(3, 4)
        tensors = {
            "a": base.T,
            "b": base[1:],
            "c": torch.rand(2, 0),
            "d": torch.tensor(True),
            "e": torch.rand(3).half(),
        }
        note = {"text": "ä", "list": [1, 2.5, None]}
        place = ex.save_scene(tmp_path / name, tensors, note)
        after, metadata = ex.load_scene(tmp_path / name)
        assert metadata == note and set(after) == set(tensors)
        assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in tensors.items())
        assert place.name == {"": "scene", "run.1": "run.1"}.get(name, "run") + ".safetensors"
        readable = json.loads(place.with_name(place.name.replace(".safetensors", ".json")).read_text())
        assert readable["metadata"] == note and readable["tensors"]["a"] == {"shape": [4, 3], "dtype": "int64"}

    def test_refusals(self, tmp_path):
        for bad in ({"a": 1}, {1: torch.ones(1)}, [torch.ones(1)]):
            with pytest.raises(TypeError, match="tensors"):
                ex.save_scene(tmp_path, bad)
        with pytest.raises(TypeError, match="metadata"):
            ex.save_scene(tmp_path, {}, {"a": {1, 2}})
        with pytest.raises(FileNotFoundError, match="path: expected"):
            ex.load_scene(tmp_path)
        (tmp_path / "scene.safetensors").write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="path: expected a safetensors file"):
            ex.load_scene(tmp_path)

    def test_files_of_other_programs(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"w": torch.ones(2)}, str(tmp_path / "a.safetensors"))
        tensors, metadata = ex.load_scene(tmp_path / "a.safetensors")
        assert tensors["w"].tolist() == [1, 1] and metadata == {}


def test_without_plyfile_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plyfile", None)
    with pytest.raises(ImportError, match=r"plyfile is needed for PLY files: pip install 'papers10\[splat\]'"):
        ex.save_ply(tmp_path / "a.ply", scene())
