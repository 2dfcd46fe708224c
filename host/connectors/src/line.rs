//! What sinks write of a record.

use cofferdam_contract::Batch;
use cofferdam_settings::{Setting, table::Key};

/// What a sink writes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineContent {
    /// The value.
    Value,
    /// The key, a tab, the value.
    KeyValue,
}

pub(crate) static LINE: Setting<LineContent> = Key::choice(
    "line",
    &[("value", LineContent::Value), ("key-value", LineContent::KeyValue)],
    "`key-value`: key, tab, value",
)
.of_job()
.or(LineContent::Value);

/// Appends a batch as lines.
pub(crate) fn push_lines(batch: &Batch, line: LineContent, buffer: &mut Vec<u8>) {
    for record in batch.records() {
        if let (LineContent::KeyValue, Some(key)) = (line, record.key) {
            buffer.extend_from_slice(key);
            buffer.push(b'\t');
        }
        buffer.extend_from_slice(record.value);
        buffer.push(b'\n');
    }
}
