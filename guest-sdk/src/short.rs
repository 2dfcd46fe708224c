//! Copies, compares and hashes short keys and values in registers.
//!
//! Most have at most 16 bytes. In a guest a copy or comparison of a length that the compiler does
//! not know is a call, and that call costs more than the work. Two overlapping loads cover every
//! length from one power of two to the next.

/// Appends bytes.
#[inline]
pub(crate) fn append(out: &mut Vec<u8>, bytes: &[u8]) {
    let start = out.len();
    match bytes.len() {
        0 => {}
        1..=3 => bytes.iter().for_each(|byte| out.push(*byte)),
        len @ 4..=7 => {
            out.extend_from_slice(&word_at(bytes, 0).to_le_bytes());
            out.truncate(start + len - 4);
            out.extend_from_slice(&word_at(bytes, len - 4).to_le_bytes());
        }
        len @ 8..=16 => {
            out.extend_from_slice(&long_at(bytes, 0).to_le_bytes());
            out.truncate(start + len - 8);
            out.extend_from_slice(&long_at(bytes, len - 8).to_le_bytes());
        }
        _ => out.extend_from_slice(bytes),
    }
}

/// The bytes as text, if they are few and ASCII: the usual word, checked in two steps.
#[inline]
#[allow(unsafe_code, reason = "ASCII was checked, a word at a time")]
pub(crate) fn short_text(bytes: &[u8]) -> Option<&str> {
    const HIGH_BITS: u64 = 0x8080_8080_8080_8080;
    let all = match bytes.len() {
        len @ 1..=3 => u64::from(bytes[0]) | u64::from(bytes[len / 2]) | u64::from(bytes[len - 1]),
        len @ 4..=7 => u64::from(word_at(bytes, 0)) | u64::from(word_at(bytes, len - 4)),
        len @ 8..=16 => long_at(bytes, 0) | long_at(bytes, len - 8),
        _ => return None,
    };
    // SAFETY: every byte was looked at and none has its highest bit set, and ASCII is UTF-8.
    (all & HIGH_BITS == 0).then(|| unsafe { std::str::from_utf8_unchecked(bytes) })
}

/// True for equal keys.
#[inline]
pub(crate) fn is_same(left: &[u8], right: &[u8]) -> bool {
    if left.len() != right.len() {
        return false;
    }
    match left.len() {
        0 => true,
        1..=3 => left.iter().eq(right),
        len @ 4..=7 => {
            word_at(left, 0) == word_at(right, 0)
                && word_at(left, len - 4) == word_at(right, len - 4)
        }
        len @ 8..=16 => {
            long_at(left, 0) == long_at(right, 0)
                && long_at(left, len - 8) == long_at(right, len - 8)
        }
        _ => left == right,
    }
}

/// Hashes a key by two multiplications for most: a guest only ever harms itself by its keys, so
/// speed counts and resistance to chosen keys does not.
#[inline]
pub(crate) fn hash(key: &[u8]) -> u64 {
    const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
    const SECOND: u64 = 0xd6e8_feb8_6659_fd93;
    let (head, tail) = match key.len() {
        0 => (0, 0),
        1..=3 => {
            (u64::from(key[0]) << 16 | u64::from(key[key.len() / 2]), u64::from(key[key.len() - 1]))
        }
        4..=7 => (u64::from(word_at(key, 0)), u64::from(word_at(key, key.len() - 4))),
        8..=16 => (long_at(key, 0), long_at(key, key.len() - 8)),
        len => {
            let inner = key.chunks_exact(8).fold(0u64, |hash, chunk| {
                (hash.rotate_left(23) ^ long_at(chunk, 0)).wrapping_mul(FIRST)
            });
            (inner, long_at(key, len - 8))
        }
    };
    let mixed = (head ^ key.len() as u64).wrapping_mul(FIRST) ^ tail.rotate_left(32);
    let hash = (mixed ^ (mixed >> 29)).wrapping_mul(SECOND);
    hash ^ (hash >> 32)
}

#[inline]
fn word_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

#[inline]
fn long_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_text_is_ascii_of_up_to_16_bytes() {
        for len in 0..=40 {
            let text = &"abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqr"[..len];
            assert_eq!(short_text(text.as_bytes()).is_some(), (1..=16).contains(&len));
            for place in 0..len {
                let mut bytes = text.as_bytes().to_vec();
                bytes[place] = 0xc3;
                assert_eq!(short_text(&bytes), None, "length {len}, place {place}");
            }
        }
    }

    #[test]
    fn every_length_is_copied_compared_and_hashed_like_the_slice() {
        let bytes: Vec<u8> = (1..=40).collect();
        for len in 0..=bytes.len() {
            let key = &bytes[..len];
            let mut out = vec![0xee; 3];
            append(&mut out, key);
            assert_eq!(out, [&[0xee; 3], key].concat(), "length {len}");
            assert!(is_same(key, &out[3..]));
            assert_eq!(hash(key), hash(&out[3..]));
            for place in 0..len {
                let mut other = key.to_vec();
                other[place] ^= 1;
                assert!(!is_same(key, &other), "length {len}, place {place}");
                assert_ne!(hash(key), hash(&other), "length {len}, place {place}");
            }
        }
    }
}
