//! The engine's tier, implemented by the store; and sessions as files.

use std::path::Path;
use std::sync::Arc;

use infer_engine::{Digest, Driver, Fetched, Offer, Tier, TierPage, Wanted};
use infer_store::{Page, Put, Store, session};

/// Pages on disk.
pub struct StoreTier(pub Arc<Store>);

impl Tier for StoreTier {
    fn contains(&self, key: &Digest) -> bool {
        self.0.contains(key)
    }

    fn put(&self, page: TierPage) -> Offer {
        match self.0.put(stored(page)) {
            Put::Queued => Offer::Taken,
            Put::Full => Offer::Full,
            Put::Paused => Offer::Failing,
            Put::Known | Put::Unfit => Offer::Unwanted,
        }
    }

    fn fetch(&self, ticket: u64, wanted: Vec<Wanted>) {
        let name = |Wanted { key, parent, tokens }| infer_store::Wanted { key, parent, tokens };
        self.0.fetch(ticket, wanted.into_iter().map(name).collect());
    }

    fn poll(&self) -> Vec<Fetched> {
        let fetched = |infer_store::Fetched { ticket, pages }| Fetched { ticket, pages };
        self.0.poll().into_iter().map(fetched).collect()
    }

    fn set_waker(&self, waker: Arc<dyn Fn() + Send + Sync>) {
        self.0.set_waker(waker);
    }
}

fn stored(page: TierPage) -> Page {
    let Wanted { key, parent, tokens } = page.name;
    Page { key, parent, tokens, payload: page.payload }
}

/// Writes the cached beginning of a prompt to a file; how many tokens it holds.
///
/// # Errors
/// Nothing of it is cached, or what is wrong with the path.
pub fn save_session(
    driver: &Driver,
    path: &Path,
    token_ids: &[u32],
    salt: Option<Arc<str>>,
    namespace: [u8; 32],
) -> Result<usize, String> {
    let pages = driver.export_session(token_ids, salt).map_err(|error| error.to_string())?;
    if pages.is_empty() {
        return Err("token_ids: nothing of this prompt is in the cache".to_owned());
    }
    let pages: Vec<Page> = pages.into_iter().map(stored).collect();
    session::write(path, namespace, &pages).map_err(|error| error.to_string())?;
    Ok(pages.iter().map(|page| page.tokens.len()).sum())
}

/// Puts a session's pages into the cache; its tokens, and how many of them are cached now.
///
/// # Errors
/// What is wrong with the file, or that it is another model's.
pub fn load_session(
    driver: &Driver,
    path: &Path,
    salt: Option<Arc<str>>,
    namespace: [u8; 32],
    page_bytes: usize,
) -> Result<(Vec<u32>, usize), String> {
    let pages = session::read(path, namespace, page_bytes).map_err(|error| error.to_string())?;
    let page =
        |Page { key, parent, tokens, payload }| TierPage { name: Wanted { key, parent, tokens }, payload };
    let pages: Vec<TierPage> = pages.into_iter().map(page).collect();
    let tokens = pages.iter().flat_map(|page| page.name.tokens.iter().copied()).collect();
    let cached = driver.import_session(pages, salt).map_err(|error| error.to_string())?;
    Ok((tokens, cached))
}
