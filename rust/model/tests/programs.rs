//! Each family's program as text, to be read in a review: `tests/programs/<architecture>.txt`.
//!
//! After a change on purpose: `UPDATE_SNAPSHOTS=1 cargo test -p infer-model --test programs`.

mod common;

use std::path::Path;

use common::{golden_cases, golden_folder};
use infer_model::{Checkpoint, Program};

#[test]
fn programs_are_the_reviewed_ones() {
    let update = std::env::var_os("UPDATE_SNAPSHOTS").is_some();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
    for case in golden_cases() {
        let checkpoint = Checkpoint::open(&golden_folder().join(&case), true).expect("opens");
        let program = Program::new(&checkpoint.spec).to_string();
        let path = folder.join(format!("{case}.txt"));
        if update {
            std::fs::write(&path, &program).expect("written");
        }
        let reviewed = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(program, reviewed, "{case}: see the head of this test");
    }
}

#[test]
fn fusion_merges_products_of_one_input_and_keeps_the_rest() {
    let checkpoint = Checkpoint::open(&golden_folder().join("llama"), true).expect("opens");
    let plain = Program::new(&checkpoint.spec);
    let mut never = plain.clone();
    never.fuse(|_, _| false);
    assert_eq!(never, plain);
    let mut fused = plain.clone();
    fused.fuse(|_, _| true);
    let text = fused.to_string();
    assert!(text.contains("linear normed -> qkv Query.0|Key.0|Value.0"), "{text}");
    assert!(text.contains("linear normed -> gate_up Gate.0|Up.0"), "{text}");
    let layers = checkpoint.spec.layers.len();
    assert_eq!(plain.steps.len() - fused.steps.len(), 3 * layers);
}

/// The steps behind the last attention, with rows selected early.
fn narrow_end(case: &str) -> String {
    let checkpoint = Checkpoint::open(&golden_folder().join(case), true).expect("opens");
    let mut program = Program::new(&checkpoint.spec);
    program.fuse(|_, _| true);
    program.narrow();
    let text = program.to_string();
    let last = text.rfind("\nattend ").expect("attention");
    text[last + 1..].lines().skip(1).collect::<Vec<_>>().join("\n")
}

#[test]
fn rows_are_selected_behind_the_last_attention() {
    let sequential = "select hidden -> selected\nselect attended -> selected_attended\n\
        linear selected_attended -> branch Output.1\nadd selected += 1 * branch\n";
    assert!(narrow_end("llama").starts_with(sequential), "{}", narrow_end("llama"));
    // Both branches read one norm.
    let parallel = "select hidden -> selected\nselect normed -> selected_normed\n\
        select attended -> selected_attended\nlinear selected_attended -> attention_branch Output.3\n\
        linear selected_normed -> gate_up Gate.3|Up.3\n";
    assert!(narrow_end("cohere2").starts_with(parallel), "{}", narrow_end("cohere2"));
    for case in golden_cases() {
        let end = narrow_end(&case);
        let (selects, rest): (Vec<_>, Vec<_>) = end.lines().partition(|step| step.starts_with("select "));
        assert!(selects.len() > 1, "{case}: {selects:?}");
        let mut words = rest.iter().flat_map(|step| step.split([' ', '[']));
        assert!(!words.any(|word| ["hidden", "attended"].contains(&word)), "{case}: {rest:?}");
    }
}

#[test]
fn only_gates_that_are_written_out_need_memory() {
    let checkpoint = Checkpoint::open(&golden_folder().join("llama"), true).expect("opens");
    let gates = |together: bool| {
        let mut program = Program::new(&checkpoint.spec);
        program.fuse(|_, _| together);
        program.release_unused_buffers();
        let width = |name| {
            let mut own = program.buffers.iter().filter(|buffer| buffer.name == name);
            own.next().expect("a buffer").width
        };
        assert!(["hidden", "qkv", "activated", "logits"].into_iter().all(|name| width(name) > 0));
        assert_eq!(width("router"), 0, "there are no experts");
        width("gate_up")
    };
    assert!(gates(false) > 0);
    assert_eq!(gates(true), 0);
}
