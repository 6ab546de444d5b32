//! Selects `libcuda`. The CUDA container image has NVIDIA's forward-compatibility package for hosts
//! with an older driver; with a newer driver it does not work and must not be found, nor with
//! GeForce cards, which it does not support (error 804). The dynamic
//! loader decides when a process starts, so the process re-executes itself once with another
//! `LD_LIBRARY_PATH`, before anything else. Without a driver or the package nothing is done.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// The path of the package in the image, as in NVIDIA's own images.
const COMPAT: &str = "usr/local/cuda/compat";
/// The version of the kernel driver.
const DRIVER: &str = "proc/driver/nvidia/version";
/// A folder a card, with a file on it.
const CARDS: &str = "proc/driver/nvidia/gpus";

/// Re-executes the process with the compatibility package first in `LD_LIBRARY_PATH`, if the driver
/// needs it. `library_path` is the current value. Returns if it is not needed; fails if the process
/// cannot be executed.
pub fn prefer(library_path: Option<&str>) -> std::io::Result<()> {
    let Some(path) = wanted(Path::new("/"), library_path) else { return Ok(()) };
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| OsString::from("sd-server"));
    let mut again = Command::new(std::env::current_exe()?);
    Err(again.arg0(name).args(args).env("LD_LIBRARY_PATH", path).exec())
}

/// The new library path, or `None` if the current one is right; `root` is `/` except in tests.
fn wanted(root: &Path, library_path: Option<&str>) -> Option<String> {
    let compat = root.join(COMPAT);
    let shown = compat.to_str()?;
    let now = library_path.unwrap_or_default();
    if now.split(':').next() == Some(shown) {
        return None;
    }
    let driver = fs::read_to_string(root.join(DRIVER)).ok()?;
    let driver = driver.lines().next()?.split_whitespace().find_map(version)?;
    let library = fs::read_link(compat.join("libcuda.so.1")).ok()?;
    let library = version(library.file_name()?.to_str()?.strip_prefix("libcuda.so.")?)?;
    if is_for_games(&root.join(CARDS)) {
        return None;
    }
    let path = if now.is_empty() { shown.to_owned() } else { format!("{shown}:{now}") };
    (driver < library).then_some(path)
}

/// Whether all cards are of the families that the package does not support; `false` if that is not
/// known.
fn is_for_games(cards: &Path) -> bool {
    let model = |card: fs::DirEntry| -> Option<String> {
        let text = fs::read_to_string(card.path().join("information")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("Model:")).map(str::to_owned)
    };
    let mut models = fs::read_dir(cards).into_iter().flatten().flatten().filter_map(model);
    let game = |model: String| ["GeForce", "TITAN"].iter().any(|family| model.contains(family));
    models.next().is_some_and(game) && models.all(game)
}

/// The parts of a version such as `535.129.03`, for comparison.
fn version(word: &str) -> Option<Vec<u32>> {
    let numbers: Option<Vec<u32>> = word.split('.').map(|part| part.parse().ok()).collect();
    numbers.filter(|numbers| numbers.len() > 1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const OLD: &str = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 14:37:44 UTC 2024\nGCC version:  gcc version 7.3.1 20180712\n";
    const OPEN: &str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (dvs-builder@U16)  Sun May 12\n";
    const SAME: &str =
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n";
    const NEW: &str =
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  1000.1  Tue Mar  5 22:23:56 UTC 2030\n";

    /// A host with this driver version and an image with this package version.
    fn host(driver: Option<&str>, library: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            path
        };
        if let Some(driver) = driver {
            fs::write(write(DRIVER), driver).expect("a file");
        }
        if let Some(library) = library {
            symlink(library, write(&format!("{COMPAT}/libcuda.so.1"))).expect("a link");
        }
        root
    }

    #[test]
    fn only_an_older_driver_gets_the_library() {
        let library = Some("libcuda.so.550.54.15");
        let table = [
            (Some(OLD), library, true),
            (Some(OPEN), library, true),
            (Some(SAME), library, false),
            (Some(NEW), library, false),
            (Some(""), library, false),
            (Some("NVRM version: none\n"), library, false),
            (None, library, false),
            (Some(OLD), None, false),
            (Some(OLD), Some("libcuda.so"), false),
            (Some(OLD), Some("libcuda.so.many"), false),
        ];
        for (driver, library, expected) in table {
            let host = host(driver, library);
            let wanted = wanted(host.path(), Some("/lib"));
            assert_eq!(wanted.is_some(), expected, "{driver:?} {library:?}");
        }
    }

    #[test]
    fn cards_for_games_do_not_get_the_library() {
        for (models, expected) in [
            (&["Tesla T4"][..], true),
            (&["NVIDIA GeForce RTX 3090"], false),
            (&["NVIDIA GeForce RTX 3090", "NVIDIA A100"], true),
            (&["NVIDIA TITAN RTX", "NVIDIA GeForce RTX 3090"], false),
        ] {
            let host = host(Some(OLD), Some("libcuda.so.550.54.15"));
            for (number, model) in models.iter().enumerate() {
                let card = host.path().join(CARDS).join(format!("0000:0{number}:00.0"));
                fs::create_dir_all(&card).expect("a folder");
                let text = format!("Model: \t\t {model}\nIRQ:   \t\t 35\n");
                fs::write(card.join("information"), text).expect("a file");
            }
            assert_eq!(wanted(host.path(), None).is_some(), expected, "{models:?}");
        }
    }

    #[test]
    fn the_library_comes_first_and_only_once() {
        let host = host(Some(OLD), Some("libcuda.so.550.54.15"));
        let compat = host.path().join(COMPAT).to_str().expect("UTF-8").to_owned();
        assert_eq!(wanted(host.path(), None), Some(compat.clone()));
        let last = format!("/lib:{compat}");
        let first = wanted(host.path(), Some(&last)).expect("it is last, which is too late");
        assert_eq!(first, format!("{compat}:/lib:{compat}"));
        assert_eq!(wanted(host.path(), Some(&first)), None);
    }
}
