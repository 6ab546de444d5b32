"""Judges pictures against prompts: draws the held-out prompts of rules.json with a model or a server, or takes pictures made elsewhere, and counts how many are right.

A check passes when the share of the pixels in its box that lie within `tolerance` (Euclidean distance in RGB) of one of its colours is at least `min_share` and at most
`max_share`; a picture is right when all its checks pass.

    python evaluate.py models/demo
    python evaluate.py models/demo --lcm models/demo/loras/lcm.safetensors --steps 4 --guidance 1
    python evaluate.py --url http://localhost:8080      # what a server draws
    python evaluate.py --pictures DIR      # 000.png, 001.png, ... in the order of rules.json
"""
import argparse
import io
import json
import urllib.request
from collections import Counter
from pathlib import Path
import numpy as np
from PIL import Image


def share(picture, check):
    height, width, _ = picture.shape
    x0, y0, x1, y1 = (int(v * n + 0.5) for v, n in zip(check["box"], (width, height, width, height)))
    box = picture[y0:y1, x0:x1].astype(float)
    return np.any([np.square(box - c).sum(-1) <= check["tolerance"] ** 2 for c in check["colours"]], axis=0).mean()


def judge(picture, case):
    """Whether the picture is right, and the kinds of check it fails."""
    failed = {c["what"] for c in case["checks"] if not c["min_share"] <= share(picture, c) <= c.get("max_share", 1)}
    return not failed, failed


def drawn(model, cases, steps, guidance, batch=8, lcm=None):
    """Pictures by the model, with its own scheduler; with an LCM-LoRA by the LCM sampler."""
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
    if lcm:
        pipeline.load_lora_weights(lcm.parent, weight_name=lcm.name)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for i in range(0, len(cases), batch):
        part = cases[i:i + batch]
        seeds = [torch.Generator().manual_seed(c["seed"]) for c in part]
        yield from pipeline([c["prompt"] for c in part], num_inference_steps=steps, guidance_scale=guidance, generator=seeds).images


def served(url, cases, steps, guidance):
    """Pictures by a running server, with its model's scheduler."""
    for case in cases:
        asked = {"prompt": case["prompt"], "seed": case["seed"], "steps": steps, "guidance_scale": guidance}
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/invocations", json.dumps(asked).encode(), headers)) as reply:
            yield Image.open(io.BytesIO(reply.read())).convert("RGB")


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", nargs="?", help="model directory")
    arg.add_argument("--lcm", type=Path, help="with this LCM-LoRA and its sampler")
    arg.add_argument("--url", help="judge what a server draws instead")
    arg.add_argument("--pictures", type=Path, help="judge the PNGs in this directory instead")
    arg.add_argument("--rules", type=Path, default=Path(__file__).with_name("rules.json"))
    arg.add_argument("--steps", type=int, default=20)
    arg.add_argument("--guidance", type=float, default=7.5)
    arg.add_argument("--limit", type=int, help="only the first so many cases")
    arg.add_argument("--save", type=Path, help="keep the drawn pictures in this directory")
    arg.add_argument("--verbose", action="store_true", help="name every picture that is wrong")
    args = arg.parse_args()
    cases = json.loads(args.rules.read_text())[:args.limit]
    if args.pictures:
        pictures = (Image.open(args.pictures / f"{i:03}.png").convert("RGB") for i in range(len(cases)))
    elif args.url:
        pictures = served(args.url, cases, args.steps, args.guidance)
    else:
        pictures = drawn(args.model, cases, args.steps, args.guidance, lcm=args.lcm)
    right, wrong = 0, Counter()
    for i, (case, picture) in enumerate(zip(cases, pictures)):
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            picture.save(args.save / f"{i:03}.png")
        passed, failed = judge(np.asarray(picture), case)
        right += passed
        wrong.update(failed)
        if args.verbose and failed:
            print(f"{i:03} {', '.join(sorted(failed))}: {case['prompt']}", flush=True)
    n = len(cases)
    for what in ("sky", "ground", "object"):
        print(f"{what}: {n - wrong[what]} of {n} right ({100 - 100 * wrong[what] / n:.1f} %)")
    print(f"all: {right} of {n} right ({100 * right / n:.1f} %)")


if __name__ == "__main__":
    main()
