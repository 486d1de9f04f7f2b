//! Folded stacks: one line each, outermost frame first, and how many samples.

use std::collections::HashMap;

use serde::Serialize;

use crate::process::Result;

/// One stack and how often it was sampled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack<'a> {
    /// The thread's name first, the function that ran last.
    pub frames: Vec<&'a str>,
    pub samples: u64,
}

impl Stack<'_> {
    /// The function that ran. What it has of the standard library inlined is its own: nobody looks for `Vec::len`.
    #[must_use]
    pub fn function(&self) -> &str {
        let ours = self.frames.iter().skip(1).rev().find(|frame| !is_library(frame));
        ours.or(self.frames.last()).copied().unwrap_or_default()
    }
}

fn is_library(frame: &str) -> bool {
    let path = frame.trim_start_matches(['<', '&']);
    ["core::", "alloc::", "std::"].iter().any(|library| path.starts_with(library))
}

/// Understands folded stacks.
///
/// # Errors
/// When a line has no frame or no count.
pub fn parse(folded: &str) -> Result<Vec<Stack<'_>>> {
    folded.lines().filter(|line| !line.is_empty()).map(stack).collect()
}

fn stack(line: &str) -> Result<Stack<'_>> {
    let bad = || format!("not a folded stack: {line:?}");
    let (frames, samples) = line.rsplit_once(' ').ok_or_else(bad)?;
    let samples = samples.parse().map_err(|_| bad())?;
    Ok(Stack { frames: frames.split(';').collect(), samples })
}

/// How much of all samples was in a function itself, and in what it has of the standard library.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Function {
    pub name: String,
    pub samples: u64,
    pub percent: f64,
}

/// The functions with the most samples, the most first.
#[must_use]
pub fn top(stacks: &[Stack<'_>], count: usize) -> Vec<Function> {
    let mut by_name: HashMap<&str, u64> = HashMap::new();
    for stack in stacks {
        *by_name.entry(stack.function()).or_default() += stack.samples;
    }
    let all: u64 = by_name.values().sum();
    let mut functions: Vec<(&str, u64)> = by_name.into_iter().collect();
    functions.sort_by_key(|(name, samples)| (std::cmp::Reverse(*samples), *name));
    functions.truncate(count);
    let function = |(name, samples): (&str, u64)| Function {
        name: name.to_owned(),
        samples,
        percent: samples as f64 * 100.0 / all as f64,
    };
    functions.into_iter().map(function).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_are_parsed_and_their_functions_counted() {
        let folded = "volley-shard-0;main;a 3\nvolley-shard-0;main;b;<T as Deref>::deref 2\n\nx;a 5\n";
        let stacks = parse(folded).expect("stacks");
        assert_eq!(stacks[1], Stack { frames: vec!["volley-shard-0", "main", "b", "<T as Deref>::deref"], samples: 2 });
        let functions = top(&stacks, 1);
        assert_eq!(functions, [Function { name: "a".to_owned(), samples: 8, percent: 80.0 }]);
        let of_library =
            parse("x;std::main;a;<core::cell::Ref<T>>::new;core::mem::swap 1\nx;std::main;<std::x>::y 1\n");
        let names: Vec<String> = of_library.expect("stacks").iter().map(|stack| stack.function().to_owned()).collect();
        assert_eq!(names, ["a", "<std::x>::y"], "the library's functions count for who has them inlined");
        assert!(parse("no count").is_err() && parse("7").is_err());
        assert!(top(&[], 3).is_empty());
    }
}
