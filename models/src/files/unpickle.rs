//! Pickles as data, one operation at a time by candle's machine: nothing that they name is imported or
//! called, and repetition and nesting are bounded. Not what the objects mean: that is
//! [`super::pickle`].

use candle_core::pickle::{Object, OpCode, Stack};

/// Maximum size of a pickle; that of a Stable Diffusion checkpoint is some 100 KB.
pub(super) const MAX_PICKLE_BYTES: u64 = 8 << 20;
/// Maximum nesting of objects; a tensor in a state dict is seven deep.
const MAX_DEPTH: usize = 100;
/// Maximum number of objects copied from the memo.
const MAX_COPIED: usize = 1 << 20;

/// The object that a pickle describes, which `rest` begins with; it is left at what follows. The
/// error reads on from the pickle's name.
pub(super) fn unpickled(rest: &mut &[u8]) -> Result<Object, String> {
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
        if OpCode::try_from(operation).is_err() {
            return Err(format!(
                "holds an operation, {operation:#04x}, that PyTorch does not write"
            ));
        }
        if let [b'X', a, b, c, d, text @ ..] = *rest
            && u32::from_le_bytes([*a, *b, *c, *d]) as usize > text.len()
        {
            return Err("ends within a text".into());
        }
        if let [0x8a, bytes, ..] = *rest
            && *bytes as usize > size_of::<i64>()
        {
            return Err("holds a number of more than 64 bits".into());
        }
        if machine.read(rest).map_err(|error| brief(&error))? {
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
