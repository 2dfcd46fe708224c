//! What a guest or a file says, as it is kept and shown: without a character that could pass for something else.

use std::borrow::Cow;

/// The longest message that is kept of a guest.
pub const TEXT_BYTES_MAX: usize = 8 << 10;
/// The longest name of a function or of a metric.
const NAME_BYTES_MAX: usize = 256;

/// A message of a guest, or the words of its panic. Lines after the first are indented, so that none of them looks
/// like a line of the host; other characters that control a terminal or the direction of the text are escaped.
#[must_use]
pub fn message(text: &str) -> Cow<'_, str> {
    of_guest(text, TEXT_BYTES_MAX)
}

/// The name that a guest gives to a function or to a metric, as [`message`] has a message.
#[must_use]
pub fn name(text: &str) -> Cow<'_, str> {
    of_guest(text, NAME_BYTES_MAX)
}

/// A text for a terminal: what would control it is escaped, lines stay lines.
#[must_use]
pub fn printable(text: String) -> String {
    match text.chars().any(is_control) {
        true => escaped(&text, usize::MAX, "\n"),
        false => text,
    }
}

fn of_guest(text: &str, bytes_max: usize) -> Cow<'_, str> {
    let text = text.trim_end();
    match bytes_max < text.len() || text.chars().any(|it| it == '\n' || is_control(it)) {
        true => Cow::Owned(escaped(text, bytes_max, "\n    ")),
        false => Cow::Borrowed(text),
    }
}

fn escaped(text: &str, bytes_max: usize, line_end: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(bytes_max));
    for character in text.chars() {
        if bytes_max <= shown.len() {
            shown.push_str("...");
            break;
        }
        match character {
            '\n' => shown.push_str(line_end),
            other if is_control(other) => shown.extend(other.escape_default()),
            other => shown.push(other),
        }
    }
    shown
}

/// Whether a character controls a terminal, or the direction of the text.
fn is_control(character: char) -> bool {
    match character {
        '\t' | '\n' => false,
        '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        other => other.is_control(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_short_and_controls_no_terminal() {
        let rows = [
            ("a word", "a word"),
            ("a word\n", "a word"),
            ("one\ntwo", "one\n    two"),
            ("\u{1b}]0;owned\u{7}", "\\u{1b}]0;owned\\u{7}"),
            ("\u{1b}[2Jgone", "\\u{1b}[2Jgone"),
            ("over\rwritten", "over\\rwritten"),
            ("nul\0", "nul\\u{0}"),
            ("turned \u{202e}round", "turned \\u{202e}round"),
            ("a\u{2028}line", "a\\u{2028}line"),
            ("c1 \u{9b}2J", "c1 \\u{9b}2J"),
            ("größer\tübrig", "größer\tübrig"),
        ];
        for (text, shown) in rows {
            assert_eq!(of_guest(text, 100), shown);
        }
        assert_eq!(printable("one\n\u{1b}[2Jtwo\r\n".to_owned()), "one\n\\u{1b}[2Jtwo\\r\n");
        assert_eq!(of_guest(&"x".repeat(20), 8), "xxxxxxxx...");
        assert_eq!(of_guest("ääää", 3), "ää...");
        let hostile = "\u{1b}".repeat(1 << 20);
        assert!(of_guest(&hostile, TEXT_BYTES_MAX).len() <= TEXT_BYTES_MAX + 16);
    }
}
