"""Writes tests/fixtures/: what diffusers and transformers compute, for tests/parity.rs.

    python make_fixtures.py --tokenizer ../demo/tokenizer [noise samplers samplers_2 tokenizer text
        unet vae start start_2 few_steps second emphasis hires single pickles safety lora
         inversion knobs lcm forms quantized control control_xl canny resized
         control_tiling upscalers tiling]

The committed files were made with torch 2.15.0, diffusers 0.42.1 and transformers 5.23.0 on a
CPU. Everything is seeded: the same versions write the same numbers.
"""

import argparse
import base64
import importlib
import itertools
import json
import re
import shutil
import sys
import unicodedata
import zlib
from pathlib import Path

import diffusers
import gguf
import numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer,
)

HERE = Path(__file__).parent / "fixtures"


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


def save(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().contiguous() for name, x in tensors.items()}, path)


# Noise ---------------------------------------------------------------------------------------

SEEDS = [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**64 - 1]
SIZES = [*range(1, 41), 63, 64, 65, 1000, 4 * 16 * 16, 4 * 63 * 65]
MIXED = [3, 16, 5, 17, 1, 64, 15, 1, 40, 2, 1, 1000, 7, 7]


def noise():
    """Single draws by size, and draws of mixed sizes that continue one stream."""
    tensors = {}
    for seed in SEEDS:
        for n in SIZES if seed == 42 else [5, 16, 17]:
            values = torch.randn(n, generator=generator(seed))
            # Of the large ones the head, and the tail that is drawn anew.
            values = values if n <= 65 else torch.cat([values[:40], values[-40:]])
            tensors[f"single.{seed}.{n}"] = values
        stream = generator(seed)
        tensors[f"mixed.{seed}"] = torch.cat([torch.randn(n, generator=stream) for n in MIXED])
    tensors["mixed.sizes"] = torch.tensor(MIXED)
    save(tensors, HERE / "noise.safetensors")


# Samplers ------------------------------------------------------------------------------------

CLASSES = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_karras": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}

# CompVis/stable-diffusion-v1-4, scheduler/scheduler_config.json.
V1_4 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

ALL = list(CLASSES)
SPACED = [s for s in ALL if s != "lcm"]
SNR = [s for s in ALL if s not in ("pndm", "heun")]

# What a variant changes in the file above, and the samplers that read it.
VARIANTS = {
    "v_prediction": ({"prediction_type": "v_prediction"}, ALL),
    "sample": ({"prediction_type": "sample"}, [s for s in ALL if s not in ("pndm", "euler_a")]),
    "linspace": ({"timestep_spacing": "linspace"}, SPACED),
    "leading": ({"timestep_spacing": "leading"}, SPACED),
    "trailing": ({"timestep_spacing": "trailing"}, SPACED),
    "offset_0": ({"timestep_spacing": "leading", "steps_offset": 0}, SPACED),
    "linear": ({"beta_schedule": "linear"}, ALL),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, ALL),
    "alpha_to_one": ({"set_alpha_to_one": True}, ["pndm", "ddim"]),
    "clip": ({"clip_sample": True, "clip_sample_range": 0.7}, ["ddim", "ddpm", "heun", "lcm"]),
    "zero_snr": (
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
        SNR,
    ),
    "karras": ({"use_karras_sigmas": True}, ["euler", "heun", "unipc"]),
    "sigma_min": ({"final_sigmas_type": "sigma_min"}, ["euler", "dpmpp_2m", "unipc"]),
    "trained": (
        {"num_train_timesteps": 40, "trained_betas": [0.002 * (i + 1) for i in range(40)]},
        SPACED,
    ),
    # A file of another class leaves out what its own class does not have.
    "defaults": ({key: ... for key in V1_4 if key != "skip_prk_steps"}, ALL),
}


def scheduler_of(name, config):
    """The class of a sampler, as a pipeline with this file would switch to it."""
    written = diffusers.PNDMScheduler.from_config(config).config
    extra = {"use_karras_sigmas": True} if name.endswith("_karras") else {}
    return getattr(diffusers, CLASSES[name]).from_config(written, **extra)


def trajectory(name, config, steps):
    """All latents of a run, with a fake UNet."""
    scheduler = scheduler_of(name, config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        # Without it a class begins at the second of two equal timesteps and runs off the end.
        scheduler.set_begin_index(0)
    stream = generator(7)
    latents = torch.randn((1, 4, 3, 5), generator=stream) * scheduler.init_noise_sigma
    seen = [latents]
    draws = {"generator": stream} if name in ("ddpm", "euler_a", "lcm") else {}
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t)
        output = torch.tanh(0.5 * x + t / 1000)
        latents = scheduler.step(output, t, latents, **draws).prev_sample
        seen.append(latents)
    assert torch.isfinite(latents).all(), (name, steps, config)
    return scheduler.timesteps.to(torch.float32), torch.cat(seen)


def samplers():
    """Trajectories of every sampler, and of the variants; timesteps for odd numbers of steps."""
    configs, cases, tensors = {"v1-4": V1_4}, [], {}
    runs = [("v1-4", name, steps) for name in ALL for steps in (1, 4, 20, 50)]
    for variant, (changes, names) in VARIANTS.items():
        changed = {**V1_4, **changes}
        configs[variant] = {key: x for key, x in changed.items() if x is not ...}
        runs += [(variant, name, 20) for name in names]
    for variant, name, steps in runs:
        case = f"{variant}.{name}.{steps}"
        times, latents = trajectory(name, configs[variant], steps)
        tensors[f"{case}.timesteps"], tensors[f"{case}.latents"] = times, latents
        cases.append({"case": case, "config": variant, "scheduler": name, "steps": steps})
    for variant in ("linspace", "leading", "trailing"):
        for name in ALL:
            for steps in (2, 3, 7, 15, 31, 48, 99):
                if name == "lcm" and steps > 50:
                    continue
                scheduler = scheduler_of(name, configs[variant])
                scheduler.set_timesteps(steps)
                key = f"timesteps.{variant}.{name}.{steps}"
                tensors[key] = scheduler.timesteps.to(torch.float32)
    save(tensors, HERE / "samplers.safetensors")
    (HERE / "samplers.json").write_text(json.dumps({"configs": configs, "cases": cases}))


# Tokenizer -----------------------------------------------------------------------------------

PLAIN = [
    "", " ", "   ", "\n", "\t\n\r ", "a", "A", "a red house by the sea at night", "A RED HOUSE",
    "A Red   House\tby\nthe  sea", " leading and trailing ", "don't", "DON'T", "it's we're I've",
    "I'll they'd I'm can't", "don’t it’s", "'s", "''s 'll'", "o'clock rock'n'roll",
    "house, sea; night: moon.", "house,sea", "(house:1.2) [sea] {night}", "house/sea\\night",
    "!", "!!!", "?!?!", "...", "…", "--", "—", "a-b_c", "50%", "$5 & #7 @me", "x^2 + y^2 = z^2",
    "1", "12", "123 4567", "2024-01-31", "3.14159", "1,000,000", "½ ² ₃ Ⅷ", "٣٤٥", "１２３",
    "<|endoftext|>", "<|startoftext|>", "a <|endoftext|> b", "a<|endoftext|>b",
    "<|startoftext|>a house<|endoftext|>", "<|ENDOFTEXT|>", "<|StartOfText|>", "<|endoftext|",
    "<|endoftext|><|endoftext|>", "< |endoftext| >", "</w>", "a</w> b", "<unk>", "[PAD]",
    "héllo wörld", "naïve café", "Ångström", "ÀÉÎÕÜ ß ẞ", "ŁÓDŹ", "İstanbul ıI", "ΑΒΓ ς σ Σ",
    "Привет, мир", "ЁЛКА", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "გამარჯობა",
    "你好世界", "一座红色的房子", "日本語のテスト", "カタカナ ｶﾀｶﾅ", "한국어 테스트", "夜の海。赤い家、", "a 红 house",
    "𠀀𠀁", "🙂", "🙂🙃", "a 🏠 by the 🌊", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "☀️ ☀", "❤️",
    "\u0000", "a\u0000b", "a\u0001b\u001fc", "\u007f", "\u0080\u009f", "a\u00a0b", "a\u2003b",
    "a\u2028b\u2029c", "a\u200bb", "a\u200db", "\ufeffhouse", "a\u00adb", "\u202eabc\u202c",
    "\ufffd", "\ue000", "\U0010ffff", "\u3000house\u3000", "a\u0085b", "a\u001cb", "a\u180eb",
    "e\u0301", "\u00e9", "A\u030angstro\u0308m", "\u1112\u1161\u11ab", "\ud55c", "ﬁne ﬂow",
    "Ω Ω", "K K", "\u0344", "q\u0323\u0307 q\u0307\u0323", "ǆ ǅ Ǆ", "ⅷ ⓐ", "ﷺ",
    "http://example.com/a?b=c&d=e", "user@example.com", "C:\\Windows", "a  b   c    d",
    "masterpiece, best quality, 8k, ultra-detailed", "by greg rutkowski, trending on artstation",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "supercalifragilisticexpialidocious",
    "HoUsE", "hOUSE", "tHe SeA", "house's", "house 's", "houses'", "'house'", "\"house\"",
    "“house”", "‘house’", "`house`", "*house*", "~house~", "house…sea", "house—sea", "№5", "™®©",
    "¿qué?", "¡hola!", "«guillemets»", "€£¥", "°C", "±1", "→←", "∑∏√∞", "♠♣", "░▒▓", "ａｂｃ",
]


def prompts():
    words = ["a", "red", "house", "by", "the", "sea", "at", "night", ",", "moon", "blue", "tree"]
    long = [" ".join(words[i % len(words)] for i in range(n)) for n in (20, 73, 74, 75, 76, 77)]
    long += ["house " * 75, "house " * 76, "!" * 75, "!" * 300, "红" * 40, "🙂" * 30, "x" * 500]
    long += ["a red house " * 30 + "<|endoftext|>", "word, " * 60, ". " * 74, ". " * 75 + "end"]
    mixed = [f"{a} {b}" for a, b in zip(PLAIN[60:90], reversed(PLAIN[8:38]))]
    forms = [unicodedata.normalize(f, "Ḋö ｗｉｄｅ ﬃ é") for f in ("NFC", "NFD", "NFKC", "NFKD")]
    found = list(dict.fromkeys(PLAIN + long + mixed + forms))
    assert len(found) >= 200, len(found)
    return found


def tokenizer(source):
    """Ids of awkward prompts, padded and cut to 77, from each way to write a tokenizer down."""
    layouts = {
        # As SD 1.x is published; as transformers 5 writes it; with SD 2.x's padding.
        "tokenizer": ["vocab.json", "merges.txt", "tokenizer_config.json"],
        "v1/tokenizer": ["tokenizer.json", "tokenizer_config.json"],
        "v2/tokenizer": ["vocab.json", "merges.txt", "tokenizer_config.json"],
    }
    for layout, names in layouts.items():
        (HERE / layout).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(source / name, HERE / layout / name)
    path = HERE / "v2/tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "!"}, indent=2))
    for layout, found in {"tokenizer": prompts(), "v2/tokenizer": prompts()[:40]}.items():
        clip = CLIPTokenizer.from_pretrained(source if layout == "tokenizer" else HERE / layout)
        rows = []
        for prompt in found:
            padded = clip(prompt, padding="max_length", max_length=77, truncation=True).input_ids
            whole = clip(prompt).input_ids
            rows.append({"prompt": prompt, "ids": padded, "cut": len(whole) > 77})
        (HERE / f"{layout}.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


# Networks ------------------------------------------------------------------------------------


def randomise(model, seed):
    """Weights of a size that makes every layer count, those that start as zeros too."""
    stream = generator(seed)
    for name, p in sorted(model.named_parameters()):
        values = torch.randn(p.shape, generator=stream)
        if p.ndim > 1:
            fan = 1 if "embedding.weight" in name else p[0].numel()
            values *= 1.4 / fan**0.5
        else:
            norm = "norm" in name and name.endswith("weight")
            values = values * 0.2 + (1.0 if norm else 0.0)
        p.data.copy_(values)
    return model.eval()


def rename(path, change):
    save_file({change(name): x for name, x in load_file(path).items()}, path)


@torch.no_grad()
def text(_):
    """Two text encoders: SD 1.x (quick_gelu, the names of published files) and 2.x (gelu)."""
    shapes = {
        "v1": dict(vocab_size=639, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                   num_attention_heads=4, hidden_act="quick_gelu", pad_token_id=638),
        "v2": dict(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                   num_attention_heads=3, hidden_act="gelu", pad_token_id=0),
    }
    for seed, (name, shape) in enumerate(shapes.items()):
        last = shape["vocab_size"] - 1
        config = CLIPTextConfig(bos_token_id=last - 1, eos_token_id=last, **shape)
        model = randomise(CLIPTextModel(config), 100 + seed)
        target = HERE / name / "text_encoder"
        model.save_pretrained(target)
        if name == "v1":
            # transformers 4 wrote a prefix and a buffer, and so the published files have them.
            path = target / "model.safetensors"
            rename(path, lambda key: f"text_model.{key}")
            positions = torch.arange(77).unsqueeze(0)
            tensors = {**load_file(path), "text_model.embeddings.position_ids": positions}
            save_file(tensors, path)
        ids = torch.randint(0, last - 1, (3, 77), generator=generator(seed))
        ids[:, 0] = last - 1
        for row, end in enumerate((76, 9, 1)):
            ids[row, end] = last
            ids[row, end + 1 :] = shape["pad_token_id"]
        output = model(ids).last_hidden_state
        save({"ids": ids, "last_hidden_state": output}, target / "expected.safetensors")


UNETS = {
    # SD 1.x: a number of heads, convolutions as projections, three levels with attention.
    "v1": dict(block_out_channels=(8, 16, 24, 24), layers_per_block=2, norm_num_groups=8,
               attention_head_dim=4, cross_attention_dim=32, sample_size=8),
    # SD 2.x: heads by level, linear projections.
    "v2": dict(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8,
               attention_head_dim=[1, 2, 4, 8], cross_attention_dim=48, sample_size=8,
               use_linear_projection=True),
    # Three levels of unequal width, of which the outermost has no attention.
    "narrow": dict(block_out_channels=(8, 12, 20), layers_per_block=1, norm_num_groups=4,
                   attention_head_dim=2, cross_attention_dim=20, sample_size=8, in_channels=4,
                   down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
                                     "CrossAttnDownBlock2D"),
                   up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
}
LATENTS = [(8, 8), (16, 8), (9, 13), (2, 3), (6, 20), (15, 7)]


@torch.no_grad()
def unet(_):
    """Three UNets; each row of a batch has its own timestep and context."""
    for seed, (name, shape) in enumerate(UNETS.items()):
        model = randomise(diffusers.UNet2DConditionModel(**shape), 200 + seed)
        target = HERE / name / "unet"
        # The second is saved in shards, the third also in half precision.
        model.save_pretrained(target, max_shard_size="400KB" if name == "v2" else "10GB")
        stream = generator(seed)
        width = shape["cross_attention_dim"]
        context = torch.randn((3, 77, width), generator=stream)
        timesteps = torch.tensor([999.0, 1.0, 417.34])
        tensors = {"context": context, "timesteps": timesteps}
        for h, w in LATENTS:
            latents = torch.randn((3, 4, h, w), generator=stream)
            tensors[f"{h}x{w}.latents"] = latents
            tensors[f"{h}x{w}.output"] = model(latents, timesteps, context).sample
        if name == "narrow":
            model.half().save_pretrained(target, variant="fp16")
            latents = tensors["8x8.latents"]
            tensors["8x8.half.output"] = model.float()(latents, timesteps, context).sample
        save(tensors, target / "expected.safetensors")


VAES = {
    "v1": dict(block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=8,
               sample_size=64, scaling_factor=0.18215),
    "narrow": dict(block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
                   sample_size=16, scaling_factor=0.5, use_quant_conv=False,
                   use_post_quant_conv=False, mid_block_add_attention=False),
}

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(key):
    """The names of a VAE's attention in the published files of SD 1.x."""
    for new, old in OLD_ATTENTION.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


@torch.no_grad()
def vae(_):
    """Two VAEs: decode, and the mean and the logarithm of the variance of encode."""
    for seed, (name, shape) in enumerate(VAES.items()):
        levels = len(shape["block_out_channels"])
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            **shape,
        )
        randomise(model, 300 + seed)
        target = HERE / name / "vae"
        model.save_pretrained(target)
        if name == "v1":
            rename(target / "diffusion_pytorch_model.safetensors", old_names)
        stream = generator(seed)
        tensors = {}
        scale = 2 ** (levels - 1)
        for h, w in [(4, 4), (3, 5)]:
            latents = torch.randn((2, 4, h, w), generator=stream)
            picture = torch.rand((1, 3, h * scale, w * scale), generator=stream) * 2 - 1
            posterior = model.encode(picture).latent_dist
            tensors |= {
                f"{h}x{w}.latents": latents,
                f"{h}x{w}.decoded": model.decode(latents).sample,
                f"{h}x{w}.picture": picture,
                f"{h}x{w}.mean": posterior.mean,
                f"{h}x{w}.logvar": posterior.logvar,
            }
        save(tensors, target / "expected.safetensors")


# Beginnings ----------------------------------------------------------------------------------


def tiny(kind, unet, scheduler):
    """A pipeline of the small SD 1.x networks above."""
    root = HERE / "v1"
    return kind(
        vae=diffusers.AutoencoderKL.from_pretrained(root / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(root / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(HERE / "tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def start(_):
    """Latents of img2img and of inpainting, by a UNet that knows of no mask and by one that does."""
    shape = {**UNETS["v1"], "in_channels": 9, "block_out_channels": (8, 16), "layers_per_block": 1,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    randomise(diffusers.UNet2DConditionModel(**shape), 400).save_pretrained(HERE / "inpaint/unet")
    index = {"_class_name": "StableDiffusionPipeline"}
    (HERE / "v1/model_index.json").write_text(json.dumps(index) + "\n")
    (HERE / "v1/scheduler").mkdir(exist_ok=True)
    (HERE / "v1/scheduler/scheduler_config.json").write_text(json.dumps(V1_4, indent=2) + "\n")
    stream = generator(5)
    picture = torch.randint(0, 256, (64, 64, 3), generator=stream, dtype=torch.uint8)
    # Some of its bytes lie beside the middle, where a mask is cut in two.
    mask = torch.randint(0, 256, (8, 8), generator=stream, dtype=torch.uint8)
    mask[0, :4] = torch.tensor([127, 128, 0, 255], dtype=torch.uint8)
    mask = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    tensors = {"picture": picture, "mask": mask}
    image, hole = Image.fromarray(picture.numpy()), Image.fromarray(mask.numpy())
    kinds = {
        "image": (diffusers.StableDiffusionImg2ImgPipeline, HERE / "v1/unet", {}, ALL),
        "hole": (diffusers.StableDiffusionInpaintPipeline, HERE / "v1/unet",
                 {"mask_image": hole, "width": 64, "height": 64}, ALL),
        "told": (diffusers.StableDiffusionInpaintPipeline, HERE / "inpaint/unet",
                 {"mask_image": hole, "width": 64, "height": 64}, ["ddim", "euler_a", "heun"]),
    }
    for kind, (pipeline, unet, extra, names) in kinds.items():
        pipeline = tiny(pipeline, unet, diffusers.PNDMScheduler.from_config(V1_4))
        pipeline.set_progress_bar_config(disable=True)
        for name in names:
            pipeline.scheduler = scheduler_of(name, V1_4)
            for strength in (1.0, 0.9, 0.5, 0.2):
                drawn = pipeline(
                    "a red house", image=image, strength=strength, num_inference_steps=10,
                    guidance_scale=3.0, generator=generator(11), output_type="latent", **extra,
                )
                tensors[f"{kind}.{name}.{strength}"] = drawn.images
    save(tensors, HERE / "start.safetensors")


# Tiling --------------------------------------------------------------------------------------


@torch.no_grad()
def tiling(_):
    """Whole runs whose convolutions pad with the opposite edge, all those of UNet and VAE that pad."""
    stream = generator(6)
    picture = torch.randint(0, 256, (64, 96, 3), generator=stream, dtype=torch.uint8)
    tensors = {"picture": picture}
    kinds = {
        "text": (diffusers.StableDiffusionPipeline, dict(width=96, height=64)),
        "image": (diffusers.StableDiffusionImg2ImgPipeline,
                  dict(image=Image.fromarray(picture.numpy()), strength=0.5)),
    }
    for kind, (pipeline, extra) in kinds.items():
        pipeline = tiny(pipeline, HERE / "v1/unet", diffusers.PNDMScheduler.from_config(V1_4))
        pipeline.set_progress_bar_config(disable=True)
        for network in (pipeline.unet, pipeline.vae):
            for layer in network.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.padding_mode = "circular"
        for name in ("ddim", "euler_a"):
            pipeline.scheduler = scheduler_of(name, V1_4)
            drawn = pipeline("a red house", num_inference_steps=10, guidance_scale=3.0,
                             generator=generator(11), output_type="latent", **extra).images
            tensors[f"{kind}.{name}"] = drawn
            image = pipeline.vae.decode(drawn / pipeline.vae.config.scaling_factor).sample
            tensors[f"{kind}.{name}.decoded"] = image
    save(tensors, HERE / "tiling.safetensors")


# Emphasis ------------------------------------------------------------------------------------

# The language of AUTOMATIC1111's prompts (its wiki, "Attention/emphasis", and what its
# prompt_parser.py and sd_hijack_clip.py do with the default options), written anew.
PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])|(?P<lone>\\)|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])|(?P<text>:|[^\\()\[\]:]+)"
)
FACTORS = {"(": 1.1, "[": 1 / 1.1}
PARTNER = {")": "(", "]": "["}

EMPHASISED = [
    "", "a red house by the sea at night", "a (red) house", "a ((red)) house by the [sea]",
    "(a red house:1.4) at night", "a (red house:0.3), (moon:0)", "((a house:1.2) [by] the (sea:0.5)",
    "a \\(red\\) house", "a house BREAK the sea", "(a red BREAK house:1.3)", "BREAK",
    "a red house (", "a : b ) ]", "(blue:-0.5) house",
    ", ".join(["a red house"] * 22), " ".join(["house"] * 80), "house " * 60 + ", " + "sea " * 18,
    "house " * 40 + ", " + "sea " * 40, "(moon:1.3) " * 80, "a red house, " * 200,
    "a house BREAK " + "sea " * 80 + "BREAK night",
]


def stretches(prompt):
    """[text, weight], or None for a break."""
    found, brackets = [], {"(": [], "[": []}

    def close(kind, factor):
        for stretch in found[brackets[kind].pop():]:
            if stretch is not None:
                stretch[1] *= factor

    for match in PIECE.finditer(prompt):
        piece = match.group(0)
        if match["escaped"] is not None or match["lone"]:
            found.append([match["escaped"] or "", 1.0])
        elif match["open"]:
            brackets[piece].append(len(found))
        elif match["weight"] is not None and brackets["("]:
            close("(", float(match["weight"]))
        elif match["close"] and brackets[PARTNER[piece]]:
            close(PARTNER[piece], FACTORS[PARTNER[piece]])
        else:
            for i, text in enumerate(re.split(r"\s*\bBREAK\b\s*", piece)):
                found += [None] if i else []
                found.append([text, 1.0])
    for kind, factor in FACTORS.items():
        while brackets[kind]:
            close(kind, factor)
    merged = []
    for stretch in found:
        if stretch is None or not merged or merged[-1] is None or merged[-1][1] != stretch[1]:
            merged.append(stretch)
        else:
            merged[-1][0] += stretch[0]
    return merged


def windows(prompt, clip):
    """Rows of 77 ids, and of 77 weights."""
    comma = clip.convert_tokens_to_ids(",</w>")
    rows, row, last = [], [], None
    for stretch in stretches(prompt):
        if stretch is None:
            rows.append(row)
            row, last = [], None
            continue
        for token in clip(stretch[0], add_special_tokens=False).input_ids:
            if token == comma:
                last = len(row)
            elif len(row) == 75 and last is not None and 75 - last <= 20:
                rows.append(row[: last + 1])
                row, last = row[last + 1 :], None
            if len(row) == 75:
                rows.append(row)
                row, last = [], None
            row.append((token, stretch[1]))
    if row or not rows:
        rows.append(row)
    ids = [[clip.bos_token_id, *(t for t, _ in r), clip.eos_token_id] for r in rows]
    ids = [r + [clip.pad_token_id] * (77 - len(r)) for r in ids]
    weights = [[1.0, *(w for _, w in r)] for r in rows]
    return ids, [w + [1.0] * (77 - len(w)) for w in weights]


def weighed(ids, weights, encoder):
    """The hidden states times the weights, with the mean of each window as it was: (1, 77 k, D)."""
    states = encoder(torch.tensor(ids)).last_hidden_state
    scaled = states * torch.tensor(weights).unsqueeze(-1)
    mean = lambda x: x.mean(dim=(1, 2), keepdim=True)
    return (scaled * (mean(states) / mean(scaled))).flatten(0, 1).unsqueeze(0)


@torch.no_grad()
def emphasis(_):
    """Windows, weights and contexts of emphasised prompts, and a picture by two of them."""
    encoder = CLIPTextModel.from_pretrained(HERE / "v1/text_encoder").eval()
    clips = {name: CLIPTokenizer.from_pretrained(HERE / name) for name in ("tokenizer", "v2/tokenizer")}
    rows, tensors = [], {}
    for i, prompt in enumerate(EMPHASISED):
        ids, weights = windows(prompt, clips["tokenizer"])
        other = windows(prompt, clips["v2/tokenizer"])[0]
        rows.append({"prompt": prompt, "ids": ids, "weights": weights, "v2": other})
        if len(ids) <= 3:
            tensors[f"context.{i}"] = weighed(ids, weights, encoder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(HERE / "v1/unet").eval()
    scheduler = scheduler_of("ddim", V1_4)
    scheduler.set_timesteps(5)
    latents = torch.randn((1, 4, 8, 8), generator=generator(11))
    long = EMPHASISED.index("a house BREAK the sea")
    contexts = [tensors["context.0"], tensors[f"context.{long}"]]
    for t in scheduler.timesteps:
        negative, positive = (unet(latents, t, context).sample for context in contexts)
        latents = scheduler.step(negative + 3.0 * (positive - negative), t, latents).prev_sample
    tensors["latents"] = latents
    save(tensors, HERE / "emphasis.safetensors")
    (HERE / "emphasis.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


# Second passes -------------------------------------------------------------------------------

# AUTOMATIC1111's names and what they mean (its modules/shared_options.py and sd_samplers).
UPSCALERS = {
    "Latent": dict(mode="bilinear"),
    "Latent (antialiased)": dict(mode="bilinear", antialias=True),
    "Latent (bicubic)": dict(mode="bicubic"),
    "Latent (bicubic antialiased)": dict(mode="bicubic", antialias=True),
    "Latent (nearest)": dict(mode="nearest"),
    "Latent (nearest-exact)": dict(mode="nearest-exact"),
}


def enlarged(latents, target, upscaler, scale):
    """Latents enlarged until they cover a size in pixels, cut evenly: `sample_hr_pass`."""
    h, w = (side * scale for side in latents.shape[2:])
    width, height = target
    x, y = (width, width * h // w) if w * height < width * h else (height * w // h, height)
    size = (y // scale, x // scale)
    latents = torch.nn.functional.interpolate(latents, size=size, **UPSCALERS[upscaler])
    left, top = (x - width) // scale, (y - height) // scale
    return latents[:, :, top // 2 : size[0] - (top + 1) // 2, left // 2 : size[1] - (left + 1) // 2]


@torch.no_grad()
def hires(_):
    """Enlarged latents, and the latents of runs that go on from such."""
    stream, tensors = generator(21), {}
    latents = torch.randn((1, 4, 6, 5), generator=stream)
    tensors["latents"] = latents
    for name in UPSCALERS:
        for width, height in [(80, 96), (64, 72), (104, 64), (24, 40)]:
            large = enlarged(latents, (width, height), name, 8)
            assert large.shape[2:] == (height // 8, width // 8), (large.shape, width, height)
            tensors[f"enlarged.{name}.{width}x{height}"] = large
    kinds = [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline]
    first, second = (tiny(kind, HERE / "v1/unet", diffusers.PNDMScheduler.from_config(V1_4))
                     for kind in kinds)
    first.set_progress_bar_config(disable=True)
    second.set_progress_bar_config(disable=True)
    for name, upscaler in zip(ALL, itertools.cycle(UPSCALERS)):
        first.scheduler, second.scheduler = scheduler_of(name, V1_4), scheduler_of(name, V1_4)
        common = dict(guidance_scale=3.0, output_type="latent")
        small = first("a red house", num_inference_steps=6, width=64, height=64,
                      generator=generator(11), **common).images
        large = enlarged(small, (96, 80), upscaler, 8)
        tensors[f"run.{name}.{upscaler}"] = second(
            "a red house", image=large, num_inference_steps=10, strength=0.5,
            generator=generator(11), **common).images
    save(tensors, HERE / "hires.safetensors")


# Single files --------------------------------------------------------------------------------


def ldm_unet(key, layers):
    """A UNet's tensor in the names of the original code."""
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    for ours, theirs in fixed.items():
        key = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", key)
    blocks = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    resnets = "resnets" in key or key.startswith(("middle_block.0", "middle_block.2"))
    if blocks:
        way, level, kind, i, rest = blocks.groups()
        number = int(level) * (layers + 1) + int(i)
        if kind == "downsamplers":
            key = f"input_blocks.{number + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            key = f"output_blocks.{number + layers}.UP.{rest}"
        else:
            part = {"resnets": 0, "attentions": 1}[kind]
            number, side = (number + 1, "input") if way == "down" else (number, "output")
            key = f"{side}_blocks.{number}.{part}.{rest}"
    if resnets:
        for ours, theirs in resnet.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def ldm_vae(key, levels):
    """A VAE's tensor in the names of the original code."""
    for ours, theirs in {
        "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "conv_norm_out": "norm_out",
        "mid_block.attentions.0.to_q": "mid.attn_1.q", "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v", "conv_shortcut": "nin_shortcut",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out", "resnets": "block",
        "downsamplers.0": "downsample", "upsamplers.0": "upsample", "down_blocks": "down",
    }.items():
        key = key.replace(ours, theirs)
    up = lambda match: f"up.{levels - 1 - int(match[1])}."
    return re.sub(r"up_blocks\.(\d+)\.", up, key)


def ldm(unet, vae, text):
    """All tensors of a checkpoint; `text` has the names it has there."""
    layers, levels = unet.config.layers_per_block, len(vae.config.block_out_channels)
    tensors = {f"model.diffusion_model.{ldm_unet(k, layers)}": x for k, x in unet.state_dict().items()}
    # An upsampler is the last part of its block: the third where there is attention.
    for key in [key for key in tensors if ".UP." in key]:
        attention = key.split(".UP.")[0] + ".1.norm.weight" in tensors
        tensors[key.replace(".UP.", f".{2 if attention else 1}.")] = tensors.pop(key)
    for key, x in vae.state_dict().items():
        key = f"first_stage_model.{ldm_vae(key, levels)}"
        point = ".attn_1." in key and x.ndim == 2
        tensors[key] = x[:, :, None, None] if point else x
    tensors |= {key: x.clone() for key, x in text.items()}
    # What files in circulation also hold.
    tensors["alphas_cumprod"] = torch.ones(1000)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    return tensors


def check_single(tensors, unet, vae):
    """diffusers' own reading of the names gives the networks back."""
    from diffusers.loaders import single_file_utils as theirs

    for read, model in [(theirs.convert_ldm_unet_checkpoint, unet), (theirs.convert_ldm_vae_checkpoint, vae)]:
        back, whole = read(dict(tensors), model.config), model.state_dict()
        assert back.keys() == whole.keys(), back.keys() ^ whole.keys()
        assert all(torch.equal(back[key], whole[key]) for key in whole)


@torch.no_grad()
def single(_):
    """The small SD 1.x model as single files, safetensors and pickle, and what of SD 2.x differs."""
    root = HERE / "single"
    root.mkdir(exist_ok=True)
    vae = diffusers.AutoencoderKL.from_pretrained(HERE / "v1/vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(HERE / "v1/unet")
    text = load_file(HERE / "v1/text_encoder/model.safetensors")
    text = {f"cond_stage_model.transformer.{key}": x for key, x in text.items()}
    tensors = ldm(unet, vae, text)
    check_single(tensors, unet, vae)
    # With the VAE in a file of its own, as some are handed around.
    alone = {key: x for key, x in tensors.items() if key.startswith("first_stage_model.")}
    save({key: x for key, x in tensors.items() if key not in alone}, root / "v1.safetensors")
    alone = {key.removeprefix("first_stage_model."): x for key, x in alone.items()}
    save(alone, root / "vae.safetensors")
    # As Lightning writes them: among other objects.
    unet = diffusers.UNet2DConditionModel.from_pretrained(HERE / "inpaint/unet")
    tensors = ldm(unet, vae, text)
    check_single(tensors, unet, vae)
    callbacks = {"checkpoint": argparse.Namespace(monitor="loss")}
    lightning = {"epoch": 3, "global_step": 840000, "callbacks": callbacks, "state_dict": tensors}
    torch.save(lightning, root / "inpaint.ckpt")
    # Parts of one storage, as chunks of a fused projection are.
    q, k = torch.arange(6.0).chunk(2)
    torch.save({"q": q, "k": k}, root / "views.ckpt")

    unet = diffusers.UNet2DConditionModel.from_pretrained(HERE / "v2/unet")
    tower = load_file(HERE / "v2/text_encoder/model.safetensors")
    tower = {key.removeprefix("text_model."): x for key, x in tower.items()}
    text = {"positional_embedding": tower["embeddings.position_embedding.weight"],
            "token_embedding.weight": tower["embeddings.token_embedding.weight"],
            "text_projection": torch.eye(48), "logit_scale": torch.tensor(4.6)}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for kind in ("weight", "bias"):
        text[f"ln_final.{kind}"] = tower[f"final_layer_norm.{kind}"]
        # The fourth layer is the one that the UNet does not look at.
        for i in range(4):
            ours = f"encoder.layers.{min(i, 2)}"
            theirs = f"transformer.resblocks.{i}"
            qkv = [tower[f"{ours}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            text[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for name, other in names.items():
                text[f"{theirs}.{other}.{kind}"] = tower[f"{ours}.{name}.{kind}"]
    text = {f"cond_stage_model.model.{key}": x for key, x in text.items()}
    tensors = ldm(unet, vae, text)
    check_single(tensors, unet, vae)
    tensors = {key: x for key, x in tensors.items() if not key.startswith("first_stage_model.")}
    save(tensors, root / "v2.safetensors")

# Pickles -----------------------------------------------------------------------------------------


def pickles(_):
    """The same tensors, some out of order, as PyTorch writes them since 1.6 and wrote them before."""
    root, stream = HERE / "pickles", generator(3)
    root.mkdir(exist_ok=True)
    draw = lambda *shape: torch.randn(shape, generator=stream)
    q, k = draw(6).chunk(2)
    tensors = {"plain": draw(2, 3), "q": q, "k": k, "turned": draw(3, 5).t(), "half": draw(4).half(),
               "last": draw(3, 4, 3, 3).to(memory_format=torch.channels_last),
               "point": draw(3, 4, 1, 1).to(memory_format=torch.channels_last),
               "parts": draw(4, 6)[:, ::2], "count.alpha": torch.tensor(4)}
    expected = {name: x.float().contiguous().clone() for name, x in tensors.items()}
    expected |= {"given.alpha": torch.tensor(2.5), "whole.alpha": torch.tensor(8.0)}
    whole = {"state_dict": {**tensors, "given.alpha": 2.5, "whole.alpha": 8}, "epoch": 3}
    torch.save(whole, root / "new.pt")
    # A type of later versions, under a key of a script.
    fp8 = torch.arange(-8.0, 8.0).reshape(4, 4).to(torch.float8_e4m3fn)
    torch.save({"network": {"fp8": fp8}, "epoch": 3}, root / "fp8.pt")
    torch.save(whole, root / "old.pt", _use_new_zipfile_serialization=False)
    save(expected, root / "expected.safetensors")


# Files of other forms ------------------------------------------------------------------------

# What is beside vocab.json and merges.txt.
TOKENIZERS = {
    # As SD 2.x is published: the map has another padding than the config.
    "map": {"tokenizer_config.json": {"pad_token": "<|endoftext|>"},
            "special_tokens_map.json": {"pad_token": "!"}},
    # A config that lists the tokens is all that is read.
    "config": {"tokenizer_config.json": {"pad_token": "<|endoftext|>", "added_tokens_decoder": ...},
               "special_tokens_map.json": {"pad_token": "!"}},
    # A word of textual inversion.
    "word": {"tokenizer_config.json": {}, "added_tokens.json": {"<my-style>": ...}},
}
WORDED = ["a red house", "a house in the style of <my-style>, at night", "<My-Style>x"]


def forms(source):
    """Ids with the special files of tokenizers, and a UNet without a middle block."""
    import tempfile

    rows = []
    for name, files in TOKENIZERS.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for file in ["vocab.json", "merges.txt", "tokenizer_config.json"]:
                shutil.copyfile(source / file, folder / file)
            vocabulary = json.loads((folder / "vocab.json").read_text())
            written = {}
            for file, changes in files.items():
                old = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
                content = {**old, **changes}
                if "<my-style>" in content:
                    content["<my-style>"] = len(vocabulary)
                if "added_tokens_decoder" in content:
                    token = "<|endoftext|>"
                    content["added_tokens_decoder"] = {str(vocabulary[token]): {
                        "content": token, "lstrip": False, "normalized": False, "rstrip": False,
                        "single_word": False, "special": True}}
                (folder / file).write_text(json.dumps(content))
                written[file] = content
            clip = CLIPTokenizer.from_pretrained(folder)
            ids = [clip(prompt, padding="max_length", max_length=77, truncation=True).input_ids
                   for prompt in WORDED]
            rows.append({"name": name, "files": written, "prompts": WORDED, "ids": ids})
    root = HERE / "forms"
    root.mkdir(exist_ok=True)
    (root / "tokenizers.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    shape = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
                 attention_head_dim=2, cross_attention_dim=8, sample_size=8, mid_block_type=None,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with torch.no_grad():
        model = randomise(diffusers.UNet2DConditionModel(**shape), 500)
        model.save_pretrained(root / "unet")
        stream, tensors = generator(9), {}
        tensors["context"] = torch.randn((3, 77, 8), generator=stream)
        tensors["timesteps"] = torch.tensor([999.0, 1.0, 417.34])
        tensors["6x8.latents"] = torch.randn((3, 4, 6, 8), generator=stream)
        output = model(tensors["6x8.latents"], tensors["timesteps"], tensors["context"]).sample
        save({**tensors, "6x8.output": output}, root / "unet/expected.safetensors")


# Safety checker ------------------------------------------------------------------------------

# Width, height and a number that makes the pictures different; `safety.rs` paints the same ones.
PAINTED = [(64, 64, 0), (40, 72, 1), (512, 384, 2), (24, 24, 3), (16, 30, 4), (129, 65, 5)]


def painted(width, height, k):
    """A picture of large shapes and fine grain, in whole numbers only."""
    x, y = torch.arange(width)[None, :, None], torch.arange(height)[:, None, None]
    channel = torch.arange(3)[None, None, :]
    shapes = 255 * x * (k % 3) // width + 255 * y * (2 - k % 3) // height + 85 * channel * k
    grain = (x * x * 3 + x * y * 7 + y * y * 5 + 11 * channel) % (1 + 40 * k)
    return ((shapes + grain) % 256).to(torch.uint8)


# What each picture stands for: the concepts and the cares that are made of its embedding, and how
# far above their thresholds it comes. The first passes, the second is bad, the third is bad for its
# care alone, the fourth is cared for and passes, the fifth is above by less than counts.
CONCEPTS = {1: 0.02, 2: -0.006, 4: 0.0003}
CARES = {2: 0.015, 3: 0.015}


def stand_for(leads, embeds, weights, embeddings):
    """Makes the first embeds of those of pictures, and thresholds that only these pictures pass."""
    normal = torch.nn.functional.normalize
    for k, i in enumerate(leads):
        embeds[k] = 3 * embeddings[i] + 0.1 * embeddings.norm() * embeds[k] / embeds[k].norm()
    cosines = normal(embeddings) @ normal(embeds).t()
    weights.copy_(cosines.max(0).values + 0.2)
    for k, (i, lead) in enumerate(leads.items()):
        others = torch.cat([cosines[:i, k], cosines[i + 1 :, k]])
        assert cosines[i, k] > others.max() + 0.05, (i, cosines[:, k])
        weights[k] = cosines[i, k] - lead
    return cosines


@torch.no_grad()
def safety(_):
    """A small safety checker, what it is shown of pictures, and what it says of them."""
    target = HERE / "safety"
    config = CLIPConfig(
        projection_dim=24,
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, image_size=24, patch_size=8, projection_dim=24),
        text_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, vocab_size=4),
    )
    model = randomise(StableDiffusionSafetyChecker(config), 600)
    extractor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    pictures = [Image.fromarray(painted(*picture).numpy()) for picture in PAINTED]
    pixels = torch.cat([extractor(p, return_tensors="pt").pixel_values for p in pictures])
    embeddings = model.visual_projection(model.vision_model(pixels)[1])
    concepts, cares = ((model.concept_embeds, model.concept_embeds_weights),
                       (model.special_care_embeds, model.special_care_embeds_weights))
    cosines = stand_for(CONCEPTS, *(p.data for p in concepts), embeddings)
    special = stand_for(CARES, *(p.data for p in cares), embeddings)
    # The model keeps its scores to itself; it rounds each of them once.
    scores, module = [], sys.modules[StableDiffusionSafetyChecker.__module__]
    module.round = lambda score, digits: scores.append(round(score, digits)) or scores[-1]
    _, bad = model(pixels, [image.numpy() for image in pixels])
    del module.round
    scores = torch.tensor([float(score) for score in scores]).reshape(len(pictures), 3 + 17)
    assert (scores[:, :3] > 0).any(1).tolist() == [i in CARES for i in range(len(pictures))]
    assert bad == [i in (1, 2) for i in range(len(pictures))], bad
    model.save_pretrained(target / "safety_checker")
    # The prefix and the buffer of the published files.
    path = target / "safety_checker/model.safetensors"
    rename(path, lambda key: key.replace("vision_model.", "vision_model.vision_model.", 1))
    positions = torch.arange(10).unsqueeze(0)
    save({**load_file(path), "vision_model.vision_model.embeddings.position_ids": positions}, path)
    extractor.save_pretrained(target / "feature_extractor")
    tensors = {"pixels": pixels, "embeddings": embeddings, "cosines": cosines, "special": special,
               "scores": scores, "bad": torch.tensor(bad).to(torch.uint8)}
    save(tensors, target / "expected.safetensors")


# LoRAs ---------------------------------------------------------------------------------------

# Weights of the small SD 1.x networks: linear, gated, of a stack, 1x1 and 3x3, of either stride.
ADAPTED = {
    "unet": ["conv_in", "time_embedding.linear_2", "down_blocks.0.attentions.0.proj_in",
             "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
             "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
             "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
             "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.time_emb_proj",
             "down_blocks.1.downsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"],
}
# LyCORIS' modules: class, rank, alpha, settings.
METHODS = {
    "locon-tucker": ("LoConModule", 3, 2, dict(use_tucker=True)),
    "loha": ("LohaModule", 2, 1, {}),
    "loha-wide": ("LohaModule", 6, 3, {}),
    "loha-tucker": ("LohaModule", 2, 1, dict(use_tucker=True)),
    "lokr": ("LokrModule", 1, 1, dict(factor=4)),
    "lokr-tucker": ("LokrModule", 2, 1, dict(factor=2, use_tucker=True)),
    "lokr-full": ("LokrModule", 9, 1, dict(factor=2, full_matrix=True)),
    "lokr-both": ("LokrModule", 1, 0.5, dict(decompose_both=True)),
    "dora": ("LoConModule", 2, 1, dict(weight_decompose=True)),
    "dora-inputs": ("LoConModule", 2, 1, dict(weight_decompose=True, wd_on_out=False)),
    "dora-loha": ("LohaModule", 2, 1, dict(weight_decompose=True)),
    "full": ("FullModule", 1, 1, {}),
    "ia3": ("IA3Module", 1, 1, {}),
    "ia3-inputs": ("IA3Module", 1, 1, dict(train_on_input=True)),
    "glora": ("GLoRAModule", 2, 1, {}),
}
SCALE = 0.8


def towers(pipeline):
    """The networks that a LoRA adds to."""
    text = pipeline.text_encoder
    return {"unet": pipeline.unet, "text_encoder": getattr(text, "text_model", text)}


def adapter(method, name, layer, seed):
    """A module of LyCORIS whose parameters are random, of a size that changes the picture."""
    kind, rank, alpha, settings = METHODS[method]
    module = getattr(importlib.import_module(lycoris_file(kind)), kind)
    module = module(name, layer, 1.0, lora_dim=rank, alpha=alpha, **settings)
    stream = generator(seed)
    for part, p in sorted(module.named_parameters()):
        values = torch.randn(p.shape, generator=stream)
        if part == "dora_scale":
            p.data *= 1 + 0.2 * values
        else:
            fan = p[0].numel() if p.ndim > 1 else 1
            size = {"FullModule": 0.3, "IA3Module": 0.3, "LohaModule": 0.9}.get(kind, 0.6)
            p.data.copy_(values * size / fan ** (0.25 if kind == "LohaModule" else 0.5))
    return module


def merged(module, shape):
    """A layer's weight and bias with a module."""
    if not hasattr(module, "get_weight"):
        return module.get_merged_weight(shape=shape)
    # LyCORIS 4 merges LoHa and LoKr with the square of their scale; it trains with the scale.
    weight = module.org_weight + module.get_weight(shape)
    return module.apply_weight_decompose(weight) if module.wd else weight, None


def saved(module):
    """The tensors of a module in a file."""
    if hasattr(module, "is_diff"):
        # It would subtract the layer's weight, which is added only where it replaces the layer.
        return {"diff": module.weight, **({} if module.bias is None else {"diff_b": module.bias})}
    return module.state_dict()


def lycoris_file(kind):
    return "lycoris.modules." + kind.removesuffix("Module").lower()


def drawn(pipeline):
    images = pipeline("a red house", width=64, height=64, num_inference_steps=2, guidance_scale=3.0,
                      generator=generator(11), output_type="latent")
    return images.images


@torch.no_grad()
def lora(_):
    """A LoRA of each method for some weights of UNet and text encoder, and latents with it."""
    target, tensors = HERE / "lora", {}
    scheduler = scheduler_of("ddim", V1_4)

    def model():
        pipeline = tiny(diffusers.StableDiffusionPipeline, HERE / "v1/unet", scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    tensors["none"] = drawn(model())
    for method in METHODS:
        pipeline, written, seed = model(), {}, 0
        for network, names in ADAPTED.items():
            start = "lora_unet_" if network == "unet" else "lora_te_text_model_"
            for name in names:
                layer, seed = towers(pipeline)[network].get_submodule(name), seed + 1
                module = adapter(method, name, layer, 700 + seed)
                key = start + name.replace(".", "_")
                written |= {f"{key}.{k}": x.clone() for k, x in saved(module).items()}
                weight, bias = merged(module, layer.weight.shape)
                layer.weight += SCALE * (weight.reshape(layer.weight.shape) - layer.weight)
                if bias is not None:
                    layer.bias += SCALE * (bias - layer.bias)
        save(written, target / f"{method}.safetensors")
        tensors[method] = drawn(pipeline)
    # PEFT's DoRA, in PEFT's and in diffusers' names.
    for name, dora in (("peft", False), ("peft-dora", True)):
        pipeline = model()
        config = LoraConfig(r=3, lora_alpha=2, use_dora=dora, use_rslora=not dora,
                            target_modules=ADAPTED["unet"], init_lora_weights=False)
        torch.manual_seed(9)
        adapted = get_peft_model(pipeline.unet, config)
        for part, p in adapted.named_parameters():
            if "magnitude" in part:
                p *= 1 + 0.2 * torch.randn(p.shape, generator=generator(9))
        folder = target / name
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        settings = json.loads((folder / "adapter_config.json").read_text())
        kept = ("lora_alpha", "use_rslora", "use_dora", "r", "peft_type")
        settings = {key: settings[key] for key in kept}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tensors[name] = drawn(pipeline)
    save(tensors, target / "expected.safetensors")


@torch.no_grad()
def peft(_):
    """PEFT's LoHa and its LoKr of two whole factors, with alphas that are no ranks."""
    target, tensors = HERE / "peft", {}
    some = {"alpha_pattern": {r"down_blocks\..*": 1}, "target_modules": ADAPTED["unet"]}
    for name, config in (
        ("loha", LoHaConfig(r=2, alpha=3, init_weights=False, **some)),
        ("lokr", LoKrConfig(r=64, alpha=40, init_weights=False, **some)),
    ):
        pipeline = tiny(diffusers.StableDiffusionPipeline, HERE / "v1/unet",
                        scheduler_of("ddim", V1_4))
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(9)
        adapted = get_peft_model(pipeline.unet, config)
        for part, p in adapted.named_parameters():
            if "hada" in part or "lokr" in part:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator(9)))
        folder = target / name
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings = {key: settings[key] for key in ("alpha", "alpha_pattern", "r", "peft_type")}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tensors[name] = drawn(pipeline)
    save(tensors, target / "expected.safetensors")


# Clip skip, guidance rescale, variations -------------------------------------------------------


def slerp(low, high, share):
    """AUTOMATIC1111's: the vectors are the columns of each channel (C, h, w)."""
    cosine = (low / low.norm(dim=1, keepdim=True) * high / high.norm(dim=1, keepdim=True)).sum(1)
    angle = cosine.acos()
    parts = [(part * angle).sin() / angle.sin() for part in (1 - share, share)]
    return parts[0].unsqueeze(1) * low + parts[1].unsqueeze(1) * high


@torch.no_grad()
def knobs(_):
    """Hidden states of earlier layers, and latents by `clip_skip`, `guidance_rescale` and mixed noise."""
    tensors = {}
    for name in ("v1", "v2"):
        folder = HERE / name / "text_encoder"
        model = CLIPTextModel.from_pretrained(folder)
        ids = load_file(folder / "expected.safetensors")["ids"][:1]
        states = model(ids, output_hidden_states=True).hidden_states
        for skip in range(1, len(states)):
            tensors[f"states.{name}.{skip}"] = model.final_layer_norm(states[-1 - skip])
    pipeline = tiny(diffusers.StableDiffusionPipeline, HERE / "v1/unet", scheduler_of("ddim", V1_4))
    pipeline.set_progress_bar_config(disable=True)
    # transformers 5 has no tower within the model any more, and diffusers asks for it.
    CLIPTextModel.text_model = property(lambda model: model)
    shape = (1, 4, 8, 8)
    low, high = (torch.randn(shape, generator=generator(seed)) for seed in (11, 5))
    cases = {"plain": {}, "clip_skip.1": {"clip_skip": 1}, "clip_skip.2": {"clip_skip": 2},
             "rescale.0.7": {"guidance_rescale": 0.7}, "rescale.1.0": {"guidance_rescale": 1.0}}
    cases |= {f"variation.{share}": {"latents": slerp(low[0], high[0], share)[None]} for share in (0.2, 0.75)}
    for name, options in cases.items():
        drawn = pipeline("a red house", negative_prompt="the sea", num_inference_steps=5, guidance_scale=3.0,
                         generator=generator(11), output_type="latent", **options)
        tensors[f"latents.{name}"] = drawn.images
    del CLIPTextModel.text_model
    save(tensors, HERE / "knobs.safetensors")


# Latent consistency models -----------------------------------------------------------------------

LCM = {"_class_name": "LCMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
       "original_inference_steps": 50, "timestep_spacing": "leading"}


@torch.no_grad()
def lcm(_):
    """Latents by a UNet that takes the guidance scale as an input. The other networks are those of SD 1.x."""
    shape = {**UNETS["v1"], "block_out_channels": (8, 16), "layers_per_block": 1, "time_cond_proj_dim": 10,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    root = HERE / "lcm"
    randomise(diffusers.UNet2DConditionModel(**shape), 500).save_pretrained(root / "unet")
    (root / "scheduler").mkdir(exist_ok=True)
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(LCM, indent=2) + "\n")
    index = {"_class_name": "LatentConsistencyModelPipeline"}
    (root / "model_index.json").write_text(json.dumps(index) + "\n")
    scheduler = diffusers.LCMScheduler.from_config(LCM)
    pipeline = tiny(diffusers.LatentConsistencyModelPipeline, root / "unet", scheduler)
    pipeline.set_progress_bar_config(disable=True)
    tensors = {}
    for steps, guidance in ((4, 8.5), (2, 1.5), (1, 1.0), (8, 4.0)):
        drawn = pipeline("a red house", num_inference_steps=steps, guidance_scale=guidance,
                         generator=generator(11), output_type="latent")
        tensors[f"{steps}.{guidance}"] = drawn.images
    save(tensors, root / "expected.safetensors")


# Embeddings ----------------------------------------------------------------------------------


def in_stripes(data, height=48):
    """A picture with bytes in the lower halves of its stripes, as AUTOMATIC1111 hides them."""
    packed = zlib.compress(data)
    count = height * 3 * -(-len(packed) // (height * 3))
    packed = (packed * (count // len(packed) + 1))[:count]
    seed, noise = 0, []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        noise.append(seed % 255)
    # The upper halves are a pattern; none of them is zero, so that no border is cut off.
    stripe = lambda halves: bytes(0x90 | (half ^ n) & 15 for half, n in zip(halves, noise))
    side = count // height // 3
    low = Image.frombytes("RGB", (side, height), stripe(b & 15 for b in packed))
    high = Image.frombytes("RGB", (side, height), stripe(b >> 4 for b in packed))
    picture = Image.new("RGB", (2 * side + 42, height))
    picture.paste(low, (0, 0))
    picture.paste(Image.new("RGB", (40, height), (213, 178, 91)), (side + 1, 0))
    picture.paste(high, (side + 41 + 1, 0))
    framed = Image.new("RGB", (picture.width + 6, picture.height + 4))
    framed.paste(picture, (3, 2))
    return framed


def inversion(_):
    """The same two vectors in each kind of file, and files of no use to this model."""
    target = HERE / "inversion"
    vectors = 3 * torch.randn((2, 32), generator=generator(41))
    save({"emb_params": vectors}, target / "plain.safetensors")
    save({"emb_params": torch.zeros(1, 1024)}, target / "second.safetensors")
    save({"emb_params": vectors / 0}, target / "spoilt.safetensors")
    save({"clip_l": vectors, "clip_g": vectors.clone()}, target / "large.safetensors")
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    content = {"string_to_token": {"*": 265}, "string_to_param": parameters, "name": "dictionary"}
    torch.save(content, target / "dictionary.pt")
    tensor = {"TORCHTENSOR": vectors.tolist()}
    told = {"string_to_param": {"*": tensor}, "string_to_token": {"*": 265}, "name": "<seen>"}
    data = json.dumps(told).encode()
    text = PngInfo()
    text.add_text("sd-ti-embedding", base64.b64encode(data).decode())
    small = Image.new("RGB", (8, 8), (120, 60, 30))
    small.save(target / "chunk.png", pnginfo=text)
    small.save(target / "picture.png")
    in_stripes(data).save(target / "stripes.png")


def controls(part):
    import control_fixtures

    getattr(control_fixtures, part)()


def samplers_2(_):
    import sampler_fixtures

    sampler_fixtures.samplers_2()


def start_2(_):
    import start_fixtures

    start_fixtures.start_2()


def second(_):
    import second_fixtures

    second_fixtures.second()


def few_steps(_):
    import start_fixtures

    start_fixtures.few_steps()


# Upscalers -----------------------------------------------------------------------------------


def upscalers(_):
    import upscaler_fixtures

    upscaler_fixtures.upscalers()


# Quantized files -----------------------------------------------------------------------------

# Where a block of each type that gguf does not quantize has its f16 scales, and their number.
SCALES = {"Q2_K": (80, 2), "Q3_K": (108, 1), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1)}


def quantized(_):
    """A GGUF file with a tensor of each type, a safetensors file with fp8, and their values."""
    target, expected, stream = HERE / "quantized", {}, numpy.random.default_rng(5)
    target.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(target / "blocks.gguf", "sd1")
    # Tools store tensors whose rows are no whole blocks in another shape.
    writer.add_array("comfy.gguf.orig_shape.q8_0", [4, 8, 4, 4])
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SCALES):
        kind = gguf.GGMLQuantizationType[name]
        if name in SCALES:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            data = stream.integers(0, 256, (2, size), dtype=numpy.uint8)
            start, count = SCALES[name]
            scales = stream.uniform(0.001, 0.02, (2, count)).astype(numpy.float16)
            data[:, start : start + 2 * count] = scales.view(numpy.uint8)
        else:
            values = stream.standard_normal((2, 256)).astype(numpy.float32)
            data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name.lower(), data, raw_dtype=kind)
        expected[name.lower()] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    expected["q8_0"] = expected["q8_0"].reshape(4, 8, 4, 4)
    # A type that is not read.
    ternary = gguf.GGMLQuantizationType.TQ1_0
    data = gguf.quants.quantize(numpy.ones((1, 256), dtype=numpy.float32), ternary)
    writer.add_tensor("tq1_0", data, raw_dtype=ternary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    codes, fp8 = torch.arange(256, dtype=torch.uint8), {}
    for name, kind in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        finite = codes.view(kind).float()
        finite = codes[finite.isfinite()][:240].reshape(8, 30).view(kind)
        fp8 |= {f"{name}.weight": finite, f"{name}-plain.weight": finite}
        fp8[f"{name}.scale_input"] = torch.tensor(0.5)
        expected[f"{name}-plain.weight"] = finite.float()
    fp8["e4m3.scale_weight"] = torch.tensor(0.25)
    fp8["e5m2.weight_scale"] = torch.arange(1.0, 9.0).reshape(8, 1)
    expected["e4m3.weight"] = fp8["e4m3.weight"].float() * 0.25
    expected["e5m2.weight"] = fp8["e5m2.weight"].float() * torch.arange(1.0, 9.0).reshape(8, 1)
    save_file({name: x.clone() for name, x in fp8.items()}, target / "fp8.safetensors")
    save(expected, target / "expected.safetensors")


def main():
    parts = {
        "noise": lambda _: noise(),
        "samplers": lambda _: samplers(),
        "samplers_2": samplers_2,
        "tokenizer": tokenizer,
        "text": text,
        "unet": unet,
        "vae": vae,
        "start": start,
        "start_2": start_2,
        "few_steps": few_steps,
        "second": second,
        "tiling": tiling,
        "emphasis": emphasis,
        "hires": hires,
        "upscalers": upscalers,
        "single": single,
        "pickles": pickles,
        "safety": safety,
        "lora": lora,
        "peft": peft,
        "inversion": inversion,
        "knobs": knobs,
        "lcm": lcm,
        "forms": forms,
        "quantized": quantized,
        "control": lambda _: controls("control"),
        "control_xl": lambda _: controls("control_xl"),
        "canny": lambda _: controls("canny"),
        "resized": lambda _: controls("resized"),
        "control_tiling": lambda _: controls("control_tiling"),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory")
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        parts[part](arguments.tokenizer)
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
