"""Makes fixtures/stable-diffusion-xl.json: configurations and shapes of Stable Diffusion XL base 1.0, and
of a ControlNet for v1.x, without any weights. The tests on CUDA devices count what they take.

    python models/tests/shapes_fixtures.py       # needs torch, diffusers and transformers
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).parent / "fixtures"

UNET = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    sample_size=1024,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    scaling_factor=0.13025,
    force_upcast=False,  # as the files say that are made for f16
)
SECOND = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
FIRST = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
)
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def clip(model, known: dict):
    config = CLIPTextConfig(bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, **known)
    return model(config)


with torch.device("meta"):
    networks = {
        "unet/diffusion_pytorch_model.safetensors": UNet2DConditionModel(**UNET),
        "vae/diffusion_pytorch_model.safetensors": AutoencoderKL(**VAE),
        "text_encoder/model.safetensors": clip(CLIPTextModel, FIRST),
        "text_encoder_2/model.safetensors": clip(CLIPTextModelWithProjection, SECOND),
        "controlnet/diffusion_pytorch_model.safetensors": ControlNetModel(cross_attention_dim=768),
    }

files = {"model_index.json": INDEX, "scheduler/scheduler_config.json": SCHEDULER}
tensors = {}
for name, network in networks.items():
    as_json = getattr(network, "to_json_string", None) or network.config.to_json_string
    files[f"{Path(name).parent}/config.json"] = json.loads(as_json())
    shapes = network.state_dict().items()
    tensors[name] = {tensor: list(value.shape) for tensor, value in shapes}
with open(HERE / "stable-diffusion-xl.json", "w") as file:
    json.dump({"files": files, "tensors": tensors}, file, separators=(",", ":"), sort_keys=True)
    file.write("\n")
