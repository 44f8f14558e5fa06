"""Benchmarks, run by hand; they print the README's tables. Set OMP_NUM_THREADS=1 for the first two: the model is tiny.

python tests/benchmark.py learning    # held-out reward of the demo over UNet evaluations and seconds
python tests/benchmark.py gradient    # cosine of each recipe's gradient with the true one, at equal UNet evaluations
python tests/benchmark.py gpu         # seconds, memory and rounding at the size of Stable Diffusion 1.5 (--tiny: CPU)
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from components import picture, tiny_components


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
    "default with sac": ["--algorithm=sac"],
}
LEARNING_RECIPES = {
    "plain DDPO": [*PLAIN, "--learning_rate=1e-3", "--num_train_epochs=30"],
    "default (ppo), 10 epochs": ["--num_train_epochs=10"],
    "default (ppo), 40 epochs: the demo": [],
    "reinforce, 30 epochs": ["--algorithm=reinforce", "--num_train_epochs=30"],
    "trpo, 30 epochs": ["--algorithm=trpo", "--num_train_epochs=30"],
    "sac, 30 epochs": ["--algorithm=sac", "--num_train_epochs=30"],
}


def setup(options: list[str], precision: str = "no") -> trainer.DDPOTrainer:
    """What `main` builds before its first epoch."""
    args = trainer.parse_args(["--output_dir=benchmark-writes-nothing", f"--mixed_precision={precision}", *options])
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision)
    torch.set_num_threads(1 if args.demo else torch.get_num_threads())
    data = trainer.load_data(args)
    rewards = {spec: trainer.load_reward(spec, data) for spec in args.reward_fn}
    return trainer.DDPOTrainer(args, accelerator, rewards, *data)


# ---- Learning -------------------------------------------------------------------------------------------------------
def learning(arguments: argparse.Namespace) -> None:
    """Held-out reward of each recipe at its end, by the script itself."""
    print("| recipe | UNet evaluations | seconds | identity | base | trained |\n|---|---|---|---|---|---|")
    for name, options in LEARNING_RECIPES.items():
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                script = [sys.executable, REPOSITORY / "train_img2img_ddpo.py", "--demo", f"--output_dir={folder}/out"]
                began = time.monotonic()
                subprocess.run([*script, f"--seed={seed}", *options], check=True, capture_output=True)
                seconds, row = time.monotonic() - began, pd.read_csv(f"{folder}/out/metrics.csv").iloc[-1]
            values = " | ".join(f"{row[f'heldout_{x}']:.2f}" for x in ("identity", "base", "trained"))
            print(f"| {name}, seed {seed} | {row['unet_evaluations']:,.0f} | {seconds:.0f} | {values} |", flush=True)


# ---- Gradients ------------------------------------------------------------------------------------------------------
def gradient_vector(run: trainer.DDPOTrainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in run.lora]).double()


def true_gradient(draws: int, seed: int) -> torch.Tensor:
    """d mean reward / d LoRA of this seed, by autograd through deterministic sampler and decoder, over all images."""
    run = setup(["--demo", f"--seed={seed}"])
    pipe, data = run.pipe, run.train_data
    for draw in range(draws):
        for indices in torch.arange(len(data)).split(8):
            rows = [trainer.load_row(run.args, data, i, crop=True) for i in indices.tolist()]
            images, prompts, metadata = zip(*rows)
            noise = [trainer.seeded("true", draw, i) for i in indices.tolist()]
            embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, False)
            pixels, start = pipe.image_processor.preprocess(torch.stack(images)), run.timesteps[:1]
            x = pipe.prepare_latents(pixels, start, len(images), 1, pixels.dtype, pipe.device, noise)
            for t in run.timesteps:
                prediction = trainer.predict_noise(pipe.unet, x, t, embeds)
                x, _ = trainer.ddim_transition(pipe.scheduler, prediction, t, x, 0.0)
            made = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
            trainer.psnr()(made.clamp(0, 1), prompts, metadata).sum().neg().backward()
    return gradient_vector(run)


def recipe_gradients(options: list[str], budget: int) -> tuple[list[torch.Tensor], int]:
    """Gradients of rollouts under unchanged weights until `budget` UNet evaluations are spent, and what was spent."""
    run = setup(["--demo", *options, "--updates_per_epoch=1"])
    gradients, spent, run.optimizer = [], 0, argparse.Namespace(zero_grad=run.optimizer.zero_grad)
    run.optimizer.step = lambda: gradients.append(gradient_vector(run))
    while spent < budget:
        run.unet_rows = 0
        transitions, _ = run.rollout(len(gradients))
        if run.args.algorithm == "sac":
            run.fit_critic(transitions, len(gradients))
        run.update(transitions, len(gradients))
        spent += run.unet_rows
    return gradients, spent


def gradient(arguments: argparse.Namespace) -> None:
    """The cosine of each recipe's averaged gradient with the true one, and that of single rollouts."""
    truths = [true_gradient(draws=2, seed=seed) for seed in range(arguments.seeds)]
    accuracy = cosine(truths[0], true_gradient(draws=1, seed=0))
    print(f"the true gradient's own accuracy (1 against 2 draws of start noise): cosine {accuracy:.3f}\n")
    print("| recipe | UNet evaluations | rollouts | cosine of the average | of one rollout |\n|---|---|---|---|---|")
    for name, options in GRADIENT_RECIPES.items():
        averages, singles = [], []
        for seed, truth in enumerate(truths):
            gradients, spent = recipe_gradients([*options, f"--seed={seed}"], arguments.budget)
            averages.append(cosine(sum(gradients), truth))
            singles += [cosine(g, truth) for g in gradients]
        cosines = " | ".join(f"{np.mean(x):.3f} +- {np.std(x):.3f}" for x in (averages, singles))
        print(f"| {name} | {spent:,} | {len(gradients)} | {cosines} |", flush=True)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# ---- GPU ------------------------------------------------------------------------------------------------------------
def make_model(folder: Path, tiny: bool) -> None:
    """Stable Diffusion 1.5's exact configuration with random weights, in half precision, or the tests' tiny model."""
    parts = tiny_components()
    if not tiny:
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        channels = (128, 256, 512, 512)
        parts["unet"] = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half()
        parts["vae"] = AutoencoderKL(
            block_out_channels=channels, layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).half()  # fmt: skip
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(vocab_size=len(parts["tokenizer"]), **text)).half()
    StableDiffusionImg2ImgPipeline(**parts).save_pretrained(folder)


@contextlib.contextmanager
def clock(run: trainer.DDPOTrainer):
    """Seconds within the UNet's forward and backward, in a list."""
    seconds, now = [0.0], [0.0]
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def start(*_):
        sync()
        now[0] = time.perf_counter()

    def stop(*_):
        sync()
        seconds[0] += time.perf_counter() - now[0]

    backward = run.accelerator.backward
    hooks = run.pipe.unet.register_forward_pre_hook(start), run.pipe.unet.register_forward_hook(stop)
    run.accelerator.backward = lambda loss: (start(), backward(loss), stop())
    yield seconds
    run.accelerator.backward = backward
    for hook in hooks:
        hook.remove()


def gpu(arguments: argparse.Namespace) -> None:
    """An epoch of the default recipe with each of the settings; the first one warms up."""
    settings = [("fp16", size, size, checkpointing) for size in arguments.sizes for checkpointing in (False, True)]
    settings = settings[:1] + settings + [(precision, 4, 4, False) for precision in ("bf16", "no")]
    columns = ["precision", "batch", "checkpointing", "s/epoch", "s/sample", "time / UNet's", "GiB", "ratio - 1", "KL"]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"), arguments.tiny)
        Path(folder, "images").mkdir()
        for i in range(16):
            picture(512, color=(16 * i, 90, 30)).save(Path(folder, "images", f"{i}.png"))
        options = [f"--pretrained_model_name_or_path={folder}/model", f"--train_data_dir={folder}/images"]
        options += ["--prompt=a"] + ["--resolution=16", "--samples_per_epoch=16"] * arguments.tiny
        for precision, sample, train, checkpointing in settings:
            batches = [f"--sample_batch_size={sample}", f"--train_batch_size={train}"]
            run = setup(options + batches + ["--gradient_checkpointing"] * checkpointing, precision)
            run.run_epoch(0)
            began = time.perf_counter()
            metrics = run.run_epoch(1)  # its metrics wait for the GPU
            seconds = time.perf_counter() - began
            with clock(run) as inside:
                began = time.perf_counter()
                run.run_epoch(2)
                share = (time.perf_counter() - began) / inside[0]
            peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else float("nan")
            measured = [seconds, seconds / run.args.samples_per_epoch, share, peak]
            measured += [metrics["ratio_deviation_start"], metrics["kl_start"]]
            print("|", precision, *(f"| {x:.3g}" for x in (sample, checkpointing, *measured)), "|", flush=True)
            del run
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["learning", "gradient", "gpu"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=3000, help="gradient: UNet evaluations per recipe and seed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="gpu: batch sizes")
    parser.add_argument("--tiny", action="store_true", help="gpu: the tests' model instead of Stable Diffusion 1.5")
    parsed = parser.parse_args()
    globals()[parsed.command](parsed)
