"""Writes tests/pictures/: what diffusers draws with a small model, one PNG a scheduler, and for
some what it makes of the first picture (img2img) and of a part of it (inpaint).

    python make_pictures.py ../demo [--out ../../tests/pictures]

Made with torch 2.15.0 and diffusers 0.42.1 on a CPU in f32: the prompts below, no negative
prompt, seed 7, 20 steps, guidance 7.5, the model's own size. To be run again when the weights of
the model change.
"""

import argparse
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageDraw

from make_fixtures import scheduler_of, CLASSES

PROMPT = "a red house by the sea at night"
SEED, STEPS, GUIDANCE = 7, 20, 7.5

# The same with a picture to begin with: a second prompt, and for each mode a strength.
CHANGED = "a blue house in the snow at sunset"
STRENGTHS = {"img2img": 0.6, "inpaint": 0.9}
FROM_PICTURES = ["ddim", "euler", "dpmpp_2m", "pndm", "euler_a", "heun"]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model in diffusers' layout")
    top = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=top / "tests" / "pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        arguments.model, dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    written = diffusers.PNDMScheduler.load_config(arguments.model / "scheduler")
    for name in CLASSES:
        pipeline.scheduler = scheduler_of(name, written)
        image = pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images[0]
        image.save(arguments.out / f"{name}.png", optimize=True)
    from_pictures(pipeline, written, arguments.out)


if __name__ == "__main__":
    main()
