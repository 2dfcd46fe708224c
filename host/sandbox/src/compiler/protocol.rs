//! What a compiler is asked, and what it answers.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::CompileLimits;
use crate::{rewrite::ComponentError, validate::Unsound};

/// Stands before the component, behind its length.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) limits: CompileLimits,
    /// See [`SandboxOptions::without_signals`](crate::SandboxOptions::without_signals).
    pub(super) without_signals: bool,
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = postcard::to_allocvec(self).unwrap_or_default();
        let mut bytes = u32::try_from(body.len()).unwrap_or(0).to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        bytes
    }

    pub(super) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let mut body = Vec::new();
        from.take(u64::from(u32::from_le_bytes(length))).read_to_end(&mut body)?;
        postcard::from_bytes(&body).map_err(io::Error::other)
    }
}

/// Its first byte says which, and the eight after it how many follow.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Code(Vec<u8>),
    Refused(Refused),
}

/// [`ComponentError`], as far as a compiler decides it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Refused {
    NotWasm { begins_with: String },
    CoreModule,
    Malformed { message: String },
    Unsound(Unsound),
    Compile { message: String },
}

const CODE: u8 = 1;
const REFUSED: u8 = 2;
const HEAD_BYTES: usize = 9;
pub(super) const ANSWER_HEAD_BYTES: u64 = HEAD_BYTES as u64;

impl Answer {
    pub(super) fn of(compiled: Result<Vec<u8>, ComponentError>) -> Self {
        match compiled {
            Ok(code) => Self::Code(code),
            Err(ComponentError::NotWasm { begins_with }) => {
                Self::Refused(Refused::NotWasm { begins_with })
            }
            Err(ComponentError::CoreModule) => Self::Refused(Refused::CoreModule),
            Err(ComponentError::Malformed { message }) => {
                Self::Refused(Refused::Malformed { message })
            }
            Err(ComponentError::Unsound(unsound)) => Self::Refused(Refused::Unsound(unsound)),
            Err(ComponentError::Compile(error)) => Self::Refused(Refused::Compile {
                message: format!("{:#}", wasmtime::Error::from_boxed(error)),
            }),
            Err(other) => Self::Refused(Refused::Compile { message: other.to_string() }),
        }
    }

    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let encoded;
        let (kind, body) = match self {
            Self::Code(code) => (CODE, code),
            Self::Refused(refused) => {
                encoded = postcard::to_allocvec(refused).map_err(io::Error::other)?;
                (REFUSED, &encoded)
            }
        };
        to.write_all(&[kind])?;
        to.write_all(&(body.len() as u64).to_le_bytes())?;
        to.write_all(body)?;
        to.flush()
    }

    /// `None` where it is not whole.
    pub(super) fn decode(mut bytes: Vec<u8>) -> Option<Self> {
        let (kind, length) = bytes.first_chunk::<HEAD_BYTES>()?.split_first()?;
        let (kind, length) = (*kind, u64::from_le_bytes(length.try_into().ok()?));
        let body = bytes.split_off(HEAD_BYTES);
        if body.len() as u64 != length {
            return None;
        }
        match kind {
            CODE => Some(Self::Code(body)),
            REFUSED => postcard::from_bytes(&body).map(Self::Refused).ok(),
            _ => None,
        }
    }

    pub(super) fn into_result(self) -> Result<Vec<u8>, ComponentError> {
        Err(match self {
            Self::Code(code) => return Ok(code),
            Self::Refused(Refused::NotWasm { begins_with }) => {
                ComponentError::NotWasm { begins_with }
            }
            Self::Refused(Refused::CoreModule) => ComponentError::CoreModule,
            Self::Refused(Refused::Malformed { message }) => ComponentError::Malformed { message },
            Self::Refused(Refused::Unsound(unsound)) => ComponentError::Unsound(unsound),
            Self::Refused(Refused::Compile { message }) => ComponentError::Compile(message.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let limits =
            CompileLimits { wall_max: Duration::from_millis(1500), ..CompileLimits::default() };
        let mut bytes = Request { limits, without_signals: true }.encode();
        bytes.extend_from_slice(b"the component");
        let mut from = bytes.as_slice();
        let request = Request::read(&mut from).expect("whole");
        assert_eq!((request.limits, request.without_signals), (limits, true));
        assert_eq!(from, b"the component");
        assert!(Request::read(&mut &bytes[..10]).is_err());
    }

    #[test]
    fn an_answer_is_read_as_it_was_written_or_not_at_all() {
        let refused = Refused::Unsound(Unsound::SharedMemory { module: 3 });
        let answers =
            [Answer::Code(vec![1, 2, 3]), Answer::Code(Vec::new()), Answer::Refused(refused)];
        for answer in answers {
            let mut bytes = Vec::new();
            answer.write(&mut bytes).expect("written");
            for cut in 0..bytes.len() {
                assert_eq!(Answer::decode(bytes[..cut].to_vec()), None);
            }
            assert_eq!(Answer::decode(bytes), Some(answer));
        }
        assert_eq!(Answer::decode(vec![7; 9]), None);
    }
}
