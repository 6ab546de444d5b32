"""Makes a UNet for inpainting of the demo model: mask and masked picture beside the latents, nine channels in all, as in runwayml/stable-diffusion-inpainting.

    python train_inpainting.py ../demo --out ../demo-inpainting.safetensors

The weights of the new channels begin at zero. Only they and the layers next to the latents are trained: the file holds those and nothing else, in the names of `unet/`.
`--assemble DIR` writes the whole model, with the file's tensors in place of the demo's.
"""
import argparse
import json
import random
import shutil
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from cache import SCALE, pixels
from tune import contexts_of, tune
from world import SIZE, sample

TRAINED = ("conv_in.", "down_blocks.0.resnets.0.", "up_blocks.2.resnets.1.", "conv_norm_out.", "conv_out.")
CHANNELS = 9
WEIGHTS = "diffusion_pytorch_model.safetensors"


def widened(unet):
    """The same UNet with channels for the mask and the masked picture, that do nothing yet."""
    wide = UNet2DConditionModel.from_config(unet.config, in_channels=CHANNELS)
    tensors = unet.state_dict()
    old = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([old, old.new_zeros(len(old), CHANNELS - old.shape[1], 3, 3)], 1)
    wide.load_state_dict(tensors)
    return wide


def random_mask(rng):
    """White where the picture is to be painted: all of it, where things stand, or some boxes and ovals anywhere."""
    mask = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(mask)
    kind = rng.random()
    if kind < 0.1:
        pen.rectangle((0, 0, SIZE, SIZE), fill=255)
    elif kind < 0.6:
        x0, y0, x1, y1 = (low + rng.uniform(-0.12, 0.12) for low in (0.2, 0.24, 0.8, 0.88))
        pen.rectangle([v * SIZE for v in (x0, y0, x1, y1)], fill=255)
    else:
        for _ in range(rng.randint(1, 3)):
            x, y, w, h = rng.random(), rng.random(), rng.uniform(0.1, 0.4), rng.uniform(0.1, 0.4)
            rng.choice((pen.rectangle, pen.ellipse))([v * SIZE for v in (x - w, y - h, x + w, y + h)], fill=255)
    return mask


@torch.no_grad()
def examples(pipeline, count, rng):
    """Latents, captions, and the five channels beside the latents: mask, and latents of the picture that is gray where it is to be painted."""
    encode = lambda x: pipeline.vae.encode(x).latent_dist.mean * SCALE
    latents, captions, conditions = [], [], []
    for _ in range(count // 25):
        images, texts = zip(*(sample(rng) for _ in range(25)))
        x, mask = pixels(images), (pixels(random_mask(rng).convert("RGB") for _ in images)[:, :1] > 0).float()
        latents.append(encode(x))
        conditions.append(torch.cat([mask[:, :, ::8, ::8], encode(x * (1 - mask))], 1))
        captions += texts
    return torch.cat(latents), captions, torch.cat(conditions)


def assemble(model, changes, out):
    """The whole model directory."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    save_file(load_file(out / "unet" / WEIGHTS) | load_file(changes), out / "unet" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((out / "unet" / "config.json").read_text())
    (out / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": CHANNELS}, indent=2) + "\n")


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", type=Path, help="the demo model's directory")
    arg.add_argument("--out", type=Path, required=True, help="training goes on from this file if it is there")
    arg.add_argument("--assemble", type=Path, help="make this directory of the model and an --out that is there; train nothing")
    arg.add_argument("--minutes", type=float, default=25)
    arg.add_argument("--pictures", type=int, default=3000)
    arg.add_argument("--lr", type=float, default=1e-3)
    arg.add_argument("--seed", type=int, default=1)
    args = arg.parse_args()
    if args.assemble:
        return assemble(args.model, args.out, args.assemble)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, safety_checker=None)
    latents, captions, conditions = examples(pipeline, args.pictures, random.Random(args.seed))
    unet = widened(pipeline.unet)
    if args.out.exists():
        unet.load_state_dict({name: x.float() for name, x in load_file(args.out).items()}, strict=False)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad_(name.startswith(TRAINED)).requires_grad}
    average = tune(unet, list(trained.values()), latents, contexts_of(pipeline, captions), contexts_of(pipeline, [""]),
                   args.minutes, args.lr, conditions)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.half() for name, x in zip(trained, average)}, args.out, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
