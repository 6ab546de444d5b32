"""Writes tests/pictures/: what diffusers draws with a small model, one PNG a scheduler, and for
some what it makes of the first picture (img2img), of a part of it (inpaint), and of its latents when
they have been enlarged (hires); LoRAs of small random factors (loras/) and embeddings of random
vectors (embeddings/), and what it draws with them; and what it draws with the
trained LoRA and the changes for inpainting that lie with the model.

    python make_pictures.py ../demo [--out ../../tests/pictures] [--only sepia inpainting]

Made with torch 2.15.0 and diffusers 0.42.1 on a CPU in f32: the prompts below, no negative
prompt, seed 7, 20 steps, guidance 7.5, the model's own size. To be run again when the weights of
the model change.
"""

import argparse
import re
from pathlib import Path

import diffusers
import torch
from peft import get_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from make_fixtures import CLASSES, enlarged, scheduler_of

# What belongs to the weights of the demo model and to no others.
DEMO = Path(__file__).resolve().parents[1] / "demo"

PROMPT = "a red house by the sea at night"
SEED, STEPS, GUIDANCE = 7, 20, 7.5

# The same with a picture to begin with: a second prompt, and for each mode a strength.
CHANGED = "a blue house in the snow at sunset"
STRENGTHS = {"img2img": 0.6, "inpaint": 0.9}
FROM_PICTURES = ["ddim", "euler", "dpmpp_2m", "pndm", "euler_a", "heun"]

# A second pass: for each sampler a size and an upscaler, and for all a strength.
HIRES = {
    "ddim": ((192, 192), "Latent"),
    "euler": ((192, 160), "Latent (nearest-exact)"),
    "dpmpp_2m": ((160, 192), "Latent (bicubic)"),
    "pndm": ((192, 192), "Latent (antialiased)"),
    "euler_a": ((192, 192), "Latent (bicubic antialiased)"),
    "heun": ((160, 160), "Latent (nearest)"),
}
HIRES_STRENGTH, HIRES_STEPS = 0.6, 15


# LoRAs: which layers of UNet and text encoder, rank, size of the factors, alpha.
LORAS = {
    "everywhere": (r"attn|ff|mlp|proj_|conv|time_emb", 1, 0.5, 0.5),
    "attention": (r"attn", 2, 0.25, 2),
}
# Which of them for a picture, and how much each counts.
WITH_LORAS = {
    "lora-everywhere": {"everywhere": 0.8},
    "lora-both": {"everywhere": 0.6, "attention": -0.7},
}


# Embeddings: how many vectors, and how the file is written.
EMBEDDINGS = {
    "glow.safetensors": ("<glow-cat>", 1),
    "ember.pt": ("ember", 3),
    "dusk.bin": ("<dusk>", 2),
}
WITH_WORDS = "a <glow-cat> house by the sea,ember, <dusk>"


# The model for inpainting: what is to be where the house was, for each sampler a strength.
PAINTED = "a yellow balloon by the sea at night"
HOLE = (28, 32, 100, 116)
PAINTERS = {"ddim": 1.0, "euler_a": 1.0, "dpmpp_2m": 0.8}


def draw(pipeline, prompt, path):
    """Writes what the pipeline makes of a prompt."""
    image = pipeline(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    image.save(path, optimize=True)


def mask(size):
    """White, where the picture is painted anew, is its lower left part."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).rectangle((0, size[1] // 3, size[0] * 2 // 3, size[1]), fill=255)
    return image


def from_pictures(pipeline, written, out):
    """What becomes of the first picture."""
    image = Image.open(out / "ddim.png").convert("RGB")
    mask(image.size).save(out / "mask.png", optimize=True)
    classes = {
        "img2img": (diffusers.StableDiffusionImg2ImgPipeline, {}),
        "inpaint": (diffusers.StableDiffusionInpaintPipeline, {"mask_image": mask(image.size)}),
    }
    for mode, (kind, extra) in classes.items():
        changing = kind(**pipeline.components, requires_safety_checker=False)
        changing.set_progress_bar_config(disable=True)
        if mode == "inpaint":
            extra |= {"width": image.width, "height": image.height}
        for name in FROM_PICTURES:
            changing.scheduler = scheduler_of(name, written)
            drawn = changing(
                CHANGED,
                image=image,
                strength=STRENGTHS[mode],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(SEED),
                **extra,
            ).images[0]
            drawn.save(out / f"{mode}-{name}.png", optimize=True)


def hires(pipeline, written, out):
    """The prompt again over the enlarged latents of its picture, with noise of the same seed."""
    again = diffusers.StableDiffusionImg2ImgPipeline(
        **pipeline.components, requires_safety_checker=False
    )
    again.set_progress_bar_config(disable=True)
    for name, (size, upscaler) in HIRES.items():
        pipeline.scheduler = scheduler_of(name, written)
        seeded = lambda: torch.Generator("cpu").manual_seed(SEED)
        latents = pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=seeded(),
            output_type="latent",
        ).images
        again.scheduler = scheduler_of(name, written)
        drawn = again(
            PROMPT,
            image=enlarged(latents, size, upscaler, pipeline.vae_scale_factor),
            strength=HIRES_STRENGTH,
            num_inference_steps=HIRES_STEPS,
            guidance_scale=GUIDANCE,
            generator=seeded(),
        ).images[0]
        drawn.save(out / f"hires-{name}.png", optimize=True)


def kohya(networks, layers, rank, size, alpha, generator):
    """Random factors in the names of kohya's scripts: the same for any weights of these shapes."""
    tensors = {}
    for prefix, network in networks.items():
        for name, module in network.named_modules():
            if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) or not re.search(layers, name):
                continue
            weight, name = module.weight, name.removeprefix("text_model.")
            down = torch.randn((rank, *weight.shape[1:]), generator=generator)
            up = torch.randn((len(weight), rank) + (1,) * (weight.dim() - 2), generator=generator)
            key = prefix + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = (down / weight[0].numel() ** 0.5).half()
            tensors[f"{key}.lora_up.weight"] = (up * size).half()
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


def with_loras(pipeline, written, out):
    """The LoRAs as kohya's scripts and as diffusers write them, and pictures with them."""
    folder = out / "loras"
    folder.mkdir(exist_ok=True)
    networks = {"lora_unet_": pipeline.unet, "lora_te_text_model_": pipeline.text_encoder}
    for seed, (name, settings) in enumerate(LORAS.items()):
        tensors = kohya(networks, *settings, torch.Generator().manual_seed(seed))
        save_file(tensors, folder / f"{name}.safetensors")
    for name in LORAS:
        pipeline.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    extra = {}
    for network in ("unet", "text_encoder"):
        model = getattr(pipeline, network)
        layers = get_peft_model_state_dict(model, adapter_name="everywhere")
        extra[f"{network}_lora_layers"] = {name: x.half() for name, x in layers.items()}
        extra[f"{network}_lora_adapter_metadata"] = model.peft_config["everywhere"].to_dict()
    pipeline.save_lora_weights(folder, weight_name="everywhere-peft.safetensors", **extra)
    pipeline.scheduler = scheduler_of("ddim", written)
    for name, scales in WITH_LORAS.items():
        pipeline.set_adapters(list(scales), list(scales.values()))
        draw(pipeline, PROMPT, out / f"{name}.png")
    pipeline.unload_lora_weights()


def with_words(pipeline, written, out):
    """Embeddings as diffusers and as AUTOMATIC1111 write them, and a picture with all of them."""
    folder = out / "embeddings"
    folder.mkdir(exist_ok=True)
    width = pipeline.text_encoder.config.hidden_size
    generator = torch.Generator().manual_seed(2)
    for file, (word, count) in EMBEDDINGS.items():
        # A view of more, as slices of training's matrices are.
        vectors = torch.randn((count + 2, width), generator=generator)[1 : count + 1] * 0.3
        match Path(file).suffix:
            case ".safetensors":
                save_file({word: vectors[0].half()}, folder / file)
            case ".bin":
                torch.save({word: vectors}, folder / file)
            case ".pt":
                parameter = torch.nn.Parameter(vectors)
                content = {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}}
                torch.save({**content, "name": word, "step": 1, "sd_checkpoint": None}, folder / file)
        pipeline.load_textual_inversion(folder, weight_name=file)
    pipeline.scheduler = scheduler_of("ddim", written)
    draw(pipeline, WITH_WORDS, out / "words.png")


def sepia(pipeline, written, out):
    """The trained LoRA."""
    pipeline.scheduler = scheduler_of("ddim", written)
    pipeline.load_lora_weights(DEMO / "loras", weight_name="sepia.safetensors")
    draw(pipeline, PROMPT, out / "lora-sepia.png")
    pipeline.unload_lora_weights()


def inpainting(pipeline, written, out):
    """A UNet of nine channels, made of the model's own and the changes that were trained."""
    config = diffusers.UNet2DConditionModel.load_config(DEMO / "unet")
    unet = diffusers.UNet2DConditionModel.from_config(config, in_channels=9)
    tensors = load_file(DEMO / "unet" / "diffusion_pytorch_model.safetensors")
    unet.load_state_dict(tensors | load_file(DEMO / "inpainting.safetensors"))
    painting = diffusers.StableDiffusionInpaintPipeline(
        **pipeline.components | {"unet": unet.float().eval()}, requires_safety_checker=False
    )
    painting.set_progress_bar_config(disable=True)
    image = Image.open(out / "ddim.png").convert("RGB")
    hole = Image.new("L", image.size)
    ImageDraw.Draw(hole).rectangle(HOLE, fill=255)
    hole.save(out / "hole.png", optimize=True)
    for name, strength in PAINTERS.items():
        painting.scheduler = scheduler_of(name, written)
        drawn = painting(
            PAINTED,
            image=image,
            mask_image=hole,
            width=image.width,
            height=image.height,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images[0]
        drawn.save(out / f"inpainting-{name}.png", optimize=True)


def samplers(pipeline, written, out):
    """The prompt by every sampler."""
    for name in CLASSES:
        pipeline.scheduler = scheduler_of(name, written)
        draw(pipeline, PROMPT, out / f"{name}.png")


PARTS = {
    "samplers": samplers,
    "from_pictures": from_pictures,
    "hires": hires,
    "loras": with_loras,
    "words": with_words,
    "sepia": sepia,
    "inpainting": inpainting,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model in diffusers' layout")
    top = Path(__file__).resolve().parents[2]
    parser.add_argument("--only", nargs="*", choices=PARTS, help="some of the pictures")
    parser.add_argument("--out", type=Path, default=top / "tests" / "pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        arguments.model, dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    written = diffusers.PNDMScheduler.load_config(arguments.model / "scheduler")
    for part in arguments.only or PARTS:
        PARTS[part](pipeline, written, arguments.out)


if __name__ == "__main__":
    main()
