"""Records what SillyTavern sends for pictures:

    sillytavern.py TAVERN VERSION SERVER OUT

TAVERN is the address of a running SillyTavern (npm package `sillytavern`, `node server.js`), SERVER
that of an sd-server with the key `sesame` on the demo model. Chromium uses SillyTavern's page as a
person would: it connects the source "Stable Diffusion Web UI (AUTOMATIC1111)", draws, and leaves.
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from proxy import recording, write

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DRAW = "/imagine quiet=true a red house by the sea"
SOURCES = "src/endpoints/stable-diffusion.js, public/scripts/extensions/stable-diffusion/index.js"


def record(tavern, version, server, out):
    with sync_playwright() as playwright, recording(server) as (url, exchanges):
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(240_000)
        page.goto(tavern)
        page.wait_for_function("window.SillyTavern && document.querySelector('#sd_source')")
        page.wait_for_timeout(5_000)
        page.evaluate("""url => {
            jQuery('#sd_source').val('auto').trigger('change');
            jQuery('#sd_auto_url').val(url).trigger('input');
            jQuery('#sd_auto_auth').val('user:sesame').trigger('input');
            jQuery('#sd_auto_validate').trigger('click');
        }""", url)
        page.wait_for_function("document.querySelector('#sd_model option[value=demo]')")
        page.wait_for_timeout(5_000)

        def draw(**settings):
            return page.evaluate("""async ([settings, command]) => {
                const context = SillyTavern.getContext();
                Object.assign(context.extensionSettings.sd, settings);
                return (await context.executeSlashCommandsWithOptions(command)).pipe;
            }""", [settings, DRAW])

        assert draw(width=64, height=64, steps=3)
        assert draw(sampler="DPM++ 2M", scheduler="karras", seed=7, scale=5)
        assert draw(enable_hr=True, hr_scale=2, hr_upscaler="Latent (nearest)", hr_second_pass_steps=2)
        assert not draw(enable_hr=False, restore_faces=True), "what is not done is refused"
        page.evaluate("jQuery('#sd_model').val('demo').trigger('change')")
        page.wait_for_timeout(3_000)
        page.evaluate("""command => {
            const context = SillyTavern.getContext();
            const long = { restore_faces: false, steps: 150, width: 256, height: 256 };
            Object.assign(context.extensionSettings.sd, long);
            context.executeSlashCommandsWithOptions(command);
        }""", DRAW)
        page.wait_for_timeout(3_000)
        # Whoever leaves interrupts.
        browser.close()
        while not all("status" in exchange for exchange in exchanges):
            pass
    for exchange in exchanges:
        # The address of this run, which SillyTavern passes on to itself.
        if "url" in exchange.get("json", {}):
            exchange["json"]["url"] = "http://127.0.0.1:8080"
    write(out, f"SillyTavern {version}", f"npm sillytavern {version}, {SOURCES}", exchanges)


record(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
