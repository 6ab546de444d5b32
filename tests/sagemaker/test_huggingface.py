"""Hugging Face's own client before the real server."""

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError


@pytest.fixture
def client(container):
    """The client as a person would make it, with the server's address for a model."""
    return InferenceClient(base_url=f"http://127.0.0.1:{container.port}")


def test_text_to_image(client):
    wanted = {"width": 64, "height": 96, "num_inference_steps": 2, "guidance_scale": 4.0}
    extra = {"negative_prompt": "dogs", "seed": 3, "scheduler": "EulerDiscreteScheduler"}
    picture = client.text_to_image("a red house", **wanted, **extra)
    assert picture.size == (64, 96) and picture.format == "PNG"
    text = picture.info["parameters"]
    assert text.startswith("a red house\nNegative prompt: dogs\nSteps: 2, Sampler: Euler, ")
    assert "CFG scale: 4, Seed: 3, Size: 64x96" in text


def test_errors_reach_the_caller(client):
    with pytest.raises(HfHubHTTPError, match="parameters.width must be a multiple of 8") as error:
        client.text_to_image("a red house", width=100, num_inference_steps=1)
    assert error.value.response.status_code == 422
