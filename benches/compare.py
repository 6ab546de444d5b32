"""sd-server beside PyTorch (diffusers) and OpenVINO on the CPU: seconds for one guided UNet step (2 rows) and one VAE
decode, everything in one run, the programs in turn so that a slow spell of the machine falls on all of them.

    python compare.py MODEL_DIR [--sizes 256 512] [--dtypes f32 bf16] [--threads 2] [--rounds 3]

MODEL_DIR is Stable Diffusion in the diffusers layout; weights may be random, since the time does not depend on them.
Needs torch, diffusers, openvino from PyPI. Prints one line for each program and round, then the median of the rounds
and its ratio to the best peer's.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^(\S+).* unet_step_s ([\d.]+) vae_decode_s ([\d.]+)")
RUNS = 3


def median_seconds(call):
    """The median of RUNS calls after two that are not counted."""
    import time
    call(), call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def torch_peer(model, size, dtype, threads):
    """diffusers' modules in eager mode, channels last, which is their fastest without compiling."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    load = lambda cls, part: cls.from_pretrained(model / part, torch_dtype=kind).eval().to(memory_format=torch.channels_last)
    unet, vae = load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
    latent = torch.randn(2, unet.config.in_channels, size // 8, size // 8, dtype=kind)
    context = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=kind)
    return median_seconds(lambda: unet(latent, 500, context)), median_seconds(lambda: vae.decode(latent[:1]))


def openvino_peer(model, size, dtype, threads):
    """The same modules converted and compiled by OpenVINO for this size."""
    import numpy as np
    import openvino as ov
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    config = {"INFERENCE_PRECISION_HINT": dtype, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = UNet2DConditionModel.from_pretrained(model / "unet").eval()

        def forward(self, latent, t, context):
            return self.unet(latent, t, context, return_dict=False)[0]

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = AutoencoderKL.from_pretrained(model / "vae").eval()

        def forward(self, latent):
            return self.vae.decode(latent, return_dict=False)[0]

    def measure(module, example):
        with torch.no_grad():
            converted = ov.convert_model(module, example_input=example)
        names = [port.get_any_name() for port in converted.inputs]
        converted.reshape({name: list(e.shape) for name, e in zip(names, example)})
        request = ov.Core().compile_model(converted, "CPU", config).create_infer_request()
        inputs = [np.asarray(e) for e in example]
        return median_seconds(lambda: request.infer(inputs))

    step = Step()
    latent = torch.randn(2, step.unet.config.in_channels, size // 8, size // 8)
    context = torch.randn(2, 77, step.unet.config.cross_attention_dim)
    seconds = measure(step, (latent, torch.tensor([500.0, 500.0]), context))
    del step
    return seconds, measure(Decode(), (latent[:1],))


PEERS = {"torch": torch_peer, "openvino": openvino_peer}


def run(program, model, size, dtype, threads):
    """One program in a process of its own: (step, decode) in seconds."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads),
                       # torch returns every activation to the kernel otherwise: worth a third of its time.
                       MALLOC_MMAP_THRESHOLD_="8589934592", MALLOC_TRIM_THRESHOLD_="17179869184")
    if program == "sd-server":
        command = ["cargo", "bench", "--quiet", "--bench", "networks", "--", str(model), str(size), dtype, str(RUNS)]
    else:
        command = [sys.executable, __file__, str(model), "--peer", program, "--sizes", str(size), "--dtypes", dtype,
                   "--threads", str(threads)]
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if LINE.match(line))
    print(line, flush=True)
    return tuple(float(value) for value in LINE.match(line).groups()[1:])


def compare(args):
    programs = ["sd-server", *PEERS]
    for dtype in args.dtypes:
        for size in args.sizes:
            rounds = {program: [] for program in programs}
            for _ in range(args.rounds):
                for program in programs:
                    rounds[program].append(run(program, args.model, size, dtype, args.threads))
            medians = {p: [statistics.median(column) for column in zip(*r)] for p, r in rounds.items()}
            for i, what in enumerate(("UNet step", "VAE decode")):
                ours, best = medians["sd-server"][i], min(medians[p][i] for p in PEERS)
                row = ", ".join(f"{p} {medians[p][i]:.3f} s" for p in programs)
                print(f"{what}, {size} px, {dtype}, median of {args.rounds}: {row}; ours / best peer {ours / best:.2f}", flush=True)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", type=lambda path: Path(path).resolve())
    arg.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    arg.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    arg.add_argument("--threads", type=int, default=2)
    arg.add_argument("--rounds", type=int, default=3)
    arg.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    args = arg.parse_args()
    if args.peer:
        step, decode = PEERS[args.peer](args.model, args.sizes[0], args.dtypes[0], args.threads)
        print(f"{args.peer} {args.dtypes[0]} {args.sizes[0]}px unet_step_s {step:.3f} vae_decode_s {decode:.3f}")
    else:
        compare(args)


if __name__ == "__main__":
    main()
