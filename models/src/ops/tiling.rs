//! Images whose opposite edges meet: convolutions are padded with the pixels of the other side.
//!
//! As in torch with `padding_mode="circular"`, and in AUTOMATIC1111's "tiling", it is a property of a
//! whole network while it runs, and of no layer: the thread that runs the network knows it. It is one
//! of the UNet and the VAE; ControlNets are no layers of the model there, and run without it.

use std::cell::Cell;

use candle_core::{Result, Tensor};

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
}

/// Runs a network with or without it. Inside, and after it ends, also by a panic, is what was
/// outside: a thread of the pool that waits may run another network meanwhile.
pub(crate) fn tiling<T>(is_on: bool, network: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            IS_ON.set(self.0);
        }
    }
    let _before = Before(IS_ON.replace(is_on));
    network()
}

/// Whether the network that this thread runs has it.
pub(super) fn is_tiling() -> bool {
    IS_ON.get()
}

/// x (B, H, W, C) with so many pixels of the opposite side before and behind its rows and columns.
pub(super) fn wrapped(x: &Tensor, pad: usize) -> Result<Tensor> {
    let mut x = x.clone();
    for dim in [1, 2] {
        let side = x.dim(dim)?;
        let first = side * pad.div_ceil(side) - pad;
        let places: Vec<_> = (0..side + 2 * pad).map(|i| ((first + i) % side) as u32).collect();
        x = x.index_select(&Tensor::new(places, x.device())?, dim)?;
    }
    Ok(x)
}
