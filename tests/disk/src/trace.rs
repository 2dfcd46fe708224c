//! What a trace consists of. A record is `length u32, kind u8, number u64, number u64, bytes`, everything in
//! little endian; the length counts what follows it.

/// A file was made: its inode; its path.
pub(crate) const CREATE: u8 = b'c';
/// Bytes were written: inode, offset; the bytes.
pub(crate) const WRITE: u8 = b'w';
/// A file was given a length: inode, length.
pub(crate) const TRUNCATE: u8 = b't';
/// Bytes were made zero: inode, offset; the length as 8 bytes.
pub(crate) const PUNCH: u8 = b'p';
/// A file was synced: its inode.
pub(crate) const SYNC: u8 = b's';
/// A directory was synced: its path.
pub(crate) const SYNC_DIR: u8 = b'S';
/// A name was changed: old path, 0, new path.
pub(crate) const RENAME: u8 = b'r';
/// Another name was made: old path, 0, new path.
pub(crate) const LINK: u8 = b'l';
/// A name was removed: its path.
pub(crate) const UNLINK: u8 = b'u';
/// A directory was made: its path.
pub(crate) const MKDIR: u8 = b'm';
/// A directory was removed: its path.
pub(crate) const RMDIR: u8 = b'd';
/// The program has said something to its user or its log: the text.
pub(crate) const SAID: u8 = b'!';

/// A record, ready to be written.
pub(crate) fn record(kind: u8, first: u64, second: u64, bytes: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(4 + 17 + bytes.len());
    record.extend_from_slice(&(17 + bytes.len() as u32).to_le_bytes());
    record.push(kind);
    record.extend_from_slice(&first.to_le_bytes());
    record.extend_from_slice(&second.to_le_bytes());
    record.extend_from_slice(bytes);
    record
}

/// Two paths as the bytes of a record.
pub(crate) fn two(from: &[u8], to: &[u8]) -> Vec<u8> {
    [from, &[0], to].concat()
}
