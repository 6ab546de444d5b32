//! The device and the number type of a model, as the user names them and as they are resolved.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::error::{Error, Result};
use crate::ops::{has_bf16, open_cuda};

/// A device as the user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// The first CUDA device, if this build and this machine have one; else the CPU, of which a build
    /// with CUDA warns.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its number among the visible ones.
    Cuda(usize),
}

impl DeviceName {
    /// Opens the device.
    pub fn open(self) -> Result<Device> {
        self.choose().map(|(device, _)| device)
    }

    /// Opens the device; with a warning if it is the CPU in a build for GPUs that was left the choice.
    pub(super) fn choose(self) -> Result<(Device, Option<String>)> {
        if self != Self::Auto || !candle_core::utils::cuda_is_available() {
            return Ok((self.named()?, None));
        }
        Ok(match open_cuda(0).map_err(Error::from) {
            Ok(device) => (device, None),
            Err(error) => {
                let warning = format!(
                    "no GPU can be used ({error}): the CPU draws, hundreds of times slower; \
                     --device cuda refuses to start instead"
                );
                (Device::Cpu, Some(warning))
            }
        })
    }

    /// The device of the name; the CPU if it names none.
    fn named(self) -> Result<Device> {
        match self {
            Self::Cpu | Self::Auto => Ok(Device::Cpu),
            Self::Cuda(_) if !candle_core::utils::cuda_is_available() => Err(Error::Spec {
                field: "device",
                reason: "this build has no CUDA; choose cpu, or build with --features cuda".into(),
            }),
            Self::Cuda(number) => Ok(open_cuda(number)?),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("{name:?} is unknown; known are auto, cpu, cuda, cuda:N")),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// The number type in which a model is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f16 on CUDA; on the CPU bf16 where it is faster than f32, which is on AMX, else f32.
    Auto,
    /// Half precision; CUDA only.
    F16,
    /// bfloat16. On the CPU the weights are bf16 and everything else stays f32, except for the
    /// operands of matrix multiplications on AMX.
    Bf16,
    /// Single precision.
    F32,
}

impl Precision {
    /// The type of weights and, on CUDA, of activations.
    pub fn resolve(self, device: &Device) -> Result<DType> {
        match (self, device.is_cpu()) {
            (Self::Auto, true) if has_bf16() => Ok(DType::BF16),
            (Self::Auto, true) | (Self::F32, _) => Ok(DType::F32),
            (Self::Auto | Self::F16, false) => Ok(DType::F16),
            (Self::Bf16, _) => Ok(DType::BF16),
            (Self::F16, true) => Err(Error::Spec {
                field: "dtype",
                reason: "f16 needs a CUDA device; the CPU computes in f32 or bf16".into(),
            }),
        }
    }

    /// Bytes of one weight, on a GPU or on the CPU.
    pub fn weight_bytes(self, gpu: bool) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Auto if gpu || has_bf16() => 2,
            Self::Auto => 4,
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "f16" | "float16" | "fp16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f32" | "float32" | "fp32" => Ok(Self::F32),
            _ => Err(format!("{name:?} is unknown; known are auto, f16, bf16, f32")),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(name.parse::<DeviceName>().map(|d| d.to_string()), Ok(name.to_owned()));
        }
        assert_eq!("CUDA".parse(), Ok(DeviceName::Cuda(0)));
        assert!("gpu".parse::<DeviceName>().is_err());
        for name in ["auto", "f16", "bf16", "f32"] {
            assert_eq!(name.parse::<Precision>().map(|p| p.to_string()), Ok(name.to_owned()));
        }
        assert!(Precision::F16.resolve(&Device::Cpu).is_err());
    }
}
