//! Puts in parts, for large objects. The object appears when the upload is completed; one that fails is aborted.

use rusty_s3::actions::CreateMultipartUpload;

use crate::platform::Platform;

use super::S3Store;
use super::failure::{Asked, Failure, refused};
use super::put::PUT;
use super::request::Call;
use super::transport::{HttpTransport, Method};
use super::xml;

/// Stores want at least 5 MiB; what is repeated after a lost connection is one part.
const PART_BYTES: usize = 16 << 20;

type Header = (&'static str, String);

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    pub(super) async fn put_in_parts(
        &self,
        key: &str,
        data: &[u8],
        headers: Vec<Header>,
        condition: Option<Header>,
    ) -> Result<(), Failure> {
        let upload = self.begin(key, headers).await?;
        let result = self.parts(key, data, &upload, condition).await;
        if let Err(failure) = &result {
            self.abort(key, &upload, failure).await;
        }
        result
    }

    async fn begin(&self, key: &str, headers: Vec<Header>) -> Result<String, Failure> {
        let mut call = Call::new(Method::Post, Some(key), "begin to write", PUT);
        call.query = vec![("uploads", String::new())];
        call.headers = headers;
        let response = self.send_patiently(&call).await?;
        let answer =
            CreateMultipartUpload::parse_response(&xml::in_namespace(&String::from_utf8_lossy(&response.body)));
        let answer = answer.map_err(|e| self.wrong(&call, response.status, &format!("no upload id: {e}")))?;
        Ok(answer.upload_id().to_owned())
    }

    async fn parts(&self, key: &str, data: &[u8], upload: &str, condition: Option<Header>) -> Result<(), Failure> {
        let mut etags = Vec::new();
        for (number, part) in data.chunks(PART_BYTES).enumerate() {
            let mut call = Call::new(Method::Put, Some(key), "write a part of", PUT);
            call.query = vec![("partNumber", (number + 1).to_string()), ("uploadId", upload.to_owned())];
            call.headers = vec![("content-md5", self.content_md5_by_turns(part).await)];
            call.body = part;
            let response = self.send_patiently(&call).await?;
            let etag = response.header("etag").map(str::to_owned);
            etags.push(etag.ok_or_else(|| self.wrong(&call, response.status, "a part without an ETag"))?);
        }
        self.complete(key, upload, &etags, condition).await
    }

    async fn complete(
        &self,
        key: &str,
        upload: &str,
        etags: &[String],
        condition: Option<Header>,
    ) -> Result<(), Failure> {
        let body = completion(etags);
        let mut call = Call::new(Method::Post, Some(key), "finish writing", PUT);
        call.query = vec![("uploadId", upload.to_owned())];
        call.headers.extend(condition);
        call.body = body.as_bytes();
        let mut response = self.send(&call).await?;
        // A store may say 200 before it has done it, and tell the error in the body.
        if String::from_utf8_lossy(&response.body).contains("<Error>") {
            response.status = 500;
            let place = &self.inner.place;
            let (what, key) = (format!("finish writing {key}"), self.own_key(key));
            let now_s = self.now().as_second();
            return Err(refused(
                &Asked { place, what: &what, key, credentials: None, permission: PUT, now_s },
                &response,
            ));
        }
        Ok(())
    }

    /// Parts of an upload that is neither completed nor aborted cost money until a lifecycle rule removes them.
    async fn abort(&self, key: &str, upload: &str, failure: &Failure) {
        if failure.code == "NoSuchUpload" {
            return;
        }
        let mut call = Call::new(Method::Delete, Some(key), "give up writing", "s3:AbortMultipartUpload");
        call.query = vec![("uploadId", upload.to_owned())];
        if let Err(failure) = self.send(&call).await {
            tracing::warn!(error = %failure.error, "parts of an unfinished upload are left in the bucket");
        }
    }
}

fn completion(etags: &[String]) -> String {
    let mut xml = String::from("<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
    for (number, etag) in etags.iter().enumerate() {
        let etag = etag.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
        xml.push_str(&format!("<Part><PartNumber>{}</PartNumber><ETag>{etag}</ETag></Part>", number + 1));
    }
    xml.push_str("</CompleteMultipartUpload>");
    xml
}
