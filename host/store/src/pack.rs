//! Writes snapshots: a header, and packs of pages, of entries and of records in flight.

use cofferdam_connector::state::ConnectorState;
use cofferdam_core::checkpoint::chain::{PackPages, Written};
use cofferdam_sandbox::{INVENTORY, MemorySnapshot};
use serde::{Deserialize, Serialize};

use crate::{
    Generation, Result, StorageError,
    declared::{Entries, Entry, each_block, encode_entries},
    in_flight::ChannelState,
    key::{KIND_DECLARED, KIND_HEADER, KIND_IN_FLIGHT, KIND_MEMORY, KIND_STATE, value_key},
    metadata::seal_into,
    snapshot::TaskSnapshot,
};

/// Pages in one stored value: 256 KiB.
pub(crate) const PACK_PAGES: usize = 64;

/// Bytes of declared state in one stored value.
pub(crate) const PACK_BYTES: usize = 64 << 10;

/// Bytes of a connector's state in one stored value. What is smaller is in the header.
pub(crate) const STATE_PACK_BYTES: usize = 256 << 10;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Header {
    /// A connector's state that is not in packs.
    #[serde(with = "serde_bytes")]
    pub(crate) state: Vec<u8>,
    pub(crate) is_drained: bool,
    /// See [`INVENTORY`].
    pub(crate) inventory: u16,
    pub(crate) globals: Vec<i64>,
    pub(crate) monotonic_ns: u64,
    /// Size and changed pages of each memory.
    pub(crate) memories: Vec<(u64, u64)>,
    pub(crate) memory_packs: u32,
    pub(crate) declared_packs: u32,
    pub(crate) is_declared_whole: bool,
    /// Packs of declared state belong to this snapshot, though there may be none. If not, and it has pages,
    /// declared state is in the image alone: packs of earlier snapshots are older than it.
    pub(crate) holds_declared: bool,
    pub(crate) in_flight_packs: u32,
    /// Every pack is an LZ4 block behind its size.
    pub(crate) is_compressed: bool,
    /// Packs of a connector's state, and its bytes. Behind all else: format 6 ends before it.
    #[serde(skip)]
    pub(crate) state_packs: (u32, u64),
}

impl Header {
    fn encode(&self) -> Result<Vec<u8>> {
        postcard::to_stdvec(self)
            .and_then(|bytes| postcard::to_extend(&self.state_packs, bytes))
            .map_err(|error| StorageError::store("encode a header", error))
    }

    /// Reads what `encode` wrote.
    pub(crate) fn decode(bytes: &[u8]) -> std::result::Result<Self, postcard::Error> {
        let (mut header, rest) = postcard::take_from_bytes::<Self>(bytes)?;
        if !rest.is_empty() {
            header.state_packs = postcard::from_bytes(rest)?;
        }
        Ok(header)
    }

    /// How many bytes the connector's state has.
    pub(crate) fn state_bytes(&self) -> u64 {
        self.state.len() as u64 + self.state_packs.1
    }
}

pub(crate) struct PackWriter<'a> {
    generation: &'a mut dyn Generation,
    task: usize,
    checkpoint: u64,
    is_compressing: bool,
    pub(crate) bytes: u64,
    /// One value, with its checksum in front.
    framed: Vec<u8>,
}

impl<'a> PackWriter<'a> {
    pub(crate) fn new(
        generation: &'a mut dyn Generation,
        task: usize,
        checkpoint: u64,
        is_compressing: bool,
    ) -> Self {
        Self { generation, task, checkpoint, is_compressing, bytes: 0, framed: Vec::new() }
    }

    /// Writes all of a snapshot, with this run of declared state.
    pub(crate) fn snapshot(
        &mut self,
        snapshot: &TaskSnapshot,
        declared: Option<Entries<'_>>,
    ) -> Result<Written> {
        let declared_packs = declared.map(|run| self.declared(0, run)).transpose()?;
        self.snapshot_with(snapshot, declared_packs)
    }

    /// The same where the packs of declared state are written already.
    pub(crate) fn snapshot_with(
        &mut self,
        snapshot: &TaskSnapshot,
        declared_packs: Option<u32>,
    ) -> Result<Written> {
        let holds_declared = declared_packs.is_some();
        let declared_packs = declared_packs.unwrap_or(0);
        let packs = match &snapshot.memory {
            Some(memory) => self.memory(memory)?,
            None => Vec::new(),
        };
        let in_flight_packs = self.in_flight(&snapshot.in_flight)?;
        let (state, state_packs) = match snapshot.state.len() < STATE_PACK_BYTES {
            true => (snapshot.state.to_vec(), (0, 0)),
            false => (Vec::new(), self.state(&snapshot.state)?),
        };
        let memory = snapshot.memory.as_deref();
        let sizes = |memory: &MemorySnapshot| {
            memory
                .memories
                .iter()
                .map(|delta| (delta.size_bytes(), delta.page_count() as u64))
                .collect()
        };
        let header = Header {
            state,
            is_drained: snapshot.is_drained,
            inventory: INVENTORY,
            globals: memory.map_or_else(Vec::new, |memory| memory.globals.clone()),
            monotonic_ns: memory.map_or(0, |memory| memory.monotonic_ns),
            memories: memory.map_or_else(Vec::new, sizes),
            memory_packs: packs.len() as u32,
            declared_packs,
            is_declared_whole: snapshot.is_declared_whole,
            holds_declared,
            in_flight_packs,
            is_compressed: self.is_compressing,
            state_packs,
        };
        let payload = header.encode()?;
        self.put(KIND_HEADER, 0, |value| value.extend_from_slice(&payload))?;
        let is_lasting = 0 < declared_packs || snapshot.is_declared_whole;
        Ok(Written { bytes: self.bytes, packs, is_lasting, replaces: Vec::new() })
    }

    fn put(&mut self, kind: u8, sequence: u32, fill: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let key = value_key(self.checkpoint, self.task, kind, sequence);
        seal_into(&mut self.framed, &key, fill);
        self.bytes += (key.len() + self.framed.len()) as u64;
        self.generation.put(&key, &self.framed)
    }

    fn put_pack(&mut self, kind: u8, sequence: u32, fill: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        if !self.is_compressing {
            return self.put(kind, sequence, fill);
        }
        let mut payload = Vec::new();
        fill(&mut payload);
        let packed = lz4_flex::compress_prepend_size(&payload);
        self.put(kind, sequence, |value| value.extend_from_slice(&packed))
    }

    /// Packs of equal size, however large the chunks are. Gives their number, and that of the bytes.
    fn state(&mut self, state: &ConnectorState) -> Result<(u32, u64)> {
        let (mut packs, mut pack) = (0, Vec::with_capacity(STATE_PACK_BYTES));
        for chunk in state.chunks() {
            let mut chunk = &chunk[..];
            while !chunk.is_empty() {
                let (taken, rest) = chunk.split_at(chunk.len().min(STATE_PACK_BYTES - pack.len()));
                pack.extend_from_slice(taken);
                chunk = rest;
                if pack.len() == STATE_PACK_BYTES {
                    self.put_pack(KIND_STATE, packs, |value| value.extend_from_slice(&pack))?;
                    packs += 1;
                    pack.clear();
                }
            }
        }
        if !pack.is_empty() {
            self.put_pack(KIND_STATE, packs, |value| value.extend_from_slice(&pack))?;
            packs += 1;
        }
        Ok((packs, state.len() as u64))
    }

    /// A pack is what was on its way in one channel.
    fn in_flight(&mut self, channels: &[ChannelState]) -> Result<u32> {
        for (sequence, channel) in (0..).zip(channels) {
            let payload = postcard::to_stdvec(channel)
                .map_err(|error| StorageError::store("encode records in flight", error))?;
            self.put_pack(KIND_IN_FLIGHT, sequence, |value| value.extend_from_slice(&payload))?;
        }
        Ok(channels.len() as u32)
    }

    /// A pack is the memory's number, a count, that many page numbers, and the pages. Gives the pages of
    /// each.
    fn memory(&mut self, snapshot: &MemorySnapshot) -> Result<Vec<PackPages>> {
        let mut packs = Vec::new();
        for (memory, delta) in (0u32..).zip(&snapshot.memories) {
            let pages: Vec<(u32, &[u8])> = delta.pages().collect();
            for pack in pages.chunks(PACK_PAGES) {
                self.put_pack(KIND_MEMORY, packs.len() as u32, |value| {
                    value.extend_from_slice(&memory.to_le_bytes());
                    value.extend_from_slice(&(pack.len() as u32).to_le_bytes());
                    pack.iter().for_each(|(page, _)| value.extend_from_slice(&page.to_le_bytes()));
                    pack.iter().for_each(|(_, bytes)| value.extend_from_slice(bytes));
                })?;
                packs.push((memory, pack.iter().map(|(page, _)| *page).collect()));
            }
        }
        Ok(packs)
    }

    /// A pack is a list of entries in the order of their keys; no value: removed. Gives the number behind the
    /// last one.
    pub(crate) fn declared(&mut self, mut sequence: u32, run: Entries<'_>) -> Result<u32> {
        each_block(run, PACK_BYTES, |pack| {
            self.declared_pack(sequence, pack)?;
            sequence += 1;
            Ok(())
        })?;
        Ok(sequence)
    }

    fn declared_pack(&mut self, sequence: u32, pack: &[Entry]) -> Result<()> {
        let payload = encode_entries(pack)
            .map_err(|error| StorageError::store("encode declared state", error))?;
        self.put_pack(KIND_DECLARED, sequence, |value| value.extend_from_slice(&payload))
    }
}
