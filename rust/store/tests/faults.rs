//! Every operation of the file system fails once, in every way: the store goes on, what comes back is right, and what a dead process
//! left behind is cleared.

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
        store.flush(None);
    }
    present(&store, 0..6);
    for number in 6..9 {
        store.put(page(number));
    }
    store.flush(None);
    present(&store, 0..9);
}

/// Lives with one fault after the other until a life has fewer operations; after each, a sound store opens what is left.
fn every_operation(fault: Fault, count_stat: bool) {
    let mut at = 0;
    loop {
        let folder = tempfile::tempdir().unwrap();
        let options =
            StoreOptions { max_bytes: 7 * FILE_BYTES, ..options(&folder.path().join("pages of models")) };
        let disk = FaultyDisk::new(fault, at, count_stat);
        live(&options, &disk);
        let reached = disk.done() > at;

        let store = open(&options);
        present(&store, 0..9); // each right or absent
        for number in 100..103 {
            store.put(page(number));
        }
        assert!(store.flush(None), "{fault:?} at {at}: a sound disk takes pages again");
        assert_eq!(present(&store, 100..103), [100, 101, 102], "{fault:?} at {at}");
        assert!(store.stats().bytes <= options.max_bytes, "{fault:?} at {at}");
        assert_eq!(leftovers(&options.dir), 1, "{fault:?} at {at}: only the living store's lock is left");
        if !reached {
            return assert!(at > 20, "a life has more than {at} operations");
        }
        at += 1;
    }
}

#[test]
fn a_full_device() {
    every_operation(Fault::Full, false);
}

#[test]
fn a_broken_device() {
    every_operation(Fault::Broken, false);
}

#[test]
fn short_reads_and_writes() {
    every_operation(Fault::Short, false);
}

#[test]
fn a_killed_process() {
    every_operation(Fault::Killed, false);
}

#[test]
fn folders_that_cannot_be_looked_at() {
    every_operation(Fault::Broken, true);
}
