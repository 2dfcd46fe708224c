//! Maps key -> key group -> task; the only place where partitioning is defined.
//!
//! Keyed state moves by key group when a job is rescaled, so a key's group must never depend on
//! the parallelism. The formulas are Flink's (`KeyGroupRangeAssignment`), the hash is murmur3
//! (x86, 32 bit, seed 0) of the key's bytes.

use std::ops::Range;

/// The smallest and the largest number of key groups that is chosen by default.
const DEFAULT_MAX_PARALLELISM: (u32, u32) = (128, 1 << 15);

/// The number of key groups of an operator whose manifest sets none.
///
/// ```
/// # use cofferdam_core::key_group::default_max_parallelism;
/// assert_eq!(default_max_parallelism(2), 128);
/// assert_eq!(default_max_parallelism(200), 512);
/// ```
#[must_use]
pub fn default_max_parallelism(parallelism: u32) -> u32 {
    let (low, high) = DEFAULT_MAX_PARALLELISM;
    let wanted = u64::from(parallelism) + u64::from(parallelism) / 2;
    let rounded = wanted.next_power_of_two().min(u64::from(high));
    u32::try_from(rounded).unwrap_or(high).max(low)
}

/// The key group of a key: `murmur3(key) % max_parallelism`.
#[must_use]
#[inline]
pub fn key_group(key: &[u8], max_parallelism: u32) -> u32 {
    let hash = murmur3(key);
    // The usual case, and a division costs as much as the hash.
    if max_parallelism.is_power_of_two() {
        hash & (max_parallelism - 1)
    } else {
        hash % max_parallelism
    }
}

/// The task that owns a key group.
#[must_use]
#[inline]
pub fn task_index(key_group: u32, parallelism: u32, max_parallelism: u32) -> u32 {
    let index = u64::from(key_group) * u64::from(parallelism) / u64::from(max_parallelism);
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// The key groups that a task owns.
#[must_use]
pub fn key_groups_of(index: u32, parallelism: u32, max_parallelism: u32) -> Range<u32> {
    let (index, parallelism, max) =
        (u64::from(index), u64::from(parallelism), u64::from(max_parallelism));
    let first = (index * max).div_ceil(parallelism);
    let end = ((index + 1) * max - 1) / parallelism + 1;
    u32::try_from(first).unwrap_or(u32::MAX)..u32::try_from(end).unwrap_or(u32::MAX)
}

/// MurmurHash3, the 32-bit x86 variant with seed 0 (Austin Appleby, public domain).
#[inline]
fn murmur3(bytes: &[u8]) -> u32 {
    let mut hash = 0u32;
    let mut blocks = bytes.chunks_exact(4);
    for block in &mut blocks {
        let word = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        hash = (hash ^ scramble(word)).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    }
    let mut tail = 0u32;
    for (position, byte) in blocks.remainder().iter().enumerate() {
        tail |= u32::from(*byte) << (8 * position);
    }
    hash ^= scramble(tail);
    // The reference hashes the length modulo 2^32.
    hash ^= bytes.len() as u32;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[inline]
fn scramble(word: u32) -> u32 {
    word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn murmur3_gives_the_published_vectors() {
        for (key, hash) in [
            ("", 0u32),
            ("test", 0xba6b_d213),
            ("Hello, world!", 0xc036_3e43),
            ("The quick brown fox jumps over the lazy dog", 0x2e4f_f723),
        ] {
            assert_eq!(murmur3(key.as_bytes()), hash, "{key:?}");
        }
    }

    #[test]
    fn every_key_group_belongs_to_exactly_one_task() {
        for max in [1, 2, 7, 127, 128, 32768] {
            for parallelism in [1, 2, 3, 5, 7, 127, 128].into_iter().filter(|&p| p <= max) {
                let mut next = 0;
                for index in 0..parallelism {
                    let range = key_groups_of(index, parallelism, max);
                    assert_eq!(range.start, next, "{index} of {parallelism}, max {max}");
                    for group in range.clone() {
                        assert_eq!(task_index(group, parallelism, max), index);
                    }
                    next = range.end;
                }
                assert_eq!(next, max);
            }
        }
    }
}
