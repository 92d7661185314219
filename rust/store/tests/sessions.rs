//! Sessions: whole or not at all, whatever happens to the file or to the process that writes it.

mod common;

use std::fs;
use std::path::Path;

use common::faulty::{Fault, FaultyDisk};
use common::{PAGE_BYTES, page};
use infer_store::disk::RealDisk;
use infer_store::{Page, session};

const MODEL: [u8; 32] = [7; 32];

fn pages(numbers: std::ops::Range<u64>) -> Vec<Page> {
    numbers.map(page).collect()
}

fn read(path: &Path) -> Result<Vec<Page>, String> {
    session::read(path, MODEL, PAGE_BYTES).map_err(|error| error.to_string())
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    for count in [0, 1, 5] {
        session::write(&path, MODEL, &pages(0..count)).unwrap();
        assert_eq!(read(&path).unwrap(), pages(0..count));
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn another_model_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    session::write(&path, MODEL, &pages(0..2)).unwrap();
    let error = session::read(&path, [8; 32], PAGE_BYTES).unwrap_err().to_string();
    assert!(error.contains("namespace") && error.contains("talk.session"), "{error}");
    let error = session::read(&path, MODEL, PAGE_BYTES + 1).unwrap_err().to_string();
    assert!(error.contains("payload length") || error.contains("number of pages"), "{error}");
    assert!(read(&folder.path().join("none")).unwrap_err().contains("none"));
}

#[test]
fn every_cut_and_every_changed_byte_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    session::write(&path, MODEL, &pages(0..2)).unwrap();
    let whole = fs::read(&path).unwrap();
    for end in 0..whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        read(&path).expect_err(&format!("cut at {end}"));
    }
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        read(&path).expect_err(&format!("byte {at} changed"));
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    let told = read(&path).expect_err("one byte more");
    let (found, said) = (whole.len() + 1, whole.len());
    assert!(
        told.contains(&format!("file length is {found}; expected {said}, which its head says")),
        "{told}"
    );
}

#[test]
fn a_failed_write_leaves_the_old_session() {
    for fault in [Fault::Full, Fault::Broken, Fault::Killed] {
        let mut at = 0;
        loop {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("talk.session");
            session::write(&path, MODEL, &pages(0..2)).unwrap();
            let disk = FaultyDisk::new(fault, at, false);
            let written = session::write_on(&disk, &path, MODEL, &pages(3..7)).is_ok();
            let expected = if written { pages(3..7) } else { pages(0..2) };
            assert_eq!(read(&path).unwrap(), expected, "{fault:?} at {at}");
            if disk.done() <= at {
                assert!(written && at > 5, "{fault:?} at {at}");
                break;
            }
            at += 1;
        }
    }
}

#[test]
fn short_writes_are_completed_and_short_reads_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    for at in 0..12 {
        session::write_on(&FaultyDisk::new(Fault::Short, at, false), &path, MODEL, &pages(0..3)).unwrap();
        assert_eq!(session::read_on(&RealDisk, &path, MODEL, PAGE_BYTES).unwrap(), pages(0..3));
        let disk = FaultyDisk::new(Fault::Short, at, false);
        if let Ok(found) = session::read_on(&disk, &path, MODEL, PAGE_BYTES) {
            assert_eq!(found, pages(0..3), "{at}");
        }
    }
}

#[test]
fn folders_and_files_of_others_in_the_place_of_a_session() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    fs::create_dir(&path).unwrap();
    assert!(read(&path).unwrap_err().contains("talk.session"));
    let error = session::write(&path, MODEL, &pages(0..1)).unwrap_err().to_string();
    assert!(error.contains("talk.session"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half written stays");
    fs::remove_dir(&path).unwrap();
    fs::write(&path, "a text that somebody wrote, longer than the head of a session is by some bytes")
        .unwrap();
    assert!(read(&path).unwrap_err().contains("start of the file"));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_not_replaced() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = session::write(&path, MODEL, &pages(0..1)).unwrap_err().to_string();
    assert!(error.ends_with("cannot be written: not a regular file"), "{error}");
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let dangling = folder.path().join("link");
    symlink(folder.path().join("nothing"), &dangling).unwrap();
    session::write(&dangling, MODEL, &pages(0..1)).unwrap();
}

#[test]
fn two_writers_of_one_session_leave_one_of_the_two() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    session::write(&path, MODEL, &pages(0..1)).unwrap();
    std::thread::scope(|scope| {
        for first in [10, 20] {
            let path = &path;
            scope.spawn(move || {
                for _ in 0..8 {
                    // No pass through the device: the order of operations is what counts.
                    let disk = FaultyDisk::new(Fault::Broken, usize::MAX, false);
                    session::write_on(&disk, path, MODEL, &pages(first..first + 4)).unwrap();
                }
            });
        }
        for _ in 0..50 {
            let found = read(&path).expect("always a whole one");
            assert!([0, 10, 20].iter().any(|&first| found[0] == page(first)));
        }
    });
    assert_eq!(read(&path).unwrap().len(), 4);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
