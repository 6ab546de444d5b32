"""Writes tests/fixtures/xl/refiner/: a small refiner of Stable Diffusion XL with random weights, and
what diffusers computes with it and with the base model of xl_fixtures.py, for tests/parity/refiner.rs.

    python refiner_fixtures.py [networks pictures single]

Its weights are rounded to f16, in which the files are; diffusers computed with them in f32. The
committed files were made with torch 2.15.0, diffusers 0.42.1 and transformers 5.24.0 on a CPU.
"""

import argparse
import json
import shutil

import diffusers
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from make_fixtures import HERE as FIXTURES, check_single, generator, ldm, save
from xl_fixtures import SCHEDULER, TEXTS, VAE, XL, keep, pipeline, rounded, tower, write

HERE = FIXTURES / "xl/refiner"

# As that of stabilityai/stable-diffusion-xl-refiner-1.0: four levels, of which the inner two attend.
UNET = {
    **XL, "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2, "attention_head_dim": [1, 2, 2, 4], "cross_attention_dim": 24,
    "projection_class_embeddings_input_dim": 60,
}


@torch.no_grad()
def networks():
    """The model's files, and outputs of its UNet."""
    write(HERE / "model_index.json", {
        "_class_name": "StableDiffusionXLImg2ImgPipeline", "_diffusers_version": "0.42.1",
        "force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True,
        "feature_extractor": [None, None], "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    })
    write(HERE / "scheduler/scheduler_config.json", SCHEDULER)
    (HERE / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(FIXTURES / "v2/tokenizer" / name, HERE / "tokenizer_2" / name)
    text = CLIPTextModelWithProjection(CLIPTextConfig(**TEXTS["text_encoder_2"]))
    keep(rounded(text, 801), HERE / "text_encoder_2")
    # One whose pictures are others than those of the base model's.
    keep(rounded(diffusers.AutoencoderKL(**VAE), 831), HERE / "vae")
    # Of those that were tried, one whose runs change little with their inputs.
    model = rounded(diffusers.UNet2DConditionModel(**UNET), 824)
    for p in model.conv_out.parameters():
        p.data.mul_(0.25)
    keep(model, HERE / "unet")
    stream = generator(820)
    draw = lambda *sides: torch.randn(sides, generator=stream)
    inputs = {
        "latents": draw(2, 4, 8, 8), "context": draw(2, 77, 24), "pooled": draw(2, 20),
        "sizes": torch.tensor([[1024.0, 768, 0, 16, 6], [64, 64, 0, 0, 2.5]]),
        "timesteps": torch.tensor([181.0, 3.5]),
    }
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
    output = model(inputs["latents"], inputs["timesteps"], inputs["context"],
                   added_cond_kwargs=added).sample
    save({**inputs, "output": output}, HERE / "networks.safetensors")


# Pictures ------------------------------------------------------------------------------------


def refiner(scheduler=SCHEDULER):
    """The pipeline of the files above, in f32."""
    loaded = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(HERE / "vae", torch_dtype=torch.float32),
        text_encoder=None, tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
            HERE / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=CLIPTokenizer.from_pretrained(HERE / "tokenizer_2"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(HERE / "unet", torch_dtype=torch.float32),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


CLASSES = {
    "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler", "dpm2": "KDPM2DiscreteScheduler", "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
}

DRAWN = dict(num_inference_steps=10, guidance_scale=3.0)
FEW = dict(num_inference_steps=6, guidance_scale=3.0)
LATENT = dict(output_type="latent")


def ensemble(scheduler=SCHEDULER, at=0.8, output_type="latent", words=None, **options):
    """The base model's pictures, which the refiner takes over."""
    words = words or {}
    base = pipeline(diffusers.StableDiffusionXLPipeline, scheduler=scheduler)
    latents = base("a red house", generator=generator(11), denoising_end=at, height=64, width=64,
                   **LATENT, **DRAWN, **words, **options).images
    return refiner(scheduler)("a red house", image=latents, denoising_start=at,
                              output_type=output_type, **DRAWN, **words).images


@torch.no_grad()
def pictures():
    """Latents of whole runs, and a picture."""
    tensors = {}
    for name, of in CLASSES.items():
        tensors[f"ensemble.{name}"] = ensemble({**SCHEDULER, "_class_name": of})
    negative = {"negative_prompt": "the sea"}
    tensors["ensemble.negative"] = ensemble(words=negative)
    tensors["ensemble.late"] = ensemble(at=0.95)
    tensors["picture.ensemble"] = ensemble(output_type="pt")
    stream = generator(5)
    picture = torch.randint(0, 256, (64, 64, 3), generator=stream, dtype=torch.uint8)
    image = Image.fromarray(picture.numpy())
    tensors["picture"] = picture
    base = pipeline(diffusers.StableDiffusionXLPipeline)
    of_image = pipeline(diffusers.StableDiffusionXLImg2ImgPipeline)
    seeded = lambda: dict(generator=generator(11), **LATENT, **DRAWN)
    tensors["end"] = base("a red house", denoising_end=0.6, height=64, width=64, **seeded()).images
    tensors["start"] = of_image("a red house", image=image, denoising_start=0.45, **seeded()).images
    for name, options in {
        "half": {"strength": 0.5}, "whole": {"strength": 1.0},
        "negative": {"strength": 0.5, **negative},
        "scores": {"strength": 0.5, "aesthetic_score": 8.0, "negative_aesthetic_score": 1.0,
                   "original_size": (512, 768), "crops_coords_top_left": (8, 16)},
        # With guidance, what has no noise is drawn to another picture by the smallest change.
        "part": {"denoising_start": 0.4, "denoising_end": 0.8, "guidance_scale": 1.0},
        "end": {"strength": 0.7, "denoising_end": 0.8},
    }.items():
        drawn = refiner()("a red house", image=image, generator=generator(11), **LATENT,
                          **{**FEW, **options})
        tensors[f"refined.{name}"] = drawn.images
    latents = of_image("a red house", image=image, strength=0.6, denoising_end=0.8,
                       generator=generator(11), **LATENT, **FEW).images
    tensors["ensemble.image"] = refiner()(
        "a red house", image=latents, denoising_start=0.8, **LATENT, **FEW).images
    save(tensors, HERE / "pictures.safetensors")


@torch.no_grad()
def single():
    """The model in one file, in the names of sd_xl_refiner_1.0.safetensors."""
    from diffusers.loaders import single_file_utils as theirs

    model, prefix = refiner(), "conditioner.embedders.0.model."
    text = {f"{prefix}{key}": x for key, x in tower(model.text_encoder_2.state_dict()).items()}
    tensors = ldm(model.unet, model.vae, text)
    for ours, theirs_name in {"linear_1": "0.0", "linear_2": "0.2"}.items():
        for kind in ("weight", "bias"):
            key = f"model.diffusion_model.add_embedding.{ours}.{kind}"
            tensors[f"model.diffusion_model.label_emb.{theirs_name}.{kind}"] = tensors.pop(key)
    check_single(tensors, model.unet, model.vae)
    back = theirs.convert_open_clip_checkpoint(model.text_encoder_2, dict(tensors), prefix=prefix)
    for key, x in model.text_encoder_2.state_dict().items():
        read = back.get(key, back.get(key.removeprefix("text_model.")))
        assert torch.equal(read, x), key
    save({key: x.half() for key, x in tensors.items()}, HERE / "single.safetensors")


def main():
    parts = {"networks": networks, "pictures": pictures, "single": single}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    torch.set_num_threads(1)
    for part in parser.parse_args().parts:
        parts[part]()
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
