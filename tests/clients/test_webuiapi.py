"""A client that was written for AUTOMATIC1111, before the real server."""

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
