"""The trainer as users run it: the demo learns; the update against a PPO written here; options, mistakes, mathematics."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from runs import Run, options
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_img2img_ddpo as trainer
from components import tiny_components


# ---- The demo -------------------------------------------------------------------------------------------------------
def test_demo(tmp_path):
    """A part of it, through `accelerate launch`: promises 1 and 10, and the files that a run leaves."""
    demo = tmp_path / "demo"
    arguments = ["--demo", f"--output_dir={demo}", "--num_train_epochs=6", "--validation_epochs=3"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    output = Run(arguments, tmp_path / "log", launcher=launcher).succeed().output
    metrics = pd.read_csv(demo / "metrics.csv")
    last = metrics.iloc[-1]
    assert last["heldout_trained"] > max(last["heldout_base"], last["heldout_input"]) + 1
    assert (metrics["ratio_deviation_start"] < 1e-5).all() and (metrics["ratio_deviation"] > 1e-5).all()
    assert list(metrics["epoch"]) == list(range(1, 7)) and (metrics["samples"] == 16 * metrics["epoch"]).all()
    assert "24 for training, 8 held out" in output and "Traceback" not in output and "too few" not in output
    assert re.search(r"^epoch 6: .* s, 0:00:00 left", output, re.M) and "better than the base model (+" in output
    assert {line.split()[0] for line in output.splitlines()[-4:]} == {"LoRA:", "Grid:", "Curve:", "Card:"}

    assert {path.name for path in demo.iterdir()} == {
        trainer.LORA, "README.md", "metrics.csv", "reward_curve.png", "samples", "args.json", "checkpoint-5", "checkpoint-6",
    }  # fmt: skip
    assert sorted(path.name for path in (demo / "samples").iterdir()) == [f"epoch-000{n}.png" for n in (0, 3, 6)]
    for path in [demo / "reward_curve.png", *(demo / "samples").iterdir()]:
        assert np.asarray(Image.open(path)).std() > 10
    card = (demo / "README.md").read_text()
    assert "samples/epoch-0006.png" in card and "| base model, best of 8 |" in card and "better than the" in card
    assert str(Path.home()) not in card and str(demo) not in card and str(trainer.DEMO) not in card


# ---- The update against a PPO written here --------------------------------------------------------------------------
def run_here(monkeypatch, arguments: list[str]) -> SimpleNamespace:
    """What a run in this process does: the last call of `sample_groups` with its images and transitions, the LoRA's
    parameters and gradients of each update, the norms after clipping, and whether training was under autocast."""
    seen = SimpleNamespace(updates=[], norms=[], autocast=set())
    sample_groups, clip_grad_norm_ = trainer.sample_groups, trainer.Accelerator.clip_grad_norm_
    predict_noise = trainer.predict_noise

    def record_samples(*call):
        batch = sample_groups(*call)
        seen.call, seen.pipe, seen.images, seen.transitions = call, call[0], batch[0], batch[3]
        return batch

    def record_gradients(self, parameters, *args):
        seen.updates.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        norm = clip_grad_norm_(self, parameters, *args)
        seen.norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return norm

    def record_autocast(*args):
        seen.autocast.add(torch.is_autocast_enabled("cpu"))
        return predict_noise(*args)

    monkeypatch.setattr(trainer, "sample_groups", record_samples)
    monkeypatch.setattr(trainer, "predict_noise", record_autocast)
    monkeypatch.setattr(trainer.Accelerator, "clip_grad_norm_", record_gradients)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, PartialState):  # of the process, put back after the test
        monkeypatch.setattr(state, "_shared_state", {})
    trainer.main(arguments)
    return seen


def own_policy(pipe, rows, guidance_scale=1.0, guidance_rescale=0.0, eta=1.0, **_) -> torch.distributions.Normal:
    """The distribution of the next latents, by equations (12) and (16) of DDIM."""
    output = text = pipe.unet(rows.latents, rows.timesteps, rows.prompt_embeds).sample
    if guidance_scale > 1:
        null = pipe.unet(rows.latents, rows.timesteps, rows.negative_prompt_embeds).sample
        output = null + guidance_scale * (text - null)
        scale = text.std(dim=(1, 2, 3), keepdim=True) / output.std(dim=(1, 2, 3), keepdim=True)
        output = guidance_rescale * scale * output + (1 - guidance_rescale) * output
    before = (rows.timesteps - 125).clamp(min=0)
    a, a_prev = (pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1) for t in (rows.timesteps, before))
    x_0, noise = (rows.latents - (1 - a).sqrt() * output) / a.sqrt(), output
    if pipe.scheduler.config.prediction_type == "v_prediction":
        x_0 = a.sqrt() * rows.latents - (1 - a).sqrt() * output
        noise = a.sqrt() * output + (1 - a).sqrt() * rows.latents
    std = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    return torch.distributions.Normal(a_prev.sqrt() * x_0 + (1 - a_prev - std**2).sqrt() * noise, std)


POLICIES = {
    "guided": {"guidance_scale": 2.0},
    "rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
    "v_prediction, eta": {"guidance_scale": 1.0, "eta": 0.5},
    "plain DDPO": {"guidance_scale": 2.0, "all_steps": True, "train_tail": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", POLICIES)
def test_update_is_that_of_ppo(name, files, tmp_path, monkeypatch):
    """In the second of two epochs, where the policy that samples is not the base model any more."""
    prediction_type = "v_prediction" if name.startswith("v_prediction") else "epsilon"
    StableDiffusionImg2ImgPipeline(**tiny_components(prediction_type=prediction_type)).save_pretrained(tmp_path / "m")
    settings = {
        "pretrained_model_name_or_path": tmp_path / "m", "num_train_epochs": 2, "samples_per_epoch": 20,
        "sample_batch_size": 20, "train_batch_size": 3, "updates_per_epoch": 2, "num_inner_epochs": 2,
        "learning_rate": 0.05, "reward_weights": 2, "max_grad_norm": 1e-3,
    }  # fmt: skip
    seen = run_here(monkeypatch, options(files, tmp_path / "out", **settings | POLICIES[name]))
    transitions = seen.transitions
    states, actions = transitions.log_probs.shape
    assert (states, actions) == ((20 * 4, 1) if name == "plain DDPO" else (5, 4))
    assert seen.pipe.unet.is_gradient_checkpointing == (name == "plain DDPO")

    rewards = (seen.images[:, 0].mean(dim=(1, 2)) - seen.images[:, 2].mean(dim=(1, 2)) ** 2).view(5, 4).double()
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = 2 * (deviations / deviations.square().mean().sqrt()).flatten()
    sample_ids = transitions.sample_ids.flatten()
    advantages = advantages[sample_ids].float()
    rows = transitions.take(torch.arange(states).repeat_interleave(actions))
    lora = [parameter for parameter in seen.pipe.unet.parameters() if parameter.requires_grad]
    first = transitions.take(torch.arange(4))
    trained = own_policy(seen.pipe, first, **POLICIES[name])
    seen.pipe.unet.disable_adapters()
    base = own_policy(seen.pipe, first, **POLICIES[name])
    seen.pipe.unet.enable_adapters()

    clip_range, ratios = math.sqrt(2 * 1.34) / (4 * 8 * 8), []
    passes = [torch.randperm(4, generator=trainer.seeded(0, "update", 1, number)) for number in (0, 1)]
    parts = [members for order in passes for members in order.chunk(2)]
    for update, members in zip(seen.updates[4:], parts, strict=True):
        for parameter, (value, _) in zip(lora, update):
            parameter.data.copy_(value)
        new = own_policy(seen.pipe, rows, **POLICIES[name])
        mask = torch.isin(sample_ids % 4, members)
        log_probs = new.log_prob(transitions.actions.flatten(0, 1)).mean(dim=(1, 2, 3))
        ratio = (log_probs - transitions.log_probs.flatten()).exp()[mask]
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        loss = -torch.minimum(ratio * advantages[mask], clipped * advantages[mask]).mean()
        expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, lora)])
        actual = torch.cat([gradient.flatten() for _, gradient in update])
        assert (actual - expected).norm() < 1e-5 * expected.norm()
        ratios.append((ratio.detach() - 1).abs())
    assert seen.norms == pytest.approx([1e-3] * 8, rel=1e-2)
    assert ratios[0].max() < 1e-5
    assert 0.1 < (ratios[3] > clip_range).float().mean() < 1, "nothing was clipped, or all"
    metrics = pd.read_csv(tmp_path / "out/metrics.csv").iloc[1]
    assert metrics["ratio_deviation_start"] < 1e-5
    if name == "plain DDPO":  # of two rows for guidance, in two epochs with two passes each
        assert metrics["unet_evaluations"] == 2 * 2 * 20 * (4 + 3 * 4 * 2)
    assert metrics["ratio_deviation"] == pytest.approx(torch.cat(ratios).max().item(), rel=1e-2)
    old = torch.distributions.Normal(rows.means, new.stddev)
    for kind, pair, chosen in (("kl", (old, new), mask), ("kl_reference", (base, trained), ...)):
        expected = torch.distributions.kl_divergence(*pair).sum(dim=(1, 2, 3))[chosen].mean().item()
        assert metrics[kind] == pytest.approx(expected, rel=1e-3)


# ---- Options --------------------------------------------------------------------------------------------------------
def train(files: Path, folder: Path, **overrides) -> tuple[pd.DataFrame, str]:
    """The metrics, and what was printed, of a run."""
    output = Run(options(files, folder, **overrides), folder.with_suffix(".log")).succeed().output
    return pd.read_csv(folder / "metrics.csv"), output


ALGORITHMS = {
    "ppo": {},
    "reinforce": {"learning_rate": 0.03, "samples_per_epoch": 64, "num_train_epochs": 8, "validation_epochs": 8},
    "trpo": {"guidance_rescale": 0.5, "target_kl": 1, "num_inner_epochs": 2},
    "sac": {"guidance_scale": 1, "center_crop": True, "eta": 0.7},
}
LEARNING = {
    "samples_per_epoch": 32, "group_size": 8, "sample_batch_size": 32, "learning_rate": 0.02, "num_train_epochs": 10,
    "validation_epochs": 10,
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_objective_raises_the_reward(name, files, tmp_path):
    """Of held-out images."""
    metrics, _ = train(files, tmp_path / "out", algorithm=name, **LEARNING | ALGORITHMS[name])
    last = metrics.iloc[-1]
    assert last["heldout_trained"] > last["heldout_base"] + 0.003
    assert (metrics["ratio_deviation_start"] < 1e-5).all()
    assert (metrics["grad_norm"] > 0).all() and last["kl_reference"] > 0
    assert (metrics["kl"] > 1e-6).all() == (name != "reinforce")  # in an epoch's last update, which is its first one
    if name == "sac":
        assert last["critic_loss"] < 1  # of rewards in standard deviations
    if name == "ppo":  # and a penalty restrains it
        restrained, _ = train(files, tmp_path / "restrained", kl_coef=10, **LEARNING)
        assert 0 < restrained["kl_reference"].iloc[-1] < 0.3 * last["kl_reference"]


def test_held_out_comparison(files, tmp_path):
    """Stock diffusers makes the same of the same noise, and takes all tensors of a LoRA of any layers."""
    layers = "to_k,to_q,to_v,to_out.0,proj_in,proj_out,ff.net.2,conv_in,conv1,conv2"
    metrics, _ = train(files, tmp_path / "out", num_train_epochs=1, learning_rate=0.01, lora_layers=layers)
    _, held_out = trainer.load_data(trainer.parse_args(options(files, tmp_path / "other")))
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(files / "model", safety_checker=None)
    settings = {"strength": 0.5, "num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "pt"}

    def score() -> torch.Tensor:  # (images, input and draws)
        rewards = []
        for index in range(2):
            image, prompt, _ = held_out.load(index)
            noise = [trainer.seeded(0, "evaluation", index, draw) for draw in range(4)]
            images = pipe([prompt] * 4, image[None].repeat(4, 1, 1, 1), generator=noise, **settings).images
            images = torch.cat([image[None], images])
            rewards.append(images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2)) ** 2)
        return torch.stack(rewards)

    base = score()
    pipe.load_lora_weights(tmp_path / "out")
    taken = [name for name, _ in pipe.unet.named_parameters() if "lora_" in name]
    assert len(taken) == len(load_file(tmp_path / "out" / trainer.LORA)) > 2 * layers.count(",")
    expected = {"input": base[:, 0], "base": base[:, 1], "best_of_k_base": base[:, 1:].amax(dim=1)}
    expected["trained"] = score()[:, 1]
    for kind, rewards in expected.items():
        assert metrics[f"heldout_{kind}"][0] == pytest.approx(rewards.mean().item(), abs=1e-5), kind
    assert abs(metrics["heldout_trained"][0] - metrics["heldout_base"][0]) > 1e-4


def test_half_precision(files, tmp_path, monkeypatch):
    settings = {"num_train_epochs": 1, "mixed_precision": "bf16", "train_batch_size": 3}
    assert run_here(monkeypatch, options(files, tmp_path / "out", **settings)).autocast == {True}
    row = pd.read_csv(tmp_path / "out/metrics.csv").iloc[0]
    assert row["ratio_deviation_start"] < 5e-4 and row["grad_norm"] > 0 and math.isfinite(row["heldout_trained"])
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "out" / trainer.LORA).values())


@pytest.mark.parametrize("target_kl, updates", [(1e-9, 1), (1e9, 4)])
def test_trpo_stops_an_epoch_whose_kl_is_above_the_target(target_kl, updates, files, tmp_path, monkeypatch):
    settings = {"algorithm": "trpo", "num_train_epochs": 1, "num_inner_epochs": 2, "target_kl": target_kl}
    assert len(run_here(monkeypatch, options(files, tmp_path / "out", **settings)).updates) == updates


@pytest.mark.parametrize("finish_steps", [0, 1, 3])
def test_finish(finish_steps):
    """As many steps after the branch as are asked for, if so many are left. The branch is never in the tail."""
    args = trainer.parse_args(["--demo", f"--finish_steps={finish_steps}"])
    plans = [trainer.plan_steps(20, 18, epoch, args) for epoch in range(200)]
    assert {branch for _, _, (branch,) in plans} == set(range(18))
    for steps, etas, (branch,) in plans:
        left = 19 - branch
        assert steps[: branch + 1] == list(range(branch + 1)) and steps == sorted(set(steps)) and steps[-1] < 20
        assert len(steps) - branch - 1 == min(finish_steps or left, left)
        assert etas == [0] * branch + [args.eta] + [0] * (len(steps) - branch - 1)


def test_noise(files, tmp_path, monkeypatch):
    """Start noise and actions are new in each epoch and for each sample, and repeatable."""
    pipe, *group, epoch, pipe_kwargs, args = run_here(monkeypatch, options(files, tmp_path, num_train_epochs=1)).call
    made = [trainer.sample_groups(pipe, *group, epoch, pipe_kwargs, args)[3] for epoch in (5, 6, 6)]
    steps = torch.stack([part.actions - part.means[:, None] for part in made]).flatten(2)  # (epochs, groups * K, -1)
    starts = [part.latents for part in made]
    assert torch.equal(steps[1], steps[2]) and torch.equal(starts[1], starts[2])
    similarity = torch.corrcoef(steps[:2].flatten(0, -2)).fill_diagonal_(0)
    assert similarity.abs().max() < 0.3
    assert not torch.allclose(starts[0], starts[1], atol=0.1)


def test_two_rewards(files, tmp_path):
    specs = ["jpeg_incompressibility", "psnr(column='init_image')"]
    names = ["jpeg_incompressibility", "psnr column init_image"]  # mlflow takes no quotes and no brackets
    rewards = {"reward_fn": specs, "reward_weights": [0.5, -1]}
    metrics, _ = train(files, tmp_path / "out", num_train_epochs=1, **rewards)
    row = metrics.iloc[0]
    for kind in ("reward_mean", "heldout_trained"):
        expected = 0.5 * row[f"{kind}/{names[0]}"] - row[f"{kind}/{names[1]}"]
        assert row[kind] == pytest.approx(expected, rel=1e-4)
    assert not [name for name in metrics.columns if re.search("[^-A-Za-z0-9_./ ]", name)]
    assert list(metrics.columns[:4]) == ["epoch", "samples", "reward_mean", f"reward_mean/{names[0]}"]
    assert "| psnr column init_image |" in (tmp_path / "out/README.md").read_text()


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
    assert "prompts  none, guidance 1\n" in output
    assert "guidance_scale=1.0,\n" in (one / "README.md").read_text()
    assert not (one / "logs").exists()
    events = EventAccumulator(str(other / "logs/img2img-ddpo"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("held-out")] == [1]
    assert events.Scalars("heldout_trained")[0].value == pytest.approx(large["heldout_trained"][0], rel=1e-5)


def test_dry_run_leaves_nothing(files, tmp_path):
    run = Run(options(files, "out", dry_run=True, report_to="tensorboard"), tmp_path / "log").succeed()
    assert "epoch 1: " in run.output and "epoch 2: " not in run.output and "Dry run passed" in run.output
    assert {path.name for path in tmp_path.iterdir()} == {"log"}


# ---- Mistakes: one line, before a model loads -----------------------------------------------------------------------
FOREIGN = ["README.md", "args.json", "metrics.csv"]
REWARDS = "def nan(images, prompts, metadata): return [float('nan')] * len(images)\n"
MISTAKES = [
    ("--strength=0.05 --num_inference_steps=10", r"--num_inference_steps=10 \* --strength=0.05 leaves 0 steps"),
    ("--eta=1.5", "--eta=1.5 must be at most 1"),
    ("--learning_rate=-1", "--learning_rate=-1.0 is too small"),
    ("--rank=0", "--rank=0 is too small"),
    ("--samples_per_epoch=10", "--samples_per_epoch=10 must be divisible by --group_size=8.*--samples_per_epoch=16"),
    ("--updates_per_epoch=9", "--updates_per_epoch=9 must be at most --group_size=8"),
    ("--group_size=1", "--group_size=1 leaves nothing to compare a sample with.*--all_steps"),
    ("--resolution=100", "--resolution=100 must be divisible by 8. Try 96"),
    ("--num_train=3", "unrecognized arguments: --num_train=3"),
    ("--algorithm=reinforce --updates_per_epoch=3", "reinforce makes one update"),
    ("--reward_weights 1 2", "--reward_weights=.*give one for each"),
    ("--image_column=photo", "--image_column=photo"),
    ("--reward_fn psnr psnr", "has two rewards of the name psnr. Rename one"),
    ("--reward_fn psnr('clean')", "'clean'.* clean_file_name"),
    ("--reward_fn rewards.py:nan", "reward rewards.py nan must return 2 finite numbers"),
    ("--dataset_name=somewhere", "--train_data_dir or with --dataset_name"),
    ("--output_dir=full", "--output_dir=full holds a run. Add --resume_from_checkpoint=latest"),
    ("--report_to=wandb", "--report_to: invalid choice: .wandb. .*tensorboard"),
    ("--output_dir=rewards.py/out", "--output_dir=rewards.py/out: .*/rewards.py is not a folder that can be written"),
    ("--train_data_dir=. --output_dir=out", "--output_dir=out is inside the folder of images"),
    *[(f"--output_dir={name}", f"this script did not write: .*{name}") for name in FOREIGN],
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistakes_are_told_before_a_model_loads(files, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    Path("rewards.py").write_text(REWARDS)
    Path("full").mkdir()
    Path("full/args.json").write_text('{"reward_fn": []}')
    for name in FOREIGN:  # somebody else's
        Path(name).mkdir()
        Path(name, name).write_text('{"name": "mine"}')
    with pytest.raises(SystemExit) as error:
        trainer.main([f"--train_data_dir={files / 'images'}", "--mixed_precision=no", *arguments.split(" ")])
    assert re.search(message, f"{error.value} {capsys.readouterr().err}".strip())
    assert not Path("img2img-ddpo-lora").exists()


def test_what_accelerate_is_set_up_for(files, tmp_path):
    args = trainer.parse_args(options(files, tmp_path / "out"))
    setup = {"num_processes": 3, "distributed_type": "MULTI_GPU", "mixed_precision": "fp16"}
    told = {"cpu": "fp16 needs a GPU. Use --mixed_precision=no", "cuda": "times 3 process.*--samples_per_epoch=12"}
    for device, message in told.items():
        with pytest.raises(SystemExit, match=message):
            trainer.check_processes(args, SimpleNamespace(device=torch.device(device), **setup))


def test_models_of_another_kind(files, tmp_path):
    parts = tiny_components()
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
    StableDiffusionImg2ImgPipeline(**parts).save_pretrained(tmp_path / "inpainting")
    for change, message in (
        ({"pretrained_model_name_or_path": "sd.safetensors"}, r"=sd.safetensors: .*Convert a single file with"),
        ({"pretrained_model_name_or_path": tmp_path / "inpainting"}, "SDXL, LCM and inpainting are not"),
        ({"pretrained_model_name_or_path": "nobody/nothing"}, "=nobody/nothing: .*Check the name and the connection"),
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
    """Their first gradients, TRPO's beta, and DDPO's clip range at 512 px."""
    old, advantages = torch.randn(2, 3, 2)
    new = old.clone().requires_grad_()
    for loss in (
        trainer.reinforce_loss(new, advantages),
        trainer.trpo_loss(new, old, advantages, torch.zeros(3, 1), 1.0),
    ):
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), new)[0], -advantages)
    assert [trainer.adapt_beta(1.0, kl, 0.1) for kl in (0.16, 0.1, 0.06)] == [2, 1, 0.5]
    assert math.sqrt(2 * trainer.TRUST_REGION_NATS) / (4 * 64 * 64) == pytest.approx(1e-4, rel=1e-3)


def test_what_a_run_says_of_itself(capsys):
    """Settings that cannot work, with the remedy."""
    fine = dict.fromkeys(("reward_mean", "ratio_deviation_start", "kl"), 0.0)
    fine |= {"epoch": 2, "reward_group_std": 0.1, "unet_evaluations": 1000}
    args = trainer.parse_args(["--demo", "--lr=0.5", "--num_train_epochs=12", "--validation_epochs=4"])
    assert args.learning_rate == 0.5
    line = trainer.describe_epoch(fine, 1e-3, 5.0, 20.0, args)
    assert line == "epoch 2: 5.0 s, 0:01:50 left, reward 0, 1,000 UNet evaluations"
    assert capsys.readouterr().out == ""
    changes = {"reward_group_std": 0.0, "ratio_deviation_start": 2e-3, "kl": 223.0}
    for (name, value), told in zip(changes.items(), ("raise --strength", "rounding", "lower --learning_rate")):
        trainer.describe_epoch(fine | {name: value}, 1e-3, 5.0, 20.0, args)
        warnings = capsys.readouterr().out
        assert warnings.startswith("Warning: ") and told in warnings and warnings.count("\n") == 1
    assert trainer.parse_args(["--demo", "--algorithm=sac"]).kl_coef == 1e-3
    assert trainer.parse_args(["--demo", "--group_size=1", "--all_steps"]).advantage == "batch"


def test_verdict():
    base, noise = torch.arange(16.0).double()[:, None], torch.tensor([1.0, -1.0] * 8)[:, None]
    evaluated = {"input": (None, base + 0.2 + noise), "base": (None, base)}
    weight = torch.tensor([1.0]).double()
    assert "was not evaluated" in trainer.format_verdict(evaluated, weight)
    for change, sign, words in (
        (-1, 1, "worse than the input (-1.2, standard error 0.23, higher on 0 of 16 images)"),
        (-1, -1, "better than the base model (+1, standard error 0.026, higher on 16 of 16 images)"),
        (0.01, 1, "no clear difference from the base model (+0.01, standard error 0.026, higher on 8 of 16 images)"),
    ):
        evaluated["trained"] = None, base + change + 0.1 * noise
        assert words in trainer.format_verdict(evaluated, sign * weight)
    words = trainer.format_verdict(dict.fromkeys(("input", "base", "trained"), (None, base[:1])), weight)
    assert words.count("no clear difference") == 2 and "nan" not in words


def test_pictures(tmp_path, monkeypatch):
    """Each row of the grid shows what its label says, and texts are never formulas."""
    figures, Figure = [], trainer.Figure
    monkeypatch.setattr(trainer, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    row = None, "$x_{$", {"init_image": None, "$y_{$": torch.full((3, 8, 8), 0.8)}
    data = type("Data", (list,), {"load": list.__getitem__})([row, row])
    shades = {"input": 0.0, "base": 0.2, "best_of_k_base": 0.4, "trained": 0.6}
    evaluated = {kind: (torch.full((2, 3, 8, 8), x), torch.full((2, 1), x).double()) for kind, x in shades.items()}
    weights = torch.tensor([10.0]).double()
    trainer.write_grid(evaluated, weights, data, "$z_{$", 4, tmp_path / "samples/grid.png")
    seen = {}
    for axis in figures[0].axes[::2]:  # the first of two columns
        seen[axis.get_ylabel().replace("\n", " ")] = axis.images[0].get_array().max() / 255, axis.get_title()
    assert seen == {
        "input mean 0.00": (0.0, "0.00"),
        "$y_{$": (0.8, ""),
        "base model mean 2.00": (0.2, "2.00"),
        "base model, best of 4 mean 4.00": (0.4, "4.00"),
        "with the LoRA mean 6.00": (0.6, "6.00"),
    }
