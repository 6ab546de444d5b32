//! What ControlNets add to the skips and the middle of a UNet.

use candle_core::Tensor;

use super::descent::Descended;
use crate::error::Result;
use crate::ops::{add, cat_rows};

/// What ControlNets add to the batch rows of a UNet call. A row that gets nothing is not touched.
#[derive(Debug, Default)]
pub struct Residuals {
    /// For each call of a ControlNet the residuals of its rows: (B', H, W, C) for each skip, in
    /// the order in which the UNet computes them, and for the middle's output. Those of a pooling
    /// net are (B', 1, 1, C).
    pub calls: Vec<Vec<Tensor>>,
    /// For each row of the UNet's batch the calls that it gets something from, in the order in
    /// which that is summed, and its row there.
    pub rows: Vec<Vec<(usize, usize)>>,
}

/// Rows of a batch that follow each other, there and in each of the calls.
struct Run<'a> {
    first: usize,
    rows: usize,
    of: &'a [(usize, usize)],
}

impl Residuals {
    /// Adds them to what a UNet computed on the way down.
    pub(super) fn add_to(&self, descended: &mut Descended) -> Result<()> {
        if self.calls.is_empty() {
            return Ok(());
        }
        let runs = self.runs();
        let Descended { middle, skips } = descended;
        for (k, x) in skips.iter_mut().chain(std::iter::once(middle)).enumerate() {
            *x = self.added(k, x, &runs)?;
        }
        Ok(())
    }

    fn runs(&self) -> Vec<Run<'_>> {
        let mut runs: Vec<Run<'_>> = Vec::new();
        for (row, of) in self.rows.iter().enumerate() {
            let continues = |run: &Run<'_>| {
                let next = |(a, b): (&(usize, usize), &(usize, usize))| {
                    a.0 == b.0 && a.1 + run.rows == b.1
                };
                run.of.len() == of.len() && run.of.iter().zip(of).all(next)
            };
            match runs.last_mut().filter(|run| continues(run)) {
                Some(run) => run.rows += 1,
                None => runs.push(Run { first: row, rows: 1, of }),
            }
        }
        runs
    }

    /// The k-th of them added to x (B, H, W, C).
    fn added(&self, k: usize, x: &Tensor, runs: &[Run<'_>]) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(runs.len());
        for Run { first, rows, of } in runs {
            let own = x.narrow(0, *first, *rows)?;
            let of_call =
                |(call, row): &(usize, usize)| self.calls[*call][k].narrow(0, *row, *rows);
            let Some((one, others)) = of.split_first() else {
                parts.push(own);
                continue;
            };
            let mut sum = of_call(one)?;
            for other in others {
                let other = of_call(other)?;
                // A pooled one has a value for all pixels.
                sum = sum.broadcast_add(&other)?;
            }
            let is_whole = own.dims() == sum.dims();
            parts.push(if is_whole { add(&own, &sum)? } else { own.broadcast_add(&sum)? });
        }
        match &parts[..] {
            [one] => Ok(one.clone()),
            several => Ok(cat_rows(several)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn each_row_gets_its_own_and_a_row_without_stays() {
        let tensor = |values: &[f32]| {
            Tensor::from_slice(values, (values.len(), 1, 1, 1), &Device::Cpu).expect("a tensor")
        };
        let values = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values");
        let residuals = Residuals {
            calls: vec![
                vec![tensor(&[1.0, 2.0, 3.0]), tensor(&[10.0, 20.0, 30.0])],
                vec![tensor(&[100.0]), tensor(&[1000.0])],
            ],
            rows: vec![vec![(0, 0)], vec![(0, 1)], vec![], vec![(1, 0), (0, 2)]],
        };
        assert_eq!(residuals.runs().len(), 3, "the first two rows are one");
        let x = tensor(&[0.0, 0.0, -0.0, 0.0]);
        let mut descended = Descended { middle: x.clone(), skips: vec![x] };
        residuals.add_to(&mut descended).expect("added");
        assert_eq!(values(&descended.skips[0]), [1.0, 2.0, 0.0, 103.0]);
        assert!(values(&descended.skips[0])[2].is_sign_negative(), "it is not touched");
        assert_eq!(values(&descended.middle), [10.0, 20.0, 0.0, 1030.0]);
    }
}
