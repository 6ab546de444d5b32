"""Writes a model directory (diffusers layout, f16) from a training state, an autoencoder and a tokenizer.

    python export.py --state runs/unet/state.pt --vae runs/vae --tokenizer models/demo/tokenizer --out models/demo
"""
import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from train_unet import models

JUNK = ("_name_or_path", "transformers_version", "is_local", "local_files_only", "backend", "name_or_path")
INDEX = {
    "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False,
}


def load_average(unet, text, path):
    """Puts the averaged weights of a training state into the two models."""
    average = torch.load(path)["average"]
    for name, module in (("unet", unet), ("text", text)):
        module.load_state_dict({k.removeprefix(name + "."): v for k, v in average.items() if k.startswith(name + ".")}, strict=False)


def clean(path):
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in old.items() if k not in JUNK}, indent=2) + "\n")


def write(out, unet, text, vae, tokenizer):
    unet.half().save_pretrained(out / "unet")
    text.half().save_pretrained(out / "text_encoder")
    vae.half().save_pretrained(out / "vae")
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    shutil.copytree(tokenizer, out / "tokenizer")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    weights = out / "text_encoder" / "model.safetensors"  # files on the hub have the prefix, newer transformers leave it out
    tensors = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    for path in out.glob("*/*config.json"):
        clean(path)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--state", required=True)
    arg.add_argument("--vae", required=True)
    arg.add_argument("--tokenizer", type=Path, required=True)
    arg.add_argument("--model", help="model directory the training began with, for its configuration")
    arg.add_argument("--out", type=Path, required=True)
    args = arg.parse_args()
    unet, text = models(args.model, CLIPTokenizer.from_pretrained(args.tokenizer))
    load_average(unet, text, args.state)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        write(Path(folder), unet, text, AutoencoderKL.from_pretrained(args.vae), args.tokenizer)
        for path in Path(folder).rglob("*"):  # file by file, so that a reader always finds a whole one
            if path.is_file():
                target = args.out / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
                target.chmod(0o644)


if __name__ == "__main__":
    main()
