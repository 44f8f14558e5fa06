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
Nothing is lost: faults injected into real runs of the training script, and what they leave behind.

The yardstick is nearly always the same: after the fault, `--resume_from_checkpoint=latest` must arrive at exactly the
LoRA, optimizer, statistics and metrics of a run that nothing happened to. See runs.py for how runs are started.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import Launched, assert_same, options, read_result, wait_for
from safetensors.torch import load_file, save_file


# The settings with the most state; every run of this file that is compared with another one has them
SETTINGS = {"advantage": "tracker", "ema_decay": 0.5, "checkpoints_total_limit": 4, "random_flip": True}
LATEST = {"resume_from_checkpoint": "latest"}

# Source executed before the script: `rank`, and ways to act at the n-th call of a function inside another one
TOOLS = """
import functools, os, signal, sys, time
from pathlib import Path

rank = os.environ.get("RANK", "0")

def inside(name):
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back
    return False

def at_call(owner, name, number, act, within=None):
    # act() runs before the number-th call of owner.name with the function `within` on the stack
    original, calls = getattr(owner, name), [0]
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if within is None or inside(within):
            calls[0] += 1
            if calls[0] == number:
                act()
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(files, folder) -> Path:
    """Four epochs in one process that nothing happens to, through `accelerate launch`."""
    run = Launched(options(files, folder / "reference", **SETTINGS), folder / "reference.log")
    assert run.wait() == 0, run.output
    assert "1 process(es)" in run.output
    return folder / "reference"


@pytest.fixture(scope="module")
def reference_2(files, folder) -> Path:
    """The same in two processes, through `torchrun`; each rank leaves its LoRA beside the folder."""
    dump = f"""
import os
if "RANK" in os.environ:
    import accelerate, torch
    from safetensors.torch import save_file
    optimizers, init, end = [], torch.optim.AdamW.__init__, accelerate.Accelerator.end_training
    def record(self, *args, **kwargs):
        init(self, *args, **kwargs)
        optimizers.append(self)
    def dump(self):
        tensors = [p.detach() for group in optimizers[0].param_groups for p in group["params"]]
        save_file({{str(i): p for i, p in enumerate(tensors)}}, "{folder}/rank-" + os.environ["RANK"])
        end(self)
    torch.optim.AdamW.__init__, accelerate.Accelerator.end_training = record, dump
"""
    run = Launched(options(files, folder / "reference_2", **SETTINGS), folder / "reference_2.log", 2, dump)
    assert run.wait() == 0, run.output
    assert "2 process(es)" in run.output
    return folder / "reference_2"


def finish(warm, files, output_dir: Path, **overrides) -> dict:
    """Resumes to the end, which must succeed; the result."""
    run = warm.start(options(files, output_dir, **SETTINGS | LATEST | overrides), output_dir.with_suffix(".resumed"))
    assert run.wait() == 0, run.output
    return read_result(output_dir)


def finish_2(warm, files, output_dir: Path, **overrides) -> dict:
    """The same in two processes."""
    arguments = options(files, output_dir, **SETTINGS | LATEST | overrides)
    runs = warm.start_ranks(arguments, output_dir.with_suffix(".resumed"))
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert "2 process(es)" in runs[0].output
    return read_result(output_dir)


def newest(output_dir: Path) -> int:
    """Epochs of the newest checkpoint."""
    return max((int(p.name.rpartition("-")[2]) for p in output_dir.glob("checkpoint-*")), default=-1)


def error_of(run) -> str:
    return "\n".join(line for line in run.output.splitlines() if "rror" in line)


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume
# ---------------------------------------------------------------------------------------------------------------------


def test_resume_is_exact(warm, files, folder, reference):
    """4 epochs == 2, resume, 2, with PPO, per-image statistics, a moving average and flips; through both launchers."""
    run = warm.start(options(files, folder / "halves", **SETTINGS, num_train_epochs=2), folder / "halves.log")
    assert run.wait() == 0, run.output
    assert newest(folder / "halves") == 2
    assert_same(finish(warm, files, folder / "halves"), read_result(reference))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "sac", "sample_batch_size": 8},
        {"algorithm": "trpo", "kl_coef": 0.1, "num_inner_epochs": 2, "lr_scheduler": "constant_with_warmup",
         "lr_warmup_steps": 6, "target_kl": 1e-3},
    ],
    ids=lambda settings: settings["algorithm"],
)  # fmt: skip
def test_resume_is_exact_with(settings, warm, files, folder):
    """The critic, its target and optimizer; TRPO's beta; a learning rate that is still rising."""
    name = settings["algorithm"]
    whole, halves = folder / f"{name}-whole", folder / f"{name}-halves"
    runs = [
        warm.start(options(files, whole, **settings), folder / f"{name}-whole.log"),
        warm.start(options(files, halves, **settings, num_train_epochs=2), folder / f"{name}-halves.log"),
    ]
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    again = warm.start(options(files, halves, **settings, **LATEST), folder / f"{name}-again.log")
    assert again.wait() == 0, again.output
    assert_same(read_result(halves), read_result(whole))
    if name == "sac":
        assert any(key.startswith("critic_optimizer.") for key in read_result(halves)["state"])


def test_resume_is_exact_with_two_processes(warm, files, folder, reference_2, reference):
    """2 + 2 epochs with two ranks; and two epochs of two ranks continued by one."""
    arguments = options(files, folder / "halves_2", **SETTINGS, num_train_epochs=2)
    runs = warm.start_ranks(arguments, folder / "halves_2.log")
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    shutil.copytree(folder / "halves_2", folder / "two_then_one")
    assert_same(finish_2(warm, files, folder / "halves_2"), read_result(reference_2))
    mixed, whole = finish(warm, files, folder / "two_then_one")["lora"], read_result(reference)["lora"]
    assert distance(mixed, whole) < 1e-5


def test_wrong_input_on_one_rank_is_told(warm, files, folder):
    """Such as data that only one machine lacks: the launcher would show no more than the exit code."""
    missing = "import datasets, os\nif os.environ['RANK'] == '1':\n    del datasets.load_dataset"
    runs = warm.start_ranks(options(files, folder / "one_lacks"), folder / "one_lacks.log", missing)
    assert runs[1].wait() == 2, runs[1].output
    assert "error on rank 1: --train_data_dir=" in runs[1].output
    runs[0].kill(signal.SIGTERM)  # as a launcher does
    assert runs[0].wait() != 0


def test_other_settings_are_refused_by_name(warm, files, folder, reference):
    changed = {
        "rank": 4, "group_size": 2, "algorithm": "trpo", "learning_rate": 0.5, "advantage": "group", "seed": 1,
        "max_train_samples": 3,
    }  # fmt: skip
    run = warm.start(options(files, reference, **SETTINGS | LATEST | changed), folder / "refused.log")
    assert run.wait() == 2, run.output
    for name in changed:
        assert f"--{name}=" in error_of(run), error_of(run)
    before = read_result(reference)
    more = folder / "more_images"
    shutil.copytree(files / "images", more / "images")
    shutil.copytree(reference, folder / "more", dirs_exist_ok=True)
    shutil.copy(more / "images/train/0.png", more / "images/train/5.png")
    with open(more / "images/train/metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "5.png", "text": "new"}')
    shutil.move(files / "images", files / "images-before")
    try:
        shutil.copytree(more / "images", files / "images")
        run = warm.start(options(files, folder / "more", **SETTINGS | LATEST), folder / "refused-2.log")
        assert run.wait() == 2, run.output
        assert "training_images=6 (was 5)" in error_of(run)
    finally:
        shutil.rmtree(files / "images")
        shutil.move(files / "images-before", files / "images")
    assert_same(before, read_result(reference))


@pytest.mark.parametrize("part", ["images/train/1.png", "images/train/metadata.jsonl", "model/unet/diffusion_pytorch_model.safetensors"])  # fmt: skip
def test_other_data_or_model_in_the_same_place_is_refused(part, warm, files, folder):
    """Of the same names and sizes, so that no option differs."""
    place = folder / f"same_place-{Path(part).stem}"
    shutil.copytree(files, place)
    arguments = options(place, place / "out", num_train_epochs=1)
    assert warm.start(arguments, folder / "same_place.log").wait() == 0
    if part.endswith("png"):
        Image.open(place / part).transpose(Image.Transpose.ROTATE_90).save(place / part)
    elif part.endswith("jsonl"):
        (place / part).write_text((place / part).read_text().replace("a disc", "a duck"))
    else:
        weights = load_file(place / part)
        save_file({name: weight * 1.001 for name, weight in weights.items()}, place / part)
    run = warm.start([*arguments, "--resume_from_checkpoint=latest"], folder / "same_place-2.log")
    assert run.wait() == 2, run.output
    told = "base_weights=" if part.startswith("model") else "training_data="
    assert told in error_of(run) and "training_images" not in error_of(run) and "--" + told not in error_of(run)


def test_metrics_belong_to_the_result(warm, files, folder, reference):
    """A run that went to epoch 4 is continued from epoch 2 to epoch 2: the rows of epochs 3 and 4 are another's."""
    shutil.copytree(reference, folder / "shorter")
    arguments = options(files, folder / "shorter", **SETTINGS | {"num_train_epochs": 2})
    run = warm.start([*arguments, "--resume_from_checkpoint=checkpoint-3"], folder / "shorter.log")
    assert run.wait() == 0, run.output
    result = read_result(folder / "shorter")
    assert result["rows"] == read_result(reference)["rows"][:3]
    shutil.rmtree(folder / "shorter" / "checkpoint-4")
    assert_same(finish(warm, files, folder / "shorter"), read_result(reference))


def test_ranks_resume_from_one_checkpoint(warm, files, folder, reference_2):
    """Only the main process has the folder, as on two machines without a shared disk."""
    shutil.copytree(reference_2, folder / "far-0")
    shutil.rmtree(folder / "far-0" / "checkpoint-4")
    other = f"import os, sys\nif os.environ['RANK'] == '1':\n    os.chdir('{files}')"
    arguments = options(files, "far-0", **SETTINGS | LATEST)
    runs = warm.start_ranks(arguments, folder / "far.log", f"import os\nos.chdir('{folder}')\n{other}")
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert_same(read_result(folder / "far-0"), read_result(reference_2))


# ---------------------------------------------------------------------------------------------------------------------
# Any number of processes
# ---------------------------------------------------------------------------------------------------------------------


def distance(one: dict, other: dict) -> float:
    """Relative L2 distance of two LoRAs."""
    assert one.keys() == other.keys()
    one, other = (torch.cat([lora[name].flatten() for name in sorted(lora)]) for lora in (one, other))
    return ((one - other).norm() / other.norm()).item()


def test_two_processes_equal_one(folder, reference, reference_2):
    one, two = read_result(reference), read_result(reference_2)
    assert len(one["rows"]) == len(two["rows"]) == 4
    for row, other in zip(one["rows"], two["rows"]):
        for name in ("samples", "epoch", "zero_variance_groups"):
            assert row[name] == other[name]
        for name in ("reward_mean", "reward_std", "reward_min", "reward_max", "reward_group_std"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-6), name
    # the rewards themselves, per image and prompt, are the tracker's
    (tracker,), (other,) = one["values"]["trackers"], two["values"]["trackers"]
    assert tracker.keys() == other.keys()
    for key in tracker:
        assert tracker[key] == pytest.approx(other[key], abs=1e-5)
    loras = [load_file(f / "checkpoint-3/pytorch_lora_weights.safetensors") for f in (reference, reference_2)]
    assert distance(*loras) < 1e-5
    start = load_file(reference / "checkpoint-1/pytorch_lora_weights.safetensors")
    assert distance(start, loras[0]) > 1e-3, "hardly anything was trained: the comparison says nothing"
    ranks = [load_file(folder / f"rank-{rank}") for rank in range(2)]
    assert all(ranks[0][name].equal(ranks[1][name]) for name in ranks[0])


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------

# What rank 0 does when the signal is to strike; `strike` signals the target
STAGES = {
    "loading the model": """
import diffusers
at_call(diffusers.DiffusionPipeline, "from_pretrained", 1, lambda: (strike(), time.sleep(30)))
""",
    "sampling": "import diffusers\nat_call(diffusers.DDIMScheduler, 'step', 11, strike, 'collect')",
    "slow reward": "os.environ['SLOW_AFTER'] = '7'\nat_call(time, 'sleep', 2, strike, 'red')",
    "training": "import accelerate\nat_call(accelerate.Accelerator, 'backward', 4, strike)",
    "evaluation": "import diffusers\nat_call(diffusers.DDIMScheduler, 'step', 3, strike, 'finish_epoch')",
    "saving": """
import safetensors.torch
at_call(safetensors.torch, "save_file", 3, lambda: (strike(), time.sleep(2)), "save_checkpoint")
""",
    "saving the result": "at_call(os, 'replace', 1, lambda: (strike(), time.sleep(1)), 'save_result')",
}


def strike(stage: str, number: int, target: int, mark: Path) -> str:
    return f"""{TOOLS}
Path(f"{mark}-{{rank}}").write_text(str(os.getpid()))

def strike():
    Path("{mark}").write_text(str(time.time()))
    os.kill(int(Path("{mark}-{target}").read_text()), {int(number)})

if rank == "0":
    exec({STAGES[stage]!r})
"""


@pytest.mark.parametrize("stage", STAGES)
def test_signal(stage, warm, files, folder, reference):
    """SIGTERM or SIGINT in each stage: out within 10 s (and the running reward call), and nothing lost."""
    place = list(STAGES).index(stage)
    number = (signal.SIGTERM, signal.SIGINT)[place % 2]
    output_dir, mark = folder / f"signal-{place}", folder / f"signal-{place}.mark"
    arguments = options(files, output_dir, **SETTINGS)
    run = warm.start(arguments, folder / f"signal-{place}.log", strike(stage, number, 0, mark))
    code = run.wait()
    took = time.time() - float(mark.read_text())
    assert code == 128 + number, run.output
    assert took < (13 if stage == "slow reward" else 10)
    if stage != "loading the model":
        assert f"Stopped by signal {int(number)}" in run.output
        assert newest(output_dir) >= 0
    assert_same(finish(warm, files, output_dir), read_result(reference))


@pytest.mark.parametrize("stage", STAGES)
def test_signal_to_one_rank_of_two(stage, warm, files, folder, reference_2):
    """Only rank 1 is signalled, whatever rank 0 is at: both leave, and nothing is lost."""
    place = list(STAGES).index(stage)
    number = (signal.SIGINT, signal.SIGTERM)[place % 2]
    output_dir, mark = folder / f"signal_2-{place}", folder / f"signal_2-{place}.mark"
    arguments = options(files, output_dir, **SETTINGS)
    runs = warm.start_ranks(arguments, folder / f"signal_2-{place}.log", strike(stage, number, 1, mark))
    code = runs[1].wait()
    took = time.time() - float(mark.read_text())
    assert code == 128 + number, runs[1].output
    if stage == "loading the model":  # rank 1 leaves at once; rank 0 is ended by the launcher, here by us
        runs[0].kill(signal.SIGTERM)
        assert runs[0].wait() == 128 + signal.SIGTERM
    else:
        assert runs[0].wait() == 128 + number, runs[0].output
        took = time.time() - float(mark.read_text())
        assert f"Stopped by signal {int(number)}" in runs[0].output
    assert took < (13 if stage == "slow reward" else 10)
    assert_same(finish_2(warm, files, output_dir), read_result(reference_2))


def test_signal_to_a_waiting_rank(warm, files, folder):
    """Rank 0 has nothing left to do and waits in a collective for rank 1, whose reward is slow: its signal stops both."""
    mark = folder / "waiting.mark"
    slow = f"""{TOOLS}
if rank == "1":
    os.environ["SLOW_AFTER"] = "7"
    at_call(time, "sleep", 1, Path("{mark}").touch, "red")
"""
    arguments = options(files, folder / "waiting", **SETTINGS | {"sample_batch_size": 1})
    runs = warm.start_ranks(arguments, folder / "waiting.log", slow)
    wait_for(mark.exists, what="the slow reward")
    time.sleep(1)
    struck = time.monotonic()
    runs[0].kill(signal.SIGTERM)
    assert [run.wait() for run in runs] == [128 + signal.SIGTERM] * 2
    assert time.monotonic() - struck < 6, "waited for all of rank 1's four rewards of 3 s"
    assert newest(folder / "waiting") == 0


def test_signals_while_a_reward_hangs(warm, files, folder):
    """One signal saves at once and waits 10 s for the reward, a second one does not wait."""
    (folder / "hang.py").write_text(
        "import time\nfrom pathlib import Path\ncalls = 0\n"
        "def hang(images, prompts, metadata):\n"
        "    global calls\n    calls += 1\n"
        f"    if calls > 5:\n        Path('{folder}/hanging').touch()\n        time.sleep(100)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    for name in ("once", "twice"):
        arguments = options(files, folder / f"hang-{name}", reward_fn=f"{folder / 'hang.py'}:hang")
        run = warm.start(arguments, folder / "hang.log")
        wait_for((folder / "hanging").exists, what="the reward to hang")
        run.kill(signal.SIGTERM)
        wait_for(lambda: newest(folder / f"hang-{name}") == 0, 10, "the checkpoint, which does not wait")  # noqa: B023
        time.sleep(1.5)
        assert run.poll() is None
        if name == "twice":
            run.kill(signal.SIGTERM)
        assert run.wait(3 if name == "twice" else 12) == 128 + signal.SIGTERM
        (folder / "hanging").unlink()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "processes, number, group, epoch",
    [(1, signal.SIGTERM, False, 1), (1, signal.SIGINT, True, 0), (2, signal.SIGTERM, False, 1), (2, signal.SIGINT, False, 0)],
)  # fmt: skip
def test_signal_to_the_launcher(processes, number, group, epoch, warm, files, folder, reference, reference_2):
    """`accelerate launch` dies and tells nobody, `torchrun` passes the signal on, Ctrl-C in a terminal goes to both
    `accelerate launch` and the script: in all cases the ranks save and go."""
    name = f"launcher-{processes}-{int(number)}"
    run = Launched(options(files, folder / name, **SETTINGS), folder / f"{name}.log", processes)
    reached = f"epoch {epoch}:" if epoch else "trust "
    wait_for(lambda: reached in run.output, 120, reached)
    assert f"{processes} process(es)" in run.output
    ranks = run.ranks()
    assert len(ranks) == processes
    struck = time.monotonic()
    (os.killpg if group else os.kill)(run.process.pid, number)
    assert run.wait() != 0
    wait_for(lambda: not any(map(alive, ranks)), 10 - (time.monotonic() - struck), "the ranks to leave")
    assert "Stopped by signal" in run.output, run.output
    assert newest(folder / name) >= 0
    result = (finish if processes == 1 else finish_2)(warm, files, folder / name)
    assert_same(result, read_result(reference if processes == 1 else reference_2))


def test_launcher_is_ended_while_the_script_imports(warm, files, folder):
    """Before the script can have looked for signals: it leaves as soon as it is able to."""
    run = Launched(options(files, folder / "early", **SETTINGS), folder / "early.log")
    wait_for(run.ranks, what="the script's process")
    (script,) = run.ranks()
    time.sleep(0.5)
    assert run.process.poll() is None
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait()
    struck = time.monotonic()
    wait_for(lambda: not alive(script), 30, "the script to leave")
    print(f"left {time.monotonic() - struck:.1f} s after the launcher")
    assert not (folder / "early").exists()


def test_main_process_of_two_is_killed(warm, files, folder, reference_2):
    """torchrun then ends the other one, which does not wait for a save that will not come."""
    run = Launched(options(files, folder / "beheaded", **SETTINGS), folder / "beheaded.log", 2)
    wait_for(lambda: "epoch 1:" in run.output, 120, "epoch 1")
    ranks = run.ranks()
    os.kill(ranks[0], signal.SIGKILL)
    struck = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - struck < 15 and not any(map(alive, ranks))
    assert_same(finish_2(warm, files, folder / "beheaded"), read_result(reference_2))


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal closed", "nohup"])
def test_hangup(ignored, warm, files, folder, reference):
    """A terminal that is closed ends the run like SIGTERM, unless nohup has it ignored."""
    output_dir, mark = folder / f"hangup-{ignored}", folder / "hangup.mark"
    nohup = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" * ignored
    inject = nohup + strike("training", signal.SIGHUP, 0, mark)
    run = warm.start(options(files, output_dir, **SETTINGS), folder / "hangup.log", inject)
    assert run.wait() == (0 if ignored else 128 + signal.SIGHUP), run.output
    assert ignored or "Stopped by signal 1 after" in run.output
    assert_same(finish(warm, files, output_dir), read_result(reference))


def test_processes_of_a_reward_are_not_the_run(warm, files, folder, reference):
    """A reward that ends its own forked processes by SIGTERM, as multiprocessing's pools do, does not stop the run."""
    (folder / "pool.py").write_text(
        "import multiprocessing, time\n"
        "def red(images, prompts, metadata):\n"
        "    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    worker.start()\n    worker.terminate()\n    worker.join(10)\n"
        "    assert worker.exitcode == -15, worker.exitcode\n"
        "    return images[:, 0].mean(dim=(1, 2))\n"
    )
    arguments = options(
        files, folder / "pool", reward_fn=f"{folder / 'pool.py'}:red", num_train_epochs=2, sample_batch_size=1
    )
    run = warm.start(arguments, folder / "pool.log")
    assert run.wait() == 0, run.output


# ---------------------------------------------------------------------------------------------------------------------
# Kills, full disks, damaged checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer():
    """The script as a module, for faults that a run of its own would only make slower."""
    import train_img2img_ddpo

    return train_img2img_ddpo


def arguments_of(trainer, output_dir: Path, **overrides):
    values = {"output_dir": str(output_dir), "resume_from_checkpoint": "latest", "checkpoints_total_limit": 2}
    args = trainer.argparse.Namespace(**values | overrides)
    args.lr_scheduler = "constant"
    return args


def snapshot_of(trainer, checkpoint: Path, epoch: int):
    tensors, values = trainer.read_checkpoint(checkpoint)
    lora = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    return trainer.Snapshot(epoch, tensors, values | {"epoch": epoch}, lora, {})


def kill_at_line(trainer, snapshot, args, number: int) -> bool:
    """Saves in a forked process that is killed at the number-th line it executes of the script; False if it was done
    before."""
    pid = os.fork()
    if pid == 0:
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename != trainer.__file__:
                return None
            lines += event == "line"
            if lines == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        trainer.save_checkpoint(snapshot, args)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


@pytest.mark.parametrize("limit, existing", [(1, False), (2, False), (2, True)])
def test_kill_at_every_line_of_saving(limit, existing, trainer, folder, reference, capsys):
    """SIGKILL at each executed line of `save_checkpoint`: afterwards `latest` is the old or the new checkpoint, whole."""
    snapshot = snapshot_of(trainer, reference / "checkpoint-4", 4)
    kills = 0
    output_dir = folder / f"killed-{limit}-{existing}"
    args = arguments_of(trainer, output_dir, checkpoints_total_limit=limit)
    while True:
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir()
        for epoch in range(4 - limit, 5 if existing else 4):
            shutil.copytree(reference / f"checkpoint-{epoch or 1}", output_dir / f"checkpoint-{epoch}")
        if not kill_at_line(trainer, snapshot, args, kills + 1):
            break
        kills += 1
        found, tensors, values = trainer.find_checkpoint(arguments_of(trainer, output_dir))
        assert found.name in ("checkpoint-3", "checkpoint-4")
        expected = load_file(reference / found.name / "training_state.safetensors")
        assert all(tensors[name].equal(expected[name]) for name in expected)
        assert "cannot be read" not in capsys.readouterr().out
        trainer.save_checkpoint(snapshot, args)  # the next attempt is not disturbed by what was left
        assert trainer.find_checkpoint(arguments_of(trainer, output_dir))[0].name == "checkpoint-4"
        assert not list(output_dir.glob(".checkpoint*"))
        assert len(list(output_dir.glob("checkpoint-*"))) == limit
    assert kills > 20


KILL = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
KILLS = {
    "in the rename": f"at_call(os, 'replace', 2, {KILL}, 'save_checkpoint')",
    "before the old one is deleted": f"import shutil\nat_call(shutil, 'rmtree', 1, {KILL}, 'save_checkpoint')",
    "in the metrics": f"at_call(os, 'replace', 3, {KILL}, 'write_atomically')",
    "in the result": f"at_call(os, 'replace', 1, {KILL}, 'save_result')",
}


@pytest.mark.parametrize("place", KILLS)
def test_kill_while_files_are_written(place, warm, files, folder, reference):
    output_dir = folder / f"kill-{list(KILLS).index(place)}"
    limit = {"checkpoints_total_limit": 1}
    run = warm.start(options(files, output_dir, **SETTINGS | limit), folder / "kill.log", TOOLS + KILLS[place])
    assert run.wait() == -signal.SIGKILL, run.output
    assert newest(output_dir) > 0
    assert_same(finish(warm, files, output_dir, **limit), read_result(reference))


def test_kills_at_random_moments(warm, files, folder, reference):
    """A few; tests/soak.py does hundreds."""
    output_dir, kills = folder / "random", 0
    while kills < 3:
        run = warm.start(options(files, output_dir, **SETTINGS | LATEST), folder / "random.log")
        moment = time.monotonic() + random.uniform(0.5, 3)
        while time.monotonic() < moment and run.poll() is None:
            time.sleep(0.01)
        if run.poll() is not None:
            assert run.poll() == 0, run.output
            break
        run.kill(signal.SIGKILL)
        run.wait()
        kills += 1
    assert_same(finish(warm, files, output_dir), read_result(reference))


FULL = "import errno\ndef full():\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
WRITE_FAULTS = {
    "No space left on device": f"import safetensors.torch\n{FULL}at_call(safetensors.torch, 'save_file', 3, full, 'save_checkpoint')\nat_call(safetensors.torch, 'save_file', 4, full, 'save_checkpoint')",
    "Permission denied": "def deny():\n    raise PermissionError(13, 'Permission denied')\nfor number in (3, 4):\n    at_call(Path, 'mkdir', number, deny, 'save_checkpoint')",
    "File too large": "import resource\nat_call(os, 'fsync', 9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)), 'save_checkpoint')",
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_writing_fails(fault, warm, files, folder, reference):
    """Disk full, no permission, file too large (RLIMIT_FSIZE, a real fault of the kernel): loud, and nothing is lost."""
    output_dir = folder / f"full-{list(WRITE_FAULTS).index(fault)}"
    run = warm.start(options(files, output_dir, **SETTINGS), folder / "full.log", TOOLS + WRITE_FAULTS[fault])
    assert run.wait() == 1, run.output
    assert fault in error_of(run), run.output
    assert newest(output_dir) >= 1
    assert not list(output_dir.glob(".checkpoint*"))
    assert_same(finish(warm, files, output_dir), read_result(reference))


def test_unwritable_output_dir_is_known_at_start(warm, files, folder):
    for place in ("/proc/nowhere", files / "reward.py" / "below"):
        run = warm.start(options(files, place), folder / "unwritable.log")
        assert run.wait() == 2, run.output
        assert f"--output_dir={place}" in error_of(run)


def damage(path: Path, how: str, generator: random.Random) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        os.truncate(path, 0)
    else:
        data = bytearray(path.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)


def test_damaged_checkpoints(trainer, folder, reference, capsys):
    """Each file of the newest checkpoint truncated, emptied, deleted or with one bit flipped: the one before is used."""
    generator = random.Random(0)
    faults = 0
    args = arguments_of(trainer, folder / "damaged")
    for name in sorted(path.name for path in (reference / "checkpoint-4").iterdir()):
        for how in ["truncated", "emptied", "deleted"] + 12 * ["flipped"]:
            shutil.rmtree(folder / "damaged", ignore_errors=True)
            for epoch in (3, 4):
                shutil.copytree(reference / f"checkpoint-{epoch}", folder / "damaged" / f"checkpoint-{epoch}")
            damage(folder / "damaged" / "checkpoint-4" / name, how, generator)
            found, tensors, values = trainer.find_checkpoint(args)
            assert found.name == "checkpoint-3", f"{name} {how}"
            assert "checkpoint-4 cannot be read" in capsys.readouterr().out
            faults += 1
            if how != "flipped":
                damage(folder / "damaged" / "checkpoint-3" / name, how, generator)
                with pytest.raises(trainer.InputError, match="none of checkpoint-4, checkpoint-3 can be read"):
                    trainer.find_checkpoint(args)
                faults += 1
    assert faults == 4 * 18


def test_damaged_checkpoints_in_a_run(warm, files, folder, reference):
    """A run falls back and arrives at the same result, with room for one checkpoint only; if none is left it refuses."""
    output_dir = folder / "fallback"
    shutil.copytree(reference, output_dir)
    for epoch in (1, 2):
        shutil.rmtree(output_dir / f"checkpoint-{epoch}")
    damage(output_dir / "checkpoint-4/training_state.json", "truncated", random)
    run = warm.start(
        options(files, output_dir, **SETTINGS | LATEST | {"checkpoints_total_limit": 1, "num_train_epochs": 4}),
        folder / "fallback.log",
    )
    assert run.wait() == 0, run.output
    assert "checkpoint-4 cannot be read" in run.output and "3 epochs are completed" in run.output
    assert_same(read_result(output_dir), read_result(reference))
    damage(output_dir / "checkpoint-4/training_state.json", "flipped", random)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    run = warm.start(options(files, output_dir, **SETTINGS | LATEST), folder / "fallback.log")
    assert run.wait() == 2, run.output
    assert "can be read" in error_of(run)
    assert before == {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["checkpoint-1", ".checkpoint-1.tmp"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_what_is_in_a_checkpoints_way_is_removed(name, kind, trainer, folder, reference):
    output_dir = folder / f"in_the_way-{name}-{kind}"
    elsewhere = output_dir / "elsewhere"
    elsewhere.mkdir(parents=True)
    if kind == "file":
        (output_dir / name).write_text("")
    elif kind == "folder":
        (output_dir / name).mkdir()
    else:
        (output_dir / name).symlink_to(elsewhere if kind == "link" else output_dir / "nowhere")
    args = arguments_of(trainer, output_dir)
    saved = trainer.save_checkpoint(snapshot_of(trainer, reference / "checkpoint-4", 1), args)
    assert trainer.read_checkpoint(saved) and elsewhere.exists() and not saved.is_symlink()
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-1", "elsewhere"]


def test_a_damaged_newer_checkpoint_does_not_count(trainer, folder, reference):
    """With room for one checkpoint, the damaged one from later on must not push out the one just written."""
    output_dir = folder / "count"
    for epoch in (2, 4):
        shutil.copytree(reference / f"checkpoint-{epoch}", output_dir / f"checkpoint-{epoch}")
    damage(output_dir / "checkpoint-4/sha256.json", "truncated", random)
    args = arguments_of(trainer, output_dir, checkpoints_total_limit=1)
    trainer.save_checkpoint(snapshot_of(trainer, reference / "checkpoint-3", 3), args)
    assert trainer.find_checkpoint(args)[0].name == "checkpoint-3"


# ---------------------------------------------------------------------------------------------------------------------
# Poison: what one rank meets stops all
# ---------------------------------------------------------------------------------------------------------------------

# In a reward file: the fault, and what both ranks must say
POISON = {
    "rewards[1] = float('nan')": "returned nan for image 1",
    "rewards[0] = float('inf')": "returned inf for image 0",
    "rewards = rewards[:, None]": "returned shape (4, 1) for 4 images",
    "rewards = ['good'] * len(images)": "Sampling or scoring failed on rank 1",
    "raise KeyError('the judge is out')": "KeyError: 'the judge is out'",
    "sys.exit('enough')": "SystemExit: enough",
    "raise KeyboardInterrupt('no key')": "KeyboardInterrupt: no key",
}


@pytest.mark.parametrize("fault", POISON)
def test_poisoned_reward_on_one_rank(fault, warm, files, folder, reference_2):
    place = list(POISON).index(fault)
    output_dir = folder / f"poison-{place}"
    (folder / f"poison_{place}").mkdir()
    shutil.copytree(files / "images", folder / f"poison_{place}" / "images")
    reward = (files / "reward.py").read_text().replace("import os", "import os, sys", 1)
    bad = f"    rewards = red(images, prompts, metadata)\n    if calls > 8 and os.environ['RANK'] == '1':\n        {fault}\n    return rewards\n"
    (folder / f"poison_{place}" / "reward.py").write_text(f"{reward}\ndef bad(images, prompts, metadata):\n{bad}")
    spec = f"{folder}/poison_{place}/reward.py:bad"
    runs = warm.start_ranks(
        options(files, output_dir, **SETTINGS | {"reward_fn": spec}), folder / f"poison-{place}.log"
    )
    assert [run.wait() for run in runs] == [1, 1]
    causes = [[line for line in run.output.splitlines() if "RuntimeError: " in line][-1][9:] for run in runs]
    assert causes[0] == causes[1]
    assert "failed on rank 1" in causes[0] and POISON[fault] in causes[0], causes[0]
    assert newest(output_dir) > 0
    if place == 0:
        (folder / "poison_0" / "reward.py").write_text(reward.replace("def red", "def bad"))
        result = finish_2(warm, files, output_dir, reward_fn=spec)
        assert_same(result, read_result(reference_2))


def test_gradient_that_is_not_finite_on_one_rank(warm, files, folder, reference_2):
    inject = """
import accelerate, os
backward, calls = accelerate.Accelerator.backward, [0]
def poisoned(self, loss, **kwargs):
    calls[0] += 1
    backward(self, loss * float("nan") if calls[0] == 4 and os.environ["RANK"] == "1" else loss, **kwargs)
accelerate.Accelerator.backward = poisoned
"""
    runs = warm.start_ranks(options(files, folder / "gradient", **SETTINGS), folder / "gradient.log", inject)
    assert [run.wait() for run in runs] == [1, 1], runs[0].output
    for run in runs:
        assert "RuntimeError: the gradient's norm is nan" in error_of(run), run.output
    assert newest(folder / "gradient") == 1
    assert_same(finish_2(warm, files, folder / "gradient"), read_result(reference_2))


def test_failure_of_one_rank_between_the_stages(warm, files, folder, reference_2):
    """Such as running out of memory in the optimizer: the other rank waits for this one's gradient, not to be saved."""
    inject = """
import os, torch
clip, calls = torch.nn.utils.clip_grad_norm_, [0]
def failing(*args, **kwargs):
    calls[0] += 1
    if calls[0] == 4 and os.environ["RANK"] == "1":
        raise MemoryError("no more")
    return clip(*args, **kwargs)
torch.nn.utils.clip_grad_norm_ = failing
"""
    settings = SETTINGS | {"checkpointing_epochs": 10}
    began = time.monotonic()
    runs = warm.start_ranks(options(files, folder / "alone", **settings), folder / "alone.log", inject)
    assert [run.wait() for run in runs] == [1, 1], runs[0].output
    assert time.monotonic() - began < 30 and "MemoryError: no more" in error_of(runs[1])
    assert newest(folder / "alone") == 1
    assert_same(finish_2(warm, files, folder / "alone"), read_result(reference_2))


def test_weights_that_are_not_finite_are_never_saved(warm, files, folder):
    """Adam without epsilon divides 0 by 0: finite gradients, poisoned weights."""
    run = warm.start(options(files, folder / "weights", adam_epsilon=0, updates_per_epoch=1), folder / "weights.log")
    assert run.wait() == 1, run.output
    assert "not finite" in error_of(run)
    assert newest(folder / "weights") == 0
    assert all(
        t.isfinite().all() for t in load_file(folder / "weights/checkpoint-0/training_state.safetensors").values()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files
# ---------------------------------------------------------------------------------------------------------------------


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_pickles_are_never_executed(warm, files, folder, reference):
    """In a checkpoint (with the right checksums), a dataset and a model: refused or ignored, never run."""
    mark = folder / "executed"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb is a dud"
    mark.unlink()

    checkpoint = folder / "hostile" / "checkpoint-4"
    shutil.copytree(reference / "checkpoint-4", checkpoint)
    sums = json.loads((checkpoint / "sha256.json").read_text())
    for name in ("training_state.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"):
        (checkpoint / name).write_bytes(bomb)
        sums[name] = hashlib.sha256(bomb).hexdigest()
    (checkpoint / "sha256.json").write_text(json.dumps(sums))
    data = folder / "hostile-images"
    shutil.copytree(files / "images", data)
    for name in ("train/dataset.pkl", "train/state.pt", "train/1.png"):
        (data / name).write_bytes(bomb)
    model = folder / "hostile-model"
    shutil.copytree(files / "model", model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(bomb)
    runs = {
        "can be read": options(files, folder / "hostile", **SETTINGS | LATEST),
        "1.png": options(files, folder / "hostile-1", train_data_dir=data),
        "--pretrained_model_name_or_path": options(files, folder / "hostile-2", pretrained_model_name_or_path=model),
    }
    runs = {cause: warm.start(argv, folder / f"hostile-{i}.log") for i, (cause, argv) in enumerate(runs.items())}
    for cause, run in runs.items():
        assert run.wait() == 2, run.output
        assert cause in error_of(run), run.output
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Watching
# ---------------------------------------------------------------------------------------------------------------------


def test_watching_changes_nothing(warm, files, folder, reference):
    """No evaluation at all, or one after every epoch: the same LoRA and optimizer, bit for bit."""
    expected = read_result(reference)
    for name, watching in {"blind": {"num_validation_images": 0}, "every": {"validation_epochs": 1}}.items():
        run = warm.start(options(files, folder / name, **SETTINGS | watching), folder / f"{name}.log")
        assert run.wait() == 0, run.output
        seen = read_result(folder / name)
        assert [bool(row.get("heldout_trained")) for row in seen["rows"]] == [name == "every"] * 4
        for part in ("lora", "state"):
            assert all(seen[part][key].equal(expected[part][key]) for key in expected[part])


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


def test_push_and_load_again(warm, hub, files, folder):
    from hub_stand_in import TOKEN, USER

    pushing = {"push_to_hub": True, "hub_model_id": "my-lora", "hub_token": TOKEN, "report_to": None}
    run = warm.start(options(files, folder / "hub", num_train_epochs=1, **pushing), folder / "hub.log")
    assert run.wait() == 0, run.output
    repo = hub.repos[f"{USER}/my-lora"]
    assert {"pytorch_lora_weights.safetensors", "README.md", "metrics.csv", "args.json"} <= set(repo)
    assert not [name for name in repo if name.startswith(("checkpoint", "logs", "."))]
    assert repo["pytorch_lora_weights.safetensors"] == (folder / "hub/pytorch_lora_weights.safetensors").read_bytes()
    assert f"# {USER}/my-lora" in repo["README.md"].decode()

    load = f"""
import sys, torch
from diffusers import StableDiffusionImg2ImgPipeline
states = []
for source in ("{USER}/my-lora", "{folder / "hub"}"):
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained("{files / "model"}")
    pipe.load_lora_weights(source, token="{TOKEN}", cache_dir="{folder}/" + source.replace("/", "-"))
    states.append({{name: tensor for name, tensor in pipe.unet.state_dict().items() if "lora" in name}})
assert len(states[0]) > 0 and all(states[0][k].equal(states[1][k]) for k in states[1])
print("equal tensors:", len(states[0]))
sys.exit(0)
"""
    loaded = warm.start([], folder / "loaded.log", load)
    assert loaded.wait() == 0, loaded.output
    assert "equal tensors: " in loaded.output

    before, count = repo["pytorch_lora_weights.safetensors"], len(hub.commits)
    again = warm.start(options(files, folder / "hub", num_train_epochs=2, **pushing, **LATEST), folder / "hub-2.log")
    assert again.wait() == 0, again.output
    assert len(hub.commits) == count + 1
    assert repo["pytorch_lora_weights.safetensors"] != before
    assert "for 2 epochs" in repo["README.md"].decode()
    for path in [*folder.glob("hub*.log"), *(p for p in (folder / "hub").rglob("*") if p.is_file())]:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_signal_during_the_upload(warm, hub, files, folder):
    from hub_stand_in import TOKEN, USER

    pushing = {"push_to_hub": True, "hub_model_id": "stalled", "hub_token": TOKEN}
    stall = f"""{TOOLS}
import huggingface_hub
at_call(huggingface_hub, "upload_folder", 1, lambda: (os.kill(os.getpid(), {int(signal.SIGTERM)}), time.sleep(60)))
"""
    run = warm.start(options(files, folder / "stalled", num_train_epochs=1, **pushing), folder / "stalled.log", stall)
    assert run.wait(30) == 128 + signal.SIGTERM, run.output
    assert f"try again with\n    hf upload {USER}/stalled {folder / 'stalled'} ." in run.output
    for name in ("pytorch_lora_weights.safetensors", "README.md", "metrics.csv", "checkpoint-1"):
        assert (folder / "stalled" / name).exists()


def test_upload_fails_at_the_end(warm, hub, files, folder):
    """The local result is complete, the command that tries again is printed, and the exit code says so."""
    from hub_stand_in import TOKEN, USER

    pushing = {"push_to_hub": True, "hub_model_id": "failing", "hub_token": TOKEN}
    hub.refuse_commits = True
    try:
        run = warm.start(options(files, folder / "failing", num_train_epochs=1, **pushing), folder / "failing.log")
        assert run.wait() == 1, run.output
    finally:
        hub.refuse_commits = False
    assert "storage quota" in run.output
    assert f"hf upload {USER}/failing {folder / 'failing'} ." in run.output
    assert TOKEN not in run.output
    for name in ("pytorch_lora_weights.safetensors", "README.md", "metrics.csv", "checkpoint-1"):
        assert (folder / "failing" / name).exists()
    again = warm.start(
        options(files, folder / "failing", num_train_epochs=1, **pushing, **LATEST), folder / "again.log"
    )
    assert again.wait() == 0, again.output
    assert "pytorch_lora_weights.safetensors" in hub.repos[f"{USER}/failing"]


@pytest.mark.parametrize(
    "repo, token, cause", [("mine", "hf_wrong", "401"), ("other/taken", None, "403")], ids=["wrong token", "no write access"]
)  # fmt: skip
def test_hub_is_checked_before_the_model_loads(repo, token, cause, warm, hub, files, folder):
    from hub_stand_in import TOKEN

    late = "import diffusers\ndef fail(*args, **kwargs):\n    raise SystemExit(77)\ndiffusers.DiffusionPipeline.from_pretrained = fail"
    pushing = {"push_to_hub": True, "hub_model_id": repo, "hub_token": token or TOKEN}
    run = warm.start(options(files, folder / "checked", **pushing), folder / "checked.log", late)
    assert run.wait() == 2, run.output
    assert f"--hub_model_id={repo}" in error_of(run) and cause in run.output
    assert (token or TOKEN) not in run.output


def test_no_network_is_known_at_start(files, folder):
    """In a process of its own, because huggingface_hub reads `HF_ENDPOINT` when it is imported."""
    arguments = options(files, folder / "offline", push_to_hub=True, hub_token="hf_any")
    run = Launched(
        arguments,
        folder / "offline.log",
        launcher=[sys.executable],
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
    )
    start = time.monotonic()
    assert run.wait() == 2, run.output
    assert time.monotonic() - start < 60
    assert "--push_to_hub: cannot create or reach" in error_of(run)
    assert "hf_any" not in run.output


def test_nothing_asks_the_hub_unless_told(hub):
    """All those runs on local files: the stand-in, their only Hub, was asked for the pushed repositories alone."""
    strange = [
        r
        for r in hub.requests
        if not any(word in r for word in ("my-lora", "failing", "stalled", "taken", "mine", "lfs"))
    ]
    known = ("/api/repos/create", "/api/validate-yaml", "/api/agent-harnesses")
    assert [r for r in strange if not r.endswith(known)] == []
