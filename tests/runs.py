"""Runs of the training script on a tiny model, as its users start them, and what they leave."""

import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file

from components import picture, tiny_components


SCRIPT = Path(__file__).resolve().parent.parent / "train_img2img_ddpo.py"

# Colour of the picture: smooth, so that every group has a spread
REWARD = """
def red(images, prompts, metadata):
    blue = images[:, 2].mean(dim=(1, 2))
    return images[:, 0].mean(dim=(1, 2)) - blue ** 2, {"blue": blue}
"""
# Source for `inject`: `at_call` lets `act` run before the number-th call of owner.name
TOOLS = """
import functools, os, signal
from pathlib import Path

rank = os.environ.get("RANK", "0")

def at_call(owner, name, number, act):
    original, calls = getattr(owner, name), [0]
    @functools.wraps(original)  # diffusers looks at signatures
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
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
            rows.append({"file_name": f"{i}.png", "text": ("a disc", "", "red " * 100)[i % 3]})
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


# Imports the trainer once: that takes three times as long as a run (with the root as working directory; else each does)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_img2img_ddpo"])


def run_script(arguments: list[str], log: Path, inject: str, launcher: list[str] | None, environment: dict) -> None:
    """What `python train_img2img_ddpo.py` does, in the process that it is called in, which has an end."""
    os.setsid()
    os.chdir(log.parent)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    if launcher is not None:
        os.execv(sys.executable, [sys.executable, *launcher, str(SCRIPT), *arguments])
    exec(TOOLS + inject, {})
    import train_img2img_ddpo as trainer

    try:
        trainer.main(arguments)
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Run:
    """The script in processes of its own: by a `launcher` in a new python, else in copies of one that has imported the
    script, which find each other and first execute the source `inject`."""

    def __init__(self, arguments: list[str], log: Path, processes: int = 1, inject: str = "", launcher=None, **env):
        environment = dict(os.environ, ACCELERATE_USE_CPU="true", PYTHONUNBUFFERED="1", **env)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        log.unlink(missing_ok=True)
        log.touch()
        self.processes = []
        for rank in range(processes):
            own = dict(environment)
            if processes > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = SERVER.Process(target=run_script, args=(arguments, log, inject, launcher, own))
            process.start()
            self.processes.append(process)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 120
        while text not in self.output:
            assert time.monotonic() < end, f"no {text!r} in:\n{self.output}"
            time.sleep(0.02)

    def wait(self, timeout: float = 180) -> int:
        """When all have ended, the exit code of the first that failed, minus the signal's number if one ended it."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            for process in self.processes:
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.output}")
        return next(filter(None, codes), 0)

    def succeed(self) -> "Run":
        assert self.wait() == 0, self.output
        return self


def newest(output_dir: Path) -> int:
    """Epochs of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def read_result(output_dir: Path) -> dict:
    """What equal runs have in common: the LoRA, the newest checkpoint's state, the metrics."""
    state = torch.load(output_dir / f"checkpoint-{newest(output_dir)}" / "state.pt", weights_only=True)
    del state["args"]  # among them the folder
    return {
        "lora": load_file(output_dir / "pytorch_lora_weights.safetensors"),
        "state": state,
        "metrics": pd.read_csv(output_dir / "metrics.csv").to_dict("list"),
    }


# Bit-equal results
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
