//! Decides the watermark of a task: the minimum over its input channels.

use crate::ids::ChannelId;

/// The watermark of an ended input: no record can be later than this.
pub const MAX_WATERMARK: i64 = i64::MAX;

/// Follows the watermarks of a task's input channels.
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
    channels: Vec<i64>,
    current: i64,
}

impl Watermarks {
    /// No channel has sent a watermark yet.
    #[must_use]
    pub fn new(channel_count: usize) -> Self {
        Self { channels: vec![i64::MIN; channel_count], current: i64::MIN }
    }

    /// Takes a channel's watermark; gives the task's new one if that moved it forward.
    ///
    /// A watermark that goes backwards is ignored: time does not.
    ///
    /// # Panics
    /// If the channel is not one of the task's.
    pub fn advance(&mut self, channel: ChannelId, watermark: i64) -> Option<i64> {
        let known = &mut self.channels[channel.0 as usize];
        *known = watermark.max(*known);
        let minimum = self.channels.iter().copied().min().unwrap_or(i64::MIN);
        (self.current < minimum).then(|| {
            self.current = minimum;
            minimum
        })
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
}
