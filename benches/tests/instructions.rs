//! The hot requests take no more instructions than `benches/instructions.toml` allows, and a test that counts would notice.

use std::path::Path;
use std::process::{Command, Output};

use volley_benches::instructions::{BOUNDS, Bounds, incomparable, valgrind_is_installed};

/// Whether counts can be made and compared here. In CI it is a failure that they can't; elsewhere the test says that it is skipped.
fn comparable() -> bool {
    let missing = (!valgrind_is_installed()).then_some("valgrind is not installed; tools/test installs it");
    let Some(why) = missing.or(incomparable()) else { return true };
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}: nothing may be skipped in CI");
    eprintln!("skipped: {why}");
    false
}

fn count(args: &[&str]) -> (Output, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_volley-bench-instructions")).args(args).output().expect("run it");
    let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    (output, said)
}

#[test]
fn the_hot_requests_are_within_their_bounds() {
    if comparable() {
        let (output, said) = count(&[]);
        assert!(output.status.success(), "{said}");
        println!("{said}");
    }
}

#[test]
fn a_case_that_takes_more_than_its_bound_is_named() {
    if !comparable() {
        return;
    }
    let case = "scheduling/token_bucket_take";
    let mut bounds = Bounds::read(Path::new(BOUNDS)).expect("the committed bounds");
    *bounds.bounds.get_mut(case).expect("it has a bound") *= 0.9;
    let dir = tempfile::tempdir().expect("temporary folder");
    let lowered = dir.path().join("bounds.toml");
    bounds.write(&lowered).expect("written");
    let (output, said) = count(&["--bounds", lowered.to_str().expect("UTF-8"), case]);
    assert!(!output.status.success(), "{said}");
    let needed = [format!("  {case}: "), "tools/bench instructions --write".into()];
    assert!(needed.iter().all(|words| said.contains(words)), "{said}");
}
