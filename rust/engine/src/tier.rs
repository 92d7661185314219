//! Where pages go that do not fit in memory, and whence they come back: what the engine asks of such a place.
//!
//! The engine itself does no I/O. It decides which pages to save ([`Save`]) and which to bring back ([`Fetch`]); the driver moves bytes
//! between device and tier; the tier works in the background and answers when it can. A page comes back whole and proven, or not at
//! all: then it is computed again. So a tier that fails, lies, forgets or is slow costs time, never a result.

use std::sync::Arc;

use crate::digest::Digest;
use crate::tables::PageRef;

/// A page's identity as a tier must prove it before it gives the page back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The digest of everything up to the page's end.
    pub key: Digest,
    /// The same of the page before it.
    pub parent: Digest,
    /// The page's own tokens.
    pub tokens: Box<[u32]>,
}

/// A page on its way into a tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierPage {
    /// What it is.
    pub name: Wanted,
    /// The device's bytes.
    pub payload: Vec<u8>,
}

/// What a tier says to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// It will keep it.
    Taken,
    /// Earlier pages are still on their way: it has room again in moments.
    Full,
    /// It could not keep earlier pages, and rests before it tries again.
    Failing,
    /// It has the page already, or can never keep it: there is no use in offering it again.
    Unwanted,
}

/// The answer to [`Tier::fetch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The fetch that is answered.
    pub ticket: u64,
    /// In the order asked for: a page's bytes, or nothing where it was not there, not whole or not the page that was wanted.
    pub pages: Vec<Option<Vec<u8>>>,
}

/// A place for pages outside the device. Every call returns at once; work happens in the background.
pub trait Tier: Send + Sync {
    /// Whether a page is there, as far as known without I/O.
    fn contains(&self, key: &Digest) -> bool;
    /// Takes a page to keep, or says why not.
    fn put(&self, page: TierPage) -> Offer;
    /// Asks for pages. Every fetch is answered, once, through [`Tier::poll`].
    fn fetch(&self, ticket: u64, wanted: Vec<Wanted>);
    /// Answers that have come.
    fn poll(&self) -> Vec<Fetched>;
    /// What to call, from any thread, when [`Tier::poll`] has something.
    fn set_waker(&self, waker: Arc<dyn Fn() + Send + Sync>);
}

/// A page that is to be saved before the next step overwrites it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Save {
    /// Where it lies on the device.
    pub page: PageRef,
    /// What it is.
    pub name: Wanted,
}

/// Pages that are to be brought back for a waiting sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Number of the fetch, never used twice.
    pub ticket: u64,
    /// Consecutive pages.
    pub wanted: Vec<Wanted>,
}
