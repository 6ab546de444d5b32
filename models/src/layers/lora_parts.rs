//! The tensors of a LoRA file that are for one weight, as [`super::lora_delta`] computes with them.
//! Shapes are those of any file: they are compared before anything is computed with the tensors.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Result as CandleResult, Tensor};

use super::lora_names::Role;
use super::lora_peft::Setting;
use crate::error::{Error, Result};
use crate::files::{LoraTarget, Weights};

/// Why a file is refused that would take too much memory.
pub(super) const TOO_LARGE: &str = "would take more than the memory for LoRAs (--max-lora-bytes)";

/// The tensors of a file that are for one weight.
pub(super) struct Parts<'a> {
    pub(super) weights: &'a Weights,
    pub(super) target: LoraTarget,
    pub(super) tensors: BTreeMap<Role, String>,
    /// Alpha, where no tensor says it.
    pub(super) setting: Option<Setting>,
    /// Maximum numbers of the change.
    pub(super) room: u64,
    /// The tensors that were asked for.
    pub(super) asked: RefCell<BTreeSet<Role>>,
}

impl Parts<'_> {
    /// (out, in, k, k).
    pub(super) fn shape(&self) -> [usize; 4] {
        let LoraTarget { inputs, outputs, geometry } = self.target;
        let kernel = geometry.map_or(1, |geometry| geometry.kernel);
        [outputs, inputs, kernel, kernel]
    }

    /// Numbers of the weight.
    pub(super) fn size(&self) -> u64 {
        self.count(&self.shape())
    }

    /// Numbers of two factors of this rank.
    pub(super) fn factors(&self, rank: usize) -> u64 {
        let [out, inputs, k, _] = self.shape();
        self.count(&[rank, out + inputs * k * k])
    }

    pub(super) fn count(&self, shape: &[usize]) -> u64 {
        count_of(shape).unwrap_or(u64::MAX)
    }

    /// Refuses a change of more numbers than there is room for.
    pub(super) fn admit(&self, numbers: u64) -> Result<()> {
        if numbers <= self.room {
            return Ok(());
        }
        Err(Error::config(self.weights.file_names(), TOO_LARGE))
    }

    /// Alpha over the rank.
    pub(super) fn scale(&self, rank: usize) -> Result<f64> {
        let rank = rank as f64;
        if self.has(Role::Alpha) {
            return Ok(self.number(Role::Alpha)? / rank);
        }
        Ok(self.setting.map_or(1.0, |setting| setting.scale(rank)))
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.tensors.contains_key(&role)
    }

    pub(super) fn dims(&self, role: Role) -> Result<&[usize]> {
        let shape = self.tensors.get(&role).and_then(|name| self.weights.shape(name));
        let shape = shape.ok_or_else(|| self.missing(role))?;
        self.asked.borrow_mut().insert(role);
        // Of such a shape the other dimensions may be anything.
        if shape.contains(&0) {
            return Err(self.error(role, format!("holds no numbers: its shape is {shape:?}")));
        }
        Ok(shape)
    }

    /// The first dimension.
    pub(super) fn rows(&self, role: Role) -> Result<usize> {
        Ok(self.dims(role)?.first().copied().unwrap_or(1))
    }

    /// Both dimensions of a matrix.
    pub(super) fn matrix(&self, role: Role) -> Result<[usize; 2]> {
        let dims = self.dims(role)?;
        let refuse = |_| self.error(role, format!("expected two dimensions, found {dims:?}"));
        dims.try_into().map_err(refuse)
    }

    /// The only number of a tensor.
    pub(super) fn number(&self, role: Role) -> Result<f64> {
        let dims = self.dims(role)?;
        if count_of(dims) != Some(1) {
            return Err(self.error(role, format!("expected one number, found {dims:?}")));
        }
        let value = self.tensor(role, dims)?.flatten_all()?.squeeze(0)?.to_scalar::<f32>()?;
        Ok(value.into())
    }

    /// A tensor as f32 in this shape, in which it may lack or have dimensions of 1, or have several
    /// as one.
    pub(super) fn tensor(&self, role: Role, shape: &[usize]) -> Result<Tensor> {
        let dims = self.dims(role)?;
        let count = count_of(dims);
        if count.is_none() || count != count_of(shape) || dims.first() != shape.first() {
            let shape = shape.strip_suffix(&[1, 1]).unwrap_or(shape);
            return Err(self.error(role, format!("expected shape {shape:?}, found {dims:?}")));
        }
        let tensor = self.weights.widened(&self.tensors[&role])?.reshape(shape)?;
        match is_finite(&tensor)? {
            true => Ok(tensor),
            false => Err(self.error(role, "holds NaN or infinite numbers".into())),
        }
    }

    pub(super) fn error(&self, role: Role, reason: String) -> Error {
        let any = || self.tensors.values().next().cloned().unwrap_or_default();
        let tensor = self.tensors.get(&role).cloned().unwrap_or_else(any);
        Error::Tensor { file: self.weights.file_names(), tensor, reason }
    }

    pub(super) fn missing(&self, role: Role) -> Error {
        let what = match role {
            Role::Up => "up projection",
            Role::Down => "down projection",
            _ => role.suffix(),
        };
        self.error(role, format!("has no {what} beside it"))
    }
}

/// The numbers of a shape, if they can be counted.
pub(super) fn count_of(shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(1_u64, |count, side| count.checked_mul(*side as u64))
}

/// Whether all numbers of an f32 tensor are finite.
fn is_finite(tensor: &Tensor) -> CandleResult<bool> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| x.is_finite()))
}
