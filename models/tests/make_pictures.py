"""Writes tests/pictures/: what diffusers draws with a small model, one PNG a scheduler.

    python make_pictures.py ../demo [--out ../../tests/pictures]

Made with torch 2.15.0 and diffusers 0.42.1 on a CPU in f32: the prompt below, no negative
prompt, seed 7, 20 steps, guidance 7.5, the model's own size.
"""

import argparse
from pathlib import Path

import diffusers
import torch

from make_fixtures import scheduler_of, CLASSES

PROMPT = "a red house by the sea at night"
SEED, STEPS, GUIDANCE = 7, 20, 7.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model in diffusers' layout")
    top = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=top / "tests" / "pictures")
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
