//! Finds the pages that a guest has written since the last time it was asked.
//!
//! Two ways. The kernel's: pages are write-protected through userfaultfd in its asynchronous mode,
//! the first write to a page lifts the protection without waking anybody, and `PAGEMAP_SCAN` lists
//! the pages without it and protects them again, in one call. It costs a fault of well below a
//! microsecond on the first write to a page after a snapshot. Where the kernel or a container
//! forbids that, the memory is compared with a copy of what it was.
#![allow(unsafe_code, reason = "two ioctls on mappings of this process")]

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    ptr,
};

use rustix::{
    ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode},
    mm::{self, MapFlags, ProtFlags, UserfaultfdFlags},
};

use super::{PAGE_BYTES, Region};

/// How written pages are found. Chosen once, when the sandbox starts.
#[derive(Debug)]
pub enum Tracking {
    /// By the kernel's write protection.
    WriteProtect(WriteProtect),
    /// By comparing with a copy.
    Compare,
}

/// The kernel's side of write protection, for all memories of the process.
#[derive(Debug)]
pub struct WriteProtect {
    userfault: OwnedFd,
    pagemap: File,
}

/// A range of pages: the first, and the one after the last.
pub type PageRange = std::ops::Range<u32>;

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: u32 = 1;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;

/// Ranges asked for in one scan. More than the kernel buffers internally (512), few enough for
/// the result to stay in the cache.
const SCAN_RANGES: usize = 1024;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    ranges: u64,
    ranges_len: u64,
    pages_max: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRange {
    start: u64,
    end: u64,
    categories: u64,
}

/// `PAGEMAP_SCAN`, which answers with the number of ranges it found.
struct PagemapScan<'a>(&'a mut ScanArguments);

// SAFETY: the opcode is that of linux/fs.h for a structure of this layout, and the pointer given
// to the kernel is to such a structure, which lives during the call.
unsafe impl Ioctl for PagemapScan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<ScanArguments>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(
        out: IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        // The kernel answers with a count, never more than the number of ranges given.
        Ok(usize::try_from(out).unwrap_or(0))
    }
}

/// What is known of the pages that are scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Fresh or just mapped: a page that is not populated, or still is the image file's, was not
    /// written. The kernel has to look each of them up.
    Unprotected,
    /// Each was protected before, so the protection alone tells, which the kernel sees in the page
    /// table.
    Protected,
}

impl ScanArguments {
    fn of(pages: Pages) -> Self {
        let (category_inverted, category_mask, category_anyof_mask) = match pages {
            Pages::Unprotected => {
                let anyof = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
                // What is still the file's, or the kernel's page of zeros, was only read.
                let untouched = PAGE_IS_FILE | PAGE_IS_PFNZERO;
                (untouched, PAGE_IS_WRITTEN | untouched, anyof)
            }
            Pages::Protected => (0, PAGE_IS_WRITTEN, 0),
        };
        Self {
            size: size_of::<Self>() as u64,
            flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
            category_inverted,
            category_mask,
            category_anyof_mask,
            ..Self::default()
        }
    }
}

impl Tracking {
    /// The kernel's way where it works on this machine, else the portable one; with the reason
    /// why not.
    #[must_use]
    pub fn probe() -> (Self, Option<io::Error>) {
        match WriteProtect::open().and_then(|tracker| tracker.check().map(|()| tracker)) {
            Ok(tracker) => (Self::WriteProtect(tracker), None),
            Err(error) => (Self::Compare, Some(error)),
        }
    }

    /// The portable way.
    #[must_use]
    pub fn compare() -> Self {
        Self::Compare
    }

    /// Its name, for the log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::WriteProtect(_) => "userfaultfd write protection",
            Self::Compare => "comparison with a copy",
        }
    }

    /// Begins to track a mapping: whatever is written to it from now on will be found.
    pub(crate) fn register(&self, base: *mut u8, len: usize) -> io::Result<()> {
        match self {
            Self::WriteProtect(tracker) => tracker.register(base, len),
            Self::Compare => Ok(()),
        }
    }
}

impl WriteProtect {
    fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC
            | UserfaultfdFlags::NONBLOCK
            | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: a new descriptor; nothing is registered with it yet.
        let userfault = unsafe { mm::userfaultfd(flags)? };
        let mut api = UffdioApi {
            api: UFFD_API,
            features: FEATURE_PAGEFAULT_FLAG_WP
                | FEATURE_WP_HUGETLBFS_SHMEM
                | FEATURE_WP_UNPOPULATED
                | FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: opcode and structure are those of linux/userfaultfd.h.
        unsafe {
            const OPCODE: Opcode = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
            ioctl::ioctl(&userfault, ioctl::Updater::<OPCODE, _>::new(&mut api))?;
        }
        Ok(Self { userfault, pagemap: File::open("/proc/self/pagemap")? })
    }

    fn register(&self, base: *mut u8, len: usize) -> io::Result<()> {
        let mut register = UffdioRegister {
            start: base.addr() as u64,
            len: len as u64,
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: opcode and structure are those of linux/userfaultfd.h. Write protection in the
        // asynchronous mode changes nothing that the process can observe but the scan.
        unsafe {
            const OPCODE: Opcode = opcode::read_write::<UffdioRegister>(0xaa, 0x00);
            ioctl::ioctl(&self.userfault, ioctl::Updater::<OPCODE, _>::new(&mut register))?;
        }
        Ok(())
    }

    /// Adds the pages of `base..base + len` written since the last scan to `found`, in order, and
    /// protects them again.
    pub(crate) fn scan(
        &self,
        base: *const u8,
        len: usize,
        pages: Pages,
        found: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        let mut ranges = [ScanRange::default(); SCAN_RANGES];
        let end = (base.addr() + len) as u64;
        let mut start = base.addr() as u64;
        while start < end {
            let mut arguments = ScanArguments {
                start,
                end,
                ranges: ranges.as_mut_ptr().addr() as u64,
                ranges_len: SCAN_RANGES as u64,
                return_mask: PAGE_IS_WRITTEN,
                ..ScanArguments::of(pages)
            };
            // SAFETY: `ranges` is as long as `ranges_len` says and lives during the call; the scan
            // only reads page tables and sets the protection that `register` asked for.
            let count = unsafe { ioctl::ioctl(self.pagemap.as_fd(), PagemapScan(&mut arguments))? };
            let page_of =
                |address: u64| ((address - base.addr() as u64) / PAGE_BYTES as u64) as u32;
            for range in &ranges[..count.min(SCAN_RANGES)] {
                let range = page_of(range.start)..page_of(range.end);
                match found.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => found.push(range),
                }
            }
            if count < SCAN_RANGES {
                break;
            }
            // After more than 512 ranges the kernel's `walk_end` lags behind what it reported, and
            // continuing from there would give ranges twice.
            start = arguments.walk_end.max(ranges[count - 1].end);
        }
        Ok(())
    }

    /// Protects every page, also those that are not populated.
    fn protect(&self, base: *const u8, len: usize) -> io::Result<()> {
        let start = base.addr() as u64;
        let end = start + len as u64;
        let mut arguments = ScanArguments { start, end, ..ScanArguments::of(Pages::Protected) };
        // SAFETY: without ranges the scan writes nothing to this process's memory; it only sets
        // the protection that `register` asked for.
        unsafe { ioctl::ioctl(self.pagemap.as_fd(), PagemapScan(&mut arguments))? };
        Ok(())
    }

    /// Tries it on three pages: the features may be announced and still be forbidden.
    fn check(&self) -> io::Result<()> {
        let len = 3 * PAGE_BYTES;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping, unmapped below and used only here.
        let base = unsafe {
            mm::mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE)?.cast::<u8>()
        };
        let result = (|| {
            self.register(base, len)?;
            let mut seen = Vec::new();
            for page in [1usize, 2, 1] {
                let mut found = Vec::new();
                // SAFETY: the page lies within the mapping.
                unsafe { base.add(page * PAGE_BYTES).write_volatile(1) };
                self.scan(base, len, Pages::Unprotected, &mut found)?;
                seen.extend(found);
            }
            if seen != [1..2, 2..3, 1..2] {
                let message = format!("the page scan is wrong: {seen:?}");
                return Err(io::Error::other(message));
            }
            Ok(())
        })();
        // SAFETY: the mapping from above.
        unsafe { mm::munmap(base.cast(), len)? };
        result
    }
}

/// What one memory needs to be tracked.
#[derive(Debug, Default)]
pub(crate) struct Baseline {
    /// For the comparison: the memory as it was at the last snapshot.
    copy: Vec<u8>,
    /// For the kernel's way: up to here every page has been protected since the region was mapped.
    protected_bytes: usize,
}

impl Baseline {
    /// The pages of the region written since the last call.
    ///
    /// # Safety
    /// No guest code may run during the call.
    pub(crate) unsafe fn written_pages(
        &mut self,
        tracking: &Tracking,
        region: &Region,
    ) -> io::Result<Vec<PageRange>> {
        let mut found = Vec::new();
        match tracking {
            Tracking::WriteProtect(tracker) => self.scan(tracker, region, &mut found)?,
            // SAFETY: the caller's promise.
            Tracking::Compare => self.compare(unsafe { region.bytes() }, &mut found),
        }
        Ok(found)
    }

    /// The memory was replaced by a snapshot: nothing is written yet.
    ///
    /// # Safety
    /// No guest code may run during the call.
    pub(crate) unsafe fn reset(&mut self, tracking: &Tracking, region: &Region) {
        match tracking {
            // The new mapping was registered by the code that mapped it, and protects nothing yet:
            // that would make a restore as long as the memory is large.
            Tracking::WriteProtect(_) => self.protected_bytes = 0,
            Tracking::Compare => {
                self.copy.clear();
                // SAFETY: the caller's promise.
                self.copy.extend_from_slice(unsafe { region.bytes() });
            }
        }
    }

    fn scan(
        &mut self,
        tracker: &WriteProtect,
        region: &Region,
        found: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        let (known, size) = (self.protected_bytes, region.size_bytes());
        tracker.scan(region.base(), known, Pages::Protected, found)?;
        if known < size {
            let first = (known / PAGE_BYTES) as u32;
            // SAFETY: `known` lies within the region.
            let (base, len) = (unsafe { region.base().add(known) }, size - known);
            let mut grown = Vec::new();
            tracker.scan(base, len, Pages::Unprotected, &mut grown)?;
            tracker.protect(base, len)?;
            found.extend(grown.iter().map(|range| first + range.start..first + range.end));
            self.protected_bytes = size;
        }
        Ok(())
    }

    fn compare(&mut self, now: &[u8], found: &mut Vec<PageRange>) {
        // What was never seen counts as zero, which is what fresh memory is.
        self.copy.resize(now.len(), 0);
        let pages = self.copy.chunks_mut(PAGE_BYTES).zip(now.chunks(PAGE_BYTES));
        for (page, (old, new)) in (0u32..).zip(pages) {
            if old == new {
                continue;
            }
            old.copy_from_slice(new);
            match found.last_mut() {
                Some(last) if last.end == page => last.end = page + 1,
                _ => found.push(page..page + 1),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes the pages, in a fresh region, and gives what is found after each round.
    fn check(tracking: &Tracking, rounds: &[&[usize]]) -> Vec<Vec<PageRange>> {
        let region = Region::reserve(1 << 20, 1 << 20, 0, tracking).expect("memory");
        let mut baseline = Baseline::default();
        let mut answers = Vec::new();
        for pages in rounds {
            for page in *pages {
                // SAFETY: the page lies within the region and no reference to it lives.
                unsafe {
                    let at = region.base().add(page * PAGE_BYTES + 9);
                    at.write_volatile(at.read_volatile() + 1);
                }
            }
            // SAFETY: there is no guest.
            answers.push(unsafe { baseline.written_pages(tracking, &region) }.expect("scan"));
        }
        answers
    }

    #[test]
    fn every_way_finds_the_same_pages() {
        let rounds: [&[usize]; 5] = [&[0, 1, 2, 9], &[], &[1], &[255, 1], &[0, 255]];
        let expected =
            vec![vec![0..3, 9..10], vec![], vec![1..2], vec![1..2, 255..256], vec![0..1, 255..256]];
        assert_eq!(check(&Tracking::compare(), &rounds), expected);
        let (best, why) = Tracking::probe();
        eprintln!("tracking by {} {why:?}", best.name());
        assert_eq!(check(&best, &rounds), expected);
    }

    /// Reads or writes one byte of a page and gives what is found after that.
    fn touched(
        tracking: &Tracking,
        region: &Region,
        baseline: &mut Baseline,
        reads: &[usize],
        writes: &[usize],
    ) -> String {
        for page in reads {
            // SAFETY: the page lies within the region.
            unsafe { region.base().add(page * PAGE_BYTES).read_volatile() };
        }
        for page in writes {
            // SAFETY: the page lies within the region and no reference to it lives.
            unsafe {
                let at = region.base().add(page * PAGE_BYTES);
                at.write_volatile(at.read_volatile().wrapping_add(1));
            }
        }
        // SAFETY: there is no guest.
        let found = unsafe { baseline.written_pages(tracking, region) }.expect("scan");
        format!("{found:?}")
    }

    #[test]
    fn page_that_was_only_read_is_not_written_fresh_grown_or_mapped() {
        let (tracking, _) = Tracking::probe();
        let region = Region::reserve(64 << 10, 1 << 20, 0, &tracking).expect("memory");
        let mut baseline = Baseline::default();
        assert_eq!(touched(&tracking, &region, &mut baseline, &[1], &[2]), "[2..3]");
        assert_eq!(touched(&tracking, &region, &mut baseline, &[1, 3], &[]), "[]");
        assert_eq!(touched(&tracking, &region, &mut baseline, &[2], &[1, 3]), "[1..2, 3..4]");
        region.grow_to(128 << 10).expect("grows");
        assert_eq!(touched(&tracking, &region, &mut baseline, &[20], &[0, 17]), "[0..1, 17..18]");
        assert_eq!(
            touched(&tracking, &region, &mut baseline, &[17], &[18, 20]),
            "[18..19, 20..21]"
        );

        let file = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.expect("memory"));
        file.set_len(128 << 10).expect("memory");
        // SAFETY: no reference into the region lives, and the file is as large as the region.
        unsafe {
            region.map_privately(&file, &tracking).expect("maps");
            baseline.reset(&tracking, &region);
        }
        assert_eq!(touched(&tracking, &region, &mut baseline, &[3, 4], &[5]), "[5..6]");
        assert_eq!(touched(&tracking, &region, &mut baseline, &[4, 6], &[]), "[]");
        assert_eq!(touched(&tracking, &region, &mut baseline, &[7], &[4, 5, 8]), "[4..6, 8..9]");
    }

    #[test]
    fn more_ranges_than_one_scan_returns_are_found_once_each() {
        let (tracking, _) = Tracking::probe();
        let len = 8 << 20;
        let region = Region::reserve(len, len, 0, &tracking).expect("memory");
        let every_other: Vec<usize> = (0..len / PAGE_BYTES).step_by(2).collect();
        for page in &every_other {
            // SAFETY: the page lies within the region.
            unsafe { region.base().add(page * PAGE_BYTES).write_volatile(1) };
        }
        // SAFETY: there is no guest.
        let found = unsafe { Baseline::default().written_pages(&tracking, &region) }.expect("scan");
        assert_eq!(found.len(), every_other.len());
        assert!(found.iter().zip(every_other).all(|(range, page)| range.start as usize == page));
    }
}
