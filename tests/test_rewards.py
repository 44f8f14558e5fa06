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
"""
Rewards: each model against an independent computation on a tiny model of the same architecture, saved locally with
random weights; servers against a real one that also misbehaves; reward files in the styles of three other trainers.
"""

import base64
import contextlib
import csv
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
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

import train_img2img_ddpo as train
from components import picture, tiny_components, tiny_tokenizer
from pipeline_img2img_ddpo import StableDiffusionImg2ImgDDPOPipeline
from train_img2img_ddpo import ConditionCache, ImagePrompts, InputError, Ranks, Reward


ROOT = Path(train.__file__).parent
PROMPTS = ["a red disc", "blue", "something else, and more of it", "x"]
LABELS = ["cat", "dog", "bird", "dog"]


def reward_of(spec: str, **overrides) -> Reward:
    args = {"reward_batch_size": 3, "reward_timeout": 5.0, "mixed_precision": "no", "cache_dir": None}
    return Reward(Namespace(reward_fn=spec, **{**args, **overrides}))


def score(reward: Reward | str, images, prompts=PROMPTS, metadata=None) -> torch.Tensor:
    reward = reward_of(reward) if isinstance(reward, str) else reward
    return reward(images, prompts, metadata or [{"init_image": image} for image in images])


def data_of(images: list, **columns) -> ImagePrompts:
    dataset = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    for name, values in columns.items():
        if isinstance(values[0], Image.Image):
            dataset = dataset.cast_column(name, datasets.Image())
    args = Namespace(image_column="image", resolution=16, caption_column=None, prompt="a disc", seed=0)
    return ImagePrompts(dataset, args, center_crop=True)


def saved_pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.uint8(np.rint(i.numpy().transpose(1, 2, 0) * 255))) for i in images]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(4, 3, 48, 40), smooth and different."""
    coarse = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(48, 40), mode="bilinear")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders `clip`, `dino`, `vit` of tiny models, and `head.pth` with the aesthetic head."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    body = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, **body}
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **body}, projection_dim=768)
    )
    dino = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **body))
    names = dict(enumerate(["cat", "dog", "bird"]))
    vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, id2label=names, **body))
    for model in (clip, dino, vit):
        for parameter in model.parameters():  # random weights as made differ too little from picture to picture
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    clip.save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(folder / "clip")
    dino.save_pretrained(folder / "dino")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "dino"
    )
    vit.save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    torch.save(AestheticHead().state_dict(), folder / "head.pth")
    return folder


class AestheticHead(torch.nn.Module):
    """As in TRL and ddpo-pytorch."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(768, 1024),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(1024, 128),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(128, 64),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 16),
            torch.nn.Linear(16, 1),
        )


# Rewards without a model


def test_jpeg_rewards_are_ddpo_pytorchs(images):
    sizes = []
    for image in saved_pictures(images):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    rewards = score("jpeg_incompressibility,jpeg_compressibility", images)
    assert rewards.tolist() == [sizes, [-s for s in sizes]]
    assert len(set(sizes)) > 1


def test_psnr_and_its_floor(images):
    target = (images + 0.1).clamp(0, 1)
    metadata = [{"target": t, "init_image": i} for t, i in zip(target, images)]
    expected = [20 * math.log10(1 / (a - b).square().mean().sqrt()) for a, b in zip(images, target)]
    rewards = score("psnr,psnr:init_image,psnr:target:floor=20.1,psnr:target:floor=19", images, metadata=metadata)
    assert rewards[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert rewards[1].tolist() == [100] * 4
    assert rewards[2].tolist() == pytest.approx([min(0, e - 20.1) for e in expected], abs=1e-3)
    assert rewards[2].min() < 0 and rewards[3].tolist() == [0] * 4


# Rewards with a model


@pytest.fixture(scope="module")
def clip_outputs(models, images):
    """Of the reference: CLIPProcessor and CLIPModel on the pictures as they would be saved."""
    inputs = CLIPProcessor.from_pretrained(models / "clip")(
        text=PROMPTS, images=saved_pictures(images), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        return CLIPModel.from_pretrained(models / "clip")(**inputs)


def test_clip_score_hps_and_pick_score(models, images, clip_outputs):
    clip = models / "clip"
    rewards = score(f"clip_score:{clip},pick_score:{clip}:processor={clip},hps:{clip}:processor={clip}", images)
    scaled = clip_outputs.logits_per_image.diagonal().double()
    scale = math.exp(2.6592)  # CLIP's initial logit scale
    torch.testing.assert_close(rewards, torch.stack([scaled / scale, scaled, scaled / scale]), rtol=1e-4, atol=1e-5)
    assert rewards[0].std() > 1e-3


def test_long_prompts_are_cut(models, images):
    assert score(f"clip_score:{models / 'clip'}", images, ["a long story " * 60] * 4).isfinite().all()


def test_aesthetic(models, images, clip_outputs):
    head = AestheticHead().eval()
    head.load_state_dict(torch.load(models / "head.pth", weights_only=True))
    embeds = clip_outputs.image_embeds
    expected = head.layers(embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(1).detach().double()
    reward = reward_of(f"aesthetic:{models / 'clip'}:head={models / 'head.pth'}")
    torch.testing.assert_close(score(reward, images)[0], expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 0


def test_aesthetic_head_is_never_unpickled(models, tmp_path):
    proof = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (proof,))

    torch.save(Malicious(), tmp_path / "head.pth")
    with pytest.raises(InputError, match="aesthetic"):
        reward_of(f"aesthetic:{models / 'clip'}:head={tmp_path / 'head.pth'}")
    assert not proof.exists()


def test_dino_similarity_and_its_floor(models, images):
    dino, processor = (
        Dinov2Model.from_pretrained(models / "dino"),
        BitImageProcessorPil.from_pretrained(models / "dino"),
    )
    others = images.flip(3)
    with torch.no_grad():
        a, b = (
            dino(**processor(saved_pictures(x), return_tensors="pt")).last_hidden_state[:, 0] for x in (images, others)
        )
    expected = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    metadata = [{"init_image": image, "edited": other} for image, other in zip(images, others)]
    floor = expected.median().item()
    spec = "dino_similarity:{0},dino_similarity:{0}:column=edited,dino_similarity:{0}:column=edited:floor={1}"
    rewards = score(spec.format(models / "dino", floor), images, metadata=metadata).float()
    torch.testing.assert_close(rewards[0], torch.ones(4))
    torch.testing.assert_close(rewards[1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rewards[2], -(floor - expected).clamp(min=0), rtol=1e-3, atol=1e-5)
    assert expected.std() > 1e-3


def logits_of_vit(models, images) -> torch.Tensor:
    processor = ViTImageProcessorPil.from_pretrained(models / "vit")
    with torch.no_grad():
        vit = ViTForImageClassification.from_pretrained(models / "vit")
        return vit(**processor(saved_pictures(images), return_tensors="pt")).logits


def margins(logits: torch.Tensor, targets: list[int]) -> list[float]:
    return [(row[t] - max(v for i, v in enumerate(row) if i != t)).item() for row, t in zip(logits, targets)]


@pytest.mark.parametrize("kind", ["name", "number", "ClassLabel"])
def test_classifier_margin(models, images, kind):
    """Names and ClassLabels go by name, also where the dataset counts its classes differently; numbers are indices."""
    values, targets = {"name": LABELS, "number": [0, 1, 2, 1], "ClassLabel": [1, 2, 0, 2]}[kind], [0, 1, 2, 1]
    data = data_of([picture()] * 4, kind=values)
    if kind == "ClassLabel":
        data.dataset = data.dataset.cast_column("kind", datasets.ClassLabel(names=["bird", "cat", "dog"]))
    reward = reward_of(f"classifier:{models / 'vit'}:label_column=kind")
    reward.check(data)
    metadata = [{"kind": value, "init_image": image} for value, image in zip(values, images)]
    expected = margins(logits_of_vit(models, images), targets)
    assert score(reward, images, metadata=metadata)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert np.std(expected) > 1e-3


def test_classifier_logit_change(models, images):
    reward = reward_of(f"classifier:{models / 'vit'}:mode=logit_change")
    reward.check(data_of([picture()] * 4, label=LABELS))
    before = images.flip(2)
    change = (logits_of_vit(models, images) - logits_of_vit(models, before))[range(4), [0, 1, 2, 1]]
    metadata = [{"label": label, "init_image": image} for label, image in zip(LABELS, before)]
    assert score(reward, images, metadata=metadata)[0].tolist() == pytest.approx(change.tolist(), abs=1e-4)
    with torch.no_grad():
        reward.components[0].function.model.classifier.weight *= 1e3
    clipped = score(reward, images, metadata=metadata)[0]
    assert clipped.abs().max() == 10 and torch.equal(clipped.sign(), change.sign().double())


def test_zero_shot_classifier(models, images):
    """The classes are the dataset's, those of held-out rows among them."""
    reward = reward_of(f"classifier:{models / 'clip'}")
    reward.check(data_of([picture()] * 3, label=["cat", "dog", "dog"]), data_of([picture()], label=["bird"]))
    inputs = CLIPProcessor.from_pretrained(models / "clip")(
        text=[f"An image of {name}" for name in ("cat", "dog", "bird")],
        images=saved_pictures(images),
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        expected = margins(CLIPModel.from_pretrained(models / "clip")(**inputs).logits_per_image, [0, 1, 2, 1])
    metadata = [{"label": label, "init_image": image} for label, image in zip(LABELS, images)]
    assert score(reward, images, metadata=metadata)[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_models_are_frozen_batched_and_outside_autocast(models, images):
    clip, dino = models / "clip", models / "dino"
    spec = f"clip_score:{clip},dino_similarity:{dino}:column=other,aesthetic:{clip}:head={models / 'head.pth'}"
    metadata = [{"init_image": image, "other": image.flip(1)} for image in images]
    reward = reward_of(spec, reward_batch_size=3)
    seen = []
    for component in reward.components:
        assert not component.function.training
        assert not any(p.requires_grad for p in component.function.parameters())
        component.function.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    learnt = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rewards = score(reward, learnt, metadata=metadata)
    assert seen == [3, 1] * 3 and not rewards.requires_grad
    whole = score(reward_of(spec, reward_batch_size=8), images, metadata=metadata)
    torch.testing.assert_close(rewards, whole, rtol=1e-4, atol=1e-5)


def test_half_precision(models, images):
    """Of a GPU with mixed precision: networks are fp16, heads and scores are not."""
    clip = models / "clip"
    spec = f"clip_score:{clip},aesthetic:{clip}:head={models / 'head.pth'},dino_similarity:{models / 'dino'}:column=o"
    args = Namespace(reward_batch_size=4, reward_timeout=1.0, cache_dir=None, reward_fn=spec)
    moved = Reward(Namespace(mixed_precision="bf16", **vars(args)), device="meta")
    assert {c.function.model.dtype for c in moved.components} == {torch.float16}
    assert {p.dtype for p in moved.components[1].function.head.parameters()} == {torch.float32}
    whole = Reward(Namespace(mixed_precision="no", **vars(args)), device="meta")
    assert {c.function.model.dtype for c in whole.components} == {torch.float32}

    reward = reward_of(spec)
    metadata = [{"init_image": image, "o": image.flip(1)} for image in images]
    exact = score(reward, images, metadata=metadata)
    for component in reward.components:
        component.function.model.half()
    half = score(reward, images, metadata=metadata)
    assert 0 < (half - exact).abs().max() < 1e-2 * exact.abs().max()
    assert (half != half.half()).any()


def test_half_precision_checkpoints_come_up_in_float32_on_cpu(models, tmp_path, images):
    CLIPModel.from_pretrained(models / "clip").half().save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(models / "clip").save_pretrained(tmp_path)
    reward = reward_of(f"clip_score:{tmp_path}", mixed_precision="fp16")
    assert {p.dtype for p in reward.components[0].function.parameters()} == {torch.float32}
    assert score(reward, images).isfinite().all()


# The syntax of --reward_fn


def test_options_weights_and_colons(models):
    dino = models / "dino"
    spec = f"psnr:target=0.5,psnr:floor=25,psnr:init_image:floor=20=-2,jpeg_compressibility=1e-1,dino_similarity:{dino}:column=init_image:floor=0.8=0.5"  # fmt: skip
    parsed = {c.name: (c.weight, c.columns) for c in reward_of(spec).components}
    assert parsed == {
        "psnr:target": (0.5, ["target"]),
        "psnr:floor=25": (1.0, ["target"]),
        "psnr:init_image:floor=20": (-2.0, ["init_image"]),
        "jpeg_compressibility": (0.1, []),
        f"dino_similarity:{dino}:column=init_image:floor=0.8": (0.5, ["init_image"]),
    }
    assert reward_of(spec).components[-1].function.floor == 0.8
    judge = reward_of("vlm_judge:http://localhost:8000/v1:model=org/qwen:7b:answer_column=answer:timeout=7=3")
    (component,) = judge.components
    assert component.weight == 3 and component.columns == ["answer"]
    assert vars(component.function)["model"] == "org/qwen:7b" and component.function.timeout == 7
    assert component.function.url == "http://localhost:8000/v1/chat/completions"


def test_urls_are_taken_whole():
    urls = ["http://a:1/b=0.5", "http://a:1/b?model=2", "https://a/b?model=2&c=3=0.25", "http://a"]
    found = [(c.function.url, c.weight) for c in reward_of(",".join(urls)).components]
    assert found == [
        ("http://a:1/b", 0.5),
        ("http://a:1/b?model=2", 1.0),
        ("https://a/b?model=2&c=3", 0.25),
        ("http://a", 1.0),
    ]


@pytest.mark.parametrize(
    "spec, told",
    [
        ("jpeg", "--reward_fn=jpeg is not known: use jpeg_compressibility"),
        ("psnr,", "--reward_fn= is not known"),
        ("jpeg_compressibility:95", "no option '95'; there are none"),
        ("psnr:target:flor=20", "no option 'flor=20'; there are column, floor"),
        ("psnr:colum=x", "no option 'colum=x'; there are column, floor"),
        ("psnr:floor=low", "floor=low is not a number"),
        ("psnr:target:column=x", "column is given twice, 'target' and 'x'"),
        ("psnr:", "no option ''; there are column, floor"),
        ("psnr=much", "--reward_fn=psnr=much is not known"),
        ("psnr=nan", "--reward_fn=psnr=nan is not known"),
        ("psnr,psnr=2", "names one reward twice"),
        ("classifier", "model is missing; the options are model, label_column, mode"),
        ("classifier:some-model:mode=probability", "mode=probability is neither margin nor logit_change"),
        ("clip_score:no/such-model", "--reward_fn=clip_score:no/such-model: OSError"),
        ("vlm_judge:http://localhost/v1", "model is missing"),
        ("vlm_judge:http://localhost/v1:model=m:score=bert", "score=bert is neither strict nor recall"),
        ("vlm_judge:localhost:model=m", "must be http"),
        ("http://user:secret@host/x", "without a password"),
        ("missing.py:reward", "there is no file missing.py"),
    ],
)
def test_what_is_wrong_is_named(spec, told):
    with pytest.raises(InputError) as error:
        reward_of(spec)
    assert told in str(error.value) and "--reward_fn" in str(error.value) and "secret" not in str(error.value)


def test_untrained_weights_are_refused(models, tmp_path):
    """transformers would make up a classification head for a model without one, with a warning at most."""
    Dinov2Model.from_pretrained(models / "dino").save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no weights for classifier"):
        reward_of(f"classifier:{tmp_path}")


def test_columns_and_classes_are_checked_in_both_splits(models):
    good, vit = data_of([picture()] * 2, label=["cat", "dog"], target=[picture()] * 2), models / "vit"
    reward_of(f"psnr,classifier:{vit}").check(good, good)
    for spec, other, told in [
        ("psnr", data_of([picture()], label=["cat"]), "no column 'target'; there are .*label, init_image"),
        ("psnr:label", good, "column 'label' holds no images; those that do are target, init_image"),
        ("psnr", data_of([picture()] * 2, target=[picture(), None]), "row 1 has no value in column 'target'"),
        (f"classifier:{vit}", data_of([picture()] * 2, label=["cat", None]), "row 1 has no value in column 'label'"),
        (f"classifier:{vit}", data_of([picture()], label=["fish"]), "label 'fish' is not a class; they are cat, dog"),
        (f"classifier:{models / 'clip'}", data_of([picture()] * 2, label=["cat"] * 2), "one class, cat"),
    ]:
        with pytest.raises(InputError, match=told):
            (reward_of(spec).check(good, other) if "one class" not in told else reward_of(spec).check(other))


# Reward files, in the style of other trainers

DDPO_PYTORCH = """
from PIL import Image
import io
import numpy as np
import torch


def jpeg_incompressibility():
    def _fn(images, prompts, metadata):
        if isinstance(images, torch.Tensor):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            images = images.transpose(0, 2, 3, 1)  # NCHW -> NHWC
        images = [Image.fromarray(image) for image in images]
        buffers = [io.BytesIO() for _ in images]
        for image, buffer in zip(images, buffers):
            image.save(buffer, format="JPEG", quality=95)
        sizes = [buffer.tell() / 1000 for buffer in buffers]
        return np.array(sizes), {}

    return _fn


def jpeg_compressibility():
    jpeg_fn = jpeg_incompressibility()

    def _fn(images, prompts, metadata):
        rew, meta = jpeg_fn(images, prompts, metadata)
        return -rew, meta

    return _fn
"""

TRL = """
import torch


class Scorer(torch.nn.Module):
    def __init__(self, *, dtype, scale):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(scale, dtype=dtype))

    @torch.no_grad()
    def __call__(self, images):
        return images.float().mean(dim=(1, 2, 3)) * self.weight


def scorer(scale):
    scorer = Scorer(scale=scale, dtype=torch.float32)

    def _fn(images, prompts, metadata):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        scores = scorer(images)
        return scores, {"brightness": scores / 255, "prompt": list(prompts), "answers": np_strings(len(images))}

    return _fn


def np_strings(count):
    import numpy
    return numpy.array(["yes"] * count, dtype=object)


reward_fn = scorer(0.5)
"""

IMAGEDDPO = """
from __future__ import annotations
from dataclasses import dataclass
import torch


@dataclass
class Settings:
    limit: float = 10.0


def red_reward(images: torch.Tensor, prompts: tuple[str], metadata: tuple) -> tuple[torch.Tensor, dict]:
    before = torch.stack([row["init_image"] for row in metadata])
    change = (images[:, 0] - before[:, 0]).mean(dim=(1, 2)).clamp(-Settings.limit, Settings.limit)
    return change.tolist(), {"length": [len(p) for p in prompts]}


class AsClass:
    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))


def wrong(images, prompts):
    return [0.0] * len(images)


def broken_factory():
    raise ImportError("no such package")


def fails(images, prompts, metadata):
    return images + "text"
"""


@pytest.fixture
def reward_files(tmp_path, monkeypatch) -> Path:
    for name, text in (("ddpo_pytorch", DDPO_PYTORCH), ("trl_style", TRL), ("imageddpo_style", IMAGEDDPO)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def test_ddpo_pytorchs_functions_work_unchanged(reward_files, images):
    spec = "{0}/ddpo_pytorch.py:jpeg_compressibility=2,jpeg_compressibility=0.5"
    reward = reward_of(spec.format(reward_files))
    rewards = score(reward, images)
    assert torch.equal(rewards[0], rewards[1])
    assert torch.equal(reward.total(rewards), 2.5 * rewards[0])


def test_trls_functions_work_unchanged(reward_files, images):
    reward = reward_of(f"{reward_files}/trl_style.py:reward_fn")
    rewards = score(reward, images)
    expected = (images * 255).round().mean(dim=(1, 2, 3)).double() / 2
    torch.testing.assert_close(rewards[0], expected, rtol=1e-6, atol=1e-4)
    score(reward, images[:2], PROMPTS[:2])
    info = reward.take_info()  # numbers per sample; texts are left out
    assert list(info) == ["info/brightness"]
    assert info["info/brightness"] == pytest.approx((expected.sum() + expected[:2].sum()).item() / 6 / 255, rel=1e-5)
    assert reward.take_info() == {}


def test_imageddpos_functions_work_unchanged(reward_files, images):
    file = reward_files / "imageddpo_style.py"
    reward = reward_of(f"{file}:red_reward=-1,{file}:AsClass")
    metadata = [{"init_image": image.flip(0)} for image in images]
    rewards = score(reward, images, metadata=metadata).float()
    torch.testing.assert_close(rewards[0], (images[:, 0] - images[:, 2]).mean(dim=(1, 2)))
    torch.testing.assert_close(rewards[1], images.mean(dim=(1, 2, 3)))
    assert [c.name for c in reward.components] == ["imageddpo_style:red_reward", "imageddpo_style:AsClass"]
    assert reward.take_info() == {"info/imageddpo_style:red_reward/length": sum(map(len, PROMPTS)) / 4}


def test_a_reward_may_write_into_what_it_gets(tmp_path, images):
    """It gets copies: other rewards, other samples of the group and later calls see what was made."""
    (tmp_path / "vandal.py").write_text(
        "def vandal(images, prompts, metadata):\n"
        "    values = images.mean(dim=(1, 2, 3)) + sum(m['init_image'].mean() for m in metadata)\n"
        "    images.zero_()\n    prompts.clear()\n"
        "    for row in metadata:\n        row['init_image'].mul_(0.5)\n        row['boxes'].append(0)\n"
        "    return values\n"
    )
    shared = {"init_image": images[0].clone(), "boxes": [1]}
    reward = reward_of(f"{tmp_path / 'vandal.py'}:vandal,jpeg_incompressibility")
    results = [reward(images, PROMPTS, [shared] * 4) for _ in range(2)]
    assert results[0].equal(results[1]) and shared["boxes"] == [1] and shared["init_image"].equal(images[0])
    means = images.mean(dim=(1, 2, 3)) + 4 * images[0].mean()
    torch.testing.assert_close(results[0][0], means.double(), rtol=1e-5, atol=0)
    assert results[0][1].equal(score("jpeg_incompressibility", images)[0])


@pytest.mark.parametrize(
    "name, told",
    [
        ("wrong", "must take \\(images, prompts, metadata\\)"),
        ("broken_factory", "broken_factory\\(\\) failed: ImportError: no such package"),
        ("absent", "has no function 'absent'; it has red_reward"),
        ("fails", "TypeError: .*imageddpo_style.py, line"),
    ],
)
def test_mistakes_in_a_reward_file_are_named(reward_files, name, told):
    with pytest.raises(InputError, match=told):
        reward_of(f"{reward_files}/imageddpo_style.py:{name}").check(data_of([picture()]))


# Servers


class Handler(BaseHTTPRequestHandler):
    """Answers as its path says; keeps the bodies it got."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        server, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            server.requests.append((path, dict(self.headers), json.loads(body)))
            attempt = sum(p == path for p, _, _ in server.requests)
        count = len(server.requests[-1][2].get("images", []))
        answer, status = json.dumps({"rewards": [0.5] * count}), 200
        if path == "/mean":
            answer = json.dumps(self.mean(json.loads(body)))
        elif path == "/together":
            try:
                server.barrier.wait(timeout=5)
            except threading.BrokenBarrierError:
                status = 400
        elif path in ("/slow", "/slow_once") and (path == "/slow" or attempt == 1):
            time.sleep(1)
        elif path == "/down" or (path == "/flaky" and attempt <= 2):
            status, answer = 503, "out of memory"
        elif path == "/busy" and attempt == 1:
            status, answer = 429, "later"
        elif path == "/refuses":
            status, answer = 422, f"bad key {self.headers.get('Authorization')}"
        elif path == "/moved":
            status = 307
        elif path == "/short":
            answer = json.dumps({"rewards": [0.5] * (count - 1)})
        elif path == "/nan":
            answer = json.dumps({"rewards": [float("nan")] * count})
        elif path == "/texts":
            answer = json.dumps({"rewards": ["good"] * count})
        elif path == "/malformed":
            answer = "<html>"
        elif path == "/list":
            answer = "[1, 2, 3]"
        elif path == "/closed" or (path == "/closed_once" and attempt == 1):
            return self.connection.close()
        elif path == "/cut" and attempt == 1:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            return self.wfile.write(b'{"rew')
        elif path.endswith("/chat/completions"):
            answer = json.dumps(self.chat(json.loads(body)))
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/mean")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may be out of patience
            self.wfile.write(answer.encode())

    def mean(self, request: dict) -> dict:
        pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in request["images"]]
        return {
            "rewards": [float(p.mean()) for p in pixels],
            "info": {"words": [len(p.split()) for p in request["prompts"]]},
        }

    def chat(self, request: dict) -> dict:
        """Says whether the picture is bright, and repeats the question."""
        text, image = request["messages"][0]["content"]
        kind, data = image["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64" and text["type"] == "text" and image["type"] == "image_url"
        bright = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean() > 127
        reply = f"It is {'BRIGHT' if bright else 'dark'}. You asked: {text['text']}"
        return {"choices": [{"message": {"role": "assistant", "content": reply}}]} if "none" not in reply else {}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(train, "HTTP_BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.lock, server.requests, server.barrier = threading.Lock(), [], threading.Barrier(4)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_reward_server(server, images):
    reward = reward_of(f"{server.url}/mean")
    metadata = [{"init_image": image, "name": f"row {i}", "tags": [i]} for i, image in enumerate(images)]
    rewards = score(reward, images, metadata=metadata)
    assert rewards[0].tolist() == [np.asarray(p).mean() for p in saved_pictures(images)]  # in order, and lossless
    assert reward.take_info() == {"info/words": sum(len(p.split()) for p in PROMPTS) / 4}
    bodies = sorted((body for _, _, body in server.requests), key=lambda body: body["metadata"][0]["tags"])
    assert [len(body["images"]) for body in bodies] == [3, 1]  # --reward_batch_size
    assert sum((body["prompts"] for body in bodies), []) == PROMPTS
    assert bodies[1]["metadata"] == [{"name": "row 3", "tags": [3]}]


def test_requests_are_concurrent(server, images):
    """The server answers none before it has four."""
    assert score(reward_of(f"{server.url}/together", reward_batch_size=1), images).tolist() == [[0.5] * 4]


def test_nothing_is_tried_again_once_a_signal_came(server, images, monkeypatch):
    monkeypatch.setattr(train, "STOPPING", threading.Event())
    train.STOPPING.set()
    with pytest.raises(RuntimeError, match="HTTP 503"):
        score(f"{server.url}/down", images[:1], PROMPTS[:1])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "path, attempts", [("flaky", 3), ("busy", 2), ("closed_once", 2), ("cut", 2), ("slow_once", 2)]
)
def test_what_passes_is_retried(server, images, path, attempts):
    reward = reward_of(f"{server.url}/{path}", reward_batch_size=4, reward_timeout=0.5)
    assert score(reward, images).tolist() == [[0.5] * 4]
    assert len(server.requests) == attempts


@pytest.mark.parametrize(
    "path, attempts, told",
    [
        ("down", 5, "5 of 5 attempts: HTTP 503: out of memory"),
        ("closed", 5, "5 of 5 attempts: RemoteDisconnected"),
        ("slow", 5, "5 of 5 attempts: TimeoutError: timed out"),
        ("refuses", 1, "1 of 5 attempts: HTTP 422"),
        ("moved", 1, "1 of 5 attempts: HTTP 307"),
        ("short", 1, "4 images, but not as many rewards"),
        ("nan", 1, "returned nan for image 0"),
        ("texts", 1, "returned what is no list of numbers"),
        ("malformed", 1, "the answer is no JSON object: <html>"),
        ("list", 1, "the answer is no JSON object: \\[1, 2, 3\\]"),
    ],
)
def test_a_server_that_stays_down_or_talks_nonsense_stops_the_run(server, images, path, attempts, told):
    reward = reward_of(f"{server.url}/{path}", reward_batch_size=4, reward_timeout=0.2)
    with pytest.raises((RuntimeError, ValueError), match=told):
        score(reward, images)
    assert len(server.requests) == attempts


def test_back_off_is_exponential(server, images, monkeypatch):
    pauses = []
    monkeypatch.setattr(train.STOPPING, "wait", pauses.append)
    monkeypatch.setattr(train, "HTTP_BACKOFF", 1.0)
    with pytest.raises(RuntimeError):
        score(f"{server.url}/down", images[:1], PROMPTS[:1])
    assert pauses == [1, 2, 4, 8]


def test_no_server(images, monkeypatch):
    monkeypatch.setattr(train, "HTTP_BACKOFF", 0.01)
    with pytest.raises(InputError, match="5 of 5 attempts: URLError.*refused"):
        reward_of("http://127.0.0.1:9/score").check(data_of([picture()]))


def test_vlm_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "very-secret\n")
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    metadata = [
        {"q": "Is it bright?", "a": "Bright"},
        {"q": ["Is it dark?", "How many?"], "a": ["dark", "seven dark horses"]},
    ]
    spec = f"vlm_judge:{server.url}/v1:model=judge:7b:question_column=q:answer_column=a:api_key_env=JUDGE_KEY"
    reward = reward_of(f"{spec},{spec}:score=recall=2")
    assert score(reward, images, ["", ""], metadata).tolist() == [[1.0, 0.5], [1.0, pytest.approx((1 + 1 / 3) / 2)]]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge:7b"
    assert headers["Authorization"] == "Bearer very-secret"
    assert reward.take_info()[f"info/{spec}/vlm_strict"] == 0.75


def test_vlm_judge_of_prompts(server, images):
    """As LLaVA-BERTScore in ddpo-pytorch: describe the image, and compare with the prompt."""
    prompts = ["what is going on here", "image", "two of three are dark", "no"]
    rewards = score(f"vlm_judge:{server.url}/v1:model=judge:score=recall", images, prompts)
    assert {body["messages"][0]["content"][0]["text"] for _, _, body in server.requests} == {train.VLM_QUESTION}
    assert rewards[0, :2].tolist() == pytest.approx([0.8, 1.0]) and rewards[0, 3] == 0


def test_vlm_judge_fails_clearly_and_keeps_the_key(server, images, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    with pytest.raises(ValueError, match="not a chat completion"):
        score(f"vlm_judge:{server.url}/v1:model=none:question_column=q", images, metadata=[{"q": "none?"}] * 4)
    with pytest.raises(InputError, match="do not pair up"):
        score(f"vlm_judge:{server.url}/v1:model=m", images, prompts=[""] * 4)
    with pytest.raises(RuntimeError, match="HTTP 422: bad key Bearer") as error:
        train.post_json(f"{server.url}/refuses", {}, 1.0, "very-secret")
    assert "very-secret" not in str(error.value)


# Rewards in a run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion in `sd` and six pictures with prompts, labels and targets in `images`."""
    folder = tmp_path_factory.mktemp("workplace")
    StableDiffusionImg2ImgDDPOPipeline(**tiny_components()).save_pretrained(folder / "sd")
    (folder / "images").mkdir()
    with open(folder / "images" / "metadata.jsonl", "w") as file:
        for i in range(6):
            picture(16, color=(40 * i, 60, 40)).save(folder / "images" / f"{i}.png")
            row = {"file_name": f"{i}.png", "text": f"disc {i}", "label": LABELS[i % 4]}
            file.write(json.dumps(row) + "\n")
    return folder


def arguments(workplace: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={workplace / 'sd'}",
        f"--train_data_dir={workplace / 'images'}",
        f"--output_dir={workplace / 'out'}",
        *"--resolution=16 --num_inference_steps=10 --strength=0.5 --num_validation_images=2 --group_size=2".split(),
        *"--samples_per_epoch=8 --sample_batch_size=2 --num_train_epochs=1".split(),
        *more,
    ]


def test_rewards_are_computed_while_the_next_batch_is_sampled(workplace, monkeypatch):
    """A reward that is not done before the next batch has been sampled would wait forever without this."""
    args = train.parse_args(arguments(workplace))
    accelerator = Accelerator(cpu=True)
    args.mixed_precision = accelerator.mixed_precision
    monkeypatch.setattr(train.signal, "signal", lambda *args: None)
    ranks = Ranks(accelerator)
    data, _ = train.load_data(args)
    pipe = train.load_pipeline(args, accelerator)
    schedule = train.plan_schedule(pipe, args)
    sampled, waited, threads = [], [], set()
    sample_batch = train.sample_batch

    def observed(*args):
        result = sample_batch(*args)
        sampled.append(time.monotonic())
        return result

    def slow(images, prompts, metadata):
        number, end = len(waited), time.monotonic() + 20
        while len(sampled) < min(number + 2, 4) and time.monotonic() < end:
            time.sleep(0.01)
        waited.append(time.monotonic() < end)
        threads.add(threading.current_thread())
        return images.mean(dim=(1, 2, 3))

    reward = reward_of("psnr:init_image")
    reward.components[0].function = slow
    monkeypatch.setattr(train, "sample_batch", observed)
    _, _, rewards = train.collect(pipe, ConditionCache(pipe), data, reward, schedule, args, 0, ranks)
    assert waited == [True] * 4 and len(threads) == 1 and threading.main_thread() not in threads
    assert (rewards != 0).all()


def test_a_wrong_reward_is_found_before_stable_diffusion_loads(workplace, monkeypatch):
    monkeypatch.setattr(train.signal, "signal", lambda *args: None)
    monkeypatch.setattr(train, "load_pipeline", lambda *args: pytest.fail("Stable Diffusion was loaded"))
    with pytest.raises(InputError, match="--reward_fn=psnr: no column 'target'; there are .*label, init_image"):
        train.main(arguments(workplace, "--reward_fn=psnr", f"--output_dir={workplace / 'other'}"))
    with pytest.raises(InputError, match="--reward_batch_size=0 must be greater than 0"):
        train.parse_args(arguments(workplace, "--reward_batch_size=0"))


def test_a_run_with_several_rewards(workplace, models, reward_files):
    clip, file = models / "clip", reward_files / "imageddpo_style.py"
    parts = [f"clip_score:{clip}", f"classifier:{models / 'vit'}", f"{file}:red_reward"]
    run = subprocess.run(
        [
            *[sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
            str(ROOT / "train_img2img_ddpo.py"),
            *arguments(workplace, f"--reward_fn={parts[0]}=1.0,{parts[1]}=0.5,{parts[2]}=-1"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    with open(workplace / "out" / "metrics.csv") as text:
        (row,) = csv.DictReader(text)
    means = [float(row[f"reward_mean/{name}"]) for name in (*parts[:2], "imageddpo_style:red_reward")]
    assert float(row["reward_mean"]) == pytest.approx(means[0] + 0.5 * means[1] - means[2], rel=1e-4, abs=1e-6)
    assert float(row["info/imageddpo_style:red_reward/length"]) == 6  # of "disc 0", in the rollout alone
