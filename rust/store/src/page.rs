//! One page as one file.
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | `INFERPG`, zero |
//! | 8..12 | version, 1 |
//! | 12..16 | number of tokens |
//! | 16..24 | bytes of payload |
//! | 24..56 | namespace |
//! | 56..88 | key |
//! | 88..120 | the parent's key |
//! | 120..152 | BLAKE3 of everything else in the file |
//! | 152.. | tokens, then payload |
//!
//! Integers are little-endian. The checksum is no signature: who can write into the directory can write pages. It
//! tells a torn, cut or rotten file from a whole one, which is why no page is ever synced to the device: after a
//! power cut a page that did not arrive is a miss.

use std::io::{self, Read};

use crate::disk::{Sink, Source};

/// The name of a page: a keyed digest of all that led to it.
pub type Key = [u8; 32];

/// What a store keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Its name.
    pub key: Key,
    /// The name of the page before it; a root's name for the first.
    pub parent: Key,
    /// The tokens whose keys and values it holds.
    pub tokens: Box<[u32]>,
    /// The keys and values.
    pub payload: Vec<u8>,
}

/// What is asked of a store: a page's name, and what must be true of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The page's name.
    pub key: Key,
    /// The name of the page before it.
    pub parent: Key,
    /// The tokens that it must hold.
    pub tokens: Box<[u32]>,
}

/// The longest payload of a page.
pub const MAX_PAGE_BYTES: usize = 64 << 20;
/// The most tokens of a page.
pub const MAX_PAGE_TOKENS: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"INFERPG\0";
const VERSION: u32 = 1;
const CHECKSUM_AT: usize = 120;
pub(crate) const HEADER_BYTES: usize = 152;

/// Why a file is not the page that was asked for.
#[derive(Debug)]
pub enum Unusable {
    /// It is no whole page of this name.
    Damaged,
    /// It is a whole page of this name, with other tokens, another parent or another length.
    Different,
    /// It could not be read.
    Io(io::Error),
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Unusable::Damaged,
            _ => Unusable::Io(error),
        }
    }
}

/// Bytes of the file of a page.
pub(crate) fn file_bytes(tokens: usize, payload: usize) -> usize {
    HEADER_BYTES.saturating_add(tokens.saturating_mul(4)).saturating_add(payload)
}

/// Writes a page's file: header and tokens at once, then the payload.
pub fn write(sink: &mut dyn Sink, namespace: &[u8; 32], page: &Page) -> io::Result<()> {
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut header = Vec::with_capacity(file_bytes(page.tokens.len(), 0));
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&u32::try_from(page.tokens.len()).map_err(too_long)?.to_le_bytes());
    header.extend_from_slice(&u64::try_from(page.payload.len()).map_err(too_long)?.to_le_bytes());
    for part in [namespace, &page.key, &page.parent] {
        header.extend_from_slice(part);
    }
    let tokens = token_bytes(&page.tokens);
    let checksum = checksum(&header, &tokens, &page.payload);
    header.extend_from_slice(&checksum);
    header.extend_from_slice(&tokens);
    sink.write_all(&header)?;
    sink.write_all(&page.payload)
}

/// Reads a page's payload if everything about the file is as it must be. Nothing is allocated that the file's length
/// and `page_bytes` do not cover.
pub fn read(
    source: &mut dyn Source,
    namespace: &[u8; 32],
    page_bytes: usize,
    wanted: &Wanted,
) -> Result<Vec<u8>, Unusable> {
    let bytes = source.length()?;
    let mut fixed = [0; HEADER_BYTES];
    source.read_exact(&mut fixed)?;
    let header = Header::parse(&fixed).ok_or(Unusable::Damaged)?;
    if bytes != header.file_bytes() || header.namespace != *namespace || header.key != wanted.key {
        return Err(Unusable::Damaged);
    }
    let token_bytes = taken(source, header.tokens.saturating_mul(4))?;
    let payload = taken(source, header.payload)?;
    if checksum(header.hashed, &token_bytes, &payload) != header.checksum {
        return Err(Unusable::Damaged);
    }
    let same_tokens = token_bytes == self::token_bytes(&wanted.tokens);
    if payload.len() == page_bytes && header.parent == wanted.parent && same_tokens {
        Ok(payload)
    } else {
        Err(Unusable::Different)
    }
}

/// The fields before the tokens, checked as far as they can be alone.
struct Header<'a> {
    tokens: usize,
    payload: usize,
    namespace: &'a [u8],
    key: &'a [u8],
    parent: &'a [u8],
    checksum: &'a [u8],
    /// What the checksum covers of the header.
    hashed: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(fixed: &'a [u8; HEADER_BYTES]) -> Option<Self> {
        let (magic, rest) = fixed.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (tokens, rest) = rest.split_first_chunk::<4>()?;
        let (payload, rest) = rest.split_first_chunk::<8>()?;
        let header = Header {
            tokens: usize::try_from(u32::from_le_bytes(*tokens)).ok()?,
            payload: usize::try_from(u64::from_le_bytes(*payload)).ok()?,
            namespace: rest.get(..32)?,
            key: rest.get(32..64)?,
            parent: rest.get(64..96)?,
            checksum: rest.get(96..128)?,
            hashed: fixed.get(..CHECKSUM_AT)?,
        };
        let known = *magic == MAGIC && u32::from_le_bytes(*version) == VERSION;
        let fits = header.tokens <= MAX_PAGE_TOKENS && header.payload <= MAX_PAGE_BYTES;
        (known && fits).then_some(header)
    }

    fn file_bytes(&self) -> u64 {
        u64::try_from(file_bytes(self.tokens, self.payload)).unwrap_or(u64::MAX)
    }
}

/// The next `count` bytes, into memory that is not zeroed first.
pub(crate) fn taken(source: &mut dyn Source, count: usize) -> Result<Vec<u8>, io::Error> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(count).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let read = Read::take(&mut *source, u64::try_from(count).unwrap_or(u64::MAX)).read_to_end(&mut bytes)?;
    if read == count { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

pub(crate) fn token_bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn checksum(header: &[u8], tokens: &[u8], payload: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(header).update(tokens).update(payload).finalize().as_bytes()
}
