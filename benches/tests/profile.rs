//! `tools/profile` says what it understands, without building anything.

use std::path::Path;
use std::process::{Command, Output};

use clap::{CommandFactory, ValueEnum};
use volley_benches::profile::Args;
use volley_benches::profile::workload::Workload;

fn profile(words: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/profile");
    Command::new(script).args(words).output().expect("tools/profile runs")
}

#[test]
fn the_help_names_every_workload_and_option() {
    let output = profile(&["--help"]);
    assert!(output.status.success(), "{output:?}");
    let help = String::from_utf8(output.stdout).expect("text");
    for workload in Workload::value_variants() {
        let line = format!("\n  {} ", workload.name());
        assert!(help.contains(&line), "{line:?} is missing in\n{help}");
        assert_eq!(workload.to_possible_value().expect("each has a name").get_name(), workload.name());
    }
    let mut understood: Vec<String> = Args::command()
        .get_arguments()
        .filter_map(|argument| argument.get_long())
        .filter(|long| *long != "help")
        .map(|long| format!("--{long}"))
        .collect();
    understood.sort();
    let first_word = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let mut named: Vec<String> = help.lines().map(first_word).filter(|word| word.starts_with("--")).collect();
    named.sort();
    assert_eq!(named, understood, "what the help names is what the program understands");
    assert_eq!(String::from_utf8_lossy(&profile(&["read", "--help"]).stdout), help);
}

#[test]
fn an_unknown_workload_is_refused_with_the_help() {
    for words in [&["boil"][..], &[]] {
        let output = profile(words);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage: tools/profile WORKLOAD"), "{output:?}");
    }
}
