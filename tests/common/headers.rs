//! Checkpoints of nothing but a header, for tests of keys and shapes.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

/// Keys and shapes of a list: lines of a key and its shape in parentheses, separated by a tab.
pub fn keys(list: &Path) -> BTreeMap<String, Vec<usize>> {
    let list = std::fs::read_to_string(list).unwrap();
    let line = |line: &str| {
        let mut parts = line.split('\t');
        let (key, shape) = (parts.next()?, parts.next()?);
        let shape = shape.trim_matches(['(', ')']).split(',').map(str::trim).filter(|n| !n.is_empty());
        Some((key.to_string(), shape.map(|n| n.parse().unwrap()).collect()))
    };
    list.lines().filter(|line| !line.starts_with('#')).filter_map(line).collect()
}

/// Writes a safetensors file of these tensors whose data is a hole: it takes no room on the disk.
pub fn header_only(keys: &BTreeMap<String, Vec<usize>>, dtype: DType, file: &Path) {
    let (name, mut end) = (dtype.as_str().to_uppercase(), 0);
    let mut entry = |(key, shape): (&String, &Vec<usize>)| {
        let start = end;
        end += dtype.size_in_bytes() * shape.iter().product::<usize>();
        format!(r#""{key}":{{"dtype":"{name}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", keys.iter().map(&mut entry).collect::<Vec<_>>().join(","));
    std::fs::write(file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let whole = 8 + header.len() + end;
    std::fs::File::options().write(true).open(file).unwrap().set_len(whole as u64).unwrap();
}
