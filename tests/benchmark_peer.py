"""The peer package imageddpo 0.1.2 on the demo, run by hand beside `benchmark.py learning`; prints rows of its table.

    pip install torch imageddpo==0.1.2 datasets matplotlib      # an environment of its own: it pins trl to 0.21.0
    python tests/benchmark_peer.py --seed 0 --learning_rate 2e-3 --clip_range 1.6e-3 --epochs 42

Sampling, advantages, loss and updates are imageddpo's and TRL's own; images, reward, held-out evaluation and the count of
UNet rows are ours. It is given our groups (an image 8 times in a row, statistics per prompt with a buffer of 8), a
constant learning rate and, as TRL fixes both in code, our rank. Every executed step is stochastic and trained: it has no
options for a branch, a tail or shared noise. What is changed so that it works at all: without guidance it samples with
the null prompt's embedding and replays with the caption's, so the caption's is handed to both;
`train_timestep_fraction` must be `strength`, the default ends in an IndexError; saving fails, hence never. Set
OMP_NUM_THREADS=1: the model is tiny.
"""

import argparse
import time
import warnings

import torch
from imageddpo import I2IDDPOStableDiffusionPipeline, ImageDDPOTrainer
from peft import LoraConfig
from trl import DDPOConfig

from benchmark import held_out_reward, print_header, print_row, setup, trainer


class PeerPipeline(I2IDDPOStableDiffusionPipeline):
    """imageddpo's pipeline with our rank, and with the caption when guidance is off."""

    def __call__(self, *args, prompt_embeds, negative_prompt_embeds, **kwargs):
        return super().__call__(*args, prompt_embeds=prompt_embeds, negative_prompt_embeds=prompt_embeds, **kwargs)

    def get_trainable_layers(self):
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers))
        return self.unet


class Images:
    """`prompt_function`: (prompt, image, metadata) of the training images in shuffled passes, each 8 times in a row."""

    def __init__(self, data: trainer.ImagePrompts, args: argparse.Namespace):
        self.data = data
        self.args = args
        self.count = 0

    def __call__(self):
        data_pass, position = divmod(self.count // self.args.group_size, len(self.data))
        self.count += 1
        order = torch.randperm(len(self.data), generator=trainer.seeded("peer", self.args.seed, data_pass))
        image, prompt, metadata = self.data.load(order[position].item())
        return prompt, image, metadata


def reward(images, prompts, metadata):
    return trainer.psnr()(images, prompts, metadata), {}


def main(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    run = setup([f"--seed={arguments.seed}", "--eta=1"])  # for its images, reward and held-out evaluation
    args = run.args
    config = DDPOConfig(
        seed=args.seed,
        mixed_precision="no",
        num_epochs=arguments.epochs,
        save_freq=10**9,
        sample_num_steps=args.num_inference_steps,
        sample_guidance_scale=args.guidance_scale,
        sample_eta=args.eta,
        sample_batch_size=args.samples_per_epoch,
        sample_num_batches_per_epoch=1,
        train_batch_size=args.samples_per_epoch // args.updates_per_epoch,
        train_learning_rate=arguments.learning_rate,
        train_cfg=False,
        train_clip_range=arguments.clip_range,
        train_timestep_fraction=args.strength,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=args.group_size,
        per_prompt_stat_tracking_min_count=args.group_size,
    )
    pipeline = PeerPipeline(args.pretrained_model_name_or_path)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    pipeline.set_progress_bar_config = lambda **_: None  # TRL would switch it on again

    peer = ImageDDPOTrainer(config, reward, Images(run.train_data, args), pipeline, noise_strength=args.strength)
    peer.accelerator.log = lambda values, step: None
    pipeline.unet.rows = 0
    pipeline.unet.register_forward_pre_hook(trainer.count_rows)
    run.pipe.unet = pipeline.unet  # evaluated as ours is
    print_header("recipe", "UNet evaluations", "seconds", "trained")
    step = 0
    seconds = 0.0
    rows = 0
    for epoch in range(arguments.epochs):
        start = time.monotonic()
        pipeline.unet.rows = 0
        step = peer.step(epoch, step)
        seconds += time.monotonic() - start
        rows += pipeline.unet.rows
        if (epoch + 1) % 5 == 0 or epoch + 1 == arguments.epochs:
            pipeline.unet.eval()
            name = f"imageddpo 0.1.2, seed {args.seed}, epoch {epoch + 1}"
            print_row(name, f"{rows:,}", f"{seconds:.0f}", held_out_reward(run))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--clip_range", type=float, default=1e-4, help="1e-4 is imageddpo's default; 1.6e-3 is ours")
    main(parser.parse_args())
