"""Trains a small LoRA on the demo model: all that it draws, in sepia. Two minutes on one thread; the file is what `sd-server generate --lora` takes.

    python train_lora.py ../demo --out runs/sepia.safetensors
"""
import argparse
import random
import time
from pathlib import Path
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import ImageOps
from cache import pixels
from train_unet import loss_weight
from world import sample

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv_out"]


def sepia(picture):
    return ImageOps.colorize(ImageOps.grayscale(picture), "#281c10", "#f4e4c4", "#a08058")


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", help="the demo model's directory")
    arg.add_argument("--out", type=Path, required=True)
    arg.add_argument("--minutes", type=float, default=2)
    arg.add_argument("--pictures", type=int, default=128)
    arg.add_argument("--rank", type=int, default=4)
    arg.add_argument("--batch", type=int, default=8)
    arg.add_argument("--lr", type=float, default=4e-3)
    args = arg.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, safety_checker=None)
    unet = pipeline.unet
    for module in (unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    rng = random.Random(0)
    pictures, captions = zip(*(sample(rng) for _ in range(args.pictures)))
    ids = pipeline.tokenizer(list(captions), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        encode = lambda part: pipeline.vae.encode(pixels(map(sepia, part))).latent_dist.mean * pipeline.vae.config.scaling_factor
        latents = torch.cat([encode(pictures[k : k + 16]) for k in range(0, len(pictures), 16)])
        contexts = pipeline.text_encoder(ids).last_hidden_state
    params = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0)
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    begin, step, mean = time.time(), 0, None
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = args.lr * (1 - done)
        k = torch.randint(len(latents), (args.batch,))
        t = torch.randint(1000, (args.batch,))
        alpha = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents[k])
        guess = unet(alpha.sqrt() * latents[k] + (1 - alpha).sqrt() * noise, t, contexts[k]).sample
        loss = (loss_weight(alpha) * (guess - noise).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}  loss {mean:.4f}", flush=True)
    layers = {name: x.half() for name, x in get_peft_model_state_dict(unet).items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(args.out.parent, unet_lora_layers=layers, weight_name=args.out.name, unet_lora_adapter_metadata=settings)


if __name__ == "__main__":
    main()
