//! Our kernels on CUDA devices: `cuda/*.cu`, compiled to PTX by `build.rs`.
//!
//! Every function answers `None` where there is no kernel for a device, type or shape; the caller
//! then composes the operation from candle's. There are kernels for devices of compute capability
//! 7.5 and above: in f16, from 8.0 on in bf16, and norms in f32 too. Every launch goes to the one
//! stream of its device, and none waits for it.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::backend::BackendStorage as _;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, DevicePtr as _, DeviceRepr, LaunchConfig, PushKernelArg as _, sys,
};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Error, Result, Shape, Storage, StorageRef, Tensor};
use candle_core::{bail, cuda::WrapErr as _};
use half::{bf16, f16};

use super::{Activation, Attention, Geometry, Joined};
use crate::device::Work;

/// A device with one stream of its own.
pub(crate) fn open(number: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(number)?;
    // SAFETY: events order the work of several streams on one tensor, and every tensor stays on
    // the stream of the device that it was made for.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// Bytes that are free on the device.
pub(crate) fn free_bytes(device: &Device) -> Option<u64> {
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    context.mem_get_info().ok().map(|(free, _)| free as u64)
}

/// The device's name.
pub(crate) fn name(device: &Device) -> Option<String> {
    device.as_cuda_device().ok()?.cuda_stream().context().name().ok()
}

/// Launches, operations and bytes of each kind of kernel: for benchmarks, which run alone.
static WORK: [(&str, [AtomicU64; 3]); 4] = [
    ("attention", [const { AtomicU64::new(0) }; 3]),
    ("layout", [const { AtomicU64::new(0) }; 3]),
    ("norm", [const { AtomicU64::new(0) }; 3]),
    ("product", [const { AtomicU64::new(0) }; 3]),
];

/// What was launched since the program began.
pub(crate) fn work() -> Vec<(&'static str, Work)> {
    let read = |counts: &[AtomicU64; 3]| {
        let [launches, flops, bytes] = [0, 1, 2].map(|i| counts[i].load(Ordering::Relaxed));
        Work { launches, flops, bytes }
    };
    WORK.iter().map(|(kind, counts)| (*kind, read(counts))).collect()
}

fn count(source: &Source, work: Work) {
    let kind = WORK.iter().find(|(kind, _)| *kind == source.0);
    if let Some((_, counts)) = kind {
        for (count, more) in counts.iter().zip([work.launches, work.flops, work.bytes]) {
            count.fetch_add(more, Ordering::Relaxed);
        }
    }
}

fn bytes(tensors: &[Option<&Tensor>]) -> u64 {
    let size = |t: &&Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
    tensors.iter().flatten().map(size).sum()
}

/// A file of kernels: its name, and its PTX for 7.5 and for 8.0.
struct Source(&'static str, &'static str, &'static str);

macro_rules! source {
    ($name:literal) => {
        Source(
            $name,
            include_str!(concat!(env!("OUT_DIR"), "/", $name, "_75.ptx")),
            include_str!(concat!(env!("OUT_DIR"), "/", $name, "_80.ptx")),
        )
    };
}

const ATTENTION: Source = source!("attention");
const LAYOUT: Source = source!("layout");
const NORM: Source = source!("norm");
const PRODUCT: Source = source!("product");

fn attribute(device: &CudaDevice, which: sys::CUdevice_attribute) -> Result<i32> {
    device.cuda_stream().context().attribute(which).w()
}

/// 75 for compute capability 7.5.
fn capability(device: &CudaDevice) -> Result<i32> {
    use sys::CUdevice_attribute as A;
    let major = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(10 * major + minor)
}

/// Whether the kernels of the tensor cores know this type on this device.
pub(super) fn has_products(device: &Device, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = device else { return Ok(false) };
    let capability = capability(device)?;
    Ok((dtype == DType::F16 && capability >= 75) || (dtype == DType::BF16 && capability >= 80))
}

/// Whether the kernels that need no tensor cores know this type on this device.
fn has_plain(x: &Tensor, dtype: DType) -> Result<bool> {
    let Device::Cuda(device) = x.device() else { return Ok(false) };
    let single = dtype == DType::F32 && capability(device)? >= 75;
    Ok(x.is_contiguous() && (single || has_products(x.device(), dtype)?))
}

/// A tensor in device memory, held until the launch that reads it has been queued.
struct Operand<'a> {
    _storage: StorageRef<'a>,
    address: u64,
}

impl<'a> Operand<'a> {
    fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(cuda) = &*storage else { bail!("expected a tensor on a CUDA device") };
        let stream = cuda.device().cuda_stream();
        // Dropping the guard at once records nothing: events are off.
        let base = match &cuda.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
            _ => bail!("no kernel for {:?}", tensor.dtype()),
        };
        let bytes = layout.start_offset() * tensor.dtype().size_in_bytes();
        Ok(Self { address: base + bytes as u64, _storage: storage })
    }

    /// As `new`, of a tensor whose elements lie one after another.
    fn dense(tensor: &'a Tensor) -> Result<Self> {
        if !tensor.is_contiguous() {
            bail!("expected a contiguous tensor, got strides {:?}", tensor.stride());
        }
        Self::new(tensor)
    }
}

fn address(operand: Option<&Operand<'_>>) -> u64 {
    operand.map_or(0, |operand| operand.address)
}

/// A new tensor, its contents still undefined, and its address.
fn output(device: &CudaDevice, dtype: DType, shape: impl Into<Shape>) -> Result<(Tensor, u64)> {
    let shape = shape.into();
    let len = shape.elem_count();
    let stream = device.cuda_stream();
    // SAFETY: the kernel that the tensor is made for writes every element.
    let (slice, address) = unsafe {
        match dtype {
            DType::F32 => {
                let slice: CudaSlice<f32> = device.alloc(len)?;
                let address = slice.device_ptr(&stream).0;
                (CudaStorageSlice::F32(slice), address)
            }
            DType::F16 => {
                let slice: CudaSlice<f16> = device.alloc(len)?;
                let address = slice.device_ptr(&stream).0;
                (CudaStorageSlice::F16(slice), address)
            }
            DType::BF16 => {
                let slice: CudaSlice<bf16> = device.alloc(len)?;
                let address = slice.device_ptr(&stream).0;
                (CudaStorageSlice::BF16(slice), address)
            }
            other => bail!("no kernel for {other:?}"),
        }
    };
    let storage = Storage::Cuda(CudaStorage { slice, device: device.clone() });
    Ok((Tensor::from_storage(storage, shape, BackpropOp::none(), false), address))
}

/// Blocks, threads of each, and bytes of shared memory that only the launch knows.
struct Grid {
    blocks: (usize, usize, usize),
    threads: usize,
    shared: usize,
}

/// Queues `name` for the type.
///
/// # Safety
///
/// `problem` must be the kernel's argument, and every address in it of memory as large as it says.
unsafe fn launch<P: DeviceRepr>(
    device: &CudaDevice,
    source: &Source,
    (name, dtype): (&str, DType),
    grid: &Grid,
    problem: &P,
) -> Result<()> {
    let Source(file, old, new) = source;
    let ptx = if capability(device)? >= 80 { new } else { old };
    let name = format!("{name}_{}", dtype.as_str());
    let function = device.get_or_load_custom_func(&name, &format!("sd_{file}"), ptx)?;
    let shared = u32::try_from(grid.shared).map_err(Error::wrap)?;
    if shared > 48 << 10 {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(which, shared as i32).w()?;
    }
    let side = |n: usize| u32::try_from(n).map_err(Error::wrap);
    let (x, y, z) = grid.blocks;
    let config = LaunchConfig {
        grid_dim: (side(x)?, side(y)?, side(z)?),
        block_dim: (side(grid.threads)?, 1, 1),
        shared_mem_bytes: shared,
    };
    let mut builder = function.builder();
    builder.arg(problem);
    // SAFETY: the caller's.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

fn int(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(Error::wrap)
}

impl Joined {
    fn second(&self) -> Result<(Option<Operand<'_>>, usize)> {
        match &self.second {
            Some(second) => Ok((Some(Operand::dense(second)?), second.dim(3)?)),
            None => Ok((None, 0)),
        }
    }
}

/// In step with `GroupNorm` in `norm.cu`.
#[repr(C)]
struct GroupNorm {
    out: u64,
    input: [u64; 2],
    weight: u64,
    bias: u64,
    partial: u64,
    pixels: i32,
    channels: i32,
    c1: i32,
    groups: i32,
    run: i32,
    parts: i32,
    eps: f32,
    silu: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for GroupNorm {}

/// Pixels up to which one block normalises a group of a sample by itself.
const SMALL: usize = 1024;

/// (B, H, W, C) -> (B, H, W, C), `weight` and `bias` (C) f32.
pub(super) fn group_norm(
    x: &Joined,
    (weight, bias): (&Tensor, &Tensor),
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    if !has_plain(&x.first, x.first.dtype())? {
        return Ok(None);
    }
    let (batch, h, w, c1) = x.first.dims4()?;
    let (first, (second, c2)) = (Operand::dense(&x.first)?, x.second()?);
    let (weight, bias) = (Operand::dense(weight)?, Operand::dense(bias)?);
    let (device, dtype) = (x.first.device().as_cuda_device()?, x.first.dtype());
    let (pixels, channels) = (h * w, c1 + c2);
    let parts = if pixels <= SMALL { 0 } else { (pixels / 64).clamp(1, 256) };
    let partial = (parts > 0).then(|| output(device, DType::F32, (batch, parts, groups, 2)));
    let partial = partial.transpose()?;
    let (y, out) = output(device, dtype, (batch, h, w, channels))?;
    let problem = GroupNorm {
        out,
        input: [first.address, address(second.as_ref())],
        weight: weight.address,
        bias: bias.address,
        partial: partial.as_ref().map_or(0, |(_, address)| *address),
        pixels: int(pixels)?,
        channels: int(channels)?,
        c1: int(c1)?,
        groups: int(groups)?,
        run: int(pixels.div_ceil(parts.max(1)))?,
        parts: int(parts)?,
        eps: eps as f32,
        silu: i32::from(silu),
    };
    let threads = 512;
    // SAFETY: the operands have the shapes that the problem says.
    unsafe {
        if parts == 0 {
            let grid = Grid { blocks: (groups, batch, 1), threads, shared: 0 };
            launch(device, &NORM, ("group_norm_small", dtype), &grid, &problem)?;
        } else {
            let blocks = (parts, batch, 1);
            let grid = Grid { blocks, threads, shared: 8 * channels.max(threads) };
            launch(device, &NORM, ("group_norm_sums", dtype), &grid, &problem)?;
            let grid = Grid { blocks, threads, shared: 8 * groups };
            launch(device, &NORM, ("group_norm_apply", dtype), &grid, &problem)?;
        }
    }
    let moved = bytes(&[Some(&x.first), x.second.as_ref(), Some(&y)]);
    let launches = if parts == 0 { 1 } else { 2 };
    count(&NORM, Work { launches, flops: 0, bytes: moved });
    Ok(Some(y))
}

/// In step with `Layout` in `layout.cu`.
#[repr(C)]
struct Layout {
    out: u64,
    input: u64,
    pixels: i32,
    channels: i32,
    count: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Layout {}

/// (B, C, H, W) f32 -> (B, H, W, C)
pub(super) fn channels_last(x: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    if x.dtype() != DType::F32 || !has_plain(x, dtype)? {
        return Ok(None);
    }
    let (batch, channels, h, w) = x.dims4()?;
    let (y, out) = output(x.device().as_cuda_device()?, dtype, (batch, h, w, channels))?;
    turn(("channels_last", dtype), x, (&y, out), (h * w, channels)).map(|()| Some(y))
}

/// (B, H, W, C) -> (B, C, H, W) f32
pub(super) fn channels_first(x: &Tensor) -> Result<Option<Tensor>> {
    if !has_plain(x, x.dtype())? {
        return Ok(None);
    }
    let (batch, h, w, channels) = x.dims4()?;
    let (y, out) = output(x.device().as_cuda_device()?, DType::F32, (batch, channels, h, w))?;
    turn(("channels_first", x.dtype()), x, (&y, out), (h * w, channels)).map(|()| Some(y))
}

fn turn(
    kernel: (&str, DType),
    x: &Tensor,
    (y, out): (&Tensor, u64),
    (pixels, channels): (usize, usize),
) -> Result<()> {
    let (device, elements) = (x.device().as_cuda_device()?, x.elem_count());
    let input = Operand::dense(x)?;
    let problem = Layout {
        out,
        input: input.address,
        pixels: int(pixels)?,
        channels: int(channels)?,
        count: int(elements)?,
    };
    let grid = Grid { blocks: (elements.div_ceil(256), 1, 1), threads: 256, shared: 0 };
    // SAFETY: both tensors have the elements that the problem says.
    unsafe { launch(device, &LAYOUT, kernel, &grid, &problem)? };
    count(&LAYOUT, Work { launches: 1, flops: 0, bytes: bytes(&[Some(x), Some(y)]) });
    Ok(())
}

/// In step with `LayerNorm` in `norm.cu`.
#[repr(C)]
struct LayerNorm {
    out: u64,
    input: u64,
    weight: u64,
    bias: u64,
    rows: i32,
    width: i32,
    eps: f32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for LayerNorm {}

/// (.., C) -> (.., C), `weight` and `bias` (C) f32.
pub(super) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Option<Tensor>> {
    if !has_plain(x, x.dtype())? {
        return Ok(None);
    }
    let (device, width) = (x.device().as_cuda_device()?, weight.elem_count());
    let rows = x.elem_count() / width;
    let (input, weight, bias) = (Operand::new(x)?, Operand::dense(weight)?, Operand::dense(bias)?);
    let (y, out) = output(device, x.dtype(), x.shape())?;
    let problem = LayerNorm {
        out,
        input: input.address,
        weight: weight.address,
        bias: bias.address,
        rows: int(rows)?,
        width: int(width)?,
        eps: eps as f32,
    };
    let grid = Grid { blocks: (rows.div_ceil(4), 1, 1), threads: 128, shared: 0 };
    // SAFETY: the operands have the shapes that the problem says.
    unsafe { launch(device, &NORM, ("layer_norm", x.dtype()), &grid, &problem)? };
    count(&NORM, Work { launches: 1, flops: 0, bytes: bytes(&[Some(x), Some(&y)]) });
    Ok(Some(y))
}

/// In step with `Attention` in `attention.cu`.
#[repr(C)]
struct AttentionProblem {
    qkv: [u64; 3],
    out: u64,
    samples: [i64; 3],
    rows: [i32; 3],
    heads: i32,
    width: i32,
    queries: i32,
    keys: i32,
    scale: f32,
    causal: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for AttentionProblem {}

/// Widths of heads, each for all up to it that are multiples of 8.
const WIDTHS: [usize; 7] = [16, 32, 48, 64, 80, 128, 160];
/// The one width of the kernel that shares a head among warps.
const WIDE: usize = 512;

/// q (B, Lq, C), k and v (B, Lk, C), rows strided or not -> (B, Lq, C)
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    kind: Attention,
) -> Result<Option<Tensor>> {
    let (batch, queries, channels) = q.dims3()?;
    let (keys, width) = (k.dim(1)?, channels / kind.heads);
    let wide = width == WIDE && !kind.causal;
    let known = WIDTHS.into_iter().find(|w| width <= *w).filter(|_| width.is_multiple_of(8));
    let Some(known) = known.or(wide.then_some(WIDE)) else { return Ok(None) };
    if !has_products(q.device(), q.dtype())? {
        return Ok(None);
    }
    let device = q.device().as_cuda_device()?;
    let operands = [Operand::new(q)?, Operand::new(k)?, Operand::new(v)?];
    let (mut samples, mut rows) = ([0; 3], [0; 3]);
    for (i, tensor) in [q, k, v].into_iter().enumerate() {
        let [sample, row, 1] = *tensor.stride() else { return Ok(None) };
        // Rows are read in pieces of 16 bytes.
        let aligned = operands[i].address.is_multiple_of(16);
        if !aligned || !row.is_multiple_of(8) || !sample.is_multiple_of(8) {
            return Ok(None);
        }
        (samples[i], rows[i]) = (i64::try_from(sample).map_err(Error::wrap)?, int(row)?);
    }
    let (y, out) = output(device, q.dtype(), (batch, queries, channels))?;
    let scale = (width as f32).powf(-0.5) * std::f32::consts::LOG2_E;
    let problem = AttentionProblem {
        qkv: [operands[0].address, operands[1].address, operands[2].address],
        out,
        samples,
        rows,
        heads: int(kind.heads)?,
        width: int(width)?,
        queries: int(queries)?,
        keys: int(keys)?,
        scale,
        causal: i32::from(kind.causal),
    };
    let grid = if known == WIDE {
        // Queries, probabilities, values in f16 and maxima in f32, as `attention_wide` lays them.
        let halves = 32 * (WIDE + 8) + 32 * (64 + 8) + 8 * 16 * (WIDE / 8 + 8);
        let shared = 2 * halves + 4 * 8 * 32;
        Grid { blocks: (queries.div_ceil(32), kind.heads, batch), threads: 256, shared }
    } else {
        Grid { blocks: (queries.div_ceil(64), kind.heads, batch), threads: 128, shared: 0 }
    };
    // SAFETY: the operands have the shapes and strides that the problem says.
    unsafe {
        launch(device, &ATTENTION, (&format!("attention_{known}"), q.dtype()), &grid, &problem)?;
    }
    let flops = (4 * batch * queries * keys * channels) as u64;
    let moved = bytes(&[Some(q), Some(k), Some(v), Some(&y)]);
    count(&ATTENTION, Work { launches: 1, flops, bytes: moved });
    Ok(Some(y))
}

/// In step with `Product` in `product.cu`.
#[repr(C)]
struct Product {
    a: [u64; 2],
    weight: u64,
    bias: u64,
    shift: u64,
    residual: u64,
    out: u64,
    m: i32,
    n: i32,
    row: i32,
    picture: [i32; 2],
    c: i32,
    c1: i32,
    sized: [i32; 2],
    output: [i32; 2],
    kernel: i32,
    stride: i32,
    before: i32,
    shift_row: i32,
    activation: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Product {}

/// The right side of a product: the weights of a convolution or a linear layer.
pub(super) struct Filter {
    /// (n, taps * c rounded up to 8)
    weight: Tensor,
    /// (n) f32
    bias: Option<Tensor>,
    inputs: usize,
    /// Whether outputs are value and gate in turn.
    gated: bool,
}

/// What follows a product.
#[derive(Default, Clone, Copy)]
pub(super) struct After<'a> {
    /// (B, n), on every pixel of a sample
    pub(super) shift: Option<&'a Tensor>,
    pub(super) activation: Option<Activation>,
    /// As the output
    pub(super) residual: Option<&'a Tensor>,
    /// No GEGLU, though the filter is made for it.
    pub(super) ungated: bool,
}

/// Where a kernel moves: the size that it sees the picture in, and how.
#[derive(Clone, Copy)]
pub(super) struct Field {
    pub(super) size: (usize, usize),
    pub(super) geometry: Geometry,
}

impl Filter {
    /// From a weight (n, taps, c) and a bias (n), if there is a kernel for the device and type.
    /// With `gated` the first half of n are values and the second their gates: see [`super::Geglu`].
    pub(super) fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        gated: bool,
        device: &Device,
        dtype: DType,
    ) -> Result<Option<Self>> {
        if !has_products(device, dtype)? {
            return Ok(None);
        }
        let (n, taps, inputs) = weight.dims3()?;
        let interleave = |t: &Tensor| -> Result<Tensor> {
            if !gated {
                return Ok(t.clone());
            }
            let rest = t.dims()[1..].to_vec();
            let halves = t.reshape([&[2, n / 2], &rest[..]].concat())?;
            halves.transpose(0, 1)?.contiguous()?.reshape(t.shape())
        };
        let depth = taps * inputs;
        let weight = interleave(&weight.reshape((n, depth))?)?;
        let weight = weight.pad_with_zeros(1, 0, depth.next_multiple_of(8) - depth)?;
        let place = |t: &Tensor, dtype| t.to_dtype(dtype)?.contiguous()?.to_device(device);
        let bias = bias.map(|b| place(&interleave(b)?, DType::F32)).transpose()?;
        Ok(Some(Self { weight: place(&weight, dtype)?, bias, inputs, gated }))
    }

    /// (.., c) -> (.., n); after GEGLU (.., n / 2)
    pub(super) fn linear(&self, x: &Tensor, after: After<'_>) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        shape.pop();
        let rows = shape.iter().product();
        let row = x.contiguous()?.reshape((1, 1, rows, self.inputs))?;
        let field = Field { size: (1, rows), geometry: Geometry::POINT };
        let y = self.convolve(&Joined::one(&row), field, after)?;
        shape.push(y.dim(3)?);
        y.reshape(shape)
    }

    /// (.., c) -> (.., n), what GEGLU would be made of: values, then gates
    pub(super) fn ungated(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.linear(x, After { ungated: true, ..After::default() })?;
        let (mut pairs, n) = (x.dims().to_vec(), self.weight.dim(0)?);
        pairs.pop();
        let rows = pairs.iter().product::<usize>();
        pairs.push(n);
        y.reshape((rows, n / 2, 2))?.transpose(1, 2)?.contiguous()?.reshape(pairs)
    }

    /// (B, H, W, c) -> (B, H', W', n)
    pub(super) fn convolve(
        &self,
        x: &Joined,
        Field { size, geometry }: Field,
        after: After<'_>,
    ) -> Result<Tensor> {
        let (device, dtype) = (x.first.device().as_cuda_device()?, x.first.dtype());
        if dtype != self.weight.dtype() {
            bail!("a product of {:?} was given {dtype:?}", self.weight.dtype());
        }
        let (batch, h, w, c1) = x.first.dims4()?;
        let (first, (second, c2)) = (Operand::dense(&x.first)?, x.second()?);
        if c1 + c2 != self.inputs {
            bail!("a product of {} channels was given {}", self.inputs, c1 + c2);
        }
        let (n, row) = self.weight.dims2()?;
        let (rows, columns) = (geometry.output(size.0), geometry.output(size.1));
        let m = batch * rows * columns;
        let gated = self.gated && !after.ungated;
        let outputs = if gated { n / 2 } else { n };
        let (y, out) = output(device, dtype, (batch, rows, columns, outputs))?;
        let weight = Operand::dense(&self.weight)?;
        let bias = self.bias.as_ref().map(Operand::dense).transpose()?;
        let shift = after.shift.map(Operand::new).transpose()?;
        let shift_row = match after.shift.map(|shift| (shift.dims(), shift.stride())) {
            None => 0,
            Some(([b, c], [row, 1])) if (*b, *c) == (batch, n) => int(*row)?,
            Some(_) => bail!("a shift must be ({batch}, {n}) in dense rows"),
        };
        let residual = after.residual.map(Operand::dense).transpose()?;
        if after.residual.is_some_and(|r| r.elem_count() != y.elem_count()) {
            bail!("a residual must have the output's {} elements", y.elem_count());
        }
        // Names of `Activation` in product.cu.
        let activation = match after.activation {
            _ if gated => 4,
            None => 0,
            Some(Activation::Silu) => 1,
            Some(Activation::Gelu) => 2,
            Some(Activation::QuickGelu) => 3,
        };
        let pair = |(a, b): (usize, usize)| -> Result<[i32; 2]> { Ok([int(a)?, int(b)?]) };
        let problem = Product {
            a: [first.address, address(second.as_ref())],
            weight: weight.address,
            bias: address(bias.as_ref()),
            shift: address(shift.as_ref()),
            residual: address(residual.as_ref()),
            out,
            m: int(m)?,
            n: int(n)?,
            row: int(row)?,
            picture: pair((h, w))?,
            c: int(self.inputs)?,
            c1: int(c1)?,
            sized: pair(size)?,
            output: pair((rows, columns))?,
            kernel: int(geometry.kernel)?,
            stride: int(geometry.stride)?,
            before: int(geometry.before)?,
            shift_row,
            activation,
        };
        // A chunk of 16 bytes lies in one pixel of one picture.
        let aligned = problem.a.iter().all(|address| address.is_multiple_of(16));
        let whole = aligned && c1.is_multiple_of(8) && c2.is_multiple_of(8);
        let (name, tile, threads) = Self::tile(device, (m, n), whole)?;
        // On one axis, columns first: the others end at 65,535, less than a large picture's rows.
        let blocks = (n.div_ceil(tile.1) * m.div_ceil(tile.0), 1, 1);
        let grid = Grid { blocks, threads, shared: 0 };
        // SAFETY: the operands have the shapes that the problem says.
        unsafe { launch(device, &PRODUCT, (name, dtype), &grid, &problem)? };
        let operands = [Some(&x.first), x.second.as_ref(), Some(&self.weight), after.residual];
        let moved = bytes(&operands) + bytes(&[Some(&y)]);
        count(&PRODUCT, Work { launches: 1, flops: (2 * m * n * row) as u64, bytes: moved });
        Ok(y)
    }

    /// The kernel, its tile (rows, columns) and threads: the largest that fills the device.
    fn tile(
        device: &CudaDevice,
        (m, n): (usize, usize),
        whole: bool,
    ) -> Result<(&'static str, (usize, usize), usize)> {
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = attribute(device, which)?.unsigned_abs() as usize;
        let fills = |rows, columns| m.div_ceil(rows) * n.div_ceil(columns) >= processors;
        Ok(if !whole {
            ("product_ragged", (64, 64), 128)
        } else if n.div_ceil(64).is_multiple_of(2) && fills(128, 128) {
            ("product_large", (128, 128), 256)
        } else if fills(128, 64) {
            ("product_middle", (128, 64), 256)
        } else {
            ("product_small", (64, 64), 128)
        })
    }
}

#[cfg(test)]
mod tests;
