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

The bundled demo, no download, about two minutes on one CPU core:

    accelerate launch train_img2img_ddpo.py --demo

Stable Diffusion 1.5 on your own folder of images (with metadata.jsonl), on one GPU:

    accelerate launch --mixed_precision=fp16 train_img2img_ddpo.py \
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir=my_images --reward_fn=my_reward.py:reward --output_dir=my-lora

The file is in the order of one epoch: data -> groups -> rollout -> rewards -> advantages -> objective -> update ->
evaluation -> checkpoint -> Hub. `main` calls those stages. The mathematics of a denoising step are in
pipeline_img2img_ddpo.py.
"""

import os


# Asked before the other imports, which take seconds in which the launcher may be ended: see `Ranks.watch`
LAUNCHER = os.getppid()

import argparse
import atexit
import base64
import copy
import csv
import gc
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import diffusers
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.training_utils import EMAModel, _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
)

from pipeline_img2img_ddpo import (
    StableDiffusionImg2ImgDDPOPipeline,
    ddim_transition,
    gaussian_log_prob,
    predict_noise,
)


# DDPO's clip range of 1e-4 at 512 px bounds a step's KL to this many nats, with its 16384 latent elements
TRUST_REGION_NATS = 1.34
# Steps to a latent with less noise variance than this are the tail: the log-probability is 3 to 8 times as sensitive
# to the UNet there as elsewhere, so that they would dominate the gradient
TAIL_VARIANCE = 0.01
# Relative importance of a training row to a sampling row, in UNet forwards: a forward and a backward
TRAIN_ROW_COST = 3
RATIO_TOLERANCE = 1e-5
# Fitting SAC's critic, per epoch
CRITIC_LEARNING_RATE, CRITIC_PASSES, CRITIC_UPDATES_PER_PASS, CRITIC_POLYAK = 1e-3, 24, 4, 0.05
LORA = "pytorch_lora_weights.safetensors"
RESULTS = (LORA, "README.md", "metrics.csv", "reward_curve.png", "args.json")
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "comet_ml": ("comet_ml",)}

DEMO_FOLDER = Path(__file__).resolve().parent / "tests" / "demo"
DEMO = {
    "pretrained_model_name_or_path": str(DEMO_FOLDER / "model"),
    "train_data_dir": str(DEMO_FOLDER / "images"),
    "output_dir": "img2img-ddpo-demo",
    "resolution": 64,
    "reward_fn": "psnr:target",
    "strength": 0.5,
    "num_inference_steps": 16,
    "guidance_scale": 1.0,
    "learning_rate": 2e-3,
    "rank": 8,
    "num_train_epochs": 40,
    "samples_per_epoch": 48,
    "group_size": 8,
    "sample_batch_size": 48,
    "train_batch_size": 48,
    "validation_epochs": 10,
    "checkpointing_epochs": 10,
}


class InputError(Exception):
    """A mistake in the command line, the data or the reward, told without a traceback."""


class Interrupted(Exception):
    """A signal asked all ranks to stop."""


STOPPING = threading.Event()  # then nothing is tried again


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without data or model; `--demo` and `--dry_run` filled in."""
    schedules = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument

    add("--demo", action="store_true",
        help="Train on the bundled tiny model and images: fills in every option that you do not give.")
    add("--dry_run", action="store_true",
        help="Check everything and run one image, one reward and one update; writes nothing to --output_dir.")

    add("--pretrained_model_name_or_path", type=str, default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        help="Stable Diffusion 1.x or 2.x: a Hub id or a local folder.")
    add("--revision", type=str, default=None, help="Revision of the model on the Hub.")
    add("--variant", type=str, default=None, help="Variant of the model's files, such as fp16.")
    add("--dataset_name", type=str, default=None,
        help="Dataset on the Hub, or a local folder that `load_dataset` or `load_from_disk` reads.")
    add("--dataset_config_name", type=str, default=None, help="Configuration of the dataset.")
    add("--train_data_dir", type=str, default=None,
        help="Local folder of images, with metadata.jsonl for captions and other columns; a split folder `validation` "
        "or `test` is held out.")
    add("--image_column", type=str, default="image", help="Column with the input images.")
    add("--caption_column", type=str, default=None,
        help="Column with the prompts. Default: `text` if there is one, else the null prompt.")
    add("--prompt", type=str, default=None,
        help="One prompt for every image, instead of captions; \"\" is the null prompt.")
    add("--max_train_samples", type=int, default=None, help="Use only the first this many training images.")
    add("--resolution", type=int, default=512,
        help="Images are resized to this many pixels at their shorter side and cropped square.")
    add("--center_crop", action="store_true",
        help="Crop the middle. Default: a place drawn once per image. Held-out images are always cropped in the "
        "middle.")
    add("--random_flip", action="store_true", help="Flip half of the groups' images horizontally.")
    add("--output_dir", type=str, default="img2img-ddpo-lora",
        help="Folder for the LoRA, metrics, pictures and checkpoints.")
    add("--overwrite_output_dir", action="store_true", help="Delete what an earlier run left in --output_dir.")
    add("--cache_dir", type=str, default=None, help="Where downloads are kept.")
    add("--seed", type=int, default=0, help="Seed of everything that is drawn.")

    add("--strength", "--noise_strength", type=float, default=0.4,
        help="How far the input is noised, in (0, 1]: int(num_inference_steps * strength) steps are run.")
    add("--num_inference_steps", type=int, default=50, help="Denoising steps of a full trajectory (strength 1).")
    add("--guidance_scale", type=float, default=5.0,
        help="Classifier-free guidance, in sampling and training alike; 1 or less turns it off. A null prompt turns "
        "it off.")
    add("--guidance_rescale", type=float, default=0.0, help="Rescaling of the guided prediction, in [0, 1].")
    add("--eta", type=float, default=1.0, help="Noise of the stochastic steps, in (0, 1]: 1 is DDPM's.")
    add("--reward_fn", type=str, default="jpeg_compressibility",
        help="Reward: NAME, NAME:ARGUMENT:option=value, path/to/file.py:function, http://host/path, or several with "
        "weights, a=1.0,b=0.5.")
    add("--reward_batch_size", type=int, default=8,
        help="Images that a reward model scores, or that go to a reward server, at once (per device). Memory and "
        "speed only.")
    add("--reward_timeout", type=float, default=60.0,
        help="Seconds to wait for an answer of a reward server or a vision-language judge, asked up to 5 times.")
    add("--algorithm", choices=["ppo", "reinforce", "trpo", "sac"], default="ppo", help="Policy objective.")
    add("--samples_per_epoch", type=int, default=64, help="Images sampled per epoch (global).")
    add("--group_size", type=int, default=8, help="Samples of each (image, prompt) that are compared with each other.")
    add("--sample_batch_size", type=int, default=8,
        help="Samples denoised at once (per device). Memory and speed only.")
    add("--train_batch_size", type=int, default=4,
        help="Transitions replayed at once (per device). Memory and speed only.")
    add("--updates_per_epoch", type=int, default=None,
        help="Optimizer updates per pass over an epoch's transitions (global). Default: 2; 1 for reinforce.")
    add("--num_inner_epochs", type=int, default=1, help="Passes over an epoch's transitions.")
    add("--sde_window", type=int, default=1,
        help="Stochastic, trained steps per group, at a place drawn per group; the others are deterministic. 0: every "
        "step is stochastic and trained, as in DDPO.")
    add("--independent_start_noise", action="store_true",
        help="Start the samples of a group from different noise, as plain DDPO does; their first steps are then not "
        "shared.")
    add("--train_tail", action="store_true",
        help="Also make the last, nearly noise-free steps stochastic and train them, as plain DDPO does.")
    add("--advantage", choices=["group", "tracker", "batch"], default="group",
        help="Baseline: the group's mean, a running mean per (image, prompt), or the epoch's mean.")
    add("--clip_range", type=float, default=None,
        help="PPO's clip range of the ratio. Default: sqrt(2 * 1.34) / latent elements, which is DDPO's 1e-4 at 512 "
        "px.")
    add("--target_kl", type=float, default=None, help="TRPO's bound of the KL per step, in nats. Default: 0.1.")
    add("--kl_coef", type=float, default=None,
        help="Weight of the KL to the model without LoRA, in standard deviations of reward per nat and step. Default: "
        "0; 0.001 for sac.")
    add("--ema_decay", type=float, default=0.0,
        help="Decay of the moving average of the LoRA that is evaluated and saved; 0 is off.")

    add("--num_train_epochs", type=int, default=50, help="Epochs; one is a rollout and its updates.")
    add("--gradient_checkpointing", action="store_true", help="Save memory, for about a third more time in training.")
    add("--learning_rate", type=float, default=3e-4, help="Learning rate.")
    add("--lr_scheduler", choices=schedules, default="constant",
        help="Learning rate schedule over the optimizer's updates.")
    add("--lr_warmup_steps", type=int, default=0, help="Updates over which the learning rate rises.")
    add("--use_8bit_adam", action="store_true", help="8-bit Adam of bitsandbytes.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs.")
    add("--adam_beta1", type=float, default=0.9, help="Adam's beta1.")
    add("--adam_beta2", type=float, default=0.999, help="Adam's beta2.")
    add("--adam_weight_decay", type=float, default=1e-4, help="Weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon.")
    add("--max_grad_norm", type=float, default=1.0, help="The gradient's norm is clipped to this.")
    add("--rank", type=int, default=4, help="Rank of the LoRA.")
    add("--lora_alpha", type=int, default=None, help="Scale of the LoRA times its rank. Default: the rank.")
    add("--lora_layers", type=str, default="to_k,to_q,to_v,to_out.0",
        help="UNet modules that get a LoRA, separated by commas.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default=None,
        help="Precision of the frozen models; the LoRA is float32. Default: accelerate's configuration.")
    add("--report_to", choices=list(TRACKERS), default=None,
        help="Tracker of metrics and held-out pictures. metrics.csv is always written.")
    add("--logging_dir", type=str, default="logs", help="Folder of the trackers' files, in --output_dir.")
    add("--checkpointing_epochs", type=int, default=1, help="Epochs between checkpoints.")
    add("--checkpoints_total_limit", type=int, default=2, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", type=str, default=None, help="A folder checkpoint-N of --output_dir, or `latest`.")
    add("--validation_epochs", type=int, default=5, help="Epochs between evaluations on held-out images.")
    add("--num_validation_images", type=int, default=8,
        help="Held-out images: of the split `validation` or `test`, else the last of the training data. 0: none.")
    add("--push_to_hub", action="store_true", help="Upload the result to the Hub.")
    add("--hub_model_id", type=str, default=None, help="Repository to upload to. Default: the name of --output_dir.")
    add("--hub_token", type=str, default=None,
        help="Token of the Hub. Default: the one you are logged in with, or HF_TOKEN, which is safer: others on the "
        "machine see your command line, and `accelerate launch` prints it when the script fails.")
    # fmt: on

    if parser.parse_known_args(argv)[0].demo:
        if not DEMO_FOLDER.is_dir():
            parser.error(f"--demo: {DEMO_FOLDER} is missing; it comes with the repository, not with the script alone.")
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.updates_per_epoch is None:
        args.updates_per_epoch = 1 if args.algorithm == "reinforce" else 2
    if args.kl_coef is None:
        args.kl_coef = 0.001 if args.algorithm == "sac" else 0.0
    check_args(args)
    args.output_dir = os.path.abspath(args.output_dir)  # a reward may change the working directory
    if args.target_kl is None:
        args.target_kl = 0.1
    if args.dry_run:
        args.samples_per_epoch, args.updates_per_epoch, args.num_train_epochs = args.group_size, 1, 1
        args.num_validation_images = 0
        args.resume_from_checkpoint = args.report_to = None
        args.push_to_hub = False
        args.output_dir = tempfile.gettempdir()
        if int(os.environ.get("RANK", 0)) == 0:  # which alone writes there
            args.output_dir = tempfile.mkdtemp(prefix="img2img-ddpo-dry-run-")
            atexit.register(shutil.rmtree, args.output_dir, ignore_errors=True)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises an `InputError` that names the flag, the value and the remedy."""
    check_ranges(args)
    check_sizes(args)
    check_contradictions(args)
    check_places(args)
    check_output_dir(args)


def check_ranges(args: argparse.Namespace) -> None:
    """Each number by itself."""
    positive = (
        "num_inference_steps resolution samples_per_epoch group_size sample_batch_size train_batch_size"
        " updates_per_epoch num_inner_epochs num_train_epochs learning_rate rank lora_alpha max_grad_norm"
        " checkpointing_epochs checkpoints_total_limit validation_epochs reward_batch_size reward_timeout"
    )
    for name in positive.split():
        if not getattr(args, name) > 0:
            raise InputError(f"--{name}={getattr(args, name)} must be greater than 0.")
    not_negative = "seed sde_window kl_coef num_validation_images lr_warmup_steps adam_weight_decay guidance_scale"
    for name in not_negative.split():
        if getattr(args, name) < 0:
            raise InputError(f"--{name}={getattr(args, name)} must not be negative.")
    for name in ("strength", "eta"):
        if not 0 < getattr(args, name) <= 1:
            raise InputError(f"--{name}={getattr(args, name)} must be in (0, 1].")
    if not 0 <= args.guidance_rescale <= 1 or not 0 <= args.ema_decay < 1:
        raise InputError(
            f"--guidance_rescale={args.guidance_rescale} must be in [0, 1], --ema_decay={args.ema_decay} in [0, 1)."
        )
    for name in ("clip_range", "target_kl"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name}={getattr(args, name)} must be greater than 0.")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise InputError(f"--max_train_samples={args.max_train_samples} must be at least 1.")


def check_sizes(args: argparse.Namespace) -> None:
    """Numbers that must fit together."""
    steps = int(args.num_inference_steps * args.strength)
    if steps == 0:
        raise InputError(
            f"--num_inference_steps={args.num_inference_steps} with --strength={args.strength} leaves"
            f" int({args.num_inference_steps} * {args.strength}) = 0 denoising steps: raise one of them."
        )
    if args.sde_window > steps:
        raise InputError(
            f"--sde_window={args.sde_window} is more than the {steps} steps that are run"
            f" (--num_inference_steps={args.num_inference_steps} times --strength={args.strength}): lower it."
        )
    if args.resolution % 8:
        raise InputError(f"--resolution={args.resolution} must be divisible by 8: try {args.resolution // 8 * 8}.")
    if args.samples_per_epoch % args.group_size:
        raise InputError(
            f"--samples_per_epoch={args.samples_per_epoch} is not divisible by --group_size={args.group_size}: try"
            f" --samples_per_epoch={math.ceil(args.samples_per_epoch / args.group_size) * args.group_size}."
        )


def check_contradictions(args: argparse.Namespace) -> None:
    """An option is honoured or refused: those that would do nothing, or the opposite of another one."""
    if args.algorithm == "reinforce" and args.updates_per_epoch * args.num_inner_epochs > 1:
        raise InputError(
            "--algorithm=reinforce is on-policy: one update per rollout. Drop --updates_per_epoch and"
            " --num_inner_epochs, or use --algorithm=ppo, whose ratio corrects for later updates."
        )
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise InputError(
            f"--lr_warmup_steps={args.lr_warmup_steps} does nothing with --lr_scheduler=constant: use"
            " --lr_scheduler=constant_with_warmup."
        )
    if args.clip_range is not None and args.algorithm != "ppo":
        raise InputError(f"--clip_range={args.clip_range} is ppo's: drop it with --algorithm={args.algorithm}.")
    if args.target_kl is not None and args.algorithm != "trpo":
        raise InputError(f"--target_kl={args.target_kl} is trpo's: drop it with --algorithm={args.algorithm}.")
    if args.guidance_rescale and args.guidance_scale <= 1:
        raise InputError(
            f"--guidance_rescale={args.guidance_rescale} does nothing without guidance: drop it, or raise"
            f" --guidance_scale={args.guidance_scale}."
        )
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise InputError("--overwrite_output_dir deletes what --resume_from_checkpoint continues: give one of them.")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise InputError("--hub_token with --report_to=wandb would be stored there: log in with `hf auth login`.")
    if args.dataset_config_name is not None and args.dataset_name is None:
        raise InputError(f"--dataset_config_name={args.dataset_config_name} needs --dataset_name.")
    if args.prompt is not None and args.caption_column is not None:
        raise InputError("--prompt is one prompt for every image, --caption_column one for each: give one of them.")


def check_places(args: argparse.Namespace) -> None:
    """Folders and packages."""
    if args.dataset_name is None and args.train_data_dir is None:
        raise InputError("No images: give --dataset_name or --train_data_dir, or try --demo.")
    if args.dataset_name is not None and args.train_data_dir is not None:
        raise InputError("--dataset_name and --train_data_dir are two sources of images: give one.")
    logging_dir = Path(args.logging_dir)
    if logging_dir.is_absolute() or ".." in logging_dir.parts or not logging_dir.parts:
        raise InputError(f"--logging_dir={args.logging_dir} must be the name of a folder in --output_dir.")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    if args.report_to is not None and not any(importlib.util.find_spec(name) for name in TRACKERS[args.report_to]):
        raise InputError(f"--report_to={args.report_to} needs a package: pip install {TRACKERS[args.report_to][0]}.")
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise InputError(f"--train_data_dir={args.train_data_dir} is not a folder.")
    for name in ("train_data_dir", "dataset_name"):
        source = Path(getattr(args, name) or "no such folder").resolve()
        if source.is_dir() and Path(args.output_dir).resolve().is_relative_to(source):
            raise InputError(
                f"--output_dir={args.output_dir} is in --{name}={getattr(args, name)}, where its pictures would be"
                " trained on: choose another one."
            )


def check_output_dir(args: argparse.Namespace) -> None:
    """A folder that can be written, and that holds nothing which would be overwritten unasked."""
    if int(os.environ.get("RANK", 0)) != 0:  # the main process looks, and ends all if it does not like what it sees
        return
    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        raise InputError(f"--output_dir={output_dir} is a file: name a folder.")
    leftovers = output_dir.is_dir() and any(output_dir.iterdir())
    if leftovers and not (args.resume_from_checkpoint or args.overwrite_output_dir or args.dry_run):
        raise InputError(
            f"--output_dir={output_dir} is not empty. Continue that run with --resume_from_checkpoint=latest, delete"
            " it with --overwrite_output_dir, or choose another folder."
        )
    if not args.dry_run:
        missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"--output_dir={output_dir} cannot be made ({e}): choose another folder.") from e
        writable = os.access(output_dir, os.W_OK | os.X_OK)
        for folder in missing:  # a run that is refused leaves nothing behind
            with suppress(OSError):  # another run may have begun to use it
                folder.rmdir()
        if not writable:
            raise InputError(f"--output_dir={output_dir} cannot be written to: choose another folder.")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: what happens on one happens on all
# ---------------------------------------------------------------------------------------------------------------------


class Ranks:
    """
    Lets signals and failures of one rank stop all of them at the same place.

    Work is done in stages without collectives inside. At a stage's end the ranks tell each other how it went, and if
    one failed or was signalled, all raise. `poll`, called at every denoising step and micro-batch, makes the wait
    short.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup or Windows
        SIGNALS += (signal.SIGHUP,)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal = None  # what all ranks were asked to stop by
        self.received = None  # when this process got its first signal
        self.graceful = False  # before training there is nothing to save: a signal ends the process at once
        self.leaving = False  # this rank stops early
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()  # both set by a launcher
        self.launcher = LAUNCHER if launched else 0
        self.store = None
        if accelerator.num_processes > 1:
            self.store = torch.distributed.distributed_c10d._get_default_store()
        # Python's handlers run in the main thread only, which may be waiting for another rank or loading a model. The
        # interpreter also writes the number to this socket, and that wakes the watching thread at once
        self.inbox, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno())
        for number in self.SIGNALS:
            signal.signal(number, self.ignore)
        # A process that a reward forks may be sent a signal before it has run a line: it must not reach our socket
        if hasattr(os, "register_at_fork"):  # Windows does not fork
            os.register_at_fork(
                before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, self.SIGNALS),
                after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, self.SIGNALS),
                after_in_child=self.leave,
            )
        threading.Thread(target=self.watch, daemon=True).start()

    def ignore(self, number: int, frame) -> None:
        """The handler in the main thread: `watch` does the work."""

    def leave(self) -> None:
        """In a forked process: a signal to it is no signal to the run."""
        signal.set_wakeup_fd(-1)
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def watch(self) -> None:
        """Thread: heeds signals, and the end of the launcher, which may be killed without a word to its processes."""
        while True:
            if self.launcher and os.getppid() != self.launcher:
                self.launcher = 0
                self.stop(signal.SIGTERM)
            if self.leaving and self.store is not None and self.accelerator.is_main_process:
                with suppress(torch.distributed.DistError):  # the store is the launcher's
                    self.store.add("img2img_ddpo/saving", 1)
            if select.select([self.inbox], [], [], 0.5)[0]:
                for number in self.inbox.recv(64):
                    if number in self.SIGNALS:
                        self.receive(number)

    def receive(self, number: int) -> None:
        """The first signal asks to stop, a later one exits at once (launchers send one twice in a row)."""
        if self.received is not None and time.monotonic() - self.received > 1:
            os._exit(128 + number)
        self.received = self.received or time.monotonic()
        self.stop(number)

    def stop(self, number: int) -> None:
        """Asks all ranks to stop."""
        if not self.graceful:
            os._exit(128 + number)
        self.signal = self.signal or number
        if self.store is not None:
            try:
                self.store.set("img2img_ddpo/stop", str(int(self.signal)))
            except torch.distributed.DistError:  # the launcher kept the store and is gone: all ranks notice that
                pass

    def poll(self) -> None:
        """Raises `Interrupted` if this rank, another one or the launcher was told to stop."""
        if self.signal is None and self.store is not None:
            try:
                if self.store.check(["img2img_ddpo/stop"]):
                    self.signal = int(self.store.get("img2img_ddpo/stop"))
            except torch.distributed.DistError:
                self.signal = signal.SIGTERM
        if self.signal is not None:
            STOPPING.set()
            raise Interrupted()

    def poll_callback(self, pipeline, step: int, timestep: int, callback_kwargs: dict) -> dict:
        """`poll` in the form of diffusers' `callback_on_step_end`."""
        self.poll()
        return {}

    @contextmanager
    def stage(self, name: str):
        """Runs local work, then raises on all ranks what any of them raised, with the same message."""
        error = None
        try:
            yield
            self.poll()
        except BaseException as e:  # a reward may call sys.exit or raise KeyboardInterrupt
            error = e
        told = (
            None
            if error is None
            else (isinstance(error, Interrupted), f"{type(error).__name__}: {error}", self.signal)
        )
        outcomes = list(enumerate(gather_object([told])))
        failures = [(rank, outcome) for rank, outcome in outcomes if outcome is not None and not outcome[0]]
        if failures:
            rank, (_, message, _) = failures[0]
            where = f" on rank {rank}" if self.accelerator.num_processes > 1 else ""
            raise RuntimeError(f"{name} failed{where}: {message}") from error
        interrupts = [outcome[2] for _, outcome in outcomes if outcome is not None]
        if interrupts:
            self.signal = self.signal or interrupts[0]
            raise Interrupted() from error

    def wait_for_main(self) -> None:
        """
        Before leaving early: lets the main process finish saving, for a launcher ends all ranks as soon as one has
        left.

        No collective, because after an error the ranks may not be at the same place.
        """
        if self.store is None:
            return
        last, since = None, time.monotonic()
        with suppress(torch.distributed.DistError):  # the launcher is gone: nothing to wait for
            if self.accelerator.is_main_process:
                self.store.set("img2img_ddpo/saved", "")
            while not self.store.check(["img2img_ddpo/saved"]) and time.monotonic() - since < 5:
                beat = self.store.add("img2img_ddpo/saving", 0)
                if beat != last:  # `watch` counts it up, unless the main process is gone, or waits for this one
                    last, since = beat, time.monotonic()
                time.sleep(0.1)

    def limit_exit(self, seconds: float) -> None:
        """Ends the process after that time if a reward call, which Python waits for when it leaves, still runs."""
        timer = threading.Timer(seconds, os._exit, [128 + self.signal])
        timer.daemon = True
        timer.start()

    def share(self, count: int) -> range:
        """This rank's part of `count` jobs: contiguous, and empty if there are too few."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        return range(count * rank // ranks, count * (rank + 1) // ranks)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks. Ranks fill in their own places of a zero tensor, which makes it an exact gather."""
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")


def seeded(*path: int | str) -> torch.Generator:
    """A CPU generator, a function of `path`, such as `(seed, "noise", epoch, sample)`: not of rank or history."""
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in path]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


# ---------------------------------------------------------------------------------------------------------------------
# Data: dataset rows -> images, prompts, metadata
# ---------------------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: upright by its EXIF tag, transparency on white, 16 bits scaled down."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL would clip 16 bits to 8 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImagePrompts:
    """Rows of a `datasets.Dataset` as images, prompts and metadata, cut to size in the same way."""

    def __init__(self, dataset: datasets.Dataset, args: argparse.Namespace, center_crop: bool):
        self.image_columns = [c for c, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        for column in self.image_columns:  # decoded here, so that an unreadable file can be named
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.image_column, self.resolution = dataset, args.image_column, args.resolution
        self.center_crop, self.seed = center_crop, args.seed
        captions = [args.prompt] * len(dataset) if args.caption_column is None else dataset[args.caption_column]
        # of several captions the first, so that groups of different epochs stay comparable
        self.prompts = [(c[0] if c else "") if isinstance(c, list) else c or "" for c in captions]

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, column: str, value: dict) -> Image.Image:
        """Decodes one cell of an image column to RGB; an `InputError` names the file."""
        try:
            with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as image:
                return to_rgb(image)
        except Exception as e:
            raise InputError(f"Column {column!r}: cannot read image {value['path'] or '(no path)'}: {e}") from e

    def cut(self, image: Image.Image, place: tuple[float, float], flip: bool) -> torch.Tensor:
        """Resizes the shorter side to the resolution and crops a square: `(3, H, W)` float32 in [0, 1]."""
        scale = self.resolution / min(image.size)
        if scale != 1:
            size = tuple(max(self.resolution, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.LANCZOS)
        left, top = (round((side - self.resolution) * p) for side, p in zip(image.size, place))
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def load(self, index: int, flip: bool = False) -> tuple[torch.Tensor, str, dict]:
        """The init image `(3, H, W)` in [0, 1], its prompt, and the row's other columns (images cut alike)."""
        row = self.dataset[index]
        place = (0.5, 0.5)
        if not self.center_crop:
            place = tuple(torch.rand(2, generator=seeded(self.seed, "crop", index)).tolist())
        for column in self.image_columns:
            if row[column] is not None:
                row[column] = self.cut(self.open(column, row[column]), place, flip)
        image = row.pop(self.image_column)
        if image is None:
            raise InputError(f"--image_column={self.image_column}: row {index} has no image.")
        return image, self.prompts[index], {**row, "init_image": image}

    def digest_row(self, index: int) -> bytes:
        """A checksum of a row; decodes its images, for now is when an unreadable one should be found."""
        self.load(index)
        row = self.dataset[index]
        images = [row.pop(column) for column in self.image_columns]
        files = [image["bytes"] or Path(image["path"]).read_bytes() for image in images if image is not None]
        return hashlib.sha256(
            b"".join([json.dumps([self.prompts[index], row], default=str).encode(), *files])
        ).digest()

    def check(self) -> str:
        """Reads every row once. A checksum of all, which tells other data of the same size."""
        with ThreadPoolExecutor() as pool:  # images are not kept: those of a large dataset would not fit into memory
            return hashlib.sha256(b"".join(pool.map(self.digest_row, range(len(self))))).hexdigest()[:16]


def load_dataset_dict(args: argparse.Namespace) -> datasets.DatasetDict:
    """The splits of `--dataset_name` or `--train_data_dir`: from the Hub, an image folder or `save_to_disk`."""
    flag, source = (
        ("dataset_name", args.dataset_name) if args.dataset_name else ("train_data_dir", args.train_data_dir)
    )
    try:
        if Path(source, "dataset_dict.json").is_file() or Path(source, "state.json").is_file():
            if args.dataset_config_name is not None:
                raise ValueError(f"a saved dataset has no --dataset_config_name={args.dataset_config_name}")
            dataset = datasets.load_from_disk(source)
            dataset = datasets.DatasetDict(train=dataset) if isinstance(dataset, datasets.Dataset) else dataset
        elif args.train_data_dir:
            dataset = datasets.load_dataset("imagefolder", data_dir=source, cache_dir=args.cache_dir)
        else:
            dataset = datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
    except Exception as e:
        raise InputError(f"--{flag}={source}: no images could be loaded: {type(e).__name__}: {e}") from e
    if "train" not in dataset:
        raise InputError(f"--{flag}={source} has no split `train`; its splits are {', '.join(dataset)}.")
    return dataset


def check_split(dataset: datasets.Dataset, split: str, args: argparse.Namespace) -> None:
    """Raises an `InputError` if the image or caption column is missing or holds something else."""
    there = f"a column of the split {split}; there are {', '.join(dataset.column_names) or 'none'}."
    if args.image_column not in dataset.column_names:
        raise InputError(f"--image_column={args.image_column} is not {there}")
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        raise InputError(
            f"--image_column={args.image_column} holds {dataset.features[args.image_column]}, not images. In a folder"
            " of images, metadata.jsonl names the files of a column NAME as NAME_file_name."
        )
    if args.caption_column is not None and args.caption_column not in dataset.column_names:
        raise InputError(f"--caption_column={args.caption_column} is not {there}")
    feature = dataset.features.get(args.caption_column)
    feature = getattr(feature, "feature", feature)  # of a list of captions
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        raise InputError(f"--caption_column={args.caption_column} holds {feature}, not texts.")


def load_data(args: argparse.Namespace) -> tuple[ImagePrompts, ImagePrompts]:
    """Training and held-out rows, columns and images checked. Fills in what `args` says of captions and data."""
    splits = load_dataset_dict(args)
    train = splits["train"]
    check_split(train, "train", args)
    if args.prompt is None and args.caption_column is None:
        args.caption_column = "text" if "text" in train.column_names else None
        args.prompt = "" if args.caption_column is None else None
        check_split(train, "train", args)

    held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
    count = args.num_validation_images
    if held_out is None:
        if len(train) <= count:
            raise InputError(
                f"--num_validation_images={count} would hold out all {len(train)} images and leave none to train on:"
                " lower it, or add images or a split `validation`."
            )
        held_out = train.select(list(range(len(train) - count, len(train))))
        train = train.select(range(len(train) - count))
    held_out = held_out.select(list(range(min(count, len(held_out)))))
    check_split(held_out, "validation or test", args)
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
    if len(train) == 0:
        raise InputError("There are no training images.")
    train, held_out = ImagePrompts(train, args, args.center_crop), ImagePrompts(held_out, args, center_crop=True)
    args.training_images, args.training_data = len(train), train.check()  # a resumed run must have the same
    held_out.check()
    return train, held_out


class ConditionCache:
    """Latents of images and embeddings of prompts, each computed once in a run and kept on the CPU."""

    def __init__(self, pipe: StableDiffusionImg2ImgDDPOPipeline):
        self.pipe, self.image_latents, self.prompt_embeds = pipe, {}, {}

    @torch.no_grad()
    def latents(self, key: tuple, image: torch.Tensor) -> torch.Tensor:
        """`(1, C, h, w)` scaled latents of `image` `(3, H, W)` in [0, 1]: the mode of the VAE's posterior."""
        if key not in self.image_latents:
            vae = self.pipe.vae
            pixels = self.pipe.image_processor.preprocess(image[None]).to(vae.device, vae.dtype)
            latents = retrieve_latents(vae.encode(pixels), sample_mode="argmax") * vae.config.scaling_factor
            self.image_latents[key] = latents.cpu()
        return self.image_latents[key].to(self.pipe.device)

    @torch.no_grad()
    def embeds(self, prompt: str) -> torch.Tensor:
        """`(1, L, E)` embedding of `prompt`."""
        if prompt not in self.prompt_embeds:
            embeds, _ = self.pipe.encode_prompt(prompt, self.pipe.device, 1, do_classifier_free_guidance=False)
            self.prompt_embeds[prompt] = embeds.cpu()
        return self.prompt_embeds[prompt].to(self.pipe.device)

    def negative_embeds(self, count: int, args: argparse.Namespace) -> torch.Tensor | None:
        """`(count, L, E)` embeddings of the null prompt, or None if guidance is off."""
        return self.embeds("").expand(count, -1, -1) if args.guidance_scale > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Groups: which images this epoch, and which of their steps are stochastic
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """K samples of one (image, prompt), which share start noise and window."""

    index: int  # in the epoch
    row: int  # in the training data
    flip: bool
    window: tuple[int, ...]  # the steps that are stochastic and trained
    image: torch.Tensor = None  # (3, H, W) in [0, 1]
    prompt: str = ""
    metadata: dict = field(default_factory=dict)


@dataclass
class Schedule:
    """The steps of a trajectory: `timesteps` `(S,)`, of which the first `trainable` may be stochastic."""

    timesteps: torch.Tensor
    trainable: int
    window: int  # stochastic and trained steps per group
    eta: float

    def etas(self, window: tuple[int, ...]) -> list[float]:
        """The pipeline's `eta` for a group with this window."""
        return [self.eta if step in window else 0.0 for step in range(len(self.timesteps))]


def plan_schedule(pipe: StableDiffusionImg2ImgDDPOPipeline, args: argparse.Namespace) -> Schedule:
    """The executed steps and how many of them lie before the tail; an `InputError` if too few are left to train."""
    known = pipe.scheduler.config.num_train_timesteps
    if args.num_inference_steps > known:
        raise InputError(f"--num_inference_steps={args.num_inference_steps}: the model knows no more than {known}.")
    pipe.scheduler.set_timesteps(args.num_inference_steps)
    timesteps, _ = pipe.get_timesteps(args.num_inference_steps, args.strength, "cpu")
    previous = timesteps - known // args.num_inference_steps
    alphas = pipe.scheduler.alphas_cumprod[previous.clamp(min=0)]
    alphas = alphas.masked_fill(previous < 0, float(pipe.scheduler.final_alpha_cumprod))
    trainable = len(timesteps) if args.train_tail else int((1 - alphas >= TAIL_VARIANCE).sum())
    window = args.sde_window or trainable
    if trainable == 0 or window > trainable:
        raise InputError(
            f"Only {trainable} of the {len(timesteps)} executed steps can be trained (the last ones add next to no"
            f" noise), but --sde_window={args.sde_window}: raise --num_inference_steps={args.num_inference_steps} or"
            f" --strength={args.strength}, lower --sde_window, or add --train_tail."
        )
    schedule = Schedule(timesteps, trainable, window, args.eta)
    try:
        pipe.check_trajectory(schedule.etas(tuple(range(trainable))), timesteps)
    except ValueError as e:
        raise InputError(f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}: {e}") from e
    return schedule


def draw_groups(data: ImagePrompts, schedule: Schedule, args: argparse.Namespace, epoch: int) -> list[Group]:
    """The epoch's groups, a function of (seed, epoch): images in shuffled passes over the data, windows at random."""
    groups = []
    count = args.samples_per_epoch // args.group_size
    for index in range(count):
        data_pass, position = divmod(epoch * count + index, len(data))
        row = torch.randperm(len(data), generator=seeded(args.seed, "order", data_pass))[position].item()
        random = seeded(args.seed, "group", epoch, index)
        start = torch.randint(schedule.trainable - schedule.window + 1, (), generator=random).item()
        flip = args.random_flip and torch.rand((), generator=random).item() < 0.5
        groups.append(Group(index, row, flip, tuple(range(start, start + schedule.window))))
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: groups -> images, rewards and transitions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Transitions:
    """This rank's stored steps x_t -> x_prev, one row each; N is samples times trained steps."""

    ids: torch.Tensor  # (N,) sample * window + position in window: names a transition on all ranks
    samples: torch.Tensor  # (N,) index of the sample in the epoch
    latents: torch.Tensor  # (N, C, h, w)
    next_latents: torch.Tensor  # (N, C, h, w)
    means: torch.Tensor  # (N, C, h, w) of the policy that sampled
    log_probs: torch.Tensor  # (N,)
    timesteps: torch.Tensor  # (N,)
    init_latents: torch.Tensor  # (N, C, h, w) of the input image
    prompts: list[str]  # N


def plan_batches(groups: list[Group], samples: range, group_size: int, batch_size: int) -> list[list[tuple]]:
    """
    Cuts a rank's samples into batches of `(group, first sample, count)` pieces: pieces of one batch have the same
    window and count, as one call of the pipeline needs, and at most `batch_size` samples in all.
    """
    pieces = []
    for group in groups:
        own = range(max(samples.start, group.index * group_size), min(samples.stop, (group.index + 1) * group_size))
        pieces += [(group, own[i], len(own[i : i + batch_size])) for i in range(0, len(own), batch_size)]
    pieces.sort(key=lambda piece: (piece[0].window, piece[2]))  # stable: within equals, by sample
    batches = []
    for (_, count), alike in itertools.groupby(pieces, key=lambda piece: (piece[0].window, piece[2])):
        alike = list(alike)
        per_batch = max(1, batch_size // count)
        batches += [alike[i : i + per_batch] for i in range(0, len(alike), per_batch)]
    return batches


def sample_batch(pipe, cache, schedule, args, epoch: int, pieces: list[tuple], ranks: Ranks):
    """One call of the pipeline: the images of the pieces `(B, 3, H, W)` in [0, 1], and their `Transitions`."""
    count, window = pieces[0][2], pieces[0][0].window
    groups = [group for group, _, _ in pieces]
    samples = torch.tensor([first + k for _, first, _ in pieces for k in range(count)])
    # one row per group, which the pipeline copies where the samples part, or one per sample
    owners = [g for g in groups for _ in range(count)] if args.independent_start_noise else groups
    start_noise = [seeded(args.seed, "start", epoch, g.index) for g in groups]
    init_latents = torch.cat([cache.latents((g.row, g.flip), g.image) for g in owners])
    out = pipe(
        image=init_latents,
        prompt_embeds=torch.cat([cache.embeds(g.prompt) for g in owners]),
        negative_prompt_embeds=cache.negative_embeds(len(owners), args),
        num_images_per_prompt=len(samples) // len(owners),
        strength=args.strength,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
        eta=schedule.etas(window),
        generator=[seeded(args.seed, "noise", epoch, i) for i in samples.tolist()],
        share_start_noise=False if args.independent_start_noise else start_noise,
        return_trajectory=True,
        output_type="pt",
        callback_on_step_end=ranks.poll_callback,
    )
    steps = torch.tensor(window)
    rows = samples.repeat_interleave(len(steps))
    transitions = Transitions(
        ids=rows * len(steps) + torch.arange(len(steps)).repeat(len(samples)),
        samples=rows,
        latents=out.latents[:, steps].flatten(0, 1),
        next_latents=out.latents[:, steps + 1].flatten(0, 1),
        means=out.means[:, steps].flatten(0, 1),
        log_probs=out.log_probs[:, steps].flatten(),
        timesteps=out.timesteps[steps].repeat(len(samples)),
        init_latents=init_latents.repeat_interleave(len(rows) // len(owners), dim=0),
        prompts=[g.prompt for g in groups for _ in range(count * len(steps))],
    )
    return samples, out.images.float(), transitions


def concatenate(parts: list[Transitions]) -> Transitions:
    """The rows of several `Transitions`, in the order of their ids."""
    order = torch.cat([part.ids for part in parts]).argsort()
    joined = {}
    for name in Transitions.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        if name == "prompts":
            flat = list(itertools.chain(*values))
            joined[name] = [flat[i] for i in order.tolist()]
        else:
            joined[name] = torch.cat(values)[order.to(values[0].device)]
    return Transitions(**joined)


def collect(pipe, cache, data, reward, schedule, args, epoch: int, ranks: Ranks):
    """
    The epoch's rollout. This rank samples its share; rewards are computed in a thread while the next batch is sampled.

    Returns:
        the epoch's groups, this rank's `Transitions` and all ranks' rewards `(components, samples_per_epoch)`.
    """
    accelerator = ranks.accelerator
    reward.info.clear()  # of an evaluation
    groups = draw_groups(data, schedule, args, epoch)
    samples = ranks.share(args.samples_per_epoch)
    rewards = torch.zeros(len(reward.components), args.samples_per_epoch, dtype=torch.float64)
    parts, scored = [], []
    bar = tqdm(total=len(samples), desc="sampling", leave=False, disable=quiet(accelerator))
    with (
        bar,
        reward_thread(accelerator.device) as executor,
        ranks.stage("Sampling or scoring"),
        accelerator.autocast(),
    ):
        for group in groups:
            first, last = group.index * args.group_size, (group.index + 1) * args.group_size - 1
            if samples and first <= samples[-1] and samples[0] <= last:
                group.image, group.prompt, group.metadata = data.load(group.row, group.flip)
        for pieces in plan_batches(groups, samples, args.group_size, args.sample_batch_size):
            batch, images, transitions = sample_batch(pipe, cache, schedule, args, epoch, pieces, ranks)
            owners = [group for group, _, count in pieces for _ in range(count)]
            prompts, metadata = [g.prompt for g in owners], [g.metadata for g in owners]
            parts.append(transitions)
            scored.append((batch, executor.submit(reward, images, prompts, metadata)))
            bar.update(len(batch))
        for batch, future in scored:
            rewards[:, batch] = wait_for(future, ranks)
    return groups, concatenate(parts) if parts else None, ranks.sum(rewards.float()).double().cpu()


@contextmanager
def reward_thread(device: torch.device):
    """A thread for rewards, on this rank's device. Leaving does not wait for it; the end of the process does."""
    # A thread starts on cuda:0. Not `device`, which has no index if there is only one process
    setup = (torch.cuda.set_device, (torch.cuda.current_device(),)) if device.type == "cuda" else (None, ())
    executor = ThreadPoolExecutor(max_workers=1, initializer=setup[0], initargs=setup[1])
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def wait_for(future, ranks: Ranks):
    """The future's result; meanwhile signals are heeded."""
    while True:
        ranks.poll()
        try:
            return future.result(timeout=0.2)
        except FutureTimeoutError:
            if future.done():  # the reward itself raised a time-out
                raise


# ---------------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------------

VLM_QUESTION = "Answer concisely: what is going on in this image?"
HTTP_ATTEMPTS = 5
HTTP_BACKOFF = 1.0  # seconds before the second attempt, doubled before each later one
HTTP_CONCURRENCY = 8  # requests under way at once


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images `(B, 3, H, W)` in [0, 1] as 8-bit RGB, rounded as ddpo-pytorch and TRL do: what a saved picture holds."""
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def encode(image: Image.Image, format: str) -> bytes:
    """The bytes of a file with this picture."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=95)
    return buffer.getvalue()


def image_column(metadata: list[dict], column: str) -> torch.Tensor:
    """`(B, 3, H, W)`: the pictures in a column, `init_image` among them."""
    if not torch.is_tensor(metadata[0][column]):
        columns = ", ".join(key for key, value in metadata[0].items() if torch.is_tensor(value))
        raise InputError(f"--reward_fn: column {column!r} holds no images; those that do are {columns}.")
    return torch.stack([row[column] for row in metadata])


def hinge(values: torch.Tensor, floor: float | None) -> torch.Tensor:
    """`values`, or with a floor `-max(0, floor - values)`: a guard, which is 0 at `floor` and above."""
    return values if floor is None else -F.relu(floor - values)


def jpeg_compressibility(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Minus the size in kB (1000 bytes) as a JPEG of quality 95, as in ddpo-pytorch: smooth, simple images."""
    return -jpeg_incompressibility(images, prompts, metadata)


def jpeg_incompressibility(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """The size in kB (1000 bytes) as a JPEG of quality 95, as in ddpo-pytorch: busy, detailed images."""
    return torch.tensor([len(encode(image, "JPEG")) / 1000 for image in to_pil(images)], dtype=torch.float64)


def psnr(images, prompts, metadata, column: str = "target", floor: float | None = None) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, at most 100, to the picture in a column; hinged with `floor`."""
    error = ((images - image_column(metadata, column).to(images)) ** 2).mean(dim=(1, 2, 3))
    return hinge(-10 * torch.log10(error.clamp(min=1e-10)), floor)


class RewardModel(torch.nn.Module):
    """
    A network of transformers with its image processor. `Reward` freezes, casts, moves and batches it.

    Pictures go through PIL and the model's own processor: a score is that of the picture as it would be saved, under
    the preprocessing that the model was trained with, whether or not torchvision is installed.
    """

    def __init__(self, network_class, model: str, processor: str, cache_dir: str | None, texts: bool = False):
        super().__init__()
        self.model, loaded = network_class.from_pretrained(model, cache_dir=cache_dir, output_loading_info=True)
        lacking = [key for key in loaded["missing_keys"] if not key.startswith("pooler.")]  # the pooler is not used
        if lacking:  # transformers would make them up at random
            raise ValueError(f"{model} has no weights for {', '.join(lacking[:3])} of {type(self.model).__name__}")
        self.processor = AutoImageProcessor.from_pretrained(processor, cache_dir=cache_dir, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(processor, cache_dir=cache_dir) if texts else None

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 3, h, w)`: what the network takes."""
        values = self.processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        return values.to(self.model.device, self.model.dtype)

    def cosines(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """`(images, texts)` float32, of a CLIP."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        out = self.model(pixel_values=self.pixels(images), **tokens.to(self.model.device))
        return F.normalize(out.image_embeds.float(), dim=-1) @ F.normalize(out.text_embeds.float(), dim=-1).T


class Aesthetic(RewardModel):
    """LAION's aesthetic score, a head on CLIP's image embedding: mostly 3 to 7, up to 10. No prompt is looked at."""

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        cache_dir: str | None = None,
    ):
        super().__init__(CLIPModel, model, model, cache_dir)
        if not Path(head).is_file():
            head = huggingface_hub.hf_hub_download(head, "aesthetic-model.pth", cache_dir=cache_dir)
        sizes = (768, 1024, 128, 64, 16, 1)
        linear = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        # the numbers of the file: dropouts, which do nothing here, stand after the first three layers
        self.head = torch.nn.ModuleDict({f"layers_{i}": layer for i, layer in zip((0, 2, 4, 6, 7), linear)})
        weights = torch.load(head, map_location="cpu", weights_only=True)
        self.head.load_state_dict({name.replace("layers.", "layers_"): weight for name, weight in weights.items()})

    def forward(self, images, prompts, metadata) -> torch.Tensor:
        hidden = self.model.visual_projection(self.model.vision_model(self.pixels(images)).pooler_output)
        hidden = F.normalize(hidden.float(), dim=-1)
        for layer in self.head.values():
            hidden = layer(hidden)
        return hidden.squeeze(1)


class ClipScore(RewardModel):
    """Cosine between CLIP's embeddings of image and prompt, in [-1, 1], in practice 0.1 to 0.4."""

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", processor: str | None = None, cache_dir: str | None = None
    ):
        super().__init__(CLIPModel, model, processor or model, cache_dir, texts=True)

    def forward(self, images, prompts, metadata) -> torch.Tensor:
        return self.cosines(images, prompts).diagonal()


class PickScore(ClipScore):
    """What people pick: CLIP's cosine between image and prompt times the model's logit scale, in practice 15 to 25."""

    def forward(self, images, prompts, metadata) -> torch.Tensor:
        return self.model.logit_scale.float().exp() * super().forward(images, prompts, metadata)


class DinoSimilarity(RewardModel):
    """Cosine, in [-1, 1], of DINOv2's class tokens of the image and of the one in a column; hinged with `floor`."""

    def __init__(
        self,
        model: str = "facebook/dinov2-small",
        column: str = "init_image",
        floor: float | None = None,
        cache_dir: str | None = None,
    ):
        super().__init__(AutoModel, model, model, cache_dir)
        self.column, self.floor = column, floor

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, E)` float32."""
        return self.model(self.pixels(images)).last_hidden_state[:, 0].float()

    def forward(self, images, prompts, metadata) -> torch.Tensor:
        targets = self.features(image_column(metadata, self.column))
        return hinge(F.cosine_similarity(self.features(images), targets), self.floor)


class Classifier(RewardModel):
    """
    How much an image looks like the class in a column, in logits of an image classification model, or of a CLIP with
    the texts "An image of {class}" for the dataset's classes.

    `mode` margin: the class's logit minus the greatest other one. `mode` logit_change: the class's logit minus that of
    the input image, clipped to +-10, as imageddpo's application does.
    """

    def __init__(self, model: str, label_column: str = "label", mode: str = "margin", cache_dir: str | None = None):
        if mode not in ("margin", "logit_change"):
            raise InputError(f"--reward_fn=classifier: mode={mode} is neither margin nor logit_change.")
        zero_shot = AutoConfig.from_pretrained(model, cache_dir=cache_dir).model_type == "clip"
        network_class = CLIPModel if zero_shot else AutoModelForImageClassification
        super().__init__(network_class, model, model, cache_dir, texts=zero_shot)
        self.zero_shot, self.column, self.mode, self.classes, self.indices = zero_shot, label_column, mode, [], {}

    def find_classes(self, parts: list[datasets.Dataset]) -> None:
        """Maps each value of the label column to a class: by name where it has one, else the number is the index."""
        feature = parts[0].features[self.column]
        named = isinstance(feature, datasets.ClassLabel)
        names = {value: feature.int2str(value) if named else value for part in parts for value in part[self.column]}
        if self.zero_shot:
            names = {value: str(name) for value, name in names.items()}
            self.classes = feature.names if named else sorted(set(names.values()))
        else:
            self.classes = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        known = {i: i for i in range(len(self.classes))} | {name: i for i, name in enumerate(self.classes)}
        shown = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
        for name in names.values():
            if name not in known:
                raise InputError(f"--reward_fn=classifier: {self.column} {name!r} is not a class; they are {shown}.")
        if len(self.classes) < 2:
            raise InputError(f"--reward_fn=classifier: there is one class, {shown}, and nothing to tell it from.")
        self.indices = {value: known[name] for value, name in names.items()}

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, classes)` float32."""
        if not self.zero_shot:
            return self.model(self.pixels(images)).logits.float()
        return self.model.logit_scale.float().exp() * self.cosines(images, [f"An image of {c}" for c in self.classes])

    def forward(self, images, prompts, metadata) -> torch.Tensor:
        target = torch.tensor([[self.indices[row[self.column]]] for row in metadata], device=images.device)  # (B, 1)
        logits = self.logits(images)
        if self.mode == "margin":
            return (logits.gather(1, target) - logits.scatter(1, target, -torch.inf).amax(1, keepdim=True)).squeeze(1)
        before = self.logits(image_column(metadata, "init_image"))
        return (logits - before).gather(1, target).squeeze(1).clamp(-10, 10)


class RawResponses(urllib.request.HTTPErrorProcessor):
    """Leaves every status to `post_json`: nothing is raised, and no redirect takes data or a key elsewhere."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def post_json(url: str, payload: dict, timeout: float, api_key: str | None = None) -> dict:
    """The JSON object that a server answers. Failures that may pass are retried with exponential back-off."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(url, json.dumps(payload, default=str).encode(), headers)
    for attempt in range(HTTP_ATTEMPTS):
        if attempt and STOPPING.wait(HTTP_BACKOFF * 2 ** (attempt - 1)):
            break
        try:
            with urllib.request.build_opener(RawResponses).open(request, timeout=timeout) as response:
                status, body = response.status, response.read()
        except (OSError, http.client.HTTPException) as e:  # refused, closed, timed out
            failure = f"{type(e).__name__}: {e}"
            continue
        failure = f"HTTP {status}: {body[:300].decode(errors='replace')}"
        if status // 100 == 2:
            try:
                answer = json.loads(body)
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
            failure = f"the answer is no JSON object: {body[:300].decode(errors='replace')}"
        if status < 500 and status != 429:  # 429: too many requests, try later
            break
    failure = failure.replace(api_key, "***") if api_key else failure
    raise RuntimeError(f"{url} failed, {attempt + 1} of {HTTP_ATTEMPTS} attempts: {failure}")


def check_url(url: str) -> str:
    """The URL, or an `InputError`."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        shown = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise InputError(f"--reward_fn: {shown} must be http(s)://host[:port]/path, without a password.")
    return url


class HttpReward:
    """
    A reward server: POST {"images": [base64 PNG], "prompts": [...], "metadata": [{...}]}, answered by
    {"rewards": [...]} and perhaps "info": {name: [...]}, one value per image. Requests of `batch_size` images are
    concurrent. Metadata has the columns without pictures; what JSON has no form for is sent as its text.
    """

    def __init__(self, url: str, batch_size: int, timeout: float):
        self.url, self.batch_size, self.timeout = check_url(url), batch_size, timeout

    def score(self, rows: list[tuple]) -> dict:
        """The server's answer on some `(image, prompt, metadata)`."""
        images, prompts, metadata = zip(*rows)
        payload = {
            "images": [base64.b64encode(encode(image, "PNG")).decode() for image in images],
            "prompts": prompts,
            "metadata": [{k: v for k, v in row.items() if not torch.is_tensor(v)} for row in metadata],
        }
        answer = post_json(self.url, payload, self.timeout)
        info = answer.get("info") or {}
        lists = [answer.get("rewards"), *(info.values() if isinstance(info, dict) else [None])]
        if not all(isinstance(values, list) and len(values) == len(rows) for values in lists):
            raise ValueError(f"{self.url}: {len(rows)} images, but not as many rewards or info: {str(answer)[:300]}")
        return {"rewards": answer["rewards"], "info": info}

    def __call__(self, images, prompts, metadata) -> tuple[list[float], dict]:
        rows = list(zip(to_pil(images), prompts, metadata))
        with ThreadPoolExecutor(HTTP_CONCURRENCY) as pool:
            requests = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            answers = list(pool.map(self.score, requests))
        shared = set.intersection(*(set(answer["info"]) for answer in answers))
        info = {name: [value for answer in answers for value in answer["info"][name]] for name in sorted(shared)}
        return [value for answer in answers for value in answer["rewards"]], info


class VlmJudge:
    """
    Asks a vision-language model behind an OpenAI-compatible endpoint about each image, and scores its reply in [0, 1]:
    `score` strict is 1 where the reply contains the expected answer, case apart; `score` recall is the part of the
    expected answer's words that the reply contains (ddpo-pytorch's BERTScore recall would also credit synonyms).

    `url` ends in /v1. Question and answer columns hold a text or a list of texts, whose scores are averaged. Without a
    question column the question is "Answer concisely: what is going on in this image?"; without an answer column the
    prompt is the answer. The API key is read from the environment variable `api_key_env`, if it is set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question_column: str | None = None,
        answer_column: str | None = None,
        score: str = "strict",
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
    ):
        if score not in ("strict", "recall"):
            raise InputError(f"--reward_fn=vlm_judge: score={score} is neither strict nor recall.")
        self.url, self.model, self.timeout = check_url(url).rstrip("/") + "/chat/completions", model, timeout
        self.question_column, self.answer_column, self.score = question_column, answer_column, score
        self.api_key = os.environ.get(api_key_env, "").strip()

    def questions(self, prompt: str, row: dict) -> list[tuple[str, str]]:
        """Pairs of question and expected answer about one image."""
        questions = row[self.question_column] if self.question_column else VLM_QUESTION
        answers = row[self.answer_column] if self.answer_column else prompt
        questions, answers = ([str(v) for v in x] if isinstance(x, list) else [str(x)] for x in (questions, answers))
        if len(questions) != len(answers) or not all(words(text) for text in questions + answers):
            raise InputError(f"--reward_fn=vlm_judge: questions {questions} and answers {answers} do not pair up.")
        return list(zip(questions, answers))

    def judge(self, job: tuple[str, str, str]) -> tuple[float, float]:
        """Strict satisfaction and word recall of the reply to `(base64 JPEG, question, answer)`."""
        picture, question, answer = job
        content = [
            {"type": "text", "text": question},
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        ]
        messages = [{"role": "user", "content": content}]
        payload = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 256}
        reply = post_json(self.url, payload, self.timeout, self.api_key)
        try:
            text = reply["choices"][0]["message"]["content"].lower()
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"{self.url}: not a chat completion: {str(reply)[:300]}") from None
        expected = words(answer)
        return float(answer.lower() in text), (expected & words(text)).total() / expected.total()

    def __call__(self, images, prompts, metadata) -> tuple[torch.Tensor, dict]:
        asked = [self.questions(prompt, row) for prompt, row in zip(prompts, metadata)]
        pictures = [base64.b64encode(encode(image, "JPEG")).decode() for image in to_pil(images)]
        jobs = [(picture, *pair) for picture, pairs in zip(pictures, asked) for pair in pairs]
        with ThreadPoolExecutor(HTTP_CONCURRENCY) as pool:
            scores = torch.tensor(list(pool.map(self.judge, jobs)))  # (questions, 2)
        means = torch.stack([part.mean(dim=0) for part in scores.split([len(pairs) for pairs in asked])])  # (B, 2)
        info = {"vlm_strict": means[:, 0], "vlm_recall": means[:, 1]}
        return info[f"vlm_{self.score}"], info


def words(text: str) -> Counter:
    """The words of a text in lower case, with their numbers."""
    return Counter(re.findall(r"\w+", text.lower()))


H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
REWARDS = {
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "psnr": psnr,
    "aesthetic": Aesthetic,
    "clip_score": ClipScore,
    "pick_score": partial(PickScore, model="yuvalkirstain/PickScore_v1", processor=H14),
    "hps": partial(ClipScore, model="adams-story/HPSv2-hf", processor=H14),
    "dino_similarity": DinoSimilarity,
    "classifier": Classifier,
    "vlm_judge": VlmJudge,
}


def load_reward_file(path: str, name: str):
    """The reward `name` of a Python file: a function of three arguments, or what makes one, as in ddpo-pytorch."""
    flag = f"--reward_fn={path}:{name}"
    if not Path(path).is_file():
        raise InputError(f"{flag}: there is no file {path}.")
    sys.path.insert(0, str(Path(path).resolve().parent))
    module_spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise InputError(f"{flag}: importing {path} failed: {type(e).__name__}: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise InputError(f"{flag}: {path} has no function {name!r}; it has {', '.join(names) or 'none'}.")
    if inspect.isclass(function) or not inspect.signature(function).parameters:
        try:
            function = function()
        except (Exception, SystemExit) as e:
            raise InputError(f"{flag}: {name}() failed: {type(e).__name__}: {e}") from e
    try:
        inspect.signature(function).bind("images", "prompts", "metadata")
    except TypeError as e:
        raise InputError(f"{flag} must take (images, prompts, metadata), or nothing and return what does: {e}.") from e
    return function


def split_weight(text: str) -> tuple[str, float]:
    """`TEXT=WEIGHT`, or weight 1 if no number follows the last `=`, or if that `=` belongs to a URL's `?key=value`."""
    head, _, tail = text.rpartition("=")
    in_query = "?" in head and "=" not in re.split("[?&]", head)[-1]
    try:
        weight = math.nan if in_query or not head else float(tail)
    except ValueError:
        weight = math.nan
    return (head, weight) if math.isfinite(weight) else (text, 1.0)


@dataclass
class Component:
    """One reward of a weighted sum."""

    name: str
    weight: float
    function: Callable
    columns: list[str] = field(default_factory=list)  # what it reads of the metadata


def parse_options(part: str, segments: list[str], parameters: dict) -> tuple[dict[str, str], str, float]:
    """
    The options in what follows `NAME:`, the part without its weight, and the weight.

    `key=value` with a parameter's name is an option; a first segment without is the value of the first parameter; any
    later one continues the value before it, so that values may have colons, as URLs do.
    """
    options, last = {}, None
    for i, segment in enumerate(segments):
        key, equals, value = segment.partition("=")
        misspelt = equals and key.isidentifier() and not (i == 0 and split_weight(segment)[0] == key)
        if equals and key in parameters:
            last = key
        elif misspelt or not segment or not parameters:
            known = ", ".join(parameters) or "none"
            raise InputError(f"--reward_fn={part}: no option {segment!r}; there are {known}.")
        elif i == 0:
            last, value = next(iter(parameters)), segment
        else:
            options[last] += f":{segment}"
            continue
        if last in options:
            raise InputError(f"--reward_fn={part}: {last} is given twice, {options[last]!r} and {value!r}.")
        options[last] = value
    value, weight = split_weight(options[last])
    text = part[: len(part) - len(options[last]) + len(value)]  # without =WEIGHT
    return {**options, last: value}, text, weight


def make_component(part: str, defaults: dict) -> Component:
    """`NAME[:SEGMENT]*`, `path/to/file.py:function` or a URL, each with or without `=WEIGHT`, as a `Component`."""
    text, weight = split_weight(part)
    if text.startswith(("http://", "https://")):
        return Component(text, weight, HttpReward(text, defaults["batch_size"], defaults["timeout"]))
    if ".py:" in text:
        path, _, function = text.rpartition(":")
        return Component(f"{Path(path).stem}:{function}", weight, load_reward_file(path, function))
    name, colon, rest = part.partition(":")
    name = name if colon else text
    if name not in REWARDS:
        known = ", ".join([*REWARDS, "file.py:function", "http://host/path"])
        raise InputError(f"--reward_fn={part} is not known: use {known}.")
    maker = REWARDS[name]
    is_function = inspect.isfunction(maker)  # its options follow images, prompts, metadata
    parameters = dict(list(inspect.signature(maker).parameters.items())[3 if is_function else 0 :])
    options = {}
    if colon:
        options, text, weight = parse_options(part, rest.split(":"), parameters)
    options = {key: value for key, value in defaults.items() if key in parameters} | options
    for key, parameter in parameters.items():
        if key not in options and parameter.default is parameter.empty:
            raise InputError(f"--reward_fn={part}: {key} is missing; the options are {', '.join(parameters)}.")
        if key in options and parameter.annotation in (float, float | None):
            try:
                options[key] = float(options[key])
            except ValueError:
                raise InputError(f"--reward_fn={part}: {key}={options[key]} is not a number.") from None
    columns = [options.get(key, parameter.default) for key, parameter in parameters.items() if key.endswith("column")]
    try:
        function = partial(maker, **options) if is_function else maker(**options)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"--reward_fn={part}: {type(e).__name__}: {e}") from e
    return Component(text, weight, function, [column for column in columns if column])


class Reward:
    """
    The components of `--reward_fn`, each a function with the signature of ddpo-pytorch, TRL and imageddpo:

        def reward(images, prompts, metadata):
            # images: (B, 3, H, W) float in [0, 1]; prompts: list[str]; metadata: list[dict], each the row's other
            # columns plus "init_image" (3, H, W) in [0, 1], on the CPU. Returns (B,) rewards, or (rewards, info); the
            # per-sample numbers in info are averaged and logged.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device | str = "cpu"):
        self.device, self.batch_size, self.info = torch.device(device), args.reward_batch_size, {}
        defaults = {"cache_dir": args.cache_dir, "batch_size": self.batch_size, "timeout": args.reward_timeout}
        self.components = [make_component(part.strip(), defaults) for part in args.reward_fn.split(",")]
        names = [component.name for component in self.components]
        if len(set(names)) < len(names):
            raise InputError(f"--reward_fn={args.reward_fn} names one reward twice: add up its weights.")
        # fp16 also under bf16: of two halves, the one that tells close scores apart. Heads and scores are float32
        half = self.device.type != "cpu" and args.mixed_precision != "no"
        for component in self.components:
            if isinstance(component.function, RewardModel):
                component.function.requires_grad_(False).eval().to(self.device)
                component.function.model.to(torch.float16 if half else torch.float32)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        """Rewards `(components, B)` float64 on the CPU; a `ValueError` if one has the wrong shape or is not finite."""
        rewards, images = [], images.to(self.device)
        for component in self.components:
            with torch.autocast(self.device.type, enabled=False):  # the same precision in rollout and evaluation
                result = self.score(component, images, prompts, metadata)
            result, info = result if isinstance(result, tuple) else (result, None)
            told = f"reward {component.name} returned"
            try:
                result = torch.as_tensor(result.cpu() if torch.is_tensor(result) else result, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError) as e:
                raise ValueError(f"{told} what is no list of numbers: {e}") from e
            if result.shape != (len(images),):
                raise ValueError(f"{told} shape {tuple(result.shape)} for {len(images)} images, not ({len(images)},)")
            if not result.isfinite().all():
                bad = result.isfinite().logical_not().nonzero()[0].item()
                raise ValueError(f"{told} {result[bad].item()} for image {bad} of the batch")
            rewards.append(result.detach())
            self.keep(component, info, len(images))
        return torch.stack(rewards)

    def score(self, component: Component, images: torch.Tensor, prompts: list[str], metadata: list[dict]):
        """What a component returns; reward models see at most `--reward_batch_size` images at once."""
        if not isinstance(component.function, RewardModel):  # copies: it may write into what it gets
            return component.function(images.clone(), list(prompts), [copy.deepcopy(row) for row in metadata])
        parts = [slice(i, i + self.batch_size) for i in range(0, len(images), self.batch_size)]
        return torch.cat([component.function(images[part], prompts[part], metadata[part]) for part in parts])

    def keep(self, component: Component, info: dict | None, count: int) -> None:
        """Collects the per-sample numbers in `info`; texts and other things are left out."""
        for name, values in info.items() if isinstance(info, dict) else ():
            try:
                values = torch.as_tensor(values, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                continue
            if values.shape == (count,):
                name = name if len(self.components) == 1 else f"{component.name}/{name}"
                self.info.setdefault(f"info/{name}", []).extend(values.tolist())

    def take_info(self) -> dict[str, float]:
        """Means, over the samples of all ranks, of what `keep` collected since the last call."""
        parts, self.info = gather_object([self.info]), {}
        names = dict.fromkeys(itertools.chain(*parts))
        return {name: float(np.mean([value for part in parts for value in part.get(name, [])])) for name in names}

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        """The weighted sum `(B,)` of rewards or advantages `(components, B)`."""
        return torch.tensor([component.weight for component in self.components], dtype=rewards.dtype) @ rewards

    def check(self, *parts: ImagePrompts) -> None:
        """Looks for the columns and scores two inputs: a reward that cannot work is found before SD loads."""
        parts = [part for part in parts if len(part)]
        for component in self.components:
            for part in parts:
                check_columns(component, part)
            if isinstance(component.function, Classifier):
                component.function.find_classes([part.dataset for part in parts])
        for part in parts:
            rows = [part.load(i % len(part)) for i in range(2)]
            images, prompts, metadata = zip(*rows)
            try:
                self(torch.stack(images), list(prompts), list(metadata))
            except InputError:
                raise
            except (Exception, SystemExit) as e:
                place = traceback.extract_tb(e.__traceback__)[-1]
                where = f"{place.filename}, line {place.lineno}"
                raise InputError(f"--reward_fn cannot score the images: {type(e).__name__}: {e} ({where})") from e


def check_columns(component: Component, data: ImagePrompts) -> None:
    """Raises an `InputError` if a column that the reward reads is missing, or has no value in some row."""
    columns = data.load(0)[2]
    for column in component.columns:
        if column not in columns:
            raise InputError(f"--reward_fn={component.name}: no column {column!r}; there are {', '.join(columns)}.")
        values = data.dataset[column] if column != "init_image" else []
        empty = next((i for i, value in enumerate(values) if value is None), None)
        if empty is not None:
            raise InputError(f"--reward_fn={component.name}: row {empty} has no value in column {column!r}.")


# ---------------------------------------------------------------------------------------------------------------------
# Advantages: rewards -> what each sample is worth against its like
# ---------------------------------------------------------------------------------------------------------------------


class RewardTracker:
    """The last rewards of each (image, prompt), as DDPO's per-prompt statistics but keyed by the image too."""

    def __init__(self, buffer_size: int = 32, min_count: int = 16):
        self.buffer_size, self.min_count, self.rewards = buffer_size, min_count, {}

    def advantages(self, rewards: torch.Tensor, keys: list[str]) -> torch.Tensor:
        """`(B,)` deviations from the key's running mean, in its standard deviation; a key seen less than `min_count`
        times is measured by this batch."""
        for key, value in zip(keys, rewards.tolist()):
            self.rewards[key] = (self.rewards.get(key, []) + [value])[-self.buffer_size :]
        advantages = torch.empty_like(rewards)
        for i, key in enumerate(keys):
            seen = torch.tensor(self.rewards[key], dtype=rewards.dtype)
            known = seen if len(seen) >= self.min_count else rewards
            advantages[i] = (rewards[i] - known.mean()) / (known.std(unbiased=False) + 1e-6)
        return advantages


def compute_advantages(
    rewards: torch.Tensor, kind: str, group_size: int, trackers: list[RewardTracker], keys: list[str]
) -> torch.Tensor:
    """
    Advantages of one epoch, on all ranks alike.

    Args:
        rewards: `(components, B)`, groups contiguous.
        kind: `group` compares with the group's mean in units of the standard deviation within groups, pooled over
            them: a group whose rewards are all equal has advantage 0. `tracker` and `batch` compare with the (image,
            prompt)'s and with the epoch's statistics.
        trackers: one per component, for `tracker`.
        keys: of each sample's (image, prompt).

    Returns:
        `(components, B)`, each component normalised on its own and clipped to +-5.
    """
    advantages = []
    for component, tracker in zip(rewards, trackers):
        if kind == "group":
            deviations = component.view(-1, group_size)
            deviations = (deviations - deviations.mean(dim=1, keepdim=True)).flatten()
            advantages.append(deviations / (deviations.square().mean().sqrt() + 1e-6))
        elif kind == "tracker":
            advantages.append(tracker.advantages(component, keys))
        else:
            advantages.append((component - component.mean()) / (component.std(unbiased=False) + 1e-6))
    return torch.stack(advantages).clamp(-5, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: pure functions of tensors
# ---------------------------------------------------------------------------------------------------------------------


def ppo_loss(log_probs, old_log_probs, advantages, clip_range: float) -> torch.Tensor:
    """
    Clipped surrogate, equation (7) of PPO (https://huggingface.co/papers/1707.06347), as a loss per transition.

    Args:
        log_probs, old_log_probs: `(B,)` nats per latent element, of the policy now and when it sampled.
        advantages: `(B,)`.
        clip_range: the ratio is clipped to `1 +- clip_range`.

    Returns:
        `(B,)`.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def reinforce_loss(log_probs, advantages) -> torch.Tensor:
    """The score function (https://doi.org/10.1007/BF00992696), for `(B,)` log-probs and advantages. On-policy only."""
    return -advantages * log_probs


def trpo_loss(log_probs, old_log_probs, advantages, kl, beta: float) -> torch.Tensor:
    """
    Surrogate with a KL penalty, the form TRPO derives before its constraint
    (https://huggingface.co/papers/1502.05477).

    Args:
        log_probs, old_log_probs, advantages: `(B,)`.
        kl: `(B,)` exact KL(old || new) per latent element, the unit of the log-probs.
        beta: weight of the KL, adapted by `adapt_beta`.

    Returns:
        `(B,)`.
    """
    return -advantages * torch.exp(log_probs - old_log_probs) + beta * kl


def adapt_beta(beta: float, kl: float, target_kl: float) -> float:
    """Doubles or halves the weight when the KL is more than a factor 1.5 off (section 4 of the PPO paper)."""
    if kl > 1.5 * target_kl:
        beta = beta * 2
    elif kl < target_kl / 1.5:
        beta = beta / 2
    return min(max(beta, 1e-6), 1e6)


def sac_loss(values) -> torch.Tensor:
    """
    The actor's side of soft actor-critic (https://huggingface.co/papers/1801.01290): minus the value `(2, B)` of a
    freshly drawn, reparameterised action, the lower of two heads. "Soft" is the KL to the frozen model, which
    `--kl_coef` adds: with a fixed std the entropy is a constant.
    """
    return -values.min(dim=0).values


def gaussian_kl(mean, other_mean, std) -> torch.Tensor:
    """KL between N(mean, std^2 I) and N(other_mean, std^2 I), `(B,)` in nats: exact, symmetric, never negative."""
    return ((mean - other_mean) ** 2 / (2 * std**2)).flatten(1).sum(dim=1)


class ValueCritic(torch.nn.Module):
    """
    What the reward of a trajectory will be, from the latents after a step: two heads on a small convolutional trunk.

    A head's value is linear in the change from the input image, with weights (a map per latent channel) that depend on
    everything: the slope with respect to the latents, which is all that the policy gets from it, is then learnt from
    few samples.

    `forward(latents (B, C, h, w), init_latents (B, C, h, w), timesteps (B,), prompt_embeds (B, L, E)) -> (2, B)`, in
    standard deviations of reward.
    """

    def __init__(self, latent_channels: int, embedding_dim: int, width: int = 32):
        super().__init__()
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.prompt_embedding = torch.nn.Linear(embedding_dim, width)
        self.conv_in = torch.nn.Conv2d(2 * latent_channels, width, 3, padding=1)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv_out = torch.nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        torch.nn.init.normal_(self.conv_out.weight, std=1e-3)  # values near 0, and two heads that differ
        torch.nn.init.zeros_(self.conv_out.bias)
        self.bias = torch.nn.Parameter(torch.zeros(2, 1))

    def forward(self, latents, init_latents, timesteps, prompt_embeds):
        init_latents = init_latents.float()
        condition = self.time_embedding(self.time_proj(timesteps)) + self.prompt_embedding(
            prompt_embeds.float().mean(1)
        )
        hidden = self.conv_in(torch.cat([latents, init_latents], dim=1)) + condition[:, :, None, None]
        for conv in self.convs:
            hidden = hidden + conv(F.silu(hidden))
        weights = self.conv_out(F.silu(hidden)).unflatten(1, (2, -1))  # (B, 2, C, h, w)
        values = (weights * (latents - init_latents).unsqueeze(1)).flatten(2).sum(2) / latents[0].numel() ** 0.5
        return values.T + self.bias


# ---------------------------------------------------------------------------------------------------------------------
# Update: transitions and advantages -> a better LoRA
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """Everything that training changes, and what it changes it with."""

    pipe: StableDiffusionImg2ImgDDPOPipeline
    accelerator: Accelerator
    parameters: dict[str, torch.nn.Parameter]  # the LoRA
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    trackers: list[RewardTracker]
    ema: EMAModel | None = None
    critic: ValueCritic | None = None
    target_critic: ValueCritic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    beta: float = 1.0
    samples: int = 0
    unet_evaluations: int = 0  # forward-equivalents of rollouts and updates, not of evaluations, on all ranks
    local_evaluations: int = 0  # not yet added up over ranks
    history: list[dict] = field(default_factory=list)

    def count_rows(self, unet, inputs) -> None:
        """Forward hook of the UNet."""
        self.local_evaluations += len(inputs[0]) * (TRAIN_ROW_COST if torch.is_grad_enabled() else 1)

    @contextmanager
    def reference_policy(self):
        """The UNet without its LoRA."""
        self.pipe.unet.disable_adapters()
        try:
            yield
        finally:
            self.pipe.unet.enable_adapters()

    @contextmanager
    def evaluated_weights(self):
        """The LoRA that is evaluated and saved: the moving average if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())


def make_state(pipe, args: argparse.Namespace, accelerator: Accelerator, reward: Reward) -> TrainState:
    """Adds the LoRA to the UNet and builds optimizer, schedule and what the algorithm needs besides."""
    set_seed(args.seed)  # the starts of LoRA and critic are all that is drawn from the global generator
    layers = [layer.strip() for layer in args.lora_layers.split(",")]
    for layer in layers:
        if not any(f".{name}".endswith(f".{layer}") for name, _ in pipe.unet.named_modules()):
            raise InputError(f"--lora_layers={args.lora_layers}: the UNet has no module {layer!r}.")
    config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=layers)
    try:
        pipe.unet.add_adapter(config)
    except ValueError as e:
        raise InputError(f"--lora_layers={args.lora_layers}: {e}") from e
    cast_training_params(pipe.unet, dtype=torch.float32)
    parameters = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    optimizer = optimizer_class(
        parameters.values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.num_train_epochs * args.num_inner_epochs * args.updates_per_epoch,
    )
    state = TrainState(
        pipe, accelerator, parameters, optimizer, lr_scheduler, [RewardTracker() for _ in reward.components]
    )
    if args.ema_decay:
        state.ema = EMAModel(parameters.values(), decay=args.ema_decay)
    if args.algorithm == "sac":
        sizes = pipe.unet.config.in_channels, pipe.text_encoder.config.hidden_size
        state.critic = ValueCritic(*sizes).to(accelerator.device)
        state.target_critic = ValueCritic(*sizes).to(accelerator.device).requires_grad_(False)
        state.target_critic.load_state_dict(state.critic.state_dict())
        state.critic_optimizer = torch.optim.AdamW(state.critic.parameters(), lr=CRITIC_LEARNING_RATE)
    pipe.unet.register_forward_pre_hook(state.count_rows)
    return state


def local_batches(transitions: Transitions | None, ids: np.ndarray, batch_size: int) -> list[torch.Tensor]:
    """Rows of this rank's transitions that belong to the update `ids`, in micro-batches."""
    if transitions is None:
        return []
    rows = torch.from_numpy(np.flatnonzero(np.isin(transitions.ids.numpy(), ids)))
    return list(rows.split(batch_size)) if len(rows) else []


def reduce_gradients(parameters, ranks: Ranks) -> None:
    """Adds up the gradients of all ranks, which each divided by the global number of transitions."""
    if ranks.accelerator.num_processes > 1:
        gradients = [p.grad for p in parameters]
        total = ranks.sum(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def optimizer_step(state: TrainState, args: argparse.Namespace, ranks: Ranks) -> float:
    """Reduces, checks, clips and applies the LoRA's gradient; returns its norm before clipping."""
    parameters = list(state.parameters.values())
    reduce_gradients(parameters, ranks)
    scaler = state.accelerator.scaler
    if scaler is not None:
        scaler.scale(parameters[0].new_zeros(()))  # which sets it up where a rank had nothing to back-propagate
        scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    # fp16 may overflow: the scaler then skips the step and lowers its scale, until it is no longer the scale's fault
    if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
        raise RuntimeError(f"the gradient's norm is {norm}: lower --learning_rate, or use --mixed_precision=no.")
    if scaler is not None:
        scaler.step(state.optimizer)
        scaler.update()
    else:
        state.optimizer.step()
    if math.isfinite(norm):
        state.lr_scheduler.step()
        if state.ema is not None:
            state.ema.step(parameters)
    return norm


class Policy:
    """The current policy on stored transitions: what the objectives and their measurements need of the UNet."""

    def __init__(self, state: TrainState, cache: ConditionCache, transitions: Transitions, args: argparse.Namespace):
        self.state, self.cache, self.transitions, self.args = state, cache, transitions, args

    def embeds(self, rows: torch.Tensor) -> torch.Tensor:
        """`(B, L, E)` prompt embeddings."""
        return torch.cat([self.cache.embeds(self.transitions.prompts[i]) for i in rows.tolist()])

    def step(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(B, C, h, w)` and std `(B, 1, 1, 1)` of the steps under the current weights."""
        args, batch = self.args, self.transitions
        negative = self.cache.negative_embeds(len(rows), args)
        latents, timesteps = batch.latents[rows], batch.timesteps[rows]
        unet, scheduler = self.state.pipe.unet, self.state.pipe.scheduler
        noise = predict_noise(
            unet, latents, timesteps, self.embeds(rows), negative, args.guidance_scale, args.guidance_rescale
        )
        return ddim_transition(scheduler, noise, timesteps, latents, args.eta)

    @torch.no_grad()
    def reference_mean(self, rows: torch.Tensor) -> torch.Tensor:
        """`(B, C, h, w)` mean of the steps without the LoRA."""
        with self.state.reference_policy():
            return self.step(rows)[0]

    @torch.no_grad()
    def mean_kl(self, batches: list[torch.Tensor], ranks: Ranks, to_reference: bool = False) -> float:
        """KL of the policy that sampled, or of the reference, to the current one: nats per step, over all ranks."""
        total = torch.zeros(2, dtype=torch.float64)
        with ranks.stage("Measuring the KL"), self.state.accelerator.autocast():
            for rows in batches:
                ranks.poll()
                other = self.reference_mean(rows) if to_reference else self.transitions.means[rows]
                mean, std = self.step(rows)
                kl = gaussian_kl(mean, other, std)
                total += torch.tensor([kl.sum().item(), len(rows)], dtype=torch.float64)
        total = ranks.sum(total.float())
        return (total[0] / total[1]).item()

    def fresh_values(self, rows: torch.Tensor, mean, std, noise_path: tuple) -> torch.Tensor:
        """`(2, B)` values of actions drawn anew around `mean`, differentiable in it."""
        batch = self.transitions
        noise = [torch.randn(mean.shape[1:], generator=seeded(*noise_path, i)) for i in batch.ids[rows].tolist()]
        action = mean + std * torch.stack(noise).to(mean)
        return self.state.target_critic(action, batch.init_latents[rows], batch.timesteps[rows], self.embeds(rows))


def fit_critic(policy: Policy, advantages: torch.Tensor, path: tuple, count: int, ranks: Ranks) -> float:
    """Regresses both heads on the terminal advantage of this epoch's transitions; returns the last passes' error."""
    state, batch = policy.state, policy.transitions
    parameters = list(state.critic.parameters())
    for number in range(CRITIC_PASSES):
        order = torch.randperm(count, generator=seeded(*path, "critic", number)).numpy()
        error = 0.0
        for ids in np.array_split(order, CRITIC_UPDATES_PER_PASS):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            with ranks.stage("Fitting the critic"):
                for rows in local_batches(batch, ids, 256):
                    ranks.poll()
                    values = state.critic(
                        batch.next_latents[rows], batch.init_latents[rows], batch.timesteps[rows], policy.embeds(rows)
                    )
                    targets = advantages[batch.samples[rows]].to(values)
                    loss = (values - targets).square().mean(dim=0).sum() / len(ids)
                    loss.backward()
                    error += loss.item() / CRITIC_UPDATES_PER_PASS
            reduce_gradients(parameters, ranks)
            state.critic_optimizer.step()
            for target, parameter in zip(state.target_critic.parameters(), parameters):
                target.data.lerp_(parameter.data, CRITIC_POLYAK)
    return ranks.sum(torch.tensor(error)).item()


def policy_losses(policy: Policy, rows: torch.Tensor, advantages: torch.Tensor, clip_range: float, path: tuple):
    """
    The objective of `--algorithm` on some transitions.

    Returns:
        losses `(B,)`, and a dict of `(B,)` measurements without gradient.
    """
    args, batch, state = policy.args, policy.transitions, policy.state
    elements = batch.latents[0].numel()
    reference = policy.reference_mean(rows) if args.kl_coef else None
    mean, std = policy.step(rows)
    log_probs, old_log_probs = gaussian_log_prob(batch.next_latents[rows], mean, std), batch.log_probs[rows]
    advantages = advantages[batch.samples[rows]].to(log_probs)
    kl_old = gaussian_kl(mean, batch.means[rows], std)
    if args.algorithm == "ppo":
        losses = ppo_loss(log_probs, old_log_probs, advantages, clip_range)
    elif args.algorithm == "reinforce":
        losses = reinforce_loss(log_probs, advantages)
    elif args.algorithm == "trpo":
        losses = trpo_loss(log_probs, old_log_probs, advantages, kl_old / elements, state.beta)
    else:
        losses = sac_loss(policy.fresh_values(rows, mean, std, path)) / elements
    ratio = torch.exp(log_probs - old_log_probs)
    measured = {
        "kl_old": kl_old,
        "clip_fraction_above": (ratio > 1 + clip_range).float(),
        "clip_fraction_below": (ratio < 1 - clip_range).float(),
        "ratio": ratio,
    }
    if reference is not None:  # per latent element, as the log-probs are
        measured["kl_reference"] = gaussian_kl(mean, reference, std)
        losses = losses + args.kl_coef * measured["kl_reference"] / elements
    return losses, {"loss": losses.detach()} | {name: value.detach() for name, value in measured.items()}


def update_policy(state, cache, transitions, advantages, args, epoch: int, ranks: Ranks) -> dict[str, float]:
    """
    Passes over the epoch's transitions, each in `updates_per_epoch` optimizer updates.

    Args:
        transitions: this rank's.
        advantages: `(samples_per_epoch,)` of all ranks.

    Returns:
        metrics, the same on all ranks.
    """
    policy = Policy(state, cache, transitions, args)
    count = args.samples_per_epoch * args.trained_steps
    metrics, norms, measured = {}, [], []
    if args.algorithm == "sac":
        metrics["critic_loss"] = fit_critic(policy, advantages, (args.seed, epoch), count, ranks)
    updates = list(itertools.product(range(args.num_inner_epochs), range(args.updates_per_epoch)))
    for inner_epoch, update in tqdm(updates, desc="training", leave=False, disable=quiet(ranks.accelerator)):
        path = (args.seed, "update", epoch, inner_epoch)
        order = torch.randperm(count, generator=seeded(*path)).numpy()
        ids = np.array_split(order, args.updates_per_epoch)[update]
        batches = local_batches(transitions, ids, args.train_batch_size)
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        with ranks.stage("Training"):
            for rows in batches:
                ranks.poll()
                with state.accelerator.autocast():
                    losses, measurements = policy_losses(policy, rows, advantages, args.clip_range, path)
                if not losses.isfinite().all():
                    raise RuntimeError(f"a loss is not finite, of samples {transitions.samples[rows].tolist()}")
                state.accelerator.backward(losses.sum() / len(ids))
                measured.append(measurements)
        if not norms:
            metrics |= check_ratio(measured, args, ranks)
        norms.append(optimizer_step(state, args, ranks))
        if args.algorithm == "trpo":
            metrics["kl_after_update"] = policy.mean_kl(batches, ranks)
            if metrics["kl_after_update"] > 2 * args.target_kl:
                break
    if args.algorithm == "trpo":
        metrics["beta"] = state.beta = adapt_beta(state.beta, metrics["kl_after_update"], args.target_kl)
    if not args.kl_coef:  # not in the loss, hence measured on a few transitions
        before = state.local_evaluations
        metrics["kl_reference"] = policy.mean_kl([rows[:8] for rows in batches[:1]], ranks, to_reference=True)
        state.local_evaluations = before
    # Without the updates that fp16 overflowed in, which were skipped
    metrics["grad_norm"] = float(np.mean([norm for norm in norms if math.isfinite(norm)] or math.nan))
    metrics["learning_rate"] = state.lr_scheduler.get_last_lr()[0]
    names = ["loss", "kl_old", "clip_fraction_above", "clip_fraction_below"] + ["kl_reference"] * bool(args.kl_coef)
    return metrics | summarise(measured, names, ranks) | {"ratio_deviation_max": largest_deviation(measured, ranks)}


def summarise(measured: list[dict], names: list[str], ranks: Ranks) -> dict[str, float]:
    """Means of some measurements over all ranks' transitions."""
    sums = [sum((m[name].sum().cpu() for m in measured), torch.zeros(())) for name in names]
    count = torch.tensor(float(sum(len(m["loss"]) for m in measured)))
    totals = ranks.sum(torch.stack([count, *sums]))
    return {name: (total / totals[0]).item() for name, total in zip(names, totals[1:])}


def largest_deviation(measured: list[dict], ranks: Ranks) -> float:
    """The largest |ratio - 1| of all ranks."""
    local = torch.cat([torch.ones(1)] + [m["ratio"].cpu() for m in measured]).sub(1).abs().max()
    return ranks.accelerator.gather(local.to(ranks.accelerator.device)).max().item()


def check_ratio(measured: list[dict], args: argparse.Namespace, ranks: Ranks) -> dict[str, float]:
    """Before any update the policy is the one that sampled: in float32 the ratio must be 1. What was measured of it."""
    deviation, tolerance = largest_deviation(measured, ranks), RATIO_TOLERANCE
    if ranks.accelerator.device.type != "cpu":  # where kernels, and so the rounding, may differ between batch sizes
        tolerance = max(tolerance, args.clip_range / 10)
    if args.mixed_precision == "no" and not args.allow_tf32 and deviation > tolerance:
        raise RuntimeError(
            f"before the first update a ratio differs from 1 by {deviation:.1e} (at most {tolerance:.0e} is rounding):"
            " sampling and training do not compute the same policy. Please report this."
        )
    means = summarise(measured, ["ratio", "kl_old"], ranks)
    return {"ratio_mean_start": means["ratio"], "ratio_deviation_start": deviation, "kl_start": means["kl_old"]}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: held-out images, fixed noise
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What a policy makes of the held-out images: images `(N, 3, H, W)` in [0, 1] and weighted rewards `(N,)`."""

    images: torch.Tensor | None
    rewards: torch.Tensor | None

    @property
    def mean(self) -> float:
        return self.rewards.mean().item()


def evaluate(
    state, cache, held_out, reward, args, ranks: Ranks, draws: int = 1, untouched: bool = False
) -> Evaluation:
    """
    Runs the pipeline as a user would (deterministic DDIM steps) with fixed start noise, shared out over the ranks.

    With several `draws` per image, the images and rewards are each image's best; `untouched` scores the inputs.
    """
    jobs = [(index, draw) for index in range(len(held_out)) for draw in range(draws)]
    own = ranks.share(len(jobs))
    rewards = torch.zeros(len(jobs))
    images = torch.zeros(len(jobs), 3, args.resolution, args.resolution) if draws == 1 else None
    scored = []
    device = state.accelerator.device
    with reward_thread(device) as executor, ranks.stage("Evaluation"), state.accelerator.autocast():
        for first in range(0, len(own), args.sample_batch_size):
            places = list(own[first : first + args.sample_batch_size])
            batch = [(held_out.load(jobs[place][0]), *jobs[place]) for place in places]
            prompts = [prompt for (_, prompt, _), _, _ in batch]
            if untouched:
                out = torch.stack([image for (image, _, _), _, _ in batch])
            else:
                out = state.pipe(
                    image=torch.cat([cache.latents(("held out", index), image) for (image, _, _), index, _ in batch]),
                    prompt_embeds=torch.cat([cache.embeds(prompt) for prompt in prompts]),
                    negative_prompt_embeds=cache.negative_embeds(len(batch), args),
                    strength=args.strength,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    guidance_rescale=args.guidance_rescale,
                    generator=[seeded(args.seed, "evaluation", index, draw) for _, index, draw in batch],
                    output_type="pt",
                    callback_on_step_end=ranks.poll_callback,
                ).images.float()
            scored.append((places, executor.submit(reward, out, prompts, [row[2] for row, _, _ in batch])))
            if images is not None:
                images[places] = out.cpu()
        for places, future in scored:
            rewards[places] = reward.total(wait_for(future, ranks)).float()
    rewards = ranks.sum(rewards).cpu()
    images = ranks.sum(images).cpu() if images is not None else None
    return Evaluation(images, rewards.view(-1, draws).max(dim=1).values)


def evaluate_baselines(state, cache, held_out, reward, args, ranks: Ranks) -> dict[str, Evaluation]:
    """What training has to beat: the input left alone, the model without LoRA, and the best of K draws of it."""
    run = partial(evaluate, state, cache, held_out, reward, args, ranks)
    with state.reference_policy():
        return {"identity": run(untouched=True), "base": run(), "best_of_k_base": run(draws=args.group_size)}


# ---------------------------------------------------------------------------------------------------------------------
# Files that a run leaves: metrics, curve, pictures
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary path)`, then renames: a reader, or a crash, never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


def write_metrics(history: list[dict], path: Path) -> None:
    """metrics.csv: a row per epoch, a column per metric, empty where an epoch has none."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(history)))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def write_reward_curve(history: list[dict], path: Path) -> None:
    """reward_curve.png: training reward, and held-out reward beside the baselines, over samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    samples = [row["samples"] for row in history]
    mean = np.array([row["reward_mean"] for row in history])
    std = np.array([row["reward_std"] for row in history])
    axes.plot(samples, mean, color="tab:blue", alpha=0.6, label="training samples (with noise)")
    axes.fill_between(samples, mean - std, mean + std, color="tab:blue", alpha=0.12, linewidth=0)
    evaluated = [row for row in history if "heldout_trained" in row]
    if evaluated:
        axes.plot(
            [r["samples"] for r in evaluated],
            [r["heldout_trained"] for r in evaluated],
            "o-",
            color="tab:green",
            label="held-out: trained",
        )
        for name, style in (("base", "--"), ("identity", ":"), ("best_of_k_base", "-.")):
            axes.axhline(evaluated[-1][f"heldout_{name}"], color="grey", linestyle=style, label=f"held-out: {name}")
    axes.set_xlabel("samples")
    axes.set_ylabel("reward")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def write_history(history: list[dict], args: argparse.Namespace) -> None:
    """Metrics and curve; nothing before the first epoch."""
    if history:
        write_atomically(Path(args.output_dir, "metrics.csv"), partial(write_metrics, history))
        write_atomically(Path(args.output_dir, "reward_curve.png"), partial(write_reward_curve, history))


def write_pictures(rows: dict[str, Evaluation], path: Path, count: int = 8) -> None:
    """A grid of held-out images, a row per policy, with each image's reward and each row's mean."""
    from matplotlib.figure import Figure

    count = min(count, len(next(iter(rows.values())).images))
    figure = Figure(figsize=(1.5 * count + 1, 1.75 * len(rows)), layout="constrained")
    for (title, evaluation), axes in zip(rows.items(), figure.subplots(len(rows), count, squeeze=False)):
        for i, axis in enumerate(axes):
            axis.imshow(evaluation.images[i].permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set(xticks=[], yticks=[], frame_on=False)
            if evaluation.rewards is not None:
                axis.set_title(f"{evaluation.rewards[i]:.2f}", fontsize=8)
        mean = "" if evaluation.rewards is None else f"\nmean {evaluation.mean:.2f}"
        axes[0].set_ylabel(title + mean)
    figure.savefig(path, dpi=100)


def write_lora(snapshot, path: Path) -> None:
    """The LoRA, as stock diffusers loads it with `load_lora_weights`."""
    StableDiffusionImg2ImgDDPOPipeline.save_lora_weights(
        path.parent, unet_lora_layers=snapshot.lora, weight_name=path.name, **snapshot.lora_metadata
    )


def last_evaluated(history: list[dict]) -> dict | None:
    """The metrics of the last epoch with a held-out evaluation."""
    return next((row for row in reversed(history) if "heldout_trained" in row), None)


def verdict(history: list[dict]) -> str:
    """What there is to say of the last held-out evaluation if the LoRA lost to doing nothing or to the base model."""
    last = last_evaluated(history)
    if last is None or last["heldout_trained"] > max(last["heldout_identity"], last["heldout_base"]):
        return ""
    return "On the held-out images the LoRA is no better than leaving the input alone or than the base model."


def held_out_table(history: list[dict], group_size: int) -> str:
    """Markdown: the last held-out evaluation beside what it has to beat, and its pictures."""
    last = last_evaluated(history)
    if last is None:
        return "The run had no held-out images."
    labels = {
        "heldout_identity": "input left alone (identity)",
        "heldout_base": "base model",
        "heldout_best_of_k_base": f"base model, best of {group_size} draws",
        "heldout_trained": "**base model with this LoRA**",
    }
    lines = ["| held-out images | mean reward |", "|---|---|"]
    lines += [f"| {label} | {last[key]:.4f} |" for key, label in labels.items()]
    pictures = f"![input, base and trained](samples/epoch-{last['epoch']:04d}.png)"
    return "\n".join(lines) + f"\n\n{verdict(history)}\n\n{pictures}"


def write_model_card(args: argparse.Namespace, history: list[dict], repo_id: str, path: Path) -> None:
    """README.md: what was trained, held-out results, the pictures, and how to use it."""
    model = args.pretrained_model_name_or_path
    tags = "stable-diffusion stable-diffusion-diffusers image-to-image lora ddpo diffusers-training"
    data = huggingface_hub.ModelCardData(
        base_model=None if Path(model).exists() else model,  # the Hub refuses a local path here
        library_name="diffusers",
        inference=True,
        tags=tags.split(),
    )
    settings = {k: v for k, v in vars(args).items() if k in CARD_SETTINGS}
    prompt = args.prompt if args.prompt is not None else "a caption like those of the training images"
    call = ", ".join(f"{k}={settings[k]}" for k in ("strength", "num_inference_steps", "guidance_scale"))
    card = f"""---
{data.to_yaml()}
---

# {repo_id}

A LoRA for image-to-image Stable Diffusion, trained with DDPO (`{args.algorithm}`) on the reward `{args.reward_fn}`
for {history[-1]["epoch"] if history else 0} epochs ({history[-1]["samples"] if history else 0} samples).

## Results

{held_out_table(history, args.group_size)}

![reward curve](reward_curve.png)

## Use

```python
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image
pipe = StableDiffusionImg2ImgPipeline.from_pretrained("{model}")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
pipe.load_lora_weights("{repo_id}")
image = pipe({prompt!r}, load_image("input.png"), {call}).images[0]
```

## Training

```json
{json.dumps(settings, indent=2)}
```
"""
    path.write_text(card, encoding="utf-8")


CARD_SETTINGS = (
    "algorithm advantage reward_fn strength num_inference_steps guidance_scale guidance_rescale eta sde_window"
    " train_tail independent_start_noise samples_per_epoch group_size updates_per_epoch num_inner_epochs clip_range"
    " kl_coef learning_rate rank lora_alpha lora_layers ema_decay resolution seed"
).split()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: JSON and safetensors, written aside and renamed
# ---------------------------------------------------------------------------------------------------------------------

# Not options, but found out from them
DERIVED = ("trained_steps", "training_images", "training_data", "base_weights")
# Arguments that a resumed run may change; any other would make it a different run
FREE_ON_RESUME = (
    "demo dry_run output_dir overwrite_output_dir cache_dir num_train_epochs gradient_checkpointing sample_batch_size"
    " train_batch_size report_to logging_dir checkpointing_epochs checkpoints_total_limit resume_from_checkpoint"
    " validation_epochs push_to_hub hub_model_id hub_token reward_batch_size reward_timeout"
).split()


@dataclass
class Snapshot:
    """The state between two epochs, copied: what a checkpoint holds."""

    epoch: int  # epochs completed
    tensors: dict[str, torch.Tensor]
    values: dict
    lora: dict[str, torch.Tensor]
    lora_metadata: dict


def optimizer_state(name: str, optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's `state_dict` as tensors for safetensors and values for JSON."""
    saved = optimizer.state_dict()
    tensors, values = {}, {"param_groups": saved["param_groups"], "state": {}}
    for index, entries in saved["state"].items():
        nested = [value for value in entries.values() if isinstance(value, dict)]  # bitsandbytes wraps its tensors
        for key, value in itertools.chain(entries.items(), *(part.items() for part in nested)):
            if torch.is_tensor(value):
                tensors[f"{name}.{index}.{key}"] = value
            elif not isinstance(value, dict):
                values["state"].setdefault(str(index), {})[key] = value
    return tensors, values


def load_optimizer_state(name: str, optimizer, tensors: dict[str, torch.Tensor], values: dict) -> None:
    """The reverse of `optimizer_state`."""
    state = {int(index): dict(entries) for index, entries in values["state"].items()}
    for key, tensor in tensors.items():
        if key.startswith(f"{name}."):
            index, entry = key[len(name) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def take_snapshot(state: TrainState, args: argparse.Namespace, epoch: int) -> Snapshot:
    """Copies the state to the CPU."""
    tensors = {f"lora.{name}": parameter for name, parameter in state.parameters.items()}
    optimizer_tensors, optimizer_values = optimizer_state("optimizer", state.optimizer)
    tensors |= optimizer_tensors
    values = {
        "epoch": epoch,
        "args": {k: v for k, v in vars(args).items() if k != "hub_token"},
        "optimizer": optimizer_values,
        "lr_scheduler_steps": state.lr_scheduler.last_epoch,
        "trackers": [tracker.rewards for tracker in state.trackers],
        "beta": state.beta,
        "samples": state.samples,
        "unet_evaluations": state.unet_evaluations,
        "history": state.history,
    }
    if state.accelerator.scaler is not None:
        values["scaler"] = state.accelerator.scaler.state_dict()
    if state.ema is not None:
        values["ema_steps"] = state.ema.optimization_step
        tensors |= {f"ema.{i}": shadow for i, shadow in enumerate(state.ema.shadow_params)}
    if state.critic is not None:
        critic_tensors, values["critic_optimizer"] = optimizer_state("critic_optimizer", state.critic_optimizer)
        tensors |= critic_tensors
        tensors |= {f"critic.{k}": v for k, v in state.critic.state_dict().items()}
        tensors |= {f"target_critic.{k}": v for k, v in state.target_critic.state_dict().items()}
    with state.evaluated_weights():
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(state.pipe.unet))
        lora = {name: tensor.detach().cpu().clone() for name, tensor in lora.items()}
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    bad = [name for name, tensor in copies.items() if not tensor.isfinite().all()]
    if bad:
        raise RuntimeError(f"after epoch {epoch} {len(bad)} tensors are not finite, such as {bad[0]}: lower the step.")
    metadata = _collate_lora_metadata({"unet": state.pipe.unet})
    return Snapshot(epoch, copies, json.loads(json.dumps(values)), lora, metadata)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remove(path: Path) -> None:
    """Deletes what is there: a folder, a file, a link or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def save_checkpoint(snapshot: Snapshot, args: argparse.Namespace) -> Path:
    """
    Writes checkpoint-<epoch>: aside, complete and synchronised, then renamed. Only then are old ones deleted.

    Main process only. An error leaves the checkpoints that were there as they were.
    """
    output_dir = Path(args.output_dir)
    folder, aside = output_dir / f"checkpoint-{snapshot.epoch}", output_dir / f".checkpoint-{snapshot.epoch}.tmp"
    for leftover in output_dir.glob(".checkpoint-*.tmp"):  # of a run that was killed while it saved
        remove(leftover)
    aside.mkdir(parents=True)
    try:
        write_lora(snapshot, aside / LORA)
        save_file(snapshot.tensors, aside / "training_state.safetensors")
        (aside / "training_state.json").write_text(json.dumps(snapshot.values))
        checksums = {path.name: sha256(path) for path in sorted(aside.iterdir())}
        (aside / "sha256.json").write_text(json.dumps(checksums, indent=2))
        for path in aside.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        remove(folder)  # of an earlier run of the same epoch, or damaged
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    # Newer ones are damaged, or of a run that was continued from an older one: they do not count, nor are they deleted
    kept = [p for p in list_checkpoints(output_dir) if checkpoint_epoch(p) <= snapshot.epoch and not p.is_symlink()]
    for old in kept[args.checkpoints_total_limit :]:
        shutil.rmtree(old)
    return folder


def checkpoint_epoch(folder: Path) -> int:
    """N of checkpoint-N."""
    return int(folder.name.rpartition("-")[2])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    folders = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name) and p.is_dir()]
    return sorted(folders, key=checkpoint_epoch, reverse=True)


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and values of a checkpoint whose files are whole; any damage raises."""
    checksums = json.loads((folder / "sha256.json").read_text())
    for name in (LORA, "training_state.safetensors", "training_state.json"):
        if sha256(folder / name) != checksums[name]:
            raise ValueError(f"{name} is damaged")
    values = json.loads((folder / "training_state.json").read_text())
    return load_file(folder / "training_state.safetensors"), values


def find_checkpoint(args: argparse.Namespace) -> tuple[Path, dict[str, torch.Tensor], dict] | None:
    """The checkpoint to resume from: the newest that is whole, with a warning about those that are not."""
    if args.resume_from_checkpoint is None:
        return None
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        candidates = list_checkpoints(output_dir)
        there = [name for name in RESULTS if (output_dir / name).exists()]
        if not candidates and (LORA in there or there and "args.json" not in there):  # finished, or of something else
            raise InputError(
                f"--resume_from_checkpoint=latest: {output_dir} has {', '.join(there)} but no checkpoint to continue"
                " from: choose another --output_dir, or --overwrite_output_dir without --resume_from_checkpoint."
            )
        if not candidates:
            print_once(f"--resume_from_checkpoint=latest: no checkpoint in {output_dir}, starting a new run.")
            return None
    else:
        named = Path(args.resume_from_checkpoint)
        candidates = [named if named.is_dir() else output_dir / named.name]
        if not candidates[0].is_dir():
            names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
            raise InputError(f"--resume_from_checkpoint={named}: no such folder; {output_dir} has {names}.")
    for folder in candidates:
        try:
            found = folder, *read_checkpoint(folder)
        except Exception as e:
            print_once(f"Warning: {folder} cannot be read ({type(e).__name__}: {e}).")
            continue
        check_resumable(args, folder, found[2])
        return found
    raise InputError(
        f"--resume_from_checkpoint={args.resume_from_checkpoint}: none of {', '.join(p.name for p in candidates)} can"
        " be read. Use another --output_dir or --overwrite_output_dir to start again."
    )


def agree_on_checkpoint(args: argparse.Namespace, accelerator: Accelerator):
    """The main process's `find_checkpoint`, or its `InputError`, for all ranks, which may not share a disk."""
    found = None
    if accelerator.is_main_process:
        try:
            found = find_checkpoint(args)
        except InputError as e:
            found = e
    found = broadcast_object_list([found])[0]
    if isinstance(found, InputError):
        raise found
    return found


def check_resumable(args: argparse.Namespace, folder: Path, values: dict) -> None:
    """Raises an `InputError` that names the arguments which differ from the checkpoint's."""
    fixed = set(vars(args)) - set(FREE_ON_RESUME)
    if not args.lr_scheduler.startswith("constant"):
        fixed.add("num_train_epochs")  # the schedule's length
    now = json.loads(json.dumps({name: getattr(args, name) for name in fixed}))
    different = [
        f"{'' if name in DERIVED else '--'}{name}={now[name]} (was {values['args'][name]})"
        for name in sorted(fixed)
        if name in values["args"] and values["args"][name] != now[name]
    ]
    if different:
        raise InputError(
            f"{folder} is of a run with other settings: {', '.join(different)}. Give the same ones, or start a new run"
            " in another --output_dir."
        )


def restore(state: TrainState, tensors: dict[str, torch.Tensor], values: dict) -> int:
    """Loads a checkpoint into the state; returns the number of epochs that are completed."""
    for name, parameter in state.parameters.items():
        if f"lora.{name}" not in tensors or tensors[f"lora.{name}"].shape != parameter.shape:
            raise InputError(f"--resume_from_checkpoint: {name} of the model does not fit: was the model exchanged?")
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(tensors[f"lora.{name}"])
        if state.ema is not None:
            state.ema.optimization_step = values["ema_steps"]
            for i, shadow in enumerate(state.ema.shadow_params):
                shadow.copy_(tensors[f"ema.{i}"])
    load_optimizer_state("optimizer", state.optimizer, tensors, values["optimizer"])
    state.lr_scheduler.last_epoch = values["lr_scheduler_steps"]
    state.lr_scheduler._last_lr = [group["lr"] for group in state.optimizer.param_groups]
    if state.accelerator.scaler is not None:
        state.accelerator.scaler.load_state_dict(values["scaler"])
    if state.critic is not None:
        load_optimizer_state("critic_optimizer", state.critic_optimizer, tensors, values["critic_optimizer"])
        for name in ("critic", "target_critic"):
            part = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
            getattr(state, name).load_state_dict(part)
    for tracker, rewards in zip(state.trackers, values["trackers"]):
        tracker.rewards = rewards
    state.beta, state.samples = values["beta"], values["samples"]
    state.unet_evaluations, state.history = values["unet_evaluations"], values["history"]
    return values["epoch"]


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def print_once(message: str) -> None:
    """Prints on the main process, above progress bars."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):  # the terminal was closed
            tqdm.write(message)


def quiet(accelerator: Accelerator) -> bool | None:
    """tqdm's `disable`: bars on the main process only, and only on a terminal."""
    return None if accelerator.is_main_process else True


def start(args: argparse.Namespace) -> Ranks:
    """Accelerator, trackers, precision and logging."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # a reward may be slow on one rank
    )
    args.mixed_precision = accelerator.mixed_precision
    if args.demo and accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # on a model this small several threads only wait for each other
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    datasets.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    for library in (datasets.utils.logging, transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
    # collecting the imported libraries on the way out would take seconds, which a stopped run may not have
    gc.freeze()
    return Ranks(accelerator)


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> StableDiffusionImg2ImgDDPOPipeline:
    """The frozen model in the precision of the run, with a DDIM scheduler that has a density."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    try:
        pipe = StableDiffusionImg2ImgDDPOPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as e:
        raise InputError(f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}: {e}") from e
    # A few numbers of each tensor tell another model in the same place; a resumed run must have the same
    sample = torch.cat([p.detach().flatten()[:16].float() for p in pipe.unet.parameters()])
    args.base_weights = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    unet = pipe.unet.config
    if unet.in_channels != pipe.vae.config.latent_channels or unet.time_cond_proj_dim or unet.addition_embed_type:
        raise InputError(
            f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path} is not of the kind of Stable"
            " Diffusion 1.x or 2.x: inpainting, LCM and SDXL models cannot be trained."
        )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe.to(accelerator.device)


def resolve(args: argparse.Namespace, pipe, data: ImagePrompts, schedule: Schedule) -> None:
    """Fills in the arguments that depend on model and data."""
    if args.guidance_scale > 1 and not any(data.prompts):
        print_once(
            f"Every prompt is empty: guidance (--guidance_scale={args.guidance_scale},"
            f" --guidance_rescale={args.guidance_rescale}) is off."
        )
        args.guidance_scale = 1.0
    elements = pipe.unet.config.in_channels * (args.resolution // pipe.vae_scale_factor) ** 2
    if args.clip_range is None:
        args.clip_range = math.sqrt(2 * TRUST_REGION_NATS) / elements
    if args.updates_per_epoch > args.samples_per_epoch * schedule.window:
        raise InputError(
            f"--updates_per_epoch={args.updates_per_epoch} is more than the {args.samples_per_epoch * schedule.window}"
            " transitions of an epoch: lower it, or raise --samples_per_epoch or --sde_window."
        )
    args.trained_steps = schedule.window  # a resumed run must have the same


def describe(args, data, held_out, schedule: Schedule, state: TrainState) -> str:
    """The run in plain words."""
    processes = state.accelerator.num_processes
    guidance = 2 if args.guidance_scale > 1 else 1
    steps, groups = len(schedule.timesteps), args.samples_per_epoch // args.group_size
    starts = schedule.trainable - schedule.window + 1
    shared = 0 if args.independent_start_noise else (starts + 1) / 2  # steps that a group computes once, on average
    sampling = guidance * (groups * shared + args.samples_per_epoch * (steps - shared))
    training = guidance * TRAIN_ROW_COST * args.samples_per_epoch * schedule.window * args.num_inner_epochs
    transitions = args.samples_per_epoch * schedule.window
    accumulation = math.ceil(transitions / args.updates_per_epoch / processes / args.train_batch_size)
    trainable = sum(p.numel() for p in state.parameters.values())
    where = "at a place drawn per group" if schedule.window < schedule.trainable else "all that can be trained"
    device, updates = state.accelerator.device.type, args.num_inner_epochs * args.updates_per_epoch
    lines = {
        "run": f"{args.algorithm}, reward {args.reward_fn}, {processes} process(es), {device},"
        f" precision {args.mixed_precision}",
        "model": args.pretrained_model_name_or_path,
        "images": f"{len(data)} to train on, {len(held_out)} held out, at {args.resolution} px",
        "epoch": f"{args.samples_per_epoch} samples: {groups} groups of {args.group_size} of one image and prompt",
        "steps": f"{steps} run of {args.num_inference_steps} (strength {args.strength}): {schedule.window} stochastic"
        f" and trained, {where}, {steps - schedule.trainable} in the untrained tail",
        "updates": f"{updates} per epoch, each on {transitions // args.updates_per_epoch} transitions:"
        f" {args.train_batch_size} per device at once, gradients accumulated over about {accumulation}",
        "LoRA": f"{trainable:,} trainable parameters, rank {args.rank}, in {args.lora_layers}",
        "cost": f"about {sampling + training:,.0f} UNet evaluations per epoch: {sampling:,.0f} rows in sampling,"
        f" {training:,.0f} in training (a trained row counts {TRAIN_ROW_COST})",
        "trust": f"clip range {args.clip_range:.2e}, guidance {args.guidance_scale if guidance == 2 else 'off'}",
    }
    return "\n" + "\n".join(f"  {name:<9}{text}" for name, text in lines.items()) + "\n"


def warn_if_hopeless(args: argparse.Namespace, metrics: dict) -> None:
    """Says so, with the remedy, when an epoch cannot have taught anything."""
    if args.advantage == "group" and metrics["reward_group_std"] == 0:
        remedy = "raise --group_size" if args.group_size > 1 else "--group_size=1 has nothing to compare: use 8"
        print_once(
            f"Warning: all rewards within each group are equal, nothing was learnt: {remedy}, or use a finer reward."
        )
    elif metrics["reward_std"] == 0:
        print_once("Warning: all rewards are equal, nothing was learnt: use a finer reward.")
    in_this_precision = (
        "Warning: in this precision sampling and training differ by more than the {} before any update: use"
        " --mixed_precision=no, or fp16 instead of bf16, or a lower --guidance_scale."
    )
    if args.algorithm == "ppo" and metrics["ratio_deviation_start"] > args.clip_range:
        print_once(in_this_precision.format(f"clip range {args.clip_range:.1e}"))
    if args.algorithm == "trpo" and metrics["kl_start"] > args.target_kl:
        print_once(in_this_precision.format(f"--target_kl={args.target_kl}"))
    if metrics.get("beta", 0) > 1000:
        print_once("Warning: the KL stays above --target_kl whatever its weight: lower --learning_rate or raise it.")
    if args.algorithm == "ppo" and metrics["clip_fraction_above"] + metrics["clip_fraction_below"] > 0.9:
        print_once("Warning: nearly all ratios are clipped: lower --learning_rate or raise --clip_range.")


def run_epoch(state, cache, train_data, reward, schedule, args, epoch: int, ranks: Ranks) -> dict:
    """One rollout and its updates; returns the epoch's metrics, the same on all ranks."""
    groups, transitions, rewards = collect(state.pipe, cache, train_data, reward, schedule, args, epoch, ranks)
    keys = [f"{g.row}{' flipped' if g.flip else ''}|{train_data.prompts[g.row]}" for g in groups]
    keys = [key for key in keys for _ in range(args.group_size)]
    advantages = compute_advantages(rewards, args.advantage, args.group_size, state.trackers, keys)
    update_metrics = update_policy(state, cache, transitions, reward.total(advantages), args, epoch, ranks)

    state.samples += args.samples_per_epoch
    state.unet_evaluations += int(ranks.sum(torch.tensor(float(state.local_evaluations))).item())
    state.local_evaluations = 0
    total = reward.total(rewards)
    spread = total.view(-1, args.group_size).std(dim=1, unbiased=False)
    metrics = {
        "epoch": epoch + 1,
        "samples": state.samples,
        "unet_evaluations": state.unet_evaluations,
        "reward_mean": total.mean().item(),
        "reward_std": total.std(unbiased=False).item(),
        "reward_min": total.min().item(),
        "reward_max": total.max().item(),
        "reward_group_std": spread.mean().item(),
        "zero_variance_groups": int((spread == 0).sum()),
    }
    if len(reward.components) > 1:
        for component, values in zip(reward.components, rewards):
            metrics[f"reward_mean/{component.name}"] = values.mean().item()
            metrics[f"reward_std/{component.name}"] = values.std(unbiased=False).item()
    return metrics | reward.take_info() | update_metrics


def finish_epoch(state, cache, held_out, reward, baselines, args, epoch: int, metrics: dict, ranks: Ranks) -> None:
    """Evaluates if it is time, then logs and writes what can be looked at."""
    trained, text = None, ""
    if baselines and ((epoch + 1) % args.validation_epochs == 0 or epoch + 1 == args.num_train_epochs):
        before = state.local_evaluations
        with state.evaluated_weights():
            trained = evaluate(state, cache, held_out, reward, args, ranks)
        state.local_evaluations = before
        metrics |= {f"heldout_{name}": evaluation.mean for name, evaluation in baselines.items()}
        metrics["heldout_trained"] = trained.mean
        text = ", held-out {heldout_trained:.4g} (identity {heldout_identity:.4g}, base {heldout_base:.4g})"
    state.history.append(metrics)
    warn_if_hopeless(args, metrics)
    print_once(("epoch {epoch}: reward {reward_mean:.4g} +- {reward_std:.3g}" + text).format(**metrics))
    with ranks.stage("Writing metrics and pictures"):
        state.accelerator.log({k: v for k, v in metrics.items() if k != "epoch"}, step=state.samples)
        if state.accelerator.is_main_process and not args.dry_run:
            write_history(state.history, args)
            if trained:
                rows = {"input": baselines["identity"], "base": baselines["base"], "trained": trained}
                show_pictures(rows, held_out, state, Path(args.output_dir, "samples", f"epoch-{epoch + 1:04d}.png"))


def show_pictures(rows: dict[str, Evaluation], held_out: ImagePrompts, state: TrainState, path: Path) -> None:
    """Writes the grid of held-out pictures, with the clean ones if the data has them, and hands it to the tracker."""
    if "target" in held_out.image_columns:
        targets = [held_out.load(index)[2]["target"] for index in range(len(held_out))]
        rows = {**rows, "target": Evaluation(torch.stack(targets), None)}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(write_pictures, rows))
    for tracker in state.accelerator.trackers:
        if not hasattr(tracker, "log_images"):  # comet_ml has its own way
            continue
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        grid = np.asarray(Image.open(path).convert("RGB"))
        tracker.log_images({"held out": grid[None]}, step=state.samples, **options)


def prepare_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Creates the folder, deletes an earlier run's files if that was asked for, and writes args.json."""
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        if args.overwrite_output_dir and not args.resume_from_checkpoint:
            for path in list_checkpoints(output_dir) + [output_dir / "samples", output_dir / args.logging_dir]:
                shutil.rmtree(path, ignore_errors=True)
            for name in RESULTS:
                (output_dir / name).unlink(missing_ok=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        shown = {k: v for k, v in sorted(vars(args).items()) if k != "hub_token"}
        (output_dir / "args.json").write_text(json.dumps(shown, indent=2))
    if args.report_to is not None:
        scalars = {k: v for k, v in vars(args).items() if k != "hub_token" and isinstance(v, (int, float, str, bool))}
        folder = output_dir / args.logging_dir
        folder.mkdir(exist_ok=True, parents=True)
        accelerator.init_trackers("img2img-ddpo", config=scalars, init_kwargs={"wandb": {"dir": str(folder)}})


def create_repository(args: argparse.Namespace) -> str:
    """The repository's id; with `--push_to_hub` it is created now, when a wrong token still costs nothing."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    if not args.push_to_hub or int(os.environ.get("RANK", 0)) != 0:
        return name
    try:
        repo_id = huggingface_hub.create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        huggingface_hub.auth_check(repo_id, token=args.hub_token, write=True)  # it may exist and be another's
        return repo_id
    except Exception as e:
        raise InputError(
            f"--push_to_hub: cannot create or reach the repository --hub_model_id={name}: {type(e).__name__}: {e}"
            " Log in with `hf auth login`, give a --hub_token that can write, or drop --push_to_hub."
        ) from e


def push(args: argparse.Namespace, repo_id: str) -> None:
    """Uploads the result; a failure leaves it complete here and says how to try again."""
    ignored = ("checkpoint-*", ".*", f"{args.logging_dir}/*")
    again = " ".join([f"hf upload {repo_id} {args.output_dir} ."] + [f'--exclude "{pattern}"' for pattern in ignored])
    print_once(
        f"Uploading to {repo_id}. Should that be interrupted, everything is complete here; try again with\n    {again}"
    )
    try:
        huggingface_hub.upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=list(ignored), token=args.hub_token,
            commit_message="DDPO LoRA",
        )  # fmt: skip
        print_once(f"Uploaded to {repo_id}.")
    except Exception as e:
        raise RuntimeError(
            f"the upload failed ({type(e).__name__}: {e}). Everything is complete in {args.output_dir}; try again with"
            f"\n    {again}"
        ) from e


def save_result(snapshot: Snapshot, args: argparse.Namespace, repo_id: str) -> None:
    """The LoRA, its model card and the metrics that belong to it."""
    output_dir = Path(args.output_dir)
    history = snapshot.values["history"]
    write_atomically(output_dir / LORA, partial(write_lora, snapshot))
    write_atomically(output_dir / "README.md", partial(write_model_card, args, history, repo_id))
    write_history(
        history, args
    )  # which may be of a run that went further, if this one was resumed from an older epoch


def main(argv: list[str] | None = None) -> None:
    """The table of contents."""
    # 1. Everything that can be wrong is found before a model loads
    args = parse_args(argv)
    ranks = start(args)
    accelerator = ranks.accelerator
    reward = Reward(args, accelerator.device)
    train_data, held_out = load_data(args)
    reward.check(train_data, held_out)
    repo_id = create_repository(args)

    # 2. Model, LoRA, optimizer; a checkpoint
    pipe = load_pipeline(args, accelerator)
    schedule = plan_schedule(pipe, args)
    resolve(args, pipe, train_data, schedule)
    checkpoint = agree_on_checkpoint(args, accelerator)
    state = make_state(pipe, args, accelerator, reward)
    first_epoch = 0
    if checkpoint is not None:
        first_epoch = restore(state, *checkpoint[1:])
        print_once(f"Resuming from {checkpoint[0]}: {first_epoch} epochs are completed.")
    prepare_output_dir(args, accelerator)
    accelerator.wait_for_everyone()
    cache = ConditionCache(pipe)
    print_once(describe(args, train_data, held_out, schedule, state))

    # 3. Epochs: rollout, rewards, advantages, updates; evaluation and files; a checkpoint
    ranks.graceful = True
    snapshot = take_snapshot(state, args, first_epoch)
    saved = first_epoch if checkpoint is not None else None
    epochs = tqdm(
        range(first_epoch, args.num_train_epochs), initial=first_epoch, total=args.num_train_epochs, desc="epochs",
        disable=quiet(accelerator),
    )  # fmt: skip
    try:
        baselines = evaluate_baselines(state, cache, held_out, reward, args, ranks) if len(held_out) else None
        state.local_evaluations = 0
        for epoch in epochs:
            metrics = run_epoch(state, cache, train_data, reward, schedule, args, epoch, ranks)
            epochs.set_postfix(reward=f"{metrics['reward_mean']:.4g}")
            finish_epoch(state, cache, held_out, reward, baselines, args, epoch, metrics, ranks)
            snapshot = take_snapshot(state, args, epoch + 1)
            if (epoch + 1) % args.checkpointing_epochs == 0 or epoch + 1 == args.num_train_epochs:
                with ranks.stage("Saving a checkpoint"):
                    if accelerator.is_main_process:
                        save_checkpoint(snapshot, args)
                    saved = epoch + 1
        epochs.close()

        # 4. The result
        with ranks.stage("Saving the result"):
            if accelerator.is_main_process:
                save_result(snapshot, args, repo_id)
                done = f"Done: {args.output_dir}/{LORA} {verdict(state.history)}"
                print_once("Dry run passed." if args.dry_run else done.rstrip())
        ranks.graceful = False  # all is saved, and an upload cannot be asked to stop
        with ranks.stage("Pushing to the Hub"):
            if accelerator.is_main_process and args.push_to_hub:
                push(args, repo_id)
    except BaseException as e:
        ranks.leaving = True
        epochs.close()
        try:
            if accelerator.is_main_process and saved != snapshot.epoch:
                save_checkpoint(snapshot, args)
        finally:
            ranks.wait_for_main()
        if not isinstance(e, Interrupted):
            raise
        advice = "" if args.dry_run else ", which are saved. Continue with --resume_from_checkpoint=latest"
        print_once(f"Stopped by signal {ranks.signal} after {snapshot.epoch} completed epochs{advice}.")
        ranks.limit_exit(10)
        sys.exit(128 + ranks.signal)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        rank = int(os.environ.get("RANK", 0))
        if rank:  # if the main process found the same, the launcher is about to end this one
            time.sleep(3)
        print(f"error on rank {rank}: {e}" if rank else f"error: {e}", flush=True)
        sys.exit(2)
