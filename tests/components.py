"""Tiny but real Stable Diffusion components, built from configs with a fixed seed: what the tests run on."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with an alphabet for its whole vocabulary."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: number for number, token in enumerate(tokens)}, [], model_max_length=77)


def tiny_components(prediction_type: str = "epsilon") -> dict:
    """Arguments of `StableDiffusionImg2ImgPipeline(**...)`: random weights, 2x downscaling VAE, float32 on CPU."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    attention = {"attention_head_dim": 4, "cross_attention_dim": 16}
    unet = UNet2DConditionModel(sample_size=8, **sizes, **blocks, **attention)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(sample_size=16, latent_channels=4, **sizes, **blocks)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    body = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **body, **special))
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(**SD_SCHEDULE, prediction_type=prediction_type),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def picture(size: int = 16, color: tuple = (200, 60, 40), background: tuple = (30, 90, 160)) -> Image.Image:
    """A disc on a plain background, `size` x `size` RGB."""
    image = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(image).ellipse([size // 4, size // 4, 3 * size // 4, 3 * size // 4], fill=color)
    return image
