//! What a guest or a file says, as it is kept and shown: without a character that could pass for something else.

use std::borrow::Cow;

/// A message, or the words of a panic.
pub const TEXT_BYTES_MAX: usize = 8 << 10;
/// The name of a function or of a metric.
pub const NAME_BYTES_MAX: usize = 256;

/// A text of a guest, at most this long. Lines after the first are indented, so that none of them looks like a line
/// of the host; other characters that control a terminal or the direction of the text are escaped.
#[must_use]
pub fn of_guest(text: &str, bytes_max: usize) -> Cow<'_, str> {
    let text = text.trim_end();
    if text.len() <= bytes_max && !text.chars().any(|it| it == '\n' || is_control(it)) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len().min(bytes_max));
    for character in text.chars() {
        if bytes_max <= shown.len() {
            shown.push_str("...");
            break;
        }
        match character {
            '\n' => shown.push_str("\n    "),
            other if is_control(other) => shown.extend(other.escape_default()),
            other => shown.push(other),
        }
    }
    Cow::Owned(shown)
}

/// A text for a terminal: what would control it is escaped, lines stay lines.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_control) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match is_control(character) {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    Cow::Owned(shown)
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
        assert_eq!(printable("one\n\u{1b}[2Jtwo\r\n"), "one\n\\u{1b}[2Jtwo\\r\n");
        assert_eq!(of_guest(&"x".repeat(20), 8), "xxxxxxxx...");
        assert_eq!(of_guest("ääää", 3), "ää...");
        let hostile = "\u{1b}".repeat(1 << 20);
        assert!(of_guest(&hostile, TEXT_BYTES_MAX).len() <= TEXT_BYTES_MAX + 16);
    }
}
