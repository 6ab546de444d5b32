//! The resampler of IP-Adapter Plus: learned queries that attend to the hidden states of a picture
//! and to themselves.
//!
//! Reference: diffusers 0.42 `models/embeddings.py`, `IPAdapterPlusImageProjection`, after Alayrac et
//! al. 2022, "Flamingo".
//!
//! Shapes: L tokens of the image encoder, N queries, E channels of hidden states, H those inside, D
//! those of a prompt.

use candle_core::Tensor;

use crate::error::Result;
use crate::layers::LayerBuilder;
use crate::ops::{Activation, Attention, Epilogue, LayerNorm, Linear, attention};

/// Channels of a head.
const HEAD: usize = 64;

/// The resampler.
pub(super) struct Resampler {
    /// (1, N, H)
    latents: Tensor,
    proj_in: Linear,
    layers: Vec<Layer>,
    proj_out: Linear,
    norm_out: LayerNorm,
}

struct Layer {
    /// Of the picture and of the queries.
    norms: [LayerNorm; 2],
    to_q: Linear,
    to_kv: Linear,
    to_out: Linear,
    ff_norm: LayerNorm,
    ff: [Linear; 2],
    heads: usize,
}

impl Resampler {
    /// (1, L, E) -> (1, N, `width`)
    pub(super) fn load(p: &LayerBuilder<'_>, width: usize) -> Result<Self> {
        let (tokens, hidden) = (p.side("latents", 1), p.side("latents", 2));
        let inputs = p.side("proj_in.weight", 1);
        let layers = (0..).map(|i| p.pp("layers").pp(i)).take_while(|p| p.has("0.to_q.weight"));
        Ok(Self {
            latents: p.placed("latents", &[1, tokens, hidden])?,
            proj_in: p.pp("proj_in").linear(inputs, hidden)?,
            layers: layers.map(|p| Layer::load(&p, hidden)).collect::<Result<_>>()?,
            proj_out: p.pp("proj_out").linear(hidden, width)?,
            norm_out: p.pp("norm_out").layer_norm(width, 1e-5)?,
        })
    }

    /// (1, L, E) -> (1, N, D)
    pub(super) fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let x = self.proj_in.forward(states, Epilogue::NONE)?; // (1, L, H)
        let latents = self.latents.clone();
        let latents = self.layers.iter().try_fold(latents, |y, layer| layer.forward(&x, &y))?;
        Ok(self.norm_out.forward(&self.proj_out.forward(&latents, Epilogue::NONE)?)?)
    }
}

impl Layer {
    fn load(p: &LayerBuilder<'_>, hidden: usize) -> Result<Self> {
        let (attention, ff) = (p.pp(0), p.pp(1));
        let inner = attention.side("to_q.weight", 0);
        let wide = ff.side("1.weight", 0);
        let linear = |p: &LayerBuilder<'_>, name: &str, inputs, outputs| {
            p.linears(&[name], inputs, outputs, false)
        };
        Ok(Self {
            norms: [
                attention.pp("norm1").layer_norm(hidden, 1e-5)?,
                attention.pp("norm2").layer_norm(hidden, 1e-5)?,
            ],
            to_q: linear(&attention, "to_q", hidden, inner)?,
            to_kv: linear(&attention, "to_kv", hidden, 2 * inner)?,
            to_out: linear(&attention, "to_out", inner, hidden)?,
            ff_norm: ff.pp(0).layer_norm(hidden, 1e-5)?,
            ff: [linear(&ff, "1", hidden, wide)?, linear(&ff, "3", wide, hidden)?],
            heads: (inner / HEAD).max(1),
        })
    }

    /// x (1, L, H), queries (1, N, H) -> (1, N, H)
    fn forward(&self, x: &Tensor, queries: &Tensor) -> Result<Tensor> {
        // 1. Attention to the picture and to the queries
        let own = self.norms[1].forward(queries)?;
        let seen = Tensor::cat(&[&self.norms[0].forward(x)?, &own], 1)?; // (1, L + N, H)
        let q = self.to_q.forward(&own, Epilogue::NONE)?;
        let kv = self.to_kv.forward(&seen, Epilogue::NONE)?;
        let inner = q.dim(2)?;
        let kind = Attention { heads: self.heads, causal: false, amx: self.to_out.uses_amx() };
        let y = attention(&q, &kv.narrow(2, 0, inner)?, &kv.narrow(2, inner, inner)?, kind)?;
        let y = self.to_out.forward(&y, Epilogue::residual(queries))?;
        // 2. Feed forward
        let n = self.ff_norm.forward(&y)?;
        let n = self.ff[0].forward(&n, Epilogue::activation(Activation::Gelu))?;
        Ok(self.ff[1].forward(&n, Epilogue::residual(&y))?)
    }
}
