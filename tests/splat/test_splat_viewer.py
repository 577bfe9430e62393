"""splat.viewer: the page draws what `render` draws, in a real browser where there is one; the live viewer gets the right arrays."""

import base64
import json
import math
import re
import socket
import sys
import time
import types
import urllib.request

import numpy as np
import pytest
import torch

from papers10.core.random import generator
from papers10.splat import viewer
from papers10.splat.cameras import look_at, orbit, pinhole_cameras, project_points
from papers10.splat.gaussians import Gaussians
from papers10.splat.render import render
from papers10.splat.rotations import quat_to_matrix

FLAGS = ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=900,900"]


def scene(n=12, *, waves=0, phases=False, seed=0, **changes):
    source = generator(seed, "viewer", n, waves)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    waved = {"waves": 3 * normal(n, waves, 3), "wave_weights": normal(n, waves).sigmoid()} if waves else {}
    if phases:
        waved["wave_phases"] = normal(n, waves)
    scales = (0.4 * normal(n, 3) - 1.5).exp()
    colors = (255 * normal(n, 3).sigmoid()).round() / 255
    made = Gaussians(normal(n, 3), normal(n, 4), scales, normal(n).add(1).sigmoid(), colors, **waved)
    return made.replace(**changes)


def data(path):
    text = path.read_text()
    found = json.loads(re.search(r"^const scene = (.*);$", text, re.MULTILINE)[1])
    kinds = {"f": "<f4", "b": "u1"}
    found["blobs"] = [np.frombuffer(base64.b64decode(blob), kinds[kind]) for kind, blob in found["blobs"]]
    return found


class TestPage:
    def test_it_carries_the_scene_and_asks_for_nothing(self, tmp_path):
        sets = [scene(waves=2, phases=True), scene(5)]
        path = viewer.static_page(tmp_path / "deep" / "a.html", sets, times=[2, 5.5], title="<b> {{SCENE}}")
        text, found = path.read_text(), data(path)
        assert "<title>&lt;b&gt; {{SCENE}}</title>" in text and "default-src 'none'" in text
        program = re.sub(r'"[A-Za-z0-9+/=]{40,}"', '""', text)
        assert not re.search(r"https?:|//[a-z]|<link(?! rel=.icon. href=.data:)|@import|fetch\(|XMLHttp|src=", program)
        assert found["times"] == [2, 5.5] and [frame["n"] for frame in found["frames"]] == [12, 5]
        frame, blobs = found["frames"][0], found["blobs"]
        np.testing.assert_allclose(blobs[frame["means"]].reshape(12, 3), sets[0].means, rtol=1e-6)
        axes = quat_to_matrix(sets[0].quats) * sets[0].scales[:, None]
        np.testing.assert_allclose(blobs[frame["axes"]].reshape(12, 3, 3), axes, atol=1e-6)
        np.testing.assert_array_equal(blobs[frame["rgba"]].reshape(12, 3), (255 * sets[0].colors).round())
        np.testing.assert_allclose(blobs[frame["wave"]].reshape(12, 2, 5)[..., 4], sets[0].wave_phases, rtol=1e-6)
        assert found["frames"][1]["waves"] == 0 and [item.name for item in path.parent.iterdir()] == ["a.html"]

    def test_what_stands_still_is_stored_once(self, tmp_path):
        base = scene(200)
        one = viewer.static_page(tmp_path / "a.html", base).stat().st_size
        still = viewer.static_page(tmp_path / "b.html", [base] * 10).stat().st_size
        moving = viewer.static_page(tmp_path / "c.html", [base.replace(means=base.means + t) for t in range(10)])
        assert still < one + 2000 and moving.stat().st_size < one + 9 * 200 * 17
        assert data(moving)["times"] == pytest.approx(np.linspace(0, 1, 10))

    def test_a_batch_is_one_set_a_time(self, tmp_path):
        a, b = scene(seed=1), scene(seed=2)
        fields = {name: torch.stack([value, b.tensors()[name]]) for name, value in a.tensors().items()}
        batch = viewer.static_page(tmp_path / "a.html", Gaussians(**fields))
        assert batch.read_text() == viewer.static_page(tmp_path / "b.html", [a, b]).read_text()

    def test_harmonics_give_their_constant_and_extra_channels_are_left_out(self, tmp_path):
        plain = scene()
        sh = torch.cat(
            [(plain.colors[:, None] - 0.5) / 0.28209479177387814, torch.ones(12, 3, 3, dtype=torch.float64)], 1
        )
        other = plain.replace(colors=None, sh=sh, extra={"mask": torch.ones(12, 1, dtype=torch.float64)})
        pages = [viewer.static_page(tmp_path / f"{i}.html", some).read_text() for i, some in enumerate((plain, other))]
        assert pages[0] == pages[1]

    def test_the_first_view_holds_the_scene(self, tmp_path):
        for factor in (1e-3, 1.0, 1e4):
            base = scene(50)
            big = base.replace(means=factor * base.means + 7 * factor, scales=factor * base.scales)
            found = data(viewer.static_page(tmp_path / "a.html", big))
            target = torch.tensor(found["target"], dtype=torch.float64)
            eye = target - found["distance"] * torch.tensor([0.0, 0, 1], dtype=torch.float64)
            camera = pinhole_cameras(480, 360, found["fov"], viewmats=look_at(eye, target)[None])
            seen = render(big, camera, near=1e-9).meta["projected"].means2d[0]
            inside = (seen > 0).all(-1) & (seen < torch.tensor([480, 360])).all(-1)
            assert float(inside.double().mean()) > 0.9
            assert float((seen.amax(0) - seen.amin(0)).max()) > 100

    def test_cameras_are_in_the_first_view_and_in_the_file(self, tmp_path):
        views = pinhole_cameras(40, 30, viewmats=orbit(4, 30.0))
        found = data(viewer.static_page(tmp_path / "a.html", scene(), cameras=views))
        assert found["distance"] > 30 and np.shape(found["cameras"]["lines"]) == (4, 48)
        assert found["cameras"]["times"] is None
        np.testing.assert_allclose(found["cameras"]["lines"][0][:3], views.camtoworlds[0, :3, 3], atol=1e-4)
        assert "cameras" not in data(viewer.static_page(tmp_path / "b.html", scene()))
        for change, error, words in (
            ({"cameras": views.viewmats}, TypeError, "cameras: expected Cameras, got Tensor"),
            ({"cameras": views._replace(viewmats=2 * views.viewmats)}, ValueError, "cameras.viewmats: expected a rotation"),
            ({"camera_times": [1.0]}, ValueError, "camera_times: expected 4"),
            ({"cameras": None, "camera_times": [1.0]}, ValueError, "cameras: expected Cameras with camera_times"),
        ):
            with pytest.raises(error, match=words):
                viewer.static_page(tmp_path / "c.html", scene(), **{"cameras": views, **change})

    def test_empty_sets(self, tmp_path):
        found = data(viewer.static_page(tmp_path / "a.html", [scene().index([]), scene()]))
        assert [frame["n"] for frame in found["frames"]] == [0, 12]
        assert data(viewer.static_page(tmp_path / "b.html", scene(0)))["distance"] == 1

    @pytest.mark.parametrize(
        ("sets", "options", "error", "words"),
        [
            ([], {}, ValueError, "sets: expected at least one"),
            ([1], {}, TypeError, r"sets\[0\]: expected Gaussians, got int"),
            ([scene(colors=torch.ones(12, 2, dtype=torch.float64))], {}, ValueError, "three colour channels, got 2"),
            ([scene(scales=-torch.ones(12, 3, dtype=torch.float64))], {}, ValueError, "scales"),
            ([scene()], {"times": [0, 1]}, ValueError, "times: expected 1, got 2"),
            ([scene(), scene()], {"times": [1, 1]}, ValueError, "times: expected increasing numbers"),
            ([scene(), scene()], {"times": [0, math.nan]}, (ValueError, ArithmeticError), "times"),
            ([scene()], {"model": "fisheye"}, ValueError, "model"),
        ],
    )
    def test_refusals(self, tmp_path, sets, options, error, words):
        with pytest.raises(error, match=words):
            viewer.static_page(tmp_path / "a.html", sets, **options)
        assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.slow
class TestInChromium:
    def picture(self, browser, width, height):
        pixels = browser.execute_script(f"return Array.from(paint({width}, {height}).data)")
        return np.array(pixels, float).reshape(height, width, 4)[..., :3] / 255

    @pytest.mark.parametrize(("waves", "phases"), [(0, False), (2, False), (1, True)])
    def test_it_draws_what_render_draws(self, browser, tmp_path, waves, phases):
        made = scene(30, waves=waves, phases=phases)
        path = viewer.static_page(tmp_path / "a.html", made)
        found = data(path)
        browser.get(path.as_uri())
        for yaw, pitch in ((0.0, 0.0), (0.9, -0.4)):
            browser.execute_script(f"view.yaw = {yaw}; view.pitch = {pitch}")
            target = torch.tensor(found["target"], dtype=torch.float64)
            ahead = [math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)]
            eye = target - found["distance"] * torch.tensor(ahead, dtype=torch.float64)
            camera = pinhole_cameras(64, 48, found["fov"], viewmats=look_at(eye, target)[None])
            wanted = render(made, camera, backgrounds=torch.ones(3, dtype=torch.float64)).color[0].numpy()
            # A byte is 1/255; the two differ in the last bits where a primitive is cut off at 1/255 and at 3.3 deviations.
            difference = np.abs(self.picture(browser, 64, 48) - wanted)
            assert difference.max() < 0.02 and difference.mean() < 0.002
            assert wanted.min() < 0.7

    def test_orthographic(self, browser, tmp_path):
        from papers10.splat.cameras import Cameras

        made = scene(30, waves=1)
        path = viewer.static_page(tmp_path / "a.html", made, model="ortho")
        found = data(path)
        browser.get(path.as_uri())
        target = torch.tensor(found["target"], dtype=torch.float64)
        eye = target - found["distance"] * torch.tensor([0.0, 0, 1], dtype=torch.float64)
        focal = 32 / math.tan(found["fov"] / 2) / found["distance"]
        K = torch.tensor([[[focal, 0, 32], [0, focal, 24], [0, 0, 1]]], dtype=torch.float64)
        camera = Cameras(look_at(eye, target)[None], K, 64, 48, "ortho").check()
        wanted = render(made, camera, backgrounds=torch.ones(3, dtype=torch.float64)).color[0].numpy()
        assert np.abs(self.picture(browser, 64, 48) - wanted).max() < 0.02

    def test_cameras_are_drawn_where_they_stand(self, browser, tmp_path):
        from selenium.webdriver.common.by import By

        views = pinhole_cameras(40, 30, viewmats=look_at(torch.tensor([[1.5, 0.5, -1.0]]), torch.tensor([0.0, 0, 0])))
        path = viewer.static_page(tmp_path / "a.html", scene(), cameras=views.to(torch.float64), camera_times=[0.0])
        found = data(path)
        target = torch.tensor(found["target"], dtype=torch.float64)
        eye = target - found["distance"] * torch.tensor([0.0, 0, 1], dtype=torch.float64)
        camera = pinhole_cameras(480, 360, found["fov"], viewmats=look_at(eye, target)[None])
        ends = torch.tensor(found["cameras"]["lines"][0], dtype=torch.float64).reshape(8, 2, 3)
        column, row = project_points(ends.mean(1), camera)[0][0, 0].tolist()
        browser.get(path.as_uri())

        def pixel():
            script = f"return Array.from(context.getImageData({int(column) - 1}, {int(row) - 1}, 3, 3).data)"
            return np.array(browser.execute_script(script)).reshape(9, 4)[:, :3]

        shown = pixel()
        browser.find_element(By.ID, "cameras").click()
        browser.execute_script("draw(true)")
        hidden = pixel()
        orange = np.abs(shown - [213, 94, 0]).sum(-1).min()
        assert orange < 120 and np.abs(hidden - [213, 94, 0]).sum(-1).min() > 2 * orange

    def test_mouse_slider_and_keys_change_the_picture_and_nothing_is_asked_for(self, browser, tmp_path):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import WebDriverWait

        browser.get_log("browser"), browser.get_log("performance")
        path = viewer.static_page(tmp_path / "a.html", [scene(seed=1), scene(seed=2)], times=[0.0, 2.5], title="two")
        browser.get(path.as_uri())
        canvas, slider = browser.find_element(By.ID, "view"), browser.find_element(By.ID, "time")

        def shown():
            return browser.execute_script("return canvas.width + canvas.toDataURL()")

        assert browser.title == "two" and browser.find_element(By.ID, "now").text == "t = 0"
        assert browser.find_element(By.ID, "count").text == "12 primitives"
        pictures = [shown()]
        for act in (
            lambda: ActionChains(browser).drag_and_drop_by_offset(canvas, 120, 40).perform(),
            lambda: slider.send_keys(Keys.ARROW_RIGHT),
            lambda: canvas.send_keys("+"),
            lambda: browser.find_element(By.ID, "home").click(),
        ):
            act()
            WebDriverWait(browser, 5).until(lambda _: shown() not in pictures and shown().startswith("480"))
            pictures.append(shown())
        assert browser.find_element(By.ID, "now").text == "t = 2.5"
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith((path.as_uri(), "data:", "chrome", "about:"))] == []


class Handle(types.SimpleNamespace):
    """What a gui or scene handle of viser offers: a value, callbacks, removal."""

    def on_update(self, function):
        self.callback = function
        return function

    on_click = on_update

    def remove(self):
        self.removed = True


class Server:
    """A stand-in with the published interface of viser.ViserServer, as far as `show` uses it."""

    def __init__(self, host="0.0.0.0", port=8080):
        self.host, self.port, self.nodes, self.up = host, port, [], None
        self.scene = types.SimpleNamespace(
            set_up_direction=self._up, add_gaussian_splats=self._splats, add_camera_frustum=self._frustum
        )
        self.frusta = []
        self.gui = types.SimpleNamespace(add_slider=self._control, add_text=self._control)
        self.controls = {}

    def _up(self, direction):
        self.up = direction

    def _splats(self, name, centers, covariances, rgbs, opacities):
        n = len(centers)
        assert centers.shape == (n, 3) and covariances.shape == (n, 3, 3)
        assert rgbs.shape == (n, 3) and opacities.shape == (n, 1) and n > 0
        self.nodes.append(Handle(name=name, centers=centers, covariances=covariances, rgbs=rgbs, opacities=opacities))
        return self.nodes[-1]

    def _frustum(self, name, fov, aspect, *, scale, color, wxyz, position):
        own = dict(name=name, fov=fov, aspect=aspect, scale=scale, color=color, wxyz=wxyz, position=position)
        self.frusta.append(Handle(**own))
        return self.frusta[-1]

    def _control(self, label, *, initial_value, **options):
        self.controls[label] = Handle(value=initial_value, **options)
        return self.controls[label]

    def on_client_connect(self, function):
        self.connect = function
        return function


class TestShow:
    @pytest.fixture
    def stand_in(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "viser", types.SimpleNamespace(ViserServer=Server))

    def test_arrays_slider_and_address(self, stand_in):
        made, asked = scene(waves=1), []

        def at(time):
            asked.append(time)
            return made.replace(means=made.means + time) if time < 4 else made.index([])

        server = viewer.show(at, times=[1.0, 2.5, 4.0])
        assert (server.host, server.port, server.up, asked) == ("127.0.0.1", 8080, "-y", [1.0])
        axes = quat_to_matrix(made.quats) * made.scales[:, None]
        np.testing.assert_allclose(server.nodes[0].covariances, axes @ axes.mT, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(server.nodes[0].opacities[:, 0], made.opacities)
        slider, label = server.controls["frame"], server.controls["time"]
        assert (slider.min, slider.max, slider.step, label.value) == (0, 2, 1, "1")
        slider.value = 1
        slider.callback(None), slider.callback(None)
        assert asked == [1.0, 2.5] and label.value == "2.5" and len({node.name for node in server.nodes}) == 1
        np.testing.assert_allclose(server.nodes[1].centers, made.means + 2.5, rtol=1e-6)
        slider.value = 2
        slider.callback(None)
        assert server.nodes[1].removed and len(server.nodes) == 2
        client = types.SimpleNamespace(camera=types.SimpleNamespace())
        server.connect(client)
        assert client.camera.position[2] < client.camera.look_at[2]

    def test_cameras_are_drawn_marked_and_looked_through(self, stand_in):
        views = pinhole_cameras(40, 30, 1.0, viewmats=orbit(3, 2.0, degrees=90))
        server = viewer.show(lambda time: scene(), times=[0.0, 1.0], cameras=views, camera_times=[0.0, 0.4, 1.1])
        assert [frustum.color for frustum in server.frusta] == [viewer._NOW, viewer._OTHER, viewer._OTHER]
        server.controls["frame"].value = 1
        server.controls["frame"].callback(None)
        assert [frustum.color for frustum in server.frusta] == [viewer._OTHER, viewer._OTHER, viewer._NOW]
        one = server.frusta[1]
        assert one.fov == pytest.approx(2 * math.atan(0.75 * math.tan(0.5))) and one.aspect == pytest.approx(4 / 3)
        np.testing.assert_allclose(one.position, [0, 0, -2], atol=1e-12)
        np.testing.assert_allclose(quat_to_matrix(torch.tensor(one.wxyz)), np.eye(3), atol=1e-12)
        client = types.SimpleNamespace(camera=types.SimpleNamespace())
        one.callback(types.SimpleNamespace(client=client))
        assert client.camera.fov == one.fov and client.camera.position is one.position
        with pytest.raises(ValueError, match="cameras: expected pinhole views, got 'ortho'"):
            viewer.show(scene(), times=[0], cameras=views._replace(model="ortho"))

    def test_what_stands_still_has_no_slider(self, stand_in):
        server = viewer.show(scene(), times=[0], host="0.0.0.0", port=9)
        assert server.controls == {} and (server.host, server.port) == ("0.0.0.0", 9)

    def test_refusals_come_before_the_server(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "viser", types.SimpleNamespace(ViserServer=None))
        with pytest.raises(TypeError, match="gaussians_at: expected Gaussians or a function of the time, got int"):
            viewer.show(3, times=[0])
        with pytest.raises(TypeError, match=r"gaussians_at\(0\): expected Gaussians, got int"):
            viewer.show(lambda time: 3, times=[0])
        with pytest.raises(ValueError, match="times: expected at least one"):
            viewer.show(scene(), times=[])
        with pytest.raises(ValueError, match="port"):
            viewer.show(scene(), times=[0], port=70000)
        batch = Gaussians(*(value[None] for value in scene().tensors().values()))
        with pytest.raises(ValueError, match=r"gaussians_at\(0\): expected one set"):
            viewer.show(batch, times=[0])

    def test_without_viser_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "viser", None)
        with pytest.raises(ImportError, match=r"viser is needed for the live viewer: pip install 'papers10\[viewer\]'"):
            viewer.show(scene(), times=[0])

    def test_the_installed_viser(self, monkeypatch):
        viser = pytest.importorskip(
            "viser", reason="viser is not installed: only its stand-in was tested (extra viewer)"
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        made, sliders, asked = scene(waves=1), [], []
        original = viser.GuiApi.add_slider

        def add_slider(self, *arguments, **options):
            sliders.append(original(self, *arguments, **options))
            return sliders[-1]

        def at(moment):
            asked.append(moment)
            return made.replace(means=made.means + moment)

        monkeypatch.setattr(viser.GuiApi, "add_slider", add_slider)
        server = viewer.show(at, times=[0, 1], port=port)
        try:
            assert server.get_host() == "127.0.0.1"
            with urllib.request.urlopen(f"http://127.0.0.1:{server.get_port()}/", timeout=10) as answer:
                assert answer.status == 200 and b"<html" in answer.read().lower()
            sliders[0].value = 1
            end = time.monotonic() + 10
            while len(asked) < 2 and time.monotonic() < end:
                time.sleep(0.01)
            assert asked == [0.0, 1.0]
        finally:
            server.stop()
