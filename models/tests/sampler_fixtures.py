"""Runs of samplers x schedules by diffusers, k-diffusion 0.1.1.post1 and torchsde 0.2.6, and where
neither has a sampler or a schedule by its published formula, for tests/parity/schedules.rs. A part
of make_fixtures.py.
"""

import functools
import json
import math
import sys
import types

import diffusers
import numpy
import torch

# k-diffusion's evaluation, which nothing here uses, imports it.
sys.modules.setdefault("clip", types.ModuleType("clip"))
import k_diffusion
from k_diffusion import sampling

# As numpy 2 promotes numbers: diffusers truncates timesteps that depend on it.
if hasattr(numpy, "_set_promotion_state"):
    numpy._set_promotion_state("weak")

from make_fixtures import HERE, V1_4, generator, save

SHAPE = (1, 4, 2, 2)
GUIDANCE = 1.5
CLASSES = {
    "pndm": ("PNDMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    "dpmpp_2m_heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    "dpmpp_2m_sde_heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 7}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_bh1": ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
NEW = ["lms", "dpm2", "dpm2_a", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_sde", "deis",
       "unipc_bh1", "unipc_3", "tcd", "dpmpp_2m_heun", "dpmpp_2m_sde_heun"]
OLD = ["euler", "heun", "dpmpp_2m", "unipc"]
DRAWING = ("ddpm", "dpm2_a", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "lcm", "tcd",
           "ddim")
CONFIGS = {
    "v1-4": V1_4,
    "velocity": {**V1_4, "prediction_type": "v_prediction"},
    "leading": {**V1_4, "timestep_spacing": "leading"},
    "cosine": {**V1_4, "beta_schedule": "squaredcos_cap_v2"},
    "sigma_min": {**V1_4, "final_sigmas_type": "sigma_min"},
}
KEYS = {
    "model": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}


def fake_unet(x, t):
    """What stands for a UNet, without guidance."""
    return torch.tanh(0.5 * x + torch.as_tensor(t, dtype=torch.float32) / 1000)


def fake_conditional(x, t):
    """What stands for the row with the prompt."""
    return torch.tanh(0.4 * x - torch.as_tensor(t, dtype=torch.float32) / 1000)


class Seen:
    """The inputs and timesteps of the UNet, and the latents at the end."""

    def __init__(self):
        self.inputs, self.times = [], []

    def add(self, x, t):
        self.inputs.append(x.clone())
        self.times.append(float(torch.as_tensor(t).flatten()[0]))

    def tensors(self, end):
        assert torch.isfinite(end).all()
        return torch.cat([*self.inputs, end]), torch.tensor(self.times)


def by_diffusers(sampler, schedule, config, steps, skipped=0, eta=None):
    """A run of a class, of text-to-image or from the middle."""
    kind, keys = CLASSES[sampler]
    written = diffusers.PNDMScheduler.from_config(CONFIGS[config]).config
    scheduler = getattr(diffusers, kind).from_config(written, **{**keys, **KEYS[schedule]})
    scheduler.set_timesteps(steps)
    begin = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    stream = generator(7)
    drawn, seen = torch.randn(SHAPE, generator=stream), Seen()
    times = scheduler.timesteps[begin:]
    if skipped:
        x = scheduler.add_noise(picture(), drawn, times[:1])
    else:
        x = drawn * scheduler.init_noise_sigma
    draws = {"generator": stream} if sampler in DRAWING else {}
    if eta is not None:
        draws["eta"] = eta
    for t in times:
        scaled = scheduler.scale_model_input(x, t)
        seen.add(scaled, t)
        x = scheduler.step(fake_unet(scaled, t), t, x, **draws).prev_sample.float()
    return seen.tensors(x)


def picture():
    return torch.linspace(-2, 2, 16).reshape(SHAPE)


class Denoiser(k_diffusion.external.DiscreteEpsDDPMDenoiser):
    """k-diffusion's wrapper of the stand-in, which keeps what it is asked."""

    def __init__(self, config, guided):
        scheduler = diffusers.DDIMScheduler.from_config(CONFIGS[config])
        super().__init__(None, scheduler.alphas_cumprod, quantize=False)
        self.velocity = CONFIGS[config].get("prediction_type") == "v_prediction"
        self.guided, self.seen, self.unguided = guided, Seen(), None

    def forward(self, x, sigma, **_):
        sigma, t = sigma.flatten()[0], self.sigma_to_t(sigma.flatten()[:1])
        scaled = x / (sigma ** 2 + 1) ** 0.5
        self.seen.add(scaled, t)
        output = fake_unet(scaled, t)
        self.unguided = self.denoised(x, sigma, output)
        if self.guided:
            output = output + GUIDANCE * (fake_conditional(scaled, t) - output)
        return self.denoised(x, sigma, output)

    def denoised(self, x, sigma, output):
        if self.velocity:
            return x / (sigma ** 2 + 1) - output * sigma / (sigma ** 2 + 1) ** 0.5
        return x - sigma * output


def sigmas_of(schedule, table, n):
    """The sigmas of a schedule, from the sigmas of the training: the formulas of k-diffusion, of
    ComfyUI's samplers.py and AUTOMATIC1111's sd_schedulers.py, written anew."""
    least, most, last = table[0].item(), table[-1].item(), len(table) - 1
    if schedule == "karras":
        return sampling.get_sigmas_karras(n, least, most)
    if schedule == "exponential":
        return sampling.get_sigmas_exponential(n, least, most)
    if schedule == "polyexponential":
        return sampling.get_sigmas_polyexponential(n, least, most)
    if schedule == "simple":
        picks = [table[last - int(k * (len(table) / n))] for k in range(n)]
    elif schedule == "ddim_uniform":
        picks = list(table[1 :: max(len(table) // n, 1)].flip(0))
    elif schedule == "normal":
        logs, picks = table.log(), []
        for t in torch.linspace(last, 0, n):
            low, part = int(t), float(t) - int(t)
            picks.append(((1 - part) * logs[low] + part * logs[min(low + 1, last)]).exp())
    elif schedule == "kl_optimal":
        ends = math.atan(most), math.atan(least)
        return torch.tensor([math.tan(ends[0] + (ends[1] - ends[0]) * k / n) for k in range(n + 1)])
    elif schedule == "align_your_steps":
        points = torch.tensor(
            [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
        ).log()
        picks = []
        for k in range(n):
            at = k * 10 / (n - 1)
            low = min(int(at), 9)
            picks.append((points[low] + (at - low) * (points[low + 1] - points[low])).exp())
    else:
        raise ValueError(schedule)
    return torch.tensor([float(sigma) for sigma in picks] + [0.0])


def euler_cfg_pp(model, x, sigmas):
    """Chung et al. 2024, algorithm 1 on sigmas."""
    for sigma, after in zip(sigmas[:-1], sigmas[1:]):
        denoised = model(x, sigma)
        x = denoised + (x - model.unguided) / sigma * after
    return x


def dpmpp_2m_cfg_pp(model, x, sigmas):
    """ComfyUI's formula."""
    before = None
    for k, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised, ratio = model(x, sigma), after / sigma
        following = denoised + ratio * (x - model.unguided)
        if before is not None and after > 0:
            relative = (sigmas[k - 1] / sigma).log() / (sigma / after).log()
            following = following + (1 - ratio) / (2 * relative) * (denoised - before)
        x, before = following, model.unguided
    return x


def restart(model, x, sigmas):
    """Xu et al. 2023 with AUTOMATIC1111's settings, of k-diffusion's Heun steps."""
    heun = lambda x, sigmas: sampling.sample_heun(model, x, sigmas, disable=True)
    steps = len(sigmas) - 1
    if steps < 20:
        return heun(x, sigmas)
    again, times = (9, 1) if steps < 36 else (steps // 4, 2)
    base = sampling.get_sigmas_karras(steps - again * times, sigmas[-2].item(), sigmas[0].item())
    low, high = int((base - 0.1).abs().argmin()), int((base - 2).abs().argmin())
    back = sampling.get_sigmas_karras(again + 1, base[low].item(), base[high].item())[:-1]
    x = unhurried(heun, x, base[: low + 1])
    for _ in range(times):
        x = x + torch.randn_like(x) * (base[high] ** 2 - base[low] ** 2) ** 0.5
        x = unhurried(heun, x, back)
    return heun(x, base[low:])


def unhurried(heun, x, sigmas):
    """Steps of Heun that draw nothing: k-diffusion draws noise at each step and drops it."""
    drawn, sampling.torch.randn_like = sampling.torch.randn_like, torch.zeros_like
    try:
        return heun(x, sigmas)
    finally:
        sampling.torch.randn_like = drawn


def by_ddim_cfg_pp(sampler, schedule, config, steps, skipped=0, eta=0.0):
    """AUTOMATIC1111's formula of DDIM CFG++ on the timesteps of DDIMScheduler, in f64."""
    scheduler = diffusers.DDIMScheduler.from_config(CONFIGS[config], **KEYS[schedule])
    scheduler.set_timesteps(steps)
    stream = generator(7)
    x, seen = torch.randn(SHAPE, generator=stream), Seen()
    products, times = scheduler.alphas_cumprod.double(), scheduler.timesteps[skipped:]
    if skipped:
        x = scheduler.add_noise(picture(), x, times[:1])
    velocity = CONFIGS[config].get("prediction_type") == "v_prediction"
    for t in times:
        seen.add(x, t)
        before = t - 1000 // steps
        at, to = products[t], products[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        plain = fake_unet(x, t)
        guided = plain + GUIDANCE / 12.5 * (fake_conditional(x, t) - plain)
        if velocity:
            x0 = at ** 0.5 * x - (1 - at) ** 0.5 * guided
            epsilon = at ** 0.5 * plain + (1 - at) ** 0.5 * x
        else:
            x0, epsilon = (x - (1 - at) ** 0.5 * guided) / at ** 0.5, plain
        sigma = eta * ((1 - to) / (1 - at) * (1 - at / to)) ** 0.5
        x = to ** 0.5 * x0 + (1 - to - sigma ** 2) ** 0.5 * epsilon
        if eta:
            x = x + sigma * torch.randn(SHAPE, generator=stream)
        x = x.float()
    return seen.tensors(x)


FUNCTIONS = {
    "euler": sampling.sample_euler,
    "euler_a": sampling.sample_euler_ancestral,
    "heun": sampling.sample_heun,
    "lms": sampling.sample_lms,
    "dpm2": sampling.sample_dpm_2,
    "dpm2_a": sampling.sample_dpm_2_ancestral,
    "dpmpp_2m": sampling.sample_dpmpp_2m,
    "dpmpp_2m_sde": sampling.sample_dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": functools.partial(sampling.sample_dpmpp_2m_sde, solver_type="heun"),
    "dpmpp_2s_a": sampling.sample_dpmpp_2s_ancestral,
    "dpmpp_sde": sampling.sample_dpmpp_sde,
}
FORMULAS = {"euler_cfg_pp": euler_cfg_pp, "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp, "restart": restart}
# Their latents are scaled to unit variance here.
SCALED = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun")


def by_k_diffusion(sampler, schedule, config, steps, skipped=0, **options):
    """A run of a function of k-diffusion, or of a formula above."""
    model = Denoiser(config, sampler.endswith("cfg_pp"))
    sigmas = sigmas_of(schedule, model.sigmas, steps)[skipped:]
    stream = generator(7)
    drawn = torch.randn(SHAPE, generator=stream)
    if skipped:
        x = picture() + drawn * sigmas[0]
    elif sampler in SCALED:
        x = drawn * (sigmas[0] ** 2 + 1) ** 0.5
    else:
        x = drawn * sigmas[0]
    kept = torch.randn_like
    torch.randn_like = lambda x: torch.randn(x.shape, generator=stream)
    if sampler == "dpmpp_sde":
        least = sigmas[sigmas > 0].min()
        options["noise_sampler"] = sampling.BrownianTreeNoiseSampler(x, least, sigmas.max(), 7)
    elif sampler.startswith("dpmpp_2m_sde"):
        options["noise_sampler"] = lambda *_: torch.randn(SHAPE, generator=stream)
    try:
        if sampler in FORMULAS:
            end = FORMULAS[sampler](model, x, sigmas)
        else:
            end = FUNCTIONS[sampler](model, x, sigmas, disable=True, **options)
    finally:
        torch.randn_like = kept
    if sampler in SCALED:
        end = end / (sigmas[-1] ** 2 + 1) ** 0.5
    return model.seen.tensors(end)


def churn(amount, low=0.0, high=float("inf")):
    return {"s_churn": amount, "s_tmin": low, "s_tmax": high}


def cases():
    """What is run: the function, the sampler, the schedule, the configuration, steps, options."""
    d, k = by_diffusers, by_k_diffusion
    for sampler in NEW:
        for steps in (1, 2, 3, 7, 20):
            yield d, sampler, "model", "v1-4", steps, {}
        if sampler != "unipc_bh1":
            yield d, sampler, "model", "velocity", 7, {}
        yield d, sampler, "model", "v1-4", 10, {"skipped": 3}
    for sampler in OLD + [s for s in NEW if s != "tcd"]:
        for schedule in ("karras", "exponential", "beta"):
            yield d, sampler, schedule, "v1-4", 7, {}
        yield d, sampler, "karras", "v1-4", 3, {}
    for sampler in ["pndm", "ddim", "ddpm"] + OLD + [s for s in NEW if s not in ("tcd", "dpmpp_2s")]:
        yield d, sampler, "sgm_uniform", "v1-4", 7, {}
    for sampler in ["euler", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_sde", "deis", "dpmpp_2m_sde"]:
        yield d, sampler, "model", "leading", 7, {}
        yield d, sampler, "karras", "leading", 7, {}
    for sampler in ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "deis", "unipc"]:
        yield d, sampler, "karras", "cosine", 7, {}
    for sampler in ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "unipc_3"]:
        for steps in (7, 8, 20):
            yield d, sampler, "model", "sigma_min", steps, {}
    for sampler in ["dpmpp_2m_sde", "dpm2_a", "dpmpp_2s", "unipc_3", "deis", "lms"]:
        yield d, sampler, "karras", "v1-4", 20, {"skipped": 9}
    for eta in (0.5, 1.0):
        yield d, "ddim", "model", "v1-4", 7, {"eta": eta}
    yield d, "ddim", "sgm_uniform", "velocity", 4, {"eta": 0.8}
    for eta in (0.0, 1.0):
        yield d, "tcd", "model", "v1-4", 4, {"eta": eta}
    training = ("polyexponential", "simple", "normal", "ddim_uniform", "kl_optimal",
                "align_your_steps")
    for schedule in training:
        for sampler in ("euler", "heun", "euler_a", "dpmpp_2m", "lms", "dpm2"):
            yield k, sampler, schedule, "v1-4", 8, {}
        yield k, "euler", schedule, "v1-4", 11, {}
        yield k, "euler", schedule, "velocity", 20, {"skipped": 7}
    for schedule in ("karras", "exponential"):
        for sampler in ("euler_a", "dpmpp_2s_a"):
            yield k, sampler, schedule, "v1-4", 7, {}
    for sampler in ("dpmpp_2s_a", "dpmpp_sde", "restart", "euler_cfg_pp", "dpmpp_2m_cfg_pp"):
        for steps in (1, 2, 3, 20):
            # One step of Karras' begins at the first timestep in diffusers.
            yield k, sampler, "karras" if steps > 1 else "normal", "v1-4", steps, {}
        yield k, sampler, "karras", "velocity", 7, {}
        # The Brownian motion of a run from the middle is diffusers', over all sigmas.
        if sampler != "dpmpp_sde":
            yield k, sampler, "karras", "v1-4", 7, {"skipped": 2}
    for steps in (1, 2, 7):
        yield by_ddim_cfg_pp, "ddim_cfg_pp", "model", "v1-4", steps, {}
    yield by_ddim_cfg_pp, "ddim_cfg_pp", "model", "velocity", 7, {"eta": 0.5}
    yield by_ddim_cfg_pp, "ddim_cfg_pp", "sgm_uniform", "v1-4", 5, {}
    yield by_ddim_cfg_pp, "ddim_cfg_pp", "model", "v1-4", 7, {"skipped": 3}
    for eta in (0.5, 1.0):
        yield k, "dpmpp_2m_sde_heun", "polyexponential", "v1-4", 7, {"eta": eta}
    yield k, "restart", "karras", "v1-4", 40, {}
    yield k, "restart", "exponential", "v1-4", 30, {"skipped": 6}
    for sampler in ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde"):
        for options in ({"eta": 0.5}, {"eta": 0.0}, {"s_noise": 0.9}):
            yield k, sampler, "polyexponential", "v1-4", 7, options
    for sampler in ("euler", "heun", "dpm2"):
        yield k, sampler, "simple", "v1-4", 7, churn(2.0)
        yield k, sampler, "simple", "v1-4", 7, {**churn(20.0, 0.3, 5.0), "s_noise": 1.01}
        yield k, sampler, "normal", "v1-4", 10, {**churn(1.5), "skipped": 4}


def samplers_2():
    """Runs as above, with what our side needs to repeat them."""
    tensors, listed = {}, []
    for number, (run, sampler, schedule, config, steps, options) in enumerate(cases()):
        if sampler == "unipc_bh1" and config == "v1-4":
            # diffusers multiplies 0 by infinity in its step to sigma 0.
            config = "sigma_min"
        inputs, times = run(sampler, schedule, config, steps, **options)
        tensors[f"{number}.inputs"] = inputs.flatten(1)
        tensors[f"{number}.timesteps"] = times
        options = {key: value for key, value in options.items() if value != float("inf")}
        listed.append({"sampler": sampler, "schedule": schedule, "config": config, "steps": steps,
                       "guidance": GUIDANCE if sampler.endswith("cfg_pp") else 1.0, **options})
    save(tensors, HERE / "samplers_2.safetensors")
    lines = ",\n".join(json.dumps(case) for case in listed)
    text = f'{{"configs": {json.dumps(CONFIGS)},\n"cases": [\n{lines}\n]}}\n'
    (HERE / "samplers_2.json").write_text(text)
