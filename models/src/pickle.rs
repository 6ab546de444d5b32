//! Where the tensors of a PyTorch file lie. The pickle in it is read as data by candle's reader:
//! nothing that it names is looked up, let alone called.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::DType;
use candle_core::pickle::{TensorInfo, read_pth_tensor_info};
use zip::{CompressionMethod, ZipArchive};

/// Name, type, shape and range of bytes in the file.
type Tensor = (String, DType, Vec<usize>, (usize, usize));

/// The tensors of a file of so many bytes. The error is what comes after the file's name.
pub(crate) fn tensors(path: &Path, length: u64) -> Result<Vec<Tensor>, String> {
    let unreadable = |error: candle_core::Error| {
        format!("not a checkpoint of PyTorch 1.6 or later that can be read: {error}")
    };
    // Training writes the tensors under a key of their own, other tools at the top.
    let inner = ["state_dict", "string_to_param"].into_iter().find_map(|key| {
        read_pth_tensor_info(path, false, Some(key)).ok().filter(|infos| !infos.is_empty())
    });
    let infos = match inner {
        Some(infos) => infos,
        None => read_pth_tensor_info(path, false, None).map_err(unreadable)?,
    };
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|error| error.to_string())?;
    infos.into_iter().map(|info| place(info, &mut zip, length)).collect()
}

fn place(
    info: TensorInfo,
    zip: &mut ZipArchive<BufReader<File>>,
    length: u64,
) -> Result<Tensor, String> {
    let TensorInfo { name, dtype, layout, path, .. } = info;
    let refuse = |reason: &str| Err(format!("tensor {name}: {reason}"));
    if !layout.is_contiguous() {
        return refuse("is not contiguous");
    }
    let entry = zip.by_name(&path).map_err(|error| format!("tensor {name}: {error}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return refuse("is compressed");
    }
    let size = dtype.size_in_bytes() as u64;
    let elements = layout.dims().iter().try_fold(size, |n, side| n.checked_mul(*side as u64));
    // The reader's layouts start at a byte, not at an element.
    let skip = layout.start_offset() as u64;
    let range = entry.data_start().zip(elements).and_then(|(data, bytes)| {
        let end = skip.checked_add(bytes).filter(|end| *end <= entry.size())?;
        Some((data.checked_add(skip)?, data.checked_add(end).filter(|end| *end <= length)?))
    });
    match range {
        Some((start, end)) => {
            Ok((name, dtype, layout.dims().to_vec(), (start as usize, end as usize)))
        }
        None => refuse("does not lie within the file"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_one_storage_are_found_where_they_begin() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/single/views.ckpt");
        let file = std::fs::read(&path).unwrap();
        let tensors = tensors(&path, file.len() as u64).unwrap();
        let values = |wanted: &str| {
            let (_, _, _, (start, end)) = tensors.iter().find(|(name, ..)| name == wanted).unwrap();
            let floats = file[*start..*end].chunks_exact(4);
            floats.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!((values("q"), values("k")), (vec![0.0, 1.0, 2.0], vec![3.0, 4.0, 5.0]));
    }
}
