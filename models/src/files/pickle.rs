//! The tensors of a PyTorch file: names, types, shapes and byte ranges, from the objects of its
//! pickle, which are interpreted here because candle trusts the length of their tuples. The numbers
//! lie in an archive, or in a file from before PyTorch 1.6 behind the pickle
//! ([`super::old_pickle`]).

use std::borrow::Cow;
use std::io::Read as _;

use candle_core::pickle::Object;
use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::bytes::{Bytes, Reader};
use super::container::Place;
use super::numbers::NumberType;
use super::old_pickle::{self, OldStorages};
use super::unpickle::{MAX_PICKLE_BYTES, unpickled};

type Zip<'a> = ZipArchive<Box<dyn Reader + 'a>>;

/// A tensor of a file, or a number that stands for one.
#[derive(Debug)]
pub(super) struct PickledTensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) numbers: Numbers,
}

/// Keys under which training writes the tensors, those of upscalers last: the first that has any.
const WRAPPERS: [&str; 7] =
    ["state_dict", "string_to_param", "params_ema", "params-ema", "params", "model", "net"];

/// Where the numbers of a tensor are.
#[derive(Debug)]
pub(super) enum Numbers {
    Stored(Place),
    /// In another order: the place of all of them, and how far apart they are along each side.
    Strided(Place, Vec<usize>),
    /// A number of Python: scripts leave alphas of LoRAs as they were given.
    Given(f64),
}

/// Where the numbers of all tensors are.
enum Storages<'a> {
    Archive { folder: String, zip: Zip<'a> },
    Behind(OldStorages),
}

/// The tensors of an archive. The error reads on from the file's name.
pub(super) fn tensors(file: &Bytes) -> Result<Vec<PickledTensor>, String> {
    let (content, folder, zip) = read(file)?;
    tensors_of(&content, Storages::Archive { folder, zip }, file.len() as u64)
}

/// The tensors of a file from before PyTorch 1.6. The error reads on from the file's name.
pub(super) fn old_tensors(file: &Bytes) -> Result<Vec<PickledTensor>, String> {
    let (content, storages) = old_pickle::read(file)?;
    tensors_of(&content, Storages::Behind(storages), file.len() as u64)
}

fn tensors_of(
    content: &Object,
    mut storages: Storages<'_>,
    length: u64,
) -> Result<Vec<PickledTensor>, String> {
    let Object::Dict(top) = content else { return Err("holds no tensors by name".into()) };
    let mut tensors = Vec::new();
    let groups = groups(top);
    let all = groups.iter().flat_map(|(group, items)| items.iter().map(move |item| (group, item)));
    for (group, (name, value)) in all {
        let Object::Unicode(name) = name else { continue };
        let (shape, numbers) = match (call(value), number(value)) {
            (Some(args), _) => match StorageView::read(args) {
                Some(view) => {
                    let numbers = view.numbers(&mut storages, length);
                    (view.size, numbers)
                }
                None => {
                    let reason = "is not written as PyTorch does".to_owned();
                    (Vec::new(), Numbers::Stored(Err(reason)))
                }
            },
            // Other numbers are of the training.
            (None, Some(number)) if name.ends_with("alpha") => (Vec::new(), Numbers::Given(number)),
            _ => continue,
        };
        tensors.push(PickledTensor { name: format!("{group}{name}"), shape, numbers });
    }
    Ok(tensors)
}

/// The tensors by name, and what their names begin with: nothing, or the key of each of several
/// dictionaries, as in files of IP-Adapters.
fn groups(top: &[(Object, Object)]) -> Vec<(String, &[(Object, Object)])> {
    if let Some(inner) = inner(top) {
        return vec![(String::new(), inner)];
    }
    let has_tensor = |items: &[(Object, Object)]| items.iter().any(|(_, v)| call(v).is_some());
    let mut groups = Vec::new();
    for (key, value) in top {
        if let (Object::Unicode(key), Some(items)) = (key, items(value))
            && has_tensor(items)
        {
            groups.push((format!("{key}."), items));
        }
    }
    if has_tensor(top) || groups.is_empty() { vec![(String::new(), top)] } else { groups }
}

/// The tensors by name where they are not at the top: training writes them under a key of its own,
/// beside others.
fn inner(top: &[(Object, Object)]) -> Option<&[(Object, Object)]> {
    let has_tensors = |items: &[(Object, Object)]| items.iter().any(|(_, v)| call(v).is_some());
    let inside = |value| items(value).filter(|inner| has_tensors(inner));
    let named = WRAPPERS.into_iter().find_map(|wanted| {
        let is_wanted = |key: &Object| matches!(key, Object::Unicode(key) if key == wanted);
        top.iter().filter(|(key, _)| is_wanted(key)).find_map(|(_, value)| inside(value))
    });
    if named.is_some() || has_tensors(top) {
        return named;
    }
    // The only one there is.
    let mut others = top.iter().filter_map(|(_, value)| inside(value));
    others.next().filter(|_| others.next().is_none())
}

/// A number of Python.
fn number(object: &Object) -> Option<f64> {
    match object {
        Object::Int(number) => Some(f64::from(*number)),
        Object::Long(number) => Some(*number as f64),
        Object::Float(number) => Some(*number),
        _ => None,
    }
}

/// The items of a dictionary, or of a `torch.nn.ParameterDict`.
fn items(object: &Object) -> Option<&[(Object, Object)]> {
    match object {
        Object::Dict(items) => Some(items),
        Object::Build { args, .. } => {
            let Object::Dict(state) = &**args else { return None };
            state.iter().find_map(|item| match item {
                (Object::Unicode(key), Object::Dict(items)) if key == "_parameters" => {
                    Some(&items[..])
                }
                _ => None,
            })
        }
        _ => None,
    }
}

/// The object of the file's pickle, the folder of its storages, and the archive.
fn read(file: &Bytes) -> Result<(Object, String, Zip<'_>), String> {
    let mut zip = ZipArchive::new(file.reader()).map_err(|error| match error {
        // The directory of an archive is at its end.
        ZipError::InvalidArchive(_) => format!(
            "is cut short at {} bytes, or damaged: the download is incomplete, fetch the file again",
            file.len()
        ),
        error => format!("is no archive that can be read: {error}"),
    })?;
    let names: Vec<_> = zip.file_names().filter_map(Result::ok).map(Cow::into_owned).collect();
    let name = names.iter().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let name = name.ok_or("is an archive without data.pkl, and no checkpoint of PyTorch")?;
    let folder = name.trim_end_matches("data.pkl");
    if let Ok(order) = zip.by_name(&format!("{folder}byteorder")) {
        let mut text = Vec::new();
        order.take(8).read_to_end(&mut text).map_err(|error| format!("byteorder: {error}"))?;
        if text.trim_ascii() != b"little" {
            return Err("holds big-endian numbers: save it again on a little-endian machine".into());
        }
    }
    let entry = zip.by_name(name).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let all = entry.take(MAX_PICKLE_BYTES + 1).read_to_end(&mut bytes);
    all.map_err(|error| format!("{name}: {error}"))?;
    if bytes.len() as u64 > MAX_PICKLE_BYTES {
        return Err(format!("{name}: is larger than {MAX_PICKLE_BYTES} bytes"));
    }
    let content = unpickled(&mut &bytes[..]).map_err(|reason| format!("{name}: {reason}"))?;
    Ok((content, name.trim_end_matches(".pkl").to_owned(), zip))
}

/// The arguments that a tensor is rebuilt from, (storage, offset, size, stride, ..), if the object
/// is a tensor.
fn call(object: &Object) -> Option<&[Object]> {
    let Object::Reduce { callable, args } = object else { return None };
    let (Object::Class { class_name, .. }, Object::Tuple(args)) = (&**callable, &**args) else {
        return None;
    };
    match (class_name.as_str(), &args[..]) {
        ("_rebuild_tensor_v2" | "_rebuild_tensor_v3", args) => Some(args),
        ("_rebuild_parameter", [tensor, ..]) => call(tensor),
        (
            "_rebuild_from_type_v2",
            [Object::Class { class_name, .. }, _, Object::Tuple(args), ..],
        ) if class_name == "_rebuild_tensor_v2" => Some(args),
        _ => None,
    }
}

/// A view of a storage.
struct StorageView {
    /// The class's name if it is of a type that is not read.
    dtype: Result<NumberType, String>,
    storage: String,
    offset: usize,
    size: Vec<usize>,
    stride: Vec<usize>,
}

impl StorageView {
    fn read(args: &[Object]) -> Option<Self> {
        let [Object::PersistentLoad(storage), offset, size, stride, ..] = args else { return None };
        let Object::Tuple(storage) = &**storage else { return None };
        let [_, Object::Class { class_name, .. }, Object::Unicode(key), ..] = &storage[..] else {
            return None;
        };
        let number = |object: &Object| match object {
            Object::Int(number) => usize::try_from(*number).ok(),
            Object::Long(number) => usize::try_from(*number).ok(),
            _ => None,
        };
        let numbers = |object: &Object| match object {
            Object::Tuple(items) => items.iter().map(number).collect::<Option<Vec<_>>>(),
            _ => None,
        };
        // A storage without a type of its own: the tensor names it.
        let dtype = match (class_name.as_str(), args.get(6)) {
            ("UntypedStorage", Some(Object::Class { class_name, .. })) => {
                NumberType::of_torch(class_name)
            }
            (class_name, _) => NumberType::of_storage(class_name),
        };
        let (size, stride) = (numbers(size)?, numbers(stride)?);
        let offset = number(offset)?;
        (size.len() == stride.len()).then(|| Self {
            dtype,
            storage: key.clone(),
            offset,
            size,
            stride,
        })
    }

    /// Where its numbers are in the file.
    fn numbers(&self, storages: &mut Storages<'_>, length: u64) -> Numbers {
        let sides = || self.size.iter().zip(&self.stride);
        let mut elements = Some(1_usize);
        let mut in_order = true;
        for (size, stride) in sides().rev() {
            in_order &= *size <= 1 || Some(*stride) == elements;
            elements = elements.and_then(|elements| elements.checked_mul(*size));
        }
        // From the first number to the last.
        let reach = sides().try_fold(1_usize, |reach, (size, stride)| {
            reach.checked_add(size.saturating_sub(1).checked_mul(*stride)?)
        });
        let Some((elements, reach)) = elements.zip(reach) else {
            return Numbers::Stored(Err(outside()));
        };
        if in_order || elements == 0 {
            return Numbers::Stored(self.place(storages, elements, length));
        }
        let place = match elements <= reach {
            true => self.place(storages, reach, length),
            false => Err("repeats its numbers: save the file with contiguous tensors".into()),
        };
        Numbers::Strided(place, self.stride.clone())
    }

    /// The byte range of so many elements.
    fn place(&self, storages: &mut Storages<'_>, elements: usize, length: u64) -> Place {
        let dtype = self.dtype.clone().map_err(|class| format!("is of the type {class}"))?;
        let (data, size) = storages.place(&self.storage)?;
        let range = || {
            let skip = dtype.bytes(self.offset)? as u64;
            let end = skip.checked_add(dtype.bytes(elements)? as u64).filter(|end| *end <= size)?;
            let end = data.checked_add(end).filter(|end| *end <= length)?;
            Some((usize::try_from(data + skip).ok()?, usize::try_from(end).ok()?))
        };
        range().map(|range| (dtype, range)).ok_or_else(outside)
    }
}

fn outside() -> String {
    "does not lie within the file".into()
}

impl Storages<'_> {
    /// Where a storage begins in the file, and its bytes.
    fn place(&mut self, key: &str) -> Result<(u64, u64), String> {
        match self {
            Self::Archive { folder, zip } => {
                let name = format!("{folder}/{key}");
                let missing = |_| format!("has its numbers in {name}, which cannot be read");
                let entry = zip.by_name(&name).map_err(missing)?;
                if entry.compression() != CompressionMethod::Stored {
                    return Err("is compressed".into());
                }
                Ok((entry.data_start().ok_or_else(outside)?, entry.size()))
            }
            Self::Behind(storages) => storages.get(key).copied().ok_or_else(outside),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write as _};
    use std::path::Path;

    use proptest::prelude::*;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::files::Weights;

    /// The error of a file with this pickle; empty if there is none.
    fn refusal(pickle: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        for (name, bytes) in [("m/data.pkl", pickle), ("m/data/0", &[0; 8])] {
            zip.start_file(name, stored).unwrap();
            zip.write_all(bytes).unwrap();
        }
        let path = folder.path().join("hostile.ckpt");
        std::fs::write(&path, zip.finish().unwrap().into_inner()).unwrap();
        let read = Weights::whole(&path).and_then(|file| {
            let shape = file.shape("w").unwrap_or_default().to_vec();
            file.tensor("w", &shape)
        });
        read.err().map(|error| error.to_string()).unwrap_or_default()
    }

    /// A dictionary of one tensor w, rebuilt from these arguments.
    fn tensor(args: &[u8]) -> Vec<u8> {
        let call = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n";
        [call, args, b"Rs."].concat()
    }

    #[test]
    fn hostile_pickles_are_refused_in_a_sentence() {
        let storage =
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
        let view = |rest: &[u8]| tensor(&[b"(", &storage[..], rest].concat());
        assert_eq!(refusal(&view(b"K\0K\x02\x85K\x01\x85\x89}t")), "", "this one is sound");
        let written = "tensor w: is not written as PyTorch does";
        let (outside, often) = ("tensor w: does not lie within the file", "nests or repeats");
        let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f";
        let cases: [(Vec<u8>, &str); 15] = [
            (b"\x80\x04\x95\0\0\0\0\0\0\0\0}.".to_vec(), "protocol 4"),
            (b"(dp0\n.".to_vec(), "protocol 0 or 1"),
            (tensor(b")"), written),
            (tensor(b"K\x01\x85"), written),
            (tensor(b"(K\x01QK\0))t"), written),
            (tensor(b"(X\x01\0\0\0a\x85QK\0))t"), written),
            (view(b"K\0K\x02\x85)t"), written),
            (view(b"K\x01K\x02\x85K\x01\x85t"), outside),
            (view(&[b"K\0", &huge[..], b"\x85K\x01\x85t"].concat()), outside),
            (view(&[&huge[..], b"K\x02\x85K\x01\x85t"].concat()), outside),
            ([b"N", &[0x85; 100_000][..], b"."].concat(), often),
            ([b"N", &b"q\0h\0\x86".repeat(60)[..], b"."].concat(), often),
            (b"X\xff\xff\xff\xffa.".to_vec(), "ends within a text"),
            (b"}".to_vec(), "ends too early"),
            (b"\x8a\x09\0\0\0\0\0\0\0\0\x01.".to_vec(), "more than 64 bits"),
        ];
        for (pickle, words) in cases {
            let refusal = refusal(&pickle);
            let start = &pickle[..pickle.len().min(90)];
            assert!(refusal.starts_with("hostile.ckpt: "), "{:?}: {refusal}", start.escape_ascii());
            assert!(refusal.contains(words) && refusal.lines().count() == 1, "{refusal}");
        }
    }

    #[test]
    fn an_alpha_that_is_no_tensor_is_read() {
        let pickle = |value: &[u8]| [b"\x80\x02}X\x07\0\0\0x.alpha", value, b"s."].concat();
        for value in [&b"K\x08"[..], b"G\x40\x20\0\0\0\0\0\0", b"\x8a\x01\x08"] {
            let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
            zip.start_file("m/data.pkl", SimpleFileOptions::default()).unwrap();
            zip.write_all(&pickle(value)).unwrap();
            let file = Bytes::Copied(zip.finish().unwrap().into_inner());
            let tensors = tensors(&file).unwrap();
            let [PickledTensor { name, shape, numbers: Numbers::Given(8.0) }] = &tensors[..] else {
                panic!("{tensors:?}")
            };
            assert!(name == "x.alpha" && shape.is_empty());
        }
    }

    #[test]
    fn parts_of_one_storage_are_found_where_they_begin() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/single/views.ckpt");
        let file = std::fs::read(&path).unwrap();
        let tensors = tensors(&Bytes::Copied(file.clone())).unwrap();
        let values = |wanted: &str| {
            let tensor = tensors.iter().find(|tensor| tensor.name == wanted).unwrap();
            let Numbers::Stored(Ok((_, (start, end)))) = &tensor.numbers else {
                panic!("{tensor:?}")
            };
            let floats = file[*start..*end].chunks_exact(4);
            floats.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!((values("q"), values("k")), (vec![0.0, 1.0, 2.0], vec![3.0, 4.0, 5.0]));
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(300)
        })]

        #[test]
        fn a_tensor_lies_within_its_storage_or_is_refused(
            offset in 0..=3_u8,
            rows in 0..=3_u8,
            columns in 0..=3_u8,
        ) {
            let storage =
                b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
            let view = [b'K', offset, b'K', rows, b'K', columns, b'\x86', b'K', columns, b'K', 1];
            let pickle = tensor(&[b"(", &storage[..], &view, b"\x86\x89}t"].concat());
            // The storage has eight bytes: two numbers.
            let inside = offset + rows * columns <= 2;
            let contiguous = rows <= 1 || columns > 0;
            let refusal = refusal(&pickle);
            if inside && contiguous {
                prop_assert_eq!(refusal, "");
            } else if !inside {
                prop_assert!(refusal.contains("does not lie within the file"), "{refusal}");
            }
        }

        #[test]
        fn a_damaged_pickle_is_read_or_refused_by_name(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        ) {
            let storage =
                b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ";
            let mut pickle = tensor(&[b"(", &storage[..], b"K\0K\x02\x85K\x01\x85\x89}t"].concat());
            for (place, byte) in changes {
                let place = place.index(pickle.len());
                pickle[place] = byte;
            }
            let refusal = refusal(&pickle);
            prop_assert!(refusal.is_empty() || refusal.starts_with("hostile.ckpt: "), "{refusal}");
        }
    }
}
