//! The samplers: one row each, with its names, the function of its step, the layout of its noise
//! levels, and what diffusers' class of it reads in a scheduler configuration.
//!
//! To add a sampler, write its function, its variant and its row. Nothing else in this crate asks
//! which sampler it has.

use super::algorithm::{
    Algorithm, KarrasTimesteps, LevelGrid, Orders, Restricted, Sampler, Stages, StepNoise,
};
use super::betas::Betas;
use super::sigmas::SigmaSchedule;
use super::spacing::Spacing;
use super::state::Advance;
use super::{ddpm, deis, dpmpp, euler, lcm, pndm, unipc};

const THRESHOLDING: &[Restricted] = &[("thresholding", &["false"])];
const SIGMA_RANGE: &[Restricted] = &[("sigma_min", &["null"]), ("sigma_max", &["null"])];
const SOLVER: &[Restricted] =
    &[("use_flow_sigmas", &["null", "false"]), ("use_dynamic_shifting", &["null", "false"])];
const MULTISTEP: &[Restricted] =
    &[("use_lu_lambdas", &["null", "false"]), ("lambda_min_clipped", &["null"])];
/// Values of `solver_type`; diffusers takes those of other classes as the first.
const MIDPOINT: &[&str] = &["midpoint", "logrho", "bh1", "bh2"];
const ODE: Restricted = ("algorithm_type", &["dpmsolver++", "deis"]);
const SDE: Restricted = ("algorithm_type", &["sde-dpmsolver++"]);
const SECOND_ORDER: Restricted = ("solver_order", &["2"]);
const UNIPC: &[Restricted] = &[
    ("predict_x0", &["true"]),
    ("disable_corrector", &["[]"]),
    ("solver_p", &["null"]),
    ("shift_terminal", &["null"]),
];
const BH2: &[&str] = &["bh2", "midpoint", "heun", "logrho"];

/// In the order of the documentation.
pub(super) static ALGORITHMS: [Algorithm; 27] = [
    Algorithm {
        aliases: &["plms"],
        fixed_stride: true,
        repeats_first: true,
        predicts_x0: false,
        set_alpha_to_one: Some(false),
        rescale_betas_zero_snr: false,
        skip_prk_steps: true,
        ..on_timesteps(Sampler::Pndm, ["pndm", "PLMS", "PNDMScheduler"], pndm::pndm)
    },
    Algorithm {
        noise: StepNoise::Ddim,
        eta: Some(0.0),
        fixed_stride: true,
        clip_sample: Some(true),
        set_alpha_to_one: Some(true),
        restricted: &[THRESHOLDING],
        ..on_timesteps(Sampler::Ddim, ["ddim", "DDIM", "DDIMScheduler"], ddpm::ddim)
    },
    Algorithm {
        always_draws: true,
        clip_sample: Some(true),
        restricted: &[
            THRESHOLDING,
            &[("variance_type", &["null", "fixed_small", "fixed_small_log"])],
        ],
        ..on_timesteps(Sampler::Ddpm, ["ddpm", "DDPM", "DDPMScheduler"], ddpm::ddpm)
    },
    Algorithm {
        aliases: &["k_euler"],
        churns: true,
        restricted: &[
            SIGMA_RANGE,
            &[("interpolation_type", &["linear"]), ("timestep_type", &["discrete"])],
        ],
        ..on_sigmas(Sampler::Euler, ["euler", "Euler", "EulerDiscreteScheduler"], euler::euler)
    },
    Algorithm {
        aliases: &["k_euler_a", "k_euler_ancestral", "euler_ancestral"],
        noise: StepNoise::Ancestral,
        eta: Some(1.0),
        s_noise: true,
        predicts_x0: false,
        use_sigmas: false,
        final_sigmas_type: false,
        ..on_sigmas(
            Sampler::EulerAncestral,
            ["euler_a", "Euler a", "EulerAncestralDiscreteScheduler"],
            euler::euler,
        )
    },
    Algorithm {
        aliases: &["k_heun"],
        churns: true,
        stages: Stages::Ends,
        betas: (0.00085, 0.012, Betas::Linear),
        clip_sample: Some(false),
        rescale_betas_zero_snr: false,
        final_sigmas_type: false,
        restricted: &[SIGMA_RANGE],
        ..on_sigmas(Sampler::Heun, ["heun", "Heun", "HeunDiscreteScheduler"], euler::heun)
    },
    Algorithm {
        aliases: &["k_lms"],
        rescale_betas_zero_snr: false,
        final_sigmas_type: false,
        restricted: &[SIGMA_RANGE],
        ..on_sigmas(Sampler::Lms, ["lms", "LMS", "LMSDiscreteScheduler"], euler::lms)
    },
    Algorithm {
        aliases: &["k_dpm_2", "dpm_2"],
        churns: true,
        ..second_order(Sampler::Dpm2, ["dpm2", "DPM2", "KDPM2DiscreteScheduler"], euler::dpm2)
    },
    Algorithm {
        aliases: &["k_dpm_2_a", "k_dpm_2_ancestral", "dpm_2_ancestral"],
        noise: StepNoise::Ancestral,
        eta: Some(1.0),
        s_noise: true,
        ..second_order(
            Sampler::Dpm2Ancestral,
            ["dpm2_a", "DPM2 a", "KDPM2AncestralDiscreteScheduler"],
            euler::dpm2,
        )
    },
    Algorithm {
        aliases: &["k_dpmpp_2m"],
        class_keys: &[ODE, SECOND_ORDER, ("solver_type", MIDPOINT)],
        ..multistep(Sampler::Dpmpp2m, ["dpmpp_2m", "DPM++ 2M"], dpmpp::dpmpp_2m)
    },
    Algorithm {
        class_keys: &[ODE, SECOND_ORDER, ("solver_type", &["heun"])],
        ..multistep(Sampler::Dpmpp2mHeun, ["dpmpp_2m_heun", "DPM++ 2M Heun"], dpmpp::dpmpp_2m_heun)
    },
    Algorithm {
        aliases: &["k_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"],
        class_keys: &[SDE, SECOND_ORDER, ("solver_type", MIDPOINT)],
        automatic: SigmaSchedule::Exponential,
        noise: StepNoise::Sde,
        eta: Some(1.0),
        s_noise: true,
        ..multistep(Sampler::Dpmpp2mSde, ["dpmpp_2m_sde", "DPM++ 2M SDE"], dpmpp::dpmpp_2m)
    },
    Algorithm {
        aliases: &["k_dpmpp_2m_sde_heun"],
        class_keys: &[SDE, SECOND_ORDER, ("solver_type", &["heun"])],
        automatic: SigmaSchedule::Exponential,
        noise: StepNoise::Sde,
        eta: Some(1.0),
        s_noise: true,
        ..multistep(
            Sampler::Dpmpp2mSdeHeun,
            ["dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun"],
            dpmpp::dpmpp_2m_heun,
        )
    },
    Algorithm {
        aliases: &["k_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"],
        class_keys: &[SDE, ("solver_order", &["3"]), ("solver_type", MIDPOINT)],
        automatic: SigmaSchedule::Exponential,
        noise: StepNoise::Sde,
        eta: Some(1.0),
        s_noise: true,
        orders: Orders::Multistep(3),
        ..multistep(Sampler::Dpmpp3mSde, ["dpmpp_3m_sde", "DPM++ 3M SDE"], dpmpp::dpmpp_3m_sde)
    },
    Algorithm {
        class: Some("DPMSolverSinglestepScheduler"),
        class_keys: &[ODE, SECOND_ORDER, ("solver_type", MIDPOINT)],
        orders: Orders::Pairs,
        karras_timesteps: KarrasTimesteps::Rounded,
        fixed_spacing: Some(Spacing::Linspace),
        rescale_betas_zero_snr: false,
        ..multistep(Sampler::Dpmpp2s, ["dpmpp_2s", "DPM++ 2S"], dpmpp::dpmpp_2s)
    },
    Algorithm {
        aliases: &["k_dpmpp_2s_a", "k_dpmpp_2s_ancestral", "dpmpp_2s_ancestral"],
        class: None,
        automatic: SigmaSchedule::Karras,
        stages: Stages::Middle,
        noise: StepNoise::Ancestral,
        eta: Some(1.0),
        s_noise: true,
        ..on_sigmas(
            Sampler::Dpmpp2sAncestral,
            ["dpmpp_2s_a", "DPM++ 2S a", ""],
            dpmpp::dpmpp_2s_ancestral,
        )
    },
    Algorithm {
        aliases: &["k_dpmpp_sde", "dpmpp_sde_gpu"],
        stages: Stages::NoisyMiddle,
        karras_timesteps: KarrasTimesteps::Fractions,
        noise: StepNoise::Ancestral,
        eta: Some(1.0),
        s_noise: true,
        ..second_order(
            Sampler::DpmppSde,
            ["dpmpp_sde", "DPM++ SDE", "DPMSolverSDEScheduler"],
            dpmpp::dpmpp_sde,
        )
    },
    Algorithm {
        class: Some("DEISMultistepScheduler"),
        automatic: SigmaSchedule::Model,
        karras_timesteps: KarrasTimesteps::Rounded,
        rescale_betas_zero_snr: false,
        final_sigmas_type: false,
        ends_at_least: true,
        restricted: &[THRESHOLDING, SIGMA_RANGE, SOLVER, &[("solver_order", &["2"])]],
        ..multistep(Sampler::Deis, ["deis", "DEIS"], deis::deis)
    },
    Algorithm {
        class_keys: &[("solver_order", &["2"]), ("solver_type", BH2)],
        ..unipc(Sampler::UniPc, ["unipc", "UniPC"], 2, unipc::unipc_bh2)
    },
    Algorithm {
        class_keys: &[("solver_order", &["2"]), ("solver_type", &["bh1"])],
        ..unipc(Sampler::UniPcBh1, ["unipc_bh1", "UniPC bh1"], 2, unipc::unipc_bh1)
    },
    Algorithm {
        class_keys: &[("solver_order", &["3"]), ("solver_type", BH2)],
        ..unipc(Sampler::UniPc3, ["unipc_3", "UniPC 3"], 3, unipc::unipc_bh2)
    },
    Algorithm {
        class: None,
        automatic: SigmaSchedule::Karras,
        s_noise: true,
        always_draws: true,
        stages: Stages::Restarting,
        ..on_sigmas(Sampler::Restart, ["restart", "Restart", ""], euler::heun)
    },
    Algorithm {
        class: None,
        needs_unguided: true,
        ..on_sigmas(Sampler::EulerCfgPp, ["euler_cfg_pp", "Euler CFG++", ""], euler::cfg_pp)
    },
    Algorithm {
        class: None,
        automatic: SigmaSchedule::Karras,
        needs_unguided: true,
        orders: Orders::Multistep(2),
        ..on_sigmas(
            Sampler::Dpmpp2mCfgPp,
            ["dpmpp_2m_cfg_pp", "DPM++ 2M CFG++", ""],
            dpmpp::dpmpp_2m_cfg_pp,
        )
    },
    Algorithm {
        class: None,
        noise: StepNoise::Ddim,
        eta: Some(0.0),
        needs_unguided: true,
        // AUTOMATIC1111's: its scales from 0 to 12.5 are those of CFG++ from 0 to 1.
        guidance_share: 1.0 / 12.5,
        fixed_stride: true,
        set_alpha_to_one: Some(true),
        ..on_timesteps(Sampler::DdimCfgPp, ["ddim_cfg_pp", "DDIM CFG++", ""], ddpm::ddim_cfg_pp)
    },
    Algorithm {
        always_draws: true,
        timesteps: Some(lcm::timesteps),
        spacing: Spacing::Linspace,
        betas: (0.00085, 0.012, Betas::ScaledLinear),
        clip_sample: Some(false),
        restricted: &[THRESHOLDING],
        ..on_timesteps(Sampler::Lcm, ["lcm", "LCM", "LCMScheduler"], lcm::lcm)
    },
    Algorithm {
        noise: StepNoise::Tcd,
        eta: Some(0.3),
        timesteps: Some(lcm::timesteps),
        betas: (0.00085, 0.012, Betas::ScaledLinear),
        ..on_timesteps(Sampler::Tcd, ["tcd", "TCD", "TCDScheduler"], ddpm::ddim)
    },
];

/// What the samplers on timesteps have in common; the names as in [`Algorithm`].
const fn on_timesteps(sampler: Sampler, names: [&'static str; 3], advance: Advance) -> Algorithm {
    let [name, title, class] = names;
    Algorithm {
        sampler,
        name,
        title,
        aliases: &[],
        class: Some(class),
        class_keys: &[],
        advance,
        automatic: SigmaSchedule::Model,
        grid: LevelGrid::Timesteps,
        noise: StepNoise::None,
        eta: None,
        s_noise: false,
        churns: false,
        always_draws: false,
        needs_unguided: false,
        guidance_share: 1.0,
        fixed_stride: false,
        repeats_first: false,
        timesteps: None,
        stages: Stages::One,
        orders: Orders::Multistep(1),
        karras_timesteps: KarrasTimesteps::Fractions,
        fixed_spacing: None,
        spacing: Spacing::Leading,
        betas: (0.0001, 0.02, Betas::Linear),
        predicts_x0: true,
        clip_sample: None,
        set_alpha_to_one: None,
        rescale_betas_zero_snr: true,
        use_sigmas: false,
        final_sigmas_type: false,
        ends_at_least: false,
        skip_prk_steps: false,
        restricted: &[],
    }
}

/// What the samplers on sigmas have in common.
const fn on_sigmas(sampler: Sampler, names: [&'static str; 3], advance: Advance) -> Algorithm {
    Algorithm {
        grid: LevelGrid::Sigmas,
        spacing: Spacing::Linspace,
        use_sigmas: true,
        final_sigmas_type: true,
        ..on_timesteps(sampler, names, advance)
    }
}

/// What the samplers with an evaluation in the middle of a step have in common.
const fn second_order(sampler: Sampler, names: [&'static str; 3], advance: Advance) -> Algorithm {
    Algorithm {
        automatic: SigmaSchedule::Karras,
        stages: Stages::Middle,
        karras_timesteps: KarrasTimesteps::Rounded,
        betas: (0.00085, 0.012, Betas::Linear),
        predicts_x0: false,
        rescale_betas_zero_snr: false,
        final_sigmas_type: false,
        restricted: &[SIGMA_RANGE],
        ..on_sigmas(sampler, names, advance)
    }
}

/// What DPM-Solver++ of several orders has in common.
const fn multistep(sampler: Sampler, names: [&'static str; 2], advance: Advance) -> Algorithm {
    let [name, title] = names;
    Algorithm {
        automatic: SigmaSchedule::Karras,
        grid: LevelGrid::ScaledSigmas,
        orders: Orders::Multistep(2),
        karras_timesteps: KarrasTimesteps::TruncatedWithCosine,
        restricted: &[THRESHOLDING, SIGMA_RANGE, SOLVER, MULTISTEP],
        ..on_sigmas(sampler, [name, title, "DPMSolverMultistepScheduler"], advance)
    }
}

/// What UniPC of several orders has in common.
const fn unipc(
    sampler: Sampler,
    names: [&'static str; 2],
    order: usize,
    advance: Advance,
) -> Algorithm {
    let [name, title] = names;
    Algorithm {
        grid: LevelGrid::ScaledSigmas,
        orders: Orders::Falling(order),
        karras_timesteps: KarrasTimesteps::Rounded,
        restricted: &[THRESHOLDING, SIGMA_RANGE, SOLVER, UNIPC],
        ..on_sigmas(sampler, [name, title, "UniPCMultistepScheduler"], advance)
    }
}
