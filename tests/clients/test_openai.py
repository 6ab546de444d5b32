"""OpenAI's own client before the real server."""

import base64
import io
import time
import urllib.request

import openai
import pytest
from PIL import Image, ImageChops, ImageStat

from server import serving

SMALL = {"size": "64x96", "extra_body": {"steps": 2, "seed": 7}}


@pytest.fixture(scope="module")
def client(server):
    """The client as a person would make it, with the server's address; it tries once."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def opened(b64):
    """The picture in base64."""
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_generate(client):
    reply = client.images.generate(
        model="gpt-image-1",
        prompt="a red house",
        n=2,
        quality="high",
        background="opaque",
        moderation="low",
        user="me",
        size="64x96",
        extra_body={"steps": 2, "seed": 7, "guidance_scale": 3, "negative_prompt": "dogs", "scheduler": "euler_a"},
    )
    assert reply.created > 1_700_000_000
    assert (reply.size, reply.output_format) == ("64x96", "png")
    pictures = [opened(picture.b64_json) for picture in reply.data]
    assert [picture.size for picture in pictures] == [(64, 96)] * 2
    assert [picture.seed for picture in reply.data] == [7, 8]
    assert (reply.usage.input_tokens, reply.usage.input_tokens_details.text_tokens) == (7, 7)
    assert reply.usage.total_tokens == 7 + reply.usage.output_tokens
    text = pictures[1].info["parameters"]
    assert text.startswith("a red house\nNegative prompt: dogs\nSteps: 2, Sampler: Euler a, ")
    assert "CFG scale: 3, Seed: 8, Size: 64x96" in text


def test_a_seed_repeats_the_picture(client):
    first, again = (client.images.generate(prompt="a car", **SMALL).data[0] for _ in range(2))
    assert first.b64_json == again.b64_json


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client, kind):
    reply = client.images.generate(prompt="a car", output_format=kind, **SMALL)
    assert reply.output_format == kind
    assert opened(reply.data[0].b64_json).format == kind.upper()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_compression(client, kind):
    def size(compression):
        reply = client.images.generate(
            prompt="a car", output_format=kind, output_compression=compression, **SMALL
        )
        return len(reply.data[0].b64_json)

    assert size(20) < size(100)


def test_url(client):
    reply = client.images.generate(prompt="a car", response_format="url", **SMALL)
    assert reply.data[0].b64_json is None
    with urllib.request.urlopen(reply.data[0].url, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "image/png"
        assert Image.open(io.BytesIO(answer.read())).size == (64, 96)


def test_stream(client):
    asked = {"prompt": "a red house", "extra_body": {"steps": 150, "seed": 1}}
    with client.images.generate(stream=True, partial_images=2, **asked) as stream:
        events = list(stream)
    *partial, last = events
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert len(partial) == 2
    for event in events:
        kind = "completed" if event is last else "partial_image"
        assert event.type == f"image_generation.{kind}"
        assert (event.size, event.output_format) == ("128x128", "png")
        opened(event.b64_json).load()
    # The tokenizer's, and OpenAI's count of an image of medium quality.
    assert (last.usage.input_tokens, last.usage.output_tokens) == (3, 5 * 4)
    whole = client.images.generate(**asked).data[0]
    assert last.b64_json == whole.b64_json


def file(image):
    """A PNG file with a name, as the client wants it."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return ("picture.png", data.getvalue())


def test_edit(client):
    settings = {"steps": 12, "scheduler": "dpmpp_2m_karras"}
    first = client.images.generate(prompt="a red house by the sea", extra_body=settings | {"seed": 5})
    house = opened(first.data[0].b64_json).convert("RGB")
    mask = Image.new("RGBA", house.size, "black")
    mask.paste((0, 0, 0, 0), (24, 24, 104, 104))
    asked = {"image": file(house), "prompt": "a green tree by the sea", "extra_body": settings | {"seed": 1}}
    edited = opened(client.images.edit(mask=file(mask), **asked).data[0].b64_json).convert("RGB")
    assert edited.size == house.size

    def change(box):
        """How far a part is from what it was, of 255."""
        difference = ImageChops.difference(edited.crop(box), house.crop(box))
        return sum(ImageStat.Stat(difference).mean) / 3

    # The sky and the house, which is a tree now; measured: 2 and 70.
    kept, painted = change((0, 0, 128, 12)), change((40, 72, 88, 104))
    assert kept < 10 and painted > 40
    with client.images.edit(stream=True, **asked) as stream:
        assert [event.type for event in stream] == ["image_edit.completed"]
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.edit(mask=file(house), **asked)
    assert raised.value.param == "mask"


def test_a_stream_that_is_left_is_withdrawn(client, server):
    def cancelled():
        with urllib.request.urlopen(f"{server}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        name = 'sd_images_total{outcome="cancelled"} '
        return sum(int(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = cancelled()
    with client.images.generate(
        prompt="x", stream=True, partial_images=3, size="256x256", extra_body={"steps": 150}
    ) as stream:
        next(iter(stream))
    for _ in range(1200):
        if cancelled() > before:
            return
        time.sleep(0.05)
    pytest.fail("the picture was drawn to its end")


@pytest.mark.parametrize(
    ("error", "status", "param", "asked"),
    [
        (openai.BadRequestError, 400, "size", {"prompt": "x", "size": "large"}),
        (openai.BadRequestError, 400, "quality", {"prompt": "x", "extra_body": {"quality": 5}}),
        (openai.BadRequestError, 400, "size", {"prompt": "x", "size": "100x64"}),
        (openai.BadRequestError, 400, "n", {"prompt": "x", "n": 100}),
        (openai.NotFoundError, 404, "model", {"prompt": "x", "model": "sdxl"}),
    ],
)
def test_errors_are_the_clients_own(client, error, status, param, asked):
    with pytest.raises(error) as raised:
        client.images.generate(**asked)
    assert (raised.value.status_code, raised.value.param) == (status, param)
    assert raised.value.type == "invalid_request_error" and raised.value.code
    assert raised.value.body["message"]


def test_a_full_or_slow_server_is_the_clients_own_error_too(binary, tmp_path):
    with (
        serving(binary, tmp_path / "log", "--max-requests", "1") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none needed", max_retries=0) as client,
    ):
        long = {"size": "256x256", "extra_body": {"steps": 150}}
        with pytest.raises(openai.InternalServerError) as raised:
            client.images.generate(prompt="x", extra_headers={"x-request-timeout-ms": "100"}, **long)
        assert (raised.value.status_code, raised.value.type, raised.value.code) == (504, "server_error", "deadline_exceeded")
        assert raised.value.response.headers["x-should-retry"] == "false"
        with client.images.generate(prompt="x", stream=True, **long):
            with pytest.raises(openai.RateLimitError) as raised:
                client.images.generate(prompt="x", **SMALL)
        assert raised.value.type == "rate_limit_error"
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "sd-server"
    assert client.models.retrieve("dall-e-3").root == "demo"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("owner/name")
    assert raised.value.code == "model_not_found"


def test_keys(locked):
    with openai.OpenAI(base_url=f"{locked}/v1", api_key="open", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
    assert raised.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{locked}/v1", api_key="sesame", max_retries=0) as client:
        assert client.images.generate(prompt="x", **SMALL).data
