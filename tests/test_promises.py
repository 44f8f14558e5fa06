"""Faults in real runs, which resume to exactly the LoRA, statistics and metrics of a run that nothing happened to."""

import argparse
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import Run, assert_same, newest, options, read_result
from safetensors.torch import load_file

import train_img2img_ddpo as trainer


# The settings with the most state, and six groups: of two processes each has three, in batches of two
SETTINGS = {
    "advantage": "tracker", "checkpoints_total_limit": 4, "random_flip": True, "samples_per_epoch": 12, "group_size": 2,
}  # fmt: skip
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
    """The same in two processes."""
    run = Run(options(files, folder / "reference_2", **SETTINGS), folder / "reference_2.log", 2).succeed()
    assert "2 process(es)" in run.output
    return folder / "reference_2"


def finish(files, output_dir: Path, processes: int = 1, inject: str = "", **overrides) -> dict:
    """Resumes to the end, which must succeed; the result."""
    arguments = options(files, output_dir, **SETTINGS | LATEST | overrides)
    Run(arguments, output_dir.with_suffix(".resumed"), processes, inject).succeed()
    return read_result(output_dir)


def parse(files, output_dir: Path, **overrides) -> argparse.Namespace:
    return trainer.parse_args(options(files, output_dir, **SETTINGS | LATEST | overrides))


# ---- Exact resume ---------------------------------------------------------------------------------------------------
WITH = {
    "sac": {"sample_batch_size": 8, "advantage": "group"},
    "trpo": {"kl_coef": 0.1, "num_inner_epochs": 2, "target_kl": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
}


@pytest.mark.parametrize("algorithm", WITH)
def test_resume_is_exact_with(algorithm, files, folder):
    """The critic, its target and optimizer; TRPO's beta; a learning rate that is changing."""
    settings, whole = {"algorithm": algorithm, "num_train_epochs": 2} | WITH[algorithm], folder / algorithm
    Run(options(files, whole, **SETTINGS | settings), folder / f"{algorithm}.log").succeed()
    half = {"resume_from_checkpoint": whole / "checkpoint-1"}
    assert_same(finish(files, folder / f"{algorithm}-halves", **settings | half), read_result(whole))


def test_other_settings_are_refused_by_name(files, reference):
    changed = {"rank": 4, "algorithm": "trpo", "advantage": "group", "seed": 1, "max_train_samples": 3}
    with pytest.raises(SystemExit) as refusal:
        trainer.read_checkpoint(parse(files, reference, **changed, num_train_epochs=9, train_batch_size=1), "bf16")
    told = str(refusal.value)
    changed["mixed_precision"] = "bf16"  # as it was in force
    assert all(f"--{name}={value} (was " in told for name, value in changed.items()) and "another --output_dir" in told
    assert "num_train_epochs" not in told and "train_batch_size" not in told and "schedule" not in told
    length = r"--num_train_epochs=9 \(was 4\).* cosine schedule depends on the number of epochs"
    with pytest.raises(SystemExit, match=length):
        trainer.read_checkpoint(parse(files, reference, lr_scheduler="cosine", num_train_epochs=9), "no")


def test_other_words_for_the_same_place_are_no_other_settings(files, folder, reference, monkeypatch):
    """Of pictures and model. A checkpoint's path means that checkpoint, though `--output_dir` has one of that name."""
    monkeypatch.chdir(files.parent)
    same = {"train_data_dir": f"./{files.name}/images/", "pretrained_model_name_or_path": f"{files}/images/../model"}
    assert len(trainer.read_checkpoint(parse(files, reference, **same), "no")["history"]) == 4
    copied = shutil.copytree(reference / "checkpoint-2", folder / "elsewhere/checkpoint-3")
    for path in (copied, os.path.relpath(copied), f"{copied}/"):
        same["resume_from_checkpoint"] = path
        assert len(trainer.read_checkpoint(parse(files, reference, **same), "no")["history"]) == 2
    same["resume_from_checkpoint"] = "checkpoint-3"  # without its folder it is the run's own
    assert len(trainer.read_checkpoint(parse(files, reference, **same), "no")["history"]) == 3


def test_a_run_that_is_rolled_back(files, folder, reference):
    """Is evaluated at its end, where metrics.csv ends. A reward that scores otherwise than before is a warning."""
    place = shutil.copytree(files, folder / "edited")
    (place / "reward.py").write_text((files / "reward.py").read_text().replace("blue ** 2", "blue"))
    output_dir = shutil.copytree(reference, folder / "rolled_back")
    back = SETTINGS | {"num_train_epochs": 3, "reward_fn": f"{place}/reward.py:red"}
    run = Run(options(files, output_dir, **back, resume_from_checkpoint="checkpoint-3"), folder / "back.log").succeed()
    assert "held-out inputs have other rewards than before" in run.output
    metrics = read_result(output_dir)["metrics"]
    assert metrics["epoch"] == [1, 2, 3] and metrics["heldout_trained"][2] > -1
    card = (output_dir / "README.md").read_text()
    assert "| reward.py red |" in card and "3 epochs of\n12 samples" in card and "samples/epoch-0003.png" in card
    assert (output_dir / "samples/epoch-0003.png").exists()


# ---- Any number of processes ----------------------------------------------------------------------------------------
def distance(one: dict, other: dict) -> float:
    """Relative L2 distance of two LoRAs."""
    one, other = (torch.cat([lora[name].flatten() for name in sorted(lora)]) for lora in (one, other))
    return ((one - other).norm() / other.norm()).item()


def test_two_processes_equal_one(files, folder, reference, reference_2):
    """Rewards and LoRA; and two epochs of two ranks continued by one."""
    one, two = read_result(reference), read_result(reference_2)
    for name in ("samples", "unet_evaluations", "reward_mean", "reward_std", "reward_group_std", "info/blue"):
        assert one["metrics"][name] == pytest.approx(two["metrics"][name], rel=1e-5), name
    torch.testing.assert_close(one["state"]["tracker"], two["state"]["tracker"], rtol=1e-5, atol=1e-6)
    loras = [load_file(x / trainer.LORA) for x in (reference, reference_2)]
    assert distance(*loras) < 1e-5
    start = load_file(reference / "checkpoint-1" / trainer.LORA)
    assert distance(start, loras[0]) > 1e-3, "hardly anything was trained: the comparison says nothing"
    mixed = finish(files, folder / "two_then_one", resume_from_checkpoint=reference_2 / "checkpoint-2")
    assert distance(mixed["lora"], loras[0]) < 1e-5


# ---- Nothing but the epoch in progress is lost ----------------------------------------------------------------------
KILL = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
TRAINER = "import train_img2img_ddpo as trainer\n"
FULL = "def full():\n    raise OSError(28, 'No space left on device')\n"
INTERRUPTED = "Interrupted. Run the same command with --resume_from_checkpoint=latest to continue."
# What strikes one and the same run, one after the other: code before the script, exit code, epochs saved, what is said
BAD_LUCK = {
    "killed in the rename": (f"at_call(Path, 'rename', 2, {KILL})", -9, 1, ""),
    "disk full": (
        f"import torch\n{FULL}at_call(torch, 'save', 1, full)", 1, 1, "OSError: [Errno 28] No space left on device",
    ),
    "killed before the old one is deleted": (f"import shutil\nat_call(shutil, 'rmtree', 3, {KILL})", -9, 2, ""),
    "killed in the result": (f"{TRAINER}at_call(trainer, 'write_reward_curve', 1, {KILL})", -9, 4, ""),
}  # fmt: skip


def test_a_run_with_bad_luck(files, folder, reference):
    """With room for one checkpoint: the run arrives where the undisturbed one did."""
    output_dir, limit = folder / "bad_luck", {"checkpoints_total_limit": 1}
    run = Run(options(files, output_dir, **SETTINGS | limit), folder / "early.log", launcher=[])
    run.wait_for("Evaluating the base model")
    os.kill(run.processes[0].pid, signal.SIGINT)  # Ctrl-C, before anything is saved
    assert run.wait() == 1 and run.output.strip().endswith(INTERRUPTED) and "Traceback" not in run.output, run.output
    for fault, (inject, code, saved, told) in BAD_LUCK.items():
        log = folder / f"{fault}.log"
        run = Run(options(files, output_dir, **SETTINGS | LATEST | limit), log, inject=inject)
        assert run.wait() == code, f"{fault}: {run.output}"
        assert newest(output_dir) == saved, f"{fault}: {run.output}"
        assert ("Traceback" in run.output) == (told != ""), f"{fault}: {run.output}"
        assert told in run.output and "cannot be read" not in run.output, f"{fault}: {run.output}"
        assert f"epoch {saved + 1}: " not in run.output, f"{fault}: announced before it was saved"
    (output_dir / "checkpoint-0-mine").mkdir()
    assert_same(finish(files, output_dir, **limit), read_result(reference))
    assert {path.name for path in output_dir.glob("checkpoint*")} == {"checkpoint-0-mine", "checkpoint-4"}


# ---- Damage is noticed ----------------------------------------------------------------------------------------------
def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def test_damaged_checkpoints(files, folder, reference, capsys):
    """The newest has one bit flipped, which `torch.load` does not notice: the one before is used, else none."""
    args = parse(files, folder / "damaged")
    for epoch in (3, 4):
        shutil.copytree(reference / f"checkpoint-{epoch}", folder / f"damaged/checkpoint-{epoch}")
    newest_state = folder / "damaged/checkpoint-4/state.pt"
    flipped = bytearray(newest_state.read_bytes())
    tensor = next(iter(read_result(reference)["state"]["lora"].values()))
    flipped[flipped.index(tensor.numpy().tobytes())] ^= 1
    newest_state.write_bytes(flipped)
    assert len(trainer.read_checkpoint(args, "no")["history"]) == 3
    assert "checkpoint-4 cannot be read" in capsys.readouterr().out
    truncate(folder / "damaged/checkpoint-3/state.pt")
    with pytest.raises(SystemExit, match="no checkpoint can be read"):
        trainer.read_checkpoint(args, "no")


def test_a_run_falls_back_to_an_older_version(files, folder, reference):
    """Of two damaged checkpoints to one that lacks flags: they have their defaults. 4 epochs == 2, resume, 2. A changed
    number of images is a warning. There is room for one checkpoint, which a damaged one must not take."""
    output_dir = shutil.copytree(reference, folder / "fallback")
    for epoch in (3, 4):
        truncate(output_dir / f"checkpoint-{epoch}/state.pt")
    path = output_dir / "checkpoint-2/state.pt"
    state = torch.load(path, weights_only=True)
    for name in ("finish_steps", "guidance_rescale", "kl_coef", "updates_per_epoch", "reward_weights"):
        del state["args"][name]
    torch.save(state | {"num_images": 9}, path)
    assert_same(finish(files, output_dir, checkpoints_total_limit=1), read_result(reference))
    output = output_dir.with_suffix(".resumed").read_text()
    assert "checkpoint-4 cannot be read" in output and "checkpoint-3 cannot be read" in output
    assert "Warning: there are 5 training images, there were 9." in output and "held-out inputs" not in output


# ---- No poisoned weights --------------------------------------------------------------------------------------------
REWARD = """
calls = 0
def bad(images, prompts, metadata):
    global calls
    calls += 1
    rewards, _ = red(images, prompts, metadata)
    if calls > 4 and __import__("os").environ["RANK"] == "1":
        rewards[1] = float("nan")
    return rewards
"""
BACKWARD = """
import accelerate
def backward(self, loss, original=accelerate.Accelerator.backward, calls=[0]):
    calls[0] += 1
    original(self, loss * float("nan") if (rank, calls[0]) == WHEN else loss)
accelerate.Accelerator.backward = backward
"""
# fp16's scaler, on the CPU
SCALER = """
import accelerate, torch
def start(self, *args, original=accelerate.Accelerator.__init__, **kwargs):
    original(self, *args, **kwargs)
    self.scaler = torch.amp.GradScaler("cpu")
accelerate.Accelerator.__init__ = start
accelerate.Accelerator.unscale_gradients = lambda self, _=None: self.scaler.unscale_(self._optimizers[0].optimizer)
"""
LOSS = f"""{TRAINER}loss = trainer.ppo_loss
trainer.ppo_loss = lambda *args: loss(*args) * (float("nan") if rank == "1" else 1)
"""
# The reward, code before the script, what is said and by how many
POISONS = {
    "reward": ("bad", "", "reward reward.py bad must return 4 finite numbers", 1, 1),
    "gradient": ("red", BACKWARD + "WHEN = ('1', 4)", "the gradient's norm is nan, lower --learning_rate", 2, 1),
    "loss under fp16": ("red", SCALER + LOSS, "the gradient's norm is nan", 2, 0),
}


@pytest.mark.parametrize("name", POISONS)
def test_poison_on_one_rank_stops_both(name, files, folder):
    """Before anything is saved."""
    place, (reward, inject, told, count, saved) = shutil.copytree(files, folder / name), POISONS[name]
    with open(place / "reward.py", "a") as file:
        file.write(REWARD)
    arguments = options(place, place / "out", **SETTINGS | {"reward_fn": f"{place}/reward.py:{reward}"})
    run = Run(arguments, place / "log", 2, inject)
    assert run.wait() == 1 and run.output.count(told) == count, run.output
    assert newest(place / "out") == saved and not (place / "out" / trainer.LORA).exists()


def test_weights_that_are_not_finite_are_never_saved(files, folder):
    """Adam without epsilon divides 0 by 0: finite gradients, poisoned weights."""
    run = Run(options(files, folder / "weights", adam_epsilon=0, updates_per_epoch=1), folder / "weights.log")
    assert run.wait() == 1 and "the LoRA is not finite, lower --learning_rate" in run.output, run.output
    assert newest(folder / "weights") == 0


def test_steps_that_a_scaler_skips(files, folder):
    """A step skipped is counted, nothing adapts on it, and the lower scale is resumed."""
    settings = {"algorithm": "trpo", "updates_per_epoch": 1, "num_train_epochs": 2, "lr_scheduler": "cosine"}
    whole = folder / "scaler"
    inject = SCALER + BACKWARD + "WHEN = ('0', 1)"
    Run(options(files, whole, **SETTINGS | settings), folder / "scaler.log", inject=inject).succeed()
    result = read_result(whole)
    metrics = result["metrics"]
    assert metrics["skipped_updates"] == [1, 0]
    assert metrics["kl_after_update"][0] == 0 and metrics["kl_after_update"][1] > 0
    assert metrics["beta"] == [1, 0.5]
    assert metrics["learning_rate"] == pytest.approx([1e-3, 5e-4])
    assert result["state"]["scaler"]["scale"] == 2.0**15
    settings["resume_from_checkpoint"] = whole / "checkpoint-1"
    assert_same(finish(files, folder / "scaler-halves", inject=SCALER, **settings), result)


# ---- No pickle ------------------------------------------------------------------------------------------------------
class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_pickles_are_never_executed(files, folder):
    """In a checkpoint, a model and a dataset: refused or ignored, never run."""
    mark = folder / "executed"
    hostile = shutil.copytree(files, folder / "hostile")
    (hostile / "out/checkpoint-4").mkdir(parents=True)
    torch.save(Bomb(mark), hostile / "out/checkpoint-4/state.pt")
    with pytest.raises(SystemExit, match="no checkpoint can be read"):
        trainer.read_checkpoint(parse(files, hostile / "out"), "no")
    for name in ("images/train/state.pt", "images/train/dataset.pkl", "model/unet/diffusion_pytorch_model.bin"):
        (hostile / name).write_bytes(pickle.dumps(Bomb(mark)))
    (hostile / "model/unet/diffusion_pytorch_model.safetensors").unlink()
    args = trainer.parse_args(options(hostile, hostile / "other"))
    cpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    with pytest.raises(SystemExit, match="--pretrained_model_name_or_path"):
        trainer.load_pipeline(args, cpu)
    assert len(trainer.load_data(args)[0]) == 5 and not mark.exists()


# ---- Watching changes nothing ---------------------------------------------------------------------------------------
def test_watching_changes_nothing(files, folder, reference):
    """No evaluation, or one after every other epoch: bit for bit the same. Nor does accelerate's environment."""
    output_dir = folder / "blind"
    env = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    arguments = options(files, output_dir, **SETTINGS, num_validation_images=0)
    output = Run(arguments, folder / "blind.log", **env).succeed().output
    assert "5 for training, 0 held out" in output and "too few images to tell" in output
    assert "so the result was not evaluated" in output
    blind, watched = read_result(output_dir), read_result(reference)
    assert "samples/" not in (output_dir / "README.md").read_text()
    assert not (output_dir / "samples").exists() and len(list((reference / "samples").iterdir())) == 3
    assert len([name for name in watched["metrics"] if name.startswith("heldout")]) == 4
    del blind["state"]["history"], watched["state"]["history"], watched["state"]["heldout_input"]
    watched["metrics"] = {name: watched["metrics"][name] for name in blind["metrics"]}
    assert_same(blind, watched)


# ---- The Hub --------------------------------------------------------------------------------------------------------
def test_hub(files, folder):
    """A repository of somebody else is refused before the model loads. A failed upload loses nothing, and the next one
    goes to the same repository. No secret is on disk, and no path of this machine is uploaded. A terminal that lacks the
    prompt's characters and a prompt that looks like a formula end nothing."""
    from hub_stand_in import TOKEN, USER, Hub

    hub, output_dir = Hub(), folder / "my-lora"
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    env |= {"PYTHONIOENCODING": "ascii", "no_proxy": "127.0.0.1"}
    server = hub.endpoint.replace("//", "//me:PASSWORD@") + "/score?api_key=QUERY"
    pushing = {"push_to_hub": True, "num_train_epochs": 1, "prompt": "$x_{$ 画", "report_to": "tensorboard"}
    pushing |= {"reward_fn": [f"{files}/reward.py:red", server], "reward_weights": [1, 1]}
    taken = options(files, folder / "x", **pushing, hub_model_id="other/taken")
    run = Run(taken, folder / "hub-0.log", launcher=[], **env)
    assert run.wait() == 1 and "403" in run.output and "Loading" not in run.output, run.output
    hub.refuse_commits = True
    run = Run(options(files, output_dir, **pushing), folder / "hub-1.log", launcher=[], **env)
    assert run.wait() == 1 and "storage quota" in run.output, run.output
    hub.refuse_commits = False
    arguments = options(files, output_dir, **pushing | LATEST | {"num_train_epochs": 2})
    assert "Uploaded to" in Run(arguments, folder / "hub-2.log", launcher=[], **env).succeed().output
    repo = hub.repos[f"{USER}/my-lora"]
    names = {trainer.LORA, "README.md", "metrics.csv", "args.json", "reward_curve.png", "samples/epoch-0002.png"}
    assert set(repo) == names
    assert (output_dir / "logs").exists() and repo[trainer.LORA] == (output_dir / trainer.LORA).read_bytes()
    card = repo["README.md"].decode()
    assert f'load_lora_weights("{USER}/my-lora")' in card and "2 epochs of\n8 samples" in card and "$x_{$ 画" in card
    for secret in (TOKEN, "PASSWORD", "QUERY"):
        for path in [*folder.glob("hub*.log"), *(p for p in output_dir.rglob("*") if p.is_file())]:
            assert secret.encode() not in path.read_bytes(), path
    for name, content in repo.items():
        assert not [path for path in (folder, files, Path.home()) if str(path).encode() in content], name
