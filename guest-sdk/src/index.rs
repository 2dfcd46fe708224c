//! Finds the place of a key in a dense list: the look-up that a keyed operator does for every
//! record.
//!
//! Open addressing with linear probing over one word for each key: half of its hash and its place.
//! A word that does not match costs no look at the key, and most look-ups touch one cache line.

/// Places by the hash of their key. Knows no keys: anyone who asks compares.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// 0: empty. Else the upper half of the hash, and the place plus 1. A power of two of them.
    slots: Vec<u64>,
    len: usize,
}

/// At most three of four slots are taken.
const fn capacity(slots: usize) -> usize {
    slots / 4 * 3
}

fn slot_of(hash: u64, place: u32) -> u64 {
    hash & 0xffff_ffff_0000_0000 | u64::from(place + 1)
}

fn place_of(slot: u64) -> u32 {
    (slot as u32).wrapping_sub(1)
}

impl Index {
    /// The place with this hash for which `is_same` is true.
    #[inline(always)]
    pub(crate) fn find(&self, hash: u64, is_same: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len().wrapping_sub(1);
        let mut at = hash as usize & mask;
        loop {
            let slot = *self.slots.get(at)?;
            if slot == 0 {
                return None;
            }
            if slot >> 32 == hash >> 32 && is_same(place_of(slot)) {
                return Some(place_of(slot));
            }
            at = (at + 1) & mask;
        }
    }

    /// Adds a place that is not there yet. `hash_of` gives the hash of every other one.
    pub(crate) fn insert(&mut self, hash: u64, place: u32, hash_of: impl Fn(u32) -> u64) {
        if capacity(self.slots.len()) <= self.len {
            let slots = vec![0; (self.slots.len() * 2).max(16)];
            for slot in std::mem::replace(&mut self.slots, slots) {
                if slot != 0 {
                    self.put(hash_of(place_of(slot)), slot);
                }
            }
        }
        self.put(hash, slot_of(hash, place));
        self.len += 1;
    }

    fn put(&mut self, hash: u64, slot: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at] != 0 {
            at = (at + 1) & mask;
        }
        self.slots[at] = slot;
    }

    /// Removes a place; what lies behind it moves up, so that no look-up ends too early.
    pub(crate) fn remove(&mut self, hash: u64, place: u32, hash_of: impl Fn(u32) -> u64) {
        let mask = self.slots.len().wrapping_sub(1);
        let mut at = hash as usize & mask;
        while self.slots.get(at).is_some_and(|slot| *slot != 0 && place_of(*slot) != place) {
            at = (at + 1) & mask;
        }
        if self.slots.get(at).is_none_or(|slot| *slot == 0) {
            return;
        }
        self.len -= 1;
        let mut next = (at + 1) & mask;
        while self.slots[next] != 0 {
            let wanted = hash_of(place_of(self.slots[next])) as usize & mask;
            // It may move to `at` if its own slot does not lie between both.
            if next.wrapping_sub(wanted) & mask >= next.wrapping_sub(at) & mask {
                self.slots[at] = self.slots[next];
                at = next;
            }
            next = (next + 1) & mask;
        }
        self.slots[at] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Few different hashes, so that keys collide all the time.
    fn hash_of(place: u32) -> u64 {
        u64::from(place % 7) * 0x0101_0000_0003
    }

    #[test]
    fn random_changes_equal_a_set() {
        let mut index = Index::default();
        let mut known = std::collections::BTreeSet::new();
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let place = (random >> 40) as u32 % 300;
            if known.remove(&place) {
                index.remove(hash_of(place), place, hash_of);
            } else {
                known.insert(place);
                index.insert(hash_of(place), place, hash_of);
            }
            let probe = (random >> 20) as u32 % 300;
            let found = index.find(hash_of(probe), |place| place == probe);
            assert_eq!(found, known.contains(&probe).then_some(probe));
            assert_eq!(index.len, known.len());
        }
    }

    #[test]
    fn nothing_is_found_in_nothing() {
        let mut index = Index::default();
        assert_eq!(index.find(5, |_| true), None);
        index.remove(5, 1, |_| 0);
        assert_eq!(index.len, 0);
    }
}
