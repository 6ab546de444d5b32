"""Compares sd-server with PyTorch (diffusers) and OpenVINO on the CPU: seconds for one guided UNet step (2 rows), one
VAE decode and one whole image. All programs run alternately, so that a slow phase of the machine affects all of them.

    cargo build --release && python benches/compare.py MODEL_DIR [--sizes 256 512] [--dtypes f32 bf16] [--threads 2]
        [--rounds 3] [--runs 3] [--steps 20] [--peers torch openvino]

MODEL_DIR is Stable Diffusion 1.x or XL in Diffusers format; weights can be random (random_model.py), since the time does
not depend on them. A program's figure is the median of --runs calls, behind two that warm up (behind one, if it is one). A
whole image is timed from prompt to PNG, ours through HTTP, the peers' with diffusers' pipeline in its own process; --steps 0
omits it, and for torch all of the model but UNet and VAE. Needs torch, diffusers, openvino from PyPI. Prints one line per
program and round, then the median of the rounds and its ratio to the best peer's.
"""
import argparse
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^(\S+).* unet_step_s ([\d.]+) vae_decode_s ([\d.]+)(?: image_s ([\d.]+))?")
PROMPT = "a red house by the sea"


def median_seconds(call, runs):
    """The median of some calls after those that warm up."""
    for _ in range(min(runs, 2)):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def image_seconds(generate, steps):
    """Seconds for one image after a short warm-up: the first image of a process is slower."""
    generate(1)
    start = time.perf_counter()
    generate(steps)
    return time.perf_counter() - start


def pipeline(model, kind, size):
    """diffusers' own pipeline, from the prompt to the bytes of a PNG, as a function of the steps."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=kind, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def generate(steps):
        pipe(PROMPT, height=size, width=size, num_inference_steps=steps, guidance_scale=7.5).images[0].save(io.BytesIO(), "PNG")

    return pipe, generate


def torch_peer(model, size, dtype, threads, steps, runs):
    """diffusers' modules in eager mode, channels last, which is their fastest without compiling."""
    import diffusers
    import torch
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if steps:
        pipe, generate = pipeline(model, kind, size)
        modules = pipe.unet, pipe.vae
    else:
        modules = (network.from_pretrained(model, subfolder=folder, torch_dtype=kind) for network, folder in
                   [(diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")])
    unet, vae = (module.eval().to(memory_format=torch.channels_last) for module in modules)
    side = size >> len(vae.config.block_out_channels) - 1
    latent = torch.randn(2, unet.config.in_channels, side, side, dtype=kind)
    context = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=kind)
    added = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        sizes = torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=kind)
        added = {"text_embeds": torch.randn(2, pooled, dtype=kind), "time_ids": sizes}
    step = median_seconds(lambda: unet(latent, 500, context, added_cond_kwargs=added), runs)
    decode = median_seconds(lambda: vae.decode(latent[:1]), runs)
    return step, decode, image_seconds(generate, steps) if steps else None


def openvino_peer(model, size, dtype, threads, steps, runs):
    """The same modules converted and compiled by OpenVINO for this size, in diffusers' pipeline; of 1.x alone."""
    import numpy as np
    import openvino as ov
    import torch
    torch.set_num_threads(threads)
    config = {"INFERENCE_PRECISION_HINT": dtype, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    pipe, generate = pipeline(model, torch.float32, size)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = pipe.unet.eval()

        def forward(self, latent, t, context):
            return self.unet(latent, t, context, return_dict=False)[0]

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = pipe.vae.eval()

        def forward(self, latent):
            return self.vae.decode(latent, return_dict=False)[0]

    def compiled(module, *example):
        with torch.no_grad():
            converted = ov.convert_model(module, example_input=example)
        names = [port.get_any_name() for port in converted.inputs]
        converted.reshape({name: list(e.shape) for name, e in zip(names, example)})
        request = ov.Core().compile_model(converted, "CPU", config).create_infer_request()
        return lambda *inputs: request.infer([np.asarray(e) for e in inputs])[0]

    side = size // pipe.vae_scale_factor
    latent = torch.randn(2, pipe.unet.config.in_channels, side, side)
    context = torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
    t = torch.tensor([500.0, 500.0])
    step, decode = compiled(Step(), latent, t, context), compiled(Decode(), latent[:1])
    seconds = median_seconds(lambda: step(latent, t, context), runs), median_seconds(lambda: decode(latent[:1]), runs)
    if not steps:
        return *seconds, None
    pipe.unet.forward = lambda latent, t, encoder_hidden_states, **_: (
        torch.from_numpy(step(latent, t.expand(2).float(), encoder_hidden_states)),)
    pipe.vae.decode = lambda latent, **_: (torch.from_numpy(decode(latent)),)
    return *seconds, image_seconds(generate, steps)


PEERS = {"torch": torch_peer, "openvino": openvino_peer}


@contextlib.contextmanager
def server(model, dtype, threads, environment):
    """The URL of a server with the model, once it is ready."""
    command = [ROOT / "target/release/sd-server", "serve", "--model", model, "--device", "cpu", "--dtype", dtype,
               "--threads", str(threads), "--request-timeout-ms", "3600000", "--host", "127.0.0.1", "--port", "0", "--log", "warn"]
    if "CARGO_TARGET_DIR" in environment:
        command[0] = Path(environment["CARGO_TARGET_DIR"]) / "release/sd-server"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().removeprefix("listening on ").strip()
        while subprocess.run([command[0], "healthcheck", "--port", url.rpartition(":")[2]], capture_output=True).returncode:
            if process.poll() is not None:
                sys.exit("the server exited before it was ready")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def our_image(model, size, dtype, threads, steps, environment):
    with server(model, dtype, threads, environment) as url:
        def generate(steps):
            fields = {"prompt": PROMPT, "width": size, "height": size, "steps": steps, "guidance_scale": 7.5, "seed": 1}
            headers = {"Content-Type": "application/json", "Accept": "image/png"}
            request = urllib.request.Request(f"{url}/invocations", json.dumps(fields).encode(), headers)
            with urllib.request.urlopen(request) as response:
                response.read()

        return image_seconds(generate, steps)


def run(program, model, size, dtype, threads, steps, runs):
    """Runs one program in its own process: seconds for step, decode and image (if any)."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads),
                       # Otherwise torch returns every activation to the kernel, which costs a third of its time.
                       MALLOC_MMAP_THRESHOLD_="8589934592", MALLOC_TRIM_THRESHOLD_="17179869184")
    if program == "sd-server":
        command = ["cargo", "bench", "--quiet", "--bench", "networks", "--", str(model), str(size), dtype, str(runs)]
    else:
        command = [sys.executable, __file__, str(model), "--peer", program, "--sizes", str(size), "--dtypes", dtype,
                   "--threads", str(threads), "--steps", str(steps), "--runs", str(runs)]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if LINE.match(line))
    if program == "sd-server" and steps:
        seconds = our_image(model, size, dtype, threads, steps, environment)
        line = re.sub(r"(vae_decode_s [\d.]+)", rf"\1 image_s {seconds:.3f}", line)
    print(line, flush=True)
    return tuple(float(value) for value in LINE.match(line).groups()[1:] if value)


def compare(args):
    programs = ["sd-server", *args.peers]
    for dtype in args.dtypes:
        for size in args.sizes:
            rounds = {program: [] for program in programs}
            for _ in range(args.rounds):
                for program in programs:
                    rounds[program].append(run(program, args.model, size, dtype, args.threads, args.steps, args.runs))
            medians = {p: [statistics.median(column) for column in zip(*r)] for p, r in rounds.items()}
            whats = ("UNet step", "VAE decode", f"image of {args.steps} steps")
            for i, what in enumerate(whats[: 3 if args.steps else 2]):
                ours, best = medians["sd-server"][i], min(medians[p][i] for p in args.peers)
                row = ", ".join(f"{p} {medians[p][i]:.3f} s" for p in programs)
                print(f"{what}, {size} px, {dtype}, median of {args.rounds}: {row}; ours / best peer {ours / best:.2f}", flush=True)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", type=lambda path: Path(path).resolve())
    arg.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    arg.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    arg.add_argument("--threads", type=int, default=2)
    arg.add_argument("--rounds", type=int, default=3)
    arg.add_argument("--runs", type=int, default=3)
    arg.add_argument("--steps", type=int, default=20)
    arg.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    arg.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    args = arg.parse_args()
    if args.peer:
        step, decode, image = PEERS[args.peer](args.model, args.sizes[0], args.dtypes[0], args.threads, args.steps, args.runs)
        print(f"{args.peer} {args.dtypes[0]} {args.sizes[0]}px unet_step_s {step:.3f} vae_decode_s {decode:.3f}",
              f"image_s {image:.3f}" if args.steps else "")
    else:
        compare(args)


if __name__ == "__main__":
    main()
