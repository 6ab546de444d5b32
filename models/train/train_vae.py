"""Trains the autoencoder, from a model directory or from nothing.

A UNet knows the latents it was trained on: `--anchor` holds new latents near those of the start, `--decoder` leaves the encoder as it is altogether.

    python train_vae.py --start models/demo/vae --anchor 0.1 --out runs/vae --minutes 60
"""
import argparse
import copy
import os
import random
import time
from pathlib import Path
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from cache import SCALE, pixels
from world import draw, sample_scene

VAE = dict(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 32, 64, 128), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=128, mid_block_add_attention=True)
EMA = 0.995
PART, PARTS = 96, 0.6  # this share of the time is spent on parts of pictures of this size: more for the same work
LATENT_NOISE = 0.02  # a sampled latent is never quite right: the decoder learns to bear it


def batch(rng, n):
    return pixels([draw(sample_scene(rng), rng) for _ in range(n)])


def part(x, rng):
    i, j = (rng.randrange(0, x.shape[-1] - PART + 1, 8) for _ in range(2))
    return x[..., i:i + PART, j:j + PART]


def slopes(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def distance(y, x):
    """How far y is from the picture x: colours (squares as well, since a small thing in a wrong colour is worse than a soft picture), edges, mean colours of tiles."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(slopes(y), slopes(x)))
    return F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 0.5 * edges + 4 * F.mse_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))


@torch.no_grad()
def error(vae, n=48):
    """Mean absolute error of n pictures after encoding and decoding, of 255."""
    parts = batch(random.Random(99), n).split(8)
    return sum((vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).abs().mean().item() for x in parts) / len(parts) * 127.5


@torch.no_grad()
def fold_scale(vae, rng):
    """Scales the latents so that the usual factor 0.18215 brings them to unit deviation."""
    k = 1 / (SCALE * torch.cat([vae.encode(batch(rng, 16)).latent_dist.mean for _ in range(8)]).std())
    vae.quant_conv.weight[:4] *= k
    vae.quant_conv.bias[:4] *= k
    vae.quant_conv.bias[4:] += 2 * k.log()
    vae.post_quant_conv.weight /= k


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--start", help="directory of an autoencoder to start from")
    arg.add_argument("--decoder", action="store_true", help="train the decoder only")
    arg.add_argument("--anchor", type=float, default=0, help="weight of the squared distance from the latents of the start")
    arg.add_argument("--out", type=Path, required=True)
    arg.add_argument("--minutes", type=float, required=True)
    arg.add_argument("--batch", type=int, default=4)
    arg.add_argument("--lr", type=float, default=6e-4)
    arg.add_argument("--seed", type=int, default=7)
    arg.add_argument("--threads", type=int, default=1)
    args = arg.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start).float() if args.start else AutoencoderKL(**VAE)
    start = copy.deepcopy(vae) if args.anchor else None
    if args.decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    params = [p for p in vae.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)

    def save():
        """Writes the averaged weights, then goes on with the current ones."""
        current = [p.detach().clone() for p in params]
        with torch.no_grad():
            torch._foreach_copy_(params, average)
            value = error(vae)
            vae.save_pretrained(f"{args.out}.tmp")
            torch._foreach_copy_(params, current)
        args.out.mkdir(parents=True, exist_ok=True)
        for file in Path(f"{args.out}.tmp").iterdir():
            os.replace(file, args.out / file.name)
        return value

    print(f"error {error(vae):.2f}/255", flush=True)
    begin, saved, step, mean = time.time(), time.time(), 0, None
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (1 - done) + 1e-6
        x = batch(rng, args.batch)
        x = part(x, rng) if done < PARTS else x
        with torch.set_grad_enabled(not args.decoder):
            posterior = vae.encode(x).latent_dist
        noise = LATENT_NOISE / SCALE * torch.randn_like(posterior.mean) if args.decoder else 0
        y = vae.decode(posterior.sample() + noise).sample
        loss = distance(y, x) + (0 if args.decoder else 1e-5 * posterior.kl().mean() / 64)
        if args.anchor:
            with torch.no_grad():
                old = start.encode(x).latent_dist.mean
            loss = loss + args.anchor * SCALE ** 2 * F.mse_loss(posterior.mean, old)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - min(EMA, step / (10 + step)))
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}  {(time.time() - begin) / 60:.1f} min  loss {mean:.4f}", flush=True)
        if time.time() - saved > 420:
            saved = time.time()
            print(f"error {save():.2f}/255", flush=True)
    if not args.decoder:
        with torch.no_grad():
            torch._foreach_copy_(params, average)
        fold_scale(vae, rng)
        average = [p.detach().clone() for p in params]
    print(f"step {step}  error {save():.2f}/255", flush=True)


if __name__ == "__main__":
    main()
