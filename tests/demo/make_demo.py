"""
Make the offline demo: a tiny Stable Diffusion trained on drawn shapes, and a folder of foggy pictures to restore.

    python tests/demo/make_demo.py --output_dir tests/demo

It writes `model/`, a small but real `StableDiffusionPipeline`, and `images/`, a `datasets` imagefolder with the splits
`train` and `validation`. The model has only ever generated clean pictures, so image-to-image leaves the fog where it
is; taking it away is what reinforcement learning has to learn. On one CPU core it takes about an hour and a half.
"""

import argparse
import colorsys
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


RESOLUTION = 64
SUPERSAMPLING = 4  # shapes are drawn this much larger and scaled down, which is what antialiases them
# A shape takes its colour as it is, a background a deeper version of it.
COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
HUES = (0.985, 0.075, 0.140, 0.365, 0.490, 0.605, 0.755, 0.915)
SATURATIONS = (0.84, 0.88, 0.80, 0.78, 0.80, 0.82, 0.68, 0.48)
VALUES = (0.93, 0.98, 0.99, 0.75, 0.80, 0.92, 0.82, 0.98)
HSV = dict(zip(COLORS, zip(HUES, SATURATIONS, VALUES)))
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "diamond")
TURNS = [2 * math.pi * i / 80 for i in range(80)]
HEART = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in TURNS]
CORNERS = {  # for a radius of about one; circle and ring have none
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "diamond": [(0, -1.15), (0.78, 0), (0, 1.15), (-0.78, 0)],
    "triangle": [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate((1.15, 0.48) * 5)],
    "heart": [(math.sin(t) ** 3, -height / 16 - 0.1) for t, height in zip(TURNS, HEART)],
}


def to_rgb(hue, saturation, value):
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def draw_shape(picture, shape, color, place, rng):
    """Draw one antialiased shape onto `picture`; `place` is its x, y and radius in pixels of the finished picture."""
    x, y, r = (SUPERSAMPLING * value for value in place)
    mask = Image.new("L", (RESOLUTION * SUPERSAMPLING, RESOLUTION * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    if shape in CORNERS:
        angle = math.radians(rng.uniform(-10, 10))
        cos, sin = math.cos(angle), math.sin(angle)
        pen.polygon([(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in CORNERS[shape]], fill=255)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=0)
    hue, saturation, value = HSV[color]
    jittered = to_rgb(hue + rng.uniform(-0.01, 0.01), saturation + rng.uniform(-0.04, 0.04), value)
    picture.paste(jittered, (0, 0, *picture.size), mask.resize(picture.size, Image.Resampling.BOX))


def draw_pictures(count, seed):
    """`count` pictures as a (count, 3, 64, 64) tensor in [0, 1], and captions that name the left shape first."""
    rng = random.Random(seed)
    pictures, captions = [], []
    for _ in range(count):
        background = rng.choice(("red", "green", "teal", "blue", "purple"))
        number = rng.choice((1, 2))
        # Shapes share no colour with each other or with the background, else a caption would not tell them apart.
        colors = rng.sample([color for color in COLORS if color != background], number)
        shapes = [rng.choice(SHAPES) for _ in range(number)]
        # A third of the backgrounds are plain, the others have a soft linear gradient.
        hue, saturation, value = HSV[background]
        value = value * rng.uniform(0.42, 0.62)
        contrast = rng.choice((0.0, rng.uniform(0.15, 0.35), rng.uniform(0.15, 0.35)))
        dark = np.array(to_rgb(hue, saturation, value * (1 - contrast)))
        light = np.array(to_rgb(hue, saturation * (1 - 0.5 * contrast), value * (1 + contrast)))
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[-1 : 1 : RESOLUTION * 1j, -1 : 1 : RESOLUTION * 1j]
        ramp = (0.5 + 0.5 * (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2))[..., None]
        picture = Image.fromarray((dark + (light - dark) * ramp).round().astype(np.uint8))
        if number == 1:
            places = [(32 + rng.uniform(-7, 7), 32 + rng.uniform(-7, 7), rng.uniform(15, 21))]
        else:
            tilt = rng.uniform(-10, 10)
            centers = ((18, 32 + tilt), (46, 32 - tilt))
            places = [(x + rng.uniform(-1.5, 1.5), y + rng.uniform(-2, 2), rng.uniform(10.5, 13)) for x, y in centers]
        for shape, color, place in zip(shapes, colors, places):
            draw_shape(picture, shape, color, place, rng)
        pictures.append(np.asarray(picture))
        subject = " and ".join(f"a {color} {shape}" for color, shape in zip(colors, shapes))
        captions.append(f"{subject} on a {background} background".replace("a orange", "an orange"))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, captions


def degrade(pixels, fog, noise, generator=None):
    """Fog and noise on a batch in [0, 1]; `fog` and `noise` are numbers, or tensors with one value per row."""
    return ((1 - fog) * pixels + fog * 0.85 + noise * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


def randomly_degraded(pixels):
    """Degrade a random share of a batch at random strength: image-to-image encodes such pictures too."""
    draw, fog, dimming, noise = torch.rand(4, len(pixels), 1, 1, 1)
    chosen = (draw < 0.3).float()
    return degrade(pixels * (1 - chosen * dimming * 0.4), chosen * fog * 0.65, chosen * noise * 0.08)


def make_images(folder):
    """Write the image folder: per split the degraded and the clean pictures, and the captions in `metadata.jsonl`."""
    shutil.rmtree(folder, ignore_errors=True)
    # These seeds are none of the model's own pictures: the model has seen none of these.
    for split, rows, seed in (("train", 24, 1000), ("validation", 8, 1001)):
        (folder / split).mkdir(parents=True)
        pixels, captions = draw_pictures(rows, seed)
        # The fog is the same everywhere and on every picture, so that a short run can learn to undo it.
        degraded = degrade(pixels, fog=0.4, noise=0.04, generator=torch.Generator().manual_seed(seed))
        with open(folder / split / "metadata.jsonl", "w") as metadata:
            for index, caption in enumerate(captions):
                names = {"file_name": f"{index:02d}_foggy.png", "target_file_name": f"{index:02d}_clean.png"}
                for name, tensor in zip(names.values(), (degraded[index], pixels[index])):
                    array = (tensor.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
                    Image.fromarray(array).save(folder / split / name, optimize=True)
                metadata.write(json.dumps({**names, "text": caption}) + "\n")


def save_half(part, folder):
    """Save a part of the pipeline with its weights in float16, though its config says float32."""
    # transformers loads the dtype named there, diffusers always float32: so the pipeline comes up in a single one.
    part.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def train(name, parameters, get_loss, steps, lr=1.5e-3, weight_decay=1e-4, warmup=0.1, average=None):
    """Minimize `get_loss()` with AdamW on a one-cycle schedule, and keep the moving `average` if there is one."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=warmup)
    for _ in tqdm(range(steps), name):
        loss = get_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.step(parameters)


def train_vae(folder):
    """Train the autoencoder on clean and degraded pictures: L1 + L2, and a KL term that only bounds the latents."""
    torch.manual_seed(1)
    pixels, _ = draw_pictures(4096, seed=1)
    held_out, _ = draw_pictures(64, seed=2)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    vae = AutoencoderKL(block_out_channels=(16, 32, 48), norm_num_groups=8, sample_size=RESOLUTION, **blocks)

    def get_loss():
        batch = randomly_degraded(pixels[torch.randint(len(pixels), (12,))]) * 2 - 1
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(reconstruction, batch) + F.mse_loss(reconstruction, batch) + 1e-4 * kl

    train("VAE", list(vae.parameters()), get_loss, 1500, lr=2e-3, warmup=0.15)
    with torch.no_grad():
        latents = vae.encode(held_out * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))  # the UNet expects unit variance
    save_half(vae, folder)


def polish_vae(folder):
    """Train the decoder further; the encoder and so the latents stay."""
    torch.manual_seed(4)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    pixels = randomly_degraded(draw_pictures(6144, seed=4)[0]) * 2 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.sample() for chunk in pixels.split(64)])

    def get_loss():
        rows = torch.randint(len(pixels), (12,))
        reconstruction, target = vae.decode(latents[rows]).sample, pixels[rows]
        return F.l1_loss(reconstruction, target) + 4 * F.mse_loss(reconstruction, target)

    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    train("decoder", parameters, get_loss, 1500)
    save_half(vae, folder)


def make_tokenizer():
    """A CLIP tokenizer of all bytes, and of merges learned by plain BPE until each caption word is one token."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in (*COLORS, *SHAPES, "a", "an", "and", "on", "background")]
    merges = []
    while any(len(split) > 1 for split in splits):
        counts = Counter(pair for split in splits for pair in zip(split, split[1:]))
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        for split in splits:
            for index in range(len(split)):
                if tuple(split[index : index + 2]) == best:
                    split[index : index + 2] = ["".join(best)]
    symbols = [symbol for _, symbol in sorted(bytes_to_unicode().items())]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges, model_max_length=32)


def train_unet(folder):
    """Train the UNet and the text encoder together, on clean pictures only, and save the whole pipeline."""
    torch.manual_seed(3)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = make_tokenizer()
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)  # that of Stable Diffusion 1.5
    # PNDM itself ignores this entry, but a DDIM scheduler made from this config would clip the latents without it.
    scheduler.register_to_config(clip_sample=False)

    # Encode everything once. The encoder's own variance is tiny, so its mean is as good as a sample.
    pixels, captions = draw_pictures(6144, seed=3)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in pixels.split(64)])
    latents = latents * vae.config.scaling_factor
    tokens = tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt").input_ids

    sizes = dict(hidden_size=48, projection_dim=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=tokens.shape[1], **sizes, **special)
    text_encoder = CLIPTextModel(config)
    # As in Stable Diffusion 1.5, `attention_head_dim` is the number of heads, and the innermost block has none.
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    sizes = dict(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, cross_attention_dim=48)
    unet = UNet2DConditionModel(16, down_block_types=down, up_block_types=up, attention_head_dim=2, **sizes)
    parts = (vae, text_encoder, tokenizer, unet, scheduler)
    pipeline = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=0.998)

    def get_loss():
        rows = torch.randint(len(latents), (16,))
        dropped = torch.rand(len(rows), 1) < 0.15
        context = text_encoder(torch.where(dropped, tokens[0], tokens[1 + rows])).last_hidden_state
        noise = torch.randn_like(latents[rows])
        timesteps = torch.randint(len(scheduler), (len(rows),))
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, context).sample, noise)

    train("UNet", parameters, get_loss, 16000, weight_decay=1e-3, average=average)
    average.copy_to(parameters)
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        save_half(getattr(pipeline, name), folder / name)
    pipeline.save_config(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Gets the folders `images` and `model`.")
    output_dir = parser.parse_args().output_dir
    torch.set_num_threads(1)  # the model is so small that more threads only get in each other's way
    make_images(output_dir / "images")
    train_vae(output_dir / "model" / "vae")
    polish_vae(output_dir / "model" / "vae")
    train_unet(output_dir / "model")
