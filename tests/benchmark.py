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
"""Benchmarks on the demo model, run by hand; they print the README's tables.

    python tests/benchmark.py gradient    # cosine of each recipe's gradient with the true one, at equal UNet evaluations
    python tests/benchmark.py learning    # held-out reward over UNet evaluations and seconds, recipes side by side
    python tests/benchmark.py precision   # what rounding does to ratio and KL of Stable Diffusion 1.5 at 512 px

All call the project's own functions. Set OMP_NUM_THREADS=1 for the first two: the model is tiny.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import train_img2img_ddpo as trainer  # noqa: E402


# From plain DDPO to our default, one change at a time
PLAIN = ["--sde_window=0", "--train_tail", "--advantage=batch", "--independent_start_noise"]
GRADIENT_RECIPES = {
    "plain DDPO (all steps, tail, batch baseline)": PLAIN,
    "+ group baseline": ["--sde_window=0", "--train_tail", "--independent_start_noise"],
    "+ tail not trained": ["--sde_window=0", "--independent_start_noise"],
    "+ shared start noise": ["--sde_window=0"],
    "+ window of 3": ["--sde_window=3"],
    "+ window of 2": ["--sde_window=2"],
    "+ window of 1 (default)": [],
    "default, coarse finish": [],
    "default, one window per epoch": [],
    "default, sac": ["--algorithm=sac"],
}
LEARNING_RECIPES = {
    "plain DDPO": PLAIN,
    "plain DDPO, tail not trained": ["--sde_window=0", "--advantage=batch", "--independent_start_noise"],
    "all steps, group baseline, tail not trained": ["--sde_window=0"],
    "default (ppo)": [],
    "reinforce": ["--algorithm=reinforce"],
    "trpo": ["--algorithm=trpo"],
    "sac": ["--algorithm=sac"],
}


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


def setup(options: list[str]):
    """What `main` builds before its first epoch."""
    args = trainer.parse_args(["--demo", "--output_dir=benchmark-writes-nothing", *options])
    AcceleratorState._reset_state(True)
    ranks = trainer.start(args)
    reward = trainer.Reward(args)
    train_data, _ = trainer.load_data(args)
    pipe = trainer.load_pipeline(args, ranks.accelerator)
    schedule = trainer.plan_schedule(pipe, args)
    trainer.resolve(args, pipe, train_data, schedule)
    state = trainer.make_state(pipe, args, ranks.accelerator, reward)
    return args, ranks, reward, train_data, schedule, state, trainer.ConditionCache(pipe)


class CoarseFinish(trainer.StableDiffusionImg2ImgDDPOPipeline):
    """Takes two steps at once after the last stochastic one: an experiment, without guidance only."""

    def __call__(self, *, eta, output_type, callback_on_step_end, **kwargs):
        last = max(step for step, value in enumerate(eta) if value > 0)
        out = super().__call__(eta=eta, output_type="latent", callback_on_step_end=partial(self.stop, last), **kwargs)
        timesteps = self.get_timesteps(kwargs["num_inference_steps"], kwargs["strength"], "cpu")[0][last + 1 :]
        x, stride = out.images, self.scheduler.config.num_train_timesteps // kwargs["num_inference_steps"]
        for t in timesteps[::2]:
            previous = max(int(t) - 2 * stride, int(timesteps[-1]) - stride)
            alpha = self.scheduler.alphas_cumprod[t]
            alpha_previous = (
                self.scheduler.alphas_cumprod[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod
            )
            with torch.no_grad():
                noise = trainer.predict_noise(self.unet, x, t, out.prompt_embeds)
            x = (
                alpha_previous**0.5 * (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
                + (1 - alpha_previous) ** 0.5 * noise
            )
        with torch.no_grad():
            images = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
        out.images = self.image_processor.postprocess(images, output_type="pt")
        return out

    @staticmethod
    def stop(last: int, pipeline, step: int, timestep: int, callback_kwargs: dict) -> dict:
        """Callback that ends the pipeline's own loop after the step `last`."""
        pipeline._interrupt = step >= last
        return {}


def gradient_vector(state) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in state.parameters.values()]).double()


def true_gradient(draws: int, seed: int) -> torch.Tensor:
    """d mean reward / d LoRA of this seed, by autograd through deterministic sampler and decoder, over all images."""
    args, ranks, _, data, schedule, state, cache = setup([f"--seed={seed}"])
    pipe = state.pipe
    for parameter in state.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for draw in range(draws):
        for first in range(0, len(data), 8):
            rows = [(i, *data.load(i)) for i in range(first, min(first + 8, len(data)))]
            latents = torch.cat([cache.latents((i, False), image) for i, image, _, _ in rows])
            embeds = torch.cat([cache.embeds(prompt) for _, _, prompt, _ in rows])
            noise = [torch.randn(latents.shape[1:], generator=trainer.seeded("true", draw, i)) for i, *_ in rows]
            x = pipe.scheduler.add_noise(latents, torch.stack(noise), schedule.timesteps[:1])
            for t in schedule.timesteps:
                prediction = trainer.predict_noise(pipe.unet, x, t, embeds)
                x, _ = trainer.ddim_transition(pipe.scheduler, prediction, t, x, 0.0)
            images = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
            rewards = trainer.psnr(images.clamp(0, 1), [], [metadata for *_, metadata in rows])
            rewards.sum().neg().backward()
    return gradient_vector(state)


def draw_one_window(draw_groups, *arguments) -> list[trainer.Group]:
    """The epoch's groups, with the window of the first for all."""
    groups = draw_groups(*arguments)
    for group in groups:
        group.window = groups[0].window
    return groups


def recipe_gradients(name: str, options: list[str], budget: int) -> tuple[list[torch.Tensor], int]:
    """Gradients of rollouts under unchanged weights until `budget` UNet evaluations are spent, and what was spent."""
    args, ranks, reward, data, schedule, state, cache = setup([*options, "--updates_per_epoch=1"])
    draw_groups = partial(draw_one_window, trainer.draw_groups) if name.endswith("per epoch") else trainer.draw_groups
    if name.endswith("coarse finish"):
        state.pipe.__class__ = CoarseFinish
    gradients, epoch = [], 0
    while state.local_evaluations < budget:
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        with mock.patch.object(trainer, "draw_groups", draw_groups):
            _, transitions, rewards = trainer.collect(state.pipe, cache, data, reward, schedule, args, epoch, ranks)
        keys = [str(i // args.group_size) for i in range(args.samples_per_epoch)]
        advantages = trainer.compute_advantages(rewards, args.advantage, args.group_size, state.trackers, keys).sum(0)
        policy = trainer.Policy(state, cache, transitions, args)
        count = len(transitions.ids)
        if args.algorithm == "sac":
            trainer.fit_critic(policy, advantages, (args.seed, epoch), count, ranks)
        for rows in torch.arange(count).split(args.train_batch_size):
            losses, _ = trainer.policy_losses(policy, rows, advantages, args.clip_range, (args.seed, epoch))
            (losses.sum() / count).backward()
        gradients.append(gradient_vector(state))
        epoch += 1
    return gradients, state.local_evaluations


def gradient(arguments: argparse.Namespace) -> None:
    """Prints the cosine of each recipe's averaged gradient with the true one, and that of single rollouts."""
    truths = [true_gradient(draws=2, seed=seed) for seed in range(arguments.seeds)]
    accuracy = cosine(truths[0], true_gradient(draws=1, seed=0))
    print(f"the true gradient's own accuracy (1 against 2 draws of start noise): cosine {accuracy:.3f}\n")
    print("| recipe | UNet evaluations | rollouts | cosine of the average | of one rollout, mean +- std |")
    print("|---|---|---|---|---|")
    recipes = {n: o for n, o in GRADIENT_RECIPES.items() if not arguments.only or n in arguments.only}
    for name, options in recipes.items():
        averages, singles = [], []
        for seed, truth in enumerate(truths):
            gradients, spent = recipe_gradients(name, [*options, f"--seed={seed}"], arguments.budget)
            averages.append(cosine(sum(gradients), truth))
            singles += [cosine(g, truth) for g in gradients]
        print(
            f"| {name} | {spent:,} | {len(gradients)} | {np.mean(averages):.3f} +- {np.std(averages):.3f} |"
            f" {np.mean(singles):.3f} +- {np.std(singles):.3f} |",
            flush=True,
        )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


class StableDiffusionSteps:
    """
    Three transitions of the default schedule with guidance 5, by Stable Diffusion 1.5's UNet with random weights,
    scaled so that it predicts noise of variance 1 as the trained one does.
    """

    def __init__(self, resolution: int, device: str):
        torch.manual_seed(0)
        self.device, random = torch.device(device), torch.Generator().manual_seed(1)
        self.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False).eval()
        self.unet.to(self.device)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.scheduler = DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
        self.scheduler.set_timesteps(50)
        self.timesteps = self.scheduler.timesteps[[-20, -12, -4]].to(self.device)
        size = (3, 4, resolution // 8, resolution // 8)
        images, noise, actions = (torch.randn(size, generator=random).to(self.device) for _ in range(3))
        self.latents = self.scheduler.add_noise(images, noise, self.timesteps)
        self.embeds, self.null = (torch.randn(n, 77, 768, generator=random).to(self.device) for n in (3, 1))
        self.unet.conv_out.weight /= self.unet(self.latents, self.timesteps, self.embeds).sample.std()
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))
        self.lora = [p.requires_grad_(False) for p in self.unet.parameters() if p.requires_grad]
        self.signs = [torch.randn(p.shape, generator=random).sign().to(self.device) for p in self.lora]
        mean, self.std = self.means(3)
        self.next_latents = mean + self.std * actions

    def cast(self, dtype: torch.dtype) -> None:
        """The frozen weights in `dtype`, the LoRA as it was, in float32."""
        start = [p.clone() for p in self.lora]
        self.unet.to(dtype)
        for parameter, value in zip(self.lora, start):
            parameter.data = value

    def means(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and standard deviations of the three steps, computed `batch_size` at once."""
        parts, dtype = [], self.unet.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            for rows in torch.arange(3).split(batch_size):
                latents, timesteps = self.latents[rows], self.timesteps[rows]
                condition = self.embeds[rows].to(dtype), self.null.expand(len(rows), -1, -1).to(dtype)
                noise = trainer.predict_noise(self.unet, latents, timesteps, *condition, guidance_scale=5.0)
                parts.append(trainer.ddim_transition(self.scheduler, noise, timesteps, latents, 1.0))
        return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])

    def compare(self, what: str, mean: torch.Tensor, other: torch.Tensor, seconds: float) -> None:
        """Prints a row of the table."""
        log_probs = [trainer.gaussian_log_prob(self.next_latents, m, self.std) for m in (mean, other)]
        ratios = " ".join(f"{abs(value):.0e}" for value in (log_probs[1] - log_probs[0]).tolist())
        kls = " ".join(f"{value:.2g}" for value in trainer.gaussian_kl(mean, other, self.std).tolist())
        print(f"| {self.unet.dtype} | {what} | {ratios} | {kls} | {seconds:.1f} |", flush=True)


@torch.no_grad()
def precision(arguments: argparse.Namespace) -> None:
    """Prints how far rounding alone moves ratio and KL, beside what steps of Adam do (here of random signs)."""
    steps = StableDiffusionSteps(arguments.resolution, arguments.device)
    print(f"transitions at t = {steps.timesteps.tolist()}, {arguments.resolution} px, {arguments.device}\n")
    print("| precision | compared | change of the log-ratio | KL, nats per step | seconds |\n|---|---|---|---|---|")
    exact = None
    for dtype in arguments.dtypes:
        steps.cast(getattr(torch, dtype))
        began = time.monotonic()
        mean, _ = steps.means(3)
        seconds = time.monotonic() - began
        exact = mean if exact is None else exact
        steps.compare("with the first precision", mean, exact, seconds)
        steps.compare("in batches of 3 and of 1", mean, steps.means(1)[0], seconds)
        for count in (1, 9):  # Adam's first steps have the size of the learning rate
            for parameter, sign in zip(steps.lora, steps.signs):
                parameter += 3e-4 * count * sign
            steps.compare(f"before and after {count + (count > 1)} step(s)", mean, steps.means(3)[0], seconds)
        for parameter, sign in zip(steps.lora, steps.signs):
            parameter -= 3e-3 * sign


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def learn(options: list[str], seed: int, epochs: int, output_dir: Path) -> tuple[list[dict], float]:
    """One run of the script; its metrics rows with a held-out evaluation, and its seconds."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", REPOSITORY / "train_img2img_ddpo.py",
        "--demo", f"--output_dir={output_dir}", f"--seed={seed}", f"--num_train_epochs={epochs}",
        "--checkpointing_epochs=100000", *options,
    ]  # fmt: skip
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - began
    with open(output_dir / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["heldout_trained"]], seconds


def learning(arguments: argparse.Namespace) -> None:
    """Prints held-out reward of each recipe at the end of its budget of UNet evaluations, and on the way."""
    recipes = {n: o for n, o in LEARNING_RECIPES.items() if not arguments.only or n in arguments.only}
    print("| recipe | seed | UNet evaluations | samples | seconds | identity | base | trained | best on the way |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, options in recipes.items():
        finals = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                extra = [*options, *arguments.option]
                rows, seconds = learn(extra, seed, arguments.epochs, Path(folder, "out"))
            last = rows[-1]
            finals.append(float(last["heldout_trained"]))
            best = max(float(row["heldout_trained"]) for row in rows)
            print(
                f"| {name} | {seed} | {int(last['unet_evaluations']):,} | {last['samples']} | {seconds:.0f} |"
                f" {float(last['heldout_identity']):.2f} | {float(last['heldout_base']):.2f} | {finals[-1]:.2f} |"
                f" {best:.2f} |",
                flush=True,
            )
        print(
            f"| **{name}** | mean of {len(finals)} | | | | | | **{np.mean(finals):.2f} +- {np.std(finals):.2f}** | |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("gradient")
    command.add_argument("--budget", type=int, default=20000, help="UNet evaluations per recipe and seed")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--only", nargs="*", help="names of recipes")
    command.set_defaults(function=gradient)
    command = commands.add_parser("precision")
    command.add_argument("--resolution", type=int, default=512)
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    command.set_defaults(function=precision)
    command = commands.add_parser("learning")
    command.add_argument("--epochs", type=int, default=40)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--only", nargs="*", help="names of recipes")
    command.add_argument(
        "--option", action="append", default=[], help="more options of the trainer, such as --option=--rank=4"
    )
    command.set_defaults(function=learning)
    parsed = parser.parse_args()
    parsed.function(parsed)
