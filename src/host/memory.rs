//! Host memory, from `/proc` and cgroups. Nothing here fails: a value that cannot be read is
//! `None`.

use std::fs::read_to_string;

/// Resident memory of this process, in bytes.
pub(crate) fn resident() -> Option<u64> {
    kilobytes(&read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// Memory of the host, in bytes.
pub(crate) fn total() -> Option<u64> {
    kilobytes(&read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Available memory of the host, or of the container if that is less, in bytes.
pub(crate) fn available() -> Option<u64> {
    let host = kilobytes(&read_to_string("/proc/meminfo").ok()?, "MemAvailable:");
    let group = |folder: &str, [limit, used, cache]: [&str; 3]| {
        let read = |name: &str| read_to_string(format!("{folder}/{name}")).ok();
        available_in_group(&read(limit)?, &read(used)?, &read("memory.stat")?, cache)
    };
    let container = group("/sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"])
        .or_else(|| {
            let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
            group("/sys/fs/cgroup/memory", names)
        });
    host.into_iter().chain(container).min()
}

/// Available memory of a control group, from its limit, its usage and its statistics, in bytes. The
/// page cache that is not in use counts as used there, but the kernel frees it on demand: after
/// loading, most of it is the model's files.
fn available_in_group(limit: &str, used: &str, statistics: &str, cache: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let cached = statistics.lines().find_map(|line| number(line.strip_prefix(cache)?));
    let used = number(used)?.saturating_sub(cached.unwrap_or(0));
    Some(number(limit)?.saturating_sub(used))
}

/// The value of a name in a file of `name: value kB` lines, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_takes_memory_and_there_is_some_left() {
        assert!(resident().is_some_and(|bytes| bytes > 1 << 20));
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(kilobytes("A: 1 kB\nB:   23 kB\n", "B:"), Some(23 * 1024));
        assert_eq!(kilobytes("A: x kB", "A:"), None);
    }

    #[test]
    fn page_cache_of_a_container_is_available() {
        let statistics = "anon 300\nfile 600\ninactive_file 500\nactive_file 100\n";
        let available = |limit, used| available_in_group(limit, used, statistics, "inactive_file");
        assert_eq!(available("1000\n", "900\n"), Some(600));
        assert_eq!(available("1000\n", "400\n"), Some(1000), "the two are not read at once");
        assert_eq!(available("max\n", "900\n"), None, "without a limit the host's memory counts");
        assert_eq!(available_in_group("1000", "900", "", "inactive_file"), Some(100));
    }
}
