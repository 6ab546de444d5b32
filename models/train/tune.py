"""Trains a part of a finished UNet for some minutes: what `train_lora.py` and `train_inpainting.py` have in common."""
import time
import torch
from train_unet import CAPTION_DROP, loss_of

BATCH = 16
# That of the model's own last phase: it draws best at twice this.
GUIDANCE = 3.7
EMA = 0.99


@torch.no_grad()
def contexts_of(pipeline, captions):
    """Captions as the UNet takes them (n, 77, D)."""
    ids = pipeline.tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return torch.cat([pipeline.text_encoder(part).last_hidden_state for part in ids.split(100)])


def tune(unet, params, latents, contexts, unprompted, minutes, lr, conditions=None):
    """Trains the parameters on latents (n, C, h, w) with their contexts; returns their running averages."""
    unet.train()
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0)
    average = [p.detach().clone() for p in params]
    begin, step, mean = time.time(), 0, None
    while (done := (time.time() - begin) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - done)
        k = torch.randint(len(latents), (BATCH,))
        blank = torch.rand(BATCH) < CAPTION_DROP
        context = torch.where(blank.view(-1, 1, 1), unprompted, contexts[k])
        loss = loss_of(unet, latents[k], context, blank, unprompted, GUIDANCE, None if conditions is None else conditions[k])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(EMA, (1 + step) / (10 + step)))
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}  {(time.time() - begin) / 60:.1f} min  loss {mean:.4f}", flush=True)
    return average
