"""Whole runs of image-to-image by the samplers of sampler_fixtures.py and by latent consistency
models, and of few-step models as their authors draw with them, for tests/parity/img2img.rs and
few_steps.rs. A part of make_fixtures.py.
"""

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file

from make_fixtures import HERE, LCM, V1_4, generator, save, tiny
from sampler_fixtures import CLASSES, NEW

PROMPT = "a red house"
# The motion of this sampler has the seed of the image.
SEEDED = {"dpmpp_sde": {"noise_sampler_seed": 11}}
# The pipelines give their own default, 0, to a scheduler whose default is another.
ETAS = {"tcd": {"eta": 0.3}}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_and_mask():
    known = load_file(HERE / "start.safetensors")
    return [Image.fromarray(known[name].numpy()) for name in ("picture", "mask")]


@torch.no_grad()
def start_2():
    """Latents of image-to-image, by each class that start() has not, and by the pipeline that gives
    the strength to its scheduler; `hole` is inpainting, of which there is none."""
    image, mask = picture_and_mask()
    tensors = {}
    for name in NEW:
        kind, keys = CLASSES[name]
        keys = {**keys, **SEEDED.get(name, {})}
        scheduler = getattr(diffusers, kind).from_config(V1_4, **keys)
        pipeline = quiet(tiny(diffusers.StableDiffusionImg2ImgPipeline, HERE / "v1/unet", scheduler))
        if name == "unipc_bh1":
            # diffusers multiplies 0 by infinity in its step to sigma 0.
            continue
        for strength in (1.0, 0.5, 0.2):
            drawn = pipeline(PROMPT, image=image, strength=strength, num_inference_steps=10,
                             guidance_scale=3.0, generator=generator(11), output_type="latent",
                             **ETAS.get(name, {}))
            tensors[f"image.{name}.{strength}"] = drawn.images
    kinds = {"lcm": (diffusers.LatentConsistencyModelImg2ImgPipeline, {}),
             "hole": (diffusers.StableDiffusionInpaintPipeline,
                      {"mask_image": mask, "width": 64, "height": 64})}
    for kind, (pipeline, extra) in kinds.items():
        for name in ("LCMScheduler", "TCDScheduler"):
            if kind == "lcm" and name == "TCDScheduler":
                # What it returns second is not the image that this pipeline takes it for.
                continue
            scheduler = getattr(diffusers, name).from_config(LCM)
            run = quiet(tiny(pipeline, HERE / "lcm/unet", scheduler))
            sampler = name.removesuffix("Scheduler").lower()
            extra = {**extra, **ETAS.get(sampler, {})}
            for steps in (4, 7):
                for strength in (1.0, 0.8, 0.5, 0.3):
                    drawn = run(PROMPT, image=image, strength=strength, num_inference_steps=steps,
                                guidance_scale=3.0, generator=generator(11), output_type="latent",
                                **extra)
                    tensors[f"{kind}.{sampler}.{steps}.{strength}"] = drawn.images
    save(tensors, HERE / "start_2.safetensors")


# Names of models, the class that their authors draw with, its keys, and the call.
TRAILING = {"timestep_spacing": "trailing"}
AUTHORS = {
    "LCM_art": ("LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.0}),
    "TCD-art": ("TCDScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.3}),
    "Hyper-SD15-8steps": ("DDIMScheduler", TRAILING,
                          {"num_inference_steps": 8, "guidance_scale": 0.0}),
    "Hyper-SD15-1step": ("TCDScheduler", {},
                         {"num_inference_steps": 1, "guidance_scale": 0.0, "eta": 1.0}),
    "Hyper-SD15-8steps-CFG": ("DDIMScheduler", TRAILING,
                              {"num_inference_steps": 8, "guidance_scale": 7.5}),
    "sd_turbo": ("EulerDiscreteScheduler", TRAILING,
                 {"num_inference_steps": 1, "guidance_scale": 0.0}),
    "sd15_lightning_4step": ("EulerDiscreteScheduler", TRAILING,
                             {"num_inference_steps": 4, "guidance_scale": 0.0}),
}


@torch.no_grad()
def few_steps():
    """Latents of a bare prompt: by the defaults of LatentConsistencyModelPipeline, and of models of
    these names as the cards of their authors say."""
    pipeline = tiny(diffusers.LatentConsistencyModelPipeline, HERE / "lcm/unet",
                    diffusers.LCMScheduler.from_config(LCM))
    drawn = quiet(pipeline)(PROMPT, generator=generator(11), output_type="latent")
    tensors = {"pipeline": drawn.images}
    for name, (kind, keys, call) in AUTHORS.items():
        scheduler = getattr(diffusers, kind).from_config(V1_4, **keys)
        pipeline = quiet(tiny(diffusers.StableDiffusionPipeline, HERE / "v1/unet", scheduler))
        drawn = pipeline(PROMPT, generator=generator(11), output_type="latent", **call)
        tensors[f"named.{name}"] = drawn.images
    save(tensors, HERE / "few_steps.safetensors")
