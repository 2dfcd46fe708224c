//! Prints without ever holding up the job: a reader that stops reading stops nothing but this thread.
//!
//! Lines wait in a queue of limited length. Those that find it full are counted, and the count is printed in
//! their place as soon as the reader reads again, so nothing is lost without a word.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

/// How many lines wait for a reader. A job that is watched once a second writes some ten of them.
const WAITING_MAX: usize = 16 << 10;
/// A reader that has taken nothing for this long is waited for no longer when the program ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// A queue of lines, and the thread that writes them.
pub(crate) struct Lines {
    queue: SyncSender<Vec<u8>>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    queued: AtomicU64,
    written: AtomicU64,
    /// Lines that found the queue full, and were not reported yet.
    dropped: AtomicU64,
}

impl Lines {
    /// Lines that `write` writes, and the line that says how many could not be.
    pub(crate) fn new(
        name: &str,
        write: impl FnMut(&[u8]) + Send + 'static,
        dropped: fn(u64) -> String,
    ) -> std::io::Result<Self> {
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let counts = Arc::<Counts>::default();
        let own = counts.clone();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || write_all(&waiting, &own, write, dropped))?;
        Ok(Self { queue, counts })
    }

    /// Adds a line, if there is room for one.
    pub(crate) fn push(&self, line: Vec<u8>) {
        self.counts.queued.fetch_add(1, Ordering::AcqRel);
        if self.queue.try_send(line).is_err() {
            self.counts.queued.fetch_sub(1, Ordering::AcqRel);
            self.counts.dropped.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Waits until all is written, or the reader has taken nothing for a while.
    pub(crate) fn drain(&self) {
        let written = || self.counts.written.load(Ordering::Acquire);
        let (mut before, mut since) = (written(), Instant::now());
        while written() < self.counts.queued.load(Ordering::Acquire) && since.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(2));
            if before != written() {
                (before, since) = (written(), Instant::now());
            }
        }
    }
}

fn write_all(
    waiting: &Receiver<Vec<u8>>,
    counts: &Counts,
    mut write: impl FnMut(&[u8]),
    dropped: fn(u64) -> String,
) {
    for line in waiting {
        write(&line);
        let count = counts.dropped.swap(0, Ordering::AcqRel);
        if 0 < count {
            write(dropped(count).as_bytes());
        }
        counts.written.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc::channel};

    use super::*;

    #[test]
    fn a_reader_that_does_not_read_holds_nobody_up_and_learns_what_it_has_missed() {
        let (reads, may_read) = channel::<()>();
        let printed = Arc::new(Mutex::new(Vec::new()));
        let own = printed.clone();
        let write = move |line: &[u8]| {
            let _ = may_read.recv();
            own.lock().expect("not poisoned").push(String::from_utf8_lossy(line).into_owned());
        };
        let lines = Lines::new("lines", write, |count| format!("{count} missed")).expect("starts");
        // One is with the thread, and so many wait.
        for number in 0..WAITING_MAX + 100 {
            lines.push(number.to_string().into_bytes());
        }
        drop(reads);
        lines.drain();
        let printed = printed.lock().expect("not poisoned");
        let missed: Vec<&String> = printed.iter().filter(|line| line.contains("missed")).collect();
        let missed: u64 =
            missed.iter().filter_map(|line| line.split(' ').next()?.parse::<u64>().ok()).sum();
        let shown = printed.iter().filter(|line| !line.contains("missed")).count();
        assert_eq!(shown as u64 + missed, WAITING_MAX as u64 + 100);
        assert!(98 <= missed, "{missed}");
    }
}
