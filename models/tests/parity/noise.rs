//! Noise against `torch.randn`: equal to a few units in the last place.

use sd_models::sampling::Noise;

use crate::{fixture, floats};

/// In units of the larger of 1 and the value: torch's vectorised logarithm and sine are
/// polynomials, ours are the platform's.
const TOLERANCE: f32 = 1e-6;

fn assert_close(what: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * b.abs().max(1.0), "{what}: value {i}: {a} and {b}");
    }
}

#[test]
fn draws_of_every_size_are_torch_s() {
    for (name, values) in fixture("noise.safetensors") {
        let Some((seed, n)) = name.strip_prefix("single.").and_then(|rest| rest.split_once('.'))
        else {
            continue;
        };
        let n: usize = n.parse().unwrap();
        let mut ours = Noise::new(seed.parse().unwrap()).normal(n);
        assert_eq!(ours.len(), n);
        if n > 65 {
            ours.drain(40..n - 40);
        }
        assert_close(&name, &ours, &floats(&values));
    }
}

#[test]
fn later_draws_continue_the_stream() {
    let all = fixture("noise.safetensors");
    let sizes = all["mixed.sizes"].to_vec1::<i64>().unwrap();
    for (name, values) in &all {
        if let Some(Ok(seed)) = name.strip_prefix("mixed.").map(str::parse) {
            let mut noise = Noise::new(seed);
            let ours: Vec<f32> = sizes.iter().flat_map(|&n| noise.normal(n as usize)).collect();
            assert_close(name, &ours, &floats(values));
        }
    }
}
