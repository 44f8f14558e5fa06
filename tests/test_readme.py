"""What the README shows, run as printed."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from components import picture


BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def block(part: str, files: Path) -> str:
    """The only block with `part`, on the tiny model and a CPU."""
    (code,) = [code for code in BLOCKS if part in code]
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(files / "model")).replace('"cuda"', '"cpu"')
    return code.replace("pipeline_img2img_ddpo.py", str(Path(__file__).parent.parent / "pipeline_img2img_ddpo.py"))


def test_replay_loop(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(16).save("input.png")
    space = {}
    exec(block("ddim_transition", files), space)
    torch.testing.assert_close(space["log_prob"], space["out"].log_probs[:, -1], rtol=1e-5, atol=1e-6)
    lora = [p for p in space["pipe"].unet.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in lora) and sum(p.grad.abs().sum() for p in lora) > 0


def test_own_reward(files, tmp_path):
    (tmp_path / "my_reward.py").write_text(block("my_reward.py:reward", files))
    reward = runpy.run_path(str(tmp_path / "my_reward.py"))["reward"]
    images = torch.rand(2, 3, 8, 8)
    values = reward(images, ["", ""], [{"init_image": image} for image in images])
    expected = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    assert [float(value) for value in values] == pytest.approx(expected.tolist(), abs=1e-6)


def test_flags_exist():
    """Every flag that the README names is one of the script's."""
    import train_img2img_ddpo as trainer

    with open(trainer.__file__) as file:
        known = set(re.findall(r'add\("--(\w+)"', file.read())) | {"noise_strength"}
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    foreign = {"multi_gpu", "num_processes"}  # of accelerate launch
    assert set(re.findall(r"--(\w+)", readme)) - known - foreign == set()
