//! Operations on halves, computed in f32: one (u16) or two (u32) values a lane.
use super::super::exec::{Cx, Lane};
use super::super::ir::Inst;
use super::super::math::Half;

fn halves<R: Lane, const N: usize>(r: &[R; 32]) -> [u16; N] {
    assert_eq!(size_of::<[R; 32]>(), 2 * N);
    // SAFETY: same size, both plain integers.
    unsafe { std::mem::transmute_copy(r) }
}
fn whole<R: Lane, const N: usize>(h: &[u16; N]) -> [R; 32] {
    assert_eq!(size_of::<[R; 32]>(), 2 * N);
    // SAFETY: as above.
    unsafe { std::mem::transmute_copy(h) }
}
pub(super) fn half1<H: Half, R: Lane, const N: usize>(
    c: &mut Cx<'_>,
    i: &Inst,
    f: impl Fn(f32) -> f32,
) {
    let a = H::widen::<N>(&halves(c.reg::<R>(i.a)));
    c.put(i.d, &whole::<R, N>(&H::narrow(&a.map(f))));
}
pub(super) fn half2<H: Half, R: Lane, const N: usize>(
    c: &mut Cx<'_>,
    i: &Inst,
    f: impl Fn(f32, f32) -> f32,
) {
    let a = H::widen::<N>(&halves(c.reg::<R>(i.a)));
    let b = H::widen::<N>(&halves(c.reg::<R>(i.b)));
    let out: [f32; N] = std::array::from_fn(|l| f(a[l], b[l]));
    c.put(i.d, &whole::<R, N>(&H::narrow(&out)));
}
/// `f` must return a value rounded to odd, so that narrowing rounds once.
pub(super) fn half3<H: Half, R: Lane, const N: usize>(
    c: &mut Cx<'_>,
    i: &Inst,
    f: impl Fn(f32, f32, f32) -> f32,
) {
    let a = H::widen::<N>(&halves(c.reg::<R>(i.a)));
    let b = H::widen::<N>(&halves(c.reg::<R>(i.b)));
    let d = H::widen::<N>(&halves(c.reg::<R>(i.c)));
    let out: [f32; N] = std::array::from_fn(|l| f(a[l], b[l], d[l]));
    c.put(i.d, &whole::<R, N>(&H::narrow(&out)));
}
/// Bit operations on packed halves.
pub(super) fn half_bits<R: Lane, const N: usize>(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u16) -> u16) {
    let a: [u16; N] = halves(c.reg::<R>(i.a));
    c.put(i.d, &whole::<R, N>(&a.map(f)));
}
pub(super) fn half_cmp<H: Half>(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32) -> bool) {
    let (a, b) = (H::widen(c.reg::<u16>(i.a)), H::widen(c.reg::<u16>(i.b)));
    let m = (0..32).fold(0, |m, l| m | u32::from(f(a[l], b[l])) << l);
    c.put_pred(i.d, m);
}
