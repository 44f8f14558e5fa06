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
"""Fine-tune a LoRA of image-to-image Stable Diffusion on any reward, by policy gradient (DDPO).

    python train_img2img_ddpo.py --demo                     # bundled, no download, two minutes on one CPU core
    accelerate launch train_img2img_ddpo.py --train_data_dir my_pictures --reward_fn my_reward.py:reward \
        --mixed_precision fp16 --output_dir my-lora         # Stable Diffusion 1.5, one GPU or several

The file is in the order of an epoch; `main` calls the stages. The mathematics of a denoising step are in
pipeline_img2img_ddpo.py.
"""

import argparse
import ast
import base64
import copy
import hashlib
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else importing diffusers warns twice about torchvision

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import requests
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, numpy_to_pil
from diffusers.utils.torch_utils import randn_tensor
from matplotlib.figure import Figure
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from requests.adapters import HTTPAdapter, Retry
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel
from transformers import AutoModelForImageClassification as AutoClassifier

from pipeline_img2img_ddpo import StableDiffusionImg2ImgDDPOPipeline, ddim_transition, gaussian_log_prob, predict_noise


TRUST_REGION_NATS = 1.34  # of KL per step: what DDPO's clip range of 1e-4 allows at 512 px, with 16384 latent elements
# Steps to latents with less noise variance are the tail: 3 to 8 times as sensitive to the UNet as the others in their
# log-probability, they would dominate the gradient
TAIL_VARIANCE = 0.01
TRAINED_ROW_COST = 3  # forward and backward, in UNet forwards
SCHEDULER = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # every step of DDIM has a density
LORA = "pytorch_lora_weights.safetensors"
DEMO = Path(__file__).resolve().parent / "tests" / "demo"


# ---- Arguments ------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with the flag, its value and the remedy where no data and no model could mend it."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="train_img2img_ddpo.py (--train_data_dir FOLDER | --dataset_name NAME | --demo) [options below]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="Train the bundled tiny model: fills in all options that you do not give.")
    add("--dry_run", action="store_true", help="Run the first epoch as it would be, and keep nothing of it.")

    add = parser.add_argument_group("model").add_argument
    sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    add("--pretrained_model_name_or_path", default=sd15, help="Stable Diffusion 1.x or 2.x: a Hub id or a folder.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")
    add("--rank", type=int, default=4, help="Rank of the LoRA.")
    add("--lora_alpha", type=int, help="The LoRA is scaled by alpha / rank; by default the rank.")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="UNet modules that get a LoRA, with commas between.")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="Folder of pictures; metadata.jsonl in it gives captions (text) and other columns.")
    add("--dataset_name", help="Dataset of the Hub, or a local folder of parquet files or of `save_to_disk`.")
    add("--dataset_config_name", help="Configuration of that dataset.")
    add("--image_column", default="image", help="Column with the input images.")
    add("--caption_column", help="Column with the prompts; by default `text` if there is one, else no prompt.")
    add("--prompt", help="One prompt for every image, in place of captions.")
    add("--max_train_samples", type=int, help="Train on the first so many images; by default on all.")
    add("--num_validation_images", type=int, help="Held-out images; by default 8, at most a third of all.")
    add("--resolution", type=int, default=512, help="Side of the square that images are resized and cropped to.")
    add("--center_crop", action="store_true", help="Crop training images in the middle, not at a place drawn once.")
    add("--random_flip", action="store_true", help="Flip half of the groups' images horizontally.")
    add("--cache_dir", help="Where the model and the dataset are downloaded to.")

    add = parser.add_argument_group("policy").add_argument
    forms = "NAME, 'NAME(option=value)', path/to/file.py:function or http(s)://host/path; NAME is one of "
    add("--reward_fn", nargs="+", default=["jpeg_compressibility"], metavar="REWARD", help=forms + ", ".join(REWARDS))
    add("--reward_weights", nargs="+", type=float, metavar="WEIGHT", help="Weight of each reward; by default 1.")
    add("--algorithm", choices=["ppo", "reinforce", "trpo", "sac"], default="ppo", help="Policy objective.")
    add("--strength", "--noise_strength", type=float, default=0.4, help="How far the input is noised, in (0, 1].")
    add("--num_inference_steps", type=int, default=50, help="Denoising steps at strength 1; steps * strength are run.")
    add("--guidance_scale", type=float, default=5.0, help="Classifier-free guidance; 1, or no prompts: off.")
    add("--guidance_rescale", type=float, default=0.0, help="Rescaling of the guided prediction, in [0, 1].")
    add("--eta", type=float, default=1.0, help="Noise of the stochastic steps, in (0, 1]; 1 is DDPM's.")
    add("--samples_per_epoch", type=int, default=64, help="Images sampled per epoch, on all devices together.")
    add("--group_size", type=int, default=8, help="Samples of one image and prompt, compared with each other.")
    add("--sde_window", type=int, default=1, help="Stochastic, trained steps, at a place drawn per epoch; 0 for all.")
    add("--train_tail", action="store_true", help="Train the last, nearly noise-free steps too, as plain DDPO does.")
    add("--independent_start_noise", action="store_true", help="Start each sample of a group from noise of its own.")
    baselines = "Baseline: mean of the group, running mean of the image and prompt, or mean of the epoch."
    add("--advantage", choices=["group", "tracker", "batch"], default="group", help=baselines)
    add("--clip_range", type=float, help="PPO's, of the ratio; by default sqrt(2 * 1.34) / latent elements.")
    add("--target_kl", type=float, default=0.1, help="TRPO's bound of the KL per step, in nats.")
    add("--kl_coef", type=float, help="Weight of the KL to the base model; by default 0, for sac 0.001.")

    add = parser.add_argument_group("training").add_argument
    add("--num_train_epochs", type=int, default=50, help="Epochs; one is a rollout and its updates.")
    add("--updates_per_epoch", type=int, help="Optimizer updates per pass over a rollout; by default 2, reinforce 1.")
    add("--num_inner_epochs", type=int, default=1, help="Passes over a rollout.")
    add("--sample_batch_size", type=int, default=8, help="At most so many samples at once, per device: memory, speed.")
    add("--train_batch_size", type=int, default=4, help="At most so many transitions at once, per device: as above.")
    add("--gradient_checkpointing", action="store_true", help="Save memory, at the cost of a second forward pass.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="fp16 on a GPU; by default accelerate's setting.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs.")
    add("--learning_rate", type=float, default=3e-4, help="Learning rate.")
    schedules = [schedule.value for schedule in SchedulerType if schedule != SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", choices=schedules, default="constant", help="Schedule over the optimizer's updates.")
    add("--lr_warmup_steps", type=int, default=0, help="Updates in which the learning rate rises, if not `constant`.")
    add("--use_8bit_adam", action="store_true", help="8-bit Adam of bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="Adam's beta1.")
    add("--adam_beta2", type=float, default=0.999, help="Adam's beta2.")
    add("--adam_weight_decay", type=float, default=1e-4, help="Weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon.")
    add("--max_grad_norm", type=float, default=1.0, help="Norm that the gradient is clipped to.")
    add("--ema_decay", type=float, default=0.0, help="Decay of the averaged LoRA that is evaluated and saved; 0: off.")
    add("--seed", type=int, default=0, help="Seed of everything that is drawn.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="img2img-ddpo-lora", help="Folder of the LoRA, metrics, pictures and checkpoints.")
    add("--validation_epochs", type=int, default=5, help="Epochs between evaluations on held-out images.")
    add("--checkpointing_epochs", type=int, default=1, help="Epochs between checkpoints: all that a kill may lose.")
    add("--checkpoints_total_limit", type=int, default=2, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", help="`latest`, or the name of a checkpoint in --output_dir.")
    trackers = ["all", "none", *map(str, get_available_trackers())]
    add("--report_to", choices=trackers, default="none", help="Tracker of metrics and pictures, of those installed.")
    add("--push_to_hub", action="store_true", help="Upload the result, as who you are by `hf auth login` or HF_TOKEN.")
    add("--hub_model_id", help="Repository to upload to; by default the name of --output_dir.")

    if parser.parse_known_args(argv)[0].demo:
        options = json.loads((DEMO / "options.json").read_text())
        paths = {name: str(DEMO / options[name]) for name in ("pretrained_model_name_or_path", "train_data_dir")}
        parser.set_defaults(**options | paths)
    args = parser.parse_args(argv)
    defaults = {"lora_alpha": args.rank, "reward_weights": [1.0] * len(args.reward_fn)}
    defaults["updates_per_epoch"] = 1 if args.algorithm == "reinforce" else 2
    defaults["kl_coef"] = 0.001 if args.algorithm == "sac" else 0.0
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    check_args(args, parser.error)
    return args


def check_args(args: argparse.Namespace, error: Callable) -> None:
    """Calls `error` if a number is out of range, or if options contradict each other or do not divide."""
    maybe_zero = "guidance_scale guidance_rescale num_validation_images sde_window kl_coef lr_warmup_steps seed"
    maybe_zero = f"{maybe_zero} adam_beta1 adam_beta2 adam_weight_decay adam_epsilon ema_decay".split()
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or (value == 0 and name in maybe_zero)):
            error(f"--{name}={value} must be {'0 or more' if name in maybe_zero else 'above 0'}.")
        if name in ("strength", "eta", "guidance_rescale", "ema_decay") and value > 1:
            error(f"--{name}={value} must be at most 1.")
    if (args.train_data_dir is None) == (args.dataset_name is None):
        error("Images come from --train_data_dir or from --dataset_name: give one of them, or try --demo.")
    source, output_dir = (Path(x).resolve() for x in (args.train_data_dir or args.dataset_name, args.output_dir))
    if source.is_dir() and output_dir.is_relative_to(source):
        error(f"--output_dir={args.output_dir} is in the folder of images, where its pictures would be trained on.")
    if len(args.reward_fn) != len(args.reward_weights):
        error(f"--reward_weights={args.reward_weights}: give one for each of --reward_fn={args.reward_fn}.")
    if args.resolution % 8:
        error(f"--resolution={args.resolution} must be divisible by 8: try {args.resolution // 8 * 8}.")
    if (steps := int(args.num_inference_steps * args.strength)) < max(1, args.sde_window):
        error(
            f"--num_inference_steps={args.num_inference_steps} * --strength={args.strength} leaves {steps} steps, and"
            f" --sde_window={args.sde_window} needs more: raise --num_inference_steps or --strength."
        )
    if args.algorithm == "reinforce" and args.updates_per_epoch * args.num_inner_epochs > 1:
        error("--algorithm=reinforce makes one update per rollout: drop --updates_per_epoch and --num_inner_epochs.")

    # whole sample batches are dealt to the processes, and each gets its part of every update
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args.sample_batch_size = min(args.sample_batch_size, max(1, args.samples_per_epoch // processes))
    batch, group, updates = args.sample_batch_size, args.group_size, args.updates_per_epoch
    fitting = batch if batch % group == 0 or group % batch == 0 else group
    unit = math.lcm(group, fitting * processes, updates * processes)
    if fitting != batch or args.samples_per_epoch % unit:
        error(
            f"--samples_per_epoch={args.samples_per_epoch} must be divisible by --group_size={group}, and by"
            f" --sample_batch_size={batch} and --updates_per_epoch={updates} times {processes} process(es); a batch is"
            f" part or multiple of a group. Try --sample_batch_size={fitting}"
            f" --samples_per_epoch={math.ceil(args.samples_per_epoch / unit) * unit}."
        )
    used = Path(args.output_dir, LORA).exists() or list_checkpoints(args.output_dir)
    if used and not args.resume_from_checkpoint and not args.dry_run:
        error(f"--output_dir={args.output_dir} holds a run: add --resume_from_checkpoint=latest, or choose another.")


# ---- Data: dataset rows -> images, prompts, metadata ----------------------------------------------------------------
def load_data(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows, each read when it is needed. Finds the prompts; without any, guidance goes off."""
    source = args.dataset_name or args.train_data_dir
    try:
        if args.train_data_dir:
            splits = datasets.load_dataset("imagefolder", data_dir=source, cache_dir=args.cache_dir)
        elif source.endswith(".parquet"):
            splits = datasets.load_dataset("parquet", data_files=source, cache_dir=args.cache_dir)
        elif Path(source, "dataset_dict.json").exists() or Path(source, "state.json").exists():
            splits = datasets.load_from_disk(source)
        else:
            splits = datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
        splits = {"train": splits} if isinstance(splits, datasets.Dataset) else splits
        train, held_out = splits["train"], splits.get("validation", splits.get("test"))
    except Exception as e:
        hint = "--train_data_dir is for a folder of pictures, --dataset_name for the Hub, parquet and `save_to_disk`"
        raise SystemExit(f"error: no images in {source} ({type(e).__name__}: {e}); {hint}.") from None
    columns, size, count = ", ".join(train.column_names), len(train), args.num_validation_images
    if not isinstance(train.features.get(args.image_column), datasets.Image):
        raise SystemExit(f"error: --image_column={args.image_column} is no datasets.Image; columns are {columns}.")
    if args.caption_column not in (None, *train.column_names):
        raise SystemExit(f"error: --caption_column={args.caption_column} is no column; there are {columns}.")
    if args.caption_column is None and args.prompt is None and "text" in train.column_names:
        args.caption_column = "text"
    if args.prompt == "" or (args.prompt is None and args.caption_column is None):
        args.prompt, args.guidance_scale = "", 1.0
    if held_out is None:
        count = min(8, size // 3) if count is None else count
        if count >= size:
            raise SystemExit(f"error: --num_validation_images={count} leaves none of {size} images to train on.")
        train, held_out = train.select(range(size - count)), train.select(list(range(size - count, size)))
    args.train_images = min(args.max_train_samples or size, len(train))  # a resumed run must have as many
    held_out = held_out.select(range(min(8 if count is None else count, len(held_out))))
    return train.select(range(args.train_images)), held_out


def load_row(args: argparse.Namespace, data: datasets.Dataset, index: int, flip: bool = False, crop: bool = False):
    """The init image `(3, H, W)` in [0, 1], the prompt, and the metadata of a row: its other columns, pictures cut as
    the image is and classes by name, and `init_image`. The place of the cut is drawn if `crop`, else the middle."""
    row, size = data[index], (args.resolution, args.resolution)
    place = torch.rand(2, generator=seeded(args.seed, "crop", index)).tolist() if crop else (0.5, 0.5)
    for name, value in row.items():
        if isinstance(value, Image.Image):
            value = ImageOps.fit(value.convert("RGB"), size, Image.Resampling.LANCZOS, centering=place)
            row[name] = torch.from_numpy(np.array(ImageOps.mirror(value) if flip else value)).permute(2, 0, 1) / 255
        elif isinstance(data.features[name], datasets.ClassLabel) and value not in (None, -1):
            row[name] = data.features[name].int2str(value)
    prompt = row[args.caption_column] if args.prompt is None else args.prompt
    prompt = str((prompt[0] if isinstance(prompt, list) else prompt) or "")  # of several captions the first
    image = row.pop(args.image_column)
    return image, prompt, {**row, "init_image": image}


# ---- Rewards: functions of images (B, 3, H, W), B prompts and B dicts of metadata, or factories of them -----------
def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images `(B, 3, H, W)` in [0, 1] as they would be saved: 8-bit RGB, rounded as in ddpo-pytorch and TRL."""
    return numpy_to_pil(images.permute(0, 2, 3, 1).float().cpu().numpy())


def encode(image: Image.Image, kind: str) -> bytes:
    """The bytes of a file with this picture."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=95)
    return buffer.getvalue()


def pictures(metadata: list[dict], column: str) -> torch.Tensor:
    """`(B, 3, H, W)`: the pictures in a column, `init_image` among them."""
    if not torch.is_tensor(metadata[0].get(column)):
        raise ValueError(f"no column {column!r} of pictures: metadata.jsonl names its files as {column}_file_name")
    return torch.stack([row[column] for row in metadata])


def jpeg_incompressibility(images, prompts, metadata):
    """Size in kB as a JPEG of quality 95, as in ddpo-pytorch: busy, detailed images."""
    return [len(encode(image, "JPEG")) / 1000 for image in to_pil(images)]


def jpeg_compressibility(images, prompts, metadata):
    """Minus the size in kB as a JPEG of quality 95, as in ddpo-pytorch: smooth, simple images."""
    return [-size for size in jpeg_incompressibility(images, prompts, metadata)]


def psnr(column: str = "target", floor: float | None = None):
    """PSNR in dB to the picture in a column; with a floor a guard, -max(0, floor - PSNR)."""

    def reward(images, prompts, metadata):
        error = (images - pictures(metadata, column).to(images)).square().mean(dim=(1, 2, 3))
        decibels = -10 * torch.log10(error.clamp(min=1e-10))
        return decibels if floor is None else -F.relu(floor - decibels)

    return reward


def load_network(network_class, model: str, processor: str | None = None):
    """A frozen network on this rank's device, on a GPU under mixed precision in fp16 (bf16 is too coarse for scores),
    and a function that makes its `pixel_values` of images."""
    state = AcceleratorState()
    dtype = torch.float32 if state.device.type == "cpu" or state.mixed_precision == "no" else torch.float16
    network, loaded = network_class.from_pretrained(model, dtype=dtype, output_loading_info=True)
    if lacking := [key for key in loaded["missing_keys"] if not key.startswith("pooler.")]:  # made up at random
        raise ValueError(f"{model} has no weights for {', '.join(lacking[:3])} of {network_class.__name__}")
    network.to(state.device).requires_grad_(False).eval()
    image_processor = AutoImageProcessor.from_pretrained(processor or model, backend="pil")

    def pixels(images):
        values = image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        return values.to(network.device, network.dtype)

    return network, pixels


def load_clip(model: str, processor: str | None = None):
    """CLIP's logit scale, and a function of images `(B, 3, H, W)` and N texts that returns cosines `(B, N)`."""
    clip, pixels = load_network(CLIPModel, model, processor)
    tokenizer = AutoTokenizer.from_pretrained(processor or model)

    def cosines(images, texts):
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        out = clip(pixel_values=pixels(images), **tokens.to(clip.device))
        return F.normalize(out.image_embeds.float(), dim=-1) @ F.normalize(out.text_embeds.float(), dim=-1).T

    return clip.logit_scale.float().exp(), cosines


def clip_score(model: str = "openai/clip-vit-large-patch14", processor: str | None = None, scaled: bool = False):
    """Cosine between CLIP's embeddings of image and prompt, in practice 0.1 to 0.4; `scaled` by CLIP's logit scale."""
    scale, cosines = load_clip(model, processor)
    return lambda images, prompts, metadata: cosines(images, prompts).diagonal() * (scale if scaled else 1)


def aesthetic(model: str = "openai/clip-vit-large-patch14", head: str = "trl-lib/ddpo-aesthetic-predictor"):
    """LAION's aesthetic score, mostly 3 to 7. `head`: a file, or the Hub repository of aesthetic-model.pth."""
    clip, pixels = load_network(CLIPModel, model)
    path = head if Path(head).is_file() else huggingface_hub.hf_hub_download(head, "aesthetic-model.pth")
    sizes = ((768, 1024), None, (1024, 128), None, (128, 64), None, (64, 16), (16, 1))  # None: its dropouts
    layers = [torch.nn.Linear(*size) if size else torch.nn.Identity() for size in sizes]
    predictor = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers)}).to(clip.device)
    predictor.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def reward(images, prompts, metadata):
        hidden = clip.visual_projection(clip.vision_model(pixels(images)).pooler_output)
        return predictor["layers"](F.normalize(hidden.float(), dim=-1)).squeeze(1)

    return reward


def dino_similarity(model: str = "facebook/dinov2-small", column: str = "init_image", floor: float | None = None):
    """Cosine of DINOv2's class tokens of image and picture in a column; with a floor a guard, as `psnr`."""
    dino, pixels = load_network(AutoModel, model)

    def reward(images, prompts, metadata):
        both = [dino(pixels(x)).last_hidden_state[:, 0].float() for x in (images, pictures(metadata, column))]
        return F.cosine_similarity(*both) if floor is None else -F.relu(floor - F.cosine_similarity(*both))

    return reward


def classifier(model: str, label_column: str = "label", mode: str = "margin", splits: Sequence[datasets.Dataset] = ()):
    """Logit of the class in a column minus the greatest other one (`mode` margin), or minus that of the input image
    (logit_change, clipped to +-10, as in imageddpo's application). Names are looked up among the model's, numbers are
    its indices. A CLIP compares with "An image of {name}" for all names in the column of the dataset's `splits`."""
    logit_change = {"margin": False, "logit_change": True}[mode]
    if zero_shot := AutoConfig.from_pretrained(model).model_type == "clip":
        scale, cosines = load_clip(model)
        names = splits[0].features[label_column]
        names = getattr(names, "names", sorted({name for split in splits for name in split[label_column]}))
    else:
        network, pixels = load_network(AutoClassifier, model)
        names = [network.config.id2label[i] for i in range(network.config.num_labels)]

    def logits(images):
        if zero_shot:
            return scale * cosines(images, [f"An image of {name}" for name in names])
        return network(pixels(images)).logits.float()

    def reward(images, prompts, metadata):
        labels = [row[label_column] for row in metadata]
        if unknown := [label for label in labels if not isinstance(label, int) and label not in names]:
            raise ValueError(f"{label_column}={unknown[0]!r} is no class of {model}; they are {', '.join(names[:10])}")
        labels = [label if isinstance(label, int) else names.index(label) for label in labels]
        targets, after = torch.tensor(labels, device=images.device)[:, None], logits(images)
        if logit_change:
            return (after - logits(pictures(metadata, "init_image"))).gather(1, targets).squeeze(1).clamp(-10, 10)
        return after.gather(1, targets).squeeze(1) - after.scatter(1, targets, -torch.inf).amax(1)

    return reward


def post_json(url: str, payload: dict, api_key: str | None = None) -> dict:
    """The JSON that a server answers. Transient failures, such as no connection, are tried again for 14 seconds."""
    codes = (429, 500, 502, 503, 504)
    retry = Retry(4, backoff_factor=1, status_forcelist=codes, allowed_methods=None, raise_on_status=False)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with requests.Session() as session:
        session.mount(url, HTTPAdapter(max_retries=retry))
        # a redirect would turn POST into GET
        response = session.post(url, json=payload, timeout=60, headers=headers, allow_redirects=False)
    if response.status_code != 200:
        raise RuntimeError(f"{url} answered {response.status_code}: {response.text[:300]}")
    return response.json()


def http_reward(url: str):
    """POSTs {"images": [base64 PNG], "prompts": [...], "metadata": [{...}]}, metadata without pictures; the server
    answers {"rewards": [...]}, and perhaps "info": {name: [...]}, with one value per image."""

    def reward(images, prompts, metadata):
        rows = [{name: value for name, value in row.items() if not torch.is_tensor(value)} for row in metadata]
        files = [base64.b64encode(encode(image, "PNG")).decode() for image in to_pil(images)]
        payload = {"images": files, "prompts": prompts, "metadata": json.loads(json.dumps(rows, default=str))}
        answer = post_json(url, payload)
        return answer["rewards"], answer.get("info") or {}

    return reward


def vlm_judge(url, model, question_column=None, answer_column=None, score="strict", api_key_env="OPENAI_API_KEY"):
    """Whether the reply of a vision-language model about the image contains the expected answer (`score` strict), or
    the part of its words that it contains (recall): 0 to 1. `url` is of an OpenAI-compatible endpoint, up to /v1.
    Columns hold a text or several, which are averaged over; without them the prompt should describe the image."""

    def judge(image, prompt, row):
        questions = row[question_column] if question_column else "Answer concisely: what is going on in this image?"
        answers = row[answer_column] if answer_column else prompt
        picture = {"url": "data:image/jpeg;base64," + base64.b64encode(encode(image, "JPEG")).decode()}
        questions, answers = ([x] if isinstance(x, str) else x for x in (questions, answers))
        scores = []
        for question, answer in zip(questions, answers, strict=True):
            content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": picture}]
            payload = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
            reply = post_json(f"{url}/chat/completions", payload, os.environ.get(api_key_env))
            reply = reply["choices"][0]["message"]["content"].lower()
            expected, said = (Counter(re.findall(r"\w+", text)) for text in (answer.lower(), reply))
            scores.append((answer.lower() in reply, (expected & said).total() / max(1, expected.total())))
        return np.mean(scores, axis=0)

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(8) as executor:
            strict, recall = np.array(list(executor.map(judge, to_pil(images), prompts, metadata))).T
        return {"strict": strict, "recall": recall}[score], {"vlm_strict": strict, "vlm_recall": recall}

    return reward


def pick_score(model: str = "yuvalkirstain/PickScore_v1", processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """PickScore, trained on what people picked for a prompt: mostly 15 to 25."""
    return clip_score(model, processor, scaled=True)


def hps(model: str = "adams-story/HPSv2-hf", processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """Human preference score v2, of image and prompt: mostly 0.2 to 0.35."""
    return clip_score(model, processor)


# Add yours here
REWARDS = (jpeg_compressibility, jpeg_incompressibility, psnr, aesthetic, clip_score, pick_score, hps, dino_similarity)
REWARDS = {maker.__name__: maker for maker in (*REWARDS, classifier, vlm_judge)}


def load_reward(spec: str, splits: Sequence[datasets.Dataset] = ()) -> Callable:
    """An entry of `--reward_fn` as a function `(images, prompts, metadata) -> (B,) rewards, or (rewards, info)`. A
    callable with exactly three required parameters is used as it is. Anything else is a factory of one: it is called
    with the options in parentheses and, if it has a parameter `splits`, the training and held-out rows."""
    try:
        name, options = re.fullmatch(r"(.*?)(\(.*\))?", spec).groups()
        if name.startswith(("http://", "https://")):
            return http_reward(name)
        if ".py:" in name:
            path, _, name = name.rpartition(":")
            sys.path.insert(0, str(Path(path).resolve().parent))  # for what the file imports
            maker = runpy.run_path(path)[name]
        elif name in REWARDS:
            maker = REWARDS[name]
        else:
            raise ValueError(f"no such reward: use {', '.join(REWARDS)}, file.py:function or http(s)://host/path")
        parameters = inspect.signature(maker).parameters
        required = [p for p in parameters.values() if p.default is p.empty and not p.kind.name.startswith("VAR")]
        if len(required) == 3 and options in (None, "()"):
            return maker
        call = ast.parse(f"f{options or '()'}", mode="eval").body
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        keywords |= {"splits": splits} if "splits" in parameters else {}
        return maker(*map(ast.literal_eval, call.args), **keywords)
    except Exception as e:
        raise SystemExit(f"error: --reward_fn={spec}: {type(e).__name__}: {e}") from None


@torch.no_grad()
def compute_rewards(rewards: dict[str, Callable], images, prompts, metadata) -> tuple[torch.Tensor, dict[str, float]]:
    """Rewards `(B, len(rewards))` of images `(B, 3, H, W)`, and the means of what the functions give as info."""
    columns, info = [], {}
    for name, function in rewards.items():
        result = function(images.clone(), list(prompts), list(metadata))  # it may write into the images
        values, more = result if isinstance(result, tuple) else (result, {})
        values = torch.as_tensor(values, dtype=torch.float32, device=images.device)
        if values.shape != images.shape[:1]:
            raise ValueError(f"reward {name} has the shape {tuple(values.shape)} for {len(images)} images")
        columns.append(values)
        for key, value in more.items():
            with suppress(TypeError, ValueError):  # texts are not logged
                info[f"info/{key}"] = torch.as_tensor(value, dtype=torch.float32).mean().item()
    return torch.stack(columns, dim=1), info


def check_finite(rewards: torch.Tensor, names: Sequence[str]) -> None:
    """Raises on the first of the rewards `(B, len(names))` that is not finite."""
    for sample, reward in (~rewards.isfinite()).nonzero().tolist():
        raise RuntimeError(f"reward {names[reward]} is {rewards[sample, reward]:.0f} for image {sample}")


# ---- Advantages: rewards -> what each sample is worth against its like ----------------------------------------------
def compute_advantages(rewards, kind: str, group_size: int, keys: Sequence = (), tracker: dict | None = None):
    """Advantages `(B, rewards)` of rewards `(B, rewards)` float64, groups contiguous: each against a baseline, in
    standard deviations, clipped to +-5. `group` has the group's mean, and the standard deviation within groups pooled
    over them: a group whose rewards are all equal has advantage 0. `batch` has the epoch's. `tracker`, as DDPO, has
    those of the last 32 rewards with the same of the B `keys` (row of the data, flip), which are kept in `tracker`, or
    the epoch's as long as they are fewer than 16."""
    if kind == "group":
        groups = rewards.unflatten(0, (-1, group_size))
        deviations = (groups - groups.mean(1, keepdim=True)).flatten(0, 1)
        spread = deviations.square().mean(0).sqrt()
    elif kind == "batch":
        deviations, spread = rewards - rewards.mean(0), rewards.std(0, unbiased=False)
    else:
        for key, values in zip(keys, rewards.tolist()):
            tracker[key] = [*tracker.get(key, []), values][-32:]
        known = [rewards.new_tensor(tracker[key]) if len(tracker[key]) >= 16 else rewards for key in keys]
        deviations = rewards - torch.stack([values.mean(0) for values in known])
        spread = torch.stack([values.std(0, unbiased=False) for values in known])
    return (deviations / (spread + 1e-6)).clamp(-5, 5)


# ---- Objectives: pure functions of tensors --------------------------------------------------------------------------
def ppo_loss(log_probs, old_log_probs, advantages, clip_range: float) -> torch.Tensor:
    """Clipped surrogate, equation (7) of PPO (https://huggingface.co/papers/1707.06347): a loss `(B,)` of advantages
    `(B,)` and of log-probs `(B,)` in nats per latent element, of the policy now and when it sampled. Their ratio is
    clipped to `1 +- clip_range`."""
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(log_probs, advantages) -> torch.Tensor:
    """The score function (https://doi.org/10.1007/BF00992696), of `(B,)` log-probs and advantages. On-policy only."""
    return -advantages * log_probs


def trpo_loss(log_probs, old_log_probs, advantages, kl, beta: float) -> torch.Tensor:
    """Surrogate with a KL penalty, the form that TRPO (https://huggingface.co/papers/1502.05477) derives before its
    constraint: `(B,)`, as all but `beta`. `kl` is the exact KL(old || new) per latent element, like the log-probs."""
    return -advantages * torch.exp(log_probs - old_log_probs) + beta * kl


def adapt_beta(beta: float, kl: float, target_kl: float) -> float:
    """Doubles or halves the weight if the KL is more than a factor 1.5 off (section 4 of the PPO paper)."""
    if kl > 1.5 * target_kl:
        beta = beta * 2
    elif kl < target_kl / 1.5:
        beta = beta / 2
    return min(max(beta, 1e-6), 1e6)


def sac_loss(values) -> torch.Tensor:
    """The actor's side of soft actor-critic (https://huggingface.co/papers/1801.01290), `(B,)`: minus the lower of the
    values `(2, B)` of newly drawn, reparameterised actions. "Soft" is the KL to the frozen model, which `--kl_coef`
    adds: with a fixed std the entropy is a constant."""
    return -values.min(dim=0).values


def gaussian_kl(other_mean, mean, std) -> torch.Tensor:
    """KL between N(other_mean, std^2 I) and N(mean, std^2 I), `(B, C, h, w)`: `(B,)` nats, exact and symmetric."""
    return ((mean - other_mean) ** 2 / (2 * std**2)).flatten(1).sum(dim=1)


class ValueCritic(torch.nn.Module):
    """What a step x_t -> x_prev is worth, in standard deviations of reward: two heads on a convolutional trunk, linear
    in the step, so that its slope, which is all that the policy gets of it, is learnt from few samples."""

    def __init__(self, channels: int, embedding_dim: int, width: int = 32):
        super().__init__()
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.prompt_embedding = torch.nn.Linear(embedding_dim, width)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(c, width, 3, padding=1) for c in (channels, width, width))
        self.conv_out = torch.nn.Conv2d(width, 2 * channels, 3, padding=1)
        torch.nn.init.normal_(self.conv_out.weight, std=1e-3)  # values near 0, and two heads that differ
        self.bias = torch.nn.Parameter(torch.zeros(2, 1))

    def forward(self, actions, batch):
        """`(2, B)` values of `actions` `(B, C, h, w)` in place of the next latents of B `Transitions`."""
        condition = self.time_embedding(self.time_proj(batch.timesteps))
        condition = condition + self.prompt_embedding(batch.prompt_embeds.float().mean(1))
        hidden = self.convs[0](batch.latents) + condition[:, :, None, None]
        for conv in self.convs[1:]:
            hidden = hidden + conv(F.silu(hidden))
        weights = self.conv_out(F.silu(hidden)).unflatten(1, (2, -1))  # (B, 2, C, h, w)
        steps = (actions - batch.latents).unsqueeze(1) / actions[0].numel() ** 0.5
        return (weights * steps).flatten(2).sum(2).T + self.bias


# ---- The run: what training changes, and the stages of an epoch -----------------------------------------------------
def seeded(*path: int | str) -> torch.Generator:
    """A CPU generator, a function of `path` (seed, what for, place such as epoch and sample) and nothing else."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:8], "big"))


class Transitions(NamedTuple):
    """Steps x_t -> x_prev that are trained: those of an epoch, of all ranks, or a micro-batch of them; N in all."""

    latents: torch.Tensor  # (N, C, h, w) x_t
    next_latents: torch.Tensor  # (N, C, h, w) x_prev
    timesteps: torch.Tensor  # (N,) t
    means: torch.Tensor  # (N, C, h, w) of the policy that sampled
    log_probs: torch.Tensor  # (N,) of the policy that sampled
    prompt_embeds: torch.Tensor  # (N, L, E)
    negative_prompt_embeds: torch.Tensor  # (N, L, E); not looked at without guidance
    advantages: torch.Tensor  # (N,)

    def take(self, rows: torch.Tensor | slice) -> "Transitions":
        """The transitions `rows`."""
        return Transitions(*(field[rows] for field in self))


def load_pipeline(args: argparse.Namespace, device: torch.device) -> StableDiffusionImg2ImgDDPOPipeline:
    """The frozen model in the precision of the run, with a DDIM scheduler whose steps have a density."""
    name, dtypes = args.pretrained_model_name_or_path, {"fp16": torch.float16, "bf16": torch.bfloat16}
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "safety_checker": None}
    options |= {"requires_safety_checker": False, "dtype": dtypes.get(args.mixed_precision, torch.float32)}
    try:
        pipe = StableDiffusionImg2ImgDDPOPipeline.from_pretrained(name, **options)
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: --pretrained_model_name_or_path={name}: {e}") from None
    unet = pipe.unet.config
    if unet.in_channels != pipe.vae.config.latent_channels or unet.time_cond_proj_dim or unet.addition_embed_type:
        raise SystemExit(f"error: --pretrained_model_name_or_path={name}: SDXL, LCM and inpainting cannot be trained.")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)  # of the others no gradient is ever taken
    if device.type == "cuda":
        pipe.vae.enable_slicing()  # decoding a whole batch would take more memory than training
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe.to(device)


class DDPOTrainer:
    """A run: the model, what training changes, and the stages of an epoch."""

    def __init__(self, args, accelerator: Accelerator, rewards: dict[str, Callable], train_data, held_out):
        self.args, self.accelerator, self.rewards = args, accelerator, rewards
        self.train_data, self.held_out, self.baselines, self.unet_rows = train_data, held_out, {}, 0
        terms = [f"{weight:g} * {name}" for weight, name in zip(args.reward_weights, rewards)]
        self.title = " + ".join(terms).removeprefix("1 * ")
        self.weights = torch.tensor(args.reward_weights, dtype=torch.float64)
        self.progress = partial(tqdm, leave=False, disable=None if accelerator.is_main_process else True)
        adamw = torch.optim.AdamW
        if args.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit as adamw
        self.pipe = load_pipeline(args, accelerator.device)
        self.pipe.unet.register_forward_pre_hook(self.count_rows)
        names = ("strength", "num_inference_steps", "guidance_scale", "guidance_rescale")
        self.pipe_kwargs = {name: getattr(args, name) for name in names} | {"output_type": "pt"}
        self.plan_steps()

        set_seed(args.seed)  # for the starts of LoRA and critic: nothing else is drawn from the global generator
        layers = [layer.strip() for layer in args.lora_layers.split(",")]
        for layer in layers:  # peft would train those that there are, and say nothing
            if not any(f".{name}".endswith(f".{layer}") for name, _ in self.pipe.unet.named_modules()):
                raise SystemExit(f"error: --lora_layers={args.lora_layers}: the UNet has no module {layer!r}.")
        config = {"r": args.rank, "lora_alpha": args.lora_alpha, "init_lora_weights": "gaussian"}
        self.pipe.unet.add_adapter(LoraConfig(target_modules=layers, **config))
        cast_training_params(self.pipe.unet, dtype=torch.float32)
        self.lora = torch.nn.ParameterList(p for p in self.pipe.unet.parameters() if p.requires_grad)
        betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
        optimizer = adamw(self.lora, args.learning_rate, betas, args.adam_epsilon, weight_decay=decay)
        updates = args.num_train_epochs * args.num_inner_epochs * args.updates_per_epoch
        lengths = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": updates}
        self.lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **lengths)
        self.optimizer = accelerator.prepare(optimizer)

        # A checkpoint holds the `state_dict` of these, and these values
        self.parts = {"lora": self.lora, "optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler
        if args.ema_decay:
            self.parts["ema"] = EMAModel(list(self.lora), decay=args.ema_decay)
        if args.algorithm == "sac":
            sizes = self.pipe.unet.config.in_channels, self.pipe.text_encoder.config.hidden_size
            self.critic = ValueCritic(*sizes).to(accelerator.device)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
            self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=1e-3)
            self.parts |= {name: getattr(self, name) for name in ("critic", "target_critic", "critic_optimizer")}
        self.values = {"beta": 1.0, "tracker": {}, "history": []}

    def count_rows(self, unet, inputs) -> None:
        """Hook of the UNet, for the cost of an epoch."""
        self.unet_rows += len(inputs[0]) * (TRAINED_ROW_COST if torch.is_grad_enabled() else 1)

    def plan_steps(self) -> None:
        """Finds the steps that are run, how many of them come before the tail, and the size of the window."""
        args, scheduler = self.args, self.pipe.scheduler
        scheduler.set_timesteps(args.num_inference_steps)
        self.timesteps, _ = self.pipe.get_timesteps(args.num_inference_steps, args.strength, "cpu")
        previous = self.timesteps - scheduler.config.num_train_timesteps // args.num_inference_steps
        variances = 1 - scheduler.alphas_cumprod[previous.clamp(min=0)]  # of the noise in x_prev
        self.trainable = len(self.timesteps) if args.train_tail else int((variances >= TAIL_VARIANCE).sum())
        self.window_size = args.sde_window or self.trainable
        if not 0 < self.window_size <= self.trainable:
            raise SystemExit(
                f"error: --sde_window={args.sde_window}, but {self.trainable} of {len(self.timesteps)} steps can be"
                " trained (the last add no noise): raise --num_inference_steps or --strength, or add --train_tail."
            )
        elements = self.pipe.unet.config.in_channels * (args.resolution // self.pipe.vae_scale_factor) ** 2
        args.clip_range = args.clip_range or math.sqrt(2 * TRUST_REGION_NATS) / elements

    # ---- Rollout: images -> samples, their rewards, advantages and transitions --------------------------------------
    def sample(self, samples: torch.Tensor, groups: list, window: torch.Tensor, epoch: int):
        """The transitions of a batch of `samples`, without advantages, and what `compute_rewards` takes of it."""
        args = self.args
        # the first sample of a group stands for it until noise is drawn, or each stands for itself
        copies = 1 if args.independent_start_noise else min(args.group_size, len(samples))
        owners = (samples[::copies] // args.group_size).tolist()
        rows = [load_row(args, self.train_data, *groups[i], crop=not args.center_crop) for i in owners]
        images, prompts, metadata = zip(*rows)
        starts = not args.independent_start_noise and [seeded(args.seed, "start", epoch, i) for i in owners]
        out = self.pipe(
            list(prompts),
            torch.stack(images),
            num_images_per_prompt=copies,
            eta=[args.eta if step in window else 0.0 for step in range(len(self.timesteps))],
            generator=[seeded(args.seed, "noise", epoch, i) for i in samples.tolist()],
            share_start_noise=starts,
            return_trajectory=True,
            **self.pipe_kwargs,
        )
        negative = out.prompt_embeds if out.negative_prompt_embeds is None else out.negative_prompt_embeds
        transitions = Transitions(
            latents=out.latents[:, window].flatten(0, 1),
            next_latents=out.latents[:, window + 1].flatten(0, 1),
            timesteps=out.timesteps[window].repeat(len(samples)),
            means=out.means[:, window].flatten(0, 1),
            log_probs=out.log_probs[:, window].flatten(),
            prompt_embeds=out.prompt_embeds.repeat_interleave(len(window), dim=0),
            negative_prompt_embeds=negative.repeat_interleave(len(window), dim=0),
            advantages=torch.zeros_like(out.log_probs[:, window]).flatten(),
        )
        prompts, metadata = ([x for x in column for _ in range(copies)] for column in (prompts, metadata))
        return transitions, (out.images.float(), prompts, metadata)

    @torch.no_grad()
    def rollout(self, epoch: int) -> tuple[Transitions, dict[str, float]]:
        """The epoch's transitions and metrics. Whole batches are dealt to the ranks, in order, then gathered."""
        args, accelerator, count = self.args, self.accelerator, self.args.samples_per_epoch // self.args.group_size
        groups = []  # row of the data, and whether it is flipped
        for number in range(epoch * count, (epoch + 1) * count):  # shuffled passes over the data
            data_pass, position = divmod(number, len(self.train_data))
            order = torch.randperm(len(self.train_data), generator=seeded(args.seed, "order", data_pass))
            flip = torch.rand((), generator=seeded(args.seed, "flip", number)).item() < 0.5 * args.random_flip
            groups.append((order[position].item(), flip))
        places = self.trainable - self.window_size + 1
        start = torch.randint(places, (1,), generator=seeded(args.seed, "window", epoch))
        window = start + torch.arange(self.window_size)
        batches, parts, scored = torch.arange(args.samples_per_epoch).split(args.sample_batch_size), [], []
        share = len(batches) // accelerator.num_processes
        own = batches[accelerator.process_index * share :][:share]
        # a new thread's current device is the first GPU
        device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else ()
        with ThreadPoolExecutor(1, "rewards", *device) as executor, accelerator.autocast():
            for samples in self.progress(own, desc=f"epoch {epoch + 1}, sampling"):
                transitions, inputs = self.sample(samples, groups, window, epoch)
                parts.append(transitions)
                if scored:  # one at a time, so that a failure is noticed and nothing waits after Ctrl-C
                    scored[-1].result()
                scored.append(executor.submit(compute_rewards, self.rewards, *inputs))  # while the next is sampled
            rewards, infos = zip(*(future.result() for future in scored))
        rewards = accelerator.gather(torch.cat(rewards)).cpu().double()  # (samples_per_epoch, rewards)
        check_finite(rewards, list(self.rewards))
        keys = [group for group in groups for _ in range(args.group_size)]
        advantages = compute_advantages(rewards, args.advantage, args.group_size, keys, self.values["tracker"])
        advantages = (advantages @ self.weights).repeat_interleave(self.window_size).float().to(accelerator.device)
        transitions = Transitions(*(accelerator.gather(torch.cat(fields)) for fields in zip(*parts)))

        total = rewards @ self.weights
        spread = total.view(-1, args.group_size).std(dim=1, unbiased=False)
        metrics = {"epoch": epoch + 1, "samples": (epoch + 1) * args.samples_per_epoch, "unet_evaluations": 0}
        metrics |= {f"reward_{name}": x for name, x in pd.Series(total).agg(["mean", "std", "min", "max"]).items()}
        metrics |= {"reward_group_std": spread.mean().item(), "zero_variance_groups": (spread == 0).sum().item()}
        for name, values in zip(self.rewards, rewards.T if len(self.rewards) > 1 else ()):
            metrics |= {f"reward_mean/{name}": values.mean().item(), f"reward_std/{name}": values.std().item()}
        metrics |= pd.DataFrame(gather_object(list(infos))).mean().to_dict()
        return transitions._replace(advantages=advantages), metrics

    # ---- Update: transitions and advantages -> a better LoRA --------------------------------------------------------
    def policy(self, batch: Transitions) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(B, C, h, w)` and std `(B, 1, 1, 1)` of the steps under the current weights."""
        inputs = batch.latents, batch.timesteps, batch.prompt_embeds, batch.negative_prompt_embeds
        with self.accelerator.autocast():  # as in the rollout
            noise = predict_noise(self.pipe.unet, *inputs, self.args.guidance_scale, self.args.guidance_rescale)
        return ddim_transition(self.pipe.scheduler, noise, batch.timesteps, batch.latents, self.args.eta)

    @torch.no_grad()
    def reference_mean(self, batch: Transitions) -> torch.Tensor:
        """Mean `(B, C, h, w)` of the steps without the LoRA."""
        self.pipe.unet.disable_adapters()
        mean, _ = self.policy(batch)
        self.pipe.unet.enable_adapters()
        return mean

    def update(self, transitions: Transitions, epoch: int) -> dict[str, float]:
        """Optimizer updates on the epoch's transitions; returns metrics."""
        args, accelerator, metrics, measured, norms = self.args, self.accelerator, {}, defaultdict(list), []
        count, elements, beta = len(transitions.timesteps), transitions.latents[0].numel(), self.values["beta"]
        for number in range(args.num_inner_epochs * args.updates_per_epoch):
            inner_epoch, part = divmod(number, args.updates_per_epoch)
            order = torch.randperm(count, generator=seeded(args.seed, "update", epoch, inner_epoch))
            order = order.tensor_split(args.updates_per_epoch)[part]
            own = order[accelerator.process_index :: accelerator.num_processes].split(args.train_batch_size)
            for rows in self.progress(own, desc=f"epoch {epoch + 1}, training"):
                batch = transitions.take(rows)
                reference = self.reference_mean(batch) if args.kl_coef else None
                mean, std = self.policy(batch)
                log_probs = gaussian_log_prob(batch.next_latents, mean, std)
                kl = gaussian_kl(batch.means, mean, std)
                if args.algorithm == "ppo":
                    losses = ppo_loss(log_probs, batch.log_probs, batch.advantages, args.clip_range)
                elif args.algorithm == "reinforce":
                    losses = reinforce_loss(log_probs, batch.advantages)
                elif args.algorithm == "trpo":
                    losses = trpo_loss(log_probs, batch.log_probs, batch.advantages, kl / elements, beta)
                else:  # per latent element, as the log-probs are, so that the weight of the KL means the same
                    noise = [seeded(args.seed, "action", epoch, number, i) for i in rows.tolist()]
                    actions = mean + std * randn_tensor(mean.shape, noise, mean.device)
                    losses = sac_loss(self.target_critic(actions, batch)) / elements
                if args.kl_coef:
                    losses = losses + args.kl_coef * gaussian_kl(reference, mean, std) / elements
                accelerator.backward(losses.sum() / len(order))  # this rank's part of the mean
                ratio = torch.exp(log_probs - batch.log_probs)
                for name, values in (("loss", losses), ("ratio", ratio), ("kl", kl)):
                    measured[name].append(values.detach())
            if number == 0:  # still the policy that sampled: the ratio is 1 up to rounding
                start = self.summarise(measured)
                metrics |= {f"{name}_start": start[name] for name in ("ratio_mean", "ratio_deviation", "kl")}
                if not math.isfinite(start["loss"]):  # fp16's scaler would skip its gradient again and again
                    raise RuntimeError("the loss is not finite: use --mixed_precision=no")

            for parameter, gradient in zip(self.lora, accelerator.reduce([p.grad for p in self.lora], "sum")):
                parameter.grad = gradient
            norms.append(accelerator.clip_grad_norm_(self.lora, args.max_grad_norm).item())
            # fp16 may overflow: its scaler then skips the step and lowers its scale, until that is not the cause
            if not math.isfinite(norms[-1]) and (accelerator.scaler is None or accelerator.scaler.get_scale() < 1):
                raise RuntimeError(f"the gradient's norm is {norms[-1]}: lower --learning_rate={args.learning_rate}")
            self.optimizer.step()
            self.optimizer.zero_grad()
            if math.isfinite(norms[-1]):
                self.lr_scheduler.step()
                if "ema" in self.parts:
                    self.parts["ema"].step(list(self.lora))
            if args.algorithm == "trpo":
                with torch.no_grad():
                    kls = [gaussian_kl(batch.means, *self.policy(batch)) for batch in map(transitions.take, own)]
                metrics["kl_after_update"] = accelerator.reduce(torch.cat(kls).mean(), "mean").item()
                if metrics["kl_after_update"] > 2 * args.target_kl:
                    break
        metrics["grad_norm"] = float(np.mean([norm for norm in norms if math.isfinite(norm)] or math.nan))
        return metrics | self.summarise(measured)

    def summarise(self, measured: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        """Means, over all ranks, of what was measured of transitions, and what there is to say of their ratios."""
        values = {name: self.accelerator.gather(torch.cat(parts)) for name, parts in measured.items()}
        ratio, clip_range = values.pop("ratio"), self.args.clip_range
        return {name: value.mean().item() for name, value in values.items()} | {
            "ratio_mean": ratio.mean().item(),
            "ratio_deviation": (ratio - 1).abs().max().item(),
            "clip_fraction_above": (ratio > 1 + clip_range).float().mean().item(),
            "clip_fraction_below": (ratio < 1 - clip_range).float().mean().item(),
        }

    def fit_critic(self, transitions: Transitions, epoch: int) -> float:
        """Regresses SAC's critic on the advantages, on all ranks alike; returns the last pass's error."""
        for number in range(24):
            generator, errors = seeded(self.args.seed, "critic", epoch, number), []
            order = torch.randperm(len(transitions.timesteps), generator=generator)
            for batch in map(transitions.take, order.tensor_split(4)):
                errors.append((self.critic(batch.next_latents, batch) - batch.advantages).square().mean(dim=1).sum())
                self.critic_optimizer.zero_grad()
                errors[-1].backward()
                self.critic_optimizer.step()
                for target, parameter in zip(self.target_critic.parameters(), self.critic.parameters()):
                    target.data.lerp_(parameter.data, 0.05)
        return torch.stack(errors).mean().item()

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """A rollout and its updates; returns metrics, equal on all ranks."""
        args, accelerator, values = self.args, self.accelerator, self.values
        self.unet_rows = 0
        transitions, metrics = self.rollout(epoch)
        if args.algorithm == "sac":
            metrics["critic_loss"] = self.fit_critic(transitions, epoch)
        metrics |= self.update(transitions, epoch)
        if args.algorithm == "trpo":
            metrics["beta"] = values["beta"] = adapt_beta(values["beta"], metrics["kl_after_update"], args.target_kl)
        rows = accelerator.reduce(torch.tensor(self.unet_rows, device=accelerator.device), "sum").item()
        metrics["unet_evaluations"] = rows + (values["history"][-1]["unet_evaluations"] if values["history"] else 0)
        few = transitions.take(slice(min(8, args.train_batch_size)))
        with torch.no_grad():
            mean, std = self.policy(few)
            metrics["kl_old"] = gaussian_kl(few.means, mean, std).mean().item()  # to the policy that sampled
            metrics["kl_reference"] = gaussian_kl(self.reference_mean(few), mean, std).mean().item()
        if not all(parameter.isfinite().all() for parameter in self.lora):
            raise RuntimeError(f"the LoRA is not finite: lower --learning_rate={args.learning_rate}")
        return metrics | {"learning_rate": self.lr_scheduler.get_last_lr()[0]}

    # ---- Evaluation, by the main process: held-out images, fixed noise ----------------------------------------------
    @torch.no_grad()
    def evaluate(self, draw: int | None = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out images `(N, 3, H, W)` in [0, 1] and rewards `(N, rewards)`: what the pipeline makes of them as its
        users do (deterministic steps) from the noise of `draw`, or with None the inputs themselves."""
        args, parts = self.args, []
        for indices in torch.arange(len(self.held_out)).split(args.sample_batch_size):
            inputs, prompts, metadata = zip(*(load_row(args, self.held_out, i) for i in indices.tolist()))
            images = torch.stack(inputs).to(self.accelerator.device)
            if draw is not None:
                generator = [seeded(args.seed, "evaluation", i, draw) for i in indices.tolist()]
                with self.accelerator.autocast():
                    images = self.pipe(list(prompts), images, generator=generator, **self.pipe_kwargs).images.float()
            parts.append((images.cpu(), compute_rewards(self.rewards, images, prompts, metadata)[0].cpu().double()))
        images, rewards = (torch.cat(column) for column in zip(*parts))
        check_finite(rewards, list(self.rewards))
        return images, rewards

    def validate(self) -> dict[str, float]:
        """Held-out metrics of the LoRA and of what it has to beat; draws samples/epoch-*.png."""
        if not self.baselines:
            self.pipe.unet.disable_adapters()
            base = self.evaluate(0)
            draws = torch.stack([base[1], *(self.evaluate(draw)[1] for draw in range(1, self.args.group_size))])
            self.pipe.unet.enable_adapters()
            best = draws[(draws @ self.weights).argmax(0), torch.arange(len(self.held_out))]
            self.baselines = {"identity": self.evaluate(None), "base": base, "best_of_k_base": (None, best)}
        self.swap_lora()
        evaluated = {**self.baselines, "trained": self.evaluate()}
        self.swap_lora()
        totals = {name: (images, rewards @ self.weights) for name, (images, rewards) in evaluated.items()}
        metrics = {f"heldout_{name}": total.mean().item() for name, (_, total) in totals.items()}
        for name, (_, rewards) in evaluated.items() if len(self.rewards) > 1 else ():
            metrics |= {f"heldout_{name}/{x}": mean for x, mean in zip(self.rewards, rewards.mean(0).tolist())}
        write_pictures(self, totals)
        return metrics

    def swap_lora(self) -> None:
        """Exchanges the LoRA with its moving average, if there is one: the average is evaluated and saved."""
        if "ema" in self.parts:
            for parameter, average in zip(self.lora, self.parts["ema"].shadow_params):
                parameter.data, average.data = average.data, parameter.data

    # ---- Checkpoints, by the main process ---------------------------------------------------------------------------
    def save_lora(self, folder: Path) -> None:
        """The LoRA, as stock diffusers loads it with `load_lora_weights`."""
        config = {f"unet.{name}": value for name, value in self.pipe.unet.peft_config["default"].to_dict().items()}
        # a single entry, as safetensors would shuffle several: equal runs give equal files
        metadata = {"lora_adapter_metadata": json.dumps(config, default=sorted, sort_keys=True)}
        self.swap_lora()
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.pipe.unet))
        self.pipe.save_lora_weights(folder, unet_lora_layers=lora, save_function=partial(save_file, metadata=metadata))
        self.swap_lora()

    def save_checkpoint(self) -> None:
        """checkpoint-<epoch>, with the LoRA for diffusers, and in state.pt `parts`, `values` and args: written aside,
        synchronised, then renamed. Only then are old ones deleted."""
        output_dir = Path(self.args.output_dir)
        folder, aside = output_dir / f"checkpoint-{len(self.values['history'])}", output_dir / "checkpoint.incomplete"
        shutil.rmtree(aside, ignore_errors=True)
        self.save_lora(aside)
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"args": vars(self.args), "values": self.values, "parts": parts}, aside / "state.pt")
        for path in aside.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        with suppress(PermissionError):  # of Windows, which does not open folders
            os.fsync(descriptor := os.open(output_dir, os.O_RDONLY))
            os.close(descriptor)
        for old in list_checkpoints(output_dir)[self.args.checkpoints_total_limit :]:
            if old != folder:  # after a resume from an older one, there may be newer ones
                shutil.rmtree(old)

    def load_checkpoint(self, state: dict) -> None:
        """Continues from what `save_checkpoint` wrote."""
        self.values = state["values"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        if "ema" in self.parts:
            self.parts["ema"].to(self.accelerator.device)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-<epoch>, the newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]), reverse=True)


def read_checkpoint(args: argparse.Namespace) -> dict | None:
    """The newest checkpoint that is whole, or None if there is none; exits if it is of a run with other settings."""
    wanted, state = args.resume_from_checkpoint, None
    folders = list_checkpoints(args.output_dir) if wanted == "latest" else [Path(args.output_dir, Path(wanted).name)]
    for folder in folders:
        try:
            with zipfile.ZipFile(folder / "state.pt") as file:
                if file.testzip() is not None:  # torch.load would not notice
                    raise ValueError("a checksum is wrong")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            break
        except Exception as e:
            print(f"Warning: {folder} cannot be read ({type(e).__name__}: {e}).")
    if state is None and (folders or Path(args.output_dir, LORA).exists()):
        raise SystemExit(f"error: --resume_from_checkpoint={wanted}: no checkpoint can be read.")
    if state is None:
        print(f"--resume_from_checkpoint={wanted}: there is none in {args.output_dir}, this is a new run.")
        return None
    now, was = vars(args), state["args"]  # what may differ without making it another run:
    free = "demo dry_run output_dir cache_dir gradient_checkpointing sample_batch_size train_batch_size report_to"
    free += " validation_epochs checkpointing_epochs checkpoints_total_limit resume_from_checkpoint push_to_hub"
    free += " hub_model_id" + (" num_train_epochs" if args.lr_scheduler.startswith("constant") else "")
    if names := [name for name in now if now[name] != was[name] and name not in free.split()]:
        told = ", ".join(f"--{name}={now[name]} (was {was[name]})" for name in names)
        raise SystemExit(f"error: {folder} is of a run with other settings: {told}. Give the same, or start anew.")
    return state


# ---- Files that a run leaves ----------------------------------------------------------------------------------------
def write_reward_curve(run: DDPOTrainer) -> None:
    """reward_curve.png: training reward, and held-out reward beside what it has to beat, over samples."""
    labels = {"reward_mean": "in training", "heldout_trained": "held-out: trained", "heldout_base": "held-out: base"}
    labels |= {"heldout_identity": "held-out: input", "heldout_best_of_k_base": f"best of {run.args.group_size} draws"}
    lines = pd.DataFrame(run.values["history"]).set_index("samples").filter(list(labels)).interpolate()
    axes = lines.rename(columns=labels).plot(figsize=(7, 4), ylabel=run.title, style=["-", "-", "--", ":", "-."])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(Path(run.args.output_dir, "reward_curve.png"), dpi=120, bbox_inches="tight")


def write_pictures(run: DDPOTrainer, evaluated: dict[str, tuple]) -> None:
    """samples/epoch-*.png, for trackers too: per policy a row of held-out images `(N, 3, H, W)`, rewards `(N,)`."""
    rows = {"input": evaluated["identity"], "base": evaluated["base"], "trained": evaluated["trained"]}
    count, epoch = min(8, len(run.held_out)), len(run.values["history"])
    figure = Figure(figsize=(1.5 * count + 1, 5.5), layout="constrained")
    figure.suptitle(run.title, fontsize=9)
    for (title, (images, rewards)), axes in zip(rows.items(), figure.subplots(3, count, squeeze=False)):
        for image, reward, axis in zip(to_pil(images), rewards, axes):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[], frame_on=False)
            axis.set_title(f"{reward:.4g}", fontsize=8)
        axes[0].set_ylabel(f"{title}\nmean {rewards.mean():.4g}")
    path = Path(run.args.output_dir, "samples", f"epoch-{epoch:04d}.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"held-out": np.array(Image.open(path).convert("RGB"))[None]}, step=epoch, **options)


def verdict(row: dict) -> str:
    """What the LoRA lost to on held-out images, if anything, by a row of metrics."""
    trained = row.get("heldout_trained", math.inf)
    lost = {"the input left alone": row.get("heldout_identity", 0), "the base model": row.get("heldout_base", 0)}
    lost = " and ".join(f"{text} ({value:.4g})" for text, value in lost.items() if trained <= value)
    return f"On held-out images the LoRA ({trained:.4g}) does not beat {lost}." if lost else ""


def write_model_card(run: DDPOTrainer, repo_id: str) -> None:
    """README.md: what was trained on which reward, held-out results, pictures, and how to use it."""
    args, row = run.args, run.values["history"][-1]
    held_out = {name.removeprefix("heldout_"): value for name, value in row.items() if name.startswith("heldout_")}
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in held_out.items())
    table = table.replace("best_of_k_base", f"base, best of {args.group_size} draws")
    picture = f"![input, base and trained](samples/epoch-{row['epoch']:04d}.png)" if held_out else "None was held out."
    kinds = {name: name.partition("(")[0] for name in run.rewards}
    units = "\n".join(f"{x}: {REWARDS[y].__doc__.partition('. ')[0]}" for x, y in kinds.items() if y in REWARDS)
    base, dataset = args.pretrained_model_name_or_path, args.dataset_name or "."
    base, dataset = (None if Path(source).exists() else source for source in (base, dataset))  # no local paths
    data = {"base_model": base, "datasets": dataset, "license": "creativeml-openrail-m", "inference": True}
    tags = "stable-diffusion stable-diffusion-diffusers image-to-image diffusers diffusers-training lora ddpo"
    call = {name: getattr(args, name) for name in ("strength", "num_inference_steps", "guidance_scale")}
    call, schedule = (", ".join(f"{name}={value}" for name, value in x.items()) for x in (call, SCHEDULER))
    card = f"""---
{huggingface_hub.ModelCardData(library_name="diffusers", tags=tags.split(), **data).to_yaml()}
---

# {repo_id}

A LoRA for image-to-image Stable Diffusion, trained with DDPO (`{args.algorithm}`) for {row["epoch"]} epochs of
{args.samples_per_epoch} samples on the reward `{run.title}`; all settings are in args.json.
{units}

| held-out images | mean reward |
|---|---|
{table}

identity: the input left alone; base: the model without this LoRA, and the best of several draws of it, which is what
choosing gives in place of training; trained: with this LoRA. {verdict(row)}

{picture}
![reward curve](reward_curve.png)

```python
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image
pipe = StableDiffusionImg2ImgPipeline.from_pretrained("{base or "path/to/the/base/model"}").to("cuda")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {schedule})
pipe.load_lora_weights("{repo_id if args.push_to_hub else "path/to/this/folder"}")
image = load_image("input.png").resize(({args.resolution}, {args.resolution}))
image = pipe({("a caption" if args.prompt is None else args.prompt)!r}, image, {call}).images[0]
```
"""
    Path(args.output_dir, "README.md").write_text(card, encoding="utf-8")


# ---- Main -----------------------------------------------------------------------------------------------------------
def describe(run: DDPOTrainer) -> str:
    """The run in plain words."""
    args, accelerator, steps, samples = run.args, run.accelerator, len(run.timesteps), run.args.samples_per_epoch
    guidance, groups = 1 + (args.guidance_scale > 1), samples // args.group_size
    transitions = samples * run.window_size
    # steps that a group computes once, on average over the places of the window
    shared = 0 if args.independent_start_noise else (run.trainable - run.window_size + 2) / 2
    sampling = guidance * (groups * shared + samples * (steps - shared))
    training = guidance * TRAINED_ROW_COST * transitions * args.num_inner_epochs
    updates, each = args.updates_per_epoch * args.num_inner_epochs, transitions // args.updates_per_epoch
    prompts = args.prompt or "none: no --prompt, no --caption_column and no column text"
    prompts = f"of column {args.caption_column}" if args.prompt is None else prompts
    return f"""
  run      {args.algorithm} on {run.title}
  device   {accelerator.num_processes} process(es) on {accelerator.device}, precision {args.mixed_precision}
  images   {len(run.train_data)} to train on, {len(run.held_out)} held out, at {args.resolution} px
  columns  {", ".join(run.train_data.column_names)}; input images in {args.image_column}
  prompts  {prompts}; guidance {args.guidance_scale}
  epoch    {samples} samples: {groups} groups of {args.group_size} of one image and prompt
  steps    {steps} run, {steps - run.trainable} in the untrained tail; stochastic and trained: {run.window_size}, drawn
  updates  {updates} per epoch, each on {each} transitions; clip range {args.clip_range:.2e}
  LoRA     {sum(p.numel() for p in run.lora):,} trainable parameters, rank {args.rank}, in {args.lora_layers}
  cost     about {sampling + training:,.0f} UNet evaluations per epoch, {training:,.0f} in training (3 per trained row)
"""


def report(args: argparse.Namespace, metrics: dict, seconds: list[float]) -> str:
    """An epoch in a line, and what its metrics say is wrong with the settings, with the remedy."""
    line = "epoch {epoch}: reward {reward_mean:.4g} +- {reward_std:.3g}"
    if "heldout_trained" in metrics:
        line += ", held-out {heldout_trained:.4g} (identity {heldout_identity:.4g}, base {heldout_base:.4g})"
    line = line.format(**metrics)
    line += "".join(f", {x.partition('/')[2]} {metrics[x]:.4g}" for x in metrics if x.startswith("reward_mean/"))
    left = (args.num_train_epochs - metrics["epoch"]) * sum(seconds) / len(seconds)
    line += f", {seconds[-1]:.1f} s, {timedelta(seconds=round(left))} left"
    if len(seconds) == 1 and torch.cuda.is_available():
        used, there = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
        line += f", at most {used / 2**30:.1f} of {there / 2**30:.1f} GiB of GPU memory"
    flat = metrics["reward_group_std" if args.advantage == "group" else "reward_std"] == 0
    rounding, kl = metrics["ratio_deviation_start"], metrics["kl_old"]
    warnings = {
        "rewards that are compared are equal, nothing was learnt: raise --group_size, or use a finer reward": flat,
        f"rounding moves ratios by {rounding:.1e} before any update, more than --clip_range={args.clip_range:.1e}: use"
        " --mixed_precision=no, or fp16 instead of bf16": rounding > args.clip_range,
        f"an epoch moves the policy by {kl:.3g} nats per step: lower --learning_rate": kl > 10,
    }
    return line + "".join(f"\nWarning: {text}." for text, wrong in warnings.items() if wrong)


def main(argv: list[str] | None = None) -> None:
    """The table of contents."""
    # 1. What people get wrong is found before a model loads
    args = parse_args(argv)
    scratch = tempfile.TemporaryDirectory()  # deleted at the end
    args.output_dir = scratch.name if args.dry_run else args.output_dir
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.dry_run or args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # a reward may be slow on one rank
    )
    args.mixed_precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu" and args.demo:
        torch.set_num_threads(1)  # on a model this small several threads only wait for each other
    if accelerator.device.type == "cpu" and args.mixed_precision == "fp16":
        accelerator.print("Warning: fp16 is slow and loses small gradients on a CPU: use --mixed_precision=no.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    train_data, held_out = load_data(args)
    splits = [data for data in (train_data, held_out) if len(data)]
    names = [re.sub(r"^[^(]*/", "", spec) if ".py:" in spec else spec for spec in args.reward_fn]  # without folders
    rewards = {name: load_reward(spec, splits) for name, spec in zip(names, args.reward_fn)}
    if len(rewards) < len(names):
        raise SystemExit(f"error: --reward_fn={args.reward_fn} has two of one name: rename one.")
    for data in splits:
        images, prompts, metadata = zip(*(load_row(args, data, i) for i in range(min(2, len(data)))))
        try:
            images = torch.stack(images).to(accelerator.device)
            check_finite(compute_rewards(rewards, images, prompts, metadata)[0], list(rewards))
        except Exception as e:
            place = traceback.extract_tb(e.__traceback__)[-1]
            told = f"{type(e).__name__}: {e} ({place.filename}, line {place.lineno})"
            raise SystemExit(f"error: --reward_fn={args.reward_fn} cannot score the images: {told}") from None
    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and not args.dry_run and accelerator.is_main_process:
        repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True).repo_id
        huggingface_hub.auth_check(repo_id, write=True)

    # 2. Model, LoRA, optimizer; a checkpoint
    run = DDPOTrainer(args, accelerator, rewards, train_data, held_out)
    state = read_checkpoint(args) if args.resume_from_checkpoint and accelerator.is_main_process else None
    (state,) = broadcast_object_list([state])
    if state is not None:
        run.load_checkpoint(state)
        accelerator.print(f"Continuing from checkpoint-{len(run.values['history'])}.")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
    accelerator.init_trackers("img2img-ddpo", settings)
    accelerator.print(describe(run))

    # 3. Epochs: rollout, rewards, advantages, updates; evaluation; a checkpoint
    seconds, history, epochs = [], run.values["history"], 1 if args.dry_run else args.num_train_epochs
    try:
        for epoch in range(len(history), epochs):
            began, last = time.monotonic(), epoch + 1 == epochs
            history.append(run.run_epoch(epoch))
            seconds.append(time.monotonic() - began)
            if accelerator.is_main_process:  # the others wait in the next rollout
                if len(held_out) and (last or (epoch + 1) % args.validation_epochs == 0):
                    history[-1] |= run.validate()
                accelerator.log(history[-1], step=epoch + 1)
                pd.DataFrame(history).to_csv(output_dir / "metrics.csv", index=False)
                if last or (epoch + 1) % args.checkpointing_epochs == 0:
                    run.save_checkpoint()
                print(report(args, history[-1], seconds))

        # 4. The result
        if accelerator.is_main_process:
            run.save_lora(output_dir)
            write_reward_curve(run)
            write_model_card(run, repo_id)
            print("Dry run passed." if args.dry_run else f"Done: {output_dir / LORA}\n{verdict(history[-1])}")
            if args.push_to_hub and not args.dry_run:
                upload = {"repo_id": repo_id, "folder_path": output_dir, "ignore_patterns": ["checkpoint*", "logs/*"]}
                print(f"Uploaded to {huggingface_hub.upload_folder(**upload).repo_url}.")
    except (Exception, KeyboardInterrupt) as e:
        if not isinstance(e, KeyboardInterrupt):
            traceback.print_exception(e, limit=-3, chain=False)
        if isinstance(e, torch.cuda.OutOfMemoryError):
            print("Lower --train_batch_size, --sample_batch_size; add --gradient_checkpointing; lower --resolution.")
        saved = [path.name for path in list_checkpoints(output_dir)]
        hint = f"{saved[0]} is saved: add --resume_from_checkpoint=latest to continue." if saved else "Nothing saved."
        raise SystemExit(f"Stopped. {hint}") from None
    accelerator.end_training()


if __name__ == "__main__":
    main()
