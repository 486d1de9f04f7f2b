//! Reads: whole objects and ranges. A body that is not exactly what was asked for is `Corrupt`, never served.

use std::ops::Range;

use crate::object_store::{ObjectBytes, ObjectError};
use crate::platform::Platform;

use super::S3Store;
use super::failure::Failure;
use super::request::Call;
use super::transport::{HttpResponse, HttpTransport, Method};

/// Objects are read whole only if they are metadata or packs; the largest manifest is below rkyv's 2 GiB.
const GET_BYTES_MAX: u64 = 2 << 30;

impl<P: Platform, T: HttpTransport> S3Store<P, T> {
    pub(super) async fn get_whole(&self, key: &str) -> Result<Vec<u8>, Failure> {
        let mut call = Call::new(Method::Get, Some(key), "read", "s3:GetObject");
        call.response_bytes_max = GET_BYTES_MAX;
        let response = self.send_patiently(&call).await?;
        match response.status {
            200 => Ok(response.body),
            status => Err(self.wrong(&call, status, &format!("{status} instead of the object"))),
        }
    }

    pub(super) async fn get_part(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, Failure> {
        let mut call = Call::new(Method::Get, Some(key), "read", "s3:GetObject");
        if range.start > range.end || range.end - range.start > GET_BYTES_MAX {
            let error = ObjectError::Fatal(format!("{key}: range {range:?} is not a range of an object"));
            return Err(Failure { error, status: 0, code: String::new() });
        }
        if range.is_empty() {
            return Ok(ObjectBytes::from(Vec::new()));
        }
        call.headers.push(("range", format!("bytes={}-{}", range.start, range.end - 1)));
        // One byte more than asked for shows a store that sends too much.
        call.response_bytes_max = range.end - range.start + 1;
        let response = self.patiently(self.inner.policy.range_attempts, async || self.send(&call).await).await?;
        self.part(&call, response, &range)
    }

    fn part(&self, call: &Call<'_>, response: HttpResponse, range: &Range<u64>) -> Result<ObjectBytes, Failure> {
        match check_part(&response, range) {
            Ok(()) => Ok(ObjectBytes::from(response.body)),
            Err(why) => Err(self.wrong(call, response.status, &why)),
        }
    }
}

/// Whether the response holds exactly this range of the object.
fn check_part(response: &HttpResponse, range: &Range<u64>) -> Result<(), String> {
    let (start, last) = (range.start, range.end - 1);
    match response.status {
        206 => {
            let header = response.header("content-range").unwrap_or("nothing");
            match content_range(header) {
                Some((from, to)) if (from, to) == (start, last) => {}
                Some((from, to)) if from == start && to < last => {
                    return Err(format!("the object ends at {}, need {}", to + 1, range.end));
                }
                _ => return Err(format!("asked for bytes {start}-{last}, the store sent {header:?}")),
            }
        }
        // The whole object is right where it is the range.
        200 if start == 0 => {}
        status => return Err(format!("asked for bytes {start}-{last}, the store ignored the range ({status})")),
    }
    match response.body.len() as u64 {
        len if len == range.end - range.start => Ok(()),
        len => Err(format!("asked for {} bytes, the store sent {len}", range.end - range.start)),
    }
}

/// First and last byte of `bytes 0-99/1000`.
fn content_range(header: &str) -> Option<(u64, u64)> {
    let (part, _total) = header.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (from, to) = part.split_once('-')?;
    Some((from.trim().parse().ok()?, to.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_range_is_accepted() {
        let check = |status, header: &str, len, range: Range<u64>| {
            let headers = vec![("content-range".to_owned(), header.to_owned())];
            check_part(&HttpResponse { status, headers, body: vec![7; len] }, &range)
        };
        assert_eq!(check(206, "bytes 10-19/100", 10, 10..20), Ok(()));
        assert_eq!(check(206, "bytes 10-19/*", 10, 10..20), Ok(()));
        assert_eq!(check(200, "", 10, 0..10), Ok(()));
        for (status, header, len, range, why) in [
            (206, "bytes 10-19/100", 9, 10..20, "sent 9"),
            (206, "bytes 10-19/100", 11, 10..20, "sent 11"),
            (206, "bytes 11-20/100", 10, 10..20, "sent \"bytes 11-20/100\""),
            (206, "bytes 10-14/15", 5, 10..20, "ends at 15"),
            (206, "nonsense", 10, 10..20, "nonsense"),
            (200, "", 10, 10..20, "ignored the range"),
            (200, "", 11, 0..10, "sent 11"),
            (204, "", 0, 0..10, "ignored the range (204)"),
        ] {
            let error = check(status, header, len, range).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
