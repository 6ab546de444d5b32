"""Writes tests/fixtures/ip/: small random IP-Adapters and image encoders, and what diffusers computes
with them, for tests/parity/ip_adapter.rs. Needs the fixtures of make_fixtures.py and xl_fixtures.py.

    python ip_fixtures.py

Its weights are rounded to f16, in which the files are; diffusers computed with them in f32. Pictures
are resized by Pillow. The committed files were made with torch 2.15.0, diffusers 0.42.1 and
transformers 5.24.0 on a CPU.
"""

import json
import shutil

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import xl_fixtures
from make_fixtures import HERE, V1_4, generator, painted, randomise, save, scheduler_of

ROOT = HERE / "ip"

# Two towers, as of h94/IP-Adapter: `models` and `sdxl_models`.
TOWERS = {
    "models": dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3,
                   image_size=28, patch_size=8, projection_dim=20, hidden_act="gelu"),
    "sdxl_models": dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                        num_attention_heads=2, image_size=24, patch_size=6, projection_dim=28,
                        hidden_act="gelu"),
}
# The file, the tower that it was trained with, and its kind.
ADAPTERS = {
    "models/ip-adapter_sd15": ("models", "plain"),
    "models/ip-adapter-plus_sd15": ("models", "plus"),
    "models/ip-adapter-full-face_sd15": ("models", "full"),
    "sdxl_models/ip-adapter_sdxl": ("sdxl_models", "plain"),
    "sdxl_models/ip-adapter_sdxl_vit-h": ("models", "plain"),
    "sdxl_models/ip-adapter-plus_sdxl_vit-h": ("models", "plus"),
}


def rounded(model, seed):
    randomise(model, seed)
    for p in model.parameters():
        p.data.copy_(p.data.half().float())
    return model.eval()


def towers():
    """The image encoders."""
    found = {}
    for seed, (name, shape) in enumerate(TOWERS.items()):
        model = rounded(CLIPVisionModelWithProjection(CLIPVisionConfig(**shape)), 800 + seed)
        target = ROOT / name / "image_encoder"
        model.save_pretrained(target)
        path = target / "model.safetensors"
        save_file({key: x.half() for key, x in load_file(path).items()}, path)
        found[name] = model
    return found


def processor(tower):
    side = tower.config.image_size
    return CLIPImageProcessorPil(size=side, crop_size=side)


def adapter(unet, tower, kind, seed):
    """The tensors of an adapter, in the names of h94/IP-Adapter."""
    stream, width = generator(seed), unet.config.cross_attention_dim
    shape = TOWERS[tower]

    def draw(*sides):
        fan = sides[-1] if len(sides) > 1 else 1
        return (torch.randn(sides, generator=stream) * 1.4 / fan**0.5).half().float()

    def norm(name, channels):
        return {f"{name}.weight": (draw(channels) * 0.2 + 1).half().float(),
                f"{name}.bias": (draw(channels) * 0.2).half().float()}

    def linear(name, inputs, outputs):
        return {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}

    hidden = shape["hidden_size"]
    if kind == "plain":
        proj = {**linear("proj", shape["projection_dim"], 4 * width), **norm("norm", width)}
    elif kind == "full":
        proj = {**linear("proj.0", hidden, hidden), **linear("proj.2", hidden, width),
                **norm("proj.3", width)}
    else:
        # A head has 64 channels.
        inside, inner, queries = 12, 128, 5
        proj = {"latents": draw(1, queries, inside), **linear("proj_in", hidden, inside),
                **linear("proj_out", inside, width), **norm("norm_out", width)}
        # diffusers builds four.
        for i in range(4):
            at, ff = f"layers.{i}.0", f"layers.{i}.1"
            proj |= {**norm(f"{at}.norm1", inside), **norm(f"{at}.norm2", inside),
                     f"{at}.to_q.weight": draw(inner, inside),
                     f"{at}.to_kv.weight": draw(2 * inner, inside),
                     f"{at}.to_out.weight": draw(inside, inner),
                     **norm(f"{ff}.0", inside), f"{ff}.1.weight": draw(4 * inside, inside),
                     f"{ff}.3.weight": draw(inside, 4 * inside)}
    keys, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            to_k = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
            keys[f"{number}.to_k_ip.weight"] = draw(*to_k.shape)
            keys[f"{number}.to_v_ip.weight"] = draw(*to_k.shape)
            number += 2
    return {"image_proj": proj, "ip_adapter": keys}


def flat(tensors):
    return {f"{group}.{key}": x for group, own in tensors.items() for key, x in own.items()}


@torch.no_grad()
def files(unets, encoders):
    """The files, and the tokens that they make of pictures."""
    found, expected = {}, {}
    for seed, (name, (tower, kind)) in enumerate(ADAPTERS.items()):
        unet = unets["xl" if "xl" in name else "v1"]
        tensors = adapter(unet, tower, kind, 820 + seed)
        found[name] = tensors
        path = ROOT / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save({key: x.half() for key, x in flat(tensors).items()}, path)
        # Their own reading of the file.
        project = unet._convert_ip_adapter_image_proj_to_diffusers(tensors["image_proj"])
        encoder = encoders[tower]
        for k, picture in enumerate(pictures()):
            pixels = processor(encoder)(picture, return_tensors="pt").pixel_values
            output = encoder(pixels, output_hidden_states=True)
            features = output.image_embeds if kind == "plain" else output.hidden_states[-2]
            expected[f"{name}.{k}"] = project(features)
        blank = encoder(torch.zeros_like(pixels), output_hidden_states=True).hidden_states[-2]
        none = torch.zeros_like(output.image_embeds) if kind == "plain" else blank
        expected[f"{name}.none"] = project(none)
    nested = found["models/ip-adapter_sd15"]
    nested = {group: {key: x.half() for key, x in own.items()} for group, own in nested.items()}
    torch.save(nested, ROOT / "models/ip-adapter_sd15_pickled.bin")
    save(expected, ROOT / "tokens.safetensors")
    return found


def pictures():
    """Pictures of several proportions."""
    sizes = [(96, 60, 1), (40, 72, 2), (64, 64, 4)]
    return [Image.fromarray(painted(*size).numpy()) for size in sizes]


# Name of the case; adapters; for each the numbers of its pictures; settings. `scale` is a number or a
# dictionary, or a list of these. The test reads them from the JSON file.
PLAIN, PLUS, FULL = list(ADAPTERS)[:3]
V1_CASES = [
    ("text.plain", [PLAIN], [[0]], {}),
    ("text.scaled", [PLAIN], [[1]], {"scale": 0.6, "negative_prompt": "the sea"}),
    ("text.negative", [PLAIN], [[1]], {"scale": -0.5}),
    ("text.plus", [PLUS], [[0]], {"scale": 0.7}),
    ("text.full", [FULL], [[2]], {"scale": 0.8}),
    ("text.alone", [PLUS], [[0]], {"guidance_scale": 1.0}),
    ("text.zero", [PLAIN], [[0]], {"scale": 0.0}),
    ("text.two", [PLAIN, PLUS], [[0], [1]], {"scale": [0.5, 0.4]}),
    ("text.pictures", [PLAIN], [[0, 2]], {"scale": 0.8}),
    ("text.pictures-plus", [PLUS], [[0, 1]], {"scale": 0.8}),
    ("text.blocks", [PLUS], [[1]], {"scale": {"down": {"block_0": 0.9}, "up": {"block_1": [0.0, 1.1]}}}),
    ("text.middle", [PLAIN], [[1]], {"scale": {"mid": 1.2}}),
    ("text.net", [PLUS], [[0]], {"scale": 0.7, "net": "edges"}),
    ("text.net-guess", [PLAIN], [[0]], {"scale": 0.7, "net": "edges", "guess_mode": True}),
    ("image.plain", [PLAIN], [[0]], {"strength": 0.6}),
    ("image.plus", [PLUS], [[1]], {"strength": 0.6, "scale": 0.7}),
    ("hole.plus", [PLUS], [[1]], {"strength": 0.6, "scale": 0.7}),
]
XL_PLAIN, XL_VIT_H, XL_PLUS = list(ADAPTERS)[3:]
XL_CASES = [
    ("text.plain", [XL_PLAIN], [[0]], {}),
    ("text.vit-h", [XL_VIT_H], [[1]], {"scale": 0.6, "negative_prompt": "the sea"}),
    ("text.plus", [XL_PLUS], [[0]], {"scale": 0.7}),
    ("text.alone", [XL_PLUS], [[2]], {"guidance_scale": 1.0}),
    ("text.blocks", [XL_PLUS], [[1]], {"scale": {"up": {"block_0": [0.0, 1.0]}, "down": 0.4}}),
    ("image.plus", [XL_PLUS], [[1]], {"strength": 0.6, "scale": 0.7}),
    ("hole.plain", [XL_PLAIN], [[0]], {"strength": 0.6, "scale": 0.7}),
]


def v1_pipeline(kind, unet, net):
    kinds = {"text": "StableDiffusionPipeline", "image": "StableDiffusionImg2ImgPipeline",
             "hole": "StableDiffusionInpaintPipeline"}
    extra = {"controlnet": net} if net else {}
    if net:
        kinds["text"] = "StableDiffusionControlNetPipeline"
    return getattr(diffusers, kinds[kind])(
        vae=diffusers.AutoencoderKL.from_pretrained(HERE / "v1/vae"),
        text_encoder=CLIPTextModel.from_pretrained(HERE / "v1/text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(HERE / "tokenizer"),
        unet=unet, scheduler=scheduler_of("ddim", V1_4), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **extra,
    )


def xl_pipeline(kind, _, __):
    kinds = {"text": diffusers.StableDiffusionXLPipeline,
             "image": diffusers.StableDiffusionXLImg2ImgPipeline,
             "hole": diffusers.StableDiffusionXLInpaintPipeline}
    return xl_fixtures.pipeline(kinds[kind])


def unet_of(folder):
    return diffusers.UNet2DConditionModel.from_pretrained(HERE / folder, torch_dtype=torch.float32)


@torch.no_grad()
def runs(name, cases, folder, build, found, encoders):
    """Latents of whole runs."""
    picture = painted(64, 64, 1)
    mask = (painted(8, 8, 2)[:, :, 0] // 128 * 255).repeat_interleave(8, 0).repeat_interleave(8, 1)
    tensors, rows = {"picture": picture, "mask": mask}, []
    shown = pictures()
    for case, adapters, numbers, settings in cases:
        kind, given = case.split(".")[0], dict(settings)
        scale, net = given.pop("scale", 1.0), given.pop("net", None)
        if net:
            path = HERE / f"control/nets/{net}"
            net = diffusers.ControlNetModel.from_pretrained(path, torch_dtype=torch.float32)
            given["image"] = Image.fromarray(painted(64, 64, 2).numpy())
        model = build(kind, unet_of(folder), net)
        encoder = encoders[ADAPTERS[adapters[0]][0]]
        model.register_modules(image_encoder=encoder, feature_extractor=processor(encoder))
        states = [{group: dict(own) for group, own in found[name].items()} for name in adapters]
        model.load_ip_adapter(states, subfolder="", weight_name=[""] * len(states))
        model.set_ip_adapter_scale(json.loads(json.dumps(scale)))
        model.set_progress_bar_config(disable=True)
        prompts = [[shown[k] for k in own] for own in numbers]
        if kind != "text":
            given["image"] = Image.fromarray(picture.numpy())
        if kind == "hole":
            given |= {"mask_image": Image.fromarray(mask.numpy())}
        if kind != "image":
            given |= {"width": 64, "height": 64}
        steps = {"num_inference_steps": 6, "guidance_scale": 3.0}
        drawn = model("a red house", generator=generator(11), output_type="latent",
                      ip_adapter_image=prompts, **{**steps, **given})
        tensors[case] = drawn.images
        rows.append({"case": case, "adapters": adapters, "pictures": numbers, **settings})
    save(tensors, ROOT / f"runs-{name}.safetensors")
    (ROOT / f"runs-{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    torch.set_num_threads(1)
    unets = {"v1": unet_of("control/v1/unet"), "xl": unet_of("xl/unet")}
    encoders = towers()
    found = files(unets, encoders)
    runs("v1", V1_CASES, "control/v1/unet", v1_pipeline, found, encoders)
    runs("xl", XL_CASES, "xl/unet", xl_pipeline, found, encoders)
    for path in ROOT.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
