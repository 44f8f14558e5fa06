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
Make the offline demo: a tiny Stable Diffusion trained on drawn shapes, and a folder of foggy pictures to restore.

    python tests/demo/make_demo.py --output_dir tests/demo

It writes `model/`, a `StableDiffusionPipeline` folder of a few megabytes in which every part is small but real, and
`images/`, a `datasets` imagefolder with the splits `train` and `validation`. The model has only ever generated clean
pictures, so image-to-image leaves the fog where it is; taking it away is what a reinforcement learning run has to
learn. Everything follows from `--seed`. On one CPU core it takes about forty minutes, nearly all of it training;
`--stage` repeats a single stage on top of what the earlier ones left in the output folder.
"""

import argparse
import colorsys
import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


RESOLUTION = 64
SUPERSAMPLING = 4  # shapes are drawn this much larger and scaled down, which is what antialiases them

# The degradation of the image folder: x -> (1 - FOG) * x + FOG * FOG_LEVEL + NOISE * gaussian, values in [0, 1]. The
# fog is the same everywhere and on every picture, so that a short run can learn to undo it.
FOG = 0.4
FOG_LEVEL = 0.85
NOISE = 0.04

TRAIN_ROWS = 24
VALIDATION_ROWS = 8

# Hue, saturation and value. A shape takes its colour as it is, a background a deeper version of it.
COLORS = {
    "red": (0.985, 0.84, 0.93),
    "orange": (0.075, 0.88, 0.98),
    "yellow": (0.140, 0.80, 0.99),
    "green": (0.365, 0.78, 0.75),
    "teal": (0.490, 0.80, 0.80),
    "blue": (0.605, 0.82, 0.92),
    "purple": (0.755, 0.68, 0.82),
    "pink": (0.915, 0.48, 0.98),
}
BACKGROUNDS = ("red", "green", "teal", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "diamond")

TEXT_LENGTH = 32
TEXT_WIDTH = 48
CAPTION_DROPOUT = 0.15


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def to_rgb(hue, saturation, value):
    """HSV in [0, 1] (out-of-range values are clamped, hue wraps around) to an RGB tuple of 0..255."""
    rgb = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return tuple(round(255 * channel) for channel in rgb)


def draw_background(name, rng):
    """A deep version of the colour `name`: plain in a third of the pictures, a soft linear gradient in the others."""
    hue, saturation, value = COLORS[name]
    value = value * rng.uniform(0.42, 0.62)
    contrast = rng.choice((0.0, rng.uniform(0.15, 0.35), rng.uniform(0.15, 0.35)))
    dark = np.array(to_rgb(hue, saturation, value * (1 - contrast)), dtype=np.float32)
    light = np.array(to_rgb(hue, saturation * (1 - 0.5 * contrast), value * (1 + contrast)), dtype=np.float32)

    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : RESOLUTION * 1j, -1 : 1 : RESOLUTION * 1j]
    ramp = (0.5 + 0.5 * (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2))[..., None]
    return Image.fromarray((dark + (light - dark) * ramp).round().astype(np.uint8))


def outline(shape, rng):
    """Corner points of a polygonal `shape` of about unit radius, turned by a small random angle."""
    if shape == "square":
        points = [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    elif shape == "diamond":
        points = [(0, -1.15), (0.78, 0), (0, 1.15), (-0.78, 0)]
    elif shape == "triangle":
        points = [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    elif shape == "star":
        radii = [1.15 if corner % 2 == 0 else 0.48 for corner in range(10)]
        points = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    elif shape == "heart":
        turns = [2 * math.pi * i / 80 for i in range(80)]
        points = [
            (
                16 * math.sin(t) ** 3 / 16,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
            )
            for t in turns
        ]
    else:
        raise ValueError(f"unknown shape {shape!r}")
    angle = math.radians(rng.uniform(-10, 10))
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def draw_shape(picture, shape, color, center, radius, rng):
    """Draw one antialiased shape onto `picture`; `center` and `radius` are in pixels of the finished picture."""
    scale = SUPERSAMPLING
    mask = Image.new("L", (RESOLUTION * scale, RESOLUTION * scale))
    pen = ImageDraw.Draw(mask)
    (x, y), r = (center[0] * scale, center[1] * scale), radius * scale
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=0)
    else:
        pen.polygon([(x + r * px, y + r * py) for px, py in outline(shape, rng)], fill=255)

    hue, saturation, value = COLORS[color]
    jittered = to_rgb(hue + rng.uniform(-0.01, 0.01), saturation + rng.uniform(-0.04, 0.04), value)
    mask = mask.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)
    picture.paste(Image.new("RGB", picture.size, jittered), (0, 0), mask)


def article(phrase):
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def draw_picture(rng):
    """One random picture and its caption. With two shapes, the one that the caption names first is on the left."""
    background = rng.choice(BACKGROUNDS)
    count = rng.choice((1, 2))
    # Shapes never share a colour with each other or with the background, else a caption would not tell them apart.
    colors = rng.sample([color for color in COLORS if color != background], count)
    shapes = [rng.choice(SHAPES) for _ in range(count)]

    picture = draw_background(background, rng)
    if count == 1:
        places = [((32 + rng.uniform(-7, 7), 32 + rng.uniform(-7, 7)), rng.uniform(15, 21))]
    else:
        tilt = rng.uniform(-10, 10)
        places = [
            ((18 + rng.uniform(-1.5, 1.5), 32 + tilt + rng.uniform(-2, 2)), rng.uniform(10.5, 13)),
            ((46 + rng.uniform(-1.5, 1.5), 32 - tilt + rng.uniform(-2, 2)), rng.uniform(10.5, 13)),
        ]
    for shape, color, (center, radius) in zip(shapes, colors, places):
        draw_shape(picture, shape, color, center, radius, rng)
    subject = " and ".join(article(f"{color} {shape}") for color, shape in zip(colors, shapes))
    return picture, f"{subject} on {article(background)} background"


def draw_pictures(count, seed):
    """`count` pictures as a (count, 3, 64, 64) tensor in [0, 1], and their captions."""
    rng = random.Random(seed)
    pictures, captions = zip(*(draw_picture(rng) for _ in range(count)))
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 255, list(captions)


def degrade(pixels, fog=FOG, noise=NOISE, generator=None):
    """Fog and noise on a batch in [0, 1]; `fog` and `noise` are numbers, or tensors with one value per row."""
    grain = torch.randn(pixels.shape, generator=generator)
    return ((1 - fog) * pixels + fog * FOG_LEVEL + noise * grain).clamp(0, 1)


def make_images(folder, seed):
    """Write the image folder: per split the degraded and the clean pictures, and the captions in `metadata.jsonl`."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, (split, rows) in enumerate((("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS))):
        # These seeds are far from those of the model's own pictures: the model has seen none of these.
        pixels, captions = draw_pictures(rows, seed + 1000 + number)
        degraded = degrade(pixels, generator=torch.Generator().manual_seed(seed + 1000 + number))
        (folder / split).mkdir(parents=True)
        with open(folder / split / "metadata.jsonl", "w") as metadata:
            for index in range(rows):
                names = {"file_name": f"{index:02d}_foggy.png", "target_file_name": f"{index:02d}_clean.png"}
                for name, tensor in zip(names.values(), (degraded[index], pixels[index])):
                    array = (tensor.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
                    Image.fromarray(array).save(folder / split / name, optimize=True)
                metadata.write(json.dumps({**names, "text": captions[index]}) + "\n")
    print(f"wrote {TRAIN_ROWS} + {VALIDATION_ROWS} degraded pictures to {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two batches in [0, 1], averaged over the rows."""
    return (-10 * (a - b).square().flatten(1).mean(1).clamp_min(1e-10).log10()).mean().item()


def randomly_degraded(pixels, share=0.3):
    """Degrade a random share of a batch at random strength: image-to-image encodes such pictures too."""
    rows = len(pixels)
    chosen = (torch.rand(rows, 1, 1, 1) < share).float()
    fog = chosen * torch.rand(rows, 1, 1, 1) * 0.65
    brightness = 1 - chosen * torch.rand(rows, 1, 1, 1) * 0.4
    noise = chosen * torch.rand(rows, 1, 1, 1) * 0.08
    return degrade(pixels * brightness, fog, noise)


def save_half(model, folder):
    """
    Save a model with weights in float16. Its config goes on saying float32: transformers loads the dtype named there,
    diffusers always float32, so that a pipeline comes up in one dtype even if the caller asks for none.
    """
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        weights = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def train_vae(folder, steps, batch_size, seed):
    """Train the autoencoder on clean and degraded pictures: L1 + L2, and a KL term that only bounds the latents."""
    torch.manual_seed(seed + 1)
    pixels, _ = draw_pictures(4096, seed + 1)
    held_out, _ = draw_pictures(64, seed + 2)
    vae = AutoencoderKL(
        sample_size=RESOLUTION,
        latent_channels=4,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    print(f"VAE: {vae.num_parameters():,} parameters, {steps} steps of {batch_size} pictures")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)

    start = time.time()
    for step in range(1, steps + 1):
        batch = randomly_degraded(pixels[torch.randint(len(pixels), (batch_size,))]) * 2 - 1
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(reconstruction, batch) + F.mse_loss(reconstruction, batch) + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                latents = vae.encode(held_out * 2 - 1).latent_dist.mean
                quality = psnr((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), held_out)
            # The UNet expects latents of unit variance.
            vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
            save_half(vae, folder)
            print(
                f"VAE step {step}: loss {loss.item():.4f}, held-out {quality:.2f} dB, "
                f"scaling factor {vae.config.scaling_factor}, {time.time() - start:.0f} s",
                flush=True,
            )


def polish_vae(folder, steps, batch_size, seed):
    """
    Train the decoder further with the encoder frozen. Steps are cheaper this way, and the latents stay the same, so
    that this may come before or after the training of the UNet.
    """
    torch.manual_seed(seed + 4)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    pixels, _ = draw_pictures(6144, seed + 4)
    held_out, _ = draw_pictures(64, seed + 2)
    pixels = randomly_degraded(pixels) * 2 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.sample() for chunk in pixels.split(64)])
        held_out_latents = vae.encode(held_out * 2 - 1).latent_dist.mean

    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(1, steps + 1):
        rows = torch.randint(len(pixels), (batch_size,))
        reconstruction = vae.decode(latents[rows]).sample
        loss = F.l1_loss(reconstruction, pixels[rows]) + 4 * F.mse_loss(reconstruction, pixels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                quality = psnr((vae.decode(held_out_latents).sample / 2 + 0.5).clamp(0, 1), held_out)
            save_half(vae, folder)
            print(
                f"decoder step {step}: loss {loss.item():.4f}, held-out {quality:.2f} dB, {time.time() - start:.0f} s",
                flush=True,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, text encoder and UNet
# ---------------------------------------------------------------------------------------------------------------------


def byte_symbols():
    """The 256 printable symbols that stand for the bytes in a byte-level BPE vocabulary, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def make_tokenizer(folder):
    """
    A CLIP tokenizer with a tiny vocabulary: all bytes, so that any string can be encoded, and merges learned by plain
    BPE until each word of the captions is one token.
    """
    words = sorted({*COLORS, *SHAPES, "a", "an", "and", "on", "background"})
    splits = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while any(len(split) > 1 for split in splits.values()):
        counts = {}
        for split in splits.values():
            for pair in zip(split, split[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        for word, split in splits.items():
            merged, index = [], 0
            while index < len(split):
                length = 2 if split[index : index + 2] == best else 1
                merged.append("".join(split[index : index + length]))
                index += length
            splits[word] = tuple(merged)

    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_scheduler():
    """The scheduler of Stable Diffusion 1.5."""
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    # PNDM itself ignores this entry, but a DDIM scheduler made from this config would clip the latents without it.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def train_unet(folder, steps, batch_size, seed):
    """
    Train the UNet and the text encoder together, on clean pictures only, and save the whole pipeline. A pipeline with
    the averaged weights so far is saved every now and then, so that a run which is cut short leaves a usable one.
    """
    torch.manual_seed(seed + 3)
    tokenizer = make_tokenizer(folder / "tokenizer")
    scheduler = make_scheduler()
    noise_scheduler = DDPMScheduler.from_config(scheduler.config)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()

    # Encode everything once. The encoder's own variance is tiny, so its mean is as good as a sample.
    pixels, captions = draw_pictures(6144, seed + 3)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in pixels.split(64)])
    latents = latents * vae.config.scaling_factor
    tokens = tokenizer(
        ["", *captions], padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    null_tokens, tokens = tokens[:1], tokens[1:]

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=1.0,
        )
    )
    # As in Stable Diffusion 1.5, `attention_head_dim` is the number of heads, and the innermost block has none.
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    print(
        f"UNet: {unet.num_parameters():,} parameters, text encoder: {text_encoder.num_parameters():,}, "
        f"vocabulary: {len(tokenizer)}, {steps} steps of {batch_size} latents"
    )

    text_encoder.train()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=0.998)
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.1)

    start, losses = time.time(), []
    for step in range(1, steps + 1):
        rows = torch.randint(len(latents), (batch_size,))
        dropped = torch.rand(batch_size, 1) < CAPTION_DROPOUT
        context = text_encoder(torch.where(dropped, null_tokens, tokens[rows])).last_hidden_state
        noise = torch.randn_like(latents[rows])
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch_size,))
        noisy = noise_scheduler.add_noise(latents[rows], noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, context).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)

        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"UNet step {step}: loss {np.mean(losses[-100:]):.4f}, {time.time() - start:.0f} s", flush=True)
        if step % 250 == 0 or step == steps:
            average.store(parameters)
            average.copy_to(parameters)
            save_pipeline(pipeline, folder)
            average.restore(parameters)


def save_pipeline(pipeline, folder):
    """Write `pipeline` to `folder`, with weights in float16; its VAE is there already."""
    save_half(pipeline.unet, folder / "unet")
    save_half(pipeline.text_encoder, folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Gets the folders `images` and `model`.")
    parser.add_argument(
        "--stage", choices=("all", "images", "vae", "decoder", "unet"), default="all", help="What to make."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--vae_batch_size", type=int, default=12)
    parser.add_argument("--decoder_steps", type=int, default=1500)
    parser.add_argument("--unet_steps", type=int, default=2500)
    parser.add_argument("--unet_batch_size", type=int, default=32)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the model is so small that more threads only get in each other's way
    if args.stage in ("all", "images"):
        make_images(args.output_dir / "images", args.seed)
    if args.stage in ("all", "vae"):
        train_vae(args.output_dir / "model" / "vae", args.vae_steps, args.vae_batch_size, args.seed)
    if args.stage in ("all", "decoder"):
        polish_vae(args.output_dir / "model" / "vae", args.decoder_steps, args.vae_batch_size, args.seed)
    if args.stage in ("all", "unet"):
        train_unet(args.output_dir / "model", args.unet_steps, args.unet_batch_size, args.seed)


if __name__ == "__main__":
    main()
