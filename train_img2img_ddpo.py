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

    python train_img2img_ddpo.py --demo                     # bundled, no download, a minute on one CPU core
    accelerate launch train_img2img_ddpo.py --train_data_dir my_pictures --reward_fn my_reward.py:reward \
        --mixed_precision fp16 --output_dir my-lora         # Stable Diffusion 1.5, one GPU or several

An epoch is in `main`, from sampling to saving; the mathematics of a step are in pipeline_img2img_ddpo.py.
"""

import argparse
import ast
import base64
import copy
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import NamedTuple


# else importing diffusers warns about torchvision, and each long caption is printed when it is cut off
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import requests
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
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
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel
from transformers import AutoModelForImageClassification as AutoClassifier

from pipeline_img2img_ddpo import StableDiffusionImg2ImgDDPOPipeline, ddim_transition, gaussian_log_prob, predict_noise


check_min_version("0.40.0")

# KL per step that the default clip range allows: DDPO's 1e-4 at 512 px, where latents have 16384 elements
TRUST_REGION_NATS = 1.34
# Steps to latents with less noise variance are the tail: 3 to 8 times as sensitive to the UNet in their
# log-probability as the others, they would dominate the gradient
TAIL_VARIANCE = 0.01
TRAINED_ROW_COST = 3  # forward and backward, in UNet forwards
SCHEDULER = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # gives each step a density
LORA = "pytorch_lora_weights.safetensors"
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
DEMO = Path(__file__).resolve().parent / "tests" / "demo"
MAY_BE_ZERO = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay finish_steps guidance_rescale guidance_scale kl_coef
    lr_warmup_steps num_validation_images seed
""".split()
# What may differ when a run is resumed, without making it another run
FREE_ON_RESUME = """
    demo dry_run output_dir cache_dir gradient_checkpointing sample_batch_size train_batch_size report_to
    validation_epochs checkpointing_epochs checkpoints_total_limit resume_from_checkpoint push_to_hub hub_model_id
""".split()


# ---- Arguments -----------------------------------------------------------------------------------
def make_parser() -> argparse.ArgumentParser:
    """All flags. A number that may be 0 and what a resumed run may change are also named above."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="train_img2img_ddpo.py (--train_data_dir FOLDER | --dataset_name NAME | --demo) [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="Train the bundled tiny model, with options for it.")
    add("--dry_run", action="store_true", help="Run one epoch and evaluation, and keep nothing.")

    add = parser.add_argument_group("model").add_argument
    sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    add("--pretrained_model_name_or_path", default=sd15, help="Stable Diffusion 1.x, 2.x: Hub id or folder.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")
    add("--rank", type=int, default=4, help="Rank of the LoRA; its alpha is the same.")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0", help="UNet modules with a LoRA.")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="Folder of pictures; captions in .txt files or metadata.jsonl or .csv.")
    add("--dataset_name", help="Dataset of the Hub, or folder of parquet, tar or `save_to_disk`.")
    add("--dataset_config_name", help="Configuration of that dataset.")
    add("--image_column", default="image", help="Column with the input images.")
    add("--caption_column", help="Column with the prompts; by default `text` if there is one.")
    add("--prompt", help="One prompt for every image, in place of captions.")
    add("--max_train_samples", type=int, help="Train on so many images; by default on all.")
    add("--num_validation_images", type=int, help="Held-out images; by default 8, at most a third of all.")
    add("--resolution", type=int, default=512, help="Side of the square that images are cut to.")
    add("--center_crop", action="store_true", help="Crop in the middle, not at a place drawn once.")
    add("--random_flip", action="store_true", help="Flip half of the groups' images horizontally.")
    add("--cache_dir", help="Where the model and the dataset are downloaded to.")

    add = parser.add_argument_group("policy").add_argument
    forms = f"{', '.join(REWARDS)}, each with '(option=value)'; file.py:function; http(s)://host/path."
    add("--reward_fn", nargs="+", default=["jpeg_compressibility"], metavar="REWARD", help=forms)
    add("--reward_weights", nargs="+", type=float, metavar="WEIGHT", help="One each; by default 1.")
    add("--algorithm", choices=["ppo", "reinforce", "trpo", "sac"], default="ppo", help="Policy objective.")
    add("--strength", "--noise_strength", type=float, default=0.4, help="How far to noise the input.")
    add("--num_inference_steps", type=int, default=50, help="Steps at strength 1; steps * strength are run.")
    add("--guidance_scale", type=float, default=5.0, help="Classifier-free guidance; 1, or no prompts: off.")
    add("--guidance_rescale", type=float, default=0.0, help="Rescaling of the guided prediction, in [0, 1].")
    add("--eta", type=float, default=1.0, help="Noise of the stochastic step, in (0, 1]; 1 is DDPM's.")
    add("--samples_per_epoch", type=int, default=64, help="Images per epoch, on all devices together.")
    add("--group_size", type=int, default=8, help="Samples of one image, compared with each other.")
    add("--finish_steps", type=int, default=2, help="Large steps behind the stochastic one; 0: all.")
    add("--all_steps", action="store_true", help="Plain DDPO: every step is stochastic and trained.")
    add("--train_tail", action="store_true", help="Train the last, nearly noise-free steps too.")
    baselines = "Baseline: mean of the group, running mean of the image and prompt, or mean of the epoch."
    add("--advantage", choices=["group", "tracker", "batch"], default="group", help=baselines)
    add("--clip_range", type=float, help="PPO's, of the ratio; by default sqrt(2 * 1.34) / latent elements.")
    add("--target_kl", type=float, default=0.1, help="TRPO's bound of the KL per step, in nats.")
    add("--kl_coef", type=float, help="Weight of the KL to the base model; by default 0, for sac 0.001.")

    add = parser.add_argument_group("training").add_argument
    add("--num_train_epochs", type=int, default=50, help="Epochs; one is a rollout and its updates.")
    add("--updates_per_epoch", type=int, help="Updates per pass over a rollout; by default 2, reinforce 1.")
    add("--num_inner_epochs", type=int, default=1, help="Passes over a rollout.")
    add("--sample_batch_size", type=int, default=8, help="Images sampled at once per device (or a group).")
    add("--train_batch_size", type=int, default=1, help="UNet rows trained at once per device.")
    add("--gradient_checkpointing", action="store_true", help="Save memory by a second forward pass.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default accelerate's setting.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs.")
    add("--learning_rate", type=float, default=3e-4, help="Learning rate.")
    schedules = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    add("--lr_scheduler", choices=schedules, default="constant", help="Schedule over the updates.")
    add("--lr_warmup_steps", type=int, default=0, help="Updates in which the rate rises.")
    add("--adam_beta1", type=float, default=0.9, help="Adam's beta1.")
    add("--adam_beta2", type=float, default=0.999, help="Adam's beta2.")
    add("--adam_weight_decay", type=float, default=1e-4, help="Weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon.")
    add("--max_grad_norm", type=float, default=1.0, help="Norm that the gradient is clipped to.")
    add("--seed", type=int, default=0, help="Seed of everything that is drawn.")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="img2img-ddpo-lora", help="Folder of all that is written.")
    add("--validation_epochs", type=int, default=5, help="Epochs between evaluations on held-out images.")
    add("--checkpointing_epochs", type=int, default=1, help="Epochs between checkpoints.")
    add("--checkpoints_total_limit", type=int, default=2, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", help="`latest`, or the name of a checkpoint in --output_dir.")
    add("--report_to", default="none", help="Tracker of metrics and pictures, such as `tensorboard`, or `all`.")
    add("--push_to_hub", action="store_true", help="Upload the result; see `hf auth login`.")
    add("--hub_model_id", help="Repository to upload to; by default the name of --output_dir.")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with flag, value and remedy if it is wrong whatever the data and model are."""
    parser = make_parser()
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**json.loads((DEMO / "options.json").read_text()))
        parser.set_defaults(pretrained_model_name_or_path=str(DEMO / "model"), train_data_dir=str(DEMO / "images"))
    args = parser.parse_args(argv)
    fill_defaults(args)
    check_args(args, parser.error)
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    """The defaults that depend on other flags."""
    if args.reward_weights is None:
        args.reward_weights = [1.0] * len(args.reward_fn)
    if args.updates_per_epoch is None:
        args.updates_per_epoch = 1 if args.algorithm == "reinforce" else min(2, args.group_size)
    if args.kl_coef is None:
        args.kl_coef = 0.001 if args.algorithm == "sac" else 0.0


def check_args(args: argparse.Namespace, error: Callable) -> None:
    """Calls `error` if a number is out of range, or if options contradict each other."""
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        if not value >= 0:  # not a number, too
            error(f"--{name}={value} must not be negative.")
        if value == 0 and name not in MAY_BE_ZERO:
            error(f"--{name}={value} must be above 0.")
        if value > 1 and name in ("strength", "eta", "guidance_rescale"):
            error(f"--{name}={value} must be at most 1.")
    if (args.train_data_dir is None) == (args.dataset_name is None):
        error("Images come from --train_data_dir or from --dataset_name: give one of them, or try --demo.")
    source = Path(args.train_data_dir or args.dataset_name)
    output_dir = Path(args.output_dir).resolve()
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        error(f"--output_dir={args.output_dir}: {existing} is no folder that can be written to.")
    if source.is_dir() and output_dir.is_relative_to(source.resolve()):
        error(f"--output_dir={args.output_dir} is in the folder of images: its pictures would be trained on.")
    used = Path(args.output_dir, LORA).exists() or list_checkpoints(args.output_dir)
    if used and not args.resume_from_checkpoint and not args.dry_run:
        error(f"--output_dir={args.output_dir} holds a run: add --resume_from_checkpoint=latest.")
    if len(args.reward_fn) != len(args.reward_weights):
        error(f"--reward_weights={args.reward_weights}: give one for each of --reward_fn={args.reward_fn}.")
    if args.resolution % 8:
        error(f"--resolution={args.resolution} must be divisible by 8: try {args.resolution // 8 * 8}.")
    if int(args.num_inference_steps * args.strength) == 0:
        steps = f"--num_inference_steps={args.num_inference_steps} * --strength={args.strength}"
        error(f"{steps} leaves 0 steps: raise one of them.")
    if args.updates_per_epoch > args.group_size:
        error(f"--updates_per_epoch={args.updates_per_epoch} must be at most --group_size={args.group_size}.")
    if args.algorithm == "reinforce" and args.updates_per_epoch * args.num_inner_epochs > 1:
        error("--algorithm=reinforce makes one update: drop --updates_per_epoch and --num_inner_epochs.")
    if args.report_to not in ("all", "none", *map(str, get_available_trackers())):
        error(f"--report_to={args.report_to} is not installed: pip install {args.report_to}")


# ---- Data: any source -> rows with pictures not yet decoded -> images, prompts, metadata ---------
@functools.cache
def warn_once(message: str) -> None:
    """Prints a warning, the same one only once."""
    print(f"Warning: {message}.")


def is_picture(cell) -> bool:
    """Whether a cell of a row is a picture as datasets keeps it: {"bytes", "path"}."""
    return isinstance(cell, dict) and cell.keys() == {"bytes", "path"}


def read_metadata(table: Path) -> list[dict]:
    """Rows of a metadata file: `file_name` is the column `image`, `X_file_name` a column X of pictures."""
    if table.suffix == ".csv":
        records = datasets.Dataset.from_pandas(pd.read_csv(table, keep_default_na=False, na_values=[""])).to_list()
    else:
        with open(table, encoding="utf-8-sig") as lines:
            records = [json.loads(line) for line in lines if line.strip()]
    rows = []
    for record in records:
        row = {}
        for name, value in record.items():
            if name.endswith("file_name"):
                name = name.removesuffix("file_name").rstrip("_") or "image"
                value = {"bytes": None, "path": str(table.parent / value)} if value else None
            row[name] = value
        rows.append(row)
    return rows


def read_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """A folder of pictures by split: those in its folders train, validation and test; all others are of train.
    Columns come from metadata files, or else from class folders; captions, without a column `text`, from .txt
    files beside the pictures. Tells of pictures that metadata files leave out."""
    splits = {"train": [], "validation": [], "test": []}
    pictures = []
    rows = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(parent, name) for name in sorted(names) if not name.startswith(".")]:
            if path.name in ("metadata.jsonl", "metadata.csv"):
                rows.extend(read_metadata(path))
            elif path.name.lower().endswith(SUFFIXES):
                pictures.append(path)
    if rows:
        listed = {cell["path"] for row in rows for cell in row.values() if is_picture(cell)}
        unlisted = [path for path in pictures if str(path) not in listed]
        if unlisted:
            PartialState().print(f"{len(unlisted)} pictures, as {unlisted[0]}, are in no metadata: not used.")
    else:
        for path in pictures:
            rows.append({"image": {"bytes": None, "path": str(path)}})
            if path.parent not in (folder, *map(folder.joinpath, splits)):
                rows[-1]["label"] = path.parent.name
    if not rows:
        raise FileNotFoundError("there is no picture")
    names = dict.fromkeys(chain(*rows))
    for row in rows:
        picture = next((cell["path"] for cell in row.values() if is_picture(cell)), str(folder))
        caption = Path(picture).with_suffix(".txt")
        if "text" not in names and caption.is_file():
            row["text"] = caption.read_text(encoding="utf-8-sig", errors="replace").strip()
        top = os.path.relpath(picture, folder).split(os.sep)[0]
        splits.get(top, splits["train"]).append(row)
    names = dict.fromkeys(chain(*rows))
    for split, part in splits.items():
        columns = {name: [row.get(name) for row in part] for name in names}
        splits[split] = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
        for name, cells in columns.items():
            if any(map(is_picture, cells)):
                splits[split] = splits[split].cast_column(name, datasets.Image(decode=False))
    return splits


def holds_picture(cell) -> bool:
    """Whether a cell is a picture, the path of one, or the bytes of one."""
    if isinstance(cell, str):
        return cell.lower().endswith(SUFFIXES) and os.path.isfile(cell)
    if isinstance(cell, bytes):
        with suppress(OSError):
            return Image.open(io.BytesIO(cell)) is not None
    return is_picture(cell)


def read_splits(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """The rows of any source by split, without a format, and pictures, which are not decoded, of one type."""
    source = args.dataset_name
    if args.train_data_dir:
        splits = read_folder(Path(args.train_data_dir).resolve())
    elif Path(source, "dataset_dict.json").exists() or Path(source, "state.json").exists():
        splits = datasets.load_from_disk(source)
    elif source.endswith(".parquet"):
        splits = datasets.load_dataset("parquet", data_files=source, cache_dir=args.cache_dir)
    else:
        splits = datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    for split, rows in splits.items():
        rows = rows.with_format(None)
        for name, feature in rows.features.items():
            is_image = isinstance(feature, datasets.Image)
            if is_image or any(map(holds_picture, rows.select_columns(name)[:100][name])):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        splits[split] = rows
    return splits


def picture_keys(rows: datasets.Dataset, column: str) -> list:
    """What rows with the same picture have in common: the hash of its bytes or path; None without one."""
    keys = []
    for row in tqdm(rows.select_columns(column), "comparing pictures", leave=False, disable=None):
        cell = row[column]
        keys.append(cell and hash(cell["bytes"] or cell["path"]))
    return keys


@dataclass
class ImagePrompts:
    """Some rows of a split, each read when it is needed."""

    rows: datasets.Dataset
    order: list[int]  # numbers of the rows
    caption_column: str | None
    args: argparse.Namespace

    def __len__(self) -> int:
        return len(self.order)

    def load(self, index: int, flip: bool = False, centering=(0.5, 0.5)) -> tuple[torch.Tensor, str, dict]:
        """The init image `(3, H, W)` in [0, 1], the prompt, and the metadata: the row's other columns,
        pictures cut and flipped as the image is, classes by name, and `init_image`. Where a picture cannot
        be read, the next row takes its place, with a warning; raises a ValueError if none can be read."""
        for number in self.order[index:] + self.order[:index]:
            row = dict(self.rows[number])
            try:
                for name, feature in self.rows.features.items():
                    cell = row[name]
                    if isinstance(feature, datasets.Image) and (cell or name == self.args.image_column):
                        row[name] = self.decode(cell, flip, centering)
            except Exception as error:
                path = cell and cell["path"]
                warn_once(f"row {number}, {name} {path}: {error or type(error)}; the next row takes its place")
                continue
            for name, feature in self.rows.features.items():
                if isinstance(feature, datasets.ClassLabel) and row[name] not in (None, -1):
                    row[name] = feature.int2str(row[name])
            prompt = self.args.prompt or row.get(self.caption_column) or ""
            if isinstance(prompt, list):
                prompt = prompt[0] or ""
            image = row.pop(self.args.image_column)
            return image, str(prompt), {**row, "init_image": image}
        raise ValueError(f"not one of the pictures can be read: the last is {name} {path}")

    def decode(self, cell: dict | None, flip: bool, centering: tuple) -> torch.Tensor:
        """The picture `(3, H, W)` in [0, 1], upright and cut to the size of the run."""
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


def load_data(args: argparse.Namespace) -> tuple[ImagePrompts, ImagePrompts]:
    """The images to train on and those held out, no picture in both; tells what of the data is not used."""
    source = f"--train_data_dir={args.train_data_dir}"
    if args.dataset_name:
        source = f"--dataset_name={args.dataset_name}"
    try:
        splits = read_splits(args)
        rows = splits["train"]
        columns = rows.column_names
    except Exception as error:
        hint = "--train_data_dir is for a folder of pictures, --dataset_name for all else"
        raise SystemExit(f"error: no images in {source} ({type(error).__name__}: {error}); {hint}.") from None
    held_out_rows = splits.get("validation") or splits.get("test") or rows
    for part in (rows, held_out_rows):
        if not isinstance(part.features.get(args.image_column), datasets.Image):
            told = f"has no pictures; columns are {part.column_names}"
            raise SystemExit(f"error: --image_column={args.image_column} {told}.")
    if args.caption_column not in (None, *columns):
        raise SystemExit(f"error: --caption_column={args.caption_column} is no column; there are {columns}.")
    if "init_image" in columns and args.image_column != "init_image":
        raise SystemExit("error: a column is named init_image, as what rewards get the input in: rename it.")

    # which pictures are held out; no row with one of them is trained on
    keys = picture_keys(rows, args.image_column)
    order = torch.randperm(len(rows), generator=seeded(args.seed, "rows")).tolist()
    if held_out_rows is rows:
        held_out_keys = keys
        candidates = order
        count = min(8, len(set(keys) - {None}) // 3)
    else:
        held_out_keys = picture_keys(held_out_rows, args.image_column)
        candidates = torch.randperm(len(held_out_rows), generator=seeded(args.seed, "held-out")).tolist()
        count = 8
    if args.num_validation_images is not None:
        count = args.num_validation_images
    held_out = {}  # by picture, the row
    for row in candidates:
        key = held_out_keys[row]
        if key is not None and key not in held_out and len(held_out) < count:
            held_out[key] = row
    order = [row for row in order if keys[row] not in held_out]
    if not order:
        raise SystemExit(f"error: {source}: all images are held out: lower --num_validation_images={count}.")

    caption_column = args.caption_column
    if caption_column is None and "text" in columns:
        caption_column = "text"
    if caption_column and args.prompt is not None:
        PartialState().print(f"The captions in column {caption_column} are not used: --prompt takes their place.")
        caption_column = None
    elif caption_column:
        captions = rows.select_columns(caption_column)
        empty = sum(row[caption_column] in (None, "", [], [None], [""]) for row in captions)
        if empty:
            PartialState().print(f"{empty} of {len(rows)} rows have no caption: their prompt is empty.")
    train_data = ImagePrompts(rows, order[: args.max_train_samples], caption_column, args)
    return train_data, ImagePrompts(held_out_rows, list(held_out.values()), caption_column, args)


# ---- Rewards: functions of images (B, 3, H, W), B prompts and B dicts of metadata, or factories of them
def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images `(B, 3, H, W)` in [0, 1] as they would be saved: 8-bit RGB, rounded as in ddpo-pytorch."""
    return numpy_to_pil(images.permute(0, 2, 3, 1).float().cpu().numpy())


def encode(image: Image.Image, kind: str) -> bytes:
    """The bytes of a file with this picture."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=95)
    return buffer.getvalue()


def pictures(metadata: list[dict], column: str) -> torch.Tensor:
    """`(B, 3, H, W)`: the pictures in a column, `init_image` among them."""
    if not all(torch.is_tensor(row.get(column)) for row in metadata):
        raise ValueError(f"rows without a picture in column {column!r}: metadata names them as {column}_file_name")
    return torch.stack([row[column] for row in metadata])


def guard(values: torch.Tensor, floor: float | None) -> torch.Tensor:
    """With a floor -max(0, floor - value): nothing to be gained above it; else the values."""
    if floor is None:
        return values
    return -F.relu(floor - values)


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
        return guard(-10 * torch.log10(error.clamp(min=1e-10)), floor)

    return reward


def load_network(network_class, model: str, processor: str | None = None):
    """A frozen network on this rank's device, on a GPU under mixed precision in fp16 (bf16 is too coarse for
    scores), and a function that makes its `pixel_values` of images."""
    state = AcceleratorState()
    dtype = torch.float16
    if state.device.type == "cpu" or state.mixed_precision == "no":
        dtype = torch.float32
    network, loaded = network_class.from_pretrained(model, dtype=dtype, output_loading_info=True)
    lacking = [key for key in loaded["missing_keys"] if not key.startswith("pooler.")]
    if lacking:  # transformers would make them up at random
        raise ValueError(f"{model} has no weights for {lacking[0]} of {network_class.__name__}")
    network.to(state.device).requires_grad_(False).eval()
    image_processor = AutoImageProcessor.from_pretrained(processor or model, backend="pil")

    def pixels(images):
        values = image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]
        return values.to(network.device, network.dtype)

    return network, pixels


def load_clip(model: str, processor: str | None = None):
    """CLIP's logit scale, and a function of images `(B, 3, H, W)` and N texts to cosines `(B, N)`."""
    clip, pixels = load_network(CLIPModel, model, processor)
    tokenizer = AutoTokenizer.from_pretrained(processor or model)

    def cosines(images, texts):
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        out = clip(pixel_values=pixels(images), **tokens.to(clip.device))
        return F.normalize(out.image_embeds.float(), dim=-1) @ F.normalize(out.text_embeds.float(), dim=-1).T

    return clip.logit_scale.float().exp(), cosines


def clip_score(model: str = "openai/clip-vit-large-patch14", processor: str | None = None, scaled: bool = False):
    """Cosine between CLIP's embeddings of image and prompt, mostly 0.1 to 0.4; `scaled` by CLIP's scale."""
    scale, cosines = load_clip(model, processor)

    def reward(images, prompts, metadata):
        scores = cosines(images, prompts).diagonal()
        return scores * scale if scaled else scores

    return reward


def pick_score(model: str = "yuvalkirstain/PickScore_v1", processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """PickScore, trained on what people picked for a prompt: mostly 15 to 25."""
    return clip_score(model, processor, scaled=True)


def hps(model: str = "adams-story/HPSv2-hf", processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """Human preference score v2, of image and prompt: mostly 0.2 to 0.35."""
    return clip_score(model, processor)


def aesthetic(model: str = "openai/clip-vit-large-patch14", head: str = "trl-lib/ddpo-aesthetic-predictor"):
    """LAION's aesthetic score, mostly 3 to 7. `head`: a file, or a Hub repository of aesthetic-model.pth."""
    clip, pixels = load_network(CLIPModel, model)
    path = head if Path(head).is_file() else huggingface_hub.hf_hub_download(head, "aesthetic-model.pth")
    weights = torch.load(path, map_location=clip.device, weights_only=True)

    def reward(images, prompts, metadata):
        hidden = clip.visual_projection(clip.vision_model(pixels(images)).pooler_output)
        hidden = F.normalize(hidden.float(), dim=-1)
        for number in (0, 2, 4, 6, 7):  # 1, 3 and 5 are dropout, and there is no activation
            hidden = F.linear(hidden, weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"])
        return hidden.squeeze(1)

    return reward


def dino_similarity(model: str = "facebook/dinov2-small", column: str = "init_image", floor: float | None = None):
    """Cosine of DINOv2's class tokens of image and picture in a column; with a floor a guard, as `psnr`."""
    dino, pixels = load_network(AutoModel, model)

    def reward(images, prompts, metadata):
        tokens = dino(pixels(images)).last_hidden_state[:, 0].float()
        others = dino(pixels(pictures(metadata, column))).last_hidden_state[:, 0].float()
        return guard(F.cosine_similarity(tokens, others), floor)

    return reward


def classifier(model: str, label_column: str = "label", mode: str = "margin", names: list[str] | None = None):
    """Logit of the class in a column minus the greatest other one (`mode` margin), or minus that of the
    input image (logit_change, clipped to +-10, as in imageddpo's application). Classes are looked up among
    the model's, numbers are their indices. With `names` of classes the model is a CLIP, which compares with
    "An image of {name}"."""
    if mode not in ("margin", "logit_change"):
        raise ValueError(f"mode={mode!r} must be 'margin' or 'logit_change'")
    if names:
        scale, cosines = load_clip(model)
    else:
        network, pixels = load_network(AutoClassifier, model)
    classes = names or list(network.config.id2label.values())

    def logits(images):
        if names:
            return scale * cosines(images, [f"An image of {name}" for name in names])
        return network(pixels(images)).logits.float()

    def reward(images, prompts, metadata):
        targets = []
        for row in metadata:
            label = row[label_column]
            targets.append(label if isinstance(label, int) else classes.index(label))
        targets = torch.tensor(targets, device=images.device)[:, None]
        after = logits(images)
        wanted = after.gather(1, targets).squeeze(1)
        if mode == "margin":
            return wanted - after.scatter(1, targets, -torch.inf).amax(dim=1)
        before = logits(pictures(metadata, "init_image")).gather(1, targets).squeeze(1)
        return (wanted - before).clamp(-10, 10)

    return reward


def post_json(url: str, payload: dict, api_key: str | None = None) -> dict:
    """The JSON that a server answers. Failures that may pass, such as no connection, are tried for 14 s."""
    codes = (429, 500, 502, 503, 504)
    retry = Retry(4, backoff_factor=1, status_forcelist=codes, allowed_methods=None, raise_on_status=False)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with requests.Session() as session:
        session.mount(url, HTTPAdapter(max_retries=retry))
        # a redirect would turn POST into GET
        response = session.post(url, json=payload, timeout=60, headers=headers, allow_redirects=False)
    if response.status_code != 200:
        raise OSError(f"{url} answered {response.status_code}: {response.text[:300]}")
    return response.json()


def http_reward(url: str):
    """POSTs {"images": [base64 PNG], "prompts": [...], "metadata": [{...}]}, metadata without pictures; the
    server answers {"rewards": [...]}, and perhaps "info": {name: [...]}, with one value per image."""

    def reward(images, prompts, metadata):
        files = [base64.b64encode(encode(image, "PNG")).decode() for image in to_pil(images)]
        rows = [{name: value for name, value in row.items() if not torch.is_tensor(value)} for row in metadata]
        rows = json.loads(json.dumps(rows, default=str))
        answer = post_json(url, {"images": files, "prompts": prompts, "metadata": rows})
        return answer["rewards"], answer.get("info") or {}

    return reward


def vlm_judge(url, model, question_column=None, answer_column=None, api_key_env="OPENAI_API_KEY"):
    """The part of an expected answer's words, 0 to 1, that a vision-language model's reply about the image
    contains. `url` is of an OpenAI-compatible endpoint, up to /v1. Columns hold a text or several, which are
    averaged over; without them the prompt should describe the image."""

    def judge(image, prompt, row):
        questions = row.get(question_column, "Answer concisely: what is going on in this image?")
        answers = row.get(answer_column, prompt)
        if isinstance(questions, str):
            questions = [questions]
            answers = [answers]
        picture = {"url": "data:image/jpeg;base64," + base64.b64encode(encode(image, "JPEG")).decode()}
        scores = []
        for question, answer in zip(questions, answers, strict=True):
            content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": picture}]
            payload = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
            reply = post_json(f"{url}/chat/completions", payload, os.environ.get(api_key_env))
            said = re.findall(r"\w+", reply["choices"][0]["message"]["content"].lower())
            expected = re.findall(r"\w+", answer.lower())
            scores.append(np.isin(expected, said).sum() / max(1, len(expected)))
        return np.mean(scores)

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(8) as executor:
            return list(executor.map(judge, to_pil(images), prompts, metadata))

    return reward


BUILT_IN = [jpeg_compressibility, jpeg_incompressibility, psnr, clip_score, pick_score, hps, aesthetic]
BUILT_IN += [dino_similarity, classifier, vlm_judge]  # add yours here
REWARDS = {function.__name__: function for function in BUILT_IN}


def load_reward(spec: str) -> Callable:
    """An entry of `--reward_fn` as a function `(images, prompts, metadata) -> (B,) rewards, or (rewards,
    info)`. A callable with exactly three required parameters is used as it is. Anything else is a factory of
    one, called with the options in parentheses. Exits with what is expected if it is neither."""
    try:
        if spec.startswith(("http://", "https://")):
            return http_reward(spec)
        name, parenthesis, options = spec.partition("(")
        if ".py:" in name:
            path, _, function = name.rpartition(":")
            path = Path(path).resolve()
            sys.path.insert(0, str(path.parent))
            module = importlib.import_module(path.stem)
            if Path(getattr(module, "__file__", None) or "").resolve() != path:
                raise ValueError(f"a module {path.stem} is loaded already: rename the file")
            maker = getattr(module, function)
        elif name in REWARDS:
            maker = REWARDS[name]
        else:
            raise ValueError(f"no such reward: use {', '.join(REWARDS)}, file.py:function or http(s)://host/path")
        call = ast.parse(f"f({options}" if parenthesis else "f()", mode="eval").body
        values = [ast.literal_eval(value) for value in call.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        required = 0
        for parameter in inspect.signature(maker).parameters.values():
            required += parameter.default is parameter.empty and not parameter.kind.name.startswith("VAR")
        if required == 3 and not values and not keywords:
            return maker
        reward = maker(*values, **keywords)
        if not callable(reward):
            raise TypeError(f"it returned {type(reward).__name__} in place of a function")
        return reward
    except Exception as error:
        hint = ""
        if isinstance(error, TypeError):
            hint = ". A reward has three parameters (images, prompts, metadata); a factory of one takes the options"
        raise SystemExit(f"error: --reward_fn={spec}: {type(error).__name__}: {error}{hint}") from None


@torch.no_grad()
def compute_rewards(functions: dict[str, Callable], images, prompts, metadata) -> tuple[torch.Tensor, dict]:
    """Rewards `(B, rewards)` of images `(B, 3, H, W)`, and the means of what functions give as info. Raises
    on what is not one finite number per image."""
    columns = []
    info = {}
    for name, function in functions.items():
        values = function(images.clone(), list(prompts), list(metadata))  # it may write into the images
        more = {}
        if isinstance(values, tuple):
            values, more = values
        if values is None:
            raise ValueError(f"reward {name} returned None, not {len(images)} numbers: is a `return` missing?")
        values = torch.as_tensor(values, dtype=torch.float32, device=images.device)
        if values.shape != images.shape[:1]:
            raise ValueError(f"reward {name} has the shape {tuple(values.shape)} for {len(images)} images")
        if not values.isfinite().all():
            raise ValueError(f"reward {name} is not finite: {values.tolist()}")
        columns.append(values)
        for key, value in more.items():
            with suppress(TypeError, ValueError):  # texts are not logged
                info[f"info/{key}"] = torch.as_tensor(value, dtype=torch.float32).mean().item()
    return torch.stack(columns, dim=1), info


# ---- Advantages: rewards -> what each sample is worth against its like ---------------------------
def compute_advantages(rewards, kind: str, group_size: int, keys: list | None = None, tracker: dict | None = None):
    """Advantages `(B, rewards)` of rewards `(B, rewards)` float64, groups contiguous: each against a
    baseline, in standard deviations, clipped to +-5. `group` has the group's mean, and the standard
    deviation within groups pooled over them: a group whose rewards are all equal has advantage 0. `batch`
    has the epoch's. `tracker`, as DDPO, has those of the last 32 rewards with the same of the B `keys` (row
    of the data, flip), which are kept in `tracker`, or the epoch's as long as they are fewer than 16."""
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
        for sample, key in enumerate(keys):
            known = rewards.new_tensor(tracker[key]) if len(tracker[key]) >= 16 else rewards
            deviations[sample] = rewards[sample] - known.mean(dim=0)
            spread[sample] = known.std(dim=0, unbiased=False)
    return (deviations / (spread + 1e-6)).clamp(-5, 5)


# ---- Objectives: pure functions of (states, actions) tensors. Add yours here, to --algorithm, and in step 4 of `main`
def ppo_loss(log_probs, old_log_probs, advantages, clip_range: float) -> torch.Tensor:
    """Clipped surrogate, equation (7) of PPO (https://huggingface.co/papers/1707.06347), of log-probs in nats
    per latent element, of the policy now and when it sampled. Their ratio is clipped to `1 +- clip_range`, by
    default sqrt(2 * TRUST_REGION_NATS) / latent elements."""
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def reinforce_loss(log_probs, advantages) -> torch.Tensor:
    """The score function (https://doi.org/10.1007/BF00992696). On-policy only."""
    return -advantages * log_probs


def trpo_loss(log_probs, old_log_probs, advantages, kl, beta: float) -> torch.Tensor:
    """Surrogate with a KL penalty, the form that TRPO (https://huggingface.co/papers/1502.05477) derives
    before its constraint. `kl` is the exact KL(old || new) per latent element, like the log-probs."""
    return -advantages * torch.exp(log_probs - old_log_probs) + beta * kl


def adapt_beta(beta: float, kl: float, target_kl: float) -> float:
    """Doubles or halves the weight if the KL is more than a factor 1.5 off (section 4 of the PPO paper)."""
    if kl > 1.5 * target_kl:
        beta = beta * 2
    elif kl < target_kl / 1.5:
        beta = beta / 2
    return min(max(beta, 1e-6), 1e6)


def sac_loss(values) -> torch.Tensor:
    """The actor's side of soft actor-critic (https://huggingface.co/papers/1801.01290): minus the lower of
    the values `(2, states, actions)` of newly drawn, reparameterised actions. "Soft" is the KL to the frozen
    model, which `--kl_coef` adds: with a fixed std the entropy is a constant."""
    return -values.min(dim=0).values


def gaussian_kl(other_mean, mean, std) -> torch.Tensor:
    """KL between N(other_mean, std^2 I) and N(mean, std^2 I), `(B, C, h, w)`: `(B,)` nats, exact."""
    return ((mean - other_mean) ** 2 / (2 * std**2)).flatten(1).sum(dim=1)


class ValueCritic(torch.nn.Module):
    """What a step x_t -> x_prev is worth, in standard deviations of reward: two heads on a convolutional
    trunk, linear in the step, so that its slope, which is all that the policy gets of it, is learnt from few
    samples."""

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
        """Values `(2, N, K)` of `actions` `(N, K, C, h, w)` at the states of N transitions."""
        prompt_embeds = states.prompt_embeds[states.prompt_rows].float().mean(dim=1)  # (N, E)
        condition = self.time_embedding(self.time_proj(states.timesteps)) + self.prompt_embedding(prompt_embeds)
        hidden = self.convs[0](states.latents) + condition[:, :, None, None]
        for conv in self.convs[1:]:
            hidden = hidden + conv(F.silu(hidden))
        weights = self.conv_out(F.silu(hidden)).unflatten(1, (2, -1))  # (N, 2, C, h, w)
        steps = (actions - states.latents.unsqueeze(1)) / actions[0, 0].numel() ** 0.5  # (N, K, C, h, w)
        return torch.einsum("nqchw,nkchw->qnk", weights, steps) + self.bias


# ---- Sampling: groups of the data -> images and transitions --------------------------------------
def seeded(*path: int | str) -> torch.Generator:
    """A CPU generator: a function of `path` (seed, what for, epoch, sample, ...) and nothing else."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:8], "big"))


class Transitions(NamedTuple):
    """Steps x_t -> x_prev that are trained: N states with K actions each. A state is the branch of a group,
    which has the group's K samples as actions; with `--all_steps` it is a step of one sample, with one
    action."""

    latents: torch.Tensor  # (N, C, h, w) x_t
    next_latents: torch.Tensor  # (N, K, C, h, w) x_prev
    timesteps: torch.Tensor  # (N,) t
    means: torch.Tensor  # (N, C, h, w) of the policy that sampled
    log_probs: torch.Tensor  # (N, K) of the policy that sampled
    samples: torch.Tensor  # (N, K) number of the sample within the epoch, on the CPU
    prompt_rows: torch.Tensor  # (N,) row of the embeddings, which are kept once, on the CPU
    prompt_embeds: torch.Tensor  # (P, L, E)
    negative_prompt_embeds: torch.Tensor  # (P, L, E); not looked at without guidance

    def take(self, states: torch.Tensor) -> "Transitions":
        """The transitions from some of the states."""
        return Transitions(*(field[states] for field in self[:7]), *self[7:])


def join_transitions(parts: list[Transitions]) -> Transitions:
    """The transitions of several batches."""
    shifted = []
    rows = 0
    for part in parts:
        shifted.append(part._replace(prompt_rows=part.prompt_rows + rows))
        rows += len(part.prompt_embeds)
    return Transitions(*(torch.cat(fields) for fields in zip(*shifted)))


def count_trainable_steps(scheduler: DDIMScheduler, timesteps: torch.Tensor, args: argparse.Namespace) -> int:
    """How many of the steps that are run come before the tail; exits if none does."""
    if args.train_tail:
        return len(timesteps)
    previous = timesteps - scheduler.config.num_train_timesteps // args.num_inference_steps
    variances = 1 - scheduler.alphas_cumprod[previous.clamp(min=0)]  # of the noise in x_prev
    count = int((variances >= TAIL_VARIANCE).sum())
    if count == 0:
        steps = f"--num_inference_steps={args.num_inference_steps} * --strength={args.strength}"
        raise SystemExit(f"error: {steps}: none can be trained. Raise one of them, or add --train_tail.")
    return count


def plan_steps(num_steps: int, num_trainable: int, epoch: int, args) -> tuple[list, list, list]:
    """An epoch's steps as indices of those that `strength` leaves, the eta of each, and the places in these
    lists of those that are stochastic and trained: the branch, behind its prefix and before its finish, or
    with `--all_steps` all."""
    if args.all_steps:
        steps = list(range(num_steps))
        trained = list(range(num_trainable))
    else:
        branch = torch.randint(num_trainable, (), generator=seeded(args.seed, "branch", epoch)).item()
        left = num_steps - branch - 1
        count = min(args.finish_steps or left, left)
        finish = np.linspace(branch + 1, num_steps, count, endpoint=False).astype(int).tolist()
        steps = [*range(branch + 1), *finish]
        trained = [branch]
    etas = [0.0] * len(steps)
    for place in trained:
        etas[place] = args.eta
    return steps, etas, trained


def draw_groups(num_rows: int, num_groups: int, epoch: int, args) -> list[tuple[int, bool]]:
    """Row of the data, and whether it is flipped, of each group of an epoch, in shuffled passes."""
    groups = []
    for number in range(epoch * num_groups, (epoch + 1) * num_groups):
        data_pass, position = divmod(number, num_rows)
        order = torch.randperm(num_rows, generator=seeded(args.seed, "order", data_pass))
        flip = args.random_flip and torch.rand((), generator=seeded(args.seed, "flip", number)).item() < 0.5
        groups.append((order[position].item(), flip))
    return groups


@torch.no_grad()
def sample_groups(pipe, data: ImagePrompts, groups: list, numbers: list[int], plan: tuple, epoch, pipe_kwargs, args):
    """Samples K images of each of the groups with these `numbers`, G of them, by the `plan` of `plan_steps`.
    Noise is a function of seed, epoch, group and sample. Returns images `(G * K, 3, H, W)`, as many prompts
    and metadata, and the `Transitions`."""
    steps, etas, trained = plan
    rows = []
    samples = []
    for number in numbers:
        row, flip = groups[number]
        place = (0.5, 0.5)
        if not args.center_crop:
            place = torch.rand(2, generator=seeded(args.seed, "crop", row)).tolist()
        rows.append(data.load(row, flip, place))
        samples.extend(range(number * args.group_size, (number + 1) * args.group_size))
    copies = [row for row in rows for _ in range(args.group_size)]
    if args.all_steps:
        rows = copies
        start_noise = False  # each sample has its own
    else:
        start_noise = [seeded(args.seed, "start", epoch, number) for number in numbers]
    count = len(rows)  # of the UNet as long as all steps are deterministic
    actions = len(samples) // count
    images, prompts, _ = zip(*rows)
    out = pipe(
        list(prompts),
        torch.stack(images),
        num_images_per_prompt=actions,
        steps=steps,
        eta=etas,
        generator=[seeded(args.seed, "noise", epoch, sample) for sample in samples],
        share_start_noise=start_noise,
        return_trajectory=True,
        **pipe_kwargs,
    )
    negative_prompt_embeds = out.negative_prompt_embeds
    if negative_prompt_embeds is None:
        negative_prompt_embeds = out.prompt_embeds
    before = torch.tensor(trained)
    transitions = Transitions(
        latents=out.latents[::actions, before].flatten(0, 1),  # (rows, steps, ...) -> (N, ...)
        next_latents=out.latents[:, before + 1].unflatten(0, (count, actions)).transpose(1, 2).flatten(0, 1),
        timesteps=out.timesteps[before].repeat(count),
        means=out.means[::actions, before].flatten(0, 1),
        log_probs=out.log_probs[:, before].unflatten(0, (count, actions)).transpose(1, 2).flatten(0, 1),
        samples=torch.tensor(samples).view(count, actions).repeat_interleave(len(before), dim=0),
        prompt_rows=torch.arange(count).repeat_interleave(len(before)),
        prompt_embeds=out.prompt_embeds[::actions],
        negative_prompt_embeds=negative_prompt_embeds[::actions],
    )
    _, prompts, metadata = zip(*copies)
    return out.images.float().cpu(), prompts, metadata, transitions


# ---- Update: what the loop in `main` calls -------------------------------------------------------
def predict_transition(pipe, batch: Transitions, guidance_scale: float, args, accelerator: Accelerator):
    """Mean `(N, C, h, w)` and std `(N, 1, 1, 1)` of the next latents of N states under the UNet as it is."""
    prompt_embeds = batch.prompt_embeds[batch.prompt_rows]
    negative_prompt_embeds = batch.negative_prompt_embeds[batch.prompt_rows]
    conditioning = (prompt_embeds, negative_prompt_embeds, guidance_scale, args.guidance_rescale)
    with accelerator.autocast():  # as in sampling
        noise_pred = predict_noise(pipe.unet, batch.latents, batch.timesteps, *conditioning)
    return ddim_transition(pipe.scheduler, noise_pred, batch.timesteps, batch.latents, args.eta)


@torch.no_grad()
def reference_mean(pipe, batch: Transitions, guidance_scale: float, args, accelerator) -> torch.Tensor:
    """Mean `(N, C, h, w)` of the next latents without the LoRA."""
    pipe.unet.disable_adapters()
    mean, _ = predict_transition(pipe, batch, guidance_scale, args, accelerator)
    pipe.unet.enable_adapters()
    return mean


def draw_actions(mean, std, batch: Transitions, *path: int) -> torch.Tensor:
    """New actions `(N, K, C, h, w)` of N(mean, std^2 I), reparameterised, from noise of each state's own."""
    states = zip(batch.samples[:, 0].tolist(), batch.timesteps.tolist())
    noise = [seeded("action", *path, *state) for state in states]
    return mean[:, None] + std[:, None] * randn_tensor(batch.next_latents.shape, noise, mean.device)


def sum_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Replaces each gradient by its sum over the processes."""
    gradients = accelerator.reduce([parameter.grad for parameter in parameters], "sum")
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient


def fit_critic(critic, target_critic, optimizer, transitions, advantages, accelerator) -> float:
    """Regresses SAC's critic on the advantages `(N, K)`. Each process computes the gradient on its own
    transitions, and all step with the sum: critics that start equal stay equal. Returns the mean squared error."""
    for _ in range(48):
        values = critic(transitions.next_latents, transitions)  # (2, N, K)
        error = (values - advantages).square().mean() / accelerator.num_processes
        error.backward()
        sum_gradients(list(critic.parameters()), accelerator)
        optimizer.step()
        optimizer.zero_grad()
        for target, parameter in zip(target_critic.parameters(), critic.parameters()):
            target.data.lerp_(parameter.data, 0.05)
    return accelerator.reduce(error.detach(), "sum").item()


def count_rows(unet, inputs) -> None:
    """Forward hook that adds up the UNet's rows; a trained one has a backward pass too."""
    unet.rows += len(inputs[0]) * (TRAINED_ROW_COST if torch.is_grad_enabled() else 1)


@torch.no_grad()
def measure_kl(pipe, transitions, states, guidance_scale: float, args, accelerator, reference=False) -> float:
    """Mean KL in nats per step, over all processes, between the policy that sampled, or the one without the
    LoRA, and the one now."""
    kls = []
    for rows in states.split(args.train_batch_size):
        batch = transitions.take(rows)
        mean, std = predict_transition(pipe, batch, guidance_scale, args, accelerator)
        other_mean = batch.means
        if reference:
            other_mean = reference_mean(pipe, batch, guidance_scale, args, accelerator)
        kls.append(gaussian_kl(other_mean, mean, std))
    return accelerator.reduce(torch.cat(kls).mean(), "mean").item()


# ---- Evaluation, by the main process: held-out images, fixed noise, the full schedule ------------
@torch.no_grad()
def evaluate(pipe, data: ImagePrompts, functions: dict, pipe_kwargs, args, accelerator, draw: int | None = 0):
    """Held-out images `(N, 3, H, W)` in [0, 1] and rewards `(N, rewards)`: what the pipeline makes of them
    as its users do (deterministic steps) from the noise of `draw`, or with None the inputs themselves."""
    images = []
    rewards = []
    batches = torch.arange(len(data)).split(args.sample_batch_size)
    for indices in tqdm(batches, "held-out", leave=False, disable=None):
        inputs, prompts, metadata = zip(*(data.load(index) for index in indices.tolist()))
        made = torch.stack(inputs).to(accelerator.device)
        if draw is not None:
            noise = [seeded(args.seed, "evaluation", data.order[index], draw) for index in indices.tolist()]
            with accelerator.autocast():
                made = pipe(list(prompts), made, generator=noise, **pipe_kwargs).images.float()
        images.append(made.cpu())
        rewards.append(compute_rewards(functions, made, prompts, metadata)[0].cpu().double())
    return torch.cat(images), torch.cat(rewards)


def evaluate_baselines(pipe, data: ImagePrompts, functions: dict, weights, pipe_kwargs, args, accelerator) -> dict:
    """What the LoRA has to beat: per name images `(N, 3, H, W)` and rewards `(N, rewards)` of the inputs, of
    the base model, and of its best of `--group_size` draws, which is what choosing gives in place of
    training."""
    draws = []
    pipe.unet.disable_adapters()
    for draw in tqdm(range(args.group_size), "base model", leave=False, disable=None):
        draws.append(evaluate(pipe, data, functions, pipe_kwargs, args, accelerator, draw))
    pipe.unet.enable_adapters()
    rewards = torch.stack([rewards for _, rewards in draws])  # (draws, N, rewards)
    best = rewards[(rewards @ weights).argmax(dim=0), torch.arange(len(data))]
    identity = evaluate(pipe, data, functions, pipe_kwargs, args, accelerator, draw=None)
    return {"identity": identity, "base": draws[0], "best_of_k_base": (None, best)}


# ---- Checkpoints, by the main process ------------------------------------------------------------
def save_checkpoint(pipe, state: dict, epoch: int, output_dir: Path, total_limit: int) -> None:
    """checkpoint-<epoch>: the LoRA for diffusers, and in state.pt all that a resumed run needs (args, LoRA by
    name, optimizer, schedule, scaler, critic, tracker, beta, metrics). Written aside, synchronised, renamed;
    only then are old ones deleted."""
    folder = output_dir / f"checkpoint-{epoch}"
    aside = output_dir / "checkpoint.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    pipe.save_lora_weights(aside, get_peft_model_state_dict(pipe.unet))
    with open(aside / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for old in list_checkpoints(output_dir)[total_limit:]:
        if old != folder:  # after a resume from an older one, there may be newer ones
            shutil.rmtree(old)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-<epoch>, the newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True)


def read_checkpoint(args: argparse.Namespace) -> dict | None:
    """The newest checkpoint that is whole, or None if there is none; exits if other settings made it."""
    wanted = args.resume_from_checkpoint
    folders = [Path(args.output_dir, Path(wanted).name)]
    if wanted == "latest":
        folders = list_checkpoints(args.output_dir)
    state = None
    for folder in folders:
        try:
            if zipfile.ZipFile(folder / "state.pt").testzip() is not None:  # torch.load would not notice
                raise ValueError("a checksum is wrong")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            break
        except Exception as error:
            print(f"Warning: {folder} cannot be read ({type(error).__name__}: {error}).")
    if state is None:
        if folders or Path(args.output_dir, LORA).exists():
            raise SystemExit(f"error: --resume_from_checkpoint={wanted}: no checkpoint can be read.")
        print(f"--resume_from_checkpoint={wanted}: there is none in {args.output_dir}, this is a new run.")
        return None
    before = make_parser().parse_args([])  # an older version may have lacked flags
    vars(before).update(state["args"])
    fill_defaults(before)
    free = FREE_ON_RESUME
    if args.lr_scheduler.startswith("constant"):
        free = [*FREE_ON_RESUME, "num_train_epochs"]
    differing = []
    for name, value in vars(args).items():
        was = getattr(before, name)
        if value != was and name not in free:
            differing.append(f"--{name}={value} (was {was})")
    if differing:
        raise SystemExit(f"error: {folder} is of a run with other settings: {', '.join(differing)}. Give the same.")
    return state


# ---- Files that a run leaves ---------------------------------------------------------------------
def write_reward_curve(history: list[dict], names: list[str], title: str, path: Path) -> None:
    """reward_curve.png: over samples, a panel per reward, in training and on held-out images."""
    frame = pd.DataFrame(history).set_index("samples")
    panels = {"": title}
    if len(names) > 1:
        for name in names:
            panels[f"/{name}"] = name
    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    for axis, (suffix, panel) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
        for name in ("reward_mean", "heldout_trained", "heldout_base", "heldout_identity", "heldout_best_of_k_base"):
            if f"{name}{suffix}" in frame:
                frame[f"{name}{suffix}"].dropna().plot(ax=axis, label=name, marker=".")
        axis.set_title(textwrap.fill(f"{panel} (higher is better)", 62), fontsize=10)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)


def write_grid(evaluated: dict, weights, data: ImagePrompts, title: str, path: Path) -> None:
    """samples/epoch-*.png: held-out pictures and rewards of input, columns of pictures, base and trained."""
    count = min(8, len(data))
    _, prompts, metadata = zip(*map(data.load, range(count)))
    rows = [("input", *evaluated["identity"])]
    for column in metadata[0]:
        if column != "init_image" and all(torch.is_tensor(row[column]) for row in metadata):
            rows.append((column, torch.stack([row[column] for row in metadata]), None))
    rows += [("base", *evaluated["base"]), ("trained", *evaluated["trained"])]
    figure = Figure(figsize=(1.5 * count + 1, 1.65 * len(rows) + 0.8), layout="constrained")
    figure.suptitle(textwrap.fill(f"held-out pictures and their reward: {title}", 24 * count), fontsize=9)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for (name, images, rewards), axes in zip(rows, grid):
        axes[0].set_ylabel(name if rewards is None else f"{name}\nmean {(rewards @ weights).mean():.4g}")
        for i, image in enumerate(to_pil(images[:count])):
            axes[i].imshow(image)
            axes[i].set(xticks=[], yticks=[], frame_on=False)
            if rewards is not None:
                axes[i].set_title(f"{rewards[i] @ weights:.4g}", fontsize=8)
    for axis, prompt in zip(grid[-1], prompts):
        axis.set_xlabel(textwrap.fill(textwrap.shorten(prompt, 60), 20), fontsize=7, parse_math=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def log_picture(path: Path, epoch: int, accelerator: Accelerator) -> None:
    """For the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.array(Image.open(path).convert("RGB"))[None]
            tracker.log_images({"held-out": pixels}, step=epoch, **options)


def verdict(metrics: dict) -> str:
    """Whether the LoRA beat what it has to beat on held-out images."""
    if "heldout_trained" not in metrics:
        return "No image was held out."
    trained = metrics["heldout_trained"]
    comparisons = []
    for kind, meaning in {"identity": "the input left alone", "base": "the base model"}.items():
        other = metrics[f"heldout_{kind}"]
        verb = "beats" if trained > other else "does not beat"
        comparisons.append(f"{verb} {meaning} ({other:.4g})")
    return f"On held-out images the LoRA ({trained:.4g}) {' and '.join(comparisons)}."


def write_model_card(repo_id: str, metrics: dict, title: str, caption: str, guidance_scale: float, args) -> str:
    """The text of README.md: what was trained on which reward, the held-out results, how to use it."""
    tags = ["stable-diffusion", "stable-diffusion-diffusers", "image-to-image", "diffusers", "lora", "ddpo"]
    data = huggingface_hub.ModelCardData(library_name="diffusers", inference=True, tags=tags)
    base = args.pretrained_model_name_or_path
    if Path(base).exists():  # no paths of this machine
        base = "path/to/the/base/model"
    else:
        data.base_model = base
    if args.dataset_name and not Path(args.dataset_name).exists():
        data.datasets = args.dataset_name
    results = ""
    for name, value in metrics.items():
        if name.startswith("heldout_"):
            results += f"| {name.removeprefix('heldout_')} | {value:.4f} |\n"
    if results:
        results = f"""
| held-out images | mean reward |
|---|---|
{results}
![held-out images: input, target if there is one, base, trained](samples/epoch-{metrics["epoch"]:04d}.png)"""
    schedule = ", ".join(f"{name}={value}" for name, value in SCHEDULER.items())
    return f"""---
{data.to_yaml()}
---

# {repo_id}

A LoRA for image-to-image Stable Diffusion, trained with DDPO (`{args.algorithm}`) for {metrics["epoch"]} epochs of
{args.samples_per_epoch} samples. The reward is `{title}`; all settings are in args.json.

{verdict(metrics)}
{results}
![reward curve](reward_curve.png)

```python
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image

pipe = StableDiffusionImg2ImgPipeline.from_pretrained("{base}").to("cuda")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {schedule})
pipe.load_lora_weights("{repo_id}")
image = load_image("input.png").resize(({args.resolution}, {args.resolution}))
call = {{"strength": {args.strength}, "num_inference_steps": {args.num_inference_steps}}}
image = pipe({caption!r}, image, guidance_scale={guidance_scale}, **call).images[0]
```
"""


# ---- Main ----------------------------------------------------------------------------------------
def check_processes(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Exits if accelerate is set up for what cannot work, or groups cannot be dealt to the processes."""
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise SystemExit("error: DeepSpeed and FSDP are not supported: see `accelerate config`.")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise SystemExit("error: --mixed_precision=fp16 needs a GPU: use --mixed_precision=no.")
    unit = args.group_size * accelerator.num_processes
    if args.samples_per_epoch % unit:
        size = f"--samples_per_epoch={args.samples_per_epoch} must be divisible by --group_size={args.group_size}"
        fits = math.ceil(args.samples_per_epoch / unit) * unit
        processes = f"{accelerator.num_processes} process(es)"
        raise SystemExit(f"error: {size} times {processes}: try --samples_per_epoch={fits}.")


def load_rewards(args: argparse.Namespace, splits: list[ImagePrompts], device) -> dict[str, Callable]:
    """The reward functions by name, each of which has scored two images of every split."""
    functions = {}
    for spec in args.reward_fn:
        name = re.sub(r"^[^(]*/([^/(]+\.py:)", r"\1", spec)  # a file without its folders
        if name in functions:
            raise SystemExit(f"error: --reward_fn={args.reward_fn} has two of the name {name}: rename one.")
        functions[name] = load_reward(spec)
    for data in splits:
        try:
            images, prompts, metadata = zip(*map(data.load, range(min(2, len(data)))))
            compute_rewards(functions, torch.stack(images).to(device), prompts, metadata)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            raise SystemExit(f"error: --reward_fn={args.reward_fn} cannot score the images: {told}") from None
    return functions


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> StableDiffusionImg2ImgDDPOPipeline:
    """The frozen model in the precision of the run, with a DDIM scheduler whose steps have a density."""
    name = args.pretrained_model_name_or_path
    if name.endswith((".safetensors", ".ckpt")):
        convert = f'StableDiffusionPipeline.from_single_file("{name}").save_pretrained("my-model")'
        raise SystemExit(f"error: --pretrained_model_name_or_path={name} is a single file. Convert it: {convert}")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    files = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "dtype": dtype}
    try:
        pipe = StableDiffusionImg2ImgDDPOPipeline.from_pretrained(
            name, safety_checker=None, requires_safety_checker=False, **files
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --pretrained_model_name_or_path={name}: {error}") from None
    unet = pipe.unet.config
    if unet.in_channels != pipe.vae.config.latent_channels or unet.time_cond_proj_dim or unet.addition_embed_type:
        kinds = "SDXL, LCM and inpainting cannot be trained"
        raise SystemExit(f"error: --pretrained_model_name_or_path={name}: {kinds}.")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)  # of the others no gradient is ever taken
    if accelerator.device.type == "cuda":
        pipe.vae.enable_slicing()  # decoding a whole batch would take more memory than training
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe.to(accelerator.device)


def add_lora(unet, args: argparse.Namespace) -> dict[str, torch.nn.Parameter]:
    """Adds a trainable LoRA in float32; its parameters by name."""
    layers = args.lora_layers.replace(" ", "").split(",")
    modules = [f".{name}" for name, _ in unet.named_modules()]
    for layer in layers:  # peft would train those that there are, and say nothing
        if not any(module.endswith(f".{layer}") for module in modules):
            raise SystemExit(f"error: --lora_layers={args.lora_layers}: the UNet has no module {layer!r}.")
    unet.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=layers, init_lora_weights="gaussian")
    )
    cast_training_params(unet, dtype=torch.float32)
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def summarise(name: str, rewards, weights, reward_names: list[str]) -> dict[str, float]:
    """Means of rewards `(N, rewards)`: of the weighted sum as `name`, of each of several as `name/reward`."""
    metrics = {name: (rewards @ weights).mean().item()}
    if len(reward_names) > 1:
        for reward, mean in zip(reward_names, rewards.mean(dim=0).tolist()):
            metrics[f"{name}/{reward}"] = mean
    return metrics


def describe_epoch(metrics: dict, clip_range: float, seconds: float, seconds_left: float) -> str:
    """An epoch in a line; warns of settings that cannot work."""
    line = f"epoch {metrics['epoch']}: {seconds:.1f} s, {timedelta(seconds=round(seconds_left))} left"
    for name, value in metrics.items():
        if name.startswith("reward_mean") or name in ("heldout_identity", "heldout_base", "heldout_trained"):
            line += f", {name} {value:.4g}"
    line += f", {metrics['unet_evaluations']:,} UNet evaluations"
    if torch.cuda.is_available():
        line += f", {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of GPU memory"
    if metrics["reward_group_std"] == 0:
        warn_once("all rewards within groups are equal: raise --group_size, or use a finer reward")
    if metrics["ratio_deviation_start"] > clip_range:
        warn_once(f"rounding moves ratios by more than the clip range, {clip_range:.0e}: use fp16 or float32")
    if metrics["kl_old"] > 10:
        warn_once("an epoch moves the policy by more than 10 nats per step: lower --learning_rate")
    return line


def explain_failure(output_dir: Path, kind: type, error: BaseException, trace) -> None:
    """`sys.excepthook` of a run: the whole traceback, then how to go on."""
    sys.__excepthook__(kind, error, trace)
    for newest in list_checkpoints(output_dir)[:1]:
        hint = f"{newest.name} is saved: add --resume_from_checkpoint=latest to continue."
        print(f"Stopped. {hint}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    # ---- What people get wrong is found before a model loads -------------------------------------
    args = parse_args(argv)
    scratch = tempfile.TemporaryDirectory()  # deleted at the end
    output_dir = Path(scratch.name if args.dry_run else args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.dry_run or args.report_to == "none" else args.report_to,
        project_dir=output_dir / "logs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # rewards may be slow
    )
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says
    check_processes(args, accelerator)
    device = accelerator.device
    is_main = accelerator.is_main_process
    progress = functools.partial(tqdm, leave=False, disable=None if is_main else True)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.demo and device.type == "cpu":
        torch.set_num_threads(1)  # on a model this small several threads only wait for each other
    train_data, held_out = load_data(args)
    functions = load_rewards(args, [train_data, held_out] if len(held_out) else [train_data], device)
    names = list(functions)
    weights = torch.tensor(args.reward_weights, dtype=torch.float64)
    title = names[0]
    if args.reward_weights != [1]:
        title = " + ".join(f"{weight:g} x {name}" for weight, name in zip(args.reward_weights, names))
    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and not args.dry_run and is_main:
        repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True).repo_id
        huggingface_hub.auth_check(repo_id, write=True)

    # ---- Model, LoRA, optimizer ------------------------------------------------------------------
    pipe = load_pipeline(args, accelerator)
    pipe.unet.rows = 0  # evaluated so far; a trained one counts TRAINED_ROW_COST
    pipe.unet.register_forward_pre_hook(count_rows)
    set_seed(args.seed)  # for the starts of LoRA and critic: nothing else is drawn from the global generator
    lora = add_lora(pipe.unet, args)
    lora_parameters = list(lora.values())
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    optimizer = torch.optim.AdamW(lora_parameters, args.learning_rate, weight_decay=args.adam_weight_decay, **adam)
    num_updates = args.num_train_epochs * args.num_inner_epochs * args.updates_per_epoch
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, num_updates)
    optimizer = accelerator.prepare(optimizer)
    stateful = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}  # in checkpoints, beside the LoRA
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    if args.algorithm == "sac":
        critic = ValueCritic(pipe.unet.config.in_channels, pipe.unet.config.cross_attention_dim).to(device)
        target_critic = copy.deepcopy(critic).requires_grad_(False)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
        stateful.update(critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)
    tracker = {}  # of --advantage=tracker: the last rewards of each image and prompt
    history = []  # a row of metrics per epoch
    beta = 1.0  # of trpo

    # ---- Denoising steps, clip range, guidance ------------------------------------------------------
    pipe.scheduler.set_timesteps(args.num_inference_steps)
    timesteps, _ = pipe.get_timesteps(args.num_inference_steps, args.strength, "cpu")
    num_trainable = count_trainable_steps(pipe.scheduler, timesteps, args)
    elements = pipe.unet.config.in_channels * (args.resolution // pipe.vae_scale_factor) ** 2  # of latents
    clip_range = args.clip_range or math.sqrt(2 * TRUST_REGION_NATS) / elements
    guidance_scale = args.guidance_scale
    if not args.prompt and not train_data.caption_column:
        guidance_scale = 1.0  # a null prompt has nothing to be guided to
    pipe_kwargs = {"strength": args.strength, "num_inference_steps": args.num_inference_steps}
    pipe_kwargs.update(guidance_scale=guidance_scale, guidance_rescale=args.guidance_rescale, output_type="pt")

    # ---- A checkpoint ----------------------------------------------------------------------------
    checkpoint = None
    if args.resume_from_checkpoint and not args.dry_run:
        (checkpoint,) = broadcast_object_list([read_checkpoint(args) if is_main else None])
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
            told = f"there are {len(train_data)} images to train on, where there were {checkpoint['num_images']}"
            accelerator.print(f"Warning: {told}.")

    # ---- What will be done -----------------------------------------------------------------------
    num_groups = args.samples_per_epoch // args.group_size
    accelerator.init_trackers("img2img-ddpo", {name: str(value) for name, value in vars(args).items()})
    accelerator.print(f"""
  run      {args.algorithm} on {title}
  images   {len(train_data)} to train on, {len(held_out)} held out, at {args.resolution} px
  prompts  {args.prompt or train_data.caption_column or "none"}; guidance {guidance_scale}
  epoch    {args.samples_per_epoch} samples: {num_groups} groups of {args.group_size} of one image and prompt
  steps    {len(timesteps)}, of which the first {num_trainable} may be stochastic and trained
  device   {device}, {accelerator.num_processes} process(es), {accelerator.mixed_precision} half precision
  LoRA     {sum(map(torch.numel, lora_parameters)):,} parameters; clip range {clip_range:.2e}
""")
    sys.excepthook = functools.partial(explain_failure, output_dir)
    evaluation_seconds = 0.0
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    if is_main and len(held_out):
        evaluation_start = time.monotonic()
        baselines = evaluate_baselines(pipe, held_out, functions, weights, pipe_kwargs, args, accelerator)
        evaluation_seconds = (time.monotonic() - evaluation_start) / (args.group_size + 1)
    accelerator.wait_for_everyone()
    num_epochs = 1 if args.dry_run else args.num_train_epochs
    for epoch in range(len(history), num_epochs):
        epoch_start = time.monotonic()
        pipe.unet.rows = 0

        # ==== 1. Sample: this process's groups, each from one image, prompt and start noise =======
        groups = draw_groups(len(train_data), num_groups, epoch, args)
        own_groups = torch.arange(num_groups).chunk(accelerator.num_processes)[accelerator.process_index]
        groups_per_batch = max(1, args.sample_batch_size // args.group_size)
        plan = plan_steps(len(timesteps), num_trainable, epoch, args)
        batches = []
        for numbers in progress(own_groups.split(groups_per_batch), f"epoch {epoch + 1}, sampling"):
            with accelerator.autocast():
                batch = sample_groups(pipe, train_data, groups, numbers.tolist(), plan, epoch, pipe_kwargs, args)
            batches.append(batch)
        transitions = join_transitions([batch[3] for batch in batches])

        # ==== 2. Score: all rewards on each batch; the rewards of all processes ===================
        rewards = []
        infos = []
        for images, prompts, metadata, _ in progress(batches, f"epoch {epoch + 1}, scoring"):
            batch_rewards, info = compute_rewards(functions, images.to(device), prompts, metadata)
            rewards.append(batch_rewards)
            infos.extend([info] * len(images))  # for each image, as batches may differ in size
        rewards = accelerator.gather(torch.cat(rewards)).cpu().double()  # (samples_per_epoch, rewards)

        # ==== 3. Advantages: each reward normalised on its own, then weighted =====================
        keys = [group for group in groups for _ in range(args.group_size)]
        advantages = compute_advantages(rewards, args.advantage, args.group_size, keys, tracker) @ weights
        advantages = advantages[transitions.samples].float().to(device)  # (states, actions)

        # ==== 4. Update: passes over the epoch, updates with a part of every group, micro-batches of states
        metrics = {"epoch": epoch + 1, "samples": (epoch + 1) * args.samples_per_epoch}
        if args.algorithm == "sac":
            critics = (critic, target_critic, critic_optimizer)
            metrics["critic_loss"] = fit_critic(*critics, transitions, advantages, accelerator)
        losses = []  # of each transition, in each update
        ratios = []
        kls = []
        grad_norms = []
        skipped_updates = 0
        kl_after_update = 0.0
        for inner_epoch in range(args.num_inner_epochs):
            order = torch.randperm(args.group_size, generator=seeded(args.seed, "update", epoch, inner_epoch))
            for part, members in enumerate(order.tensor_split(args.updates_per_epoch)):
                if kl_after_update > 2 * args.target_kl:
                    continue
                in_update = torch.isin(transitions.samples % args.group_size, members)  # (states, actions)
                states = in_update.any(dim=1).nonzero().flatten()
                num_transitions = in_update.sum().item() * accelerator.num_processes
                for chosen in progress(states.split(args.train_batch_size), f"epoch {epoch + 1}, training"):
                    batch = transitions.take(chosen)
                    batch_advantages = advantages[chosen]  # (n, K)
                    mask = in_update[chosen].to(device)  # (n, K)

                    # forward
                    mean, std = predict_transition(pipe, batch, guidance_scale, args, accelerator)
                    K = batch.next_latents.shape[1]
                    means_and_stds = mean.repeat_interleave(K, dim=0), std.repeat_interleave(K, dim=0)
                    log_probs = gaussian_log_prob(batch.next_latents.flatten(0, 1), *means_and_stds).view(-1, K)
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
                if inner_epoch == part == 0:  # still the policy that sampled: the ratio is 1 up to rounding
                    deviations = (accelerator.gather(torch.cat(ratios)) - 1).abs()
                    metrics["ratio_deviation_start"] = deviations.max().item()
                scaler = accelerator.scaler  # of fp16: it skips an update with an overflow, and lowers its scale
                may_recover = scaler is not None and scaler.get_scale() >= 1 and torch.cat(losses).isfinite().all()
                if not math.isfinite(grad_norm) and not may_recover:
                    raise RuntimeError(f"the gradient's norm is {grad_norm}: lower --learning_rate")
                optimizer.step()
                optimizer.zero_grad()
                if optimizer.step_was_skipped:
                    skipped_updates += 1
                    continue
                lr_scheduler.step()
                grad_norms.append(grad_norm)
                if args.algorithm == "trpo":
                    kl_after_update = measure_kl(pipe, transitions, states, guidance_scale, args, accelerator)
        if args.algorithm == "trpo":
            if grad_norms:
                beta = adapt_beta(beta, kl_after_update, args.target_kl)
            metrics.update(beta=beta, kl_after_update=kl_after_update)
        if not all(parameter.isfinite().all() for parameter in lora_parameters):
            raise RuntimeError(f"the LoRA is not finite: lower --learning_rate={args.learning_rate}")

        # ==== 5. Evaluate, log, save: the main process; the others wait ===========================
        deviations = (accelerator.gather(torch.cat(ratios)) - 1).abs()
        unet_rows = accelerator.reduce(torch.tensor(float(pipe.unet.rows), device=device), "sum")
        evaluations_before = history[-1]["unet_evaluations"] if history else 0
        some_states = torch.arange(min(4, len(transitions.timesteps)))
        measured = (pipe, transitions, some_states, guidance_scale, args, accelerator)
        totals = (rewards @ weights).view(num_groups, args.group_size)
        metrics["unet_evaluations"] = evaluations_before + int(unet_rows)
        metrics["reward_std"] = totals.std(unbiased=False).item()
        metrics["reward_group_std"] = totals.std(dim=1, unbiased=False).mean().item()
        metrics["loss"] = accelerator.gather(torch.cat(losses)).mean().item()
        metrics["kl"] = accelerator.gather(torch.cat(kls)).mean().item()
        metrics["kl_old"] = measure_kl(*measured)
        metrics["kl_reference"] = measure_kl(*measured, reference=True)
        metrics["ratio_deviation"] = deviations.max().item()
        metrics["clip_fraction"] = (deviations > clip_range).float().mean().item()
        metrics["grad_norm"] = sum(grad_norms) / max(1, len(grad_norms))
        metrics["skipped_updates"] = skipped_updates
        metrics["learning_rate"] = lr_scheduler.get_last_lr()[0]
        metrics.update(summarise("reward_mean", rewards, weights, names))
        metrics.update(pd.DataFrame(gather_object(infos)).mean().to_dict())
        seconds = time.monotonic() - epoch_start
        last = epoch + 1 == num_epochs
        if is_main and len(held_out) and (last or (epoch + 1) % args.validation_epochs == 0):
            trained = evaluate(pipe, held_out, functions, pipe_kwargs, args, accelerator)
            evaluated = {**baselines, "trained": trained}
            for kind, (_, held_out_rewards) in evaluated.items():
                metrics.update(summarise(f"heldout_{kind}", held_out_rewards, weights, names))
        history.append(metrics)
        if is_main:
            pd.DataFrame(history).to_csv(output_dir / "metrics.csv", index=False)
            if last or (epoch + 1) % args.checkpointing_epochs == 0:
                state = {"args": vars(args), "num_images": len(train_data), "beta": beta, "tracker": tracker}
                state.update(history=history, lora={name: parameter.detach() for name, parameter in lora.items()})
                for name, part in stateful.items():
                    state[name] = part.state_dict()
                save_checkpoint(pipe, state, epoch + 1, output_dir, args.checkpoints_total_limit)
            if "heldout_trained" in metrics:
                picture = output_dir / "samples" / f"epoch-{epoch + 1:04d}.png"
                write_grid(evaluated, weights, held_out, title, picture)
                log_picture(picture, epoch + 1, accelerator)
            epochs_left = args.num_train_epochs - epoch - 1
            evaluations_left = math.ceil(epochs_left / args.validation_epochs)
            seconds_left = epochs_left * seconds + evaluations_left * evaluation_seconds
            print(describe_epoch(metrics, clip_range, seconds, seconds_left), flush=True)
        accelerator.log(metrics, step=epoch + 1)
        accelerator.wait_for_everyone()

    # ---- The result ------------------------------------------------------------------------------
    if is_main and not args.dry_run:
        pipe.save_lora_weights(output_dir, get_peft_model_state_dict(pipe.unet))  # all keys in PEFT's form
        write_reward_curve(history, names, title, output_dir / "reward_curve.png")
        _, caption, _ = train_data.load(0)
        card = write_model_card(repo_id, history[-1], title, caption, guidance_scale, args)
        (output_dir / "README.md").write_text(card, encoding="utf-8")
        print(f"Done: {output_dir / LORA}\n{verdict(history[-1])}")
        if args.push_to_hub:
            files = {"folder_path": output_dir, "ignore_patterns": ["checkpoint*", "logs/*"]}
            upload = huggingface_hub.upload_folder(repo_id=repo_id, **files)
            print(f"Uploaded to {upload.repo_url}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if args.dry_run:
        accelerator.print("Dry run passed.")


if __name__ == "__main__":
    main()
