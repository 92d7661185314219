//! Pages of the KV cache on disk: the tier below memory, a prefix cache that survives restarts, and sessions.
//!
//! A page that memory has no room for is [put](Store::put) here under its key, a keyed digest of everything that led to
//! it, and [fetched](Store::fetch) when a prompt begins alike, in this process or in a later one. A page comes back
//! whole and exactly as asked for (namespace, key, parent, tokens, length, checksum), or not at all; nothing that happens
//! to the disk is ever an error of a request. [`session`] keeps the pages of one conversation as a single file.
//!
//! **One file for each page**, not segments of many: deleting, replacing and sharing a page between processes are then
//! single operations of the file system, with no log to replay or compact.
//!
//! ```
//! use infer_store::{Page, Put, Store, StoreOptions, Wanted};
//!
//! let folder = tempfile::tempdir()?;
//! let dir = folder.path().join("pages");
//! let options = StoreOptions { dir, max_bytes: 1 << 30, namespace: [1; 32], page_bytes: 5 };
//! let store = Store::open(options)?;
//! let page = Page { key: [2; 32], parent: [0; 32], tokens: [3, 4].into(), payload: b"cache".to_vec() };
//! assert_eq!(store.put(page), Put::Queued);
//! store.fetch(7, vec![Wanted { key: [2; 32], parent: [0; 32], tokens: [3, 4].into() }]);
//! let fetched = loop {
//!     if let Some(fetched) = store.poll().pop() {
//!         break fetched;
//!     }
//!     std::thread::yield_now();
//! };
//! assert_eq!((fetched.ticket, fetched.pages), (7, vec![Some(b"cache".to_vec())]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
// What a lint can prove need not be found by a test: no narrowing cast, no wrapping sum, no index that can be out of
// bounds, no panic.
#![cfg_attr(
    not(test),
    deny(
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable
    )
)]

mod directory;
pub mod disk;
mod error;
mod index;
pub mod page;
pub mod session;
mod state;
mod store;
mod worker;

pub use error::StoreError;
pub use page::{Key, Page, Wanted};
pub use store::{Fetched, Put, Store, StoreOptions, StoreStats, Tuning};
