# Copyright 2026 The img2img-ddpo authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The pipeline against independent oracles: the stock img2img pipeline, DDIMScheduler, torch.distributions, autograd."""

import ast
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)

from components import SD_SCHEDULE, picture, tiny_components
from pipeline_img2img_ddpo import (
    StableDiffusionImg2ImgDDPOPipeline,
    ddim_transition,
    gaussian_log_prob,
    predict_noise,
)


PIPELINE_FILE = Path(__file__).parent.parent / "pipeline_img2img_ddpo.py"


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture(scope="module")
def pipe(components):
    return quiet(StableDiffusionImg2ImgDDPOPipeline(**components))


@pytest.fixture(scope="module")
def stock(components):
    return quiet(StableDiffusionImg2ImgPipeline(**components))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def call(pipeline, **kwargs):
    defaults = dict(
        prompt="a red disc", image=picture(), strength=0.6, num_inference_steps=5, eta=1.0, output_type="np"
    )
    arguments = {**defaults, "generator": seeded(), **kwargs}
    return pipeline(**{k: v for k, v in arguments.items() if v is not None})


class CountRows:
    """Counts the rows each call of the UNet gets: a forward hook, for `with`."""

    def __init__(self, unet):
        self.unet, self.rows = unet, []

    def __enter__(self):
        self.hook = self.unet.register_forward_pre_hook(lambda module, args: self.rows.append(len(args[0])))
        return self.rows

    def __exit__(self, *exception):
        self.hook.remove()


# ---------------------------------------------------------------------------------------------------------------------
# The same images as the parent
# ---------------------------------------------------------------------------------------------------------------------

PARITY = {
    "defaults": {},
    "ddim": {"eta": 0.0},
    "eta half": {"eta": 0.5},
    "no guidance": {"guidance_scale": 1.0},
    "null prompt": {"prompt": "", "guidance_scale": 0.0},
    "negative prompt": {"negative_prompt": "blue"},
    "two prompts": {"prompt": ["a", "b"], "image": [picture(), picture(color=(0, 255, 0))]},
    "three images each": {"num_images_per_prompt": 3},
    "two prompts, two images each": {
        "prompt": ["a", "b"],
        "image": [picture(), picture(color=(0, 255, 0))],
        "num_images_per_prompt": 2,
    },
    "generators": {"num_images_per_prompt": 2, "generator": [seeded(3), seeded(4)]},
    "latents as image": {"image": torch.randn(1, 4, 8, 8, generator=seeded(7))},
    "all steps": {"strength": 1.0},
    "latent output": {"output_type": "latent"},
    "timesteps that do not divide 1000": {"num_inference_steps": 7},
    "cross_attention_kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
}


@pytest.mark.parametrize("return_trajectory", [False, True])
@pytest.mark.parametrize("name", PARITY)
def test_images_equal_the_stock_pipelines(pipe, stock, name, return_trajectory):
    def run(pipeline, **kwargs):
        # a generator has a state: each run gets a copy of the case's
        arguments = dict(PARITY[name])
        if "generator" in arguments:
            arguments["generator"] = [g.clone_state() for g in arguments["generator"]]
        return call(pipeline, **arguments, **kwargs).images

    expected, images = run(stock), run(pipe, return_trajectory=return_trajectory)
    if PARITY[name].get("output_type") == "latent":
        assert torch.equal(images, expected)
    else:
        assert np.array_equal(images, expected)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("thresholding", [False, True])
def test_images_equal_for_other_schedules(prediction_type, thresholding):
    components = tiny_components(prediction_type=prediction_type)
    components["scheduler"] = DDIMScheduler(
        **SD_SCHEDULE, prediction_type=prediction_type, thresholding=thresholding, sample_max_value=2.0
    )
    images = call(quiet(StableDiffusionImg2ImgDDPOPipeline(**components)), return_trajectory=True).images
    assert np.array_equal(images, call(quiet(StableDiffusionImg2ImgPipeline(**components))).images)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def test_any_scheduler_without_a_trajectory(components, scheduler):
    parts = {**components, "scheduler": scheduler.from_config(components["scheduler"].config)}
    images = call(quiet(StableDiffusionImg2ImgDDPOPipeline(**parts))).images
    assert np.array_equal(images, call(quiet(StableDiffusionImg2ImgPipeline(**parts))).images)


def test_timestep_cond_is_passed_on():
    components = tiny_components(time_cond_proj_dim=8)
    images = call(quiet(StableDiffusionImg2ImgDDPOPipeline(**components)), return_trajectory=True).images
    assert np.array_equal(images, call(quiet(StableDiffusionImg2ImgPipeline(**components))).images)


def test_clip_skip_does_what_the_parents_does(pipe, stock):
    """With transformers 5.23 that is an AttributeError in diffusers' `encode_prompt`."""
    try:
        expected = call(stock, clip_skip=1).images
    except AttributeError:
        with pytest.raises(AttributeError):
            call(pipe, clip_skip=1)
    else:
        assert np.array_equal(call(pipe, clip_skip=1).images, expected)


def test_callbacks_see_and_change_what_the_parents_do(pipe, stock):
    seen = {}

    def change(pipeline, i, t, kwargs):
        seen.setdefault(id(pipeline), []).append((i, int(t), sorted(kwargs)))
        return {"latents": kwargs["latents"] * 0.9, "prompt_embeds": kwargs["prompt_embeds"] * 1.1}

    def cut_guidance(pipeline, i, t, kwargs):
        pipeline._guidance_scale = 0.0
        return {"prompt_embeds": kwargs["prompt_embeds"][-1:]}

    for callback in (change, cut_guidance):
        arguments = {
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        }
        expected = call(stock, **arguments).images
        assert np.array_equal(call(pipe, **arguments).images, expected)
    assert seen[id(pipe)] == seen[id(stock)] and len(seen[id(pipe)]) == 3


def test_signature_is_the_parents_and_three_more():
    parent = list(inspect.signature(StableDiffusionImg2ImgPipeline.__call__).parameters.values())
    ours = list(inspect.signature(StableDiffusionImg2ImgDDPOPipeline.__call__).parameters.values())
    extra = ["guidance_rescale", "return_trajectory", "share_start_noise"]
    assert [p.name for p in ours] == [p.name for p in parent[:-1]] + extra + ["kwargs"]
    assert [p.default for p in ours[: len(parent) - 1]] == [p.default for p in parent[:-1]]
    assert "__init__" not in vars(StableDiffusionImg2ImgDDPOPipeline)


def test_ip_adapter(components):
    """An IP-Adapter of random weights, in the format `load_ip_adapter` reads, steers both pipelines alike."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor

    parts = {**tiny_components(), "image_encoder": None}
    unet = parts["unet"]
    torch.manual_seed(0)
    projection = {
        "proj.weight": torch.randn(16 * 4, 12),
        "proj.bias": torch.randn(16 * 4),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    weights, key_id = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            processor = IPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=16)
            weights |= {
                f"{key_id}.to_k_ip.weight": processor.to_k_ip[0].weight,
                f"{key_id}.to_v_ip.weight": processor.to_v_ip[0].weight,
            }
            key_id += 2
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    arguments = {"ip_adapter_image_embeds": [torch.randn(2, 1, 12, generator=seeded(1))], "num_images_per_prompt": 2}
    expected = call(quiet(StableDiffusionImg2ImgPipeline(**parts)), **arguments).images
    pipe = quiet(StableDiffusionImg2ImgDDPOPipeline(**parts))
    assert np.array_equal(call(pipe, return_trajectory=True, **arguments).images, expected)
    shared = call(pipe, share_start_noise=True, eta=0.0, **arguments).images
    np.testing.assert_allclose(shared[0], shared[1])


# ---------------------------------------------------------------------------------------------------------------------
# Transitions and log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


def ddim_in_float64(scheduler, model_output, t, sample, eta):
    """DDIM's equations (12) and (16) for one timestep, written again with Python's floats and float64 tensors."""
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    a_t = scheduler.alphas_cumprod[t].item()
    a_p = scheduler.alphas_cumprod[previous].item() if previous >= 0 else scheduler.final_alpha_cumprod.item()
    x, out = sample.double(), model_output.double()
    if scheduler.config.prediction_type == "epsilon":
        x0, eps = (x - (1 - a_t) ** 0.5 * out) / a_t**0.5, out
    elif scheduler.config.prediction_type == "sample":
        x0, eps = out, (x - a_t**0.5 * out) / (1 - a_t) ** 0.5
    else:
        x0, eps = a_t**0.5 * x - (1 - a_t) ** 0.5 * out, a_t**0.5 * out + (1 - a_t) ** 0.5 * x
    sigma = eta * ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)) ** 0.5
    return a_p**0.5 * x0 + (1 - a_p - sigma**2) ** 0.5 * eps, sigma


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_inference_steps", [10, 50, 1000])
def test_log_probs_agree_with_float64_normal(prediction_type, eta, num_inference_steps):
    scheduler = DDIMScheduler(**SD_SCHEDULE, prediction_type=prediction_type)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.clamp(max=999)  # 1000 steps with an offset of 1 begin at timestep 1000
    sample, output = torch.randn(2, len(timesteps), 4, 8, 8, generator=seeded())
    mean, std = ddim_transition(scheduler, output, timesteps, sample, eta)
    assert mean.dtype == std.dtype == torch.float32 and std.shape == (len(timesteps), 1, 1, 1)
    after = mean + std * torch.randn(sample.shape, generator=seeded(1))
    log_probs = gaussian_log_prob(after, mean, std)
    for i, t in enumerate(timesteps.tolist()):
        normal = torch.distributions.Normal(*ddim_in_float64(scheduler, output[i], t, sample[i], eta))
        expected = normal.log_prob(after[i].double()).mean()
        torch.testing.assert_close(log_probs[i].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("mode", ["plain", "clip_sample", "thresholding"])
def test_transition_is_the_schedulers_step(prediction_type, mode):
    config = {**SD_SCHEDULE, "prediction_type": prediction_type, "sample_max_value": 1.5}
    scheduler = DDIMScheduler(**(config if mode == "plain" else {**config, mode: True}))
    for num_inference_steps in (7, 50):
        scheduler.set_timesteps(num_inference_steps)
        sample, output = torch.randn(2, num_inference_steps, 4, 8, 8, generator=seeded())
        for eta in (0.0, 0.3, 1.0):
            mean, std = ddim_transition(scheduler, output, scheduler.timesteps, sample, eta)
            for i, t in enumerate(scheduler.timesteps):
                row = slice(i, i + 1)
                expected = scheduler.step(
                    output[row], t, sample[row], eta=eta, variance_noise=torch.zeros(1, 4, 8, 8)
                ).prev_sample
                torch.testing.assert_close(mean[row], expected, rtol=2e-5, atol=2e-5)
                previous = t - 1000 // num_inference_steps
                torch.testing.assert_close(
                    std[i].squeeze(), eta * scheduler._get_variance(t, previous) ** 0.5, rtol=5e-5, atol=0
                )


def test_mixed_timesteps_and_etas_equal_single_rows(pipe):
    scheduler = DDIMScheduler(**SD_SCHEDULE)
    scheduler.set_timesteps(20)
    sample, output, after = torch.randn(3, 4, 4, 8, 8, generator=seeded())
    timesteps, etas = scheduler.timesteps[[2, 17, 5, 19]], torch.tensor([1.0, 0.0, 0.3, 0.7])
    embeds, negative = torch.randn(2, 4, 7, 16, generator=seeded(1))
    mean, std = ddim_transition(scheduler, output, timesteps, sample, etas)
    log_probs = gaussian_log_prob(after, mean, std)
    noise = predict_noise(pipe.unet, sample, timesteps, embeds, negative, 3.0, 0.7)
    for i in range(4):
        row = slice(i, i + 1)
        one_mean, one_std = ddim_transition(scheduler, output[row], timesteps[i], sample[row], etas[i].item())
        torch.testing.assert_close(mean[row], one_mean, rtol=0, atol=0)
        torch.testing.assert_close(std[row], one_std, rtol=0, atol=0)
        torch.testing.assert_close(log_probs[row], gaussian_log_prob(after[row], one_mean, one_std))
        one_noise = predict_noise(pipe.unet, sample[row], timesteps[i], embeds[row], negative[row], 3.0, 0.7)
        torch.testing.assert_close(noise[row], one_noise, rtol=1e-4, atol=1e-5)
    assert log_probs[1] == 0


def test_deterministic_rows_have_zero_log_prob_and_gradient():
    mean = torch.randn(2, 4, 8, 8, generator=seeded()).requires_grad_()
    std = torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1).requires_grad_()
    log_prob = gaussian_log_prob(torch.zeros(2, 4, 8, 8), mean, std)
    log_prob.sum().backward()
    assert log_prob[0] == 0 and log_prob[1] != 0
    assert mean.grad[0].abs().max() == 0 and std.grad[0] == 0
    assert torch.isfinite(mean.grad).all() and mean.grad[1].abs().max() > 0


def test_gradient_reaches_the_unet_and_is_right(pipe):
    """d log_prob / d weight through predict_noise + ddim_transition against a central difference."""
    scheduler = DDIMScheduler(**SD_SCHEDULE)
    scheduler.set_timesteps(10)
    sample, after = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    embeds, negative = torch.randn(2, 3, 7, 16, generator=seeded(1))
    weight = pipe.unet.conv_out.bias

    def total():
        noise = predict_noise(pipe.unet, sample, scheduler.timesteps[[1, 4, 8]], embeds, negative, 4.0, 0.5)
        return gaussian_log_prob(
            after, *ddim_transition(scheduler, noise, scheduler.timesteps[[1, 4, 8]], sample, 1.0)
        ).sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    step = 1e-2
    with torch.no_grad():
        for i in range(4):
            weight[i] += step
            above = total()
            weight[i] -= 2 * step
            below = total()
            weight[i] += step
            torch.testing.assert_close(gradient[i], (above - below) / (2 * step), rtol=2e-2, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The trajectory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [(1.0, 0.0), (5.0, 0.0), (5.0, 0.7)])
def test_replay_finds_the_recorded_log_probs(dtype, guidance):
    """Promise 1: the ratio of a stored transition under unchanged weights is 1."""
    scale, rescale = guidance
    pipe = quiet(StableDiffusionImg2ImgDDPOPipeline(**tiny_components())).to(dtype=dtype)
    out = call(
        pipe, guidance_scale=scale, guidance_rescale=rescale, num_images_per_prompt=2, eta=[0.0, 1.0, 0.5],
        return_trajectory=True,
    )  # fmt: skip
    assert out.latents.shape == (2, 4, 4, 8, 8) and out.latents.dtype == torch.float32
    assert out.log_probs.shape == (2, 3) and out.log_probs.dtype == torch.float32
    assert out.timesteps.tolist() == pipe.scheduler.timesteps[-3:].tolist() and out.timesteps.dtype == torch.int64
    assert out.prompt_embeds.shape == (2, 77, 16) and (out.negative_prompt_embeds is None) == (scale == 1.0)
    assert (out.log_probs[:, 0] == 0).all() and (out.log_probs[:, 1:] != 0).all()
    for i, eta in enumerate([0.0, 1.0, 0.5]):
        x, after, t = out.latents[:, i], out.latents[:, i + 1], out.timesteps[i]
        with torch.no_grad():
            noise = predict_noise(pipe.unet, x, t, out.prompt_embeds, out.negative_prompt_embeds, scale, rescale)
        log_prob = gaussian_log_prob(after, *ddim_transition(pipe.scheduler, noise, t, x, eta))
        assert ((log_prob - out.log_probs[:, i]).exp() - 1).abs().max() < 1e-5


def test_recorded_noise_is_standard_normal(pipe):
    """z = (x_p - mean) / std of the recorded steps has the moments of N(0, 1)."""
    out = call(pipe, num_images_per_prompt=16, strength=1.0, return_trajectory=True)
    noise = []
    for i, t in enumerate(out.timesteps):
        with torch.no_grad():
            prediction = predict_noise(
                pipe.unet, out.latents[:, i], t, out.prompt_embeds, out.negative_prompt_embeds, 7.5
            )
        mean, std = ddim_transition(pipe.scheduler, prediction, t, out.latents[:, i], 1.0)
        noise.append((out.latents[:, i + 1] - mean) / std)
    noise = torch.stack(noise)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_guidance_off_runs_one_row_per_sample(pipe):
    for scale in (1.0, 0.5, 0.0):
        with CountRows(pipe.unet) as rows:
            out = call(pipe, prompt=["", "x"], image=[picture()] * 2, guidance_scale=scale, return_trajectory=True)
        assert rows == [2, 2, 2] and out.negative_prompt_embeds is None
        assert torch.equal(out.prompt_embeds, pipe.encode_prompt(["", "x"], "cpu", 1, False)[0])


def test_guidance_rescale_changes_the_images(pipe):
    assert not np.array_equal(call(pipe, guidance_rescale=0.7).images, call(pipe).images)


def test_eta_per_step(pipe, stock):
    assert np.array_equal(call(pipe, eta=[0.5] * 3).images, call(stock, eta=0.5).images)
    out = call(pipe, eta=np.array([0.0, 1.0, 0.0]), num_images_per_prompt=2, return_trajectory=True)
    assert (out.log_probs == 0).tolist() == [[True, False, True]] * 2
    with pytest.raises(ValueError, match="2 values, but 3 steps"):
        call(pipe, eta=[0.0, 1.0])


def test_shared_start_noise_computes_equal_rows_once(pipe):
    images = [picture(), picture(color=(0, 200, 0))]
    arguments = dict(prompt=["a", "b"], image=images, num_images_per_prompt=3, eta=[0.0, 1.0, 0.0], guidance_scale=1.0)
    with CountRows(pipe.unet) as rows:
        shared = call(pipe, share_start_noise=True, return_trajectory=True, **arguments)
    assert rows == [2, 2, 6]

    # the same computation with every row from the start, by hand
    starts = shared.latents[:, 0]
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[3])
    latents = starts
    for i, t in enumerate(shared.timesteps):
        with torch.no_grad():
            noise = predict_noise(pipe.unet, latents, t, shared.prompt_embeds)
        mean, std = ddim_transition(pipe.scheduler, noise, t, latents, arguments["eta"][i])
        recorded = shared.latents[:, i + 1]
        if i == 1:
            assert not torch.equal(recorded[0], recorded[1])
            torch.testing.assert_close(gaussian_log_prob(recorded, mean, std), shared.log_probs[:, i])
        else:
            torch.testing.assert_close(mean, recorded, rtol=1e-4, atol=1e-5)
        latents = recorded

    # each image with its own prompt: without noise, the rows are what the stock pipeline makes of the pair
    deterministic = call(pipe, share_start_noise=[seeded(5), seeded(6)], **{**arguments, "eta": 0.0}).images
    for row, (prompt, image, seed) in {0: ("a", images[0], 5), 3: ("b", images[1], 6), 5: ("b", images[1], 6)}.items():
        alone = call(pipe, prompt=prompt, image=image, generator=seeded(seed), eta=0.0, guidance_scale=1.0).images
        np.testing.assert_allclose(deterministic[row], alone[0], atol=1e-5)


def test_shared_start_noise_with_another_scheduler(components):
    """Euler ancestral adds noise at each step: rows of one image must part at the first."""
    scheduler = EulerAncestralDiscreteScheduler.from_config(components["scheduler"].config)
    pipe = quiet(StableDiffusionImg2ImgDDPOPipeline(**{**components, "scheduler": scheduler}))
    images = call(pipe, share_start_noise=True, num_images_per_prompt=2).images
    assert not np.array_equal(images[0], images[1])


def test_interrupt_leaves_the_steps_that_ran(pipe):
    def stop(pipeline, i, t, kwargs):
        pipeline._interrupt = i == 1
        return kwargs

    out = call(pipe, callback_on_step_end=stop, return_trajectory=True)
    assert len(out.timesteps) == out.log_probs.shape[1] == out.latents.shape[1] - 1 == 2


def test_tuple_output(pipe):
    assert len(call(pipe, return_dict=False)) == 2
    out, values = call(pipe, return_trajectory=True), call(pipe, return_trajectory=True, return_dict=False)
    assert len(values) == 8 and torch.equal(values[2], out.latents) and torch.equal(values[3], out.log_probs)
    plain = call(pipe)
    assert plain.latents is plain.log_probs is plain.timesteps is plain.prompt_embeds is plain.means is None


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_no_steps_names_both_numbers(pipe):
    with pytest.raises(ValueError, match=r"num_inference_steps=5.*strength=0\.1.*0 steps"):
        call(pipe, strength=0.1)


@pytest.mark.parametrize(
    "scheduler, eta",
    [
        (PNDMScheduler(), 1.0),
        (DDIMScheduler(**{**SD_SCHEDULE, "clip_sample": True}), 1.0),
        (DDIMScheduler(**{**SD_SCHEDULE, "set_alpha_to_one": True}), 1.0),
        (DDIMScheduler(**{**SD_SCHEDULE, "steps_offset": 0}), 1.0),
    ],
)
def test_trajectory_without_a_density_is_refused(components, scheduler, eta):
    pipe = quiet(StableDiffusionImg2ImgDDPOPipeline(**components))
    pipe.scheduler = scheduler  # not through __init__, where diffusers mends two of these with a deprecation warning
    with pytest.raises(ValueError, match="return_trajectory=True.*") as error:
        call(pipe, eta=eta, return_trajectory=True)
    # the line that mends it does
    remedy = str(error.value).split("se: ")[-1]
    namespace = {"pipe": pipe, "DDIMScheduler": DDIMScheduler}
    exec(remedy, namespace)
    assert call(pipe, eta=eta, return_trajectory=True).log_probs.isfinite().all()


def test_zero_variance_is_fine_where_the_step_is_deterministic(components):
    scheduler = DDIMScheduler(**{**SD_SCHEDULE, "set_alpha_to_one": True})
    pipe = quiet(StableDiffusionImg2ImgDDPOPipeline(**{**components, "scheduler": scheduler}))
    assert call(pipe, eta=[1.0, 1.0, 0.0], return_trajectory=True).log_probs[0, 2] == 0


def test_eta_outside_its_range_is_refused(pipe):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        call(pipe, eta=1.5, return_trajectory=True)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "folder"])
def test_loads_as_a_custom_pipeline(stock, tmp_path, form):
    stock.save_pretrained(tmp_path / "model")
    custom_pipeline = PIPELINE_FILE
    if form == "folder":
        custom_pipeline = tmp_path / "community"
        custom_pipeline.mkdir()
        shutil.copy(PIPELINE_FILE, custom_pipeline / "pipeline.py")
    loaded = DiffusionPipeline.from_pretrained(
        str(tmp_path / "model"), custom_pipeline=str(custom_pipeline), trust_remote_code=True, safety_checker=None
    )
    assert np.array_equal(call(quiet(loaded), return_trajectory=True).images, call(stock).images)

    # saved, it is an ordinary Stable Diffusion folder
    loaded.save_pretrained(tmp_path / "again")
    again = StableDiffusionImg2ImgPipeline.from_pretrained(str(tmp_path / "again"), safety_checker=None)
    assert np.array_equal(call(quiet(again)).images, call(stock).images)


def test_loads_from_pipe(stock):
    loaded = DiffusionPipeline.from_pipe(
        stock, custom_pipeline=str(PIPELINE_FILE), trust_remote_code=True, dtype=torch.float32
    )
    assert loaded.unet is stock.unet
    assert np.array_equal(call(quiet(loaded), return_trajectory=True).images, call(stock).images)


def test_file_is_a_self_contained_community_pipeline():
    tree = ast.parse(PIPELINE_FILE.read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 0]
    assert [
        n.name for n in tree.body if isinstance(n, ast.ClassDef) and "Pipeline" in ast.unparse(n.bases[0])
        and "Output" not in ast.unparse(n.bases[0])
    ] == ["StableDiffusionImg2ImgDDPOPipeline"]  # fmt: skip
