//! Pages whose contents follow from their number, and a disk that fails when told to.
#![allow(dead_code, reason = "each test uses a part")]

pub mod faulty;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use infer_store::disk::Disk;
use infer_store::{Page, Store, StoreError, StoreOptions, Tuning, Wanted};

pub const PAGE_BYTES: usize = 100;
/// Bytes of a page's file: header, two tokens, payload.
pub const FILE_BYTES: u64 = 152 + 8 + PAGE_BYTES as u64;

pub fn options(dir: &Path) -> StoreOptions {
    StoreOptions { dir: dir.to_owned(), max_bytes: 1 << 30, namespace: [7; 32], page_bytes: PAGE_BYTES }
}

/// Does not pause, so that a test sees what comes after an error.
pub fn impatient() -> Tuning {
    Tuning { pause_when_full: Duration::ZERO, pause_after_error: Duration::ZERO, ..Tuning::default() }
}

pub fn open(options: &StoreOptions) -> Store {
    Store::open(options.clone()).expect("a good directory opens")
}

pub fn open_on(options: &StoreOptions, disk: Arc<dyn Disk>) -> Result<Store, StoreError> {
    Store::open_on(options.clone(), impatient(), disk)
}

fn key(number: u64) -> [u8; 32] {
    let mut key = [0xab; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    key
}

pub fn page(number: u64) -> Page {
    let Wanted { key, parent, tokens } = wanted(number);
    let payload = (0..PAGE_BYTES).map(|at| (number as usize * 31 + at * 7) as u8).collect();
    Page { key, parent, tokens, payload }
}

pub fn wanted(number: u64) -> Wanted {
    Wanted { key: key(number), parent: key(number.wrapping_sub(1)), tokens: [number as u32, !0].into() }
}

/// Fetches and waits for the answer.
pub fn fetch(store: &Store, wanted: Vec<Wanted>) -> Vec<Option<Vec<u8>>> {
    store.fetch(1, wanted);
    let start = Instant::now();
    loop {
        if let Some(fetched) = store.poll().pop() {
            return fetched.pages;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "no answer");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Fetches numbered pages; each is right or absent. Returns which are there.
pub fn present(store: &Store, numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let numbers: Vec<u64> = numbers.collect();
    let pages = fetch(store, numbers.iter().map(|&number| wanted(number)).collect());
    assert_eq!(pages.len(), numbers.len());
    let mut there = Vec::new();
    for (number, payload) in numbers.into_iter().zip(pages) {
        if let Some(payload) = payload {
            assert_eq!(payload, page(number).payload, "page {number} came back as something else");
            there.push(number);
        }
    }
    there
}

/// The files of all pages in the directory.
pub fn page_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let folders = std::fs::read_dir(dir.join("pages")).unwrap();
    let files = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

/// What is left of files that were being written.
pub fn leftovers(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("writing")).unwrap().count()
}
