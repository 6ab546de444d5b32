//! Xu et al. 2023, "Restart Sampling for Improving Generative Processes": a run that goes back to
//! more noise, with the settings of AUTOMATIC1111's `restart_sampler`.

use super::schedule::Way;
use super::sigmas::{karras, timestep_of};

/// The sigma near which a run goes back, and that near which it goes back to.
const RESTART: (f64, f64) = (0.1, 2.0);

/// The ways of a run whose sigmas, and the end of it, are given; of 20 steps and more those are
/// replaced by Karras' so that the number of steps stays.
pub(super) fn ways(sigmas: &[f64], table: &[f64]) -> Vec<Way> {
    let steps = sigmas.len() - 1;
    let (again, times) = match steps {
        36.. => (steps / 4, 2),
        20.. => (9, 1),
        _ => return chain(sigmas, table).collect(),
    };
    let in_f32 = |sigmas: Vec<f64>| sigmas.into_iter().map(|sigma| f64::from(sigma as f32));
    let mut base: Vec<f64> =
        in_f32(karras(sigmas[0], sigmas[steps - 1], steps - again * times)).collect();
    base.push(0.0);
    let nearest = |to: f64| {
        let distance = |i: &usize| (base[*i] - to).abs();
        (0..base.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or_default()
    };
    let (low, high) = (nearest(RESTART.0), nearest(RESTART.1));
    let mut ways: Vec<Way> = chain(&base[..=low], table).collect();
    if high < low {
        let back: Vec<f64> = in_f32(karras(base[high], base[low], again + 1)).collect();
        let added = (base[high].powi(2) - base[low].powi(2)).sqrt();
        for _ in 0..times {
            let begin = ways.len();
            ways.extend(chain(&back, table));
            ways[begin].raised_by = Some(added);
        }
    }
    ways.extend(chain(&base[low..], table));
    ways
}

/// The ways between sigmas that follow each other.
fn chain<'a>(sigmas: &'a [f64], table: &'a [f64]) -> impl Iterator<Item = Way> + 'a {
    let time = |sigma: f64| if sigma > 0.0 { timestep_of(table, sigma) } else { 0.0 };
    sigmas.windows(2).map(move |pair| Way {
        times: [time(pair[0]), time(pair[1])],
        sigmas: [pair[0], pair[1]],
        raised_by: None,
    })
}
