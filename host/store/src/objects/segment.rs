//! A segment: values, and behind them an index of their keys.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

pub(crate) const MAGIC: [u8; 4] = *b"CFDS";

/// The end of a segment: length of the index, its checksum, version, magic.
pub(crate) const TAIL_BYTES: usize = 4 + 8 + 2 + 4;

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ValueLocation {
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What lies behind the values of a segment.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Index {
    /// Each value's key, offset and length.
    pub(crate) entries: Vec<(Vec<u8>, u64, u64)>,
    /// Keys in this segment or older ones that were deleted, each with the newest segment it is in.
    pub(super) deleted: Vec<(Vec<u8>, u64)>,
}

/// A segment that is being filled, or on its way.
#[derive(Debug, Default)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) values: Arc<Vec<u8>>,
    /// What lies behind the values, once it is on its way.
    pub(crate) tail: bytes::Bytes,
    pub(crate) entries: Vec<(Vec<u8>, u64, u64)>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
    pub(crate) live: u64,
}

/// The values of a segment, shared with its upload.
pub(crate) struct SharedValues(pub(super) Arc<Vec<u8>>);

impl AsRef<[u8]> for SharedValues {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

pub(crate) fn release(sizes: &mut BTreeMap<u64, Size>, location: ValueLocation) {
    if let Some(size) = sizes.get_mut(&location.segment) {
        size.live = size.live.saturating_sub(location.len);
    }
}
