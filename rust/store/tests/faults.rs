//! Every operation of the file system is the last of a process, or fails in one of three ways: the store goes on, what comes
//! back is right, and what a dead process left behind is cleared.

mod common;

use std::sync::Arc;

use common::faulty::{Fault, FaultyDisk};
use common::{FILE_BYTES, leftovers, open, open_on, options, page, present};
use infer_store::StoreOptions;

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
