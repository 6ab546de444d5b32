"""Whole runs of Stable Diffusion 2.x as single files, for tests/parity/second.rs: base (epsilon),
velocity, and inpainting. A part of make_fixtures.py.
"""

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from make_fixtures import HERE, UNETS, check_single, generator, ldm, randomise, save

ROOT = HERE / "second"
SHAPE = {**UNETS["v2"], "in_channels": 9, "block_out_channels": (8, 16),
         "attention_head_dim": [2, 4],
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
NAMES = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
         "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def rounded(model):
    """The model with the weights that a file in f16 has."""
    return model.half().float().eval()


def open_clip(model, layers):
    """The tensors of a text encoder in the names of OpenCLIP, with one layer more at the end."""
    tower = {key.removeprefix("text_model."): x for key, x in model.state_dict().items()}
    width = model.config.hidden_size
    text = {"positional_embedding": tower["embeddings.position_embedding.weight"],
            "token_embedding.weight": tower["embeddings.token_embedding.weight"],
            "text_projection": torch.eye(width), "logit_scale": torch.tensor(4.6)}
    for kind in ("weight", "bias"):
        text[f"ln_final.{kind}"] = tower[f"final_layer_norm.{kind}"]
        for i in range(layers + 1):
            ours, theirs = f"encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
            qkv = [tower[f"{ours}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            text[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for name, other in NAMES.items():
                text[f"{theirs}.{other}.{kind}"] = tower[f"{ours}.{name}.{kind}"]
    return {f"cond_stage_model.model.{key}": x for key, x in text.items()}


@torch.no_grad()
def second():
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "v2/tokenizer")
    last = len(tokenizer) - 1
    config = CLIPTextConfig(
        vocab_size=last + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=3, hidden_act="gelu", bos_token_id=last - 1, eos_token_id=last,
        pad_token_id=0,
    )
    text = rounded(randomise(CLIPTextModel(config), 600))
    text.save_pretrained(ROOT / "text_encoder")
    (ROOT / "text_encoder/model.safetensors").unlink()
    vae = diffusers.AutoencoderKL.from_pretrained(HERE / "v1/vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(HERE / "v2/unet")
    inpainting = rounded(randomise(diffusers.UNet2DConditionModel(**SHAPE), 601))
    inpainting.save_pretrained(ROOT / "unet")
    (ROOT / "unet/diffusion_pytorch_model.safetensors").unlink()
    tensors = ldm(inpainting, vae, {})
    check_single(tensors, inpainting, vae)
    # The VAE is that of other files here.
    tensors = {key: x for key, x in tensors.items() if key.startswith("model.diffusion_model.")}
    save({key: x.half() for key, x in tensors.items()}, ROOT / "inpainting.safetensors")
    save({key: x.half() for key, x in open_clip(text, 2).items()}, ROOT / "text.safetensors")
    known = load_file(HERE / "start.safetensors")
    image, mask = [Image.fromarray(known[name].numpy()) for name in ("picture", "mask")]
    inputs = {"image": image, "mask_image": mask, "strength": 0.8, "width": 64, "height": 64}
    runs = {
        "base": (diffusers.StableDiffusionPipeline, unet, "epsilon", {}),
        "velocity": (diffusers.StableDiffusionPipeline, unet, "v_prediction", {}),
        "inpainting": (diffusers.StableDiffusionInpaintPipeline, inpainting, "epsilon", inputs),
    }
    expected = {}
    for name, (kind, network, prediction, extra) in runs.items():
        scheduler = diffusers.DDIMScheduler(**SCHEDULER, prediction_type=prediction)
        pipeline = kind(
            vae=vae, text_encoder=text, tokenizer=tokenizer, unet=network, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        for output in ("latent", "pt"):
            drawn = pipeline("a red house", num_inference_steps=10, guidance_scale=3.0,
                             generator=generator(11), output_type=output, **extra)
            expected[f"{name}.{output}"] = drawn.images
    pictures = {key: x for key, x in expected.items() if key.endswith(".pt")}
    expected |= {key: (x * 255).round().byte() for key, x in pictures.items()}
    save(expected, ROOT / "expected.safetensors")
