"""Records what Open WebUI sends for pictures:

    open_webui.py WHEEL SERVER OUT

WHEEL is a directory with the unpacked wheel of `open-webui`, SERVER the address of an sd-server with
the key `sesame` on the demo model. Open WebUI's own router of pictures runs, with everything else of
Open WebUI (accounts, database, files) replaced: its packages weigh more than this test is worth.
Needs aiofiles, aiohttp, fastapi, greenlet, pillow, pydantic and sqlalchemy.
"""

import asyncio
import base64
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import aiohttp
from PIL import Image

from proxy import recording, write

ROUTER = "open_webui/routers/images.py"
PROMPT = "a red house by the sea"


class Replaced(types.ModuleType):
    """A module of which nothing is used here, or what a test has put there."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the router in the wheel, and nothing else of it."""

    def __init__(self, wheel):
        self.wheel = wheel

    def find_spec(self, name, path=None, target=None):
        if name == "open_webui.routers.images":
            return importlib.util.spec_from_file_location(name, self.wheel / ROUTER)
        if name.split(".")[0] == "open_webui":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Replaced(spec.name)

    def exec_module(self, module):
        pass


def put(module, **values):
    """Puts what the router imports into a replaced module."""
    vars(importlib.import_module(f"open_webui.{module}")).update(values)


class Settings:
    """Open WebUI's table of settings."""

    values = {}

    @classmethod
    async def get_many(cls, *keys):
        return {key: cls.values.get(key) for key in keys}

    @classmethod
    async def upsert(cls, values):
        cls.values.update(values)


async def record(wheel, server, out):
    sys.meta_path.insert(0, Finder(wheel))
    session = aiohttp.ClientSession()

    async def get_session():
        return session

    put("config", CACHE_DIR=Path(tempfile.mkdtemp()), ENABLE_OPENAI_IMAGE_EDIT_NORMALIZATION=True,
        IMAGE_AUTO_SIZE_MODELS_REGEX_PATTERN="^gpt-image", IMAGE_URL_RESPONSE_MODELS_REGEX_PATTERN="^gpt-image")
    put("env", AIOHTTP_CLIENT_SESSION_SSL=False, AIOHTTP_CLIENT_ALLOW_REDIRECTS=False,
        ENABLE_FORWARD_USER_INFO_HEADERS=False)
    put("utils.auth", get_admin_user=lambda: None, get_verified_user=lambda: None)
    put("internal.db", get_async_session=lambda: None)
    put("models.config", Config=Settings)
    put("utils.session_pool", get_session=get_session)
    put("utils.json_codec", JSONCodec=json)
    import open_webui.routers.images as images

    kept = []

    async def keep(request, data, content_type, metadata, user, db=None):
        """What the user would see."""
        kept.append((Image.open(io.BytesIO(data)).size, content_type))
        return None, {}

    images.upload_image = keep
    admin = SimpleNamespace(role="admin", id="1")

    def settings(**values):
        keys = images.IMAGE_CONFIG_KEYS
        Settings.values = {keys[name]: value for name, value in values.items()}

    async def generate(**form):
        await images.image_generations(None, images.CreateImageForm(prompt=PROMPT, **form), user=admin)

    with recording(server) as (url, exchanges):
        automatic = {
            "IMAGE_GENERATION_ENGINE": "automatic1111", "AUTOMATIC1111_BASE_URL": url,
            "AUTOMATIC1111_API_AUTH": "user:sesame", "IMAGE_SIZE": "64x96", "IMAGE_STEPS": 3,
        }
        settings(**automatic)
        form = images.ConnectionVerificationForm(engine="automatic1111", url=url, key="user:sesame")
        assert await images.verify_connection(form, user=admin)
        assert await images.get_models(None, user=admin) == [{"id": "demo", "name": "demo"}]
        await images.set_image_model(None, "demo")
        await generate(n=2, negative_prompt="dogs")
        extra = {"cfg_scale": 5, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}
        settings(**automatic, AUTOMATIC1111_PARAMS=extra)
        await generate(model="demo", size="96x64")
        openai = {
            "IMAGE_GENERATION_ENGINE": "openai", "IMAGES_OPENAI_API_BASE_URL": f"{url}/v1",
            "IMAGES_OPENAI_API_KEY": "sesame", "IMAGE_SIZE": "64x96",
        }
        for model in ["", "demo", "gpt-image-1"]:
            settings(**openai, IMAGE_GENERATION_MODEL=model, IMAGES_OPENAI_API_PARAMS={"steps": 2})
            await generate()
        edits = {
            "IMAGE_EDIT_ENGINE": "openai", "IMAGES_EDIT_OPENAI_API_BASE_URL": f"{url}/v1",
            "IMAGES_EDIT_OPENAI_API_KEY": "sesame",
        }
        file = io.BytesIO()
        Image.new("RGB", (64, 96), "orange").save(file, "PNG")
        picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        settings(**edits, IMAGE_EDIT_MODEL="")
        await images.image_edits(None, images.EditImageForm(prompt=PROMPT, image=picture), user=admin)
        settings(**edits, IMAGE_EDIT_MODEL="gpt-image-1")
        form = images.EditImageForm(prompt=PROMPT, image=[picture], n=1, size="64x96")
        await images.image_edits(None, form, user=admin)
    await session.close()
    assert len(kept) == 8 and all(media_type == "image/png" for _, media_type in kept), kept
    version = next(wheel.glob("open_webui-*.dist-info")).name.removeprefix("open_webui-").removesuffix(".dist-info")
    write(out, f"Open WebUI {version}", f"PyPI open-webui {version}, {ROUTER}", exchanges)


asyncio.run(record(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
