//! Counts of what a program did, written as JSON at exit to the file `EMUCUDA_REPORT` names
//! (`%p` in it stands for the process number).
use crate::memory::{self, Way};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, Once, OnceLock};

#[derive(Default, Clone, Copy)]
pub struct Count {
    pub launches: u64,
    pub lane_instructions: u64,
    pub nanoseconds: u64,
}

#[derive(Default)]
pub struct Stats {
    pub kernels: BTreeMap<String, Count>,
    pub to_device: u64,
    pub to_host: u64,
    pub on_device: u64,
    /// Launches that were queued at the most and that the host did not know to be done.
    pub ahead: u64,
    /// Copies to pageable memory of the host behind which more was queued before the host waited.
    pub unsynchronized: u64,
}

static STATS: Mutex<Stats> = Mutex::new(Stats {
    kernels: BTreeMap::new(),
    to_device: 0,
    to_host: 0,
    on_device: 0,
    ahead: 0,
    unsynchronized: 0,
});

/// `EMUCUDA_DRY`: kernels and matrix products are counted but not run, so that launches and peak
/// memory of a full-size network can be had in seconds.
pub fn dry() -> bool {
    static DRY: OnceLock<bool> = OnceLock::new();
    *DRY.get_or_init(|| std::env::var_os("EMUCUDA_DRY").is_some())
}

pub fn copied(way: Way, bytes: usize) {
    let mut s = STATS.lock().unwrap();
    match way {
        Way::ToDevice => s.to_device += bytes as u64,
        Way::ToHost => s.to_host += bytes as u64,
        Way::OnDevice => s.on_device += bytes as u64,
        Way::Unknown => {}
    }
}

pub fn launched(name: &str, lane_instructions: u64, nanoseconds: u64) {
    let mut s = STATS.lock().unwrap();
    let add = |c: &mut Count| {
        c.launches += 1;
        c.lane_instructions += lane_instructions;
        c.nanoseconds += nanoseconds;
    };
    match s.kernels.get_mut(name) {
        Some(c) => add(c),
        None => add(s.kernels.entry(name.to_string()).or_default()),
    }
}

/// So much was queued that the host does not know to be done.
pub fn ahead(queued: u64) {
    let mut s = STATS.lock().unwrap();
    s.ahead = s.ahead.max(queued);
}

pub fn unsynchronized() {
    STATS.lock().unwrap().unsynchronized += 1;
}

/// The report as JSON.
pub fn json() -> String {
    let s = STATS.lock().unwrap();
    let devices = (0..crate::driver::count()).map(|device| {
        let table = memory::table(device);
        (table.used(), table.pool().released)
    });
    let (used, peak, released) = devices.fold((0, 0, 0), |sum, ((used, peak), released)| {
        (sum.0 + used, sum.1 + peak, sum.2 + released)
    });
    let sum = |f: fn(&Count) -> u64| s.kernels.values().map(f).sum::<u64>();
    let mut out = String::from("{\n");
    let _ = writeln!(out, "  \"launches\": {},", sum(|c| c.launches));
    let _ = writeln!(out, "  \"lane_instructions\": {},", sum(|c| c.lane_instructions));
    let _ = writeln!(out, "  \"emulation_ms\": {},", sum(|c| c.nanoseconds) / 1_000_000);
    let _ = writeln!(
        out,
        "  \"bytes\": {{\"current\": {used}, \"peak\": {peak}, \"released\": {released}}},"
    );
    let _ = writeln!(out, "  \"ahead\": {},", s.ahead);
    let _ = writeln!(
        out,
        "  \"copied\": {{\"host_to_device\": {}, \"device_to_host\": {}, \"device_to_device\": {}, \
         \"unsynchronized\": {}}},",
        s.to_device, s.to_host, s.on_device, s.unsynchronized
    );
    out.push_str("  \"kernels\": {");
    for (k, (name, c)) in s.kernels.iter().enumerate() {
        let _ = write!(
            out,
            "{}\n    \"{name}\": {{\"launches\": {}, \"lane_instructions\": {}, \"emulation_ms\": {:.3}}}",
            if k == 0 { "" } else { "," },
            c.launches,
            c.lane_instructions,
            c.nanoseconds as f64 / 1e6
        );
    }
    out.push_str("\n  }\n}\n");
    out
}

extern "C" fn write_report() {
    if let Ok(path) = std::env::var("EMUCUDA_REPORT") {
        let path = path.replace("%p", &std::process::id().to_string());
        if let Err(e) = std::fs::write(&path, json()) {
            eprintln!("emucuda: cannot write {path}: {e}");
        }
    }
}

/// Arranges for the report to be written when the process exits.
pub fn start() {
    unsafe extern "C" {
        fn atexit(f: extern "C" fn()) -> i32;
    }
    static ONCE: Once = Once::new();
    // SAFETY: `write_report` needs nothing that is gone at exit.
    ONCE.call_once(|| unsafe {
        atexit(write_report);
    });
}
