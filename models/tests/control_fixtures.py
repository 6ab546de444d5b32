"""ControlNets: small random ones and what diffusers computes with them, for
tests/parity/controlnet.rs, and the edges that OpenCV finds, for tests/parity/preprocess.rs. A part
of make_fixtures.py. Edges were made with opencv-python-headless 4.11.
"""

import json

import diffusers
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from make_fixtures import (
    HERE, UNETS, V1_4, generator, ldm_unet, painted, randomise, save, scheduler_of,
)

ROOT = HERE / "control"

# Two levels, so that the files are small; the second has no attention, as the last of SD 1.x.
LEVELS = {"block_out_channels": (8, 16), "layers_per_block": 1,
          "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
HINT = {"conditioning_embedding_out_channels": (4, 8, 8, 8)}
SHAPES = {
    "v1": {**UNETS["v1"], **LEVELS},
    # What of 2.x differs in these networks; its predictions are velocities.
    "v2": {**UNETS["v2"], **LEVELS, "attention_head_dim": [1, 2], "cross_attention_dim": 32},
}
SCHEDULERS = {"v1": V1_4, "v2": {**V1_4, "prediction_type": "v_prediction"}}
# The nets, the UNet of each, and what is special about them.
NETS = {
    "edges": ("v1", {}),
    "poses": ("v1", {"controlnet_conditioning_channel_order": "bgr"}),
    "shuffle": ("v1", {"global_pool_conditions": True}),
    "second": ("v2", {}),
}


def halved(model, target):
    """Saved in half precision, and with these weights in f32."""
    model.half().save_pretrained(target)
    return model.float()


def nets():
    """The UNets and the nets, whose zero convolutions are not zero."""
    unets, found = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        model = randomise(diffusers.UNet2DConditionModel(**shape, **UP), 700 + seed)
        unets[name] = halved(model, ROOT / f"{name}/unet")
    for seed, (name, (unet, extra)) in enumerate(NETS.items()):
        shape = {k: x for k, x in SHAPES[unet].items() if k != "sample_size"}
        model = diffusers.ControlNetModel(**shape, **HINT, **extra)
        found[name] = halved(randomise(model, 710 + seed), ROOT / f"nets/{name}")
    return unets, found


def ldm_control(net):
    """A net in the names of the original code."""
    tensors = {}
    hint = {"conv_in": 0, "conv_out": 14, **{f"blocks.{i}": 2 + 2 * i for i in range(6)}}
    for key, x in net.state_dict().items():
        if key.startswith("controlnet_cond_embedding."):
            layer, kind = key.removeprefix("controlnet_cond_embedding.").rsplit(".", 1)
            key = f"input_hint_block.{hint[layer]}.{kind}"
        elif key.startswith("controlnet_down_blocks."):
            number, kind = key.removeprefix("controlnet_down_blocks.").split(".")
            key = f"zero_convs.{number}.0.{kind}"
        elif key.startswith("controlnet_mid_block."):
            key = key.replace("controlnet_mid_block.", "middle_block_out.0.")
        else:
            key = ldm_unet(key, net.config.layers_per_block)
        tensors[f"control_model.{key}"] = x
    return tensors


def check_control(tensors, net):
    """diffusers' own reading of the names gives the net back."""
    from diffusers.loaders import single_file_utils as theirs

    back = theirs.convert_controlnet_checkpoint(dict(tensors), net.config)
    whole = net.state_dict()
    assert back.keys() == whole.keys(), back.keys() ^ whole.keys()
    assert all(torch.equal(back[key], whole[key]) for key in whole)


def model_of(kind, unet, net, scheduler):
    """A pipeline of the small networks."""
    return kind(
        vae=diffusers.AutoencoderKL.from_pretrained(HERE / "v1/vae"),
        text_encoder=CLIPTextModel.from_pretrained(HERE / "v1/text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(HERE / "tokenizer"),
        unet=unet, controlnet=net, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )


def control_picture(k):
    """The k-th control picture, 64 x 64."""
    return Image.fromarray(painted(64, 64, k).numpy())


# Name of the case; the nets; settings, of which those that begin with control_ and controlnet_ are
# diffusers' own. The test reads them from the JSON file.
TEXT = [
    ("one", ["edges"], {}),
    ("scaled", ["edges"], {"controlnet_conditioning_scale": 0.6}),
    ("bgr", ["poses"], {}),
    ("two", ["edges", "poses"], {"controlnet_conditioning_scale": [0.8, 0.5]}),
    ("same", ["edges", "edges"], {"controlnet_conditioning_scale": [0.7, 0.4]}),
    ("window", ["edges"], {"control_guidance_start": 0.2, "control_guidance_end": 0.7}),
    ("windows", ["edges", "poses"], {"controlnet_conditioning_scale": [0.8, 0.5],
                                     "control_guidance_start": [0.0, 0.3],
                                     "control_guidance_end": [0.5, 1.0]}),
    ("guess", ["edges"], {"guess_mode": True}),
    ("guess-both", ["edges", "poses"], {"guess_mode": True,
                                        "controlnet_conditioning_scale": [0.9, 0.6]}),
    ("guess-alone", ["edges"], {"guess_mode": True, "guidance_scale": 1.0}),
    ("alone", ["edges"], {"guidance_scale": 1.0}),
    ("pooled", ["shuffle"], {}),
    ("pooled-last", ["edges", "shuffle"], {"controlnet_conditioning_scale": [0.7, 1.0]}),
]
SAMPLERS = ["euler_a", "heun", "dpmpp_2m", "pndm"]


def cases():
    found = [(f"text.{name}", "v1", "ddim", nets, settings) for name, nets, settings in TEXT]
    window = {"control_guidance_start": 0.1, "control_guidance_end": 0.6}
    found += [(f"text.{sampler}", "v1", sampler, ["edges"], window) for sampler in SAMPLERS]
    # Their defaults are others.
    scale = {"controlnet_conditioning_scale": 0.9}
    for kind in ("image", "hole", "told"):
        for sampler in ("ddim", "heun"):
            settings = {"strength": 0.6, **window, **scale}
            found.append((f"{kind}.{sampler}", "v1", sampler, ["edges"], settings))
    found.append(("image.two", "v1", "ddim", ["edges", "poses"],
                  {"strength": 0.5, "controlnet_conditioning_scale": [0.8, 0.5]}))
    found.append(("image.guess", "v1", "ddim", ["edges"], {"strength": 0.7, "guess_mode": True, **scale}))
    found.append(("text.second", "v2", "ddim", ["second"], {}))
    found.append(("image.second", "v2", "ddim", ["second"], {"strength": 0.5, **scale}))
    return found


@torch.no_grad()
def modules(unets, found):
    """What the nets add to skips and middle, and what the UNet makes of it."""
    stream, tensors = generator(31), {}
    for name, (unet, _) in NETS.items():
        net, width = found[name], SHAPES[unet]["cross_attention_dim"]
        context = torch.randn((3, 20, width), generator=stream)
        timesteps = torch.tensor([999.0, 1.0, 417.34])
        tensors |= {f"{name}.context": context, f"{name}.timesteps": timesteps}
        for h, w in [(8, 8), (5, 6)] if name == "edges" else [(5, 6)]:
            latents = torch.randn((3, 4, h, w), generator=stream)
            picture = painted(8 * w, 8 * h, 3)
            hint = picture.permute(2, 0, 1)[None].float() / 255
            case = f"{name}.{h}x{w}"
            tensors |= {f"{case}.latents": latents, f"{case}.picture": picture}
            for mode, guess in {"plain": False, "guess": True}.items():
                down, mid = net(latents, timesteps, context, hint.repeat(3, 1, 1, 1),
                                conditioning_scale=0.7, guess_mode=guess, return_dict=False)
                tensors |= {f"{case}.{mode}.{i}": x for i, x in enumerate([*down, mid])}
            # Of the last mode.
            tensors[f"{case}.output"] = unets[unet](
                latents, timesteps, context, down_block_additional_residuals=down,
                mid_block_additional_residual=mid).sample
    save(tensors, ROOT / "modules.safetensors")


@torch.no_grad()
def control():
    """Nets, what they add, and latents of whole runs."""
    unets, found = nets()
    single = ldm_control(found["edges"])
    check_control(single, found["edges"])
    save({key: x.half() for key, x in single.items()}, ROOT / "edges-ldm.safetensors")
    modules(unets, found)
    told = diffusers.UNet2DConditionModel.from_pretrained(HERE / "inpaint/unet")
    kinds = {
        "text": diffusers.StableDiffusionControlNetPipeline,
        "image": diffusers.StableDiffusionControlNetImg2ImgPipeline,
        "hole": diffusers.StableDiffusionControlNetInpaintPipeline,
        "told": diffusers.StableDiffusionControlNetInpaintPipeline,
    }
    picture = painted(64, 64, 1)
    mask = (painted(8, 8, 2)[:, :, 0] // 128 * 255).repeat_interleave(8, 0).repeat_interleave(8, 1)
    tensors, rows = {"picture": picture, "mask": mask}, []
    for case, name, sampler, used, settings in cases():
        kind = case.split(".")[0]
        several = [found[net] for net in used]
        pipeline = model_of(
            kinds[kind], told if kind == "told" else unets[name],
            several if len(several) > 1 else several[0], scheduler_of(sampler, SCHEDULERS[name]),
        )
        pipeline.set_progress_bar_config(disable=True)
        pictures = [control_picture(k + 2) for k in range(len(used))]
        pictures = pictures if len(pictures) > 1 else pictures[0]
        given = {"image": pictures, "width": 64, "height": 64}
        if kind != "text":
            given = {"image": Image.fromarray(picture.numpy()), "control_image": pictures,
                     "width": 64, "height": 64}
        if kind in ("hole", "told"):
            given["mask_image"] = Image.fromarray(mask.numpy())
        drawn = pipeline("a red house", num_inference_steps=10, generator=generator(11),
                         output_type="latent", **{"guidance_scale": 3.0, **given, **settings})
        tensors[case] = drawn.images
        rows.append({"case": case, "model": name, "sampler": sampler, "nets": used, **settings})
    save(tensors, ROOT / "runs.safetensors")
    (ROOT / "runs.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


@torch.no_grad()
def control_tiling():
    """Latents of whole runs where the convolutions of the UNet pad with the opposite edge, and those of the net do
    not, as in AUTOMATIC1111, which changes the layers of the model alone."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(ROOT / "v1/unet", torch_dtype=torch.float32)
    net = diffusers.ControlNetModel.from_pretrained(ROOT / "nets/edges", torch_dtype=torch.float32)
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.padding_mode = "circular"
    tensors = {}
    for sampler in ("ddim", "euler_a"):
        pipeline = model_of(diffusers.StableDiffusionControlNetPipeline, unet, net, scheduler_of(sampler, V1_4))
        pipeline.set_progress_bar_config(disable=True)
        tensors[sampler] = pipeline(
            "a red house", image=control_picture(2), width=64, height=64, num_inference_steps=10, guidance_scale=3.0,
            generator=generator(11), output_type="latent").images
    save(tensors, ROOT / "tiling.safetensors")


# Width, height, a number that makes the pictures different, and the thresholds.
EDGES = [
    (64, 64, 1, 100, 200), (40, 72, 1, 100, 200), (96, 48, 2, 50, 150), (24, 24, 3, 100, 200),
    (16, 30, 4, 20, 60), (129, 65, 5, 100, 200), (128, 96, 2, 200, 100), (7, 5, 1, 100, 200),
    (1, 9, 4, 1, 1), (80, 80, 0, 10.7, 30.2),
]


def canny():
    """Canny edges, packed as bits."""
    import cv2
    import numpy

    tensors = {}
    for i, (width, height, k, low, high) in enumerate(EDGES):
        picture = painted(width, height, k).numpy()
        if i % 2:
            # Soft shapes, whose gradients are between the thresholds.
            picture = cv2.GaussianBlur(picture, (0, 0), 1.3)
        found = cv2.Canny(picture, low, high)
        assert set(numpy.unique(found)) <= {0, 255}
        tensors[f"{i}.picture"] = torch.from_numpy(picture.copy())
        tensors[f"{i}.edges"] = torch.from_numpy(found)
        tensors[f"{i}.thresholds"] = torch.tensor([low, high], dtype=torch.float64)
    save(tensors, ROOT / "canny.safetensors")


# Width and height of a picture, the size it gets, and how: longer and shorter, by whole numbers and
# not, in one direction each, and down to a pixel.
RESIZED = [
    ((40, 30), (64, 48), "CUBIC"), ((40, 30), (57, 91), "CUBIC"), ((33, 17), (20, 40), "CUBIC"),
    ((5, 4), (23, 11), "CUBIC"), ((200, 150), (207, 163), "CUBIC"), ((64, 48), (31, 64), "CUBIC"),
    ((64, 48), (32, 24), "AREA"), ((66, 48), (22, 12), "AREA"), ((64, 48), (50, 37), "AREA"),
    ((97, 61), (13, 20), "AREA"), ((40, 30), (64, 20), "AREA"), ((30, 40), (17, 57), "AREA"),
    ((7, 5), (1, 1), "AREA"), ((40, 30), (40, 11), "AREA"),
    ((40, 30), (64, 48), "NEAREST"), ((64, 48), (27, 50), "NEAREST"), ((10, 9), (33, 7), "NEAREST"),
]


def resized():
    """Pictures resized by OpenCV."""
    import cv2

    tensors = {}
    for i, (sides, size, how) in enumerate(RESIZED):
        picture = torch.randint(0, 256, (*reversed(sides), 3), generator=generator(i), dtype=torch.uint8)
        if i % 3 == 0:
            # Black and white: what a filter makes of it has to be cut.
            picture = picture // 128 * 255
        made = cv2.resize(picture.numpy(), size, interpolation=getattr(cv2, f"INTER_{how}"))
        tensors[f"{i}.{how}.picture"] = picture
        tensors[f"{i}.{how}.resized"] = torch.from_numpy(made)
        threshold, _ = cv2.threshold(made[:, :, 0].copy(), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        tensors[f"{i}.{how}.otsu"] = torch.tensor([int(threshold)], dtype=torch.uint8)
    save(tensors, ROOT / "resized.safetensors")


# Stable Diffusion XL ---------------------------------------------------------------------------

# A net without attention is half as large, and published so.
XL_NETS = {
    "full": {},
    "small": {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D",
              "transformer_layers_per_block": [1, 1, 1]},
}
XL_CASES = [
    ("text.full", ["full"], {}),
    ("text.small", ["small"], {"controlnet_conditioning_scale": 0.7}),
    ("text.both", ["full", "small"], {"controlnet_conditioning_scale": [0.8, 0.5],
                                      "negative_prompt": "the sea", "control_guidance_end": 0.7}),
    ("text.guess", ["full"], {"guess_mode": True, "negative_prompt": "the sea",
                              "original_size": (512, 768), "crops_coords_top_left": (8, 16)}),
    ("image.full", ["full"], {"strength": 0.6, "controlnet_conditioning_scale": 0.9}),
    ("hole.full", ["full"], {"strength": 0.6, "controlnet_conditioning_scale": 0.9}),
]


@torch.no_grad()
def control_xl():
    """Nets of the small model of xl_fixtures.py, and latents of whole runs."""
    from xl_fixtures import DRAWN, XL, pipeline

    shape = {k: x for k, x in XL.items() if k not in ("sample_size", "up_block_types")}
    found = {}
    for seed, (name, changes) in enumerate(XL_NETS.items()):
        net = diffusers.ControlNetModel(**{**shape, **HINT, **changes})
        found[name] = halved(randomise(net, 730 + seed), ROOT / f"nets-xl/{name}")
    kinds = {
        "text": diffusers.StableDiffusionXLControlNetPipeline,
        "image": diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
        "hole": diffusers.StableDiffusionXLControlNetInpaintPipeline,
    }
    picture = painted(64, 64, 1)
    mask = (painted(8, 8, 2)[:, :, 0] // 128 * 255).repeat_interleave(8, 0).repeat_interleave(8, 1)
    tensors, rows = {"picture": picture, "mask": mask}, []
    for case, used, settings in XL_CASES:
        kind, nets_of_case = case.split(".")[0], [found[net] for net in used]
        net = nets_of_case if len(used) > 1 else nets_of_case[0]
        pictures = [control_picture(k + 2) for k in range(len(used))]
        pictures = pictures if len(used) > 1 else pictures[0]
        given = {"image": pictures}
        if kind != "text":
            given = {"image": Image.fromarray(picture.numpy()), "control_image": pictures}
        if kind == "hole":
            given["mask_image"] = Image.fromarray(mask.numpy())
        drawn = pipeline(kinds[kind], controlnet=net)(
            "a red house", generator=generator(11), output_type="latent",
            **{**DRAWN, **given, **settings})
        tensors[case] = drawn.images
        rows.append({"case": case, "nets": used, **settings})
    save(tensors, ROOT / "runs-xl.safetensors")
    (ROOT / "runs-xl.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
