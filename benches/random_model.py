"""Writes a model of full size with random weights in f32, in Diffusers format: for times and memory, which do not depend on
what the weights are.

    python benches/random_model.py v1|xl DIR

`v1` has the shapes of Stable Diffusion v1.4 (4.3 GB), `xl` those of Stable Diffusion XL base 1.0 (13.9 GB), by their
published configurations; the tokenizer is the built-in model's. Needs torch, diffusers, transformers from PyPI, and as much
memory as the largest tensor: the files are written tensor by tensor.
"""
import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TOKENIZER = Path(__file__).resolve().parent.parent / "models/demo/tokenizer"
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4)
CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu",
    projection_dim=768, vocab_size=49408)
CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    projection_dim=1280, vocab_size=49408)


def v1():
    unet = dict(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
        block_out_channels=[320, 640, 1280, 1280], down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    return "StableDiffusionPipeline", PNDMScheduler(**NOISE, skip_prk_steps=True), {
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(**VAE, sample_size=512),
    }


def xl():
    unet = dict(
        sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], layers_per_block=2,
        block_out_channels=[320, 640, 1280], down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)
    return "StableDiffusionXLPipeline", EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"), {
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025),
    }


def values(name, shape):
    """Weights that keep activations near unit variance; norms are the identity and biases zero."""
    if len(shape) > 1:
        return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)


def write(tensors, path):
    """A safetensors file of tensors that have shapes only."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.write(memoryview(values(name, tuple(tensor.shape)).numpy()).cast("B"))


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("family", choices=["v1", "xl"])
    arg.add_argument("directory", type=Path)
    args = arg.parse_args()
    torch.manual_seed(0)
    pipeline, scheduler, networks = {"v1": v1, "xl": xl}[args.family]()
    index = {"_class_name": pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    scheduler.save_pretrained(args.directory / "scheduler")
    for folder, build in networks.items():
        with torch.device("meta"):
            network = build()
        is_text = folder.startswith("text_encoder")
        target = args.directory / folder
        target.mkdir(parents=True, exist_ok=True)
        if is_text:
            network.config.architectures = [type(network).__name__]
            network.config.save_pretrained(target)
            tokenizer = folder.replace("text_encoder", "tokenizer")
            shutil.copytree(TOKENIZER, args.directory / tokenizer, dirs_exist_ok=True)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
        else:
            network.save_config(target)
        index[folder] = ["transformers" if is_text else "diffusers", type(network).__name__]
        stem = "model" if is_text else "diffusion_pytorch_model"
        write(network.state_dict(), target / f"{stem}.safetensors")
    if args.family == "v1":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (args.directory / "model_index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    main()
