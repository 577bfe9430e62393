"""The rasterizer: known values, invariants, gradients, hard inputs, refusals, gsplat's interface, Triton in the interpreter."""

import inspect
import math
import os
import subprocess
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from papers10.core.random import generator
from papers10.kernels import rasterize as module
from papers10.kernels.common import BackendUnavailable, Hardware, installed, interpreting, last_backend
from papers10.kernels.rasterize import gsplat_alpha_max, rasterize, rasterize_reference

PATHS = ["torch"] + (["numba"] if installed("numba") else [])
ALL = ["reference", *PATHS]
WAVES = ("waves", "wave_weights", "wave_bias", "wave_phases")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def example(n, width, height, count=2, channels=3, seed=0, largest=6.0, dtype=torch.float64):
    """Random ellipses of 1.5 to `largest` pixels, distinct depths."""
    source = generator(seed, "rasterize", n, count)
    uniform = lambda *shape: torch.rand(*shape, generator=source, dtype=torch.float64)
    angle, long, short = math.pi * uniform(n), 1.5 + (largest - 1.5) * uniform(n), 1.5 + (largest - 1.5) * uniform(n)
    cosine, sine = angle.cos(), angle.sin()
    conics = [(cosine / long) ** 2 + (sine / short) ** 2, cosine * sine * (long**-2 - short**-2), (sine / long) ** 2 + (cosine / short) ** 2]
    operands = {"means2d": uniform(n, 2) * torch.tensor([width, height]), "conics": torch.stack(conics, -1), "opacities": 0.1 + 0.8 * uniform(n),
                "colors": uniform(n, channels), "depths": uniform(n), "backgrounds": uniform(channels)}
    if count:
        operands |= {"waves": 2 * uniform(n, count, 2) - 1, "wave_weights": 0.6 * uniform(n, count), "wave_bias": 0.7 + 0.3 * uniform(n),
                     "wave_phases": 3 * uniform(n, count)}
    return {name: value.to(dtype) for name, value in operands.items()}


def results(operands, width, height, backend="torch", **options):
    """Outputs and gradients of a fixed weighting of them, by name."""
    leaves = {name: value.clone().requires_grad_() for name, value in operands.items()}
    if backend == "reference":
        render, alpha = rasterize_reference(**leaves, width=width, height=height, **options)
    else:
        render, alpha, _ = rasterize(**leaves, width=width, height=height, backend=backend, **options)
    source = generator(1, "upstream")
    parts = [(value * torch.rand(value.shape, generator=source, dtype=torch.float64).to(value.dtype)).sum() for value in (render, alpha)]
    found = torch.autograd.grad(sum(parts), list(leaves.values()), allow_unused=True)
    return {"render": render.detach(), "alpha": alpha.detach(), **{name: value for name, value in zip(leaves, found) if value is not None}}


def agree(got, expected, tolerance=1e-9):
    for name, value in expected.items():
        if name in got:
            assert got[name].shape == value.shape
            assert torch.isfinite(got[name]).all(), name
            assert float((got[name] - value).abs().max()) <= tolerance * max(1.0, float(value.abs().max())) if value.numel() else True, name


def disc(*opacities, depths=None):
    n = len(opacities)
    return {"means2d": torch.full((n, 2), 0.5).double(), "conics": f64([[1.0, 0, 1]] * n), "opacities": f64(opacities),
            "colors": torch.eye(3)[:n].double(), "depths": torch.arange(n).double() if depths is None else f64(depths)}


@pytest.mark.parametrize("backend", ALL)
def test_two_discs_by_hand(backend):
    image, alpha, _ = rasterize(**disc(0.6, 0.5), width=1, height=1, backgrounds=torch.ones(3).double(), backend=backend)
    torch.testing.assert_close(image[0, 0], f64([0.8, 0.4, 0.2]))
    assert alpha.item() == pytest.approx(0.8)
    swapped = rasterize(**disc(0.6, 0.5, depths=(2.0, 1.0)), width=1, height=1, backend=backend)[0]
    torch.testing.assert_close(swapped[0, 0], f64([0.3, 0.5, 0.0]))


@pytest.mark.parametrize("backend", ALL)
def test_a_wave_by_hand(backend):
    wave = {"waves": f64([[[math.pi, 0.0], [0.0, 0.0]]]), "wave_weights": f64([[0.4, 0.2]]), "wave_bias": f64([0.7])}
    image, _, _ = rasterize(**{name: value[:1] for name, value in disc(0.5, 0.5).items()}, **wave, width=3, height=1, backend=backend)
    by_hand = [0.5 * math.exp(-0.5 * d * d) * (0.7 + 0.5 * (0.4 * math.cos(math.pi * d) + 0.2)) for d in range(3)]
    torch.testing.assert_close(image[0, :, 0], f64(by_hand))


@pytest.mark.parametrize("backend", ALL)
def test_equal_depths_go_by_index(backend):
    image = rasterize(**disc(0.6, 0.5, depths=(1.0, 1.0)), width=1, height=1, backend=backend)[0]
    torch.testing.assert_close(image[0, 0], f64([0.6, 0.2, 0.0]))


@pytest.mark.parametrize("backend", ALL)
def test_alpha_is_cut_and_the_pixel_ends_before_t_min(backend):
    image, alpha, _ = rasterize(**disc(1.0, 0.98, 0.9), width=1, height=1, backend=backend, t_min=1e-3)
    torch.testing.assert_close(image[0, 0], f64([0.99, 0.0, 0.0]), atol=1e-12, rtol=0)
    assert alpha.item() == pytest.approx(0.99)
    image = rasterize(**disc(1.0, 0.98, 0.9), width=1, height=1, backend=backend, t_min=0.0, alpha_max=0.5)[0]
    torch.testing.assert_close(image[0, 0], f64([0.5, 0.25, 0.125]))
    cut = disc(1.0)
    cut["opacities"].requires_grad_()
    rasterize(**cut, width=1, height=1, backend=backend)[0].sum().backward()
    assert cut["opacities"].grad.item() == 0.0


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_gradients_are_those_of_the_dense_formula(backend, count):
    operands = example(300, 70, 52, count)
    agree(results(operands, 70, 52, backend), results(operands, 70, 52, "reference"), 1e-11)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6), n=st.integers(0, 30), count=st.integers(0, 3), channels=st.integers(1, 6), width=st.integers(1, 37), height=st.integers(1, 37),
    tile=st.sampled_from([1, 3, 8, 16, 32, 64]), backend=st.sampled_from(PATHS), alpha_min=st.sampled_from([0.0, 1 / 255, 0.2]),
    t_min=st.sampled_from([0.0, 1e-4, 0.3]), parts=st.sets(st.sampled_from(["wave_bias", "wave_phases", "backgrounds"])),
)
def test_every_path_equals_the_reference(seed, n, count, channels, width, height, tile, backend, alpha_min, t_min, parts):
    operands = example(n, width, height, count, channels, seed)
    operands = {name: value for name, value in operands.items() if name not in parts}
    rules = {"alpha_min": alpha_min, "t_min": t_min}
    agree(results(operands, width, height, backend, tile_size=tile, **rules), results(operands, width, height, "reference", **rules))


@pytest.mark.parametrize("backend", PATHS)
def test_the_order_of_primitives_permutes_the_gradients(backend):
    operands = example(80, 40, 30)
    shuffle = torch.randperm(80, generator=generator(0, "order"))
    mixed = {name: value if name == "backgrounds" else value[shuffle] for name, value in operands.items()}
    first, second = results(operands, 40, 30, backend), results(mixed, 40, 30, backend)
    agree(second, {name: value if name in ("render", "alpha", "backgrounds") else value[shuffle] for name, value in first.items()}, 1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_waves_of_weight_zero_are_a_gaussian(backend):
    operands = example(60, 40, 30, dtype=torch.float32)
    plain = {name: value for name, value in operands.items() if name not in WAVES}
    still = rasterize(**plain, waves=operands["waves"], wave_weights=torch.zeros(60, 2), width=40, height=30, backend=backend)[0]
    torch.testing.assert_close(still, rasterize(**plain, width=40, height=30, backend=backend)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", PATHS)
def test_no_waves_leave_the_bias(backend):
    operands = example(20, 20, 20, 0)
    bias = torch.linspace(-0.5, 1.5, 20).double()
    none = {"waves": torch.zeros(20, 0, 2).double(), "wave_weights": torch.zeros(20, 0).double(), "wave_bias": bias}
    agree(results(operands | none, 20, 20, backend), results(operands | none, 20, 20, "reference"))


@pytest.mark.parametrize("backend", PATHS)
def test_tile_sizes_agree(backend):
    operands = example(60, 50, 33)
    expected = results(operands, 50, 33, "reference")
    for tile in (5, 8, 16, 32, 64):
        agree(results(operands, 50, 33, backend, tile_size=tile), expected, 1e-11)


@pytest.mark.parametrize("backend", ALL)
def test_batches_are_loops_and_share_what_has_no_leading_dimension(backend):
    operands = example(15, 20, 18)
    means = torch.stack([torch.stack([operands["means2d"] + 3 * row + column for column in range(2)]) for row in range(3)])
    weighting = torch.rand(18, 20, 3, generator=generator(0, "w")).double()
    shared = operands["colors"].clone().requires_grad_()
    both = rasterize(**(operands | {"means2d": means, "colors": shared}), width=20, height=18, backend=backend)
    assert both[0].shape == (3, 2, 18, 20, 3) and both[1].shape == (3, 2, 18, 20, 1)
    got = torch.autograd.grad((both[0] * weighting).sum(), shared)[0]
    total = torch.zeros_like(shared)
    for row in range(3):
        for column in range(2):
            single = rasterize(**(operands | {"means2d": means[row, column], "colors": shared}), width=20, height=18, backend=backend)[0]
            torch.testing.assert_close(both[0][row, column], single)
            total += torch.autograd.grad((single * weighting).sum(), shared)[0]
    torch.testing.assert_close(got, total)


@pytest.mark.parametrize("backend", ALL)
def test_images_with_different_numbers_of_primitives(backend):
    parts = [example(n, 20, 17, seed=n) for n in (9, 4)]
    order = torch.randperm(13, generator=generator(0, "images"))
    flat = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0] if name != "backgrounds"}
    ids = torch.tensor([0] * 9 + [2] * 4, dtype=torch.int32)[order]
    backgrounds = torch.stack([parts[0]["backgrounds"], torch.full((3,), 0.25).double(), parts[1]["backgrounds"]])
    images, alpha, _ = rasterize(**flat, image_ids=ids, num_images=3, backgrounds=backgrounds, width=20, height=17, backend=backend)
    torch.testing.assert_close(images[0], rasterize(**parts[0], width=20, height=17)[0])
    torch.testing.assert_close(images[2], rasterize(**parts[1], width=20, height=17)[0])
    assert (images[1] == 0.25).all() and (alpha[1] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_draw_leaves_the_background(backend):
    operands = {name: value[:0] if name != "backgrounds" else value.clone().requires_grad_() for name, value in example(1, 5, 4, channels=7).items()}
    image, alpha, _ = rasterize(**operands, width=5, height=4, backend=backend)
    image.sum().backward()
    assert torch.equal(image, operands["backgrounds"].expand(4, 5, 7)) and not alpha.any() and (operands["backgrounds"].grad == 20).all()
    empty = rasterize(**(example(3, 5, 4) | {"means2d": torch.zeros(0, 3, 2).double(), "backgrounds": torch.zeros(3).double()}), width=5, height=4, backend=backend)
    assert empty[0].shape == (0, 4, 5, 3)


@pytest.mark.parametrize("backend", PATHS)
def test_outside_invisible_and_opaque(backend):
    operands = example(6, 20, 20, 0)
    operands["means2d"][0] = torch.tensor([-500.0, 3.0])
    operands["opacities"][:4] = torch.tensor([0.9, 0.0, 1.0, 0.5 / 255])
    got = results(operands, 20, 20, backend)
    agree(got, results(operands, 20, 20, "reference"))
    meta = rasterize(**operands, width=20, height=20, backend=backend)[2]
    assert (meta["radii"][[0, 1, 3]] == 0).all() and (meta["radii"][[2, 4, 5]] > 0).all() and not got["means2d"][[0, 1, 3]].any()
    assert meta["num_pairs"] == len(meta["pairs"]) == int(meta["offsets"][-1]) and last_backend("rasterize") == backend == meta["backend"]


@pytest.mark.parametrize("backend", PATHS)
def test_conics_that_are_not_positive_definite_are_left_out_and_counted(backend):
    operands = example(8, 20, 20)
    rest = {name: value if name == "backgrounds" else value[3:] for name, value in operands.items()}
    operands["conics"][:3] = torch.tensor([[1.0, 2, 1], [-1, 0, -1], [0, 0, 0]])
    image, _, meta = rasterize(**operands, width=20, height=20, backend=backend)
    assert meta["n_degenerate"] == 3
    torch.testing.assert_close(image, rasterize(**rest, width=20, height=20, backend=backend)[0])
    torch.testing.assert_close(image, rasterize_reference(**operands, width=20, height=20)[0])
    assert not results(operands, 20, 20, backend)["conics"][:3].any()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_needles_points_and_sheets(backend, dtype):
    operands = example(6, 24, 20, dtype=torch.float64)
    cosine, sine = math.cos(0.5), math.sin(0.5)
    stretched = lambda a, b: torch.tensor([a * cosine**2 + b * sine**2, (a - b) * cosine * sine, a * sine**2 + b * cosine**2]).double()
    operands["conics"][:4] = torch.stack([stretched(1e4, 1e-4), stretched(1e8, 1.0), stretched(1e8, 1e8), stretched(1e-6, 1e-7)])
    operands["means2d"][:4] = torch.tensor([[12.5, 10.5], [3.5, 4.5], [7.5, 8.5], [12.0, 9.0]])
    operands = {name: value.to(dtype) for name, value in operands.items()}
    got = results(operands, 24, 20, backend)
    assert all(torch.isfinite(value).all() for value in got.values())
    if dtype == torch.float64:
        expected = results(operands, 24, 20, "reference")
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("backend", PATHS)
def test_without_a_threshold_every_pixel_counts(backend):
    operands = example(5, 40, 30, largest=2.0)
    _, _, meta = rasterize(**operands, width=40, height=30, alpha_min=0.0, backend=backend)
    assert meta["num_pairs"] == 5 * 3 * 2
    agree(results(operands, 40, 30, backend, alpha_min=0.0), results(operands, 40, 30, "reference", alpha_min=0.0), 1e-11)


def test_chunks_change_nothing(monkeypatch):
    operands = example(60, 50, 33)
    expected = results(operands, 50, 33)
    monkeypatch.setattr(module, "_CHUNK", 300)
    agree(results(operands, 50, 33), expected, 1e-13)


@pytest.mark.parametrize("backend", PATHS)
def test_the_same_bits_again_with_any_number_of_threads(backend):
    operands = example(200, 60, 50, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 1) if backend == "numba" else (1, 1):
            torch.set_num_threads(number)
            found.append(results(operands, 60, 50, backend))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("count", [0, 2])
def test_the_absolute_gradient(backend, count):
    operands = example(10, 12, 11, count)
    operands["means2d"].requires_grad_()
    image, _, meta = rasterize(**operands, width=12, height=11, absgrad=True, backend=backend)
    total = torch.zeros_like(operands["means2d"])
    for value in image.flatten(0, 1).sum(-1):
        total += torch.autograd.grad(value, operands["means2d"], retain_graph=True)[0].abs()
    image.sum().backward()
    torch.testing.assert_close(meta["means2d"].absgrad, total)
    assert meta["means2d"] is operands["means2d"] and (total >= operands["means2d"].grad.abs() - 1e-12).all()


@pytest.mark.parametrize("backend", PATHS)
def test_gradcheck(backend):
    operands = {name: value for name, value in example(5, 7, 6, largest=3.0).items() if name != "depths"}
    operands |= {"opacities": 0.3 + 0.3 * operands["opacities"], "wave_weights": 0.5 * operands["wave_weights"]}
    run = lambda *values: rasterize(**dict(zip(operands, values)), depths=torch.arange(5.0).double(), width=7, height=6, alpha_min=0.0, t_min=0.0,
                                    backend=backend, check=False)[:2]
    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in operands.values()])


@pytest.mark.parametrize("backend", PATHS)
def test_only_alpha_or_only_colour_may_be_used(backend):
    operands = example(10, 12, 11)
    leaf = operands["opacities"].requires_grad_()
    render, alpha, _ = rasterize(**operands, width=12, height=11, backend=backend)
    expected, cover = rasterize_reference(**operands, width=12, height=11)
    for got, wanted in ((render, expected), (alpha, cover)):
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf, retain_graph=True)[0], torch.autograd.grad(wanted.sum(), leaf, retain_graph=True)[0])
    assert not alpha.detach().requires_grad and not rasterize(**{k: v.detach() for k, v in operands.items()}, width=12, height=11)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_warns_once_and_is_computed_in_float32(dtype):
    operands = example(10, 12, 11, dtype=dtype)
    module._warn_half.cache_clear()
    with pytest.warns(UserWarning, match="computed in float32"):
        image = rasterize(**operands, width=12, height=11)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rasterize(**operands, width=12, height=11)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, rasterize(**{name: value.float() for name, value in operands.items()}, width=12, height=11)[0])


@pytest.mark.parametrize("backend", PATHS)
def test_torch_compile_sees_one_node(backend):
    operands = {name: value.requires_grad_() for name, value in example(10, 12, 11, dtype=torch.float32).items()}
    meta = rasterize(**operands, width=12, height=11, backend=backend)[2]
    packed = module._pack(*(operands[name] for name in ("means2d", "conics", "opacities", "colors", "depths")), 12, 11,
                          *(operands[name] for name in WAVES), operands["backgrounds"], None, None)
    reach = module._tile_lists(packed, 12, 11, 16, 1 / 255).reach

    def loss(means, conics, opacities, colors, waves, weights, bias, phases, background):
        render, end, _ = module._shade(means, conics, opacities, colors, waves, weights, bias, phases, background[None], means.new_zeros(0, 2), meta["offsets"],
                                       meta["pairs"], reach, 12, 11, 16, 1 / 255, 0.99, 1e-4, True, backend)
        return (render**2).sum() + end.sin().sum()

    inputs = [operands[name] for name in ("means2d", "conics", "opacities", "colors", *WAVES, "backgrounds")]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    tensors = [value.detach().requires_grad_() for value in inputs[:-1]]
    torch.library.opcheck(module._shade, (*tensors, inputs[-1].detach()[None], torch.zeros(0, 2), meta["offsets"], meta["pairs"], reach, 12, 11, 16, 1 / 255,
                                          0.99, 1e-4, True, backend), test_utils=("test_schema", "test_faketensor"))


def test_inputs_are_not_changed():
    operands = example(10, 12, 11, dtype=torch.float32)
    before = {name: value.clone() for name, value in operands.items()}
    for backend in PATHS:
        results(operands, 12, 11, backend)
        assert all(torch.equal(value, before[name]) for name, value in operands.items())


BAD = [
    ("means2d", lambda o: o["means2d"][0, 0], ValueError, r"means2d: expected \[\.\.\., N, 2\]"),
    ("means2d", lambda o: None, TypeError, "means2d: expected a floating tensor, got None"),
    ("means2d", lambda o: o["means2d"].numpy(), TypeError, "means2d: expected a floating tensor, got ndarray"),
    ("means2d", lambda o: o["means2d"] * math.nan, ValueError, "means2d: expected finite numbers, got 8 that are not"),
    ("conics", lambda o: o["conics"][:3], ValueError, r"conics: expected \[\.\.\., 4, 3\]"),
    ("conics", lambda o: o["conics"][..., :2], ValueError, r"conics: expected \[\.\.\., 4, 3\]"),
    ("conics", lambda o: o["conics"].float(), TypeError, "conics: expected dtype torch.float64"),
    ("opacities", lambda o: o["opacities"] + 1, ValueError, r"opacities: expected numbers in \[0, 1\]"),
    ("opacities", lambda o: -o["opacities"], ValueError, r"opacities: expected numbers in \[0, 1\]"),
    ("opacities", lambda o: o["opacities"].expand(2, 4), ValueError, "opacities: expected leading dimensions"),
    ("colors", lambda o: o["colors"].long(), TypeError, "colors: expected a floating tensor, got torch.int64"),
    ("colors", lambda o: o["colors"][:, :0], ValueError, "colors: expected at least one channel"),
    ("colors", lambda o: o["colors"] / 0, ValueError, "colors: expected finite numbers"),
    ("depths", lambda o: o["depths"] * math.nan, ValueError, "depths: expected finite numbers"),
    ("depths", lambda o: o["depths"].to("meta"), TypeError, "depths: expected device cpu"),
    ("width", lambda o: 0, ValueError, "width: expected a whole number in 1..32768"),
    ("height", lambda o: 8.0, ValueError, "height: expected a whole number"),
    ("height", lambda o: 32769, ValueError, "height: expected a whole number"),
    ("waves", lambda o: None, ValueError, "waves: expected"),
    ("waves", lambda o: o["waves"][..., :1], ValueError, "waves: expected"),
    ("wave_weights", lambda o: None, ValueError, "wave_weights: expected"),
    ("wave_weights", lambda o: o["wave_weights"][:, :1], ValueError, "wave_weights: expected"),
    ("wave_bias", lambda o: o["wave_bias"][:1], ValueError, "wave_bias: expected"),
    ("wave_phases", lambda o: o["wave_phases"].T, ValueError, "wave_phases: expected"),
    ("backgrounds", lambda o: o["backgrounds"][:2], ValueError, "backgrounds: expected"),
    ("backgrounds", lambda o: o["backgrounds"].expand(2, 3), ValueError, "backgrounds: expected leading dimensions"),
    ("image_ids", lambda o: torch.zeros(4, dtype=torch.int64), ValueError, "num_images: expected a number of images"),
    ("num_images", lambda o: 2, ValueError, "image_ids: expected the image of each primitive"),
    ("tile_size", lambda o: 0, ValueError, "tile_size: expected a whole number in 1..64"),
    ("tile_size", lambda o: 8.5, ValueError, "tile_size: expected a whole number in 1..64"),
    ("tile_size", lambda o: 65, ValueError, "tile_size: expected a whole number in 1..64"),
    ("alpha_min", lambda o: -0.1, ValueError, "alpha_min: expected a number in 0..1"),
    ("alpha_max", lambda o: 1.0, ValueError, "alpha_max: expected a number in 0..1, below 1"),
    ("t_min", lambda o: 1.0, ValueError, "t_min: expected a number in 0..1, below 1"),
    ("backend", lambda o: "tritn", ValueError, "nearest: 'triton'"),
]


@pytest.mark.parametrize("name, change, error, message", BAD, ids=[f"{name} {number}" for number, (name, *_) in enumerate(BAD)])
def test_refusals(name, change, error, message):
    operands = example(4, 8, 8)
    with pytest.raises(error, match=message):
        rasterize(**{**operands, "width": 8, "height": 8, name: change(operands)})


@pytest.mark.parametrize("ids, message", [([0, 1, 2, 2], "in 0..1"), ([0, -1, 0, 0], "in 0..1"), ([0, 1], "whole numbers")])
def test_refusals_of_image_ids(ids, message):
    with pytest.raises(ValueError, match=f"image_ids: expected .*{message}"):
        rasterize(**example(4, 8, 8), width=8, height=8, image_ids=torch.tensor(ids), num_images=2)


def test_too_many_pairs_are_refused_before_they_are_made():
    wide = {name: value.expand(200_000, *value.shape[1:]) for name, value in disc(0.9).items()}
    wide["conics"] = f64([1e-9, 0, 1e-9]).expand(200_000, 3)
    with pytest.raises(ValueError, match="2\\*\\*31 pairs"):
        rasterize(**wide, width=4096, height=4096, tile_size=16)


@pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="about machines without a card")
def test_what_needs_a_card_says_so():
    operands = example(4, 8, 8, dtype=torch.float32)
    for backend in ("triton", "gsplat"):
        if installed(backend):
            with pytest.raises(BackendUnavailable, match="CUDA device"):
                rasterize(**operands, width=8, height=8, backend=backend)


def test_the_limit_counts_special_functions():
    card = Hardware("H100", 3.35e12, special_per_s=1e12)
    case = {"N": 1000, "F": 2, "width": 256, "height": 256}
    assert module.SPEC.limit(case, card) == pytest.approx(1000 * 5.4 * 256 * 3 / 1e12)
    assert module.SPEC.limit(case, Hardware("CPU", 1e10)) == 0.0


class Gsplat:
    """gsplat's three functions in PyTorch; every call must fit the installed package's signature."""

    def __init__(self, real):
        self.signatures = {name: inspect.signature(getattr(real, name)) for name in ("isect_tiles", "isect_offset_encode", "rasterize_to_pixels")}

    def bound(self, name, arguments, keywords):
        call = self.signatures[name].bind(*arguments, **keywords)
        call.apply_defaults()
        return call.arguments

    def isect_tiles(self, *arguments, **keywords):
        a = self.bound("isect_tiles", arguments, keywords)
        assert a["packed"] and a["sort"] and not a["segmented"] and (a["depths"] > 0).all() and a["radii"].dtype == torch.int32
        entries, counts = [], []
        for i, (mean, radius) in enumerate(zip(a["means2d"], a["radii"])):
            low, high = ((mean + sign * radius) / a["tile_size"] for sign in (-1, 1))
            box = [range(max(0, math.floor(low[k])), min(size, math.ceil(high[k]))) for k, size in ((0, a["tile_width"]), (1, a["tile_height"]))]
            found = [(int(a["image_ids"][i]) * a["tile_height"] + y) * a["tile_width"] + x for x in box[0] for y in box[1]] if radius.min() > 0 else []
            entries += [(tile, float(a["depths"][i]), int(a["gaussian_ids"][i])) for tile in found]
            counts.append(len(found))
        entries.sort(key=lambda entry: entry[:2])
        self.depths, self.image_ids = a["depths"], a["image_ids"]
        return torch.tensor(counts), torch.tensor([entry[0] for entry in entries]), torch.tensor([entry[2] for entry in entries], dtype=torch.int32)

    def isect_offset_encode(self, *arguments, **keywords):
        a = self.bound("isect_offset_encode", arguments, keywords)
        size = (a["n_images"], a["tile_height"], a["tile_width"])
        return torch.searchsorted(a["isect_ids"], torch.arange(math.prod(size))).int().reshape(size)

    def rasterize_to_pixels(self, *arguments, **keywords):
        a = self.bound("rasterize_to_pixels", arguments, keywords)
        assert a["packed"] and a["isect_offsets"].shape[1] * a["tile_size"] >= a["image_height"] and a["flatten_ids"].dtype == torch.int32
        # Version 1.5.3 asserts a background without an image dimension when primitives come packed.
        assert a["backgrounds"] is None
        return rasterize_reference(a["means2d"], a["conics"], a["opacities"], a["colors"], self.depths, a["image_width"], a["image_height"],
                                   image_ids=self.image_ids, num_images=a["isect_offsets"].shape[0], alpha_max=gsplat_alpha_max())


@pytest.mark.skipif(not installed("gsplat"), reason="gsplat is not installed")
@pytest.mark.parametrize("count, absgrad", [(0, False), (0, True), (2, False)])
def test_the_calls_fit_the_gsplat_that_is_installed(monkeypatch, count, absgrad):
    gsplat = pytest.importorskip("gsplat")
    double = Gsplat(gsplat)
    for name in double.signatures:
        monkeypatch.setattr(gsplat, name, getattr(double, name))
    shade = module._shade
    monkeypatch.setattr(module, "_shade", lambda *arguments: shade(*arguments[:-1], "torch"))
    operands = example(12, 33, 20, count)
    operands["depths"] -= 0.5
    ids = torch.arange(12) % 2
    values = [operands.get(name) for name in ("means2d", "conics", "opacities", "colors", "depths")]
    packed = module._pack(*values, 33, 20, *(operands.get(name) for name in WAVES), torch.rand(2, 3).double(), ids, 2)
    lists = module._tile_lists(packed, 33, 20, 16, 1 / 255)
    means, conics, opacities, colors, _, waves, weights, bias, phases = packed.primitives
    if not count:
        waves, weights, bias, phases = means.new_zeros(12, 0, 2), means.new_zeros(12, 0), means.new_ones(12), means.new_zeros(12, 0)
    probe = torch.zeros(12 if absgrad else 0, 2).double()
    given = (means, conics, opacities, colors, waves, weights, bias, phases, packed.backgrounds, probe, lists.offsets, lists.pairs, lists.reach, 33, 20, 16,
             1 / 255, gsplat_alpha_max(), 1e-4, True)
    render, end = module._gsplat_pixels(packed, given, lists, absgrad)
    expected, alpha = rasterize_reference(*values, 33, 20, **{name: operands[name] for name in WAVES if count}, backgrounds=packed.backgrounds, image_ids=ids,
                                          num_images=2, alpha_max=gsplat_alpha_max())
    torch.testing.assert_close(render, expected)
    torch.testing.assert_close(1 - end, alpha[..., 0])


def test_gsplat_says_where_it_cuts_opacities():
    assert gsplat_alpha_max() in (0.99, 0.999)


@pytest.mark.skipif(not (torch.cuda.is_available() and installed("gsplat")), reason="needs a CUDA device and gsplat")
def test_parity_with_gsplat():
    operands = {name: value.cuda() for name, value in example(10_000, 256, 256, 0, dtype=torch.float32).items()}
    cut = gsplat_alpha_max()
    own, theirs = (results(operands, 256, 256, backend, alpha_max=cut) for backend in ("triton", "gsplat"))
    difference = (own["render"] - theirs["render"]).abs()
    assert difference.max() <= 2e-3 and difference.mean() <= 1e-5
    for name in ("means2d", "conics", "opacities", "colors"):
        assert torch.nn.functional.cosine_similarity(own[name].flatten(), theirs[name].flatten(), dim=0) > 0.9999


INTERPRETED = """
import sys
import torch

sys.path.insert(0, sys.argv[1])
import test_rasterize as tests
from papers10.kernels.common import installed

# numba starts its threads at the first call and must leave PyTorch's number alone.
torch.set_num_threads(1)
small = tests.example(12, 20, 18, dtype=torch.float32)
if installed("numba"):
    import numba

    tests.results(small, 20, 18, "numba")
    assert torch.get_num_threads() == numba.get_num_threads() == 1

for count, channels, options in ((2, 40, {}), (0, 3, {}), (1, 1, {"tile_size": 8}), (5, 3, {"tile_size": 32, "deterministic": False}), (2, 3, {"alpha_min": 0.0}),
                                 (2, 3, {"t_min": 0.4})):
    operands = tests.example(12, 20, 18, count, channels, dtype=torch.float32)
    got = tests.results(operands, 20, 18, "triton", **options)
    tests.agree(got, tests.results(operands, 20, 18, "torch", **options), 3e-6)
    if options.get("deterministic", True):
        again = tests.results(operands, 20, 18, "triton", **options)
        assert all(torch.equal(value, again[name]) for name, value in got.items())

for count in (0, 2):
    found = []
    for backend in ("torch", "triton"):
        operands = tests.example(12, 20, 18, count, 40, dtype=torch.float32)
        operands["means2d"].requires_grad_()
        image, alpha, meta = tests.rasterize(**operands, width=20, height=18, absgrad=True, backend=backend)
        image.square().sum().backward()
        found.append(meta["means2d"].absgrad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

nothing = {name: value[:0] if name != "backgrounds" else value for name, value in small.items()}
assert torch.equal(tests.rasterize(**nothing, width=5, height=4, backend="triton")[0], small["backgrounds"].expand(4, 5, 3))
ids = torch.arange(12) % 2
flat = {"image_ids": ids, "num_images": 3, "width": 20, "height": 18}
torch.testing.assert_close(tests.rasterize(**small, **flat, backend="triton")[0], tests.rasterize(**small, **flat, backend="torch")[0])
for change, error in (({"tile_size": 12}, ValueError), ({"tile_size": 64}, ValueError), ({}, TypeError)):
    operands = small if change else tests.example(4, 8, 8)
    try:
        tests.rasterize(**operands, width=8, height=8, backend="triton", **change)
    except error as problem:
        print(problem)
    else:
        raise AssertionError(change)
"""


@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed")
def test_triton_in_the_interpreter():
    done = subprocess.run([sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)], check=False, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "a power of two up to 32" in done.stdout and "expected float32" in done.stdout
