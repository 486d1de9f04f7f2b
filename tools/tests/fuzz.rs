//! The fuzz targets (docs/fuzzing.md) as plain tests: every committed input, and mutations of each from fixed seeds.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use targets::{TARGETS, Target};

/// Inputs are cut at every byte up to this many times, spread over longer ones.
const CUTS_MAX: usize = 200;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let dir = root().join("corpus").join(target.name);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable directory").path()).collect();
    files.sort();
    let name = |path: &PathBuf| path.file_name().expect("a file").to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), std::fs::read(path).expect("a readable file"))).collect()
}

/// Runs an input; one that fails is left where `tools/fuzz/run` can replay it.
fn run(target: &Target, input: &[u8], origin: &dyn Fn() -> String) {
    if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
        let dir = root().join("work");
        let path = dir.join(format!("{}-failure", target.name));
        std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, input)).expect("a writable tree");
        let (path, name) = (path.display(), target.name);
        panic!("{name}: {} breaks a property: tools/fuzz/run {name} --replay {path}", origin());
    }
}

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target of that name")
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end.max(1) as u64) as usize
    }
}

/// One of the mutations that find most: flipped bits, spliced inputs, inflated length fields, bytes that are repeated.
fn mutate(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    let at = random.below(bytes.len());
    match random.below(5) {
        0 => {
            for _ in 0..=random.below(3) {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
        }
        1 => {
            bytes.truncate(at);
            bytes.extend_from_slice(&other[random.below(other.len())..]);
        }
        2 => {
            let values = [0, 1, 0x7f, 0x80, 0xff, 0x100, 0xffff, 1 << 16, 1 << 20, 1 << 24, 1 << 31, u32::MAX];
            let (value, len) = (values[random.below(values.len())], [1, 2, 4][random.below(3)]);
            let field = if random.below(2) == 0 { value.to_le_bytes() } else { value.rotate_left(16).to_be_bytes() };
            let end = bytes.len().min(at + len);
            bytes[at..end].copy_from_slice(&field[..end - at]);
        }
        3 => {
            let part = bytes[at..bytes.len().min(at + 1 + random.below(64))].to_vec();
            bytes.splice(at..at, part);
        }
        _ => bytes[at] = random.below(256) as u8,
    }
    bytes
}

/// `mutations`: as many as take a few seconds.
fn corpus_and_mutations(name: &str, mutations: usize) {
    let target = target(name);
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "the corpus of {name} is empty");
    for (file, input) in &corpus {
        run(target, input, &|| format!("corpus/{name}/{file}"));
        for cut in (0..input.len()).step_by(input.len().div_ceil(CUTS_MAX).max(1)) {
            run(target, &input[..cut], &|| format!("corpus/{name}/{file} cut at {cut}"));
        }
    }
    let inputs: Vec<_> = corpus.iter().filter(|(_, input)| !input.is_empty()).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for number in 0..mutations {
        let (file, input) = inputs[number % inputs.len()];
        let mutant = mutate(input, &inputs[random.below(inputs.len())].1, &mut random);
        run(target, &mutant, &|| format!("mutation {number}, of corpus/{name}/{file}"));
    }
}

#[test]
fn wire() {
    corpus_and_mutations("wire", 20_000);
}

#[test]
fn manifest() {
    corpus_and_mutations("manifest", 20_000);
}

#[test]
fn journal() {
    corpus_and_mutations("journal", 4_000);
}

#[test]
fn config() {
    corpus_and_mutations("config", 20_000);
}

#[test]
fn nbd() {
    corpus_and_mutations("nbd", 5_000);
}

/// A format that changes makes its corpus anew, or the fuzzer starts with inputs that are only refused:
/// `tools/fuzz/run --seeds` runs this test with the variable that makes it write them.
#[test]
fn committed_seeds_are_those_of_the_formats_now() {
    let write = std::env::var_os("VOLLEY_FUZZ_SEEDS").is_some();
    for target in &TARGETS {
        if write {
            write_seeds(target);
        }
        let corpus = corpus(target);
        for (name, seed) in (target.seeds)() {
            let found = corpus.iter().find(|(file, _)| *file == format!("seed-{name}"));
            let same = found.is_some_and(|(_, bytes)| *bytes == seed);
            assert!(same, "corpus/{}/seed-{name} is out of date: run tools/fuzz/run --seeds", target.name);
        }
    }
}

fn write_seeds(target: &Target) {
    let dir = root().join("corpus").join(target.name);
    for (file, _) in corpus(target).into_iter().filter(|(file, _)| file.starts_with("seed-")) {
        std::fs::remove_file(dir.join(file)).expect("a writable tree");
    }
    for (name, seed) in (target.seeds)() {
        std::fs::write(dir.join(format!("seed-{name}")), seed).expect("a writable tree");
    }
}
