//! The first question to a bucket: are we let in, and is what lies under the prefix ours?

use crate::bootset::BOOT_SET_PREFIX;
use crate::object_store::ObjectError;
use crate::platform::Platform;
use crate::snapshot::deletion::DELETION_PREFIX;
use crate::snapshot::gc::condemned::CONDEMNED_PREFIX;
use crate::snapshot::gc::lease::LEASE_PREFIX;
use crate::snapshot::{IMPORT_PREFIX, MANIFEST_PREFIX, PACK_PREFIX, REFERENCE_PREFIX};

use super::S3Store;
use super::failure::skew_seconds;
use super::listing::list_call;
use super::put::Conditional;
use super::transport::HttpTransport;

/// Where `volley object-store check` puts its trial objects.
pub const TRIAL_PREFIX: &str = "trial/";

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    /// One listing that shows that endpoint, bucket, credentials and prefix are right.
    ///
    /// # Errors
    /// One line that names endpoint, bucket, cause and what to do: `Fatal` for what is set wrongly, `Retry` for a store
    /// that can't be reached now.
    pub async fn check(&self) -> Result<(), ObjectError> {
        let page = self.page(&self.inner.prefix, None, Some("/")).await.map_err(|failure| match failure.error {
            // A listing is never absent: this endpoint does not speak S3.
            ObjectError::NotFound(_) => ObjectError::Fatal(format!(
                "{}: list the bucket: {}: no such bucket, or no S3 service: correct the endpoint",
                self.inner.place, failure.status
            )),
            error => error,
        })?;
        let ours = [
            BOOT_SET_PREFIX,
            CONDEMNED_PREFIX,
            DELETION_PREFIX,
            IMPORT_PREFIX,
            LEASE_PREFIX,
            MANIFEST_PREFIX,
            PACK_PREFIX,
            REFERENCE_PREFIX,
            TRIAL_PREFIX,
        ];
        let mut names = page.common_prefixes.iter().map(|group| group.prefix.as_str());
        let name_of = |full: &str| full.strip_prefix(&self.inner.prefix).unwrap_or(full).to_owned();
        let is_ours = |full: &str| ours.contains(&name_of(full).as_str());
        if names.clone().any(is_ours) {
            return Ok(());
        }
        // The marker that consoles put for an empty folder is nobody's object.
        let objects = page.contents.iter().map(|object| object.key.as_str()).filter(|key| !name_of(key).is_empty());
        match names.next().or_else(|| objects.clone().next()) {
            None => Ok(()),
            Some(foreign) => Err(ObjectError::Fatal(format!(
                "{}: the prefix holds something else ({:?}): choose one that is empty or Volley's",
                self.inner.place,
                name_of(foreign)
            ))),
        }
    }

    /// Seconds that this machine's clock is ahead of the store's; `None` where the store does not say.
    ///
    /// # Errors
    /// Those of a listing.
    pub async fn clock_skew_seconds(&self) -> Result<Option<i64>, ObjectError> {
        let mut call = list_call();
        call.query = vec![("list-type", "2".to_owned()), ("encoding-type", "url".to_owned())];
        call.query.extend([("prefix", self.inner.prefix.clone()), ("delimiter", "/".to_owned())]);
        let response = self.send_patiently(&call).await?;
        Ok(skew_seconds(&response, self.now().as_second()))
    }

    /// Whether the store refuses to put what exists; `None` before the first small conditional put.
    #[must_use]
    pub fn honours_conditional_put(&self) -> Option<bool> {
        match self.conditional() {
            Conditional::Unknown => None,
            Conditional::Honoured => Some(true),
            Conditional::Absent => Some(false),
        }
    }
}
