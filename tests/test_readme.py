"""What README.md and tests/README.md show, run as printed on tiny models."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.utils import convert_state_dict_to_kohya
from runs import SCRIPT
from safetensors.torch import load_file, save_file
from test_rewards import models  # noqa: F401

import train_img2img_ddpo as trainer
from components import picture


README, DETAILS = ((SCRIPT.parent / name).read_text() for name in ("README.md", "tests/README.md"))
BLOCKS = re.findall(r"```(?:python|bash)\n(.*?)```", README + DETAILS, re.DOTALL)
COMMAND = shlex.split(next(block for block in BLOCKS if "my_pictures" in block).replace("\\\n", ""))[2:]


def run(part: str, blocks: list[str] = BLOCKS, files: Path = Path()) -> dict:
    """The names that the only block with `part` leaves, on the tiny model and a CPU."""
    (code,) = [code for code in blocks if part in code]
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(files / "model")).replace('"cuda"', '"cpu"')
    code = code.replace("(512, 512)", "(16, 16)").replace('"pipeline_', f'"{SCRIPT.parent}/pipeline_')
    space = {}
    exec(code, space)
    return space


def test_pipeline_and_result(files, tmp_path, monkeypatch):
    """A LoRA is trained by the pipeline alone, and used as README.md and the model card say."""
    monkeypatch.chdir(tmp_path)
    picture(16).save("input.png")
    Path("my_pictures").mkdir()
    args = trainer.parse_args(COMMAND)
    space = run("ddim_transition", files=files)
    torch.testing.assert_close(space["log_probs"], space["out"].log_probs[:, 8], rtol=1e-5, atol=1e-6)
    file = Path("my-lora") / trainer.LORA
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(file).items() if "lora_B" in name)

    space = run("set_adapters", files=files)
    argv = [*COMMAND, "--cache_dir=/private/a", "--cache_dir", "/private/b"]
    card = trainer.format_model_card("my-lora", "", "aesthetic", 50, "a caption", 5.0, argv, args)
    assert "private" not in card
    same = run("image = pipe(", re.findall(r"```python\n(.*?)```", card, re.DOTALL), files)
    np.testing.assert_array_equal(space["result"], same["image"])

    save_file(convert_state_dict_to_kohya(load_file(file)), file)
    np.testing.assert_array_equal(space["result"], run("set_adapters", files=files)["result"])


def test_own_rewards(models, tmp_path):  # noqa: F811
    Accelerator()
    for name in ("my_reward", "my_clip"):
        (tmp_path / f"{name}.py").write_text(next(block for block in BLOCKS if block.startswith(f"# {name}.py")))
    images, prompts = torch.rand(2, 3, 40, 40), ["a cat", "a cat"]
    metadata = [{"init_image": image} for image in images]
    specs = [f"{tmp_path}/my_reward.py:redness", f"{tmp_path}/my_clip.py:TextReward('a cat', '{models}/clip')"]
    specs.append(f"clip_score('{models}/clip', scaled=True)")
    functions = {spec: trainer.load_reward(spec) for spec in specs}
    rewards, _ = trainer.compute_rewards(functions, images, prompts, metadata)
    expected = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    assert rewards[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert rewards[:, 1].tolist() == pytest.approx(rewards[:, 2].tolist(), abs=0.05)  # CLIP, of 8-bit pictures


def test_flags_and_metrics_exist():
    """The script's, or those of accelerate launch and py-spy, with the defaults of the table."""
    parser = trainer.make_parser()
    known = {*parser._option_string_actions, "--multi_gpu", "--num_processes", "--pid"}
    assert known.issuperset(re.findall(r"--\w\w+", README + DETAILS))
    for flags, defaults in re.findall(r"^\| (`--.*?) \| (.*?) \|", README, re.MULTILINE)[1:]:
        for flag, default in zip(re.findall(r"\w+", flags), defaults.replace("`", "").split(", "), strict=True):
            known = parser.get_default(flag)
            assert (known[0] if isinstance(known, list) else known) == type(known)(default) or [default] == known
    rows = " ".join(re.findall(r"^\| (`\w.*?) \|", DETAILS, re.MULTILINE))
    assert all(name in SCRIPT.read_text() for name in re.findall(r"`(?:heldout_)?(\w+)`", rows))
