//! Listings, page by page, and deletions of many objects at once.

use rusty_s3::actions::{DeleteObjectsResponse, ListObjectsV2, ListObjectsV2Response};

use crate::object_store::{ObjectError, ObjectMeta, ObjectStore, check_key};
use crate::platform::Platform;

use super::S3Store;
use super::failure::Failure;
use super::put::content_md5;
use super::request::Call;
use super::transport::{HttpTransport, Method};
use super::xml;

/// A page holds a thousand objects: this many are 50 million, beyond any store of ours.
const PAGES_MAX: usize = 50_000;
/// Objects of one batch: what the protocol allows.
const BATCH_MAX: usize = 1000;

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    pub(super) async fn list_all(&self, prefix: &str) -> Result<Vec<ObjectMeta>, Failure> {
        let full = format!("{}{prefix}", self.inner.prefix);
        let mut found = Vec::new();
        let mut token: Option<String> = None;
        for _ in 0..PAGES_MAX {
            let page = self.page(&full, token.as_deref(), None).await?;
            for object in page.contents {
                let key = object.key.strip_prefix(&self.inner.prefix).unwrap_or_default();
                // What is no key of ours was put there by somebody else.
                if check_key(key).is_ok() && key.starts_with(prefix) {
                    found.push(ObjectMeta { key: key.to_owned(), size_bytes: object.size.unwrap_or(0) });
                }
            }
            match page.next_continuation_token {
                None => {
                    found.sort_by(|a, b| a.key.cmp(&b.key));
                    found.dedup_by(|a, b| a.key == b.key);
                    return Ok(found);
                }
                next if next == token => break,
                next => token = next,
            }
        }
        let call = list_call();
        Err(self.wrong(&call, 200, "the listing does not end"))
    }

    /// One page; with a delimiter keys are grouped up to it.
    pub(super) async fn page(
        &self,
        full_prefix: &str,
        token: Option<&str>,
        delimiter: Option<&str>,
    ) -> Result<ListObjectsV2Response, Failure> {
        let mut call = list_call();
        call.query = vec![("list-type", "2".to_owned()), ("encoding-type", "url".to_owned())];
        call.query.push(("prefix", full_prefix.to_owned()));
        call.query.extend(token.map(|token| ("continuation-token", token.to_owned())));
        call.query.extend(delimiter.map(|delimiter| ("delimiter", delimiter.to_owned())));
        let response = self.send_patiently(&call).await?;
        ListObjectsV2::parse_response(&xml::in_namespace(&String::from_utf8_lossy(&response.body)))
            .map_err(|e| self.wrong(&call, response.status, &format!("the listing can't be read: {e}")))
    }

    pub(super) async fn delete_batches(&self, keys: &[&str]) -> Result<(), ObjectError> {
        for batch in keys.chunks(BATCH_MAX) {
            match self.delete_batch(batch).await {
                Err(failure) if failure.is_not_implemented() => {
                    for key in batch {
                        self.delete(key).await?;
                    }
                }
                result => result?,
            }
        }
        Ok(())
    }

    async fn delete_batch(&self, keys: &[&str]) -> Result<(), Failure> {
        let mut request = String::from("<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>true</Quiet>");
        for key in keys {
            let full = self.full_key(key).map_err(|error| Failure { error, status: 0, code: String::new() })?;
            // Keys of ours have no characters to escape; the prefix may.
            let full = full.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            request.push_str(&format!("<Object><Key>{full}</Key></Object>"));
        }
        request.push_str("</Delete>");
        let mut call = Call::new(Method::Post, None, "delete objects of", "s3:DeleteObject");
        call.query = vec![("delete", String::new())];
        call.headers =
            vec![("content-md5", content_md5(request.as_bytes())), ("content-type", "application/xml".to_owned())];
        call.body = request.as_bytes();
        let response = self.send_patiently(&call).await?;
        let answer = DeleteObjectsResponse::parse(&xml::in_namespace(&String::from_utf8_lossy(&response.body)));
        let answer = answer.map_err(|e| self.wrong(&call, response.status, &format!("no result: {e}")))?;
        match answer.errors.iter().find(|error| error.code != "NoSuchKey") {
            None => Ok(()),
            Some(error) => {
                let place = &self.inner.place;
                let line = format!("{place}: delete {}: {} ({})", error.key, error.code, error.message);
                let code = error.code.clone();
                let error = match code.as_str() {
                    "InternalError" => ObjectError::Retry(line),
                    "SlowDown" | "ServiceUnavailable" => ObjectError::SlowDown(line),
                    _ => ObjectError::Fatal(line),
                };
                Err(Failure { error, status: response.status, code })
            }
        }
    }
}

pub(super) fn list_call() -> Call<'static> {
    Call::new(Method::Get, None, "list", "s3:ListBucket")
}
