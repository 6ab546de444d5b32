//! PyTorch's files from before 1.6, which `torch.save(_use_new_zipfile_serialization=False)` still
//! writes: pickles one after the other, and the numbers of all storages behind them.
//!
//! Reference: PyTorch 2 `serialization.py`, `_legacy_save`.

use std::collections::HashMap;

use candle_core::pickle::Object;

use super::bytes::Bytes;
use super::container::OLD_PICKLE;
use super::numbers::NumberType;
use super::unpickle::{MAX_PICKLE_BYTES, unpickled};

/// Where storages begin in the file, and their bytes, by key.
pub(super) type OldStorages = HashMap<String, (u64, u64)>;

/// Maximum nesting of the objects that are searched for storages; the machine bounds it too.
const MAX_DEPTH: usize = 100;

/// The object of the file's pickle and the places of its storages. The error reads on from the
/// file's name.
pub(super) fn read(file: &Bytes) -> Result<(Object, OldStorages), String> {
    let most = usize::try_from(MAX_PICKLE_BYTES).unwrap_or(usize::MAX);
    let head = file.read(0..file.len().min(most)).map_err(|error| error.to_string())?;
    let mut rest = head.get(OLD_PICKLE.len()..).unwrap_or_default();
    if unpickled(&mut rest)? != Object::Int(1001) {
        return Err("is of another version of PyTorch's old format than 1001".into());
    }
    if !is_little_endian(&unpickled(&mut rest)?) {
        return Err("holds big-endian numbers: save it again on a little-endian machine".into());
    }
    let content = unpickled(&mut rest)?;
    let Object::List(keys) = unpickled(&mut rest)? else {
        return Err("does not list its storages".into());
    };
    let mut types = HashMap::new();
    collect_types(&content, &mut types, 0);
    let mut storages = HashMap::new();
    let mut place = head.len() - rest.len();
    for key in keys {
        let Object::Unicode(key) = key else { return Err("does not name its storages".into()) };
        let cut = || {
            format!(
                "is cut short at {} bytes: the download is incomplete, fetch the file again",
                file.len()
            )
        };
        let start = place.checked_add(size_of::<i64>()).filter(|start| *start <= file.len());
        let start = start.ok_or_else(cut)?;
        let count = file.read(place..start).map_err(|error| error.to_string())?;
        let count = count.as_ref().try_into().ok().map(i64::from_le_bytes);
        let kind = types.get(&key).cloned().ok_or("holds a storage that nothing is in")?;
        let kind = kind.map_err(|class| format!("holds a storage of the type {class}"))?;
        let bytes = count.and_then(|count| kind.bytes(usize::try_from(count).ok()?));
        let bytes = bytes.ok_or("holds a storage of no size")?;
        let end = start.checked_add(bytes).filter(|end| *end <= file.len()).ok_or_else(cut)?;
        storages.insert(key, (start as u64, bytes as u64));
        place = end;
    }
    Ok((content, storages))
}

fn is_little_endian(system: &Object) -> bool {
    let Object::Dict(items) = system else { return false };
    let is_key = |key: &Object| matches!(key, Object::Unicode(key) if key == "little_endian");
    items.iter().any(|(key, value)| is_key(key) && *value == Object::Bool(true))
}

/// Notes the types of all storages in an object, by key.
fn collect_types(
    object: &Object,
    types: &mut HashMap<String, Result<NumberType, String>>,
    depth: usize,
) {
    if depth > MAX_DEPTH {
        return;
    }
    let mut inside = |object: &Object| collect_types(object, types, depth + 1);
    match object {
        Object::Tuple(items) | Object::List(items) => items.iter().for_each(inside),
        Object::Dict(items) => items.iter().for_each(|(key, value)| {
            inside(key);
            inside(value);
        }),
        Object::Reduce { callable, args } | Object::Build { callable, args } => {
            inside(callable);
            inside(args);
        }
        Object::PersistentLoad(id) => {
            if let Object::Tuple(id) = &**id
                && let [_, Object::Class { class_name, .. }, Object::Unicode(key), ..] = &id[..]
            {
                types.insert(key.clone(), NumberType::of_storage(class_name));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use candle_core::Device;

    use crate::files::Weights;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pickles").join(name)
    }

    #[test]
    fn old_and_new_files_hold_the_same_numbers_in_any_order() {
        let expected = fixture("expected.safetensors");
        let expected = candle_core::safetensors::load(expected, &Device::Cpu).unwrap();
        assert_eq!(expected.len(), 11);
        for name in ["old.pt", "new.pt"] {
            let file = Weights::whole(&fixture(name)).unwrap();
            assert_eq!(file.names().count(), expected.len());
            assert_eq!(file.file_names(), name);
            for (tensor, values) in &expected {
                let read = file.widened(tensor).unwrap();
                assert_eq!(read.dims(), values.dims(), "{name}: {tensor}");
                let floats =
                    |x: &candle_core::Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(floats(&read), floats(values), "{name}: {tensor}");
            }
        }
    }

    #[test]
    fn numbers_of_fp8_are_found_under_the_key_of_a_script() {
        let file = Weights::whole(&fixture("fp8.pt")).unwrap();
        let read = file.widened("fp8").unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(read, (-8_i16..8).map(f32::from).collect::<Vec<_>>());
    }

    #[test]
    fn an_old_file_that_is_cut_or_changed_is_read_or_refused_by_name() {
        let bytes = std::fs::read(fixture("old.pt")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pt");
        let mut refused = 0;
        for place in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[place] ^= 0x55;
            for bytes in [&bytes[..place], &changed] {
                std::fs::write(&path, bytes).unwrap();
                let names = |file: &Weights| file.names().map(str::to_owned).collect::<Vec<_>>();
                let read = Weights::whole(&path).and_then(|file| {
                    names(&file).iter().try_for_each(|name| file.widened(name).map(drop))
                });
                if let Err(error) = read {
                    let said = error.to_string();
                    assert!(said.starts_with("a.pt: ") && said.lines().count() == 1, "{said}");
                    refused += 1;
                }
            }
        }
        assert!(refused > bytes.len() / 14, "all that are cut, and more");
    }
}
