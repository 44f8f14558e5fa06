"""Rewards against independent computations on tiny models of the same architectures, and against a real server."""

import asyncio
import base64
import io
import json
import math
import os
import pickle
import posixpath
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from hub_stand_in import Handler, serve
from PIL import Image

import train_img2img_ddpo as trainer
from components import tiny_tokenizer


PROMPTS = ["a red disc", "blue", "something else, and more of it " * 20, "x"]
LABELS = ["cat", "dog", "bird", "dog"]
Accelerator(cpu=True)  # what the factories ask for device and precision


def aesthetic_head() -> torch.nn.ModuleDict:
    """Return the head of TRL and ddpo-pytorch."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    layers = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    return torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers, linear(64, 16), linear(16, 1))})


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Return images (4, 3, 48, 40) that are smooth and different."""
    coarse = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(48, 40), mode="bilinear")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with tiny models in `clip`, `dino` and `vit`, and an aesthetic head in `head.pth`."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    body = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, **body}
    vision = {"image_size": 32, "patch_size": 8, **body}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    dino = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **body))
    names = {0: "cat", 1: "dog", 2: "bird"}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(id2label=names, **vision))
    for name, model in {"clip": clip, "dino": dino, "vit": vit}.items():
        for parameter in model.parameters():  # random weights as made differ too little from picture to picture
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(**size), tokenizer).save_pretrained(folder / "clip")
    square = {"height": 28, "width": 28}
    transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder / "dino")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    torch.save(aesthetic_head().state_dict(), folder / "head.pth")
    return folder


def saved(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.uint8(np.rint(image.numpy().transpose(1, 2, 0) * 255))) for image in images]


def score(spec: str, images, metadata=None, prompts=PROMPTS) -> torch.Tensor:
    """Return a reward in single precision, of a file that is executed anew, as at the start of a run."""
    metadata = metadata or [{"init_image": image} for image in images]
    functions = trainer.load_rewards(Namespace(reward_fn=[spec]), [], "cpu")
    return trainer.compute_rewards(functions, images, prompts, metadata)[0][:, 0].float()


def test_jpeg_rewards_are_ddpo_pytorchs(images, tmp_path):
    for number, image in enumerate(saved(images)):
        image.save(tmp_path / f"{number}.jpg", quality=95)
    sizes = [(tmp_path / f"{number}.jpg").stat().st_size / 1000 for number in range(4)]
    assert score("jpeg_incompressibility", images).tolist() == pytest.approx(sizes)
    assert score("jpeg_compressibility()", images).tolist() == pytest.approx([-size for size in sizes])


def test_psnr_and_its_floor(images):
    target = (images + 0.1).clamp(0, 1)
    metadata = [{"target": t, "init_image": i} for t, i in zip(target, images)]
    expected = [20 * math.log10(1 / (a - b).square().mean().sqrt()) for a, b in zip(images, target)]
    assert score("psnr", images, metadata).tolist() == pytest.approx(expected, abs=1e-3)
    assert score("psnr('init_image')", images, metadata).tolist() == [100] * 4
    floored, floor = score(f"psnr(floor={np.median(expected)})", images, metadata), np.median(expected)
    assert floored.tolist() == pytest.approx([min(0, e - floor) for e in expected], abs=1e-3) and floored.min() < 0


def run_clip(models: Path, images, texts: list[str]):
    """Return the outputs of the reference: CLIPProcessor and CLIPModel on the pictures as they would be saved."""
    processor = transformers.CLIPProcessor.from_pretrained(models / "clip")
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 77}
    with torch.no_grad():
        clip = transformers.CLIPModel.from_pretrained(models / "clip")
        return clip(**processor(text=texts, images=saved(images), **options))


def test_clip_score_hps_and_pick_score(models, images):
    scaled = run_clip(models, images, PROMPTS).logits_per_image.diagonal()
    scale = math.exp(2.6592)  # CLIP's initial one
    for name, expected in {"clip_score": scaled / scale, "hps": scaled / scale, "pick_score": scaled}.items():
        rewards = score(f"{name}(model={str(models / 'clip')!r}, processor={str(models / 'clip')!r})", images)
        torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)
    assert scaled.std() > 1e-3


def test_aesthetic(models, images, tmp_path):
    head = aesthetic_head().eval()
    head.load_state_dict(torch.load(models / "head.pth", weights_only=True))
    embeds = run_clip(models, images, PROMPTS).image_embeds
    expected = head["layers"](embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(1).detach()
    spec = f"aesthetic({str(models / 'clip')!r}, {{!r}})"
    torch.testing.assert_close(score(spec.format(str(models / "head.pth")), images), expected, rtol=1e-4, atol=1e-6)

    torch.save(Path("any object"), tmp_path / "head.pth")  # a head is never unpickled
    with pytest.raises(SystemExit, match="Weights only load failed"):
        trainer.load_reward(spec.format(str(tmp_path / "head.pth")))


def test_dino_similarity(models, images):
    dino = transformers.Dinov2Model.from_pretrained(models / "dino")
    processor, others = transformers.BitImageProcessorPil.from_pretrained(models / "dino"), images.flip(3)
    with torch.no_grad():
        pair = [dino(**processor(saved(x), return_tensors="pt")).last_hidden_state[:, 0] for x in (images, others)]
    expected = torch.nn.functional.cosine_similarity(*pair)
    metadata = [{"init_image": image, "edited": other} for image, other in zip(images, others)]
    model = str(models / "dino")
    torch.testing.assert_close(score(f"dino_similarity({model!r})", images, metadata), torch.ones(4))
    rewards = score(f"dino_similarity({model!r}, column='edited')", images, metadata)
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)


def margins(logits: torch.Tensor, targets: list[int]) -> list[float]:
    return [(row[t] - max(v for i, v in enumerate(row) if i != t)).item() for row, t in zip(logits, targets)]


def test_classifier(models, images):
    """Classes are named or numbered, or CLIP gets their names."""
    processor, vit = transformers.ViTImageProcessorPil.from_pretrained(models / "vit"), str(models / "vit")
    network = transformers.ViTForImageClassification.from_pretrained(models / "vit")
    with torch.no_grad():
        logits = network(**processor(saved(images), return_tensors="pt")).logits
    by_name = [{"kind": label} for label in LABELS]
    rewards = score(f"classifier({vit!r}, label_column='kind')", images, by_name)
    assert rewards.tolist() == pytest.approx(margins(logits, [0, 1, 2, 1]), abs=1e-4)
    by_number = [{"label": label} for label in [0, 1, 2, 1]]
    assert score(f"classifier({vit!r})", images, by_number).tolist() == rewards.tolist()
    with pytest.raises(SystemExit, match="has no weights for classifier"):  # transformers would make some up
        trainer.load_reward(f"classifier({str(models / 'dino')!r})")
    names, by_name = ["bird", "cat", "dog"], [{"label": label} for label in LABELS]
    logits = run_clip(models, images, [f"An image of {name}" for name in names]).logits_per_image
    rewards = score(f"classifier({str(models / 'clip')!r}, names={names})", images, by_name)
    assert rewards.tolist() == pytest.approx(margins(logits, [1, 2, 0, 2]), abs=1e-3)


REWARD_FILE = """
import numpy, torch
def ddpo_pytorch():
    def _fn(images, prompts, metadata):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
        return numpy.array([image.mean() for image in images]), {}
    return _fn

def scorer(scale=2.0):
    def _fn(images, prompts, metadata):
        scores = images.float().mean(dim=(1, 2, 3)) * scale
        return scores, {"brightness": scores / scale, "prompt": list(prompts)}
    return _fn
trl = scorer(0.5)
def imageddpo(images: torch.Tensor, prompts: tuple[str], metadata: tuple) -> tuple[torch.Tensor, dict]:
    before = torch.stack([row.pop("init_image") for row in metadata]).clone()
    images.zero_(), [row["target"].zero_() for row in metadata]
    return before[:, 0].mean(dim=(1, 2)).tolist(), {"length": [len(p) for p in prompts]}
class Module(torch.nn.Module):
    def forward(self, images, prompts, metadata): return tuple(row["target"].mean().item() for row in metadata)
module = Module()
def precise(images, prompts, metadata): return [1e6 + 1e-6 * i for i in range(len(images))], None
def two(images, prompts): return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "drop_in.py"
    for name, source in {"drop_in": REWARD_FILE, "json": REWARD_FILE, "leaves": "import sys; sys.exit()"}.items():
        path.with_stem(name).write_text(source)
    return path


def test_reward_functions_of_other_trainers_drop_in(images, reward_file):
    """Each gets copies of its own for each sample, whatever the others do to theirs. Rewards are in float64."""
    names = "imageddpo ddpo_pytorch trl scorer scorer(scale=3) module precise".split()
    rewards = {name: trainer.load_reward(f"{reward_file}:{name}") for name in names}
    row = {"init_image": images[0], "target": images[1].clone()}  # one for all samples of a group
    result, info = trainer.compute_rewards(rewards, images, PROMPTS, [row] * 4)
    result[:, 1] /= 255  # of 8 bits
    mean, ones = images.mean(dim=(1, 2, 3)), torch.ones(4)
    expected = [images[0, 0].mean() * ones, mean, mean / 2, mean * 2, mean * 3, images[1].mean() * ones]
    torch.testing.assert_close(result[:, :-1].float(), torch.stack(expected, dim=1), rtol=0, atol=1e-3)
    assert result[:, -1].tolist() == [1e6 + 1e-6 * number for number in range(4)]
    assert info == {"info/brightness": pytest.approx(mean.mean().item()), "info/length": sum(map(len, PROMPTS)) / 4}


RESULTS = {
    "tensor.*0., 0., 0..": torch.zeros(3),
    "tensor.*0.": torch.zeros(4, 1),
    ".nan, ": [math.nan] * 4,
    "None": None,
    "<coroutine": asyncio.sleep(0),
}


@pytest.mark.parametrize("message", RESULTS)
def test_what_is_wrong_with_a_result_is_told_with_the_name_of_its_reward(message, images):
    with pytest.raises(ValueError, match=f"^reward mine.py f must return 4 finite numbers, not {message}"):
        trainer.compute_rewards({"mine.py f": lambda *arguments: RESULTS[message]}, images, PROMPTS, [{}] * 4)


@pytest.mark.parametrize("kind", ["group", "batch", "tracker"])
def test_the_scale_of_a_reward_and_a_constant_do_not_matter(kind):
    rewards = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = (rewards, rewards * 1e-8, rewards * 1e8, rewards + 1e6, torch.full_like(rewards, 0.1))
    first, *others, none = (trainer.compute_advantages(values, kind, 4, [0] * 16, {}) for values in changed)
    torch.testing.assert_close(torch.stack(others), torch.stack([first] * 3), rtol=1e-5, atol=1e-5)
    assert not none.any()


IMPORTS = "import argparse, os, sys, torch, helper, zipapp"
INTRUDER = """
argparse.ArgumentParser().parse_args(), torch.set_grad_enabled(False), os.chdir("/"), sys.path.insert(0, "/other")"""
FUNCTION = "\ndef reward(images, prompts, metadata): return [helper.VALUE] * len(images)"


def test_an_import_leaves_the_process_as_it_was(images, tmp_path, monkeypatch):
    """Each file has its own helpers, is executed anew by each run, and does not shadow modules afterwards."""
    before, path = [["train_img2img_ddpo.py", "--dry_run"], os.getcwd(), True], list(sys.path)
    monkeypatch.setattr(sys, "argv", before[0])
    monkeypatch.setattr(sys, "path", list(path))
    for name, source in {"one": IMPORTS + FUNCTION, "two": IMPORTS + INTRUDER + FUNCTION}.items():
        (tmp_path / name).mkdir()
        for file, text in {name: source, "helper": f"VALUE = {len(source)}", "zipapp": ""}.items():
            (tmp_path / name / file).with_suffix(".py").write_text(text)
    specs = [f"{tmp_path}/{name}/{name}.py:reward" for name in ("one", "two")]
    functions = trainer.load_rewards(Namespace(reward_fn=specs), [], "cpu")
    values = [len(IMPORTS + FUNCTION), len(IMPORTS + INTRUDER + FUNCTION)]
    assert trainer.compute_rewards(functions, images, PROMPTS, [{}] * 4)[0].tolist() == [values] * 4
    assert [sys.argv, os.getcwd(), torch.is_grad_enabled()] == before and sys.path[: len(path)] == path
    function = pickle.dumps(functions["one.py reward"])
    assert [sys.modules.pop(name).__name__ for name in ("one", "helper", "zipapp")]  # as in a worker process
    assert pickle.loads(function)(images, PROMPTS, []) == values[:1] * 4
    assert not sys.modules["zipapp"].__file__.startswith(str(tmp_path))
    (tmp_path / "two/helper.py").write_text("VALUE = 1000000")
    assert score(specs[1], images).tolist() == [1000000] * 4


NAMES = {
    "http://user:PW@host:80/score/?api_key=KEY#part": "host:80/score/",
    "HTTPS://user:PW@host//score": "host//score",
    "vlm_judge('https://user:PW@host/v1?key=KEY', \"m\")": "vlm_judge('host/v1', \"m\")",
    "file.py:f(urls=['http://a:PW@b/c?KEY', 'http://d/e'])": "file.py:f(urls=['b/c', 'd/e'])",
    "/home/me/file.py:f(path='/home/me/data.csv')": "file.py:f(path='data.csv')",
    "C:\\me\\file.py:f('~/me/net/')": "file.py:f('net/')",
    "classifier('org/model', names=['a%', 'é'])": "classifier('org/model', names=['a%', 'é'])",
}


def test_names_are_fit_to_be_published():
    """They hold no secrets or folders, and mlflow takes them as metrics, also by the rule that it has for paths."""
    assert {spec: trainer.public_name(spec) for spec in NAMES} == NAMES
    for name in (f"heldout_base/{trainer.metric_name(name)}" for name in NAMES.values()):
        assert re.fullmatch(r"[\w./ -]+", name) and posixpath.normpath(name) == name


WRONG = {
    "jpeg": "give one of .'jpeg_compressibility', .*hps.*, file.py:function",
    "psnr(flor=20)": "TypeError: .*argument 'flor'",
    "psnr(column=target)": "write each option as a number, or as a text in quotes",
    "classifier": "it requires .'model'.*a factory its options in parentheses",
    "missing.py:reward": "No such file or directory: .*missing.py",
    "drop_in.py": "give one of .'ddpo_pytorch', 'scorer', 'trl', 'imageddpo'",
    "drop_in.py:image_ddpo": "give one of .*'imageddpo'",
    "json.py:loads": "a module json is loaded already. Rename the file",
    "leaves.py:reward": "the file calls sys.exit",
    "drop_in.py:two": "it requires .'images', 'prompts'., but a reward requires images, prompts and metadata",
    "HTTP://user:PW@host/score": "file.py:function or http",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_is_wrong_with_a_reward_is_named_in_one_line(spec, reward_file, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    name = re.escape(trainer.public_name(spec))
    with pytest.raises(SystemExit, match=f"^error: --reward_fn={name}: .*({WRONG[spec]})") as error:
        score(spec, [])
    assert not re.search("\n|PW", str(error.value))


class RewardHandler(Handler):
    """Answer as the path says, and keep what was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        flaky = 503 if len(self.server.requests) < 4 else 200
        path = self.path.partition("?")[0]
        status = {"/down": 503, "/refuses": 422, "/flaky": flaky}.get(path, 200)
        answer = {"rewards": [0.5] * (3 if path == "/short" else 4)}
        if path == "/mean":
            pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in body["images"]]
            answer = {"rewards": [float(p.mean()) for p in pixels], "info": {"n": [1] * len(pixels)}}
        elif self.path.endswith("/chat/completions"):
            text, image = body["messages"][0]["content"]
            picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
            reply = f"It is {'BRIGHT' if np.asarray(picture).mean() > 127 else 'dark'}. Asked: {text['text']}"
            answer = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        self.reply(status, answer)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *args: None)
    server = serve(RewardHandler)
    server.requests = []
    return server


def test_reward_server(server, images):
    metadata = [{"init_image": image, "tags": [i], "path": Path("x")} for i, image in enumerate(images)]
    rewards = score(f"{server.url}/mean", images, metadata)
    assert rewards.tolist() == pytest.approx([np.asarray(p).mean() for p in saved(images)])  # PNG loses nothing
    ((_, _, body),) = server.requests
    assert body["prompts"] == PROMPTS and body["metadata"] == [{"tags": [i], "path": "x"} for i in range(4)]
    assert score(f"{server.url}/flaky", images).tolist() == [0.5] * 4 and len(server.requests) == 4


DOWN = {
    "down": "answered 503",
    "refuses": "answered 422",
    "short": "must return 4 finite numbers",
    "absent": "cannot be reached",
}


@pytest.mark.parametrize("path", DOWN)
def test_a_server_that_stays_down_or_talks_nonsense_stops_the_run(server, images, path):
    """The message names it by host and path alone."""
    port = 1 if path == "absent" else server.server_port
    with pytest.raises((OSError, ValueError), match=f"127.0.0.1.{port}/{path} {DOWN[path]}") as error:
        score(f"http://user:PW@127.0.0.1:{port}/{path}?api_key=KEY", images)
    assert len(server.requests) == {"down": 5, "absent": 0}.get(path, 1)
    assert not re.search("PW|KEY", str(error.value)) and error.value.__suppress_context__ is (path == "absent")


def test_vlm_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    metadata = [{"q": "Is it bright?", "a": "Bright"}, {"q": "How many?", "a": "seven dark horses"}]
    spec = f"vlm_judge('{server.url}/v1', 'judge:7b', question_column='q', answer_column='a', api_key_env='JUDGE_KEY'"
    rewards = score(f"{spec})", images, metadata, ["", ""])
    assert rewards.tolist() == pytest.approx([1, 1 / 3])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge:7b"
    assert headers["Authorization"] == "Bearer very-secret"
    described = score(f"vlm_judge('{server.url}/v1', 'm')", images, None, ["what is bright here", "no"])
    assert described.tolist() == pytest.approx([3 / 4, 0])
    with pytest.raises((KeyError, ValueError), match="typo"):
        score(f"vlm_judge('{server.url}/v1', 'm', question_column='typo')", images, metadata, ["", ""])
