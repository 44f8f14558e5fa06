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
"""
Runs of the real training script on a tiny model, for the fault tests and the soak.

Two ways to start it. `launch` is what a user types: `accelerate launch` or `torchrun`, some ten seconds of imports.
`Warm` keeps one Python process that has done the imports and forks a new process per run, which then executes the
script as `__main__` with its own arguments, environment and output: the same code in a process of its own, in a
fraction of a second. Faults that no user can order (a kill inside a rename, a full disk) come in as Python source that
is executed before the script, through `Warm(inject=)` or as the `sitecustomize` of a launched process.
"""

import csv
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_img2img_ddpo.py"

# Colour of the picture: smooth, so that every group has a spread. `calls` counts the process's reward calls
REWARD = """
import os, time
calls = 0

def red(images, prompts, metadata):
    global calls
    calls += 1
    if calls > int(os.environ.get("SLOW_AFTER", calls)):
        time.sleep(3)
    return images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2)) ** 2
"""


def make_files(folder: Path) -> None:
    """`model`, `images` (5 to train on, 2 held out) and `reward.py` in `folder`."""
    from diffusers import StableDiffusionImg2ImgPipeline

    from components import picture, tiny_components

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
    """The command line of a run of a second or two; `name=None` leaves an option out, `name=True` is a bare flag."""
    values = {
        "pretrained_model_name_or_path": files / "model",
        "train_data_dir": files / "images",
        "reward_fn": f"{files / 'reward.py'}:red",
        "output_dir": output_dir,
        "resolution": 16,
        "strength": 0.5,
        "num_inference_steps": 8,
        "guidance_scale": 2.0,
        "samples_per_epoch": 8,
        "group_size": 4,
        "sample_batch_size": 4,
        "train_batch_size": 8,
        "rank": 2,
        "learning_rate": 1e-3,
        "num_train_epochs": 4,
        "validation_epochs": 2,
    } | overrides
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in values.items()
        if value is not None and value is not False
    ]


def environment(**extra) -> dict[str, str]:
    """For a process of its own: one thread, no terminal bars, nothing of an outer launcher."""
    drop = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "HF_ENDPOINT", "HF_TOKEN")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"} | extra


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, timeout: float = 60.0, what: str = "") -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.02)


class Launched:
    """A run as a user starts it; `process` is the launcher, `ranks` the pids of the script."""

    def __init__(self, arguments: list[str], log: Path, processes: int = 1, inject: str = "", launcher=None, **env):
        binaries = Path(sys.executable).parent
        if launcher is None:
            launcher = (
                [binaries / "accelerate", "launch", "--cpu", "--num_processes", "1"]
                if processes == 1
                else [binaries / "torchrun", "--nproc_per_node", processes, "--master_port", free_port()]
            )
        if processes > 1:
            env["ACCELERATE_USE_CPU"] = "true"
        if inject:
            (log.parent / f"{log.stem}-site").mkdir()
            (log.parent / f"{log.stem}-site" / "sitecustomize.py").write_text(inject)
            env["PYTHONPATH"] = str(log.parent / f"{log.stem}-site")
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [str(part) for part in [*launcher, SCRIPT, *arguments]], env=environment(**env), stdout=file,
                stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Pids of the script's processes, in the order of their start."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if SCRIPT.name in Path(f"/proc/{pid}/cmdline").read_text()]

    def wait(self, timeout: float = 120) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in [*self.ranks(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None


class WarmRun:
    """One process forked by `Warm`."""

    def __init__(self, warm, pid: int, log: Path):
        self.warm, self.pid, self.log, self.returncode = warm, pid, log, None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code, as `subprocess` gives it (minus the signal's number if that ended it), or None."""
        if self.returncode is None:
            self.returncode = self.warm.request(poll=self.pid)["returncode"]
        return self.returncode

    def kill(self, number: int) -> None:
        """Sends a signal; the process cannot have been reaped since, because only `poll` does that."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s:\n{self.output}")
            time.sleep(0.02)
        return self.returncode


class Warm:
    """Starts runs by forking a process that has already imported everything."""

    def __init__(self, **env):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.request(poll=None) == {"returncode": None}

    def request(self, **message) -> dict:
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], log: Path, inject: str = "", **env) -> WarmRun:
        """One process of the script; with `RANK` and so on in `env`, one of several."""
        log.write_text("")
        reply = self.request(start=[str(a) for a in arguments], log=str(log), inject=inject, env=env)
        return WarmRun(self, reply["pid"], log)

    def start_ranks(self, arguments: list[str], log: Path, inject: str = "", processes: int = 2) -> list[WarmRun]:
        """As `torchrun` does: a process per rank, which meet over a port."""
        port = str(free_port())
        return [
            self.start(
                arguments, log.with_suffix(f".{rank}"), inject, RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                ACCELERATE_USE_CPU="true",
            )
            for rank in range(processes)
        ]  # fmt: skip

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def read_result(output_dir: Path) -> dict:
    """What two runs must have in common: the LoRA's tensors, the newest checkpoint's state, and the metrics' rows."""
    from safetensors.torch import load_file

    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    values = json.loads((checkpoints[-1] / "training_state.json").read_text())
    del values["args"]
    with open(output_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "lora": load_file(output_dir / "pytorch_lora_weights.safetensors"),
        "state": load_file(checkpoints[-1] / "training_state.safetensors"),
        "values": values,
        "rows": rows,
    }


def assert_same(one: dict, other: dict) -> None:
    """Bit-equal results."""
    assert one["rows"] == other["rows"]
    assert one["values"] == other["values"]
    for part in ("lora", "state"):
        assert one[part].keys() == other[part].keys()
        unequal = [name for name in one[part] if not one[part][name].equal(other[part][name])]
        assert not unequal, f"{part}: {len(unequal)} tensors differ, such as {unequal[0]}"


def serve() -> dict:
    """The process behind `Warm`: requests on stdin, replies on stdout; returns in a forked process, with its request."""
    sys.path.insert(0, str(ROOT))
    replies, sys.stdout = sys.stdout, sys.stderr
    import matplotlib.figure  # noqa: F401  # imported late by the script

    import train_img2img_ddpo  # noqa: F401  # for its imports

    gc.freeze()  # shared with the forked processes, as long as no collection touches it
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG) if request["poll"] else (0, 0)
            reply = {"returncode": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                return request
            reply = {"pid": pid}
        print(json.dumps(reply), file=replies, flush=True)
    os._exit(0)


def run_forked(request: dict) -> None:
    """Executes the script in this forked process, to its natural end."""
    os.setsid()
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    del sys.modules["train_img2img_ddpo"]
    exec(compile(request["inject"], "inject", "exec"), {})
    sys.argv = [str(SCRIPT), *request["start"]]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    run_forked(serve())
