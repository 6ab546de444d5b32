//! Writes a stub for every function in `stubs/*.txt` that the sources do not define.
use std::fmt::Write;
use std::{env, fs, path::Path};

fn main() {
    println!("cargo:rerun-if-changed=stubs");
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    let mut sources = String::new();
    read(Path::new("src"), &mut sources);
    // Functions that macros define are listed by name.
    let defined = |name: &str| {
        sources.contains(&format!("fn {name}(")) || sources.contains(&format!("{name},"))
    };
    let mut out = String::new();
    let libraries =
        [("driver", 801), ("cublas", 15), ("cublaslt", 15), ("curand", 203), ("cudart", 801)];
    for (library, code) in libraries {
        let names = fs::read_to_string(format!("stubs/{library}.txt")).unwrap();
        for name in names.split_whitespace().filter(|name| !defined(name)) {
            let _ = writeln!(
                out,
                "#[unsafe(no_mangle)] pub extern \"C\" fn {name}() -> i32 {{ \
                 crate::unsupported(\"{name}\", {code}) }}"
            );
        }
    }
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("stubs.rs"), out).unwrap();
}

/// Adds the text of every source file in a folder.
fn read(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()) {
        if entry.is_dir() {
            read(&entry, text);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(entry).unwrap());
        }
    }
}
