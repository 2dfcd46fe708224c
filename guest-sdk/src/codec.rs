//! Decides how typed keys and values become bytes: postcard between operators, text and JSON at
//! the borders of a job.

use std::ops::Deref;

use serde::{Deserialize, Serialize};

use crate::short::{append, short_text};

pub use crate::bindings::cofferdam::operator::types::Format;

/// A type that can be read from a record. Every serde type can, as postcard.
pub trait Decode<'a>: Sized {
    /// What the bytes must be; `None` only for `()`, which needs none.
    const FORMAT: Option<Format>;

    /// Reads a value, borrowing from the record where the type allows it.
    ///
    /// # Errors
    /// What is wrong with the bytes, for people.
    fn decode(bytes: &'a [u8]) -> Result<Self, String>;
}

/// A type that can be written into a record. Every serde type can, as postcard.
pub trait Encode {
    /// What the bytes are; `None` only for `()`, which makes none.
    const FORMAT: Option<Format>;

    /// Appends the value's bytes.
    fn encode(&self, out: &mut Vec<u8>);
}

/// UTF-8 text, as it is: a line of a file, a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<'a>(pub &'a str);

/// A JSON document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Json<T>(pub T);

/// Bytes as they are, whatever they mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Raw<'a>(pub &'a [u8]);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        self.0
    }
}

impl std::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl Deref for Raw<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0
    }
}

/// `()` is no bytes at all, and the key of records that have none.
const fn postcard_format<T>() -> Option<Format> {
    if size_of::<T>() == 0 { None } else { Some(Format::Postcard) }
}

impl<'a, T: Deserialize<'a>> Decode<'a> for T {
    const FORMAT: Option<Format> = postcard_format::<T>();

    #[inline]
    fn decode(bytes: &'a [u8]) -> Result<Self, String> {
        postcard::from_bytes(bytes).map_err(|error| {
            format!("not the postcard encoding of {}: {error}", std::any::type_name::<T>())
        })
    }
}

impl<T: Serialize> Encode for T {
    const FORMAT: Option<Format> = postcard_format::<T>();

    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        // Writing into a vector fails only where `Serialize` itself gives an error, which the
        // author has to see: a trap with these last words.
        postcard::serialize_with_flavor(self, Appending(out)).unwrap_or_else(|error| {
            panic!("cannot encode {}: {error}", std::any::type_name::<T>())
        });
    }
}

/// Where postcard writes to: the end of a column.
struct Appending<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Appending<'_> {
    type Output = ();

    #[inline]
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    #[inline]
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        append(self.0, bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

impl<'a> Decode<'a> for Text<'a> {
    const FORMAT: Option<Format> = Some(Format::Text);

    #[inline]
    fn decode(bytes: &'a [u8]) -> Result<Self, String> {
        if let Some(text) = short_text(bytes) {
            return Ok(Text(text));
        }
        std::str::from_utf8(bytes).map(Text).map_err(|error| format!("not UTF-8 text: {error}"))
    }
}

impl Encode for Text<'_> {
    const FORMAT: Option<Format> = Some(Format::Text);

    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        append(out, self.0.as_bytes());
    }
}

impl<'a> Decode<'a> for Raw<'a> {
    const FORMAT: Option<Format> = Some(Format::Bytes);

    #[inline]
    fn decode(bytes: &'a [u8]) -> Result<Self, String> {
        Ok(Raw(bytes))
    }
}

impl Encode for Raw<'_> {
    const FORMAT: Option<Format> = Some(Format::Bytes);

    #[inline]
    fn encode(&self, out: &mut Vec<u8>) {
        append(out, self.0);
    }
}

impl<'a, T: Deserialize<'a>> Decode<'a> for Json<T> {
    const FORMAT: Option<Format> = Some(Format::Json);

    fn decode(bytes: &'a [u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes)
            .map(Json)
            .map_err(|error| format!("not the JSON expected: {error}"))
    }
}

impl<T: Serialize> Encode for Json<T> {
    const FORMAT: Option<Format> = Some(Format::Json);

    fn encode(&self, out: &mut Vec<u8>) {
        serde_json::to_writer(&mut *out, &self.0).unwrap_or_else(|error| {
            panic!("cannot encode {} as JSON: {error}", std::any::type_name::<T>())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(value: impl Encode) -> Vec<u8> {
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        bytes
    }

    #[test]
    fn every_format_reads_what_it_wrote() {
        assert_eq!(u64::decode(&bytes_of(300u64)), Ok(300));
        assert_eq!(<(&str, i8)>::decode(&bytes_of(("a", -1i8))), Ok(("a", -1)));
        assert_eq!(Text::decode(&bytes_of(Text("zwölf"))), Ok(Text("zwölf")));
        assert_eq!(Json::<Vec<u8>>::decode(&bytes_of(Json(vec![1u8]))), Ok(Json(vec![1])));
        assert_eq!(Raw::decode(&[1, 2]), Ok(Raw(&[1, 2])));
        assert!(bytes_of(()).is_empty());
        assert_eq!(<()>::decode(&[]), Ok(()));
    }

    #[test]
    fn wrong_bytes_are_refused_with_the_type() {
        assert!(Text::decode(&[0xff]).unwrap_err().starts_with("not UTF-8 text"));
        assert!(u64::decode(&[0x80]).unwrap_err().contains("u64"));
        assert!(Json::<u8>::decode(b"{").is_err());
    }

    #[test]
    fn unit_has_no_format() {
        assert_eq!(<() as Encode>::FORMAT, None);
        assert_eq!(<u64 as Encode>::FORMAT, Some(Format::Postcard));
    }
}
