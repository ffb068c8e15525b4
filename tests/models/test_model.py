"""MME and CAR against the paper's equations, written out step by step: outputs, every gradient, running statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
from literal import B, K, Literal, T

from avfast.errors import InputError
from avfast.kernels import flow_loss
from avfast.models.avmodel import AVModel, ModelConfig
from avfast.models.losses import frame_loss
from avfast.models.networks import BatchNorm, batch_norms


def make_model(motion="mme", refinement="car", channels=1, training=True, **settings) -> AVModel:
    torch.manual_seed(0)
    small = {"convlstm_layers": 2, "unet_width": 4}
    model = AVModel(
        ModelConfig(motion=motion, refinement=refinement, image_channels=channels, **small, **settings)
    ).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # nothing at a special value: identity affines, zero residual and unit norms would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
            if name == "mme.decoder.last.weight":
                p.mul_(4)
            elif name == "car.unet.last.weight":
                p.mul_(20)
            elif name.startswith("car.unet") and name.endswith("norm.bias"):
                # of four channels all may otherwise be negative everywhere, and ReLU lets no gradient through
                p.add_(0.5)
        for name, b in model.named_buffers():
            if "running" in name:
                b.add_(0.2 * torch.rand_like(b))
    if refinement != "none":
        model.mme.requires_grad_(False)
    model.train(training)
    if refinement != "none":
        model.mme.eval()
    return model


def make_inputs(channels=1, seed=1):
    g = torch.Generator().manual_seed(seed)
    frames = torch.rand(B, T, channels, 32, 16, dtype=torch.float64, generator=g)
    flow = torch.randn(B, T, 2, 32, 16, dtype=torch.float64, generator=g)
    flow[:, 0] = 0
    return frames, flow, torch.rand(B, T, 1, 23, 21, dtype=torch.float64, generator=g)


def assert_same(actual, expected, what):
    scale = expected.abs().max().clamp(min=1.0)
    error = (actual - expected).abs().max() / scale
    assert error <= 1e-10, f"{what} differs by {error:.1e}"


MOTIONS, REFINEMENTS = ("v", "v+recall", "mme"), ("none", "unet", "unet+context", "car")
VARIANTS = [(m, "none", 1) for m in MOTIONS] + [("mme", r, 1) for r in REFINEMENTS[1:]]
VARIANTS += [("v", "car", 1), ("v+recall", "car", 3), ("mme", "none", 3)]


@pytest.mark.parametrize("filtering", [False, True], ids=["direct", "minimal filtering"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("motion,refinement,channels", VARIANTS)
def test_equals_the_literal_equations(motion, refinement, channels, training, filtering, monkeypatch):
    # these maps are too small for minimal filtering to be chosen
    monkeypatch.setattr("avfast.kernels.winograd.conv._LEAST_PIXELS", 0 if filtering else 10**9)
    model = make_model(motion, refinement, channels, training)
    frames, flow, audio = make_inputs(channels)
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        weights[name].requires_grad_(p.requires_grad)
    literal = Literal(model.settings, weights, training)

    rollout = model(frames[:, :K], flow[:, :K], audio)
    true_flow, images, vectors = literal.mme(frames[:, :K], flow[:, :K], audio)
    assert_same(rollout.flow, true_flow, "flow")
    assert true_flow.abs().max() > 0.3, "the warp was hardly tested"
    if refinement == "none":
        assert_same(rollout.frames, images, "warped frames")
        loss = flow_loss(rollout.flow, flow[:, K:], frames[:, K:])
        expected_loss = flow_loss(true_flow, flow[:, K:], frames[:, K:])
        # the warped frames feed back into E_m, so their gradient is part of the flow's
        loss, expected_loss = loss + rollout.frames.square().mean(), expected_loss + images.square().mean()
    else:
        expected = literal.car(frames[:, K - 1], true_flow, vectors)
        assert_same(rollout.frames, expected, "frames")
        assert ((expected < 0) | (expected > 1)).any(), "the clamp was not tested"
        loss, expected_loss = frame_loss(rollout.frames, frames[:, K:]), frame_loss(expected, frames[:, K:])

    assert_same(loss, expected_loss, "loss")
    loss.backward()
    expected_loss.backward()
    trained = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None
            continue
        assert p.grad is not None and weights[name].grad is not None, name
        assert_same(p.grad, weights[name].grad, f"gradient of {name}")
        trained += bool(p.grad.abs().max() > 0)
    assert trained > 10

    if training:
        for name, module in model.named_modules():
            if isinstance(module, BatchNorm) and module.training:
                calls = literal.statistics[f"{name}"]
                mean, var = (torch.stack(x).mean(0) for x in zip(*calls, strict=True))
                if "context_encoder" in name:
                    assert module.calls == 1  # the literal one is called per frame, always on the same frame
                else:
                    assert module.calls == len(calls)
                before = module.running_mean.clone(), module.running_var.clone()
                module.commit()
                assert_same(module.running_mean, 0.9 * before[0] + 0.1 * mean, f"{name} running mean")
                assert_same(module.running_var, 0.9 * before[1] + 0.1 * var, f"{name} running variance")
                assert module.calls == 0 and not module.sums.any()
    else:
        assert not batch_norms(model)


@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("motion", ["v", "mme"])
def test_composed_rendering_equals_the_literal_equations(motion, refinement):
    # in evaluation mode: training takes one mean over all steps
    model = make_model(motion, refinement, training=False, rendering="composed")
    frames, flow, audio = make_inputs()
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        weights[name].requires_grad_(p.requires_grad)
    literal = Literal(model.settings, weights, training=False)
    rollout = model(frames[:, :K], flow[:, :K], audio)
    true_flow, _, vectors = literal.mme(frames[:, :K], flow[:, :K], audio)
    if refinement == "none":
        path, warped = 0 * true_flow[:, 0], []
        for step in true_flow.unbind(1):
            path = step + Literal.warp(path, step)
            warped.append(Literal.warp(frames[:, K - 1], path))
        expected = torch.stack(warped, 1)
    else:
        expected = literal.car(frames[:, K - 1], true_flow, vectors)
    assert_same(rollout.frames, expected, "frames")
    for predicted in (rollout.frames, expected):
        frame_loss(predicted, frames[:, K:]).backward()
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            assert_same(p.grad, weights[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("motion", MOTIONS)
def test_teacher_forcing_equals_the_literal_equations(motion, training):
    model = make_model(motion, "none", training=training)
    frames, flow, audio = make_inputs()
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        weights[name].requires_grad_(p.requires_grad)

    found = model.mme(frames[:, :-1], flow[:, :-1], audio, every_step=True)
    expected = Literal(model.settings, weights, training).teacher_forced(frames, flow, audio)
    assert_same(found.flow, expected, "flow")
    assert_same(found.frames[:, -1], Literal.warp(frames[:, -2], expected[:, -1]), "warped frames")
    for predicted in (found.flow, expected):
        flow_loss(predicted, flow[:, 1:], frames[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert_same(p.grad, weights[name].grad, f"gradient of {name}")


def test_every_variant_runs_at_other_sizes_and_lengths():
    for motion, refinement in itertools.product(MOTIONS, REFINEMENTS):
        model = AVModel(
            ModelConfig(motion=motion, refinement=refinement, image_channels=3, audio_shape=(45, 17), unet_width=2)
        ).eval()
        audio = torch.rand(1, 7, 1, 45, 17)
        rollout = model.predict(torch.rand(1, 1, 3, 32, 48), torch.zeros(1, 1, 2, 32, 48), audio)
        assert rollout.frames.shape == (1, 6, 3, 32, 48) and rollout.flow.shape == (1, 6, 2, 32, 48)
        assert rollout.frames.min() >= 0 and rollout.frames.max() <= 1


@pytest.mark.parametrize("shape", [(23, 21), (45, 17), (11, 11), (64, 30)])
def test_any_spectrogram_shape(shape):
    model = AVModel(ModelConfig(refinement="none", audio_shape=shape)).eval()
    assert model.mme.audio_encoder(torch.rand(2, 3, 1, *shape)).shape == (2, 3, 128)


def test_published_parameter_count_of_the_audio_encoder():
    # 3,018,944 with the five biases that BatchNorm makes redundant (64 + 128 + 256 + 512 + 128)
    model = AVModel(ModelConfig(refinement="none"))
    assert sum(p.numel() for p in model.mme.audio_encoder.parameters()) == 3_018_944 - 1088


def test_a_longer_rollout_begins_with_the_shorter_one():
    model = make_model(training=False)
    frames, flow, audio = make_inputs()
    long = model.predict(frames[:, :K], flow[:, :K], audio)
    short = model.predict(frames[:, :K], flow[:, :K], audio[:, : T - 1])
    assert_same(long.frames[:, :-1], short.frames, "frames")


def test_samples_of_a_deterministic_model_are_equal():
    model = make_model(training=False)
    frames, flow, audio = make_inputs()
    one = model.predict(frames[:, :K], flow[:, :K], audio)
    three = model.predict(frames[:, :K], flow[:, :K], audio, samples=3)
    for several, single in zip(three, one, strict=True):
        assert several.shape == (3, *single.shape) and all(torch.equal(future, single) for future in several)


def test_stage_2_changes_nothing_in_mme():
    model = make_model()
    before = {n: t.clone() for n, t in model.mme.state_dict().items()}
    frames, flow, audio = make_inputs()
    optimizer = torch.optim.Adam(model.car.parameters(), lr=1e-2)
    frame_loss(model(frames[:, :K], flow[:, :K], audio).frames, frames[:, K:]).backward()
    optimizer.step()
    for module in batch_norms(model):
        module.commit()
    for name, tensor in model.mme.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_training_starts_from_the_warped_frame():
    torch.manual_seed(0)
    model = AVModel(ModelConfig(unet_width=4)).eval()
    frames, flow, audio = (x.float() for x in make_inputs())
    motion = model.mme(frames[:, :K], flow[:, :K], audio)
    assert torch.equal(model(frames[:, :K], flow[:, :K], audio).frames, motion.frames)


def test_autocast_keeps_flow_and_cell_state_in_float32():
    model = AVModel(ModelConfig(unet_width=4))
    frames, flow, audio = (x.float() for x in make_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = model(frames[:, :K], flow[:, :K], audio)
        _, state = model.mme.lstm(torch.rand(1, 128, 2, 2))
    assert rollout.flow.dtype == torch.float32
    assert all(cell.dtype == torch.float32 for _, cell in state)
    # not merely stored as float32: a bf16 value has 16 zero bits at the end
    assert (rollout.flow.view(torch.int32) & 0xFFFF).any()


def test_save_and_load(tmp_path):
    model = make_model(training=False).float()
    model.save_pretrained(tmp_path / "m")
    again = AVModel.from_pretrained(tmp_path / "m")
    frames, flow, audio = (x.float() for x in make_inputs())
    a, b = (m.predict(frames[:, :K], flow[:, :K], audio) for m in (model, again))
    assert torch.equal(a.frames, b.frames) and again.settings == model.settings
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_bad_checkpoints(tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        AVModel.from_pretrained(tmp_path)
    make_model(refinement="unet").save_pretrained(tmp_path / "unet")
    make_model(refinement="car").save_pretrained(tmp_path / "car")
    (tmp_path / "car" / "config.json").write_bytes((tmp_path / "unet" / "config.json").read_bytes())
    with pytest.raises(InputError, match="another variant or stage: it has car.affine"):
        AVModel.from_pretrained(tmp_path / "car")
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot be read"):
        AVModel.from_pretrained(tmp_path / "unet")


def test_inputs_that_do_not_fit():
    model = AVModel(ModelConfig(refinement="none")).eval()
    frames, flow, audio = torch.rand(1, 2, 1, 32, 32), torch.zeros(1, 2, 2, 32, 32), torch.rand(1, 4, 1, 23, 21)
    with pytest.raises(
        ValueError, match=r"frames has shape \(1, 2, 1, 33, 32\), expected H and W to be multiples of 16"
    ):
        model(torch.rand(1, 2, 1, 33, 32), flow, audio)
    with pytest.raises(ValueError, match=r"frames has shape \(1, 2, 3, 32, 32\)"):
        model(torch.rand(1, 2, 3, 32, 32), flow, audio)
    with pytest.raises(ValueError, match="flow has shape"):
        model(frames, flow[:, :1], audio)
    with pytest.raises(ValueError, match="audio has shape"):
        model(frames, flow, audio[..., :20])
    with pytest.raises(ValueError, match="audio covers T = 2 frames, expected more than the K = 2"):
        model(frames, flow, audio[:, :2])
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train().predict(frames, flow, audio)
    with pytest.raises(ValueError, match="one value per channel"):
        model(frames[..., :16, :16], flow[..., :16, :16], audio)
