"""Writes tests/fixtures/editing.*: what AUTOMATIC1111's own parser makes of prompts with edits, and
pictures by such prompts, for tests/parity/editing.rs.

    pip install lark==1.1.2
    python editing_fixtures.py modules/prompt_parser.py

The argument is the file of stable-diffusion-webui 1.10, which is not part of this repository. Its
functions say which texts a prompt stands for, and which of them holds at which evaluation; UNet and
samplers are those of diffusers.

Its grammar is ambiguous where loose brackets touch an edit, and its parser takes one meaning by the
hashes of strings. Prompts that have different schedules under different PYTHONHASHSEEDs are refused.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "fixtures"

PROMPTS = [
    # Nothing to edit
    "", "a red house", "a (red:1.3) [house]", "a house BREAK the sea", "((a) [b (c:0.5)])", "a: b", ":", "a:b:3",
    "[a:b]", "[a:b:c]", "[a:0x3]", "[a:b:3 4]", "[a:b:1_0]", "[3]", "[ ]", "(a|b)", "a|b", "a | b [c:d:3]",
    "[a|b:3]", "[a:b|c:3]", "[a|b", "a|b]", "trailing \\", "line\\\nend", "\\[a:b:3\\]", "\\(a\\) \\[b\\|c\\]",
    # Edits
    "a [b:3]", "a [b: 3]", "a [b:3 ] c", "a [b:c:3] d", "a [b : c : 1] d", "a [b::3] c", "[:3]", "[::3]", "[3:4]",
    "[ 3 : 4 ]", "a [b:.5] c", "[a:b:0.25]", "[a:b:0.99]", "[a:b:1.0]", "[a:b:1]", "[a:b:1.5]", "[a:b:2.0]",
    "[a:b:0]", "[a:b:0.0]", "[a:b:-3]", "[a:b:+3]", "[a:b:-0.5]", "[a:b:3.]", "[a:b:1e1]", "[a:b:1.5e-1]",
    "[a:b:12]", "[a:b:15]", "[a:b:100000000000000000000]", "[(a:2):3]", "[(a:2):b:3]", "[a:(b:1.2):3]",
    "(x [a:b:3]:1.2)", "(x [a:b:3])", "[[a:b:3]]", "a [[[b]]:2]", "a[b:[c:d:2]:1]e", "[[a:b:2]:[c:d:7]:5]",
    "[a:[b:[c:d:8]:5]:2]", "[a:b:2][c:d:5]", "[a:b:5] and [c:d:2], [e::7]", "[a\\:b:c:3]", "[a\\]b:3]", "[a\n:b:3]",
    "[\ta:\u00a03\u2003]", "[é:ü:3]", "[a,b c:d, e:4]", "a [{b|d{:.5] c", "a [b:c:3] [d] (e)",
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6][: in "
    "background:0.25] [shoddy:masterful:0.5]",
    # Loose brackets
    "a [unbalanced", "([a:b:3]", "a) [b:c:3]", "a [b [c:d:3]", "[a:b:3] c]", "((a][:b:c [d:3]", "[a (b:c:3] [d:e:4]",
    "[a:b:c:3] [d:e:4]", "(a:b:c) [d:e:4]", "[(a:b:c):d:4]", "[a (b] c) [d:e:3]",
    # Alternation
    "[a|b]", "[a|(b:1.1)]", "[fe|]male", "[fe|||]male", "[|]", "[|b]", "a [ | b] c", "[a|b|c] [d|e]", "[a|[b:c:3]]",
    "[a|b|[c|d]]", "[[a|b]:[c|d|e]:4]", "[a:[b|c]:0.5]", "([a|b]:1.3)", "[[a]|b]", "[a b|c\\|d]", "[a|b] [c:d:3]",
    "[cow|horse] in a [meadow:[desert|sea]:0.4]",
]

# Evaluations of the base pass, and of a hires pass.
COUNTS = [(10, None), (7, None), (1, None), (10, 10), (10, 6), (20, 5)]

JOINED = [
    "a cat", "a cat AND a dog", "a cat :1.2 AND a dog :0.7", "a cat:1.2AND a dog", "a cat AND", "AND", "SAND and BAND",
    "a cat AND a cat", "a AND b:2 AND a AND  b :0.5 ", "a cat :1.2", "a cat : -0.5\nAND a dog :+.5", "16:9", "a:1.5.2",
    "a::2", ":5", "a :1. AND b :.5", "a (cat:1.2) AND [a|b]:0.5", "a:5 AND_b", "a\u00a0:2\u00a0AND b\x1f:3\x1f", "éAND b",
    "a :1e1 AND b :0x1", "[a AND b:3]", "a AND b AND c AND d:0", "a :2 b AND c",
]


def parser(path):
    spec = importlib.util.spec_from_file_location("prompt_parser", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schedules(path):
    """The schedule of each prompt by each pair of counts."""
    schedule = parser(path).get_learned_conditioning_prompt_schedules
    return [[schedule([prompt], *counts)[0] for counts in COUNTS] for prompt in PROMPTS]


def texts(path):
    """Writes editing.json."""
    found = []
    for seed in range(8):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, __file__, path, "--schedules"]
        found.append(json.loads(subprocess.check_output(command, env=environment)))
    rows = []
    for prompt, *of_seeds in zip(PROMPTS, *found):
        assert all(of_seed == of_seeds[0] for of_seed in of_seeds), f"{prompt!r} is ambiguous"
        rows.append({"prompt": prompt, "schedules": of_seeds[0]})
    joined = []
    for prompt in JOINED:
        (indexes,), flat, _ = parser(path).get_multicond_prompt_list(Prompts([prompt]))
        weights = [sum(weight for at, weight in indexes if at == index) for index in range(len(flat))]
        joined.append({"prompt": prompt, "parts": list(zip(flat, weights))})
    lines = lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
    text = f'{{"counts": {json.dumps(COUNTS)},\n"edited": {lines(rows)},\n"joined": {lines(joined)}}}\n'
    (HERE / "editing.json").write_text(text)


class Prompts(list):
    """A list of prompts, as the parser's functions take it."""

    def __init__(self, prompts, **_):
        super().__init__(prompts)


# Pictures: the sampler, steps, prompt, negative prompt and guidance scale of each.
PICTURES = {
    "edited": ("ddim", 6, "a [red:blue:0.5] house", "", 3.0),
    "by step": ("dpmpp_2m", 6, "a [red:blue:2] house [by the sea::4]", "the sea", 3.0),
    "alternating": ("ddim", 6, "a [red|blue|green] house", "[moon|]", 3.0),
    "twice a step": ("heun", 6, "[a red house:the sea:4] at night", "[moon:sun:0.3]", 3.0),
    "joined": ("ddim", 6, "a red house :1.2 AND the sea :0.7 AND night:-0.3", "moon", 3.0),
    "of two lengths": ("euler", 6, "a [red:blue:2] house BREAK the sea AND [night:moon BREAK sun:3]:0.5", "", 3.0),
    "joined without guidance": ("ddim", 6, "a red house AND the sea:0.5", "moon", 1.0),
    "joined below": ("ddim", 6, "a red house AND the sea:0.5", "moon", 0.5),
    "weighed": ("ddim", 6, "a red house :1.5", "", 3.0),
    "loose": ("ddim", 6, "a | [red:blue:0.5] house", "", 3.0),
}


def pictures(path):
    """Writes editing.safetensors."""
    import diffusers
    import make_fixtures as others
    import torch
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    module = parser(path)
    encoder = CLIPTextModel.from_pretrained(HERE / "v1/text_encoder").eval()
    clip = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
    unet = diffusers.UNet2DConditionModel.from_pretrained(HERE / "v1/unet").eval()

    class Model:
        def get_learned_conditioning(self, texts):
            return [others.weighed(*others.windows(text, clip), encoder)[0] for text in texts]

    def conditionings(prompt, negative, *steps):
        """The conditional rows of an evaluation with their weights, and the unconditional row."""
        conditional = module.get_multicond_learned_conditioning(Model(), module.SdConditioning([prompt]), *steps)
        unconditional = module.get_learned_conditioning(Model(), module.SdConditioning([negative]), *steps)

        def at(step):
            (weighed,), rows = module.reconstruct_multicond_batch(conditional, step)
            return rows, [weight for _, weight in weighed], module.reconstruct_cond_batch(unconditional, step)

        return at

    def run(scheduler, timesteps, latents, at, scale, **options):
        """A pass, whose evaluations are counted as by AUTOMATIC1111's denoiser."""
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
        for step, t in enumerate(timesteps):
            rows, weights, unconditional = at(step)
            x = scheduler.scale_model_input(latents, t)
            uncond = unet(x, t, unconditional).sample
            output = uncond.clone()
            for row, weight in zip(rows, weights):
                output += (unet(x, t, row[None]).sample - uncond) * (weight * scale)
            latents = scheduler.step(output, t, latents, **options).prev_sample
        return latents

    evaluations = lambda name, steps: 2 * steps if name == "heun" else steps
    tensors, noise = {}, torch.randn((1, 4, 8, 8), generator=others.generator(11))
    for case, (name, steps, prompt, negative, scale) in PICTURES.items():
        scheduler = others.scheduler_of(name, others.V1_4)
        scheduler.set_timesteps(steps)
        at = conditionings(prompt, negative, evaluations(name, steps))
        tensors[case] = run(scheduler, scheduler.timesteps, noise * scheduler.init_noise_sigma, at, scale)

    def second(case, name, large, taken, at, scale):
        """A hires pass of `taken` of 10 steps."""
        scheduler = others.scheduler_of(name, others.V1_4)
        scheduler.set_timesteps(10)
        timesteps = scheduler.timesteps[(10 - taken) * scheduler.order :]
        drawn = torch.randn(large.shape, generator=others.generator(11))
        tensors[case] = run(scheduler, timesteps, scheduler.add_noise(large, drawn, timesteps[:1]), at, scale)

    large = others.enlarged(tensors["edited"], (96, 80), "Latent", 8)
    at = conditionings("a [red:blue:0.5] house", "", 6, 5)
    second("hires.same", "ddim", large, 5, at, 3.0)
    at = conditionings("the [sea:night:1.4] AND a [red:green:9] moon :0.5", "sun", 6, 5)
    second("hires.own", "euler", large, 5, at, 5.0)

    # A1111's `eta_noise_seed_delta` (its modules/rng.py): behind the first noise, that of another seed.
    at = conditionings("a red house", "", 6)
    for name, options in (("euler_a", {}), ("ddim", {"eta": 1.0})):
        scheduler = others.scheduler_of(name, others.V1_4)
        scheduler.set_timesteps(6)
        options["generator"] = others.generator(11 + 31337)
        latents = noise * scheduler.init_noise_sigma
        tensors[f"delta.{name}"] = run(scheduler, scheduler.timesteps, latents, at, 3.0, **options)

    # Image-to-image, which takes 5 of 10 steps: the prompt's shares are of all.
    kind = diffusers.StableDiffusionImg2ImgPipeline
    pipeline = others.tiny(kind, HERE / "v1/unet", others.scheduler_of("ddim", others.V1_4))
    pipeline.set_progress_bar_config(disable=True)
    picture = others.load_file(HERE / "start.safetensors")["picture"]
    at = conditionings("a [red:blue:0.3] house", "", 10)

    def embeds(step):
        rows, _, unconditional = at(step)
        return torch.cat([unconditional, rows])

    negative, positive = embeds(0).split(1)
    tensors["image"] = pipeline(
        prompt_embeds=positive, negative_prompt_embeds=negative, image=Image.fromarray(picture.numpy()),
        strength=0.5, num_inference_steps=10, guidance_scale=3.0, generator=others.generator(11),
        output_type="latent", callback_on_step_end_tensor_inputs=["prompt_embeds"],
        callback_on_step_end=lambda pipeline, step, t, values: {"prompt_embeds": embeds(step + 1)},
    ).images
    others.save(tensors, HERE / "editing.safetensors")
    (HERE / "editing.safetensors").chmod(0o644)


if __name__ == "__main__":
    if "--schedules" in sys.argv:
        print(json.dumps(schedules(sys.argv[1])))
    else:
        texts(sys.argv[1])
        pictures(sys.argv[1])
