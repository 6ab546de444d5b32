"""Trains UNet and text encoder together on cached latents, from a model directory or from nothing; stops at a given time and can go on later.

    python train_unet.py --model models/demo --tokenizer models/demo/tokenizer --cache cache --out runs/unet --minutes 90

Under `torchrun --nproc-per-node 2` (two workers of one thread each) every worker takes a batch of its own and the gradients are averaged.
"""
import argparse
import os
import time
from pathlib import Path
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 192),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=128, attention_head_dim=4, norm_num_groups=32)
TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=128)
CAPTION_DROP = 0.1
EMA = 0.996
ALPHAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def models(model, tokenizer):
    if model:
        return UNet2DConditionModel.from_pretrained(f"{model}/unet").float(), CLIPTextModel.from_pretrained(f"{model}/text_encoder").float()
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return UNet2DConditionModel(**UNET), CLIPTextModel(CLIPTextConfig(**TEXT, **ids))


class Pool:
    """The cached latents and token ids; `refresh` picks up shards written since."""

    def __init__(self, folder):
        self.folder, self.read, self.latents, self.ids = Path(folder), set(), [], []

    def refresh(self):
        for path in sorted(set(self.folder.glob("*.pt")) - self.read):
            shard = torch.load(path)
            self.latents.append(shard["latents"])
            self.ids.append(shard["ids"])
            self.read.add(path)

    def batch(self, n):
        at = list(zip(torch.randint(len(self.latents), (n,)).tolist(), torch.randint(len(self.latents[0]), (n,)).tolist()))
        return torch.stack([self.latents[k][i] for k, i in at]).float(), torch.stack([self.ids[k][i] for k, i in at]).long()


def loss_weight(alpha):
    """As if the error were measured on v instead of noise, within limits: very noisy steps decide the colours, and count for little otherwise."""
    return (1 / alpha).clamp(max=30) / 9


def loss_of(unet, latents, context, blank, unprompted, guidance, condition=None):
    """How wrong the predicted noise is, guided where the caption is not blank; `condition` (B, C, h, w) goes beside the latents of a UNet for inpainting."""
    t = torch.randint(1000, (len(latents),))
    alpha = ALPHAS[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    if condition is not None:
        noisy = torch.cat([noisy, condition], 1)
    guess = unet(noisy, t, context).sample
    if guidance != 1:
        with torch.no_grad():
            unguided = unet(noisy, t, unprompted.expand(len(latents), -1, -1)).sample
        guess = torch.where(blank.view(-1, 1, 1, 1), guess, unguided + guidance * (guess - unguided))
    return (loss_weight(alpha) * (guess - noise).square()).mean()


def average_gradients(params, done):
    """Averages the gradients over the workers, and with them how far each thinks the training is."""
    flat = torch.cat([p.grad.flatten() for p in params] + [torch.tensor([done])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(params, flat[:-1].split([p.numel() for p in params])):
        p.grad.copy_(grad.view_as(p))
    return flat[-1].item()


def save(path, state):
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--model", help="model directory to start from")
    arg.add_argument("--tokenizer", required=True)
    arg.add_argument("--cache", required=True)
    arg.add_argument("--out", type=Path, required=True, help="holds state.pt; training goes on from there if it exists")
    arg.add_argument("--minutes", type=float, required=True)
    arg.add_argument("--batch", type=int, default=16)
    arg.add_argument("--lr", type=float, default=8e-4)
    arg.add_argument("--final-lr", type=float, default=2e-6)
    arg.add_argument("--guidance", type=float, default=1.0, help="the guidance at which the noise is to be right; 1 is ordinary training")
    arg.add_argument("--seed", type=int, default=0)
    arg.add_argument("--threads", type=int, default=1)
    args = arg.parse_args()

    torch.set_num_threads(args.threads)
    workers = int(os.environ.get("WORLD_SIZE", 1))
    if workers > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if workers > 1 else 0
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    unet, text = models(args.model, tokenizer)
    unet.train(), text.train()
    names, params = zip(*[(f"{m}.{n}", p) for m, module in (("unet", unet), ("text", text)) for n, p in module.named_parameters()])
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    step = 0
    if (args.out / "state.pt").exists():
        old = torch.load(args.out / "state.pt")
        step, average = old["step"], [old["average"][n] for n in names]
        with torch.no_grad():
            for n, p in zip(names, params):
                p.copy_(old["params"][n])
        optimizer.load_state_dict(old["optimizer"])

    def state():
        return {"step": step, "params": {n: p.detach() for n, p in zip(names, params)}, "average": dict(zip(names, average)), "optimizer": optimizer.state_dict()}

    empty = tokenizer([""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    pool = Pool(args.cache)
    torch.manual_seed(args.seed + 1000 * step + rank)
    begin, first, mean, saved, done = time.time(), step, None, time.time(), 0
    while done < 1:
        if (step - first) % 100 == 0:
            pool.refresh()
        for group in optimizer.param_groups:
            group["lr"] = args.final_lr + (args.lr - args.final_lr) * min(1, (step - first + 1) / 200) * max(0, 1 - done)
        z, ids = pool.batch(args.batch)
        blank = torch.rand(args.batch) < CAPTION_DROP
        ids[blank] = empty
        with torch.no_grad():
            unprompted = text(empty).last_hidden_state
        loss = loss_of(unet, z, text(ids).last_hidden_state, blank, unprompted, args.guidance)
        optimizer.zero_grad()
        loss.backward()
        done = (time.time() - begin) / (60 * args.minutes)
        if workers > 1:
            done = average_gradients(params, done)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, list(params), 1 - min(EMA, (1 + step) / (10 + step)))
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if rank == 0 and step % 100 == 0:
            print(f"step {step}  {(time.time() - begin) / 60:.1f} min  loss {mean:.4f}  pictures {len(pool.latents) * 1000}", flush=True)
        if rank == 0 and (done >= 1 or time.time() - saved > 180):
            saved = time.time()
            save(args.out / "state.pt", state())


if __name__ == "__main__":
    main()
