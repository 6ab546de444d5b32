"""The options of the web page: what the body of the request is, and what shows."""

import base64
import io
import shutil
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import expect

from browser import generate, generated, opened, sent, shoot
from server import serving


def paint(page):
    """Marks a quarter of the input image, and a dot."""
    page.click("#paint")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"], steps=5)
    page.mouse.up()
    page.mouse.click(box["x"] + box["width"] * 88 / 96, box["y"] + box["height"] / 8)


def drop(page, target, path):
    """Drops a file on one of the zones that show while it is dragged."""
    data = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [data, path.name],
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#zones")).to_be_visible()
    shoot(page, "zones")
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})
    expect(page.locator("#zones")).to_be_hidden()


def test_an_input_image_and_a_mask(browser, server, tmp_path):
    Image.new("RGB", (96, 64), "orange").save(tmp_path / "orange.png")
    with opened(browser, server) as page:
        page.set_input_files("#file", tmp_path / "orange.png")
        expect(page.locator("#chosen")).to_be_visible()
        # The current area in the aspect ratio of the image.
        assert (page.input_value("#width"), page.input_value("#height")) == ("152", "104")
        expect(page.locator("#mask-fields")).to_be_hidden()
        paint(page)
        shoot(page, "mask")
        page.click("#done")
        expect(page.locator("#paint")).to_have_text("Edit mask")
        page.locator("#strength").fill("0.9")
        body = sent(page, lambda: generate(page, "a blue lake", steps=6))
        mask = Image.open(io.BytesIO(base64.b64decode(body["mask"]))).convert("L")
        assert mask.size == (96, 64) and body["strength"] == 0.9
        assert mask.getpixel((24, 32)) == 255 and mask.getpixel((72, 32)) == 0
        assert mask.getpixel((88, 8)) == 255, "a tap draws a dot"
        assert not [name for name in body if name.startswith("mask_")], "the options are as diffusers'"
        generated(page, 1)
        shoot(page, "masked")
        page.click("#remove")
        expect(page.locator("#mask-fields")).to_be_hidden()
        page.click("#begin")
        expect(page.locator("#chosen")).to_be_visible()


def test_a_mask_lies_on_an_image_of_any_proportions(browser, server, tmp_path):
    Image.new("RGB", (60, 240), "orange").save(tmp_path / "tall.png")
    with opened(browser, server) as page:
        page.set_input_files("#file", tmp_path / "tall.png")
        page.click("#paint")
        expect(page.locator("#under")).to_have_js_property("complete", True)
        under, mask = (page.locator(name).bounding_box() for name in ["#under", "#mask"])
        assert under == mask and abs(under["height"] / under["width"] - 4) < 0.05
        assert under["height"] < page.viewport_size["height"]


def test_options_of_a_mask(browser, server, tmp_path):
    Image.new("RGB", (96, 64), "orange").save(tmp_path / "orange.png")
    with opened(browser, server) as page:
        page.set_input_files("#file", tmp_path / "orange.png")
        paint(page)
        page.click("#done")
        page.fill("#blur", "2")
        page.select_option("#fill", "noise")
        expect(page.locator("#padding")).to_be_disabled()
        page.check("#only-masked")
        page.fill("#padding", "8")
        page.check("#invert")
        body = sent(page, lambda: generate(page, "a blue lake", steps=6))
        options = {name: value for name, value in body.items() if name.startswith("mask_")}
        assert options == {"mask_blur": 2, "mask_fill": "noise", "mask_padding": 8, "mask_invert": True}
        generated(page, 1)
        # The result of the masked area alone is put back into the image.
        assert page.inner_text("#parameters").startswith("96×64 · ")


def test_loras(browser, furnished):
    with opened(browser, furnished) as page:
        names = page.locator("#lora-names option")
        assert names.evaluate_all("list => list.map(option => option.value)") == ["lcm", "sepia"]
        page.fill("#lora", "nothing")
        page.click("#add-lora")
        expect(page.locator("#error")).to_have_text("There is no LoRA nothing")
        page.fill("#lora", "sepia")
        page.press("#lora", "Enter")
        expect(page.locator("#error")).to_be_hidden()
        assert page.locator("#queue li").count() == 0, "Enter adds and does not generate"
        page.get_by_label("Weight of sepia").fill("0.8")
        body = sent(page, lambda: generate(page, "a house"))
        assert body["loras"] == [{"name": "sepia", "scale": 0.8}]
        generated(page, 1)
        expect(page.locator("#parameters")).to_contain_text("sepia 0.8")
        shoot(page, "loras")
        page.get_by_label("Remove sepia").click()
        assert "loras" not in sent(page, lambda: generate(page, "a house"))
        generated(page, 2)
        page.locator("#history button").last.click()
        page.click("#reuse")
        expect(page.get_by_label("Weight of sepia")).to_have_value("0.8")
        page.reload()
        expect(page.get_by_label("Weight of sepia")).to_have_count(0)


def test_hires_fix_with_an_upscaler(browser, server):
    with opened(browser, server) as page:
        page.check("#hires")
        expect(page.locator("#hires-size")).to_have_text("256×256")
        page.fill("#hires-scale", "1.5")
        expect(page.locator("#hires-size")).to_have_text("192×192")
        options = page.locator("#hires-upscaler option")
        assert options.first.inner_text() == "Default: Latent"
        assert "Lanczos" in options.all_inner_texts()
        page.select_option("#hires-upscaler", "Latent (nearest)")
        page.fill("#hires-strength", "0.6")
        page.fill("#hires-steps", "5")
        body = sent(page, lambda: generate(page, "a house", steps=4))
        hires = {name: value for name, value in body.items() if name.startswith("hires")}
        assert hires == {
            "hires_width": 192, "hires_height": 192, "hires_upscaler": "Latent (nearest)",
            "hires_strength": 0.6, "hires_steps": 5,
        }
        generated(page, 1)
        assert page.inner_text("#parameters").startswith("192×192 · 4 steps")
        assert "hires Latent (nearest)" in page.inner_text("#parameters")
        shoot(page, "hires")
        page.uncheck("#hires")
        body = sent(page, lambda: generate(page, "a house"))
        assert not [name for name in body if name.startswith("hires")]


def test_a_hires_pass_with_a_prompt_and_a_sampler_of_its_own(browser, server, tmp_path):
    with opened(browser, server) as page:
        page.check("#hires")
        page.fill("#hires-scale", "1.5")
        page.click("#hires-own summary")
        page.fill("#hires-prompt", "a blue house")
        page.fill("#hires-negative", "grey")
        page.fill("#hires-guidance", "5")
        page.select_option("#hires-sampler", "ddim")
        assert page.locator("#hires-schedule option[value=karras]").is_disabled()
        page.select_option("#hires-sampler", "dpmpp_2m")
        page.select_option("#hires-schedule", "karras")
        expect(page.locator("#hires-own summary span")).to_have_text("prompt, negative prompt, guidance 5, dpmpp_2m, karras")
        shoot(page, "hires-own")
        body = sent(page, lambda: generate(page, "a red house", steps=4, seed="1"))
        own = {name: value for name, value in body.items() if name.startswith("hires_") and name not in ["hires_width", "hires_height"]}
        assert own == {
            "hires_prompt": "a blue house", "hires_negative_prompt": "grey", "hires_guidance_scale": 5,
            "hires_scheduler": "dpmpp_2m", "hires_schedule": "karras",
        }
        generated(page, 1)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "own.png")
        page.reload()
        page.set_input_files("#read-file", tmp_path / "own.png")
        expect(page.locator("#notice")).to_have_text("Settings of own.png")
        read = {name: page.input_value(f"#hires-{name}") for name in ["prompt", "negative", "guidance", "sampler", "schedule"]}
        assert read == {"prompt": "a blue house", "negative": "grey", "guidance": "5", "sampler": "dpmpp_2m", "schedule": "karras"}


def test_a_controlnet_steers_by_a_picture(browser, binary, tmp_path):
    fixtures = Path(__file__).parents[2] / "models" / "tests" / "fixtures"
    shutil.copytree(fixtures / "v1", tmp_path / "model")
    shutil.copytree(fixtures / "control" / "v1", tmp_path / "model", dirs_exist_ok=True)
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "edges.png")
    (tmp_path / "text.txt").touch()
    nets = ("--controlnets-dir", str(fixtures / "control" / "nets"), "--dtype", "f32")
    with serving(binary, tmp_path / "log", *nets, model=("--model", str(tmp_path / "model"))) as url:
        with opened(browser, url, status="cpu") as page:
            page.select_option("#control", index=0)
            net = page.input_value("#control")
            assert "[" not in net, "without its hash"
            page.set_input_files("#control-file", tmp_path / "text.txt")
            expect(page.locator("#error")).to_have_text("That file is not an image")
            page.set_input_files("#control-file", tmp_path / "edges.png")
            expect(page.get_by_label("low")).to_be_hidden()
            page.get_by_label("preprocessor").select_option("canny")
            page.get_by_label("low").fill("50")
            page.get_by_label("scale", exact=True).fill("0.5")
            page.get_by_label("end", exact=True).fill("0.8")
            page.get_by_label("Guess mode").check()
            shoot(page, "controlnet")
            body = sent(page, lambda: generate(page, "a house", width=64, height=64))
            [control] = body["controlnets"]
            assert Image.open(io.BytesIO(base64.b64decode(control.pop("image")))).size == (64, 64)
            assert control == {"model": net, "preprocessor": "canny", "scale": 0.5, "end": 0.8, "low": 50, "guess_mode": True}
            generated(page, 1)
            assert f"ControlNet {net}" in page.inner_text("#parameters")
            page.get_by_label(f"Remove {net}").click()
            assert "controlnets" not in sent(page, lambda: generate(page, "a house"))


def test_the_net_of_the_built_in_model_and_what_it_sees(browser, server, tmp_path):
    with opened(browser, server) as page:
        assert page.locator("#control option").all_inner_texts() == ["canny"]
        generate(page, "a red house by the sea", steps=12, seed="1")
        generated(page, 1)
        detect = sent(page, lambda: page.click("#steer"), "controlnet/detect")
        image = detect.pop("controlnet_input_images")
        assert len(image) == 1 and detect == {"controlnet_module": "canny", "controlnet_processor_res": 128}
        map = page.get_by_alt_text("What canny sees")
        expect(map).to_have_js_property("naturalWidth", 128)
        first = map.get_attribute("src")
        low = page.get_by_label("low")
        assert low.get_attribute("placeholder") == "100"
        detect = sent(page, lambda: low.fill("20"), "controlnet/detect")
        assert detect["controlnet_threshold_a"] == 20
        expect(map).not_to_have_attribute("src", first)
        shoot(page, "control-canny")
        body = sent(page, lambda: generate(page, "a blue house in the desert", steps=12, seed="2"))
        [control] = body["controlnets"]
        assert control == {"model": "canny", "preprocessor": "canny", "low": 20, "image": image[0]}
        generated(page, 2)
        shoot(page, "control-result")
        page.get_by_label("preprocessor").select_option("none")
        expect(map).to_be_hidden()
        page.get_by_label("Remove canny").click()
        page.click("#reuse")
        expect(page.get_by_label("low")).to_have_value("20")
        expect(page.get_by_alt_text("What canny sees")).to_have_js_property("naturalWidth", 128)
        page.get_by_label("Remove canny").click()
        Image.new("RGB", (40, 24), "orange").save(tmp_path / "small.png")
        drop(page, "#zone-control", tmp_path / "small.png")
        expect(page.get_by_alt_text("Picture of canny")).to_have_js_property("naturalWidth", 40)


def test_a_picture_is_upscaled(browser, server):
    with opened(browser, server) as page:
        generate(page, "a house", seed="5", width=64, height=64)
        generated(page, 1)
        page.click("#upscale")
        assert page.locator("#upscaler option").all_inner_texts()[0] == "Lanczos"
        page.fill("#upscaling", "1.5")
        shoot(page, "upscale")
        body = sent(page, lambda: page.click("#upscale-dialog button[value=upscale]"), "sdapi/v1/extra-single-image")
        assert (body["upscaler_1"], body["upscaling_resize"]) == ("Lanczos", 1.5)
        generated(page, 2)
        parameters = page.inner_text("#parameters")
        assert parameters.startswith("96×96 · 2 steps") and parameters.endswith("seed 5")
        page.fill("#prompt", "")
        page.click("#reuse")
        assert (page.input_value("#prompt"), page.input_value("#width"), page.input_value("#seed")) == ("a house", "64", "5")


def test_everything_of_the_section_more(browser, server):
    with opened(browser, server) as page:
        page.click("#more summary")
        page.select_option("#syntax", "a1111")
        fields = {"variation": "0.3", "variation-seed": "9", "rescale": "0.7", "clip-skip": "1", "eta": "0.5", "s-noise": "1.1", "ensd": "31337"}
        for field, value in fields.items():
            page.fill(f"#{field}", value)
        page.check("#tiling")
        shoot(page, "more")
        page.select_option("#sampler", "euler_a")
        page.select_option("#schedule", "karras")
        body = sent(page, lambda: generate(page, "a (red:1.3) house", steps=3, seed="5", negative="[grey]", guidance="6", count="2"))
        assert body == {
            "prompt": "a (red:1.3) house", "negative_prompt": "[grey]", "steps": 3, "seed": "5", "guidance_scale": 6, "n": 2,
            "scheduler": "euler_a", "schedule": "karras", "prompt_syntax": "a1111", "variation_strength": 0.3,
            "variation_seed": "9", "guidance_rescale": 0.7, "clip_skip": 1, "eta": 0.5, "s_noise": 1.1, "tiling": True, "eta_noise_seed_delta": 31337,
            "stream": True, "preview": True, "output_format": "png",
        }
        generated(page, 2)
        parameters = page.inner_text("#parameters")
        for told in ["3 steps", "Euler a Karras", "guidance 6", "clip skip 1", "variation 0.3 of 9", "seed 5", "without [grey]"]:
            assert told in parameters, told
        assert page.locator("#warnings li").count() == 0
        # The second image is that of the next variation, and of the same seed.
        page.locator("#history button").first.click()
        expect(page.locator("#parameters")).to_contain_text("variation 0.3 of 10 · seed 5")
        expect(page.locator("#more summary span")).to_have_text(
            "syntax a1111, variation 0.3, of seed 9, rescale 0.7, clip skip 1, eta 0.5, noise 1.1, noise seed delta 31337, tiling"
        )


def test_numbers_are_typed_or_stepped(browser, server):
    with opened(browser, server) as page:
        page.fill("#guidance", "7.25")
        page.fill("#prompt", "a cat")
        assert sent(page, lambda: page.click("#draw"))["guidance_scale"] == 7.25
        page.press("#guidance", "ArrowUp")
        assert page.input_value("#guidance") == "8", "a step of the slider"
        page.fill("#guidance", "")
        page.press("#guidance", "ArrowDown")
        assert page.input_value("#guidance") == "7"


def test_only_schedules_that_the_sampler_runs_on_can_be_chosen(browser, server):
    with opened(browser, server) as page:
        page.select_option("#sampler", "euler")
        page.select_option("#schedule", "karras")
        page.select_option("#sampler", "ddim")
        expect(page.locator("#schedule")).to_have_value("")
        assert page.locator("#schedule option[value=karras]").is_disabled()
        assert page.locator("#schedule option[value=sgm_uniform]").is_enabled()


def test_settings_are_read_from_an_image(browser, furnished, tmp_path):
    with opened(browser, furnished) as page:
        page.click("#more summary")
        page.select_option("#sampler", "dpmpp_2m")
        page.select_option("#schedule", "karras")
        page.check("#hires")
        page.fill("#hires-scale", "1.5")
        page.fill("#lora", "sepia")
        page.click("#add-lora")
        page.fill("#clip-skip", "1")
        page.fill("#rescale", "0.5")
        page.fill("#variation", "0.2")
        page.fill("#variation-seed", "77")
        generate(page, "a house, by the sea", steps=4, seed="12345678901234567890", negative="grey", guidance="5.5")
        generated(page, 1)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "house.png")
    with opened(browser, furnished) as page:
        page.set_input_files("#read-file", tmp_path / "house.png")
        expect(page.locator("#notice")).to_have_text("Settings of house.png")
        expected = {
            "prompt": "a house, by the sea", "negative": "grey", "steps": "4", "guidance": "5.5", "seed": "12345678901234567890",
            "sampler": "dpmpp_2m", "schedule": "karras", "width": "128", "height": "128", "hires-scale": "1.5", "clip-skip": "1",
            "rescale": "0.5", "variation": "0.2", "variation-seed": "77",
        }
        assert {name: page.input_value(f"#{name}") for name in expected} == expected
        expect(page.get_by_label("Weight of sepia")).to_have_value("1")
        assert page.is_checked("#hires") and page.get_attribute("#lock", "aria-pressed") == "true"
        page.click("#draw")
        generated(page, 1)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "again.png")
    images = [Image.open(tmp_path / name).tobytes() for name in ["house.png", "again.png"]]
    assert images[0] == images[1], "the same settings give the same picture"


def test_an_image_that_is_dropped(browser, server, tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (64, 64), "orange").save(plain)
    with opened(browser, server) as page:
        generate(page, "a boat", steps=3, seed="8")
        generated(page, 1)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "boat.png")
        page.fill("#prompt", "")
        page.fill("#steps", "")
        drop(page, "#zone-settings", tmp_path / "boat.png")
        expect(page.locator("#notice")).to_have_text("Settings of boat.png")
        assert (page.input_value("#prompt"), page.input_value("#steps")) == ("a boat", "3")
        drop(page, "#zone-settings", plain)
        expect(page.locator("#error")).to_have_text("Plain.png holds no generation parameters")
        drop(page, "#zone-input", plain)
        expect(page.locator("#chosen")).to_be_visible()
        expect(page.locator("#error")).to_be_hidden()


def test_settings_of_another_program_say_what_was_not_taken(browser, server, tmp_path):
    text = PngInfo()
    text.add_text(
        "parameters",
        "a cat <lora:style:0.5:0.7>\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 7, "
        "Seed: 1, Size: 64x128, Model: other, Denoising strength: 0.4, Clip skip: 2, Hires upscale: 2, Hires steps: 10, "
        "Hires upscaler: Latent, ADetailer model: face, Version: v1.10.1",
    )
    Image.new("RGB", (64, 128)).save(tmp_path / "a.png", pnginfo=text)
    with opened(browser, server) as page:
        page.set_input_files("#read-file", tmp_path / "a.png")
        expect(page.locator("#notice")).to_have_text("Settings of a.png. Not taken: Model other, ADetailer model")
        expected = {
            "prompt": "a cat", "sampler": "dpmpp_2m_sde", "schedule": "karras", "clip-skip": "1", "syntax": "a1111",
            "hires-scale": "2", "hires-strength": "0.4", "hires-steps": "25", "hires-upscaler": "Latent", "width": "64", "height": "128",
        }
        assert {name: page.input_value(f"#{name}") for name in expected} == expected
        body = sent(page, lambda: page.click("#draw"))
        assert body["loras"] == [{"name": "style", "text_encoder_scale": 0.5, "scale": 0.7}]
        expect(page.locator("#queue .failed .told")).to_contain_text("style")
