//! Decides the event time of a task: the minimum over its input channels, through one clock.
//!
//! A watermark `t` promises that no record with an event time of `t` or earlier will come.
//!
//! **Invariant:** whatever advances event time passes a [`Clock`], so it never goes back, and no
//! watermark arrives twice.

use crate::ids::ChannelId;

/// The watermark of an ended input: no record can be later than this.
pub const MAX_WATERMARK: i64 = i64::MAX;

/// The event time of a chain of tasks: takes every watermark, lets those pass that move it forward.
///
/// ```
/// # use cofferdam_core::watermark::Clock;
/// let mut clock = Clock::default();
/// assert_eq!(clock.advance(7), Some(7));
/// assert_eq!(clock.advance(3), None);
/// assert_eq!(clock.advance(7), None);
/// ```
#[derive(Debug, Clone)]
pub struct Clock {
    now: i64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { now: i64::MIN }
    }
}

impl Clock {
    /// The last watermark that has passed; `i64::MIN` before the first.
    #[must_use]
    pub fn now(&self) -> i64 {
        self.now
    }

    /// Event time is said to be `watermark`; gives it back if that is news.
    pub fn advance(&mut self, watermark: i64) -> Option<i64> {
        (self.now < watermark).then(|| {
            self.now = watermark;
            watermark
        })
    }
}

/// Follows the watermarks of a task's input channels.
///
/// An idle channel does not count until it speaks again; where all are idle, so is the task, and
/// event time stands still. An ended channel counts as being at [`MAX_WATERMARK`].
///
/// ```
/// # use cofferdam_core::{ids::ChannelId, watermark::Watermarks};
/// let mut watermarks = Watermarks::new(2);
/// assert_eq!(watermarks.advance(ChannelId(0), 10), None); // Channel 1 has said nothing yet.
/// assert_eq!(watermarks.advance(ChannelId(1), 7), Some(7));
/// assert_eq!(watermarks.advance(ChannelId(1), 30), Some(10));
/// ```
#[derive(Debug, Clone)]
pub struct Watermarks {
    channels: Vec<Input>,
    clock: Clock,
}

#[derive(Debug, Clone, Copy)]
struct Input {
    watermark: i64,
    is_idle: bool,
}

impl Watermarks {
    /// No channel has sent a watermark yet.
    #[must_use]
    pub fn new(channel_count: usize) -> Self {
        let silent = Input { watermark: i64::MIN, is_idle: false };
        Self { channels: vec![silent; channel_count], clock: Clock::default() }
    }

    /// Takes a channel's watermark; gives the task's new one if that moved it forward.
    ///
    /// A watermark that goes backwards is ignored: time does not.
    ///
    /// # Panics
    /// If the channel is not one of the task's.
    pub fn advance(&mut self, channel: ChannelId, watermark: i64) -> Option<i64> {
        let input = &mut self.channels[channel.0 as usize];
        *input = Input { watermark: watermark.max(input.watermark), is_idle: false };
        self.minimum()
    }

    /// A channel has nothing to say for now; gives the task's new watermark if it had held it back.
    ///
    /// # Panics
    /// If the channel is not one of the task's.
    pub fn idle(&mut self, channel: ChannelId) -> Option<i64> {
        self.channels[channel.0 as usize].is_idle = true;
        self.minimum()
    }

    /// No channel has anything to say for now.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.channels.iter().all(|input| input.is_idle)
    }

    fn minimum(&mut self) -> Option<i64> {
        let speaking = self.channels.iter().filter(|input| !input.is_idle);
        let minimum = speaking.map(|input| input.watermark).min()?;
        self.clock.advance(minimum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watermark_never_goes_backwards() {
        let mut watermarks = Watermarks::new(1);
        assert_eq!(watermarks.advance(ChannelId(0), 5), Some(5));
        assert_eq!(watermarks.advance(ChannelId(0), 3), None);
        assert_eq!(watermarks.advance(ChannelId(0), 5), None);
        assert_eq!(watermarks.advance(ChannelId(0), MAX_WATERMARK), Some(MAX_WATERMARK));
    }

    #[test]
    fn an_ended_channel_holds_nothing_back_and_neither_does_an_idle_one() {
        let mut watermarks = Watermarks::new(3);
        let [first, second, third] = [0, 1, 2].map(ChannelId);
        assert_eq!(watermarks.advance(first, 5), None);
        assert_eq!(watermarks.advance(second, MAX_WATERMARK), None);
        assert_eq!(watermarks.idle(third), Some(5));
        assert_eq!(watermarks.advance(first, 9), Some(9));
        assert_eq!(watermarks.advance(third, 6), None, "it is late, and time does not go back");
        assert_eq!(watermarks.advance(third, 12), None);
        assert_eq!(watermarks.advance(first, 11), Some(11));
        assert!(!watermarks.is_idle());
        assert_eq!(watermarks.idle(first), Some(12));
    }

    #[test]
    fn where_every_channel_is_idle_time_stands_still() {
        let mut watermarks = Watermarks::new(2);
        watermarks.advance(ChannelId(0), 4);
        assert_eq!(watermarks.idle(ChannelId(1)), Some(4));
        assert_eq!(watermarks.idle(ChannelId(0)), None);
        assert!(watermarks.is_idle());
        assert_eq!(watermarks.advance(ChannelId(1), 7), Some(7));
    }
}
