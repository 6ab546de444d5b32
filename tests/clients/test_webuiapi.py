"""A client that was written for AUTOMATIC1111, before the real server."""

import base64
import io
import re
import threading
import time

import pytest
import webuiapi
from PIL import Image, ImageChops, ImageStat


@pytest.fixture(scope="module")
def client(server):
    """The client as its README makes it, with its own defaults: Euler a, 20 steps."""
    return webuiapi.WebUIApi(baseurl=f"{server}/sdapi/v1")


def test_txt2img(client):
    reply = client.txt2img(
        prompt="a red house", negative_prompt="dogs", seed=7, steps=2, width=64, height=96, cfg_scale=3,
        batch_size=2, sampler_name="DPM++ 2M", scheduler="Karras",
    )
    assert [image.size for image in reply.images] == [(64, 96)] * 2
    assert reply.info["all_seeds"] == [7, 8]
    assert reply.info["infotexts"] == [image.info["parameters"] for image in reply.images]
    assert reply.image.info["parameters"].startswith("a red house\nNegative prompt: dogs\nSteps: 2")
    assert reply.parameters["seed"] == 7


def test_img2img(client):
    settings = {"steps": 12, "width": 128, "height": 128, "sampler_name": "DPM++ 2M"}
    house = client.txt2img(prompt="a red house by the sea", seed=5, **settings).image.convert("RGB")
    mask = Image.new("L", house.size, 0)
    mask.paste(255, (24, 24, 104, 104))
    reply = client.img2img(
        images=[house], mask_image=mask, prompt="a green tree by the sea", seed=1,
        denoising_strength=0.9, inpainting_fill=1, **settings,
    )
    assert reply.image.size == house.size and reply.info["denoising_strength"] == 0.9

    def change(box):
        """How far a part is from what it was, of 255."""
        difference = ImageChops.difference(reply.image.convert("RGB").crop(box), house.crop(box))
        return sum(ImageStat.Stat(difference).mean) / 3

    kept, painted = change((0, 0, 128, 12)), change((40, 72, 88, 104))
    assert kept < 10 and painted > 40
    # What the client asks for by default is done as it asks.
    assert not any("inpaint" in note or "mask" in note for note in reply.info["warnings"])


def test_a_seed_of_minus_one_is_chance(client):
    seeds = {client.txt2img(prompt="x", steps=1, width=64, height=64).info["seed"] for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0


def test_what_is_asked_first(client):
    assert client.util_get_model_names() == ["demo"]
    assert client.util_get_current_model() == "demo"
    assert {"Euler a", "DPM++ 2M", "UniPC"} <= set(client.util_get_sampler_names())
    assert "karras" in [name.lower() for name in client.util_get_scheduler_names()]
    assert client.get_sd_vae() == client.get_loras() == []
    upscalers = [upscaler["name"] for upscaler in client.get_upscalers()]
    assert upscalers == ["None", "Lanczos", "Nearest"]
    client.util_set_model("demo")
    client.util_wait_for_ready(check_interval=0.1)


def test_png_info(client):
    image = client.txt2img(prompt="a car", steps=1, seed=5, width=64, height=64).image
    assert client.png_info(image).info.startswith("a car\nSteps: 1")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_png_info_of_files_that_were_saved_again(client, kind):
    """The client sends PNG files, with the text chunks that Pillow knows of."""
    image = client.txt2img(prompt="a car", steps=1, seed=5, width=64, height=64).image
    text = image.info["parameters"]
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    saved = io.BytesIO()
    image.save(saved, kind, exif=exif.tobytes())
    body = {"image": base64.b64encode(saved.getvalue()).decode()}
    reply = client.session.post(f"{client.baseurl}/png-info", json=body).json()
    assert reply["info"] == text and reply["parameters"]["Seed"] == "5"
    image.info["workflow"] = "{}"
    assert client.png_info(image).json["items"] == {"parameters": text, "workflow": "{}"}


def test_pictures_are_upscaled(client):
    picture = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    reply = client.extra_single_image(picture, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert reply.image.size == (80, 48)
    assert reply.info == "<p>Postprocess upscale by: 2.0, Postprocess upscaler: Lanczos</p>"
    fitted = {"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64}
    reply = client.extra_batch_images([picture, picture.transpose(2)], upscaler_1="Nearest", **fitted)
    assert [image.size for image in reply.images] == [(64, 64)] * 2
    # As the client asks where it is told nothing.
    assert client.extra_single_image(picture).image.tobytes() == picture.tobytes()


def test_real_esrgan_by_its_name_there(steered):
    client = webuiapi.WebUIApi(baseurl=f"{steered}/sdapi/v1")
    assert client.get_realesrgan_models() == [
        {"name": "R-ESRGAN 4x+", "path": "RealESRGAN_x4plus.pth", "scale": 4}
    ]
    assert "R-ESRGAN 4x+" in [upscaler["name"] for upscaler in client.get_upscalers()]
    picture = Image.linear_gradient("L").resize((24, 24)).convert("RGB")
    reply = client.extra_single_image(picture, upscaler_1=webuiapi.Upscaler.ESRGAN_4x, upscaling_resize=4)
    assert reply.image.size == (96, 96)
    reply = client.txt2img(
        prompt="a car", steps=1, width=64, height=64, enable_hr=True, hr_upscaler=webuiapi.HiResUpscaler.ESRGAN_4x,
    )
    assert reply.image.size == (128, 128)
    assert reply.info["extra_generation_params"]["Hires upscaler"] == "R-ESRGAN 4x+"


def test_controlnet_units(steered):
    client = webuiapi.WebUIApi(baseurl=f"{steered}/sdapi/v1")
    assert client.controlnet_version() == 3
    net = client.controlnet_model_list()[0]
    assert "canny" in client.controlnet_module_list()
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    asked = {"prompt": "a car", "seed": 3, "steps": 2, "width": 64, "height": 64}
    plain = client.txt2img(**asked)
    # Its thresholds of 64 are out of the range of a module without any.
    unit = webuiapi.ControlNetUnit(image=picture, module="none", model=net)
    # The client writes units into the default of this argument, and into all later requests.
    steered = client.txt2img(**asked, controlnet_units=[unit], alwayson_scripts={})
    assert len(steered.images) == 2 and steered.image.tobytes() != plain.image.tobytes()
    name = net.split(" [")[0]
    said = steered.info["extra_generation_params"]["ControlNet 0"]
    assert said == (
        f"Module: none, Model: {name}, Weight: 1, Resize Mode: Resize and Fill, Processor Res: 512, "
        "Guidance Start: 0, Guidance End: 1, Pixel Perfect: False, Control Mode: Balanced"
    )
    edges = webuiapi.ControlNetUnit(image=picture, module="canny", model=net, control_mode=2, pixel_perfect=True)
    off = webuiapi.ControlNetUnit(model="None", enabled=False)
    reply = client.img2img(
        images=[picture], denoising_strength=0.5, controlnet_units=[edges, off], alwayson_scripts={}, **asked,
    )
    said = reply.info["extra_generation_params"]["ControlNet 0"]
    assert "Threshold A: 64, Threshold B: 64" in said and "Pixel Perfect: True" in said
    assert reply.info["warnings"] == [] and len(reply.images) == 2


def test_progress_and_interrupt(client):
    outcome = []

    def draw():
        try:
            outcome.append(client.txt2img(prompt="x", steps=150, width=256, height=256))
        except RuntimeError as error:
            outcome.append(error)

    drawing = threading.Thread(target=draw)
    drawing.start()
    progress = {"current_image": None}
    while drawing.is_alive() and not progress["current_image"]:
        progress = client.get_progress()
        time.sleep(0.05)
    assert 0 < progress["progress"] < 1 and progress["state"]["job_count"] == 1
    assert progress["state"]["sampling_steps"] == 150 and progress["eta_relative"] > 0
    client.interrupt()
    drawing.join(30)
    half_made = outcome[0]
    assert half_made.image.size == (256, 256)
    assert re.fullmatch(r"interrupted after \d+ of 150 UNet calls", half_made.info["warnings"][0])
    assert client.get_progress()["state"]["job_count"] == 0


@pytest.mark.parametrize("feature", [{"restore_faces": True}, {"styles": ["oil"]}])
def test_what_is_not_done_is_refused_by_name(client, feature):
    with pytest.raises(RuntimeError, match=next(iter(feature))):
        client.txt2img(prompt="x", steps=1, **feature)


def test_keys_are_passwords(locked):
    client = webuiapi.WebUIApi(baseurl=f"{locked}/sdapi/v1", username="anyone", password="sesame")
    assert client.txt2img(prompt="x", steps=1, width=64, height=64).images
    stranger = webuiapi.WebUIApi(baseurl=f"{locked}/sdapi/v1", username="anyone", password="open")
    with pytest.raises(RuntimeError, match="invalid_api_key"):
        stranger.txt2img(prompt="x", steps=1)


def test_what_else_it_has_methods_for(client):
    assert client.get_cmd_flags()["api"] is True
    memory = client.get_memory()
    assert memory["ram"]["total"] > memory["ram"]["used"] > 1 << 20
    for empty in [client.get_hypernetworks, client.get_face_restorers, client.get_prompt_styles]:
        assert empty() == []
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    client.refresh_checkpoints()
    assert client.skip() is None
    with pytest.raises(RuntimeError, match="interrogate is not supported"):
        client.interrogate(Image.new("RGB", (8, 8)))


def test_a_model_that_was_unloaded_draws_on(client):
    asked = {"prompt": "a car", "seed": 3, "steps": 1, "width": 64, "height": 64}
    before = client.txt2img(**asked).image
    post = lambda route: client.session.post(f"{client.baseurl}/{route}").json()
    assert post("unload-checkpoint") == {}
    after = client.txt2img(**asked).image
    assert before.tobytes() == after.tobytes()
    assert post("unload-checkpoint") == post("reload-checkpoint") == {}


def test_a_size_is_rounded_with_a_word(client):
    reply = client.txt2img(prompt="a car", steps=1, width=100, height=64)
    assert reply.image.size == (96, 64)
    assert reply.info["warnings"] == ["width 100 is no multiple of 8: it is 96"]
