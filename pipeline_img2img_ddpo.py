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
"""
Image-to-image pipeline with log-probabilities for DDPO (https://huggingface.co/papers/2305.13301).

A DDIM step draws the next latents from a Gaussian N(mean, std^2 I). The UNet determines the mean. The
scheduler and `eta` determine the standard deviation. Sampling and training call the three functions below. A
recorded step therefore has the same log-probability in training until the weights change.

    noise_pred = predict_noise(unet, latents, timestep, prompt_embeds, negative_prompt_embeds, guidance_scale)
    mean, std = ddim_transition(scheduler, noise_pred, timestep, latents, eta)
    log_prob = gaussian_log_prob(prev_latents, mean, std)
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
from diffusers.utils import deprecate, is_torch_xla_available, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False

# Error messages recommend this scheduler, because it gives every step with `eta > 0` a density
SCHEDULER = "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {})"
USE_DDIM = "Use: " + SCHEDULER.format("clip_sample=False, set_alpha_to_one=False, steps_offset=1")
EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers import DDIMScheduler, DiffusionPipeline
        >>> from diffusers.utils import load_image
        >>> custom = {"custom_pipeline": "pipeline_img2img_ddpo.py", "trust_remote_code": True}
        >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", **custom)
        >>> pipe = pipe.to("cuda")
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
    Predict the noise with the UNet and perform classifier-free guidance. The prediction is differentiable.

    Args:
        unet (`UNet2DConditionModel`): The UNet, which may be wrapped for distributed training.
        latents (`torch.Tensor`): Latents of shape `(B, C, h, w)`, cast to the dtype of `prompt_embeds`.
        timestep (`int` or `torch.Tensor`): One timestep for all rows, or one per row of shape `(B,)`.
        prompt_embeds (`torch.Tensor`): Text embeddings of shape `(B, L, E)`.
        negative_prompt_embeds (`torch.Tensor`, *optional*): Negative text embeddings of the same shape.
        guidance_scale (`float`): Guidance weight. Guidance needs a value above 1 and negative embeddings.
        guidance_rescale (`float`): Factor φ of https://huggingface.co/papers/2305.08891. 0 turns it off.
        unet_kwargs: Arguments for the UNet. With guidance, they have 2B rows, negative ones first.

    Returns:
        `torch.Tensor`: The noise, sample or velocity that the model predicts, of shape `(B, C, h, w)`.
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


# Modified from diffusers.schedulers.scheduling_ddim.DDIMScheduler.step
def ddim_transition(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
    eta: torch.Tensor | float,
    prev_timestep: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the mean and the standard deviation of the Gaussian that a DDIM step draws from.

    They are differentiable and follow equations (12) and (16) of https://huggingface.co/papers/2010.02502.

    Args:
        scheduler ([`DDIMScheduler`]): The scheduler, after a call of its `set_timesteps` method.
        model_output (`torch.Tensor`): The output of `predict_noise` of shape `(B, C, h, w)`.
        timestep (`int` or `torch.Tensor`): One timestep for all rows, or one per row of shape `(B,)`.
        sample (`torch.Tensor`): The latents before the step, of shape `(B, C, h, w)`.
        eta (`float` or `torch.Tensor`): One value for all rows, or one per row. With 0, there is no noise.
        prev_timestep (`int` or `torch.Tensor`, *optional*): The timestep that the step goes to. Negative
            values are the schedule's end. Defaults to `timestep - num_train_timesteps // num_inference_steps`.

    Returns:
        `tuple`: The mean `(B, C, h, w)` and the standard deviation `(B, 1, 1, 1)`, both in float32.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("The scheduler has no inference steps. Call `scheduler.set_timesteps(...)` first.")
    sample = sample.float()
    model_output = model_output.float()

    # 1. compute alphas, betas. Below timestep 0, the previous alpha is the scheduler's final one
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

    # 2. compute predicted original sample and predicted noise
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

    # 3. compute mean and standard deviation. The factor 1 - a_t / a_p of equation (16) loses half of its
    # digits where a_t and a_p are almost equal. The difference a_p - a_t is exact there.
    variance = beta_prod_t_prev / beta_prod_t * ((alpha_prod_t_prev - alpha_prod_t) / alpha_prod_t_prev)
    if not isinstance(eta, (int, float)):
        eta = torch.as_tensor(eta, dtype=torch.float32, device=sample.device).reshape(-1, 1, 1, 1)
    std = eta * variance**0.5
    mean = alpha_prod_t_prev**0.5 * pred_original_sample + (beta_prod_t_prev - std**2) ** 0.5 * pred_epsilon
    return mean, std.expand(sample.shape[0], 1, 1, 1)


def gaussian_log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Return the log-probabilities of `sample` under N(mean, std^2 I), of shape `(B,)` and in float32.

    `mean` and `std` are the results of `ddim_transition`. As in DDPO, each log-probability is the mean over a
    row, in nats. A row with a `std` of 0 has no density. Its log-probability and its gradients are 0.
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
    """Output for B images and S steps. Only the parent's fields are set unless `return_trajectory=True`."""

    # Latents before the first step and after each step, (B, S+1, C, h, w) in float32
    latents: torch.Tensor | None = None
    # Log-probabilities in nats per latent element, (B, S) in float32. Deterministic steps have exactly 0.
    log_probs: torch.Tensor | None = None
    # Timesteps of the steps that were run, (S,) in int64
    timesteps: torch.Tensor | None = None
    # Embeddings that conditioned the steps, (B, L, E). Without guidance, the negative ones are `None`.
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    # Means of the steps' Gaussians for an exact KL divergence, (B, S, C, h, w) in float32
    means: torch.Tensor | None = None


class StableDiffusionImg2ImgDDPOPipeline(StableDiffusionImg2ImgPipeline):
    """Image-to-image pipeline that can return its denoising trajectory with log-probabilities."""

    def check_trajectory_inputs(self, eta, return_trajectory: bool, steps: Sequence[int] | None) -> None:
        """Raise a `ValueError` if the scheduler or `eta` does not support `return_trajectory` or `steps`."""
        name = type(self.scheduler).__name__
        if (return_trajectory or steps is not None) and not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"`return_trajectory=True` and `steps` need DDIM, not {name}. {USE_DDIM}")
        if return_trajectory and not all(0 <= step_eta <= 1 for step_eta in torch.as_tensor(eta).flatten()):
            raise ValueError(f"`return_trajectory=True` needs every `eta` in [0, 1], but `eta` is {eta}.")
        if return_trajectory and self.scheduler.config.clip_sample and not self.scheduler.config.thresholding:
            raise ValueError(f"`return_trajectory=True` needs gradients, which `clip_sample=True` cuts. {USE_DDIM}")

    def check_trajectory(self, timesteps: torch.Tensor, etas: Sequence[float]) -> None:
        """Raise a `ValueError` if one of the steps at `timesteps` with `etas` has no density."""
        no_signal = self.scheduler.alphas_cumprod[timesteps[0]] == 0
        if no_signal and self.scheduler.config.prediction_type == "epsilon":
            raise ValueError(
                "`return_trajectory=True` cannot start from pure noise if the model predicts noise. Lower"
                f" `strength`, or use: {SCHEDULER.format('rescale_betas_zero_snr=False')}"
            )
        zeros = torch.zeros(len(timesteps), 1, 1, 1)
        _, stds = ddim_transition(self.scheduler, zeros, timesteps, zeros, etas)
        without_noise = timesteps[(torch.tensor(etas) > 0) & ~(stds.flatten() > 0)].tolist()
        if without_noise:
            raise ValueError(
                "`return_trajectory=True` needs noise where `eta > 0`, but the scheduler adds none at timesteps"
                f" {without_noise}. Set `eta` to 0 there, or change the scheduler. {USE_DDIM}"
            )

    def check_callback(self, recorded: list, *current) -> None:
        """Raise a `ValueError` if a callback changed what conditions the steps of a trajectory."""
        names = ("prompt_embeds", "negative_prompt_embeds", "guidance_scale")
        for name, before, after in zip(names, recorded, current):
            unchanged = torch.equal(after, before) if torch.is_tensor(after) else after == before
            if not unchanged:
                raise ValueError(
                    f"`callback_on_step_end` changed `{name}`, which a trajectory records once for all steps. A"
                    " replay would give other log-probabilities. Do not change it, or set `return_trajectory=False`."
                )

    def select_steps(self, timesteps: torch.Tensor, steps: Sequence[int], etas: Sequence[float]) -> tuple:
        """Return the timesteps of the given steps, the timesteps that they go to, and their `eta`."""
        if steps[:1] != [0] or steps != sorted(set(steps)) or steps[-1] >= len(timesteps):
            raise ValueError(f"`steps` must begin with 0, ascend, and be below {len(timesteps)}, but is {steps}.")
        # Each step goes to where the next one begins in the full schedule. Jumps over steps add no noise.
        next_steps = torch.tensor([*steps[1:], len(timesteps)])
        stride = self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        step_etas = list(etas)
        for i, step in enumerate(steps):
            if next_steps[i] > step + 1:
                step_etas[i] = 0.0
        return timesteps[steps], timesteps[next_steps - 1] - stride, step_etas

    # Modified from diffusers.StableDiffusionImg2ImgPipeline.__call__ (see `Changed from the parent`)
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
        eta: float | Sequence[float] | np.ndarray | torch.Tensor | None = 0.0,
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
        steps: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        **kwargs,
    ) -> StableDiffusionImg2ImgDDPOPipelineOutput | tuple:
        r"""
        Generate images, and return the denoising trajectory if `return_trajectory=True`.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompts. Required if there are no `prompt_embeds`.
            image (`PipelineImageInput`): The images to start from. Tensors with 4 channels are latents.
            strength (`float`, defaults to 0.8): How much noise to add to `image`, between 0 and 1.
            num_inference_steps (`int`, defaults to 50): The number of denoising steps if `strength` is 1.
            timesteps (`list[int]`, *optional*): Custom timesteps, for schedulers that support them.
            sigmas (`list[float]`, *optional*): Custom sigmas, for schedulers that support them.
            guidance_scale (`float`, defaults to 7.5): Guidance weight. Guidance is on if it exceeds 1.
            negative_prompt (`str` or `list[str]`, *optional*): What to avoid. Ignored without guidance.
            num_images_per_prompt (`int`, defaults to 1): The number of images to generate per prompt.
            eta (`float` or sequence of `float`, defaults to 0.0): DDIM's noise parameter η. A sequence has
                one value per step that is run. A step with 0 is deterministic. Other schedulers ignore `eta`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): A generator, or one per image.
            prompt_embeds (`torch.Tensor`, *optional*): Text embeddings, used instead of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): Used instead of `negative_prompt`.
            ip_adapter_image (`PipelineImageInput`, *optional*): Image input for IP-Adapters.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*): Image embeddings, one per IP-Adapter.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            cross_attention_kwargs (`dict`, *optional*): Arguments for the attention processors.
            clip_skip (`int`, *optional*): How many of CLIP's last layers to skip.
            callback_on_step_end (`Callable`, *optional*): A function to call after each step. It must not
                change the embeddings or the guidance scale if `return_trajectory=True`.
            callback_on_step_end_tensor_inputs (`list[str]`): The names of the tensors that the callback gets.
            guidance_rescale (`float`, defaults to 0.0): Factor φ of https://huggingface.co/papers/2305.08891.
            return_trajectory (`bool`, defaults to `False`): Whether to also return the trajectory. The steps
                are then drawn from the Gaussian of `ddim_transition`, and all latents are float32.
            share_start_noise (`bool`, `torch.Generator` or list of them, defaults to `False`): Whether samples of
                an image start from the same noise. A generator, or a list with one per image, draws it.
                With `True`, the generator of each image's first sample draws it. The UNet runs on one row per
                image until a step adds noise, or on all rows if there is a callback. Image i goes with
                prompt i. With `False`, the images take turns (0, 1, 0, 1, ...), as in the parent.
            steps (sequence of `int`, *optional*): The indices of the steps to run, among those that `strength`
                leaves. They begin with 0 and ascend. Each step goes to where the next one begins, and the last
                one to the schedule's end. A step that jumps over others is deterministic. Requires DDIM.

        Examples:

        Returns:
            [`StableDiffusionImg2ImgDDPOPipelineOutput`] or `tuple`: The images and the requested trajectory.

        Raises:
            ValueError: If no step is left to run, or if a step of the trajectory has no density.
        """

        callback = kwargs.get("callback")
        callback_steps = kwargs.get("callback_steps")

        for name in ("callback", "callback_steps"):  # Changed from the parent: one loop for both
            if kwargs.get(name) is not None:
                message = f"Passing `{name}` as an input argument to `__call__` is deprecated, consider use"
                deprecate(name, "1.0.0", f"{message} `callback_on_step_end`")

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
        self.check_trajectory_inputs(eta, return_trajectory, steps)  # Changed from the parent: more inputs

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
        # Changed from the parent: keep the embeddings for the trajectory
        trajectory_embeds = [prompt_embeds, negative_prompt_embeds if self.do_classifier_free_guidance else None]
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
        if XLA_AVAILABLE:
            timestep_device = "cpu"
        else:
            timestep_device = device
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, timestep_device, timesteps, sigmas
        )
        # Changed from the parent: select and check the steps
        schedule = f"`num_inference_steps={num_inference_steps}` with `strength={strength}`"
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength, device)
        if len(timesteps) == 0:
            raise ValueError(f"{schedule} leaves 0 steps to run. Raise one of them.")
        draw_from_gaussian = return_trajectory or steps is not None
        if steps is None:
            steps = range(len(timesteps))
        indices = torch.as_tensor(steps).tolist()
        etas = [eta] * len(indices) if np.ndim(eta) == 0 else [float(step_eta) for step_eta in eta]
        if len(etas) != len(indices):
            raise ValueError(f"`eta` has {len(etas)} values, but {len(indices)} steps are run. Pass one per step.")
        if draw_from_gaussian:
            timesteps, prev_timesteps, etas = self.select_steps(timesteps, indices, etas)
            num_inference_steps = len(timesteps)
        if return_trajectory:
            self.check_trajectory(timesteps.cpu(), etas)
        latent_timestep = timesteps[:1].repeat(batch_size * num_images_per_prompt)

        # 6. Prepare latent variables
        # Changed from the parent: `copies` samples with the same start noise share a row until noise is added
        copies = num_images_per_prompt if share_start_noise else 1
        start_generator = generator
        if isinstance(share_start_noise, (torch.Generator, list)):
            start_generator = share_start_noise
        elif isinstance(generator, list):
            start_generator = generator[::copies]
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
        if copies > 1 and (callback_on_step_end is not None or callback is not None):
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
            ).to(device=device, dtype=prompt_embeds.dtype)  # Changed from the parent: latents may be float32

        # 8. Denoising loop
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        # Changed from the parent: record the trajectory
        all_latents = [latents.repeat_interleave(copies, dim=0)]
        all_log_probs = []
        all_means = []
        recorded = [prompt_embeds.clone(), negative_prompt_embeds, guidance_scale]
        if self.do_classifier_free_guidance:
            recorded[1] = negative_prompt_embeds.clone()
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # Changed from the parent: `predict_noise` expands the latents and performs guidance
                latent_model_input = self.scheduler.scale_model_input(latents, t)
                step_prompt_embeds = prompt_embeds[::copies]
                step_negative_prompt_embeds = None
                if self.do_classifier_free_guidance:
                    step_negative_prompt_embeds, step_prompt_embeds = step_prompt_embeds.chunk(2)

                # predict the noise residual
                noise_pred = predict_noise(
                    self.unet,
                    latent_model_input,
                    t,
                    step_prompt_embeds,
                    step_negative_prompt_embeds,
                    self.guidance_scale,
                    guidance_rescale,
                    timestep_cond=None if timestep_cond is None else timestep_cond[::copies],
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    added_cond_kwargs=added_cond_kwargs
                    and {"image_embeds": [embeds[::copies] for embeds in image_embeds]},
                )

                # Changed from the parent: noise ends the sharing. Without DDIM, any step may add noise.
                if copies > 1 and (etas[i] > 0 or not isinstance(self.scheduler, DDIMScheduler)):
                    latents = latents.repeat_interleave(copies, dim=0)
                    noise_pred = noise_pred.repeat_interleave(copies, dim=0)
                    copies = 1

                # compute the previous noisy sample x_t -> x_t-1
                # Changed from the parent: draw it from the Gaussian, or give the scheduler this step's `eta`
                if draw_from_gaussian:
                    mean, std = ddim_transition(self.scheduler, noise_pred, t, latents, etas[i], prev_timesteps[i])
                    noise = randn_tensor(mean.shape, generator, device, mean.dtype) if etas[i] > 0 else 0.0
                    # A replay uses contiguous latents. For other memory layouts, kernels round differently.
                    latents = (mean + std * noise).to(latents.dtype).contiguous()
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
                    # Changed from the parent: a trajectory records these values once for all steps
                    if return_trajectory:
                        self.check_callback(recorded, prompt_embeds, negative_prompt_embeds, self.guidance_scale)
                    # Changed from the parent: `SDCFGCutoffCallback` returns one row for all samples
                    if len(prompt_embeds) == 1 and batch_size == 1:
                        prompt_embeds = prompt_embeds.repeat(len(latents), 1, 1)

                # Changed from the parent: record the step, with the latents that the callback returned
                if return_trajectory:
                    all_latents.append(latents.repeat_interleave(copies, dim=0))
                    all_log_probs.append(gaussian_log_prob(latents, mean, std).repeat_interleave(copies, dim=0))
                    all_means.append(mean.repeat_interleave(copies, dim=0))

                # call the callback, if provided
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                    if callback is not None and i % callback_steps == 0:
                        step_idx = i // getattr(self.scheduler, "order", 1)
                        callback(step_idx, t, latents)

                if XLA_AVAILABLE:
                    xm.mark_step()

        # Changed from the parent: one row per sample, and latents in the dtype of the VAE
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

        # Changed from the parent: return the trajectory as well
        trajectory = ()
        if return_trajectory:
            latents = torch.stack(all_latents, dim=1)
            log_probs = torch.stack(all_log_probs, dim=1)
            means = torch.stack(all_means, dim=1)
            trajectory = (latents, log_probs, timesteps[: len(all_means)], *trajectory_embeds, means)
        if not return_dict:
            return (image, has_nsfw_concept, *trajectory)

        return StableDiffusionImg2ImgDDPOPipelineOutput(image, has_nsfw_concept, *trajectory)
