"""Runs of the training script on a tiny model, as its users start them, and what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from components import picture, tiny_components


SCRIPT = Path(__file__).resolve().parent.parent / "train_img2img_ddpo.py"

# Colour of the picture: smooth, so that every group has a spread
REWARD = """
def red(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2)) ** 2
"""
# Source for `inject`: `at_call` lets `act` run before the number-th call of owner.name inside the function `within`
TOOLS = """
import functools, os, signal, sys, time
from pathlib import Path

rank = os.environ.get("RANK", "0")

def inside(name):
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None

def at_call(owner, name, number, act, within):
    original, calls = getattr(owner, name), [0]
    @functools.wraps(original)  # diffusers looks at signatures
    def wrapper(*args, **kwargs):
        calls[0] += inside(within)
        if calls[0] == number and inside(within):
            act()
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)
"""


def make_files(folder: Path) -> None:
    """`model`, `images` (5 to train on, 2 held out) and `reward.py` in `folder`."""
    StableDiffusionImg2ImgPipeline(**tiny_components()).save_pretrained(folder / "model")
    for split, count in (("train", 5), ("validation", 2)):
        images = folder / "images" / split
        images.mkdir(parents=True)
        rows = []
        for i in range(count):
            picture(16, (40 * i, 60 + 20 * i, 200 - 30 * i)).save(images / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": ("a disc", "", "red")[i % 3]})
        (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)


def options(files: Path, output_dir: Path, **overrides) -> list[str]:
    """The command line of a run of seconds; `name=True` is a bare flag, a list several values."""
    values = {
        "pretrained_model_name_or_path": files / "model",
        "train_data_dir": files / "images",
        "reward_fn": f"{files / 'reward.py'}:red",
        "output_dir": output_dir,
        "resolution": 16, "strength": 0.5, "num_inference_steps": 8, "guidance_scale": 2.0, "samples_per_epoch": 8,
        "group_size": 4, "sample_batch_size": 4, "train_batch_size": 8, "rank": 2, "learning_rate": 1e-3,
        "num_train_epochs": 4, "validation_epochs": 2,
    } | overrides  # fmt: skip
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [str(part) for name in lists for part in [f"--{name}", *lists[name]] if part is not True]


class Run:
    """The script in processes of its own: plain python, or torchrun for several. `inject` is source executed before."""

    def __init__(self, arguments: list[str], log: Path, processes: int = 1, inject: str = "", launcher=None, **env):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        command = [sys.executable, *(launcher or (torchrun if processes > 1 else [])), str(SCRIPT), *arguments]
        drop = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
        if inject:
            site = log.parent / f"{log.name}-site"
            site.mkdir(exist_ok=True)
            (site / "sitecustomize.py").write_text(TOOLS + inject)
            environment["PYTHONPATH"] = str(site)
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until the output has `text`."""
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < end, f"no {text!r} in:\n{self.output}"
            time.sleep(0.02)

    def wait(self, timeout: float = 180) -> int:
        """The exit code, minus the signal's number if one ended it."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def succeed(self) -> "Run":
        assert self.wait() == 0, self.output
        return self


def newest(output_dir: Path) -> int:
    """Epochs of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def read_result(output_dir: Path) -> dict:
    """What equal runs have in common: the LoRA's bytes, the newest checkpoint's state, the metrics."""
    state = torch.load(output_dir / f"checkpoint-{newest(output_dir)}" / "state.pt", weights_only=True)
    return {
        "lora": (output_dir / "pytorch_lora_weights.safetensors").read_bytes(),
        "state": {name: state[name] for name in ("parts", "values")},
        "metrics": pd.read_csv(output_dir / "metrics.csv"),
    }


def assert_same(one, other, path: str = "") -> None:
    """Bit-equal results."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{path}/{i}")
    elif isinstance(one, (torch.Tensor, pd.DataFrame)):
        assert one.equals(other) if isinstance(one, pd.DataFrame) else one.equal(other), path
    else:
        assert one == other, path
