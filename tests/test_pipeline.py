"""Test the pipeline against the stock img2img pipeline, `DDIMScheduler`, `torch.distributions` and autograd."""

import inspect
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.schedulers import EulerAncestralDiscreteScheduler, PNDMScheduler

from components import SD_SCHEDULE, picture, tiny_components
from pipeline_img2img_ddpo import StableDiffusionImg2ImgDDPOPipeline, ddim_transition, gaussian_log_prob, predict_noise


PIPELINE_FILE = Path(__file__).parent.parent / "pipeline_img2img_ddpo.py"
TWO_PICTURES = [picture(), picture(color=(0, 255, 0))]


def pipeline_of(**parts):
    return StableDiffusionImg2ImgDDPOPipeline(**tiny_components() | parts)


def stock_of(pipe):
    """Return the parent pipeline with the same components."""
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)


@pytest.fixture(scope="module")
def pipe():
    return pipeline_of()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def call(pipeline, seed=0, **arguments):
    """Call `pipeline` for three of five steps. `seed` may be a list with one seed per generator."""
    pipeline.set_progress_bar_config(disable=True)
    defaults = {"prompt": "a red disc", "image": picture(), "strength": 0.6, "num_inference_steps": 5, "eta": 1.0}
    generator = [seeded(one) for one in seed] if isinstance(seed, list) else seeded(seed)
    return pipeline(**defaults | {"output_type": "np", "generator": generator} | arguments)


def replay(pipe, out, etas, scale=1.0, rescale=0.0):
    """Compute means, standard deviations and log-probabilities again from the recorded trajectory."""
    steps = []
    for i, t in enumerate(out.timesteps):
        before, after = out.latents[:, i], out.latents[:, i + 1]
        with torch.no_grad():
            noise = predict_noise(pipe.unet, before, t, out.prompt_embeds, out.negative_prompt_embeds, scale, rescale)
        mean, std = ddim_transition(pipe.scheduler, noise, t, before, etas[i])
        steps.append((mean, std, gaussian_log_prob(after, mean, std)))
    return [torch.stack(parts, dim=1) for parts in zip(*steps)]


# ---- The same images as the parent ----------------------------------------------------------------------------------
PARITY = {
    "defaults": {},
    "ddim": {"eta": 0.0},
    "eta per step": {"eta": [0.5] * 3},
    "no guidance": {"guidance_scale": 1.0},
    "null prompt": {"prompt": "", "guidance_scale": 0.0},
    "negative prompt": {"negative_prompt": "blue"},
    "two prompts, two images each": {"prompt": ["a", "b"], "image": TWO_PICTURES, "num_images_per_prompt": 2},
    "generators": {"num_images_per_prompt": 2, "seed": [3, 4]},
    "latents as image": {"image": torch.randn(1, 4, 8, 8, generator=seeded(7))},
    "all steps": {"strength": 1.0},
    "timesteps that do not divide 1000": {"num_inference_steps": 7},
}


@pytest.mark.parametrize("return_trajectory", [False, True])
@pytest.mark.parametrize("name", PARITY)
def test_images_equal_the_stock_pipelines(pipe, name, return_trajectory):
    """Expect equal bits, or equality up to rounding if `ddim_transition` takes the place of `scheduler.step`."""
    images = call(pipe, return_trajectory=return_trajectory, **PARITY[name]).images
    one_eta = {"eta": np.max(PARITY[name].get("eta", 1.0))}  # the parent does not take a list
    expected = call(stock_of(pipe), **PARITY[name] | one_eta).images
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5 if return_trajectory else 0)


CLIPPING, THRESHOLDING = {"clip_sample": True}, {"thresholding": True, "sample_max_value": 2.0}


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerAncestralDiscreteScheduler])
def test_images_equal_with_any_scheduler(kind):
    pipe = pipeline_of(scheduler=kind.from_config(SD_SCHEDULE))
    assert np.array_equal(call(pipe).images, call(stock_of(pipe)).images)


def test_a_callback_may_stop_as_the_parents_does(pipe):
    rows = []

    def stop(pipeline, i, t, kwargs):
        rows.append((i, int(t), len(kwargs["latents"])))
        pipeline._interrupt = i == 1
        return kwargs

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"], "callback_on_step_end": stop}
    assert np.array_equal(call(pipe, **inputs).images, call(stock_of(pipe), **inputs).images)
    assert rows[:2] == rows[2:]
    shared = {"num_images_per_prompt": 3, "share_start_noise": True, "eta": 0.0}
    out = call(pipe, return_trajectory=True, **inputs, **shared)
    assert [size for _, _, size in rows[4:]] == [3, 3]
    assert len(out.timesteps) == out.log_probs.shape[1] == out.latents.shape[1] - 1 == 2


CONDITIONING = ["prompt_embeds", "negative_prompt_embeds"]
CHANGES = [
    ("prompt_embeds", lambda pipe, i, t, kwargs: {"prompt_embeds": kwargs["prompt_embeds"] * 2}),
    ("prompt_embeds", lambda pipe, i, t, kwargs: {"prompt_embeds": kwargs["prompt_embeds"].mul_(2)}),
    ("negative_prompt_embeds", lambda pipe, i, t, kwargs: {CONDITIONING[1]: kwargs[CONDITIONING[1]].mul_(2)}),
    ("negative_prompt_embeds", lambda pipe, i, t, kwargs: {CONDITIONING[1]: None}),
    ("guidance_scale", lambda pipe, i, t, kwargs: setattr(pipe, "_guidance_scale", 5.0) or kwargs),
    ("prompt_embeds", SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)),
]


@pytest.mark.parametrize("name, change", CHANGES)
def test_a_trajectory_refuses_callbacks_that_change_its_conditioning(pipe, name, change):
    inputs = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": CONDITIONING}
    assert np.array_equal(call(pipe, **inputs).images, call(stock_of(pipe), **inputs).images)
    with pytest.raises(ValueError, match=f"changed `{name}`.*other log-probabilities"):
        call(pipe, return_trajectory=True, **inputs)


def test_signature_is_the_parents_and_four_more():
    parent = inspect.signature(StableDiffusionImg2ImgPipeline.__call__).parameters
    ours = inspect.signature(StableDiffusionImg2ImgDDPOPipeline.__call__).parameters
    more = ["guidance_rescale", "return_trajectory", "share_start_noise", "steps"]
    assert list(ours) == [*list(parent)[:-1], *more, "kwargs"]
    assert all(ours[name].default == parent[name].default for name in parent)
    assert "__init__" not in vars(StableDiffusionImg2ImgDDPOPipeline)


# ---- Transitions and log-probabilities ------------------------------------------------------------------------------
TRANSITIONS = [({}, 7), ({}, 50), ({}, 1000), (CLIPPING, 7), (CLIPPING, 50), (THRESHOLDING, 7), (THRESHOLDING, 50)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("mode, steps", TRANSITIONS)
def test_transitions_agree_with_the_scheduler_in_float64(prediction_type, mode, steps):
    """Compare rows of mixed timesteps and etas with `DDIMScheduler.step` and `Normal`, and with each row alone."""
    scheduler, exact = (DDIMScheduler(**SD_SCHEDULE | mode, prediction_type=prediction_type) for _ in range(2))
    scheduler.set_timesteps(steps)
    exact.set_timesteps(steps)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
    timesteps = scheduler.timesteps.clamp(max=999).repeat(4)  # 1000 steps with an offset of 1 begin at 1000
    etas = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat_interleave(steps)
    sample, output, noise = torch.randn(3, 4 * steps, 4, 8, 8, generator=seeded())
    mean, std = ddim_transition(scheduler, output, timesteps, sample, etas, timesteps - 1000 // steps)
    assert mean.dtype == std.dtype == torch.float32 and std.shape == (4 * steps, 1, 1, 1)
    after = mean + std * noise
    log_probs = gaussian_log_prob(after, mean, std)
    for i, (t, eta) in enumerate(zip(timesteps, etas.tolist())):
        row, no_noise = slice(i, i + 1), torch.zeros(1, 4, 8, 8)
        alone = ddim_transition(scheduler, output[row], t, sample[row], eta)
        torch.testing.assert_close((mean[row], std[row]), alone, rtol=0, atol=0)
        step = exact.step(output[row].double(), t, sample[row].double(), eta=eta, variance_noise=no_noise)
        exact_mean, exact_std = step.prev_sample, eta * exact._get_variance(t, t - 1000 // steps) ** 0.5
        torch.testing.assert_close(mean[row].double(), exact_mean, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(std[i].squeeze().double(), exact_std, rtol=1e-5, atol=0)
        if eta > 0:
            expected = torch.distributions.Normal(exact_mean, exact_std).log_prob(after[row].double()).mean()
            torch.testing.assert_close(log_probs[i].double(), expected, rtol=1e-5, atol=1e-7)


# ---- The trajectory -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale, rescale", [(1.0, 0.0), (5.0, 0.0), (5.0, 0.7)])
def test_replay_finds_the_recorded_log_probs(dtype, scale, rescale):
    """Test promise 1: the ratio of a recorded step is 1 under unchanged weights. Also test that its noise is normal."""
    pipe, etas = pipeline_of().to(dtype=dtype), np.array([0.0, 1.0, 0.5])
    arguments = {"guidance_scale": scale, "guidance_rescale": rescale, "num_images_per_prompt": 16, "eta": etas}
    out = call(pipe, return_trajectory=True, **arguments)
    assert out.latents.shape == (16, 4, 4, 8, 8) and out.latents.dtype == torch.float32
    assert out.log_probs.shape == (16, 3) and out.log_probs.dtype == torch.float32
    assert out.timesteps.tolist() == pipe.scheduler.timesteps[-3:].tolist() and out.timesteps.dtype == torch.int64
    assert out.prompt_embeds.shape == (16, 77, 16) and (out.negative_prompt_embeds is None) == (scale == 1.0)
    assert (out.log_probs[:, 0] == 0).all() and (out.log_probs[:, 1:] != 0).all()
    means, stds, log_probs = replay(pipe, out, etas, scale, rescale)
    assert stds.shape == (16, 3, 1, 1, 1) and ((log_probs - out.log_probs).exp() - 1).abs().max() < 1e-5
    torch.testing.assert_close(out.means, means)
    noise = ((out.latents[:, 1:] - means) / stds)[:, 1:]
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_shared_start_noise_changes_no_image(pipe):
    arguments = {"prompt": ["a", "b"], "image": TWO_PICTURES, "num_images_per_prompt": 3, "guidance_scale": 1.0}
    with mock.patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as forward:
        call(pipe, share_start_noise=True, eta=[0.0, 1.0, 0.0], **arguments)
    assert [len(args[0]) for args, _ in forward.call_args_list] == [2, 2, 6]

    # Each image goes with its own prompt. Without noise, the stock pipeline makes the same of each pair alone.
    deterministic = call(pipe, share_start_noise=[seeded(5), seeded(6)], eta=0.0, **arguments).images
    for i in range(2):
        alone = {"prompt": "ab"[i], "image": TWO_PICTURES[i], "seed": 5 + i, "eta": 0.0, "guidance_scale": 1.0}
        expected = call(stock_of(pipe), **alone).images.repeat(3, axis=0)
        np.testing.assert_allclose(deterministic[3 * i : 3 * i + 3], expected, atol=1e-5)


def test_shared_start_noise_comes_from_the_first_generator_of_each_image(pipe):
    """Compare each image's first sample with the stock pipeline. The others have their own noise after the start."""
    arguments = {"guidance_scale": 1.0, "output_type": "latent"}
    pairs = {"prompt": ["a", "b"], "image": TWO_PICTURES, "num_images_per_prompt": 3, "seed": [1, 2, 3, 4, 5, 6]}
    out = call(pipe, share_start_noise=True, return_trajectory=True, **arguments, **pairs)
    for i in range(2):
        alone = {"prompt": "ab"[i], "image": TWO_PICTURES[i], "seed": 1 + 3 * i}
        expected = call(stock_of(pipe), **arguments, **alone).images[0]
        torch.testing.assert_close(out.images[3 * i], expected, rtol=0, atol=1e-5)
    means, stds, _ = replay(pipe, out, [1.0] * 3)
    for row in (1, 2, 4, 5):
        assert torch.equal(out.latents[row, 0], out.latents[row // 3 * 3, 0])
        noise = torch.randn(4, 8, 8, generator=seeded(1 + row))
        torch.testing.assert_close(out.latents[row, 1], means[row, 0] + stds[row, 0] * noise, rtol=0, atol=1e-5)


# ---- Steps that are left out ----------------------------------------------------------------------------------------
def test_steps_jump_to_where_the_next_begins_and_to_the_end(pipe):
    """Compare with DDIM's formula in float64. The schedule has the timesteps 601, 401, 201 and 1.

    The step that jumps has no noise and no density, though its `eta` is 1."""
    etas = [0.0, 1.0, 0.0]
    out = call(pipe, strength=0.8, eta=etas, steps=[0, 1, 3], return_trajectory=True, output_type="latent")
    assert out.timesteps.tolist() == [601, 401, 1] and out.latents.shape[1] == 4 and (out.log_probs == 0).all()
    alphas = pipe.scheduler.alphas_cumprod.double()
    embeds = (out.prompt_embeds, out.negative_prompt_embeds)
    arrivals = [alphas[401], alphas[1], alphas[0]]  # Stable Diffusion's final alpha is that of timestep 0
    for i, (t, a_p) in enumerate(zip(out.timesteps, arrivals)):
        x_t, a_t = out.latents[:, i].double(), alphas[t]
        with torch.no_grad():
            noise = predict_noise(pipe.unet, out.latents[:, i], t, *embeds, 7.5).double()
        expected = a_p**0.5 * (x_t - (1 - a_t) ** 0.5 * noise) / a_t**0.5 + (1 - a_p) ** 0.5 * noise
        torch.testing.assert_close(out.latents[:, i + 1].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.images, out.latents[:, -1])


@pytest.mark.parametrize("make", [range, lambda n: tuple(range(n)), np.arange, torch.arange])
def test_steps_may_be_any_sequence_or_tensor(pipe, make):
    assert torch.equal(*(call(pipe, steps=steps, return_trajectory=True).latents for steps in ([0, 1, 2], make(3))))
    with pytest.raises(ValueError, match=r"begin with 0, ascend, and be below 3, but is \[1, 2\]"):
        call(pipe, steps=make(3)[1:])


# ---- Refusals and loading -------------------------------------------------------------------------------------------
REFUSALS = {
    r"num_inference_steps=5.*strength=0\.1.*0 steps": {"strength": 0.1},
    "2 values, but 3 steps": {"eta": [0.0, 1.0]},
    r"\[0, 1\]": {"eta": 1.5, "return_trajectory": True},
    r"below 3, but is \[0, 2, 1\]": {"steps": [0, 2, 1]},
    r"below 3, but is \[0, 3\]": {"steps": [0, 3]},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(pipe, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **REFUSALS[message])


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("change", [None, CLIPPING, {"set_alpha_to_one": True}, {"steps_offset": 0}, ZERO_SNR])
def test_trajectory_without_a_density_is_refused(change):
    """Also run the code that the error recommends."""
    pipe = pipeline_of()
    # The pipeline's `__init__` would mend two of these schedulers with a deprecation warning
    pipe.scheduler = DDIMScheduler(**SD_SCHEDULE | change) if change else PNDMScheduler()
    with pytest.raises(ValueError, match="return_trajectory=True.*") as error:
        call(pipe, strength=1.0, return_trajectory=True)
    exec(str(error.value).split("se: ")[-1], {"pipe": pipe, "DDIMScheduler": DDIMScheduler})
    assert call(pipe, strength=1.0, return_trajectory=True).log_probs.isfinite().all()


def test_loads_as_a_custom_pipeline(pipe, tmp_path):
    stock = stock_of(pipe)
    stock.save_pretrained(tmp_path / "model")
    custom = {"custom_pipeline": str(PIPELINE_FILE), "trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path / "model"), safety_checker=None, **custom)
    expected = call(stock).images
    assert np.array_equal(call(loaded).images, expected)
    assert call(loaded, return_trajectory=True).log_probs.shape == (1, 3)
    # The saved folder is one of ordinary Stable Diffusion
    loaded.save_pretrained(tmp_path / "again")
    again = StableDiffusionImg2ImgPipeline.from_pretrained(str(tmp_path / "again"), safety_checker=None)
    assert np.array_equal(call(again).images, expected)
