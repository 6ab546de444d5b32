"""Writes tests/fixtures/vae_tiles.safetensors: what the small VAEs with `enable_tiling` make of random
latents and pictures, for networks/vae_tiles.rs, and whole runs with them, for tests/parity/vae_tiles.rs.

    python vae_tiles_fixtures.py

The committed file was made with torch 2.15.0 and diffusers 0.42.1 on a CPU.
"""

import diffusers
import torch
from PIL import Image

from make_fixtures import HERE, V1_4, generator, save, tiny

# Heights and widths of latents whose tiles are 8 a side, with narrow last tiles.
SIZES = {"v1": [(12, 8), (13, 14)], "xl": [(8, 15)]}


def networks(tensors):
    for name, sizes in SIZES.items():
        vae = diffusers.AutoencoderKL.from_pretrained(HERE / name / "vae").eval()
        vae.enable_tiling()
        assert vae.tile_latent_min_size == 8
        stream = generator(31)
        for h, w in sizes:
            latents = torch.randn((1, 4, h, w), generator=stream)
            picture = torch.rand((1, 3, 8 * h, 8 * w), generator=stream) * 2 - 1
            key = f"{name}.{h}x{w}"
            tensors[f"{key}.latents"] = latents
            # A picture is many numbers.
            tensors[f"{key}.picture"] = picture.half()
            tensors[f"{key}.decoded"] = vae.decode(latents).sample
            tensors[f"{key}.moments"] = vae.encode(picture.half().float()).latent_dist.parameters


def runs(tensors):
    stream = generator(32)
    picture = torch.randint(0, 256, (72, 104, 3), generator=stream, dtype=torch.uint8)
    mask = torch.randint(0, 256, (9, 13), generator=stream, dtype=torch.uint8)
    mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    tensors |= {"picture": picture, "mask": mask}
    image, hole = Image.fromarray(picture.numpy()), Image.fromarray(mask.numpy())
    size = {"width": 104, "height": 72}
    kinds = {
        "text": (diffusers.StableDiffusionPipeline, "v1/unet", size),
        "image": (diffusers.StableDiffusionImg2ImgPipeline, "v1/unet", {"image": image, "strength": 0.5}),
        "hole": (diffusers.StableDiffusionInpaintPipeline, "v1/unet",
                 {"image": image, "mask_image": hole, "strength": 0.5, **size}),
        "told": (diffusers.StableDiffusionInpaintPipeline, "inpaint/unet",
                 {"image": image, "mask_image": hole, "strength": 0.5, **size}),
    }
    for kind, (pipeline, unet, extra) in kinds.items():
        scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(V1_4)
        pipeline = tiny(pipeline, HERE / unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_tiling()
        latents = pipeline("a red house", num_inference_steps=10, guidance_scale=3.0, generator=generator(11),
                           output_type="latent", **extra).images
        tensors[f"{kind}.latents"] = latents
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        tensors[f"{kind}.decoded"] = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


if __name__ == "__main__":
    tensors = {}
    with torch.no_grad():
        networks(tensors)
        runs(tensors)
    save(tensors, HERE / "vae_tiles.safetensors")
