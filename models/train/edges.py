"""Edges of pictures, and how well a picture has those that it was to have: what `train_controlnet.py` trains on and is judged by.

    sd-server --model demo --controlnets-dir runs & python edges.py http://localhost:8080 --vae ../demo/vae
"""
import argparse
import base64
import io
import json
import random
import urllib.request
from pathlib import Path
import cv2
import numpy as np
from PIL import Image
from evaluate import judge
from rules import STYLES
from world import all_scenes, caption, draw

# The thresholds of the server's preprocessor `canny`, when none are given.
THRESHOLDS = 100, 200
# How far, in pixels, an edge may lie from where it was to be.
REACH = 2


def canny(picture):
    """White edges on black (H, W), bytes."""
    return cv2.Canny(np.asarray(picture), *THRESHOLDS)


def near(edges):
    return cv2.dilate(edges, np.ones((2 * REACH + 1, 2 * REACH + 1), np.uint8)) > 0


def f1(wanted, drawn):
    """Harmonic mean of the shares of drawn edges that are wanted and of wanted edges that are drawn."""
    precision = near(wanted)[drawn > 0].mean() if drawn.any() else 0
    recall = near(drawn)[wanted > 0].mean() if wanted.any() else 0
    return 2 * precision * recall / max(precision + recall, 1e-9)


def scenes(count):
    """`count` of the held-out prompts, spread over all of them, each with a picture of its scene."""
    cases = json.loads(Path(__file__).with_name("rules.json").read_text())
    by_prompt = {caption(scene, style=style): scene for scene in all_scenes() if scene.held_out for style in set(STYLES)}
    for case in cases[::len(cases) // count][:count]:
        yield case, draw(by_prompt[case["prompt"]], random.Random(case["seed"]))


def served(url, cases, controls, net, settings):
    """What a server draws of the prompts by the control pictures."""
    for case, edges in zip(cases, controls):
        image = io.BytesIO()
        Image.fromarray(edges).convert("RGB").save(image, "PNG")
        asked = settings | {"prompt": case["prompt"], "seed": case["seed"], "controlnets": [net | {"image": base64.b64encode(image.getvalue()).decode()}]}
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/invocations", json.dumps(asked).encode(), headers)) as reply:
            yield Image.open(io.BytesIO(reply.read())).convert("RGB")


def through(vae, pictures):
    """The pictures encoded and decoded: no net can do much better."""
    import torch
    from diffusers import AutoencoderKL
    from cache import pixels
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(vae).float()
        decoded = vae.decode(vae.encode(pixels(pictures)).latent_dist.mean).sample
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def report(name, cases, controls, pictures):
    pictures = [np.asarray(picture) for picture in pictures]
    scores = [f1(edges, canny(picture)) for edges, picture in zip(controls, pictures)]
    right = sum(judge(picture, case)[0] for case, picture in zip(cases, pictures))
    print(f"{name}: F1 of edges {np.mean(scores):.3f}, at least {np.quantile(scores, 0.1):.3f} in nine of ten; {right} of {len(cases)} right by the rules", flush=True)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("url", help="the server")
    arg.add_argument("--net", default="canny", help="the net's name there")
    arg.add_argument("--scales", type=float, nargs="+", default=(0, 1))
    arg.add_argument("--steps", type=int, default=20)
    arg.add_argument("--guidance", type=float, default=7.5)
    arg.add_argument("--count", type=int, default=64)
    arg.add_argument("--vae", help="judge the scenes through this autoencoder, too")
    args = arg.parse_args()
    cases, pictures = zip(*scenes(args.count))
    controls = [canny(picture) for picture in pictures]
    if args.vae:
        report("the scenes through the autoencoder", cases, controls, through(args.vae, pictures))
    for scale in args.scales:
        settings = {"steps": args.steps, "guidance_scale": args.guidance}
        report(f"scale {scale:g}", cases, controls, served(args.url, cases, controls, {"model": args.net, "scale": scale}, settings))


if __name__ == "__main__":
    main()
