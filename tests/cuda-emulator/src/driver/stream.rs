//! Streams and events. Work is done when it is queued; what a host waits for is kept as numbers, so
//! that the report says how far it ran ahead of the device.

use std::ffi::{c_int, c_uint, c_void};
use std::time::Instant;

use super::{Handle, INVALID_HANDLE, api, current, out, state};
use crate::memory::{self, INVALID_VALUE};
use crate::{Status, report};

/// How much work was queued on a device up to some time.
#[derive(Clone, Copy, Default)]
pub(super) struct Position {
    launches: u64,
    copies: u64,
}

/// The work of a device as its host sees it.
#[derive(Default)]
pub(super) struct Queue {
    queued: Position,
    /// What the host knows to be done.
    done: Position,
    /// The copy to pageable memory of the host, by its number, that nothing has waited for.
    unread: Option<u64>,
}

impl Queue {
    pub(super) fn push_launch(&mut self) {
        self.queued.launches += 1;
        report::ahead(self.queued.launches - self.done.launches);
        self.read();
    }

    pub(super) fn push_copy(&mut self) {
        self.queued.copies += 1;
        self.read();
    }

    pub(super) fn push_copy_to_host(&mut self) {
        self.push_copy();
        self.unread = Some(self.queued.copies);
    }

    /// More is queued behind a copy, so the host has read it: without waiting, if it did not.
    fn read(&mut self) {
        if self.unread.take().is_some() {
            report::unsynchronized();
        }
    }

    /// The host waits for all work, or for that before an event.
    pub(super) fn wait(&mut self, until: Option<Position>) {
        let until = until.unwrap_or(self.queued);
        self.done.launches = self.done.launches.max(until.launches);
        self.done.copies = self.done.copies.max(until.copies);
        self.unread = self.unread.filter(|copy| *copy > self.done.copies);
    }
}

#[derive(Clone, Copy, Default)]
pub(super) struct Event {
    /// When it was recorded, on which device, behind how much work.
    recorded: Option<(Instant, usize, Position)>,
}

/// The host waits for the stream.
fn synchronize(s: Handle) -> Status {
    let mut st = state();
    let device = st.stream(s)?;
    st.queues[device].wait(None);
    drop(st);
    memory::synchronized(device);
    Ok(())
}

api! { in context;
    fn cuStreamCreate(s: *mut Handle, _flags: c_uint) {
        let mut st = state();
        let h = st.handle();
        st.streams.insert(h, current());
        out(s, h)
    }
    fn cuStreamCreateWithPriority(s: *mut Handle, flags: c_uint, _priority: c_int) {
        // SAFETY: same contract.
        match unsafe { cuStreamCreate(s, flags) } { 0 => Ok(()), e => Err(e) }
    }
    fn cuStreamDestroy_v2(s: Handle) { state().streams.remove(&s).map(|_| ()).ok_or(INVALID_HANDLE) }
    fn cuStreamSynchronize(s: Handle) { synchronize(s) }
    fn cuStreamQuery(s: Handle) { state().stream(s).map(|_| ()) }
    fn cuStreamWaitEvent(s: Handle, event: Handle, _flags: c_uint) {
        let st = state();
        st.stream(s)?;
        if st.events.contains_key(&event) { Ok(()) } else { Err(INVALID_HANDLE) }
    }
    fn cuStreamGetFlags(s: Handle, flags: *mut c_uint) {
        state().stream(s)?;
        out(flags, 1)
    }
    fn cuStreamGetPriority(s: Handle, p: *mut c_int) {
        state().stream(s)?;
        out(p, 0)
    }
    fn cuStreamIsCapturing(s: Handle, status: *mut c_uint) {
        state().stream(s)?;
        out(status, 0)
    }
    fn cuStreamAttachMemAsync(_s: Handle, _p: u64, _n: usize, _flags: c_uint) { Ok(()) }
    fn cuLaunchHostFunc(s: Handle, f: Option<unsafe extern "C" fn(*mut c_void)>, data: *mut c_void) {
        state().stream(s)?;
        // SAFETY: the caller's function with the caller's argument.
        unsafe { f.ok_or(INVALID_VALUE)?(data) };
        Ok(())
    }
    fn cuEventCreate(e: *mut Handle, _flags: c_uint) {
        let mut st = state();
        let h = st.handle();
        st.events.insert(h, Event::default());
        out(e, h)
    }
    fn cuEventDestroy_v2(e: Handle) { state().events.remove(&e).map(|_| ()).ok_or(INVALID_HANDLE) }
    fn cuEventRecord(e: Handle, s: Handle) {
        let mut st = state();
        let device = st.stream(s)?;
        let queued = st.queues[device].queued;
        let event = st.events.get_mut(&e).ok_or(INVALID_HANDLE)?;
        event.recorded = Some((Instant::now(), device, queued));
        Ok(())
    }
    fn cuEventRecordWithFlags(e: Handle, s: Handle, _flags: c_uint) {
        // SAFETY: same contract.
        match unsafe { cuEventRecord(e, s) } { 0 => Ok(()), e => Err(e) }
    }
    fn cuEventQuery(e: Handle) { state().events.get(&e).map(|_| ()).ok_or(INVALID_HANDLE) }
    fn cuEventSynchronize(e: Handle) {
        let mut st = state();
        let event = *st.events.get(&e).ok_or(INVALID_HANDLE)?;
        if let Some((_, device, queued)) = event.recorded {
            st.queues[device].wait(Some(queued));
            drop(st);
            memory::synchronized(device);
        }
        Ok(())
    }
    fn cuEventElapsedTime_v2(ms: *mut f32, start: Handle, end: Handle) {
        let st = state();
        let at = |e| {
            let recorded = st.events.get(&e).and_then(|event| event.recorded);
            recorded.map(|(at, ..)| at).ok_or(INVALID_HANDLE)
        };
        out(ms, at(end)?.saturating_duration_since(at(start)?).as_secs_f32() * 1e3)
    }
    fn cuEventElapsedTime(ms: *mut f32, start: Handle, end: Handle) {
        // SAFETY: same contract.
        match unsafe { cuEventElapsedTime_v2(ms, start, end) } { 0 => Ok(()), e => Err(e) }
    }
}
