//! What the directory holds, in memory: 50 bytes for each page, whichever model's.
//!
//! The least recently used pages are found by sorting when room is needed, a sixteenth of the cap at a time: a list
//! in order of use would cost as much memory again, and would be wrong whenever another process used a page.

use std::collections::HashMap;
use std::time::SystemTime;

use crate::directory::{FOLDERS, Name};

/// One page's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct File {
    pub bytes: u64,
    pub used: SystemTime,
}

/// All pages' files that we know of.
#[derive(Debug)]
pub(crate) struct Index {
    folders: Vec<HashMap<Name, File>>,
    pages: u64,
    bytes: u64,
}

impl Index {
    pub fn new() -> Self {
        Index { folders: vec![HashMap::new(); FOLDERS], pages: 0, bytes: 0 }
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn contains(&self, name: &Name) -> bool {
        self.folder(name).is_some_and(|folder| folder.contains_key(name))
    }

    pub fn insert(&mut self, name: Name, file: File) {
        self.remove(&name);
        if let Some(folder) = self.folders.get_mut(usize::from(name[0])) {
            folder.insert(name, file);
            self.pages = self.pages.saturating_add(1);
            self.bytes = self.bytes.saturating_add(file.bytes);
        }
    }

    pub fn remove(&mut self, name: &Name) -> Option<File> {
        let file = self.folders.get_mut(usize::from(name[0]))?.remove(name)?;
        self.pages = self.pages.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(file.bytes);
        Some(file)
    }

    /// Replaces all that is known of a folder.
    pub fn replace(&mut self, folder: usize, files: impl IntoIterator<Item = (Name, File)>) {
        if let Some(known) = self.folders.get_mut(folder) {
            let gone = std::mem::take(known);
            let bytes = gone.values().fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
            self.pages = self.pages.saturating_sub(u64::try_from(gone.len()).unwrap_or(u64::MAX));
            self.bytes = self.bytes.saturating_sub(bytes);
        }
        for (name, file) in files {
            self.insert(name, file);
        }
    }

    /// The least recently used pages that together have at least `bytes`, oldest first.
    pub fn oldest(&self, bytes: u64) -> Vec<(Name, File)> {
        let mut files: Vec<(Name, File)> =
            self.folders.iter().flatten().map(|(name, file)| (*name, *file)).collect();
        files.sort_unstable_by_key(|(name, file)| (file.used, *name));
        let mut freed = 0_u64;
        let enough = files.iter().position(|(_, file)| {
            freed = freed.saturating_add(file.bytes);
            freed >= bytes
        });
        files.truncate(enough.map_or(files.len(), |last| last.saturating_add(1)));
        files
    }

    fn folder(&self, name: &Name) -> Option<&HashMap<Name, File>> {
        self.folders.get(usize::from(name[0]))
    }
}
