"""Draws scenes and encodes them once: shards of latents and token ids that `train_unet.py` reads, also while they are still being made.

    python cache.py --vae models/demo/vae --tokenizer models/demo/tokenizer --out cache --shards 24
"""
import argparse
import os
import random
from pathlib import Path
import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer
from world import sample

SCALE = 0.18215
BATCH, SHARD = 50, 1000


def pixels(images):
    """Pictures as a tensor from -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def shard(vae, tokenizer, seed):
    rng, latents, captions = random.Random(seed), [], []
    for _ in range(SHARD // BATCH):
        images, texts = zip(*(sample(rng) for _ in range(BATCH)))
        latents.append(vae.encode(pixels(images)).latent_dist.mean * SCALE)
        captions += texts
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return {"latents": torch.cat(latents).half(), "ids": ids.short()}


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--vae", required=True)
    arg.add_argument("--tokenizer", required=True)
    arg.add_argument("--out", type=Path, required=True)
    arg.add_argument("--shards", type=int, default=24, help=f"shards of {SHARD} pictures")
    args = arg.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(args.vae).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    for k in range(args.shards):
        path = args.out / f"{k:03}.pt"
        if not path.exists():
            torch.save(shard(vae, tokenizer, k), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            print(path, flush=True)


if __name__ == "__main__":
    main()
