//! What a LoRA file adds to one weight, and to its bias, at scale 1: the methods of LoRA, LoCon,
//! LoHa, LoKr, GLoRA, IA3, DoRA and full differences. Not where it is added
//! ([`super::lora_layer`]), nor how its tensors are read ([`super::lora_parts`]).
//!
//! Reference: LyCORIS 4 `functional/` and `modules/`; PEFT 0.21 `tuners/lora/dora.py`. Shapes: `out`
//! and `in` channels of the weight, k its kernel (1 if linear), r a rank.

use candle_core::{Result as CandleResult, Tensor};

use super::lora_names::Role;
use super::lora_parts::{Parts, count_of};
use crate::error::Result;

/// A change of a weight, (out, in, k, k) if it were added to it.
pub(super) enum WeightDelta {
    /// (out, rank) times (rank, in, k, k).
    LowRank { down: Tensor, up: Tensor },
    /// (out, in, k, k).
    Dense(Tensor),
}

/// The change of a weight and of its bias (out).
pub(super) struct Delta {
    pub(super) weight: Option<WeightDelta>,
    pub(super) bias: Option<Tensor>,
    /// Tensors that have no part in it.
    pub(super) unused: Vec<String>,
}

/// How a change of a weight is made up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Lora,
    Loha,
    Lokr,
    Glora,
    Ia3,
    Full,
}

/// The method of a role; none for those beside any method.
fn method(role: Role) -> Option<Method> {
    use Role::*;
    Some(match role {
        Down | Mid | Up | UpBias => Method::Lora,
        HadaW1A | HadaW1B | HadaT1 | HadaW2A | HadaW2B | HadaT2 => Method::Loha,
        LokrW1 | LokrW1A | LokrW1B | LokrW2 | LokrW2A | LokrW2B | LokrT2 => Method::Lokr,
        GloraA1 | GloraA2 | GloraB1 | GloraB2 => Method::Glora,
        Ia3 | OnInput => Method::Ia3,
        Diff => Method::Full,
        Alpha | DoraScale | Magnitude | DiffBias => return None,
    })
}

impl Parts<'_> {
    /// The change of the weight. `base` is the weight as the model has it, (out, in, k, k) f32, for
    /// the methods that change it by itself.
    pub(super) fn delta(&self, base: impl Fn() -> Result<Tensor>) -> Result<Delta> {
        use Role::*;
        let mut methods = self.tensors.keys().filter_map(|role| Some((*role, method(*role)?)));
        let first = methods.next();
        if let Some((role, _)) = methods.find(|(_, other)| Some(*other) != first.map(|(_, m)| m)) {
            return Err(self.error(role, "is beside a tensor of another method".into()));
        }
        let method = first.map(|(_, method)| method);
        let is_dense = matches!(method, Some(Method::Glora | Method::Ia3 | Method::Full));
        if is_dense || self.has(DoraScale) || self.has(Magnitude) {
            self.admit(self.size())?;
        }
        let weight = match method {
            Some(Method::Lora) => Some(self.low_rank()?),
            Some(Method::Loha) => Some(self.hadamard()?),
            Some(Method::Lokr) => Some(self.kronecker()?),
            Some(Method::Glora) => Some(WeightDelta::Dense(self.glora(&base()?)?)),
            Some(Method::Ia3) => Some(WeightDelta::Dense(self.ia3(&base()?)?)),
            Some(Method::Full) => Some(WeightDelta::Dense(self.tensor(Diff, &self.shape())?)),
            None if self.has(DiffBias) => None,
            None => return Err(self.missing(Down)),
        };
        let weight = match weight {
            Some(weight) if self.has(DoraScale) || self.has(Magnitude) => {
                Some(WeightDelta::Dense(self.decomposed(&weight.dense(self)?, &base()?)?))
            }
            weight => weight,
        };
        let out = [self.target.outputs];
        let bias = match (self.has(DiffBias), self.has(UpBias)) {
            (true, _) => Some(self.tensor(DiffBias, &out)?),
            (_, true) => Some((self.tensor(UpBias, &out)? * self.scale(self.rows(Down)?)?)?),
            _ => None,
        };
        // LyCORIS writes an alpha of LoKr also where it is not applied.
        let asked = |role| {
            self.asked.borrow().contains(role) || (*role == Alpha && method == Some(Method::Lokr))
        };
        let unused = self.tensors.iter().filter(|(role, _)| !asked(*role));
        let unused = unused.map(|(_, tensor)| tensor.clone()).collect();
        Ok(Delta { weight, bias, unused })
    }

    /// LoRA and LoCon: alpha / r up down, or with a third factor (r, r, k, k) between them.
    fn low_rank(&self) -> Result<WeightDelta> {
        let [out, inputs, k, _] = self.shape();
        let rank = self.rows(Role::Down)?;
        self.admit(self.factors(rank))?;
        let up = self.tensor(Role::Up, &[out, rank])?;
        let down = if self.has(Role::Mid) {
            // mid over down is one convolution: their product over the rank.
            let mid = self.tensor(Role::Mid, &[rank, rank, k, k])?;
            let down = self.tensor(Role::Down, &[rank, inputs])?;
            let mid = mid.permute((0, 2, 3, 1))?.reshape((rank * k * k, rank))?;
            let down = mid.matmul(&down)?.reshape((rank, k, k, inputs))?;
            down.permute((0, 3, 1, 2))?.contiguous()?
        } else {
            self.tensor(Role::Down, &[rank, inputs, k, k])?
        };
        Ok(WeightDelta::LowRank { down, up: (up * self.scale(rank)?)? })
    }

    /// LoHa: alpha / r (w1a w1b) * (w2a w2b), element by element. As long as it takes fewer
    /// numbers it is kept as the one product that it is, of rank r^2.
    fn hadamard(&self) -> Result<WeightDelta> {
        use Role::*;
        let [out, inputs, k, _] = self.shape();
        let depth = inputs * k * k;
        let rank = self.rows(HadaW1B)?;
        let scale = self.scale(rank)?;
        if self.has(HadaT1) || self.has(HadaT2) {
            self.admit(self.size())?;
            let half = |t, a, b| self.tucker((t, a, b), rank, (out, inputs));
            let product = (half(HadaT1, HadaW1A, HadaW1B)? * half(HadaT2, HadaW2A, HadaW2B)?)?;
            return Ok(WeightDelta::Dense((product * scale)?));
        }
        let second = self.rows(HadaW2B)?;
        let product = rank.saturating_mul(second);
        let short = self.factors(product) < self.size();
        self.admit(self.factors(product).min(self.size()))?;
        let (a1, a2) = (self.tensor(HadaW1A, &[out, rank])?, self.tensor(HadaW2A, &[out, second])?);
        let (b1, b2) =
            (self.tensor(HadaW1B, &[rank, depth])?, self.tensor(HadaW2B, &[second, depth])?);
        if short {
            let up = a1.unsqueeze(2)?.broadcast_mul(&a2.unsqueeze(1)?)?.reshape((out, product))?;
            let down = b1.unsqueeze(1)?.broadcast_mul(&b2.unsqueeze(0)?)?;
            let down = down.reshape((product, inputs, k, k))?;
            return Ok(WeightDelta::LowRank { down, up: (up * scale)? });
        }
        let product = ((a1.matmul(&b1)? * a2.matmul(&b2)?)? * scale)?;
        Ok(WeightDelta::Dense(product.reshape((out, inputs, k, k))?))
    }

    /// LoKr: the Kronecker product of w1 (a, b) and w2 (out / a, in / b, k, k), each of which may be
    /// stored as a product. Where w2 is one, so is the whole.
    fn kronecker(&self) -> Result<WeightDelta> {
        use Role::*;
        let [out, inputs, k, _] = self.shape();
        // The shape of w1, and its rank if it is stored as a product.
        let (first, [a, b], rank) = if self.has(LokrW1) {
            (LokrW1, self.matrix(LokrW1)?, None)
        } else {
            let ([a, rank], [rows, b]) = (self.matrix(LokrW1A)?, self.matrix(LokrW1B)?);
            if rows != rank {
                let reason = format!("expected shape [{rank}, {b}], found [{rows}, {b}]");
                return Err(self.error(LokrW1B, reason));
            }
            (LokrW1A, [a, b], Some(rank))
        };
        if out % a != 0 || inputs % b != 0 {
            let reason = format!("{a} x {b} does not divide a weight of {out} x {inputs}");
            return Err(self.error(first, reason));
        }
        let w1 = || match rank {
            None => self.tensor(LokrW1, &[a, b]),
            Some(rank) => {
                let (left, right) = (self.tensor(LokrW1A, &[a, rank])?, [rank, b]);
                Ok(left.matmul(&self.tensor(LokrW1B, &right)?)?)
            }
        };
        let (c, d) = (out / a, inputs / b);
        if self.has(LokrW2) {
            self.admit(self.size())?;
            let w2 = self.tensor(LokrW2, &[c, d, k, k])?;
            // Only PEFT scales two whole factors.
            let whole = || match self.setting.filter(|_| !self.has(Alpha)) {
                Some(setting) => setting.scale(setting.rank),
                None => 1.0,
            };
            let scale = rank.map_or_else(|| Ok(whole()), |rank| self.scale(rank))?;
            return Ok(WeightDelta::Dense((kron(&w1()?, &w2)? * scale)?));
        }
        let rank = self.rows(LokrW2B)?;
        let scale = self.scale(rank)?;
        if self.has(LokrT2) {
            self.admit(self.size())?;
            let w2 = self.tucker((LokrT2, LokrW2A, LokrW2B), rank, (c, d))?;
            return Ok(WeightDelta::Dense((kron(&w1()?, &w2)? * scale)?));
        }
        let product = rank.saturating_mul(a.min(b));
        let short = self.factors(product) < self.size();
        self.admit(self.factors(product).min(self.size()))?;
        let w1 = w1()?;
        let w2a = self.tensor(LokrW2A, &[c, rank])?;
        let w2b = self.tensor(LokrW2B, &[rank, d, k, k])?;
        if short {
            let square = |n| Tensor::eye(n, w1.dtype(), w1.device());
            let w2a = w2a.reshape((c, rank, 1, 1))?;
            let (up, down) = if a < b {
                (kron(&square(a)?, &w2a)?, kron(&w1, &w2b)?)
            } else {
                (kron(&w1, &w2a)?, kron(&square(b)?, &w2b)?)
            };
            let up = up.reshape((out, product))?;
            return Ok(WeightDelta::LowRank { down, up: (up * scale)? });
        }
        let w2 = w2a.matmul(&w2b.reshape((rank, d * k * k))?)?.reshape((c, d, k, k))?;
        Ok(WeightDelta::Dense((kron(&w1, &w2)? * scale)?))
    }

    /// GLoRA: alpha / r (W a1 a2 + b1 b2). Older files call the outer factor the second.
    fn glora(&self, base: &Tensor) -> Result<Tensor> {
        use Role::*;
        let [out, inputs, k, _] = self.shape();
        let old = self.dims(GloraA1)?.first() != Some(&inputs);
        let (a1, a2, b1, b2) = match old {
            true => (GloraA2, GloraA1, GloraB2, GloraB1),
            false => (GloraA1, GloraA2, GloraB1, GloraB2),
        };
        let (rank, second) = (self.rows(a2)?, self.rows(b2)?);
        let a = self.tensor(a1, &[inputs, rank])?.matmul(&self.tensor(a2, &[rank, inputs])?)?;
        let rows = base.permute((0, 2, 3, 1))?.reshape((out * k * k, inputs))?;
        let changed = rows.matmul(&a)?.reshape((out, k, k, inputs))?.permute((0, 3, 1, 2))?;
        let b2 = self.tensor(b2, &[second, inputs * k * k])?;
        let added = self.tensor(b1, &[out, second])?.matmul(&b2)?.reshape((out, inputs, k, k))?;
        Ok(((changed + added)? * self.scale(rank)?)?)
    }

    /// IA3: W times a number for each of its outputs or of its inputs.
    fn ia3(&self, base: &Tensor) -> Result<Tensor> {
        let [out, inputs, ..] = self.shape();
        let on_input = self.number(Role::OnInput)? != 0.0;
        let (count, shape) =
            if on_input { (inputs, (1, inputs, 1, 1)) } else { (out, (out, 1, 1, 1)) };
        let dims = self.dims(Role::Ia3)?.to_vec();
        if count_of(&dims) != Some(count as u64) {
            return Err(self.error(Role::Ia3, format!("expected {count} numbers, found {dims:?}")));
        }
        Ok(base.broadcast_mul(&self.tensor(Role::Ia3, &dims)?.reshape(shape)?)?)
    }

    /// DoRA: m (W + d) / |W + d| - W, the norm over each output, or in older files over each input.
    fn decomposed(&self, delta: &Tensor, base: &Tensor) -> Result<Tensor> {
        let [out, inputs, ..] = self.shape();
        let role = if self.has(Role::DoraScale) { Role::DoraScale } else { Role::Magnitude };
        let dims = self.dims(role)?.to_vec();
        // Only LyCORIS' older files have (1, in, ..).
        let by_output = role == Role::Magnitude || dims.first() == Some(&out);
        let (wanted, shape) =
            if by_output { (out, (out, 1, 1, 1)) } else { (inputs, (1, inputs, 1, 1)) };
        if count_of(&dims) != Some(wanted as u64) {
            return Err(self.error(role, format!("expected {wanted} numbers, found {dims:?}")));
        }
        let magnitude = self.tensor(role, &dims)?.reshape(shape)?;
        let merged = (base + delta)?;
        let squares = merged.sqr()?.sum_keepdim((2, 3))?;
        let norm = squares.sum_keepdim(if by_output { 1 } else { 0 })?.sqrt()?;
        let norm = (norm + f64::from(f32::EPSILON))?;
        Ok((merged.broadcast_mul(&(magnitude / norm)?)? - base)?)
    }

    /// A product of three factors: t (r, r, k, k), a (r, rows), b (r, columns) -> (rows, columns,
    /// k, k).
    fn tucker(
        &self,
        (t, a, b): (Role, Role, Role),
        rank: usize,
        (rows, columns): (usize, usize),
    ) -> Result<Tensor> {
        let k = self.shape()[2];
        self.admit(self.count(&[rank, k, k, columns]))?;
        let t = self.tensor(t, &[rank, rank, k, k])?;
        let t = t.permute((0, 2, 3, 1))?.reshape((rank * k * k, rank))?;
        let tb = t.matmul(&self.tensor(b, &[rank, columns])?)?;
        let tb = tb.reshape((rank, k * k * columns))?;
        let product = self.tensor(a, &[rank, rows])?.t()?.matmul(&tb)?;
        Ok(product.reshape((rows, k, k, columns))?.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

impl WeightDelta {
    /// (out, in, k, k).
    fn dense(&self, parts: &Parts<'_>) -> Result<Tensor> {
        let shape @ [_, inputs, k, _] = parts.shape();
        match self {
            Self::Dense(delta) => Ok(delta.clone()),
            Self::LowRank { down, up } => {
                let down = down.reshape((up.dim(1)?, inputs * k * k))?;
                Ok(up.matmul(&down)?.reshape(&shape[..])?)
            }
        }
    }
}

/// The Kronecker product of (a, b) and (c, d, k, k): (a c, b d, k, k).
fn kron(x: &Tensor, y: &Tensor) -> CandleResult<Tensor> {
    let ((a, b), (c, d, k, _)) = (x.dims2()?, y.dims4()?);
    let product = x.reshape((a, 1, b, 1))?.broadcast_mul(&y.reshape((1, c, 1, d * k * k))?)?;
    product.reshape((a * c, b * d, k, k))
}
