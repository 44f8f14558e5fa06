"""
What a run never loses: faults injected into real runs, and what they leave behind.

The yardstick is nearly always the same: after the fault, `--resume_from_checkpoint=latest` must arrive at exactly the
LoRA, optimizer, statistics and metrics of a run that nothing happened to.
"""

import argparse
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import Run, assert_same, newest, options, read_result
from safetensors.torch import load_file

import train_img2img_ddpo as trainer


# The settings with the most state
SETTINGS = {"advantage": "tracker", "ema_decay": 0.5, "checkpoints_total_limit": 4, "random_flip": True}
LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(files, folder) -> Path:
    """Four epochs in one process that nothing happens to."""
    Run(options(files, folder / "reference", **SETTINGS), folder / "reference.log").succeed()
    return folder / "reference"


@pytest.fixture(scope="module")
def reference_2(files, folder) -> Path:
    """The same in two processes, in which each rank leaves its LoRA beside the folder."""
    dump = f"""
if "RANK" in os.environ:
    import accelerate, torch
    def dump(self, end=accelerate.Accelerator.end_training):
        tensors = [p.detach() for group in self._optimizers[0].param_groups for p in group["params"]]
        torch.save(tensors, "{folder}/rank-" + rank)
        end(self)
    accelerate.Accelerator.end_training = dump
"""
    run = Run(options(files, folder / "reference_2", **SETTINGS), folder / "reference_2.log", 2, dump).succeed()
    assert "2 process(es)" in run.output
    return folder / "reference_2"


def finish(files, output_dir: Path, processes: int = 1, **overrides) -> dict:
    """Resumes to the end, which must succeed; the result."""
    arguments = options(files, output_dir, **SETTINGS | LATEST | overrides)
    Run(arguments, output_dir.with_suffix(".resumed"), processes).succeed()
    return read_result(output_dir)


def copy_until(epoch: int, source: Path, target: Path) -> Path:
    """A run as if it had been killed after `epoch` epochs."""
    shutil.copytree(source, target)
    (target / trainer.LORA).unlink()
    for path in target.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > epoch:
            shutil.rmtree(path)
    return target


# ---- Exact resume ---------------------------------------------------------------------------------------------------
def test_resume_is_exact(files, folder, reference):
    """4 epochs == 2, resume, 2; the LoRA file byte for byte."""
    Run(options(files, folder / "halves", **SETTINGS, num_train_epochs=2), folder / "halves.log").succeed()
    assert newest(folder / "halves") == 2
    assert_same(finish(files, folder / "halves"), read_result(reference))


WITH = {
    "sac": {"sample_batch_size": 8, "advantage": "group"},
    "trpo": {"kl_coef": 0.1, "num_inner_epochs": 2, "target_kl": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
}


@pytest.mark.parametrize("algorithm", WITH)
def test_resume_is_exact_with(algorithm, files, folder):
    """The critic, its target and optimizer; TRPO's beta; a learning rate that is changing."""
    settings, whole = {"algorithm": algorithm, "num_train_epochs": 2} | WITH[algorithm], folder / algorithm
    Run(options(files, whole, **SETTINGS | settings), folder / f"{algorithm}.log").succeed()
    halves = copy_until(1, whole, folder / f"{algorithm}-halves")
    assert_same(finish(files, halves, **settings), read_result(whole))


def arguments_of(reference: Path, output_dir: Path, **overrides) -> argparse.Namespace:
    state = torch.load(reference / "checkpoint-4/state.pt", weights_only=True)
    return argparse.Namespace(**state["args"] | {"output_dir": str(output_dir)} | LATEST | overrides)


def test_other_settings_are_refused_by_name(reference):
    changed = {"rank": 4, "algorithm": "trpo", "advantage": "group", "seed": 1, "max_train_samples": 3}
    with pytest.raises(SystemExit) as refusal:
        trainer.read_checkpoint(arguments_of(reference, reference, **changed, num_train_epochs=9, train_batch_size=1))
    assert [f"--{name}={value} (was " in str(refusal.value) for name, value in changed.items()] == [True] * 5
    assert "num_train_epochs" not in str(refusal.value) and "train_batch_size" not in str(refusal.value)
    with pytest.raises(SystemExit, match=r"--num_train_epochs=9 \(was 4\)"):  # the length of a schedule
        trainer.read_checkpoint(arguments_of(reference, reference, lr_scheduler="cosine", num_train_epochs=9))


# ---- Any number of processes ----------------------------------------------------------------------------------------
def distance(one: dict, other: dict) -> float:
    """Relative L2 distance of two LoRAs."""
    one, other = (torch.cat([lora[name].flatten() for name in sorted(lora)]) for lora in (one, other))
    return ((one - other).norm() / other.norm()).item()


def test_two_processes_equal_one(files, folder, reference, reference_2):
    """Rewards and LoRA; the ranks among themselves bit for bit; and two epochs of two ranks continued by one."""
    one, two = read_result(reference), read_result(reference_2)
    numbers = one["metrics"].select_dtypes("number")
    rewards = [name for name in numbers if name.startswith("reward") or name in ("samples", "unet_evaluations")]
    torch.testing.assert_close(*(torch.tensor(x["metrics"][rewards].values) for x in (one, two)), rtol=1e-5, atol=1e-6)
    tracked = [[value for values in x["state"]["values"]["tracker"].values() for value in values] for x in (one, two)]
    torch.testing.assert_close(*map(torch.tensor, tracked), rtol=1e-5, atol=1e-6)
    loras = [load_file(x / trainer.LORA) for x in (reference, reference_2)]
    assert distance(*loras) < 1e-5
    start = load_file(reference / "checkpoint-1" / trainer.LORA)
    assert distance(start, loras[0]) > 1e-3, "hardly anything was trained: the comparison says nothing"
    ranks = [torch.load(folder / f"rank-{rank}") for rank in range(2)]
    assert all(a.equal(b) for a, b in zip(*ranks))
    mixed = copy_until(2, reference_2, folder / "two_then_one")
    finish(files, mixed)
    assert distance(load_file(mixed / trainer.LORA), loras[0]) < 1e-5


# ---- Nothing but the epoch in progress is lost ----------------------------------------------------------------------
KILL = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
FULL = "def full():\n    raise OSError(28, 'No space left on device')\n"
STOPPED = "Stopped. checkpoint-{} is saved: add --resume_from_checkpoint=latest to continue."
# What strikes one and the same run, one after the other: code before the script, exit code, epochs saved, what is said
BAD_LUCK = {
    "killed in the rename": (f"at_call(Path, 'rename', 2, {KILL}, 'save_checkpoint')", -9, 1, ""),
    "disk full": (
        f"import torch\n{FULL}at_call(torch, 'save', 1, full, 'save_checkpoint')", 1, 1,
        "OSError: [Errno 28] No space left on device\n" + STOPPED.format(1),
    ),
    "SIGTERM in training": (
        "import accelerate\nat_call(accelerate.Accelerator, 'backward', 3, lambda: os.kill(os.getpid(), 15), 'update')",
        -15, 2, "",
    ),
    "killed before the old one is deleted": (
        f"import shutil\nat_call(shutil, 'rmtree', 3, {KILL}, 'save_checkpoint')", -9, 3, "",
    ),
    "Ctrl-C in sampling": (
        "import diffusers\nat_call(diffusers.DDIMScheduler, 'step', 2, lambda: os.kill(os.getpid(), 2), 'sample')",
        1, 3, STOPPED.format(3),
    ),
    "killed in the metrics": (f"import pandas\nat_call(pandas.DataFrame, 'to_csv', 1, {KILL}, 'main')", -9, 3, ""),
    "killed in the result": (f"at_call(Path, 'write_text', 1, {KILL}, 'write_model_card')", -9, 4, ""),
}  # fmt: skip


def test_a_run_with_bad_luck(files, folder, reference):
    """With room for one checkpoint: the run arrives where the undisturbed one did."""
    output_dir, limit = folder / "bad_luck", {"checkpoints_total_limit": 1}
    for fault, (inject, code, saved, told) in BAD_LUCK.items():
        log = folder / f"{fault}.log"
        run = Run(options(files, output_dir, **SETTINGS | LATEST | limit), log, inject=inject)
        assert run.wait() == code, f"{fault}: {run.output}"
        tracebacks = run.output.count("Traceback")
        assert (newest(output_dir), tracebacks) == (saved, fault == "disk full"), f"{fault}: {run.output}"
        assert told in run.output and "cannot be read" not in run.output, f"{fault}: {run.output}"
        assert f"epoch {saved + 1}: " not in run.output, f"{fault}: announced before it was saved"
    (output_dir / "checkpoint-0-mine").mkdir()
    assert_same(finish(files, output_dir, **limit), read_result(reference))
    assert {path.name for path in output_dir.glob("checkpoint*")} == {"checkpoint-0-mine", "checkpoint-4"}


def test_signals_to_two_ranks(files, folder, reference_2):
    """To the launcher, to all as Ctrl-C in a terminal, and to rank 0 alone: all ranks leave, by the launcher's hand."""
    output_dir, pids = folder / "signals", folder / "pid-"
    inject = f"Path('{pids}' + rank).write_text(str(os.getpid())) if 'RANK' in os.environ else None"
    for epoch, (number, target) in enumerate([(15, "launcher"), (2, "group"), (9, "rank 0")], start=1):
        run = Run(options(files, output_dir, **SETTINGS | LATEST), folder / f"signal-{number}.log", 2, inject)
        run.wait_for(f"epoch {epoch}: ")
        ranks = [int(Path(f"{pids}{rank}").read_text()) for rank in range(2)]
        struck = time.monotonic()
        victim = {"launcher": run.process.pid, "group": -run.process.pid, "rank 0": ranks[0]}[target]
        os.kill(victim, signal.Signals(number)) if victim > 0 else os.killpg(-victim, number)
        assert run.wait() != 0, run.output
        stats = [Path(f"/proc/{pid}/stat") for pid in ranks]
        while any(stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" for stat in stats):
            assert time.monotonic() - struck < 15, f"{target}: {run.output}"
        assert newest(output_dir) >= epoch
    assert_same(finish(files, output_dir, 2), read_result(reference_2))


# ---- Damage is noticed ----------------------------------------------------------------------------------------------
def damage(path: Path, how: str, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data[: {"flipped": len(data), "truncated": len(data) // 2, "emptied": 0}[how]])


def test_damaged_checkpoints(folder, reference, capsys):
    """The newest truncated, emptied or with one bit flipped: the one before is used, or what is read is right."""
    generator, output_dir, fell_back = random.Random(0), folder / "damaged", 0
    args, intact = arguments_of(reference, output_dir), read_result(reference)["state"]
    for how in ["truncated", "emptied"] + 60 * ["flipped"]:
        shutil.rmtree(output_dir, ignore_errors=True)
        for epoch in (3, 4):
            shutil.copytree(reference / f"checkpoint-{epoch}", output_dir / f"checkpoint-{epoch}")
        damage(output_dir / "checkpoint-4/state.pt", how, generator)
        state = trainer.read_checkpoint(args)
        warned = "checkpoint-4 cannot be read" in capsys.readouterr().out
        assert len(state["values"]["history"]) == (3 if warned else 4)
        if not warned:  # a bit that means nothing, in the archive's padding
            assert_same({name: state[name] for name in intact}, intact)
        fell_back += warned
    assert fell_back > 30
    for epoch in (3, 4):
        damage(output_dir / f"checkpoint-{epoch}/state.pt", "truncated", generator)
    with pytest.raises(SystemExit, match="no checkpoint can be read"):
        trainer.read_checkpoint(args)
    for epoch in (3, 4):
        shutil.rmtree(output_dir / f"checkpoint-{epoch}")
    assert trainer.read_checkpoint(args) is None
    (output_dir / trainer.LORA).touch()  # a result is not overwritten by a new run
    with pytest.raises(SystemExit, match="no checkpoint can be read"):
        trainer.read_checkpoint(args)


def test_a_run_falls_back(files, folder, reference):
    """To the same result, with room for one checkpoint, which the damaged one must not take."""
    output_dir = shutil.copytree(reference, folder / "fallback")
    for epoch in (3, 4):
        damage(output_dir / f"checkpoint-{epoch}/state.pt", "truncated", random)
    assert_same(finish(files, output_dir, checkpoints_total_limit=1), read_result(reference))
    assert "checkpoint-4 cannot be read" in output_dir.with_suffix(".resumed").read_text()


# ---- No poisoned weights --------------------------------------------------------------------------------------------
REWARD = """
calls = 0
def bad(images, prompts, metadata):
    global calls
    calls += 1
    rewards = red(images, prompts, metadata)
    if calls > 3 and __import__("os").environ["RANK"] == "1":
        rewards[1] = float("nan")
    return rewards
"""
BACKWARD = """
import accelerate
def backward(self, loss, original=accelerate.Accelerator.backward, calls=[0]):
    calls[0] += 1
    original(self, loss * float("nan") if calls[0] == 4 and rank == "1" else loss)
accelerate.Accelerator.backward = backward
"""
POISONS = {
    "bad": ("", "reward reward.py:bad is nan for image 5"),
    "red": (BACKWARD, "the gradient's norm is nan: lower"),
}


@pytest.mark.parametrize("reward", POISONS)
def test_poison_on_one_rank_stops_both(reward, files, folder):
    """After the sum over ranks, hence at the same place, and before anything is saved."""
    place, (inject, told) = shutil.copytree(files, folder / reward), POISONS[reward]
    with open(place / "reward.py", "a") as file:
        file.write(REWARD)
    arguments = options(place, place / "out", **SETTINGS | {"reward_fn": f"{place}/reward.py:{reward}"})
    run = Run(arguments, place / "log", 2, inject)
    assert run.wait() == 1 and run.output.count(f"RuntimeError: {told}") == 2, run.output
    assert newest(place / "out") == 1 and not (place / "out" / trainer.LORA).exists()


def test_weights_that_are_not_finite_are_never_saved(files, folder):
    """Adam without epsilon divides 0 by 0: finite gradients, poisoned weights."""
    run = Run(options(files, folder / "weights", adam_epsilon=0, updates_per_epoch=1), folder / "weights.log")
    assert run.wait() == 1 and "the LoRA is not finite: lower --learning_rate" in run.output, run.output
    assert newest(folder / "weights") == 0


# ---- No pickle ------------------------------------------------------------------------------------------------------
class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_pickles_are_never_executed(files, folder, reference):
    """In a checkpoint, a model and a dataset: refused or ignored, never run."""
    mark = folder / "executed"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud"
    mark.unlink()
    hostile = shutil.copytree(files, folder / "hostile")
    (hostile / "out/checkpoint-4").mkdir(parents=True)
    torch.save(Bomb(mark), hostile / "out/checkpoint-4/state.pt")
    with pytest.raises(SystemExit, match="no checkpoint can be read"):
        trainer.read_checkpoint(arguments_of(reference, hostile / "out"))
    for name in ("images/train/state.pt", "images/train/dataset.pkl", "model/unet/diffusion_pytorch_model.bin"):
        (hostile / name).write_bytes(pickle.dumps(Bomb(mark)))
    (hostile / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    args = trainer.parse_args(options(hostile, hostile / "other"))
    with pytest.raises(SystemExit, match="--pretrained_model_name_or_path"):
        trainer.load_pipeline(args, "cpu")
    assert len(trainer.load_data(args)[0]) == 5 and not mark.exists()


# ---- Watching changes nothing ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("watching", [{"num_validation_images": 0}, {"validation_epochs": 1}], ids=["blind", "every"])
def test_watching_changes_nothing(watching, files, folder, reference):
    """No evaluation at all, or one after every epoch: the same LoRA, optimizer and moving average, bit for bit."""
    output_dir = folder / f"watching-{list(watching)[0]}"
    Run(options(files, output_dir, **SETTINGS | watching), output_dir.with_suffix(".log")).succeed()
    seen, expected = read_result(output_dir), read_result(reference)
    assert len(list((output_dir / "samples").glob("*"))) == (4 if "validation_epochs" in watching else 0)
    assert seen["lora"] == expected["lora"]
    assert_same(seen["state"]["parts"], expected["state"]["parts"])


# ---- The Hub --------------------------------------------------------------------------------------------------------
def test_hub(files, folder):
    """A repository of somebody else is refused before the model loads; a failed upload loses nothing; push, push again;
    and no token on disk."""
    from hub_stand_in import TOKEN, USER, Hub

    hub, output_dir = Hub(), folder / "my-lora"
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    pushing = {"push_to_hub": True, "num_train_epochs": 1}
    run = Run(options(files, folder / "x", **pushing, hub_model_id="other/taken"), folder / "hub-0.log", **env)
    assert run.wait() == 1 and "403" in run.output and "trainable parameters" not in run.output, run.output
    hub.refuse_commits = True
    run = Run(options(files, output_dir, **pushing), folder / "hub-1.log", **env)
    assert run.wait() == 1 and "storage quota" in run.output and STOPPED.format(1) in run.output, run.output
    hub.refuse_commits = False
    for epochs in (1, 2):
        arguments = options(files, output_dir, **pushing | LATEST | {"num_train_epochs": epochs})
        assert "Uploaded to" in Run(arguments, folder / f"hub-{epochs + 1}.log", **env).succeed().output
        repo = hub.repos[f"{USER}/my-lora"]
        assert {"README.md", "metrics.csv", "args.json", f"samples/epoch-000{epochs}.png"} <= set(repo)
        assert not [name for name in repo if name.startswith(("checkpoint", "logs", "."))]
        assert repo[trainer.LORA] == (output_dir / trainer.LORA).read_bytes()
        card = repo["README.md"].decode()
        assert f'load_lora_weights("{USER}/my-lora")' in card and f"for {epochs} epochs" in card
        assert str(folder) not in card and str(files) not in card
    for path in [*folder.glob("hub*.log"), *(p for p in output_dir.rglob("*") if p.is_file())]:
        assert TOKEN.encode() not in path.read_bytes(), path
