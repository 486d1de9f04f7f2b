//! The object store of a command: which one it is, and how it is opened.

use volley_server::config::{Config, Overrides};
use volley_server::object_store::any::StoreChoice;
use volley_server::object_store::s3::Environment;
use volley_server::object_store::{ObjectError, ObjectStoreUrl};
use volley_server::platform::blocking::{Blocking, ToolStore, open_store};

use super::{CliError, CliResult, Globals};

/// Which object store the command is about.
///
/// # Errors
/// Without one, or with one that is not understood.
pub(super) fn chosen(globals: &Globals) -> CliResult<StoreChoice> {
    let invalid = |why: String| CliError::new("invalid", why);
    let config = configuration(globals)?;
    let missing = "no object store: give --object-store file:DIR or s3://BUCKET/PREFIX, or set VOLLEY_OBJECT_STORE";
    let url = globals.object_store.as_ref().or(config.object_store.as_ref());
    let url: ObjectStoreUrl = url.ok_or_else(|| invalid(missing.to_owned()))?.parse().map_err(invalid)?;
    StoreChoice::new(&url, &config.s3, &Environment::of_process()).map_err(invalid)
}

/// The object store, which is there and lets us in.
///
/// # Errors
/// Says where, why and what to do.
pub(super) fn open(globals: &Globals) -> CliResult<ToolStore> {
    Ok(open_store(&chosen(globals)?)?)
}

/// Like [`open`], for a command that may be the first: the directory of a `file:` store is created.
pub(super) fn open_or_create(globals: &Globals) -> CliResult<ToolStore> {
    let choice = chosen(globals)?;
    if let StoreChoice::Dir(root) = &choice {
        let created = volley_server::object_store::dir::DirStore::create(Blocking, root.clone());
        return Ok(ToolStore::Dir(futures::executor::block_on(created)?));
    }
    Ok(open_store(&choice)?)
}

/// What volleyd's configuration file says, or its defaults.
///
/// # Errors
/// Names the file and what is wrong with it.
pub(super) fn configuration(globals: &Globals) -> CliResult<Config> {
    let config = Config::load(globals.config.as_deref(), &Overrides::default());
    config.map_err(|e| CliError::new("invalid", e.to_string()))
}

impl From<ObjectError> for CliError {
    fn from(e: ObjectError) -> CliError {
        CliError::new("object_store", e.to_string())
    }
}
