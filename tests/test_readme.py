"""What the README shows, run as printed."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from runs import SCRIPT

from components import picture


README = (SCRIPT.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(part: str, files: Path) -> str:
    """The only block with `part`, on the tiny model and a CPU."""
    (code,) = [code for code in BLOCKS if part in code]
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(files / "model")).replace('"cuda"', '"cpu"')
    code = code.replace("(512, 512)", "(16, 16)")
    return code.replace("pipeline_img2img_ddpo.py", str(SCRIPT.parent / "pipeline_img2img_ddpo.py"))


def test_replay_loop(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(16).save("input.png")
    space = {}
    exec(block("ddim_transition", files), space)
    torch.testing.assert_close(space["log_prob"], space["out"].log_probs[:, 8], rtol=1e-5, atol=1e-6)
    lora = [p for p in space["pipe"].unet.parameters() if p.requires_grad]
    assert sum(p.grad.abs().sum() for p in lora) > 0 and Path("my-lora/pytorch_lora_weights.safetensors").exists()


def test_own_reward(files, tmp_path):
    (tmp_path / "my_reward.py").write_text(block("my_reward.py:reward", files))
    reward = runpy.run_path(str(tmp_path / "my_reward.py"))["reward"]
    images = torch.rand(2, 3, 8, 8)
    values = reward(images, ["", ""], [{"init_image": image} for image in images])
    expected = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    assert [float(value) for value in values] == pytest.approx(expected.tolist(), abs=1e-6)


def test_flags_exist():
    """Every flag that the README names is one of the script's."""
    known = set(re.findall(r'add\("--(\w+)"', SCRIPT.read_text())) | {"noise_strength"}
    foreign = {"multi_gpu", "num_processes", "pid"}  # of accelerate launch and py-spy
    assert set(re.findall(r"--(\w+)", README.split("## Measured")[0])) - known - foreign == set()
