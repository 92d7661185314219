//! Processes that share a directory and are killed at any moment.
#![cfg(unix)]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{FILE_BYTES, leftovers, open, options, page, present};
use infer_store::StoreOptions;

const DIR: &str = "INFER_STORE_TEST_DIR";
/// Pages that the children write, over and over.
const PAGES: u64 = 200;

fn shared(dir: &Path) -> StoreOptions {
    StoreOptions { max_bytes: 60 * FILE_BYTES, ..options(dir) }
}

/// What a child process runs.
#[test]
#[ignore = "the other test starts it in processes of its own"]
fn write_until_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let store = open(&shared(Path::new(&dir)));
    for number in (0..PAGES).cycle() {
        store.put(page(number));
        if number % 16 == 0 {
            store.flush(None);
            present(&store, number..number + 4);
        }
    }
}

fn child(dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "write_until_killed"]).env(DIR, dir);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the directory holds pages that were written since `before`.
fn wait_for_pages(dir: &Path) {
    let start = Instant::now();
    while !dir.join("pages").exists() || common::page_files(dir).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(120), "the child writes nothing");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn killed_processes_leave_only_whole_pages() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("pages of models");
    for round in 0..12 {
        let mut children = [child(&dir), child(&dir)];
        wait_for_pages(&dir);
        // A third process, this one, reads and writes beside them.
        let store = open(&shared(&dir));
        let until = Instant::now() + Duration::from_millis(10 + 17 * round);
        while Instant::now() < until {
            store.put(page(1000 + round));
            present(&store, 0..20);
        }
        children.iter_mut().for_each(|child| child.kill().unwrap());
        children.iter_mut().for_each(|child| assert!(!child.wait().unwrap().success()));
        let there = present(&store, 0..PAGES);
        assert_eq!(store.stats().damaged, 0, "round {round}: nobody ever sees half a page, {there:?}");
        store.close();
    }
    let store = open(&shared(&dir));
    assert_eq!(leftovers(&dir), 1, "what the killed were writing is gone");
    store.put(page(5000));
    assert!(store.flush(None));
    assert!(present(&store, 5000..5001) == [5000]);
    assert!(common::page_files(&dir).len() <= 60, "the cap holds for all of them together");
}
