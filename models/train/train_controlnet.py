"""Trains a ControlNet for the demo model: it draws where the edges of a control picture are.

    python train_controlnet.py ../demo --cache runs/edges.pt --out ../demo/controlnets/canny

The net is a copy of the UNet's way down without its attention: edges say where, the UNet knows what. It begins with the UNet's weights. Both rows of guidance are steered alike,
so the net is evaluated once for the two, and trained, like the model's own last phase, on the guided prediction. `edges.py` judges it.
"""
import argparse
import os
import random
import shutil
import time
from pathlib import Path
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from cache import SCALE, pixels
from edges import canny
from train_unet import ALPHAS, CAPTION_DROP, loss_weight
from tune import GUIDANCE, contexts_of
from world import sample

# Of `UNet2DConditionModel`'s settings, those that a ControlNet has too.
SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim", "norm_num_groups")
HINT_CHANNELS = (8, 16, 48, 96)
BATCH, PART = 16, 25
EMA = 0.99
HELD_OUT = 48
# Times are drawn by the square root of their weight in the loss, which has the other root: most of the gradient is in few of them.
ROOTS = loss_weight(ALPHAS).sqrt()


def controlnet_of(unet):
    """A net that changes nothing yet."""
    net = ControlNetModel(**{name: unet.config[name] for name in SHARED}, down_block_types=("DownBlock2D",) * len(unet.config.block_out_channels),
                          mid_block_type="UNetMidBlock2D", conditioning_embedding_out_channels=HINT_CHANNELS)
    own = net.state_dict()
    own.update({name: x for name, x in unet.state_dict().items() if name in own})
    net.load_state_dict(own)
    # With zeros at both its ends, as published ones begin, nothing would be learned of the edges for some hundred steps.
    for name, x in net.controlnet_cond_embedding.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
    return net


@torch.no_grad()
def examples(pipeline, count, rng):
    """Latents (n, C, h, w), contexts (n, 77, D) and edges (n, 1, H, W) of scenes."""
    parts = []
    for _ in range(count // PART):
        images, captions = zip(*(sample(rng) for _ in range(PART)))
        latents = pipeline.vae.encode(pixels(images)).latent_dist.mean * SCALE
        edges = torch.from_numpy(np.stack([canny(image) for image in images]))[:, None]
        parts.append((latents, contexts_of(pipeline, captions).half(), edges))
    return tuple(torch.cat(x) for x in zip(*parts))


def loss_of(net, unet, examples, unprompted):
    latents, context, hint = (x.float() for x in examples)
    hint = hint.expand(-1, 3, -1, -1) / 255
    n = len(latents)
    t = torch.multinomial(ROOTS, n, replacement=True)
    alpha = ALPHAS[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    blank = (torch.rand(n) < CAPTION_DROP).view(-1, 1, 1)
    steered = lambda context, skips=None, middle=None: unet(
        noisy, t, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle).sample.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residuals = net(noisy, t, context, hint, return_dict=False) if net else ()
        guess = steered(torch.where(blank, unprompted, context), *residuals)
        with torch.no_grad():
            unguided = steered(unprompted.expand(n, -1, -1), *residuals)
    guess = torch.where(blank[..., None], guess, unguided + GUIDANCE * (guess - unguided))
    return (ROOTS[t] * (guess - noise).square().mean((1, 2, 3))).mean() * ROOTS.mean()


@torch.no_grad()
def held_out_loss(net, unet, examples, unprompted):
    """The same on pictures that are not trained on, always with the same noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sum(loss_of(net, unet, part, unprompted).item() for part in zip(*(x.split(BATCH) for x in examples)))


def write(net, average, out):
    """The net with these parameters as a directory in Diffusers format, f16."""
    # Without the path that it was read from.
    copy = ControlNetModel.from_config({name: value for name, value in net.config.items() if not name.startswith("_")})
    copy.load_state_dict(dict(zip((name for name, _ in net.named_parameters()), average)))
    part = out.with_name(f"part-{out.name}")
    copy.half().save_pretrained(part)
    for file in part.iterdir():
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", help="the demo model's directory")
    arg.add_argument("--out", type=Path, required=True, help="training goes on from this directory if it is there")
    arg.add_argument("--cache", type=Path, required=True, help="the pictures; they are made and kept here if the file is not there")
    arg.add_argument("--pictures", type=int, default=2000)
    arg.add_argument("--minutes", type=float, default=75)
    arg.add_argument("--lr", type=float, default=2e-3)
    arg.add_argument("--seed", type=int, default=0)
    args = arg.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, safety_checker=None)
    if not args.cache.exists():
        torch.save(examples(pipeline, args.pictures, random.Random(f"edges {args.seed}")), args.cache)
    pictures = torch.load(args.cache)
    unet = pipeline.unet.requires_grad_(False)
    # On a CPU its backward pass takes half the time of the fused one's.
    unet.set_attn_processor(AttnProcessor())
    net = ControlNetModel.from_pretrained(args.out).float() if args.out.exists() else controlnet_of(unet)
    net.train()
    params = list(net.parameters())
    print(f"{sum(p.numel() for p in params)} parameters", flush=True)
    unprompted = contexts_of(pipeline, [""])
    held_out, pictures = ([x[part] for x in pictures] for part in (slice(HELD_OUT), slice(HELD_OUT, None)))
    plain = held_out_loss(None, unet, held_out, unprompted)
    # What begins at nothing learns faster than what begins at the UNet's weights.
    new = {id(p) for name, p in net.named_parameters() if name.startswith("controlnet_")}
    groups = [[p for p in params if (id(p) in new) == is_new] for is_new in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], betas=(0.9, 0.99), weight_decay=0, fused=True)
    average = [p.detach().clone() for p in params]
    begin = saved = time.time()
    step = 0
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        for group, share in zip(optimizer.param_groups, (1, 0.3)):
            group["lr"] = args.lr * share * min(1, (step + 1) / 50, (1 - done) / 0.4)
        k = torch.randint(len(pictures[0]), (BATCH,))
        loss = loss_of(net, unet, [x[k] for x in pictures], unprompted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(EMA, (1 + step) / (10 + step)))
        if step % 25 == 0:
            share = held_out_loss(net, unet, held_out, unprompted) / plain
            print(f"step {step}  {(time.time() - begin) / 60:.1f} min  cpu {time.process_time():.0f} s  loss on held-out pictures {share:.3f} of that without", flush=True)
        if time.time() - saved > 180:
            saved = time.time()
            write(net, average, args.out)
    write(net, average, args.out)


if __name__ == "__main__":
    main()
