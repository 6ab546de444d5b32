//! What the container image says about its crates: `docker/sbom.sh`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Name and version of each crate in Cargo.lock, with its checksum.
fn locked() -> BTreeMap<(String, String), String> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("Cargo.lock")).expect("a lock file");
    let value = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(&format!("{key} = \"")));
        line.map(|rest| rest.trim_end_matches('"').to_owned()).unwrap_or_default()
    };
    let blocks = text.split("[[package]]").skip(1);
    blocks.map(|b| ((value(b, "name"), value(b, "version")), value(b, "checksum"))).collect()
}

#[test]
fn the_bill_of_materials_is_that_of_the_lock_file() {
    let script = Path::new(ROOT).join("docker/sbom.sh");
    let output = Command::new(script).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bill: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&"CycloneDX".into(), &"1.5".into()));
    assert_eq!(bill["metadata"]["component"]["name"], "sd-server");
    let (locked, text) = (locked(), |value: &Value| value.as_str().unwrap_or("").to_owned());
    let mut refs = BTreeSet::from([text(&bill["metadata"]["component"]["bom-ref"])]);
    for component in bill["components"].as_array().expect("a list") {
        let key = (text(&component["name"]), text(&component["version"]));
        let checksum = locked.get(&key).unwrap_or_else(|| panic!("{key:?} is not locked"));
        assert_eq!(text(&component["hashes"][0]["content"]), *checksum, "{key:?}");
        assert!(component["licenses"][0]["expression"].is_string(), "{key:?} has no licence");
        assert!(text(&component["purl"]).starts_with(&format!("pkg:cargo/{}@", key.0)));
        assert!(refs.insert(text(&component["bom-ref"])), "{key:?} is listed twice");
    }
    for name in ["axum", "candle-core", "sd-models", "tokio"] {
        assert!(
            refs.iter().any(|known| known.starts_with(&format!("pkg:cargo/{name}@"))),
            "{name}"
        );
    }
    // Crates that only tests use are not in the binary.
    assert!(!refs.iter().any(|known| known.contains("/proptest@")));
    let dependencies = bill["dependencies"].as_array().expect("a list");
    let of = dependencies.iter().map(|entry| text(&entry["ref"]));
    assert_eq!(of.collect::<BTreeSet<_>>(), refs);
    let needed = dependencies.iter().filter_map(|entry| entry["dependsOn"].as_array()).flatten();
    assert!(needed.map(text).all(|reference| refs.contains(&reference)));
}
