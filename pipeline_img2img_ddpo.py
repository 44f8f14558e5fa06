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
"""Image-to-image Stable Diffusion whose denoising steps are a policy: a diffusers community pipeline for DDPO.

A DDIM step from x_t to x_p (p being the previous timestep) draws from N(mean, std^2 I), where mean depends on the UNet
and std on the schedule and `eta` alone. The mathematics are three pure functions, which sampling and training both
call, so that the log-probability of a recorded step is found again exactly as long as the weights have not changed:

    noise = predict_noise(unet, x_t, t, prompt_embeds, negative_prompt_embeds, guidance_scale)
    mean, std = ddim_transition(scheduler, noise, t, x_t, eta)
    log_prob = gaussian_log_prob(x_p, mean, std)

References: DDPO (https://huggingface.co/papers/2305.13301), DDIM (https://huggingface.co/papers/2010.02502).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils import deprecate, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


# The remedy that errors name: in this scheduler every step with `eta` has a density
DENSITY = "clip_sample=False, set_alpha_to_one=False, steps_offset=1"
DDIM_WITH_DENSITY = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {DENSITY})"
EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers import DDIMScheduler, DiffusionPipeline
        >>> from diffusers.utils import load_image
        >>> custom = {"custom_pipeline": "pipeline_img2img_ddpo.py", "trust_remote_code": True}
        >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", **custom).to("cuda")
        >>> pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        >>> image = load_image("input.png").resize((512, 512))
        >>> out = pipe("a watercolour", image, strength=0.4, eta=1.0, return_trajectory=True)
        >>> out.log_probs.shape, out.latents.shape
        (torch.Size([1, 20]), torch.Size([1, 21, 4, 64, 64]))
        ```
"""


def predict_noise(
    unet: torch.nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor | int,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    **unet_kwargs,
) -> torch.Tensor:
    """
    The UNet's prediction, with classifier-free guidance if it is on. Differentiable.

    Args:
        unet: a `UNet2DConditionModel`, bare or wrapped.
        latents: `(B, C, h, w)`; cast to the dtype of `prompt_embeds`, which is the one the UNet runs in.
        timestep: one for all rows, or `(B,)`: a batch may mix timesteps.
        prompt_embeds, negative_prompt_embeds: `(B, L, E)`; the latter is `None` for no guidance.
        guidance_scale: w of equation (2) of Imagen (https://huggingface.co/papers/2205.11487). With `w <= 1`, or
            without `negative_prompt_embeds`, guidance is off: one row per sample runs, conditioned on its own prompt.
        guidance_rescale: phi of section 3.4 of https://huggingface.co/papers/2305.08891; 0 is off.
        unet_kwargs: passed on; under guidance the negative rows come first.

    Returns:
        `(B, C, h, w)`: noise, sample or velocity, as the model was trained to predict.
    """
    guided = negative_prompt_embeds is not None and guidance_scale > 1
    latents = latents.to(prompt_embeds.dtype)
    if guided:
        latents = torch.cat([latents] * 2)
        prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        if torch.is_tensor(timestep) and timestep.ndim > 0:
            timestep = torch.cat([timestep] * 2)

    noise_pred = unet(latents, timestep, encoder_hidden_states=prompt_embeds, return_dict=False, **unet_kwargs)[0]

    if guided:
        noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
        noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
        if guidance_rescale > 0.0:
            noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, guidance_rescale=guidance_rescale)
    return noise_pred


def ddim_transition(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
    eta: torch.Tensor | float,
    prev_timestep: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The Gaussian that one DDIM step draws from: equations (12) and (16) of https://huggingface.co/papers/2010.02502,
    with `DDIMScheduler.step`'s prediction types, thresholding and clipping. Differentiable.

    Args:
        scheduler: after `set_timesteps`, which fixes the distance to the previous timestep.
        model_output, sample: `(B, C, h, w)`, what `predict_noise` returns, and x_t.
        timestep, eta: one for all rows, or `(B,)`. An eta of 0 is deterministic DDIM, 1 is DDPM.
        prev_timestep: where the step goes, as `timestep`; by default DDIM's own
            `timestep - num_train_timesteps // num_inference_steps`. Below 0 is the schedule's end.

    Returns:
        mean `(B, C, h, w)` and std `(B, 1, 1, 1)`, float32 whatever the inputs' dtype.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("The scheduler has no inference steps: call `scheduler.set_timesteps(...)` first.")
    sample = sample.float()
    model_output = model_output.float()

    # 1. alphas of this and of the previous timestep; below zero the previous one is the scheduler's final alpha
    timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1, 1, 1)
    if prev_timestep is None:
        prev_timestep = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    prev_timestep = torch.as_tensor(prev_timestep, device=sample.device).reshape(-1, 1, 1, 1)
    alphas_cumprod = scheduler.alphas_cumprod.to(sample.device, torch.float32)
    alpha_prod_t = alphas_cumprod[timestep]
    alpha_prod_t_prev = alphas_cumprod[prev_timestep.clamp(min=0)]
    alpha_prod_t_prev = alpha_prod_t_prev.masked_fill(prev_timestep < 0, float(scheduler.final_alpha_cumprod))
    beta_prod_t = 1 - alpha_prod_t
    beta_prod_t_prev = 1 - alpha_prod_t_prev

    # 2. predicted original sample and noise
    if scheduler.config.prediction_type == "epsilon":
        pred_original_sample = (sample - beta_prod_t**0.5 * model_output) / alpha_prod_t**0.5
        pred_epsilon = model_output
    elif scheduler.config.prediction_type == "sample":
        pred_original_sample = model_output
        pred_epsilon = (sample - alpha_prod_t**0.5 * pred_original_sample) / beta_prod_t**0.5
    else:  # v_prediction
        pred_original_sample = alpha_prod_t**0.5 * sample - beta_prod_t**0.5 * model_output
        pred_epsilon = alpha_prod_t**0.5 * model_output + beta_prod_t**0.5 * sample

    if scheduler.config.thresholding:
        pred_original_sample = scheduler._threshold_sample(pred_original_sample)
    elif scheduler.config.clip_sample:
        clip_sample_range = scheduler.config.clip_sample_range
        pred_original_sample = pred_original_sample.clamp(-clip_sample_range, clip_sample_range)

    # 3. the Gaussian. Equation (16) has 1 - a_t / a_p, which loses half the digits of float32 where neighbouring
    # alphas are almost equal; their difference is exact.
    variance = beta_prod_t_prev / beta_prod_t * ((alpha_prod_t_prev - alpha_prod_t) / alpha_prod_t_prev)
    if not isinstance(eta, (int, float)):
        eta = torch.as_tensor(eta, dtype=torch.float32, device=sample.device).reshape(-1, 1, 1, 1)
    std = eta * variance**0.5
    mean = alpha_prod_t_prev**0.5 * pred_original_sample + (beta_prod_t_prev - std**2) ** 0.5 * pred_epsilon
    return mean, std.expand(sample.shape[0], 1, 1, 1)


def gaussian_log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Log-density of `sample` under N(mean, std^2 I) in nats per latent element: the mean over the non-batch dimensions,
    as DDPO takes it.

    Args:
        sample, mean: `(B, C, h, w)`.
        std: `(B, 1, 1, 1)`. A row with `std == 0` is deterministic and has no density: it counts 0, and so does its
            gradient.

    Returns:
        `(B,)` float32.
    """
    sample = sample.float()
    mean = mean.float()
    std = std.float()
    stochastic = std > 0
    std = torch.where(stochastic, std, 1.0)
    log_prob = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return torch.where(stochastic, log_prob, 0.0).mean(dim=tuple(range(1, sample.ndim)))


@dataclass
class StableDiffusionImg2ImgDDPOPipelineOutput(StableDiffusionPipelineOutput):
    """`images` and `nsfw_content_detected` as the parent's; the rest is `None` without `return_trajectory=True`."""

    latents: torch.Tensor | None = (
        None  # (B, S+1, C, h, w) float32: x before the first of the S steps ... after the last
    )
    log_probs: torch.Tensor | None = None  # (B, S) float32, nats per latent element; exactly 0 on deterministic steps
    timesteps: torch.Tensor | None = None  # (S,) int64, of the steps that were run
    prompt_embeds: torch.Tensor | None = None  # (B, L, E): what conditioned each row
    negative_prompt_embeds: torch.Tensor | None = None  # (B, L, E), or `None` if guidance was off
    means: torch.Tensor | None = None  # (B, S, C, h, w) float32, of the steps' Gaussians, for an exact KL


class StableDiffusionImg2ImgDDPOPipeline(StableDiffusionImg2ImgPipeline):
    r"""
    `StableDiffusionImg2ImgPipeline` that can return its denoising trajectory with log-probabilities, vary `eta` from
    step to step, leave steps out, and share the computation of samples as long as they are equal. Everything else is
    the parent's: components, loading and saving, arguments, and, for the same generator and `eta`, the images.
    """

    def select_steps(self, timesteps: torch.Tensor, steps: Sequence[int], etas: list[float]) -> tuple:
        """Of those that are run: the `timesteps` `(S,)` at the indices `steps`; where each goes `(S,)`, to where the full
        schedule is when the next one begins, the last to its end; the S etas, 0 where a step jumps over others."""
        name = type(self.scheduler).__name__
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"`return_trajectory=True` and `steps` need DDIM, not {name}. Use: {DDIM_WITH_DENSITY}")
        if steps[:1] != [0] or steps != sorted(set(steps)) or steps[-1] >= len(timesteps):
            raise ValueError(f"`steps` must begin with 0, ascend, and be below {len(timesteps)}, but is {steps}.")
        arrivals = torch.tensor([*steps[1:], len(timesteps)])
        stride = self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        prev_timesteps = timesteps[arrivals - 1] - stride
        jumps = arrivals - torch.tensor(steps) > 1
        return timesteps[steps], prev_timesteps, [0.0 if jump else eta for jump, eta in zip(jumps, etas)]

    def check_trajectory(self, timesteps: torch.Tensor, etas: Sequence[float]) -> None:
        """Raises a `ValueError` with the remedy if the steps (`timesteps` with their `etas`) have no density."""
        config = self.scheduler.config
        if not all(0 <= eta <= 1 for eta in etas):
            raise ValueError(f"`return_trajectory=True` needs every `eta` in [0, 1], but they are {etas}.")
        if config.clip_sample and not config.thresholding:
            raise ValueError(
                f"`return_trajectory=True`: `clip_sample=True` cuts the policy's gradient. Use: {DDIM_WITH_DENSITY}"
            )
        if config.prediction_type == "epsilon" and self.scheduler.alphas_cumprod[timesteps[0]] == 0:
            raise ValueError(
                "`return_trajectory=True`: predicted noise says nothing where no signal is left. Lower `strength`, or"
                " use: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)"
            )
        zeros = torch.zeros(len(timesteps), 1, 1, 1)
        _, stds = ddim_transition(self.scheduler, zeros, timesteps, zeros, etas)
        without_noise = timesteps[(torch.tensor(etas) > 0) & ~(stds.flatten() > 0)].tolist()
        if without_noise:
            raise ValueError(
                f"`return_trajectory=True`: the steps at timesteps {without_noise} have no variance, hence no density,"
                f" under this scheduler. Set their `eta` to 0. Use: {DDIM_WITH_DENSITY}"
            )

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] = None,
        image: PipelineImageInput = None,
        strength: float = 0.8,
        num_inference_steps: int | None = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float | None = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float | Sequence[float] | None = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        guidance_rescale: float = 0.0,
        return_trajectory: bool = False,
        share_start_noise: bool | torch.Generator | list[torch.Generator] = False,
        steps: Sequence[int] | None = None,
        **kwargs,
    ) -> StableDiffusionImg2ImgDDPOPipelineOutput | tuple:
        r"""
        As `StableDiffusionImg2ImgPipeline.__call__`, whose arguments it takes, with these differences:

        Args:
            eta (`float` or sequence of `float`, *optional*, defaults to 0.0):
                As the parent's, or one value per step that is run. A step with 0 is deterministic.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                phi of section 3.4 of https://huggingface.co/papers/2305.08891; 0 is off.
            return_trajectory (`bool`, *optional*, defaults to `False`):
                Also return latents, log-probabilities, timesteps and embeddings. Latents are then float32 throughout,
                and steps are drawn from `ddim_transition`'s Gaussian itself.
            share_start_noise (`bool`, `torch.Generator` or list of them, *optional*, defaults to `False`):
                Start the `num_images_per_prompt` samples of one image and prompt from the same noise. As long as the
                steps are deterministic these are equal, and the UNet runs on one of them (on all, if a callback is to
                see them). `True` draws the noise from the generator of each image's first sample; a generator, or a
                list with one per image, draws it from those. Image i goes with prompt i; the parent repeats images.
            steps (sequence of `int`, *optional*):
                Of the steps that `strength` leaves, the indices of those that are run, ascending from 0: each goes to
                where the next begins, the last to the schedule's end. One that jumps is deterministic. DDIM only.

        Examples:

        Returns:
            [`StableDiffusionImg2ImgDDPOPipelineOutput`], or its values as a tuple if `return_dict` is `False` (the
            first two, as the parent's, without `return_trajectory`).

        Raises:
            ValueError: with the remedy, if no step is left to run or a recorded one would have no density.
        """

        callback = kwargs.pop("callback", None)
        callback_steps = kwargs.pop("callback_steps", None)

        if callback is not None:
            deprecate(
                "callback",
                "1.0.0",
                "Passing `callback` as an input argument to `__call__` is deprecated, consider use `callback_on_step_end`",
            )
        if callback_steps is not None:
            deprecate(
                "callback_steps",
                "1.0.0",
                "Passing `callback_steps` as an input argument to `__call__` is deprecated, consider use `callback_on_step_end`",
            )

        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt,
            strength,
            callback_steps,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
        )

        self._guidance_scale = guidance_scale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        # 2. Define call parameters
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        device = self._execution_device

        # 3. Encode input prompt
        text_encoder_lora_scale = (
            self.cross_attention_kwargs.get("scale", None) if self.cross_attention_kwargs is not None else None
        )
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=text_encoder_lora_scale,
            clip_skip=self.clip_skip,
        )
        trajectory_embeds = (prompt_embeds, negative_prompt_embeds if self.do_classifier_free_guidance else None)
        # For classifier free guidance, we need to do two forward passes.
        # Here we concatenate the unconditional and text embeddings into a single batch
        # to avoid doing two forward passes
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])

        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image,
                ip_adapter_image_embeds,
                device,
                batch_size * num_images_per_prompt,
                self.do_classifier_free_guidance,
            )

        # 4. Preprocess image
        image = self.image_processor.preprocess(image)

        # 5. set timesteps
        requested_steps = num_inference_steps
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength, device)
        if len(timesteps) == 0:
            raise ValueError(
                f"`num_inference_steps={requested_steps}` with `strength={strength}` leaves"
                " int(num_inference_steps * strength) = 0 steps to run: raise one of them."
            )
        selected = list(range(len(timesteps)) if steps is None else steps)
        etas = [eta] * len(selected) if np.ndim(eta) == 0 else [float(step_eta) for step_eta in eta]
        if len(etas) != len(selected):
            raise ValueError(f"`eta` has {len(etas)} values, but {len(selected)} steps are run: pass one per step.")
        own_steps = return_trajectory or steps is not None
        if own_steps:
            timesteps, prev_timesteps, etas = self.select_steps(timesteps, selected, etas)
            num_inference_steps = len(timesteps)
        if return_trajectory:
            self.check_trajectory(timesteps.cpu(), etas)
        latent_timestep = timesteps[:1].repeat(batch_size * num_images_per_prompt)

        # 6. Prepare latent variables. `copies` rows of an image are equal, and computed once, until a step adds noise.
        if share_start_noise:
            copies = num_images_per_prompt
            start_generator = share_start_noise
            if share_start_noise is True:
                start_generator = generator[::copies] if isinstance(generator, list) else generator
        else:
            copies = 1
            start_generator = generator
        latents = self.prepare_latents(
            image,
            latent_timestep[::copies],
            batch_size,
            num_images_per_prompt // copies,
            prompt_embeds.dtype,
            device,
            start_generator,
        )
        if return_trajectory:
            latents = latents.float().contiguous()
        if callback_on_step_end is not None and copies > 1:
            latents = latents.repeat_interleave(copies, dim=0)
            copies = 1

        # 7. Prepare extra step kwargs. TODO: Logic should ideally just be moved out of the pipeline
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 7.1 Add image embeds for IP-Adapter
        added_cond_kwargs = (
            {"image_embeds": image_embeds}
            if ip_adapter_image is not None or ip_adapter_image_embeds is not None
            else None
        )

        # 7.2 Optionally get Guidance Scale Embedding
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            guidance_scale_tensor = torch.tensor(self.guidance_scale - 1).repeat(batch_size * num_images_per_prompt)
            timestep_cond = self.get_guidance_scale_embedding(
                guidance_scale_tensor, embedding_dim=self.unet.config.time_cond_proj_dim
            ).to(device=device, dtype=prompt_embeds.dtype)

        # 8. Denoising loop
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        trajectory = [latents]
        means = []
        log_probs = []
        executed_timesteps = []
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # expand the latents if we are doing classifier free guidance: `predict_noise` does
                latent_model_input = self.scheduler.scale_model_input(latents, t)
                step_embeds = prompt_embeds[::copies]
                step_negative_embeds = None
                if self.do_classifier_free_guidance:
                    step_negative_embeds, step_embeds = step_embeds.chunk(2)

                # predict the noise residual, perform guidance
                noise_pred = predict_noise(
                    self.unet,
                    latent_model_input,
                    t,
                    step_embeds,
                    step_negative_embeds,
                    self.guidance_scale,
                    guidance_rescale,
                    timestep_cond=timestep_cond if timestep_cond is None else timestep_cond[::copies],
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    added_cond_kwargs=added_cond_kwargs
                    and {"image_embeds": [embeds[::copies] for embeds in added_cond_kwargs["image_embeds"]]},
                )

                # rows of one image part where noise enters; a scheduler other than DDIM may add it at any step
                if copies > 1 and (etas[i] > 0 or not isinstance(self.scheduler, DDIMScheduler)):
                    latents = latents.repeat_interleave(copies, dim=0)
                    noise_pred = noise_pred.repeat_interleave(copies, dim=0)
                    copies = 1

                # compute the previous noisy sample x_t -> x_t-1
                if own_steps:  # DDIM's Gaussian itself
                    mean, std = ddim_transition(self.scheduler, noise_pred, t, latents, etas[i], prev_timesteps[i])
                    prev_sample = mean
                    if etas[i] > 0:
                        prev_sample = mean + std * randn_tensor(mean.shape, generator, device, mean.dtype)
                    # contiguous as in a replay: kernels round by memory layout
                    latents = prev_sample.to(latents.dtype).contiguous()
                else:
                    if "eta" in extra_step_kwargs:
                        extra_step_kwargs["eta"] = etas[i]
                    latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)

                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                    # `SDCFGCutoffCallback` hands back one row, for all samples of the one prompt
                    if len(prompt_embeds) == 1 and batch_size == 1:
                        prompt_embeds = prompt_embeds.repeat(len(latents), 1, 1)

                # of the latents that go on, and that a replay will see: after the callback
                if return_trajectory:
                    trajectory.append(latents)
                    means.append(mean)
                    log_probs.append(gaussian_log_prob(latents, mean, std))
                    executed_timesteps.append(t)

                # call the callback, if provided
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                    if callback is not None and i % callback_steps == 0:
                        step_idx = i // getattr(self.scheduler, "order", 1)
                        callback(step_idx, t, latents)

        if copies > 1:
            latents = latents.repeat_interleave(copies, dim=0)
        if not output_type == "latent":
            decoder_input = latents.to(prompt_embeds.dtype) / self.vae.config.scaling_factor
            image = self.vae.decode(decoder_input, return_dict=False, generator=generator)[0]
            image, has_nsfw_concept = self.run_safety_checker(image, device, prompt_embeds.dtype)
        else:
            image = latents
            has_nsfw_concept = None

        if has_nsfw_concept is None:
            do_denormalize = [True] * image.shape[0]
        else:
            do_denormalize = [not has_nsfw for has_nsfw in has_nsfw_concept]

        image = self.image_processor.postprocess(image, output_type=output_type, do_denormalize=do_denormalize)

        # Offload all models
        self.maybe_free_model_hooks()

        extra = {}
        if return_trajectory:
            for name, parts in {"latents": trajectory, "log_probs": log_probs, "means": means}.items():
                parts = [part.repeat_interleave(len(latents) // len(part), dim=0) for part in parts]  # shared rows
                extra[name] = torch.stack(parts, dim=1)
            extra["timesteps"] = torch.stack(executed_timesteps)
            extra["prompt_embeds"], extra["negative_prompt_embeds"] = trajectory_embeds

        output = StableDiffusionImg2ImgDDPOPipelineOutput(image, has_nsfw_concept, **extra)
        if not return_dict:
            return tuple(vars(output).values()) if return_trajectory else (image, has_nsfw_concept)
        return output
