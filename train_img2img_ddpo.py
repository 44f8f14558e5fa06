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
"""Fine-tune a LoRA for image-to-image Stable Diffusion on any reward with reinforcement learning (DDPO).

    python train_img2img_ddpo.py --demo                     # bundled model and pictures, no download
    accelerate launch train_img2img_ddpo.py --train_data_dir my_pictures --reward_fn my_reward.py:reward \
        --mixed_precision fp16 --output_dir my-lora         # Stable Diffusion 1.5, one GPU or several

`main` holds an epoch from sampling to saving. The mathematics of a step is in pipeline_img2img_ddpo.py.
"""

import argparse
import ast
import base64
import copy
import functools
import glob
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple


# Hide the warnings about torchvision and about truncated captions
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars fill log files

import datasets
import huggingface_hub
import matplotlib
import numpy as np
import pandas as pd
import requests
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
from datasets.data_files import SPLIT_KEYWORDS, resolve_pattern
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import check_min_version, numpy_to_pil
from diffusers.utils.torch_utils import randn_tensor
from matplotlib.figure import Figure
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from requests.adapters import HTTPAdapter, Retry
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor, CLIPModel

from pipeline_img2img_ddpo import StableDiffusionImg2ImgDDPOPipeline, ddim_transition, gaussian_log_prob, predict_noise


check_min_version("0.40.0")
matplotlib.rcParams["text.parse_math"] = False  # a prompt may contain a dollar sign

# The KL per step, in nats, that the default clip range allows. This range is sqrt(2 * TRUST_REGION_NATS) /
# elements of the latents. At 512 px an image has 16384 of them, which gives DDPO's clip range of 1e-4.
TRUST_REGION_NATS = 1.34
# The tail: steps that end at a noise variance below this value. Their log-probabilities react 3 to 8 times as
# strongly to the UNet as those of the other steps, so they would dominate the gradient.
TAIL_VARIANCE = 0.01
TRAINED_EVALUATION_COST = 3  # UNet evaluations that a trained row counts for: 1 forward, 2 backward
# With this schedule every step can be stochastic
SCHEDULER = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LORA = "pytorch_lora_weights.safetensors"
GRID_COLUMNS = 8  # pictures in samples/epoch-*.png
# Kinds of held-out images and their labels. The column of a kind in metrics.csv is heldout_KIND, and {} is
# --group_size
KINDS = {
    "input": "input",
    "base": "base model",
    "best_of_k_base": "base model, best of {}",
    "trained": "with the LoRA",
}
DEMO = Path(__file__).resolve().parent / "tests" / "demo"
# Flags whose number must be above 0
MUST_BE_POSITIVE = """
    rank max_train_samples resolution strength num_inference_steps eta samples_per_epoch group_size clip_range
    target_kl num_train_epochs updates_per_epoch num_inner_epochs sample_batch_size train_batch_size
    learning_rate max_grad_norm validation_epochs checkpointing_epochs checkpoints_total_limit
""".split()
# Flags that may differ when a run is resumed
FREE_ON_RESUME = """
    demo dry_run output_dir cache_dir gradient_checkpointing sample_batch_size train_batch_size report_to
    validation_epochs checkpointing_epochs checkpoints_total_limit resume_from_checkpoint
    push_to_hub hub_model_id
""".split()
# Flags whose value may be a path of this machine
PATHS = """
    pretrained_model_name_or_path train_data_dir dataset_name output_dir cache_dir resume_from_checkpoint
""".split()


# ---- Arguments -----------------------------------------------------------------------------------
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of a flag unless it is None or False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags. The lists above name those with a rule for 0, a resume or a path."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="train_img2img_ddpo.py (--train_data_dir FOLDER | --dataset_name NAME | --demo) [options]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="Train the bundled tiny model on the bundled pictures.")
    add("--dry_run", action="store_true", help="Run one epoch and one evaluation, and keep nothing.")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", default=SD15, help="Stable Diffusion 1 or 2, Hub id or folder.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")
    add("--rank", type=int, default=4, help="Rank and alpha of the LoRA, typically 4 to 32.")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="Comma-separated UNet modules with a LoRA.")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="Folder of pictures, with captions in .txt files or in a metadata file.")
    add("--dataset_name", help="Dataset on the Hub, or a local folder or .parquet file.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--image_column", default="image", help="Column of the input images.")
    add("--caption_column", default="text", help="Column of the prompts.")
    add("--prompt", help="One prompt for all images. It replaces the captions.")
    add("--max_train_samples", type=int, help="Number of training images. By default all.")
    add("--num_validation_images", type=int, help="Held-out images. By default 8, but at most a third.")
    add("--resolution", type=int, default=512, help="Side of the cropped images, a multiple of 8.")
    add("--center_crop", action="store_true", help="Crop at the center instead of at random.")
    add("--random_flip", action="store_true", help="Flip half of the images horizontally.")
    add("--cache_dir", help="Folder for downloads of the model and the dataset.")

    add = parser.add_argument_group("policy").add_argument
    reward_help = f"{', '.join(REWARDS)}, each with '(option=value)'; file.py:function; http(s)://host/path."
    add("--reward_fn", nargs="+", default=["jpeg_compressibility"], metavar="REWARD", help=reward_help)
    add("--reward_weights", nargs="+", type=float, metavar="WEIGHT", help="One per reward. By default 1.")
    add("--algorithm", choices=["ppo", "reinforce", "trpo", "sac"], default="ppo", help="Policy objective.")
    add("--strength", "--noise_strength", type=float, default=0.4, help="Noise on the input, mostly .2 to .7.")
    add("--num_inference_steps", type=int, default=50, help="Steps at strength 1. Steps * strength are run.")
    add("--guidance_scale", type=float, default=5.0, help="Typically 3 to 8. Off at 1 or without prompts.")
    add("--guidance_rescale", type=float, default=0.0, help="Rescaling of the guided prediction, 0 to 1.")
    add("--eta", type=float, default=1.0, help="DDIM's eta of the stochastic step, at most 1, as in DDPM.")
    add("--samples_per_epoch", type=int, default=32, help="Images per epoch, a multiple of group size * GPUs.")
    add("--group_size", type=int, default=8, help="Samples of one input, which are compared with each other.")
    add("--finish_steps", type=int, default=2, help="Steps after the stochastic one. 0 runs all.")
    add("--all_steps", action="store_true", help="Plain DDPO: make every step stochastic and train it.")
    add("--train_tail", action="store_true", help="Also train the last steps, which add almost no noise.")
    advantage_help = "Compare with the group (default), with earlier rewards of the image, or with the epoch."
    add("--advantage", choices=["group", "tracker", "batch"], help=advantage_help)
    clip_range_help = f"PPO's clip range. By default sqrt(2 * {TRUST_REGION_NATS}) / elements of the latents."
    add("--clip_range", type=float, help=clip_range_help)
    add("--target_kl", type=float, default=0.1, help="TRPO's KL divergence per step, in nats.")
    add("--kl_coef", type=float, help="Weight of the KL from the base model. By default 0, or 0.001 for sac.")

    add = parser.add_argument_group("training").add_argument
    add("--num_train_epochs", type=int, default=100, help="Each epoch samples images and trains on them.")
    add(
        "--updates_per_epoch",
        type=int,
        help="Updates per pass (--num_inner_epochs). By default 2, or 1 for reinforce.",
    )
    add("--num_inner_epochs", type=int, default=1, help="Passes over the samples of an epoch.")
    add("--sample_batch_size", type=int, default=8, help="Images sampled at once per device, or one group.")
    add("--train_batch_size", type=int, default=1, help="UNet rows trained at once per device.")
    add("--gradient_checkpointing", action="store_true", help="Save memory by a second forward pass.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default accelerate's setting.")
    add("--allow_tf32", action="store_true", help="Use TF32 on Ampere and later GPUs.")
    add("--learning_rate", "--lr", type=float, default=3e-4, help="Learning rate, typically 1e-4 to 1e-3.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="constant", help="Learning rate schedule.")
    add("--lr_warmup_steps", type=int, default=0, help="Updates in which the learning rate rises.")
    add("--adam_beta1", type=float, default=0.9, help="The beta1 of AdamW.")
    add("--adam_beta2", type=float, default=0.999, help="The beta2 of AdamW.")
    add("--adam_weight_decay", type=float, default=1e-4, help="The weight decay of AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="The epsilon of AdamW.")
    add("--max_grad_norm", type=float, default=1.0, help="Maximum norm of the gradient.")
    add("--seed", type=int, default=0, help="Seed of all random numbers.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="img2img-ddpo-lora", help="Folder for everything that is written.")
    add("--validation_epochs", type=int, default=10, help="Epochs between held-out evaluations.")
    add("--checkpointing_epochs", type=int, default=1, help="Epochs between checkpoints.")
    add("--checkpoints_total_limit", type=int, default=2, help="Number of checkpoints to keep.")
    add("--resume_from_checkpoint", help="`latest`, or the path of a checkpoint.")
    trackers = ["none", "all", *map(str, get_available_trackers())]
    add("--report_to", choices=trackers, default="none", help="Installed tracker of metrics.")
    add("--push_to_hub", action="store_true", help="Upload the result. Log in with `hf auth login` first.")
    add("--hub_model_id", help="Repository to upload to. By default the name of --output_dir.")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line, or exit with what is wrong and how to mend it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(pretrained_model_name_or_path=f"{DEMO}/model", train_data_dir=f"{DEMO}/images")
        parser.set_defaults(**json.loads((DEMO / "options.json").read_text()))
        args = parser.parse_args(argv)
    if args.reward_weights is None:
        args.reward_weights = [1.0] * len(args.reward_fn)
    if args.updates_per_epoch is None:
        args.updates_per_epoch = 1 if args.algorithm == "reinforce" else min(2, args.group_size)
    if args.advantage is None:
        args.advantage = "batch" if args.group_size == 1 else "group"
    if args.kl_coef is None:
        args.kl_coef = 0.001 if args.algorithm == "sac" else 0.0
    for name, value in vars(args).items():
        if type(value) not in (int, float):  # a bool is an int too
            continue
        if not value >= 0 or (value == 0 and name in MUST_BE_POSITIVE):  # NaN is not >= 0 either
            parser.error(f"--{name}={value} is too small.")
        if value > 1 and name in ("strength", "eta", "guidance_rescale"):
            parser.error(f"--{name}={value} must be at most 1.")
    for is_wrong, message in find_mistakes(args):
        if is_wrong:
            parser.error(message)
    return args


def find_mistakes(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return possible mistakes in the flags as pairs of whether it was made and its message."""
    steps = f"--num_inference_steps={args.num_inference_steps} * --strength={args.strength}"
    updates = args.updates_per_epoch * args.num_inner_epochs
    source = Path(args.train_data_dir or args.dataset_name or "").resolve()
    output_dir = Path(args.output_dir).resolve()
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    settings = output_dir / "args.json"  # the first file that a run writes
    is_run = settings.is_file() and '"reward_fn"' in settings.read_text(errors="replace")
    files = [name for name in ("args.json", "README.md", "metrics.csv", LORA) if (output_dir / name).exists()]
    return [
        ((args.train_data_dir is None) == (args.dataset_name is None),
         "Give the images with --train_data_dir or with --dataset_name, or try --demo."),
        (args.train_data_dir and not source.is_dir(),
         f"--train_data_dir={args.train_data_dir} is not a folder. Unpack an archive, and give the folder."),
        (len(args.reward_fn) != len(args.reward_weights),
         f"--reward_weights={args.reward_weights}: give one for each of {len(args.reward_fn)} rewards."),
        (args.resolution % 8,
         f"--resolution={args.resolution} must be divisible by 8. Try {args.resolution // 8 * 8}."),
        (int(args.num_inference_steps * args.strength) == 0,
         f"{steps} leaves 0 steps. Raise one of them."),
        (args.group_size == 1 and (args.advantage == "group" or not args.all_steps),
         "--group_size=1 leaves nothing to compare a sample with. Use 4 or more, or add --all_steps."),
        (args.updates_per_epoch > args.group_size,
         f"--updates_per_epoch={args.updates_per_epoch} must be at most --group_size={args.group_size}."),
        (args.algorithm == "reinforce" and updates > 1,
         "--algorithm=reinforce makes one update. Drop --updates_per_epoch and --num_inner_epochs."),
        (not existing.is_dir() or not os.access(existing, os.W_OK),
         f"--output_dir={args.output_dir}: {existing} is not a folder that can be written to."),
        (source.is_dir() and output_dir.is_relative_to(source),
         f"--output_dir={args.output_dir} is inside the folder of images. Choose another folder."),
        (is_run and not args.resume_from_checkpoint and not args.dry_run,
         f"--output_dir={args.output_dir} holds a run. Add --resume_from_checkpoint=latest, or use another."),
        (files and not is_run and not args.dry_run,
         f"--output_dir={args.output_dir} holds files that this script did not write: {files}."),
    ]  # fmt: skip


@contextmanager
def exit_on_failure(setting: str, remedy: str = ""):
    """Exit with one line that names a flag with its value, the reason and the remedy if the block fails."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise SystemExit(f"error: {setting}: {reason}. {remedy}".strip()) from None


# ---- Data: from any source to images, prompts and metadata ---------------------------------------
@functools.cache
def warn_once(message: str) -> None:
    """Print a warning the first time it is given."""
    print(f"Warning: {message}.")


def list_files(folder: str) -> set[Path]:
    """Return the files in a folder and its subfolders that `datasets` finds. Hidden files are left out."""
    with suppress(FileNotFoundError):
        return set(map(Path, resolve_pattern(os.path.join(glob.escape(folder), "**"), "")))
    return set()


def load_pictures(folder: Path, metadata: set[Path], cache_dir: str | None) -> datasets.Dataset:
    """Return a row for each picture in a folder, or for each entry of its metadata files.

    Raises:
        ValueError: If a metadata file cannot be read or has rows that are too long.
    """
    try:
        rows = datasets.load_dataset(
            "imagefolder",
            data_files=os.path.join(glob.escape(str(folder)), "**"),
            split="train",
            drop_labels=True,
            cache_dir=cache_dir,
        )
    except Exception as error:
        places = ", ".join(map(str, metadata or [folder]))
        raise ValueError(f"{error.__cause__ or error}, see {places}") from None
    if any(name.startswith("__index_level") for name in rows.column_names):
        raise ValueError(f"{metadata.pop()} has more cells than its header, put texts with commas in quotes")
    return disable_decoding(rows)


def read_folder(folder: Path, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """Return the pictures of a folder by split, and print which files are not used.

    The first folder of a picture's path is its split if it is one of datasets' words for a split, such as
    "train" or "val". All other pictures are for training. Without metadata, other folders become the column
    `label`. Without a column `text`, captions are read from the .txt files beside the pictures.
    """
    files = list_files(str(folder))
    metadata = {path for path in files if path.name in ImageFolder.METADATA_FILENAMES}
    if not any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in files):
        raise ValueError("there are no pictures")
    rows = load_pictures(folder, metadata, cache_dir)
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    split_of_word = {}
    for split, words in SPLIT_KEYWORDS.items():
        split_of_word.update(dict.fromkeys(words, str(split)))
    paths = [Path(cell["path"]) if cell else folder / "missing.png" for cell in rows[columns[0]]]
    splits = {}
    labels = [None] * len(paths)
    captions = [None] * len(paths)
    unused = files - metadata
    for number in np.argsort(paths):  # several metadata files come in any order
        path = paths[number]
        # an archive is not in the folder, and @eaDir holds thumbnails on a Synology disk
        is_in_folder = path.is_relative_to(folder) and "@eaDir" not in path.parts
        if not is_in_folder or path.suffix.lower() not in ImageFolder.EXTENSIONS:
            continue
        first_folder = path.relative_to(folder).parts[0].lower()
        splits.setdefault(split_of_word.get(first_folder, "train"), []).append(number)
        if not metadata and path.parent != folder and path.parent.name.lower() not in split_of_word:
            labels[number] = path.parent.name
        caption_file = path.with_suffix(".txt")
        if caption_file in files and "text" not in rows.features:
            unused.discard(caption_file)
            try:
                captions[number] = caption_file.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ValueError(f"{caption_file} is not UTF-8, save it with that encoding") from None
    for name, cells in {"label": labels, "text": captions}.items():
        if cells != [None] * len(cells):
            rows = rows.add_column(name, cells)
    for split, numbers in splits.items():
        splits[split] = rows.select(numbers)
        for column in columns:
            unused -= {Path(os.path.normpath(cell["path"])) for cell in splits[split][column] if cell}
    if unused:
        examples = {path.suffix.lower(): str(path) for path in sorted(unused)}
        PartialState().print(f"{len(unused)} files are not used, such as {', '.join(examples.values())}.")
    return splits


def is_picture(cell) -> bool:
    """Return whether a cell is a picture that is not decoded, or the path or the bytes of a picture."""
    if isinstance(cell, str):
        return Path(cell).suffix.lower() in ImageFolder.EXTENSIONS and os.path.isfile(cell)
    if isinstance(cell, bytes):
        with suppress(OSError):
            return Image.open(io.BytesIO(cell)) is not None
    return isinstance(cell, dict) and cell.keys() == {"bytes", "path"}


def disable_decoding(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the rows with undecoded pictures.

    A column of pictures is known by its type or by its first filled cell. Columns of sounds, videos and
    documents are left out because they need further packages.
    """
    rows = rows.with_format(None)
    for name, feature in rows.features.items():
        cells = (row[name] for row in rows.select_columns(name) if row[name])
        if hasattr(feature, "decode_example") and not isinstance(feature, datasets.Image):
            PartialState().print(f"The column {name} is not used. It holds {type(feature).__name__}.")
            rows = rows.remove_columns(name)
        elif isinstance(feature, datasets.Image) or is_picture(next(cells, None)):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def read_splits(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """Return the rows of any source by split. Pictures are not decoded."""
    source = args.train_data_dir or args.dataset_name
    # metadata.parquet belongs to a folder of pictures, other tables hold the pictures themselves
    suffixes = {path.suffix.lower() for path in list_files(source) if path.stem != "metadata"}
    has_pictures = suffixes & set(ImageFolder.EXTENSIONS) and not suffixes & {".parquet", ".arrow", ".tar"}
    if args.train_data_dir or has_pictures:
        return read_folder(Path(source).resolve(), args.cache_dir)
    if Path(source, "dataset_dict.json").exists() or Path(source, "state.json").exists():
        splits = datasets.load_from_disk(source)
    elif source.endswith(".parquet"):
        splits = datasets.load_dataset("parquet", data_files=source, cache_dir=args.cache_dir)
    else:
        splits = datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    return {split: disable_decoding(rows) for split, rows in splits.items()}


def shuffled_keys(rows: datasets.Dataset, args: argparse.Namespace) -> pd.Series:
    """Return the key of each row's picture, shuffled by the seed. The index holds the numbers of the rows.

    Equal pictures have equal keys. The key is None where there is no picture. The key of a file is its path.
    The key of an embedded picture is the hash of its bytes, which only the main process reads.
    """
    keys = []
    if PartialState().is_main_process:
        for row in tqdm(rows.select_columns(args.image_column), "comparing pictures", leave=False, disable=None):
            cell = row[args.image_column]
            keys.append(cell and hash(cell["bytes"] or cell["path"]))
    (keys,) = broadcast_object_list([keys])
    order = torch.randperm(len(rows), generator=seeded(args.seed, "rows")).tolist()
    return pd.Series(keys, dtype=object)[order]


@dataclass
class ImagePrompts:
    """Rows of a split. A picture is read when it is needed."""

    rows: datasets.Dataset
    order: list[int]  # numbers of the rows
    caption_column: str | None
    args: argparse.Namespace

    def __len__(self) -> int:
        return len(self.order)

    def load(self, index: int, flip: bool = False, centering=(0.5, 0.5)) -> tuple[torch.Tensor, str, dict]:
        """Return an input image `(3, H, W)` in [0, 1], its prompt and its metadata.

        The metadata is the row's other columns and `init_image`. Its pictures are cropped and flipped like
        the input. Its classes are names. If a picture cannot be read, the next row takes its place with a
        warning.

        Raises:
            ValueError: If no picture can be read.
        """
        for number in self.order[index:] + self.order[:index]:
            row = dict(self.rows[number])
            try:
                for name, feature in self.rows.features.items():
                    cell = row[name]
                    is_input = name == self.args.image_column  # the other pictures may be missing
                    if isinstance(feature, datasets.Image) and (cell or is_input):
                        row[name] = self.decode(cell, flip, centering)
                    elif isinstance(feature, datasets.ClassLabel) and cell not in (None, -1):
                        row[name] = feature.int2str(cell)
            except Exception as error:
                path = cell["path"] if isinstance(cell, dict) else cell
                warn_once(f"row {number}, {name} {path}: {error or type(error)}; the next row takes its place")
                continue
            prompt = self.args.prompt or row.get(self.caption_column) or ""
            if isinstance(prompt, list):
                prompt = prompt[0] or ""
            image = row.pop(self.args.image_column)
            return image, prompt, {**row, "init_image": image}
        raise ValueError(f"none of the pictures can be read, the last one is {name} {path}")

    def decode(self, cell: dict | None, flip: bool, centering: tuple) -> torch.Tensor:
        """Return a picture `(3, H, W)` in [0, 1], upright and cropped to the resolution."""
        if cell is None:
            raise ValueError("there is no picture")
        image = datasets.Image().decode_example(cell)
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        size = (self.args.resolution, self.args.resolution)
        image = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS, centering=centering)
        if flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def choose_captions(rows: datasets.Dataset, args: argparse.Namespace) -> str | None:
    """Return the column of the prompts or None. Print which captions are missing or not used."""
    column = args.caption_column
    if column == "text" and column not in rows.features:
        return None
    if column not in rows.features:
        raise ValueError(f"--caption_column={column} is not one of the columns {rows.column_names}")
    if args.prompt is not None:
        PartialState().print(f"The captions in the column {column} are not used, --prompt replaces them.")
        return None
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # of the texts in a list
    if getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(f"--caption_column={column} holds {feature}, but captions are texts")
    empty = sum(row[column] in (None, "", [], [None], [""]) for row in rows.select_columns(column))
    if empty:
        PartialState().print(f"{empty} of {len(rows)} rows have no caption. Their prompt is empty.")
    return column


def split_data(splits: dict[str, datasets.Dataset], args: argparse.Namespace) -> tuple[ImagePrompts, ImagePrompts]:
    """Return the images to train on and the held-out images. No picture is in both.

    The held-out images come from the split "validation" or "test", if there is one.

    Raises:
        ValueError: If there are no images to train on, or a column is not what a flag says.
    """
    if "train" not in splits:
        raise ValueError(f"there are no images to train on, only the split {', '.join(splits)}")
    rows = splits["train"]
    held_out_rows = splits.get("validation", splits.get("test", rows))
    if len(splits) > 2 or (len(splits) == 2 and held_out_rows is rows):
        PartialState().print(f"Of the splits {list(splits)} only train and validation (else test) are used.")
    if not isinstance(rows.features.get(args.image_column), datasets.Image):
        raise ValueError(f"--image_column={args.image_column} has no pictures. Columns: {rows.column_names}")
    if args.image_column != "init_image" and "init_image" in rows.features:
        raise ValueError("rename the column init_image, because rewards get the input under this name")
    caption_column = choose_captions(rows, args)
    for column in (args.image_column, caption_column):
        if column and column not in held_out_rows.features:
            raise ValueError(f"the held-out images have no column {column}")

    pictures = shuffled_keys(rows, args)
    candidates = pictures
    count = min(8, pictures.nunique() // 3)
    if held_out_rows is not rows:
        candidates = shuffled_keys(held_out_rows, args)
        count = 8
    if args.num_validation_images is not None:
        count = args.num_validation_images
    held_out = candidates.dropna().drop_duplicates().head(count)
    trained = pictures[~pictures.isin(held_out)][: args.max_train_samples]
    if not len(trained):
        raise ValueError(f"all images are held out, lower --num_validation_images={count}")
    train_data = ImagePrompts(rows, list(trained.index), caption_column, args)
    held_out_data = ImagePrompts(held_out_rows, list(held_out.index), caption_column, args)
    for data in (train_data, held_out_data):
        if len(data):
            data.load(0)
    if len(train_data) < 12 or not len(held_out_data):
        PartialState().print("Warning: these are too few images to tell whether the result holds for others.")
    return train_data, held_out_data


def load_data(args: argparse.Namespace) -> tuple[ImagePrompts, ImagePrompts]:
    """Return the images to train on and the held-out images. Exit with what is wrong with the source."""
    flag = "train_data_dir" if args.train_data_dir else "dataset_name"
    with exit_on_failure(f"--{flag}={getattr(args, flag)}", "Check the name and the files."):
        with PartialState().main_process_first():  # the others find the data in the cache
            splits = read_splits(args)
        return split_data(splits, args)


# ---- Rewards: functions of images (B, 3, H, W), prompts and metadata, or factories that return one.
# To add a reward, copy the nearest one and add its name to BUILT_IN
def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Return images `(B, 3, H, W)` in [0, 1] as 8-bit pictures. Round as ddpo-pytorch does."""
    return numpy_to_pil(images.permute(0, 2, 3, 1).float().cpu().numpy())


def encode(image: Image.Image, format: str) -> bytes:
    """Return the bytes of a picture file. The quality of a JPEG is 95."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=95)
    return buffer.getvalue()


def stack_pictures(metadata: list[dict], column: str) -> torch.Tensor:
    """Return the pictures `(B, 3, H, W)` of a column. `init_image` holds the inputs."""
    if not all(torch.is_tensor(row.get(column)) for row in metadata):
        raise ValueError(f"not every row has a picture in the column {column!r}, see {column}_file_name")
    return torch.stack([row[column] for row in metadata])


def apply_floor(values: torch.Tensor, floor: float | None) -> torch.Tensor:
    """Return the values, or with a floor `min(0, value - floor)`. All values above the floor count the same."""
    return values if floor is None else (values - floor).clamp(max=0)


def jpeg_incompressibility(images, prompts, metadata):
    """Return the sizes in kB as JPEG files, as in ddpo-pytorch. It rewards detailed images."""
    return [len(encode(image, "JPEG")) / 1000 for image in to_pil(images)]


def jpeg_compressibility(images, prompts, metadata):
    """Return minus the sizes in kB as JPEG files, as in ddpo-pytorch. It rewards smooth images."""
    return [-size for size in jpeg_incompressibility(images, prompts, metadata)]


def psnr(column: str = "target", floor: float | None = None):
    """Return a reward for the PSNR in dB to the picture in a column."""

    def reward(images, prompts, metadata):
        error = (images - stack_pictures(metadata, column).to(images)).square().mean(dim=(1, 2, 3))
        return apply_floor(-10 * torch.log10(error.clamp(min=1e-10)), floor)

    return reward


def load_network(network_class, processor_class, model: str, processor: str | None = None):
    """Return a frozen network on this process's device and a function from images and texts to its inputs.

    On a GPU the network is in fp16 if the run is in mixed precision. bf16 would be too coarse for scores.
    """
    state = AcceleratorState()
    dtype = torch.float16
    if state.device.type == "cpu" or state.mixed_precision == "no":
        dtype = torch.float32
    network, loaded = network_class.from_pretrained(model, dtype=dtype, output_loading_info=True)
    missing = [key for key in loaded["missing_keys"] if not key.startswith("pooler.")]
    if missing:  # transformers would initialize them at random
        raise ValueError(f"{model} has no weights for {missing[0]} of {network_class.__name__}")
    network.to(state.device).requires_grad_(False).eval()
    loaded_processor = processor_class.from_pretrained(processor or model, backend="pil")

    def preprocess(images, **texts):
        return loaded_processor(images=to_pil(images), return_tensors="pt", **texts).to(state.device, dtype)

    return network, preprocess


def clip_score(model: str = "openai/clip-vit-large-patch14", processor: str | None = None, scaled: bool = False):
    """Return a reward for CLIP's cosine of image and prompt. Typical values are .1 to .4 if not scaled."""
    clip, preprocess = load_network(CLIPModel, AutoProcessor, model, processor)

    def reward(images, prompts, metadata):
        out = clip(**preprocess(images, text=prompts, padding=True, truncation=True))
        scores = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return scores * clip.logit_scale.float().exp() if scaled else scores

    return reward


def pick_score(model: str = "yuvalkirstain/PickScore_v1", processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """Return a reward for PickScore, which predicts what people pick. Typical values are 15 to 25."""
    return clip_score(model, processor, scaled=True)


def hps(model: str = "adams-story/HPSv2-hf", processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """Return a reward for version 2 of the human preference score. Typical values are .2 to .35."""
    return clip_score(model, processor)


def aesthetic(model: str = "openai/clip-vit-large-patch14", head: str = "trl-lib/ddpo-aesthetic-predictor"):
    """Return a reward for LAION's aesthetic score. Typical values are 3 to 7.

    `head` is a file or a repository on the Hub with the file aesthetic-model.pth.
    """
    clip, preprocess = load_network(CLIPModel, AutoImageProcessor, model)
    path = head if Path(head).is_file() else huggingface_hub.hf_hub_download(head, "aesthetic-model.pth")
    weights = torch.load(path, map_location=clip.device, weights_only=True)

    def reward(images, prompts, metadata):
        hidden = clip.visual_projection(clip.vision_model(**preprocess(images)).pooler_output)
        hidden = F.normalize(hidden.float(), dim=-1)
        for number in (0, 2, 4, 6, 7):  # the others are dropout, and there is no activation
            hidden = F.linear(hidden, weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"])
        return hidden.squeeze(1)

    return reward


def dino_similarity(model: str = "facebook/dinov2-small", column: str = "init_image", floor: float | None = None):
    """Return a reward for the cosine of DINOv2's class tokens of the image and the picture in a column."""
    dino, preprocess = load_network(AutoModel, AutoImageProcessor, model)

    def reward(images, prompts, metadata):
        tokens = dino(**preprocess(images)).last_hidden_state[:, 0].float()
        others = dino(**preprocess(stack_pictures(metadata, column))).last_hidden_state[:, 0].float()
        return apply_floor(F.cosine_similarity(tokens, others), floor)

    return reward


def classifier(model: str, label_column: str = "label", names: list[str] | None = None):
    """Return a reward for the logit of the right class minus the largest other logit.

    The column holds names of classes or their indices. With `names` of classes the model is a CLIP, which
    compares the image with "An image of {name}".
    """
    texts = {}
    if names:
        network, preprocess = load_network(CLIPModel, AutoProcessor, model)
        texts = {"text": [f"An image of {name}" for name in names], "padding": True}
    else:
        network, preprocess = load_network(AutoModelForImageClassification, AutoImageProcessor, model)
    classes = names or list(network.config.id2label.values())

    def reward(images, prompts, metadata):
        logits = network(**preprocess(images, **texts))[0].float()
        targets = []
        for row in metadata:
            label = row[label_column]
            targets.append(label if isinstance(label, int) else classes.index(label))
        targets = torch.tensor(targets, device=logits.device)[:, None]
        others = logits.scatter(1, targets, -torch.inf)
        return logits.gather(1, targets).squeeze(1) - others.amax(dim=1)

    return reward


def post_json(url: str, payload: dict, headers: dict) -> dict:
    """Return the JSON answer of a server. Temporary failures are retried four times."""
    codes = (429, 500, 502, 503, 504)
    retry = Retry(4, backoff_factor=1, status_forcelist=codes, allowed_methods=None, raise_on_status=False)
    try:
        with requests.Session() as session:
            session.mount(url, HTTPAdapter(max_retries=retry))
            # a redirect would turn POST into GET
            response = session.post(url, json=payload, timeout=60, headers=headers, allow_redirects=False)
    except requests.RequestException as error:  # its message may hold the query and with it a secret
        raise OSError(f"{public_name(url)} cannot be reached ({type(error).__name__})") from None
    if response.status_code != 200:
        raise OSError(f"{public_name(url)} answered {response.status_code}: {response.text[:300]}")
    return response.json()


def http_reward(url: str):
    """Return a reward that a server computes.

    The server gets `{"images": [base64 PNG], "prompts": [...], "metadata": [{...}]}` by POST. The metadata
    has no pictures. It answers `{"rewards": [...]}` with one number per image and perhaps `"info": {name:
    [...]}`.
    """

    def reward(images, prompts, metadata):
        files = [base64.b64encode(encode(image, "PNG")).decode() for image in to_pil(images)]
        rows = [{name: row[name] for name in row if not torch.is_tensor(row[name])} for row in metadata]
        rows = json.loads(json.dumps(rows, default=str), parse_constant=str)  # NaN becomes a text
        answer = post_json(url, {"images": files, "prompts": prompts, "metadata": rows}, {})
        return answer["rewards"], answer.get("info")

    return reward


def vlm_judge(url, model, question_column="question", answer_column="answer", api_key_env="OPENAI_API_KEY"):
    """Return a reward for a vision-language model's reply to a question about the image.

    It is the share of the words of an expected answer that the reply contains. `url` is an endpoint
    compatible with OpenAI's and ends in /v1. If the data has no columns `question` and `answer`, the model
    describes the image and the reply is compared with the prompt.
    """
    headers = {}
    if os.environ.get(api_key_env):
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"

    def judge(image, prompt, row):
        row = {"question": "Answer concisely: what is going on in this image?", "answer": prompt, **row}
        picture = {"url": "data:image/jpeg;base64," + base64.b64encode(encode(image, "JPEG")).decode()}
        question = {"type": "text", "text": row[question_column]}
        content = [question, {"type": "image_url", "image_url": picture}]
        payload = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        reply = post_json(f"{url}/chat/completions", payload, headers)
        replied = re.findall(r"\w+", reply["choices"][0]["message"]["content"].lower())
        expected = re.findall(r"\w+", str(row[answer_column]).lower())
        return np.isin(expected, replied).sum() / max(1, len(expected))

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(8) as executor:
            return list(executor.map(judge, to_pil(images), prompts, metadata))

    return reward


BUILT_IN = [jpeg_compressibility, jpeg_incompressibility, psnr, clip_score, pick_score, hps, aesthetic]
BUILT_IN += [dino_similarity, classifier, vlm_judge]
REWARDS = {function.__name__: function for function in BUILT_IN}


def public_name(text: str) -> str:
    """Return an entry of `--reward_fn` without secrets of servers and without folders of this machine."""
    # http://user:pw@host/path?key becomes host/path
    text = re.sub(r"(?i)https?://(?:[^/'\"]*@)?([^'\"?#]*)[^'\")]*", r"\1", text)
    # folder/file.py becomes file.py
    text = re.sub(r"(^|=)[^(=]*[/\\]([^(/\\]*\.py)", r"\1\2", text)
    # '/folder/name' becomes 'name'
    return re.sub(r"(['\"])(?:[~.]|\w:)*[/\\][^'\"]*[/\\](?=[^'\"])", r"\1", text)


def metric_name(text: str) -> str:
    """Return a text with only those characters that all trackers take in the name of a metric."""
    return " ".join(re.findall(r"[\w.-]+(?:/[\w.-]+)*", text))


# Names of the modules that reward files have brought from their folders in this run
REWARD_MODULES = set()


@functools.cache  # one execution per run
def import_file(path: Path):
    """Execute a reward file as a module of its own name and return the module.

    Restore the arguments, working directory, gradient mode and module path that the import may change. Unload
    modules of the same names that an earlier reward file brought from another folder.
    """
    for name in REWARD_MODULES & set(sys.modules):
        is_elsewhere = path.parent not in Path(sys.modules[name].__file__).parents
        if is_elsewhere and any(path.parent.glob(name.partition(".")[0] + "*")):
            del sys.modules[name]
    if path.stem in sys.modules:
        raise ValueError(f"a module {path.stem} is loaded already. Rename the file")
    modules = set(sys.modules)
    argv = sys.argv
    module_path = list(sys.path)
    importlib.invalidate_caches()
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    try:
        with torch.enable_grad(), chdir("."):  # both restore what they found
            return importlib.import_module(path.stem)
    except SystemExit as error:
        raise RuntimeError(f"the file calls sys.exit({error.code}) when it is imported") from None
    finally:
        sys.argv = argv
        # Worker processes find the file at the end of the path, where it does not shadow installed packages
        sys.path[:] = module_path + [folder for folder in sys.path if folder not in module_path]
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if path.parent in Path(file).parents and "site-packages" not in file:
                REWARD_MODULES.add(name)


def load_reward(spec: str) -> Callable:
    """Return the reward function of an entry of `--reward_fn`.

    A PyTorch module or a callable with exactly three required parameters is the reward itself. Any other
    callable is a factory and is called with the options. Exit with a message if it is neither.
    """
    with exit_on_failure(f"--reward_fn={public_name(spec)}"):
        if spec.startswith(("http://", "https://")):
            return http_reward(spec)
        name, parenthesis, options = spec.partition("(")
        file, suffix, function = name.rpartition(".py")
        known = REWARDS
        if suffix:
            known = vars(import_file(Path(file + suffix).resolve(strict=True)))
            name = function.lstrip(":")
        if name not in known:
            names = [key for key, value in known.items() if callable(value)]
            raise ValueError(f"give one of {names}, file.py:function or http(s)://host/path")
        maker = known[name]
        call = ast.parse(f"f({options}" if parenthesis else "f()", mode="eval").body
        try:
            arguments = [ast.literal_eval(value) for value in call.args]
            keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        except ValueError:
            raise ValueError("write each option as a number, or as a text in quotes") from None
        if isinstance(maker, torch.nn.Module):
            return maker
        required = []
        for name, parameter in inspect.signature(maker).parameters.items():
            if parameter.default is parameter.empty and "VAR" not in parameter.kind.name:
                required.append(name)
        if arguments or keywords or not required:
            return maker(*arguments, **keywords)
        if len(required) != 3:
            raise ValueError(
                f"it requires {required}, but a reward requires images, prompts and metadata."
                " Give a factory its options in parentheses"
            )
        return maker


@torch.no_grad()
def compute_rewards(functions: dict[str, Callable], images, prompts, metadata) -> tuple[torch.Tensor, dict]:
    """Return rewards `(B, rewards)` of images `(B, 3, H, W)` in float64 and the means of the rewards' info.

    Each function gets copies that it may write into.

    Raises:
        ValueError: If a function does not return one finite number per image.
    """
    columns = []
    infos = {}
    for name, function in functions.items():
        values = function(images.clone(), list(prompts), [copy.deepcopy(row) for row in metadata])
        info = None
        if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], dict | None):
            values, info = values
        scores = torch.empty(0)
        with suppress(TypeError, ValueError, RuntimeError):
            scores = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if scores.shape != images.shape[:1] or not scores.isfinite().all():
            raise ValueError(f"reward {name} must return {len(images)} finite numbers, not {values}")
        columns.append(scores)
        for key, value in (info or {}).items():
            with suppress(TypeError, ValueError):  # texts are not logged
                infos[f"info/{metric_name(key)}"] = torch.as_tensor(value, dtype=torch.float32).mean().item()
    return torch.stack(columns, dim=1), infos


# ---- Advantages: what each sample is worth compared with others ----------------------------------
def compute_advantages(rewards, kind: str, group_size: int, keys: list | None = None, tracker: dict | None = None):
    """Return advantages `(B, rewards)` of rewards `(B, rewards)` in float64. The groups are contiguous.

    An advantage is the deviation from a baseline in standard deviations. It is clipped to +-5.
    - "group" compares with the mean of the group. The standard deviation within groups is pooled over all
      groups. A group of equal rewards has advantage 0.
    - "batch" compares with the epoch.
    - "tracker" compares with the last 32 rewards of the same key as DDPO does. A key is a row of the data and
      its flip. Until a key has 16 rewards, it compares with the epoch. `tracker` holds the rewards and is
      updated.
    """
    if kind == "group":
        groups = rewards.unflatten(0, (-1, group_size))
        deviations = (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 1)
        spread = deviations.square().mean(dim=0).sqrt()
    elif kind == "batch":
        deviations = rewards - rewards.mean(dim=0)
        spread = rewards.std(dim=0, unbiased=False)
    else:
        for key, values in zip(keys, rewards.tolist()):
            tracker[key] = [*tracker.get(key, []), values][-32:]
        deviations = torch.empty_like(rewards)
        spread = torch.empty_like(rewards)
        for sample_id, key in enumerate(keys):
            known = rewards.new_tensor(tracker[key]) if len(tracker[key]) >= 16 else rewards
            deviations[sample_id] = rewards[sample_id] - known.mean(dim=0)
            spread[sample_id] = known.std(dim=0, unbiased=False)
    # If all rewards are equal, deviations and spread are 0 up to rounding. The advantage must then be 0
    epsilon = 1e-12 * rewards.abs().amax(dim=0) + torch.finfo(rewards.dtype).tiny
    return (deviations / (spread + epsilon)).clamp(-5, 5)


# ---- Objectives: pure functions of tensors (states, actions). Add yours here, to --algorithm and to step 4
def ppo_loss(log_probs, old_log_probs, advantages, clip_range: float) -> torch.Tensor:
    """Return the clipped surrogate, equation (7) of PPO (https://huggingface.co/papers/1707.06347).

    The log-probs of the current policy and of the one that sampled are in nats per latent element. Their
    ratio is clipped to `1 +- clip_range`. See `TRUST_REGION_NATS` for the default.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(log_probs, advantages) -> torch.Tensor:
    """Return the loss of REINFORCE (https://doi.org/10.1007/BF00992696). It is valid for one update only."""
    return -advantages * log_probs


def trpo_loss(log_probs, old_log_probs, advantages, kl, beta: float) -> torch.Tensor:
    """Return the surrogate with a KL penalty, as in section 3 of https://huggingface.co/papers/1502.05477.

    `kl` is the exact KL(old || new) per latent element, like the log-probs.
    """
    return -advantages * torch.exp(log_probs - old_log_probs) + beta * kl


def adapt_beta(beta: float, kl: float, target_kl: float) -> float:
    """Double beta if the KL is above 1.5 times the target, or halve it (section 4 of the PPO paper)."""
    if kl > 1.5 * target_kl:
        beta = beta * 2
    elif kl < target_kl / 1.5:
        beta = beta / 2
    return min(max(beta, 1e-6), 1e6)


def sac_loss(values) -> torch.Tensor:
    """Return the actor's loss of soft actor-critic (https://huggingface.co/papers/1801.01290).

    It is minus the lower one of the values `(2, states, actions)` of newly drawn, reparameterized actions.
    The entropy of a fixed std is constant. `--kl_coef` adds the KL to the base model in its place.
    """
    return -values.min(dim=0).values


def gaussian_kl(other_mean, mean, std) -> torch.Tensor:
    """Return the exact KL `(B,)` in nats of two Gaussians with means `(B, C, h, w)` and the same std."""
    return ((mean - other_mean) ** 2 / (2 * std**2)).flatten(1).sum(dim=1)


class ValueCritic(torch.nn.Module):
    """Predict what a step is worth with a convolutional network that has two heads.

    The unit is a standard deviation of the reward.
    The value is linear in `actions - latents`. Only its gradient reaches the policy, and a linear function
    can be learned from few samples.
    """

    def __init__(self, channels: int, embedding_dim: int, width: int = 32):
        super().__init__()
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.prompt_embedding = torch.nn.Linear(embedding_dim, width)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(c, width, 3, padding=1) for c in (channels, width, width))
        self.conv_out = torch.nn.Conv2d(width, 2 * channels, 3, padding=1)
        torch.nn.init.normal_(self.conv_out.weight, std=1e-3)  # values near 0, and two heads that differ
        self.bias = torch.nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, actions: torch.Tensor, states: "Transitions") -> torch.Tensor:
        """Return values `(2, N, K)` of `actions` `(N, K, C, h, w)` at N states."""
        prompt_embeds = states.prompt_embeds.float().mean(dim=1)  # (N, E)
        condition = self.time_embedding(self.time_proj(states.timesteps)) + self.prompt_embedding(prompt_embeds)
        hidden = self.convs[0](states.latents) + condition[:, :, None, None]
        for conv in self.convs[1:]:
            hidden = hidden + conv(F.silu(hidden))
        weights = self.conv_out(F.silu(hidden)).unflatten(1, (2, -1))  # (N, 2, C, h, w)
        displacements = (actions - states.latents.unsqueeze(1)) / actions[0, 0].numel() ** 0.5  # (N, K, C, h, w)
        return torch.einsum("nqchw,nkchw->qnk", weights, displacements) + self.bias


# ---- Sampling: groups of the data become images and transitions ---------------------------------
#
#     input + noise --o--o--o--o--*---------o---------o  sample 1
#                                 :---------o---------o  sample 2
#                                 :---------o---------o  ...
#                       prefix  branch    finish
#
# A group is one input, one prompt and one start noise with K samples.
# - The prefix is the deterministic steps at the beginning. The samples are still equal, so the UNet computes
#   one row for all of them.
# - The branch is one stochastic step. Its start is the state, and the K latents drawn there are the actions.
# - The finish is a few large deterministic steps to the end of the schedule.
# - The tail is the last steps of the schedule, which add next to no noise. The branch is never one of them.
# Only the branch is trained. With `--all_steps` every step is a branch with one action, and each sample has its
# own start noise.
def seeded(*key: int | str) -> torch.Generator:
    """Return a CPU generator that depends on the key alone, such as a seed, a purpose and numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


class Transitions(NamedTuple):
    """N states with the K actions that were drawn from each."""

    latents: torch.Tensor  # (N, C, h, w) the states
    actions: torch.Tensor  # (N, K, C, h, w) the latents after the step
    timesteps: torch.Tensor  # (N,)
    means: torch.Tensor  # (N, C, h, w) of the policy that sampled
    log_probs: torch.Tensor  # (N, K) of the policy that sampled
    sample_ids: torch.Tensor  # (N, K) number of the sample in the epoch, on the CPU
    prompt_embeds: torch.Tensor  # (N, L, E)
    negative_prompt_embeds: torch.Tensor  # (N, L, E), unused without guidance

    def take(self, state_ids: torch.Tensor) -> "Transitions":
        """Return the transitions from some of the states."""
        return Transitions(*(field[state_ids] for field in self))


def count_trainable_steps(scheduler: DDIMScheduler, timesteps: torch.Tensor, args: argparse.Namespace) -> int:
    """Return the number of steps before the tail, or of all with `--train_tail`. Exit if it is 0."""
    if args.train_tail:
        return len(timesteps)
    prev_timesteps = timesteps - scheduler.config.num_train_timesteps // args.num_inference_steps
    variances = 1 - scheduler.alphas_cumprod[prev_timesteps.clamp(min=0)]  # of the noise after the step
    count = int((variances >= TAIL_VARIANCE).sum())
    if count == 0:
        steps = f"--num_inference_steps={args.num_inference_steps} * --strength={args.strength}"
        raise SystemExit(f"error: {steps} leaves no step to train. Raise one of them, or add --train_tail.")
    return count


def plan_steps(num_steps: int, num_trainable: int, epoch: int, args) -> tuple[list, list, list]:
    """Return the steps of an epoch, their etas, and the positions of the trained steps in these lists.

    A step is an index into the `num_steps` that `strength` leaves. The branch is drawn anew in each epoch.
    """
    if args.all_steps:
        steps = list(range(num_steps))
        trained = list(range(num_trainable))
    else:
        branch = torch.randint(num_trainable, (), generator=seeded(args.seed, "branch", epoch)).item()
        steps_left = num_steps - branch - 1
        count = min(args.finish_steps or steps_left, steps_left)
        finish = np.linspace(branch + 1, num_steps, count, endpoint=False).astype(int).tolist()
        steps = [*range(branch + 1), *finish]
        trained = [branch]
    etas = np.zeros(len(steps))
    etas[trained] = args.eta
    return steps, etas.tolist(), trained


def draw_groups(num_rows: int, num_groups: int, epoch: int, args) -> list[tuple[int, bool]]:
    """Return the row of the data and the flip of each group. Each pass over the data is shuffled."""
    groups = []
    for number in range(epoch * num_groups, (epoch + 1) * num_groups):
        data_pass, position = divmod(number, num_rows)
        order = torch.randperm(num_rows, generator=seeded(args.seed, "order", data_pass))
        flip = args.random_flip and torch.rand((), generator=seeded(args.seed, "flip", number)).item() < 0.5
        groups.append((order[position].item(), flip))
    return groups


@torch.no_grad()
def sample_groups(pipe, data: ImagePrompts, groups: list, group_ids: list[int], plan: tuple, epoch, pipe_kwargs, args):
    """Sample K images for each of the G groups in `group_ids`. The noise does not depend on the process.

    Returns:
        Images `(G * K, 3, H, W)` with their prompts and metadata, and the `Transitions`.
    """
    steps, etas, trained = plan
    rows = []
    sample_ids = []
    for group_id in group_ids:
        row, flip = groups[group_id]
        centering = (0.5, 0.5)
        if not args.center_crop:
            centering = torch.rand(2, generator=seeded(args.seed, "crop", epoch, group_id)).tolist()
        rows.append(data.load(row, flip, centering))
        sample_ids.extend(range(group_id * args.group_size, (group_id + 1) * args.group_size))
    row_of_sample = [row for row in rows for _ in range(args.group_size)]
    if args.all_steps:
        rows = row_of_sample
        start_noise = False  # each sample has its own
    else:
        start_noise = [seeded(args.seed, "start", epoch, group_id) for group_id in group_ids]
    num_rows = len(rows)  # UNet rows of the prefix
    num_actions = len(sample_ids) // num_rows
    images, prompts, _ = zip(*rows)
    out = pipe(
        list(prompts),
        torch.stack(images),
        num_images_per_prompt=num_actions,
        steps=steps,
        eta=etas,
        generator=[seeded(args.seed, "noise", epoch, sample_id) for sample_id in sample_ids],
        share_start_noise=start_noise,
        return_trajectory=True,
        **pipe_kwargs,
    )
    negative_prompt_embeds = out.negative_prompt_embeds
    if negative_prompt_embeds is None:
        negative_prompt_embeds = out.prompt_embeds
    trained = torch.tensor(trained)
    transitions = Transitions(
        latents=out.latents[::num_actions, trained].flatten(0, 1),  # (rows, steps, ...) -> (N, ...)
        actions=out.latents[:, trained + 1].unflatten(0, (num_rows, num_actions)).transpose(1, 2).flatten(0, 1),
        timesteps=out.timesteps[trained].repeat(num_rows),
        means=out.means[::num_actions, trained].flatten(0, 1),
        log_probs=out.log_probs[:, trained].unflatten(0, (num_rows, num_actions)).transpose(1, 2).flatten(0, 1),
        sample_ids=torch.tensor(sample_ids).view(num_rows, num_actions).repeat_interleave(len(trained), dim=0),
        prompt_embeds=out.prompt_embeds[::num_actions].repeat_interleave(len(trained), dim=0),
        negative_prompt_embeds=negative_prompt_embeds[::num_actions].repeat_interleave(len(trained), dim=0),
    )
    _, prompts, metadata = zip(*row_of_sample)
    return out.images.float().cpu(), prompts, metadata, transitions


# ---- Update: what the loop in `main` calls -------------------------------------------------------
def predict_transition(pipe, batch: Transitions, guidance_scale: float, args, accelerator: Accelerator):
    """Return mean `(N, C, h, w)` and std `(N, 1, 1, 1)` of the next latents of N states."""
    embeds = (batch.prompt_embeds, batch.negative_prompt_embeds)
    with accelerator.autocast():  # as in sampling
        noise_pred = predict_noise(
            pipe.unet, batch.latents, batch.timesteps, *embeds, guidance_scale, args.guidance_rescale
        )
    return ddim_transition(pipe.scheduler, noise_pred, batch.timesteps, batch.latents, args.eta)


@torch.no_grad()
def reference_mean(pipe, batch: Transitions, guidance_scale: float, args, accelerator) -> torch.Tensor:
    """Return the mean `(N, C, h, w)` of the next latents under the base model."""
    pipe.unet.disable_adapters()
    mean, _ = predict_transition(pipe, batch, guidance_scale, args, accelerator)
    pipe.unet.enable_adapters()
    return mean


def draw_actions(mean, std, batch: Transitions, *key: int) -> torch.Tensor:
    """Return new reparameterized actions `(N, K, C, h, w)`. Each state has noise of its own."""
    states = zip(batch.sample_ids[:, 0].tolist(), batch.timesteps.tolist())
    noise = [seeded("action", *key, *state) for state in states]
    return mean[:, None] + std[:, None] * randn_tensor(batch.actions.shape, noise, mean.device)


def sum_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its sum over the processes."""
    for parameter in parameters:
        parameter.grad = accelerator.reduce(parameter.grad, "sum")


def fit_critic(critic, target_critic, optimizer, transitions, advantages, accelerator) -> float:
    """Fit SAC's critic to the advantages `(N, K)` and return the mean squared error.

    All processes step with the sum of their gradients, so critics that start equal stay equal.
    """
    for _ in range(48):
        values = critic(transitions.actions, transitions)  # (2, N, K)
        error = (values - advantages).square().mean() / accelerator.num_processes
        error.backward()
        sum_gradients(list(critic.parameters()), accelerator)
        optimizer.step()
        optimizer.zero_grad()
        for target, parameter in zip(target_critic.parameters(), critic.parameters()):
            target.data.lerp_(parameter.data, 0.05)
    return accelerator.reduce(error.detach(), "sum").item()


def count_evaluations(unet, inputs) -> None:
    """Count the rows of a UNet call in a forward pre-hook. A trained row has a backward pass too."""
    unet.num_evaluations += len(inputs[0]) * (TRAINED_EVALUATION_COST if torch.is_grad_enabled() else 1)


@torch.no_grad()
def measure_kl(pipe, transitions, state_ids, guidance_scale: float, args, accelerator, reference=False) -> float:
    """Return the mean KL per step in nats from the policy that sampled, or from the base model."""
    kls = []
    for batch_ids in state_ids.split(args.train_batch_size):
        batch = transitions.take(batch_ids)
        mean, std = predict_transition(pipe, batch, guidance_scale, args, accelerator)
        other_mean = batch.means
        if reference:
            other_mean = reference_mean(pipe, batch, guidance_scale, args, accelerator)
        kls.append(gaussian_kl(other_mean, mean, std))
    return accelerator.reduce(torch.cat(kls).mean(), "mean").item()


# ---- Evaluation: the main process, on held-out images with fixed noise and the full schedule -----
@torch.no_grad()
def evaluate(pipe, data: ImagePrompts, functions: dict, pipe_kwargs, args, accelerator, draw: int | None = 0):
    """Return the first held-out images `(n, 3, H, W)` for the grid and the rewards `(N, rewards)` of all.

    The images are made with deterministic steps. `draw` is the number of the start noise. With None, the
    inputs themselves are scored.
    """
    images = []
    rewards = []
    batches = torch.arange(len(data)).split(args.sample_batch_size)
    for indices in tqdm(batches, "held-out images", leave=False, disable=None):
        inputs, prompts, metadata = zip(*(data.load(index) for index in indices.tolist()))
        made = torch.stack(inputs).to(accelerator.device)
        if draw is not None:
            noise = [seeded(args.seed, "evaluation", data.order[index], draw) for index in indices.tolist()]
            with accelerator.autocast():
                made = pipe(list(prompts), made, generator=noise, **pipe_kwargs).images.float()
        if indices[0] < GRID_COLUMNS:
            images.append(made.cpu())
        rewards.append(compute_rewards(functions, made, prompts, metadata)[0])
    return torch.cat(images)[:GRID_COLUMNS], torch.cat(rewards)


def evaluate_baselines(pipe, data: ImagePrompts, functions: dict, weights, pipe_kwargs, args, accelerator) -> dict:
    """Evaluate what the LoRA has to beat.

    These are the inputs, the base model, and the best of `--group_size` images per input from the base model.
    """
    setup = (pipe, data, functions, pipe_kwargs, args, accelerator)
    baselines = {"input": evaluate(*setup, draw=None)}
    pipe.unet.disable_adapters()
    baselines["base"] = evaluate(*setup, draw=0)
    best_images, best = baselines["base"]
    for draw in tqdm(range(1, args.group_size), "draws of the base model", leave=False, disable=None):
        images, rewards = evaluate(*setup, draw)
        better = rewards @ weights > best @ weights
        best_images = torch.where(better[: len(images), None, None, None], images, best_images)
        best = torch.where(better[:, None], rewards, best)
    pipe.unet.enable_adapters()
    baselines["best_of_k_base"] = (best_images, best)
    return baselines


def mean_rewards(name: str, rewards: torch.Tensor, weights, reward_names: list[str]) -> dict[str, float]:
    """Return the mean of the weighted sums of rewards `(N, rewards)`, and the mean of each of several."""
    metrics = {name: (rewards @ weights).mean().item()}
    if len(reward_names) > 1:
        for reward, mean in zip(reward_names, rewards.mean(dim=0).tolist()):
            metrics[f"{name}/{reward}"] = mean
    return metrics


def evaluate_lora(setup: tuple, evaluated: dict, weights, reward_names: list[str]) -> dict[str, float]:
    """Evaluate the LoRA and keep the result in `evaluated`. Return the mean held-out rewards of all kinds."""
    evaluated["trained"] = evaluate(*setup)
    metrics = {}
    for kind, (_, rewards) in evaluated.items():
        metrics.update(mean_rewards(f"heldout_{kind}", rewards, weights, reward_names))
    return metrics


def format_verdict(evaluated: dict, weights) -> str:
    """Return a sentence that compares the LoRA image by image with the base model and the input."""
    if "trained" not in evaluated:
        return "No image was held out, so the result was not evaluated."
    comparisons = []
    for kind, name in {"base": "the base model", "input": "the input"}.items():
        differences = (evaluated["trained"][1] - evaluated[kind][1]) @ weights
        mean = differences.mean()
        error = math.inf
        if len(differences) > 1:
            error = differences.std() / math.sqrt(len(differences))
        result = "no clear difference from"
        if mean > 2 * error:
            result = "better than"
        elif mean < -2 * error:
            result = "worse than"
        count = f"higher on {int((differences > 0).sum())} of {len(differences)} images"
        comparisons.append(f"{result} {name} ({mean:+.3g}, standard error {error:.2g}, {count})")
    return f"Held-out reward with the LoRA: {' and '.join(comparisons)}."


# ---- Resume: checkpoints, written and read by the main process -----------------------------------
def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders checkpoint-<epoch>, the newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True)


def list_settings(args: argparse.Namespace, mixed_precision: str, public: bool = False) -> dict:
    """Return the settings of a run, with the precision in use and without secrets, for comparison.

    Paths are resolved. With `public=True`, only their last part remains.
    """
    settings = dict(vars(args), mixed_precision=mixed_precision)
    settings["reward_fn"] = [public_name(spec) for spec in args.reward_fn]
    for name in PATHS:
        path = Path(settings[name] or "")
        if settings[name] and (path.exists() or path.is_absolute()):
            settings[name] = path.resolve().name if public else str(path.resolve())
    return settings


def save_checkpoint(pipe, state: dict, epoch: int, output_dir: Path, total_limit: int) -> None:
    """Write checkpoint-<epoch> with the LoRA for diffusers and a file state.pt for a resumed run.

    `state` has the settings, the metrics, the LoRA by name, the optimizer and its schedule. It also has the
    scaler, the critic, the tracker, beta and the rewards of the held-out inputs. The checkpoint is written to
    another folder, synchronized and renamed. Only then are old checkpoints deleted.
    """
    folder = output_dir / f"checkpoint-{epoch}"
    incomplete = output_dir / "checkpoint.incomplete"
    shutil.rmtree(incomplete, ignore_errors=True)
    pipe.save_lora_weights(incomplete, get_peft_model_state_dict(pipe.unet))
    with open(incomplete / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    incomplete.rename(folder)
    for old in list_checkpoints(output_dir)[total_limit:]:
        if old != folder:  # after a resume from an older one, newer ones may exist
            shutil.rmtree(old)


def read_checkpoint(args: argparse.Namespace, mixed_precision: str) -> dict | None:
    """Return the state in the newest undamaged checkpoint, or None if there is no checkpoint.

    Exit if all are damaged, or if the settings differ from those of the run.
    """
    requested = args.resume_from_checkpoint
    folders = list_checkpoints(args.output_dir)
    if requested != "latest":
        folders = [path for path in (Path(requested), Path(args.output_dir, requested)) if path.is_dir()][:1]
    elif not folders and not Path(args.output_dir, LORA).exists():
        print("--resume_from_checkpoint=latest: there is no checkpoint, so this is a new run.")
        return None
    for folder in folders:
        try:
            if zipfile.ZipFile(folder / "state.pt").testzip() is not None:  # torch.load would not notice
                raise ValueError("a checksum is wrong")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            break
        except Exception as error:
            print(f"Warning: {folder} cannot be read ({type(error).__name__}: {error}).")
    else:
        raise SystemExit(
            f"error: --resume_from_checkpoint={requested}: no checkpoint can be read. Use latest or a path."
        )
    before = state["args"]
    may_differ = list(FREE_ON_RESUME)
    remedy = "Give the same settings, or another --output_dir for a new run."
    if args.lr_scheduler.startswith("constant"):
        may_differ.append("num_train_epochs")
    elif args.num_train_epochs != before["num_train_epochs"]:
        remedy = f"A {args.lr_scheduler} schedule depends on the number of epochs. {remedy}"
    differences = []
    for name, value in list_settings(args, mixed_precision).items():
        # an older version lacks some flags
        if name in before and value != before[name] and name not in may_differ:
            differences.append(f"--{name}={value} (was {before[name]})")
    if differences:
        raise SystemExit(f"error: {folder} has other settings: {', '.join(differences)}. {remedy}")
    return state


# ---- Files that a run leaves ---------------------------------------------------------------------
def write_metrics(history: list[dict], path: Path) -> None:
    """Write metrics.csv with one row per epoch and the most important columns first."""
    frame = pd.DataFrame(history)
    first = ("epoch", "samples", "reward", "heldout")
    columns = sorted(frame.columns, key=lambda name: not name.startswith(first))
    frame[columns].to_csv(path, index=False, float_format="%.6g")


def write_reward_curve(history: list[dict], title: str, group_size: int, path: Path) -> None:
    """Write reward_curve.png with the rewards over the epochs. Several rewards have a panel each."""
    frame = pd.DataFrame(history)
    suffixes = [name.removeprefix("reward_mean") for name in frame if name.startswith("reward_mean")]
    if len(suffixes) > 1:
        title = "weighted sum"
    figure = Figure(figsize=(8, 3 * len(suffixes)), layout="constrained")
    for axis, suffix in zip(figure.subplots(len(suffixes), squeeze=False).flat, suffixes):
        axis.plot(frame["epoch"], frame[f"reward_mean{suffix}"], ".-", color="silver", label="training samples")
        if "heldout_trained" in frame:
            evaluated = frame.dropna(subset="heldout_trained")
            for color, (kind, label) in enumerate(KINDS.items()):
                label = f"held out: {label.format(group_size)}"
                rewards = evaluated[f"heldout_{kind}{suffix}"]
                if kind == "trained":  # it begins at the base model
                    rewards = [evaluated[f"heldout_base{suffix}"].iloc[-1], *rewards]
                    axis.plot([0, *evaluated["epoch"]], rewards, f"C{color}.-", label=label)
                else:
                    axis.axhline(rewards.iloc[-1], color=f"C{color}", linestyle="--", label=label)
        axis.set(xlabel="epoch", ylabel=textwrap.fill(textwrap.shorten(f"reward: {suffix[1:] or title}", 90), 32))
        axis.locator_params(axis="x", integer=True)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)


def write_grid(evaluated: dict, weights, data: ImagePrompts, title: str, group_size: int, path: Path) -> None:
    """Write samples/epoch-*.png with rows of inputs, targets and results on held-out images."""
    count = min(GRID_COLUMNS, len(data))
    _, prompts, metadata = zip(*map(data.load, range(count)))
    rows = [(KINDS[kind].format(group_size), *result) for kind, result in evaluated.items()]
    targets = []
    for column in metadata[0]:
        if column != "init_image" and all(torch.is_tensor(row[column]) for row in metadata):
            targets.append((column, torch.stack([row[column] for row in metadata]), None))
    rows[1:1] = targets  # below the inputs
    largest = max((rewards @ weights).abs().max().item() for _, rewards in evaluated.values())
    decimals = max(0, 2 - math.floor(math.log10(max(largest, 1e-6))))  # three digits or more
    figure = Figure(figsize=(1.3 * count + 1.3, 1.5 * len(rows) + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    title = f"reward of held-out images, higher is better: {title}"
    figure.suptitle(textwrap.fill(title, 16 * count + 16), fontsize=9)
    for (name, images, rewards), axes in zip(rows, figure.subplots(len(rows), count, squeeze=False)):
        for axis, image in zip(axes, to_pil(images[:count])):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[], frame_on=False)
        if rewards is not None:
            totals = rewards @ weights
            name = f"{name}\nmean {totals.mean():.{decimals}f}"
            for axis, total in zip(axes, totals):
                axis.set_title(f"{total:.{decimals}f}", fontsize=8, pad=3)
        axes[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
    for axis, prompt in zip(axes, prompts):
        axis.set_xlabel(textwrap.fill(textwrap.shorten(prompt, 60), 20), fontsize=7)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def log_picture(path: Path, epoch: int, accelerator: Accelerator) -> None:
    """Send a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.array(Image.open(path).convert("RGB"))[None]
            tracker.log_images({"held-out": pixels}, step=epoch, **options)


def format_results(evaluated: dict, names: list[str], group_size: int) -> str:
    """Return the mean held-out rewards as a table."""
    table = f"| held-out reward | input | base model | base model, best of {group_size} | with the LoRA |\n"
    table += "|---|---|---|---|---|\n"
    for column, name in enumerate(names):
        means = [f"{rewards[:, column].mean():.4g}" for _, rewards in evaluated.values()]
        table += f"| {name} | {' | '.join(means)} |\n"
    return table


def format_model_card(repo_id, results, title, num_epochs: int, prompt, guidance_scale: float, argv, args) -> str:
    """Return the text of README.md with the results and with the code that uses and repeats them."""
    tags = ["stable-diffusion", "stable-diffusion-diffusers", "image-to-image", "diffusers", "lora", "ddpo"]
    data = huggingface_hub.ModelCardData(library_name="diffusers", inference=True, tags=tags)
    base = args.pretrained_model_name_or_path
    if Path(base).exists():
        base = f"path/to/{Path(base).resolve().name}"
    else:
        data.base_model = base
    if base == SD15:
        data.license = "creativeml-openrail-m"
    if args.dataset_name and not Path(args.dataset_name).exists():
        data.datasets = args.dataset_name
    words = []
    for word in argv:
        flag = ""
        if word.startswith("--") and "=" in word:
            flag, _, word = word.partition("=")
            flag += "="
        public_word = public_name(word)
        if os.path.exists(word) or os.path.isabs(public_word):
            public_word = Path(word).resolve().name
        words.append(shlex.quote(flag + public_word))
    return f"""---
{data.to_yaml()}
---

# {repo_id}

A LoRA for image-to-image Stable Diffusion, trained on the reward `{title}` with reinforcement learning
([DDPO](https://huggingface.co/papers/2305.13301), `{args.algorithm}`) for {num_epochs} epochs of
{args.samples_per_epoch} samples. The base model is `{base}`.

{results}

![Reward over the epochs](reward_curve.png)

The curve shows the mean reward of the training samples, which is noisy, and of the held-out images. The
dashed lines are for comparison. All numbers are in metrics.csv, all settings in args.json.

## Use

```python
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image

pipe = StableDiffusionImg2ImgPipeline.from_pretrained("{base}", dtype=torch.float16).to("cuda")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **{SCHEDULER})
pipe.load_lora_weights("{repo_id}")
image = pipe(
    prompt={prompt!r},
    image=load_image("input.png").resize(({args.resolution}, {args.resolution})),  # a square picture
    strength={args.strength},
    num_inference_steps={args.num_inference_steps},
    guidance_scale={guidance_scale},
    generator=torch.manual_seed(0),
).images[0]
```

## Training

```bash
accelerate launch train_img2img_ddpo.py {" ".join(words)}
```
"""


# ---- Main ----------------------------------------------------------------------------------------
def check_processes(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Exit if accelerate's setup cannot work, or if the groups cannot be dealt to the processes."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise SystemExit("error: DeepSpeed and FSDP are not supported. Run `accelerate config`.")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise SystemExit("error: --mixed_precision=fp16 needs a GPU. Use --mixed_precision=no.")
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise SystemExit("error: accelerate found too few GPUs. On CPUs use torchrun, or one process.")
    unit = args.group_size * accelerator.num_processes
    if args.samples_per_epoch % unit:
        raise SystemExit(
            f"error: --samples_per_epoch={args.samples_per_epoch} must be divisible by --group_size={args.group_size}"
            f" times {accelerator.num_processes} process(es)."
            f" Try --samples_per_epoch={math.ceil(args.samples_per_epoch / unit) * unit}."
        )


def load_rewards(args: argparse.Namespace, splits: list[ImagePrompts], device) -> dict[str, Callable]:
    """Load the reward functions by name, and try each one on two images of every split."""
    import_file.cache_clear()  # the files may have changed since the last run of this process
    for name in REWARD_MODULES:
        sys.modules.pop(name, None)
    REWARD_MODULES.clear()
    if args.reward_fn == ["jpeg_compressibility"]:
        PartialState().print("The goal is small JPEG files. Choose another goal with --reward_fn.")
    functions = {}
    for spec in args.reward_fn:
        name = metric_name(public_name(spec))
        if name in functions:
            raise SystemExit(f"error: --reward_fn has two rewards of the name {name}. Rename one of them.")
        functions[name] = load_reward(spec)
    for data in splits:
        images, prompts, metadata = zip(*map(data.load, range(min(2, len(data)))))
        try:
            compute_rewards(functions, torch.stack(images).to(device), prompts, metadata)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            raise SystemExit(f"error: --reward_fn={list(functions)} cannot score: {reason}") from None
    return functions


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> StableDiffusionImg2ImgDDPOPipeline:
    """Return the frozen model in the precision of the run, with a scheduler whose steps have a density."""
    name = args.pretrained_model_name_or_path
    convert = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
    remedy = f"Check the name and the connection. Convert a single file with {convert}."
    with exit_on_failure(f"--pretrained_model_name_or_path={name}", remedy):
        pipe = StableDiffusionImg2ImgDDPOPipeline.from_pretrained(
            name,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32),
            safety_checker=None,
            requires_safety_checker=False,
        )
    unet = pipe.unet.config
    if unet.in_channels != pipe.vae.config.latent_channels or unet.time_cond_proj_dim or unet.addition_embed_type:
        raise SystemExit(f"error: --pretrained_model_name_or_path={name}: SDXL, LCM and inpainting are not supported.")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)  # no gradient is ever taken of the others
    if accelerator.device.type == "cuda":
        pipe.vae.enable_slicing()  # decoding a whole batch would take more memory than training
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe.to(accelerator.device)


def add_lora(unet, args: argparse.Namespace) -> dict[str, torch.nn.Parameter]:
    """Add a trainable LoRA in float32 and return its parameters by name."""
    layers = args.lora_layers.replace(" ", "").split(",")
    modules = [f".{name}" for name, _ in unet.named_modules()]
    for layer in layers:  # peft says nothing if only some of them are missing
        if not any(module.endswith(f".{layer}") for module in modules):
            raise SystemExit(f"error: --lora_layers={args.lora_layers}: the UNet has no module {layer!r}.")
    unet.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=layers, init_lora_weights="gaussian")
    )
    cast_training_params(unet, dtype=torch.float32)
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def describe_epoch(metrics: dict, clip_range: float, seconds: float, evaluation_seconds: float, args) -> str:
    """Return a line on an epoch that fits two lines of a terminal. Warn of settings that cannot work."""
    epochs_left = args.num_train_epochs - metrics["epoch"]
    seconds_left = epochs_left * seconds + math.ceil(epochs_left / args.validation_epochs) * evaluation_seconds
    line = f"epoch {metrics['epoch']}: {seconds:.1f} s, {timedelta(seconds=round(seconds_left))} left"
    line += f", reward {metrics['reward_mean']:.4g}"
    if "heldout_trained" in metrics:
        input, base, trained = (metrics[f"heldout_{kind}"] for kind in ("input", "base", "trained"))
        line += f", held out: input {input:.4g}, base {base:.4g}, LoRA {trained:.4g}"
    for name, value in metrics.items():
        if name.startswith("reward_mean/"):
            line += f", {name.removeprefix('reward_mean/')[:11]} {value:.3g}"
    if torch.cuda.is_available():
        line += f", {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"
    line += f", {metrics['unet_evaluations']:,} UNet evaluations"
    if metrics["reward_group_std"] == 0:
        warn_once("all rewards within groups are equal; raise --strength, or use a finer reward")
    if metrics["ratio_deviation_start"] > clip_range:
        warn_once(f"rounding moves ratios by more than the clip range, {clip_range:.0e}; use fp16, not bf16")
    if metrics["kl"] > 10:
        warn_once("an epoch moves the policy by more than 10 nats per step; lower --learning_rate")
    return textwrap.shorten(line, 159, placeholder=" ...")


def main(argv: list[str] | None = None) -> None:
    """Train a LoRA as the command line says."""
    # ---- Settings, data and rewards: mistakes are found before a model loads ------------------------
    args = parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack the characters of a prompt
    scratch = tempfile.TemporaryDirectory()  # deleted at the end
    output_dir = Path(scratch.name if args.dry_run else args.output_dir).resolve()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.dry_run or args.report_to == "none" else args.report_to,
        project_dir=output_dir / "logs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # rewards may be slow
    )
    accelerator.gradient_accumulation_steps = 1  # another number in the environment would scale the gradient
    check_processes(args, accelerator)
    device = accelerator.device
    is_main = accelerator.is_main_process
    checkpoint = None
    if is_main and args.resume_from_checkpoint and not args.dry_run:
        checkpoint = read_checkpoint(args, accelerator.mixed_precision)
    (checkpoint,) = broadcast_object_list([checkpoint])
    progress = functools.partial(tqdm, leave=False, disable=None if is_main else True)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.demo and device.type == "cpu":
        torch.set_num_threads(1)  # on a model this small several threads only wait for each other
    train_data, held_out = load_data(args)
    functions = load_rewards(args, [train_data, held_out] if len(held_out) else [train_data], device)
    reward_names = list(functions)
    weights = torch.tensor(args.reward_weights, dtype=torch.float64)
    title = reward_names[0]
    if args.reward_weights != [1]:
        title = " + ".join(f"{weight:g} x {name}" for weight, name in zip(args.reward_weights, reward_names))
    repo_id = args.hub_model_id or output_dir.name
    if args.push_to_hub and not args.dry_run and is_main:
        remedy = "Log in with `hf auth login`, check the connection, or choose another --hub_model_id."
        with exit_on_failure(f"--push_to_hub cannot write to {repo_id}", remedy):
            repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True).repo_id
            huggingface_hub.auth_check(repo_id, write=True)

    # ---- Model, LoRA, optimizer ------------------------------------------------------------------
    accelerator.print(f"Loading {args.pretrained_model_name_or_path}.")
    pipe = load_pipeline(args, accelerator)
    pipe.unet.num_evaluations = 0
    pipe.unet.register_forward_pre_hook(count_evaluations)
    set_seed(args.seed)  # for the initial LoRA and critic, nothing else is drawn from the global generator
    lora = add_lora(pipe.unet, args)
    lora_parameters = list(lora.values())
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    optimizer = torch.optim.AdamW(lora_parameters, args.learning_rate, weight_decay=args.adam_weight_decay, **adam)
    num_updates = args.num_train_epochs * args.num_inner_epochs * args.updates_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_updates
    )
    optimizer = accelerator.prepare(optimizer)
    stateful = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}  # in checkpoints, beside the LoRA
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    if args.algorithm == "sac":
        critic = ValueCritic(pipe.unet.config.in_channels, pipe.unet.config.cross_attention_dim).to(device)
        target_critic = copy.deepcopy(critic).requires_grad_(False)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
        stateful.update(critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)
    tracker = {}  # for --advantage=tracker, the last rewards of each image and prompt
    history = []  # the metrics of each epoch
    beta = 1.0  # for --algorithm=trpo, the weight of the KL

    # ---- Denoising steps, clip range, guidance ------------------------------------------------------
    pipe.scheduler.set_timesteps(args.num_inference_steps)
    timesteps, _ = pipe.get_timesteps(args.num_inference_steps, args.strength, "cpu")
    num_trainable = count_trainable_steps(pipe.scheduler, timesteps, args)
    elements = pipe.unet.config.in_channels * (args.resolution // pipe.vae_scale_factor) ** 2  # of latents
    clip_range = args.clip_range or math.sqrt(2 * TRUST_REGION_NATS) / elements
    guidance_scale = args.guidance_scale
    if not args.prompt and not train_data.caption_column:
        guidance_scale = 1.0  # there is no prompt to guide to
    pipe_kwargs = {"strength": args.strength, "num_inference_steps": args.num_inference_steps}
    pipe_kwargs.update(guidance_scale=guidance_scale, guidance_rescale=args.guidance_rescale, output_type="pt")

    # ---- Resume ----------------------------------------------------------------------------------
    if checkpoint is not None:
        for name, parameter in lora.items():
            parameter.data.copy_(checkpoint["lora"][name])
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])
        tracker = checkpoint["tracker"]
        history = checkpoint["history"]
        beta = checkpoint["beta"]
        accelerator.print(f"Continuing from checkpoint-{len(history)}.")
        if len(train_data) != checkpoint["num_images"]:
            change = f"there are {len(train_data)} training images, there were {checkpoint['num_images']}"
            accelerator.print(f"Warning: {change}.")

    # ---- What will be done, and what the LoRA has to beat --------------------------------------------
    num_groups = args.samples_per_epoch // args.group_size
    settings = list_settings(args, accelerator.mixed_precision, public=True)
    accelerator.init_trackers("img2img-ddpo", {name: str(value) for name, value in settings.items()})
    prompts = args.prompt or "none"
    if train_data.caption_column:
        prompts = f"the column {train_data.caption_column}"
    accelerator.print(f"""
  run      {args.algorithm} on {title}
  images   {len(train_data)} for training, {len(held_out)} held out, at {args.resolution} px
  prompts  {prompts}, guidance {guidance_scale:g}
  epoch    {num_groups} groups of {args.group_size} samples, each of one image and prompt
  steps    {len(timesteps)}, of which the first {num_trainable} may be stochastic and trained
  device   {device}, {accelerator.num_processes} process(es), mixed precision {accelerator.mixed_precision}
  LoRA     {sum(map(torch.numel, lora_parameters)):,} parameters, clip range {clip_range:.2e}
  resume   the same command with --resume_from_checkpoint=latest, after an interruption
""")
    evaluated = {}  # held-out pictures and rewards of the input, the base model and the LoRA
    setup = (pipe, held_out, functions, pipe_kwargs, args, accelerator)  # for `evaluate`
    evaluation_seconds = 0.0
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "args.json").write_text(json.dumps(settings, indent=2))
    if is_main and len(held_out):
        print(f"Evaluating the base model on {len(held_out)} images, {args.group_size} draws each.")
        evaluation_start = time.monotonic()
        evaluated = evaluate_baselines(pipe, held_out, functions, weights, pipe_kwargs, args, accelerator)
        evaluation_seconds = (time.monotonic() - evaluation_start) / (args.group_size + 1)
        _, rewards = evaluated["input"]
        before = (checkpoint or {}).get("heldout_input", rewards)  # equal in a new run
        if before.shape != rewards.shape or not torch.allclose(before, rewards, rtol=1e-3):
            warn_once("the held-out inputs have other rewards than before; pictures or a reward have changed")
        if not history:
            grid = output_dir / "samples" / "epoch-0000.png"
            write_grid(evaluated, weights, held_out, title, args.group_size, grid)
    accelerator.wait_for_everyone()
    num_epochs = 1 if args.dry_run else args.num_train_epochs
    for epoch in range(len(history), num_epochs):
        epoch_start = time.monotonic()
        pipe.unet.num_evaluations = 0

        # ==== 1. Sample: this process's groups, each from one image, prompt and start noise =======
        groups = draw_groups(len(train_data), num_groups, epoch, args)
        own_groups = torch.arange(num_groups).chunk(accelerator.num_processes)[accelerator.process_index]
        groups_per_batch = max(1, args.sample_batch_size // args.group_size)
        plan = plan_steps(len(timesteps), num_trainable, epoch, args)
        batches = []
        for group_ids in progress(own_groups.split(groups_per_batch), f"epoch {epoch + 1}, sampling"):
            with accelerator.autocast():
                batch = sample_groups(pipe, train_data, groups, group_ids.tolist(), plan, epoch, pipe_kwargs, args)
            batches.append(batch)
        transitions = Transitions(*map(torch.cat, zip(*(batch[3] for batch in batches))))

        # ==== 2. Score: all rewards on each batch, then the rewards of all processes ==============
        rewards = []
        infos = []
        for images, prompts, metadata, _ in progress(batches, f"epoch {epoch + 1}, scoring"):
            batch_rewards, info = compute_rewards(functions, images.to(device), prompts, metadata)
            rewards.extend(batch_rewards.tolist())
            infos.extend([info] * len(images))  # for each image, as batches may differ in size
        rewards = torch.tensor(gather_object(rewards), dtype=torch.float64)  # (samples_per_epoch, rewards)

        # ==== 3. Advantages: each reward is normalized on its own, then weighted ==================
        keys = [group for group in groups for _ in range(args.group_size)]
        advantages = compute_advantages(rewards, args.advantage, args.group_size, keys, tracker) @ weights
        advantages = advantages[transitions.sample_ids].float().to(device)  # (states, actions)

        # ==== 4. Update: passes over the epoch, updates with a part of every group, micro-batches of states
        metrics = {"epoch": epoch + 1, "samples": (epoch + 1) * args.samples_per_epoch}
        if args.algorithm == "sac":
            critics = (critic, target_critic, critic_optimizer)
            metrics["critic_loss"] = fit_critic(*critics, transitions, advantages, accelerator)
        losses = []  # of each transition in each update
        deviations = []  # of each ratio from 1 in each update
        grad_norms = []
        skipped_updates = 0
        kl_after_update = 0.0
        for inner_epoch in range(args.num_inner_epochs):
            order = torch.randperm(args.group_size, generator=seeded(args.seed, "update", epoch, inner_epoch))
            for part, members in enumerate(order.tensor_split(args.updates_per_epoch)):
                if kl_after_update > 2 * args.target_kl:  # TRPO ends the epoch
                    continue
                ratios = []  # of each transition in this update
                kls = []
                in_update = torch.isin(transitions.sample_ids % args.group_size, members)  # (states, actions)
                state_ids = in_update.any(dim=1).nonzero().flatten()
                num_transitions = in_update.sum().item() * accelerator.num_processes  # all have as many
                for batch_ids in progress(state_ids.split(args.train_batch_size), f"epoch {epoch + 1}, training"):
                    batch = transitions.take(batch_ids)
                    batch_advantages = advantages[batch_ids]  # (n, K)
                    mask = in_update[batch_ids].to(device)  # (n, K)

                    # forward
                    mean, std = predict_transition(pipe, batch, guidance_scale, args, accelerator)
                    num_actions = batch.actions.shape[1]
                    means_and_stds = [value.repeat_interleave(num_actions, dim=0) for value in (mean, std)]
                    log_probs = gaussian_log_prob(batch.actions.flatten(0, 1), *means_and_stds).view(-1, num_actions)
                    ratio = torch.exp(log_probs - batch.log_probs)
                    kl = gaussian_kl(batch.means, mean, std)[:, None]  # (n, 1) nats

                    # loss
                    if args.algorithm == "ppo":
                        loss = ppo_loss(log_probs, batch.log_probs, batch_advantages, clip_range)
                    elif args.algorithm == "reinforce":
                        loss = reinforce_loss(log_probs, batch_advantages)
                    elif args.algorithm == "trpo":
                        loss = trpo_loss(log_probs, batch.log_probs, batch_advantages, kl / elements, beta)
                    else:
                        actions = draw_actions(mean, std, batch, args.seed, epoch, inner_epoch, part)
                        loss = sac_loss(target_critic(actions, batch)) / elements  # as the log-probs are
                    if args.kl_coef:
                        reference = reference_mean(pipe, batch, guidance_scale, args, accelerator)
                        loss = loss + args.kl_coef * gaussian_kl(reference, mean, std)[:, None] / elements

                    # backward: this process's part of the mean over the update's transitions
                    accelerator.backward(loss[mask].sum() / num_transitions)
                    losses.append(loss.detach()[mask])
                    ratios.append(ratio.detach()[mask])
                    kls.append(kl.detach().expand_as(mask)[mask])

                # step
                sum_gradients(lora_parameters, accelerator)
                grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm).item()
                deviations.append((accelerator.gather(torch.cat(ratios)) - 1).abs())
                if not math.isfinite(grad_norm):
                    # fp16's scaler skips an update that overflows and lowers its scale. A NaN loss stays NaN
                    losses_are_finite = accelerator.gather(torch.cat(losses)).isfinite().all()
                    if not losses_are_finite or accelerator.scaler is None or accelerator.scaler.get_scale() < 1:
                        raise RuntimeError(f"the gradient's norm is {grad_norm}, lower --learning_rate")
                optimizer.step()
                optimizer.zero_grad()
                if optimizer.step_was_skipped:
                    skipped_updates += 1
                    continue
                lr_scheduler.step()
                grad_norms.append(grad_norm)
                if args.algorithm == "trpo":
                    kl_after_update = measure_kl(pipe, transitions, state_ids, guidance_scale, args, accelerator)
        if args.algorithm == "trpo":
            if grad_norms:
                beta = adapt_beta(beta, kl_after_update, args.target_kl)
            metrics.update(beta=beta, kl_after_update=kl_after_update)
        if not all(parameter.isfinite().all() for parameter in lora_parameters):
            raise RuntimeError(f"the LoRA is not finite, lower --learning_rate={args.learning_rate}")

        # ==== 5. Evaluate, log, save: the main process, while the others wait =====================
        evaluations_before = history[-1]["unet_evaluations"] if history else 0
        totals = (rewards @ weights).view(num_groups, args.group_size)
        metrics.update(
            unet_evaluations=evaluations_before + sum(gather_object([pipe.unet.num_evaluations])),
            **mean_rewards("reward_mean", rewards, weights, reward_names),
            reward_std=totals.std(unbiased=False).item(),
            reward_group_std=totals.std(dim=1, unbiased=False).mean().item(),
            loss=accelerator.gather(torch.cat(losses)).mean().item(),
            kl=accelerator.gather(torch.cat(kls)).mean().item(),
            ratio_deviation_start=deviations[0].max().item(),  # no step yet, so every ratio should be 1
            ratio_deviation=torch.cat(deviations).max().item(),
            clip_fraction=(torch.cat(deviations) > clip_range).float().mean().item(),
            grad_norm=sum(grad_norms) / max(1, len(grad_norms)),
            skipped_updates=skipped_updates,
            learning_rate=lr_scheduler.get_last_lr()[0],
        )
        metrics.update(pd.DataFrame(gather_object(infos)).mean().to_dict())
        seconds = time.monotonic() - epoch_start
        is_last_epoch = epoch + 1 == num_epochs
        if is_last_epoch or (epoch + 1) % args.validation_epochs == 0:
            few_states = torch.arange(min(4, len(transitions.timesteps)))
            metrics["kl_reference"] = measure_kl(
                pipe, transitions, few_states, guidance_scale, args, accelerator, reference=True
            )
            if is_main and len(held_out):
                metrics.update(evaluate_lora(setup, evaluated, weights, reward_names))
        history.append(metrics)
        if is_main:
            write_metrics(history, output_dir / "metrics.csv")
            if is_last_epoch or (epoch + 1) % args.checkpointing_epochs == 0:
                state = {name: part.state_dict() for name, part in stateful.items()}
                state["lora"] = {name: parameter.detach() for name, parameter in lora.items()}
                state.update(beta=beta, tracker=tracker, history=history, num_images=len(train_data))
                state["args"] = list_settings(args, accelerator.mixed_precision)
                if evaluated:
                    state["heldout_input"] = evaluated["input"][1]
                save_checkpoint(pipe, state, epoch + 1, output_dir, args.checkpoints_total_limit)
            if "heldout_trained" in metrics:
                grid = output_dir / "samples" / f"epoch-{epoch + 1:04d}.png"
                write_grid(evaluated, weights, held_out, title, args.group_size, grid)
                log_picture(grid, epoch + 1, accelerator)
            print(describe_epoch(metrics, clip_range, seconds, evaluation_seconds, args), flush=True)
        accelerator.log(metrics, step=epoch + 1)
        accelerator.wait_for_everyone()

    # ---- The result ------------------------------------------------------------------------------
    if is_main and not args.dry_run:
        pipe.save_lora_weights(output_dir, get_peft_model_state_dict(pipe.unet))  # all keys in PEFT's form
        grid = output_dir / "samples" / f"epoch-{len(history):04d}.png"
        if evaluated and "trained" not in evaluated:  # the run was resumed at its end, or rolled back to it
            history[-1].update(evaluate_lora(setup, evaluated, weights, reward_names))
            write_grid(evaluated, weights, held_out, title, args.group_size, grid)
        write_metrics(history, output_dir / "metrics.csv")
        write_reward_curve(history, title, args.group_size, output_dir / "reward_curve.png")
        verdict = format_verdict(evaluated, weights)
        print(verdict)
        results = verdict
        if evaluated:
            print(f"Grid:   {grid}")
            picture = f"![Held-out images and their rewards](samples/{grid.name})"
            results = f"{format_results(evaluated, reward_names, args.group_size)}\n{verdict}\n\n{picture}"
        _, prompt, _ = train_data.load(0)
        argv = sys.argv[1:] if argv is None else argv
        card = format_model_card(repo_id, results, title, len(history), prompt, guidance_scale, argv, args)
        (output_dir / "README.md").write_text(card, encoding="utf-8")
        print(f"Curve:  {output_dir}/reward_curve.png\nCard:   {output_dir}/README.md")
        print(f"LoRA:   {output_dir}/{LORA}")
        if args.push_to_hub:
            files = [LORA, "README.md", "args.json", "metrics.csv", "reward_curve.png", f"samples/{grid.name}"]
            upload = huggingface_hub.upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=files)
            print(f"Uploaded to {upload.repo_url}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if args.dry_run:
        accelerator.print("Dry run passed.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the same command with --resume_from_checkpoint=latest to continue.")
