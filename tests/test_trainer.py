"""The trainer as users run it: the demo learns, its LoRA works without our code; options, data, mistakes, mathematics."""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from runs import Run, options
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_img2img_ddpo as trainer
from components import picture, tiny_components


# ---- The demo -------------------------------------------------------------------------------------------------------
STOCK = """
import sys, torch, numpy
from datasets import load_dataset
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
model, images, lora, out = sys.argv[1:]
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
rows = load_dataset("imagefolder", data_dir=images, split="validation")
def score():
    made = [pipe(r["text"], r["image"], strength=0.5, num_inference_steps=16, guidance_scale=1.0, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images[0] for r in rows]
    return numpy.mean([-10 * numpy.log10(((m - numpy.array(r["target"]) / 255) ** 2).mean()) for m, r in zip(made, rows)])
base = score()
pipe.load_lora_weights(lora)
open(out, "w").write(f"{base} {score()}")
assert not [name for name in sys.modules if "ddpo" in name]
"""


def test_demo(tmp_path):
    """A fifth of it, through `accelerate launch`: promises 1 and 10, the files that a run leaves, and the LoRA in stock
    diffusers, without our files. Three seeds of the whole run are in the README."""
    demo = tmp_path / "demo"
    arguments = ["--demo", f"--output_dir={demo}", "--num_train_epochs=8", "--validation_epochs=4"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    output = Run(arguments, tmp_path / "log", launcher=launcher).succeed().output
    metrics = pd.read_csv(demo / "metrics.csv")
    last = metrics.iloc[-1]
    assert last["heldout_trained"] > max(last["heldout_base"], last["heldout_identity"]) + 1
    assert last["heldout_best_of_k_base"] >= last["heldout_base"]
    assert (metrics["ratio_deviation_start"] < 1e-5).all() and (metrics["ratio_deviation"] > 1e-5).all()
    assert list(metrics["epoch"]) == list(range(1, 9)) and (metrics["samples"] == 48 * metrics["epoch"]).all()
    announced = float(output.split("cost     about ")[1].split(" UNet")[0])
    assert last["unet_evaluations"] / 8 == pytest.approx(announced, rel=0.15)  # windows are drawn
    assert "24 to train on, 8 held out" in output and "2 in the untrained tail" in output and "Traceback" not in output
    assert "epoch 8: " in output and " s, 0:00:00 left" in output and "does not beat" not in output

    assert {path.name for path in demo.iterdir()} == {
        trainer.LORA, "README.md", "metrics.csv", "reward_curve.png", "samples", "args.json", "checkpoint-7", "checkpoint-8",
    }  # fmt: skip
    assert sorted(path.name for path in (demo / "samples").iterdir()) == ["epoch-0004.png", "epoch-0008.png"]
    for path in [demo / "reward_curve.png", *(demo / "samples").iterdir()]:
        assert np.asarray(Image.open(path)).std() > 10
    assert json.loads((demo / "args.json").read_text())["reward_fn"] == ["psnr"]
    card = (demo / "README.md").read_text()
    assert "samples/epoch-0008.png" in card and "PSNR in dB" in card and "| base, best of 8 draws |" in card
    assert str(Path.home()) not in card and str(demo) not in card and str(trainer.DEMO) not in card

    lora = load_file(demo / trainer.LORA)
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in lora.values())
    arguments = [trainer.DEMO / "model", trainer.DEMO / "images", demo, tmp_path / "scores"]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=tmp_path)
    base, trained = map(float, (tmp_path / "scores").read_text().split())
    assert trained - base == pytest.approx(last["heldout_trained"] - last["heldout_base"], abs=0.75)


# ---- Options --------------------------------------------------------------------------------------------------------
OPTIONS = {
    "reinforce": {"algorithm": "reinforce", "advantage": "batch", "prompt": "a disc"},
    "trpo": {"algorithm": "trpo", "ema_decay": 0.9, "kl_coef": 0.1, "guidance_rescale": 0.5},
    "sac": {"algorithm": "sac", "guidance_scale": 1, "center_crop": True},
    "plain DDPO": {
        "sde_window": 0, "train_tail": True, "independent_start_noise": True, "advantage": "tracker",
        "gradient_checkpointing": True, "sample_batch_size": 2, "train_batch_size": 3,
    },
    "half precision": {"mixed_precision": "bf16", "train_batch_size": 3},
    "two rewards": {"reward_fn": ["jpeg_incompressibility", "psnr(column='init_image')"], "reward_weights": [0.5, -1]},
}  # fmt: skip


def one_epoch(files: Path, folder: Path, **overrides) -> tuple[pd.Series, str]:
    """The row of metrics, and what was printed, of a run of one epoch."""
    output = Run(options(files, folder, num_train_epochs=1, **overrides), folder.with_suffix(".log")).succeed().output
    return pd.read_csv(folder / "metrics.csv").iloc[0], output


@pytest.mark.parametrize("name", OPTIONS)
def test_options_run(name, files, tmp_path):
    folder = tmp_path / "out"
    row, output = one_epoch(files, folder, **OPTIONS[name])
    assert row["ratio_deviation_start"] < (1e-5 if name != "half precision" else row["ratio_deviation"] + 1e-3)
    assert row["grad_norm"] > 0 and row["kl_old"] > 0 and row["kl_reference"] > 0 and row["heldout_trained"]
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / trainer.LORA).values())
    if name == "two rewards":
        parts = [f"reward_mean/{reward}" for reward in OPTIONS[name]["reward_fn"]]
        assert row["reward_mean"] == pytest.approx(0.5 * row[parts[0]] - row[parts[1]], rel=1e-5)
        held_out = [row[f"heldout_trained/{reward}"] for reward in OPTIONS[name]["reward_fn"]]
        assert row["heldout_trained"] == pytest.approx(0.5 * held_out[0] - held_out[1], rel=1e-5)
        assert f"jpeg_incompressibility {row[parts[0]]:.4g}" in output
        assert "| trained/psnr(column='init_image') |" in (folder / "README.md").read_text()
    if name == "sac":
        assert row["critic_loss"] < 4
    if name == "plain DDPO":
        assert row["unet_evaluations"] == 2 * (8 * 4 + 3 * 8 * 4)  # every step of every sample, both ways


def test_batch_sizes_change_only_memory_and_speed(files, tmp_path):
    one, other = tmp_path / "small", tmp_path / "large"
    a, output = one_epoch(files, one, sample_batch_size=1, train_batch_size=1, prompt="", report_to="none")
    b, _ = one_epoch(files, other, sample_batch_size=8, train_batch_size=9, prompt="", report_to="all")
    for name in ("reward_mean", "reward_std", "grad_norm", "heldout_base", "heldout_trained"):
        assert a[name] == pytest.approx(b[name], rel=2e-4), name
    left, right = load_file(one / trainer.LORA), load_file(other / trainer.LORA)
    assert all(torch.linalg.norm(left[name] - right[name]) < 1e-2 * torch.linalg.norm(left[name]) for name in left)
    # the null prompt switches guidance off
    assert "prompts  none: no --prompt, no --caption_column and no column text; guidance 1.0" in output
    assert not (one / "logs").exists()
    events = EventAccumulator(str(other / "logs/img2img-ddpo"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("held-out")] == [1]
    assert events.Scalars("heldout_trained")[0].value == pytest.approx(b["heldout_trained"])


def test_dry_run_leaves_nothing(files, tmp_path):
    before = set(Path(tempfile.gettempdir()).iterdir())
    run = Run(options(files, "out", dry_run=True, report_to="tensorboard"), tmp_path / "log").succeed()
    assert "epoch 1: " in run.output and "epoch 2: " not in run.output and "Dry run passed." in run.output
    assert {path.name for path in tmp_path.iterdir()} == {"log"}
    new = set(Path(tempfile.gettempdir()).iterdir()) - before
    assert not [path for path in new if list(path.rglob("checkpoint-*"))]


# ---- Data -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine pictures with captions and targets; the first is to be shown rotated."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "images" / "metadata.jsonl", "w") as file:
        for i in range(9):
            image, exif = picture(64, color=(25 * i, 200, 100)), Image.Exif()
            image.paste((250, 250, 10), (0, 0, 32, 8))
            exif[0x0112] = 6 if i == 0 else 1
            image = image.transpose(Image.Transpose.ROTATE_90) if i == 0 else image
            image.save(tmp_path / "images" / f"{i}.png", exif=exif)
            picture(96).resize((96, 64)).save(tmp_path / "images" / f"{i}-clean.png")
            row = {"file_name": f"{i}.png", "target_file_name": f"{i}-clean.png", "text": f"disc {i}", "score": i}
            file.write(json.dumps(row) + "\n")
    return tmp_path / "images"


def load(*arguments: str):
    args = trainer.parse_args(["--resolution=64", "--output_dir=does-not-exist", *map(str, arguments)])
    return args, *trainer.load_data(args)


def test_image_folder_with_metadata(folder):
    args, train, held_out = load("--train_data_dir", folder)
    assert (len(train), len(held_out)) == (6, 3) and args.caption_column == "text" and args.guidance_scale == 5
    image, prompt, metadata = trainer.load_row(args, train, 0)
    upright = picture(64, color=(0, 200, 100))
    upright.paste((250, 250, 10), (0, 0, 32, 8))
    assert prompt == "disc 0" and metadata["score"] == 0 and metadata["init_image"] is image
    np.testing.assert_allclose(image * 255, np.asarray(upright).transpose(2, 0, 1))
    assert metadata["target"].shape == (3, 64, 64)
    flipped = trainer.load_row(args, train, 0, flip=True)
    assert torch.equal(flipped[0], image.flip(-1)) and torch.equal(flipped[2]["target"], metadata["target"].flip(-1))
    drawn = [trainer.load_row(args, train, i, crop=True)[2]["target"] for i in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])  # at a place of the row's own
    args, train, held_out = load("--train_data_dir", folder, "--prompt=", "--num_validation_images=0")
    assert (len(train), len(held_out)) == (9, 0)
    assert args.guidance_scale == 1 and trainer.load_row(args, train, 0)[1] == ""


def test_saved_parquet_and_split_datasets(folder, tmp_path):
    dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    dataset = dataset.add_column("kind", [0, 1, 0] * 3).cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([5])).save_to_disk(tmp_path / "two")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    for source, sizes in (("one", [8, 1]), ("parquet", [8, 1]), ("two", [9, 1])):
        args, *parts = load("--dataset_name", tmp_path / source, "--num_validation_images=1")
        assert [len(part) for part in parts] == sizes
        assert [trainer.load_row(args, parts[0], i)[2]["kind"] for i in range(2)] == ["cat", "dog"]
    assert len(load("--dataset_name", tmp_path / "two", "--max_train_samples=3")[1]) == 3


# ---- Mistakes: one line, before a model loads -----------------------------------------------------------------------
REWARDS = "def nan(images, prompts, metadata): return [float('nan')] * len(images)\n"
MISTAKES = [
    ("--strength=0.05 --num_inference_steps=10", r"--num_inference_steps=10 \* --strength=0.05 leaves 0 steps"),
    ("--strength=1.5", "--strength=1.5 must be at most 1"),
    ("--eta=0", "--eta=0.0 must be above 0"),
    ("--learning_rate=-1", "--learning_rate=-1.0 must be above 0"),
    ("--samples_per_epoch=10", "--samples_per_epoch=10 must be divisible by --group_size=8.*--samples_per_epoch=16"),
    ("--group_size=6 --samples_per_epoch=12", "=8.*Try --sample_batch_size=6 --samples_per_epoch=12"),
    ("--resolution=100", "--resolution=100 must be divisible by 8: try 96"),
    ("--sde_window=50", "leaves 20 steps, and --sde_window=50 needs more"),
    ("--algorithm=reinforce --updates_per_epoch=3", "reinforce makes one update per rollout"),
    ("--reward_weights 1 2", "--reward_weights=.*give one for each"),
    ("--image_column=photo", "--image_column=photo is no datasets.Image; columns are image, target, text"),
    ("--image_column=text", "--image_column=text is no datasets.Image"),
    ("--caption_column=label", "--caption_column=label is no column; there are"),
    ("--num_validation_images=9", "--num_validation_images=9 leaves none of 9 images"),
    ("--reward_fn beauty", "--reward_fn=beauty: ValueError: no such reward: use jpeg_"),
    ("--reward_fn psnr('clean')", "no column 'clean' of pictures: .* names its files as clean_file_name"),
    ("--reward_fn rewards.py:nan ./rewards.py:nan", "has two of one name: rename one"),
    ("--reward_fn rewards.py:nan", "reward rewards.py:nan is nan for image 0"),
    ("--dataset_name=somewhere", "give one of them"),
    ("--output_dir=full", "--output_dir=full holds a run: add --resume_from_checkpoint=latest"),
    ("--report_to=aim", "invalid choice: 'aim'"),
    ("--train_data_dir=. --output_dir=out", "--output_dir=out is in the folder of images"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistakes_are_told_before_a_model_loads(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    Path("rewards.py").write_text(REWARDS)
    Path("full/checkpoint-1").mkdir(parents=True)
    with pytest.raises((SystemExit, RuntimeError, ValueError)) as error:
        trainer.main(["--train_data_dir", str(folder), "--mixed_precision=no", *arguments.split(" ")])
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not Path("img2img-ddpo-lora").exists()


def test_folders_without_pictures_and_models_of_another_kind(files, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no images in .*empty .*--dataset_name for the Hub, parquet"):
        load("--train_data_dir", tmp_path / "empty")
    parts = tiny_components()
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    StableDiffusionImg2ImgPipeline(**parts).save_pretrained(tmp_path / "inpainting")
    for change, message in (
        ({"pretrained_model_name_or_path": tmp_path / "inpainting"}, "SDXL, LCM and inpainting cannot be trained"),
        ({"lora_layers": "to_q, to_w"}, "--lora_layers=to_q, to_w: the UNet has no module 'to_w'"),
        ({"num_inference_steps": 4}, "0 of 2 steps can be trained .*or add --train_tail"),
    ):
        run = Run(options(files, tmp_path / "out", **change), tmp_path / "log")
        assert run.wait() == 1 and re.search(message, run.output), run.output
        assert "Traceback" not in run.output


# ---- The mathematics of the trainer ---------------------------------------------------------------------------------
def test_advantages():
    rewards = torch.tensor([[1.0, 3.0, 5.0, 5.0, 0.0, 4.0], [0.0, 1e3, 0.0, 0.0, 0.0, 0.0]]).double().T
    pooled = np.sqrt([(1 + 1 + 0 + 0 + 4 + 4) / 6, 2 * 500**2 / 6])
    expected = np.array([[-1, 1, 0, 0, -2, 2], [-500, 500, 0, 0, 0, 0]]).T / pooled
    np.testing.assert_allclose(trainer.compute_advantages(rewards, "group", 2), expected, rtol=1e-5)
    expected = (rewards - rewards.mean(0)) / rewards.std(0, unbiased=False)
    torch.testing.assert_close(trainer.compute_advantages(rewards, "batch", 2), expected, rtol=1e-5, atol=1e-8)
    outlier = torch.zeros(64, 1).double()
    outlier[0] = 100.0
    assert trainer.compute_advantages(outlier, "group", 64).max() == 5
    tracker, keys = {}, [(0, False), (1, True)] * 8
    for start in (0.0, 4.0):  # 16 rewards of each key are known the second time
        values = torch.tensor([[start + i % 2 * 100 + i // 2 % 4] for i in range(16)]).double()
        advantages = trainer.compute_advantages(values, "tracker", 8, keys, tracker)
    seen = torch.tensor(tracker[0, False])
    assert len(tracker) == 2 and seen.flatten().tolist() == [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2
    torch.testing.assert_close(advantages[0], (4 - seen.mean(0)) / seen.std(0, unbiased=False), check_dtype=False)


def test_objectives():
    """Equal first gradients; the clip; the KL against torch.distributions; the value's gradient reaches the policy."""
    old, advantages, gradients = torch.randn(6), torch.randn(6), []
    for loss in (
        lambda new: trainer.ppo_loss(new, old, advantages, 1e-4),
        lambda new: trainer.reinforce_loss(new, advantages),
        lambda new: trainer.trpo_loss(new, old, advantages, torch.zeros(6), 1.0),
    ):
        new = old.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(new).sum(), new)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])
    new = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    trainer.ppo_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.05).sum().backward()
    assert (new.grad == 0).tolist() == [True, False, False, True]
    mean, other = torch.randn(2, 3, 4, 5, 5)
    std, normal = torch.tensor([0.1, 0.5, 2.0]).reshape(3, 1, 1, 1), torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std.expand_as(mean)), normal(other, std.expand_as(mean)))
    torch.testing.assert_close(trainer.gaussian_kl(mean, other, std), expected.sum(dim=(1, 2, 3)))
    assert [trainer.adapt_beta(1.0, kl, 0.1) for kl in (0.16, 0.1, 0.06)] == [2, 1, 0.5]
    assert math.sqrt(2 * trainer.TRUST_REGION_NATS) / (4 * 64 * 64) == pytest.approx(1e-4, rel=1e-3)
    critic, action = trainer.ValueCritic(4, 16), torch.randn(2, 4, 8, 8, requires_grad=True)
    blank = torch.zeros(2, 4, 8, 8)
    batch = trainer.Transitions(blank, blank, torch.tensor([5, 9]), blank, blank, torch.randn(2, 7, 16), blank, blank)
    values = critic(action, batch)
    trainer.sac_loss(values).sum().backward()
    assert values.shape == (2, 2) and action.grad.abs().max() > 0


def test_what_a_run_says_of_itself():
    """The comparison that was lost, and only that; settings that cannot work, with the remedy."""
    row = {"heldout_trained": 1.0, "heldout_base": 0.5, "heldout_identity": 2.0}
    assert trainer.verdict(row) == "On held-out images the LoRA (1) does not beat the input left alone (2)."
    assert trainer.verdict(row | {"heldout_identity": 0.7}) == trainer.verdict({}) == ""
    args = trainer.parse_args(["--demo", "--clip_range=1e-3", "--output_dir=does-not-exist"])
    fine = {
        "epoch": 1, "reward_mean": 0.0, "reward_std": 1.0, "reward_group_std": 0.1, "ratio_deviation_start": 1e-4,
        "kl_old": 0.1,
    }  # fmt: skip
    assert trainer.report(args, fine, [3.0, 5.0]) == "epoch 1: reward 0 +- 1, 5.0 s, 0:02:36 left"
    for change, told in (
        ({"reward_group_std": 0.0}, "nothing was learnt: raise --group_size"),
        ({"ratio_deviation_start": 2e-3}, "more than --clip_range=1.0e-03: use --mixed_precision=no"),
        ({"kl_old": 223.0}, "moves the policy by 223 nats per step: lower --learning_rate"),
    ):
        (warning,) = trainer.report(args, fine | change, [3.0]).splitlines()[1:]
        assert warning.startswith("Warning: ") and told in warning


def test_noise_depends_on_seed_and_place_alone():
    one, again, other = (torch.randn(3, generator=trainer.seeded(0, *path)) for path in [(1, 2), (1, 2), (2, 1)])
    assert torch.equal(one, again) and not torch.equal(one, other)
