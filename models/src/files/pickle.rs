//! The tensors of a PyTorch file: names, types, shapes and byte ranges. candle's unpickler parses
//! the pickle as data, one operation at a time: nothing that it names is imported or called, and
//! repetition and nesting are bounded. The resulting objects are interpreted here, because candle
//! trusts the length of their tuples.

use std::borrow::Cow;
use std::io::Read as _;

use candle_core::DType;
use candle_core::pickle::{Object, Stack};
use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::bytes::{Bytes, Reader};
use super::container::Place;
use super::numbers::NumberType;

/// Name, shape, and the place of the numbers in the file.
type TensorEntry = (String, Vec<usize>, Place);
type Zip<'a> = ZipArchive<Box<dyn Reader + 'a>>;

/// Maximum size of the pickle; that of a Stable Diffusion checkpoint is some 100 KB.
const MAX_PICKLE_BYTES: u64 = 8 << 20;
/// Maximum nesting of objects; a tensor in a state dict is seven deep.
const MAX_DEPTH: usize = 100;
/// Maximum number of objects copied from the memo.
const MAX_COPIED: usize = 1 << 20;

/// The tensors of a file. The error reads on from the file's name.
pub(super) fn tensors(file: &Bytes) -> Result<Vec<TensorEntry>, String> {
    let (content, folder, mut zip) = read(file)?;
    let Object::Dict(top) = &content else { return Err("holds no tensors by name".into()) };
    // Training writes the tensors under a key of its own, other tools at the top.
    let inner = ["state_dict", "string_to_param"].into_iter().find_map(|wanted| {
        let of_key = |(key, value): &'_ (Object, Object)| match key {
            Object::Unicode(key) if key == wanted => Some(items(value)?.to_vec()),
            _ => None,
        };
        top.iter().find_map(of_key).filter(|inner| inner.iter().any(|(_, v)| call(v).is_some()))
    });
    let mut tensors = Vec::new();
    for (name, value) in inner.as_ref().unwrap_or(top) {
        let Object::Unicode(name) = name else { continue };
        let Some(args) = call(value) else {
            // Scripts leave alphas of LoRAs as they were given; other numbers are of the training.
            let is_number = matches!(value, Object::Int(_) | Object::Long(_) | Object::Float(_));
            if is_number && name.ends_with("alpha") {
                let reason = "is a number of Python, not a tensor: save it as a tensor";
                tensors.push((name.clone(), Vec::new(), Err(reason.into())));
            }
            continue;
        };
        let (shape, place) = match StorageView::read(args) {
            Some(view) => {
                let place = view.place(&folder, &mut zip, file.len() as u64);
                (view.size, place)
            }
            None => (Vec::new(), Err("is not written as PyTorch does".into())),
        };
        tensors.push((name.clone(), shape, place));
    }
    Ok(tensors)
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
    let content = unpickled(&bytes).map_err(|reason| format!("{name}: {reason}"))?;
    Ok((content, name.trim_end_matches(".pkl").to_owned(), zip))
}

/// The object that a pickle describes.
fn unpickled(mut rest: &[u8]) -> Result<Object, String> {
    if let [0x80, protocol @ 4..=255, ..] = rest {
        return Err(format!("is of the pickle protocol {protocol}: save it with protocol 2"));
    }
    if let [b'(', b'd' | b'l', ..] = rest {
        return Err("is of the pickle protocol 0 or 1: save it with protocol 2".into());
    }
    let mut machine = Stack::empty();
    let (mut depths, mut copied): (Vec<usize>, _) = (Vec::new(), 0);
    loop {
        let operation = *rest.first().ok_or("ends too early")?;
        if let [b'X', a, b, c, d, text @ ..] = rest
            && u32::from_le_bytes([*a, *b, *c, *d]) as usize > text.len()
        {
            return Err("ends within a text".into());
        }
        if let [0x8a, bytes, ..] = rest
            && *bytes as usize > size_of::<i64>()
        {
            return Err("holds a number of more than 64 bits".into());
        }
        if machine.read(&mut rest).map_err(|error| brief(&error))? {
            return machine.finalize().map_err(|error| brief(&error));
        }
        let objects = machine.stack();
        let mut nested = 0;
        // Storing to and loading from the memo copies the object.
        if let (b'q' | b'r' | b'h' | b'j', Some(top)) = (operation, objects.last()) {
            let (count, depth) = extent(top);
            (copied, nested) = (copied + count, depth);
        }
        let (kept, taken) = depths.split_at(objects.len().saturating_sub(1).min(depths.len()));
        let depth = match (operation, taken) {
            (b'q' | b'r' | b'h' | b'j' | 0x80, _) => nested,
            // Items are added to a list or a dictionary.
            (b'a' | b'e' | b's' | b'u', [into, items @ ..]) => {
                items.iter().max().map_or(*into, |deepest| deepest + 1).max(*into)
            }
            (_, taken) => taken.iter().max().map_or(1, |deepest| deepest + 1),
        };
        if depth > MAX_DEPTH || copied > MAX_COPIED {
            return Err("nests or repeats its objects too often".into());
        }
        depths.truncate(kept.len());
        depths.resize(objects.len(), depth);
    }
}

/// The number of objects in an object, itself and its text included, and its nesting depth.
fn extent(object: &Object) -> (usize, usize) {
    let inside = |parts: &mut dyn Iterator<Item = &Object>| {
        parts.map(extent).fold((1, 0), |(n, deep), (m, depth)| (n + m, deep.max(depth)))
    };
    let (count, depth) = match object {
        Object::Tuple(items) | Object::List(items) => inside(&mut items.iter()),
        Object::Dict(items) => inside(&mut items.iter().flat_map(|(key, value)| [key, value])),
        Object::Reduce { callable, args } | Object::Build { callable, args } => {
            inside(&mut [&**callable, &**args].into_iter())
        }
        Object::PersistentLoad(id) => inside(&mut std::iter::once(&**id)),
        Object::Unicode(text) => (1 + text.len() / size_of::<Object>(), 0),
        Object::Class { module_name, class_name } => {
            (1 + (module_name.len() + class_name.len()) / size_of::<Object>(), 0)
        }
        _ => (1, 0),
    };
    (count, depth + 1)
}

/// An error message without the objects that it may quote.
fn brief(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().chars().take(120).collect()
}

/// The arguments that a tensor is rebuilt from, (storage, offset, size, stride, ..), if the object
/// is a tensor.
fn call(object: &Object) -> Option<&[Object]> {
    let Object::Reduce { callable, args } = object else { return None };
    let (Object::Class { class_name, .. }, Object::Tuple(args)) = (&**callable, &**args) else {
        return None;
    };
    match (class_name.as_str(), &args[..]) {
        ("_rebuild_tensor_v2", args) => Some(args),
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
        let dtype = match class_name.as_str() {
            "FloatStorage" => Ok(NumberType::Plain(DType::F32)),
            "DoubleStorage" => Ok(NumberType::Plain(DType::F64)),
            "HalfStorage" => Ok(NumberType::Plain(DType::F16)),
            "BFloat16Storage" => Ok(NumberType::Plain(DType::BF16)),
            "ByteStorage" => Ok(NumberType::Plain(DType::U8)),
            "LongStorage" => Ok(NumberType::Plain(DType::I64)),
            "IntStorage" => Ok(NumberType::Plain(DType::I32)),
            "ShortStorage" => Ok(NumberType::Plain(DType::I16)),
            "BoolStorage" => Ok(NumberType::Plain(DType::U8)),
            other => Err(other.to_owned()),
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

    /// Its byte range in the file.
    fn place(&self, folder: &str, zip: &mut Zip<'_>, length: u64) -> Place {
        let dtype = self.dtype.clone().map_err(|class| format!("is of the type {class}"))?;
        let outside = || "does not lie within the file".to_owned();
        let mut elements = 1_usize;
        for (size, stride) in self.size.iter().zip(&self.stride).rev() {
            if *size > 1 && *stride != elements {
                return Err("is not contiguous: save the file with contiguous tensors".into());
            }
            elements = elements.checked_mul(*size).ok_or_else(outside)?;
        }
        let name = format!("{folder}/{}", self.storage);
        let entry = zip.by_name(&name).map_err(|error| error.to_string())?;
        if entry.compression() != CompressionMethod::Stored {
            return Err("is compressed".into());
        }
        let bytes = |count: usize| dtype.bytes(count);
        let range = || {
            let (skip, bytes) = (bytes(self.offset)? as u64, bytes(elements)? as u64);
            let end = skip.checked_add(bytes).filter(|end| *end <= entry.size())?;
            let data = entry.data_start()?;
            let end = data.checked_add(end).filter(|end| *end <= length)?;
            Some((usize::try_from(data + skip).ok()?, usize::try_from(end).ok()?))
        };
        range().map(|range| (dtype, range)).ok_or_else(outside)
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
    fn an_alpha_that_is_no_tensor_is_told_of() {
        let pickle = |value: &[u8]| [b"\x80\x02}X\x07\0\0\0x.alpha", value, b"s."].concat();
        for value in [&b"K\x08"[..], b"G\x40\x20\0\0\0\0\0\0", b"\x8a\x01\x08"] {
            let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
            zip.start_file("m/data.pkl", SimpleFileOptions::default()).unwrap();
            zip.write_all(&pickle(value)).unwrap();
            let file = Bytes::Copied(zip.finish().unwrap().into_inner());
            let tensors = tensors(&file).unwrap();
            let [(name, _, Err(reason))] = &tensors[..] else { panic!("{tensors:?}") };
            assert!(name == "x.alpha" && reason.contains("a number of Python"), "{reason}");
        }
    }

    #[test]
    fn parts_of_one_storage_are_found_where_they_begin() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/single/views.ckpt");
        let file = std::fs::read(&path).unwrap();
        let tensors = tensors(&Bytes::Copied(file.clone())).unwrap();
        let values = |wanted: &str| {
            let (_, _, place) = tensors.iter().find(|(name, ..)| name == wanted).unwrap();
            let (_, (start, end)) = place.as_ref().unwrap();
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
