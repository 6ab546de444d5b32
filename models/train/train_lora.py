"""Trains a small LoRA on the demo model: all that it draws, in sepia. The file is what `sd-server generate --lora` takes.

    python train_lora.py ../demo --out ../demo/loras/sepia.safetensors
"""
import argparse
import random
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import ImageOps
from cache import SCALE, pixels
from tune import contexts_of, tune
from world import sample

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_in", "conv_out"]


def sepia(picture):
    return ImageOps.colorize(ImageOps.grayscale(picture), "#281c10", "#f4e4c4", "#a08058")


@torch.no_grad()
def examples(pipeline, count, rng):
    """Latents of pictures in sepia, and the captions that they had in colour."""
    latents, captions = [], []
    for _ in range(count // 25):
        images, texts = zip(*(sample(rng) for _ in range(25)))
        latents.append(pipeline.vae.encode(pixels(map(sepia, images))).latent_dist.mean * SCALE)
        captions += texts
    return torch.cat(latents), captions


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", help="the demo model's directory")
    arg.add_argument("--out", type=Path, required=True, help="training goes on from this file if it is there")
    arg.add_argument("--minutes", type=float, default=15)
    arg.add_argument("--pictures", type=int, default=800)
    arg.add_argument("--rank", type=int, default=2)
    arg.add_argument("--lr", type=float, default=4e-3)
    arg.add_argument("--seed", type=int, default=0)
    args = arg.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, safety_checker=None)
    latents, captions = examples(pipeline, args.pictures, random.Random(args.seed))
    unet = pipeline.unet
    if args.out.exists():
        pipeline.load_lora_weights(args.out.parent, weight_name=args.out.name, adapter_name="default")
    else:
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    params = [p for name, p in unet.named_parameters() if p.requires_grad_("lora_" in name).requires_grad]
    average = tune(unet, params, latents, contexts_of(pipeline, captions), contexts_of(pipeline, [""]), args.minutes, args.lr)
    with torch.no_grad():
        for p, mean in zip(params, average):
            p.copy_(mean)
    layers = {name: x.half() for name, x in get_peft_model_state_dict(unet).items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(args.out.parent, unet_lora_layers=layers, weight_name=args.out.name, unet_lora_adapter_metadata=settings)


if __name__ == "__main__":
    main()
