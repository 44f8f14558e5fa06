"""Rewards against independent computations on tiny models of the same architectures, and against a real server."""

import base64
import io
import json
import math
import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from PIL import Image

import train_img2img_ddpo as trainer
from components import tiny_tokenizer


PROMPTS = ["a red disc", "blue", "something else, and more of it " * 20, "x"]
LABELS = ["cat", "dog", "bird", "dog"]
Accelerator(cpu=True)  # what the factories ask for device and precision


def aesthetic_head() -> torch.nn.ModuleDict:
    """As in TRL and ddpo-pytorch."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    layers = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    return torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers, linear(64, 16), linear(16, 1))})


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
    metadata = metadata or [{"init_image": image} for image in images]
    return trainer.compute_rewards({spec: trainer.load_reward(spec)}, images, prompts, metadata)[0][:, 0]


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
    floored = score("psnr(floor=20.1)", images, metadata)
    assert floored.tolist() == pytest.approx([min(0, e - 20.1) for e in expected], abs=1e-3) and floored.min() < 0
    assert score("psnr(column='target', floor=19)", images, metadata).tolist() == [0] * 4


@pytest.fixture(scope="module")
def clip_outputs(models, images):
    """Of the reference: CLIPProcessor and CLIPModel on the pictures as they would be saved."""
    inputs = transformers.CLIPProcessor.from_pretrained(models / "clip")(
        text=PROMPTS, images=saved(images), return_tensors="pt", padding=True, truncation=True, max_length=77
    )
    with torch.no_grad():
        return transformers.CLIPModel.from_pretrained(models / "clip")(**inputs)


def test_clip_score_hps_and_pick_score(models, images, clip_outputs):
    scaled, scale = clip_outputs.logits_per_image.diagonal(), math.exp(2.6592)  # CLIP's initial logit scale
    for name, expected in {"clip_score": scaled / scale, "hps": scaled / scale, "pick_score": scaled}.items():
        rewards = score(f"{name}(model={str(models / 'clip')!r}, processor={str(models / 'clip')!r})", images)
        torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-5)
    assert scaled.std() > 1e-3


def test_aesthetic(models, images, clip_outputs, tmp_path):
    head = aesthetic_head().eval()
    head.load_state_dict(torch.load(models / "head.pth", weights_only=True))
    embeds = clip_outputs.image_embeds
    expected = head["layers"](embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(1).detach()
    spec = f"aesthetic({str(models / 'clip')!r}, {{!r}})"
    torch.testing.assert_close(score(spec.format(str(models / "head.pth")), images), expected, rtol=1e-4, atol=1e-6)

    torch.save(Path("any object"), tmp_path / "head.pth")  # a head is never unpickled
    with pytest.raises(SystemExit, match="Weights only load failed"):
        trainer.load_reward(spec.format(str(tmp_path / "head.pth")))


def test_dino_similarity_and_its_floor(models, images):
    dino = transformers.Dinov2Model.from_pretrained(models / "dino")
    processor, others = transformers.BitImageProcessorPil.from_pretrained(models / "dino"), images.flip(3)
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
    processor, vit = transformers.ViTImageProcessorPil.from_pretrained(models / "vit"), str(models / "vit")
    network, before = transformers.ViTForImageClassification.from_pretrained(models / "vit"), images.flip(2)
    with torch.no_grad():
        logits, base = (network(**processor(saved(x), return_tensors="pt")).logits for x in (images, before))
    by_name = [{"kind": label, "init_image": image} for label, image in zip(LABELS, before)]
    rewards = score(f"classifier({vit!r}, label_column='kind')", images, by_name)
    assert rewards.tolist() == pytest.approx(margins(logits, [0, 1, 2, 1]), abs=1e-4)
    by_number = [{"label": label, "init_image": image} for label, image in zip([0, 1, 2, 1], before)]
    change = (logits - base)[range(4), [0, 1, 2, 1]].clamp(-10, 10)
    rewards = score(f"classifier({vit!r}, mode='logit_change')", images, by_number)
    assert rewards.tolist() == pytest.approx(change.tolist(), abs=1e-4)
    with pytest.raises(SystemExit, match="has no weights for classifier"):  # transformers would make some up
        trainer.load_reward(f"classifier({str(models / 'dino')!r})")


def test_zero_shot_classifier(models, images):
    """The classes are the given names, as texts."""
    names = ["bird", "cat", "dog"]
    inputs = transformers.CLIPProcessor.from_pretrained(models / "clip")(
        text=[f"An image of {name}" for name in names], images=saved(images), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = transformers.CLIPModel.from_pretrained(models / "clip")(**inputs).logits_per_image
    metadata = [{"label": label} for label in LABELS]
    rewards = score(f"classifier({str(models / 'clip')!r}, names={names})", images, metadata)
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
    before = torch.stack([row["init_image"] for row in metadata])
    images.zero_()
    return before[:, 0].mean(dim=(1, 2)).tolist(), {"length": [len(p) for p in prompts]}
def short(images, prompts, metadata): return torch.zeros(len(images) - 1)
def nothing(images, prompts, metadata): images.mean(dim=(1, 2, 3))
def two(images, prompts): return images.mean(dim=(1, 2, 3))
def number(scale): return scale
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "drop_in.py"
    path.write_text(REWARD_FILE)
    return path


def test_reward_functions_of_other_trainers_drop_in(images, reward_file):
    names = ("imageddpo", "ddpo_pytorch", "trl", "scorer", "scorer(scale=3)")
    rewards = {name: trainer.load_reward(f"{reward_file}:{name}") for name in names}
    assert pickle.loads(pickle.dumps(rewards["imageddpo"])) is rewards["imageddpo"]  # worker processes find it
    metadata = [{"init_image": image} for image in images]
    result, info = trainer.compute_rewards(rewards, images, PROMPTS, metadata)
    result[:, 1] /= 255  # of 8 bits
    mean = images.mean(dim=(1, 2, 3))  # imageddpo's has emptied its own copy of the images, not the others'
    expected = [images[:, 0].mean(dim=(1, 2)), mean, mean / 2, mean * 2, mean * 3]
    torch.testing.assert_close(result, torch.stack(expected, dim=1), rtol=0, atol=1e-3)
    assert info == {"info/brightness": pytest.approx(mean.mean().item()), "info/length": sum(map(len, PROMPTS)) / 4}
    with pytest.raises(ValueError, match=r"reward .*:short has the shape \(3,\) for 4 images"):
        score(f"{reward_file}:short", images)
    with pytest.raises(ValueError, match=r"reward .*:nothing returned None.*, not 4 numbers: is a `return` missing"):
        score(f"{reward_file}:nothing", images)


WRONG = {
    "jpeg": "ValueError: no such reward: use jpeg_compressibility, .*hps.*, file.py:function",
    "psnr(flor=20)": "argument 'flor'.* a factory of one",
    "psnr(floor=open('x'))": "malformed node",
    "classifier": "(missing|required).* argument: 'model'",
    "missing.py:reward": "No module named 'missing'",
    "json.py:loads": "a module json is loaded already: rename the file",
    "drop_in.py:two": r"'images'.* three parameters,? \(images, prompts, metadata\)",
    "drop_in.py:number(3)": "returned int.* function.* a factory of one",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_is_wrong_with_a_reward_is_named_in_one_line(spec, reward_file, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    with pytest.raises(SystemExit, match=f"^error: --reward_fn={re.escape(spec)}: .*({WRONG[spec]})") as error:
        trainer.load_reward(spec)
    assert "\n" not in str(error.value)


class Handler(BaseHTTPRequestHandler):
    """Answers as its path says; keeps what it was asked."""

    def log_message(self, *args): ...

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        flaky = 503 if len(self.server.requests) < 4 else 200
        status = {"/down": 503, "/refuses": 422, "/flaky": flaky}.get(self.path, 200)
        answer = {"rewards": [0.5] * (3 if self.path == "/short" else 4)}
        if self.path == "/mean":
            pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in body["images"]]
            answer = {"rewards": [float(p.mean()) for p in pixels], "info": {"n": [1] * len(pixels)}}
        elif self.path.endswith("/chat/completions"):
            text, image = body["messages"][0]["content"]
            picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
            reply = f"It is {'BRIGHT' if np.asarray(picture).mean() > 127 else 'dark'}. Asked: {text['text']}"
            answer = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
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


@pytest.mark.parametrize("path, told", [("down", "answered 503"), ("refuses", "answered 422"), ("short", "shape")])
def test_a_server_that_stays_down_or_talks_nonsense_stops_the_run(server, images, path, told):
    with pytest.raises((OSError, ValueError), match=told):
        score(f"{server.url}/{path}", images)
    assert len(server.requests) == (5 if path == "down" else 1)


def test_vlm_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    metadata = [{"q": "Is it bright?", "a": "Bright"}]
    metadata.append({"q": ["Is it dark?", "How many?"], "a": ["dark", "seven dark horses"]})
    spec = f"vlm_judge('{server.url}/v1', 'judge:7b', question_column='q', answer_column='a', api_key_env='JUDGE_KEY'"
    rewards = score(f"{spec})", images, metadata, ["", ""])
    assert rewards.tolist() == pytest.approx([1, (1 + 1 / 3) / 2])
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge:7b"
    assert headers["Authorization"] == "Bearer very-secret"
    described = score(f"vlm_judge('{server.url}/v1', 'm')", images, None, ["what is bright here", "no"])
    assert described.tolist() == pytest.approx([3 / 4, 0])
