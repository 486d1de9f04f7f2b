//! `volley`, the operator's command: only calls the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    volley_tools::cli::main()
}
