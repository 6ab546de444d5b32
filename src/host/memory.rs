//! Host memory, from `/proc` and cgroups. Nothing here fails: a value that cannot be read is
//! `None`.

use std::fs::read_to_string;

/// Resident memory of this process, in bytes.
pub(crate) fn resident() -> Option<u64> {
    kilobytes(&read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// Available memory of the host, or of the container if that is less, in bytes.
pub(crate) fn available() -> Option<u64> {
    let host = kilobytes(&read_to_string("/proc/meminfo").ok()?, "MemAvailable:");
    let group = |limit: &str, used: &str| {
        let number = |path: &str| read_to_string(path).ok()?.trim().parse::<u64>().ok();
        Some(number(limit)?.saturating_sub(number(used)?))
    };
    let container =
        group("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current").or_else(|| {
            let folder = "/sys/fs/cgroup/memory/memory";
            group(&format!("{folder}.limit_in_bytes"), &format!("{folder}.usage_in_bytes"))
        });
    host.into_iter().chain(container).min()
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
}
