//! How many threads a process should compute with.

use std::collections::HashSet;
use std::fs;

/// One thread for each core that the process may use: what its affinity and its control group's quota allow, and of the threads that
/// share a core only one, since they share its vector units too and would only take turns. Slow cores beside fast ones count: work is
/// handed out in small pieces, so they take as many as they can.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let siblings = |cpu: usize| {
        fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok()
    };
    list.and_then(|list| cores(list.trim(), siblings)).map_or(allowed, |cores| cores.min(allowed))
}

/// Cores that have one of the processors in a list such as "0-3,8", when `siblings` tells the processors of a processor's core; nothing
/// when some answer is missing.
fn cores(list: &str, siblings: impl Fn(usize) -> Option<String>) -> Option<usize> {
    let mut found = HashSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for cpu in first.parse::<usize>().ok()?..=last.parse().ok()? {
            found.insert(siblings(cpu)?);
        }
    }
    Some(found.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_one_core_count_once() {
        let pairs = |cpu: usize| (cpu < 8).then(|| format!("{},{}", cpu % 4, cpu % 4 + 4));
        assert_eq!(cores("0-7", pairs), Some(4));
        assert_eq!(cores("0-1,4,6", pairs), Some(3), "0 and 4 share a core");
        assert_eq!(cores("3", pairs), Some(1));
        assert_eq!(cores("0-8", pairs), None, "the system does not say");
        assert_eq!(cores("", pairs), None);
        assert!((1..=std::thread::available_parallelism().unwrap().get()).contains(&default_threads()));
    }
}
