//! Samplers on all schedules, with their options, from the begin and from the middle of a run:
//! against diffusers, k-diffusion and torchsde, or the published formula.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use sd_models::sampling::{Noise, Outputs, Run, SamplerState, SchedulerConfig, Span, guide};
use sd_models::{Churn, SamplerName, SamplerOptions};

use crate::{fixture, floats, read, relative_error};

const TOLERANCE: f32 = 3e-5;
/// The times of a Brownian motion have six decimals, so that a sigma of 14.6 in f32 is at another
/// time where torch's logarithm is rounded another way.
const BROWNIAN: (&str, f32) = ("dpmpp_sde", 3e-3);

#[derive(serde::Deserialize)]
struct Fixtures {
    configs: BTreeMap<String, SchedulerConfig>,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    sampler: String,
    schedule: String,
    config: String,
    steps: usize,
    guidance: f64,
    #[serde(default)]
    skipped: usize,
    eta: Option<f64>,
    s_noise: Option<f64>,
    #[serde(default)]
    s_churn: f64,
    #[serde(default)]
    s_tmin: f64,
    s_tmax: Option<f64>,
}

/// What the fixtures' program evaluates in place of a UNet, for the rows without and with a prompt.
fn fake_unet(x: &Tensor, timestep: f64) -> [Tensor; 2] {
    let t = timestep / 1000.0;
    [(0.5, t), (0.4, -t)].map(|(scale, offset)| x.affine(scale, offset).unwrap().tanh().unwrap())
}

/// The error of a run, and the error of its timesteps.
fn run(case: &Case, config: &SchedulerConfig, inputs: &Tensor, times: &[f32]) -> (f32, f32) {
    let SamplerName { sampler, .. } = case.sampler.parse().unwrap();
    let churn =
        Churn { amount: case.s_churn, from: case.s_tmin, to: case.s_tmax.unwrap_or(f64::INFINITY) };
    let options = SamplerOptions { eta: case.eta, s_noise: case.s_noise, churn };
    let (schedule, steps, skipped) = (case.schedule.parse().unwrap(), case.steps, case.skipped);
    let span = Span::default();
    let run = Run { sampler, schedule, options, steps, skipped, share: 1.0, is_xl: false, span };
    let mut state = SamplerState::new(config, run).unwrap();
    let mut noise = Noise::new(7);
    let shape = (1, 4, 2, 2);
    let drawn = Tensor::from_vec(noise.normal(16), shape, &Device::Cpu).unwrap();
    let picture: Vec<f32> = (0..16).map(|i| i as f32 * 4.0 / 15.0 - 2.0).collect();
    let picture = Tensor::from_vec(picture, shape, &Device::Cpu).unwrap();
    let x0 = (skipped > 0).then_some(&picture);
    let mut x = state.begin(x0, &drawn, &mut noise).unwrap();
    let (mut worst, mut late) = (0.0_f32, 0.0_f32);
    let reference = |k: usize| inputs.narrow(0, k, 1).unwrap().reshape(shape).unwrap();
    assert_eq!(state.evaluations(), times.len());
    while let Some(evaluation) = state.next() {
        let done = state.completed();
        let input = (&x * evaluation.input_scale).unwrap();
        worst = worst.max(relative_error(&input, &reference(done)));
        late = late.max((evaluation.timestep as f32 - times[done]).abs());
        // The timestep of the reference, so that errors do not mix.
        let [unguided, conditional] = fake_unet(&input, f64::from(times[done]));
        let guided = match case.guidance {
            1.0 => unguided.clone(),
            scale => guide(&unguided, &conditional, scale * sampler.guidance_share()).unwrap(),
        };
        let outputs = Outputs { guided: &guided, unguided: &unguided };
        x = state.advance(&x, outputs, &mut noise).unwrap();
    }
    (worst.max(relative_error(&x, &reference(times.len()))), late)
}

#[test]
fn every_sampler_on_every_schedule_is_its_reference() {
    let expected = fixture("samplers_2.safetensors");
    let all: Fixtures = serde_json::from_slice(&read("samplers_2.json")).unwrap();
    let (mut failures, mut worst) = (Vec::new(), BTreeMap::<&str, f32>::new());
    for (number, case) in all.cases.iter().enumerate() {
        let inputs = &expected[&format!("{number}.inputs")];
        let times = floats(&expected[&format!("{number}.timesteps")]);
        let (error, late) = run(case, &all.configs[&case.config], inputs, &times);
        let Case { sampler, schedule, config, steps, skipped, .. } = case;
        let most = if sampler == BROWNIAN.0 { BROWNIAN.1 } else { TOLERANCE };
        if error.is_nan() || error > most || late > 0.02 {
            failures.push(format!(
                "{sampler} {schedule} {config} {steps} after {skipped}, eta {:?}, churn {}: \
                 {error:.1e}, timesteps {late:.1e}",
                case.eta, case.s_churn
            ));
        }
        let entry = worst.entry(sampler).or_default();
        *entry = entry.max(error);
    }
    println!("largest relative errors: {worst:#?}");
    assert!(failures.is_empty(), "{} of {}: {failures:#?}", failures.len(), all.cases.len());
}
