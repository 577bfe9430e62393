"""The frame loop: endpoints, batches, resume, orientation, errors."""

import pytest
import torch

from papers10.core.checks import NonFiniteError
from papers10.morphany3d.morphing import MorphConfig
from papers10.morphany3d.orientation import EmptyStructureError
from papers10.morphany3d.pipeline import Backbone, Endpoint, MorphPipeline, TinyAdapter
from papers10.morphany3d.shapes import Shape

SOURCE, TARGET, OTHER = Shape.random("dog", 3), Shape.random("car", 4), Shape.random("chair", 5)


@pytest.fixture(scope="module")
def pipeline():
    return MorphPipeline(TinyAdapter(steps=4))


def run(pipeline, name="paper", source=SOURCE, target=TARGET, frames=4, **options):
    changes = options.pop("changes", {})
    return list(pipeline.morph(source, target, MorphConfig.preset(name, n_frames=frames, **changes), formats=(), **options))


def same(first, second):
    return torch.equal(first.logits, second.logits) and torch.equal(first.coords, second.coords) and torch.equal(first.features, second.features)


def test_the_small_model_is_a_backbone(pipeline):
    assert isinstance(pipeline.backbone, Backbone)


@pytest.mark.parametrize("name", ["paper", "kv_ca", "direct"])
def test_ends_are_the_plain_generations(pipeline, name):
    frames = run(pipeline, name, changes={"oc": False})
    plain = [run(pipeline, "mca", end, end, 2, changes={"noise_mode": "shared"})[0] for end in (SOURCE,)]
    assert same(frames[0], plain[0])
    reverse = run(pipeline, name, TARGET, SOURCE, changes={"oc": False})
    # The noise of an end belongs to its side, so the target's plain generation is compared at equal noise.
    ends = [pipeline.encode(end) for end in (SOURCE, TARGET)]
    noises = [pipeline.draw_noise(0, 0, side) for side in (0, 1)]
    given = [Endpoint(end.name, end.condition, noise) for end, noise in zip(ends, noises)]
    swapped = run(pipeline, name, *given[::-1], changes={"oc": False})
    assert same(frames[-1], swapped[0]) and same(frames[0], swapped[-1])
    assert not same(frames[-1], reverse[0])


def test_a_morph_runs_backwards_without_memory(pipeline):
    given = [Endpoint(end.category, pipeline.encode(end).condition, pipeline.draw_noise(0, 0, 0)) for end in (SOURCE, TARGET)]
    forward = run(pipeline, "mca", *given, frames=5)
    backward = run(pipeline, "mca", *given[::-1], frames=5)
    for one, two in zip(forward, backward[::-1]):
        torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-4)  # float32 sums in another order, four steps with guidance 4


def test_a_batch_is_its_pairs(pipeline):
    config = MorphConfig(n_frames=3)
    batch = pipeline.sequences([SOURCE, OTHER], [TARGET, SOURCE], config)
    alone = run(pipeline, frames=3)
    for one, two in zip(batch[0].frames, alone):
        torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-4)  # as above
    assert [len(sequence) for sequence in batch] == [3, 3] and batch[0].alphas == [0, 0.5, 1]
    assert all(int(frame.coords[:, 0].max()) == 0 for sequence in batch for frame in sequence.frames)


def test_the_same_seed_gives_the_same_bits(pipeline):
    assert all(same(*pair) for pair in zip(run(pipeline, seed=3), run(pipeline, seed=3)))
    assert not same(run(pipeline, seed=3)[1], run(pipeline, seed=4)[1])


def test_memory_changes_only_what_is_between(pipeline):
    with_memory, without = run(pipeline, "mca_tfsa"), run(pipeline, "mca")
    assert same(with_memory[0], without[0]) and same(with_memory[-1], without[-1])
    assert not same(with_memory[1], without[1])
    assert all(same(*pair) for pair in zip(run(pipeline, "mca_tfsa", changes={"beta": 0.0}), without))


def test_without_an_anchor_the_second_frame_is_plain(pipeline):
    loose = run(pipeline, "mca_tfsa", changes={"anchor_endpoints": False})
    without = run(pipeline, "mca")
    assert same(loose[1], without[1]) and not same(loose[2], without[2])


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_where_keys_are_kept_changes_nothing(pipeline, tmp_path, device):
    changes = {"cache_device": device, "cache_folder": str(tmp_path) if device == "disk" else None}
    assert all(same(*pair) for pair in zip(run(pipeline, changes=changes), run(pipeline)))


def test_official_frames_leave_out_the_ends(pipeline):
    frames = run(pipeline, "official", frames=5)
    assert [frame.index for frame in frames] == [1, 2, 3] and [frame.alpha for frame in frames] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_morph_goes_on_where_it_stopped(pipeline, tmp_path, stop):
    whole = run(pipeline)
    frames = pipeline.morph(SOURCE, TARGET, MorphConfig(n_frames=4), formats=(), resume_dir=tmp_path)
    for _ in range(stop):
        next(frames)
    frames.close()
    again = run(pipeline, resume_dir=tmp_path)
    assert all(same(*pair) for pair in zip(whole, again)) and [frame.turns for frame in again] == [frame.turns for frame in whole]
    assert len(list(tmp_path.glob("frame_*/keys.safetensors"))) == 1


def test_a_folder_of_another_morph_is_refused(pipeline, tmp_path):
    next(pipeline.morph(SOURCE, TARGET, MorphConfig(n_frames=4), formats=(), resume_dir=tmp_path))
    for arguments in ({"source": OTHER}, {"seed": 1}, {"changes": {"beta": 0.3}}):
        with pytest.raises(ValueError, match="another"):
            run(pipeline, resume_dir=tmp_path, **arguments)
    (tmp_path / "morph.json").unlink()
    with pytest.raises(ValueError, match="without morph.json"):
        run(pipeline, resume_dir=tmp_path)


def test_structure_and_detail_are_apart(pipeline):
    plain = run(pipeline, "mca", SOURCE, SOURCE, 2)[0]
    detail = run(pipeline, "detail")
    assert all(torch.equal(frame.logits, plain.logits) for frame in detail) and same(detail[0], plain)
    assert not torch.equal(detail[2].features, plain.features) and [frame.slat_alpha for frame in detail][-1] == 1
    structure = run(pipeline, "structure")
    assert not torch.equal(structure[2].logits, plain.logits) and {frame.slat_alpha for frame in structure} == {0.0}


def test_two_targets(pipeline):
    dual = list(pipeline.morph(SOURCE, TARGET, MorphConfig.preset("dual", n_frames=3), target_detail=OTHER, formats=()))
    single = run(pipeline, frames=3)
    assert torch.equal(dual[1].logits, single[1].logits) and not torch.equal(dual[1].features, single[1].features)


def test_own_schedule_of_the_surface(pipeline):
    frames = run(pipeline, changes={"slat_schedule": (0.0, 0.0, 0.0, 1.0)})
    assert [frame.slat_alpha for frame in frames] == [0, 0, 0, 1] and frames[1].alpha == pytest.approx(1 / 3)


def test_three_at_once(pipeline):
    blended = pipeline.blend([SOURCE, TARGET, OTHER], [0.5, 0.25, 0.25], formats=())
    one = pipeline.blend([SOURCE, TARGET, OTHER], [1.0, 0.0, 0.0], formats=())
    assert same(one, run(pipeline, "mca", SOURCE, SOURCE, 2)[0]) and not same(blended, one)
    with pytest.raises(ValueError, match="sum of 1"):
        pipeline.blend([SOURCE, TARGET], [0.5, 0.6])


def test_a_word_and_a_picture(pipeline):
    frames = run(pipeline, "mca", "mug", TARGET, 3)
    assert all(torch.isfinite(frame.logits).all() for frame in frames)


@pytest.mark.parametrize("name", ["kv_sa", "kv_both"])
def test_mixed_self_attention_needs_the_ends_own_runs(pipeline, name):
    frames = run(pipeline, name, frames=3)
    assert all(torch.isfinite(frame.features).all() for frame in frames)
    # With all weight on the source its own keys come back.
    plain = run(pipeline, "mca", SOURCE, SOURCE, 2)[0]
    torch.testing.assert_close(frames[0].logits, plain.logits, rtol=0, atol=1e-5)


def test_frames_are_turned_like_the_one_before(pipeline):
    class Turning(TinyAdapter):
        count = 0

        def decode_structure(self, latent):
            self.count += 1
            return torch.rot90(super().decode_structure(latent), 1 if self.count >= 3 else 0, (1, 2))

    calm = run(MorphPipeline(TinyAdapter(steps=4)), "mca", SOURCE, SOURCE, frames=4, changes={"noise_mode": "shared"})
    jumping = run(MorphPipeline(Turning(steps=4)), "mca_tfsa_oc", SOURCE, SOURCE, frames=4, changes={"noise_mode": "shared", "beta": 0.0})
    assert [frame.turns for frame in jumping] == [0, 0, 3, 3]
    assert all(torch.equal(one.logits, two.logits) for one, two in zip(calm, jumping))


def test_nothing_inside_is_named(pipeline):
    class Empty(TinyAdapter):
        def decode_structure(self, latent):
            return super().decode_structure(latent) - 100

    with pytest.raises(EmptyStructureError, match="frame 0"):
        run(MorphPipeline(Empty(steps=2)))


def test_numbers_that_are_none_are_named(pipeline):
    adapter = TinyAdapter(steps=2)
    weight = adapter.model.slat_flow.blocks[0].mlp[0].weight
    weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="'slat'.*step 0.*frame 0"):
        run(MorphPipeline(adapter))


@pytest.mark.parametrize(("call", "message"), [
    (lambda p: p.sequences([SOURCE], [TARGET, OTHER]), "targets"),
    (lambda p: p.sequences([], []), "targets"),
    (lambda p: list(p.morph("dgo", TARGET)), "did you mean 'dog'"),
    (lambda p: list(p.morph(SOURCE, TARGET, MorphConfig(n_frames=2), formats=("msh",))), "formats"),
    (lambda p: p.sequences([SOURCE, "dog"], [TARGET, OTHER]), "tokens"),
])  # fmt: skip
def test_bad_input(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipeline)


def test_objects_in_every_format(pipeline):
    (frame, *_) = pipeline.morph(SOURCE, TARGET, MorphConfig(n_frames=2), formats=("mesh", "gaussian", "radiance"))
    assert set(frame.outputs) == {"mesh", "gaussian", "radiance"} and frame.mesh is frame.outputs["mesh"]
    assert len(frame.mesh.faces) > 20 and len(frame.gaussians) == len(frame.coords)
    assert {"ss", "slat", "decode", "mesh"} <= set(frame.seconds)


def test_the_networks_are_free_between_frames(pipeline):
    whole = run(pipeline)
    network, condition = pipeline.backbone.model.ss_flow, pipeline.encode(OTHER).condition[None]
    noise = torch.randn(1, *pipeline.backbone.noise_shape("ss"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(noise, 0.5, condition)
        made = []
        for frame, other in zip(pipeline.morph(SOURCE, TARGET, MorphConfig(n_frames=4), formats=()), pipeline.morph(TARGET, OTHER, MorphConfig(n_frames=4), formats=())):
            made.append(frame)
            assert torch.equal(network(noise, 0.5, condition), before) and other.index == frame.index
    assert all(same(*pair) for pair in zip(whole, made))


def test_both_branches_may_remember(pipeline):
    frames = run(pipeline, changes={"apply_to_uncond": True})
    assert not same(frames[1], run(pipeline)[1]) and same(frames[0], run(pipeline)[0])


def test_frames_of_another_sampler_are_refused(pipeline, tmp_path):
    next(pipeline.morph(SOURCE, TARGET, MorphConfig(n_frames=4), formats=(), resume_dir=tmp_path))
    with pytest.raises(ValueError, match="another generator"):
        MorphPipeline(TinyAdapter(steps=5)).morph(SOURCE, TARGET, MorphConfig(n_frames=4), resume_dir=tmp_path)


def test_files_of_keys_go_with_the_morph(pipeline, tmp_path):
    run(pipeline, changes={"cache_device": "disk", "cache_folder": str(tmp_path)})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_arguments_are_checked_before_the_first_frame(pipeline):
    with pytest.raises(ValueError, match="formats"):
        pipeline.morph(SOURCE, TARGET, MorphConfig(n_frames=2), formats=("msh",))


def test_mixed_keys_with_one_noise_end_at_the_target(pipeline):
    frames = run(pipeline, "kv_both", frames=3, changes={"noise_mode": "shared"})
    plain = run(pipeline, "mca", frames=2, changes={"noise_mode": "shared"})
    torch.testing.assert_close(frames[-1].logits, plain[-1].logits, rtol=0, atol=1e-4)  # float32 sums in another order


def test_a_stage_that_has_not_arrived_looks_back_to_the_end(pipeline):
    half = {"slat_schedule": (0.0, 0.2, 0.4, 0.5)}
    with_memory, without = run(pipeline, "mca_tfsa", changes=half), run(pipeline, "mca", changes=half)
    assert torch.equal(with_memory[-1].logits, without[-1].logits) and not torch.equal(with_memory[-1].features, without[-1].features)
