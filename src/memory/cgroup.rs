//! Free memory of the control groups of this process: a container's limit is below the machine's
//! memory.

use std::fs;
use std::path::Path;

/// Bytes that the tightest of this process's groups leaves it; none where no group has a limit.
pub(super) fn left() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    left_in(&groups, Path::new("/sys/fs/cgroup"))
}

/// The same of the lines `ID:CONTROLLERS:PATH` of the groups, below the folder where they are
/// mounted.
fn left_in(groups: &str, mounted: &Path) -> Option<u64> {
    let group = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let path = Path::new(path.trim_start_matches('/'));
        match controllers {
            // Version 2.
            "" => tightest(mounted, path, ["memory.max", "memory.current", "inactive_file "]),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                let files = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "];
                tightest(&mounted.join("memory"), path, files)
            }
            _ => None,
        }
    };
    groups.lines().filter_map(group).min()
}

/// Of a group and those that it is in, by the names of what holds its limit, its use, and in its
/// statistics the cached files that it gives back. In a container its own path may not be there:
/// then only the folder where groups are mounted counts.
fn tightest(mounted: &Path, path: &Path, [limit, used, cached]: [&str; 3]) -> Option<u64> {
    let left = |group: &Path| {
        let folder = mounted.join(group);
        let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        let statistics = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let cached = statistics.lines().find_map(|line| line.strip_prefix(cached)?.trim().parse::<u64>().ok());
        let used = number(used)?.saturating_sub(cached.unwrap_or(0));
        Some(number(limit)?.saturating_sub(used))
    };
    path.ancestors().filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_counts() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("memory.max", "max\n");
        write("memory.current", "9000\n");
        write("a/memory.max", "5000\n");
        write("a/memory.current", "3000\n");
        write("a/memory.stat", "anon 1000\ninactive_file 500\n");
        write("a/b/memory.max", "4000\n");
        write("a/b/memory.current", "100\n");
        let left = |groups: &str| left_in(groups, folder.path());
        assert_eq!(left("0::/a/b\n"), Some(2500));
        assert_eq!(left("0::/elsewhere\n"), None);
        assert_eq!(left("0::/\n"), None);
        assert_eq!(left("nonsense\n"), None);

        write("memory/c/memory.limit_in_bytes", "7000");
        write("memory/c/memory.usage_in_bytes", "8000");
        write("memory/c/memory.stat", "total_inactive_file 2000");
        assert_eq!(left("9:cpu:/a\n4:memory:/c\n0::/\n"), Some(1000));
        write("memory/c/memory.usage_in_bytes", "10000");
        assert_eq!(left("4:rdma,memory:/c/d\n"), Some(0));
    }
}
