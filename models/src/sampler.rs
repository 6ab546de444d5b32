//! The samplers: what one evaluation of the UNet does to the latents. The loop belongs to the
//! caller: it asks [`Sampler::next`] what to evaluate and gives the output to
//! [`Sampler::advance`], so pictures with different samplers and step counts share a batch.
//!
//! x is a picture x0 under noise: x = alpha x0 + sigma epsilon. The noise levels come from
//! [`crate::schedule`], the reading of the output from [`crate::denoiser`]; here is the step from
//! level to level, a function for each algorithm, in the symbols of its paper.

use candle_core::Tensor;

use crate::denoiser::{Denoiser, combine};
use crate::error::Result;
use crate::noise::Noise;
pub use crate::schedule::Evaluation;
use crate::schedule::{Level, Schedule, SchedulerConfig, Step};
use crate::spec::Scheduler;

/// The sampler of one picture, between two evaluations.
#[derive(Debug, Clone)]
pub struct Sampler {
    scheduler: Scheduler,
    schedule: Schedule,
    denoiser: Denoiser,
    /// What turns a timestep into the time of a consistency model.
    timestep_scaling: f64,
    completed: usize,
    /// What earlier evaluations gave, the newest first: outputs, pictures or slopes.
    history: Vec<Tensor>,
    /// The latents from which the current step began, while it is not complete.
    anchor: Option<Tensor>,
}

impl Sampler {
    /// A sampler that takes `steps` steps, as the model's scheduler configuration has it.
    pub fn new(scheduler: Scheduler, config: &SchedulerConfig, steps: usize) -> Result<Self> {
        Self::after(0, scheduler, config, steps)
    }

    /// A sampler of `steps` steps that leaves out the first ones.
    pub fn after(
        skipped: usize,
        scheduler: Scheduler,
        config: &SchedulerConfig,
        steps: usize,
    ) -> Result<Self> {
        Ok(Self {
            scheduler,
            schedule: Schedule::new(scheduler, config, steps, skipped)?,
            denoiser: Denoiser::new(scheduler, config)?,
            timestep_scaling: config.timestep_scaling.unwrap_or(10.0),
            completed: 0,
            history: Vec::new(),
            anchor: None,
        })
    }

    /// Standard deviation of the first latents.
    pub fn init_noise_sigma(&self) -> f64 {
        self.schedule.init_noise_sigma
    }

    /// How many evaluations the whole run takes.
    pub fn evaluations(&self) -> usize {
        self.schedule.steps.len()
    }

    /// How many evaluations are done.
    pub fn completed(&self) -> usize {
        self.completed
    }

    /// The timesteps of the whole run's evaluations.
    pub(crate) fn timesteps(&self) -> impl Iterator<Item = f64> {
        self.schedule.steps.iter().map(|step| step.evaluation.timestep)
    }

    /// What the UNet is to evaluate; nothing when the latents are finished.
    pub fn next(&self) -> Option<Evaluation> {
        self.schedule.steps.get(self.completed).map(|step| step.evaluation)
    }

    /// The picture x0 that the last evaluation saw in the latents `x` given to it, from its
    /// output after guidance, all (B, C, H, W) in f32. Before the first it is `x` itself.
    pub fn denoised(&self, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let steps = &self.schedule.steps;
        match self.completed {
            0 => Ok(x.clone()),
            1 => self.denoiser.denoised(x, output, steps[0].from),
            // Where the step before led: PNDM takes one step twice from where it began.
            k => self.denoiser.denoised(x, output, steps[k - 2].to),
        }
    }

    /// A picture x0 under as much noise as the latents of the next evaluation hold; x0 itself when
    /// the latents are finished. Both (B, C, H, W).
    pub fn noised(&self, x0: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let Some(step) = self.schedule.steps.get(self.completed) else { return Ok(x0.clone()) };
        // PNDM takes its first step twice: its second evaluation is at the end of the step.
        let again = self.scheduler == Scheduler::Pndm && self.completed == 1;
        let level = if again { step.to } else { step.from };
        combine(&[(level.alpha, x0), (level.sigma, noise)])
    }

    /// The latents after an evaluation, from those before it and the UNet's output after
    /// guidance, all (B, C, H, W) in f32.
    ///
    /// # Panics
    /// When there is nothing left to evaluate.
    pub fn advance(&mut self, x: &Tensor, output: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        let step = self.schedule.steps[self.completed];
        let next = match self.scheduler {
            Scheduler::Pndm => self.pndm(step, x, output)?,
            Scheduler::Ddim => self.ddim(step, x, output)?,
            Scheduler::Ddpm => self.ddpm(step, x, output, noise)?,
            Scheduler::Euler => self.euler(step, x, output)?,
            Scheduler::EulerAncestral => self.euler_ancestral(step, x, output, noise)?,
            Scheduler::Heun => self.heun(step, x, output)?,
            Scheduler::Dpmpp2m | Scheduler::Dpmpp2mKarras => self.dpmpp_2m(step, x, output)?,
            Scheduler::UniPc => self.unipc(step, x, output)?,
            Scheduler::Lcm => self.lcm(step, x, output, noise)?,
        };
        self.completed += 1;
        Ok(next)
    }

    /// Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", algorithm 2
    /// without its Runge-Kutta start: a linear multistep, whose second evaluation takes the
    /// first step again, and the transfer of equation 9.
    fn pndm(&mut self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let (x, output) = match self.anchor.take() {
            Some(start) => (start, combine(&[(0.5, output), (0.5, &self.history[0])])?),
            None => {
                if self.completed == 0 {
                    self.anchor = Some(x.clone());
                }
                self.remember(output.clone(), 4);
                (x.clone(), self.adams_bashforth()?)
            }
        };
        let epsilon = self.denoiser.noise(&x, &output, step.from)?;
        let scale = step.to.alpha / step.from.alpha;
        combine(&[(scale, &x), (step.to.sigma - scale * step.from.sigma, &epsilon)])
    }

    /// Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12 with eta 0.
    fn ddim(&self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        let epsilon = self.denoiser.noise(x, output, step.from)?;
        combine(&[(step.to.alpha, &x0), (step.to.sigma, &epsilon)])
    }

    /// Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7.
    fn ddpm(&self, step: Step, x: &Tensor, output: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        let alpha = step.from.alpha / step.to.alpha;
        let beta = 1.0 - alpha * alpha;
        let (to, from) = (step.to.sigma.powi(2), step.from.sigma.powi(2));
        let mean = combine(&[(step.to.alpha * beta / from, &x0), (alpha * to / from, x)])?;
        if step.evaluation.timestep == 0.0 {
            return Ok(mean);
        }
        let variance = (to / from * beta).max(1e-20);
        combine(&[(1.0, &mean), (variance.sqrt(), &draw(x, noise)?)])
    }

    /// Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    /// algorithm 1 without its second-order correction.
    fn euler(&self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        first_order(x, &x0, step.from, step.to)
    }

    /// Crowson's k-diffusion, `sample_euler_ancestral`: Euler's step to below the next level,
    /// then noise up to it.
    fn euler_ancestral(
        &self,
        step: Step,
        x: &Tensor,
        output: &Tensor,
        noise: &mut Noise,
    ) -> Result<Tensor> {
        let (from, to) = (step.from.sigma, step.to.sigma);
        let up = to * (1.0 - (to / from).powi(2)).sqrt();
        let down = Level { alpha: 1.0, sigma: to * to / from };
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        let below = first_order(x, &x0, step.from, down)?;
        combine(&[(1.0, &below), (up, &draw(x, noise)?)])
    }

    /// Karras et al. 2022, algorithm 1: Euler's step, then the same step with the mean of the
    /// slopes at its ends. The last step, to sigma 0, is Euler's.
    fn heun(&mut self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        let sigma = step.from.sigma;
        let slope = combine(&[(1.0 / sigma, x), (-1.0 / sigma, &x0)])?;
        let Some(start) = self.anchor.take() else {
            self.anchor = Some(x.clone());
            let next = combine(&[(1.0, x), (step.to.sigma - sigma, &slope)]);
            self.remember(slope, 1);
            return next;
        };
        let half = (sigma - self.schedule.steps[self.completed - 1].from.sigma) / 2.0;
        combine(&[(1.0, &start), (half, &self.history[0]), (half, &slope)])
    }

    /// Lu et al. 2022, "DPM-Solver++", algorithm 2.
    fn dpmpp_2m(&mut self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        self.remember(x0, 2);
        first_order(x, &self.extrapolated(step)?, step.from, step.to)
    }

    /// Zhao et al. 2023, "UniPC", algorithms 1 and 2 of second order on the predicted picture:
    /// the corrector UniC takes the step before again with what the UNet says at its end, then
    /// the predictor UniP takes the next one.
    fn unipc(&mut self, step: Step, x: &Tensor, output: &Tensor) -> Result<Tensor> {
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        let x = match self.anchor.take() {
            Some(start) => self.corrected(step, &start, &x0)?,
            None => x.clone(),
        };
        self.remember(x0, 2);
        let next = first_order(&x, &self.extrapolated(step)?, step.from, step.to)?;
        self.anchor = Some(x);
        Ok(next)
    }

    /// UniC with B(h) = e^h - 1: the step that led to `step` once more from `start`, where `x0`
    /// is the picture that the UNet sees at its end.
    fn corrected(&self, step: Step, start: &Tensor, x0: &Tensor) -> Result<Tensor> {
        let before = self.schedule.steps[self.completed - 1];
        let h = step.from.lambda() - before.from.lambda();
        let m0 = &self.history[0];
        let mixed = match self.history.get(1).filter(|_| before.order > 1) {
            None => combine(&[(0.5, m0), (0.5, x0)])?,
            Some(m1) => {
                let earlier = self.schedule.steps[self.completed - 2];
                let r = (earlier.from.lambda() - before.from.lambda()) / h;
                let phi_1 = (-h).exp_m1();
                let phi_2 = phi_1 / -h - 1.0;
                let phi_3 = phi_2 / -h - 0.5;
                let (b_1, b_2) = (phi_2 / phi_1, 2.0 * phi_3 / phi_1);
                let rho_1 = (b_1 - b_2) / (1.0 - r);
                let rho_2 = b_1 - rho_1;
                combine(&[(1.0 - rho_1 / r - rho_2, m0), (rho_1 / r, m1), (rho_2, x0)])?
            }
        };
        first_order(start, &mixed, before.from, step.from)
    }

    /// Luo et al. 2023, "Latent Consistency Models", algorithm 3: the consistency function, then
    /// fresh noise up to the next level.
    fn lcm(&self, step: Step, x: &Tensor, output: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        const SIGMA_DATA: f64 = 0.5;
        let t = step.evaluation.timestep * self.timestep_scaling;
        let norm = t.hypot(SIGMA_DATA);
        let (c_skip, c_out) = ((SIGMA_DATA / norm).powi(2), t / norm);
        let x0 = self.denoiser.denoised(x, output, step.from)?;
        let picture = combine(&[(c_out, &x0), (c_skip, x)])?;
        if self.completed + 1 == self.evaluations() {
            return Ok(picture);
        }
        combine(&[(step.to.alpha, &picture), (step.to.sigma, &draw(x, noise)?)])
    }

    fn remember(&mut self, newest: Tensor, most: usize) {
        self.history.insert(0, newest);
        self.history.truncate(most);
    }

    /// The slope of a step from up to four outputs, with the weights of Adams and Bashforth.
    fn adams_bashforth(&self) -> Result<Tensor> {
        const WEIGHTS: [&[f64]; 4] = [
            &[1.0],
            &[3.0 / 2.0, -1.0 / 2.0],
            &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
            &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
        ];
        let weights = WEIGHTS[self.history.len() - 1].iter().copied();
        combine(&weights.zip(&self.history).collect::<Vec<_>>())
    }

    /// The picture halfway through a step in lambda, on the line through the last two pictures:
    /// D of Lu et al. 2022, algorithm 2, to which UniP-2 comes as well.
    fn extrapolated(&self, step: Step) -> Result<Tensor> {
        let m0 = &self.history[0];
        let Some(m1) = self.history.get(1).filter(|_| step.order > 1) else {
            return Ok(m0.clone());
        };
        let lambda = step.from.lambda();
        let before = lambda - self.schedule.steps[self.completed - 1].from.lambda();
        let half = (step.to.lambda() - lambda) / before / 2.0;
        combine(&[(1.0 + half, m0), (-half, m1)])
    }
}

/// The exact step from level to level while x0 stays what it is: DDIM's (Song et al. 2021,
/// equation 13), Euler's on sigmas, and DPM-Solver++'s of first order.
fn first_order(x: &Tensor, x0: &Tensor, from: Level, to: Level) -> Result<Tensor> {
    let scale = to.sigma / from.sigma;
    combine(&[(scale, x), (to.alpha - from.alpha * scale, x0)])
}

/// Noise of the shape of x: the next values of the picture's stream.
fn draw(x: &Tensor, noise: &mut Noise) -> Result<Tensor> {
    let values = noise.normal(x.elem_count());
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}
