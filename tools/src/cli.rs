//! The frame of the `volley` command: global options, the one way to fail, and the one way to print.
//!
//! Results go to stdout, as text or (`--json`) as one JSON value. An error goes to stderr as one line
//! `volley: error: …` or (`--json`) as `{"error":{"code":…,"message":…}}`; the exit code is 1, or 2 for wrong usage.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};

pub(crate) mod api;
pub mod batch;
pub mod bootset;
pub mod cache;
pub mod check;
pub mod image;
pub mod ledger;
pub mod node;
pub mod object_store;
mod objects;
pub mod place;
pub mod store;
pub mod volume;

/// Volley: volumes from snapshots at once, hydrated behind the guest's back.
#[derive(Debug, Parser)]
#[command(name = "volley", version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Import images into the object store and manage the snapshots there. Needs no server.
    #[command(subcommand, visible_alias = "snapshot")]
    Image(image::ImageCommand),
    /// Create, watch and delete volumes.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Create, watch and cancel many volumes at once.
    #[command(subcommand)]
    Batch(batch::BatchCommand),
    /// Show where volumes would go, and why, without creating any.
    Place(place::PlaceArgs),
    /// Look at the volume stores.
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Look at what machines read when they boot from an image, record it, forget it.
    #[command(subcommand, name = "bootset")]
    BootSet(bootset::BootSetCommand),
    /// Look at the chunk cache, warm it with an image, drop an image from it.
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Look at the object store.
    #[command(subcommand)]
    ObjectStore(object_store::ObjectStoreCommand),
    /// Look at the server.
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Show what guests asked for, where it came from, and what sharing saved, by image and batch.
    Ledger(ledger::LedgerArgs),
    /// Verify the data directory of a node that is not running. Exit code 0: clean, 1: findings, 2: could not check.
    Check(check::CheckArgs),
}

/// Options of every command, accepted before and after it.
#[derive(Clone, Debug, Args)]
pub struct Globals {
    /// Print results (stdout) and errors (stderr) as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// HTTP address of the server; the port defaults to 7480.
    #[arg(long, global = true, env = "VOLLEY_SERVER", default_value = "127.0.0.1:7480", value_name = "HOST[:PORT]")]
    pub server: String,
    /// Object store: file:/var/lib/volley/objects or s3://BUCKET/PREFIX.
    #[arg(long, global = true, env = "VOLLEY_OBJECT_STORE", value_name = "URL")]
    pub object_store: Option<String>,
    /// Configuration file of volleyd: its object_store, [s3] and cache.dir are used where options and environment say nothing.
    #[arg(long, global = true, env = "VOLLEY_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Why a command failed: a stable code for programs and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CliError {
    pub code: String,
    pub message: String,
}

pub type CliResult<T = ()> = Result<T, CliError>;

impl CliError {
    /// `code` is snake_case and stable; wire statuses use [`volley_protocol::Status::as_str`].
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> CliError {
        CliError { code: code.into(), message: message.into() }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Image(command) => image::run(&cli.globals, command),
        Command::Volume(command) => volume::run(&cli.globals, command),
        Command::Batch(command) => batch::run(&cli.globals, command),
        Command::BootSet(command) => bootset::run(&cli.globals, command),
        Command::Place(args) => place::run(&cli.globals, args),
        Command::Store(command) => store::run(&cli.globals, command),
        Command::Cache(command) => cache::run(&cli.globals, command),
        Command::ObjectStore(command) => object_store::run(&cli.globals, command),
        Command::Node(command) => node::run(&cli.globals, command),
        Command::Ledger(args) => ledger::run(&cli.globals, args),
        Command::Check(args) => return check::run(&cli.globals, args),
    };
    main_exit(cli.globals.json, result)
}

/// Reports the outcome of a command and turns it into the exit code.
pub fn main_exit(json: bool, result: CliResult) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // One line, whatever a library put into its message.
    let message = error.message.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = if json {
        json!({"error": {"code": error.code, "message": message}}).to_string()
    } else {
        format!("volley: error: {message}")
    };
    // Nothing is left to be done if stderr is closed.
    let _ = writeln!(io::stderr(), "{line}");
    ExitCode::FAILURE
}

/// Prints text and a newline to stdout. A reader that has gone away (`| head`) ends the program quietly.
///
/// # Errors
/// When stdout can't be written for any other reason.
pub fn print_line(text: &str) -> CliResult {
    match writeln!(io::stdout(), "{text}") {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(|e| CliError::new("io", format!("cannot write to stdout: {e}"))),
    }
}

/// Prints a result as JSON.
///
/// # Errors
/// When stdout can't be written.
pub fn print_json(value: &impl Serialize) -> CliResult {
    let value: Value = serde_json::to_value(value).map_err(|e| CliError::new("internal", e.to_string()))?;
    print_line(&format!("{value:#}"))
}

/// Rows of text under a header, aligned for reading.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    #[must_use]
    pub fn new(header: &[&str]) -> Table {
        Table { rows: vec![header.iter().map(|h| (*h).to_owned()).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints the table, left-aligned with two spaces between columns.
    ///
    /// # Errors
    /// When stdout can't be written.
    pub fn print(&self) -> CliResult {
        print_line(&self.to_string())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
        for (number, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
            let newline = if number == 0 { "" } else { "\n" };
            write!(f, "{newline}{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::{Cli, Table};

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn tables_are_aligned_without_trailing_spaces() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(["debian-12".to_owned(), "2 GiB".to_owned()]);
        table.row(["x".to_owned(), "512 B".to_owned()]);
        assert_eq!(table.to_string(), "NAME       SIZE\ndebian-12  2 GiB\nx          512 B");
    }
}
