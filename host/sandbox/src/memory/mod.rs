//! The linear memories of guests: who maps them, who may look at them, and when.
//!
//! Wasmtime asks for each memory through [`Creator`]; what it gets is a [`Region`] that the
//! [`Instance`](crate::Instance) also keeps hold of, so that the host can copy pages out and map a
//! snapshot in while no guest code runs. A region stays mapped until the last of both is dropped.
#![allow(unsafe_code, reason = "maps and reads guest memory; each block says why it is sound")]

pub mod image;
pub mod track;

use std::{
    cell::RefCell,
    ffi::c_void,
    fs::File,
    io, ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rustix::mm::{self, MapFlags, MprotectFlags, ProtFlags};
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

use self::track::Tracking;

/// How the error begins where a memory cannot be made. The library that makes it passes on text alone.
pub(crate) const NOT_RESERVED: &str = "reserve an address space";

/// The unit in which memory is tracked, copied and stored.
pub const PAGE_BYTES: usize = 4096;

/// One linear memory: a reservation of address space whose front is accessible.
pub(crate) struct Region {
    base: *mut u8,
    /// The whole reservation, guard included.
    mapped_bytes: usize,
    /// What the guest may grow to.
    capacity_bytes: usize,
    /// What the guest can access now. Only ever grows.
    size_bytes: AtomicUsize,
    /// Snapshots will be taken of it.
    is_expected: AtomicBool,
    /// By how much it has grown since the last one.
    expected_bytes: AtomicUsize,
}

// SAFETY: `base` is a mapping owned by this value and unmapped only when it is dropped. Access to
// the bytes behind it is governed by `Instance`: it hands out none while guest code runs.
unsafe impl Send for Region {}
// SAFETY: as above; the fields themselves are atomic or never change.
unsafe impl Sync for Region {}

impl Region {
    fn reserve(
        minimum: usize,
        capacity: usize,
        guard: usize,
        tracking: &Tracking,
    ) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let mapped_bytes = (capacity + guard).next_multiple_of(page);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing.
        let base = unsafe {
            mm::mmap_anonymous(ptr::null_mut(), mapped_bytes, ProtFlags::empty(), flags)?
        };
        let region = Self {
            base: base.cast(),
            mapped_bytes,
            capacity_bytes: capacity,
            size_bytes: AtomicUsize::new(0),
            is_expected: AtomicBool::new(false),
            expected_bytes: AtomicUsize::new(0),
        };
        if 0 < capacity {
            tracking.register(region.base, capacity.next_multiple_of(page))?;
        }
        region.grow_to(minimum)?;
        Ok(region)
    }

    /// Makes the front of the reservation accessible.
    fn grow_to(&self, new_size: usize) -> io::Result<()> {
        let old_size = self.size_bytes();
        if self.capacity_bytes < new_size {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "beyond the reservation"));
        }
        if old_size < new_size {
            let flags = MprotectFlags::READ | MprotectFlags::WRITE;
            // SAFETY: the range lies within this region's own mapping; making more of it
            // accessible cannot invalidate any reference.
            unsafe { mm::mprotect(self.at(old_size), new_size - old_size, flags)? };
            self.size_bytes.store(new_size, Ordering::Release);
            if self.is_expected.load(Ordering::Relaxed) {
                self.expected_bytes.fetch_add(new_size - old_size, Ordering::Relaxed);
                image::expect(new_size - old_size, 0);
            }
        }
        Ok(())
    }

    /// Snapshots will be taken: the buffers for what it grows by are made beforehand.
    pub(crate) fn expect_snapshots(&self) {
        self.is_expected.store(true, Ordering::Relaxed);
    }

    /// What it has grown by needs no more buffers than any other page.
    pub(crate) fn is_copied(&self) {
        image::expect(0, self.expected_bytes.swap(0, Ordering::Relaxed));
    }

    /// How much of the region is accessible.
    pub(crate) fn size_bytes(&self) -> usize {
        self.size_bytes.load(Ordering::Acquire)
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// The accessible bytes.
    ///
    /// # Safety
    /// No guest code may run, and nothing may be mapped over the region, while the slice lives.
    pub(crate) unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the front of the mapping is readable up to `size_bytes` and lives as long as
        // `self`; that nobody writes meanwhile is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.base, self.size_bytes()) }
    }

    /// Replaces the accessible bytes by a private view of `file`: what the guest writes from now
    /// on is its own copy, page by page, and the file stays as it is.
    ///
    /// # Safety
    /// No guest code may run and no reference into the region may live.
    ///
    /// # Errors
    /// Where `file` is shorter than the region: a page behind its end would be a bus error.
    pub(crate) unsafe fn map_privately(&self, file: &File, tracking: &Tracking) -> io::Result<()> {
        let len = self.size_bytes();
        if len == 0 {
            return Ok(());
        }
        let file_bytes = file.metadata()?.len();
        if file_bytes < len as u64 {
            let what = format!("an image of {file_bytes} bytes for a memory of {len}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: FIXED replaces pages of this region's own mapping only, and the caller promises
        // that nobody looks at them. The new pages are as accessible as the old ones.
        unsafe { mm::mmap(self.at(0), len, protection, flags, file, 0)? };
        tracking.register(self.base, len)
    }

    fn at(&self, offset: usize) -> *mut c_void {
        self.base.wrapping_add(offset).cast()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.is_copied();
        // SAFETY: the mapping is this region's own, and the last owner is going away.
        let unmapped = unsafe { mm::munmap(self.at(0), self.mapped_bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "unmap a guest's memory");
        }
    }
}

/// What wasmtime holds of a region.
struct GuestMemory(Arc<Region>);

// SAFETY: the pointer stays valid and in place for the life of the value, `byte_size` bytes
// behind it are readable and writable, and the guard behind the capacity is never made accessible.
unsafe impl LinearMemory for GuestMemory {
    fn byte_size(&self) -> usize {
        self.0.size_bytes()
    }

    fn byte_capacity(&self) -> usize {
        self.0.capacity_bytes
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        self.0.grow_to(new_size).map_err(wasmtime::Error::from)
    }

    fn as_ptr(&self) -> *mut u8 {
        self.0.base
    }
}

thread_local! {
    /// The memories of the instantiation that is being polled on this thread: wasmtime does not
    /// tell a creator for which store it is asked.
    static CREATED: RefCell<Option<Vec<Arc<Region>>>> = const { RefCell::new(None) };
}

/// Runs `poll` and gives every region that was created meanwhile, in the order of creation.
pub(crate) fn collecting<T>(created: &mut Vec<Arc<Region>>, poll: impl FnOnce() -> T) -> T {
    CREATED.set(Some(Vec::new()));
    let result = poll();
    created.append(&mut CREATED.take().unwrap_or_default());
    result
}

/// Makes the memories of every instance.
pub(crate) struct Creator {
    pub(crate) tracking: Arc<Tracking>,
}

// SAFETY: each memory is a mapping of its own with the reservation and the guard that were asked
// for, none of which is accessible before the guest grows into it.
unsafe impl MemoryCreator for Creator {
    fn new_memory(
        &self,
        _ty: MemoryType,
        minimum: usize,
        maximum: Option<usize>,
        reserved_size_in_bytes: Option<usize>,
        guard_size_in_bytes: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        let capacity = reserved_size_in_bytes.or(maximum).unwrap_or(minimum).max(minimum);
        let region = Region::reserve(minimum, capacity, guard_size_in_bytes, &self.tracking)
            .map_err(|error| format!("{NOT_RESERVED} of {capacity} bytes: {error}"))?;
        let region = Arc::new(region);
        CREATED.with_borrow_mut(|created| {
            if let Some(created) = created {
                created.push(region.clone());
            }
        });
        Ok(Box::new(GuestMemory(region)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_grows_in_place_and_only_up_to_its_capacity() {
        let tracking = Tracking::compare();
        let region = Region::reserve(0, 1 << 20, 1 << 16, &tracking).expect("address space");
        let base = region.base();
        region.grow_to(65_536).expect("within the capacity");
        assert_eq!(region.base(), base);
        // SAFETY: no guest exists.
        assert!(unsafe { region.bytes() }.iter().all(|byte| *byte == 0));
        assert_eq!(region.size_bytes(), 65_536);
        assert!(region.grow_to((1 << 20) + 1).is_err());
        assert_eq!(region.size_bytes(), 65_536);
    }
}
