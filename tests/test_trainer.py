"""The trainer as users run it: the demo learns; the update against a PPO written here; options, mistakes, mathematics."""

import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from runs import Run, options
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_img2img_ddpo as trainer
from components import tiny_components


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
    """A part of it, through `accelerate launch`: promises 1 and 10, the files that a run leaves, and the LoRA in stock
    diffusers, without our files. Three seeds of the whole run are in the README."""
    demo = tmp_path / "demo"
    arguments = ["--demo", f"--output_dir={demo}", "--num_train_epochs=6", "--validation_epochs=3"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    output = Run(arguments, tmp_path / "log", launcher=launcher).succeed().output
    metrics = pd.read_csv(demo / "metrics.csv")
    last = metrics.iloc[-1]
    assert last["heldout_trained"] > max(last["heldout_base"], last["heldout_identity"]) + 1
    assert (metrics["ratio_deviation_start"] < 1e-5).all() and (metrics["ratio_deviation"] > 1e-5).all()
    assert list(metrics["epoch"]) == list(range(1, 7)) and (metrics["samples"] == 48 * metrics["epoch"]).all()
    assert "24 to train on, 8 held out" in output and "Traceback" not in output
    assert re.search(r"^epoch 6: .* s, 0:00:00 left", output, re.M) and "does not beat" not in output

    assert {path.name for path in demo.iterdir()} == {
        trainer.LORA, "README.md", "metrics.csv", "reward_curve.png", "samples", "args.json", "checkpoint-5", "checkpoint-6",
    }  # fmt: skip
    assert sorted(path.name for path in (demo / "samples").iterdir()) == ["epoch-0003.png", "epoch-0006.png"]
    for path in [demo / "reward_curve.png", *(demo / "samples").iterdir()]:
        assert np.asarray(Image.open(path)).std() > 10
    card = (demo / "README.md").read_text()
    assert "samples/epoch-0006.png" in card and "| best_of_k_base |" in card
    assert str(Path.home()) not in card and str(demo) not in card and str(trainer.DEMO) not in card

    assert all(tensor.abs().max() > 0 for tensor in load_file(demo / trainer.LORA).values())
    arguments = [trainer.DEMO / "model", trainer.DEMO / "images", demo, tmp_path / "scores"]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=tmp_path)
    base, trained = map(float, (tmp_path / "scores").read_text().split())
    assert trained - base == pytest.approx(last["heldout_trained"] - last["heldout_base"], abs=0.75)


# ---- The update against a PPO written here --------------------------------------------------------------------------
def run_here(monkeypatch, arguments: list[str]) -> SimpleNamespace:
    """Of an epoch in this process: `pipe`, `images`, `transitions`; per update the LoRA's parameters and gradients."""
    seen = SimpleNamespace(updates=[])
    sample_groups, clip_grad_norm_ = trainer.sample_groups, trainer.Accelerator.clip_grad_norm_

    def record_samples(pipe, *args):
        batch = sample_groups(pipe, *args)
        seen.pipe, seen.images, seen.transitions = pipe, batch[0], batch[3]
        return batch

    def record_gradients(self, parameters, *args):
        seen.updates.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return clip_grad_norm_(self, parameters, *args)

    monkeypatch.setattr(trainer, "sample_groups", record_samples)
    monkeypatch.setattr(trainer.Accelerator, "clip_grad_norm_", record_gradients)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back after the test
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    try:
        trainer.main(arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return seen


def own_log_probs(pipe, transitions, guidance_scale=1.0, guidance_rescale=0.0, eta=1.0, **_) -> torch.Tensor:
    """By a UNet row for every action: equations (12) and (16) of DDIM, and torch.distributions."""
    states, actions = transitions.log_probs.shape
    rows = transitions.take(torch.arange(states).repeat_interleave(actions))
    output = text = pipe.unet(rows.latents, rows.timesteps, rows.prompt_embeds[rows.prompt_rows]).sample
    if guidance_scale > 1:
        null = pipe.unet(rows.latents, rows.timesteps, rows.negative_prompt_embeds[rows.prompt_rows]).sample
        output = null + guidance_scale * (text - null)
        scale = text.std(dim=(1, 2, 3), keepdim=True) / output.std(dim=(1, 2, 3), keepdim=True)
        output = guidance_rescale * scale * output + (1 - guidance_rescale) * output
    a, a_prev = (pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1) for t in (rows.timesteps, rows.timesteps - 125))
    x_0, noise = (rows.latents - (1 - a).sqrt() * output) / a.sqrt(), output
    if pipe.scheduler.config.prediction_type == "v_prediction":
        x_0 = a.sqrt() * rows.latents - (1 - a).sqrt() * output
        noise = a.sqrt() * output + (1 - a).sqrt() * rows.latents
    std = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    policy = torch.distributions.Normal(a_prev.sqrt() * x_0 + (1 - a_prev - std**2).sqrt() * noise, std)
    return policy.log_prob(transitions.next_latents.flatten(0, 1)).mean(dim=(1, 2, 3))


POLICIES = {
    "guided": {"guidance_scale": 2.0},
    "rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
    "v_prediction, eta": {"guidance_scale": 1.0, "eta": 0.5},
    "all steps": {"guidance_scale": 2.0, "all_steps": True},
}


@pytest.mark.parametrize("name", POLICIES)
def test_update_is_that_of_ppo(name, files, tmp_path, monkeypatch):
    """Ratio 1 before the first update, and the gradient, also when ratios are clipped; one row per group for K."""
    prediction_type = "v_prediction" if name.startswith("v_prediction") else "epsilon"
    StableDiffusionImg2ImgPipeline(**tiny_components(prediction_type=prediction_type)).save_pretrained(tmp_path / "m")
    settings = {
        "pretrained_model_name_or_path": tmp_path / "m", "num_train_epochs": 1, "samples_per_epoch": 20,
        "sample_batch_size": 20, "train_batch_size": 3, "updates_per_epoch": 1, "num_inner_epochs": 2,
        "learning_rate": 0.05, "reward_weights": 2,
    }  # fmt: skip
    seen = run_here(monkeypatch, options(files, tmp_path / "out", **settings | POLICIES[name]))
    assert seen.transitions.log_probs.shape == ((20 * 2, 1) if name == "all steps" else (5, 4))

    rewards = (seen.images[:, 0].mean(dim=(1, 2)) - seen.images[:, 2].mean(dim=(1, 2)) ** 2).view(5, 4).double()
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = 2 * (deviations / (deviations.square().mean().sqrt() + 1e-6)).flatten()
    advantages = advantages[seen.transitions.samples.flatten()].float()
    lora = [parameter for parameter in seen.pipe.unet.parameters() if parameter.requires_grad]
    clip_range, ratios = math.sqrt(2 * 1.34) / (4 * 8 * 8), []
    for update in seen.updates:
        for parameter, (value, _) in zip(lora, update):
            parameter.data.copy_(value)
        log_probs = own_log_probs(seen.pipe, seen.transitions, **POLICIES[name])
        ratio = (log_probs - seen.transitions.log_probs.flatten()).exp()
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, lora)])
        actual = torch.cat([gradient.flatten() for _, gradient in update])
        assert (actual - expected).norm() < 1e-5 * expected.norm()
        ratios.append((ratio.detach() - 1).abs())
    assert len(ratios) == 2 and ratios[0].max() < 1e-5
    assert 0.1 < (ratios[1] > clip_range).float().mean() < 1, "nothing was clipped, or all"
    metrics = pd.read_csv(tmp_path / "out/metrics.csv").iloc[0]
    assert metrics["ratio_deviation_start"] < 1e-5
    assert metrics["ratio_deviation"] == pytest.approx(ratios[1].max().item(), rel=1e-2)


# ---- Options --------------------------------------------------------------------------------------------------------
def train(files: Path, folder: Path, **overrides) -> tuple[pd.DataFrame, str]:
    """The metrics, and what was printed, of a run."""
    output = Run(options(files, folder, **overrides), folder.with_suffix(".log")).succeed().output
    return pd.read_csv(folder / "metrics.csv"), output


ALGORITHMS = {
    "ppo": {},
    "reinforce": {},
    "trpo": {"guidance_rescale": 0.5, "advantage": "tracker"},
    "sac": {"guidance_scale": 1, "center_crop": True, "eta": 0.7},
}
LEARNING = {
    "samples_per_epoch": 32, "group_size": 8, "sample_batch_size": 32, "learning_rate": 0.02, "num_train_epochs": 10,
    "validation_epochs": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_objective_raises_the_reward(name, files, tmp_path):
    metrics, _ = train(files, tmp_path / "out", algorithm=name, **LEARNING | ALGORITHMS[name])
    last = metrics.iloc[-1]
    assert metrics["reward_mean"][8:].mean() > metrics["reward_mean"][:2].mean() + 0.015
    assert last["heldout_trained"] > last["heldout_base"] + 0.003
    assert (metrics["ratio_deviation_start"] < 1e-5).all()
    assert (metrics["grad_norm"] > 0).all() and (metrics["kl_old"] > 0).all()
    if name == "sac":
        assert last["critic_loss"] < 1  # of rewards in standard deviations
    if name == "ppo":  # and a penalty restrains it
        restrained, _ = train(files, tmp_path / "restrained", kl_coef=10, **LEARNING)
        assert 0 < restrained["kl_reference"].iloc[-1] < 0.3 * last["kl_reference"]


def test_held_out_comparison(files, tmp_path):
    """Of the input, the base and the best of its draws: what stock diffusers makes of the same noise."""
    metrics, _ = train(files, tmp_path / "out", num_train_epochs=1)
    _, held_out = trainer.load_data(trainer.parse_args(options(files, tmp_path / "other")))
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(files / "model", safety_checker=None)
    settings = {"strength": 0.5, "num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "pt"}
    rewards = []
    for index in range(2):
        image, prompt, _ = held_out.load(index)
        noise = [trainer.seeded(0, "evaluation", index, draw) for draw in range(4)]
        images = pipe([prompt] * 4, image[None].repeat(4, 1, 1, 1), generator=noise, **settings).images
        images = torch.cat([image[None], images])
        rewards.append(images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2)) ** 2)
    rewards = torch.stack(rewards)
    assert metrics["heldout_identity"][0] == pytest.approx(rewards[:, 0].mean().item(), abs=1e-5)
    assert metrics["heldout_base"][0] == pytest.approx(rewards[:, 1].mean().item(), abs=1e-5)
    assert metrics["heldout_best_of_k_base"][0] == pytest.approx(rewards[:, 1:].amax(dim=1).mean().item(), abs=1e-5)


def test_plain_ddpo(files, tmp_path):
    """Every step of every sample is evaluated and trained."""
    plain = {"all_steps": True, "train_tail": True, "advantage": "tracker", "gradient_checkpointing": True}
    metrics, _ = train(files, tmp_path / "out", num_train_epochs=1, sample_batch_size=2, train_batch_size=3, **plain)
    row = metrics.iloc[0]
    assert row["unet_evaluations"] == 2 * (8 * 4 + 3 * 8 * 4)
    assert row["ratio_deviation_start"] < 1e-5 and row["kl_old"] > 0 and row["kl_reference"] > 0


def test_half_precision(files, tmp_path):
    metrics, _ = train(files, tmp_path / "out", num_train_epochs=1, mixed_precision="bf16", train_batch_size=3)
    assert metrics["ratio_deviation_start"][0] < 5e-4
    assert metrics["grad_norm"][0] > 0 and math.isfinite(metrics["heldout_trained"][0])
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "out" / trainer.LORA).values())


def test_two_rewards(files, tmp_path):
    names = ["jpeg_incompressibility", "psnr(column='init_image')"]
    rewards = {"reward_fn": names, "reward_weights": [0.5, -1]}
    metrics, output = train(files, tmp_path / "out", num_train_epochs=1, **rewards)
    row = metrics.iloc[0]
    for kind in ("reward_mean", "heldout_trained"):
        expected = 0.5 * row[f"{kind}/{names[0]}"] - row[f"{kind}/{names[1]}"]
        assert row[kind] == pytest.approx(expected, rel=1e-5)
    assert "reward_mean/jpeg_incompressibility " in output
    assert "| trained/psnr(column='init_image') |" in (tmp_path / "out/README.md").read_text()


def test_batch_sizes_change_only_memory_and_speed(files, tmp_path):
    one, other = tmp_path / "small", tmp_path / "large"
    fixed = {"prompt": "", "num_train_epochs": 1}
    small, output = train(files, one, sample_batch_size=1, train_batch_size=1, report_to="none", **fixed)
    large, _ = train(files, other, sample_batch_size=8, train_batch_size=9, report_to="all", **fixed)
    for name in ("reward_mean", "reward_std", "grad_norm", "heldout_base", "heldout_trained"):
        assert small[name][0] == pytest.approx(large[name][0], rel=2e-4), name
    left, right = load_file(one / trainer.LORA), load_file(other / trainer.LORA)
    assert all(torch.linalg.norm(left[name] - right[name]) < 1e-2 * torch.linalg.norm(left[name]) for name in left)
    # the null prompt switches guidance off
    assert "prompts  none; guidance 1.0" in output
    assert not (one / "logs").exists()
    events = EventAccumulator(str(other / "logs/img2img-ddpo"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("held-out")] == [1]
    assert events.Scalars("heldout_trained")[0].value == pytest.approx(large["heldout_trained"][0])


def test_dry_run_leaves_nothing(files, tmp_path):
    before = set(Path(tempfile.gettempdir()).iterdir())
    run = Run(options(files, "out", dry_run=True, report_to="tensorboard"), tmp_path / "log").succeed()
    assert "epoch 1: " in run.output and "epoch 2: " not in run.output and "Dry run passed" in run.output
    assert {path.name for path in tmp_path.iterdir()} == {"log"}
    new = set(Path(tempfile.gettempdir()).iterdir()) - before
    assert not [path for path in new if list(path.rglob("checkpoint-*"))]


# ---- Mistakes: one line, before a model loads -----------------------------------------------------------------------
REWARDS = "def nan(images, prompts, metadata): return [float('nan')] * len(images)\n"
MISTAKES = [
    ("--strength=0.05 --num_inference_steps=10", r"--num_inference_steps=10 \* --strength=0.05 leaves 0 steps"),
    ("--eta=1.5", "--eta=1.5 must be at most 1"),
    ("--eta=0", "--eta=0.0 must be above 0"),
    ("--learning_rate=-1", "--learning_rate=-1.0 must not be negative"),
    ("--samples_per_epoch=10", "--samples_per_epoch=10 must be divisible by --group_size=8.*--samples_per_epoch=16"),
    ("--updates_per_epoch=9", "--updates_per_epoch=9 must be at most --group_size=8"),
    ("--resolution=100", "--resolution=100 must be divisible by 8: try 96"),
    ("--num_train=3", "unrecognized arguments: --num_train=3"),
    ("--algorithm=reinforce --updates_per_epoch=3", "reinforce makes one update"),
    ("--reward_weights 1 2", "--reward_weights=.*give one for each"),
    ("--image_column=photo", "--image_column=photo"),
    ("--caption_column=label", "--caption_column=label"),
    ("--reward_fn psnr psnr", "has two of the name psnr: rename one"),
    ("--output_dir=rewards.py/out", "--output_dir=rewards.py/out: .*rewards.py is no folder that can be written to"),
    ("--reward_fn psnr('clean')", "'clean'.* clean_file_name"),
    ("--reward_fn rewards.py:nan", "reward rewards.py:nan is not finite"),
    ("--dataset_name=somewhere", "give one of them"),
    ("--output_dir=full", "--output_dir=full holds a run: add --resume_from_checkpoint=latest"),
    ("--report_to=wandb", "--report_to=wandb is not installed: pip install wandb"),
    ("--train_data_dir=. --output_dir=out", "--output_dir=out is in the folder of images"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistakes_are_told_before_a_model_loads(files, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    Path("rewards.py").write_text(REWARDS)
    Path("full/checkpoint-1").mkdir(parents=True)
    with pytest.raises(SystemExit) as error:
        trainer.main([f"--train_data_dir={files / 'images'}", "--mixed_precision=no", *arguments.split(" ")])
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
    assert not Path("img2img-ddpo-lora").exists()


def test_what_accelerate_is_set_up_for(files, tmp_path):
    """DeepSpeed and FSDP cannot work here; groups are dealt to processes as accelerate counts them."""
    args = trainer.parse_args(options(files, tmp_path / "out"))
    fine = {"distributed_type": DistributedType.MULTI_GPU, "mixed_precision": "fp16", "device": torch.device("cuda")}
    trainer.check_processes(args, SimpleNamespace(num_processes=2, **fine))
    for processes, change, message in (
        (2, {"distributed_type": DistributedType.DEEPSPEED}, "DeepSpeed and FSDP"),
        (2, {"device": torch.device("cpu")}, "--mixed_precision=fp16 needs a GPU: use --mixed_precision=no"),
        (3, {}, "times 3 process.*--samples_per_epoch=12"),
    ):
        with pytest.raises(SystemExit, match=message):
            trainer.check_processes(args, SimpleNamespace(num_processes=processes, **fine | change))


def test_models_of_another_kind(files, tmp_path):
    parts = tiny_components()
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    StableDiffusionImg2ImgPipeline(**parts).save_pretrained(tmp_path / "inpainting")
    for change, message in (
        ({"pretrained_model_name_or_path": "sd.safetensors"}, r'from_single_file\("sd.safetensors"\).save_pretrained'),
        ({"pretrained_model_name_or_path": tmp_path / "inpainting"}, "SDXL, LCM and inpainting cannot be trained"),
        ({"lora_layers": "to_q, to_w"}, "--lora_layers=to_q, to_w: the UNet has no module 'to_w'"),
        ({"num_inference_steps": 4}, "--num_inference_steps=4 .*--train_tail"),
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
    """First gradients; the KL against torch.distributions; the value's gradient reaches the policy."""
    old, advantages = torch.randn(2, 3, 2)
    new = old.clone().requires_grad_()
    for loss in (
        trainer.reinforce_loss(new, advantages),
        trainer.trpo_loss(new, old, advantages, torch.zeros(3, 1), 1.0),
    ):
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), new)[0], -advantages)
    mean, other = torch.randn(2, 3, 4, 5, 5)
    std, normal = torch.tensor([0.1, 0.5, 2.0]).reshape(3, 1, 1, 1), torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std.expand_as(mean)), normal(other, std.expand_as(mean)))
    torch.testing.assert_close(trainer.gaussian_kl(mean, other, std), expected.sum(dim=(1, 2, 3)))
    assert [trainer.adapt_beta(1.0, kl, 0.1) for kl in (0.16, 0.1, 0.06)] == [2, 1, 0.5]
    assert math.sqrt(2 * trainer.TRUST_REGION_NATS) / (4 * 64 * 64) == pytest.approx(1e-4, rel=1e-3)
    critic, actions = trainer.ValueCritic(4, 16), torch.randn(2, 3, 4, 8, 8, requires_grad=True)
    rest, rows = [torch.zeros(2)] * 3, torch.tensor([0, 0])
    states = (torch.randn(2, 4, 8, 8), actions, torch.tensor([5, 9]), *rest, rows, torch.randn(1, 7, 16), None)
    values = critic(actions, trainer.Transitions(*states))
    loss = trainer.sac_loss(values)
    loss.sum().backward()
    assert values.shape == (2, 2, 3) and torch.equal(loss, -values.amin(dim=0))
    assert actions.grad.flatten(2).norm(dim=2).min() > 0


def test_what_a_run_says_of_itself(capsys):
    """What was lost, and only that; settings that cannot work, with the remedy."""
    row = {"heldout_trained": 1.0, "heldout_base": 0.5, "heldout_identity": 2.0}
    assert trainer.verdict(row).endswith("does not beat the input left alone (2) and beats the base model (0.5).")
    fine = dict.fromkeys(("reward_mean", "ratio_deviation_start", "kl_old"), 0.0)
    fine |= {"epoch": 2, "reward_group_std": 0.1, "unet_evaluations": 1000}
    line = trainer.describe_epoch(fine, 1e-3, 5.0, 112.0)
    assert line == "epoch 2: 5.0 s, 0:01:52 left, reward_mean 0, 1,000 UNet evaluations"
    assert capsys.readouterr().out == ""
    changes = {"reward_group_std": 0.0, "ratio_deviation_start": 2e-3, "kl_old": 223.0}
    for (name, value), told in zip(changes.items(), ("raise --group_size", "rounding", "lower --learning_rate")):
        trainer.describe_epoch(fine | {name: value}, 1e-3, 5.0, 112.0)
        warnings = capsys.readouterr().out
        assert warnings.startswith("Warning: ") and told in warnings and warnings.count("\n") == 1
