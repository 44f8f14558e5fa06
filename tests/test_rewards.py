"""Rewards against independent computations on tiny models of the same architectures, and against a real server."""

import base64
import io
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import train_img2img_ddpo as trainer
from components import tiny_tokenizer


PROMPTS = ["a red disc", "blue", "something else, and more of it " * 20, "x"]
LABELS = ["cat", "dog", "bird", "dog"]
Accelerator(cpu=True)  # what the factories ask for device and precision


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(4, 3, 48, 40), smooth and different."""
    coarse = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(48, 40), mode="bilinear")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders `clip`, `dino`, `vit` of tiny models, and `head.pth` with an aesthetic head."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    body = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, **body}
    vision = {"image_size": 32, "patch_size": 8, **body}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    dino = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **body))
    names = dict(enumerate(["cat", "dog", "bird"]))
    vit = ViTForImageClassification(ViTConfig(id2label=names, **vision))
    for model in (clip, dino, vit):
        for parameter in model.parameters():  # random weights as made differ too little from picture to picture
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(folder / "clip")
    square = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder / "dino")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    for name, model in {"clip": clip, "dino": dino, "vit": vit}.items():
        model.save_pretrained(folder / name)
    torch.save(AestheticHead().state_dict(), folder / "head.pth")
    return folder


class AestheticHead(torch.nn.Module):
    """As in TRL and ddpo-pytorch."""

    def __init__(self):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1),
            linear(64, 16), linear(16, 1),
        )  # fmt: skip


def saved(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.uint8(np.rint(image.numpy().transpose(1, 2, 0) * 255))) for image in images]


def score(spec: str, images, metadata=None, prompts=PROMPTS, splits=()) -> torch.Tensor:
    metadata = metadata or [{"init_image": image} for image in images]
    rewards = {spec: trainer.load_reward(spec, splits)}
    return trainer.compute_rewards(rewards, images, prompts, metadata)[0][:, 0]


def test_jpeg_rewards_are_ddpo_pytorchs(images):
    sizes = []
    for image in saved(images):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    assert score("jpeg_incompressibility", images).tolist() == pytest.approx(sizes)
    assert score("jpeg_compressibility()", images).tolist() == pytest.approx([-size for size in sizes])
    assert len(set(sizes)) > 1


def test_psnr_and_its_floor(images):
    target = (images + 0.1).clamp(0, 1)
    metadata = [{"target": t, "init_image": i} for t, i in zip(target, images)]
    expected = [20 * math.log10(1 / (a - b).square().mean().sqrt()) for a, b in zip(images, target)]
    assert score("psnr", images, metadata).tolist() == pytest.approx(expected, abs=1e-3)
    assert score("psnr('init_image')", images, metadata).tolist() == [100] * 4
    floored = score("psnr(floor=20.1)", images, metadata)
    assert floored.tolist() == pytest.approx([min(0, e - 20.1) for e in expected], abs=1e-3) and floored.min() < 0
    assert score("psnr(column='target', floor=19)", images, metadata).tolist() == [0] * 4


@pytest.fixture(scope="module")
def clip_outputs(models, images):
    """Of the reference: CLIPProcessor and CLIPModel on the pictures as they would be saved."""
    inputs = CLIPProcessor.from_pretrained(models / "clip")(
        text=PROMPTS, images=saved(images), return_tensors="pt", padding=True, truncation=True, max_length=77
    )
    with torch.no_grad():
        return CLIPModel.from_pretrained(models / "clip")(**inputs)


def test_clip_score_hps_and_pick_score(models, images, clip_outputs):
    scaled, scale = clip_outputs.logits_per_image.diagonal(), math.exp(2.6592)  # CLIP's initial logit scale
    for name, expected in {"clip_score": scaled / scale, "hps": scaled / scale, "pick_score": scaled}.items():
        rewards = score(f"{name}(model={str(models / 'clip')!r}, processor={str(models / 'clip')!r})", images)
        torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)
    assert scaled.std() > 1e-3


def test_aesthetic(models, images, clip_outputs, tmp_path):
    head = AestheticHead().eval()
    head.load_state_dict(torch.load(models / "head.pth", weights_only=True))
    embeds = clip_outputs.image_embeds
    expected = head.layers(embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(1).detach()
    spec = f"aesthetic({str(models / 'clip')!r}, {{!r}})"
    torch.testing.assert_close(score(spec.format(str(models / "head.pth")), images), expected, rtol=1e-4, atol=1e-6)

    class Malicious:  # a head is never unpickled
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save(Malicious(), tmp_path / "head.pth")
    with pytest.raises(SystemExit, match="aesthetic"):
        score(spec.format(str(tmp_path / "head.pth")), images)
    assert not (tmp_path / "ran").exists()


def test_dino_similarity_and_its_floor(models, images):
    dino = Dinov2Model.from_pretrained(models / "dino")
    processor, others = BitImageProcessorPil.from_pretrained(models / "dino"), images.flip(3)
    with torch.no_grad():
        pair = [dino(**processor(saved(x), return_tensors="pt")).last_hidden_state[:, 0] for x in (images, others)]
    expected = torch.nn.functional.cosine_similarity(*pair)
    metadata = [{"init_image": image, "edited": other} for image, other in zip(images, others)]
    floor, model = expected.median().item(), str(models / "dino")
    torch.testing.assert_close(score(f"dino_similarity({model!r})", images, metadata), torch.ones(4))
    rewards = score(f"dino_similarity({model!r}, column='edited')", images, metadata)
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)
    rewards = score(f"dino_similarity({model!r}, column='edited', floor={floor})", images, metadata)
    torch.testing.assert_close(rewards, -(floor - expected).clamp(min=0), rtol=1e-3, atol=1e-5)


def margins(logits: torch.Tensor, targets: list[int]) -> list[float]:
    return [(row[t] - max(v for i, v in enumerate(row) if i != t)).item() for row, t in zip(logits, targets)]


def test_classifier(models, images):
    """Classes by name or by number; the margin, and the change of the logit."""
    processor, vit = ViTImageProcessorPil.from_pretrained(models / "vit"), str(models / "vit")
    network, before = ViTForImageClassification.from_pretrained(models / "vit"), images.flip(2)
    with torch.no_grad():
        logits, base = (network(**processor(saved(x), return_tensors="pt")).logits for x in (images, before))
    for labels in (LABELS, [0, 1, 2, 1]):
        metadata = [{"kind": label, "init_image": image} for label, image in zip(labels, before)]
        rewards = score(f"classifier({vit!r}, label_column='kind')", images, metadata)
        assert rewards.tolist() == pytest.approx(margins(logits, [0, 1, 2, 1]), abs=1e-4)
        change = (logits - base)[range(4), [0, 1, 2, 1]].clamp(-10, 10)
        rewards = score(f"classifier({vit!r}, 'kind', 'logit_change')", images, metadata)
        assert rewards.tolist() == pytest.approx(change.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="label='fish' is no class of .*; they are cat, dog, bird"):
        score(f"classifier({vit!r})", images, [{"label": "fish"}] * 4)


def test_zero_shot_classifier(models, images):
    """The classes are the dataset's, those of held-out rows among them; a ClassLabel's are its names."""
    inputs = CLIPProcessor.from_pretrained(models / "clip")(
        text=[f"An image of {name}" for name in ("bird", "cat", "dog")], images=saved(images),
        return_tensors="pt", padding=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = CLIPModel.from_pretrained(models / "clip")(**inputs).logits_per_image
    named = datasets.Features(label=datasets.ClassLabel(names=["bird", "cat", "dog"]))
    texts = [datasets.Dataset.from_dict({"label": labels}) for labels in (["cat", "dog", "dog"], ["bird"])]
    for splits in (texts, [datasets.Dataset.from_dict({"label": [1, 2]}, features=named)]):
        metadata = [{"label": label} for label in LABELS]
        rewards = score(f"classifier({str(models / 'clip')!r})", images, metadata, splits=splits)
        assert rewards.tolist() == pytest.approx(margins(logits, [1, 2, 0, 2]), abs=1e-3)


REWARD_FILE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy, torch

@dataclass
class Settings:
    limit: float = 10.0

def ddpo_pytorch():
    def _fn(images, prompts, metadata):
        if isinstance(images, torch.Tensor):
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
    before = torch.stack([row["init_image"] for row in metadata])
    images.zero_()
    return (before[:, 0].mean(dim=(1, 2)) - Settings.limit).tolist(), {"length": [len(p) for p in prompts]}

class Class:
    def __call__(self, images, prompts, metadata): return images.mean(dim=(1, 2, 3))

def short(images, prompts, metadata): return torch.zeros(len(images) - 1)
"""


def test_reward_functions_of_other_trainers_drop_in(images, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", sys.path[:])
    (tmp_path / "drop_in.py").write_text(REWARD_FILE)
    names = ("imageddpo", "ddpo_pytorch", "trl", "scorer", "scorer(scale=3)", "Class")
    specs = [f"{tmp_path / 'drop_in.py'}:{name}" for name in names]
    rewards = {spec: trainer.load_reward(spec) for spec in specs}
    metadata = [{"init_image": image} for image in images]
    result, info = trainer.compute_rewards(rewards, images, PROMPTS, metadata)
    mean = images.mean(dim=(1, 2, 3))  # imageddpo's has emptied its own copy of the images, not the others'
    expected = [images[:, 0].mean(dim=(1, 2)) - 10, mean * 255, mean / 2, mean * 2, mean * 3, mean]
    torch.testing.assert_close(result, torch.stack(expected, dim=1), rtol=1e-3, atol=0.5)
    assert info == {"info/brightness": pytest.approx(mean.mean().item()), "info/length": sum(map(len, PROMPTS)) / 4}
    with pytest.raises(ValueError, match=r"reward .*:short has the shape \(3,\) for 4 images"):
        score(f"{tmp_path}/drop_in.py:short", images)


WRONG = {
    "jpeg": "--reward_fn=jpeg: ValueError: no such reward: use jpeg_compressibility, .*hps.*, file.py:function",
    "psnr(flor=20)": "unexpected keyword argument 'flor'",
    "psnr(floor=open('x'))": "malformed node",
    "psnr(": "no such reward: use jpeg",
    "classifier": "missing 1 required positional argument: 'model'",
    "clip_score('no/such-model')": "OSError",
    "missing.py:reward": "FileNotFoundError: .*missing.py",
    "components.py:absent": "KeyError: 'absent'",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_is_wrong_with_a_reward_is_named(spec, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(SystemExit, match=WRONG[spec]):
        trainer.load_reward(spec)


def test_untrained_weights_are_refused(models, tmp_path):
    """transformers would make up a classification head for a model without one."""
    Dinov2Model.from_pretrained(models / "dino").save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="has no weights for classifier"):
        trainer.load_reward(f"classifier({str(tmp_path)!r})")


class Handler(BaseHTTPRequestHandler):
    """Answers as its path says; keeps what it was asked."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, path = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.path
        attempt = sum(p == path for p, _, _ in self.server.requests)
        self.server.requests.append((path, dict(self.headers), body))
        status = {"/down": 503, "/refuses": 422, "/moved": 307, "/flaky": 503 if attempt < 2 else 200}.get(path, 200)
        answers = {"/short": {"rewards": [0.5] * 3}, "/texts": {"rewards": ["good"] * 4}, "/list": [1, 2]}
        answer = answers.get(path, {"rewards": [0.5] * 4})
        if path == "/mean":
            pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in body["images"]]
            answer = {"rewards": [float(p.mean()) for p in pixels], "info": {"n": [1] * len(pixels)}}
        elif path.endswith("/chat/completions"):
            text, image = body["messages"][0]["content"]
            picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
            reply = f"It is {'BRIGHT' if np.asarray(picture).mean() > 127 else 'dark'}. Asked: {text['text']}"
            answer = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Location", "/mean")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()


def test_reward_server(server, images):
    metadata = [{"init_image": image, "tags": [i], "path": Path("x")} for i, image in enumerate(images)]
    rewards = score(f"{server.url}/mean", images, metadata)
    assert rewards.tolist() == pytest.approx([np.asarray(p).mean() for p in saved(images)])  # PNG loses nothing
    ((_, _, body),) = server.requests
    assert body["prompts"] == PROMPTS and body["metadata"] == [{"tags": [i], "path": "x"} for i in range(4)]
    assert score(f"{server.url}/flaky", images).tolist() == [0.5] * 4 and len(server.requests) == 4


NONSENSE = {"refuses": "answered 422", "moved": "answered 307", "short": "shape", "texts": "str", "list": "list"}


@pytest.mark.parametrize("path, told", [("down", "answered 503"), *NONSENSE.items()])
def test_a_server_that_stays_down_or_talks_nonsense_stops_the_run(server, images, path, told):
    with pytest.raises((RuntimeError, ValueError, TypeError), match=told):
        score(f"{server.url}/{path}", images)
    assert len(server.requests) == (5 if path == "down" else 1)


def test_vlm_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    questions = {"q": ["Is it dark?", "How many?"], "a": ["dark", "seven dark horses"]}
    metadata = [{"q": "Is it bright?", "a": "Bright"}, questions]
    spec = f"vlm_judge('{server.url}/v1', 'judge:7b', question_column='q', answer_column='a', api_key_env='JUDGE_KEY'"
    assert score(f"{spec})", images, metadata, ["", ""]).tolist() == [1.0, 0.5]
    recall = score(f"{spec}, score='recall')", images, metadata, ["", ""])
    assert recall.tolist() == pytest.approx([1, (1 + 1 / 3) / 2])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge:7b"
    assert headers["Authorization"] == "Bearer very-secret"
    spec, prompts = f"vlm_judge('{server.url}/v1', 'm', score='recall')", ["what is bright here", "no"]
    described = score(spec, images, None, prompts)
    assert described.tolist() == pytest.approx([3 / 4, 0])
