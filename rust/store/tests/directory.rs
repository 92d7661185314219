//! A directory of pages through its life: restarts, the cap on bytes, models that share it, damage, and directories of others.

mod common;

use std::fs;

use common::{FILE_BYTES, PAGE_BYTES, fetch, leftovers, open, options, page, page_files, present, wanted};
use infer_store::{Page, Put, Store, StoreOptions, Wanted};
use proptest::prelude::*;

fn fill(store: &Store, numbers: impl Iterator<Item = u64>) {
    for number in numbers {
        assert_eq!(store.put(page(number)), Put::Queued, "page {number} is new and fits");
    }
    assert!(store.flush(None), "everything was written");
}

#[test]
fn pages_survive_their_store_and_come_back_in_the_order_of_the_questions() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path());
    let store = open(&options);
    let secret = store.secret();
    fill(&store, 0..20);
    assert_eq!(store.put(page(3)), Put::Known, "it is there already");
    store.close();

    let store = open(&options);
    assert_eq!(store.secret(), secret);
    let asked = vec![wanted(7), wanted(99), wanted(0)];
    assert_eq!(fetch(&store, asked), [Some(page(7).payload), None, Some(page(0).payload)]);
    assert_eq!(present(&store, 0..25), (0..20).collect::<Vec<_>>());
    let stats = store.stats();
    assert_eq!((stats.pages, stats.bytes, stats.damaged), (20, 20 * FILE_BYTES, 0));
    assert_eq!(leftovers(folder.path()), 1, "only this store's own lock");
}

#[test]
fn the_cap_holds_and_the_least_recently_used_go_first() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { max_bytes: 10 * FILE_BYTES, ..options(folder.path()) };
    let store = open(&options);
    for number in 0..10 {
        fill(&store, number..=number);
        std::thread::sleep(std::time::Duration::from_millis(5)); // file times tell who is older
    }
    assert_eq!(present(&store, 0..3), [0, 1, 2]); // used: now 3 is the oldest
    fill(&store, 10..14);
    let there = present(&store, 0..14);
    assert!(there.len() <= 10, "{there:?}");
    assert!([0, 1, 2, 13].iter().all(|number| there.contains(number)), "{there:?}");
    assert!(store.stats().bytes <= options.max_bytes && store.stats().evicted >= 4);
    store.close();
    let smaller = StoreOptions { max_bytes: 4 * FILE_BYTES, ..options };
    let store = open(&smaller);
    fill(&store, 20..21);
    assert!(page_files(folder.path()).len() <= 4, "a smaller cap is kept too");
}

#[test]
fn models_share_a_directory_and_never_meet() {
    let folder = tempfile::tempdir().unwrap();
    let ours = open(&options(folder.path()));
    let others = open(&StoreOptions { namespace: [8; 32], ..options(folder.path()) });
    fill(&ours, 0..4);
    assert_eq!(present(&others, 0..4), []);
    fill(&others, 2..6);
    assert_eq!(present(&ours, 0..6), [0, 1, 2, 3]);
    assert_eq!(present(&others, 0..6), [2, 3, 4, 5]);
}

#[test]
fn what_was_asked_for_must_be_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&options(folder.path()));
    fill(&store, 0..1);
    let other_tokens = Wanted { tokens: [9, 9].into(), ..wanted(0) };
    let other_parent = Wanted { parent: [9; 32], ..wanted(0) };
    assert_eq!(fetch(&store, vec![other_tokens, other_parent]), [None, None]);
    assert_eq!(present(&store, 0..1), [0], "a wrong question costs nothing");
}

#[test]
fn what_does_not_fit_is_refused_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&StoreOptions { max_bytes: FILE_BYTES - 1, ..options(folder.path()) });
    assert_eq!(store.put(page(0)), Put::Unfit, "one page is more than the cap");
    let short = Page { payload: vec![0; PAGE_BYTES - 1], ..page(1) };
    assert_eq!(store.put(short), Put::Unfit, "a payload of another length");
    assert_eq!(store.stats().refused, 2);
    let zero = StoreOptions { page_bytes: 0, ..options(folder.path()) };
    assert!(Store::open(zero).err().unwrap().to_string().contains("page_bytes"));
    let tiny = StoreOptions { max_bytes: 10, ..options(folder.path()) };
    let error = Store::open(tiny).err().unwrap().to_string();
    assert!(error.starts_with("max_bytes is 10; expected more than the "), "{error}");
}

#[test]
fn a_directory_of_somebody_else_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("thesis.txt"), "precious").unwrap();
    let error = Store::open(options(folder.path())).err().expect("it is not ours").to_string();
    assert!(error.contains(&folder.path().display().to_string()), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let file = folder.path().join("thesis.txt");
    assert!(Store::open(options(&file)).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[cfg(unix)]
#[test]
fn links_lead_nowhere() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = options(folder.path());
    let store = open(&options);
    fill(&store, 0..8);
    store.close();
    let files = page_files(folder.path());
    for file in &files {
        let target = elsewhere.path().join(file.file_name().unwrap());
        fs::rename(file, &target).unwrap();
        std::os::unix::fs::symlink(&target, file).unwrap();
    }
    let store = open(&options);
    assert_eq!(present(&store, 0..8), [], "a page is a file, not a link to one");
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), files.len(), "what they point at stays");
}

#[cfg(unix)]
#[test]
fn a_folder_that_is_a_link_is_not_written_through() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = open(&options(folder.path()));
    for number in 0..256 {
        let link = folder.path().join(format!("pages/{number:02x}"));
        std::os::unix::fs::symlink(elsewhere.path(), link).unwrap();
    }
    store.put(page(0));
    store.flush(None);
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0, "nothing is written outside");
    assert_eq!((present(&store, 0..1), store.stats().pages), (vec![], 0));
    assert_eq!(leftovers(folder.path()), 1, "nothing half written stays");
}

#[test]
fn every_cut_of_a_page_is_a_miss_and_every_changed_byte() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&options(folder.path()));
    fill(&store, 0..1);
    let file = page_files(folder.path()).remove(0);
    let whole = fs::read(&file).unwrap();
    let cuts = (0..whole.len()).map(|end| whole[..end].to_vec());
    let changes = (0..whole.len()).map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
    for (number, bytes) in cuts.chain(changes).enumerate() {
        fs::write(&file, &bytes).unwrap();
        assert_eq!(present(&store, 0..1), [], "damage {number}");
        assert!(!file.exists(), "damage {number}: what is damaged is deleted");
    }
    assert_eq!(store.stats().damaged, 2 * FILE_BYTES);
    fill(&store, 0..1);
    assert_eq!(present(&store, 0..1), [0]);
}

#[test]
fn pages_under_each_others_names_are_misses() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&options(folder.path()));
    fill(&store, 0..2);
    let files = page_files(folder.path());
    let spare = folder.path().join("spare");
    fs::rename(&files[0], &spare).unwrap();
    fs::rename(&files[1], &files[0]).unwrap();
    fs::rename(&spare, &files[1]).unwrap();
    assert_eq!(present(&store, 0..2), []);
    assert_eq!((store.stats().damaged, page_files(folder.path()).len()), (2, 0));
}

#[test]
fn a_folder_in_the_place_of_a_page_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&options(folder.path()));
    fill(&store, 0..1);
    let file = page_files(folder.path()).remove(0);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    fs::write(file.with_file_name("notes.txt"), "precious").unwrap();
    assert_eq!(present(&store, 0..1), []);
    store.put(page(0));
    assert!(store.flush(Some(std::time::Duration::from_secs(60))) || store.stats().refused == 1);
    assert_eq!((present(&store, 0..1), leftovers(folder.path())), (vec![], 1));
    assert!(file.is_dir() && file.with_file_name("notes.txt").exists());
}

#[test]
fn two_stores_at_once_read_each_others_pages_and_keep_the_cap() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { max_bytes: 40 * FILE_BYTES, ..options(folder.path()) };
    let (first, second) = (open(&options), open(&options));
    fill(&first, 0..10);
    fill(&second, 10..20);
    assert_eq!(present(&second, 0..20), (0..20).collect::<Vec<_>>());
    assert_eq!(present(&first, 0..20), (0..20).collect::<Vec<_>>());
    for number in (100..300).step_by(2) {
        fill(&first, number..number + 1);
        fill(&second, number + 1..number + 2);
        let files = page_files(folder.path()).len();
        assert!(files <= 46, "{files} pages: the cap and an eighth of it");
    }
    assert!(first.stats().damaged + second.stats().damaged == 0);
}

#[test]
fn markers_of_other_versions_and_damaged_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path());
    let store = open(&options);
    fill(&store, 0..1);
    store.close();
    let marker = folder.path().join("infer-store");
    let text = fs::read(&marker).unwrap();
    for other in [&b""[..], b"infer page store, version 2\n", &[0xff; 9000]] {
        fs::write(&marker, other).unwrap();
        let error = Store::open(options.clone()).err().expect("another version").to_string();
        assert!(error.contains("version 1") && error.len() < 1000, "{error}");
    }
    fs::write(&marker, text).unwrap();
    let secret = fs::read(folder.path().join("secret")).unwrap();
    for damaged in [&secret[..0], &secret[..63], &[0; 64], &[0; 9000]] {
        fs::write(folder.path().join("secret"), damaged).unwrap();
        assert_ne!(open(&options).secret()[..], secret[..32], "a new one is made");
        assert_eq!(fs::metadata(folder.path().join("secret")).unwrap().len(), 64);
    }
}

#[test]
fn a_directory_whose_maker_died_before_its_marker_was_there_is_usable() {
    for left in [&[][..], &["lock"], &["lock", "infer-store.new"]] {
        let folder = tempfile::tempdir().unwrap();
        for name in left {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let store = open(&options(folder.path()));
        fill(&store, 0..1);
        assert!(!folder.path().join("infer-store.new").exists());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any file altered, cut or lengthened in any way gives a miss, is deleted, and its page can be written again.
    #[test]
    fn damage_is_a_miss(place in 0.0..1.0_f64, flip in 1_u8.., cut in prop::option::of(0.0..1.0_f64), tail in 0_usize..3) {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        let store = open(&options);
        fill(&store, 0..2);
        store.close();
        let victim = page_files(folder.path()).remove(0);
        let mut bytes = fs::read(&victim).unwrap();
        let at = (place * bytes.len() as f64) as usize;
        match cut {
            Some(part) => bytes.truncate((part * bytes.len() as f64) as usize),
            None if tail > 0 => bytes.extend(std::iter::repeat_n(flip, tail)),
            None => bytes[at] ^= flip,
        }
        fs::write(&victim, &bytes).unwrap();
        let store = open(&options);
        let there = present(&store, 0..2);
        prop_assert_eq!(there.len(), 1);
        prop_assert_eq!(store.stats().damaged, 1);
        prop_assert!(!victim.exists());
        fill(&store, 1 - there[0]..2 - there[0]);
        prop_assert_eq!(present(&store, 0..2), [0, 1]);
    }
}
