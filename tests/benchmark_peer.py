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
"""The peer package imageddpo 0.1.2 on the demo, run by hand beside `benchmark.py`; it prints a row of the same table.

    pip install torch imageddpo==0.1.2 datasets     # an environment of its own: it pins trl to 0.21.0
    python tests/benchmark_peer.py --seed 0 --learning_rate 2e-3 --clip_range 1.6e-3 --epochs 42

Sampling, advantages, loss and updates are imageddpo's and TRL's own. The images, the reward, the held-out evaluation and
the way UNet rows are counted are our trainer's. What is changed from outside, and why:

- The rank of the LoRA is fixed to 4 in TRL: `get_trainable_layers` is repeated with ours.
- With guidance off imageddpo samples with the null prompt's embedding and replays with the caption's. `--condition
  captions` hands the caption's embedding to the sampler in its place, one line, so that the ratio starts at 1.
  `--condition null` needs no change: every prompt is empty, in training and in evaluation.
- `train_timestep_fraction` must be `strength`: the default of 1 ends in an IndexError.

`--baseline group` is our groups expressed in imageddpo's terms: `prompt_function` returns an image 8 times in a row, and
TRL's statistics per prompt have a buffer of 8. `--baseline batch` is imageddpo's default with images at random. Every
executed step is stochastic and trained, the tail too, and no noise is shared: imageddpo has no options for those.
Set OMP_NUM_THREADS=1: the model is tiny.
"""

import argparse
import contextlib
import csv
import math
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from imageddpo import I2IDDPOStableDiffusionPipeline, ImageDDPOTrainer
from peft import LoraConfig
from trl import DDPOConfig


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import train_img2img_ddpo as trainer  # noqa: E402


class PeerPipeline(I2IDDPOStableDiffusionPipeline):
    """imageddpo's pipeline with our rank, and with the caption when guidance is off."""

    rank = 8

    def __call__(self, *args, prompt_embeds, negative_prompt_embeds, guidance_scale, **kwargs):
        if guidance_scale <= 1:  # what imageddpo then conditions on; the same tensor if the prompts are empty
            negative_prompt_embeds = prompt_embeds
        return super().__call__(
            *args, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            guidance_scale=guidance_scale, **kwargs,
        )  # fmt: skip

    def get_trainable_layers(self):
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(
            LoraConfig(r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian", target_modules=layers)
        )
        return self.unet


class Images:
    """`prompt_function`: (prompt, image, metadata) of the training images, each `repeats` times in a row."""

    def __init__(self, data, repeats: int, seed: int):
        self.data, self.repeats = data, repeats
        self.random, self.order, self.left = trainer.seeded(seed, "peer"), [], 0

    def __call__(self):
        if self.left == 0:
            if not self.order:  # a shuffled pass over the data
                self.order = torch.randperm(len(self.data), generator=self.random).tolist()
            self.index, self.left = self.order.pop(), self.repeats
        self.left -= 1
        image, prompt, metadata = self.data.load(self.index)
        return prompt, image, metadata


def main(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    prompt = ["--prompt="] if arguments.condition == "null" else []
    args = trainer.parse_args(["--demo", "--output_dir=benchmark-writes-nothing", f"--seed={arguments.seed}", *prompt])
    train_data, held_out = trainer.load_data(args)
    grouped = arguments.baseline == "group"
    config = DDPOConfig(
        seed=args.seed,
        mixed_precision="no",
        num_epochs=arguments.epochs,
        save_freq=10**9,  # saving fails from the first epoch on
        sample_num_steps=args.num_inference_steps,
        sample_guidance_scale=args.guidance_scale,
        sample_eta=args.eta,
        sample_batch_size=args.samples_per_epoch,
        sample_num_batches_per_epoch=1,
        train_batch_size=args.samples_per_epoch // args.updates_per_epoch,  # gradients accumulate over the steps
        train_learning_rate=arguments.learning_rate,
        train_cfg=False,
        train_clip_range=arguments.clip_range,
        train_timestep_fraction=args.strength,
        per_prompt_stat_tracking=grouped,
        per_prompt_stat_tracking_buffer_size=args.group_size,
        per_prompt_stat_tracking_min_count=args.group_size,
    )
    PeerPipeline.rank = args.rank
    pipeline = PeerPipeline(args.pretrained_model_name_or_path)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    pipeline.set_progress_bar_config = lambda **_: None  # TRL would switch it on again

    def reward(images, prompts, metadata):
        return trainer.psnr(images, list(prompts), list(metadata)), {}

    images = Images(train_data, args.group_size if grouped else 1, args.seed)
    peer = ImageDDPOTrainer(config, reward, images, pipeline, noise_strength=args.strength)
    logged = {}
    peer.accelerator.log = lambda values, step: logged.update(values)

    counted = {"rows": 0, "calls": 0}

    def count(unet, inputs):
        counted["rows"] += len(inputs[0]) * (trainer.TRAIN_ROW_COST if torch.is_grad_enabled() else 1)
        counted["calls"] += 1

    pipeline.unet.register_forward_pre_hook(count)
    deviations = []
    calculate_loss = peer.loss

    def loss(advantages, clip_range, ratio):
        deviations.append((ratio - 1).abs().max().item())
        return calculate_loss(advantages, clip_range, ratio)

    peer.loss = loss

    parts = {k: v for k, v in pipeline.sd_pipeline.components.items() if k != "image_encoder"}
    ours = trainer.StableDiffusionImg2ImgDDPOPipeline(**parts, image_encoder=None, requires_safety_checker=False)
    ours.scheduler = trainer.DDIMScheduler.from_config(ours.scheduler.config)  # its own: evaluation sets timesteps
    ours.set_progress_bar_config(disable=True)
    state = SimpleNamespace(pipe=ours, accelerator=peer.accelerator)
    cache, ranks, psnr = trainer.ConditionCache(ours), trainer.Ranks(peer.accelerator), trainer.Reward(args.reward_fn)

    @torch.no_grad()
    def evaluate(adapter: bool = True) -> float:
        before = dict(counted)
        pipeline.unet.eval()
        if not adapter:
            pipeline.unet.disable_adapters()
        mean = trainer.evaluate(state, cache, held_out, psnr, args, ranks).mean
        pipeline.unet.enable_adapters()
        counted.update(before)
        return mean

    rows = [held_out.load(i) for i in range(len(held_out))]
    identity = psnr.total(psnr(torch.stack([r[0] for r in rows]), [r[1] for r in rows], [r[2] for r in rows])).mean()
    base, step, seconds, cpu = evaluate(adapter=False), 0, 0.0, 0.0
    print(f"identity {identity:.3f}, base {base:.3f}, base with the untrained LoRA {evaluate():.3f}")
    output = open(arguments.csv, "a", newline="") if arguments.csv else contextlib.nullcontext()
    with output as file:
        for epoch in range(arguments.epochs):
            began, began_cpu = time.monotonic(), time.process_time()
            deviations.clear()
            step = peer.step(epoch, step)
            seconds, cpu = seconds + time.monotonic() - began, cpu + time.process_time() - began_cpu
            last = epoch + 1 == arguments.epochs or seconds > arguments.max_seconds
            row = {
                "seed": args.seed, "lr": arguments.learning_rate, "baseline": arguments.baseline,
                "condition": arguments.condition, "clip_range": arguments.clip_range, "epoch": epoch + 1,
                "unet_evaluations": counted["rows"], "unet_calls": counted["calls"], "updates": step,
                "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
                "reward_mean": round(float(logged["reward_mean"]), 3), "clipfrac": round(float(logged["clipfrac"]), 3),
                "ratio_deviation_start": f"{max(deviations[: len(deviations) // args.updates_per_epoch]):.1e}",
                "ratio_deviation_max": f"{max(deviations):.1e}", "base": round(base, 3), "trained": "",
            }  # fmt: skip
            if last or (epoch + 1) % arguments.validation_epochs == 0:
                row["trained"] = round(evaluate(), 3)
            print(", ".join(f"{k} {v}" for k, v in row.items() if k not in ("seed", "baseline", "condition", "base")))
            sys.stdout.flush()
            if file is not None:
                writer = csv.DictWriter(file, row)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
            if not math.isfinite(row["trained"] or 0.0) or last:
                break
    print("\n| seed | lr | UNet evaluations | samples | seconds | CPU seconds | identity | base | trained |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {args.seed} | {arguments.learning_rate:g} | {counted['rows']:,} | {args.samples_per_epoch * (epoch + 1):,} |"
        f" {seconds:.0f} | {cpu:.0f} | {identity:.2f} | {base:.2f} | {row['trained']:.2f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="stop after an epoch that ends later")
    parser.add_argument("--baseline", choices=["group", "batch"], default="group")
    parser.add_argument("--condition", choices=["captions", "null"], default="captions")
    parser.add_argument("--clip_range", type=float, default=1e-4, help="1e-4 is imageddpo's default; 1.6e-3 is ours")
    parser.add_argument("--validation_epochs", type=int, default=5)
    parser.add_argument("--csv", default=None, help="file to append a row per epoch to")
    main(parser.parse_args())
