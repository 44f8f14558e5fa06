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
"""The trainer as users run it: the demo learns, leaves the files it promises, and its LoRA works without our code."""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import train_img2img_ddpo as trainer
from components import picture, tiny_components
from pipeline_img2img_ddpo import StableDiffusionImg2ImgDDPOPipeline


REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "train_img2img_ddpo.py"
DEMO_MODEL = REPOSITORY / "tests" / "demo" / "model"
QUICK = ["--samples_per_epoch=8", "--group_size=4", "--num_train_epochs=1", "--num_validation_images=2"]


def launch(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    """The script through `accelerate launch`, as the README has it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=900)


def metrics(output_dir: Path) -> list[dict]:
    with open(output_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """One demo run, shorter than the default."""
    output_dir = tmp_path_factory.mktemp("demo") / "out"
    result = launch("--demo", f"--output_dir={output_dir}", "--num_train_epochs=12", "--validation_epochs=6")
    assert result.returncode == 0, result.stderr[-3000:]
    (output_dir / "stdout.txt").write_text(result.stdout)
    return output_dir


def test_demo_learns_and_beats_doing_nothing(demo):
    """Promise 10, in a third of the default epochs; three seeds of the whole run are in the README."""
    last = metrics(demo)[-1]
    trained, base, identity = (float(last[f"heldout_{name}"]) for name in ("trained", "base", "identity"))
    assert trained > base + 1 and trained > identity + 1
    assert float(last["heldout_best_of_k_base"]) >= base


def test_demo_starts_each_epoch_at_ratio_one(demo):
    """Promise 1."""
    for row in metrics(demo):
        assert float(row["ratio_deviation_start"]) < 1e-5 < float(row["ratio_deviation_max"])


def test_demo_leaves_the_promised_files(demo):
    names = {path.name for path in demo.iterdir()} - {"stdout.txt"}
    assert names == {
        "pytorch_lora_weights.safetensors", "README.md", "metrics.csv", "reward_curve.png", "samples", "args.json",
        "checkpoint-10", "checkpoint-12",
    }  # fmt: skip
    assert [row["epoch"] for row in metrics(demo)] == [str(epoch) for epoch in range(1, 13)]
    assert sorted(path.name for path in (demo / "samples").iterdir()) == ["epoch-0006.png", "epoch-0012.png"]
    for path in [demo / "reward_curve.png", *(demo / "samples").iterdir()]:
        assert np.asarray(Image.open(path)).std() > 10
    assert json.loads((demo / "args.json").read_text())["reward_fn"] == "psnr:target"
    card = (demo / "README.md").read_text()
    assert "load_lora_weights" in card and "samples/epoch-0012.png" in card and "no better" not in card


def test_header_tells_the_cost(demo):
    header = (demo / "stdout.txt").read_text()
    assert "48 samples: 6 groups of 8" in header and "8 run of 16" in header and "2 in the untrained tail" in header
    announced = float(header.split("cost     about ")[1].split(" UNet")[0].replace(",", ""))
    counted = float(metrics(demo)[-1]["unet_evaluations"]) / 12
    assert abs(counted / announced - 1) < 0.15  # windows are drawn: the announced cost is an expectation


USE_IN_STOCK_DIFFUSERS = """
import sys, torch
from datasets import load_dataset
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
model, images, lora, out = sys.argv[1:]
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
rows = load_dataset("imagefolder", data_dir=images, split="validation")
def psnr(image, target):
    image, target = (torch.from_numpy(__import__("numpy").array(x)).double() / 255 for x in (image, target))
    return (-10 * torch.log10(((image - target) ** 2).mean())).item()
def score():
    made = [
        pipe(r["text"], r["image"], strength=0.5, num_inference_steps=16, guidance_scale=1.0,
             generator=torch.Generator().manual_seed(0)).images[0] for r in rows
    ]
    return sum(psnr(m, r["target"]) for m, r in zip(made, rows)) / len(rows)
base = score()
pipe.load_lora_weights(lora)
trained = score()
assert not [name for name in sys.modules if "ddpo" in name]
open(out, "w").write(f"{base} {trained}")
"""


def test_lora_works_in_stock_diffusers_without_our_files(demo, tmp_path):
    """A fresh process, a folder without our files: the LoRA improves the stock pipeline as the trainer reported."""
    out = tmp_path / "scores.txt"
    result = subprocess.run(
        [sys.executable, "-c", USE_IN_STOCK_DIFFUSERS, DEMO_MODEL, DEMO_MODEL.parent / "images", demo, out],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    base, trained = map(float, out.read_text().split())
    last = metrics(demo)[-1]
    gain = float(last["heldout_trained"]) - float(last["heldout_base"])
    assert trained - base == pytest.approx(gain, abs=0.75)


def test_lora_is_what_was_trained(demo):
    lora = load_file(demo / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in lora.values())
    state = load_file(demo / "checkpoint-12" / "training_state.safetensors")
    trained = sorted(tensor.sum().item() for name, tensor in state.items() if name.startswith("lora."))
    assert trained == sorted(tensor.sum().item() for tensor in lora.values())


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm=reinforce", "--advantage=batch"],
        ["--algorithm=trpo", "--ema_decay=0.9", "--kl_coef=0.1"],
        ["--algorithm=sac", "--guidance_scale=3", "--guidance_rescale=0.5"],
        ["--sde_window=0", "--train_tail", "--advantage=tracker", "--random_flip", "--gradient_checkpointing"],
        ["--prompt=", "--guidance_scale=5", "--reward_fn=psnr:target=0.5,jpeg_compressibility=0.1"],
    ],
    ids=lambda options: options[0],
)
def test_options_run(tmp_path, options):
    trainer_main("--demo", f"--output_dir={tmp_path / 'out'}", *QUICK, *options)
    (row,) = metrics(tmp_path / "out")
    assert float(row["ratio_deviation_start"]) < 1e-5 and float(row["grad_norm"]) > 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert float(row["kl_reference"]) > 0
    if "--prompt=" in options:
        assert float(row["reward_mean/psnr:target"]) > 0 > float(row["reward_mean/jpeg_compressibility"])


def test_half_precision_starts_at_ratio_one(tmp_path):
    """Promise 1 in bfloat16, with other batches in training than in sampling: well within the clip range."""
    result = launch(
        "--demo", f"--output_dir={tmp_path / 'out'}", *QUICK, "--mixed_precision=bf16", "--guidance_scale=3",
        "--train_batch_size=3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "precision bf16" in result.stdout
    (row,) = metrics(tmp_path / "out")
    assert float(row["ratio_deviation_start"]) < 1e-4 and float(row["grad_norm"]) > 0
    lora = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in lora.values())


def trainer_main(*arguments: str) -> None:
    """The script in this process, for what needs no process of its own: imports are most of a short run's time."""
    trainer.main([*arguments, "--mixed_precision=no"])


def test_batch_sizes_change_only_memory_and_speed(tmp_path):
    for name, sizes in {"a": ("8", "16"), "b": ("3", "5")}.items():
        trainer_main(
            "--demo", f"--output_dir={tmp_path / name}", *QUICK,
            f"--sample_batch_size={sizes[0]}", f"--train_batch_size={sizes[1]}",
        )  # fmt: skip
    (a,), (b,) = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    for name in ("reward_mean", "reward_std", "grad_norm", "heldout_base", "heldout_trained"):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4), name
    left, right = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in "ab")
    for name in left:
        assert torch.linalg.norm(left[name] - right[name]) < 1e-2 * torch.linalg.norm(left[name]), name


def test_rewards_have_a_thread_on_the_device_of_a_single_gpu(monkeypatch):
    """accelerate calls it `cuda`, without an index, which `torch.cuda.set_device` refuses."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with trainer.reward_thread(torch.device("cuda")) as executor:
        assert executor.submit(sum, [1, 2]).result() == 3
    assert chosen == [0]


def test_fp16_gradients_are_unscaled_where_a_rank_had_none():
    """The scaler is made by the first scaled loss, which a rank without transitions does not have."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)  # of the other rank, scaled by the initial 65536
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    accelerator = argparse.Namespace(scaler=torch.amp.GradScaler("cpu"), num_processes=1)
    state = trainer.TrainState(
        None, accelerator, {"p": parameter}, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), []
    )
    args = argparse.Namespace(max_grad_norm=1.0)
    norm = trainer.optimizer_step(state, args, argparse.Namespace(accelerator=accelerator))
    assert norm == pytest.approx(3 * 2**0.5 / 65536)


def test_dry_run_leaves_nothing(tmp_path):
    before = set(Path(tempfile.gettempdir()).glob("img2img-ddpo-dry-run-*"))
    result = launch("--demo", "--dry_run", "--output_dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Dry run passed" in result.stdout and not list(tmp_path.iterdir())
    assert set(Path(tempfile.gettempdir()).glob("img2img-ddpo-dry-run-*")) <= before


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six pictures with captions and targets."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "images" / "metadata.jsonl", "w") as file:
        for i in range(6):
            picture(64, color=(40 * i, 200, 100)).save(tmp_path / "images" / f"{i}.png")
            picture(64).save(tmp_path / "images" / f"{i}-clean.png")
            row = {"file_name": f"{i}.png", "target_file_name": f"{i}-clean.png", "text": f"disc {i}", "score": i}
            file.write(json.dumps(row) + "\n")
    return tmp_path / "images"


def load(*arguments: str):
    args = trainer.parse_args(["--resolution=64", "--output_dir=does-not-exist", *arguments])
    return trainer.load_data(args)


def test_image_folder_with_metadata(folder):
    train, held_out = load(f"--train_data_dir={folder}", "--num_validation_images=2")
    assert len(train) == 4 and len(held_out) == 2
    image, prompt, metadata = train.load(1)
    assert image.shape == (3, 64, 64) and prompt == "disc 1" and metadata["score"] == 1
    assert metadata["init_image"] is image and torch.equal(metadata["target"], held_out.load(0)[2]["target"])
    assert torch.equal(train.load(1, flip=True)[0], image.flip(-1))


def test_saved_dataset_and_splits(folder, tmp_path):
    import datasets

    dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([5])).save_to_disk(tmp_path / "two")
    assert [len(part) for part in load(f"--dataset_name={tmp_path / 'one'}", "--num_validation_images=1")] == [5, 1]
    assert [len(part) for part in load(f"--dataset_name={tmp_path / 'two'}", "--max_train_samples=3")] == [3, 1]


def encode(image: Image.Image, mode: str, path: Path) -> None:
    if mode == "16 bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path.with_suffix(".png"))
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
        image.transpose(Image.Transpose.ROTATE_90).save(
            path.with_suffix(".jpg"), exif=exif, quality=100, subsampling=0
        )
    elif mode == "CMYK":
        image.convert("CMYK").save(path.with_suffix(".tiff"))
    elif mode == "RGBA":
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, 8, 8))
        image.putalpha(alpha)
        image.save(path.with_suffix(".png"))
    elif mode == "P":
        image.quantize(256).save(path.with_suffix(".png"))
    else:
        image.convert(mode).save(path.with_suffix(".png"))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "16 bit", "EXIF"])
def test_every_kind_of_image_becomes_correct_rgb(tmp_path, mode):
    original = picture(64)
    original.paste((250, 250, 10), (0, 0, 32, 8))  # not symmetric, so that a rotation shows
    for i in range(2):
        encode(original.copy(), mode, tmp_path / str(i))
    expected = original.convert("L").convert("RGB") if mode in ("L", "16 bit") else original.copy()
    if mode == "RGBA":
        expected.paste((255, 255, 255), (0, 0, 8, 8))
    train, _ = load(f"--train_data_dir={tmp_path}", "--num_validation_images=1")
    image = (train.load(0)[0] * 255).permute(1, 2, 0).numpy()
    assert np.abs(image - np.asarray(expected, dtype=float)).mean() < 3


def test_resizing_keeps_the_middle_of_wide_images(tmp_path):
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    for i in range(2):
        wide.save(tmp_path / f"{i}.png")
    train, held_out = load(f"--train_data_dir={tmp_path}", "--num_validation_images=1", "--center_crop")
    assert torch.equal(train.load(0)[0][2] > 0.5, torch.ones(64, 64, dtype=torch.bool))
    drawn, _ = load(f"--train_data_dir={tmp_path}", "--num_validation_images=1")
    assert torch.equal(drawn.load(0)[0], drawn.load(0)[0]) and not torch.equal(drawn.load(0)[0], train.load(0)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input: one clear error before a model loads
# ---------------------------------------------------------------------------------------------------------------------

REWARDS = """
import torch
def short(images, prompts, metadata): return torch.zeros(len(images) - 1)
def nan(images, prompts, metadata): return [float("nan")] * len(images)
def broken(images, prompts, metadata): return metadata[0]["no such column"]
def leaving(images, prompts, metadata): raise SystemExit(0)
"""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--strength=0.05", "--num_inference_steps=10"], r"--num_inference_steps=10 with --strength=0\.05 .*0 denoising"),
        (["--strength=1.5"], r"--strength=1\.5 must be in \(0, 1\]"),
        (["--eta=0"], r"--eta=0.0 must be in"),
        (["--samples_per_epoch=10"], r"--samples_per_epoch=10 is not divisible by --group_size=8.*16"),
        (["--resolution=100"], r"--resolution=100 must be divisible by 8"),
        (["--sde_window=50"], r"--sde_window=50 is more than the 20 steps"),
        (["--algorithm=reinforce", "--updates_per_epoch=3"], "reinforce is on-policy"),
        (["--image_column=photo"], r"--image_column=photo is not a column of the split train; there are image.*target.*text"),
        (["--caption_column=label"], r"--caption_column=label is not a column of the split train; there are"),
        (["--image_column=text"], r"--image_column=text holds"),
        (["--num_validation_images=6"], r"--num_validation_images=6 would hold out all 6"),
        (["--reward_fn=beauty"], r"--reward_fn=beauty is not known: use .*psnr"),
        (["--reward_fn=missing.py:reward"], r"there is no file missing\.py"),
        (["--reward_fn=rewards.py:absent"], r"has no function 'absent'; it has short, nan, broken, leaving"),
        (["--reward_fn=rewards.py:short"], r"returned shape \(1,\) for 2 images"),
        (["--reward_fn=rewards.py:nan"], r"returned nan for image 0"),
        (["--reward_fn=rewards.py:broken"], r"KeyError: 'no such column'"),
        (["--reward_fn=psnr:clean"], r"no column 'clean'; there are .*target"),
        (["--prompt=a", "--caption_column=text"], "--prompt is one prompt"),
        (["--dataset_name=somewhere"], "two sources of images"),
        (["--train_data_dir=nowhere"], "--train_data_dir=nowhere is not a folder"),
        (["--output_dir=full"], r"--output_dir=full is not empty.*--resume_from_checkpoint=latest"),
        (["--logging_dir=/tmp"], r"--logging_dir=/tmp must be the name of a folder"),
        (["--learning_rate=-1"], r"--learning_rate=-1.0 must be greater than 0"),
        (["--reward_fn=rewards.py:leaving"], r"SystemExit: 0 .*rewards\.py, line"),
        (["--report_to=wandb", "--hub_token=hf_secret"], "--hub_token with --report_to=wandb would be stored"),
        (["--train_data_dir=.", "--output_dir=out"], r"--output_dir=out is in --train_data_dir=\."),
        (["--dataset_name=images", "--output_dir=images/out"], r"is in --dataset_name=images, where"),
        (["--seed=-1"], r"--seed=-1 must not be negative"),
        (["--caption_column=score"], r"--caption_column=score holds .*, not texts"),
        (["--lr_warmup_steps=5"], r"--lr_warmup_steps=5 does nothing with --lr_scheduler=constant"),
        (["--clip_range=0.1", "--algorithm=trpo"], r"--clip_range=0\.1 is ppo's"),
        (["--target_kl=0.1"], r"--target_kl=0\.1 is trpo's: drop it with --algorithm=ppo"),
        (["--guidance_rescale=0.7", "--guidance_scale=1"], r"--guidance_rescale=0\.7 does nothing without guidance"),
        (["--overwrite_output_dir", "--resume_from_checkpoint=latest"], "give one of them"),
        (["--dataset_config_name=small"], r"--dataset_config_name=small needs --dataset_name"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_input_is_refused_before_a_model_loads(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARDS)
    Path("full").mkdir()
    Path("full", "keep.txt").write_text("mine")
    monkeypatch.setattr(trainer, "load_pipeline", lambda *a: pytest.fail("a model was loaded"))
    data = (
        []
        if any(a.startswith(("--train_data_dir", "--dataset_name=images")) for a in arguments)
        else [f"--train_data_dir={folder}"]
    )
    with pytest.raises(trainer.InputError, match=f"(?s){message}"):
        trainer_main(*data, "--num_validation_images=2", "--output_dir=out", *arguments)
    assert Path("full", "keep.txt").exists() and not Path("out").exists()


def test_unreadable_and_missing_images_are_named(folder, tmp_path):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    with pytest.raises(trainer.InputError, match=r"cannot read image .*3\.png"):
        load(f"--train_data_dir={folder}", "--num_validation_images=1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(trainer.InputError, match="no images could be loaded"):
        load(f"--train_data_dir={tmp_path / 'empty'}")


def test_error_on_the_command_line_is_one_line(tmp_path):
    result = launch("--demo", "--image_column=photo", "--output_dir=out", cwd=tmp_path)
    assert result.returncode != 0 and not list(tmp_path.iterdir())
    assert (
        result.stdout.count(
            "error: --image_column=photo is not a column of the split train; there are image, target, text"
        )
        == 1
    )
    assert "InputError" not in result.stderr  # no traceback of ours


def test_too_few_steps_before_the_tail_are_refused(tmp_path):
    with pytest.raises(trainer.InputError, match=r"Only 0 of the 2 executed steps.*--train_tail"):
        trainer_main("--demo", f"--output_dir={tmp_path / 'out'}", "--num_inference_steps=10", "--strength=0.2")
    with pytest.raises(trainer.InputError, match=r"--num_inference_steps=2000: the model knows no more than 1000"):
        trainer_main("--demo", f"--output_dir={tmp_path / 'out'}", "--num_inference_steps=2000")


def test_lora_layers_that_the_unet_lacks_are_named(tmp_path):
    """peft would train those that it finds and say nothing."""
    with pytest.raises(trainer.InputError, match=r"--lora_layers=to_q, to_w: the UNet has no module 'to_w'"):
        trainer_main("--demo", f"--output_dir={tmp_path / 'out'}", "--lora_layers=to_q, to_w")


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"time_cond_proj_dim": 8}], ids=["inpainting", "LCM"])
def test_models_of_another_kind_are_refused(tmp_path, change):
    parts = tiny_components()
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, **change)
    StableDiffusionImg2ImgDDPOPipeline(**parts).save_pretrained(tmp_path / "model")
    with pytest.raises(trainer.InputError, match="is not of the kind of Stable Diffusion 1.x or 2.x"):
        trainer_main(
            "--demo", f"--pretrained_model_name_or_path={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}"
        )


def test_latest_does_not_overwrite_what_is_no_run(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(trainer.InputError, match=r"has README\.md but no checkpoint to continue from"):
        trainer_main("--demo", f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest")
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics of the trainer
# ---------------------------------------------------------------------------------------------------------------------


def test_group_advantages():
    rewards = torch.tensor([[1.0, 3.0, 5.0, 5.0, 0.0, 4.0]], dtype=torch.float64)
    advantages = trainer.compute_advantages(rewards, "group", 2, [trainer.RewardTracker()], [])
    pooled = np.sqrt((1 + 1 + 0 + 0 + 4 + 4) / 6)
    np.testing.assert_allclose(advantages[0], np.array([-1, 1, 0, 0, -2, 2]) / pooled, rtol=1e-5)
    outlier = torch.zeros(1, 64, dtype=torch.float64)
    outlier[0, 0] = 100.0
    assert trainer.compute_advantages(outlier, "group", 64, [trainer.RewardTracker()], []).max() == 5


def test_components_are_normalised_on_their_own():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 1000.0, 1000.0, 0.0]], dtype=torch.float64)
    advantages = trainer.compute_advantages(rewards, "group", 4, [trainer.RewardTracker()] * 2, [])
    np.testing.assert_allclose(advantages.abs(), np.ones((2, 4)), rtol=1e-5)


def test_tracker_is_keyed_by_image_and_prompt():
    tracker = trainer.RewardTracker(min_count=2)
    rewards = torch.tensor([0.0, 2.0, 100.0, 102.0], dtype=torch.float64)
    advantages = tracker.advantages(rewards, ["0|a", "0|a", "1|a", "1|a"])
    np.testing.assert_allclose(advantages, [-1, 1, -1, 1], rtol=1e-4)
    assert tracker.rewards == {"0|a": [0.0, 2.0], "1|a": [100.0, 102.0]}


def test_first_gradients_of_reinforce_and_ppo_agree():
    old = torch.randn(6)
    advantages = torch.randn(6)
    gradients = []
    for loss in (
        lambda new: trainer.ppo_loss(new, old, advantages, 1e-4),
        lambda new: trainer.reinforce_loss(new, advantages),
        lambda new: trainer.trpo_loss(new, old, advantages, torch.zeros(6), 1.0),
    ):
        new = old.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(new).sum(), new)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_ppo_stops_pushing_outside_the_clip_range():
    new = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    trainer.ppo_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.05).sum().backward()
    assert (new.grad == 0).tolist() == [True, False, False, True]


def test_kl_is_exact():
    mean, other = torch.randn(2, 3, 4, 5, 5)
    std = torch.tensor([0.1, 0.5, 2.0]).reshape(3, 1, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std.expand_as(mean)), normal(other, std.expand_as(mean)))
    torch.testing.assert_close(trainer.gaussian_kl(mean, other, std), expected.sum(dim=(1, 2, 3)))


def test_a_run_that_loses_says_so(tmp_path):
    lost = {
        "epoch": 3,
        "heldout_trained": 1.0,
        "heldout_base": 0.5,
        "heldout_identity": 2.0,
        "heldout_best_of_k_base": 3.0,
    }
    assert trainer.verdict([{**lost, "heldout_identity": 0.7}, {"epoch": 4}]) == trainer.verdict([]) == ""
    assert "no better than leaving the input alone" in trainer.verdict([lost])
    assert trainer.verdict([lost]) in trainer.held_out_table([lost], 8)


def test_hopeless_settings_are_told_with_the_remedy(capsys):
    arguments = ["--demo", "--group_size=1", "--clip_range=1e-3", "--output_dir=does-not-exist"]
    args = trainer.parse_args(arguments)
    fine = {
        "reward_std": 1.0, "reward_group_std": 0.1, "clip_fraction_above": 0.2, "clip_fraction_below": 0.2, "ratio_deviation_start": 1e-4,
        "kl_start": 0.0,
    }  # fmt: skip
    trainer.warn_if_hopeless(args, fine)
    assert capsys.readouterr().out == ""
    trainer.warn_if_hopeless(args, {**fine, "reward_group_std": 0.0})
    assert "--group_size=1 has nothing to compare" in capsys.readouterr().out
    trainer.warn_if_hopeless(args, {**fine, "ratio_deviation_start": 2e-3})
    assert "more than the clip range 1.0e-03 before any update" in capsys.readouterr().out
    trainer.warn_if_hopeless(args, {**fine, "clip_fraction_above": 0.8})
    assert "lower --learning_rate" in capsys.readouterr().out
    args.advantage = "batch"  # compares with the other groups, and clips no more than trpo does
    args.algorithm, args.target_kl = "trpo", 0.1
    trainer.warn_if_hopeless(args, {**fine, "kl_start": 0.2})
    assert "more than the --target_kl=0.1 before any update" in capsys.readouterr().out
    trainer.warn_if_hopeless(args, {**fine, "beta": 2048.0})
    assert "lower --learning_rate" in capsys.readouterr().out
    trainer.warn_if_hopeless(args, {**fine, "reward_group_std": 0.0, "clip_fraction_above": 1.0})
    assert capsys.readouterr().out == ""
    trainer.warn_if_hopeless(args, {**fine, "reward_group_std": 0.0, "reward_std": 0.0})
    assert "all rewards are equal" in capsys.readouterr().out


def test_values_reach_the_policy():
    """SAC: the gradient of the value reaches the mean of the step."""
    torch.manual_seed(0)
    critic = trainer.ValueCritic(4, 16)
    torch.nn.init.normal_(critic.conv_out.weight)  # it starts at zero
    mean = torch.randn(2, 4, 8, 8, requires_grad=True)
    values = critic(
        mean + 0.1 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 9]), torch.randn(2, 7, 16)
    )
    trainer.sac_loss(values).sum().backward()
    assert values.shape == (2, 2) and mean.grad.abs().max() > 0


def test_default_clip_range_is_ddpos_at_512_px():
    assert np.sqrt(2 * trainer.TRUST_REGION_NATS) / (4 * 64 * 64) == pytest.approx(1e-4, rel=1e-3)


def test_noise_depends_on_seed_epoch_and_sample_alone():
    draw = [
        torch.randn(3, generator=trainer.seeded(*path))
        for path in [(0, "noise", 1, 2), (0, "noise", 1, 2), (0, "noise", 2, 1)]
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_every_image_is_drawn_once_per_pass(folder):
    train, _ = load(f"--train_data_dir={folder}", "--num_validation_images=2")
    args = trainer.parse_args([f"--train_data_dir={folder}", "--samples_per_epoch=16", "--output_dir=does-not-exist"])
    schedule = trainer.Schedule(torch.arange(20), trainable=18, window=2, eta=1.0)
    rows = [group.row for epoch in range(4) for group in trainer.draw_groups(train, schedule, args, epoch)]
    assert sorted(rows[:4]) == sorted(rows[4:]) == [0, 1, 2, 3]


def test_batches_hold_one_window_and_cover_all_samples():
    groups = [trainer.Group(i, i, False, (i % 2, i % 2 + 1)) for i in range(5)]
    batches = trainer.plan_batches(groups, range(3, 29), group_size=6, batch_size=4)
    seen = []
    for pieces in batches:
        assert len({group.window for group, _, _ in pieces}) == len({count for _, _, count in pieces}) == 1
        assert sum(count for _, _, count in pieces) <= 4
        for group, first, count in pieces:
            assert all(sample // 6 == group.index for sample in range(first, first + count))
            seen += range(first, first + count)
    assert sorted(seen) == list(range(3, 29))


def test_pipeline_is_reused_by_the_trainer():
    """Sampling and training call the same three functions."""
    assert trainer.predict_noise.__module__ == trainer.gaussian_log_prob.__module__ == "pipeline_img2img_ddpo"
    assert trainer.StableDiffusionImg2ImgDDPOPipeline is StableDiffusionImg2ImgDDPOPipeline
