//! The values that a pickle builds.
//!
//! A value has 16 bytes and holds others by their numbers, never by pointers: memory is bounded by
//! the count of instructions, and nothing is freed recursively, however deep a pickle nests.

use safetensors::Dtype;

use super::code::Span;

/// The number of a value.
pub(super) type Id = u32;

#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// A value in which no tensor can be: a number, None, text in bytes.
    Plain,
    /// Something that may hold tensors, but cannot be read.
    Unknown,
    Int(i64),
    Text(Span),
    /// A part of the items of all tuples, and whether a tensor or something unknown is in it.
    Tuple(Span, bool),
    /// A list of plain values.
    List,
    /// The number of a dictionary, none as long as it is empty.
    Dict(Option<u32>),
    Class(Class),
    /// The name of a storage, and the type of its elements.
    Storage(Span, Dtype),
    /// The arguments of a tensor.
    Tensor(Id),
}

const _: () = assert!(size_of::<Value>() == 16);

/// A class or function, by what it means for tensors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Class {
    OrderedDict,
    /// `_rebuild_tensor_v2(storage, offset, shape, strides, ...)`.
    Tensor,
    /// `_rebuild_parameter(tensor, ...)`, also with a state.
    Parameter,
    /// `_rebuild_from_type_v2(function, type, arguments, state)`: a tensor with attributes.
    FromType,
    Storage(Dtype),
    Other,
}

impl Class {
    pub fn of(module: &str, name: &str) -> Self {
        match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::Tensor,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Self::Parameter,
            ("torch._tensor", "_rebuild_from_type_v2") => Self::FromType,
            ("torch" | "torch.storage", storage) => match storage {
                "FloatStorage" => Self::Storage(Dtype::F32),
                "HalfStorage" => Self::Storage(Dtype::F16),
                "BFloat16Storage" => Self::Storage(Dtype::BF16),
                "DoubleStorage" => Self::Storage(Dtype::F64),
                "LongStorage" => Self::Storage(Dtype::I64),
                "IntStorage" => Self::Storage(Dtype::I32),
                "ShortStorage" => Self::Storage(Dtype::I16),
                "CharStorage" => Self::Storage(Dtype::I8),
                "ByteStorage" => Self::Storage(Dtype::U8),
                "BoolStorage" => Self::Storage(Dtype::BOOL),
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// Place of a tensor.
#[derive(Debug)]
pub(super) struct Tensor<'a> {
    pub storage: &'a str,
    pub dtype: Dtype,
    /// Of the first element, in elements.
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<u64>,
}
