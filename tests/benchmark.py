"""Benchmarks, run by hand; they print the tables of tests/README.md. Set OMP_NUM_THREADS=1 for all but `gpu`: the models are tiny.

python tests/benchmark.py learning    # held-out reward of the demo over UNet evaluations and seconds
python tests/benchmark.py gradient    # cosine of each recipe's gradient with the true one, at equal UNet evaluations
python tests/benchmark.py finish      # rank correlation of rewards after a short finish with the full schedule
python tests/benchmark.py overhead    # CPU time of an epoch over what UNet and VAE take of it
python tests/benchmark.py memory      # peak memory at the size of Stable Diffusion 1.5, counted without a GPU
python tests/benchmark.py gpu         # epochs at that size; without a GPU a small one on the CPU
"""

import argparse
import contextlib
import copy
import io
import itertools
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel

from components import tiny_components


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_img2img_ddpo as trainer  # noqa: E402


LARGE = ["--samples_per_epoch=48", "--sample_batch_size=48"]
PLAIN = ["--all_steps", "--train_tail", "--advantage=batch", "--eta=1"]
LEARNING = {
    "plain": [*PLAIN, "--learning_rate=1e-3", "--lr_scheduler=constant", "--num_inner_epochs=1", *LARGE],
    "demo": [],
    "long": ["--num_inner_epochs=1", "--num_train_epochs=85", "--samples_per_epoch=24", "--sample_batch_size=24"],
    "reinforce": ["--algorithm=reinforce", "--num_inner_epochs=1", "--num_train_epochs=60"],
    "trpo": ["--algorithm=trpo"],
    "sac": ["--algorithm=sac", "--num_inner_epochs=1", "--finish_steps=2", *LARGE],
}
GRADIENTS = {  # from plain DDPO to our default, one change at a time
    "plain DDPO (all steps, tail, batch baseline)": PLAIN,
    "+ group baseline": ["--all_steps", "--train_tail", "--eta=1"],
    "+ tail not trained": ["--all_steps", "--eta=1"],
    "+ branch (default)": [],
    "default with sac": ["--algorithm=sac"],
}


def setup(options: list[str]) -> SimpleNamespace:
    """What `main` builds before its first epoch, by the names that it has there."""
    AcceleratorState._reset_state(True)
    args = trainer.parse_args(["--demo", "--output_dir=benchmark-writes-nothing", *options])
    run = SimpleNamespace(args=args, accelerator=Accelerator(mixed_precision="no"))
    run.train_data, run.held_out = trainer.load_data(args)
    run.functions = trainer.load_rewards(args, [run.train_data], run.accelerator.device)
    run.pipe = trainer.load_pipeline(args, run.accelerator)
    run.pipe.vae.requires_grad_(False)
    run.pipe.text_encoder.requires_grad_(False)
    run.pipe.unet.num_evaluations = 0
    run.pipe.unet.register_forward_pre_hook(trainer.count_evaluations)
    trainer.set_seed(args.seed)
    run.lora_parameters = list(trainer.add_lora(run.pipe.unet, args).values())
    run.pipe.scheduler.set_timesteps(args.num_inference_steps)
    run.timesteps, _ = run.pipe.get_timesteps(args.num_inference_steps, args.strength, "cpu")
    run.num_trainable = trainer.count_trainable_steps(run.pipe.scheduler, run.timesteps, args)
    run.pipe_kwargs = {"strength": args.strength, "num_inference_steps": args.num_inference_steps}
    run.pipe_kwargs.update(guidance_scale=args.guidance_scale, output_type="pt")
    return run


def print_row(*cells) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def print_header(*columns: str) -> None:
    print_row(*columns)
    print("|---" * len(columns) + "|", flush=True)


# ---- Learning -------------------------------------------------------------------------------------------------------
def held_out_reward(run: SimpleNamespace, draw: int | None = 0) -> str:
    state = (run.pipe, run.held_out, run.functions, run.pipe_kwargs, run.args, run.accelerator)
    return f"{trainer.evaluate(*state, draw)[1].mean():.2f}"


def rewards_with_gradient(run: SimpleNamespace, rows: list[int], *path: int | str) -> torch.Tensor:
    """`(B,)`, through deterministic sampler and decoder, from noise that `path` seeds."""
    pipe = run.pipe
    images, prompts, metadata = zip(*(run.train_data.load(row) for row in rows))
    noise = [trainer.seeded(*path, row) for row in rows]
    prompt_embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, False)
    pixels = pipe.image_processor.preprocess(torch.stack(images))
    latents = pipe.prepare_latents(pixels, run.timesteps[:1], len(rows), 1, pixels.dtype, pipe.device, noise)
    for timestep in run.timesteps:
        noise_pred = trainer.predict_noise(pipe.unet, latents, timestep, prompt_embeds)
        latents, _ = trainer.ddim_transition(pipe.scheduler, noise_pred, timestep, latents, 0.0)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return trainer.psnr()((decoded / 2 + 0.5).clamp(0, 1), prompts, metadata)


def learn_by_gradient(seed: int, rate: float, batch: int, updates: int, shown: tuple[int, ...]) -> None:
    """The reward's own gradient (AlignProp), with the script's LoRA and optimizer; seconds without evaluations."""
    run = setup([f"--seed={seed}"])
    optimizer = torch.optim.AdamW(run.lora_parameters, lr=rate, weight_decay=run.args.adam_weight_decay)
    lr_scheduler = trainer.get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=updates)
    untrained = [held_out_reward(run, draw) for draw in (None, 0)]
    cost = batch * len(run.timesteps) * trainer.TRAINED_EVALUATION_COST
    seconds = 0.0
    for update in range(1, updates + 1):
        start = time.monotonic()
        groups = trainer.draw_groups(len(run.train_data), batch, update - 1, run.args)
        rewards = rewards_with_gradient(run, [row for row, _ in groups], seed, "alignprop", update)
        rewards.mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(run.lora_parameters, run.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        seconds += time.monotonic() - start
        if update in shown:
            name = f"reward's own gradient, lr {rate:g}, batch {batch}, seed {seed}, update {update} of {updates}"
            print_row(name, f"{update * cost:,}", f"{seconds:.0f}", *untrained, held_out_reward(run))


def learning(arguments: argparse.Namespace) -> None:
    """Held-out reward of each recipe by the script itself; seconds are of the whole run, evaluations included."""
    print_header("recipe", "UNet evaluations", "seconds", "input", "base", "trained")
    for name, seed in itertools.product(arguments.recipes, range(arguments.seeds)):
        if name == "alignprop":
            for rate in (4e-3, 8e-3):
                learn_by_gradient(seed, rate, batch=6, updates=54, shown=(13, 34, 54))
            for updates in (30, 100):  # its best batch, after as many UNet evaluations as the recipes take
                learn_by_gradient(seed, 4e-3, batch=2, updates=updates, shown=(updates,))
            continue
        with tempfile.TemporaryDirectory() as folder:
            script = [sys.executable, trainer.__file__, "--demo", f"--output_dir={folder}/out", f"--seed={seed}"]
            start = time.monotonic()
            subprocess.run([*script, *LEARNING[name]], check=True, capture_output=True)
            seconds = time.monotonic() - start
            history = pd.read_csv(f"{folder}/out/metrics.csv").dropna(subset="heldout_trained")
        for row in history.to_dict("records"):
            rewards = [f"{row[f'heldout_{kind}']:.2f}" for kind in ("input", "base", "trained")]
            place = f"{name}, seed {seed}, epoch {row['epoch']}"
            print_row(place, f"{row['unet_evaluations']:,}", f"{seconds:.0f}", *rewards)


# ---- Gradients ------------------------------------------------------------------------------------------------------
def take_gradient(run: SimpleNamespace) -> torch.Tensor:
    """The LoRA's gradient as a vector, which is then reset."""
    gradient = torch.cat([parameter.grad.flatten() for parameter in run.lora_parameters]).double()
    run.pipe.unet.zero_grad()
    return gradient


def true_gradient(draws: int, seed: int) -> torch.Tensor:
    """Of minus the reward, by autograd, over all images and some draws of start noise."""
    run = setup([f"--seed={seed}"])
    for draw in range(draws):
        for rows in torch.arange(len(run.train_data)).split(8):
            rewards_with_gradient(run, rows.tolist(), "true", draw).sum().neg().backward()
    return take_gradient(run)


def recipe_gradients(options: list[str], budget: int) -> tuple[list[torch.Tensor], int]:
    """Of rollouts under unchanged weights, one update each, until `budget` UNet evaluations are spent; these too."""
    run = setup(options)
    args = run.args
    critic = trainer.ValueCritic(run.pipe.unet.config.in_channels, run.pipe.unet.config.cross_attention_dim)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    numbers = list(range(args.samples_per_epoch // args.group_size))
    gradients = []
    while run.pipe.unet.num_evaluations < budget:
        epoch = len(gradients)
        groups = trainer.draw_groups(len(run.train_data), len(numbers), epoch, args)
        plan = trainer.plan_steps(len(run.timesteps), run.num_trainable, epoch, args)
        place = (run.train_data, groups, numbers, plan, epoch, run.pipe_kwargs, args)
        *made, transitions = trainer.sample_groups(run.pipe, *place)
        rewards, _ = trainer.compute_rewards(run.functions, *made)
        advantages = trainer.compute_advantages(rewards, args.advantage, args.group_size)[:, 0]
        advantages = advantages[transitions.sample_ids]  # (states, actions)
        if args.algorithm == "sac":
            critics = (critic, target_critic, critic_optimizer)
            trainer.fit_critic(*critics, transitions, advantages, run.accelerator)
        for states in torch.arange(len(advantages)).split(48):
            batch = transitions.take(states)
            mean, std = trainer.predict_transition(run.pipe, batch, args.guidance_scale, args, run.accelerator)
            if args.algorithm == "sac":  # the KL to the base model has no gradient yet
                actions = trainer.draw_actions(mean, std, batch, args.seed, epoch, 0, 0)
                loss = trainer.sac_loss(target_critic(actions, batch))
            else:  # ratios are 1: none is clipped
                num_actions = batch.actions.shape[1]
                policy = mean.repeat_interleave(num_actions, dim=0), std.repeat_interleave(num_actions, dim=0)
                log_probs = trainer.gaussian_log_prob(batch.actions.flatten(0, 1), *policy).view(-1, num_actions)
                loss = trainer.ppo_loss(log_probs, batch.log_probs, advantages[states], clip_range=1e-3)
            loss.sum().backward()
        gradients.append(take_gradient(run))
    return gradients, run.pipe.unet.num_evaluations


def gradient(arguments: argparse.Namespace) -> None:
    """The cosine of each recipe's averaged gradient with the true one, and that of single rollouts."""
    cosine = torch.nn.CosineSimilarity(dim=0)
    truths = [true_gradient(2, seed) for seed in range(arguments.seeds)]
    accuracy = cosine(truths[0], true_gradient(1, 0))
    print(f"the true gradient's own accuracy (1 against 2 draws of start noise): cosine {accuracy:.3f}\n")
    print_header("recipe", "UNet evaluations", "rollouts", "cosine of the average", "of one rollout")
    for name, options in GRADIENTS.items():
        averages = []
        singles = []
        for seed, truth in enumerate(truths):
            gradients, spent = recipe_gradients([*options, f"--seed={seed}"], arguments.budget)
            averages.append(cosine(sum(gradients), truth))
            singles.extend(cosine(single, truth) for single in gradients)
        cosines = [f"{np.mean(values):.3f} +- {np.std(values):.3f}" for values in (averages, singles)]
        print_row(name, f"{spent:,}", len(gradients), *cosines)


# ---- The short finish -----------------------------------------------------------------------------------------------
def sharpness(images, prompts, metadata):
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(images.mean(dim=1, keepdim=True), laplacian[None, None]).abs().mean(dim=(1, 2, 3))


def finish(arguments: argparse.Namespace) -> None:
    """Spearman's correlation in 8 groups of 8, after the same branch at step 0, 6 or 12 of 20."""
    functions = {"psnr": trainer.psnr(), "psnr to the input": trainer.psnr("init_image")}
    functions["jpeg"] = trainer.jpeg_incompressibility
    functions["red"] = lambda images, prompts, metadata: images[:, 0].mean(dim=(1, 2))
    functions["sharpness"] = sharpness
    branches = [0, 6, 12]
    correlations = np.zeros((4, len(functions), len(branches)))
    for seed, (place, branch) in itertools.product(range(arguments.seeds), enumerate(branches)):
        run = setup(["--num_inference_steps=50", "--strength=0.4", "--group_size=8", f"--seed={seed}"])
        groups = trainer.draw_groups(len(run.train_data), 8, 0, run.args)
        ranks = []
        for run.args.finish_steps in range(5):  # 0: all
            plans = (trainer.plan_steps(20, run.num_trainable, epoch, run.args) for epoch in itertools.count())
            plan = next(plan for plan in plans if plan[2] == [branch])
            arguments_of_sampling = (run.train_data, groups, range(8), plan, 0, run.pipe_kwargs, run.args)
            *made, _ = trainer.sample_groups(run.pipe, *arguments_of_sampling)
            rewards, _ = trainer.compute_rewards(functions, *made)
            ranks.append(rewards.unflatten(0, (8, 8)).argsort(dim=1).argsort(dim=1) - 3.5)  # (groups, 8, rewards)
        for count in range(1, 5):
            spearman = F.cosine_similarity(ranks[count], ranks[0], dim=1).mean(dim=0)
            correlations[count - 1, :, place] += spearman.numpy() / arguments.seeds
    print_header("steps of finish, branch at 0 / 6 / 12", *functions)
    for count in range(4):
        print_row(count + 1, *(" ".join(f"{value:.2f}" for value in values) for values in correlations[count]))


# ---- Epochs of the script, timed ------------------------------------------------------------------------------------
def run_main(options: list[str], now=time.perf_counter) -> pd.DataFrame:
    """Runs `main` in this process: its metrics, and each epoch's time in `all`, UNet (with backward) and VAE."""
    spent = Counter(unet=0, vae=0)
    marks = []  # when an epoch begins, and when it ends
    load_pipeline = trainer.load_pipeline

    def timed(function, part):
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            spent[part] += now() - start
            return result

        return call

    def marked(function):
        def call(*args):
            marks.append({"all": now(), **spent})
            return function(*args)

        return call

    def load_timed(args, accelerator):
        pipe = load_pipeline(args, accelerator)
        accelerator.backward = timed(accelerator.backward, "unet")
        pipe.unet.forward = timed(pipe.unet.forward, "unet")
        pipe.vae.encode = timed(pipe.vae.encode, "vae")
        pipe.vae.decode = timed(pipe.vae.decode, "vae")
        return pipe

    AcceleratorState._reset_state(True)
    changed = {name: marked(getattr(trainer, name)) for name in ("draw_groups", "describe_epoch")}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with mock.patch.multiple(trainer, load_pipeline=load_timed, **changed):
            trainer.main([*options, f"--output_dir={folder}/out", "--num_validation_images=0"])
        metrics = pd.read_csv(f"{folder}/out/metrics.csv")
    return metrics.join(pd.DataFrame(marks).diff()[1::2].reset_index())


def overhead(arguments: argparse.Namespace) -> None:
    """Random UNets of the demo's kind, all else as the script has it by default; the first epoch warms up."""
    print_header("UNet parameters", "UNet evaluations per sample", "CPU s per epoch", "UNet", "VAE", "ratio")
    config = UNet2DConditionModel.load_config(trainer.DEMO / "model" / "unet")
    for channels in ((24, 40, 64), (64, 128, 192)):
        unet = UNet2DConditionModel.from_config(config, block_out_channels=channels)
        with tempfile.TemporaryDirectory() as folder:
            StableDiffusionImg2ImgPipeline.from_pretrained(trainer.DEMO / "model", unet=unet).save_pretrained(folder)
            options = [f"--pretrained_model_name_or_path={folder}", f"--train_data_dir={trainer.DEMO}/images"]
            options.extend(["--prompt=a", "--resolution=64", f"--num_train_epochs={arguments.epochs + 1}"])
            epochs = run_main(options, time.process_time)
        rows = epochs["unet_evaluations"].iloc[-1] / epochs["samples"].iloc[-1]
        times = epochs[["all", "unet", "vae"]].iloc[1:]
        ratio = (times["all"] / (times["unet"] + times["vae"])).median()
        medians = [f"{value:.2f}" for value in times.median()]
        print_row(f"{unet.num_parameters() / 1e6:.1f} M", f"{rows:.2f}", *medians, f"{ratio:.3f}")


# ---- Stable Diffusion 1.5 -------------------------------------------------------------------------------------------
def stable_diffusion() -> dict:
    """The networks in their exact configuration, with random weights in half precision."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    vae.update(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    torch.set_default_dtype(torch.float16)
    models = {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "vae": AutoencoderKL(sample_size=512, **vae),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **text)),
    }
    torch.set_default_dtype(torch.float32)
    return models


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive, and keeps the most that they were."""

    live = peak = 0
    known = WeakIdKeyDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = weakref.finalize(storage, self.change, -storage.nbytes())
            self.change(storage.nbytes())

    def change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in filter(torch.is_tensor, tree_leaves(result)):
            self.add(leaf)
        return result


def in_float32(norm):
    """A norm as CUDA's autocast has it, where the CPU's leaves the dtype."""
    return lambda x, shape, weight, bias, eps: norm(x.float(), shape, weight.float(), bias.float(), eps)


def peak_memory(rows: int, train: bool, checkpointing: bool) -> float:
    """GiB with gradients, or of sampling and the decoder, which takes one image at a time."""
    args = trainer.parse_args(["--dataset_name=none"])
    with torch.device("meta"):
        models = stable_diffusion()
        for model in models.values():
            model.requires_grad_(False)
        trainer.add_lora(models["unet"], args)
    norms = {"group_norm": in_float32(F.group_norm), "layer_norm": in_float32(F.layer_norm)}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, LiveBytes() as counter, mock.patch.multiple(F, **norms), torch.set_grad_enabled(train):
        for model in models.values():
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                counter.add(parameter)
        if checkpointing:
            models["unet"].enable_gradient_checkpointing()
        latents = torch.randn(rows, 4, 64, 64)
        timesteps = torch.zeros(rows, dtype=torch.int64)
        embeds = torch.randn(rows, 77, 768, dtype=torch.float16)
        with torch.autocast("cpu", torch.float16):
            noise_pred = trainer.predict_noise(models["unet"], latents, timesteps, embeds, embeds, args.guidance_scale)
            if not train:
                models["vae"].decode(latents[:1].half())
        if train:  # the loss itself takes little
            noise_pred.float().square().mean().backward()
        return counter.peak / 2**30


def memory(arguments: argparse.Namespace) -> None:
    """GiB at 512 px in fp16 with guidance; without the CUDA context, the allocator's slack and kernels' workspaces."""
    sampled = [*arguments.sizes, 16, 32, 64]
    print_header("images at once", *sampled)
    print_row("sampling", *(f"{peak_memory(images, False, False):.1f}" for images in sampled))
    for name, checkpointing in {"training": False, "training, checkpointing": True}.items():
        print_row(name, *(f"{peak_memory(states, True, checkpointing):.1f}" for states in arguments.sizes))


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def gpu(arguments: argparse.Namespace) -> None:
    """On a GPU the second epoch of the default command line, with each of the settings; on a CPU the first of two
    groups of four at 256 px. Learning is too slow to change anything: ratio - 1 and KL (nats) are those of rounding."""
    settings = [("fp16", size, checkpointing) for size in arguments.sizes for checkpointing in (False, True)]
    settings.extend([("bf16", 4, False), ("no", 4, False)])
    scale = ["--prompt=a", "--learning_rate=1e-12", "--num_train_epochs=2"]
    if not torch.cuda.is_available():
        settings = [("no", 1, False)]
        scale.extend(["--num_train_epochs=1", "--resolution=256", "--group_size=4", "--samples_per_epoch=8"])
    parts = tiny_components()
    parts.update(stable_diffusion())
    columns = ["s/epoch", "s/sample", "s of UNet", "of VAE", "of the rest", "GiB", "ratio - 1", "KL"]
    print_header("precision", "batch", "checkpointing", *columns)
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionImg2ImgPipeline(**parts).save_pretrained(f"{folder}/model")
        del parts
        data = [f"--pretrained_model_name_or_path={folder}/model", f"--train_data_dir={trainer.DEMO}/images"]
        for precision, size, checkpointing in settings:
            batches = [f"--sample_batch_size={size}", f"--train_batch_size={size}", f"--mixed_precision={precision}"]
            batches.extend(["--gradient_checkpointing"] * checkpointing)
            epochs = run_main([*data, *scale, *batches], synchronised)
            row = epochs.iloc[-1]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_reserved() / 2**30
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            per_sample = row["all"] / epochs["samples"][0]
            rest = row["all"] - row["unet"] - row["vae"]
            measured = [row["all"], per_sample, row["unet"], row["vae"], rest, peak]
            measured.extend([row["ratio_deviation_start"], row["kl"]])
            print_row(precision, size, checkpointing, *(f"{value:.3g}" for value in measured))


if __name__ == "__main__":
    commands = {"learning": learning, "gradient": gradient, "finish": finish}
    commands.update(overhead=overhead, memory=memory, gpu=gpu)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--seeds", type=int, default=3, help="learning, gradient, finish")
    parser.add_argument("--recipes", nargs="+", default=[*LEARNING, "alignprop"], help="learning")
    parser.add_argument("--budget", type=int, default=3000, help="gradient: UNet evaluations per recipe and seed")
    parser.add_argument("--epochs", type=int, default=5, help="overhead: epochs after the first")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="memory, gpu: batch sizes")
    arguments = parser.parse_args()
    commands[arguments.command](arguments)
