//! Every operation of the file system is the last of a process, or fails in one of three ways: the store goes on, what comes
//! back is right, and what a dead process left behind is cleared.

mod common;

use std::sync::Arc;

use common::faulty::{Fault, FaultyDisk, Refusing};
use common::{FILE_BYTES, leftovers, open, open_on, options, page, present};
use infer_store::{Put, StoreOptions};

/// A short life of a store: pages are written, evicted, read and written again. Which of them were there at its end.
fn live(options: &StoreOptions, disk: &FaultyDisk) {
    let Ok(store) = open_on(options, Arc::new(disk.clone())) else { return };
    for number in 0..6 {
        store.put(page(number));
    }
    store.flush(None);
    present(&store, 0..6);
    for number in 6..8 {
        store.put(page(number));
    }
    store.flush(None);
    present(&store, 0..8);
}

/// Strides above 100 are for looking at files and folders: opening looks at 256 of them, one like the other.
///
/// Lives with one fault after the other until a life has fewer operations; after each, a sound store opens what is left.
fn every_operation(fault: Fault, first: usize, stride: usize) {
    let count_stat = stride > 100;
    let mut at = first;
    loop {
        let folder = tempfile::tempdir().unwrap();
        let options =
            StoreOptions { max_bytes: 7 * FILE_BYTES, ..options(&folder.path().join("pages of models")) };
        let disk = FaultyDisk::new(fault, at, count_stat);
        live(&options, &disk);
        let reached = disk.done() > at;

        let store = open(&options);
        present(&store, 0..8); // each right or absent
        for number in 100..101 {
            store.put(page(number));
        }
        assert!(store.flush(None), "{fault:?} at {at}: a sound disk takes pages again");
        assert_eq!(present(&store, 100..101), [100], "{fault:?} at {at}");
        assert!(store.stats().bytes <= options.max_bytes, "{fault:?} at {at}");
        assert_eq!(leftovers(&options.dir), 1, "{fault:?} at {at}: only the living store's lock is left");
        if !reached {
            return assert!(at > 20, "a life has more than {at} operations");
        }
        at += stride;
    }
}

#[test]
fn a_full_device() {
    every_operation(Fault::Full, 0, 3);
}

#[test]
fn a_broken_device() {
    every_operation(Fault::Broken, 1, 3);
}

#[test]
fn short_reads_and_writes() {
    every_operation(Fault::Short, 2, 3);
}

#[test]
fn a_killed_process() {
    every_operation(Fault::Killed, 0, 1);
}

#[test]
fn folders_that_cannot_be_looked_at() {
    every_operation(Fault::Broken, 0, 211);
}

#[test]
fn a_directory_for_reading_only() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path());
    let disk = Refusing { read_only: true, ..Refusing::default() };
    assert!(open_on(&options, Arc::new(disk.clone())).is_err(), "nothing is there");
    let store = open(&options);
    assert!(store.put(page(0)) == Put::Queued && store.flush(None));
    store.close();
    let store = open_on(&options, Arc::new(disk.clone())).expect("it has all that reading needs");
    assert_eq!(present(&store, 0..2), [0]);
    assert_eq!(store.put(page(1)), Put::Unfit);
    std::fs::write(folder.path().join("infer-store"), "infer page store, version 2\n").unwrap();
    let error = open_on(&options, Arc::new(disk)).err().expect("another version").to_string();
    assert!(error.contains("version 2"), "{error}");
}

#[test]
fn pages_that_could_not_be_read_for_a_while_still_count_for_the_cap() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { max_bytes: 40 * FILE_BYTES, ..options(folder.path()) };
    let disk = Refusing::default();
    let store = open_on(&options, Arc::new(disk.clone())).unwrap();
    for number in 0..40 {
        assert!(store.put(page(number)) == Put::Queued && store.flush(None));
    }
    // Folders that changed a moment ago are listed again anyway.
    let past = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    for entry in std::fs::read_dir(folder.path().join("pages")).unwrap() {
        std::fs::File::open(entry.unwrap().path()).unwrap().set_modified(past).unwrap();
    }
    store.close();
    let store = open_on(&options, Arc::new(disk.clone())).unwrap();
    disk.unreadable.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(present(&store, 0..40), []);
    disk.unreadable.store(false, std::sync::atomic::Ordering::SeqCst);
    for number in 100..140 {
        store.put(page(number));
        store.flush(None);
    }
    let files = common::page_files(folder.path()).len();
    assert!(files <= 45, "{files} pages in a directory for 40");
}
