//! Decides which snapshots make up a task's state at a checkpoint, and what of them is written once more.
//!
//! A page counts in the newest snapshot that has it. A snapshot of which nothing counts any more is
//! dead, and a checkpoint from then on does without it. Where little of one counts, those pages are
//! carried forward: written once more, before the next snapshot and apart from it, and it is dead, too.
//! So what changes everywhere is written once, and what seldom changes comes to lie by itself and is not
//! written again and again, as in a log-structured file system (Rosenblum and Ousterhout, 1992).
//!
//! All of this is known of what this process has written. Of snapshots that were there before, nothing
//! is; a compaction replaces them.
//!
//! A snapshot is named by the number of its checkpoint, from 1; what is carried forward with it has a bit more.

/// A chain keeps a third more pages than count, or so many.
const GARBAGE_PAGES_MIN: u64 = 64;

/// Less than this of what was given up is not worth merging.
const GIVEN_UP_BYTES_MIN: u64 = 4 << 20;

/// True where what is of these sizes is to be made one: where all but the largest have half as many bytes as
/// that, or so many. So what merging costs is in proportion to what was written since.
#[must_use]
pub fn are_worth_merging(sizes: impl Iterator<Item = u64> + Clone, least: u64) -> bool {
    let largest = sizes.clone().max().unwrap_or(0);
    least.max(largest / 2) < sizes.sum::<u64>() - largest
}

/// The bit of an id that says: pages carried forward, for the snapshot whose id has the other bits.
const CARRIED: u64 = 1 << 63;

/// The id under which pages are stored that are carried forward with the snapshot of a checkpoint.
pub fn carried_with(checkpoint: u64) -> u64 {
    checkpoint | CARRIED
}

/// The checkpoint that the id of a snapshot is for.
pub fn checkpoint_of(id: u64) -> u64 {
    id & !CARRIED
}

/// Where a snapshot stands in its chain: what is carried with another is older.
fn order(id: u64) -> (u64, bool) {
    (checkpoint_of(id), id & CARRIED == 0)
}

/// The pages of a pack: the number of their memory, and their own.
pub type PackPages = (u32, Vec<u32>);

/// What was written of a snapshot.
#[derive(Debug, Default)]
pub struct Written {
    /// How much it takes in storage.
    pub bytes: u64,
    /// The pages of each of its packs of memory.
    pub packs: Vec<PackPages>,
    /// Whether it counts for as long as the chain does: its entries of declared state are not followed.
    pub is_lasting: bool,
    /// Snapshots that it stands for: they are dead from then on.
    pub replaces: Vec<u64>,
}

/// The snapshots of one task, oldest first.
#[derive(Debug, Default)]
pub struct SnapshotChain {
    entries: Vec<ChainEntry>,
    /// By memory and page: the snapshot that holds its newest version; 0: not known.
    owners: Vec<Vec<u64>>,
    /// Of what is not known by page, so many bytes did not count when it was.
    garbage_before: u64,
}

#[derive(Debug)]
struct ChainEntry {
    id: u64,
    /// All that was written of it; 0: not known.
    bytes: u64,
    /// All of it counts for as long as nobody knows better: nothing was there before it, or what did not
    /// count was reckoned.
    is_base: bool,
    packs: Vec<PackPages>,
    /// Pages that no later snapshot has; `None`: not known, or it counts for as long as the chain does.
    live_pages: Option<u64>,
    /// The checkpoint whose snapshot made it dead.
    dead_since: Option<u64>,
}

/// What a chain takes up, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// What counts.
    pub live: u64,
    /// What does not.
    pub garbage: u64,
}

impl ChainEntry {
    fn pages(&self) -> u64 {
        self.packs.iter().map(|(_, pages)| pages.len() as u64).sum()
    }
}

impl SnapshotChain {
    /// A chain that was read back: what its snapshots hold is not known.
    pub fn of(ids: &[u64]) -> Self {
        let unknown = |id: &u64| ChainEntry {
            id: *id,
            bytes: 0,
            is_base: false,
            packs: Vec::new(),
            live_pages: None,
            dead_since: None,
        };
        Self { entries: ids.iter().map(unknown).collect(), ..Self::default() }
    }

    /// The chain that ends with an earlier checkpoint. Pages that were written since count again, so of
    /// none it is known any more where it counts; but how much there is is.
    pub fn back_to(&self, ids: &[u64]) -> Self {
        let mut chain = Self::of(ids);
        for link in &mut chain.entries {
            if let Some(known) = self.entries.iter().find(|known| known.id == link.id) {
                (link.bytes, link.is_base) = (known.bytes, true);
            }
        }
        chain.garbage_before = self.footprint().garbage;
        chain
    }

    /// A chain of one snapshot, which has everything.
    pub fn begun_with(id: u64, written: Written) -> Self {
        let mut chain = Self::default();
        chain.push(id, written);
        chain
    }

    /// How many snapshots there are, dead ones among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True before the first snapshot.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Its snapshots, oldest first, dead ones among them.
    pub fn ids(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().map(|link| link.id)
    }

    /// The snapshots that a checkpoint consists of. Later ones may be there already.
    pub fn as_of(&self, checkpoint: u64) -> Vec<u64> {
        let counts = |link: &&ChainEntry| {
            checkpoint_of(link.id) <= checkpoint
                && link.dead_since.is_none_or(|since| checkpoint < since)
        };
        self.entries.iter().filter(counts).map(|link| link.id).collect()
    }

    /// The next snapshot was written, or pages that are carried forward with it.
    pub fn push(&mut self, id: u64, written: Written) {
        let Written { bytes, packs, is_lasting, replaces } = written;
        let checkpoint = checkpoint_of(id);
        for (memory, page) in each_page(&packs) {
            let before = std::mem::replace(self.owner_mut(memory, page), id);
            if let Some(link) = self.entry_mut(before) {
                link.live_pages = link.live_pages.map(|live| live.saturating_sub(1));
            }
        }
        // A snapshot without any page of its own, or without any left, counts up to this one.
        for link in self.entries.iter_mut().filter(|link| link.live_pages == Some(0)) {
            link.dead_since.get_or_insert(checkpoint);
        }
        for link in self.entries.iter_mut().filter(|link| replaces.contains(&link.id)) {
            link.dead_since.get_or_insert(checkpoint);
        }
        let is_base = self.entries.is_empty();
        let mut link = ChainEntry { id, bytes, is_base, packs, live_pages: None, dead_since: None };
        link.live_pages = (!is_lasting).then(|| link.pages());
        self.entries.push(link);
    }

    /// The snapshots whose pages are to be carried forward with the next one, which has these: so that the
    /// chain does not keep too much that does not count.
    pub fn sparse_without(&self, packs: &[PackPages]) -> Vec<u64> {
        let mut links: Vec<(u64, u64, u64)> = Vec::new();
        for link in self.entries.iter().filter(|link| link.dead_since.is_none()) {
            let Some(live) = link.live_pages else { continue };
            links.push((link.id, link.pages(), live));
        }
        for (memory, page) in each_page(packs) {
            let owner = self.owner(memory, page);
            if let Ok(place) = links.binary_search_by_key(&order(owner), |(id, ..)| order(*id)) {
                links[place].2 = links[place].2.saturating_sub(1);
            }
        }
        links.retain(|(_, _, live)| 0 < *live);
        let next = each_page(packs).count() as u64;
        let live: u64 = next + links.iter().map(|(_, _, live)| live).sum::<u64>();
        let mut stored: u64 = next + links.iter().map(|(_, pages, _)| pages).sum::<u64>();
        // The sparsest first.
        links.sort_by(|(_, pages, live), (_, other_pages, other_live)| {
            (live * other_pages).cmp(&(other_live * pages))
        });
        let mut sparse = Vec::new();
        for (id, pages, live_of_it) in links {
            if stored - live <= GARBAGE_PAGES_MIN.max(live / 3) {
                break;
            }
            stored -= pages - live_of_it;
            sparse.push(id);
        }
        sparse
    }

    /// Snapshots with declared state that lie between these two checkpoints, which is to say that they are
    /// of checkpoints which were given up: those that are to be made one with the next snapshot, so that
    /// they do not become more and more. What this costs is in proportion to what was written since.
    pub fn given_up(&self, completed: u64, pending: u64) -> Vec<u64> {
        let is_lasting = |link: &&ChainEntry| {
            let is_known = link.live_pages.is_none() && link.dead_since.is_none();
            is_known && completed < checkpoint_of(link.id)
        };
        let links: Vec<&ChainEntry> = self.entries.iter().filter(is_lasting).collect();
        // One that may still be asked for lies over them.
        if links.iter().any(|link| pending <= checkpoint_of(link.id)) {
            return Vec::new();
        }
        match are_worth_merging(links.iter().map(|link| link.bytes), GIVEN_UP_BYTES_MIN) {
            true => links.into_iter().map(|link| link.id).collect(),
            false => Vec::new(),
        }
    }

    /// The packs of a snapshot that have pages which count, by their numbers.
    pub fn live_packs(&self, id: u64) -> impl Iterator<Item = usize> {
        let packs = self.entries.iter().filter(move |link| link.id == id).flat_map(|it| &it.packs);
        packs.enumerate().filter_map(move |(at, (memory, pages))| {
            pages.iter().any(|page| self.owner(*memory, *page) == id).then_some(at)
        })
    }

    /// The snapshot that holds the newest version of a page; 0: not known.
    pub fn owner(&self, memory: u32, page: u32) -> u64 {
        let owners = self.owners.get(memory as usize);
        owners.and_then(|owners| owners.get(page as usize)).copied().unwrap_or(0)
    }

    fn owner_mut(&mut self, memory: u32, page: u32) -> &mut u64 {
        let (memory, page) = (memory as usize, page as usize);
        if self.owners.len() <= memory {
            self.owners.resize_with(memory + 1, Vec::new);
        }
        let owners = &mut self.owners[memory];
        if owners.len() <= page {
            owners.resize(page + 1, 0);
        }
        &mut owners[page]
    }

    fn entry_mut(&mut self, id: u64) -> Option<&mut ChainEntry> {
        let place = self.entries.binary_search_by_key(&order(id), |link| order(link.id)).ok()?;
        self.entries.get_mut(place)
    }

    /// Forgets dead snapshots that no checkpoint from this one on consists of; whether there were any.
    pub fn drop_dead(&mut self, needed_from: u64) -> bool {
        let before = self.entries.len();
        self.entries.retain(|link| link.dead_since.is_none_or(|since| needed_from < since));
        self.entries.len() < before
    }

    /// What it takes up. Where it is not known what the first snapshot holds, all of that counts and
    /// nothing behind it.
    pub fn footprint(&self) -> Footprint {
        let is_unknown = |link: &ChainEntry| link.live_pages.is_none();
        let begins_unknown = self.entries.first().is_none_or(is_unknown);
        let mut footprint = Footprint::default();
        for link in &self.entries {
            let live = match link.live_pages {
                // Without pages it is what is not made of pages: a position, records in flight.
                Some(0) if link.packs.is_empty() && link.dead_since.is_none() => link.bytes,
                Some(live) if !begins_unknown => link.bytes / link.pages().max(1) * live,
                None if link.is_base => link.bytes,
                _ => 0,
            };
            footprint.live += live.min(link.bytes);
            footprint.garbage += link.bytes - live.min(link.bytes);
        }
        let garbage_before = self.garbage_before.min(footprint.live);
        footprint.live -= garbage_before;
        footprint.garbage += garbage_before;
        footprint
    }
}

fn each_page(packs: &[PackPages]) -> impl Iterator<Item = (u32, u32)> {
    packs.iter().flat_map(|(memory, pages)| pages.iter().map(|page| (*memory, *page)))
}
