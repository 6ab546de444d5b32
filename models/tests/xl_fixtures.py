"""Writes tests/fixtures/xl/: a small model of Stable Diffusion XL with random weights, and what
diffusers and transformers compute with it, for tests/parity/xl.rs.

    python xl_fixtures.py [networks pictures hires emphasis single lora inversion]

Its weights are rounded to f16, in which the files are; diffusers computed with them in f32. The
committed files were made with torch 2.15.0, diffusers 0.42.1 and transformers 5.24.0 on a CPU.
"""

import argparse
import json
import shutil

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer,
)

from make_fixtures import (
    HERE as FIXTURES, check_single, generator, ldm, ldm_unet, randomise, save, windows,
)

HERE = FIXTURES / "xl"

# Of stabilityai/stable-diffusion-xl-base-1.0, scheduler/scheduler_config.json.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

# Of stabilityai/sdxl-turbo.
TURBO = {
    **SCHEDULER, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing",
}

# As anime models with velocities are configured.
ZERO_SNR = {
    **SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}

TEXTS = {
    "text_encoder": dict(
        vocab_size=639, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, hidden_act="quick_gelu", projection_dim=16,
        bos_token_id=637, eos_token_id=638, pad_token_id=638,
    ),
    # Published files have this id of the last token, by which another token is meant.
    "text_encoder_2": dict(
        vocab_size=639, hidden_size=24, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, hidden_act="gelu", projection_dim=20,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    ),
}

XL = dict(
    block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 2, 4], cross_attention_dim=40,
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=68,
)

UNETS = {
    "unet": XL,
    # With the mask and the masked image as inputs.
    "inpaint": {
        **XL, "in_channels": 9, "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2], "attention_head_dim": [1, 2],
    },
    # Blocks whose layers differ, and a middle without attention, as SSD-1B and Vega have them.
    "ssd": {
        **XL, "block_out_channels": (8, 8), "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[2, 1], 1], "attention_head_dim": [1, 2],
    },
}

# Of the second, one by which a change of 1e-6 in the inputs changes latents by 1e-5: others by more.
SEEDS = {"unet": 610, "inpaint": 643, "ssd": 612}

VAE = dict(
    block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    scaling_factor=0.13025,
)


def rounded(model, seed):
    """Random weights that f16 holds."""
    randomise(model, seed)
    for p in model.parameters():
        p.data.copy_(p.data.half().float())
    return model.eval()


def keep(model, target):
    """The model's files, in f16."""
    model.save_pretrained(target)
    for path in target.glob("*.safetensors"):
        save_file({name: x.half() for name, x in load_file(path).items()}, path)
    path = target / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config, indent=1) + "\n")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


@torch.no_grad()
def networks():
    """The model's files, and outputs of its networks."""
    write(HERE / "model_index.json", {
        "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1",
        "force_zeros_for_empty_prompt": True, "feature_extractor": [None, None],
        "image_encoder": [None, None], "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    })
    write(HERE / "scheduler/scheduler_config.json", SCHEDULER)
    for folder, source in {"tokenizer": "tokenizer", "tokenizer_2": "v2/tokenizer"}.items():
        (HERE / folder).mkdir(parents=True, exist_ok=True)
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copyfile(FIXTURES / source / name, HERE / folder / name)
    tensors = {}
    ids = torch.randint(0, 637, (2, 77), generator=generator(3))
    for row, end in enumerate((76, 9)):
        ids[row, 0], ids[row, end] = 637, 638
        ids[row, end + 1 :] = 0
    tensors["ids"] = ids
    for seed, (folder, shape) in enumerate(TEXTS.items()):
        kind = CLIPTextModelWithProjection if folder.endswith("_2") else CLIPTextModel
        model = rounded(kind(CLIPTextConfig(**shape)), 600 + seed)
        keep(model, HERE / folder)
        output = model(ids, output_hidden_states=True)
        for skip in (0, 1):
            tensors[f"{folder}.{skip}"] = output.hidden_states[-(skip + 2)]
        if folder.endswith("_2"):
            tensors["pooled"] = output.text_embeds
    for name, shape in UNETS.items():
        model = rounded(diffusers.UNet2DConditionModel(**shape), SEEDS[name])
        keep(model, HERE / name if name == "unet" else HERE / name / "unet")
        stream = generator(620)
        draw = lambda *sides: torch.randn(sides, generator=stream)
        inputs = {
            "latents": draw(2, shape.get("in_channels", 4), 8, 8), "context": draw(2, 77, 40),
            "pooled": draw(2, 20),
            "sizes": torch.tensor([[1024.0, 768, 0, 16, 1024, 1024], [64, 64, 0, 0, 64, 64]]),
            "timesteps": torch.tensor([981.0, 3.5]),
        }
        added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]}
        output = model(inputs["latents"], inputs["timesteps"], inputs["context"],
                       added_cond_kwargs=added).sample
        tensors |= {f"{name}.{what}": x for what, x in {**inputs, "output": output}.items()}
    vae = rounded(diffusers.AutoencoderKL(**VAE), 630)
    keep(vae, HERE / "vae")
    save(tensors, HERE / "networks.safetensors")


# Pictures ------------------------------------------------------------------------------------


def pipeline(kind, unet="unet", scheduler=SCHEDULER, vae=None, **extra):
    """A pipeline of the networks above, in f32."""
    vae = vae or {}
    loaded = kind(
        vae=diffusers.AutoencoderKL.from_pretrained(HERE / "vae", torch_dtype=torch.float32, **vae),
        text_encoder=CLIPTextModel.from_pretrained(HERE / "text_encoder", dtype=torch.float32),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
            HERE / "text_encoder_2", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(HERE / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(HERE / "tokenizer_2"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(
            HERE / unet, torch_dtype=torch.float32),
        scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        add_watermarker=False,
        **extra,
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


DRAWN = dict(num_inference_steps=5, guidance_scale=3.0, height=64, width=64)
WORDS = ["a red house", "the sea"]

# Cases by name: the scheduler, arguments of the pipeline, and the VAE's configuration.
CASES = {
    "absent": (SCHEDULER, {}),
    "empty": (SCHEDULER, {"negative_prompt": ""}),
    "negative": (SCHEDULER, {"negative_prompt": "the sea"}),
    "prompt_2": (SCHEDULER, {"prompt_2": "a blue tree", "negative_prompt": "the sea",
                             "negative_prompt_2": "night"}),
    "unguided": (SCHEDULER, {"guidance_scale": 1.0}),
    "clip_skip": (SCHEDULER, {"clip_skip": 1, "negative_prompt": "the sea"}),
    "sizes": (SCHEDULER, {"original_size": (512, 768), "crops_coords_top_left": (8, 16),
                          "target_size": (1024, 512)}),
    "wide": (SCHEDULER, {"height": 64, "width": 96}),
    "rescale": (SCHEDULER, {"guidance_rescale": 0.7, "negative_prompt": "the sea"}),
    "turbo.1": (TURBO, {"num_inference_steps": 1, "guidance_scale": 0.0}),
    "turbo.4": (TURBO, {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "zero_snr": (ZERO_SNR, {"guidance_rescale": 0.7}),
}

MEAN = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [0.9, 1.1, 1.3, 0.8]}


@torch.no_grad()
def pictures():
    """Latents of whole runs, and pictures of some."""
    tensors = {}
    for name, (scheduler, options) in CASES.items():
        model = pipeline(diffusers.StableDiffusionXLPipeline, scheduler=scheduler)
        drawn = model("a red house", generator=generator(11), output_type="latent",
                      **{**DRAWN, **options})
        tensors[f"text.{name}"] = drawn.images
    for name, vae in {"plain": {}, "mean": MEAN}.items():
        model = pipeline(diffusers.StableDiffusionXLPipeline, vae=vae)
        drawn = model("a red house", generator=generator(11), output_type="pt", **DRAWN)
        tensors[f"picture.{name}"] = drawn.images
    stream = generator(5)
    picture = torch.randint(0, 256, (64, 64, 3), generator=stream, dtype=torch.uint8)
    mask = torch.randint(0, 256, (8, 8), generator=stream, dtype=torch.uint8)
    mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    tensors |= {"picture": picture, "mask": mask}
    image, hole = Image.fromarray(picture.numpy()), Image.fromarray(mask.numpy())
    of_hole = {"mask_image": hole, "width": 64, "height": 64}
    kinds = {
        "image": (diffusers.StableDiffusionXLImg2ImgPipeline, "unet", {}, {}),
        "moved": (diffusers.StableDiffusionXLImg2ImgPipeline, "unet", {}, MEAN),
        "hole": (diffusers.StableDiffusionXLInpaintPipeline, "unet", of_hole, {}),
        "told": (diffusers.StableDiffusionXLInpaintPipeline, "inpaint/unet", of_hole, {}),
    }
    for kind, (of, unet, options, vae) in kinds.items():
        for strength in (1.0, 0.5):
            model = pipeline(of, unet, vae=vae)
            drawn = model("a red house", image=image, strength=strength, generator=generator(11),
                          num_inference_steps=6, guidance_scale=3.0, output_type="latent", **options)
            tensors[f"{kind}.{strength}"] = drawn.images
    save(tensors, HERE / "pictures.safetensors")


@torch.no_grad()
def hires():
    """Latents of a base pass, upscaled, and of a second pass over them at its own size."""
    base = pipeline(diffusers.StableDiffusionXLPipeline)
    latents = base("a red house", generator=generator(11), output_type="latent", **DRAWN).images
    latents = torch.nn.functional.interpolate(latents, size=(12, 12), mode="bilinear")
    second = pipeline(diffusers.StableDiffusionXLImg2ImgPipeline)
    drawn = second("a red house", image=latents, strength=0.5, num_inference_steps=6,
                   guidance_scale=3.0, generator=generator(11), output_type="latent")
    save({"hires": drawn.images}, HERE / "hires.safetensors")


# Weights of tokens ---------------------------------------------------------------------------

EMPHASISED = ["a (red:1.4) house by the [sea]", "a house BREAK the (moon:0.5) at night"]


@torch.no_grad()
def emphasis():
    """Latents of prompts with weights, as AUTOMATIC1111 encodes them for both encoders."""
    model, tensors = pipeline(diffusers.StableDiffusionXLPipeline), {}
    for k, prompt in enumerate(EMPHASISED):
        joined, pooled = [], None
        for tokenizer, encoder in ((model.tokenizer, model.text_encoder),
                                   (model.tokenizer_2, model.text_encoder_2)):
            ids, weights = windows(prompt, tokenizer)
            output = encoder(torch.tensor(ids), output_hidden_states=True)
            states = output.hidden_states[-2]
            scaled = states * torch.tensor(weights).unsqueeze(-1)
            mean = lambda x: x.mean(dim=(1, 2), keepdim=True)
            joined.append((scaled * (mean(states) / mean(scaled))).flatten(0, 1).unsqueeze(0))
            pooled = output.text_embeds[:1] if encoder is model.text_encoder_2 else None
        context = torch.cat(joined, dim=-1)
        drawn = model(prompt_embeds=context, pooled_prompt_embeds=pooled,
                      negative_prompt_embeds=torch.zeros_like(context),
                      negative_pooled_prompt_embeds=torch.zeros_like(pooled),
                      generator=generator(11), output_type="latent", **DRAWN)
        tensors[f"emphasis.{k}"] = drawn.images
    save(tensors, HERE / "emphasis.safetensors")


# Single files --------------------------------------------------------------------------------


def tower(state):
    """The second text encoder in the names of OpenCLIP."""
    state = {key.removeprefix("text_model."): x for key, x in state.items()}
    tensors = {"positional_embedding": state["embeddings.position_embedding.weight"],
               "token_embedding.weight": state["embeddings.token_embedding.weight"],
               "text_projection": state["text_projection.weight"].T, "logit_scale": torch.tensor(4.6)}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for kind in ("weight", "bias"):
        tensors[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
        for i in range(TEXTS["text_encoder_2"]["num_hidden_layers"]):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            qkv = [state[f"{ours}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for name, other in names.items():
                tensors[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{name}.{kind}"]
    return tensors


@torch.no_grad()
def single():
    """The UNet for inpainting and the text encoders in one file, the VAE in another."""
    from diffusers.loaders import single_file_utils as theirs

    model = pipeline(diffusers.StableDiffusionXLInpaintPipeline, "inpaint/unet")
    first = {key.removeprefix("text_model."): x for key, x in model.text_encoder.state_dict().items()}
    text = {f"conditioner.embedders.0.transformer.text_model.{key}": x for key, x in first.items()}
    second = tower(model.text_encoder_2.state_dict())
    text |= {f"conditioner.embedders.1.model.{key}": x for key, x in second.items()}
    tensors = ldm(model.unet, model.vae, text)
    for ours, theirs_name in {"linear_1": "0.0", "linear_2": "0.2"}.items():
        for kind in ("weight", "bias"):
            key = f"model.diffusion_model.add_embedding.{ours}.{kind}"
            tensors[f"model.diffusion_model.label_emb.{theirs_name}.{kind}"] = tensors.pop(key)
    check_single(tensors, model.unet, model.vae)
    back = theirs.convert_open_clip_checkpoint(
        model.text_encoder_2, dict(tensors), prefix="conditioner.embedders.1.model.")
    for key, x in model.text_encoder_2.state_dict().items():
        read = back.get(key, back.get(key.removeprefix("text_model.")))
        assert torch.equal(read, x), key
    vae = {key: x for key, x in tensors.items() if key.startswith("first_stage_model.")}
    half = lambda tensors: {key: x.half() for key, x in tensors.items()}
    save(half({key: x for key, x in tensors.items() if key not in vae}), HERE / "single.safetensors")
    vae = {key.removeprefix("first_stage_model."): x for key, x in vae.items()}
    save(half(vae), HERE / "vae.safetensors")


# LoRAs ---------------------------------------------------------------------------------------

ADAPTED = {
    "unet": ["conv_in", "add_embedding.linear_1", "time_embedding.linear_2",
             "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
             "down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k",
             "down_blocks.2.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1",
             "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj",
             "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
             "up_blocks.1.upsamplers.0.conv", "down_blocks.1.downsamplers.0.conv"],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"],
    "text_encoder_2": ["encoder.layers.2.self_attn.v_proj", "encoder.layers.3.mlp.fc2"],
}
RANK, ALPHA, SCALE = 2, 1.0, 0.8


def original(name):
    """A UNet's layer in the names of the original code."""
    for ours, theirs in {"linear_1": "0.0", "linear_2": "0.2"}.items():
        name = name.replace(f"add_embedding.{ours}", f"label_emb.{theirs}")
    key = ldm_unet(f"{name}.weight", 1).removesuffix(".weight")
    # Blocks of the UNet with an upsampler have attention.
    return key.replace(".UP.", ".2.")


@torch.no_grad()
def lora():
    """One LoRA in the names of kohya's scripts, of diffusers and of PEFT, and latents with it."""
    model = pipeline(diffusers.StableDiffusionXLPipeline)
    files, seed = {"kohya": {}, "diffusers": {}}, 0
    for network, names in ADAPTED.items():
        module = getattr(model, network)
        module = module if network == "unet" else getattr(module, "text_model", module)
        for name in names:
            layer, seed = module.get_submodule(name), seed + 1
            stream = generator(700 + seed)
            out, rest = layer.weight.shape[0], layer.weight.shape[1:]
            down = (torch.randn((RANK, *rest), generator=stream) / rest.numel() ** 0.5).half().float()
            up = (torch.randn((out, RANK), generator=stream) * 0.6).half().float()
            delta = (up @ down.flatten(1)).reshape(layer.weight.shape)
            layer.weight += SCALE * ALPHA / RANK * delta
            up = up[:, :, None, None] if layer.weight.ndim == 4 else up
            start = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_",
                     "text_encoder_2": "lora_te2_text_model_"}[network]
            key = original(name) if network == "unet" else name
            key = start + key.replace(".", "_")
            files["kohya"] |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                               f"{key}.alpha": torch.tensor(ALPHA)}
            key = f"{network}.{name}" if network == "unet" else f"{network}.text_model.{name}"
            # There alphas are ranks.
            files["diffusers"] |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * ALPHA / RANK}
    for name, tensors in files.items():
        save({key: x.half() for key, x in tensors.items()}, HERE / "lora" / f"{name}.safetensors")
    drawn = model("a red house", generator=generator(11), output_type="latent", **DRAWN)
    save({"lora": drawn.images}, HERE / "lora/expected.safetensors")


# Textual inversion ---------------------------------------------------------------------------


@torch.no_grad()
def inversion():
    """Two vectors of a token for both encoders, and latents with them."""
    model = pipeline(diffusers.StableDiffusionXLPipeline)
    stream = generator(41)
    vectors = {"clip_l": 3 * torch.randn((2, 16), generator=stream),
               "clip_g": 3 * torch.randn((2, 24), generator=stream)}
    save(vectors, HERE / "inversion/thing.safetensors")
    save({"clip_l": vectors["clip_l"], "clip_g": vectors["clip_g"][:1]},
         HERE / "inversion/uneven.safetensors")
    save({"emb_params": vectors["clip_l"]}, HERE / "inversion/first.safetensors")
    for name, tokenizer, encoder in (("clip_l", model.tokenizer, model.text_encoder),
                                     ("clip_g", model.tokenizer_2, model.text_encoder_2)):
        model.load_textual_inversion(vectors[name], token="thing", tokenizer=tokenizer,
                                     text_encoder=encoder)
    drawn = model("a thing by the sea", generator=generator(11), output_type="latent", **DRAWN)
    save({"inversion": drawn.images}, HERE / "inversion/expected.safetensors")


def main():
    parts = {"networks": networks, "pictures": pictures, "hires": hires, "emphasis": emphasis,
             "single": single, "lora": lora, "inversion": inversion}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    torch.set_num_threads(1)
    for part in parser.parse_args().parts:
        parts[part]()
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
