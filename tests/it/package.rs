//! `sd-server package`: the files that are needed and no others, the same bytes every time.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::harness::sd_server;

/// What the package of [`model`] holds.
const FILES: [&str; 12] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The demo model as people have models: linked, with two precisions and things beside it.
fn model(root: &Path) -> PathBuf {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    let model = root.join("snapshot");
    for file in FILES.map(|file| file.replace(".fp16", "")) {
        let link = model.join(&file);
        fs::create_dir_all(link.parent().expect("a folder")).expect("a folder");
        symlink(demo.join(&file), link).expect("a link");
    }
    let unet = demo.join("unet/diffusion_pytorch_model.safetensors");
    symlink(unet, model.join("unet/diffusion_pytorch_model.fp16.safetensors")).expect("a link");
    let strays = ["README.md", "v1-5.ckpt", "unet/pytorch_model.bin", ".gitattributes", "vae/.tmp"];
    for stray in strays {
        fs::write(model.join(stray), "stray").expect("a file");
    }
    model
}

fn package(model: &Path, output: &Path, more: &[&str]) -> Output {
    let mut command = sd_server(&["package"]);
    command.arg(model).arg("-o").arg(output).args(more).output().expect("the binary starts")
}

fn made(done: &Output) {
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The files below a folder, none of which may be a link or closed to others.
fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let metadata = fs::symlink_metadata(&path).expect("it is there");
            if metadata.is_dir() {
                folders.push(path);
                continue;
            }
            assert!(metadata.is_file(), "{}", path.display());
            assert_eq!(metadata.permissions().mode() & 0o444, 0o444, "{}", path.display());
            let name = path.strip_prefix(root).expect("below").to_str().expect("UTF-8");
            found.push(name.to_owned());
        }
    }
    found.sort();
    found
}

fn draws(model: &Path) {
    let args = ["generate", "a cat", "--steps", "1", "-W", "64", "-H", "64", "--device", "cpu"];
    let output = model.with_extension("png");
    let done = sd_server(&args).arg("--model").arg(model).arg("-o").arg(&output).output();
    made(&done.expect("the binary starts"));
}

#[test]
fn a_tarball_holds_what_is_needed_and_loads() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path());
    let tarball = folder.path().join("model.tar.gz");
    let done = package(&model, &tarball, &[]);
    made(&done);
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), tarball.to_str().expect("UTF-8"));
    // SageMaker's own tools unpack it; here the system's.
    let unpacked = folder.path().join("unpacked");
    fs::create_dir(&unpacked).expect("a directory");
    let tar = Command::new("tar").arg("-xzf").arg(&tarball).arg("-C").arg(&unpacked).status();
    assert!(tar.expect("tar runs").success());
    assert_eq!(files(&unpacked), FILES);
    draws(&unpacked);
}

#[test]
fn the_same_model_is_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path());
    let [first, second] = ["a.tar.gz", "b.tar.gz"].map(|name| folder.path().join(name));
    made(&package(&model, &first, &[]));
    let copy = folder.path().join("copy");
    made(&package(&model, &copy, &["--layout", "directory"]));
    let mut again = sd_server(&["package"]);
    // Other times, other owners of links, another number of threads.
    again.arg(&copy).arg("-o").arg(&second).env("RAYON_NUM_THREADS", "1");
    made(&again.output().expect("the binary starts"));
    assert!(fs::read(first).expect("a file") == fs::read(second).expect("a file"));
}

#[test]
fn a_directory_holds_the_same_files() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path());
    let prefix = folder.path().join("prefix");
    made(&package(&model, &prefix, &["--layout", "directory"]));
    assert_eq!(files(&prefix), FILES);
    draws(&prefix);
    let again = package(&model, &prefix, &["--layout", "directory"]);
    assert_eq!(again.status.code(), Some(1), "it would mix two models");
    let full = folder.path().join("full");
    made(&package(&model, &full, &["--layout", "directory", "--dtype", "f32"]));
    let plain = FILES.map(|file| file.replace(".fp16", ""));
    assert_eq!(files(&full), plain);
}

#[test]
fn a_directory_is_whole_or_not_there() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path());
    let directory = |output: &Path| package(&model, output, &["--layout", "directory"]);
    // The last file to be copied can be listed but not read.
    let last = model.join("vae/diffusion_pytorch_model.safetensors");
    fs::remove_file(&last).expect("it is ours");
    symlink("/proc/self/mem", &last).expect("a link");
    let (new, there) = (folder.path().join("new"), folder.path().join("there"));
    fs::create_dir(&there).expect("a directory");
    for output in [&new, &there] {
        let done = directory(output);
        assert_eq!(done.status.code(), Some(1));
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(said.contains(&format!("cannot write {}", output.display())), "{said}");
    }
    assert!(!new.exists() && files(&there).is_empty());
    assert!(!folder.path().join("new.part").exists() && !there.join(".part").exists());
    fs::remove_file(&last).expect("it is ours");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    symlink(demo.join("vae/diffusion_pytorch_model.safetensors"), &last).expect("a link");
    // What a killed process left is no hindrance, nor part of it.
    for part in [folder.path().join("new.part"), there.join(".part")] {
        fs::create_dir(&part).expect("a directory");
        fs::write(part.join("stray"), "half").expect("a file");
    }
    for output in [&new, &there] {
        made(&directory(output));
        assert_eq!(files(output), FILES);
    }
    assert!(!folder.path().join("new.part").exists() && !there.join(".part").exists());
}

#[test]
fn uploading_is_the_aws_command() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path());
    let aws = folder.path().join("aws");
    let script = "#!/bin/sh\necho \"$@\" >> \"$(dirname \"$0\")/calls\"\n[ \"$FAIL\" != 1 ]\n";
    fs::write(&aws, script).expect("a script");
    fs::set_permissions(&aws, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let path = format!("{}:/usr/bin:/bin", folder.path().display());
    let upload = |output: &str, layout: &str, url: &str, fail: &str| {
        let mut command = sd_server(&["package", "--layout", layout, "--upload", url]);
        command.arg(&model).arg("-o").arg(folder.path().join(output));
        command.env("PATH", &path).env("FAIL", fail).output().expect("the binary starts")
    };
    made(&upload("m.tar.gz", "tarball", "s3://b/m.tar.gz", "0"));
    made(&upload("m", "directory", "s3://b/m/", "0"));
    let calls = fs::read_to_string(folder.path().join("calls")).expect("it was called");
    let here = folder.path().display();
    let tarball = format!("s3 cp --only-show-errors {here}/m.tar.gz s3://b/m.tar.gz\n");
    let directory = format!("s3 cp --only-show-errors --recursive {here}/m s3://b/m/\n");
    assert_eq!(calls, tarball + &directory);
    let failed = upload("n.tar.gz", "tarball", "s3://b/m.tar.gz", "1");
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(upload("n", "directory", "http://b", "0").status.code(), Some(64));
}

#[test]
fn what_is_no_model_is_refused() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = model(folder.path());
    let output = folder.path().join("out.tar.gz");
    fs::remove_dir_all(model.join("vae")).expect("it is ours");
    let done = package(&model, &output, &[]);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("vae has no safetensors"));
    for built_in in ["demo", "demo-lcm"] {
        let done = package(Path::new(built_in), &output, &[]);
        let message = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.code() == Some(1) && message.contains("needs no package"), "{message}");
    }
    assert!(!output.exists() && !folder.path().join("out.tar.gz.part").exists());
}
