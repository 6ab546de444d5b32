"""Trains the LCM-LoRA of the demo model: pictures in four steps of the LCM sampler, without guidance.

    python train_lcm.py ../demo --cache runs/lcm --generate 3000
    python train_lcm.py ../demo --cache runs/lcm --out ../demo/loras/lcm.safetensors --minutes 40

`--generate` solves the teacher's guided probability flow from noise to picture and keeps where it passes the four times that the sampler visits. Training
regresses from each of these points to the end of its trajectory. This needs no rendered picture, and no target that the student itself has made.
"""
import argparse
import os
import random
import time
from pathlib import Path
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from train_lora import LAYERS
from train_unet import ALPHAS
from tune import contexts_of
from world import caption, sample_scene

# Those of LCMScheduler with four steps, and three between each two for the teacher's solver.
TIMES = (999, 759, 499, 259)
SOLVER = (999, 939, 879, 819, 759, 694, 629, 564, 499, 439, 379, 319, 259, 194, 129, 64)
GUIDANCE = 7.5
BLANK = 0.03  # share of empty prompts
SHARD, BATCH = 64, 32
# An error in the last picture is seen, one in an earlier step is mended by the next.
WEIGHT, CHOICE = torch.tensor([0.3, 0.7, 1.0, 1.5]), torch.tensor([0.3, 0.28, 0.24, 0.18])
EMA = 0.995


def scales(t):
    """The share of the picture and that of the noise at time t."""
    alpha = ALPHAS[t]
    return alpha.sqrt(), (1 - alpha).sqrt()


def captions(rng, count):
    for _ in range(count):
        style = rng.choices(("a photo of ", "a picture of ", "a painting of ", ""), (20, 15, 15, 50))[0]
        words = caption(sample_scene(rng), place=rng.random() < 0.92, time=rng.random() < 0.88, style=style)
        yield "" if rng.random() < BLANK else words


@torch.no_grad()
def trajectories(unet, context, unprompted, generator):
    """The latents (n, 4, C, h, w) at `TIMES` and the pictures (n, C, h, w) where they end, by DPM-Solver++ 2M."""
    n = len(context)
    x = torch.randn(n, 4, 16, 16, generator=generator)
    both = torch.cat([unprompted.expand(n, -1, -1), context])
    passed, last = [], None
    for t, after in zip(SOLVER, SOLVER[1:] + (None,)):
        if t in TIMES:
            passed.append(x)
        a, s = scales(t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, prompted = unet(torch.cat([x, x]), t, both).sample.float().chunk(2)
        x0 = (x - s * (plain + GUIDANCE * (prompted - plain))) / a
        if after is None:
            return torch.stack(passed, 1), x0
        b, q = scales(after)
        h = (b / q).log() - (a / s).log()
        mixed = x0 if last is None else x0 + (x0 - last[0]) * (h / last[1] / 2)
        x, last = q / s * x - b * torch.expm1(-h) * mixed, (x0, h)


def generate(pipeline, folder, count, seed):
    folder.mkdir(parents=True, exist_ok=True)
    unprompted = contexts_of(pipeline, [""])
    for k in range(seed, seed + count // SHARD):
        path = folder / f"{k:04}.pt"
        if path.exists():
            continue
        context = contexts_of(pipeline, captions(random.Random(k), SHARD))
        x, x0 = trajectories(pipeline.unet, context, unprompted, torch.Generator().manual_seed(k))
        torch.save({"x": x.half(), "x0": x0.half(), "context": context.half()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        print(f"{path}  cpu {time.process_time():.0f} s", flush=True)


class Pool:
    """The trajectories; `refresh` picks up those written since."""

    def __init__(self, folder):
        self.folder, self.read, self.parts = folder, set(), []

    def refresh(self):
        new = sorted(set(self.folder.glob("*.pt")) - self.read)
        self.read |= set(new)
        self.parts += [torch.load(path) for path in new]
        if new:
            self.x, self.x0, self.context = (torch.cat([p[name] for p in self.parts]) for name in ("x", "x0", "context"))


def loss_of(unet, pool):
    k, level = torch.randint(len(pool.x0), (BATCH,)), torch.multinomial(CHOICE, BATCH, replacement=True)
    t = torch.tensor(TIMES)[level]
    a, s = (v.view(-1, 1, 1, 1) for v in scales(t))
    x = pool.x[k, level].float()
    x0 = (x - s * unet(x, t, pool.context[k].float()).sample) / a
    error = (x0 - pool.x0[k].float()).square().mean((1, 2, 3))
    return (WEIGHT[level] * ((error + 1e-4).sqrt() - 1e-2)).mean(), error.detach(), level


def write(pipeline, params, average, out):
    unet = pipeline.unet
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, average)
    layers = {name: x.half() for name, x in get_peft_model_state_dict(unet).items()}
    part = out.with_name(f"part-{out.name}")
    pipeline.save_lora_weights(out.parent, unet_lora_layers=layers, weight_name=part.name, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())
    os.replace(part, out)
    with torch.no_grad():
        torch._foreach_copy_(params, kept)


def train(pipeline, folder, out, minutes, rank, lr):
    unet, pool = pipeline.unet, Pool(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        pipeline.load_lora_weights(out.parent, weight_name=out.name, adapter_name="default")
    else:
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
    params = [p for name, p in unet.named_parameters() if p.requires_grad_("lora_" in name).requires_grad]
    print(f"{sum(p.numel() for p in params)} parameters", flush=True)
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0)
    average = [p.detach().clone() for p in params]
    begin = saved = time.time()
    step, means = 0, torch.full((len(TIMES),), float("nan"))
    while (done := (time.time() - begin) / (60 * minutes)) < 1:
        if step % 20 == 0:
            pool.refresh()
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - done)
        loss, error, level = loss_of(unet, pool)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(EMA, (1 + step) / (10 + step)))
        for i in level.unique():
            now = error[level == i].mean()
            means[i] = now if means[i].isnan() else 0.95 * means[i] + 0.05 * now
        if step % 20 == 0:
            print(f"step {step}  {(time.time() - begin) / 60:.1f} min  cpu {time.process_time():.0f} s  squared errors {[round(m, 4) for m in means.tolist()]}  "
                  f"trajectories {len(pool.x0)}", flush=True)
        if time.time() - saved > 180:
            saved = time.time()
            write(pipeline, params, average, out)
    write(pipeline, params, average, out)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", help="the demo model's directory")
    arg.add_argument("--cache", type=Path, required=True, help="the teacher's trajectories")
    arg.add_argument("--generate", type=int, help="make so many trajectories instead of training")
    arg.add_argument("--out", type=Path, help="training goes on from this file if it is there")
    arg.add_argument("--minutes", type=float, default=40)
    arg.add_argument("--rank", type=int, default=14)
    arg.add_argument("--lr", type=float, default=2e-3)
    arg.add_argument("--seed", type=int, default=0)
    args = arg.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(len(TIMES))
    assert tuple(scheduler.timesteps.tolist()) == TIMES
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, safety_checker=None)
    if args.generate:
        generate(pipeline, args.cache, args.generate, args.seed)
    else:
        train(pipeline, args.cache, args.out, args.minutes, args.rank, args.lr)


if __name__ == "__main__":
    main()
